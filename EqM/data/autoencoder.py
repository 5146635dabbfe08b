"""Between pixels and latents: a frozen autoencoder of diffusers, in chunks; geometry.py says what it makes.

Letters: N batch, C channels, T frames, H W height and width, t h w the same in latent units. Pixels are in [-1, 1].
Autoencoders of images take clips as N*T images; those of clips take images as clips of one frame.
"""

import logging
import math
import warnings
from contextlib import contextmanager, nullcontext
from types import MethodType

import torch

from EqM.data.geometry import PUBLISHED, from_hub, geometry, of_config
from EqM.run.errors import UserError, reason
from EqM.run.resume import is_hub_name

SD_SCALE = 0.18215  # standard deviation of Stable Diffusion's latents, inverted (arXiv 2112.10752)
CHUNK = 1 << 20  # pixels that go through at once: 16 images of 256 x 256, or a clip of 17 frames
MOST = 64  # images or clips that do
WHOLE = 256 * 256  # pixels of a clip's frame: larger ones go through in tiles, of the size that the class has for that


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

    def posterior(self, pixels):
        """As VAE.posterior: the pixels, and no deviation."""
        return torch.stack([pixels, torch.zeros_like(pixels)], dim=1)

    def decode(self, latents):
        return latents


class VAE:
    """A frozen autoencoder of diffusers and its scaling: latents = (z - shift) * scale.

    network: of one of geometry.KINDS. run_in: the network's Precision; the posterior is sampled in FP32 in any case.
    scale, shift: numbers, or tensors (C,) on its device. chunk: how many pixels go through it at once, at least one
    image or clip. Convolutions of images run channels-last.
    """

    def __init__(self, network, run_in, scale=1.0, shift=0.0, chunk=CHUNK):
        self.geometry = of_config(type(network).__name__, network.config)
        self.network = network.eval().requires_grad_(False)
        if not self.geometry.takes_clips:
            self.network.to(memory_format=torch.channels_last)
        self.run_in = run_in
        if run_in.name == "bf16":
            run_in.cast_weights(self.network)  # FP16 keeps FP32 weights, to fall back on
        for module in self.network.modules():  # a sum over all pixels, which AutoencoderDC wants in FP32
            if hasattr(module, "apply_linear_attention"):
                module.apply_linear_attention = MethodType(_linear_attention_in_fp32, module)
        self.scale = scale
        self.shift = shift
        self.chunk = chunk

    def encode(self, pixels):
        """Draw latents (N, C, [t,] h, w) from the posterior of pixels (N, 3, [T,] H, W)."""
        return draw(self.posterior(pixels))

    def mean(self, pixels):
        """The posterior's mean, (N, C, [t,] h, w), of pixels (N, 3, [T,] H, W)."""
        return self.posterior(pixels)[:, 0]

    @torch.no_grad()
    def posterior(self, pixels):
        """Mean and standard deviation of the latents of pixels (N, 3, [T,] H, W): (N, 2, C, [t,] h, w).

        The deviation is 0 where the autoencoder has no posterior. Raises UserError if the clips are of a length that
        it does not take.
        """
        if pixels.ndim == 5:
            self.geometry.latent_frames(pixels.shape[2])
        parts = [self._posterior(part) for part in self._chunks(self._items(pixels), 1)]
        mean, std = (torch.cat(moments) for moments in zip(*parts, strict=True))
        mean, std = (mean - _over(self.shift, mean)) * _over(self.scale, mean), std * _over(self.scale, std)
        return torch.stack([self._whole(mean, pixels), self._whole(std, pixels)], dim=1)

    @torch.no_grad()
    def decode(self, latents):
        """Pixels (N, 3, [T,] H, W) of latents (N, C, [t,] h, w)."""
        z = self._items(latents)
        z = z / _over(self.scale, z) + _over(self.shift, z)
        pixels_each = self.geometry.space**2 * self.geometry.time
        return self._whole(torch.cat([self._decoded(part) for part in self._chunks(z, pixels_each)]), latents)

    def _items(self, x):
        """What the network takes one by one: frames (M, C, H, W) or clips (N, C, T, H, W)."""
        if not self.geometry.takes_clips:
            return fold(x)
        return x if x.ndim == 5 else x.unsqueeze(2)

    def _whole(self, items, like):
        """Items as images or clips again, whichever `like` is."""
        if not self.geometry.takes_clips:
            return unfold(items, like)
        return items if like.ndim == 5 else items.squeeze(2)

    def _chunks(self, items, pixels_each):
        """Parts of the items (M, C, [T,] H, W), by the memory they take. pixels_each: of a value of one channel."""
        return items.split(min(MOST, max(1, self.chunk // (pixels_each * math.prod(items.shape[2:])))))

    def _posterior(self, items):
        found = self._run(lambda: _moments(self.network.encode(items)), math.prod(items.shape[-2:]))
        if found.shape[1] == self.geometry.channels:
            return found, torch.zeros_like(found)
        mean, log_variance = found.chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30, 20))

    def _decoded(self, z):
        return self._run(lambda: self._decode(z), math.prod(z.shape[-2:]) * self.geometry.space**2)

    def _decode(self, z):
        config, more, noise = self.network.config, {}, nullcontext()
        if config.get("timestep_conditioning"):  # LTX may clean noisy latents as it decodes; these have none
            more = {"temb": torch.zeros(len(z), device=z.device)}
        if any(config.get("decoder_inject_noise", ())):
            noise = _same_noise(z.device)
        with noise:
            return self.network.decode(z, **more).sample

    def _run(self, function, pixels):
        """The network's result in FP32. If FP16 overflows, this and all that follows is done in FP32.

        pixels: of a frame, by which clips go through whole or in tiles, so that neighbours in a batch change nothing.
        """
        self.network.use_tiling = self.geometry.takes_clips and pixels > WHOLE
        with self.run_in.autocast():
            result = function().float().contiguous()  # noise drawn like it follows the order in memory
        if self.run_in.name == "fp16" and not torch.isfinite(result).all():
            warnings.warn("the autoencoder overflows in FP16; it goes on in FP32 (--vae-precision fp32)", stacklevel=2)
            self.run_in = self.run_in.in_fp32()
            return self._run(function, pixels)
        return result


def _moments(encoded):
    """Mean and log variance, (M, 2C, ...), or the latents themselves, (M, C, ...), of what an encoder returns."""
    return encoded.latent_dist.parameters if "latent_dist" in encoded else encoded[0]


def _over(value, items):
    """A number, or a value for each channel as it meets items (M, C, ...)."""
    return value.view(-1, *[1] * (items.ndim - 2)) if isinstance(value, torch.Tensor) else value


def _linear_attention_in_fp32(module, query, key, value):
    with torch.autocast(query.device.type, enabled=False):
        return type(module).apply_linear_attention(module, query, key, value)


@contextmanager
def _same_noise(device):
    """Some decoders of LTX add noise: let it be the same for every item and every call, and touch nobody else's."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def scaling(network):
    """(scale, shift) of the latents of a network of diffusers, as its pipelines use them: see VAE.

    Means and deviations of each channel stand in the config, LTX's among the weights.
    """
    config, buffers = network.config, dict(network.named_buffers())
    scale = config.get("scaling_factor") or 1.0
    per_channel = [buffers.get(name, config.get(name)) for name in ("latents_mean", "latents_std")]
    if any(values is None for values in per_channel):
        return scale, config.get("shift_factor") or 0.0
    mean, std = (torch.as_tensor(values, dtype=torch.float32, device=network.device) for values in per_channel)
    return scale / std, mean


def load(name, run_in):
    """The autoencoder that `--vae` names: none, ema, mse (Stable Diffusion's), a folder, or a name on the hub.

    run_in: the Precision of its network, on whose device it is put.
    Raises UserError if it cannot be had, one line that names the alternatives.
    """
    if name == "none":
        return PixelSpace()
    kind = geometry(name).kind
    try:
        network = _network(kind, name).to(run_in.device)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--vae {name} does not load as a diffusers {kind}: {reason(error)}") from None
    scale, shift = (SD_SCALE, 0.0) if name in PUBLISHED else scaling(network)
    return VAE(network, run_in, scale, shift)


@contextmanager
def _quiet():
    """What diffusers tells of a config's old names or of another format on its way; what is wrong it raises."""
    log = logging.getLogger("diffusers")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _network(kind, name):
    import diffusers  # seconds to import, and pixel-space runs do without

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells every retry

    def get(place, folder, local_files_only):
        with _quiet():
            # The default of low_cpu_mem_usage wants another package, only to save a moment's memory.
            network, told = getattr(diffusers, kind).from_pretrained(
                place,
                subfolder=folder,
                local_files_only=local_files_only,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        if missing := told["missing_keys"]:  # which would be random
            raise ValueError(f"{len(missing)} of its weights are missing, first {min(missing)}")
        return network

    if name not in PUBLISHED:
        return from_hub(get, name) if is_hub_name(name) else get(name, None, True)
    try:
        return get(f"stabilityai/sd-vae-ft-{name}", None, False)
    except Exception as error:
        advice = "without network or cached weights use --vae none (pixels) or --vae DIR (a local autoencoder)"
        raise UserError(f"the {name} VAE cannot be loaded: {advice}. Cause: {reason(error)}") from None
