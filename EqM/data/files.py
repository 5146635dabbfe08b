"""Folders of images or clips to uint8 tensors and labels.

Letters: C channels, T frames, H W height and width. One item is (C, H, W) or (C, T, H, W).
"""

import csv
import io
import os
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from EqM.data.clips import decode_clip
from EqM.data.images import centre_crop, image_extensions, is_picture, read_image
from EqM.data.media import UNREADABLE
from EqM.run import resume, seeds
from EqM.run.errors import UserError, printable

CLIP_EXTENSIONS = (".avi", ".mp4", ".mkv", ".webm", ".mov")
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX", "__pycache__", "lost+found", "#recycle", "$RECYCLE.BIN")
SAMPLES_NOTE = "samples.json"  # says what a folder of samples was made by
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class LabelledItems(Dataset, ABC):
    """Images or clips with class labels, wherever their bytes lie: a subclass's `_source` says where.

    labels: one an item. class_names: a label is an index into them. clip_len: frames of a clip, None for
    images. An item is asked for by (epoch, index), of which its flip and window are a function, and is
    (pixels uint8 (3, H, W) or (3, T, H, W), label, index of the file if it was bad else -1).
    A bad file is replaced by another of its class; ValueError if that class has no good one.
    notes: lines for the log on what was found, and what was left out.
    """

    def __init__(self, labels, class_names, size, clip_len=None, frame_interval=None, flip=True, seed=0):
        if frame_interval and not clip_len:
            raise UserError("--frame-interval is for clips, and these are images; drop it, or give --video")
        self.labels = np.array(labels)
        self.class_names = class_names
        self.notes = []
        self.size = size
        self.clip_len = clip_len
        self.frame_interval = frame_interval
        self.flip = flip
        self.seed = seed

    def __len__(self):
        return len(self.labels)

    @abstractmethod
    def digest(self):
        """What a checkpoint keeps of the data, see resume.data_digest."""

    @abstractmethod
    def records(self, root):
        """(name, size, time of its change, label) of each item, for a cache; root: the data folder, where it has one.

        name: bytes, without the folder. An item that is not there has size and time -1.
        """

    @abstractmethod
    def path(self, index):
        """What an item is called in messages: its path where it has one."""

    def fault(self, index):
        """What is wrong with a bad item, in words."""
        return "does not decode"

    @abstractmethod
    def _source(self, index):
        """Path or bytes of an item's file."""

    def read(self, index, epoch):
        """One file: uint8 (3, H, W) or (3, T, H, W)."""
        return self._item(self._decode(index, epoch), index, epoch)

    def _decode(self, index, epoch):
        if self.clip_len is None:
            return [read_image(self._source(index))]
        return decode_clip(self._source(index), self.clip_len, self.frame_interval, (self.seed, epoch, index))

    def _item(self, frames, index, epoch):
        clip = np.stack([centre_crop(frame, self.size) for frame in frames])  # (T, H, W, 3)
        if self.flip and seeds.coin(self.seed, epoch, index):
            clip = clip[:, :, ::-1]  # the whole clip, never frame by frame
        clip = torch.from_numpy(np.ascontiguousarray(clip.transpose(3, 0, 1, 2)))  # (3, T, H, W)
        return clip if self.clip_len else clip[:, 0]

    def __getitem__(self, key):
        epoch, index = key
        label = int(self.labels[index])
        for each in self._with_peers(index):
            try:
                frames = self._decode(each, epoch)
            except UNREADABLE:
                continue
            return self._item(frames, each, epoch), label, -1 if each == index else index
        raise ValueError(f"no file of class {printable(self.class_names[label])!r} can be read")

    def _with_peers(self, index):
        """This file, then the others of its class, from the next one on."""
        yield index
        peers = np.flatnonzero(self.labels == self.labels[index])
        yield from np.roll(peers, -1 - np.searchsorted(peers, index))[:-1].tolist()


class LabelledFiles(LabelledItems):
    """LabelledItems of a file each. paths: one an item."""

    def __init__(self, paths, labels, class_names, size, clip_len=None, frame_interval=None, flip=True, seed=0):
        super().__init__(labels, class_names, size, clip_len, frame_interval, flip, seed)
        self.paths = np.array([os.fsencode(path) for path in paths])  # one block, which workers share

    def digest(self):
        """Names are relative to the files' common folder."""
        folder = os.path.commonprefix(list(self.paths)).rpartition(os.fsencode(os.sep))[0]
        names = [path[len(folder) :] for path in self.paths]
        return resume.data_digest(names, self.labels, list(map(os.fsdecode, self.paths)))

    def records(self, root):
        prefix = os.path.join(Path(root), "")
        found = []
        for index, label in enumerate(self.labels):
            path = self.path(index)
            name = path.removeprefix(prefix) if path.startswith(prefix) else os.path.relpath(path, root)
            found.append((os.fsencode(name), *size_and_time(path), label))
        return found

    def path(self, index):
        return os.fsdecode(self.paths[index])

    _source = path

    def fault(self, index):
        try:
            with open(self.path(index), "rb"):
                return super().fault(index)
        except OSError as error:
            return f"cannot be opened ({error.strerror})"


def size_and_time(path):
    """Bytes of a file and when it was changed in ns; -1 both where it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def open_files(args, flip):
    """The LabelledFiles that --data-path and its companions name. Raises UserError."""
    notes = []
    paths, labels, class_names = find_files(args.data_path, args.video, args.csv, notes.append)
    clip_len = args.clip_len if args.video else None
    dataset = LabelledFiles(
        paths, labels, class_names, args.image_size, clip_len, args.frame_interval, flip, args.global_seed
    )
    dataset.notes = notes
    return dataset


def find_files(root, clips, csv_path=None, tell=lambda line: None):
    """(paths, labels, class names) of a data folder.

    Class folders `<root>/<class>/<file>`, or a flat folder of clips with a CSV `video_name,tag`: the one
    given, else `<root>.csv` or the only CSV in the folder if there are no class folders. What is hidden or a
    system's own counts as absent. tell: takes lines on the classes and on what was left out. Raises UserError.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--data-path {printable(root)} is not a folder; see datasets/README.md for the layouts")
    folders, links, _, _ = entries(root)
    class_names = sorted(folders + links)
    if clips and csv_path is None and not class_names:
        beside = root.with_suffix(".csv")
        tables = [beside] if beside.is_file() else [t for t in root.glob("*.csv") if not is_system(t.name)]
        csv_path = tables[0] if len(tables) == 1 else None
    if csv_path is not None:
        paths, labels, class_names = _find_in_csv(root, Path(csv_path))
    elif not class_names:
        raise UserError(
            f"--data-path {printable(root)} has no class folders; expected {printable(root)}/<class>/<file>"
        )
    else:
        _refuse_splits(root, class_names, CLIP_EXTENSIONS if clips else image_extensions())
        paths, labels = _find_in_folders(root, class_names, clips, tell)
    tell(f"{len(class_names)} classes: {some(class_names, 10)}")
    return paths, labels, class_names


def is_flat(root):
    """Whether this is a folder that shows no folders. Raises UserError if it cannot be read."""
    if not os.path.isdir(root):
        return False
    folders, links, _, _ = entries(root)
    return not folders + links


def flat_files(root, clips):
    """The images or clips, GIFs among them, in a folder itself, by name; of a sampler's folder the samples.

    Raises UserError if there are none.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{printable(root)} is not a folder")
    found = [root / name for name in visible(root)]
    found = [path for path in found if _is_wanted(path, clips) or (clips and path.suffix.lower() == ".gif")]
    found = without_pictures_of_samples(root, found)
    if not found:
        raise UserError(f"{printable(root)} holds no {'clips' if clips else 'images'}")
    return found


def without_pictures_of_samples(folder, paths):
    """Paths below a folder; where a sampler wrote it, without the contact sheet and traces beside the samples."""
    made = (Path(folder) / SAMPLES_NOTE).exists()
    return [path for path in paths if path.stem.isdecimal()] if made else paths


def _is_wanted(path, clips):
    """Whether a file is a clip, or an image, by its name, or by its content where the name has no extension."""
    end = os.path.splitext(path)[1].lower()
    if clips or end:
        return end in (CLIP_EXTENSIONS if clips else image_extensions())
    return is_picture(path)


def some(names, most):
    """The first few of names, for a message."""
    return ", ".join(printable(name) for name in names[:most]) + (", ..." if len(names) > most else "")


def is_system(name):
    return name.startswith(".") or name in SYSTEM_FOLDERS


def entries(folder):
    """(folders, links to folders, other files), sorted names of what a folder shows, and how much it hides."""
    folders, links, files, hidden = [], [], [], 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_system(entry.name):
                    hidden += 1
                elif _is_dir(entry):
                    (links if entry.is_symlink() else folders).append(entry.name)
                elif entry.is_symlink() or entry.is_file():  # no pipes, which would wait for ever
                    files.append(entry.name)
    except OSError as error:
        raise UserError(
            f"{printable(folder)} cannot be read ({error.strerror}); give this user access to it, or move it away"
        ) from None
    return sorted(folders), sorted(links), sorted(files), hidden


def visible(folder):
    """Sorted names of the files that a folder shows. Raises UserError if it cannot be read."""
    return entries(folder)[2]


def _is_dir(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere, or to itself
        return False


def _refuse_splits(root, names, extensions):
    """Raise UserError where the "classes" are the train and test sets, with the classes below them."""
    if "train" not in names or len(names) == 1 or not SPLITS.issuperset(names):
        return
    inside = [entries(root / name) for name in names]
    if all(own + linked and not any(f.lower().endswith(extensions) for f in files) for own, linked, files, _ in inside):
        raise UserError(
            f"--data-path {printable(root)} holds {' and '.join(names)}, which hold the class folders: "
            f"give {printable(root)}/train"
        )


def _find_in_folders(root, class_names, clips, tell):
    """(paths, labels), class by class, sorted by folder and name."""
    kind = "clips" if clips else "images"
    above = {_identity(folder) for folder in (root, *root.resolve().parents)}
    paths, labels, left_out, empty = [], [], Counter(), []
    for label, name in enumerate(class_names):
        before = len(paths)
        for folder, files, hidden in sorted(_walk(os.path.join(root, name), above)):
            left_out["hidden"] += hidden
            for file in files:
                path = os.path.join(folder, file)
                if _is_wanted(path, clips):
                    paths.append(path)
                    labels.append(label)
                else:
                    left_out[os.path.splitext(file)[1].lower() or "without extension"] += 1
        if len(paths) == before:
            empty.append(name)
    if not paths:
        other = "; leave --video out for images" if clips else "; add --video for clips"
        raise UserError(f"--data-path {printable(root)} holds no {kind}{other}")
    left_out = +left_out
    if left_out:
        each = some([f"{count} {end}" for end, count in left_out.most_common()], 8)
        tell(f"Left out {left_out.total()} files and folders that are no {kind}: {each}")
    if empty:
        tell(f"{len(empty)} classes hold no {kind}: {some(empty, 10)}")
    return paths, labels


def _identity(folder):
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _walk(top, above):
    """(folder, names of its files, how many are hidden) of a folder and all below it, each real folder once.

    Links are followed, after all else, but not to the folders in above.
    """
    seen, folders, links = set(above), [top], []
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        identity = _identity(folder)
        if identity in seen:
            continue
        seen.add(identity)
        own, linked, files, hidden = entries(folder)
        folders += [os.path.join(folder, name) for name in own]
        links = sorted(links + [os.path.join(folder, name) for name in linked], reverse=True)
        yield folder, files, hidden


def _find_in_csv(root, csv_path):
    """(paths, labels, class names) of the rows of a CSV, as spreadsheets write them. Raises UserError."""
    told = printable(csv_path)
    try:
        text = csv_path.read_bytes().decode("utf-8-sig")
        rows, lines = _rows(text)
    except OSError as error:
        raise UserError(f"{told} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{told} cannot be read: {error}; save it as CSV in UTF-8") from None
    if rows is None:
        raise UserError(f"{told} needs a header with the columns video_name,tag")
    if not rows:
        raise UserError(f"{told} has no row below its header")
    short = [str(line) for line, row in zip(lines, rows, strict=True) if not all(row)]
    if short:
        raise UserError(f"{told} has {len(short)} rows without a name or a tag: lines {some(short, 5)}")
    names = [name for name, _ in rows]
    outside = [name for name in names if not _is_inside(root, name)]
    if outside:
        raise UserError(f"{told} names {len(outside)} files outside {printable(root)}: {some(outside, 5)}")
    paths = [_locate(root, name) for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if path is None]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names)} files in {told} are not in {printable(root)}: {some(missing, 5)}; "
            f"take their rows out, or give the folder that holds them"
        )
    class_names = sorted({tag for _, tag in rows})
    index = {name: i for i, name in enumerate(class_names)}
    return paths, [index[tag] for _, tag in rows], class_names


def _rows(text):
    """([(name, tag)], their lines in the text); (None, None) without a header that has both columns."""
    for delimiter in ",;\t":
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        header = [word.strip() for word in next(reader, [])]
        if not {"video_name", "tag"}.issubset(header):
            continue
        columns = header.index("video_name"), header.index("tag")
        rows, lines = [], []
        for row in reader:
            if any(word.strip() for word in row):  # spreadsheets end in rows of separators
                rows.append(tuple(row[column].strip() if column < len(row) else "" for column in columns))
                lines.append(reader.line_num)
        return rows, lines
    return None, None


def _is_inside(root, name):
    root = os.path.abspath(root)
    names = (name, name.replace("\\", "/"))
    return all(os.path.normpath(os.path.join(root, each)).startswith(os.path.join(root, "")) for each in names)


def _locate(root, name):
    """Path of the file a CSV names, with or without its extension, or with backslashes; None where there is none."""
    for each in dict.fromkeys((name, name.replace("\\", "/"))):
        if os.path.isfile(root / each):
            return root / each
        ends = [variant for end in CLIP_EXTENSIONS for variant in (end, end.upper())]
        found = [root / (each + end) for end in ends if os.path.isfile(root / (each + end))]
        if len(found) > 1:
            raise UserError(f"{printable(name)} may be {some([path.name for path in found], 5)}: name one in the CSV")
        if found:
            return found[0]
    return None
