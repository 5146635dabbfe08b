"""Files of samples and the contact sheet."""

import numpy as np
import pytest
from PIL import Image

from EqM.data import media


def clip(T=4, H=16, W=16):
    """Frames that fade from dark to bright, each with a red left half."""
    frames = np.zeros((T, H, W, 3), np.uint8)
    frames += np.linspace(40, 200, T).astype(np.uint8)[:, None, None, None]
    frames[:, :, : W // 2, 0] = 250
    return frames


@pytest.mark.parametrize(("suffix", "tolerance"), [("gif", 12), ("mp4", 40)])
def test_clips_round_trip(tmp_path, suffix, tolerance):
    path = tmp_path / f"000000.{suffix}"
    media.save_sample(path, clip(), fps=8)
    read = media.load_sample(path)
    assert read.shape == (4, 16, 16, 3) and read.dtype == np.uint8
    assert np.abs(read.astype(int) - clip()).mean() < tolerance


@pytest.mark.parametrize("size", [(15, 16), (17, 33)])
def test_mp4_takes_odd_sizes(tmp_path, size):
    media.save_sample(tmp_path / "x.mp4", clip(3, *size), fps=8)
    assert media.load_sample(tmp_path / "x.mp4").shape == (3, *size, 3)


def test_frames_that_are_alike_are_kept_in_a_gif(tmp_path):
    media.save_sample(tmp_path / "x.gif", np.repeat(clip(1), 4, axis=0), fps=8)
    with Image.open(tmp_path / "x.gif") as image:
        assert image.info["duration"] * image.n_frames == pytest.approx(4 * 120, abs=20)


@pytest.mark.parametrize(("fps", "milliseconds"), [(8, 120), (10, 100), (25, 40), (100, 20)])
def test_gif_speed(tmp_path, fps, milliseconds):
    media.save_sample(tmp_path / "x.gif", clip(), fps)
    with Image.open(tmp_path / "x.gif") as image:
        assert image.info["duration"] == milliseconds and image.info["loop"] == 0


def test_npz_is_what_adms_evaluation_reads(tmp_path):
    images = [np.random.default_rng(i).integers(0, 256, (1, 8, 8, 3), np.uint8) for i in range(5)]
    paths = [tmp_path / f"{i:06d}.png" for i in range(5)]
    for path, image in zip(paths, images, strict=True):
        media.save_sample(path, image, fps=8)
    media.save_npz(tmp_path / "samples.npz", paths)
    with np.load(tmp_path / "samples.npz") as archive:
        assert list(archive) == ["arr_0"] and archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], np.concatenate(images))


def test_contact_sheet_shows_every_frame_of_every_sample():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    samples = [np.full((2, 8, 8, 3), colour, np.uint8) for colour in colours]
    sheet = np.asarray(media.contact_sheet(samples, ["a", "b", "c"], columns=2, scale_to=16))
    for colour in colours:
        assert (sheet == colour).all(axis=-1).sum() == 2 * 16 * 16
