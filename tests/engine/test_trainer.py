"""The step: what a step that is skipped leaves alone, and that none waits for the device."""

import copy
from itertools import repeat

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from EqM import train
from EqM.engine.precision import FLAGS as PRECISIONS
from EqM.engine.precision import Precision
from EqM.engine.trainer import Trainer
from EqM.models import EqM_models
from EqM.run.log import Meter
from helpers import leaves


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_step_whose_loss_is_infinite_changes_nothing_but_the_scale(name):
    args = train.parse_args(["--latents", "none", "--lr-schedule", "cosine", "--warmup-steps", "2"])
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=3)
    trainer = Trainer(args, model, Precision(name, torch.device("cpu"), "test", rounded=True), 10)
    good = (torch.randn(4, 4, 8, 8), torch.zeros(4, dtype=torch.long))
    assert trainer.step(iter([good]))[2] == 1

    def state():
        parts = {key: part.state_dict() for key, part in trainer.parts().items() if key not in ("scaler", "guard")}
        return copy.deepcopy(parts)

    before, scale = state(), trainer.scaler.get_scale()
    assert trainer.step(iter([(good[0] * torch.inf, good[1])]))[2] == 0
    for (path, a), (_, b) in zip(leaves(before), leaves(state()), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path
    assert trainer.scaler.get_scale() == (scale / 2 if name == "fp16" else scale)
    assert trainer.step(iter([good]))[2] == 1 and trainer.guard.skipped == 1


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_step_is_the_same_operations_on_the_same_shapes_and_reads_no_value(name):
    """What a graph of a whole step on a GPU needs. The batch is drawn before."""
    words = "--latents none --max-grad-norm 1 --lr-schedule cosine --warmup-steps 2 --grad-accum-steps 2 --disp"
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=3)
    trainer = Trainer(train.parse_args(words.split()), model, Precision(name, torch.device("cpu"), "test"), 10)
    inputs = repeat((torch.randn(4, 4, 8, 8), torch.zeros(4, dtype=torch.long)))
    taken = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            shapes = [tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
            taken[-1].append((str(func), shapes))
            return func(*args, **(kwargs or {}))

    trainer.step(inputs)  # the first makes the optimizer's state
    for _ in range(2):
        taken.append([])
        with Record():
            trainer.step(inputs)
    assert taken[0] == taken[1]
    waits = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select", "aten.unique")
    assert taken[0] and not [op for op, _ in taken[0] if op.startswith(waits)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_step_never_waits_for_the_gpu(name):
    device = torch.device("cuda")
    words = "--latents none --max-grad-norm 1 --lr-schedule cosine --warmup-steps 2 --grad-accum-steps 2 --disp"
    args = train.parse_args(words.split())
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=3).to(device)
    trainer = Trainer(args, model, Precision(name, device, "test"), 10)
    inputs = repeat((torch.randn(4, 4, 8, 8, device=device), torch.zeros(4, dtype=torch.long, device=device)))
    meter = Meter(device)
    trainer.step(inputs)  # the first allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _, applied = trainer.step(inputs)
        meter.add("loss", loss, applied)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.means()["loss"] > 0
