"""Fused kernels without a card: by Triton's interpreter they compute what PyTorch does, and its compiler takes them."""

import os
import subprocess
import sys

import pytest
import torch

from EqM import train
from EqM.engine import acceleration, elementwise, fused, precision, recompute
from EqM.engine.precision import Precision
from EqM.measure.counting import Count
from EqM.measure.fake_cuda import CUDA, fake_cuda
from EqM.models import SIZES, EqM
from helpers import PYTHONPATH, REPO

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")
KERNELS = {  # arguments as fused.py gives them
    "modulated_norm": "X:*fp32 Shift:*fp32 Factor:*fp32 Out:*half L:i32 of_shift:i32 of_factor:i32 eps:fp32",
    "norm_backward": (
        "OfOut:*half X:*fp32 Factor:*fp32 OfResult:*fp32 OfX:*fp32 Sums:*fp32 L:i32 of_factor:i32 eps:fp32"
    ),
    "gated_sum": "X:*fp32 Gate:*fp32 Value:*half Out:*fp32 L:i32 of_gate:i32",
    "gate_backward": "OfGated:*fp32 Value:*half Gate:*fp32 OfValue:*half Sums:*fp32 L:i32 of_gate:i32",
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    found = tmp_path_factory.mktemp("kernels") / "found.pt"
    surroundings = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "ignore"}
    script = REPO / "tests" / "engine" / "interpreted.py"
    subprocess.run([sys.executable, script, found], check=True, env=surroundings, cwd=REPO)
    return torch.load(found)


def test_kernels_compute_what_pytorchs_operations_do(interpreted):
    assert len(interpreted["compared"]) > 60
    for what, ours, theirs in interpreted["compared"]:
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), what
        digits = 2e-3 if what.lower().endswith("fp16") else 1e-5
        values = theirs[theirs.isfinite()].double()
        nothing = digits * values.square().mean().sqrt().item()
        torch.testing.assert_close(ours, theirs, rtol=digits, atol=nothing, equal_nan=True, msg=what)


def test_a_kernel_that_is_wrong_or_cannot_be_built_gives_way(interpreted):
    works, wrong, broken = interpreted["obstacles"]
    assert works is None
    assert wrong == "gated_sum gave other results here than PyTorch's operations"
    assert broken == "Failed to find C compiler."


@pytest.mark.parametrize(("name", "capability"), [("fp16", 75), ("bf16", 90)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_for_a_card_that_is_not_here(kernel, name, capability):
    """As the launches give them EqM-XL: memory is read four words at a time, and BF16 rounded to the nearest."""
    from EqM.engine import kernels

    types = dict(argument.split(":") for argument in KERNELS[kernel].replace("*half", f"*{name}").split())
    known = [i for i, argument in enumerate(types) if argument not in ("L", "eps")]
    even = {(i,): [["tt.divisibility", 16]] for i in known}
    D = SIZES["XL"][1]
    program = fused._program(D)
    constants = {"D": D, "BLOCK": program.pop("BLOCK")} | ({"TOKENS": fused.TOKENS} if "backward" in kernel else {})
    types |= dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(fn=getattr(kernels, kernel), signature=types, constexprs=constants, attrs=even)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=program)
    assert len(compiled.asm["cubin"]) > 1000
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    if name == "bf16" and kernel in ("modulated_norm", "gate_backward"):
        assert "cvt.rn.bf16" in compiled.asm["ptx"]


def test_the_operators_are_what_tensors_without_values_see():
    """Shapes and dtypes of results, without Triton; and each is one kernel that reads and writes each operand once."""
    N, L, D = 2, fused.TOKENS + 1, 48
    with fake_cuda(), Count("cuda") as count:
        x, of_result = torch.zeros(2, N, L, D, device=CUDA)
        shift, factor, gate = torch.zeros(N, 3, 1, D, device=CUDA).unbind(1)
        value, of_gate, of_affine = x.half(), x.new_empty(N, D), x.new_empty(N, 2, D)
        tokens, a_sample = x.numel() * 4, N * D * 4
        moved = {}

        def run(operation, *given):
            count.reset()
            result = operation(*given)
            moved[operation.__name__] = count.moved, count.kernels
            return result

        modulated, kept = run(fused.modulated_norm, x, 1e-6, shift, factor, torch.half)
        assert (modulated.dtype, modulated.shape, kept) == (torch.half, x.shape, None)
        assert run(fused.gated_sum, x, gate, value).dtype == torch.float32
        assert run(fused.gate_backward, of_result, value, gate, of_gate).dtype == torch.half
        assert run(fused.norm_backward, value, x, 1e-6, factor, None, of_result, of_affine).shape == x.shape
    sums = 2 * a_sample + a_sample  # of two parts, written and read, and their sum
    assert moved == {
        "modulated_norm": (tokens * 1.5 + 2 * a_sample, 1),
        "gated_sum": (tokens * 2.5 + a_sample, 1),
        "gate_backward": (tokens * 2 + a_sample + 2 * a_sample + sums, 2),
        "norm_backward": (tokens * 3.5 + a_sample + 2 * (2 * a_sample + sums), 2),
    }


def test_a_block_moves_half_as_much():
    """All that is no product, forward and backward, in bytes per token and channel; and it starts fewer kernels."""
    moved, kernels = {}, {}
    for operations in (fused, elementwise):
        with fake_cuda(), Count("cuda") as count:
            run_in = precision.activate("bf16", CUDA)
            model = run_in.keep_islands(EqM(64, 2, hidden_size=64, depth=1, num_heads=2).to(CUDA))
            recompute.recompute_in(model, run_in, operations)
            x, modulation = (torch.zeros(s, device=CUDA, requires_grad=True) for s in ((8, 1024, 64), (8, 6 * 64)))
            count.reset()
            with run_in.autocast():
                result = model.blocks[0](x, modulation)
            result.backward(torch.zeros_like(x))
            moved[operations], kernels[operations] = count.moved / x.numel(), count.kernels
    assert moved[fused] < 0.55 * moved[elementwise] and kernels[fused] <= kernels[elementwise] - 20


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("flags", ["", "--no-fused-kernels"])
def test_kernels_are_for_gpus_and_can_be_left_out(monkeypatch, device, flags):
    monkeypatch.setattr(fused, "_try", lambda operations, *_: [torch.zeros(1)] * len(fused._TRIED))
    told = []
    args = train.parse_args(["--latents", "none", *flags.split()])
    taken = acceleration.operations(args, 48, Precision("bf16", torch.device(device), ""), told.append)
    assert taken is (fused if device == "cuda" and not flags else elementwise) and not told


def test_what_stands_in_their_way_is_said(monkeypatch):
    monkeypatch.setattr(fused, "_try", lambda *_: 1 / 0)
    told, args = [], train.parse_args(["--latents", "none"])
    on_card = Precision("bf16", torch.device("cuda"), "")
    assert acceleration.operations(args, 48, on_card, told.append) is elementwise
    assert told == ["PyTorch's operations take the place of fused kernels: division by zero"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("size", SIZES)
def test_this_card_takes_them(size, name):
    assert fused.obstacle(CUDA, precision.DTYPES[name], SIZES[size][1]) is None
