"""Tensors of which every rank holds a part (DTensors), and trees of tensors."""

import copy

import torch


def is_shard(tensor):
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """The whole of a tensor of which every rank may hold a part. Every rank must call it."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def mine(tensor):
    """This rank's part of a tensor, on the CPU if it is one of several; the tensor where it is whole."""
    return tensor.to_local().cpu() if is_shard(tensor) else tensor


def part_of(value, like):
    """This rank's part of a value that it has whole, split over the ranks as `like` is, if that is split."""
    if not is_shard(like) or is_shard(value):
        return value
    from torch.distributed.tensor import DTensor  # takes a while to import
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = like.device_mesh, like.placements
    sides, starts = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    local = value[tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))]
    local = local.to(like.device, copy=True)  # distribute_tensor would move, and keep in memory, all of it
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())


def empty_part(tensor, like):
    """Memory for this rank's part of a tensor of this shape, split as `like` is; for all of it if that is whole."""
    if not is_shard(like):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    from torch.distributed.tensor import empty

    return empty(tensor.shape, dtype=tensor.dtype, device_mesh=like.device_mesh, placements=like.placements)


def map_tensors(value, function, place=""):
    """A tree of dicts and lists with function(place, tensor) for each tensor; kinds and order stay as they are."""
    if isinstance(value, torch.Tensor):
        return function(place, value)
    if isinstance(value, dict):
        mapped = copy.copy(value)  # with the attribute in which a state dict keeps its version
        mapped.update({key: map_tensors(each, function, f"{place}/{key}") for key, each in value.items()})
        return mapped
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(each, function, f"{place}/{i}") for i, each in enumerate(value))
    return value
