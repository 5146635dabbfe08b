"""What train.py takes beside the flags that other commands share, and what of it contradicts itself."""

import argparse

from EqM import cli, transplant
from EqM.engine import acceleration, ema, parallel
from EqM.engine import optimizer as optim
from EqM.run.errors import flag_of
from EqM.transport import LOSS_WEIGHTS

SWITCH = argparse.BooleanOptionalAction


def add(parser):
    """All of them, on a Parser."""
    group = parser.add_argument_group("latents")
    group.add_argument("--latents", help="folder that extract_latents.py made, to train from instead of --data-path")
    group = parser.add_argument_group("training")
    group.add_argument("--loss-weight", choices=LOSS_WEIGHTS, default="None", help="of score and noise predictions")
    group.add_argument("--train-eps", type=cli.fraction, help="distance from singular ends of t; left out: as needed")
    group.add_argument("--disp", action=SWITCH, default=False, help="add 0.5 x the dispersive loss")
    group.add_argument("--global-batch-size", type=cli.positive_int, default=256, help="batch over all ranks")
    group.add_argument("--epochs", type=cli.positive_int, default=80, help="passes over the data")
    group.add_argument("--max-steps", type=cli.positive_int, help="at most this many steps in all")
    group.add_argument("--grad-accum-steps", type=cli.positive_int, default=1, help="forward passes per step")
    acceleration.add_flags(group)
    parallel.add_flags(group)
    _add_optimizer(parser.add_argument_group("optimizer"))
    _add_averages(parser.add_argument_group("averaged weights"))
    _add_start(parser.add_argument_group("start"))
    _add_run(parser.add_argument_group("run"))


def _add_optimizer(group):
    group.add_argument("--optimizer", choices=optim.OPTIMIZERS, default="adamw", help="muon: for the blocks' matrices")
    group.add_argument("--lr", type=cli.positive, default=1e-4, help="learning rate; muon's is as large as AdamW's")
    group.add_argument("--betas", type=cli.below_one, nargs=2, default=[0.9, 0.999], help="of AdamW's two moments")
    group.add_argument("--weight-decay", type=cli.non_negative, default=0.0, help="of all weights, times --lr")
    group.add_argument("--lr-schedule", choices=optim.SCHEDULES, default="constant", help="after the warm-up")
    group.add_argument("--min-lr", type=cli.non_negative, default=0.0, help="where the cosine ends")
    group.add_argument("--warmup-steps", type=cli.count, default=0, help="steps of linear warm-up")
    group.add_argument("--max-grad-norm", type=cli.positive, help="clip gradients to this norm")


def _add_averages(group):
    group.add_argument(
        "--ema-decay", type=cli.fraction, nargs="+", default=[0.9999],
        help="of the averaged weights; the first of several is called ema",
    )  # fmt: skip
    group.add_argument(
        "--ema-warmup", action=SWITCH, default=False, help="decay at most (1 + n)/(10 + n) after n steps"
    )
    group.add_argument(
        "--ema-std", type=ema.std_type, nargs="+",
        help="also power-function averages of these relative widths, to make others of after the run: 0.05 0.1, say",
    )  # fmt: skip


def _add_start(group):
    group.add_argument("--ckpt", help="checkpoint to go on from, published weights, or 'latest' of this results-dir")
    group.add_argument("--auto-resume", action=SWITCH, default=False, help="--ckpt latest where there is one")
    group.add_argument(
        "--allow-other-classes", action="store_true", help="go on with data whose class names are not the checkpoint's"
    )
    group.add_argument("--init-from", help="checkpoint of any model, of which a run that starts takes what fits")
    group.add_argument("--weights", default="ema", help="of --init-from: ema, model, or an average by its name")
    group.add_argument(
        "--init-positions", choices=transplant.POSITIONS,
        help="of clips from --init-from: an image's for every frame, or new; left out: repeat for those from images",
    )  # fmt: skip


def _add_run(group):
    group.add_argument("--results-dir", default="results", help="holds one numbered folder a run")
    group.add_argument("--log-every", type=cli.positive_int, default=100, help="steps between log lines")
    group.add_argument("--ckpt-every", type=cli.positive_int, default=50_000, help="steps between checkpoints")
    group.add_argument("--keep-checkpoints", type=cli.positive_int, help="remove all but this many newest")
    group.add_argument("--wandb", action=SWITCH, default=False, help="log to Weights & Biases too")
    group.add_argument("--tensorboard", action=SWITCH, default=False, help="log to TensorBoard too")


def check(parser, args):
    """End with one line if the args contradict each other; settles those of the averages."""
    if (args.data_path is None) == (args.latents is None):
        parser.error("give either --data-path, to encode as you train, or --latents")
    columns = (args.image_column or args.label_column) and not args.val_path  # which may have them
    if args.latents and (args.csv or args.frame_interval or columns):
        parser.error("--csv, --frame-interval and columns were settled when --latents was made; leave them out")
    for flag, asked in (("--grad-checkpointing", args.grad_checkpointing), ("--recompute", args.recompute)):
        if asked and asked != "nothing" and args.ebm != "none":
            parser.error(f"{flag} cannot recompute an energy's field, which is differentiated twice; drop one")
    if args.min_lr and (args.lr_schedule != "cosine" or args.min_lr > args.lr):
        parser.error(f"--min-lr {args.min_lr:g} is where --lr-schedule cosine ends, below --lr {args.lr:g}")
    if args.init_positions and not (args.init_from and args.video):
        parser.error("--init-positions is for --video that starts --init-from other weights")
    if args.weights != "ema" and not args.init_from:
        parser.error("--weights says which ones of --init-from to take; give both")
    for name in ("ema_decay", "ema_std"):
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            parser.error(f"{flag_of(name)} has {', '.join(map(str, values))}, one of them twice")
    if len(args.ema_decay) == 1:
        (args.ema_decay,) = args.ema_decay
