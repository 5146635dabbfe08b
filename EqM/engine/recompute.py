"""Blocks that keep for the backward pass what products made, and compute the rest again.

Autograd keeps what any operation reads. Of that only products and attention take long to make; norms, modulation, GELU
and casts do not. `Block` below is models.Block as a single operation with a backward pass of its own, which keeps, in
bytes per token and channel,

    | kept                                                                   | 16 bits   | FP32       |
    |------------------------------------------------------------------------|-----------|------------|
    | the block's input; the tokens between attention and MLP                | 4 + 4     | 4 + 4      |
    | queries, keys and values; what attention makes of them; its projection | 6 + 2 + 2 | 12 + 4 + 4 |
    | both products of the MLP                                               | 8 + 2     | 16 + 4     |
    | all                                                                    | 28        | 48         |

where autograd keeps 48 and 80. With elementwise.py every operation is the one that autocast and autograd would do, on
the same operands: on a CPU outputs and gradients are equal to the bit; a GPU may sum the gradients of shift, scale and
gate in another order. fused.py, which a GPU takes unless told otherwise, rounds otherwise.
Launches are saved as well: a block's weights are cast in one, and so are their gradients, and activations are cast by
the operation that makes them.

Letters: N batch, L tokens, D hidden size.
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from EqM.engine import elementwise


def recompute_in(model, run_in, operations=elementwise):
    """Let the model's blocks keep no more than that, in place. Without gradients they run as before.

    operations: what computes all that is no product, elementwise.py or fused.py. An energy's blocks are left alone: its
    field is differentiated twice.
    """
    if model.ebm != "none":
        return
    for block in model.blocks:
        # By its name: a network that holds a module could not be copied.
        block.forward = partial(_forward, block, block.forward, run_in, operations.__name__)


def _forward(block, plain, run_in, operations, x, modulation):
    if not torch.is_grad_enabled():
        return plain(x, modulation)
    layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    parameters = (parameter for layer in layers for parameter in (layer.weight, layer.bias))
    return Block.apply(block, run_in, sys.modules[operations], x, modulation, *parameters)


class Block(torch.autograd.Function):
    """A transformer block of models.py as one operation: x (N, L, D), its modulation (N, 6 D), its parameters.

    parameters: weight and bias of attn.qkv, attn.proj, mlp.fc1 and mlp.fc2, in FP32. Their casts are made again in the
    backward pass rather than kept.
    """

    @staticmethod
    def forward(ctx, block, run_in, operations, x, modulation, *parameters):
        qkv, proj, fc1, fc2 = _layers(parameters, run_in.dtype)
        shift1, _, gate1, shift2, _, gate2 = modulation.unsqueeze(1).chunk(6, dim=2)  # each (N, 1, D)
        factors = 1 + modulation.unflatten(1, (2, 3, 1, -1))[:, :, 1]  # of both norms, (N, 2, 1, D)
        factor1, factor2 = factors.unbind(1)
        normed, _ = operations.modulated_norm(x, block.norm1.eps, shift1, factor1, run_in.dtype)
        queries = F.linear(normed, *qkv)
        with torch.enable_grad():  # whichever kernel attention takes, it knows its own backward pass
            queries = queries.detach().requires_grad_()
            attended = block.attn.attend(queries)
        projected = F.linear(attended.detach(), *proj)
        middle = operations.gated_sum(x, gate1, projected)
        normed, _ = operations.modulated_norm(middle, block.norm2.eps, shift2, factor2, run_in.dtype)
        hidden = F.linear(normed, *fc1)
        out = F.linear(F.gelu(hidden, approximate="tanh"), *fc2)
        ctx.save_for_backward(x, modulation, factors, projected, middle, hidden, out, *parameters)
        ctx.block, ctx.run_in, ctx.operations, ctx.attention = block, run_in, operations, (queries, attended)
        return operations.gated_sum(middle, gate2, out)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_result):
        x, modulation, factors, projected, middle, hidden, out, *parameters = ctx.saved_tensors
        (queries, attended), ctx.attention = ctx.attention, None  # or the graph would keep them to the step's end
        block, run_in, operations = ctx.block, ctx.run_in, ctx.operations
        qkv, proj, fc1, fc2 = (weight for weight, _ in _layers(parameters, run_in.dtype))
        shift1, _, gate1, shift2, _, gate2 = modulation.unsqueeze(1).chunk(6, dim=2)
        factor1, factor2 = factors.unbind(1)
        of_modulation = torch.empty_like(modulation)
        of_half1, of_half2 = of_modulation.unflatten(1, (2, 3, -1)).unbind(1)  # each shift, scale, gate: (N, 3, D)

        def branch_backward(of_out, x, norm, shift, factor, weight, *rest):
            """Gradients of x, weight and bias in linear(norm(x) * factor + shift)."""
            normed, kept = operations.modulated_norm(x, norm.eps, shift, factor, run_in.dtype)
            of_normed, *of_linear = _linear_backward(of_out, normed, weight)
            return operations.norm_backward(of_normed, x, norm.eps, factor, kept, *rest), *of_linear

        with run_in.autocast():  # on a CPU it decides how products are taken
            of_out = operations.gate_backward(of_result, out, gate2, of_half2[:, 2])
            of_gelu, *of_fc2 = _linear_backward(of_out, F.gelu(hidden, approximate="tanh"), fc2)
            of_hidden = torch.ops.aten.gelu_backward(of_gelu, hidden, approximate="tanh")
            del of_out, of_gelu
            branch = (middle, block.norm2, shift2, factor2, fc1)
            of_middle, *of_fc1 = branch_backward(of_hidden, *branch, of_result, of_half2[:, :2])
            del of_hidden

            of_projected = operations.gate_backward(of_middle, projected, gate1, of_half1[:, 2])
            of_attended, *of_proj = _linear_backward(of_projected, attended.detach(), proj)
        (of_queries,) = torch.autograd.grad(attended, queries, of_attended)
        del of_projected, of_attended, attended, queries
        with run_in.autocast():
            branch = (x, block.norm1, shift1, factor1, qkv)
            of_x, *of_qkv = branch_backward(of_queries, *branch, of_middle, of_half1[:, :2])
        of_parameters = _cast((*of_qkv, *of_proj, *of_fc1, *of_fc2), torch.float32)
        return None, None, None, of_x, of_modulation, *of_parameters


def _layers(parameters, dtype):
    """The (weight, bias) of each layer, cast as autocast casts them, in one launch."""
    parameters = _cast(parameters, dtype)
    return zip(parameters[::2], parameters[1::2], strict=True)


def _cast(tensors, dtype):
    """The tensors in dtype, in one launch on a GPU; those that are so already are not copied."""
    if tensors[0].dtype == dtype:
        return tensors
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def _linear_backward(of_out, x, weight):
    """Gradients of x, weight and bias in a linear layer. of_out: (N, L, out); x: (N, L, in)."""
    rows = of_out.flatten(0, 1)
    return (rows @ weight).view_as(x), rows.t() @ x.flatten(0, 1), rows.sum(0)
