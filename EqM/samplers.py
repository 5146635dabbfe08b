"""Sampling by following a learned field: eight samplers and adaptive compute, on any field.

A field is a function `field(x, t) -> (N, ...)`, shaped like x, with t shaped (N,). A field whose answer depends on
which sample it is asked about, as `guidance.Guided` does, has `select(rows)`: the same field for those of its samples
alone. It is asked for that whenever samples leave or enter a batch.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from EqM.updates import RULES, SAMPLERS, Batch, Field, Noise, NoStep, Observer, Settings

__all__ = ["SAMPLERS", "Descent", "End", "Ends", "Field", "NoStep", "Noise", "Observer", "descend"]

Progress = Callable[[Iterable[int]], Iterable[int]]

STEPSIZES = dict.fromkeys(SAMPLERS, 0.0017) | {"adam": 0.02}  # as published; adam divides the field by its own size


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
class Descent(Settings):
    """How to follow a field, and following it: see `Settings`."""

    def run(self, field: Field, x: Tensor, progress: Progress = iter) -> Ends:
        """Follow the field from each sample of x, shaped (N, ...). progress wraps the range of updates (tqdm, say).

        Samples that are done leave the batch, so that evaluations get cheaper; the call ends with the last of them.
        """
        rule = RULES[self.sampler](self)
        if self.updates < 1 or not len(x):
            return Ends(x, [0] * len(x))
        batch = Batch.of(field, x, list(range(len(x))))
        batch.field = field  # of all its samples, as it came
        batch = rule.enter(batch)
        gone: list[Batch] = []
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

    def stream(
        self, field: Field, samples: Iterable[Tensor], batch_size: int, progress: Progress = iter
    ) -> Iterator[End]:
        """Follow the field from each of many samples, shaped (...), and yield each as it ends, in any order.

        A sample that is done makes room for the next one that waits, so that the batch stays full. The field's
        `select` counts samples as they come from the iterator, which is read no further than there is room. progress
        wraps the count of updates.
        """
        if batch_size < 1:
            raise ValueError(f"a batch of {batch_size} samples cannot descend")
        rule = RULES[self.sampler](self)
        waiting = enumerate(samples)
        if self.updates < 1:
            yield from (End(row, x, 0) for row, x in waiting)
        batch: Batch | None = None
        for _ in progress(itertools.count()):
            room = batch_size - (len(batch.rows) if batch else 0)
            new = list(itertools.islice(waiting, room))
            if new:
                x = torch.stack([sample for _, sample in new])
                entered = rule.enter(Batch.of(field, x, [row for row, _ in new]))
                batch = batch.join(entered) if batch else entered
            if batch is None or not batch.rows:
                return
            batch, gone = rule.advance(batch)
            for part in gone:
                yield from (End(*each) for each in zip(part.rows, part.x, part.evaluations, strict=True))
