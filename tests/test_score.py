"""score.py as its command line runs it: what is scored, under which class, how two folders are told apart."""

import csv
import re
import shutil
from argparse import Namespace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from EqM import score
from EqM.data import tables
from EqM.pipeline import EqMPipeline
from helpers import CLIP_ARGS, IMAGE_ARGS, save_checkpoint

OPEN = {"csv": None, "image_column": None, "label_column": None, "frame_interval": None, "global_seed": 0}
PRECISIONS = {"fp32": ([], 1e-4), "bf16": (["--use-bf16"], 0.05), "fp16": (["--use-amp"], 0.01)}


@pytest.fixture
def run(run_script, tmp_path):
    """run(args of the checkpoint, data, *flags): the outcome, with .rows of scores.csv."""

    def run(args, data, *flags, folder="scores"):
        ckpt = save_checkpoint(tmp_path / "x.pt", args)
        words = ["--ckpt", ckpt, "--data-path", data, "--folder", tmp_path / folder, "--num-workers", 0]
        result = run_script("score", *words, "--device", "cpu", *flags)
        result.rows = []
        if result.code == 0:
            with open(tmp_path / folder / "scores.csv", encoding="utf-8") as file:
                result.rows = list(csv.DictReader(file))
        return result

    return run


def by_hand(folder, ckpt, rows):
    """Energy or norm of each row's file from the network itself, at time 1, as pixels in FP32."""
    pipe = EqMPipeline.from_pretrained(ckpt, device="cpu")
    args = Namespace(image_size=8, video=len(pipe.model.input_shape) == 4, clip_len=4, **OPEN)
    dataset = tables.open_any(folder, args, "--data-path")
    places = {dataset.path(i): i for i in range(len(dataset))}
    for row in rows:
        x = dataset.read(places[str(folder / row["file"])], 0)[None] / 127.5 - 1
        y = [pipe.model.num_classes if row["class"] == "none" else pipe.class_names.index(row["class"])]
        with torch.set_grad_enabled(pipe.model.ebm != "none"):
            told = pipe.model(x, torch.ones(1), torch.tensor(y), get_energy=pipe.model.ebm != "none")
        yield told.norm().item() if pipe.model.ebm == "none" else told[1].item()


@pytest.mark.parametrize("ebm", ["none", "dot"])
@pytest.mark.parametrize("kind", ["images", "clips"])
def test_each_file_has_its_energy_or_norm_under_its_own_class(run, image_folder, clip_folder, tmp_path, kind, ebm):
    args, data = (IMAGE_ARGS, image_folder) if kind == "images" else (CLIP_ARGS, tmp_path / "clips")
    if kind == "clips":  # under names the model knows
        for ours, theirs in (("cat", "jump"), ("dog", "run")):
            shutil.copytree(clip_folder / theirs, data / ours)
    for flags, rel in PRECISIONS.values():
        result = run({**args, "ebm": ebm}, data, *flags, *(["--video"] if kind == "clips" else []))
        assert result.code == 0, result.err
        assert {row["class"] for row in result.rows} == {"cat", "dog"}
        assert all(row["file"].startswith(row["class"]) for row in result.rows)
        expected = list(by_hand(data, tmp_path / "x.pt", result.rows))
        assert [float(row["score"]) for row in result.rows] == pytest.approx(expected, rel=rel, abs=rel)
    assert ("energy" if ebm == "dot" else "norm of the field") in result.out
    for name in ("histogram.png", "extremes.png"):
        with Image.open(tmp_path / "scores" / name) as picture:
            assert picture.width > 96


@pytest.fixture
def flat_folder(tmp_path):
    """Three images in a folder itself, and a file that is none."""
    folder = tmp_path / "flat"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_two_folders_are_told_apart_under_no_class_unless_one_is_named(run, image_folder, flat_folder):
    plain = run(IMAGE_ARGS, image_folder, "--against", flat_folder, "--batch-size", 2)
    assert plain.code == 0, plain.err
    sides = [[float(row["score"]) for row in plain.rows if row["folder"] == str(folder)]
             for folder in (image_folder, flat_folder)]  # fmt: skip
    wins = [(other > one) + (other == one) / 2 for one, other in product(*sides)]
    assert f"AUROC {np.mean(wins):.2f}" in plain.out and len(sides[1]) == 3
    assert {row["class"] for row in plain.rows} == {"none"}

    named = run(IMAGE_ARGS, image_folder, "--against", flat_folder, "--class", "cat", folder="named")
    assert {row["class"] for row in named.rows} == {"cat"}
    assert [row["score"] for row in named.rows] != [row["score"] for row in plain.rows]

    summed = run(IMAGE_ARGS, image_folder, "--class", "cat*0.5+dog*0.5", folder="summed")
    assert summed.code == 0, summed.err
    assert {row["class"] for row in summed.rows} == {"cat*0.5+dog*0.5"}
    assert [row["score"] for row in summed.rows] != [row["score"] for row in named.rows[:6]]


def test_a_class_called_none_is_not_taken_for_no_class(tmp_path):
    names = ["cat", "none", "owl"]
    pipe = EqMPipeline.from_pretrained(save_checkpoint(tmp_path / "x.pt", IMAGE_ARGS, names=names), device="cpu")
    flat, classed = Namespace(class_names=[None]), Namespace(class_names=["none", "cat"])
    for dataset, label, against, expected in [
        (flat, None, None, [3]), (flat, "none", None, [1]), (classed, None, None, [1, 0]), (classed, None, "x", [3, 3]),
    ]:  # fmt: skip
        assert score.labels_of(pipe, dataset, Namespace(label=label, against=against), "data") == expected


def test_the_weights_that_judge_are_chosen_by_name(run, flat_folder):
    assert len(run(IMAGE_ARGS, flat_folder, "--weights", "model").rows) == 3
    unknown = run(IMAGE_ARGS, flat_folder, "--weights", "ema-0.5", folder="other")
    assert unknown.code == 2 and "--weights ema-0.5" in unknown.err


def test_a_samplers_folder_is_its_samples(run, flat_folder, monkeypatch):
    monkeypatch.setattr(score, "draw_histogram", lambda *what: None)
    for path in [*flat_folder.glob("*.png")]:
        shutil.copy(path, flat_folder / f"00000{path.name}")
        path.unlink()
    shutil.copy(flat_folder / "000000.png", flat_folder / "grid.png")
    (flat_folder / ".ipynb_checkpoints").mkdir()
    assert [row["file"] for row in run(IMAGE_ARGS, flat_folder).rows][-1] == "grid.png", "of anybody's folder it counts"
    (flat_folder / "samples.json").write_text("{}")
    assert [row["file"] for row in run(IMAGE_ARGS, flat_folder).rows] == [f"00000{i}.png" for i in range(3)]


def test_tables_are_scored_as_the_folder_they_were_made_of(run, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "draw_histogram", lambda *what: None)
    datasets = pytest.importorskip("datasets")
    files = sorted(image_folder.glob("*/*.png"))
    rows = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in files],
            "label": [path.parent.name for path in files]}  # fmt: skip
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")
    table, folder = (
        run(IMAGE_ARGS, data, folder=name) for name, data in (("a", tmp_path / "rows"), ("b", image_folder))
    )
    assert table.code == 0, table.err
    assert [(row["class"], row["score"]) for row in table.rows] == [(row["class"], row["score"]) for row in folder.rows]
    for data, other in ((tmp_path / "rows", image_folder), (image_folder, tmp_path / "rows")):
        both = run(IMAGE_ARGS, data, "--against", other, "--image-column", "image", "--label-column", "label")
        assert both.code == 0 and "AUROC 0.50" in both.out, both.err


def test_a_score_depends_on_no_batch(run, image_folder):
    one, all_at_once = (run(IMAGE_ARGS, image_folder, "--batch-size", n, folder=str(n)) for n in (1, 64))
    values = [[float(row["score"]) for row in each.rows] for each in (one, all_at_once)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_the_area_counts_pairs_and_ties_half():
    rng = np.random.default_rng(1)
    data, others = rng.integers(0, 5, 40), rng.integers(1, 7, 30)
    pairs = np.mean([(b > a) + (a == b) / 2 for a, b in product(data, others)])
    assert score.auroc(data, others) == pytest.approx(pairs) and score.auroc(others, data) == pytest.approx(1 - pairs)
    assert score.auroc(data, data) == 0.5 and score.auroc(data, data + 10) == 1.0


def test_a_file_that_does_not_decode_is_named_and_has_no_score(run, flat_folder):
    (flat_folder / "1.png").write_bytes(b"nothing")
    result = run(IMAGE_ARGS, flat_folder)
    assert result.code == 0 and "1.png does not decode" in result.err
    assert [row["file"] for row in result.rows] == ["0.png", "2.png"]
    few = run(IMAGE_ARGS, flat_folder, "--max-bad-fraction", 0)
    assert few.code == 0, "one bad file is always allowed, as in training"


@pytest.mark.parametrize(
    ("data", "flags", "words"),
    [
        ("flat", ["--class", "emu"], "--class emu is no class"),
        ("flat", ["--class", "cat+emu"], "--class cat+emu: 'emu' in 'cat+emu' is no class"),
        ("flat", ["--class", "all"], "--class all is no class"),
        ("classes", [], "classes: emu is no class of this checkpoint, which has 3: cat, dog, owl; --class none judges"),
        ("all", [], "all is no class"),
        ("nowhere", [], "nowhere is not a folder"),
        ("empty", [], "--data-path .*empty holds no images"),
        ("flat", ["--against", "/nowhere"], "--against /nowhere is not a folder"),
        ("flat", ["--image-column", "x"], "--image-column and --label-column are for parquet"),
        ("flat", ["--folder", "/dev/null/scores"], "--folder /dev/null/scores cannot be made"),
        ("flat", ["--video"], "contradicts the checkpoint"),
        ("flat", ["--frame-interval", 2], "--frame-interval is for clips"),
    ],
)
def test_what_cannot_be_scored_is_one_line(run, flat_folder, tmp_path, data, flags, words):
    (tmp_path / "empty").mkdir()
    shutil.copytree(flat_folder, tmp_path / "classes" / "emu")
    shutil.copytree(flat_folder, tmp_path / "all" / "all")
    result = run(IMAGE_ARGS, tmp_path / data, *flags)
    assert result.code == 2 and result.err.count("\n") == 1 and re.search(words.replace("+", r"\+"), result.err), (
        result.err
    )
    assert not (tmp_path / "scores").exists()


def test_a_score_that_is_not_finite_is_one_line(run, flat_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(EqMPipeline, "score", lambda self, x, y: torch.full((len(x),), float("nan")))
    result = run(IMAGE_ARGS, flat_folder, "--use-amp")
    assert result.code == 2 and re.search("not finite in FP16; try FP32", result.err)
