"""Which looks a run takes at itself, and after how many steps each."""

from EqM import cli
from EqM.engine import parallel, prepare
from EqM.watch import held_out, quality
from EqM.watch.preview import Preview


def add_flags(parser):
    """--sample-every, --val-path, --eval-every and their companions, on an argparse parser."""
    group = parser.add_argument_group("watching")
    group.add_argument("--sample-every", type=cli.positive_int, help="steps between contact sheets of EMA samples")
    group.add_argument("--cfg-scale", type=cli.non_negative, default=4.0, help="guidance of these samples; 1 is none")
    group.add_argument("--val-path", help="data that is not trained on, laid out as --data-path: its loss is logged")
    group.add_argument("--val-csv", help="labels of a flat folder of clips in --val-path, as --csv")
    group.add_argument("--val-latents", help="the same from a latent cache")
    group.add_argument("--val-every", type=cli.positive_int, default=1000, help="steps between these losses")
    group.add_argument("--val-items", type=cli.positive_int, default=1024, help="at most so many items, evenly spread")
    quality.add_flags(group)


def check(parser, args):
    """End with one line if flags of add_flags contradict each other."""
    if args.val_path and args.val_latents:
        parser.error("give either --val-path, to encode it once, or --val-latents")
    if args.val_csv and not args.val_path:
        parser.error("--val-csv labels clips in --val-path; give both")
    quality.check(parser, args)


class Looks:
    """Call it with a step, on every rank: the looks that are due are taken.

    class_names: of the training data. Opens what the run is held against. Raises UserError if that cannot be read.
    """

    def __init__(self, args, ranks, class_names):
        self.args = args
        self.ranks = ranks
        self.class_names = class_names
        self.held_out = held_out.open_items(args, class_names)
        self.evaluator = quality.open_evaluator(args, ranks)
        self.need_autoencoder = bool(
            (args.sample_every and ranks.is_main) or args.val_path or self.evaluator is not None
        )
        self.taken = []  # (every, look)

    def begin(self, trainer, autoencoder, log, save, stop):
        """What is looked at, and where the looks go. save: writes a checkpoint, called with its step. stop: the
        StopRequest, which a look of one rank alone does not keep waiting.
        """
        args, wanted = self.args, []
        if args.sample_every or self.held_out or self.evaluator:
            averaged = prepare.for_averages(trainer.ema.model, trainer.run_in)
        if self.held_out:
            loss = held_out.HeldOut(
                args, self.ranks, trainer, averaged, autoencoder, self.held_out, self.class_names, log
            )
            wanted.append((args.val_every, loss))
        if args.sample_every and (self.ranks.is_main or parallel.splits(args, self.ranks)):  # parts are on every rank
            preview = Preview(log.folder, args, trainer, averaged, autoencoder, self.class_names)
            if not parallel.splits(args, self.ranks):  # else the ranks must end together
                preview.is_stopped = lambda: stop.asked
            wanted.append((args.sample_every, preview))
        if self.evaluator:
            judge = quality.Quality(
                args, self.ranks, trainer, averaged, autoencoder, self.evaluator, self.class_names, log, save
            )
            wanted.append((args.eval_every, judge))
        self.taken = wanted

    def __call__(self, step):
        for every, look in self.taken:
            if step % every == 0:
                look(step)
