"""All that is done to a network from outside, in one order.

1. FP32 islands bind forward methods of parts of the network, by name. First, so that what follows wraps them too.
2. Frozen weights are cast: what stays FP32 is known by now, and a compiled graph would keep the dtypes it met.
3. Blocks are compiled. Before checkpointing, since PyTorch does not look into a block that is checkpointed.
4. Blocks are checkpointed, compiled or not; else those that are not compiled become operations that keep little.
5. Data parallel comes last: it hooks the parameters that are trained, and is called in the network's place. Or the
   network is sharded, and its averages with it: blocks, compiled or not, run whole between FSDP2's hooks.

A copy for averages is taken before all of this (see EMA), and modulation once a descent is put on and off again round
each descent (`acceleration.modulated_once`).
"""

from EqM.engine import acceleration, parallel, recompute


def for_training(model, run_in, args, ranks, tell, averages=()):
    """The network as a training step calls it: model itself, patched in place, or its data-parallel wrapper.

    args: compile, recompute, grad_checkpointing, no_fused_kernels, shard, shard_size. tell: called with a line where a
    flag has no effect. averages: copies of the model that are sharded as it is.
    Raises LookupError if the network lacks a part that precision keeps in FP32.
    """
    run_in.keep_islands(model.train())
    recomputing = acceleration.recomputes(args, run_in)
    compiled = args.compile and acceleration.compile_blocks(model, run_in, tell, args.grad_checkpointing, recomputing)
    if args.grad_checkpointing:
        acceleration.checkpoint_blocks(model, run_in)
    elif recomputing and not compiled:
        operations = acceleration.operations(args, model.pos_embed.shape[-1], run_in, tell)
        recompute.recompute_in(model, run_in, operations)
    if parallel.splits(args, ranks):
        parallel.shard([model, *averages], ranks, args.shard_size)
        return model
    return parallel.data_parallel(model, ranks)


def for_averages(model, run_in):
    """The averaged network, which goes on moving, as a descent calls it between steps: islands alone."""
    return run_in.keep_islands(model)


def for_sampling(model, run_in, compiled=False, tell=print):
    """A frozen network as a descent calls it, patched in place; its 16-bit weights are cast.

    Raises LookupError as for_training.
    """
    run_in.keep_islands(model.eval().requires_grad_(False))
    run_in.cast_weights(model)
    if compiled:
        acceleration.compile_blocks(model, run_in, tell)
    return model
