"""Stage 3: train MAGVIT, a tokenizer and a masked transformer, on videos; killed at any moment, it goes on exactly.

    python train_magvit.py                                  # results/dataset.npz, on whatever this machine has
    nohup python train_magvit.py > train.log &              # the same command again goes on where it was
    python train_magvit.py --preset large --data other.npz --out results/large

After MAGVIT (Yu et al., CVPR 2023) and MAGVIT-v2 (ICLR 2024): a causal tokenizer turns a video into a few integers, with
finite scalar quantization (Mentzer et al., ICLR 2024), and one bidirectional transformer learns to fill in masked integers
of the sequence [class | video]. Three tasks are then one: classify (the class is masked), generate (the video is masked),
predict (the later frames are masked). Nothing but the integers passes from the encoder to the decoder.

Two phases, tokenizer then transformer, then one evaluation on videos that nothing was fitted to or chosen by, with a
baseline beside every figure. All randomness is a function of the seed and the step, so a restart needs no skipping and, on
a CPU, ends with the same bits. To run on several processes, give each its part of every batch in `Trainer.batch`, average
the gradients in `Trainer.step`, and let one of them hold the Run.
"""
import hashlib
import io
import json
import math
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import checkpointing
from checkpointing import CheckpointError
from settings import option, parse_settings

CLASSES = ("linear", "circular", "helical", "parabolic")
LEVELS = (64, 64, 64)                       # of each quantized number; their product is the size of the codebook, 2^18
CODES = math.prod(LEVELS)
SMALLEST_CLASS = 10                         # videos; fewer leave a class without a test video


# ---------------------------------------------------------------------------------------------------------------------
# Settings

@dataclass
class Settings:
    data: str = option("results/dataset.npz", "an .npz with videos and labels, or a run directory of generate.py")
    out: str = option("results/magvit_training", "directory for checkpoints, models, history, metrics and PROGRESS.txt")
    preset: str = option("auto", "tiny, small, large; auto is tiny on a CPU and small on a GPU")
    epochs: int = option(0, "epochs of both phases together; 0 lets the preset choose by the number of videos")
    batch_size: int = option(0, "videos a step; 0 lets the preset choose")
    every: int = option(5, "epochs between checkpoints")
    max_minutes: float = option(5.0, "minutes after which a checkpoint is saved in any case")
    seed: int = option(0, "of the first weights, the order of the data, the masks and the samples")
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is")
    heartbeat: float = option(30.0, "seconds between two writes of PROGRESS.txt")
    fresh: bool = option(False, "start over; the old run is set aside by renaming its directory")


@dataclass
class Preset:
    """Sizes and lengths. Strides are pixels and frames a token position; `slots` is the codes each position has."""
    stride_t: int
    stride: int
    slots: int
    width: int              # channels of the tokenizer
    encoder_blocks: int     # residual blocks
    blocks: int             # of the decoder
    dim: int                # of the transformer
    layers: int
    heads: int
    head: int               # channels of the chain that tells the numbers of a place
    batch: int
    tokenizer_videos: int   # training videos shown in phase 1; epochs follow from the size of the set
    transformer_videos: int
    tokenizer_rate: float   # peak learning rates
    transformer_rate: float
    cost: float             # time of a transformer step over that of a tokenizer step, for the first ETA


PRESETS = {
    "tiny": Preset(1, 32, 4, 64, 1, 2, 128, 3, 4, 96, 32, 200_000, 1_500_000, 1e-3, 2e-3, 0.7),
    "small": Preset(1, 32, 4, 128, 2, 3, 256, 6, 8, 192, 256, 1_500_000, 6_000_000, 1e-3, 1e-3, 1.0),
    "large": Preset(1, 32, 4, 192, 3, 4, 512, 12, 8, 256, 256, 3_000_000, 12_000_000, 6e-4, 4e-4, 2.0),
}


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer: video -> integers -> video

class Norm(nn.Module):
    """RMS norm over the channels of each place: a norm over time would leak the future into the past."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), eps=1e-6) * self.scale


class Block(nn.Module):
    """Residual block on (B, T, h, w, width): 3x3 over space, then this frame and the one before."""

    def __init__(self, width):
        super().__init__()
        self.norm = Norm(width)
        self.space = nn.Conv2d(width, width, 3, padding=1)
        self.now, self.before = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        b, t, h, w, c = x.shape
        y = self.norm(x).reshape(b * t, h, w, c).permute(0, 3, 1, 2)   # channels last in memory, as conv2d likes it
        y = F.gelu(self.space(y).permute(0, 2, 3, 1).reshape(b, t, h, w, c))
        earlier = F.pad(y, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        return x + self.out(F.gelu(self.now(y) + self.before(earlier)))


def quantize(z):
    """Finite scalar quantization (Mentzer et al. 2024, section 3.1) of z (..., 4): integers 0 to LEVELS - 1 in each
    number, and the same scaled to [-1, 1] with the gradient passed straight through. Always in float32."""
    z = z.float()
    levels = torch.tensor(LEVELS, device=z.device, dtype=torch.float32)
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    bounded = torch.tanh(z + torch.atanh(offset / half)) * half - offset
    rounded = bounded + (bounded.round() - bounded).detach()
    middle = torch.div(levels, 2, rounding_mode="floor")
    return (rounded + middle).detach().round().long(), rounded / middle


def digits_of(ids):
    """(..., 4) the numbers behind each code."""
    digits = []
    for level in reversed(LEVELS):
        digits.append(ids % level)
        ids = torch.div(ids, level, rounding_mode="floor")
    return torch.stack(digits[::-1], -1)


def ids_of(digits):
    """Codes 0 to 999 from (..., 4) numbers."""
    ids = torch.zeros_like(digits[..., 0])
    for i, level in enumerate(LEVELS):
        ids = ids * level + digits[..., i]
    return ids


def values_of(ids):
    """(..., 3) the numbers behind each code, scaled to [-1, 1] as quantize gives them."""
    middle = torch.tensor([level // 2 for level in LEVELS], device=ids.device)
    return (digits_of(ids) - middle) / middle.float()


class Tokenizer(nn.Module):
    """Causal: the ids of a frame depend on it and the frames before it, never on later ones.

    Video (B, T, C, H, W) in [0, 1]; ids int64 (B, T / stride_t, places, slots), where a place is stride x stride pixels.

    All slots but the last quantize a linear function of the place's lowest spatial frequencies, each relative to its mean
    brightness: where a thing is and how large changes these smoothly, so that what is to come can be computed from them.
    The last slot holds what else there is, seen by causal convolutions.
    """

    PATCH = 8   # pixels; the convolutions work on patches, where they are cheap
    WAVES = 3   # cosines along each axis, of 0, 1 and 2 half periods a place

    def __init__(self, preset, channels):
        super().__init__()
        self.channels, self.t, self.s, self.slots = channels, preset.stride_t, preset.stride // self.PATCH, preset.slots
        pixels, inside = channels * self.PATCH**2, preset.width * self.t * self.s**2
        self.coarse = nn.Linear(self.t * channels * self.WAVES**2, (self.slots - 1) * len(LEVELS))
        self.embed = nn.Linear(pixels, preset.width)
        self.encoder = nn.Sequential(*[Block(preset.width) for _ in range(preset.encoder_blocks)])
        self.to_code = nn.Sequential(Norm(inside), nn.Linear(inside, len(LEVELS)))
        self.from_code = nn.Linear(self.slots * len(LEVELS), inside)
        self.decoder = nn.Sequential(*[Block(preset.width) for _ in range(preset.blocks)])
        self.to_pixels = nn.Sequential(Norm(preset.width), nn.Linear(preset.width, pixels))
        at = (torch.arange(preset.stride) + 0.5) / preset.stride
        self.register_buffer("cosines", torch.cos(math.pi * torch.arange(self.WAVES)[:, None] * at), persistent=False)

    def low(self, video):
        """(B, T', h, w, slots - 1, 3) from the low cosine transform of each place. In float32 also under bf16: it is what
        tells tenths of a pixel."""
        b, t, c, h, w = video.shape
        size = self.s * self.PATCH
        with torch.autocast(video.device.type, enabled=False):
            x = video.float().reshape(b, t // self.t, self.t, c, h // size, size, w // size, size)
            x = torch.einsum("btkchywx,iy,jx->bthwkcij", x, self.cosines, self.cosines).flatten(6) * 2 / size
            x = torch.cat([x[..., :1] - 1, x[..., 1:] / (x[..., :1].mean((4, 5), keepdim=True) + 0.05)], -1)
            return self.coarse(x.flatten(4)).unflatten(-1, (self.slots - 1, len(LEVELS)))

    def features(self, video):
        """(B, T / stride_t, h, w, slots, 3): what is quantized."""
        b, t, c, h, w = video.shape
        p, s = self.PATCH, self.s
        x = video.reshape(b, t, c, h // p, p, w // p, p).permute(0, 1, 3, 5, 2, 4, 6).reshape(b, t, h // p, w // p, -1)
        x = self.encoder(self.embed(x - 0.1))
        x = x.reshape(b, t // self.t, self.t, h // p // s, s, w // p // s, s, -1).permute(0, 1, 3, 5, 2, 4, 6, 7)
        return torch.cat([self.low(video), self.to_code(x.flatten(4)).float()[..., None, :]], -2)

    def encode(self, video):
        digits, _ = quantize(self.features(video))
        return ids_of(digits).flatten(2, 3)

    def decode(self, ids, height, width):
        """ids -> video (B, T, C, height, width), not clamped."""
        h, w = height // self.PATCH // self.s, width // self.PATCH // self.s
        return self.paint(values_of(ids).unflatten(2, (h, w)))

    def paint(self, values):
        b, t, h, w = values.shape[:4]
        p, s = self.PATCH, self.s
        with torch.autocast(values.device.type, enabled=False):   # float32 for the same reason as in `low`
            x = self.from_code(values.flatten(4))
        x = x.reshape(b, t, h, w, self.t, s, s, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
        x = self.to_pixels(self.decoder(x.reshape(b, t * self.t, h * s, w * s, -1)))
        x = x.reshape(b, t * self.t, h * s, w * s, self.channels, p, p).permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(b, t * self.t, self.channels, h * s * p, w * s * p)

    def forward(self, video):
        """The training loss: the share of the video's energy that is lost, and L1 with dot and background weighed equally."""
        _, values = quantize(self.features(video))
        error = self.paint(values).float() - video
        lit = (video > 0.02).float()
        l1 = error.abs()
        fair = (l1 * lit).sum() / lit.sum().clamp(min=1) + (l1 * (1 - lit)).sum() / (1 - lit).sum().clamp(min=1)
        return error.square().mean() / video.square().mean().clamp(min=1e-4) + fair


# ---------------------------------------------------------------------------------------------------------------------
# The transformer: fills in masked integers of [class | video]

class Layer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.mix = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class MaskedTransformer(nn.Module):
    """Fills in hidden places of a video's ids (B, T', n, slots) and its hidden class (B,).

    A place is one element of the sequence, with all its slots, hidden or shown as a whole. A shown place goes in as its
    quantized numbers, scaled up: networks learn fast only what changes slowly over their input (Tancik et al., NeurIPS
    2020). What a hidden place holds is predicted number by number, each given the ones before it: codes factored into
    small alphabets, as in MAGVIT-v2, and in a chain, as Lee et al. (CVPR 2022) do for residual codes, so that the numbers of
    one place always belong together.

    What moves is told most by the last frames before the first hidden one. So places also know how far they are from it,
    and a perceptron reads the last frames side by side, where speed and curvature are plain, and adds to each hidden place
    what it expects there. Without these, and with all hidden frames weighed alike in the loss, a sampled next frame was 5.8 px
    off instead of 2.7 px after 96,000 videos.
    """

    SCALE = 8
    RECENT = 4   # frames side by side

    def __init__(self, preset, frames, places, classes):
        super().__init__()
        d, e, self.slots = preset.dim, preset.head, preset.slots
        numbers = self.slots * len(LEVELS)
        self.look = nn.Sequential(nn.Linear(numbers, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.classes_in = nn.Parameter(torch.randn(classes + 1, d) * 0.02)   # the last: hidden
        self.hidden = nn.Parameter(torch.randn(d) * 0.02)
        self.frame, self.place = nn.Parameter(torch.randn(frames, 1, d) * 0.02), nn.Parameter(torch.randn(places, d) * 0.02)
        self.from_now = nn.Parameter(torch.randn(2 * frames + 1, d) * 0.3)   # frames since the first with a hidden place
        recent = min(frames, self.RECENT) * (numbers + 1)
        self.expect = nn.Sequential(nn.Linear(recent, 4 * d), nn.GELU(), nn.Linear(4 * d, frames * d))
        self.layers = nn.ModuleList([Layer(d, preset.heads) for _ in range(preset.layers)])
        self.norm = nn.LayerNorm(d)
        self.to_class = nn.Linear(d, classes)
        self.to_head = nn.Linear(d, e)
        self.which = nn.Parameter(torch.randn(numbers, e) * 0.5)
        # of neighbouring levels, as smooth functions of the level: what is said and heard of each number
        self.known = nn.Parameter(torch.stack([smooth(level, e) for level in LEVELS * self.slots]))
        self.to_number = nn.Parameter(torch.stack([smooth(level, e).T for level in LEVELS * self.slots]) * 0.02)
        self.head_norm, self.up, self.down = nn.LayerNorm(e), nn.Linear(e, 2 * e), nn.Linear(2 * e, e)
        for layer in self.layers:   # as GPT-2: a residual stream that does not grow with depth
            for linear in (layer.mix, layer.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * preset.layers))
                nn.init.zeros_(linear.bias)

    def forward(self, ids, hidden, label, label_hidden):
        """The state of every element: (B, dim) of the class and (B, T' n, dim) of the places."""
        values, frames = self.SCALE * values_of(ids).flatten(3), torch.arange(ids.shape[1], device=ids.device)
        now = first_hidden_frame(hidden)[:, None]
        x = torch.where(hidden[..., None], self.hidden, self.look(values)) + self.frame + self.place
        x = x + F.embedding(frames - now + len(frames), self.from_now)[:, :, None]
        last = now - 1 - frames[:self.RECENT]   # counted back from the last frame that is shown whole
        there = (last >= 0)[:, :, None, None]
        pick = lambda tensor, at: tensor.gather(1, at.clamp(min=0)[..., None, None].expand(-1, -1, *tensor.shape[2:]))  # noqa: E731
        recent = torch.cat([pick(values, last) * there, there.expand(*last.shape, values.shape[2], 1)], -1)
        expected = self.expect(recent.transpose(1, 2).flatten(2)).unflatten(2, (len(frames), -1)).transpose(1, 2)
        x = x + pick(expected, frames - now) * hidden[..., None]
        first = F.embedding(torch.where(label_hidden, self.classes_in.shape[0] - 1, label), self.classes_in)
        x = torch.cat([first[:, None], x.flatten(1, 2)], 1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1:]

    def head(self, x):
        return x + self.down(F.gelu(self.up(self.head_norm(x))))

    def logits(self, states, digits):
        """(N, numbers, levels) for states (N, dim) of places that hold digits (N, numbers): each is told the ones before it."""
        known = self.known[torch.arange(digits.shape[1], device=digits.device), digits]
        x = self.to_head(states)[:, None] + self.which + F.pad(known.cumsum(1), (0, 0, 1, 0))[:, :-1]
        x = self.head(x)
        return torch.einsum("nke,kec->nkc", x, self.to_number.to(x.dtype)).float()

    def draw(self, states, temperature, generator):
        """ids (N, slots): sampled number by number."""
        told, digits = self.to_head(states), []
        for k in range(len(self.which)):
            x = self.head(told + self.which[k])
            chance = ((x @ self.to_number[k].to(x.dtype)).float() / temperature).softmax(-1)
            digits.append(torch.multinomial(chance, 1, generator=generator)[:, 0])
            told = told + self.known[k, digits[-1]]
        return ids_of(torch.stack(digits, 1).unflatten(1, (self.slots, len(LEVELS))))


def first_hidden_frame(hidden):
    """(B,) of hidden (B, T', n): the first frame that is not shown whole, or T'."""
    frames = torch.arange(hidden.shape[1], device=hidden.device)
    return torch.where(hidden.any(2), frames, len(frames)).amin(1)


def smooth(levels, width):
    """(levels, width): random, but alike for levels that are near each other; cosines of the level of up to eight periods."""
    at = (torch.arange(levels) + 0.5) / levels
    wave = torch.cos(math.pi * torch.arange(16)[:, None] * at)
    return (torch.randn(width, 16) @ wave).T / math.sqrt(8)


def draw_masks(batch, frames, places, generator, device):
    """What to hide and to learn: ids_hidden (B, T', n) and label_hidden (B,), bool.

    A third each of: classify (class hidden; the whole video or its first frames shown), generate (class shown, now and
    then hidden), predict (class hidden half the time, at least one frame shown). In generate and predict the frames before
    a random one are shown, it is hidden in part and the later ones wholly: what sampling frame by frame asks.
    """
    random = lambda *shape: torch.rand(shape, generator=generator, device=device)   # noqa: E731
    task = torch.arange(batch, device=device) % 3
    frame = torch.arange(frames, device=device)[None, :, None]
    at = (random(batch) * frames).long()
    at = torch.where(task == 2, 1 + (random(batch) * (frames - 1)).long(), at)
    at = torch.where(task == 0, torch.where(random(batch) < 0.5, frames, (frames + 1) // 2 + at // 2), at)[:, None, None]
    order, part = random(batch, frames, places), random(batch)[:, None, None]
    current = (frame == at) & ((order < part) | (order == order.amin(2, keepdim=True)))
    hidden = current | (frame > at)
    chance = torch.tensor([1.0, 0.1, 0.5], device=device)[task]
    return hidden, random(batch) < chance


# ---------------------------------------------------------------------------------------------------------------------
# A trained model: what best_model.pt holds and what apply_magvit.py uses

class Model:
    """Tokenizer and transformer for videos of one shape. Videos in and out: uint8 tensors (N, T, C, H, W) on any device."""

    def __init__(self, preset, shape, classes, device):
        self.preset, self.shape, self.classes, self.device = preset, tuple(shape), list(classes), device
        t, channels, height, width = self.shape
        self.frames, self.places = t // preset.stride_t, (height // preset.stride) * (width // preset.stride)
        self.tokenizer = Tokenizer(preset, channels).to(device)
        self.transformer = MaskedTransformer(preset, self.frames, self.places, len(self.classes)).to(device)

    def state(self):
        return {"format": "trajectory-magvit 1", "preset": asdict(self.preset), "shape": list(self.shape),
                "classes": self.classes, "tokenizer": self.tokenizer.state_dict(),
                "transformer": self.transformer.state_dict()}

    @staticmethod
    def load(path, device):
        """The model in a best_model.pt or final_model.pt. Raises CheckpointError if it is none; runs no code of the file."""
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such model; train one with train_magvit.py or name another with --model",
                                  checkpointing.WRONG_SETTINGS)
        problem = checkpointing.problem_with(path)
        if problem:
            raise CheckpointError(f"{path}: {problem}; this is not a whole model. Train again or bring back a good copy")
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            if state["format"] != "trajectory-magvit 1":
                raise ValueError("another format")
            model = Model(Preset(**state["preset"]), state["shape"], state["classes"], device)
            model.tokenizer.load_state_dict(state["tokenizer"])
            model.transformer.load_state_dict(state["transformer"])
        except Exception as error:   # whatever a foreign file makes torch raise
            raise CheckpointError(f"{path}: not a model of train_magvit.py ({short(error)}). Nothing in it was run") from None
        model.tokenizer.eval()
        model.transformer.eval()
        return model

    def encode(self, videos):
        """ids (B, T', n, slots) of a batch."""
        with precision(self.device):
            return self.tokenizer.encode(floats(videos, self.device))

    def decode(self, ids):
        """uint8 videos of a batch of ids; the integers are all that the decoder sees."""
        with precision(self.device):
            video = self.tokenizer.decode(ids, *self.shape[2:]).float()
        return (video.clamp(0, 1) * 255).round().to(torch.uint8)

    def class_probabilities(self, ids, given=None):
        """(B, classes): from whole videos, or from their first `given` frames."""
        hidden = torch.zeros(ids.shape[:3], dtype=torch.bool, device=self.device)
        if given is not None:
            hidden[:, given // self.preset.stride_t:] = True
        label = torch.zeros(len(ids), dtype=torch.long, device=self.device)
        with precision(self.device):
            state, _ = self.transformer(ids, hidden, label, torch.ones_like(label, dtype=torch.bool))
            return self.transformer.to_class(state).float().softmax(-1)

    def fill(self, ids, given, labels, generator, temperature, draws=1):
        """Sample all frames from `given` on: frame by frame, place by place, number by number. labels None: class hidden.

        Of several `draws` for a place the one nearest to their mean is kept: the noise of one draw would not only be an error
        itself, it would also lead all later frames astray.
        """
        ids, start = ids.clone(), given // self.preset.stride_t
        hidden = torch.zeros(ids.shape[:3], dtype=torch.bool, device=self.device)
        hidden[:, start:] = True
        unknown = torch.full((len(ids),), labels is None, device=self.device)
        labels = torch.zeros_like(unknown, dtype=torch.long) if labels is None else labels
        for frame in range(start, self.frames):
            for place in range(self.places):
                with precision(self.device):
                    states = self.transformer(ids, hidden, labels, unknown)[1][:, frame * self.places + place]
                    drawn = self.transformer.draw(states.repeat_interleave(draws, 0), temperature, generator)
                drawn = drawn.view(len(ids), draws, -1)
                values = values_of(drawn).flatten(2)
                nearest_to_mean = (values - values.mean(1, keepdim=True)).square().sum(2).argmin(1)
                ids[:, frame, place] = drawn[torch.arange(len(ids), device=self.device), nearest_to_mean]
                hidden[:, frame, place] = False
        return ids

    def generate(self, labels, generator, samples=8):
        """Videos of the given classes, labels int64 (B,): of several samples, the one that the model itself classifies as the
        class asked for with the least doubt (rejection sampling, as Razavi et al. 2019, section 3.4)."""
        blank = torch.zeros(len(labels), self.frames, self.places, self.preset.slots, dtype=torch.long, device=self.device)
        made = torch.stack([self.fill(blank, 0, labels, generator, GENERATE_TEMPERATURE) for _ in range(samples)])
        doubt = torch.stack([1 - self.class_probabilities(ids).gather(1, labels[:, None])[:, 0] for ids in made])
        return self.decode(made[doubt.argmin(0), torch.arange(len(labels), device=self.device)])

    def predict(self, videos, given, generator):
        """The videos with the frames from `given` on predicted, each near the middle of what it could be."""
        made = self.decode(self.fill(self.encode(videos), given, None, generator, PREDICT_TEMPERATURE, DRAWS))
        return torch.cat([videos[:, :given].to(self.device), made[:, given:]], 1)


GENERATE_TEMPERATURE = 0.9
PREDICT_TEMPERATURE = 0.5
DRAWS = 16                 # for each place of a predicted video


def precision(device):
    """bf16 on CUDA, where it is twice as fast; float32 elsewhere. The quantizer computes in float32 in any case."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


def floats(videos, device):
    return videos.to(device).float() / 255


def short(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def seeded(device, *what):
    """A generator that depends on `what` alone: the same mask and the same order after any number of restarts."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# Data: read, checked, split

@dataclass
class Data:
    videos: np.ndarray   # uint8 (N, T, C, H, W)
    labels: np.ndarray   # int64 (N,)
    classes: list        # names

    def first(self, n):
        return Data(self.videos[:n], self.labels[:n], self.classes)


def load_data(path):
    """Videos and labels of an .npz or of run directories of generate.py; raises CheckpointError in words if they will not do."""
    path = Path(path)
    if path.is_dir():
        videos, labels, known = read_run_directory(path)
    elif path.is_file():
        videos, labels, known = read_npz(path)
    else:
        raise CheckpointError(f"{path}: no such data; run generate.py and merge.py first, or name other data with --data",
                              checkpointing.WRONG_SETTINGS)
    videos = checked_videos(videos, path)
    if labels.shape != (len(videos),) or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise CheckpointError(f"{path}: labels must be integers from 0 on, one a video; they are {labels.dtype} {labels.shape}")
    count = len(CLASSES) if known else max(2, int(labels.max(initial=0)) + 1)
    if count > 1000:
        raise CheckpointError(f"{path}: labels go up to {count - 1}; at most 1,000 classes")
    names = list(CLASSES) if count == len(CLASSES) else [f"class {k}" for k in range(count)]
    sizes = np.bincount(labels, minlength=count)
    if sizes.min() < SMALLEST_CLASS:
        few = int(sizes.argmin())
        raise CheckpointError(f"{path}: {names[few]} has {sizes[few]} videos of {len(videos)}; every class needs at least "
                              f"{SMALLEST_CLASS}, to have some to learn from and some to test on")
    return Data(videos, labels.astype(np.int64), names)


def checked_videos(videos, path):
    """uint8 (N, T, C, H, W), or a CheckpointError that says what is wrong."""
    if videos.ndim != 5 or 0 in videos.shape:
        raise CheckpointError(f"{path}: videos must be (N, T, C, H, W); they are {videos.shape}")
    if videos.dtype.kind == "f":
        if not np.isfinite(videos).all():
            raise CheckpointError(f"{path}: videos have NaN or Inf")
        if videos.min() < 0 or videos.max() > 1:
            raise CheckpointError(f"{path}: float videos must lie in [0, 1]; these go from {videos.min():g} to "
                                  f"{videos.max():g}. Divide by 255, or store them as uint8")
        videos = (videos * 255).round().astype(np.uint8)
    elif videos.dtype != np.uint8:
        raise CheckpointError(f"{path}: videos must be uint8, or float in [0, 1]; they are {videos.dtype}")
    return videos


def read_npz(path):
    """videos, labels, and whether they are our trajectories."""
    arrays = read_arrays(path)
    missing = {"videos", "labels"} - arrays.keys()
    if missing:
        raise CheckpointError(f"{path}: has no {' and no '.join(sorted(missing))}; it has {', '.join(arrays)}")
    return arrays["videos"], arrays["labels"], "trajectory_2d" in arrays


def read_arrays(path):
    """{name: array} of an .npz that is whole and hides no code."""
    problem = checkpointing.problem_with(path)
    if problem:
        raise CheckpointError(f"{path}: not a whole .npz ({problem}); make it again with merge.py")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot be read ({short(error)})") from None


def read_run_directory(path):
    """What is complete of a run, also of one that is still working, from its first sample up to the first gap."""
    found = []
    for directory in [path, *sorted(path.glob("shard_*_of_*"))]:
        records = checkpointing.read_records(directory)
        found += [(start, file, records.get(file.name)) for start, file in checkpointing.find_checkpoints(directory)
                  if file.suffix == ".npz"]
    videos, labels, at = [], [], 0
    for start, file, record in sorted(found, key=lambda item: item[0]):
        if start != at or checkpointing.problem_with(file, record):
            break
        part = read_npz(file)
        videos.append(part[0])
        labels.append(part[1])
        at += len(part[1])
    if not videos:
        raise CheckpointError(f"{path}: no good checkpoint_*.npz that begins at sample 0; is it the --out of generate.py?")
    print(f"{path}: {at} videos, of {checkpointing.read_progress(path / 'PROGRESS.txt').get('Progress', 'a run')}", flush=True)
    return np.concatenate(videos), np.concatenate(labels), True


def split(labels):
    """0 train, 1 validation, 2 test for each video: of ten of a class, in their order, the first eight, the ninth, the tenth.

    Stratified, and stable: a video stays in its part when more are added behind it.
    """
    part = np.zeros(len(labels), np.int64)
    for k in np.unique(labels):
        rank = np.arange((labels == k).sum()) % 10
        part[labels == k] = np.where(rank < 8, 0, rank - 7)
    return part


def check_split(videos, labels, part):
    """Refuse a split that flatters: a class missing in a part, or the same video in two parts."""
    for k in np.unique(labels):
        if set(part[labels == k]) != {0, 1, 2}:
            raise CheckpointError(f"class {k} is missing in one of train, validation and test")
    where = {}
    for i, video in enumerate(videos):
        first = where.setdefault(hashlib.blake2b(video.tobytes(), digest_size=16).digest(), i)
        if part[first] != part[i]:
            names = ("training", "validation", "test")
            raise CheckpointError(f"the parts overlap: video {i} ({names[part[i]]}) is the same as video {first} "
                                  f"({names[part[first]]}). Remove the duplicates; otherwise the figures would flatter")


# ---------------------------------------------------------------------------------------------------------------------
# Training

class Trainer:
    """The whole state of a training run and the one loop that moves it: `step` counts tokenizer steps, then transformer
    steps, then parts of the evaluation."""

    def __init__(self, settings, preset, data, device):
        self.settings, self.preset, self.device = settings, preset, device
        part = split(data.labels)
        check_split(data.videos, data.labels, part)
        self.videos, self.labels = torch.from_numpy(data.videos).to(device), torch.from_numpy(data.labels).to(device)
        self.parts = [torch.from_numpy(np.flatnonzero(part == k)).to(device) for k in range(3)]
        self.batch_size = min(preset.batch, len(self.parts[0]))
        self.epoch_steps = len(self.parts[0]) // self.batch_size
        shown = self.epoch_steps * self.batch_size
        epochs = [max(1, round(videos / shown)) for videos in (preset.tokenizer_videos, preset.transformer_videos)]
        if settings.epochs:
            first = round(settings.epochs * epochs[0] / sum(epochs))
            first = min(max(1, first), max(1, settings.epochs - 1))
            epochs = [first, max(1, settings.epochs - first)]
        self.phases = [Phase("tokenizer", 0, epochs[0], epochs[0] * self.epoch_steps, preset.tokenizer_rate, (0.9, 0.99), 0.01),
                       Phase("transformer", epochs[0] * self.epoch_steps, epochs[1], epochs[1] * self.epoch_steps,
                             preset.transformer_rate, (0.9, 0.99), 0.045)]
        self.steps = sum(phase.steps for phase in self.phases)
        self.evaluations = list(EVALUATIONS)
        torch.manual_seed(settings.seed)
        self.model = Model(preset, data.videos.shape[1:], data.classes, device)
        self.average = Model(preset, data.videos.shape[1:], data.classes, device)
        self.average.tokenizer.load_state_dict(self.model.tokenizer.state_dict())
        self.average.transformer.load_state_dict(self.model.transformer.state_dict())
        for module in (self.average.tokenizer, self.average.transformer):
            module.requires_grad_(False).eval()
        self.done, self.history, self.best, self.metrics, self.judge = 0, [], None, {}, None
        self.published = None   # the epoch that best_model.pt is known to hold
        exact = torch.float32 if device.type == "mps" else torch.float64   # which mps does not have
        self.loss_sum = torch.zeros((), dtype=exact, device=device)
        self.begin_phase()

    @property
    def total(self):
        return self.steps + len(self.evaluations)

    # -- state

    def phase_at(self, step):
        return self.phases[0] if step < self.phases[1].start else self.phases[1]

    def begin_phase(self):
        """What belongs to the phase that `done` is in: the network that learns, its average and its optimiser."""
        self.phase = self.phase_at(self.done)
        self.learning = getattr(self.model, self.phase.name)
        self.averaged = getattr(self.average, self.phase.name)
        self.optimizer = torch.optim.AdamW(self.learning.parameters(), lr=self.phase.rate, betas=self.phase.betas,
                                           weight_decay=self.phase.decay, fused=self.device.type == "cuda")
        loss = self.tokenizer_loss if self.phase.name == "tokenizer" else self.transformer_loss
        self.loss = torch.compile(loss) if self.device.type == "cuda" else loss
        self.order_epoch = None

    def state(self):
        """All of it, for torch.save: what a restart needs to end with the same bits."""
        between = self.phase is not self.phase_at(self.done)   # the next phase begins with an optimiser of its own
        return {"done": self.done, "model": self.model.state(), "average": self.average.state(),
                "optimizer": None if between else self.optimizer.state_dict(), "loss_sum": self.loss_sum, "history": self.history,
                "best": self.best, "metrics": self.metrics, "judge": self.judge}

    def restore(self, state):
        self.done = state["done"]
        self.begin_phase()
        for model, kept in ((self.model, state["model"]), (self.average, state["average"])):
            model.tokenizer.load_state_dict(kept["tokenizer"])
            model.transformer.load_state_dict(kept["transformer"])
        if state["optimizer"]:
            self.optimizer.load_state_dict(state["optimizer"])
        self.loss_sum = state["loss_sum"].to(self.device)
        self.history, self.best, self.metrics, self.judge = (state[k] for k in ("history", "best", "metrics", "judge"))

    # -- one step

    def batch(self, step):
        """Videos (B, T, C, H, W) uint8 and labels of one step, a function of the seed and the step alone.

        An eighth of the batch in each of the mirrored and turned versions, which keep their class.
        """
        epoch, place = divmod(step - self.phase.start, self.epoch_steps)
        if self.order_epoch != (self.phase.name, epoch):
            order = torch.randperm(len(self.parts[0]), generator=seeded("cpu", self.settings.seed, "order", self.phase.name, epoch))
            self.order, self.order_epoch = self.parts[0][order.to(self.device)], (self.phase.name, epoch)
        index = self.order[place * self.batch_size:(place + 1) * self.batch_size]
        square = self.videos.shape[-1] == self.videos.shape[-2]
        videos, labels = [], []
        for k in range(8):
            chosen = self.videos[index[k::8]]
            chosen = chosen.flip(-1) if k & 1 else chosen
            chosen = chosen.flip(-2) if k & 2 else chosen
            videos.append(chosen.transpose(-1, -2) if k & 4 and square else chosen)
            labels.append(self.labels[index[k::8]])
        return torch.cat(videos), torch.cat(labels)

    def step(self, step):
        """One optimiser step; returns the loss, on the device. Never waits for the device."""
        phase, at = self.phase, step - self.phase.start
        rate = phase.rate * min(1, (at + 1) / (0.03 * phase.steps + 1)) * (0.505 + 0.495 * math.cos(math.pi * at / phase.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        videos, labels = self.batch(step)
        loss = self.loss(*self.prepared(videos, labels, seeded(self.device, self.settings.seed, "masks", step)))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.learning.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.learning.parameters()),
                                 1 - min(0.999, (at + 1) / (at + 10)))
        loss = loss.detach() + 0 * norm   # not finite if the gradient is not: either way the weights are lost
        self.loss_sum += loss
        return loss

    def prepared(self, videos, labels, generator):
        """The arguments of the loss of this phase."""
        if self.phase.name == "tokenizer":
            return self.learning, floats(videos, self.device)
        with torch.no_grad(), precision(self.device):
            ids = self.average.encode(videos)
            hidden, label_hidden = draw_masks(len(ids), *ids.shape[1:3], generator, self.device)
        return self.learning, ids, labels, hidden, label_hidden

    def tokenizer_loss(self, tokenizer, videos):
        with precision(self.device):
            return tokenizer(videos)

    def transformer_loss(self, transformer, ids, labels, hidden, label_hidden):
        with precision(self.device):
            state, states = transformer(ids, hidden, labels, label_hidden)
            # sampling goes frame by frame, so the frame that is next matters most; the later ones teach where it leads
            ahead = torch.arange(hidden.shape[1], device=hidden.device) - first_hidden_frame(hidden)[:, None]
            weight = (hidden / (1 + ahead.clamp(min=0)[:, :, None]).square()).flatten()
            chosen, answers = states.flatten(0, 1), digits_of(ids).flatten(3).flatten(0, 2)
            if self.device.type == "cpu":   # logits only where they count; on a GPU changing shapes cost more than they save
                where = weight.nonzero()[:, 0]
                chosen, answers, weight = chosen[where], answers[where], weight[where]
            logits = transformer.logits(chosen, answers)
            guess = transformer.to_class(state).float()
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none")
        fill = (loss.view_as(answers).sum(1) * weight).sum() / weight.sum()
        name = (F.cross_entropy(guess, labels, reduction="none") * label_hidden).sum() / label_hidden.sum().clamp(min=1)
        return 0.25 * fill + name

    # -- the loop

    def work(self, run):
        """From wherever `done` is to the end. Every place where it may be long calls `breathe`."""
        run.update(self.done, Phase=self.phase.name if self.done < self.steps else "evaluation")
        self.run, self.saved, self.spoke = run, time.monotonic(), time.monotonic()
        self.recent, self.recent_start, self.counted, self.step_seconds = [], self.done, self.done, None
        self.publish()
        while self.done < self.steps:
            if self.phase is not self.phase_at(self.done):
                self.begin_phase()
            loss = self.step(self.done)
            self.recent.append(loss)
            self.done += 1
            self.report()
            if (self.done - self.phase.start) % self.epoch_steps == 0:
                began = time.monotonic()
                self.end_epoch()
                self.spoke += time.monotonic() - began   # the speed that lines give is that of training alone
            self.breathe()
        self.evaluate()

    def breathe(self):
        """Save if it is time, and leave if a signal asks for it."""
        if self.run.due():
            self.save()
        self.run.leave_if_asked()
        self.run.update(self.done)

    def save(self):
        self.check_finite()
        self.saved = time.monotonic()
        if self.run.durable != self.done:
            self.run.update(self.done)
            self.run.save(self.done, lambda file: torch.save(self.state(), file))
            self.publish()

    def publish(self):
        """The files that follow from the newest checkpoint: they never show what a crash could take back."""
        out = Path(self.settings.out)
        if self.best and self.best["epoch"] != self.published:
            write_if_new(out / "best_model.pt", saved_bytes({**self.average.state(), **self.best}))
            self.published = self.best["epoch"]
        if self.done >= self.steps:
            write_if_new(out / "final_model.pt", saved_bytes({**self.average.state(), "epoch": self.phases[1].epochs}))

    def check_finite(self):
        """Losses are looked at now and then, so that no step waits for the device; this one looks."""
        if not self.recent:
            return
        values = torch.stack(self.recent).tolist()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                step = self.recent_start + i
                epoch = (step - self.phase.start) // self.epoch_steps + 1
                raise CheckpointError(f"the loss is not finite in phase {self.phase.name}, epoch {epoch}, step {step}, "
                                      f"learning rate {self.optimizer.param_groups[0]['lr']:.2g}; nothing of it was saved. The "
                                      "same command goes on from the last good checkpoint")
        self.train_loss = sum(values) / len(values)
        self.recent, self.recent_start = [], self.done

    def report(self):
        """A line every few seconds."""
        now = time.monotonic()
        if now - self.spoke > 5 or len(self.recent) >= 500:
            steps, seconds = self.done - self.counted, now - self.spoke
            self.check_finite()
            self.step_seconds, self.spoke, self.counted = seconds / steps, now, self.done
            epoch = (self.done - 1 - self.phase.start) // self.epoch_steps + 1
            seconds_left = self.seconds_left()
            self.run.expect(seconds_left)
            self.run.update(self.done, Phase=self.phase.name, Epoch=f"{epoch}/{self.phase.epochs}",
                            **{"Train loss": f"{self.train_loss:.4f}"})
            self.run.log(f"{self.phase.name} epoch {epoch}/{self.phase.epochs}  step {self.done}/{self.steps}  loss "
                         f"{self.train_loss:.4f}  {self.batch_size * steps / seconds:.0f} videos/s  "
                         f"{checkpointing.duration(seconds_left)} left")
        elif self.device.type == "cpu" and not math.isfinite(self.recent[-1].item()):   # costs nothing there
            self.check_finite()

    def seconds_left(self):
        left = self.steps - self.done
        if self.phase is self.phases[0]:
            left += (self.preset.cost - 1) * self.phases[1].steps
        return max(0, left) * (self.step_seconds or 0) + 60

    def end_epoch(self):
        """Validation, a row of history.json, the best so far, and every few epochs a checkpoint."""
        self.check_finite()
        epoch = (self.done - self.phase.start) // self.epoch_steps
        validation = self.validation_loss()
        row = {"phase": self.phase.name, "epoch": epoch, "step": self.done, "train_loss": self.loss_sum.item() / self.epoch_steps,
               "validation_loss": validation, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        self.history.append(row)
        self.loss_sum.zero_()
        last = self.done == self.phase.start + self.phase.steps
        note = ""
        if self.phase.name == "transformer" and (self.best is None or validation <= self.best["validation_loss"]):
            self.best = {"epoch": epoch, "validation_loss": validation,
                         "transformer": {k: v.clone() for k, v in self.averaged.state_dict().items()}}
            note = "  best so far"
        checkpointing.write_atomic(Path(self.settings.out) / "history.json", json.dumps(self.history, indent=1) + "\n")
        best = {"Best": f"{self.best['validation_loss']:.4f} (epoch {self.best['epoch']})"} if self.best else {}
        self.run.update(self.done, Phase=self.phase.name, Epoch=f"{epoch}/{self.phase.epochs}", **{
            "Train loss": f"{row['train_loss']:.4f}", "Val loss": f"{validation:.4f}"}, **best)
        self.run.log(f"{self.phase.name} epoch {epoch}/{self.phase.epochs} done: train {row['train_loss']:.4f}, validation "
                     f"{validation:.4f}{note}, {checkpointing.duration(self.seconds_left())} left")
        if last or epoch % self.settings.every == 0:
            self.save()

    @torch.no_grad()
    def validation_loss(self):
        """Of the averaged weights, on at most 1,000 validation videos with the same masks every time."""
        total, index = 0.0, self.parts[1][:1000]
        chunks = index.split(self.batch_size)
        for i, chunk in enumerate(chunks):
            generator = seeded(self.device, self.settings.seed, "validation", i)
            arguments = self.prepared(self.videos[chunk], self.labels[chunk], generator)[1:]
            loss = self.tokenizer_loss if self.phase.name == "tokenizer" else self.transformer_loss
            total += loss(self.averaged, *arguments).item() * len(chunk)
            self.run.update(self.done)
        return total / len(index)

    def evaluate(self):
        """The last steps: parts of the evaluation, each a function below, each saved when it is done."""
        model = Model(self.preset, self.average.shape, self.average.classes, self.device)
        model.tokenizer.load_state_dict(self.average.tokenizer.state_dict())
        model.transformer.load_state_dict(self.best["transformer"])
        while self.done < self.total:
            name = self.evaluations[self.done - self.steps]
            self.run.update(self.done, Phase=f"evaluation: {name}")
            self.run.log(f"evaluation: {name}")
            with torch.no_grad():
                self.metrics[name] = EVALUATIONS[name](self, model)
            self.done += 1
            if self.done == self.total:
                self.finish()
            self.save()
        self.run.log(table(self.metrics))

    def finish(self):
        warnings = warnings_of(self.metrics, len(self.average.classes))
        self.metrics["warnings"] = warnings
        checkpointing.write_atomic(Path(self.settings.out) / "metrics.json", json.dumps(self.metrics, indent=1) + "\n")
        if warnings:
            self.run.update(self.done, Warning="; ".join(warnings))
        for warning in warnings:
            self.run.log(f"WARNING: {warning}")


@dataclass
class Phase:
    name: str
    start: int        # global number of its first step
    epochs: int
    steps: int
    rate: float       # peak learning rate
    betas: tuple
    decay: float      # weight decay


def saved_bytes(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def write_if_new(path, content):
    if not path.exists() or path.read_bytes() != content:
        checkpointing.write_atomic(path, content)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation on the test part, which nothing was fitted to or chosen by. Beside every figure stands what a method without
# any learning, or the real videos themselves, would get.

DOT_LEVEL = 0.3 * 255   # a pixel brighter than this belongs to a dot
DOT_PIXELS = 3          # and at least so many that touch make one


def centroids(videos):
    """(B, T, 2): the bright mass's centre (x, y) in pixels; the middle of a frame that has none."""
    mass = videos.float().mean(2)
    mass = torch.where(mass > 0.1 * 255, mass, 0.0)
    height, width = mass.shape[-2:]
    x, y = torch.arange(width, device=mass.device).float(), torch.arange(height, device=mass.device).float()
    total = mass.sum((2, 3))
    place = torch.stack([(mass.sum(2) * x).sum(2), (mass.sum(3) * y).sum(2)], -1) / total.clamp(min=1e-6)[..., None]
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=mass.device)
    return torch.where(total[..., None] > 0, place, middle)


def count_dots(videos):
    """(B, T) number of connected bright spots in each frame, by flooding the largest label over each."""
    bright = (videos.float().mean(2) > DOT_LEVEL).flatten(0, 1)
    n, height, width = bright.shape
    own = torch.arange(1, height * width + 1, device=bright.device, dtype=torch.float32).view(1, height, width)
    label = torch.where(bright, own, 0.0)
    for _ in range(height + width):
        spread = torch.where(bright, F.max_pool2d(label[:, None], 3, 1, 1)[:, 0], 0.0)
        if torch.equal(spread, label):
            break
        label = spread
    sizes = torch.zeros(n, height * width + 1, device=bright.device).scatter_add_(
        1, label.long().flatten(1), torch.ones_like(label).flatten(1))
    return (sizes[:, 1:] >= DOT_PIXELS).sum(1).view(videos.shape[:2])


def one_dot_share(videos):
    return (count_dots(videos) == 1).float().mean().item()


def in_batches(trainer, function, *tensors, size=200):
    """torch.cat of function(*slices); a signal or the clock is answered between the slices."""
    done = []
    for slices in zip(*[tensor.split(size) for tensor in tensors]):
        done.append(function(*slices))
        trainer.breathe()
    return torch.cat(done)


def test_part(trainer, most=1000):
    """Videos and labels of at most `most` test videos, the same number of each class as far as there are."""
    index = trainer.parts[2]
    labels = trainer.labels[index]
    each = most // len(trainer.average.classes)
    index = torch.cat([index[labels == k][:each] for k in range(len(trainer.average.classes))])
    return trainer.videos[index], trainer.labels[index]


def evaluate_tokenizer(trainer, model):
    videos, _ = test_part(trainer, 4000)
    ids = in_batches(trainer, model.encode, videos)
    painted = in_batches(trainer, model.decode, ids)
    real, error = videos.float() / 255, (painted.float() - videos.float()) / 255
    mse, blank = error.square().mean().item(), real.square().mean().item()
    lit = real > 0.02
    dots = count_dots(painted)
    slots = ids.flatten(0, 2)
    counts = torch.stack([torch.bincount(slots[:, k], minlength=CODES) for k in range(slots.shape[1])]).cpu()
    # of the places where something is to be seen, since the background's code says nothing of collapse
    s, t = model.preset.stride, model.preset.stride_t
    n, frames, channels, height, width = videos.shape
    seen = lit.view(n, frames // t, t, channels, height // s, s, width // s, s).any(7).any(5).any(3).any(2).flatten()
    shares = torch.stack([torch.bincount(slots[seen, k], minlength=CODES) for k in range(slots.shape[1])]).cpu().double()
    shares = shares / shares.sum(1, keepdim=True).clamp(min=1)
    perplexity = torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum(1)).mean().item()
    return {"videos": n, "bits_per_video": ids[0].numel() * math.log2(CODES), "raw_bits": videos[0].numel() * 8,
            "psnr_db": decibels(mse), "blank_psnr_db": decibels(blank), "skill": 1 - mse / max(blank, 1e-12),
            "foreground_error": error.abs()[lit].mean().item() if lit.any() else 0.0,
            "blank_foreground_error": real[lit].mean().item() if lit.any() else 0.0,
            "centroid_error_px": (centroids(painted) - centroids(videos)).norm(dim=-1).mean().item(),
            "middle_centroid_error_px": (centroids(torch.zeros_like(videos)) - centroids(videos)).norm(dim=-1).mean().item(),
            "frames_without_dot": (dots == 0).float().mean().item(), "frames_with_two_dots": (dots > 1).float().mean().item(),
            "active_codes": int((counts > 0).sum(1).min()), "codes": CODES, "foreground_perplexity": perplexity}


def decibels(mse):
    return -10 * math.log10(max(mse, 1e-12))


def evaluate_classification(trainer, model):
    videos, labels = test_part(trainer, 4000)
    ids = in_batches(trainer, model.encode, videos)
    half = model.shape[0] // 2 // model.preset.stride_t * model.preset.stride_t
    guess = in_batches(trainer, lambda part: model.class_probabilities(part).argmax(1), ids)
    early = in_batches(trainer, lambda part: model.class_probabilities(part, half).argmax(1), ids)
    count = len(model.classes)
    confusion = torch.bincount(labels * count + guess, minlength=count**2).view(count, count)
    return {"videos": len(labels), "accuracy": (guess == labels).float().mean().item(), "classes": model.classes,
            "accuracy_first_half": (early == labels).float().mean().item(), "frames_first_half": half,
            "chance": torch.bincount(labels).max().item() / len(labels), "confusion_true_by_guessed": confusion.tolist()}


class Judge(nn.Module):
    """An independent network on pixels: a few keypoints a frame (the centre of mass of a learned map, after Finn et al. 2016),
    then a perceptron over all frames. It shares nothing with the model that it judges."""

    def __init__(self, shape, classes):
        super().__init__()
        frames, channels = shape[:2]
        self.maps = nn.Sequential(nn.Conv2d(channels, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(),
                                  nn.Conv2d(16, 8, 1))
        # Standardised, since the places differ by small amounts: without it the training stays at chance.
        self.answer = nn.Sequential(nn.BatchNorm1d(frames * 24), nn.Linear(frames * 24, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(),
                                    nn.Linear(256, classes))

    def forward(self, videos):
        n, frames = videos.shape[:2]
        heat = self.maps(videos.flatten(0, 1))
        y = torch.linspace(-1, 1, heat.shape[2], device=heat.device)
        x = torch.linspace(-1, 1, heat.shape[3], device=heat.device)
        # The centre of mass of what is positive moves with a dot from the first step on; a softmax begins flat and some
        # seeds never leave that.
        mass = F.softplus(heat - 3)
        total = mass.sum((2, 3))
        features = torch.cat([(mass.sum(2) * x).sum(2) / total, (mass.sum(3) * y).sum(2) / total, total / mass[0, 0].numel()], 1)
        return self.answer(features.view(n, -1))


def evaluate_judge(trainer, model):
    """Train the judge on the real training videos, and see how good it is on real test videos."""
    torch.manual_seed(trainer.settings.seed + 1)
    judge = Judge(model.shape, len(model.classes)).to(trainer.device)
    size = min(128, len(trainer.parts[0]))
    steps = min(1500, 100 + 20 * len(trainer.parts[0]) // size)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-3)
    with torch.enable_grad():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 - step / steps)
            generator = seeded(trainer.device, trainer.settings.seed, "judge", step)
            index = torch.randint(len(trainer.parts[0]), (size,), generator=generator, device=trainer.device)
            index = trainer.parts[0][index]
            videos = trainer.videos[index]
            videos = videos.flip(-1) if step & 1 else videos
            videos = videos.flip(-2) if step & 2 else videos
            F.cross_entropy(judge(floats(videos, trainer.device)), trainer.labels[index]).backward()
            nn.utils.clip_grad_norm_(judge.parameters(), 1.0)   # without it some seeds fall back to chance
            optimizer.step()
            optimizer.zero_grad()
            trainer.breathe()
    judge.eval()
    trainer.judge = judge.state_dict()
    videos, labels = test_part(trainer, 4000)
    guess = in_batches(trainer, lambda part: judge(floats(part, trainer.device)).argmax(1), videos)
    return {"accuracy_on_real": (guess == labels).float().mean().item(), "videos": len(labels)}


def evaluate_generation(trainer, model):
    real, labels = test_part(trainer)
    generator = seeded(trainer.device, trainer.settings.seed, "generate")
    made = in_batches(trainer, lambda part: model.generate(part, generator), labels)
    judge = Judge(model.shape, len(model.classes)).to(trainer.device)
    judge.load_state_dict(trainer.judge)
    judge.eval()
    right = in_batches(trainer, lambda part: judge(floats(part, trainer.device)).argmax(1), made) == labels
    plain = in_batches(trainer, lambda part: model.generate(part, generator, samples=1), labels)
    right_plain = in_batches(trainer, lambda part: judge(floats(part, trainer.device)).argmax(1), plain) == labels
    half = torch.arange(len(real), device=real.device) % 2 == 0
    n = int((~half).sum())
    near_made, _ = nearest(trainer, made, model.shape[0])
    near_real, _ = nearest(trainer, real, model.shape[0])
    return {"videos": len(made), "judged_right": right.float().mean().item(),
            "judged_right_by_class": {name: right[labels == k].float().mean().item() for k, name in enumerate(model.classes)},
            "judged_right_unchosen": right_plain.float().mean().item(),
            "one_dot": one_dot_share(made), "one_dot_real": one_dot_share(real),
            "feature_distance": frechet(path_features(made[half][:n]), path_features(real[~half])),
            "feature_distance_real_halves": frechet(path_features(real[half][:n]), path_features(real[~half])),
            "nearest_training_video_rmse": near_made.sqrt().mean().item(),
            "nearest_training_video_rmse_real": near_real.sqrt().mean().item()}


def nearest(trainer, videos, frames):
    """Mean squared pixel difference (0 to 1 scale) to the training video that matches the first `frames` best, and its index."""
    query = videos[:, :frames].flatten(1).float() / 255
    best, which = torch.full((len(query),), math.inf, device=query.device), torch.zeros(len(query), dtype=torch.long, device=query.device)
    for index in trainer.parts[0].split(2000):
        known = trainer.videos[index][:, :frames].flatten(1).float() / 255
        distance = (query.square().sum(1)[:, None] - 2 * query @ known.T + known.square().sum(1)) / query.shape[1]
        value, at = distance.min(1)
        which, best = torch.where(value < best, index[at], which), torch.minimum(best, value)
        trainer.breathe()
    return best.clamp(min=0), which


def path_features(videos):
    """float64 (N, 3T) on the CPU: where the dot is, in frame widths, and how large it looks."""
    size = (videos.float().mean(2).sum((2, 3)) / 255).sqrt()
    return torch.cat([(centroids(videos) / videos.shape[-1]).flatten(1), size / videos.shape[-1] * 4], 1).cpu().double().numpy()


def frechet(a, b):
    """Frechet distance of two Gaussians fitted to (N, d) samples, as in FID (Heusel et al. 2017)."""
    product = np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)
    root = np.sqrt(np.maximum(np.linalg.eigvals(product).real, 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False)) - 2 * root)


def evaluate_prediction(trainer, model):
    videos, labels = test_part(trainer)
    given = model.shape[0] // 2 // model.preset.stride_t * model.preset.stride_t
    generator = seeded(trainer.device, trainer.settings.seed, "predict")
    made = in_batches(trainer, lambda part: model.predict(part, given, generator), videos)
    _, match = nearest(trainer, videos, given)
    real, ahead = centroids(videos), torch.arange(1, model.shape[0] - given + 1, device=videos.device)[:, None]
    last, before = real[:, given - 1:given], real[:, given - 2:given - 1]
    limit = torch.tensor([model.shape[3] - 1.0, model.shape[2] - 1.0], device=videos.device)
    guesses = {"model": centroids(made)[:, given:], "copy_last": last.expand(-1, len(ahead), -1),
               "constant_velocity": torch.minimum((last + ahead * (last - before)).clamp(min=0), limit),
               "nearest_neighbour": centroids(trainer.videos[match])[:, given:]}
    result = {"videos": len(videos), "frames_given": given, "one_dot": one_dot_share(made[:, given:])}
    for name, path in guesses.items():
        error = (path - real[:, given:]).norm(dim=-1)
        result[name] = {"error_px": error.mean().item(), "by_horizon": error.mean(0).tolist(),
                        "by_class": {c: error[labels == k].mean().item() for k, c in enumerate(model.classes)}}
    return result


EVALUATIONS = {"tokenizer": evaluate_tokenizer, "classification": evaluate_classification, "judge": evaluate_judge,
               "generation": evaluate_generation, "prediction": evaluate_prediction}


def warnings_of(metrics, classes):
    """In words, what a good-looking figure elsewhere must not hide."""
    found, tokens, names = [], metrics["tokenizer"], metrics["classification"]
    if tokens["foreground_perplexity"] < 10:
        found.append(f"the codes have collapsed: perplexity {tokens['foreground_perplexity']:.1f} of {CODES}, "
                     f"{tokens['active_codes']} codes in use")
    if tokens["skill"] < 0.5:
        found.append(f"the tokenizer hardly beats a blank video: skill {tokens['skill']:.2f}")
    chance = 1 / classes
    if names["accuracy"] < chance + 3 * math.sqrt(chance * (1 - chance) / names["videos"]):
        found.append(f"accuracy is at chance: {names['accuracy']:.1%}, chance {chance:.1%}")
    if metrics["judge"]["accuracy_on_real"] < 0.9:
        found.append(f"the judge of generated videos is itself right on only {metrics['judge']['accuracy_on_real']:.1%} of real ones")
    return found


def table(metrics):
    """The figures, each with its baseline, as text."""
    t, c, j, g, p = (metrics[k] for k in ("tokenizer", "classification", "judge", "generation", "prediction"))
    best = min(("copy_last", "constant_velocity", "nearest_neighbour"), key=lambda name: p[name]["error_px"])
    rows = [("on held-out test videos", "model", "baseline", ""),
            ("bits a video", f"{t['bits_per_video']:.0f}", f"{t['raw_bits']}", "raw"),
            ("PSNR, dB", f"{t['psnr_db']:.2f}", f"{t['blank_psnr_db']:.2f}", "blank video"),
            ("skill, 1 - MSE / MSE of blank", f"{t['skill']:.4f}", "0", "blank video"),
            ("foreground error", f"{t['foreground_error']:.4f}", f"{t['blank_foreground_error']:.4f}", "blank video"),
            ("centroid error, px", f"{t['centroid_error_px']:.3f}", f"{t['middle_centroid_error_px']:.2f}", "middle of the frame"),
            ("frames with no dot, two dots", f"{t['frames_without_dot']:.2%}, {t['frames_with_two_dots']:.2%}", "", ""),
            ("active codes", f"{t['active_codes']}", f"{t['codes']}", "all"),
            ("foreground perplexity", f"{t['foreground_perplexity']:.0f}", f"{t['codes']}", "all codes alike"),
            ("accuracy, whole videos", f"{c['accuracy']:.1%}", f"{c['chance']:.1%}", "chance"),
            (f"accuracy, first {c['frames_first_half']} frames", f"{c['accuracy_first_half']:.1%}", f"{c['chance']:.1%}", "chance"),
            ("generated, judged right", f"{g['judged_right']:.1%}", f"{j['accuracy_on_real']:.1%}", "real videos, same judge"),
            ("generated, judged right, unchosen", f"{g['judged_right_unchosen']:.1%}", f"{j['accuracy_on_real']:.1%}",
             "real videos, same judge"),
            ("generated, frames with one dot", f"{g['one_dot']:.2%}", f"{g['one_dot_real']:.2%}", "real videos"),
            ("generated, distance of paths to real", f"{g['feature_distance']:.4f}", f"{g['feature_distance_real_halves']:.4f}",
             "two halves of the real"),
            ("generated, nearest training video, RMSE", f"{g['nearest_training_video_rmse']:.4f}",
             f"{g['nearest_training_video_rmse_real']:.4f}", "real test videos"),
            (f"prediction, {p['frames_given']} frames given, px", f"{p['model']['error_px']:.2f}", f"{p[best]['error_px']:.2f}",
             f"{best.replace('_', ' ')}, the best of three")]
    for name in ("copy_last", "constant_velocity", "nearest_neighbour"):
        rows.append(("", "", f"{p[name]['error_px']:.2f}", name.replace("_", " ")))
    for name, error in p["model"]["by_class"].items():
        rows.append((f"prediction, {name}", f"{error:.2f}", f"{p[best]['by_class'][name]:.2f}", best.replace("_", " ")))
    for i, error in enumerate(p["model"]["by_horizon"]):
        rows.append((f"prediction, {i + 1} frames ahead", f"{error:.2f}", f"{p[best]['by_horizon'][i]:.2f}", best.replace("_", " ")))
    text = "\n".join(f"{a:<42}{b:>16}{d:>12}  {e}".rstrip() for a, b, d, e in rows)
    width = max(map(len, c["classes"])) + 2
    text += "\n\ntrue class by guessed class\n" + " " * width + "".join(f"{name:>{width}}" for name in c["classes"])
    for name, row in zip(c["classes"], c["confusion_true_by_guessed"]):
        text += f"\n{name:<{width}}" + "".join(f"{value:>{width}}" for value in row)
    return text


# ---------------------------------------------------------------------------------------------------------------------

def main():
    parser, settings = parse_settings(Settings, "Train MAGVIT: a tokenizer, then a masked transformer.")
    for name, low, high in (("epochs", 0, 10**6), ("batch_size", 0, 10**6), ("every", 1, 10**6), ("seed", 0, 2**63 - 1),
                            ("max_minutes", 1e-6, 1e6), ("heartbeat", 0.01, 86400)):
        if not low <= getattr(settings, name) <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}, not {getattr(settings, name)}")
    if settings.epochs == 1:
        parser.error("--epochs must be at least 2, one for each phase")
    if settings.preset not in ("auto", *PRESETS):
        parser.error(f"--preset must be auto, {', '.join(PRESETS)}, not {settings.preset}")
    with checkpointing.one_line_errors():
        device = choose_device(settings.device)
        train(settings, device)


def choose_device(name):
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name):
        raise CheckpointError(f"--device {name}: there is none here; there is {', '.join(k for k, v in available.items() if v)}",
                              checkpointing.WRONG_SETTINGS)
    return torch.device(name)


def train(settings, device):
    """One run of train_magvit.py, from wherever it was to the end."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    name = settings.preset if settings.preset != "auto" else "small" if device.type == "cuda" else "tiny"
    preset = PRESETS[name] if not settings.batch_size else replace(PRESETS[name], batch=settings.batch_size)
    data = load_data(settings.data)
    n, frames, channels, height, width = data.videos.shape
    if frames % preset.stride_t or height % preset.stride or width % preset.stride or frames < 4:
        raise CheckpointError(f"{settings.data}: videos of {frames} frames of {height}x{width} do not fit preset {name}: it needs "
                              f"a multiple of {preset.stride_t} frames, at least 4, and heights and widths that are multiples of "
                              f"{preset.stride}", checkpointing.WRONG_SETTINGS)
    if settings.fresh:
        set_aside(settings.out)
    used = videos_used_before(settings.out)
    if used and len(data.videos) > used:
        print(f"{settings.data} has grown to {len(data.videos)} videos; this run goes on with the first {used} it began with "
              "(--fresh to begin again with all)", flush=True)
        data = data.first(used)
    decisive = {"preset": name, "epochs": settings.epochs, "batch_size": settings.batch_size, "seed": settings.seed,
                "videos": len(data.videos), "shape": list(data.videos.shape[1:]), "data": data_digest(data)}
    trainer = Trainer(settings, preset, data, device)
    with checkpointing.Run(settings.out, trainer.total, suffix=".pt", title="MAGVIT training", unit="steps", settings=decisive,
                           max_minutes=settings.max_minutes, heartbeat=settings.heartbeat) as run:
        run.load(lambda file: trainer.restore(torch.load(file, map_location=device, weights_only=True)))
        if run.done < trainer.total:
            run.begin()
            phases = ", ".join(f"{p.name} {p.epochs} epochs" for p in trainer.phases)
            run.log(f"{n} videos {tuple(data.videos.shape[1:])}, preset {name}, {device.type}; {phases}; step {trainer.done}")
            trainer.work(run)
        else:
            run.log(table(trainer.metrics))


def data_digest(data):
    digest = hashlib.sha256(data.labels.tobytes())
    digest.update(data.videos)
    return digest.hexdigest()[:16]


def videos_used_before(out):
    try:
        return int(json.loads((Path(out) / "run.json").read_bytes())["settings"]["videos"])
    except (OSError, ValueError, KeyError, TypeError):
        return None   # no run yet; a damaged run.json is refused by Run


def set_aside(out):
    """--fresh: rename the old directory, unless a process is working in it."""
    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
        lock = checkpointing.DirectoryLock(out)
        number = 1
        while (aside := out.with_name(f"{out.name}.old{number}")).exists():
            number += 1
        out.rename(aside)
        lock.release()
        print(f"the old run is in {aside}", flush=True)


if __name__ == "__main__":
    main()
