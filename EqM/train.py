"""Train an EqM model on images or clips.

    torchrun --nproc_per_node=N EqM/train.py --data-path DIR --model EqM-XL/2 --use-bf16
    python EqM/train.py --data-path DIR --model EqM-S/4 --video --clip-len 4 --use-amp

Reads top to bottom: arguments, data, what a checkpoint keeps, what is resumed, and in main() the one loop of steps.
The step itself is Trainer.step in engine/trainer.py; every precision takes the same path.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # run by its path: import the package beside this file, whatever else is installed
    sys.path = [str(HERE.parent), *(folder for folder in sys.path if Path(folder).resolve() != HERE)]
if __name__ == "__main__":
    from EqM.run import stops

    stops.end_at_once()  # until main handles them: what follows takes seconds to import

import argparse
from functools import partial

import torch

from EqM import architecture, cli, recipe, transplant
from EqM.data import autoencoder as autoencoders
from EqM.data import latent_cache, loader
from EqM.data.tables import open_data
from EqM.engine import acceleration, ema, parallel, precision
from EqM.engine import optimizer as optim
from EqM.engine.trainer import Trainer
from EqM.run import checkpoint, distributed, parts, resume, saving, seeds
from EqM.run.errors import UserError, is_out_of_memory
from EqM.run.log import Clock, Meter, RunLog, check_trackers, new_run_folder, peak_memory, progress
from EqM.transport import LOSS_WEIGHTS
from EqM.watch import looks as watch


def parse_args(argv=None):
    parser = cli.Parser(__doc__.splitlines()[0])
    switch = argparse.BooleanOptionalAction
    cli.add_model(parser)
    cli.add_encoding(parser)
    cli.add_data(parser, required=False)
    cli.add_transport(parser)
    cli.add_c(parser)
    precision.add_flags(parser)
    cli.add_runtime(parser)
    group = parser.add_argument_group("latents")
    group.add_argument("--latents", help="folder that extract_latents.py made, to train from instead of --data-path")
    group = parser.add_argument_group("training")
    group.add_argument("--loss-weight", choices=LOSS_WEIGHTS, default="None", help="of score and noise predictions")
    group.add_argument("--train-eps", type=cli.fraction, help="distance from singular ends of t; left out: as needed")
    group.add_argument("--disp", action=switch, default=False, help="add 0.5 x the dispersive loss")
    group.add_argument("--global-batch-size", type=cli.positive_int, default=256, help="batch over all ranks")
    group.add_argument("--epochs", type=cli.positive_int, default=80, help="passes over the data")
    group.add_argument("--max-steps", type=cli.positive_int, help="at most this many steps in all")
    group.add_argument("--optimizer", choices=optim.OPTIMIZERS, default="adamw", help="muon: for the blocks' matrices")
    group.add_argument("--lr", type=cli.positive, default=1e-4, help="learning rate; muon's is as large as AdamW's")
    group.add_argument("--betas", type=cli.below_one, nargs=2, default=[0.9, 0.999], help="of AdamW's two moments")
    group.add_argument("--weight-decay", type=cli.non_negative, default=0.0, help="of all weights, times --lr")
    group.add_argument("--lr-schedule", choices=optim.SCHEDULES, default="constant", help="after the warm-up")
    group.add_argument("--min-lr", type=cli.non_negative, default=0.0, help="where the cosine ends")
    group.add_argument("--warmup-steps", type=cli.count, default=0, help="steps of linear warm-up")
    group.add_argument(
        "--ema-decay", type=cli.fraction, nargs="+", default=[0.9999],
        help="of the averaged weights; the first of several is called ema",
    )  # fmt: skip
    group.add_argument(
        "--ema-warmup", action=switch, default=False, help="decay at most (1 + n)/(10 + n) after n steps"
    )
    group.add_argument(
        "--ema-std", type=ema.std_type, nargs="+",
        help="also power-function averages of these relative widths, to make others of after the run: 0.05 0.1, say",
    )  # fmt: skip
    group.add_argument("--max-grad-norm", type=cli.positive, help="clip gradients to this norm")
    group.add_argument("--grad-accum-steps", type=cli.positive_int, default=1, help="forward passes per step")
    acceleration.add_flags(group)
    parallel.add_flags(group)
    group = parser.add_argument_group("run")
    group.add_argument("--results-dir", default="results", help="holds one numbered folder a run")
    group.add_argument("--ckpt", help="checkpoint to go on from, published weights, or 'latest' of this results-dir")
    group.add_argument("--auto-resume", action=switch, default=False, help="--ckpt latest where there is one")
    group.add_argument("--init-from", help="checkpoint of any model, of which a run that starts takes what fits")
    group.add_argument("--weights", default="ema", help="of --init-from: ema, model, or an average by its name")
    group.add_argument(
        "--init-positions", choices=transplant.POSITIONS,
        help="of clips from --init-from: an image's for every frame, or new; left out: repeat for those from images",
    )  # fmt: skip
    group.add_argument(
        "--allow-other-classes", action="store_true", help="go on with data whose class names are not the checkpoint's"
    )
    group.add_argument("--log-every", type=cli.positive_int, default=100, help="steps between log lines")
    group.add_argument("--ckpt-every", type=cli.positive_int, default=50_000, help="steps between checkpoints")
    group.add_argument("--keep-checkpoints", type=cli.positive_int, help="remove all but this many newest")
    group.add_argument("--wandb", action=switch, default=False, help="log to Weights & Biases too")
    group.add_argument("--tensorboard", action=switch, default=False, help="log to TensorBoard too")
    watch.add_flags(parser)
    recipe.add_flag(parser)
    args = parser.parse_args(recipe.words(parser, argv))
    if (args.data_path is None) == (args.latents is None):
        parser.error("give either --data-path, to encode as you train, or --latents")
    if args.latents and (args.csv or args.frame_interval or args.image_column or args.label_column):
        parser.error("--csv, --frame-interval and columns were settled when --latents was made; leave them out")
    for flag, asked in (("--grad-checkpointing", args.grad_checkpointing), ("--recompute", args.recompute)):
        if asked and asked != "nothing" and args.ebm != "none":
            parser.error(f"{flag} cannot recompute an energy's field, which is differentiated twice; drop one")
    if args.min_lr and (args.lr_schedule != "cosine" or args.min_lr > args.lr):
        parser.error(f"--min-lr {args.min_lr:g} is where --lr-schedule cosine ends, below --lr {args.lr:g}")
    cli.check_c(parser, args)
    watch.check(parser, args)
    if args.init_positions and not (args.init_from and args.video):
        parser.error("--init-positions is for --video that starts --init-from other weights")
    if args.weights != "ema" and not args.init_from:
        parser.error("--weights says which ones of --init-from to take; give both")
    for name in ("ema_decay", "ema_std"):
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            parser.error(f"--{name.replace('_', '-')} has {', '.join(map(str, values))}, one of them twice")
    if len(args.ema_decay) == 1:
        (args.ema_decay,) = args.ema_decay
    if args.shard and args.optimizer == "muon":
        parser.error("--optimizer muon wants whole matrices, which --shard splits; drop one")
    if args.split_checkpoints and args.ema_std:
        parser.error("--ema-std keeps snapshots as whole files, and --split-checkpoints writes none; drop one")
    if args.shard and args.eval_every:
        parser.error("--eval-every samples on each rank alone, which --shard does not allow; run evaluate.py instead")
    if args.shard and args.ebm != "none":
        parser.error("--shard cannot split an energy model, whose field is differentiated twice; drop one")
    architecture.check_geometry(args)
    return args


def open_dataset(args):
    """What to train on, with files or a latent cache behind it; settles args.num_classes."""
    dataset = latent_cache.LatentCache(args.latents, args) if args.latents else open_data(args, args.flip)
    args.num_classes = args.num_classes or len(dataset.class_names)
    if args.num_classes < len(dataset.class_names):
        raise UserError(
            f"--num-classes {args.num_classes} is too small: the data has {len(dataset.class_names)} classes"
        )
    return dataset


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


def find_checkpoint(args, ranks, data, like):
    """The resume.Choice of all ranks, which the main one makes, and what that checkpoint holds, or None.

    like: a parameter, as checkpoint.load takes it.
    """
    choice = resume.Choice(args.ckpt)
    if args.ckpt == "latest" or (args.auto_resume and not args.ckpt):
        required = args.ckpt == "latest"
        choice = distributed.on_main(ranks, lambda: resume.choose(args.results_dir, vars(args), data, required))
    load = partial(checkpoint.load, like=like)
    saved = resume.load_on_all(choice.path, load, distributed.all_agree) if choice.path else None
    return choice, saved


def open_run(args, ranks, trainer, meter, dataset):
    """Go on from a checkpoint if there is one, and open the run's folder and log.

    Returns (log, step to go on from, what a checkpoint says of the data).
    """
    data = distributed.on_main(ranks, dataset.digest)
    choice, saved = find_checkpoint(args, ranks, data, next(trainer.model.parameters()))
    first_step, started = 0, []
    in_found_run = saved is not None and choice.path != args.ckpt  # its folder was found, not named
    if saved:
        resume.check_classes(saved, dataset.class_names, args.allow_other_classes)
        first_step = trainer.restore(saved, choice.path)
        if first_step:
            resume.check_goal(first_step, trainer.total_steps, choice.path, in_found_run)
        if args.init_from:
            started = ["--init-from has no effect on a run that goes on from a checkpoint"]
    elif args.init_from:
        started = start_from(args, trainer, dataset.class_names)

    def open_folder():
        check_trackers(args)
        folder = Path(choice.path).parents[1] if in_found_run else new_run_folder(args, trainer.transport.c_name)
        resume.lock_run(folder)
        if not in_found_run:
            recipe.write(folder / "config.toml", resume.absolute(vars(args)))
        return RunLog(folder, args)

    log = distributed.on_main(ranks, open_folder, share=False) or RunLog(None, args)
    for note in dataset.notes:
        log.info(note)
    log.info(f"Run folder {log.folder}; {len(dataset)} files of {len(dataset.class_names)} classes")
    log.info(f"Precision: {trainer.run_in.reason}; {ranks.world_size} rank(s) on {ranks.device}")
    size = sum(map(torch.numel, trainer.model.parameters()))
    log.info(f"{args.model}: {size:,} parameters; steps {first_step} to {trainer.total_steps}")
    for line in [choice.message] * bool(choice.message) + started:
        log.info(line)
    if saved and not first_step:
        log.info(f"Going on from {choice.path}, not exactly as without a stop: weights only, from step 0")
    elif saved:
        now = {**identity(trainer.run_in, ranks), "class_names": dataset.class_names}
        changed = resume.what_changed(saved, vars(args), now, data)
        log.info(resume.going_on(choice.path, changed))
        if not changed:
            meter.load_state_dict(saved["meter"], ranks.rank)
    return log, first_step, data


def start_from(args, trainer, class_names):
    """Give model and averages the weights of --init-from that fit, on every rank; returns lines that say which."""

    def rebuild():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.global_seed)
            return architecture.build_model(args).state_dict()

    def fitted(path):
        return transplant.load(path, trainer.model, rebuild, class_names, args.weights, args.init_positions)

    state, table = resume.load_on_all(args.init_from, fitted, distributed.all_agree)
    trainer.restore({"model": state, "ema": state, "args": {}}, args.init_from)
    return table


def identity(run_in, ranks):
    """What a resumed run must have in common with a checkpoint to be exact, besides its flags."""
    return {
        "precision": run_in.name,
        "world_size": ranks.world_size,
        "torch": str(torch.__version__),
        "device": ranks.device.type,
    }


def main():
    args = parse_args()
    ranks = distributed.setup(args.device)
    run_in = precision.activate_flags(args, ranks.device)
    dataset = open_dataset(args)
    looks = watch.Looks(args, ranks, dataset.class_names)
    loader.micro_batch_size(args, ranks)
    parallel.check_flags(args, ranks, dataset.notes.append)
    total_steps = resume.total_steps(vars(args), len(dataset))

    needs_autoencoder = not args.latents or looks.need_autoencoder
    autoencoder = autoencoders.load(args.vae, precision.of_vae(args, run_in)) if needs_autoencoder else None
    torch.manual_seed(args.global_seed)
    model = architecture.build_model(args).to("cpu" if parallel.splits(args, ranks) else ranks.device)
    trainer = Trainer(args, model, run_in, total_steps, ranks, dataset.notes.append)
    meter, clock = Meter(ranks.device), Clock()
    log, first_step, data = open_run(args, ranks, trainer, meter, dataset)
    save = Saver(args, ranks, trainer, meter, dataset, data, log)
    looks.begin(trainer, autoencoder, log, save)

    stream = loader.batches(args, dataset, autoencoder, ranks, first_step, log.info)
    stop = distributed.StopRequest(ranks)
    left = range(first_step + 1, total_steps + 1)
    steps = progress(left, total=total_steps, initial=first_step, shown=ranks.is_main, lines=False)
    step = first_step
    for step in steps:
        seeds.seed_step(args.global_seed, step, ranks.rank)
        loss, grad_norm, applied = trainer.step(stream)
        save.check()
        meter.add("loss", loss, applied)
        meter.add("grad_norm", grad_norm, applied)
        clock.tick()

        if step % args.log_every == 0:
            stream.bad_files.agree()
            means, scale = meter.means(), trainer.scaler.get_scale()
            log.step(step, {
                "Train Loss": means["loss"],
                "Train Steps/Sec": clock.rate(),
                "Grad Norm": means["grad_norm"],
                "Scale": scale,
                "Skipped Steps": trainer.guard.check(step, scale),
                "Samples": step * args.global_batch_size,
                "Peak GiB": peak_memory(ranks.device),
            })  # fmt: skip
        looks(step)
        if stop.agreed():
            log.info(f"Stopping after step {step}, as the signal asked")
            break
        if step % args.ckpt_every == 0 and step < total_steps:
            save(step)
    if step > first_step:
        save(step, wait=True)
    stream.close()
    distributed.barrier()
    stream.bad_files.agree()
    log.info("Done")
    distributed.cleanup()


if __name__ == "__main__":
    cli.run(main)
