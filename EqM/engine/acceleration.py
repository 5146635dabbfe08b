"""What makes the network faster or smaller without changing its field, done from outside."""

from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from EqM.engine import elementwise, fused
from EqM.run.errors import reason

FLAGS = ("compile", "recompute", "grad_checkpointing", "no_fused_kernels")


def add_flags(parser):
    """FLAGS, on an argparse parser."""
    add_compile(parser)
    parser.add_argument(
        "--recompute", choices=("elementwise", "nothing"),
        help="what the backward pass computes again instead of keeping it: norms, modulation, GELU and casts, or "
        "nothing; left out: elementwise in 16 bits, nothing in FP32",
    )  # fmt: skip
    parser.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="recompute whole blocks in the backward pass: least memory, slower",
    )
    parser.add_argument(
        "--no-fused-kernels", action="store_true",
        help="on a GPU: norms, modulation and gates of blocks by PyTorch's own operations, not by Triton kernels",
    )  # fmt: skip


def add_compile(parser):
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks; the first step takes long")


def recomputes(args, run_in):
    """Whether element-wise work alone is computed again in the backward pass. args: recompute, grad_checkpointing."""
    wanted = args.recompute == "elementwise" or (args.recompute is None and run_in.name != "fp32")
    return wanted and not args.grad_checkpointing


def operations(args, hidden_size, run_in, tell):
    """What computes the element-wise work of blocks that recompute it: on a GPU our kernels, unless something is wrong.

    args: no_fused_kernels.
    """
    if args.no_fused_kernels:
        return elementwise
    obstacle = fused.obstacle(run_in.device, run_in.dtype, hidden_size)
    if obstacle and run_in.device.type == fused.DEVICE:
        tell(f"PyTorch's operations take the place of fused kernels: {obstacle}")
    return elementwise if obstacle else fused


def compile_blocks(model, run_in, tell, checkpointing=False, recomputing=False):
    """Compile each block in place; state dict and eager copies of the model are not affected.

    All blocks share one compiled graph, so a deep network compiles no longer than a shallow one. recomputing: the
    compiler keeps no element-wise result for the backward pass. Returns whether they are compiled.
    """
    obstacle = _obstacle(model, run_in, checkpointing)
    if obstacle:
        tell(f"--compile has no effect: {obstacle}")
        return False
    # Data parallel would have blocks cut where a bucket of gradients is full, to send it earlier. A block is short.
    torch._dynamo.config.optimize_ddp = False
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=_keeping_products if recomputing else "inductor")
    return True


def _keeping_products(graph, inputs):
    """PyTorch's compiler, told what to keep. Before PyTorch had a place to say so, it keeps what it likes."""
    inductor = torch._dynamo.lookup_backend("inductor")
    if not hasattr(torch._inductor.config, "custom_partitioner_fn"):
        return inductor(graph, inputs)
    from EqM.engine.partition import KeepProducts

    with torch._inductor.config.patch(custom_partitioner_fn=KeepProducts()):
        return inductor(graph, inputs)


def _obstacle(model, run_in, checkpointing):
    if model.ebm != "none":
        return "an energy's field is differentiated twice, which compiled graphs cannot be"
    if checkpointing and _has_modes(run_in):
        return "on a CPU, 16-bit blocks that are recomputed cannot be compiled"
    if run_in.rounded:
        return "on this CPU 16-bit products are rounded by PyTorch's own hooks"
    try:
        torch.compile(torch.nn.functional.silu)(torch.zeros(2, device=run_in.device))
    except Exception as error:  # whatever a missing or broken compiler raises
        return f"this machine cannot compile ({reason(error)})"
    return None


def checkpoint_blocks(model, run_in):
    """Keep only each block's input in training, and run the block again in the backward pass, in its precision.

    Compiled blocks stay compiled: PyTorch would not look into a checkpointed one.
    """
    settings = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
    if _has_modes(run_in):
        settings["context_fn"] = lambda: (nullcontext(), run_in.autocast())
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, **settings)


@contextmanager
def modulated_once(model):
    """Within it, what time and label make of the network is computed at its first call and kept for all others.

    For one descent: its labels stay, and EqM's field does not depend on time. The adaLN weights, a third of the
    network's, are then read once a batch instead of at every step. A model that is conditioned on time is left alone.
    """
    labels = kept = None

    def modulations(t, y):
        nonlocal labels, kept
        if labels is not y:  # at first, and when samples that are done have left the batch
            labels, kept = y, type(model).modulations(model, t, y)
        return kept

    if model.uncond:
        model.modulations = modulations
    try:
        yield
    finally:
        vars(model).pop("modulations", None)


def _has_modes(run_in):
    """Whether autocast comes with modes of our own, which PyTorch's checkpoint does not restore as it does autocast."""
    return run_in.device.type == "cpu" and run_in.name != "fp32"
