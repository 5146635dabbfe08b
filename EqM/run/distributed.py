"""Processes and devices: one process or many under torchrun, on GPUs (NCCL) or CPUs (gloo)."""

import ctypes
import itertools
import os
import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist

from EqM.run.errors import UserError, reason


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def setup(device_name=None):
    """Join the process group torchrun describes, or stand alone. Returns this process's Ranks.

    device_name: "cuda", "cuda:1", "cpu", ...; None takes the GPU where there is one. Under torchrun each
    process takes the GPU of its local rank. Raises UserError if that device is not there.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = device_named(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        _keep_freed_memory()
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(int(os.environ.get("RANK", 0)), world_size, device)


def device_named(name=None):
    """The device of this name, with its index. Left out, or "cuda": the GPU of this process's local rank, if any.

    Raises UserError if it cannot be used.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({reason(error)}); try --device cpu") from None


def _keep_freed_memory():
    """Let glibc use freed blocks again instead of giving them back to the system after every step.

    A step on a CPU frees and takes gigabytes, and each page taken anew is a fault that the system clears first:
    a fifth to a third of a BF16 step of EqM-B/4. Peak memory stays the same. Elsewhere than glibc: nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, most = -1, -3, 2**31 - 1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, most)
        mallopt(M_MMAP_THRESHOLD, most)


def cleanup():
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def mean(tensor):
    """Mean of a tensor over ranks. Every rank must call it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def gather(tensor):
    """The tensors of all ranks, in order, on the CPU. Every rank must call it."""
    if not dist.is_initialized():
        return [tensor.cpu()]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return [part.cpu() for part in parts]


class SharedSet:
    """A set of whole numbers that any rank adds to at any time. Every rank must make as many, in the same order."""

    _made = itertools.count()

    def __init__(self):
        store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()
        self._store = dist.PrefixStore(f"shared_set/{next(self._made)}", store)

    def add(self, number):
        if self._store.add(f"has/{number}", 1) == 1:  # the first rank to say so
            place = self._store.add("count", 1)
            self._store.set(f"at/{place}", str(number))

    def __len__(self):
        return self._store.add("count", 0)

    def since(self, place):
        """The numbers after the first `place` ones, in the order in which they came."""
        return [int(self._store.get(f"at/{n}")) for n in range(place + 1, len(self) + 1)]


def on_main(ranks, function, share=True):
    """What a function returns on the main rank, on every rank; a UserError there stops them all.

    share: without it, the other ranks get None.
    """
    result = error = None
    if ranks.is_main:
        try:
            result = function()
        except UserError as raised:
            error = raised
    if dist.is_initialized():
        box = [result if share else None, error is not None]
        dist.broadcast_object_list(box)
        shared, failed = box
        result = shared if share else result
        if failed and not ranks.is_main:
            raise SystemExit(2)  # the main rank says why
    if error is not None:
        raise error
    return result


def fence(device):
    """A function that waits until the device has done what was queued on it so far."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


class StopRequest:
    """SIGTERM, SIGINT or SIGUSR1 (Slurm's warning) to any rank: all ranks stop after the same step.

    A second signal kills the process at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, ranks):
        self.asked = False
        self._group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        self._flag = self._pending = None
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.asked = True
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def agreed(self):
        """Whether to stop now, the same on all ranks, each of which must ask once a step.

        The ranks' answers travel on the CPU while the next step runs, so this does not wait for the device.
        """
        if self._group is None:
            return self.asked
        stop = False
        if self._pending is not None:
            self._pending.wait()
            stop = bool(self._flag.item())
        self._flag = torch.tensor(int(self.asked))
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop


def all_agree(ok):
    """Whether ok holds on every rank. Every rank must call it."""
    if not dist.is_initialized():
        return ok
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, ok)
    return all(answers)
