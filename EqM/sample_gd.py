"""Sample a trained EqM model by gradient descent on its field.

    torchrun --nproc_per_node=N EqM/sample_gd.py --ckpt results/000-EqM-S-4-Linear-velocity-None/checkpoints/0000100.pt
    python EqM/sample_gd.py --ckpt model.pt --sampler ngd --cfg-scale 1.5 --folder samples

Sample i depends on the seed and i alone, however many ranks and whatever the batch size.
"""

import csv
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import cli
import distributed
import latents
import media
import precision
import samplers
import seeds
from errors import UserError
from transport import Transport

SHEET_SIZE = 64  # samples on the contact sheet


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_model(parser, from_checkpoint=True)
    cli.add_encoding(parser, from_checkpoint=True)
    cli.add_transport(parser, from_checkpoint=True)
    cli.add_sampler(parser)
    precision.add_flags(parser)
    cli.add_runtime(parser)
    group = parser.add_argument_group("samples")
    group.add_argument("--ckpt", required=True, help="checkpoint; its EMA weights are sampled")
    group.add_argument("--folder", default="samples", help="where samples go; images also make <folder>.npz")
    group.add_argument("--num-fid-samples", type=cli.positive_int, default=50_000, help="how many samples")
    group.add_argument(
        "--global-batch-size", type=cli.positive_int, default=256, help="samples at once, over all ranks"
    )
    group.add_argument("--classes", nargs="+", help="class names or numbers, taken in turn; left out: at random")
    group.add_argument("--fps", type=cli.positive_int, default=8, help="frames per second of clips")
    group.add_argument("--clip-format", choices=("gif", "mp4"), default="gif", help="file type of clips")
    return parser.parse_args()


def pick_classes(wanted, class_names):
    """Labels of --classes, given as names or numbers. Raises UserError for one that does not exist."""
    picked = []
    for text in wanted:
        if text in class_names:
            picked.append(class_names.index(text))
        elif text.isdigit() and int(text) < len(class_names):
            picked.append(int(text))
        else:
            shown = ", ".join(class_names[:8]) + (", ..." if len(class_names) > 8 else "")
            raise UserError(f"--classes {text} is no class of this checkpoint, which has {len(class_names)}: {shown}")
    return picked


def draw(seed, index, shape, labels):
    """Noise and label of sample `index`. labels: taken in turn, or a number of classes to draw from."""
    generator = seeds.generator(seed, index)
    noise = torch.randn(shape, generator=generator)
    if isinstance(labels, int):
        return noise, int(torch.randint(labels, (), generator=generator))
    return noise, labels[index % len(labels)]


def main():
    args = parse_args()
    ranks = distributed.setup(args.device)
    run_in = precision.resolve(args, ranks.device)
    saved = checkpoint.load(args.ckpt)
    cli.settle(args, saved["args"])
    class_names = saved.get("class_names") or [str(i) for i in range(args.num_classes)]
    class_names = class_names + [str(i) for i in range(len(class_names), args.num_classes)]
    labels = pick_classes(args.classes, class_names) if args.classes else args.num_classes

    model = cli.build_model(args)
    checkpoint.load_weights(model, saved["ema"], args.ckpt, saved["args"])
    model = run_in.cast_weights(model.to(ranks.device).eval().requires_grad_(False))
    autoencoder = latents.load(args.vae, precision.of_vae(args, run_in))
    transport = Transport(args.path_type, args.prediction, sample_eps=args.sample_eps)
    interval = transport.interval(transport.sample_eps)
    mu = args.mu if args.sampler == "ngd" else 0.0

    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    suffix = args.clip_format if args.video else "png"
    batch_size = max(1, args.global_batch_size // ranks.world_size)
    indices = range(ranks.rank, args.num_fid_samples, ranks.world_size)
    shape = model.input_shape

    def field(x, t, y):
        with run_in.autocast():
            return transport.field(model(x, t, y))

    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        noise, y = zip(*[draw(args.global_seed, i, shape, labels) for i in batch], strict=True)
        x, y = torch.stack(noise).to(ranks.device), torch.tensor(y, device=ranks.device)
        bar = partial(tqdm, desc=f"batch {start // batch_size + 1}", leave=False, disable=not ranks.is_main)
        with torch.no_grad():
            guided = samplers.guided(field, y, args.cfg_scale, args.num_classes, args.cfg_channels)
            x = samplers.descend(guided, x, args.num_sampling_steps, args.stepsize, mu, interval, bar)
            pixels = latents.to_uint8(autoencoder.decode(x)).cpu()
        for i, sample in zip(batch, pixels, strict=True):
            frames = sample if args.video else sample[:, None]  # (3, T, H, W)
            media.save_sample(folder / f"{i:06d}.{suffix}", frames.permute(1, 2, 3, 0).numpy(), args.fps)
    distributed.barrier()

    if ranks.is_main:
        drawn = [draw(args.global_seed, i, (), labels)[1] for i in range(args.num_fid_samples)]
        finish(folder, suffix, drawn, class_names)
    distributed.cleanup()


def finish(folder, suffix, drawn, class_names):
    """Write labels.csv and the contact sheet beside the samples, and for images the npz."""
    files = [folder / f"{i:06d}.{suffix}" for i in range(len(drawn))]
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", "class"])
        rows.writerows([path.name, label, class_names[label]] for path, label in zip(files, drawn, strict=True))
    shown = [media.load_sample(path) for path in files[:SHEET_SIZE]]
    media.contact_sheet(shown, [class_names[label] for label in drawn[:SHEET_SIZE]]).save(folder / "grid.png")
    print(f"Wrote {len(files)} samples, labels.csv and grid.png to {folder}")
    if suffix == "png":
        archive = folder.with_name(folder.name + ".npz")
        media.save_npz(archive, files)
        print(f"Wrote {archive}")


if __name__ == "__main__":
    cli.run(main)
