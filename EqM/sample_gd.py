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
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tqdm import tqdm

from EqM import architecture, cli
from EqM.data import media
from EqM.engine import acceleration, precision
from EqM.pipeline import EqMPipeline
from EqM.run import checkpoint, distributed, resume
from EqM.run.errors import UserError, printable, reason
from EqM.run.log import progress

SHEET_SIZE = 64  # samples on the contact sheet
NOISE = 2  # raised when the samples of a seed change; 1 until version 0.1
WRITERS = 4  # threads that encode and write files


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_model(parser, from_checkpoint=True)
    cli.add_encoding(parser, from_checkpoint=True)
    cli.add_transport(parser, from_checkpoint=True)
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
    group.add_argument("--classes", nargs="+", help="class names or numbers, or all, in turn; left out: at random")
    group.add_argument("--fps", type=cli.positive_int, default=8, help="frames per second of clips")
    group.add_argument("--clip-format", choices=("gif", "mp4"), default="gif", help="file type of clips")
    group.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="add what is missing to a folder of the same samples; --no-resume refuses any folder that has some",
    )  # fmt: skip
    acceleration.add_compile(group)
    return parser.parse_args()


def recipe(args, weights, run_in):
    """All that a sample depends on besides its number, as samples.json keeps it."""
    names = (
        *architecture.MODEL_DEFAULTS, "sampler", "stepsize", "num_sampling_steps", "mu", "cfg_scale", "cfg_channels",
        "sample_eps", "classes", "global_seed", "vae_precision", "fps",
    )  # fmt: skip
    flags = {name: getattr(args, name) for name in names}
    made_of = checkpoint.fingerprint(weights)
    return {"weights": made_of, "precision": run_in.name, "noise": NOISE, **resume.absolute(flags)}


def open_folder(folder, files, made_by, add_missing):
    """Numbers of the samples that are still to be made; says in samples.json what the folder holds.

    files: path of every sample. made_by: their recipe. Raises UserError if the folder holds other samples.
    """
    note = folder / "samples.json"
    present = {i for i, path in enumerate(files) if path.exists()}
    if present and not add_missing:
        raise UserError(f"--folder {folder} holds samples already; choose another, or --resume to add what is missing")
    try:
        theirs = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        if not isinstance(theirs, dict):
            raise ValueError(f"{note} is not what a sampler wrote")
        differs = [name for name in made_by if not _same(name, theirs.get(name), made_by[name])]
        if present and differs:
            origin = f"other samples ({', '.join(differs)} differ)" if theirs else "samples of unknown origin"
            raise UserError(f"--folder {folder} holds {origin}; choose another")
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(made_by, indent=1), encoding="utf-8")
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
    saved = checkpoint.load(args.ckpt)
    tell = tqdm.write if ranks.is_main else str  # once, not on every rank
    pipe = EqMPipeline.from_saved(saved, args.ckpt, args, run_in, args.weights, args.compile, tell)
    labels = pipe.labels(args.classes, range(args.num_fid_samples), args.global_seed)

    folder = Path(args.folder)
    suffix = args.clip_format if args.video else "png"
    files = [folder / f"{i:06d}.{suffix}" for i in range(args.num_fid_samples)]
    made_by = recipe(args, checkpoint.weights_named(saved, args.weights, args.ckpt), run_in)
    todo = distributed.on_main(ranks, lambda: open_folder(folder, files, made_by, args.resume))
    batch_size = max(1, args.global_batch_size // ranks.world_size)
    indices = todo[ranks.rank :: ranks.world_size]
    if ranks.is_main:
        print(f"Precision: {run_in.reason}; {len(todo)} of {len(files)} samples to make")

    how = {name: getattr(args, name) for name in cli.DESCENT}
    made = progress(desc="samples", total=len(indices), unit="sample", shown=ranks.is_main)
    with Writers(args.fps) as writers:
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            updates = partial(progress, desc="updates", leave=False, shown=ranks.is_main, lines=False)
            x = pipe.descend(pipe.noise(batch, args.global_seed), [labels[i] for i in batch], **how, progress=updates)
            samples = media.as_clips(pipe.decode(x)).to("cpu", non_blocking=True)
            writers.put([files[i] for i in batch], samples, distributed.fence(ranks.device))
            made.update(len(batch))
    made.close()
    distributed.barrier()

    if ranks.is_main:
        finish(folder, files, labels, pipe.class_names)
    distributed.cleanup()


def finish(folder, files, labels, class_names):
    """Write labels.csv and the contact sheet beside the samples, and for images the npz."""
    class_names = list(map(printable, class_names))
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", "class"])
        rows.writerows([path.name, label, class_names[label]] for path, label in zip(files, labels, strict=True))
    shown = [media.load_sample(path) for path in files[:SHEET_SIZE]]
    media.contact_sheet(shown, [class_names[label] for label in labels[:SHEET_SIZE]]).save(folder / "grid.png")
    print(f"Wrote {len(files)} samples, labels.csv and grid.png to {folder}")
    if files[0].suffix == ".png":
        archive = Path(f"{folder.resolve() if folder.name in ('', '..') else folder}.npz")
        media.save_npz(archive, files)
        print(f"Wrote {archive}")


if __name__ == "__main__":
    cli.run(main)
