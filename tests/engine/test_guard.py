"""One verdict a step, in every precision: weights, optimizer, EMA, schedule and scale follow the same one."""

import copy

import pytest
import torch

from EqM import train as train_script
from EqM.engine.guard import StepGuard
from EqM.engine.precision import FLAGS as PRECISIONS
from EqM.engine.precision import Precision
from EqM.engine.trainer import Trainer
from EqM.models import EqM_models
from EqM.run.errors import UserError
from helpers import leaves

CPU = torch.device("cpu")
BATCH = (torch.linspace(-2, 2, 2 * 4 * 8 * 8).view(2, 4, 8, 8), torch.zeros(2, dtype=torch.long))


def trainer_in(name):
    words = "--latents none --lr-schedule cosine --warmup-steps 2 --ema-decay 0.5 --max-grad-norm 1"
    torch.manual_seed(0)
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=3)
    run_in = Precision(name, torch.device("cpu"), "test", rounded=True)
    return Trainer(train_script.parse_args(words.split()), model, run_in, 10)


def state(trainer):
    parts = {key: part.state_dict() for key, part in trainer.parts().items() if key not in ("scaler", "guard")}
    return copy.deepcopy(parts)


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("gradient", [1e30, float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_changes_nothing_even_where_every_gradient_is_finite(name, gradient):
    """1e30 squared overflows FP32: GradScaler finds no infinite gradient, yet there is no norm to clip by."""
    trainer = trainer_in(name)
    trainer.step(iter([BATCH]))
    before, scale = state(trainer), trainer.scaler.get_scale()
    weight = trainer.model.final_layer.linear.weight
    hook = weight.register_hook(lambda grad: torch.full_like(grad, gradient))
    _, norm, applied = trainer.step(iter([BATCH]))
    hook.remove()
    assert not torch.isfinite(norm) and applied == 0
    for (path, a), (_, b) in zip(leaves(before), leaves(state(trainer)), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path
    assert trainer.scaler.get_scale() == (scale / 2 if name == "fp16" else scale)
    assert trainer.step(iter([BATCH]))[2] == 1
    assert trainer.guard.skipped == 1 and trainer.guard.streak == 0
    assert not torch.equal(before["model"]["final_layer.linear.weight"], weight)


def test_the_scaler_grows_by_the_same_verdict():
    trainer = trainer_in("fp16")
    trainer.scaler.set_growth_interval(2)
    for _ in range(2):
        assert trainer.step(iter([BATCH]))[2] == 1
    assert trainer.scaler.get_scale() == 2.0**17


def judged(guard, *norms):
    return [guard.judge(torch.tensor(norm)).item() for norm in norms]


def test_guard_counts_skipped_steps_and_their_streak():
    guard = StepGuard(Precision("fp16", CPU, "test"))
    assert judged(guard, 1.0, float("inf"), float("nan"), 2.0, float("inf")) == [1, 0, 0, 1, 0]
    assert guard.check(5, scale=8.0) == 3
    assert (guard.skipped.item(), guard.streak.item()) == (3, 1)
    twin = StepGuard(Precision("fp16", CPU, "test"))
    twin.load_state_dict(guard.state_dict())
    assert twin.check(5, scale=8.0) == 3 and twin.streak.item() == 1


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_one_non_finite_step_stops_a_run_that_cannot_mend_it(name):
    guard = StepGuard(Precision(name, CPU, "test"))
    judged(guard, 1.0)
    assert guard.check(1, scale=1.0) == 0
    judged(guard, float("nan"))
    with pytest.raises(UserError, match=f"step 2.*{name.upper()}.*--max-grad-norm"):
        guard.check(2, scale=1.0)


def test_fp16_stops_when_its_scale_collapses_or_nothing_but_skips_comes():
    guard = StepGuard(Precision("fp16", CPU, "test"))
    judged(guard, float("inf"))
    with pytest.raises(UserError, match="scale fell to 0.5.*--use-bf16"):
        guard.check(1, scale=0.5)
    judged(guard, *[float("inf")] * (StepGuard.MAX_STREAK - 1))
    with pytest.raises(UserError, match=f"skipped {StepGuard.MAX_STREAK} steps in a row"):
        guard.check(50, scale=2.0)
