"""Judge samples: FID, sFID, Inception Score, KID, precision, recall, and of clips FVD.

    python EqM/evaluate.py --samples samples --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=N EqM/evaluate.py --ckpt results/000-EqM-S-4-Linear-velocity-None --reference ref.npz
    python EqM/evaluate.py --make-reference /path/to/imagenet/train --image-size 256 --out ref.npz

Killed, it goes on where it was when run again with the same --json, or --out.
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
from typing import NamedTuple

from tqdm import tqdm

from EqM import architecture, cli
from EqM.engine import acceleration, precision
from EqM.metrics import features, figures, reference, report, sources
from EqM.metrics.collect import Progress
from EqM.metrics.evaluation import Evaluator
from EqM.pipeline import EqMPipeline
from EqM.run import checkpoint, distributed
from EqM.run.errors import flag_of

ITEMS = ("image_size", "video", "clip_len")
NETWORK = [name for name in architecture.MODEL_DEFAULTS if name not in (*ITEMS, "vae")]
READ_BY = {  # flags that other ways to call this would pass over; data: of --make-reference; cache: one is decoded
    ("ckpt",): (
        *cli.DESCENT, "weights", "num_fid_samples", "batch_size", "classes", "keep_samples", "compile", *NETWORK,
        "sample_eps",
    ),
    ("data",): ("csv", "image_column", "label_column", "frame_interval"),
    ("ckpt", "data"): (*ITEMS, "global_seed"),
    ("ckpt", "cache"): ("vae", "vae_precision", "use_bf16", "use_amp"),
    ("samples", "ckpt"): ("json", "neighbours"),
}  # fmt: skip
COUNT = {False: 50_000, True: 2_048}  # samples of images, of clips, as published figures are taken


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("what is judged, and against what")
    judged = group.add_mutually_exclusive_group(required=True)
    judged.add_argument("--samples", help="folder of images or clips, npz with arr_0, or latent cache to decode")
    judged.add_argument("--ckpt", nargs="+", help="checkpoints, or run folders for all of theirs")
    judged.add_argument("--make-reference", metavar="DIR", help="data set or latent cache to make --out of")
    group.add_argument("--reference", help="folder, npz with arr_0, latent cache, ADM's reference npz, or ours")
    group.add_argument("--out", help="npz that --make-reference writes")
    group.add_argument("--inception", metavar="FILE", help="weights of Inception; left out: torch-fidelity's")
    group.add_argument("--i3d", metavar="FILE", help="scripted I3D for FVD, as StyleGAN-V calls it")
    group.add_argument("--json", metavar="FILE", help="figures and protocol; progress is kept beside it meanwhile")
    group.add_argument("--neighbours", type=cli.positive_int, metavar="K", help="picture: K closest items of each")
    cli.add_checkpoints_model(parser)
    cli.add_sampler(parser)
    precision.add_flags(parser)
    cli.add_runtime(parser)
    group = parser.add_argument_group("samples of checkpoints")
    group.add_argument("--weights", default="ema", help="ema, model, or one of several averages, as ema-0.999")
    group.add_argument("--num-fid-samples", type=cli.positive_int, help="left out: 50,000 images, 2,048 clips")
    group.add_argument("--batch-size", type=cli.positive_int, default=64, help="samples at once, per rank")
    group.add_argument("--classes", nargs="+", default=["all"], help="names or numbers in turn; all: equally often")
    group.add_argument("--keep-samples", metavar="DIR", help="write them there")
    acceleration.add_compile(group)
    group = parser.add_argument_group("data of --make-reference")
    group.add_argument("--csv", help="labels of a flat folder of clips: video_name,tag")
    group.add_argument("--image-column", help="of parquet, Arrow and hf: data; left out: found")
    group.add_argument("--label-column", help="of such data; left out: found")
    group.add_argument("--frame-interval", type=cli.positive_int, help="as in training; left out: whole clip")
    args = parser.parse_args()
    check_idle(parser, args)
    if bool(args.make_reference) == bool(args.reference):
        parser.error("--samples and --ckpt need --reference, and --make-reference takes none")
    if bool(args.make_reference) != bool(args.out):
        parser.error("--make-reference needs --out FILE.npz, and nothing else takes it")
    if args.out and Path(args.out).exists():
        parser.error(f"--out {args.out} exists already; choose another")
    return args


def check_idle(parser, args):
    """End with one line if flags are given that what is asked for does not read."""
    mode = next(name for name in ("samples", "ckpt", "make_reference") if getattr(args, name))
    paths = (args.samples, args.make_reference, args.reference)
    caches = [path for path in paths if path and sources.is_cache(path)]
    kinds = {"cache"} if caches else set()
    if args.make_reference not in caches:
        kinds.add("data" if args.make_reference else mode)
    idle = [name for readers, names in READ_BY.items() if kinds.isdisjoint(readers) for name in names]
    parser.refuse_idle(args, idle, f"with {flag_of(mode)}" + " of a latent cache" * (args.make_reference in caches))
    if args.make_reference and args.clip_len and not args.video:
        parser.error("--clip-len is for clips; give --video, or drop it")


def main():
    args = parse_args()
    ranks = distributed.setup(args.device)
    run_in = precision.activate_flags(args, ranks.device)
    tell = tqdm.write if ranks.is_main else lambda line: None
    networks = features.load(ranks, args.inception, args.i3d, tell)
    kept = Progress(args.json or args.out)
    vae_in = precision.of_vae(args, run_in)

    if args.make_reference:
        source = to_make(args, vae_in)
        made = reference.make(source, args.out, networks, ranks, kept)
        tell(f"Wrote {args.out}: {source.count} items of {sources.size_of(source.shape)}")
        tell("\n".join(report.lines(made or {})))
    else:
        against = reference.open_reference(args.reference, networks, vae_in, args.vae, tell)
        evaluator = Evaluator(against, networks, ranks, kept, tell)
        results, told = [], {}
        for name, source, about in judged(args, ranks, run_in, vae_in, tell):
            told = {"judged": {**source.told, **about}, **protocol(args, against, networks)}
            which = {key: about[key] for key in ("step", "checkpoint") if key in about}
            results.append({**evaluator.judge(source, name), **which})
            if args.neighbours:
                show_neighbours(args, evaluator, source, name, tell)
        if ranks.is_main:
            finish(args, told, results)
    if ranks.is_main:
        kept.remove()
    distributed.cleanup()


def to_make(args, vae_in):
    """The source of --make-reference."""
    if sources.is_cache(args.make_reference):
        return sources.Decoded(args.make_reference, vae_in, args.vae)
    for name in ("image_size", "video", "clip_len"):
        if getattr(args, name) is None:
            setattr(args, name, architecture.MODEL_DEFAULTS[name])
    return sources.data_as_trained(args.make_reference, args, "--make-reference")


def judged(args, ranks, run_in, vae_in, tell):
    """(name, source, facts for the protocol) of --samples or of each checkpoint in turn."""
    if args.samples:
        yield "samples", sources.open_source(args.samples, vae_in, args.vae, tell), {}
        return
    names = names_of([path for each in args.ckpt for path in checkpoint.all_of(each)])
    keeps = [args.keep_samples and (Path(args.keep_samples) / name if len(names) > 1 else args.keep_samples)
             for name in names.values()]  # fmt: skip
    distributed.on_main(ranks, lambda: check_kept(args, run_in, names, keeps))
    for (path, name), keep in zip(names.items(), keeps, strict=True):
        saved = checkpoint.load(path)
        plan = plan_of(args, run_in, saved, path, args.json or keep)
        pipe = EqMPipeline.from_saved(saved, path, plan.flags, run_in, args.weights, args.compile, tell)
        if keep:
            distributed.on_main(ranks, lambda keep=keep, plan=plan: sources.claim(keep, plan.made_by))
        source = sources.Drawn(
            pipe, plan.count, plan.shape, plan.about["sampler"], args.classes, args.global_seed, args.batch_size, keep,
            plan.recipe,
        )  # fmt: skip
        step = saved.get("step", int(path.stem) if path.stem.isdecimal() else None)
        yield name, source, plan.about | {"checkpoint": str(path)} | ({} if step is None else {"step": step})


def check_kept(args, run_in, paths, keeps):
    """Raise UserError if a folder for samples holds others: now, since a later one's turn may be hours away.

    Only the checkpoints of folders that hold some are read.
    """
    for path, keep in zip(paths, keeps, strict=True):
        if keep and not sources.check_free(keep):
            sources.check_same(keep, plan_of(args, run_in, checkpoint.load(path), path).made_by)


class Plan(NamedTuple):
    """What is drawn of a checkpoint. flags: its own filled in. about: for the protocol. recipe: all that tells it."""

    flags: argparse.Namespace
    count: int
    shape: tuple
    about: dict
    recipe: list | None

    @property
    def made_by(self):
        """What a folder of these samples says of itself."""
        return {"judged": self.recipe}


def plan_of(args, run_in, saved, path, with_recipe=True):
    """The Plan of a checkpoint that is loaded, saved, from path."""
    flags = argparse.Namespace(**vars(args))
    architecture.follow_checkpoint(flags, saved["args"])
    count = args.num_fid_samples or COUNT[flags.video]
    side = (flags.image_size, flags.image_size, 3)
    shape = (flags.clip_len, *side) if flags.video else side
    about = {
        "weights": args.weights, "sampler": {name: getattr(args, name) for name in cli.DESCENT},
        "classes": args.classes, "seed": args.global_seed, "batch_size": args.batch_size, "precision": run_in.name,
        "vae": flags.vae, "vae_precision": args.vae_precision,
    }  # fmt: skip
    weights = checkpoint.weights_named(saved, args.weights, path)
    recipe = [checkpoint.fingerprint(weights), count, shape, flags.sample_eps, about] if with_recipe else None
    return Plan(flags, count, shape, about, recipe)


def names_of(paths):
    """{path: a name that no other has}: of its file, with as many of the folders above it as that takes."""
    parts = {}
    for path in paths:
        _, *above, _ = path.resolve().parts
        parts[path] = [*(part for part in above if part != "checkpoints"), path.resolve().stem]
    for depth in range(1, max(map(len, parts.values())) + 1):
        names = {path: "-".join(each[-depth:]) for path, each in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: f"{place}-{path.stem}" for place, path in enumerate(parts)}


def protocol(args, against, networks):
    """What figures are worth nothing without, apart from what is judged."""
    return {
        "reference": against.told,
        "features": networks.told(),
        "kid": f"{figures.SUBSETS} subsets of min({figures.SUBSET}, count), FP64",
        "precision_recall": f"balls to neighbour {figures.NEIGHBOURS} by the pooled features",
        "inception_score": f"{figures.SPLITS} splits, shuffled by seed {figures.SEED}",
        "fvd": f"first {features.CLIP} frames",
    }


def finish(args, told, results):
    """Print protocol and table; write the JSON file and, of several checkpoints, the plot."""
    if len(results) > 1:
        for name in ("step", "checkpoint"):  # which the results tell
            told["judged"].pop(name, None)
    shown = told["judged"]
    if "sampler" in shown:
        shown = shown | {"sampler": " ".join(map(str, cli.words_of(args, cli.settings_read(shown["sampler"]))))}
    print("\n".join(report.lines(told | {"judged": shown})))
    print(report.table(results))
    if args.json:
        report.save(args.json, told, results)
    best = report.best(results) if len(results) > 1 else None
    if best:
        step = f"step {best['step']}, " if "step" in best else ""
        print(f"Best: {step}{best['checkpoint']}")
    if sum("step" in result for result in results) > 1:
        path = beside(args, ".png")
        report.draw(results, path)
        print(f"The plot: {path}")


def show_neighbours(args, evaluator, source, name, tell):
    sheet = evaluator.neighbours(source, args.neighbours)
    if sheet is not None:
        path = beside(args, f"-neighbours-{name}.png")
        sheet.save(path)
        tell(f"Wrote {path}")


def beside(args, ending):
    """Path of a picture, named after --json."""
    return (
        Path(args.json).with_suffix("").with_name(Path(args.json).stem + ending)
        if args.json
        else Path(f"evaluation{ending}")
    )


if __name__ == "__main__":
    cli.run(main)
