"""generate, kill -9, generate again, merge: always the SHA-256 of an undisturbed run."""
import random
import re
import time

import numpy as np
import pytest
from conftest import kill, run, start, wait_for

from checkpointing import find_checkpoints, read_progress, sha256

N = 30000


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """{n: SHA-256 of the merged set of an undisturbed run}, made when first asked for."""
    known = {}

    def digest(n):
        if n not in known:
            out = tmp_path_factory.mktemp("undisturbed")
            run("generate.py", "--n", n, "--out", out)
            known[n] = merged(out)
        return known[n]
    return digest


def merged(*runs):
    out = runs[0] / "dataset.npz"
    done = run("merge.py", *runs, "--out", out)
    assert re.search(f"sha256: {sha256(out)}", done.stdout)
    return sha256(out)


def test_twenty_kills_at_random_moments_change_nothing(tmp_path, undisturbed):
    """Kills until twenty have hit a living process; where a run ends before, the next kills go to a new one."""
    moments = random.Random(1)
    kills = runs = 0
    while kills < 20:
        out = tmp_path / str(runs)
        runs += 1
        while True:
            process = start("generate.py", "--n", N, "--every", 500, "--out", out)
            time.sleep(moments.uniform(0.05, 0.4))
            if kills >= 20 or process.poll() is not None:
                break
            kill(process)
            kills += 1
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert read_progress(out / "PROGRESS.txt")["Progress"] == f"{N}/{N} samples (100%)"
        assert merged(out) == undisturbed(N)
        assert not list(out.glob(".*.tmp")) and not list(out.glob("*.corrupt"))


@pytest.mark.parametrize("every, n", [(7, 1000), (500, N), (2000, N)])
def test_however_often_it_is_saved(tmp_path, undisturbed, every, n):
    process = start("generate.py", "--n", n, "--every", every, "--out", tmp_path)
    wait_for(lambda: len(find_checkpoints(tmp_path)) >= 3 if tmp_path.exists() else False, "three checkpoints")
    kill(process)
    run("generate.py", "--n", n, "--every", every, "--out", tmp_path)
    assert merged(tmp_path) == undisturbed(n)


def test_three_shards_each_killed_once(tmp_path, undisturbed):
    parts = [tmp_path / f"shard_{i}_of_3" for i in (1, 2, 3)]
    processes = [start("generate.py", "--n", N, "--every", 500, "--shard", f"{i}/3", "--out", tmp_path) for i in (1, 2, 3)]
    for part, process in zip(parts, processes):
        wait_for(lambda: part.exists() and find_checkpoints(part), "a checkpoint")
        kill(process)
    for i in (1, 2, 3):
        run("generate.py", "--n", N, "--every", 700, "--shard", f"{i}/3", "--out", tmp_path)
    assert merged(*parts) == undisturbed(N)


def test_10000_extended_to_30000(tmp_path, undisturbed):
    run("generate.py", "--n", 10000, "--out", tmp_path)
    assert merged(tmp_path) == undisturbed(10000)
    run("generate.py", "--n", N, "--out", tmp_path)
    assert merged(tmp_path) == undisturbed(N)


def flip(path):
    data = bytearray(path.read_bytes())
    data[random.Random(len(data)).randrange(len(data))] ^= 1 << 3
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-100]), lambda path: path.write_bytes(bytes(path.stat().st_size)),
    lambda path: path.write_bytes(b""), flip, lambda path: path.unlink()],
    ids=["truncated", "zeroed", "empty", "bit-flipped", "deleted"])
def test_any_one_checkpoint_damaged_in_between(tmp_path, undisturbed, damage):
    n = 3000
    run("generate.py", "--n", n, "--every", 1000, "--out", tmp_path)
    for number in (0, 1000, 2000):
        damage(tmp_path / f"checkpoint_{number:05d}.npz")
        run("generate.py", "--n", n, "--every", 1000, "--out", tmp_path)
        assert merged(tmp_path) == undisturbed(n)


@pytest.mark.parametrize("lost", ["checkpoints.jsonl", "PROGRESS.txt", ".lock"])
def test_what_is_kept_beside_the_checkpoints_may_be_lost(tmp_path, undisturbed, lost):
    run("generate.py", "--n", 3000, "--every", 1000, "--out", tmp_path)
    (tmp_path / lost).unlink()
    (tmp_path / "checkpoint_01000.npz").unlink()
    run("generate.py", "--n", 3000, "--every", 1000, "--out", tmp_path)
    assert merged(tmp_path) == undisturbed(3000)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("every", [7, 500, 2000])
def test_the_whole_30000_with_a_kill_every_second_or_so(tmp_path, undisturbed, every):
    moments, kills = random.Random(every), 0
    while True:
        process = start("generate.py", "--n", N, "--every", every, "--out", tmp_path)
        time.sleep(moments.uniform(0.2, 0.8))
        if process.poll() is not None:
            break
        kill(process)
        kills += 1
    assert process.communicate()[0].splitlines()[-1].startswith("complete") and kills
    assert merged(tmp_path) == undisturbed(N)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_5000_samples_of_16x64x64_killed_restarted_and_merged(tmp_path):
    def generate(out):
        return ["generate.py", "--n", 5000, "--every", 500, "--frames", 16, "--size", 64, "--out", out]
    run(*generate(tmp_path / "whole"))
    moments, kills = random.Random(2), 0
    while True:
        process = start(*generate(tmp_path / "killed"))
        time.sleep(moments.uniform(0.3, 0.6))
        if process.poll() is not None:
            break
        kill(process)
        kills += 1
    assert process.communicate() and process.returncode == 0 and kills >= 2
    assert merged(tmp_path / "killed") == merged(tmp_path / "whole")
    with np.load(tmp_path / "killed" / "dataset.npz") as data:
        assert data["videos"].shape == (5000, 16, 1, 64, 64)
