"""Encode a data set once, so that training needs neither its files nor the autoencoder.

    torchrun --nproc_per_node=N EqM/extract_latents.py --data-path DIR --out latents/imagenet-256 --use-bf16
    python EqM/train.py --latents latents/imagenet-256 --model EqM-XL/2 --use-bf16

Stopped or killed, it goes on where it was when run again; a file that has changed since is encoded again.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # run by its path: import the package beside this file, whatever else is installed
    sys.path = [str(HERE.parent), *(folder for folder in sys.path if Path(folder).resolve() != HERE)]
if __name__ == "__main__":
    from EqM.run import stops

    stops.end_at_once()  # until main handles them: what follows takes seconds to import

import json

import torch
from tqdm import tqdm

from EqM import cli
from EqM.data import autoencoder as autoencoders
from EqM.data import latent_cache, loader
from EqM.data.geometry import geometry
from EqM.data.tables import open_data
from EqM.engine import precision
from EqM.run import distributed, resume
from EqM.run.log import progress


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


def main():
    args = parse_args()
    latent = geometry(args.vae).shape(args)
    ranks = distributed.setup(args.device)
    run_in = precision.activate_flags(args, ranks.device)
    dataset = open_data(args, flip=False)
    meta = {name: getattr(args, name) for name in (*latent_cache.KEY, "flip")}
    meta = resume.absolute(meta) | {
        "class_names": dataset.class_names,
        "precision": precision.of_vae(args, run_in).name,
    }
    shape = (1 + args.flip, 2, *latent)
    layout, left, changed = distributed.on_main(
        ranks, lambda: latent_cache.create(args.out, meta, latent_cache.files_of(dataset, args.data_path), shape)
    )
    for note in dataset.notes:
        cli.complain(note, every_rank=False)
    if changed:
        line = f"{changed} of {len(dataset)} files have changed since they were encoded: these are encoded again"
        cli.complain(line, every_rank=False)

    mine = [int(index) for shard in left[ranks.rank :: ranks.world_size] for index in shard]
    keys = [[(0, index) for index in mine[n : n + args.batch_size]] for n in range(0, len(mine), args.batch_size)]
    autoencoder = autoencoders.load(args.vae, precision.of_vae(args, run_in))
    bad_files = loader.BadFiles(dataset, args.max_bad_fraction, lambda line: tqdm.write(line, file=sys.stderr))
    pin = ranks.device.type == "cuda"
    bar = progress(desc="encode", total=len(mine), unit="clip" if args.video else "image", shown=ranks.is_main)
    with latent_cache.Writer(layout) as writer:  # which keeps what is finished, however this ends
        for batch, (pixels, _, bad) in zip(keys, loader.read(dataset, keys, args.num_workers, pin), strict=True):
            bad_files.note(bad)
            pixels = autoencoders.to_pixels(pixels.to(ranks.device, non_blocking=True))
            copies = [pixels, pixels.flip(-1)] if args.flip else [pixels]
            moments = torch.stack([autoencoder.posterior(copy) for copy in copies], dim=1).half()
            moments = moments.to("cpu", non_blocking=True)
            writer.write([index for _, index in batch], moments, distributed.fence(ranks.device))
            bar.update(len(batch))
    bar.close()
    distributed.barrier()
    bad_files.agree()
    if ranks.is_main:
        size = sum(path.stat().st_size for path in Path(args.out).iterdir())
        encoded = sum(map(len, left))
        told = {"cache": args.out, "items": len(dataset), "encoded": encoded, "bytes_per_item": size // len(dataset)}
        print(json.dumps(told))
    distributed.cleanup()


if __name__ == "__main__":
    cli.run(main)
