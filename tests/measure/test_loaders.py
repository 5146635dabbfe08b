"""The benchmark of loaders: what it compares reads the same, and every source has its row."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from EqM.data import latent_cache
from EqM.measure import benchmark, loaders
from helpers import labelled_files


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"PICTURES": 3, "LATENTS": 5, "SECONDS": 0.01}.items():
        monkeypatch.setattr(loaders, name, value)


def test_image_folder_shows_the_pictures_that_ours_does(image_folder):
    theirs, ours = loaders.image_folder(image_folder, 16), labelled_files(image_folder, flip=False)
    for index in range(len(ours)):
        (picture, label), (pixels, expected, _) = theirs[index], ours[0, index]
        pixels = pixels / 127.5 - 1
        assert label == expected and pixels.std() > 0.1
        assert any(torch.allclose(picture, each, atol=1e-5) for each in (pixels, pixels.flip(-1)))


@pytest.mark.parametrize("video", [False, True])
def test_one_file_an_item_holds_the_latents_of_the_cache(tmp_path, monkeypatch, video):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--image-size", "32", "--device", "cpu"])
    args = loaders.settled(benchmark.parse_args(), video)
    folder, files = loaders.make_latents(tmp_path, args)
    cache, files = latent_cache.LatentCache(folder, args), loaders.OneFileAnItem(files)
    cache.flip = False
    assert len(cache) == len(files) == loaders.LATENTS
    for index in range(len(files)):
        (moments, expected, _), (drawn, label) = cache[0, index], files[index]
        assert drawn.shape == (1, 4, *((4,) if video else ()), 4, 4) and label.item() == expected
        assert np.allclose(drawn[0], moments[0], rtol=1e-3, atol=1e-6)


def test_one_command_writes_a_row_for_each_source_and_recipe(run_script, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
    words = "--work loader --image-size 32 --batch-size 2 --rounds 2 --device cpu --video"
    result = run_script("benchmark", *words.split(), "--data-path", clip_folder, "--out", tmp_path)
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "benchmark.json").read_text())
    assert {(row["read"], row["recipe"]) for row in rows} == {
        ("images", "ours"), ("images", "ImageFolder"), ("clips", "ours"),
        *((f"cached {kind}", recipe) for kind in ("images", "clips") for recipe in ("ours", "a file an item")),
    }  # fmt: skip
    assert all(row["items/s"] > 0 and row["items/s and core"] > 0 for row in rows)
    ours, theirs, alone = rows[:3]
    assert ours["x other"] * theirs["x other"] == pytest.approx(1) and alone["x other"] is None
    text = (tmp_path / "benchmark.md").read_text()
    assert text in result.out and text.count("\n| cached ") == 4 and not (tmp_path / "benchmark.png").exists()
