"""What training costs, measured in one run: python benchmarks/bench_train.py [--device cuda --preset small]

Generates 10,000 videos, trains a sixteenth of the default length with the default checkpoints, stops in the middle of the second
phase, and goes on in a new process. Takes two minutes on two cores. Run it on an idle machine.
"""
import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import train_magvit  # noqa: E402
from bench_generate import line, quiet  # noqa: E402

EPOCHS = 13    # of the default 213
WARM_UP = 20   # first steps of a phase that do not count: compilation, caches
RESTART = """
import sys, time
began = time.time()
sys.path.insert(0, {root!r})
import train_magvit
step = train_magvit.Trainer.step
def first(self, at):
    float(step(self, at))
    print("FIRST STEP", time.time() - began, flush=True)
    raise SystemExit
train_magvit.Trainer.step = first
sys.argv = ["train_magvit.py", *{arguments!r}]
train_magvit.main()
"""


class Enough(Exception):
    pass


class Watched(train_magvit.Trainer):
    """Notes when each step begins and what saving and validating take."""
    starts, pauses, saves = {}, 0.0, []

    def step(self, step):
        at = self.starts.setdefault(self.phase.name, [])
        if len(at) in (WARM_UP, self.phase.steps - 1) and self.device.type == "cuda":
            torch.cuda.synchronize()
        at.append((time.perf_counter(), Watched.pauses))
        if self.phase.name == "transformer" and len(at) == self.phase.steps - self.epoch_steps // 2:
            self.save()   # in mid-epoch
            raise Enough
        return super().step(step)

    def timed(self, function):
        began = time.perf_counter()
        result = function()
        Watched.pauses += time.perf_counter() - began
        return result, time.perf_counter() - began

    def save(self):
        durable = self.run.durable
        _, seconds = self.timed(super().save)
        if self.run.durable != durable:
            self.saves.append((self.phase.name, seconds))

    def validation_loss(self):
        return self.timed(super().validation_loss)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--n", type=int, default=10000)
    asked = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {torch.get_num_threads()} threads, {asked.device}, "
          f"preset {asked.preset}, {asked.n} videos")
    with tempfile.TemporaryDirectory(dir=ROOT) as place:
        for script, *arguments in (("generate.py", "--n", asked.n, "--out", f"{place}/run"),
                                   ("merge.py", f"{place}/run", "--out", f"{place}/dataset.npz")):
            subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
        settings = train_magvit.Settings(data=f"{place}/dataset.npz", out=f"{place}/training", preset=asked.preset,
                                         device=asked.device, epochs=EPOCHS)
        train_magvit.Trainer = Watched
        with quiet():
            try:
                train_magvit.train(settings, torch.device(asked.device))
            except Enough:
                pass
        batch = train_magvit.PRESETS[asked.preset].batch
        for phase, times in Watched.starts.items():
            (began, before), (ended, after) = times[WARM_UP], times[-1]
            seconds = ended - began - (after - before)
            line(f"{phase}: training videos/s", f"{(len(times) - 1 - WARM_UP) * batch / seconds:.0f}", "-")
        times = Watched.starts["transformer"]
        spent = sum(seconds for phase, seconds in Watched.saves[:-1] if phase == "transformer")   # the last is not the cadence's
        line("share of the second phase's time spent in checkpoints", f"{spent / (times[-1][0] - times[0][0]):.2%}", "1 %")
        line("one checkpoint", f"{spent / max(1, len([1 for p, _ in Watched.saves[:-1] if p == 'transformer'])):.2f} s", "-")
        arguments = ["--data", settings.data, "--out", settings.out, "--preset", asked.preset, "--device", asked.device,
                     "--epochs", str(EPOCHS)]
        done = subprocess.run([sys.executable, "-c", RESTART.format(root=str(ROOT), arguments=arguments)], check=True,
                              capture_output=True, text=True)
        seconds = float(done.stdout.partition("FIRST STEP")[2].split()[0])
        line("from start to the end of the first step, after a restart", f"{seconds:.1f} s", "-")


if __name__ == "__main__":
    main()
