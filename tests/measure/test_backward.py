"""Backward passes in Python: PyTorch's own gradients to the bit, and nothing saved stays longer."""

import copy
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from EqM import train
from EqM.engine.precision import Precision
from EqM.engine.trainer import Trainer
from EqM.measure import backward
from EqM.models import EqM

CPU = torch.device("cpu")


def step(model, flags, name):
    """Loss and gradients of a training step, the optimizer's left out."""
    args = train.parse_args(["--latents", "none", *flags.split()])
    trainer = Trainer(args, copy.deepcopy(model), Precision(name, CPU, "test"), 10)
    torch.manual_seed(1)
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    loss, _, _ = trainer.step(iter([(x, y)] * args.grad_accum_steps))
    return [loss, *(p.grad for p in trainer.model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("flags", ["--grad-accum-steps 2 --disp", "--grad-checkpointing", "--ebm l2"])
def test_a_step_has_pytorchs_gradients_to_the_bit(flags, name):
    torch.manual_seed(0)
    model = EqM(8, 4, 4, 48, 2, 4, num_classes=3, ebm="l2" if "ebm" in flags else "none")
    for weight in model.parameters():
        weight.data.normal_(std=0.1) if weight.requires_grad else None
    expected = step(model, flags, name)
    with backward.in_python():
        found = step(model, flags, name)
    assert len(found) == len(expected) > 20
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs) and theirs.abs().sum() > 0


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, factor, x, still, y):
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        return factor * x * y + still, y * 2

    @staticmethod
    def backward(ctx, grad, other):
        x, y = ctx.saved_tensors
        return None, ctx.factor * grad * y, None, ctx.factor * grad * x + 2 * other


def test_functions_of_python_and_recomputation_are_run_as_pytorch_does():
    def gradients():
        x, y = torch.arange(3.0).requires_grad_(), torch.full((3,), 2.0, requires_grad=True)
        first, second = checkpoint(Scaled.apply, 3.0, x, torch.ones(3), y.exp(), use_reentrant=False)
        (first * x).sum().backward()  # the second's gradient is zeros
        inner = Scaled.apply(2.0, x, torch.ones(3), y)[0].square().sum()
        (slope,) = torch.autograd.grad(inner, x, create_graph=True)
        slope.square().sum().backward()
        return x.grad, y.grad, slope

    expected = gradients()
    with backward.in_python():
        found = gradients()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_what_nodes_saved_is_gone_when_they_have_run():
    with backward.in_python():
        y = torch.ones(4, requires_grad=True).exp()
        kept = weakref.ref(y.exp().untyped_storage())  # no graph holds this one
        z = y.exp()
        held = weakref.ref(z.untyped_storage())
        total = z.sum()
        del z
        assert kept() is None and held() is not None
        total.backward()
        assert held() is None
        with pytest.raises(RuntimeError, match="second time"):
            total.backward()


def test_pytorchs_own_engine_is_back_afterwards():
    with pytest.raises(KeyError), backward.in_python():
        raise KeyError
    x = torch.ones(2, requires_grad=True)
    x.square().sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))
