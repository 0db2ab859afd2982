"""One page of pictures of what the stages have made: open results/report.html in a browser.

    python report.py                               # results/ -> results/report.html, report.png
    python report.py results/run_a results/run_b   # two runs compared -> results/compare.html
    python report.py made.npz predicted.npz        # a page that plays these videos -> made.html
    python report.py made.npz --strip made.png     # the same, and an animated PNG of them

The stages keep the page up to date themselves, through refresh(). The page is one file of less than
2 MB: no network, no server, no library. It shows what there is, also from half a run or from a copy
on a laptop, and names what it could not read. Text that comes from files stays text: it is escaped,
and the page forbids every script but its own.

numpy is enough: no torch. Exit codes: 0 written; 1 failed (a disk full, nothing to show); 2 wrong
arguments.
"""
import base64
import hashlib
import html
import json
import math
import os
import re
import struct
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from settings import OneLineParser
import numpy as np

import checkpointing
from checkpointing import CheckpointError

PAGE, STRIP, COMPARISON = "report.html", "report.png", "compare.html"
MARK = "trajectory videos: report.py"   # in all pages and pictures of ours
CLASSES = ("linear", "circular", "helical", "parabolic")
PAGE_BYTES = 1_900_000      # at most; the page travels with every sync
PICTURE_BYTES = 900_000   # of it, about, for videos
RELOAD = 30                 # seconds between two looks of an open page at a run that works
OLD = 600                   # seconds without news from a run that works, after which the page warns
EACH = 12                   # videos of each class
TILE, STRIP_TILE = 96, 64   # pixels on the screen, about, of a video
MOST_RUNS, MOST_CARDS = 24, 300   # runs shown whole; runs shown with a line each
DEPTH, DIRECTORIES = 3, 2000      # how far below the directory runs are looked for
JSON_BYTES = 32 << 20       # a larger file of figures is not read
ARRAY_BYTES = 8 << 20       # of an array no more is read


# --------------------------------------------------------------------------------------------------
# The command line

def main():
    parser = OneLineParser(description="Make one page of pictures from the results of the stages, "
                           "or from any videos.")
    parser.add_argument("paths", nargs="*", default=["results"], metavar="DIR",
                        help="a directory of results: writes DIR/report.html and DIR/report.png; "
                        "several: compares them in compare.html beside them; .npz files of videos: "
                        "a page that plays them, named after the first (default results)")
    parser.add_argument("--strip", metavar="FILE.png",
                        help="also write the videos as an animated PNG there")
    arguments = parser.parse_args()
    with checkpointing.one_line_errors():
        try:
            written = write([Path(path) for path in arguments.paths], arguments.strip)
        except OSError as error:
            raise CheckpointError(f"{error.filename}: {error.strerror}") from error
        for path in written:
            checkpointing.tell(f"{path}: {path.stat().st_size:,} bytes")


def write(paths, strip):
    """What the command line asks for; returns the paths written."""
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or directory",
                                  checkpointing.WRONG_SETTINGS)
    directories = [path for path in paths if path.is_dir()]
    if 0 < len(directories) < len(paths):
        raise CheckpointError("give directories or .npz files, not both",
                              checkpointing.WRONG_SETTINGS)
    if not directories:
        return write_videos(paths, strip)
    for path in directories:
        os.scandir(path).close()   # can it be read?
    if len(directories) == 1:
        return write_report(directories[0], strip)
    return write_comparison(directories, strip)


def write_report(top, strip=None):
    """Write the page and the picture of everything below `top`; returns the paths written."""
    found = find(top)
    written = [write_ours(top / PAGE, page_of(found))]
    picture = strip_of_runs(found)   # after the page: a strip that fails must not cost it
    if picture:
        written.append(write_ours(top / STRIP, picture))
    if strip:
        written.append(write_strip(strip, picture, top))
    return written


def write_comparison(directories, strip=None):
    """The runs of several directories on one page, beside them."""
    top = Path(os.path.commonpath([path.resolve() for path in directories]))
    for path in directories:   # where it can be, the directory is called what the user calls it
        top = path.parent if path.resolve().parent == top else top
    names = [path.name or str(path) for path in directories]
    found = Found(top, "comparison of " + " and ".join(names))
    for path in directories:
        other = find(path)
        prefix = str(path) if len({p.name for p in directories}) < len(directories) else path.name
        for run in other.runs:
            run.name = prefix if run.name == "." else f"{prefix}/{run.name}"
        found.runs += other.runs
        found.files += other.files
        found.notes += other.notes
    written = [write_ours(top / COMPARISON, page_of(found))]
    if strip:
        written.append(write_strip(strip, strip_of_runs(found), top))
    return written


def write_strip(path, picture, source):
    if not picture:
        raise CheckpointError(f"{source}: no videos here to make {path} of")
    return write_ours(Path(path), picture)


def write_videos(paths, strip=None):
    """A page that plays the videos of .npz files."""
    files = [read_videos(path, 64) for path in paths]
    for file in files:
        if file.problem:
            raise CheckpointError(f"{file.path}: no videos to show ({file.problem})")
    name = " and ".join(path.name for path in paths)
    page = assemble(name, "", play_files(files, PICTURE_BYTES), [], time.time())
    written = [write_ours(paths[0].with_suffix(".html"), page)]
    if strip:
        written.append(write_strip(strip, strip_of_files(files), paths[0]))
    return written


def write_ours(path, content):
    """Write a page or picture, but never over a file that we have not made."""
    if path.exists() and not is_ours(path):
        raise CheckpointError(f"{path} exists and was not made by report.py; it is left alone. "
                              "Move it away")
    checkpointing.write_atomic(path, content, durable=False)
    return path


# --------------------------------------------------------------------------------------------------
# What the stages call

# When a page may be made next, on the steady clock. Not in the first 30 s: a job that is shorter
# makes one page, at its end.
_next = time.monotonic() + 30
_warned = set()   # directories whose pages could not be made


def refresh(directory, least_seconds=30.0, force=False):
    """Bring the page up to date that shows the run in `directory`, a stage's --out. Never raises: a
    failure is said once, on stderr, and the work goes on.

    At most every `least_seconds` in this process, and never more than 1 % of the time: after a page
    that took s seconds the next waits at least 100 s. `force`, for the end of a stage, makes it at
    once. A call that comes too early costs less than a microsecond. Where the page is: see top_of.
    """
    global _next
    began = time.monotonic()
    if not force and began < _next:
        return
    try:
        if os.path.isdir(directory):   # else it was refused before it began: nothing to show
            write_report(top_of(directory))
    except Exception as error:
        if str(directory) not in _warned:
            _warned.add(str(directory))
            checkpointing.warn(f"the page of {directory} was not made: {words_of(error)} (the work "
                               "goes on; this is said once)")
    now = time.monotonic()
    _next = max(began + least_seconds, now + 100 * (now - began))


def top_of(directory):
    """The directory whose page shows this run: of itself, its parent and its grandparent the
    topmost that is a run, or holds a page or a merged data set of ours. For shard_I_of_K at least
    the parent: the shards are one data set."""
    directory = Path(directory).resolve()
    top = directory.parent if SHARD.fullmatch(directory.name) else directory
    for above in list(directory.parents)[:2]:
        there = any((above / name).is_file() for name in ("PROGRESS.txt", "dataset.npz"))
        if above != Path(above.anchor) and (there or is_ours(above / PAGE)):
            top = above
    return top


def is_ours(path):
    try:
        with checkpointing.open_regular(path) as file:
            return MARK.encode() in file.read(4096)
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------
# What is there

SHARD = re.compile(r"shard_\d+_of_\d+")
SET_ASIDE = re.compile(r".+\.old\d+")


@dataclass
class Run:
    """What a run directory says. `kind` is data, training, evaluation or job."""
    path: Path
    name: str
    kind: str
    title: str = ""
    progress: dict = field(default_factory=dict)
    status: str = ""
    settings: dict = field(default_factory=dict)
    pieces: list = field(default_factory=list)       # [(first sample, path)] of a data run
    parts: list = field(default_factory=list)        # the shards, where a data set has them
    metrics: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)        # what could not be read
    checks: list = field(default_factory=list)       # [(level, words)], for the verdict

    @property
    def id(self):
        return "r" + hashlib.sha256(self.name.encode(errors="replace")).hexdigest()[:8]


@dataclass
class Found:
    """All that a page shows."""
    top: Path
    name: str
    runs: list = field(default_factory=list)
    files: list = field(default_factory=list)   # .npz files that are no checkpoints
    notes: list = field(default_factory=list)


def find(top):
    """Look below a directory. What is hidden, half-written, set aside or not ours is left out."""
    top = Path(top)
    found = Found(top, top.resolve().name or str(top))
    aside = count = 0
    for directory, below, names in os.walk(top):
        here = Path(directory)
        depth = len(here.relative_to(top).parts)
        aside += sum(bool(SET_ASIDE.fullmatch(name)) for name in below)
        below[:] = [] if depth >= DEPTH else sorted(
            name for name in below if not name.startswith(".") and not SET_ASIDE.fullmatch(name))
        count += 1
        if count > DIRECTORIES:
            found.notes.append(f"only the first {DIRECTORIES:,} directories were looked at")
            break
        try:
            run = read_run(here, str(here.relative_to(top)), set(names))
            found.runs += [run] if run else []
        except Exception as error:
            found.notes.append(f"{here}: cannot be read ({words_of(error)})")
        found.files += [here / name for name in sorted(names) if is_set(here / name)]
    if aside:
        found.notes.append(f"{aside} directories that --fresh set aside (*.old1, ...) are left out")
    found.runs = with_evaluations(with_shards(found.runs))
    order = {"data": 0, "training": 1, "evaluation": 2, "job": 3}
    found.runs.sort(key=lambda run: (order[run.kind], natural(run.name)))
    return found


def natural(name):
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def is_set(path):
    named = path.suffix == ".npz" and path.name != "samples.npz"
    return named and not path.name.startswith((".", "checkpoint_")) and path.is_file()


def read_run(here, name, names):
    """The run in a directory, or None."""
    trained = {"history.json", "samples.npz"} & names
    if not (trained or {"PROGRESS.txt", "metrics.json"} & names):
        return None
    run = Run(here, name, "job")
    if "PROGRESS.txt" in names:
        run.progress = checkpointing.read_progress(here / "PROGRESS.txt")
    run.title = first_line(here / "PROGRESS.txt") if run.progress else ""
    settings = read_json(here / "run.json", run.notes) if "run.json" in names else {}
    run.settings = as_dict(as_dict(settings).get("settings"))
    pieces = [(number, path) for number, path in checkpointing.find_checkpoints(here)
              if path.suffix == ".npz"]
    if trained or run.title == "MAGVIT training":
        run.kind = "training"
    elif pieces or run.title == "Dataset generation":
        run.kind, run.pieces = "data", pieces
    elif "metrics.json" in names or here.name == "evaluation":
        run.kind = "evaluation"
    if "metrics.json" in names:
        run.metrics = as_dict(read_json(here / "metrics.json", run.notes))
    if "PROGRESS.txt" in names and not run.progress.get("Status"):
        run.notes.append("PROGRESS.txt is damaged or half-written: the state is not known")
    run.status = state_of(run.progress)
    return run


def state_of(progress):
    """The status; SILENT where it says that it works and does not beat, UNKNOWN without one."""
    status = progress.get("Status", "UNKNOWN")
    if status == "RUNNING" and counts_in(progress)[3] == "100%":
        return "COMPLETE"   # 100% says that all is on the disk: only the last word is missing
    if status in ("RUNNING", "STALLED"):
        age = time.time() - number_in(progress.get("Heartbeat"), time.time())
        if age > 3 * number_in(progress.get("Interval"), 30) + 5:
            return "SILENT"
    return status


def with_shards(runs):
    """The shards of one set as one run, named after the directory that they are in."""
    whole, groups = [], {}
    for run in runs:
        if run.kind == "data" and SHARD.fullmatch(run.path.name):
            groups.setdefault(run.path.parent, []).append(run)
        else:
            whole.append(run)
    for parent, parts in groups.items():
        parts.sort(key=lambda part: natural(part.path.name))
        name = parts[0].name.rpartition("/")[0] or "."
        one = Run(parent, name, "data", parts[0].title, settings=dict(parts[0].settings),
                  parts=parts)
        one.settings.pop("shard", None)
        one.pieces = sorted(piece for part in parts for piece in part.pieces)
        one.notes = [f"{part.path.name}: {note}" for part in parts for note in part.notes]
        states = [part.status for part in parts]
        one.status = next((state for state in WORST if state in states), states[0])
        done, total, unit, _ = zip(*[counts_in(part.progress) for part in parts])
        expected = int(parts[0].path.name.rpartition("_")[2])
        one.title += f", {len(parts)} of {expected} shards" if len(parts) < expected else ""
        beats = [number_in(part.progress.get("Heartbeat"), 0) for part in parts]
        waits = [number_in(part.progress.get("ETA"), 0) for part in parts]
        share = f"{min(99.9, 100 * sum(done) / max(1, sum(total))):.1f}"
        share = "100" if set(states) == {"COMPLETE"} else share
        counts = f"{sum(done)}/{sum(total)} {unit[0]} ({share}%)"
        one.progress = {"Progress": counts, "Heartbeat": f"{max(beats):.0f}",
                        "ETA": f"{max(waits):.0f} s"}
        errors = [f"{part.path.name}: {part.progress['Error']}" for part in parts
                  if part.progress.get("Error")]
        if errors:
            one.progress["Error"] = "; ".join(errors)
        whole.append(one)
    return whole


def with_evaluations(runs):
    """An evaluation in a training's directory belongs to it; one at work is shown as well."""
    trainings = {run.path: run for run in runs if run.kind == "training"}
    kept = []
    for run in runs:
        owner = trainings.get(run.path.parent) if run.path.name == "evaluation" else None
        if owner:
            owner.metrics = run.metrics or owner.metrics
            owner.notes += [f"evaluation: {note}" for note in run.notes]
        if not owner or run.progress and run.status != "COMPLETE":
            kept.append(run)
    return kept


WORST = ("FAILED", "SILENT", "STALLED", "INTERRUPTED", "UNKNOWN", "RUNNING", "COMPLETE")


def counts_in(progress):
    """(done, total, unit, percent) of '12000/30000 samples (40.0%)'; (0, 0, '', '') without one."""
    match = re.match(r"(\d{1,15})/(\d{1,15}) (.*?) \((\d{1,3}(?:\.\d)?%)\)",
                     progress.get("Progress", ""))
    return (int(match[1]), int(match[2]), match[3], match[4]) if match else (0, 0, "", "")


def works(run):
    return any(one.status in WORKING for one in [run, *run.parts])


def number_in(text, otherwise):
    """The number a text begins with."""
    match = re.match(r"-?\d{1,15}(\.\d+)?", str(text or ""))
    return float(match[0]) if match else otherwise


def first_line(path):
    try:
        with checkpointing.open_regular(path) as file:
            return one_line(file.read(1000).decode(errors="replace").partition("\n")[0])
    except OSError:
        return ""


def read_json(path, notes):
    """What a JSON file holds; None, and a word in `notes`, where it is damaged, huge or gone."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > JSON_BYTES:
            notes.append(f"{path.name} is too large to show ({path.stat().st_size:,} bytes)")
            return None
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({words_of(error)})")


def as_dict(value):
    return value if isinstance(value, dict) else {}


def words_of(error):
    name = type(error).__name__
    return one_line(f"{name}: {error}" if str(error) else name)[:300]


def one_line(value):
    return "".join(c if c.isprintable() else " " for c in str(value))[:1000]


# --------------------------------------------------------------------------------------------------
# Reading the first samples of arrays, without the rest: a data set may be larger than the memory

_cache = {}   # (path, size, time of change, what): a checkpoint never changes, so it is read once
CACHE_BYTES = 64 << 20


def first_rows(path, rows):
    """({name: the first rows[name] rows}, {name: shape}, problem) of an .npz; {None: most} speaks
    for all other names. At most ARRAY_BYTES of each are read, but at least one row."""
    status = os.stat(path)
    key = str(path), status.st_size, status.st_mtime_ns, tuple(rows.items())
    if key not in _cache:
        result = read_first_rows(path, rows)
        held = sum(array.nbytes for arrays, _, _ in _cache.values() for array in arrays.values())
        if held > CACHE_BYTES or len(_cache) > 1000:
            _cache.clear()
        _cache[key] = result
    return _cache[key]


def read_first_rows(path, rows):
    arrays, shapes, problem = {}, {}, None
    try:
        with checkpointing.open_regular(path) as file, zipfile.ZipFile(file) as archive:
            for member in archive.namelist()[:100]:
                name = member.removesuffix(".npy")
                most = rows.get(name, rows.get(None, 0))
                if not most or name == member:
                    continue
                with archive.open(member) as inside:
                    arrays[name], shapes[name] = read_array(inside, most)
    except Exception as error:   # zipfile and numpy raise a dozen types on foreign bytes
        problem = words_of(error)
    return arrays, shapes, problem


def read_array(file, most):
    """(the first rows, the shape of all) from an open .npy."""
    if np.lib.format.read_magic(file) == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are not read: they could run code")
    if fortran and len(shape) > 1:
        raise ValueError("is in Fortran order")
    if not shape:
        return np.frombuffer(file.read(dtype.itemsize), dtype, 1)[0], shape
    each = math.prod(shape[1:]) * dtype.itemsize
    if each > 8 * ARRAY_BYTES:
        raise ValueError(f"one sample has {each:,} bytes: too large to show")
    count = min(shape[0], most, max(1, ARRAY_BYTES // max(1, each)))
    if not count * each:
        return np.empty((count, *shape[1:]), dtype), shape
    array = np.frombuffer(file.read(count * each), dtype)
    return array.reshape(count, *shape[1:]), shape


@dataclass
class Videos:
    """Some videos of a file, ready to be shown: uint8 (N, T, C, H, W) with C 1 or 3."""
    path: Path
    shown: np.ndarray = None
    total: int = 0
    labels: np.ndarray = None
    classes: tuple = CLASSES
    paths: np.ndarray = None      # (N, T, 2): the dots' centres that the file gives, in pixels
    given: int = 0
    truth: np.ndarray = None
    note: str = ""
    problem: str = None


def read_videos(path, most):
    """The first videos of an .npz. `problem` says why there are none."""
    file = Videos(Path(path))
    try:
        rows = dict.fromkeys(("videos", "labels", "trajectory_2d", "truth"), most)
        arrays, shapes, file.problem = first_rows(path, {**rows, "classes": 1000, "given": 1})
        file.note = one_line(checkpointing.note_of(path))
    except Exception as error:
        file.problem = words_of(error)
        return file
    if "videos" not in arrays:
        file.problem = file.problem or "there is no array named videos"
        return file
    try:
        file.shown, file.total = as_pixels(arrays["videos"]), shapes["videos"][0]
        if not len(file.shown):
            raise ValueError("there is not one video")
        file.problem = None
    except ValueError as error:
        file.problem = str(error)
        return file
    n, frames = file.shown.shape[:2]
    labels, paths, truth = (arrays.get(name) for name in ("labels", "trajectory_2d", "truth"))
    if labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu":
        file.labels = labels[:n].astype(np.int64) if len(labels) >= n else None
    if paths is not None and paths.dtype.kind == "f" and paths.shape[1:] == (frames, 2):
        file.paths = paths[:n] if len(paths) >= n else None
    if truth is not None and truth.shape == arrays["videos"].shape:
        file.truth = as_pixels(truth)
    file.classes = names_in(arrays)
    file.given = count_in(arrays, "given") or 0
    return file


def count_in(arrays, name):
    """A number of frames or steps, or None."""
    value = np.asarray(arrays.get(name, ""))
    return max(0, int(value)) if value.ndim == 0 and value.dtype.kind in "iu" else None


def names_in(arrays):
    names = arrays.get("classes")
    if names is not None and getattr(names, "ndim", 0) == 1 and names.dtype.kind in "US":
        return tuple(map(str, names))
    return CLASSES


def as_pixels(videos):
    """uint8 (N, T, C, H, W), C 1 or 3, from uint8 or from floats in [0, 1]; ValueError in words for
    what is neither."""
    if videos.ndim == 4:
        videos = videos[:, :, None]
    if videos.ndim != 5 or 0 in videos.shape[1:]:
        raise ValueError(f"videos must be (N, T, C, H, W); they are {videos.shape}")
    if videos.dtype.kind == "f":
        videos = (np.nan_to_num(np.clip(videos, 0, 1)) * 255 + 0.5).astype(np.uint8)
    if videos.dtype != np.uint8:
        raise ValueError(f"videos must be uint8, or float in [0, 1]; they are {videos.dtype}")
    return videos if videos.shape[2] in (1, 3) else videos.mean(2, keepdims=True).astype(np.uint8)


def name_of(label, classes):
    return str(classes[label]) if 0 <= label < len(classes) else f"class {label}"


def by_class(labels, count, each=EACH):
    """Indices, the first of every class, then the second of every class, ...: at most `each` of
    one, `count` in all."""
    if labels is None:
        return list(range(min(count, 4 * each)))
    seen, rounds = {}, []
    for i, label in enumerate(labels[:count].tolist()):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= each:
            rounds.append((seen[label], label, i))
    return [i for _, _, i in sorted(rounds)][:6 * each]


# --------------------------------------------------------------------------------------------------
# What can be measured in the videos themselves

def dots(videos):
    """Of uint8 (N, T, C, H, W): the centre of what is bright, (N, T, 2) in pixels (x, y); the
    radius of a disc as bright and large, (N, T) in pixels; whether anything is seen. NaN where not.
    """
    mass = videos.astype(np.float32).mean(2)
    mass[mass <= 0.1 * 255] = 0
    total, peak = mass.sum((2, 3)), mass.max((2, 3))
    seen = total > 0
    with np.errstate(all="ignore"):
        x = (mass.sum(2) * np.arange(mass.shape[3], dtype=np.float32)).sum(2) / total
        y = (mass.sum(3) * np.arange(mass.shape[2], dtype=np.float32)).sum(2) / total
        radius = np.sqrt(total / peak / np.pi)
    return np.stack([x, y], -1), radius, seen


def skill(real, made):
    """(1 - MSE / MSE of a blank video, PSNR in dB, PSNR of a blank video) of uint8 videos."""
    error = np.square(made.astype(np.float32) - real).mean() / 255**2
    blank = np.square(real.astype(np.float32)).mean() / 255**2
    return 1 - error / max(blank, 1e-12), decibels(error), decibels(blank)


def decibels(error):
    return -10 * math.log10(max(error, 1e-12))


def away(a, b):
    """Mean distance in pixels of two paths (..., 2), where both have a dot; NaN where none has."""
    distance = np.sqrt(np.square(a - b).sum(-1))
    distance = distance[np.isfinite(distance)]
    return float(distance.mean()) if distance.size else math.nan


# --------------------------------------------------------------------------------------------------
# PNG and animated PNG (W3C PNG, third edition), with zlib alone

def png(frames, seconds=0.2, palette=None):
    """The bytes of a PNG of uint8 (H, W, C), C 1 grey, 3 colour or 4 with opacity; animated where
    there are several, as (T, H, W, C). With a palette, uint8 (at most 256, 3), C is 1, its index.
    """
    frames = frames if frames.ndim == 4 else frames[None]
    count, height, width, channels = frames.shape
    kind = {1: 0, 3: 2, 4: 6}[channels] if palette is None else 3
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header),
             chunk(b"tEXt", b"Software\0" + MARK.encode())]
    if count > 1:
        parts.append(chunk(b"acTL", struct.pack(">II", count, 0)))   # 0: for ever
    if palette is not None:
        parts.append(chunk(b"PLTE", palette.tobytes()))
    for i, frame in enumerate(frames):
        number = max(0, 2 * i - 1)   # fcTL and fdAT are counted together; the first has no fdAT
        if count > 1:
            delay = round(1000 * seconds), 1000
            parts.append(chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, 0, 0,
                                                    *delay, 0, 0)))
        data = min((zlib.compress(scan_lines(frame, up), 9) for up in (False, True)), key=len)
        parts.append(chunk(b"IDAT", data) if i == 0
                     else chunk(b"fdAT", struct.pack(">I", number + 1) + data))
    return b"".join([*parts, chunk(b"IEND", b"")])


_pictures = {}   # most pictures of a page are those of the page before; making them is its cost


def kept(make, arrays, words=()):
    """make(arrays, words), or what it made before of the same."""
    digest = hashlib.blake2b(repr((make.__name__, words, [a.shape for a in arrays])).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    key = digest.digest()
    if key not in _pictures:
        if sum(map(len, _pictures.values())) > CACHE_BYTES // 4:
            _pictures.clear()
        _pictures[key] = make(arrays, words)
    return _pictures[key]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def scan_lines(image, up):
    """The rows as they are (filter 0), or each less the one above (filter 2)."""
    rows = image.reshape(len(image), -1)
    lines = np.zeros((len(rows), rows.shape[1] + 1), np.uint8)
    lines[:, 1:] = rows
    if up:
        lines[:, 0] = 2
        lines[1:, 1:] -= rows[:-1]   # modulo 256, as the filter wants it
    return lines.tobytes()


def data_uri(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def reduced(videos, frames=16, pixels=64):
    """Fewer frames and smaller ones, so that a page can hold them; and which frames they are."""
    t, height, width = videos.shape[1], *videos.shape[3:]
    which = np.unique(np.linspace(0, t - 1, min(t, frames)).round().astype(int))
    videos = videos[:, which]
    by = -(-max(height, width) // pixels)
    if by > 1:
        h, w = max(1, height // by), max(1, width // by)
        blocks = videos[..., :h * by, :w * by]
        if height >= by and width >= by:
            blocks = blocks.reshape(*videos.shape[:3], h, by, w, by).mean((4, 6), np.float32)
        else:
            blocks = blocks[..., ::by, ::by]
        videos = blocks.astype(np.uint8)
    return videos, which


def sprite(videos, _):
    """All frames of the one video (T, C, H, W) side by side, of which the page shows one."""
    video, = videos
    t, c, h, w = video.shape
    return data_uri(png(video.transpose(2, 0, 3, 1).reshape(h, t * w, c)))


# Letters of 5 x 7 pixels for the strip: a character for each row from the top, in base 32, the left
# pixel the highest bit.
LETTERS = dict(zip(
    "abcdefghijklmnopqrstuvwxyz0123456789.,-_:/%()",
    """00e1fhf ggmphhu 00eggge 11djhhf 00ehvge 69s8888 00fhf1e ggmphhh 40c444e 206222i ggikoki
    c44444e 00qllll 00mphhh 00ehhhe 00uhugg 00djf11 00mpggg 00ege1u 88s8896 00hhhjd 00hhha4 00hhlla
    00ha4ah 00hhf1e 00v248v ehjlphe 4c4444e eh1248v v2421he 26aiv22 vgu11he 68guhhe v124888 ehehhhe
    ehhf12c 00000cc 000cc48 000v000 000000v 0cc0cc0 0124800 op248lj 2488842 8422248""".split()))


def lettering(text, scale=2):
    """Text as bool (7 scale, 6 n scale)."""
    rows = np.zeros((7, 6 * max(1, len(text))), bool)
    for i, letter in enumerate(text.lower()):
        for y, row in enumerate(LETTERS.get(letter, "0000000")):
            rows[y, 6 * i:6 * i + 5] = [int(row, 32) >> bit & 1 for bit in (4, 3, 2, 1, 0)]
    return rows.repeat(scale, 0).repeat(scale, 1)


# Grey videos need one byte a pixel: all greys but the five brightest, and five colours. Of these
# the sky blue and the orange are those of Okabe and Ito, which all eyes tell apart.
GREYS = 251
PALETTE = np.array([*((k, k, k) for k in range(GREYS)), (20, 22, 26), (70, 74, 82), (226, 228, 232),
                    (86, 180, 233), (230, 159, 0)], np.uint8)
BACK, EDGE, INK, SKY, ORANGE = range(GREYS, 256)


def strip(rows, columns=8):
    """An animated PNG from [(words, videos (N, T, C, H, W), given)], a row each, or None.

    Where `given` is not None, a given frame has a sky-blue edge and a predicted one an orange one.
    """
    rows = [(words, videos[:columns], given) for words, videos, given in rows if len(videos)]
    if rows:
        return kept(drawn_strip, [row[1] for row in rows], [row[::2] for row in rows])


def drawn_strip(videos, words):
    rows = [(name, reduced(part, pixels=128), given) for part, (name, given) in zip(videos, words)]
    columns = max(map(len, videos))
    colour = any(videos.shape[2] == 3 for _, (videos, _), _ in rows)
    margin = max(12 * len(words) for words, _, _ in rows) + 16
    lines, times = [], max(len(which) for _, (_, which), _ in rows)
    for words, (videos, which), given in rows:
        n, t, c, h, w = videos.shape
        scale = max(1, round(STRIP_TILE / max(h, w)))
        videos = videos.repeat(scale, 3).repeat(scale, 4).transpose(0, 1, 3, 4, 2)
        h, w = h * scale, w * scale
        line = np.full((times, max(h, 14) + 8, margin + columns * (w + 8), 1), BACK, np.uint8)
        text = lettering(words)
        top = (line.shape[1] - text.shape[0]) // 2
        line[:, top:top + text.shape[0], 8:8 + text.shape[1]][:, text] = INK
        line = PALETTE[line[..., 0]] if colour else line
        for k in range(times):
            edge = EDGE if given is None else SKY if which[k % t] < given else ORANGE
            for i in range(n):
                x = margin + i * (w + 8) + 2
                line[k, 2:h + 6, x:x + w + 4] = PALETTE[edge] if colour else edge
                line[k, 4:h + 4, x + 2:x + w + 2] = (
                    videos[i, k % t] if colour else np.minimum(videos[i, k % t], GREYS - 1))
        lines.append(line)
    width = max(line.shape[2] for line in lines)
    for i, line in enumerate(lines):
        rest = np.full((*line.shape[:2], width - line.shape[2], 1), BACK, np.uint8)
        lines[i] = np.concatenate([line, PALETTE[rest[..., 0]] if colour else rest], 2)
    return png(np.concatenate(lines, 1), palette=None if colour else PALETTE)


def strip_of_runs(found):
    """The picture of the newest training's samples, or else of the videos of a data set."""
    trainings = [run for run in found.runs if run.kind == "training"]
    trainings.sort(key=lambda run: number_in(run.progress.get("Heartbeat"), 0), reverse=True)
    for run in trainings:
        samples = read_samples(run.path / "samples.npz", [])
        if not samples:
            continue
        names = [name for name in ("real", "reconstructed") if name in samples]
        rows = [(name, samples[name], None) for name in names]
        if "generated" in samples:
            order = by_class(samples.get("generated_labels"), len(samples["generated"]), 2)
            rows.append(("generated", samples["generated"][order], None))
        if "predicted" in samples:
            rows += [("truth", samples["predicted_truth"], None),
                     ("predicted", samples["predicted"], samples["given"])]
        return strip(rows)
    for run in found.runs:
        sample = sample_of(run) if run.kind == "data" else Videos(run.path)
        if sample.shown is not None:
            order = by_class(sample.labels, len(sample.shown), 2)
            return strip([("real", sample.shown[order], None)])
    return strip_of_files([read_videos(path, 16) for path in found.files[:4]])


def strip_of_files(files):
    files, rows = [file for file in files if not file.problem], []
    for file in files:
        if file.truth is not None:
            rows.append(("truth", file.truth, None))
        given = file.given
        if file is not files[0] and belong(files[0], file):
            given = given or same_at_first(files[0].shown, file.shown)
        rows.append((file.path.stem[:20], file.shown, given or None))
        if len(files) == 1 and file.truth is None:
            rows += [("", file.shown[k:], None) for k in (8, 16, 24)]
    return strip(rows)


# --------------------------------------------------------------------------------------------------
# Diagrams, as SVG whose colours come from the page's style: c1, c2, ... lines, f1, f2, ... areas

def plot(series, x_label, y_label, words, marks=(), log=False, zero=False):
    """Lines over each other. series: [(name, number of the colour, xs, ys, dashed)];
    marks: [("restart" or "checkpoint", x, words)]; `words` say it to who cannot see it."""
    series = [(name, colour, *finite(xs, ys, log), dash) for name, colour, xs, ys, dash in series]
    series = [line for line in series if len(line[2])]
    if not series:
        return ""
    xs = np.concatenate([line[2] for line in series])
    ys = np.concatenate([line[3] for line in series])
    x0, x1 = spread(xs.min(), xs.max())
    y0, y1 = spread(0 if zero else ys.min(), ys.max(), 0.06)
    if log:
        y0, y1 = ys.min() / 1.1, ys.max() * 1.1
    scale = np.log if log else np.asarray
    place_x = lambda x: 54 + 374 * (x - x0) / (x1 - x0)   # noqa
    place_y = lambda y: 212 - 200 * (scale(y) - scale(y0)) / (scale(y1) - scale(y0))   # noqa
    out = [f'<svg class="plot" viewBox="0 0 440 252" role="img" aria-label="{e(words)}">']
    for y in log_ticks(y0, y1) if log else ticks(y0, y1):
        at = place_y(y)
        out.append(f'<line class="grid" x1="54" x2="428" y1="{at:.1f}" y2="{at:.1f}"/>'
                   f'<text x="48" y="{at + 4:.1f}" text-anchor="end">{short(y)}</text>')
    integers = (xs == xs.round()).all() and x1 - x0 >= 2
    for x in [x for x in ticks(x0, x1) if x == round(x) or not integers]:
        out.append(f'<text x="{place_x(x):.1f}" y="229" text-anchor="middle">{short(x)}</text>')
    out.append('<line class="axis" x1="54" x2="428" y1="212" y2="212"/>'
               f'<text x="241" y="247" text-anchor="middle">{e(x_label)}</text>'
               '<text transform="translate(11 112) rotate(-90)" text-anchor="middle">'
               f"{e(y_label)}</text>")
    for kind, x, tip in marks:
        if x0 <= x <= x1:
            shape = RESTART if kind == "restart" else SAVED
            out.append(f'<g transform="translate({place_x(x):.1f} 0)"><title>{e(tip)}</title>'
                       f"{shape}</g>")
    for name, colour, xs, ys, dash in series:
        xs, ys = thinned(xs, ys)
        places = [f"{x:.1f},{y:.1f}" for x, y in zip(place_x(xs), place_y(ys))]
        kind = f"c{colour} dash" if dash else f"c{colour}"
        out.append(f'<polyline class="{kind}" points="{" ".join(places)}"/>')
        for place, x, y in zip(places, xs, ys) if len(xs) <= 40 else ():
            across, down = place.split(",")
            out.append(f'<circle class="f{colour}" cx="{across}" cy="{down}" r="2.6"><title>'
                       f"{e(name)}: {short(y, 4)} at {e(x_label)} {short(x, 7)}</title></circle>")
    out.append("</svg>")
    keys = [(name, f'<line class="c{colour}{" dash" * dash}" x1="1" x2="25" y1="4" y2="4"/>')
            for name, colour, _, _, dash in series]
    kinds = {kind for kind, x, _ in marks if x0 <= x <= x1}
    if "restart" in kinds:
        keys.append(("restart", '<line class="restart" x1="13" x2="13" y1="0" y2="8"/>'))
    if "checkpoint" in kinds:
        keys.append(("checkpoint", '<path class="saved" d="M13 0l4 7h-8z"/>'))
    out.append('<p class="keys">')
    for name, shape in keys:
        out.append(f'<span><svg class="key" viewBox="0 0 26 8" aria-hidden="true">{shape}</svg>'
                   f"{e(name)}</span>")
    return "".join(out) + "</p>"


RESTART = '<line class="restart" x1="0" x2="0" y1="12" y2="212"/>'
SAVED = '<path class="saved" d="M0 207l4 7h-8z"/>'


def finite(xs, ys, log=False):
    xs, ys = np.asarray(xs, float), np.asarray(ys, float)
    good = (np.abs(xs) < 1e15) & (np.abs(ys) < 1e15) & ((ys > 0) | (not log))   # so no NaN either
    return xs[good], ys[good]


def thinned(xs, ys, most=300):
    """The lowest and the highest of every stretch: peaks stay."""
    if len(xs) <= most:
        return xs, ys
    keep = set()
    for part in np.array_split(np.arange(len(xs)), most // 2):
        keep |= {int(part[ys[part].argmin()]), int(part[ys[part].argmax()])}
    keep = sorted(keep | {0, len(xs) - 1})
    return xs[keep], ys[keep]


def spread(low, high, margin=0.0):
    """A range that is never empty."""
    low, high = float(low), float(high)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
        half = abs(low) * 0.1 or 0.5
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def ticks(low, high, about=5):
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= min((1, 2, 5, 10), key=lambda k: abs(math.log((high - low) / about / step / k)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def log_ticks(low, high):
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    each = (1,) if len(powers) > 4 else (1, 2, 5)
    found = [k * 10.0**p for p in powers for k in each if low <= k * 10.0**p <= high]
    return found if len(found) > 1 else ticks(low, high)


def short(value, digits=3):
    """A number for people: 1,234,000 or 0.0123."""
    if value != value or abs(value) == math.inf:
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return text if "e" not in text or abs(value) < 1e-4 else f"{value:f}"


def histogram(values, x_label, words, colour=1):
    values = np.asarray(values, float).ravel()
    values = values[np.isfinite(values)]
    if not values.size:
        return ""
    x0, x1 = spread(values.min(), values.max())
    counts = np.histogram(values, 24, (x0, x1))[0]
    out = [f'<svg class="plot small" viewBox="0 0 240 150" role="img" aria-label="{e(words)}">']
    for i, count in enumerate(counts):
        if count:
            height = max(1, 100 * count / counts.max())
            out.append(f'<rect class="f{colour}" x="{8 + i * 9.33:.1f}" y="{112 - height:.1f}" '
                       f'width="8.4" height="{height:.1f}"/>')
    out.append('<line class="axis" x1="6" x2="234" y1="112" y2="112"/>')
    for x in ticks(x0, x1, 4):
        out.append(f'<text x="{8 + 224 * (x - x0) / (x1 - x0):.1f}" y="127" '
                   f'text-anchor="middle">{short(x)}</text>')
    return "".join(out) + f'<text x="120" y="145" text-anchor="middle">{e(x_label)}</text></svg>'


def density(xy, width, height, words):
    """Where the dots are, as a picture: the denser, the more opaque."""
    xy = xy.reshape(-1, 2)
    xy = xy[np.isfinite(xy).all(1)]
    if not len(xy):
        return ""
    bins = min(32, height), min(32, width)
    ranges = (-0.5, height - 0.5), (-0.5, width - 0.5)
    counts = np.histogram2d(xy[:, 1], xy[:, 0], bins, ranges)[0]
    image = np.empty((*bins, 4), np.uint8)
    image[..., :3] = (46, 144, 208)
    image[..., 3] = 255 * np.sqrt(counts / max(1, counts.max()))
    return (f'<span class="density"><img class="sharp" src="{data_uri(png(image))}" '
            f'alt="{e(words)}"></span><span class="under">x to the right, y down: '
            f"{width} by {height} px</span>")


# --------------------------------------------------------------------------------------------------
# Videos on the page: one picture a video, all its frames side by side, of which a window shows one

def e(text):
    """Text from a file, made harmless in HTML, in SVG and in attributes."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else " " for c in str(text)))


def off(distance):
    return f"{distance:.2f} px off" if math.isfinite(distance) else "no dot is seen"


@dataclass
class Purse:
    """Bytes of pictures that a part of the page may still spend."""
    left: float
    frames: set = field(default_factory=set)   # lengths of the videos shown


class Film:
    """Some videos of one shape as tiles."""

    def __init__(self, videos, purse):
        self.height, self.width = videos.shape[3:]
        for frames, pixels in ((16, 64), (16, 32), (8, 16), (4, 8)):   # so that a few can be paid
            self.videos, self.which = reduced(videos, frames, pixels)
            if not len(videos) or 6 * len(kept(sprite, [self.videos[0]])) < purse.left:
                break
        h, w = self.videos.shape[3:]
        scale = max(1, round(TILE / max(h, w)))
        self.box, self.purse = (w * scale, h * scale), purse
        purse.frames.add(len(self.which))

    def group(self, tiles, kind=""):
        n = len(self.which)
        return (f'<div class="films {kind}" style="--n:{n};--f:var(--f{n},0);--w:{self.box[0]}px;'
                f'--h:{self.box[1]}px">{"".join(tiles)}</div>')

    def tile(self, i, alt, caption="", paths=(), given=None):
        """One video; paths: [(class, (T, 2) in pixels of the original)], shown on demand."""
        picture = kept(sprite, [self.videos[i]])
        over = ""
        if paths:
            lines = "".join(trace(kind, xy, self.width) for kind, xy in paths)
            over = (f'<svg class="path" viewBox="-0.5 -0.5 {self.width} {self.height}" '
                    f'aria-hidden="true">{lines}</svg>')
        ticks = ""
        if given is not None:
            share = 100 * int((self.which < given).sum()) / len(self.which)
            ticks = f'<i class="ticks" style="--g:{share:.1f}%"></i>'
        text = f'<span class="cap">{e(caption)}</span>' if caption else ""
        out = (f'<span class="tile"><span class="v"><img src="{picture}" alt="{e(alt)}">{over}'
               f"</span>{ticks}{text}</span>")
        self.purse.left -= len(out)
        return out


def trace(kind, xy, width):
    xy = xy[np.isfinite(xy).all(1)]
    if not len(xy):
        return ""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in xy)
    line = width / 40
    return (f'<polyline class="{kind}" points="{points}" stroke-width="{line:.2f}"/>'
            f'<circle class="{kind}" cx="{xy[0, 0]:.1f}" cy="{xy[0, 1]:.1f}" r="{1.5 * line:.2f}" '
            f'stroke-width="{line:.2f}"/>')


def play_videos(file, purse, heading="h4"):
    """The videos of a file or of a data set, by class."""
    shown = file.shown
    film, groups = Film(shown, purse), {}
    for i in by_class(file.labels, len(shown)):
        if purse.left <= 0:
            break
        name = name_of(file.labels[i], file.classes) if file.labels is not None else ""
        path = file.paths[i] if file.paths is not None else dots(shown[i:i + 1])[0][0]
        alt = f"video {i}{', ' + name if name else ''}: {shown.shape[1]} frames"
        groups.setdefault(name, []).append(
            film.tile(i, alt, paths=[("p1", path)], given=file.given or None))
    names, out = [str(name) for name in file.classes], []
    for name in sorted(groups, key=lambda name: names.index(name) if name in names else 1000):
        out.append((f"<{heading}>{e(name)}</{heading}>" if name else "") + film.group(groups[name]))
    return "".join(out) + less_frames(film, shown)


def less_frames(film, shown):
    """Words for a reader who sees less than there is."""
    if film.purse.left <= 0:
        return '<p class="soft">Not all are shown: the page would become too large.</p>'
    words = []
    if len(film.which) < shown.shape[1]:
        words.append(f"{len(film.which)} of {shown.shape[1]} frames")
    if film.videos.shape[3:] != shown.shape[3:]:
        words.append(f"{film.videos.shape[4]} by {film.videos.shape[3]} pixels instead of "
                     f"{shown.shape[4]} by {shown.shape[3]}")
    return f'<p class="soft">Shown: {"; ".join(words)}.</p>' if words else ""


def play_files(files, budget):
    """The parts of a page for .npz files. Videos that belong together, like predictions and what
    they were made from, stand beside each other."""
    purse, parts = Purse(budget), []
    first = files[0]
    for file in files:
        if file is first or not belong(first, file):
            together = [other for other in files[1:] if belong(first, other)]
            others = [first] + together if file is first else [file]
            parts.append(one_file(others, purse))
    return Part("".join(parts), purse.frames)


def one_file(files, purse):
    file, columns = files[0], []
    for other in files:
        columns += [("truth", other.truth, 0)] if other.truth is not None else []
        columns.append((other.path.name, other.shown, other.given))
    shape = " x ".join(map(str, file.shown.shape[1:]))
    words = f"{file.total:,} videos of {shape} (frames, channels, height, width). {file.note}"
    head = (f'<section class="card" id="{ident(str(file.path))}">'
            f'<h2>{e(" and ".join(f.path.name for f in files))}</h2><p class="soft">{e(words)}</p>')
    if len(columns) == 1:
        return head + play_videos(file, purse, "h3") + "</section>"
    count = min(len(videos) for _, videos, _ in columns)
    films = [Film(videos, purse) for _, videos, _ in columns]
    centres = [dots(videos[:count])[0] for _, videos, _ in columns]
    given = max(given for _, _, given in columns) or same_at_first(columns[0][1], columns[-1][1])
    sets = []
    for i in by_class(file.labels, count):
        if purse.left <= 0:
            break
        name = name_of(file.labels[i], file.classes) if file.labels is not None else ""
        tiles = []
        for k, ((column, _, _), film) in enumerate(zip(columns, films)):
            both = [("p1", centres[0][i])] + ([("p2", centres[k][i])] if k else [])
            marked = given if k and given else None
            tiles.append(film.tile(i, f"video {i} {name} from {column}", column, both, marked))
        sets.append(f'<div class="set">{films[0].group(tiles, "tight")}<span class="cap">video {i} '
                    f"{e(name)}</span></div>")
    return (f'{head}<div class="sets">{"".join(sets)}</div>{less_frames(films[0], file.shown)}'
            "</section>")


def same_at_first(truth, made):
    """How many frames of a prediction are those it was given; 0 if that cannot be seen."""
    n = min(len(truth), len(made))
    same = (truth[:n] == made[:n]).all((0, 2, 3, 4))
    return 0 if same.all() else int(same.argmin())


def belong(a, b):
    """Whether two files hold versions of the same videos: they begin alike, video by video."""
    if a is b or a.shown.shape[1:] != b.shown.shape[1:]:
        return a is b
    n = min(len(a.shown), len(b.shown), 16)
    if n < 2:
        return True
    first, second = a.shown[:n, 0].astype(np.float32), b.shown[:n, 0].astype(np.float32)
    return np.abs(first - second).mean() < 0.7 * np.abs(first - np.roll(second, 1, 0)).mean()


def ident(text):
    return "s" + hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]


# --------------------------------------------------------------------------------------------------
# A data set: what is in it, and is it what it should be?

def sample_of(run):
    """Some videos of a data run, of pieces from its beginning to its newest."""
    arrays, pieces = [], evenly(run.pieces, 6)
    for _, path in pieces:
        file = read_videos(path, 384 // len(pieces))
        if file.problem:
            run.notes.append(f"{path.name}: {file.problem}")
        else:
            arrays.append(file)
    arrays = [file for file in arrays if file.shown.shape[1:] == arrays[0].shown.shape[1:]]
    if not arrays:
        return Videos(run.path)
    one = Videos(run.path, np.concatenate([file.shown for file in arrays]))
    if all(file.labels is not None for file in arrays):
        one.labels = np.concatenate([file.labels for file in arrays])
    if all(file.paths is not None for file in arrays):
        one.paths = np.concatenate([file.paths for file in arrays])
    return one


def evenly(items, most):
    """At most so many of the items, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def class_counts(run):
    """({label: videos}, videos counted): in all pieces, or in some if there are very many."""
    few, counts = evenly(run.pieces, 100), {}
    for _, path in few:
        try:
            labels = first_rows(path, {"labels": 1 << 20})[0]["labels"]
            for label, count in zip(*np.unique(labels, return_counts=True)):
                counts[int(label)] = counts.get(int(label), 0) + int(count)
        except Exception:   # sample_of or verify name what is wrong with it
            run.notes.append(f"{path.name}: its labels cannot be read")
    return counts, len(few)


def data_part(run, budget):
    sample = sample_of(run)
    counts, pieces = class_counts(run)
    purse, out = Purse(budget), []
    if counts:
        most, total = max(counts.values()), sum(counts.values())
        some = f" (counted in {pieces} of {len(run.pieces)} checkpoints)"
        some = some if pieces < len(run.pieces) else ""
        out.append(f'<h3>Videos by class{some}</h3><table class="bars">')
        for label in sorted(counts)[:50]:
            count = counts[label]
            out.append(f'<tr><th scope="row">{e(name_of(label, CLASSES))}</th><td><i style="width:'
                       f'{100 * count / most:.1f}%"></i></td><td>{count:,}</td>'
                       f"<td>{100 * count / total:.1f} %</td></tr>")
        out.append("</table>")
        if min(counts.values()) < 0.9 * most - 2 * pieces:
            words = f"the classes are uneven: {min(counts.values()):,} to {most:,} videos"
            run.checks.append(("warn", words))
        if run.title.startswith("Dataset generation") and len(counts) < len(CLASSES):
            run.checks.append(("warn", f"only {len(counts)} of the {len(CLASSES)} classes"))
    if sample.shown is None:
        out.append('<p class="soft">No videos to show yet: they come with the first checkpoint.'
                   '</p>')
        return "".join(out), purse.frames
    out.append(figures_of(run, sample))
    out.append(f"<h3>Some of the videos</h3>{play_videos(sample, purse)}")
    return "".join(out), purse.frames


def figures_of(run, sample):
    """Where the dots are, how large and how fast, and whether they are where they should be."""
    some = sample.shown[:max(1, (16 << 20) // sample.shown[0].size)]
    height, width = some.shape[3:]
    stretches = np.array_split(some, -(-some.size // (2 << 20)))   # each takes four times as much
    centres, radius, seen = map(np.concatenate, zip(*map(dots, stretches)))
    speed = np.sqrt(np.square(np.diff(centres, axis=1)).sum(-1))
    lines = []
    empty = 1 - seen.mean()
    lines.append(check(run, empty == 0, f"{100 * empty:.1f} % of the frames show nothing",
                       "every frame shows a dot"))
    if sample.paths is not None:
        distance = away(centres, sample.paths[:len(some)])
        lines.append(check(run, distance < 0.5,
                           f"the dots are {distance:.2f} px from where trajectory_2d says",
                           f"the dots are where trajectory_2d says, to {distance:.2f} px"))
        inside = ((sample.paths >= -0.5) & (sample.paths <= [width - 0.5, height - 0.5])).all()
        lines.append(check(run, inside, "some dot centres lie outside the frame",
                           "every dot centre is inside the frame"))
    whole = centres[seen.all(1)]
    if len(whole) and np.ptp(whole, axis=1).max() < 0.5:
        lines.append(check(run, False, "nothing moves", ""))
    middle = lambda x: short(float(np.nanmedian(x))) if np.isfinite(x).any() else "none"   # noqa
    maps = [("Where the dots are",
             density(centres, width, height, "Where the dots are: a map of the frame")),
            ("How large they are",
             histogram(radius, "radius, px", f"Radius of the dots, median {middle(radius)} px")),
            ("How fast they are",
             histogram(speed, "speed, px a frame", f"Speed, median {middle(speed)} px a frame", 2))]
    figures = "".join(f"<figure><figcaption>{words}</figcaption>{picture}</figure>"
                      for words, picture in maps)
    return (f"<h3>Measured in {len(some):,} of the videos</h3>"
            f'<ul class="checks">{"".join(lines)}</ul><div class="row">{figures}</div>')


def check(run, good, bad_words, good_words):
    if not good:
        run.checks.append(("warn", bad_words))
    return f'<li class="{"good" if good else "bad"}">{e(good_words if good else bad_words)}</li>'


# --------------------------------------------------------------------------------------------------
# A training

def read_samples(path, notes):
    """samples.npz: {name: array}, videos as uint8 with C 1 or 3; {} where it does not fit."""
    try:
        if not path.is_file():
            return {}
        arrays, _, problem = first_rows(path, {None: 64})
    except OSError as error:
        arrays, problem = {}, words_of(error)
    samples = {"classes": names_in(arrays)}
    try:
        if problem:
            raise ValueError(problem)
        for name in ("real", "reconstructed", "generated", "predicted", "predicted_truth"):
            if name in arrays:
                samples[name] = as_pixels(arrays[name])
        for a, b in (("real", "reconstructed"), ("predicted", "predicted_truth")):
            if np.shape(samples.get(a)) != np.shape(samples.get(b)):
                notes.append(f"{path.name}: {a} and {b} do not fit together")
                samples.pop(a, None), samples.pop(b, None)
        samples["given"], samples["step"] = count_in(arrays, "given") or 0, count_in(arrays, "step")
        labels = arrays.get("generated_labels")
        whole = getattr(labels, "dtype", np.dtype(float)).kind in "iu"
        if whole and labels.shape == np.shape(samples.get("generated"))[:1]:
            samples["generated_labels"] = labels.astype(np.int64)
        return samples if len(samples) > 3 else {}
    except (ValueError, KeyError, TypeError) as error:
        notes.append(f"{path.name} cannot be shown ({one_line(error)})")
        return {}


def training_part(run, budget):
    purse, out = Purse(budget), []
    rows = history_of(run)
    samples = read_samples(run.path / "samples.npz", run.notes)
    curves = guarded(loss_curves, [(run.name, rows)], marks_of(run, rows))
    out.append(curves or '<p class="soft">No loss curve yet: it begins with the first epoch.</p>')
    losses = [row[key] for row in rows for key in ("train_loss", "validation_loss")]
    if not all(loss is None or math.isfinite(loss) for loss in losses):
        run.checks.append(("bad", "a loss is not finite"))
    if samples:
        at = f" at step {samples['step']:,}" if samples["step"] is not None else ""
        for part in (reconstructions, predictions, generations):
            out.append(guarded(part, run, samples, Purse(budget / 3, purse.frames), at))
    else:
        out.append('<p class="soft">No videos yet: training writes samples.npz from its first '
                   "checkpoint on.</p>")
    out.append(guarded(figures_part, run))
    return guarded(headlines, run.metrics) + "".join(out), purse.frames


def headlines(metrics):
    """The four figures that say most, large, each beside the hardest of its baselines."""
    tiles = []
    for words, where in (("PSNR of reconstructions", "tokenizer.psnr_db"),
                         ("of test videos classified right", "classification.accuracy"),
                         ("of generated videos judged right", "generation.judged_right_unchosen"),
                         ("error of predictions", "prediction.model.error_px")):
        value, rows = look_up(metrics, where), [row for row in FIGURES if row[2] == where]
        bases = [(look_up(metrics, row[5]), row[4]) for row in rows]
        bases = [(base, name) for base, name in bases if base is not None]
        if value is None or not bases:
            continue
        unit, how = rows[0][3], rows[0][6]
        base, name = min(bases)
        kind = "good" if beats(value, base, how) else "bad"
        tiles.append(f'<li><b>{with_unit(value, unit)}</b>{words}<span class="{kind}">{name} '
                     f"{with_unit(base, unit)}</span></li>")
    return f'<ul class="heads">{"".join(tiles)}</ul>' if tiles else ""


def history_of(run):
    """The rows of history.json that are rows, with a number or NaN for each figure."""
    rows, good = read_json(run.path / "history.json", run.notes), []
    if rows is None:
        return []
    rows = rows if isinstance(rows, list) else [rows]
    for row in rows:
        if isinstance(row, dict) and as_number(row.get("step")) is not None:
            keys = "step", "epoch", "train_loss", "validation_loss"
            numbers = {key: as_number(row.get(key)) for key in keys}
            good.append({**numbers, "phase": one_line(row.get("phase", "training"))[:60],
                         "restart": bool(row.get("restart"))})
    if len(good) < len(rows):
        run.notes.append("history.json: some rows are not rows of a history")
    return good


def as_number(value):
    """A float, or None for what is not a number. NaN and infinity are numbers here."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if isinstance(value, float) or abs(value) < 1e300 else None


def marks_of(run, rows):
    """Where it restarted, and where its checkpoints are or were."""
    marks = [("restart", row["step"], f"restarted before step {row['step']:,.0f}")
             for row in rows if row["restart"]]
    for step in re.findall(r"\b\d{1,15}\b", run.progress.get("Restarts", ""))[-60:]:
        marks.append(("restart", int(step), f"restarted at step {int(step):,}"))
    steps = {number: path.name for number, path in checkpointing.find_checkpoints(run.path)}
    try:
        for name in checkpointing.read_records(run.path):
            match = re.fullmatch(r"checkpoint_(\d{1,15})\.\w+", name)
            if match:
                steps.setdefault(int(match[1]), name)
    except CheckpointError as error:
        run.notes.append(words_of(error))
    return marks + [("checkpoint", step, steps[step]) for step in evenly(sorted(steps), 60)]


def loss_curves(trainings, marks=()):
    """A diagram a phase: train and validation loss, or of several trainings the latter."""
    out = []
    for phase in list(dict.fromkeys(row["phase"] for _, rows in trainings for row in rows))[:6]:
        series = []
        for k, (name, rows) in enumerate(trainings):
            before = [row["step"] for row in rows if row["phase"] != phase]
            rows = [row for row in rows if row["phase"] == phase]
            steps = [row["step"] for row in rows]
            if len(trainings) > 1 and steps:   # each from where the phase began
                start = max([step for step in before if step < steps[0]], default=0)
                steps = [step - start for step in steps]
            train = [math.nan if row["train_loss"] is None else row["train_loss"] for row in rows]
            held_out = [math.nan if row["validation_loss"] is None else row["validation_loss"]
                        for row in rows]
            if len(trainings) == 1:
                series.append(("train", 1, steps, train, False))
                series.append(("validation", 2, steps, held_out, True))
            else:
                series.append((name, k % 6 + 1, steps, held_out, k >= 6))
        values = np.concatenate([finite(xs, ys)[1] for _, _, xs, ys, _ in series])
        if not values.size:
            continue
        log = bool((values > 0).all() and values.max() > 5 * values.min())
        words = f"Loss of the {phase}, from {short(values.max())} to {short(values.min())}"
        across, label = "step", "loss"
        if len(trainings) > 1:
            across, label = "step of this phase", "validation loss"
        label += ", log scale" if log else ""
        out.append(f'<figure class="half"><figcaption>{e(phase)}</figcaption>'
                   f"{plot(series, across, label, words, marks, log)}</figure>")
    return f'<h3>Loss</h3><div class="row">{"".join(out)}</div>' if out else ""


def reconstructions(run, samples, purse, at):
    if "real" not in samples or not len(samples["real"]):
        return ""
    real, made = samples["real"], samples["reconstructed"]
    value, ratio, blank = skill(real, made)
    centres, found = dots(real)[0], dots(made)[0]
    if value < 0:
        words = f"reconstructions are worse than blank videos (skill {value:.2f})"
        run.checks.append(("warn", words))
    error = np.abs(made.astype(np.int16) - real).astype(np.uint8)
    films = [Film(videos, purse) for videos in (real, made, error)]
    sets = []
    for i in range(min(12, len(real))):
        if purse.left <= 0:
            break
        each = decibels(np.square(error[i] / 255.0).mean())
        paths = [("p1", centres[i]), ("p2", found[i])]
        tiles = [films[0].tile(i, f"real video {i}", "real", paths),
                 films[1].tile(i, f"the same after the tokenizer: PSNR {each:.1f} dB",
                               "reconstructed", paths),
                 films[2].tile(i, "the difference of the two, in brightness", "error")]
        sets.append(f'<div class="set">{films[0].group(tiles, "tight")}<span class="cap">'
                    f"{each:.1f} dB</span></div>")
    return (f"<h3>Reconstructed{at}</h3><p>On these {len(real)} videos: skill <b>{value:.3f}</b> "
            f"(a blank video has 0, a perfect one 1), PSNR <b>{ratio:.1f} dB</b> (blank "
            f"{blank:.1f} dB), dots <b>{off(away(centres, found))}</b>.</p>"
            f'{LEGEND}<div class="sets">{"".join(sets)}</div>' + less_frames(films[0], real))


LEGEND = ('<p class="pathwords soft">Paths: blue true, orange made; a ring is where they begin.'
          "</p>")


def predictions(run, samples, purse, at):
    if "predicted" not in samples or not len(samples["predicted"]):
        return ""
    truth, made, given = samples["predicted_truth"], samples["predicted"], samples["given"]
    centres, (found, _, seen) = dots(truth)[0], dots(made)
    error = away(centres[:, given:], found[:, given:])
    last = away(centres[:, given:], centres[:, max(0, given - 1):max(1, given)])
    films = [Film(videos, purse) for videos in (truth, made)]
    sets = []
    for i in range(min(12, len(truth))):
        if purse.left <= 0:
            break
        words = off(away(centres[i, given:], found[i, given:]))
        tiles = [films[0].tile(i, f"real video {i}, predicted from frame {given}", "truth",
                               [("p1", centres[i])], given),
                 films[1].tile(i, f"its prediction, {words}", "predicted",
                               [("p1", centres[i]), ("p2", found[i])], given)]
        sets.append(f'<div class="set">{films[0].group(tiles, "tight")}<span class="cap">'
                    f"{words}</span></div>")
    kind = "good" if error < last else "bad"
    empty = 100 * (1 - seen[:, given:].mean()) if given < seen.shape[1] else 0
    blank = f" {empty:.1f} % of the predicted frames show nothing." if empty > 1 else ""
    return (f'<h3>Predicted{at}</h3><p>The first {given} frames were given (<i class="sky"></i> '
            'below the video), the others are predicted (<i class="orange"></i>). On these '
            f'{len(truth)} videos: <b class="{kind}">{off(error)}</b>; to go on showing the last '
            f"given frame is {off(last)}.{blank}</p>{LEGEND}"
            f'<div class="sets">{"".join(sets)}</div>' + less_frames(films[0], truth))


def generations(run, samples, purse, at):
    if "generated" not in samples or not len(samples["generated"]):
        return ""
    file = Videos(run.path, samples["generated"], len(samples["generated"]),
                  samples.get("generated_labels"), samples["classes"])
    empty = 1 - dots(file.shown)[2].mean()
    words = ""
    if empty > 0.01:
        words = f"<p>{100 * empty:.1f} % of the frames show nothing; real ones never do.</p>"
    return f"<h3>Generated{at}</h3>{words}" + play_videos(file, purse)


# -- figures, each with its baseline

# (group, words, place in metrics.json, unit, words and place of the baseline, how the two compare)
# How: > must be above it, < below it; near: at least nine tenths of it; close: at most three times
# it; own: not much below it, else the videos are copies; none: there is nothing to beat.
FIGURES = [
    ("Tokenizer", "size of a video", "tokenizer.bits_per_video", "bits",
     "raw pixels", "tokenizer.raw_bits", "<"),
    ("Tokenizer", "PSNR", "tokenizer.psnr_db", "dB", "blank video", "tokenizer.blank_psnr_db", ">"),
    ("Tokenizer", "skill, 1 - MSE / MSE of blank", "tokenizer.skill", "", "blank video", 0.0, ">"),
    ("Tokenizer", "foreground error", "tokenizer.foreground_error", "",
     "blank video", "tokenizer.blank_foreground_error", "<"),
    ("Tokenizer", "dot's distance from the truth", "tokenizer.centroid_error_px", "px",
     "middle of the frame", "tokenizer.middle_centroid_error_px", "<"),
    ("Tokenizer", "frames without a dot", "tokenizer.frames_without_dot", "%", "", None, "none"),
    ("Tokenizer", "frames with two dots", "tokenizer.frames_with_two_dots", "%", "", None, "none"),
    ("Tokenizer", "codes in use", "tokenizer.active_codes", "",
     "all there are", "tokenizer.codes", "none"),
    ("Tokenizer", "perplexity of codes, foreground", "tokenizer.foreground_perplexity", "",
     "all codes alike", "tokenizer.codes", "none"),
    ("Classified", "right, whole videos", "classification.accuracy", "%",
     "chance", "classification.chance", ">"),
    ("Classified", "right, first half of the frames", "classification.accuracy_first_half", "%",
     "chance", "classification.chance", ">"),
    ("Generated", "judged to be of the class asked for", "generation.judged_right_unchosen", "%",
     "real videos", "judge.accuracy_on_real", "near"),
    ("Generated", "the same, the surest of several", "generation.judged_right", "%",
     "real videos", "judge.accuracy_on_real", "near"),
    ("Generated", "frames with exactly one dot", "generation.one_dot", "%",
     "real videos", "generation.one_dot_real", "near"),
    ("Generated", "distance of the paths to real ones", "generation.feature_distance", "",
     "real from real", "generation.feature_distance_real_halves", "close"),
    ("Generated", "nearest training video, RMSE", "generation.nearest_training_video_rmse", "",
     "real videos", "generation.nearest_training_video_rmse_real", "own"),
    ("Predicted", "dot's distance from the truth", "prediction.model.error_px", "px",
     "copy of the last frame", "prediction.copy_last.error_px", "<"),
    ("Predicted", "", "prediction.model.error_px", "px",
     "constant velocity", "prediction.constant_velocity.error_px", "<"),
    ("Predicted", "", "prediction.model.error_px", "px",
     "nearest training video", "prediction.nearest_neighbour.error_px", "<"),
    ("Predicted", "frames with exactly one dot", "prediction.one_dot", "%", "", None, "none"),
]
VERDICTS = {">": ("beats it", "does not beat it"), "<": ("beats it", "does not beat it"),
            "near": ("close to it", "below it"), "close": ("close to it", "far from it"),
            "own": ("no copies", "close to copies")}


def look_up(metrics, where):
    """A number in nested dicts, or None."""
    if not isinstance(where, str):
        return where   # a number known beforehand, or None
    for key in where.split("."):
        metrics = as_dict(metrics).get(key)
    return as_number(metrics)


def beats(value, base, how):
    return {">": value > base, "<": value < base, "near": value >= 0.9 * base,
            "close": value <= 3 * base, "own": value >= 0.7 * base}[how]


def with_unit(value, unit):
    if value is None:
        return ""
    if unit == "%" and math.isfinite(value):
        return f"{100 * value:.1f} %"
    return f"{short(value)} {unit}".strip()


def figures_of_metrics(metrics):
    """[(group, words, value, baseline, its words, whether it beats it or None, how)]."""
    rows = []
    for group, words, where, unit, base_words, base_where, how in FIGURES:
        value, base = look_up(metrics, where), look_up(metrics, base_where)
        if value is None or not words and base is None:
            continue
        better = None if how == "none" or base is None else bool(beats(value, base, how))
        rows.append((group, words, with_unit(value, unit) if words else "", with_unit(base, unit),
                     base_words if base is not None else "", better, how))
    return rows


def figures_part(run):
    """The evaluation: the table, the confusion, and the prediction by class and by distance."""
    metrics = run.metrics
    if not metrics:
        return '<p class="soft">No evaluation yet: it comes at the end of training.</p>'
    rows, out = figures_of_metrics(metrics), ["<h3>Evaluated on test videos</h3>"]
    group, said = None, ""
    for warning in metrics.get("warnings") if isinstance(metrics.get("warnings"), list) else []:
        run.checks.append(("warn", one_line(warning)))
    table = []
    for row_group, words, value, base, base_words, better, how in rows:
        if row_group != group:
            group = row_group
            table.append(f'<tr class="group"><th colspan="5" scope="colgroup">{e(group)}</th></tr>')
        mark = ""
        said = f"{words} {value}" if words else said   # else the same figure, another baseline
        if better is not None:
            mark = f'<span class="{"good" if better else "bad"}">{VERDICTS[how][not better]}</span>'
            if not better and how in "<>":
                run.checks.append(("warn", f"{group.lower()}: {said} does not beat {base_words} "
                                   f"({base})"))
        table.append(f'<tr><th scope="row">{e(words)}</th><td class="number"><b>{e(value)}</b></td>'
                     f'<td class="number">{e(base)}</td><td>{e(base_words)}</td><td>{mark}</td>'
                     "</tr>")
    if table:
        out.append('<div class="wide"><table class="figures"><thead><tr><th scope="col">figure</th>'
                   '<th scope="col">model</th><th scope="col" colspan="2">baseline</th>'
                   "<th></th></tr></thead><tbody>" + "".join(table) + "</tbody></table></div>")
    out.append('<div class="row">')
    for part in (confusion, by_horizon, by_name):
        out.append(guarded(part, metrics))
    out.append("</div>")
    text = json.dumps(metrics, indent=1, default=str)[:20000]
    out.append(f'<details id="{run.id}m"><summary>All figures as they are in metrics.json</summary>'
               f"<pre>{e(text)}</pre></details>")
    return "".join(out)


def confusion(metrics):
    part = as_dict(metrics.get("classification"))
    counts, names = part.get("confusion_true_by_guessed"), part.get("classes")
    if not counts or not names:
        return ""
    counts = np.array(counts, float)
    if counts.shape != (len(names), len(names)) or len(names) > 40:
        return '<p class="soft">The confusion matrix does not fit its classes.</p>'
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [one_line(name) for name in names]
    head = "".join(f'<th scope="col">{e(name)}</th>' for name in names)
    body = ""
    for i, name in enumerate(names):
        body += f'<tr><th scope="row">{e(name)}</th>'
        for j in range(len(names)):
            kind = "right" if i == j else "wrong"
            kind += " strong" if shares[i, j] > 0.55 else ""
            body += (f'<td class="{kind}" style="--p:{100 * shares[i, j]:.0f}%">'
                     f"{counts[i, j]:,.0f}</td>")
        body += "</tr>"
    return ('<figure><figcaption>Confusion: true class by guessed class</figcaption>'
            '<div class="wide"><table class="confusion"><thead><tr><th scope="col">true \\ guessed'
            f"</th>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>")


METHODS = (("model", "the model"), ("copy_last", "copy of the last frame"),
           ("constant_velocity", "constant velocity"),
           ("nearest_neighbour", "nearest training video"))


def by_horizon(metrics):
    part, series = as_dict(metrics.get("prediction")), []
    for k, (key, words) in enumerate(METHODS):
        errors = as_dict(part.get(key)).get("by_horizon")
        if isinstance(errors, list) and errors:
            errors = [as_number(value) for value in errors]
            errors = [math.nan if value is None else value for value in errors]
            series.append((words, k + 1, list(range(1, len(errors) + 1)), errors, k > 0))
    if not series:
        return ""
    given = as_number(part.get("frames_given"))
    title = "Prediction error" + (f", {given:.0f} frames given" if given else "")
    words = title + ": " + "; ".join(f"{name} {', '.join(short(y) for y in ys)} px"
                                     for name, _, _, ys, _ in series)
    return (f'<figure class="half"><figcaption>{title}</figcaption>'
            + plot(series, "frames ahead", "error, px", words, zero=True) + "</figure>")


def by_name(metrics):
    """Of each class: generated videos judged right, and the prediction beside the best baseline."""
    right = as_dict(as_dict(metrics.get("generation")).get("judged_right_by_class"))
    part = as_dict(metrics.get("prediction"))
    errors = {key: as_dict(as_dict(part.get(key)).get("by_class")) for key, _ in METHODS}
    names = list(dict.fromkeys([*right, *errors["model"]]))[:60]
    if not names:
        return ""
    body = ""
    for name in names:
        value = as_number(errors["model"].get(name))
        others = [(as_number(errors[key].get(name)), words) for key, words in METHODS[1:]]
        others = [(base, words) for base, words in others if base is not None]
        base, words = min(others) if others else (None, "")
        mark = ""
        if value is not None and base is not None:
            kind, said = ("good", VERDICTS["<"][0]) if value < base else ("bad", VERDICTS["<"][1])
            mark = f'<span class="{kind}">{said}</span>'
        body += (f'<tr><th scope="row">{e(one_line(name))}</th><td class="number">'
                 f'{with_unit(as_number(right.get(name)), "%")}</td><td class="number">'
                 f'{with_unit(value, "px")}</td><td class="number">{with_unit(base, "px")}</td>'
                 f"<td>{e(words)}</td><td>{mark}</td></tr>")
    return ('<figure><figcaption>By class</figcaption><div class="wide"><table class="figures">'
            '<thead><tr><th scope="col">class</th><th scope="col">generated, judged right</th>'
            '<th scope="col">predicted</th><th scope="col" colspan="3">best baseline for this class'
            f"</th></tr></thead><tbody>{body}</tbody></table></div></figure>")


def comparison(runs):
    """Several trainings: their curves over each other, their figures side by side."""
    trainings = [run for run in runs if run.kind in ("training", "evaluation")]
    if len(trainings) < 2:
        return ""
    newest = sorted(trainings, key=lambda run: number_in(run.progress.get("Heartbeat"), 0))[-12:]
    newest = [run for run in trainings if run in newest]
    out = ['<section class="card" id="compared"><h2>Trainings side by side</h2>']
    if len(newest) < len(trainings):
        out.append(f'<p class="soft">The {len(newest)} newest of {len(trainings)}.</p>')
    out.append(guarded(loss_curves, [(run.name, history_of(run)) for run in newest]))
    tables = []
    for run in newest:
        rows = figures_of_metrics(run.metrics)
        tables.append({row[:2]: (row[2], row[5]) for row in rows if row[1]})
    keys = list(dict.fromkeys(key for table in tables for key in table))
    settings = list(dict.fromkeys(key for run in newest for key in run.settings))
    settings = [key for key in settings if len({repr(run.settings.get(key)) for run in newest}) > 1]
    heads = "".join(f'<th scope="col"><a href="#{run.id}">{e(run.name)}</a></th>' for run in newest)
    body = ""
    for key in settings[:30]:
        body += f'<tr><th scope="row">{e(one_line(key))} (setting)</th>' + "".join(
            f'<td class="number">{e(one_line(run.settings.get(key, ""))[:80])}</td>'
            for run in newest) + "</tr>"
    for key in keys:
        body += f'<tr><th scope="row">{e(key[0])}: {e(key[1])}</th>'
        for table in tables:
            value, better = table.get(key, ("", None))
            kind = "" if better is None else ' class="good"' if better else ' class="bad"'
            body += f'<td class="number"><span{kind}>{e(value)}</span></td>'
        body += "</tr>"
    if body:
        out.append('<h3>Figures</h3><div class="wide"><table class="figures"><thead><tr>'
                   f'<th scope="col">figure</th>{heads}</tr></thead><tbody>{body}</tbody></table>'
                   '</div><p class="soft">A tick beats its baseline, a cross does not; the '
                   "baselines are with each run.</p>")
    return "".join(out) + "</section>"


# --------------------------------------------------------------------------------------------------
# The page

@dataclass
class Part:
    """A piece of the page, and the lengths of the videos in it."""
    html: str
    frames: set = field(default_factory=set)


def guarded(function, *arguments):
    """A part of the page, or words in its place: one bad file must not cost the rest of it."""
    try:
        with np.errstate(all="ignore"):
            return function(*arguments)
    except Exception as error:
        where = function.__name__.replace("_part", "").replace("_", " ")
        return f'<p class="note">This part ({where}) could not be drawn: {e(words_of(error))}</p>'


def page_of(found):
    """The page of all runs, with fewer videos if it would become too large."""
    for budget in (PICTURE_BYTES, 500_000, 150_000, 30_000, 0):
        page = page_within(found, budget)
        if len(page) <= PAGE_BYTES:
            break
    return page


def page_within(found, budget):
    made, files = time.time(), []
    runs = list(found.runs)
    homes = {run.path for run in runs if run.kind == "data" and run.pieces}
    lines = []
    newest = sorted(found.files, key=lambda path: path.stat().st_mtime)[-50:]
    for path in [path for path in found.files if path in newest]:
        arrays = guarded(first_rows, path, {"trajectory_3d": 1})
        if isinstance(arrays, tuple) and "trajectory_3d" in arrays[0]:   # a merged set
            if path.parent in homes:
                lines.append(f"{path.name}: all {arrays[1]['trajectory_3d'][0]:,} videos joined, "
                             f"{path.stat().st_size:,} bytes")
            else:
                name = str(path.relative_to(found.top)) if found.top in path.parents else str(path)
                runs.insert(0, Run(path, name, "data", "Data set", pieces=[(0, path)]))
        else:
            files.append(path)
    whole = sorted(runs, key=lambda run: run.kind not in ("data", "training"))[:MOST_RUNS]
    pictured = sum(run.kind in ("data", "training") for run in whole) + bool(files)
    share, frames, body = budget / max(1, pictured), set(), []
    for run in runs:
        if run in whole:
            part, seen = run_card(run, share, folded=len(whole) > 6)
            frames |= seen
            body.append(part)
    if len(whole) < len(runs):
        body.append(f'<p class="note">{len(runs) - len(whole)} more runs are in the list above '
                    "only; python report.py DIR shows those of a directory.</p>")
    if files:
        part = guarded(files_part, files, share)
        frames |= part.frames if isinstance(part, Part) else set()
        body.append(part.html if isinstance(part, Part) else part)
    body.insert(0, guarded(comparison, runs))
    if lines or found.notes:
        body.append('<section class="card" id="also"><h2>Also here</h2><ul>'
                    + "".join(f"<li>{e(line)}</li>" for line in lines + found.notes)
                    + "</ul></section>")
    return assemble(found.name, overview(runs), Part("".join(body), frames), runs, made)


def files_part(files, budget):
    """The newest files of videos that are no checkpoints, such as those of apply_magvit.py."""
    newest = sorted(files, key=lambda path: path.stat().st_mtime)[-8:]
    read = [read_videos(path, 24) for path in files if path in newest]
    good = [file for file in read if not file.problem]
    part = play_files(good, budget) if good else Part("")
    words = [f"{file.path.name}: {file.problem}" for file in read if file.problem]
    words += [f"{path.name}: not shown, the page has the {len(newest)} newest" for path in files
              if path not in newest]
    if words:
        part.html += ('<section class="card" id="others"><h2>Other files</h2><ul>'
                      + "".join(f"<li>{e(line)}</li>" for line in words[:50]) + "</ul></section>")
    return part


STATES = {"RUNNING": "at work", "COMPLETE": "complete", "FAILED": "failed", "STALLED": "stalled",
          "INTERRUPTED": "stopped", "SILENT": "no sign of life"}
WORKING = ("RUNNING", "STALLED", "SILENT")


def chip(status):
    kind = status if status in STATES else "UNKNOWN"
    words = STATES.get(status, "state not known" if status == "UNKNOWN" else status.lower()[:20])
    return f'<span class="chip {kind}">{e(words)}</span>'


def moment(seconds, kind):
    """A time; the script turns it into an age (data-t) or into the reader's own clock (data-at)."""
    try:
        text = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
        date = text.replace(" ", "T")
        return f'<time datetime="{date}Z" {kind}="{seconds:.0f}">{text} UTC</time>'
    except (ValueError, OverflowError, OSError):
        return "at an unknown time"


def state_lines(run, brief=False):
    """The bar and the words under it."""
    progress = run.progress
    done, total, unit, percent = counts_in(progress)
    if not progress:
        return ""
    share = 100 * min(done, total) / total if total else 0
    out = []
    if total:
        kind = run.status if run.status in STATES else "UNKNOWN"
        out.append(f'<div class="bar {kind}"><i style="width:{share:.1f}%"></i></div>')
        out.append(f"<p><b>{percent}</b> {done:,} of {total:,} {e(unit)}</p>")
    left = number_in(progress.get("ETA"), -1)
    beat = number_in(progress.get("Heartbeat"), -1)
    words = []
    if works(run) and left >= 0 and done < total:
        end = "" if brief else f", done at {moment(max(beat, 0) + left, 'data-at')}"
        words.append(f"{checkpointing.duration(left)} left{end}")
    if beat >= 0:
        age = "data-t" if works(run) else "data-ended"
        words.append(f"written {moment(beat, age)}")
    own = [f"{key} {value[:60]}" for key, value in progress.items() if key not in SAID | ASIDE]
    for line in ("; ".join(words), "" if brief else e("; ".join(own[:6]))):
        out.append(f'<p class="soft">{line}</p>' if line else "")
    return "".join(out)


def overview(runs):
    runs = [run for run in runs if run.progress]
    cards, many = [], len(runs) > 8
    for run in runs[:MOST_CARDS]:
        title = "" if many or run.name == "." else f'<p class="soft">{e(run.title)}</p>'
        name = run.title or "this run" if run.name == "." else run.name
        cards.append(f'<li class="run"><div><a href="#{run.id}">{e(name)}</a>{chip(run.status)}'
                     f"</div>{title}{state_lines(run, many)}</li>")
    if len(runs) > len(cards):
        cards.append(f"<li>and {len(runs) - len(cards):,} more</li>")
    return f'<ul class="runs{" many" if many else ""}">{"".join(cards)}</ul>' if cards else ""


def shown_name(run):
    if run.name == ".":
        return run.title or run.kind
    return f"{run.name} ({run.title})" if run.title else run.name


SAID = {"Status", "Error", "Progress", "ETA", "Heartbeat", "Advanced", "Interval", "Last update"}
ASIDE = {"Checkpoint", "Elapsed", "Rate", "Run", "PID", "Host"}   # for the settings and state alone


def run_card(run, budget, folded):
    """(html, lengths of its videos) of one run."""
    kind = {"data": data_part, "training": training_part}.get(run.kind, other_part)
    part = guarded(kind, run, budget)
    inner, frames = part if isinstance(part, tuple) else (part, set())
    out = []
    if run.progress.get("Error"):
        out.append(f'<p class="error">{e(run.progress["Error"])}</p>')
    notes = list(dict.fromkeys(run.notes))
    if notes:
        out.append('<ul class="note">' + "".join(f"<li>{e(note)}</li>" for note in notes[:20])
                   + (f"<li>and {len(notes) - 20} more</li>" if len(notes) > 20 else "") + "</ul>")
    if run.parts:
        out.append('<ul class="runs many">' + "".join(
            f'<li class="run"><div>{e(part.path.name)}{chip(part.status)}</div>'
            f"{state_lines(part, True)}</li>" for part in run.parts[:100]) + "</ul>")
    facts = [(key, value) for key, value in run.progress.items() if key not in SAID]
    facts += [(key, value) for key, value in run.settings.items()]
    if facts:
        lines = [f"<div><dt>{e(one_line(key))}</dt><dd>{e(one_line(value)[:200])}</dd></div>"
                 for key, value in facts[:80]]
        out.append(f'<details id="{run.id}f"><summary>Settings and state</summary>'
                   f'<dl>{"".join(lines)}</dl></details>')
    inner = "".join(out) + inner
    heading = f"{e(shown_name(run))} {chip(run.status) if run.progress else ''}"
    if folded:
        return (f'<details class="card" id="{run.id}"><summary><h2>{heading}</h2></summary>{inner}'
                "</details>"), frames
    return f'<section class="card" id="{run.id}"><h2>{heading}</h2>{inner}</section>', frames


def other_part(run, budget):
    return figures_part(run) if run.kind == "evaluation" else "", set()


def verdict_of(runs):
    """(level, headline, [(words, id)]): is it well?"""
    lines, level = [], "good"
    for run in runs:
        said = {"FAILED": ("bad", f"failed: {run.progress.get('Error', 'no reason given')}"),
                "STALLED": ("warn", "it beats, but the work has not moved"),
                "SILENT": ("warn", "no sign of life: it may be dead, or this is an old copy"),
                "INTERRUPTED": ("warn", "stopped; the same command goes on")}.get(run.status)
        for kind, words in ([said] if said else []) + list(dict.fromkeys(run.checks)) + [
                ("warn", note) for note in dict.fromkeys(run.notes)]:
            lines.append((kind, f"{shown_name(run)}: {words}", run.id))
            level = "bad" if "bad" in (kind, level) else "warn"
    lines.sort(key=lambda line: line[0] != "bad")
    states = [run.status for run in runs if run.progress]
    working, ended = sum(map(works, runs)), states.count("COMPLETE")
    counts = ", ".join(f"{count} {words}" for count, words in (
        (working, "at work"), (ended, "complete"), (states.count("FAILED"), "failed"),
        (states.count("INTERRUPTED"), "stopped")) if count)
    head = {"bad": "Something failed", "warn": "Worth a look", "good": "All is well"}[level]
    if not runs:
        return "none", "Nothing here yet", []
    return level, head + (f": {counts}" if counts else ""), lines


def assemble(name, cards, part, runs, made):
    """The whole file."""
    level, headline, lines = verdict_of(runs) if runs or cards or not part.html else ("", "", [])
    working = any(map(works, runs))
    shares = [counts_in(run.progress)[3] for run in runs if works(run)]
    sign = {"bad": "✕ ", "warn": "! ", "good": "✓ "}.get(level, "")
    title = (f"{shares[0]} " if len(shares) == 1 else sign) + name
    verdict = ""
    if level:
        few = "".join(f'<li class="{kind}"><a href="#{where}">{e(words)}</a></li>'
                      for kind, words, where in lines[:8])
        more = f"<li>and {len(lines) - 8} more, with the runs below</li>" if len(lines) > 8 else ""
        verdict = (f'<section class="verdict {level}" id="verdict" role="status"><p class="head">'
                   f'{e(headline)}</p><p class="stale" hidden></p><ul>{few}{more}</ul></section>')
    icon = ICONS.get(level, ICONS["good"])
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = ("default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
              f"form-action 'none'; script-src 'sha256-{script}'")
    said = "as of" if working else "made"
    lengths = " ".join(map(str, sorted(part.frames)))
    reload = f' data-reload="{RELOAD}" data-old="{OLD}"' if working else ""
    return f"""<!DOCTYPE html>
<html lang="en" data-made="{made:.0f}" data-lengths="{lengths}"{reload}>
<head>
<meta charset="utf-8">
<meta name="generator" content="{MARK}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{e(title)}</title>
<link rel="icon" href="data:image/svg+xml;base64,{base64.b64encode(icon.encode()).decode()}">
<style>{STYLE}</style>
</head>
<body>
<header><h1>{e(name)}</h1><p class="soft">{said} {moment(made, "data-t")}</p></header>
<noscript><p class="note">Script is off: the videos show their first frame, and the page does not
reload itself.</p></noscript>
{verdict}{TOOLS if part.frames else ''}
<main>{cards}{part.html}</main>
<footer class="soft">Made by report.py from the files beside it.</footer>
<script>{SCRIPT}</script>
</body>
</html>
""".encode()


ICON = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><circle cx="8" cy="8" r="8" '
        'fill="%s"/><path d="%s" stroke="#fff" stroke-width="2" fill="none"/></svg>')
ICONS = {"good": ICON % ("#007a5a", "M4 8l3 3 5-6"), "warn": ICON % ("#b06000", "M8 3v6m0 2v2"),
         "bad": ICON % ("#b3261e", "M5 5l6 6m0-6l-6 6")}

TOOLS = """<nav class="tools" aria-label="videos">
<button id="play" type="button" aria-keyshortcuts="Space">Pause</button>
<label>frame <input id="frame" type="range" min="0" value="0" aria-label="frame"></label>
<span id="at">1</span>
<button id="paths" type="button" aria-pressed="false" aria-keyshortcuts="p">Paths</button>
<button id="whole" type="button" aria-pressed="false" aria-keyshortcuts="f">All frames</button>
<span class="soft hint">space plays, arrows step, p paths, f frames</span></nav>"""

STYLE = """
:root{--back:#f5f5f2;--card:#fff;--ink:#1c1f24;--soft:#5a6069;--line:#d9dadd;--fill:#e9eaec;
  --link:#00568a;--good:#00694e;--warn:#8f4e00;--bad:#b3261e;--goodback:#e2f3ec;--warnback:#fdf0d8;
  --badback:#fce4e1;--k1:#0072b2;--k2:#d55e00;--k3:#009e73;--k4:#aa5590;--k5:#8a7400;--k6:#555b66;
  --sky:#56b4e9;--orange:#e69f00}
@media (prefers-color-scheme:dark){:root{--back:#121417;--card:#1b1e23;--ink:#e6e8eb;--soft:#a2a9b3;
  --line:#343940;--fill:#2a2e35;--link:#7cc4f0;--good:#4fd0a5;--warn:#f0b35a;--bad:#ff8d80;
  --goodback:#12302a;--warnback:#372a12;--badback:#3d1c1a;--k1:#56b4e9;--k2:#f08a3c;--k3:#2fc59a;
  --k4:#d78fc0;--k5:#e3d34a;--k6:#aab1bc}}
*{box-sizing:border-box}html{scroll-padding-top:4rem}
body{margin:0 auto;max-width:1120px;padding:0 16px 48px;background:var(--back);color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
  overflow-wrap:anywhere}
header{display:flex;flex-wrap:wrap;align-items:baseline;gap:0 16px;margin:20px 0 12px}
h1{font-size:1.5rem;margin:0}
h2{font-size:1.2rem;margin:0 0 8px;display:inline-flex;gap:10px;flex-wrap:wrap;align-items:center}
h3{font-size:1rem;margin:24px 0 8px}h4{font-size:.9rem;margin:12px 0 4px;font-weight:600}
p{margin:4px 0}ul{margin:4px 0;padding-left:20px}a{color:var(--link)}
.soft{color:var(--soft);font-size:.87rem}
:focus-visible{outline:3px solid var(--k1);outline-offset:2px;border-radius:4px}
.card{display:block;background:var(--card);border:1px solid var(--line);border-radius:10px;
  padding:16px;margin:16px 0}
.card>summary{cursor:pointer}.card>summary h2{margin:0}details>summary{cursor:pointer;margin:8px 0}
.verdict{border-radius:10px;padding:12px 16px;border:1px solid;border-left-width:8px}
.verdict.good,.verdict.warn,.verdict.bad{color:var(--ink)}.verdict.good .head{color:var(--good)}
.verdict.warn .head{color:var(--warn)}
.verdict.bad .head,.verdict li.bad{color:var(--bad)}.verdict li.warn::before{color:var(--warn)}
.verdict .head{font-size:1.2rem;font-weight:650;margin:0}
.verdict ul{list-style:none;padding:0;margin:0}.verdict li{margin-top:4px}.verdict a{color:inherit}
.verdict.good{background:var(--goodback);border-color:var(--good)}
.verdict.good .head::before{content:"\\2713\\a0"}
.verdict.warn,.verdict.none{background:var(--warnback);border-color:var(--warn)}
.verdict.warn .head::before,.verdict li.warn::before{content:"!\\a0";font-weight:700}
.verdict.bad{background:var(--badback);border-color:var(--bad)}
.verdict.bad .head::before,.verdict li.bad::before{content:"\\2715\\a0"}
.stale{color:var(--warn);font-weight:650}.note{color:var(--warn)}
.error{color:var(--bad);font-weight:600}
.runs{list-style:none;padding:0;display:grid;gap:12px;
  grid-template-columns:repeat(auto-fill,minmax(300px,1fr));margin:16px 0}
.run{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.run>div:first-child{display:flex;justify-content:space-between;gap:10px;align-items:start;
  font-weight:600}
.runs.many{grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:8px;font-size:.87rem}
.chip{font-size:.8rem;font-weight:600;border-radius:99px;padding:1px 10px;white-space:nowrap;
  border:1px solid;background:var(--fill);color:var(--soft)}
.chip::before{margin-right:5px}.chip.RUNNING{color:var(--k1)}.chip.RUNNING::before{content:"\\25b6"}
.chip.COMPLETE{color:var(--good);background:var(--goodback)}.chip.COMPLETE::before{content:"\\2713"}
.chip.FAILED{color:var(--bad);background:var(--badback)}.chip.FAILED::before{content:"\\2715"}
.chip.STALLED,.chip.SILENT,.chip.INTERRUPTED{color:var(--warn);background:var(--warnback)}
.chip.STALLED::before,.chip.SILENT::before{content:"!"}.chip.INTERRUPTED::before{content:"\\2016"}
.chip.UNKNOWN::before{content:"?"}
.bar{height:8px;border-radius:4px;background:var(--fill);overflow:hidden;margin:8px 0 4px}
.bar i{display:block;height:100%;background:var(--k1)}.bar.COMPLETE i{background:var(--good)}
.bar.FAILED i{background:var(--bad)}
.bar.STALLED i,.bar.SILENT i,.bar.INTERRUPTED i{background:var(--warn)}
.tools{display:none;position:sticky;top:0;z-index:2;gap:8px;align-items:center;flex-wrap:wrap;
  padding:8px 0;background:var(--back)}
.js .tools{display:flex}
button{font:inherit;color:inherit;background:var(--card);border:1px solid var(--soft);
  border-radius:8px;padding:4px 14px;min-height:36px;cursor:pointer}
button[aria-pressed=true]{background:var(--k1);color:var(--card)}#play{min-width:84px}
#frame{vertical-align:middle;width:130px}#at{min-width:3.5em}
.row{display:flex;flex-wrap:wrap;gap:16px 28px}figure{margin:0;min-width:0;max-width:100%}
figcaption{font-size:.87rem;font-weight:600;margin-bottom:4px}
.plot{display:block;overflow:visible;width:480px;max-width:100%;height:auto}
.plot.small{width:270px}.half{flex:1 1 340px;max-width:480px}
.plot text{font-size:11.5px;fill:var(--soft)}.plot .grid{stroke:var(--line);stroke-width:1}
.plot .axis{stroke:var(--soft)}.plot polyline,.key line,.key path{fill:none;stroke-width:2}
.c1{stroke:var(--k1)}.c2{stroke:var(--k2)}.c3{stroke:var(--k3)}.c4{stroke:var(--k4)}
.c5{stroke:var(--k5)}.c6{stroke:var(--k6)}.f1{fill:var(--k1)}.f2{fill:var(--k2)}.f3{fill:var(--k3)}
.f4{fill:var(--k4)}.f5{fill:var(--k5)}.f6{fill:var(--k6)}.dash{stroke-dasharray:6 4}
.restart{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:2 3}
svg .saved{fill:var(--soft);stroke:none}
.keys{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.82rem;color:var(--soft);margin:0 0 0 30px}
.key{width:26px;height:8px;margin-right:6px}
.films{display:flex;flex-wrap:wrap;gap:6px;max-width:100%}.films.tight{gap:2px;flex-wrap:nowrap}
.sets{display:flex;flex-wrap:wrap;gap:14px 18px}.set{max-width:100%;overflow-x:auto}
.tile{display:block}
.v{display:block;position:relative;overflow:hidden;width:var(--w);height:var(--h);background:#000;
  border-radius:3px}
.v img{display:block;height:100%;width:calc(var(--n)*var(--w));max-width:none;
  transform:translateX(calc(var(--f)*var(--w)*-1));image-rendering:pixelated}
.whole .films{flex-wrap:wrap;overflow-x:auto}.whole .v{width:calc(var(--n)*var(--w))}
.whole .v img{transform:none}
.path{display:none;position:absolute;left:0;top:0;width:var(--w);height:var(--h)}
.paths .path{display:block}.path *{fill:none;stroke-linejoin:round}.p1{stroke:var(--sky)}
.p2{stroke:var(--orange);stroke-dasharray:2 1.4}.path circle{stroke-dasharray:none}
.pathwords{display:none}.paths .pathwords{display:block}
.ticks{display:block;height:5px;width:var(--w);margin-top:2px;position:relative;
  background:linear-gradient(90deg,var(--sky) var(--g),var(--orange) var(--g))}
.ticks::after{content:"";position:absolute;top:-1px;height:7px;width:calc(var(--w)/var(--n));
  left:calc(var(--f)*var(--w)/var(--n));border:2px solid var(--ink)}
.whole .ticks{width:calc(var(--n)*var(--w))}.whole .ticks::after{display:none}
i.sky,i.orange{display:inline-block;width:18px;height:6px;background:var(--sky);
  vertical-align:middle}
i.orange{background:var(--orange)}
.ticks+.cap{margin-top:4px}.cap{display:block;font-size:.78rem;color:var(--soft);line-height:1.35}
.density{display:block;width:192px;border:1px solid var(--line);line-height:0}
.sharp{width:100%;image-rendering:pixelated}.under{font-size:.75rem;color:var(--soft)}
.plot+.keys{max-width:450px}.heads{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:10px}
.heads li{flex:1 1 150px;background:var(--back);border-radius:8px;padding:8px 12px;font-size:.87rem}
.heads b{display:block;font-size:1.45rem}.heads span{display:block}
.wide{overflow-x:auto;max-width:100%}table{border-collapse:collapse;font-size:.9rem}
td,th{padding:3px 10px;text-align:left;font-weight:400;vertical-align:top;overflow-wrap:normal}
.figures td,.figures th{border-top:1px solid var(--line)}
thead th,.group th{font-weight:600;color:var(--soft)}.group th{padding-top:10px;color:var(--ink)}
.figures tbody th{min-width:9em}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bars{width:100%;max-width:520px}.bars td:nth-child(2){width:60%}
.bars td:nth-child(n+3){text-align:right;white-space:nowrap}
.bars i{display:block;height:12px;margin-top:5px;background:var(--k1);border-radius:2px}
.good{color:var(--good)}.bad{color:var(--bad)}
span.good::before,li.good::before,b.good::before{content:"\\2713\\a0"}
span.bad::before,li.bad::before,b.bad::before{content:"\\2715\\a0"}
span.good:empty::before,span.bad:empty::before{content:""}.checks{list-style:none;padding:0}
.confusion td{text-align:right;min-width:56px;border:1px solid var(--card);
  font-variant-numeric:tabular-nums}
.confusion .right{background:color-mix(in srgb,var(--k1) var(--p),var(--fill))}
.confusion .wrong{background:color-mix(in srgb,var(--k2) var(--p),var(--fill))}
.confusion .strong{color:var(--card);font-weight:600}
.confusion .right{outline:2px solid var(--k1);outline-offset:-2px}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:4px 16px;margin:4px 0}
dl div{display:flex;gap:8px}dt{color:var(--soft)}dd{margin:0}pre{overflow-x:auto;font-size:.8rem}
time.old{color:var(--warn);font-weight:650}footer{margin-top:24px}
@media (max-width:600px){body{padding:0 10px 32px}.card{padding:12px}.hint{display:none}.runs{
  grid-template-columns:1fr}}
@media print{.tools{display:none!important}.card{break-inside:avoid}}
"""

SCRIPT = """
(() => {
"use strict";
const root = document.documentElement, made = +root.dataset.made, period = 200, loaded = Date.now();
const byId = id => document.getElementById(id), now = () => Date.now() / 1000;
const lengths = root.dataset.lengths.split(" ").filter(Boolean).map(Number);
const longest = Math.max(1, ...lengths);
const still = matchMedia("(prefers-reduced-motion: reduce)");
const store = "report.py " + location.pathname;
let kept = {};
try { kept = JSON.parse(sessionStorage.getItem(store)) || {}; } catch (error) { }
root.classList.add("js");

// Videos step together: a variable of the style says which frame those of one length show.
let frame = kept.frame || 0, playing = kept.playing === undefined ? !still.matches : kept.playing;
const show = () => {
  for (const n of lengths) root.style.setProperty("--f" + n, frame % n);
  if (!byId("frame")) return;
  byId("frame").value = frame % longest;
  byId("at").textContent = (frame % longest + 1) + " of " + longest;
};
const step = by => { frame = (frame + by + longest * 1000) % (longest * 1000); show(); };
const play = on => {
  playing = on;
  if (byId("play")) byId("play").textContent = on ? "Pause" : "Play";
};
const press = (name, on) => {
  root.classList.toggle(name, on);
  if (byId(name)) byId(name).setAttribute("aria-pressed", on);
};
const flip = name => press(name, !root.classList.contains(name));
setInterval(() => { if (playing && !document.hidden) step(1); }, period);
still.addEventListener("change", () => { if (still.matches) play(false); });
if (byId("play")) {
  byId("frame").max = longest - 1;
  byId("play").addEventListener("click", () => play(!playing));
  byId("frame").addEventListener("input", event => {
    play(false);
    frame = +event.target.value;
    show();
  });
  for (const name of ["paths", "whole"]) {
    byId(name).addEventListener("click", () => flip(name));
    press(name, !!kept[name]);
  }
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input")) return;
    const inside = event.target.closest("button, summary, a");
    if (event.key === " " && !inside) { play(!playing); event.preventDefault(); }
    else if (event.key === "ArrowRight") { play(false); step(1); }
    else if (event.key === "ArrowLeft") { play(false); step(-1); }
    else if (event.key === "p") flip("paths");
    else if (event.key === "f") flip("whole");
  });
}
play(playing);
show();

// Times: how long ago, counted here. A run that should be working and gives no news is a warning.
const duration = s => s < 90 ? Math.round(s) + " s" : s < 5400 ? Math.round(s / 60) + " min"
  : s < 129600 ? Math.round(s / 3600) + " h" : Math.round(s / 86400) + " days";
const ages = () => {
  const old = +root.dataset.old || Infinity;
  for (const time of document.querySelectorAll("time[data-t], time[data-ended]")) {
    const live = time.hasAttribute("data-t");
    const age = now() - (live ? time.dataset.t : time.dataset.ended);
    time.textContent = age < 1 ? "just now" : duration(age) + " ago";
    time.classList.toggle("old", live && age > old);
  }
  const words = document.querySelector(".stale");
  if (words && now() - made > old) {
    words.hidden = false;
    words.textContent = "This page is " + duration(now() - made) +
      " old: the job has stopped, or the results are not being copied here.";
    words.parentNode.classList.replace("good", "warn");
  }
};
for (const time of document.querySelectorAll("time[data-at]")) {
  const at = new Date(time.dataset.at * 1000), clock = { hour: "2-digit", minute: "2-digit" };
  const today = at.toDateString() === new Date().toDateString();
  const day = today ? "" : at.toLocaleDateString() + " ";
  time.textContent = day + at.toLocaleTimeString([], clock);
}
ages();
setInterval(ages, 1000);

// Looking again while something works. What stood at the top stays at the top.
history.scrollRestoration = "manual";
const places = () => [...document.querySelectorAll("main [id], .verdict")];
const keep = () => {
  const top = places().find(one => one.getBoundingClientRect().bottom > 80);
  const focus = document.activeElement && document.activeElement.id;
  const open = [...document.querySelectorAll("details[open]")].map(one => one.id);
  const all = { frame, playing, open, focus, paths: root.classList.contains("paths"),
    whole: root.classList.contains("whole"), top: top && top.id,
    off: top && top.getBoundingClientRect().top,
    scroll: scrollY };
  try { sessionStorage.setItem(store, JSON.stringify(all)); } catch (error) { }
};
addEventListener("pagehide", keep);
for (const id of kept.open || []) if (byId(id)) byId(id).open = true;
const target = kept.top && kept.scroll > 0 && byId(kept.top);
if (target) scrollTo(0, target.getBoundingClientRect().top + scrollY - kept.off);
else if (kept.scroll !== undefined) scrollTo(0, kept.scroll);
if (kept.focus && byId(kept.focus)) byId(kept.focus).focus({ preventScroll: true });
const openLink = () => {
  const one = location.hash && byId(location.hash.slice(1));
  if (one && one.tagName === "DETAILS") one.open = true;
};
addEventListener("hashchange", openLink);
if (!target) openLink();
if (root.dataset.reload) {
  setInterval(() => {
    // the older the news, the rarer the looks: a dead run must not keep a laptop awake
    const wait = Math.max(+root.dataset.reload, Math.min(600, (now() - made) / 10));
    const held = document.querySelector("button:active, input:active");
    const busy = document.hidden || held || String(getSelection());
    if (!busy && Date.now() - loaded > 1000 * wait) { keep(); location.reload(); }
  }, 500);
}
})();
"""

if __name__ == "__main__":
    main()
