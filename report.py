"""One page of all runs and videos below a directory: open results/report.html in a browser.

    python report.py                               # results/ -> results/report.html
    python report.py results/run_a results/run_b   # both on one page -> results/compare.html
    python report.py made.npz predicted.npz        # plays these videos -> made.html

The stages keep the page up to date themselves, through refresh(). It is one file of less than 2 MB:
no network, no server, no library. It shows what there is, also of half a run or of a copy on a
laptop, and names what it could not read.

Here the facts are gathered, into one dict. report_template.html draws them, with textContent
alone: so text from files stays text, whatever it says. numpy is enough: no torch. Exit codes:
0 written; 1 failed (a disk full, nothing to show); 2 wrong arguments.
"""
import base64
import json
import math
import os
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np

import checkpointing
import runs
import videos
from checkpointing import WRONG_SETTINGS, CheckpointError
from settings import OneLineParser

PAGE, COMPARISON = "report.html", "compare.html"
TEMPLATE = Path(__file__).with_name("report_template.html")
MARK = b"trajectory videos: report.py"  # in all pages of ours
PAGE_BYTES = 1_900_000      # at most; the page travels with every sync
PICTURE_BYTES = 1_100_000   # of it, for pictures
FILM_BYTES = 300_000        # of these, for one group of videos
ARRAY_BYTES = 8 << 20       # of an array no more is read
EVERY = 30                  # seconds between two pages of a run at work
DEPTH = 3                   # how far below the directory runs are looked for
MOST_RUNS, MOST_WHOLE = 300, 40     # with a line on the page; with their figures
MOST_FILES = 12             # of videos, beside the runs; the newest


# --------------------------------------------------------------------------------------------------
# The command line

def main():
    parser = OneLineParser(description="Make one page of the results of the stages, or of any "
                           "videos.")
    parser.add_argument("paths", nargs="*", default=["results"], metavar="PATH",
                        help="a directory of results: writes PATH/report.html; several: all on one "
                        "page, compare.html beside them; .npz files of videos: a page that plays "
                        "them, named after the first (default results)")
    with checkpointing.one_line_errors():
        page = write([Path(path) for path in parser.parse_args().paths])
        checkpointing.tell(f"{page}: {page.stat().st_size:,} bytes")


def write(paths):
    """The page that the command line asks for; returns its path."""
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or directory", WRONG_SETTINGS)
    directories = [path for path in paths if path.is_dir()]
    if 0 < len(directories) < len(paths):
        raise CheckpointError("give directories or .npz files, not both", WRONG_SETTINGS)
    for path in directories:
        os.scandir(path).close()    # can it be read?
    if not directories:
        return write_page(paths[0].with_suffix(".html"), paths)
    if len(directories) == 1:
        return write_page(directories[0] / PAGE, directories)
    top = Path(os.path.commonpath([path.resolve() for path in directories]))
    return write_page(top / COMPARISON, directories)


def write_page(path, sources):
    """Write the page of directories or of files, but never over a file that we have not made."""
    if path.exists() and not is_ours(path):
        raise CheckpointError(f"{path} exists and was not made by report.py; it is left alone. "
                              "Move it away")
    for share in (1, 0.3, 0):
        page = page_of(gather(sources, share))
        if len(page) <= PAGE_BYTES:
            break
    checkpointing.write_atomic(path, page, durable=False)
    return path


def is_ours(path):
    try:
        with open(path, "rb") as file:
            return MARK in file.read(4096)
    except OSError:
        return False


def page_of(facts):
    """The template with the facts in it; without a < they cannot end the element they are in."""
    text = json.dumps(facts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{facts}}", text).encode()


# --------------------------------------------------------------------------------------------------
# What the stages call

# When a page may be made next, on the steady clock. Not in the first 10 s: a job that is shorter
# makes one page, at its end.
_next = time.monotonic() + 10
_warned = set()     # directories whose pages could not be made


def refresh(directory, force=False):
    """Bring the page up to date that shows the run in `directory`, a stage's --out. Never raises: a
    failure is said once, on stderr, and the work goes on.

    At most every 30 s, and never more than 1 % of the time: after a page that took s seconds the
    next waits at least 100 s. `force`, for the end of a stage, makes it at once. A call that comes
    too early costs less than a microsecond. Where the page is: see top_of.
    """
    global _next
    began = time.monotonic()
    if not force and began < _next:
        return
    try:
        if os.path.isdir(directory):    # else it was refused before it began: nothing to show
            top = top_of(directory)
            write_page(top / PAGE, [top])
    except Exception as error:
        if str(directory) not in _warned:
            _warned.add(str(directory))
            checkpointing.warn(f"the page of {directory} was not made: {words_of(error)} (the work "
                               "goes on; this is said once)")
    now = time.monotonic()
    _next = max(began + EVERY, now + 100 * (now - began))


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


# --------------------------------------------------------------------------------------------------
# All facts of a page

def gather(sources, share=1):
    """The facts of a page of directories, or of .npz files: one dict of what JSON knows. `share`,
    of what there may be at most, is less than 1 where the page would become too large.

    "cards": a dict for each run or file of videos, in the order of the page. "first": ids of those
    whose pictures stand at the top. "compared": a table of several trainings. "notes": what could
    not be read, each once. "sheets": the pictures, as data URIs.
    """
    began, notes = time.monotonic(), []
    purse = {"sheets": [], "left": share * PICTURE_BYTES}   # the bytes that pictures may still take
    if sources[0].is_dir():
        cards = [card for top in sources for card in find(top, top if sources[1:] else "", notes)]
    else:
        cards = [file_card(path, str(path)) for path in sources]
    cards = sorted(with_evaluations(with_shards(cards)), key=importance)
    for card in cards:
        card["id"] = f"c{zlib.crc32(card['name'].encode(errors='replace')):08x}"
        room = purse["left"] > 0
        card["films"] = room and attempt(films_of, card["name"], notes, card, purse, notes) or []
    if not sources[0].is_dir() and not any(card["films"] for card in cards):
        raise CheckpointError("; ".join(notes))
    cards = [card for card in cards if card["state"] or card["kind"] != "videos" or card["films"]]
    first = first_seen(cards)
    cards.sort(key=urgency)
    facts = {"name": " and ".join(path.resolve().name or str(path) for path in sources),
             "made": time.time(), "again": max(EVERY, 150 * (time.monotonic() - began)),
             "first": first, "compared": compared(cards), "more": max(0, len(cards) - MOST_RUNS),
             "cards": cards[:MOST_RUNS], "notes": list(dict.fromkeys(notes))[:50]}
    for card in cards[int(share * MOST_WHOLE):]:
        card.update(history=[], rows=[], confusion=None, settings=[], shards=card["shards"][:50])
    return {**plain(facts), "sheets": purse["sheets"]}


def plain(value):
    """The same in what JSON knows: finite numbers, text of printable characters and not endless."""
    if isinstance(value, dict):
        return {plain(str(key)): plain(one) for key, one in value.items() if key != "paths"}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    known = value is None or isinstance(value, (bool, int, float)) and math.isfinite(value)
    return value if known else checkpointing.one_line(value)


def urgency(card):
    """For sorting: what is at work, what needs somebody, what is done; data last, newest first."""
    states = {one["state"] for one in card["shards"] or [card]}
    rank = 0 if states & {"RUNNING", "STALLED", "STARTING"} else 2 if states <= {
        "", "COMPLETE"} else 1
    return rank, card["kind"] == "data", not card["state"], -card["beat"], card["name"]


def importance(card):
    """For sorting: whose pictures are shown first, and get room on the page first."""
    return ("training", "videos", "data", "job").index(card["kind"]), -card["beat"], card["name"]


def first_seen(ranked):
    """The newest training and the newest file of made videos; data where there is neither."""
    newest = {}
    for card in ranked:
        if card["films"]:
            newest.setdefault(card["kind"], card["id"])
    return [newest[kind] for kind in ("training", "videos") if kind in newest] or [*newest.values()]


def attempt(function, where, notes, *arguments):
    """What the function gives, or None and a note: a damaged file costs only what is in it."""
    try:
        with np.errstate(all="ignore"):
            return function(*arguments)
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds on foreign bytes
        notes.append(words_of(error) if where in str(error) else f"{where}: {words_of(error)}")


def words_of(error):
    kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
    return checkpointing.one_line(f"{kind}{error}")[:300]


# --------------------------------------------------------------------------------------------------
# What is there: a card for each run and each file

SHARD = re.compile(r"shard_\d+_of_\d+")
EMPTY = {"title": "", "state": "", "pairs": [], "settings": [], "history": [], "rows": [],
         "confusion": None, "warnings": [], "shards": []}


def find(top, prefix, notes):
    """All below a directory. What is hidden, not ours or set aside by --fresh is left out."""
    cards, files = [], []
    for directory, below, names in os.walk(top):
        here = Path(directory)
        relative = here.relative_to(top)
        name = str(prefix / relative if prefix else relative)
        below[:] = [] if len(relative.parts) >= DEPTH else sorted(
            one for one in below if not re.fullmatch(r"\..*|.+\.old\d+", one))
        if {"PROGRESS.txt", "history.json", "samples.npz", "metrics.json"} & set(names):
            cards.append(attempt(run_card, str(here), notes, here, name, set(names), notes))
        # A merged set beside its samples is a line of their card.
        known = "samples.npz", "dataset.npz" if "PROGRESS.txt" in names else ""
        files += [attempt(file_card, str(here), notes, here / one, str(Path(name) / one))
                  for one in names if one.endswith(".npz") and one not in known
                  and not one.startswith((".", "checkpoint_"))]
    files = sorted(filter(None, files), key=lambda card: -card["beat"])
    return [*filter(None, cards), *files[:MOST_FILES]]


def file_card(path, name):
    kind = "data" if path.name == "dataset.npz" else "videos"
    return {**EMPTY, **progress_facts({}), "paths": [path], "name": name, "kind": kind,
            "beat": path.stat().st_mtime}


def run_card(here, name, names, notes):
    """All that the text files of a run directory say."""
    state, progress = runs.state_of(here) if "PROGRESS.txt" in names else ("", {})
    title = progress and (here / "PROGRESS.txt").read_text(errors="replace").partition("\n")[0]
    kept, history, metrics = (attempt(read_json, str(here / one), notes, here / one)
                              for one in ("run.json", "history.json", "metrics.json"))
    pieces = [one for one in checkpointing.read_records(here) if one.endswith(".npz")]
    trained = {"history.json", "samples.npz", "metrics.json"} & names or title == "MAGVIT training"
    kind = "training" if trained else "data" if pieces or title == "Dataset generation" else "job"
    for ending, words in ((".corrupt", "failed their check and were set aside"),
                          (".tmp", "half-written files, which the next start removes")):
        count = sum(one.endswith(ending) for one in names)
        if count and (ending != ".tmp" or state == "DEAD"):
            notes.append(f"{name}: {count} {words} (*{ending})")
    return {**EMPTY, "paths": [here], "name": name, "kind": kind, "title": title or "",
            "state": state, **progress_facts(progress),
            "pairs": pairs_of(here, progress, of(dict, kept)),
            "settings": [[key, str(value)] for key, value in of(dict, of(dict, kept).get(
                "settings")).items()][:80],
            "history": history_of(of(list, history)), **figures_of(of(dict, metrics))}


def progress_facts(progress):
    """done, total, unit, percent; seconds left at the time of the heartbeat, and the command."""
    counts = re.match(r"(\d{1,15})(?:/(\d{1,15}))? (.*?)(?: \((\d{1,3}(?:\.\d)?%)\))?$",
                      progress.get("Progress", ""))
    done, total, unit, percent = counts.groups("") if counts else (0, 0, "", "")
    return {"done": int(done), "total": int(total or 0), "unit": unit, "percent": percent,
            "left": number_in(progress.get("ETA")), "interval": number_in(progress.get("Interval")),
            "beat": number_in(progress.get("Heartbeat")) or 0,
            "error": progress.get("Error", ""), "command": progress.get("Command", "")}


SAID = {"Status", "Error", "Progress", "ETA", "Heartbeat", "Advanced", "Interval", "Last update",
        "Command", "Checkpoint", "Run", "PID"}


def pairs_of(here, progress, kept):
    """[[words, value]] of a run; a number is a time, in Unix seconds."""
    pairs = [["Command", progress.get("Command")]]
    if kept:    # run.json is written when a run begins
        pairs.append(["Started", (here / "run.json").stat().st_mtime])
    pairs += [["Last written", number_in(progress.get("Heartbeat"))],
              ["Saved", progress.get("Checkpoint")]]
    pairs += [[key, value] for key, value in progress.items() if key not in SAID]
    if (here / "dataset.npz").is_file():
        pairs.append(["Merged", f"dataset.npz, {(here / 'dataset.npz').stat().st_size:,} bytes"])
    return [pair for pair in pairs if pair[1]][:40]


def number_in(text):
    """The number that a text begins with, or None."""
    match = re.match(r"-?\d{1,15}(\.\d+)?", text or "")
    return float(match[0]) if match else None


def read_json(path):
    return json.loads(path.read_bytes()) if path.exists() else None


def of(kind, value):
    """The value, if it is of this kind, else an empty one."""
    return value if isinstance(value, kind) else kind()


# -- several directories that are one card

WORST = "FAILED", "DEAD", "SILENT", "STALLED", "INTERRUPTED", "STARTING", "RUNNING", "COMPLETE"


def with_shards(cards):
    """The shards of a data set as one card, named after the directory that they are in."""
    whole, groups = [], {}
    for card in cards:
        path = card["paths"][0]
        shard = card["kind"] == "data" and SHARD.fullmatch(path.name)
        groups.setdefault(path.parent, []).append(card) if shard else whole.append(card)
    for parent, shards in groups.items():
        shards.sort(key=lambda card: [int(one) for one in re.findall(r"\d+", card["name"])])
        worst, *_ = [card for word in WORST for card in shards if card["state"] == word] or shards
        done, total = (sum(card[key] for card in shards) for key in ("done", "total"))
        share = f"{min(99.9, 100 * done / max(1, total)):.1f}%"
        expected = shards[0]["name"].rpartition("_")[2]
        whole.append({
            **worst, "name": str(Path(shards[0]["name"]).parent), "shards": shards,
            "title": f"{worst['title']}, {len(shards)} of {expected} shards",
            "paths": [card["paths"][0] for card in shards], "done": done, "total": total,
            "percent": "100%" if worst["state"] == "COMPLETE" else share,
            "beat": max(card["beat"] for card in shards),
            "left": max(card["left"] or 0 for card in shards)})
    return whole


def with_evaluations(cards):
    """An evaluation in a training's directory belongs to it; one that is not done is shown too."""
    trainings = {card["paths"][0]: card for card in cards if card["kind"] == "training"}
    kept = []
    for card in cards:
        path = card["paths"][0]
        owner = trainings.get(path.parent) if path.name == "evaluation" else None
        if owner:
            owner.update({key: card[key] for key in ("rows", "confusion", "warnings") if card[key]})
            card["kind"] = "job"
        if not owner or card["state"] not in ("", "COMPLETE"):
            kept.append(card)
    return kept


# --------------------------------------------------------------------------------------------------
# Figures

def history_of(rows):
    """A dict of columns for each phase of history.json; "best": the step of the lowest validation
    loss."""
    phases, history = {}, []
    for row in rows:
        if number(of(dict, row).get("step")) is not None:
            phases.setdefault(str(row.get("phase", "training")), []).append(row)
    for phase, rows in list(phases.items())[:6]:
        held_out = [(number(row.get("validation_loss")), number(row["step"])) for row in rows]
        lowest, best = min((pair for pair in held_out if pair[0] is not None), default=(None, None))
        columns = {name: [number(row.get(key)) for row in evenly(rows, 100)] for name, key in (
            ("steps", "step"), ("train", "train_loss"), ("validation", "validation_loss"),
            ("rate", "learning_rate"))}
        history.append({"phase": phase, **columns, "lowest": lowest, "best": best})
    return history


def number(value):
    """Six digits of a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        return None
    return int(value) if value == int(value) else float(f"{value:.6g}")


def evenly(items, most):
    """At most so many of the items, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


ROW = {"group", "key", "words", "text", "baseline_text", "baseline_words", "beaten"}


def figures_of(metrics):
    """The rows of evaluation's table, its confusion, its warnings. All judging is evaluation's."""
    rows = [row for row in of(list, metrics.get("rows")) if ROW <= of(dict, row).keys()]
    part = of(dict, metrics.get("classification"))
    names, counts = of(list, part.get("classes")), of(list, part.get("confusion_true_by_guessed"))
    square = [len(of(list, row)) for row in counts] == [len(names)] * len(names)
    return {"rows": [{key: row[key] if key == "beaten" else str(row[key] or "") for key in ROW}
                     for row in rows[:100]],
            "confusion": {"names": names, "counts": counts} if names and square else None,
            "warnings": of(list, metrics.get("warnings"))[:20]}


def compared(cards):
    """{"ids", "names", "rows": [[group, words, [text], [beaten]]]} of two or more trainings, the
    settings that differ first; or None."""
    several = [card for card in cards if card["kind"] == "training"][:12]
    tables, rows, order = [], [], ("Settings", "Best validation loss", "Pace")
    for card in several:
        table = {("Settings", key): (value, None) for key, value in card["settings"]}
        table |= {("Best validation loss", one["phase"]): (
            f"{one['lowest']:.4g}, step {one['best']:,}", None)
            for one in card["history"] if one["best"] is not None}
        table |= {("Pace", key): (value, None) for key, value in card["pairs"]
                  if key in ("Speed", "Rate", "Elapsed")}
        for row in card["rows"]:    # of two baselines of a figure the first is told
            table.setdefault((row["group"], row["words"]), (row["text"], row["beaten"]))
        tables.append(table)
    keys = list(dict.fromkeys(key for table in tables for key in table))
    for key in sorted(keys, key=lambda key: order.index(key[0]) if key[0] in order else len(order)):
        cells = [table.get(key, ("", None)) for table in tables]
        if key[0] != "Settings" or len({text for text, _ in cells}) > 1:
            rows.append([*key, [text for text, _ in cells], [beaten for _, beaten in cells]])
    return {"ids": [card["id"] for card in several], "names": [card["name"] for card in several],
            "rows": rows} if len(several) > 1 else None


# --------------------------------------------------------------------------------------------------
# Videos: some of a file or a run as a film. That is one picture with a row for each video, its
# frames beside each other; the page shows one frame at a time.

def films_of(card, purse, notes):
    path = card["paths"][0]
    if card["kind"] == "training":
        return films_of_samples(path / "samples.npz", purse)
    if card["kind"] == "data" and path.is_dir():
        files = [one / name for one in card["paths"] for name in checkpointing.read_records(one)
                 if name.endswith(".npz") and (one / name).is_file()]
        return films_of_set(card, files, 16, purse, notes)
    return films_of_set(card, [path], 96, purse, notes) if path.is_file() else []


def films_of_samples(path, purse):
    """What a training made of a few videos."""
    if not path.is_file():
        return []
    several = ("real", "reconstructed", "generated", "predicted", "predicted_truth")
    arrays, _ = first_rows(path, 24, (*several, "generated_labels", "given", "step", "classes"))
    clips = {name: as_pixels(arrays[name], path) for name in several if name in arrays}
    at, films = f"at step {arrays['step']:,}" if "step" in arrays else "", []
    if "reconstructed" in clips:
        real, made = clips["real"], clips["reconstructed"]
        error = np.abs(made.astype(np.int16) - real).astype(np.uint8)
        captions = [f"{videos.decibels(np.square(one / 255).mean()):.1f} dB" for one in error]
        films.append(film("Reconstructed", at, {"real": real, "reconstructed": made,
                                                "error": error}, purse, captions))
    if "predicted" in clips:
        both = {"truth": clips["predicted_truth"], "predicted": clips["predicted"]}
        films.append(film("Predicted", at, both, purse, given=int(arrays["given"])))
    if "generated" in clips:
        names = class_names(arrays, arrays.get("generated_labels"), videos.CLASSES)
        films.append(film("Generated", at, {"generated": clips["generated"]}, purse, groups=names))
    return films


def films_of_set(card, files, most, purse, notes):
    """Some of the videos in checkpoints, or in one file, by class."""
    wanted = "videos", "labels", "class_names", "given", "made_by"
    parts = [attempt(first_rows, str(path), notes, path, most, wanted) for path in evenly(files, 6)]
    parts = [part for part in parts if part]
    if not parts:
        return []
    arrays, shapes = parts[0]
    if "videos" not in arrays:
        raise CheckpointError(f"{files[0]}: there is no array named videos")
    parts = [one for one, _ in parts if one["videos"].shape[1:] == arrays["videos"].shape[1:]]
    clips = np.concatenate([as_pixels(one["videos"], files[0]) for one in parts])
    ours = card["title"].startswith("Dataset generation") or "made_by" in arrays
    words = f"{shapes['videos'][0]:,} videos" if len(files) == 1 else f"{len(files)} checkpoints"
    words += f" of {' x '.join(map(str, clips.shape[1:]))} (frames, channels, height, width)"
    names, known = None, videos.CLASSES if ours else ()
    if all("labels" in one for one in parts):
        shown = np.concatenate([one["labels"][:len(one["videos"])] for one in parts])
        names = class_names(arrays, shown, known)
        labels, counts = np.unique(np.concatenate([one["labels"] for one in parts]),
                                   return_counts=True)
        words += f"; {'of some, ' if len(parts) < len(files) else ''}" + ", ".join(
            f"{name} {count:,}" for name, count in zip(class_names(arrays, labels, known), counts))
    return [film("", words, {card["name"]: clips}, purse, groups=names,
                 given=int(arrays.get("given", 0)))]


def first_rows(path, most, names):
    """({name: its first rows, of labels all}, {name: shape}) of these arrays of an .npz."""
    arrays, shapes = {}, {}
    with videos.opened(path) as archive:
        for name in [name for name in names if f"{name}.npy" in archive.namelist()]:
            with archive.open(f"{name}.npy") as stream:
                dtype, shape, fortran = videos.header_of(stream)
                each = math.prod(shape[1:]) * dtype.itemsize
                if dtype.hasobject or fortran and len(shape) > 1 or each > 8 * ARRAY_BYTES:
                    raise CheckpointError(f"{path}: {name} cannot be shown ({dtype} {shape})")
                rows = min(shape[0], 10**9 if name == "labels" else most,
                           max(1, ARRAY_BYTES // max(1, each))) if shape else 1
                array = np.frombuffer(stream.read(rows * each), dtype)
                arrays[name] = array.reshape(rows, *shape[1:]) if shape else array[0]
                shapes[name] = shape
    return arrays, shapes


def as_pixels(clips, path):
    """uint8 (N, T, C, H, W), C 1 or 3, of uint8 or of floats in [0, 1]."""
    if clips.ndim != 5 or 0 in clips.shape or clips.dtype != np.uint8 and clips.dtype.kind != "f":
        raise CheckpointError(f"{path}: videos must be uint8, or float in [0, 1], (N, T, C, H, W); "
                              f"they are {clips.dtype} {clips.shape}")
    if clips.dtype != np.uint8:
        clips = (np.nan_to_num(np.clip(clips, 0, 1)) * 255 + 0.5).astype(np.uint8)
    return clips if clips.shape[2] in (1, 3) else clips.mean(2, keepdims=True).astype(np.uint8)


def class_names(arrays, labels, otherwise):
    """The class of each label in words; None without labels."""
    names = arrays.get("class_names", arrays.get("classes", np.zeros(0)))
    names = names.tolist() if names.dtype.kind in "US" else otherwise
    if labels is None or labels.dtype.kind not in "iu":
        return None
    return [str(names[k]) if 0 <= k < len(names) else f"class {k}" for k in labels.tolist()]


def film(title, words, columns, purse, captions=None, groups=None, given=0):
    """The facts of a group of videos. columns: {name: uint8 (N, T, C, H, W)} of the same videos;
    captions, groups: words for each video; given: how many frames a prediction was given."""
    count, length, _, *sides = next(iter(columns.values())).shape
    groups, captions = groups or [""] * count, captions or [""] * count
    for frames, pixels, most in ((16, 64, 36), (8, 32, 18), (8, 16, 9)):
        rows = chosen(groups, most)
        which = np.unique(np.linspace(0, length - 1, min(length, frames)).round().astype(int))
        by = -(-max(sides) // pixels)
        small = [clips[rows][:, which, :, ::by, ::by] for clips in columns.values()]
        n, t, c, height, width = small[0].shape
        sheet = np.concatenate(small, 1).transpose(0, 3, 1, 4, 2).reshape(n * height, -1, c)
        picture = "data:image/png;base64," + base64.b64encode(png(sheet)).decode()
        if len(picture) < min(FILM_BYTES, purse["left"]):
            break
    else:
        rows, picture, words = [], "", f"{words} (the page has no more room to show them)"
        purse["left"] = 0
    purse["left"] -= len(picture)
    purse["sheets"].append(picture)
    return {"title": title, "words": words, "columns": list(columns), "frames": t, "of": length,
            "width": width, "height": height, "given": int((which < given).sum()),
            "sheet": len(purse["sheets"]) - 1, "sets": [[captions[i], groups[i]] for i in rows]}


def chosen(groups, most):
    """Indices of at most so many videos, of all classes alike, and by class."""
    seen, ranks = {}, []
    for i, name in enumerate(groups):
        seen[name] = seen.get(name, -1) + 1
        ranks.append((seen[name], i))
    return sorted((i for _, i in sorted(ranks)[:most]), key=lambda i: [*seen].index(groups[i]))


def png(image):
    """The bytes of a PNG (W3C, third edition) of uint8 (H, W, C), C 1 grey or 3 colour."""
    height, width, channels = image.shape
    lines = np.zeros((height, 1 + width * channels), np.uint8)     # each begins with 0: no filter
    lines[:, 1:] = image.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in (b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""):
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    return data


if __name__ == "__main__":
    main()
