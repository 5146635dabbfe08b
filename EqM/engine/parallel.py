"""A network on several ranks."""

from torch.nn.parallel import DistributedDataParallel


def data_parallel(model, ranks):
    """The model with gradients averaged over ranks; the model itself where there is one rank."""
    if ranks is None or ranks.world_size == 1:
        return model
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    # Its one buffer, of frequencies, is the same on all ranks from the start.
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False)
