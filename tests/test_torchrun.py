"""Training on several devices: torchrun with two CPU processes, killed, stopped and carried on.

The trainings end before their evaluation, which process 0 does alone and has its own tests.
"""
import json
import os
import re
import signal
import socket
import subprocess
import sys
from uuid import uuid4

import numpy as np
import pytest
from conftest import ROOT, missing, wait_for
from test_train import data, data_set, newest, same_results, train     # noqa: F401 (a fixture)

from checkpointing import read_progress

SHORT = ("--epochs", 4, "--device", "cpu", "--heartbeat", 0.05)
JOB = f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import evaluate_magvit, train_magvit
evaluate_magvit.evaluate = lambda *_: None
train_magvit.main()
"""


def marked(command, **more):
    """A process in a session of its own; all that it starts can be found by a mark."""
    mark = uuid4().hex
    group = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT,
                             env={**os.environ, **more, "MARK": mark})
    group.mark = mark
    return group


def torchrun(data, out, *more, restarts=0, job=JOB):
    """Started as the docs have it; its workers have process groups of their own."""
    script = out.with_name(f"job{uuid4().hex}.py")
    script.write_text(job)
    return marked([sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node=2", f"--max-restarts={restarts}", script, "--data", data,
                   "--out", out, *SHORT, *more])


def ended(group, code=0):
    output = group.communicate(timeout=150)[0]
    assert group.returncode == code, output
    assert not living(group), "processes are left"
    return output


def living(group):
    """{PID: environment} of its processes that have not ended."""
    if not os.path.exists("/proc/self/environ"):
        missing("/proc")
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


def at_work(out, *groups, phase=""):
    """{RANK: PID} of their workers, once the leader of those that live says that it works (in that
    phase)."""
    def look():
        assert all(group.poll() is None for group in groups), groups[0].communicate()[0]
        there = {int(words["RANK"]): pid for group in groups
                 for pid, words in living(group).items() if "RANK" in words}
        said = read_progress(out / "PROGRESS.txt")
        ready = said.get("PID") == str(there.get(0)) and phase in said.get("Phase", "-")
        return there if ready and len(there) == 2 else None
    return wait_for(look, f"{phase or 'work'} in {out}", 120)


def kill_worker(pid, *groups):
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(pid in living(group) for group in groups), "its end")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Two processes, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    output = ended(torchrun(data, out))
    for line in ("complete: ", "checkpoint_00019.pt", "transformer epoch 3/3"):
        assert output.count(line) == 1, output
    return out


def losses(out):
    rows = json.loads((out / "history.json").read_text())
    return np.array([(row["step"], row["train_loss"], row["validation_loss"]) for row in rows])


def test_two_processes_train_as_one_up_to_the_order_of_sums(data, whole, tmp_path):
    """In both phases; one that forgot a share or took it twice is off in the second digit."""
    train(data, tmp_path, epochs=4)
    alone, together = losses(tmp_path), losses(whole)
    assert len(alone) == 4 and np.allclose(alone, together, rtol=2e-4)
    assert (tmp_path / "best_model.pt").read_bytes() != (whole / "best_model.pt").read_bytes()


@pytest.mark.thorough
@pytest.mark.timeout(400)     # five starts of two processes
def test_a_killed_worker_is_restarted_to_the_same_bits(data, whole, tmp_path):
    """Leader and follower in turn, in both phases, with checkpoints as fast as they can be
    written, so that kills fall into a save. The restarts are torchrun's own."""
    group = torchrun(data, tmp_path, "--max-minutes", 1e-6, restarts=9)
    for rank, reached in ((0, 2), (1, 5), (0, 11), (1, 15)):
        wait_for(lambda: newest(tmp_path) >= reached, f"checkpoint {reached}", 120)
        kill_worker(at_work(tmp_path, group)[rank], group)
    assert "Traceback" not in ended(group)
    same_results(tmp_path, whole)


@pytest.mark.thorough
def test_a_follower_too_busy_to_leave_at_once_leaves_in_silence(data, whole, tmp_path):
    """It notices that the leader is gone only behind torchrun's SIGTERM: nobody waits for it."""
    group = torchrun(data, tmp_path, restarts=1)
    there = at_work(tmp_path, group)
    os.kill(there[1], signal.SIGSTOP)
    kill_worker(there[0], group)

    def told():
        with open(f"/proc/{there[1]}/status") as file:
            pending = next(line for line in file if line.startswith("ShdPnd:"))
        return int(pending.split()[1], 16) >> (signal.SIGTERM - 1) & 1
    wait_for(told, "torchrun's SIGTERM", 60)
    os.kill(there[1], signal.SIGCONT)
    assert "is gone" not in ended(group)
    same_results(tmp_path, whole)


@pytest.mark.thorough
def test_a_signal_to_the_group_or_to_one_worker_saves_and_leaves_nothing_behind(data, whole,
                                                                               tmp_path):
    """Ctrl-C, too: torchrun passes it on, once."""
    for phase, number, one in (("tokenizer", signal.SIGINT, False),
                               ("transformer", signal.SIGTERM, False), ("", signal.SIGTERM, True)):
        group = torchrun(data, tmp_path)
        follower = at_work(tmp_path, group, phase=phase)[1]
        os.kill(follower, number) if one else os.killpg(group.pid, number)
        output = ended(group, code=1)       # torchrun's own word for a signal
        said = read_progress(tmp_path / "PROGRESS.txt")
        assert said["Status"] == "INTERRUPTED"
        assert output.count(f"stopped ({signal.Signals(number).name})") == 1
        assert not one or "exitcode  : 143" in output, output
        assert newest(tmp_path) == int(said["Progress"].split("/")[0]) > 0
    ended(torchrun(data, tmp_path))
    same_results(tmp_path, whole)


@pytest.mark.thorough
def test_a_run_goes_on_on_two_devices_and_back(data, whole, tmp_path):
    """Begun by two, carried on by one, ended by two."""
    group = torchrun(data, tmp_path)
    at_work(tmp_path, group)
    os.killpg(group.pid, signal.SIGTERM)
    ended(group, code=1)
    before = newest(tmp_path)
    one = marked([sys.executable, "-c", JOB, "--data", data, "--out", tmp_path, *SHORT,
                  "--max-minutes", 1e-6])
    wait_for(lambda: newest(tmp_path) > before, "a checkpoint of one")
    one.send_signal(signal.SIGTERM)
    ended(one, code=143)
    ended(torchrun(data, tmp_path))
    assert np.allclose(losses(tmp_path), losses(whole), rtol=2e-4)


def typed(beginning, data, out):
    """The line of docs/devices.md that begins so, for two short processes on a CPU."""
    (out.parent / "job.py").write_text(JOB)
    lines = (ROOT / "docs/devices.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith(beginning))
    more = " ".join(map(str, (out.parent / "job.py", "--data", data, "--out", out, *SHORT,
                              "--max-minutes", 1e-6)))
    assert "torchrun " in line and "train_magvit.py" in line
    line = re.sub(r"\btorchrun ", f"{sys.executable} -m torch.distributed.run ", line)
    return line.replace("per_node=gpu", "per_node=2").replace("train_magvit.py", more)


def two_machines(data, out, threads):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    line = typed("torchrun --nnodes=2", data, out).replace("FIRST:29500", f"localhost:{port}")
    line = line.replace("nproc_per_node=2", "nproc_per_node=1")
    return [marked(["bash", "-c", line], **threads) for _ in range(2)]


@pytest.mark.thorough
@pytest.mark.timeout(400)
@pytest.mark.parametrize("threads", [{"OMP_NUM_THREADS": "1"}, {}], ids=["one thread", "default"])
def test_the_line_for_two_machines_and_a_worker_killed_on_either(data, whole, tmp_path, threads):
    """Follower and leader in turn, in both phases, with checkpoints as fast as they can be written,
    so that kills fall into a save. The restarts are torchrun's own: the agent whose worker lives
    counts none, and both must meet anew all the same. With one thread the bits are those of a group
    on one machine, where torchrun sets it; with all, those of two machines left alone."""
    out = tmp_path / "run"
    if not threads:
        whole = tmp_path / "whole"
        for machine in two_machines(data, whole, threads):
            ended(machine)
    machines = two_machines(data, out, threads)
    for phase, rank in (("tokenizer", 1), ("transformer", 0)):
        kill_worker(at_work(out, *machines, phase=phase)[rank], *machines)
    output = [ended(machine) for machine in machines]
    assert sum("complete: " in text for text in output) == 1
    same_results(out, whole)


@pytest.mark.thorough
def test_the_line_for_slurm(data, whole, tmp_path):
    """A stub of sbatch that ends the job's time once, and starts it again if it was requeued."""
    programs = {"scontrol": f"echo $1 >> {tmp_path}/requeued.$2", "sbatch": f"""
for option; do case $option in --wrap=*) task=${{option#--wrap=}};; esac; done
export SLURM_JOB_ID=7
bash -c "$task" & job=$!
until grep -qs '^Phase: transformer' {tmp_path}/run/PROGRESS.txt; do sleep 0.05; done
kill -TERM $job; wait $job
[ -e {tmp_path}/requeued.7 ] && exec bash -c "$task"
"""}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    ended(marked(["bash", "-c", typed("sbatch", data, tmp_path / "run")],
                 PATH=f"{tmp_path}:{os.environ['PATH']}"))
    assert (tmp_path / "requeued.7").read_text() == "requeue\n"
    same_results(tmp_path / "run", whole)


@pytest.mark.thorough
def test_refusals_are_said_once(data, whole, tmp_path):
    """Also where process 0, which has to say them, is late."""
    late = """import checkpointing, time
if os.environ["RANK"] == "0":
    complain = checkpointing.complain
    checkpointing.complain = lambda words: (time.sleep(1), complain(words))
    time.sleep(1)
"""
    other = tmp_path / "other.npz"      # as on two machines with different copies
    np.savez(other, **data_set(seed=1))

    def job(change=""):
        return JOB.replace("train_magvit.main", f"{late}{change}train_magvit.main")

    elsewhere = "if os.environ['RANK'] == '1': sys.argv[2] = {!r}\n".format
    for group, words in (
            (torchrun(data, whole, "--seed", 8, job=job()), "started with other settings"),
            (torchrun(data, tmp_path / "fresh", "--fresh", job=job()), "--fresh would start over"),
            (torchrun(data, tmp_path / "run", job=job(elsewhere(str(other)))),
             "is not the same for all processes"),
            (torchrun(data, tmp_path / "run", job=job(elsewhere("gone.npz"))), "gone.npz")):
        output = ended(group, code=1)
        ours = rf'File "{re.escape(str(ROOT))}/\w+\.py'    # a trace of ours; torchrun's stays
        assert output.count(words) == 1 and not re.search(ours, output), output
