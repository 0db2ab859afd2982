"""The promises of generate.py: the data set, the same bytes however the work is cut, the command line."""
import contextlib
import hashlib
import json
import os
import re

import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import kill, peak_memory, run, start, wait_for

import generate
from checkpointing import find_checkpoints, read_progress


def samples(settings=generate.Settings(), n=1000, cut=200, first=0):
    arrays = generate.empty_arrays(settings, n)
    for at in range(0, n, cut):
        part = [a[at:at + cut] for a in arrays.values()]
        generate.render(settings, first + at, first + at + len(part[0]), part)
    return arrays


def digest(arrays):
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays.values())).hexdigest()


def contents(directory):
    return [np.load(path) for _, path in find_checkpoints(directory)]


# -- the data set


@pytest.mark.parametrize("frames, size, channels", [(8, 32, 1), (8, 32, 3), (16, 64, 1), (16, 64, 3), (5, 17, 1)])
@pytest.mark.parametrize("augment", [True, False])
def test_names_shapes_types_and_finite_values(frames, size, channels, augment):
    arrays = samples(generate.Settings(frames=frames, size=size, channels=channels, augment=augment), 64)
    assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == {
        "videos": ("uint8", (64, frames, channels, size, size)), "labels": ("int64", (64,)),
        "trajectory_3d": ("float32", (64, frames, 3)), "trajectory_2d": ("float32", (64, frames, 2))}
    assert np.isfinite(arrays["trajectory_2d"]).all() and np.isfinite(arrays["trajectory_3d"]).all()
    assert (arrays["videos"].max((2, 3, 4)) > 60).all(), "a frame without a dot"


def test_the_classes_are_balanced_and_the_label_is_the_index_mod_4():
    labels = samples(n=1000, first=6)["labels"]
    assert (labels == (np.arange(6, 1006) % 4)).all()
    assert (np.bincount(labels) == 250).all()


@pytest.mark.parametrize("settings", [generate.Settings(), generate.Settings(augment=False),
                                      generate.Settings(frames=16, size=64, channels=3), generate.Settings(seed=2**64 - 1)])
def test_every_dot_is_inside_and_where_trajectory_2d_says(settings):
    arrays = samples(settings, 2000 if settings.size == 32 else 400, 100)
    centre = arrays["trajectory_2d"]
    assert centre.min() >= 0 and centre.max() <= settings.size - 1
    image = arrays["videos"].astype(np.float64).sum(2)
    axis, mass = np.arange(settings.size), image.sum((2, 3))
    centroid = np.stack([(image.sum(2) * axis).sum(2) / mass, (image.sum(3) * axis).sum(2) / mass], -1)
    assert np.abs(centroid - centre).max() <= 0.15
    edges = image[:, :, [0, -1]].sum() + image[:, :, :, [0, -1]].sum()
    assert edges == 0, "a dot is cut off by the border"


def test_trajectory_2d_is_the_pinhole_image_of_trajectory_3d_and_the_dot_shrinks_with_depth():
    arrays = samples()
    x, y, z = np.moveaxis(arrays["trajectory_3d"].astype(np.float64), -1, 0)
    assert z.min() >= generate.NEAR - 1e-6 and z.max() <= generate.FAR + 1e-6
    expected = 15.5 + 32 * np.stack([x / z, y / z], -1)
    assert np.abs(arrays["trajectory_2d"] - expected).max() < 1e-4
    radius = np.sqrt(arrays["videos"].astype(np.float64).sum((2, 3, 4)) / generate.BRIGHTNESS / np.pi)
    assert np.corrcoef(radius.ravel(), 1 / z.ravel())[0, 1] > 0.98


def test_each_class_moves_as_its_name_says():
    settings = generate.Settings(frames=16)
    arrays = samples(settings)
    path, labels = arrays["trajectory_3d"].astype(np.float64), arrays["labels"]
    velocity = np.diff(path, axis=1)
    third = np.diff(path, n=3, axis=1)
    assert np.abs(np.diff(velocity[labels == 0], axis=1)).max() < 1e-5, "linear: constant velocity"
    assert np.abs(third[labels == 3]).max() < 1e-5, "parabolic: constant acceleration"
    speed = np.linalg.norm(velocity, axis=-1)
    for label in (1, 2):
        assert np.abs(speed[labels == label] / speed[labels == label].mean(1, keepdims=True) - 1).max() < 1e-3
    rank = np.linalg.svd(path - path.mean(1, keepdims=True), compute_uv=False)
    assert rank[labels == 1, 2].max() < 1e-4, "circular: in a plane"
    assert np.median(rank[labels == 2, 2]) > 0.1, "helical: not in a plane"


def test_the_four_classes_are_told_apart_from_trajectory_2d_and_dot_size():
    """Nearest neighbours on how badly each kind of path fits the points; features a person would think of."""
    arrays = samples(n=4000)
    radius = np.sqrt(arrays["videos"].astype(np.float64).sum((2, 3, 4)) / generate.BRIGHTNESS / np.pi)
    depth = 32 * generate.DOT_RADIUS / radius
    points = np.concatenate([(arrays["trajectory_2d"] - 15.5) * depth[..., None] / 32, depth[..., None]], -1)
    t = np.linspace(0, 1, 8)

    def misfit(*columns):
        q, _ = np.linalg.qr(np.stack([np.ones(8), *columns], 1))
        return ((points - q @ (q.T @ points)) ** 2).sum((1, 2))

    turns = [(np.cos(2 * np.pi * w * t), np.sin(2 * np.pi * w * t)) for w in np.linspace(1.15, 2.05, 19)]
    features = np.log(1e-5 + np.stack([
        misfit(t), misfit(t, t * t), np.min([misfit(*w) for w in turns], 0), np.min([misfit(t, *w) for w in turns], 0)], 1))
    features = (features - features.mean(0)) / features.std(0)
    train, test = features[:2000], features[2000:]
    near = ((test[:, None] - train) ** 2).sum(-1).argpartition(9, axis=1)[:, :9]
    votes = np.stack([(arrays["labels"][near] == k).sum(1) for k in range(4)], 1)
    accuracy = (votes.argmax(1) == arrays["labels"][2000:]).mean()
    assert accuracy >= 0.97, f"{accuracy:.3f}"


def test_a_nearest_neighbour_cannot_predict_the_future():
    """The training video whose first four frames match best misses the last four by pixels: nothing starts the same."""
    arrays = samples(n=5000)
    points = arrays["trajectory_2d"]
    train, test = points[:4500], points[4500:]
    near = ((test[:, None, :4] - train[:, :4]) ** 2).sum((2, 3)).argmin(1)
    error = np.linalg.norm(train[near, 4:] - test[:, 4:], axis=-1).mean()
    assert error > 1.5, f"{error:.2f} px"


def test_augmentation_changes_the_videos_and_without_it_gravity_points_down():
    plain, augmented = samples(generate.Settings(augment=False)), samples()
    assert (plain["videos"] != augmented["videos"]).any((1, 2, 3, 4)).all()
    falling = np.diff(plain["trajectory_3d"][plain["labels"] == 3], n=2, axis=1)
    assert (falling[..., 1] > 0).all() and np.abs(falling[..., [0, 2]]).max() < 1e-5


# -- the same bytes


def test_sample_i_is_the_same_however_the_work_is_cut():
    whole = samples(n=600, cut=600)
    for cut in (1, 7, 200):
        assert digest(samples(n=600, cut=cut)) == digest(whole)
    later = samples(n=100, first=500)
    assert all((later[name] == whole[name][500:]).all() for name in whole)


@pytest.mark.parametrize("other", [{"seed": 43}, {"augment": False}])
def test_other_settings_give_other_videos(other):
    assert digest(samples(n=20)) != digest(samples(generate.Settings(**other), n=20))


def test_no_two_samples_are_alike():
    videos = samples(n=2000)["videos"]
    assert len({v.tobytes() for v in videos}) == 2000


def test_the_bytes_are_those_of_recipe_1():
    """Everyone's data sets depend on this: a change here needs a new RECIPE, which refuses to extend old sets."""
    assert generate.RECIPE == 1
    assert digest(samples(n=64)) == "20cec82aa0db53ee14fdb06464ca81469bd998a5710e44787c4aa51addf3da01"


def test_the_sine_needs_no_library_and_is_right():
    turns = np.linspace(-3, 3, 10001)
    assert np.abs(generate.sine(turns) - np.sin(2 * np.pi * turns)).max() < 1e-11
    assert np.abs(generate.cosine(turns) - np.cos(2 * np.pi * turns)).max() < 1e-11


# -- the run


def test_checkpoints_are_at_the_right_places_with_the_right_counts(tmp_path):
    done = run("generate.py", "--n", 2500, "--every", 1000, "--out", tmp_path)
    assert [n for n, _ in find_checkpoints(tmp_path)] == [0, 1000, 2000]
    assert [len(c["labels"]) for c in contents(tmp_path)] == [1000, 1000, 500]
    progress = read_progress(tmp_path / "PROGRESS.txt")
    assert progress["Status"] == "COMPLETE" and progress["Progress"] == "2500/2500 samples (100%)"
    assert progress["Checkpoint"] == "2500 (checkpoint_02000.npz)"
    assert (tmp_path / "PROGRESS.txt").read_text().startswith("Dataset generation\n")
    lines = [line for line in done.stdout.splitlines() if line.startswith("checkpoint_")]
    assert len(lines) == 3
    assert re.fullmatch(r"checkpoint_00000.npz  1000/2500 samples \(40.0%\)  \d+\.\d samples/s  ETA \d+ s", lines[0])


def test_a_complete_run_called_again_says_so_and_touches_nothing(tmp_path):
    run("generate.py", "--n", 100, "--out", tmp_path)
    files = lambda: {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()   # noqa: E731
                     if p.name != ".lock"}
    before = files()
    assert "complete" in run("generate.py", "--n", 100, "--out", tmp_path).stdout
    assert files() == before


def test_killed_between_the_last_checkpoint_and_the_last_word_the_next_start_says_complete(tmp_path):
    run("generate.py", "--n", 100, "--out", tmp_path)
    text = (tmp_path / "PROGRESS.txt").read_text().replace("COMPLETE", "RUNNING")
    (tmp_path / "PROGRESS.txt").write_text(text)
    run("generate.py", "--n", 100, "--out", tmp_path)
    assert read_progress(tmp_path / "PROGRESS.txt")["Status"] == "COMPLETE"


def test_it_resumes_from_every_possible_last_checkpoint(tmp_path):
    reference = [c["videos"].tobytes() for c in run_contents(tmp_path / "whole")]
    for last in range(6):
        out = tmp_path / str(last)
        run("generate.py", "--n", 600, "--every", 100, "--out", out)
        for number, path in find_checkpoints(out):
            if number >= last * 100:
                path.unlink()
        (out / "PROGRESS.txt").unlink()
        kept = [path.stat().st_mtime_ns for _, path in find_checkpoints(out)]
        assert [c["videos"].tobytes() for c in run_contents(out)] == reference
        assert [path.stat().st_mtime_ns for _, path in find_checkpoints(out)][:last] == kept


def run_contents(out):
    run("generate.py", "--n", 600, "--every", 100, "--out", out)
    return contents(out)


def test_a_piece_that_takes_too_long_is_saved_in_parts(tmp_path):
    run("generate.py", "--n", 2000, "--every", 1000, "--max-minutes", 0.00001, "--out", tmp_path)
    starts = [n for n, _ in find_checkpoints(tmp_path)]
    assert len(starts) > 4 and 1000 in starts
    assert (np.concatenate([c["videos"] for c in contents(tmp_path)]) == samples(n=2000)["videos"]).all()


@pytest.mark.parametrize("signal_, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_shorter_checkpoint_and_leaves_within_two_seconds(tmp_path, signal_, code):
    process = start("generate.py", "--n", 10**6, "--every", 10**5, "--out", tmp_path)
    wait_for(lambda: (tmp_path / "PROGRESS.txt").exists(), "the start")
    time.sleep(0.5)
    process.send_signal(signal_)
    process.communicate(timeout=2)   # raises if it takes longer: the promise
    assert process.returncode == code
    saved = sum(len(c["labels"]) for c in contents(tmp_path))
    progress = read_progress(tmp_path / "PROGRESS.txt")
    assert 0 < saved < 10**6 and progress["Status"] == "INTERRUPTED" and progress["Checkpoint"].startswith(f"{saved} ")


def test_the_set_can_be_extended_but_not_shrunk_and_every_may_change(tmp_path):
    run("generate.py", "--n", 500, "--every", 200, "--out", tmp_path)
    run("generate.py", "--n", 1000, "--every", 300, "--out", tmp_path)
    assert [n for n, _ in find_checkpoints(tmp_path)] == [0, 200, 400, 500, 600, 900]
    assert (np.concatenate([c["videos"] for c in contents(tmp_path)]) == samples(n=1000)["videos"]).all()
    assert "n was 1000, asked 500 (it may only grow)" in run("generate.py", "--n", 500, "--out", tmp_path, code=2).stderr
    done = run("generate.py", "--n", 1000, "--seed", 7, "--size", 16, "--no-augment", "--out", tmp_path, code=2)
    for difference in ("seed was 42, asked 7", "size was 32, asked 16", "augment was true, asked false"):
        assert difference in done.stderr


def test_shards_are_runs_of_their_own_that_make_up_the_whole(tmp_path):
    for part in (1, 2, 3):
        run("generate.py", "--n", 1000, "--every", 200, "--shard", f"{part}/3", "--out", tmp_path)
    found = [np.concatenate([c["videos"] for c in contents(tmp_path / f"shard_{part}_of_3")]) for part in (1, 2, 3)]
    assert [len(videos) for videos in found] == [333, 333, 334]
    assert (np.concatenate(found) == samples(n=1000)["videos"]).all()
    again = run("generate.py", "--n", 2000, "--shard", "1/3", "--out", tmp_path, code=2)
    assert "n was 1000, asked 2000" in again.stderr   # the parts' borders would move


def test_two_processes_cannot_share_a_directory(tmp_path):
    process = start("generate.py", "--n", 10**6, "--out", tmp_path)
    wait_for(lambda: (tmp_path / "PROGRESS.txt").exists(), "the first process")
    assert f"PID {process.pid}" in run("generate.py", "--n", 10**6, "--out", tmp_path, code=75).stderr
    kill(process)


@pytest.mark.parametrize("arguments, words", [
    (["--n", 3], "--n must be"), (["--n", "many"], "invalid int value"), (["--every", 0], "--every must be"),
    (["--seed", -1], "--seed must be"), (["--seed", 2**64], "--seed must be"), (["--frames", 1], "--frames must be"),
    (["--size", 8], "--size must be"), (["--channels", 2], "--channels must be"), (["--max-minutes", 0], "--max-minutes"),
    (["--max-minutes", "nan"], "--max-minutes"), (["--heartbeat", 0], "--heartbeat"), (["--shard", "0/3"], "--shard must be"),
    (["--shard", "4/3"], "--shard must be"), (["--shard", "x"], "--shard must be"), (["--nonsense"], "unrecognized"),
    (["--size", 512, "--frames", 256, "--every", 2000], "bytes of memory")])
def test_wrong_arguments_are_one_line_and_exit_code_2(tmp_path, arguments, words):
    assert words in run("generate.py", "--out", tmp_path / "out", *arguments, code=2).stderr
    assert not (tmp_path / "out").exists()


def test_help_says_units_and_defaults():
    text = " ".join(run("generate.py", "--help").stdout.split())
    for words in ("(default 30000)", "(default 2000)", "pixels", "seconds", "minutes", "(default results)"):
        assert words in text


def test_memory_does_not_grow_with_n(tmp_path):
    """Peak memory of the process for 2,000 and 12,000 samples, equal within a fifth; benchmarks/ has the full figure."""
    peaks = [peak_memory("generate.py", "--n", n, "--every", 1000, "--out", tmp_path / str(n)) for n in (2000, 12000)]
    assert peaks[1] < 1.2 * peaks[0]


def test_a_full_disk_ends_in_failed_and_a_restart_continues_once_there_is_room(small_disk):
    disk = small_disk(3 << 20)
    other, out = disk / "other", disk / "out"
    done = run("generate.py", "--n", 20000, "--out", out, code=1)   # these would take some 8 MB
    assert "needs about" in done.stderr and not find_checkpoints(out)
    process = start("generate.py", "--n", 5000, "--every", 100, "--out", out)   # 2 MB fit, but others write too
    wait_for(lambda: len(find_checkpoints(out)) >= 2, "two checkpoints")
    process.send_signal(signal.SIGSTOP)
    with open(other, "wb", 0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    process.send_signal(signal.SIGCONT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 1 and re.search("No space left on device: wanted [\\d,]+ bytes, [\\d,]+ free", output)
    assert read_progress(out / "PROGRESS.txt")["Status"] == "FAILED"
    before = [path.read_bytes() for _, path in find_checkpoints(out)]
    other.unlink()
    run("generate.py", "--n", 5000, "--every", 100, "--out", out)
    assert [path.read_bytes() for _, path in find_checkpoints(out)][:len(before)] == before
    assert (np.concatenate([c["videos"] for c in contents(out)]) == samples(n=5000)["videos"]).all()


def test_no_worker_processes_are_started(tmp_path):
    process = start("generate.py", "--n", 10**5, "--out", tmp_path, stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "PROGRESS.txt").exists(), "the start")
    children = open(f"/proc/{process.pid}/task/{process.pid}/children").read() if os.path.exists("/proc/self/task") else ""
    kill(process)
    assert not children.strip()


def test_run_json_keeps_what_decides_the_result(tmp_path):
    run("generate.py", "--n", 8, "--out", tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == {
        "recipe": 1, "n": 8, "seed": 42, "frames": 8, "size": 32, "channels": 1, "augment": True, "shard": None}


def test_30000_videos_take_less_than_20_megabytes():
    size = len(generate.npz_bytes(samples(n=2000)))
    assert 15 * size < 20e6


