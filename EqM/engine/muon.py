"""Muon for the matrices of the blocks, AdamW for all else, in one optimizer that can skip a step on the device.

torch.optim.Muon takes the same steps, but the host would have to wait for each: to know whether one is skipped, and for
a rate that lives on the device.
"""

import torch

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration (Jordan 2024, kellerjordan.github.io/posts/muon)
ITERATIONS = 5
RMS = 0.2  # of an AdamW update, which an orthogonal one is scaled to (Liu et al. 2025, arXiv 2502.16982)
EPS = 1e-7


class MuonAdamW(torch.optim.AdamW):
    """Nesterov momentum, orthogonalised, for matrices of `blocks`; fused AdamW for the rest.

    model: its 2-dimensional parameters below `blocks` are the matrices. lr: of both, since updates of both have the
    same size. Once found_inf is set, a 0-dim tensor, a step changes nothing where it is 1.
    """

    def __init__(self, model, lr, betas=(0.9, 0.999), weight_decay=0.0):
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            is_matrix = name.startswith("blocks.") and parameter.ndim == 2
            (matrices if is_matrix else others).append(parameter)
        groups = [{"params": others, "muon": False}, {"params": matrices, "muon": True}]
        super().__init__(groups, lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=True)

    def __setstate__(self, state):
        """As unpickling and load_state_dict do; AdamW's own looks for its moments in every group."""
        groups = state["param_groups"]
        super().__setstate__({**state, "param_groups": [group for group in groups if not group["muon"]]})
        self.param_groups = groups

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._remember(group["params"])
                for alike in self._by_shape(group["params"]):
                    self._step(alike, group["lr"], group["weight_decay"])

    def _remember(self, parameters):
        """Make what is kept of each, in their order, in which a checkpoint lists it."""
        for parameter in parameters:
            if parameter.grad is not None and "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @staticmethod
    def _by_shape(parameters):
        """Lists of the parameters that have gradients, each of one shape, to be orthogonalised together."""
        shapes = {}
        for parameter in parameters:
            if parameter.grad is not None:
                shapes.setdefault(parameter.shape, []).append(parameter)
        return shapes.values()

    def _step(self, parameters, lr, weight_decay):
        """One step of P matrices (m, n)."""
        kept = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradient = torch.stack([parameter.grad for parameter in parameters])  # (P, m, n)
        found_inf = getattr(self, "found_inf", None)
        applied = 1.0 if found_inf is None else 1.0 - found_inf
        if found_inf is not None:  # what is skipped may hold inf, and 0 x inf is NaN
            gradient = torch.where(found_inf > 0, 0, gradient)
        momentum = torch.stack(kept)
        momentum += (1 - MOMENTUM) * applied * (gradient - momentum)
        torch._foreach_copy_(kept, list(momentum.unbind()))
        update = orthogonal(gradient.lerp_(momentum, MOMENTUM))
        scale = RMS * max(update.shape[1:]) ** 0.5
        torch._foreach_mul_(parameters, 1 - lr * weight_decay * applied)
        torch._foreach_add_(parameters, list((update * (-scale * lr * applied)).unbind()))


def orthogonal(matrices):
    """About U V' of each matrix U S V', (P, m, n), by Newton and Schulz's iteration in BF16; 0 of a matrix of zeros."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)
