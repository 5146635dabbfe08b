"""Gradient checkpointing and compilation change speed and memory, not results."""

import copy
import shutil
from argparse import Namespace
from collections import Counter
from itertools import repeat
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from EqM import samplers, train
from EqM.engine import acceleration, parallel, prepare
from EqM.engine.precision import Precision
from EqM.engine.trainer import Trainer
from EqM.guidance import Guided
from EqM.models import EqM_models
from EqM.run.distributed import Ranks
from EqM.run.shards import is_shard

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
    both = Namespace(compile=True, grad_checkpointing=True, recompute=None)
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
    prepare.for_training(
        model, run_in, Namespace(compile=True, grad_checkpointing=checkpointing, recompute=None), None, told.append
    )
    assert not told
    for ours, plain in zip(field_and_gradients(model, run_in), expected, strict=True):
        assert (ours - plain).norm() <= tolerance * plain.norm()
    assert list(model.state_dict()) == keys
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "a block's, and the trial of the compiler"


@pytest.fixture
def traced(monkeypatch):
    """torch.compile up to where it would write C++: tracing, guards, what is kept. The graphs that it makes."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def partition(graph, inputs, **more):
        chosen = torch._inductor.config.custom_partitioner_fn or min_cut_rematerialization_partition
        return chosen(graph, inputs, compiler="inductor", **more)

    ours = aot_autograd(
        fw_compiler=record, bw_compiler=record, partition_fn=partition, decompositions=select_decomp_table
    )
    compiled = torch.compile
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: ours)
    monkeypatch.setattr(
        torch, "compile", lambda f, backend="inductor": compiled(f, backend=ours if backend == "inductor" else backend)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return graphs


@pytest.mark.parametrize(("name", "words"), [("bf16", ""), ("fp32", "--grad-checkpointing")])
def test_fifty_steps_compile_one_block_once_and_whole(traced, name, words):
    given = f"--latents none --compile --grad-accum-steps 2 --max-grad-norm 1 --disp {words}"
    model = EqM_models["EqM-T/4"](input_size=(4, 8, 8), num_classes=3)
    trainer = Trainer(train.parse_args(given.split()), model, Precision(name, CPU, "test"), 50, tell=pytest.fail)
    inputs = repeat((torch.randn(2, 4, 4, 8, 8), torch.tensor([0, 1])))
    counters = torch._dynamo.utils.counters
    for _ in range(50):
        assert trainer.step(inputs)[2] == 1
    assert counters["stats"]["unique_graphs"] == 2, "a block's, and the trial of the compiler"
    assert not counters["graph_break"]


def test_data_parallel_does_not_cut_compiled_blocks_nor_send_buffers(traced, monkeypatch):
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)  # where the first cut would be
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        args = train.parse_args(["--latents", "none", "--compile"])
        model = EqM_models["EqM-T/4"](input_size=8, num_classes=3)
        ranks = SimpleNamespace(world_size=2, device=CPU)  # as it would be called, were there another
        trainer = Trainer(args, model, Precision("bf16", CPU, "test"), 2, ranks, tell=pytest.fail)
        trainer.step(iter([(torch.randn(2, 4, 8, 8), torch.tensor([0, 1]))]))
        assert trainer.network is not model and not trainer.network.broadcast_buffers
    finally:
        torch.distributed.destroy_process_group()
    assert len(traced) == 3, "the trial of the compiler, and a block forwards and backwards"


@pytest.fixture
def one_rank_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, CPU)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("words", ["", "--grad-checkpointing"])
def test_blocks_of_a_sharded_network_are_compiled_whole_and_step_as_plain_ones(
    traced, one_rank_group, monkeypatch, words
):
    """In a group of one rank, whose share is the whole: the hooks that gather and free it are those of many."""
    monkeypatch.setattr(parallel, "splits", lambda args, ranks: args.shard)
    inputs = [(torch.randn(2, 4, 8, 8), torch.tensor([0, 1])) for _ in range(8)]

    def losses(flags):
        torch.manual_seed(0)
        model = EqM_models["EqM-T/4"](input_size=8, num_classes=3)
        given = f"--latents none --grad-accum-steps 2 --max-grad-norm 1 --lr 1e-2 {flags}"
        args = train.parse_args(given.split())
        trainer = Trainer(args, model, Precision("fp32", CPU, "test"), 4, one_rank_group, tell=pytest.fail)
        torch.manual_seed(1)
        stream = iter(inputs)
        return [trainer.step(stream)[0] for _ in range(4)], model

    plain, _ = losses("")
    sharded, model = losses(f"--shard --compile {words}")
    assert torch.stack(sharded) == pytest.approx(torch.stack(plain), rel=1e-6)
    assert all(is_shard(parameter) for parameter in model.parameters())
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2, "a block's, and the trial of the compiler"
    assert len(traced) == 3 and not counters["graph_break"], "the trial, and a block forwards and backwards"


@pytest.mark.parametrize(("choice", "most"), [("elementwise", 26), ("nothing", 38)])
@pytest.mark.parametrize("tokens", [256, 4])
def test_compiled_blocks_keep_products_and_take_none_twice(traced, choice, most, tokens):
    """In bytes per token and channel, by what is saved; attention as on a GPU, without weights of all pairs.

    Weights outweigh few tokens: what a compiler may keep must not depend on that.
    """
    model, told = tiny().train(), []
    wanted = Namespace(compile=True, grad_checkpointing=False, recompute=choice)
    prepare.for_training(model, Precision("bf16", CPU, "test"), wanted, None, told.append)
    x, modulation = torch.randn(2, tokens, 144, requires_grad=True), torch.randn(2, 6 * 144, requires_grad=True)
    kept = {}

    def keep(tensor):
        if tensor.shape[0] in (2, 2 * tokens) and tensor.shape != modulation.shape:  # samples or tokens: not weights
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        model.blocks[0](x, modulation).sum().backward()
    assert not told and most - 4 < sum(kept.values()) / x.numel() < most
    calls = Counter(str(node.target) for graph in traced for node in graph.graph.nodes if node.op == "call_function")
    attention = {n for op, n in calls.items() if "attention" in op}
    assert (calls["aten.addmm.default"], calls["aten.mm.default"], attention) == (4, 8, {1})


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
