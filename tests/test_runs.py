"""runs.py: what people and pages ask of run directories, and the line for cron."""
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
from conftest import (ROOT, command, durable, environment, kill, need, need_root, progress, run,
                      start, wait_for)

import checkpointing
import runs
from checkpointing import DirectoryLock, write_atomic

JOB = "tests/counting_job.py"


def working(out, total=10**6, **more):
    """A job at work in `out`, with something saved."""
    process = start(JOB, out, total, 5, env=environment(PAUSE=0.01), **more)
    wait_for(lambda: runs.held(out / ".lock") and durable(out), "its lock and a checkpoint")
    return process


def ask(*arguments, code=0, **more):
    """The lines of `runs.py ...`; where it fails, an error is one line."""
    done = subprocess.run(command("runs.py", *arguments), stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.PIPE, timeout=100, **more)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr + done.stdout
    return (done.stdout + done.stderr).splitlines()


# -- is it alive?

def test_the_lock_decides_where_it_is_and_the_heartbeat_in_a_copy(tmp_path):
    now, old = int(time.time()) + 100, int(time.time()) - 200
    for number, (status, heartbeat, lock, word) in enumerate((
            ("RUNNING", old, "held", "RUNNING"), ("STALLED", old, "held", "STALLED"),
            ("RUNNING", now, "free", "DEAD"), ("STALLED", now, "free", "DEAD"),
            ("RUNNING", now, "none", "RUNNING"), ("STALLED", now, "none", "STALLED"),
            ("RUNNING", old, "none", "SILENT"), ("STALLED", old, "none", "SILENT"),
            ("COMPLETE", old, "free", "COMPLETE"), ("COMPLETE", old, "none", "COMPLETE"),
            ("COMPLETE", old, "held", "STARTING"), ("FAILED", old, "held", "STARTING"),
            (None, now, "held", "STARTING"), (None, now, "free", "UNREADABLE"))):
        out = tmp_path / str(number)
        out.mkdir()
        if status:      # the number of a living process, as after a restart of the machine
            write_atomic(out / "PROGRESS.txt", f"Job\nStatus: {status}\nHeartbeat: {heartbeat}\n"
                         f"Interval: 30 s\nPID: {os.getpid()}\nHost: {os.uname().nodename}\n")
        if lock != "none":
            held = DirectoryLock(out)
            if lock == "free":
                held.close()
        found, told = runs.state_of(out)
        assert (found, told.get("Status")) == (word, status), number
    process = working(tmp_path / "zombie")
    process.send_signal(signal.SIGKILL)
    wait_for(lambda: runs.state_of(tmp_path / "zombie")[0] == "DEAD", "its end, unreaped")
    kill(process)


# -- status and verify

def test_status_says_what_every_run_is_doing_what_is_saved_and_what_to_type(tmp_path):
    run(JOB, tmp_path / "a" / "done", 20)
    living, dead = working(tmp_path / "a" / "living"), working(tmp_path / "a" / "dead")
    stopped = working(tmp_path / "elsewhere", 1000)
    kill(dead)
    stopped.terminate()
    stopped.communicate(timeout=60)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "a" / "done", tmp_path / "a" / ".partial")
    said = {line.split(":")[0]: line for line in ask("status", "a", cwd=tmp_path)}
    kill(living)
    assert said.keys() == {"a/done", "a/living", "a/dead", "a/link"}
    assert "COMPLETE  20/20 steps (100%)  20 saved" in said["a/done"]
    assert "RUNNING" in said["a/living"]
    number = durable(tmp_path / "a" / "dead")
    assert "DEAD" in said["a/dead"] and f"{number} saved" in said["a/dead"]
    number = durable(tmp_path / "elsewhere")
    assert f"INTERRUPTED  {number}/1000 steps" in said["a/link"]
    assert f"{number} saved" in said["a/link"]
    subprocess.run(["sh", "-c", said["a/link"].partition("go on with: ")[2]], check=True,
                   stderr=subprocess.DEVNULL)
    assert runs.state_of(tmp_path / "elsewhere")[0] == "COMPLETE"
    for place in ("nowhere", "a/done/PROGRESS.txt"):
        assert len(ask("status", tmp_path / place, code=2)) == 1


def a_zip(kind=zipfile.ZIP_STORED):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", kind) as archive:
        for name in "abc":
            archive.writestr(f"{name}.npy", random.Random(name).randbytes(30) * 3)
    return content.getvalue()


def test_verify_names_every_bad_file(tmp_path):
    run(JOB, tmp_path / "states", 30)
    checkpointing.map(str, range(40), tmp_path / "pieces", every=10)
    (tmp_path / ".rsync-partial").mkdir()
    for name, content in (("set.npz", a_zip()), ("model.pt", a_zip(zipfile.ZIP_DEFLATED)),
                          ("metrics.json", b"{}"), ("checkpoint_00000.json.corrupt", b"set aside"),
                          (".rsync-partial/checkpoint_00010.json", b"ha")):
        (tmp_path / name).write_bytes(content)
    assert ask("verify", tmp_path)[-1].endswith(" files are whole, 0 bad")
    (tmp_path / "pieces" / "checkpoint_00020.jsonl").unlink()
    flipped, fewer = bytearray(a_zip()), bytearray(a_zip())
    flipped[60] ^= 1        # data of the first member
    fewer[-12] += 1         # how many members the archive says that it has
    bad = {"pieces/checkpoint_00010.jsonl": b"{}", "pieces/checkpoint_00050.jsonl": b"no line",
           "states/checkpoint_00030.json": b"", "metrics.json": b"{", "model.pt": a_zip()[:-9],
           "set.npz": flipped, "fewer.npz": fewer}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    lines = ask("verify", ".", code=1, cwd=tmp_path)
    found = {line[4:].partition(": ")[0] for line in lines if line.startswith("BAD ")}
    assert found == {*bad, "pieces/checkpoint_00020.jsonl"} and lines[-1].endswith(" 8 bad")


def test_verify_runs_beside_a_job_at_work(tmp_path):
    process = start(JOB, tmp_path, 10**6, 1, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: durable(tmp_path), "a checkpoint")
    for _ in range(10):
        assert ask("verify", tmp_path)[-1].endswith("0 bad")
    kill(process)


# -- keep

@pytest.fixture
def kept(tmp_path):
    """keep(total): what cron starts for a job in `out`. Each start of it is a line in `log`."""
    script, keeps = tmp_path / "job.sh", []
    script.write_text(f"echo start >> log; exec {sys.executable} '{ROOT / JOB}' out $1 2> errors")

    def keep(total, **settings):
        keeps.append(subprocess.Popen(command("runs.py", "keep", "out", "--", "sh", script, total),
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                      cwd=tmp_path, env=environment(**settings)))
        return keeps[-1]
    yield keep
    for process in keeps:
        process.kill()
        process.wait()


def ended(process, code=0):
    """It has ended with this code, in silence."""
    assert process.communicate(timeout=120)[0] == "" and process.returncode == code


def test_keep_starts_it_until_it_has_ended_well_and_then_never_again(tmp_path, kept):
    out, log = tmp_path / "out", tmp_path / "log"
    for number in range(4):
        before, process = durable(out), kept(10**6, PAUSE=0.01)
        wait_for(lambda: durable(out) > before, "work")       # noqa: B023
        if number % 2:
            process.terminate()         # is handed on: the work is saved
            ended(process, 143)
            assert runs.state_of(out)[0] == "INTERRUPTED"
        else:
            os.kill(int(progress(out)["PID"]), signal.SIGKILL)
            ended(process, 137)
    ended(kept(10**6, FAIL_AT=durable(out) + 5), 1)
    total = durable(out) + 20
    for _ in range(3):
        ended(kept(total))
    assert log.read_text() == "start\n" * 6 and runs.state_of(out)[0] == "COMPLETE"
    ended(kept(total + 10))     # another command is a new one
    assert log.read_text() == "start\n" * 7 and durable(out) == total + 10


def test_keep_goes_by_the_exit_code_not_by_complete_and_takes_several_stages(tmp_path):
    job = f"{sys.executable} {ROOT / JOB}"
    line = f"{job} out/a 5 && {job} out/b 5 && echo x >> last && test -e ready && echo all"
    for code, said, times in ((1, "", 1), (1, "", 2), (0, "all\n", 3), (0, "", 3), (0, "", 3)):
        if said:
            (tmp_path / "ready").touch()
        done = subprocess.run(command("runs.py", "keep", "out", "--", "sh", "-c", line), text=True,
                              cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert (done.returncode, done.stdout) == (code, said)
        assert (tmp_path / "last").read_text() == "x\n" * times
    assert runs.state_of(tmp_path / "out" / "b")[0] == "COMPLETE"
    done = subprocess.run(command("runs.py", "keep", tmp_path / "new", "--", "no-such-program"),
                          stderr=subprocess.PIPE)
    assert done.returncode in (1, 2) and done.stderr.count(b"\n") == 1
    for wrong in (["frobnicate"], ["keep"], ["keep", "out", "--"], ["keep", "out", "ls"], ["stop"]):
        ask(*wrong, code=2)


def test_of_many_crons_at_once_one_starts_it_and_beside_a_job_at_work_none(tmp_path, kept):
    out, log = tmp_path / "out", tmp_path / "log"
    keeps = [kept(10**6, PAUSE=0.01) for _ in range(8)]
    wait_for(lambda: sum(keep.poll() is not None for keep in keeps) == 7, "seven of eight")
    [process] = [keep for keep in keeps if keep.poll() is None]
    for keep in keeps:
        keep is process or ended(keep)
    wait_for(lambda: durable(out), "a checkpoint")
    pid = int(progress(out)["PID"])
    process.kill()                      # the keep alone: the job works on
    process.wait()
    ended(kept(10**6))
    os.kill(pid, signal.SIGSTOP)        # as one that is busy for minutes
    ended(kept(10**6))
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: runs.state_of(out)[0] == "DEAD", "its end")
    by_hand = working(out)
    ended(kept(10**6))
    kill(by_hand)
    (out / "stop").touch()              # stopped by hand
    ended(kept(10**6))
    assert log.read_text() == "start\n"


# -- stop

def test_stop_waits_until_it_is_saved_and_it_stays_stopped_until_it_may_go_on(tmp_path, kept):
    out, process = tmp_path / "out", kept(10**6, PAUSE=0.01)
    wait_for(lambda: durable(out), "a checkpoint")
    lines = ask("stop", out)
    state, told = runs.state_of(out)
    assert state == "INTERRUPTED" and told["Progress"].startswith(f"{durable(out)}/")
    assert f"{durable(out)} (checkpoint_" in "".join(lines)
    ended(process, 143)
    ended(kept(10**6))
    assert runs.state_of(out)[0] == "INTERRUPTED"
    # a stranger's process, its number in PROGRESS.txt, reads .lock: it is not hurt
    with open(out / ".lock") as lock:
        stranger = subprocess.Popen(["sleep", "600"], stdin=lock)
    for process in (None, working(out)):
        text = (out / "PROGRESS.txt").read_text().replace("INTERRUPTED", "RUNNING")
        number = progress(out)["PID"]
        write_atomic(out / "PROGRESS.txt", text.replace(number, str(stranger.pid)))
        ask("stop", out)
        assert process is None or process.wait(timeout=60) == 143
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
    subprocess.run(["sh", "-c", lines[-1][lines[-1].index("rm "):]], check=True)
    ended(kept(durable(out) + 10))
    assert runs.state_of(out)[0] == "COMPLETE"
    assert len(ask("stop", tmp_path / "nowhere", code=2)) == 1


def test_stop_finds_a_job_in_another_pid_namespace(tmp_path):
    """As in a container, where the job takes itself for number 1, which here is another."""
    need("unshare")
    need_root()
    out = tmp_path / "out"
    inside = subprocess.Popen(["unshare", "--pid", "--fork", "--mount-proc", *command(
        JOB, out, 10**6, 5)], env=environment(PAUSE=0.01), stderr=subprocess.DEVNULL)
    wait_for(lambda: durable(out), "a checkpoint")
    assert runs.state_of(out)[0] == "RUNNING" and runs.state_of(out)[1]["PID"] == "1"
    ask("stop", out)
    assert inside.wait(timeout=60) == 143 and runs.state_of(out)[0] == "INTERRUPTED"
