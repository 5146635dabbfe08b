"""Which looks a run takes at itself, and after how many steps each."""

from EqM import cli
from EqM.engine import prepare
from EqM.watch.held_out import HeldOut
from EqM.watch.preview import Preview


def add_flags(parser):
    """--sample-every, --val-path and their companions, on an argparse parser."""
    group = parser.add_argument_group("watching")
    group.add_argument("--sample-every", type=cli.positive_int, help="steps between contact sheets of EMA samples")
    group.add_argument("--cfg-scale", type=cli.non_negative, default=4.0, help="guidance of these samples; 1 is none")
    group.add_argument("--val-path", help="data that is not trained on, laid out as --data-path: its loss is logged")
    group.add_argument("--val-latents", help="the same from a latent cache")
    group.add_argument("--val-every", type=cli.positive_int, default=1000, help="steps between these losses")
    group.add_argument("--val-items", type=cli.positive_int, default=1024, help="at most so many items, evenly spread")


def check(parser, args):
    """End with one line if flags of add_flags contradict each other."""
    if args.val_path and args.val_latents:
        parser.error("give either --val-path, to encode it once, or --val-latents")


def needs_autoencoder(args, ranks):
    """Whether some look does, on this rank."""
    return bool((args.sample_every and ranks.is_main) or args.val_path)


def looks(args, ranks, trainer, autoencoder, held_out, class_names, log):
    """[(every, look)]: look(step) is to be called on every rank after each so many steps.

    held_out: what held_out.open_items gave. Raises UserError if it cannot be read.
    """
    wanted = []
    if args.sample_every or held_out:
        averaged = prepare.for_averages(trainer.ema.model, trainer.run_in)
    if held_out:
        loss = HeldOut(args, ranks, trainer, averaged, autoencoder, held_out, class_names, log)
        wanted.append((args.val_every, loss))
    if args.sample_every and ranks.is_main:
        wanted.append((args.sample_every, Preview(log.folder, args, trainer, averaged, autoencoder, class_names)))
    return wanted
