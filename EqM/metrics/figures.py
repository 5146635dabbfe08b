"""FID, KID, Inception Score, precision and recall, as functions of features.

Letters: N items, D features, k neighbours. Features come in as FP32 rows (N, D); every sum here is FP64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SEED = 2020  # torch-fidelity's, so that its subsets and splits are ours
SPLITS = 10  # of the Inception Score
SUBSETS, SUBSET = 100, 1000  # of KID: how many, and of how many items at most
NEIGHBOURS = 3  # precision and recall: the ball of an item reaches to its third neighbour
ROWS, COLUMNS = 1_000, 4_000  # items in FP64 at once: 16 and 66 MB, and 32 MB of distances


class Moments:
    """Count, mean and covariance of rows that come in batch by batch, in FP64.

    Up to D rows are kept as they are; more are summed by Chan, Golub and LeVeque's update (1983), which loses no digits
    where the mean is large against the spread.
    """

    def __init__(self) -> None:
        self.count = 0
        self.size = 0  # D, once rows have come
        self._summed = 0  # how many of them are in mean and scatter
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None
        self._rows: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Take in rows (n, D)."""
        self._rows.append(rows)
        self.count += len(rows)
        self.size = rows.shape[1]
        if self.count - self._summed > rows.shape[1]:
            self._sum_up()

    def _sum_up(self) -> None:
        rows, self._rows = torch.cat(self._rows).double(), []
        mean = rows.mean(0)
        rows = rows - mean
        self._join(len(rows), mean, rows.T @ rows)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self._summed, self._mean, self._scatter = count, mean, scatter
            return
        total = self._summed + count
        apart = mean - self._mean
        self._scatter += scatter
        self._scatter += torch.outer(apart, apart) * (self._summed * count / total)
        self._mean = self._mean + apart * (count / total)
        self._summed = total

    def state(self) -> dict[str, Any]:
        """What has come in, as plain values and tensors on the CPU."""
        if self._summed and self._rows:
            self._sum_up()
        rows = torch.cat(self._rows).cpu() if self._rows else None
        mean, scatter = (None if part is None else part.cpu() for part in (self._mean, self._scatter))
        return {"summed": self._summed, "mean": mean, "scatter": scatter, "rows": rows}

    def merge(self, state: dict[str, Any]) -> None:
        """Take in what other Moments hold."""
        if state["summed"]:
            self.count += state["summed"]
            self.size = len(state["mean"])
            self._join(state["summed"], state["mean"].clone(), state["scatter"].clone())
        if state["rows"] is not None:
            self.add(state["rows"])

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """(D,) and (D, D). The covariance divides by count - 1."""
        if self._rows:
            self._sum_up()
        assert self._mean is not None and self._scatter is not None
        return self._mean, self._scatter / max(1, self.count - 1)

    def gaussian(self) -> Gaussian:
        """The normal distribution of these moments."""
        if self._summed:
            return Gaussian.of(*self.mean_and_covariance())
        rows = torch.cat(self._rows).double()
        mean = rows.mean(0)
        return Gaussian(mean, (rows - mean) / max(1, len(rows) - 1) ** 0.5)


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution: mean (D,), and a root (r, D) with root' root = covariance. FP64."""

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """By eigenvalues, of which those that are rounding alone are dropped."""
        values, vectors = torch.linalg.eigh(covariance)
        real = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        return cls(mean, (vectors[:, real] * values[real].sqrt()).T.contiguous())


def frechet(one: Gaussian, other: Gaussian) -> float:
    """Squared Frechet distance of two normal distributions: |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2).

    With S = A'A the last trace is the sum of the singular values of A1 A2': no root of a product that is not symmetric.
    """
    apart = (one.mean - other.mean).square().sum()
    crossed = torch.linalg.svdvals(one.root @ other.root.T).sum()
    distance = apart + one.root.square().sum() + other.root.square().sum() - 2 * crossed
    return max(0.0, distance.item())  # of a set to itself rounding leaves 1e-13 of either sign


def kid(one: Tensor, other: Tensor, device: torch.device) -> tuple[float, float]:
    """Kernel Inception Distance (arXiv 1801.01401), mean and spread over subsets, as torch-fidelity but in FP64.

    Of 100 pairs of subsets of min(1000, count) items, drawn by position. Needs two items on both sides.
    """
    size = min(SUBSET, len(one), len(other))
    drawn = np.random.RandomState(SEED)
    found = []
    for _ in range(SUBSETS):
        mine, theirs = (
            features[torch.from_numpy(drawn.choice(len(features), size, replace=False))].to(device).double()
            for features in (one, other)
        )
        found.append(_mmd(mine, theirs))
    values = torch.stack(found).cpu().numpy()
    return float(values.mean()), float(values.std())


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of the squared MMD under the kernel (x'y / D + 1)^3."""
    m, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return within / (m * (m - 1)) - 2 * xy.mean()


def inception_score(features: Tensor, weight: Tensor) -> float:
    """Inception Score (arXiv 1606.03498): mean over 10 splits, shuffled as torch-fidelity does. Needs 10 items.

    weight: (classes, D) of the network's last layer, whose bias the published score leaves out. Of a split, the mean of
    KL(p_i, q) with q the mean of the p_i is the mean of sum p_i log p_i, less sum q log q.
    """
    order = torch.from_numpy(np.random.RandomState(SEED).permutation(len(features)))
    weight = weight.double()
    scores = []
    for i in range(SPLITS):
        rows = order[i * len(order) // SPLITS : (i + 1) * len(order) // SPLITS]
        q, own = torch.zeros_like(weight[:, 0]), torch.zeros_like(weight[0, 0])
        for part in rows.split(ROWS):
            logs = (features[part].to(weight.device).double() @ weight.T).log_softmax(1)
            p = logs.exp()
            q += p.sum(0) / len(rows)
            own += (p * logs).sum() / len(rows)
        scores.append((own - torch.special.xlogy(q, q).sum()).exp())
    return torch.stack(scores).mean().item()


def precision_recall(judged: Tensor, real: Tensor, device: torch.device, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): how many of one set lie in a ball of the other.

    The ball of an item reaches to its k-th neighbour in its own set. Needs k + 1 items on both sides.
    """
    precision = _inside(judged, real, _radii(real, k, device), device)
    return precision, _inside(real, judged, _radii(judged, k, device), device)


def _radii(features: Tensor, k: int, device: torch.device) -> Tensor:
    return nearest(features, features, k + 1, device)[0][:, -1]  # the first is the item itself


def _inside(points: Tensor, centres: Tensor, radii: Tensor, device: torch.device) -> float:
    hits = 0
    for rows in points.split(ROWS):
        rows = rows.to(device).double()
        found = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for columns, reach in zip(centres.split(COLUMNS), radii.split(COLUMNS), strict=True):
            found |= (torch.cdist(rows, columns.to(device).double()) <= reach.to(device)).any(1)
        hits += int(found.sum())
    return hits / len(points)


def nearest(points: Tensor, items: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distances (N, k) in FP64 from each point to the k closest of the items, and their indices, closest first."""
    distances, indices = [], []
    for rows in points.split(ROWS):
        rows = rows.to(device).double()
        best = torch.empty(len(rows), 0, dtype=torch.float64, device=device)
        who = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
        for number, columns in enumerate(items.split(COLUMNS)):
            here = torch.cdist(rows, columns.to(device).double()).topk(min(k, len(columns)), largest=False)
            best, who = torch.cat([best, here.values], 1), torch.cat([who, here.indices + number * COLUMNS], 1)
            best, place = best.topk(min(k, best.shape[1]), largest=False)
            who = who.gather(1, place)
        distances.append(best.cpu())
        indices.append(who.cpu())
    return torch.cat(distances), torch.cat(indices)
