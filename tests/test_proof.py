"""The short form of tests/prove.py, in every test run, with a fixed seed."""
import re
import subprocess
import sys

import pytest
from conftest import ROOT, missing

SEED = 1
SECONDS = {"order": 1, "kill": 6, "fail": 10, "power": 10, "rot": 6, "starts": 2, "signals": 5,
           "histories": 6}


def proof(part, seconds, *more):
    """Run one part; the finished process, with its table."""
    command = [sys.executable, ROOT / "tests" / "prove.py", "--part", part, "--seconds",
               str(seconds), "--seed", str(SEED)]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=160)
    if done.returncode == 3:
        missing(done.stderr.strip())
    return done


@pytest.mark.parametrize("part", SECONDS)
def test_nothing_is_lost(part):
    done = proof(part, SECONDS[part])
    print(done.stdout)   # the seed and the counts, in pytest's report of a failure
    assert done.returncode == 0, done.stdout + done.stderr
    trials = re.search(r"\*\*all\*\* \| \| \*\*([\d,]+)\*\*", done.stdout)[1]
    assert int(trials.replace(",", "")) >= 3
