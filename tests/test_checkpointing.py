"""The promises of checkpointing.py, as the programs of its users meet them.

Every job here is a program of its own, most on the standard library alone: 60 ms each. What breaks
the machine at every single system call, and power cuts, are in prove.py.
"""
import contextlib
import fcntl
import json
import os
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
from conftest import ROOT, command, kill, need, run, start, wait_for

import checkpointing
from checkpointing import Run, read_progress, write_atomic

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
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60, **more)
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


def progress(out):
    return read_progress(Path(out) / "PROGRESS.txt")


def durable(out):
    """How many units PROGRESS.txt says would survive a kill."""
    return int((re.match(r"\d+", progress(out).get("Checkpoint", "")) or ["0"])[0])


def numbers(out):
    """The numbers of the recorded checkpoints that are there, in order."""
    return [record["start"] for name, record in checkpointing.read_records(out).items()
            if (Path(out) / name).exists()]


def files(directory, *but):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()
            if path.is_file() and path.name not in (".lock", *but)}


def whole(directory):
    return ", 0 bad" in run("runs.py", "verify", directory).stdout


def environment(**more):
    return {**os.environ, **{key: str(value) for key, value in more.items()}}


def save_pieces(out, total=50, **options):
    with Run(out, total, **{"every": 10, "suffix": ".json", **options}) as job:
        for piece in job.pieces():
            piece.save(json.dumps(list(piece)))


# -- 1. atomic and durable

def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path):
    path = tmp_path / ("é" * 122 + ".npz")      # 248 bytes: legal, also for its temp file
    for content, umask in (("äb\n", 0o022), ("äb\n".encode(), 0o077),
                           (lambda file: file.write("äb\n".encode()), 0o002)):
        before = os.umask(umask)
        try:
            write_atomic(path, content)
        finally:
            os.umask(before)
        assert path.read_bytes() == "äb\n".encode()
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
        path.unlink()

    def fails(file):
        file.write(b"half")
        raise KeyError("cannot be stored")
    path.write_text("old")
    with pytest.raises(KeyError):
        write_atomic(path, fails)
    assert files(tmp_path) == {path.name: b"old"}


def test_temp_files_of_the_dead_are_swept_and_those_of_the_living_left_alone(tmp_path):
    path = program(tmp_path, """
def slow(file):
    print("ready", flush=True)
    time.sleep(60)
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

def test_damaged_pieces_are_set_aside_and_made_again_lost_ones_made_again(tmp_path, capsys):
    """Every kind of damage to every file is in prove.py; here, that no bad file is ever lost."""
    save_pieces(tmp_path)
    good, path = files(tmp_path), tmp_path / "checkpoint_00020.json"
    capsys.readouterr()
    for number, bad in enumerate((b"", b"first", b"second"), 1):
        path.write_bytes(bad)
        (tmp_path / "checkpoint_00000.json").unlink()
        save_pieces(tmp_path)
        assert capsys.readouterr().err.count(f"warning: {path}: ") == 1
        assert len(list(tmp_path.glob(f"{path.name}*.corrupt"))) == number
    assert {data for name, data in files(tmp_path).items() if name.endswith(".corrupt")} == {
        b"", b"first", b"second"}
    assert files(tmp_path)[path.name] == good[path.name] and whole(tmp_path)


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


def test_without_its_index_or_its_settings_a_run_stops_and_changes_nothing(tmp_path):
    lost = {"checkpoints.jsonl": [None, b"", b"[\n", b"garbage \xff\n" * 9],
            "run.json": [None, b"", b"{", b"[]", b'{"settings": 3}']}
    for out, begins in ((tmp_path / "states", lambda: run(JOB, tmp_path / "states", 50)),
                        (tmp_path / "pieces", lambda: save_pieces(tmp_path / "pieces"))):
        begins()
        good = files(out)
        for name, content in [(name, content) for name in lost for content in lost[name]]:
            (out / name).unlink() if content is None else (out / name).write_bytes(content)
            before = files(out, "PROGRESS.txt")
            with pytest.raises((SystemExit, AssertionError), match="^1$|^exit 1,"):
                begins()
            assert files(out, "PROGRESS.txt") == before
            (out / name).write_bytes(good[name])
        begins()
        assert progress(out)["Status"] == "COMPLETE"


@pytest.mark.parametrize("item", ["lambda: i", "Once()", "{1, 2}"])
def test_what_could_not_be_loaded_again_shows_after_the_first_step(tmp_path, item):
    """Not in an hour at the restart: it cannot be pickled, unpickled, or read by its own read."""
    done = finish(program(tmp_path, f"""
class Once:
    def __reduce__(self): return int, ("no number",)
own = {"2" in item}
def write(file): file.write(str(values).encode())
run = checkpointing.Run("out", 1000)
values = run.load([], read=json.load if own else None)
for i in run.steps(None if own else lambda: values, write=write if own else None):
    values.append({item})
    open("steps", "a").write("x")
"""), code=1)
    assert (tmp_path / "steps").read_text() == "x" and "Error" in done.stderr
    assert progress(tmp_path / "out")["Status"] == "FAILED" and numbers(tmp_path / "out") == []
    finish(program(tmp_path, STEPS))        # nothing is left that would be in the way


def test_a_directory_written_by_the_library_before_goes_on(tmp_path):
    squares = [i * i for i in range(30)]
    for number, digest, crc in (
            (10, "81a494c6bbb8c94e740a04d854afede3195884b47eee8dc5bfed1ac5eb5ce70b", 4239176059),
            (20, "b5398a93bfd49c31305a31f69e759db2223f7fec9f57aba651ee73d3dacd42ae", 167194651)):
        text, name = json.dumps(squares[:number]), f"checkpoint_{number:05d}.json"
        (tmp_path / name).write_text(text)
        with open(tmp_path / "checkpoints.jsonl", "a") as index:    # the lines as they were
            index.write(f'{{"name": "{name}", "start": {number}, "stop": {number}, "elapsed": 0.0, '
                        f'"bytes": {len(text)}, "sha256": "{digest}", "seal": {crc}}}\n')
    (tmp_path / "run.json").write_text('{\n "run": "0699d9",\n "settings": {}\n}\n')
    assert whole(tmp_path)
    run(JOB, tmp_path, 30)
    assert progress(tmp_path)["Run"] == "0699d9" and progress(tmp_path)["Status"] == "COMPLETE"
    assert json.loads((tmp_path / "checkpoint_00030.json").read_bytes()) == squares


def test_an_old_state_is_not_removed_before_the_new_one_reads_back_well(tmp_path):
    code = """
real = os.replace
def replace(temp, path):        # a disk that keeps something else than it was given
    real(temp, path)
    if rots and str(path).endswith("checkpoint_00006.json"): open(path, "w").write("rot")
rots, os.replace = len(sys.argv) > 1, replace
with checkpointing.Run("out", 9, every=1, keep=2, suffix=".json") as run:
    run.load(read=json.load)
    for i in run.steps(write=lambda file: file.write(b"[]")): pass
"""
    path = program(tmp_path, code)
    assert "older" in finish(path, "rot", code=1).stderr
    assert numbers(tmp_path / "out") == [4, 5, 6]
    assert "checkpoint_00006.json" in finish(path).stderr and numbers(tmp_path / "out") == [8, 9]


def test_foreign_files_are_never_removed_and_pieces_fit_together(tmp_path, capsys):
    foreign = {name: b"mine" for name in ("checkpoint_x.json", "checkpoint_00005.npz", "mine.tmp",
                                          "checkpoint_00005.json.corrupt")}
    pieces, states = tmp_path / "pieces", tmp_path / "states"
    for out, new, begins in ((pieces, "checkpoint_00040.json", lambda n: save_pieces(pieces, n)),
                             (states, "checkpoint_00050.json", lambda n: run(JOB, states, n))):
        begins(40)
        for name in (*foreign, new):
            (out / name).write_bytes(b"mine")
        begins(50)      # under a name that was needed it is set aside
        assert foreign.items() | {(f"{new}.corrupt", b"mine")} <= files(out).items()
    assert numbers(pieces) == [0, 10, 20, 30, 40]
    assert len(numbers(states)) == 3 and numbers(states)[-1] == 50
    for options in ({"first": 5}, {"total": 45}, {"total": 20}):
        before = files(pieces, "PROGRESS.txt")
        with pytest.raises(SystemExit):
            save_pieces(pieces, **options)
        assert "Nothing was changed" in capsys.readouterr().err
        assert files(pieces, "PROGRESS.txt") == before


# -- 3. the ends of programs: what stands in PROGRESS.txt, and the exit code

TERM, AT_5 = "os.kill(os.getpid(), signal.SIGTERM)", "    if i == 5: "
STEP = "for i in run.steps(lambda: values):\n    values.append(i)\n"
FORK = "\n        if os.fork() == 0: {}\n        os.wait()"
TICK = "while run.done < run.total:\n    values.append(run.done)\n    {}\n    run.tick(" \
       "run.done + 1, lambda: values, Loss=3.5)"
# COMPLETE is the last word: a signal or a kill while the last file is written leaves another one.
# name: (the program behind load(), its exit code, Status without a block, Status in a block)
ENDINGS = {
    "plain": (STEP, 0, "COMPLETE", "COMPLETE"),
    "break": (STEP + AT_5 + "break\nprint('behind')", 0, "INTERRUPTED", "INTERRUPTED"),
    "its steps have a name": ("steps = run.steps(lambda: values)\n" + STEP.replace(
        "run.steps(lambda: values)", "steps") + AT_5 + "break\nprint('behind')", 0, "INTERRUPTED",
        "INTERRUPTED"),
    "exception": (STEP + AT_5 + "1/0", 1, "FAILED", "FAILED"),
    "exception behind": (STEP + "1/0", 1, "FAILED", "FAILED"),
    "memory": (STEP + AT_5 + "raise MemoryError", 1, "FAILED", "FAILED"),
    "exit 3": (STEP + AT_5 + "sys.exit(3)", 3, "INTERRUPTED", None),
    "exit 3 behind": (STEP + "sys.exit(3)", 3, "COMPLETE", None),
    "finish": (STEP + AT_5 + "run.finish()\nprint('behind')", 0, "COMPLETE", "COMPLETE"),
    "finish, break": (STEP + AT_5 + "\n        run.finish()\n        break\nprint('behind')", 0,
                      "COMPLETE", "COMPLETE"),
    "SIGTERM": (STEP + AT_5 + TERM, 143, "INTERRUPTED", "INTERRUPTED"),
    "SIGHUP": (STEP + AT_5 + TERM.replace("TERM", "HUP"), 129, "INTERRUPTED", "INTERRUPTED"),
    "SIGTERM twice": (STEP + AT_5 + f"{TERM}; {TERM}", 143, "INTERRUPTED", "INTERRUPTED"),
    "SIGTERM before": (TERM + "\ntime.sleep(60)", 143, None, None),
    "SIGTERM in the last step": (STEP + f"    if i == 9: {TERM}\nprint('not reached')", 143,
                                 "INTERRUPTED", "INTERRUPTED"),
    "killed behind": (STEP + "os.kill(os.getpid(), 9)", -9, "RUNNING", "RUNNING"),
    "SIGTERM behind": (STEP + f"{TERM}\ntime.sleep(60)", 143, "INTERRUPTED", "INTERRUPTED"),
    "Ctrl-C": (STEP + AT_5 + TERM.replace("TERM", "INT"), -2, "INTERRUPTED", "INTERRUPTED"),
    "Ctrl-C behind": (STEP + TERM.replace("TERM", "INT"), -2, "INTERRUPTED", "INTERRUPTED"),
    "a program it had started died of the same signal": (
        STEP + AT_5 + TERM + "; subprocess.run(['sh', '-c', 'kill $$'], check=True)", 143,
        "INTERRUPTED", "INTERRUPTED"),
    "a child exits": (STEP + AT_5 + FORK.format("sys.exit(0)"), 0, "COMPLETE", "COMPLETE"),
    "a child's exception": (STEP + AT_5 + FORK.format("1/0"), 0, "COMPLETE", "COMPLETE"),
    "tick": (TICK.format("pass"), 0, "COMPLETE", "COMPLETE"),
    "tick, SIGTERM": (TICK.format(f"if run.done == 5: {TERM}"), 143, "INTERRUPTED", "INTERRUPTED"),
    "tick, exception": (TICK.format("if run.done == 5: 1/0"), 1, "FAILED", "FAILED"),
    "in use": ("checkpointing.Run('out').load()", 75, None, None),
    "a pool": ("import multiprocessing\n" + STEP + AT_5 + "\n        with multiprocessing."
               "get_context('fork').Pool(2) as pool: pool.map(abs, range(9))", 0, "COMPLETE",
               "COMPLETE"),
}


def end(place, name, in_block=False, python=sys.executable):
    python = python, "-I", "-S"     # the standard library is enough
    body, code, status, within = ENDINGS[name]
    opened = OPEN
    if in_block:
        opened, body = OPEN.replace("values", "with run:\n  values"), textwrap.indent(body, "  ")
        status = within
    done = finish(program(place, opened + body + "\n"), code=code, python=python)
    assert status in (None, progress(place / "out").get("Status")), done.stderr
    assert done.stdout == ("behind\n" if "behind')" in body else "")
    traced = "exception" in name or code == -2
    assert ("Traceback" in done.stderr) == traced, done.stderr
    # a restart goes on and ends with the same values
    again = finish(program(place, STEPS + "print(values)\n"), python=python)
    last = 6 if "finish" in name else 10
    assert json.loads(again.stdout) == list(range(last))
    assert progress(place / "out")["Status"] == "COMPLETE"
    assert progress(place / "out")["Progress"] == f"{last}/{last} steps (100%)"


@pytest.mark.parametrize("name", ENDINGS)
def test_the_end_of_a_program_is_the_end_of_its_run(tmp_path, name):
    end(tmp_path, name)


@pytest.mark.parametrize("name", [name for name in ENDINGS if ENDINGS[name][3]])
def test_a_block_ends_in_the_same_ways(tmp_path, name):
    end(tmp_path, name, in_block=True)


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
    for body in ("next(iter(piece)); piece.save('x'); break", "pass"):      # nor of such a piece
        finish(program(tmp_path / "pieces", f"""
with checkpointing.Run("out", 10**12, every=10) as run:
    for piece in run.pieces(): {body}
"""), code=1)
        assert numbers(tmp_path / "pieces" / "out") == []


# -- 4. signals

@pytest.mark.parametrize("inside", ["step", "save"])
def test_in_the_stages_ctrl_c_saves_and_a_second_one_ends_at_once_in_one_line(tmp_path, inside):
    process = begin(program(tmp_path, f"""
def write(file):
    file.write(b"[]")
    if {inside == "save"} and run.stopping: wait()
def wait():
    print("waiting", flush=True)
    time.sleep(60)
with checkpointing.Run("out", 10, every=1, signals=checkpointing.ALL_SIGNALS) as run:
    for i in run.steps(write=write):
        if i == 3 and {inside == "save"}: os.kill(os.getpid(), signal.SIGINT)
        if i == 3 and {inside == "step"}: wait()
"""), stderr=subprocess.PIPE)
    said(process, "waiting")
    if inside == "step":
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)      # two at once are one: `timeout` sends them
    wait_for(lambda: "SIGINT" in process.stderr.readline(), "what a second one does")
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and errors.count("\n") <= 1 and "3 steps" in errors, errors
    assert progress(tmp_path / "out")["Status"] == "INTERRUPTED"
    assert numbers(tmp_path / "out") == [1, 2, 3] and not list((tmp_path / "out").glob(".*.tmp"))


def test_what_was_changed_in_the_process_is_put_back_in_every_case(tmp_path):
    """In IPython the next Ctrl-C would otherwise end the session."""
    finish(program(tmp_path, """
def now(): return [signal.getsignal(number) for number in (1, 2, 15)] + [sys.excepthook]
def mine(*_): raise AssertionError("not now")
def own(number, frame): seen.append(number)
def leave(how):
    if how == "raise": raise KeyError
    if how == "exit": sys.exit(3)
    if how in ("SIGTERM", "SIGINT"): os.kill(os.getpid(), getattr(signal, how))
signal.signal(signal.SIGHUP, mine)
seen, before = [], now()
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
# what the job itself sets inside stays, and so does a signal that is ignored, as under nohup
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with checkpointing.Run("out", 3) as run:
    for i in run.steps(lambda: 1):
        os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGTERM, own)
        os.kill(os.getpid(), signal.SIGTERM)
assert run.complete and seen == [15] * 3 and signal.getsignal(signal.SIGTERM) is own
"""))


def test_an_exception_of_the_jobs_own_handler_behind_the_rename_of_a_save(tmp_path):
    """It is this run's own file when it is saved again, no stranger's."""
    done = finish(program(tmp_path, """
class Alarm(Exception): pass
def alarm(number, frame): raise Alarm
signal.signal(signal.SIGALRM, alarm)
real = os.replace
def replace(temp, path):
    real(temp, path)
    if "checkpoint_00003" in str(path) and run.done == 3: os.kill(os.getpid(), signal.SIGALRM)
with checkpointing.Run("out", 5) as run:
    run.load()
    for n in range(1, 6):
        run.update(n)
        for os.replace in (replace, real):      # a second one where nothing has happened is fine
            try: run.save(n, lambda: n)
            except Alarm: print("alarm")
    run.update(5)                               # now it has
    try: run.save(5, lambda: n)
    except checkpointing.CheckpointError: print("refused, not dropped")
"""))
    assert done.stdout == "alarm\nrefused, not dropped\n" and "warning" not in done.stderr
    assert numbers(tmp_path / "out") == [3, 4, 5] and whole(tmp_path)
    assert not list((tmp_path / "out").glob("*.corrupt"))


def test_what_a_started_program_left_torn_is_not_saved(tmp_path):
    """Ctrl-C reaches both, and the half result of the program that died of it must not be kept.
    What a job can do against a SIGTERM to both, the README's example shows."""
    path = program(tmp_path, OPEN + """
for i in run.steps(lambda: values):
    more = "; echo waiting >&2; exec sleep 60" if sys.argv[i + 1:] else ""
    done = subprocess.run(["sh", "-c", f"printf wh{more}; echo ole"], stdout=subprocess.PIPE)
    values.append(done.stdout)
print(values == [b"whole\\n"] * 10)
""")
    process = begin(path, "wait")
    said(process, "waiting")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -2 and progress(tmp_path / "out")["Status"] == "INTERRUPTED"
    assert finish(path).stdout == "True\n"


# -- 5. forks, pools, threads

POOL = """
import multiprocessing
def simulate(i):
    time.sleep(0.005)
    return i * i
if __name__ == "__main__":
    method, items = sys.argv[1], range(300)
    if method == "map":
        values = checkpointing.map(simulate, items, "out", every=10, workers=2)
    else:
        multiprocessing.set_start_method(method)
        run = checkpointing.Run("out", total=300)
        values = run.load([])
        with multiprocessing.Pool(2) as pool:
            for value in pool.imap(simulate, items[run.done:]):
                values.append(value)
                run.tick(len(values), lambda: values)
    print(values == [i * i for i in items])
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver", "map"])
def test_a_plain_pool_ends_at_ctrl_c_and_goes_on(tmp_path, method):
    """The terminal sends it to all processes; nobody had to write an initializer."""
    path = program(tmp_path, POOL)
    process = begin(path, method)
    wait_for(lambda: durable(tmp_path / "out"), "a checkpoint")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (-2, 1, 130)
    assert progress(tmp_path / "out")["Status"] == "INTERRUPTED"
    with pytest.raises(ProcessLookupError):     # nobody of the group is left behind
        wait_for(lambda: os.killpg(process.pid, 0), "the end of the workers")
    assert finish(path, method).stdout == "True\n"


@pytest.mark.parametrize("jobs, pools", [(2, 10), pytest.param(4, 40, marks=pytest.mark.thorough)])
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
        assert process.wait(timeout=100) == 0


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
        for way in ("sys.exit(0)", "sys.exit(3)", "raise ValueError", "os._exit(0)", "run.finish()",
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
    # what outlives the job does not keep the directory
    path = program(tmp_path / "dies", OPEN + """
subprocess.Popen(["sleep", "60"])
if os.fork(): os.kill(os.getpid(), 9)
time.sleep(60)
""")
    process = begin(path, stdout=subprocess.DEVNULL)
    assert process.wait(timeout=30) == -9
    finish(program(tmp_path / "dies", STEPS))
    os.killpg(process.pid, signal.SIGKILL)


def test_what_was_left_is_neither_saved_nor_complete_and_no_hook_hides_an_error(tmp_path):
    """A block without a total whose step is left; another sys.excepthook; a lambda in map()."""
    left = program(tmp_path / "left", """
import contextlib
with checkpointing.Run("out") as run:
    pairs = run.load(([], []))
    with contextlib.suppress(KeyboardInterrupt):
        for i in run.steps(lambda: pairs):
            pairs[0].append(i)
            if i == 5 and not os.path.exists("again"): os.kill(os.getpid(), signal.SIGINT)
            pairs[1].append(i)
            time.sleep(0.01)
            if i == 9: run.finish()
print(pairs[0] == pairs[1] == list(range(10)))
""")
    finish(left)
    out = tmp_path / "left" / "out" / "PROGRESS.txt"
    assert read_progress(out)["Status"] == "INTERRUPTED"
    (tmp_path / "left" / "again").touch()
    assert finish(left).stdout == "True\n"
    assert read_progress(out)["Status"] == "COMPLETE"
    finish(program(tmp_path / "hook", """
run = checkpointing.Run("out", 3)
run.load()
sys.excepthook = lambda *error: print(error[1])
for i in run.steps(): pass
1 / 0
"""), code=1)
    assert read_progress(tmp_path / "hook" / "out" / "PROGRESS.txt")["Status"] == "FAILED"
    finish(program(tmp_path / "lambda", "checkpointing.map(lambda x: x, range(50), 'out', "
                   "workers=2)"), code=1)


def test_threads_executors_and_runs_within_runs(tmp_path):
    finish(program(tmp_path, """
import concurrent.futures, threading
def count(out, stop_at=None):
    with checkpointing.Run(out, 30, every=30) as run:
        for i in run.steps(lambda: i):
            time.sleep(0.001)
            if i == stop_at: os.kill(os.getpid(), signal.SIGTERM)
    return run.complete
if __name__ == "__main__":
    thread = threading.Thread(target=count, args=["out/thread"])    # no signals: the main thread's
    thread.start()
    with checkpointing.Run("out", 3) as run, \\
            concurrent.futures.ThreadPoolExecutor(2) as threads, \\
            concurrent.futures.ProcessPoolExecutor(2) as processes:
        for i in run.steps(lambda: i):
            assert not subprocess.run(["sh", "-c", "trap"], stdout=subprocess.PIPE).stdout
            assert list(processes.map(abs, [-i])) == list(threads.map(abs, [-i])) == [i]
            assert count(f"out/inner{i}")
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler    # put back
    thread.join()
    with checkpointing.Run("out/outer", 2) as outer:
        for i in outer.steps(lambda: i): count("out/last", 10)
"""), code=143)
    assert numbers(tmp_path / "out" / "last")[-1] == 11
    status = run("runs.py", "status", tmp_path).stdout
    assert status.count("COMPLETE") == 5 and status.count("INTERRUPTED") == 2


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
torch.set_num_threads(1)
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
# Forks its starts from one process that has imported torch, at 50 ms instead of four seconds each.
DRIVER = """
while line := sys.stdin.readline():
    place, pause = line.split()
    pid = os.fork()
    if pid == 0: break
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else: raise SystemExit
os.chdir(place)
os.environ["PAUSE"] = pause
sys.stdout = open("result", "w")
exec(open("job.py").read())
"""


@pytest.mark.parametrize("name", PROGRAMS)
def test_five_programs_of_others_killed_four_times(tmp_path, name):
    """Bit for bit what an undisturbed one gives; a pool's workers outlive their killed parent."""
    torch, moments = "PyTorch" in name, random.Random(7)
    driver = begin(program(tmp_path, "import torch, torch._dynamo\n" * torch + DRIVER),
                   stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    out = tmp_path / "killed" / "out"
    for place, number in [("whole", 0)] + [("killed", 9)] * 4 + [("killed", 15), ("killed", 0)]:
        program(tmp_path / place, PREAMBLE + PROGRAMS[name])
        before = durable(out)
        driver.stdin.write(f"{tmp_path / place} {0.005 if number else 0}\n")
        driver.stdin.flush()
        pid = int(driver.stdout.readline())
        if number:
            wait_for(lambda: durable(out) > before, "its first step")       # noqa: B023
            time.sleep(moments.uniform(0, 0.1))
            os.kill(pid, number)
        assert int(driver.stdout.readline()) == {0: 0, 9: -9, 15: 143}[number]
    results = [(tmp_path / place / "result").read_text() for place in ("whole", "killed")]
    assert results[0] == results[1] != "" and progress(out)["Status"] == "COMPLETE"
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()


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
    line = progress(tmp_path / "out")["Command"]
    kill(process)
    again = subprocess.Popen(["sh", "-c", "exec " + line], cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_for(lambda: progress(tmp_path / "out")["PID"] == str(again.pid), "the work to go on")
    kill(again)


def test_100_percent_shows_only_when_the_last_state_is_durable(tmp_path):
    path = program(tmp_path, """
def shown(file=None):
    if file: file.write(b"x"), time.sleep(0.1)     # some heartbeats
    print(open("out/PROGRESS.txt").readlines()[2].strip())
with checkpointing.Run("out", 1000, heartbeat=0.02) as run:
    run.load()
    for done in (1, 999, 1000):
        run.update(done)
        if done != 1: run.save(done, write=shown)
    shown()
    try: run.update(1000, PID=9)
    except ValueError: print("not your line")
""")
    assert finish(path).stdout.splitlines() == [
        "Progress: 999/1000 steps (99.9%)", "Progress: 1000/1000 steps (99.9%)",
        "Progress: 1000/1000 steps (100%)", "not your line"]


def test_a_hang_shows_as_stalled_and_slow_steady_work_does_not(tmp_path):
    steady = begin(program(tmp_path, """
with checkpointing.Run("out", 3, heartbeat=0.02, stall_after=0.05) as run:
    for i in run.steps(lambda: i):
        time.sleep(0.3 if i == 0 else 1.5)      # ten times the longest wait so far is what counts
        assert i == 0 or "RUNNING" in open("out/PROGRESS.txt").read()
"""))
    out, options = tmp_path / "hung", json.dumps({"heartbeat": 0.1, "stall_after": 1})
    hung = start(JOB, out, 100, env=environment(HANG_AT=15, RUN_OPTIONS=options))
    wait_for(lambda: progress(out).get("Progress", "").startswith("15/"), "the hang")
    first = progress(out)
    later = wait_for(lambda: int(progress(out)["Heartbeat"]) > int(first["Heartbeat"]) + 2
                     and progress(out), "beats")
    kill(hung)
    assert (first["Status"], later["Status"]) == ("RUNNING", "STALLED")
    assert abs(int(later["Advanced"]) - int(first["Advanced"])) <= 1
    assert steady.communicate(timeout=30) and steady.returncode == 0


def test_elapsed_adds_up_over_restarts_and_no_clock_ends_a_job(tmp_path):
    path, out = program(tmp_path, """
pace, jump = float(sys.argv[1]), float(sys.argv[2])     # of the steady clock; of the wall clock
time.monotonic = lambda real=time.monotonic: pace * real()
time.time = lambda real=time.time: real() + jump
with checkpointing.Run("out", 10**18, heartbeat=pace * 0.05) as run:
    values = run.load([])
    for i in run.steps(lambda: values):
        values.append(i)
        run.expect(float(sys.argv[3]))
        time.sleep(0.01)
"""), tmp_path / "out"

    def work(*arguments, until):
        process = begin(path, *arguments, stdout=subprocess.DEVNULL)
        wait_for(lambda: progress(out).get("PID") == str(process.pid) and until(), "the work")
        kill(process)
        return progress(out)
    number = lambda key: float(progress(out)[key].split()[0])       # noqa: E731
    first = work(100, 0, 90, until=lambda: number("Elapsed") >= 100)
    assert first["ETA"].split()[0] in ("89", "90")
    for jump, eta in ((-86400, 1e12), (86400, 1e30), (-10**9, "inf")):
        now = work(1, jump, eta, until=lambda: number("Rate"))
        assert now["ETA"] == "unknown" and number("Rate") <= 110    # restored steps are no speed
        assert int(first["Elapsed"].split()[0]) <= number("Elapsed") <= 300
        assert 0 <= number("Heartbeat") - number("Advanced") <= 60


def test_a_progress_file_that_cannot_be_written_is_told_once_and_stops_nothing(tmp_path):
    done = finish(program(tmp_path, STEPS + """
    if i == 9: os.unlink("out/PROGRESS.txt"); os.mkdir("out/PROGRESS.txt")
"""))
    assert done.stderr.count("PROGRESS.txt") == 1 and numbers(tmp_path / "out")[-1] == 10
    assert "goes on" not in done.stderr.splitlines()[-1]     # it has ended


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_work_heartbeat_and_sigterm_go_on_where_nobody_reads(tmp_path, kind):
    import pty
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
    assert process.wait(timeout=30) == 143 and progress(out)["Status"] == "INTERRUPTED"
    os.close(reader)


def test_outputs_that_fail_stop_nothing_and_a_slow_reader_gets_the_error(tmp_path):
    path = program(tmp_path, """
how = sys.argv[1]
if how == "none": sys.stderr = None
if how == "closed": os.close(2)
with checkpointing.Run(how, 5000, heartbeat=3600, quiet=how == "quiet") as run:
    for i in run.steps(lambda: i): pass
print("mine")
""")
    for how, lines in (("none", 0), ("closed", 0), ("quiet", 0), ("plain", 3)):     # not one a save
        done = finish(path, how)
        assert done.stdout == "mine\n" and done.stderr.count("\n") == lines, done.stderr
    for how, line in (("full", "2> /dev/full"), ("left", "2>&1 | true")):
        subprocess.run(["bash", "-c", f"{sys.executable} job.py {how} {line}"], cwd=tmp_path)
        assert progress(tmp_path / how)["Status"] == "COMPLETE"
    (tmp_path / "plain" / "run.json").write_text("{")
    reader, writer = os.pipe()
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)))        # now it is full
    process = begin(path, "plain", stderr=writer)
    os.close(writer)
    time.sleep(0.7)
    with open(reader, "rb") as pipe:
        assert pipe.read().count(b"error: ") == 1
    assert process.wait(timeout=30) == 1


# -- 8. one writer

def test_the_others_are_told_who_holds_the_directory(tmp_path):
    path = program(tmp_path, OPEN + """
import shutil
run.update(1)
shutil.copytree("out", "copy")      # opens and closes .lock, too
print("copied", flush=True)
time.sleep(60)
""")
    process = begin(path)
    said(process, "copied")
    errors = finish(path, code=75).stderr
    assert f"PID {process.pid} on host {os.uname().nodename} since" in errors
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, path], cwd=tmp_path, stderr=full).returncode == 75
    kill(process)
    finish(program(tmp_path, STEPS + "    if i == 5: os.mkdir('new'); os.chdir('new')"))
    assert numbers(tmp_path / "out")[-1] == 10 and not os.listdir(tmp_path / "new")


@pytest.mark.parametrize("moved", [True, False])
def test_a_run_whose_directory_is_gone_writes_nothing_in_its_place(tmp_path, moved):
    """Where another run stands there, see prove.py."""
    out, options = tmp_path / "out", '{"heartbeat": 0.02}'
    process = start(JOB, out, 10**6, env=environment(PAUSE=0.01, RUN_OPTIONS=options))
    wait_for(lambda: durable(out), "a checkpoint")
    out.rename(tmp_path / "old")
    if moved:
        out.mkdir()
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 1 and "error: " in output and "Traceback" not in output, output
    assert not (os.listdir(out) if moved else out.exists())


# -- 9. settings, numbers, names

def test_other_settings_are_refused_naming_each_and_nothing_is_changed(tmp_path):
    settings = lambda **more: environment(SETTINGS=json.dumps(more),        # noqa: E731
                                          RUN_OPTIONS='{"may_grow": ["n"]}')
    run(JOB, tmp_path, 20, env=settings(seed=1, rate=0.5, kind="a", n=20))
    before = files(tmp_path)
    wrong = run(JOB, tmp_path, 20, env=settings(seed=2, rate=0.5, size=3, n=19), code=2).stderr
    for difference in ("seed was 1, asked 2", 'kind was "a"', "asked 3", "n was 20, asked 19"):
        assert difference in wrong
    same = dict(seed=1, rate=0.5, kind="a")
    assert "rate" not in wrong and "more than the 10 asked for" in run(
        JOB, tmp_path, 10, code=2, env=settings(**same, n=20)).stderr
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
try: run.save(99, lambda: 1)
except (RuntimeError, checkpointing.CheckpointError): print("refused: it has ended")
""")
    for _ in range(3):      # other addresses, other orders of the sets
        assert "refused" in finish(path, 1).stdout
    assert "seed" in finish(path, 2, code=2).stderr
    done = finish(path, 1, 0, 0, code=1)
    assert "load()" in done.stderr and not done.stdout


def test_numbers_of_numpy_are_numbers_and_files_are_ordered_as_numbers(tmp_path):
    np = pytest.importorskip("numpy")
    n = np.int64
    save_pieces(tmp_path / "pieces", n(60), first=n(99_980), every=n(20))
    assert numbers(tmp_path / "pieces") == [99_980, 100_000, 100_020]
    with Run(tmp_path / "out", n(9), keep=n(2), every=n(3), max_minutes=np.float32(1)) as job:
        job.load()
        for done in np.arange(1, 10):
            job.tick(done, lambda: done, Loss=np.float32(0.5))      # noqa: B023
    with Run(tmp_path / "blocks", n(20), every=n(10), suffix=".tar.gz") as job:
        for piece in job.pieces():
            piece.save(repr([(int(a), int(b)) for a, b in piece.blocks(n(4))]))
    assert (tmp_path / "blocks" / "checkpoint_00010.tar.gz").read_text() == (
        "[(10, 14), (14, 18), (18, 20)]")
    assert progress(tmp_path / "out")["Loss"] == "0.5" and whole(tmp_path)
    for suffix in ("json", "", ".", ".a b", ".tmp", ".npz.corrupt", "/x", "._/"):
        with pytest.raises(ValueError, match="suffix"):
            Run(tmp_path, 10, suffix=suffix)


# -- 10. the disk

def test_a_disk_that_fills_up_is_one_line_and_the_restart_goes_on(small_disk):
    disk = small_disk()
    path = program(disk, """
def fill(free):     # to the last byte, but for so many blocks
    with open("filler", "ab", 0) as filler:
        try:
            while filler.write(bytes(1000)): pass
        except OSError: pass
        os.truncate("filler", max(0, filler.tell() // 4096 - free) * 4096)
how, size = sys.argv[1], int(sys.argv[2])
with checkpointing.Run(how, 10, every=1, suffix=".bin") as run:
    for piece in run.pieces():
        [i] = piece
        for free in range(12):      # room for the file, and only a part of its line in the index
            if i == 2 and how != "itself": fill(free)
            try: piece.save(bytes([i]) * size)
            except checkpointing.CheckpointError:
                if how != "again": raise
            else: break
        os.path.exists("filler") and os.unlink("filler")
""")
    finish(path, "again", 3000)     # a save that failed was tried again, and is not lost
    assert "warning" not in finish(path, "again", 3000).stderr and whole(disk)
    shutil.rmtree(disk / "again")
    for how in ("others", "itself"):
        done = finish(path, how, 100_000, code=1)
        assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
        assert re.search(r"checkpoint_\d+\.bin: .*No space left on device.* free", done.stderr)
        assert len(numbers(disk / how)) >= 2
        assert not list((disk / how).glob(".*.tmp"))
        (disk / "filler").unlink(missing_ok=True)
    assert progress(disk / "itself")["Status"] == "FAILED"
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    finish(path, "itself", 100_000)
    assert whole(disk) and [path.read_bytes()[:1] for path in sorted(
        (disk / "itself").glob("*.bin"))] == [bytes([i]) for i in range(10)]


def test_what_a_disk_or_a_place_lacks_is_said_as_what_it_is(small_disk, tmp_path):
    disk = small_disk()
    many = program(disk, STEPS + """
    if i == 4:
        for n in range(10**6):
            try: open(f"{n}.empty", "x")
            except OSError: break
        run.every = 1
""")
    subprocess.run(["mount", "-o", "remount,nr_inodes=500", disk], check=True)
    assert "inode" in finish(many, code=1).stderr
    for path in disk.glob("*.empty"):
        path.unlink()
    finish(program(disk, STEPS))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    program(tmp_path, "checkpointing.Run('limited', 1).tick(1, lambda: bytes(100_000))")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    program(tmp_path / "other", "checkpointing.Run(sys.argv[1]).load()")
    for words, line in (("File too large", "trap '' XFSZ; ulimit -f 50; exec python job.py"),
                        ("Read-only file system", f"exec python other/job.py {disk}/out"),
                        ("Read-only file system", f"exec python other/job.py {disk}/new"),
                        ("file", "exec python other/job.py file"),
                        ("link", "exec python other/job.py link"),
                        ("too long", "exec python other/job.py " + 300 * "x")):
        done = subprocess.run(["bash", "-c", line.replace("python", sys.executable)], text=True,
                              cwd=tmp_path, stderr=subprocess.PIPE)
        assert done.returncode in (1, 2) and words in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


# -- 11. map

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
    for _ in range(3):
        before, process = durable(tmp_path / "out"), begin(
            path, env=environment(PAUSE=0.005), stdout=subprocess.DEVNULL)
        wait_for(lambda: durable(tmp_path / "out") > before, "a piece")     # noqa: B023
        kill(process)
        os.killpg(process.pid, signal.SIGKILL)      # its workers
    finish(path, env=environment(DIE=199), code=1)  # a Pool would wait for it for ever
    assert "bad item" in finish(path, env=environment(BAD=198), code=1).stderr
    assert progress(tmp_path / "out")["Status"] == "FAILED" and durable(tmp_path / "out") >= 180
    for _ in range(2):
        assert finish(path).stdout == "True\n" and whole(tmp_path)


def test_map_keeps_every_value_or_refuses(tmp_path):
    """Items are told apart by their whole text, not by its beginning."""
    np = pytest.importorskip("numpy")

    class Named(str):
        def __repr__(self):
            return f"Named({self[:]})"
    long = "x" * 5000
    pairs = {"bytes": ([long.encode() + b"a"], [long.encode() + b"b"]), "more": ([1], [1, 2]),
             "paths": ([Path("a")], [Path("b")]), "numbers": (np.array([1, 2]), np.array([7, 8])),
             "arrays": ([np.zeros(5000)], [np.eye(1, 5000, 3)[0]]), "fewer": ([1, 2], [1]),
             "objects": ([Named(long + "a")], [Named(long + "b")]),
             "keys": ([{(1, 2): 3}], [{(1, 4): 3}])}
    for name, (items, others) in pairs.items():
        kept = checkpointing.map(repr, items, tmp_path / name)
        for function, things in ((repr, others), (len, items)):
            with pytest.raises(SystemExit) as stop:
                checkpointing.map(function, things, tmp_path / name)
            assert stop.value.code == 2, name
        assert checkpointing.map(repr, items, tmp_path / name) == kept == list(map(repr, items))
    with pytest.raises(TypeError):      # nothing that is the same at the next start
        checkpointing.map(str, [object()], tmp_path / "object")
    for value in ((1, 2), {1: 2}, [(1,)]):
        with pytest.raises(TypeError, match="JSON"):    # JSON would give back another value
            checkpointing.map(lambda i: value, [1], tmp_path / "value")     # noqa: B023
    values = [float("nan"), float("inf"), None, "\u2028\n\ud800", 2**70, [1, {"a": True}]]
    for _ in range(2):
        back = checkpointing.map(values.__getitem__, range(6), tmp_path / "json")
        assert repr(back) == repr(values)
        assert checkpointing.map(np.sqrt, [0, 4], tmp_path / "numpy") == [0, 2]
        # items that their function changes; none at all
        assert checkpointing.map(lambda x: x.sort() or x[0], [[3, 1]], tmp_path / "sort") == [1]
        assert checkpointing.map(str, [], tmp_path / "none") == []


# -- 12. every Python

@pytest.mark.thorough
@pytest.mark.parametrize("version", {9, 10, 11, 12, 13, 14} - {sys.version_info[1]})
def test_it_works_on_other_pythons(tmp_path, version):
    python = shutil.which(f"python3.{version}")
    # a pyenv shim that points nowhere fails
    if not python or subprocess.run([python, "-c", ""], stderr=subprocess.DEVNULL).returncode:
        pytest.skip(f"there is no python3.{version} on the PATH")
    for name in ENDINGS:
        end(tmp_path / name, name, python=python)
        if ENDINGS[name][3]:
            end(tmp_path / (name + " in a block"), name, in_block=True, python=python)
    for method in ("fork", "spawn", "map"):
        path = program(tmp_path / method, POOL)
        assert finish(path, method, python=[python]).stdout == "True\n"
    for word in ("status", "verify"):
        subprocess.run([python, ROOT / "runs.py", word, tmp_path], check=True)


HANGING_POOL = """
import multiprocessing
def simulate(i):
    if i == 7 and not os.path.exists("hung"):
        open("hung", "w").close()
        time.sleep(1000)
    return i * i
if __name__ == "__main__":
    run = checkpointing.Run("out", total=20, stall_after=1, heartbeat=0.2)
    values = run.load([])
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        for i in run.steps(lambda: values):
            values.append(pool.apply(simulate, (i,)))
    assert values == [i * i for i in range(20)]
"""


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_pool_whose_workers_died_of_the_same_signal_does_not_wait_for_ever(tmp_path, how):
    """As of SIGHUP, which a terminal that closes sends to all of them."""
    path = program(tmp_path, HANGING_POOL)
    job = begin(path, how)
    wait_for((tmp_path / "hung").exists, "the item that hangs")
    os.killpg(job.pid, signal.SIGHUP)
    assert job.wait(60) == 129
    assert progress(tmp_path / "out")["Status"] == "INTERRUPTED"
    finish(path, how)
