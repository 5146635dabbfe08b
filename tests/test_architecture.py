"""Which latents a network is built for, with autoencoders that shorten clips."""

from argparse import Namespace

import pytest

from EqM import architecture
from EqM.run.errors import UserError


def args(folder, **more):
    flags = {**architecture.MODEL_DEFAULTS, "model": "EqM-T/2", "num_classes": 3, "image_size": 64, "vae": folder}
    return Namespace(**{**flags, **more})


def test_a_network_is_as_large_as_its_latents(autoencoder_folders):
    wan = args(autoencoder_folders["AutoencoderKLWan"], video=True, clip_len=17, patch_frames=5)
    assert architecture.check_geometry(wan) == (16, (5, 8, 8))
    assert architecture.build_model(wan).input_shape == (16, 5, 8, 8)
    images = args(autoencoder_folders["AutoencoderKLWan"])
    assert architecture.check_geometry(images) == (16, 8)
    alone = args(autoencoder_folders["AutoencoderTiny"], video=True, clip_len=6)
    assert architecture.check_geometry(alone) == (4, (6, 16, 16))


@pytest.mark.parametrize(
    "kind, more, message",
    [
        (
            "AutoencoderKLWan",
            {"clip_len": 17},
            "the 5 latent frames of --clip-len 17 must be a multiple",
        ),
        ("AutoencoderKLWan", {"clip_len": 16, "patch_frames": 1}, "--clip-len 13 or 17"),
        ("AutoencoderTiny", {"clip_len": 5}, "^--clip-len 5 must be a multiple of the patch's 2 frames"),
        ("AutoencoderKLLTXVideo", {"clip_len": 9, "image_size": 96}, "--image-size 96 must be a multiple of 64"),
    ],
)
def test_what_does_not_fit_is_one_line(autoencoder_folders, kind, more, message):
    with pytest.raises(UserError, match=message):
        architecture.check_geometry(args(autoencoder_folders[kind], video=True, **more))
