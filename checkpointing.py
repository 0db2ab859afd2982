"""Long jobs that lose at most minutes of work: durable checkpoints, exact restarts, progress as a plain file.

    import json, checkpointing

    with checkpointing.Run("results", total=1000, every=100, suffix=".json") as run:
        values = run.load(json.load, default=[])
        for i in run.steps(lambda file: file.write(json.dumps(values).encode())):
            values.append(simulate(i))

Kill it at any moment and start it again: it goes on from the newest checkpoint that verifies.
`python checkpointing.py status DIR` says what every run below DIR is doing, `verify DIR` reads every checkpoint.

Promised, on a local Linux or macOS file system:
  1. A file appears under its final name whole or not at all, also after kill -9 or a power cut.
  2. What a restart reads was verified to the last byte. A bad file is set aside, never deleted; an older good one
     is used; if all are bad the run stops with an error instead of starting over.
  3. One writer a directory, by a kernel lock that dies with its process.
  4. An older checkpoint is removed only after the newer one was read back and verified. Nothing else is removed.
  5. PROGRESS.txt is one whole version at every moment, and says STALLED when it beats but the work does not move.
  6. Exit codes: 0 complete; 1 failed; 2 wrong settings; 75 directory in use; 129, 130, 143 stopped by SIGHUP,
     SIGINT, SIGTERM after saving what was done.
Not promised: anything on Windows (no fcntl); the lock and durability on network file systems, which may lie about
both; a disk that acknowledges a flush it did not do; checkpoints changed on purpose (checksums are not signatures).

Standard library only, Python 3.9 on. Copy this one file into your project.
"""
import argparse
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

FAILED, WRONG_SETTINGS, IN_USE = 1, 2, 75   # exit codes; 75 is EX_TEMPFAIL of sysexits.h: try again later
CHECKPOINT_NAME = re.compile(r"checkpoint_(\d+)(\.[A-Za-z0-9]+)")
TEMP_NAME = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


class CheckpointError(Exception):
    """What went wrong, in one line for a person; `exit_code` is what the process should end with."""

    def __init__(self, message, exit_code=FAILED):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def one_line_errors():
    """Turn a CheckpointError into one line on stderr and its exit code: no stack trace for a user's mistake."""
    try:
        yield
    except CheckpointError as error:
        print(f"{Path(sys.argv[0]).name or 'python'}: error: {_one_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


def option(default, help):
    """A field of a settings dataclass that parse_settings() turns into a command-line option."""
    return dataclasses.field(default=default, metadata={"help": help})


class OneLineParser(argparse.ArgumentParser):
    """argparse, except that a mistake gets one line on stderr instead of the whole usage."""

    def error(self, message):
        self.exit(WRONG_SETTINGS, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parse_settings(kind, description, argv=None):
    """The command line of a stage, made from its dataclass `kind`: a field an option, a True one a --no-NAME flag."""
    parser = OneLineParser(description=description)
    for field in dataclasses.fields(kind):
        name, default, text = field.name.replace("_", "-"), field.default, field.metadata["help"]
        if isinstance(default, bool):
            flag = f"--no-{name}" if default else f"--{name}"
            parser.add_argument(flag, dest=field.name, action=f"store_{str(not default).lower()}", help=text)
        else:
            shown = "" if default is None else f" (default {default})"
            parser.add_argument(f"--{name}", dest=field.name, default=default, help=text + shown,
                                type=str if default is None else type(default))
    return parser, kind(**vars(parser.parse_args(argv)))


# ---------------------------------------------------------------------------------------------------------------------
# Writing: temp file in the same directory, write, fsync, rename, fsync of the directory. Each step has a name.

def write_atomic(path, content, before_rename=None, durable=True):
    """Write `content` to `path` so that the name holds the old file or the whole new one, whatever happens.

    content: str, bytes, or a function that writes to the open binary file it is given. The file gets the umask's
    mode. `before_rename(temp_path)` runs once the bytes are on the disk and before they have their name.
    durable=False leaves out the slow half (the drive's own cache on a Mac, the directory): a reader still sees one
    whole version, but after a power cut it may be the one before.
    Raises CheckpointError when the bytes cannot be stored (disk full, read-only, ...); `path` is then as it was.
    """
    path = Path(path)
    file = None
    try:
        file = _TempFile(path)
        _fill(file, content)
        _sync_file(file, durable)
        if before_rename:
            before_rename(file.name)
        os.replace(file.name, path)
        if durable:
            _sync_directory(path.parent)
    except OSError as error:
        wanted = _bytes_wanted(file, content)
        _discard(file)   # first, so that the space it took counts as free
        raise CheckpointError(_explain(error, path, wanted)) from error
    except BaseException:
        _discard(file)
        raise
    finally:
        if file:
            file.close_quietly()


class _TempFile:
    """The file a caller's function writes to: a real file, locked while its writer lives, that knows its size."""

    def __init__(self, path):
        # The lock tells a living writer's file from a dead one's (see sweep), also where PIDs are reused. A sweeper
        # may remove the file between open and lock: then it has no name any more, and another one is made.
        while True:
            self.name = str(path.parent / f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
            self.file = open(os.open(self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "w+b")
            with contextlib.suppress(OSError):   # no flock on this file system: the sweeper cannot take it either
                fcntl.flock(self.file, fcntl.LOCK_EX)
            if os.fstat(self.file.fileno()).st_nlink:
                return
            self.file.close()

    def close_quietly(self):
        with contextlib.suppress(OSError):   # closing flushes; what failed to be written was reported already
            self.file.close()


def _fill(temp, content):
    if isinstance(content, str):
        content = content.encode()
    if callable(content):
        content(temp.file)
    else:
        temp.file.write(content)


def _sync_file(temp, flush_drive):
    temp.file.flush()
    if flush_drive and hasattr(fcntl, "F_FULLFSYNC"):   # macOS: fsync alone leaves the bytes in the drive's cache
        try:
            fcntl.fcntl(temp.file.fileno(), fcntl.F_FULLFSYNC)
            return
        except OSError:
            pass   # not on this file system
    # Never tried twice: after a failed fsync Linux forgets the lost pages, and a second call would report success.
    os.fsync(temp.file.fileno())


def _sync_directory(directory):
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(temp):
    if temp:
        temp.close_quietly()
        with contextlib.suppress(OSError):
            os.unlink(temp.name)


def _bytes_wanted(temp, content):
    if isinstance(content, (str, bytes, bytearray, memoryview)):
        return f"{len(content.encode() if isinstance(content, str) else content):,}"
    with contextlib.suppress(Exception):   # a function's size is not known: it got at least this far
        return f"at least {temp.file.tell():,}"
    return "some"


def _explain(error, path, wanted):
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (f"{path}: not saved, {reason}: wanted {wanted} bytes, {free_bytes(path.parent):,} free. All earlier "
                "files are intact. Make room and run the same command again: it goes on from there")
    return f"{path}: cannot write ({reason}). All earlier files are intact. Mend that and run the same command again"


def free_bytes(directory):
    """Bytes an ordinary user may still write to the file system of `directory`; -1 if that cannot be told."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(directory).free
    return -1


def sweep(directory):
    """Remove the temp files of dead writers; those of living ones are locked by them and left alone."""
    for path in Path(directory).iterdir():
        if TEMP_NAME.fullmatch(path.name):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)


# ---------------------------------------------------------------------------------------------------------------------
# Reading back: which checkpoints are there, in which order, and is each the one that was written?
# checkpoints.jsonl holds a line a checkpoint, durable before the checkpoint has its name:
# {"name", "start", "stop", "bytes", "sha256", "elapsed", "seal"}.

RECORDS = "checkpoints.jsonl"


def find_checkpoints(directory):
    """[(number, path)] of the files named checkpoint_<integer>.<ext>, ordered as numbers; anything else is ignored."""
    found = []
    for path in Path(directory).glob("checkpoint_*"):
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match and path.is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def read_records(directory):
    """{file name: record}, in the order they were written. A line that was torn or altered is passed over."""
    records = {}
    try:
        lines = (Path(directory) / RECORDS).read_bytes().splitlines()
    except OSError:
        return records
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            record = json.loads(line)
            if record.pop("seal") == _seal(record):
                records.pop(record["name"], None)
                records[record["name"]] = record
    return records


def _seal(record):
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def problem_with(path, record=None):
    """None if the file at `path` is whole, else what is wrong with it, in a few words. Reads every byte.

    With its record the file must be the very bytes that were written. Without, a zip-based file (.npz, .pt) is
    checked by the CRCs of all its members, and any other format cannot be vouched for.
    """
    try:
        size = os.path.getsize(path)
        if size == 0:
            return "empty"
        if record:
            if size != record["bytes"]:
                return f"{size:,} bytes, should be {record['bytes']:,}"
            return None if sha256(path) == record["sha256"] else "checksum differs"
        return _zip_problem(path)
    except OSError as error:
        return error.strerror or str(error)


def _zip_problem(path):
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return "no checksum of it is recorded, and it is not a zip-based file"
        try:
            with zipfile.ZipFile(file) as archive:
                bad = archive.testzip()
        except Exception as error:   # zipfile raises a dozen types on damaged bytes
            return f"damaged zip ({str(error) or type(error).__name__})"
        return f"member {bad} fails its CRC" if bad else None


def set_aside(path, problem):
    """Rename a bad file to *.corrupt, never over another one, and say so."""
    path = Path(path)
    aside, copy = path.with_name(path.name + ".corrupt"), 2
    while aside.exists():
        aside, copy = path.with_name(f"{path.name}.{copy}.corrupt"), copy + 1
    try:
        os.rename(path, aside)
        _sync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} is bad ({problem}) and cannot be set aside: {error.strerror}") from error
    _warn(f"{path}: {problem}. Set aside as {aside.name}; the work it held is done again")


def _warn(message):
    with contextlib.suppress(OSError, ValueError):   # a closed log must not end the work
        print(f"warning: {message}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# One writer a directory

_held = set()   # POSIX locks do not exclude a process from itself


class DirectoryLock:
    """A kernel lock on DIR/.lock. Of the two kinds, POSIX: a forked child does not inherit it, so it dies with us."""

    def __init__(self, directory):
        self.directory = Path(directory).resolve()
        path = self.directory / ".lock"
        if self.directory in _held:
            raise CheckpointError(f"{directory} is in use by this very process (PID {os.getpid()})", IN_USE)
        try:
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot write here ({error.strerror}). Nothing was changed; "
                                  "choose another --out or mend the permissions") from error
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self.file, 500, 0).decode(errors="replace").strip()
            os.close(self.file)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(f"{directory} is in use by {holder or 'a process that is just starting'}. "
                                      "Nothing was changed; wait for it, stop it, or choose another --out",
                                      IN_USE) from None
            raise CheckpointError(f"{path}: this file system cannot lock ({error.strerror}); "
                                  "use a local one") from error
        _held.add(self.directory)

    def sign(self):
        """Leave PID, host and start time for those who are refused."""
        text = f"PID {os.getpid()} on host {socket.gethostname()} since {_utc(time.time())}\n".encode()
        with contextlib.suppress(OSError):   # a full disk: the lock holds all the same
            os.ftruncate(self.file, 0)
            os.pwrite(self.file, text, 0)

    def release(self):
        _held.discard(self.directory)
        os.close(self.file)


# ---------------------------------------------------------------------------------------------------------------------
# The run: what a job's own script uses

class Run:
    """A long job in the directory `out`, as a context manager that keeps the promises in this file's docstring.

    total: how many units of work there are; `unit` names them in the progress.
    every: units between checkpoints; a stretch longer than `max_minutes` is saved early, in parts.
    settings: what decides the result, kept in run.json; once there are checkpoints, a restart with others is refused,
    naming each that differs.
    may_grow: the settings that may be larger than last time. first: number of the first unit (pieces only).
    unit_bytes: what a unit takes on the disk, about; a disk too small for the rest is refused before work begins.
    heartbeat: seconds between writes of PROGRESS.txt. stall_after: seconds without an update until STALLED (never
    less than ten times the longest wait between two updates so far). keep: how many state checkpoints stay.

    A job whose state is one object uses load() and steps(); one that makes a long list of results uses pieces().
    Errors of the user or the machine end the process with one line on stderr and the exit code of the docstring.
    """

    def __init__(self, out, total, *, every=100, suffix=".bin", title="Job", unit="steps", settings=None, may_grow=(),
                 first=0, unit_bytes=0, max_minutes=5, heartbeat=30, stall_after=300, keep=3):
        if total < 1 or every < 1 or keep < 1 or max_minutes <= 0 or heartbeat <= 0:
            raise ValueError("total, every, keep, max_minutes and heartbeat must be positive")
        self.out, self.total, self.every, self.suffix = Path(out), int(total), int(every), suffix
        self.title, self.unit, self.settings, self.may_grow = title, unit, dict(settings or {}), may_grow
        self.first, self.unit_bytes, self.max_seconds, self.keep = first, unit_bytes, max_minutes * 60, keep
        self.heartbeat, self.stall_after = heartbeat, stall_after
        self.done = self.durable = 0        # units worked on; units that survive a kill
        self.stopping = None                # the signal that asked us to stop
        self.seconds_left = None            # a stage that knows better than the rate sets it, for the ETA
        self._newest = None                 # name of the newest checkpoint
        self._fields = {}                   # a stage's own lines of PROGRESS.txt
        self._began = self._elapsed_before = 0
        self._longest = self._done_at_start = 0
        self._moved = time.monotonic()
        self._thread = None
        self._bar = self._warned = self._stalled = False
        self._io = threading.RLock()
        self._wake = threading.Event()
        self._handlers = {}

    # -- entering and leaving

    def __enter__(self):
        with one_line_errors():
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                wrong = WRONG_SETTINGS if isinstance(error, (FileExistsError, NotADirectoryError)) else FAILED
                raise CheckpointError(f"{self.out}: cannot make this directory ({error.strerror}); "
                                      "choose another --out", wrong) from error
            self._lock = DirectoryLock(self.out)
            try:
                sweep(self.out)
                self._compare_settings()
                self.records = read_records(self.out)
                self._elapsed_before = self._elapsed_until_now()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, kind, error, trace):
        try:
            status, line = self._verdict(kind, error)
            if self._thread or status != "COMPLETE":
                self._end(status, line)
            elif not self._says_complete():   # killed between the last checkpoint and the last word
                self.begin()
                self._end(status, line)
        finally:
            self._lock.release()
        if status == "COMPLETE":
            self.log(f"complete: {self.out} has all {self.total} {self.unit}")
        elif status == "INTERRUPTED":
            name = signal.Signals(self.stopping).name if self.stopping else "the program itself"
            self.log(f"stopped by {name}: {self.durable}/{self.total} {self.unit} are saved; "
                      "run the same command again to go on")
        if isinstance(error, CheckpointError):
            with one_line_errors():
                raise error

    def _verdict(self, kind, error):
        if kind is None or (kind is SystemExit and error.code in (None, 0)):
            return ("COMPLETE" if self.durable >= self.total else "INTERRUPTED"), None
        if kind is KeyboardInterrupt or (kind is SystemExit and self.stopping):
            return "INTERRUPTED", None
        return "FAILED", str(error) if kind is CheckpointError else f"{kind.__name__}: {error}"

    def begin(self):
        """There is work to do: from here on files change. steps() and pieces() call it."""
        if self._thread:
            return
        wanted, free = int((self.total - self.durable) * self.unit_bytes), free_bytes(self.out)
        if 0 <= free < wanted:
            raise CheckpointError(f"{self.out}: this run needs about {wanted:,} bytes more, {free:,} are free. "
                                  "Make room or choose another --out, then run the same command again")
        self._lock.sign()
        self._forget_what_is_gone()
        self._began = self._moved = time.monotonic()
        self._done_at_start = self.done
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:   # nohup ignores SIGHUP: leave it so
                    self._handlers[number] = signal.signal(number, self._ask_to_stop)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(line_buffering=True)   # a log is readable as it grows
        self._bar = sys.stdout is not None and sys.stdout.isatty()
        self._reserve(True)
        self._write_progress("RUNNING")
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def _end(self, status, error):
        if self._thread:
            self._wake.set()
            self._thread.join(timeout=10)   # a heartbeat stuck in a dead file system must not hold us for ever
        self._reserve(False)
        self._write_progress(status, error)
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _reserve(self, hold):
        """A few blocks kept back, so that a full disk still takes the PROGRESS.txt that says so."""
        with contextlib.suppress(OSError):
            if hold:
                (self.out / ".reserve").write_bytes(bytes(16384))
            else:
                (self.out / ".reserve").unlink()

    def _ask_to_stop(self, number, frame):
        # Only a flag: saving inside a signal handler deadlocks. A second signal changes nothing, since `timeout` and
        # batch systems send two; kill -9 is always safe for those in a hurry.
        self.stopping = self.stopping or number

    def stop_if_asked(self):
        """Leave with exit code 128 + signal if a signal came. Call it where all that was done is saved."""
        if self.stopping:
            raise SystemExit(128 + self.stopping)

    # -- settings

    def _compare_settings(self):
        path = self.out / "run.json"
        asked = json.loads(json.dumps(self.settings))
        try:
            kept = json.loads(path.read_bytes())
            before, self.id = dict(kept["settings"]), str(kept["run"])
        except FileNotFoundError:
            if find_checkpoints(self.out):
                raise CheckpointError(f"{path} is missing, so the settings of the checkpoints beside it are unknown. "
                                      "Nothing was changed; bring it back or choose another --out") from None
            before, self.id = None, os.urandom(3).hex()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}). Nothing was changed; bring back a good copy or "
                                  "choose another --out") from error
        if before is not None and find_checkpoints(self.out):   # before the first checkpoint nothing binds
            differ = []
            for key in sorted(before.keys() | asked.keys()):
                old, new = before.get(key, "absent"), asked.get(key, "absent")
                if key in self.may_grow and isinstance(old, int) and isinstance(new, int):
                    if new < old:
                        differ.append(f"{key} was {old}, asked {new} (it may only grow)")
                elif old != new:
                    differ.append(f"{key} was {json.dumps(old)}, asked {json.dumps(new)}")
            if differ:
                raise CheckpointError(f"{path}: this run was started with other settings: {'; '.join(differ)}. Nothing "
                                      "was changed; ask for the old settings or choose another --out", WRONG_SETTINGS)
        if before != asked:
            write_atomic(path, json.dumps({"run": self.id, "settings": asked}, indent=1) + "\n")

    # -- a job whose state is one object

    def load(self, read, default=None):
        """read(open binary file) of the newest checkpoint that verifies; `default` if there is none yet."""
        found = [(n, p) for n, p in find_checkpoints(self.out) if p.suffix == self.suffix]
        bad = []
        for number, path in reversed(found):
            problem = problem_with(path, self.records.get(path.name))
            if problem:
                bad.append((path, problem))
                continue
            for path_problem in bad:
                set_aside(*path_problem)
            self.done = self.durable = number
            self._newest = path.name
            try:
                with open(path, "rb") as file:
                    return read(file)
            except Exception as error:
                raise CheckpointError(f"{path} is whole but cannot be loaded: {type(error).__name__}: {error}. "
                                      "Nothing was changed") from error
        if bad:
            self._refuse_all_bad(bad)
        if self.records:
            _warn(f"{self.out}: checkpoints were recorded here but none is left; the work starts over")
        return default

    def _refuse_all_bad(self, bad):
        names = "; ".join(f"{path.name}: {problem}" for path, problem in bad)
        raise CheckpointError(f"{self.out}: no checkpoint is good ({names}). Nothing was changed; bring back a good "
                              "copy, or move the bad ones away to start over")

    def steps(self, write):
        """Numbers of the steps still to do; write(open binary file) stores the whole state at each checkpoint."""
        self.begin()
        saved = time.monotonic()
        for step in range(self.done, self.total):
            self.stop_if_asked()
            yield step
            self.update(step + 1)
            late = self._moved - saved > self.max_seconds
            if (step + 1) % self.every == 0 or step + 1 == self.total or late or self.stopping:
                self.save(step + 1, write)
                saved = time.monotonic()

    def save(self, number, write):
        """Store the state after `number` units as checkpoint_<number>; then let go of the oldest beyond `keep`."""
        self._store(self._name(number), number, number, write)
        self.durable = number
        self._log_checkpoint()
        mine = [p for _, p in find_checkpoints(self.out) if p.name in self.records and p.suffix == self.suffix]
        if len(mine) > self.keep:
            newest = self.out / self._newest
            problem = problem_with(newest, self.records[newest.name])
            if not problem and zipfile.is_zipfile(newest):
                problem = _zip_problem(newest)
            if problem:
                raise CheckpointError(f"{newest}: {problem} when read back; the older checkpoints are kept")
            for path in mine[:-self.keep]:
                with contextlib.suppress(OSError):
                    path.unlink()

    # -- a job that makes a long list of results, piece by piece

    def pieces(self, length=None):
        """The pieces of the work that no good checkpoint holds yet, in order, each at most `every` long.

        A Piece is iterated (or its blocks() are), then saved. length(path) says how many units a checkpoint holds
        whose record was lost; without it such a file is set aside.
        """
        todo = self._uncovered(length)
        if todo:
            self.begin()
        for start, stop in todo:
            while start < stop:
                self.stop_if_asked()
                piece = Piece(self, start, stop)
                yield piece
                if piece.saved != piece.done:
                    raise RuntimeError(f"piece {start} to {piece.done} was worked on but not saved: call piece.save")
                start = piece.done
        self.stop_if_asked()

    def _uncovered(self, length):
        begin, end = self.first, self.first + self.total
        good, bad = [], []
        for number, path in find_checkpoints(self.out):
            record = self.records.get(path.name)
            problem = problem_with(path, record)
            if not problem and record is None:
                try:
                    problem = None if length else f"its record in {RECORDS} is lost"
                    stop = number + length(path) if length else None
                except Exception as error:
                    problem = f"cannot be read ({error})"
            elif not problem:
                stop = record["stop"]
            if problem:
                bad.append((path, problem))
            else:
                good.append((number, stop, path))
        if bad and not good:
            self._refuse_all_bad(bad)
        for path_problem in bad:
            set_aside(*path_problem)
        there = {path.name for _, _, path in good} | {path.name for path, _ in bad}
        for name in [name for name in self.records if name not in there and name != list(self.records)[-1]]:
            # (A kill between the newest record and its file's rename leaves a record without a file: no loss.)
            _warn(f"{self.out / name} is gone; the work it held is done again")

        gaps, at = [], begin
        for start, stop, path in good:
            if start < at or stop > end:
                raise CheckpointError(f"{path}: holds {start} to {stop - 1}, which overlaps its neighbour or lies "
                                      f"outside {begin} to {end - 1}. Nothing was changed; is it from another run?")
            gaps.append((at, start))
            at = stop
        gaps.append((at, end))
        self.done = self.durable = sum(stop - start for start, stop, _ in good)
        if good:
            self._newest = good[-1][2].name
        pieces = []
        for at, stop in gaps:
            while at < stop:   # cut where an undisturbed run would: at the multiples of `every`
                cut = min(stop, at - at % self.every + self.every)
                pieces.append((at, cut))
                at = cut
        return pieces

    # -- storing

    def _name(self, number):
        return f"checkpoint_{number:05d}{self.suffix}"

    def _store(self, name, start, stop, content):
        path = self.out / name
        if path.exists():
            raise CheckpointError(f"{path} exists already; a checkpoint is never overwritten")
        write_atomic(path, content, before_rename=lambda temp: self._record(name, start, stop, temp))
        self._newest = name

    def _record(self, name, start, stop, temp):
        record = {"name": name, "start": start, "stop": stop, "bytes": os.path.getsize(temp), "sha256": sha256(temp),
                  "elapsed": round(self._elapsed(), 1)}
        line = json.dumps(dict(record, seal=_seal(record))) + "\n"
        # Appended, since rewriting all of it would cost the square of the number of checkpoints.
        with open(self.out / RECORDS, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.records[name] = record

    def _forget_what_is_gone(self):
        """Rewrite the records without torn lines and without files that are no longer there."""
        self.records = {name: r for name, r in self.records.items() if (self.out / name).exists()}
        lines = "".join(json.dumps(dict(r, seal=_seal(r))) + "\n" for r in self.records.values())
        path = self.out / RECORDS
        if not path.exists() or path.read_text(errors="replace") != lines:
            write_atomic(path, lines)

    # -- progress

    def update(self, done, **fields):
        """The work has moved: `done` units so far. No I/O, about a third of a microsecond; call it for every unit.

        fields become lines of their own in PROGRESS.txt: update(7, Epoch="3/10").
        """
        now = time.monotonic()
        if now - self._moved > self._longest:
            self._longest = now - self._moved
        self._moved = now
        self.done = done
        if fields:
            self._fields = {**self._fields, **fields}   # a new dict: the heartbeat may be reading the old one

    def _elapsed(self):
        return self._elapsed_before + (time.monotonic() - self._began if self._began else 0)

    def _elapsed_until_now(self):
        """Seconds worked by earlier starts: the last word of PROGRESS.txt, or of the newest record if it is lost."""
        before = [r.get("elapsed", 0) for r in self.records.values()]
        with contextlib.suppress(ValueError):
            before.append(int(read_progress(self.out / "PROGRESS.txt").get("Elapsed", "0 s").split()[0]))
        return max(before, default=0)

    def _rate(self):
        worked = time.monotonic() - self._began
        return (self.done - self._done_at_start) / worked if worked > 0 else 0.0

    def _counts(self):
        """'12000/30000 samples (40.0%)'. 100% only once the last piece is durable."""
        if self.durable >= self.total:
            return f"{self.total}/{self.total} {self.unit} (100%)"
        tenths = min(999, 1000 * self.done // self.total)
        return f"{self.done}/{self.total} {self.unit} ({tenths / 10:.1f}%)"

    def _rate_text(self):
        rate = self._rate()
        return f"{rate:.1f} {self.unit}/s" if rate >= 1 or rate == 0 else f"{rate:.3g} {self.unit}/s"

    def _eta_seconds(self):
        if self.seconds_left is not None and self.done < self.total:
            return max(0, self.seconds_left - (time.monotonic() - self._moved))
        rate = self._rate()
        return (self.total - self.done) / rate if rate > 0 else 0 if self.done >= self.total else None

    def _progress_text(self, status, error):
        wall, now = time.time(), time.monotonic()
        eta = None if status in ("INTERRUPTED", "FAILED") else self._eta_seconds()
        lines = [("Status", status)] + ([("Error", error)] if error else []) + [
            ("Progress", self._counts()),
            ("Checkpoint", f"{self.durable} ({self._newest})" if self._newest else "none"),
            ("Elapsed", f"{int(self._elapsed())} s"),
            ("Rate", self._rate_text()),
            ("ETA", "unknown" if eta is None else f"{eta:.0f} s ({_utc(wall + eta)})"),
            *self._fields.items(),
            ("Last update", _utc(wall)),
            ("Heartbeat", int(wall)),
            ("Advanced", int(wall - (now - self._moved))),   # on the steady clock: a clock jump cannot make it later
            ("Interval", f"{self.heartbeat:g} s"),
            ("Run", self.id), ("PID", os.getpid()), ("Host", socket.gethostname())]
        return self.title + "\n" + "".join(f"{_one_line(k)}: {_one_line(v)}\n" for k, v in lines)

    def _write_progress(self, status, error=None):
        with self._io:
            try:
                write_atomic(self.out / "PROGRESS.txt", self._progress_text(status, error), durable=False)
            except CheckpointError as trouble:
                if not self._warned:
                    self._warned = True
                    _warn(f"{trouble} (the work goes on; this is said once)")

    def _beat(self):
        """The heartbeat's thread: PROGRESS.txt every `heartbeat` seconds, and a live bar on a terminal."""
        written = time.monotonic()
        while not self._wake.wait(min(0.2, self.heartbeat) if self._bar else self.heartbeat):
            if self._bar:
                self._draw_bar()
            now = time.monotonic()
            if not self._bar or now - written >= self.heartbeat:
                stalled = now - self._moved > max(self.stall_after, 10 * self._longest)
                if stalled and not self._stalled:
                    _warn(f"{self.out}: no progress for {now - self._moved:.0f} s")
                self._stalled = stalled
                self._write_progress("STALLED" if stalled else "RUNNING")
                written = now

    def _log_checkpoint(self):
        with self._io:
            self._write_progress("RUNNING")
            if self._bar:
                self._draw_bar()
            else:
                self.log(f"{self._newest}  {self._summary()}")

    def _summary(self):
        eta = self._eta_seconds()
        return f"{self._counts()}  {self._rate_text()}  ETA {'unknown' if eta is None else duration(eta)}"

    def _draw_bar(self):
        columns, summary = shutil.get_terminal_size().columns, self._summary()
        width = max(0, min(30, columns - len(summary) - 5))
        filled = width * self.done // self.total
        with self._io, contextlib.suppress(OSError, ValueError):
            sys.stdout.write(f"\r[{'#' * filled}{'-' * (width - filled)}] {summary}"[:columns] + "\033[K")
            sys.stdout.flush()

    def log(self, line):
        """A line on stdout, out of the live bar's way."""
        with contextlib.suppress(OSError, ValueError):   # a closed log must not end the work
            print(("\r\033[K" if self._bar else "") + line, flush=True)

    def _says_complete(self):
        progress = read_progress(self.out / "PROGRESS.txt")
        return progress.get("Status") == "COMPLETE" and progress.get("Progress") == self._counts()


class Piece:
    """One stretch of the work, start to stop - 1. Iterating it counts progress, and ends early when it is due."""

    def __init__(self, run, start, stop):
        self.run, self.start, self.stop = run, start, stop
        self.done = self.saved = start   # how far the work got, how far it is saved
        self._base = run.done - start    # progress counts work, not places: there may be gaps
        self._began = time.monotonic()

    def __iter__(self):
        """Unit by unit."""
        return (first for first, _ in self.blocks(1))

    def blocks(self, size):
        """(first, last + 1) of stretches of at most `size` units."""
        while self.done < self.stop and not self.run.stopping:
            last = min(self.done + size, self.stop)
            yield self.done, last
            self.done = last
            self.run.update(self._base + last)
            if time.monotonic() - self._began > self.run.max_seconds:
                break

    def save(self, content):
        """Store what was done so far as a checkpoint: str, bytes or a function that writes to the open file."""
        if self.done > self.start:
            run = self.run
            run._store(run._name(self.start), self.start, self.done, content)
            run.durable += self.done - self.start
            run._log_checkpoint()
        self.saved = self.done


def _one_line(value):
    return "".join(c if c.isprintable() else " " for c in str(value))[:1000]


def _utc(seconds):
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def duration(seconds):
    """Seconds as a person says them: 3 min 20 s."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def read_progress(path):
    """{key: value} of a PROGRESS.txt, {} if it cannot be read. Only the first line of each key counts."""
    try:
        with open(path, "rb") as file:
            lines = file.read(65536).decode(errors="replace").splitlines()[1:]
    except OSError:
        return {}
    pairs = [line.split(": ", 1) for line in lines if ": " in line]
    return {key: _one_line(value) for key, value in reversed(pairs)}


# ---------------------------------------------------------------------------------------------------------------------
# python checkpointing.py status DIR ... / verify DIR ...

def _directories(roots):
    for root in roots:
        if not os.path.isdir(root):
            raise CheckpointError(f"{root}: no such directory", WRONG_SETTINGS)
        for directory, below, names in sorted(os.walk(root)):
            yield Path(directory), sorted(names)


def status(roots):
    """Print what every run below the directories is doing. Returns 0, or 1 if there is none."""
    count = 0
    for directory, names in _directories(roots):
        if "PROGRESS.txt" not in names:
            continue
        count += 1
        progress = read_progress(directory / "PROGRESS.txt")
        word = progress.get("Status", "UNREADABLE")
        note = progress.get("Error", "")
        if word in ("RUNNING", "STALLED"):
            with contextlib.suppress(ValueError, KeyError):
                age = max(0, int(time.time()) - int(progress["Heartbeat"]))
                note = f"{progress.get('Rate', '')}  ETA {progress.get('ETA', '')}  heartbeat {duration(age)} ago"
                if progress.get("Host") == socket.gethostname() and not _alive(int(progress["PID"])):
                    word, note = "DEAD", f"no process {progress['PID']}; run the same command again to go on"
        print(f"{directory}: {word}  {progress.get('Progress', '')}  {note}".rstrip())
    if not count:
        print(f"no run (PROGRESS.txt) in or below {', '.join(map(str, roots))}", file=sys.stderr)
    return 0 if count else 1


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def verify(roots):
    """Read every checkpoint, .npz and .pt file below the directories. Returns 0, or 1 with the bad ones named."""
    good = bad = 0
    for directory, names in _directories(roots):
        records = read_records(directory)
        for name in names:
            path = directory / name
            checkpoint = CHECKPOINT_NAME.fullmatch(name) and path.is_file()
            if checkpoint or (path.suffix in (".npz", ".pt") and not name.startswith(".") and path.is_file()):
                problem = problem_with(path, records.get(name))
                good, bad = good + (not problem), bad + bool(problem)
                if problem:
                    print(f"BAD {path}: {problem}")
        if read_progress(directory / "PROGRESS.txt").get("Status") == "COMPLETE":
            for record in records.values():
                if record["start"] < record["stop"] and record["name"] not in names:   # a piece: none may be missing
                    bad += 1
                    print(f"BAD {directory / record['name']}: missing")
    print(f"{good} files are whole, {bad} bad" if good or bad else f"no checkpoints in {', '.join(map(str, roots))}")
    return 1 if bad or not good else 0


def main():
    parser = OneLineParser(description="See what runs are doing, and whether their files are whole.")
    parser.add_argument("command", choices=["status", "verify"], help="status: what every run below DIR is doing; "
                        "verify: read every checkpoint, exit 1 naming the bad ones")
    parser.add_argument("dirs", nargs="+", metavar="DIR")
    arguments = parser.parse_args()
    with one_line_errors():
        return {"status": status, "verify": verify}[arguments.command](arguments.dirs)


if __name__ == "__main__":
    raise SystemExit(main())
