"""What a checkpoint keeps of a run, copied between two steps and written while training goes on."""

from functools import partial

import torch

from EqM.engine import ema, parallel
from EqM.run import checkpoint, distributed, parts, resume, saving
from EqM.run.errors import is_out_of_memory


class Saver:
    """Call it with a step: it copies what that step's checkpoint keeps, and a thread writes it while training goes on.

    Every rank must call it. A second save waits for the first. One that failed is raised by the next call, or by
    check(), which never waits.
    """

    def __init__(self, args, ranks, trainer, meter, dataset, data, log):
        self.args = args
        self.ranks = ranks
        self.trainer = trainer
        self.meter = meter
        self.dataset = dataset
        self.data = data
        self.log = log
        self.sharded = parallel.splits(args, ranks)
        self.group = distributed.new_group(ranks) if self.sharded and args.split_checkpoints else None
        self.keeps = ranks.is_main or self.group is not None  # what this rank copies, it has memory for
        self.folder = distributed.on_main(ranks, lambda: log.folder) / "checkpoints"
        self.copy = saving.HostCopy(ranks.is_main, parts=self.group is not None)
        self.thread = saving.Background()
        self.last = None  # step
        self.reserved = False

    def check(self):
        if self.keeps and not self.reserved:  # after the first step, which made the moments
            kept = {name: part.state_dict() for name, part in self.trainer.parts().items() if name != "scaler"}
            self.thread.start(self.copy.reserve, kept)  # without the scaler, whose state waits for the device
            self.reserved = True
        self.thread.check()

    def __call__(self, step, wait=False):
        if step != self.last:
            self._save(step)
            self.last = step
        if wait:
            self.thread.wait()

    def _save(self, step):
        self.thread.wait()  # for the save before this one, whose memory the copy takes
        trainer = self.trainer
        trainer.guard.check(step, trainer.scaler.get_scale())
        meter_state = self.meter.state_dict()
        if self.keeps or self.sharded:
            self._write(step, {
                **{name: part.state_dict() for name, part in trainer.parts().items()},
                "args": resume.absolute(vars(self.args)),
                "step": step,
                "epoch": step * self.args.global_batch_size // len(self.dataset),
                "meter": meter_state,
                "rng": {"global_seed": self.args.global_seed, "step": step},  # all there is: see seeds.py
                "class_names": self.dataset.class_names,
                "data": self.data,
                **identity(trainer.run_in, self.ranks),
            })  # fmt: skip

    def _write(self, step, state):
        save = checkpoint.save
        if self.group is not None:
            save = partial(parts.save, is_main=self.ranks.is_main, group=self.group)
        write = partial(write_checkpoint, save, self.folder / f"{step:07d}.pt", self.args.keep_checkpoints, self.log)
        try:
            copied = self.copy.take(state)
        except Exception as error:
            if self.sharded or not is_out_of_memory(error):
                raise
            self.copy = saving.HostCopy()
            self.log.info("There is no memory for a copy of the state: training waits until it is written")
            write(state, lambda: None)
        else:
            if self.keeps:
                self.thread.start(write, copied, distributed.fence(self.ranks.device))


def write_checkpoint(save, path, keep, log, state, arrived):
    """Write a checkpoint and what goes with it, for which each rank that keeps some of it must call.

    save: called with path and state. keep: how many to keep, None for all. arrived: waits for the state.
    """
    arrived()
    save(path, state)
    if log.folder is None:
        return
    ema.keep_snapshot(path, state)
    if keep:
        checkpoint.prune(path.parent, keep)
    log.info(f"Saved checkpoint {path.name}")
    log.draw()


def identity(run_in, ranks):
    """What a resumed run must have in common with a checkpoint to be exact, besides its flags."""
    return {
        "precision": run_in.name,
        "world_size": ranks.world_size,
        "torch": str(torch.__version__),
        "device": ranks.device.type,
    }
