"""The promises of merge.py: one data set, whole and checked, or none."""
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, kill, need, peak_memory, run, start, wait_for

import generate
from checkpointing import find_checkpoints, sha256


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    run("generate.py", "--n", 500, "--every", 100, "--out", out)
    return out


@pytest.fixture
def results(made, tmp_path):
    return shutil.copytree(made, tmp_path / "results")


def merge(*runs, out, code=0, more=()):
    return run("merge.py", *runs, "--out", out, *more, code=code)


def rewrite(path, **changes):
    """Change arrays of a checkpoint, as whole as before but with other contents, and forget its record."""
    with np.load(path) as archive:
        arrays = {**dict(archive), **changes}
    np.savez(open(path, "wb"), **{name: a for name, a in arrays.items() if a is not None})
    (path.parent / "checkpoints.jsonl").unlink(missing_ok=True)


def test_it_joins_prints_and_the_set_loads_with_the_contracts_names_and_types(results):
    done = merge(results, out=results / "dataset.npz")
    with np.load(results / "dataset.npz", allow_pickle=False) as data:
        arrays = dict(data)
    expected = generate.empty_arrays(generate.Settings(), 500)
    generate.render(generate.Settings(), 0, 500, list(expected.values()))
    assert list(arrays) == ["videos", "labels", "trajectory_3d", "trajectory_2d"]
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype and (arrays[name] == array).all()
    for words in ("500 samples from 5 checkpoints", "videos: uint8 (500, 8, 1, 32, 32)", "labels: int64 (500,)",
                  "linear 125, circular 125, helical 125, parabolic 125", sha256(results / "dataset.npz")):
        assert words in done.stdout


def test_the_default_is_results_and_its_shards(tmp_path, results):
    merge(results, out=tmp_path / "whole.npz")
    for part in (1, 2):
        run("generate.py", "--n", 500, "--every", 90, "--shard", f"{part}/2", "--out", tmp_path / "sharded" / "results")
    done = subprocess.run([sys.executable, ROOT / "merge.py"], cwd=tmp_path / "sharded", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sha256(tmp_path / "sharded" / "results" / "dataset.npz") == sha256(tmp_path / "whole.npz")


def test_it_is_reproducible_byte_for_byte(results, tmp_path):
    for name in ("a.npz", "b.npz"):
        merge(results, out=tmp_path / name)
    assert sha256(tmp_path / "a.npz") == sha256(tmp_path / "b.npz")


def test_gaps_are_refused_naming_the_range_and_partial_lists_them(results, tmp_path):
    (results / "checkpoint_00200.npz").unlink()
    (results / "checkpoint_00400.npz").unlink()
    done = merge(results, out=tmp_path / "x.npz", code=1)
    assert "200 to 299, 400 to 499 are missing" in done.stderr and not (tmp_path / "x.npz").exists()
    done = merge(results, out=tmp_path / "x.npz", more=["--partial"])
    assert "missing: 200 to 299" in done.stdout and "missing: 400 to 499" in done.stdout
    assert len(np.load(tmp_path / "x.npz")["labels"]) == 300


def test_overlaps_and_duplicates_are_refused_naming_both_files(results, tmp_path):
    twin = shutil.copytree(results, tmp_path / "twin")
    done = merge(results, twin, out=tmp_path / "x.npz", code=1)
    assert "overlap" in done.stderr and "samples 0 to 99" in done.stderr and str(twin) in done.stderr
    assert "named twice" in merge(results, results, out=tmp_path / "x.npz", code=2).stderr
    shutil.copy(results / "checkpoint_00100.npz", results / "checkpoint_00150.npz")
    assert "samples 150 to 199" in merge(results, out=tmp_path / "x.npz", code=1, more=["--partial"]).stderr


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[:-5], lambda d: bytes(len(d)), lambda d: b"garbage",
                                    lambda d: d[:2000] + bytes([d[2000] ^ 16]) + d[2001:]])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_damaged_checkpoint_is_refused_by_name_and_partial_goes_on_without_it(results, tmp_path, damage, recorded):
    path = results / "checkpoint_00300.npz"
    path.write_bytes(damage(path.read_bytes()))
    if not recorded:
        (results / "checkpoints.jsonl").unlink()
    done = merge(results, out=tmp_path / "x.npz", code=1)
    assert "samples 300 to 399" in done.stderr and str(path) in done.stderr
    done = merge(results, out=tmp_path / "x.npz", more=["--partial"])
    assert "missing: 300 to 399" in done.stdout and str(path) in done.stdout


@pytest.mark.parametrize("name, value, words", [
    ("trajectory_2d", np.full((100, 8, 2), np.nan, np.float32), "NaN"),
    ("trajectory_3d", np.full((100, 8, 3), np.inf, np.float32), "NaN or Inf"),
    ("labels", np.zeros(100, np.int64), "labels are not"),
    ("labels", np.full(100, -1), "labels are not"),
    ("labels", np.arange(100, 200, dtype=np.int32) % 4, "does not fit run.json"),
    ("videos", np.zeros((100, 8, 1, 32, 32), np.float32), "does not fit run.json"),
    ("videos", np.zeros((100, 8, 1, 16, 16), np.uint8), "does not fit run.json"),
    ("videos", np.zeros((99, 8, 1, 32, 32), np.uint8), "does not fit run.json"),
    ("videos", None, "does not fit run.json"),
    ("videos", np.array([{}], object), "does not fit run.json")])
def test_wrong_contents_are_refused_naming_file_and_range(results, tmp_path, name, value, words):
    rewrite(results / "checkpoint_00100.npz", **{name: value})
    done = merge(results, out=tmp_path / "x.npz", code=1)
    assert words in done.stderr and "checkpoint_00100.npz" in done.stderr and "100 to 199" in done.stderr
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob(".*"))


def test_runs_with_different_settings_are_refused_naming_the_setting(results, tmp_path):
    run("generate.py", "--n", 500, "--seed", 7, "--out", tmp_path / "other")
    done = merge(results, tmp_path / "other", out=tmp_path / "x.npz", code=1)
    assert "seed is 7, but 42" in done.stderr


@pytest.mark.parametrize("text", ["", "{}", '{"settings": {"n": 4}}'])
def test_a_damaged_run_json_is_refused(results, tmp_path, text):
    (results / "run.json").write_text(text)
    assert "run.json cannot be read" in merge(results, out=tmp_path / "x.npz", code=1).stderr


def test_a_directory_without_a_run_or_missing_is_one_line(tmp_path):
    assert "no such directory" in merge(tmp_path / "nowhere", out=tmp_path / "x.npz", code=2).stderr
    (tmp_path / "empty").mkdir()
    assert "no run here" in merge(tmp_path / "empty", out=tmp_path / "x.npz", code=1).stderr


def test_it_never_writes_over_what_is_not_its_own_or_larger(results, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "left alone" in merge(results, out=tmp_path / "thesis.txt", code=1).stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    merge(results, out=results / "checkpoint_00000.npz", code=2)
    merge(results, out=tmp_path / "set.npz")
    before = sha256(tmp_path / "set.npz")
    (results / "checkpoint_00400.npz").unlink()
    said = merge(results, out=tmp_path / "set.npz", code=1, more=["--partial"]).stderr
    assert "has samples 0 to 499, and not all of them are in these runs" in said
    assert sha256(tmp_path / "set.npz") == before


def test_a_part_never_replaces_another_part_of_equal_size(results, tmp_path):
    """In both directions; a larger one that holds it all may."""
    first, last = (shutil.copytree(results, tmp_path / name) for name in ("first", "last"))
    for _, path in find_checkpoints(first)[1:]:
        path.unlink()
    for _, path in find_checkpoints(last)[:1] + find_checkpoints(last)[2:]:
        path.unlink()
    merge(first, out=tmp_path / "set.npz", more=["--partial"])
    assert "samples 0 to 99" in merge(last, out=tmp_path / "set.npz", code=1, more=["--partial"]).stderr
    merge(last, out=tmp_path / "other.npz", more=["--partial"])
    assert "samples 100 to 199" in merge(first, out=tmp_path / "other.npz", code=1, more=["--partial"]).stderr
    for name in ("set.npz", "other.npz"):
        merge(results, out=tmp_path / name)
    assert sha256(tmp_path / "set.npz") == sha256(tmp_path / "other.npz")


def test_a_link_in_the_place_of_the_set_stays_a_link(results, tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "set.npz").symlink_to(tmp_path / "large disk" / "set.npz")
    merge(results, out=tmp_path / "set.npz")
    assert (tmp_path / "set.npz").is_symlink() and (tmp_path / "large disk" / "set.npz").is_file()


def test_a_full_disk_leaves_the_old_set_and_no_temp_file(results, small_disk):
    disk = small_disk(100 * 1024)
    done = merge(results, out=disk / "set.npz", code=1)
    assert "No space left on device" in done.stderr and os.listdir(disk) == []


def test_a_kill_leaves_no_half_set_and_its_temp_file_is_swept_next_time(results, tmp_path):
    need("strace")
    out = tmp_path / "set.npz"
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=rename", "-e", "inject=rename:signal=SIGKILL:when=1"]
    subprocess.run([*trace, sys.executable, ROOT / "merge.py", results, "--out", out], capture_output=True)
    assert not out.exists() and len(list(tmp_path.glob(".set.npz.*.tmp"))) == 1
    merge(results, out=out)
    assert not list(tmp_path.glob(".set.npz.*.tmp"))


def test_memory_is_that_of_one_checkpoint_not_of_the_set(tmp_path):
    peaks = []
    for n in (2000, 12000):
        run("generate.py", "--n", n, "--every", 1000, "--out", tmp_path / str(n))
        peaks.append(peak_memory("merge.py", tmp_path / str(n), "--out", tmp_path / "x.npz"))
    assert peaks[1] < 1.2 * peaks[0]


def test_partial_takes_what_is_there_while_generate_is_running(tmp_path):
    process = start("generate.py", "--n", 10**6, "--every", 200, "--out", tmp_path / "run", stdout=subprocess.DEVNULL)
    wait_for(lambda: len(find_checkpoints(tmp_path / "run")) >= 3, "three checkpoints")
    done = merge(tmp_path / "run", out=tmp_path / "x.npz", more=["--partial"])
    kill(process)
    assert re.search(r"missing: \d+ to 999999", done.stdout)
