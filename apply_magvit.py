"""Stage 5: a trained model at work: classify, generate, predict.

    python apply_magvit.py classify videos.npz              # number, class, probability of each
    python apply_magvit.py generate --class helical --n 16 --out made.npz
    python apply_magvit.py predict videos.npz --given 4 --out predicted.npz

The same --seed gives the same result. What is made is saved as it goes, in OUT.parts, which is gone
once OUT is whole: killed after an hour, the same command goes on. A file that is there is never
replaced. Exit codes: 0 done; 1 failed; 2 wrong arguments, an unknown class, videos of another
shape; 143 and the like stopped by a signal, after saving.
"""
from settings import OneLineParser      # first: see there

import contextlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

import checkpointing
import magvit
import videos
from checkpointing import WRONG_SETTINGS, CheckpointError

BATCH = 256             # videos at once; the work is cut at multiples of it
PIECE = 16 * BATCH      # videos a checkpoint
MODEL = "results/magvit_training/best_model.pt"
SAMPLED_PLACES = 256    # longer videos are only reconstructed while training: it takes too long


def main():
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    classify_ = commands.add_parser(
        "classify", help="print a line a video: number, class, probability")
    generate_ = commands.add_parser("generate", help="make new videos of a class")
    predict_ = commands.add_parser("predict", help="continue videos from their first frames")
    for command in (classify_, predict_):
        command.add_argument("videos", metavar="VIDEOS", help="an .npz with videos (N, T, C, H, "
                             "W), or a run directory of generate.py")
    classify_.add_argument("--json", metavar="FILE",
                           help="also write the chances of all classes there")
    generate_.add_argument("--class", dest="name", required=True, help="linear, circular, helical "
                           "or parabolic, or another that the model knows")
    generate_.add_argument("--n", type=int, default=16, help="number of videos (default 16)")
    predict_.add_argument("--given", type=int, required=True, help="first frames that are given")
    for command in (generate_, predict_):
        command.add_argument("--out", required=True, metavar="FILE.npz",
                             help="for videos and labels")
        command.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    for command in (classify_, generate_, predict_):
        command.add_argument("--model", default=MODEL, metavar="FILE", help=f"(default {MODEL})")
        command.add_argument("--device", default="auto", help="cuda, cpu or mps (default: cuda if "
                             "there is one, else cpu)")
    arguments = parser.parse_args()
    with checkpointing.one_line_errors():
        out = arguments.json if arguments.command == "classify" else arguments.out
        if arguments.command != "classify" and Path(out).suffix != ".npz":
            raise CheckpointError(f"--out {out}: the videos are written as .npz; give it such a "
                                  "name, and `python report.py FILE.npz` shows them",
                                  WRONG_SETTINGS)
        refuse_to_replace(out)
        model = magvit.Magvit.load(arguments.model, magvit.open_device(arguments.device))
        {"classify": classify, "generate": generate, "predict": predict}[arguments.command](
            model, arguments)


def load_videos(path, model):
    """Videos of the shape that the model takes, and their labels or None."""
    found, labels, _ = videos.read(path)
    if found.shape[1:] != model.shape:
        raise CheckpointError(f"{path}: videos of (T, C, H, W) = {found.shape[1:]}; this model "
                              f"takes {model.shape}", WRONG_SETTINGS)
    fits = labels is not None and labels.shape == (len(found),) and labels.dtype.kind in "iu"
    return torch.from_numpy(found), torch.from_numpy(labels.astype(np.int64)) if fits else None


def classify(model, arguments):
    rows = []
    for part in load_videos(arguments.videos, model)[0].split(BATCH):
        for chances in model.class_probabilities(model.encode(part)).cpu():
            name = model.classes[int(chances.argmax())]
            checkpointing.tell(f"{len(rows)}\t{name}\t{float(chances.max()):.4f}")
            rows.append({"video": len(rows), "class": name, "probabilities": {
                name: round(float(p), 6) for name, p in zip(model.classes, chances)}})
    if arguments.json:
        write(Path(arguments.json), json.dumps(rows, indent=1) + "\n")


def generate(model, arguments):
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
    make(model, arguments, arguments.n, block, {"n": arguments.n, "class": arguments.name})


def predict(model, arguments):
    """Videos without labels get the class that the model sees in the result."""
    given, (shown, labels) = arguments.given, load_videos(arguments.videos, model)
    if given not in range(1, model.shape[0]):
        raise CheckpointError(f"--given must be from 1 to {model.shape[0] - 1}, not {given}",
                              WRONG_SETTINGS)

    def block(first, last):
        numbers = torch.arange(first, last, device=model.device)
        made = model.predict(shown[first:last], given, arguments.seed, numbers)
        seen = labels[first:last] if labels is not None else (
            model.class_probabilities(model.encode(made)).argmax(1))
        return made.cpu(), seen.cpu()
    source = arguments.videos
    make(model, arguments, len(shown), block, {"given": given, "videos": checkpointing.sha256(
        source) if Path(source).is_file() else source}, given=np.int64(given))


def samples(model, real, seed, transforms):
    """What a model in training makes of a few videos uint8 (B, T, C, H, W), for people's eyes: the
    arrays of samples.npz by name. Its transformer has learned something if it `transforms`."""
    frames = model.shape[0]
    arrays = {"real": real, "reconstructed": model.decode(model.encode(real))}
    if transforms and frames * model.places <= SAMPLED_PLACES:
        numbers = torch.arange(len(real), device=model.device)
        labels, given = numbers % len(model.classes), frames // 2
        arrays |= {"generated": model.generate(labels, seed, numbers, samples=1),
                   "generated_labels": labels, "given": torch.tensor(given),
                   "predicted": model.predict(real, given, seed, numbers), "predicted_truth": real}
    arrays = {name: array.cpu().numpy() for name, array in arrays.items()}
    return {**arrays, "classes": np.array(model.classes)}


# --------------------------------------------------------------------------------------------------
# Making videos: pieces that are saved as they come, then joined

def make(model, arguments, total, block, decisive, **more):
    """block(first, last) makes videos and labels; `more` arrays stand beside them in the file."""
    out, more = Path(arguments.out), {"class_names": np.array(model.classes), **more}
    parts = out.with_name(out.name + ".parts")
    settings = {"command": arguments.command, "seed": arguments.seed, **decisive,
                "model": checkpointing.sha256(arguments.model)}
    with checkpointing.Run(parts, total, every=PIECE, suffix=".npz", unit="videos",
                           title=f"MAGVIT {arguments.command}", settings=settings,
                           signals=checkpointing.ALL_SIGNALS) as run:
        for piece in run.pieces():
            made = [block(first, last) for first, last in piece.blocks(BATCH)]
            clips, labels = (torch.cat(tensors).numpy() for tensors in zip(*made))
            piece.save(lambda file: np.savez_compressed(file, videos=clips, labels=labels))
        pieces = list(checkpointing.read_records(parts))
        write(out, lambda file: join(file, [parts / name for name in pieces], {
            "videos": ("|u1", (total, *model.shape)), "labels": ("<i8", (total,))}, more))
    # What this stage wrote there is in the file now; anything else stays.
    for name in (*pieces, "run.json", checkpointing.RECORDS, "PROGRESS.txt", ".lock"):
        (parts / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        parts.rmdir()
    checkpointing.tell(f"{out}: {total} videos {model.shape}")


def join(file, pieces, kinds, more):
    """One .npz of the pieces, each array a piece at a time."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (dtype, shape) in kinds.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(
                    member, {"descr": dtype, "fortran_order": False, "shape": shape})
                for path in pieces:
                    member.write(videos.arrays(path, [name])[name].tobytes())
        for name, array in more.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(array))


def refuse_to_replace(path):
    if path and os.path.lexists(path):
        raise CheckpointError(f"{path} exists; it is left alone. Move it away or choose another "
                              "name")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_to_replace(path)
    checkpointing.write_atomic(path, content)


if __name__ == "__main__":
    main()
