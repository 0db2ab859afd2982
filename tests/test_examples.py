"""Every example of the README as it stands: killed, started again, compared with the plain loop."""
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, kill, wait_for

from checkpointing import find_checkpoints, read_progress

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)

PREAMBLE = f"""import functools, sys, time
sys.path.insert(0, {str(ROOT)!r})
import checkpointing
def simulate(i):
    with open("calls", "a") as file:
        file.write(f"{{i}}\\n")
    time.sleep(0.002)
    return i * i
def advance(state):
    time.sleep(0.002)
    day = state["day"]
    return {{"day": min(1000, day + 1 + day % 4), "height": state["height"] * 1.001 + 0.1}}
"""


def example(words):
    """The one example of the README that has these words."""
    found = [code for code in EXAMPLES if words in code]
    assert len(found) == 1, f"{len(found)} examples of README.md have {words!r}"
    return found[0]


def plain(code):
    """The loop as it was before the library came: without the lines marked as new."""
    lines, deeper = [], None
    for line in code.splitlines():
        indent = len(line) - len(line.lstrip())
        if deeper is not None and line.strip() and indent <= deeper:
            deeper = None
        new = line.rstrip().endswith("# new")
        loop = re.match(r"( *for \w+ in )run\.steps\(", line)
        if loop:   # the only lines that are changed, not added
            line = f"{loop[1]}range(total):"
        elif "pool.imap" in line:
            line = line.replace("run.done", "0")
        elif re.match(r" *(\w+) = run\.load\(.*default=", line):
            line = re.sub(r"run\.load\(.*default=(.*)\) *# new", r"\1", line)
        elif new:
            if "with checkpointing.Run(" in line:
                deeper = indent
            continue
        lines.append(line[4:] if deeper is not None else line)
    return "\n".join(lines) + "\n"


def new_lines(code):
    return [line for line in code.splitlines() if line.rstrip().endswith("# new")]


def python(code, directory, **more):
    script = directory / "job.py"   # a file, since multiprocessing may import it
    script.write_text(code)
    # Waiting threads of torch do not spin: their number is as everywhere, and the bits are, too.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen([sys.executable, script], cwd=directory, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)


def output_of(process):
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return output.splitlines()[-1]


def newest(out):
    return max([number for number, _ in find_checkpoints(out)] if out.exists() else [], default=-1)


def killed_twice(code, directory, out, after):
    """Its last line of output, after a kill -9 a random moment after each of these checkpoints."""
    moments = random.Random(0)
    directory.mkdir()
    for number in after:
        process = python(code, directory)
        wait_for(lambda: newest(directory / out) >= number, f"checkpoint {number}")
        time.sleep(moments.uniform(0, 0.05))
        kill(process)
    return output_of(python(code, directory))


def compare(tmp_path, code, before, tail, out, after):
    assert len(new_lines(code)) <= 8
    (tmp_path / "plain").mkdir()
    # beside the other: both wait for imports
    undisturbed = python(PREAMBLE + before + tail, tmp_path / "plain")
    killed = killed_twice(PREAMBLE + code + tail, tmp_path / "killed", out, after)
    assert killed == output_of(undisturbed)
    assert read_progress(tmp_path / "killed" / out / "PROGRESS.txt")["Status"] == "COMPLETE"


SQUARES = str([i * i for i in range(1000)])
WEIGHTS = """
import hashlib
weights = [p.detach().numpy().tobytes() for p in model.parameters()]
print(hashlib.sha256(b"".join(weights)).hexdigest())
"""


def test_a_pytorch_loop_with_an_epoch_a_step(tmp_path):
    code = example("for epoch in run.steps")
    compare(tmp_path, code, "total = 20\n" + plain(code), WEIGHTS, "training", (3, 9))


def test_a_pytorch_loop_with_a_checkpoint_by_time_within_an_epoch(tmp_path):
    setup = example("for epoch in run.steps").partition("\nwith ")[0] + "\n"
    code = setup + example("for step in run.steps").replace("max_minutes=5", "max_minutes=0.0005")
    # of those before the `with`, which the second example has too
    assert len(new_lines(setup)) == 4
    compare(tmp_path, code, plain(code).replace("range(total)", "range(20 * batches)"), WEIGHTS,
            "training", (300, 1000))


def test_a_loop_of_your_own(tmp_path):
    code = example("run.due()").replace('unit="days"', 'unit="days", max_minutes=0.0005')
    compare(tmp_path, code, plain(code), "\nprint(state)\n", "results", (200, 600))


def test_a_function_over_many_items_in_one_line(tmp_path):
    code = example("checkpointing.map")
    assert len(code.splitlines()) == 1
    tail, directory, moments = "print(values)\n", tmp_path, random.Random(0)
    often = code.replace('"results")', '"results", every=100)')   # or five minutes could be lost
    assert often != code
    for number in (100, 300, 700):
        process = python(PREAMBLE + often + tail, directory)
        wait_for(lambda: newest(directory / "results") >= number, f"checkpoint {number}")
        time.sleep(moments.uniform(0, 0.1))
        kill(process)
    assert output_of(python(PREAMBLE + code + tail, directory)) == SQUARES
    calls = (directory / "calls").read_text().split()
    # at most a checkpoint's worth a kill
    assert set(map(int, calls)) == set(range(1000)) and len(calls) < 1400
    assert output_of(python(PREAMBLE + code + tail, directory)) == SQUARES
    assert (directory / "calls").read_text().split() == calls, "some were done again"


def test_map_says_which_item_failed_and_goes_on_there(tmp_path):
    bad = ("good = simulate\ndef simulate(i):\n    if i == 613:\n"
           "        raise ValueError('no such place')\n    return good(i)\n")
    line = example("checkpointing.map")
    process = python(PREAMBLE + bad + line, tmp_path)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "613" in output and "no such place" in output
    assert read_progress(tmp_path / "results" / "PROGRESS.txt")["Progress"].startswith("613/1000 ")
    assert output_of(python(PREAMBLE + line + "print(values)\n", tmp_path)) == SQUARES


@pytest.mark.parametrize("signal_, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_worker_processes_with_ctrl_c_to_all_of_them(tmp_path, signal_, code):
    script = PREAMBLE + example("pool.imap")
    assert len(new_lines(example("pool.imap"))) <= 8
    for number in (100, 400):
        process = python(script, tmp_path, start_new_session=True)
        wait_for(lambda: newest(tmp_path / "results") >= number, f"checkpoint {number}")
        os.killpg(process.pid, signal_)   # as the terminal does it
        output = process.communicate(timeout=20)[0]
        assert process.returncode == code, output
        assert "Traceback" not in output
        if signal_ == signal.SIGINT:
            number, path = find_checkpoints(tmp_path / "results")[-1]
            assert len(json.loads(path.read_bytes())) == number
    assert output_of(python(script + "    print(values)\n", tmp_path)) == SQUARES


def test_workers_that_outlive_a_killed_job_do_not_keep_its_directory(tmp_path):
    script = PREAMBLE + example("pool.imap") + "    print(values)\n"
    process = python(script, tmp_path, start_new_session=True)
    wait_for(lambda: newest(tmp_path / "results") >= 100, "a checkpoint")
    os.kill(process.pid, signal.SIGKILL)   # for lack of memory, say: the kernel takes one process
    process.wait()
    try:
        assert output_of(python(script, tmp_path)) == SQUARES
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_the_pool_example_without_its_new_lines_is_the_plain_one(tmp_path):
    code = "values, total = [], 1000\n" + plain(example("pool.imap"))
    assert output_of(python(PREAMBLE + code + "    print(values)\n", tmp_path)) == SQUARES
