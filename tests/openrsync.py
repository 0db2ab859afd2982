"""Stands in for rsync as openrsync would behave on a Mac, where rsync itself behaves otherwise.

A file of more than 1 MB travels at RATE bytes a second into .NAME.XXXXXXXXXX. SIGTERM, SIGINT and
SIGHUP move that to the partial directory, SIGALRM and SIGKILL leave it; the next run goes on from
the partial, and the file is then left with mode 0600. All else is done by the real rsync. Only for
local copies. Appends to SENT the bytes that each run sent.
"""
import os
import random
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

BIG = 1 << 20
arguments = sys.argv[1:]
source, target = Path(arguments[-2]), Path(arguments[-1])
code = subprocess.run(["/usr/bin/rsync", f"--max-size={BIG}", *arguments]).returncode
if code or "--prune-empty-dirs" in arguments:   # one of the passes for small files
    raise SystemExit(code)


def fly(path, here):
    partial = here.parent / ".rsync-partial" / here.name
    letters = "".join(random.choices(string.ascii_letters + string.digits, k=9)) + "0"
    temp = here.parent / f".{here.name}.{letters}"
    resumed = partial.exists()
    done = partial.stat().st_size if resumed else 0
    temp.write_bytes(partial.read_bytes() if resumed else b"")

    def leave(number, frame):
        partial.parent.mkdir(exist_ok=True)
        temp.rename(partial)
        raise SystemExit(20)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, leave)
    rate = int(os.environ["RATE"])
    with open(path, "rb") as reader, open(temp, "ab") as writer:
        reader.seek(done)
        while block := reader.read(rate // 20):
            writer.write(block)
            writer.flush()
            with open(os.environ["SENT"], "a") as sent:
                print(len(block), file=sent)
            time.sleep(1 / 20)
    if resumed:
        partial.unlink()
        temp.chmod(0o600)
    else:
        temp.chmod(0o644)
    os.utime(temp, (path.stat().st_atime, path.stat().st_mtime))
    temp.rename(here)
    print(here.name)


for path in sorted(source.glob("*")):
    here = target / path.name
    if path.is_file() and path.stat().st_size > BIG and not here.exists():
        fly(path, here)
