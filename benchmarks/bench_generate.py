"""What durability costs, as ratios measured in one run: python benchmarks/bench_generate.py

Each figure beside its aim. Whole processes, start-up included, alternating, the median of five. Run it on an idle
machine; the ratios mean more than the seconds.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpointing  # noqa: E402

ONE_CORE = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
PLAIN = """
import sys, os, numpy as np
videos = np.empty((30000, 8, 1, 32, 32), np.uint8); labels = np.zeros(30000, np.int64)
a = np.zeros((30000, 8, 3), np.float32); b = np.zeros((30000, 8, 2), np.float32)
videos[:] = 7
for name, array in (("videos", videos), ("labels", labels), ("trajectory_3d", a), ("trajectory_2d", b)):
    with open(os.path.join(sys.argv[1], name + ".npy"), "wb") as file:
        np.save(file, array); file.flush(); os.fsync(file.fileno())
"""


def timed(arguments):
    """Seconds and peak memory (MB) of a process."""
    began = time.perf_counter()
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True,
                          env=ONE_CORE)
    seconds = time.perf_counter() - began
    return seconds, int(done.stdout) / (1024 if sys.platform != "darwin" else 1 << 20)


def python(script, *arguments):
    return [sys.executable, ROOT / script, *arguments]


def line(name, value, aim):
    print(f"{name:<66} {value:>14}   aim: {aim}", flush=True)


def main():
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {sys.platform}")
    with tempfile.TemporaryDirectory(dir=ROOT) as place:
        place = Path(place)
        wrapper = timed([sys.executable, "-c", ""])[0]
        ours, plain = [], []
        for i in range(5):
            ours.append(timed(python("generate.py", "--n", 30000, "--out", place / f"g{i}"))[0])
            (place / f"p{i}").mkdir()
            plain.append(timed([sys.executable, "-c", PLAIN, place / f"p{i}"])[0])
        ours, plain = statistics.median(ours) - wrapper / 2, statistics.median(plain) - wrapper / 2
        line("generate, 30,000 videos, durable / np.save + fsync, same bytes", f"{ours / plain:.2f} x", "<= 1.5 x")
        line("generate, videos a second, start-up included, one core", f"{30000 / ours:,.0f}", ">= 20,000")

        peaks = {}
        for n in (4000, 30000):
            peaks[n] = timed(python("generate.py", "--n", n, "--out", place / f"m{n}"))[1]
            peaks["merge", n] = timed(python("merge.py", place / f"m{n}", "--out", place / f"m{n}.npz"))[1]
        for name, small, large in (("generate", peaks[4000], peaks[30000]),
                                   ("merge", peaks["merge", 4000], peaks["merge", 30000])):
            line(f"{name}, peak memory at n = 30,000 / at n = 4,000 ({large:.0f} MB / {small:.0f} MB)",
                 f"{large / small:.2f} x", "0.9 to 1.1 x, under 250 MB")

        again = statistics.median(timed(python("generate.py", "--n", 30000, "--out", place / "g0"))[0] for _ in range(5))
        line("restart of a complete 30,000 run / making it", f"{(again - wrapper / 2) / ours:.2f} x", "under 1 second")
        line("  in seconds", f"{again - wrapper / 2:.2f} s", "< 1 s")

        n = 200_000
        whole = [spent(place / f"w{i}", n, "1/1") for i in range(3)]
        halves = [spent(place / f"h{i}", n, "1/2", "2/2") for i in range(3)]
        line(f"two shards at once / one process, speed, {n:,} videos", f"{min(whole) / min(halves):.2f} x", ">= 1.8 x")

        with checkpointing.Run(place / "u", 10**6, heartbeat=0.05, quiet=True) as run:
            costs = []
            for _ in range(5):
                began = time.perf_counter()
                for i in range(200_000):
                    run.update(i)
                costs.append((time.perf_counter() - began) / 200_000 * 1e6)
            run.save(10**6)
        line("one update()", f"{statistics.median(costs):.2f} us", "<= 2 us")

        on_off = []
        for i in range(9):
            pair = compute(None), compute(place / f"c{i}")
            on_off.append(pair[1] / pair[0])
        line("a job that computes, CPU time with checkpointing on / off", f"{statistics.median(on_off):.4f} x", "< 1.01 x")


def spent(out, n, *shards):
    """Seconds until all these shards of n videos, started at once, have ended."""
    began = time.perf_counter()
    jobs = [subprocess.Popen([*map(str, python("generate.py", "--n", n, "--every", 20_000, "--shard", shard, "--out", out))],
                             stdout=subprocess.DEVNULL) for shard in shards]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    return time.perf_counter() - began


def compute(out):
    """CPU seconds of a job with 1,500 steps of about a millisecond, and with `out` a checkpoint every 500 of them."""
    state = list(range(1000))

    def step():
        return sum(i * i for i in range(15_000))

    began = time.process_time()
    if out is None:
        for _ in range(1500):
            step()
    else:
        with checkpointing.Run(out, 1500, every=500, suffix=".json", quiet=True) as run:
            for _ in run.steps(write=lambda file: file.write(json.dumps(state).encode())):
                step()
    return time.process_time() - began


if __name__ == "__main__":
    main()
