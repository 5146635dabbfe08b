"""The EqM network: a DiT-style transformer over patches of images or clips.

State-dict names and shapes are those of the published EqM code, so its checkpoints load strictly.

Letters: N batch, C channels, T frames, H W height and width, L tokens, D hidden size; t h w are the
token grid, pt p p the patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

EBM_KINDS = ("none", "dot", "mean", "l2")


def sincos_1d(dim: int, positions: Tensor) -> Tensor:
    """Sine-cosine embedding of scalar positions, sines first.

    positions: (L,). Returns (L, dim) in float64; dim must be even. Frequencies are 10000^(-i / (dim / 2)).
    """
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * frequencies  # (L, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_grid(dim: int, grid: tuple[int, ...]) -> Tensor:
    """Fixed positional embedding of a token grid, in row-major token order.

    grid: (h, w) for images: the first half of dim encodes the column, the second the row (as published).
    grid: (t, h, w) for clips: three even parts of dim encode frame, row, column; what does not divide
    by six goes to the column. Returns (1, L, dim) in float32.
    """
    axes = [axis.reshape(-1) for axis in torch.meshgrid(*[torch.arange(size) for size in grid], indexing="ij")]
    if len(grid) == 2:
        row, column = axes
        parts = [(dim // 2, column), (dim // 2, row)]
    else:
        even_third = dim // 6 * 2
        frame, row, column = axes
        parts = [(even_third, frame), (even_third, row), (dim - 2 * even_third, column)]
    return torch.cat([sincos_1d(*part) for part in parts], dim=1).float().unsqueeze(0)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x: (N, L, D); shift, scale: (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    """Cut images (N, C, H, W) or clips (N, C, T, H, W) into patches and project them: (N, L, D)."""

    def __init__(self, patch, in_channels, hidden_size):
        super().__init__()
        conv = nn.Conv2d if len(patch) == 2 else nn.Conv3d
        self.proj = conv(in_channels, hidden_size, kernel_size=patch, stride=patch)

    def forward(self, x):
        # Contiguous, or every block's output would be a transposed view too, which each layer norm copies.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """Embed t, shaped (N,), as (N, D): 256 cosines-then-sines and a two-layer MLP."""

    def __init__(self, hidden_size, frequency_size=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        half = frequency_size // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t):
        angles = t[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """Embed class labels (N,) as (N, D). Row num_classes is the null label of classifier-free guidance."""

    def __init__(self, num_classes, hidden_size, dropout):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        self.num_classes = num_classes
        self.dropout = dropout

    def forward(self, labels):
        if self.training and self.dropout > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention over (N, L, D)."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def attend(self, qkv: Tensor) -> Tensor:
        """(N, L, 3 D), queries, keys and values of each token, to what each token attends to, (N, L, D)."""
        N, L, D = *qkv.shape[:2], qkv.shape[2] // 3
        qkv = qkv.reshape(N, L, 3, self.num_heads, D // self.num_heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (N, heads, L, D / heads)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, L, D)

    def forward(self, x):
        return self.proj(self.attend(self.qkv(x)))


class Mlp(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning (Peebles & Xie 2023, arXiv 2212.09748)."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, modulation):
        """x: (N, L, D); modulation: what adaLN_modulation makes of the condition, (N, 6 D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens (N, L, D), modulated by (N, 2 D), to patch values (N, L, patch volume * channels)."""

    def __init__(self, hidden_size, patch_values):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, modulation):
        shift, scale = modulation.chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class EqM(nn.Module):
    """Time-invariant field f(x) of Equilibrium Matching (Wang & Du 2025, arXiv 2510.02300).

    input_size: side of a square image, or (T, H, W) of a clip, in latent units.
    patch_size: side of a patch; patch_frames: its length in frames (clips only; default patch_size).
    uncond: zero the time conditioning; the time embedder stays in the network.
    ebm: "none" returns the network's output as the field. "dot" (alias "mean") and "l2" make the
    output f an explicit energy, E = sum(x * f) and E = -sum(f^2) / 2, and return dE/dx.

    Raises ValueError if the input does not divide into patches or ebm is unknown.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        uncond: bool = True,
        ebm: str = "none",
        patch_frames: int | None = None,
    ):
        super().__init__()
        if ebm not in EBM_KINDS:
            raise ValueError(f"ebm is {ebm!r}; it must be one of {', '.join(EBM_KINDS)}")
        size: tuple[int, ...]
        patch: tuple[int, ...]
        if isinstance(input_size, int):
            size, patch = (input_size,) * 2, (patch_size,) * 2
        else:
            size, patch = tuple(input_size), (patch_frames or patch_size, patch_size, patch_size)
        if any(side % step for side, step in zip(size, patch, strict=True)):
            raise ValueError(f"an input of {size} does not divide into patches of {patch}")

        self.patch = patch
        self.grid = tuple(side // step for side, step in zip(size, patch, strict=True))
        self.input_shape = (in_channels, *size)
        self.learn_sigma = learn_sigma
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes = num_classes
        self.uncond = uncond
        self.ebm = ebm

        # Registration order is part of the format: optimizer states of checkpoints go by parameter index.
        self.pos_embed = nn.Parameter(sincos_grid(hidden_size, self.grid), requires_grad=False)
        self.x_embedder = PatchEmbed(patch, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, math.prod(patch) * self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for linear maps, N(0, 0.02) for embeddings, zero for what adaLN-Zero starts from."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(weight.weight, std=0.02)
        zeroed = [layer.adaLN_modulation[1] for layer in (*self.blocks, self.final_layer)]
        for linear in (*zeroed, self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(N, L, patch volume * C) -> (N, C, H, W) or (N, C, T, H, W); channels vary fastest in a token."""
        N, axes = tokens.shape[0], len(self.grid)
        x = tokens.reshape(N, *self.grid, *self.patch, self.out_channels)
        pairs = [axis for i in range(axes) for axis in (1 + i, 1 + axes + i)]  # (t pt) (h p) (w p)
        x = x.permute(0, 1 + 2 * axes, *pairs)
        return x.reshape(N, self.out_channels, *[g * p for g, p in zip(self.grid, self.patch, strict=True)])

    def modulations(self, t: Tensor, y: Tensor) -> list[Tensor]:
        """All that time and label do: shifts, scales and gates of each block (N, 6 D), then of the end (N, 2 D)."""
        if self.uncond:
            t = torch.zeros_like(t)
        condition = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        return [layer.adaLN_modulation(condition) for layer in (*self.blocks, self.final_layer)]

    def network(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The transformer alone: (output shaped and typed like x, list of block outputs (N, L, D))."""
        *of_blocks, of_end = self.modulations(t, y)
        tokens = self.x_embedder(x) + self.pos_embed
        acts = []
        for block, modulation in zip(self.blocks, of_blocks, strict=True):
            tokens = block(tokens, modulation)
            acts.append(tokens)
        out = self.unpatchify(self.final_layer(tokens, of_end))
        if self.learn_sigma:
            out = out.chunk(2, dim=1)[0]
        return out.type_as(x), acts

    def forward(self, x: Tensor, t: Tensor, y: Tensor, return_act: bool = False, get_energy: bool = False) -> Any:
        """The field at x.

        x: (N, C, H, W) or (N, C, T, H, W); t: (N,) in [0, 1]; y: (N,) labels, num_classes being the null label.
        Returns the field, shaped like x. With return_act also the list of block outputs; with get_energy also
        the energy -E, shaped (N,), of which the field is minus the gradient.
        Raises ValueError if get_energy is asked of a model without an explicit energy.
        """
        if self.ebm == "none":
            if get_energy:
                raise ValueError("this model has no explicit energy: build it with ebm='dot' or 'l2'")
            field, acts = self.network(x, t, y)
            return (field, acts) if return_act else field

        differentiable = torch.is_grad_enabled()
        # Fused attention kernels have no double backward, which training on dE/dx needs.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if differentiable else nullcontext():
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            out, acts = self.network(x, t, y)
            energy = -out.square().flatten(1).sum(1) / 2 if self.ebm == "l2" else (x * out).flatten(1).sum(1)
            (field,) = torch.autograd.grad(energy.sum(), x, create_graph=differentiable)
        if not differentiable:
            energy = energy.detach()
        if get_energy:
            return field, -energy
        return (field, acts) if return_act else field


SIZES = {  # name: (depth, hidden size, heads); T is for tests and the demo
    "T": (4, 144, 6),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


def _builder(depth: int, hidden_size: int, num_heads: int, patch_size: int) -> Callable[..., EqM]:
    def build(**kwargs: Any) -> EqM:
        return EqM(depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size, **kwargs)

    return build


EqM_models: dict[str, Callable[..., EqM]] = {
    f"EqM-{name}/{p}": _builder(*size, p) for name, size in SIZES.items() for p in (2, 4, 8)
}
