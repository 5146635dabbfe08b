"""Processes and devices: one process or many under torchrun, on GPUs (NCCL) or CPUs (gloo)."""

import ctypes
import hashlib
import itertools
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from EqM.run import stops
from EqM.run.errors import UserError, reason

# Ranks wait for work that one of them does alone: listing a data set, encoding, a slow file system. A rank that dies
# closes its connections, which ends a wait on gloo at once; this limit only meets a machine that froze.
PATIENCE = timedelta(days=1)
# NCCL's waits end by this alone. Its ten minutes are less than rank 0 may take to save a large model to a shared disk.
NCCL_TIMEOUT = timedelta(hours=1)

_waiting = None  # a gloo group of all ranks on which PATIENCE holds, while there are several


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

    device_name: "cuda", "cuda:1", "cpu", ...; None takes the GPU where there is one. Under torchrun each process
    takes the GPU of its local rank. Raises UserError if that device is not there, or the environment names ranks
    without a launcher.
    """
    global _waiting
    rank, world_size = _place()
    if (device_name or "").startswith("cuda:") and _number("LOCAL_WORLD_SIZE", world_size) > 1:
        raise UserError(
            f"--device {device_name} would put every rank on one GPU; give --device cuda, and each takes its own"
        )
    device = device_named(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        _keep_freed_memory()
    if world_size > 1:
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=NCCL_TIMEOUT, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
        _waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(rank, world_size, device)


def _number(name, default):
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment has {name}={text!r}, which is no number; unset it, or start by torchrun")
    return int(text)


def _place():
    """(rank, world size) that the environment gives this process. Raises UserError if they are left over, say."""
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size > 1 and missing:
        raise UserError(
            f"the environment has WORLD_SIZE={world_size} but no {', '.join(missing)}: "
            "unset it to run one process, or start by torchrun"
        )
    if rank >= world_size:
        raise UserError(
            f"the environment has RANK={rank}, which WORLD_SIZE={world_size} has not: "
            "unset RANK to run one process, or start by torchrun"
        )
    return rank, world_size


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
    global _waiting
    _waiting = None
    if dist.is_initialized():
        dist.destroy_process_group()


def new_group(ranks):
    """A group of all ranks on the CPU, for a use of its own; None where there is one rank. Every rank must call it."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if ranks.world_size > 1 else None


def wait_long(group, device):
    """Give a group of part of the ranks, in which training waits, the limit that setup gave the group of all."""
    dist.distributed_c10d._set_pg_timeout(NCCL_TIMEOUT if device.type == "cuda" else PATIENCE, group)


def barrier():
    """Wait for all ranks, for as long as they take."""
    if _waiting is not None:
        dist.all_reduce(torch.zeros(1), group=_waiting)  # on the CPU; dist.barrier would take the GPU's device


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


def to_main(ranks, value):
    """What each rank hands over, in order, on the main rank; None on the others. Every rank must call it."""
    if _waiting is None:
        return [value]
    values = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object(value, values, group=_waiting)
    return values


class SharedSet:
    """A set of whole numbers that any rank adds to at any time. Every rank must make as many, in the same order."""

    _made = itertools.count()

    def __init__(self):
        # There is no public way to the store that the ranks met at.
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
    """What a function returns on the main rank, on every rank; an exception there stops them all.

    share: without it, the other ranks get None.
    """
    result = error = None
    if ranks.is_main:
        try:
            result = function()
        except Exception as raised:
            error = raised
    if _waiting is not None:
        box = [result if share else None, error is not None]
        dist.broadcast_object_list(box, group=_waiting)
        shared, failed = box
        result = shared if share else result
        if failed and not ranks.is_main:
            raise SystemExit(2)  # the main rank says why
    if error is not None:
        raise error
    return result


_PEER_GONE = (
    "reset by peer",
    "closed by peer",
    "remote peer",
    "broken pipe",
    "ncclremoteerror",
    "communicator was aborted",
)


def is_peers(error):
    """Whether an exception of a collective means that another rank is gone."""
    return _is_collectives(error) and any(words in str(error).lower() for words in _PEER_GONE)


def cause(error):
    """Why this rank's own part of a collective failed, in a line; None if the exception is no collective's.

    NCCL says it last, below where it happened; gloo first, behind a path of its own source.
    """
    if not _is_collectives(error):
        return None
    text = str(error).strip().split("Last error:")[-1].strip()
    return reason(text).split("] ", 1)[-1]


def _is_collectives(error):
    """gloo's exceptions are plain RuntimeErrors that name a file of its source."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def fence(device):
    """A function that waits until the device has done what was queued on it so far."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


class StopRequest:
    """A signal of stops.SIGNALS to any rank: all ranks stop after the same step.

    stops.handle says what more of them do.
    """

    def __init__(self, ranks):
        self.asked = False
        self._group = new_group(ranks)
        self._flag = self._pending = None
        stops.handle(self._note)

    def _note(self, number):
        self.asked = True

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


def is_first_to_say(line):
    """Whether no other rank has said this line already, as far as they can still ask each other."""
    if not dist.is_initialized():
        return True
    said = hashlib.blake2b(line.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    try:
        return dist.distributed_c10d._get_default_store().add(f"said/{said}", 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return True


def all_agree(ok):
    """Whether ok holds on every rank. Every rank must call it."""
    if _waiting is None:
        return ok
    answers = [None] * dist.get_world_size(_waiting)
    dist.all_gather_object(answers, ok, group=_waiting)
    return all(answers)
