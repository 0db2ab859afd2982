"""Sets larger than the memory: slower, not refused, the same result, and memory that stays."""
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, missing, run
from test_train import RESULTS, SHORT, data_set

ON_DISK = "magvit.free_memory = lambda: 0\n"
OFF_DEVICE = "magvit.Videos.fits = lambda videos: False\n"


def changed(change, script, *arguments, limit=None, code=0):
    """A stage of which `change` makes the memory small; limit: ulimit -d, in bytes."""
    source = (f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
              f"sys.argv = {[str(ROOT / script), *map(str, arguments)]!r}\n"
              f"import magvit\n{change}runpy.run_path(sys.argv[0], run_name='__main__')\n")
    limits = limit and (lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True,
                          preexec_fn=limits, timeout=150)
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run directory of several pieces, a data set, and what training makes of it in memory."""
    home = tmp_path_factory.mktemp("made")
    run("generate.py", "--n", 400, "--every", 90, "--out", home / "run")
    run("merge.py", home / "run", "--out", home / "dataset.npz")
    run("train_magvit.py", "--data", home / "dataset.npz", "--out", home / "whole", *SHORT)
    return home


@pytest.mark.parametrize("source, change", [
    ("dataset.npz", ON_DISK), ("run", ON_DISK + OFF_DEVICE)],
    ids=["unpacked", "piece by piece, not on the device"])
def test_the_result_is_the_same_wherever_the_videos_lie(source, change, made, tmp_path):
    before = sorted(os.listdir(made)), sorted(os.listdir(made / "run"))
    changed(change, "train_magvit.py", "--data", made / source, "--out", tmp_path, *SHORT)
    for name in RESULTS:
        assert (tmp_path / name).read_bytes() == (made / "whole" / name).read_bytes(), name
    assert (sorted(os.listdir(made)), sorted(os.listdir(made / "run"))) == before   # no debris


def test_classes_and_predictions_are_the_same_too(made, tmp_path):
    model = ("--model", made / "whole/best_model.pt", "--device", "cpu")
    for command, more in (("classify", ()), ("predict", ("--given", 4, "--out"))):
        words = (command, made / "dataset.npz", *model, *more)
        ends = [tmp_path / f"{where}.npz" for where in ("memory", "disk")] if more else [(), ()]
        here = run("apply_magvit.py", *words, *([ends[0]] if more else []))
        there = changed(ON_DISK, "apply_magvit.py", *words, *([ends[1]] if more else []))
        if more:
            assert ends[0].read_bytes() == ends[1].read_bytes()
        else:
            assert here.stdout == there.stdout and len(here.stdout.splitlines()) == 400


def noise(path, count):
    """A set that no compressor makes smaller, 64 kB a video."""
    videos = np.random.default_rng(0).integers(0, 256, (count, 8, 1, 64, 128), np.uint8)
    np.savez(path, videos=videos, labels=np.arange(count) % 4)


READ = ("import resource, sys; sys.path.insert(0, {root!r}); import magvit\n"
        "def data():\n    for line in open('/proc/self/status'):\n"
        "        if line.startswith('RssAnon'): return int(line.split()[1]) * 1024\n"
        "before = data(); found = magvit.load_data({path!r}); magvit.checked_split(found)\n"
        "print(type(found.videos).__name__, data() - before)")


def test_the_memory_stays_under_an_ulimit_that_the_set_exceeds(tmp_path):
    """Really: the kernel ends what takes more than `ulimit -d`, 400 MB for a set of 600 MB."""
    if not os.path.exists("/proc/self/status"):
        missing("/proc")
    noise(tmp_path / "d.npz", 600 * 16)
    source = READ.format(root=str(ROOT), path=str(tmp_path / "d.npz"))

    def reading(limit):
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True,
                              preexec_fn=limit and (lambda: resource.setrlimit(
                                  resource.RLIMIT_DATA, (limit, limit))))
        assert done.returncode == 0, done.stderr
        kind, grown = done.stdout.split()
        return kind, int(grown)
    kind, grown = reading(400 << 20)
    assert kind == "memmap" and grown < 150 << 20
    if magvit_has_room():
        kind, grown = reading(None)
        assert kind == "ndarray" and 550 << 20 < grown < 750 << 20   # once, not twice


def magvit_has_room():
    import magvit
    return magvit.free_memory() * magvit.MEMORY_SHARE > 700 << 20


def test_a_disk_too_small_for_the_unpacked_set_is_said_in_one_line(made, tmp_path, small_disk):
    disk = small_disk(1 << 20)
    (disk / "d.npz").write_bytes((made / "dataset.npz").read_bytes())
    change = ON_DISK + f"import tempfile\ntempfile.tempdir = {str(disk)!r}\n"
    done = changed(change, "train_magvit.py", "--data", disk / "d.npz", "--out", tmp_path, *SHORT,
                   code=1)
    assert "fit neither into the memory" in done.stderr and "TMPDIR" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_bad_piece_ends_the_set_before_it(made, tmp_path):
    """As in memory: what is whole up to the first gap."""
    import shutil

    import magvit
    copy = shutil.copytree(made / "run", tmp_path / "run")
    bad = copy / "checkpoint_00180.npz"
    bad.write_bytes(bad.read_bytes()[:-100])
    found = magvit.load_data(copy)
    assert len(found.videos) == 180
    with np.load(made / "dataset.npz") as whole:
        assert (found.videos == whole["videos"][:180]).all()


def test_the_same_video_in_two_parts_is_found_without_a_table_of_all(made):
    import magvit
    data = magvit.load_data(made / "dataset.npz")
    part, digest = magvit.checked_split(data)
    videos = data.videos.copy()
    first, second = np.flatnonzero(part == magvit.TRAIN)[7], np.flatnonzero(part == magvit.TEST)[3]
    videos[second] = videos[first]
    with pytest.raises(magvit.CheckpointError, match=f"video {max(first, second)} .* is the same "
                                                     f"as video {min(first, second)} "):
        magvit.checked_split(magvit.Data(videos, data.labels, data.classes))
    videos[second] = data.videos[second]
    videos[first] = data.videos[np.flatnonzero(part == magvit.TRAIN)[8]]     # in one part: allowed
    assert magvit.checked_split(magvit.Data(videos, data.labels, data.classes))[1] != digest
