"""The promises of generate.py: the data set, the same bytes however the work is cut, its run."""
import contextlib
import hashlib
import json
import re
import signal

import numpy as np
import pytest
from conftest import kill, peak_memory, run, start, wait_for

import generate
from checkpointing import read_progress, read_records


def samples(settings=generate.Settings(), n=1000, cut=200, first=0):
    arrays = generate.empty_arrays(settings, n)
    for at in range(0, n, cut):
        part = [a[at:at + cut] for a in arrays.values()]
        generate.render(settings, first + at, first + at + len(part[0]), part)
    return arrays


def digest(arrays):
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays.values())).hexdigest()


def starts(directory):
    """First samples of the checkpoints that are there."""
    records = read_records(directory).values()
    return [record["start"] for record in records if (directory / record["name"]).exists()]


def contents(directory):
    return [np.load(directory / f"checkpoint_{start:05d}.npz") for start in starts(directory)]


def made(directory):
    return np.concatenate([content["videos"] for content in contents(directory)])


# -- the data set


@pytest.mark.parametrize("frames, size, channels, augment", [
    (8, 32, 1, True), (8, 32, 3, False), (16, 64, 3, True), (5, 17, 1, True)])
def test_names_shapes_types_and_finite_values(frames, size, channels, augment):
    arrays = samples(generate.Settings(frames=frames, size=size, channels=channels,
                                       augment=augment), 64)
    assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == {
        "videos": ("uint8", (64, frames, channels, size, size)), "labels": ("int64", (64,)),
        "trajectory_3d": ("float32", (64, frames, 3)),
        "trajectory_2d": ("float32", (64, frames, 2))}
    assert all(np.isfinite(arrays[name]).all() for name in ("trajectory_2d", "trajectory_3d"))
    assert (arrays["videos"].max((2, 3, 4)) > 60).all(), "a frame without a dot"


def test_the_classes_are_balanced_and_the_label_is_the_index_mod_4():
    labels = samples(n=1000, first=6)["labels"]
    assert (labels == (np.arange(6, 1006) % 4)).all()
    assert (np.bincount(labels) == 250).all()


@pytest.mark.parametrize("settings", [
    generate.Settings(), generate.Settings(augment=False), generate.Settings(seed=2**64 - 1),
    generate.Settings(frames=16, size=64, channels=3)])
def test_every_dot_is_inside_and_where_trajectory_2d_says(settings):
    arrays = samples(settings, 2000 if settings.size == 32 else 400, 100)
    centre = arrays["trajectory_2d"]
    assert centre.min() >= 0 and centre.max() <= settings.size - 1
    image = arrays["videos"].astype(np.float64).sum(2)
    axis, mass = np.arange(settings.size), image.sum((2, 3))
    centroid = np.stack([(image.sum(2) * axis).sum(2), (image.sum(3) * axis).sum(2)], -1)
    assert np.abs(centroid / mass[..., None] - centre).max() <= 0.15
    edges = image[:, :, [0, -1]].sum() + image[:, :, :, [0, -1]].sum()
    assert edges == 0, "a dot is cut off by the border"


def dot_radius(arrays):
    """Pixels, from the brightness of a whole frame."""
    light = arrays["videos"].astype(np.float64).sum((2, 3, 4))
    return np.sqrt(light / generate.BRIGHTNESS / np.pi)


def test_trajectory_2d_is_the_image_of_trajectory_3d_and_the_dot_shrinks_with_depth():
    arrays = samples()
    x, y, z = np.moveaxis(arrays["trajectory_3d"].astype(np.float64), -1, 0)
    assert z.min() >= generate.NEAR - 1e-6 and z.max() <= generate.FAR + 1e-6
    expected = 15.5 + 32 * np.stack([x / z, y / z], -1)
    assert np.abs(arrays["trajectory_2d"] - expected).max() < 1e-4
    assert np.corrcoef(dot_radius(arrays).ravel(), 1 / z.ravel())[0, 1] > 0.98


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
        mine = speed[labels == label]
        assert np.abs(mine / mine.mean(1, keepdims=True) - 1).max() < 1e-3, "constant speed"
    rank = np.linalg.svd(path - path.mean(1, keepdims=True), compute_uv=False)
    assert rank[labels == 1, 2].max() < 1e-4, "circular: in a plane"
    assert np.median(rank[labels == 2, 2]) > 0.1, "helical: not in a plane"


def test_the_four_classes_are_told_apart_from_trajectory_2d_and_dot_size():
    """Nearest neighbours on how badly each kind of path fits the points."""
    arrays = samples(n=4000)
    depth = (32 * generate.DOT_RADIUS / dot_radius(arrays))[..., None]
    points = np.concatenate([(arrays["trajectory_2d"] - 15.5) * depth / 32, depth], -1)
    t = np.linspace(0, 1, 8)

    def misfit(*columns):
        q, _ = np.linalg.qr(np.stack([np.ones(8), *columns], 1))
        return ((points - q @ (q.T @ points)) ** 2).sum((1, 2))

    turns = [(np.cos(2 * np.pi * w * t), np.sin(2 * np.pi * w * t))
             for w in np.linspace(1.15, 2.05, 19)]
    features = np.log(1e-5 + np.stack([
        misfit(t), misfit(t, t * t), np.min([misfit(*w) for w in turns], 0),
        np.min([misfit(t, *w) for w in turns], 0)], 1))
    features = (features - features.mean(0)) / features.std(0)
    train, test = features[:2000], features[2000:]
    near = ((test[:, None] - train) ** 2).sum(-1).argpartition(9, axis=1)[:, :9]
    votes = np.stack([(arrays["labels"][near] == k).sum(1) for k in range(4)], 1)
    accuracy = (votes.argmax(1) == arrays["labels"][2000:]).mean()
    assert accuracy >= 0.97, f"{accuracy:.3f}"


def test_a_nearest_neighbour_cannot_predict_the_future():
    """The video whose first four frames match best misses the last four by pixels."""
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
    """A change here needs a new RECIPE, which refuses to extend the data sets of others."""
    assert generate.RECIPE == 1
    assert digest(samples(n=64)) == (
        "20cec82aa0db53ee14fdb06464ca81469bd998a5710e44787c4aa51addf3da01")


def test_the_sine_needs_no_library_and_is_right():
    turns = np.linspace(-3, 3, 10001)
    assert np.abs(generate.sine(turns) - np.sin(2 * np.pi * turns)).max() < 1e-11
    assert np.abs(generate.cosine(turns) - np.cos(2 * np.pi * turns)).max() < 1e-11


# -- the run


def test_checkpoints_are_at_the_right_places_with_the_right_counts(tmp_path):
    done = run("generate.py", "--n", 2500, "--every", 1000, "--out", tmp_path)
    assert starts(tmp_path) == [0, 1000, 2000]
    assert [len(c["labels"]) for c in contents(tmp_path)] == [1000, 1000, 500]
    progress = read_progress(tmp_path / "PROGRESS.txt")
    assert progress["Status"] == "COMPLETE" and progress["Progress"] == "2500/2500 samples (100%)"
    assert progress["Checkpoint"] == "2500 (checkpoint_02000.npz)"
    assert (tmp_path / "PROGRESS.txt").read_text().startswith("Dataset generation\n")
    lines = [line for line in done.stderr.splitlines() if line.startswith("checkpoint_")]
    assert len(lines) == 3 and not done.stdout
    assert re.fullmatch(r"checkpoint_00000.npz  1000/2500 samples \(40.0%\)  \d+\.\d samples/s  "
                        r"ETA \d+ s", lines[0])


def test_a_complete_run_called_again_says_so_and_touches_nothing(tmp_path):
    run("generate.py", "--n", 100, "--out", tmp_path)
    files = [path for path in tmp_path.iterdir() if path.name != ".lock"]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    assert "complete" in run("generate.py", "--n", 100, "--out", tmp_path).stderr
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before


def test_killed_before_its_last_word_the_next_start_says_complete(tmp_path):
    run("generate.py", "--n", 100, "--out", tmp_path)
    text = (tmp_path / "PROGRESS.txt").read_text().replace("COMPLETE", "RUNNING")
    (tmp_path / "PROGRESS.txt").write_text(text)
    run("generate.py", "--n", 100, "--out", tmp_path)
    assert read_progress(tmp_path / "PROGRESS.txt")["Status"] == "COMPLETE"


def test_killed_at_any_checkpoint_it_makes_the_same_files(tmp_path):
    """SIGKILL again and again, as soon as there is one checkpoint more."""
    run("generate.py", "--n", 3000, "--every", 500, "--out", tmp_path / "whole")
    out, kills = tmp_path / "killed", 0
    for number in range(1, 6):
        process = start("generate.py", "--n", 3000, "--every", 500, "--out", out)
        wait_for(lambda: len(list(out.glob("checkpoint_*.npz"))) >= number, f"checkpoint {number}")
        if process.poll() is None:
            kill(process)
            kills += 1
    run("generate.py", "--n", 3000, "--every", 500, "--out", out)
    assert kills >= 3, "it was never at work when it was killed"
    for path in (tmp_path / "whole").glob("checkpoint_*.npz"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert not list(out.glob(".*.tmp")) and not list(out.glob("*.corrupt"))


def test_a_damaged_and_a_deleted_checkpoint_are_made_again(tmp_path):
    run("generate.py", "--n", 600, "--every", 100, "--out", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint_*.npz")}
    bad = tmp_path / "checkpoint_00200.npz"
    bad.write_bytes(bad.read_bytes()[:-1])
    (tmp_path / "checkpoint_00400.npz").unlink()
    said = run("generate.py", "--n", 600, "--every", 100, "--out", tmp_path).stderr
    assert f"{bad}: " in said and "Set aside as checkpoint_00200.npz.corrupt" in said
    assert {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint_*.npz")} == before
    for name in ("checkpoint_00100.npz", "checkpoint_00200.npz"):
        (tmp_path / name).unlink()
    assert start("runs.py", "verify", tmp_path).communicate()[0].count("missing") == 2
    run("generate.py", "--n", 600, "--every", 150, "--out", tmp_path)   # cut in another way
    assert "0 bad" in run("runs.py", "verify", tmp_path).stdout


def test_a_piece_that_takes_too_long_is_saved_in_parts(tmp_path):
    run("generate.py", "--n", 2000, "--every", 1000, "--max-minutes", 0.00001, "--out", tmp_path)
    assert len(starts(tmp_path)) > 4 and 1000 in starts(tmp_path)
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
    assert starts(tmp_path) == [0, 200, 400, 500, 600, 900]
    assert (made(tmp_path) == samples(n=1000)["videos"]).all()
    done = run("generate.py", "--n", 500, "--out", tmp_path, code=2)
    assert "n was 1000, asked 500 (it may only grow)" in done.stderr
    done = run("generate.py", "--n", 1000, "--seed", 7, "--size", 16, "--no-augment", "--out",
               tmp_path, code=2)
    for difference in ("seed was 42, asked 7", "size was 32, asked 16",
                       "augment was true, asked false"):
        assert difference in done.stderr


def test_shards_are_runs_of_their_own_that_make_up_the_whole(tmp_path):
    parts = [tmp_path / f"shard_{part}_of_3" for part in (1, 2, 3)]
    for part in (1, 2, 3):
        run("generate.py", "--n", 1000, "--every", 200, "--shard", f"{part}/3", "--out", tmp_path)
    assert [len(made(part)) for part in parts] == [333, 333, 334]
    assert (np.concatenate([made(part) for part in parts]) == samples(n=1000)["videos"]).all()
    again = run("generate.py", "--n", 2000, "--shard", "1/3", "--out", tmp_path, code=2)
    assert "n was 1000, asked 2000" in again.stderr   # the parts' borders would move


def test_two_processes_cannot_share_a_directory(tmp_path):
    process = start("generate.py", "--n", 10**6, "--out", tmp_path)
    wait_for(lambda: (tmp_path / "PROGRESS.txt").exists(), "the first process")
    refused = run("generate.py", "--n", 10**6, "--out", tmp_path, code=75)
    assert f"PID {process.pid}" in refused.stderr
    kill(process)


@pytest.mark.parametrize("arguments, words", [
    (["--n", 3], "--n must be"), (["--n", "many"], "invalid int value"),
    (["--every", 0], "--every must be"), (["--seed", 2**64], "--seed must be"),
    (["--frames", 1], "--frames must be"), (["--size", 8], "--size must be"),
    (["--channels", 2], "--channels must be"), (["--max-minutes", "nan"], "--max-minutes"),
    (["--heartbeat", 0], "--heartbeat"), (["--shard", "0/3"], "--shard must be"),
    (["--shard", "4/3"], "--shard must be"), (["--nonsense"], "unrecognized"),
    (["--size", 512, "--frames", 256, "--every", 2000], "bytes of memory")])
def test_wrong_arguments_are_one_line_and_exit_code_2(tmp_path, arguments, words):
    assert words in run("generate.py", "--out", tmp_path / "out", *arguments, code=2,
                        real=False).stderr
    assert not (tmp_path / "out").exists()


def test_help_says_units_and_defaults():
    text = " ".join(run("generate.py", "--help").stdout.split())
    for words in ("(default 30000)", "(default 2000)", "pixels", "seconds", "minutes"):
        assert words in text


def test_memory_does_not_grow_with_n(tmp_path):
    """Peak memory for 2,000 and 12,000 samples; benchmarks/ has the full figure."""
    peaks = [peak_memory("generate.py", "--n", n, "--every", 1000, "--out", tmp_path / str(n))
             for n in (2000, 12000)]
    assert peaks[1] < 1.2 * peaks[0]


def test_a_full_disk_ends_in_failed_and_a_restart_goes_on_once_there_is_room(small_disk):
    disk = small_disk(3 << 20)
    other, out = disk / "other", disk / "out"
    process = start("generate.py", "--n", 5000, "--every", 100, "--out", out)   # 2 MB: they fit
    wait_for(lambda: len(list(out.glob("checkpoint_*.npz"))) >= 2, "two checkpoints")
    process.send_signal(signal.SIGSTOP)
    with open(other, "wb", 0) as file, contextlib.suppress(OSError):    # but others write, too
        while True:
            file.write(bytes(4096))
    process.send_signal(signal.SIGCONT)
    output = process.communicate()[0]
    assert process.returncode == 1 and "Traceback" not in output
    assert re.search(r"not saved, No space left on device, [\d,]+ bytes are free", output)
    assert read_progress(out / "PROGRESS.txt")["Status"] == "FAILED"
    before = {path.name: path.read_bytes() for path in out.glob("checkpoint_*.npz")}
    other.unlink()
    run("generate.py", "--n", 5000, "--every", 100, "--out", out)
    assert all((out / name).read_bytes() == data for name, data in before.items())
    assert (made(out) == samples(n=5000)["videos"]).all()


def test_run_json_keeps_what_decides_the_result(tmp_path):
    run("generate.py", "--n", 8, "--out", tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == {
        "recipe": 1, "n": 8, "seed": 42, "frames": 8, "size": 32, "channels": 1, "augment": True,
        "shard": None}


def test_30000_videos_take_less_than_20_megabytes():
    size = len(generate.npz_bytes(samples(n=2000)))
    assert 15 * size < 20e6
