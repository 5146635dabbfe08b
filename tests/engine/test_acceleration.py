"""Gradient checkpointing and compilation change speed and memory, not results."""

import copy
import shutil
from argparse import Namespace

import pytest
import torch

from EqM import samplers
from EqM.engine import acceleration, prepare
from EqM.engine.precision import Precision
from EqM.guidance import Guided
from EqM.models import EqM_models

CPU = torch.device("cpu")


def tiny(ebm="none", uncond=True):
    torch.manual_seed(0)
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=3, ebm=ebm, uncond=uncond)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.requires_grad else None
    return model


def field_and_gradients(model, run_in):
    torch.manual_seed(1)
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3])
    with run_in.autocast():
        field = model(x, t, y)
    (1000 * field.float().square().mean()).backward()
    return [field.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("name", "rounded"), [("fp32", False), ("bf16", False), ("bf16", True), ("fp16", True)])
def test_checkpointed_blocks_give_the_same_gradients(name, rounded):
    run_in = Precision(name, CPU, "test", rounded)
    plain = run_in.keep_islands(tiny().train())
    checkpointed = copy.deepcopy(plain)
    keys = list(checkpointed.state_dict())
    acceleration.checkpoint_blocks(checkpointed, run_in)
    calls = []
    checkpointed.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    expected = field_and_gradients(plain, run_in)
    assert all(torch.equal(a, b) for a, b in zip(field_and_gradients(checkpointed, run_in), expected, strict=True))
    assert len(calls) > 1, "the block ran again in the backward pass"
    assert list(checkpointed.state_dict()) == keys


def test_compile_falls_back_in_words_where_it_cannot_work(monkeypatch):
    told = []
    fp32 = Precision("fp32", CPU, "test")
    acceleration.compile_blocks(tiny("dot"), fp32, told.append)
    acceleration.compile_blocks(tiny(), Precision("fp16", CPU, "test", rounded=True), told.append)

    def broken(function):
        raise RuntimeError("no compiler found\nmore lines")

    monkeypatch.setattr(torch, "compile", broken)
    model = tiny()
    acceleration.compile_blocks(model, fp32, told.append)
    assert [line.startswith("--compile has no effect: ") for line in told] == [True] * 3
    assert "differentiated twice" in told[0] and "rounded" in told[1] and "(no compiler found)" in told[2]
    assert not any("forward" in vars(block) for block in model.blocks)


def test_what_cannot_be_both_compiled_and_recomputed_is_recomputed():
    model, told = tiny(), []
    both = Namespace(compile=True, grad_checkpointing=True)
    prepare.for_training(model, Precision("bf16", CPU, "test"), both, None, told.append)
    assert len(told) == 1 and "recomputed cannot be compiled" in told[0]
    assert not hasattr(model.blocks[0].forward.args[0], "_torchdynamo_orig_callable")


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for CPUs with g++")
@pytest.mark.parametrize(("name", "checkpointing", "tolerance"), [("bf16", False, 0.02), ("fp32", True, 1e-5)])
def test_compiled_blocks_give_the_same_field_and_keep_their_names(name, checkpointing, tolerance):
    run_in, told = Precision(name, CPU, "test"), []
    model = run_in.keep_islands(tiny().train())
    expected, keys = field_and_gradients(copy.deepcopy(model), run_in), list(model.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    prepare.for_training(model, run_in, Namespace(compile=True, grad_checkpointing=checkpointing), None, told.append)
    assert not told
    for ours, plain in zip(field_and_gradients(model, run_in), expected, strict=True):
        assert (ours - plain).norm() <= tolerance * plain.norm()
    assert list(model.state_dict()) == keys
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "a block's, and the trial of the compiler"


def descent(model, run_in, labels):
    """The end of a guided descent of three updates, and how often the last block was modulated."""
    calls = []
    hook = model.blocks[-1].adaLN_modulation.register_forward_hook(lambda *_: calls.append(1))

    def field(x, t, y):
        with run_in.autocast():
            return model(x, t, y)

    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        end = samplers.descend(Guided(field, labels, 4.0, 3), x, points=4, stepsize=0.1, sampler="ngd")
    hook.remove()
    return end, len(calls)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("ebm", "uncond", "calls"), [("none", True, 1), ("l2", True, 1), ("none", False, 3)])
def test_a_network_modulated_once_descends_to_the_same_bits(name, ebm, uncond, calls):
    run_in = Precision(name, CPU, "test", rounded=name == "fp16")
    model = run_in.keep_islands(tiny(ebm, uncond).eval().requires_grad_(False))
    for labels in (torch.tensor([0, 1]), torch.tensor([2, 0])):
        expected, without = descent(model, run_in, labels)
        with acceleration.modulated_once(model):
            ours, made = descent(model, run_in, labels)
        assert torch.equal(ours, expected) and (made, without) == (calls, 3)


def test_a_descent_that_fails_leaves_no_modulation_behind():
    model, y = tiny().eval(), torch.tensor([0])
    x, t = torch.randn(1, 4, 8, 8), torch.zeros(1)
    expected = model(x, t, y + 1)
    with pytest.raises(KeyboardInterrupt), acceleration.modulated_once(model):
        model(x, t, y)
        raise KeyboardInterrupt
    assert torch.equal(model(x, t, y + 1), expected)
