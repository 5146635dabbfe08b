"""What stands between the products of a block and its backward pass, by PyTorch's operations.

fused.py has the same under the same names. Letters: N batch, L tokens, D hidden size. Tokens are (N, L, D); shift, gate
and factor = 1 + scale are (N, 1, D).
"""

import torch


def modulated_norm(x, eps, shift, factor, dtype):
    """models.modulate(norm(x)), cast by its addition, and what norm_backward wants to have of it."""
    normed, mean, deviation = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    modulated = torch.add(normed * factor, shift, out=torch.empty_like(normed, dtype=dtype))
    return modulated, (normed, mean, deviation)


def norm_backward(of_modulated, x, eps, factor, kept, of_result, of_affine):
    """Gradient of x in modulated_norm(x, ...), plus of_result.

    kept: what modulated_norm gave. of_affine: where the gradients of shift and scale go, (N, 2, D).
    """
    normed, mean, deviation = kept
    torch.sum(of_modulated, dim=1, dtype=torch.float32, out=of_affine[:, 0])
    torch.sum(of_modulated * normed, dim=1, out=of_affine[:, 1])
    of_normed = of_modulated * factor
    of_x, _, _ = torch.ops.aten.native_layer_norm_backward(
        of_normed, x, x.shape[-1:], mean, deviation, None, None, [True, False, False]
    )
    return of_x.add_(of_result)


def gated_sum(x, gate, value):
    """x + gate * value."""
    return (gate * value).add_(x)


def gate_backward(of_gated, value, gate, of_gate):
    """Gradient of value in gate * value, in its dtype. of_gate: where that of the gate goes, (N, D)."""
    torch.sum(of_gated * value, dim=1, out=of_gate)
    return torch.mul(of_gated, gate, out=torch.empty_like(value))
