"""How fast this machine trains, samples and encodes in each precision, as ratios taken in one run.

    python EqM/benchmark.py --model EqM-XL/2 --batch-size 64 --against plain --largest-batch
    python EqM/benchmark.py --model EqM-S/4 --video --clip-len 4 --work encoding cached --against plain

Every round times all contenders in turn, so that a machine whose speed drifts drifts for all of them. Our code and
the usual recipe run in a process each: how ours sets up memory does not reach the other. See contenders.py.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import date
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

import acceleration
import cli
import distributed
from contenders import OURS, PRECISIONS, RECIPES, resolve
from errors import UserError
from models import EqM_models

WARM_UP = 2  # steps before the timed ones


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", nargs="+", choices=OURS, default=["train", "sample"], help="what to time: see README")
    add("--precisions", nargs="+", choices=PRECISIONS, help="left out: all on a GPU, fp32 and bf16 on a CPU")
    add("--against", choices=("none", "plain"), default="none", help="plain: the usual recipe as well")
    add("--model", choices=EqM_models, default="EqM-B/4", metavar="EqM-{T,S,B,L,XL}/{2,4,8}", help="size and patch")
    add("--image-size", type=cli.positive_int, default=256, help="side in pixels")
    add("--video", action=argparse.BooleanOptionalAction, default=False, help="clips")
    add("--clip-len", type=cli.positive_int, default=4, help="frames of a clip")
    add("--batch-size", type=cli.positive_int, default=8, help="images or clips of a step")
    add("--data-path", help="files for the work `encoding`; left out: some are made")
    add("--num-workers", type=cli.count, default=4, help="processes that read files or a cache")
    add("--rounds", type=cli.positive_int, default=5, help="times each contender is timed")
    add("--steps", type=cli.positive_int, default=3, help="steps of one timing")
    add("--largest-batch", action="store_true", help="CUDA: also find the largest batch that fits")
    add("--device", help="cuda, cpu, ...; left out: the GPU where there is one")
    add("--out", type=Path, default=Path("results/benchmark"), help="folder of the table and figures")
    acceleration.add_flags(parser)
    args = parser.parse_args()
    args.vae, args.patch_frames, args.ebm = "ema", None, "none"
    cli.check_geometry(args)
    return args


def timed(run, steps, device):
    """Runs a second, and what the peak of GPU memory was meanwhile in GiB (None on other devices)."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    for _ in range(steps):
        run()
    distributed.fence(device)()
    rate = steps / (time.perf_counter() - start)
    return rate, torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None


def matmul_peak(run_in, size=None):
    """Operations a second of one large square matrix product in this precision."""
    size = size or (8192 if run_in.device.type == "cuda" else 1024)
    a = torch.randn(size, size, device=run_in.device, dtype=run_in.dtype)
    timed(lambda: a @ a, 3, run_in.device)
    return max(timed(lambda: a @ a, 5, run_in.device)[0] for _ in range(3)) * 2 * size**3


def flops(run):
    """Floating-point operations of one run, by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def largest(fits):
    """Largest batch for which fits(batch), to within an eighth: by doubling, then by halving the gap. 0 if none."""
    good, bad = 0, 1
    while fits(bad):
        good, bad = bad, bad * 2
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def largest_batch(make, args, run_in):
    """Largest batch size at which one run of make(args, run_in) fits this GPU."""

    def fits(batch_size):
        try:
            make(argparse.Namespace(**{**vars(args), "batch_size": batch_size}), run_in)()
            torch.cuda.synchronize(run_in.device)
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    return largest(fits)


def device_of(args, recipe):
    """The device, set up as train.py does, but for the plain recipe, which does without."""
    return distributed.setup(args.device).device if recipe == "ours" else torch.device(args.device)


def turn(args, work, recipe, name):
    """(steps a second, peak GiB or None) of a contender that is built anew and then freed."""
    run_in = resolve(name, device_of(args, recipe))
    try:
        run = RECIPES[recipe][work](args, run_in)
        timed(run, WARM_UP, run_in.device)
        return timed(run, args.steps, run_in.device)
    except torch.OutOfMemoryError:
        raise UserError(f"--batch-size {args.batch_size} does not fit ({work}, {recipe}, {name}); give less") from None
    finally:
        run = None
        free(run_in.device)


def free(device):
    """Give a contender's memory back, for the one whose turn is next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def operations(args, work):
    """Operations of one step of a kind of work; what is recomputed does not count."""
    run_in = resolve(args.precisions[0], device_of(args, "ours"))
    total = flops(
        OURS[work](argparse.Namespace(**{**vars(args), "compile": False, "grad_checkpointing": False}), run_in)
    )
    free(run_in.device)
    return total


def peak(args, name):
    """Operations a second of a large matrix product in a precision."""
    return matmul_peak(resolve(name, device_of(args, "ours")))


def room(args, work, recipe, name):
    """Largest batch of a contender that fits."""
    return largest_batch(RECIPES[recipe][work], args, resolve(name, device_of(args, recipe)))


def contest(args, work, processes):
    """One row for each contender of a kind of work: a recipe, which has its process, in a precision."""
    contenders = [(recipe, name) for name in args.precisions for recipe in processes if work in RECIPES[recipe]]
    turns = {contender: [] for contender in contenders}
    for _ in range(args.rounds):
        for recipe, name in contenders:
            turns[recipe, name].append(processes[recipe].submit(turn, args, work, recipe, name).result())
    total = processes["ours"].submit(operations, args, work).result()
    rows = []
    for (recipe, name), found in turns.items():
        rates = [rate for rate, _ in found]
        rate = statistics.median(rates)
        rows.append({
            "work": work, "recipe": recipe, "precision": name, "steps/s": rate, "spread": max(rates) / min(rates) - 1,
            "items/s": rate * args.batch_size, "GiB": found[-1][1], "TFLOP/s": rate * total / 1e12,
        })  # fmt: skip
        if args.largest_batch:
            rows[-1]["largest batch"] = processes[recipe].submit(room, args, work, recipe, name).result()
    return rows


def add_ratios(rows, peaks):
    """Give each row its share of the measured peak of its precision, and its speed over that of others.

    peaks: operations a second by precision. Others: the same recipe in FP32; the plain recipe in the same
    precision, which has no cache and encodes instead; and, for cached latents, the same recipe that encodes.
    """
    rates = {(row["work"], row["recipe"], row["precision"]): row["steps/s"] for row in rows}
    for row in rows:
        work, recipe, name, cached = row["work"], row["recipe"], row["precision"], row["work"] == "cached"
        others = {
            "x fp32": (work, recipe, "fp32"),
            "x plain": ("encoding" if cached else work, "plain", name),
            "x encoding": ("encoding", recipe, name) if cached else None,
        }
        row["of peak"] = 1e12 * row["TFLOP/s"] / peaks[name]
        row |= {title: row["steps/s"] / rates[other] if other in rates else None for title, other in others.items()}


def as_text(title, value):
    if value is None:
        return "-"
    if title in ("spread", "of peak"):
        return f"{100 * value:.0f} %"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(rows):
    """The rows as a Markdown table, without columns that no row has."""
    titles = [title for title in rows[0] if any(row[title] is not None for row in rows)]
    lines = [titles, ["---"] * len(titles), *[[as_text(title, row[title]) for title in titles] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def device_name(device):
    """What the machine calls itself, for the table's caption."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        models = []
    return f"{models[0].split(':')[1].strip() if models else 'CPU'}, {torch.get_num_threads()} thread(s)"


def plot(rows):
    """Bars of steps a second, one panel for each kind of work."""
    kinds = list(dict.fromkeys(row["work"] for row in rows))
    figure = Figure(figsize=(4 * len(kinds), 3.5), layout="constrained")
    for kind, panel in zip(kinds, figure.subplots(1, len(kinds), squeeze=False)[0], strict=True):
        shown = [row for row in rows if row["work"] == kind]
        panel.bar([f"{row['precision']}\n{row['recipe']}" for row in shown], [row["steps/s"] for row in shown])
        panel.set(title=kind, ylabel="steps/s")
    return figure


def main():
    args = parse_args()
    device = distributed.setup(args.device).device
    if args.largest_batch and device.type != "cuda":
        raise UserError(f"--largest-batch measures GPU memory, and this runs on {device.type}; leave it out")
    args.device = str(device)
    args.precisions = args.precisions or (list(PRECISIONS) if device.type == "cuda" else ["fp32", "bf16"])
    recipes = ["ours", "plain"] if args.against == "plain" else ["ours"]
    rows = []
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        processes = {recipe: stack.enter_context(ProcessPoolExecutor(1, spawn)) for recipe in recipes}
        peaks = {name: processes["ours"].submit(peak, args, name).result() for name in args.precisions}
        for work in args.work:
            rows += contest(args, work, processes)
    add_ratios(rows, peaks)
    command = " ".join(["python EqM/benchmark.py", *sys.argv[1:]])
    caption = f"{device_name(device)}, torch {torch.__version__}, {date.today()}: `{command}`"
    text = f"{caption}\n\n{markdown(rows)}\n"
    print(text)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "benchmark.md").write_text(text, encoding="utf-8")
        (args.out / "benchmark.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        plot(rows).savefig(args.out / "benchmark.png", dpi=120)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    cli.run(main)
