"""The promises of videos.py: what will do is read the same wherever it lies and whatever the memory
allows; what will not do is refused in one line, before hours of work."""
import os
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import run

import generate
import videos
from checkpointing import CheckpointError


def data_set(n=80, **settings):
    """{name: array} of n of our samples."""
    settings = generate.Settings(**settings)
    arrays = generate.empty_arrays(settings, n)
    generate.render(settings, 0, n, list(arrays.values()))
    return arrays


@pytest.fixture
def call(capsys, monkeypatch):
    """Call a stage here: what it says; with a code, the one line that it ends with."""
    def call(stage, *arguments, code=0):
        monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *map(str, arguments)])
        if not code:
            stage.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as ended:
            stage.main()
        said = capsys.readouterr().err
        assert ended.value.code == code and said.count("\n") == 1, said
        return said
    return call


@pytest.fixture(scope="module")
def ours():
    return data_set()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run directory of several pieces, and its data set."""
    home = tmp_path_factory.mktemp("made")
    run("generate.py", "--n", 400, "--every", 90, "--out", home / "run")
    run("merge.py", home / "run", "--out", home / "dataset.npz")
    return home


@pytest.fixture
def saved(tmp_path):
    """Save arrays as an .npz; returns its path."""
    def save(**arrays):
        np.savez(tmp_path / "set.npz", **arrays)
        return tmp_path / "set.npz"
    return save


# -- what will do


def test_a_set_and_a_run_directory_are_read_alike(made):
    merged, filling = videos.load(made / "dataset.npz"), videos.load(made / "run")
    assert (merged.videos == filling.videos).all() and (merged.labels == filling.labels).all()
    assert merged.classes == filling.classes == list(videos.CLASSES)
    assert (merged.videos == data_set(400)["videos"]).all()
    assert len(merged.first(90).videos) == len(merged.first(90).labels) == 90


@pytest.mark.parametrize("damage", [lambda file: file.unlink(),
                                    lambda file: file.write_bytes(file.read_bytes()[:-100])])
def test_a_run_directory_ends_before_its_first_gap_or_bad_piece(made, tmp_path, damage):
    copy = tmp_path / "run"
    copy.mkdir()
    for file in (made / "run").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    damage(copy / "checkpoint_00180.npz")
    assert (videos.load(copy).videos == data_set(180)["videos"]).all()
    (copy / "checkpoints.jsonl").unlink()       # a checkpoint without a line is nobody's
    with pytest.raises(CheckpointError, match="no run of generate.py with a good"):
        videos.load(copy)


def test_shards_are_read_in_the_order_of_their_samples(tmp_path):
    for part in (2, 1):
        run("generate.py", "--n", 120, "--every", 50, "--shard", f"{part}/2", "--out", tmp_path)
    assert (videos.load(tmp_path).videos == data_set(120)["videos"]).all()


def test_names_of_classes_are_the_sets_own_or_ours_or_numbers(ours, saved):
    mine = {"videos": ours["videos"], "labels": ours["labels"]}
    assert videos.load(saved(**mine)).classes == ["class 0", "class 1", "class 2", "class 3"]
    assert videos.load(saved(**mine, made_by="{}")).classes == list(videos.CLASSES)
    names = np.array(["left", "right", "up", "down"])
    assert videos.load(saved(**mine, class_names=names)).classes == list(names)
    assert videos.read(saved(videos=ours["videos"]))[1:] == (None, None)


def test_labels_are_integers_of_any_kind(ours, saved):
    for kind in ("uint8", "int16", "uint64", ">i4"):
        found = videos.load(saved(videos=ours["videos"], labels=ours["labels"].astype(kind)))
        assert found.labels.dtype == np.int64 and (found.labels == ours["labels"]).all()


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_become_the_same_bytes_and_errors_of_rounding_are_none(ours, saved, kind):
    floats = (ours["videos"] / 255).astype(kind)
    floats[0, 0, 0, 0, 0] = kind(1) + np.finfo(kind).eps
    found = videos.load(saved(videos=floats, labels=ours["labels"])).videos
    assert found[0, 0, 0, 0, 0] == 255 and (found[1:] == ours["videos"][1:]).all()


# -- what will not do


@pytest.mark.parametrize("change, words", [
    (lambda v, n: {"videos": np.moveaxis(v, 2, -1)}, r"store np.moveaxis\(videos, -1, 2\)"),
    (lambda v, n: {"videos": v[:, :, 0]}, r"they are \(80, 8, 32, 32\)"),
    (lambda v, n: {"videos": np.asfortranarray(v)}, r"must be .* in C order.* in Fortran order"),
    (lambda v, n: {"videos": v[:, :3]}, "4 frames"),
    (lambda v, n: {"videos": v[..., :7]}, "8x8 pixels"),
    (lambda v, n: {"videos": v[:0], "labels": n[:0]}, r"they are \(0, 8"),
    (lambda v, n: {"videos": v.astype(int)}, "they are int64"),
    (lambda v, n: {"videos": v.astype(np.float32)}, "goes from 0 to .*videos / 255"),
    (lambda v, n: {"videos": v / 127.5 - 1}, r"goes from -1 to .*\(videos \+ 1\) / 2"),
    (lambda v, n: {"videos": np.concatenate([v[:7] / 255, v[7:] * np.nan])}, "video 7 .* from nan"),
    (lambda v, n: {"labels": n[:-1]}, "one a video"),
    (lambda v, n: {"labels": n / 2}, "labels must be integers"),
    (lambda v, n: {"labels": n - 1}, "from 0 on"),
    (lambda v, n: {"labels": n * 0 + 3}, "all its videos have label 3"),
    (lambda v, n: {"labels": n * 400}, "at most 1,000 classes"),
    (lambda v, n: {"labels": np.where(np.arange(80) < 9, 0, 1)}, "class 0 has 9 videos"),
    (lambda v, n: {"labels": n + 1, "made_by": "{}"}, "video 3 has label 4, but .* linear, circ")])
def test_data_that_will_not_do_is_refused_in_words(ours, saved, change, words):
    path = saved(**{"videos": ours["videos"], "labels": ours["labels"],
                    **change(ours["videos"], ours["labels"])})
    with pytest.raises(CheckpointError, match=words):
        videos.load(path)


def test_labels_are_looked_at_before_the_videos_are_read(ours, saved, monkeypatch):
    monkeypatch.setattr(videos, "gathered", lambda *_: pytest.fail("the videos were read"))
    with pytest.raises(CheckpointError, match="has label 9"):
        videos.load(saved(videos=ours["videos"], labels=ours["labels"] * 3, made_by="{}"))
    with pytest.raises(CheckpointError, match="has no labels"):
        videos.load(saved(videos=ours["videos"]))
    with pytest.raises(CheckpointError, match="has no videos.npy; it has .*labels"):
        videos.load(saved(labels=ours["labels"]))


def test_what_is_no_whole_npz_is_one_line(ours, saved, tmp_path):
    path = saved(videos=ours["videos"], labels=ours["labels"])
    data = path.read_bytes()
    for content, words in ((data[:-500], "not a zip file"), (b"", "not a zip file"),
                           (data[:5000] + bytes([data[5000] ^ 4]) + data[5001:], "Bad CRC-32")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{path}: cannot be read .*{words}"):
            videos.load(path)
    np.save(tmp_path / "v.npy", ours["videos"])
    for name, words in (("v.npy", "cannot be read as an .npz"), ("none.npz", "no such data"),
                        ("", "no run of generate.py")):
        with pytest.raises(CheckpointError, match=words):
            videos.load(tmp_path / name)


# -- memory


def test_a_set_larger_than_the_memory_is_unpacked_and_is_the_same(made, monkeypatch):
    before = sorted(os.listdir(made)), sorted(os.listdir(made / "run"))
    monkeypatch.setattr(videos, "IN_MEMORY", 0)
    monkeypatch.setattr(videos, "BLOCK", 1 << 16)
    for source in ("dataset.npz", "run"):
        tracemalloc.start()
        found = videos.load(made / source)
        videos.checked_split(found)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        size = found.videos.nbytes
        assert isinstance(found.videos, np.memmap) and peak < size / 2, "no other copy of it"
        assert (found.videos == data_set(400)["videos"]).all()
    assert (sorted(os.listdir(made)), sorted(os.listdir(made / "run"))) == before   # no debris


def test_a_disk_too_small_for_it_is_said_in_one_line(made, small_disk, monkeypatch):
    monkeypatch.setattr(videos, "IN_MEMORY", 0)
    monkeypatch.setenv("TMPDIR", str(small_disk(1 << 20)))
    with pytest.raises(CheckpointError, match=r"do not fit into a file .*\(No space .* TMPDIR"):
        videos.load(made / "dataset.npz")


# -- training, validation, test


def test_the_split_is_stratified_and_stable():
    labels = np.random.default_rng(0).integers(0, 4, 2000)
    part = videos.split(labels)
    assert (videos.split(labels[:1000]) == part[:1000]).all()
    for k in range(4):
        shares = np.bincount(part[labels == k]) / (labels == k).sum()
        assert np.allclose(shares, [0.8, 0.1, 0.1], atol=0.02)


def test_the_same_video_in_two_parts_is_found(made):
    data = videos.load(made / "dataset.npz")
    part, digest = videos.checked_split(data)
    changed = data.videos.copy()
    first = np.flatnonzero(part == videos.TRAIN)[7]
    second = np.flatnonzero(part == videos.TEST)[3]
    changed[second] = changed[first]
    with pytest.raises(CheckpointError, match=f"video {max(first, second)} .* is the same as video "
                                              f"{min(first, second)} "):
        videos.checked_split(videos.Data(changed, data.labels, data.classes))
    changed[second] = data.videos[second]
    changed[first] = data.videos[np.flatnonzero(part == videos.TRAIN)[8]]   # in one part: allowed
    assert videos.checked_split(videos.Data(changed, data.labels, data.classes))[1] != digest
