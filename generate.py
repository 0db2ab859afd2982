"""Stage 1: render trajectory videos, in sequence, into checkpoints that survive a kill.

    python generate.py --n 30000 --every 2000       # 15 checkpoints in results/, 2,000 videos each
    python generate.py --n 30000 --shard 1/3 &      # or in three runs: results/shard_1_of_3, ...
    python generate.py --frames 16 --size 64 --channels 3       # larger, in colour

Run the same command again after a crash: it goes on where it was. merge.py joins the checkpoints.

A dot moves through space on a linear, circular, helical or parabolic path and is seen by a pinhole
camera. Camera coordinates, in world units: x to the right, y down, z away from the camera; the clip
lasts one unit of time. Pixel (row r, column c) has its centre at x = c, y = r.

Sample i depends on the settings and i alone, on any machine: random numbers come from a
counter-based generator (Philox, Salmon et al. 2011) at a place computed from i, and the arithmetic
uses only operations that IEEE 754 rounds correctly (no library sine, no reordered sums), so that it
does not matter how the work is cut.
"""
from settings import option, parse_settings     # first: now Ctrl-C or no numpy is one line

import io
import math
import re
import zipfile
from dataclasses import dataclass

import numpy as np

import checkpointing
import report

LINEAR, CIRCULAR, HELICAL, PARABOLIC = KINDS = range(4)     # the label; sample index mod 4
RECIPE = 1              # raise it when a change below changes a byte of any sample
BLOCK, BLOCK_BYTES = 200, 4 << 20   # samples, bytes at once: the work stays in the cache
PIECE_BYTES = 2 << 30   # a checkpoint is held in memory until it is saved: more fits no laptop
NEAR, FAR = 1.5, 3.0    # depth of the dot, world units
DOT_RADIUS = 0.16       # world units
BRIGHTNESS = 235        # of 255, so that the noise does not clip
NOISE = 0.04            # largest relative deviation of a lit pixel, as of a sensor: black is black
DRAWS = 16              # random numbers a sample takes; a multiple of 4, Philox's block


@dataclass
class Settings:
    n: int = option(30000, "number of videos; may be larger than last time: that extends the set")
    every: int = option(2000, "videos a checkpoint")
    out: str = option("results", "directory for the checkpoints and PROGRESS.txt")
    seed: int = option(42, "any integer from 0 to 2^64 - 1; same seed, same bytes")
    frames: int = option(8, "frames a video, 4 to 256")
    size: int = option(32, "height and width of a frame in pixels, 16 to 512")
    channels: int = option(1, "1 grey, 3 colour")
    augment: bool = option(True, "no noise, no rotation of the scene, starts near the middle")
    shard: str = option(None, "I/K: make only part I (1 to K) of the set, in its own directory "
                        "OUT/shard_I_of_K")
    heartbeat: float = option(30.0, "seconds between two writes of PROGRESS.txt")
    max_minutes: float = option(5.0, "minutes after which a checkpoint is saved if not full, too")


def main():
    parser, settings = parse_settings(Settings, "Render trajectory videos into checkpoints.")
    problem = problem_with(settings)
    if problem:
        parser.error(problem)
    first, stop, out = 0, settings.n, settings.out
    if settings.shard:
        part, parts = (int(number) for number in settings.shard.split("/"))
        first, stop = settings.n * (part - 1) // parts, settings.n * part // parts
        out = f"{out}/shard_{part}_of_{parts}"

    # What decides the bytes of a sample, or which samples there are.
    decisive = "n", "seed", "frames", "size", "channels", "augment", "shard"
    run = checkpointing.Run(
        out, stop - first, first=first, every=settings.every, suffix=".npz", unit="samples",
        title="Dataset generation",
        settings={"recipe": RECIPE, **{name: getattr(settings, name) for name in decisive}},
        may_grow=() if settings.shard else ("n",), heartbeat=settings.heartbeat,
        max_minutes=settings.max_minutes, signals=checkpointing.ALL_SIGNALS)
    try:
        with run:
            arrays = empty_arrays(settings, min(settings.every, settings.n))    # all our memory
            for piece in run.pieces():
                for a, b in piece.blocks(max(1, min(BLOCK, BLOCK_BYTES // video_bytes(settings)))):
                    render(settings, a, b, [array[a - piece.start:b - piece.start]
                                            for array in arrays.values()])
                    report.refresh(out)     # by itself never more than 1 % of the time
                done = piece.done - piece.start
                piece.save(npz_bytes({name: array[:done] for name, array in arrays.items()}))
    finally:
        if run.begun:   # after the run's last word, which the page shows
            report.refresh(out, force=True)


def problem_with(settings):
    """What is wrong with the settings, in words for the command line, or None."""
    s = settings
    if not s.out:
        return "--out is empty; name a directory"
    for name, low, high in (("n", 4, 10**12), ("every", 1, 10**12), ("seed", 0, 2**64 - 1),
                            ("frames", 4, 256), ("size", 16, 512), ("heartbeat", 0.01, 86400),
                            ("max_minutes", 1e-6, 1e6)):
        value = getattr(s, name)
        if not low <= value <= high:
            return f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}"
    if s.channels not in (1, 3):
        return f"--channels must be 1 (grey) or 3 (colour), not {s.channels}"
    most = PIECE_BYTES // video_bytes(s)
    if min(s.every, s.n) > most:
        return (f"--every {s.every} such videos would take {s.every * video_bytes(s):,} bytes of "
                f"memory; at most {most}")
    if s.shard:
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", s.shard)
        if not match or not 1 <= int(match[1]) <= int(match[2]) <= s.n:
            return ("--shard must be I/K with I from 1 to K and K at most --n, like 1/3, 2/3, 3/3; "
                    f"not {s.shard}")


def video_bytes(settings):
    return settings.frames * settings.channels * settings.size**2


def empty_arrays(settings, n):
    """The arrays of a checkpoint for n samples, not filled yet; the data set's names and types."""
    t, c, s = settings.frames, settings.channels, settings.size
    return {"videos": np.empty((n, t, c, s, s), np.uint8), "labels": np.empty(n, np.int64),
            "trajectory_3d": np.empty((n, t, 3), np.float32),
            "trajectory_2d": np.empty((n, t, 2), np.float32)}


def render(settings, first, stop, arrays):
    """Fill `arrays` (of empty_arrays, stop - first long) with samples first to stop - 1."""
    videos, labels, trajectory_3d, trajectory_2d = arrays
    words = random_words(settings.seed, 0, first, stop, DRAWS)
    draws = (words >> np.uint64(11)) * 2.0**-53     # float64, uniform in [0, 1)
    labels[:] = np.arange(first, stop) % len(KINDS)
    path = place(relative_paths(labels, draws, settings), draws, settings)
    trajectory_3d[:] = path
    # pinhole, focal length = size
    centre = (settings.size - 1) / 2 + settings.size * path[..., :2] / path[..., 2:]
    trajectory_2d[:] = centre
    draw_dots(videos, centre, settings.size * DOT_RADIUS / path[..., 2], draws[:, 12:15], settings,
              first, stop)


# --------------------------------------------------------------------------------------------------
# Random numbers and sines that are the same everywhere

def random_words(seed, stream, first, stop, count):
    """uint64 (stop - first, count): for each sample i the words from `count * i` on of a stream."""
    assert count % 4 == 0, "Philox makes four words a step"
    generator = np.random.Philox(key=seed + (stream << 64), counter=first * count // 4)
    return generator.random_raw((stop - first) * count).reshape(stop - first, count)


TAYLOR = [(-1)**k * (2 * math.pi)**(2 * k + 1) / math.factorial(2 * k + 1) for k in range(14)]


def sine(turns):
    """sin(2 pi turns) to 1e-11, by multiplying and adding: NumPy's differs between processors."""
    x = turns - np.rint(turns)
    square, value = x * x, 0.0
    for coefficient in reversed(TAYLOR):
        value = value * square + coefficient
    return value * x


def cosine(turns):
    return sine(turns + 0.25)


# --------------------------------------------------------------------------------------------------
# Paths: shape, speed, orientation, depth and place at random: no nearest neighbour knows the answer

def relative_paths(labels, draws, settings):
    """float64 (n, T, 3): the paths, in world units, before they get their place in the scene."""
    t = np.arange(settings.frames) / (settings.frames - 1)
    along, side, other = orthonormal_basis(draws[:, 0], draws[:, 1])
    path = np.empty((len(labels), settings.frames, 3))

    def between(column, low, high):
        return (low + (high - low) * draws[:, column])[:, None]

    k = labels == LINEAR        # any direction, constant speed
    path[k] = (between(2, 0.1, 0.8) * t)[k][..., None] * along[k][:, None]

    # any plane, phase and radius; the plane's side gives the direction
    k = (labels == CIRCULAR) | (labels == HELICAL)
    angle = between(2, 0, 1) + between(3, 1.2, 2.0) * t
    radius = between(4, 0.3, 0.5)
    path[k] = ((radius * cosine(angle))[k][..., None] * side[k][:, None]
               + (radius * sine(angle))[k][..., None] * other[k][:, None])
    k = labels == HELICAL       # the same, moving along its axis
    path[k] += (between(5, 0.5, 0.9) * t)[k][..., None] * along[k][:, None]

    k = labels == PARABOLIC     # thrown upwards, any horizontal direction, gravity along +y
    gravity, heading, speed = between(2, 1.0, 2.0), between(3, 0, 1), between(4, 0.1, 0.8)
    rise = between(5, 0.2, 0.8) * gravity
    throw = np.stack([speed * cosine(heading) * t, 0.5 * gravity * t * t - rise * t,
                      speed * sine(heading) * t], -1)
    path[k] = throw[k]

    if settings.augment:        # turned about the optical axis: gravity may point anywhere
        c, s = cosine(draws[:, 6])[:, None], sine(draws[:, 6])[:, None]
        x, y = path[..., 0].copy(), path[..., 1].copy()
        path[..., 0], path[..., 1] = c * x - s * y, s * x + c * y
    return path


def orthonormal_basis(u, v):
    """Three float64 (n, 3): a direction uniform on the sphere, and two for a right-handed basis.

    The two others follow Duff et al., "Building an Orthonormal Basis, Revisited" (JCGT 2017).
    """
    z = 2 * u - 1
    ring = np.sqrt(1 - z * z)
    x, y = ring * cosine(v), ring * sine(v)
    sign = np.where(z < 0, -1.0, 1.0)
    a = -1 / (sign + z)
    b = x * y * a
    return (np.stack([x, y, z], -1), np.stack([1 + sign * x * x * a, sign * b, -sign * x], -1),
            np.stack([b, sign + y * y * a, -y], -1))


def place(path, draws, settings):
    """Put the paths before the camera so that every whole dot of every frame is inside the image.

    Depth and start are drawn from exactly those for which that holds. A path too wide for the depth
    it got is shrunk as a whole; that leaves at least one start, since the nearest frame's field of
    view is the narrowest.
    """
    low, high = np.minimum(path.min(1), 0), np.maximum(path.max(1), 0)
    depth = NEAR - low[:, 2] + draws[:, 7] * (FAR - high[:, 2] - (NEAR - low[:, 2]))
    largest_dot = settings.size * DOT_RADIUS / NEAR
    half = ((settings.size - 1) / 2 - largest_dot - 1) / settings.size  # field of view at depth 1
    widest = (path.max(1) - path.min(1))[:, :2].max(1)
    nearest = depth + low[:, 2]
    path = path * np.minimum(1, 2 * half * nearest / np.maximum(widest, 1e-9))[:, None, None]
    path[..., 2] += depth[:, None]
    for axis in (0, 1):
        reach = half * path[..., 2]
        low, high = (-reach - path[..., axis]).max(1), (reach - path[..., axis]).min(1)
        where = draws[:, 8 + axis] if settings.augment else 0.25 + 0.5 * draws[:, 8 + axis]
        path[..., axis] += (low + where * (high - low))[:, None]
    return path


def draw_dots(videos, centre, radius, colour, settings, first, stop):
    """Draw one anti-aliased disc a frame: centre (n, T, 2) and radius (n, T) in pixels, colour
    (n, 3) in [0, 1). Only the small square around each dot is computed: most pixels are black."""
    n, t, c, height, width = videos.shape
    reach = settings.size * DOT_RADIUS / NEAR + 0.5
    side = int(2 * reach) + 1
    corner = np.ceil(centre - reach)
    span = np.arange(side)
    offset = (corner - centre).astype(np.float32)[..., None] + span.astype(np.float32)
    square = offset ** 2        # (n, T, 2, side)
    distance = np.sqrt(square[:, :, 1, :, None] + square[:, :, 0, None, :])
    # Coverage falls over the pixel that the edge crosses: symmetric, so the centroid is the centre.
    radius = radius.astype(np.float32)[..., None, None]
    value = np.clip(radius + np.float32(0.5) - distance, 0, 1)
    value = value[:, :, None] * np.float32(BRIGHTNESS)
    if c == 3:
        value = value * (0.4 + 0.6 * colour).astype(np.float32)[:, None, :, None, None]
    if settings.augment:
        count = t * c * side * side
        words = random_words(settings.seed, 1, first, stop, -(-count // 32) * 4)
        noise = words.astype("<u8", copy=False).view(np.uint8)[:, :count].reshape(value.shape)
        value *= np.float32(1 - NOISE) + noise.astype(np.float32) * np.float32(2 * NOISE / 255)
    corner = corner.astype(np.intp)
    frame = np.arange(n * t * c).reshape(n, t, c, 1, 1) * (height * width)
    pixel = ((corner[:, :, 1, None, None] + span[:, None]) * width
             + corner[:, :, 0, None, None] + span)[:, :, None]
    videos[:] = 0
    # the cast to uint8 cuts, so this rounds
    videos.reshape(-1)[frame + pixel] = value + np.float32(0.5)


# --------------------------------------------------------------------------------------------------
# Checkpoint files

def npz_bytes(arrays):
    """The arrays as the bytes of a compressed .npz, the same every time (no time of day inside).

    Level 1: on long runs of black the higher ones save a tenth and take twice as long.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(member, header)
                member.write(array.reshape(-1).view(np.uint8).data)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
