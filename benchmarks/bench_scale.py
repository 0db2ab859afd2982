"""How it grows: python benchmarks/bench_scale.py [LARGEST]

Prints two tables: data sets of 3,000 to LARGEST videos (default 300,000; 3,000,000 takes some ten
minutes and 3 GB), and states of 1 MB to a second number of bytes (default 256 MB). Times and memory
are of whole processes, start-up included. Nothing may grow faster than the data, memory not at all.
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import checkpointing  # noqa: E402
from bench_generate import python, timed  # noqa: E402

EVERY = 2000


def videos(largest, place):
    print("| videos | checkpoints | generate | again | status | verify | merge | peak memory, generate / "
          "merge | files | bytes |\n|---|---|---|---|---|---|---|---|---|---|")
    n = 3000
    while n <= largest:
        out = place / f"n{n}"
        made, memory = timed(python("generate.py", "--n", n, "--every", EVERY, "--out", out))
        times = [timed(python(*command))[0] for command in (
            ("generate.py", "--n", n, "--every", EVERY, "--out", out),
            ("runs.py", "status", out), ("runs.py", "verify", out))]
        merge, merge_memory = timed(python("merge.py", out, "--out", out / "dataset.npz"))
        files = [path for path in out.iterdir() if path.name != "dataset.npz"]
        cells = [f"{n:,}", len(checkpointing.read_records(out)), f"{made:.1f} s",
                 *(f"{seconds:.2f} s" for seconds in times), f"{merge:.1f} s",
                 f"{memory:.0f} / {merge_memory:.0f} MB", len(files),
                 f"{sum(path.stat().st_size for path in files) / 1e6:.0f} MB"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        for path in out.iterdir():
            path.unlink()
        n *= 10


STATE = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import checkpointing
out, blocks, block = sys.argv[2], int(sys.argv[3]), bytes(range(256)) * 4096
def write(file):
    for _ in range(blocks):
        file.write(block)
def read(file):
    while file.read(1 << 20):
        pass
with checkpointing.Run(out, 3, keep=1) as run:
    run.load(read=read)
    times = []
    for number in (1, 2, 3):
        began = time.perf_counter()
        run.save(number, write=write)
        times.append(time.perf_counter() - began)
with checkpointing.Run(out, 3) as run:
    began = time.perf_counter()
    run.load(read=read)
    times.append(time.perf_counter() - began)
print(*times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def states(largest, place):
    print("\n| state | a save (written, flushed, read back and verified) | plain write and fsync | load |"
          " peak memory |\n|---|---|---|---|---|")
    blocks = 1
    while blocks << 20 <= largest:
        out = place / f"state{blocks}"
        done = subprocess.run([sys.executable, "-c", STATE, ROOT, out, str(blocks)], check=True,
                              capture_output=True, text=True)
        *saves, load, memory = map(float, done.stdout.splitlines()[-1].split())
        began = time.perf_counter()
        with open(place / "plain", "wb") as file:
            for _ in range(blocks):
                file.write(bytes(range(256)) * 4096)
            file.flush()
            os.fsync(file.fileno())
        plain = time.perf_counter() - began
        print(f"| {blocks:,} MB | {statistics.median(saves):.2f} s | {plain:.2f} s | {load:.2f} s | "
              f"{memory:.0f} MB |", flush=True)
        for path in [*out.iterdir(), place / "plain"]:
            path.unlink()
        blocks *= 16


def main():
    largest = int(sys.argv[1]) if sys.argv[1:] else 300_000
    largest_state = int(sys.argv[2]) if sys.argv[2:] else 256 << 20
    with tempfile.TemporaryDirectory(dir=ROOT) as place:
        videos(largest, Path(place))
        states(largest_state, Path(place))


if __name__ == "__main__":
    main()
