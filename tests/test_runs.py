"""runs.py: what people and pages ask of run directories, and the line for cron."""
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib

import pytest
from conftest import ROOT, command, kill, need, need_root, run, start, wait_for

import checkpointing
import runs
from checkpointing import DirectoryLock, read_progress, write_atomic

JOB = "tests/counting_job.py"


def environment(**more):
    return {**os.environ, **{key: str(value) for key, value in more.items()}}


def working(out, total=10**6, **more):
    """A job at work in `out`, with something saved."""
    process = start(JOB, out, total, 5, env=environment(PAUSE=0.01), **more)
    wait_for(lambda: runs.held(out / ".lock") and saved(out), "its lock and a checkpoint")
    return process


def saved(out):
    number = read_progress(out / "PROGRESS.txt").get("Checkpoint", "none").split()[0]
    return int(number) if number.isdigit() else 0


def ask(*arguments, code=0, **more):
    """The lines of `runs.py ...`; where it fails, an error is one line."""
    done = subprocess.run(command("runs.py", *arguments), stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.PIPE, timeout=100, **more)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr + done.stdout
    return (done.stdout + done.stderr).splitlines()


# -- is it alive?

def test_the_lock_decides_where_it_is_and_the_heartbeat_in_a_copy(tmp_path):
    now, old = int(time.time()), int(time.time()) - 200
    for number, (status, heartbeat, lock, word) in enumerate((
            ("RUNNING", now, "held", "RUNNING"), ("RUNNING", old, "held", "RUNNING"),
            ("STALLED", old, "held", "STALLED"), ("RUNNING", now, "free", "DEAD"),
            ("STALLED", now, "free", "DEAD"), ("RUNNING", now, "none", "RUNNING"),
            ("STALLED", now, "none", "STALLED"), ("RUNNING", old, "none", "SILENT"),
            ("STALLED", old, "none", "SILENT"), ("COMPLETE", old, "free", "COMPLETE"),
            ("COMPLETE", old, "none", "COMPLETE"), ("COMPLETE", old, "held", "STARTING"),
            ("FAILED", old, "held", "STARTING"), ("INTERRUPTED", now, "free", "INTERRUPTED"),
            (None, now, "held", "STARTING"), (None, now, "free", "UNREADABLE"),
            ("garbage: [", now, "none", None))):
        out = tmp_path / str(number)
        out.mkdir()
        if status:      # the number of a living process, as after a restart of the machine
            write_atomic(out / "PROGRESS.txt", f"Job\nStatus: {status}\nHeartbeat: {heartbeat}\n"
                         f"Interval: 30 s\nPID: {os.getpid()}\nHost: {os.uname().nodename}\n")
        if lock != "none":
            held = DirectoryLock(out)
            if lock == "free":
                held.close()
        found, progress = runs.state_of(out)
        assert word in (found, None) and progress.get("Status") == status, (number, found)
    process = working(tmp_path / "zombie")
    process.send_signal(signal.SIGKILL)
    wait_for(lambda: runs.state_of(tmp_path / "zombie")[0] == "DEAD", "its end, unreaped")
    kill(process)


# -- status and verify

def test_status_says_what_every_run_is_doing_what_is_saved_and_what_to_type(tmp_path):
    need("strace")
    run(JOB, tmp_path / "a" / "done", 20)
    living, dead = working(tmp_path / "a" / "living"), working(tmp_path / "a" / "dead")
    stopped = working(tmp_path / "elsewhere", 100)
    kill(dead)
    stopped.terminate()
    stopped.wait()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "lost+found").mkdir()
    shutil.copytree(tmp_path / "a" / "done", tmp_path / "a" / ".partial")
    done = subprocess.run(["strace", "-f", "-qq", "-o", "/dev/null", "-P", "a/lost+found",
                           "-e", "inject=openat:error=EACCES", *command("runs.py", "status", "a")],
                          cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    kill(living)
    *lines, last = done.stdout.splitlines()
    assert "a/lost+found" in last and len(lines) == 4
    said = {line.split(":")[0]: line for line in lines}
    assert "COMPLETE  20/20 steps (100%)  20 saved" in said["a/done"]
    assert "RUNNING" in said["a/living"] and "heartbeat" in said["a/living"]
    assert "DEAD" in said["a/dead"] and f"{saved(tmp_path / 'a' / 'dead')} saved" in said["a/dead"]
    number = saved(tmp_path / "elsewhere")
    assert f"INTERRUPTED  {number}/100 steps" in said["a/link"]
    assert f"{number} saved" in said["a/link"]
    subprocess.run(["sh", "-c", said["a/link"].partition("go on with: ")[2]], check=True,
                   stderr=subprocess.DEVNULL)
    assert runs.state_of(tmp_path / "elsewhere")[0] == "COMPLETE"
    ask("status", tmp_path / "a" / "lost+found", code=1)
    for place in ("nowhere", "a/done/PROGRESS.txt"):
        assert len(ask("status", tmp_path / place, code=2)) == 1
    ask("frobnicate", code=2)
    assert "keep DIR" in " ".join(ask("--help"))


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
    bad = {"pieces/checkpoint_00010.jsonl": b"{}", "pieces/checkpoint_00050.jsonl": b"no line",
           "states/checkpoint_00030.json": b"", "metrics.json": b"{", "model.pt": a_zip()[:-9],
           "caf\u00e9\x1b[31m\n.npz": b"no zip"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    lines = ask("verify", ".", code=1, cwd=tmp_path, env=environment(PYTHONIOENCODING="ascii"))
    found = {line[4:].partition(": ")[0] for line in lines if line.startswith("BAD ")}
    assert found - {"caf\\xe9 [31m .npz"} == {*bad, "pieces/checkpoint_00020.jsonl"} - {
        "caf\u00e9\x1b[31m\n.npz"} and len(found) == 7 and lines[-1].endswith(" 7 bad")
    for word in ("status", "verify"):       # a reader that has left is no error, a full disk is one
        line = " ".join(map(str, command("runs.py", word, tmp_path / "states")))
        subprocess.run(["bash", "-c", f"{line} | true; test ${{PIPESTATUS[0]}} -le 1"], check=True)
        done = subprocess.run(["bash", "-c", f"{line} > /dev/full"], stderr=subprocess.PIPE)
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1, done.stderr


def test_a_flipped_bit_in_the_data_and_any_cut_of_a_result_is_found(tmp_path):
    path = tmp_path / "set.npz"
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        data = a_zip(kind)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inside = {at for info in archive.infolist() for at in range(
                info.header_offset + 35, info.header_offset + 35 + info.compress_size)}
        for at in range(len(data)):     # what is not found is no data; and never a stack trace
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1:])
            bad = runs.verify([str(tmp_path)])
            assert bad or at not in inside or kind == zipfile.ZIP_DEFLATED, at
            path.write_bytes(data[:at])
            assert runs.verify([str(tmp_path)]) == 1, f"cut to {at} of {len(data)} bytes"


def test_verify_runs_beside_a_job_at_work(tmp_path):
    process = start(JOB, tmp_path, 10**6, 1, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: saved(tmp_path), "a checkpoint")
    for _ in range(10):
        assert ask("verify", tmp_path)[-1].endswith("0 bad")
    kill(process)


@pytest.mark.thorough
def test_verify_is_linear(tmp_path):
    def seconds(count):
        out, lines, record = tmp_path / str(count), [], {
            "bytes": 0, "sha256": hashlib.sha256().hexdigest()}
        out.mkdir()
        for number in range(count):
            record.update(name=f"checkpoint_{number:05d}.x", start=number, stop=number + 1)
            (out / record["name"]).touch()
            seal = zlib.crc32(json.dumps(record, sort_keys=True).encode())
            lines.append(json.dumps(dict(record, seal=seal)))
        (out / "checkpoints.jsonl").write_text("\n".join(lines) + "\n")
        before = os.times()
        assert ask("verify", out)[-1] == f"{count} files are whole, 0 bad"
        return os.times().children_user - before.children_user
    assert seconds(100_000) < 8 * seconds(25_000)      # the square would be sixteen times


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
    assert process.communicate(timeout=60)[0] == "" and process.returncode == code


def test_keep_starts_it_until_it_has_ended_well_and_then_never_again(tmp_path, kept):
    out, log = tmp_path / "out", tmp_path / "log"
    for number in range(4):
        before, process = saved(out), kept(10**6, PAUSE=0.01)
        wait_for(lambda: saved(out) > before, "work")       # noqa: B023
        if number % 2:
            process.terminate()         # is handed on: the work is saved
            ended(process, 143)
            assert runs.state_of(out)[0] == "INTERRUPTED"
        else:
            os.kill(int(read_progress(out / "PROGRESS.txt")["PID"]), signal.SIGKILL)
            ended(process, 137)
    ended(kept(10**6, FAIL_AT=saved(out) + 5), 1)
    total = saved(out) + 20
    for _ in range(3):
        ended(kept(total))
    assert log.read_text() == "start\n" * 6 and runs.state_of(out)[0] == "COMPLETE"
    ended(kept(total + 10))     # another command is a new one
    assert log.read_text() == "start\n" * 7 and saved(out) == total + 10


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
    for wrong in (["keep"], ["keep", "out", "--"], ["keep", "out", "ls"], ["stop"]):
        ask(*wrong, code=2)


def test_of_many_crons_at_once_one_starts_it_and_beside_a_job_at_work_none(tmp_path, kept):
    out, log = tmp_path / "out", tmp_path / "log"
    keeps = [kept(10**6, PAUSE=0.01) for _ in range(8)]
    wait_for(lambda: sum(keep.poll() is not None for keep in keeps) == 7, "seven of eight")
    [process] = [keep for keep in keeps if keep.poll() is None]
    for keep in keeps:
        keep is process or ended(keep)
    wait_for(lambda: saved(out), "a checkpoint")
    pid = int(read_progress(out / "PROGRESS.txt")["PID"])
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
    wait_for(lambda: saved(out), "a checkpoint")
    lines = ask("stop", out)
    state, progress = runs.state_of(out)
    assert state == "INTERRUPTED" and progress["Progress"].startswith(f"{saved(out)}/")
    assert f"{saved(out)} (checkpoint_" in "".join(lines)
    ended(process, 143)
    ended(kept(10**6))
    assert runs.state_of(out)[0] == "INTERRUPTED"
    # a stranger's process, its number in PROGRESS.txt, reads .lock: it is not hurt
    with open(out / ".lock") as lock:
        stranger = subprocess.Popen(["sleep", "60"], stdin=lock)
    for process in (None, working(out)):
        text = (out / "PROGRESS.txt").read_text().replace("INTERRUPTED", "RUNNING")
        number = read_progress(out / "PROGRESS.txt")["PID"]
        write_atomic(out / "PROGRESS.txt", text.replace(number, str(stranger.pid)))
        ask("stop", out)
        assert process is None or process.wait(timeout=30) == 143
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
    subprocess.run(["sh", "-c", lines[-1][lines[-1].index("rm "):]], check=True)
    ended(kept(saved(out) + 10))
    assert runs.state_of(out)[0] == "COMPLETE"
    assert len(ask("stop", tmp_path / "nowhere", code=2)) == 1


def test_stop_finds_a_job_in_another_pid_namespace(tmp_path):
    """As in a container, where the job takes itself for number 1, which here is another."""
    need("unshare")
    need_root()
    out = tmp_path / "out"
    inside = subprocess.Popen(["unshare", "--pid", "--fork", "--mount-proc", *command(
        JOB, out, 10**6, 5)], env=environment(PAUSE=0.01), stderr=subprocess.DEVNULL)
    wait_for(lambda: saved(out), "a checkpoint")
    assert runs.state_of(out)[0] == "RUNNING" and runs.state_of(out)[1]["PID"] == "1"
    ask("stop", out)
    assert inside.wait(timeout=30) == 143 and runs.state_of(out)[0] == "INTERRUPTED"
