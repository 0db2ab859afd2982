"""Every example of README.md and docs/ as it is printed. Programs are killed, started again and
compared with one that was left alone, and where it is a loop with the loop as it was before the
library came; lines for cron, systemd, SLURM and several machines are run by what reads them."""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, need, run, wait_for

import videos
from checkpointing import read_progress, read_records, sha256

PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
TEXT = "\n".join(PAGES.values())
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)

# Found by Python beside the job: kill -9 a moment after the checkpoint with the number KILL_AFTER.
KILLER = """
import os, signal, threading
replace, left, moment = os.replace, int(os.environ["KILL_AFTER"]), float(os.environ["MOMENT"])
def replace_and_count(old, new):
    global left
    replace(old, new)
    left -= os.path.basename(new).startswith("checkpoint_")
    if left == 0:
        threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
os.replace = replace_and_count
"""


def example(words):
    """The one example that has these words."""
    found = [code for code in EXAMPLES if words in code]
    assert len(found) == 1, f"{len(found)} examples have {words!r}"
    return found[0]


def start(code, directory, **more):
    """As a reader does it: the example in a file, checkpointing.py beside it."""
    directory.mkdir(exist_ok=True)
    (directory / "job.py").write_text(code)
    shutil.copy(ROOT / "checkpointing.py", directory)
    # Threads of torch that wait do not spin: the bits are the same, and other tests go on.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **more}
    return subprocess.Popen([sys.executable, "job.py"], cwd=directory, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def output_of(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def killed(code, directory, after=(1, 2)):
    """Its output, after a kill -9 a moment after so many checkpoints of each start."""
    (directory / "killer").mkdir(parents=True)
    (directory / "killer" / "sitecustomize.py").write_text(KILLER)
    moments, kills = random.Random(0), 0
    for number in after:
        process = start(code, directory, PYTHONPATH=str(directory / "killer"),
                        KILL_AFTER=str(number), MOMENT=str(moments.uniform(0, 0.05)))
        process.wait(120)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)      # the worker processes of the dead one
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills, "no kill came in time"
    return output_of(start(code, directory))


def plain(code):
    """The loop as it was before the library came: its lines taken out again."""
    total = re.search(r"checkpointing.Run\(.*?total=([^,)]+)", code)
    numbers = f"range({total[1]})" if total else "__import__('itertools').count()"
    code = re.sub(r"(?m) +# .*$", "", code)
    code = re.sub(r"(?m)^ *(run = |run\.tick|import checkpointing).*\n", "", code)
    code = re.sub(r"(?m)run\.load\((.*?)(, read=.*)?\)$", r"\1", code)
    code = re.sub(r"run\.steps\(.*\):", f"{numbers}:", code)
    return code.replace("run.done", "0").replace("run.finish()", "break")


def compare(tmp_path, code, out="results", after=(1, 2)):
    """The example, killed, prints what the plain loop prints; or what it prints undisturbed."""
    undisturbed = code if "with run:" in code or "map(" in code else plain(code)
    alone = start(undisturbed, tmp_path / "alone")      # beside the other: both wait for imports
    said = killed(code, tmp_path / "killed", after)
    assert said == output_of(alone) != ""
    assert read_progress(tmp_path / "killed" / out / "PROGRESS.txt")["Status"] == "COMPLETE"
    return said


def test_the_four_lines(tmp_path):
    compare(tmp_path, example("random.seed(1)"), "simulation")


@pytest.mark.parametrize("words, out", [("every=100)", "squares"), pytest.param(
    "every=100, workers=4)", "results", marks=pytest.mark.thorough)])
def test_a_function_over_many_items(tmp_path, words, out):
    said = compare(tmp_path, example(words), out)
    assert int(said) == sum(i * i for i in range(1000))


def test_a_pytorch_loop_with_an_epoch_a_step(tmp_path):
    compare(tmp_path, example("for epoch in run.steps"), "training", (2,))


def test_results_in_pieces(tmp_path):
    code = example("run.pieces()")
    killed(code + "print()", tmp_path / "killed", (1, 3))
    start(code, tmp_path / "alone").wait(120)
    names = sorted(path.name for path in (tmp_path / "killed" / "videos").glob("*.npz"))
    assert len(names) == 10
    for name in names:
        assert (tmp_path / "killed" / "videos" / name).read_bytes() == (
            tmp_path / "alone" / "videos" / name).read_bytes()


def test_a_pool_that_says_how_far_it_is(tmp_path):
    compare(tmp_path, example("pool.imap"), "pool")


@pytest.mark.parametrize("number, code, send", [
    (signal.SIGINT, -signal.SIGINT, os.killpg),     # as a terminal does it: to all processes
    (signal.SIGTERM, 143, os.kill)])
def test_a_pool_that_is_stopped_leaves_at_once_and_goes_on(tmp_path, number, code, send):
    process = start(example("pool.imap"), tmp_path)
    wait_for(lambda: checkpoints(tmp_path / "pool"), "a checkpoint")
    send(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == code and status(tmp_path / "pool") == "INTERRUPTED"
    said = output_of(start(example("pool.imap"), tmp_path))
    assert int(said) == sum(i * i for i in range(1000))


def test_a_loop_that_ends_when_it_is_good_enough(tmp_path):
    compare(tmp_path, example("run.finish()"))


@pytest.mark.thorough
def test_a_pytorch_loop_with_a_batch_a_step(tmp_path):
    compare(tmp_path, example("for step in run.steps"), "training", (2,))


def test_a_loop_where_steps_do_not_fit(tmp_path):
    compare(tmp_path, example("def advance(state)"))


def test_a_format_of_your_own(tmp_path):
    compare(tmp_path, example("read=json.load"))
    newest = tmp_path / "killed" / "results" / "checkpoint_00500.json"
    assert json.loads(newest.read_bytes()) == [i * i for i in range(500)]


@pytest.mark.thorough
def test_programs_that_the_job_starts(tmp_path):
    compare(tmp_path, example("start_new_session=True"))


@pytest.mark.thorough
def test_several_runs_in_one_program(tmp_path):
    compare(tmp_path, example("with run:"), "results/large", (1, 4))


def test_videos_of_your_own(tmp_path):
    output_of(start(example("np.moveaxis"), tmp_path))
    data = videos.load(tmp_path / "mine.npz")
    assert data.videos.shape == (40, 8, 3, 16, 16) and data.classes == ["a", "b", "c", "d"]


def test_the_pages_are_short_and_their_links_lead_somewhere():
    assert len(PAGES[ROOT / "README.md"].splitlines()) <= 250
    for path, page in PAGES.items():
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", page):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"
        if path.name != "README.md":
            assert page.splitlines()[2].startswith("For those"), f"{path.name}: for whom?"


# -- lines for a shell


def line(words):
    """The one line of all pages that begins with these words; of a crontab, without the times."""
    found = {line.partition("    #")[0] for line in re.findall(r"(?m)^(?:\*/5 [* ]{7} )?(.*)$", TEXT)
             if line.startswith(words)}
    assert len(found) == 1, f"{len(found)} lines begin with {words!r}"
    return found.pop()


@pytest.fixture
def home(tmp_path):
    """A home directory with the project and its Python in it."""
    (tmp_path / "project" / ".venv" / "bin").mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.html")]:
        shutil.copy(path, tmp_path / "project")
    program(tmp_path / "project" / ".venv" / "bin" / "python", f'exec {sys.executable} "$@"')
    return tmp_path


def program(path, text):
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def sh(command, home, where="project", path=""):
    """Run a line as cron does: by sh, in an environment with next to nothing in it."""
    bare = ["env", "-i", f"HOME={home}", "LOGNAME=me", f"PATH={path}/usr/bin:/bin", "SHELL=/bin/sh"]
    return subprocess.Popen([*bare, "/bin/sh", "-c", command], cwd=home / where, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)


def with_venv(home):
    return f"{home}/project/.venv/bin:"


def status(out):
    return read_progress(out / "PROGRESS.txt").get("Status")


def checkpoints(out):
    return len(read_records(out)) if out.exists() else 0


def job_in(out):
    return int(read_progress(out / "PROGRESS.txt")["PID"])


def test_the_demonstration_survives_its_kill(home):
    out, first = home / "project" / "demo", line(".venv/bin/python generate.py --n 20000")
    for seen in (0, 2):
        process = sh("exec " + first, home)
        wait_for(lambda: checkpoints(out) >= seen + 2, "two checkpoints", 120)
        assert sh(line("kill -9"), home).communicate()[0] == ""
        said = process.communicate(timeout=30)[0]
        assert process.returncode == -signal.SIGKILL
    assert int(said.split()[1].partition("/")[0]) > 1000, "it began anew"


def test_cron_goes_on_after_every_death_until_the_job_is_complete(home):
    out, tick = home / "project" / "results", line('cd "$HOME/project" && .venv/bin/python runs.py '
                                                   "keep results -- .venv/bin/python generate.py")
    assert not re.search(r"(?<!\\)%", tick), "cron takes a % for the end of the line"
    for death in range(3):
        before, process = checkpoints(out), sh(tick, home, ".")
        wait_for(lambda: checkpoints(out) > before + 1 or process.poll() is not None, "checkpoints")
        beside = sh(tick, home, ".")    # starts nothing and says nothing
        assert beside.communicate()[0] == ""
        if process.poll() is None and death % 2:    # the job alone, as for lack of memory
            os.kill(job_in(out), signal.SIGKILL)
            process.communicate()
        else:       # the machine: everything dies
            for pid in {process.pid, job_in(out)}:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(os.getpgid(pid), signal.SIGKILL)
            process.communicate()
    assert sh(tick, home, ".").communicate(timeout=120)[0] == "" and status(out) == "COMPLETE"
    log = (home / "project" / "generate.log").read_text()
    assert "Traceback" not in log and "in use" not in log and "complete" in log.splitlines()[-1]
    before = (out / "PROGRESS.txt").read_bytes()
    assert sh(tick, home, ".").communicate()[0] == ""
    assert (out / "PROGRESS.txt").read_bytes() == before
    assert (home / "project" / "generate.log").read_text() == log


TRAINING = """import time, checkpointing   # in the place of train_magvit.py, which takes long
run = checkpointing.Run("results/magvit_training", 100, every=5)
values = run.load([])
for i in run.steps(lambda: values):
    time.sleep(0.02)
"""


def test_several_stages_stop_where_they_are_and_go_on_there(home):
    (home / "project" / "train_magvit.py").write_text(TRAINING)
    out, training = home / "project" / "results", home / "project" / "results" / "magvit_training"
    tick = line('cd "$HOME/project" && .venv/bin/python runs.py keep results -- sh -c')
    process = sh(tick.replace("--n 30000", "--n 4000 --every 500"), home, ".")
    wait_for(lambda: checkpoints(training) > 1, "a checkpoint of the last stage", 120)
    stopped = sh(line("python runs.py stop"), home, path=with_venv(home))
    assert "stopped" in stopped.communicate(timeout=60)[0]
    process.communicate(timeout=60)
    assert status(training) == "INTERRUPTED"
    before = checkpoints(training)
    assert sh(tick, home, ".").communicate()[0] == "" and checkpoints(training) == before
    (out / "stop").unlink()
    sh(tick.replace("--n 30000", "--n 4000 --every 500"), home, ".").communicate(timeout=120)
    assert status(training) == "COMPLETE" and (out / "dataset.npz").exists()


# -- parts of a data set: xargs, SLURM, ssh


SMALL = "--n 6000 --every 250"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    run("generate.py", *SMALL.split(), "--out", place / "results")
    return merged(place)


def merged(place):
    run("merge.py", place / "results", "--out", place / "set.npz")
    return sha256(place / "set.npz")


@pytest.mark.thorough
def test_four_shards_under_xargs_one_killed(home, undisturbed):
    command, out = line("seq 4").replace("--n 30000", SMALL), home / "project" / "results"
    process = sh(command, home, path=with_venv(home))
    wait_for(lambda: checkpoints(out / "shard_2_of_4"), "a checkpoint")
    with contextlib.suppress(ProcessLookupError):       # it may have ended
        os.kill(job_in(out / "shard_2_of_4"), signal.SIGKILL)
    process.communicate(timeout=120)
    process = sh(command, home, path=with_venv(home))
    process.communicate(timeout=120)
    assert process.returncode == 0 and merged(home / "project") == undisturbed


@pytest.mark.thorough
def test_shards_as_a_slurm_array(home, undisturbed):
    """A stub of sbatch starts the tasks of the array; each is told to leave, and requeued."""
    program(home / "project" / ".venv" / "bin" / "sbatch", """
        for option; do case $option in
            --array=1-*) last=${option#--array=1-};; --wrap=*) task=${option#--wrap=};; esac; done
        for i in $(seq "$last"); do
            SLURM_ARRAY_TASK_ID=$i timeout -s TERM 0.8 bash -c "$task"
            SLURM_ARRAY_TASK_ID=$i bash -c "$task" || exit 1
        done""")
    command = line("sbatch --array").replace("--n 30000", SMALL)
    assert "--requeue" in command and "--signal=B:TERM" in command
    process = sh(command, home, path=with_venv(home))
    process.communicate(timeout=120)
    assert process.returncode == 0 and merged(home / "project") == undisturbed


@pytest.mark.thorough
def test_shards_on_machines_reached_by_ssh(home, undisturbed):
    """A stub of ssh runs the command at home, as a login there would."""
    program(home / "project" / ".venv" / "bin" / "ssh",
            f'cd; exec bash -c "${{2//--n 30000/{SMALL}}}"')
    assert sh(line("for i in 1 2 3 4"), home, path=with_venv(home)).wait(60) == 0
    parts = [home / "project" / "results" / f"shard_{i}_of_4" for i in (1, 2, 3, 4)]
    wait_for(lambda: all(status(part) == "COMPLETE" for part in parts), "four parts", 120)
    assert merged(home / "project") == undisturbed


@pytest.mark.thorough
def test_the_systemd_unit_is_right(home):
    need("systemd-analyze")
    text = re.search(r"```ini\n(\[Unit\]\n.*?)```", TEXT, re.S)[1]
    unit = home / "generate.service"

    def verify(text):
        unit.write_text(text.replace("%h", str(home)))  # it looks whether the program is there
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], text=True,
                              capture_output=True, env={**os.environ, "HOME": str(home)})
        return [line for line in (done.stdout + done.stderr).splitlines() if "generate" in line]

    assert not verify(text)
    assert verify(text.replace("on-failure", "sometimes")), "the control: a fault is found"
    settings = dict(re.findall(r"(?m)^(\w+)=(.*)$", text))
    assert settings["RestartPreventExitStatus"].split() == ["2", "75"]
    assert settings["KillMode"] == "mixed", "or SIGTERM would kill the workers of a pool at once"
