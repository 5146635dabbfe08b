"""What test_fused.py looks at: our kernels by Triton's interpreter, which must be chosen before Triton is imported.

Writes [(what, ours, PyTorch's)] to the file it is given. The interpreter cuts BF16 off instead of rounding it, so that
FP16 stands for 16 bits here.
"""

import copy
import sys
from unittest import mock

import torch

from EqM.engine import elementwise, fused, precision, recompute
from EqM.engine.precision import Precision
from EqM.models import EqM

CPU = torch.device("cpu")
TOKENS = 3  # of a part, instead of 16: each token takes time here
SHAPES = {"parts of 3 and 1": (2, 4, 24), "odd": (3, 1, 7), "wide": (1, 2, 1152)}
NAMES = ("modulated", "of_x", "of_affine", "sum", "of_value", "of_gate")


def tried(operations, x, modulation, dtype):
    """Results of all operations on tokens x (N, L, D), in the order of NAMES; the modulation is one row a sample."""
    shift, factor, gate = modulation.unsqueeze(1).chunk(3, dim=2)
    value, of_result = x.flip(0).to(dtype), x.flip(1)
    of_modulated = x.flip(2).to(dtype)
    given = x.new_full((len(x), 3, x.shape[2]), float("nan"))  # gradients are written into something wider
    modulated, kept = operations.modulated_norm(x, 1e-6, shift, factor, dtype)
    of_x = operations.norm_backward(of_modulated, x, 1e-6, factor, kept, of_result, given[:, :2])
    of_value = operations.gate_backward(of_result, value, gate, given[:, 2])
    return modulated, of_x, given[:, :2], operations.gated_sum(x, gate, value), of_value, given[:, 2]


def operations():
    for shape, size in SHAPES.items():
        N, _, D = size
        x = torch.randn(size) * torch.logspace(-1, 2, N).view(-1, 1, 1) + 1  # samples of small and large deviation
        modulation = torch.randn(N, 3 * D)
        for name in ("fp32", "fp16"):
            both = [tried(module, x, modulation, precision.DTYPES[name]) for module in (fused, elementwise)]
            yield from ((f"{each}, {shape}, {name}", *pair) for each, *pair in zip(NAMES, *both, strict=True))
    x, modulation = torch.randn(4, 3, 8), torch.randn(4, 24)
    x[0, 0, 0], x[1, 0, 0], x[2] = float("nan"), float("inf"), 1e5
    both = [tried(module, x, modulation, torch.float16) for module in (fused, elementwise)]
    yield from ((f"{each}, beyond FP16", *pair) for each, *pair in zip(NAMES, *both, strict=True))


def block_gradients(model, name, module):
    model, run_in = copy.deepcopy(model), Precision(name, CPU, "test")
    recompute.recompute_in(run_in.keep_islands(model), run_in, module)
    torch.manual_seed(1)
    x, modulation = (torch.randn(size, requires_grad=True) for size in ((2, 4, 48), (2, 6 * 48)))
    with run_in.autocast():
        result = model.blocks[0](x, modulation)
    (result.square().sum() / 2).backward()
    of_parameters = [p.grad for p in model.blocks[0].parameters() if p.grad is not None]
    return [result.detach(), x.grad, modulation.grad, *of_parameters]


def blocks():
    torch.manual_seed(0)
    model = EqM(input_size=4, patch_size=2, hidden_size=48, depth=1, num_heads=2, num_classes=3)
    for name in ("fp32", "fp16"):
        both = [block_gradients(model, name, module) for module in (fused, elementwise)]
        yield from ((f"block {number}, {name}", *pair) for number, pair in enumerate(zip(*both, strict=True)))


def obstacles():
    """What is said of kernels that work, of one that is wrong, and of one that cannot be compiled."""
    from EqM.engine import kernels

    fused.DEVICE = "cpu"
    given = CPU, torch.float16, 24
    yield fused.obstacle(*given)
    with mock.patch.object(kernels, "gated_sum", mock.MagicMock()):
        yield fused.obstacle(*given)
    broken = mock.MagicMock()
    broken.__getitem__.side_effect = RuntimeError("Failed to find C compiler.\nPlease specify")
    with mock.patch.object(kernels, "norm_backward", broken):
        yield fused.obstacle(*given)


if __name__ == "__main__":
    torch.manual_seed(0)
    fused.TOKENS = TOKENS
    compared = [*operations(), *blocks()]
    torch.save({"compared": compared, "obstacles": [*obstacles()]}, sys.argv[1])
