"""What runs on a card, run without one: no device is mixed up, nothing waits for the card, and precisions are as said.

Tensors have no values here (see measure/fake_cuda.py), so kernels and numbers are not tested.
"""

from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from EqM import train
from EqM.engine import precision, prepare
from EqM.engine.precision import FLAGS as PRECISIONS
from EqM.engine.precision import ISLANDS
from EqM.engine.trainer import Trainer
from EqM.measure.counting import Count
from EqM.measure.fake_cuda import CUDA, fake_cuda
from EqM.measure.rehearsal import build_autoencoder
from EqM.models import SIZES, Attention, EqM
from EqM.pipeline import EqMPipeline
from EqM.run.log import Meter
from EqM.samplers import SAMPLERS
from EqM.watch.preview import Preview

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="a PyTorch without CUDA makes no graphs of tensors on a card"
)
KERNEL = {"fp32": "efficient", "bf16": "flash", "fp16": "flash"}
CLASSES, BATCH = 3, 2


@contextmanager
def on_card(name="bf16", size="T", patch=4, ebm="none", video=False, strict=True, **card):
    """(network of two blocks, Precision, Border, Count) on a card that is not there."""
    _, hidden, heads = SIZES[size]
    with fake_cuda(strict=strict, **card) as border, Count("cuda") as count:
        model = EqM((4, 8, 8) if video else 8, patch, 4, hidden, 2, heads, num_classes=CLASSES, ebm=ebm)
        model = model.to(CUDA)  # as train.py puts it there
        border.uploads = 0
        yield model, precision.activate(name, CUDA), border, count


def batches(model):
    while True:
        x = torch.randn(BATCH, *model.input_shape, device=CUDA)
        yield x, torch.zeros(BATCH, dtype=torch.long, device=CUDA)


def trained(model, run_in, flags="", steps=1):
    """The Trainer after so many steps, each told to a Meter as train.py does it."""
    args = train.parse_args(["--latents", "none", *flags.split()])
    trainer = Trainer(args, model, run_in, 10)
    meter, stream = Meter(CUDA), batches(model)
    for _ in range(steps):
        loss, grad_norm, applied = trainer.step(stream)
        meter.add("loss", loss, applied)
    for told in (loss, grad_norm, applied):
        assert told.device == CUDA and told.dtype == torch.float32 and told.ndim == 0
    return trainer


def block_products(model, passes=1):
    """Floating-point operations of the forward pass through the blocks' linear layers, which are 16-bit in 16 bits."""
    tokens = BATCH * passes * model.pos_embed.shape[1]
    layers = [layer for block in model.blocks for part in (block.attn, block.mlp) for layer in part.children()]
    return 2 * tokens * sum(layer.weight.numel() for layer in layers)


STEPS = {  # flags of train.py: (what the network is, passes a step)
    "": ({}, 1),
    "--video --clip-len 4 --path-type VP --prediction score --loss-weight likelihood": ({"video": True}, 1),
    "--disp --max-grad-norm 1 --grad-accum-steps 2 --lr-schedule cosine --warmup-steps 2 --no-uncond": ({}, 2),
    "--grad-checkpointing --path-type GVP --prediction noise --loss-weight velocity": ({"patch": 2}, 1),
}


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("flags", STEPS)
def test_a_step_never_waits_mixes_no_devices_and_multiplies_as_said(flags, name):
    network, passes = STEPS[flags]
    with on_card(name, **network) as (model, run_in, border, count):
        trainer = trained(model, run_in, flags)
        assert (border.waits, border.uploads) == (0, 0)
        again = 2 if "checkpointing" in flags else 1
        assert border.attentions == [KERNEL[name]] * (2 * passes * again)
        for parameter in (*model.parameters(), *trainer.ema.model.parameters()):
            assert parameter.device == CUDA and parameter.dtype == torch.float32
            assert parameter.grad is None or parameter.grad.dtype == torch.float32
        dtypes = {dtype for kind, dtype in count.products if kind == "attention"}
        assert dtypes == {run_in.dtype}
        if name != "fp32":  # forward and twice backward, and once more where blocks are recomputed
            times = 3 + again - 1
            assert count.products["matrix", run_in.dtype] == times * block_products(model, passes)


@pytest.mark.parametrize(("name", "kind", "more"), [("fp32", "dot", ""), ("bf16", "l2", "--disp --max-grad-norm 1")])
def test_a_step_on_an_energy_takes_the_one_attention_that_is_differentiated_twice(name, kind, more):
    with on_card(name, ebm=kind) as (model, run_in, border, count):
        trained(model, run_in, f"--ebm {kind} {more}")
        assert (border.waits, border.uploads) == (0, 0) and border.attentions == ["math"] * 2
        if name != "fp32":
            assert count.products["matrix", run_in.dtype] > 3 * block_products(model)


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_size_has_a_fused_attention(name):
    with fake_cuda() as border:
        run_in = precision.activate(name, CUDA)
        for _, hidden, heads in SIZES.values():
            with run_in.autocast():
                Attention(hidden, heads).to(CUDA)(torch.randn(BATCH, 4, hidden, device=CUDA))
        assert border.attentions == [KERNEL[name]] * len(SIZES)


def test_older_cards_have_fp16_without_flash_and_no_bf16():
    with on_card("fp16", capability=(7, 5)) as (model, run_in, border, _):
        trained(model, run_in)
        assert set(border.attentions) == {"efficient"}
        with pytest.raises(Exception, match="no BF16 units; --use-amp"):
            precision.activate("bf16", CUDA)


@pytest.mark.parametrize(("name", "ebm"), [("bf16", "none"), ("fp16", "dot")])
def test_islands_give_fp32_and_the_rest_16_bits(name, ebm):
    with on_card(name, ebm=ebm) as (model, run_in, _, _):
        seen = {}
        for path, layer in model.named_modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                layer.register_forward_hook(lambda _, given, result, path=path: seen.update({path: result.dtype}))
        trained(model, run_in, f"--ebm {ebm} --recompute nothing")  # else blocks call no layers
        islands = {path for path in seen if not set(ISLANDS).isdisjoint(path.split("."))}
        assert len(islands) == 1 + 2 + 2 + 2, "patches, time, a modulation of each block, and two at the end"
        assert {seen[path] for path in islands} == {torch.float32}
        assert {seen[path] for path in seen.keys() - islands} == {run_in.dtype}


@contextmanager
def sampled(name, ebm="none", strict=True):
    with on_card(name, ebm=ebm, strict=strict) as (model, run_in, border, count):
        pipe = EqMPipeline(prepare.for_sampling(model, run_in), run_in)
        yield pipe, torch.randn(BATCH, 4, 8, 8, device=CUDA), torch.zeros(BATCH, dtype=torch.long, device=CUDA), border


def noise(row, step):
    return torch.randn(4, 8, 8, device=CUDA)


GUIDANCE = {"none": {"cfg_scale": 1.0}, "published": {}, "all channels": {"cfg_channels": None}}


@pytest.mark.parametrize("name", PRECISIONS)
def test_samplers_with_a_fixed_number_of_steps_never_wait(name):
    cases = [("gd", guidance) for guidance in GUIDANCE]
    if name == "bf16":
        cases += [(sampler, "published") for sampler in SAMPLERS if sampler not in ("gd", "dopri5")]
    with sampled(name) as (pipe, x, y, border):
        for sampler, guidance in cases:
            border.attentions.clear()
            kick = {"noise": noise, "temperature": 0.1} if sampler == "langevin" else {}
            end = pipe.descend(x, y, sampler=sampler, num_sampling_steps=3, **GUIDANCE[guidance], **kick)
            assert end.device == CUDA and end.dtype == torch.float32 and end.shape == x.shape
            evaluations = 4 if sampler == "heun" else 2
            assert border.attentions == [KERNEL[name]] * 2 * evaluations, sampler
        assert border.waits == 0


def test_samplers_that_choose_their_steps_or_stop_wait_and_mix_no_devices():
    with sampled("bf16", strict=False) as (pipe, x, y, border):
        assert pipe.descend(x, y, sampler="dopri5", num_sampling_steps=3).device == CUDA
        waits = border.waits
        assert waits and pipe.descend(x, y, num_sampling_steps=3, stop_norm=1.0).device == CUDA
        assert border.waits > waits


@pytest.mark.parametrize(("name", "ebm"), [("fp32", "dot"), ("bf16", "l2"), ("fp16", "dot")])
def test_an_energy_and_its_field_are_fp32_and_do_not_wait(name, ebm):
    with sampled(name, ebm) as (pipe, x, y, border):
        assert pipe.energy(x, y).dtype == pipe.field(x, y).dtype == torch.float32
        assert pipe.descend(x, y, num_sampling_steps=3).shape == x.shape
        assert border.waits == 0 and set(border.attentions) == {KERNEL[name]}


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_autoencoder_works_both_ways_in_its_precision(tiny_vae, name):
    with fake_cuda(strict=False) as border, Count("cuda") as count:
        vae = build_autoencoder(tiny_vae, precision.activate(name, CUDA))
        border.uploads = 0
        for frames in ((), (3,)):
            latents = vae.encode(torch.zeros(BATCH, 3, *frames, 16, 16, device=CUDA))
            pixels = vae.decode(latents)
            assert latents.dtype == pixels.dtype == torch.float32 and latents.device == pixels.device == CUDA
            assert latents.shape == (BATCH, 4, *frames, 4, 4) and pixels.shape == (BATCH, 3, *frames, 16, 16)
        assert {dtype for kind, dtype in count.products if kind == "convolution"} == {vae.run_in.dtype}
        assert border.uploads == 0
        assert border.waits == (4 if name == "fp16" else 0), "FP16 looks for values that are not finite"


def test_a_preview_descends_between_steps():
    with on_card() as (model, run_in, border, _):
        trainer = trained(model, run_in)
        vae = build_autoencoder("none", run_in)
        averaged = prepare.for_averages(trainer.ema.model, run_in)
        args = Namespace(cfg_scale=4.0, global_seed=0)
        preview = Preview(Path(), args, trainer, averaged, vae, ["cat", "dog", "owl"])
        end = preview.pipe.descend(preview.noise, preview.labels, num_sampling_steps=3)
        pixels = preview.pipe.decode(end)
        assert pixels.dtype == torch.uint8 and pixels.device == CUDA and border.waits == 0
        trainer.step(batches(model))
