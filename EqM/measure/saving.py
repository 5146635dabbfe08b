"""How long a checkpoint holds training up: written in the loop, and beside it as train.py does.

    python -m EqM.measure.saving --model EqM-B/2

The two take turns in one run. A save beside the loop costs the stall until the loop goes on, and what the steps that
run meanwhile are slower than others.
"""

import argparse
import statistics
import tempfile
import time
from itertools import repeat
from pathlib import Path

import torch

from EqM import cli
from EqM.engine.trainer import Trainer
from EqM.measure.contenders import build, random_batch, resolve, train_args
from EqM.measure.report import machine, table
from EqM.models import EqM_models
from EqM.run import checkpoint, distributed, saving


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=EqM_models, default="EqM-B/2", metavar="EqM-{T,S,B,L,XL}/{2,4,8}", help="size and patch")
    add("--image-size", type=cli.positive_int, default=256, help="side in pixels")
    add("--batch-size", type=cli.positive_int, default=1, help="images of a step")
    add("--rounds", type=cli.positive_int, default=5, help="saves of each kind")
    add("--device", help="cuda, cpu, ...; left out: the GPU where there is one")
    add("--folder", help="where to write, and remove again; left out: a temporary folder")
    args = parser.parse_args()
    more = {"video": False, "clip_len": 1, "num_workers": 0}
    return argparse.Namespace(**vars(args), **more)


def timed(work, device):
    """Seconds, and what the work returned."""
    start = time.perf_counter()
    result = work()
    distributed.fence(device)()
    return time.perf_counter() - start, result


def measure(trainer, inputs, path, rounds):
    """{"step", "in the loop", "stall", "slower steps"}: seconds of each round."""
    device = trainer.run_in.device
    host, thread = saving.HostCopy(), saving.Background()
    seconds = {name: [] for name in ("step", "in the loop", "stall", "slower steps")}

    def state():
        return {name: part.state_dict() for name, part in trainer.parts().items()}

    def write(copied, arrived):
        arrived()
        checkpoint.save(path, copied)

    host.reserve(state())  # as train.py has its thread do after the first step
    for _ in range(rounds):
        step = statistics.median(timed(lambda: trainer.step(inputs), device)[0] for _ in range(3))
        seconds["step"].append(step)
        seconds["in the loop"].append(timed(lambda: checkpoint.save(path, state()), device)[0])
        stall, copied = timed(lambda: host.take(state()), device)
        seconds["stall"].append(stall)
        thread.start(write, copied, distributed.fence(device))
        slower = 0.0
        while thread.is_busy():
            slower += timed(lambda: trainer.step(inputs), device)[0] - step
        thread.wait()
        seconds["slower steps"].append(slower)
    return seconds


def main():
    args = parse_args()
    device = distributed.setup(args.device).device
    run_in = resolve("fp32", device)
    trainer = Trainer(train_args(args, ["--latents", "none"]), build(args, run_in), run_in, total_steps=1)
    inputs = repeat(random_batch(args, device))
    trainer.step(inputs)  # makes the moments
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        seconds = measure(trainer, inputs, Path(folder) / "0000001.pt", args.rounds)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    rows = [[name, f"{middle[name]:.3f}", *(f"{each:.3f}" for each in found)] for name, found in seconds.items()]
    print(f"{machine(device)}; {torch.get_num_threads()} threads; a checkpoint of {size / 1e9:.2f} GB\n")
    print(table(["seconds", "median", *(f"round {i + 1}" for i in range(args.rounds))], rows))
    print(f"stall: {100 * middle['stall'] / middle['in the loop']:.0f} % of a save in the loop")


if __name__ == "__main__":
    cli.run(main)
