"""The promises of magvit.py and train_magvit.py: exact restarts at the defaults, no look into the
future, a step that a GPU can replay, data that will not do refused in one line."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, kill, run, start, wait_for

import checkpointing
import generate
import processes
import report
from checkpointing import CheckpointError, find_checkpoints, read_progress

torch = pytest.importorskip("torch") if not os.environ.get("CI") else __import__("torch")
import magvit  # noqa: E402
import train_magvit as tm  # noqa: E402

tm.import_torch()
SHORT = ["--epochs", 6, "--device", "cpu"]
RESULTS = ("best_model.pt", "final_model.pt", "history.json", "evaluation/metrics.json")
SIZES = tm.PRESETS["tiny"].sizes


def data_set(n=80, **settings):
    settings = generate.Settings(**settings)
    arrays = generate.empty_arrays(settings, n)
    generate.render(settings, 0, n, list(arrays.values()))
    return arrays


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Enough videos for ten steps an epoch at the default batch."""
    path = tmp_path_factory.mktemp("data") / "dataset.npz"
    np.savez(path, **data_set(400))
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "dataset.npz"
    np.savez(path, **data_set())
    return path


def train(data, out, *more, **options):
    return run("train_magvit.py", "--data", data, "--out", out, *SHORT, *more, **options)


def start_training(data, out, *more):
    return start("train_magvit.py", "--data", data, "--out", out, *SHORT, *more)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(data, out)
    return out


def same_results(out, whole):
    for name in RESULTS:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"


# -- exact, as people run it: all threads, the default batch


def test_two_undisturbed_runs_end_with_the_same_bits(data, whole, tmp_path):
    train(data, tmp_path)
    same_results(tmp_path, whole)


def test_kills_at_random_moments_of_both_phases_end_with_the_same_bits(data, whole, tmp_path):
    """With checkpoints as fast as they can be written, so that many kills fall into a save."""
    moments = random.Random(3)
    for phase in ("tokenizer", "tokenizer", "transformer", "transformer", "transformer"):
        process = start_training(data, tmp_path, "--max-minutes", 0.0001)
        wait_for(lambda: (progress := read_progress(tmp_path / "PROGRESS.txt")).get("PID")
                 == str(process.pid) and progress.get("Phase") == phase
                 or process.poll() is not None, f"phase {phase}")
        time.sleep(moments.uniform(0, 0.3))
        if process.poll() is None:   # a fast machine may have ended
            kill(process)
    assert find_checkpoints(tmp_path)
    train(data, tmp_path, "--max-minutes", 0.0001)
    same_results(tmp_path, whole)
    restarts = read_progress(tmp_path / "PROGRESS.txt")["Restarts"].split(", ")   # for the page
    assert restarts == sorted(restarts, key=int) and 1 <= len(restarts) <= 5


@pytest.mark.slow
def test_the_larger_preset_is_exact_too(toy, tmp_path):
    """Killed after its first checkpoint, against undisturbed."""
    more = ("--preset", "small", "--epochs", 4)
    train(toy, tmp_path / "whole", *more)
    process = start_training(toy, tmp_path / "cut", "--max-minutes", 0.0001, *more)
    wait_for(lambda: find_checkpoints(tmp_path / "cut"), "a checkpoint")
    kill(process)
    train(toy, tmp_path / "cut", *more)
    same_results(tmp_path / "cut", tmp_path / "whole")


def test_a_damaged_checkpoint_falls_back_to_the_end_of_the_phase_before(data, whole, tmp_path):
    """That one holds no optimiser: the one that is needed belongs to the next phase."""
    out = shutil.copytree(whole, tmp_path / "run")
    (*_, (before, _), (_, newest)) = find_checkpoints(out)
    assert before == 10
    newest.write_bytes(newest.read_bytes()[:-1000])
    shutil.rmtree(out / "evaluation")
    done = train(data, out)
    assert "set aside" in done.stderr.lower() and newest.name in done.stderr
    same_results(out, whole)


def test_a_kill_between_the_last_checkpoint_and_the_models_loses_none(data, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(out / "evaluation")
    for name in ("best_model.pt", "final_model.pt", "history.json"):
        (out / name).unlink()
    train(data, out)
    same_results(out, whole)


@pytest.mark.parametrize("signal_, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves_within_ten_seconds(toy, tmp_path, signal_, code):
    process = start_training(toy, tmp_path, "--epochs", 5000)
    wait_for(lambda: read_progress(tmp_path / "PROGRESS.txt").get("Phase")
             or process.poll() is not None, "the first phase")
    time.sleep(0.5)
    process.send_signal(signal_)
    process.communicate(timeout=10)
    assert process.returncode == code
    saved = find_checkpoints(tmp_path)[-1][0]
    progress = read_progress(tmp_path / "PROGRESS.txt")
    assert progress["Checkpoint"].startswith(f"{saved} ") and saved > 0
    assert progress["Status"] == "INTERRUPTED"


def test_a_complete_run_called_again_says_so_and_changes_nothing(data, whole):
    def content():
        return {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}
    before = content()
    said = train(data, whole).stdout
    assert "nothing is left to do" in said and "PSNR" not in said
    assert content() == before


def test_what_a_run_leaves(whole):
    history = json.loads((whole / "history.json").read_text())
    assert [row["step"] for row in history] == [10, 20, 30, 40, 50, 60]
    assert {"tokenizer", "transformer"} == {row["phase"] for row in history}
    progress = read_progress(whole / "PROGRESS.txt")
    assert progress["Status"] == "COMPLETE" and progress["Progress"] == "60/60 steps (100%)"
    assert "before; best" in progress["Val loss"]
    assert read_progress(whole / "evaluation" / "PROGRESS.txt")["Status"] == "COMPLETE"
    with np.load(whole / "samples.npz", allow_pickle=False) as samples:
        assert samples["real"].shape == samples["reconstructed"].shape == (8, 8, 1, 32, 32)
        assert samples["generated"].dtype == np.uint8 and len(samples["generated_labels"]) == 8
        given = int(samples["given"])
        assert (samples["predicted"][:, :given] == samples["predicted_truth"][:, :given]).all()
        assert samples["classes"].tolist() == list(magvit.CLASSES) and samples["step"] == 60
    done = run("checkpointing.py", "verify", whole)
    assert " 0 bad" in done.stdout


def test_other_settings_or_data_are_refused_and_fresh_sets_the_old_run_aside(data, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    error = train(data, out, "--seed", 1, code=2).stderr
    assert "seed was 0, asked 1" in error and "--fresh" in error
    other = tmp_path / "other.npz"
    np.savez(other, **data_set(400, seed=7))
    assert "data was" in train(other, out, code=2).stderr
    process = start_training(data, out, "--fresh", "--seed", 1)
    wait_for(lambda: (tmp_path / "run.old1").exists()
             and (out / "PROGRESS.txt").exists(), "the new run")
    kill(process)
    assert (tmp_path / "run.old1" / "best_model.pt").read_bytes() == (
        whole / "best_model.pt").read_bytes()


def test_a_run_directory_that_grows_is_trained_on_as_it_was_at_the_start(tmp_path):
    run("generate.py", "--n", 160, "--every", 80, "--out", tmp_path / "data")
    second = tmp_path / "data" / "checkpoint_00080.npz"
    second.rename(tmp_path / "later.npz")
    process = start_training(tmp_path / "data", tmp_path / "run", "--max-minutes", 0.0001)
    wait_for(lambda: find_checkpoints(tmp_path / "run")
             or process.poll() is not None, "a checkpoint")
    kill(process)
    (tmp_path / "later.npz").rename(second)
    done = train(tmp_path / "data", tmp_path / "run")
    assert "has grown to 160 videos; this run goes on with the first 80" in done.stdout


def test_a_loss_that_is_not_finite_is_never_saved(toy, tmp_path, monkeypatch, capsys):
    plain, count = tm.reconstruction_loss, [0]

    def loss(*videos):
        count[0] += 1
        return plain(*videos) * (float("nan") if count[0] == 2 else 1)
    monkeypatch.setattr(tm, "reconstruction_loss", loss)
    settings = tm.Settings(data=str(toy), out=str(tmp_path), epochs=6, batch_size=16, device="cpu")
    with pytest.raises(SystemExit) as stop:
        with checkpointing.Run(tmp_path, suffix=".pt", max_minutes=1e-6) as work:
            tm.train(settings, work, processes.Processes())
    assert stop.value.code == 1
    error = capsys.readouterr().err
    for words in ("not finite", "phase tokenizer", "epoch 1", "learning rate", "ends here again"):
        assert words in error
    assert read_progress(tmp_path / "PROGRESS.txt")["Status"] == "FAILED"
    for _, path in find_checkpoints(tmp_path):
        state = torch.load(path, weights_only=True)
        assert state["done"] == 1 and all(v.isfinite().all() for v in state["model"].values())


def test_the_page_shows_a_training_before_its_first_checkpoint(toy, tmp_path, monkeypatch):
    there, plain = [], report.write_report

    def write(top):
        there.append(find_checkpoints(tmp_path))
        plain(top)
    monkeypatch.setattr(report, "write_report", write)
    monkeypatch.setattr(report, "_next", 0)     # not only after 30 s
    settings = tm.Settings(data=str(toy), out=str(tmp_path), epochs=2, batch_size=16, device="cpu")
    with checkpointing.Run(tmp_path, suffix=".pt") as work:
        tm.train(settings, work, processes.Processes())
    assert there[0] == [] and "of 8 steps" in (tmp_path / "report.html").read_text()


def test_a_disk_too_small_for_the_states_is_refused_before_the_work(toy, tmp_path, small_disk):
    done = train(toy, small_disk(16 << 20) / "run", code=1)
    assert "this run needs about" in done.stderr and "are free" in done.stderr


# -- one step, on a CPU as it is, on a GPU as a graph


def learners(shape=(8, 1, 32, 32), videos=40, batch=8, processes=None):
    torch.manual_seed(0)
    magvit.open_device("cpu")
    model = magvit.Magvit(magvit.Sizes(**SIZES), shape, magvit.CLASSES).requires_grad_(False)
    parts = [torch.arange(videos), torch.arange(8), torch.arange(8)]
    real = torch.randint(0, 255, (videos, *shape), dtype=torch.uint8)
    phases = tm.phases_of(tm.Settings(batch_size=batch), tm.PRESETS["tiny"], model, videos)
    made = [tm.Learner(phase, model, magvit.Videos(real.numpy(), torch.device("cpu")),
                       torch.arange(videos) % 4, parts, 0, processes) for phase in phases]
    for learner in made:
        learner.shuffle(0)
    return made


class SecondOfTwo(processes.Processes):
    """What another process would add is left out."""

    def __init__(self):
        self.number, self.count, self.leads, self.alone = 1, 2, False, False

    def total(self, tensor):
        return tensor

    def average(self, tensors):
        pass


@pytest.mark.parametrize("group", [None, SecondOfTwo()], ids=["alone", "one of two"])
def test_a_step_can_be_captured(group, monkeypatch):
    """Nothing in it waits for the device, takes a shape from data, or adds in any order; and it is
    one graph for the compiler."""
    from torch.utils._python_dispatch import TorchDispatchMode
    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh",
                 "cumsum", "scatter_add", "index_add", "_index_put_impl")

    class Forbid(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), more=None):
            assert not any(word in str(function) for word in forbidden), function
            return function(*arguments, **(more or {}))

    plain = tm.masked_loss
    monkeypatch.setattr(tm, "masked_loss",
                        lambda *arguments, pick, whole: plain(*arguments, False, whole))
    for learner in learners(processes=group):
        with Forbid():
            learner.step()
        whole = learner.whole()
        loss = learner.batch_loss(whole).item()
        compiled = torch.compile(learner._batch_loss, backend="aot_eager", fullgraph=True)
        assert compiled(whole).item() == pytest.approx(loss, rel=1e-5)


def test_what_counts_is_the_same_whether_it_is_picked_or_weighed(monkeypatch):
    """A CPU computes the hidden places alone, a GPU all of them with weights of zero."""
    learner, plain = learners()[1], tm.masked_loss
    picked = learner.batch_loss().item()
    monkeypatch.setattr(tm, "masked_loss",
                        lambda *arguments, pick, whole: plain(*arguments, pick=False))
    assert learner.batch_loss().item() == pytest.approx(picked, rel=1e-5)


def test_masks_and_order_are_functions_of_seed_and_step_on_any_device():
    """Integers alone decide: these are the values on every machine."""
    assert magvit.hashes(magvit.key(0, "masks"), torch.tensor(7), 4).tolist() == [
        int(magvit.mix(magvit.mix(e ^ magvit.mix(magvit.key(0, "masks")[0] ^ 7))
            + magvit.mix(magvit.mix(magvit.key(0, "masks")[0] ^ 7)
                         + magvit.key(0, "masks")[1] & 0xFFFFFFFF) & 0xFFFFFFFF)) for e in range(4)]
    hidden, label_hidden = tm.draw_masks(magvit.key(0, "masks"), torch.tensor(0), 3000, 8, 4)
    classify, generate_, predict = (hidden[k::3] for k in range(3))
    assert not classify[:, :4].any() and label_hidden[0::3].all()
    assert 0.05 < label_hidden[1::3].float().mean() < 0.15
    assert generate_.any((1, 2)).all() and generate_[:, 0].any(1).float().mean() > 0.1
    assert not predict[:, 0].any() and predict[:, 7].any(1).all()
    other = tm.draw_masks(magvit.key(0, "masks"), torch.tensor(1), 3000, 8, 4)[0]
    assert not torch.equal(other, hidden)


def test_dearer_videos_are_shown_less_often():
    def phases(shape):
        model = magvit.Magvit(magvit.Sizes(**SIZES), shape, magvit.CLASSES)
        return tm.phases_of(tm.Settings(), tm.PRESETS["tiny"], model, 960)
    small, large = phases((8, 1, 32, 32)), phases((16, 3, 64, 64))
    for a, b in zip(small, large):
        assert 4 < a.steps / b.steps < 6   # of videos with eight times the places
    assert large[1].start == large[0].stop


# -- the model


def shaken(module):
    """Away from its start, where some paths are still shut."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    return module


def test_no_future_frame_reaches_the_codes_of_the_frames_before_it():
    torch.manual_seed(0)
    for preset in tm.PRESETS.values():
        tokenizer = shaken(magvit.Tokenizer(magvit.Sizes(**preset.sizes), (8, 1, 32, 32)))
        video = torch.rand(2, 8, 1, 32, 32)
        codes = tokenizer.encode(video)
        for given in range(1, 8):
            other = video.clone()
            other[:, given:] = torch.rand_like(other[:, given:])
            changed = tokenizer.encode(other)
            assert torch.equal(changed[:, :given], codes[:, :given])
            assert not torch.equal(changed, codes)


def test_hidden_places_reach_neither_the_class_nor_the_other_places():
    torch.manual_seed(0)
    model = shaken(magvit.Magvit(magvit.Sizes(**SIZES), (8, 1, 32, 64), magvit.CLASSES))
    codes = torch.randint(0, magvit.LEVELS, (3, 8, 2, magvit.NUMBERS))
    hidden = torch.zeros(3, 8, 2, dtype=torch.bool)
    hidden[:, 5:] = True
    other = torch.where(hidden[..., None], torch.randint(0, magvit.LEVELS, codes.shape), codes)
    label, unknown = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    for one, two in zip(model.transformer(codes, hidden, label, unknown),
                        model.transformer(other, hidden, label, unknown)):
        assert torch.equal(one, two)
    assert torch.equal(model.class_probabilities(codes, 5), model.class_probabilities(other, 5))


def test_a_place_that_is_drawn_is_told_all_its_numbers_in_order():
    """What `draw` samples step by step must be what `logits` is trained on at once."""
    torch.manual_seed(0)
    transformer = shaken(magvit.MaskedTransformer(magvit.Sizes(**SIZES), 8, 1, 4))
    states = torch.randn(50, SIZES["dim"])
    drawn = transformer.draw(states, 1e-6, torch.rand(50, magvit.NUMBERS)
                             )   # so cold: the likeliest
    assert torch.equal(transformer.logits(states, drawn).argmax(-1), drawn)


def test_codes_are_drawn_as_often_as_they_are_likely():
    torch.manual_seed(0)
    transformer = shaken(magvit.MaskedTransformer(magvit.Sizes(**SIZES), 8, 1, 4))
    state = torch.randn(1, SIZES["dim"])
    chance = magvit.uniform(magvit.key("test"), torch.arange(20_000), magvit.NUMBERS)
    drawn = transformer.draw(state.expand(20_000, -1), 1.0, chance)
    expected = transformer.logits(state, drawn[:1])[0, 0].softmax(-1)
    seen = torch.bincount(drawn[:, 0], minlength=magvit.LEVELS) / 20_000
    assert (seen - expected).abs().max() < 0.01


def test_encoder_and_decoder_mean_the_same_by_a_code_and_all_can_be_reached():
    codes, values = magvit.quantize(torch.randn(200_000, 3) * 2)
    assert torch.equal(values, magvit.values_of(codes))
    assert codes.min() == 0 and codes.max() == magvit.LEVELS - \
                     1 and len(codes.unique()) == magvit.LEVELS


def test_videos_of_any_height_and_width_are_cut_back_and_only_their_own_pixels_count(tmp_path):
    for height, width in ((8, 8), (28, 28), (48, 40), (33, 64)):
        model = magvit.Magvit(magvit.Sizes(**SIZES), (4, 3, height, width), magvit.CLASSES)
        videos = torch.randint(0, 255, (2, 4, 3, height, width), dtype=torch.uint8)
        assert model.decode(model.encode(videos)).shape == videos.shape
        assert model.tokenizer(videos.float() / 255).shape == videos.shape   # what the loss sees
    arrays = data_set(80)
    np.savez(tmp_path / "d.npz", videos=arrays["videos"]
             [:, :5, :, 4:24, 2:30], labels=arrays["labels"])
    train(tmp_path / "d.npz", tmp_path / "run", "--epochs", 2)
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert metrics["tokenizer"]["raw_bits"] == 5 * 20 * 28 * 8


# -- data that will not do


def test_the_split_is_stratified_and_a_video_keeps_its_part_when_the_set_grows():
    labels = np.arange(4000) % 4
    part = magvit.split(labels)
    assert (magvit.split(labels[:1000]) == part[:1000]).all()
    for k in range(4):
        assert np.bincount(part[labels == k]).tolist() == [800, 100, 100]


def test_an_overlap_of_the_splits_stops_the_run(tmp_path):
    arrays = data_set()
    arrays["videos"][-1] = arrays["videos"][3]   # a test video that is a training video too
    np.savez(tmp_path / "d.npz", **arrays)
    done = train(tmp_path / "d.npz", tmp_path / "run", code=1)
    assert "video 79 (test) is the same as video 3 (training)" in done.stderr


@pytest.mark.parametrize("change, words", [
    (dict(videos=None), "has no videos"), (dict(labels=None), "has no labels"),
    (dict(videos=np.zeros((80, 8, 32, 32), np.uint8)), "must be (N, T, C, H, W)"),
    (dict(videos=np.zeros((80, 8, 1, 32, 32), np.int32)), "must be uint8, or float"),
    (dict(videos=np.full((80, 8, 1, 32, 32), 255.0, np.float32)), "Divide by 255"),
    (dict(videos=np.full((80, 8, 1, 32, 32), np.nan, np.float32)), "NaN"),
    (dict(labels=np.zeros(80, np.float32)), "labels must be integers"),
    (dict(labels=np.zeros(79, np.int64)), "labels must be"),
    (dict(labels=np.arange(80) % 3), "parabolic has 0 videos"),
    (dict(labels=np.full(80, -1)), "labels must be"),
    (dict(videos=np.zeros((80, 3, 1, 32, 32), np.uint8)), "at least 4 frames"),
    (dict(videos=np.zeros((80, 8, 1, 7, 40), np.uint8)), "8x8 pixels")])
def test_data_that_will_not_do_is_refused_in_words(tmp_path, change, words):
    arrays = {**data_set(), **change}
    np.savez(tmp_path / "d.npz", **{name: a for name, a in arrays.items() if a is not None})
    with pytest.raises(CheckpointError) as refused:
        magvit.load_data(tmp_path / "d.npz")
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_missing_empty_truncated_and_foreign_data_and_wrong_arguments_are_one_line(toy, tmp_path):
    assert "no such data" in train(tmp_path / "nowhere.npz", tmp_path / "run", code=2).stderr
    for content in (b"", b"garbage", toy.read_bytes()[:-1000]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a whole .npz"):
            magvit.load_data(tmp_path / "bad.npz")
    np.savez(tmp_path / "small.npz", **data_set(20))
    with pytest.raises(CheckpointError, match="every class needs at least 10"):
        magvit.load_data(tmp_path / "small.npz")
    assert "--preset must be" in train(toy, tmp_path / "run", "--preset", "huge", code=2).stderr
    assert "there is none here" in train(toy, tmp_path / "run", "--device", "cuda9", code=2).stderr
    assert "--epochs" in train(toy, tmp_path / "run", "--epochs", 1, code=2).stderr


def test_float_videos_and_those_in_fortran_order_are_taken(tmp_path):
    arrays = data_set()
    for videos in (arrays["videos"].astype(np.float32) / 255, np.asfortranarray(arrays["videos"])):
        np.savez(tmp_path / "d.npz", videos=videos, labels=arrays["labels"])
        data = magvit.load_data(tmp_path / "d.npz")
        assert (data.videos == arrays["videos"]).all() and data.videos.dtype == np.uint8
        magvit.checked_split(data)


# -- before torch is there


def test_the_run_shows_before_torch_is_loaded_and_a_missing_torch_is_one_line(toy, tmp_path):
    for name, code in (("slow", "import time; time.sleep(60)"),
                       ("none", "raise ModuleNotFoundError('no torch', name='torch')")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "torch.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "slow")}
    process = start("train_magvit.py", "--data", toy, "--out", tmp_path / "run", env=environment)
    wait_for(lambda: read_progress(tmp_path / "run" / "PROGRESS.txt").get("Status") == "RUNNING",
             "PROGRESS.txt", 20)
    kill(process)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "none")}
    done = train(toy, tmp_path / "run", code=1, env=environment)
    assert "torch is not installed" in done.stderr and "pip install" in done.stderr


def test_of_two_programs_at_once_the_second_does_not_spin(tmp_path):
    """Two whose threads spin on the same cores stop each other almost completely."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        environment.pop(name, None)
    code = ("import ctypes, magvit; libc = ctypes.CDLL(None); "
            "libc.getenv.restype = ctypes.c_char_p; print(libc.getenv(b'OMP_WAIT_POLICY'), "
            "flush=True); input()")
    more = {"cwd": ROOT, "env": environment, "text": True, "stdin": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, **more) as first:
        first.stdout.readline()     # it has the lock; whether it spins is up to the machine
        done = subprocess.run([sys.executable, "-c", code], input="\n", capture_output=True,
                              check=True, **{k: v for k, v in more.items() if k != "stdin"})
        assert done.stdout.strip() == "b'PASSIVE'"
        first.communicate("\n")
    assert first.returncode == 0


# -- files that hide code


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_a_model_that_hides_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": magvit.FORMAT, "sizes": Evil()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="model.pt: not a model"):
        magvit.Magvit.load(tmp_path / "model.pt", torch.device("cpu"))
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_that_hides_code_is_refused_by_name(data, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    newest = find_checkpoints(out)[-1][1]
    torch.save({"done": Evil()}, newest)
    (out / "checkpoints.jsonl").unlink()   # as someone would who brings in a checkpoint
    done = train(data, out, code=1, cwd=tmp_path)
    assert newest.name in done.stderr and not (tmp_path / "pwned").exists()
