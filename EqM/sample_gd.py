"""Sample a trained EqM model by gradient descent on its field.

    torchrun --nproc_per_node=N EqM/sample_gd.py --ckpt results/000-EqM-S-4-Linear-velocity-None/checkpoints/0000100.pt
    python EqM/sample_gd.py --ckpt model.pt --sampler ngd --cfg-scale 1.5 --folder samples

Sample i depends on the seed and i alone, however many ranks and whatever the batch size. Killed, it goes on
where it was when run again.
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
import csv
import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tqdm import tqdm

from EqM import architecture, cli, trace
from EqM.data import evaluations, media
from EqM.data.starts import Starts
from EqM.engine import acceleration, precision
from EqM.pipeline import EqMPipeline
from EqM.run import checkpoint, distributed, resume
from EqM.run.errors import UserError, printable, reason
from EqM.run.log import progress

SHEET_SIZE = 64  # samples on the contact sheet
NOISE = 2  # raised when the samples of a seed change; 1 until version 0.1
WRITERS = 4  # threads that encode and write files
CLIPS = {"fps": 8, "clip_format": "gif"}  # flags that images have no use for
NEW = cli.ADDED | {"also": [], "start": None, "start_noise": None}  # of a recipe, and what holds where it is absent


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_checkpoints_model(parser)
    cli.add_sampler(parser)
    precision.add_flags(parser)
    cli.add_runtime(parser)
    group = parser.add_argument_group("samples")
    group.add_argument("--ckpt", required=True, help="checkpoint")
    group.add_argument("--weights", default="ema", help="of it: ema, model, or one of several averages, as ema-0.999")
    group.add_argument("--folder", default="samples", help="where samples go; images also make <folder>.npz")
    group.add_argument("--num-fid-samples", type=cli.positive_int, default=50_000, help="how many samples")
    group.add_argument(
        "--global-batch-size", type=cli.positive_int, default=256, help="samples at once, over all ranks"
    )
    group.add_argument(
        "--classes", nargs="+",
        help='class names or numbers, taken in turn, or all; also sums, "panda*0.7+valley*0.3"; left out: at random',
    )  # fmt: skip
    group.add_argument(
        "--also", nargs="+", default=[], metavar="CKPT", help="add these checkpoints' fields: their mean"
    )
    group.add_argument("--start", metavar="DIR_OR_FILE", help="images or clips to start from, taken in turn")
    group.add_argument("--start-noise", type=cli.fraction, help="share of noise in the start; left out: 0.5")
    group.add_argument("--fps", type=cli.positive_int, default=CLIPS["fps"], help="frames per second of clips")
    group.add_argument("--clip-format", choices=("gif", "mp4"), default=CLIPS["clip_format"], help="file type of clips")
    group.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="add what is missing to a folder of the same samples; --no-resume refuses any folder that has some",
    )  # fmt: skip
    group.add_argument("--trace", action="store_true", help="trace*.png: a few samples along the descent, norm by step")
    group.add_argument("--trace-gif", action="store_true", help="trace.gif: a few samples as they descend")
    acceleration.add_compile(group)
    parser.checks.append(check_start)
    return parser.parse_args()


def check_start(parser, args):
    if args.start is None and args.start_noise is not None:
        parser.error("--start-noise says how much of a --start is noise, and there is none")
    if args.start is not None and args.start_noise is None:
        args.start_noise = 0.5


def check_clips(args):
    """Raise UserError if a model of images is given what is for clips."""
    idle = cli.flags_given(args, CLIPS)
    if idle and not args.video:
        raise UserError(f"{idle}: no effect on images, which this model makes; drop it")


def recipe(args, weights, run_in, others, start):
    """All that a sample depends on besides its number, as samples.json keeps it.

    What came later (NEW) is there only where it is used, so that folders made before are finished.
    """
    names = (
        *architecture.MODEL_DEFAULTS, "sampler", "stepsize", "num_sampling_steps", "mu", "cfg_scale", "cfg_channels",
        "sample_eps", "classes", "global_seed", "vae_precision", "fps",
    )  # fmt: skip
    flags = {name: getattr(args, name) for name in names}
    new = {name: getattr(args, name) for name in cli.ADDED}
    new |= {"also": others, "start": start and start.digest(), "start_noise": args.start_noise}
    return {
        "weights": checkpoint.fingerprint(weights),
        "precision": run_in.name,
        "noise": NOISE,
        **resume.absolute(flags),
        **{name: value for name, value in new.items() if value != NEW[name]},
    }


def open_folder(folder, files, made_by, add_missing):
    """Numbers of the samples that are still to be made; says in samples.json what the folder holds.

    files: path of every sample. made_by: their recipe. With a stop norm, a sample counts only with its evaluations.
    Raises UserError if the folder holds other samples.
    """
    note = folder / "samples.json"
    present = {i for i, path in enumerate(files) if path.exists()}
    if present and not add_missing:
        raise UserError(f"--folder {folder} holds samples already; choose another, or --resume to add what is missing")
    try:
        theirs = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        if not isinstance(theirs, dict):
            raise ValueError(f"{note} is not what a sampler wrote")
        names = {**made_by, **{name: None for name in NEW if name in theirs}}
        differs = [
            name for name in names if not _same(name, *(each.get(name, NEW.get(name)) for each in (theirs, made_by)))
        ]
        if present and differs:
            origin = f"other samples ({', '.join(differs)} differ)" if theirs else "samples of unknown origin"
            raise UserError(f"--folder {folder} holds {origin}; choose another")
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(made_by, indent=1), encoding="utf-8")
        if "stop_norm" in made_by:
            evaluations.gather(folder)
            counts = evaluations.known(folder)
            present = {i for i in present if files[i].name in counts}
    except (OSError, ValueError) as error:
        raise UserError(f"--folder {folder} cannot be used: {reason(error)}") from None
    with ThreadPoolExecutor(WRITERS) as pool:
        whole = pool.map(lambda i: i in present and media.is_whole(files[i]), range(len(files)))
        return [i for i, good in enumerate(whole) if not good]


def _same(name, theirs, ours):
    return resume.same_vae(theirs, ours) if name == "vae" else theirs == ours


class Writers:
    """Threads that write one batch of samples while the next is made."""

    def __init__(self, fps):
        self.fps = fps
        self.pool = ThreadPoolExecutor(WRITERS)
        self.coming = None  # (paths, uint8 samples (N, T, H, W, 3) on their way to the CPU, fence)
        self.writing = []
        self.failed = False

    def put(self, paths, samples, arrived):
        """Take a batch, and write the one before it. Raises UserError if an earlier one could not be written."""
        try:
            for done in self.writing:
                done.result()
        except UserError:
            self.failed = True
            raise
        self.writing = []
        taken, self.coming = self.coming, None  # so that a signal in between does not have it written twice
        if taken is not None:
            before, pixels, fence = taken
            fence()
            frames = pixels.numpy()
            self.writing = [
                self.pool.submit(media.save_sample, *each, self.fps) for each in zip(before, frames, strict=True)
            ]
        self.coming = None if samples is None else (paths, samples, arrived)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Write all that was taken, also when something stops the sampler, unless writing is what failed."""
        try:
            if not self.failed:
                self.put(None, None, None)
                self.put(None, None, None)
        finally:
            self.pool.shutdown()


def main():
    args = parse_args()
    ranks = distributed.setup(args.device)
    run_in = precision.activate_flags(args, ranks.device)
    saved, vae = checkpoint.load(args.ckpt), args.vae
    tell = tqdm.write if ranks.is_main else str  # once, not on every rank
    pipe = EqMPipeline.from_saved(saved, args.ckpt, args, run_in, args.weights, args.compile, tell)
    check_clips(args)
    others = [add(pipe, path, vae, args) for path in args.also]
    labels = pipe.labels(args.classes, range(args.num_fid_samples), args.global_seed)
    start = Starts(args.start, args.image_size, args.clip_len if args.video else None) if args.start else None

    folder = Path(args.folder)
    suffix = args.clip_format if args.video else "png"
    files = [folder / f"{i:06d}.{suffix}" for i in range(args.num_fid_samples)]
    made_by = recipe(args, checkpoint.weights_named(saved, args.weights, args.ckpt), run_in, others, start)
    todo = distributed.on_main(ranks, lambda: open_folder(folder, files, made_by, args.resume))
    batch_size = max(1, args.global_batch_size // ranks.world_size)
    indices = todo[ranks.rank :: ranks.world_size]
    if ranks.is_main:
        print(f"Precision: {run_in.reason}; {len(todo)} of {len(files)} samples to make")

    how = {name: getattr(args, name) for name in cli.DESCENT}
    given = {} if start is None else {"start": start, "start_noise": args.start_noise}
    counts = evaluations.Evaluations(folder, ranks.rank) if args.stop_norm else None
    made = progress(desc="samples", total=len(indices), unit="sample", shown=ranks.is_main)
    updates = partial(
        progress, desc="updates", total=most_updates(args, len(indices), batch_size), leave=False,
        shown=ranks.is_main, lines=False,
    )  # fmt: skip
    with Writers(args.fps) as writers:
        for ended in pipe.draw(
            [labels[i] for i in indices], indices, args.global_seed, batch_size, **given, progress=updates, **how
        ):  # fmt: skip
            samples = media.as_clips(pipe.decode(ended.x)).to("cpu", non_blocking=True)
            paths = [files[i] for i in ended.indices]
            if counts:
                counts.note([path.name for path in paths], ended.evaluations)
            writers.put(paths, samples, distributed.fence(ranks.device))
            made.update(len(paths))
    made.close()
    distributed.barrier()

    if ranks.is_main:
        finish(args, folder, files, [pipe.composition.written(label) for label in labels], start)
        if args.trace or args.trace_gif:
            first = range(min(trace.SHOWN, len(files)))
            seen = trace.follow(pipe, labels[: len(first)], first, args.global_seed, **given, **how)
            seen.save(folder, args.trace, args.trace_gif)
            print(f"Wrote the trace of {len(first)} samples to {folder}")
    distributed.cleanup()


def add(pipe, path, vae, args):
    """Add a checkpoint's field to a pipeline's; returns the fingerprint of its weights. vae: that was asked for."""
    saved = checkpoint.load(path)
    pipe.also(path, saved, compile=args.compile, tell=tqdm.write, vae=vae)
    return checkpoint.fingerprint(saved["ema"])


def most_updates(args, samples, batch_size):
    """How many updates a rank makes at most, for a bar; None where the sampler decides."""
    return None if args.sampler == "dopri5" else (args.num_sampling_steps - 1) * math.ceil(samples / batch_size)


def finish(args, folder, files, labels, start):
    """Write labels.csv and the contact sheet beside the samples, and for images the npz.

    labels: (numbers, names) of what each sample was asked to be. start: what they start from, or None.
    """
    names = [printable(name) for _, name in labels]
    columns = {"file": [path.name for path in files], "label": [number for number, _ in labels], "class": names}
    if args.stop_norm:
        counts = evaluations.known(folder)
        columns["evaluations"] = [counts[path.name] for path in files]
    if start:
        columns["start"] = [printable(start.names[i % len(start)]) for i in range(len(files))]
    partial = folder / "labels.partial"
    with open(partial, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))
    partial.replace(folder / "labels.csv")
    contact_sheet(files, names, start).save(folder / "grid.png")
    if args.stop_norm:
        evaluations.gather(folder, columns["file"])
        most = (args.num_sampling_steps - 1) * (2 if args.sampler == "heun" else 1)
        print(evaluations.summary(columns["evaluations"], most))
    print(f"Wrote {len(files)} samples, labels.csv and grid.png to {folder}")
    if files[0].suffix == ".png":
        archive = Path(f"{folder.resolve() if folder.name in ('', '..') else folder}.npz")
        media.save_npz(archive, files)
        print(f"Wrote {archive}")


def contact_sheet(files, names, start):
    """The first samples, each beside what it starts from, if anything."""
    shown = [media.load_sample(path) for path in files[:SHEET_SIZE]]
    if start is None:
        return media.contact_sheet(shown, names[:SHEET_SIZE])
    pairs = []
    for i, (sample, name) in enumerate(zip(shown, names[:SHEET_SIZE], strict=True)):
        given = start[i % len(start)]
        pairs += [(given if given.ndim == 4 else given[None], printable(start.names[i % len(start)])), (sample, name)]
    return media.contact_sheet(*zip(*pairs, strict=True), together=2)


if __name__ == "__main__":
    cli.run(main)
