"""How training scales over the devices of one machine, by ratios measured in one run:

    python benchmarks/bench_several.py                                    # two CPU processes
    python benchmarks/bench_several.py --device cuda --preset small       # two GPUs

Steps of both phases on one device, then on several at the same batch a device, each with and
without the exchange between them. Efficiency is the speed a device, over that of one alone.
"""
import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import generate  # noqa: E402
import train_magvit  # noqa: E402
from bench_train import fed, seconds_of  # noqa: E402
from processes import Processes  # noqa: E402

VIDEOS = 10_000


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--devices", type=int, default=2)
    asked = parser.parse_args()
    if "RANK" in os.environ:
        return measure(asked)
    found = [measured(asked, count) for count in (1, asked.devices)]
    for phase, one in found[0].items():
        several = found[1][phase]
        print(f"{phase}, batch {one['batch']:,} a device: {one['speed']:,.0f} videos/s on one, "
              f"{several['speed']:,.0f} on {asked.devices}: efficiency "
              f"{several['speed'] / one['speed'] / asked.devices:.0%}; communication is "
              f"{several['exchange']:.0%} of a step")


def measured(asked, count):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={count}", __file__, "--device", asked.device, "--preset",
         asked.preset], check=True, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1])


def measure(asked):
    """In each process: {phase: batch, speed in videos/s of all, share of a step that exchanges}."""
    import magvit
    import torch
    from torch import distributed
    from videos import CLASSES
    processes, device, found = Processes(), magvit.open_device(asked.device), {}
    processes.join(device)
    arrays = generate.empty_arrays(generate.Settings(), VIDEOS)
    generate.render(generate.Settings(), 0, VIDEOS, list(arrays.values()))
    preset = train_magvit.PRESETS[asked.preset]
    torch.manual_seed(0)
    model = magvit.Magvit(magvit.Sizes(**preset.sizes), arrays["videos"].shape[1:],
                          CLASSES)
    model.to(device).requires_grad_(False)
    videos = magvit.DeviceVideos(arrays["videos"], device)
    labels, every = torch.from_numpy(arrays["labels"]), torch.arange(VIDEOS, device=device)
    data = (model, videos, labels.to(device), every, every, 0)
    for phase in train_magvit.phases_of(train_magvit.Settings(), preset, model, VIDEOS):
        each = phase.batch
        phase = dataclasses.replace(phase, batch=each * processes.count,
                                    epoch_steps=VIDEOS // (each * processes.count))
        seconds = [spent(phase, data, group) for group in (processes, Silent())]
        found[phase.name] = {"batch": each, "speed": phase.batch / seconds[0],
                             "exchange": max(0, 1 - seconds[1] / seconds[0])}
    if not processes.alone:
        distributed.destroy_process_group()
    if processes.leads:
        print(json.dumps(found), flush=True)


class Silent(Processes):
    """The same shares, but nothing is exchanged."""

    def add(self, tensors):
        pass


def spent(phase, data, processes):
    learner = train_magvit.Learner(phase, *data, processes)
    if phase.name == "transformer":
        list(learner.encode())
    cuda = learner.device.type == "cuda"
    advance = train_magvit.captured(learner, lambda line: None) if cuda else learner.step
    return seconds_of(fed(learner, advance))


if __name__ == "__main__":
    main()
