"""Every example of README.md and docs/ as it is printed. Programs are killed, started again and
compared with one that was left alone; lines for cron, systemd, SLURM and several machines are run
by what reads them."""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, need, progress, run, wait_for

import videos
from checkpointing import read_records, sha256

PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
TEXT = "\n".join(PAGES.values())
EXAMPLES = {path: re.findall(r"```python\n(.*?)```", page, re.S) for path, page in PAGES.items()}

# Found by Python beside the job: kill -9 a moment after the checkpoint with the number KILL_AFTER.
KILLER = """
import os, signal, threading
replace, left = os.replace, int(os.environ["KILL_AFTER"])
def replace_and_count(old, new):
    global left
    replace(old, new)
    left -= os.path.basename(new).startswith("checkpoint_")
    if left == 0:
        threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGKILL)).start()
os.replace = replace_and_count
"""


def programs():
    """Those of the README in every pass; those of docs/, which are for a few, in the rest."""
    for path, codes in EXAMPLES.items():
        for code in codes:
            opened = re.search(r"checkpointing\.(?:Run|map)\(.*", code)
            marks = () if path.name == "README.md" else pytest.mark.thorough
            if opened:
                yield pytest.param(code, marks=marks, id=opened[0])


def start(code, directory, **more):
    """As a reader does it: the example in a file, checkpointing.py beside it."""
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "job.py").write_text(code)
    shutil.copy(ROOT / "checkpointing.py", directory)
    # Threads of torch that wait do not spin: the bits are the same, and other tests go on.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **more}
    return subprocess.Popen([sys.executable, "job.py"], cwd=directory, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def output_of(process):
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    return output


def killed(code, directory):
    """Its output, after a kill -9 some checkpoints after each start."""
    (directory / "killer").mkdir(parents=True)
    (directory / "killer" / "sitecustomize.py").write_text(KILLER)
    codes = []
    for number in (2,) if "import torch" in code else (1, 2):       # it takes long to start
        process = start(code, directory, PYTHONPATH=str(directory / "killer"),
                        KILL_AFTER=str(number))
        process.wait(150)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)      # the worker processes of the dead one
        process.communicate()
        codes.append(process.returncode)
    assert -signal.SIGKILL in codes, "no kill came in time"
    return output_of(start(code, directory))


@pytest.mark.parametrize("code", list(programs()))
def test_an_example_killed_and_started_again_ends_as_one_that_was_left_alone(tmp_path, code):
    process = start(code, tmp_path / "alone")       # beside the other: both wait for imports
    printed = [killed(code, tmp_path / "killed"), output_of(process)]
    pieces = [{path.name: path.read_bytes() for path in (tmp_path / place).rglob("*.npz")}
              for place in ("killed", "alone")]
    assert printed[0] == printed[1] and pieces[0] == pieces[1] and (printed[0] or pieces[0])
    states = [status(path.parent) for path in (tmp_path / "killed").rglob("PROGRESS.txt")]
    assert states and set(states) == {"COMPLETE"}


def test_videos_of_your_own(tmp_path):
    [code] = [code for codes in EXAMPLES.values() for code in codes if "np.moveaxis" in code]
    output_of(start(code, tmp_path))
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
    lines = re.findall(r"(?m)^(?:\*/5 [* ]{7} )?(.*)$", TEXT)
    [found] = {line.partition("    #")[0] for line in lines if line.startswith(words)}
    return found


@pytest.fixture
def home(tmp_path):
    """A home directory with the project and its Python in it."""
    (tmp_path / "project" / ".venv" / "bin").mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.html")]:
        shutil.copy(path, tmp_path / "project")
    program(tmp_path, "python", f'exec {sys.executable} "$@"')
    return tmp_path


def program(home, name, text):
    path = home / "project" / ".venv" / "bin" / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def sh(command, home, where="project"):
    """Run a line as cron does: by sh, in an environment with next to nothing in it; in the project
    as if its environment were activated."""
    path = f"PATH={home}/project/.venv/bin:/usr/bin:/bin" if where else "PATH=/usr/bin:/bin"
    bare = ["env", "-i", f"HOME={home}", "LOGNAME=me", path, "SHELL=/bin/sh"]
    return subprocess.Popen([*bare, "/bin/sh", "-c", command], cwd=home / where, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)


def cron(command, home):
    return sh(command, home, where="")


def status(out):
    return progress(out).get("Status")


def checkpoints(out):
    return len(read_records(out)) if out.exists() else 0


def job_in(out):
    return int(progress(out)["PID"])


def test_the_demonstration_survives_its_kill(home):
    out, first = home / "project" / "demo", line(".venv/bin/python generate.py --n 20000")
    for seen in (0, 2):
        process = sh("exec " + first, home)
        wait_for(lambda: checkpoints(out) >= seen + 2, "two checkpoints")
        assert sh(line("kill -9"), home).communicate()[0] == ""
        said = process.communicate(timeout=60)[0]
        assert process.returncode == -signal.SIGKILL
    assert int(said.split()[1].partition("/")[0]) > 1000, "it began anew"


def test_cron_goes_on_after_a_reboot_until_the_job_is_complete_and_is_silent(home):
    out, tick = home / "project" / "results", line('cd "$HOME/project" && .venv/bin/python runs.py '
                                                   "keep results -- .venv/bin/python generate.py")
    assert not re.search(r"(?<!\\)%", tick), "cron takes a % for the end of the line"
    process = cron(tick, home)
    wait_for(lambda: checkpoints(out) > 1 or process.poll() is not None, "checkpoints")
    assert cron(tick, home).communicate()[0] == ""      # beside a job at work
    with contextlib.suppress(ProcessLookupError):       # it may have ended
        os.killpg(process.pid, signal.SIGKILL)
        os.killpg(os.getpgid(job_in(out)), signal.SIGKILL)
    process.communicate()
    assert cron(tick, home).communicate(timeout=150)[0] == "" and status(out) == "COMPLETE"
    log = (home / "project" / "generate.log").read_text()
    assert "Traceback" not in log and "in use" not in log and "complete" in log.splitlines()[-1]
    before = (out / "PROGRESS.txt").read_bytes()
    assert cron(tick, home).communicate()[0] == ""
    assert (out / "PROGRESS.txt").read_bytes() == before
    assert (home / "project" / "generate.log").read_text() == log


# In the place of train_magvit.py, which takes long: so does this, until there is a file `quick`.
TRAINING = """
import os, time, checkpointing
run = checkpointing.Run("results/magvit_training", 1000, every=5)
values = run.load([])
for i in run.steps(lambda: values):
    time.sleep(0 if os.path.exists("quick") else 0.1)
"""


def test_several_stages_stop_where_they_are_and_go_on_there(home):
    (home / "project" / "train_magvit.py").write_text(TRAINING)
    out, training = home / "project" / "results", home / "project" / "results" / "magvit_training"
    tick = line('cd "$HOME/project" && .venv/bin/python runs.py keep results -- sh -c')
    small = tick.replace("--n 30000", "--n 4000 --every 500")
    process = cron(small, home)
    wait_for(lambda: checkpoints(training) > 1, "a checkpoint of the last stage")
    stopped = sh(line("python runs.py stop"), home)
    assert "stopped" in stopped.communicate(timeout=60)[0]
    process.communicate(timeout=60)
    assert status(training) == "INTERRUPTED"
    before = checkpoints(training)
    assert cron(tick, home).communicate()[0] == "" and checkpoints(training) == before
    (out / "stop").unlink()
    (home / "project" / "quick").touch()
    cron(small, home).communicate(timeout=150)
    assert status(training) == "COMPLETE" and (out / "dataset.npz").exists()


# -- parts of a data set: xargs, SLURM, ssh

SMALL = "--n 6000 --every 250"


def merged(place):
    run("merge.py", place / "results", "--out", place / "set.npz")
    return sha256(place / "set.npz")


@pytest.mark.thorough
@pytest.mark.parametrize("words, name, stub", [
    ("seq 4", "", ""),
    ("sbatch --array", "sbatch", """
        for option; do case $option in
            --array=1-*) last=${option#--array=1-};; --wrap=*) task=${option#--wrap=};; esac; done
        for i in $(seq "$last"); do SLURM_ARRAY_TASK_ID=$i bash -c "$task" & done; wait"""),
    ("for i in 1 2 3 4", "ssh", 'cd; exec bash -c "$2"')], ids=["xargs", "slurm", "ssh"])
def test_shards_under_xargs_slurm_and_ssh_one_killed_are_the_same_set(home, words, name, stub):
    """A stub of sbatch starts the tasks; one of ssh runs the command at home, as a login would."""
    run("generate.py", *SMALL.split(), "--out", home / "results")
    if name:
        program(home, name, stub)
    command = line(words).replace("--n 30000", SMALL)
    parts = [home / "project" / "results" / f"shard_{i}_of_4" for i in (1, 2, 3, 4)]
    process = sh(command, home)
    wait_for(lambda: checkpoints(parts[1]), "a checkpoint")
    with contextlib.suppress(ProcessLookupError):       # it may have ended
        os.kill(job_in(parts[1]), signal.SIGKILL)
    process.communicate(timeout=150)
    sh(command, home).communicate(timeout=150)
    wait_for(lambda: all(status(part) == "COMPLETE" for part in parts), "four parts")
    assert merged(home / "project") == merged(home)


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
