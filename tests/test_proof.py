"""The short form of tests/prove.py, with a fixed seed; and proof that it can fail: each safety,
taken out of a copy of the library, makes a named part of it fail. `-m thorough` runs longer passes
and the parts that take longer to find out."""
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, missing

thorough = pytest.mark.thorough
# seconds of a short pass, of a longer one
PARTS = {"order": (0.5, 1), "kill": (1.5, 9), "fail": (1.5, 15), "power": (2, 10), "rot": (1, 8),
         "unloadable": (0.1, 1), "starts": (0.5, 4), "moved": (0.5, 2), "signals": (2, 12),
         "histories": (1, 10)}
QUICK = "order", "rot", "unloadable", "starts", "moved", "signals"      # they find out at once

# What is taken out: (the text of the step, what stands there instead, the parts that find out)
SABOTAGE = {
    "the file is not synced": (
        "    os.fsync(file.fileno())\n\n\ndef sync_directory", "\n\ndef sync_directory",
        ["order", "power"]),
    "the directory is not synced": (
        "            sync_directory(path.parent)\n", "            pass\n", ["order", "power"]),
    "the record is not synced": (
        "            os.fsync(file.fileno())\n    except", "    except", ["order"]),
    "written in place, not renamed": (
        "        os.replace(file.name, path)\n",
        "        path.write_bytes(b'')\n        shutil.copyfile(file.name, path)\n"
        "        os.unlink(file.name)\n", ["order", "kill"]),
    "renamed before its record is written": (
        "        if before_commit:\n            before_commit(file.name)\n"
        "        os.replace(file.name, path)\n",
        "        os.replace(file.name, path)\n"
        "        if before_commit:\n            before_commit(path)\n", ["order", "kill"]),
    "the temp files of the dead are not swept": (
        "                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "                os.unlink(file.name)\n",
        "                pass\n", ["kill"]),
    "what is read back is not verified": (
        'return "" if sha256(path) == record["sha256"] else "checksum differs"', 'return ""',
        ["rot"]),
    "the first state is not read back": (
        "read = self._read if write else undump", "read = None", ["unloadable"]),
    "the directory is not locked": (
        "                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "                pass\n", ["starts"]),
    "the lock is always ours": (
        "return os.path.samestat(os.stat(self.path), os.fstat(self.file))", "return True",
        ["moved"]),
    "COMPLETE with the last save": (
        '    self.write("RUNNING")\n        state =',
        '    self.write("COMPLETE" if self.run.complete else "RUNNING")\n        state =',
        ["kill"]),
    "COMPLETE in spite of a signal": (
        "        if number:  # also", "        if number and error:  # also", ["signals"]),
}


def proof(part, seconds, *more):
    """Run one part; the finished process, with its table."""
    command = [sys.executable, ROOT / "tests" / "prove.py", "--part", part, "--minutes",
               str(seconds / 60), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=160)
    if done.returncode == 3:
        missing(done.stderr.strip())
    return done


@pytest.mark.parametrize("part, seconds", [
    *[(part, short) for part, (short, _) in PARTS.items()],
    *[pytest.param(part, long, marks=thorough) for part, (_, long) in PARTS.items()]])
def test_nothing_is_lost(part, seconds):
    done = proof(part, seconds)
    print(done.stdout)   # the seed and the counts, in pytest's report of a failure
    assert done.returncode == 0, done.stdout + done.stderr
    trials = re.search(r"\*\*all\*\* \| \*\*([\d,]+)\*\*", done.stdout)[1]
    assert int(trials.replace(",", "")) >= 3


@pytest.mark.parametrize("what, part", [
    pytest.param(what, part, marks=() if part in QUICK else thorough)
    for what in SABOTAGE for part in SABOTAGE[what][2]])
def test_a_safety_taken_out_is_found_out(tmp_path, what, part):
    step, instead, _ = SABOTAGE[what]
    text = (ROOT / "checkpointing.py").read_text()
    assert text.count(step) == 1, f"checkpointing.py has this step {text.count(step)} times: {step}"
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "checkpointing.py").write_text(text.replace(step, instead))
    done = proof(part, 60, "--code", str(tmp_path), "--first")
    found = done.returncode == 1 and f"LOST in {part}" in done.stderr
    assert found, f"{what}: not found by {part}\n{done.stdout}{done.stderr}"
