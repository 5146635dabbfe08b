"""AdamW, clipping, the schedule and the EMA: each against PyTorch's plain way, and all still on a skipped step."""

import copy
import math

import pytest
import torch

from EqM.engine import optimizer as optim
from EqM.engine.ema import EMA

TAKEN, SKIPPED = torch.tensor(1.0), torch.tensor(0.0)


def model_with_gradients(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    model[0].bias.requires_grad_(False)
    model(torch.randn(3, 4)).square().sum().backward()
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def test_adamw_is_the_published_one():
    model = model_with_gradients()
    group = optim.adamw(model, 1e-4).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (1e-4, (0.9, 0.999), 0.0, True)
    assert len(group["params"]) == 4, "frozen parameters are counted, as in published checkpoints"


def test_fused_steps_equal_plain_ones():
    ours = model_with_gradients()
    plain = copy.deepcopy(ours)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    fused, reference = optim.adamw(ours, 1e-2), torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(5):
        fused.step()
        reference.step()
    torch.testing.assert_close(weights(ours), weights(plain))


def test_a_skipped_step_changes_nothing():
    model = model_with_gradients()
    adamw = optim.adamw(model, 1e-2)
    schedule = optim.Schedule(adamw, "cosine", 2, 10, torch.device("cpu"))
    ema = EMA(model, 0.5)

    def step(applied):
        adamw.found_inf = 1 - applied
        adamw.step()
        schedule.advance(applied)
        ema.update(applied)

    def everything():
        state = copy.deepcopy([adamw.state_dict(), schedule.state_dict(), ema.model.state_dict(), model.state_dict()])
        return torch.utils._pytree.tree_leaves(state)

    step(TAKEN)
    before = everything()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.fill_(math.nan)
    step(SKIPPED)
    for old, new in zip(before, everything(), strict=True):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


def test_clipping_scales_to_the_norm_and_returns_the_one_before():
    model = model_with_gradients()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert optim.clip_gradients(model).item() == pytest.approx(gradients.norm().item())
    assert optim.clip_gradients(model, 0.1).item() == pytest.approx(gradients.norm().item())
    assert optim.clip_gradients(model).item() == pytest.approx(0.1, rel=1e-4)
    assert optim.clip_gradients(model, 5.0).item() == pytest.approx(0.1, rel=1e-4)
    assert optim.clip_gradients(model).item() == pytest.approx(0.1, rel=1e-4), "small gradients are left alone"


def rates(kind, warmup, total, steps):
    adamw = optim.adamw(model_with_gradients(), 0.1)
    schedule = optim.Schedule(adamw, kind, warmup, total, torch.device("cpu"))
    seen = []
    for _ in range(steps):
        seen.append(float(adamw.param_groups[0]["lr"]))
        schedule.advance(TAKEN)
    return seen


def test_constant_schedule_is_the_rate_itself():
    assert rates("constant", 0, 10, 4) == [0.1] * 4


def test_warm_up_is_linear_and_ends_at_the_rate():
    assert rates("constant", 4, 10, 6) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_cosine_falls_from_the_rate_to_zero():
    expected = [0.05 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    assert rates("cosine", 0, 10, 10) == pytest.approx(expected)
    assert rates("cosine", 0, 10, 13)[10:] == pytest.approx([0, 0, 0], abs=1e-8)


def test_schedule_goes_on_where_it_was_saved():
    adamw = optim.adamw(model_with_gradients(), 0.1)
    schedule = optim.Schedule(adamw, "cosine", 3, 10, torch.device("cpu"))
    for applied in (TAKEN, SKIPPED, TAKEN):
        schedule.advance(applied)
    other = optim.adamw(model_with_gradients(), 0.1)
    resumed = optim.Schedule(other, "cosine", 3, 10, torch.device("cpu"))
    resumed.load_state_dict(schedule.state_dict())
    assert schedule.taken.item() == 2
    assert other.param_groups[0]["lr"] == adamw.param_groups[0]["lr"] > 0


def test_ema_is_the_published_average_parameter_by_parameter():
    model = model_with_gradients()
    ema = EMA(model, 0.9)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(step + 1)
        ema.update(TAKEN)
        for name, p in model.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach()
    for name, p in ema.model.named_parameters():
        torch.testing.assert_close(p, expected[name])
        assert not p.requires_grad
    assert torch.equal(ema.model[0].bias, model[0].bias)


def test_ema_starts_as_a_copy_of_its_own():
    model = model_with_gradients()
    ema = EMA(model)
    assert torch.equal(weights(ema.model), weights(model)) and not ema.model.training
    ema.model[0].weight.add_(1)
    assert not torch.equal(weights(ema.model), weights(model))


class Blocks(torch.nn.Module):
    """Matrices below `blocks`, wide, tall and two alike, and what is none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = torch.nn.Embedding(3, 6)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(6, 4), torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)])

    def give_gradients(self, seed, bad=False):
        torch.manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = torch.randn_like(parameter) * (float("nan") if bad else 1)

    def matrices(self):
        return [block.weight for block in self.blocks]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matrices_step_as_torchs_muon_and_the_rest_as_adamw(weight_decay):
    ours, theirs = Blocks(), Blocks()
    muon = optim.make("muon", ours, 1e-2, (0.8, 0.9), weight_decay)
    settings = {"lr": 1e-2, "weight_decay": weight_decay}
    references = [
        torch.optim.Muon(theirs.matrices(), momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.AdamW([p for p in theirs.parameters() if p.ndim < 2], betas=(0.8, 0.9), **settings),
        torch.optim.AdamW([theirs.table.weight], betas=(0.8, 0.9), **settings),
    ]
    start = weights(ours)
    for seed in range(4):
        for model in (ours, theirs):
            model.give_gradients(seed)
        for each in (muon, *references):
            each.step()
    moved = (weights(ours) - start).norm()
    assert (weights(ours) - weights(theirs)).norm() < 0.02 * moved, "rounding to BF16 alone"


def test_a_skipped_step_of_muon_changes_nothing_and_the_next_is_as_if_it_had_not_been():
    straight, skipping = Blocks(), Blocks()
    optimizers = [optim.make("muon", model, 1e-2) for model in (straight, skipping)]
    schedules = [optim.Schedule(each, "cosine", 2, 10, torch.device("cpu")) for each in optimizers]
    for seed, bad in ((0, 0.0), (1, 1.0), (2, 0.0)):
        for model, each, schedule in zip((straight, skipping), optimizers, schedules, strict=True):
            if bad and model is straight:
                continue
            model.give_gradients(seed, bad)
            each.found_inf = SKIPPED + bad
            each.step()
            schedule.advance(TAKEN - bad)
    assert torch.equal(weights(straight), weights(skipping)) and torch.isfinite(weights(skipping)).all()
    for one, other in zip(straight.matrices(), skipping.matrices(), strict=True):
        buffers = [each.state[p]["momentum_buffer"] for each, p in zip(optimizers, (one, other), strict=True)]
        assert torch.equal(*buffers)


def test_the_cosine_ends_at_its_floor():
    adamw = optim.adamw(model_with_gradients(), 0.1)
    schedule = optim.Schedule(adamw, "cosine", 0, 10, torch.device("cpu"), lowest=0.02)
    rates = []
    for _ in range(12):
        rates.append(adamw.param_groups[0]["lr"].item())
        schedule.advance(TAKEN)
    assert rates[0] == pytest.approx(0.1) and rates[5] == pytest.approx(0.06)
    assert rates[10:] == pytest.approx([0.02, 0.02]) and rates == sorted(rates, reverse=True)
