"""How fast this machine trains, samples and encodes in each precision, as ratios taken in one run.

    python EqM/benchmark.py --model EqM-XL/2 --batch-size 64 --against plain --largest-batch
    python EqM/benchmark.py --model EqM-S/4 --video --clip-len 4 --work train cached encoding

Every round times all contenders in turn, so that a machine whose speed drifts drifts for all of them. Inputs are
random and the autoencoder is Stable Diffusion's in shape, with random weights: nothing is downloaded.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import acceleration
import cli
import distributed
import latents
import optimizer as optim
import precision
import samplers
from ema import EMA
from errors import UserError
from models import EqM_models
from transport import Transport

WORK = ("train", "sample", "encode", "cached", "encoding")
PRECISIONS = {  # name: flags of train.py
    "fp32": [],
    "fp32-ieee": ["--no-tf32"],
    "bf16": ["--use-bf16"],
    "fp16": ["--use-amp"],
}
CHANNELS, FACTOR, CLASSES = 4, 8, 1000  # of Stable Diffusion's latents; of ImageNet
SAMPLING_POINTS = 6
WARM_UP = 2  # steps before the timed ones


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", nargs="+", choices=WORK, default=["train", "sample"], help="what to time: see README")
    add("--precisions", nargs="+", choices=PRECISIONS, help="left out: all on a GPU, fp32 and bf16 on a CPU")
    add("--against", choices=("none", "plain"), default="none", help="plain: the usual recipe as well")
    add("--model", choices=EqM_models, default="EqM-B/4", metavar="EqM-{T,S,B,L,XL}/{2,4,8}", help="size and patch")
    add("--image-size", type=cli.positive_int, default=256, help="side in pixels")
    add("--video", action=argparse.BooleanOptionalAction, default=False, help="clips")
    add("--clip-len", type=cli.positive_int, default=4, help="frames of a clip")
    add("--batch-size", type=cli.positive_int, default=8, help="images or clips of a step")
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


def resolve(name, device):
    """The Precision of a contender; sets TF32 as it wants it."""
    parser = argparse.ArgumentParser()
    precision.add_flags(parser)
    return precision.resolve(parser.parse_args(PRECISIONS[name]), device)


def random_batch(args, device):
    """Latents (N, C, [T,] h, w) and labels (N,)."""
    frames = (args.clip_len,) if args.video else ()
    side = args.image_size // FACTOR
    x = torch.randn(args.batch_size, CHANNELS, *frames, side, side, device=device)
    return x, torch.randint(CLASSES, (args.batch_size,), device=device)


def random_pixels(args, device):
    """Images or clips (N, 3, [T,] H, W)."""
    frames = (args.clip_len,) if args.video else ()
    return torch.rand(args.batch_size, 3, *frames, args.image_size, args.image_size, device=device) * 2 - 1


def build(args, run_in):
    """The network of a benchmark, made on its device: there that takes no time worth waiting for."""
    side = args.image_size // FACTOR
    size = (args.clip_len, side, side) if args.video else side
    with run_in.device:
        return EqM_models[args.model](input_size=size, num_classes=CLASSES)


def stable_diffusion_vae(run_in):
    """An autoencoder of Stable Diffusion's shape (83.7 M parameters) with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    widths = (128, 256, 512, 512)
    network = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        layers_per_block=2,
        latent_channels=CHANNELS,
        norm_num_groups=32,
    )
    return latents.VAE(network.to(run_in.device), run_in, latents.SD_SCALE)


class Training:
    """A training step as train.py makes it. draw: what gives latents (N, C, [T,] h, w)."""

    def __init__(self, args, run_in, draw=None):
        self.run_in = run_in
        self.model = build(args, run_in).train()
        self.ema = EMA(self.model)
        acceleration.apply(self.model, args, run_in, print)
        self.optimizer = optim.adamw(self.model, 1e-4)
        self.schedule = optim.Schedule(self.optimizer, "constant", 0, 1, run_in.device)
        self.scaler = run_in.grad_scaler()
        self.guard = precision.StepGuard(run_in)
        self.transport = Transport()
        self.x, self.y = random_batch(args, run_in.device)
        self.draw = draw or (lambda: self.x)

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        point = self.transport.sample(self.draw())
        with self.run_in.autocast():
            output = self.model(point.xt, point.t, self.y)
        loss = self.transport.loss(output, point).mean()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        applied = self.guard.judge(optim.clip_gradients(self.model))
        self.optimizer.found_inf = 1 - applied
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.advance(applied)
        self.ema.update(applied)
        return loss.detach()


class PlainTraining:
    """The usual recipe: autocast round model and loss, default AdamW, an EMA by parameter, the loss read each step."""

    def __init__(self, args, run_in, draw=None):
        self.run_in = run_in
        self.model = build(args, run_in).train()
        self.ema = EMA(self.model).model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0)
        self.scaler = run_in.grad_scaler()
        self.transport = Transport()
        self.x, self.y = random_batch(args, run_in.device)
        self.draw = draw or (lambda: self.x)

    def __call__(self):
        point = self.transport.sample(self.draw())
        with torch.autocast(self.run_in.device.type, self.run_in.dtype, enabled=self.run_in.name != "fp32"):
            output = self.model(point.xt, point.t, self.y)
            loss = self.transport.loss(output, point).mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for ours, theirs in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                ours.mul_(0.9999).add_(theirs, alpha=1 - 0.9999)
        return loss.item()


class Sampling:
    """Guided gradient descent, SAMPLING_POINTS - 1 updates. cast: weights cast once, as sample_gd.py does."""

    def __init__(self, args, run_in, cast=True):
        self.run_in = run_in
        self.model = build(args, run_in).eval().requires_grad_(False)
        if cast:
            run_in.cast_weights(self.model)
            acceleration.apply(self.model, argparse.Namespace(compile=args.compile), run_in, print)
        self.x, self.y = random_batch(args, run_in.device)

    def field(self, x, t, y):
        with self.run_in.autocast():
            return self.model(x, t, y)

    @torch.no_grad()
    def __call__(self):
        guided = samplers.guided(self.field, self.y, 1.5, CLASSES)
        return samplers.descend(guided, self.x, SAMPLING_POINTS, 0.0017)


class Encoding:
    """Posterior moments of a batch of pixels."""

    def __init__(self, args, run_in):
        self.vae = stable_diffusion_vae(run_in)
        self.pixels = random_pixels(args, run_in.device)

    def __call__(self):
        return self.vae.posterior(self.pixels)


def from_cache(args, run_in, training=Training):
    x, _ = random_batch(args, run_in.device)
    moments = torch.stack([x, 0.1 * x.abs()], dim=1).half()
    return training(args, run_in, lambda: latents.draw(moments))


def through_vae(args, run_in, training=Training):
    vae_in = run_in if training is Training else precision.fp32(run_in.device)
    encoding = Encoding(args, vae_in)
    return training(args, run_in, lambda: encoding.vae.encode(encoding.pixels))


OURS = {"train": Training, "sample": Sampling, "encode": Encoding, "cached": from_cache, "encoding": through_vae}
PLAIN = {
    "train": PlainTraining,
    "sample": lambda args, run_in: Sampling(args, run_in, cast=False),
    "encode": lambda args, run_in: Encoding(args, precision.fp32(run_in.device)),
    "cached": lambda args, run_in: from_cache(args, run_in, PlainTraining),
    "encoding": lambda args, run_in: through_vae(args, run_in, PlainTraining),
}


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
    """Products a second of one large square matrix product in this precision, in TFLOP/s."""
    size = size or (8192 if run_in.device.type == "cuda" else 1024)
    a = torch.randn(size, size, device=run_in.device, dtype=run_in.dtype)
    timed(lambda: a @ a, 3, run_in.device)
    return max(timed(lambda: a @ a, 5, run_in.device)[0] for _ in range(3)) * 2 * size**3 / 1e12


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


def contest(args, work, device):
    """One row for each contender of a kind of work. A contender is (recipe, precision name).

    Each is built anew for each of its turns: so none sits in another's memory.
    """
    recipes = {"ours": OURS[work], **({"plain": PLAIN[work]} if args.against == "plain" else {})}
    rates = {(recipe, name): [] for name in args.precisions for recipe in recipes}
    memory = {}
    for _ in range(args.rounds):
        for recipe, name in rates:
            run = recipes[recipe](args, resolve(name, device))
            timed(run, WARM_UP, device)
            rate, memory[recipe, name] = timed(run, args.steps, device)
            rates[recipe, name].append(rate)
            del run
            gc.collect()  # a contender refers to itself
    counted = flops(OURS[work](args, resolve(args.precisions[0], device)))
    rows = []
    for (recipe, name), found in rates.items():
        peak = matmul_peak(resolve(name, device))
        rate = statistics.median(found)
        rows.append({
            "work": work, "recipe": recipe, "precision": name, "steps/s": rate, "spread": max(found) / min(found) - 1,
            "items/s": rate * args.batch_size, "GiB": memory[recipe, name], "TFLOP/s": rate * counted / 1e12,
            "of peak": rate * counted / 1e12 / peak,
        })  # fmt: skip
    if args.largest_batch:
        for row in rows:
            row["largest batch"] = largest_batch(recipes[row["recipe"]], args, resolve(row["precision"], device))
    return rows


def add_ratios(rows):
    """Give each row its speed over FP32's by the same recipe and over the plain recipe's in the same precision."""
    rates = {(row["work"], row["recipe"], row["precision"]): row["steps/s"] for row in rows}
    for row in rows:
        for title, recipe, name in [("x fp32", row["recipe"], "fp32"), ("x plain", "plain", row["precision"])]:
            other = rates.get((row["work"], recipe, name))
            row[title] = row["steps/s"] / other if other else None


def as_text(title, value):
    if value is None:
        return "-"
    if title in ("spread", "of peak"):
        return f"{100 * value:.0f} %"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(rows):
    """The rows as a Markdown table."""
    titles = list(rows[0])
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


def plot(rows, path):
    """Bars of steps a second, one panel for each kind of work. Needs matplotlib, and says so where it is missing."""
    try:
        import matplotlib
    except ImportError:
        print("No plot: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row["work"] for row in rows))
    figure, panels = pyplot.subplots(1, len(kinds), squeeze=False, figsize=(4 * len(kinds), 3.5), layout="constrained")
    for kind, panel in zip(kinds, panels[0], strict=True):
        shown = [row for row in rows if row["work"] == kind]
        panel.bar([f"{row['precision']}\n{row['recipe']}" for row in shown], [row["steps/s"] for row in shown])
        panel.set(title=kind, ylabel="steps/s")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main():
    args = parse_args()
    device = distributed.setup(args.device).device
    if args.largest_batch and device.type != "cuda":
        raise UserError(f"--largest-batch measures GPU memory, and this runs on {device.type}; leave it out")
    args.precisions = args.precisions or (list(PRECISIONS) if device.type == "cuda" else ["fp32", "bf16"])
    rows = []
    for work in args.work:
        rows += contest(args, work, device)
    add_ratios(rows)
    command = " ".join(["python EqM/benchmark.py", *sys.argv[1:]])
    caption = f"{device_name(device)}, torch {torch.__version__}, {date.today()}: `{command}`"
    text = f"{caption}\n\n{markdown(rows)}\n"
    print(text)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "benchmark.md").write_text(text, encoding="utf-8")
        (args.out / "benchmark.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        plot(rows, args.out / "benchmark.png")
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    cli.run(main)
