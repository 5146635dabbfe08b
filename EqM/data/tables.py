"""Hugging Face data sets and folders of parquet or Arrow files, as items like those of folders of pictures.

The rows stay in Arrow files, memory-mapped, which workers share. Nothing is decoded by the package `datasets`: an
item's bytes take the same way as a file's. The package is imported when such data is asked for, and not before.
"""

import hashlib
import os
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

from EqM.data.files import (
    CLIP_EXTENSIONS,
    LabelledFiles,
    LabelledItems,
    entries,
    flat_files,
    is_flat,
    open_files,
    size_and_time,
    some,
)
from EqM.run import hub, resume
from EqM.run.errors import UserError, printable, reason

ENDS = (".parquet", ".arrow")
BYTES, TEXTS = ("binary", "large_binary"), ("string", "large_string")  # types of columns, as Arrow writes them
COUNTS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
# What columns are usually called, where their types leave a choice.
IMAGES, CLIPS = ("image", "img", "file_name", "path"), ("video", "clip", "video_name", "file_name", "path")
LABELS = ("label", "labels", "class", "cls", "tag", "category", "target")
ROWS = 10_000  # that are looked at together
NO_COLUMNS = "--image-column and --label-column are for parquet, Arrow and hf: data, and {} is none; leave them out"


def open_data(args, flip, beside=None):
    """The LabelledItems that --data-path and its companions name, in files or in rows. Raises UserError.

    beside: the path of a second data set, which may be what has the columns that are named.
    """
    if is_table(args.data_path):
        return open_table(args, flip)
    _check_columns(args, args.data_path, beside)
    return open_files(args, flip)


def open_any(path, args, flag, beside=None):
    """The LabelledItems of a data set, not mirrored, or of a flat folder without a CSV, whose only class is None.

    args: --data-path's companions. flag: what the command calls the path. beside: as of open_data. Raises UserError,
    which names the flag.
    """
    with called(flag):
        if not is_flat(path) or args.csv or is_table(path):
            return open_data(Namespace(**{**vars(args), "data_path": path}), flip=False, beside=beside)
        _check_columns(args, path, beside)
        try:
            paths = flat_files(path, args.video)
        except UserError as error:
            raise UserError(f"--data-path {error}{'' if args.video else '; --video is for clips'}") from None
    length = args.clip_len if args.video else None
    labels = [0] * len(paths)
    return LabelledFiles(paths, labels, [None], args.image_size, length, args.frame_interval, False, args.global_seed)


def _check_columns(args, path, beside):
    """Raise UserError if columns are named and neither this path, which is no table, nor the one beside has any."""
    if (args.image_column or args.label_column) and not (beside and is_table(beside)):
        raise UserError(NO_COLUMNS.format(f"--data-path {printable(path)}"))


@contextmanager
def called(flag):
    """Within it, what is wrong with --data-path is told of this flag."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--data-path", flag)) from None


def is_table(data_path):
    """Whether a data path is `hf:NAME`, what save_to_disk wrote, or a folder of parquet or Arrow files.

    A folder with class folders or clips is none, whatever lies beside them.
    """
    if str(data_path).startswith(hub.DATA):
        return True
    if not os.path.isdir(data_path):
        return False
    if _is_saved(data_path):
        return True
    folders, links, names, _ = entries(data_path)
    if folders + links == ["data"]:  # as the hub lays out its repositories
        names = entries(os.path.join(data_path, "data"))[2]
    elif folders + links or any(name.lower().endswith(CLIP_EXTENSIONS) for name in names):
        return False
    return any(name.endswith(ENDS) for name in names)


def _is_saved(folder):
    """Whether save_to_disk of the package `datasets` wrote this folder."""
    whole, splits = ("state.json", "dataset_info.json"), ("dataset_dict.json",)
    return any(all(os.path.isfile(os.path.join(folder, name)) for name in names) for names in (whole, splits))


def open_table(args, flip):
    """The TableItems that --data-path names. Raises UserError."""
    if args.csv:
        raise UserError("--csv labels a flat folder of clips, and of parquet, Arrow and hf: data --label-column does")
    name, rows = load(str(args.data_path))
    media = _media_column(rows.features, args.image_column, args.video)
    label = _label_column(rows.features, args.label_column, media)
    labels, class_names = _labels(rows, label)
    clip_len = args.clip_len if args.video else None
    items = TableItems(
        rows, media, name, labels, class_names, args.image_size, clip_len, args.frame_interval, flip, args.global_seed
    )
    items.notes = [
        f"{len(rows)} rows of {printable(name)}, out of its columns {printable(media)} and {printable(label)}",
        f"{len(class_names)} classes: {some(class_names, 10)}",
    ]
    return items


def load(data_path):
    """(name, datasets.Dataset) of a split: of `hf:NAME:split`, or else of the one called train. Raises UserError."""
    told = f"--data-path {printable(data_path)}"
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError as error:  # a folder called datasets is a package too, an empty one
        raise UserError(f"{told} needs the package datasets ({reason(error)}): pip install datasets") from None
    name, split = data_path, None
    if data_path.startswith(hub.DATA):
        name, split = hub.data_set(data_path)
    split = split or "train"
    try:
        if _is_saved(name):
            rows = load_from_disk(name)
            if isinstance(rows, DatasetDict):
                if split not in rows:
                    raise ValueError(f"Unknown split {split!r}. Should be one of {list(rows)}.")
                rows = rows[split]
        else:
            rows = load_dataset(name, split=split)
    except Exception as error:  # it reads formats, hubs and the network, and raises what each of them does
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why = reason(error) if cause is error else f"{reason(error)}: {reason(cause)}"
        raise UserError(f"{told} cannot be loaded ({why}); see datasets/README.md for what can") from None
    if not len(rows):
        raise UserError(f"{told} has no rows in its split {split}")
    return name, rows


class TableItems(LabelledItems):
    """LabelledItems of a row each.

    rows: a datasets.Dataset. media: its column of encoded images or clips, as bytes, a path, or a record of both.
    name: of the data set; a folder's is also where paths begin.
    """

    def __init__(self, rows, media, name, labels, class_names, size, clip_len, frame_interval, flip, seed):
        super().__init__(labels, class_names, size, clip_len, frame_interval, flip, seed)
        self.rows = rows.select_columns([media]).with_format("arrow")
        self.name = name
        self.folder = name if os.path.isdir(name) else ""

    def path(self, index):
        return f"{self._row(index)} of {self.name}"

    def _row(self, index):
        return f"{self.rows.split or 'row'}[{index}]"

    def _source(self, index):
        held = self.rows[int(index)].column(0)[0].as_py()
        if isinstance(held, dict):
            held = held["path"] if held["bytes"] is None else held["bytes"]
        return os.path.join(self.folder, held) if isinstance(held, str) else held

    def _known(self):
        """(bytes, path) of each row's file, without reading it: -1 where only the path says where it is."""
        import pyarrow as pa
        import pyarrow.compute as pc

        known = []
        for part in self.rows.iter(batch_size=ROWS):
            column = part.column(0)
            held = path = pa.nulls(len(column), pa.string())
            if pa.types.is_struct(column.type):
                held, path = (pc.struct_field(column, name) for name in ("bytes", "path"))
            elif str(column.type) in BYTES:
                held = column
            else:
                path = column
            sizes, paths = pc.fill_null(pc.binary_length(held), -1), pc.fill_null(path, "")
            known += zip(sizes.to_pylist(), paths.to_pylist(), strict=True)
        return known

    def digest(self):
        """Of each row's label, and size and name of its file: moved or downloaded again, it is the same data."""
        known = self._known()
        names = [b"%d %s" % (size, os.fsencode(os.path.basename(path))) for size, path in known]
        outside = [os.path.join(self.folder, path) for size, path in known if size < 0 and path]
        return resume.data_digest(names, self.labels, outside)

    def records(self, root):
        version, found = self._version(), []
        for index, (label, (size, path)) in enumerate(zip(self.labels, self._known(), strict=True)):
            told = (size, version) if size >= 0 or not path else size_and_time(os.path.join(self.folder, path))
            found.append((os.fsencode(f"{self._row(index)} {os.path.basename(path)}"), *told, label))
        return found

    def _version(self):
        """When a folder's tables were changed, in ns, and of other data a number out of its fingerprint."""
        tables = [path for path in Path(self.folder).rglob("*") if path.suffix in ENDS] if self.folder else []
        if tables:
            return max(path.stat().st_mtime_ns for path in tables)
        return int.from_bytes(hashlib.blake2b(self.rows._fingerprint.encode(), digest_size=7).digest(), "big")


def _is_file(kind):
    """Whether a type is that of the record that holds a file's bytes or its path."""
    return str(kind).startswith("struct") and {field.name for field in kind} == {"bytes", "path"}


def _media_column(features, named, clips):
    """The column of images, or of clips: as named, else of the type that says so, else of one that can hold them."""
    meant, other = ("Video", "Image") if clips else ("Image", "Video")
    kinds = {field.name: field.type for field in features.arrow_schema if type(features[field.name]).__name__ != other}
    can_hold = [name for name, kind in kinds.items() if _is_file(kind) or str(kind) in BYTES + TEXTS]
    ranked = [
        [name for name in can_hold if type(features[name]).__name__ == meant],
        [name for name in can_hold if _is_file(kinds[name])],
        [name for name in can_hold if str(kinds[name]) in BYTES],
        [name for name in can_hold if name.lower() in (CLIPS if clips else IMAGES)],
    ]
    return _choose("--image-column", "clips" if clips else "images", named, ranked, features, can_hold)


def _label_column(features, named, media):
    """The column of classes: as named, else of the type that names them, else of what such columns are called."""
    kinds = {field.name: str(field.type) for field in features.arrow_schema if field.name != media}
    can_hold = [name for name, kind in kinds.items() if kind in TEXTS + COUNTS]
    ranked = [
        [name for name in can_hold if type(features[name]).__name__ == "ClassLabel"],
        [name for name in can_hold if name.lower() in LABELS],
    ]
    return _choose("--label-column", "labels", named, ranked, features, can_hold)


def _choose(flag, what, named, ranked, columns, can_hold):
    """The named column, or the only one of the first list that holds any. Raises UserError."""
    has = f"the data has {some(list(columns), 20)}"
    if named is not None:
        if named not in can_hold:
            fault = "its type does not" if named in columns else "there is no such column"
            raise UserError(f"{flag} {named} holds no {what}: {fault}; {has}")
        return named
    found = next((names for names in ranked if names), [])
    if len(found) != 1:
        seems = f"several columns may hold {what}, {some(found, 20)}" if found else f"no column seems to hold {what}"
        raise UserError(f"{seems}: name one by {flag}; {has}")
    return found[0]


def _labels(rows, column):
    """(labels, class names): of a ClassLabel its own, of texts and numbers the sorted ones. Raises UserError."""
    values = rows.select_columns([column]).with_format("arrow")[:].column(0).to_pylist()
    names = getattr(rows.features[column], "names", None)
    classes = range(len(names)) if names else sorted({value for value in values if value not in (None, "")})
    index = {value: label for label, value in enumerate(classes)}
    without = [str(row) for row, value in enumerate(values) if value not in index]
    if without:
        raise UserError(
            f"{len(without)} of {len(values)} rows have no label in the column {printable(column)}, "
            f"row {some(without, 5)}: take them out, or give another split or --label-column"
        )
    return [index[value] for value in values], names or [str(value) for value in classes]
