"""What a training run takes on a card that one need not have: memory by part, largest batch, least time of a step.

    python -m EqM.measure.estimate --model EqM-XL/2 --global-batch-size 64 --card h100
    python -m EqM.measure.estimate --model EqM-S/4 --video --clip-len 4 --memory 12 --json estimate.json

Takes train.py's flags, and needs neither data nor GPU nor network. The step of train.py runs on tensors without values,
and what it holds, starts and moves is counted (see rehearsal.py); with --device cpu, as it runs on a CPU.
"""

import json
import math
import os
import sys
from argparse import Namespace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from EqM import architecture, cli, train
from EqM.data import loader
from EqM.engine import parallel, precision
from EqM.measure.cards import CARDS
from EqM.measure.rehearsal import PARTS, rehearsal
from EqM.measure.report import table
from EqM.run.distributed import Ranks

GIB = 2**30
CONTEXT, SPARE = 1.0, 0.04  # allowances: GiB for CUDA's context and libraries, share that is lost between tensors
TABLE_MODELS = {
    **{f"EqM-{size}/2, 256 x 256": ["--model", f"EqM-{size}/2"] for size in ("S", "B", "L", "XL")},
    **{f"EqM-{size}/4, clips": ["--model", f"EqM-{size}/4", "--video", "--clip-len", "4"] for size in ("S", "B")},
}
TABLE_MEMORY = (8, 12, 16, 24, 48, 80)  # GB
RECOMPUTING = {"recompute": "--recompute elementwise", "grad_checkpointing": "--grad-checkpointing"}
SECONDS = ("product_seconds", "memory_seconds")
NO_PLACE = "no cache"  # stands for a folder of latents where none was named
AMPERE = (8, 0)  # what a card of which only the memory is known is taken for


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, Namespace]:
    """(own flags, train.py's), of which none has to say where data is."""
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.usage = "python -m EqM.measure.estimate [--card CARD | --memory GB] [--ranks N] [flags of train.py]"
    parser.epilog = "What the step is, flags of train.py say: see `python EqM/train.py --help`. None has to name data."
    add = parser.add_argument
    add("--card", choices=CARDS, help="whose memory and speed count; h100, unless --memory is given alone")
    add("--memory", type=cli.positive, help="GB, as cards are labelled; left out: the card's")
    add("--ranks", type=cli.positive_int, default=1, help="cards that share --global-batch-size")
    add("--json", type=Path, help="file to write the figures to")
    add("--table", action="store_true", help="instead: README's table of largest batches, which takes minutes")
    given, rest = parser.parse_known_args(argv)
    if not any(word.split("=")[0] in ("--data-path", "--latents") for word in rest):
        rest = [*rest, "--latents", NO_PLACE]
    args = train.parse_args(rest)
    args.num_classes = args.num_classes or architecture.MODEL_DEFAULTS["num_classes"]
    if args.device not in (None, "cuda", "cpu"):
        parser.error(f"--device {args.device}: steps are counted for cuda, the default, or cpu")
    if given.json and not given.json.absolute().parent.is_dir():
        parser.error(f"--json {given.json}: there is no folder {given.json.absolute().parent}")
    on_cpu = args.device == "cpu"
    given.card = None if on_cpu or (given.memory and not given.card) else CARDS[given.card or "h100"]
    given.memory = given.memory or (_memory_here() if on_cpu else given.card.memory)
    given.context = 0.0 if on_cpu else CONTEXT
    if room(given.memory, given.context) <= 0:
        parser.error(f"--memory {given.memory:g}: CUDA's context and libraries alone take {CONTEXT:g} GiB; give more")
    parallel.check_flags(args, Ranks(0, given.ranks, None), print)
    return given, args


def _memory_here():
    """GB of this machine; where it does not say, 16."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (AttributeError, ValueError):
        return 16


def room(memory: float, context: float = CONTEXT) -> int:
    """Bytes for tensors on a card of so many GB. context: GiB for CUDA's context, which a CPU has not."""
    return int(GIB * (memory * (1 - SPARE) - context))


class Search:
    """Largest batches of a Run, each counted or held from both sides. Its peak is taken to be convex in the batch.

    (What rules a large batch grows evenly with it; what rules a small one, the optimizer's step say, does not grow.)
    """

    def __init__(self, run, passes=1):
        self.run = run
        self.passes = passes
        self.steps = {}  # batch: Step

    def step(self, batch):
        if batch not in self.steps:
            self.steps[batch] = self.run(batch, self.passes)
        return self.steps[batch]

    def largest(self, most):
        """Largest batch with a peak of at most so many bytes; 0 if there is none. Two must have been counted."""
        while True:
            fit, over = self._sides(most)
            if not fit and (over[0].batch == 1 or over[1].peak <= over[0].peak):
                return 0  # what is too large does not grow with the batch
            if not fit:  # a line through two that are too large does not fall below the largest
                self.step(max(1, min(over[0].batch - 1, _reach(over[1], over[0], most))))
                continue
            last = fit[-1].batch
            top = over[0].batch - 1 if over else math.inf
            if len(fit) > 1 and fit[-1].peak > fit[-2].peak:  # nor does one through two that fit rise too fast
                top = min(top, _reach(fit[-2], fit[-1], most))
            if top == last:
                return last
            if over:
                least = _reach(fit[-1], over[0], most)  # a line between the two is above all peaks there
                if least == top:
                    return top
                guess = max(last + 1, least)
            else:
                guess = max(2 * last, _reach(fit[-2], fit[-1], most)) if len(fit) > 1 else 2 * last
            self.step(min(top, guess))

    def _sides(self, most):
        """Steps that fit, and those that do not, by batch."""
        ordered = [self.steps[batch] for batch in sorted(self.steps)]
        return [step for step in ordered if step.peak <= most], [step for step in ordered if step.peak > most]


def _reach(one, other, most):
    """The batch at which the line through two steps' peaks reaches so many bytes.

    Where peaks do not rise yet, activations say how far it may be.
    """
    slope = (other.peak - one.peak) / (other.batch - one.batch)
    if slope <= 0:
        slope = (other.parts["activations"] - one.parts["activations"]) / (other.batch - one.batch)
    return one.batch + math.floor((most - one.peak) / slope)


def figures(args: Namespace, name: str, given: Namespace) -> tuple[dict[str, Any], int] | None:
    """(what --json holds of a precision, the largest batch where passes are added up, if one pass does not fit).

    None if the card has no units for the precision.
    """
    card, passes = given.card, args.grad_accum_steps
    if card and name != "fp32" and getattr(card, name) is None:
        return None
    batch = loader.micro_batch_size(args, Ranks(0, given.ranks, None))
    shards = (args.shard_size or given.ranks) if args.shard else 1
    with rehearsal(args, name, card.capability if card else AMPERE, shards) as run:
        search = Search(run, min(passes, 2))
        step, other = search.step(batch), search.step(batch // 2 or 2)
        most = room(given.memory, given.context)
        largest = search.largest(most)
        first = run(batch) if passes > 2 else step
        beside = largest  # with gradients of the passes before
        if passes == 1 and step.peak > most:
            beside = search.largest(most - step.parts["gradients"])
        tokens, channels = run.model.pos_embed.shape[1:]
        depth = len(run.model.blocks)
    kept = step.block - other.block
    if args.ebm != "none":  # an energy's inner gradient keeps more than the forward pass through a block did
        kept = (step.parts["activations"] - other.parts["activations"]) / depth
    more = max(0, passes - 2)  # passes that were not counted, each like the second
    operations = {key: value + more * (value - first.products[key]) for key, value in step.products.items()}
    moved = step.moved + more * (step.moved - first.moved)
    rate = _rates(card, name, not args.no_tf32)
    return {
        **step.parts,
        "peak": step.peak,
        "bytes_per_token_channel": round(kept / (step.batch - other.batch) / (tokens * channels), 2),
        "largest_batch": largest,
        "product_seconds": card and sum(value / rate(*key) for key, value in operations.items()) / 1e12,
        "memory_seconds": card and moved / card.bandwidth / 1e9,
        "kernels": step.kernels + more * (step.kernels - first.kernels),
    }, beside


def _rates(card, name, tf32):
    """rate(kind, dtype) in TFLOP/s. As precision.activate has it, FP32 convolutions are TF32, and in FP32 runs all."""

    def rate(kind, dtype):
        if dtype != torch.float32:
            return card.bf16 if dtype == torch.bfloat16 else card.fp16
        return (tf32 and (name == "fp32" or kind == "convolution") and card.tf32) or card.fp32

    return rate


def ways(args: Namespace, given: Namespace, asked: str, known: dict[str, Any]) -> list[str]:
    """Flags with which a step fits that does not as asked, the least costly first. known: figures by precision."""
    total = args.global_batch_size // given.ranks
    half = "bf16" if known["bf16"] else "fp16"
    tried = [(asked, {}), (half, {})]
    if args.ebm == "none" and not args.grad_checkpointing:  # the others cannot be recomputed, or are
        tried[1:1] = [(asked, {"recompute": "elementwise"})] if asked == "fp32" and not args.recompute else []
        tried += [(half, {"grad_checkpointing": True})]
    found = {}
    for name, more in tried:
        settled = Namespace(**{**vars(args), **more})
        taken, beside = figures(settled, name, given) if more else known[name]
        if taken["peak"] <= room(given.memory, given.context):
            passes = args.grad_accum_steps
        else:
            fitting = (k for k in range(args.grad_accum_steps + 1, total + 1) if not total % k and total // k <= beside)
            passes = next(fitting, None)
        if passes:
            words = [*precision.FLAGS[name], *(RECOMPUTING[flag] for flag in more)]
            words += ["--grad-accum-steps", str(passes)] if passes > 1 else []
            found[" ".join(words)] = None
    return list(found)


def as_text(known: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    titles = ["GiB", *PARTS, "peak", "largest batch", "bytes a token and channel", "products", "memory", "kernels"]
    rows = []
    for name, each in known.items():
        taken = each and each[0]
        if not taken:
            rows.append([name, *["-"] * (len(titles) - 1)])
            continue
        times = ("-" if taken[key] is None else f"{1e3 * taken[key]:.3g} ms" for key in SECONDS)
        sizes = (f"{taken[part] / GIB:.2f}" for part in (*PARTS, "peak"))
        kept = f"{taken['bytes_per_token_channel']:.1f}"
        rows.append([name, *sizes, taken["largest_batch"], kept, *times, taken["kernels"]])
    return table(titles, rows)


def verdict(args: Namespace, given: Namespace, known: dict[str, Any]) -> str:
    """Whether the step fits as it was asked for, and if not, what would make it."""
    asked = precision.name_of(args)
    if not known[asked]:
        return f"{given.card.name} has no units for {asked}; train.py refuses it there."
    peak, most = known[asked][0]["peak"], room(given.memory, given.context)
    of = f"{peak / GIB:.1f} of {most / GIB:.1f} GiB in {asked}"
    if peak <= most:
        return f"It fits: {of}."
    found = ways(args, given, asked, known)
    if found:
        return f"It does not fit: {of}. What fits: {'; '.join(found)}."
    lasting = sum(known[asked][0][part] for part in ("weights", "gradients", "moments", "ema"))
    lasting_of = f"weights, gradients, moments and averages alone are {lasting / GIB:.1f} GiB"
    return f"It does not fit: {of}, and neither does less of it: {lasting_of}."


def notes(args, given):
    """What the figures are of, and what is not in them."""
    card = given.card
    context = f"{given.context:g} GiB for CUDA's context and libraries, " if given.context else ""
    lines = [
        f"Each part's own most; peak is the most of all at one moment. Left free of {given.memory:g} GB: {context}"
        f"{SPARE:.0%} for gaps between tensors; allowances, not counted."
    ]
    if card:
        lines.append(
            f"Times are least ones, on {card.name} ({card.source}). Products: at its full dense rate. Memory: bytes of "
            f"all else, each operand once, at {card.bandwidth:g} GB/s. Without --compile a step takes at least both."
        )
    else:
        lines.append("No times: --card says whose.")
    if not torch.backends.cuda.is_built() and args.device != "cpu":
        lines.append("This PyTorch has no CUDA: a card's kernels are counted on CPU tensors; encoding is approximate.")
    if args.compile:
        lines.append("--compile is not counted: it fuses what is not a product, so that kernels and bytes are fewer.")
    if args.shard:
        lines.append("Shares of --shard are by arithmetic, with two blocks whole at a time; sending is not counted.")
    if args.latents == NO_PLACE:
        lines.append("Latents come from a cache; with --data-path DIR, which need not exist, encoding is counted.")
    return lines


def largest_batches(tell):
    """README's table: largest batch of a forward pass, without and with --grad-checkpointing."""
    rows = []
    for model, words in TABLE_MODELS.items():
        for name in ("fp32", "bf16"):
            found = []
            for checkpointing in ([], ["--grad-checkpointing"]):
                _, args = parse_args([*words, *checkpointing])
                with rehearsal(args, name) as run:
                    search = Search(run)
                    search.step(8), search.step(16)  # to begin with
                    largest = {memory: search.largest(room(memory)) for memory in reversed(TABLE_MEMORY)}
                    found.append([largest[memory] for memory in TABLE_MEMORY])
            rows.append([model, name.upper(), *(f"{plain} / {other}" for plain, other in zip(*found, strict=True))])
            tell(" ".join(map(str, rows[-1])))
    return table(["model", "", *(f"{memory} GB" for memory in TABLE_MEMORY)], rows)


def main():
    given, args = parse_args()
    command = " ".join(["python -m EqM.measure.estimate", *sys.argv[1:]])
    print(f"Counted, not measured; PyTorch {torch.__version__}, {date.today()}: `{command}`\n")
    if given.table:
        print(largest_batches(lambda line: print(line, file=sys.stderr)))
        return
    known = {name: figures(args, name, given) for name in precision.FLAGS}
    batch = loader.micro_batch_size(args, Ranks(0, given.ranks, None))
    print(f"{args.model}; on each of {given.ranks} card(s) {batch} a pass, {args.grad_accum_steps} pass(es) a step")
    print(f"\n{as_text(known)}\n{verdict(args, given, known)}\n")
    print("\n".join(notes(args, given)))
    if given.json:
        given.json.write_text(json.dumps({name: each and each[0] for name, each in known.items()}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
