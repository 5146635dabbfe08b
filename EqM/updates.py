"""The updates of eight samplers, and the batch of samples that they move: what `samplers.Descent` is made of.

What a sampler keeps of a sample (x, momentum, step) is the sample's own, so that its batch mates change nothing; it
stays in the dtype x comes in, FP32 or FP64: a step of 0.0017 added 249 times to a 16-bit number is mostly lost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from EqM.transport import expand_like

SAMPLERS = ("gd", "ngd", "nag", "adam", "langevin", "euler", "heun", "dopri5")

Field = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int, int], Tensor]
Observer = Callable[[Sequence[int], Sequence[float], Tensor, Tensor], None]

OF_ONE_SAMPLER = {  # setting: whose it is, in a name and in words
    "betas": ("adam", "betas are adam's"),
    "temperature": ("langevin", "a temperature is langevin's, the one that adds noise"),
    "anneal": ("langevin", "noise to anneal is langevin's"),
    "atol": ("dopri5", "tolerances are dopri5's, the one that picks its own steps"),
    "rtol": ("dopri5", "tolerances are dopri5's, the one that picks its own steps"),
}
ADAM_EPS = 1e-8


class NoStep(ArithmeticError):
    """A sampler that picks its own steps finds none that is short enough."""


@dataclass(frozen=True)
class Settings:
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
    conditioning ignore it. observe(rows, steps, x, f) sees, before each update, which samples of the batch stand at
    which step, where, and the field there (dopri5: at each attempt); what it is given stays as it is.

    Raises ValueError for settings that contradict each other.
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
    observe: Observer | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"the sampler is {self.sampler!r}; it must be one of {', '.join(SAMPLERS)}")
        if self.temperature < 0 or self.stop_norm < 0:
            raise ValueError("temperature and stop norm must not be negative")
        for name, (owner, words) in OF_ONE_SAMPLER.items():
            if getattr(self, name) != getattr(Settings, name) and self.sampler != owner:
                raise ValueError(f"{words}, and the sampler is {self.sampler}")
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


@dataclass
class Batch:
    """Samples on their way. What is counted stands on the host, so that nothing waits for the device."""

    whole: Field
    x: Tensor  # (n, ...)
    rows: list[int]
    steps: list[float]  # updates made; dopri5's are no whole numbers
    evaluations: list[int]
    kept: dict[str, Tensor]  # (n, ...) what a sampler remembers of each

    @classmethod
    def of(cls, whole: Field, x: Tensor, rows: list[int]) -> "Batch":
        """Samples before their first update."""
        zeros = [0] * len(rows)
        return cls(whole, x, rows, [*zeros], zeros, {})

    @cached_property
    def field(self) -> Field:
        """The whole field, for the samples of this batch."""
        select = getattr(self.whole, "select", None)
        return self.whole if select is None else select(self.rows)

    def take(self, at: Sequence[int]) -> "Batch":
        """The samples at these places."""
        rows = [self.rows[i] for i in at]
        steps, evaluations = [self.steps[i] for i in at], [self.evaluations[i] for i in at]
        places = torch.tensor(at, dtype=torch.long, device=self.x.device)
        kept = {name: value[places.to(value.device)] for name, value in self.kept.items()}
        return Batch(self.whole, self.x[places], rows, steps, evaluations, kept)

    def join(self, other: "Batch") -> "Batch":
        """The samples of both, these first."""
        if not self.rows:
            return other
        kept = {name: torch.cat([value, other.kept[name]]) for name, value in self.kept.items()}
        steps, evaluations = self.steps + other.steps, self.evaluations + other.evaluations
        return Batch(self.whole, torch.cat([self.x, other.x]), self.rows + other.rows, steps, evaluations, kept)

    def spread(self, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
        """One number for each sample, (n,), beside x. Equal ones are filled in, which does not wait for the device."""
        if all(value == values[0] for value in values):
            return torch.full((len(values),), values[0], dtype=dtype or torch.get_default_dtype(), device=self.x.device)
        return torch.tensor(values, dtype=dtype or torch.get_default_dtype(), device=self.x.device)

    def scaled(self, values: Sequence[float], x: Tensor) -> Tensor:
        """x (n, ...) times one number for each sample."""
        return expand_like(self.spread(values, x.dtype), x) * x


class _Gd:
    """x + eta f(x), and the frame of all samplers with a fixed number of updates."""

    counted = True

    def __init__(self, how: Settings) -> None:
        self.how = how

    def enter(self, batch: Batch) -> Batch:
        """The batch with what this sampler remembers of each sample, before its first update."""
        return batch

    def place(self, batch: Batch) -> Tensor:
        """Where the field is evaluated, and its norm judged."""
        return batch.x

    def move(self, batch: Batch, f: Tensor) -> None:
        """Make one update, given the field there."""
        batch.x = batch.x + self.how.stepsize * f

    def ask(self, batch: Batch, x: Tensor, ahead: float | Sequence[float] = 0) -> Tensor:
        """The field at x, as many updates ahead of the samples, in the dtype of x."""
        further = ahead if isinstance(ahead, Sequence) else [ahead] * len(batch.rows)
        t = batch.spread([self.how.time(step + more) for step, more in zip(batch.steps, further, strict=True)])
        batch.evaluations = [count + 1 for count in batch.evaluations]
        return batch.field(x, t).to(x.dtype)

    def show(self, batch: Batch, f: Tensor) -> None:
        if self.how.observe is not None:
            self.how.observe(batch.rows, batch.steps, batch.x, f)

    def advance(self, batch: Batch) -> tuple[Batch, list[Batch]]:
        """One update of each sample: those that go on, and those that are done."""
        f = self.ask(batch, self.place(batch))
        self.show(batch, f)
        gone: list[Batch] = []
        if self.how.stop_norm:
            still = (f.flatten(1).norm(dim=1) <= self.how.stop_norm).tolist()
            batch, f, gone = _part(batch, f, still)
        if batch.rows:
            self.move(batch, f)
            batch.steps = [step + 1 for step in batch.steps]
            batch, f, at_the_end = _part(batch, f, [step == self.how.updates for step in batch.steps])
            gone += at_the_end
        return batch, gone


def _part(batch: Batch, f: Tensor, done: list[bool]) -> tuple[Batch, Tensor, list[Batch]]:
    """Those that go on and their field, and those that are done; whoever is all of the batch is not copied."""
    if not any(done):
        return batch, f, []
    if all(done):
        return batch.take([]), f[:0], [batch]
    stay = [i for i, is_done in enumerate(done) if not is_done]
    leave = [i for i, is_done in enumerate(done) if is_done]
    return batch.take(stay), f[stay], [batch.take(leave)]


class _Ngd(_Gd):
    def enter(self, batch: Batch) -> Batch:
        batch.kept["momentum"] = torch.zeros_like(batch.x)
        return batch

    def place(self, batch: Batch) -> Tensor:
        return batch.x + self.how.stepsize * self.how.mu * batch.kept["momentum"]

    def move(self, batch: Batch, f: Tensor) -> None:
        super().move(batch, f)
        batch.kept["momentum"] = f


class _Nag(_Gd):
    def enter(self, batch: Batch) -> Batch:
        batch.kept["before"] = batch.x
        return batch

    def place(self, batch: Batch) -> Tensor:
        return batch.x + self.how.mu * (batch.x - batch.kept["before"])

    def move(self, batch: Batch, f: Tensor) -> None:
        y = self.place(batch)
        batch.kept["before"] = batch.x
        batch.x = y + self.how.stepsize * f


class _Adam(_Gd):
    def enter(self, batch: Batch) -> Batch:
        batch.kept.update(mean=torch.zeros_like(batch.x), square=torch.zeros_like(batch.x))
        return batch

    def move(self, batch: Batch, f: Tensor) -> None:
        beta1, beta2 = self.how.betas
        mean = batch.kept["mean"] = batch.kept["mean"].lerp(f, 1 - beta1)
        square = batch.kept["square"] = beta2 * batch.kept["square"] + (1 - beta2) * f.square()
        strides = [self.how.stepsize / (1 - beta1 ** (step + 1)) for step in batch.steps]
        sizes = [1 / math.sqrt(1 - beta2 ** (step + 1)) for step in batch.steps]
        batch.x = batch.x + batch.scaled(strides, mean) / (batch.scaled(sizes, square.sqrt()) + ADAM_EPS)


class _Langevin(_Gd):
    def move(self, batch: Batch, f: Tensor) -> None:
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

    def move(self, batch: Batch, f: Tensor) -> None:
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

    def slope(self, batch: Batch, x: Tensor, ahead: Sequence[float]) -> Tensor:
        return self.how.stepsize * self.ask(batch, x, ahead)

    def size(self, error: Tensor, *states: Tensor) -> list[float]:
        """Root mean square of each sample's error over its tolerance, which grows with the largest of the states."""
        largest = torch.stack([state.abs() for state in states]).amax(0)
        return (error / (self.how.atol + self.how.rtol * largest)).flatten(1).square().mean(1).sqrt().tolist()

    def enter(self, batch: Batch) -> Batch:
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

    def advance(self, batch: Batch) -> tuple[Batch, list[Batch]]:
        """One attempt of each sample, taken if its error is within tolerance, else shortened."""
        rests = [self.how.updates - step for step in batch.steps]
        lengths = [min(h, rest) for h, rest in zip(batch.kept["length"].tolist(), rests, strict=True)]
        slopes = [batch.kept["slope"]]
        self.show(batch, slopes[0] / self.how.stepsize)
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


RULES: dict[str, type[_Gd]] = {
    "gd": _Gd, "ngd": _Ngd, "nag": _Nag, "adam": _Adam,
    "langevin": _Langevin, "euler": _Gd, "heun": _Heun, "dopri5": _Dopri5,
}  # fmt: skip
