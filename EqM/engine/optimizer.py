"""Optimizers that can skip a step on the device, and a learning rate that counts only steps that were taken."""

import math

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from EqM.engine.muon import MuonAdamW
from EqM.run.shards import whole

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "cosine")


def adamw(model, lr, betas=(0.9, 0.999), weight_decay=0.0):
    """AdamW; the defaults are as published. Fused: it can skip a step inside the kernel.

    All parameters are listed, frozen ones too, since checkpoints count them.
    """
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=True)


def make(kind, *settings):
    """The optimizer of that kind, of OPTIMIZERS. settings: as adamw takes them."""
    return MuonAdamW(*settings) if kind == "muon" else adamw(*settings)


def clip_gradients(model, max_norm=None):
    """Scale gradients down to max_norm if given. Returns their norm before that, over all ranks' parts, 0-dim."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = whole(get_total_norm([p.grad for p in parameters]))
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class Schedule:
    """Learning rate by steps taken: linear warm-up, then constant or cosine to `lowest` at total.

    A skipped step must not advance it, and whether one was skipped only the device knows: so the count and
    the rate are tensors there, and the host never waits for them.
    """

    def __init__(self, optimizer, kind, warmup, total, device, lowest=0.0):
        self.optimizer = optimizer
        self.kind = kind
        self.warmup = warmup
        self.total = total
        self.base = optimizer.param_groups[0]["lr"]
        self.floor = lowest / self.base
        self.taken = torch.zeros((), device=device)
        self.varies = kind != "constant" or warmup > 0
        if self.varies:
            for group in optimizer.param_groups:
                group["lr"] = torch.zeros((), device=device)
            self._set()

    def advance(self, applied):
        """applied: 0-dim tensor, 1.0 if the optimizer took its step, else 0.0."""
        self.taken += applied
        if self.varies:
            self._set()

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken.copy_(state["taken"])
        if self.varies:
            self._set()

    def _set(self):
        factor = torch.clamp((self.taken + 1) / max(1, self.warmup), max=1)
        if self.kind == "cosine":
            wave = 0.5 * (1 + torch.cos(math.pi * torch.clamp(self.taken / self.total, max=1)))
            factor = factor * (self.floor + (1 - self.floor) * wave)
        for group in self.optimizer.param_groups:
            group["lr"].copy_(self.base * factor)
