"""Sampling by following a learned field: eight samplers, adaptive compute, guidance and composition, on any field.

A field is a function `field(x, t) -> (N, ...)`, shaped like x, with t shaped (N,). A field whose answer depends on
which sample it is asked about, as `Guided` does, has `select(rows)`: the same field for those of its samples alone.
It is asked for that whenever samples leave or enter a batch. What a sampler keeps of a sample (x, momentum, step)
is the sample's own, so that its batch mates change nothing; it stays in the dtype x comes in, FP32 or FP64: a step
of 0.0017 added 249 times to a 16-bit number is mostly lost.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from EqM.transport import expand_like

SAMPLERS = ("gd", "ngd", "nag", "adam", "langevin", "euler", "heun", "dopri5")

Field = Callable[[Tensor, Tensor], Tensor]
LabelledField = Callable[[Tensor, Tensor, Tensor], Tensor]
Noise = Callable[[int, int], Tensor]
Progress = Callable[[Iterable[int]], Iterable[int]]

ADAM_EPS = 1e-8


class NoStep(ArithmeticError):
    """A sampler that picks its own steps finds none that is short enough."""


class Ends(NamedTuple):
    """Where a batch ended, x shaped (N, ...), and how often the field was evaluated for each sample."""

    x: Tensor
    evaluations: list[int]


class End(NamedTuple):
    """Where one sample ended: its number among those that came, x shaped (...), its evaluations of the field."""

    row: int
    x: Tensor
    evaluations: int


def descend(
    field: Field, x: Tensor, points: int, stepsize: float, sampler: str = "gd", progress: Progress = iter, **how: Any
) -> Tensor:
    """Follow the field from x, shaped (N, ...), to where it leads: `Descent(points, stepsize, sampler, ...).run`."""
    return Descent(points, stepsize, sampler, **how).run(field, x, progress).x


@dataclass(frozen=True)
class Descent:
    """How to follow a field; eta is the step size, f the field, and points - 1 updates are made, as published.

    gd        x + eta f(x)
    ngd       x + eta f(x + eta mu m), m the field of the step before: the published code's Nesterov
    nag       Nesterov's: x' = y + eta f(y), y = x + mu (x - x of the step before)
    adam      torch.optim.Adam with gradient -f, `betas`
    langevin  x + eta f(x) + sqrt(2 eta T) noise; T = temperature, with `anneal` falling evenly to 0 at the last step
    euler, heun, dopri5   the ODE dx/dk = eta f(x) for points - 1 units of k; dopri5 picks steps by `atol`, `rtol`

    noise: noise(row, step) gives a standard normal tensor shaped like one sample, for langevin; a function of these
    two numbers and of the caller's seed alone makes samples independent of their batch.
    stop_norm: a sample is done as soon as the L2 norm of the field, where the sampler evaluates it (heun: its first),
    is at most this; that step is not taken. 0 is off. interval: t runs evenly over it; models without time
    conditioning ignore it. Raises ValueError for settings that contradict each other.
    """

    points: int
    stepsize: float
    sampler: str = "gd"
    mu: float = 0.3
    betas: tuple[float, float] = (0.9, 0.999)
    temperature: float = 0.0
    anneal: bool = True
    noise: Noise | None = None
    atol: float = 1e-5
    rtol: float = 1e-5
    stop_norm: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"the sampler is {self.sampler!r}; it must be one of {', '.join(SAMPLERS)}")
        if self.temperature < 0 or self.stop_norm < 0:
            raise ValueError("temperature and stop norm must not be negative")
        if self.temperature and self.sampler != "langevin":
            raise ValueError(f"a temperature is langevin's; {self.sampler} adds no noise")
        if self.temperature and self.noise is None:
            raise ValueError("langevin with a temperature needs noise(row, step)")
        if self.stop_norm and self.sampler == "dopri5":
            raise ValueError("a stop norm does not go with dopri5, whose evaluations are not at the samples themselves")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"adam's betas are {self.betas}; each must be at least 0 and below 1")
        if self.sampler == "dopri5" and not (self.atol > 0 and self.rtol >= 0):
            raise ValueError("dopri5 needs atol above 0 and rtol of at least 0")

    @property
    def updates(self) -> int:
        return self.points - 1

    def time(self, step: float) -> float:
        """t after so many updates."""
        start, end = self.interval
        return start + (end - start) * step / self.updates

    def run(self, field: Field, x: Tensor, progress: Progress = iter) -> Ends:
        """Follow the field from each sample of x, shaped (N, ...). progress wraps the range of updates (tqdm, say).

        Samples that are done leave the batch, so that evaluations get cheaper; the call ends with the last of them.
        """
        rule = _RULES[self.sampler](self)
        if self.updates < 1 or not len(x):
            return Ends(x, [0] * len(x))
        batch = rule.enter(_Batch.of(field, x, list(range(len(x)))))
        gone: list[_Batch] = []
        for _ in progress(range(self.updates) if rule.counted else itertools.count()):
            batch, left = rule.advance(batch)
            gone.extend(left)
            if not batch.rows:
                break
        if batch.rows:  # progress ended before the samples did
            gone.append(batch)
        if len(gone) == 1:
            return Ends(gone[0].x, gone[0].evaluations)
        rows = [row for part in gone for row in part.rows]
        counts = [count for part in gone for count in part.evaluations]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        return Ends(torch.cat([part.x for part in gone])[order], [counts[i] for i in order])

    def stream(self, field: Field, samples: Iterable[Tensor], batch_size: int) -> Iterator[End]:
        """Follow the field from each of many samples, shaped (...), and yield each as it ends, in any order.

        A sample that is done makes room for the next one that waits, so that the batch stays full. The field's
        `select` counts samples as they come from the iterator, which is read no further than there is room.
        """
        if batch_size < 1:
            raise ValueError(f"a batch of {batch_size} samples cannot descend")
        rule = _RULES[self.sampler](self)
        waiting = enumerate(samples)
        if self.updates < 1:
            yield from (End(row, x, 0) for row, x in waiting)
        batch: _Batch | None = None
        while True:
            room = batch_size - (len(batch.rows) if batch else 0)
            new = list(itertools.islice(waiting, room))
            if new:
                x = torch.stack([sample for _, sample in new])
                entered = rule.enter(_Batch.of(field, x, [row for row, _ in new], select=True))
                batch = batch.join(entered) if batch else entered
            if batch is None or not batch.rows:
                return
            batch, gone = rule.advance(batch)
            for part in gone:
                yield from (End(*each) for each in zip(part.rows, part.x, part.evaluations, strict=True))


@dataclass
class _Batch:
    """Samples on their way. What is counted stands on the host, so that nothing waits for the device."""

    whole: Field
    field: Field  # whole, for the samples of this batch
    x: Tensor  # (n, ...)
    rows: list[int]
    steps: list[float]  # updates made; dopri5's are no whole numbers
    evaluations: list[int]
    kept: dict[str, Tensor]  # (n, ...) what a sampler remembers of each

    @classmethod
    def of(cls, whole: Field, x: Tensor, rows: list[int], select: bool = False) -> "_Batch":
        zeros = [0] * len(rows)
        return cls(whole, _select(whole, rows) if select else whole, x, rows, [*zeros], zeros, {})

    def take(self, at: Sequence[int]) -> "_Batch":
        """The samples at these places."""
        rows = [self.rows[i] for i in at]
        steps, evaluations = [self.steps[i] for i in at], [self.evaluations[i] for i in at]
        places = torch.tensor(at, dtype=torch.long, device=self.x.device)
        kept = {name: value[places.to(value.device)] for name, value in self.kept.items()}
        field = _select(self.whole, rows) if rows else self.field
        return _Batch(self.whole, field, self.x[places], rows, steps, evaluations, kept)

    def join(self, other: "_Batch") -> "_Batch":
        if not self.rows:
            return other
        rows = self.rows + other.rows
        kept = {name: torch.cat([value, other.kept[name]]) for name, value in self.kept.items()}
        steps, evaluations = self.steps + other.steps, self.evaluations + other.evaluations
        x = torch.cat([self.x, other.x])
        return _Batch(self.whole, _select(self.whole, rows), x, rows, steps, evaluations, kept)

    def spread(self, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
        """One number for each sample, (n,), beside x. Equal ones are filled in, which does not wait for the device."""
        if all(value == values[0] for value in values):
            return torch.full((len(values),), values[0], dtype=dtype or torch.get_default_dtype(), device=self.x.device)
        return torch.tensor(values, dtype=dtype or torch.get_default_dtype(), device=self.x.device)

    def scaled(self, values: Sequence[float], x: Tensor) -> Tensor:
        """x (n, ...) times one number for each sample."""
        return expand_like(self.spread(values, x.dtype), x) * x


def _select(whole: Field, rows: list[int]) -> Field:
    select = getattr(whole, "select", None)
    return whole if select is None else select(rows)


class _Gd:
    """x + eta f(x), and the frame of all samplers with a fixed number of updates."""

    counted = True

    def __init__(self, how: Descent) -> None:
        self.how = how

    def enter(self, batch: _Batch) -> _Batch:
        """The batch with what this sampler remembers of each sample, before its first update."""
        return batch

    def place(self, batch: _Batch) -> Tensor:
        """Where the field is evaluated, and its norm judged."""
        return batch.x

    def move(self, batch: _Batch, f: Tensor) -> None:
        """Make one update, given the field there."""
        batch.x = batch.x + self.how.stepsize * f

    def ask(self, batch: _Batch, x: Tensor, ahead: float | Sequence[float] = 0) -> Tensor:
        """The field at x, as many updates ahead of the samples, in the dtype of x."""
        further = ahead if isinstance(ahead, Sequence) else [ahead] * len(batch.rows)
        t = batch.spread([self.how.time(step + more) for step, more in zip(batch.steps, further, strict=True)])
        batch.evaluations = [count + 1 for count in batch.evaluations]
        return batch.field(x, t).to(x.dtype)

    def advance(self, batch: _Batch) -> tuple[_Batch, list[_Batch]]:
        """One update of each sample: those that go on, and those that are done."""
        f = self.ask(batch, self.place(batch))
        gone: list[_Batch] = []
        if self.how.stop_norm:
            still = (f.flatten(1).norm(dim=1) <= self.how.stop_norm).tolist()
            batch, f, gone = _part(batch, f, still)
        if batch.rows:
            self.move(batch, f)
            batch.steps = [step + 1 for step in batch.steps]
            batch, f, at_the_end = _part(batch, f, [step == self.how.updates for step in batch.steps])
            gone += at_the_end
        return batch, gone


def _part(batch: _Batch, f: Tensor, done: list[bool]) -> tuple[_Batch, Tensor, list[_Batch]]:
    """Those that go on and their field, and those that are done; whoever is all of the batch is not copied."""
    if not any(done):
        return batch, f, []
    if all(done):
        return batch.take([]), f[:0], [batch]
    stay = [i for i, is_done in enumerate(done) if not is_done]
    leave = [i for i, is_done in enumerate(done) if is_done]
    return batch.take(stay), f[stay], [batch.take(leave)]


class _Ngd(_Gd):
    def enter(self, batch: _Batch) -> _Batch:
        batch.kept["momentum"] = torch.zeros_like(batch.x)
        return batch

    def place(self, batch: _Batch) -> Tensor:
        return batch.x + self.how.stepsize * self.how.mu * batch.kept["momentum"]

    def move(self, batch: _Batch, f: Tensor) -> None:
        super().move(batch, f)
        batch.kept["momentum"] = f


class _Nag(_Gd):
    def enter(self, batch: _Batch) -> _Batch:
        batch.kept["before"] = batch.x
        return batch

    def place(self, batch: _Batch) -> Tensor:
        return batch.x + self.how.mu * (batch.x - batch.kept["before"])

    def move(self, batch: _Batch, f: Tensor) -> None:
        y = self.place(batch)
        batch.kept["before"] = batch.x
        batch.x = y + self.how.stepsize * f


class _Adam(_Gd):
    def enter(self, batch: _Batch) -> _Batch:
        batch.kept.update(mean=torch.zeros_like(batch.x), square=torch.zeros_like(batch.x))
        return batch

    def move(self, batch: _Batch, f: Tensor) -> None:
        beta1, beta2 = self.how.betas
        mean = batch.kept["mean"] = batch.kept["mean"].lerp(f, 1 - beta1)
        square = batch.kept["square"] = beta2 * batch.kept["square"] + (1 - beta2) * f.square()
        strides = [self.how.stepsize / (1 - beta1 ** (step + 1)) for step in batch.steps]
        sizes = [1 / math.sqrt(1 - beta2 ** (step + 1)) for step in batch.steps]
        batch.x = batch.x + batch.scaled(strides, mean) / (batch.scaled(sizes, square.sqrt()) + ADAM_EPS)


class _Langevin(_Gd):
    def move(self, batch: _Batch, f: Tensor) -> None:
        kicks = [math.sqrt(2 * self.how.stepsize * self._temperature(step)) for step in batch.steps]
        super().move(batch, f)
        if self.how.noise is not None and any(kicks):
            noise = [self.how.noise(row, int(step)) for row, step in zip(batch.rows, batch.steps, strict=True)]
            batch.x = batch.x + batch.scaled(kicks, torch.stack(noise).to(batch.x))

    def _temperature(self, step: float) -> float:
        if not self.how.anneal:
            return self.how.temperature
        last = self.how.updates - 1
        return self.how.temperature * (1 - step / last) if last else 0.0


class _Heun(_Gd):
    """The trapezoidal rule with Euler's step as its guess, of second order."""

    def move(self, batch: _Batch, f: Tensor) -> None:
        ahead = self.ask(batch, batch.x + self.how.stepsize * f, ahead=1)
        batch.x = batch.x + self.how.stepsize * (f + ahead) / 2


# Dormand and Prince 1980: after the first, each stage stands at NODES[i] of the step and weighs those before it. The
# last is at the step's end, so it is the next step's first. ERROR: fifth order minus the embedded fourth.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0  # as in Hairer, Norsett and Wanner, Solving ODEs I, II.4


class _Dopri5(_Gd):
    """Steps of dx/dk = eta f(x), each sample's as long as its own error allows; k counts the updates of gd."""

    counted = False

    def slope(self, batch: _Batch, x: Tensor, ahead: Sequence[float]) -> Tensor:
        return self.how.stepsize * self.ask(batch, x, ahead)

    def size(self, error: Tensor, *states: Tensor) -> list[float]:
        """Root mean square of each sample's error over its tolerance, which grows with the largest of the states."""
        largest = torch.stack([state.abs() for state in states]).amax(0)
        return (error / (self.how.atol + self.how.rtol * largest)).flatten(1).square().mean(1).sqrt().tolist()

    def enter(self, batch: _Batch) -> _Batch:
        """The first slope, and a first step of about the right length (II.4, "Starting Step Size")."""
        nowhere = [0.0] * len(batch.rows)
        first = self.slope(batch, batch.x, nowhere)
        sizes = zip(self.size(batch.x, batch.x), self.size(first, batch.x), strict=True)
        trial = [0.01 * d0 / d1 if d0 > 1e-5 and d1 > 1e-5 else 1e-6 for d0, d1 in sizes]
        trial = [min(max(h, 1e-6), self.how.updates) for h in trial]
        second = self.slope(batch, batch.x + batch.scaled(trial, first), trial)
        bends = [d / h for d, h in zip(self.size(second - first, batch.x), trial, strict=True)]
        steepest = [max(pair) for pair in zip(self.size(first, batch.x), bends, strict=True)]
        guess = [(0.01 / d) ** 0.2 if d > 1e-15 else max(1e-6, h * 1e-3) for d, h in zip(steepest, trial, strict=True)]
        length = [min(100 * h, g) for h, g in zip(trial, guess, strict=True)]
        batch.kept.update(slope=first, length=torch.tensor(length, dtype=torch.float64))
        batch.kept["most"] = torch.full((len(length),), GROW, dtype=torch.float64)
        return batch

    def advance(self, batch: _Batch) -> tuple[_Batch, list[_Batch]]:
        """One attempt of each sample, taken if its error is within tolerance, else shortened."""
        rests = [self.how.updates - step for step in batch.steps]
        lengths = [min(h, rest) for h, rest in zip(batch.kept["length"].tolist(), rests, strict=True)]
        slopes = [batch.kept["slope"]]
        x = batch.x
        for node, weights in zip(NODES, STAGES, strict=True):
            x = batch.x + batch.scaled(lengths, _weigh(weights, slopes))
            slopes.append(self.slope(batch, x, [node * h for h in lengths]))
        errors = self.size(batch.scaled(lengths, _weigh(ERROR, slopes)), batch.x, x)

        good = [error <= 1 for error in errors]
        most = batch.kept["most"].tolist()
        following = [h * _factor(error, top) for h, error, top in zip(lengths, errors, most, strict=True)]
        shortest = 10 * torch.finfo(x.dtype).eps * self.how.updates
        if not all(fits or h > shortest for h, fits in zip(following, good, strict=True)):
            raise NoStep("dopri5 finds no step short enough: the field is not finite, or not continuous")
        taken = expand_like(torch.tensor(good, device=x.device), x)
        batch.x, batch.kept["slope"] = (
            torch.where(taken, new, old) for new, old in ((x, batch.x), (slopes[-1], slopes[0]))
        )
        batch.kept["length"] = torch.tensor(following, dtype=torch.float64)
        batch.kept["most"] = torch.tensor([GROW if fits else 1.0 for fits in good], dtype=torch.float64)
        ends = [fits and h == rest for h, rest, fits in zip(lengths, rests, good, strict=True)]
        batch.steps = [step + h * fits for step, h, fits in zip(batch.steps, lengths, good, strict=True)]
        batch, _, gone = _part(batch, x, ends)
        return batch, gone


def _weigh(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        total = total + weight * slope if weight else total
    return total


def _factor(error: float, most: float) -> float:
    """By what the next step is longer. `most` after a refused step is 1: it does not grow at once."""
    if not math.isfinite(error):
        return SHRINK
    return min(most, max(SHRINK, SAFETY * error**-0.2)) if error else most


_RULES: dict[str, type[_Gd]] = {
    "gd": _Gd, "ngd": _Ngd, "nag": _Nag, "adam": _Adam,
    "langevin": _Langevin, "euler": _Gd, "heun": _Heun, "dopri5": _Dopri5,
}  # fmt: skip


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


def guided(
    field: LabelledField,
    labels: Tensor,
    scale: float,
    null_label: int,
    channels: int | None = 3,
    weights: Tensor | None = None,
) -> Guided:
    """The guided field of some samples, to descend: see `Guided`."""
    return Guided(field, labels, scale, null_label, channels, weights)


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
        label, weight = _label(name.strip(), class_names), _finite(number)
        if label is None:
            raise ValueError(f"{name.strip()!r} in {text!r} is no class")
        if weight is None:
            raise ValueError(f"{number.strip()!r} in {text!r} is no weight")
        total[label] = total.get(label, 0.0) + weight
    return {label: weight for label, weight in total.items() if weight}


def _label(name: str, class_names: Sequence[str]) -> int | None:
    if name in class_names:
        return class_names.index(name)
    return int(name) if name.isdecimal() and int(name) < len(class_names) else None


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
