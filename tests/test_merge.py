"""The promises of merge.py: one data set, whole and checked, or none."""
import functools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, need, run
from test_videos import call, data_set  # noqa: F401

import checkpointing
import merge
from checkpointing import read_records, sha256


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    run("generate.py", "--n", 500, "--every", 100, "--out", out)
    return out


@pytest.fixture
def results(made, tmp_path):
    return shutil.copytree(made, tmp_path / "results")


@pytest.fixture
def join(call):
    return functools.partial(call, merge)


def vouch(path, **other):
    """Let the index say what is there now."""
    record = {**read_records(path.parent)[path.name], "sha256": sha256(path), **other}
    checkpointing.append_record(path.parent, record)


def test_a_set_of_the_contracts_names_and_types_from_results_and_its_shards(made, tmp_path):
    """Run as people run it, once of one run and once of shards: the same bytes."""
    said = run("merge.py", made, "--out", tmp_path / "set.npz").stdout
    with np.load(tmp_path / "set.npz", allow_pickle=False) as found:
        found = dict(found)
    made_by = json.loads(str(found.pop("made_by")))
    assert made_by["samples"] == [[0, 500]] and made_by["seed"] == 42
    for name, array in data_set(500).items():
        assert found[name].dtype == array.dtype and (found.pop(name) == array).all()
    assert not found
    for words in ("500 samples from 5 checkpoints", "videos: uint8 (500, 8, 1, 32, 32)",
                  "labels: int64 (500,)"):
        assert words in said
    for part in (1, 2):
        run("generate.py", "--n", 500, "--every", 90, "--shard", f"{part}/2",
            "--out", tmp_path / "results")
    run("merge.py", cwd=tmp_path)
    assert sha256(tmp_path / "results" / "dataset.npz") == sha256(tmp_path / "set.npz")


def test_gaps_are_refused_naming_the_range_and_partial_lists_them(results, tmp_path, join):
    (results / "checkpoint_00200.npz").unlink()
    (results / "checkpoint_00400.npz").unlink()
    out = tmp_path / "x.npz"
    assert "200 to 299, 400 to 499 are missing" in join(results, "--out", out, code=1)
    assert not out.exists()
    said = join(results, "--out", out, "--partial")
    assert "missing: 200 to 299" in said and "missing: 400 to 499" in said
    with np.load(out) as found:
        assert len(found["labels"]) == 300
        assert json.loads(str(found["made_by"]))["samples"] == [[0, 200], [300, 400]]


@pytest.mark.parametrize("damage", [
    lambda data: data[:-5], lambda data: data[:2000] + bytes([data[2000] ^ 16]) + data[2001:]])
def test_a_damaged_checkpoint_is_one_line_and_nothing_is_written(results, tmp_path, join, damage):
    path = results / "checkpoint_00300.npz"
    path.write_bytes(damage(path.read_bytes()))
    for more in ([], ["--partial"]):
        said = join(results, "--out", tmp_path / "x.npz", *more, code=1)
        assert f"{path} (samples 300 to 399): damaged" in said and "generate.py again" in said
    assert os.listdir(tmp_path) == ["results"]


@pytest.mark.parametrize("name, value, words", [
    ("trajectory_3d", np.full((100, 8, 3), np.inf, np.float32), "NaN or Inf"),
    ("labels", np.zeros(100, np.int64), "labels are not"),
    ("labels", np.arange(100, 200, dtype=np.int32) % 4, "does not fit run.json"),
    ("videos", np.zeros((99, 8, 1, 32, 32), np.uint8), "does not fit run.json"),
    ("videos", np.array([{}], object), "cannot be read as an .npz")])
def test_wrong_contents_are_refused_although_the_index_vouches_for_them(results, tmp_path, join,
                                                                        name, value, words):
    path = results / "checkpoint_00100.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **{**arrays, name: value})
    vouch(path)
    said = join(results, "--out", tmp_path / "x.npz", code=1)
    assert words in said and str(path) in said and os.listdir(tmp_path) == ["results"]


def test_runs_that_overlap_do_not_belong_together_or_are_none_are_refused(results, tmp_path, join):
    out = tmp_path / "new" / "x.npz"
    other = shutil.copytree(results, tmp_path / "other")
    said = join(results, other, "--out", out, code=1)
    assert "samples 0 to 99 are in" in said and str(other) in said and "(overlap)" in said
    run_json = other / "run.json"
    run_json.write_text(run_json.read_text().replace('"seed": 42', '"seed": 7'))
    assert "seed is 7, but 42" in join(results, other, "--out", out, code=1)
    run_json.write_text('{"settings": {"n": 4}}')
    assert "run.json: not that of a run of generate.py" in join(other, "--out", out, code=1)
    run_json.unlink()
    for none in (other, tmp_path / "nowhere"):
        assert "not a run directory of generate.py" in join(none, "--out", out, code=2)
    assert not out.parent.exists()


def test_it_never_writes_over_what_is_not_its_own(results, tmp_path, join):
    mine = tmp_path / "mine.npz"
    np.savez(mine, videos=np.zeros((500, 8, 1, 32, 32), np.uint8), labels=np.arange(500) % 4)
    for content in (mine.read_bytes(), b"years of work", b""):
        mine.write_bytes(content)
        said = join(results, "--out", mine, code=1)
        assert "left alone" in said and mine.read_bytes() == content
    join(results, "--out", tmp_path / "set.npz")
    run_json = results / "run.json"
    run_json.write_text(run_json.read_text().replace('"seed": 42', '"seed": 7'))
    assert "'seed': 42" in join(results, "--out", tmp_path / "set.npz", code=1)


def test_a_part_never_replaces_another_part_or_the_whole(results, tmp_path, join):
    """A larger one that holds it all may."""
    only = {}
    for kept in (0, 100):
        only[kept] = shutil.copytree(results, tmp_path / f"only {kept}")
        for path in only[kept].glob("checkpoint_*.npz"):
            if path.name != f"checkpoint_{kept:05d}.npz":
                path.unlink()
    out = tmp_path / "set.npz"
    for directory, refused, had in ((only[0], only[100], "0 to 99"),
                                    (results, only[0], "0 to 499")):
        join(directory, "--out", out, "--partial")
        before = sha256(out)
        said = join(refused, "--out", out, "--partial", code=1)
        assert f"has samples {had}, and not all" in said and sha256(out) == before


def test_a_full_disk_says_what_it_wanted_and_leaves_the_old_set(results, small_disk, join):
    disk = small_disk(100 * 1024)
    said = join(results, "--out", disk / "set.npz", code=1)
    assert re.search(r"set.npz: it will take about 2\d\d,\d{3} bytes, and .* are free", said)
    for path in results.glob("*.npz"):      # as if they were smaller
        vouch(path, bytes=1)
    assert "No space left on device" in join(results, "--out", disk / "set.npz", code=1)
    assert os.listdir(disk) == []


def test_a_kill_leaves_no_half_set_and_its_temp_file_is_swept_next_time(results, tmp_path, join):
    need("strace")
    out = tmp_path / "set.npz"
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=rename",
             "-e", "inject=rename:signal=SIGKILL:when=1"]
    subprocess.run([*trace, sys.executable, ROOT / "merge.py", results, "--out", out],
                   capture_output=True)
    assert not out.exists() and len(list(tmp_path.glob(".set.npz.*.tmp"))) == 1
    join(results, "--out", out)
    assert not list(tmp_path.glob(".set.npz.*.tmp"))
