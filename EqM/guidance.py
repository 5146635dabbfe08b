"""Guidance and composition: the field of a sample's class, or of a sum of classes, and how such a sum is written.

Fields add, as energies do: f = f_null + sum over a sample's classes of s_i (f_i - f_null).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from EqM.transport import expand_like

Field = Callable[[Tensor, Tensor], Tensor]
LabelledField = Callable[[Tensor, Tensor, Tensor], Tensor]


class Guided:
    """The guided field of some samples: f_null + sum over a sample's classes of s_i (f_i - f_null).

    field: called as field(x, t, y). labels: (N,), or (N, K) with weights (N, K) for sums of classes. s_i is
    scale * w_i on the guided channels and w_i on the rest. channels: how many leading channels are guided; the
    published setting is 3. None guides all. Classes of weight 0 are left out; a single class of weight 1 has its
    own field where it is not guided, and at a scale of 1 or less, which is no guidance, as published, nothing else.
    Each call evaluates the field once, in one batch.
    """

    def __init__(
        self,
        field: LabelledField,
        labels: Tensor,
        scale: float,
        null_label: int,
        channels: int | None = 3,
        weights: Tensor | None = None,
    ) -> None:
        self.field, self.scale, self.null_label, self.channels = field, max(scale, 1.0), null_label, channels
        self.labels, self.weights = labels, weights
        if weights is None:
            self._evaluate = self._one_class(labels)
            return
        # (N,) whether a sample is of one class alone. This looks at the numbers, so it waits for the device.
        self._alone = ((weights != 0).sum(1) == 1) & (weights.sum(1) == 1)
        if bool(self._alone.all()):
            self._evaluate = self._one_class(labels.gather(1, (weights != 0).long().argmax(1, keepdim=True)).squeeze(1))
        else:
            self._evaluate = self._sums(labels, weights)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self._evaluate(x, t)

    def select(self, rows: Sequence[int]) -> "Guided":
        """The guided field of the samples with these numbers."""
        at = torch.tensor(rows, dtype=torch.long, device=self.labels.device)
        weights = None if self.weights is None else self.weights[at]
        return Guided(self.field, self.labels[at], self.scale, self.null_label, self.channels, weights)

    def _one_class(self, labels: Tensor) -> Field:
        if self.scale <= 1:
            return lambda x, t: self.field(x, t, labels)
        both_labels = torch.cat([labels, torch.full_like(labels, self.null_label)])

        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            with_class, without = self.field(torch.cat([x, x]), torch.cat([t, t]), both_labels).chunk(2)
            steered = self._steered(without, with_class - without)
            return self._merged(steered, with_class)

        return evaluate

    def _sums(self, labels: Tensor, weights: Tensor) -> Field:
        N = len(labels)
        sample, place = weights.nonzero(as_tuple=True)  # (M,) each, one for every class of every sample
        weight = weights[sample, place]
        everyone = torch.arange(N, device=labels.device)
        asked = torch.cat([sample, everyone])  # (M + N,)
        all_labels = torch.cat([labels[sample, place], torch.full_like(everyone, self.null_label)])

        def total(parts: Tensor) -> Tensor:
            """(M, ...) -> (N, ...), each sample's classes added in their order, so that a GPU always rounds alike."""
            each = parts.new_zeros(*weights.shape, *parts.shape[1:])
            each[sample, place] = parts
            return sum(each.unbind(1)[1:], start=each[:, 0])

        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            with_class, without = self.field(x[asked], t[asked], all_labels).split([len(sample), N])
            toward = total(expand_like(weight.to(without.dtype), without) * (with_class - without[sample]))
            unguided = torch.where(expand_like(self._alone, x), total(with_class), without + toward)
            return self._merged(self._steered(without, toward), unguided) if self.scale > 1 else unguided

        return evaluate

    def _steered(self, without: Tensor, toward: Tensor) -> Tensor:
        return without[:, : self.channels] + self.scale * toward[:, : self.channels]

    def _merged(self, steered: Tensor, unguided: Tensor) -> Tensor:
        return steered if self.channels is None else torch.cat([steered, unguided[:, self.channels :]], dim=1)


def class_weights(text: str, class_names: Sequence[str]) -> dict[int, float]:
    """Label -> weight of a class, or of a sum of classes such as "panda*0.7+valley*0.3"; weights of 0 are left out.

    A class is a name or a number, and counts once if no weight follows it. One whose whole name is the text wins over
    a sum. Raises ValueError, which names the part that is no class or no weight.
    """
    if text in class_names:
        return {class_names.index(text): 1.0}
    total: dict[int, float] = {}
    for part in text.split("+"):
        name, star, number = part.strip().rpartition("*")
        if not star or part.strip() in class_names:
            name, number = part.strip(), "1"
        label, weight = label_of(name.strip(), class_names), _finite(number)
        if label is None:
            raise ValueError(f"{name.strip()!r} in {text!r} is no class")
        if weight is None:
            raise ValueError(f"{number.strip()!r} in {text!r} is no weight")
        total[label] = total.get(label, 0.0) + weight
    return {label: weight for label, weight in total.items() if weight}


def label_of(name: str, class_names: Sequence[str]) -> int | None:
    """The label of a class, by its name or else its number; None if there is no such class."""
    if name in class_names:
        return class_names.index(name)
    return int(name) if name.isdecimal() and int(name) < len(class_names) else None


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
