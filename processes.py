"""The processes of one training, where torchrun has started several; a single one needs none of it.

    torchrun --standalone --nproc_per_node=2 train_magvit.py

Process 0 leads: it alone has a Run, so it alone saves, says and decides. All others compute their
share of every batch and follow. What they exchange goes over gloo from the host's memory, over
NCCL from a GPU's.
"""
import contextlib
import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta

from checkpointing import FAILED, WRONG_SETTINGS, CheckpointError

PATIENCE = timedelta(minutes=30)    # for another process, which may be compiling or saving


class Processes:
    """This process among the others; torchrun says in the environment which one it is."""

    def __init__(self):
        self.number = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.leads, self.alone = self.number == 0, self.count == 1
        self.started_by = None if self.alone else (     # the same at every restart by one torchrun
            f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}")
        self.asked = 0      # the signal that asked this follower to stop

    def join(self, device):
        """Meet the others; on GPUs, take one's own."""
        if self.alone:
            return
        global torch, distributed
        import torch
        from torch import distributed
        if device.type == "cuda":
            mine, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if mine >= there:
                raise CheckpointError(f"{there} GPUs are here, and a process for each is all that "
                                      f"helps: torchrun --nproc_per_node={there}", WRONG_SETTINGS)
            torch.cuda.set_device(mine)
        with reached():
            store = next(distributed.rendezvous("env://", timeout=PATIENCE))[0]
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE,
                store=distributed.PrefixStore(self._start(store), store),
                rank=self.number, world_size=self.count)
        if not self.leads:   # all leave together, at a step that all agree on
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, self._ask)

    def _start(self, store):
        """A name for this start, the same in all processes, that no earlier start has had.

        torchrun keeps one store over all restarts, and the addresses of the dead in it: whoever
        reads them waits for ever (seen with torch 2.13, in three of four groups killed four times;
        the count of restarts does not help, since on several machines it differs). So the leader
        names the start, beside what it has read of the others; a follower believes it once it finds
        there what it has just written itself. All of an earlier start are dead by then.
        """
        name, mine = os.urandom(8).hex(), os.urandom(8).hex()
        others = [number for number in range(self.count) if number]
        if not self.leads:
            store.set(f"here {self.number}", mine)
        while True:
            if self.leads:
                seen = [store.get(f"here {number}").decode() for number in others]
                store.set("start", json.dumps([name, seen]))
                if all(store.check([f"{name} {number}"]) for number in others):
                    return name
            else:
                name, seen = json.loads(store.get("start"))
                if mine in seen:
                    store.set(f"{name} {self.number}", "")
                    return name
            time.sleep(0.02)

    def _ask(self, number, frame):
        self.asked = number

    def leave(self):
        if not self.alone and distributed.is_initialized():
            distributed.destroy_process_group()

    # -- what all of them know

    def given(self, value):
        """The leader's `value`, in every process."""
        if self.alone:
            return value
        box = [value]
        with reached():
            distributed.broadcast_object_list(box, src=0)
        return box[0]

    @contextlib.contextmanager
    def together(self):
        """A block that succeeds in all processes or ends all; the leader says why, once.

        Inside it a process must not wait for another.
        """
        error, outcomes = None, [None] * self.count
        try:
            yield
        except Exception as caught:
            error = caught
        if self.alone:
            if error:
                raise error
            return
        mine = error and (str(error) if isinstance(error, CheckpointError)
                          else f"{type(error).__name__}: {error}",
                          getattr(error, "exit_code", FAILED))
        with reached():
            distributed.all_gather_object(outcomes, (socket.gethostname(), mine))
        if error and self.leads:
            raise error
        for number, (host, failed) in enumerate(outcomes):
            if failed:
                raise CheckpointError(f"process {number} on {host}: {failed[0]}", failed[1])

    def stop(self, number):
        """The signal that asks any of them to stop, or None; `number` is this one's own."""
        if self.alone:
            return number
        asked = torch.tensor(number or self.asked or 0)
        with reached():
            distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        return int(asked) or None

    # -- what they compute together

    def share(self, count):
        """(first, last + 1) of this process's part of `count` things in a row."""
        return self.number * count // self.count, (self.number + 1) * count // self.count

    def total(self, tensor):
        """The sum over all processes, in place."""
        with reached():
            distributed.all_reduce(tensor)
        return tensor

    def average(self, tensors):
        """Each becomes its mean over all processes, in one exchange."""
        flat = self.total(torch.cat([tensor.flatten() for tensor in tensors])) / self.count
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


@contextlib.contextmanager
def reached():
    """Say it in words when another process cannot be reached any more."""
    try:
        yield
    except RuntimeError as error:   # gloo's errors are nothing more special
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"another process of this training is gone ({reason}). What was saved"
                              " is safe: torchrun --max-restarts=3 starts all of them again by "
                              "itself, and so does the same command") from None


class Follower:
    """In place of a Run, in the processes that do not lead: nothing is said or saved there."""

    total = done = 0
    begun = False
    stopping = None
    heard = False       # the leader is there to say what goes wrong

    def ignore(self, *arguments, **fields):
        pass

    begin = update = expect = log = due = ignore

    def leave_if_asked(self):
        if self.stopping:
            raise SystemExit(128 + self.stopping)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is CheckpointError:
            if not self.heard and os.environ.get("LOCAL_RANK") == "0":
                print(f"on {socket.gethostname()}: error: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None   # else the leader says it
