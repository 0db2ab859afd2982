"""Each safety, taken out of a copy of checkpointing.py, makes a check of tests/prove.py fail.

The same checks pass on the file as it is: that is tests/test_proof.py, with the same seed.
"""
import shutil

import pytest
from conftest import ROOT
from test_proof import proof

# What is taken out: (the text of the step, what stands there instead, the parts of prove.py that
# must find out)
SABOTAGE = {
    "the file is not synced": (
        "        os.fsync(self.file.fileno())\n", "        pass\n", ["order", "power"]),
    "the directory is not synced": (
        "            sync_directory(self.path.parent)\n", "            pass\n", ["order", "power"]),
    "the record is not synced": (
        "                os.fsync(file.fileno())\n", "                pass\n", ["order"]),
    "written in place, not renamed": (
        "        os.replace(self.temp, self.path)\n",
        "        self.path.write_bytes(b'')\n        shutil.copyfile(self.temp, self.path)\n"
        "        os.unlink(self.temp)\n", ["order", "kill"]),
    "renamed before its record is written": (
        "        if before_commit:\n            before_commit(atomic.temp)\n"
        "        atomic.commit(durable)\n",
        "        atomic.commit(durable)\n"
        "        if before_commit:\n            before_commit(atomic.path)\n",
        ["order", "kill"]),
    "the temp files of the dead are not swept": (
        "                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "                os.unlink(path)\n",
        "                pass\n", ["kill"]),
    "what is read back is not verified": (
        'return None if _sha256(file) == record["sha256"] else "checksum differs"', "return None",
        ["rot"]),
    "the directory is not locked": (
        "            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "            pass\n", ["starts"]),
}


@pytest.mark.parametrize("what, part", [(what, part) for what in SABOTAGE
                                        for part in SABOTAGE[what][2]])
def test_a_safety_taken_out_is_found_out(tmp_path, what, part):
    step, instead, _ = SABOTAGE[what]
    text = (ROOT / "checkpointing.py").read_text()
    assert text.count(step) == 1, f"checkpointing.py has this step {text.count(step)} times: {step}"
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "checkpointing.py").write_text(text.replace(step, instead))
    done = proof(part, 60, "--code", str(tmp_path), "--first")
    found = done.returncode == 1 and f"LOST in {part}" in done.stdout
    assert found, f"{what}: not found by {part}\n{done.stdout}{done.stderr}"
