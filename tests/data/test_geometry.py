"""What a config.json tells of latents, beside what the class itself makes."""

import json
from argparse import Namespace

import pytest
import torch

import tiny_autoencoders
from EqM.data import autoencoder
from EqM.data.geometry import Geometry, geometry, of_config
from EqM.engine.precision import Precision
from EqM.run.errors import UserError
from tiny_autoencoders import CLIP_KINDS, CONFIGS, IMAGE_KINDS

EXPECTED = {  # channels, space, time
    "AutoencoderKL": (16, 4, 1),
    "AutoencoderTiny": (4, 4, 1),
    "AutoencoderDC": (8, 2, 1),
    "AutoencoderKLWan": (16, 8, 4),
    "AutoencoderKLCogVideoX": (4, 8, 4),
    "AutoencoderKLLTXVideo": (8, 32, 8),
    "AutoencoderKLHunyuanVideo": (4, 8, 4),
}


def item(size, clip_len=None):
    return Namespace(image_size=size, video=clip_len is not None, clip_len=clip_len)


def made_of(network, pixels):
    """(latents, pixels again) of a network."""
    encoded = network.encode(pixels)
    z = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded[0]
    return z, network.decode(z).sample


@pytest.mark.parametrize("kind", CONFIGS)
def test_sizes_are_read_from_the_config_of_every_class(autoencoder_folders, kind):
    found = geometry(autoencoder_folders[kind])
    assert (found.kind, found.channels, found.space, found.time) == (kind, *EXPECTED[kind])
    assert found.takes_clips == (kind in CLIP_KINDS)


def test_published_ones_and_pixels_need_no_config():
    assert geometry("none").shape(item(8)) == (3, 8, 8) and geometry("none").shape(item(8, 5)) == (3, 5, 8, 8)
    for name in ("ema", "mse"):
        assert geometry(name).shape(item(256)) == (4, 32, 32) and geometry(name).shape(item(256, 16)) == (4, 16, 32, 32)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
@torch.no_grad()
def test_the_class_makes_images_of_that_shape(kind):
    network, x = tiny_autoencoders.build(kind), torch.zeros(1, 3, 32, 32)
    z, again = made_of(network, x)
    assert of_config(kind, network.config).shape(item(32)) == z.shape[1:] and again.shape == x.shape


@pytest.mark.parametrize("kind", CLIP_KINDS)
@torch.no_grad()
def test_the_clips_that_are_taken_are_those_that_the_class_gives_back_as_long(kind):
    network = tiny_autoencoders.build(kind)
    found = of_config(kind, network.config)
    size = found.space
    for frames in (1, 2, 4, 5, 7, 8, 9, 10, 12, 13, 15, 16, 17):
        x = torch.zeros(1, 3, frames, size, size)
        z, again = made_of(network, x)
        if again.shape == x.shape:
            assert found.shape(item(size, frames)) == z.shape[1:]
        else:
            with pytest.raises(UserError, match=f"--clip-len {frames} does not suit {kind}"):
                found.shape(item(size, frames))


def test_variants_of_a_class_are_told_by_its_config():
    config = {**CONFIGS["AutoencoderKLWan"], "temperal_downsample": [False, True, True], "patch_size": 2}
    wan = of_config("AutoencoderKLWan", {**config, "in_channels": 12, "out_channels": 12})  # Wan 2.2
    assert (wan.channels, wan.space, wan.time) == (16, 16, 4)
    ltx = {"latent_channels": 8, "spatio_temporal_scaling": [True] * 4, "patch_size": 4, "patch_size_t": 1}
    assert of_config("AutoencoderKLLTXVideo", ltx).space == 64
    given = of_config(
        "AutoencoderKLLTXVideo", {**ltx, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    )
    assert (given.space, given.time, given.period) == (32, 8, 8)


@pytest.mark.parametrize(
    "kind, frames, message",
    [
        ("AutoencoderKLWan", 16, r"takes clips of 4k \+ 1 frames; give --clip-len 13 or 17$"),
        ("AutoencoderKLHunyuanVideo", 4, r"takes clips of 4k \+ 1 frames; give --clip-len 1 or 5$"),
        ("AutoencoderKLCogVideoX", 13, r"takes clips of 8k or 8k \+ 1 frames; give --clip-len 9 or 16$"),
        ("AutoencoderKLLTXVideo", 16, r"takes clips of 8k \+ 1 frames; give --clip-len 9 or 17$"),
    ],
)
def test_another_length_is_one_line_that_says_which_do(autoencoder_folders, kind, frames, message):
    with pytest.raises(UserError, match=message):
        geometry(autoencoder_folders[kind]).latent_frames(frames)


def test_a_size_must_divide(autoencoder_folders):
    with pytest.raises(UserError, match="--image-size 48 must be a multiple of 32"):
        geometry(autoencoder_folders["AutoencoderKLLTXVideo"]).shape(item(48))


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "neither ema, mse, none nor a folder"),
        ("{", "neither ema, mse, none nor a folder"),
        ("{}", "neither ema, mse, none nor a folder"),
        ("[1]", "neither ema, mse, none nor a folder"),
        ({"_class_name": "UNet2DModel"}, "of class UNet2DModel, which is none of AutoencoderKL, "),
        ({"_class_name": "AutoencoderKL"}, "does not describe an AutoencoderKL"),
        ({"latent_channels": "x", "block_out_channels": [8]}, "does not describe an AutoencoderKL"),
        ({"latent_channels": 4, "block_out_channels": 8}, "does not describe an AutoencoderKL"),
        ({"latent_channels": 4, "block_out_channels": [8], "in_channels": 1}, "three channels, but 1"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        geometry(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """This machine's cache of the hub, with an autoencoder in a pipeline's folder: user/tiny/vae."""
    commit = "0" * 40
    snapshot = tmp_path / "models--user--tiny" / "snapshots" / commit
    tiny_autoencoders.build("AutoencoderTiny").save_pretrained(snapshot / "vae")
    (tmp_path / "models--user--tiny" / "refs").mkdir()
    (tmp_path / "models--user--tiny" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return snapshot


def test_a_name_of_the_hub_is_taken_from_this_machines_cache_first(hub):
    assert geometry("user/tiny/vae") == Geometry("AutoencoderTiny", channels=4, space=4)
    run_in = Precision("fp32", torch.device("cpu"), "test")
    x = torch.rand(1, 3, 16, 16)
    ours, theirs = (autoencoder.load(name, run_in).mean(x) for name in ("user/tiny/vae", str(hub / "vae")))
    assert torch.equal(ours, theirs)


def test_a_folder_goes_before_a_name_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_autoencoders.build("AutoencoderDC").save_config(tmp_path / "user" / "tiny" / "vae")
    assert geometry("user/tiny/vae").kind == "AutoencoderDC"


def test_a_name_that_nobody_has_is_one_line(hub):
    for name in ("user/tiny", "user/nobody", "models/typo/here"):
        for call in (geometry, lambda name: autoencoder.load(name, Precision("fp32", torch.device("cpu"), "test"))):
            with pytest.raises(
                UserError, match=f"--vae {name} is no folder here, and cannot be had from the hub"
            ) as error:
                call(name)
            assert "\n" not in str(error.value) and "user/name/vae" in str(error.value)
