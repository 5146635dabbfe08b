"""Triton kernels of what stands between a block's products. Each reads and writes memory once; fused.py launches them.

A program holds whole tokens, BLOCK >= D values each, and computes in FP32 whatever it loads and stores. Tensors named
with a capital are pointers to the first element: tokens (N, L, D) are contiguous, what is one row a sample (N, D) may
be a view into something wider, whose step from sample to sample comes with it.
"""

import triton
import triton.language as tl

# Not compiled again for an L that 16 divides, as Triton would: what a run tries at its start is what it trains with.
one_for_all_lengths = triton.jit(do_not_specialize=["L"])


@one_for_all_lengths
def modulated_norm(X, Shift, Factor, Out, L, of_shift, of_factor, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """Out = norm(X) * Factor + Shift. A program for each token."""
    token = tl.program_id(0).to(tl.int64)
    sample = token // L
    at = tl.arange(0, BLOCK)
    inside = at < D
    normed, _ = _norm(_load(X + token * D, at, inside), inside, D, eps)
    out = normed * _load(Factor + sample * of_factor, at, inside) + _load(Shift + sample * of_shift, at, inside)
    tl.store(Out + token * D + at, out.to(Out.dtype.element_ty), mask=inside)


@one_for_all_lengths
def norm_backward(
    OfOut, X, Factor, OfResult, OfX, Sums, L, of_factor, eps, D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr
):
    """Gradients of X, of Shift and of Factor in modulated_norm. A program for each sample and TOKENS of its tokens.

    OfResult is added to the gradient of X. Sums (N, parts, 2, D): those of Shift and Factor, summed over its tokens.
    """
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < D
    factor = _load(Factor + sample * of_factor, at, inside)
    of_shift = tl.zeros((BLOCK,), tl.float32)
    of_scale = tl.zeros((BLOCK,), tl.float32)
    for token in range(part * TOKENS, min((part + 1) * TOKENS, L)):
        row = (sample * L + token) * D
        normed, inverse = _norm(_load(X + row, at, inside), inside, D, eps)
        of_out = _load(OfOut + row, at, inside)
        of_shift += of_out
        of_scale += of_out * normed
        of_normed = of_out * factor
        along, mean = tl.sum(of_normed * normed, 0) / D, tl.sum(of_normed, 0) / D
        of_x = (of_normed - mean - normed * along) * inverse + _load(OfResult + row, at, inside)
        tl.store(OfX + row + at, of_x, mask=inside)
    sums = Sums + (sample * tl.num_programs(1) + part) * 2 * D + at
    tl.store(sums, of_shift, mask=inside)
    tl.store(sums + D, of_scale, mask=inside)


@one_for_all_lengths
def gated_sum(X, Gate, Value, Out, L, of_gate, D: tl.constexpr, BLOCK: tl.constexpr):
    """Out = X + Gate * Value. A program for each token."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    gated = _load(Gate + token // L * of_gate, at, inside) * _load(Value + token * D, at, inside)
    tl.store(Out + token * D + at, _load(X + token * D, at, inside) + gated, mask=inside)


@one_for_all_lengths
def gate_backward(
    OfGated, Value, Gate, OfValue, Sums, L, of_gate, D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr
):
    """Gradients of Value and Gate in Value * Gate. A program for each sample and TOKENS of its tokens.

    Sums (N, parts, D): that of Gate, summed over its tokens.
    """
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < D
    gate = _load(Gate + sample * of_gate, at, inside)
    total = tl.zeros((BLOCK,), tl.float32)
    for token in range(part * TOKENS, min((part + 1) * TOKENS, L)):
        row = (sample * L + token) * D
        of_gated = _load(OfGated + row, at, inside)
        total += of_gated * _load(Value + row, at, inside)
        tl.store(OfValue + row + at, (of_gated * gate).to(OfValue.dtype.element_ty), mask=inside)
    tl.store(Sums + (sample * tl.num_programs(1) + part) * D + at, total, mask=inside)


@triton.jit
def _load(start, at, inside):
    return tl.load(start + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norm(x, inside, D, eps):
    """A token of zero mean and unit variance, and the inverse of its deviation."""
    centred = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    return centred * inverse, inverse
