"""The promises of train_magvit.py at toy size: exact restarts, no look into the future, figures that cannot flatter."""
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from conftest import kill, run, start, wait_for

import generate
from checkpointing import find_checkpoints, read_progress

torch = pytest.importorskip("torch") if not os.environ.get("CI") else __import__("torch")
import train_magvit as tm  # noqa: E402

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
TOY = ["--epochs", 6, "--batch-size", 16, "--device", "cpu", "--preset", "tiny"]


def data_set(n=80, **settings):
    settings = generate.Settings(**settings)
    arrays = generate.empty_arrays(settings, n)
    generate.render(settings, 0, n, list(arrays.values()))
    return arrays


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "dataset.npz"
    np.savez(path, **data_set())
    return path


def train(toy, out, *more, **options):
    return run("train_magvit.py", "--data", toy, "--out", out, *TOY, *more, env=ONE_THREAD, **options)


def start_training(toy, out, *more):
    return start("train_magvit.py", "--data", toy, "--out", out, *TOY, *more, env=ONE_THREAD)


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(toy, out)
    return out


RESULTS = ("best_model.pt", "final_model.pt", "history.json", "metrics.json")


# -- exact restarts


def phase_of(out):
    return read_progress(out / "PROGRESS.txt").get("Phase", "").split(":")[0]


def test_ten_kills_at_random_moments_end_with_the_same_bits_and_the_same_history(toy, whole, tmp_path):
    """With a checkpoint at every step, so that many kills fall into a save and several into one epoch.

    The moments are random, but each counts from the start of a phase: a machine of any speed is killed in both.
    """
    order = ["", "tokenizer", "transformer", "evaluation"]
    moments, wanted, killed_in = random.Random(3), itertools.cycle(["tokenizer", "tokenizer", "transformer", "transformer", ""]), []
    attempt = 0
    while len(killed_in) < 10:
        out = tmp_path / str(attempt)
        attempt += 1
        while True:
            process, least = start_training(toy, out, "--max-minutes", 0.0001), order.index(next(wanted))
            wait_for(lambda: read_progress(out / "PROGRESS.txt").get("PID") == str(process.pid)
                     and order.index(phase_of(out)) >= least or process.poll() is not None, "the phase to be killed in")
            time.sleep(moments.uniform(0, 0.2 if least else 2.5))
            if len(killed_in) >= 10 or process.poll() is not None:
                break
            killed_in.append(phase_of(out))
            kill(process)
        output = process.communicate(timeout=150)[0]
        assert process.returncode == 0, output
        for name in RESULTS:
            assert (out / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"
        shutil.rmtree(out)
    assert killed_in.count("tokenizer") >= 2 and killed_in.count("transformer") >= 2, killed_in


def test_a_kill_right_after_the_last_checkpoint_of_a_phase_goes_on_with_the_next(toy, tmp_path):
    """That checkpoint holds the optimiser of a phase that is over."""
    settings, data = tm.Settings(out=str(tmp_path), epochs=6), tm.load_data(toy)
    trainer = tm.Trainer(settings, tm.PRESETS["tiny"], data, torch.device("cpu"))
    trainer.done = trainer.phases[1].start
    state = trainer.state()
    restarted = tm.Trainer(settings, tm.PRESETS["tiny"], data, torch.device("cpu"))
    restarted.restore(state)
    trainer.begin_phase()
    assert restarted.phase is restarted.phases[1]
    assert restarted.step(restarted.done).item() == trainer.step(trainer.done).item()


def test_a_complete_run_called_again_prints_its_table_and_touches_nothing(toy, whole):
    before = {p.name: p.stat().st_mtime_ns for p in whole.iterdir()}
    assert "on held-out test videos" in train(toy, whole).stdout
    assert {p.name: p.stat().st_mtime_ns for p in whole.iterdir()} == before


def test_what_a_run_leaves(whole):
    assert len(find_checkpoints(whole)) == 3
    history = json.loads((whole / "history.json").read_text())
    assert [row["step"] for row in history] == sorted({row["step"] for row in history}) and len(history) == 6
    assert {"tokenizer", "transformer"} == {row["phase"] for row in history}
    progress = read_progress(whole / "PROGRESS.txt")
    assert progress["Status"] == "COMPLETE" and {"Phase", "Epoch", "Train loss", "Val loss", "Best"} <= progress.keys()
    metrics = json.loads((whole / "metrics.json").read_text())
    assert set(metrics) == {"tokenizer", "classification", "judge", "generation", "prediction", "warnings"}


@pytest.mark.parametrize("signal_, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves_within_ten_seconds(toy, tmp_path, signal_, code):
    process = start_training(toy, tmp_path, "--epochs", 5000)
    wait_for(lambda: read_progress(tmp_path / "PROGRESS.txt").get("Phase") or process.poll() is not None, "the first epoch")
    process.send_signal(signal_)
    process.communicate(timeout=10)
    assert process.returncode == code
    saved = find_checkpoints(tmp_path)[-1][0]
    assert read_progress(tmp_path / "PROGRESS.txt")["Checkpoint"].startswith(f"{saved} ") and saved > 0


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(toy, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    newest = find_checkpoints(out)[-1][1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    done = train(toy, out)
    assert "Set aside" in done.stderr and newest.name in done.stderr
    for name in RESULTS:
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_other_settings_or_data_are_refused_and_fresh_sets_the_old_run_aside(toy, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    assert "seed was 0, asked 1" in train(toy, out, "--seed", 1, code=2).stderr
    other = tmp_path / "other.npz"
    np.savez(other, **data_set(seed=7))
    assert "data was" in train(other, out, code=2).stderr
    process = start_training(toy, out, "--fresh", "--seed", 1)
    wait_for(lambda: (tmp_path / "run.old1").exists() and (out / "PROGRESS.txt").exists(), "the new run")
    kill(process)
    assert (tmp_path / "run.old1" / "best_model.pt").read_bytes() == (whole / "best_model.pt").read_bytes()


def test_a_run_directory_that_grows_is_trained_on_as_it_was_at_the_start(tmp_path):
    run("generate.py", "--n", 160, "--every", 80, "--out", tmp_path / "data")
    second = tmp_path / "data" / "checkpoint_00080.npz"
    second.rename(tmp_path / "later.npz")
    process = start_training(tmp_path / "data", tmp_path / "run", "--max-minutes", 0.0001)
    wait_for(lambda: find_checkpoints(tmp_path / "run") or process.poll() is not None, "a checkpoint")
    kill(process)
    (tmp_path / "later.npz").rename(second)
    done = train(tmp_path / "data", tmp_path / "run")
    assert "has grown to 160 videos; this run goes on with the first 80" in done.stdout


# -- a loss that is not finite


def test_a_loss_that_is_not_finite_is_never_saved_and_a_restart_goes_on(toy, tmp_path, monkeypatch, capsys):
    def trained(steps_until_nan):
        settings = tm.Settings(data=str(toy), out=str(tmp_path), epochs=6, preset="tiny", max_minutes=1e-4)
        whole_loss, count = tm.Trainer.tokenizer_loss, [0]

        def loss(self, tokenizer, *arguments):
            count[0] += 1
            return whole_loss(self, tokenizer, *arguments) * (float("nan") if count[0] == steps_until_nan else 1)
        monkeypatch.setattr(tm.Trainer, "tokenizer_loss", loss)
        monkeypatch.setattr(tm, "EVALUATIONS", {})
        monkeypatch.setattr(tm.Trainer, "evaluate", lambda self: None)
        with pytest.raises(SystemExit) if steps_until_nan else contextlib.nullcontext() as stop:
            tm.train(settings, torch.device("cpu"))
        monkeypatch.undo()
        return stop

    assert trained(2).value.code == 1
    error = capsys.readouterr().err
    for words in ("not finite", "phase tokenizer", "epoch 1", "step 1", "learning rate"):
        assert words in error
    assert read_progress(tmp_path / "PROGRESS.txt")["Status"] == "FAILED"
    newest = torch.load(find_checkpoints(tmp_path)[-1][1], weights_only=True)
    assert newest["done"] == 1 and all(v.isfinite().all() for v in newest["model"]["tokenizer"].values())
    trained(0)
    assert read_progress(tmp_path / "PROGRESS.txt")["Status"] == "COMPLETE"


# -- the model


def test_no_future_frame_reaches_the_ids_of_the_frames_before_it():
    torch.manual_seed(0)
    for preset in tm.PRESETS.values():
        tokenizer = tm.Tokenizer(preset, 1)
        for parameter in tokenizer.parameters():   # away from its start, where some paths are still shut
            parameter.data += torch.randn_like(parameter) * 0.05
        video = torch.rand(2, 8, 1, 32, 32)
        ids = tokenizer.encode(video)
        for given in range(preset.stride_t, 8, preset.stride_t):
            other = video.clone()
            other[:, given:] = torch.rand_like(other[:, given:])
            changed = tokenizer.encode(other)
            kept = given // preset.stride_t
            assert torch.equal(changed[:, :kept], ids[:, :kept]) and not torch.equal(changed, ids)


def test_hidden_places_reach_neither_the_class_nor_the_other_places():
    torch.manual_seed(0)
    model = tm.Model(tm.PRESETS["tiny"], (8, 1, 32, 32), tm.CLASSES, torch.device("cpu"))
    ids = torch.randint(0, tm.CODES, (3, 8, 1, 4))
    hidden = torch.zeros(3, 8, 1, dtype=torch.bool)
    hidden[:, 5:] = True
    other = torch.where(hidden[..., None], torch.randint(0, tm.CODES, ids.shape), ids)
    label, unknown = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    for one, two in zip(model.transformer(ids, hidden, label, unknown), model.transformer(other, hidden, label, unknown)):
        assert torch.equal(one, two)
    assert torch.equal(model.class_probabilities(ids, 5), model.class_probabilities(other, 5))


def test_a_place_that_is_drawn_is_told_all_its_numbers_in_order():
    """What `draw` samples step by step must be what `logits` is trained on at once."""
    torch.manual_seed(0)
    transformer = tm.MaskedTransformer(tm.PRESETS["tiny"], 8, 1, 4)
    for parameter in transformer.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    states = torch.randn(50, tm.PRESETS["tiny"].dim)
    drawn = transformer.draw(states, 1e-6, torch.Generator().manual_seed(0))   # so cold that it takes the likeliest
    digits = tm.digits_of(drawn).flatten(1)
    assert torch.equal(transformer.logits(states, digits).argmax(-1), digits)


def test_codes_and_their_numbers_are_the_same_thing():
    ids = torch.arange(tm.CODES)
    assert torch.equal(tm.ids_of(tm.digits_of(ids)), ids)
    digits, values = tm.quantize(torch.randn(5000, len(tm.LEVELS)) * 5)
    assert (digits >= 0).all() and (digits < torch.tensor(tm.LEVELS)).all() and values.abs().max() <= 1
    middle = torch.tensor([level // 2 for level in tm.LEVELS])
    assert torch.equal(values, (digits - middle) / middle.float()), "encoder and decoder must mean the same by a code"


def test_all_codes_can_be_reached():
    digits, _ = tm.quantize(torch.randn(200_000, len(tm.LEVELS)) * 2)
    for k, level in enumerate(tm.LEVELS):
        assert len(digits[:, k].unique()) == level


# -- figures that cannot flatter


def test_the_split_is_stratified_and_a_video_keeps_its_part_when_the_set_grows():
    labels = np.arange(4000) % 4
    part = tm.split(labels)
    assert (tm.split(labels[:1000]) == part[:1000]).all()
    for k in range(4):
        assert np.bincount(part[labels == k]).tolist() == [800, 100, 100]


def test_an_overlap_of_the_splits_stops_the_run(tmp_path):
    arrays = data_set()
    arrays["videos"][-1] = arrays["videos"][3]   # a test video that is a training video too
    np.savez(tmp_path / "d.npz", **arrays)
    done = train(tmp_path / "d.npz", tmp_path / "run", code=1)
    assert "video 79 (test) is the same as video 3 (training)" in done.stderr


def test_blank_videos_do_not_score():
    videos = torch.from_numpy(data_set()["videos"])
    blank = torch.zeros_like(videos)
    assert (tm.count_dots(blank) == 0).all() and (tm.count_dots(videos) == 1).all()
    two = torch.maximum(videos, videos.flip(-1).roll(1, 0))
    assert 0.5 < (tm.count_dots(two) == 2).float().mean() <= 1
    error = (blank.float() - videos.float()).square().mean() / videos.float().square().mean()
    assert 1 - error == 0, "skill of a blank video is 0 by definition"
    assert (tm.centroids(blank) - tm.centroids(videos)).norm(dim=-1).mean() > 3


def test_centroids_are_those_of_the_data_set():
    arrays = data_set()
    found = tm.centroids(torch.from_numpy(arrays["videos"]))
    assert (found - torch.from_numpy(arrays["trajectory_2d"])).abs().max() < 0.15


def test_codes_that_collapsed_and_accuracy_at_chance_are_said_in_words(toy, tmp_path, whole):
    trainer = tm.Trainer(tm.Settings(out=str(tmp_path)), tm.PRESETS["tiny"], tm.load_data(toy), torch.device("cpu"))
    trainer.breathe = lambda: None
    for linear in (trainer.average.tokenizer.coarse, trainer.average.tokenizer.to_code[1]):
        linear.weight.data.zero_()   # every place of every video gets the same code
    metrics = json.loads((whole / "metrics.json").read_text())
    with torch.no_grad():
        metrics["tokenizer"] = tm.evaluate_tokenizer(trainer, trainer.average)
    assert metrics["tokenizer"]["active_codes"] == 1
    metrics["classification"].update(accuracy=0.26, videos=400)
    said = " ".join(tm.warnings_of(metrics, 4))
    for words in ("the codes have collapsed", "hardly beats a blank video", "accuracy is at chance"):
        assert words in said


def test_a_run_that_did_not_learn_does_not_end_in_a_cheerful_complete_alone(whole):
    progress = read_progress(whole / "PROGRESS.txt")
    assert progress["Status"] == "COMPLETE" and progress["Warning"]


# -- data that will not do


@pytest.mark.parametrize("change, words", [
    (dict(videos=None), "has no videos"), (dict(labels=None), "has no labels"),
    (dict(videos=np.zeros((80, 8, 32, 32), np.uint8)), "must be (N, T, C, H, W)"),
    (dict(videos=np.zeros((80, 8, 1, 32, 32), np.int32)), "must be uint8, or float"),
    (dict(videos=np.full((80, 8, 1, 32, 32), 255.0, np.float32)), "Divide by 255"),
    (dict(videos=np.full((80, 8, 1, 32, 32), np.nan, np.float32)), "NaN"),
    (dict(labels=np.zeros(80, np.float32)), "labels must be integers"), (dict(labels=np.zeros(79, np.int64)), "labels must be"),
    (dict(labels=np.arange(80) % 3), "parabolic has 0 videos"), (dict(labels=np.full(80, -1)), "labels must be"),
    (dict(videos=np.zeros((80, 8, 1, 40, 40), np.uint8)), "multiples of 32")])
def test_data_that_will_not_do_is_refused_in_one_line(tmp_path, change, words):
    arrays = {**data_set(), **change}
    np.savez(tmp_path / "d.npz", **{name: a for name, a in arrays.items() if a is not None})
    code = 2 if "multiples" in words else 1
    assert words in train(tmp_path / "d.npz", tmp_path / "run", code=code).stderr


def test_missing_empty_truncated_and_foreign_data_and_wrong_arguments_are_one_line(toy, tmp_path):
    assert "no such data" in train(tmp_path / "nowhere.npz", tmp_path / "run", code=2).stderr
    for content in (b"", b"garbage", toy.read_bytes()[:-1000]):
        (tmp_path / "bad.npz").write_bytes(content)
        assert "not a whole .npz" in train(tmp_path / "bad.npz", tmp_path / "run", code=1).stderr
    np.savez(tmp_path / "small.npz", **data_set(20))
    assert "every class needs at least 10" in train(tmp_path / "small.npz", tmp_path / "run", code=1).stderr
    assert "--preset must be" in train(toy, tmp_path / "run", "--preset", "huge", code=2).stderr
    assert "there is none here" in train(toy, tmp_path / "run", "--device", "cuda9", code=2).stderr
    assert "--epochs" in train(toy, tmp_path / "run", "--epochs", 1, code=2).stderr


def test_float_videos_without_trajectories_are_taken(tmp_path):
    arrays = data_set()
    np.savez(tmp_path / "d.npz", videos=arrays["videos"].astype(np.float32) / 255, labels=arrays["labels"])
    data = tm.load_data(tmp_path / "d.npz")
    assert (data.videos == arrays["videos"]).all() and data.videos.dtype == np.uint8


# -- files that hide code


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_a_model_that_hides_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "trajectory-magvit 1", "preset": Evil()}, tmp_path / "model.pt")
    with pytest.raises(tm.CheckpointError, match="model.pt: not a model"):
        tm.Model.load(tmp_path / "model.pt", torch.device("cpu"))
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_that_hides_code_is_refused_by_name(toy, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    newest = find_checkpoints(out)[-1][1]
    torch.save({"done": Evil()}, newest)
    (out / "checkpoints.jsonl").unlink()   # as someone would who brings in a checkpoint
    done = run("train_magvit.py", "--data", toy, "--out", out, *TOY, env=ONE_THREAD, code=1, cwd=tmp_path)
    assert newest.name in done.stderr and "cannot be loaded" in done.stderr and not (tmp_path / "pwned").exists()
