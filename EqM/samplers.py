"""Sampling by gradient descent on the learned landscape: gd, Nesterov gd and guidance, on any field.

A field is a function `field(x, t) -> (N, ...)`, shaped like x, with t shaped (N,). x and the momentum stay
in the dtype x comes in, FP32: a step of 0.0017 added 249 times to a 16-bit number is mostly lost.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

SAMPLERS = ("gd", "ngd")

Field = Callable[[Tensor, Tensor], Tensor]  # (x (N, ...), t (N,)) -> (N, ...)
LabelledField = Callable[[Tensor, Tensor, Tensor], Tensor]  # the same with labels (N,)


def guided(field: LabelledField, labels: Tensor, scale: float, null_label: int, channels: int | None = 3) -> Field:
    """A field with classifier-free guidance, in one batched call.

    field: of a class-conditional model, called as field(x, t, y). labels: (N,). scale: s in
    f_null + s (f_class - f_null); at 1 or less the field is called once, without guidance, as published.
    channels: how many leading channels are guided; the published setting is 3, and the rest follows f_class. None
    guides all.
    """
    if scale <= 1:
        return lambda x, t: field(x, t, labels)
    both_labels = torch.cat([labels, torch.full_like(labels, null_label)])

    def steered_field(x: Tensor, t: Tensor) -> Tensor:
        with_class, without = field(torch.cat([x, x]), torch.cat([t, t]), both_labels).chunk(2)
        steered = without[:, :channels] + scale * (with_class[:, :channels] - without[:, :channels])
        return steered if channels is None else torch.cat([steered, with_class[:, channels:]], dim=1)

    return steered_field


def descend(
    field: Field,
    x: Tensor,
    points: int,
    stepsize: float,
    sampler: str = "gd",
    mu: float = 0.3,
    interval: tuple[float, float] = (0.0, 1.0),
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """Follow the field from noise x: x <- x + stepsize f(x) (gd), or x + stepsize f(x + stepsize mu m) (ngd).

    m is the field of the step before. points: number of sampling points, so
    points - 1 updates, as published. t runs evenly over the interval; models without time conditioning
    ignore it. progress wraps the range of updates (tqdm, say). Returns x, shaped (N, ...).
    """
    start, end = interval
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; it must be one of {', '.join(SAMPLERS)}")
    mu = mu if sampler == "ngd" else 0.0
    momentum = torch.zeros_like(x)
    for i in progress(range(points - 1)):
        t = torch.full((x.shape[0],), start + (end - start) * i / (points - 1), device=x.device)
        gradient = field(x + stepsize * mu * momentum if mu else x, t)
        x = x + stepsize * gradient
        momentum = gradient
    return x
