"""What people and pages ask of run directories. Any Python 3.9 on; also on copies, on a laptop.

    runs.py status [DIR ...]         what every run below is doing, and what to type to go on
    runs.py verify [DIR ...]         read every checkpoint and result below; 1 if one is bad
    runs.py keep DIR -- COMMAND ...  start COMMAND unless it is done, at work or stopped; for cron
    runs.py stop DIR                 stop the run in DIR, and keep from starting it again

DIR is `results` if none is given.
"""
import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import checkpointing
from checkpointing import WRONG_SETTINGS, CheckpointError, one_line, read_progress, tell


# ------------------------------------------------------------------------------------------------
# Is it alive?

def held(path):
    """Does a process hold this lock? None if there is no such file (a copy)."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return None


def state_of(directory):
    """(word, PROGRESS.txt as a dict). The one judge of "is it alive?".

    word: Status, but DEAD if it says RUNNING or STALLED and nobody holds the lock; STARTING if it
    says an end, or nothing yet, and somebody does; SILENT if there is no lock to ask (a copy) and
    no heartbeat for three intervals and a minute; UNREADABLE if there is no Status.
    """
    progress = read_progress(Path(directory) / "PROGRESS.txt")
    word, alive = progress.get("Status", "UNREADABLE"), held(Path(directory) / ".lock")
    if word not in ("RUNNING", "STALLED"):
        word = "STARTING" if alive else word
    elif alive is False:
        word = "DEAD"
    elif alive is None:
        age = time.time() - number_in(progress, "Heartbeat")
        word = "SILENT" if age > 3 * number_in(progress, "Interval", 30) + 60 else word
    return word, progress


def number_in(progress, key, default=0):
    with contextlib.suppress(ValueError, IndexError):
        return float(progress.get(key, "").split()[0])
    return default


# ------------------------------------------------------------------------------------------------
# status and verify

def directories(roots, quiet=False):
    """(directory, names of its files) of all below, links followed, each once; hidden ones are
    left out: a copy's half-finished files. What cannot be listed is named at the end."""
    seen, unreadable = set(), []
    for root in roots:
        if not os.path.isdir(root):
            raise CheckpointError(f"{root}: no such directory", WRONG_SETTINGS)
        for folder, below, names in os.walk(root, followlinks=True, onerror=unreadable.append):
            real = os.path.realpath(folder)
            below[:] = sorted(name for name in below if not name.startswith("."))
            if real in seen:
                below.clear()
            else:
                seen.add(real)
                yield Path(folder), sorted(names)
    for error in () if quiet else unreadable:    # such as a volume's lost+found
        tell(one_line(f"{error.filename}: cannot be listed ({error.strerror}); passed over"))


def status(roots):
    """A line for every run below: its state, how much is done and saved, what to type."""
    count = 0
    for directory, names in directories(roots):
        if "PROGRESS.txt" not in names:
            continue
        count += 1
        word, progress = state_of(directory)
        saved = progress.get("Checkpoint", "none").split()[0]
        line = [f"{directory}: {word}", progress.get("Progress", ""), f"{saved} saved"]
        if word in ("RUNNING", "STALLED", "SILENT", "STARTING"):
            age = max(0, time.time() - number_in(progress, "Heartbeat"))
            line += [progress.get("Rate", ""), f"ETA {progress.get('ETA', 'unknown')}",
                     f"heartbeat {checkpointing.duration(age)} ago"]
        elif word != "COMPLETE":
            line += [progress.get("Error", ""), f"go on with: {progress.get('Command', '?')}"]
        if "stop" in names:
            line.append(f"keep starts nothing here: rm {directory / 'stop'}")
        tell(one_line("  ".join(filter(None, line))))
    if not count:
        raise CheckpointError(f"no run (PROGRESS.txt) in or below {', '.join(roots)}")
    return 0


def verify(roots):
    """Read every checkpoint and result below. Returns 1 with the bad ones named, or 0."""
    good, bad = 0, 0
    for directory, names in directories(roots):
        # behind the listing: a record is durable before its checkpoint has its name
        records, there, problems = checkpointing.read_records(directory), set(names), []
        for name in names:
            problem = problem_of(directory / name, records.get(name))
            if problem:
                problems.append((name, problem))
            good += problem == ""
        word, progress = state_of(directory)
        lengths = {name: r["stop"] - r["start"] for name, r in records.items()}     # of a state: 0
        held_units = sum(length for name, length in lengths.items() if name in there)
        if word == "COMPLETE" and held_units < number_in(progress, "Checkpoint"):
            problems += [(name, "missing") for name, length in lengths.items()
                         if length and name not in there]
        for name, problem in problems:
            tell(one_line(f"BAD {directory / name}: {problem}"))
        bad += len(problems)
    tell(f"{good} files are whole, {bad} bad" if good or bad
         else f"no checkpoints in {', '.join(roots)}")
    return 1 if bad or not good else 0


def problem_of(path, record):
    """"" if a file is whole, what is wrong with it, or None if it is not ours to judge."""
    if path.name.startswith(".") or not path.is_file():
        return None
    try:
        if checkpointing.CHECKPOINT_NAME.fullmatch(path.name):
            return checkpointing.problem_with(path, record) if record else (
                f"it has no line in {checkpointing.RECORDS}")
        if path.suffix in (".npz", ".pt"):
            return problem_of_zip(path)
        if path.suffix == ".json":
            json.loads(path.read_bytes())
            return ""
    except (CheckpointError, OSError, ValueError, RecursionError, MemoryError) as error:
        # gone: let go of by a run at work
        return f"cannot be read ({error})" if path.exists() else None
    return None


def problem_of_zip(path):
    """Every member by its CRC-32, and the number of members by the archive's own count: a flipped
    byte in the directory can hide some."""
    try:
        with zipfile.ZipFile(path) as archive:
            members, broken = len(archive.infolist()), archive.testzip()
    except (OSError, MemoryError):
        raise
    except Exception as error:      # zipfile and its decompressors raise a dozen types
        return f"not a whole zip file ({error})"
    if broken:
        return f"{broken}: checksum differs"
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 66000))
        tail = file.read()
    end, large = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    count = int.from_bytes(tail[end + 10:end + 12], "little")
    if count == 0xFFFF and large >= 0:      # zip64
        count = int.from_bytes(tail[large + 32:large + 40], "little")
    return "" if members == count else f"{members} members, should be {count}"


# ------------------------------------------------------------------------------------------------
# keep and stop

def keep(directory, command):
    """Run the command unless it has ended with exit code 0 before, is at work, or was stopped.

    Exit code 0 is done, not COMPLETE: more may stand behind a run, such as the next stage.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    note = directory / ".kept"
    with open(directory / ".keep", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        text = shlex.join(command) + "\n"
        done = note.exists() and note.read_text(errors="replace") == text
        if done or (directory / "stop").exists() or held(directory / ".lock"):
            return 0
        child = subprocess.Popen(command, start_new_session=True)
        for number in checkpointing.ALL_SIGNALS:    # to the stage that works, not only to its shell
            signal.signal(number, lambda number, frame: os.killpg(child.pid, number))
        code = child.wait()
        if code == 0:
            checkpointing.write_atomic(note, text)
        return code if code >= 0 else 128 - code


def stop(directory):
    """Ask the processes that hold the locks to stop, and wait until they have saved and gone."""
    directory, asked, runs = Path(directory), set(), []
    working, stopfile = at_work(directory), directory / "stop"
    stopfile.touch()    # keep starts nothing from here on
    while True:
        # A job that has not taken its lock yet is asked by way of its keep; others not: the stage
        # that works is to save, not only the shell that waits for it.
        runs += [run for run in working if run not in runs]
        locks = [run / ".lock" for run in working] or [directory / ".keep"]
        if not any(held(lock) for lock in locks):
            break
        for pid in sorted(holders(locks) - asked):
            tell(f"{directory}: process {pid} is asked to stop")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            asked.add(pid)
        if not asked and held(locks[0]):
            raise CheckpointError(f"{locks[0]} is held by a process that cannot be seen from here: "
                                  "stop it where it runs, or as its user")
        time.sleep(0.2)
        working = at_work(directory)
    for run in runs:
        tell(one_line(f"{run}: stopped; saved: {state_of(run)[1].get('Checkpoint', 'none')}"))
    tell(f"keep starts nothing here until you type: rm {shlex.quote(str(stopfile))}")
    return 0


def at_work(directory):
    """The run directories in and below `directory` whose lock is held."""
    return [run for run, _ in directories([directory], quiet=True) if held(run / ".lock")]


def holders(locks):
    """PIDs that hold one of these locks, proved by the kernel: a PID in a file may be anybody's."""
    if not os.path.isdir("/proc/self/fdinfo"):      # macOS; -F a: how they have opened it
        text = subprocess.run(["lsof", "-F", "pa", "--", *locks], stdout=subprocess.PIPE,
                              text=True).stdout.split()
        return {int(p[1:]) for p, a in zip(text, text[1:]) if p[0] == "p" and a == "au"}
    there, found = [os.stat(lock) for lock in locks if os.path.exists(lock)], set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if any(os.path.samestat(os.stat(descriptor), lock) for lock in there):
                info = descriptor.parent.parent / "fdinfo" / descriptor.name
                if "FLOCK  ADVISORY  WRITE" in info.read_text():
                    found.add(int(descriptor.parts[2]))
    return found


def main(arguments):
    command, rest = (arguments or ["help"])[0], arguments[1:]
    with checkpointing.one_line_errors():
        if command in ("status", "verify"):
            return {"status": status, "verify": verify}[command](rest or ["results"])
        if command == "keep" and len(rest) > 2 and rest[1] == "--":
            return keep(rest[0], rest[2:])
        if command == "stop" and len(rest) == 1:
            return stop(rest[0])
    print(__doc__.strip(), file=sys.stdout if command in ("-h", "--help") else sys.stderr)
    return 0 if command in ("-h", "--help") else WRONG_SETTINGS


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
