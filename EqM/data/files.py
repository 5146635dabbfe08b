"""Folders of images or clips to uint8 tensors and labels.

Letters: C channels, T frames, H W height and width. One item is (C, H, W) or (C, T, H, W).
"""

import csv
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from EqM.data.clips import decode_clip
from EqM.data.media import UNREADABLE
from EqM.run import resume, seeds
from EqM.run.errors import UserError

CLIP_EXTENSIONS = (".avi", ".mp4", ".mkv", ".webm", ".mov")


def centre_crop(image, size):
    """ADM's centre crop (Dhariwal & Nichol 2021): halve by box filter, then bicubic, then the middle.

    image: a PIL image. Returns uint8 (size, size, 3).
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(max(size, round(side * scale)) for side in image.size), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def read_image(path):
    """A file as an upright RGB image, whatever its mode: 16-bit is scaled, alpha dropped."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
        return image.convert("RGB")


class LabelledFiles(Dataset):
    """Image or clip files with class labels.

    paths, labels: one per file. class_names: sorted; a label is an index into them. clip_len: frames of a
    clip, None for images. An item is asked for by (epoch, index), of which its flip and window are a
    function, and is (pixels uint8 (3, H, W) or (3, T, H, W), label, index of the file if it was bad else -1).
    A bad file is replaced by another of its class; ValueError if that class has no good one.
    """

    def __init__(self, paths, labels, class_names, size, clip_len=None, frame_interval=None, flip=True, seed=0):
        self.paths = np.array([os.fsencode(path) for path in paths])  # one block, which workers share
        self.labels = np.array(labels)
        self.class_names = class_names
        self.notes = []
        self.size = size
        self.clip_len = clip_len
        self.frame_interval = frame_interval
        self.flip = flip
        self.seed = seed

    def __len__(self):
        return len(self.paths)

    def digest(self):
        """What a checkpoint keeps of the data (resume.data_digest); names are relative to the files' common folder."""
        folder = os.path.commonprefix(list(self.paths)).rpartition(os.fsencode(os.sep))[0]
        names = [path[len(folder) :] for path in self.paths]
        return resume.data_digest(names, self.labels, list(map(os.fsdecode, self.paths)))

    def path(self, index):
        return os.fsdecode(self.paths[index])

    def read(self, index, epoch):
        """One file: uint8 (3, H, W) or (3, T, H, W)."""
        seed = (self.seed, epoch, index)
        if self.clip_len is None:
            frames = [read_image(self.path(index))]
        else:
            frames = decode_clip(self.path(index), self.clip_len, self.frame_interval, seed)
        clip = np.stack([centre_crop(frame, self.size) for frame in frames])  # (T, H, W, 3)
        if self.flip and seeds.coin(*seed):
            clip = clip[:, :, ::-1]  # the whole clip, never frame by frame
        clip = torch.from_numpy(np.ascontiguousarray(clip.transpose(3, 0, 1, 2)))  # (3, T, H, W)
        return clip if self.clip_len else clip[:, 0]

    def __getitem__(self, key):
        epoch, index = key
        try:
            return self.read(index, epoch), int(self.labels[index]), -1
        except UNREADABLE:
            peers = np.flatnonzero(self.labels == self.labels[index])
        for peer in np.roll(peers, -1 - np.searchsorted(peers, index))[:-1]:
            try:
                return self.read(int(peer), epoch), int(self.labels[index]), index
            except UNREADABLE:
                continue
        raise ValueError(f"no file of class {self.class_names[self.labels[index]]!r} can be read")


def open_files(args, flip):
    """The LabelledFiles that --data-path and its companions name. Raises UserError."""
    paths, labels, class_names = find_files(args.data_path, args.video, args.csv)
    clip_len = args.clip_len if args.video else None
    return LabelledFiles(
        paths, labels, class_names, args.image_size, clip_len, args.frame_interval, flip, args.global_seed
    )


def find_files(root, clips, csv_path=None):
    """(paths, labels, class names) of a data folder.

    Class folders `<root>/<class>/<file>`, or a flat folder of clips with a CSV `video_name,tag`: the one
    given, else `<root>.csv` or the only CSV in the folder if there are no class folders. Raises UserError.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--data-path {root} is not a folder; see datasets/README.md for the layouts")
    extensions = CLIP_EXTENSIONS if clips else IMG_EXTENSIONS
    kind = "clips" if clips else "images"
    folders = any(entry.is_dir() for entry in os.scandir(root))
    if clips and csv_path is None and not folders:
        tables = [table for table in [root.with_suffix(".csv")] if table.is_file()] or list(root.glob("*.csv"))
        csv_path = tables[0] if len(tables) == 1 else None
    if csv_path is not None:
        return _find_in_csv(root, Path(csv_path))
    if not folders:
        raise UserError(f"--data-path {root} has no class folders; expected {root}/<class>/<file>")
    class_names, class_to_index = find_classes(root)
    found = make_dataset(root, class_to_index, extensions=extensions, allow_empty=True)
    if not found:
        other = "; leave --video out for images" if clips else "; add --video for clips"
        raise UserError(f"--data-path {root} holds no {kind} ({' '.join(extensions)}){other}")
    paths, labels = zip(*found, strict=True)
    return paths, labels, class_names


def _find_in_csv(root, csv_path):
    try:
        with open(csv_path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--csv {csv_path} cannot be read: {error}") from None
    if not rows or not {"video_name", "tag"} <= rows[0].keys():
        raise UserError(f"--csv {csv_path} needs a header 'video_name,tag' and at least one row")
    class_names = sorted({row["tag"] for row in rows})
    class_to_index = {name: i for i, name in enumerate(class_names)}
    labels = [class_to_index[row["tag"]] for row in rows]
    return [root / row["video_name"] for row in rows], labels, class_names
