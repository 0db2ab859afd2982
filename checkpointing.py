"""Long jobs that lose minutes of work at most: durable checkpoints, exact restarts, progress.

    import checkpointing

    run = checkpointing.Run("results", total=1000)
    values = run.load([])                       # what was saved last, or this
    for i in run.steps(lambda: values):         # the numbers that are left
        values.append(simulate(i))

Kill it at any moment and start it again: it goes on from the newest checkpoint that verifies, with
the states of random, numpy.random and torch put back.

Promised, on a local Linux or macOS file system:
  1. A file has its final name whole or not at all, also after kill -9 or a power cut.
  2. What a restart reads was verified to the last byte. A bad file is set aside, never deleted; if
     all are bad, or the index is lost, the run stops. A file that cannot be read is not bad.
  3. One writer a directory, by a kernel lock that dies with its process.
  4. An older state is removed only after the newer one was read back and verified.
  5. PROGRESS.txt is always one whole version, and says STALLED when the work does not move.
  6. Forks, pools, threads, Ctrl-C and an output that nobody reads behave as without us.
  7. COMPLETE is said when the block, or without one the program, has ended normally. Exit codes:
     1 failed; 2 wrong settings; 75 directory in use; 129 and 143 stopped by SIGHUP and SIGTERM
     after saving what was done. All others are the program's own.
A kill repeats a percent of the work, at most max_minutes of it, and the step in work. Not promised:
Windows; network file systems; a disk that acknowledges a flush it did not do.

Standard library only, Python 3.9 on: copy this one file into your project. runs.py beside it says
what runs are doing (`runs.py status DIR`) and checks copies (`runs.py verify DIR`).
"""
import atexit
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import os
import pickle
import random
import re
import shlex
import signal
import socket
import sys
import threading
import time
import zlib
from pathlib import Path

FAILED, WRONG_SETTINGS, IN_USE = 1, 2, 75   # exit codes; 75 is EX_TEMPFAIL of sysexits.h
ALL_SIGNALS = signal.SIGTERM, signal.SIGHUP, signal.SIGINT


class CheckpointError(Exception):
    """What went wrong, in one line for a person; `exit_code` is what the process ends with."""

    def __init__(self, message, exit_code=FAILED):
        super().__init__(message)
        self.exit_code = exit_code


# ------------------------------------------------------------------------------------------------
# The run: all that a job's own script needs to know

class Run:
    """A long job in the directory `out`. It begins at load() and ends with the program; where a
    program has several runs, and in a notebook, `with run:` bounds one.

    total: how many units of work there are, None if unknown; `unit` names them in the progress.
    every: save at every N-th unit too (pieces: their length, 1000 if not given).
    max_minutes: save at the latest then. suffix: of checkpoints in a format of the job's own.
    settings: what decides the result, kept in run.json; once there are checkpoints, a restart with
    others is refused, naming each that differs. may_grow: those that may be larger than last time.
    first: number of the first unit (pieces only). keep: how many states stay.
    heartbeat: seconds between writes of PROGRESS.txt. stall_after: seconds without an update until
    STALLED (never less than ten times the longest wait between two updates so far).
    signals: those that wait until the step at work is saved, or stalls. Ctrl-C is not among them:
    it is Python's own, and the run goes on from the last save. quiet: only warnings and errors.

    Three ways to use it:
      1. load() and steps(): the state is one object, stored whole at each checkpoint.
      2. pieces(): a long list of results, each stretch of it stored once.
      3. a loop of your own: load(), then tick() after each unit; or the parts of tick().
    The end is COMPLETE if all steps are done, finish() was called or, in a block, no total is
    known. break or an exception leaves the rest undone: nothing is saved of the step they leave.
    Signals are heeded if the main thread opens the run. Programs that the job starts get those of
    a terminal or a service, too: keep them out with subprocess.run(..., start_new_session=True),
    in systemd with KillMode=mixed.
    """

    def __init__(self, out, total=None, *, every=None, max_minutes=5, suffix=None, unit="steps",
                 title="Job", settings=None, may_grow=(), first=0, keep=3, heartbeat=30,
                 stall_after=300, signals=(signal.SIGTERM, signal.SIGHUP), quiet=False):
        self.out = Path(out).absolute()     # the job may change its directory
        self.total = None if total is None else int(total)
        self.every = None if every is None else int(every)
        self.first, self.keep = int(first), int(keep)
        if min(self.total or 0, self.first, max_minutes, heartbeat) < 0 or (
                min(self.keep, 1 if every is None else self.every) < 1):
            raise ValueError("total, every, keep, max_minutes and heartbeat must be positive")
        if suffix is not None and not CHECKPOINT_NAME.fullmatch(f"checkpoint_0{suffix}"):
            raise ValueError(f"suffix {suffix!r}: give one such as '.json' or '.tar.gz'")
        self.suffix, self.title, self.unit, self.quiet = suffix, title, unit, quiet
        self.settings, self.may_grow, self.signals = dict(settings or {}), may_grow, signals
        self.max_seconds, self.stall_after = max_minutes * 60, stall_after
        self.heartbeat = heartbeat
        self.done = self.durable = 0        # units worked on, now or before; that survive a kill
        self.newest, self.fields = None, {}     # newest checkpoint's name; the job's own lines
        self.begun = self.busy = self.leaving = False   # busy: a signal waits for the work
        self._lock = None

    stopping = property(lambda self: _endings.number, doc="the signal that asked to stop, or None")

    @property
    def complete(self):
        """Is all that was asked for done and saved?"""
        return self.total is not None and self.durable >= self.total

    # -- 1. the state is one object

    def load(self, default=None, *, read=None):
        """The state of the newest checkpoint that verifies, or `default` if there is none.

        Of `default` and of the items of a tuple, list or dict, those with load_state_dict are
        restored in place and given back. A state is kept by pickle (torch.save where torch is
        imported): loading it runs code, so load only what you trust. read(open binary file) reads
        a format of the job's own; it is also called once to try the first checkpoint.
        From here on the directory is locked until the run ends.
        """
        self._open()
        self._read = read
        if not self._look(newest_only=True):
            return default
        path = self.out / self.newest
        try:
            with open(path, "rb") as file:
                if read:
                    return read(file)
                kept = undump(file)
            self._random = kept["random"]
            set_random_states(self._random)
            return restored(default, kept["state"])
        except Exception as error:
            raise CheckpointError(f"{path} is whole but cannot be loaded: {type(error).__name__}: "
                                  f"{error}. Nothing was changed") from error

    def steps(self, get=None, *, write=None):
        """Numbers of the steps to do. What get() gives is saved when it is due, or what
        write(open binary file) writes: then random states are the job's own business too.
        With zip() it comes first: zip(run.steps(get), items[run.done:])."""
        self._open()
        if not self.complete:
            self._begin()
            if self._random:    # what came between load() and here may have drawn some
                set_random_states(self._random)
                self._random = None
        get = get or (lambda: None)
        self._content = get, write
        try:
            while not (self.complete or self._finishing):
                self.busy, self._step = True, self.done
                yield self.done
                self._step = None
                self.tick(self.done + 1, get, write=write)
        finally:
            self.busy = False

    # -- 2. a long list of results, piece by piece

    def pieces(self):
        """The Pieces that no good checkpoint holds yet, in order, each at most `every` units long.

        Iterate over a Piece (or its blocks()) to the end, then save() it.
        """
        every, self.gaps = self.every or 1000, self._gaps()
        try:
            for start, stop in self.gaps:
                while start < stop and not (self.complete or self._finishing):
                    self._begin()
                    self.busy = True
                    piece = Piece(self, start, min(stop, start - start % every + every))
                    yield piece
                    if not start < piece.saved == piece.done:
                        raise RuntimeError(f"piece {start}: iterate over it, then call its save()")
                    start = piece.done
                    self.leave_if_asked()
        finally:
            self.busy = False

    def _gaps(self):
        """(first, last + 1) of the stretches that are still to be done."""
        if self.total is None:
            raise ValueError("pieces() needs a total")
        self._open()
        at, gaps = self.first, []
        for record in self._look():
            if record["start"] < at or record["stop"] > self.first + self.total:
                raise CheckpointError(f"{self.out / record['name']}: overlaps its neighbour, or "
                                      "lies outside of what is asked for. Nothing was changed")
            gaps.append((at, record["start"]))
            at = record["stop"]
        return [(a, b) for a, b in [*gaps, (at, self.first + self.total)] if a < b]

    # -- 3. a loop of your own

    def tick(self, done, get=None, *, write=None, **fields):
        """`done` units are done: tell the progress, save when due, leave if a signal asked to.

        get, write: as in steps(); without them it only tells the progress. fields: see update().
        """
        self._begin()
        done = int(done) if self.total is None else min(int(done), self.total)
        if get or write:
            self._content = get, write
        elif not (self._content or self.newest):
            self.durable = done     # a job that saves nothing has nothing to wait for
        self.update(done, **fields)
        if (get or write) and done > self.durable and (
                self.due() or self.total is not None and done >= self.total
                or self.every and done // self.every > self.durable // self.every):
            self.save(done, get, write=write)
        self.leave_if_asked()

    def update(self, done, **fields):
        """The work has moved: `done` units so far. No I/O, less than a microsecond: call it often.

        fields become lines of their own in PROGRESS.txt: update(7, Epoch="3/10"). ValueError if one
        has the name of a line that is there already, such as PID.
        """
        self._begin()
        now = time.monotonic()
        if now - self.moved > self.longest_wait:
            self.longest_wait = now - self.moved
        self.moved, self.done, self.busy = now, int(done), not self.complete
        if fields:      # a new dict: the heartbeat may be reading the old one
            if not fields.keys().isdisjoint(Progress.OURS):
                raise ValueError(f"{', '.join(Progress.OURS)} have their own meaning: take another "
                                 "name for this line")
            self.fields = {**self.fields, **{key: str(value) for key, value in fields.items()}}

    def due(self):
        """Is it time to save a state? After the first step of this start; then when saving costs
        less than 1 % of the time; after max_minutes; when asked to stop or to finish."""
        if self.late() or self._cost is None:
            return True
        worked, since = self.progress.worked(), time.monotonic() - self._saved_at
        # the thousandth keeps checkpoints.jsonl short: ten thousand lines a day, not a million
        return self._spent + self._cost < worked / 100 and since > worked / 1000

    def late(self):
        """Is it max_minutes since the last save, or were we asked to stop or to finish?"""
        late = time.monotonic() - self._saved_at > self.max_seconds
        return late or self._finishing or _endings.number is not None

    def save(self, number, get=None, *, write=None):
        """Store the state after `number` units as checkpoint_<number>, then let go of the oldest.

        Raises CheckpointError if it cannot be stored; what was saved before is then untouched, and
        saving may be tried again. The first one is read back before it gets its name.
        """
        self._begin()
        number, began = int(number), time.monotonic()
        if number == self.durable > 0 and self.moved <= self._saved_at:
            return              # nothing has happened since
        if number <= self.durable and self.newest:
            raise CheckpointError(f"{self.out}: save({number}) came after {self.durable} were "
                                  "saved, and a checkpoint is never overwritten. All is safe: "
                                  "count something that grows from save to save, such as batches")
        read = None
        if self._cost is None:      # what could not be loaded shows now, not at the restart
            read = self._read if write else undump
        suffix = self.suffix or (".bin" if write else ".pt" if torch_here() else ".pkl")
        content = write or (lambda file: dump(get() if get else None, file))
        self._store(number, number, number, suffix, content, read)
        retain(self.out, self._records, self.keep)
        self._cost = time.monotonic() - began
        self._spent += self._cost

    def leave_if_asked(self):
        """Exit with 128 + signal if a signal came and all that was done is saved."""
        if _endings.number is not None and self.done <= self.durable:
            raise SystemExit(128 + _endings.number)

    def finish(self):
        """The work is complete before its total: with the step, piece or tick that is at work."""
        self._finishing = True

    def expect(self, seconds):
        """Say how long the rest will take, for the ETA, where the rate so far misleads."""
        self.progress.end_expected = time.monotonic() + seconds

    def log(self, line):
        """A line on stderr; dropped if nobody reads, never waited for."""
        if not self.quiet:
            say(line)

    # -- behind them: nothing below needs to be known to use it

    def _open(self):
        """Take the lock and read what is there, once; the gate of everything else."""
        if self._lock is not None:
            return self._check()
        _endings.watch(self)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            link = "a link that leads nowhere, " if os.path.islink(self.out) else ""
            bad_name = error.errno in (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG)
            raise CheckpointError(f"{self.out}: {link}no directory can be made here: "
                                  f"{error.strerror}", WRONG_SETTINGS if bad_name else FAILED
                                  ) from None
        self._lock = DirectoryLock(self.out)
        try:
            sweep(self.out)
            self._records = read_records(self.out)
            self.id, self._run_json = compare_settings(self.out, self.settings, self.may_grow)
            self.progress = Progress(self)
        except BaseException:
            self._lock = self._lock.close()
            raise
        self.done, self.durable, self.newest = 0, 0, None   # also where it is used again
        self.moved, self.longest_wait = time.monotonic(), 0.0   # the last update()
        self.begun = self.busy = self.leaving = self._looked = self._finishing = False
        self._read = self._random = self._content = None
        self._step = None   # number of the step at work, or left by break or an exception
        self._cost, self._spent = None, 0.0     # seconds: of the last save; of all of this start

    def _begin(self):
        """There is work to do: from here on files change."""
        if self.begun:
            return
        self._open()
        if not self._looked and self._look():
            raise CheckpointError(f"{self.out} holds checkpoints: the job must call load() (or "
                                  "pieces()) to go on from them")
        if self._run_json:
            write_atomic(self.out / "run.json", self._run_json)
        self.begun, self.moved = True, time.monotonic()
        self._saved_at = self.moved
        self.progress.begin()

    def _look(self, newest_only=False):
        """Verify what is there: the records of the good checkpoints; bad files are set aside."""
        self._looked = True
        good = good_checkpoints(self.out, self._records, newest_only)
        if good:
            done = sum(r["stop"] - r["start"] for r in good) or good[-1]["stop"]
            if good[-1].get("complete") is True:    # finish() has said so
                self.total = good[-1]["stop"] - self.first
            if self.total is not None and done > self.total:
                raise CheckpointError(f"{self.out}: {done} {self.unit} are done here already, more "
                                      f"than the {self.total} asked for. Nothing was changed; ask "
                                      f"for at least {done}", WRONG_SETTINGS)
            self.done = self.durable = done
            self.newest = good[-1]["name"]
        return good

    def _check(self):
        if not self._lock.ours():
            raise CheckpointError(f"{self.out} was moved or replaced while this run worked in it. "
                                  "Nothing was saved; move the old one back")

    def _store(self, start, stop, durable, suffix, content, read=None):
        if self._lock is None:
            raise RuntimeError("this run has ended, or it is its parent's in a forked child")
        self._check()
        name = f"checkpoint_{start:05d}{suffix}"
        record = {"name": name, "start": start, "stop": stop}
        if self._finishing:
            record["complete"] = True
        add_checkpoint(self.out, self._records, content, record, read)
        self.newest, self.durable, self._saved_at = name, durable, time.monotonic()
        if self._finishing:
            self.total = durable
        self.busy = self.busy and not self.complete
        self.progress.saved()

    # -- its end

    def __enter__(self):
        try:
            self._open()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind, error, trace):
        code, words = self._end(error, in_block=True)
        if code is not None:
            complain(words)
            raise SystemExit(code) from None

    def _end(self, error, in_block=False):
        """The last word on the run, by how the block or the program was left. Returns the exit
        code that the program must end with (None: leave that alone), and what to complain of."""
        if self._lock is None:      # it could not be opened, or this is a forked child's copy
            _endings.unwatch(self)
            return (error.exit_code, error) if isinstance(error, CheckpointError) else (None, None)
        self.leaving = True     # from here on a signal must not break off the last word
        _endings.catch(ALL_SIGNALS)
        try:
            # Left early, the state may be half a step ahead of its number: nothing is saved.
            last = error is None and (
                self._finishing or in_block and self.total is None and self._step is None)
            if last:
                try:
                    self._save_the_rest()
                except CheckpointError as trouble:
                    error = trouble
                except Exception as trouble:    # of the job's own get or write
                    error = CheckpointError(f"{self.out}: the last state cannot be stored ("
                                            f"{type(trouble).__name__}: {trouble})")
            status, words, code = self._verdict(error, last or self.complete)
            if status == "COMPLETE":
                self.total = self.done if self.total is None else self.total
            news = self.progress.before.get("Status") != status     # killed behind the last save
            if self.begun or status == "COMPLETE" and news or (
                    status == "FAILED" and code != WRONG_SETTINGS):
                self.progress.end(status, words)
            self._say_the_end(status, code, error)
            if error is None and _endings.number:   # it may have come during the last word
                code = 128 + _endings.number
        finally:
            self.leaving = self.busy = False
            self._lock = self._lock.close()
            _endings.unwatch(self)
        return code, words

    def _verdict(self, error, over):
        """(status, the line Error, exit code or None): the one place where these are decided."""
        number = _endings.number
        if isinstance(error, CheckpointError):
            return "FAILED", str(error), error.exit_code
        if number:  # also where a program that the job started has died of the same signal
            return "INTERRUPTED", None, 128 + number
        if error is None or isinstance(error, SystemExit) and not error.code:   # also sys.exit()
            return "COMPLETE" if over else "INTERRUPTED", None, None
        if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
            return "INTERRUPTED", None, None
        if isinstance(error, MemoryError):
            return "FAILED", f"not enough memory {error}".rstrip(), FAILED
        return "FAILED", f"{type(error).__name__}: {error}", None

    def _save_the_rest(self):
        """At a normal end that finish(), or a block with no total, makes the last."""
        if self._step is not None:  # finish() and then break
            self.done = self._step + 1
        if self._content and self.done > self.durable:
            self.save(self.done, self._content[0], write=self._content[1])
        newest = self._records.get(self.newest)
        if self._finishing and newest and not newest.get("complete"):
            self._check()
            newest["complete"], self.total = True, self.durable
            append_record(self.out, newest)

    def _say_the_end(self, status, code, error):
        if status == "COMPLETE":
            self.log(f"complete: {self.out} has all {self.total} {self.unit}")
        elif (self.begun or code) and status == "INTERRUPTED" or status == "FAILED" and not code:
            number, saved = _endings.number, self.durable if self.newest else 0
            why = signal.Signals(number).name if number else "before the end"
            if isinstance(error, Exception):    # which Python does not print behind a signal
                why += f", {type(error).__name__} {one_line(error)[:200]}"
            self.log(f"stopped ({why}): {saved} {self.unit} are saved; run the same command again "
                     "to go on")


class Piece:
    """One stretch of the work, start to stop - 1. Iterating counts progress and ends when due."""

    def __init__(self, run, start, stop):
        self.run, self.start, self.stop = run, start, stop
        self.done = self.saved = start      # how far the work got, how far it is saved
        self._inside = False                # in a block that may or may not be done
        self._base = run.done - start       # progress counts work, not places: there may be gaps

    def __iter__(self):
        """Unit by unit."""
        return (first for first, _ in self.blocks(1))

    def blocks(self, size):
        """(first, last + 1) of stretches of at most `size` units."""
        while self.done < self.stop and not (self.done > self.start and self.run.late()):
            self._inside, last = True, min(self.done + int(size), self.stop)
            yield self.done, last
            self._inside, self.done = False, last
            self.run.update(self._base + last)

    def save(self, content):
        """Store what was done as a checkpoint: str, bytes or a function of an open file."""
        if self._inside:    # by break: nobody can tell how much `content` holds
            raise RuntimeError("iterate over a piece to its end; to end early, call run.finish()")
        if self.done > self.saved:
            durable = self.run.durable + self.done - self.start
            suffix = self.run.suffix or ".bin"
            self.run._store(self.start, self.done, durable, suffix, content)
        self.saved = self.done


def map(function, items, out, *, every=1000, workers=1, **options):
    """[function(item) for item in items], in order, kept in the directory `out` as lines of JSON.

    Values are what JSON gives back, and refused if that is another value. workers: processes.
    options: those of Run. A restart with other or more items is refused; that the body of the
    function has changed cannot be told: then take another `out`. A kill repeats max_minutes or
    `every` items at most.
    """
    items = list(items)
    digest = hashlib.sha256()
    for item in items:
        text = as_text(item)
        if re.search(r" at 0x[0-9a-f]+", text):
            raise TypeError(f"{text[:80]}: items need a repr that tells them apart at a restart")
        digest.update(text.encode() + b"\n")
    settings = {"function": getattr(function, "__qualname__", repr(function)),
                "items": len(items), "items_sha256": digest.hexdigest(),
                **options.pop("settings", {})}
    with Run(out, len(items), every=every, suffix=".jsonl", unit=options.pop("unit", "items"),
             settings=settings, **options) as run:
        with contextlib.closing(results_of(function, items, run, int(workers))) as results:
            for piece in run.pieces():
                piece.save("".join([json_line(next(results)) for _ in piece]))
        return [json.loads(line) for name in read_records(run.out) if (run.out / name).exists()
                for line in (run.out / name).read_bytes().splitlines()]


def results_of(function, items, run, workers):
    """The values of all items in the run's gaps, in order."""
    todo = [items[i] for start, stop in run.gaps for i in range(start, stop)]
    if workers == 1:
        for item in todo:
            yield function(item)
        return
    # an executor, since a Pool waits for ever for a worker that was killed
    with concurrent.futures.ProcessPoolExecutor(
            workers, initializer=end_with, initargs=(os.getpid(),)) as pool:
        for at in range(0, len(todo), 1000):    # not all at once: they would wait in memory
            yield from pool.map(function, todo[at:at + 1000])


def end_with(parent):
    """In a worker, which would wait for ever for work from a parent that was killed."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def json_line(value):
    value = value.tolist() if hasattr(value, "tolist") else value
    text = json.dumps(value)
    back = json.loads(text)
    if back != value and repr(back) != repr(value):     # nan is not equal to itself
        raise TypeError(f"{value!r:.80} would come back from JSON as {back!r:.80}: give what JSON "
                        "can hold (lists for tuples, strings as keys)")
    return text + "\n"


# ------------------------------------------------------------------------------------------------
# What a state is in a file: {"state", "random"}, by pickle or torch.save

def torch_here():
    return sys.modules.get("torch") if hasattr(sys.modules.get("torch"), "save") else None


def dump(state, file):
    """Write a state and the random states to an open file; objects by their state_dict()."""
    def kept(item):
        return item.state_dict() if hasattr(item, "load_state_dict") else item
    if inside(state):
        state = ({key: kept(item) for key, item in state.items()} if isinstance(state, dict)
                 else [kept(item) for item in state])
    content = {"state": kept(state), "random": random_states()}
    torch_here().save(content, file) if torch_here() else pickle.dump(content, file, protocol=4)


def undump(file):
    if file.read(2) != b"PK":       # a zip file is torch's
        file.seek(0)
        return pickle.load(file)
    import torch
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=False)


def inside(state):
    """Keys of the items of a tuple, list or dict that have load_state_dict."""
    pairs = (state.items() if isinstance(state, dict) else
             enumerate(state) if isinstance(state, (tuple, list)) else ())
    return [key for key, item in pairs if hasattr(item, "load_state_dict")]


def restored(default, kept):
    """What was kept, put into the objects of `default` that have load_state_dict."""
    if hasattr(default, "load_state_dict"):
        default.load_state_dict(kept)
        return default
    keys = inside(default)
    if not keys:
        return kept
    if isinstance(kept, dict) != isinstance(default, dict) or len(kept) != len(default):
        raise ValueError(f"a {type(default).__name__} of {len(default)} items was asked for, but "
                         f"another thing was saved ({type(kept).__name__})")
    for key in keys:
        default[key].load_state_dict(kept[key])
        kept[key] = default[key]
    if isinstance(default, tuple):
        return default._make(kept) if hasattr(default, "_make") else tuple(kept)
    return kept


def random_states():
    """The states of the generators that programs share: random, and what is imported of others."""
    states, numpy, torch = {"random": random.getstate()}, sys.modules.get("numpy"), torch_here()
    if hasattr(numpy, "random"):
        states["numpy"] = numpy.random.get_state()
    if torch:
        states["torch"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states):
    random.setstate(states["random"])
    if "numpy" in states:
        import numpy
        numpy.random.set_state(states["numpy"])
    if "torch" in states:
        import torch
        torch.set_rng_state(states["torch"])
        if len(states.get("cuda", ())) == torch.cuda.device_count() > 0:
            torch.cuda.set_rng_state_all(states["cuda"])


def plain(value):
    """What is not JSON, as JSON: arrays, dataclasses, paths, sets in order, else its repr."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset)):
        return sorted(as_text(member) for member in value)
    return os.fspath(value) if isinstance(value, os.PathLike) else repr(value)


def as_text(value):
    """A text that tells a value from others and is the same at every start."""
    try:    # made JSON before it is sorted: keys may be of several types
        return json.dumps(json.loads(json.dumps(value, default=plain)), sort_keys=True)
    except (TypeError, ValueError, RecursionError):     # such as keys that are tuples
        return json.dumps(repr(value))


# ------------------------------------------------------------------------------------------------
# The atomic file: temp file, bytes, fsync, rename, fsync of the directory

TEMP_NAME = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


def write_atomic(path, content, before_commit=None, durable=True):
    """Write `content` to `path`: the name holds the old file or the whole new one, in any case.

    content: str, bytes, or a function that writes to the open binary file it is given.
    before_commit(temp_path) runs once the bytes are on the disk and before they have their name.
    durable=False leaves out the slow half: readers still see one whole version, but a power cut
    may bring the last one back. Raises CheckpointError if it cannot be stored; `path` is as it was.
    """
    path, file = Path(path), None
    try:
        file = open_temp(path)
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
        sync_file(file, durable)
        if before_commit:
            before_commit(file.name)
        os.replace(file.name, path)
        if durable:
            sync_directory(path.parent)
        file.close()
    except BaseException as error:
        if file:    # first, so that the space it took counts as free
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            with contextlib.suppress(OSError):
                file.close()
        cause = os_error_behind(error)      # torch and zipfile bury a full disk under their own
        if cause and (cause is error or cause.errno in DISK_FULL):
            raise not_saved(path, cause) from error
        raise


def open_temp(path):
    short = os.fsdecode(os.fsencode(path.name)[:200])
    file = open(path.parent / f".{short}.{os.getpid()}-{os.urandom(4).hex()}.tmp", "x+b")
    with contextlib.suppress(OSError):      # the mark of a living writer: see sweep()
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def sync_file(file, flush_drive):
    file.flush()
    if flush_drive and hasattr(fcntl, "F_FULLFSYNC"):   # macOS: fsync stops at the drive
        with contextlib.suppress(OSError):              # not on this file system
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
    # Never tried twice: after a failed fsync Linux forgets the lost pages, and a second call would
    # report success.
    os.fsync(file.fileno())


def sync_directory(directory):
    """A new name survives a power cut once its directory is synced."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


DISK_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def not_saved(path, error):
    """The CheckpointError of an OSError of writing."""
    words = error.strerror or str(error)
    if error.errno in DISK_FULL:
        disk = os.statvfs(path.parent)
        none = disk.f_files and not disk.f_favail       # each file needs one
        free = "no inodes" if none else f"{disk.f_bavail * disk.f_frsize:,} bytes"
        words += f", {free} are free"
    return CheckpointError(f"{path}: not saved, {words}. All earlier files are intact. Mend that "
                           "and run the same command again: it goes on from there")


def sweep(directory):
    """Remove the temp files of dead writers; those of living ones are locked and left alone."""
    for name in names_in(directory):
        if TEMP_NAME.fullmatch(name):
            with contextlib.suppress(OSError), open(Path(directory) / name, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(file.name)


def os_error_behind(error):
    """The OSError that an exception is, or hides; None if there is none."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


# ------------------------------------------------------------------------------------------------
# Checkpoints: the records are the index. checkpoints.jsonl holds a line a checkpoint, durable
# before the checkpoint has its name: {"name", "start", "stop", "bytes", "sha256", "seal"};
# for a state, start = stop; "complete" is true if finish() ended the work there. The last line of a
# name counts; a checkpoint without a line is not ours.

RECORDS = "checkpoints.jsonl"
CHECKPOINT_NAME = re.compile(r"checkpoint_\d+(\.[A-Za-z0-9_-]+)+(?<!\.tmp)(?<!\.corrupt)")


def names_in(directory):
    try:
        return os.listdir(directory)
    except OSError as error:
        raise unreadable(directory, error) from error


def checkpoints_in(directory):
    """Names of the files that are called like checkpoints, recorded or not."""
    return {name for name in names_in(directory) if CHECKPOINT_NAME.fullmatch(name)}


def read_records(directory):
    """{file name: record} ordered by `start`; torn or altered lines are passed over.

    Raises CheckpointError if the file is there but cannot be read.
    """
    path, records, lines = Path(directory) / RECORDS, {}, []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        pass
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from error
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            record = json.loads(line)
            if record.pop("seal") == crc_of(record):
                records[record["name"]] = record
    return {record["name"]: record for record in sorted(records.values(), key=lambda r: r["start"])}


def crc_of(record):
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def append_record(directory, record):
    # Appended, since rewriting all of it would cost the square of the number of checkpoints. A line
    # that a kill or a full disk has torn is ended first, or the next one would be lost with it.
    line = json.dumps(dict(record, seal=crc_of(record))).encode() + b"\n"
    try:
        with open(directory / RECORDS, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                line = b"\n" + line
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
    except OSError as error:
        raise not_saved(directory / RECORDS, error) from error


def add_checkpoint(directory, records, content, record, read=None):
    """Store a checkpoint: its record is durable before it has its name. read(open file) tries
    first whether a restart could load it."""
    path = directory / record["name"]
    if os.path.lexists(path):
        if record["name"] in records:   # its save was broken off behind the rename: nobody was
            path.unlink()               # told that it is saved
        else:
            set_aside(path, f"it has no line in {RECORDS}")

    def vouch(temp):
        if read:
            try:
                with open(temp, "rb") as file:
                    read(file)
            except Exception as error:
                raise CheckpointError(f"{path}: what was written cannot be loaded again "
                                      f"({type(error).__name__}: {one_line(error)[:300]}). It was "
                                      "not kept; mend what is saved or how it is read") from error
        record.update(bytes=os.path.getsize(temp), sha256=sha256(temp))
        append_record(directory, record)
        records.pop(record["name"], None)
        records[record["name"]] = record
    write_atomic(path, content, before_commit=vouch)


def good_checkpoints(directory, records, newest_only):
    """The records whose files verify, in order; bad ones are set aside. CheckpointError if all are
    bad: then nothing is changed."""
    good, bad, names = [], [], checkpoints_in(directory)
    there = [record for name, record in records.items() if name in names]
    if names and not there:
        bad.append(({"name": RECORDS}, "it is lost, or has no line for a checkpoint that is here"))
    for record in reversed(there):
        problem = problem_with(directory / record["name"], record)
        (bad if problem else good).append((record, problem))
        if newest_only and good:
            break
    if bad and not good:
        words = "; ".join(f"{record['name']}: {problem}" for record, problem in bad)
        raise CheckpointError(f"{directory}: no checkpoint is good ({words}). Nothing was changed; "
                              f"bring back a good copy, or start over: mv {directory} "
                              f"{directory}.old")
    if len(records) > 1 and not there:      # one alone: a kill in the very first save
        warn(f"{directory}: checkpoints were recorded here but none is left; the work starts over")
    for record, problem in bad:
        set_aside(directory / record["name"], problem)
    return [record for record, _ in reversed(good)]


def problem_with(path, record):
    """What is wrong with a file that has a record, in a few words; "" if it is whole.

    Reads every byte. Raises CheckpointError if it cannot be read: that is not damage.
    """
    try:
        size = os.path.getsize(path)
        if size != record["bytes"]:
            return f"{size:,} bytes, should be {record['bytes']:,}"
        return "" if sha256(path) == record["sha256"] else "checksum differs"
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from error


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unreadable(path, error):
    return CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', '') or error!r}). "
                           "That does not make it bad: nothing was changed. Mend that and run the "
                           "same command again")


def set_aside(path, problem):
    """Rename a bad file to *.corrupt, never over another one, and say so."""
    aside, copy = path.with_name(path.name + ".corrupt"), 2
    while os.path.lexists(aside):
        aside, copy = path.with_name(f"{path.name}.{copy}.corrupt"), copy + 1
    try:
        os.rename(path, aside)
        sync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} is bad ({problem}) and cannot be set aside: "
                              f"{error.strerror}. Nothing was lost; mend that") from error
    warn(f"{path}: {problem}. Set aside as {aside.name}; the work it held is done again")


def retain(directory, records, keep):
    """Let go of all but the last `keep` states, once the newest reads back well."""
    names = checkpoints_in(directory)
    there = [name for name in records if name in names]
    if len(there) > keep:
        problem = problem_with(directory / there[-1], records[there[-1]])
        if problem:
            raise CheckpointError(f"{directory / there[-1]}: {problem} when read back; older "
                                  "checkpoints are kept")
        for name in there[:-keep]:
            with contextlib.suppress(OSError):
                (directory / name).unlink()
                del records[name]


def compare_settings(directory, settings, may_grow):
    """(the run's id, run.json's new text or None); others than the checkpoints' are refused."""
    path = directory / "run.json"
    asked = {str(key): json.loads(re.sub(r" at 0x[0-9a-f]+", "", as_text(value)))
             for key, value in settings.items()}
    bind = bool(checkpoints_in(directory))      # without checkpoints nothing binds yet
    before, run_id = None, os.urandom(3).hex()
    try:
        if bind or path.exists():
            kept = json.loads(path.read_bytes())
            before, run_id = dict(kept["settings"]), str(kept["run"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(repr(error))[:200]}), so the "
                              "settings of the run are unknown. Nothing was changed; bring it back "
                              "or use another directory") from error
    differ = []
    for key in sorted(before.keys() | asked.keys()) if bind else ():
        old, new = (json.dumps(one.get(key, "absent"), sort_keys=True) for one in (before, asked))
        grown = (key in may_grow and None not in (before.get(key), asked.get(key))
                 and asked[key] > before[key])
        if old != new and not grown:
            only = " (it may only grow)" if key in may_grow else ""
            differ.append(f"{key} was {old}, asked {new}{only}")
    if differ:
        raise CheckpointError(f"{path}: this run was started with other settings: "
                              f"{'; '.join(differ)}. Nothing was changed; ask for the old settings "
                              "or use another directory", WRONG_SETTINGS)
    new = json.dumps({"run": run_id, "settings": asked}, indent=1) + "\n"
    return run_id, None if before == asked else new


# ------------------------------------------------------------------------------------------------
# The progress: its text and its heartbeat

class Progress:
    """PROGRESS.txt, written at checkpoints and by a heartbeat thread. It reads the run, no more."""

    OURS = ("Status", "Error", "Progress", "Checkpoint", "Elapsed", "Rate", "ETA", "Last update",
            "Heartbeat", "Advanced", "Interval", "Run", "PID", "Host", "Command")

    def __init__(self, run):
        self.run, self.path = run, run.out / "PROGRESS.txt"
        self.before = read_progress(self.path)
        self.began = self.end_expected = self._thread = None
        self.done_before, self._warned = 0, False
        self._wake, self._said = threading.Event(), -1e9
        self.command = shlex.join(getattr(sys, "orig_argv", [sys.executable, *sys.argv]))
        seconds = re.match(r"\d{1,12}", self.before.get("Elapsed", ""))
        self.elapsed_before = int(seconds[0]) if seconds else 0
        run.fields = {key: text for key, text in self.before.items() if key not in self.OURS}

    def begin(self):
        self.began, self.done_before = time.monotonic(), self.run.done
        with contextlib.suppress(OSError):      # so that a full disk takes the word that says so
            (self.run.out / ".reserve").write_bytes(bytes(16384))
        self.write("RUNNING")
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        with contextlib.suppress(RuntimeError):     # no thread to be had: at checkpoints only
            self._thread.start()

    def end(self, status, error):
        """The last word."""
        self._wake.set()
        if self._thread and self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            (self.run.out / ".reserve").unlink()
        self.write(status, error)

    def saved(self):
        """A checkpoint has its name. A piece has its line on stderr; of states the first, then one
        a heartbeat."""
        self.write("RUNNING")
        state = self.run._content is not None
        if not state or self.run.complete or time.monotonic() - self._said >= self.run.heartbeat:
            self._said = time.monotonic()
            rate, eta = self.pace()
            left = "unknown" if eta is None else duration(eta)
            self.run.log(f"{self.run.newest}  {self.counts()}  {rate}  ETA {left}")

    def worked(self):
        """Seconds of this start."""
        return time.monotonic() - self.began if self.began else 0.0

    def counts(self):
        """'12000/30000 samples (40.0%)'. 100% only once the last piece is durable."""
        run = self.run
        if run.total is None:
            return f"{run.done} {run.unit}"
        done = min(run.done, run.total)
        part = "100" if run.complete else f"{min(999, 1000 * done // run.total) / 10:.1f}"
        return f"{done}/{run.total} {run.unit} ({part}%)"

    def pace(self):
        """(rate in words, seconds left or None), by the work of this start."""
        worked = self.worked()
        rate = (self.run.done - self.done_before) / worked if worked else 0.0
        eta = None
        if self.run.complete:
            eta = 0
        elif self.end_expected is not None:
            eta = max(0, self.end_expected - time.monotonic())
        elif rate > 0 and self.run.total is not None:
            eta = max(0, self.run.total - self.run.done) / rate
        return f"{rate:.{1 if rate >= 1 or not rate else 4}f} {self.run.unit}/s", eta

    def write(self, status, error=None):
        run, wall, (rate, eta) = self.run, time.time(), self.pace()
        sure = status not in ("INTERRUPTED", "FAILED") and eta is not None and eta < 3e9
        lines = {
            "Status": status, **({"Error": error} if error else {}),
            "Progress": self.counts(),
            "Checkpoint": f"{run.durable} ({run.newest})" if run.newest else "none",
            "Elapsed": f"{int(self.elapsed_before + self.worked())} s",
            "Rate": rate,
            "ETA": f"{eta:.0f} s ({utc(wall + eta)})" if sure else "unknown",
            "Last update": utc(wall),
            "Heartbeat": int(wall),
            # on the steady clock: a jump of the wall clock cannot make it later
            "Advanced": int(wall - (time.monotonic() - run.moved)),
            "Interval": f"{run.heartbeat:g} s",
            "Run": run.id, "PID": os.getpid(), "Host": socket.gethostname(),
            "Command": self.command, **run.fields}
        text = [f"{one_line(key)}: {one_line(value)}\n" for key, value in lines.items()]
        try:
            if run._lock.ours():    # else it was moved: what is there now is a successor's
                write_atomic(self.path, "".join([one_line(run.title) + "\n", *text]), durable=False)
        except CheckpointError as trouble:
            if not self._warned:
                self._warned = True
                warn(str(trouble) if run.leaving else
                     f"{trouble} (the work goes on; this is said once)")

    def _beat(self):
        """The heartbeat's thread."""
        run, written, said = self.run, time.monotonic(), False
        while not self._wake.wait(min(0.5, run.heartbeat)):
            if _endings.number and not said:       # the handler itself may do little
                said, again = True, ""
                if signal.SIGINT in run.signals:
                    again = ". Ctrl-C (again) ends at once, with what was saved before"
                say(f"{signal.Signals(_endings.number).name}: the work is being saved{again}")
            now = time.monotonic()
            if now - written >= run.heartbeat:
                stalled = now - run.moved > max(run.stall_after, 10 * run.longest_wait)
                self.write("STALLED" if stalled else "RUNNING")
                written = now
                if stalled and _endings.number:
                    _endings.hurry()


def read_progress(path):
    """{key: value} of a PROGRESS.txt, {} if it cannot be read. The first line of a key counts."""
    try:
        with open(path, "rb") as file:
            lines = file.read(1 << 20).decode(errors="replace").splitlines()[1:]
    except OSError:
        return {}
    found = {}
    for key, colon, value in (line.partition(": ") for line in lines):
        if colon:
            found.setdefault(key, one_line(value))
    return found


def one_line(value):
    return "".join(c if c.isprintable() else " " for c in str(value)[:4000])


def utc(seconds):
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def duration(seconds):
    """Seconds as a person says them: 3 min 20 s."""
    minutes, seconds = divmod(int(min(seconds, 1e12) + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# ------------------------------------------------------------------------------------------------
# One writer a directory

class DirectoryLock:
    """A kernel lock on DIRECTORY/.lock, signed with its holder. It dies with its process.

    flock belongs to the open file: a job that opens and closes .lock itself (to copy its own
    directory) keeps it, and forked children, which would inherit it, close theirs at once.
    Raises CheckpointError, with exit code IN_USE and the holder's name if another one lives.
    """

    def __init__(self, directory):
        self.path = Path(directory) / ".lock"
        try:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            for _ in range(10):     # a second: somebody may be looking
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.1)
            else:
                holder = os.pread(self.file, 500, 0).decode(errors="replace").strip()
                os.close(self.file)
                raise CheckpointError(f"{directory} is in use by {holder or 'another process'}. "
                                      "Nothing was changed; wait for it or stop it (runs.py stop "
                                      f"{directory})", IN_USE)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be made and locked ({error.strerror}). "
                                  "Nothing was changed; mend that or use another directory, on a "
                                  "local file system") from error
        text = f"PID {os.getpid()} on host {socket.gethostname()} since {utc(time.time())}\n"
        with contextlib.suppress(OSError):      # a full disk: the lock holds all the same
            os.ftruncate(self.file, 0)
            os.pwrite(self.file, text.encode(), 0)

    def ours(self):
        """Is the file of that name still the one that we hold?"""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self.path), os.fstat(self.file))
        return False

    def close(self):
        with contextlib.suppress(OSError):
            os.close(self.file)


# ------------------------------------------------------------------------------------------------
# What may end a run from outside: a signal, an exception of the program, its end

class _Endings:
    """Signals become a number while a run works: saving inside a signal handler deadlocks. Runs
    without a block of their own end with the program."""

    def __init__(self):
        self.runs, self.before = [], {}     # that are open; the handlers that were there before
        self.hook = None                    # the sys.excepthook that was there before
        self.number, self.at = None, 0.0    # the signal that asks
        self.mask = threading.local()       # what was blocked before a fork, by thread

    def watch(self, run):
        if self.hook is None:               # the first run of this process
            os.register_at_fork(before=self.before_fork, after_in_parent=self.after_fork,
                                after_in_child=self.in_child)
        if not self.runs:
            self.hook, sys.excepthook = sys.excepthook, self.failed
            atexit.register(self.ended)
        self.runs.append(run)
        self.catch(run.signals)

    def catch(self, signals):
        if threading.current_thread() is threading.main_thread():   # they can only be set there
            for number in signals:
                if number not in self.before and (
                        signal.getsignal(number) is not signal.SIG_IGN):    # nohup ignores SIGHUP
                    self.before[number] = signal.signal(number, self.ask)

    def unwatch(self, run):
        self.runs = [other for other in self.runs if other is not run]
        self.put_back()

    def put_back(self):
        """What was changed in the process and is not needed by a run that is still open, unless
        somebody has changed it again."""
        wanted = {number for run in self.runs for number in run.signals}
        with contextlib.suppress(ValueError):   # left in another thread than it was entered in
            for number in self.before.keys() - wanted:
                if signal.getsignal(number) == self.ask:
                    signal.signal(number, self.before[number] or signal.SIG_DFL)
                del self.before[number]
        if not self.runs:
            self.number = None
            atexit.unregister(self.ended)
            if sys.excepthook == self.failed:
                sys.excepthook = self.hook

    def ask(self, number, frame):
        """The handler of the signals."""
        first, now = self.number is None, time.monotonic()
        if first:
            self.number, self.at = number, now
        if any(run.leaving for run in self.runs):
            return
        if not any(run.busy for run in self.runs):
            raise SystemExit(128 + number)      # nothing is at work that could be saved
        # `timeout -s INT` sends two at once
        if not first and number == signal.SIGINT and now - self.at > 0.3:
            raise KeyboardInterrupt

    def hurry(self):
        """The step at work stalls, such as a pool's, which waits for ever for workers that the same
        signal has killed: leave it."""
        for run in self.runs:
            run.busy = False
        signal.pthread_kill(threading.main_thread().ident, self.number)

    def failed(self, kind, error, trace):
        """sys.excepthook: an exception ends the program."""
        hook, self.hook = self.hook, sys.__excepthook__     # one of the job's may call us again
        code, words = self.end_all(error)
        if code is None:
            return hook(kind, error, trace)
        complain(words)
        raise SystemExit(code)

    def ended(self):
        """At exit: without an exception, or where another sys.excepthook has told it."""
        error = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
        code, words = self.end_all(error)
        if code is not None:    # a signal in the last moment, or a last save that failed: at exit
            complain(words)     # there is no other way to say so
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(code)

    def end_all(self, error):
        ends = [run._end(error) for run in reversed(self.runs)]
        return next((end for end in ends if end[0] is not None), (None, None))

    # A forked child gets the handlers back that were there before, so that Pool.terminate() ends
    # it. A signal that finds it before it has them would be lost, and the pool would wait for ever:
    # so signals wait while a process forks.

    def before_fork(self):
        self.mask.old = signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)

    def after_fork(self):
        main = threading.main_thread()
        if threading.current_thread() is not main:      # such as a pool's, which forks new workers
            for number in signal.sigpending():  # or we would take it, and the main thread sleep on
                signal.pthread_kill(main.ident, number)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask.old)

    def in_child(self):
        for run in self.runs:
            if run._lock:       # it would outlive us in a child
                run._lock = run._lock.close()
        self.runs = []
        self.put_back()
        self.after_fork()


_endings = _Endings()


# ------------------------------------------------------------------------------------------------
# Saying things where nobody may be reading: a stopped terminal, a full pipe must not stop the work

_writers = {}       # a descriptor: the thread that may hang there in our place


def say(line, patience=0):
    """A line on stderr that never holds up the work: while an earlier one hangs, for more than
    `patience` seconds, it is dropped."""
    raw = getattr(getattr(sys.stderr, "buffer", None), "raw", getattr(sys.stderr, "buffer", None))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if type(raw) is not io.FileIO:      # a notebook, a test's capture: its own business
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
            return
        data = (line + "\n").encode(sys.stderr.encoding or "utf-8", errors="replace")
        earlier = _writers.get(raw.fileno())
        if earlier and earlier.is_alive():
            earlier.join(patience)
        if not (earlier and earlier.is_alive()):
            writer = threading.Thread(target=_write, args=(raw.fileno(), data), daemon=True)
            try:
                writer.start()
            except RuntimeError:    # Python is ending, or there is no thread to be had
                return _write(raw.fileno(), data)
            _writers[raw.fileno()] = writer
            writer.join(patience or 0.2)    # in the order of what the job itself prints


def _write(descriptor, data):
    with contextlib.suppress(OSError):      # a closed or full log must not end the work
        while data:
            data = data[os.write(descriptor, data):]


def warn(message):
    say(f"warning: {one_line(message)}")


def complain(error):
    """Why it ended, if that is not None: worth waiting for a slow reader."""
    if error is not None:
        say(f"{Path(sys.argv[0]).name or 'python'}: error: {one_line(error)}", patience=5)


def tell(line):
    """A line of a command's own output, on stdout. A reader that has left (| head -1) is no error;
    a full disk is."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")      # or Python would fail again at its end
        if not isinstance(error, BrokenPipeError):
            raise CheckpointError(f"cannot write the output ({error.strerror})") from None


@contextlib.contextmanager
def one_line_errors():
    """Turn what a person or a machine did wrong into one line on stderr and its exit code."""
    try:
        yield
    except CheckpointError as error:
        words, code = error, error.exit_code
    except OSError as error:
        words, code = f"{error.filename or 'a file'}: {error.strerror or error}", FAILED
    except MemoryError:
        words, code = "not enough memory", FAILED
    except KeyboardInterrupt:
        words, code = "stopped by Ctrl-C", 128 + signal.SIGINT
    else:
        return
    complain(words)
    raise SystemExit(code)


if __name__ == "__main__":
    import runs
    raise SystemExit(runs.main(sys.argv[1:]))
