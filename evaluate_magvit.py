"""Stage 4: what a model is worth, on videos that nothing was fitted to or chosen by.

    python evaluate_magvit.py                             # the model that was trained last
    python evaluate_magvit.py --model FILE --data PATH --out DIR    # any model, any labelled set

Prints a table and leaves metrics.json. Beside every figure stands what a method without learning,
or the real videos themselves, would get. Of the set, the tenth that training never saw is
measured; the part it trained on serves the nearest neighbours and the judge of generated videos.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpointing
import report
from checkpointing import CheckpointError
from settings import option, parse_settings

MANY, FEW = 4000, 1000  # test videos measured at most; the fewer where each is sampled
SAMPLES = 8             # drawn for a generated video; the surest is kept, the first is the unchosen
BATCH = {"reconstruction": 200, "judge": 100, "generation": 100, "prediction": 100}
JUDGE_BATCH = 128
JUDGE_STEPS = 1500      # at most


@dataclass
class Settings:
    model: str = option("results/magvit_training/best_model.pt", "of train_magvit.py")
    data: str = option("results/dataset.npz", "an .npz with videos and labels, or a run directory "
                       "of generate.py")
    out: str = option("", "directory for metrics.json; evaluation beside the model if not given")
    device: str = option("auto", "cuda, cpu or mps; auto is cuda if there is one, else cpu")
    seed: int = option(0, "of the samples and of the judge")
    heartbeat: float = option(30.0, "seconds between two writes of PROGRESS.txt")
    max_minutes: float = option(5.0, "minutes after which what is measured is saved")


def main():
    evaluate(parse_settings(Settings, "Measure a model on a labelled set.")[1])


def import_torch():
    """It takes seconds, in which --help has answered and PROGRESS.txt shows the run."""
    global magvit, torch, F
    import magvit
    import torch
    import torch.nn.functional as F


def evaluate(settings, data=None):
    """Measure, part by part, from wherever it was; print the table."""
    out = Path(settings.out or Path(settings.model).parent / "evaluation")
    run = checkpointing.Run(out, suffix=".pt", title="MAGVIT evaluation", unit="passes", keep=1,
                            max_minutes=settings.max_minutes, heartbeat=settings.heartbeat)
    with run:
        import_torch()
        device = magvit.open_device(settings.device)
        model = magvit.Magvit.load(settings.model, device)
        data = data or magvit.load_data(settings.data)
        check_fit(model, data, settings.data)
        part, digest = magvit.checked_split(data)
        bench = Bench(model, data, part, settings.seed)
        jobs = jobs_of(bench)
        run.plan(sum(cost for *_, cost in jobs), {
            "model": checkpointing.sha256(settings.model), "data": digest, "seed": settings.seed})
        state = run.load(lambda file: torch.load(file, map_location="cpu", weights_only=True),
                         {"rows": {}, "judge": None})
        called_again = run.done >= run.total
        metrics = work(run, bench, jobs, state, out)
        checkpointing.tell(table(metrics))
        for warning in metrics["warnings"]:
            checkpointing.tell(f"WARNING: {warning}")
    if not called_again:
        report.refresh(out, force=True)


def check_fit(model, data, path):
    if tuple(data.videos.shape[1:]) != model.shape:
        raise CheckpointError(f"{path}: videos of (T, C, H, W) = {tuple(data.videos.shape[1:])}; "
                              f"this model takes {model.shape}", checkpointing.WRONG_SETTINGS)
    if len(data.classes) != len(model.classes):
        raise CheckpointError(f"{path}: {len(data.classes)} classes; this model knows "
                              f"{', '.join(model.classes)}", checkpointing.WRONG_SETTINGS)


class Bench:
    """A model and the videos it is measured on, all on its device."""

    def __init__(self, model, data, part, seed):
        self.model, self.seed, self.device = model, seed, model.device
        self.videos = magvit.Videos(data.videos, self.device)
        self.labels = torch.from_numpy(data.labels).to(self.device)
        self.training = torch.from_numpy(np.flatnonzero(part == magvit.TRAIN)).to(self.device)
        self.many, self.few = (self.chosen(data.labels, part, most) for most in (MANY, FEW))
        self.given = model.shape[0] // 2

    def chosen(self, labels, part, most):
        """Numbers of at most `most` test videos, the same number of each class."""
        each = most // len(self.model.classes)
        index = [np.flatnonzero((part == magvit.TEST) & (labels == k))[:each]
                 for k in np.unique(labels)]
        return torch.from_numpy(np.concatenate(index)).to(self.device)


def jobs_of(bench):
    """[(part, first, last, cost)]: the work in pieces of seconds. A cost is about that of so many
    passes of a video through the transformer, so that the progress is honest."""
    elements = bench.model.shape[0] * bench.model.places
    sizes = {"reconstruction": (len(bench.many), 10),
             "judge": (judge_steps(bench), 3 * JUDGE_BATCH),
             "generation": (len(bench.few), SAMPLES * elements + 40),
             "prediction": (len(bench.few), 2 * elements + 20)}
    jobs = []
    for part, (count, cost) in sizes.items():
        for first in range(0, count, BATCH[part]):
            last = min(first + BATCH[part], count)
            jobs.append((part, first, last, cost * (last - first)))
    return jobs


def work(run, bench, jobs, state, out):
    """Do what `state` does not hold yet. Returns the metrics."""
    done, at, rows = run.done, 0, state["rows"]
    if run.done < run.total:
        run.begin()
    for part, first, last, cost in jobs:
        at += cost
        if at <= done:
            continue
        if first == 0:
            run.log(f"evaluating: {part}")
        run.update(at - cost, Phase=part)
        if part == "judge":
            state["judge"] = train_judge(bench, state["judge"], first, last)
        else:
            with torch.no_grad():
                measured = MEASURES[part](bench, state["judge"], first, last)
            for name, values in measured.items():
                rows.setdefault(part, {}).setdefault(name, []).append(values.cpu())
        run.update(at)
        if run.due() and at < run.total:
            run.save(at, magvit.saved(state))
        run.leave_if_asked()
    with torch.no_grad():
        metrics = figures(bench, state)
    if run.durable < run.total:
        text = json.dumps(metrics, indent=1)
        checkpointing.write_sealed(out / "metrics.json", text)
        if metrics["warnings"]:
            run.update(run.total, Warning="; ".join(metrics["warnings"]))
        run.save(run.total, magvit.saved(state))
    return metrics


# --------------------------------------------------------------------------------------------------
# What is measured: a row of numbers a video, in rows of tensors (B, ...)

LIT = 0.02              # a pixel brighter than this is foreground
DOT_LEVEL = 0.3 * 255   # a pixel brighter than this belongs to a dot
DOT_PIXELS = 3          # and at least so many that touch make one
FAINT = 0.1 * 255       # a pixel darker than this has no weight in the centroid
ALL = (1, 2, 3, 4)      # axes of a video


def measure_reconstruction(bench, judge, first, last):
    model, videos = bench.model, bench.videos[bench.many[first:last]]
    codes = model.encode(videos)
    painted = model.decode(codes)
    real, error = videos.float() / 255, (painted.float() - videos.float()) / 255
    lit, path = real > LIT, centroids(videos)
    return {"codes": codes.to(torch.uint8), "seen": places_of(lit), "dots": count_dots(painted),
            "squared": error.square().mean(ALL), "energy": real.square().mean(ALL),
            "lit": lit.sum(ALL), "lit_error": (error.abs() * lit).sum(ALL),
            "lit_real": (real * lit).sum(ALL),
            "off": (centroids(painted) - path).norm(dim=-1),
            "middle_off": (centroids(torch.zeros_like(videos)) - path).norm(dim=-1),
            "guess": model.class_probabilities(codes).argmax(1),
            "early": model.class_probabilities(codes, bench.given).argmax(1)}


def measure_generation(bench, judge, first, last):
    model, index = bench.model, bench.few[first:last]
    real, labels = bench.videos[index], bench.labels[index]
    numbers = torch.arange(first, last, device=bench.device)
    codes = model.sample(labels, bench.seed, numbers, SAMPLES)
    made, plain = model.decode(model.surest(codes, labels)), model.decode(codes[:, 0])
    judge = loaded_judge(bench, judge).eval()
    return {"right": judged(judge, made).argmax(1) == labels,
            "right_unchosen": judged(judge, plain).argmax(1) == labels,
            "judge_right": judged(judge, real).argmax(1) == labels, "dots": count_dots(made),
            "dots_real": count_dots(real), "path": path_features(made),
            "path_real": path_features(real),
            "nearest": nearest(bench, made, model.shape[0])[0].sqrt(),
            "nearest_real": nearest(bench, real, model.shape[0])[0].sqrt()}


def measure_prediction(bench, judge, first, last):
    """Distances in pixels (B, frames ahead) of the dot's centre, by the model and three others."""
    model, given, videos = bench.model, bench.given, bench.videos[bench.few[first:last]]
    numbers = torch.arange(first, last, device=bench.device)
    made = model.predict(videos, given, bench.seed, numbers)
    path, match = centroids(videos), nearest(bench, videos, given)[1]
    last, before = path[:, given - 1:given], path[:, given - 2:given - 1]
    ahead = torch.arange(1, model.shape[0] - given + 1, device=bench.device)[:, None]
    limit = torch.tensor([model.shape[3] - 1.0, model.shape[2] - 1.0], device=bench.device)
    straight = torch.minimum((last + ahead * (last - before)).clamp(min=0), limit)
    others = {"model": centroids(made)[:, given:], "copy_last": last, "constant_velocity": straight,
              "nearest_neighbour": centroids(bench.videos[match])[:, given:]}
    off = {name: (guess - path[:, given:]).norm(dim=-1) for name, guess in others.items()}
    return {**off, "dots": count_dots(made[:, given:])}


MEASURES = {"reconstruction": measure_reconstruction, "generation": measure_generation,
            "prediction": measure_prediction}


def centroids(videos):
    """(B, T, 2): the bright mass's centre (x, y) in pixels; the middle of a frame that has none."""
    mass = videos.float().mean(2)
    mass = torch.where(mass > FAINT, mass, 0.0)
    height, width = mass.shape[-2:]
    x, y = (torch.arange(size, device=mass.device).float() for size in (width, height))
    total = mass.sum((2, 3))
    place = torch.stack([(mass.sum(2) * x).sum(2), (mass.sum(3) * y).sum(2)], -1)
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=mass.device)
    return torch.where(total[..., None] > 0, place / total.clamp(min=1e-6)[..., None], middle)


def count_dots(videos):
    """(B, T) connected bright spots in each frame, by flooding the largest label over each."""
    bright = (videos.float().mean(2) > DOT_LEVEL).flatten(0, 1)
    n, height, width = bright.shape
    own = torch.arange(1, height * width + 1, device=bright.device).float().view(1, height, width)
    label = torch.where(bright, own, 0.0)
    for _ in range(height + width):
        spread = torch.where(bright, F.max_pool2d(label[:, None], 3, 1, 1)[:, 0], 0.0)
        if torch.equal(spread, label):
            break
        label = spread
    labels = height * width + 1
    first = torch.arange(n, device=bright.device)[:, None, None] * labels
    sizes = torch.bincount((label.long() + first).flatten(), minlength=n * labels).view(n, -1)
    return (sizes[:, 1:] >= DOT_PIXELS).sum(1).view(videos.shape[:2])


def places_of(lit):
    """(B, T, n): in which places of lit (B, T, C, H, W) anything is to be seen."""
    height, width = lit.shape[-2:]
    lit = F.pad(lit.float(), (0, -width % magvit.SIDE, 0, -height % magvit.SIDE)).movedim(2, -1)
    return magvit.tiles(lit, magvit.SIDE).flatten(4).amax(-1).flatten(2) > 0


def path_features(videos):
    """(B, 3 T): where the dot is, in frame widths, and how large it looks."""
    size = (videos.float().mean(2).sum((2, 3)) / 255).sqrt()
    return torch.cat([centroids(videos).flatten(1), size * 4], 1) / videos.shape[-1]


def nearest(bench, videos, frames):
    """(mean squared difference on a scale of 0 to 1, number) of the training video whose first
    `frames` frames match best, for each of `videos`."""
    query = videos[:, :frames].flatten(1).float() / 255
    best = torch.full((len(query),), math.inf, device=query.device)
    which = torch.zeros(len(query), dtype=torch.long, device=query.device)
    for index in bench.training.split(max(1, 2**24 // query.shape[1])):
        known = bench.videos[index][:, :frames].flatten(1).float() / 255
        square = query.square().sum(1)[:, None] - 2 * query @ known.T + known.square().sum(1)
        value, at = (square / query.shape[1]).min(1)
        which, best = torch.where(value < best, index[at], which), torch.minimum(best, value)
    return best.clamp(min=0), which


# --------------------------------------------------------------------------------------------------
# The judge: an independent network on pixels, which shares nothing with the model that it judges.
# A few keypoints a frame (the centre of mass of a learned map, after Finn et al. 2016), then a
# perceptron over all frames.

MAPS = 8


def new_judge(bench):
    nn, (frames, channels) = torch.nn, bench.model.shape[:2]
    torch.manual_seed(bench.seed + 1)
    maps = nn.Sequential(nn.Conv2d(channels, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1),
                         nn.ReLU(), nn.Conv2d(16, MAPS, 1))
    # Standardised, since the places differ by small amounts: without it training stays at chance.
    features = frames * MAPS * 3
    answer = nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, 256), nn.GELU(),
                           nn.Linear(256, 256), nn.GELU(), nn.Linear(256, len(bench.model.classes)))
    return nn.ModuleDict({"maps": maps, "answer": answer}).to(bench.device)


def judged(judge, videos):
    """(B, classes), not normalised, of uint8 videos."""
    heat = judge["maps"](videos.flatten(0, 1).float() / 255)
    y, x = (torch.linspace(-1, 1, size, device=heat.device) for size in heat.shape[2:])
    # The centre of mass of what is positive moves with a dot from the first step on; a softmax
    # begins flat, and some seeds never leave that.
    mass = F.softplus(heat - 3)
    total = mass.sum((2, 3))
    centre = [(mass.sum(2) * x).sum(2) / total, (mass.sum(3) * y).sum(2) / total]
    features = torch.cat([*centre, total / mass[0, 0].numel()], 1)
    return judge["answer"](features.view(len(videos), -1))


def judge_steps(bench):
    return min(JUDGE_STEPS, 20 * max(1, len(bench.training) // JUDGE_BATCH))


def loaded_judge(bench, state):
    judge = new_judge(bench)
    if state:
        judge.load_state_dict(state["weights"])
    return judge


def train_judge(bench, state, first, last):
    """Its state after steps `first` to `last` - 1, given the one before."""
    judge, steps = loaded_judge(bench, state), judge_steps(bench)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-3)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    key = magvit.key(bench.seed, "judge")
    for step in range(first, last):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 - step / steps)
        random = magvit.hashes(key, torch.tensor(step, device=bench.device), JUDGE_BATCH)
        index = bench.training[random % len(bench.training)]
        videos = bench.videos[index]
        videos = videos.flip(-1) if step & 1 else videos
        videos = videos.flip(-2) if step & 2 else videos
        F.cross_entropy(judged(judge, videos), bench.labels[index]).backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)   # else some seeds do not learn
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": judge.state_dict(), "optimizer": optimizer.state_dict()}


# --------------------------------------------------------------------------------------------------
# The figures, from the rows

def figures(bench, state):
    rows = {part: {name: torch.cat(values) for name, values in of.items()}
            for part, of in state["rows"].items()}
    few, many = bench.labels[bench.few].cpu(), bench.labels[bench.many].cpu()
    names, generated = bench.model.classes, rows["generation"]
    metrics = {"tokenizer": of_tokenizer(rows["reconstruction"], bench.model),
               "classification": of_classification(rows["reconstruction"], many, names,
                                                   bench.given),
               "judge": {"accuracy_on_real": mean(generated["judge_right"]), "videos": len(few)},
               "generation": of_generation(generated, few, names),
               "prediction": of_prediction(rows["prediction"], few, names, bench.given)}
    return {**metrics, "warnings": warnings_of(metrics, len(names))}


def mean(values):
    return values.double().mean().item()


def decibels(mse):
    return -10 * math.log10(max(mse, 1e-12))


def of_tokenizer(rows, model):
    mse, blank, lit = mean(rows["squared"]), mean(rows["energy"]), max(1, int(rows["lit"].sum()))
    codes, slot = rows["codes"].long(), torch.tensor([magvit.LEVELS**2, magvit.LEVELS, 1])
    ids = (codes.unflatten(-1, (magvit.SLOTS, magvit.SLOT)) * slot).sum(-1)     # (N, T, n, SLOTS)
    in_use, perplexity = [], []
    for k in range(magvit.SLOTS):
        in_use.append(len(ids[..., k].unique()))
        # of the places where something is to be seen: the background says nothing of collapse
        count = ids[..., k][rows["seen"]].unique(return_counts=True)[1].double()
        share = count / count.sum()
        perplexity.append(torch.exp(-(share * share.log()).sum()).item())
    shape = model.shape
    return {"videos": len(codes), "bits_per_video": codes[0].numel() * math.log2(magvit.LEVELS),
            "raw_bits": math.prod(shape) * 8, "psnr_db": decibels(mse),
            "blank_psnr_db": decibels(blank),
            "skill": 1 - mse / max(blank, 1e-12),
            "foreground_error": rows["lit_error"].double().sum().item() / lit,
            "blank_foreground_error": rows["lit_real"].double().sum().item() / lit,
            "centroid_error_px": mean(rows["off"]),
            "middle_centroid_error_px": mean(rows["middle_off"]),
            "frames_without_dot": mean(rows["dots"] == 0),
            "frames_with_two_dots": mean(rows["dots"] > 1), "active_codes": min(in_use),
            "codes": min(magvit.LEVELS**magvit.SLOT, ids[..., 0].numel()),
            "foreground_perplexity": sum(perplexity) / magvit.SLOTS,
            "foreground_places": int(rows["seen"].sum())}


def of_classification(rows, labels, names, given):
    count = len(names)
    pairs = labels * count + rows["guess"]
    confusion = torch.bincount(pairs, minlength=count**2).view(count, count)
    return {"videos": len(labels), "accuracy": mean(rows["guess"] == labels), "classes": names,
            "accuracy_first_half": mean(rows["early"] == labels), "frames_first_half": given,
            "chance": torch.bincount(labels).max().item() / len(labels),
            "confusion_true_by_guessed": confusion.tolist()}


def of_generation(rows, labels, names):
    half = torch.arange(len(labels)) % 2 == 0
    path, real = rows["path"].double().numpy(), rows["path_real"].double().numpy()
    n = int((~half).sum())
    return {"videos": len(labels), "samples": SAMPLES, "judged_right": mean(rows["right"]),
            "judged_right_by_class": {name: mean(rows["right"][labels == k])
                                      for k, name in enumerate(names)},
            "judged_right_unchosen": mean(rows["right_unchosen"]),
            "one_dot": mean(rows["dots"] == 1),
            "one_dot_real": mean(rows["dots_real"] == 1),
            "feature_distance": frechet(path[half][:n], real[~half]),
            "feature_distance_real_halves": frechet(real[half][:n], real[~half]),
            "nearest_training_video_rmse": mean(rows["nearest"]),
            "nearest_training_video_rmse_real": mean(rows["nearest_real"])}


def frechet(a, b):
    """Frechet distance of Gaussians fitted to samples (N, d), as in FID (Heusel et al. 2017)."""
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.maximum(np.linalg.eigvals(one @ two).real, 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two) - 2 * root)


METHODS = ("copy_last", "constant_velocity", "nearest_neighbour")


def of_prediction(rows, labels, names, given):
    result = {"videos": len(labels), "frames_given": given, "one_dot": mean(rows["dots"] == 1)}
    for name in ("model", *METHODS):
        off = rows[name].double()
        result[name] = {"error_px": mean(off), "by_horizon": off.mean(0).tolist(),
                        "by_class": {c: mean(off[labels == k]) for k, c in enumerate(names)}}
    return result


def warnings_of(metrics, classes):
    """In words, what a good-looking figure elsewhere must not hide."""
    found, tokens, names = [], metrics["tokenizer"], metrics["classification"]
    if tokens["foreground_perplexity"] < min(10, 0.5 * tokens["foreground_places"]):
        found.append(f"the codes have collapsed: perplexity {tokens['foreground_perplexity']:.1f}, "
                     f"{tokens['active_codes']} codes in use")
    if tokens["skill"] < 0.5:
        found.append(f"the tokenizer hardly beats a blank video: skill {tokens['skill']:.2f}")
    chance = 1 / classes
    if names["accuracy"] < chance + 3 * math.sqrt(chance * (1 - chance) / names["videos"]):
        found.append(f"accuracy is at chance: {names['accuracy']:.1%}, chance {chance:.1%}")
    if metrics["judge"]["accuracy_on_real"] < 0.9:
        found.append("the judge of generated videos is itself right on only "
                     f"{metrics['judge']['accuracy_on_real']:.1%} of real ones")
    return found


def table(metrics):
    """The figures, each with its baseline, as text."""
    t, c, j, g, p = (metrics[k] for k in ("tokenizer", "classification", "judge", "generation",
                                          "prediction"))
    best = min(METHODS, key=lambda name: p[name]["error_px"])
    real, best_is = f"{j['accuracy_on_real']:.1%}", best.replace("_", " ")
    rows = [
        ("on held-out test videos", "model", "beside it", ""),
        ("bits a video", f"{t['bits_per_video']:.0f}", t["raw_bits"], "raw"),
        ("PSNR, dB", f"{t['psnr_db']:.2f}", f"{t['blank_psnr_db']:.2f}", "blank video"),
        ("skill, 1 - MSE / MSE of blank", f"{t['skill']:.4f}", "0", "blank video"),
        ("foreground error", f"{t['foreground_error']:.4f}", f"{t['blank_foreground_error']:.4f}",
         "blank video"),
        ("centroid error, px", f"{t['centroid_error_px']:.3f}",
         f"{t['middle_centroid_error_px']:.2f}", "middle of the frame"),
        ("frames with no dot, two dots",
         f"{t['frames_without_dot']:.2%}, {t['frames_with_two_dots']:.2%}", "", ""),
        ("codes in use", t["active_codes"], t["codes"], "as many as these videos could show"),
        ("foreground perplexity", f"{t['foreground_perplexity']:.0f}", t["foreground_places"],
         "every place another code"),
        ("accuracy, whole videos", f"{c['accuracy']:.1%}", f"{c['chance']:.1%}", "chance"),
        (f"accuracy, first {c['frames_first_half']} frames", f"{c['accuracy_first_half']:.1%}",
         f"{c['chance']:.1%}", "chance"),
        ("generated, judged right", f"{g['judged_right_unchosen']:.1%}", real,
         "real videos, same judge"),
        (f"  surest of {g['samples']}, at {g['samples']} times the work",
         f"{g['judged_right']:.1%}", real, "real videos, same judge"),
        ("generated, frames with one dot", f"{g['one_dot']:.2%}", f"{g['one_dot_real']:.2%}",
         "real videos"),
        ("generated, distance of paths to real", f"{g['feature_distance']:.4f}",
         f"{g['feature_distance_real_halves']:.4f}", "two halves of the real"),
        ("generated, nearest training video, RMSE", f"{g['nearest_training_video_rmse']:.4f}",
         f"{g['nearest_training_video_rmse_real']:.4f}", "real test videos"),
        (f"prediction, {p['frames_given']} frames given, px", f"{p['model']['error_px']:.2f}",
         f"{p[best]['error_px']:.2f}", f"{best_is}, the best of three")]
    rows += [("", "", f"{p[name]['error_px']:.2f}", name.replace("_", " "))
             for name in METHODS if name != best]
    rows += [(f"  {name}", f"{error:.2f}", f"{p[best]['by_class'][name]:.2f}", best_is)
             for name, error in p["model"]["by_class"].items()]
    rows += [(f"  {i + 1} frames ahead", f"{error:.2f}", f"{p[best]['by_horizon'][i]:.2f}", best_is)
             for i, error in enumerate(p["model"]["by_horizon"])]
    text = "\n".join(f"{a:<42}{b:>16}{d:>12}  {e}".rstrip() for a, b, d, e in rows)
    width = max(map(len, c["classes"])) + 2
    head = " " * width + "".join(f"{name:>{width}}" for name in c["classes"])
    lines = [f"{name:<{width}}" + "".join(f"{value:>{width}}" for value in row)
             for name, row in zip(c["classes"], c["confusion_true_by_guessed"])]
    return "\n".join([text, "", "true class by guessed class", head, *lines])


if __name__ == "__main__":
    main()
