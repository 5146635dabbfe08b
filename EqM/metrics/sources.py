"""Where images and clips come from that are judged or compared with: folders, npz files, latent caches, models.

A source has `count` items of one `shape`, (H, W, 3) or (T, H, W, 3); `told`, for a protocol; `recipe`, which is equal
only for the same items; and `batches(lists of indices)`, uint8 tensors (n, *shape) in that order.
"""

import csv
import json
import os
import zipfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from EqM.data import autoencoder as autoencoders
from EqM.data import files, media, tables
from EqM.data.images import image_extensions, read_image
from EqM.data.latent_cache import KEY, LatentCache
from EqM.run import resume
from EqM.run.errors import UserError, printable, reason

READERS = 8  # threads that decode files
CLIP_FILES = (".gif", ".mp4")  # as samplers write them
LOSSY = (".jpg", ".jpeg", ".webp")


class Source:
    """What sources that are read share: a thread reads the next batch while one is looked at."""

    def batches(self, wanted):
        with ThreadPoolExecutor(1) as ahead:
            coming = None
            for indices in [*wanted, None]:
                before, coming = coming, None if indices is None else ahead.submit(self.read, indices)
                if before is not None:
                    yield before.result()

    @property
    def is_clips(self):
        return len(self.shape) == 4


class Items(Source):
    """Items of one shape. read_item: index to uint8 (H, W, 3) or (T, H, W, 3). name: index to what it is called.

    digest: as resume.data_digest makes it. told: how they are read, and where from.
    """

    def __init__(self, count, read_item, name, digest, told):
        self.count = count
        self.read_item = read_item
        self.name = name
        self.shape = self._item(0).shape
        self.told = {**told, "count": count}
        self.recipe = [told, digest]

    def _item(self, index):
        try:
            return self.read_item(index)
        except media.UNREADABLE as error:
            raise UserError(f"{self.name(index)} cannot be read ({reason(error)}); take it out of the set") from None

    def read(self, indices):
        with ThreadPoolExecutor(READERS) as pool:
            items = list(pool.map(self._item, indices))
        for index, item in zip(indices, items, strict=True):
            if item.shape != self.shape:
                raise UserError(
                    f"{self.name(index)} is {size_of(item.shape)} and {self.name(0)} {size_of(self.shape)}: items of "
                    "one size are wanted; `evaluate.py --make-reference` crops images as training does"
                )
        return torch.from_numpy(np.stack(items))


def size_of(shape):
    """A shape in words: 32 x 32, or 4 frames of 32 x 32."""
    *frames, height, width, _ = shape
    return f"{frames[0]} frames of {width} x {height}" if frames else f"{width} x {height}"


def folder_as_it_is(folder, tell=print):
    """The images below a folder, or the clips where it has no image, each at its own size.

    A folder that sample_gd.py wrote is its samples, without the contact sheet. Raises UserError if there are none.
    """
    folder = Path(folder)
    paths = _listed(folder) or _below(folder)
    images = [path for path in paths if path.suffix.lower() in image_extensions() and path.suffix != ".gif"]
    clips = [path for path in paths if path.suffix.lower() in CLIP_FILES]
    if not images and not clips:
        raise UserError(
            f"{printable(folder)} holds no images and no clips ({' or '.join(CLIP_FILES)}); of other clips make a "
            "reference by evaluate.py --make-reference"
        )
    if images and clips:
        raise UserError(
            f"{printable(folder)} holds {len(images)} images and {len(clips)} clips: which of them is meant? "
            "Give a folder of one kind"
        )
    lossy = sum(path.suffix.lower() in LOSSY for path in images)
    if lossy:
        tell(f"warning: {lossy} of {len(images)} images in {printable(folder)} are no PNG; losses move FID")
    paths = images or clips
    names = [os.path.relpath(path, folder) for path in paths]
    digest = resume.data_digest(names, [0] * len(names), paths)
    read = (lambda path: np.asarray(read_image(path))) if images else media.load_sample
    return Items(
        len(paths), lambda index: read(paths[index]), paths.__getitem__, digest, {"files": str(folder), "crop": "none"}
    )


def _listed(folder):
    """The files that labels.csv names, in its order, where a sampler left one."""
    try:
        with open(folder / "labels.csv", newline="", encoding="utf-8") as file:
            names = [row["file"] for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError):
        return []
    paths = [folder / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{printable(folder)} lacks {len(missing)} of the samples in its labels.csv: {missing[0]}, ...")
    return paths


def _below(folder):
    """The files of a folder and of all below it; a sampler that was stopped has written no labels.csv."""
    found = []
    for here, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not files.is_system(name))
        found += [Path(here, name) for name in sorted(names) if not files.is_system(name)]
    return files.without_pictures_of_samples(folder, found)


def _refuse(error):
    raise UserError(f"{printable(error.filename)} cannot be read: {error.strerror}") from None


def data_as_trained(path, args, flag):
    """A data set, each item cropped as training crops it, of clips the window of frames that it takes first.

    args: image_size, video, clip_len, csv, image_column, label_column, frame_interval and global_seed, as train.py's.
    flag: what the command calls the path. A flat folder will do too.
    """
    data = tables.open_any(path, args, flag)
    told = {"data": str(path), "crop": "training's centre crop", "size": args.image_size}
    if args.video:
        told |= {"frames": args.clip_len, "frame_interval": args.frame_interval}
    return Items(len(data), lambda index: data.read(index, 0).movedim(0, -1).numpy(), data.path, data.digest(), told)


class Npz(Source):
    """arr_0 of an npz, uint8 (N, H, W, 3) or (N, T, H, W, 3), of which a batch at a time is in memory."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            archive = zipfile.ZipFile(path)
            self._file = archive.open("arr_0.npy")
            version = np.lib.format.read_magic(self._file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(self._file)
        except Exception as error:
            raise UserError(f"{path} holds no array arr_0 of images: {reason(error)}") from None
        if dtype != np.uint8 or fortran or len(shape) not in (4, 5) or shape[-1] != 3 or 0 in shape:
            raise UserError(f"arr_0 of {path} is {dtype} {shape}, not images uint8 (N, H, W, 3)")
        self._start = self._file.tell()
        self.count, self.shape = shape[0], shape[1:]
        status = os.stat(path)
        self.told = {"npz": str(path), "count": self.count}
        self.recipe = ["npz", os.path.abspath(path), status.st_size, status.st_mtime_ns]

    def read(self, indices):
        each = int(np.prod(self.shape))
        rows = []
        for index in indices:
            try:
                self._file.seek(self._start + index * each)
                data = self._file.read(each)
            except Exception as error:  # a damaged archive can raise anything
                raise UserError(f"{self.path} is damaged: {reason(error)}") from None
            if len(data) < each:
                raise UserError(f"{self.path} is cut short: {index} of {self.count} images can be read")
            rows.append(np.frombuffer(data, np.uint8).reshape(self.shape))
        return torch.from_numpy(np.stack(rows))


class Decoded:
    """The latents of a cache, decoded: what the autoencoder alone makes of the data set. vae: where it lies now."""

    def __init__(self, folder, run_in, vae=None):
        try:
            meta = json.loads((Path(folder) / "cache.json").read_text(encoding="utf-8"))
            args = Namespace(**{name: meta[name] for name in KEY}, flip=False, global_seed=0)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is not a latent cache ({reason(error)}); make it by extract_latents.py"
            ) from None
        self._latents = LatentCache(folder, args)
        self._autoencoder = autoencoders.load(vae or args.vae, run_in)
        self._device = run_in.device
        self.count = len(self._latents)
        side = (args.image_size, args.image_size, 3)
        self.shape = (args.clip_len, *side) if args.video else side
        self.told = {"decoded": str(folder), "count": self.count, "vae": vae or args.vae, "precision": run_in.name}
        self.recipe = [self.told, self._latents.digest()]

    is_clips = Source.is_clips

    def read(self, indices):
        mean = torch.stack([self._latents[0, index][0][0] for index in indices]).to(self._device).float()
        return autoencoders.to_uint8(self._autoencoder.decode(mean)).movedim(1, -1)

    def batches(self, wanted):
        return map(self.read, wanted)


class Drawn:
    """Samples 0 to count - 1 of a pipeline, as sample_gd.py would draw them, none of them written unless asked.

    shape: (H, W, 3) or (T, H, W, 3) of one. how: what EqMPipeline.draw takes. classes: as EqMPipeline.labels takes
    them. batch: samples at once on a rank; the last batch is filled up to it, so that the number of ranks changes
    nothing. keep: a folder to write the samples to, see `claim`. recipe: what the weights are, to go on after a kill.
    """

    def __init__(self, pipe, count, shape, how, classes=("all",), seed=0, batch=64, keep=None, recipe=None):
        self.pipe = pipe
        self.count = count
        self.shape = shape
        self.how = how
        self.seed = seed
        self.batch = batch
        self.keep = Path(keep) if keep else None
        self.labels = pipe.labels(classes, range(count), seed)
        self.told = {"samples": count}
        self.recipe = recipe

    is_clips = Source.is_clips

    def read(self, indices):
        filled = [*indices, *[indices[-1]] * (self.batch - len(indices))]
        ended = {}
        for part in self.pipe.draw([self.labels[i] for i in filled], filled, self.seed, self.batch, **self.how):
            ended.update(zip(part.indices, part.x, strict=True))
        samples = self.pipe.decode(torch.stack([ended[i] for i in filled]))[: len(indices)]
        if self.keep is not None:
            self._write(indices, samples)
        return samples

    def _write(self, indices, samples):
        suffix = "gif" if self.is_clips else "png"
        paths = [self.keep / f"{index:06d}.{suffix}" for index in indices]
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(media.save_sample, paths, media.as_clips(samples).cpu().numpy(), [8] * len(paths)))

    def batches(self, wanted):
        return map(self.read, wanted)


def check_free(folder):
    """Whether a folder is free for samples, and not a sampler's, which says in a note what its samples are made by.

    Raises UserError if it holds pictures or clips without such a note.
    """
    if not os.path.isdir(folder):
        return True
    if (Path(folder) / files.SAMPLES_NOTE).exists():
        return False
    kinds = (*image_extensions(), *files.CLIP_EXTENSIONS)
    found = [name for name in files.visible(folder) if name.lower().endswith(kinds)]
    if found:
        raise UserError(
            f"--keep-samples {printable(folder)} holds {found[0]} and more that is not ours to replace; choose another"
        )
    return True


def check_same(folder, made_by):
    """Raise UserError unless a sampler's folder holds the samples that are made by this, a JSON object."""
    try:
        theirs = json.loads((Path(folder) / files.SAMPLES_NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unusable(folder, error) from None
    if theirs != json.loads(json.dumps(made_by)):
        raise UserError(f"--keep-samples {printable(folder)} holds other samples; choose another")


def claim(folder, made_by):
    """Make a folder for samples, or go on in one that holds these: it says what they are made by, a JSON object.

    Raises UserError if it holds anything else, or cannot be made.
    """
    if not check_free(folder):
        check_same(folder, made_by)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / files.SAMPLES_NOTE).write_text(json.dumps(made_by, indent=1), encoding="utf-8")
    except OSError as error:
        raise _unusable(folder, error) from None


def _unusable(folder, error):
    return UserError(f"--keep-samples {printable(folder)} cannot be used for samples: {reason(error)}")


def is_cache(path):
    """Whether a path names a latent cache."""
    return (Path(path) / "cache.json").exists()


def open_source(path, run_in=None, vae=None, tell=print):
    """The source that a path names: an npz of images, a latent cache, or a folder. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        return Decoded(path, run_in, vae) if is_cache(path) else folder_as_it_is(path, tell)
    if not path.is_file():
        raise UserError(f"{printable(path)} is neither a folder nor a file")
    return Npz(path)
