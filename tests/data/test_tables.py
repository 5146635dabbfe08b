"""Rows of parquet, Arrow and Hugging Face data sets: the items that files would be, found, refused and resumed."""

import io
import itertools
import os
import pickle
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from EqM.data import files, latent_cache, loader, tables
from EqM.run.errors import UserError
from helpers import assert_same_checkpoint, labelled_files, train_args

pytest.importorskip("datasets.load")
pa = pytest.importorskip("pyarrow")

import pyarrow.parquet  # noqa: E402

import datasets  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Where `datasets` keeps what it converts, for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        datasets.disable_progress_bars()
        yield


def settings(data_path, **more):
    """Arguments as train.py's, for items of 16 pixels."""
    given = {
        "data_path": str(data_path), "csv": None, "image_column": None, "label_column": None, "video": False,
        "clip_len": 4, "frame_interval": None, "image_size": 16, "global_seed": 0,
    }  # fmt: skip
    return Namespace(**{**given, **more})


def columns_of(folder, clips=False):
    """(files' contents with names, class names) of a data folder, row by row."""
    paths, labels, names = files.find_files(folder, clips)
    return [{"bytes": Path(path).read_bytes(), "path": Path(path).name} for path in paths], [names[i] for i in labels]


def typed(items, labels, video):
    kinds = {"image": datasets.Image(), "class": datasets.ClassLabel(names=sorted(set(labels)))}
    kinds["image"] = datasets.Video() if video else kinds["image"]
    return datasets.Dataset.from_dict({"image": items, "class": labels}, features=datasets.Features(kinds))


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)


LAYOUTS = ("parquet", "parquet in parts", "hub", "bytes", "paths", "typed", "arrow", "saved", "saved splits", "hf:")


def lay_out(root, layout, folder, clips=False):
    """What --data-path may name, holding the items of a data folder in a layout of tables."""
    items, labels = columns_of(folder, clips)
    if layout == "parquet in parts":
        for part in (0, 1):
            half = slice(part * len(items) // 2, (part + 1) * len(items) // 2)
            write_parquet(root / f"train-{part:05d}-of-00002.parquet", image=items[half], label=labels[half])
    elif layout == "hub":
        write_parquet(root / "data" / "train-00000-of-00001.parquet", image=items, label=labels)
        write_parquet(root / "data" / "test-00000-of-00001.parquet", image=items[:1], label=labels[:1])
    elif layout == "bytes":
        write_parquet(root / "x.parquet", picture=[item["bytes"] for item in items], label=labels, n=labels)
    elif layout == "paths":
        paths, _, _ = files.find_files(folder, clips)
        write_parquet(root / "x.parquet", file_name=[os.path.relpath(path, root) for path in paths], label=labels)
    elif layout == "typed":
        root.mkdir()
        typed(items, labels, clips).to_parquet(root / "x.parquet")
    elif layout == "arrow":
        typed(items, labels, clips).save_to_disk(root / "saved")
        shutil.move(next((root / "saved").glob("*.arrow")), root / "x.arrow")
        shutil.rmtree(root / "saved")
    elif layout == "saved":
        typed(items, labels, clips).save_to_disk(root)
    elif layout == "saved splits":
        datasets.DatasetDict(train=typed(items, labels, clips), test=typed(items[:1], labels[:1], clips)).save_to_disk(
            root
        )
    elif layout == "hf:":
        write_parquet(root / "validation.parquet", image=items, label=labels)
        return f"hf:{root}:validation"
    else:
        write_parquet(root / "x.parquet", image=items, label=labels)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("clips", [False, True])
def test_rows_are_the_items_that_their_files_are(tmp_path, image_folder, clip_folder, layout, clips):
    folder = clip_folder if clips else image_folder
    interval = 1 if clips else None
    data_path = lay_out(tmp_path / "set", layout, folder, clips)
    items = tables.open_data(settings(data_path, video=clips, frame_interval=interval), flip=True)
    expected = labelled_files(folder, clips, frame_interval=interval)
    assert items.class_names == expected.class_names and items.labels.tolist() == expected.labels.tolist()
    for key in itertools.product(range(2), range(len(expected))):
        (ours, label, bad), (theirs, *rest) = items[key], expected[key]
        assert torch.equal(ours, theirs) and [label, bad] == rest


@pytest.fixture
def parquet(tmp_path, image_folder):
    """A folder of one parquet file with the six small images."""
    return lay_out(tmp_path / "set", "parquet", image_folder)


def test_a_moved_table_goes_on_exactly(run_script, parquet, tmp_path):
    def train(folder, results, *more):
        result = run_script("train", *train_args(folder, results, "--use-bf16", "--auto-resume", *more))
        assert result.code == 0, result.err
        return result.err + result.out

    train(parquet, tmp_path / "whole", "--max-steps", 4)
    train(parquet, tmp_path / "parts")
    shutil.move(parquet, tmp_path / "moved")
    assert "exactly" in train(tmp_path / "moved", tmp_path / "parts", "--max-steps", 4)
    ends = [next((tmp_path / name).glob("*/checkpoints/0000004.pt")) for name in ("whole", "parts")]
    assert_same_checkpoint(*ends)


def test_other_items_labels_or_order_are_other_data(tmp_path, image_folder):
    items, labels = columns_of(image_folder)
    other = [{**items[0], "bytes": items[0]["bytes"] + b"x"}, *items[1:]]
    renamed = [{**items[0], "path": "else.png"}, *items[1:]]
    variants = [(items, labels), (items, labels[::-1]), (items[::-1], labels), (other, labels), (renamed, labels)]
    digests = []
    for n, (images, classes) in enumerate([*variants, variants[0]]):
        write_parquet(tmp_path / str(n) / "x.parquet", image=images, label=classes)
        digests.append(tables.open_data(settings(tmp_path / str(n)), flip=True).digest()["digest"])
    assert digests[0] == digests[-1] and len(set(digests)) == len(variants)


def test_bad_rows_are_named_by_split_and_row_and_replaced(tmp_path, image_folder):
    items, labels = columns_of(image_folder)
    items[1], items[4] = {"bytes": b"nothing", "path": None}, {"bytes": None, "path": None}
    write_parquet(tmp_path / "set" / "x.parquet", image=items, label=labels)
    rows, told = tables.open_data(settings(tmp_path / "set"), flip=False), []
    pixels, labels, bad = next(loader.read(rows, [[(0, index) for index in range(6)]], 0, False))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and bad.tolist() == [-1, 1, -1, -1, 4, -1]
    assert torch.equal(pixels[1], pixels[2]) and torch.equal(pixels[4], pixels[5])
    loader.BadFiles(rows, 0.5, told.append).note(bad)
    assert [size for _, size, _, _ in rows.records(tmp_path / "set")] == [len(i["bytes"] or b"") or -1 for i in items]
    where = f"of {tmp_path / 'set'} does not decode; another file of its class stands in"
    assert told == [f"train[1] {where}", f"train[4] {where}"]


def test_workers_share_the_mapped_rows_and_change_nothing(parquet):
    rows = tables.open_data(settings(parquet), flip=True)
    assert rows.rows.cache_files and len(pickle.dumps(rows)) < 5000, "the rows themselves do not travel"
    keys = [[(epoch, index) for index in range(6)] for epoch in range(2)]
    alone, shared = (list(loader.read(rows, keys, workers, False)) for workers in (0, 1))
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_nothing_is_decoded_before_an_item_is_asked_for(parquet, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *given, **more: pytest.fail("an image was opened"))
    rows = tables.open_data(settings(parquet), flip=True)
    rows.digest(), rows.records(parquet)
    assert len(rows) == 6


def png():
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    return file.getvalue()


PICTURES = {"image": [png()] * 3}


@pytest.mark.parametrize(
    ("columns", "named", "names", "labels"),
    [
        ({**PICTURES, "label": [10, 2, 2]}, {}, ["2", "10"], [1, 0, 0]),
        ({**PICTURES, "cls": ["b", "a", "b"], "label_text": ["x", "y", "x"]}, {}, ["a", "b"], [1, 0, 1]),
        ({**PICTURES, "fine": [True, False, True]}, {"label_column": "fine"}, ["False", "True"], [1, 0, 1]),
        ({**PICTURES, "mask": [b""] * 3, "tag": list("xyx")}, {"image_column": "image"}, ["x", "y"], [0, 1, 0]),
    ],
)
def test_columns_are_found_or_named(tmp_path, columns, named, names, labels):
    write_parquet(tmp_path / "set" / "x.parquet", **columns)
    rows = tables.open_data(settings(tmp_path / "set", **named), flip=False)
    assert (rows.class_names, rows.labels.tolist(), rows[0, 0][2]) == (names, labels, -1)


@pytest.mark.parametrize(
    ("columns", "named", "told"),
    [
        (PICTURES, {}, "no column seems to hold labels: name one by --label-column; the data has image"),
        ({"label": [1, 2]}, {}, "no column seems to hold images: name one by --image-column; the data has label"),
        ({**PICTURES, "mask": [b""] * 3, "label": [1, 2, 3]}, {}, "several columns may hold images, image, mask: name"),
        ({**PICTURES, "label": [1, 2, 3], "cls": [1, 2, 3]}, {}, "several columns may hold labels, label, cls: name"),
        (PICTURES, {"image_column": "picture"}, "--image-column picture holds no images: there is no such column"),
        ({**PICTURES, "x": [0.5] * 3}, {"label_column": "x"}, "--label-column x holds no labels: its type does not"),
        ({**PICTURES, "label": ["a", None, ""]}, {}, "2 of 3 rows have no label in the column label, row 1, 2"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.string())}, {}, "no rows|cannot be loaded"),
        ({**PICTURES, "label": [1, 2, 3]}, {"csv": "x.csv"}, "--csv labels a flat folder of clips"),
    ],
)
def test_columns_that_cannot_be_told_are_one_line(tmp_path, columns, named, told):
    write_parquet(tmp_path / "set" / "x.parquet", **columns)
    with pytest.raises(UserError, match=told) as error:
        tables.open_data(settings(tmp_path / "set", **named), flip=False)
    assert "\n" not in str(error.value)


def test_a_class_label_may_lack_items_but_an_item_no_class(tmp_path, image_folder):
    items, _ = columns_of(image_folder)
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["z", "a", "m"])})
    for labels in ([0, 0, 0, 2, 2, 2], [0, 0, 0, 2, 2, -1]):
        rows = datasets.Dataset.from_dict({"image": items, "label": labels}, features=kinds)
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        rows.save_to_disk(tmp_path / "set")
        if -1 in labels:
            with pytest.raises(UserError, match="1 of 6 rows have no label"):
                tables.open_data(settings(tmp_path / "set"), flip=False)
        else:
            found = tables.open_data(settings(tmp_path / "set"), flip=False)
            assert found.class_names == ["z", "a", "m"] and found.labels.tolist() == labels


def test_a_name_on_the_hub_is_asked_for_by_name_and_split(parquet, monkeypatch):
    here, asked = tables.open_data(settings(parquet), flip=True), []
    rows = datasets.load_dataset(str(parquet), split="train")

    def from_hub(name, split):
        asked.append((name, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    for text in ("hf:user/set", "hf:user/set:validation", "hf:set:train[:10%]"):
        there = tables.open_data(settings(text), flip=True)
        assert there.digest() == here.digest() and text.split(":")[1] in there.path(2)
        known = latent_cache.files_of(there, text)
        assert known["name"][2] == b"train[2] 2.png" and len(set(known["time"])) == 1 and known["time"][0] > 0
    assert asked == [("user/set", "train"), ("user/set", "validation"), ("set", "train[:10%]")]


@pytest.mark.parametrize(
    ("data_path", "told"),
    [
        ("hf:nobody/nothing", "cannot be loaded"),
        ("hf:", "cannot be loaded"),
        ("hf:{set}:nope", "Unknown split"),
        ("{damaged}", "cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(run_script, parquet, tmp_path, data_path, told):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "x.parquet").write_bytes((parquet / "x.parquet").read_bytes()[:500])
    result = run_script("train", *train_args(data_path.format(set=parquet, damaged=damaged), tmp_path / "results"))
    assert result.code == 2 and told in result.err.splitlines()[-1] and "Traceback" not in result.err
    assert len([line for line in result.err.splitlines() if "error" in line]) == 1
    assert not (tmp_path / "results").exists()


def test_a_missing_package_is_one_line(run_script, parquet, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run_script("train", *train_args(parquet, tmp_path / "results"))
    assert result.code == 2 and result.err.count("\n") == 1 and "pip install datasets" in result.err


def test_columns_and_a_cache_are_one_line(run_script, tmp_path):
    words = train_args("x", tmp_path / "results", "--label-column", "y")
    result = run_script("train", "--latents", *words[1:])
    assert result.code == 2 and result.err.count("\n") == 1 and "settled when --latents was made" in result.err


def test_folders_of_files_stay_what_they_were(tmp_path, image_folder, clip_folder):
    for folder, clips in ((image_folder, False), (clip_folder, True)):
        copy = shutil.copytree(folder, tmp_path / f"classes{clips}")
        (copy / "labels.parquet").write_bytes(b"")
        assert isinstance(tables.open_data(settings(copy, video=clips), flip=True), files.LabelledFiles)
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("labels.parquet", "x.mp4"):
        (flat / name).write_bytes(b"")
    assert not tables.is_table(flat) and not tables.is_table(tmp_path / "nothing")
    with pytest.raises(UserError, match="--image-column and --label-column are for parquet"):
        tables.open_data(settings(image_folder, label_column="x"), flip=True)


def test_columns_are_of_whichever_of_two_data_sets_is_a_table(run_script, tmp_path, image_folder):
    items, labels = columns_of(image_folder)
    write_parquet(tmp_path / "set" / "x.parquet", scan=items, mask=[b""] * len(items), kind=labels)
    table = tmp_path / "set"
    for data, held_out in ((image_folder, table), (table, image_folder), (table, table)):
        flags = ["--val-path", held_out, "--val-every", 1, "--image-column", "scan", "--label-column", "kind"]
        result = run_script("train", *train_args(data, tmp_path / "results", *flags, "--max-steps", 1))
        assert result.code == 0 and "Val Loss" in result.out, result.err
    result = run_script("train", *train_args(image_folder, tmp_path / "none", "--val-path", image_folder, *flags[4:]))
    assert result.code == 2 and result.err.count("\n") == 1 and "is none; leave them out" in result.err


def test_latents_of_rows_are_those_of_files_and_are_encoded_again_when_the_table_changes(
    run_script, parquet, image_folder, tiny_vae, tmp_path
):
    def encode(data_path, out):
        words = ["--data-path", data_path, "--out", out, "--vae", tiny_vae, "--image-size", 16, "--num-workers", 0]
        result = run_script("extract_latents", *words, "--device", "cpu")
        assert result.code == 0, result.err
        return result.out

    encode(image_folder, tmp_path / "of files")
    assert '"encoded": 6' in encode(parquet, tmp_path / "of rows")
    args = settings(None, vae=tiny_vae, flip=True, clip_len=16)
    caches = [latent_cache.LatentCache(tmp_path / name, args) for name in ("of files", "of rows")]
    for key in itertools.product(range(2), range(6)):
        (one, *rest), (other, *others) = (cache[key] for cache in caches)
        assert torch.equal(one, other) and rest == others
    assert '"encoded": 0' in encode(parquet, tmp_path / "of rows")
    assert np.load(tmp_path / "of rows" / "files.npy")["name"][2] == b"train[2] 2.png"
    os.utime(parquet / "x.parquet", ns=(7, 7))
    assert '"encoded": 6' in encode(parquet, tmp_path / "of rows")
