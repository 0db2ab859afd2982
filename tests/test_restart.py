"""The README's crontab line and systemd unit: the job goes on by itself after every death.

Each test runs the very line of README.md as cron would run it: by `sh`, in $HOME, in an environment
that is empty but for what cron sets.
"""
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, need, run, wait_for

from checkpointing import read_progress, sha256

README = (ROOT / "README.md").read_text()
CRONTAB = re.findall(r"^\*/\d+ \* \* \* \* (.+)$", README, re.M)
LINES = [line for line in CRONTAB if "generate.py" in line and "train_magvit.py" not in line]
STAGES = [line for line in CRONTAB if "train_magvit.py" in line]
STOP = re.findall(r"^touch .*stop; .*kill .*$", README, re.M)
UNITS = re.findall(r"```ini\n(\[Unit\]\n.*?)```", README, re.S)


class Cron:
    """A home directory with the project in it, and what cron does there."""

    def __init__(self, home):
        self.home, self.project, self.temp = home, home / "project", home / "tmp"
        (self.project / ".venv" / "bin").mkdir(parents=True)
        self.temp.mkdir()
        for path in ROOT.glob("*.py"):
            shutil.copy(path, self.project)
        self.starts = home / "starts"   # a line for every time that Python was started
        self.starts.touch()
        python = self.project / ".venv" / "bin" / "python"
        python.write_text(f'#!/bin/sh\necho start >> {self.starts}\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        self.out, self.log = self.project / "results", self.project / "generate.log"

    def tick(self, line=None):
        """What cron does every five minutes. Returns the process, the leader of a session."""
        line = line or LINES[0]
        assert not re.search(r"(?<!\\)%", line), "cron takes a % for the end of the line"
        # -i: nothing of our own environment; these are the variables that cron(8) sets, and a
        # $TMPDIR to empty.
        bare = ["env", "-i", f"HOME={self.home}", "LOGNAME=me", "PATH=/usr/bin:/bin",
                "SHELL=/bin/sh", f"TMPDIR={self.temp}"]
        return subprocess.Popen([*bare, "/bin/sh", "-c", line.replace("\\%", "%")], cwd=self.home,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                start_new_session=True)

    def quiet_tick(self, line=None):
        """A tick that has nothing to do: it says nothing, starts nothing, changes nothing."""
        before = self.seen()
        process = self.tick(line)
        mail = process.communicate(timeout=60)[0]
        assert mail == "" and self.seen() == before
        return process.returncode

    def seen(self):
        files = {path.name: (path.read_bytes(), path.stat().st_mtime_ns)
                 for path in self.out.iterdir()
                 if path.is_file() and path.name not in ("PROGRESS.txt", "stop")}
        return files, self.log.read_text(), self.starts.read_text()

    def status(self):
        return read_progress(self.out / "PROGRESS.txt").get("Status")

    def wait_until_running(self):
        wait_for(lambda: self.status() == "RUNNING" and list(self.out.glob("checkpoint_*")),
                 "a checkpoint")


def kill_group(process):
    """All processes of the session are gone at once: a power cut, or a kill for lack of memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    wait_for(lambda: not living(process.pid), "the end of all processes of the group")


def living(group):
    """Processes of this group that have not ended: only then are their locks free."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(path)
    return found


def kill_python(process):
    """Only the job is killed, its shell lives on: what the kernel does when memory is out."""
    for pid in open(f"/proc/{process.pid}/task/{process.pid}/children").read().split():
        os.kill(int(pid), signal.SIGKILL)
    process.communicate(timeout=30)


@pytest.fixture
def cron(tmp_path):
    need("flock")
    assert len(LINES) == 1, "README.md has no crontab line that starts generate.py"
    return Cron(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    run("generate.py", "--n", 30000, "--out", out)
    run("merge.py", out, "--out", out / "dataset.npz")
    return sha256(out / "dataset.npz")


def test_crashes_and_reboots_until_it_is_complete_and_then_silence(cron, undisturbed):
    moments, deaths = random.Random(1), 0
    for attempt in range(60):
        process = cron.tick()
        if deaths >= 12:   # often enough: now it may end
            assert process.communicate(timeout=120)[0] == "" and process.returncode == 0
            break
        time.sleep(moments.uniform(0.02, 0.6))
        if process.poll() is not None:
            if cron.status() == "COMPLETE":   # a fast machine: once more from the beginning
                shutil.rmtree(cron.out)
            continue
        deaths += 1
        if attempt % 2:
            kill_python(process)
        else:   # the machine goes down: everything dies, and /tmp is empty when it is back
            kill_group(process)
            shutil.rmtree(cron.temp)
            cron.temp.mkdir()
    assert deaths >= 12 and cron.status() == "COMPLETE"
    run("merge.py", cron.out, "--out", cron.home / "dataset.npz")
    assert sha256(cron.home / "dataset.npz") == undisturbed
    log = cron.log.read_text()
    assert "Traceback" not in log and "complete" in log.splitlines()[-1]
    cron.quiet_tick()


@pytest.mark.parametrize("by_hand", [False, True], ids=["by cron", "by hand"])
def test_while_it_runs_cron_is_quiet_also_beside_a_start_by_hand(cron, by_hand):
    line = LINES[0].replace("--n 30000", "--n 10000000")
    if by_hand:
        cron.log.touch()
        command = [cron.project / ".venv/bin/python", "generate.py", "--n", "10000000"]
        process = subprocess.Popen(command, cwd=cron.project,
                                   stdout=subprocess.DEVNULL, start_new_session=True)
    else:
        process = cron.tick(line)
    cron.wait_until_running()
    os.killpg(process.pid, signal.SIGSTOP)   # as a job that is busy for minutes
    cron.quiet_tick(line)
    assert cron.starts.read_text() == "start\n"
    kill_group(process)
    assert cron.status() == "RUNNING"   # what a dead job leaves: it holds nothing
    process = cron.tick(line)
    wait_for(lambda: cron.starts.read_text() == "start\nstart\n", "the new start")
    kill_group(process)


def test_stopped_by_hand_it_stays_stopped_until_it_may_go_on(cron):
    line = LINES[0].replace("--n 30000", "--n 10000000")
    process = cron.tick(line)
    cron.wait_until_running()
    assert len(STOP) == 1
    subprocess.run(["sh", "-c", STOP[0]], cwd=cron.project, check=True)
    assert process.wait(timeout=30) == 143 and cron.status() == "INTERRUPTED"
    saved = int(read_progress(cron.out / "PROGRESS.txt")["Checkpoint"].split()[0])
    for _ in range(2):
        cron.quiet_tick(line)
    (cron.out / "stop").unlink()
    process = cron.tick(line)
    wait_for(lambda: cron.status() == "RUNNING", "the start")
    assert int(read_progress(cron.out / "PROGRESS.txt")["Checkpoint"].split()[0]) >= saved > 0
    kill_group(process)


def test_the_stop_line_kills_nobody_when_the_job_is_dead_already(cron):
    """Its number may be another program's by now."""
    cron.out.mkdir()
    other = subprocess.Popen(["sleep", "60"])
    (cron.out / "PROGRESS.txt").write_text(f"Job\nStatus: RUNNING\nPID: {other.pid}\n")
    subprocess.run(["sh", "-c", STOP[0]], cwd=cron.project, check=True)
    assert other.poll() is None and (cron.out / "stop").exists()
    other.kill()
    other.wait()


TRAINING = """import time, checkpointing   # in the place of train_magvit.py, which takes minutes
with checkpointing.Run("results/magvit_training", 100, every=5) as run:
    run.load(lambda file: None)
    for i in run.steps(b"state"):
        time.sleep(0.01)
"""


def test_several_stages_in_one_line_killed_until_all_are_complete(cron):
    assert len(STAGES) == 1
    (cron.project / "train_magvit.py").write_text(TRAINING)
    line = STAGES[0].replace("--n 30000", "--n 4000 --every 500")
    cron.log = cron.project / "stages.log"
    training = cron.out / "magvit_training" / "PROGRESS.txt"
    moments = random.Random(3)
    for attempt in range(12):
        process = cron.tick(line)
        time.sleep(0.1)
        second = cron.tick(line)   # beside the first: whatever stage it is in, it starts nothing
        assert second.communicate(timeout=60)[0] == ""
        if attempt < 6:
            time.sleep(moments.uniform(0, 1))
            kill_group(process)
        else:
            process.communicate(timeout=120)
        if read_progress(training).get("Status") == "COMPLETE":
            break
    assert read_progress(training)["Status"] == "COMPLETE" and (cron.out / "dataset.npz").exists()
    assert "in use" not in cron.log.read_text()
    cron.quiet_tick(line)


@pytest.mark.parametrize("more, words", [("--seed 7", "seed was 42, asked 7"),
                                         ("--sede 7", "unrecognized arguments"),
                                         ("--every 0", "--every must be")])
def test_wrongly_called_it_says_so_in_the_log_and_changes_nothing(cron, more, words):
    line = LINES[0].replace("--n 30000", "--n 10000000")
    process = cron.tick(line)
    cron.wait_until_running()
    kill_group(process)
    before = {path.name: path.read_bytes() for path in cron.out.iterdir() if path.name != ".lock"}
    process = cron.tick(line.replace(" >>", f" {more} >>"))
    assert process.communicate(timeout=60)[0] == "" and process.returncode == 2
    assert words in cron.log.read_text().splitlines()[-1]
    after = {path.name: path.read_bytes() for path in cron.out.iterdir() if path.name != ".lock"}
    for swept in [name for name in before.keys() - after.keys() if name.startswith(".")]:
        del before[swept]   # temp files of the killed writer
    assert after == before


def test_a_full_disk_is_said_in_the_log_and_cron_goes_on_once_there_is_room(cron, small_disk):
    shutil.rmtree(cron.out, ignore_errors=True)
    disk = small_disk(2 << 20)
    cron.out.symlink_to(disk)
    line = LINES[0].replace("--n 30000", "--n 3000 --every 100")
    (disk / "other").write_bytes(bytes(1_500_000))
    process = cron.tick(line)
    assert process.communicate(timeout=60)[0] == "" and process.returncode == 1
    assert "Make room" in cron.log.read_text()
    (disk / "other").unlink()
    process = cron.tick(line)
    assert process.communicate(timeout=60)[0] == "" and cron.status() == "COMPLETE"


# -- systemd


def test_the_systemd_unit_is_right(tmp_path):
    need("systemd-analyze")
    assert len(UNITS) == 1, "README.md has no systemd unit"
    home = Cron(tmp_path).home
    unit = tmp_path / "generate.service"
    unit.write_text(UNITS[0].replace("%h", str(home)))   # verify looks whether the program is there
    verify = ["systemd-analyze", "verify", "--man=no", unit]
    done = subprocess.run(verify, capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], "HOME": str(home)})
    said = [line for line in (done.stdout + done.stderr).splitlines() if "generate" in line]
    assert done.returncode == 0 and not said, done.stderr
    settings = dict(re.findall(r"^(\w+)=(.*)$", UNITS[0], re.M))
    assert settings["Restart"] == "on-failure"
    assert settings["RestartPreventExitStatus"].split() == ["2", "75"]
    assert settings["KillMode"] == "mixed", "or SIGTERM would kill the workers of a pool at once"
    # The control: a unit with a fault is found.
    unit.write_text(unit.read_text().replace("on-failure", "sometimes"))
    done = subprocess.run(verify, capture_output=True, text=True)
    assert "sometimes" in done.stderr
