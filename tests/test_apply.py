"""The promises of apply_magvit.py; the model here is untrained, since what is tested is what
happens around it."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run
from test_videos import call, data_set  # noqa: F401

import videos

torch = pytest.importorskip("torch") if not os.environ.get("CI") else __import__("torch")
import apply_magvit  # noqa: E402
import magvit  # noqa: E402
from test_evaluate import untrained  # noqa: E402


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """model.pt and videos.npz, in the directory where the stage is called."""
    home = tmp_path_factory.mktemp("home")
    (home / "model.pt").write_bytes(magvit.saved(untrained().state()))
    np.savez(home / "videos.npz", **data_set(40))
    return home


@pytest.fixture
def apply(home, call, monkeypatch):
    def apply(*arguments, model="model.pt", code=0):
        monkeypatch.chdir(home)
        return call(apply_magvit, *arguments, "--model", model, "--device", "cpu", code=code)
    return apply


def test_classify_prints_a_line_a_video_and_writes_json(apply, home, tmp_path):
    lines = apply("classify", "videos.npz", "--json", tmp_path / "c.json").splitlines()
    assert len(lines) == 40
    names = "linear|circular|helical|parabolic"
    assert all(re.fullmatch(rf"{i}\t({names})\t[01]\.\d{{4}}", line)
               for i, line in enumerate(lines))
    rows = json.loads((tmp_path / "c.json").read_text())
    assert len(rows) == 40 and all(
        abs(sum(row["probabilities"].values()) - 1) < 1e-4 for row in rows)
    assert "left alone" in apply("classify", "videos.npz", "--json", tmp_path / "c.json", code=1)


def test_generate_writes_the_data_sets_format_and_the_seed_makes_it_repeatable(apply, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        apply("generate", "--class", "helical", "--n", 5, "--seed", seed,
              "--out", tmp_path / f"{name}.npz")
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b != c
    made, labels, names = videos.read(tmp_path / "a.npz")
    assert made.shape == (5, 8, 1, 32, 32) and made.dtype == np.uint8
    assert labels.tolist() == [2] * 5 and labels.dtype == np.int64
    assert names == list(videos.CLASSES)


def test_predict_keeps_the_given_frames_and_the_labels(apply, home, tmp_path):
    apply("predict", "videos.npz", "--given", 3, "--out", tmp_path / "p" / "p.npz")
    with np.load(tmp_path / "p" / "p.npz") as made, np.load(home / "videos.npz") as real:
        assert (made["videos"][:, :3] == real["videos"][:, :3]).all()
        assert (made["videos"][:, 3:] != real["videos"][:, 3:]).any() and made["given"] == 3
        assert (made["labels"] == real["labels"]).all()
    assert os.listdir(tmp_path / "p") == ["p.npz"]
    np.savez(tmp_path / "unlabelled.npz", videos=data_set(4)["videos"])
    apply("predict", tmp_path / "unlabelled.npz", "--given", 3, "--out", tmp_path / "q.npz")
    assert videos.read(tmp_path / "q.npz")[1].shape == (4,)


KILLED = """import os, sys; sys.path.insert(0, {root!r})
import apply_magvit, magvit
apply_magvit.BATCH = apply_magvit.PIECE = 4
made, generate = [], magvit.Magvit.generate
def killed(*arguments):
    made.append(0)
    return generate(*arguments) if len(made) < 4 else os.kill(os.getpid(), 9)
magvit.Magvit.generate = killed
apply_magvit.main()"""


def test_killed_and_started_again_it_makes_the_same_file(apply, home, tmp_path, monkeypatch):
    """With pieces of 4 videos, so that a kill falls among them."""
    monkeypatch.setattr(apply_magvit, "BATCH", 4)
    monkeypatch.setattr(apply_magvit, "PIECE", 4)
    arguments = ["generate", "--class", "linear", "--n", "20", "--out"]
    apply(*arguments, tmp_path / "whole.npz")
    done = subprocess.run([sys.executable, "-c", KILLED.format(root=str(ROOT)), *arguments,
                           tmp_path / "cut.npz", "--model", home / "model.pt", "--device", "cpu"])
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "cut.npz").exists()
    assert len(list((tmp_path / "cut.npz.parts").glob("checkpoint_*.npz"))) == 3
    assert "seed was" in apply(*arguments, tmp_path / "cut.npz", "--seed", 5, code=2)
    (tmp_path / "cut.npz.parts" / "thesis.txt").write_text("not ours, so it stays")
    apply(*arguments, tmp_path / "cut.npz")
    assert (tmp_path / "cut.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert os.listdir(tmp_path / "cut.npz.parts") == ["thesis.txt"]
    assert not (tmp_path / "whole.npz.parts").exists()


def test_classify_takes_a_run_directory_and_a_set_larger_than_the_memory(apply, home, tmp_path,
                                                                         monkeypatch):
    run("generate.py", "--n", 12, "--every", 5, "--out", tmp_path / "run")
    said = apply("classify", tmp_path / "run")
    assert len(said.splitlines()) == 12
    apply("predict", "videos.npz", "--given", 4, "--out", tmp_path / "memory.npz")
    monkeypatch.setattr(videos, "IN_MEMORY", 0)
    assert apply("classify", tmp_path / "run") == said
    apply("predict", "videos.npz", "--given", 4, "--out", tmp_path / "disk.npz")
    assert (tmp_path / "disk.npz").read_bytes() == (tmp_path / "memory.npz").read_bytes()


@pytest.mark.parametrize("arguments, code, words", [
    (["generate", "--class", "square", "--out", "x.npz"],
     2, "knows linear, circular, helical, parabolic"),
    (["generate", "--class", "linear", "--n", 0, "--out", "x.npz"], 2, "--n must be"),
    (["generate", "--class", "linear", "--out", "x.mp4"], 2, "written as .npz"),
    (["generate", "--class", "linear", "--out", "videos.npz"], 1, "left alone"),
    (["predict", "videos.npz", "--given", 8, "--out", "x.npz"], 2, "--given must be from 1 to 7"),
    (["classify", "nowhere.npz"], 2, "no such data"),
    (["classify", "small.npz"], 2, "this model takes (8, 1, 32, 32)"),
    (["classify", "model.pt"], 1, "has no videos.npy"), (["dance"], 2, "invalid choice")])
def test_bad_input_is_one_line_that_says_what_is_right(apply, home, arguments, code, words):
    np.savez(home / "small.npz", **data_set(40, size=16))
    before = sorted(os.listdir(home))
    assert words in apply(*arguments, code=code) and sorted(os.listdir(home)) == before


def test_a_model_that_will_not_do_is_one_line_and_none_of_it_is_run(apply, home, tmp_path):
    class Evil:
        def __reduce__(self):
            return shutil.copy, (str(home / "model.pt"), str(tmp_path / "was run"))

    def content(state):
        torch.save(state, tmp_path / "saved")
        return (tmp_path / "saved").read_bytes()

    whole, path = (home / "model.pt").read_bytes(), tmp_path / "model.pt"
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 8
    for data, code, words in (
            (b"garbage", 1, "not a zip file"), (whole[:-500], 1, "not a whole model"),
            (bytes(flipped), 1, "checksum differs"),
            (content({"weights": torch.zeros(3)}), 1, "not a whole model of train_magvit.py"),
            (content({"learning": torch.zeros(3)}), 2, "best_model.pt, are beside it"),
            (content({"format": magvit.FORMAT, "sizes": Evil()}), 1, "not a whole model")):
        path.write_bytes(data)
        assert words in apply("classify", "videos.npz", code=code, model=path)
    assert not (tmp_path / "was run").exists()
    for name, words in (("none.pt", "no such model"), ("", "a directory; name the best_model.pt")):
        assert words in apply("classify", "videos.npz", code=2, model=tmp_path / name)
