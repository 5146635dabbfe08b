"""What `benchmark.py --work loader` compares: how fast one core reads images, clips and cached latents.

Beside ours stand what people write themselves: torchvision's ImageFolder with ADM's crop, and latents in one file an
item, as fast-DiT keeps them. All read on one thread of one process, without workers, what was read before, so that no
disk is timed.
"""

import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from EqM.data import latent_cache, loader
from EqM.data.files import open_files
from EqM.data.images import centre_crop
from EqM.measure.contenders import CHANNELS, CLASSES, FACTOR, make_files

PICTURES = 64  # made where none are given
LATENTS = 1024  # of images or clips; 128 MiB of 4-frame clips at 256 x 256 and their mirror images
SECONDS = 1.0  # that a turn takes at least


class OneFileAnItem(Dataset):
    """Latents as fast-DiT keeps them: `features/7.npy` FP32 (1, C, [T,] h, w), drawn once, and `labels/7.npy` (1,)."""

    def __init__(self, folder):
        self.folder = folder
        self.count = len(list((folder / "features").iterdir()))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return tuple(torch.from_numpy(np.load(self.folder / part / f"{index}.npy")) for part in ("features", "labels"))


def image_folder(folder, size):
    """torchvision's ImageFolder with ADM's crop, mirroring and values from -1 to 1, as training scripts have it."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [
        lambda image: Image.fromarray(centre_crop(image, size)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(3 * [0.5], 3 * [0.5], inplace=True),
    ]
    return ImageFolder(folder, transforms.Compose(steps))


def settled(args, video, data_path=None):
    """train.py's arguments as far as data sets read them."""
    return Namespace(
        data_path=data_path, csv=None, video=video, clip_len=args.clip_len, frame_interval=None, vae="ema",
        image_size=args.image_size, flip=True, global_seed=0,
    )  # fmt: skip


def make_pictures(root):
    """PICTURES JPEG files of ImageNet's common size, 500 x 375, in one class folder."""
    folder = root / "class"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        scene = Image.fromarray(rng.integers(0, 256, (75, 100, 3), np.uint8))
        scene.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=95)
    return root


def make_latents(root, args):
    """The same random latents as a cache and as one file an item; returns (cache folder, folder of files)."""
    side = args.image_size // FACTOR
    rng = np.random.default_rng(0)
    shape = (2, 2, CHANNELS, *((args.clip_len,) if args.video else ()), side, side)  # copies, mean and deviation
    files = np.zeros(LATENTS, [("name", "S8"), ("size", "<i8"), ("time", "<i8"), ("label", "<i8")])
    files["label"] = rng.integers(CLASSES, size=LATENTS)
    meta = {name: getattr(args, name) for name in latent_cache.KEY} | {"class_names": [str(i) for i in range(CLASSES)]}
    layout, left, _ = latent_cache.create(root / "cache", meta, files, shape)
    for part in ("features", "labels"):
        (root / "files" / part).mkdir(parents=True)
    with latent_cache.Writer(layout) as writer:
        for items in left:
            moments = rng.standard_normal((len(items), *shape), np.float32)
            writer.write(items, torch.from_numpy(moments))
            for index, one in zip(items, moments, strict=True):
                np.save(root / "files" / "features" / f"{index}.npy", one[0, :1])
                np.save(root / "files" / "labels" / f"{index}.npy", files["label"][index : index + 1])
    return root / "cache", root / "files"


def ours(dataset, batch_size):
    """Endless batches as train.py reads them."""
    return loader.read(dataset, loader.Stream(len(dataset), batch_size, 0, 1, seed=0), 0, False)


def plain(dataset, batch_size):
    """Endless batches of a DataLoader that shuffles."""
    while True:
        yield from DataLoader(dataset, batch_size, shuffle=True)


def sources(args, root):
    """{(what is read, by which recipe): endless batches}. root: a folder for the files that are made."""
    given = Path(args.data_path) if args.data_path else None
    found = {}
    images = given if given and not args.video else make_pictures(root / "images")
    found["images", "ours"] = ours(open_files(settled(args, False, images), flip=True), args.batch_size)
    found["images", "ImageFolder"] = plain(image_folder(images, args.image_size), args.batch_size)
    (root / "clips").mkdir()
    clips = given if given and args.video else make_files(settled(args, True), root / "clips")
    found["clips", "ours"] = ours(open_files(settled(args, True, clips), flip=True), args.batch_size)
    for video, what in ((False, "cached images"), (True, "cached clips")):
        one = settled(args, video)
        cache, files = make_latents(root / what, one)
        found[what, "ours"] = ours(latent_cache.LatentCache(cache, one), args.batch_size)
        found[what, "a file an item"] = plain(OneFileAnItem(files), args.batch_size)
    return found


def turn(batches):
    """(items a second, items a second of this process's own time) of a turn, which is that of whole batches."""
    start, started, items = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < SECONDS:
        items += len(next(batches)[0])
    return items / (time.perf_counter() - start), items / (time.process_time() - started)


def contest(args):
    """One row for each source and recipe, timed in turn args.rounds times."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = sources(args, Path(folder))
        turns = {contender: [] for contender in found}
        for batches in found.values():
            turn(batches)  # files are in memory from here on
        for _ in range(args.rounds):
            for contender, batches in found.items():
                turns[contender].append(turn(batches))
        for batches in found.values():
            batches.close()
    rows = []
    for (what, recipe), rates in turns.items():
        by_clock, by_core = zip(*rates, strict=True)
        rows.append({
            "read": what, "recipe": recipe, "items/s": statistics.median(by_clock),
            "items/s and core": statistics.median(by_core), "spread": max(by_core) / min(by_core) - 1, "x other": None,
        })  # fmt: skip
    for row in rows:
        others = [other for other in rows if other["read"] == row["read"] and other is not row]
        if others:
            row["x other"] = row["items/s and core"] / others[0]["items/s and core"]
    return rows
