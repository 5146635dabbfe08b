"""Sampling by gradient descent on the learned landscape: gd, Nesterov gd and guidance, on any field.

A field is a function `field(x, t) -> (N, ...)`, shaped like x, with t shaped (N,). x and the momentum stay
in the dtype x comes in, FP32: a step of 0.0017 added 249 times to a 16-bit number is mostly lost.
"""

import torch

SAMPLERS = ("gd", "ngd")


def guided(model, labels, scale, null_label, channels=3):
    """Field of a class-conditional model with classifier-free guidance, in one batched call.

    model: called as model(x, t, y). labels: (N,). scale: s in f_null + s (f_class - f_null); at 1 or less
    the model is called once, without guidance, as published. channels: how many leading channels are
    guided; the published setting is 3, and the rest follows f_class. None guides all.
    """
    if scale <= 1:
        return lambda x, t: model(x, t, labels)
    both_labels = torch.cat([labels, torch.full_like(labels, null_label)])

    def field(x, t):
        with_class, without = model(torch.cat([x, x]), torch.cat([t, t]), both_labels).chunk(2)
        steered = without[:, :channels] + scale * (with_class[:, :channels] - without[:, :channels])
        return steered if channels is None else torch.cat([steered, with_class[:, channels:]], dim=1)

    return field


def descend(field, x, points, stepsize, mu=0.0, interval=(0.0, 1.0), progress=iter):
    """Follow the field from noise x: x <- x + stepsize f(x + stepsize mu m), m the previous field.

    mu = 0 is plain gradient descent (gd), mu > 0 Nesterov's (ngd). points: number of sampling points, so
    points - 1 updates, as published. t runs evenly over the interval; models without time conditioning
    ignore it. progress wraps the range of updates (tqdm, say). Returns x, shaped (N, ...).
    """
    start, end = interval
    momentum = torch.zeros_like(x)
    for i in progress(range(points - 1)):
        t = torch.full((x.shape[0],), start + (end - start) * i / (points - 1), device=x.device)
        gradient = field(x + stepsize * mu * momentum if mu else x, t)
        x = x + stepsize * gradient
        momentum = gradient
    return x
