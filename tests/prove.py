"""Break the machine under the library, again and again, and count what is lost.

    python tests/prove.py --minutes 20                      # all parts, and a table of them
    python tests/prove.py --part kill --minutes 1 --seed 7  # one part, with other moments

Real processes, real signals, real file systems. A trial is lost if work that was reported as saved
is gone, a file under its final name is not the one that was written, COMPLETE stands where the job
is not, a restart does not end with the bytes of an undisturbed run, something is left behind, a
process hangs, or an error is not one line. Says each lost trial and how to repeat it on stderr;
exit code 0 if none was lost, 1 otherwise, 3 if a tool is missing. Linux with strace, as root.
--code DIR tests the copy of the library and the stages in another directory.
"""
import argparse
import atexit
import contextlib
import fcntl
import functools
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--minutes", type=float, default=20, help="time for all parts (default 20)")
parser.add_argument("--part", help="only this part of the table")
parser.add_argument("--seed", type=int, default=1, help="other moments and places (default 1)")
parser.add_argument("--first", action="store_true", help="stop at the first loss")
parser.add_argument("--code", default=Path(__file__).resolve().parent.parent, type=Path,
                    help="where checkpointing.py is")
arguments = parser.parse_args()

CODE = str(arguments.code.resolve())
os.environ.update(PYTHONPATH=CODE,      # for the true processes; the others are forked: no threads
                  OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
sys.path.insert(0, CODE)
import checkpointing  # noqa: E402
import generate  # noqa: E402
import merge  # noqa: E402
import runs  # noqa: E402

generate.report.refresh = lambda *_, **__: None     # it took most of the time; it is no checkpoint
STOPS = checkpointing.ALL_SIGNALS
signal.signal(signal.SIGHUP, signal.SIG_DFL)    # nohup and & hand on that they are ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
HANG = 30       # seconds after which a process counts as hanging


def need(condition, what):
    if not condition:
        print(f"prove: {what} is needed", file=sys.stderr)
        raise SystemExit(3)


# -- The jobs that are broken. Their log says "saved N"; what is saved then, N alone tells

OPTIONS = {"every": 10, "suffix": ".json", "heartbeat": 0.03, "keep": 2, "settings": {"seed": 1}}


def draws_of(number):
    """What is saved after `number` units: a few pages, so that half of it can be missing."""
    generator = random.Random(1)
    return [generator.random() for _ in range(400 + number)]


def content_of(number):
    return json.dumps(draws_of(number)).encode()


def pieces_job(out, total=40):
    with checkpointing.Run(out, total, **OPTIONS) as run:
        for piece in run.pieces():
            list(piece)
            piece.save(content_of(piece.start))
            print(f"saved {piece.start}", flush=True)


def state_job(out, total=60, signals=(signal.SIGTERM, signal.SIGHUP)):
    """A state in a format of its own, in a loop of its own; a save that failed is tried again."""
    with checkpointing.Run(out, total, signals=signals, **OPTIONS) as run:
        run.load(read=json.load)
        while not run.complete:
            saved, number = run.durable, run.done + 1
            write = lambda file: file.write(content_of(number))  # noqa: E731
            time.sleep(0.0003)
            try:
                run.tick(number, write=write)
            except checkpointing.CheckpointError:
                run.save(number, write=write)
            if run.durable > saved:
                print(f"saved {run.durable}", flush=True)


# As a stranger writes it: no block, a default state, random numbers, a last file behind the loop.
PROGRAM = """
import random, sys, time
import checkpointing

def last_file(file):
    for value in values:
        file.write(f"{value!r} ".encode())
        time.sleep(0.00005)

out = sys.argv[1]
random.seed(1)
run = checkpointing.Run(out, 60, every=10, heartbeat=0.03, keep=2)
values = run.load([random.random() for _ in range(400)])
for i in run.steps(lambda: values):
    print(f"saved {run.durable}", flush=True)
    time.sleep(0.0003)
    values.append(random.random())
print(f"saved {run.durable}", flush=True)
checkpointing.write_atomic(f"{out}/last.txt", last_file)
"""


def program_job(out, state="values"):
    sys.argv = ["-c", str(out)]
    exec(PROGRAM.replace("lambda: values", f"lambda: {state}"), {"__name__": "__main__"})


def true_program(out):
    os.chdir(out.parent)    # Python takes modules from here first
    os.execv(sys.executable, [sys.executable, "-c", PROGRAM, str(out)])


def generate_job(out, n=120, every=40, *options):
    sys.argv = ["generate.py", "--out", str(out), "--n", str(n), "--every", str(every), *options]
    generate.main()


def merge_job(out):
    sys.argv = ["merge.py", str(out), "--out", str(out / "dataset.npz")]
    merge.main()


class Child(contextlib.AbstractContextManager):
    """A job in a forked process: its own program, without the time that Python takes to start."""

    def __init__(self, job, *job_arguments, gate=None):
        self.job, self.log, self.code = job, tempfile.TemporaryFile(), None
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)     # not before the child can die of them
        self.pid = os.fork()
        if self.pid == 0:
            self.be(job_arguments, gate)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def be(self, job_arguments, gate):
        """In the child: the job, and then the end that every Python program comes to."""
        code = 1
        try:
            os.dup2(self.log.fileno(), 1)
            os.dup2(self.log.fileno(), 2)
            atexit._clear()     # prove.py's own: they would remove its directory
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            if gate:
                os.close(gate[1])
                os.read(gate[0], 1)
            self.job(*job_arguments)
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException as error:
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
            try:
                sys.excepthook(type(error), error, error.__traceback__)
            except SystemExit as leaving:
                code = leaving.code
        finally:
            with contextlib.suppress(BaseException):
                atexit._run_exitfuncs()
            os._exit(code)

    def wait(self, condition=lambda: False):
        """Until it has ended or the condition holds. Its exit code, minus the signal's number if
        one killed it; None if it goes on."""
        end = time.monotonic() + HANG
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif condition():
                break
            assert time.monotonic() < end, f"{self.job.__name__} hangs"
            time.sleep(0.001)
        return self.code

    def send(self, number):
        if self.wait(lambda: True) is None:
            os.kill(self.pid, number)

    def said(self):
        """Its log. pread, since the place in the file is one for both of us."""
        return os.pread(self.log.fileno(), 1 << 24, 0).decode(errors="replace")

    def reported(self):
        return [int(number) for number in re.findall(r"^saved (\d+)\n", self.said(), re.M)]

    def __exit__(self, *exception):
        self.send(signal.SIGKILL)
        self.wait()
        self.log.close()


def ends(job, *job_arguments, codes=(0,)):
    """Run it to its end, with one of these exit codes. Returns (exit code, what it said)."""
    with Child(job, *job_arguments) as process:
        code, said = process.wait(), process.said()
    assert code in codes, f"{job.__name__} ended with {code}: {said[-300:]}"
    one_line(said)
    return code, said


def half_done(job, out):
    """A directory in which another start has done a part of the work."""
    with Child(job, out) as process:
        process.wait(lambda: len(set(process.reported())) >= 2)


# -- What must hold, whatever happened

def index(directory):
    """{number: path} of the checkpoints: those that have a record, in order."""
    return {record["start"]: directory / name
            for name, record in checkpointing.read_records(directory).items()
            if (directory / name).exists()}


def whole(path, number):
    """The file under a final name is the one that was written."""
    data = path.read_bytes() if path.exists() else b""
    if path.suffix == ".pkl":   # may have other bytes
        data = data and json.dumps(pickle.loads(data)["state"]).encode()
    assert data == content_of(number), f"{path.name} is not what was written ({len(data)} bytes)"


def nothing_is_lost(job, out, reported=()):
    """What was reported as saved is there and whole, COMPLETE is true. Returns PROGRESS.txt."""
    there = index(out)
    for number, path in there.items():
        whole(path, number)
    newest = max(reported, default=0) <= max(there, default=0)
    kept = set(reported) <= there.keys() if job is pieces_job else newest
    assert kept, f"saved were {reported}, there are {[*there]}"
    text = (out / "PROGRESS.txt").read_text() if (out / "PROGRESS.txt").exists() else ""
    last = 30 if job is pieces_job else 60
    assert "(100%)" not in text or last in there, f"100 % shows, and there are {[*there]}"
    assert not text or re.search(r"^Command: .*\n\Z", text, re.M), f"half a PROGRESS.txt: {text}"
    if job in (program_job, true_program) and "\nStatus: COMPLETE\n" in text:
        last = out / "last.txt"
        assert last.exists() and last.read_text().split() == [*map(repr, draws_of(60))], (
            "COMPLETE stands without the last file of the job")
    return text


def all_is_there(job, out):
    text, there = nothing_is_lost(job, out), [*index(out)]
    # Killed before it removed what is older, a state leaves one more than it keeps.
    states = there[-1:] == [60] and len(there) < 4
    assert there == [0, 10, 20, 30] if job is pieces_job else states, f"there are only {there}"
    assert verified(out), "verify finds something bad"
    return text


def comes_to_its_end(job, out):
    """Started again, it does what is left, and nothing else stays."""
    ends(job, out)
    assert "\nStatus: COMPLETE\n" in all_is_there(job, out), "PROGRESS.txt says something else"
    left = [name for name in os.listdir(out) if name.endswith((".tmp", ".corrupt"))]
    assert not left, f"left behind: {left}"


def one_line(said):
    assert "Traceback" not in said, f"a stack trace: {said.strip()[-900:]}"


def verified(directory):
    with contextlib.redirect_stdout(io.StringIO()):
        return runs.verify([str(directory)]) == 0


# A part makes one trial in trial.out, a new place, and tells in trial.story what it did. It raises
# if a promise is broken, and returns False if what was to happen did not come. trial.work and
# trial.atexit (an ExitStack) are one for all trials.

# -- System calls: killed before, or failing. The job is half done, so that reading back is hit, too
JOBS = pieces_job, state_job, program_job


def traced(job, out, *options):
    """(exit code, what it reported, what it said, lines of strace) of the job under strace."""
    trace, gate = out.with_suffix(".trace"), os.pipe()
    with Child(job, out, gate=gate) as process:
        os.close(gate[0])
        # Attached, not started by strace: it counts the calls of each thread from here on, so no
        # call of Python's start is hit in place of one of ours.
        strace = subprocess.Popen(["strace", "-f", "-y", "-s", "0", "-o", trace, "-p",
                                   str(process.pid), *options], stderr=subprocess.PIPE)
        need(b"attached" in strace.stderr.readline(), "a strace that can attach")
        os.close(gate[1])
        code, reported, said = process.wait(), process.reported(), process.said()
    strace.communicate(timeout=HANG)
    return code, reported, said, trace.read_text(errors="replace").splitlines()


@functools.cache
def calls_of(job, base):
    """[(call, how many-th of its kind in its thread, line)] that touch the run directory."""
    half_done(job, base)
    out = base.with_suffix(".dry")
    shutil.copytree(base, out)
    counts, found = {}, {}
    for line in traced(job, out, "-e", "trace=%file,%desc")[-1]:
        match = re.match(r"(\d+) +(\w+)\(", line)
        if match:
            counts[match.groups()] = when = counts.get(match.groups(), 0) + 1
            # Threads count for themselves: their first openat is hit with the main thread's. lseek
            # never reaches the disk, and cannot fail on a file.
            if str(out) in line and match[2] != "lseek":
                found[match[2], when] = (match[2], when, line)
    assert len(found) >= 20, f"{job.__name__}: only {len(found)} calls seen; does strace work?"
    return random.Random(arguments.seed).sample([*found.values()], len(found))


def one_call(trial, what):
    """All calls of each job in turn, in any order, and what happens then."""
    job, out = JOBS[trial.number % 3], trial.out
    calls = calls_of(job, base := trial.work / job.__name__)
    call, when, line = calls[trial.number // 3 % len(calls)]
    inject = f"inject={call}:{what}:when={when}"
    trial.story += [job.__name__, inject, line[:200]]
    shutil.copytree(base, out)
    before = [*index(out)][0 if job is pieces_job else -1:]
    code, reported, said, lines = traced(job, out, "-e", f"trace={call}", "-e", inject)
    hit = [str(out) in line for line in lines if "INJECTED" in line]
    if code != -9 and not (hit and all(hit)):   # it did not come, or was a print() of the job
        return False
    assert code in ((0, 1) if "error" in what else (0, -9)), f"ended with {code}: {said[-300:]}"
    one_line(said)
    nothing_is_lost(job, out, before + reported)
    if code == 0:
        all_is_there(job, out)
    comes_to_its_end(job, out)


def kill(trial):
    """killed before a system call on the run directory"""
    return one_call(trial, "signal=SIGKILL")


def fail(trial):
    """a system call on the run directory fails (EIO, ENOSPC, EMFILE, EDQUOT)"""
    return one_call(trial, "error=" + trial.moments.choice(["EIO", "ENOSPC", "EMFILE", "EDQUOT"]))


def order(trial):
    """the order of the calls that make a file durable"""
    job, out, steps = JOBS[trial.number % 3], trial.out, ""
    half_done(job, out)
    code, _, said, lines = traced(job, out, "-e", "trace=fsync,fdatasync,rename,renameat,renameat2")
    assert code == 0, f"ended with {code}: {said[-300:]}"
    for line in lines:
        line = line.replace("<unfinished ...>", "")     # another thread came between
        match = re.match(r"\d+ +f?(?:data)?(sync|rename)\w*\((.*)", line)
        if match and not re.search("PROGRESS.txt| = -1 ", line):
            place = re.findall(r"[<\"]([^<>\"]+)[>\"]", match[2])[-1]
            kind = ("record" if place.endswith("jsonl") else "directory" if place == str(out)
                    else "checkpoint" if "checkpoint_" in place else "file")
            steps += f"{match[1]} {kind}, "
    right = ("sync checkpoint, sync record, rename checkpoint, sync directory, |"
             "sync file, rename file, sync directory, ")
    assert "rename" in steps and not re.sub(right, "", steps), f"{steps} must be all of {right}"


# -- Power cuts: what the file system has not written is thrown away

# EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN; 2 drops the journal too, 1 flushes it and drops the data
SHUTDOWN = 0x8004587D
FILE_SYSTEMS = [("mkfs.ext4", "32M", "loop"), ("mkfs.ext4", "32M", "loop,noauto_da_alloc"),
                ("mkfs.xfs", "320M", "loop")]


@functools.cache
def made_disk(place, make, size, options, atexit):
    """The command that mounts it."""
    mount = f"mount -o {options} '{place}.image' '{place}'"
    made = subprocess.run(["sh", "-ec", f"mkdir '{place}'; truncate -s {size} '{place}.image'; "
                           f"{make} -q '{place}.image'; {mount}"], stderr=subprocess.PIPE)
    need(made.returncode == 0, f"{make} and a loop device ({made.stderr.decode().strip()})")
    atexit.callback(subprocess.run, ["umount", "-l", place])
    return mount


def results_job(out, total):
    """Results with nothing after them, whose own sync would hide that one is missing."""
    out.mkdir()
    for number in range(total):
        checkpointing.write_atomic(out / f"{number}.json", content_of(number))
        print(f"saved {number}", flush=True)
        time.sleep(0.005)


def power(trial):
    """the power is cut at a random moment (ext4 and xfs, two kinds of shutdown)"""
    job, kind = (pieces_job, results_job, state_job)[trial.number % 3], trial.number // 3 % 3
    place, moment = trial.work / f"disk{kind}", trial.moments.uniform(0, 0.12)
    flag, out = trial.moments.choice([1, 2]), place / f"{trial.number}"
    trial.story += [str(FILE_SYSTEMS[kind]), job.__name__, f"shutdown {flag} {moment:.4f} s later"]
    mount = made_disk(place, *FILE_SYSTEMS[kind], trial.atexit)
    with Child(job, out, 10**6) as process:
        process.wait(process.reported)
        time.sleep(moment)
        reported = process.reported()   # before the cut; afterwards xfs says yes to anything
        assert process.code is None, f"ended with {process.code}: {process.said()[-300:]}"
        descriptor = os.open(out, os.O_RDONLY)
        fcntl.ioctl(descriptor, SHUTDOWN, flag.to_bytes(4, sys.byteorder))
        os.close(descriptor)
    again = f"until umount '{place}' 2> /dev/null; do sleep 0.01; done; {mount}"
    subprocess.run(["sh", "-ec", again], check=True, timeout=HANG)
    if job is results_job:
        for number in reported:
            whole(out / f"{number}.json", number)
    else:
        nothing_is_lost(job, out, reported[-2:])
        with Child(job, out, 10**6) as process:
            process.wait(process.reported)
            assert process.reported()[:1] > reported[-1:], f"not from there: {process.said()[-99:]}"
    assert verified(out), "verify finds something bad"
    shutil.rmtree(out)


# -- Rot: bits that flip, sectors that turn to zero, ends that are cut off, in any file there is

def damage(path, moments):
    """Change some bytes. Returns what was done."""
    data = path.read_bytes()
    at, kind = moments.randrange(len(data)), moments.choice(["bit"] * 3 + ["zeros", "cut", "more"])
    flipped = bytes([data[at] ^ 1 << moments.randrange(8)])
    zeros = bytes(len(data[at:at + 512]))
    bad = {"bit": data[:at] + flipped + data[at + 1:], "zeros": data[:at] + zeros + data[at + 512:],
           "cut": data[:at], "more": data + flipped}[kind]
    path.write_bytes(bad)
    return f"{kind} at {at} of {path.name}" if bad != data else damage(path, moments)


@functools.cache
def finished(work, job):
    """A directory in which the job has come to its end."""
    ends(job, work / job.__name__)
    return work / job.__name__


def rot(trial):
    """a bit flipped, a sector zeroed, an end cut off, in any file of a run"""
    job, out = JOBS[trial.number % 3], trial.out
    shutil.copytree(finished(trial.work, job), out)
    keep = {path.name: path.read_bytes() for path in out.iterdir()}
    name = trial.moments.choice(sorted(name for name in keep if keep[name]))
    trial.story += [job.__name__, damage(out / name, trial.moments)]
    assert not (name.startswith("checkpoint_") and verified(out)), "verify calls it whole"
    # The same command again gives the very bytes back, or says why not and changes nothing.
    code, said = ends(job, out, codes=(0, 1, 2))
    if code:
        # all records gone: nothing vouches for a state
        all_bad = name == "checkpoints.jsonl" and "no checkpoint is good" in said
        assert name in said and (all_bad or name == "run.json"), f"ended with {code}: {said[-300:]}"
        changed = [other for other in keep.keys() - {name, "PROGRESS.txt", ".lock"}
                   if (out / other).read_bytes() != keep[other]]
        assert not changed, f"refused, and yet changed {changed}"
    elif job is pieces_job:
        for name in [name for name in keep if name.startswith("checkpoint_")]:
            # not made again, or altered and used
            assert (out / name).read_bytes() == keep[name], f"{name} is another one"
    else:   # of states, the newest alone is the result
        whole(index(out)[60], 60)


def unloadable(trial):
    """a state that was written and cannot be loaded: after the first step, not at the restart"""
    state = "type('Any', (), {'__reduce__': lambda self: (int, ('not a number',))})()"
    _, said = ends(program_job, trial.out, state, codes=(1,))
    assert "cannot be loaded again" in said and said.count("saved 0") == 1, said[-300:]
    assert not index(trial.out), "it was kept"
    comes_to_its_end(program_job, trial.out)


# -- Several starts at once, signals, and histories

def starts(trial):
    """started several times at once"""
    number = trial.moments.randint(2, 8)
    trial.story += [f"{number} at once"]
    with contextlib.ExitStack() as stack:
        gate = os.pipe()
        processes = [stack.enter_context(Child(state_job, trial.out, gate=gate))
                     for _ in range(number)]
        os.close(gate[0])
        os.close(gate[1])   # the word go, for all of them
        codes = sorted(process.wait() for process in processes)
        saves = sorted(number for process in processes for number in process.reported())
    assert codes[0] == 0 and set(codes) <= {0, 75}, f"exit codes {codes}"
    assert saves == sorted(set(saves)), f"work was done twice: {saves}"
    comes_to_its_end(state_job, trial.out)


def moved(trial):
    """its directory was moved away, and another run stands there"""
    out, new, replaced = trial.out, trial.work / f"new {trial.number}", trial.number % 2
    if replaced:        # else nothing stands there
        ends(state_job, new)
    with Child(state_job, out, 10**6) as process:
        process.wait(process.reported)
        os.rename(out, trial.work / f"old {trial.number}")
        if replaced:
            os.rename(new, out)
        last = process.reported()[-1]
        process.wait(lambda: process.reported()[-1] > last + 100)
        code, said = process.code, process.said()
    assert code == 1 and "moved or replaced" in said, f"it ended with {code}: {said[-300:]}"
    one_line(said)
    assert replaced or not out.exists(), f"it made {os.listdir(out)} in its place"
    assert f"\nPID: {process.pid}\n" not in nothing_is_lost(state_job, out), "another PROGRESS.txt"
    comes_to_its_end(state_job, out)


def signals(trial):
    """stopped by SIGINT, SIGTERM or SIGHUP, once or twice, or killed; with a block and without"""
    job, *more = [(state_job,), (state_job, 60, STOPS), (true_program,)][trial.number % 3]
    trial.story += [f"{job.__name__} {more}"]
    out, moments = trial.out, trial.moments
    for _ in range(moments.randint(1, 6)):
        number = moments.choice([*STOPS, signal.SIGKILL])
        times, late = moments.choice([1, 1, 2]), moments.random() < 0.4
        moment = moments.uniform(0, 0.04)
        trial.story += [f"{number.name} * {times} {moment:.4f} s after "
                        f"{'its last save' if late else 'it began'}"]
        with Child(job, out, *more) as process:
            process.wait(lambda: 60 in process.reported() or not late and process.said())
            time.sleep(moment)
            for _ in range(times):
                process.send(number)
            code, reported, said = process.wait(), process.reported(), process.said()
        assert code in (0, -number, 128 + number), f"ended with {code}: {said[-300:]}"
        text = nothing_is_lost(job, out, reported)
        if number != signal.SIGKILL and times == 1 and min(reported, default=60) < 60:
            assert re.search("Status: (INTERRUPTED|COMPLETE)", text), f"it says {text[:100]!r}"
        if number != signal.SIGKILL and (number != signal.SIGINT or STOPS in more):
            one_line(said)
            done = re.search(r"^Progress: (\d+)/", text, re.M)
            assert not done or int(done[1]) == max(index(out), default=0), (
                f"{done and done[1]} steps were done, saved are {[*index(out)]}")
    comes_to_its_end(job, out)


def histories(trial):
    """random histories of run, kill, stop, rot, loss, other --every, shards, extension, restart"""
    moments, out = trial.moments, trial.out
    shards, n = moments.choice([0, 0, 2, 3]), moments.choice([400, 700, 1000])
    parts = [("--shard", f"{i}/{shards}") for i in range(1, shards + 1)] or [()]
    acts = moments.choices(["kill", "stop", "finish", "rot", "lose", "extend"], [2, 1, 1, 1, 1, 1],
                           k=moments.randint(3, 9))
    for act, part in [*((act, moments.choice(parts)) for act in acts),
                      *(("finish", part) for part in parts)]:
        place = out / f"shard_{part[1].replace('/', '_of_')}" if part else out
        files, every = [*index(place).values()], moments.choice([30, 100, 250])
        trial.story += [f"{act} {' '.join(part)} --n {n} --every {every}"]
        if act == "rot" and len(files) > 1:     # one stays good, or it says that all are bad
            trial.story += [damage(moments.choice(files[1:]), moments)]
        elif act == "lose" and len(files) > 1:
            lost = moments.choice([*files[1:], place / "PROGRESS.txt", place / ".lock"])
            lost.unlink(missing_ok=True)
            trial.story += [lost.name]
        elif act == "extend" and not shards:
            n += 300
        elif act == "finish":
            ends(generate_job, out, n, every, *part)
        elif act in ("kill", "stop"):
            with Child(generate_job, out, n, every, *part) as process:
                time.sleep(moments.uniform(0, 0.08))
                process.send(signal.SIGKILL if act == "kill" else signal.SIGTERM)
                assert process.wait() in (0, -9, -15, 143), f"{process.code}: {process.said()}"
                one_line(process.said())
    calm = trial.work / f"undisturbed {n}"
    if not calm.exists():
        ends(generate_job, calm, n)
        ends(merge_job, calm)
    ends(merge_job, out)
    assert (out / "dataset.npz").read_bytes() == (calm / "dataset.npz").read_bytes(), (
        "other bytes than those of an undisturbed run")
    assert verified(out), "verify finds something bad"


# Each with its share of the time.
PARTS = {order: 1, kill: 12, fail: 28, power: 20, rot: 12, unloadable: 1, starts: 4, moved: 2,
         signals: 8, histories: 17}


def prove(part, seconds):
    """(trials, losses) of one part; says each loss."""
    count, losses, end = 0, 0, time.monotonic() + seconds
    moments = random.Random(f"{part.__name__} {arguments.seed}")
    with tempfile.TemporaryDirectory(prefix="prove-") as work, contextlib.ExitStack() as stack:
        for number in range(10**9):
            trial = argparse.Namespace(work=Path(work), out=Path(work, f"trial {number}"),
                                       number=number, moments=moments, story=[], atexit=stack)
            try:
                count += part(trial) is not False
            except Exception as broken:
                count, losses = count + 1, losses + 1
                print(f"LOST in {part.__name__} (--part {part.__name__} --seed {arguments.seed}): "
                      f"{'; '.join(trial.story)}: {broken!r}", file=sys.stderr, flush=True)
            shutil.rmtree(trial.out, ignore_errors=True)
            if losses and arguments.first or count >= 3 and time.monotonic() > end:
                return count, losses


def main():
    parts = [part for part in PARTS if arguments.part in (None, part.__name__)]
    need(parts, f"--part of {', '.join(part.__name__ for part in PARTS)}")
    need(shutil.which("strace"), "strace")
    print("| what was broken | how often | losses |\n|---|---|---|", flush=True)
    counts = []
    for part in parts:
        seconds = arguments.minutes * 60 * PARTS[part] / sum(PARTS[part] for part in parts)
        counts.append(prove(part, seconds))
        print(f"| {part.__doc__} | {counts[-1][0]:,} | {counts[-1][1]} |", flush=True)
    trials, losses = map(sum, zip(*counts))
    print(f"| **all** | **{trials:,}** | **{losses}** |")
    return 1 if losses else 0


if __name__ == "__main__":
    raise SystemExit(main())
