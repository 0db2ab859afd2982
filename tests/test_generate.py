"""The promises of generate.py: the data set, the same bytes however the work is cut, its run."""
import contextlib
import hashlib
import re
import signal

import numpy as np
import pytest
from conftest import kill, numbers, run, start, wait_for
from test_videos import call  # noqa: F401

import generate
from checkpointing import read_progress


def samples(settings=generate.Settings(), n=1000, cut=200, first=0):
    arrays = generate.empty_arrays(settings, n)
    for at in range(0, n, cut):
        part = [a[at:at + cut] for a in arrays.values()]
        generate.render(settings, first + at, first + at + len(part[0]), part)
    return arrays


def digest(arrays):
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays.values())).hexdigest()


def contents(directory):
    return [np.load(directory / f"checkpoint_{start:05d}.npz") for start in numbers(directory)]


def made(directory):
    return np.concatenate([content["videos"] for content in contents(directory)])


def files(directory):
    """What the checkpoints hold, by their names."""
    return {path.name: path.read_bytes() for path in directory.glob("checkpoint_*.npz")}


# -- the data set


@pytest.mark.parametrize("frames, size, channels, augment", [
    (8, 32, 1, True), (8, 32, 3, False), (16, 64, 3, True), (5, 17, 1, True)])
def test_names_shapes_types_finite_values_and_a_dot_in_every_frame(frames, size, channels, augment):
    arrays = samples(generate.Settings(frames=frames, size=size, channels=channels,
                                       augment=augment), 64)
    assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == {
        "videos": ("uint8", (64, frames, channels, size, size)), "labels": ("int64", (64,)),
        "trajectory_3d": ("float32", (64, frames, 3)),
        "trajectory_2d": ("float32", (64, frames, 2))}
    assert all(np.isfinite(arrays[name]).all() for name in ("trajectory_2d", "trajectory_3d"))
    assert (arrays["videos"].max((2, 3, 4)) > 60).all(), "a frame without a dot"


@pytest.mark.parametrize("settings", [
    generate.Settings(), generate.Settings(augment=False), generate.Settings(seed=2**64 - 1),
    generate.Settings(frames=16, size=64, channels=3)])
def test_every_dot_is_inside_and_where_trajectory_2d_says(settings):
    arrays = samples(settings, 2000 if settings.size == 32 else 200, 100)
    centre = arrays["trajectory_2d"]
    assert centre.min() >= 0 and centre.max() <= settings.size - 1
    image = arrays["videos"].astype(np.float64).sum(2)
    axis, mass = np.arange(settings.size), image.sum((2, 3))
    centroid = np.stack([(image.sum(2) * axis).sum(2), (image.sum(3) * axis).sum(2)], -1)
    assert np.abs(centroid / mass[..., None] - centre).max() <= 0.15
    edges = image[:, :, [0, -1]].sum() + image[:, :, :, [0, -1]].sum()
    assert edges == 0, "a dot is cut off by the border"


def test_trajectory_2d_is_the_image_of_trajectory_3d_and_the_dot_shrinks_with_depth():
    arrays = samples()
    x, y, z = np.moveaxis(arrays["trajectory_3d"].astype(np.float64), -1, 0)
    assert z.min() >= generate.NEAR - 1e-6 and z.max() <= generate.FAR + 1e-6
    expected = 15.5 + 32 * np.stack([x / z, y / z], -1)
    assert np.abs(arrays["trajectory_2d"] - expected).max() < 1e-4
    light = arrays["videos"].astype(np.float64).sum((2, 3, 4))
    assert np.corrcoef(np.sqrt(light).ravel(), 1 / z.ravel())[0, 1] > 0.98


def test_each_class_moves_as_its_name_says():
    arrays = samples(generate.Settings(frames=16))
    path, labels = arrays["trajectory_3d"].astype(np.float64), arrays["labels"]
    velocity = np.diff(path, axis=1)
    third = np.diff(path, n=3, axis=1)
    assert np.abs(np.diff(velocity[labels == 0], axis=1)).max() < 1e-5, "linear: constant velocity"
    assert np.abs(third[labels == 3]).max() < 1e-5, "parabolic: constant acceleration"
    speed = np.linalg.norm(velocity, axis=-1)
    for label in (1, 2):
        mine = speed[labels == label]
        assert np.abs(mine / mine.mean(1, keepdims=True) - 1).max() < 1e-3, "constant speed"
    rank = np.linalg.svd(path - path.mean(1, keepdims=True), compute_uv=False)
    assert rank[labels == 1, 2].max() < 1e-4, "circular: in a plane"
    assert np.median(rank[labels == 2, 2]) > 0.1, "helical: not in a plane"


def test_augmentation_changes_the_videos_and_without_it_gravity_points_down():
    plain, augmented = samples(generate.Settings(augment=False)), samples()
    assert (plain["videos"] != augmented["videos"]).any((1, 2, 3, 4)).all()
    falling = np.diff(plain["trajectory_3d"][plain["labels"] == 3], n=2, axis=1)
    assert (falling[..., 1] > 0).all() and np.abs(falling[..., [0, 2]]).max() < 1e-5


# -- the same bytes


def test_sample_i_is_the_same_however_the_work_is_cut_and_its_label_is_i_mod_4():
    whole = samples(n=600, cut=600)
    for cut in (1, 7, 200):
        assert digest(samples(n=600, cut=cut)) == digest(whole)
    later = samples(n=100, first=501)
    assert all((later[name][:99] == whole[name][501:]).all() for name in whole)
    assert (later["labels"] == np.arange(501, 601) % 4).all()


def test_no_two_samples_are_alike_whatever_the_seed():
    sets = [samples(n=1000)["videos"], samples(generate.Settings(seed=43))["videos"]]
    assert len({video.tobytes() for videos in sets for video in videos}) == 2000


def test_the_bytes_are_those_of_recipe_1():
    """A change here needs a new RECIPE, which refuses to extend the data sets of others."""
    assert generate.RECIPE == 1
    assert digest(samples(n=64)) == (
        "20cec82aa0db53ee14fdb06464ca81469bd998a5710e44787c4aa51addf3da01")


# -- the run


def test_checkpoints_are_at_the_right_places_with_the_right_counts(tmp_path):
    done = run("generate.py", "--n", 2500, "--every", 1000, "--out", tmp_path)
    assert numbers(tmp_path) == [0, 1000, 2000]
    assert [len(c["labels"]) for c in contents(tmp_path)] == [1000, 1000, 500]
    progress = read_progress(tmp_path / "PROGRESS.txt")
    assert progress["Status"] == "COMPLETE" and progress["Progress"] == "2500/2500 samples (100%)"
    assert progress["Checkpoint"] == "2500 (checkpoint_02000.npz)"
    assert (tmp_path / "PROGRESS.txt").read_text().startswith("Dataset generation\n")
    lines = [line for line in done.stderr.splitlines() if line.startswith("checkpoint_")]
    assert len(lines) == 3 and not done.stdout
    assert re.fullmatch(r"checkpoint_00000.npz  1000/2500 samples \(40.0%\)  \d+\.\d samples/s  "
                        r"ETA \d+ s", lines[0])


def test_a_complete_run_called_again_touches_nothing_or_says_the_last_word(tmp_path):
    run("generate.py", "--n", 100, "--out", tmp_path)
    there = [path for path in tmp_path.iterdir() if path.name != ".lock"]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in there]
    assert "complete" in run("generate.py", "--n", 100, "--out", tmp_path).stderr
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in there] == before
    progress = tmp_path / "PROGRESS.txt"        # as a kill would leave it that came before the end
    progress.write_text(progress.read_text().replace("COMPLETE", "RUNNING"))
    run("generate.py", "--n", 100, "--out", tmp_path)
    assert read_progress(progress)["Status"] == "COMPLETE"


def test_killed_at_any_checkpoint_it_makes_the_same_files(tmp_path):
    """SIGKILL again and again, as soon as there is one checkpoint more."""
    arguments, out = ("generate.py", "--n", 4000, "--every", 250, "--out"), tmp_path / "killed"
    run(*arguments, tmp_path / "whole")
    for number in range(1, 5):
        process = start(*arguments, out)
        wait_for(lambda: len(files(out)) >= number, f"checkpoint {number}")
        kill(process)
    run(*arguments, out)
    assert files(out) == files(tmp_path / "whole")
    assert not list(out.glob(".*.tmp")) and not list(out.glob("*.corrupt"))


def test_a_piece_that_takes_too_long_is_saved_in_parts(tmp_path):
    run("generate.py", "--n", 2000, "--every", 1000, "--max-minutes", 0.00001, "--out", tmp_path)
    assert len(numbers(tmp_path)) > 4 and 1000 in numbers(tmp_path)
    assert (made(tmp_path) == samples(n=2000)["videos"]).all()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_shorter_checkpoint(tmp_path, number, code):
    process = start("generate.py", "--n", 10**6, "--every", 10**5, "--out", tmp_path,
                    "--heartbeat", 0.05)
    wait_for(lambda: not read_progress(tmp_path / "PROGRESS.txt").get(
        "Progress", "0/").startswith("0/"), "the first samples")
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == code and "Traceback" not in output
    saved, progress = len(made(tmp_path)), read_progress(tmp_path / "PROGRESS.txt")
    assert 0 < saved < 10**5 and progress["Status"] == "INTERRUPTED"
    assert progress["Checkpoint"].startswith(f"{saved} ")


def test_the_set_can_be_extended_but_not_shrunk_and_every_may_change(tmp_path):
    run("generate.py", "--n", 500, "--every", 200, "--out", tmp_path)
    run("generate.py", "--n", 1000, "--every", 300, "--out", tmp_path)
    assert numbers(tmp_path) == [0, 200, 400, 500, 600, 900]
    assert (made(tmp_path) == samples(n=1000)["videos"]).all()
    refused = run("generate.py", "--n", 500, "--seed", 7, "--frames", 9, "--size", 16,
                  "--channels", 3, "--no-augment", "--out", tmp_path, code=2).stderr
    for difference in ("n was 1000, asked 500 (it may only grow)", "seed was 42, asked 7",
                       "frames was 8, asked 9", "size was 32, asked 16",
                       "channels was 1, asked 3", "augment was true, asked false"):
        assert difference in refused


def test_shards_are_runs_of_their_own_that_make_up_the_whole(tmp_path):
    parts = [tmp_path / f"shard_{part}_of_3" for part in (1, 2, 3)]
    for part in (1, 2, 3):
        run("generate.py", "--n", 1000, "--every", 200, "--shard", f"{part}/3", "--out", tmp_path)
    assert [len(made(part)) for part in parts] == [333, 333, 334]
    assert (np.concatenate([made(part) for part in parts]) == samples(n=1000)["videos"]).all()
    again = run("generate.py", "--n", 2000, "--shard", "1/3", "--out", tmp_path, code=2)
    assert "n was 1000, asked 2000" in again.stderr   # the parts' borders would move


@pytest.mark.parametrize("arguments, words", [
    (["--n", 3], "--n must be"), (["--n", "many"], "invalid int value"),
    (["--every", 0], "--every must be"), (["--seed", 2**64], "--seed must be"),
    (["--frames", 1], "--frames must be"), (["--size", 8], "--size must be"),
    (["--channels", 2], "--channels must be"), (["--max-minutes", "nan"], "--max-minutes"),
    (["--heartbeat", 0], "--heartbeat"), (["--shard", "0/3"], "--shard must be"),
    (["--shard", "4/3"], "--shard must be"), (["--nonsense"], "unrecognized"),
    (["--size", 512, "--frames", 256, "--every", 2000], "bytes of memory")])
def test_wrong_arguments_are_one_line_and_exit_code_2(tmp_path, call, arguments, words):
    assert words in call(generate, "--out", tmp_path / "out", *arguments, code=2)
    assert not (tmp_path / "out").exists()


def test_help_says_units_and_defaults():
    text = " ".join(run("generate.py", "--help").stdout.split())
    for words in ("(default 30000)", "(default 2000)", "pixels", "seconds", "minutes"):
        assert words in text


def test_a_full_disk_ends_in_failed_and_a_restart_goes_on_once_there_is_room(small_disk):
    disk = small_disk(3 << 20)
    other, out = disk / "other", disk / "out"
    process = start("generate.py", "--n", 5000, "--every", 100, "--out", out)   # 2 MB: they fit
    wait_for(lambda: len(files(out)) >= 2, "two checkpoints")
    process.send_signal(signal.SIGSTOP)
    with open(other, "wb", 0) as file, contextlib.suppress(OSError):    # but others write, too
        while True:
            file.write(bytes(4096))
    process.send_signal(signal.SIGCONT)
    output = process.communicate()[0]
    assert process.returncode == 1 and "Traceback" not in output
    assert re.search(r"not saved, No space left on device, [\d,]+ bytes are free", output)
    assert read_progress(out / "PROGRESS.txt")["Status"] == "FAILED"
    before = files(out)
    other.unlink()
    run("generate.py", "--n", 5000, "--every", 100, "--out", out)
    assert files(out).items() >= before.items()
    assert (made(out) == samples(n=5000)["videos"]).all()
