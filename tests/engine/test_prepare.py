"""What is done to a network from outside: all of it, in one order, and nothing to the copy that averages."""

from argparse import Namespace

import pytest
import torch

from EqM import train
from EqM.engine import prepare
from EqM.engine.precision import ISLANDS, Precision
from EqM.engine.trainer import Trainer
from EqM.models import EqM_models

CPU = torch.device("cpu")
PLAIN = Namespace(compile=False, grad_checkpointing=False, recompute=None, no_fused_kernels=False)


def tiny():
    torch.manual_seed(0)
    return EqM_models["EqM-T/4"](input_size=8, num_classes=3)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("island", ISLANDS)
def test_a_network_without_an_island_is_refused_loudly(name, island):
    model = tiny()
    owners = [model, *model.blocks, model.final_layer]
    for owner in owners:
        if hasattr(owner, island):
            setattr(owner, f"{island}_renamed", getattr(owner, island))
            delattr(owner, island)
    for ready in (prepare.for_training, prepare.for_sampling):
        more = (PLAIN, None, print) if ready is prepare.for_training else ()
        with pytest.raises(LookupError, match=f"has no .*{island}.* FP32"):
            ready(model, Precision(name, CPU, "test"), *more)


def test_training_patches_the_network_and_not_its_average():
    args = train.parse_args(["--latents", "none", "--grad-checkpointing"])
    trainer = Trainer(args, tiny(), Precision("bf16", CPU, "test", rounded=True), 2)
    assert "forward" in vars(trainer.model.x_embedder) and "forward" in vars(trainer.model.blocks[0])
    assert not any("forward" in vars(module) for module in trainer.ema.model.modules())
    assert trainer.network is trainer.model and trainer.model.training and not trainer.ema.model.training


def test_sampling_casts_what_is_no_island_and_freezes_all():
    model = prepare.for_sampling(tiny().train(), Precision("bf16", CPU, "test", rounded=True))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert model.final_layer.linear.weight.dtype == model.blocks[0].adaLN_modulation[1].weight.dtype == torch.float32
