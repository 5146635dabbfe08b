"""Encode a data set once, so that training needs neither its files nor the autoencoder.

    torchrun --nproc_per_node=N EqM/extract_latents.py --data-path DIR --out latents/imagenet-256 --use-bf16
    python EqM/train.py --latents latents/imagenet-256 --model EqM-XL/2 --use-bf16

Killed, it goes on where it was when run again.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # run by its path: import the package beside this file, whatever else is installed
    sys.path = [str(HERE.parent), *(folder for folder in sys.path if Path(folder).resolve() != HERE)]

import json

import numpy as np
import torch
from tqdm import tqdm

from EqM import cli
from EqM.data import autoencoder as latents
from EqM.data import files as data
from EqM.data import latent_cache, loader
from EqM.engine import precision
from EqM.run import distributed
from EqM.run.errors import UserError


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_encoding(parser)
    cli.add_data(parser, required=True)
    precision.add_flags(parser)
    cli.add_runtime(parser)
    parser.add_argument("--out", required=True, help="folder of the cache")
    parser.add_argument("--batch-size", type=cli.positive_int, default=32, help="images or clips at once, per rank")
    args = parser.parse_args()
    if args.vae == "none":
        parser.error("--vae none has no latents to keep; train from --data-path instead")
    if args.frame_interval:
        parser.error("--frame-interval takes another window each epoch, and a cache would hold only one; leave it out")
    return args


def write(writer, waiting):
    """Write one batch, once it has arrived on the CPU. waiting: None, or (indices, moments, fence)."""
    if waiting is not None:
        indices, moments, arrived = waiting
        arrived()
        writer.write(indices, moments)


def main():
    args = parse_args()
    channels, factor = latents.geometry(args.vae)
    if args.image_size % factor:
        raise UserError(f"--image-size {args.image_size} must be a multiple of {factor}, by which the VAE divides it")
    ranks = distributed.setup(args.device)
    run_in = precision.activate_flags(args, ranks.device)
    dataset = data.open_files(args, flip=False)
    side = args.image_size // factor
    frames = (args.clip_len,) if args.video else ()
    meta = {name: getattr(args, name) for name in latent_cache.KEY}
    meta |= {"files": len(dataset), "class_names": dataset.class_names, "precision": run_in.name}
    shape = (1 + args.flip, 2, channels, *frames, side, side)
    distributed.on_main(ranks, lambda: latent_cache.create(args.out, meta, dataset.labels, shape))

    writer = latent_cache.Writer(Path(args.out))
    left = np.flatnonzero(~writer.done)[ranks.rank :: ranks.world_size]
    keys = [[(0, int(i)) for i in left[n : n + args.batch_size]] for n in range(0, len(left), args.batch_size)]
    autoencoder = latents.load(args.vae, precision.of_vae(args, run_in))
    bad_files = loader.BadFiles(dataset, args.max_bad_fraction, tqdm.write)
    pin = ranks.device.type == "cuda"
    bar = tqdm(total=len(left), desc="encode", unit="clip" if args.video else "image", disable=not ranks.is_main)
    waiting = None  # the batch before this one: its results travel to the CPU while the next is encoded
    for batch, (pixels, _, bad) in zip(keys, loader.read(dataset, keys, args.num_workers, pin), strict=True):
        bad_files.note(bad)
        pixels = latents.to_pixels(pixels.to(ranks.device, non_blocking=True))
        copies = [pixels, pixels.flip(-1)] if args.flip else [pixels]
        moments = torch.stack([autoencoder.posterior(copy) for copy in copies], dim=1).half()
        moments = moments.to("cpu", non_blocking=True)
        arrived = distributed.fence(ranks.device)
        write(writer, waiting)
        waiting = ([index for _, index in batch], moments, arrived)
        bar.update(len(batch))
    write(writer, waiting)
    writer.flush()
    distributed.barrier()
    if ranks.is_main:
        size = sum(path.stat().st_size for path in Path(args.out).iterdir())
        print(json.dumps({"cache": args.out, "items": len(dataset), "bytes_per_item": size // len(dataset)}))
    distributed.cleanup()


if __name__ == "__main__":
    cli.run(main)
