"""MAGVIT: a tokenizer, a masked transformer, and what they take. No training here, no figures.

After MAGVIT (Yu et al., CVPR 2023) and MAGVIT-v2 (ICLR 2024): a causal tokenizer turns a video
into a few integers, with finite scalar quantization (Mentzer et al., ICLR 2024), and one
bidirectional transformer learns to fill in hidden integers of the sequence [class | video]. Three
tasks are then one: classify (the class is hidden), generate (the video is hidden), predict (the
later frames are hidden). Nothing but the integers passes from the encoder to the decoder.

Shapes: B videos, T frames, C channels, H x W pixels; a place is 32 x 32 pixels of one frame, n of
them a frame; a place holds NUMBERS integers from 0 to LEVELS - 1. Codes: int64 (B, T, n, NUMBERS).
"""
import ctypes
import hashlib
import io
import math
import os
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import checkpointing
from checkpointing import WRONG_SETTINGS, CheckpointError

LEVELS = 64             # of each quantized number
SLOTS = 4               # codes a place; each is SLOT numbers, so a codebook has 2^18 entries
SLOT = 3
NUMBERS = SLOTS * SLOT
SIDE = 32               # pixels of a place, in height and width; videos are padded to a multiple
PATCH = 8               # pixels; the convolutions work on patches, where they are cheap
GRID = SIDE // PATCH    # patches along a side of a place
FORMAT = "trajectory-magvit 2"


@dataclass(frozen=True)
class Sizes:
    """Of the two networks."""
    width: int              # channels of the tokenizer
    encoder_blocks: int
    decoder_blocks: int
    dim: int                # of the transformer
    layers: int
    heads: int
    chain: int              # channels of the chain that tells the numbers of a place


# --------------------------------------------------------------------------------------------------
# Randomness: a function of names and numbers alone, the same on every device and after any restart

def mix(x):
    """A well mixed 32-bit hash of x, an int or an int64 tensor of values below 2^32.

    The constants are T. Ettinger's, found with C. Wellons' hash prospector (2022). They lie below
    2^31, so that no product leaves int64.
    """
    x = (x ^ x >> 16) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x735A2D97 & 0xFFFFFFFF
    return x ^ x >> 15


def key(*what):
    """Two 32-bit words from names and numbers, for `hashes`."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")


def hashes(key, number, count):
    """int64 (..., count) below 2^32, for a `key` and an int64 tensor `number` (...).

    A hash of (key, number, element) in place of a generator: it has no state that a restart would
    have to bring back or that a CUDA graph would freeze.
    """
    first = mix(key[0] ^ number & 0xFFFFFFFF)
    second = mix(first + key[1] & 0xFFFFFFFF)
    element = torch.arange(count, device=number.device)
    return mix(mix(element ^ first[..., None]) + second[..., None] & 0xFFFFFFFF)


def uniform(key, number, count):
    """float32 (..., count) in [0, 1), from `hashes`."""
    return (hashes(key, number, count) >> 8).float() * 2.0**-24


# --------------------------------------------------------------------------------------------------
# The tokenizer: video -> integers -> video

class Norm(nn.Module):
    """RMS norm over the channels of each place; one over time would leak the future."""

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
        images = self.norm(x).flatten(0, 1).permute(0, 3, 1, 2)          # (B T, width, h, w)
        y = F.gelu(self.space(images).permute(0, 2, 3, 1).reshape(x.shape))
        earlier = F.pad(y, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]             # the frame before
        return x + self.out(F.gelu(self.now(y) + self.before(earlier)))


def tiles(x, side):
    """(B, T, h, w, c) -> (B, T, h / side, w / side, side, side, c)."""
    b, t, h, w, c = x.shape
    return x.reshape(b, t, h // side, side, w // side, side, c).permute(0, 1, 2, 4, 3, 5, 6)


def joined(x):
    """(B, T, rows, columns, side, side, c) -> (B, T, rows * side, columns * side, c)."""
    b, t, rows, columns, side, _, c = x.shape
    return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(b, t, rows * side, columns * side, c)


HALF = (LEVELS - 1) * (1 + 1e-3) / 2    # tanh reaches a little over the outermost levels
OFFSET = 0.5                            # an even number of levels has no middle one
SHIFT = math.atanh(OFFSET / HALF)


def quantize(z):
    """Finite scalar quantization (Mentzer et al. 2024, section 3.1) of z (..., NUMBERS).

    Returns the integers, and the same scaled to [-1, 1], whose gradient passes straight through to
    z. In float32, whatever the precision around it.
    """
    bounded = torch.tanh(z.float() + SHIFT) * HALF - OFFSET
    rounded = bounded + (bounded.round() - bounded).detach()
    return (rounded + LEVELS // 2).detach().round().long(), rounded / (LEVELS // 2)


def values_of(codes):
    """Codes scaled to [-1, 1] as `quantize` gives them: what the decoder sees."""
    return (codes - LEVELS // 2) / (LEVELS // 2)


class Tokenizer(nn.Module):
    """Causal: the codes of a frame depend on it and the frames before it, never on later ones.

    All slots of a place but the last quantize a linear function of its lowest spatial frequencies,
    each relative to its mean brightness: where a thing is and how large changes these smoothly, so
    that what is to come can be computed from them. The last slot holds what else there is, seen by
    causal convolutions. Videos of any height and width are padded with black and cut back.
    """

    WAVES = 3       # cosines along each axis, of 0, 1 and 2 half periods a place
    MEAN = 0.1      # of a video's pixels, about: the convolutions' input is centred
    DARK = 0.05     # added to a place's brightness, so that an empty one divides by something

    def __init__(self, sizes, shape):
        super().__init__()
        _, channels, self.height, self.width = shape
        self.rows, self.columns = -(-self.height // SIDE), -(-self.width // SIDE)
        inside, pixels = sizes.width * GRID**2, channels * PATCH**2
        self.coarse = nn.Linear(channels * self.WAVES**2, NUMBERS - SLOT)
        self.embed = nn.Linear(pixels, sizes.width)
        self.encoder = nn.Sequential(*[Block(sizes.width) for _ in range(sizes.encoder_blocks)])
        self.to_code = nn.Sequential(Norm(inside), nn.Linear(inside, SLOT))
        self.from_code = nn.Linear(NUMBERS, inside)
        self.decoder = nn.Sequential(*[Block(sizes.width) for _ in range(sizes.decoder_blocks)])
        self.to_pixels = nn.Sequential(Norm(sizes.width), nn.Linear(sizes.width, pixels))
        at = (torch.arange(SIDE) + 0.5) / SIDE
        wave = torch.cos(math.pi * torch.arange(self.WAVES)[:, None] * at) * math.sqrt(2 / SIDE)
        waves = (wave[:, None, :, None] * wave[None, :, None, :]).flatten(2).flatten(0, 1).T
        self.register_buffer("waves", waves.contiguous(), persistent=False)   # (pixels, WAVES^2)

    def low(self, pixels):
        """(B, T, rows, columns, NUMBERS - SLOT) from the low cosine transform of each place.

        In float32 also under bf16: it is what tells tenths of a pixel.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            x = tiles(pixels.float(), SIDE).movedim(-1, 4).flatten(5) @ self.waves   # (.., C, 9)
            brightness = x[..., :1].mean(4, keepdim=True)
            x = torch.cat([x[..., :1] - 1, x[..., 1:] / (brightness + self.DARK)], -1)
            return self.coarse(x.flatten(4))

    def features(self, video):
        """(B, T, rows, columns, NUMBERS), to be quantized, of a video (B, T, C, H, W) in [0, 1]."""
        beyond = (0, self.columns * SIDE - self.width, 0, self.rows * SIDE - self.height)
        pixels = F.pad(video, beyond).movedim(2, -1)
        x = self.encoder(self.embed(tiles(pixels, PATCH).flatten(4) - self.MEAN))
        rest = self.to_code(tiles(x, GRID).flatten(4)).float()
        return torch.cat([self.low(pixels), rest], -1)

    def paint(self, values):
        """Video (B, T, C, H, W), not clamped, of values (B, T, rows, columns, NUMBERS)."""
        with torch.autocast(values.device.type, enabled=False):   # float32 for the reason in `low`
            x = self.from_code(values)
        x = self.decoder(joined(x.unflatten(-1, (GRID, GRID, -1))))
        pixels = joined(self.to_pixels(x).unflatten(-1, (PATCH, PATCH, -1)))
        return pixels.movedim(-1, 2)[..., :self.height, :self.width]

    def encode(self, video):
        return quantize(self.features(video))[0].flatten(2, 3)

    def decode(self, codes):
        return self.paint(values_of(codes).unflatten(2, (self.rows, self.columns)))

    def forward(self, video):
        """The video as it comes back through its codes."""
        return self.paint(quantize(self.features(video))[1])


# --------------------------------------------------------------------------------------------------
# The transformer: fills in hidden places of [class | video]

SHORT = 32              # elements; on a GPU, attention over fewer is cheaper as two plain products


def attention(q, k, v):
    """softmax(q k' / sqrt(d)) v, all (B, heads, length, d).

    Flash kernels work on 128 elements at a time: with the 9 of a video of 8x32x32 they took 45 % of
    a training step on an H100.
    """
    if not q.is_cuda or q.shape[2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v)
    score = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    return score.softmax(-1).to(v.dtype) @ v


class Layer(nn.Module):
    """Pre-norm attention and perceptron, both residual, on (B, length, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.mix = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        seen = attention(*qkv.permute(2, 0, 3, 1, 4))   # q, k, v: each (B, heads, length, d)
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def one_hot(index, count):
    """float32 (..., count). Tables are read by a product with it: the gradient of table[index] adds
    in any order, that of a matrix product in the same one every time."""
    return (index[..., None] == torch.arange(count, device=index.device)).float()


def first_hidden_frame(hidden):
    """(B,) of hidden (B, T, n): the first frame that is not shown whole, or T."""
    frames = torch.arange(hidden.shape[1], device=hidden.device)
    return torch.where(hidden.any(2), frames, len(frames)).amin(1)


def smooth(width):
    """(LEVELS, width): random, but alike for levels that are near each other."""
    at = (torch.arange(LEVELS) + 0.5) / LEVELS
    wave = torch.cos(math.pi * torch.arange(16)[:, None] * at)           # up to eight periods
    return (torch.randn(width, 16) @ wave).T / math.sqrt(8)


class MaskedTransformer(nn.Module):
    """Fills in hidden places of a video's codes (B, T, n, NUMBERS) and its hidden class (B,).

    A place is one element of the sequence, hidden or shown as a whole. A shown one goes in as its
    numbers, scaled up: networks learn fast only what changes slowly over their input (Tancik et
    al., NeurIPS 2020). What a hidden place holds is told number by number, each given those before
    it: codes factored into small alphabets, as in MAGVIT-v2, and in a chain, as Lee et al. (CVPR
    2022) do for residual codes, so that the numbers of one place always belong together.

    What moves is told most by the last frames before the first hidden one. So places also know how
    far they are from it, and a perceptron reads the last frames side by side, where speed and
    curvature are plain, and adds to each hidden place what it expects there.
    """

    SCALE = 8       # of the numbers that go in
    RECENT = 4      # frames side by side

    def __init__(self, sizes, frames, places, classes):
        super().__init__()
        d, e, recent = sizes.dim, sizes.chain, min(frames, self.RECENT) * (NUMBERS + 1)
        self.look = nn.Sequential(nn.Linear(NUMBERS, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.classes_in = nn.Parameter(torch.randn(classes + 1, d) * 0.02)   # the last: hidden
        self.hidden = nn.Parameter(torch.randn(d) * 0.02)
        self.frame = nn.Parameter(torch.randn(frames, 1, d) * 0.02)
        self.place = nn.Parameter(torch.randn(places, d) * 0.02)
        self.from_now = nn.Parameter(torch.randn(2 * frames + 1, d) * 0.3)   # -T to T frames away
        self.expect = nn.Sequential(nn.Linear(recent, 4 * d), nn.GELU(),
                                    nn.Linear(4 * d, frames * d))
        self.layers = nn.ModuleList([Layer(d, sizes.heads) for _ in range(sizes.layers)])
        self.norm = nn.LayerNorm(d)
        self.to_class = nn.Linear(d, classes)
        self.to_chain = nn.Linear(d, e)
        self.which = nn.Parameter(torch.randn(NUMBERS, e) * 0.5)
        self.known = nn.Parameter(torch.stack([smooth(e) for _ in range(NUMBERS)]))
        self.to_number = nn.Parameter(torch.stack([smooth(e).T for _ in range(NUMBERS)]) * 0.02)
        self.chain_norm = nn.LayerNorm(e)
        self.up, self.down = nn.Linear(e, 2 * e), nn.Linear(2 * e, e)
        for layer in self.layers:   # as GPT-2: a residual stream that does not grow with depth
            for linear in (layer.mix, layer.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * sizes.layers))
                nn.init.zeros_(linear.bias)

    def forward(self, codes, hidden, label, label_hidden):
        """States (B, dim) of the class and (B, T n, dim) of the places.

        hidden (B, T, n) and label_hidden (B,) are bool; what they hide reaches nothing.
        """
        values, now = self.SCALE * values_of(codes), first_hidden_frame(hidden)
        x = torch.where(hidden[..., None], self.hidden, self.look(values)) + self.frame + self.place
        x = x + self.distance(now, codes.shape[1])
        x = x + self.expected(values, now) * hidden[..., None]
        label = torch.where(label_hidden, len(self.classes_in) - 1, label)
        first = one_hot(label, len(self.classes_in)) @ self.classes_in
        x = torch.cat([first[:, None], x.flatten(1, 2)], 1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1:]

    def distance(self, now, frames):
        """(B, T, 1, dim): how many frames each lies from the first with a hidden place."""
        away = torch.arange(frames, device=now.device) - now[:, None]
        return (one_hot(away + frames, len(self.from_now)) @ self.from_now)[:, :, None]

    def expected(self, values, now):
        """(B, T, n, dim): what the last frames shown whole let expect in those from `now` on."""
        frames = torch.arange(values.shape[1], device=now.device)
        last = now[:, None] - 1 - frames[:self.RECENT]                   # counted back from now
        recent = torch.einsum("brt,btnk->bnrk", one_hot(last, len(frames)), values)   # 0 before T=0
        there = (last >= 0)[:, None, :, None].expand(*recent.shape[:3], 1).to(recent.dtype)
        ahead = self.expect(torch.cat([recent, there], -1).flatten(2))
        ahead = ahead.unflatten(2, (len(frames), -1))                    # (B, n, frames ahead, dim)
        which = one_hot(frames - now[:, None], len(frames)).to(ahead.dtype)   # 0 for frames before
        return torch.einsum("bfa,bnad->bfnd", which, ahead)

    def tell(self, x):
        return x + self.down(F.gelu(self.up(self.chain_norm(x))))

    def logits(self, states, codes):
        """(N, NUMBERS, LEVELS) for states (N, dim) of places that hold codes (N, NUMBERS): each
        number is told the ones before it."""
        known = torch.einsum("nkc,kce->nke", one_hot(codes, LEVELS), self.known).float()
        told = [torch.zeros_like(known[:, 0])]
        for number in known.unbind(1)[:-1]:     # a sum of few terms: as a product it costs thrice
            told.append(told[-1] + number)
        x = self.tell(self.to_chain(states)[:, None] + self.which + torch.stack(told, 1))
        return torch.einsum("nke,kec->nkc", x, self.to_number).float()

    def draw(self, states, temperature, chance):
        """Codes (N, NUMBERS) for states (N, dim), number by number.

        chance (N, NUMBERS) in [0, 1) decides them."""
        told, drawn = self.to_chain(states), []
        for k in range(NUMBERS):
            x = self.tell(told + self.which[k])
            share = ((x @ self.to_number[k]).float() / temperature).softmax(-1)
            # Sums of integers, since those of floats come out in any order on a GPU.
            stairs = (share * 2**24).long().cumsum(-1)
            drawn.append((stairs <= (chance[:, k, None] * stairs[:, -1:]).long()).sum(-1))
            told = told + self.known[k, drawn[-1]]
        return torch.stack(drawn, 1)


# --------------------------------------------------------------------------------------------------
# Both together: what best_model.pt holds and what the other stages use

class Magvit(nn.Module):
    """Tokenizer and transformer for videos of one shape (T, C, H, W).

    Videos in and out are uint8 tensors (B, T, C, H, W) on any device.
    """

    GENERATE_TEMPERATURE = 0.9
    PREDICT_TEMPERATURE = 0.5
    DRAWS = 16              # for each place of a predicted video

    def __init__(self, sizes, shape, classes):
        super().__init__()
        self.sizes, self.shape, self.classes = sizes, tuple(shape), list(classes)
        self.tokenizer = Tokenizer(sizes, self.shape)
        self.places = self.tokenizer.rows * self.tokenizer.columns
        self.transformer = MaskedTransformer(sizes, self.shape[0], self.places, len(self.classes))

    device = property(lambda self: self.transformer.hidden.device)

    def encode(self, videos):
        """Codes (B, T, n, NUMBERS)."""
        with precision(self.device):
            return self.tokenizer.encode(videos.to(self.device).float() / 255)

    def decode(self, codes):
        """Videos of codes; the integers are all that the decoder sees."""
        with precision(self.device):
            video = self.tokenizer.decode(codes).float()
        return (video.clamp(0, 1) * 255).round().to(torch.uint8)

    def class_probabilities(self, codes, given=None):
        """(B, classes), from whole videos or from their first `given` frames."""
        hidden = torch.zeros(codes.shape[:3], dtype=torch.bool, device=self.device)
        hidden[:, self.shape[0] if given is None else given:] = True
        unknown = torch.ones(len(codes), dtype=torch.bool, device=self.device)
        with precision(self.device):
            state, _ = self.transformer(codes, hidden, unknown.long(), unknown)
            return self.transformer.to_class(state).float().softmax(-1)

    def fill(self, codes, given, labels, temperature, name, numbers, draws=1):
        """Codes with all frames from `given` on sampled: frame by frame, place by place.

        labels None hides the class. `name` and each video's number (B,) decide its randomness. Of
        several draws for a place the one nearest to their mean is kept: the noise of one draw would
        not only be an error itself, it would also lead all later frames astray.
        """
        codes = codes.clone()
        hidden = torch.zeros(codes.shape[:3], dtype=torch.bool, device=self.device)
        hidden[:, given:] = True
        unknown = torch.full((len(codes),), labels is None, device=self.device)
        labels = unknown.long() if labels is None else labels
        for frame in range(given, self.shape[0]):
            for place in range(self.places):
                chance = uniform(key(*name, frame, place), numbers, draws * NUMBERS)
                with precision(self.device):
                    states = self.transformer(codes, hidden, labels, unknown)[1]
                    state = states[:, frame * self.places + place].repeat_interleave(draws, 0)
                    drawn = self.transformer.draw(state, temperature, chance.view(-1, NUMBERS))
                drawn = drawn.view(len(codes), draws, NUMBERS)
                values = values_of(drawn)
                off = (values - values.mean(1, keepdim=True)).square().sum(2)
                codes[:, frame, place] = drawn[torch.arange(len(codes)), off.argmin(1)]
                hidden[:, frame, place] = False
        return codes

    def sample(self, labels, seed, numbers, samples):
        """Codes (B, samples, T, n, NUMBERS) of new videos of the classes labels (B,)."""
        labels = labels.repeat_interleave(samples)
        numbers = (numbers[:, None] * 64 + torch.arange(samples, device=self.device)).flatten()
        blank = torch.zeros(len(labels), self.shape[0], self.places, NUMBERS, dtype=torch.long,
                            device=self.device)
        codes = self.fill(blank, 0, labels, self.GENERATE_TEMPERATURE, (seed, "generate"), numbers)
        return codes.unflatten(0, (-1, samples))

    def surest(self, codes, labels):
        """Of each video's samples the one that the model itself takes for the class asked for with
        the least doubt (rejection sampling, as Razavi et al. 2019, section 3.4)."""
        chances = self.class_probabilities(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
        right = chances.gather(2, labels[:, None, None].expand(-1, codes.shape[1], 1))[..., 0]
        return codes[torch.arange(len(codes)), right.argmax(1)]

    def generate(self, labels, seed, numbers, samples=8):
        """New videos of the classes labels (B,); video number i depends on (seed, i) alone."""
        return self.decode(self.surest(self.sample(labels, seed, numbers, samples), labels))

    def predict(self, videos, given, seed, numbers):
        """The videos with the frames from `given` on predicted, each near the middle of what it
        could be."""
        made = self.decode(self.fill(self.encode(videos), given, None, self.PREDICT_TEMPERATURE,
                                     (seed, "predict"), numbers, self.DRAWS))
        return torch.cat([videos[:, :given].to(self.device), made[:, given:]], 1)

    def state(self, weights=None):
        return {"format": FORMAT, "sizes": asdict(self.sizes), "shape": list(self.shape),
                "classes": self.classes, "weights": weights or self.state_dict()}

    @staticmethod
    def load(path, device):
        """The model in best_model.pt or final_model.pt; CheckpointError if it is none. Runs no code
        of the file."""
        path = Path(path)
        if not path.is_file():
            words = "a directory; name the best_model.pt in it" if path.is_dir() else (
                "no such model; train one with train_magvit.py or name another with --model")
            raise CheckpointError(f"{path}: {words}", WRONG_SETTINGS)
        content = io.BytesIO(path.read_bytes())
        try:
            broken = zipfile.ZipFile(content).testzip()     # torch.load compares no checksums
            if broken:
                raise ValueError(f"{broken}: checksum differs")
            content.seek(0)
            state = torch.load(content, map_location="cpu", weights_only=True)
            if "learning" in state:
                raise CheckpointError(f"{path}: a checkpoint of the training; its models, such as "
                                      "best_model.pt, are beside it", WRONG_SETTINGS)
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']}, not {FORMAT}")
            model = Magvit(Sizes(**state["sizes"]), state["shape"], state["classes"])
            model.load_state_dict(state["weights"])
        except CheckpointError:
            raise
        except Exception as error:      # whatever a damaged or foreign file makes torch raise
            words = checkpointing.one_line(f"{type(error).__name__}: {error}")[:200]
            raise CheckpointError(f"{path}: not a whole model of train_magvit.py ({words}). Bring "
                                  "back a good copy, or start its training again") from None
        return model.to(device).requires_grad_(False).eval()


def precision(device):
    """bf16 on CUDA, where it is twice as fast; float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


def open_device(name):
    """The torch device called `name`, with exact arithmetic: the same bits at every run.

    auto is cuda, else cpu; mps only when asked for, since nothing here was ever run on it.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    if not there.get(name):
        raise CheckpointError(f"--device {name}: there is none here; there is "
                              f"{', '.join(k for k, v in there.items() if v)}", WRONG_SETTINGS)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # makes cuBLAS repeatable
    if name == "cuda":
        torch.use_deterministic_algorithms(True)
    else:   # the same, but a second faster: no compiler is imported
        torch.set_deterministic_debug_mode("error")
    libc = ctypes.CDLL(None)
    if name == "cpu" and hasattr(libc, "mallopt"):
        # glibc keeps what a step frees for the next one: new pages cost the judge half its time.
        for parameter, most in ((-3, 2**25), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(parameter, most)
    torch.utils.deterministic.fill_uninitialized_memory = False   # it only helps to find errors
    torch.set_float32_matmul_precision("high")   # TF32 on CUDA
    return torch.device(name)


def saved(state):
    """The bytes of torch.save: a full disk is then met by a plain write, not inside of torch."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


class DeviceVideos:
    """The videos of a set (N, T, C, H, W): on the device if half of that holds them, else the host.

    videos[index] is uint8 (B, T, C, H, W) on the device, for int64 numbers (B,) on any device.
    """

    def __init__(self, array, device):
        self.pixels, self.device = torch.from_numpy(array), device
        if device.type != "cuda" or array.nbytes <= torch.cuda.mem_get_info(device)[0] / 2:
            self.pixels = self.pixels.to(device)

    def __getitem__(self, index):
        chosen = self.pixels[index.to(self.pixels.device)]
        if self.device.type == "cuda" and not chosen.is_cuda:
            chosen = chosen.pin_memory()    # or the copy would wait for the device
        return chosen.to(self.device, non_blocking=True)
