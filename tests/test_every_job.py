"""A stranger's job behaves under Run as it does without: forks, pools, threads, terminals, faults."""
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, command, kill, need, run, start, wait_for

import checkpointing
from checkpointing import CheckpointError, Run, find_checkpoints, problem_with, read_progress

JOB = "tests/counting_job.py"
HEAD = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport checkpointing, json, os, signal, time\n"


def job(tmp_path, code):
    """A script with the usual head; `out` is its run directory."""
    path = tmp_path / "job.py"
    path.write_text(HEAD + f"out = {str(tmp_path / 'out')!r}\n" + code)
    return path


def finish(path, *more, code=0, timeout=60, **options):
    done = subprocess.run([sys.executable, path, *more], capture_output=True, text=True, timeout=timeout, **options)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done


# -- forks, pools, threads


POOL = """
import multiprocessing
def square(i):
    return i * i
if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    with checkpointing.Run(out, 40, every=4, suffix=".json", max_minutes=1) as run:
        values = run.load(json.load, default=[])
        for i in run.steps(lambda file: file.write(json.dumps(values).encode())):
            with multiprocessing.Pool(4) as pool:
                values.append(sum(pool.map(square, range(20))))
    assert len(values) == 40
"""


def test_pools_inside_a_run_end_each_time_also_when_four_such_jobs_run_at_once(tmp_path):
    """Without the handlers given back to forked workers, terminate() hangs now and then: 160 pools."""
    jobs = []
    for i in range(4):
        (tmp_path / str(i)).mkdir()
        jobs.append(subprocess.Popen([sys.executable, job(tmp_path / str(i), POOL)], stdout=subprocess.DEVNULL))
    for process in jobs:
        assert process.wait(timeout=120) == 0


def test_forked_workers_have_the_signal_handlers_that_were_there_before(tmp_path):
    code = """
def mine(*_): pass
signal.signal(signal.SIGTERM, mine)
with checkpointing.Run(out, 10) as run:
    run.begin()
    assert signal.getsignal(signal.SIGTERM) is not mine
    if os.fork() == 0:
        os._exit(0 if signal.getsignal(signal.SIGTERM) is mine
                 and signal.getsignal(signal.SIGINT) is signal.default_int_handler else 7)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    run.save(10, "x")
assert signal.getsignal(signal.SIGTERM) is mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    finish(job(tmp_path, code))


@pytest.mark.parametrize("leaving", ["sys.exit(0)", "sys.exit(3)", "pass", "raise ValueError('child')", "os._exit(0)",
                                     "run.save(1, 'x')", "run.finish(); os._exit(0)"])
def test_a_forked_child_that_leaves_the_block_changes_nothing_on_disk(tmp_path, leaving):
    code = f"""
def files():
    return {{name: open(os.path.join(out, name), 'rb').read() for name in os.listdir(out)}}
with checkpointing.Run(out, 10, heartbeat=3600) as run:
    run.begin()
    run.save(5, "x")
    before, parent = files(), os.getpid()
    child = os.fork()
    if child == 0:
        {leaving}
    else:
        os.waitpid(child, 0)
        assert files() == before, (before, files())
        run.save(10, "y")
if os.getpid() != parent:
    os._exit(0)
"""
    finish(job(tmp_path, code))
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Status"] == "COMPLETE"


def test_process_pool_executor_threads_and_subprocesses_work_inside_a_run(tmp_path):
    code = """
import concurrent.futures, multiprocessing, subprocess
def double(i): return 2 * i
if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    with checkpointing.Run(out, 3, every=1, suffix=".json") as run:
        values = run.load(json.load, default=[])
        for i in run.steps(lambda file: file.write(json.dumps(values).encode())):
            with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as processes, \\
                    concurrent.futures.ThreadPoolExecutor(2) as threads:
                shell = subprocess.run(["sh", "-c", "trap"], capture_output=True, text=True, check=True)
                assert not shell.stdout
                values.append(list(processes.map(double, [i])) + list(threads.map(double, [i])))
    assert values == [[0, 0], [2, 2], [4, 4]]
"""
    finish(job(tmp_path, code))


def test_a_data_loader_with_workers_works_inside_a_run(tmp_path):
    code = """
import torch
class Data(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, i): return torch.tensor(i)
if __name__ == "__main__":
    with checkpointing.Run(out, 3, every=1, suffix=".json") as run:
        seen = run.load(json.load, default=[])
        for epoch in run.steps(lambda file: file.write(json.dumps(seen).encode())):
            loader = torch.utils.data.DataLoader(Data(), batch_size=8, num_workers=2)
            seen.append(int(sum(batch.sum() for batch in loader)))
    assert seen == [2016] * 3
"""
    finish(job(tmp_path, code))


def test_nested_runs_runs_one_after_the_other_and_a_run_entered_twice(tmp_path):
    code = """
def state(file): file.write(b"x")
with checkpointing.Run(out, 2, every=1) as outer:
    for i in outer.steps(state):
        with checkpointing.Run(f"{out}/inner{i}", 2, every=1) as inner:
            for j in inner.steps(state): pass
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL   # still the outer's
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
with checkpointing.Run(f"{out}2", 1) as again:
    for i in again.steps(state): pass
try:
    with again: pass
except RuntimeError as error:
    assert "entered before" in str(error)
else:
    raise AssertionError
"""
    finish(job(tmp_path, code))
    done = finish(ROOT / "checkpointing.py", "status", tmp_path)
    assert done.stdout.count("COMPLETE") == 4


def test_a_signal_in_a_nested_run_stops_both_as_interrupted(tmp_path):
    code = """
def state(file): file.write(b"x")
with checkpointing.Run(out, 2, every=1) as outer:
    for i in outer.steps(state):
        with checkpointing.Run(f"{out}/inner", 1000, every=1000) as inner:
            for j in inner.steps(state):
                if j == 10: os.kill(os.getpid(), signal.SIGTERM)
"""
    finish(job(tmp_path, code), code=143)
    for directory in (tmp_path / "out", tmp_path / "out" / "inner"):
        assert read_progress(directory / "PROGRESS.txt")["Status"] == "INTERRUPTED"
    assert [n for n, _ in find_checkpoints(tmp_path / "out" / "inner")] == [11]


IMAP = """
import multiprocessing
def simulate(i):
    time.sleep(0.01)
    return i * i
if __name__ == "__main__":
    signals = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with checkpointing.Run(out, 300, every=50, suffix=".json") as run, multiprocessing.Pool(2, **signals) as pool:
        values = run.load(json.load, default=[])
        write = lambda file: file.write(json.dumps(values).encode())
        for i, value in zip(run.steps(write), pool.imap(simulate, range(run.done, 300))):
            values.append(value)
"""


def test_the_recipe_for_a_pool_survives_ctrl_c_in_the_terminal(tmp_path):
    """Ctrl-C reaches all processes of the terminal, the workers too."""
    path = job(tmp_path, IMAP)
    stops = 0
    while True:
        process = subprocess.Popen([sys.executable, path], start_new_session=True, stderr=subprocess.PIPE, text=True)
        here = lambda: read_progress(tmp_path / "out" / "PROGRESS.txt").get("PID") == str(process.pid)   # noqa: E731, B023
        wait_for(here, "the work")
        time.sleep(0.5)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
        if process.returncode == 0:
            break
        if process.returncode == -2 and not errors:   # it was over, and Python itself was ending
            continue
        assert process.returncode == 130 and "Traceback" not in errors, errors
        assert errors.count("Ctrl-C again ends at once") == 1
        stops += 1
    assert stops >= 2
    assert json.loads(find_checkpoints(tmp_path / "out")[-1][1].read_bytes()) == [i * i for i in range(300)]


def test_a_second_ctrl_c_ends_a_job_whose_pool_died_of_the_first(tmp_path):
    """Workers that do not ignore SIGINT die of it and imap waits for ever: a second one insists."""
    code = IMAP.replace("initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)", "") \
        .replace("signals = dict()", "signals = {}")
    process = subprocess.Popen([sys.executable, job(tmp_path, code)], start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    wait_for(lambda: find_checkpoints(tmp_path / "out"), "a checkpoint")
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=15) == 130
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Status"] == "INTERRUPTED"


def test_a_second_ctrl_c_ends_at_once_with_what_was_saved_before(tmp_path):
    code = """
with checkpointing.Run(out, 10, every=1, suffix=".json") as run:
    for i in run.steps(lambda file: file.write(b"[]")):
        if i == 2:
            print("in the long step", flush=True)
            time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, job(tmp_path, code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "long step" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert "Ctrl-C again ends at once" in errors and "2/10 steps are saved" in out
    assert [n for n, _ in find_checkpoints(tmp_path / "out")] == [1, 2]


# -- early ends


SEARCH = """
with checkpointing.Run(out, 1000, every=10, suffix=".json") as run:
    values = run.load(json.load, default=[])
    for i in run.steps(lambda file: file.write(json.dumps(values).encode())):
        values.append(i * i)
        if i == 25:
            %s
print(run.done, run.total, len(values))
"""


def test_break_saves_what_was_done_and_says_that_it_is_not_complete(tmp_path):
    done = finish(job(tmp_path, SEARCH % "break"), code=1)
    assert "stopped by the program itself: 26/1000 steps are saved" in done.stdout
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Status"] == "INTERRUPTED"
    (tmp_path / "job.py").write_text((tmp_path / "job.py").read_text().replace("i == 25", "False"))
    finish(tmp_path / "job.py")
    assert json.loads(find_checkpoints(tmp_path / "out")[-1][1].read_bytes()) == [i * i for i in range(1000)]


@pytest.mark.parametrize("end", ["run.finish()", "run.finish(); break"])
def test_a_search_that_found_its_answer_is_complete_and_stays_so(tmp_path, end):
    for _ in range(2):
        done = finish(job(tmp_path, SEARCH % end))
        assert "26 26 26" in done.stdout
        progress = read_progress(tmp_path / "out" / "PROGRESS.txt")
        assert progress["Status"] == "COMPLETE" and progress["Progress"] == "26/26 steps (100%)"


def test_an_exception_in_a_step_saves_nothing_of_it_and_says_what_is_saved_and_done_again(tmp_path):
    done = finish(job(tmp_path, SEARCH % "raise ValueError('no')"), code=1)
    assert "failed with ValueError: 20/1000 steps are saved, 5 are done again" in done.stderr
    assert [n for n, _ in find_checkpoints(tmp_path / "out")] == [10, 20]


FINISHED_PIECES = """
with checkpointing.Run(out, 100, every=10, suffix=".txt") as run:
    for piece in run.pieces():
        for i in piece: pass
        piece.save(f"{piece.start} {piece.done}")
        if piece.start == 30: run.finish()
"""


def test_pieces_may_end_early_too(tmp_path):
    code = FINISHED_PIECES
    for _ in range(2):
        finish(job(tmp_path, code))
        assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Progress"] == "40/40 steps (100%)"
    finish(ROOT / "checkpointing.py", "verify", tmp_path)


def test_a_state_that_cannot_be_written_shows_at_the_first_step(tmp_path):
    code = """
with checkpointing.Run(out, 1000, every=500, suffix=".json") as run:
    for i in run.steps(lambda file: file.write("forgot to encode")):
        open(f"{out}/step", "a").write("x")
"""
    done = finish(job(tmp_path, code), code=1)
    assert "TypeError" in done.stderr and (tmp_path / "out" / "step").read_text() == "x"


def test_a_total_that_shrank_is_refused_not_called_complete(tmp_path):
    run(JOB, tmp_path, 50)
    done = run(JOB, tmp_path, 30, code=2)
    assert "more than the 30 asked for" in done.stderr
    assert read_progress(tmp_path / "PROGRESS.txt")["Status"] == "COMPLETE"
    run(JOB, tmp_path, 60)


def test_a_signal_in_the_last_step_ends_complete_and_stops_what_comes_after(tmp_path):
    code = """
with checkpointing.Run(out, 10, every=5, suffix=".json") as run:
    for i in run.steps(lambda file: file.write(b"[]")):
        if i == 9: os.kill(os.getpid(), signal.SIGTERM)
raise AssertionError("what comes after it is stopped")
"""
    finish(job(tmp_path, code), code=143)
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Status"] == "COMPLETE"


# -- a loop of one's own, and a total that is known late


OWN = """
with checkpointing.Run(out, suffix=".json", title="Own", heartbeat=0.05) as run:
    time.sleep(float(os.environ.get("LOADING", 0)))
    run.plan(total=50, settings={"seed": int(os.environ.get("SEED", 0))})
    done = run.load(json.load, default=0)
    if done < run.total:
        run.begin()
        while done < run.total:
            time.sleep(0.01)
            done += 1
            run.update(done, Loss=f"{1 / done:.3f}")
            run.expect(50 - done)
            if done == run.total or run.due():
                run.save(done, json.dumps(done))
            run.leave_if_asked()
"""


def test_a_loop_of_ones_own_saves_when_asked_to_stop_and_goes_on(tmp_path):
    path = job(tmp_path, OWN)
    process = subprocess.Popen([sys.executable, path])
    wait_for(lambda: read_progress(tmp_path / "out" / "PROGRESS.txt").get("Loss"), "the loop")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    saved = find_checkpoints(tmp_path / "out")[-1][0]
    assert 0 < saved < 50
    finish(path)
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Loss"] == "0.020"


def test_a_run_shows_while_it_is_still_loading_and_a_refusal_takes_that_back(tmp_path):
    path, progress = job(tmp_path, OWN), tmp_path / "out" / "PROGRESS.txt"
    slow = {**os.environ, "LOADING": "1"}
    process = subprocess.Popen([sys.executable, path], env=slow)
    wait_for(lambda: read_progress(progress).get("Status") == "RUNNING", "its announcement", 10)
    assert read_progress(progress)["Progress"] == "0/0 steps (0.0%)" and not find_checkpoints(tmp_path / "out")
    wait_for(lambda: int(read_progress(progress).get("Progress", "0/0").split("/")[0]) > 5, "the loop")
    process.send_signal(signal.SIGTERM)
    process.wait()
    before = progress.read_bytes()
    finish(path, code=2, env={**os.environ, "SEED": "1"})
    assert progress.read_bytes() == before
    finish(path)
    complete = progress.read_bytes()
    finish(path, env={**os.environ, "LOADING": "0.2"})   # complete: no flicker to RUNNING, Loss stays
    assert progress.read_bytes() == complete


def test_a_run_in_a_thread_does_not_take_the_signals_from_one_in_the_main_thread(tmp_path):
    code = """
import threading
def state(file): file.write(b"x")
def other():
    with checkpointing.Run(out + "/other", 300, every=1000) as run:
        for i in run.steps(state): time.sleep(0.01)
thread = threading.Thread(target=other)
thread.start()
time.sleep(0.3)
with checkpointing.Run(out, 1000, every=1000) as run:
    for i in run.steps(state):
        time.sleep(0.01)
        if i == 5: os.kill(os.getpid(), signal.SIGTERM)
"""
    finish(job(tmp_path, code), code=143)
    assert [n for n, _ in find_checkpoints(tmp_path / "out")] == [6]


def test_ctrl_c_before_the_work_begins_is_one_line(tmp_path):
    process = subprocess.Popen([sys.executable, job(tmp_path, OWN)], env={**os.environ, "LOADING": "30"},
                               stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "out" / "PROGRESS.txt").exists(), "its announcement")
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=10)[1]
    assert process.returncode == 130 and errors.count("\n") == 1 and "before the work began" in errors, errors
    assert not (tmp_path / "out" / "PROGRESS.txt").exists()


def test_ctrl_c_while_the_run_is_announced_is_one_line_too(tmp_path):
    code = """
plain = checkpointing.Progress._start
def start(progress):
    plain(progress)
    if os.environ.get("WHEN") == "after": os.kill(os.getpid(), signal.SIGINT)
checkpointing.Progress._start = start
write = checkpointing.Progress.write
def written(progress, status, error=None):
    done = write(progress, status, error)
    if os.environ.get("WHEN") == "written": os.kill(os.getpid(), signal.SIGINT)
    return done
checkpointing.Progress.write = written
with checkpointing.Run(out) as run: run.plan(10, {})
"""
    for when in ("written", "after"):
        done = finish(job(tmp_path, code), code=130, env={**os.environ, "WHEN": when})
        assert done.stderr.count("\n") == 1 and "before the work began" in done.stderr
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock"]


# -- the lock


def test_a_job_that_copies_its_own_directory_keeps_its_lock(tmp_path):
    code = """
import shutil
with checkpointing.Run(out, 10) as run:
    run.begin()
    shutil.copytree(out, out + "_copy")
    print("copied", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, job(tmp_path, code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "copied\n"
    done = run(JOB, tmp_path / "out", 10, code=75)
    kill(process)
    assert f"PID {process.pid} " in done.stderr


def test_the_refused_are_told_the_living_holder_while_it_is_still_loading(tmp_path):
    run(JOB, tmp_path / "out", 10)
    process = subprocess.Popen([sys.executable, job(tmp_path, OWN)], env={**os.environ, "LOADING": "60"})
    wait_for(lambda: b"PID" in (tmp_path / "out" / ".lock").read_bytes(), "the lock")
    done = run(JOB, tmp_path / "out", 10, code=75)
    kill(process)
    assert f"PID {process.pid} on host" in done.stderr


def test_exit_code_75_also_when_stderr_is_full(tmp_path):
    process = start(JOB, tmp_path, 1000, env={**os.environ, "PAUSE": "0.02"})
    wait_for(lambda: (tmp_path / "PROGRESS.txt").exists(), "the first")
    with open("/dev/full", "w") as full:
        assert subprocess.run(command(JOB, tmp_path, 10), stderr=full, stdout=full).returncode == 75
    kill(process)


# -- suffixes


@pytest.mark.parametrize("suffix", [".json.gz", ".tar.gz", ".7z", ".safetensors", ".a-b_c"])
def test_any_suffix_is_found_again(tmp_path, suffix):
    for total in (20, 40):
        with Run(tmp_path, total, every=10, suffix=suffix) as job_:
            values = job_.load(json.load, default=[])
            for i in job_.steps(lambda file: file.write(json.dumps(values).encode())):
                values.append(i)
        assert values == list(range(total))


@pytest.mark.parametrize("suffix", ["json", "", ".", ".a b", ".tmp", ".npz.corrupt", "/x", "._/"])
def test_an_impossible_suffix_is_refused_at_once(tmp_path, suffix):
    with pytest.raises(ValueError, match="suffix"):
        Run(tmp_path, 10, suffix=suffix)


def test_a_changed_suffix_is_refused_by_name(tmp_path, capsys):
    run(JOB, tmp_path, 20)
    with pytest.raises(SystemExit) as stop, Run(tmp_path, 20, suffix=".txt") as job_:
        job_.load(json.load)
    assert stop.value.code == 2 and "do not end in .txt" in capsys.readouterr().err
    assert [n for n, _ in find_checkpoints(tmp_path)] == [10, 20]


# -- faults of the disk


def test_a_save_that_failed_and_was_tried_again_is_not_lost_at_the_restart(small_disk):
    """A full disk tears the record's line; the next record must not be appended to the torn one."""
    disk = small_disk(1 << 20)
    code = HEAD + f"""
out = {str(disk / 'out')!r}
with checkpointing.Run(out, 30, every=10, suffix=".txt") as run:
    for piece in run.pieces():
        for i in piece: pass
        if piece.start == 10:
            filler = open(f"{disk}/filler", "wb", 0)
            try:
                while filler.write(bytes(1000)): pass
            except OSError: pass
            for free in range(0, 12):   # room for the file and only a part of the record
                os.truncate(f"{disk}/filler", os.path.getsize(f"{disk}/filler") - 4096)
                try:
                    piece.save("x" * 3000)
                    os.truncate(f"{disk}/filler", 0)
                    break
                except checkpointing.CheckpointError as error:
                    assert "No space left" in str(error)
        else:
            piece.save("x" * 3000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    finish(ROOT / "checkpointing.py", "verify", disk)
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert again.returncode == 0 and "warning" not in again.stderr and not list(disk.glob("out/*.corrupt"))


def test_a_torn_line_costs_no_later_record(tmp_path):
    run(JOB, tmp_path, 20)
    path = tmp_path / "checkpoints.jsonl"
    path.write_bytes(path.read_bytes()[:-20])   # the second record torn, no newline
    with Run(tmp_path, 30, every=10, suffix=".json") as job_:
        job_.load(json.load)
        job_.store._append({"name": "checkpoint_00030.json", "start": 30, "stop": 30, "bytes": 0, "sha256": "", "elapsed": 0})
        assert list(checkpointing.read_records(tmp_path)) == ["checkpoint_00010.json", "checkpoint_00030.json"]


def snapshot(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name not in (".lock", "PROGRESS.txt")}


@pytest.mark.parametrize("error", ["EIO", "EMFILE", "EACCES", "ENOMEM"])
@pytest.mark.parametrize("name", ["checkpoint_00020.json", "checkpoints.jsonl", "run.json"])
@pytest.mark.parametrize("call", ["openat", "read"])
def test_an_error_of_reading_is_not_damage(tmp_path, error, name, call):
    need("strace")
    out = tmp_path / "out"
    run(JOB, out, 20)
    before = snapshot(out)
    done = subprocess.run(["strace", "-f", "-qq", "-o", "/dev/null", "-P", out / name, "-e", f"trace={call}", "-e",
                           f"inject={call}:error={error}", *command(JOB, out, 40)], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert name in done.stderr and os.strerror(getattr(errno, error)) in done.stderr
    assert snapshot(out) == before
    run(JOB, out, 40)
    assert not list(out.glob("*.corrupt"))


@pytest.mark.parametrize("name", ["run.json", "checkpoints.jsonl", "PROGRESS.txt", ".reserve", ".lock",
                                  ".checkpoint_00010.json.1-00000000.tmp", "checkpoint_00010.json"])
def test_a_pipe_in_the_place_of_any_file_hangs_nothing(tmp_path, name):
    run(JOB, tmp_path, 20)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    for arguments in ((JOB, tmp_path, 30), ("checkpointing.py", "status", tmp_path), ("checkpointing.py", "verify", tmp_path)):
        done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=30)
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("text", ["Job\nElapsed: \n", "Job\nElapsed: " + "9" * 400 + " s\n", "Job\nElapsed: -1 s\n",
                                  "Job\nElapsed: 1e999 s\nProgress: " + "9" * 400 + "/3 steps\n", "Job\nHeartbeat: " + "9" * 400,
                                  "Job\nStatus: RUNNING\nHost: vm\nPID: " + "9" * 400 + "\nHeartbeat: 1\n", "[" * 100_000])
def test_no_content_of_progress_txt_stops_a_start(tmp_path, text):
    text = text.replace("Host: vm", f"Host: {os.uname().nodename}")
    run(JOB, tmp_path, 20)
    (tmp_path / "PROGRESS.txt").write_text(text)
    assert "Traceback" not in finish(ROOT / "checkpointing.py", "status", tmp_path).stderr
    assert not run(JOB, tmp_path, 30).stderr
    assert read_progress(tmp_path / "PROGRESS.txt")["Elapsed"] in ("0 s", "1 s")


@pytest.mark.parametrize("name", ["run.json", "checkpoints.jsonl"])
def test_deeply_nested_json_is_no_stack_trace(tmp_path, name):
    run(JOB, tmp_path, 20)
    with open(tmp_path / name, "a" if name == "checkpoints.jsonl" else "w") as file:
        file.write("[" * 200_000)
    done = subprocess.run(command(JOB, tmp_path, 30), capture_output=True, text=True)
    assert "Traceback" not in done.stderr and done.returncode == (1 if name == "run.json" else 0), done.stderr


def test_a_piece_that_is_empty_is_a_piece(tmp_path):
    for _ in range(2):
        with Run(tmp_path, 30, every=10, suffix=".txt") as job_:
            made = [piece.save(b"") for piece in job_.pieces() if list(piece)]
    assert made == [] and checkpointing.verify([tmp_path]) == 0


def test_without_its_records_a_state_is_gone_on_from_by_what_the_message_says(tmp_path):
    run(JOB, tmp_path, 20)
    (tmp_path / "checkpoints.jsonl").unlink()
    message = run(JOB, tmp_path, 30, code=1, cwd=ROOT).stderr
    assert "Nothing was changed" in message
    typed = re.search(r"python (checkpointing.py accept \S+checkpoint_00020\.json)", message)[1]
    run(*typed.split(), cwd=ROOT)
    run(JOB, tmp_path, 30)
    assert json.loads((tmp_path / "checkpoint_00030.json").read_bytes()) == [i * i for i in range(30)]


def test_a_kill_in_the_very_first_save_leads_to_no_false_words(tmp_path):
    code = """
real = os.replace
def die(a, b):
    if "checkpoint_" in str(b): os.kill(os.getpid(), 9)
    real(a, b)
os.replace = die
with checkpointing.Run(out, 30, every=10, suffix=".json") as run:
    for i in run.steps(lambda file: file.write(b"[]")): pass
"""
    assert subprocess.run([sys.executable, job(tmp_path, code)], stdout=subprocess.DEVNULL).returncode == -9
    assert len(checkpointing.read_records(tmp_path / "out")) == 1
    done = finish(job(tmp_path, code.replace("os.replace = die", "")))
    assert done.stderr == ""


# -- results that vouch for themselves


def sealed_files(tmp_path):
    import numpy as np
    checkpointing.write_sealed(tmp_path / "set.npz", lambda file: np.savez(file, a=np.arange(9), b=np.ones(3)), note="seed 7")
    checkpointing.write_sealed(tmp_path / "metrics.json", json.dumps({"psnr": 35.1, "names": ["a", "b"]}, indent=1))
    return tmp_path / "set.npz", tmp_path / "metrics.json"


def test_sealed_files_are_read_as_ever(tmp_path):
    import numpy as np
    npz, metrics = sealed_files(tmp_path)
    assert np.load(npz)["a"].tolist() == list(range(9)) and checkpointing.note_of(npz) == "seed 7"
    assert json.loads(metrics.read_text())["psnr"] == 35.1
    with zipfile.ZipFile(npz) as archive:
        assert archive.testzip() is None
    assert problem_with(npz) is None and checkpointing.verify([tmp_path]) == 0


def test_every_single_flipped_bit_and_every_cut_of_a_sealed_file_is_found(tmp_path, capsys):
    for path in sealed_files(tmp_path):
        data = path.read_bytes()
        for at in range(len(data)):
            for bit in (1, 64):
                path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1:])
                assert checkpointing._verdict_on(path, {}), f"{path.name}: byte {at} ^ {bit} passed"
        for length in range(len(data)):
            path.write_bytes(data[:length])
            assert checkpointing._verdict_on(path, {}), f"{path.name} cut to {length} of {len(data)} bytes passed"
        path.write_bytes(data)
        assert checkpointing.verify([tmp_path]) == 0


def test_a_sealed_model_loads_in_torch(tmp_path):
    import torch
    checkpointing.write_sealed(tmp_path / "m.pt", lambda file: torch.save({"w": torch.arange(5)}, file), note="n")
    assert torch.load(tmp_path / "m.pt", weights_only=True)["w"].tolist() == [0, 1, 2, 3, 4]
    assert torch.load(tmp_path / "m.pt", weights_only=True, mmap=True)["w"].sum() == 10
    assert problem_with(tmp_path / "m.pt") is None


def test_a_result_replaced_while_it_is_copied_verifies_on_every_copy(tmp_path):
    code = HEAD + f"""
import io, zipfile
for i in range(10**6):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive: archive.writestr("a", os.urandom(1000))
    checkpointing.write_sealed({str(tmp_path / 'best_model.pt')!r}, content.getvalue())
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: (tmp_path / "best_model.pt").exists(), "the first")
    seen = set()
    for _ in range(200):
        shutil.copy(tmp_path / "best_model.pt", tmp_path / "copy.pt")
        assert problem_with(tmp_path / "copy.pt") is None
        seen.add((tmp_path / "copy.pt").read_bytes())
        time.sleep(0.002)
    kill(process)
    assert len(seen) > 5


def test_verify_looks_past_what_a_copy_has_not_finished(tmp_path):
    run(JOB, tmp_path, 20)
    (tmp_path / ".rsync-partial").mkdir()
    (tmp_path / ".rsync-partial" / "checkpoint_00030.json").write_bytes(b"ha")
    assert finish(ROOT / "checkpointing.py", "verify", tmp_path).stdout == "2 files are whole, 0 bad\n"


# -- output that nobody reads, and outputs that fail


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_the_work_the_heartbeat_and_sigterm_go_on_when_nobody_reads(tmp_path, kind):
    import pty
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    code = """
with checkpointing.Run(out, 10**6, every=100, suffix=".json", heartbeat=0.05) as run:
    for i in run.steps(lambda file: file.write(b"[]")):
        run.log("a long line " * 100)
        time.sleep(0.001)
"""
    process = subprocess.Popen([sys.executable, job(tmp_path, code)], stdin=subprocess.DEVNULL, stdout=writer, stderr=writer)
    os.close(writer)
    out = tmp_path / "out"
    wait_for(lambda: find_checkpoints(out) and find_checkpoints(out)[-1][0] > 1000, "work beyond a full buffer", 60)
    first = read_progress(out / "PROGRESS.txt")
    wait_for(lambda: read_progress(out / "PROGRESS.txt")["Heartbeat"] > first["Heartbeat"], "a heartbeat", 10)
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 143
    assert read_progress(out / "PROGRESS.txt")["Status"] == "INTERRUPTED"
    os.close(reader)


def test_a_reader_that_leaves_and_a_full_output_are_no_stack_trace(tmp_path):
    run(JOB, tmp_path / "a", 20)
    run("generate.py", "--n", 40, "--every", 20, "--out", tmp_path / "g")
    for arguments in (["checkpointing.py", "status", tmp_path], ["checkpointing.py", "verify", tmp_path],
                      ["merge.py", tmp_path / "g", "--out", tmp_path / "set.npz"]):
        line = " ".join(map(str, command(*arguments)))
        piped = subprocess.run(["bash", "-o", "pipefail", "-c", f"{line} | head -c 1"], capture_output=True, text=True)
        assert piped.returncode == 0 and piped.stderr == "", piped.stderr
        full = subprocess.run(["bash", "-c", f"{line} > /dev/full"], capture_output=True, text=True)
        assert full.returncode == 1 and full.stderr.count("\n") == 1 and "No space left" in full.stderr, full.stderr
    assert subprocess.run(["bash", "-c", f"{sys.executable} {ROOT / JOB} {tmp_path / 'b'} 20 > /dev/full 2>&1"]).returncode == 0


@pytest.mark.parametrize("script", ["generate.py", "merge.py"])
def test_names_that_cannot_be_are_one_line(tmp_path, script):
    (tmp_path / "file").touch()
    run("generate.py", "--n", 8, "--out", tmp_path / "g")
    for out in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        arguments = [tmp_path / "g"] if script == "merge.py" else ["--n", 8]
        done = subprocess.run(command(script, *arguments, "--out", out), capture_output=True, text=True)
        assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    long = tmp_path / ("x" * 250)   # legal, also for its temp file
    checkpointing.write_atomic(long, "x")
    assert long.read_text() == "x"


@pytest.mark.parametrize("script", ["generate.py", "merge.py"])
def test_ctrl_c_at_any_moment_is_no_stack_trace(tmp_path, script):
    run("generate.py", "--n", 20000, "--out", tmp_path / "g")
    for i in range(12):
        arguments = [tmp_path / "g", "--out", tmp_path / "set.npz"] if script == "merge.py" \
            else ["--n", 20000, "--out", tmp_path / f"h{i}"]
        process = start(script, *arguments, stderr=subprocess.PIPE)
        time.sleep(0.1 + 0.05 * i)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
        if process.returncode == 0 or str(ROOT) not in errors and "stopped" not in errors:
            continue   # over, or Python itself is still starting
        assert process.returncode in (130, -2) and "Traceback" not in errors, errors


def test_without_a_thread_to_be_had_the_work_goes_on(tmp_path):
    code = """
import threading
def refuse(self): raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
with checkpointing.Run(out, 30, every=10, suffix=".json") as run:
    for i in run.steps(lambda file: file.write(b"[]")): pass
"""
    finish(job(tmp_path, code))
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Status"] == "COMPLETE"


def test_a_disk_that_answers_eio_to_everything_is_one_line(tmp_path):
    need("strace")
    run(JOB, tmp_path / "out", 20)
    for call in ("openat", "read", "write", "fsync", "rename", "flock", "unlink", "getdents64"):
        # -P: only what touches the run directory
        done = subprocess.run(["strace", "-f", "-qq", "-o", "/dev/null", "-P", tmp_path / "out", "-P", tmp_path / "out" / ".lock",
                               "-P", tmp_path / "out" / "checkpoints.jsonl", "-P", tmp_path / "out" / "run.json", "-P",
                               tmp_path / "out" / "checkpoint_00020.json", "-e", f"trace={call}", "-e",
                               f"inject={call}:error=EIO", *command(JOB, tmp_path / "out", 40)], capture_output=True, text=True)
        assert "Traceback" not in done.stderr and done.returncode in (0, 1), done.stderr


# -- the progress


def test_a_heartbeat_stuck_in_a_dead_file_system_does_not_hold_the_end(tmp_path):
    code = """
import threading
real = checkpointing.write_atomic
def stuck(path, *rest, **more):
    if threading.current_thread().name == "heartbeat": time.sleep(3600)
    return real(path, *rest, **more)
checkpointing.write_atomic = stuck
with checkpointing.Run(out, 30, every=10, suffix=".json", heartbeat=0.05) as run:
    for i in run.steps(lambda file: file.write(b"[]")): time.sleep(0.01)
"""
    finish(job(tmp_path, code), timeout=40)


def test_an_eta_beyond_the_year_9999_does_not_end_the_job(tmp_path):
    with Run(tmp_path, 10**18, heartbeat=0.01) as job_:
        job_.begin()
        time.sleep(0.1)
        job_.update(1)
        for seconds in (1e12, 1e30, float("inf")):
            job_.expect(seconds)
            job_.progress.write("RUNNING")
            assert read_progress(tmp_path / "PROGRESS.txt")["ETA"] == "unknown"
        job_.finish()
        job_.save(1, "x")


def test_the_last_word_keeps_the_jobs_own_lines_when_the_work_is_found_complete(tmp_path):
    with Run(tmp_path, 10) as job_:
        job_.begin()
        job_.update(10, Loss="0.25")
        job_.save(10, "x")
    text = (tmp_path / "PROGRESS.txt").read_text()
    (tmp_path / "PROGRESS.txt").write_text(text.replace("COMPLETE", "RUNNING"))   # killed before its last word
    with Run(tmp_path, 10) as job_:
        job_.load(lambda file: file.read())
    progress = read_progress(tmp_path / "PROGRESS.txt")
    assert progress["Status"] == "COMPLETE" and progress["Loss"] == "0.25"


def test_looking_changes_nothing(tmp_path):
    run(JOB, tmp_path, 20)
    before = snapshot(tmp_path), (tmp_path / "PROGRESS.txt").read_bytes()
    with Run(tmp_path, 40, every=10, suffix=".json") as job_:
        assert len(job_.load(json.load)) == 20
    assert (snapshot(tmp_path), (tmp_path / "PROGRESS.txt").read_bytes()) == before


def test_what_was_changed_in_the_process_is_put_back(tmp_path):
    code = """
before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)], sys.stdout.line_buffering
with checkpointing.Run(out, 2, every=1) as run:
    for i in run.steps(lambda file: file.write(b"x")): pass
assert before == ([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)], sys.stdout.line_buffering)
"""
    finish(job(tmp_path, code))


# -- map


MAP = """
def simulate(i):
    if i == int(os.environ.get("BAD", -1)): raise ValueError("bad item")
    time.sleep(0.001)
    return {"square": i * i, "pair": (i, i)}
values = checkpointing.map(simulate, range(int(os.environ.get("N", 1000))), out, every=100)
print(json.dumps(values[-2:]), len(values))
"""


def test_map_killed_and_restarted_gives_what_the_plain_map_gives(tmp_path):
    path, kills = job(tmp_path, MAP), 0
    while True:
        process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True)
        time.sleep(0.4)
        if process.poll() is not None:
            break
        kill(process)
        kills += 1
    last = process.communicate()[0].splitlines()[-1]
    assert kills >= 1 and last == '[{"square": 996004, "pair": [998, 998]}, {"square": 998001, "pair": [999, 999]}] 1000'
    more = finish(path, env={**os.environ, "N": "1050"}).stdout
    assert more.endswith("1050\n")
    finish(ROOT / "checkpointing.py", "verify", tmp_path)


def test_map_says_which_item_failed_and_keeps_those_before(tmp_path):
    done = finish(job(tmp_path, MAP), code=1, env={**os.environ, "BAD": "150"})
    assert "failed at item 150 (150) with ValueError" in done.stderr
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Error"] == "item 150 (150): ValueError: bad item"
    assert "bad item" in done.stderr and "150/1000 items are saved" in done.stderr
    assert sum(len(path.read_text().splitlines()) for _, path in find_checkpoints(tmp_path / "out")) == 150
    assert finish(tmp_path / "job.py").stdout.splitlines()[-1].endswith(" 1000")


def test_map_refuses_other_items(tmp_path, capsys):
    assert checkpointing.map(str, ["a", "b"], tmp_path) == ["a", "b"]
    with pytest.raises(SystemExit) as stop:
        checkpointing.map(str, ["a", "c"], tmp_path)
    assert stop.value.code == 2 and 'item 1 was "b"' in capsys.readouterr().err
    assert checkpointing.map(str, [], tmp_path / "none") == []


def test_errors_reach_people_as_one_line_with_their_code(tmp_path):
    with pytest.raises(CheckpointError) as error:
        problem_with(tmp_path)
    assert "not a regular file" in str(error.value)
    assert Path(tmp_path).exists()


# -- what a tester with fresh eyes found


def test_a_refusal_that_says_nothing_was_changed_is_true_for_may_grow_too(tmp_path, capsys):
    checkpointing.map(str, range(10), tmp_path, every=5)
    with pytest.raises(SystemExit):
        checkpointing.map(str, range(100, 120), tmp_path, every=5)
    assert "item 0 was 0" in capsys.readouterr().err
    assert checkpointing.map(str, range(10), tmp_path, every=5) == [str(i) for i in range(10)]


def test_a_job_that_changes_its_directory_keeps_its_own(tmp_path):
    code = """
os.makedirs("elsewhere/results")
with checkpointing.Run("results", 20, every=5, suffix=".json") as run:
    for i in run.steps(lambda file: file.write(b"[]")):
        if i == 7: os.chdir("elsewhere")
"""
    finish(job(tmp_path, code), cwd=tmp_path)
    assert [n for n, _ in find_checkpoints(tmp_path / "results")] == [10, 15, 20]
    assert not list((tmp_path / "elsewhere" / "results").iterdir())


def test_map_takes_items_that_its_function_changes_and_nan(tmp_path):
    def first(values):
        values.sort()
        return values[0]
    for _ in range(2):
        assert checkpointing.map(first, [[3, 1], [2, 1], [float("nan")]], tmp_path)[:2] == [1, 1]


def test_finish_with_unsaved_work_is_refused_not_called_complete(tmp_path):
    code = """
with checkpointing.Run(out, 1000) as run:
    run.begin()
    run.save(5, "x")
    run.update(8)
    run.finish()
"""
    assert "3 steps were not saved" in finish(job(tmp_path, code), code=1).stderr
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Status"] == "FAILED"


def test_a_git_commit_in_the_settings_is_no_damaged_seal(tmp_path):
    settings = {"commit": "0123456789abcdef0123456789abcdef01234567", "data": "sha256:" + "0" * 64}
    with Run(tmp_path, 1, settings=settings) as job_:
        for _ in job_.steps(lambda file: file.write(b"x")):
            pass
    assert checkpointing.verify([tmp_path]) == 0


@pytest.mark.parametrize("loop", ["for i in run.steps(state):", "for i, _ in zip(run.steps(state), range(100)):",
                                  "for n, i in enumerate(run.steps(state)):"])
def test_a_step_that_an_exception_left_is_done_again(tmp_path, loop):
    code = f"""
def state(file): file.write(json.dumps(values).encode())
bad = True
with checkpointing.Run(out, 10, every=4, suffix=".json") as run:
    values = run.load(json.load, default=[])
    while run.done < run.total:
        try:
            {loop}
                if i == 5 and bad: raise ConnectionError
                values.append(i)
        except ConnectionError:
            bad = False
assert values == list(range(10)), values
"""
    finish(job(tmp_path, code))


def test_an_exception_caught_outside_its_loop_saves_no_half_step(tmp_path):
    code = """
with checkpointing.Run(out, 10, every=4, suffix=".json") as run:
    values = run.load(json.load, default=[])
    try:
        for i in run.steps(lambda file: file.write(json.dumps(values).encode())):
            if i == 5 and not values[4:5] == [99]: raise ValueError
            values.append(i)
    except ValueError:
        pass
"""
    finish(job(tmp_path, code), code=1)
    assert [n for n, _ in find_checkpoints(tmp_path / "out")] == [4]


def test_items_that_end_before_the_steps_do_count_no_step_that_never_ran(tmp_path):
    code = """
with checkpointing.Run(out, 10, every=100, suffix=".json") as run:
    values = run.load(json.load, default=[])
    for i, item in zip(run.steps(lambda file: file.write(json.dumps(values).encode())), range(8)):
        values.append(item)
        if i == 7: run.save(8, json.dumps(values))
"""
    finish(job(tmp_path, code), code=1)
    assert [n for n, _ in find_checkpoints(tmp_path / "out")] == [8]


BREAKS = """
import sys
sys.path.insert(0, %r)
import checkpointing
def kinds():
    for leave in ("break", "return", "raise", "end", "nested"):
        yield leave
def one(leave, seen):
    try:
        def inner():
            try:
                yield
            except GeneratorExit:
                seen.append(checkpointing.left_by_break(sys._getframe(1)))
                raise
        for _ in zip(inner(), [1] if leave != "end" else []):
            with open("/dev/null"):
                if leave == "break": break
                if leave == "return": return 1
                if leave == "nested":
                    for _ in [1]: break
                    break
                if leave == "raise": raise KeyError
    except KeyError:
        pass
found = {}
for leave in kinds():
    one(leave, found.setdefault(leave, []))
assert found == {"break": [True], "return": [True], "nested": [True], "raise": [False], "end": [False]}, found
"""


def test_break_and_exceptions_are_told_apart_on_every_python():
    from test_checkpointing import interpreters
    for version, python in interpreters().items():
        done = subprocess.run([python, "-I", "-S", "-c", BREAKS % str(ROOT)], capture_output=True, text=True)
        assert done.returncode == 0, f"{version}: {done.stderr}"


def test_a_directory_that_was_moved_away_is_not_written_into_again(tmp_path):
    process = start(JOB, tmp_path / "out", 1000, 5, env={**os.environ, "PAUSE": "0.01"})
    wait_for(lambda: find_checkpoints(tmp_path / "out"), "a checkpoint")
    (tmp_path / "out").rename(tmp_path / "old")
    (tmp_path / "out").mkdir()
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 1 and "was moved or replaced" in output
    assert not find_checkpoints(tmp_path / "out")


def test_a_run_outside_its_block_is_refused(tmp_path):
    run_ = Run(tmp_path, 10)
    with pytest.raises(RuntimeError, match="inside its block"):
        run_.steps(lambda file: file.write(b"x"))
    with run_:
        run_.begin()
        run_.save(10, "x")
    with pytest.raises(RuntimeError, match="inside its block"):
        run_.save(11, "x")


def test_a_huge_total_costs_nothing(tmp_path):
    with pytest.raises(SystemExit), Run(tmp_path, 10**12, every=1) as job_:
        for piece in job_.pieces():
            list(piece)
            piece.save(b"x")
            break


@pytest.mark.parametrize("loop", ["for i in piece:\n            lines.append(i)\n            if i == 5 and fresh: break",
                                  "for value, i in zip(iter(range(piece.start, piece.stop)), piece): lines.append(i)"])
def test_the_unit_in_which_a_piece_is_left_is_in_its_record(tmp_path, loop):
    code = f"""
fresh = not os.path.exists(out)
with checkpointing.Run(out, 30, every=10, suffix=".json") as run:
    for piece in run.pieces():
        lines = []
        {loop}
        piece.save(json.dumps(lines))
"""
    finish(job(tmp_path, code))
    finish(tmp_path / "job.py")
    kept = [i for _, path in find_checkpoints(tmp_path / "out") for i in json.loads(path.read_bytes())]
    assert kept == list(range(30))


def test_signals_stop_what_a_complete_run_does_inside_its_block(tmp_path):
    code = """
with checkpointing.Run(out, 10, every=5, suffix=".json") as run:
    for i in run.steps(lambda file: file.write(b"[]")): pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    finish(job(tmp_path, code), code=143)
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Status"] == "COMPLETE"


GENERATOR = """
def work():
    with checkpointing.Run(out, 10, suffix=".json") as run:
        values = run.load(json.load, default=[])
        for i in run.steps(lambda file: file.write(json.dumps(values).encode())):
            values.append(i)
            yield i
"""


def test_a_generator_that_holds_a_run_and_is_closed_early_goes_on_from_its_last_checkpoint(tmp_path):
    finish(job(tmp_path, GENERATOR + "for i in work():\n    if i == 3: break\nassert list(work())[-6:] == [4, 5, 6, 7, 8, 9]"))
    finish(job(tmp_path, GENERATOR.replace("out,", "out + '2',") + "for i in work():\n    if i == 3: break\n"))
    (tmp_path / "out").rename(tmp_path / "first")
    (tmp_path / "out2").rename(tmp_path / "out")
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Status"] == "INTERRUPTED"


def test_a_generator_that_still_holds_a_run_when_python_ends_hangs_nothing(tmp_path):
    finish(job(tmp_path, GENERATOR + "kept = work(); next(kept)"), timeout=20)
    finish(job(tmp_path, GENERATOR + "list(work())"))


def test_finished_pieces_stay_the_same_whole_when_one_is_damaged(tmp_path):
    code = FINISHED_PIECES
    finish(job(tmp_path, code))
    (tmp_path / "out" / "checkpoint_00010.txt").write_text("rot")
    finish(job(tmp_path, code.replace("every=10", "every=4").replace("for i in piece: pass", "next(iter(piece)); stop = 1")
               .replace("run.finish()", "pass").replace('piece.save(f"{piece.start} {piece.done}")', 'piece.save("x"); break')),
           code=1)
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Progress"] == "31/40 steps (77.5%)"
    finish(job(tmp_path, code))
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Progress"] == "40/40 steps (100%)"
    finish(ROOT / "checkpointing.py", "verify", tmp_path)


@pytest.mark.parametrize("stand_in", ["write", "write, flush", "none"])
def test_a_stand_in_for_stdout_does_not_stop_the_work(tmp_path, stand_in):
    code = f"""
class Tee:
    def write(self, text): pass
{"    def flush(self): pass" if "flush" in stand_in else ""}
sys.stdout = None if {stand_in == "none"} else Tee()
with checkpointing.Run(out, 20, every=5, suffix=".json") as run:
    for i in run.steps(lambda file: file.write(b"[]")): pass
sys.stdout = sys.__stdout__
"""
    finish(job(tmp_path, code))


def test_a_reader_that_has_left_does_not_stop_the_work(tmp_path):
    code = """
print("hello")
with checkpointing.Run(out, 50, every=5, suffix=".json") as run:
    for i in run.steps(lambda file: file.write(b"[]")): pass
"""
    line = f"{sys.executable} {job(tmp_path, code)} | true"
    subprocess.run(["bash", "-c", line], env={**os.environ, "PYTHONUNBUFFERED": ""}, stderr=subprocess.DEVNULL)
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Status"] == "COMPLETE"


def test_a_field_that_cannot_be_printed_does_not_stop_the_heart(tmp_path):
    class Bad:
        def __str__(self):
            raise ValueError
    with Run(tmp_path, 10, heartbeat=0.02, stall_after=0.1) as job_:
        job_.begin()
        job_.update(1, Bad=Bad())
        wait_for(lambda: read_progress(tmp_path / "PROGRESS.txt").get("Status") == "STALLED", "STALLED", 10)
        assert read_progress(tmp_path / "PROGRESS.txt")["Bad"] == "?"
        job_.save(10, "x")


def test_a_run_begun_in_a_thread_does_not_take_the_signals_of_the_next(tmp_path):
    code = """
import threading
def state(file): file.write(b"x")
with checkpointing.Run(out, 5) as run:
    thread = threading.Thread(target=lambda: list(run.steps(state)))
    thread.start()
    thread.join()
with checkpointing.Run(out + "2", 1000, every=1000) as run:
    for i in run.steps(state):
        if i == 20: os.kill(os.getpid(), signal.SIGTERM)
"""
    finish(job(tmp_path, code), code=143)
    assert [n for n, _ in find_checkpoints(tmp_path / "out2")] == [21]


def test_a_save_that_failed_after_its_rename_can_be_tried_again(tmp_path, monkeypatch):
    real, failures = checkpointing.sync_directory, []

    def fail_once(directory):
        if failures:
            failures.pop()
            raise OSError(errno.EIO, "Input/output error")
        real(directory)

    monkeypatch.setattr(checkpointing, "sync_directory", fail_once)
    with Run(tmp_path, 10) as job_:
        job_.begin()
        failures.append(1)
        with pytest.raises(CheckpointError):
            job_.save(10, "x")
        assert job_.durable == 0 and not find_checkpoints(tmp_path)
        job_.save(10, "x")
    assert checkpointing.verify([tmp_path]) == 0


# -- what a second tester with fresh eyes found


def test_map_tells_paths_numpy_numbers_and_objects_apart(tmp_path, capsys):
    np = pytest.importorskip("numpy")

    class Named:
        def __init__(self, name):
            self.name = name

        def __repr__(self):
            return f"Named({self.name})"
    pairs = {"paths": ([Path("a"), Path("b")], [Path("0"), Path("a")]),
             "numbers": (np.array([1, 2]), np.array([7, 8])),
             "objects": ([Named("a")], [Named("b")]), "keys": ([{(1, 2): 3}], [{(1, 4): 3}])}
    for name, (items, others) in pairs.items():
        kept = checkpointing.map(str, items, tmp_path / name)
        assert checkpointing.map(str, items, tmp_path / name) == kept
        with pytest.raises(SystemExit) as stop:
            checkpointing.map(str, others, tmp_path / name)
        assert stop.value.code == 2 and "item 0 was" in capsys.readouterr().err


def test_map_of_a_partial_of_objects_and_sets_is_started_again(tmp_path):
    code = """
import functools
class Model: pass
def f(model, i, tags): return i
print(checkpointing.map(functools.partial(f, Model(), tags={"a", "b", "c"}), range(5), out))
"""
    for _ in range(3):      # other addresses, other orders of the set
        assert finish(job(tmp_path, code)).stdout.endswith("[0, 1, 2, 3, 4]\n")


def test_map_names_an_item_that_cannot_be_printed(tmp_path):
    code = """
class Bad:
    def __repr__(self): raise RuntimeError("no repr")
def f(item): raise KeyError("mine")
checkpointing.map(f, [Bad()], out)
"""
    assert "failed at item 0 (?) with KeyError: 0/1" in finish(job(tmp_path, code), code=1).stderr


HELD = {"a helper's return": "work(run.steps(state))",
        "islice": "for i in itertools.islice(run.steps(state), 6): values.append(i)",
        "a name": "it = run.steps(state)\n    for i in it:\n        values.append(i)\n"
                  "        if i == 5: break",
        "an exception, caught": "it = run.steps(state)\n    try:\n        for i in it:\n"
                                "            values.append(i)\n            if i == 5: raise ValueError\n"
                                "    except ValueError: pass"}


@pytest.mark.parametrize("way", HELD)
def test_where_nobody_can_tell_why_a_loop_was_left_no_half_step_is_saved(way, tmp_path):
    code = f"""
import itertools
values = []
def state(file): file.write(json.dumps(values).encode())
def work(steps):
    for i in steps:
        values.append(i)
        if i == 5: return
with checkpointing.Run(out, 20, every=4, suffix=".json") as run:
    {HELD[way]}
"""
    done = finish(job(tmp_path, code), code=1)
    assert "4/20 steps are saved" in done.stdout and "are done again" in done.stdout
    assert "Exception ignored" not in done.stderr
    assert json.loads(find_checkpoints(tmp_path / "out")[-1][1].read_bytes()) == [0, 1, 2, 3]


def test_a_second_save_of_the_same_number_after_more_work_is_refused_not_dropped(tmp_path):
    code = """
with checkpointing.Run(out, 3, suffix=".json", unit="epochs") as run:
    run.load(json.load)
    run.begin()
    for epoch in range(1, 4):
        for batch in range(100):
            run.update(epoch)
            if batch in (10, 10 + WORSE):
                run.save(epoch, json.dumps([epoch, batch]))
                run.save(epoch, json.dumps([epoch, batch]))     # nothing has happened since: fine
"""
    finish(job(tmp_path, code.replace("WORSE", "0")))
    shutil.rmtree(tmp_path / "out")
    assert "save(1) came again" in finish(job(tmp_path, code.replace("WORSE", "30")), code=1).stderr
    assert [n for n, _ in find_checkpoints(tmp_path / "out")] == [1]


LAST_WORD = """
plain = checkpointing.Progress.end
def end(*arguments):
    if len(sys.argv) > 1: os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(0.05)
    plain(*arguments)
checkpointing.Progress.end = end
with checkpointing.Run(out, 3, every=1) as run:
    for i in run.steps(lambda file: file.write(b"x")): pass
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_the_last_word_is_written_leaves_it_true(name, tmp_path):
    finish(job(tmp_path, LAST_WORD), name, code=128 + getattr(signal, name))
    assert read_progress(tmp_path / "out" / "PROGRESS.txt")["Status"] == "COMPLETE"
    assert sorted(p.name for p in (tmp_path / "out").glob(".*")) == [".lock"]


def test_without_its_records_a_map_is_taken_as_it_is_by_what_the_message_says(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpointing.map(str, range(20), "out", every=7)
    Path("out/checkpoints.jsonl").write_text("not what it was")
    with pytest.raises(SystemExit):
        checkpointing.map(str, range(20), "out", every=7)
    typed = re.search(r"python \S+ (accept \S+/checkpoint_\*\.jsonl)", capsys.readouterr().err)
    subprocess.run(f"{sys.executable} {ROOT}/checkpointing.py {typed[1]}", shell=True, check=True)
    assert checkpointing.map(str, range(20), "out", every=7) == [str(i) for i in range(20)]
    assert checkpointing.verify(["out"]) == 0


def test_pieces_are_not_accepted_as_states_also_where_the_first_is_not_0(tmp_path):
    with Run(tmp_path, 20, first=20, every=5, suffix=".txt") as job_:
        for piece in job_.pieces():
            list(piece)
            piece.save("x")
    (tmp_path / "checkpoints.jsonl").unlink()
    said = run("checkpointing.py", "accept", tmp_path / "checkpoint_00020.txt", code=2).stderr
    assert "holds pieces" in said
    assert not (tmp_path / "checkpoints.jsonl").exists()


CLOSES_ALL = """
with checkpointing.Run(out, 10, every=2, suffix=".json") as run:
    values = run.load(json.load, default=[])
    for i in run.steps(lambda file: file.write(json.dumps(values).encode())):
        values.append(i)
        if i == 1:
            os.closerange(3, 256)       # as a daemon does
            mine = [open(os.path.dirname(out) + f"/mine{k}", "r+b") for k in range(8)]
        if i == 5 and len(sys.argv) > 1:
            open(sys.argv[1], "w").close()
            while os.path.exists(sys.argv[1]): time.sleep(0.01)
"""


def test_a_job_that_closes_all_files_keeps_its_directory_and_its_own_files(tmp_path):
    for k in range(8):
        (tmp_path / f"mine{k}").write_bytes(b"data" * 100)
    path, mark = job(tmp_path, CLOSES_ALL), tmp_path / "mark"
    with subprocess.Popen([sys.executable, path, mark], stdout=subprocess.DEVNULL) as process:
        wait_for(mark.exists, "the sixth step")
        assert "is in use by" in finish(path, code=75).stderr
        mark.unlink()
    assert process.returncode == 0
    assert {(tmp_path / f"mine{k}").read_bytes() for k in range(8)} == {b"data" * 100}


def test_a_line_of_the_jobs_own_cannot_take_the_name_of_one_of_ours(tmp_path):
    code = """
with checkpointing.Run(out, 3) as run:
    for i in run.steps(lambda file: file.write(b"x")): run.update(i, PID=999999)
"""
    assert "ValueError: Status, Error," in finish(job(tmp_path, code), code=1).stderr


def test_a_last_step_that_leads_beyond_the_total_is_complete_and_stays_so(tmp_path):
    code = """
total = int(sys.argv[1])
with checkpointing.Run(out, total, suffix=".json", unit="days") as run:
    day = run.load(json.load, default=0)
    if day < run.total: run.begin()
    while day < run.total:
        day += 7
        run.update(day)
        if day % 70 == 0 or day >= run.total:
            run.save(day, str(day))
"""
    path = job(tmp_path, code)
    for total, ended in ((1000, 1001), (1000, 1001), (1010, 1015), (1010, 1015)):
        finish(path, str(total))
        progress = read_progress(tmp_path / "out" / "PROGRESS.txt")
        assert progress["Progress"] == f"{ended}/{ended} days (100%)" and progress["Status"] == "COMPLETE"
    assert "more than the 900 asked for" in finish(path, "900", code=2).stderr


def test_work_without_a_look_at_what_is_there_is_refused_before_it_is_done(tmp_path):
    code = """
with checkpointing.Run(out, 100, every=50) as run:
    for i in run.steps(lambda file: file.write(b"x")): open(f"{out}/{i}.seen", "w")
"""
    finish(job(tmp_path, code))
    for seen in (tmp_path / "out").glob("*.seen"):
        seen.unlink()
    (tmp_path / "job.py").write_text((tmp_path / "job.py").read_text().replace("100,", "200,"))
    assert "call load()" in finish(tmp_path / "job.py", code=1).stderr
    assert not list((tmp_path / "out").glob("*.seen"))


def test_names_that_an_output_cannot_show_are_shown_as_far_as_it_can(tmp_path):
    run_dir = tmp_path / "caf\u00e9\x1b[31m"
    with Run(run_dir, 1, suffix=".txt") as job_:
        for _ in job_.steps(lambda file: file.write(b"x")):
            pass
    (run_dir / "bad\n.npz").write_bytes(b"no zip")
    for word, code in (("status", 0), ("verify", 1)):
        done = subprocess.run([sys.executable, ROOT / "checkpointing.py", word, tmp_path], capture_output=True,
                              env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert done.returncode == code and not done.stderr and b"caf" in done.stdout
        assert b"\x1b" not in done.stdout and b"bad\n." not in done.stdout


def test_small_mistakes_are_told_as_what_they_are(tmp_path):
    with pytest.raises(ValueError, match="must be short"):
        Run(tmp_path, 1, suffix="." + "x" * 240)
    (tmp_path / "file").write_text("x")
    assert "a file, not a directory" in run("checkpointing.py", "verify", tmp_path / "file", code=2).stderr
    with pytest.raises(RuntimeError, match="total is not known"), Run(tmp_path / "a") as job_:
        job_.load(json.load)
    record = {"name": "checkpoint_00001.bin", "start": 1, "stop": 1}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "checkpoints.jsonl").write_text(checkpointing._record_line(record))
    assert checkpointing.read_records(tmp_path / "b") == {}
    checkpointing.write_atomic(tmp_path / ("\u00e9" * 122 + ".npz"), b"x")      # 248 bytes
    assert "empty" in run("generate.py", "--out", "", code=2, cwd=tmp_path).stderr
