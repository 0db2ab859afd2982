"""Stands in for rsync as openrsync would behave on a Mac, where rsync itself behaves otherwise.

A file of more than 1 MB travels at 2 MB a second into .NAME.XXXXXXXXXX. SIGTERM, SIGINT and SIGHUP
move that to the partial directory, SIGALRM and SIGKILL leave it; the next run goes on from the
partial. All else is done by the real rsync. Only for local copies. Appends to SENT what it sent.
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

BIG, BLOCK = 1 << 20, 100_000
arguments = sys.argv[1:]
source, target = Path(arguments[-2]), Path(arguments[-1])
code = subprocess.run(["/usr/bin/rsync", f"--max-size={BIG}", *arguments]).returncode
if code or "--prune-empty-dirs" in arguments:   # the pass for small files
    raise SystemExit(code)

for path in source.glob("*"):
    here = target / path.name
    size = path.stat().st_size
    if size <= BIG or here.exists() and here.stat().st_size == size:
        continue
    partial, temp = target / ".rsync-partial" / path.name, target / f".{path.name}.abcdefghij"
    if partial.exists():
        partial.rename(temp)

    def leave(number, frame):
        partial.parent.mkdir(exist_ok=True)
        temp.rename(partial)
        raise SystemExit(20)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, leave)
    with open(path, "rb") as reader, open(temp, "ab", 0) as writer:
        reader.seek(writer.tell())
        while block := reader.read(BLOCK):
            writer.write(block)
            with open(os.environ["SENT"], "a") as sent:
                print(len(block), file=sent)
            time.sleep(0.05)
    temp.rename(here)
    print(path.name)
