"""Stage 5: a trained model at work: classify, generate, predict.

    python apply_magvit.py classify videos.npz              # number, class, probability of each
    python apply_magvit.py generate --class helical --n 16 --out made.npz
    python apply_magvit.py predict videos.npz --given 4 --out predicted.npz
    python apply_magvit.py evaluate results/dataset.npz     # another name for evaluate_magvit.py

The same --seed gives the same result. What is made is saved as it goes, in OUT.parts, which is gone
once OUT is whole: killed after an hour, the same command goes on. A file that is there is never
replaced. Exit codes: 0 done; 1 failed; 2 wrong arguments, an unknown class, videos of another
shape; 143 and the like stopped by a signal, after saving.
"""
import contextlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

import checkpointing
from checkpointing import WRONG_SETTINGS, CheckpointError
from settings import OneLineParser

BATCH = 256             # videos at once; the work is cut at multiples of it
PIECE = 16 * BATCH      # videos a checkpoint
MODEL = "results/magvit_training/best_model.pt"


def main():
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    classify_ = commands.add_parser(
        "classify", help="print a line a video: number, class, probability")
    generate_ = commands.add_parser("generate", help="make new videos of a class")
    predict_ = commands.add_parser("predict", help="continue videos from their first frames")
    evaluate_ = commands.add_parser("evaluate", help="measure the model on a labelled set")
    for command in (classify_, predict_):
        command.add_argument("videos", metavar="VIDEOS", help="an .npz with videos (N, T, C, H, "
                             "W), or a run directory of generate.py")
    evaluate_.add_argument("data", metavar="DATA", help="an .npz with videos and labels, or a run "
                           "directory of generate.py")
    classify_.add_argument("--json", metavar="FILE",
                           help="also write the chances of all classes there")
    generate_.add_argument("--class", dest="name", required=True, help="linear, circular, helical "
                           "or parabolic, or another that the model knows")
    generate_.add_argument("--n", type=int, default=16, help="number of videos (default 16)")
    predict_.add_argument("--given", type=int, required=True, help="first frames that are given")
    for command in (generate_, predict_):
        command.add_argument("--out", required=True, metavar="FILE.npz",
                             help="for videos and labels")
    for command in (classify_, generate_, predict_, evaluate_):
        command.add_argument("--model", default=MODEL, metavar="FILE", help=f"(default {MODEL})")
        command.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
        command.add_argument("--device", default="auto", help="cuda, cpu or mps (default: cuda if "
                             "there is one, else cpu)")
    arguments = parser.parse_args()
    if arguments.command == "evaluate":
        stage = Path(__file__).with_name("evaluate_magvit.py")
        os.execv(sys.executable, [sys.executable, str(stage), "--data", arguments.data, "--model",
                                  arguments.model, "--seed", str(arguments.seed), "--device",
                                  arguments.device])
    with checkpointing.one_line_errors():
        if arguments.command == "classify":
            classify(arguments)
        else:
            make(arguments, generation if arguments.command == "generate" else prediction)


def load_model(arguments):
    """After the arguments have been looked at: torch takes seconds."""
    global magvit, torch
    import magvit
    import torch
    return magvit.Magvit.load(arguments.model, magvit.open_device(arguments.device))


def load_videos(path, model):
    """Videos of the shape that the model takes, and their labels or None."""
    videos, labels, _ = magvit.read(path)
    if videos.shape[1:] != model.shape:
        raise CheckpointError(f"{path}: videos of (T, C, H, W) = {videos.shape[1:]}; this model "
                              f"takes {model.shape}", WRONG_SETTINGS)
    fits = labels is not None and labels.shape == (len(videos),) and labels.dtype.kind in "iu"
    return torch.from_numpy(videos), torch.from_numpy(labels.astype(np.int64)) if fits else None


def classify(arguments):
    refuse_to_replace(arguments.json)
    model = load_model(arguments)
    videos, rows = load_videos(arguments.videos, model)[0], []
    for part in videos.split(BATCH):
        for chances in model.class_probabilities(model.encode(part)).cpu():
            name = model.classes[int(chances.argmax())]
            checkpointing.tell(f"{len(rows)}\t{name}\t{float(chances.max()):.4f}")
            rows.append({"video": len(rows), "class": name, "probabilities": {
                name: round(float(p), 6) for name, p in zip(model.classes, chances)}})
    if arguments.json:
        write(arguments.json, lambda path: checkpointing.write_atomic(
            path, json.dumps(rows, indent=1) + "\n"))


# --------------------------------------------------------------------------------------------------
# Making videos: pieces that are saved as they come, then joined

def make(arguments, kind):
    out = Path(arguments.out)
    if out.suffix != ".npz":
        raise CheckpointError(f"--out {out}: the videos are written as .npz; give it such a name, "
                              "and `python report.py FILE.npz` shows them", WRONG_SETTINGS)
    refuse_to_replace(out)
    parts = out.with_name(out.name + ".parts")
    model = load_model(arguments)
    total, block, asked = kind(model, arguments)
    decisive = {"command": kind.__name__, "seed": arguments.seed, **asked,
                "model": checkpointing.sha256(arguments.model)}
    with checkpointing.Run(parts, total, every=PIECE, suffix=".npz", unit="videos",
                           title=f"MAGVIT {kind.__name__}", settings=decisive) as run:
        for piece in run.pieces():
            made = [block(first, last) for first, last in piece.blocks(BATCH)]
            videos, labels = (torch.cat(tensors).numpy() for tensors in zip(*made))
            buffer = io.BytesIO()
            np.savez_compressed(buffer, videos=videos, labels=labels)
            piece.save(buffer.getvalue())
        given = {"given": np.int64(arguments.given)} if kind is prediction else {}
        write(out, lambda path: checkpointing.write_sealed(
            path, lambda file: join(file, parts, given)))
    remove(parts)
    checkpointing.tell(f"{out}: {total} videos {model.shape}")


def generation(model, arguments):
    """(number of videos, function that makes those from first to last - 1, what decides them)."""
    if arguments.name not in model.classes:
        raise CheckpointError(f"--class {arguments.name}: this model knows "
                              f"{', '.join(model.classes)}", WRONG_SETTINGS)
    if not 1 <= arguments.n <= 10**7:
        raise CheckpointError(f"--n must be from 1 to 10000000, not {arguments.n}", WRONG_SETTINGS)

    def block(first, last):
        labels = torch.full((last - first,), model.classes.index(arguments.name),
                            device=model.device)
        numbers = torch.arange(first, last, device=model.device)
        return model.generate(labels, arguments.seed, numbers).cpu(), labels.cpu()
    return arguments.n, block, {"n": arguments.n, "class": arguments.name}


def prediction(model, arguments):
    """As `generation`; videos without labels get the class that the model sees in the result."""
    videos, labels = load_videos(arguments.videos, model)
    if arguments.given not in range(1, model.shape[0]):
        raise CheckpointError(f"--given must be from 1 to {model.shape[0] - 1}, not "
                              f"{arguments.given}", WRONG_SETTINGS)

    def block(first, last):
        numbers = torch.arange(first, last, device=model.device)
        made = model.predict(videos[first:last], arguments.given, arguments.seed, numbers)
        seen = labels[first:last] if labels is not None else (
            model.class_probabilities(model.encode(made)).argmax(1))
        return made.cpu(), seen.cpu()
    return len(videos), block, {"given": arguments.given, "videos": checkpointing.sha256(
        arguments.videos) if Path(arguments.videos).is_file() else arguments.videos}


def join(file, parts, more):
    """One .npz of the pieces, each array a piece at a time."""
    paths = [path for _, path in checkpointing.find_checkpoints(parts)]

    def array(name):
        for path in paths:
            with np.load(path, allow_pickle=False) as piece:
                yield piece[name]
    count = sum(len(labels) for labels in array("labels"))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("videos", "labels"):
            shape = (count, *next(array(name)).shape[1:])
            kind = np.lib.format.dtype_to_descr(next(array(name)).dtype)
            member = zipfile.ZipInfo(f"{name}.npy")     # dated 1980: the same bytes every time
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(
                    stream, {"descr": kind, "fortran_order": False, "shape": shape})
                for piece in array(name):
                    stream.write(piece.tobytes())
        for name, value in more.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as stream:
                np.lib.format.write_array(stream, np.asarray(value))


def remove(parts):
    """What this stage wrote there, once it is in the file; anything else stays."""
    for path in [path for _, path in checkpointing.find_checkpoints(parts)]:
        path.unlink()
    for name in ("run.json", "checkpoints.jsonl", "PROGRESS.txt", ".lock"):
        with contextlib.suppress(FileNotFoundError):
            (parts / name).unlink()
    with contextlib.suppress(OSError):
        parts.rmdir()


def refuse_to_replace(path):
    if path and os.path.lexists(path):
        raise CheckpointError(
            f"{path} exists; it is left alone. Move it away or choose another name")


def write(path, writer):
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{Path(path).parent}: cannot make this directory "
                              f"({error.strerror})") from None
    refuse_to_replace(path)
    writer(Path(path))


if __name__ == "__main__":
    main()
