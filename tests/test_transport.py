"""Paths, targets and losses against formulas written out by hand or differentiated numerically, in float64."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from EqM import transport
from EqM.transport import LOSS_WEIGHTS, PATHS, PREDICTIONS, Transport, c, dispersive_loss

COMBINATIONS = list(itertools.product(PATHS, PREDICTIONS))
MIDDLE = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


def pair(shape=(3, 2, 4, 4)):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def test_c_is_4_until_08_and_then_falls_to_0_in_a_straight_line():
    t = torch.tensor([0.0, 0.3, 0.8, 0.85, 0.9, 0.95, 1.0], dtype=torch.float64)
    torch.testing.assert_close(c(t), torch.tensor([4, 4, 4, 3, 2, 1, 0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2, 2, 2, 2, 2, 2]),
        ("linear", [2, 1.5, 1, 0.5, 0.25, 0]),
        ("truncated", [2, 2, 2, 1, 0.5, 0]),
        ("piecewise", [6, 4, 2, 1, 0.5, 0]),  # at a = 0.5: 2 (3 - 2 t / 0.5), then 2 (1 - t) / 0.5
    ],
)
def test_each_c_schedule_by_hand(schedule, expected):
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.875, 1.0], dtype=torch.float64)
    made = Transport(c_schedule=schedule, c_start=0.5, c_peak=3.0, c_scale=2.0)
    torch.testing.assert_close(made.c(t), torch.tensor(expected, dtype=torch.float64))
    x1, x0 = torch.ones(6, 2, 3, dtype=torch.float64), torch.zeros(6, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(made.plan(x0, x1, t).target, made.c(t).view(6, 1, 1).expand(6, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_c_has_the_bits_it_always_had(dtype):
    t = torch.rand(4096, dtype=dtype, generator=torch.Generator().manual_seed(0))
    always = 4 * torch.clamp((1 - t) / (1 - 0.8), max=1)
    assert torch.equal(c(t), always) and torch.equal(Transport().c(t), always)


def test_a_peak_of_one_is_the_truncated_schedule_and_a_high_peak_is_no_minimum():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(c(t, "piecewise"), c(t))
    high = c(t, "piecewise", start=0.5, peak=9.0, scale=1.0)
    assert high[0] == 9, "the lesser of the branches would be (1 - 0) / (1 - 0.5) = 2"
    assert (high.diff() < 0).all()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"c_schedule": "cosine"}, "one of constant, linear"),
        ({"c_start": 0.0}, "between 0 and 1"),
        ({"c_start": 1.0}, "between 0 and 1"),
        ({"c_start": math.nan}, "between 0 and 1"),
        ({"c_peak": -1.0}, "peak of c is -1"),
        ({"c_scale": 0.0}, "scale of c is 0"),
        ({"c_scale": math.inf}, "scale of c is inf"),
    ],
)
def test_what_is_no_c_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Transport(**wrong)


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (3, 4, 2, 8, 8)])
def test_linear_target_is_velocity_times_c_for_images_and_clips(shape):
    x0, x1 = pair(shape)
    point = Transport().plan(x0, x1, torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(point.xt, torch.stack([x0[0], (x0[1] + x1[1]) / 2, 0.9 * x1[2] + 0.1 * x0[2]]))
    torch.testing.assert_close(point.target, torch.stack([4 * (x1 - x0)[0], 4 * (x1 - x0)[1], 2 * (x1 - x0)[2]]))


@pytest.mark.parametrize("path", PATHS)
def test_slopes_are_the_derivatives_of_the_path(path):
    def alpha_and_sigma(t):
        return torch.stack(Transport(path).coefficients(t)[:2])

    numeric = (alpha_and_sigma(MIDDLE + 1e-6) - alpha_and_sigma(MIDDLE - 1e-6)) / 2e-6
    torch.testing.assert_close(torch.stack(Transport(path).coefficients(MIDDLE)[2:]), numeric, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
def test_paths_run_from_noise_to_data(path):
    alpha, sigma, *_ = Transport(path).coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    start = math.exp(-0.25 * 19.9 - 0.05) if path == "VP" else 0.0  # VP never quite reaches pure noise
    assert alpha.tolist() == pytest.approx([start, 1.0], abs=1e-12)
    assert sigma[1].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("path", ["GVP", "VP"])
def test_variance_preserving_paths_preserve_variance(path):
    alpha, sigma, *_ = Transport(path).coefficients(MIDDLE)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(MIDDLE))


@pytest.mark.parametrize(("path", "prediction"), COMBINATIONS)
def test_default_intervals_keep_everything_finite(path, prediction):
    for weight in LOSS_WEIGHTS:
        made = Transport(path, prediction, weight)
        for eps in (made.train_eps, made.sample_eps):
            t = torch.tensor(made.interval(eps))
            x0, x1 = torch.randn(2, 3), torch.randn(2, 3)
            point = made.plan(x0, x1, t)
            assert torch.isfinite(point.xt).all() and torch.isfinite(point.target).all()
            if prediction != "velocity":
                assert torch.isfinite(made.loss(torch.randn(2, 3), point)).all()


def test_defaults_of_eps_are_zero_where_nothing_is_singular():
    assert (Transport().train_eps, Transport("GVP").sample_eps) == (0, 0)
    assert (Transport("VP").train_eps, Transport("VP").sample_eps) == (1e-5, 1e-3)
    assert (Transport("Linear", "score").train_eps, Transport("GVP", "noise").sample_eps) == (1e-3, 1e-3)
    assert Transport("VP", train_eps=0.1, sample_eps=0.2).interval(0.1) == (0, 0.9)
    assert Transport("Linear", "noise").interval(0.1) == (0.1, 0.9)


@pytest.mark.parametrize(("path", "prediction"), COMBINATIONS)
def test_loss_is_zero_for_the_right_answer_and_positive_for_another(path, prediction):
    made = Transport(path, prediction)
    x0, x1 = (part.float() for part in pair())
    point = made.plan(x0, x1, torch.tensor([0.2, 0.5, 0.9]))
    sigma = made.coefficients(point.t)[1].view(3, 1, 1, 1)
    right = {"velocity": point.target, "noise": x0, "score": -x0 / sigma}[prediction]
    assert made.loss(right, point).abs().max() < 1e-9
    assert made.loss(right + 0.1, point).min() > 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_weights_are_those_of_sit(path):
    """arXiv 2401.08740: from the drift d alpha / alpha sigma^2 - sigma d sigma."""
    alpha, sigma, d_alpha, d_sigma = Transport(path).coefficients(MIDDLE)
    drift = (d_alpha / alpha) * sigma**2 - sigma * d_sigma
    torch.testing.assert_close(Transport(path, "score", "velocity").weight(MIDDLE), (drift / sigma) ** 2)
    torch.testing.assert_close(Transport(path, "score", "likelihood").weight(MIDDLE), drift / sigma**2)
    assert torch.equal(Transport(path, "score").weight(MIDDLE), torch.ones_like(MIDDLE))


def test_weight_multiplies_score_and_noise_losses_alone():
    x0, x1 = (part.float() for part in pair())
    t = torch.tensor([0.2, 0.5, 0.9])
    output = torch.ones_like(x0)
    for prediction in PREDICTIONS:
        plain, weighted = (Transport("Linear", prediction, name) for name in ("None", "velocity"))
        ratio = weighted.loss(output, weighted.plan(x0, x1, t)) / plain.loss(output, plain.plan(x0, x1, t))
        expected = torch.ones(3) if prediction == "velocity" else weighted.weight(t)
        torch.testing.assert_close(ratio, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_and_target_are_fp32_whatever_the_model_returns(dtype):
    made = Transport()
    point = made.sample(torch.randn(4, 3, 8, 8).to(dtype))
    assert {point.xt.dtype, point.t.dtype, point.target.dtype} == {torch.float32}
    large = torch.full((4, 3, 8, 8), 300.0, dtype=dtype)  # 300 squared does not fit FP16
    loss = made.loss(large, point)
    assert loss.dtype == torch.float32 and torch.isfinite(loss).all()


def test_sampled_points_lie_on_the_path_and_times_fill_the_interval():
    torch.manual_seed(0)
    made = Transport("Linear", "score", train_eps=0.1)
    x1 = torch.randn(4000, 2)
    point = made.sample(x1)
    torch.testing.assert_close(point.xt, point.t[:, None] * x1 + (1 - point.t[:, None]) * point.x0)
    assert 0.1 <= point.t.min() < 0.11 and 0.89 < point.t.max() <= 0.9
    assert point.t.mean().item() == pytest.approx(0.5, abs=0.02)
    assert point.x0.std().item() == pytest.approx(1, abs=0.03)


def test_dispersive_loss_is_the_log_of_the_mean_over_all_pairs():
    z = torch.randn(5, 3, 4, dtype=torch.float64)
    flat = z.flatten(1)
    pairs = [torch.exp(-((a - b) ** 2).sum() / 12) for a in flat for b in flat]
    expected = torch.stack(pairs).mean().log().float()
    torch.testing.assert_close(dispersive_loss(z), expected)


def test_dispersive_loss_takes_16_bit_tokens_and_pushes_them_apart():
    tokens = torch.randn(4, 512, 384).mul(30).half().requires_grad_()
    loss = dispersive_loss(tokens)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    z = torch.randn(4, 6, requires_grad=True)
    before = dispersive_loss(z)
    before.backward()
    assert dispersive_loss((z - 0.1 * z.grad).detach()) < before
    spread = (z - 0.1 * z.grad).detach()
    assert torch.pdist(spread).mean() > torch.pdist(z.detach()).mean()


def by_distances(z):
    """The dispersive loss from the distances themselves, and its gradient."""
    z = z.clone().requires_grad_()
    squared = torch.pdist(z).square() / z.shape[1]
    loss = torch.cat([-squared, -squared, z.new_zeros(len(z))]).logsumexp(0) - 2 * math.log(len(z))
    return loss.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize(
    ("apart", "groups", "offset"),
    [(1.0, 1, 0.0), (1.0, 1, 100.0), (1e-3, 1, 30.0), (1e-4, 3, 1.0)],
    ids=["apart", "far from zero", "all nearly equal", "nearly equal in pairs"],
)
def test_dispersive_loss_is_as_exact_as_one_of_distances(apart, groups, offset):
    torch.manual_seed(0)
    z = torch.randn(groups, 4096).repeat(6 // groups, 1) + offset + torch.randn(6, 4096) * apart
    exact, gradient = by_distances(z.double())
    in_fp32, its_gradient = by_distances(z)
    z = z.requires_grad_()
    loss = dispersive_loss(z)
    (ours,) = torch.autograd.grad(loss, z)
    assert abs(loss.double() - exact) <= abs(in_fp32.double() - exact) + 1e-7 * abs(exact)
    assert (ours - gradient).norm() <= (its_gradient - gradient).norm() + 1e-7 * gradient.norm()


def test_dispersive_loss_makes_nothing_as_large_as_all_differences():
    N, dim = 32, 64
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(leaf.numel() for leaf in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(leaf))
            assert "dist" not in func.overloadpacket.__name__
            return out

    with Sizes():
        dispersive_loss(torch.randn(N, dim, requires_grad=True)).backward()
    assert 0 < max(sizes) <= N * dim


def test_identical_tokens_have_a_finite_gradient():
    z = torch.ones(3, 8, requires_grad=True)
    dispersive_loss(z).backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_sampling_field_points_towards_data(prediction):
    made = Transport("Linear", prediction)
    x0, x1 = torch.zeros(1, 4), torch.ones(1, 4)
    x0 = x0 - 1
    point = made.plan(x0, x1, torch.tensor([0.5]))
    says = {"velocity": point.target, "noise": x0, "score": -x0 / 0.5}[prediction]
    assert (made.field(says) > 0).all()


def test_knows_nothing_of_models_or_devices():
    source = Path(transport.__file__).read_text(encoding="utf-8")
    assert "import models" not in source and "cuda" not in source and ".cpu(" not in source
