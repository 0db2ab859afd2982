"""What training costs, as ratios measured in one run:

    python benchmarks/bench_train.py                                  # two minutes on two cores
    python benchmarks/bench_train.py --device cuda --preset small     # five minutes on one H100

Steps of both phases, as one CUDA graph against as they are, and how much of the time the device
works; a training with checkpoints against one without; a restart; a training with another program
beside it. Run it on an idle machine; the ratios mean more than the seconds.
"""
import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpointing  # noqa: E402
import train_magvit  # noqa: E402
from bench_generate import line  # noqa: E402

WARM_UP, STEPS = 10, 100


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--n", type=int, default=10000)
    asked = parser.parse_args()
    import torch
    chip = torch.cuda.get_device_name() if asked.device == "cuda" else "cpu"
    print(f"{time.strftime('%Y-%m-%d')}, Python {sys.version.split()[0]}, torch "
          f"{torch.__version__}, {chip}, {torch.get_num_threads()} threads, preset {asked.preset}, "
          f"{asked.n} videos")
    with tempfile.TemporaryDirectory(dir=ROOT) as place:
        for script, *more in (("generate.py", "--n", asked.n, "--out", f"{place}/run"),
                              ("merge.py", f"{place}/run", "--out", f"{place}/dataset.npz")):
            subprocess.run([sys.executable, ROOT / script, *map(str, more)], check=True,
                           stdout=subprocess.DEVNULL)
        data = f"{place}/dataset.npz"
        for learner in learners(asked, data):
            steps(learner)
        whole_runs(asked, data, Path(place))


def learners(asked, data):
    import magvit
    import numpy as np
    import torch
    import videos as sets
    from processes import Processes
    device, data = magvit.open_device(asked.device), sets.load(data)
    part, preset = sets.split(data.labels), train_magvit.PRESETS[asked.preset]
    model = magvit.Magvit(magvit.Sizes(**preset.sizes), data.videos.shape[1:], data.classes)
    model.to(device).requires_grad_(False)
    training, validation = (torch.from_numpy(np.flatnonzero(part == k)).to(device)
                            for k in (sets.TRAIN, sets.VALIDATION))
    videos = magvit.DeviceVideos(data.videos, device)
    labels = torch.from_numpy(data.labels).to(device)
    settings = train_magvit.Settings()
    for phase in train_magvit.phases_of(settings, preset, model, len(training)):
        learner = train_magvit.Learner(phase, model, videos, labels, training, validation, 0,
                                       Processes())
        if phase.name == "transformer":
            began = time.perf_counter()
            list(learner.encode())
            line("encoding all videos in all turns", f"{time.perf_counter() - began:.1f} s", "-")
        yield learner


def fed(learner, advance):
    """A whole step of the training, of its first epoch."""
    numbers = itertools.cycle(range(learner.phase.epoch_steps))

    def step():
        learner.feed(next(numbers))
        advance()
    return step


def steps(learner):
    """Videos a second of one phase, and on a GPU what the graph gains and what is left idle."""
    import torch
    name, batch = learner.phase.name, learner.phase.batch
    if learner.device.type != "cuda":
        speed = batch / seconds_of(fed(learner, learner.step))
        line(f"{name}: training videos/s", f"{speed:.0f}", "-")
        return
    began = time.perf_counter()
    replay = fed(learner, train_magvit.captured(learner, lambda line: None))
    line(f"{name}: compile and capture", f"{time.perf_counter() - began:.0f} s", "-")
    graph, plain = seconds_of(replay), seconds_of(fed(learner, learner.step))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            replay()
        torch.cuda.synchronize()
    busy = sum(event.device_time_total for event in profile.key_averages()) / 5e6
    line(f"{name}: training videos/s", f"{batch / graph:.0f}", "140,000")
    line(f"{name}: as a graph, against compiled without one", f"{plain / graph:.1f} times", "-")
    line(f"{name}: device busy of wall", f"{busy / graph:.0%}", "-")


def seconds_of(step):
    """The median of five stretches."""
    import torch
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(WARM_UP):
        step()
    took = []
    for _ in range(5):
        wait()
        began = time.perf_counter()
        for _ in range(STEPS // 5):
            step()
        wait()
        took.append((time.perf_counter() - began) / (STEPS // 5))
    return statistics.median(took)


def whole_runs(asked, data, place):
    epochs = "6" if asked.device == "cpu" else "1000"    # half a minute of the second phase

    def command(out, *more):
        return [sys.executable, ROOT / "train_magvit.py", "--data", data, "--out", place / out,
                "--preset", asked.preset, "--device", asked.device, "--epochs", epochs,
                "--heartbeat", "0.1", *more]

    def until(process, out, reached):
        while process.poll() is None:
            progress = checkpointing.read_progress(place / out / "PROGRESS.txt")
            if progress.get("PID") == str(process.pid) and reached(progress):
                return time.perf_counter(), int(progress["Progress"].split("/")[0])
            time.sleep(0.02)
        raise SystemExit(f"{out}: ended too early")

    def at_work(progress):
        """In the second phase, all encoded and compiled."""
        return (progress.get("Phase") == "transformer"
                and progress.get("Train loss", "not") != "not known yet")

    def worked(out, *more):
        """Seconds that a step took; the evaluation is cut off."""
        with subprocess.Popen(command(out, *more), stdout=subprocess.DEVNULL) as process:
            began, first = until(process, out, at_work)
            ended, last = until(process, out, lambda p: p["Status"] == "COMPLETE")
            process.kill()
        return (ended - began) / (last - first)

    off, on = worked("off", "--every", "1000000"), worked("on", "--max-minutes", "0.05")
    line("second phase with a checkpoint every 3 s, against none", f"{on / off:.2f} times", "-")
    cut = command("cut", "--max-minutes", "0.02")
    with subprocess.Popen(cut, stdout=subprocess.DEVNULL) as process:
        until(process, "cut", at_work)
        process.kill()
    began = time.perf_counter()
    with subprocess.Popen(command("cut"), stderr=subprocess.PIPE, text=True) as process:
        next(said for said in process.stderr if said.startswith("preset"))   # after two seconds
        line("from a restart to its first estimate", f"{time.perf_counter() - began:.1f} s", "-")
        beside = made(place, "beside", asked)
        process.kill()
    line("apply_magvit.py generate --n 16 beside a training, against alone",
         f"{beside / made(place, 'alone', asked):.1f} times", "3 on two cores")


def made(place, name, asked):
    began = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "apply_magvit.py", "generate", "--class", "helical",
                    "--device", asked.device, "--model", place / "on" / "best_model.pt", "--out",
                    place / f"{name}.npz"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
