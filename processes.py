"""The processes of one training, where torchrun has started several; a single one needs none of it.

    torchrun --standalone --nproc_per_node=2 train_magvit.py

Process 0 leads: it alone has a Run, so it alone saves, says and decides. The others compute their
share of each batch and follow. They talk over gloo, about what is on a GPU over NCCL.
"""
import contextlib
import json
import os
import signal
import time
from datetime import timedelta

import torch
from torch import distributed

from checkpointing import ALL_SIGNALS, WRONG_SETTINGS, CheckpointError, one_line_errors

TORCHRUN = "TORCHELASTIC_RUN_ID"    # torchrun sets it for what it starts
PATIENCE = timedelta(minutes=30)    # for another process, which may be compiling or saving
ASK_EVERY = 16      # steps on a GPU, where asking the others waits for the device


class Processes:
    """This process among the others; torchrun says in the environment which one it is."""

    def __init__(self):
        self.number, self.count = (int(os.environ[name]) if TORCHRUN in os.environ else alone
                                   for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.leads, self.alone = self.number == 0, self.count == 1

    def join(self, device):
        """Meet the others; on GPUs, take one's own."""
        self.device = device
        if TORCHRUN not in os.environ and {"RANK", "WORLD_SIZE"} & os.environ.keys():
            raise CheckpointError("the environment has a RANK or WORLD_SIZE, but torchrun did not "
                                  "start this. Type: unset RANK WORLD_SIZE", WRONG_SETTINGS)
        if self.alone:
            return
        if device.type == "cuda":
            if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
                raise CheckpointError("more processes than GPUs; use --nproc_per_node=gpu",
                                      WRONG_SETTINGS)
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        with reached():
            store = next(distributed.rendezvous("env://", timeout=PATIENCE))[0]
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE,
                store=distributed.PrefixStore(self._start(store), store),
                rank=self.number, world_size=self.count)

    def _start(self, store):
        """A name for this start, the same in all processes, that no earlier start has had.

        torchrun keeps one store over all restarts, and the addresses of the dead in it: whoever
        reads them waits for ever (seen with torch 2.13; on several machines the counts of restarts
        differ). So the leader names the start, beside what it has read of the others; a follower
        believes it once it finds there what it has just written itself."""
        name, mine, others = os.urandom(8).hex(), os.urandom(8).hex(), range(1, self.count)
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

    @contextlib.contextmanager
    def one_voice(self):
        """What goes wrong is one line on each machine: torchrun ends all processes once one has
        gone, so the first one here says it at once, the others only where it did not."""
        try:
            with one_line_errors():
                try:
                    yield
                except BaseException:
                    if os.environ.get("LOCAL_RANK", "0") != "0":
                        signal.signal(signal.SIGTERM, signal.SIG_DFL)
                        time.sleep(10)
                    raise
        finally:
            if not self.alone and distributed.is_initialized():
                distributed.destroy_process_group()
        if not self.leads:
            os._exit(0)     # Python's end behind a group aborts now and then (torch 2.13)

    def given(self, value):
        """The leader's `value`, in every process."""
        box = [value]
        if not self.alone:
            with reached():
                distributed.broadcast_object_list(box, src=0)
        return box[0]

    def check_same(self, value, what):
        """CheckpointError in all of them if `value` is not the same in all."""
        values = [value] * self.count
        if not self.alone:
            with reached():
                distributed.all_gather_object(values, value)
        if values != [value] * self.count:
            raise CheckpointError(f"{what} is not the same for all processes; copy it to all",
                                  WRONG_SETTINGS)

    def asked(self, number, done):
        """The signal at which all leave after step `done`, or None; `number` came to this one."""
        if self.alone:
            return number
        if self.device.type == "cuda" and done % ASK_EVERY:
            return None
        highest = torch.tensor(number or 0)
        with reached():
            distributed.all_reduce(highest, distributed.ReduceOp.MAX)
        if highest and not number:
            signal.raise_signal(int(highest))
        return int(highest) or None

    def share(self, count):
        """(first, last + 1) of this process's part of `count` things in a row."""
        return self.number * count // self.count, (self.number + 1) * count // self.count

    def add(self, tensors):
        """Each becomes its sum over all processes."""
        for tensor in () if self.alone else tensors:
            with reached():
                distributed.all_reduce(tensor)


@contextlib.contextmanager
def reached():
    """Say it in words when another process cannot be reached any more."""
    try:
        yield
    except RuntimeError as error:   # gloo's errors are nothing more special
        raise CheckpointError(f"another process of this training is gone ({str(error)[:120]}). What "
                              "was saved is safe; the same command goes on, torchrun "
                              "--max-restarts=3 by itself") from None


class Follower(contextlib.nullcontext):
    """In place of a Run, in the processes that do not lead: nothing is said or saved there."""

    def __init__(self):
        super().__init__(self)
        self.stopping = None
        for number in ALL_SIGNALS:
            signal.signal(number, lambda number, frame: setattr(self, "stopping", number))

    def __exit__(self, error, *_):
        if error and self.stopping:     # what followed a signal is its end, as in a Run
            self.leave_if_asked()

    def load(self, default, read):
        return default

    def leave_if_asked(self):
        os._exit(128 + self.stopping)   # as above

    def ignore(self, *_, **fields):
        pass

    update = expect = log = due = ignore
