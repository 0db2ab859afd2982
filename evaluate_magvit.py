"""Stage 4: what a model is worth, on videos that nothing was fitted to or chosen by.

    python evaluate_magvit.py                             # the model that was trained last
    python evaluate_magvit.py --model FILE --data PATH --out DIR    # any model, any labelled set

Prints a table and leaves metrics.json. Beside every figure stands what a method without learning,
or the real videos themselves, would get. Of the set, the tenth that training never saw is
measured; the part it trained on serves the nearest neighbours and the judge of generated videos.
"""
from settings import option, parse_settings     # first: see there

import contextlib
import json
import math
import operator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import checkpointing
import magvit
import report
import videos
from checkpointing import WRONG_SETTINGS, CheckpointError
from videos import LIT, TEST, TRAIN, decibels

MANY, FEW = 4000, 1000  # test videos measured at most; the fewer where each is sampled
SAMPLES = 8             # drawn for a generated video; the surest is kept, the first is the unchosen
JUDGE_BATCH = 128
JUDGE_STEPS = 1500      # at most
MAPS = 8                # keypoints of the judge
GOOD_JUDGE = 0.9        # right on so many real videos; what a worse one says proves nothing


@dataclass
class Settings:
    model: str = option("results/magvit_training/best_model.pt", "of train_magvit.py")
    data: str = option("results/dataset.npz", "an .npz with labels, or a run of generate.py")
    out: str = option("", "directory for metrics.json; evaluation beside the model if not given")
    device: str = option("auto", "cuda, cpu or mps; auto is cuda if there is one, else cpu")
    seed: int = option(0, "of the samples and of the judge")
    heartbeat: float = option(30.0, "seconds between two writes of PROGRESS.txt")
    max_minutes: float = option(5.0, "minutes after which what is measured is saved")


def main():
    parser, settings = parse_settings(Settings, "Measure a model on a labelled set.")
    if not (settings.heartbeat > 0 and settings.max_minutes > 0 and 0 <= settings.seed < 2**63):
        parser.error("--heartbeat and --max-minutes must be above 0, --seed from 0 to 2^63 - 1")
    evaluate(settings)


def evaluate(settings, data=None):
    """Measure, part by part, from wherever it was; leave metrics.json and print its table."""
    out = Path(settings.out or Path(settings.model).parent / "evaluation")
    with checkpointing.one_line_errors():
        model = magvit.Magvit.load(settings.model, magvit.open_device(settings.device))
        data = data or videos.load(settings.data)
        shape, count = tuple(data.videos.shape[1:]), len(data.classes)
        if shape != model.shape or count != len(model.classes):
            raise CheckpointError(f"{settings.data}: {count} classes of {shape}; this model takes "
                                  f"{model.shape}, {', '.join(model.classes)}", WRONG_SETTINGS)
        part, digest = videos.checked_split(data)
        bench = Bench(model, data, part, settings.seed)
        decisive = {"model": checkpointing.sha256(settings.model), "data": digest,
                    "seed": settings.seed}
        measure_reconstruction(bench, None, 0, 1)   # loads libraries, which is no piece's speed
    jobs = jobs_of(bench)
    run = checkpointing.Run(out, jobs[-1][-1], suffix=".pt", title="MAGVIT evaluation", keep=1,
                            unit="passes", settings=decisive, max_minutes=settings.max_minutes,
                            heartbeat=settings.heartbeat, signals=checkpointing.ALL_SIGNALS)
    with contextlib.ExitStack() as afterwards, run:
        afterwards.callback(lambda: run.begun and report.refresh(out, force=True))
        state = run.load({"rows": {}, "judge": None}, read=lambda file: torch.load(
            file, map_location="cpu", weights_only=True))
        for part, first, last, done in jobs:
            if done <= run.done:
                continue
            run.update(run.done, Phase=part)
            if part == "judge":
                state["judge"] = train_judge(bench, state["judge"], first, last)
            else:
                with torch.no_grad():
                    found = MEASURES[part](bench, state["judge"], first, last)
                for name, values in found.items():
                    state["rows"].setdefault(part, {}).setdefault(name, []).append(values.cpu())
            run.tick(done, write=lambda file: file.write(magvit.saved(state)))
            report.refresh(out)
        metrics = figures(bench, state)     # again, if the file is damaged or gone
        path, text = out / "metrics.json", json.dumps(metrics, indent=1) + "\n"
        if not path.is_file() or path.read_bytes() != text.encode():
            run.update(run.total, Warning="; ".join(metrics["warnings"]) or "none")
            checkpointing.write_atomic(path, text)
        for line in table(metrics):
            checkpointing.tell(line)


class Bench:
    """A model and the videos it is measured on, all on its device."""

    def __init__(self, model, data, part, seed):
        self.model, self.seed, self.device = model, seed, model.device
        self.videos = magvit.DeviceVideos(data.videos, self.device)
        self.labels = torch.from_numpy(data.labels).to(self.device)
        self.training = torch.from_numpy(np.flatnonzero(part == TRAIN)).to(self.device)
        self.given = model.shape[0] // 2
        self.judge_steps = min(JUDGE_STEPS, 20 * max(1, len(self.training) // JUDGE_BATCH))
        test = [np.flatnonzero((part == TEST) & (data.labels == k)) for k in np.unique(data.labels)]
        self.many, self.few = (     # numbers of test videos, as many of each class
            torch.from_numpy(np.concatenate([numbers[:most // len(test)] for numbers in test])).to(
                self.device) for most in (MANY, FEW))


def jobs_of(bench):
    """[(part, first, last, done)]: the work in pieces of seconds, and what is done after each. The
    unit is about a pass of a video through the transformer, so that the progress is honest."""
    elements, jobs, done = bench.model.shape[0] * bench.model.places, [], 0
    for part, count, step, cost in (
            ("reconstruction", len(bench.many), 200, 10),
            ("judge", bench.judge_steps, 100, 3 * JUDGE_BATCH),
            ("generation", len(bench.few), 100, SAMPLES * elements + 40),
            ("prediction", len(bench.few), 100, 2 * elements + 20)):
        for first in range(0, count, step):
            last = min(first + step, count)
            done += cost * (last - first)
            jobs.append((part, first, last, done))
    return jobs


# --------------------------------------------------------------------------------------------------
# What is measured: a row of numbers a video, in rows of tensors (B, ...)

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
    near, near_real = nearest(bench, torch.cat([made, real]), model.shape[0])[0].sqrt().chunk(2)
    judge = judge_of(bench, judge).eval()
    return {"right": judged(judge, made).argmax(1) == labels,
            "right_unchosen": judged(judge, plain).argmax(1) == labels,
            "judge_right": judged(judge, real).argmax(1) == labels, "dots": count_dots(made),
            "dots_real": count_dots(real), "path": path_features(made),
            "path_real": path_features(real),
            "nearest": near, "nearest_real": near_real}


def measure_prediction(bench, judge, first, last):
    """Distances in pixels (B, frames ahead) of the dot's centre, by the model and three others."""
    model, given, videos = bench.model, bench.given, bench.videos[bench.few[first:last]]
    made = model.predict(videos, given, bench.seed, torch.arange(first, last, device=bench.device))
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
    query = videos[:, :frames].flatten(1).float()
    own = torch.linalg.vector_norm(query, dim=1)[:, None].square()
    best = torch.full((len(query),), math.inf, device=query.device)
    which = torch.zeros(len(query), dtype=torch.long, device=query.device)
    for index in bench.training.split(max(1, 2**24 // query.shape[1])):
        known = bench.videos[index][:, :frames].flatten(1).float()
        square = own + torch.linalg.vector_norm(known, dim=1).square() - 2 * query @ known.T
        value, at = (square / (query.shape[1] * 255**2)).min(1)
        which, best = torch.where(value < best, index[at], which), torch.minimum(best, value)
    return best.clamp(min=0), which


# --------------------------------------------------------------------------------------------------
# The judge: an independent network on pixels, which shares nothing with the model that it judges.
# A few keypoints a frame (the centre of mass of a learned map, after Finn et al. 2016), then a
# perceptron over all frames.

def judge_of(bench, state):
    frames, channels = bench.model.shape[:2]
    torch.manual_seed(bench.seed + 1)
    maps = nn.Sequential(nn.Conv2d(channels, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1),
                         nn.ReLU(), nn.Conv2d(16, MAPS, 1))
    # Standardised, since the places differ by small amounts: without it training stays at chance.
    features = frames * MAPS * 3
    answer = nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, 256), nn.GELU(),
                           nn.Linear(256, 256), nn.GELU(), nn.Linear(256, len(bench.model.classes)))
    judge = nn.ModuleDict({"maps": maps, "answer": answer}).to(bench.device)
    if state:
        judge.load_state_dict(state["weights"])
    return judge


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


def train_judge(bench, state, first, last):
    """Its state after steps `first` to `last` - 1, given the one before."""
    judge, steps = judge_of(bench, state), bench.judge_steps
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-3)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    key = magvit.key(bench.seed, "judge")
    for step in range(first, last):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 - step / steps)
        random = magvit.hashes(key, torch.tensor(step, device=bench.device), JUDGE_BATCH)
        index = bench.training[random % len(bench.training)]
        mirrored = ((), (-1,), (-2,), (-1, -2))[step % 4]
        videos = bench.videos[index].flip(mirrored)
        F.cross_entropy(judged(judge, videos), bench.labels[index]).backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)   # else some seeds do not learn
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": judge.state_dict(), "optimizer": optimizer.state_dict()}


# --------------------------------------------------------------------------------------------------
# The figures. Each is (key in metrics.json, words, how it is written, value, and of its baseline
# the key, the value, the words and how the two compare), so that whoever shows them needs no rules.

ABOVE, BELOW = (operator.gt, 1), (operator.lt, 1)   # what a figure must be, times its baseline
NEAR, CLOSE, NO_COPY = (operator.ge, 0.9), (operator.le, 3), (operator.ge, 0.7)
BLANK, REAL, JUDGE = "a blank video", "real videos", "real videos, same judge"
ALONE = "", None, "", None      # of a figure that has no baseline
METHODS = ("copy_last", "constant_velocity", "nearest_neighbour")


def figures(bench, state):
    """metrics.json: of each group its figures by name, the warnings, and the rows to show."""
    found = {part: {name: torch.cat(values) for name, values in of.items()}
             for part, of in state["rows"].items()}
    few, many = bench.labels[bench.few].cpu(), bench.labels[bench.many].cpu()
    names, real = bench.model.classes, mean(found["generation"]["judge_right"])
    metrics, rows = {"judge": {"accuracy_on_real": real, "videos": len(few)}}, []
    for group, (facts, listed) in {
            "Tokenizer": of_tokenizer(found["reconstruction"], bench.model),
            "Classification": of_classification(found["reconstruction"], many, names, bench.given),
            "Generation": of_generation(found["generation"], few, names),
            "Prediction": of_prediction(found["prediction"], few, names, bench.given)}.items():
        metrics[group.lower()] = facts
        for key, words, form, value, its_key, baseline, its_words, how in listed:
            facts |= {key: value, **({its_key: baseline} if its_key else {})}
            rows.append({
                "group": group, "key": key, "words": words, "value": value,
                "text": form.format(value), "baseline": baseline, "baseline_words": its_words,
                "baseline_text": "" if baseline is None else form.format(baseline),
                "beaten": how[0](value, how[1] * baseline) if how else None})
    return {**metrics, "warnings": warnings_of(metrics, names), "rows": rows}


def mean(values):
    return values.double().mean().item()


def of_tokenizer(rows, model):
    mse, blank, lit = mean(rows["squared"]), mean(rows["energy"]), max(1, int(rows["lit"].sum()))
    codes, slot = rows["codes"].long(), torch.tensor([magvit.LEVELS**2, magvit.LEVELS, 1])
    ids = (codes.unflatten(-1, (magvit.SLOTS, magvit.SLOT)) * slot).sum(-1)     # (N, T, n, SLOTS)
    in_use, perplexity = [], []
    for k in range(magvit.SLOTS):
        in_use.append(len(ids[..., k].unique()))
        # of the places where something is to be seen: the background says nothing of collapse
        count = ids[..., k][rows["seen"]].unique(return_counts=True)[1].double()
        perplexity.append(torch.special.entr(count / count.sum()).sum().exp().item())
    return {"videos": len(codes)}, [
        ("bits_per_video", "size of a video", "{:,.0f} bits",
         codes[0].numel() * math.log2(magvit.LEVELS),
         "raw_bits", math.prod(model.shape) * 8, "raw pixels", BELOW),
        ("psnr_db", "PSNR", "{:.2f} dB", decibels(mse),
         "blank_psnr_db", decibels(blank), BLANK, ABOVE),
        ("skill", "skill, 1 - MSE / MSE of blank", "{:.4f}", 1 - mse / max(blank, 1e-12),
         "blank_skill", 0.0, BLANK, ABOVE),
        ("foreground_error", "foreground error", "{:.4f}",
         rows["lit_error"].double().sum().item() / lit,
         "blank_foreground_error", rows["lit_real"].double().sum().item() / lit, BLANK, BELOW),
        ("centroid_error_px", "distance of the dot", "{:.3f} px", mean(rows["off"]),
         "middle_centroid_error_px", mean(rows["middle_off"]), "the middle of the frame", BELOW),
        ("frames_without_dot", "frames without a dot", "{:.2%}", mean(rows["dots"] == 0), *ALONE),
        ("frames_with_two_dots", "frames with two dots", "{:.2%}", mean(rows["dots"] > 1), *ALONE),
        ("active_codes", "codes in use", "{:,}", min(in_use),    # of the poorest slot
         "codes", min(magvit.LEVELS**magvit.SLOT, ids[..., 0].numel()), "all there could be", None),
        ("foreground_perplexity", "perplexity of codes", "{:,.0f}", min(perplexity),     # as above
         "foreground_places", int(rows["seen"].sum()), "every place another code", None)]


def of_classification(rows, labels, names, given):
    pairs = torch.bincount(labels * len(names) + rows["guess"], minlength=len(names)**2)
    chance = torch.bincount(labels).max().item() / len(labels)
    return {"videos": len(labels), "classes": names, "frames_first_half": given,
            "confusion_true_by_guessed": pairs.view(len(names), -1).tolist()}, [
        ("accuracy", "right, whole videos", "{:.1%}", mean(rows["guess"] == labels),
         "chance", chance, "chance", ABOVE),
        ("accuracy_first_half", f"right, first {given} frames", "{:.1%}",
         mean(rows["early"] == labels), "chance", chance, "chance", ABOVE)]


def of_generation(rows, labels, names):
    half = torch.arange(len(labels)) % 2 == 0
    path, real = rows["path"].double().numpy(), rows["path_real"].double().numpy()
    n, one_dot, right = int((~half).sum()), mean(rows["dots_real"] == 1), mean(rows["judge_right"])
    near = NEAR if right >= GOOD_JUDGE else None
    return {"videos": len(labels), "samples": SAMPLES,
            "judged_right_by_class": {name: mean(rows["right"][labels == k])
                                      for k, name in enumerate(names)}}, [
        ("judged_right_unchosen", "judged right", "{:.1%}", mean(rows["right_unchosen"]),
         "judged_right_real", right, JUDGE, near),
        ("judged_right", f"surest of {SAMPLES}, at {SAMPLES} times the work", "{:.1%}",
         mean(rows["right"]), "judged_right_real", right, JUDGE, near),
        ("one_dot", "frames with one dot", "{:.2%}", mean(rows["dots"] == 1),
         "one_dot_real", one_dot, REAL, NEAR if one_dot > 0.5 else None),
        ("feature_distance", "distance of paths to real ones", "{:.4f}",
         frechet(path[half][:n], real[~half]), "feature_distance_real_halves",
         frechet(real[half][:n], real[~half]), "two halves of the real", CLOSE),
        ("nearest_training_video_rmse", "nearest training video, RMSE", "{:.4f}",
         mean(rows["nearest"]), "nearest_training_video_rmse_real", mean(rows["nearest_real"]),
         REAL, NO_COPY)]


def frechet(a, b):
    """Frechet distance of Gaussians fitted to samples (N, d), as in FID (Heusel et al. 2017)."""
    one, two = (np.cov(x, rowvar=False, ddof=min(1, len(x) - 1)) for x in (a, b))
    root = np.sqrt(np.maximum(np.linalg.eigvals(one @ two).real, 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two) - 2 * root)


def of_prediction(rows, labels, names, given):
    facts = {"videos": len(labels), "frames_given": given, "one_dot": mean(rows["dots"] == 1)}
    for name in ("model", *METHODS):
        off = rows[name].double()
        facts[name] = {"error_px": mean(off), "by_horizon": off.mean(0).tolist(),
                       "by_class": {c: mean(off[labels == k]) for k, c in enumerate(names)}}
    hardest_first = sorted(METHODS, key=lambda name: facts[name]["error_px"])
    return facts, [
        ("error_px", f"error, {given} frames given", "{:.2f} px", facts["model"]["error_px"],
         f"error_px_{name}", facts[name]["error_px"], name.replace("_", " "), BELOW)
        for name in hardest_first]


def warnings_of(metrics, names):
    """In words, what a good-looking figure elsewhere must not hide."""
    found, tokens, right = [], metrics["tokenizer"], metrics["classification"]["accuracy"]
    chance, count = 1 / len(names), metrics["classification"]["videos"]
    if tokens["foreground_perplexity"] < min(10, 0.5 * tokens["foreground_places"]):
        found.append(f"the codes have collapsed: perplexity {tokens['foreground_perplexity']:.1f}, "
                     f"{tokens['active_codes']} codes in use")
    if tokens["skill"] < 0.5:
        words = "is worse than" if tokens["skill"] < 0 else "hardly beats"
        found.append(f"the tokenizer {words} a blank video: skill {tokens['skill']:.2f}")
    if right < chance + 3 * math.sqrt(chance * (1 - chance) / count):
        found.append(f"accuracy is at chance: {right:.1%}, chance {chance:.1%}")
    if metrics["judge"]["accuracy_on_real"] < GOOD_JUDGE:
        found.append("the judge of generated videos is right on only "
                     f"{metrics['judge']['accuracy_on_real']:.1%} of real ones")
    return found


def table(metrics):
    """The lines to print: the rows, the confusion, the warnings."""
    yield f"{'on held-out test videos':<44}{'model':>14}{'beside it':>14}"
    for row in metrics["rows"]:
        yield (f"{row['group']:<16}{row['words']:<32}{row['text']:>14}{row['baseline_text']:>14}  "
               f"{row['baseline_words']}").rstrip()
    names = metrics["classification"]["classes"]
    width = max(map(len, names)) + 2
    yield from ("", "true class by guessed class")
    yield " " * width + "".join(f"{name:>{width}}" for name in names)
    for name, row in zip(names, metrics["classification"]["confusion_true_by_guessed"]):
        yield f"{name:<{width}}" + "".join(f"{count:>{width}}" for count in row)
    yield from (f"WARNING: {warning}" for warning in metrics["warnings"])


if __name__ == "__main__":
    main()
