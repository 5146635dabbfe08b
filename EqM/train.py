"""Train an EqM model on images or clips.

    torchrun --nproc_per_node=N EqM/train.py --data-path DIR --model EqM-XL/2
    python EqM/train.py --data-path DIR --model EqM-S/4 --video --clip-len 4

Reads top to bottom: arguments, what they build, one loop, what is saved.
"""

import argparse
import math
from contextlib import nullcontext

import torch
from tqdm import trange

import checkpoint
import cli
import data
import distributed
import latents
import optimizer as optim
import run_log
import seeds
from ema import EMA
from errors import UserError
from models import EqM_models
from transport import LOSS_WEIGHTS, Transport, dispersive_loss


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    switch = argparse.BooleanOptionalAction
    cli.add_model(parser)
    cli.add_transport(parser)
    cli.add_runtime(parser)
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", required=True, help="folder <class>/<file>, or clips with a CSV")
    group.add_argument("--csv", help="labels of a flat folder of clips: video_name,tag")
    group.add_argument(
        "--frame-interval",
        type=cli.positive_int,
        help="random windows of frames this far apart; left out: frames spread over the clip",
    )
    group.add_argument("--flip", action=switch, default=True, help="mirror half of the images or clips")
    group.add_argument("--num-workers", type=cli.count, default=4, help="decoding processes per rank")
    group = parser.add_argument_group("training")
    group.add_argument("--loss-weight", choices=LOSS_WEIGHTS, default="None", help="weight of score and noise losses")
    group.add_argument(
        "--train-eps",
        type=cli.fraction,
        help="training stays this far from singular ends of t; left out: what the path needs",
    )
    group.add_argument("--disp", action=switch, default=False, help="add 0.5 x the dispersive loss")
    group.add_argument("--epochs", type=cli.positive_int, default=80, help="passes over the data")
    group.add_argument("--max-steps", type=cli.positive_int, help="stop after this many steps in all")
    group.add_argument("--lr", type=cli.positive, default=1e-4, help="AdamW's learning rate")
    group.add_argument("--lr-schedule", choices=optim.SCHEDULES, default="constant", help="after the warm-up")
    group.add_argument("--warmup-steps", type=cli.count, default=0, help="steps of linear warm-up")
    group.add_argument("--ema-decay", type=cli.fraction, default=0.9999, help="of the averaged weights")
    group.add_argument("--max-grad-norm", type=cli.positive, help="clip gradients to this norm")
    group.add_argument("--grad-accum-steps", type=cli.positive_int, default=1, help="forward passes per step")
    group = parser.add_argument_group("run")
    group.add_argument("--results-dir", default="results", help="holds one numbered folder a run")
    group.add_argument("--ckpt", help="checkpoint to continue, or published weights to start from")
    group.add_argument("--log-every", type=cli.positive_int, default=100, help="steps between log lines")
    group.add_argument("--ckpt-every", type=cli.positive_int, default=50_000, help="steps between checkpoints")
    args = parser.parse_args()
    cli.check_geometry(args)
    return args


def open_stream(args, dataset, ranks, first_step):
    """Endless (latents-to-be, labels) batches for this rank, starting at a step, on the device."""
    per_rank, left = divmod(args.global_batch_size, ranks.world_size * args.grad_accum_steps)
    if left:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} does not divide into {ranks.world_size} rank(s) "
            f"x {args.grad_accum_steps} accumulation step(s)"
        )
    first_batch = first_step * args.grad_accum_steps
    keys = data.Stream(len(dataset), per_rank, ranks.rank, ranks.world_size, args.global_seed, first_batch)
    batches = data.loader(dataset, keys, args.num_workers, pin_memory=ranks.device.type == "cuda")
    for images, labels, _ in batches:
        images = images.to(ranks.device, non_blocking=True)
        yield latents.to_pixels(images), labels.to(ranks.device, non_blocking=True)


def main():
    args = parse_args()
    ranks = distributed.setup(args.device)
    channels, input_size = cli.check_geometry(args)

    paths, labels, class_names = data.find_files(args.data_path, args.video, args.csv)
    if args.num_classes is None:
        args.num_classes = len(class_names)
    if args.num_classes < len(class_names):
        raise UserError(
            f"--num-classes {args.num_classes} is too small: {args.data_path} has {len(class_names)} classes"
        )
    dataset = data.LabelledFiles(
        paths,
        labels,
        class_names,
        args.image_size,
        args.clip_len if args.video else None,
        args.frame_interval,
        args.flip,
        args.global_seed,
    )
    total_steps = math.ceil(args.epochs * len(dataset) / args.global_batch_size)
    total_steps = min(total_steps, args.max_steps or total_steps)

    autoencoder = latents.load(args.vae, ranks.device)
    torch.manual_seed(args.global_seed)
    model = EqM_models[args.model](
        input_size=input_size,
        num_classes=args.num_classes,
        in_channels=channels,
        uncond=args.uncond,
        ebm=args.ebm,
        patch_frames=args.patch_frames,
    ).to(ranks.device)
    ema = EMA(model, args.ema_decay)
    optimizer = optim.adamw(model, args.lr)
    schedule = optim.Schedule(optimizer, args.lr_schedule, args.warmup_steps, total_steps, ranks.device)
    transport = Transport(args.path_type, args.prediction, args.loss_weight, args.train_eps, args.sample_eps)

    first_step = 0
    if args.ckpt:
        saved = checkpoint.load(args.ckpt)
        checkpoint.load_weights(model, saved["model"], args.ckpt, saved["args"])
        checkpoint.load_weights(ema.model, saved["ema"], args.ckpt, saved["args"])
        if "opt" in saved:
            checkpoint.load_optimizer(optimizer, saved["opt"])
        first_step = saved.get("step", 0)
        schedule.restore(saved.get("taken", first_step))

    run_folder = None
    if ranks.is_main:
        run_folder = run_log.new_run_folder(
            args.results_dir, args.model, args.path_type, args.prediction, args.loss_weight
        )
    log = run_log.RunLog(run_folder)
    log.info(
        f"Run folder {run_folder}; {len(dataset)} files of {len(class_names)} classes; {ranks.world_size} rank(s) on {ranks.device}"
    )
    log.info(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters; steps {first_step} to {total_steps}"
    )

    def save(step):
        if ranks.is_main:
            checkpoint.save(
                run_folder / "checkpoints" / f"{step:07d}.pt",
                {
                    "model": model.state_dict(),
                    "ema": ema.model.state_dict(),
                    "opt": optimizer.state_dict(),
                    "args": vars(args),
                    "step": step,
                    "taken": int(schedule.taken),
                    "epoch": step * args.global_batch_size / len(dataset),
                    "class_names": class_names,
                },
            )
            log.info(f"Saved checkpoint {step:07d}.pt")

    network = distributed.data_parallel(model.train(), ranks)
    stream = open_stream(args, dataset, ranks, first_step)
    meter, clock = run_log.Meter(ranks.device), run_log.Clock()
    for step in trange(
        first_step + 1, total_steps + 1, initial=first_step, total=total_steps, disable=not ranks.is_main
    ):
        seeds.seed_step(args.global_seed, step, ranks.rank)
        for micro_step in range(1, args.grad_accum_steps + 1):
            pixels, y = next(stream)
            x1 = autoencoder.encode(pixels)
            point = transport.sample(x1)
            last = micro_step == args.grad_accum_steps
            with nullcontext() if last or network is model else network.no_sync():
                output, acts = network(point.xt, point.t, y, return_act=True)
                loss = transport.loss(output, point).mean()
                if args.disp:
                    loss = loss + 0.5 * dispersive_loss(acts[-1])
                (loss / args.grad_accum_steps).backward()
            meter.add("loss", loss)
        grad_norm = optim.clip_gradients(model, args.max_grad_norm)
        applied = torch.isfinite(grad_norm).float()
        optimizer.found_inf = 1 - applied  # a fused optimizer then skips, inside its kernel
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.advance(applied)
        ema.update(applied)

        clock.steps += 1
        if step % args.log_every == 0:
            log.step(step, {"Train Loss": meter.means()["loss"], "Train Steps/Sec": clock.rate()})
        if step % args.ckpt_every == 0 and step < total_steps:
            save(step)
    save(total_steps)
    log.info("Done")
    distributed.cleanup()


if __name__ == "__main__":
    cli.run(main)
