"""Saving: a file that survives a kill, a copy of a run's state in host memory, and a thread that writes it."""

import os
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from EqM.run.errors import UserError, is_out_of_memory, reason
from EqM.run.shards import is_shard, map_tensors, whole


def save(path, state):
    """Write a checkpoint so that a kill at any moment leaves either the old file or the whole new one."""
    path = Path(path)
    partial = path.with_suffix(".partial")
    writer = None
    try:
        if partial.is_dir():
            remove(partial)
        with open(partial, "wb") as file:
            writer = _Writer(file)
            torch.save(state, writer)
            file.flush()
            os.fsync(file.fileno())
        put(partial, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        cause = (writer and writer.error) or error
        told = getattr(cause, "strerror", None) or reason(cause)
        raise UserError(f"checkpoint {path} cannot be written ({told}); earlier ones are untouched") from None


def put(partial, path):
    """Give what is written its name. A file takes the place of another at once, a folder by way of a third name."""
    aside = path.with_suffix(".aside")
    if path.is_dir() or (path.exists() and partial.is_dir()):
        os.replace(path, aside)
    os.replace(partial, path)
    if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    remove(aside)


def remove(path):
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Writer:
    """A file for torch.save that keeps what went wrong, of which PyTorch tells only where in its code it was."""

    def __init__(self, file):
        self.file = file
        self.error = None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()


class HostCopy:
    """Copies of a state in host memory, where each takes the place of the one before.

    From a GPU they travel to pinned memory while the host goes on: they are there once work queued on the device so far
    is done, and what is queued later cannot change them.

    here: False on a rank that keeps none, and only gives its parts of tensors that are split over the ranks.
    parts: copy this rank's part of these tensors, instead of the whole; then every rank keeps its own.
    """

    def __init__(self, here=True, parts=False):
        self._here = here
        self._parts = parts
        self._buffers = {}  # by place in the state

    def take(self, state):
        """A tree of dicts and lists with tensors copied, None for what this rank does not keep. All ranks call it."""
        return map_tensors(state, self._copy)

    def _copy(self, place, tensor):
        tensor = tensor.detach()
        if self._parts and is_shard(tensor):
            local = tensor.to_local()
            copied = self._buffer(place, local).copy_(local, non_blocking=True)
            return type(tensor)(copied, tensor._spec, requires_grad=False)  # in public there is none round given memory
        tensor = whole(tensor)
        return self._buffer(place, tensor).copy_(tensor, non_blocking=True) if self._here else None

    def reserve(self, state):
        """Take the memory for such a state, and touch it: a page that is new costs more than what is copied to it.

        Nothing happens where there is none; then take() meets that.
        """
        try:
            map_tensors(state, self._touch)
        except Exception as error:
            self._buffers = {}
            if not is_out_of_memory(error):
                raise

    def _touch(self, place, tensor):
        in_parts = self._parts and is_shard(tensor)
        if in_parts or self._here:
            self._buffer(place, tensor.to_local() if in_parts else tensor).zero_()

    def _buffer(self, place, tensor):
        kept = self._buffers.get(place)
        fits = kept is not None and (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype)
        if not fits or kept.stride() != tensor.stride():
            pinned = tensor.device.type == "cuda"
            kept = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[place] = kept
        return kept


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
