"""FID and its companions of EMA samples while a run trains, and the checkpoint that has the best."""

import json
from types import SimpleNamespace

from EqM import cli
from EqM.metrics import evaluation, features, reference
from EqM.metrics.report import NAMES, ranked_by
from EqM.metrics.sources import Drawn
from EqM.pipeline import EqMPipeline
from EqM.run import checkpoint, distributed
from EqM.run.errors import UserError

DISTANCE = 249 * 0.0017  # of a published descent: updates x step size


def add_flags(group):
    """--eval-every and its companions, on a group of an argparse parser."""
    group.add_argument("--eval-every", type=cli.positive_int, help="steps between figures of samples: FID, FVD, ...")
    group.add_argument("--eval-reference", help="what they are held against: as evaluate.py's --reference")
    group.add_argument("--eval-samples", type=cli.positive_int, default=5000, help="how many, every class as often")
    group.add_argument(
        "--eval-sampling-steps", type=cli.number(int, 2), default=250, help="gd's points; fewer take longer steps"
    )
    group.add_argument("--eval-cfg-scale", type=cli.non_negative, default=1.0, help="guidance of them; 1 is none")
    group.add_argument("--inception", help="Inception weights; left out: torch-fidelity's, from its cache")
    group.add_argument("--i3d", help="scripted I3D network, for FVD")
    group.add_argument("--keep-best", action="store_true", help="save and keep the one with the lowest FID or FVD")


def check(parser, args):
    """End with one line if flags of add_flags contradict each other."""
    if bool(args.eval_every) != bool(args.eval_reference):
        parser.error("--eval-every and --eval-reference go together: how often, and against what")
    if args.keep_best and not args.eval_every:
        parser.error("--keep-best needs --eval-every: which checkpoint is best is judged there")


def open_evaluator(args, ranks):
    """The metrics.evaluation.Evaluator that the flags name, None without --eval-every. Raises UserError."""
    if not args.eval_every:
        return None
    networks = features.load(ranks, args.inception, args.i3d)
    against = reference.open_reference(args.eval_reference, networks)
    reference.check_sizes(SimpleNamespace(shape=shape_of(args)), against)
    return evaluation.Evaluator(against, networks, ranks)


def shape_of(args):
    """(H, W, 3) of a sample, or (T, H, W, 3)."""
    return (*([args.clip_len] if args.video else []), args.image_size, args.image_size, 3)


class Quality:
    """Call it with a step: it logs figures of EMA samples, drawn and judged by all ranks.

    Nothing random of the run is touched. averaged: the averaged network, ready to be called. save: writes a checkpoint.
    """

    def __init__(self, args, ranks, trainer, averaged, autoencoder, evaluator, class_names, log, save):
        self.args = args
        self.ranks = ranks
        self.evaluator = evaluator
        evaluator.tell = log.info
        self.log = log
        self.save = save
        pipe = EqMPipeline(averaged, trainer.run_in, autoencoder, trainer.transport, class_names)
        points = args.eval_sampling_steps
        how = {"num_sampling_steps": points, "stepsize": DISTANCE / (points - 1), "cfg_scale": args.eval_cfg_scale}
        self.samples = Drawn(pipe, args.eval_samples, shape_of(args), how, seed=args.global_seed)

    def __call__(self, step):
        self.save(step)  # a stop while this goes on, which takes long, loses no step
        figures = self.evaluator.judge(self.samples, desc=f"samples of step {step}")
        self.log.step(step, {NAMES[name]: value for name, value in figures.items() if name in NAMES})
        name = ranked_by([figures])
        if self.args.keep_best and name:
            self._keep(step, name, figures[name])

    def _keep(self, step, name, value):
        is_best = distributed.on_main(self.ranks, lambda: self._is_best(name, value))
        if not is_best:
            return
        self.save(step, wait=True)  # before the note that it is there, from which pruning knows what to spare
        distributed.on_main(self.ranks, lambda: self._note(step, name, value))

    def _is_best(self, name, value):
        best = checkpoint.best(self.log.folder)
        return best is None or best["figure"] != NAMES[name] or value < best["value"]

    def _note(self, step, name, value):
        path = self.log.folder / checkpoint.BEST
        note = {"checkpoint": f"{step:07d}.pt", "figure": NAMES[name], "value": value, "step": step}
        partial = path.with_suffix(".writing")
        try:
            partial.write_text(json.dumps(note) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        self.log.info(f"{NAMES[name]} {value:.4f} is the best so far: {note['checkpoint']} is kept")
