"""A folder of latents, encoded once, that training reads instead of images, video and autoencoder.

    cache.json        what was encoded and how; `item_shape` and `shard_items` say what the shards hold
    files.npy         one record an item: name below the data folder (bytes), size, time (of its change, in ns), label
    000000.npy, ...   shards of `shard_items` items, the last may have fewer: (items, copies, 2, C, [T,] h, w) in FP16
    000000.part.npy   of a shard that was interrupted: one record (item, moments) for each item that was finished

Copies are the plain and, unless flips are off, the mirrored item; of each, mean and standard deviation of its
posterior, scaled as training wants them. So drawing from the posterior and flipping stay random.

Every file is written by one process and appears under its name once it is whole. A cache of an earlier version is one
`moments.npy` with `labels.npy` and `done.npy` (which items are written): it is read, but not gone on with.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from EqM.data.geometry import geometry
from EqM.run import resume, seeds
from EqM.run.errors import UserError, flag_of, reason

KEY = ("vae", "image_size", "video", "clip_len")  # what training's own flags must agree with
TYPES = {"vae": str, "image_size": int, "video": bool, "clip_len": int, "class_names": list}  # of cache.json's entries
SHARD_BYTES = 64 << 20  # a kill costs each rank at most one shard; larger only where MOST_SHARDS says so
SHARDS = 64  # at least, where there are as many items, so that the ranks have even shares
MOST_SHARDS = 512  # a mapped file stays open, and a process may often have only 1,024 of them
DAMAGED = (OSError, ValueError)  # what reading such a folder raises


class LatentCache(Dataset):
    """Items of a finished cache, asked for by (epoch, index): (moments FP16 (2, C, [T,] h, w), label, -1).

    The interface of files.LabelledFiles: flips are the same function of (seed, epoch, index). A list of keys gives a
    batch at once: (moments (N, 2, C, [T,] h, w), labels (N,), -1 (N,)).
    Raises UserError if the folder is no cache, is damaged, unfinished, or was made from something else than args say.
    """

    def __init__(self, folder, args):
        self.folder = Path(folder)
        try:
            meta = _described(self.folder)
        except DAMAGED as error:
            raise UserError(
                f"--latents {folder} is not a latent cache ({reason(error)}); make it by extract_latents.py"
            ) from None
        for name in KEY:
            if not _same(name, meta[name], getattr(args, name)):
                was = f"{flag_of(name)} {meta[name]}"
                raise UserError(f"--latents {folder} was made with {was}, not {getattr(args, name)}")
        try:
            finished = self._open(meta)
            if finished < len(self.labels):
                advice = "run extract_latents.py again"
                if "shard_items" not in meta:
                    advice = "an earlier version began it, so make it anew, in another folder"
                raise UserError(f"--latents {folder} is unfinished, {finished} of {len(self.labels)} items: {advice}")
            copies = self._checked_copies(args)
        except DAMAGED as error:
            raise UserError(
                f"--latents {folder} is damaged ({reason(error)}); run extract_latents.py again, which mends shards"
            ) from None
        if args.flip and copies == 1:
            raise UserError(f"--latents {folder} has no mirrored copies; train from it with --no-flip")
        self.class_names = meta["class_names"]
        self.notes = []
        self.flip = args.flip
        self.seed = args.global_seed

    def _open(self, meta):
        """Take labels and names of shards from the folder; returns how many items are finished."""
        if "shard_items" in meta:
            layout = Layout.of(self.folder, meta)
            self.labels = np.array(layout.files()["label"])
            self.shard_items = layout.shard_items
            self.names = [layout.path(shard).name for shard in layout.shards]
            finished = len(self.labels) - sum(len(layout.left(shard)) for shard in layout.shards)
        else:
            self.labels, done = (np.array(_mapped(self.folder / name)) for name in ("labels.npy", "done.npy"))
            if done.shape != self.labels.shape or done.dtype != bool:
                raise ValueError("done.npy does not fit labels.npy")
            self.shard_items = max(1, len(done))
            self.names = ["moments.npy"]
            finished = int(done.sum())
        classes = np.arange(len(meta["class_names"]))
        if self.labels.ndim != 1 or self.labels.dtype.kind not in "iu" or not np.isin(self.labels, classes).all():
            raise ValueError(f"its labels are not all from 0 to {len(meta['class_names']) - 1}")
        return finished

    def _checked_copies(self, args):
        """1 or 2 copies of an item; raises ValueError unless every shard is as long and shaped as args say."""
        one = (2, *geometry(args.vae).shape(args))
        copies = self.shards[0].shape[1] if self.shards[0].ndim > 1 else 0
        for i, (name, shard) in enumerate(zip(self.names, self.shards, strict=True)):
            expected = (min(self.shard_items, len(self) - i * self.shard_items), copies, *one)
            if copies not in (1, 2) or shard.shape != expected or shard.dtype != np.float16:
                raise ValueError(f"{name} holds {shard.dtype} {shard.shape}, not float16 {expected}")
        return copies

    @cached_property
    def shards(self):
        """A list of arrays (items, copies, 2, C, [T,] h, w) in FP16, memory-mapped."""
        # Plain arrays, since indexing is slower through np.memmap.
        return [_mapped(self.folder / name).view(np.ndarray) for name in self.names]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "shards"}  # a worker maps its own

    def __len__(self):
        return len(self.labels)

    def digest(self):
        """What a checkpoint keeps of the data (resume.data_digest), by its files' names and sizes if it has them."""
        names = [b""] * len(self)
        if (self.folder / "files.npy").exists():
            names = [b"%d %s" % (size, name) for name, size, _, _ in _mapped(self.folder / "files.npy").tolist()]
        return resume.data_digest(names, self.labels)

    def __getitem__(self, key):
        moments, labels, _ = self.__getitems__([key])
        return moments[0], int(labels[0]), -1

    def __getitems__(self, keys):
        epochs, indices = np.array(keys).T
        mirrored = seeds.coins(self.seed, epochs, indices) if self.flip else np.zeros(len(keys), bool)
        places = np.stack([*np.divmod(indices, self.shard_items), mirrored], axis=1).tolist()
        moments = torch.empty(len(keys), *self.shards[0].shape[2:], dtype=torch.float16)
        np.stack([self.shards[shard][row, copy] for shard, row, copy in places], out=moments.numpy())
        return moments, torch.from_numpy(self.labels[indices].astype(np.int64)), torch.full((len(keys),), -1)


@dataclass(frozen=True)
class Layout:
    """Which item lies in which file: `length` items of item_shape (copies, 2, C, [T,] h, w), shard_items to a shard."""

    folder: Path
    length: int
    shard_items: int
    item_shape: tuple

    @classmethod
    def of(cls, folder, meta):
        """The layout that cache.json tells of. Raises ValueError if it tells of none."""
        length, shard_items, shape = (meta.get(name) for name in ("files", "shard_items", "item_shape"))
        numbers = [length, shard_items, *(shape if isinstance(shape, list) else [None])]
        if not all(type(number) is int and number > 0 for number in numbers):
            raise ValueError("cache.json has no usable files, shard_items and item_shape")
        return cls(folder, length, shard_items, tuple(shape))

    @property
    def shards(self):
        return range(-(-self.length // self.shard_items))

    @property
    def record(self):
        """The type of an item in a part."""
        return np.dtype([("item", "<i8"), ("moments", "<f2", self.item_shape)])

    def path(self, shard):
        return self.folder / f"{shard:06d}.npy"

    def part_path(self, shard):
        return self.folder / f"{shard:06d}.part.npy"

    def items(self, shard):
        """Indices of the items of a shard."""
        first = shard * self.shard_items
        return np.arange(first, min(first + self.shard_items, self.length))

    def files(self):
        """files.npy, as files_of returns it. Raises ValueError if it is not that."""
        files = _mapped(self.folder / "files.npy")
        if files.dtype.names != ("name", "size", "time", "label") or files.shape != (self.length,):
            raise ValueError(f"files.npy is no list of {self.length} files")
        return files

    def finished(self, shard):
        """(items, their moments) that are on disk of a shard. Raises ValueError if its file is damaged."""
        items = self.items(shard)
        if self.path(shard).exists():
            moments = _mapped(self.path(shard))
            if moments.shape != (len(items), *self.item_shape) or moments.dtype != np.float16:
                raise ValueError(f"{self.path(shard).name} holds {moments.dtype} {moments.shape}")
            return items, moments
        if not self.part_path(shard).exists():
            return items[:0], np.empty((0, *self.item_shape), np.float16)
        part = _mapped(self.part_path(shard))
        if part.dtype != self.record or part.ndim != 1 or not np.isin(part["item"], items).all():
            raise ValueError(f"{self.part_path(shard).name} holds something else")
        return part["item"], part["moments"]

    def left(self, shard):
        """Indices of the items of a shard that are not on disk."""
        items = self.items(shard)
        return items[:0] if self.path(shard).exists() else np.setdiff1d(items, self.finished(shard)[0])

    def save(self, shard, items, moments):
        """Write a shard, or a part of it if these are not all its items."""
        if len(items) == len(self.items(shard)):
            _save(self.path(shard), moments)
            self.part_path(shard).unlink(missing_ok=True)
        else:
            part = np.empty(len(items), self.record)
            part["item"], part["moments"] = items, moments
            _save(self.part_path(shard), part)

    def drop_damaged(self, shard):
        """Remove the file of a shard that is not what it should be."""
        try:
            self.finished(shard)
        except ValueError:
            self.path(shard).unlink(missing_ok=True)
            self.part_path(shard).unlink(missing_ok=True)

    def forget(self, shard, items):
        """Take items off the disk; what else is finished of the shard stays, as a part."""
        finished, moments = self.finished(shard)
        stays = ~np.isin(finished, items)
        if stays.all():
            return
        if stays.any():
            self.save(shard, finished[stays], moments[stays])
        else:
            self.part_path(shard).unlink(missing_ok=True)
        self.path(shard).unlink(missing_ok=True)


class Writer:
    """Puts items into shards. Used by `with`, it keeps what is finished however the block ends.

    Items may come in any order, but one shard after the other is what costs least. No two writers may share a shard.
    """

    def __init__(self, layout):
        self.layout = layout
        self._waiting = None  # (indices, moments, arrived) of the last batch
        self._open = None  # (shard, its moments, which of them are there)

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        try:
            self._place_waiting()
        finally:
            self._put_away()

    def write(self, indices, moments, arrived=lambda: None):
        """indices: of N items; moments: (N, copies, 2, C, [T,] h, w), on the CPU once arrived() returns.

        They are placed when the next batch is given, so that they travel while it is encoded.
        """
        self._place_waiting()
        self._waiting = indices, moments, arrived

    def _place_waiting(self):
        if self._waiting is None:
            return
        indices, moments, arrived = self._waiting
        arrived()
        shards, at = np.divmod(np.array(indices, dtype=int), self.layout.shard_items)
        moments = moments.half().numpy()
        for shard in map(int, np.unique(shards)):
            if self._open is None or self._open[0] != shard:
                self._put_away()
                self._open = shard, *self._taken_up(shard)
            _, rows, there = self._open
            rows[at[shards == shard]] = moments[shards == shard]
            there[at[shards == shard]] = True
            if there.all():
                self._put_away()
        self._waiting = None

    def _taken_up(self, shard):
        items = self.layout.items(shard)
        finished, moments = self.layout.finished(shard)
        rows = np.empty((len(items), *self.layout.item_shape), np.float16)
        there = np.isin(items, finished)
        rows[finished - items[0]] = moments
        return rows, there

    def _put_away(self):
        if self._open is not None:
            shard, rows, there = self._open
            self.layout.save(shard, self.layout.items(shard)[there], rows if there.all() else rows[there])
            self._open = None


def files_of(dataset, root):
    """What a cache remembers of the files of a data set below a folder: records (name, size, time, label), one an item.

    name: below the data folder root. A file that is not there has size and time -1.
    """
    records = dataset.records(root)
    longest = max(len(name) for name, *_ in records)
    return np.array(records, [("name", f"S{longest}"), ("size", "<i8"), ("time", "<i8"), ("label", "<i8")])


def create(folder, meta, files, item_shape):
    """Lay out an empty cache, or take up the one there, if it was made from the same. For one process to call, which
    keeps the folder to itself and its peers until it ends.

    meta: what cache.json says. files: as of files_of. item_shape: (copies, 2, C, [T,] h, w).
    Returns (Layout, indices of the items left for each unfinished shard, how many items of changed files are among
    them). Raises UserError if the folder holds something else, is damaged, or there is no room for what is left.
    """
    folder = Path(folder)
    per_item = 2 * math.prod(item_shape)  # bytes
    few, many = (math.ceil(len(files) / shards) for shards in (SHARDS, MOST_SHARDS))
    shard_items = max(many, min(SHARD_BYTES // per_item, few))
    meta = {**meta, "files": len(files), "item_shape": list(item_shape), "shard_items": shard_items}
    try:
        taken_up = (folder / "cache.json").exists()
        changed = _take_up(folder, meta, files) if taken_up else _lay_out(folder, meta, files)
        layout = Layout.of(folder, _described(folder))
        left = [items for items in map(layout.left, layout.shards) if len(items)]
        needed, disk = per_item * sum(map(len, left)) / 2**20, shutil.disk_usage(folder)
    except DAMAGED as error:
        raise UserError(f"latent cache {folder} cannot be made: {reason(error)}") from None
    free = disk.free / 2**20
    if needed > free and disk.total:  # a file system that does not tell says 0
        raise UserError(
            f"latent cache {folder} needs {needed:,.1f} MiB more, and its disk has {free:,.1f} free; "
            "make room, or choose another --out"
        )
    return layout, left, changed


def _lay_out(folder, meta, files):
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("[0-9]*.npy")):
        raise UserError(f"{folder} holds shards but no cache.json that says of what; choose another --out")
    resume.lock_run(folder, "--out")
    _save(folder / "files.npy", files)
    _save(folder / "cache.json", json.dumps(meta, indent=1).encode())
    return 0


def _take_up(folder, meta, files):
    """Refuse a cache of something else, and forget the items whose files changed; returns how many."""
    theirs = _described(folder)
    if "shard_items" not in theirs:
        raise UserError(
            f"{folder} holds a cache of an earlier version, which does not say of what files; "
            "train from it if it is finished, or make it anew in another --out"
        )
    differs = [name for name in meta if not _same(name, theirs.get(name), meta[name])]
    if differs:
        told = ", ".join(
            name if isinstance(meta[name], list) else f"{name} {theirs.get(name)}, not {meta[name]}" for name in differs
        )
        raise UserError(f"{folder} holds another cache ({told}); choose another --out")
    layout = Layout.of(folder, theirs)
    resume.lock_run(folder, "--out")
    for leftover in folder.glob("*.writing"):
        leftover.unlink()
    for shard in layout.shards:
        layout.drop_damaged(shard)
    before = layout.files()
    others = np.flatnonzero((before["name"] != files["name"]) | (before["label"] != files["label"]))
    if len(others):
        there, here = (os.fsdecode(each["name"][others[0]]) for each in (before, files))
        raise UserError(
            f"{folder} holds another data set: {len(others)} of {len(files)} files have another name or label, "
            f"first {there!r}, now {here!r}; choose another --out"
        )
    changed = np.flatnonzero((before["size"] != files["size"]) | (before["time"] != files["time"]))
    for shard in np.unique(changed // layout.shard_items):
        layout.forget(int(shard), changed)
    if len(changed):
        _save(folder / "files.npy", files)  # last: a kill before it forgets the same items again
    return len(changed)


def _described(folder):
    """What cache.json says. Raises OSError or ValueError."""
    meta = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
    if not isinstance(meta, dict):
        raise ValueError("cache.json is not a JSON object")
    for name, kind in TYPES.items():
        if type(meta.get(name)) is not kind:
            raise ValueError(f"cache.json has no usable {name}")
    if not meta["class_names"] or not all(isinstance(name, str) for name in meta["class_names"]):
        raise ValueError("cache.json has no usable class_names")
    return meta


def _same(name, one, other):
    """Whether two values of a cache.json's entry mean the same: an autoencoder's folder may be written in many ways."""
    return resume.same_vae(one, other) if name == "vae" else one == other


def _mapped(path):
    """An array file, memory-mapped. Raises ValueError that names it if it is cut short or something else."""
    try:
        array = np.load(path, mmap_mode="r")
    except Exception as error:  # numpy reads headers by Python's own parser, which raises whatever it likes
        raise ValueError(f"{path.name}: {reason(error)}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path.name} is no array")
    return array


def _save(path, content):
    """Write an array or bytes so that the file is there whole or not at all. Raises UserError."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.writing")
    try:
        with open(partial, "wb") as file:
            if isinstance(content, np.ndarray):
                # np.save would leave out why a write failed.
                content = np.ascontiguousarray(content)
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(content))
                content = content.view(np.uint8)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); what is finished is kept: make room or mend that, "
            "and give the same command again"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
