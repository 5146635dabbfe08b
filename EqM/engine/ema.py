"""Exponential moving average of a model's weights."""

from copy import deepcopy

import torch

from EqM.run.shards import local


class EMA:
    """A frozen copy of a model, in .model, that follows it: ema <- decay ema + (1 - decay) weights."""

    def __init__(self, model, decay=0.9999):
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.follow(model)

    def follow(self, model):
        """Take up the parameters of both networks, which are other objects once the networks have been sharded."""
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self._ours = [local(p) for name, p in self.model.named_parameters() if name in trained]
        self._theirs = [local(p) for name, p in model.named_parameters() if name in trained]

    @torch.no_grad()
    def update(self, applied):
        """Move towards the model. applied: 0-dim tensor, 1.0 if the optimizer took its step and 0.0 if it
        skipped, in which case nothing changes. The host does not wait for the device.
        """
        weight = (1 - self.decay) * applied
        torch._foreach_lerp_(self._ours, self._theirs, [weight] * len(self._ours))
