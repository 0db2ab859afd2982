"""Videos and their labels: read, checked, split. The one place that knows how they lie in files.

A set is an .npz with `videos` (N, T, C, H, W), uint8 or floats in [0, 1], and `labels` (N,), or a
run directory of generate.py, also while it is being filled. What will not do is refused before the
videos are read, in one line that says what to type.
"""
import contextlib
import hashlib
import io
import math
import os
import tempfile
import zipfile
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

import checkpointing
from checkpointing import WRONG_SETTINGS, CheckpointError

CLASSES = ("linear", "circular", "helical", "parabolic")    # a label is an index here
LIT = 0.02              # a pixel brighter than this, of 1, is foreground
SMALLEST_CLASS = 10     # videos; fewer leave a class without a test video
BLOCK = 32 << 20        # bytes of videos in hand at a time
IN_MEMORY = 256 << 20   # bytes of videos; larger sets lie in a file, see `gathered`


def decibels(mse):
    """PSNR of a mean squared error on a scale of 0 to 1."""
    return -10 * math.log10(max(mse, 1e-12))


@dataclass
class Data:
    videos: np.ndarray      # uint8 (N, T, C, H, W)
    labels: np.ndarray      # int64 (N,)
    classes: list           # names

    def first(self, n):
        return Data(self.videos[:n], self.labels[:n], self.classes)


def load(path):
    """Data that can be learned; CheckpointError in words if they will not do."""
    return Data(*read(path, check_labels))


def read(path, check=lambda path, count, *labels_and_names: labels_and_names):
    """(videos, labels or None, class names or None) of an .npz or a run directory."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such data; run generate.py and merge.py", WRONG_SETTINGS)
    files = pieces_of(path) if path.is_dir() else [path]
    shapes, labels, names = zip(*map(described, files))
    if len({shape[1:] for shape in shapes}) > 1:
        raise CheckpointError(f"{path}: its pieces hold videos of different shapes")
    shape = sum(shape[0] for shape in shapes), *shapes[0][1:]
    labels = None if labels[0] is None else np.concatenate(labels)
    labels, names = check(path, shape[0], labels, CLASSES if path.is_dir() else names[0])
    return gathered(blocks_of(files), shape, path), labels, names and list(names)


# --------------------------------------------------------------------------------------------------
# What a file says of its videos before these are read

@contextlib.contextmanager
def opened(path, file=None):
    """The ZipFile of an .npz, or of `file`, its content; CheckpointError in words if it is none."""
    try:
        with zipfile.ZipFile(file or path) as archive:
            yield archive
    except CheckpointError:
        raise
    except Exception as error:      # zipfile and numpy raise a dozen kinds on foreign bytes
        words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: cannot be read as an .npz ({words[:200]})") from None


def header_of(stream):
    """(dtype, shape, whether in Fortran order) of the .npy that begins here."""
    one = np.lib.format.read_magic(stream) == (1, 0)
    shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if one else
                             np.lib.format.read_array_header_2_0)(stream)
    return dtype, shape, fortran


def arrays(path, names, file=None):
    """{name: array}, of an .npz, of those it has; each is whole and its checksum compared."""
    with opened(path, file) as archive:
        return {name: np.lib.format.read_array(io.BytesIO(archive.read(f"{name}.npy")))
                for name in names if f"{name}.npy" in archive.namelist()}


def described(file):
    """(shape of the videos, labels or None, class names or None)."""
    small = {name: np.atleast_1d(array) for name, array in arrays(
        file, ("labels", "class_names", "made_by")).items()}
    with opened(file) as archive:
        if "videos.npy" not in archive.namelist():
            raise CheckpointError(f"{file}: has no videos.npy; it has {archive.namelist()}")
        with archive.open("videos.npy") as stream:
            dtype, shape, fortran = header_of(stream)
    if len(shape) == 5 and shape[4] <= 4 < min(shape[2:4]):
        raise CheckpointError(f"{file}: videos {shape} look like (N, T, H, W, C); store "
                              "np.moveaxis(videos, -1, 2)", WRONG_SETTINGS)
    if len(shape) != 5 or 0 in shape or shape[1] < 4 or min(shape[3:]) < 8 or fortran:
        order = ", in Fortran order" if fortran else ""
        raise CheckpointError(f"{file}: videos must be (N, T, C, H, W), in C order, of 4 frames of "
                              f"8x8 pixels or more; they are {shape}{order}", WRONG_SETTINGS)
    if dtype != np.uint8 and dtype.kind != "f":
        raise CheckpointError(f"{file}: videos must be uint8, or float in [0, 1]; they are {dtype}")
    names = small.get("class_names", CLASSES if "made_by" in small else None)
    return shape, small.get("labels"), None if names is None else [*map(str, names)]


def check_labels(path, count, labels, names):
    """(labels int64 (N,), class names), if they can be learned."""
    if labels is None:
        raise CheckpointError(f"{path}: has no labels; training and evaluation need them")
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise CheckpointError(f"{path}: labels must be integers from 0 on, one a video; they are "
                              f"{labels.dtype} {labels.shape}")
    highest = int(labels.max())
    if highest >= (1000 if names is None else len(names)):
        known = "at most 1,000 classes" if names is None else f"its classes are {', '.join(names)}"
        raise CheckpointError(f"{path}: video {labels.argmax()} has label {highest}, but {known}")
    if labels.min() == highest:
        raise CheckpointError(f"{path}: all its videos have label {highest}; it takes two")
    labels, names = labels.astype(np.int64), names or [f"class {k}" for k in range(highest + 1)]
    sizes = np.bincount(labels, minlength=len(names))
    if sizes.min() < SMALLEST_CLASS:
        raise CheckpointError(f"{path}: {names[sizes.argmin()]} has {sizes.min()} videos of {count}"
                              f"; each class needs {SMALLEST_CLASS}, to learn from and to test on")
    return labels, names


def pieces_of(path):
    """Files of what is complete of a run, from sample 0 up to the first gap or bad file."""
    there = [(record["start"], record["stop"], directory / name, record)
             for directory in [path, *path.glob("shard_*_of_*")]
             for name, record in checkpointing.read_records(directory).items()]
    files, at = [], 0
    for start, stop, file, record in sorted(there, key=lambda piece: piece[:3]):
        if start == at and file.exists() and not checkpointing.problem_with(file, record):
            files.append(file)
            at = stop
    if not files:
        raise CheckpointError(f"{path}: no run of generate.py with a good checkpoint_*.npz")
    return files


# --------------------------------------------------------------------------------------------------
# The videos themselves, a few at a time

def blocks_of(files):
    """The videos of all files as uint8 (n, T, C, H, W), a few at a time; floats are checked."""
    for file in files:
        with opened(file) as archive, archive.open("videos.npy") as stream:
            dtype, shape, _ = header_of(stream)
            each = math.prod(shape[1:]) * dtype.itemsize
            for first in range(0, shape[0], max(1, BLOCK // each)):
                count = min(max(1, BLOCK // each), shape[0] - first)
                block = np.frombuffer(stream.read(count * each), dtype).reshape(count, *shape[1:])
                yield block if dtype == np.uint8 else whole_numbers(block, file, first)
            stream.read(1)      # at the end the checksum is compared


def whole_numbers(videos, file, number):
    """uint8 of floats that are in [0, 1] but for rounding; `number` is the first video's."""
    levels = (videos * 255).round()
    bad = ~((levels >= 0) & (levels <= 255)).all((1, 2, 3, 4))      # NaN is bad, too
    for i in np.flatnonzero(bad)[:1]:
        raise CheckpointError(f"{file}: floats must lie in [0, 1]; video {number + i} goes from "
                              f"{videos[i].min():g} to {videos[i].max():g}. Scale them: videos / "
                              "255 if they go to 255, (videos + 1) / 2 if they begin at -1")
    return levels.astype(np.uint8)


def gathered(blocks, shape, path):
    """One array of all blocks: in memory or, of a large set, in a file that has no name and is
    gone with the process: the kernel keeps of it in memory what there is room for."""
    size = math.prod(shape)
    if size <= IN_MEMORY:
        return np.concatenate([*blocks])
    place = os.environ.get("TMPDIR") or (path if path.is_dir() else path.parent)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            for block in blocks:
                file.write(block)       # not into the map, where a full disk would be a crash
            file.flush()
            return np.memmap(file, np.uint8, "r+", shape=shape)
    except OSError as error:
        raise CheckpointError(f"{path}: its {size:,} bytes of videos do not fit into a file in "
                              f"{place} ({error.strerror}). Set TMPDIR to a directory with more "
                              "room; /dev/shm is the memory itself") from None


# --------------------------------------------------------------------------------------------------
# Training, validation and test

TRAIN, VALIDATION, TEST = 0, 1, 2
PARTS = ("training", "validation", "test")


def split(labels):
    """TRAIN, VALIDATION or TEST for each video: of ten of a class, in their order, the first eight,
    the ninth, the tenth. Stratified, and stable: a video keeps its part when more are added."""
    part = np.zeros(len(labels), np.int64)
    for k in np.unique(labels):
        rank = np.arange((labels == k).sum()) % 10
        part[labels == k] = np.where(rank < 8, TRAIN, rank - 7)
    return part


def checked_split(data):
    """(part of each video, a digest of the set); refuses the same video in two parts."""
    part, seen, whole = split(data.labels), {}, hashlib.sha256(data.labels.tobytes())
    with ThreadPool() as pool:      # hashing holds up no other thread
        digests = pool.map(lambda video: hashlib.blake2b(
            np.ascontiguousarray(video), digest_size=16).digest(), data.videos, 64)
    for i, digest in enumerate(digests):
        whole.update(digest)
        first = seen.setdefault(digest, i)
        if part[i] != part[first]:
            raise CheckpointError(f"video {i} ({PARTS[part[i]]}) is the same as video {first} "
                                  f"({PARTS[part[first]]}): the figures would flatter. Remove one")
    return part, whole.hexdigest()[:16]
