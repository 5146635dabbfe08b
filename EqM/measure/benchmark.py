"""How fast this machine trains, samples and encodes in each precision, as ratios taken in one run.

    python -m EqM.measure.benchmark --model EqM-XL/2 --batch-size 64 --against plain --largest-batch
    python -m EqM.measure.benchmark --model EqM-S/4 --video --clip-len 4 --work encoding cached --against plain
    python -m EqM.measure.benchmark --work loader --batch-size 64

Every round times all contenders in turn, so that a machine whose speed drifts drifts for all of them. Our code and
the usual recipe run in a process each: how ours sets up memory does not reach the other. See contenders.py, and for
the work `loader`, in which there is no step, loaders.py.
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

from EqM import architecture, cli
from EqM.engine import acceleration
from EqM.measure import loaders
from EqM.measure.contenders import OURS, PRECISIONS, RECIPES, resolve
from EqM.measure.report import machine, table
from EqM.models import EqM_models
from EqM.run import distributed
from EqM.run.errors import UserError

WARM_UP = 2  # steps before the timed ones
LOADED = ("encoding", "cached")  # work whose inputs a loader reads ahead


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", nargs="+", choices=(*OURS, "loader"), default=["train", "sample"], help="what to time: see README")
    add("--precisions", nargs="+", choices=PRECISIONS, help="left out: all on a GPU, fp32 and bf16 on a CPU")
    add("--against", choices=("none", "plain"), default="none", help="plain: the usual recipe as well")
    add("--model", choices=EqM_models, default="EqM-B/4", metavar="EqM-{T,S,B,L,XL}/{2,4,8}", help="size and patch")
    add("--image-size", type=cli.positive_int, default=256, help="side in pixels")
    add("--video", action=argparse.BooleanOptionalAction, default=False, help="clips")
    add("--clip-len", type=cli.positive_int, default=4, help="frames of a clip")
    add("--batch-size", type=cli.positive_int, default=8, help="images or clips of a step")
    add("--data-path", help="files for the work `encoding` and `loader`; left out: some are made")
    add("--num-workers", type=cli.count, default=4, help="processes that read files or a cache")
    add("--inception", metavar="FILE", help="weights for the work `features`; left out: torch-fidelity's")
    add("--rounds", type=cli.positive_int, default=5, help="times each contender is timed")
    add("--steps", type=cli.positive_int, help="steps of one timing; left out: 20 on a GPU, else 3")
    add("--largest-batch", action="store_true", help="CUDA: also find the largest batch to train or sample")
    add(
        "--profile", action="store_true", help="also write which operations a step of each contender spends its time in"
    )
    add("--device", help="cuda, cpu, ...; left out: the GPU where there is one")
    add("--out", type=Path, default=Path("results/benchmark"), help="folder of the table and figures")
    acceleration.add_flags(parser)
    args = parser.parse_args()
    args.vae, args.patch_frames, args.ebm = "ema", None, "none"
    architecture.check_geometry(args)
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


def matmul_peak(args, name, size=None):
    """Operations a second of a large square matrix product in a precision."""
    run_in = resolve(name, device_of(args, "ours"))
    size = size or (8192 if run_in.device.type == "cuda" else 1024)
    a = torch.randn(size, size, device=run_in.device, dtype=run_in.dtype)
    timed(lambda: a @ a, 3, run_in.device)
    return max(timed(lambda: a @ a, 5, run_in.device)[0] for _ in range(3)) * 2 * size**3


def operations(args, work):
    """Floating-point operations of one step of a kind of work, by PyTorch's counter, without what is recomputed."""
    one = {**vars(args), "batch_size": 1, "compile": False, "grad_checkpointing": False}
    run_in = resolve(args.precisions[0], device_of(args, "ours"))
    run = OURS[work](argparse.Namespace(**one), run_in)
    with FlopCounterMode(display=False) as counter:
        run()
    run = None
    free(run_in.device)
    return counter.get_total_flops() * args.batch_size


def largest(fits):
    """Largest batch for which fits(batch), to within an eighth: by doubling, then by halving the gap. 0 if none."""
    good, bad = 0, 1
    while fits(bad):
        good, bad = bad, bad * 2
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def device_of(args, recipe):
    """The device, set up as train.py does, but for the plain recipe, which does without."""
    if recipe == "ours":
        return distributed.setup(args.device).device
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def turn(args, work, recipe, name):
    """(steps a second, peak GiB or None) of a contender that is built anew and then freed. None if it does not fit."""
    run_in = resolve(name, device_of(args, recipe))
    prefetched = 2 * args.num_workers if work in LOADED else 0  # batches that wait, read while nothing was timed
    try:
        run = RECIPES[recipe][work](args, run_in)
        timed(run, WARM_UP + prefetched, run_in.device)
        return timed(run, args.steps, run_in.device)
    except torch.OutOfMemoryError:
        return None
    finally:
        run = None
        free(run_in.device)


def free(device):
    """Give a contender's memory and compiled code back, for the one whose turn is next."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def largest_batch(args, work, recipe, name):
    """Largest batch of a contender that fits this GPU."""

    def fits(batch_size):
        alone = argparse.Namespace(**{**vars(args), "batch_size": batch_size, "steps": 1, "num_workers": 0})
        return turn(alone, work, recipe, name) is not None

    return largest(fits)


def profile(args, work, recipe, name):
    """A table of the operations that one step of a contender spends most time in, as text."""
    run_in = resolve(name, device_of(args, recipe))
    run = RECIPES[recipe][work](args, run_in)
    # Warmed up under the profiler: the memory that it takes at first would make the step's own a page fault each.
    schedule = torch.profiler.schedule(wait=0, warmup=WARM_UP, active=1, repeat=1)
    with torch.profiler.profile(schedule=schedule) as profiler:
        for _ in range(WARM_UP + 1):
            timed(run, 1, run_in.device)
            profiler.step()
    run = None
    free(run_in.device)
    order = "self_cuda_time_total" if run_in.device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)


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
        row = {"work": work, "recipe": recipe, "precision": name}
        if None in found:
            row |= dict.fromkeys(("steps/s", "spread", "items/s", "GiB", "TFLOP/s"))
        else:
            rates = [rate for rate, _ in found]
            rate = statistics.median(rates)
            row |= {
                "steps/s": rate, "spread": max(rates) / min(rates) - 1, "items/s": rate * args.batch_size,
                "GiB": found[-1][1], "TFLOP/s": rate * total / 1e12,
            }  # fmt: skip
        if args.largest_batch:
            room = work in ("train", "sample")
            arguments = (largest_batch, args, work, recipe, name)
            row["largest batch"] = processes[recipe].submit(*arguments).result() if room else None
        if args.profile:
            text = processes[recipe].submit(profile, args, work, recipe, name).result()
            (args.out / f"profile-{work}-{recipe}-{name}.txt").write_text(text, encoding="utf-8")
        rows.append(row)
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
        row["of peak"] = row["TFLOP/s"] and 1e12 * row["TFLOP/s"] / peaks[name]
        for title, other in others.items():
            row[title] = row["steps/s"] / rates[other] if row["steps/s"] and rates.get(other) else None


def as_text(title, value):
    if value is None:
        return "-"
    if title in ("spread", "of peak"):
        return f"{100 * value:.0f} %"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


def markdown(rows):
    """The rows as a Markdown table, without columns that no row has."""
    titles = [title for title in rows[0] if any(row[title] is not None for row in rows)]
    return table(titles, [[as_text(title, row[title]) for title in titles] for row in rows])


def plot(rows):
    """Bars of steps a second, one panel for each kind of work."""
    kinds = list(dict.fromkeys(row["work"] for row in rows))
    figure = Figure(figsize=(4 * len(kinds), 3.5), layout="constrained")
    for kind, panel in zip(kinds, figure.subplots(1, len(kinds), squeeze=False)[0], strict=True):
        shown = [row for row in rows if row["work"] == kind]
        panel.bar([f"{row['precision']}\n{row['recipe']}" for row in shown], [row["steps/s"] or 0 for row in shown])
        panel.set(title=kind, ylabel="steps/s")
    return figure


def main():
    args = parse_args()
    device = distributed.setup(args.device).device
    if args.largest_batch and device.type != "cuda":
        raise UserError(f"--largest-batch measures GPU memory, and this runs on {device.type}; leave it out")
    args.device = str(device)
    args.precisions = args.precisions or (list(PRECISIONS) if device.type == "cuda" else ["fp32", "bf16"])
    args.steps = args.steps or (20 if device.type == "cuda" else 3)
    recipes = ["ours", "plain"] if args.against == "plain" else ["ours"]
    rows, loaded, works = [], [], [work for work in args.work if work != "loader"]
    args.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        processes = {recipe: stack.enter_context(ProcessPoolExecutor(1, spawn)) for recipe in recipes}
        if "loader" in args.work:
            loaded = stack.enter_context(ProcessPoolExecutor(1, spawn)).submit(loaders.contest, args).result()
        if works:
            peaks = {name: processes["ours"].submit(matmul_peak, args, name).result() for name in args.precisions}
        for work in works:
            rows += contest(args, work, processes)
    if works:
        add_ratios(rows, peaks)
        plot(rows).savefig(args.out / "benchmark.png", dpi=120)
    command = " ".join(["python -m EqM.measure.benchmark", *sys.argv[1:]])
    told = (
        "Medians over rounds; spread: fastest over slowest; a dash: does not fit in memory, or nothing to compare with."
    )
    tables = "\n".join(markdown(each) for each in (rows, loaded) if each)
    text = f"{machine(device)}, {date.today()}: `{command}`\n\n{tables}\n{told}\n"
    print(text)
    (args.out / "benchmark.md").write_text(text, encoding="utf-8")
    (args.out / "benchmark.json").write_text(json.dumps(rows + loaded, indent=1), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
