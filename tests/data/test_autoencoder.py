"""Autoencoders, with a tiny one of every class loaded for real."""

import warnings

import pytest
import torch

from EqM.data import autoencoder as latents
from EqM.data import media
from EqM.engine.precision import Precision
from EqM.run.errors import UserError
from tiny_autoencoders import CLIP_KINDS, CONFIGS, IMAGE_KINDS, build

CPU = torch.device("cpu")
every_kind = pytest.mark.parametrize("kind", CONFIGS)


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


def test_posterior_is_that_of_diffusers_scaled(tiny_vae):
    vae, x = latents.load(tiny_vae, run_in()), pixels(2, 3, 32, 32)
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
    vae.chunk = 3 * 16 * 16
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


@every_kind
def test_fp16_that_overflows_is_done_again_in_fp32_with_one_warning(autoencoder_folders, kind):
    vae, exact = (latents.load(autoencoder_folders[kind], run_in(name)) for name in ("fp16", "fp32"))
    for network in (vae.network, exact.network):
        first = next(part for part in network.encoder.modules() if isinstance(part, (torch.nn.Conv2d, torch.nn.Conv3d)))
        first.weight.mul_(1e6)
    x = pixels(1, 3, 64, 64)
    with pytest.warns(UserWarning, match="overflows in FP16.*--vae-precision fp32"):
        moments = vae.posterior(x)
    assert torch.equal(moments, exact.posterior(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(vae.posterior(x), exact.posterior(x))


def clip_of(kind):
    """A batch of two clips that suit a class."""
    return pixels(2, 3, 9 if kind in CLIP_KINDS else 2, 64, 64)


def through(network, items):
    """What the class itself makes of items: its latents, unscaled."""
    encoded = network.encode(items)
    return encoded.latent_dist.mode() if "latent_dist" in encoded else encoded[0]


def standardised(network, z):
    """Latents as the class's own pipelines in diffusers scale them."""
    config, mean, std = network.config, 0.0, 1.0
    if type(network).__name__ == "AutoencoderKLWan":
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    elif type(network).__name__ == "AutoencoderKLLTXVideo":
        mean, std = network.latents_mean, network.latents_std
    elif type(network).__name__ == "AutoencoderKL":
        mean = config.shift_factor
    mean, std = (torch.as_tensor(value).view(-1, *[1] * (z.ndim - 2)) for value in (mean, std))
    return (z - mean) * config.get("scaling_factor", 1.0) / std


@every_kind
@torch.no_grad()
def test_every_class_gives_what_diffusers_own_does_scaled_as_its_pipelines_do(autoencoder_folders, kind):
    vae, network, clip = latents.load(autoencoder_folders[kind], run_in()), build(kind), clip_of(kind)
    moments = vae.posterior(clip)
    items = clip if kind in CLIP_KINDS else latents.fold(clip)
    z = through(network, items)
    expected = standardised(network, z)
    assert expected.std() > 0 and not torch.allclose(expected, z)
    torch.testing.assert_close(moments[:, 0], expected if kind in CLIP_KINDS else latents.unfold(expected, clip))
    decoded = network.decode(z).sample
    torch.testing.assert_close(
        vae.decode(moments[:, 0]),
        decoded if kind in CLIP_KINDS else latents.unfold(decoded, clip),
        rtol=1e-3,
        atol=1e-4,
    )


@every_kind
def test_a_deviation_is_scaled_as_the_mean_is_or_nought_where_there_is_no_posterior(autoencoder_folders, kind):
    vae, x = latents.load(autoencoder_folders[kind], run_in()), pixels(1, 3, 64, 64)
    mean, std = vae.posterior(x)[0]
    if kind in ("AutoencoderTiny", "AutoencoderDC"):
        assert not std.any() and torch.equal(vae.encode(x)[0], mean)
        return
    x = x if kind in IMAGE_KINDS else x.unsqueeze(2)
    published = vae.network.encode(x).latent_dist
    scale = (standardised(vae.network, published.mean + published.std) - standardised(vae.network, published.mean))[0]
    torch.testing.assert_close(std, scale.reshape(std.shape), rtol=1e-3, atol=1e-5)


def test_means_and_deviations_of_each_channel_may_stand_in_any_config():
    mean, std = [0.1 * i for i in range(16)], [1 + 0.1 * i for i in range(16)]
    network = build("AutoencoderKL", latents_mean=mean, latents_std=std)  # as Playground's
    vae, x = latents.VAE(network, run_in(), *latents.scaling(network)), pixels(2, 3, 32, 32)
    z = through(network, x)
    expected = (z - torch.tensor(mean).view(16, 1, 1)) * 0.5 / torch.tensor(std).view(16, 1, 1)
    torch.testing.assert_close(vae.mean(x), expected)
    torch.testing.assert_close(vae.decode(expected), network.decode(z).sample, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_an_autoencoder_of_clips_takes_images_as_clips_of_one_frame(autoencoder_folders, kind):
    vae, images = latents.load(autoencoder_folders[kind], run_in()), pixels(2, 3, 64, 64)
    moments = vae.posterior(images)
    assert torch.equal(moments, vae.posterior(images.unsqueeze(2)).squeeze(3))
    assert vae.decode(moments[:, 0]).shape == images.shape


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_a_clip_that_would_come_back_shorter_is_refused(autoencoder_folders, kind):
    with pytest.raises(UserError, match=f"--clip-len 7 does not suit {kind}"):
        latents.load(autoencoder_folders[kind], run_in()).posterior(pixels(1, 3, 7, 32, 32))


@every_kind
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_every_class_runs_in_16_bits(autoencoder_folders, kind, name):
    vae, exact = (latents.load(autoencoder_folders[kind], run_in(each)) for each in (name, "fp32"))
    x = pixels(2, 3, 64, 64)
    z = exact.mean(x)
    for ours, theirs in [(vae.mean(x), z), (vae.decode(z), exact.decode(z))]:
        assert ours.dtype == torch.float32
        difference = (ours - theirs).norm() / theirs.norm()
        assert 0 < difference < (0.1 if name == "bf16" else 0.02)
    assert vae.run_in.name == name


def test_a_sum_over_all_pixels_is_no_16_bit_one(autoencoder_folders):
    vae = latents.load(autoencoder_folders["AutoencoderDC"], run_in("fp16"))
    attention = next(part for part in vae.network.modules() if hasattr(part, "apply_linear_attention"))
    ones = torch.ones(1, 1, 4, 1 << 17)  # sums of 131,072 do not fit FP16
    with vae.run_in.autocast():
        torch.testing.assert_close(attention.apply_linear_attention(ones, ones, ones), ones)


@every_kind
def test_chunks_are_bound_by_pixels_and_change_nothing(autoencoder_folders, kind, monkeypatch):
    vae, clip = latents.load(autoencoder_folders[kind], run_in()), clip_of(kind)
    moments = vae.posterior(clip)
    decoded = vae.decode(moments[:, 0])
    sizes = []
    for name in ("encode", "decode"):
        method = getattr(vae.network, name)
        monkeypatch.setattr(vae.network, name, lambda x, method=method: sizes.append(len(x)) or method(x))
    vae.chunk = 64 * 64 * 3  # three frames, or less than a clip of nine
    torch.testing.assert_close(vae.posterior(clip), moments)
    torch.testing.assert_close(vae.decode(moments[:, 0]), decoded, rtol=1e-4, atol=1e-5)
    assert sizes == ([1, 1, 1, 1] if kind in CLIP_KINDS else [3, 1, 3, 1])


TILES = {
    "AutoencoderKLWan": {"tile_sample_min_height": 64, "tile_sample_stride_height": 32},
    "AutoencoderKLHunyuanVideo": {"tile_sample_min_height": 64, "tile_sample_stride_height": 32},
    "AutoencoderKLLTXVideo": {"tile_sample_min_height": 64, "tile_sample_stride_height": 32},
    "AutoencoderKLCogVideoX": {"tile_sample_min_height": 64, "tile_overlap_factor_height": 0.25},
}


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_large_frames_of_clips_go_through_in_tiles(autoencoder_folders, kind, monkeypatch):
    vae = latents.load(autoencoder_folders[kind], run_in())
    clip = pixels(1, 3, 9 if vae.geometry.period == 8 else 5, 96, 96)
    tiles = TILES[kind] | {name.replace("height", "width"): value for name, value in TILES[kind].items()}
    vae.network.enable_tiling(**tiles)
    whole = vae.mean(clip)
    decoded = vae.decode(whole)
    monkeypatch.setattr(latents, "WHOLE", 64 * 64)
    for ours, theirs in [(vae.mean(clip), whole), (vae.decode(whole), decoded)]:
        assert ours.shape == theirs.shape and not torch.equal(ours, theirs)
        assert (ours - theirs).norm() < theirs.norm()
    assert vae.network.use_tiling
    vae.mean(clip[..., :64, :64])
    assert not vae.network.use_tiling


def test_a_decoder_that_adds_noise_is_a_function_of_its_latents():
    network = build("AutoencoderKLLTXVideo", timestep_conditioning=True, decoder_inject_noise=(True,) * 5)
    for name, parameter in network.named_parameters():
        if "per_channel_scale" in name:  # at first nought
            torch.nn.init.ones_(parameter)
    vae = latents.VAE(network, run_in(), *latents.scaling(network))
    z = torch.randn(2, 8, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    both = vae.decode(z)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.cat([vae.decode(z[:1]), vae.decode(z[1:])]), both)
    torch.set_rng_state(state)
    vae.decode(z)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind, clips", [("AutoencoderTiny", False), ("AutoencoderKLWan", True)])
def test_a_model_trains_from_files_and_from_a_cache_and_samples(
    autoencoder_folders, kind, clips, run_script, image_folder, clip_folder, tmp_path
):
    data = ["--data-path", clip_folder if clips else image_folder]
    encoding = ["--vae", autoencoder_folders[kind], "--image-size", 16, "--num-workers", 0, "--device", "cpu"]
    encoding += ["--video", "--clip-len", 5] if clips else []
    small = ["--model", "EqM-T/2", "--patch-frames", 1, "--global-batch-size", 2, "--max-steps", 2, "--ema-decay", 0.5]
    small += ["--sample-every", 2, "--results-dir"]
    assert run_script("extract_latents", *data, *encoding, "--out", tmp_path / "cache").code == 0
    for source, name in ((data, "files"), (["--latents", tmp_path / "cache"], "cached")):
        result = run_script("train", *source, *encoding, *small, tmp_path / name)
        assert result.code == 0, result.err
        (run,) = (tmp_path / name).iterdir()
        assert (run / "samples" / "0000002.png").exists()
        weights = torch.load(run / "checkpoints" / "0000002.pt", weights_only=True)["ema"]["final_layer.linear.weight"]
        assert weights.any()  # at first nought
    ckpt = run / "checkpoints" / "0000002.pt"
    words = ["--num-sampling-steps", 3, "--num-fid-samples", 2, "--folder", tmp_path / "samples", "--device", "cpu"]
    assert run_script("sample_gd", "--ckpt", ckpt, *words).code == 0
    sample = media.load_sample(tmp_path / "samples" / ("000001.gif" if clips else "000001.png"))
    assert sample.shape == (5 if clips else 1, 16, 16, 3) and sample.std() > 0


def test_an_autoencoder_that_cannot_be_had_is_one_line(tmp_path, capfd):
    build("AutoencoderTiny").save_config(tmp_path)  # and no weights
    for name, message in [("ema", "--vae none.*--vae DIR"), (str(tmp_path), "as a diffusers AutoencoderTiny")]:
        with pytest.raises(UserError, match=message) as error:
            latents.load(name, run_in())
        assert "\n" not in str(error.value)
    network = build("AutoencoderTiny")
    network.decoder = torch.nn.Identity()
    network.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="AutoencoderTiny: 24 of its weights are missing, first decoder.layers.0.bias"):
        latents.load(str(tmp_path), run_in())
    assert capfd.readouterr().err == ""
