"""Figures from features: equal to torch-fidelity's own functions and to closed forms, whatever order and parts."""

import numpy as np
import pytest
import torch
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

from EqM.metrics import figures
from EqM.metrics.figures import Gaussian, Moments, frechet

CPU = torch.device("cpu")
D = 48


@pytest.fixture(scope="module")
def sets():
    """Features of 2,000 judged and 2,000 real items, FP32 with a mean that is large against their spread."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(D, D)) / D**0.5
    one, other = rng.normal(size=(2, 2000, D))
    judged, real = (one @ mix).clip(-0.5) + 3, (other @ (mix + 0.02)).clip(-0.6) + 3.05
    return torch.from_numpy(judged).float(), torch.from_numpy(real).float()


def moments_of(rows, *cuts):
    moments = Moments()
    for part in rows.tensor_split(cuts):
        moments.add(part)
    return moments


def fid(one, other):
    return frechet(moments_of(one).gaussian(), moments_of(other).gaussian())


def test_figures_are_torch_fidelitys_on_the_same_2000_items(sets, monkeypatch):
    statistics = [metric_fid.fid_features_to_statistics(each.double()) for each in sets]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert fid(*sets) == pytest.approx(theirs, rel=1e-6)

    monkeypatch.setattr(figures, "SUBSETS", 3)  # of 100, which take half a minute
    theirs = metric_kid.kid_features_to_metric(*(each.double() for each in sets), kid_subsets=3, verbose=False)
    mean, spread = figures.kid(*sets, CPU)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-9)
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-9)

    weight = torch.randn(20, D, generator=torch.Generator().manual_seed(0))
    theirs = metric_isc.isc_features_to_metric(sets[0] @ weight.T)["inception_score_mean"]
    assert figures.inception_score(sets[0], weight) == pytest.approx(theirs, rel=1e-6)

    theirs = metric_prc.prc_features_to_metric(*sets, verbose=False)
    precision, recall = figures.precision_recall(*sets, CPU)
    assert 0.1 < recall < 1 and 0.1 < precision < 1
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def test_fid_of_known_normal_distributions_is_the_closed_form():
    rng = np.random.default_rng(1)
    turned, _ = np.linalg.qr(rng.normal(size=(D, D)))
    means, values = rng.normal(size=(2, D)), rng.uniform(0.1, 4, (2, D))  # of covariances that commute
    one, other = (
        Gaussian.of(torch.from_numpy(mean), torch.from_numpy(turned @ np.diag(value) @ turned.T))
        for mean, value in zip(means, values, strict=True)
    )
    exact = ((means[0] - means[1]) ** 2).sum() + ((values[0] ** 0.5 - values[1] ** 0.5) ** 2).sum()
    assert frechet(one, other) == pytest.approx(exact, rel=1e-12)
    a, b = (rng.normal(size=(D, D)) for _ in range(2))  # and of some that do not: the root of S1 S2 by its eigenvalues
    s, r = torch.from_numpy(a @ a.T), torch.from_numpy(b @ b.T)
    exact = s.trace() + r.trace() - 2 * torch.linalg.eigvals(s @ r).real.sqrt().sum()
    assert frechet(Gaussian.of(torch.zeros(D).double(), s), Gaussian.of(torch.zeros(D).double(), r)) == pytest.approx(
        exact.item(), rel=1e-8
    )


@pytest.mark.parametrize("count", [5, D, D + 1, 2000])
def test_fid_of_a_set_against_itself_is_0(sets, count):
    rows = sets[0][:count]
    assert fid(rows, rows) < 1e-10
    assert frechet(Gaussian.of(*moments_of(rows).mean_and_covariance()), moments_of(rows).gaussian()) < 1e-6


@pytest.mark.parametrize("count", [20, 2000])
def test_moments_do_not_depend_on_order_batches_or_ranks(sets, count):
    rows = sets[0][:count]
    whole = fid(rows, sets[1])
    mixed = rows[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    parts = moments_of(mixed, 7, 8, 15)
    ranks = Moments()
    for rank in range(3):
        ranks.merge(moments_of(mixed[rank::3], 5).state())
    for other in (parts, ranks):
        assert other.count == count
        assert frechet(other.gaussian(), moments_of(sets[1]).gaussian()) == pytest.approx(whole, rel=1e-9)
    mean, covariance = ranks.mean_and_covariance()
    assert np.allclose(mean, rows.double().mean(0), rtol=1e-12)
    assert np.allclose(covariance, np.cov(rows.double().numpy().T), rtol=1e-9, atol=1e-13)


def test_moments_keep_digits_where_the_mean_is_large():
    rows = torch.randn(500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for part in (moments_of(rows, 100, 200), moments_of(rows + 1e6, 100, 200)):
        assert np.allclose(part.mean_and_covariance()[1], np.cov(rows.numpy().T), rtol=1e-8, atol=1e-9)


def test_precision_and_recall_do_not_depend_on_order_or_on_parts_in_memory(sets, monkeypatch):
    whole = figures.precision_recall(*sets, CPU)
    monkeypatch.setattr(figures, "ROWS", 700)
    monkeypatch.setattr(figures, "COLUMNS", 300)
    assert figures.precision_recall(sets[0].flip(0), sets[1].flip(0), CPU) == whole
    assert figures.precision_recall(sets[0][:100], sets[0][:100], CPU) == (1, 1)


def test_nearest_are_the_nearest_wherever_they_lie(sets, monkeypatch):
    monkeypatch.setattr(figures, "COLUMNS", 300)
    distances, indices = figures.nearest(sets[0][:50], sets[1], 3, CPU)
    exact = torch.cdist(sets[0][:50].double(), sets[1].double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = exact.topk(3, largest=False)
    assert torch.equal(indices, expected.indices) and torch.allclose(distances, expected.values)


def test_kid_takes_all_of_few_items_whatever_their_order(sets):
    few, many = sets[0][:400], sets[1][:400]
    mean, spread = figures.kid(few, many, CPU)
    assert figures.kid(few.flip(0), many.flip(0), CPU) == pytest.approx((mean, spread), abs=1e-12)
    assert spread < 1e-12, "subsets of min(1000, 400) are all the same"
