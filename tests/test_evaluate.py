"""The promises of evaluate_magvit.py: figures that cannot flatter, an evaluation that is saved as it
goes, on any model and any labelled set."""
import json
import os
import shutil

import numpy as np
import pytest
from conftest import kill, run, start, wait_for
from test_train import SIZES, data_set

from checkpointing import find_checkpoints, read_progress

torch = pytest.importorskip("torch") if not os.environ.get("CI") else __import__("torch")
import evaluate_magvit as ev  # noqa: E402
import magvit  # noqa: E402

ev.import_torch()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Untrained: what is tested is what happens around it."""
    path = tmp_path_factory.mktemp("model") / "best_model.pt"
    torch.manual_seed(0)
    path.write_bytes(magvit.saved(magvit.Magvit(magvit.Sizes(**SIZES), (8, 1, 32, 32),
                                                magvit.CLASSES).state()))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dataset.npz"
    np.savez(path, **data_set())
    return path


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    done = evaluate(model, data, out)
    return out, done.stdout


def evaluate(model, data, out, *more, **options):
    return run("evaluate_magvit.py", "--model", model, "--data", data, "--out", out, "--device",
               "cpu", *more, **options)


def test_the_table_has_a_baseline_beside_every_figure(whole):
    out, said = whole
    for words in ("PSNR", "blank video", "accuracy", "judged right", "at 8 times the work",
                  "nearest neighbour", "true class by guessed class", "WARNING"):
        assert words in said
    assert said.index("generated, judged right") < said.index("surest of 8")
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"tokenizer", "classification", "judge", "generation", "prediction",
            "warnings"} <= metrics.keys()
    assert metrics["tokenizer"]["codes"] <= 2**18 and metrics["warnings"]
    progress = read_progress(out / "PROGRESS.txt")
    assert progress["Status"] == "COMPLETE" and progress["Warning"]


def test_killed_and_started_again_it_ends_with_the_same_figures(model, data, whole, tmp_path):
    process = start("evaluate_magvit.py", "--model", model, "--data", data, "--out", tmp_path,
                    "--device", "cpu", "--max-minutes", 0.00001)
    wait_for(lambda: find_checkpoints(tmp_path) or process.poll() is not None, "a checkpoint")
    kill(process)
    progress = read_progress(tmp_path / "PROGRESS.txt")
    assert progress["Status"] == "RUNNING" and "(100%)" not in progress["Progress"]
    evaluate(model, data, tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == (whole[0] / "metrics.json").read_bytes()


def test_called_again_it_shows_the_table_and_changes_nothing(model, data, whole, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "copy")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert "on held-out test videos" in evaluate(model, data, out).stdout
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_another_set_or_model_is_refused_where_one_was_measured(model, data, whole, tmp_path):
    np.savez(tmp_path / "other.npz", **data_set(seed=7))
    assert "data was" in evaluate(model, tmp_path / "other.npz", whole[0], code=2).stderr
    np.savez(tmp_path / "small.npz", **data_set(size=16))
    refused = evaluate(model, tmp_path / "small.npz", tmp_path / "out", code=2).stderr
    assert "this model takes (8, 1, 32, 32)" in refused


def test_blank_videos_do_not_score():
    videos = torch.from_numpy(data_set()["videos"])
    blank = torch.zeros_like(videos)
    assert (ev.count_dots(blank) == 0).all() and (ev.count_dots(videos) == 1).all()
    two = torch.maximum(videos, videos.flip(-1).roll(1, 0))
    assert 0.5 < (ev.count_dots(two) == 2).float().mean() <= 1
    assert (ev.centroids(blank) - ev.centroids(videos)).norm(dim=-1).mean() > 3


def test_centroids_are_those_of_the_data_set():
    arrays = data_set()
    found = ev.centroids(torch.from_numpy(arrays["videos"]))
    assert (found - torch.from_numpy(arrays["trajectory_2d"])).abs().max() < 0.15


def test_codes_that_collapsed_and_accuracy_at_chance_are_said_in_words(model, whole):
    collapsed = magvit.Magvit.load(model, torch.device("cpu"))
    for linear in (collapsed.tokenizer.coarse, collapsed.tokenizer.to_code[1]):
        linear.weight.data.zero_()   # every place of every video gets the same code
    arrays = data_set()
    data = magvit.Data(arrays["videos"], arrays["labels"], list(magvit.CLASSES))
    bench = ev.Bench(collapsed, data, magvit.split(data.labels), 0)
    metrics = json.loads((whole[0] / "metrics.json").read_text())
    with torch.no_grad():
        rows = ev.measure_reconstruction(bench, None, 0, len(bench.many))
    metrics["tokenizer"] = ev.of_tokenizer(rows, collapsed)
    assert metrics["tokenizer"]["active_codes"] == 1
    metrics["classification"].update(accuracy=0.26, videos=400)
    said = " ".join(ev.warnings_of(metrics, 4))
    for words in ("codes have collapsed", "hardly beats a blank video", "accuracy is at chance"):
        assert words in said


def test_no_video_is_measured_that_training_saw(data):
    arrays = data_set(400)
    whole = magvit.Data(arrays["videos"], arrays["labels"], list(magvit.CLASSES))
    model = magvit.Magvit(magvit.Sizes(**SIZES), (8, 1, 32, 32), magvit.CLASSES)
    part = magvit.split(whole.labels)
    bench = ev.Bench(model, whole, part, 0)
    assert (part[bench.many] == magvit.TEST).all() and (part[bench.few] == magvit.TEST).all()
    assert torch.bincount(bench.labels[bench.many]).tolist() == [10] * 4
