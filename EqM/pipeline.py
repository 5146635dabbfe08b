"""A trained model to call: field, energy, guided descent and decoding, in any precision.

    from EqM import EqMPipeline
    pipe = EqMPipeline.from_pretrained("results/000-EqM-S-4-Linear-velocity-None", precision="bf16")
    clips = pipe(classes=["Biking", 3], num_samples=4, seed=0).samples

Letters: N batch, C channels, T frames, H W height and width, h w the same in latent units.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from EqM import architecture, samplers
from EqM.data import autoencoder as autoencoders
from EqM.engine import ema, precision, prepare
from EqM.engine.acceleration import modulated_once
from EqM.engine.precision import Precision
from EqM.models import EqM
from EqM.run import checkpoint, distributed, seeds
from EqM.run.errors import UserError
from EqM.transport import Transport

SHOWN = 8  # class names in a message
YOUNG = 0.1  # of an EMA is its start: worth a line
LABEL = 1  # names the draw of a sample's label, beside that of its noise


@dataclass(frozen=True)
class Samples:
    """What a pipeline drew, sample by sample."""

    samples: np.ndarray  # uint8 (N, H, W, 3), clips (N, T, H, W, 3)
    labels: list[int]
    latents: Tensor  # FP32 (N, C, [T,] h, w)


class EqMPipeline:
    """Draws samples, field and energy of a network that is ready to be sampled.

    model: in eval mode, on run_in's device, prepared for it (see engine/prepare.py). class_names: one for each
    label, None for numbers. The network and the autoencoder are used as they are and never changed.
    """

    def __init__(
        self,
        model: EqM,
        run_in: Precision,
        autoencoder: autoencoders.VAE | autoencoders.PixelSpace | None = None,
        transport: Transport | None = None,
        class_names: Sequence[str] | None = None,
    ):
        self.model = model
        self.run_in = run_in
        self.autoencoder = autoencoder
        self.transport = transport or Transport()
        named = list(class_names or [])
        self.class_names = named + [str(i) for i in range(len(named), model.num_classes)]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        precision: str = "fp32",
        device: str | torch.device | None = None,
        weights: str = "ema",
        compile: bool = False,
        **model_flags: Any,
    ) -> EqMPipeline:
        """The model of a checkpoint, or of the newest one in a run folder.

        precision: fp32, bf16 or fp16, whatever it was trained in. device: left out, the GPU where there is one.
        weights: "ema", "model" for those that were trained, or one of several averages by name ("ema-0.999").
        model_flags: what the checkpoint does not say, named as sample_gd.py's flags (model, image_size, num_classes,
        vae, ...), or another place of its autoencoder.
        Raises UserError if the file is no checkpoint, does not fit, or its autoencoder cannot be had.
        """
        unknown = model_flags.keys() - {*architecture.MODEL_DEFAULTS, "sample_eps", "vae_precision"}
        if unknown:
            raise UserError(f"{', '.join(sorted(unknown))}: no such flag of a model")
        blank = dict.fromkeys(architecture.MODEL_DEFAULTS) | {"sample_eps": None, "vae_precision": "same"}
        file = checkpoint.newest_of(path) if Path(path).is_dir() else path
        where = distributed.device_named(str(device) if device is not None else None)
        run_in = _activate(precision, where)
        args = Namespace(**{**blank, **model_flags})
        return cls.from_saved(checkpoint.load(file), file, args, run_in, weights, compile)

    @classmethod
    def from_saved(
        cls,
        saved: dict,
        path: str | Path,
        args: Namespace,
        run_in: Precision,
        weights: str = "ema",
        compile: bool = False,
        tell: Callable[[str], Any] = print,
    ) -> EqMPipeline:
        """The model of a checkpoint that is loaded: saved, from path.

        args: flags of the model, sample_eps and vae_precision; what they leave open is filled in from the checkpoint.
        tell: called with a line if compile has no effect or the EMA is young. Raises UserError as from_pretrained.
        """
        architecture.follow_checkpoint(args, saved["args"])
        model = architecture.build_model(args)
        checkpoint.load_weights(model, checkpoint.weights_named(saved, weights, path), path, saved["args"])
        held = ema.held_of_start(saved, weights)
        if held is not None and held > YOUNG:
            tell(f"The EMA still holds {held:.0%} of the weights it began with; --weights model takes the trained ones")
        autoencoder = autoencoders.load(args.vae, precision.of_vae(args, run_in))
        transport = Transport(args.path_type, args.prediction, sample_eps=args.sample_eps)
        prepare.for_sampling(model.to(run_in.device), run_in, compile, tell)
        return cls(model, run_in, autoencoder, transport, saved.get("class_names"))

    @property
    def device(self) -> torch.device:
        return self.run_in.device

    def labels(self, classes: Sequence[str | int] | None, indices: Iterable[int], seed: int = 0) -> list[int]:
        """Labels of the samples of these numbers: classes, by name or number, taken in turn; None draws them.

        ["all"] is every class in turn, unless one is called so. Raises UserError for a class that does not exist.
        """
        if classes is None:
            return [seeds.sample_seed(seed, i, LABEL) % self.model.num_classes for i in indices]
        if list(classes) == ["all"] and "all" not in self.class_names:
            return [i % self.model.num_classes for i in indices]
        wanted = [self._label(name) for name in classes]
        return [wanted[i % len(wanted)] for i in indices]

    def _label(self, wanted: str | int) -> int:
        if isinstance(wanted, str) and wanted in self.class_names:
            return self.class_names.index(wanted)
        if str(wanted).isdecimal() and int(wanted) < self.model.num_classes:
            return int(wanted)
        known = ", ".join(self.class_names[:SHOWN]) + (", ..." if len(self.class_names) > SHOWN else "")
        raise UserError(
            f"--classes {wanted} is no class of this checkpoint, which has {len(self.class_names)}: {known}"
        )

    def noise(self, indices: Iterable[int], seed: int = 0) -> Tensor:
        """Where the samples of these numbers start, (N, C, [T,] h, w): a function of seed and number alone."""
        drawn = [torch.randn(self.model.input_shape, generator=seeds.sample_generator(seed, i)) for i in indices]
        return torch.stack(drawn).to(self.device)

    def field(self, x: Tensor, labels: Sequence[str | int] | Tensor, t: Tensor | None = None) -> Tensor:
        """What a sampler climbs at x, shaped like x (N, C, [T,] h, w): minus the gradient of the energy.

        labels: one for each sample; num_classes is the null label. t: (N,) in [0, 1], for models that are conditioned
        on time; left out, 0.
        """
        y = self._as_tensor(labels)
        return self._field(x, torch.zeros(len(x), device=x.device) if t is None else t, y)

    def energy(self, x: Tensor, labels: Sequence[str | int] | Tensor, t: Tensor | None = None) -> Tensor:
        """The energy at x, (N,), of which the field is minus the gradient. t: as field takes it.

        Raises UserError if the model has none.
        """
        if self.model.ebm == "none":
            raise UserError("this model has no explicit energy: it was trained without --ebm")
        t = torch.zeros(len(x), device=x.device) if t is None else t
        with torch.no_grad(), self.run_in.autocast():
            return self.model(x, t, self._as_tensor(labels), get_energy=True)[1]

    def score(self, x: Tensor, labels: Sequence[str | int] | Tensor) -> Tensor:
        """How far each of x (N, C, [T,] h, w) is from the data, (N,): the energy, or the L2 norm of the field where
        the model has no energy. Higher is further. A model that is conditioned on time is asked at the data's end.
        """
        t = torch.full((len(x),), self.transport.interval(self.transport.sample_eps)[1], device=x.device)
        if self.model.ebm == "none":
            return self.field(x, labels, t).float().flatten(1).norm(dim=1)
        return self.energy(x, labels, t)

    def _field(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad(), self.run_in.autocast():
            return self.transport.field(self.model(x, t, y))

    def _as_tensor(self, labels: Sequence[str | int] | Tensor) -> Tensor:
        if isinstance(labels, Tensor):
            return labels.to(self.device)
        null = self.model.num_classes
        return torch.tensor([null if y == null else self._label(y) for y in labels], device=self.device)

    def guided(self, labels: Tensor, cfg_scale: float, cfg_channels: int | None = 3) -> samplers.Field:
        """The field with classifier-free guidance: see samplers.guided."""
        return samplers.guided(self._field, labels, cfg_scale, self.model.num_classes, cfg_channels)

    @torch.no_grad()
    def descend(
        self,
        x: Tensor,
        labels: Sequence[str | int] | Tensor,
        sampler: str = "gd",
        num_sampling_steps: int = 250,
        stepsize: float = 0.0017,
        mu: float = 0.3,
        cfg_scale: float = 4.0,
        cfg_channels: int | None = 3,
        progress: samplers.Progress = iter,
        **settings: Any,
    ) -> Tensor:
        """Follow the guided field from x (N, C, [T,] h, w) to samples, shaped and typed like x.

        The arguments are sample_gd.py's flags. progress wraps the range of updates (tqdm, say). settings: of
        samplers.Descent besides (betas, stop_norm, atol, ...). Raises UserError if dopri5's field is not finite.
        """
        field = self.guided(self._as_tensor(labels), cfg_scale, cfg_channels)
        interval = self.transport.interval(self.transport.sample_eps)
        with modulated_once(self.model):
            try:
                return samplers.descend(
                    field, x, num_sampling_steps, stepsize, sampler, progress, mu=mu, interval=interval, **settings
                )
            except samplers.NoStep as error:
                raise UserError(f"--sampler {sampler}: {error}; try FP32 or a smaller --stepsize") from None

    def encode(self, samples: np.ndarray | Tensor) -> Tensor:
        """Latents (N, C, [T,] h, w) of uint8 images (N, H, W, 3) or clips (N, T, H, W, 3): the posterior's mean."""
        pixels = autoencoders.to_pixels(torch.as_tensor(samples).to(self.device)).movedim(-1, 1)
        return self._autoencoder.mean(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 (N, H, W, 3) or clips (N, T, H, W, 3) of latents (N, C, [T,] h, w), on their device."""
        return autoencoders.to_uint8(self._autoencoder.decode(latents)).movedim(1, -1)

    @property
    def _autoencoder(self) -> autoencoders.VAE | autoencoders.PixelSpace:
        if self.autoencoder is None:
            raise ValueError("this pipeline was made without an autoencoder")
        return self.autoencoder

    def __call__(
        self,
        classes: Sequence[str | int] | None = None,
        num_samples: int = 1,
        seed: int = 0,
        batch_size: int = 256,
        **how: Any,
    ) -> Samples:
        """Samples 0 to num_samples - 1 of a seed, as sample_gd.py writes them for the same seed and batch size.

        classes: names or numbers, taken in turn; None draws labels at random. how: as descend takes it.
        """
        labels = self.labels(classes, range(num_samples), seed)
        noise = how.pop("noise", None)  # langevin's, whose rows count from 0 in each batch
        ends, pictures = [], []
        for start in range(0, num_samples, batch_size):
            batch = range(start, min(start + batch_size, num_samples))
            if noise is not None:
                how["noise"] = partial(_shifted, noise, start)
            x = self.descend(self.noise(batch, seed), torch.tensor([labels[i] for i in batch]), **how)
            pictures.append(self.decode(x).cpu())
            ends.append(x)
        return Samples(torch.cat(pictures).numpy(), labels, torch.cat(ends))


def _shifted(noise: samplers.Noise, start: int, row: int, step: int) -> Tensor:
    return noise(start + row, step)


def _activate(name: str, device: torch.device) -> Precision:
    if name not in precision.DTYPES:
        raise UserError(f"precision {name!r} is none of {', '.join(precision.DTYPES)}")
    return precision.activate(name, device)
