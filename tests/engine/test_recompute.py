"""Blocks that compute element-wise work again: the same bits, less kept, no product taken twice."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from EqM import train
from EqM.engine import recompute
from EqM.engine.precision import Precision
from EqM.engine.trainer import Trainer
from EqM.models import EqM_models

CPU = torch.device("cpu")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


def trained(name, rounded, size, *words):
    """Everything two steps leave behind: losses, gradient norms, gradients and weights."""
    torch.manual_seed(0)
    model = EqM_models["EqM-T/4"](input_size=size, num_classes=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05) if parameter.requires_grad else None
    given = "--latents none --disp --grad-accum-steps 2 --max-grad-norm 0.1"
    args = train.parse_args([*given.split(), *words])
    trainer = Trainer(args, model, Precision(name, CPU, "test", rounded), 2)
    stream = iter([(torch.randn(3, *model.input_shape), torch.tensor([0, 1, 2])) for _ in range(4)])
    told = [torch.stack(trainer.step(stream)) for _ in range(2)]
    assert all(applied == 1 and norm > 0.1 for _, norm, applied in told)
    return told + [p.grad for p in model.parameters() if p.grad is not None] + list(model.parameters()), model


@pytest.mark.parametrize("size", [8, (4, 8, 8)])
@pytest.mark.parametrize(
    ("name", "rounded"), [("fp32", False), ("bf16", False), ("fp16", False), ("bf16", True), ("fp16", True)]
)
def test_steps_give_the_same_bits_with_clipping_accumulation_and_the_dispersive_loss(name, rounded, size):
    expected, plain = trained(name, rounded, size, "--recompute", "nothing")
    ours, model = trained(name, rounded, size, "--recompute", "elementwise")
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert "forward" in vars(model.blocks[0]) and "forward" not in vars(plain.blocks[0])


@pytest.mark.parametrize(
    ("words", "name", "patched"),
    [
        ("", "fp32", None),
        ("", "bf16", recompute.Block),
        ("--recompute elementwise", "fp32", recompute.Block),
        ("--recompute nothing", "fp16", None),
        ("--recompute elementwise --grad-checkpointing", "bf16", torch.utils.checkpoint.checkpoint),
        ("--ebm dot", "bf16", None),
    ],
)
def test_sixteen_bits_recompute_unless_told_otherwise(words, name, patched):
    args = train.parse_args(["--latents", "none", *words.split()])
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=3, ebm=args.ebm)
    Trainer(args, model, Precision(name, CPU, "test"), 2)
    forwards = {vars(block).get("forward") for block in model.blocks}
    assert len(forwards) == (1 if patched is None else len(model.blocks))
    for forward in forwards - {None}:
        assert forward.func is (recompute._forward if patched is recompute.Block else patched)


def test_an_energy_that_is_to_recompute_is_refused(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--latents", "none", "--ebm", "dot", "--recompute", "elementwise"])
    assert "--recompute cannot recompute an energy's field" in capsys.readouterr().err


class Calls(TorchDispatchMode):
    """How often each operation is called within it, in .of by name."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def blocks(name):
    """A block and the same one that recomputes, and what to call them with: x (N, L, D) and modulation (N, 6 D)."""
    torch.manual_seed(0)
    model = EqM_models["EqM-T/4"](input_size=64, num_classes=3).train()
    ours = copy.deepcopy(model)
    recompute.recompute_in(ours, Precision(name, CPU, "test"))
    shapes = ((2, 256, 144), (2, 6 * 144))
    return model.blocks[0], ours.blocks[0], [torch.randn(shape, requires_grad=True) for shape in shapes]


def autocast(name):
    """As on a GPU, where attention keeps no weights of all pairs of tokens: `Precision.autocast` has it so on a CPU."""
    return torch.autocast("cpu", Precision(name, CPU, "test").dtype, enabled=name != "fp32")


@pytest.mark.parametrize(("name", "most", "of_autograd"), [("fp32", 52, 80), ("bf16", 32, 48), ("fp16", 32, 48)])
def test_a_block_keeps_what_products_made(name, most, of_autograd):
    """By the allocator, in bytes per token and channel."""
    plain, ours, inputs = blocks(name)
    tokens = inputs[0].numel()

    def left(call):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as memory:
            result = call()
        return result, sum(event.self_cpu_memory_usage for event in memory.key_averages()) / tokens

    with autocast(name):
        kept = {}
        for block in (plain, ours):
            result, kept[block] = left(partial(block, *inputs))  # with its result, and without its input: 4 for 4
        assert 0 < kept[ours] < most and of_autograd < kept[plain]
    gradient = torch.ones_like(result)
    _, freed = left(partial(result.backward, gradient))
    gradients = sum(p.numel() for p in (*inputs, *ours.parameters()) if p.grad is not None) * 4 / tokens
    assert freed == pytest.approx(gradients - (kept[ours] - 4), abs=0.5), "nothing is kept while others go back"


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_no_product_is_computed_twice(name):
    counts = []
    *both, inputs = blocks(name)
    for block in both:
        with Calls() as calls, autocast(name):
            block(*inputs).sum().backward()
        counts.append({op: calls.of[op] for op in calls.of if op in PRODUCTS or "attention" in op})
    assert counts[0] == counts[1] and counts[0]["mm"] == 8 and counts[0]["addmm"] == 4


def test_a_network_that_recomputes_can_be_copied_and_the_copy_is_its_own():
    _, ours, inputs = blocks("bf16")
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    with autocast("bf16"):
        copied(*inputs).sum().backward()
    assert copied.mlp.fc1.weight.grad.norm() > 0 and ours.mlp.fc1.weight.grad is None


def test_without_gradients_blocks_run_as_before():
    plain, ours, inputs = blocks("bf16")
    with autocast("bf16"), torch.no_grad():
        result = ours(*inputs)
        assert torch.equal(result, plain(*inputs)) and result.grad_fn is None
