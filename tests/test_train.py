"""The promises of magvit.py and train_magvit.py: exact restarts at the defaults, no look into the
future, a step that a GPU can replay, results that follow from the state.

Trainings that are killed or stopped are processes; all others run here, up to their evaluation.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, kill, numbers, run, start, wait_for
from test_videos import data_set as our_set

import checkpointing
import magvit
import train_magvit as tm
from checkpointing import read_progress, read_records
from processes import Processes

RESULTS = ("best_model.pt", "final_model.pt", "history.json", "samples.npz")
SIZES = tm.PRESETS["tiny"].sizes
CLASSES = ["linear", "circular", "helical", "parabolic"]


def data_set(n=400, **settings):
    return {**our_set(n, **settings), "class_names": np.array(CLASSES)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Enough videos for ten and three steps an epoch at the default batches."""
    path = tmp_path_factory.mktemp("data") / "dataset.npz"
    np.savez(path, **data_set())
    return path


def train(data, out, **settings):
    """In this process, up to the evaluation."""
    processes = Processes()
    with processes.one_voice():
        return tm.train(tm.Settings(data=str(data), out=str(out),
                                    **{"epochs": 6, "device": "cpu", **settings}), processes)


def refused(data, out, capsys, code=2, **settings):
    """What a training that ends in one line says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(data, out, **settings)
    error = capsys.readouterr().err
    assert stop.value.code == code and error.count("error: ") == 1, error
    assert "error: " in error.splitlines()[-1]
    return error


def started(data, out, *more):
    """A process of its own. It is killed before its evaluation ends, which has its own tests."""
    return start("train_magvit.py", "--data", data, "--out", out, "--epochs", 6, "--device", "cpu",
                 *more)


def newest(out):
    """The number of the newest checkpoint, 0 without one."""
    return max([0, *numbers(out)])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(data, out)
    return out


def same_results(out, whole):
    for name in RESULTS:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"


# -- exact, as people run it: all threads, the default batch


def test_killed_in_both_phases_it_ends_with_the_same_bits(data, whole, tmp_path):
    """Each time as soon as a new checkpoint has its line, which is in the middle of a save."""
    for reached, minutes in ((2, 1e-6), (10, 5), (12, 1e-6)):
        process = started(data, tmp_path, "--max-minutes", minutes)
        wait_for(lambda: any(record["start"] >= reached for record in
                             read_records(tmp_path).values()), f"checkpoint {reached}")
        kill(process)
        assert read_progress(tmp_path / "PROGRESS.txt")["Status"] == "RUNNING"
    process = started(data, tmp_path)
    wait_for(lambda: read_progress(tmp_path / "PROGRESS.txt").get("Status") == "COMPLETE"
             or process.poll() is not None, "the end of the training")
    process.kill()
    said = process.communicate()[0]
    assert read_progress(tmp_path / "PROGRESS.txt")["Progress"] == "25/25 steps (100%)", said
    assert "Traceback" not in said
    same_results(tmp_path, whole)


@pytest.mark.thorough
def test_the_command_line_trains_to_the_same_bits(data, whole, tmp_path):
    """Typed as people do, in a new process, with its evaluation; undisturbed a second time."""
    done = run("train_magvit.py", "--data", data, "--out", tmp_path, "--epochs", 6, "--device",
               "cpu", real=True)
    same_results(tmp_path, whole)
    assert "PSNR" in done.stdout and (tmp_path / "evaluation" / "metrics.json").exists()
    assert read_progress(tmp_path / "evaluation" / "PROGRESS.txt")["Status"] == "COMPLETE"


def test_what_is_damaged_or_gone_is_made_again_from_the_checkpoint_before(data, whole, tmp_path,
                                                                          capsys):
    """The one at the end of the first phase holds no optimiser: the next phase needs another."""
    out = shutil.copytree(whole, tmp_path / "run")
    last, model = out / "checkpoint_00025.pt", bytearray((out / "best_model.pt").read_bytes())
    last.write_bytes(last.read_bytes()[:-1000])
    model[len(model) // 2] ^= 1
    (out / "best_model.pt").write_bytes(model)
    (out / "history.json").write_text("[")
    for name in ("checkpoint_00011.pt", "final_model.pt", "samples.npz"):
        (out / name).unlink(missing_ok=True)
    train(data, out)
    assert "set aside" in capsys.readouterr().err.lower()
    same_results(out, whole)


@pytest.mark.parametrize("number, epochs, seen", [
    (signal.SIGINT, 5000, r"Train loss: \d"), (signal.SIGTERM, 6, "Phase: .*encoding")])
def test_a_signal_saves_and_leaves(data, tmp_path, number, epochs, seen):
    process = started(data, tmp_path, "--epochs", epochs, "--heartbeat", 0.01)
    wait_for(lambda: re.search(seen, (tmp_path / "PROGRESS.txt").read_text())
             if newest(tmp_path) else process.poll() is not None, seen)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, said
    progress = read_progress(tmp_path / "PROGRESS.txt")
    assert progress["Status"] == "INTERRUPTED"
    assert progress["Progress"].startswith(f"{newest(tmp_path)}/") and newest(tmp_path) > 0
    assert (tmp_path / "samples.npz").exists()


# -- what a run leaves, and what follows from its state


def test_what_a_run_leaves_and_that_calling_it_again_changes_nothing(data, whole):
    def content():
        return {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}
    before = content()
    train(data, whole)
    assert content() == before
    history = json.loads((whole / "history.json").read_text())
    assert [row["step"] for row in history] == [10, 13, 16, 19, 22, 25]
    assert [row["phase"] for row in history] == ["tokenizer"] + 5 * ["transformer"]
    progress = read_progress(whole / "PROGRESS.txt")
    assert progress["Status"] == "COMPLETE" and progress["Progress"] == "25/25 steps (100%)"
    assert progress["Epoch"] == "5/5" and "best" in progress["Val loss"]
    with np.load(whole / "samples.npz", allow_pickle=False) as samples:
        assert samples["real"].shape == samples["reconstructed"].shape == (8, 8, 1, 32, 32)
        assert samples["generated"].dtype == np.uint8 and len(samples["generated_labels"]) == 8
        given = int(samples["given"])
        assert (samples["predicted"][:, :given] == samples["predicted_truth"][:, :given]).all()
        assert samples["classes"].tolist() == CLASSES and samples["step"] == 25
    run("runs.py", "verify", whole)


def test_the_progress_tells_of_the_phase_that_runs_and_never_goes_back(data, tmp_path, monkeypatch):
    said, plain = [], checkpointing.Run.update

    def update(run, done, **fields):
        plain(run, done, **fields)
        said.append((done, run.fields.copy(), run.progress.end_expected))
    monkeypatch.setattr(checkpointing.Run, "update", update)
    monkeypatch.setattr(tm.Pace, "is_due", lambda pace: True)
    train(data, tmp_path)
    assert [done for done, _, _ in said] == sorted(done for done, _, _ in said)
    for (_, before, _), (_, now, _) in zip(said, said[1:]):
        if before.get("Phase", "").split(",")[0] != now.get("Phase", "").split(",")[0]:
            assert now["Train loss"] == now["Val loss"] == "not known yet"
            assert now["Epoch"].startswith("1/")
    assert sum("encoding the videos: 100%" in fields["Phase"] for _, fields, _ in said[3:]) == 1
    first = next(entry for entry in said if entry[1]["Train loss"] != "not known yet")
    assert first[0] == 1 and first[1]["Epoch"] == "1/1" and first[2] is not None


def test_a_full_disk_is_one_line_and_loses_nothing(data, whole, tmp_path, small_disk, capsys):
    disk = small_disk(30 << 20)      # for the first states, not for all that a run leaves
    assert "are free" in refused(data, disk / "run", capsys, code=1)
    assert newest(disk / "run") > 0
    subprocess.run(["mount", "-o", "remount,size=400m", disk], check=True)
    train(data, disk / "run")
    same_results(disk / "run", whole)


def test_a_loss_that_is_not_finite_is_never_saved(data, tmp_path, monkeypatch, capsys):
    plain, count = tm.reconstruction_loss, [0]

    def loss(*videos):
        count[0] += 1
        return plain(*videos) * (float("nan") if count[0] == 2 else 1)
    monkeypatch.setattr(tm, "reconstruction_loss", loss)
    error = refused(data, tmp_path, capsys, code=1, max_minutes=1e-6)
    for words in ("not finite", "phase tokenizer", "epoch 1", "by step 2", "nothing of it was"):
        assert words in error
    assert read_progress(tmp_path / "PROGRESS.txt")["Status"] == "FAILED" and newest(tmp_path) == 1


# -- what is refused, and what is not


def test_other_settings_or_data_are_refused_and_fresh_sets_the_old_run_aside(data, whole, tmp_path,
                                                                             capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    assert "seed was 0, asked 1" in refused(data, out, capsys, seed=1)
    other = tmp_path / "other.npz"
    np.savez(other, **data_set(seed=7))
    assert "data was" in refused(other, out, capsys)
    as_it_is = (out / "run.json").read_text()       # of a version whose phases had other lengths
    (out / "run.json").write_text(as_it_is.replace('"steps"', '"then"'))
    assert 'steps was "absent", asked [10, 15]' in refused(data, out, capsys)
    (out / "run.json").write_text(as_it_is)
    train(data, out, seed=1, fresh=True, epochs=2)
    same_results(tmp_path / "run.old1", whole)
    assert (out / "best_model.pt").read_bytes() != (whole / "best_model.pt").read_bytes()


def test_a_run_directory_that_grows_is_trained_on_as_it_was_at_the_start(tmp_path, capsys):
    run("generate.py", "--n", 160, "--every", 80, "--out", tmp_path / "data")
    second = tmp_path / "data" / "checkpoint_00080.npz"
    second.rename(tmp_path / "later.npz")
    train(tmp_path / "data", tmp_path / "run", epochs=2)
    (tmp_path / "later.npz").rename(second)
    train(tmp_path / "data", tmp_path / "run", epochs=2)
    assert "has grown to 160 videos; this run goes on with the first 80" in capsys.readouterr().err


def test_a_refused_start_is_one_line_and_leaves_no_directory(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert "no such data" in refused(tmp_path / "nowhere.npz", out, capsys)
    assert "there is none here" in refused(data, out, capsys, device="cuda9")
    arrays = data_set(80)
    arrays["labels"][-1] = 4
    np.savez(tmp_path / "labels.npz", **arrays)
    assert "label 4" in refused(tmp_path / "labels.npz", out, capsys, code=1)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
        assert "unset RANK WORLD_SIZE" in refused(data, out, capsys)
    assert not out.exists()
    for option, value in (("epochs", 1), ("preset", "x"), ("out", ""), ("batch-size", -1),
                          ("heartbeat", "nan")):
        monkeypatch.setattr(sys, "argv", ["train_magvit.py", f"--{option}={value}"])
        with pytest.raises(SystemExit) as stop:
            tm.main()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"--{option}" in error and len(error.splitlines()) == 1


def test_a_missing_torch_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    done = subprocess.run([sys.executable, ROOT / "train_magvit.py"], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "torch is not installed" in done.stderr and "pip install" in done.stderr


def test_a_checkpoint_that_hides_code_is_refused_by_name_and_not_run(data, whole, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/pwned",))
    settings = json.loads((whole / "run.json").read_text())["settings"]
    with checkpointing.Run(tmp_path / "run", 25, suffix=".pt", settings=settings) as brought:
        brought.save(1, write=lambda file: torch.save({"done": Evil()}, file))
    assert "checkpoint_00001.pt" in refused(data, tmp_path / "run", capsys, code=1)
    assert not (tmp_path / "pwned").exists()


# -- one step, on a CPU as it is, on a GPU as a graph


def learners(shape=(8, 1, 32, 32), videos=40, batch=8, processes=None):
    torch.manual_seed(0)
    magvit.open_device("cpu")
    model = magvit.Magvit(magvit.Sizes(**SIZES), shape, CLASSES).requires_grad_(False)
    real = torch.randint(0, 255, (videos, *shape), dtype=torch.uint8)
    phases = tm.phases_of(tm.Settings(batch_size=batch), tm.PRESETS["tiny"], model, videos)
    made = [tm.Learner(phase, model, magvit.DeviceVideos(real.numpy(), torch.device("cpu")),
                       torch.arange(videos) % 4, torch.arange(videos), torch.arange(8), 0,
                       processes or Processes()) for phase in phases]
    made[1].processes = Processes()     # alone it knows all codes
    list(made[1].encode())
    made[1].processes = made[0].processes
    for learner in made:
        learner.feed(0)
    return made


def test_a_phase_is_validated_at_most_forty_times():
    for epochs in range(1, 500):
        look = tm.Phase("tokenizer", None, 8, 5, epochs, 0, 1e-3).look
        looks = sum(e % look == 0 or e == epochs for e in range(1, epochs + 1))
        assert min(epochs, 20) <= looks <= 40


def as_on_a_gpu(monkeypatch):
    """Where shapes are fixed before: here all places are told, and most have no weight."""
    plain = tm.masked_loss

    def loss(transformer, codes, *more):
        return plain(transformer, codes, *more[:3], codes[..., 0].numel(), more[4])
    monkeypatch.setattr(tm, "masked_loss", loss)


class OneOfTwo(Processes):
    """What the other process would add is left out."""

    def __init__(self, number):
        self.number, self.count, self.leads, self.alone = number, 2, number == 0, False

    def add(self, tensors):
        pass


@pytest.mark.parametrize("group", [None, pytest.param(OneOfTwo(1), marks=pytest.mark.thorough)],
                         ids=["alone", "one of two"])
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

    as_on_a_gpu(monkeypatch)
    for learner in learners(processes=group):
        with Forbid():
            learner.step()
        loss = learner.batch_loss().item()
        compiled = torch.compile(learner._batch_loss, backend="eager", fullgraph=True)
        assert compiled().item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 8, 9])
def test_the_parts_of_a_batch_add_up_to_the_whole(batch):
    """Loss and gradients, also of uneven parts, and where one process has no part at all."""
    made = zip(*[learners(batch=batch, processes=group) for group in
                 (None, OneOfTwo(0), OneOfTwo(1))])
    for alone, *parts in made:
        losses = []
        for learner in (alone, *parts):
            losses.append(learner.batch_loss())
            losses[-1].backward()
        assert losses[0].item() == pytest.approx(sum(part.item() for part in losses[1:]), rel=1e-5)
        for whole, first, second in zip(*[learner.parameters for learner in (alone, *parts)]):
            assert torch.allclose(whole.grad, first.grad + second.grad, rtol=1e-3, atol=1e-5)


def test_what_counts_is_the_same_whether_it_is_picked_or_weighed(monkeypatch):
    """A CPU computes the hidden places alone, a GPU all of them with weights of zero."""
    learner = learners()[1]
    picked = learner.batch_loss().item()
    as_on_a_gpu(monkeypatch)
    assert learner.batch_loss().item() == pytest.approx(picked, rel=1e-5)


def test_the_transformer_learns_the_codes_of_videos_in_all_turns():
    learner = learners(batch=16)[1]
    numbers = learner.order[0]
    for turn in range(tm.TURNS):
        alike = slice(2 * turn, 2 * turn + 2)
        videos = tm.turned(learner.videos[numbers[alike]], turn)
        assert torch.equal(learner.fed[0][alike], learner.model.encode(videos).byte())
    assert torch.equal(learner.fed[1], numbers % 4)


def test_masks_and_order_are_functions_of_seed_and_step_on_any_device():
    """Integers alone decide: these are the values on every machine."""
    assert magvit.hashes(magvit.key(0, "masks"), torch.tensor(7), 4).tolist() == [
        3061757064, 2332968270, 3101505486, 599981171]
    hidden, label_hidden = tm.draw_masks(magvit.key(0, "masks"), torch.tensor(0), 3000, 8, 4)
    classify, generate_, predict = (hidden[k::3] for k in range(3))
    assert not classify[:, :4].any() and label_hidden[0::3].all()
    assert 0.05 < label_hidden[1::3].float().mean() < 0.15
    assert generate_.any((1, 2)).all() and generate_[:, 0].any(1).float().mean() > 0.1
    assert not predict[:, 0].any() and predict[:, 7].any(1).all()
    other = tm.draw_masks(magvit.key(0, "masks"), torch.tensor(1), 3000, 8, 4)[0]
    assert not torch.equal(other, hidden)


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
    model = shaken(magvit.Magvit(magvit.Sizes(**SIZES), (8, 1, 32, 64), CLASSES))
    codes = torch.randint(0, magvit.LEVELS, (3, 8, 2, magvit.NUMBERS))
    hidden = torch.zeros(3, 8, 2, dtype=torch.bool)
    hidden[:, 5:] = True
    other = torch.where(hidden[..., None], torch.randint(0, magvit.LEVELS, codes.shape), codes)
    label, unknown = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    for one, two in zip(model.transformer(codes, hidden, label, unknown),
                        model.transformer(other, hidden, label, unknown)):
        assert torch.equal(one, two)
    assert torch.equal(model.class_probabilities(codes, 5), model.class_probabilities(other, 5))


def test_what_is_drawn_is_as_likely_as_the_transformer_was_taught():
    """`draw` samples step by step what `logits` is trained on at once."""
    torch.manual_seed(0)
    transformer = shaken(magvit.MaskedTransformer(magvit.Sizes(**SIZES), 8, 1, 4))
    states = torch.randn(50, SIZES["dim"])
    drawn = transformer.draw(states, 1e-6, torch.rand(50, magvit.NUMBERS))  # so cold: the likeliest
    assert torch.equal(transformer.logits(states, drawn).argmax(-1), drawn)
    chance = magvit.uniform(magvit.key("test"), torch.arange(20_000), magvit.NUMBERS)
    drawn = transformer.draw(states[:1].expand(20_000, -1), 1.0, chance)
    expected = transformer.logits(states[:1], drawn[:1])[0, 0].softmax(-1)
    seen = torch.bincount(drawn[:, 0], minlength=magvit.LEVELS) / 20_000
    assert (seen - expected).abs().max() < 0.01


def test_encoder_and_decoder_mean_the_same_by_a_code_and_all_can_be_reached():
    codes, values = magvit.quantize(torch.randn(200_000, 3) * 2)
    assert torch.equal(values, magvit.values_of(codes))
    assert codes.min() == 0 and codes.max() == magvit.LEVELS - 1
    assert len(codes.unique()) == magvit.LEVELS


def test_videos_of_any_height_and_width_are_cut_back_and_only_their_own_pixels_count(tmp_path):
    for height, width in ((8, 8), (28, 28), (48, 40), (33, 64)):
        model = magvit.Magvit(magvit.Sizes(**SIZES), (4, 3, height, width), CLASSES)
        videos = torch.randint(0, 255, (2, 4, 3, height, width), dtype=torch.uint8)
        assert model.decode(model.encode(videos)).shape == videos.shape
        assert model.tokenizer(videos.float() / 255).shape == videos.shape   # what the loss sees
    arrays = data_set(80)
    np.savez(tmp_path / "d.npz", videos=arrays["videos"][:, :5, :, 4:24, 2:30],
             labels=arrays["labels"])
    train(tmp_path / "d.npz", tmp_path / "run", epochs=2)
    with np.load(tmp_path / "run" / "samples.npz") as samples:
        assert samples["reconstructed"].shape == samples["predicted"].shape == (8, 5, 1, 20, 28)
