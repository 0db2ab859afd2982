"""What all tests share: how a program is run, killed and watched, and what happens where a tool is missing."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A suite started in the background of a script or under nohup inherits ignored signals, and would hand them on to the jobs
# it tests, which rightly go on ignoring them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


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


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def run(script, *arguments, code=0, **more):
    """Run a stage to its end, check its exit code, return the completed process with its output as text."""
    done = subprocess.run(command(script, *arguments), capture_output=True, text=True, timeout=150, **more)
    assert done.returncode == code, f"exit {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
    if code:
        assert "Traceback" not in done.stderr
        assert len([line for line in done.stderr.splitlines() if not line.startswith("warning: ")]) == 1, done.stderr
    return done


def start(script, *arguments, **more):
    more.setdefault("stdout", subprocess.PIPE)
    more.setdefault("stderr", subprocess.STDOUT)
    return subprocess.Popen(command(script, *arguments), text=True, **more)


def peak_memory(script, *arguments):
    """Peak resident memory of a stage, in the unit of getrusage."""
    code = ("import resource, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
            "runpy.run_path(sys.argv[0], run_name='__main__'); "
            "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code, *command(script, *arguments)[1:]], capture_output=True, text=True,
                          check=True)
    return int(done.stdout.rsplit("peak", 1)[1])


def wait_for(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"waited {seconds} s for {what}")


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, f"it had ended before the kill ({process.returncode})"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB; call with another size in bytes for that one."""
    need("mount")
    need_root()
    mounted = []

    def make(size=1 << 20):
        directory = tmp_path / f"disk{len(mounted)}"
        directory.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True)
        mounted.append(directory)
        return directory

    yield make
    for directory in mounted:
        subprocess.run(["umount", "-l", directory], check=True)


# -- the checklist of -m prelaunch

checklist = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if item.get_closest_marker("prelaunch") and (report.when == "call" or report.failed or report.skipped):
        checklist.append((item.function.__doc__.splitlines()[0], report.outcome))


def pytest_terminal_summary(terminalreporter):
    if checklist:
        terminalreporter.section("prelaunch checklist")
        for title, outcome in checklist:
            terminalreporter.write_line(f"[{'x' if outcome == 'passed' else ' '}] {title}: {outcome}")
        ready = all(outcome == "passed" for _, outcome in checklist)
        terminalreporter.write_line("READY" if ready else "NOT READY")
