"""Stage 2: check the checkpoints of one or more run directories and join them into one data set.

    python merge.py                                  # results/ (and results/shard_*/) -> results/dataset.npz
    python merge.py run_a run_b --out all.npz        # shards from several machines
    python merge.py --partial                        # take what is there, list what is missing

The data set is the same, byte for byte, however the work was cut, interrupted or spread (for one version of zlib, which
compresses it). Memory holds a megabyte of it at a time. On any doubt nothing is written: gaps, overlaps, damaged files,
settings that differ, NaN. The set carries the settings that made it and its own SHA-256, which `checkpointing.py
verify` checks. Exit codes: 0 done; 1 refused, with the file and the range; 2 wrong arguments.
"""
from settings import OneLineParser   # first: now Ctrl-C or no numpy is one line

import json
import os
import zipfile
from pathlib import Path

import numpy as np

import checkpointing
import report
from checkpointing import CheckpointError

CLASSES = ("linear", "circular", "helical", "parabolic")
BLOCK = 1 << 20   # bytes handed to the compressor at once, whatever the checkpoints' sizes: same cuts, same bytes


def main():
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="*", default=["results"], metavar="RUN_DIR",
                        help="run directories; shard_*_of_* inside them count too (default results)")
    parser.add_argument("--out", default="results/dataset.npz", help="the data set (default results/dataset.npz)")
    parser.add_argument("--partial", action="store_true", help="join what is there and list what is missing")
    arguments = parser.parse_args()
    out = Path(os.path.realpath(arguments.out) if os.path.islink(arguments.out) else arguments.out)
    with checkpointing.one_line_errors():
        merge(arguments.runs, out, arguments.partial)


def merge(runs, out, partial):
    directories = run_directories(runs)
    n, per_sample, made_by = agreed_settings(directories)
    parts, bad = readable_parts(directories, per_sample)
    missing = check_cover(parts, bad, n, partial)
    total = sum(part["stop"] - part["start"] for part in parts)
    ranges = joined_ranges(parts)
    check_may_replace(out, ranges, made_by)
    if ranges != [[0, total]]:
        made_by = json.dumps({**json.loads(made_by), "samples": ranges}, sort_keys=True)

    counts = np.zeros(len(CLASSES), np.int64)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpointing.sweep(out.parent)
    checkpointing.write_sealed(out, lambda file: write_data_set(file, parts, counts), note=made_by)
    report.refresh(out.parent, force=True)

    tell = checkpointing.tell
    tell(f"{out}: {total} samples from {len(parts)} checkpoints, {os.path.getsize(out):,} bytes")
    for name, (dtype, shape) in parts[0]["arrays"].items():
        tell(f"  {name}: {dtype} {(total, *shape)}")
    tell("  classes: " + ", ".join(f"{name} {count}" for name, count in zip(CLASSES, counts)))
    tell(f"  sha256: {checkpointing.sha256(out)}")
    for start, stop, why in missing:
        tell(f"  missing: {start} to {stop - 1}{why}")


# ---------------------------------------------------------------------------------------------------------------------
# What is there, and does it belong together?

def run_directories(runs):
    found = []
    for run in map(Path, runs):
        if not run.is_dir():
            raise CheckpointError(f"{run}: no such directory", checkpointing.WRONG_SETTINGS)
        inside = [d for d in [run, *sorted(run.glob("shard_*_of_*"))] if (d / "run.json").is_file()]
        if not inside:
            raise CheckpointError(f"{run}: no run here (no run.json). Is it the --out of generate.py?")
        found += inside
    if len({d.resolve() for d in found}) < len(found):
        raise CheckpointError("a run directory is named twice", checkpointing.WRONG_SETTINGS)
    return found


def agreed_settings(directories):
    """(n, {array: (dtype, shape of one sample)}, the other settings in one line) of all runs."""
    first = None
    for directory in directories:
        path = directory / "run.json"
        try:
            settings = dict(json.loads(path.read_bytes())["settings"])
            settings.pop("shard", None)
            t, c, s = settings["frames"], settings["channels"], settings["size"]
            n = settings["n"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}); nothing was "
                                  "written") from error
        first = first or (path, settings)
        for key in sorted(first[1].keys() | settings.keys()):
            if first[1].get(key) != settings.get(key):
                raise CheckpointError(f"{path}: {key} is {settings.get(key)}, but {first[1].get(key)} in {first[0]}: "
                                      "these runs do not belong together; nothing was written")
    settings.pop("n")
    arrays = {"videos": ("uint8", (t, c, s, s)), "labels": ("int64", ()),
              "trajectory_3d": ("float32", (t, 3)), "trajectory_2d": ("float32", (t, 2))}
    return n, arrays, json.dumps(settings, sort_keys=True)


def readable_parts(directories, per_sample):
    """([part], [(start, path, problem)]), in the order of the samples. Every byte was read and checked."""
    parts, bad = [], []
    for directory in directories:
        records = checkpointing.read_records(directory)
        for start, path in checkpointing.find_checkpoints(directory):
            problem = checkpointing.problem_with(path, records.get(path.name))
            if not problem:
                arrays, problem = headers(path)
            if not problem:
                lengths = {shape[0] for _, shape in arrays.values() if shape}
                each = {name: (dtype, shape[1:]) for name, (dtype, shape) in arrays.items()}
                if each != per_sample or len(lengths) != 1:
                    problem = f"holds {arrays}, which does not fit run.json"
            if problem:
                bad.append((start, path, problem))
            else:
                parts.append({"path": path, "start": start, "stop": start + lengths.pop(), "arrays": each})
    return sorted(parts, key=lambda part: part["start"]), sorted(bad)


def headers(path):
    """({array: (dtype, shape)}, problem) of an .npz file, without its data."""
    arrays = {}
    try:
        with open_zip(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    if np.lib.format.read_magic(member) != (1, 0):   # later ones are for structured types
                        return arrays, f"{name} is not an array of plain numbers"
                    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                    arrays[name.removesuffix(".npy")] = (dtype.name, shape)
                    if fortran and len(shape) > 1:
                        return arrays, f"{name} is in Fortran order"
    except (OSError, MemoryError):
        raise
    except Exception as error:   # zipfile and numpy raise a dozen types on foreign bytes
        return arrays, f"not a checkpoint ({type(error).__name__}: {error})"
    return arrays, None


def check_cover(parts, bad, n, partial):
    """[(start, stop, why)] of what is missing. Raises CheckpointError on overlaps, and on gaps unless partial."""
    missing, at = [], 0
    for before, part in zip([None, *parts], parts):
        if part["start"] < at:
            raise CheckpointError(f"{part['path']}: samples {part['start']} to {min(at, part['stop']) - 1} are in "
                                  f"{before['path']} too (overlap); nothing was written")
        if part["start"] > at:
            missing.append((at, part["start"], ""))
        at = part["stop"]
    if at > n:
        raise CheckpointError(f"{parts[-1]['path']}: samples {n} to {at - 1} are beyond n = {n}; nothing was written")
    if at < n:
        missing.append((at, n, ""))
    damaged = {start: f" ({path}: {problem})" for start, path, problem in bad}
    missing = [(a, b, "".join(why for start, why in damaged.items() if a <= start < b)) for a, b, _ in missing]
    if missing and not partial:
        ranges = ", ".join(f"{a} to {b - 1}{why}" for a, b, why in missing)
        raise CheckpointError(f"samples {ranges} are missing; nothing was written. Run generate.py again with the same "
                              "settings to make them, or take what is there with --partial")
    if bad and not partial:
        raise CheckpointError(f"{bad[0][1]}: {bad[0][2]}; nothing was written. Run generate.py again to mend it")
    if not parts:
        raise CheckpointError("no good checkpoint in these directories; nothing was written")
    return missing


def joined_ranges(parts):
    """[[first, last + 1]] of the samples in the parts, in order; one that goes on is one range."""
    ranges = []
    for part in parts:
        if ranges and ranges[-1][1] == part["start"]:
            ranges[-1][1] = part["stop"]
        else:
            ranges.append([part["start"], part["stop"]])
    return ranges


def check_may_replace(out, ranges, made_by):
    """Refuse to write over anything but a data set of the same settings whose samples are all in `ranges`."""
    if checkpointing.CHECKPOINT_NAME.fullmatch(out.name) or (out.exists() and not out.is_file()):
        raise CheckpointError(f"{out}: not a name for a data set; choose another --out", checkpointing.WRONG_SETTINGS)
    if out.exists():
        arrays, problem = headers(out)
        if problem or "videos" not in arrays or "labels" not in arrays:
            raise CheckpointError(f"{out} exists and is not a whole data set made by merge.py; it is left alone. Move "
                                  "it away or choose another --out")
        note = checkpointing.note_of(out)
        kept, had = without_samples(note, arrays["videos"][1][0])
        if kept != json.loads(made_by):
            raise CheckpointError(f"{out} was made with other settings ({note or 'it does not say which'}), not "
                                  f"{made_by}; it is left alone. Move it away or choose another --out")
        for first, stop in had:
            if not any(a <= first and stop <= b for a, b in ranges):
                raise CheckpointError(f"{out} has samples {first} to {stop - 1}, and not all of them are in these "
                                      "runs; it is left alone. Move it away or choose another --out")


def without_samples(note, count):
    """(the settings, the ranges of samples) that the note of a data set of so many samples tells."""
    try:
        settings = dict(json.loads(note))
    except ValueError:
        return note, [[0, count]]
    return settings, settings.pop("samples", [[0, count]])


# ---------------------------------------------------------------------------------------------------------------------
# Joining, one array at a time, one checkpoint at a time

def write_data_set(file, parts, counts):
    """Write the .npz of all parts to an open binary file, and count the labels into `counts`."""
    total = sum(part["stop"] - part["start"] for part in parts)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, (dtype, shape) in parts[0]["arrays"].items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
                          "shape": (total, *shape)}
                np.lib.format.write_array_header_1_0(member, header)
                waiting = b""
                for part in parts:
                    for block in checked_blocks(part, name):
                        if name == "labels":
                            counts += np.bincount(block, minlength=len(CLASSES))
                        waiting += block.tobytes()
                        if len(waiting) >= BLOCK:
                            member.write(waiting[:BLOCK])
                            waiting = waiting[BLOCK:]
                member.write(waiting)


def open_zip(path):
    """A ZipFile; an error of reading stays one, where zipfile would call the file no zip."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise checkpointing.os_error_behind(error) or error from None


def checked_blocks(part, name):
    """One array of a checkpoint as flat blocks of at most BLOCK bytes; raises CheckpointError where a value is wrong."""
    where = f"{part['path']} (samples {part['start']} to {part['stop'] - 1})"
    dtype, at = np.dtype(part["arrays"][name][0]), part["start"]
    with open_zip(part["path"]) as archive, archive.open(f"{name}.npy") as member:
        np.lib.format.read_magic(member)
        np.lib.format.read_array_header_1_0(member)
        while data := member.read(BLOCK):
            block = np.frombuffer(data, dtype)
            if dtype.kind == "f" and not np.isfinite(block).all():
                raise CheckpointError(f"{where}: {name} has NaN or Inf; nothing was written")
            if name == "labels" and (block != np.arange(at, at + len(block)) % len(CLASSES)).any():
                raise CheckpointError(f"{where}: labels are not the sample numbers mod {len(CLASSES)}; nothing was written")
            at += len(block)
            yield block


if __name__ == "__main__":
    main()
