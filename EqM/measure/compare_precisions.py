"""Train and sample the same model in FP32, BF16 and FP16, and report what differs.

    python -m EqM.measure.compare_precisions                       # the demo set, a quarter of an hour on two CPU cores
    python -m EqM.measure.compare_precisions --out results/compare-ucf --steps 20000 -- \\
        --data-path datasets/ucf-101/train --model EqM-S/4 --video --clip-len 4 --ema-decay 0.999

What follows `--` goes to train.py. Runs of one seed share weights, data order and noise; every checkpoint is then
sampled in every precision from the same noise. Interrupted, the same command goes on with what is missing.
"""

import csv
import json
import math
import os
import shlex
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from EqM import cli
from EqM.data import media
from EqM.engine.precision import FLAGS
from EqM.measure.precisions_report import (
    FINAL_PART,
    draw_history,
    draw_losses,
    final_losses,
    sampling_table,
    training_table,
    yardstick,
)
from EqM.measure.report import machine
from EqM.metrics.report import NAMES, ranked_by
from EqM.run import distributed
from EqM.run.errors import UserError, flag_of, reason

REPO = Path(__file__).resolve().parents[2]
DATASETS = REPO / "datasets"
if not DATASETS.is_dir():  # an installed package has no demo set, which this compares on unless told otherwise
    cli.complain("compare_precisions: error: the demo set is not here; run it from a checkout of the repository")
    sys.exit(2)
sys.path.append(str(DATASETS))
PATHS = os.pathsep.join(map(str, (REPO, DATASETS)))  # for the commands it runs

import score_demo

SHEET_SAMPLES = 4  # on the contact sheet, each nine times
JUDGES = ("reference", "inception", "i3d")  # judge what a comparison made, and may come later or be others
EARLY_STEPS = 5  # of a short FP32 run: adaLN-Zero starts with small gradients, where FP16 loses most

OURS = (  # flags of train.py that the comparison sets
    "--use-bf16", "--use-amp", "--no-tf32", "--device", "--global-seed", "--results-dir", "--epochs", "--max-steps",
    "--log-every", "--ckpt-every", "--auto-resume",
)  # fmt: skip
DEMO_ENCODING = [
    "--vae", DATASETS / "demo-vae", "--image-size", score_demo.SIZE, "--no-flip", "--video",
    "--clip-len", score_demo.CLIP_LEN, "--num-workers", 0,
]  # fmt: skip
DEMO_TRAINING = [
    "--model", "EqM-T/2", "--patch-frames", 4, "--global-batch-size", 16, "--lr", 2e-3, "--warmup-steps", 100,
    "--lr-schedule", "cosine", "--ema-decay", 0.995, "--max-grad-norm", 1,
]  # fmt: skip
DEMO_CLASSES = sorted(folder.name for folder in (DATASETS / "demo").iterdir() if folder.is_dir())
DEMO_SAMPLING = {"num_sampling_steps": 50, "stepsize": 0.008, "cfg_scale": 2.0, "cfg_channels": 4}


def parse_args(argv=None):
    """Arguments of this script, and in args.train those after `--`, which are train.py's."""
    argv = sys.argv[1:] if argv is None else argv
    ours, train = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = cli.Parser(__doc__.splitlines()[0] + " After -- come train.py's own flags; left out: the demo set.")
    cli.add_sampler(parser)
    cli.add_runtime(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument("--out", type=Path, default=Path("results/compare"), help="folder of the report and all runs")
    group.add_argument(
        "--precisions", nargs="+", choices=FLAGS, default=list(FLAGS), help="fp32, the reference, is always among them"
    )
    group.add_argument("--seeds", type=cli.positive_int, default=3, help="runs per precision, from --global-seed on")
    group.add_argument("--steps", type=cli.positive_int, default=4000, help="training steps of a run")
    group.add_argument("--num-samples", type=cli.positive_int, default=64, help="samples per table cell and seed")
    group.add_argument("--reference", help="also judge every cell against this by evaluate.py: FID, or FVD of clips")
    group.add_argument("--inception", help="with --reference: weights of Inception; left out: torch-fidelity's")
    group.add_argument("--i3d", help="with --reference: scripted I3D, for FVD")
    group.add_argument("--no-tf32", action="store_true", help="CUDA: FP32 products at 24 bits, not TF32's 11")
    group.add_argument(
        "--jobs", type=cli.positive_int, help="runs at once; left out: one on a GPU, else as many as CPU threads"
    )
    if not train:
        parser.set_defaults(**DEMO_SAMPLING)
    args = parser.parse_args(ours)
    taken = [word for word in train if word.split("=")[0] in OURS]
    if taken:
        parser.error(f"{taken[0]} after -- is set by the comparison itself")
    args.precisions = [name for name in FLAGS if name in args.precisions or name == "fp32"]
    args.train = train
    return args


def open_out(args):
    """Make the folder, and note there what the comparison is. Raises UserError if it holds another one."""
    others = ("out", "jobs", "seeds", "precisions", *JUDGES)
    described = {name: value for name, value in vars(args).items() if name not in others}
    note = args.out / "comparison.json"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        theirs = json.loads(note.read_text(encoding="utf-8")) if note.exists() else described
        differs = [name for name in described if theirs.get(name, cli.ADDED.get(name)) != described[name]]
        if differs:
            raise UserError(f"--out {args.out} holds another comparison ({', '.join(differs)} differ); choose another")
        note.write_text(json.dumps(described, indent=1), encoding="utf-8")
        for name in ("logs", "figures"):
            (args.out / name).mkdir(exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {args.out} cannot be used: {reason(error)}") from None


def run(script, argv, log, threads):
    """Run a module as a script, what it prints going to a file. Raises UserError with its last line."""
    command = [sys.executable, "-m", script, *map(str, argv)]
    with open(log, "w", encoding="utf-8") as file:
        file.write(shlex.join(map(str, command)) + "\n")
        file.flush()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": PATHS,
        }
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        raise UserError(f"{script} failed; {log} ends: {[line for line in lines if line.strip()][-1].strip()}")


def run_all(tasks, jobs, threads, words):
    """Run tasks, (script, argv, log file) each, so many at once; after a failure no more are begun."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, *task, threads) for task in tasks]
        try:
            for future in tqdm(as_completed(futures), words, len(futures)):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_folder(args, name, seed, steps):
    return args.out / "runs" / f"{name}-seed{seed}-{steps}steps"


def checkpoint_of(args, name, seed, steps=None):
    """The last checkpoint of a run of all steps, or of those given; None if there is none."""
    steps = steps or args.steps
    found = sorted(run_folder(args, name, seed, steps).glob(f"*/checkpoints/{steps:07d}.pt"))
    return found[-1] if found else None


def sample_folder(args, trained, sampled, seed):
    return args.out / "samples" / f"train-{trained}-sample-{sampled}-seed{seed}"


def common_flags(args):
    return [*(["--device", args.device] if args.device else []), *(["--no-tf32"] if args.no_tf32 else [])]


def training_tasks(args, seeds):
    """Runs that are still to be made: the slowest precision first, a short one in FP32 last."""
    runs = [(name, seed, args.steps) for name in reversed(args.precisions) for seed in seeds]
    runs.append(("fp32", seeds[0], EARLY_STEPS))
    held_out = ["--val-path", args.out / "held-out", "--val-every", args.steps]
    data = args.train or ["--latents", args.out / "latents", *DEMO_ENCODING, *DEMO_TRAINING, *held_out]
    return [
        (
            "EqM.train",
            [*data, "--max-steps", steps, "--epochs", 10**9, "--log-every", max(1, steps // 50), *FLAGS[name],
             *common_flags(args), "--global-seed", seed, "--results-dir", run_folder(args, name, seed, steps)],
            args.out / "logs" / f"train-{name}-seed{seed}-{steps}.txt",
        )
        for name, seed, steps in dict.fromkeys(runs) if checkpoint_of(args, name, seed, steps) is None
    ]  # fmt: skip


def sampling_flags(args):
    names = ("stepsize", "num_sampling_steps", "mu", "cfg_channels")
    return [word for name in names for word in (flag_of(name), getattr(args, name))]


def sampling_tasks(args, seeds):
    """Every checkpoint in every precision, from the noise and labels of --global-seed; whole folders return soon."""
    classes = [] if args.train else ["--classes", *DEMO_CLASSES]
    how = [*cli.words_of(args), *classes]
    count = ["--num-fid-samples", args.num_samples, "--global-batch-size", min(64, args.num_samples)]
    return [
        (
            "EqM.sample_gd",
            ["--ckpt", checkpoint_of(args, trained, seed), *how, *count, *FLAGS[sampled], *common_flags(args),
             "--global-seed", args.global_seed, "--folder", sample_folder(args, trained, sampled, seed)],
            args.out / "logs" / f"sample-{trained}-{sampled}-seed{seed}.txt",
        )
        for sampled in reversed(args.precisions) for trained in args.precisions for seed in seeds
    ]  # fmt: skip


def figures_file(args, trained, sampled, seed):
    """Where a cell's figures by these judges lie."""
    places = [getattr(args, name) and os.path.abspath(getattr(args, name)) for name in JUDGES]
    judges = zlib.crc32(json.dumps(places).encode())
    return args.out / "figures" / f"train-{trained}-sample-{sampled}-seed{seed}-by-{judges:08x}.json"


def judging_tasks(args, seeds):
    """Every cell against --reference, those that are judged already left out."""
    files = [("--inception", args.inception), ("--i3d", args.i3d)]
    given = [word for flag, file in files if file for word in (flag, file)]
    device = ["--device", args.device] if args.device else []
    return [
        (
            "EqM.evaluate",
            ["--samples", sample_folder(args, *cell), "--reference", args.reference, *given, *device,
             "--json", figures_file(args, *cell)],
            args.out / "logs" / f"judge-{'-'.join(map(str, cell))}.txt",
        )
        for cell in ((trained, sampled, seed) for trained in args.precisions for sampled in args.precisions
                     for seed in seeds)
        if args.reference and not figures_file(args, *cell).exists()
    ]  # fmt: skip


def judged(args, trained, sampled, seeds):
    """(name of the figure, its value for each seed) of a cell: FVD where there is one, else FID; None without any."""
    if not args.reference:
        return None
    files = [figures_file(args, trained, sampled, seed) for seed in seeds]
    each = [json.loads(file.read_text(encoding="utf-8"))["results"][0] for file in files]
    name = ranked_by(each)
    return NAMES[name], [figures[name] for figures in each]


def histories(args, seeds):
    """({precision: {column of metrics.csv: array (seeds, logged steps)}}, {precision: last held-out losses, (seeds,)}).

    The first is also written to history.csv. The second is of the averages, and empty where nothing was held out.
    """
    found, rows, held_out = {}, [], {}
    for name in args.precisions:
        runs = []
        for seed in seeds:
            metrics = checkpoint_of(args, name, seed).parents[1] / "metrics.csv"
            with open(metrics, newline="", encoding="utf-8") as file:
                logged = list(csv.DictReader(file))
            runs.append([row for row in logged if row["Train Loss"]])
            rows += [{"precision": name, "seed": seed, **row} for row in runs[-1]]
            held_out.setdefault(name, []).extend(
                [float(r["EMA Val Loss"]) for r in logged if r.get("EMA Val Loss")][-1:]
            )
        columns = [key for key in runs[0][0] if all(row.get(key) for each in runs for row in each)]
        found[name] = {key: np.array([[float(row[key]) for row in each] for each in runs]) for key in columns}
    with open(args.out / "history.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))  # older runs have fewer
        writer.writeheader()
        writer.writerows(rows)
    return found, {name: np.array(losses) for name, losses in held_out.items()}


def psnr(samples, reference):
    """(PSNR in dB of the squared error over all samples, that of the worst sample); inf where nothing differs.

    samples, reference: lists of uint8 (T, H, W, 3).
    """
    pairs = zip(samples, reference, strict=True)
    errors = np.array([((one.astype(float) - other) ** 2).mean() for one, other in pairs])
    return tuple(10 * math.log10(255**2 / error) if error else math.inf for error in (errors.mean(), errors.max()))


def cells(args, seeds):
    """({(trained, sampled): {psnr, worst, scores, figure}}, {trained: PSNR between checkpoints}).

    scores: share of samples that show their class, one per seed; empty for other data than the demo's. figure: as
    `judged` gives it. The second: samples in FP32 of a checkpoint against those of FP32's from the same seed; of FP32
    itself, from the seed before.
    """
    clips, scores = {}, {}
    for trained in args.precisions:
        for sampled in args.precisions:
            each = [score_demo.load_samples(sample_folder(args, trained, sampled, seed)) for seed in seeds]
            clips[trained, sampled] = [samples for samples, _ in each]
            scores[trained, sampled] = [] if args.train else [share_right(*one) for one in each]
    found = {}
    for (trained, sampled), ours in clips.items():
        whole, worst = psnr(sum(ours, []), sum(clips[trained, "fp32"], []))
        figure = judged(args, trained, sampled, seeds)
        found[trained, sampled] = {
            "psnr": whole, "worst": worst, "scores": scores[trained, sampled], "figure": figure,
        }  # fmt: skip
    plain = clips["fp32", "fp32"]
    between = {name: psnr(sum(clips[name, "fp32"], []), sum(plain, []))[0] for name in args.precisions}
    between["fp32"] = psnr(sum(plain, []), sum(plain[-1:] + plain[:-1], []))[0]
    return found, between


def share_right(samples, names):
    """Share of the demo's samples that show the class asked for."""
    return float(np.mean([score_demo.score(clip) == name for clip, name in zip(samples, names, strict=True)]))


def contact_sheet(args, seed):
    """The first samples of a seed: rows of the precision trained in, columns of the precision sampled in."""
    shown, names = [], []
    for i in range(min(SHEET_SAMPLES, args.num_samples)):
        for trained in args.precisions:
            for sampled in args.precisions:
                shown.append(score_demo.load_samples(sample_folder(args, trained, sampled, seed))[0][i])
                names.append(f"{i}: trained {trained}, sampled {sampled}")
    return media.contact_sheet(shown, names, columns=len(args.precisions))


def how_it_ran(args, name, seed):
    """What the log of a run says of its precision."""
    log = checkpoint_of(args, name, seed).parents[1] / "log.txt"
    return log.read_text(encoding="utf-8").split("Precision: ")[1].splitlines()[0]


def report(args, device, seeds, minutes, history, held_out):
    """The whole report, as Markdown."""
    losses, (found, between) = final_losses(history), cells(args, seeds)
    data = shlex.join(args.train) if args.train else "the demo set"
    modes = "".join(f"- {name.upper()}: {how_it_ran(args, name, seeds[0])}\n" for name in args.precisions)
    against = f"; then the figure against {args.reference}" if args.reference else ""
    score = "" if args.train else "; then the share of samples that show their class, with the deviation between seeds"
    command = f"python -m EqM.measure.compare_precisions {shlex.join(sys.argv[1:])}"
    errors = (args.out / "precision_error.md").read_text(encoding="utf-8")
    return f"""# FP32, BF16 and FP16 compared

- Machine: {machine(device)}
- Command: `{command.strip()}`, {datetime.now():%Y-%m-%d}, in {minutes:.1f} minutes
- Data and model: {data}; {args.steps} steps, seeds {seeds[0]} to {seeds[-1]}
{modes}
## Training

Final losses are means over the last {100 * FINAL_PART:g} % of the steps; ± is the standard deviation between seeds.
{yardstick(losses)}
{training_table(history, losses, held_out, between)}
![Loss of the three precisions, and their difference](loss.png)

![Gradient norm, scale and skipped steps](history.png)

## Sampling

Each cell: PSNR to FP32 sampling of the same checkpoints, over {args.num_samples} samples a seed{score}{against}. Clips
are compared as written: GIFs, of 256 colours a frame at most.

{sampling_table(args, found)}
![The same samples in each cell](samples.png)

{errors}"""


def main():
    begun = time.monotonic()
    args = parse_args()
    device = distributed.setup(args.device).device
    open_out(args)
    seeds = range(args.global_seed, args.global_seed + args.seeds)
    threads = torch.get_num_threads()
    jobs = args.jobs or (1 if device.type == "cuda" else min(threads, len(seeds) * len(args.precisions)))
    threads = max(1, threads // jobs)
    logs = args.out / "logs"

    if not args.train:
        encode = ["--data-path", DATASETS / "demo", *DEMO_ENCODING, *common_flags(args), "--out", args.out / "latents"]
        run_all([("EqM.extract_latents", encode, logs / "latents.txt")], 1, threads, "encode")
        if not (args.out / "held-out").exists():
            words = ["--seed", 1, "--clips-per-class", 8, "--out", args.out / "held-out"]
            run_all([("make_demo_set", words, logs / "held-out.txt")], 1, threads, "held-out clips")
    run_all(training_tasks(args, seeds), jobs, threads, "train")
    weights = [checkpoint_of(args, "fp32", seeds[0], steps) for steps in (EARLY_STEPS, args.steps)]
    measured = ["--ckpt", *weights, *sampling_flags(args), "--global-seed", seeds[0]]
    measured += ["--device", device, "--out", args.out / "precision_error.md"]
    run_all(
        [*sampling_tasks(args, seeds), ("EqM.measure.precision_error", measured, logs / "precision_error.txt")],
        jobs, threads, "sample",
    )  # fmt: skip

    run_all(judging_tasks(args, seeds), 1, jobs * threads, "judge")
    history, held_out = histories(args, seeds)
    draw_losses(history).savefig(args.out / "loss.png", dpi=120)
    draw_history(history).savefig(args.out / "history.png", dpi=120)
    contact_sheet(args, seeds[0]).save(args.out / "samples.png")
    text = report(args, device, seeds, (time.monotonic() - begun) / 60, history, held_out)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"Wrote {args.out / 'report.md'}, loss.png, history.png, samples.png and history.csv")


if __name__ == "__main__":
    cli.run(main)
