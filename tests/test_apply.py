"""The promises of apply_magvit.py; the model here is untrained, since what is tested is what happens around it."""
import json
import os
import re

import numpy as np
import pytest
from conftest import run
from test_train import data_set

torch = pytest.importorskip("torch") if not os.environ.get("CI") else __import__("torch")
import train_magvit as tm  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "best_model.pt"
    torch.manual_seed(0)
    torch.save(tm.Model(tm.PRESETS["tiny"], (8, 1, 32, 32), tm.CLASSES, torch.device("cpu")).state(), path)
    return path


@pytest.fixture
def videos(tmp_path):
    np.savez(tmp_path / "videos.npz", **data_set(40))
    return tmp_path / "videos.npz"


def apply(model, *arguments, **options):
    return run("apply_magvit.py", *arguments, "--model", model, "--device", "cpu", **options)


def test_classify_prints_a_line_a_video_and_writes_json(model, videos, tmp_path):
    done = apply(model, "classify", videos, "--json", tmp_path / "c.json")
    lines = done.stdout.splitlines()
    assert len(lines) == 40
    assert all(re.fullmatch(rf"{i}\t(linear|circular|helical|parabolic)\t[01]\.\d{{4}}", line) for i, line in enumerate(lines))
    rows = json.loads((tmp_path / "c.json").read_text())
    assert len(rows) == 40 and all(abs(sum(row["probabilities"].values()) - 1) < 1e-4 for row in rows)


def test_generate_writes_the_data_sets_format_and_the_seed_makes_it_repeatable(model, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        apply(model, "generate", "--class", "helical", "--n", 5, "--seed", seed, "--out", tmp_path / f"{name}.npz")
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b != c
    with np.load(tmp_path / "a.npz", allow_pickle=False) as made:
        assert made["videos"].shape == (5, 8, 1, 32, 32) and made["videos"].dtype == np.uint8
        assert made["labels"].tolist() == [2] * 5 and made["labels"].dtype == np.int64


def test_predict_keeps_the_given_frames_and_the_labels(model, videos, tmp_path):
    apply(model, "predict", videos, "--given", 3, "--out", tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz") as made, np.load(videos) as real:
        assert (made["videos"][:, :3] == real["videos"][:, :3]).all() and (made["videos"][:, 3:] != real["videos"][:, 3:]).any()
        assert (made["labels"] == real["labels"]).all()


def test_evaluate_prints_the_table(model, videos):
    done = apply(model, "evaluate", videos)
    for words in ("PSNR", "blank video", "accuracy", "judged right", "nearest neighbour", "true class by guessed class"):
        assert words in done.stdout


def test_it_never_writes_over_a_file_that_differs(model, tmp_path):
    (tmp_path / "thesis.npz").write_text("years of work")
    done = apply(model, "generate", "--class", "linear", "--n", 1, "--out", tmp_path / "thesis.npz", code=1)
    assert "left alone" in done.stderr and (tmp_path / "thesis.npz").read_text() == "years of work"


@pytest.mark.parametrize("arguments, code, words", [
    (["generate", "--class", "square", "--out", "x.npz"], 2, "knows linear, circular, helical, parabolic"),
    (["generate", "--class", "linear", "--n", 0, "--out", "x.npz"], 2, "--n must be"),
    (["predict", "VIDEOS", "--given", 8, "--out", "x.npz"], 2, "--given must be one of 1, 2"),
    (["predict", "VIDEOS", "--given", 0, "--out", "x.npz"], 2, "--given must be one of"),
    (["classify", "nowhere.npz"], 2, "no such file"), (["evaluate", "nowhere.npz"], 2, "no such data"),
    (["classify", "SMALL"], 2, "this model takes (8, 1, 32, 32)"), (["classify", "EMPTY"], 1, "not a whole .npz"),
    (["classify", "NAN"], 1, "NaN"), (["classify", "NONE"], 1, "has no videos"), (["dance"], 2, "invalid choice")])
def test_bad_input_is_one_line_that_says_what_is_right(model, videos, tmp_path, arguments, code, words):
    np.savez(tmp_path / "small.npz", **data_set(40, size=16))
    np.savez(tmp_path / "nan.npz", videos=np.full((2, 8, 1, 32, 32), np.nan, np.float32))
    np.savez(tmp_path / "none.npz", labels=np.zeros(3, int))
    (tmp_path / "empty.npz").touch()
    names = {"VIDEOS": videos, **{k: tmp_path / f"{k.lower()}.npz" for k in ("SMALL", "EMPTY", "NAN", "NONE")}}
    options = [] if arguments == ["dance"] else ["--model", model]
    done = run("apply_magvit.py", *[names.get(a, a) for a in arguments], *options, code=code, cwd=tmp_path)
    assert words in done.stderr and not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize("content, code, words", [
    (None, 2, "no such model"), (b"", 1, "empty"), (b"garbage", 1, "not a whole model"), ("foreign", 1, "not a model of")])
def test_a_missing_damaged_or_foreign_model_is_one_line(videos, tmp_path, content, code, words):
    path = tmp_path / "model.pt"
    if content == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif content is not None:
        path.write_bytes(content)
    assert words in apply(path, "classify", videos, code=code).stderr


def test_a_truncated_or_bit_flipped_model_is_refused(model, videos, tmp_path):
    data = bytearray(model.read_bytes())
    (tmp_path / "cut.pt").write_bytes(data[:-500])
    data[len(data) // 2] ^= 8
    (tmp_path / "flipped.pt").write_bytes(data)
    for name in ("cut.pt", "flipped.pt"):
        assert "not a whole model" in apply(tmp_path / name, "classify", videos, code=1).stderr
