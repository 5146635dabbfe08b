"""Samplers and guidance against loops written out by hand, on fields that are plain functions."""

import math

import pytest
import torch

from EqM import samplers


def spring(x, t):
    """Gradient of -|x - 1|^2 / 2: pulls to one, whatever t."""
    return 1 - x


def test_gd_makes_one_update_less_than_points():
    x = torch.randn(2, 3, dtype=torch.float64)
    result = samplers.descend(spring, x, points=5, stepsize=0.1)
    torch.testing.assert_close(result, 1 + (x - 1) * 0.9**4)


def test_ngd_evaluates_at_the_point_that_momentum_leads_to():
    x = torch.randn(2, 3, dtype=torch.float64)
    result = samplers.descend(spring, x, points=6, stepsize=0.1, sampler="ngd", mu=0.3)
    m = torch.zeros_like(x)
    for _ in range(5):
        m = spring(x + 0.1 * 0.3 * m, None)
        x = x + 0.1 * m
    torch.testing.assert_close(result, x)


def test_ngd_without_momentum_is_gd():
    x = torch.randn(2, 3)
    assert torch.equal(samplers.descend(spring, x, 9, 0.1, "ngd", mu=0.0), samplers.descend(spring, x, 9, 0.1))


@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_both_samplers_reach_the_bottom_of_a_bowl(mu):
    x = torch.randn(4, 8)
    torch.testing.assert_close(samplers.descend(spring, x, 200, 0.1, "ngd", mu), torch.ones(4, 8), atol=1e-6, rtol=0)


def test_time_runs_evenly_from_the_start_of_the_interval():
    seen = []
    samplers.descend(lambda x, t: seen.append(t) or x, torch.zeros(3, 1), 5, 0.1, interval=(0.2, 1.0))
    assert all(t.shape == (3,) for t in seen)
    assert [t[0].item() for t in seen] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_x_stays_fp32_under_a_16_bit_field():
    """249 steps of 0.0017 on numbers near 1: in FP16 most of each step would be rounded away."""
    result = samplers.descend(lambda x, t: x.half(), torch.ones(1, 4), 250, 0.0017)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.full((1, 4), math.exp(249 * math.log(1.0017))), rtol=2e-3, atol=0)


def labelled(x, t, y):
    """A model whose answer shows its label and time: y + 1 in every channel, the last negative."""
    field = (y + 1 + t).view(-1, 1, 1).expand_as(x).clone()
    field[:, -1] *= -1
    return field


@pytest.mark.parametrize(("channels", "guided"), [(3, 3), (None, 5), (5, 5), (1, 1)])
def test_guidance_steers_the_leading_channels_and_leaves_the_rest_to_the_class(channels, guided):
    labels, null, t = torch.tensor([0, 2]), 9, torch.zeros(2)
    x = torch.zeros(2, 5, 4)
    result = samplers.guided(labelled, labels, 4.0, null, channels)(x, t)
    with_class, without = labelled(x, t, labels), labelled(x, t, torch.full_like(labels, null))
    expected = with_class.clone()
    expected[:, :guided] = (without + 4.0 * (with_class - without))[:, :guided]
    torch.testing.assert_close(result, expected)


def test_guidance_calls_the_model_once_a_step():
    sizes = []

    def model(x, t, y):
        sizes.append(len(x))
        return labelled(x, t, y)

    x, t, labels = torch.zeros(2, 4, 4), torch.zeros(2), torch.tensor([0, 1])
    samplers.guided(model, labels, 1.5, 2)(x, t)
    samplers.guided(model, labels, 1.0, 2)(x, t)
    assert sizes == [4, 2]


def test_without_guidance_the_field_is_the_class_conditional_one():
    x, t, labels = torch.zeros(2, 4, 4), torch.zeros(2), torch.tensor([0, 1])
    for scale in (1.0, 0.0):
        assert torch.equal(samplers.guided(labelled, labels, scale, 2)(x, t), labelled(x, t, labels))


def test_progress_sees_every_update():
    seen = []
    samplers.descend(spring, torch.zeros(1, 1), 7, 0.1, progress=lambda steps: (seen.append(i) or i for i in steps))
    assert seen == list(range(6))
