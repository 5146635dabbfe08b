"""Autoencoders, with a tiny AutoencoderKL loaded for real."""

import warnings

import pytest
import torch

from EqM.data import autoencoder as latents
from EqM.engine.precision import Precision
from EqM.run.errors import UserError

CPU = torch.device("cpu")


def run_in(name="fp32"):
    return Precision(name, CPU, "test", rounded=name != "fp32")


def pixels(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_pixels_and_bytes_round_trip():
    images = torch.arange(256, dtype=torch.uint8)
    values = latents.to_pixels(images)
    assert (values.min(), values.max()) == (-1, 1)
    assert torch.equal(latents.to_uint8(values), images)
    assert latents.to_uint8(torch.tensor([-5.0, 5.0])).tolist() == [0, 255]


def test_folding_keeps_frames_of_a_clip_together():
    clip = torch.arange(2 * 3 * 4 * 1 * 1).view(2, 3, 4, 1, 1)
    frames = latents.fold(clip)
    assert frames.shape == (8, 3, 1, 1)
    assert torch.equal(frames[5], clip[1, :, 1])
    assert torch.equal(latents.unfold(frames, clip), clip)
    image = torch.zeros(2, 3, 4, 4)
    assert latents.fold(image) is image and latents.unfold(image, image) is image


def test_none_is_the_pixels_themselves():
    space, x = latents.load("none", run_in()), pixels(2, 3, 8, 8)
    assert torch.equal(space.decode(space.encode(x)), x)
    assert latents.geometry("none") == (3, 1)


def test_posterior_is_that_of_diffusers_scaled(tiny_vae):
    vae, x = latents.load(tiny_vae, run_in()), pixels(2, 3, 32, 32)
    assert latents.geometry(tiny_vae) == (4, 4)
    moments = vae.posterior(x)
    reference = vae.network.encode(x).latent_dist
    assert moments.shape == (2, 2, 4, 8, 8)
    torch.testing.assert_close(moments[:, 0], reference.mean * 0.5)
    torch.testing.assert_close(moments[:, 1], reference.std * 0.5)


def test_drawn_latents_have_the_posteriors_mean_and_spread(tiny_vae):
    vae, x = latents.load(tiny_vae, run_in()), pixels(1, 3, 8, 8)
    torch.manual_seed(0)
    drawn = vae.encode(x.expand(4000, -1, -1, -1))
    mean, std = vae.posterior(x)[0]
    assert drawn.dtype == torch.float32
    assert ((drawn.mean(0) - mean).abs() < 5 * std / 4000**0.5).all()
    torch.testing.assert_close(drawn.std(0), std, rtol=0.1, atol=0)


def test_clips_go_through_frame_by_frame_in_chunks(tiny_vae):
    vae, clip = latents.load(tiny_vae, run_in()), pixels(2, 3, 5, 16, 16)
    whole = vae.posterior(clip)
    assert whole.shape == (2, 2, 4, 5, 4, 4)
    alone = torch.stack([vae.posterior(clip[:, :, t]) for t in range(5)], dim=3)
    torch.testing.assert_close(whole, alone)
    vae.chunk = 3
    torch.testing.assert_close(vae.posterior(clip), whole)
    z = torch.randn(2, 4, 5, 4, 4)
    decoded = vae.decode(z)
    assert decoded.shape == clip.shape
    torch.testing.assert_close(decoded[1, :, 2], vae.network.decode(z[1:, :, 2] / 0.5).sample[0])


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_16_bit_autoencoders_return_fp32_close_to_fp32(tiny_vae, name):
    x, z = pixels(2, 3, 16, 16), torch.randn(2, 4, 4, 4)
    vae, exact = latents.load(tiny_vae, run_in(name)), latents.load(tiny_vae, run_in())
    for ours, theirs in [(vae.posterior(x), exact.posterior(x)), (vae.decode(z), exact.decode(z))]:
        assert ours.dtype == torch.float32
        difference = (ours - theirs).norm() / theirs.norm()
        assert 0 < difference < (0.03 if name == "bf16" else 0.005)


def test_fp16_that_overflows_is_done_again_in_fp32_with_one_warning(tiny_vae):
    vae, exact = latents.load(tiny_vae, run_in("fp16")), latents.load(tiny_vae, run_in())
    for network in (vae.network, exact.network):
        network.encoder.conv_in.weight.mul_(1e6)
    x = pixels(2, 3, 16, 16)
    with pytest.warns(UserWarning, match="overflows in FP16.*--vae-precision fp32"):
        moments = vae.posterior(x)
    assert torch.equal(moments, exact.posterior(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(vae.posterior(x), exact.posterior(x))


def test_an_autoencoder_that_cannot_be_had_is_one_line(tmp_path):
    for name, message in [("ema", "--vae none.*--vae DIR"), (str(tmp_path), "does not load")]:
        with pytest.raises(UserError, match=message) as error:
            latents.load(name, run_in())
        assert "\n" not in str(error.value)
    for config in [None, "{", "{}"]:
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        with pytest.raises(UserError, match="neither ema, mse, none nor a folder"):
            latents.geometry(str(tmp_path))
