"""Samplers against closed forms, loops written out by hand and the exact field of finite data."""

import itertools
import math

import pytest
import torch

from EqM import samplers
from EqM.samplers import SAMPLERS, Descent, End
from EqM.transport import c

STOPPABLE = [name for name in SAMPLERS if name != "dopri5"]


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


def bend(x, t):
    """A field that is neither linear nor the same for all, whose norm falls as it is followed."""
    return torch.tanh(1 - x) * (1 + 0.1 * torch.sin(3 * x))


@pytest.mark.parametrize(
    "same",
    [{"sampler": "euler"}, {"sampler": "ngd", "mu": 0.0}, {"sampler": "nag", "mu": 0.0}, {"sampler": "langevin"}],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_gd_by_another_name_has_its_bits(same, dtype):
    x = torch.randn(3, 5, dtype=dtype)
    expected = x
    for _ in range(8):
        expected = expected + 0.1 * bend(expected, None)
    assert torch.equal(samplers.descend(bend, x, 9, 0.1), expected)
    assert torch.equal(samplers.descend(bend, x, 9, 0.1, **same), expected)


@pytest.mark.parametrize("name", STOPPABLE)
def test_a_stop_norm_that_no_sample_meets_changes_no_bit(name):
    x = torch.randn(3, 5)
    fixed = samplers.descend(bend, x, 9, 0.1, name, **heat(name))
    assert torch.equal(samplers.descend(bend, x, 9, 0.1, name, stop_norm=1e-9, **heat(name)), fixed)


def heat(name, seed=0):
    """What langevin needs besides: a temperature, and noise that follows from seed, sample and step."""

    def noise(row, step):
        generator = torch.Generator().manual_seed(1_000_000 * seed + 1000 * row + step)
        return torch.randn(5, generator=generator, dtype=torch.float64)

    return {"temperature": 0.01, "noise": noise} if name == "langevin" else {}


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_samplers_reach_the_bottom_of_a_bowl(name):
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    end = samplers.descend(spring, x, 400, 0.1, name)
    torch.testing.assert_close(end, torch.ones(4, 8, dtype=torch.float64), atol=2e-5, rtol=0)


def test_nag_is_nesterovs_and_not_the_published_ngd():
    x = torch.randn(2, 3, dtype=torch.float64)
    before, expected = x, x
    for _ in range(6):
        y = expected + 0.5 * (expected - before)
        before, expected = expected, y + 0.1 * bend(y, None)
    torch.testing.assert_close(samplers.descend(bend, x, 7, 0.1, "nag", mu=0.5), expected, atol=1e-14, rtol=0)
    assert not torch.allclose(samplers.descend(bend, x, 7, 0.1, "ngd", mu=0.5), expected, atol=1e-3)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.7), (0.0, 0.0)])
def test_adam_follows_torchs_path(betas):
    x = torch.randn(3, 5)
    theirs = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.02, betas=betas)
    for points in range(2, 42):
        theirs.grad = -bend(theirs.detach(), None)
        optimizer.step()
        if points % 8:
            continue
        ours = samplers.descend(bend, x, points, 0.02, "adam", betas=betas)
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=0)


def test_heun_is_of_second_order():
    x = torch.linspace(-2, 3, 6, dtype=torch.float64).view(2, 3)
    fine = samplers.descend(bend, x, 4001, 2 / 4000, "heun")
    errors = [(samplers.descend(bend, x, n + 1, 2 / n, "heun") - fine).abs().max().item() for n in (20, 40, 80)]
    assert [one / other for one, other in itertools.pairwise(errors)] == pytest.approx([4, 4], rel=0.1)


def test_heun_asks_for_the_time_where_it_looks():
    seen = []
    samplers.descend(lambda x, t: seen.append(t[0].item()) or 0 * x, torch.zeros(1, 1), 3, 0.1, "heun")
    assert seen == pytest.approx([0, 0.5, 0.5, 1])


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_langevins_variance_in_a_bowl_is_that_of_its_discrete_chain(temperature):
    """x <- (1 - eta k) x + sqrt(2 eta T) noise has variance T / (k (1 - eta k / 2)); T / k as eta falls."""
    k, eta, n = 2.0, 0.2, 40_000
    generator = torch.Generator().manual_seed(0)
    end = samplers.descend(
        lambda x, t: -k * x, torch.zeros(1, n), 40, eta, "langevin", temperature=temperature, anneal=False,
        noise=lambda row, step: torch.randn(n, generator=generator),
    )  # fmt: skip
    assert end.var().item() == pytest.approx(temperature / (k * (1 - eta * k / 2)), rel=0.03)


def test_annealed_noise_falls_evenly_to_none_at_the_last_step():
    size = []
    x = torch.zeros(1, 1, dtype=torch.float64)
    for points in range(1, 7):
        size.append(
            samplers.descend(
                lambda x, t: 0 * x, x, points, 0.5, "langevin", temperature=3.0, noise=lambda row, step: torch.ones(1)
            ).item()
        )
    expected = [sum(math.sqrt(3 * (1 - k / (p - 2))) for k in range(p - 2)) if p > 2 else 0 for p in range(1, 7)]
    assert size == pytest.approx(expected)


DATA = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(data, nodes=400):
    """The field that a perfect model of finite data learns (DESIGN, section 5), by quadrature over log(1 - t)."""
    rest = torch.logspace(-7, 0, nodes, dtype=torch.float64)[None, :, None]  # 1 - t, so that dt = (1 - t) d log(1 - t)
    dim = data.shape[1]

    def field(x, t=None):
        away = x[:, None] - data  # (N, points, dim)
        distances = (away[:, :, None] + rest * data[:, None]).square().sum(-1)  # |x - t x_i|^2, (N, points, nodes)
        flat = rest[..., 0]
        log_weight = -distances / (2 * flat**2) - (dim - 1) * flat.log()
        weight = log_weight.flatten(1).softmax(1).view_as(distances)
        return -((weight * c(1 - flat) / flat).sum(2)[..., None] * away).sum(1)

    return field


@pytest.mark.parametrize(
    "how",
    [
        {"points": 401, "stepsize": 0.0034},
        {"points": 401, "stepsize": 0.0034, "sampler": "nag"},
        {"points": 601, "stepsize": 0.02, "sampler": "adam"},
    ],
    ids=lambda how: how.get("sampler", "gd"),
)
def test_the_exact_field_leads_to_data_points(how):
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    end = samplers.descend(exact(DATA), x, **how)
    nearest = torch.cdist(end, DATA).min(1)
    assert nearest.values.max() < 1e-3
    assert len(set(nearest.indices.tolist())) > 1


def test_the_exact_field_vanishes_midway_between_opposite_points():
    point = torch.tensor([[1.5, -0.5, 2.0]], dtype=torch.float64)
    field = exact(torch.cat([point, -point]))
    assert field(torch.zeros(1, 3, dtype=torch.float64)).norm() < 1e-12
    assert field(0.1 * point).norm() > 1e-2


def ideal(point):
    """The field towards one data point with t known: x = t point + (1 - t) x0, and noise x0 is at the origin."""

    def field(x, t):
        rest = ((x - point) / -point).mean(1, keepdim=True)  # 1 - t
        return c(1 - rest) * (point - x) / rest

    return field


def test_ideal_descent_follows_its_recurrence_and_dopri5_its_flow():
    point, eta = torch.full((1, 3), 2.0, dtype=torch.float64), 0.004
    start = torch.zeros(1, 3, dtype=torch.float64)
    rest = 1.0
    for k in range(1, 120):
        rest -= eta * c(torch.tensor(1 - rest, dtype=torch.float64)).item()
        if k % 7 == 0 or k == 50:
            end = samplers.descend(ideal(point), start, k + 1, eta)
            torch.testing.assert_close(1 - end / point, torch.full_like(end, rest), atol=1e-12, rtol=0)
            closed = 0.2 * (1 - 20 * eta) ** (k - 0.2 / eta) if k >= 50 else 1 - 4 * eta * k
            assert rest == pytest.approx(closed, abs=1e-12)
            flow = 0.2 * math.exp(-20 * (eta * k - 0.2)) if k >= 50 else 1 - 4 * eta * k
            end = samplers.descend(ideal(point), start, k + 1, eta, "dopri5", atol=1e-8, rtol=1e-8)
            torch.testing.assert_close(1 - end / point, torch.full_like(end, flow), atol=1e-6, rtol=0)


def runge_kutta(field, x, length, steps):
    h = length / steps
    for _ in range(steps):
        k1 = field(x, None)
        k2 = field(x + h / 2 * k1, None)
        k3 = field(x + h / 2 * k2, None)
        k4 = field(x + h * k3, None)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize("tolerance", [1e-5, 1e-7])
def test_dopri5_agrees_with_fine_fixed_steps(tolerance):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    field = exact(DATA)
    fine = runge_kutta(field, x, 0.34, 1000)
    ended = Descent(101, 0.0034, "dopri5", atol=tolerance, rtol=tolerance).run(field, x)
    assert (ended.x - fine).abs().max() < 30 * tolerance
    euler = samplers.descend(field, x, 2001, 0.34 / 2000, "euler")
    assert (ended.x - euler).abs().max() < 30 * tolerance + 0.01, "Euler's own error"
    assert len(set(ended.evaluations)) > 1 and max(ended.evaluations) < 400


def test_dopri5_takes_fewer_steps_for_a_lower_accuracy_and_lands_on_the_end():
    x = torch.ones(1, 1, dtype=torch.float64)
    counts = []
    for tolerance in (1e-3, 1e-6, 1e-9):
        ended = Descent(11, 0.1, "dopri5", atol=tolerance, rtol=tolerance).run(lambda x, t: x, x)
        counts.append(ended.evaluations[0])
        assert ended.x.item() == pytest.approx(math.e, abs=30 * tolerance)
    assert counts == sorted(set(counts))
    seen = []
    samplers.descend(lambda x, t: seen.append(t.item()) or x, x, 11, 0.1, "dopri5", interval=(0.2, 0.7))
    assert min(seen) == pytest.approx(0.2) and max(seen) == pytest.approx(0.7)


@pytest.mark.parametrize("field", [lambda x, t: x / (x < 0.5), lambda x, t: x * math.nan, lambda x, t: x * math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dopri5_gives_up_on_a_field_that_is_not_finite(field, dtype):
    with pytest.raises(samplers.NoStep, match="not finite"):
        samplers.descend(field, torch.full((1, 1), 0.4, dtype=dtype), 51, 0.1, "dopri5")


def scattered(n=6):
    """Samples that are done at different steps: their distances to the bottom differ."""
    return (
        torch.randn(n, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        * torch.arange(1, n + 1)[:, None]
    )


def stops(name):
    return {"stop_norm": 0.3, **heat(name)} if name != "dopri5" else {}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch_mates(name):
    x = scattered()
    how = Descent(60, 0.1, name, **stops(name))
    together = how.run(bend, x)
    assert len(set(together.evaluations)) > 2
    for i in range(len(x)):
        noise = how.noise
        shifted = {"noise": lambda row, step, i=i, noise=noise: noise(row + i, step)} if noise else {}
        alone = Descent(60, 0.1, name, **{**stops(name), **shifted}).run(bend, x[i : i + 1])
        assert torch.equal(alone.x[0], together.x[i]) and alone.evaluations[0] == together.evaluations[i]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("batch_size", [1, 2, 4, 9])
def test_a_stream_ends_where_the_batch_does_and_stays_full(name, batch_size):
    x, sizes = scattered(), []

    def field(x, t):
        sizes.append(len(x))
        return bend(x, t)

    how = Descent(60, 0.1, name, **stops(name))
    together = how.run(bend, x)
    ended = sorted(how.stream(field, iter(x), batch_size))
    assert [end.row for end in ended] == list(range(6))
    assert [end.evaluations for end in ended] == together.evaluations and sum(sizes) == sum(together.evaluations)
    assert all(torch.equal(end.x, together.x[end.row]) for end in ended)
    if name not in ("dopri5", "heun"):  # those call the field more than once an update, for some of the batch
        full = sum(together.evaluations) // max(1, batch_size)
        assert sizes.count(min(batch_size, 6)) >= full - max(together.evaluations), "waiting samples left places empty"


def test_a_stream_reads_no_further_than_it_has_room():
    read = []
    waiting = (read.append(i) or torch.zeros(2) for i in range(10))
    coming = Descent(3, 0.1).stream(spring, waiting, 4)
    next(coming)
    assert len(read) == 4
    assert len(list(coming)) == 9 and len(read) == 10


def test_the_step_at_which_the_norm_is_low_enough_is_not_taken_but_counted():
    x = torch.tensor([[8.0], [4.0], [1.0], [0.5]])
    ended = Descent(6, 0.5, stop_norm=1.0).run(lambda x, t: -x, x)  # each step halves x
    assert ended.x.flatten().tolist() == [1, 1, 1, 0.5] and ended.evaluations == [4, 3, 1, 1]
    heun = Descent(9, 0.5, "heun", stop_norm=1.0).run(lambda x, t: -x, x[:1])
    assert heun.evaluations[0] % 2 == 1, "two a step, one to be judged"
    nan = Descent(6, 0.5, stop_norm=1.0).run(lambda x, t: x * math.nan, x)
    assert nan.evaluations == [5] * 4


def test_the_work_falls_as_samples_are_done():
    sizes = []
    x = torch.tensor([[8.0], [4.0], [1.0], [0.5]])
    Descent(9, 0.5, stop_norm=1.0).run(lambda x, t: sizes.append(len(x)) or -x, x)
    assert sizes == [4, 2, 2, 1]


@pytest.mark.parametrize(("name", "each"), [("gd", 1), ("ngd", 1), ("adam", 1), ("heun", 2)])
def test_without_a_stop_norm_all_updates_are_counted(name, each):
    assert Descent(7, 0.1, name).run(spring, torch.zeros(2, 3)).evaluations == [6 * each] * 2


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sampler": "sde"}, "must be one of gd, ngd"),
        ({"sampler": "dopri5", "stop_norm": 1.0}, "a stop norm does not go with dopri5"),
        ({"sampler": "gd", "temperature": 1.0}, "temperature is langevin's"),
        ({"sampler": "langevin", "temperature": 1.0}, "needs noise"),
        ({"stop_norm": -1.0}, "not be negative"),
        ({"sampler": "adam", "betas": (0.9, 1.0)}, "below 1"),
        ({"sampler": "dopri5", "atol": 0.0}, "atol above 0"),
        ({"betas": (0.5, 0.9)}, "betas are adam's, and the sampler is gd"),
        ({"sampler": "heun", "atol": 1e-3}, "tolerances are dopri5's"),
        ({"sampler": "adam", "anneal": False}, "is langevin's, and the sampler is adam"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        samplers.descend(spring, torch.zeros(1, 1), 3, 0.1, **wrong)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_point_is_no_update(name):
    x = torch.randn(2, 3)
    assert torch.equal(samplers.descend(spring, x, 1, 0.1, name), x)
    assert [end.evaluations for end in Descent(1, 0.1, name).stream(spring, x, 2)] == [0, 0]
    assert isinstance(next(Descent(1, 0.1, name).stream(spring, x, 2)), End)


@pytest.mark.parametrize("name", ["gd", "adam", "dopri5"])
def test_a_progress_that_ends_early_returns_what_there_is(name):
    x = torch.zeros(2, 3)
    end = samplers.descend(spring, x, 9, 0.1, name, progress=lambda steps: itertools.islice(steps, 2))
    assert end.shape == x.shape and (end > 0).all() and (end < 0.5).all()


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


def test_progress_sees_every_update():
    seen = []
    samplers.descend(spring, torch.zeros(1, 1), 7, 0.1, progress=lambda steps: (seen.append(i) or i for i in steps))
    assert seen == list(range(6))


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_observer_sees_every_step_of_every_sample_and_changes_no_bit(name):
    x, seen = scattered(3), {0: [], 1: [], 2: []}

    def observe(rows, steps, x, f):
        for row, step, state, field in zip(rows, steps, x, f, strict=True):
            seen[row].append((step, state, field))

    plain = Descent(20, 0.1, name, **heat(name)).run(bend, x)
    watched = Descent(20, 0.1, name, observe=observe, **heat(name))
    assert torch.equal(watched.run(bend, x).x, plain.x)
    assert all(torch.equal(end.x, plain.x[end.row]) for end in watched.stream(bend, iter(x), 2))
    for row, states in seen.items():
        once = states[: len(states) // 2]  # seen twice: together, and as a stream
        assert [step for step, _, _ in once] == [step for step, _, _ in states[len(once) :]]
        assert once[0][0] == 0 and torch.equal(once[0][1], x[row])
        if name != "dopri5":
            assert [step for step, _, _ in once] == list(range(19))
        if name in ("gd", "adam", "langevin", "heun", "dopri5"):  # which ask where the sample stands
            for _, state, field in once:
                torch.testing.assert_close(field, bend(state, None), atol=1e-12, rtol=0)
