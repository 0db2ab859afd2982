"""Generation on several cores and machines: the README's lines, run as they stand."""
import os
import random
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, need, run

from checkpointing import find_checkpoints, sha256

README = (ROOT / "README.md").read_text()
BLOCK = re.search(r"```bash\n(seq .*?)```", README, re.S)[1].strip().splitlines()
LINES = {line.split()[0]: line for line in BLOCK}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    run("generate.py", "--n", 6000, "--every", 250, "--out", out / "results")
    run("merge.py", out / "results", "--out", out / "set.npz")
    return sha256(out / "set.npz")


def shell(line, place, stubs=None, **more):
    """Run a line in a directory where `python` is ours and the scripts are the project's."""
    (place / "bin").mkdir(exist_ok=True)
    for name, text in {"python": f'exec {sys.executable} "$@"', **(stubs or {})}.items():
        (place / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (place / "bin" / name).chmod(0o755)
    for path in ROOT.glob("*.py"):
        if not (place / path.name).exists():
            (place / path.name).symlink_to(path)
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "HOME": str(place)}
    return subprocess.Popen(["bash", "-c", line.replace("--n 30000", "--n 6000 --every 250")], cwd=place,
                            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            start_new_session=True, **more)


def merged(place):
    run("merge.py", place / "results", "--out", place / "set.npz")
    return sha256(place / "set.npz")


def test_four_shards_under_xargs_some_killed(tmp_path, undisturbed):
    need("xargs", "pkill")
    moments, kills = random.Random(3), 0
    for i in range(8):
        process = shell(LINES["seq"], tmp_path)
        time.sleep(moments.uniform(0.3, 0.9))
        if i < 5 and process.poll() is None:   # one of the four, as the kernel does when the memory is full
            part = moments.randint(1, 4)
            kills += not subprocess.run(["pkill", "-9", "-s", str(process.pid), "-f", f"shard {part}/4"]).returncode
        if process.wait(timeout=60) == 0:
            break
    assert process.returncode == 0 and kills
    assert [len(find_checkpoints(tmp_path / "results" / f"shard_{i}_of_4")) for i in (1, 2, 3, 4)] == [6] * 4
    assert merged(tmp_path) == undisturbed


def test_shards_as_a_slurm_array(tmp_path, undisturbed):
    """A stub of sbatch starts the tasks of the array; one of them is requeued after SIGTERM."""
    sbatch = """
for option; do case $option in --array=1-*) last=${option#--array=1-};; --wrap=*) task=${option#--wrap=};; esac; done
for i in $(seq "$last"); do SLURM_ARRAY_TASK_ID=$i timeout -s TERM 0.8 bash -c "$task"; done
for i in $(seq "$last"); do SLURM_ARRAY_TASK_ID=$i bash -c "$task" || exit 1; done"""
    assert "--requeue" in LINES["sbatch"] and "--signal=" in LINES["sbatch"]
    assert shell(LINES["sbatch"], tmp_path, {"sbatch": sbatch}).wait(timeout=100) == 0
    assert merged(tmp_path) == undisturbed


def test_shards_on_machines_reached_by_ssh(tmp_path, undisturbed):
    """A stub of ssh runs the command at home, as a login there would; scp is left to the sync."""
    (tmp_path / "project").mkdir()
    project = tmp_path / "project"
    for path in ROOT.glob("*.py"):
        (project / path.name).symlink_to(path)
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (project / ".venv" / "bin" / "python").chmod(0o755)
    ssh = 'cd; exec bash -c "${2//--n 30000/--n 6000 --every 250}"'
    assert shell(LINES["for"], tmp_path, {"ssh": ssh}).wait(timeout=60) == 0
    end = time.monotonic() + 60
    parts = [project / "results" / f"shard_{i}_of_4" for i in (1, 2, 3, 4)]
    while time.monotonic() < end and not all(
            "COMPLETE" in (p / "PROGRESS.txt").read_text() if (p / "PROGRESS.txt").exists() else False for p in parts):
        time.sleep(0.1)
    assert merged(project) == undisturbed
