"""Averages: each against its formula, all still on a skipped step, and EDM2's made again after a run."""

import math

import numpy as np
import pytest
import torch

from EqM.engine import ema as averages
from EqM.engine.ema import EMA
from EqM.run import checkpoint
from EqM.run.errors import UserError

TAKEN, SKIPPED = torch.tensor(1.0), torch.tensor(0.0)


class Walk(torch.nn.Module):
    """Weights that wander, the same for the same seed, and a frozen one."""

    def __init__(self, size=5, seed=0):
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(size, generator=self.random))
        self.pos_embed = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    @torch.no_grad()
    def step(self):
        self.weight.add_(torch.randn(self.weight.shape, generator=self.random), alpha=0.1)
        return self.weight.double().clone()


def test_several_averages_are_each_the_one_alone_bit_for_bit():
    walk = Walk()
    together, alone = EMA(walk, [0.9, 0.99]), [EMA(walk, 0.9), EMA(walk, 0.99)]
    for _ in range(5):
        walk.step()
        for each in (together, *alone):
            each.update(TAKEN)
    assert list(together.models) == ["ema-0.9", "ema-0.99"] and together.model is together.models["ema-0.9"]
    for ours, one in zip(together.models.values(), alone, strict=True):
        assert torch.equal(ours.weight, one.model.weight)
    assert list(together.parts()) == ["ema", "ema-0.99"] and list(alone[0].parts()) == ["ema"]


def test_warm_up_takes_the_published_decay_and_counts_from_zero():
    walk = Walk()
    ema = EMA(walk, 0.5, warmup=True)
    expected = walk.weight.double().clone()
    for n in range(15):  # (1 + n) / (10 + n) passes 0.5 at n = 8
        weights = walk.step()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights
        ema.update(TAKEN)
        torch.testing.assert_close(ema.model.weight.double(), expected, atol=1e-6, rtol=0)
    assert ema.updates == 15


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25, 12**-0.5])
def test_a_power_average_weighs_each_step_by_the_power_of_its_time(std):
    """(tau^(gamma + 1) - (tau - 1)^(gamma + 1)) / t^(gamma + 1): the profile's integral over each step."""
    walk, gamma = Walk(), averages.gamma_of(std)
    ema = EMA(walk, stds=[std])
    seen = []
    for t in range(1, 200):
        seen.append(walk.step())
        ema.update(TAKEN)
        if t in (1, 2, 10, 199):
            edges = (np.arange(t + 1) / t) ** (gamma + 1)
            expected = sum(w * weights for w, weights in zip(np.diff(edges), seen, strict=True))
            torch.testing.assert_close(ema.models[f"ema-std-{std}"].weight.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.25, 12**-0.5])
def test_gamma_gives_the_relative_standard_deviation(std):
    """Of the profile itself, by its moments over tau in [0, 1]."""
    gamma = averages.gamma_of(std)
    mean, square = ((gamma + 1) / (gamma + 1 + power) for power in (1, 2))
    assert math.sqrt(square - mean**2) == pytest.approx(std, rel=1e-6)


def test_gammas_are_those_that_edm2_publishes():
    assert averages.gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert averages.gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("pair", [(3.0, 1.0, 7.0, 4.0), (7.0, 4.0, 3.0, 1.0), (5.0, 2.0, 5.0, 9.0)])
def test_the_inner_product_is_the_integral(pair):
    t_a, a, t_b, b = pair
    edges = np.linspace(0, min(t_a, t_b), 200_001)
    tau = (edges[1:] + edges[:-1]) / 2
    profiles = [(g + 1) * tau**g / t ** (g + 1) for t, g in ((t_a, a), (t_b, b))]
    assert averages.inner_product(*pair) == pytest.approx((profiles[0] * profiles[1]).sum() * edges[1], rel=1e-6)


def test_a_skipped_step_moves_no_average_and_no_count():
    walk = Walk()
    ema = EMA(walk, [0.9, 0.99], warmup=True, stds=[0.1])
    ema.update(TAKEN)
    before = [model.weight.clone() for model in ema.models.values()]
    walk.step()
    ema.update(SKIPPED)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, ema.models.values(), strict=True))
    assert ema.updates == 1


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.3, 0.9, 1.0])
def test_the_fused_way_of_cuda_is_the_same_average(share):
    """Its kernel runs on the CPU too."""
    ours, theirs = [torch.randn(5, 3), torch.randn(7)], [torch.randn(5, 3), torch.randn(7)]
    plain, fused, kept = ([x.clone() for x in xs] for xs in (ours, ours, theirs))
    averages._lerp(plain, theirs, torch.tensor(share))
    averages._fused_lerp(fused, theirs, torch.tensor(share))
    for a, b, c, d, start in zip(plain, fused, theirs, kept, ours, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        assert torch.equal(c, d), "what is followed stays"
        assert share or torch.equal(b, start)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_all_tensors_of_an_average_move_in_a_few_kernels():
    model = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(40)]).cuda()
    ema, applied = EMA(model, [0.9, 0.99], warmup=True), torch.ones((), device="cuda")
    ema.update(applied)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ema.update(applied)
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if "sgd" in event.key.lower()) <= 2 * 3


@pytest.fixture(scope="module")
def run_with_snapshots(tmp_path_factory):
    """(run folder, all weights there were, time by time): 400 steps of a walk, a snapshot every 25."""
    run = tmp_path_factory.mktemp("run")
    walk = Walk(size=64)
    ema, seen = EMA(walk, stds=[0.05, 0.1]), []
    for step in range(1, 401):
        seen.append(walk.step())
        ema.update(TAKEN)
        if step % 25 == 0:
            state = {name: part.state_dict() for name, part in ema.parts().items()}
            state |= {"model": walk.state_dict(), "args": {"ema_decay": 0.9999, "model": "x"}, "class_names": ["a"]}
            averages.keep_snapshot(run / "checkpoints" / f"{step:07d}.pt", state)
    return run, torch.stack(seen)


@pytest.mark.parametrize("std", [0.05, 0.07, 0.1, 0.13, 0.2])
@pytest.mark.parametrize("step", [400, 310])
def test_an_average_of_another_length_is_made_after_the_run(run_with_snapshots, tmp_path, std, step):
    run, seen = run_with_snapshots
    averages.main([str(run), "--std", str(std), "--step", str(step), "--out", str(tmp_path / "x.pt")])
    made = checkpoint.load(tmp_path / "x.pt")
    time = step // 25 * 25
    edges = (torch.arange(time + 1, dtype=torch.float64) / time) ** (averages.gamma_of(std) + 1)
    expected = (edges.diff()[:, None] * seen[:time]).sum(0)
    newest = (made["ema"]["weight"] - seen[time - 1]).norm()
    assert (made["ema"]["weight"] - expected).norm() < 0.02 * newest
    assert torch.equal(made["ema"]["pos_embed"], torch.ones(2)) and made["class_names"] == ["a"]
    assert averages.held_of_start(made, "ema") is None


def test_the_error_that_is_told_is_the_profiles(run_with_snapshots, capsys, tmp_path):
    run, _ = run_with_snapshots
    for std, low, high in [("0.1", 0, 1e-5), ("0.02", 5, 100)]:
        averages.main([str(run), "--std", std, "--out", str(tmp_path / "x.pt")])
        told = float(capsys.readouterr().out.split("profile ")[1].split("%")[0])
        assert low <= told <= high


def test_a_run_that_went_on_in_another_folder_is_put_together(run_with_snapshots, tmp_path):
    run, _ = run_with_snapshots
    for name, steps in (("one", range(25, 225, 25)), ("two", range(200, 425, 25))):
        (tmp_path / name / "averages").mkdir(parents=True)
        for step in steps:
            target = tmp_path / name / "averages" / f"{step:07d}.pt"
            target.symlink_to(run / "averages" / target.name)
    whole, _ = averages.reconstruct([run], 0.15)
    parts, _ = averages.reconstruct([tmp_path / "one", tmp_path / "two"], 0.15)
    assert torch.equal(whole["ema"]["weight"], parts["ema"]["weight"])
    with pytest.raises(UserError, match="no snapshot of averages up to step 20; train with --ema-std"):
        averages.reconstruct([run], 0.15, step=20)


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    for argv in ([tmp_path, "--std", "0.1"], [tmp_path, "--std", "0.4"], [tmp_path, "--std", "x"]):
        with pytest.raises(SystemExit) as stop:
            averages.main([*map(str, argv), "--out", str(tmp_path / "x.pt")])
        assert stop.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


def test_how_much_of_the_start_is_left_goes_by_the_steps_that_were_taken():
    saved = {"args": {"ema_decay": [0.9, 0.9999]}, "schedule": {"taken": torch.tensor(200.0)}, "step": 210}
    assert averages.held_of_start(saved, "ema-0.9999") == pytest.approx(0.9999**200)
    assert averages.held_of_start(saved, "ema") == averages.held_of_start(saved, "ema-0.9") == pytest.approx(0.9**200)
    assert averages.held_of_start({"args": {"ema_decay": 0.9999}, "step": 100}, "ema") == pytest.approx(
        0.99005, abs=1e-5
    )
    for unknown in ("model", "ema-std-0.1"):
        assert averages.held_of_start(saved, unknown) is None
    for published in (
        {"args": {}},
        {"args": {"ema_decay": 0.9}},
        {"args": {"ema_decay": 0.9, "ema_warmup": True}, "step": 3},
    ):
        assert averages.held_of_start(published, "ema") is None
