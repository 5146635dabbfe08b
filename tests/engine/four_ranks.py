"""What test_parallel.py runs on four ranks, in two copies of two parts: HSDP, `--shard --shard-size 2`.

The ranks are forks of this process, which has done what takes each of them longest: imports. Argument: a folder to
write to.
"""

import multiprocessing
import os
import socket
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed.fsdp  # noqa: F401, for the forks
import two_ranks
from two_ranks import furthest, steps, whole

from EqM.run import checkpoint, distributed

RANKS, STEPS = 4, 4
FLAGS = ("--shard", "--shard-size", "2")
make = partial(two_ranks.make, depth=1)


def run(rank, folder):
    os.environ["RANK"] = str(rank)
    ranks = distributed.setup("cpu")
    plain = whole(steps(make(ranks), range(STEPS), rank))
    trainer = steps(make(ranks, *FLAGS), range(STEPS), rank)
    end = whole(trainer)
    assert furthest(plain, end) <= 1e-6, furthest(plain, end)
    for parameter in trainer.model.parameters():  # in copies of parts, neither whole nor in quarters
        assert parameter.device_mesh.mesh.tolist() == [[0, 1], [2, 3]]
        assert [placement.is_shard() for placement in parameter.placements] == [False, True]

    if ranks.is_main:
        checkpoint.save(folder / "copies.pt", {**end, "args": {}, "step": STEPS, "precision": "fp32"})
    distributed.barrier()
    end = whole(steps(trainer, [STEPS], rank))
    again = make(ranks, *FLAGS)
    assert again.restore(checkpoint.load(folder / "copies.pt", like=next(again.model.parameters())), "copies") == STEPS
    assert furthest(end, whole(steps(again, [STEPS], rank))) == 0
    distributed.cleanup()


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps(make(distributed.Ranks(0, 1, torch.device("cpu"))), range(1), 0)  # imports what a step wants
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(RANKS), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run, args=(rank, Path(sys.argv[1]))) for rank in range(RANKS)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    sys.exit(any(each.exitcode for each in ranks))
