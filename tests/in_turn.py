"""What test_cli.py runs on two ranks under torchrun, one command after the other, since starting them is what costs.

Arguments: a folder of images, one of clips, an autoencoder, a folder to write to.
"""

import shutil
import sys
from pathlib import Path

import torch

from EqM import extract_latents, sample_gd, train
from EqM.engine import precision
from EqM.engine.trainer import Trainer
from EqM.models import EqM_models
from EqM.run import distributed
from helpers import train_args

FOUR_STEPS = ["--grad-accum-steps", 2, "--epochs", 50, "--log-every", 1, "--max-steps", 4]
SAMPLE = ["--use-amp", "--num-fid-samples", 5, "--num-sampling-steps", 3, "--stepsize", 0.1, "--device", "cpu"]
SAMPLE += ["--global-batch-size", 4]
ENCODE = ["--image-size", 16, "--video", "--clip-len", 2, "--num-workers", 0, "--device", "cpu"]


def stop_after_two_steps(straight, stopped):
    """Leave in a folder what a kill after the second of a run's four steps would have left."""
    shutil.copytree(straight, stopped)
    for late in stopped.glob("*/checkpoints/0000004.pt"):
        late.unlink()
    for log in stopped.glob("*/metrics.csv"):
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))


def command(module, *argv):
    sys.argv = [f"{module.__name__}.py", *map(str, argv)]
    module.main()


def commands(ranks, images, clips, vae, folder):
    command(train, *train_args(images, folder / "accumulated", "--max-steps", 1, "--grad-accum-steps", 2))
    straight, stopped = folder / "straight", folder / "stopped"
    command(train, *train_args(images, straight, *FOUR_STEPS, "--use-amp", "--ckpt-every", 2))
    if ranks.is_main:
        stop_after_two_steps(straight, stopped)
    distributed.barrier()
    command(train, *train_args(images, stopped, *FOUR_STEPS, "--use-amp", "--auto-resume"))
    whole = next(straight.glob("*/checkpoints/0000004.pt"))
    command(sample_gd, "--ckpt", whole, "--folder", folder / "s2", *SAMPLE)
    command(extract_latents, "--data-path", clips, "--out", folder / "c2", "--vae", vae, *ENCODE)


def overflow(ranks):
    """(skipped steps, scale, sum of the weights) at the start and after each of two steps: (3, 3).

    The first is infinite on the second rank alone.
    """
    run_in = precision.Precision("fp16", ranks.device, "test", rounded=True)
    torch.manual_seed(0)
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=2)
    trainer = Trainer(train.parse_args(["--latents", "none", "--lr", "1e-2"]), model, run_in, 2, ranks)

    def seen(step):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()]).double().sum().item()
        scale = trainer.scaler.get_scale()
        return trainer.guard.check(step, scale) if step else 0, scale, weights

    rows = [seen(0)]
    for step in (1, 2):
        x = torch.randn(2, 4, 8, 8) * (torch.inf if step == 1 and ranks.rank == 1 else 1)
        trainer.step(iter([(x, torch.tensor([0, 1]))]))
        rows.append(seen(step))
    return torch.tensor(rows, dtype=torch.float64)


if __name__ == "__main__":
    torch.set_num_threads(1)
    *sources, folder = sys.argv[1:]
    ranks, cleanup = distributed.setup("cpu"), distributed.cleanup
    distributed.setup, distributed.cleanup = lambda device: ranks, distributed.barrier
    commands(ranks, *sources, Path(folder))
    torch.save(overflow(ranks), Path(folder) / f"overflow{ranks.rank}.pt")
    cleanup()
