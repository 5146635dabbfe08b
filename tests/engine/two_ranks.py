"""What test_parallel.py runs on two ranks, all in one process each, since starting them is what costs.

Ranks are as torchrun would say them; arguments: a folder to write to, a folder of images.
"""

import re
import resource
import sys
from pathlib import Path

import torch

from EqM import train
from EqM.engine.precision import Precision
from EqM.engine.trainer import Trainer
from EqM.models import EqM
from EqM.run import checkpoint, distributed, parts, saving, seeds
from EqM.run.errors import UserError
from EqM.run.log import RunLog
from EqM.watch import preview
from helpers import leaves, train_args

STEPS = 20
FLAGS = "--latents none --max-grad-norm 1 --grad-accum-steps 2 --ema-decay 0.9 --lr 1e-3 --lr-schedule cosine"


def make(ranks, *flags, name="fp32", depth=2):
    torch.manual_seed(0)
    model = EqM(input_size=8, hidden_size=48, depth=depth, num_heads=2, num_classes=3)
    args = train.parse_args([*FLAGS.split(), "--warmup-steps", "2", *flags])
    return Trainer(args, model, Precision(name, ranks.device, "test", rounded=True), STEPS, ranks)


def steps(trainer, numbers, rank, spoil=None):
    for step in numbers:
        seeds.seed_step(0, step, rank)
        batches = [(torch.randn(2, 4, 8, 8), torch.randint(3, (2,))) for _ in range(2)]
        if step == spoil and rank == 1:
            batches[0][0].fill_(torch.inf)
        loss, norm, applied = trainer.step(iter(batches))
        assert type(norm) is type(loss) is torch.Tensor
    return trainer


def whole(trainer):
    """What a checkpoint keeps, on the main rank; None for tensors on others."""
    return saving.HostCopy(distributed.dist.get_rank() == 0).take(state_of(trainer))


def state_of(trainer):
    return {name: part.state_dict() for name, part in trainer.parts().items()}


def furthest(one, other):
    """The largest difference between two trees of tensors, 0 on ranks that have none."""
    pairs = zip(leaves(one), leaves(other), strict=True)
    return max((float((a - b).abs().max()) for (_, a), (_, b) in pairs if torch.is_tensor(a) and a.numel()), default=0)


def compare(ranks, folder):
    """20 steps as data parallel takes them; state that is saved in one file and in parts, and taken up from either."""
    plain = whole(steps(make(ranks), range(STEPS), ranks.rank))
    trainer = steps(make(ranks, "--shard", "--shard-size", "2", "--grad-checkpointing"), range(STEPS), ranks.rank)
    assert furthest(plain, whole(trainer)) <= 1e-6, furthest(plain, whole(trainer))
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    for tensors in (trainer.model.parameters(), trainer.ema.model.parameters(), moments):
        tensors = list(tensors)
        assert sum(t.to_local().numel() for t in tensors) <= 0.55 * sum(t.numel() for t in tensors)

    kept = {**whole(trainer), "args": {}, "step": STEPS, "precision": "fp32"}
    in_parts = saving.HostCopy(ranks.is_main, parts=True).take({**state_of(trainer), "args": {}, "step": STEPS})
    if ranks.is_main:
        checkpoint.save(folder / "whole.pt", kept)
    group = distributed.new_group(ranks)
    for _ in range(2):  # the second in the place of the first
        parts.save(folder / "parts.pt", {**in_parts, "precision": "fp32"}, ranks.is_main, group)
        distributed.barrier()
    full = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not ranks.is_main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, full[1]))  # as a disk that fills up
    try:
        parts.save(folder / "parts.pt", in_parts, ranks.is_main, group)
        raise AssertionError("a disk that fills up went unseen")
    except UserError as error:
        assert re.search(r"parts.pt cannot be written \(File too large\); earlier ones are untouched", str(error)), (
            error
        )
    resource.setrlimit(resource.RLIMIT_FSIZE, full)
    distributed.barrier()
    end = whole(steps(trainer, [1], ranks.rank))
    for name in ("whole.pt", "parts.pt"):
        again = make(ranks, "--shard")
        saved = checkpoint.load(folder / name, like=next(again.model.parameters()))
        assert again.restore(saved, name) == STEPS
        assert furthest(end, whole(steps(again, [1], ranks.rank))) == 0, name


def overflow(ranks):
    """A loss that is infinite on one rank: all skip the step, with all its parts."""
    trainer = steps(make(ranks, "--shard", name="fp16"), range(1), ranks.rank)
    before = whole(trainer)
    steps(trainer, range(1, 2), ranks.rank, spoil=1)
    after = whole(trainer)
    assert (
        furthest([before[key] for key in ("model", "ema", "opt")], [after[key] for key in ("model", "ema", "opt")]) == 0
    )
    assert trainer.scaler.get_scale() == 32768 and trainer.guard.skipped == 1


def command(ranks, folder, data):
    """train.py, stopped and gone on with in parts, and straight on in one file."""
    distributed.setup, distributed.cleanup = lambda device: ranks, distributed.barrier
    preview.POINTS = 3  # all ranks must go through them, however many
    RunLog.draw = lambda log: None  # which takes a second to import what draws
    flags = ["--shard", "--epochs", 50, "--log-every", 1, "--grad-accum-steps", 2, "--lr", 1e-2]
    watched = ["--val-path", data, "--val-every", 1, "--ema-decay", 0.5]
    parted = [
        *flags,
        "--ema-decay",
        0.5,
        "--split-checkpoints",
        "--ckpt-every",
        1,
        "--keep-checkpoints",
        2,
        "--auto-resume",
    ]
    for root, *more in (
        ("stopped", *parted, "--max-steps", 3),
        ("stopped", *parted, "--max-steps", 4, "--sample-every", 4),
        ("straight", *flags, "--max-steps", 4, *watched),
        ("whole", *flags[1:], "--max-steps", 4, *watched),
    ):
        sys.argv = ["train.py", *train_args(data, folder / root, *more)]
        train.main()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, data = map(Path, sys.argv[1:])
    ranks = distributed.setup("cpu")
    compare(ranks, folder)
    overflow(ranks)
    command(ranks, folder, data)
    print("all held")
