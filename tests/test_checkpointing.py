"""The promises of checkpointing.py, as the programs of its users meet them.

Every job here is a program of its own, most on the standard library alone: 60 ms each. What breaks
the machine at every single system call, damage of every kind, and power cuts are in prove.py.
"""
import fcntl
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import (ROOT, durable, environment, kill, numbers, progress, run, start,
                      wait_for)

import checkpointing
from checkpointing import Run, write_atomic

thorough = pytest.mark.thorough
JOB = "tests/counting_job.py"
HEAD = f"""import json, os, signal, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
import checkpointing
"""
OPEN = """
run = checkpointing.Run("out", total=10)
values = run.load([])
"""
STEPS = OPEN + """
for i in run.steps(lambda: values):
    values.append(i)
"""


# -- how the programs here are written, run and looked at

def program(place, code):
    """A script that makes its run in `out` beside it."""
    place.mkdir(exist_ok=True, parents=True)
    (place / "job.py").write_text(HEAD + code)
    return place / "job.py"


def finish(path, *arguments, code=0, python=(sys.executable,), **more):
    """Run it to its end; stderr is for the library and for exceptions, stdout is the job's own."""
    done = subprocess.run([*python, path.name, *map(str, arguments)], cwd=path.parent, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120, **more)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def begin(path, *arguments, **more):
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **more}
    return subprocess.Popen([sys.executable, path.name, *map(str, arguments)], cwd=path.parent,
                            start_new_session=True, **more)


def said(process, words):
    """Wait for a line with these words in its output."""
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without saying {words!r}")


def files(directory, *but):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()
            if path.is_file() and path.name not in (".lock", *but)}


def whole(directory):
    return ", 0 bad" in run("runs.py", "verify", directory).stdout


def save_pieces(out, total=50, **options):
    with Run(out, total, **{"every": 10, "suffix": ".json", **options}) as job:
        for piece in job.pieces():
            piece.save(json.dumps(list(piece)))


# -- 1. atomic and durable

def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path):
    path, data = tmp_path / ("é" * 122 + ".npz"), "äb\n".encode()   # 248 bytes: a legal name
    for content in ("äb\n", data, lambda file: file.write(data)):
        write_atomic(path, content)
        assert files(tmp_path) == {path.name: data}
        path.write_text("another")

    def fails(file):
        file.write(b"half")
        raise KeyError("cannot be stored")
    with pytest.raises(KeyError):
        write_atomic(path, fails)
    assert files(tmp_path) == {path.name: b"another"}


def test_temp_files_of_the_dead_are_swept_and_those_of_the_living_left_alone(tmp_path):
    path = program(tmp_path, """
def slow(file):
    print("ready", flush=True)
    time.sleep(600)
checkpointing.write_atomic(sys.argv[1], slow)
""")
    living, dead = begin(path, "living"), begin(path, "dead")
    said(living, "ready"), said(dead, "ready")
    (tmp_path / "mine.tmp").touch()
    kill(dead)
    checkpointing.sweep(tmp_path)
    left = sorted(os.listdir(tmp_path))
    kill(living)
    assert left[0].startswith(".living.") and left[1:] == ["job.py", "mine.tmp"]


# -- 2. checked on the way back

def test_damaged_states_fall_back_to_older_ones_and_if_all_are_bad_the_run_stops(tmp_path):
    run(JOB, tmp_path, 50)
    *_, older, newest = [tmp_path / name for name in checkpointing.read_records(tmp_path)]
    squares, old = newest.read_bytes(), older.read_bytes()
    newest.write_bytes(b"")
    assert newest.name in run(JOB, tmp_path, 50).stderr and newest.read_bytes() == squares
    for path in tmp_path.glob("checkpoint_*.json"):
        path.write_bytes(b"[1, 2")
    before = files(tmp_path, "PROGRESS.txt")
    for _ in range(2):      # the second start must not take an emptied directory for a new one
        assert newest.name in run(JOB, tmp_path, 50, code=1).stderr
        assert progress(tmp_path)["Status"] == "FAILED"
        assert files(tmp_path, "PROGRESS.txt") == before
    older.write_bytes(old)      # one good copy is enough, whichever it is
    run(JOB, tmp_path, 50)
    assert newest.read_bytes() == squares


@pytest.mark.parametrize("name", ["checkpoints.jsonl", "run.json"])
def test_without_its_index_or_its_settings_a_run_stops_and_changes_nothing(tmp_path, name):
    run(JOB, tmp_path, 50)
    good = (tmp_path / name).read_bytes()
    older = good.splitlines(True)[0]        # of the index: it names none of the states
    for content in (None, b"", b"{", b"garbage \xff\n" * 9, older):
        (tmp_path / name).write_bytes(content or b"")
        if content is None:
            (tmp_path / name).unlink()
        before = files(tmp_path, "PROGRESS.txt")
        run(JOB, tmp_path, 50, code=1)
        assert files(tmp_path, "PROGRESS.txt") == before
    (tmp_path / name).write_bytes(good)
    run(JOB, tmp_path, 60)
    assert numbers(tmp_path)[-1] == 60


def test_what_could_not_be_loaded_again_shows_after_the_first_step(tmp_path):
    """Not in an hour, at the restart. A state that pickle cannot load is in prove.py."""
    done = finish(program(tmp_path, """
run = checkpointing.Run("out", 1000)
run.load(read=json.load)
for i in run.steps(write=lambda file: file.write(b"[no json")):
    print("step")
"""), code=1)
    assert done.stdout == "step\n"
    assert progress(tmp_path / "out")["Status"] == "FAILED" and numbers(tmp_path / "out") == []
    finish(program(tmp_path, STEPS))        # nothing is left that would be in the way


def test_a_directory_of_the_library_before_goes_on_and_its_time_is_added_up(tmp_path):
    squares = [i * i for i in range(30)]
    (tmp_path / "checkpoint_00020.json").write_text(json.dumps(squares[:20]))
    (tmp_path / "checkpoints.jsonl").write_text(    # the line as it was
        '{"name": "checkpoint_00020.json", "start": 20, "stop": 20, "elapsed": 0.0, '
        '"bytes": 86, "sha256": '
        '"b5398a93bfd49c31305a31f69e759db2223f7fec9f57aba651ee73d3dacd42ae", "seal": 167194651}\n')
    (tmp_path / "run.json").write_text('{\n "run": "0699d9",\n "settings": {}\n}\n')
    (tmp_path / "PROGRESS.txt").write_text("Job\nStatus: RUNNING\nElapsed: 5000 s\n")
    run(JOB, tmp_path, 30, env=environment(PAUSE=0.05))
    assert json.loads((tmp_path / "checkpoint_00030.json").read_bytes()) == squares
    shown = progress(tmp_path)
    assert (shown["Run"], shown["Status"]) == ("0699d9", "COMPLETE")
    assert 5000 <= int(shown["Elapsed"].split()[0]) <= 5200
    assert float(shown["Rate"].split()[0]) <= 20        # of this start: restored steps are no speed


def test_an_old_state_is_not_removed_before_the_new_one_reads_back_well(tmp_path):
    path = program(tmp_path, """
real = os.replace
def replace(temp, path):        # a disk that keeps something else than it was given
    real(temp, path)
    if rots and str(path).endswith("checkpoint_00006.json"): open(path, "w").write("rot")
rots, os.replace = len(sys.argv) > 1, replace
with checkpointing.Run("out", 9, every=1, keep=2, suffix=".json") as run:
    run.load(read=json.load)
    for i in run.steps(write=lambda file: file.write(b"[]")): pass
""")
    finish(path, "rot", code=1)
    assert numbers(tmp_path / "out") == [4, 5, 6]
    assert "checkpoint_00006.json" in finish(path).stderr and numbers(tmp_path / "out") == [8, 9]


def test_foreign_files_are_never_removed_and_pieces_are_ordered_as_numbers(tmp_path):
    foreign = ("checkpoint_x.json", "checkpoint_00005.npz", "mine.tmp")
    pieces, states = tmp_path / "pieces", tmp_path / "states"
    for out, new, begins in (
            (pieces, "checkpoint_100020.json", lambda n: save_pieces(pieces, n, first=99_980)),
            (states, "checkpoint_00050.json", lambda n: run(JOB, states, n))):
        begins(40)
        for name in (*foreign, new, f"{new}.corrupt"):
            (out / name).write_text(name)
        begins(50)      # under a name that was needed it is set aside, and not over another one
        kept = {path.read_text() for path in [*map(out.joinpath, foreign), *out.glob("*.corrupt")]}
        assert kept == {*foreign, new, f"{new}.corrupt"}
    assert numbers(pieces) == [99_980, 99_990, 100_000, 100_010, 100_020]
    assert len(numbers(states)) == 3 and numbers(states)[-1] == 50


# -- 3. the ends of programs: what stands in PROGRESS.txt, and the exit code

TERM, AT_5 = "os.kill(os.getpid(), signal.SIGTERM)", "    if i == 5: "
INT, HUP = TERM.replace("TERM", "INT"), TERM.replace("TERM", "HUP")
STEP = "for i in run.steps(lambda: values):\n    values.append(i)\n"
FORK = "\n        if os.fork() == 0: sys.exit(0)\n        os.wait()"
THREAD = """import threading
def other():
    with checkpointing.Run("other", 3) as run:
        for i in run.steps(): pass
def in_a_thread():
    thread = threading.Thread(target=other)
    thread.start(), thread.join()
    assert checkpointing.read_progress("other/PROGRESS.txt")["Status"] == "COMPLETE"
"""
TICK = """async def main():
    while run.done < run.total:
        values.append(run.done)
        {}
        run.tick(run.done + 1, lambda: values, Loss=3.5)
import asyncio
asyncio.run(main())"""
# name: (the program behind load(), its exit code, Status in PROGRESS.txt)
ENDINGS = {
    "plain": (STEP, 0, "COMPLETE"),
    "break": (STEP + AT_5 + "break\nprint('behind')", 0, "INTERRUPTED"),
    "its steps have a name": ("steps = run.steps(lambda: values)\nfor i in steps:\n    values."
                              "append(i)\n" + AT_5 + "break", 0, "INTERRUPTED"),
    "exception": (STEP + AT_5 + "1/0", 1, "FAILED"),
    "exception behind": (STEP + "1/0", 1, "FAILED"),
    "another excepthook": ("sys.excepthook = lambda *error: None\n" + STEP + "1/0", 1, "FAILED"),
    "exit 3": (STEP + AT_5 + "sys.exit(3)", 3, None),
    "finish": (STEP + AT_5 + "run.finish()\nprint('behind')", 0, "COMPLETE"),
    "finish, break": (STEP + AT_5 + "\n        run.finish()\n        break\nprint('behind')", 0,
                      "COMPLETE"),
    "SIGTERM": (STEP + AT_5 + TERM, 143, "INTERRUPTED"),
    "SIGHUP": (STEP + AT_5 + HUP, 129, "INTERRUPTED"),
    "SIGTERM before": (TERM + "\ntime.sleep(600)", 143, None),
    "SIGTERM in the last step": (STEP + f"    if i == 9: {TERM}\nprint('not reached')", 143,
                                 "INTERRUPTED"),
    "SIGTERM behind": (STEP + f"{TERM}\ntime.sleep(600)", 143, "INTERRUPTED"),
    "Ctrl-C": (STEP + AT_5 + INT, -2, "INTERRUPTED"),
    "Ctrl-C behind": (STEP + INT, -2, "INTERRUPTED"),
    "Ctrl-C, also to a program that a step started": (
        STEP + AT_5 + "subprocess.run(['sh', '-c', 'kill -INT $PPID $$'])", -2, "INTERRUPTED"),
    "SIGTERM, also to a program that a step started": (
        STEP + AT_5 + "subprocess.run(['sh', '-c', 'kill $PPID $$'], check=True)", 143,
        "INTERRUPTED"),
    "another run in a thread": (THREAD + STEP + AT_5 + "in_a_thread()", 0, "COMPLETE"),
    "the last save fails": ("values.append(0)\nrun.tick(1, lambda: values if len(values) == 1 else "
                            "1 / 0)\nvalues.append(1)\nrun.update(2)\nrun.finish()", 1, "FAILED"),
    "more than its total": ("while run.done < 10:\n    values += range(run.done, min(run.done + 4, "
                            "10))\n    run.tick(run.done + 4, lambda: values)", 0, "COMPLETE"),
    "a child exits": (STEP + AT_5 + FORK, 0, "COMPLETE"),
    "tick, in asyncio": (TICK.format("pass"), 0, "COMPLETE"),
    "tick, in asyncio, SIGTERM": (TICK.format(f"if run.done == 5: {TERM}"), 143, "INTERRUPTED"),
}


def end(place, name, in_block, python=sys.executable):
    python = python, "-I", "-S"     # the standard library is enough
    opened, (body, code, status) = OPEN, ENDINGS[name]
    if in_block:
        opened, body = OPEN.replace("values", "with run:\n  values"), textwrap.indent(body, "  ")
    done = finish(program(place, opened + body + "\n"), code=code, python=python)
    assert status in (None, progress(place / "out").get("Status")), done.stderr
    assert done.stdout == ("behind\n" if "behind')" in body else "")
    traced = name.startswith("exception") or code == -2
    assert ("Traceback" in done.stderr) == traced, done.stderr
    # a restart goes on and ends with the same values
    again = finish(program(place, STEPS + "print(values)\n"), python=python)
    last = 6 if "finish" in name else 10
    assert json.loads(again.stdout) == list(range(last))
    assert progress(place / "out")["Status"] == "COMPLETE"
    assert progress(place / "out")["Progress"] == f"{last}/{last} steps (100%)"


@pytest.mark.parametrize("in_block", [False, True], ids=["program", "block"])
@pytest.mark.parametrize("name", ENDINGS)
def test_the_end_of_a_program_or_of_a_block_is_the_end_of_its_run(tmp_path, name, in_block):
    """COMPLETE is the last word: a kill while the last file is written is in prove.py."""
    end(tmp_path, name, in_block)


def test_pieces_may_end_before_their_total(tmp_path):
    for _ in range(2):      # it stays so
        with Run(tmp_path, 50, every=10) as job:
            for piece in job.pieces():
                piece.save(str(list(piece)))
                if piece.start == 20:
                    job.finish()
        assert progress(tmp_path)["Status"] == "COMPLETE" and numbers(tmp_path) == [0, 10, 20]
        assert progress(tmp_path)["Progress"] == "30/30 steps (100%)"


def test_of_a_step_that_an_exception_left_nothing_is_saved_though_it_was_caught(tmp_path):
    path = program(tmp_path, OPEN + """
fails = len(sys.argv) > 1
while run.done < run.total:
    try:
        for i, other in zip(run.steps(lambda: values), range(100)):
            if i == 5 and fails:
                fails = False
                raise ConnectionError
            values.append(i)
            if i == 7 and len(sys.argv) > 1: sys.exit(5)
    except ConnectionError: pass
assert values == list(range(10)), values
""")
    finish(path, "fail once", code=5)
    finish(path)
    path = program(tmp_path / "total unknown", """
with checkpointing.Run("out") as run:       # COMPLETE at its normal end, unless a step was left
    pairs = run.load(([], []))
    try:
        for i in run.steps(lambda: pairs):
            pairs[0].append(i)
            if i == 5 and len(sys.argv) > 1: raise KeyboardInterrupt
            pairs[1].append(i)
            if i == 9: run.finish()
    except KeyboardInterrupt: pass
print(pairs[0] == pairs[1] == list(range(10)))
""")
    finish(path, "fail")
    shown = progress(path.parent / "out")
    assert (shown["Status"], shown["Progress"]) == ("INTERRUPTED", "5 steps")
    assert finish(path).stdout == "True\n"


def test_a_run_is_used_again_and_two_loops_draw_on(tmp_path):
    """As in a notebook, where a cell is mended and run again."""
    done = finish(program(tmp_path, """
import random
run = checkpointing.Run("out", total=4)
for fails in (True, False):
    try:
        with run:
            values = run.load([])
            for i in run.steps(lambda: (lambda: 0) if fails else values):
                values.append(random.random())
                if i == 1: break
            for i in run.steps(lambda: values): values.append(random.random())
    except (AttributeError, checkpointing.CheckpointError): print("failed")
assert len(values) == len(set(values)) == 5, values     # the step that break left, twice
"""))
    assert done.stdout == "failed\n" and progress(tmp_path / "out")["Status"] == "COMPLETE"


# -- 4. signals

@pytest.mark.parametrize("inside", ["step", "save"])
def test_in_the_stages_ctrl_c_saves_and_a_second_one_ends_at_once_in_one_line(tmp_path, inside):
    process = begin(program(tmp_path, f"""
def wait():
    print("waiting", flush=True)
    time.sleep(600)
def write(file):
    file.write(b"[]")
    if {inside == "save"} and run.stopping: wait()
with checkpointing.Run("out", 10, every=1, signals=checkpointing.ALL_SIGNALS) as run:
    for i in run.steps(write=write):
        if i == 3:      # two at once are one: `timeout` sends them
            for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
            if {inside == "step"}: wait()
"""), stderr=subprocess.PIPE)
    said(process, "waiting")
    wait_for(lambda: "SIGINT" in process.stderr.readline(), "what a second one does")
    time.sleep(0.5)         # long enough for another one
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and errors.count("\n") <= 1 and "3 steps" in errors, errors
    assert progress(tmp_path / "out")["Status"] == "INTERRUPTED"
    assert numbers(tmp_path / "out") == [1, 2, 3] and not list((tmp_path / "out").glob(".*.tmp"))


def test_what_was_changed_in_the_process_is_put_back_however_a_block_is_left(tmp_path):
    """In IPython the next Ctrl-C would otherwise end the session."""
    finish(program(tmp_path, """
def now(): return [signal.getsignal(number) for number in (1, 2, 15)] + [sys.excepthook]
def leave(how):
    if how == "raise": raise KeyError
    if how == "exit": sys.exit(3)
    if how in ("SIGTERM", "SIGINT"): os.kill(os.getpid(), getattr(signal, how))
signal.signal(signal.SIGHUP, lambda *_: None)
before = now()
for signals in ((15, 1), checkpointing.ALL_SIGNALS):
    for how in ("end", "break", "raise", "exit", "SIGTERM", "SIGINT"):
        try:
            with checkpointing.Run(f"out/{how}{len(signals)}", 3, signals=signals) as run:
                for i in run.steps(lambda: 1):
                    assert now() != before
                    leave(how)
                    if how == "break": break
        except BaseException as error:
            assert how not in ("end", "break"), repr(error)
        assert now() == before and not run.stopping, how
signal.signal(signal.SIGHUP, signal.SIG_IGN)        # as nohup does it
with checkpointing.Run("out", 3) as run:
    for i in run.steps(lambda: 1): os.kill(os.getpid(), signal.SIGHUP)
assert run.complete
"""))


def test_a_save_broken_off_behind_its_rename_by_a_handler_of_the_job_may_be_tried_again(tmp_path):
    done = finish(program(tmp_path, """
class Alarm(Exception): pass
def alarm(number, frame): raise Alarm
signal.signal(signal.SIGALRM, alarm)
real = os.replace
def replace(temp, path):
    real(temp, path)
    if "checkpoint_00003" in str(path): os.kill(os.getpid(), signal.SIGALRM)
with checkpointing.Run("out", 5) as run:
    run.load()
    for n in range(1, 6):
        run.update(n)
        os.replace = replace
        try: run.save(n, lambda: n)
        except Alarm:
            os.replace = real
            run.save(n, lambda: n)
"""))
    assert "warning" not in done.stderr and numbers(tmp_path / "out") == [3, 4, 5]
    assert whole(tmp_path) and not list((tmp_path / "out").glob("*.corrupt"))


# -- 5. forks and pools

POOL = """
import multiprocessing
def simulate(i):
    if i in (100, 101) and os.path.exists("hangs"):
        open(f"hangs/{i}", "w").close()
        time.sleep(600)
    return i * i
if __name__ == "__main__":
    method, items, options = sys.argv[1], range(300), {"stall_after": 1, "heartbeat": 0.2}
    if method == "map":
        values = checkpointing.map(simulate, items, "out", every=10, workers=2, **options)
    else:
        multiprocessing.set_start_method(method)
        run = checkpointing.Run("out", total=300, **options)
        values = run.load([])
        with multiprocessing.Pool(2) as pool:
            for value in pool.imap(simulate, items[run.done:]):
                values.append(value)
                run.tick(len(values), lambda: values)
    print(values == [i * i for i in items])
"""


@pytest.mark.parametrize("method, number", [
    ("fork", signal.SIGINT), ("spawn", signal.SIGINT), ("map", signal.SIGINT),
    ("fork", signal.SIGHUP),
    pytest.param("forkserver", signal.SIGINT, marks=thorough),
    pytest.param("spawn", signal.SIGHUP, marks=thorough)])
def test_a_plain_pool_ends_at_ctrl_c_or_with_its_terminal_and_goes_on(tmp_path, method, number):
    """The terminal tells all processes; nobody had to write an initializer. Workers that die of
    SIGHUP take their items along, and the pool would wait for them for ever."""
    path, hangs = program(tmp_path, POOL), tmp_path / "hangs"
    hangs.mkdir()
    process = begin(path, method)
    # STALLED: it waits for them. In the moment before it does, Python itself misses a signal.
    wait_for(lambda: len(os.listdir(hangs)) == 2 and progress(tmp_path / "out").get("Status") ==
             "STALLED", "two workers that are at work, and a program that waits for them")
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode in ((-2, 1, 130) if number == signal.SIGINT else (129,))
    assert progress(tmp_path / "out")["Status"] == "INTERRUPTED"
    with pytest.raises(ProcessLookupError):     # nobody of the group is left behind
        wait_for(lambda: os.killpg(process.pid, 0), "the end of the workers")
    hangs.rename(tmp_path / "hung")
    assert finish(path, method).stdout == "True\n"


@pytest.mark.parametrize("jobs, pools", [(2, 10), pytest.param(4, 40, marks=thorough)])
def test_pools_inside_a_run_end_each_time(tmp_path, jobs, pools):
    """Without the handlers given back to forked workers, terminate() hangs now and then."""
    path = program(tmp_path, f"""
import multiprocessing
def square(i): return i * i
if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    with checkpointing.Run(sys.argv[1], {pools}) as run:
        for i in run.steps(lambda: i):
            with multiprocessing.Pool(4) as pool: pool.map(square, range(20))
""")
    processes = [begin(path, name, stdout=subprocess.DEVNULL) for name in range(jobs)]
    for process in processes:
        assert process.wait(timeout=120) == 0


def test_a_forked_child_has_the_handlers_of_before_and_changes_nothing_on_disk(tmp_path):
    finish(program(tmp_path, """
def mine(*_): pass
def kept():
    return {name: open("out/" + name, "rb").read() for name in os.listdir("out")}
signal.signal(signal.SIGTERM, mine)
parent = os.getpid()
try:
    with checkpointing.Run("out", 10, heartbeat=3600) as run:
        run.load()
        run.tick(5, lambda: "x")
        for way in ("sys.exit(3)", "raise ValueError", "os._exit(0)", "run.finish()",
                    "run.save(7, lambda: 1)", "run.tick(9, lambda: 1)", "list(run.steps())"):
            before, child = kept(), os.fork()
            if child == 0:
                if (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) != (
                        mine, signal.default_int_handler): os.kill(parent, 9)
                exec(way)
                sys.exit(0)
            os.waitpid(child, 0)
            assert kept() == before, (way, before, kept())
            assert signal.getsignal(signal.SIGTERM) is not mine
        run.tick(10, lambda: "y")
finally:
    if os.getpid() != parent: os._exit(0)
"""))
    assert progress(tmp_path / "out")["Status"] == "COMPLETE"


def test_what_outlives_a_job_does_not_keep_its_directory(tmp_path):
    path = program(tmp_path, OPEN + """
subprocess.Popen(["sleep", "600"])
if os.fork(): os.kill(os.getpid(), 9)
time.sleep(600)
""")
    process = begin(path, stdout=subprocess.DEVNULL)
    assert process.wait(timeout=60) == -9
    finish(program(tmp_path, STEPS))
    os.killpg(process.pid, signal.SIGKILL)


# -- 6. five programs of others, killed four times

PREAMBLE = """
import hashlib, pickle, random
pause = float(os.environ.get("PAUSE", 0))
def show(*results): print(hashlib.sha256(pickle.dumps(results)).hexdigest())
"""
PROGRAMS = {
    "a numpy loop that rebinds its arrays": """
import numpy as np
np.random.seed(0)
x, v = np.linspace(0, 1, 500), np.zeros(500)
run = checkpointing.Run("out", total=400)
x, v = run.load((x, v))
for i in run.steps(lambda: (x, v)):
    v = v - 0.01 * x + 0.001 * np.random.standard_normal(500)
    x = x + 0.01 * v
    time.sleep(pause)
show(x.tobytes(), v.tobytes())
""",
    "reinforcement learning with three random states": """
import numpy as np
random.seed(1); np.random.seed(2)
class Walk:         # an environment with a generator of its own
    def __init__(self): self.random, self.place = np.random.default_rng(3), 0
    def step(self, action):
        self.place = max(-9, min(9, self.place + action + int(self.random.integers(-1, 2))))
        return -abs(self.place)
walk, values, rewards = Walk(), np.zeros((19, 2)), []
run = checkpointing.Run("out", total=600, unit="episodes")
walk, values, rewards = run.load((walk, values, rewards))
for episode in run.steps(lambda: (walk, values, rewards)):
    for _ in range(10):
        place, explores = walk.place + 9, random.random() < 0.1
        action = int(np.random.randint(2) if explores else values[place].argmax())
        rewards.append(walk.step(2 * action - 1))
        values[place, action] += 0.1 * (rewards[-1] - values[place, action])
    time.sleep(pause)
show(values.tobytes(), rewards, random.random(), np.random.random())
""",
    "a Pool over shards": """
import multiprocessing
def count(shard):
    time.sleep(pause)
    return shard, sum(random.Random(shard).randrange(1000) for _ in range(200))
if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    run = checkpointing.Run("out", total=400, unit="shards")
    counts = run.load({})
    with multiprocessing.Pool(2) as pool:
        for shard, number in pool.imap_unordered(count, set(range(400)) - counts.keys()):
            counts[shard] = number
            run.tick(len(counts), lambda: counts)
    show(sorted(counts.items()))
""",
    "an asyncio loop with an unknown total": """
import asyncio
random.seed(4)
async def feed(numbers):
    for number in numbers:
        await asyncio.sleep(pause)
        yield number, random.random()
async def main():
    run = checkpointing.Run("out", unit="messages")
    state = run.load({"next": 0, "sum": 0.0})
    async for number, value in feed(range(state["next"], 400)):
        state = {"next": number + 1, "sum": state["sum"] + value}
        run.tick(state["next"], lambda: state, Sum=state["sum"])
    run.finish()
    show(state)
asyncio.run(main())
""",
    "PyTorch with dropout, scheduler and DataLoader": """
import torch
from torch import nn
torch.manual_seed(5)
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True, num_workers=1)
model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 14)
run = checkpointing.Run("out", total=14, unit="epochs")
model, optimizer, scheduler = run.load((model, optimizer, scheduler))
for epoch in run.steps(lambda: (model, optimizer, scheduler)):
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    scheduler.step()
    time.sleep(20 * pause)
show([p.detach().numpy().tobytes() for p in model.parameters()], scheduler.get_last_lr())
""",
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.thorough if "torch" in PROGRAMS[name] else ())
    for name in PROGRAMS])
def test_five_programs_of_others_killed_four_times(tmp_path, name):
    """Bit for bit what an undisturbed one gives; a pool's workers outlive their killed parent."""
    path, moments = program(tmp_path / "killed", PREAMBLE + PROGRAMS[name]), random.Random(7)
    out = tmp_path / "killed" / "out"
    for number, code in [(signal.SIGKILL, -9)] * 4 + [(signal.SIGTERM, 143)]:
        before = durable(out)
        process = begin(path, env=environment(PAUSE=0.02), stdout=subprocess.DEVNULL)
        wait_for(lambda: durable(out) > before, "its first step")       # noqa: B023
        time.sleep(moments.uniform(0, 0.1))     # to any moment; all of it would take eight seconds
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    alone = finish(program(tmp_path / "alone", PREAMBLE + PROGRAMS[name])).stdout
    assert finish(path).stdout == alone != "" and progress(out)["Status"] == "COMPLETE"


# -- 7. the progress

def test_the_progress_file_has_its_keys_in_order_and_is_whole_at_any_moment(tmp_path):
    path, seen = program(tmp_path, """
run = checkpointing.Run("out", 10**6, every=1, title="A title", unit="samples", heartbeat=0.01)
values = run.load([])
while True:
    values.append(1)
    run.tick(len(values), lambda: values, Epoch="1/2", Note="x\\nStatus: COMPLETE\\x1b[2J")
    if len(values) == 3: print("three", flush=True)
"""), set()
    process = begin(path, "--seed", "a b", stderr=subprocess.DEVNULL)
    said(process, "three")
    utc = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    formats = ["A title", "Status: RUNNING", r"Progress: \d+/1000000 samples \(\d+\.\d%\)",
               r"Checkpoint: \d+ \(checkpoint_\d{5}\.pkl\)", r"Elapsed: \d+ s",
               r"Rate: \d+\.\d+ samples/s", rf"ETA: (\d+ s \({utc}\)|unknown)",
               f"Last update: {utc}", r"Heartbeat: \d{10}", r"Advanced: \d{10}",
               r"Interval: 0\.01 s", "Run: [0-9a-f]{6}", f"PID: {process.pid}",
               f"Host: {re.escape(os.uname().nodename)}", r"Command: \S+ job\.py --seed 'a b'",
               "Epoch: 1/2", r"Note: x Status: COMPLETE \[2J", ""]
    while len(seen) < 20:       # without a pause: only whole versions are seen
        text = (tmp_path / "out" / "PROGRESS.txt").read_text()
        assert re.fullmatch("\n".join(formats), text), text
        seen.add(text)
    kill(process)


def test_a_hang_shows_as_stalled_though_the_heartbeat_goes_on(tmp_path):
    options = json.dumps({"heartbeat": 0.1, "stall_after": 0.5})
    hung = start(JOB, tmp_path, 100, env=environment(HANG_AT=15, RUN_OPTIONS=options))
    wait_for(lambda: progress(tmp_path).get("Status") == "STALLED", "the hang to show")
    first = progress(tmp_path)
    later = wait_for(lambda: progress(tmp_path)["Heartbeat"] != first["Heartbeat"]
                     and progress(tmp_path), "a heartbeat")
    kill(hung)
    assert (later["Status"], later["Progress"]) == ("STALLED", "15/100 steps (15.0%)")
    assert abs(int(later["Advanced"]) - int(first["Advanced"])) <= 1


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_work_heartbeat_and_sigterm_go_on_where_nobody_reads(tmp_path, kind):
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    process = begin(program(tmp_path, """
with checkpointing.Run("out", 10**6, heartbeat=0.05) as run:
    for i in run.steps(lambda: i):
        run.log("a long line " * 1000)
        time.sleep(0.001)
"""), stdin=subprocess.DEVNULL, stdout=writer, stderr=writer)
    os.close(writer)
    out = tmp_path / "out"
    wait_for(lambda: int(progress(out).get("Progress", "0/").split("/")[0]) > 60, "full buffers")
    beat = progress(out)["Heartbeat"]
    wait_for(lambda: progress(out)["Heartbeat"] > beat, "a heartbeat")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143 and progress(out)["Status"] == "INTERRUPTED"
    os.close(reader)


def test_few_lines_go_to_stderr_and_an_output_that_fails_stops_nothing(tmp_path):
    path = program(tmp_path, """
how = sys.argv[1]
with checkpointing.Run(how, 100, every=10, heartbeat=3600, quiet=how == "quiet") as run:
    for i in run.steps(lambda: i): pass
print("mine")
""")
    for how, lines in (("quiet", 0), ("plain", 3)):     # not one a save
        done = finish(path, how)
        assert done.stdout == "mine\n" and done.stderr.count("\n") == lines, done.stderr
    for how, line in (("full", "2> /dev/full"), ("left", "2>&1 | true"), ("closed", "2>&-")):
        subprocess.run(["bash", "-c", f"{sys.executable} job.py {how} {line}"], cwd=tmp_path)
        assert progress(tmp_path / how)["Status"] == "COMPLETE"


def test_an_error_is_not_lost_where_its_reader_is_slow(tmp_path):
    (tmp_path / "file").touch()
    path = program(tmp_path, "checkpointing.Run('file').load()")
    reader, writer = os.pipe()
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)))        # now it is full
    process = begin(path, stderr=writer)
    os.close(writer)
    time.sleep(0.7)
    with open(reader, "rb") as pipe:
        assert pipe.read().count(b"error: ") == 1
    assert process.wait(timeout=60) == 2


# -- 8. one writer, and the same settings

def test_the_others_are_told_who_holds_the_directory(tmp_path):
    path = program(tmp_path, OPEN + """
import shutil
run.update(1)
shutil.copytree("out", "copy")      # opens and closes .lock, too
print("copied", flush=True)
time.sleep(600)
""")
    process = begin(path)
    said(process, "copied")
    errors = finish(path, code=75).stderr
    assert f"PID {process.pid} on host {os.uname().nodename}" in errors
    kill(process)
    finish(program(tmp_path, STEPS))


def test_other_settings_are_refused_naming_each_and_nothing_is_changed(tmp_path):
    settings = lambda **more: environment(SETTINGS=json.dumps(more),        # noqa: E731
                                          RUN_OPTIONS='{"may_grow": ["n"]}')
    run(JOB, tmp_path, 20, env=settings(seed=1, rate=0.5, kind="a", n=20))
    before = files(tmp_path)
    wrong = run(JOB, tmp_path, 20, env=settings(seed=2, rate=0.5, size=3, n=19), code=2).stderr
    for difference in ("seed was 1, asked 2", 'kind was "a"', "asked 3", "n was 20, asked 19"):
        assert difference in wrong
    same = dict(seed=1, rate=0.5, kind="a")
    assert "rate" not in wrong
    run(JOB, tmp_path, 10, code=2, env=settings(**same, n=20))      # fewer than are done
    assert files(tmp_path) == before
    run(JOB, tmp_path, 30, env=settings(**same, n=30))


def test_settings_take_anything_that_has_a_text_and_work_begins_with_a_look(tmp_path):
    path = program(tmp_path, """
import pathlib
class Thing: pass
settings = dict(data=pathlib.Path("a/b"), sizes={3, 1, 2}, none=None, thing=Thing(), big=2**70,
                mixed={1: "x", "y": 2, None: 3}, pairs={(1, 2): 3}, names={"b", "a", "c"})
with checkpointing.Run("out", 3 + len(sys.argv), settings={**settings, "seed": sys.argv[1]}) as run:
    if len(sys.argv) < 4: run.load()
    for i in run.steps(lambda: i): print(i)
""")
    for _ in range(3):      # other addresses, other orders of the sets
        finish(path, 1)
    assert "seed" in finish(path, 2, code=2).stderr
    assert not finish(path, 1, "without", "load()", code=1).stdout      # or it would begin anew


def test_numbers_of_numpy_are_taken_wherever_a_number_is(tmp_path):
    number = pytest.importorskip("numpy").int64
    with Run(tmp_path, number(60), first=number(40), every=number(20), suffix=".json") as job:
        for piece in job.pieces():
            piece.save(repr([(int(a), int(b)) for a, b in piece.blocks(number(15))]))
            job.update(number(piece.done - 40), Loss=number(3))
    assert numbers(tmp_path) == [40, 60, 80] and progress(tmp_path)["Loss"] == "3"
    assert (tmp_path / "checkpoint_00060.json").read_text() == "[(60, 75), (75, 80)]"


# -- 9. the disk

def test_a_disk_that_fills_up_is_one_line_and_the_restart_goes_on(small_disk, tmp_path):
    disk = small_disk()
    path = program(disk, """
with checkpointing.Run("out", 10, every=1, suffix=".bin") as run:
    for piece in run.pieces():
        [i] = piece
        if i == 4 and sys.argv[1:]:
            with open("filler", "ab", 0) as filler:     # to the last byte
                try:
                    while filler.write(bytes(1000)): pass
                except OSError: pass
        piece.save(bytes([i]) * 50_000)
""")
    errors = finish(path, "fill", code=1).stderr
    assert "Traceback" not in errors and errors.count("error: ") == 1
    assert re.search(r"checkpoint_\d+\.bin: .*No space left on device", errors)
    assert numbers(disk / "out") == [0, 1, 2, 3] and not list((disk / "out").glob(".*.tmp"))
    assert progress(disk / "out")["Status"] == "FAILED"
    (disk / "filler").unlink()
    finish(path)
    assert whole(disk) and [file.read_bytes()[:1] for file in sorted(
        (disk / "out").glob("*.bin"))] == [bytes([i]) for i in range(10)]
    # other places where nothing can be written
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    program(tmp_path, "checkpointing.Run(sys.argv[1], 1).tick(1, lambda: bytes(100_000))")
    for line in (f"exec python job.py {disk}/out", f"exec python job.py {disk}/new",
                 "trap '' XFSZ; ulimit -f 50; exec python job.py limited"):
        done = subprocess.run(["bash", "-c", line.replace("python", sys.executable)], text=True,
                              cwd=tmp_path, stderr=subprocess.PIPE)
        assert done.returncode in (1, 2) and done.stderr.count("\n") == 1, done.stderr


def test_what_a_disk_or_a_place_lacks_is_said_as_what_it_is(small_disk, tmp_path):
    disk = small_disk()
    subprocess.run(["mount", "-o", "remount,nr_inodes=12", disk], check=True)
    path = program(disk, STEPS + "    open(f'{i}.empty', 'x')\n    run.every = 1\n")
    assert "inode" in finish(path, code=1).stderr
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    path = program(tmp_path, "checkpointing.Run(sys.argv[1]).load()")
    for place, words in (("file", "file"), ("link", "a link that leads nowhere"),
                         (300 * "x", "too long")):
        [line] = finish(path, place, code=2).stderr.splitlines()
        assert words in line and "no directory can be made here" in line


# -- 10. map

def test_map_with_workers_killed_and_restarted_gives_what_a_plain_map_gives(tmp_path):
    path = program(tmp_path, """
def simulate(i):
    time.sleep(float(os.environ.get("PAUSE", 0)))
    if i == int(os.environ.get("BAD", -1)): raise ValueError("bad item")
    if i == int(os.environ.get("DIE", -1)): os.kill(os.getpid(), 9)
    return {"square": i * i, "pair": [i, i]}
if __name__ == "__main__":
    values = checkpointing.map(simulate, range(200), "out", every=10, workers=2)
    print(values == [{"square": i * i, "pair": [i, i]} for i in range(200)])
""")
    out = tmp_path / "out"
    for _ in range(2):
        before = durable(out)
        process = begin(path, env=environment(PAUSE=0.02), stdout=subprocess.DEVNULL)
        wait_for(lambda: durable(out) > before, "a piece")     # noqa: B023
        kill(process)
        with pytest.raises(ProcessLookupError):     # its workers end by themselves
            wait_for(lambda: os.killpg(process.pid, 0), "the end of its workers")     # noqa: B023
    finish(path, env=environment(DIE=199), code=1)  # a Pool would wait for it for ever
    assert "bad item" in finish(path, env=environment(BAD=198), code=1).stderr
    assert progress(out)["Status"] == "FAILED" and durable(out) > before
    for _ in range(2):
        assert finish(path).stdout == "True\n" and whole(tmp_path)
    finish(program(tmp_path / "no name", "checkpointing.map(lambda x: x, range(50), 'out', "
                   "workers=2)"), code=1)       # processes cannot be given it


def test_map_keeps_every_value_or_refuses(tmp_path):
    """Items are told apart by their whole text, not by its beginning."""
    long = b"x" * 5000
    pairs = {"bytes": ([long + b"a"], [long + b"b"]), "paths": ([Path("a")], [Path("b")]),
             "keys": ([{(1, 2): 3}], [{(1, 4): 3}]), "more": ([1], [1, 2]), "fewer": ([1, 2], [1])}
    for name, (items, others) in pairs.items():
        kept = checkpointing.map(repr, items, tmp_path / name)
        for function, things in ((repr, others), (len, items)):
            with pytest.raises(SystemExit, match="^2$"):
                checkpointing.map(function, things, tmp_path / name)
        assert checkpointing.map(repr, items, tmp_path / name) == kept == list(map(repr, items))
    with pytest.raises(TypeError):      # nothing that is the same at the next start
        checkpointing.map(str, [object()], tmp_path / "object")
    with pytest.raises(TypeError):      # JSON would give back another value
        checkpointing.map(lambda i: {1: 2}, [1], tmp_path / "value")
    values = [float("nan"), None, "\u2028\n", 2**70, [1, {"a": True}]]
    for _ in range(2):
        back = checkpointing.map(values.__getitem__, range(5), tmp_path / "json")
        assert repr(back) == repr(values)
        assert checkpointing.map(str, [], tmp_path / "none") == []


# -- 11. every Python

@thorough
@pytest.mark.parametrize("version", {9, 10, 11, 12, 13, 14} - {sys.version_info[1]})
def test_it_works_on_other_pythons(tmp_path, version):
    python = shutil.which(f"python3.{version}")
    # a pyenv shim that points nowhere fails
    if not python or subprocess.run([python, "-c", ""], stderr=subprocess.DEVNULL).returncode:
        pytest.skip(f"there is no python3.{version} on the PATH")
    for number, name in enumerate(ENDINGS):
        for in_block in (False, True):
            end(tmp_path / f"{number} {in_block}", name, in_block, python)
    for method in ("fork", "spawn", "map"):
        path = program(tmp_path / method, POOL)
        assert finish(path, method, python=[python]).stdout == "True\n"
    for word in ("status", "verify"):
        subprocess.run([python, ROOT / "runs.py", word, tmp_path], check=True)
