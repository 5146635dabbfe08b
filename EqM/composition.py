"""Networks and classes that act as one: whose classes a label means, the field and the energy they add up to.

Letters: N batch, K classes of a sum, C channels, T frames, h w latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from EqM.engine.acceleration import modulated_once
from EqM.engine.precision import Precision
from EqM.guidance import Guided, class_weights, label_of
from EqM.models import EqM
from EqM.run.errors import UserError
from EqM.transport import Transport

SHOWN = 8  # class names in a message
NO_CLASS = "none"  # the null label's name

Asked = int | dict[int, float]  # a label, or the weight of each label of a sum


class _Network:
    """One of the networks. own: (labels of all + 1,), its label for each of them; None: the same."""

    def __init__(self, model: EqM, transport: Transport, own: Tensor | None = None):
        self.model, self.transport, self.own = model, transport, own
        self.translated: tuple[Tensor, Tensor] | None = None

    def labels(self, y: Tensor) -> Tensor:
        """The same tensor for the same tensor, so that what the network makes of it can be kept (modulated_once)."""
        if self.own is None:
            return y
        if self.translated is None or self.translated[0] is not y:
            self.translated = y, self.own[y]
        return self.translated[1]


class Composition:
    """The mean of the fields of one or more networks, over the classes of all of them.

    Fields add, as energies do; the mean keeps step size and stop norm what they were. class_names: of the labels.
    null_label: the label of no class, which comes after them.
    """

    def __init__(self, model: EqM, run_in: Precision, transport: Transport, class_names: Sequence[str] | None):
        self.run_in = run_in
        self.class_names = _names(class_names, model)
        self.null_label = model.num_classes
        self.networks = [_Network(model, transport)]

    def add(self, model: EqM, transport: Transport, class_names: Sequence[str] | None) -> None:
        """One more network. A class whose name is known is the same class; new ones come after the known.

        To a network that lacks a class it is no class: there it adds to a sum what the null label does.
        """
        names = _names(class_names, model)
        before, known = self.null_label, set(self.class_names)
        self.class_names = self.class_names + [name for name in names if name not in known]
        self.null_label = len(self.class_names)
        device = self.run_in.device
        for network in self.networks:
            own = torch.arange(before, device=device) if network.own is None else network.own[:-1]
            unknown = torch.full((self.null_label + 1 - before,), network.model.num_classes, device=device)
            network.own, network.translated = torch.cat([own, unknown]), None
        place = {name: label for label, name in enumerate(names)}
        theirs = [place.get(name, model.num_classes) for name in self.class_names] + [model.num_classes]
        self.networks.append(_Network(model, transport, torch.tensor(theirs, device=device)))

    def asked(self, wanted: str | int) -> Asked:
        """The label of a class, by name or number, or the weight of each label of a sum of classes.

        A sum that is one class of weight 1 is that class, and one in which nothing is left the null label; so is
        "none", unless a class is called so. Raises UserError for a class that does not exist.
        """
        names = self.class_names
        if wanted == NO_CLASS and wanted not in names:
            return self.null_label
        known = f"{len(names)}: {', '.join(names[:SHOWN])}" + (", ..." if len(names) > SHOWN else "")
        if isinstance(wanted, str) and wanted not in names and {"+", "*"} & set(wanted):
            try:
                weights = class_weights(wanted, names)
            except ValueError as error:
                raise UserError(f"--classes {wanted}: {error} of this checkpoint, which has {known}") from None
            return next(iter(weights)) if list(weights.values()) == [1.0] else weights or self.null_label
        label = label_of(str(wanted), names if isinstance(wanted, str) else [""] * len(names))
        if label is None:
            raise UserError(f"--classes {wanted} is no class of this checkpoint, which has {known}")
        return label

    def written(self, asked: Asked) -> tuple[str, str]:
        """What was asked for, in numbers and in names: "0*0.7+1*0.3", "cat*0.7+dog*0.3". `asked` reads both back.

        Of the null label it reads the name alone, "none".
        """
        if asked == self.null_label:
            return str(asked), NO_CLASS
        parts = asked.items() if isinstance(asked, dict) else [(asked, 1.0)]
        times = [(label, "" if weight == 1 else f"*{weight:g}") for label, weight in parts]
        names = [f"{self.class_names[label]}{weight}" for label, weight in times]
        return "+".join(f"{label}{weight}" for label, weight in times), "+".join(names)

    def as_tensors(self, labels: Sequence[str | int | Asked] | Tensor) -> tuple[Tensor, Tensor | None]:
        """Labels (N,) and None; where some samples are of sums, labels and weights (N, K)."""
        device = self.run_in.device
        if isinstance(labels, Tensor):
            return labels.to(device), None
        asked = [y if isinstance(y, dict) or y == self.null_label else self.asked(y) for y in labels]
        if not any(isinstance(y, dict) for y in asked):
            return torch.tensor(asked, device=device), None
        sums = [y if isinstance(y, dict) else {} if y == self.null_label else {y: 1.0} for y in asked]
        most = max(map(len, sums))
        rows = [[*y.items(), *[(0, 0.0)] * (most - len(y))] for y in sums]
        numbers = torch.tensor([[label for label, _ in row] for row in rows], device=device)
        return numbers, torch.tensor([[weight for _, weight in row] for row in rows], device=device)

    def field(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The field at x (N, C, [T,] h, w) of the labels y (N,), without guidance."""
        with torch.no_grad(), self.run_in.autocast():
            return _mean([each.transport.field(each.model(x, t, each.labels(y))) for each in self.networks])

    def guided(self, labels: Sequence[str | int | Asked] | Tensor, scale: float, channels: int | None = 3) -> Guided:
        """The field of these samples with classifier-free guidance: see guidance.Guided."""
        y, weights = self.as_tensors(labels)
        return Guided(self.field, y, scale, self.null_label, channels, weights)

    @property
    def has_energy(self) -> bool:
        return all(network.model.ebm != "none" for network in self.networks)

    def energy(self, x: Tensor, labels: Sequence[str | int | Asked] | Tensor, t: Tensor | None = None) -> Tensor:
        """The energy at x, (N,), at times t (N,), left out 0; of a sum E_null + sum of w_i (E_i - E_null).

        Raises UserError if there is none.
        """
        if not self.has_energy:
            raise UserError("this model has no explicit energy: it was trained without --ebm")
        y, weights = self.as_tensors(labels)
        t = torch.zeros(len(x), device=x.device) if t is None else t
        if weights is None:
            return self._energy(x, t, y)
        without = self._energy(x, t, torch.full_like(y[:, 0], self.null_label))
        each = zip(y.unbind(1), weights.unbind(1), strict=True)
        return without + sum(weight * (self._energy(x, t, label) - without) for label, weight in each)

    def _energy(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad(), self.run_in.autocast():
            return _mean([each.model(x, t, each.labels(y), get_energy=True)[1] for each in self.networks])

    @contextmanager
    def modulated_once(self) -> Iterator[None]:
        """Within it, what a label makes of a network is computed once: see engine.acceleration."""
        with ExitStack() as stack:
            for network in self.networks:
                stack.enter_context(modulated_once(network.model))
            yield


def _names(class_names: Sequence[str] | None, model: EqM) -> list[str]:
    """A name for each class: what a checkpoint says, and numbers where it says nothing."""
    named = list(class_names or [])
    return named + [str(i) for i in range(len(named), model.num_classes)]


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else sum(values[1:], start=values[0]) / len(values)
