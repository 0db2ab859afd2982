"""Long jobs that lose minutes of work at most: durable checkpoints, exact restarts, progress.

    import json, checkpointing

    with checkpointing.Run("results", total=1000, every=100, suffix=".json") as run:
        values = run.load(json.load, default=[])
        for i in run.steps(lambda file: file.write(json.dumps(values).encode())):
            values.append(simulate(i))

Kill it at any moment and start it again: it goes on from the newest checkpoint that verifies.
`python checkpointing.py status DIR` says what every run below DIR is doing, `verify DIR` reads
every checkpoint and result. A function over many items is one line: see map().

Promised, on a local Linux or macOS file system:
  1. A file appears under its final name whole or not at all, also after kill -9 or a power cut.
  2. What a restart reads was verified to the last byte. A bad file is set aside, never deleted;
     an older good one is used; if all are bad the run stops instead of starting over. A file that
     cannot be read is not called bad: the run stops and changes nothing.
  3. One writer a directory, by a kernel lock that dies with its process.
  4. An older checkpoint is removed only after the newer one was read back and verified. Nothing
     else is removed.
  5. PROGRESS.txt is one whole version at every moment, and says STALLED when the process lives but
     the work does not move.
  6. A job that forks, uses pools or threads, or writes where nobody reads, behaves as without us.
  7. Exit codes: 0 complete; 1 failed, or left before the end; 2 wrong settings; 75 directory in
     use; 129, 130, 143 stopped by SIGHUP, SIGINT, SIGTERM after saving what was done.
A kill repeats the units since the last checkpoint, their side effects elsewhere included: at most
those of max_minutes and the one in work. Of nested runs the inner one saves when a signal comes.
Not promised: anything on Windows (no fcntl); the lock and durability on network file systems,
which may lie about both; a disk that acknowledges a flush it did not do; checkpoints changed on
purpose (checksums are not signatures).

Standard library only, Python 3.9 on. Copy this one file into your project.
"""
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import opcode
import os
import queue
import re
import shutil
import signal
import socket
import stat
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

FAILED, WRONG_SETTINGS, IN_USE = 1, 2, 75   # exit codes; 75 is EX_TEMPFAIL of sysexits.h
TOO_EARLY = "stopped by Ctrl-C before the work began; nothing was changed"


class CheckpointError(Exception):
    """What went wrong, in one line for a person; `exit_code` is what the process ends with."""

    def __init__(self, message, exit_code=FAILED):
        super().__init__(message)
        self.exit_code = exit_code


# ------------------------------------------------------------------------------------------------
# The run: all that a job's own script needs to know

class Run:
    """A long job in the directory `out`, as a context manager that keeps the promises above.

    total: how many units of work there are; `unit` names them in the progress.
    every: units between checkpoints; one is saved in any case `max_minutes` after the last.
    suffix: of the checkpoints' names, such as .json or .tar.gz.
    settings: what decides the result, kept in run.json; once there are checkpoints, a restart with
    others is refused, naming each that differs. may_grow: those that may be larger than last time.
    first: number of the first unit (pieces only). keep: how many state checkpoints stay.
    unit_bytes: what a unit takes on the disk, about; a disk too small is refused before the work.
    heartbeat: seconds between writes of PROGRESS.txt. stall_after: seconds without an update until
    STALLED (never less than ten times the longest wait between two updates so far).

    Three ways to use it:
      1. load() and steps(): the state is one object, stored whole at each checkpoint.
      2. pieces(): a long list of results, each stretch of it stored once.
      3. a loop of your own: load(), begin(), then update(), due(), save(), leave_if_asked(),
         log(), expect() where they belong. A total or settings that take time to find out are
         given by plan() inside the block, while PROGRESS.txt already shows the run.
    finish() ends any of them early and complete. Errors of the user or the machine end the process
    with one line on stderr and the exit code of the docstring above. Leaving the block before the
    end ends with exit code 1. A `for` over steps() that break or return leaves saves first: the
    step it was in counts as done. Nothing is saved of a step that an exception leaves, after
    sys.exit(), and where something else holds the iterator too (a name, zip, islice), since then
    nobody can tell these apart. Signals are heeded if the main thread begins the work.
    """

    def __init__(self, out, total=None, *, every=100, suffix=".bin", title="Job", unit="steps",
                 settings=None, may_grow=(), first=0, unit_bytes=0, max_minutes=5, heartbeat=30,
                 stall_after=300, keep=3):
        if min(1 if total is None else total, every, keep) < 1 or min(max_minutes, heartbeat) <= 0:
            raise ValueError("total, every, keep, max_minutes and heartbeat must be positive")
        self.out = Path(out).absolute()   # the job may change its directory
        self.every, self.first, self.keep = int(every), first, keep
        self.settings, self.may_grow, self.unit_bytes = dict(settings or {}), may_grow, unit_bytes
        self.max_seconds = max_minutes * 60
        self.store = Store(self.out, suffix)
        self.progress = Progress(self.out, total, title, unit, heartbeat, stall_after)
        self.blame = ""             # what failed, if the job knows it better than the exception
        self._lock = None           # held from __enter__ to __exit__
        self._process = None        # the one that entered; a forked child of it has no say
        self.begun = False          # from begin() on, files change
        self._finishing = False     # finish() was called
        self._left_step = None      # (number, write) of the step that break left
        self._looked = False        # load() or pieces() has found out where the work stands
        self._run_json = None       # what run.json is to say, if it does not yet
        self._saved_at = time.monotonic()

    total = property(lambda self: self.progress.total)
    done = property(lambda self: self.progress.done, doc="units worked on, now or before")
    durable = property(lambda self: self.progress.durable, doc="units that survive a kill")
    stopping = property(lambda self: _stop.number, doc="the signal that asked to stop, or None")

    # -- 1. the state is one object

    def load(self, read, default=None):
        """read(open binary file) of the newest checkpoint that verifies, or `default`.

        `read` must read all it needs (of np.load, every array): the file is closed behind it. If
        all is complete already, steps() yields nothing: what the loop's body would have set is not.
        """
        self._must_be_ours()
        self._looked = True
        good = self.store.good(newest_only=True, length=lambda path: 0)
        if not good:
            if len(self.store.records) > 1:   # one alone: a kill in the very first save
                warn(f"{self.out}: checkpoints were recorded here but none is left; the work "
                      "starts over")
            return default
        number, _, path = good[0]
        complete = self.store.records.get(path.name, {}).get("complete")
        if complete is True or complete == self.total:
            self.progress.total = number   # finish() has said so, or the last step led beyond
        self._found(number, path)
        try:
            with open(path, "rb") as file:
                return read(file)
        except Exception as error:
            raise CheckpointError(f"{path} is whole but cannot be loaded: {type(error).__name__}: "
                                  f"{error}. Nothing was changed") from error

    def steps(self, write):
        """Numbers of the steps to do; write(open binary file) stores the state when it is due.

        `write` is tried once after the first step, too: what cannot be stored shows at once.
        With a pool: zip(run.steps(write), pool.imap(f, items[run.done:])), in this order, and
        workers that ignore SIGINT: Pool(initializer=signal.signal, initargs=(SIGINT, SIG_IGN)).
        """
        self.begin()
        if self._left_step:
            raise RuntimeError(f"step {self.done} was left by break: leave the Run's block, too")
        return self._steps(write)

    # -- 2. a long list of results, piece by piece

    def pieces(self, length=None):
        """The Pieces that no good checkpoint holds yet, in order, each at most `every` units long.

        A Piece is iterated (or its blocks() are), then saved. length(path) says how many units a
        checkpoint holds whose record was lost; without it such a file is set aside.
        """
        return self._pieces(self._uncovered(length))

    # -- 3. a loop of your own

    def plan(self, total=None, settings=None):
        """Give the total and the settings where __init__ did not know them; before load()."""
        if total is not None:
            if total < 1:
                raise ValueError("total must be positive")
            self.progress.total = int(total)
        if settings is not None:
            self.settings = dict(settings)
        bind = bool(find_checkpoints(self.out))   # before the first checkpoint nothing binds
        self.progress.id, self._run_json = compare_settings(self.out, self.settings, self.may_grow,
                                                            bind)

    def begin(self):
        """There is work to do: from here on files change. steps() and pieces() call it."""
        if self.begun:
            return
        self._must_be_ours()
        ours = self.store.records
        if not self._looked and any(p.name in ours for _, p in find_checkpoints(self.out)):
            raise RuntimeError(f"{self.out} holds checkpoints: call load() (or pieces()) first")
        wanted, free = int((self.total - self.durable) * self.unit_bytes), free_bytes(self.out)
        if 0 <= free < wanted:
            raise CheckpointError(f"{self.out}: this run needs about {wanted:,} bytes more, "
                                  f"{free:,} are free. Make room, then run the same command again")
        if self._run_json:
            write_atomic(self.out / "run.json", self._run_json)
        self.store.forget_what_is_gone()
        _stop.watch(self)
        self.begun = True
        self.progress.begin()
        self._saved_at = time.monotonic()

    def update(self, done, **fields):
        """The work has moved: `done` units so far. No I/O, less than a microsecond: call it often.

        fields become lines of their own in PROGRESS.txt: update(7, Epoch="3/10"). ValueError if one
        has the name of a line that is there already, such as PID.
        """
        progress, now = self.progress, time.monotonic()
        if now - progress.moved > progress.longest_wait:
            progress.longest_wait = now - progress.moved
        progress.moved = now
        progress.done = done
        if fields:   # a new dict: the heartbeat may be reading the old one
            if not fields.keys().isdisjoint(progress.OURS):
                raise ValueError(f"{', '.join(progress.OURS)} have their own meaning: take another "
                                 "name for this line")
            progress.fields = {**progress.fields, **fields}

    def due(self):
        """Is it time to save: max_minutes after the last time, or when asked to stop or finish?"""
        late = time.monotonic() - self._saved_at > self.max_seconds
        return late or self._finishing or _stop.number is not None

    def save(self, number, write):
        """Store the state after `number` units as checkpoint_<number>, then let go of the oldest.

        write: str, bytes or a function of an open binary file. Raises CheckpointError if it cannot
        be stored; what was saved before is then untouched, and saving may be tried again. So the
        number must grow from save to save: count batches if you save within an epoch.
        """
        number = int(number)   # perhaps numpy's
        if self.store.newest == self.store.name(number):
            if self.progress.moved <= self._saved_at:
                return   # nothing has happened since
            raise CheckpointError(f"{self.out}: save({number}) came again after more work, and a "
                                  "checkpoint is never overwritten. What it holds is safe; count "
                                  "something that grows from save to save, such as batches")
        self._save(number, number, number, write)
        self.store.retain(self.keep)

    def leave_if_asked(self):
        """Exit with 128 + signal if a signal came and all that was done is saved.

        A signal that falls between due() and this finds unsaved work: then the next due() is true.
        """
        if _stop.number is not None and self.done <= self.durable and not self._complete():
            raise SystemExit(128 + _stop.number)

    def finish(self):
        """The work is complete before its total, as when a search has found its answer."""
        self._finishing = True

    def expect(self, seconds):
        """Say how long the rest will take, for the ETA, where the rate so far misleads."""
        self.progress.expected = (seconds, time.monotonic())

    def log(self, line):
        """A line on stdout, out of the bar's way; dropped if nobody reads, never waited for."""
        self.progress.log(line)

    # -- behind them: nothing below needs to be known to use it

    def _steps(self, write):
        untried = not self.store.newest
        while self.done < self.total and not self._finishing:
            self.leave_if_asked()
            try:
                yield self.done
            except GeneratorExit:
                with contextlib.suppress(ValueError):   # Python is ending: there is no frame
                    if left_by_break(sys._getframe(1)):
                        self._left_step = (self.done + 1, write)
                raise
            self.update(self.done + 1)
            due = self.done % self.every == 0 or self.done >= self.total or self.due()
            if due and self.durable < self.done:   # else the loop's body has saved it
                self.save(self.done, write)
            elif untried:   # what cannot be stored shows at the first step, not in an hour
                self.store.rehearse(write)
            untried = False

    def _save_left_step(self):
        """Save what a loop left by break has done; the step it stood in counts as done."""
        if self._left_step:
            (number, write), self._left_step = self._left_step, None
            self.update(number)
            self.save(number, write)

    def _pieces(self, gaps):
        if gaps:
            self.begin()
        for start, stop in gaps:
            while start < stop and not self._finishing:
                self.leave_if_asked()
                cut = min(stop, start - start % self.every + self.every)   # as undisturbed
                piece = Piece(self, start, cut)
                yield piece
                if piece.done == start or piece.saved != piece.done:
                    raise RuntimeError(f"piece {start} to {cut - 1}: iterate over it (or over its "
                                       "blocks) and call its save() before you ask for the next")
                start = piece.done
        self.leave_if_asked()

    def _uncovered(self, length):
        """[(start, stop)] of the gaps between the good checkpoints."""
        self._must_be_ours()
        self._looked = True
        good = self.store.good(length=length)
        self.store.warn_of_what_is_gone({path.name for _, _, path in good})
        if any(self.store.records.get(path.name, {}).get("complete") for _, _, path in good):
            self.progress.total = good[-1][1] - self.first   # finish() has said so
        at, end, gaps = self.first, self.first + self.total, []
        for start, stop, path in good:
            if start < at or stop > end:
                raise CheckpointError(f"{path}: holds {start} to {stop - 1}, which overlaps its "
                                      f"neighbour or lies outside {self.first} to {end - 1}. "
                                      "Nothing was changed; is it from another run?")
            gaps.append((at, start))
            at = stop
        held = sum(stop - start for start, stop, _ in good)
        self._found(held, good[-1][2] if good else None)
        gaps.append((at, end))
        return [(start, stop) for start, stop in gaps if start < stop]

    def _save(self, start, stop, durable, content):
        self._must_be_ours()
        beyond = durable > self.total   # a last step that led further than was asked
        self.store.add(start, stop, content, self.progress.elapsed(),
                       complete=self._finishing or beyond and self.total)
        self._saved_at = time.monotonic()
        self.progress.durable = durable
        if self._finishing or beyond:
            self.progress.total = durable
        self.progress.show_checkpoint(self.store.newest)

    # -- entering and leaving

    def __enter__(self):
        if self._process:
            raise RuntimeError("this Run was entered before; make a new one")
        with one_line_errors():
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                bad_name = error.errno in (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG)
                raise CheckpointError(f"{self.out}: cannot make this directory ({error.strerror})",
                                      WRONG_SETTINGS if bad_name else FAILED) from None
            self._lock = DirectoryLock(self.out)
            try:
                sweep(self.out)
                self.store.records = read_records(self.out)
                self.progress.remember(self.store.records)
                if self.total is not None:
                    self.plan()
                else:
                    self.progress.announce()
            except BaseException as error:
                self.progress.take_back()
                self._lock.release()
                if isinstance(error, KeyboardInterrupt):
                    raise CheckpointError(TOO_EARLY, 128 + signal.SIGINT) from None
                raise
        self._process = os.getpid()
        return self

    def __exit__(self, kind, error, trace):
        if os.getpid() != self._process:
            return   # a forked child leaves its copy of the block: the run is its parent's
        if sys.is_finalizing():   # a generator held the run: Python can do no more, as in a kill
            self._lock.release()
            return
        _stop.leaving.append(self)
        try:
            try:
                if kind in (None, GeneratorExit) and self.begun:
                    self._end_early()
            except CheckpointError as trouble:
                kind, error = CheckpointError, trouble
            status, line, code = self._verdict(kind, error)
            if status == "COMPLETE" and not self.begun and not self.progress.says_complete():
                self.begin()   # killed between the last checkpoint and the last word
            if self.begun or (status == "FAILED" and code != WRONG_SETTINGS):
                self.progress.end(status, line)
            else:
                self.progress.take_back()
            if status == "COMPLETE" and kind is None and _stop.number:
                code = 128 + _stop.number   # it came while the last word was written
        finally:
            _stop.leaving.remove(self)
            self._lock.release()
            self._lock = None
            _stop.unwatch(self)
        self._say_the_end(status, kind, error)
        if code is not None:
            raise SystemExit(code) from None

    def _end_early(self):
        """The block was left without an error: save what break cut short, and seal finish()."""
        self._save_left_step()
        if self._finishing and not self._complete():
            if self.done > self.durable:
                raise CheckpointError(f"{self.out}: finish() came, but {self.done - self.durable} "
                                      f"{self.progress.unit} were not saved: save, then leave")
            self.store.mark_complete()
            self.progress.total = self.durable

    def _complete(self):
        return self.total is not None and self.durable >= self.total

    def _verdict(self, kind, error):
        """(status, None if nothing happened; the Error line; exit code, None for as it is)"""
        if kind is KeyboardInterrupt:
            return ("COMPLETE" if self._complete() else "INTERRUPTED"), None, 128 + signal.SIGINT
        if kind in (None, GeneratorExit, SystemExit) and self._complete():
            late = kind is None and _stop.number   # too late to stop the run, not what comes after
            return "COMPLETE", None, 128 + _stop.number if late else None
        if kind in (None, GeneratorExit) or kind is SystemExit and error.code in (None, 0):
            if not self.begun:
                return None, None, None
            return "INTERRUPTED", None, None if kind is GeneratorExit else FAILED
        if kind is SystemExit and error.code in (129, 130, 143):
            return "INTERRUPTED", None, None
        if kind is CheckpointError:
            return "FAILED", str(error), error.exit_code
        blame = f"{self.blame}: " if self.blame else ""
        return "FAILED", f"{blame}{kind.__name__}: {error}", None

    def _say_the_end(self, status, kind, error):
        saved = f"{self.durable}/{self.total} {self.progress.unit} are saved"
        if kind is CheckpointError:
            _complain(error)
        elif status == "COMPLETE":
            self.log(f"complete: {self.out} has all {self.total} {self.progress.unit}")
        elif kind is KeyboardInterrupt and not self.begun:
            _complain(TOO_EARLY)
        lost = self.done - self.durable
        again = f", {lost} are done again" if lost > 0 else ""
        if status == "INTERRUPTED" and self.begun:
            by = signal.Signals(_stop.last).name if _stop.last else "the program itself"
            self.log(f"stopped by {by}: {saved}{again}; run the same command again to go on")
        elif status == "FAILED" and self.begun and kind is not CheckpointError:
            blame = f" at {self.blame}" if self.blame else ""
            warn(f"{self.out}: failed{blame} with {kind.__name__}: {saved}{again} when the same "
                  "command is run again")

    def _found(self, done, path):
        """Where the work stands, from the checkpoints on the disk."""
        if done > self.total:
            raise CheckpointError(f"{path}: {done} {self.progress.unit} are done here already, "
                                  f"more than the {self.total} asked for. Nothing was changed; ask "
                                  f"for at least {done}", WRONG_SETTINGS)
        self.progress.done = self.progress.durable = done
        self.store.newest = self.progress.newest = path.name if path else None

    def _must_be_ours(self):
        if self._lock is None:
            raise RuntimeError("a Run works inside its block: with checkpointing.Run(...) as run:")
        if self.total is None:
            raise RuntimeError("the total is not known yet: give it to Run, or call plan()")
        if self._process not in (None, os.getpid()):
            raise CheckpointError(f"{self.out}: a forked child cannot save; only process "
                                  f"{self._process}, which entered the run, can")
        if not self._lock.held():   # the job has closed our file, as daemons close all
            self._lock.release()
            self._lock = DirectoryLock(self.out)
        if not self._lock.is_of(self.out):
            raise CheckpointError(f"{self.out} was moved or replaced while this run worked in it. "
                                  "Nothing was saved in the new one; move the old one back")


def left_by_break(frame):
    """Does `frame` leave its loop by break or return? Both drop the loop's iterator by an
    instruction of their own; an exception and an iterator's end do it elsewhere, or (Python 3.14)
    by one that follows END_FOR."""
    code, at = frame.f_code.co_code, frame.f_lasti
    before = opcode.opname[code[at - 2]] if at > 1 else ""
    return opcode.opname[code[at]] in ("POP_TOP", "POP_ITER") and before != "END_FOR"


class Piece:
    """One stretch of the work, start to stop - 1. Iterating counts progress and ends when due."""

    def __init__(self, run, start, stop):
        self.run, self.start, self.stop = run, start, stop
        self.done = self.saved = start   # how far the work got, how far it is saved
        self._asked = start              # the end of the block that the loop's body is in
        self._base = run.done - start    # progress counts work, not places: there may be gaps

    def __iter__(self):
        """Unit by unit."""
        return (first for first, _ in self.blocks(1))

    def blocks(self, size):
        """(first, last + 1) of stretches of at most `size` units."""
        while self.done < self.stop and not (self.done > self.start and self.run.due()):
            self._asked = min(self.done + size, self.stop)
            yield self.done, self._asked
            self._did(self._asked)

    def _did(self, stop):
        self.done = stop
        self.run.update(self._base + stop)

    def save(self, content, stop=None):
        """Store what was done as a checkpoint: str, bytes or a function of an open file.

        A unit or block that was left by break counts as done. stop: the end of what `content`
        holds, if that is less than the iteration asked for.
        """
        stop = self._asked if stop is None else stop
        if stop != self.done:
            self._did(stop)
        if self.done > self.start:
            durable = self.run.durable + self.done - self.start
            self.run._save(self.start, self.done, durable, content)
        self.saved = self.done


def map(function, items, out, *, every=1000, **options):
    """[function(item) for item in items], in order, each result kept in the directory `out`.

    A checkpoint holds up to `every` results as lines {"item", "value"} of JSON, so values are what
    JSON gives back (a tuple becomes a list), also at the first run. At a restart the items must be
    the same, as far as JSON or their repr tells them; more may be added at the end. options: those
    of Run, but for first and suffix. A function is known by its name, a partial by its arguments
    too.
    An item that fails is named, what was done is saved, and its exception goes on.
    """
    items, lines = list(items), []
    texts = [_as_json(item) for item in items]   # now: the function may change an item
    if not items:
        return []
    plain = getattr(function, "func", function)   # of a functools.partial
    name = getattr(plain, "__qualname__", type(plain).__name__)
    if plain is not function:
        name += _as_json([function.args, function.keywords])
    with Run(out, len(items), every=every, suffix=MAPPED, unit=options.pop("unit", "items"),
             settings={"function": name, "items": len(items), **options.pop("settings", {})},
             may_grow=("items",), **options) as run:
        todo = run.pieces()
        _kept_values(run.store, texts)   # other items are refused before they are worked on
        for piece in todo:
            lines.clear()
            try:
                for i in piece:
                    value = json.dumps(function(items[i]))
                    lines.append(f'{{"item": {texts[i]}, "value": {value}}}\n')
            except Exception:
                piece.save("".join(lines), stop=piece.start + len(lines))
                run.blame = f"item {i} ({_one_line(items[i], repr)[:80]})"
                raise
            piece.save("".join(lines))
        return _kept_values(run.store, texts)


def _kept_values(store, texts):
    values = []
    for number, path in store.found():
        for i, kept in enumerate(_kept_lines(path), number):
            was = json.dumps(kept["item"], sort_keys=True)
            if i >= len(texts) or was != texts[i]:
                raise CheckpointError(f"{path}: item {i} was {was} when this "
                                      "was made, and is another one now. Nothing was changed; "
                                      "bring back the old ones or use another directory",
                                      WRONG_SETTINGS)
            values.append(kept["value"])
    return values


MAPPED = ".jsonl"


def _kept_lines(path):
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    if not all(isinstance(line, dict) and line.keys() == {"item", "value"} for line in lines):
        raise ValueError("not the results of map()")
    return lines


def _as_json(item):
    """A text that tells an item from others and is the same at every start."""
    try:
        return json.dumps(json.loads(json.dumps(item, default=_plain)), sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(_repr(item))


def _plain(item):
    """What is not JSON, as JSON: a path's name, numbers of NumPy, a set's members in order."""
    if isinstance(item, os.PathLike):
        return os.fsdecode(item)
    if isinstance(item, (set, frozenset)):
        return sorted(_as_json(member) for member in item)
    return item.tolist() if hasattr(item, "tolist") else _repr(item)


def _repr(item):
    """Its repr, without the address that differs from start to start."""
    return re.sub(r"\bat 0x[0-9a-fA-F]+", "", _one_line(item, repr))


# ------------------------------------------------------------------------------------------------
# The atomic file: each step of the protocol is a method, in their order

class AtomicFile:
    """A temp file beside `path` that becomes `path` by commit(), or nothing by roll_back()."""

    TEMP_NAME = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")

    def __init__(self, path):
        self.path = Path(path)
        self.file = self.temp = None

    def open(self):
        # The lock tells a living writer's file from a dead one's (see sweep), also where PIDs are
        # reused. A sweeper may remove it between open and lock: then another one is made.
        while True:
            short = os.fsdecode(os.fsencode(self.path.name)[:200])
            name = f".{short}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
            temp = str(self.path.parent / name)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self.file, self.temp = open(os.open(temp, flags, 0o666), "w+b"), temp
            with contextlib.suppress(OSError):   # no flock here: the sweeper has none either
                fcntl.flock(self.file, fcntl.LOCK_EX)
            if os.fstat(self.file.fileno()).st_nlink:
                return self.file
            self.file.close()

    def sync(self, flush_drive=True):
        self.file.flush()
        if flush_drive and hasattr(fcntl, "F_FULLFSYNC"):   # macOS: fsync stops at the drive
            try:
                fcntl.fcntl(self.file.fileno(), fcntl.F_FULLFSYNC)
                return
            except OSError:
                pass   # not on this file system
        # Never tried twice: after a failed fsync Linux forgets the lost pages, and a second call
        # would report success.
        os.fsync(self.file.fileno())

    def commit(self, durable=True):
        os.replace(self.temp, self.path)
        if durable:
            sync_directory(self.path.parent)

    def roll_back(self):
        self.close()
        if self.temp:
            with contextlib.suppress(OSError):
                os.unlink(self.temp)

    def close(self):
        if self.file:
            with contextlib.suppress(OSError):   # what failed to be written was reported already
                self.file.close()


def write_atomic(path, content, before_commit=None, durable=True):
    """Write `content` to `path`: the name holds the old file or the whole new one, in any case.

    content: str, bytes, or a function that writes to the open binary file it is given. The file
    gets the umask's mode. before_commit(temp_path) runs once the bytes are on the disk and before
    they have their name. durable=False leaves out the slow half (the drive's own cache on a Mac,
    the directory): readers still see one whole version, but a power cut may bring the last back.
    Raises CheckpointError when the bytes cannot be stored; `path` is then as it was.
    """
    atomic = AtomicFile(path)
    try:
        _fill(atomic.open(), content)
        atomic.sync(durable)
        if before_commit:
            before_commit(atomic.temp)
        atomic.commit(durable)
    except BaseException as error:
        wanted = _bytes_wanted(atomic.file, content)
        atomic.roll_back()   # first, so that the space it took counts as free
        cause = os_error_behind(error)   # torch and zipfile bury a full disk under their own
        if isinstance(error, OSError) or (cause and cause.errno in DISK_FULL):
            raise CheckpointError(_explain(cause, Path(path), wanted)) from error
        raise
    finally:
        atomic.close()


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _fill(file, content):
    if callable(content):
        if hasattr(content(file), "__await__"):
            raise TypeError("the function that writes must not be async")
    else:
        file.write(content.encode() if isinstance(content, str) else content)


def _bytes_wanted(file, content):
    if not callable(content):
        return f"{len(content.encode() if isinstance(content, str) else content):,}"
    with contextlib.suppress(Exception):   # a function's size: it got at least this far
        return f"more than {file.tell():,}"
    return "some"


def os_error_behind(error):
    """The OSError that an exception is, or hides; None if there is none."""
    seen = []
    while error is not None and error not in seen:
        if isinstance(error, OSError):
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


def _explain(error, path, wanted):
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        return (f"{path}: not saved, {reason}: wanted {wanted} bytes, {free_bytes(path.parent):,} "
                "free. All earlier files are intact. Make room and run the same command again: it "
                "goes on from there")
    return (f"{path}: cannot write ({reason}). All earlier files are intact. Mend that and run the "
            "same command again")


def sync_directory(directory):
    """A new name survives a power cut once its directory is synced."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(directory):
    """Bytes an ordinary user may still write to this file system; -1 if that cannot be told."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(directory).free
    return -1


def sweep(directory):
    """Remove the temp files of dead writers; those of living ones are locked and left alone."""
    for name in os.listdir(directory):
        if AtomicFile.TEMP_NAME.fullmatch(name):
            path = Path(directory) / name
            with contextlib.suppress(OSError), open_regular(path) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)


def open_regular(path):
    """Open for reading, never waiting: a pipe in the place of a file is an OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


# ------------------------------------------------------------------------------------------------
# Is a file the one that was written? A checkpoint has a record of its SHA-256. A lasting result
# carries its own, so that it can be checked alone, on any copy, taken at any moment.

SEAL = b"sha256:"
# What follows its 64 digits: in a zip, in a JSON object, in one that has lost its last byte.
BEHIND_SEAL = (b"", b'"\n}\n', b'"\n}')


def write_sealed(path, content, note=""):
    """Write a lasting result that vouches for itself: a zip-based file (.npz, .pt), a JSON object.

    Its last bytes name the SHA-256 of the file, taken with those 64 digits as zeros: at the end of
    a zip's comment, where np.load and torch.load do not look, or as the last member "seal" of the
    JSON object. note: words to keep in a zip's comment (see note_of). content: see write_atomic.
    """
    def sealed(file):
        _fill(file, content)
        _seal(file, note)
    write_atomic(path, sealed)


def _seal(file, note):
    file.flush()
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 22))
    tail = file.read()
    blank = SEAL + b"0" * 64
    if len(tail) == 22 and tail.startswith(b"PK\5\6") and tail.endswith(b"\0\0"):
        comment = (note + " ").encode() + blank if note else blank
        file.seek(size - 2)
        file.write(len(comment).to_bytes(2, "little") + comment)
        digits = size + len(comment) - 64
    else:
        file.seek(0)
        body = file.read().rstrip()
        try:
            assert isinstance(json.loads(body), dict)
        except (ValueError, AssertionError):
            raise ValueError("only a zip-based file without a comment or a JSON object can be "
                             "sealed") from None
        body = body[:-1].rstrip()
        body += b'\n "seal": "' if body.endswith(b"{") else b',\n "seal": "'
        file.seek(0)
        file.truncate()
        file.write(body + blank + b'"\n}\n')
        digits = len(body) + len(SEAL)
    file.flush()
    digest = _sha256(file, digits)
    file.seek(digits)
    file.write(digest.encode())


def note_of(path):
    """The note in the comment of a sealed zip-based file; "" if there is none."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            note, found, _ = archive.comment.rpartition(SEAL)
    except (OSError, zipfile.BadZipFile):
        return ""
    return note.decode(errors="replace").strip() if found else ""


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return _sha256(file)


def _sha256(file, blank=None):
    """Of a whole open file; the 64 bytes from `blank` on count as zeros ("0")."""
    file.seek(0)
    digest, at = hashlib.sha256(), 0
    while block := file.read(1 << 20):
        if blank is not None and at < blank + 64 and at + len(block) > blank:
            low, high = max(blank - at, 0), min(blank + 64 - at, len(block))
            block = block[:low] + b"0" * (high - low) + block[high:]
        digest.update(block)
        at += len(block)
    return digest.hexdigest()


def problem_with(path, record=None):
    """None if the file at `path` is whole, else what is wrong with it, in a few words.

    Reads every byte: against its record, else against its own seal; an unsealed zip-based file is
    checked by the CRCs of its members, and any other format cannot be vouched for.
    Raises CheckpointError if it cannot be read: that is not damage.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if record:
                if size != record["bytes"]:
                    return f"{size:,} bytes, should be {record['bytes']:,}"
                return None if _sha256(file) == record["sha256"] else "checksum differs"
            if size == 0:
                return "empty"
            file.seek(max(0, size - 100))
            tail = file.read()
            for behind in BEHIND_SEAL:
                at = len(tail) - len(behind) - 64
                tag, digits = tail[max(0, at - len(SEAL)):at], tail[at:at + 64]
                if sum(a == b for a, b in zip(tag, SEAL)) >= 6:   # a damaged one is one, too
                    good = tag == SEAL and digits == _sha256(file, size - len(tail) + at).encode()
                    return None if good else "checksum differs"
            return _problem_of_unsealed(file, size)
    except (OSError, MemoryError) as error:
        raise _unreadable(path, error) from error


UNVOUCHED = "no checksum of it is recorded, and it is not a zip-based file"


def _problem_of_unsealed(file, size):
    file.seek(0)
    if file.read(2) != b"PK":
        return UNVOUCHED
    while file.read(1 << 20):   # zipfile would take an error of reading for damage
        pass
    try:
        with zipfile.ZipFile(file) as archive:
            bad, comment = archive.testzip(), len(archive.comment)
    except (OSError, MemoryError):
        raise
    except Exception as error:   # zipfile raises a dozen types on damaged bytes
        return f"damaged zip ({str(error) or type(error).__name__})"
    file.seek(max(0, size - 22 - comment))
    end = file.read(22)
    if not end.startswith(b"PK\5\6") or int.from_bytes(end[20:], "little") != comment:
        return "damaged zip (its end is cut off)"
    return f"member {bad} fails its CRC" if bad else None


def _unreadable(path, error):
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return CheckpointError(f"{path}: cannot be read ({reason}). That does not make it bad: nothing "
                           "was changed. Mend that and run the same command again")


# ------------------------------------------------------------------------------------------------
# The store: names, records, verification, setting aside, retention.
# checkpoints.jsonl holds a line a checkpoint, durable before the checkpoint has its name:
# {"name", "start", "stop", "bytes", "sha256", "elapsed", "seal"}; for a state, start = stop;
# "complete" is true if finish() ended the work there, or the total that its last step led beyond.

RECORDS = "checkpoints.jsonl"
RECORD = {"name", "start", "stop", "bytes", "sha256"}
CHECKPOINT_NAME = re.compile(r"checkpoint_(\d+)((?:\.[A-Za-z0-9_-]+)+)(?<!\.tmp)(?<!\.corrupt)")


def find_checkpoints(directory):
    """[(number, path)] of the files named checkpoint_<integer>.<ext>, ordered as numbers."""
    found = []
    try:
        for entry in os.scandir(directory):
            match = CHECKPOINT_NAME.fullmatch(entry.name)
            if match and entry.is_file():
                found.append((int(match[1]), Path(directory) / entry.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(directory, error) from error
    return sorted(found)


def read_records(directory):
    """{file name: record}, in the order they were written; torn or altered lines are passed over.

    Raises CheckpointError if the file is there but cannot be read.
    """
    path, records = Path(directory) / RECORDS, {}
    try:
        with open_regular(path) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return records
    except (OSError, MemoryError) as error:
        raise _unreadable(path, error) from error
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            record = json.loads(line)
            whole = record.pop("seal") == _crc(record) and record.keys() >= RECORD
            if whole:
                records.pop(record["name"], None)
                records[record["name"]] = record
    return records


def _crc(record):
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _record_line(record):
    return json.dumps(dict(record, seal=_crc(record))) + "\n"


class Store:
    """The checkpoints of one directory."""

    def __init__(self, out, suffix):
        if not CHECKPOINT_NAME.fullmatch(f"checkpoint_0{suffix}") or len(suffix) > 100:
            raise ValueError(f"suffix {suffix!r} is none: it must be short, like .json or .tar.gz, "
                             "and not end in .tmp or .corrupt")
        self.out, self.suffix = out, suffix
        self.records, self.newest = {}, None   # {name: record}; the name of the newest checkpoint

    def name(self, number):
        return f"checkpoint_{number:05d}{self.suffix}"

    def found(self):
        """[(number, path)] of our suffix. Raises CheckpointError if there are only others."""
        every = find_checkpoints(self.out)
        ours = [(n, p) for n, p in every if CHECKPOINT_NAME.fullmatch(p.name)[2] == self.suffix]
        if every and not ours:
            raise CheckpointError(f"{every[-1][1]}: the checkpoints here do not end in "
                                  f"{self.suffix}, which this run asks for. Nothing was changed; "
                                  "ask for the old suffix or use another directory", WRONG_SETTINGS)
        return ours

    def good(self, newest_only=False, length=None):
        """[(start, stop, path)] of the checkpoints that verify, in order; bad ones are set aside.

        length(path): units in a checkpoint without a record. If all are bad nothing is changed and
        CheckpointError is raised.
        """
        good, bad = [], []
        for number, path in reversed(self.found()):
            stop, problem = self._examine(number, path, length)
            if problem:
                bad.append((path, problem))
                continue
            good.append((number, stop, path))
            if newest_only:
                break
        if bad and not good:
            self._refuse_all_bad(bad, newest_only)
        for path, problem in reversed(bad):
            self.set_aside(path, problem)
        return good[::-1]

    def _examine(self, number, path, length):
        """(first number after it, None), or (None, what is wrong with it)."""
        record = self.records.get(path.name)
        problem = problem_with(path, record)
        if problem or record:
            return record and record["stop"], problem
        if not length:
            return None, f"its record in {RECORDS} is lost"
        try:
            return number + length(path), None
        except (OSError, MemoryError) as error:
            raise _unreadable(path, error) from error
        except Exception as error:
            return None, f"cannot be understood ({error})"

    def _refuse_all_bad(self, bad, states):
        names = "; ".join(f"{path.name}: {problem}" for path, problem in bad)
        todo = "bring back a good copy"
        if not any(path.name in self.records for path, _ in bad):
            todo += f" of {RECORDS}"
            program = f"python {os.path.relpath(__file__)} accept"
            if states:
                todo += f", or go on from the newest as it is: {program} {bad[0][0]}"
            elif self.suffix == MAPPED:
                todo += (", or, if this is of map(), take all as they are: "
                         f"{program} {self.out}/checkpoint_*{MAPPED}")
        raise CheckpointError(f"{self.out}: no checkpoint is good ({names}). Nothing was changed; "
                              f"{todo}; or start over: mv {self.out} {self.out}.old")

    def set_aside(self, path, problem):
        """Rename a bad file to *.corrupt, never over another one, and say so."""
        aside, copy = path.with_name(path.name + ".corrupt"), 2
        while os.path.lexists(aside):
            aside, copy = path.with_name(f"{path.name}.{copy}.corrupt"), copy + 1
        try:
            os.rename(path, aside)
            sync_directory(path.parent)
        except OSError as error:
            raise CheckpointError(f"{path} is bad ({problem}) and cannot be set aside: "
                                  f"{error.strerror}") from error
        warn(f"{path}: {problem}. Set aside as {aside.name}; the work it held is done again")

    def warn_of_what_is_gone(self, there):
        # The newest record may stand without its file: a kill between record and rename, no loss.
        # What was set aside has been said.
        for name in list(self.records)[:-1]:
            if name not in there and not os.path.lexists(self.out / f"{name}.corrupt"):
                warn(f"{self.out / name} is gone; the work it held is done again")

    def add(self, start, stop, content, elapsed, complete=False):
        """Store a checkpoint: its record is durable before it has its name."""
        path = self.out / self.name(start)
        if os.path.lexists(path):
            raise CheckpointError(f"{path} exists already, and a checkpoint is never overwritten. "
                                  "If it is not this run's, move it away")

        def record(temp):
            known = {"name": path.name, "start": start, "stop": stop, "elapsed": round(elapsed, 1),
                     "bytes": os.path.getsize(temp), "sha256": sha256(temp)}
            self._append(dict(known, complete=complete) if complete else known)
        try:
            write_atomic(path, content, before_commit=record)
        except CheckpointError:   # the directory's fsync, after the rename: it may be tried again
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        self.newest = path.name

    def mark_complete(self):
        """finish() came after the last save: say so in the newest record."""
        if not self.newest:
            raise CheckpointError(f"{self.out}: finished before anything was saved: save first")
        try:
            self._append(dict(self.records[self.newest], complete=True))
        except OSError as error:
            raise CheckpointError(_explain(error, self.out / RECORDS, "some")) from error

    def _append(self, record):
        # Appended, since rewriting all of it would cost the square of the number of checkpoints. A
        # line that a full disk has torn is cut off again, or the next one would be lost with it.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(self.out / RECORDS, flags, 0o666), "r+b", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, f"{RECORDS} is not a regular file")
            size = file.seek(0, os.SEEK_END)
            torn = size and os.pread(file.fileno(), 1, size - 1) != b"\n"
            line = (b"\n" if torn else b"") + _record_line(record).encode()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), size)
                raise
        self.records.pop(record["name"], None)
        self.records[record["name"]] = record

    def forget_what_is_gone(self):
        """Rewrite the records without torn lines and without files that are no longer there."""
        there = {path.name for _, path in find_checkpoints(self.out)}
        self.records = {name: r for name, r in self.records.items() if name in there}
        lines = "".join(_record_line(record) for record in self.records.values())
        path, same = self.out / RECORDS, False
        try:
            with open_regular(path) as file:
                same = file.read() == lines.encode()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _unreadable(path, error) from error
        if not same:
            write_atomic(path, lines)

    def rehearse(self, write):
        """Write the state once and throw it away."""
        atomic = AtomicFile(self.out / self.name(0))
        try:
            _fill(atomic.open(), write)
            atomic.file.flush()
        except OSError:
            pass   # the disk's troubles are told by the checkpoint that meets them
        finally:
            atomic.roll_back()

    def retain(self, keep):
        """Let go of all but the last `keep` states, once the newest reads back well."""
        mine = [path for _, path in self.found() if path.name in self.records]
        if len(mine) <= keep:
            return
        newest = self.out / self.newest
        problem = problem_with(newest, self.records[newest.name])
        if problem:
            raise CheckpointError(f"{newest}: {problem} when read back; older checkpoints are kept")
        for path in mine[:-keep]:
            with contextlib.suppress(OSError):
                path.unlink()


def compare_settings(out, settings, may_grow, bind):
    """(the run's id, run.json's new text or None); other settings are refused if `bind`."""
    path = out / "run.json"
    asked = json.loads(json.dumps(settings))
    try:
        with open_regular(path) as file:
            kept = json.loads(file.read())
        before, run_id = dict(kept["settings"]), str(kept["run"])
    except FileNotFoundError:
        if bind:
            raise CheckpointError(f"{path} is missing, so the settings of the checkpoints beside "
                                  "it are unknown. Nothing was changed; bring it back or use "
                                  "another directory") from None
        before, run_id = None, os.urandom(3).hex()
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path} cannot be read ({_one_line(error)}). Nothing was changed; "
                              "bring back a good copy or use another directory") from error
    differ = []
    for key in sorted((before or {}).keys() | asked.keys()) if bind else ():
        old, new = before.get(key, "absent"), asked.get(key, "absent")
        if key in may_grow and isinstance(old, (int, float)) and isinstance(new, (int, float)):
            if new < old:
                differ.append(f"{key} was {old}, asked {new} (it may only grow)")
        elif json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):   # NaN is NaN
            differ.append(f"{key} was {json.dumps(old)}, asked {json.dumps(new)}")
    if differ:
        raise CheckpointError(f"{path}: this run was started with other settings: "
                              f"{'; '.join(differ)}. Nothing was changed; ask for the old settings "
                              "or use another directory", WRONG_SETTINGS)
    new = json.dumps({"run": run_id, "settings": asked}, indent=1) + "\n"
    return run_id, None if before == asked else new


# ------------------------------------------------------------------------------------------------
# The progress: its text, its heartbeat, its bar

class Progress:
    """PROGRESS.txt, written at checkpoints and by a heartbeat thread; a live bar on a terminal."""

    OURS = ("Status", "Error", "Progress", "Checkpoint", "Elapsed", "Rate", "ETA", "Last update",
            "Heartbeat", "Advanced", "Interval", "Run", "PID", "Host")

    def __init__(self, out, total, title, unit, heartbeat, stall_after):
        self.path, self.total = out / "PROGRESS.txt", None if total is None else int(total)
        self.title, self.unit = title, unit
        self.heartbeat, self.stall_after = heartbeat, stall_after
        self.id, self.newest, self.fields = "", None, {}
        self.done = self.durable = self.done_at_start = 0
        self.moved, self.longest_wait = time.monotonic(), 0.0   # since when; the longest so far
        self.began, self.elapsed_before = None, 0
        self.expected = None                # (seconds, when it was said) of expect()
        self._old = self._thread = None     # the bytes before announce(); the heartbeat
        self._bar = self._warned = self._stalled = self._stuck = self._announced = False
        self._io, self._wake = threading.RLock(), threading.Event()

    def remember(self, records):
        """What earlier starts said: the time they worked, and the job's own lines."""
        before = read_progress(self.path)
        seconds = re.fullmatch(r"(\d{1,12}) s", before.get("Elapsed", ""))
        times = [record.get("elapsed", 0) for record in records.values()]
        self.elapsed_before = max([int(seconds[1]) if seconds else 0, *times])
        self.fields = {key: value for key, value in before.items() if key not in self.OURS}
        self.id = before.get("Run", "")

    def announce(self):
        """Show the run before its total is known; a complete one stays so until there is work."""
        before = read_progress(self.path)
        if before.get("Status") == "COMPLETE":
            return
        with contextlib.suppress(OSError), open_regular(self.path) as file:
            self._old = file.read()
        self.id = self.id or os.urandom(3).hex()
        counts = re.match(r"(\d{1,15})/(\d{1,15}) ", before.get("Progress", ""))
        if counts:
            self.done, self.total = int(counts[1]), int(counts[2])
        self._announced = True
        self._start()
        self.done, self.total = 0, None

    def take_back(self):
        """Nothing came of what was announced: put the old file back, as far as there was one."""
        if self._announced:
            self._stop_thread()
            with contextlib.suppress(CheckpointError, OSError):
                if self._old is not None:
                    write_atomic(self.path, self._old, durable=False)
                else:
                    self.path.unlink()

    def begin(self):
        with contextlib.suppress(AttributeError, ValueError):   # none, or a stand-in for it
            self._bar = sys.stdout.isatty()
        self.began = self.moved = time.monotonic()
        self.done_at_start = self.done
        self._reserve(True)
        if self._thread:
            self.write("RUNNING")
        else:
            self._start()

    def _start(self):
        self.write("RUNNING")
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._thread = None
            warn(f"{self.path}: no heartbeat ({error}); it is written at checkpoints only")

    def _stop_thread(self):
        self._wake.set()
        if self._thread:   # one stuck in a dead file system must not hold us for ever
            self._thread.join(timeout=3)
            self._thread = None

    def end(self, status, error):
        self._stop_thread()
        self._reserve(False)
        # The last word, tried twice, and for the same reason in a thread if one is to be had.
        last = threading.Thread(target=lambda: self.write(status, error) or
                                self.write(status, error), daemon=True)
        try:
            last.start()
            last.join(timeout=10)
        except RuntimeError:
            self.write(status, error)

    def _reserve(self, hold):
        """A few blocks kept back, so that a full disk still takes the PROGRESS.txt that says so."""
        path = self.path.with_name(".reserve")
        with contextlib.suppress(OSError):
            if not hold:
                path.unlink()
                return
            flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
            with open(os.open(path, flags, 0o666), "wb") as file:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    file.write(bytes(16384))

    # -- what it says

    def elapsed(self):
        """Seconds worked, over all starts."""
        return self.elapsed_before + (time.monotonic() - self.began if self.began else 0)

    def rate(self):
        worked = time.monotonic() - self.began if self.began else 0
        return (self.done - self.done_at_start) / worked if worked > 0 else 0.0

    def counts(self):
        """'12000/30000 samples (40.0%)'. 100% only once the last piece is durable."""
        total = self.total or 0
        if total and self.durable >= total:
            return f"{total}/{total} {self.unit} (100%)"
        tenths = min(999, 1000 * self.done // total) if total else 0
        return f"{self.done}/{total} {self.unit} ({tenths / 10:.1f}%)"

    def rate_text(self):
        rate = self.rate()
        return f"{rate:.1f}" if rate >= 1 or rate == 0 else f"{rate:.3g}"

    def eta(self):
        """Seconds left, or None."""
        total, rate = self.total or 0, self.rate()
        if self.expected and self.done < total:
            return max(0, self.expected[0] - (time.monotonic() - self.expected[1]))
        if rate > 0:
            return (total - self.done) / rate
        return 0 if total and self.done >= total else None

    def text(self, status, error):
        wall, now = time.time(), time.monotonic()
        eta = None if status in ("INTERRUPTED", "FAILED") else self.eta()
        when = None if eta is None else _utc(wall + eta)
        lines = [("Status", status)] + ([("Error", error)] if error else []) + [
            ("Progress", self.counts()),
            ("Checkpoint", f"{self.durable} ({self.newest})" if self.newest else "none"),
            ("Elapsed", f"{int(self.elapsed())} s"),
            ("Rate", f"{self.rate_text()} {self.unit}/s"),
            ("ETA", f"{eta:.0f} s ({when})" if when else "unknown"),
            *self.fields.items(),
            ("Last update", _utc(wall)),
            ("Heartbeat", int(wall)),
            # on the steady clock: a jump of the wall clock cannot make it later
            ("Advanced", int(wall - (now - self.moved))),
            ("Interval", f"{self.heartbeat:g} s"),
            ("Run", self.id), ("PID", os.getpid()), ("Host", socket.gethostname())]
        pairs = (f"{_one_line(key)}: {_one_line(value)}\n" for key, value in lines)
        return _one_line(self.title) + "\n" + "".join(pairs)

    def says_complete(self):
        before = read_progress(self.path)
        return before.get("Status") == "COMPLETE" and before.get("Progress") == self.counts()

    # -- writing it

    def write(self, status, error=None):
        """True if it was written. Never waits long for a write that hangs in a dead file system."""
        if not self._io.acquire(timeout=0.01 if self._stuck else 5):
            self._stuck = True
            return False
        try:
            write_atomic(self.path, self.text(status, error), durable=False)
            self._stuck = False
            return True
        except CheckpointError as trouble:
            if not self._warned:
                self._warned = True
                warn(f"{trouble} (the work goes on; this is said once)")
            return False
        finally:
            self._io.release()

    def show_checkpoint(self, newest):
        self.newest = newest
        self.write("RUNNING")
        if self._bar:
            self._draw_bar()
        else:
            self.log(f"{newest}  {self._summary()}")

    def _beat(self):
        """The heartbeat's thread; a bar is drawn more often than PROGRESS.txt is written."""
        written = time.monotonic()
        while not self._wake.wait(min(0.2 if self._bar else 1, self.heartbeat)):
            if self._bar:
                self._draw_bar()
            now = time.monotonic()
            if now - written >= self.heartbeat:
                idle = now - self.moved
                stalled = idle > max(self.stall_after, 10 * self.longest_wait)
                if stalled and not self._stalled:
                    warn(f"{self.path.parent}: no progress for {idle:.0f} s")
                self._stalled = stalled
                self.write("STALLED" if stalled else "RUNNING")
                written = now

    def _summary(self):
        eta = self.eta()
        left = "unknown" if eta is None else duration(eta)
        return f"{self.counts()}  {self.rate_text()} {self.unit}/s  ETA {left}"

    def _draw_bar(self):
        columns, summary = shutil.get_terminal_size().columns, self._summary()
        width = max(0, min(30, columns - len(summary) - 5))
        filled = min(width, width * self.done // max(1, self.total or 0))
        bar = f"\r[{'#' * filled}{'-' * (width - filled)}] {summary}"[:columns]
        _stdout.say(bar + "\033[K", droppable=True)

    def log(self, line):
        _stdout.say(("\r\033[K" if self._bar else "") + line + "\n")


def read_progress(path):
    """{key: value} of a PROGRESS.txt, {} if it cannot be read. The first line of a key counts."""
    try:
        with open_regular(path) as file:
            lines = file.read(65536).decode(errors="replace").splitlines()[1:]
    except OSError:
        return {}
    pairs = [line.split(": ", 1) for line in lines if ": " in line]
    seen = {key: None for key, _ in pairs}   # in the order of the file
    seen.update((key, _one_line(value)) for key, value in reversed(pairs))
    return seen


def _one_line(value, words=str):
    try:
        return "".join(c if c.isprintable() else " " for c in words(value)[:1000])
    except Exception:   # a job's own object; the heartbeat goes on
        return "?"


def _utc(seconds):
    """None beyond what a calendar holds."""
    with contextlib.suppress(OverflowError, OSError, ValueError):
        if seconds < 2.5e11:   # the year 9892
            return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    return None


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

    living = set()

    def __init__(self, directory):
        path = Path(directory) / ".lock"
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
            self.file = os.open(path, flags, 0o666)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot write here ({error.strerror}). Nothing was "
                                  "changed; mend that or use another directory") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            in_use = isinstance(error, BlockingIOError)
            holder = self._holder() if in_use else None
            os.close(self.file)
            if in_use:
                raise CheckpointError(f"{directory} is in use by {holder}. Nothing was changed; "
                                      "wait for it or stop it", IN_USE) from None
            raise CheckpointError(f"{path}: this file system cannot lock ({error.strerror}); use a "
                                  "local one") from error
        self.living.add(self)
        self.place, self.itself = os.stat(directory), os.fstat(self.file)
        text = f"PID {os.getpid()} on host {socket.gethostname()} since {_utc(time.time())}\n"
        with contextlib.suppress(OSError):   # a full disk: the lock holds all the same
            os.ftruncate(self.file, 0)
            os.pwrite(self.file, text.encode(), 0)

    def _holder(self):
        """The holder signs just after it locks: a dead one's signature is looked at again."""
        for _ in range(20):
            text = os.pread(self.file, 500, 0).decode(errors="replace").strip()
            pid = re.match(r"PID (\d{1,9}) on host (.*) since", text)
            if pid and int(pid[1]) == os.getpid():
                return f"this very process (PID {pid[1]})"
            if pid and (pid[2] != socket.gethostname() or _alive(int(pid[1]))):
                return text
            time.sleep(0.05)
        return "a process that is just starting"

    def held(self):
        """Is our descriptor still that of the lock's file? A job may have closed it."""
        try:
            return os.path.samestat(os.fstat(self.file), self.itself)
        except OSError:
            return False

    def is_of(self, directory):
        """Is what has this name still the directory that was locked?"""
        try:
            return os.path.samestat(os.stat(directory), self.place)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _unreadable(directory, error) from error

    def release(self):
        if self in self.living:
            self.living.discard(self)
            if not self.held():
                return
            for step in (lambda: os.ftruncate(self.file, 0), lambda: os.close(self.file)):
                with contextlib.suppress(OSError):
                    step()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.release()

    @classmethod
    def close_in_child(cls):
        for lock in cls.living:
            if lock.held():
                with contextlib.suppress(OSError):
                    os.close(lock.file)
        cls.living.clear()


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


# ------------------------------------------------------------------------------------------------
# Signals ask to stop; a second Ctrl-C insists

class _Stop:
    """Signals become a flag while a run works: saving inside a signal handler deadlocks."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.runs, self.before = [], {}  # that are at work; the handlers that were there before
        self.leaving = []                # those that say their last word
        self.mask = threading.local()    # what was blocked before a fork, by thread
        self.number = self.last = None   # the signal that asks; the one to name in the last word
        self.at = 0.0

    def watch(self, run):
        if threading.current_thread() is not threading.main_thread():
            return   # handlers can only be set there
        self.runs.append(run)
        self.last = self.number
        if len(self.runs) == 1:
            for number in self.NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:   # nohup ignores SIGHUP
                    self.before[number] = signal.signal(number, self._ask)

    def unwatch(self, run):
        if run in self.runs:
            self.runs.remove(run)
            if not self.runs:
                self._put_back()
                self.number = None

    def _put_back(self):
        with contextlib.suppress(ValueError):   # left in another thread than it was entered in
            for number, handler in self.before.items():
                if signal.getsignal(number) == self._ask:   # else the job has set one of its own
                    signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.before = {}

    def _ask(self, number, frame):
        now = time.monotonic()
        complete = all(run._complete() for run in self.runs)
        if complete and not self.leaving:   # nothing is left to be saved or said
            raise SystemExit(128 + number)
        if self.number is None:
            self.number, self.last, self.at = number, number, now
            if complete:
                return
            hint = ". Ctrl-C again ends at once, with what was saved before"
            _stderr.say(f"{signal.Signals(number).name}: the work is being saved"
                        f"{hint if number == signal.SIGINT else ''}\n", wait=False)
        elif number == signal.SIGINT and now - self.at > 0.3:   # `timeout -s INT` sends two at once
            signal.signal(signal.SIGINT, signal.SIG_DFL)   # a third one needs nobody's help
            raise KeyboardInterrupt

    # A forked child gets the handlers back that were there before, so that Pool.terminate() ends
    # it. A signal that finds it before it has them would be lost, and the pool would wait for ever:
    # so signals wait while a process forks.

    def before_fork(self):
        self.mask.old = signal.pthread_sigmask(signal.SIG_BLOCK, self.NUMBERS)

    def after_fork(self):
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask.old)

    def in_child(self):
        self._put_back()
        self.number, self.runs, self.leaving = None, [], []
        self.after_fork()


# ------------------------------------------------------------------------------------------------
# Saying things where nobody may be reading: a stopped terminal, a full pipe must not stop the work

class _Voice:
    """Lines to stdout or stderr, written by a thread that may hang in our place; some get lost."""

    def __init__(self, name):
        self.name, self.pid, self.said, self.written = name, None, 0, 0

    def say(self, text, droppable=False, wait=True):
        stream = getattr(sys, self.name)
        try:
            descriptor = self._descriptor(stream)
            if descriptor is None:   # a notebook, a test's capture: its own business
                if stream is not None:
                    stream.write(text)
                    stream.flush()
                return
            if self.pid != os.getpid():
                self._start()
        except (OSError, ValueError, RuntimeError, AttributeError):   # closed, threadless, a toy
            return
        behind = self.said - self.written
        if behind > 200 or (droppable and behind):
            return
        self.said += 1
        self.queue.put((descriptor, text.encode(stream.encoding or "utf-8", errors="replace")))
        # Keep the order with what the job itself prints, as long as somebody reads.
        end = time.monotonic() + 0.2
        while wait and not behind and self.written < self.said and time.monotonic() < end:
            time.sleep(0.0002)

    def _descriptor(self, stream):
        """The stream's descriptor if writing there directly is the same thing, else None."""
        if type(stream) is io.TextIOWrapper:
            raw = getattr(stream.buffer, "raw", stream.buffer)   # the buffer itself: python -u
            if type(raw) is io.FileIO:
                return raw.fileno()
        return None

    def _start(self):
        self.queue, self.said, self.written = queue.SimpleQueue(), 0, 0   # its put() is reentrant
        self.pid = os.getpid()
        threading.Thread(target=self._speak, args=(self.queue,), name="voice", daemon=True).start()

    def _speak(self, lines):
        while True:
            descriptor, data = lines.get()
            with contextlib.suppress(OSError):   # a closed or full log must not end the work
                while data:
                    data = data[os.write(descriptor, data):]
            self.written += 1


_stop, _stdout, _stderr = _Stop(), _Voice("stdout"), _Voice("stderr")


os.register_at_fork(before=_stop.before_fork, after_in_parent=_stop.after_fork,
                    after_in_child=_stop.in_child)
os.register_at_fork(after_in_child=DirectoryLock.close_in_child)


def warn(message):
    """A line on stderr that never holds up the work."""
    _stderr.say(f"warning: {_one_line(message)}\n")


def _complain(error):
    _stderr.say(f"{Path(sys.argv[0]).name or 'python'}: error: {_one_line(error)}\n")


@contextlib.contextmanager
def one_line_errors():
    """Turn what a person or a machine did wrong into one line on stderr and its exit code."""
    try:
        yield
    except CheckpointError as error:
        _complain(error)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        _complain(f"{error.filename or 'a file'}: {error.strerror or error}. What was finished "
                  "before is intact")
        raise SystemExit(FAILED) from None
    except KeyboardInterrupt:
        _complain("stopped by Ctrl-C; what was finished before is intact")
        raise SystemExit(128 + signal.SIGINT) from None


def tell(line):
    """A line of a command's own output. A reader that has left (| head -1) is no error; a full
    disk is."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):   # or Python would fail again at its end
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        if not isinstance(error, BrokenPipeError):
            raise CheckpointError(f"cannot write the output ({error.strerror})") from None


# ------------------------------------------------------------------------------------------------
# python checkpointing.py status DIR ... / verify DIR ... / accept FILE ...

USAGE = """usage: checkpointing.py status DIR ...   what every run below DIR is doing
       checkpointing.py verify DIR ...   read all checkpoints and results; exit 1 naming bad ones
       checkpointing.py accept FILE ...  go on from this state although its record is lost"""


def _directories(roots):
    """(directory, names) of all below; a hidden one holds a copy's half-finished files."""
    def stop(error):
        raise _unreadable(error.filename, error)
    for root in roots:
        if not os.path.isdir(root):
            what = "a file, not a directory" if os.path.exists(root) else "no such directory"
            raise CheckpointError(f"{root}: {what}", WRONG_SETTINGS)
        for directory, below, names in os.walk(root, onerror=stop):
            below[:] = sorted(name for name in below if not name.startswith("."))
            yield Path(directory), sorted(names)


def status(roots):
    """Print what every run below the directories is doing. Returns 0; none is an error."""
    count = 0
    for directory, names in _directories(roots):
        if "PROGRESS.txt" not in names:
            continue
        count += 1
        progress = read_progress(directory / "PROGRESS.txt")
        word, note = progress.get("Status", "UNREADABLE"), progress.get("Error", "")
        if word in ("RUNNING", "STALLED"):
            with contextlib.suppress(ValueError, KeyError, OverflowError):
                age = duration(max(0, int(time.time()) - int(progress["Heartbeat"])))
                note = f"{progress.get('Rate')}  ETA {progress.get('ETA')}  heartbeat {age} ago"
                here = progress.get("Host") == socket.gethostname()
                if here and not _alive(int(progress["PID"])):
                    word = "DEAD"
                    note = f"no process {progress['PID']}; run the same command again to go on"
        tell(_one_line(f"{directory}: {word}  {progress.get('Progress', '')}  {note}".rstrip()))
    if not count:
        raise CheckpointError(f"no run (PROGRESS.txt) in or below {', '.join(roots)}")
    return 0


def verify(roots):
    """Read every checkpoint and result below. Returns 0, or 1 with the bad ones named."""
    good = bad = 0
    for directory, names in _directories(roots):
        records = read_records(directory)
        for name in names:
            try:
                problem = _verdict_on(directory / name, records)
            except FileNotFoundError:   # let go of by a run at work
                continue
            if problem is not None:
                good, bad = good + (not problem), bad + bool(problem)
                if problem:
                    tell(f"BAD {_one_line(directory / name)}: {problem}")
        if read_progress(directory / "PROGRESS.txt").get("Status") == "COMPLETE":
            for record in records.values():   # of pieces, none may be missing
                if record["start"] < record["stop"] and record["name"] not in names:
                    bad += 1
                    tell(f"BAD {directory / record['name']}: missing")
    tell(f"{good} files are whole, {bad} bad" if good or bad
         else f"no checkpoints in {', '.join(str(root) for root in roots)}")
    return 1 if bad or not good else 0


def _verdict_on(path, records):
    """"" if a file is whole, what is wrong with it, or None if it is not ours to judge."""
    checkpoint = CHECKPOINT_NAME.fullmatch(path.name)
    judged = checkpoint or path.suffix in (".npz", ".pt", ".json")
    if not judged or path.name.startswith(".") or not stat.S_ISREG(os.stat(path).st_mode):
        return None
    record = records.get(path.name)
    if checkpoint and not record:   # saved since we looked?
        record = read_records(path.parent).get(path.name)
    problem = problem_with(path, record) or ""
    if problem == UNVOUCHED and not checkpoint and path.suffix == ".json":
        with contextlib.suppress(RecursionError), open_regular(path) as file:
            try:
                json.loads(file.read())   # somebody else's, or history: not sealed, but whole
            except ValueError:
                return "neither sealed nor whole JSON"
        return None
    return problem


def accept(files):
    """Record states whose record is lost, as they are, so that a run goes on from them."""
    for path in [Path(name) for name in files]:
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if not match or not path.is_file():
            raise CheckpointError(f"{path}: no such checkpoint", WRONG_SETTINGS)
        with DirectoryLock(path.parent):
            store, number = Store(path.parent, match[2]), int(match[1])
            said = read_progress(path.parent / "PROGRESS.txt").get("Checkpoint", "")
            newest = re.fullmatch(r"(\d+) \(checkpoint_(\d+)\..*\)", said)   # units, their number
            pieces = int(newest[1]) != int(newest[2]) if newest else store.found()[0][0] == 0
            stop = number
            if pieces:
                try:
                    stop += len(_kept_lines(path))
                except ValueError:
                    raise CheckpointError(f"{path.parent} holds pieces, which say nothing of their "
                                          "length: bring back their records, or move the files away"
                                          " to do their work again", WRONG_SETTINGS) from None
            if path.name in read_records(path.parent):
                raise CheckpointError(f"{path} has its record; nothing was changed", WRONG_SETTINGS)
            store._append({"name": path.name, "start": number, "stop": stop, "elapsed": 0,
                           "bytes": path.stat().st_size, "sha256": sha256(path)})
        tell(f"{path}: recorded as it is; run the job's command again to go on from it")
    return 0


def main(arguments):
    commands = {"status": status, "verify": verify, "accept": accept}
    with one_line_errors():
        if arguments[:1] in (["-h"], ["--help"]):
            tell(USAGE)
            return 0
        if len(arguments) < 2 or arguments[0] not in commands:
            raise CheckpointError("type status, verify or accept, and what to look at; see --help",
                                  WRONG_SETTINGS)
        return commands[arguments[0]](arguments[1:])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
