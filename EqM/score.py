"""Score files by how far a model holds them from its data: by energy, or by the norm of its field.

    python EqM/score.py --ckpt CHECKPOINT --data-path DIR
    python EqM/score.py --ckpt CHECKPOINT --data-path DIR --against OTHER

Writes scores.csv, a histogram and a picture of the lowest and the highest files. With --against it prints how well the
score tells the two folders apart, where the first one counts as data.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # run by its path: import the package beside this file, whatever else is installed
    sys.path = [str(HERE.parent), *(folder for folder in sys.path if Path(folder).resolve() != HERE)]
if __name__ == "__main__":
    from EqM.run import stops

    stops.end_at_once()  # until main handles them: what follows takes seconds to import

import csv
import os

import numpy as np
import torch

from EqM import cli
from EqM.data import loader, media, tables
from EqM.engine import precision
from EqM.pipeline import EqMPipeline
from EqM.run import checkpoint, distributed
from EqM.run.errors import UserError, printable
from EqM.run.log import progress

SHOWN = 8  # lowest and highest files in the picture


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_checkpoints_model(parser)
    precision.add_flags(parser)
    cli.add_runtime(parser)
    group = parser.add_argument_group("scores")
    group.add_argument("--ckpt", required=True, help="checkpoint")
    group.add_argument("--weights", default="ema", help="of it: ema, model, or one of several averages, as ema-0.999")
    group.add_argument("--data-path", required=True, help="files to score: as train.py's, or a flat folder of no class")
    group.add_argument("--against", help="other such data, of what is not the data")
    group.add_argument("--csv", help="labels of flat folders of clips: video_name,tag")
    group.add_argument("--image-column", help="of parquet, Arrow and hf: data; left out: found")
    group.add_argument("--label-column", help="of such data; left out: found")
    group.add_argument("--frame-interval", type=cli.positive_int, help="as in training; left out: whole clip")
    group.add_argument(
        "--class", dest="label", metavar="CLASS",
        help="judge every file under this class, by name or number, under a sum of classes, or under none; left out: "
        "each under its own, and under none with --against",
    )  # fmt: skip
    group.add_argument("--folder", default="scores", help="where scores.csv and the pictures go")
    group.add_argument("--batch-size", type=cli.positive_int, default=64, help="files at once")
    group.add_argument("--num-workers", type=cli.count, default=4, help="decoding processes")
    group.add_argument("--max-bad-fraction", type=cli.fraction, default=0.01, help="files that may fail to decode")
    return parser.parse_args()


def labels_of(pipe, dataset, args, path):
    """The model's label, or sum of labels, for each class of a dataset, which lies at path."""
    names = [args.label] * len(dataset.class_names) if args.label is not None or args.against else dataset.class_names
    try:
        return [pipe.composition.null_label if name is None else pipe.composition.asked(name) for name in names]
    except UserError as error:
        whose = f"{path}: " if args.label is None else "--class "
        message = str(error).removeprefix("--classes ")
        raise UserError(f"{whose}{message}; --class none judges files of any class") from None


def scores(pipe, dataset, labels, args, name):
    """(numbers of the files that could be read, their scores in FP64), in order. labels: for the dataset's classes."""
    keys = [[(0, i) for i in range(n, min(n + args.batch_size, len(dataset)))]
            for n in range(0, len(dataset), args.batch_size)]  # fmt: skip
    bad_files = loader.BadFiles(dataset, args.max_bad_fraction, lambda line: cli.complain(line))
    found = []
    for pixels, classes, bad in progress(
        loader.read(dataset, keys, args.num_workers, pipe.device.type == "cuda"), desc=name, total=len(keys)
    ):
        bad_files.note(bad)
        x = pipe.encode(pixels.movedim(1, -1))
        asked = [labels[own] for own in classes.tolist()]
        found.append((bad < 0, pipe.score(x, asked)))  # a bad file has another one in its place
    good = torch.cat([part for part, _ in found]).numpy()
    values = torch.cat([part for _, part in found]).double().cpu().numpy()
    if not np.isfinite(values[good]).all():
        raise UserError(f"a score in {name} is not finite in {pipe.run_in.name.upper()}; try FP32")
    return np.flatnonzero(good), values[good]


def auroc(data, others):
    """Chance that one of the others scores higher than one of the data, ties counting half (Mann and Whitney 1947)."""
    data = np.sort(data)
    below, not_above = np.searchsorted(data, others, "left"), np.searchsorted(data, others, "right")
    return float((below + not_above).mean() / (2 * len(data)))


def main():
    args = parse_args()
    ranks = distributed.setup(args.device)
    if ranks.world_size > 1:
        raise UserError("score.py runs as one process; start it without torchrun")
    run_in = precision.activate_flags(args, ranks.device)
    pipe = EqMPipeline.from_saved(checkpoint.load(args.ckpt), args.ckpt, args, run_in, args.weights)
    folders = [path for path in (args.data_path, args.against) if path]
    datasets = [tables.open_any(args.data_path, args, "--data-path", beside=args.against)]
    if args.against:
        datasets.append(tables.open_any(args.against, args, "--against", beside=args.data_path))
    labels = [labels_of(pipe, dataset, args, path) for dataset, path in zip(datasets, folders, strict=True)]
    folder = Path(args.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder {printable(folder)} cannot be made: {error.strerror}") from None

    judged = [scores(pipe, *each, args, path) for *each, path in zip(datasets, labels, folders, strict=True)]
    kind = "norm of the field" if pipe.model.ebm == "none" else "energy"
    write_table(folder / "scores.csv", pipe, folders, datasets, labels, judged)
    draw_histogram(folder / "histogram.png", kind, folders, judged)
    draw_extremes(folder / "extremes.png", datasets, judged)
    for path, (_, values) in zip(folders, judged, strict=True):
        print(f"{kind} of {len(values)} files in {path}: mean {values.mean():.4g}, deviation {values.std():.4g}")
    if args.against:
        print(f"AUROC {auroc(judged[0][1], judged[1][1]):.2f}")
    print(f"Wrote scores.csv, histogram.png and extremes.png to {folder}")
    distributed.cleanup()


def write_table(path, pipe, folders, datasets, labels, judged):
    """scores.csv: folder, file, the class it was judged under, score."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["folder", "file", "class", "score"])
        for folder, dataset, own, (indices, values) in zip(folders, datasets, labels, judged, strict=True):
            names = [printable(pipe.composition.written(label)[1]) for label in own]
            for index, value in zip(indices, values, strict=True):
                name = dataset.path(index).removeprefix(os.path.join(Path(folder), ""))
                rows.writerow([printable(folder), printable(name), names[dataset.labels[index]], f"{value:.8g}"])


def draw_histogram(path, kind, folders, judged):
    """The scores of each folder over one axis."""
    from matplotlib.figure import Figure  # seconds to import, and --help does without

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=kind, ylabel="share of files")
    edges = np.histogram_bin_edges(np.concatenate([values for _, values in judged]), bins=40)
    for folder, (_, values) in zip(folders, judged, strict=True):
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values, edges, weights=weights, alpha=0.6, label=printable(folder))
    axes.legend()
    figure.savefig(path)


def draw_extremes(path, datasets, judged):
    """The files of lowest and highest score over all folders, each with its score and name."""
    every = [(value, dataset, index) for dataset, part in zip(datasets, judged, strict=True)
             for index, value in zip(*part, strict=True)]  # fmt: skip
    every.sort(key=lambda each: each[0])
    shown = every[:SHOWN] + every[max(SHOWN, len(every) - SHOWN) :]
    pixels = [dataset.read(index, 0).numpy() for _, dataset, index in shown]
    clips = [item.transpose(1, 2, 3, 0) if item.ndim == 4 else item.transpose(1, 2, 0)[None] for item in pixels]
    names = [f"{value:.4g} {printable(os.path.basename(dataset.path(index)))}" for value, dataset, index in shown]
    media.contact_sheet(clips, names, columns=SHOWN if clips[0].shape[0] == 1 else 2).save(path)


if __name__ == "__main__":
    cli.run(main)
