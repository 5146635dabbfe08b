"""A network on several ranks: whole on each of them, or in parts."""

import inspect
import warnings

from torch.nn.parallel import DistributedDataParallel

from EqM.run import distributed
from EqM.run.errors import UserError

NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters  # PyTorch 2.14


def add_flags(parser):
    """--shard and --shard-size, on an argparse parser."""
    parser.add_argument(
        "--shard", action="store_true", help="split weights, gradients, moments and EMA over the ranks (FSDP2)"
    )
    parser.add_argument(
        "--shard-size", type=int, metavar="N", help="ranks that share one copy, such as a node's; left out: all"
    )
    parser.add_argument(
        "--split-checkpoints", action="store_true", help="with --shard: folders, to which each rank writes its part"
    )


def check_flags(args, ranks, tell):
    """Raise UserError unless the ranks can be split as the flags say, and the rest of a run goes with it.

    tell: called with a line if there is one rank, which is as without these flags.
    """
    if args.shard and ranks.world_size == 1:
        tell("--shard has no effect: there is one rank")
        args.shard, args.shard_size, args.split_checkpoints = False, None, False
    if args.split_checkpoints and not args.shard:
        raise UserError("--split-checkpoints has each rank write its part of a network that --shard splits; give both")
    if args.shard_size is not None and not args.shard:
        raise UserError(f"--shard-size {args.shard_size} says how --shard splits a network; give --shard too")
    if not args.shard:
        return
    if args.shard_size is not None and (args.shard_size < 2 or ranks.world_size % args.shard_size):
        raise UserError(
            f"--shard-size {args.shard_size} must be at least 2 and divide the number of ranks, {ranks.world_size}"
        )
    if args.optimizer == "muon":
        raise UserError("--optimizer muon wants whole matrices, which --shard splits; drop one")
    if args.split_checkpoints and args.ema_std:
        raise UserError("--ema-std keeps snapshots as whole files, and --split-checkpoints writes none; drop one")
    if args.eval_every:
        raise UserError(
            "--eval-every samples on each rank alone, which --shard does not allow; run evaluate.py instead"
        )
    if args.ebm != "none":
        raise UserError("--shard cannot split an energy model, whose field is differentiated twice; drop one")


def splits(args, ranks):
    """Whether a network is to be sharded: --shard, and there are several ranks."""
    return ranks is not None and ranks.world_size > 1 and args.shard


def data_parallel(model, ranks):
    """The model with gradients averaged over ranks; the model itself where there is one rank."""
    if ranks is None or ranks.world_size == 1:
        return model
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    # Its one buffer, of frequencies, is the same on all ranks from the start.
    unsynced = {("forward_sync_buffers" if NEW_NAME else "broadcast_buffers"): False}
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **unsynced)


def shard(networks, ranks, size=None):
    """Split networks over the ranks, in place, from the CPU or their device. Their parameters are then other objects.

    networks: the one that is trained, then its averages.

    size: how many ranks share one copy; None for all. A block is made whole while it runs, its conditioning apart,
    since that is called before all blocks; what is no block's stays whole from the forward to the backward pass.
    Parameters stay FP32, and gradients are averaged in FP32 after each backward pass: nothing is kept whole between
    micro-batches.
    """
    from torch.distributed.device_mesh import init_device_mesh  # these take a while to import
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing changes a field in place
    shape = (ranks.world_size,) if size in (None, ranks.world_size) else (ranks.world_size // size, size)
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
    for group in mesh.get_all_groups():
        distributed.wait_long(group, ranks.device)
    for i, network in enumerate(networks):
        for block in network.blocks:
            fully_shard(block.adaLN_modulation, mesh=mesh)
            fully_shard(block, mesh=mesh)
        # The first is trained. Of averages no backward pass follows, and what stays whole would not see them move.
        fully_shard(network, mesh=mesh, reshard_after_forward=None if i == 0 else True)
