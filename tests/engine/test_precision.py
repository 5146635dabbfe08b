"""Precision flags, the 16-bit products of CPUs without 16-bit units, weights cast once, skipped steps."""

from argparse import ArgumentParser, Namespace
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from EqM.engine import precision
from EqM.engine.cpu_products import ProductAttention, RoundedProducts
from EqM.engine.precision import DTYPES, Precision
from EqM.models import EqM_models
from EqM.run.errors import UserError
from EqM.transport import Transport, dispersive_loss

CPU = torch.device("cpu")
HALVES = ("bf16", "fp16")
TOLERANCE = {"bf16": 0.02, "fp16": 0.005}  # of a norm; one rounding is 2^-9 and 2^-12


def flags(*argv):
    parser = ArgumentParser()
    precision.add_flags(parser)
    return parser.parse_args(argv)


def in_precision(name, rounded=True):
    return Precision(name, CPU, "test", rounded=rounded and name != "fp32")


def tiny(ebm="none", **more):
    torch.manual_seed(0)
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=3, ebm=ebm, **more)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def batch(n=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, 8, 8, generator=generator), torch.rand(n, generator=generator), torch.arange(n) % 3


def relative(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(("argv", "name"), [([], "fp32"), (["--use-bf16"], "bf16"), (["--use-amp"], "fp16")])
def test_flags_select_the_dtype_and_only_fp16_scales(argv, name):
    run_in = precision.activate_flags(flags(*argv), CPU)
    assert run_in.name == name and run_in.dtype == DTYPES[name]
    assert run_in.grad_scaler().is_enabled() == (name == "fp16")
    assert name.upper() in run_in.reason


def test_both_flags_at_once_are_an_error(capsys):
    with pytest.raises(SystemExit):
        flags("--use-bf16", "--use-amp")
    assert "not allowed with" in capsys.readouterr().err


def test_the_autoencoder_follows_the_network_unless_told_not_to():
    run_in = in_precision("fp16")
    assert precision.of_vae(Namespace(vae_precision="same"), run_in) is run_in
    assert precision.of_vae(Namespace(vae_precision="fp32"), run_in).name == "fp32"


def test_bf16_is_refused_on_a_card_that_only_emulates_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match="Tesla T4 has no BF16 units.*--use-amp"):
        precision.activate_flags(flags("--use-bf16"), torch.device("cuda"))
    assert precision.activate_flags(flags("--use-amp"), torch.device("cuda")).name == "fp16"


@pytest.mark.parametrize(("argv", "words"), [([], "TF32 where"), (["--no-tf32"], "IEEE FP32")])
def test_fp32_on_a_gpu_says_whether_tf32_is_on(monkeypatch, argv, words):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert words in precision.activate_flags(flags(*argv), torch.device("cuda")).reason
    precision.activate_flags(flags(), CPU)


def test_a_cpu_without_16_bit_units_says_that_it_is_slow(monkeypatch):
    monkeypatch.setattr(precision, "_cpu_computes", lambda name: False)
    run_in = precision.activate_flags(flags("--use-amp"), CPU)
    assert run_in.rounded and "slower than FP32" in run_in.reason
    monkeypatch.setattr(precision, "_cpu_computes", lambda name: True)
    assert not precision.activate_flags(flags("--use-amp"), CPU).rounded


@pytest.mark.parametrize("name", HALVES)
def test_rounded_products_equal_rounded_operands_summed_in_fp32(name):
    dtype = DTYPES[name]
    x, w, b = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
    with in_precision(name).autocast():
        product = F.linear(x, w, b)
    expected = F.linear(*(value.to(dtype).float() for value in (x, w, b))).to(dtype)
    assert product.dtype == dtype and torch.equal(product, expected)


@pytest.mark.parametrize("name", HALVES)
def test_rounded_products_are_close_to_pytorchs_own_16_bit_ones(name):
    """Values and gradients of a whole network, against the dtype's real kernels."""
    model, (x, t, y) = tiny().eval(), batch()
    results = []
    for rounded in (True, False):
        model.zero_grad()
        with in_precision(name, rounded).autocast():
            field = model(x, t, y)
        (1000 * field.float().square().mean()).backward()  # else FP16 gradients underflow
        results.append([field.float(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) < 2 * TOLERANCE[name]


def test_fp16_overflows_as_real_fp16_does():
    with in_precision("fp16").autocast():
        assert torch.isinf(torch.full((1, 1), 300.0) @ torch.full((1, 1), 300.0)).all()


def test_nothing_is_rounded_outside_the_region():
    x = torch.randn(3, 3)
    with RoundedProducts(torch.bfloat16):
        pass
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("ebm", ["none", "dot", "l2"])
def test_weights_cast_once_give_the_same_bits(name, rounded, ebm):
    run_in, (x, t, y) = in_precision(name, rounded), batch()
    model = run_in.keep_islands(tiny(ebm).eval().requires_grad_(False))

    def field():
        with torch.no_grad(), run_in.autocast():
            return model(x, t, y)

    expected = field()
    assert torch.isfinite(expected).all() and expected.any()
    run_in.cast_weights(model)
    assert model.blocks[0].attn.qkv.weight.dtype == run_in.dtype
    assert {model.pos_embed.dtype, model.blocks[0].adaLN_modulation[1].weight.dtype} == {torch.float32}
    assert torch.equal(field(), expected)


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("rounded", [True, False])
def test_islands_are_fp32_to_the_bit_and_the_rest_is_not(name, rounded):
    run_in, model = in_precision(name, rounded), tiny().eval()
    x, t, y = batch()
    outputs = []

    def keep(module, inputs, output):
        outputs.append(output)

    watched = [model.x_embedder, model.t_embedder, model.blocks[0].adaLN_modulation, model.blocks[0].mlp]
    for module in watched:
        module.register_forward_hook(keep)
    model(x, t, y)
    run_in.keep_islands(model)
    with run_in.autocast():
        model(x, t, y)
    exact, ours = outputs[: len(watched)], outputs[len(watched) :]
    assert [torch.equal(*pair) for pair in zip(ours, exact, strict=True)] == [True, True, True, False]
    assert ours[-1].dtype == run_in.dtype


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("ebm", ["dot", "l2"])
def test_the_gradient_of_an_energy_is_fp32_through_islands(name, ebm):
    """Where the blocks pass their input on, only islands are left, and nothing may be rounded."""
    model = tiny(ebm).eval()
    for block in model.blocks:
        block.adaLN_modulation[1].weight.data.zero_()
        block.adaLN_modulation[1].bias.data.zero_()
    exact, exact_energy = model(*batch(), get_energy=True)
    run_in = in_precision(name, rounded=False)
    with run_in.autocast():
        rounded = model(*batch())
        field, energy = run_in.keep_islands(model)(*batch(), get_energy=True)
    assert torch.equal(field, exact) and torch.equal(energy, exact_energy) and not torch.equal(rounded, exact)


@pytest.mark.parametrize(
    ("argv", "products"),
    [([], "high"), (["--no-tf32"], "highest"), (["--use-bf16"], "highest"), (["--use-amp"], "highest")],
)
def test_a_gpu_has_tf32_in_fp32_runs_alone_and_a_cpu_is_left_as_it_was(monkeypatch, argv, products):
    calls = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    precision.activate_flags(flags(*argv), CPU)
    assert not calls
    precision.activate_flags(flags(*argv), torch.device("cuda"))
    assert calls == [products]


def test_a_copy_has_islands_of_its_own_weights():
    run_in, model = in_precision("bf16"), tiny().eval()
    keys = list(model.state_dict())
    copy = deepcopy(run_in.keep_islands(model))
    for parameter in model.parameters():
        parameter.data.zero_()
    with run_in.autocast():
        assert not model(*batch()).any() and copy(*batch()).any()
    assert list(copy.state_dict()) == keys


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("ebm", ["none", "dot", "l2"])
@pytest.mark.parametrize("disp", [False, True])
def test_loss_and_gradients_of_16_bit_training_are_finite_and_close_to_fp32(name, ebm, disp):
    model, transport = tiny(ebm).eval(), Transport()
    torch.manual_seed(2)
    point, y = transport.sample(batch()[0]), batch()[2]

    def step(which):
        model.zero_grad()
        run_in = in_precision(which)
        scale = 2.0**10 if which == "fp16" else 1.0
        with run_in.autocast():
            output, acts = model(point.xt, point.t, y, return_act=True)
        loss = transport.loss(output, point).mean()
        if disp:
            loss = loss + 0.5 * dispersive_loss(acts[-1])
        (loss * scale).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) / scale
        return loss.detach(), gradient

    loss, gradient = step(name)
    expected_loss, expected_gradient = step("fp32")
    assert torch.isfinite(gradient).all() and expected_gradient.norm() > 0.1
    assert relative(loss, expected_loss) < TOLERANCE[name]
    assert relative(gradient, expected_gradient) < 3 * TOLERANCE[name]


@pytest.mark.parametrize("name", HALVES)
def test_parameters_and_gradients_stay_fp32_in_training(name):
    model, (x, t, y) = tiny(), batch()
    with in_precision(name).autocast():
        output = model(x, t, y)
    output.float().mean().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_fp16_without_scaling_loses_gradients_that_the_scaler_keeps():
    """A field whose loss is so small that its gradients lie under FP16's smallest number, 6e-8."""
    weight = torch.ones(4, 4, requires_grad=True)
    x = torch.full((2, 4), 1e-3)

    def gradient(scale):
        weight.grad = None
        with in_precision("fp16").autocast():
            output = F.linear(x, weight)
        (output.float().sum() * 1e-6 * scale).backward()
        return weight.grad / scale

    assert not gradient(1.0).any()
    torch.testing.assert_close(gradient(65536.0), torch.full((4, 4), 2e-9), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", HALVES)
def test_product_attention_is_as_exact_as_its_dtype_can_be(name):
    """Values and gradients in a training step on a CPU, with scores so large that 16 bits would not do for them."""
    dtype = DTYPES[name]
    ours = torch.randn(3, 2, 4, 32, 64, generator=torch.Generator().manual_seed(0))  # q, k, v: (N, heads, L, D / heads)
    ours[0] *= 3
    ours = ours.to(dtype).requires_grad_()
    exact = ours.detach().double().requires_grad_()
    expected = F.scaled_dot_product_attention(*exact)
    with ProductAttention():
        out = F.scaled_dot_product_attention(*ours)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    assert out.dtype == dtype
    for result, truth in ((out, expected), (ours.grad, exact.grad)):
        assert relative(result, truth) < 2 * relative(truth.to(dtype), truth)
