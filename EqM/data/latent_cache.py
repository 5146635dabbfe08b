"""A folder of latents, encoded once, that training reads instead of images, video and autoencoder.

It holds four files whatever the size of the data set: `cache.json` (what was encoded, and how), `labels.npy`,
`done.npy` (which items are written) and `moments.npy`, a memory-mapped array (items, copies, 2, C, [T,] h, w)
in FP16: for the plain and, unless flips are off, the mirrored copy of an item, mean and standard deviation of
its posterior, scaled as training wants them. So drawing from the posterior and flipping stay random.
"""

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from EqM.run import resume, seeds
from EqM.run.errors import UserError

KEY = ("vae", "image_size", "video", "clip_len")  # what training's own flags must agree with


class LatentCache(Dataset):
    """Items of a finished cache, asked for by (epoch, index): (moments FP16 (2, C, [T,] h, w), label, -1).

    The interface of data.LabelledFiles: flips are the same function of (seed, epoch, index).
    Raises UserError if the folder is no cache, is unfinished, or was made from something else than args say.
    """

    def __init__(self, folder, args):
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / "cache.json").read_text(encoding="utf-8"))
            self.labels = np.load(self.folder / "labels.npy")
            done = np.load(self.folder / "done.npy")
            copies = self.moments.shape[1]
        except (OSError, ValueError) as error:
            raise UserError(
                f"--latents {folder} is not a latent cache ({error}); make it by extract_latents.py"
            ) from None
        if not done.all():
            raise UserError(
                f"--latents {folder} is unfinished, {done.sum()} of {len(done)} items: run extract_latents.py again"
            )
        for name in KEY:
            if meta[name] != getattr(args, name):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"--latents {folder} was made with {flag} {meta[name]}, not {getattr(args, name)}")
        if args.flip and copies == 1:
            raise UserError(f"--latents {folder} has no mirrored copies; train from it with --no-flip")
        self.class_names = meta["class_names"]
        self.notes = []
        self.flip = args.flip
        self.seed = args.global_seed

    @cached_property
    def moments(self):
        """(items, copies, 2, C, [T,] h, w) in FP16, memory-mapped."""
        return np.load(self.folder / "moments.npy", mmap_mode="r")

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "moments"}  # a worker maps its own

    def __len__(self):
        return len(self.labels)

    def digest(self):
        """What a checkpoint keeps of the data: see resume.data_digest."""
        return resume.data_digest([b""] * len(self), self.labels)

    def __getitem__(self, key):
        epoch, index = key
        mirrored = int(self.flip and seeds.coin(self.seed, epoch, index))
        return torch.from_numpy(self.moments[index, mirrored].copy()), int(self.labels[index]), -1


class Writer:
    """Fills a cache, in any order and by several processes, and goes on where a killed one stopped."""

    FLUSH_EVERY = 64  # batches; done marks follow the data to disk, never the other way round

    def __init__(self, folder):
        self.moments = np.lib.format.open_memmap(folder / "moments.npy", mode="r+")
        self.done = np.lib.format.open_memmap(folder / "done.npy", mode="r+")
        self._unmarked = []

    def write(self, indices, moments):
        """indices: of N items; moments: (N, copies, 2, C, [T,] h, w) on the CPU."""
        self.moments[indices] = moments.half().numpy()
        self._unmarked.append(indices)
        if len(self._unmarked) >= self.FLUSH_EVERY:
            self.flush()

    def flush(self):
        if self._unmarked:
            self.moments.flush()
            self.done[np.concatenate(self._unmarked)] = True
            self.done.flush()
            self._unmarked = []


def create(folder, meta, labels, item_shape):
    """Lay out an empty cache, or check that the one there was made from the same. Returns nothing.

    meta: what cache.json says. labels: one per item. item_shape: (copies, 2, C, [T,] h, w).
    """
    folder = Path(folder)
    described = folder / "cache.json"
    try:
        if described.exists():
            theirs = json.loads(described.read_text(encoding="utf-8"))
            differs = [name for name in meta if theirs.get(name) != meta[name]]
            if differs:
                raise UserError(f"{folder} holds another cache ({', '.join(differs)} differ); choose another --out")
            return
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "labels.npy", np.asarray(labels))
        np.lib.format.open_memmap(folder / "moments.npy", "w+", np.float16, (len(labels), *item_shape))
        np.lib.format.open_memmap(folder / "done.npy", "w+", np.bool_, (len(labels),))
        partial = described.with_suffix(".partial")
        partial.write_text(json.dumps(meta, indent=1), encoding="utf-8")
        partial.replace(described)
    except (OSError, ValueError) as error:
        raise UserError(f"latent cache {folder} cannot be made: {error}") from None
