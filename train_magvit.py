"""Stage 3: train MAGVIT on videos; killed at any moment, it goes on exactly where it was.

    python train_magvit.py                        # results/dataset.npz, on what this machine has
    nohup python train_magvit.py > train.log &    # the same command again goes on where it was
    python train_magvit.py --preset small --data other.npz --out results/other
    torchrun --standalone --nproc_per_node=2 train_magvit.py    # on two devices, see processes.py

Two phases: first the tokenizer learns to paint a video from a few integers, then the transformer
learns to fill in hidden ones. Then evaluate_magvit.py says what the model is worth. The order of
the videos and the masks are functions of the seed and the step, and all sums are taken in a fixed
order: on the same machine, a run that was killed and one that was not end with the same bits.

Read from the top: settings, the run, the two losses, the masks, one step, and how it is saved.
"""
import copy
import io
import json
import math
import signal
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpointing
import evaluate_magvit
import report
from checkpointing import CheckpointError, duration
from processes import Follower, Processes
from settings import option, parse_settings

@dataclass
class Settings:
    data: str = option("results/dataset.npz", "an .npz with videos and labels, or a run directory "
                       "of generate.py")
    out: str = option("results/magvit_training", "directory for checkpoints, models, history and "
                      "PROGRESS.txt")
    preset: str = option("auto", "tiny or small; auto is tiny on a CPU and small on a GPU")
    epochs: int = option(0, "epochs of both phases together; 0 lets the preset choose by the "
                         "number and the size of the videos")
    batch_size: int = option(0, "videos a step; 0 lets the preset choose")
    every: int = option(5, "epochs between checkpoints; more where saving would take over 1 %% of "
                        "the time")
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


@dataclass
class Preset:
    sizes: dict         # of magvit.Sizes
    tokenizer: Learning
    transformer: Learning
    ratio: float        # seconds a video of the second phase over the first, for the first ETA


PRESETS = {
    "tiny": Preset(     # for two cores: 25 to 40 minutes
        dict(width=64, encoder_blocks=1, decoder_blocks=2, dim=128, layers=3, heads=4, chain=96),
        Learning(batch=32, videos=200_000, rate=1e-3, decay=0.01, memory=32_000),
        Learning(batch=32, videos=1_500_000, rate=2e-3, decay=0.045, memory=32_000), ratio=0.8),
    "small": Preset(    # for one large GPU: five minutes
        dict(width=128, encoder_blocks=2, decoder_blocks=3, dim=256, layers=6, heads=8, chain=192),
        Learning(batch=512, videos=6_000_000, rate=1.4e-3, decay=0.01, memory=256_000),
        Learning(batch=1024, videos=26_000_000, rate=2e-3, decay=0.045, memory=256_000), ratio=1.0)}
BETAS = (0.9, 0.99)
WARM_UP = 0.03          # of a phase's steps, until the learning rate is at its peak
LOOKS = 40              # validations a phase, at most
VALIDATION_VIDEOS = 1000


def main():
    parser, settings = parse_settings(Settings, "Train MAGVIT: a tokenizer, then a transformer.")
    for name, low, high in (("epochs", 0, 10**6), ("batch_size", 0, 10**6), ("every", 1, 10**6),
                            ("seed", 0, 2**63 - 1), ("max_minutes", 1e-6, 1e6),
                            ("heartbeat", 0.01, 86400)):
        if not low <= getattr(settings, name) <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}, not "
                         f"{getattr(settings, name)}")
    if not settings.out:
        parser.error("--out is empty; name a directory")
    if settings.epochs == 1:
        parser.error("--epochs must be at least 2, one for each phase")
    if settings.preset not in ("auto", *PRESETS):
        parser.error(f"--preset must be auto, {', '.join(PRESETS)}, not {settings.preset}")
    processes = Processes()
    if settings.fresh and processes.leads:
        with checkpointing.one_line_errors():
            set_aside(Path(settings.out), processes.started_by)
    run = checkpointing.Run(settings.out, suffix=".pt", title="MAGVIT training", unit="steps",
                            max_minutes=settings.max_minutes, heartbeat=settings.heartbeat
                            ) if processes.leads else Follower()
    with run:
        import_torch()
        data = train(settings, run, processes)
        processes.leave()
    if not processes.leads:
        return
    # At once, so that nobody who watches sees all runs ended in between.
    evaluation = Path(settings.out) / "evaluation"
    if data is None and checkpointing.read_progress(
            evaluation / "PROGRESS.txt").get("Status") == "COMPLETE":
        checkpointing.tell(f"nothing is left to do; the figures are in {evaluation}/metrics.json, "
                           f"and python evaluate_magvit.py --model {settings.out}/best_model.pt "
                           "shows them")
        return
    evaluate_magvit.evaluate(evaluate_magvit.Settings(
        model=f"{settings.out}/best_model.pt", data=settings.data, out=str(evaluation),
        device=settings.device, seed=settings.seed, max_minutes=settings.max_minutes,
        heartbeat=settings.heartbeat), data)


def import_torch():
    """It takes seconds, in which --help has answered and PROGRESS.txt shows the run."""
    global magvit, torch, F
    import magvit
    import torch
    import torch.nn.functional as F


# --------------------------------------------------------------------------------------------------
# The run, from wherever it was to the end of training

def train(settings, run, processes):
    """Train until `run` is complete. Returns the data; None if there was nothing to do."""
    device = magvit.open_device(settings.device)
    processes.join(device)
    run.heard = True
    name = settings.preset
    if name == "auto":
        name = "small" if device.type == "cuda" else "tiny"
    preset = PRESETS[name]
    used = processes.given(videos_used_before(settings.out))
    with processes.together():
        data = magvit.load_data(settings.data)
        if used and len(data.videos) > used:
            run.log(f"{settings.data} has grown to {len(data.videos)} videos; this run goes on "
                    f"with the first {used} it began with (--fresh to begin again with all)")
            data = data.first(used)
        part, digest = magvit.checked_split(data)
    same = processes.given(digest)
    with processes.together():
        if digest != same:
            raise CheckpointError(f"{settings.data} is not the same here as in process 0",
                                  checkpointing.WRONG_SETTINGS)

    # The first weights are drawn on the CPU: the same ones on every device.
    torch.manual_seed(settings.seed)
    shape = data.videos.shape[1:]
    model = magvit.Magvit(magvit.Sizes(**preset.sizes), shape, data.classes)
    model.to(device).requires_grad_(False).eval()
    videos = magvit.Videos(data.videos, device)
    labels = torch.from_numpy(data.labels).to(device)
    parts = [torch.from_numpy(np.flatnonzero(part == k)).to(device) for k in range(3)]
    phases = phases_of(settings, preset, model, len(parts[magvit.TRAIN]))
    if phases[0].batch < processes.count:
        raise CheckpointError(f"{processes.count} processes cannot share a batch of "
                              f"{phases[0].batch} videos", checkpointing.WRONG_SETTINGS)

    state = None
    with processes.together():
        if processes.leads:
            plan(run, phases[-1].stop, {
                "preset": name, "epochs": settings.epochs, "batch_size": settings.batch_size,
                "seed": settings.seed, "videos": len(data.videos), "shape": list(shape),
                "data": digest})
            state = run.load(lambda file: torch.load(file, map_location="cpu", weights_only=True),
                             {})
        if state:
            publish(Path(settings.out), model, state, run.done == run.total)   # after a kill
    state, done = processes.given((state, run.done))
    history, best = state.get("history", []), state.get("best")
    if done >= phases[-1].stop:
        return None
    if state:
        model.load_state_dict(state["model"])
        warn_of_another_machine(run, state["machine"], machine(device, processes))
    if processes.leads:
        begin(run, model)
    pace = Pace(run, phases, preset.ratio, name, device)

    with Saver(run, model, settings, videos, parts[magvit.VALIDATION]) as saver:
        for phase in phases:
            if done >= phase.stop:
                continue
            learner = Learner(phase, model, videos, labels, parts, settings.seed, processes)
            if (state.get("learning") or {}).get("phase") == phase.name:
                learner.restore(state["learning"])
            learner.shuffle((done - phase.start) // phase.epoch_steps)
            run.update(done, Phase=phase.name)
            saver.wait()    # a graph is captured alone
            advance = captured(learner, run) if device.type == "cuda" else learner.step
            pace.begin(phase, done)
            while done < phase.stop:
                learner.feed(done - phase.start)
                advance()
                done += 1
                epoch, since = divmod(done - phase.start, phase.epoch_steps)
                run.update(done)
                pace.keep(done, learner)
                if since == 0 and (epoch % phase.look == 0 or done == phase.stop):
                    row = look(learner, phase, epoch, done)
                    history = [*history, row]
                    if phase is phases[-1] and row["validation_loss"] <= lowest(best):
                        best = {"epoch": epoch, "validation_loss": row["validation_loss"],
                                "weights": copy.deepcopy(learner.average.state_dict())}
                    tell(run, phase, history, pace, done)
                    saver.show_page()
                if since == 0 and done < phase.stop:
                    learner.shuffle(epoch)
                asked = agreed(run, processes, device, done)
                cadence = since == 0 and epoch % settings.every == 0 and saver.affordable()
                late = run.due() and not saver.busy()
                if processes.leads and (done == phase.stop or cadence or asked or late):
                    learner.check_finite(done)
                    learning = None if done == phase.stop else learner.state()
                    saver.save(done, {"done": done, "model": model.state_dict(), "best": best,
                                      "learning": learning, "history": history,
                                      "machine": machine(device, processes)}, phase)
                if asked:
                    saver.wait()
                    run.leave_if_asked()
    return data


def plan(run, total, settings):
    try:
        run.plan(total, settings)
    except CheckpointError as error:
        if error.exit_code != checkpointing.WRONG_SETTINGS:
            raise
        raise CheckpointError(f"{error}. Or add --fresh: it sets the old run aside and begins anew",
                              error.exit_code) from None


def begin(run, model):
    """From here on the leader's run changes files."""
    run.unit_bytes = bytes_to_come(model, run) / (run.total - run.done)
    if run.done:   # in PROGRESS.txt: history.json is the same however often it was killed
        before = run.progress.fields.get("Restarts")
        run.update(run.done, Restarts=f"{before}, {run.done}" if before else run.done)
    run.begin()


ASK_EVERY = 16          # steps on a GPU, where asking waits for the device


def agreed(run, processes, device, done):
    """The signal at which all processes leave, all after this step; None if none has one."""
    if processes.alone or device.type == "cuda" and done % ASK_EVERY:
        return run.stopping if processes.alone else None
    asked = processes.stop(run.stopping)
    if asked and not run.stopping:      # it came to another one
        if processes.leads:
            signal.raise_signal(asked)
        else:
            run.stopping = asked
    return asked


def machine(device, processes):
    """What decides the last bits of a result, beside the settings."""
    kind = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}"
    return {"torch": str(torch.__version__), "device": kind, "threads": torch.get_num_threads(),
            "processes": processes.count}


def warn_of_another_machine(run, before, now):
    for key, value in now.items():
        if before.get(key, 1) != value and (key != "threads" or now["device"] == "cpu"):
            run.log(f"{key} was {before[key]}, is {value}: the result will be as good, but not the "
                    "same to the last bit")


def bytes_to_come(model, run):
    """On the disk: a state holds the model, and of the transformer four more copies."""
    size = {name: sum(p.numel() * 4 for p in part.parameters()) for name, part in
            (("model", model), ("transformer", model.transformer))}
    state = size["model"] + 4 * size["transformer"]
    return 2 * size["model"] + state * (2 if run.store.newest else run.keep + 1)


def lowest(best):
    return best["validation_loss"] if best else math.inf


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

    steps = property(lambda self: self.epochs * self.epoch_steps)
    stop = property(lambda self: self.start + self.steps)
    look = property(lambda self: max(1, self.epochs // LOOKS), doc="epochs between validations")


def phases_of(settings, preset, model, training_videos):
    """The phases with their epochs: as many as the preset's videos make, fewer of dearer videos.

    A video's cost goes with its places. What it teaches grows with them too, but more slowly: so
    the work may grow, with the fourth root.
    """
    cost = max(1, model.shape[0] * model.places / 8)
    phases, start = [], 0
    for name in ("tokenizer", "transformer"):
        learning = getattr(preset, name)
        batch = min(settings.batch_size or learning.batch, training_videos)
        epoch_steps = training_videos // batch
        epochs = max(1, round(learning.videos / cost**0.75 / (epoch_steps * batch)))
        phases.append(Phase(name, learning, batch, epoch_steps, epochs, 0))
    if settings.epochs:
        share = phases[0].epochs / (phases[0].epochs + phases[1].epochs)
        first = min(max(1, round(settings.epochs * share)), settings.epochs - 1)
        phases[0].epochs, phases[1].epochs = first, settings.epochs - first
    phases[1].start = phases[0].stop
    return phases


# --------------------------------------------------------------------------------------------------
# What is learned: the two losses and the masks

LIT = 0.02              # a pixel brighter than this is foreground


def reconstruction_loss(painted, video, whole=None):
    """The share of the video's energy that is lost, and L1 with foreground and background weighed
    equally; both videos (B, T, C, H, W).

    whole: what `divisors` gives, of a batch of which this is one process's share."""
    energy, bright, dark = whole or divisors(video)
    error, lit = painted.float() - video, (video > LIT).float()
    l1 = error.abs()
    fair = (l1 * lit).sum() / bright + (l1 * (1 - lit)).sum() / dark
    return error.square().mean() / energy + fair


def divisors(video):
    """Mean square, number of lit values, number of dark ones; none is 0."""
    lit = (video > LIT).float()
    return (video.square().mean().clamp(min=1e-4), lit.sum().clamp(min=1),
            (1 - lit).sum().clamp(min=1))


FILL = 0.25             # weight of the places beside the class


def weights(hidden):
    """(B, T, n): sampling goes frame by frame, so the first hidden frame matters most; the later
    ones teach where it leads, and weigh less with the square of how far ahead they lie."""
    frames = torch.arange(hidden.shape[1], device=hidden.device)
    ahead = (frames - magvit.first_hidden_frame(hidden)[:, None]).clamp(min=0)
    return hidden / (1 + ahead[:, :, None]).square()


def masked_loss(transformer, codes, labels, hidden, label_hidden, pick, whole=None):
    """Cross entropy of the hidden numbers and of the hidden classes.

    pick: compute only what counts, which on a CPU saves half; on a GPU changing shapes would cost
    more than that. whole: the sums of the weights and of the hidden classes, of a batch of which
    this is one process's share.
    """
    state, states = transformer(codes, hidden, labels, label_hidden)
    weight = weights(hidden).flatten()
    states, answers = states.flatten(0, 1), codes.flatten(0, 2)
    if pick:
        counts = weight.nonzero()[:, 0]
        states, answers, weight = states[counts], answers[counts], weight[counts]
    logits = transformer.logits(states, answers)
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none")
    weighed, named = whole or (weight.sum(), label_hidden.sum().clamp(min=1))
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

TURNS = 8               # ways to mirror and turn a video


class Learner:
    """A network that learns, its average, and the optimiser between them, for one phase.

    All that `step` reads and writes are tensors on the device, the step's own number among them. So
    it runs as it is on a CPU, and as one CUDA graph on a GPU. Of several processes each takes its
    share of every batch; losses are divided by sums over the whole batch, and the gradients
    averaged, so that all take the very step that one alone would take.
    """

    def __init__(self, phase, model, videos, labels, parts, seed, processes=None):
        self.phase, self.model, self.videos, self.labels = phase, model, videos, labels
        self.processes = processes or Processes()
        self.share = slice(*self.processes.share(phase.batch))
        self.training, self.validation = parts[magvit.TRAIN], parts[magvit.VALIDATION]
        self.seed, self.device = seed, model.device
        self.masks = magvit.key(seed, "masks")
        self.average = getattr(model, phase.name)
        self.network = copy.deepcopy(self.average).requires_grad_(True).train()
        self.parameters = list(self.network.parameters())
        self.averages = list(self.average.parameters())
        self.at = torch.zeros(1, dtype=torch.long, device=self.device)   # steps of this phase
        self.loss_sum = torch.zeros((), device=self.device)              # since the last look
        turns = [k for k in range(TURNS) for _ in range(k, phase.batch, TURNS)][self.share]
        self.turned = [turns.count(k) for k in range(TURNS)]   # videos of the share, by their turn
        size = (phase.epoch_steps, len(turns))
        self.order = torch.zeros(size, dtype=torch.long, device=self.device)
        self.fed = None         # this step's videos, where the device cannot hold all
        if videos.held is None:
            self.fed = torch.zeros((len(turns), *videos.shape[1:]), dtype=torch.uint8,
                                   device=self.device)
        self.schedule = schedule(phase).to(self.device)
        self.rate = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.rate, betas=BETAS, weight_decay=phase.learning.decay,
            fused=True, capturable=self.device.type == "cuda")
        for p in self.parameters:   # at once, so that a restart and a graph find them in place
            self.optimizer.state[p] = {"step": torch.zeros((), device=self.device),
                                       "exp_avg": torch.zeros_like(p),
                                       "exp_avg_sq": torch.zeros_like(p)}
        self.batch_loss = self._batch_loss
        if self.device.type == "cuda":
            self.batch_loss = torch.compile(self._batch_loss, fullgraph=True, dynamic=False)

    def feed(self, step):
        """What step number `step` of this phase reads of videos that the device cannot hold."""
        if self.fed is not None:
            index = self.order_here[step % self.phase.epoch_steps]
            self.fed.copy_(self.videos[index], non_blocking=True)

    def step(self):
        """One optimiser step. Never waits for the device."""
        self.optimizer.zero_grad()
        loss = self.batch_loss(self.whole())
        loss.backward()
        loss = loss.detach()
        if not self.processes.alone:
            self.processes.average([loss, *[p.grad for p in self.parameters]])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate, share = self.schedule.index_select(0, self.at)[0].unbind()
        self.rate.copy_(rate)
        self.optimizer.step()
        with torch.no_grad():
            change = torch._foreach_sub(self.parameters, self.averages)
            torch._foreach_mul_(change, share)
            torch._foreach_add_(self.averages, change)
            self.loss_sum += loss + 0 * norm   # not finite if either is not
            self.at += 1

    def _batch_loss(self, whole=None):
        return self.loss(self.network, *self.batch(), self.masks, self.at[0], self.share, whole)

    def batch(self):
        """This process's videos uint8 (B, T, C, H, W) and labels (B,) of this step: an eighth of
        the batch each mirrored and turned in another way, which keeps their class."""
        index = self.order.index_select(0, self.at % self.phase.epoch_steps)[0]
        videos = self.videos[index] if self.fed is None else self.fed
        square = videos.shape[-1] == videos.shape[-2]
        turned = []
        for k, chosen in enumerate(videos.split(self.turned)):
            chosen = chosen.flip(-1) if k & 1 else chosen
            chosen = chosen.flip(-2) if k & 2 else chosen
            turned.append(chosen.transpose(-1, -2) if k & 4 and square else chosen)
        return torch.cat(turned), self.labels[index]

    def whole(self):
        """What the losses of this process's share are to be divided by; None if it has it all."""
        if self.processes.alone:
            return None
        count, size = self.processes.count, self.phase.batch
        with torch.no_grad():
            if self.phase.name == "tokenizer":
                video = self.batch()[0].float() / 255
                sums = self.processes.total(torch.stack([
                    video.square().mean() * len(video), (video > LIT).sum(), (video <= LIT).sum()]))
                energy, bright, dark = sums
                return ((energy / size).clamp(min=1e-4) * size / len(video) / count,
                        bright.clamp(min=1) / count, dark.clamp(min=1) / count)
            hidden, label_hidden = draw_masks(self.masks, self.at[0], size, self.model.shape[0],
                                              self.model.places)
            return weights(hidden).sum() / count, label_hidden.sum().clamp(min=1) / count

    def loss(self, network, videos, labels, key, number, share=None, whole=None):
        """Of this phase's network; `key` and `number` decide the masks."""
        with magvit.precision(self.device):
            if self.phase.name == "tokenizer":
                video = videos.float() / 255
                return reconstruction_loss(network(video), video, whole)
            with torch.no_grad():
                codes = self.model.encode(videos)
            masks = draw_masks(key, number, self.phase.batch if share else len(videos),
                               *codes.shape[1:3])
            hidden, label_hidden = (mask[share] for mask in masks) if share else masks
            return masked_loss(network, codes, labels, hidden, label_hidden,
                               pick=self.device.type == "cpu", whole=whole)

    def shuffle(self, epoch):
        """The order of an epoch: of the training videos, by a hash of seed, phase and epoch. Those
        of a batch that are turned alike stand together."""
        key = magvit.key(self.seed, "order", self.phase.name)
        number = torch.tensor(epoch, device=self.device)
        order = magvit.hashes(key, number, len(self.training)).argsort(stable=True)
        steps, size = self.phase.epoch_steps, self.phase.batch
        batches = self.training[order[:steps * size]].view(steps, size)
        alike = torch.cat([batches[:, k::TURNS] for k in range(TURNS)], 1)
        self.order.copy_(alike[:, self.share])
        if self.fed is not None:
            self.order_here = self.order.cpu()

    def validation_loss(self):
        """Of the average, on at most 1,000 validation videos, with the same masks every time."""
        index, key = self.validation[:VALIDATION_VIDEOS], magvit.key(self.seed, "validation")
        total = 0
        with torch.no_grad():
            for i, chunk in enumerate(index.split(self.phase.batch)):
                number = torch.tensor(i, device=self.device)
                loss = self.loss(self.average, self.videos[chunk], self.labels[chunk], key, number)
                total = total + loss * len(chunk)
        return total.item() / len(index)

    def check_finite(self, done):
        if not math.isfinite(self.loss_sum.item()):
            epoch = (done - 1 - self.phase.start) // self.phase.epoch_steps + 1
            raise CheckpointError(
                f"the loss is not finite in phase {self.phase.name}, epoch {epoch}, by step "
                f"{done}, at learning rate {self.rate.item():.2g}; nothing of it was saved. The "
                "same command goes on from the last good checkpoint and, being exact, ends here "
                "again unless the machine was at fault: then look at the data, or begin anew "
                "with --fresh and another --seed")

    def tensors(self):
        """All that a step changes, but for the average, which is in the model."""
        moments = [t for p in self.parameters for t in self.optimizer.state[p].values()]
        return [*self.parameters, *moments, self.at, self.loss_sum]

    def state(self):
        return {"phase": self.phase.name, "tensors": self.tensors()}

    def restore(self, state):
        with torch.no_grad():
            for tensor, kept in zip(self.tensors(), state["tensors"], strict=True):
                tensor.copy_(kept)


def schedule(phase):
    """float32 (steps, 2): the learning rate, and the weight of the new in the average."""
    steps, at = phase.steps, np.arange(phase.steps)
    peak = phase.learning.rate * math.sqrt(phase.batch / phase.learning.batch)
    rate = peak * np.minimum(1, (at + 1) / (WARM_UP * steps + 1)) * (
        0.505 + 0.495 * np.cos(math.pi * at / steps))
    share = np.maximum(phase.batch / phase.learning.memory, 9 / (at + 10))
    return torch.from_numpy(np.stack([rate, share], 1).astype(np.float32))


def captured(learner, run):
    """learner.step as one CUDA graph: a function that replays it. Nothing but the launch is left to
    the processor, and it never runs more than 32 steps ahead, so that it can stop and save."""
    began = time.monotonic()
    run.log(f"{learner.phase.name}: compiling")
    changed = [*learner.tensors(), *learner.averages]
    kept = [tensor.detach().clone() for tensor in changed]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):   # compiles, and lets every library make its own preparations
        for _ in range(3):
            learner.step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Not "global": with several processes NCCL's own thread asks for events all the while.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        learner.step()
    with torch.no_grad():
        torch._foreach_copy_(changed, kept)
    torch.cuda.synchronize()
    run.log(f"{learner.phase.name}: compiled in {duration(time.monotonic() - began)}")
    passed, steps = torch.cuda.Event(), 0

    def replay():
        nonlocal steps
        graph.replay()
        steps += 1
        if steps % 16 == 0:
            passed.synchronize()   # of 16 steps ago: the device still has 16 to do
            passed.record()
    return replay


# --------------------------------------------------------------------------------------------------
# What is seen of it

def look(learner, phase, epoch, done):
    """A row of history.json."""
    learner.check_finite(done)
    since = ((epoch - 1) // phase.look) * phase.look   # the epoch of the look before
    train_loss = learner.loss_sum.item() / ((epoch - since) * phase.epoch_steps)
    learner.loss_sum.zero_()
    return {"phase": phase.name, "epoch": epoch, "step": done, "train_loss": train_loss,
            "validation_loss": learner.validation_loss(), "learning_rate": learner.rate.item()}


def tell(run, phase, history, pace, done):
    """A look in PROGRESS.txt and in the log: the loss, and whether that is better than before."""
    row, losses = history[-1], [r["validation_loss"] for r in history if r["phase"] == phase.name]
    said = f"{losses[-1]:.4f}"
    if len(losses) > 1:
        word = "better" if losses[-1] < losses[-2] else "not better"
        said += f", {word} than {losses[-2]:.4f} before; best {min(losses):.4f}"
    run.update(done, Phase=phase.name, Epoch=f"{row['epoch']}/{phase.epochs}", **{
        "Train loss": f"{row['train_loss']:.4f}", "Val loss": said})
    run.log(f"{phase.name} epoch {row['epoch']}/{phase.epochs}: train {row['train_loss']:.4f}, "
            f"validation {said}; {pace.text(done)}")


class Pace:
    """How fast it goes and how long it will take: said once at the start, then at every look."""

    SAY_AFTER = 20      # steps, after which the first estimate is good enough
    RECENT = 24         # measurements, five seconds apart or more, that the speed is taken from

    def __init__(self, run, phases, ratio, preset, device):
        self.run, self.phases, self.ratio = run, phases, ratio
        self.preset, self.device = preset, device
        self.seconds = {}       # a video of each phase
        self.said = False

    def begin(self, phase, done):
        self.phase, self.first = phase, done
        self.seen = deque([(time.monotonic(), done)], self.RECENT)

    def keep(self, done, learner):
        steps = done - self.first
        early = steps == min(self.SAY_AFTER, self.phase.stop - self.first)
        if time.monotonic() - self.seen[-1][0] < 5 and not early:
            return
        learner.check_finite(done)      # waits for the device, so that the time is that of the work
        now, (before, at) = time.monotonic(), self.seen[0]
        self.seen.append((now, done))
        self.seconds[self.phase.name] = (now - before) / ((done - at) * self.phase.batch)
        self.run.expect(self.left(done))
        if not self.said:
            self.said = True
            self.say(done)

    def left(self, done):
        """Seconds to the end of the training."""
        return sum((p.stop - max(done, p.start)) * p.batch * self.of(p) for p in self.phases
                   if p.stop > done)

    def of(self, phase):
        known = self.seconds.get(phase.name)
        return known or self.seconds.get("tokenizer", 0) * self.ratio

    def say(self, done):
        first, second = self.phases
        left = self.left(done)
        shorter = max(2, round((first.epochs + second.epochs) / 4))
        short = "" if done > self.SAY_AFTER else (
            f"; --epochs {shorter} would take about {duration(left / 4)} and serve less well")
        where = f"from step {self.first} on, " if self.first else ""
        self.run.log(f"preset {self.preset} on {self.device.type}, {where}tokenizer {first.epochs} "
                     f"epochs, transformer {second.epochs}: about {duration(left)}{short}")

    def text(self, done):
        seconds = self.of(self.phase)
        speed = f"{1 / seconds:.0f} videos/s, " if seconds else ""
        return f"{speed}about {duration(self.left(done))} left"


# --------------------------------------------------------------------------------------------------
# How it is saved

class Saver:
    """Writes checkpoints, and the files that follow from them, in a thread while the device works.

    What is written is a copy, taken at once; it counts when it is durable. Leaving the with block
    waits for what is being written.
    """

    SHARE = 0.01            # of the time that saving may take, where only --every asks for it

    def __init__(self, run, model, settings, videos, validation):
        self.run, self.model, self.settings, self.out = run, model, settings, Path(settings.out)
        each = len(validation) // SAMPLES or 1
        self.real = videos[validation[::each][:SAMPLES]]
        self.thread, self.pending = ThreadPoolExecutor(1), None
        self.saved_at, self.cost = time.monotonic(), 0.0

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.wait()
        finally:
            self.thread.shutdown()

    def busy(self):
        if self.pending and self.pending.done():
            self.wait()
        return self.pending is not None

    def wait(self):
        """Until what was to be saved is durable. Raises what the writing raised."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def show_page(self):
        """The page need not wait for a checkpoint to show that the training is there."""
        if self.run.begun:
            self.thread.submit(report.refresh, self.out)

    def affordable(self):
        return not self.busy() and time.monotonic() - self.saved_at > self.cost / self.SHARE

    def save(self, done, state, phase):
        self.wait()
        began = time.monotonic()
        with torch.no_grad():
            shown = samples(self.model, self.real, self.settings.seed, phase, done)
        copied = on_host(state)
        here = torch.cuda.Event() if self.model.device.type == "cuda" else None
        if here:
            here.record()
        self.pending = self.thread.submit(self._write, began, here, done, copied, shown)

    def _write(self, began, copied, done, state, shown):
        if copied:
            copied.synchronize()
        if self.run.durable != done:
            self.run.save(done, magvit.saved(state))
        publish(self.out, self.model, state, done == self.run.total)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **shown)
        checkpointing.write_sealed(self.out / "samples.npz", buffer.getvalue())
        report.refresh(self.out)
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - began


def publish(out, model, state, complete):
    """The files that follow from a durable checkpoint: they never show what a crash could take
    back. What is there already is left alone."""
    best = state["best"]
    if best:
        better = {f"transformer.{name}": tensor for name, tensor in best["weights"].items()}
        publish_model(out / "best_model.pt", model, {**state["model"], **better},
                      f"epoch {best['epoch']}, validation loss {best['validation_loss']:.6f}")
    if complete:
        publish_model(out / "final_model.pt", model, state["model"], f"step {state['done']}")
    text = json.dumps(state["history"], indent=1) + "\n"
    if not (out / "history.json").exists() or (out / "history.json").read_text() != text:
        checkpointing.write_atomic(out / "history.json", text)


def publish_model(path, model, weights, note):
    if checkpointing.note_of(path) != note:
        checkpointing.write_sealed(path, magvit.saved(model.state(weights)), note)


SAMPLES = 8                 # videos of samples.npz
SAMPLED_PLACES = 256        # longer ones are only reconstructed: sampling them takes too long


def samples(model, real, seed, phase, done):
    """Arrays of samples.npz: what the model makes of a few validation videos, for people's eyes."""
    codes = model.encode(real)
    arrays = {"real": real, "reconstructed": model.decode(codes), "step": torch.tensor(done),
              "classes": np.array(model.classes)}
    frames = model.shape[0]
    if phase.name == "transformer" and frames * model.places <= SAMPLED_PLACES:
        numbers = torch.arange(len(real), device=model.device)
        labels = numbers % len(model.classes)
        given = frames // 2
        arrays |= {"generated": model.generate(labels, seed, numbers, samples=1),
                   "generated_labels": labels, "given": torch.tensor(given),
                   "predicted": model.predict(real, given, seed, numbers), "predicted_truth": real}
    return {k: v if isinstance(v, np.ndarray) else v.cpu().numpy() for k, v in arrays.items()}


def on_host(state):
    """A copy of everything in it; tensors of a GPU by way of pinned memory, without waiting."""
    if isinstance(state, dict):
        return {key: on_host(value) for key, value in state.items()}
    if isinstance(state, list):
        return [on_host(value) for value in state]
    if hasattr(state, "detach"):
        return state.detach().to("cpu", non_blocking=True, copy=True)
    return state


def videos_used_before(out):
    try:
        return int(json.loads((Path(out) / "run.json").read_bytes())["settings"]["videos"])
    except (OSError, ValueError, KeyError, TypeError):
        return None   # no run yet; a damaged run.json is refused by Run


def set_aside(out, started_by=None):
    """--fresh: rename the old directory, unless a process is working in it.

    started_by: the torchrun that started this process; when it does so again, with the same
    --fresh, what is there is its own work and stays."""
    mark = out / ".fresh"
    if started_by and mark.is_file() and mark.read_text() == started_by:
        return
    if out.is_dir() and any(out.iterdir()):
        with checkpointing.DirectoryLock(out):
            number = 1
            while (aside := out.with_name(f"{out.name}.old{number}")).exists():
                number += 1
            out.rename(aside)
        checkpointing.tell(f"the old run is in {aside}")
    if started_by:
        out.mkdir(parents=True, exist_ok=True)
        mark.write_text(started_by)


if __name__ == "__main__":
    main()
