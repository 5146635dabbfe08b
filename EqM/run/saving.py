"""Saving beside a run: a copy of its state in host memory, and one thread that writes it."""

import copy
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch


class HostCopy:
    """Copies of a state in host memory, where each takes the place of the one before.

    From a GPU they travel to pinned memory while the host goes on: they are there once work queued on the device so far
    is done, and what is queued later cannot change them.
    """

    def __init__(self):
        self._buffers = {}  # by place in the state

    def take(self, value, place=()):
        """A dict, list, tuple, tensor or plain value with tensors copied; kinds, strides and order stay as they are."""
        if isinstance(value, torch.Tensor):
            return self._copied(value.detach(), place)
        if isinstance(value, dict):
            taken = copy.copy(value)  # with the attribute in which a state dict keeps its version
            taken.update({key: self.take(each, (*place, key)) for key, each in value.items()})
            return taken
        if isinstance(value, (list, tuple)):
            return type(value)(self.take(each, (*place, i)) for i, each in enumerate(value))
        return value

    def _copied(self, tensor, place):
        kept = self._buffers.get(place)
        fits = kept is not None and (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype)
        if not fits or kept.stride() != tensor.stride():
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[place] = kept
        return kept.copy_(tensor, non_blocking=True)


class Background:
    """One piece of work at a time in a thread of its own, finished however the process ends, but by a kill.

    What it raised is raised by the next call of any method.
    """

    def __init__(self):
        pool = ThreadPoolExecutor(1)
        weakref.finalize(self, pool.shutdown)
        self._submit = pool.submit
        self._running = None

    def start(self, work, *arguments):
        """Have work(*arguments) done, once what was started before is done. The work must not refer to this object."""
        self.wait()
        self._running = self._submit(work, *arguments)

    def check(self):
        """Go on at once, unless what was started has failed."""
        if not self.is_busy():
            self.wait()

    def is_busy(self):
        return self._running is not None and not self._running.done()

    def wait(self):
        """Wait for what was started."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
