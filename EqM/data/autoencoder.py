"""Between pixels and latents: the frozen autoencoder, frame by frame, in chunks.

Letters: N batch, C channels, T frames, H W height and width, h w the same in latent units. Pixels are in
[-1, 1]. Clips go through the autoencoder as N*T images.
"""

import json
import logging
import os
import warnings

import torch

from EqM.run.errors import UserError, reason

SD_SCALE = 0.18215  # standard deviation of Stable Diffusion's latents, inverted (arXiv 2112.10752)

PUBLISHED = ("ema", "mse")


def to_pixels(images):
    """uint8 images, any shape, to [-1, 1] in FP32 on the same device."""
    return images.float() / 127.5 - 1


def to_uint8(pixels):
    """[-1, 1] to uint8, rounded and clamped as in the published sampler."""
    return torch.clamp(127.5 * pixels + 128.0, 0, 255).to(torch.uint8)


def fold(x):
    """(N, C, T, H, W) -> (N*T, C, H, W); images pass."""
    return x if x.ndim == 4 else x.transpose(1, 2).flatten(0, 1)


def unfold(frames, like):
    """(N*T, C, h, w) -> (N, C, T, h, w) with N and T of `like`; images pass."""
    return frames if like.ndim == 4 else frames.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def draw(moments):
    """Latents (N, C, [T,] h, w) in FP32 from the posterior's moments (N, 2, C, [T,] h, w)."""
    mean, std = moments.float().unbind(1)
    return mean + std * torch.randn(mean.shape, device=mean.device)


class PixelSpace:
    """--vae none: latents are the pixels themselves."""

    channels = 3
    factor = 1

    def encode(self, pixels):
        return pixels

    mean = encode

    def decode(self, latents):
        return latents


class VAE:
    """A frozen diffusers AutoencoderKL and its scaling: latents = (z - shift) * scale.

    run_in: the network's Precision; the posterior is sampled in FP32 in any case. chunk: how many
    frames go through it at once. Its convolutions run channels-last.
    """

    def __init__(self, network, run_in, scale, shift=0.0, chunk=64):
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.run_in = run_in
        if run_in.name == "bf16":
            run_in.cast_weights(self.network)  # FP16 keeps FP32 weights, to fall back on
        self.scale = scale
        self.shift = shift
        self.chunk = chunk

    def encode(self, pixels):
        """Draw latents (N, C, [T,] h, w) from the posterior of pixels (N, 3, [T,] H, W)."""
        return draw(self.posterior(pixels))

    def mean(self, pixels):
        """The posterior's mean, (N, C, [T,] h, w), of pixels (N, 3, [T,] H, W)."""
        return self.posterior(pixels)[:, 0]

    @torch.no_grad()
    def posterior(self, pixels):
        """Mean and standard deviation of the latents of pixels (N, 3, [T,] H, W): (N, 2, C, [T,] h, w)."""
        parts = [self._posterior(part) for part in fold(pixels).split(self.chunk)]
        mean, std = (torch.cat(moments) for moments in zip(*parts, strict=True))
        mean, std = (mean - self.shift) * self.scale, std * self.scale
        return torch.stack([unfold(mean, pixels), unfold(std, pixels)], dim=1)

    @torch.no_grad()
    def decode(self, latents):
        """Pixels (N, 3, [T,] H, W) of latents (N, C, [T,] h, w)."""
        z = fold(latents) / self.scale + self.shift
        return unfold(torch.cat([self._decoded(part) for part in z.split(self.chunk)]), latents)

    def _posterior(self, images):
        moments = self._run(lambda: self.network.encode(images).latent_dist.parameters)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30, 20))

    def _decoded(self, z):
        return self._run(lambda: self.network.decode(z).sample)

    def _run(self, function):
        """The network's result in FP32. If FP16 overflows, this and all that follows is done in FP32."""
        with self.run_in.autocast():
            result = function().float().contiguous()  # noise drawn like it follows the order in memory
        if self.run_in.name == "fp16" and not torch.isfinite(result).all():
            warnings.warn("the autoencoder overflows in FP16; it goes on in FP32 (--vae-precision fp32)", stacklevel=2)
            self.run_in = self.run_in.in_fp32()
            return self._run(function)
        return result


def geometry(name):
    """(latent channels, pixels per latent) of the autoencoder `--vae` names, without loading it."""
    if name == "none":
        return PixelSpace.channels, PixelSpace.factor
    if name in PUBLISHED:
        return 4, 8
    try:
        with open(os.path.join(name, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"--vae {name} is neither ema, mse, none nor a folder with an AutoencoderKL (a readable config.json)"
        ) from None


def load(name, run_in):
    """The autoencoder `--vae` names: none, ema, mse (Stable Diffusion's), or a local AutoencoderKL folder.

    run_in: the Precision of its network, on whose device it is put.
    Raises UserError if it cannot be had, one line that names the alternatives.
    """
    if name == "none":
        return PixelSpace()
    from diffusers import AutoencoderKL  # seconds to import, and pixel-space runs do without

    published = name in PUBLISHED
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells every retry
    source = f"stabilityai/sd-vae-ft-{name}" if published else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The default wants another package, only to save a moment's memory.
            network = AutoencoderKL.from_pretrained(source, local_files_only=not published, low_cpu_mem_usage=False)
    except Exception as error:
        if published:
            advice = "without network or cached weights use --vae none (pixels) or --vae DIR (a local AutoencoderKL)"
            raise UserError(f"the {name} VAE cannot be loaded: {advice}. Cause: {reason(error)}") from None
        raise UserError(f"--vae {name} does not load as a diffusers AutoencoderKL: {reason(error)}") from None
    scale = SD_SCALE if published else network.config.scaling_factor
    shift = 0.0 if published else network.config.shift_factor or 0.0
    return VAE(network.to(run_in.device), run_in, scale, shift)
