"""What elementwise.py does, on a GPU in one pass over memory each: our Triton kernels, as operators of PyTorch.

In bytes per token and channel, with FP32 tokens and 16-bit products:

    |                | by PyTorch's operations | fused |
    |----------------|-------------------------|-------|
    | modulated_norm | 22                      | 6     |
    | norm_backward  | 46                      | 14    |
    | gated_sum      | 18                      | 10    |
    | gate_backward  | 20                      | 8     |

Modulation and gated sums are rounded once where PyTorch's operations round twice, and sums over tokens go in another
order; all are in FP32, as there. As operators they can be counted, and run on tensors without values (see measure).
"""

import sys

import torch

from EqM.engine import elementwise
from EqM.run.errors import reason

DEVICE = "cuda"  # what the kernels are for
TOKENS = 16  # of a sample, whose sums one program of a backward kernel makes


def modulated_norm(x, eps, shift, factor, dtype):
    return torch.ops.eqm.modulated_norm(x, eps, shift, factor, dtype), None


def norm_backward(of_modulated, x, eps, factor, kept, of_result, of_affine):
    of_x, sums = torch.ops.eqm.norm_backward(of_modulated, x, eps, factor, of_result)
    torch.sum(sums, dim=1, out=of_affine)
    return of_x


def gated_sum(x, gate, value):
    return torch.ops.eqm.gated_sum(x, gate, value)


def gate_backward(of_gated, value, gate, of_gate):
    of_value, sums = torch.ops.eqm.gate_backward(of_gated, value, gate)
    torch.sum(sums, dim=1, out=of_gate)
    return of_value


def obstacle(device, dtype, hidden_size):
    """Why these operations cannot take the place of PyTorch's on this device, in a line; None if nothing is in the way.

    Each runs once and is compared: a kernel is compiled here, by this machine's Triton for this card.
    """
    if device.type != DEVICE:
        return f"they are for {DEVICE}, not for {device.type}"
    try:
        tried = [_try(operations, device, dtype, hidden_size) for operations in (sys.modules[__name__], elementwise)]
    except Exception as error:  # whatever a missing compiler, or one that does not know the card, raises
        return reason(error)
    for name, ours, theirs in zip(_TRIED, *tried, strict=True):
        if not torch.allclose(ours.float(), theirs.float(), rtol=4 * torch.finfo(theirs.dtype).eps, atol=1e-3):
            return f"{name} gave other results here than PyTorch's operations"
    return None


_TRIED = ("modulated_norm", "gated_sum", "gate_backward", "gate_backward", "norm_backward", "norm_backward")


def _try(operations, device, dtype, D):
    """What the operations make of the same few tokens, in the order of _TRIED."""
    draw = torch.Generator().manual_seed(0)
    x, of_result, value, of_modulated = torch.randn(4, 2, TOKENS + 1, D, generator=draw).to(device)
    shift, factor, gate = torch.randn(2, 3, 1, D, generator=draw).to(device).unbind(1)
    value, of_modulated = value.to(dtype), of_modulated.to(dtype)
    of_gate, of_affine = x.new_empty(2, D), x.new_empty(2, 2, D)
    modulated, kept = operations.modulated_norm(x, 1e-6, shift, factor, dtype)
    of_value = operations.gate_backward(of_result, value, gate, of_gate)
    of_x = operations.norm_backward(of_modulated, x, 1e-6, factor, kept, of_result, of_affine)
    return modulated, operations.gated_sum(x, gate, value), of_value, of_gate, of_x, of_affine


_operators = torch.library.Library("eqm", "DEF")


def _operator(signature, room):
    """Make a function that launches a kernel an operator of PyTorch, torch.ops.eqm and its name.

    room: makes the tensors for the results out of the operator's arguments, which is all there is to do where tensors
    have no values. The function is given the results, then the arguments.
    """

    def register(launch):
        def run(*given):
            results = room(*given)
            launch(*(results if isinstance(results, tuple) else (results,)), *given)
            return results

        _operators.define(signature)
        name = signature.partition("(")[0]
        _operators.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"eqm::{name}", room, lib=_operators)
        return launch

    return register


def _tokens(like, dtype):
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def _sums(tokens, *kinds):
    """Sums over TOKENS tokens each, in FP32: (N, parts, *kinds, D)."""
    N, L, D = tokens.shape
    return torch.empty(N, -(-L // TOKENS), *kinds, D, device=tokens.device)


@_operator(
    "modulated_norm(Tensor x, float eps, Tensor shift, Tensor factor, ScalarType dtype) -> Tensor",
    room=lambda x, eps, shift, factor, dtype: _tokens(x, dtype),
)
def _launch_modulated_norm(out, x, eps, shift, factor, dtype):
    from EqM.engine import kernels

    N, L, D = x.shape
    steps = shift.stride(0), factor.stride(0)
    kernels.modulated_norm[(N * L,)](x.contiguous(), shift, factor, out, L, *steps, eps, D, **_program(D))


@_operator(
    "norm_backward(Tensor of_modulated, Tensor x, float eps, Tensor factor, Tensor of_result) -> (Tensor, Tensor)",
    room=lambda of_modulated, x, *_: (_tokens(x, x.dtype), _sums(x, 2)),
)
def _launch_norm_backward(of_x, sums, of_modulated, x, eps, factor, of_result):
    from EqM.engine import kernels

    tokens = (each.contiguous() for each in (of_modulated, x))
    kernels.norm_backward[sums.shape[:2]](
        *tokens, factor, of_result.contiguous(), of_x, sums, x.shape[1], factor.stride(0), eps, x.shape[2],
        TOKENS=TOKENS, **_program(x.shape[2]),
    )  # fmt: skip


@_operator("gated_sum(Tensor x, Tensor gate, Tensor value) -> Tensor", room=lambda x, gate, value: _tokens(x, x.dtype))
def _launch_gated_sum(out, x, gate, value):
    from EqM.engine import kernels

    N, L, D = x.shape
    kernels.gated_sum[(N * L,)](x.contiguous(), gate, value.contiguous(), out, L, gate.stride(0), D, **_program(D))


@_operator(
    "gate_backward(Tensor of_gated, Tensor value, Tensor gate) -> (Tensor, Tensor)",
    room=lambda of_gated, value, gate: (_tokens(value, value.dtype), _sums(value)),
)
def _launch_gate_backward(of_value, sums, of_gated, value, gate):
    from EqM.engine import kernels

    tokens = (each.contiguous() for each in (of_gated, value))
    kernels.gate_backward[sums.shape[:2]](
        *tokens, gate, of_value, sums, value.shape[1], gate.stride(0), value.shape[2],
        TOKENS=TOKENS, **_program(value.shape[2]),
    )  # fmt: skip


def _program(D):
    """How a program holds a token of D values: its BLOCK, and the warps it is spread over."""
    block = 1 << (D - 1).bit_length()
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}
