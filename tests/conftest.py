"""What all tests share: how a program is run, killed and watched, and where a tool is missing.

A stage that imports torch is forked from a process that has done so already (zygote.py): it
starts in milliseconds, not in three seconds, and ends as if started from a command line.
`real=True` starts a true process all the same, `real=False` forks a stage without torch, too.
"""
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A suite started in the background of a script or under nohup inherits ignored signals, and would
# hand them on to the jobs it tests, which rightly go on ignoring them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# As in settings.py, for trainings inside a test: read when torch is imported. And as magvit.py sets
# it: where it comes later, it differs from the zygote's, which then starts true processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpointing  # noqa: E402


def missing(what):
    """A test that needs what is not here: skipped with the reason on a laptop, failed in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is needed in CI")
    pytest.skip(f"{what} is not here")


def need(*tools):
    for tool in tools:
        if not shutil.which(tool):
            missing(tool)


def need_root():
    if os.geteuid():
        missing("root (for mount)")


# -- programs

WITH_TORCH = ("train_magvit.py", "evaluate_magvit.py", "apply_magvit.py")


class Forked(subprocess.Popen):
    """A Popen whose process is forked by the zygote and becomes a child of this one. Only how it
    starts is replaced, by a method of Popen that is not public: Python 3.10 to 3.14 have it."""

    environment, zygote = dict(os.environ), None

    def __init__(self, arguments, **more):
        self.session = more.pop("start_new_session", False)
        super().__init__(arguments, **more)

    def _execute_child(self, arguments, executable, preexec_fn, close_fds, pass_fds, cwd, env,
                       startupinfo, creationflags, shell, *rest):
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[:6]
        request = {"argv": list(map(str, arguments[1:])), "cwd": str(cwd or os.getcwd()),
                   "session": self.session}
        answers, answer = os.pipe()
        adopt_orphans(True)
        self.ask(request, [0 if p2cread < 0 else p2cread, 1 if c2pwrite < 0 else c2pwrite,
                           2 if errwrite < 0 else errwrite, answer])
        os.close(answer)
        self.pid = int(os.read(answers, 20))
        os.close(answers)
        adopt_orphans(False)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    @classmethod
    def ask(cls, request, descriptors):
        """The zygote is started when a test first asks, and ends with this process."""
        if cls.zygote is None:
            cls.zygote, its = socket.socketpair(type=socket.SOCK_SEQPACKET)
            subprocess.Popen([sys.executable, ROOT / "tests" / "zygote.py", str(its.fileno())],
                             pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, cwd=ROOT,
                             env=cls.environment)
            its.close()
        socket.send_fds(cls.zygote, [json.dumps(request).encode()], descriptors)


LIBC = ctypes.CDLL(None)


def adopt_orphans(yes):
    """Whether a grandchild whose parent has ended becomes our child, which only Linux can do."""
    PR_SET_CHILD_SUBREAPER = 36     # prctl(2)
    assert LIBC.prctl(PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0) == 0


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def run(script, *arguments, code=0, real=None, **more):
    """Run a stage to its end, check its exit code, return the completed process with its output."""
    process = start(script, *arguments, real=real, stderr=subprocess.PIPE, **more)
    try:
        said, errors = process.communicate(timeout=150)
    finally:
        process.kill()      # if it hangs
    done = subprocess.CompletedProcess(process.args, process.returncode, said, errors)
    assert done.returncode == code, f"exit {done.returncode}, not {code}\n{said}\n{errors}"
    if code:
        assert "Traceback" not in errors
        lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, errors
    return done


def start(script, *arguments, real=None, **more):
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **more}
    if real is None:
        real = script not in WITH_TORCH
    # Python and torch read the environment when they start: with another one it is a true process.
    changed = more.get("env", os.environ).items() ^ Forked.environment.items()
    forks = not real and hasattr(LIBC, "prctl") and dict(changed).keys() <= {"PYTEST_CURRENT_TEST"}
    return (Forked if forks else subprocess.Popen)(command(script, *arguments), **more)


def environment(**more):
    return {**os.environ, **{key: str(value) for key, value in more.items()}}


def progress(out):
    return checkpointing.read_progress(Path(out) / "PROGRESS.txt")


def durable(out):
    """How many units PROGRESS.txt says would survive a kill."""
    return int((re.match(r"\d+", progress(out).get("Checkpoint", "")) or ["0"])[0])


def numbers(out):
    """The numbers of the recorded checkpoints that are there, in order."""
    return [record["start"] for name, record in checkpointing.read_records(out).items()
            if (Path(out) / name).exists()]


def wait_for(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"waited {seconds} s for {what}")


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    code = process.returncode
    assert code == -signal.SIGKILL, f"it had ended before the kill ({code})"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB; call with another size in bytes for that one."""
    need("mount")
    need_root()
    mounted = []

    def make(size=1 << 20):
        directory = tmp_path / f"disk{len(mounted)}"
        directory.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory],
                       check=True)
        mounted.append(directory)
        return directory

    yield make
    for directory in mounted:
        subprocess.run(["umount", "-l", directory], check=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A directory with dataset.npz, 80 videos, and results/magvit_training, a small training of
    them with its evaluation. For reading: a test that changes it copies it first."""
    place = tmp_path_factory.mktemp("trained")
    run("generate.py", "--n", 80, "--every", 40, "--out", place / "videos", real=False)
    run("merge.py", place / "videos", "--out", place / "dataset.npz", real=False)
    run("train_magvit.py", "--data", place / "dataset.npz", "--epochs", 2, "--device", "cpu",
        "--out", place / "results" / "magvit_training")
    return place
