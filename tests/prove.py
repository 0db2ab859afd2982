"""Break the machine under the library, again and again, and count what is lost.

    python tests/prove.py --minutes 20                      # all parts; the table of the README
    python tests/prove.py --part power --seconds 30         # one part
    python tests/prove.py --part kill --seconds 5 --seed 7  # shorter, with other moments

Real processes, real signals, real file systems. A trial is lost if work that was reported as saved
is gone, a file under its final name is not the one that was written, a restart does not end with
the bytes of an undisturbed run, something is left behind, a process hangs, or an error is not one
line. Prints a line for each lost trial, and how to repeat it; exit code 0 if none was lost, 1
otherwise, 3 if a tool is missing. Linux with strace; power cuts need root. --code DIR tests the
copy of checkpointing.py, generate.py and merge.py in another directory.
"""
import argparse
import contextlib
import ctypes
import fcntl
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--minutes", type=float, default=20, help="time for all parts (default 20)")
parser.add_argument("--seconds", type=float, help="time for each part instead")
parser.add_argument("--part", action="append",
                    help="only this part: order, kill, fail, power, rot, starts, signals or "
                    "histories; may be given again")
parser.add_argument("--seed", type=int, default=1, help="other moments and places (default 1)")
parser.add_argument("--first", action="store_true", help="stop at the first loss")
parser.add_argument("--code", default=Path(__file__).resolve().parent.parent,
                    help="where checkpointing.py is")
arguments = parser.parse_args() if __name__ == "__main__" else parser.parse_args([])

os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")   # we fork: no threads of NumPy's
sys.path.insert(0, str(Path(arguments.code).resolve()))
import checkpointing  # noqa: E402
import generate  # noqa: E402
import merge  # noqa: E402

for stage in (generate, merge):   # drawing the page took most of the time; it is no checkpoint
    stage.report.refresh = lambda *_, **__: None
HANG = 30   # seconds after which a process counts as hanging


class Lost(Exception):
    """A promise was broken; what, in one line."""


class ToolMissing(Exception):
    """This part cannot be tried here."""


def must(condition, what):
    if not condition:
        raise Lost(what)


# --------------------------------------------------------------------------------------------------
# The jobs that are broken, each in a process of its own. ack(n) reports what is saved, as a log or
# a person would see it.

def content_of(start, stop):
    """What a piece holds: a few pages, so that half of it can be missing."""
    return "".join(f"{i} {i * i}\n" for i in range(start, stop)) * 200


def pieces_job(out, ack, total=40):
    with checkpointing.Run(out, total, every=10, suffix=".txt", heartbeat=0.03,
                           settings={"seed": 1}) as run:
        for piece in run.pieces():
            list(piece)
            piece.save(content_of(piece.start, piece.done))
            ack(piece.start)


def state_of(number):
    return {"sum": sum(i * i for i in range(number)), "number": number, "padding": "x" * 9000}


def state_job(out, ack, total=60):
    """A state with retention: the oldest of three checkpoints is removed after each save."""
    with checkpointing.Run(out, total, every=10, suffix=".json", heartbeat=0.03, keep=2,
                           settings={"seed": 1}) as run:
        state = run.load(json.load, default=state_of(0))
        saved = run.durable
        for i in run.steps(lambda file: file.write(json.dumps(state).encode())):
            if run.durable > saved:
                saved = run.durable
                ack(saved)
            state.update(sum=state["sum"] + i * i, number=i + 1)
        if run.durable > saved:
            ack(run.durable)


def stubborn_job(out, ack):
    """A loop of its own, in which a save that failed is tried again."""
    with checkpointing.Run(out, 60, suffix=".json", heartbeat=0.03, keep=2,
                           settings={"seed": 1}) as run:
        run.load(json.load)
        run.begin()
        while run.done < run.total:
            run.update(run.done + 1)
            if run.done % 10 == 0 or run.due():
                data = json.dumps(state_of(run.done))
                try:
                    run.save(run.done, data)
                except checkpointing.CheckpointError:
                    run.save(run.done, data)
                ack(run.done)
                run.leave_if_asked()


def merge_job(out, ack):
    sys.argv = ["merge.py", str(out), "--out", str(out / "dataset.npz")]
    merge.main()
    ack(1)


def generate_job(*options, ack):
    sys.argv = ["generate.py", *map(str, options)]
    generate.main()


class Child:
    """A job in a forked process: like a new one, without the time that Python takes to start."""

    def __init__(self, job, *job_arguments, gate=None):
        self.job, self.log = job, tempfile.TemporaryFile()
        self.acks, write = os.pipe()
        os.set_blocking(self.acks, False)
        self.acked = b""
        stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # Not before the child is one that can die of them.
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.dup2(self.log.fileno(), 1)
                os.dup2(self.log.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
                for number in stops:
                    signal.signal(number, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
                if gate:
                    # PR_SET_PTRACER, any: so that strace may attach without being root
                    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
                    os.close(gate[1])
                    os.read(gate[0], 1)
                job(*job_arguments, ack=lambda number: os.write(write, b"%d\n" % number))
                sys.stdout.flush()
                code = 0
            except SystemExit as leaving:
                code = leaving.code or 0
            except BaseException as error:
                traceback.print_exc()
                code = 130 if isinstance(error, KeyboardInterrupt) else 1
            finally:
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
        os.close(write)
        self.code = None

    def poll(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self):
        """Its exit code, minus the signal's number if one killed it."""
        end = time.monotonic() + HANG
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise Lost(f"{self.job.__name__} hangs")
            time.sleep(0.001)
        return self.code

    def send(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send(signal.SIGKILL)
        self.wait_quietly()

    def wait_quietly(self):
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def reported(self):
        """The numbers that it has reported as saved until now."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.acks, 65536):
                self.acked += data
        return [int(line) for line in self.acked.split(b"\n")[:-1]]

    def said(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def close(self):
        if self.code is None:
            self.kill()
        os.close(self.acks)
        self.log.close()


@contextlib.contextmanager
def child(job, *job_arguments, gate=None):
    process = Child(job, *job_arguments, gate=gate)
    try:
        yield process
    finally:
        process.close()


def finish(job, *job_arguments):
    """Run it undisturbed; it must end with 0. Returns what it said."""
    with child(job, *job_arguments) as process:
        code = process.wait()
        must(code == 0, f"the restart ended with {code}: {process.said()[-300:]}")
        return process.said()


# --------------------------------------------------------------------------------------------------
# What must hold, whatever happened

def whole(path, number):
    """The file under a final name is the one that was written."""
    data = path.read_text()
    state = path.suffix == ".json"
    right = json.dumps(state_of(number)) if state else content_of(number, number + 10)
    must(data == right, f"{path.name} is not what was written ({len(data)} of {len(right)} bytes)")


def nothing_saved_is_gone(job, out, acked):
    there = checkpointing.find_checkpoints(out)
    for number, path in there:
        whole(path, number)
    numbers = [number for number, _ in there]
    if job is pieces_job:
        must(set(acked) <= set(numbers), f"reported as saved: {acked}, there: {numbers}")
    elif acked:
        must(numbers and numbers[-1] >= acked[-1],
             f"reported as saved: {acked[-1]}, there: {numbers}")


def all_done(job, out):
    """All the work is there, and it verifies."""
    numbers = [number for number, _ in checkpointing.find_checkpoints(out)]
    # Killed between the last save and the removal of what is older, a state leaves one more than it
    # keeps.
    right = [[0, 10, 20, 30]] if job is pieces_job else [[50, 60], [40, 50, 60]]
    must(numbers in right, f"not all is there: {numbers}")
    nothing_saved_is_gone(job, out, [])
    must(verified(out), "verify finds something bad")


def says_complete(out):
    status = checkpointing.read_progress(out / "PROGRESS.txt").get("Status")
    must(status == "COMPLETE", f"PROGRESS.txt says {status}")


def no_stack_trace(said):
    if "Traceback" in said:
        at = [line.strip().partition(" line ")[2] for line in said.splitlines()
              if re.search("(checkpointing|merge|generate).py", line)]
        raise Lost(f"a stack trace: {said.strip().splitlines()[-1]} (line {'; '.join(at[-3:])})")


def nothing_left_behind(out):
    left = [name for name in os.listdir(out) if name.endswith((".tmp", ".corrupt"))]
    must(not left, f"left behind: {left}")


def verified(*directories):
    with contextlib.redirect_stdout(io.StringIO()):
        return checkpointing.verify(list(map(str, directories))) == 0


def progress_is_whole(out):
    path = out / "PROGRESS.txt"
    if path.exists():
        text = path.read_text()
        must(re.search(r"^Status: (RUNNING|STALLED|INTERRUPTED|FAILED|COMPLETE)$", text, re.M)
             and re.search(r"^Host: .*\n\Z", text, re.M), "PROGRESS.txt is not whole")


# --------------------------------------------------------------------------------------------------
# System calls: killed before, or failing. The job is half done already, so that reading back is hit
# as well as saving.

def half_done(job, out):
    """A directory in which another start has done a part of the work."""
    if job is merge_job:
        out.mkdir()
        finish(generate_job, "--n", 40, "--every", 10, "--out", out)
        return
    def killed_after_two(ack):
        reports = []

        def report(number):
            reports.append(number)
            if len(reports) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        job(out, report)
    with child(killed_after_two) as process:
        must(process.wait() == -signal.SIGKILL, f"half done: {process.said()[-300:]}")


def traced(job, out, *options):
    """(exit code, what it reported, what it said, lines of strace) of the job under strace."""
    trace = out.parent / "trace"
    gate = os.pipe()
    with child(job, out, gate=gate) as process:
        os.close(gate[0])
        command = ["strace", "-f", "-y", "-qq", "-s", "0", "-o", trace, "-p", str(process.pid),
                   *options]
        # Attached, not started by strace: it counts the calls of each thread from here on, so no
        # call of Python's start is hit in place of one of ours.
        strace = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
        end = time.monotonic() + HANG
        status = Path(f"/proc/{process.pid}/status")
        while "TracerPid:\t0\n" in status.read_text() and time.monotonic() < end:
            if strace.poll() is not None:
                raise ToolMissing("strace cannot attach here")
            time.sleep(0.001)
        time.sleep(0.002)
        os.close(gate[1])
        try:
            code = process.wait()
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                strace.wait(5)
            strace.kill()
            strace.wait()
        lines = trace.read_text(errors="replace").splitlines()
        return code, process.reported(), process.said(), lines


def calls_of(job, base, work):
    """[(call, how many-th of its kind in its thread, line)] that touch the run directory."""
    out = work / "dry"
    shutil.copytree(base, out)
    _, _, _, lines = traced(job, out, "-e", "trace=%file,%desc")
    shutil.rmtree(out)
    counts, found = {}, []
    for line in lines:
        match = re.match(r"(\d+) +(\w+)\(", line)
        if match:
            counts[match.groups()] = counts.get(match.groups(), 0) + 1
            if str(out) in line:
                found.append((match[2], counts[match.groups()], line))
    # Threads count for themselves: their first openat is hit together with the main thread's first.
    return sorted({(call, when): (call, when, line) for call, when, line in found}.values())


JOBS = {pieces_job: "checkpoint", state_job: "state with retention",
        stubborn_job: "save tried again", merge_job: "merge"}


def system_calls(work, moments, deadline, errors):
    """Trials for each call of each job: an error None kills, another is what the call returns."""
    plans = []
    for job in JOBS:
        base = work / f"base {JOBS[job]}"
        half_done(job, base)
        # lseek never reaches the disk, and cannot fail on a file.
        plan = [(job, base, call, when, error, line)
                for call, when, line in calls_of(job, base, work) for error in errors
                if not error or call != "lseek"]
        must(len(plan) >= 20, f"{JOBS[job]}: only {len(plan)} calls seen; does strace work?")
        plans += plan
    moments.shuffle(plans)
    undisturbed = work / "undisturbed"
    shutil.copytree(work / "base merge", undisturbed)
    finish(merge_job, undisturbed)
    for trial, (job, base, call, when, error, line) in enumerate(plans):
        if time.monotonic() > deadline:
            break
        out = work / str(trial)
        shutil.copytree(base, out)
        before = [number for number, _ in checkpointing.find_checkpoints(out)]
        what = "PROGRESS.txt" if "PROGRESS.txt" in line else JOBS[job]
        lost = None
        inject = f"inject={call}:{f'error={error}' if error else 'signal=SIGKILL'}:when={when}"
        try:
            code, acked, said, lines = traced(job, out, "-e", f"trace={call}", "-e", inject)
            if not (code == -9 or any("INJECTED" in line for line in lines)):
                continue   # that call did not come this time: no trial
            progress_is_whole(out)
            if error:
                must(code in (0, 1), f"ended with {code}: {said[-300:]}")
                no_stack_trace(said)
            if job is merge_job:
                merged_whole(out, undisturbed, code == 0)
            else:
                kept = before if job is pieces_job else before[-1:]
                nothing_saved_is_gone(job, out, kept + acked)
                if code == 0:
                    all_done(job, out)
            finish(job, out)
            if job is merge_job:
                merged_whole(out, undisturbed, True)
            else:
                all_done(job, out)
                says_complete(out)
            nothing_left_behind(out)
        except Lost as broken:
            lost = f"{JOBS[job]}, {inject}: {broken} | {line[:200]}"
        yield what, lost
        shutil.rmtree(out)


def merged_whole(out, undisturbed, must_exist):
    path = out / "dataset.npz"
    must(path.exists() or not must_exist, "merge ended with 0 and there is no data set")
    if path.exists():
        must(path.read_bytes() == (undisturbed / "dataset.npz").read_bytes(),
             "the data set is not that of all samples")
    for number, checkpoint in checkpointing.find_checkpoints(undisturbed):
        must((out / checkpoint.name).read_bytes() == checkpoint.read_bytes(),
             f"merge has changed {checkpoint.name}")


def kill(work, moments, deadline):
    """killed before a system call on the run directory"""
    return system_calls(work, moments, deadline, [None])


def fail(work, moments, deadline):
    """a system call on the run directory fails (EIO, ENOSPC, EMFILE, EDQUOT)"""
    return system_calls(work, moments, deadline, ["EIO", "ENOSPC", "EMFILE", "EDQUOT"])


def order(work, moments, deadline):
    """the order of the calls that make a file durable"""
    for job in (pieces_job, state_job, merge_job):
        base = work / f"order {JOBS[job]}"
        half_done(job, base)
        code, _, said, lines = traced(job, base, "-e",
                                      "trace=fsync,fdatasync,rename,renameat,renameat2")
        lost, steps = None, []
        for line in lines:
            line = line.replace("<unfinished ...>", "")   # another thread came between
            match = re.match(r"\d+ +(fsync|fdatasync|rename\w*)\((.*)", line)
            if not match or re.search("PROGRESS.txt| = -1 ", line):
                continue
            names = re.findall(r"[<\"]([^<>\"]+)[>\"]", match[2])
            step, place = "sync" if "sync" in match[1] else "rename", names[-1]
            kind = ("record" if place.endswith("jsonl") else "directory" if place == str(base)
                    else "settings" if "run.json" in place else "file")
            steps.append(f"{step} {kind}")
        right = ["sync file", "sync record", "rename file", "sync directory"]
        if job is merge_job:
            right.remove("sync record")
        saves = [i for i, step in enumerate(steps) if step == "rename file"]
        try:
            must(code == 0, f"ended with {code}: {said[-300:]}")
            must(saves, f"no file was renamed into its place: {steps}")
            for i in saves:
                begin = i - right.index("rename file")
                must(begin >= 0 and steps[begin:begin + len(right)] == right,
                     f"{steps[max(0, begin):i + 2]}, not {right}")
        except Lost as broken:
            lost = f"{JOBS[job]}: {broken}"
        yield JOBS[job], lost


# --------------------------------------------------------------------------------------------------
# Power cuts: what the file system has not written is thrown away

# EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN; 2 drops the journal too, 1 flushes it and drops the data
SHUTDOWN = 0x8004587D
FILE_SYSTEMS = {"ext4": ("mkfs.ext4", 32 << 20, ""),
                "ext4 noauto_da_alloc": ("mkfs.ext4", 32 << 20, ",noauto_da_alloc"),
                "xfs": ("mkfs.xfs", 320 << 20, "")}


class Disk:
    def __init__(self, work, kind):
        make, size, self.options = FILE_SYSTEMS[kind]
        name = kind.replace(" ", "_")
        self.image, self.path = work / f"{name}.image", work / f"{name}.disk"
        self.path.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(size)
        if not shutil.which(make):
            raise ToolMissing(f"{make} is not here")
        subprocess.run([make, "-q", self.image], check=True)
        try:
            self.mount()
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode().strip()
            raise ToolMissing(f"a loop device is needed ({said})") from None

    def mount(self):
        subprocess.run(["mount", "-o", "loop" + self.options, self.image, self.path], check=True,
                       capture_output=True)

    def unmount(self):
        end = time.monotonic() + HANG
        while subprocess.run(["umount", self.path], capture_output=True).returncode:
            must(time.monotonic() < end, "cannot unmount")
            time.sleep(0.01)

    def cut_power(self, flag):
        descriptor = os.open(self.path, os.O_RDONLY)
        fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", flag))
        os.close(descriptor)


def endless_pieces(out, ack):
    pieces_job(out, ack, total=10**6)


def endless_state(out, ack):
    state_job(out, ack, total=10**6)


def endless_merges(out, ack):
    """Merge again and again, each time to a new name in the same directory."""
    for number in range(10**6):
        sys.argv = ["merge.py", str(out.parent.parent / "merge source"), "--out",
                    str(out / f"dataset_{number}.npz")]
        out.mkdir(exist_ok=True)
        merge.main()
        ack(number)


def endless_results(out, ack):
    """Results with nothing after them, whose own sync would hide that one is missing."""
    out.mkdir(exist_ok=True)
    for number in range(10**6):
        checkpointing.write_sealed(out / f"metrics_{number}.json", json.dumps({"number": number}))
        ack(number)
        time.sleep(0.005)


def careless(out, ack):
    """The control: written and renamed, as most people do it, without a sync."""
    out.mkdir()
    for number in range(10**6):
        (out / "temp").write_text(content_of(number, number + 10))
        os.rename(out / "temp", out / f"checkpoint_{number}.txt")
        ack(number)
        time.sleep(0.002)


ENDLESS = [endless_pieces, endless_results, endless_state, endless_merges]


def power(work, moments, deadline):
    """the power is cut at a random moment (two kinds of shutdown)"""
    if os.geteuid():
        raise ToolMissing("root (for mount) is needed")
    source = work / "merge source"
    finish(generate_job, "--n", 400, "--every", 100, "--out", source)
    finish(merge_job, source)
    control_lost, disks = 0, {}
    try:
        for kind in FILE_SYSTEMS:
            disks[kind] = Disk(work, kind)
        trial = 0
        while time.monotonic() < deadline or trial < 8 * len(disks):
            kind = list(disks)[trial % len(disks)]
            job = ENDLESS[trial // len(disks) % len(ENDLESS)]
            flag = 1 + trial // (len(ENDLESS) * len(disks)) % 2
            moment = moments.uniform(0, 0.12)
            trial += 1
            lost = None
            try:
                control_lost += one_cut(disks[kind], job, flag, moment, source)
            except Lost as broken:
                lost = (f"{kind}, shutdown {flag}, {job.__name__}, {moment:.4f} s after the first "
                        f"save: {broken}")
            yield kind, lost
    finally:
        for disk in disks.values():
            subprocess.run(["umount", "-l", disk.path], capture_output=True)
    if not control_lost:
        yield "control", "the control without sync lost nothing: these power cuts cut nothing"
    print(f"(a control without fsync, beside the job, lost files in {control_lost} of {trial} "
          "power cuts)", flush=True)


def one_cut(disk, job, flag, moment, source):
    """One power cut. Returns whether the control lost a file."""
    out, beside = disk.path / "run", disk.path / "careless"
    for left in (out, beside):   # by a trial that was lost
        shutil.rmtree(left, ignore_errors=True)
    with child(job, out) as process, child(careless, beside) as control:
        end = time.monotonic() + HANG
        while not process.reported() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(moment)
        must(process.poll() is None, f"ended with {process.code}: {process.said()[-300:]}")
        # What was reported before the cut; afterwards xfs says yes to anything.
        acked, careless_acked = process.reported(), control.reported()
        disk.cut_power(flag)
        process.kill()
        control.kill()
    disk.unmount()
    disk.mount()
    names = [beside / f"checkpoint_{number}.txt" for number in careless_acked]
    control_lost = any(not path.exists() or path.stat().st_size == 0 for path in names)
    if job is endless_results:
        for number in acked:
            path = out / f"metrics_{number}.json"
            must(path.exists(), f"{path.name} was reported as written and is gone")
            must(json.loads(path.read_bytes())["number"] == number, f"{path.name} is not whole")
    elif job is endless_merges:
        right = (source / "dataset.npz").read_bytes()
        for path in out.glob("dataset_*.npz"):
            must(path.read_bytes() == right,
                 f"{path.name} is not whole: {path.stat().st_size} bytes")
        for number in acked:
            must((out / f"dataset_{number}.npz").exists(),
                 f"dataset_{number}.npz was reported as written and is gone")
    else:
        nothing_saved_is_gone(pieces_job if job is endless_pieces else state_job, out, acked[-2:])
        with child(job, out) as process:   # it goes on, and leaves when asked
            end = time.monotonic() + HANG
            while not process.reported() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.001)
            process.send(signal.SIGTERM)
            code = process.wait()
            must(code == 143, f"the restart ended with {code}: {process.said()[-300:]}")
            must(process.reported()[0] > (acked[-1] if acked else -1),
                 "the restart did work again that was saved")
    must(verified(out), "verify finds something bad")
    if job in (endless_pieces, endless_state):   # there was a restart, which sweeps
        nothing_left_behind(out)
    for used in (out, beside):   # even its name may be lost with the control
        shutil.rmtree(used, ignore_errors=True)
    os.sync()
    return control_lost


# --------------------------------------------------------------------------------------------------
# Rot: bits that flip, sectors that turn to zero, ends that are cut off, in any file there is

def damaged(data, moments):
    """Other bytes than `data`; what was done to it."""
    at = moments.randrange(len(data))
    kind = moments.choice(["bit", "bit", "bit", "zeros", "cut", "longer"])
    if kind == "bit":
        bad = data[:at] + bytes([data[at] ^ 1 << moments.randrange(8)]) + data[at + 1:]
    elif kind == "zeros":
        bad = data[:at] + bytes(len(data[at:at + 512])) + data[at + 512:]
    else:
        bad = data[:at] if kind == "cut" else data + data[at:at + 1]
    return (bad, f"{kind} at {at}") if bad != data else damaged(data, moments)


LASTING, CHANGING = (".npz", ".pt", ".txt", ".json"), ("run.json", "PROGRESS.txt")


def rot(work, moments, deadline):
    """rot: a bit flipped, a sector zeroed, an end cut off"""
    jobs = {job: work / job.__name__ for job in (pieces_job, state_job)}
    for job, out in jobs.items():
        finish(job, out)
    data_set = work / "generate"
    again = ["--n", 120, "--every", 40, "--out", data_set]
    finish(generate_job, *again)
    finish(merge_job, data_set)
    model = io.BytesIO()
    with zipfile.ZipFile(model, "w") as archive:   # as torch.save makes them
        for name in ("data.pkl", "data/0", "data/1", "version"):
            archive.writestr(f"model/{name}", os.urandom(2000))
    (work / "results").mkdir()
    checkpointing.write_sealed(work / "results" / "best_model.pt", model.getvalue(), note="seed 1")
    checkpointing.write_sealed(work / "results" / "metrics.json",
                               json.dumps({"accuracy": 0.5, "table": [1, 2.5, None]}))

    places = [(directory, path) for directory in [*jobs.values(), data_set, work / "results"]
              for path in sorted(directory.iterdir()) if path.is_file() and path.stat().st_size]
    trial = 0
    while time.monotonic() < deadline or trial < 2 * len(places):
        directory, path = places[trial % len(places)]
        trial += 1
        keep = {p.name: p.read_bytes() for p in directory.iterdir()}
        bad, how = damaged(keep[path.name], moments)
        lost = None
        try:
            path.write_bytes(bad)
            if path.suffix in LASTING and path.name not in CHANGING:
                must(not verified(directory), "verify calls it whole")
            if directory == work / "results":
                continue
            restart_after_rot(directory, path, keep, jobs, again)
        except Lost as broken:
            lost = f"{directory.name}/{path.name}, {how}: {broken}"
        finally:
            for p in directory.iterdir():
                p.unlink()
            for name, data in keep.items():
                (directory / name).write_bytes(data)
            yield ("checkpoints" if path.name.startswith("checkpoint_") else path.name), lost


def restart_after_rot(directory, path, keep, jobs, again):
    """The same command again gives the very bytes back, or says why not and changes nothing."""
    job = next((job for job, place in jobs.items() if place == directory), None)
    for step in [job] if job else [lambda out, ack: generate_job(*again, ack=ack), merge_job]:
        with child(step, directory) as process:
            code, said = process.wait(), process.said()
        no_stack_trace(said)
        must(code in (0, 1, 2), f"ended with {code}: {said[-300:]}")
        if code:
            must(path.name in said, f"refused without naming {path.name}: {said[-300:]}")
            may = ("run.json", "dataset.npz")
            if "no checkpoint is good" in said:   # all records gone: nothing vouches for a state
                may = ("checkpoints.jsonl",)
            must(path.name in may, f"could not go on: {said[-300:]}")
            changed = [name for name, data in keep.items()
                       if name not in (path.name, "PROGRESS.txt", ".lock")
                       and (directory / name).read_bytes() != data]
            must(not changed, f"refused, and yet changed {changed}")
            return
    for name, right in keep.items():
        # A state checkpoint other than the newest is no result: it may be set aside, or stay as it
        # is and be seen later.
        old = job is state_job and name == min(n for n in keep if n.startswith("checkpoint_0"))
        if name.endswith(LASTING) and name not in CHANGING and not old:
            must((directory / name).exists(), f"{name} was not made again")
            must((directory / name).read_bytes() == right, f"{name} was altered and is used")


# --------------------------------------------------------------------------------------------------
# Several starts at once, signals, and histories

def logging_job(out, ack):
    """Every step is noted as it is done, so that work done twice shows."""
    with checkpointing.Run(out, 100, every=10, suffix=".json", heartbeat=0.03, keep=2) as run:
        state = run.load(json.load, default=[])
        for i in run.steps(lambda file: file.write(json.dumps(state).encode())):
            ack(i)
            time.sleep(0.001)
            state.append(i)


def logged_state(out):
    found = checkpointing.find_checkpoints(out)
    must(found, "nothing is saved")
    state = json.loads(found[-1][1].read_bytes())
    must(state == list(range(len(state))), "the state is wrong")
    return len(state)


def starts(work, moments, deadline):
    """started several times at once"""
    trial = 0
    while time.monotonic() < deadline or trial < 3:
        out, number = work / str(trial), moments.randint(2, 8)
        trial += 1
        lost = None
        with contextlib.ExitStack() as stack:
            gate = os.pipe()
            processes = [stack.enter_context(child(logging_job, out, gate=gate))
                         for _ in range(number)]
            os.close(gate[0])
            os.close(gate[1])   # the word go, for all of them
            try:
                codes = sorted(process.wait() for process in processes)
                steps = [i for process in processes for i in process.reported()]
                must(sorted(steps) == list(range(100)), f"{len(steps)} steps were done, of 100")
                must(codes[0] == 0 and set(codes) <= {0, 75}, f"exit codes {codes}")
                must(logged_state(out) == 100, "not complete")
            except Lost as broken:
                lost = f"{number} at once: {broken}"
        yield "state", lost


def signals(work, moments, deadline):
    """stopped by SIGINT, SIGTERM or SIGHUP, once or twice, or killed"""
    trial = 0
    while time.monotonic() < deadline or trial < 12:
        out = work / str(trial)
        trial += 1
        lost, steps, story = None, [], []
        try:
            code = None
            while code != 0:
                number = moments.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP,
                                         signal.SIGKILL])
                moment, twice = moments.uniform(0, 0.1), moments.random() < 0.3
                story.append(f"{number.name}{' twice' * twice} after {moment:.4f} s")
                with child(logging_job, out) as process:
                    time.sleep(moment)
                    process.send(number)
                    if twice:
                        process.send(number)
                    code = process.wait()
                    done, said = process.reported(), process.said()
                steps += done
                must(code in (0, -number, 128 + number), f"ended with {code}: {said[-300:]}")
                if done and number != signal.SIGKILL:
                    if code == -number:   # after its last word: the signal is no longer caught
                        says_complete(out)
                    must(logged_state(out) == done[-1] + 1,
                         f"{done[-1] + 1} steps done, {logged_state(out)} saved")
                    no_stack_trace(said)
            must(logged_state(out) == 100 and set(steps) == set(range(100)), "not complete")
            nothing_left_behind(out)
        except Lost as broken:
            lost = f"{'; '.join(story)}: {broken}"
        yield "state", lost
        shutil.rmtree(out, ignore_errors=True)


def histories(work, moments, deadline):
    """random histories of run, kill, stop, rot, loss, other --every, shards, extension, restart"""
    known, trial = {}, 0
    while time.monotonic() < deadline or trial < 4:
        out = work / str(trial)
        trial += 1
        lost, story = None, []
        try:
            n = one_history(out, moments, story)
            if n not in known:
                calm = work / f"undisturbed {n}"
                finish(generate_job, "--n", n, "--out", calm)
                finish(merge_job, calm)
                known[n] = (calm / "dataset.npz").read_bytes()
            finish(merge_job, out)
            must((out / "dataset.npz").read_bytes() == known[n],
                 "other bytes than those of an undisturbed run")
            must(verified(out), "verify finds something bad")
        except Lost as broken:
            lost = f"{'; '.join(story)}: {broken}"
        yield "data set", lost
        shutil.rmtree(out, ignore_errors=True)


def one_history(out, moments, story):
    """Make a data set the hard way. Returns how many samples it has."""
    shards = moments.choice([0, 0, 2, 3])
    n = moments.choice([400, 700, 1000])
    parts = [("--shard", f"{i}/{shards}") for i in range(1, shards + 1)] or [()]
    for _ in range(moments.randint(3, 9)):
        act = moments.choice(["kill", "kill", "stop", "run", "rot", "lose", "extend"])
        part = moments.choice(parts)
        every = moments.choice([7, 30, 100, 250])
        place = out / f"shard_{part[1].replace('/', '_of_')}" if part else out
        files = [path for _, path in checkpointing.find_checkpoints(place)]
        if act in ("kill", "stop", "run"):
            story.append(f"{act} {' '.join(part)} --every {every} --n {n}")
            with child(generate_job, "--n", n, "--every", every, "--out", out, *part) as process:
                if act != "run":
                    time.sleep(moments.uniform(0, 0.08))
                    process.send(signal.SIGKILL if act == "kill" else signal.SIGTERM)
                code = process.wait()
                must(code in (0, -9, -15, 143) and "Traceback" not in process.said(),
                     f"ended with {code}: {process.said()[-300:]}")
        elif act == "rot" and len(files) >= 2:
            # of the last good one a run rightly says that nothing is left
            path = moments.choice(files)
            bad, how = damaged(path.read_bytes(), moments)
            story.append(f"rot {path.name} {how}")
            path.write_bytes(bad)
        elif act == "lose" and files:
            path = moments.choice([*files, place / "PROGRESS.txt", place / "checkpoints.jsonl",
                                   place / ".lock"])
            story.append(f"lose {path.name}")
            path.unlink(missing_ok=True)
        elif act == "extend" and not shards:
            n += 300
            story.append(f"extend to {n}")
    for part in parts:
        every = moments.choice([30, 100, 250])
        story.append(f"finish {' '.join(part)} --every {every} --n {n}")
        place = out / f"shard_{part[1].replace('/', '_of_')}" if part else out
        files = [path for _, path in checkpointing.find_checkpoints(place)]
        records = checkpointing.read_records(place)
        if files and all(checkpointing.problem_with(path, records.get(path.name))
                         for path in files):
            with child(generate_job, "--n", n, "--every", every, "--out", out, *part) as process:
                must(process.wait() == 1 and "no checkpoint is good" in process.said(),
                     "all are bad, and it started over")
            for path in files:
                path.unlink()   # as the message says
        finish(generate_job, "--n", n, "--every", every, "--out", out, *part)
    return n


# --------------------------------------------------------------------------------------------------

# Each with its share of the time.
PARTS = {order: 1, kill: 12, fail: 28, power: 20, rot: 12, starts: 4, signals: 6, histories: 17}
ON = {"data set": "generate.py and merge.py", "state": "state", "control": "control"}


def prove(part, seconds, seed):
    """{what: [trials, losses]} of one part; says each loss."""
    tally = {}
    with tempfile.TemporaryDirectory(prefix="prove-") as work:
        deadline = time.monotonic() + seconds
        for what, lost in part(Path(work), random.Random(f"{part.__name__} {seed}"), deadline):
            counts = tally.setdefault(what, [0, 0])
            counts[0] += 1
            if lost:
                counts[1] += 1
                print(f"LOST in {part.__name__} (--part {part.__name__} --seed {seed}): {lost}",
                      flush=True)
                if arguments.first:
                    break
    return tally


def main():
    parts = [part for part in PARTS if not arguments.part or part.__name__ in arguments.part]
    if len(parts) < len(set(arguments.part or [])):
        parser.error(f"--part must be of {', '.join(part.__name__ for part in PARTS)}")
    share = arguments.minutes * 60 / sum(PARTS[part] for part in parts)
    if not shutil.which("strace"):
        print("prove: strace is not here", file=sys.stderr)
        return 3
    print(f"seed {arguments.seed}", flush=True)
    rows, losses, all_trials = [], 0, 0
    for part in parts:
        began = time.monotonic()
        try:
            tally = prove(part, arguments.seconds or share * PARTS[part], arguments.seed)
        except ToolMissing as error:
            print(f"prove: {part.__name__}: {error}", file=sys.stderr)
            return 3
        trials, lost = (sum(counts[i] for counts in tally.values()) for i in (0, 1))
        losses, all_trials = losses + lost, all_trials + trials
        print(f"({part.__name__}: {trials} trials, {lost} lost, {time.monotonic() - began:.0f} s)",
              flush=True)
        on = ", ".join(f"{ON.get(what, what)}{f' {count}' if len(tally) > 1 else ''}"
                       for what, (count, _) in sorted(tally.items()))
        rows.append(f"| {part.__doc__} | {on} | {trials:,} | {lost} |")
    print("\n| what was broken | on what | how often | losses |\n|---|---|---|---|")
    print("\n".join(rows))
    print(f"| **all** | | **{all_trials:,}** | **{losses}** |")
    return 1 if losses else 0


if __name__ == "__main__":
    raise SystemExit(main())
