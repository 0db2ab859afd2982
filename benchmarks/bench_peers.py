"""checkpointing.py beside what people install for the same purpose; prints the table of docs/peers.md.

    python benchmarks/bench_peers.py

The peers come from PyPI into an environment of their own, in a temp directory. Each is called as
its own documentation says, task-checkpoint also with the SQLite store that it offers.

Three trials: 20,000 items that do nothing (seconds; given up after 120), with a checkpoint each 100
items where there is such a setting; 3,000 items of a millisecond, with one each 10, killed ten
times at random moments (how many were done twice, how many never); the same started twice at once
(how many were done twice). Where strace is there, it also counts the fsyncs of 1,000 items: what is
not synced does not survive a power cut.
"""
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ["task-checkpoint==0.1.5", "safe-state==0.4.0", "loopz==1.0.0",
         "numpy"]   # which loopz imports without asking for it
LIMIT, KILLS, ITEMS, ITEMS_OF_NOTHING = 120, 10, 3000, 20_000

# work(i) is the item, N their number, EVERY the items between checkpoints. As in each quick start.
WAYS = {
    "checkpointing.py, `map`": "import checkpointing\n"
                               "checkpointing.map(work, range(N), 'results', every=EVERY)",
    "checkpointing.py, `steps`": "import checkpointing\n"
                                 "run = checkpointing.Run('results', N, every=EVERY)\n"
                                 "run.load()\n"
                                 "for i in run.steps():\n"
                                 "    work(i)",
    "loopz 1.0.0": "import loopz\n"
                   "loopz.track('job', save_every=EVERY)(work)(range(N))",
    "safe-state 0.4.0": "from safe_state import safe_state\n"
                        "@safe_state(name='job', save_every=EVERY)\n"
                        "def job(items):\n"
                        "    for i in items:\n"
                        "        work(i)\n"
                        "job(list(range(N)))",
    "task-checkpoint 0.1.5": "from task_pool import checkpoint\n"
                             "for i in checkpoint(range(N), 'job'):\n"
                             "    work(i)",
    "task-checkpoint 0.1.5, SQLite": "from task_pool import TaskPool\n"
                                     "import os\n"
                                     "new = not os.path.exists('job.db')\n"
                                     "pool = TaskPool('job.db')\n"
                                     "if new or pool.stats()['total'] < N:\n"
                                     "    for i in range(N):\n"
                                     "        pool.append(i)\n"
                                     "for i in pool:\n"
                                     "    work(i)",
}
NOTHING = "def work(i):\n    pass\n"
A_MILLISECOND = ("import os, time\n"
                 "log = os.open('log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
                 "def work(i):\n"
                 "    os.write(log, b'%d\\n' % i)\n"
                 "    time.sleep(0.001)\n")


def start(python, way, work, number, every, directory, *under):
    numbers = f"N, EVERY = {number}, {every}\n"
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{numbers}{work}{WAYS[way]}\n"
    environment = {**os.environ, "HOME": str(directory)}   # where some of them keep their state
    return subprocess.Popen([*under, python, "-c", code], cwd=directory, env=environment,
                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def seconds_for_nothing(python, way, directory):
    began = time.monotonic()
    process = start(python, way, NOTHING, ITEMS_OF_NOTHING, 100, directory)
    end = end_of(process)
    return end or f"{time.monotonic() - began:.2f} s"


def end_of(process):
    """How it ended, in words; "" if as it should. All are given the same time."""
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"not done after {LIMIT} s"
    return f"exit {code}" if code else ""


def done(directory):
    log = directory / "log"
    counts = collections.Counter(log.read_bytes().split() if log.exists() else [])
    return sum(counts.values()) - len(counts), ITEMS - len(counts)


def killed(python, way, directory):
    moments, kills = random.Random(1), 0
    log = directory / "log"
    for _ in range(10 * KILLS):
        before = log.stat().st_size if log.exists() else 0
        process = start(python, way, A_MILLISECOND, ITEMS, 10, directory)
        while process.poll() is None and (not log.exists() or log.stat().st_size == before):
            time.sleep(0.001)
        if kills >= KILLS:
            break
        time.sleep(moments.uniform(0, 0.25))   # ten of them end well before the work does
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    code = end_of(process)
    twice, never = done(directory)
    return f"{twice} twice, {never} never" + (f" ({code})" if code else "")


def twice_at_once(python, way, directory):
    processes = [start(python, way, A_MILLISECOND, ITEMS, 10, directory) for _ in range(2)]
    ends = sorted(end_of(process) for process in processes)
    twice, never = done(directory)
    how = {("", "exit 75"): "the second is refused",
           ("", ""): "both do all of it" if twice else "they share it"}
    said = how.get(tuple(ends)) or ", ".join(sorted(set(ends)))
    return f"{twice} twice" + (f", {never} never" if never else "") + f" ({said})"


def syncs(python, way, directory):
    if not shutil.which("strace"):
        return "no strace"
    process = start(python, way, NOTHING, 1000, 10, directory, "strace", "-f", "-qq", "-o", "trace",
                    "-e", "trace=fsync,fdatasync")
    process.wait(LIMIT)
    calls = (directory / "trace").read_text().splitlines()
    return f"{len([call for call in calls if 'sync(' in call]):,}"


def main():
    with tempfile.TemporaryDirectory(prefix="peers-") as place:
        place = Path(place)
        venv.create(place / "venv", with_pip=True)
        python = place / "venv" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS], check=True)
        print(f"| library | 20,000 items that do nothing | {ITEMS:,} items, killed {KILLS} times "
              "| started twice at once | fsyncs of 1,000 items |\n|---|---|---|---|---|")
        for way in WAYS:
            cells = []
            trials = (seconds_for_nothing, killed, twice_at_once, syncs)
            for number, trial in enumerate(trials):
                directory = place / f"{list(WAYS).index(way)}_{number}"
                directory.mkdir()
                cells.append(trial(python, way, directory))
            print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
