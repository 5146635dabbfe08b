"""Checkpoints in parts: a folder to which every rank writes what it holds, so that no rank ever holds all of it.

It is named as a checkpoint file is, `0000100.pt`, and holds `run.pt`, an ordinary checkpoint in which tensors that are
split over the ranks are `meta` ones, shapes without values, and beside it these tensors as torch.distributed.checkpoint
writes them, named by their place in `run.pt`. It has its name once it is complete.
"""

import io
import os
import pickle
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from EqM.run import saving
from EqM.run.errors import UserError, reason
from EqM.run.shards import empty_part, is_shard, map_tensors

HEAD = "run.pt"
# What the description of a folder's tensors is made of; a pickle that names anything else would run it.
DESCRIBES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "StorageMeta", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32"),
    "pathlib": ("Path", "PosixPath", "WindowsPath"),
}  # fmt: skip


def is_in_parts(path):
    return os.path.isfile(os.path.join(path, HEAD))  # False too where one may not look


def save(path, state, is_main, group):
    """Write a checkpoint of which every rank holds its part, so that a kill leaves either none or the whole new one.

    Every rank must call it at the same moment. group: of processes, used by nothing else meanwhile. Raises UserError on
    all ranks where one of them cannot write.
    """
    import torch.distributed.checkpoint as dcp  # takes a while to import

    path = Path(path)
    partial = path.with_suffix(".partial")
    tensors = {}
    head = map_tensors(state, lambda place, tensor: _set_aside(tensors, place, tensor))
    try:
        if is_main:
            saving.remove(partial)  # before its first word to the others, who write after it
        dcp.save(tensors, storage_writer=_writer(partial), process_group=group)
        if is_main:
            saving.save(partial / HEAD, head)
            saving.put(partial, path)
    except (dcp.CheckpointException, OSError) as error:
        if is_main:
            with suppress(OSError):
                saving.remove(partial)
        told = _told(error)
        raise UserError(f"checkpoint {path} cannot be written ({told}); earlier ones are untouched") from None


def _set_aside(tensors, place, tensor):
    if not is_shard(tensor):
        return tensor
    tensors[place] = tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Stream(io.BufferedWriter):
    """A file that keeps what went wrong, of which PyTorch's zip writer tells only where in its code it was."""

    error = None

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def _writer(path):
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Files(FileSystem):
        @contextmanager
        def create_stream(self, path, mode):
            with _Stream(io.FileIO(path, mode)) as stream:
                try:
                    yield stream
                except RuntimeError as error:
                    raise (stream.error or error) from None

    writer = FileSystemWriter(path)
    writer.fs = Files()
    return writer


def _told(error):
    """The cause of a failure on any rank, in a line."""
    failures = list(getattr(error, "failures", {}).values())
    cause = failures[0][0] if failures else error
    return getattr(cause, "strerror", None) or reason(cause)


def fill(head, path, like=None):
    """The content of a checkpoint in parts with its tensors' values. head: what its `run.pt` holds.

    like: a tensor of which every rank holds a part; then this rank reads its parts alone. Raises UserError.
    """
    import torch.distributed.checkpoint as dcp

    tensors = {}

    def blank(place, tensor):
        if tensor.device.type != "meta":
            return tensor
        tensors[place] = empty_part(tensor, like)
        return tensors[place]

    content = map_tensors(head, blank)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # by no_dist: each rank reads for itself
            dcp.load(tensors, storage_reader=_reader(path), no_dist=True)
    except (dcp.CheckpointException, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"--ckpt {path} is cut short or damaged: {_told(error)}") from None
    return content


def _reader(path):
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        """PyTorch's, which would run what a description's pickle names."""

        def read_metadata(self, *args, **more):
            with open(Path(path) / ".metadata", "rb") as file:
                metadata = _Description(file).load()
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(path)


class _Description(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in DESCRIBES.get(module, ()):
            raise pickle.UnpicklingError(f"loading it would run {module}.{name}")
        return super().find_class(module, name)
