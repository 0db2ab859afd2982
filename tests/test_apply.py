"""The promises of apply_magvit.py; the model here is untrained, since what is tested is what happens around it."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, kill, run, wait_for
from test_train import SIZES, data_set

from checkpointing import find_checkpoints

torch = pytest.importorskip("torch") if not os.environ.get("CI") else __import__("torch")
import magvit  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "best_model.pt"
    torch.manual_seed(0)
    path.write_bytes(magvit.saved(magvit.Magvit(magvit.Sizes(**SIZES), (8, 1, 32, 32),
                                                magvit.CLASSES).state()))
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
    names = "linear|circular|helical|parabolic"
    assert all(re.fullmatch(rf"{i}\t({names})\t[01]\.\d{{4}}", line)
               for i, line in enumerate(lines))
    rows = json.loads((tmp_path / "c.json").read_text())
    assert len(rows) == 40 and all(
        abs(sum(row["probabilities"].values()) - 1) < 1e-4 for row in rows)


def test_generate_writes_the_data_sets_format_and_the_seed_makes_it_repeatable(model, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        apply(model, "generate", "--class", "helical", "--n", 5,
              "--seed", seed, "--out", tmp_path / f"{name}.npz")
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b != c
    with np.load(tmp_path / "a.npz", allow_pickle=False) as made:
        assert made["videos"].shape == (5, 8, 1, 32, 32) and made["videos"].dtype == np.uint8
        assert made["labels"].tolist() == [2] * 5 and made["labels"].dtype == np.int64


def test_predict_keeps_the_given_frames_and_the_labels(model, videos, tmp_path):
    apply(model, "predict", videos, "--given", 3, "--out", tmp_path / "p" / "p.npz")
    with np.load(tmp_path / "p" / "p.npz") as made, np.load(videos) as real:
        assert (made["videos"][:, :3] == real["videos"][:, :3]).all()
        assert (made["videos"][:, 3:] != real["videos"][:, 3:]).any() and made["given"] == 3
        assert (made["labels"] == real["labels"]).all()
    assert not (tmp_path / "p.npz.parts").exists()
    assert "1 files are whole, 0 bad" in run("checkpointing.py", "verify", tmp_path / "p").stdout


def test_evaluate_prints_the_table(model, tmp_path):
    np.savez(tmp_path / "labelled.npz", **data_set(80))
    done = apply(model, "evaluate", tmp_path / "labelled.npz")
    for words in ("PSNR", "blank video", "accuracy", "judged right", "nearest neighbour",
                  "true class by guessed class"):
        assert words in done.stdout


ONE_BATCH_A_PIECE = """
import sys; sys.path.insert(0, {root!r})
import apply_magvit; apply_magvit.BATCH = apply_magvit.PIECE = 8
apply_magvit.main()
"""


def test_killed_and_started_again_it_makes_the_same_file(model, tmp_path):
    """With pieces of 8 videos, so that a kill falls among them."""
    def arguments(out):
        code = ONE_BATCH_A_PIECE.format(root=str(ROOT))
        return [sys.executable, "-c", code, "generate", "--class", "linear", "--n", "60",
                "--model", model, "--device", "cpu", "--out", out]
    subprocess.run(arguments(tmp_path / "whole.npz"), check=True, timeout=100)
    process = subprocess.Popen(arguments(tmp_path / "cut.npz"))
    wait_for(lambda: len(find_checkpoints(tmp_path / "cut.npz.parts")) > 1
             if (tmp_path / "cut.npz.parts").is_dir() else process.poll() is not None, "two pieces")
    kill(process)
    assert not (tmp_path / "cut.npz").exists()
    subprocess.run(arguments(tmp_path / "cut.npz"), check=True, timeout=100)
    assert (tmp_path / "cut.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not (tmp_path / "cut.npz.parts").exists()


def test_classify_takes_a_run_directory(model, tmp_path):
    run("generate.py", "--n", 12, "--every", 5, "--out", tmp_path / "run")
    assert len(apply(model, "classify", tmp_path / "run").stdout.splitlines()) == 12


def test_it_never_writes_over_a_file_that_differs(model, tmp_path):
    (tmp_path / "thesis.npz").write_text("years of work")
    done = apply(model, "generate", "--class", "linear", "--n",
                 1, "--out", tmp_path / "thesis.npz", code=1)
    assert "left alone" in done.stderr and (tmp_path / "thesis.npz").read_text() == "years of work"


@pytest.mark.parametrize("arguments, code, words", [
    (["generate", "--class", "square", "--out", "x.npz"],
     2, "knows linear, circular, helical, parabolic"),
    (["generate", "--class", "linear", "--n", 0, "--out", "x.npz"], 2, "--n must be"),
    (["generate", "--class", "linear", "--out", "x.mp4"], 2, "written as .npz"),
    (["predict", "VIDEOS", "--given", 8, "--out", "x.npz"], 2, "--given must be from 1 to 7"),
    (["predict", "VIDEOS", "--given", 0, "--out", "x.npz"], 2, "--given must be from 1 to 7"),
    (["classify", "nowhere.npz"], 2, "no such data"),
    (["evaluate", "nowhere.npz"], 2, "no such data"),
    (["classify", "SMALL"], 2, "this model takes (8, 1, 32, 32)"),
    (["classify", "EMPTY"], 1, "not a whole .npz"),
    (["classify", "NAN"], 1, "NaN"), (["classify", "NONE"], 1, "has no videos"),
    (["dance"], 2, "invalid choice")])
def test_bad_input_is_one_line_that_says_what_is_right(model, videos, tmp_path, arguments, code,
                                                       words):
    np.savez(tmp_path / "small.npz", **data_set(40, size=16))
    np.savez(tmp_path / "nan.npz", videos=np.full((2, 8, 1, 32, 32), np.nan, np.float32))
    np.savez(tmp_path / "none.npz", labels=np.zeros(3, int))
    (tmp_path / "empty.npz").touch()
    names = {"VIDEOS": videos, **{k: tmp_path / f"{k.lower()}.npz" for k in ("SMALL",
                                                           "EMPTY", "NAN", "NONE")}}
    options = [] if arguments == ["dance"] else ["--model", model]
    done = run("apply_magvit.py", *[names.get(a, a)
               for a in arguments], *options, code=code, cwd=tmp_path)
    assert words in done.stderr and not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize("content, code, words", [
    (None, 2, "no such model"), (b"", 1, "empty"), (b"garbage", 1, "not a whole model"),
    ("foreign", 1, "not a model of"), ("checkpoint", 2, "best_model.pt and final_model.pt beside")])
def test_a_missing_damaged_or_foreign_model_is_one_line(videos, tmp_path, content, code, words):
    path = tmp_path / "model.pt"
    if content in ("foreign", "checkpoint"):
        torch.save({"weights" if content == "foreign" else "learning": torch.zeros(3)}, path)
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
