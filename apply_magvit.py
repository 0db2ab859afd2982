"""Stage 4: a trained model at work: classify, generate, predict, evaluate.

    python apply_magvit.py classify videos.npz                             # a line a video: number, class, probability
    python apply_magvit.py generate --class helical --n 16 --out made.npz
    python apply_magvit.py predict videos.npz --given 4 --out predicted.npz
    python apply_magvit.py evaluate results/dataset.npz                    # the table of the end of training, again

The same --seed gives the same result. Files are written whole or not at all, and never over one that differs. Exit codes:
0 done; 1 failed (a damaged file, a full disk, ...); 2 wrong arguments, an unknown class, videos of another shape.
"""
import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import checkpointing
import train_magvit as magvit
from checkpointing import CheckpointError
from settings import OneLineParser

BATCH = 256


def main():
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    classify_ = commands.add_parser("classify", help="print a line a video: its number, class and probability")
    generate_ = commands.add_parser("generate", help="make new videos of a class")
    predict_ = commands.add_parser("predict", help="continue videos from their first frames")
    evaluate_ = commands.add_parser("evaluate", help="print the table of figures on a labelled data set")
    for command in (classify_, predict_):
        command.add_argument("videos", metavar="VIDEOS.npz", help="an .npz with videos (N, T, C, H, W)")
    evaluate_.add_argument("data", metavar="DATA", help="an .npz with videos and labels, or a run directory of generate.py")
    classify_.add_argument("--json", metavar="FILE", help="also write the probabilities of all classes there")
    generate_.add_argument("--class", dest="name", required=True, help="linear, circular, helical or parabolic")
    generate_.add_argument("--n", type=int, default=16, help="number of videos (default 16)")
    predict_.add_argument("--given", type=int, required=True, help="first frames that are given; the rest is predicted")
    for command in (generate_, predict_):
        command.add_argument("--out", required=True, metavar="FILE.npz", help="where to write videos and labels")
    for command in (classify_, generate_, predict_, evaluate_):
        command.add_argument("--model", default="results/magvit_training/best_model.pt", metavar="FILE",
                             help="(default results/magvit_training/best_model.pt)")
        command.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
        command.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first there is)")
    arguments = parser.parse_args()
    with checkpointing.one_line_errors(), torch.no_grad():
        model = magvit.Model.load(arguments.model, magvit.choose_device(arguments.device))
        {"classify": classify, "generate": generate, "predict": predict, "evaluate": evaluate}[arguments.command](
            model, arguments)


def classify(model, arguments):
    videos, _ = load_videos(arguments.videos, model)
    chances = in_batches("classified", lambda part: model.class_probabilities(model.encode(part)).cpu(), videos)
    if arguments.json:
        rows = [{"video": i, "class": model.classes[int(row.argmax())], "probabilities":
                 {name: round(float(p), 6) for name, p in zip(model.classes, row)}} for i, row in enumerate(chances)]
        write_new(arguments.json, (json.dumps(rows, indent=1) + "\n").encode())
    for i, row in enumerate(chances):
        print(f"{i}\t{model.classes[int(row.argmax())]}\t{float(row.max()):.4f}")


def generate(model, arguments):
    if arguments.name not in model.classes:
        raise CheckpointError(f"--class {arguments.name}: this model knows {', '.join(model.classes)}", checkpointing.WRONG_SETTINGS)
    if not 1 <= arguments.n <= 10**7:
        raise CheckpointError(f"--n must be from 1 to 10000000, not {arguments.n}", checkpointing.WRONG_SETTINGS)
    labels = torch.full((arguments.n,), model.classes.index(arguments.name))
    generator = magvit.seeded(model.device, arguments.seed, "generate")
    made = in_batches("generated", lambda part: model.generate(part.to(model.device), generator).cpu(), labels)
    write_set(arguments.out, made, labels)


def predict(model, arguments):
    videos, labels = load_videos(arguments.videos, model)
    step, frames = model.preset.stride_t, model.shape[0]
    if arguments.given not in range(step, frames, step):
        raise CheckpointError(f"--given must be one of {', '.join(map(str, range(step, frames, step)))}, not {arguments.given}",
                              checkpointing.WRONG_SETTINGS)
    generator = magvit.seeded(model.device, arguments.seed, "predict")
    made = in_batches("predicted", lambda part: model.predict(part.to(model.device), arguments.given, generator).cpu(), videos)
    if labels is None:
        labels = in_batches("classified", lambda part: model.class_probabilities(model.encode(part)).argmax(1).cpu(), made)
    write_set(arguments.out, made, labels)


def evaluate(model, arguments):
    data = magvit.load_data(arguments.data)
    check_shape(data.videos, arguments.data, model)
    if len(data.classes) != len(model.classes):
        raise CheckpointError(f"{arguments.data}: {len(data.classes)} classes; this model knows {', '.join(model.classes)}",
                              checkpointing.WRONG_SETTINGS)
    part = magvit.split(data.labels)
    magvit.check_split(data.videos, data.labels, part)
    bench = SimpleNamespace(videos=torch.from_numpy(data.videos).to(model.device), device=model.device, average=model,
                            labels=torch.from_numpy(data.labels).to(model.device), judge=None, breathe=lambda: None,
                            parts=[torch.from_numpy(np.flatnonzero(part == k)).to(model.device) for k in range(3)],
                            settings=SimpleNamespace(seed=arguments.seed))
    metrics = {}
    for name, measure in magvit.EVALUATIONS.items():
        print(f"evaluating: {name}", file=sys.stderr, flush=True)
        metrics[name] = measure(bench, model)
    print(magvit.table(metrics))
    for warning in magvit.warnings_of(metrics, len(model.classes)):
        print(f"WARNING: {warning}")


# ---------------------------------------------------------------------------------------------------------------------

def load_videos(path, model):
    """(videos, labels or None) as tensors on the CPU, of the shape the model takes."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file", checkpointing.WRONG_SETTINGS)
    arrays = magvit.read_arrays(path)
    if "videos" not in arrays:
        raise CheckpointError(f"{path}: has no videos; it has {', '.join(arrays)}")
    videos = magvit.checked_videos(arrays["videos"], path)
    check_shape(videos, path, model)
    labels = arrays.get("labels")
    fits = labels is not None and labels.shape == (len(videos),) and labels.dtype.kind in "iu"
    return torch.from_numpy(videos), torch.from_numpy(labels.astype(np.int64)) if fits else None


def check_shape(videos, path, model):
    if tuple(videos.shape[1:]) != model.shape:
        raise CheckpointError(f"{path}: videos of (T, C, H, W) = {tuple(videos.shape[1:])}; this model takes {model.shape}",
                              checkpointing.WRONG_SETTINGS)


def in_batches(verb, function, items):
    """torch.cat of function(batch), with a line on stderr every few seconds."""
    done, results, spoke = 0, [], time.monotonic()
    for part in items.split(BATCH):
        results.append(function(part))
        done += len(part)
        if time.monotonic() - spoke > 3 and done < len(items):
            print(f"{verb} {done}/{len(items)}", file=sys.stderr, flush=True)
            spoke = time.monotonic()
    return torch.cat(results)


def write_set(path, videos, labels):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, videos=videos.numpy(), labels=labels.numpy().astype(np.int64))
    write_new(path, buffer.getvalue())
    print(f"{path}: {len(videos)} videos {tuple(videos.shape[1:])}")


def write_new(path, content):
    """Write a file, but not over one that holds something else."""
    path = Path(path)
    if path.exists() and (not path.is_file() or path.read_bytes() != content):
        raise CheckpointError(f"{path} exists and differs; it is left alone. Move it away or choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path.parent}: cannot make this directory ({error.strerror})") from None
    checkpointing.write_atomic(path, content)


if __name__ == "__main__":
    main()
