"""Training on several devices: torchrun with two CPU processes, killed, stopped and carried on."""
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from uuid import uuid4

import numpy as np
import pytest
from conftest import ROOT, missing, run, start, wait_for
from test_train import data_set

from checkpointing import find_checkpoints, read_progress

STATES = ("best_model.pt", "final_model.pt", "history.json")
SHORT = ("--epochs", 4, "--device", "cpu", "--heartbeat", 0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Enough videos for ten steps an epoch at the default batch."""
    path = tmp_path_factory.mktemp("data") / "dataset.npz"
    np.savez(path, **data_set(400))
    return path


def torchrun(data, out, *more, restarts=0, script=ROOT / "train_magvit.py"):
    """Started as the README has it; its workers have process groups of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               f"--max-restarts={restarts}", script, "--data", data, "--out", out, *SHORT, *more]
    group = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True, env={**os.environ, "MARK": (mark := uuid4().hex)})
    group.mark = mark
    return group


def ended(group, code=0):
    output = group.communicate(timeout=150)[0]
    assert group.returncode == code, output
    assert not living(group), "processes are left"
    return output


def living(group):
    """{PID: environment} of its processes that have not ended."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ") as file:      # of a zombie it is empty
                words = dict(pair.partition("=")[::2] for pair in file.read().split("\0"))
        except OSError:
            continue
        if words.get("MARK") == group.mark:
            found[int(pid)] = words
    return found


def workers(group):
    """{RANK: PID} of the training processes that live."""
    return {int(words["RANK"]): pid for pid, words in living(group).items() if "RANK" in words}


def at_work(group, out, phase=None):
    """Its workers, once the leader of the living ones has said that it works (in that phase)."""
    def look():
        said, there = read_progress(out / "PROGRESS.txt"), workers(group)
        its_phase = said.get("Phase") == phase if phase else "Phase" in said
        if group.poll() is not None:
            return {"ended": True}
        return there if said.get("PID") == str(there.get(0)) and its_phase else None
    return wait_for(look, f"{phase or 'work'} in {out}")


@pytest.fixture(scope="module", autouse=True)
def proc():
    if not os.path.exists("/proc/self/environ"):
        missing("/proc")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Two processes, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    output = ended(torchrun(data, out))
    for line in ("complete: ", "checkpoint_00040.pt", "true class by guessed class"):
        assert output.count(line) == (2 if line == "complete: " else 1)   # and the evaluation's
    return out


def same_states(out, whole):
    for name in STATES:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"


def losses(out):
    rows = json.loads((out / "history.json").read_text())
    return np.array([(row["step"], row["train_loss"], row["validation_loss"]) for row in rows])


def test_two_processes_train_as_one_up_to_the_order_of_sums(data, whole, tmp_path):
    """In both phases; one that forgot a share or took it twice is off in the second digit."""
    run("train_magvit.py", "--data", data, "--out", tmp_path, *SHORT)
    alone, together = losses(tmp_path), losses(whole)
    assert len(alone) == 4 and np.allclose(alone, together, rtol=2e-4)
    assert (tmp_path / "best_model.pt").read_bytes() != (whole / "best_model.pt").read_bytes()


def test_uneven_shares_train_as_one_too(data, tmp_path):
    """31 videos a step: 15 and 16 of them, turned in eight ways."""
    more = ("--batch-size", 31)
    run("train_magvit.py", "--data", data, "--out", tmp_path / "one", *SHORT, *more)
    ended(torchrun(data, tmp_path / "two", *more))
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=2e-4)


@pytest.mark.timeout(400)     # six starts of two processes on two cores
def test_a_killed_worker_is_restarted_to_the_same_bits(data, whole, tmp_path):
    """Leader and follower in turn, in both phases, with checkpoints as fast as they can be
    written, so that many kills fall into a save; then in the evaluation. The restarts are
    torchrun's own, with the same --fresh as the first start."""
    moments = random.Random(5)
    group = torchrun(data, tmp_path, "--max-minutes", 0.0001, "--fresh", restarts=9)
    killed = 0
    for number, phase in enumerate(("tokenizer", "tokenizer", "transformer", "transformer")):
        there = at_work(group, tmp_path, phase)
        time.sleep(moments.uniform(0, 0.5))
        victim = there.get(number % 2)
        if victim in workers(group).values():
            os.kill(victim, signal.SIGKILL)
            killed += 1
            wait_for(lambda: victim not in living(group), "its end")
    leader = wait_for(lambda: read_progress(tmp_path / "evaluation/PROGRESS.txt").get("PID"),
                      "the evaluation")
    os.kill(int(leader), signal.SIGKILL)
    assert "Traceback" not in ended(group) and killed >= 2
    same_states(tmp_path, whole)
    assert not list(tmp_path.parent.glob("*.old1"))     # --fresh came once, to an empty directory
    metrics = "evaluation/metrics.json"
    assert (tmp_path / metrics).read_bytes() == (whole / metrics).read_bytes()
    assert read_progress(tmp_path / "PROGRESS.txt")["Restarts"]


def test_a_signal_to_the_group_saves_and_leaves_nothing_behind(data, whole, tmp_path):
    """Ctrl-C, too: torchrun passes it on, once."""
    for phase, number in (("tokenizer", signal.SIGINT), ("transformer", signal.SIGTERM)):
        group = torchrun(data, tmp_path)
        there = at_work(group, tmp_path, phase)
        os.killpg(group.pid, number)
        output = ended(group, code=1)       # torchrun's own word for a signal
        said = read_progress(tmp_path / "PROGRESS.txt")
        assert said["Status"] == "INTERRUPTED"
        assert output.count(f"stopped by {signal.Signals(number).name}") == 1
        done = said["Progress"].split("/")[0]
        assert find_checkpoints(tmp_path)[-1][0] == int(done) > 0 and there
    ended(torchrun(data, tmp_path))
    same_states(tmp_path, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_worker_stops_all_with_143(rank, data, tmp_path):
    group = torchrun(data, tmp_path)
    os.kill(at_work(group, tmp_path)[rank], signal.SIGTERM)
    output = ended(group, code=1)
    assert output.count("stopped by SIGTERM") == 1 and "exitcode  : 143" in output, output
    assert read_progress(tmp_path / "PROGRESS.txt")["Status"] == "INTERRUPTED"


# -- the README's lines

LINES = re.search(r"```bash\n(torchrun .*?)```", (ROOT / "README.md").read_text(), re.S)[1]


def lines(beginning):
    """The README's line, for two short CPU processes."""
    line = next(line for line in LINES.splitlines() if line.startswith(beginning))
    return line.replace("=gpu", "=2").replace("train_magvit.py", "train_magvit.py $MORE")


def shell(line, data, out, place, **stubs):
    """Started where `torchrun` and the stubs are programs."""
    place.mkdir(exist_ok=True)
    programs = {"torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"', **stubs}
    for name, text in programs.items():
        (place / name).write_text(f"#!/bin/bash\n{text}\n")
        (place / name).chmod(0o755)
    more = " ".join(map(str, ("--data", data, "--out", out, *SHORT)))
    group = subprocess.Popen(
        ["bash", "-c", line], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
        env={**os.environ, "MARK": (mark := uuid4().hex), "MORE": more,
             "PATH": f"{place}:{os.environ['PATH']}"})
    group.mark = mark
    return group


def two_machines(data, out, place):
    """Two agents, one process each, that meet at a port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    line = lines("torchrun --nnodes=2").replace("FIRST:29500", f"localhost:{port}")
    line = "OMP_NUM_THREADS=1 " + line.replace("--nproc_per_node=2", "--nproc_per_node=1")
    return [shell(line, data, out, place / "bin") for _ in range(2)]


def test_the_line_for_two_machines(data, whole, tmp_path):
    output = [ended(machine) for machine in two_machines(data, tmp_path / "run", tmp_path)]
    assert sum("complete: " in text for text in output) == 1
    same_states(tmp_path / "run", whole)


def test_a_worker_killed_on_either_machine_restarts_both(data, whole, tmp_path):
    """The agent whose worker lives counts no restart; both must meet anew all the same."""
    out = tmp_path / "run"
    machines = two_machines(data, out, tmp_path)
    for phase, rank in (("tokenizer", 1), ("transformer", 0)):
        def both(number=rank):
            there = workers(machines[0]) | workers(machines[1])
            said = read_progress(out / "PROGRESS.txt")
            ready = said.get("Phase") == phase and said.get("PID") == str(there.get(0))
            return there.get(number) if ready else None
        victim = wait_for(both, f"{phase} on both")
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: not any(victim in living(m) for m in machines), "its end")
    for machine in machines:
        ended(machine)
    assert read_progress(out / "PROGRESS.txt")["Restarts"]
    same_states(out, whole)


def test_the_line_for_slurm(data, whole, tmp_path):
    """A stub of sbatch that ends the job's time once, and starts it again if it was requeued."""
    sbatch = f"""
for option; do case $option in --wrap=*) task=${{option#--wrap=}};; esac; done
export SLURM_JOB_ID=7
bash -c "$task" & job=$!
until grep -qs '^Phase: transformer' {tmp_path}/run/PROGRESS.txt; do sleep 0.05; done
kill -TERM $job; wait $job
[ -e {tmp_path}/requeued.7 ] && exec bash -c "$task"
"""
    line = lines("sbatch")
    assert "--requeue" in line and "--signal=B:TERM@" in line
    group = shell(line, data, tmp_path / "run", tmp_path / "bin", sbatch=sbatch,
                  scontrol=f"echo $1 >> {tmp_path}/requeued.$2")
    ended(group)
    assert (tmp_path / "requeued.7").read_text() == "requeue\n"
    assert read_progress(tmp_path / "run/PROGRESS.txt")["Restarts"]
    same_states(tmp_path / "run", whole)


def test_a_run_goes_on_on_two_devices_and_back(data, whole, tmp_path):
    """Stopped on one, carried on on two, stopped again, ended on one."""
    one = start("train_magvit.py", "--data", data, "--out", tmp_path, *SHORT)
    wait_for(lambda: "Phase" in read_progress(tmp_path / "PROGRESS.txt"), "work")
    one.send_signal(signal.SIGTERM)
    one.communicate(timeout=60)
    two = torchrun(data, tmp_path)
    at_work(two, tmp_path, "transformer")
    os.killpg(two.pid, signal.SIGTERM)
    assert "processes was 1, is 2" in ended(two, code=1)
    done = run("train_magvit.py", "--data", data, "--out", tmp_path, *SHORT)
    assert "processes was 2, is 1" in done.stdout
    assert np.allclose(losses(tmp_path), losses(whole), rtol=2e-4)


# -- what goes wrong is said once


def said_once(group, words):
    output = ended(group, code=1)
    assert output.count(words) == 1, output
    ours = rf'File "{re.escape(str(ROOT))}/\w+\.py'     # the environment may lie below, too
    assert not re.search(ours, output), "a stack trace of ours; torchrun's own stays"


def test_refusals_are_said_once(data, whole, tmp_path):
    said_once(torchrun(data, whole, "--seed", 8), "started with other settings")
    said_once(torchrun(data, tmp_path, "--batch-size", -1), "must be from 0")
    said_once(torchrun(tmp_path / "none.npz", tmp_path / "none"), "no such data")
    said_once(torchrun(data, tmp_path / "few", "--batch-size", 1), "cannot share a batch")


def test_a_second_group_is_refused_once(data, tmp_path):
    first = torchrun(data, tmp_path)
    at_work(first, tmp_path)
    said_once(torchrun(data, tmp_path), "is in use by PID")
    ended(first)


def test_a_full_disk_is_said_once_and_loses_nothing(data, whole, tmp_path, small_disk):
    disk = small_disk(24 << 20)      # for one state of 16 MB, not for two
    with open(disk / "ballast", "wb") as file:
        file.write(bytes(10 << 20))
    said_once(torchrun(data, disk / "run"), "free. Make room")
    (disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=400m", disk], check=True)
    ended(torchrun(data, disk / "run"))
    same_states(disk / "run", whole)


def test_other_data_in_one_process_is_refused(data, tmp_path):
    """As on two machines with different copies."""
    other = tmp_path / "other.npz"
    np.savez(other, **data_set(400, seed=1))
    script = tmp_path / "job.py"
    script.write_text(f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                      "if os.environ['RANK'] == '1':\n"
                      f"    sys.argv[sys.argv.index({str(data)!r})] = {str(other)!r}\n"
                      f"runpy.run_path({str(ROOT / 'train_magvit.py')!r}, run_name='__main__')\n")
    said_once(torchrun(data, tmp_path / "run", script=script), "is not the same here")
    shutil.rmtree(tmp_path / "run")
