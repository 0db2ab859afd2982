"""Stage 3: train MAGVIT on videos; killed at any moment, it goes on exactly where it was.

    python train_magvit.py                        # results/dataset.npz, on what this machine has
    nohup python train_magvit.py > train.log &    # the same command again goes on where it was
    python train_magvit.py --preset small --data other.npz --out results/other
    torchrun --standalone --nproc_per_node=2 train_magvit.py    # on two devices, see processes.py

Two phases: first the tokenizer learns to paint a video from a few integers, then the transformer
learns to fill in hidden ones. Then evaluate_magvit.py says what the model is worth. The order of
the videos and the masks are functions of the seed and the step, and all sums are taken in a fixed
order: on the same machine, a run that was killed and one that was not end with the same bits.
"""
from settings import option, parse_settings     # first: see there

import contextlib
import copy
import io
import itertools
import json
import math
import multiprocessing
import time
import warnings
from collections import deque, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import apply_magvit
import checkpointing
import evaluate_magvit
import magvit
import report
from checkpointing import CheckpointError, duration
from processes import Follower, Processes
from videos import LIT, TRAIN, VALIDATION, checked_split, load


@dataclass
class Settings:
    data: str = option("results/dataset.npz", "an .npz with videos and labels, or a run directory "
                       "of generate.py")
    out: str = option("results/magvit_training", "directory of checkpoints, models and progress")
    preset: str = option("auto", "tiny or small; auto is tiny on a CPU and small on a GPU")
    epochs: int = option(0, "of both phases; 0: by preset, number and size of the videos")
    batch_size: int = option(0, "videos a step; 0: by preset")
    every: int = option(5, "epochs after which a checkpoint is saved, but not twice in half a "
                        "minute; besides as often as it takes less than 1 %% of the time")
    max_minutes: float = option(5.0, "minutes after which a checkpoint is saved in any case")
    seed: int = option(0, "of the first weights, the order of the data, the masks and the samples")
    device: str = option("auto", "cuda, cpu or mps; auto is cuda if there is one, else cpu")
    heartbeat: float = option(30.0, "seconds between two writes of PROGRESS.txt")
    fresh: bool = option(False, "start over; the old run is set aside by renaming its directory")


@dataclass
class Learning:
    """How one phase learns. Videos are counted as those of 8x32x32 pixels; see `phases_of`."""
    batch: int          # videos a step
    videos: int         # training videos shown; epochs follow from the size of the set
    rate: float         # peak learning rate at this batch; at another it goes with the square root
    decay: float        # weight decay
    memory: int         # videos over which the weights are averaged


Preset = namedtuple("Preset", "sizes tokenizer transformer")     # the sizes of magvit.Sizes
PRESETS = {
    "tiny": Preset(     # for two cores: 26 minutes
        dict(width=64, encoder_blocks=1, decoder_blocks=2, dim=128, layers=3, heads=4, chain=96),
        Learning(batch=32, videos=125_000, rate=4e-3, decay=0.01, memory=32_000),
        Learning(batch=96, videos=1_600_000, rate=3.5e-3, decay=0.045, memory=32_000)),
    "small": Preset(    # for one large GPU: three minutes
        dict(width=128, encoder_blocks=2, decoder_blocks=3, dim=256, layers=6, heads=8, chain=192),
        Learning(batch=256, videos=2_400_000, rate=4e-3, decay=0.01, memory=256_000),
        Learning(batch=1024, videos=23_000_000, rate=2e-3, decay=0.045, memory=256_000))}
BETAS = (0.9, 0.99)
WARM_UP = 0.03          # of a phase's steps, until the learning rate is at its peak
LOOKS = 40              # validations a phase, at most
VALIDATION_VIDEOS = 1000
TURNS = 8               # ways to mirror and turn a video
SAMPLES = 8             # videos of samples.npz
ROOM = 24e9             # free bytes of a GPU that a second process may share, see compile_ahead


def main():
    parser, settings = parse_settings(Settings, "Train MAGVIT: a tokenizer, then a transformer.")
    for name, value in vars(settings).items():
        least, most = (1e-6, 1e6) if isinstance(value, float) else (name == "every", 2**63 - 1)
        if not isinstance(value, str) and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} must be from {least:g} to {most:g}")
    if not settings.out:
        parser.error("--out is empty; name a directory")
    if settings.epochs == 1:
        parser.error("--epochs must be at least 2, one for each phase")
    if settings.preset not in ("auto", *PRESETS):
        parser.error(f"--preset must be auto, {', '.join(PRESETS)}, not {settings.preset}")
    processes = Processes()
    if settings.fresh and not processes.alone:
        parser.error("--fresh would start over at each restart by torchrun; rename --out instead")
    try:
        with processes.one_voice():
            data = train(settings, processes)
    finally:    # however it ended
        if processes.leads:
            report.refresh(settings.out, force=True)
    if processes.leads:     # at once, so that nobody who watches sees all runs ended in between
        evaluate_magvit.evaluate(evaluate_magvit.Settings(
            model=f"{settings.out}/best_model.pt", data=settings.data,
            device=settings.device, seed=settings.seed, max_minutes=settings.max_minutes,
            heartbeat=settings.heartbeat), data)


# --------------------------------------------------------------------------------------------------
# The training, from wherever it was to its end; returns the data

def train(settings, processes):
    device, out = magvit.open_device(settings.device), Path(settings.out)
    on_gpu = device.type == "cuda"
    processes.join(device)

    # The data: the same in every process and at every start.
    data = load(settings.data)
    if settings.fresh:
        set_aside(out)
    used = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):     # Run says what is wrong
        used = int(json.loads((out / "run.json").read_bytes())["settings"]["videos"])
    used = processes.given(used)
    if used and len(data.videos) > used:
        if processes.leads:
            checkpointing.say(f"{settings.data} has grown to {len(data.videos)} videos; this run "
                              f"goes on with the first {used} (--fresh begins again with all)")
        data = data.first(used)
    part, digest = checked_split(data)
    processes.check_same(digest, settings.data)
    videos = magvit.DeviceVideos(data.videos, device)
    labels = torch.from_numpy(data.labels).to(device)
    training, validation = (torch.from_numpy(np.flatnonzero(part == which)).to(device)
                            for which in (TRAIN, VALIDATION))

    # The model. Its first weights are drawn on the CPU: the same ones on every device.
    name = settings.preset if settings.preset != "auto" else "small" if on_gpu else "tiny"
    torch.manual_seed(settings.seed)
    model = magvit.Magvit(magvit.Sizes(**PRESETS[name].sizes), data.videos.shape[1:], data.classes)
    model.to(device).requires_grad_(False).eval()
    phases = phases_of(settings, PRESETS[name], model, len(training))

    run = checkpointing.Run(
        out, phases[-1].stop, suffix=".pt", title="MAGVIT training",
        max_minutes=settings.max_minutes, heartbeat=settings.heartbeat,
        signals=checkpointing.ALL_SIGNALS, settings={
            "preset": name, "epochs": settings.epochs, "batch_size": settings.batch_size,
            "seed": settings.seed, "videos": len(data.videos), "shape": list(model.shape),
            "data": digest, "steps": [p.steps for p in phases]}) if processes.leads else Follower()
    with run:
        state = processes.given(run.load({}, read=lambda file: torch.load(
            file, map_location="cpu", weights_only=True)))
        done, history, best = state.get("done", 0), state.get("history", []), state.get("best")
        results = Results(out, model, videos[validation[::len(validation) // SAMPLES or 1]],
                          settings.seed)
        if state:
            model.load_state_dict(state["model"])
            if processes.leads:     # what a kill kept from being written, or was damaged since
                results.publish(state)
        saved_at, ahead = time.monotonic(), None
        for phase in [phase for phase in phases if done < phase.stop]:
            learner = Learner(phase, model, videos, labels, training, validation, settings.seed,
                              processes)
            if done > phase.start:
                learner.restore(state["learning"])
            else:
                run.update(done, **{"Train loss": "not known yet", "Val loss": "not known yet"})
            if phase is phases[-1]:
                for chunk, share in learner.encode():
                    run.update(done, Epoch=phase.epoch_at(done),
                               Phase=f"{phase.name}, encoding the videos: {share:.0%}")
                    if processes.asked(run.stopping, chunk):
                        run.leave_if_asked()    # what was done before is saved
            run.update(done, Phase=phase.name, Epoch=phase.epoch_at(done))
            if on_gpu and phase is phases[0] and torch.cuda.mem_get_info()[0] > ROOM:
                ahead = multiprocessing.get_context("spawn").Process(
                    target=compile_ahead, daemon=True, args=(
                        torch.cuda.current_device(), phases[-1], model.sizes, model.shape,
                        model.classes, settings.seed, processes))
                ahead.start()
            elif ahead:
                ahead.join(60)
            advance = captured(learner, run.log) if on_gpu else learner.step
            pace = Pace(phases, done)

            while done < phase.stop:
                learner.feed(done - phase.start)
                advance()
                done += 1
                if on_gpu and done % 16 == 0:
                    torch.cuda.synchronize()    # not further ahead, to stop and save soon
                run.update(done)
                epoch, since = divmod(done - phase.start, phase.epoch_steps)
                look = since == 0 and (epoch % phase.look == 0 or done == phase.stop)

                if look or pace.is_due():
                    loss = learner.train_loss(done)     # waits for the device
                    left = pace.left(done)
                    run.expect(left)
                    run.update(done, Epoch=phase.epoch_at(done), **{
                        "Speed": f"{pace.speed / phase.work:.0f} videos/s",
                        "Train loss": f"{loss:.4f}"})
                    if len(pace.seen) == 2:
                        run.log(f"preset {name} on {device.type}: {phases[0].epochs} and "
                                f"{phases[1].epochs} epochs; about {duration(left)} from here")
                    if processes.leads:
                        report.refresh(out)     # by itself never more than 1 % of the time
                if look:
                    history = [*history, {
                        "phase": phase.name, "epoch": epoch, "step": done, "train_loss": loss,
                        "validation_loss": learner.validation_loss(),
                        "learning_rate": learner.rate.item()}]
                    learner.loss_sum.zero_()
                    losses = [r["validation_loss"] for r in history if r["phase"] == phase.name]
                    if phase is phases[-1] and losses[-1] == min(losses):
                        best = {"epoch": epoch, "validation_loss": losses[-1],
                                "weights": on_host(learner.average.state_dict())}
                    said = f"{losses[-1]:.4f}, best {min(losses):.4f}"
                    run.update(done, **{"Val loss": said})
                    run.log(f"{phase.name} epoch {epoch}/{phase.epochs}: train {loss:.4f}, "
                            f"validation {said}; about {duration(left)} left")

                asked = processes.asked(run.stopping, done)     # all leave after the same step
                regular = since == epoch % settings.every == 0 and time.monotonic() - saved_at > 30
                # The first steps of a graph tell nothing of the speed, and so of how often.
                due = run.due() and not run.stopping and (len(pace.seen) > 1 or not on_gpu)
                if processes.leads and (done == phase.stop or asked or regular or due):
                    learner.train_loss(done)    # what is not finite is not saved
                    state = {"done": done, "model": on_host(model.state_dict()), "best": best,
                             "learning": on_host(learner.tensors()) if done < phase.stop else None,
                             "history": history}
                    run.save(done, write=lambda file: file.write(magvit.saved(state)))
                    saved_at = time.monotonic()
                    if done == phase.stop or asked or time.monotonic() > results.next:
                        results.publish(state)
                if asked:
                    run.leave_if_asked()
    return data


def on_host(tensors):
    """Copies on the CPU of a dict's tensors: files do not depend on the device."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def set_aside(out):
    """--fresh: rename the old directory, unless a process is working in it."""
    if out.is_dir() and any(out.iterdir()):
        with contextlib.closing(checkpointing.DirectoryLock(out)):
            names = (out.with_name(f"{out.name}.old{number}") for number in itertools.count(1))
            aside = out.rename(next(path for path in names if not path.exists()))
        checkpointing.say(f"the old run is in {aside}")


# --------------------------------------------------------------------------------------------------
# The two phases and their lengths

@dataclass
class Phase:
    name: str           # also that of the network in magvit.Magvit
    learning: Learning
    batch: int
    epoch_steps: int
    epochs: int
    start: int          # number of its first step
    rate: float         # at its peak

    steps = property(lambda self: self.epochs * self.epoch_steps)
    stop = property(lambda self: self.start + self.steps)
    look = property(lambda self: -(-self.epochs // LOOKS), doc="epochs between validations")
    work = property(lambda self: 2 if self.name == "tokenizer" else 1, doc="of a video, about")

    def epoch_at(self, done):
        """The epoch at work after step `done`, in words."""
        return f"{min((done - self.start) // self.epoch_steps + 1, self.epochs)}/{self.epochs}"


def phases_of(settings, preset, model, training_videos):
    """The phases with their epochs: as many as the preset's videos make, fewer of dearer videos.

    A video's cost goes with its places. What it teaches grows with them too, but more slowly: so
    the work may grow, the tokenizer's faster than the transformer's.
    """
    cost = max(1, model.shape[0] * model.places / 8)
    phases = []
    for name, exponent in (("tokenizer", 0.33), ("transformer", 0.43)):
        learning = getattr(preset, name)
        batch = min(settings.batch_size or learning.batch, training_videos)
        epoch_steps = training_videos // batch
        epochs = max(1, round(learning.videos / cost**exponent / (epoch_steps * batch)))
        rate = learning.rate * math.sqrt(batch / learning.batch)
        if name == "tokenizer":     # at 4e-3, batch 512, a slot of 16x64x64 RGB collapsed
            rate /= cost**exponent
        phases.append(Phase(name, learning, batch, epoch_steps, epochs, 0, rate))
    if settings.epochs:
        share = phases[0].epochs / (phases[0].epochs + phases[1].epochs)
        first = min(max(1, round(settings.epochs * share)), settings.epochs - 1)
        phases[0].epochs, phases[1].epochs = first, settings.epochs - first
    phases[1].start = phases[0].stop
    return phases


# --------------------------------------------------------------------------------------------------
# What is learned: the two losses and the masks. Of several processes each takes the part `share` of
# a batch; sums over the whole batch divide, so that the parts' losses and gradients add up to those
# that one process alone would have.

ALL = slice(None)
FILL = 0.5              # weight of the places beside the class


def reconstruction_loss(painted, video, share=ALL):
    """The share of the video's energy that is lost, and L1 with foreground and background weighed
    equally. video (B, T, C, H, W); painted the same, of its part `share`."""
    lit = (video > LIT).float()
    energy = video.square().sum().clamp(min=1e-4 * video.numel())
    bright, dark = lit.sum().clamp(min=1), (1 - lit).sum().clamp(min=1)
    error, lit = painted.float() - video[share], lit[share]
    l1 = error.abs()
    fair = (l1 * lit).sum() / bright + (l1 * (1 - lit)).sum() / dark
    return error.square().sum() / energy + fair


def masked_loss(transformer, codes, labels, hidden, label_hidden, most=None, share=ALL):
    """Cross entropy of the hidden numbers and of the hidden classes. The masks are those of the
    whole batch, codes and labels those of its part `share`.

    Only what counts is told number by number, which saves half. A GPU must know before how many
    places that are, or `most`; those beyond it are left out.
    """
    # Sampling goes frame by frame, so the first hidden frame matters most; the later ones teach
    # where it leads, and weigh less with the square of how far ahead they lie.
    frames = torch.arange(hidden.shape[1], device=hidden.device)
    ahead = (frames - magvit.first_hidden_frame(hidden)[:, None]).clamp(min=0)
    weight, named = hidden / (1 + ahead[:, :, None]).square(), label_hidden.sum().clamp(min=1)
    weighed, weight = weight.sum().clamp(min=1), weight[share].flatten()
    hidden, label_hidden = hidden[share], label_hidden[share]
    state, states = transformer(codes, hidden, labels, label_hidden)
    states, answers = states.flatten(0, 1), codes.flatten(0, 2)
    counts = (weight == 0).byte().argsort(stable=True)[:most or weight.count_nonzero()]
    states, answers, weight = states[counts], answers[counts], weight[counts]
    logits = transformer.logits(states, answers)
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none")
    fill = (loss.view(answers.shape).sum(1) * weight).sum() / weighed
    guess = transformer.to_class(state).float()
    name = F.cross_entropy(guess, labels, reduction="none") * label_hidden
    return FILL * fill + name.sum() / named


def draw_masks(key, step, batch, frames, places):
    """What is hidden and learned: hidden (batch, frames, places) and label_hidden (batch,), bool.

    A third each of: classify (class hidden; the whole video or its first frames shown), generate
    (class shown, now and then hidden), predict (class hidden half the time, a frame or more shown).
    In the last two the frames before a random one are shown, it is hidden in part and the later
    ones wholly: what sampling frame by frame asks.
    """
    random = magvit.uniform(key, step, batch * (4 + frames * places)).view(batch, -1)
    (first, whole, part, name), order = random[:, :4].unbind(1), random[:, 4:]
    order = order.view(batch, frames, places)
    task = torch.arange(batch, device=random.device) % 3
    classify, predict = task == 0, task == 2
    at = torch.where(predict, 1 + (first * (frames - 1)).long(), (first * frames).long())
    shown = torch.where(whole < 0.5, frames, (frames + 1) // 2 + at // 2)
    at = torch.where(classify, shown, at)[:, None, None]
    frame = torch.arange(frames, device=random.device)[:, None]
    some = (order < part[:, None, None]) | (order == order.amin(2, keepdim=True))
    chance = torch.where(classify, 1.0, torch.where(predict, 0.5, 0.1))
    return (frame > at) | (frame == at) & some, name < chance


# --------------------------------------------------------------------------------------------------
# One step

def turned(videos, turn):
    """(.., H, W) mirrored and turned in one of TURNS ways; oblong ones in four."""
    videos = videos.flip(-1) if turn & 1 else videos
    videos = videos.flip(-2) if turn & 2 else videos
    oblong = videos.shape[-1] != videos.shape[-2]
    return videos.transpose(-1, -2) if turn & 4 and not oblong else videos


def together(parameters):
    """One vector that all of them become parts of, each at a multiple of 64 bytes."""
    vector = torch.cat([F.pad(p.data.flatten(), (0, -p.numel() % 16)) for p in parameters])
    for p, part in zip(parameters, parts_of(vector, parameters)):
        p.data = part
    return vector


def parts_of(vector, parameters):
    parts = vector.split([p.numel() + -p.numel() % 16 for p in parameters])
    return [part[:p.numel()].view_as(p) for part, p in zip(parts, parameters)]


class Learner:
    """A network that learns, its average, and the optimiser between them, for one phase.

    All that `step` reads and writes are tensors on the device, the step's own number among them. So
    it runs as it is on a CPU, and as one CUDA graph on a GPU.
    """

    def __init__(self, phase, model, videos, labels, training, validation, seed, processes):
        self.phase, self.model, self.processes = phase, model, processes
        self.seed, self.device, self.masks = seed, model.device, magvit.key(seed, "masks")
        self.share = slice(*processes.share(phase.batch))
        self.videos, self.labels, self.codes = videos, labels, None     # of codes see encode()
        self.training, self.validation = (numbers.to(videos.pixels.device) for numbers in (
            training, validation[:VALIDATION_VIDEOS]))
        self.fed = self.epoch = None    # what a step learns from, and its epoch; see feed()
        self.average = getattr(model, phase.name)
        self.network = copy.deepcopy(self.average).requires_grad_(True).train()
        self.parameters = list(self.network.parameters())
        # All parameters in one vector: a few operations then update what would take hundreds.
        self.vector = together(self.parameters)
        self.averages = together(list(self.average.parameters()))
        self.gradient = self.vector.grad = torch.zeros_like(self.vector)
        self.gradients = parts_of(self.gradient, self.parameters)
        self.at = torch.zeros(1, dtype=torch.long, device=self.device)   # steps of this phase
        self.loss_sum = torch.zeros((), device=self.device)              # since the last look
        self.schedule = schedule(phase).to(self.device)
        self.rate = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.AdamW(
            [self.vector], lr=self.rate, betas=BETAS, weight_decay=phase.learning.decay,
            fused=True, capturable=self.device.type == "cuda")
        self.moments = {"step": torch.zeros((), device=self.device),
                        "exp_avg": torch.zeros_like(self.vector),
                        "exp_avg_sq": torch.zeros_like(self.vector)}
        self.optimizer.state[self.vector] = self.moments    # a restart and a graph find it in place
        self.batch_loss = self._batch_loss if self.device.type != "cuda" else torch.compile(
            self._batch_loss, fullgraph=True, dynamic=False)

    def encode(self):
        """Make the codes of all videos in all turns: the tokenizer learns no more. Yields (number,
        share of the work) after each chunk; they are the same at every start, to the last bit."""
        codes = torch.zeros((TURNS, len(self.labels), self.model.shape[0], self.model.places,
                             magvit.NUMBERS), dtype=torch.uint8, device=self.device)
        chunks = torch.cat([self.training, self.validation]).split(
            max(1, self.phase.batch // TURNS))
        for number, chunk in enumerate(chunks):
            mine = chunk[slice(*self.processes.share(len(chunk)))]
            made = self.model.encode(self.read(mine.repeat(TURNS)))
            codes[:, mine] = made.byte().unflatten(0, (TURNS, len(mine)))
            yield number, (number + 1) / len(chunks)
        self.processes.add([codes])
        self.codes = codes

    def read(self, numbers):
        """Videos uint8 (B, T, C, H, W) or their codes. An eighth each is mirrored and turned in
        another way, which keeps its class."""
        parts = enumerate(numbers.tensor_split(TURNS))
        if self.codes is not None:
            return torch.cat([self.codes[turn, part] for turn, part in parts])
        return torch.cat([turned(self.videos[part], turn) for turn, part in parts])

    def feed(self, step):
        """Lay out what step number `step` of this phase learns from, and its labels (B,). The order
        of an epoch's videos is a hash of seed, phase and epoch."""
        epoch, step = divmod(step, self.phase.epoch_steps)
        if epoch != self.epoch:
            key = magvit.key(self.seed, "order", self.phase.name)
            number = torch.tensor(epoch, device=self.training.device)
            order = magvit.hashes(key, number, len(self.training)).argsort(stable=True)
            self.epoch, self.order = epoch, self.training[order].split(self.phase.batch)
        new = self.read(self.order[step]), self.labels[self.order[step]]
        self.fed = self.fed or tuple(map(torch.empty_like, new))
        for place, value in zip(self.fed, new):
            place.copy_(value)

    def loss(self, network, read, labels, key, number, share=ALL):
        """Of this phase's network on videos, or on codes; `key` and `number` decide the masks."""
        with magvit.precision(self.device):
            if self.codes is None:
                video = read.float() / 255
                return reconstruction_loss(network(video[share]), video, share)
            masks = draw_masks(key, number, *read.shape[:3])
            codes, most = read[share].long(), None
            if self.device.type == "cuda":      # about two fifths count, of a large batch
                most = 16 + codes[..., 0].numel() * 9 // 16
            return masked_loss(network, codes, labels[share], *masks, most, share)

    def _batch_loss(self):
        return self.loss(self.network, *self.fed, self.masks, self.at[0], self.share)

    def step(self):
        """One optimiser step. Never waits for the device."""
        loss = self.batch_loss()
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            torch._foreach_copy_(self.gradients, gradients)
            self.processes.add([loss, self.gradient])
            norm = self.gradient.norm()
            self.gradient *= (1 / (norm + 1e-6)).clamp(max=1)
            rate, share = self.schedule.index_select(0, self.at)[0].unbind()
            self.rate.copy_(rate)
            self.optimizer.step()
            self.averages.lerp_(self.vector, share)
            self.loss_sum += loss + 0 * norm   # not finite if either is not
            self.at += 1

    def train_loss(self, done):
        """The mean since the last look, by step `done`; CheckpointError if it is not finite."""
        loss, looks = self.loss_sum.item(), self.phase.look * self.phase.epoch_steps
        if not math.isfinite(loss):
            raise CheckpointError(
                f"the loss is not finite in phase {self.phase.name}, epoch "
                f"{self.phase.epoch_at(done - 1)}, by step {done}, at learning rate "
                f"{self.rate.item():.2g}; nothing of it was saved. If the same command ends here "
                "again, look at the data, or begin anew with --fresh and another --seed")
        return loss / ((done - self.phase.start - 1) % looks + 1)

    def validation_loss(self):
        """Of the average, on at most 1,000 validation videos, with the same masks every time."""
        key, total = magvit.key(self.seed, "validation"), 0
        for i, chunk in enumerate(self.validation.split(self.phase.batch)):
            number = torch.tensor(i, device=self.device)
            total = total + len(chunk) * self.loss(
                self.average, self.read(chunk), self.labels[chunk], key, number)
        return total.item() / len(self.validation)

    def tensors(self):
        """All that a step changes, but for the average, which is in the model."""
        return {"parameters": self.vector, **self.moments, "at": self.at, "loss": self.loss_sum}

    def restore(self, kept):
        for name, tensor in self.tensors().items():
            tensor.copy_(kept[name])


def schedule(phase):
    """float32 (steps, 2): the learning rate, and the weight of the new in the average."""
    steps, at = phase.steps, np.arange(phase.steps + 8)     # so far captured() may look ahead
    rate = phase.rate * np.minimum(1, (at + 1) / (WARM_UP * steps + 1)) * (
        0.505 + 0.495 * np.cos(math.pi * at / steps))
    share = np.maximum(phase.batch / phase.learning.memory, 9 / (at + 10))
    return torch.from_numpy(np.stack([rate, share], 1).astype(np.float32))


def captured(learner, log):
    """learner.step as one CUDA graph: a function that replays it, on what feed() lays out."""
    log(f"{learner.phase.name}: compiling; it takes half a minute or less")
    changed = [*learner.tensors().values(), learner.averages]
    kept = [tensor.detach().clone() for tensor in changed]
    learner.feed(0)     # from here on it stays where the graph reads it
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):   # compiles, and lets every library make its own preparations
        for _ in range(3):
            learner.step()
    graph = torch.cuda.CUDAGraph()      # whose capture waits for all streams
    # Not "global": with several processes NCCL's own thread asks for events all the while.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        learner.step()
    graph.replay()      # the first time takes far longer
    with torch.no_grad():
        torch._foreach_copy_(changed, kept)
    torch.cuda.synchronize()
    return graph.replay


def compile_ahead(gpu, phase, sizes, shape, classes, seed, processes):
    """The second phase's step, in a process of its own while the first phase learns: the training
    then finds it in the compiler's cache, half a minute earlier. No more depends on it."""
    warnings.simplefilter("ignore")
    with contextlib.suppress(BaseException):    # such as Ctrl-C, at which the training leaves
        device = magvit.open_device("cuda")
        torch.cuda.set_device(gpu)
        model = magvit.Magvit(sizes, shape, classes).to(device).requires_grad_(False).eval()
        videos = magvit.DeviceVideos(np.zeros((phase.batch, *shape), np.uint8), device)
        numbers = torch.arange(phase.batch, device=device)
        learner = Learner(phase, model, videos, 0 * numbers, numbers, numbers, seed, processes)
        learner.codes = model.encode(videos[numbers]).byte().expand(TURNS, -1, -1, -1, -1)
        learner.feed(0)
        torch.autograd.grad(learner.batch_loss(), learner.parameters)


# --------------------------------------------------------------------------------------------------
# How long it takes, and what there is to see

class Pace:
    """How long the rest will take at the speed of the last two minutes or so."""

    def __init__(self, phases, done):
        self.phases = phases
        self.seen = deque([(time.monotonic(), self.to_come(done))], 24)

    def to_come(self, done):
        """Work after step `done`: the videos that will be shown, each as much as its phase says."""
        return sum(p.work * p.batch * max(0, p.stop - max(done, p.start)) for p in self.phases)

    def is_due(self):
        """Two seconds after the start, then every five."""
        return time.monotonic() - self.seen[-1][0] > (5 if len(self.seen) > 1 else 2)

    def left(self, done):
        """Measures: seconds to the end of the training."""
        now, rest, (before, more) = time.monotonic(), self.to_come(done), self.seen[0]
        self.seen.append((now, rest))
        self.speed = (more - rest) / (now - before)
        return rest / self.speed


class Results:
    """The files that follow from a durable checkpoint: they never show what a crash could take
    back, and are made again when they are damaged or gone."""

    def __init__(self, out, model, real, seed):
        self.out, self.model, self.real, self.seed = out, model, real[:SAMPLES], seed
        self.next = time.monotonic() + 30       # on the steady clock; not for a short run

    def publish(self, state):
        """Write what is not there already."""
        began, best, files = time.monotonic(), state["best"], {}
        if best:
            better = {f"transformer.{name}": value for name, value in best["weights"].items()}
            files["best_model.pt"] = magvit.saved(self.model.state({**state["model"], **better}))
        if best and not state["learning"]:      # the end
            files["final_model.pt"] = magvit.saved(self.model.state(state["model"]))
        files["history.json"] = (json.dumps(state["history"], indent=1) + "\n").encode()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, step=state["done"], **apply_magvit.samples(
            self.model, self.real, self.seed, transforms=bool(best)))
        files["samples.npz"] = buffer.getvalue()
        for name, content in files.items():
            path = self.out / name
            if not path.is_file() or path.read_bytes() != content:
                checkpointing.write_atomic(path, content)
        self.next = time.monotonic() + 100 * (time.monotonic() - began)


if __name__ == "__main__":
    main()
