"""Train an EqM model on images or clips.

    torchrun --nproc_per_node=N EqM/train.py --data-path DIR --model EqM-XL/2 --use-bf16
    python EqM/train.py --data-path DIR --model EqM-S/4 --video --clip-len 4 --use-amp

Reads top to bottom: arguments, data, what is resumed or started from, and in main() the one loop of steps.
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

from functools import partial

import torch

from EqM import architecture, cli, recipe, training_flags, transplant
from EqM.data import autoencoder as autoencoders
from EqM.data import latent_cache, loader
from EqM.data.tables import open_data
from EqM.engine import parallel, precision
from EqM.engine.saver import Saver, identity
from EqM.engine.trainer import Trainer
from EqM.run import checkpoint, distributed, resume, seeds
from EqM.run.errors import UserError
from EqM.run.log import Clock, Meter, RunLog, check_trackers, new_run_folder, peak_memory, progress
from EqM.watch import looks as watch


def parse_args(argv=None):
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_model(parser)
    cli.add_encoding(parser)
    cli.add_data(parser, required=False)
    cli.add_transport(parser)
    cli.add_c(parser)
    precision.add_flags(parser)
    cli.add_runtime(parser)
    training_flags.add(parser)
    watch.add_flags(parser)
    recipe.add_flag(parser)
    parser.checks += [training_flags.check, cli.check_c, watch.check]
    args = parser.parse_args(recipe.words(parser, argv))
    architecture.check_geometry(args)
    return args


def open_dataset(args):
    """What to train on, with files or a latent cache behind it; settles args.num_classes."""
    if args.latents:
        dataset = latent_cache.LatentCache(args.latents, args)
    else:
        dataset = open_data(args, args.flip, beside=args.val_path)
    args.num_classes = args.num_classes or len(dataset.class_names)
    if args.num_classes < len(dataset.class_names):
        raise UserError(
            f"--num-classes {args.num_classes} is too small: the data has {len(dataset.class_names)} classes"
        )
    return dataset


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
        checkpoint.sweep(folder / "checkpoints")
        if not in_found_run:
            repeated = vars(args) if saved and not first_step else {**vars(args), "ckpt": None}
            recipe.write(folder / "config.toml", resume.absolute(repeated))
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


def main():
    args = parse_args()
    ranks = distributed.setup(args.device)
    run_in = precision.activate_flags(args, ranks.device)
    notes = []
    parallel.check_flags(args, ranks, notes.append)
    dataset = open_dataset(args)
    dataset.notes += notes
    looks = watch.Looks(args, ranks, dataset.class_names)
    loader.micro_batch_size(args, ranks)
    total_steps = resume.total_steps(vars(args), len(dataset))

    needs_autoencoder = not args.latents or looks.need_autoencoder
    autoencoder = autoencoders.load(args.vae, precision.of_vae(args, run_in)) if needs_autoencoder else None
    torch.manual_seed(args.global_seed)
    model = architecture.build_model(args).to("cpu" if parallel.splits(args, ranks) else ranks.device)
    trainer = Trainer(args, model, run_in, total_steps, ranks, dataset.notes.append)
    meter, clock = Meter(ranks.device), Clock()
    log, first_step, data = open_run(args, ranks, trainer, meter, dataset)
    save = Saver(args, ranks, trainer, meter, dataset, data, log)

    stream = loader.batches(args, dataset, autoencoder, ranks, first_step, log.info)
    stop = distributed.StopRequest(ranks)
    looks.begin(trainer, autoencoder, log, save, stop)
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
        if stop.agreed():
            log.info(f"Stopping after step {step}, as the signal asked")
            break
        looks(step)
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
