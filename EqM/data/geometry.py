"""The latents an autoencoder makes, as its config.json tells: channels, size and which clips it takes. No weights.

Letters: C channels, T frames, h w height and width in latent units.
"""

import json
import os
from dataclasses import dataclass

from EqM.run.errors import UserError, reason
from EqM.run.resume import is_hub_name

PUBLISHED = ("ema", "mse")


@dataclass(frozen=True)
class Geometry:
    """What an autoencoder makes of an image or a clip.

    kind: its class in diffusers. space: pixels per latent along a side. time: frames per latent frame, 1 also where
    clips go through frame by frame. A clip must have a multiple of `period` frames and one of `rests` more: any other
    length comes back from the decoder shorter or longer. takes_clips: the class itself works on (N, 3, T, H, W).
    """

    kind: str
    channels: int
    space: int
    time: int = 1
    period: int = 1
    rests: tuple = (0,)
    takes_clips: bool = False

    def shape(self, args):
        """(C, [T,] h, w) of the latents of an item, by the args image_size, video and clip_len. Raises UserError."""
        if args.image_size % self.space:
            raise UserError(
                f"--image-size {args.image_size} must be a multiple of {self.space}, by which the VAE divides it"
            )
        side = args.image_size // self.space
        return (self.channels, *((self.latent_frames(args.clip_len),) if args.video else ()), side, side)

    def latent_frames(self, clip_len):
        """Latent frames of a clip. Raises UserError, with the nearest lengths, if it would not come back as long."""
        if not self._fits(clip_len):
            near = range(max(1, clip_len - self.period), clip_len + self.period + 1)
            below = [n for n in near if n < clip_len and self._fits(n)][-1:]
            above = [n for n in near if n > clip_len and self._fits(n)][:1]
            nearest = " or ".join(map(str, below + above))
            lengths = " or ".join(f"{self.period}k{f' + {rest}' if rest else ''}" for rest in self.rests)
            raise UserError(
                f"--clip-len {clip_len} does not suit {self.kind}, which takes clips of {lengths} frames; "
                f"give --clip-len {nearest}"
            )
        return -(-clip_len // self.time)

    def _fits(self, frames):
        return frames % self.period in self.rests


def _kl(config):
    return {"space": 2 ** (len(config["block_out_channels"]) - 1)}


def _tiny(config):
    return {"space": 2 ** (len(config["num_encoder_blocks"]) - 1)}


def _dc(config):
    return {"space": 2 ** (len(config["encoder_block_out_channels"]) - 1)}


def _wan(config):
    patch = config.get("patch_size") or 1
    space = patch * 2 ** (len(config["dim_mult"]) - 1)
    time = 2 ** sum(config["temperal_downsample"])  # diffusers' spelling
    # Whatever the time, it reads four frames after the first at once, and drops what does not fill them.
    return {"channels": config["z_dim"], "space": space, "time": time, "period": 4, "rests": (1,), "patch": patch}


def _cogvideox(config):
    # It reads eight frames at once, the first time one more. 4k + 1 it would encode, and decode another number.
    return {**_kl(config), "time": int(config["temporal_compression_ratio"]), "period": 8, "rests": (0, 1)}


def _ltx(config):
    scalings = 2 ** sum(config["spatio_temporal_scaling"])
    space = config.get("spatial_compression_ratio") or config["patch_size"] * scalings
    time = config.get("temporal_compression_ratio") or config["patch_size_t"] * scalings
    return {"space": space, "time": time, "period": time, "rests": (1,)}


def _hunyuan(config):
    time = config.get("temporal_compression_ratio", 4)
    return {"space": config.get("spatial_compression_ratio", 8), "time": time, "period": time, "rests": (1,)}


# The classes of diffusers that --vae takes: those for images go frame by frame through a clip.
IMAGE_KINDS = {"AutoencoderKL": _kl, "AutoencoderTiny": _tiny, "AutoencoderDC": _dc}
CLIP_KINDS = {
    "AutoencoderKLWan": _wan,
    "AutoencoderKLCogVideoX": _cogvideox,
    "AutoencoderKLLTXVideo": _ltx,
    "AutoencoderKLHunyuanVideo": _hunyuan,
}
KINDS = IMAGE_KINDS | CLIP_KINDS


def of_config(kind, config):
    """The Geometry of a class of diffusers with this config. Raises KeyError, TypeError or ValueError."""
    facts = KINDS[kind](config)
    pixels = 3 * facts.pop("patch", 1) ** 2
    if config.get("in_channels", pixels) != pixels or config.get("out_channels", pixels) != pixels:
        raise ValueError(f"it is not for pictures of three channels, but {config.get('in_channels')}")
    facts.setdefault("channels", config.get("latent_channels"))
    numbers = [value for name, value in facts.items() if name != "rests"]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"odd sizes: {facts}")
    return Geometry(kind, takes_clips=kind in CLIP_KINDS, **facts)


def geometry(name):
    """The Geometry of the autoencoder that --vae names, without loading it. Raises UserError."""
    if name == "none":
        return Geometry("PixelSpace", channels=3, space=1)
    if name in PUBLISHED:
        return Geometry("AutoencoderKL", channels=4, space=8)
    config = _config(name)
    kind = config.get("_class_name", "AutoencoderKL")
    if kind not in KINDS:
        raise UserError(f"--vae {name} is of class {kind}, which is none of {', '.join(KINDS)}")
    try:
        return of_config(kind, config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--vae {name}: its config.json does not describe an {kind} ({reason(error)})") from None


def _config(name):
    """What config.json of a folder, or of the hub's user/name[/folder], holds. Raises UserError."""
    try:
        path = os.path.join(name, "config.json")
        if is_hub_name(name):
            path = from_hub(_download, name)
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        if isinstance(config, dict) and config:
            return config
    except (OSError, ValueError):
        pass
    raise UserError(
        f"--vae {name} is neither ema, mse, none nor a folder with an autoencoder of diffusers (a readable config.json)"
    )


def from_hub(get, name):
    """get(repository, folder in it or None, local_files_only) of a hub name: from this machine's cache, else the hub.

    Raises UserError if it is in neither.
    """
    user, repository, *folders = name.split("/")
    where = f"{user}/{repository}", "/".join(folders) or None
    try:
        return get(*where, True)
    except Exception:  # whatever is wrong with the cache, the hub may have it
        try:
            return get(*where, False)
        except Exception as error:
            raise UserError(
                f"--vae {name} is no folder here, and cannot be had from the hub ({reason(error)}); a pipeline's "
                "autoencoder is user/name/vae, and without network or cached weights --vae DIR or none goes on"
            ) from None


def _download(repository, folder, local_files_only):
    from huggingface_hub import hf_hub_download  # part of a second to import

    return hf_hub_download(repository, "config.json", subfolder=folder, local_files_only=local_files_only)
