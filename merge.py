"""Stage 2: check the checkpoints of one or more run directories and join them into one data set.

    python merge.py                             # results/ and its shards -> results/dataset.npz
    python merge.py run_a run_b --out all.npz   # shards from several machines
    python merge.py --partial                   # take what is there, list what is missing

The data set is the same, byte for byte, however the work was cut, interrupted or spread (for one
version of zlib). Each checkpoint is read once: what is joined is what was verified; one of them is
in memory at a time. On any doubt nothing is written: gaps, overlaps, damaged files, settings that
differ, NaN. `made_by` in the set tells its settings and its ranges of samples. Exit codes: 0 done;
1 refused, with the file and the range; 2 wrong arguments.
"""
from settings import OneLineParser      # first: while the rest is imported, Ctrl-C is one line

import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np

import checkpointing
import report
import videos
from checkpointing import WRONG_SETTINGS, CheckpointError

BLOCK = 1 << 20     # bytes handed to the compressor at once, however the parts are cut: same bytes


def main():
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="*", default=["results"], metavar="RUN_DIR",
                        help="run directories; shard_*_of_* inside count too (default results)")
    parser.add_argument("--out", default="results/dataset.npz", help="(default %(default)s)")
    parser.add_argument("--partial", action="store_true", help="join what is there, list the rest")
    arguments = parser.parse_args()
    out = Path(os.path.realpath(arguments.out) if os.path.islink(arguments.out) else arguments.out)
    with checkpointing.one_line_errors():
        try:
            merge(arguments.runs, out, arguments.partial)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. Nothing was written", error.exit_code) from error


def merge(runs, out, partial):
    directories = run_directories(runs)
    n, kinds, settings = agreed_settings(directories)
    parts = parts_of(directories)
    ranges, missing = cover(parts, n, partial)
    check_may_replace(out, settings, ranges)
    made_by = json.dumps({**settings, "samples": ranges}, sort_keys=True)

    out.parent.mkdir(parents=True, exist_ok=True)
    checkpointing.sweep(out.parent)
    wanted, free = sum(part["bytes"] for part in parts), shutil.disk_usage(out.parent).free
    if wanted > free:
        raise CheckpointError(f"{out}: it will take about {wanted:,} bytes, and {free:,} are free")
    checkpointing.write_atomic(out, lambda file: write_data_set(file, parts, kinds, made_by))
    report.refresh(out.parent, force=True)

    tell, count = checkpointing.tell, sum(stop - start for start, stop in ranges)
    tell(f"{out}: {count} samples from {len(parts)} checkpoints, {out.stat().st_size:,} bytes")
    for name, (dtype, shape) in kinds.items():
        tell(f"  {name}: {np.dtype(dtype)} {(count, *shape)}")
    for start, stop in missing:
        tell(f"  missing: {start} to {stop - 1}")


# --------------------------------------------------------------------------------------------------
# What is there, and does it belong together?

def run_directories(runs):
    found = []
    for run in map(Path, runs):
        inside = [d for d in [run, *sorted(run.glob("shard_*_of_*"))] if (d / "run.json").is_file()]
        if not inside:
            raise CheckpointError(f"{run}: not a run directory of generate.py (it has no run.json)",
                                  WRONG_SETTINGS)
        found += inside
    return found


def agreed_settings(directories):
    """(n, {array: (dtype, shape of one sample)}, the other settings) of all runs."""
    first = None
    for path in (directory / "run.json" for directory in directories):
        try:
            settings = dict(json.loads(path.read_bytes())["settings"])
            n, t, c, s = (int(settings[key]) for key in ("n", "frames", "channels", "size"))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{path}: not that of a run of generate.py ({error!r})") from None
        first = first or (path, settings)
        for key in sorted((first[1].keys() | settings.keys()) - {"shard"}):
            if first[1].get(key) != settings.get(key):
                raise CheckpointError(
                    f"{path}: {key} is {settings.get(key)}, but {first[1].get(key)} in {first[0]}: "
                    "these runs do not belong together")
    kinds = {"videos": ("|u1", (t, c, s, s)), "labels": ("<i8", ()),
             "trajectory_3d": ("<f4", (t, 3)), "trajectory_2d": ("<f4", (t, 2))}
    return n, kinds, {key: value for key, value in settings.items() if key not in ("n", "shard")}


def parts_of(directories):
    """The records of all checkpoints that are there, each with its path, in order of samples."""
    parts = [{**record, "path": directory / name} for directory in directories
             for name, record in checkpointing.read_records(directory).items()
             if (directory / name).exists()]
    return sorted(parts, key=lambda part: (part["start"], part["path"]))


def cover(parts, n, partial):
    """[[first, last + 1]] of the samples that are there, and of those that are missing."""
    ranges, before = [[0, 0]], None
    for part in parts:
        start, stop, at = part["start"], part["stop"], ranges[-1][1]
        if start < at:
            raise CheckpointError(f"{part['path']}: samples {start} to {min(at, stop) - 1} are in "
                                  f"{before} too (overlap)")
        if start > at:
            ranges.append([start, start])
        ranges[-1][1], before = stop, part["path"]
    if ranges[-1][1] > n:
        raise CheckpointError(f"{before}: samples {n} to {ranges[-1][1] - 1} are beyond n = {n}")
    missing = [[one[1], next_one[0]] for one, next_one in zip(ranges, [*ranges[1:], [n, n]])
               if one[1] < next_one[0]]
    if not parts or missing and not partial:
        words = ", ".join(f"{start} to {stop - 1}" for start, stop in missing)
        raise CheckpointError(f"samples {words} are missing. Run generate.py again with the same "
                              "settings to make them, or take what is there with --partial")
    return [each for each in ranges if each[0] < each[1]], missing


def check_may_replace(out, settings, ranges):
    """Only a set of the same settings, whose samples are all in `ranges`, may be replaced."""
    if not out.exists():
        return
    advice = "it is left alone. Move it away or choose another --out"
    try:
        made_by = json.loads(str(videos.arrays(out, ["made_by"])["made_by"]))
        had = made_by.pop("samples")
    except (CheckpointError, LookupError, ValueError, AttributeError):
        raise CheckpointError(f"{out} is not a whole data set of merge.py; {advice}") from None
    if made_by != settings:
        raise CheckpointError(f"{out} was made with {made_by}, not {settings}; {advice}")
    for first, stop in had:
        if not any(start <= first and stop <= end for start, end in ranges):
            raise CheckpointError(f"{out} has samples {first} to {stop - 1}, and not all of them "
                                  f"are in these runs; {advice}")


# --------------------------------------------------------------------------------------------------
# Joining, one checkpoint at a time

def write_data_set(file, parts, kinds, made_by):
    count = sum(part["stop"] - part["start"] for part in parts)
    # The small arrays wait beside the set until the videos, which come first, are written.
    later = {name: tempfile.TemporaryFile(dir=Path(file.name).parent) for name in [*kinds][1:]}

    def videos_of_all():
        for part in parts:
            arrays = checked_arrays(part, kinds)
            for name, wait in later.items():
                wait.write(arrays[name].tobytes())
            yield arrays["videos"].tobytes()
        for wait in later.values():
            wait.seek(0)

    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, (dtype, shape) in kinds.items():
            header = {"descr": dtype, "fortran_order": False, "shape": (count, *shape)}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                beside = name in later and iter(lambda: later[name].read(BLOCK), b"")
                for block in blocks(beside or videos_of_all()):
                    member.write(block)
        with archive.open("made_by.npy", "w") as member:
            np.lib.format.write_array(member, np.asarray(made_by))


def blocks(chunks):
    """The same bytes, BLOCK at a time."""
    waiting = b""
    for chunk in chunks:
        waiting += chunk
        whole = len(waiting) // BLOCK * BLOCK
        for at in range(0, whole, BLOCK):
            yield waiting[at:at + BLOCK]
        waiting = waiting[whole:]
    yield waiting


def checked_arrays(part, kinds):
    """The arrays of a checkpoint, all of it verified, read once."""
    path, numbers = part["path"], np.arange(part["start"], part["stop"])
    where = f"{path} (samples {part['start']} to {part['stop'] - 1})"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(content).hexdigest() != part["sha256"]:
        raise CheckpointError(f"{where}: damaged, its checksum differs. Run generate.py again to "
                              "mend it, or move it away and use --partial")
    arrays = videos.arrays(path, kinds, io.BytesIO(content))
    found = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    if found != {name: (dtype, (len(numbers), *shape)) for name, (dtype, shape) in kinds.items()}:
        raise CheckpointError(f"{where}: holds {found}, which does not fit run.json")
    for name in ("trajectory_3d", "trajectory_2d"):
        if not np.isfinite(arrays[name]).all():
            raise CheckpointError(f"{where}: {name} has NaN or Inf")
    if (arrays["labels"] != numbers % len(videos.CLASSES)).any():
        raise CheckpointError(f"{where}: its labels are not the sample numbers mod 4")
    return arrays


if __name__ == "__main__":
    main()
