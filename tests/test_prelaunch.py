"""The checklist before a run of hours, on this machine, in this place: `python -m pytest -m prelaunch`.

Set PRELAUNCH_DIR to a directory on the disk the run will use (default: the project's), PRELAUNCH_BYTES to what it will
write (default: 30,000 videos of 8x32x32).
"""
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, kill, run, start, wait_for

from checkpointing import find_checkpoints, free_bytes, read_progress

pytestmark = pytest.mark.prelaunch


@pytest.fixture
def out():
    place = os.environ.get("PRELAUNCH_DIR", str(ROOT))
    directory = Path(tempfile.mkdtemp(prefix=".prelaunch-", dir=place))
    yield directory / "results"
    shutil.rmtree(directory)


def test_checkpoint(out):
    """checkpoints are written where they should be, and verify"""
    run("generate.py", "--n", 500, "--every", 100, "--out", out)
    assert [n for n, _ in find_checkpoints(out)] == [0, 100, 200, 300, 400]
    run("checkpointing.py", "verify", out)


def test_progress(out):
    """PROGRESS.txt appears, moves and ends in COMPLETE"""
    process = start("generate.py", "--n", 20000, "--every", 1000, "--heartbeat", 0.1, "--out", out)
    seen = set()
    while process.poll() is None:
        seen.add(read_progress(out / "PROGRESS.txt").get("Progress"))
        time.sleep(0.01)
    process.communicate()
    assert len(seen - {None}) >= 3 and read_progress(out / "PROGRESS.txt")["Status"] == "COMPLETE"


def test_resume(out):
    """a killed run goes on where it was, with the same bytes"""
    run("generate.py", "--n", 10000, "--every", 500, "--out", out / "whole")
    process = start("generate.py", "--n", 10000, "--every", 500, "--out", out / "killed")
    wait_for(lambda: (out / "killed").exists() and len(find_checkpoints(out / "killed")) >= 3, "three checkpoints")
    kill(process)
    run("generate.py", "--n", 10000, "--every", 500, "--out", out / "killed")
    for name in ("whole", "killed"):
        run("merge.py", out / name, "--out", out / f"{name}.npz")
    assert (out / "whole.npz").read_bytes() == (out / "killed.npz").read_bytes()


def test_medium_scale(out):
    """2,000 videos of 16x64x64 are made, merged and finite"""
    run("generate.py", "--n", 2000, "--every", 500, "--frames", 16, "--size", 64, "--out", out)
    run("merge.py", out, "--out", out / "dataset.npz")
    with np.load(out / "dataset.npz") as data:
        assert data["videos"].shape == (2000, 16, 1, 64, 64) and np.isfinite(data["trajectory_2d"]).all()


def test_disk_space(out):
    """the disk has room for the run and half as much again"""
    wanted = int(os.environ.get("PRELAUNCH_BYTES", 30_000 * 1000))
    free = free_bytes(out.parent)
    assert free > 1.5 * wanted, f"{free:,} bytes free, {wanted:,} wanted; make room or set PRELAUNCH_DIR"
