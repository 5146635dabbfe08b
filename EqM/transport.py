"""Paths between noise and data, the EqM target, and the training losses.

Knows nothing of models or devices: everything follows the tensors it is given. x1 is data, x0 noise, and
x_t = alpha(t) x1 + sigma(t) x0 runs from noise at t = 0 to data at t = 1.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

PATHS = ("Linear", "GVP", "VP")
PREDICTIONS = ("velocity", "score", "noise")
LOSS_WEIGHTS = ("None", "velocity", "likelihood")
# The schedules of c, and what shapes each besides its scale.
C_SCHEDULES = {"constant": (), "linear": (), "truncated": ("c_start",), "piecewise": ("c_start", "c_peak")}
C_DEFAULTS: dict[str, Any] = {"c_schedule": "truncated", "c_start": 0.8, "c_peak": 1.0, "c_scale": 4.0}

VP_SIGMA_MIN, VP_SIGMA_MAX = 0.1, 20.0


def expand_like(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """t: (N,) -> (N, 1, ..., 1) with as many dimensions as x."""
    return t.view(-1, *[1] * (x.ndim - 1))


def c(
    t: torch.Tensor, schedule: str = "truncated", start: float = 0.8, peak: float = 1.0, scale: float = 4.0
) -> torch.Tensor:
    """Magnitude of the EqM target at t, shaped like t. At data it is 0 (but for constant), so that samples rest there.

    With a = start, where the fall begins, b = peak and lambda = scale, the gradient multiplier:
    constant lambda; linear lambda (1 - t); truncated lambda min(1, (1 - t) / (1 - a)), the default;
    piecewise lambda (b - (b - 1) t / a) up to a, so lambda b at pure noise, then lambda (1 - t) / (1 - a).
    """
    if schedule == "constant":
        return scale * torch.ones_like(t)
    if schedule == "linear":
        return scale * (1 - t)
    fall = (1 - t) / (1 - start)
    if schedule == "truncated":
        return scale * torch.clamp(fall, max=1)
    # By cases: the lesser of the two branches is right only for b <= 1 / (1 - a).
    return scale * torch.where(t < start, peak - (peak - 1) * t / start, fall)


def check_c(schedule: str, start: float, peak: float, scale: float) -> None:
    """Raise ValueError unless these describe a c(t)."""
    if schedule not in C_SCHEDULES:
        raise ValueError(f"the schedule of c is {schedule!r}; it must be one of {', '.join(C_SCHEDULES)}")
    if not 0 < start < 1:
        raise ValueError(f"c starts to fall at {start:g}; it must be strictly between 0 and 1")
    for name, value in (("peak", peak), ("scale", scale)):
        if not 0 < value < math.inf:
            raise ValueError(f"the {name} of c is {value:g}; it must be above 0 and finite")


def mean_flat(x: torch.Tensor) -> torch.Tensor:
    """Mean over all but the batch dimension: (N, ...) -> (N,)."""
    return x.flatten(1).mean(1)


def dispersive_loss(tokens: torch.Tensor) -> torch.Tensor:
    """InfoNCE-L2 dispersive loss (Wang & He 2025, arXiv 2506.09027) of a batch of activations, a scalar.

    tokens: (N, ...), flattened to (N, dim). log of the mean over all N x N pairs, diagonal included, of
    exp(-d^2 / dim), in FP32. Distances come from the products of all pairs, which needs no memory of (N, N, dim) as the
    backward pass of pdist does on a GPU. In FP64, where the difference of such products is as good as that of samples.
    """
    z = tokens.double().flatten(1)
    z = z - z.detach().mean(0)  # distances stay, and products are no larger than they
    N, dim = z.shape
    products = z @ z.T
    squares = products.diagonal()
    squared = squares[:, None] + squares - 2 * products  # (N, N) distances
    pairs = (-squared / dim).flatten()
    return (pairs.logsumexp(0) - 2 * math.log(N)).float()


@dataclass(frozen=True)
class PathPoint:
    """A point x_t of the path of each sample and what the model should say there."""

    x0: torch.Tensor  # (N, ...) noise
    xt: torch.Tensor  # (N, ...)
    t: torch.Tensor  # (N,)
    target: torch.Tensor  # (N, ...) EqM velocity target (d alpha x1 + d sigma x0) c(t)


class Transport:
    """A path, what the model predicts on it, and how the loss is weighted.

    path_type: Linear, GVP or VP. prediction: velocity (the EqM field), score or noise.
    loss_weight: None, velocity or likelihood; it weighs score and noise predictions (SiT, arXiv 2401.08740).
    train_eps, sample_eps: how far t stays from the ends that are singular for this path and prediction;
    None means 0 where nothing is singular, else 1e-3 (1e-5 for training on VP).
    c_schedule, c_start, c_peak, c_scale: the c(t) of the target, as `c` describes it; it is no loss weight.
    Raises ValueError if there is no such c.
    """

    def __init__(
        self,
        path_type: str = "Linear",
        prediction: str = "velocity",
        loss_weight: str = "None",
        train_eps: float | None = None,
        sample_eps: float | None = None,
        *,
        c_schedule: str = "truncated",
        c_start: float = 0.8,
        c_peak: float = 1.0,
        c_scale: float = 4.0,
    ) -> None:
        check_c(c_schedule, c_start, c_peak, c_scale)
        regular = path_type != "VP" and prediction == "velocity"
        default_train = 0.0 if regular else 1e-5 if path_type == "VP" else 1e-3
        default_sample = 0.0 if regular else 1e-3
        self.path_type = path_type
        self.prediction = prediction
        self.loss_weight = loss_weight
        self.train_eps = default_train if train_eps is None else train_eps
        self.sample_eps = default_sample if sample_eps is None else sample_eps
        self._c = (c_schedule, c_start, c_peak, c_scale)

    @property
    def c_name(self) -> str:
        """How a run with this c is told from others: its schedule and what shapes it; empty for the default."""
        settings: dict[str, Any] = dict(zip(C_DEFAULTS, self._c, strict=True))
        if settings == C_DEFAULTS:
            return ""
        shape = [settings[name] for name in (*C_SCHEDULES[settings["c_schedule"]], "c_scale")]
        return "-".join(["c", settings["c_schedule"], *(f"{value:g}" for value in shape)])

    def c(self, t: torch.Tensor) -> torch.Tensor:
        """Magnitude of this transport's target at t, shaped like t."""
        return c(t, *self._c)

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(alpha, sigma, d alpha / dt, d sigma / dt) at t, each shaped like t."""
        if self.path_type == "Linear":
            return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
        if self.path_type == "GVP":
            angle = t * math.pi / 2
            alpha, sigma = angle.sin(), angle.cos()
            return alpha, sigma, sigma * math.pi / 2, -alpha * math.pi / 2
        spread = VP_SIGMA_MAX - VP_SIGMA_MIN
        log_alpha = -0.25 * (1 - t) ** 2 * spread - 0.5 * (1 - t) * VP_SIGMA_MIN
        slope = 0.5 * (1 - t) * spread + 0.5 * VP_SIGMA_MIN
        alpha = log_alpha.exp()
        sigma = (-torch.expm1(2 * log_alpha)).sqrt()
        return alpha, sigma, slope * alpha, -slope * alpha.square() / sigma

    def interval(self, eps: float) -> tuple[float, float]:
        """(t_start, t_end) that keeps eps away from the singular ends.

        VP is singular at t = 1, where sigma is 0. Score and noise predictions on Linear and GVP are
        singular at both ends: their drift divides by alpha at 0, their weights by sigma at 1.
        """
        if self.path_type == "VP":
            return 0.0, 1.0 - eps
        if self.prediction == "velocity":
            return 0.0, 1.0
        return eps, 1.0 - eps

    def sample(self, x1: torch.Tensor) -> PathPoint:
        """Draw noise and a time for each sample of x1, shaped (N, ...): a PathPoint in FP32."""
        x1 = x1.float()
        x0 = torch.randn_like(x1)
        start, end = self.interval(self.train_eps)
        t = start + (end - start) * torch.rand(x1.shape[0], device=x1.device)
        return self.plan(x0, x1, t)

    def plan(self, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor) -> PathPoint:
        """The PathPoint at times t, shaped (N,), between noise x0 and data x1."""
        alpha, sigma, d_alpha, d_sigma = (expand_like(value, x1) for value in self.coefficients(t))
        target = (d_alpha * x1 + d_sigma * x0) * self.c(expand_like(t, x1))
        return PathPoint(x0, alpha * x1 + sigma * x0, t, target)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Loss weight of score and noise predictions at t, (N,)."""
        if self.loss_weight == "None":
            return torch.ones_like(t)
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t)
        diffusion = d_alpha / alpha * sigma.square() - sigma * d_sigma
        return (diffusion / sigma).square() if self.loss_weight == "velocity" else diffusion / sigma.square()

    def loss(self, output: torch.Tensor, point: PathPoint) -> torch.Tensor:
        """Loss of each sample, (N,), in FP32. output: the model's, shaped like point.xt."""
        output = output.float()
        if self.prediction == "velocity":
            return mean_flat((output - point.target).square())
        if self.prediction == "noise":
            error = output - point.x0
        else:
            sigma = self.coefficients(point.t)[1]
            error = expand_like(sigma, output) * output + point.x0
        return self.weight(point.t) * mean_flat(error.square())

    def field(self, output: torch.Tensor) -> torch.Tensor:
        """What a sampler climbs, from what the model says: noise points away from data, the others to it."""
        return -output if self.prediction == "noise" else output
