"""A trained model to call: field, energy, guided descent and decoding, in any precision.

    from EqM import EqMPipeline
    pipe = EqMPipeline.from_pretrained("results/000-EqM-S-4-Linear-velocity-None", precision="bf16")
    clips = pipe(classes=["Biking", 3], num_samples=4, seed=0).samples

Letters: N batch, C channels, T frames, H W height and width, h w the same in latent units.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from EqM import architecture, samplers
from EqM.composition import Asked, Composition
from EqM.data import autoencoder as autoencoders
from EqM.engine import ema, precision, prepare
from EqM.engine.precision import Precision
from EqM.guidance import Guided
from EqM.models import EqM
from EqM.run import checkpoint, distributed, resume, seeds
from EqM.run.errors import UserError
from EqM.transport import Transport

YOUNG = 0.1  # of an EMA is its start: worth a line
LABEL, HEAT = 1, 2  # name the draws of a sample's label and of langevin's noise, beside that of where it starts


@dataclass(frozen=True)
class Samples:
    """What a pipeline drew, sample by sample."""

    samples: np.ndarray  # uint8 (N, H, W, 3), clips (N, T, H, W, 3)
    labels: list[Asked]
    latents: Tensor  # FP32 (N, C, [T,] h, w)
    evaluations: list[int]  # of the field, for each sample


class Drawn(NamedTuple):
    """Samples that ended: their numbers, where they ended, and how often the field was evaluated for each."""

    indices: list[int]
    x: Tensor  # FP32 (n, C, [T,] h, w)
    evaluations: list[int]


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
        self.composition = Composition(model, run_in, self.transport, class_names)
        self.vae: str | None = None  # what the flag says, where it is known
        self.advice: dict[str, Any] = {}  # how to descend, as whoever exported the model found it best

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        precision: str = "fp32",
        device: str | torch.device | None = None,
        weights: str = "ema",
        compile: bool = False,
        tell: Callable[[str], Any] = print,
        **model_flags: Any,
    ) -> EqMPipeline:
        """The model of a checkpoint, of the newest one in a run folder, or of what export.py took away.

        path: of one of these; an export's may be its name on the hub, user/name.
        precision: fp32, bf16 or fp16, whatever it was trained in. device: left out, the GPU where there is one.
        weights: "ema", "model" for those that were trained, or one of several averages by name ("ema-0.999").
        model_flags: what the checkpoint does not say, named as sample_gd.py's flags (model, image_size, num_classes,
        vae, ...), or another place of its autoencoder. tell: as from_saved.
        Raises UserError if the file is no checkpoint, does not fit, or its autoencoder cannot be had.
        """
        args, file = _flags(model_flags), checkpoint.locate(path)
        where = distributed.device_named(str(device) if device is not None else None)
        run_in = _activate(precision, where)
        return cls.from_saved(checkpoint.load(file), file, args, run_in, weights, compile, tell)

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
        if line := young(saved, weights):
            tell(line)
        autoencoder = autoencoders.load(args.vae, precision.of_vae(args, run_in))
        transport = Transport(args.path_type, args.prediction, sample_eps=args.sample_eps)
        prepare.for_sampling(model.to(run_in.device), run_in, compile, tell)
        pipe = cls(model, run_in, autoencoder, transport, saved.get("class_names"))
        pipe.vae, pipe.advice = args.vae, saved.get("advice", {})
        return pipe

    def also(
        self,
        path: str | Path,
        saved: dict | None = None,
        weights: str = "ema",
        compile: bool = False,
        tell: Callable[[str], Any] = print,
        **model_flags: Any,
    ) -> EqMPipeline:
        """Follow the mean of this field and another checkpoint's, of the same latent space, from now on.

        Classes are told by name: see composition.Composition. saved: the checkpoint's content, if it is loaded.
        Returns this pipeline. Raises UserError if its latents have another shape, autoencoder or path.
        """
        args, file = _flags(model_flags), checkpoint.locate(path)
        saved = saved or checkpoint.load(file)
        architecture.follow_checkpoint(args, saved["args"])
        model = architecture.build_model(args)
        theirs, ours = _times(model.input_shape), _times(self.model.input_shape)
        if theirs != ours:
            raise UserError(
                f"{file} cannot be added: its latents are {theirs}, and those of what it is added to {ours}"
            )
        if self.vae is not None and not _same_latents(args.vae, self.vae):
            raise UserError(
                f"{file} cannot be added: its autoencoder is {args.vae}, and that of what it is added to {self.vae}"
            )
        if args.path_type != self.transport.path_type:
            theirs, ours = args.path_type, self.transport.path_type
            raise UserError(f"{file} cannot be added: its path is {theirs}, and that of what it is added to {ours}")
        checkpoint.load_weights(model, checkpoint.weights_named(saved, weights, file, "--also"), file, saved["args"])
        prepare.for_sampling(model.to(self.device), self.run_in, compile, tell)
        self.composition.add(model, Transport(args.path_type, args.prediction), saved.get("class_names"))
        return self

    @property
    def device(self) -> torch.device:
        return self.run_in.device

    @property
    def class_names(self) -> list[str]:
        """A name for each label."""
        return self.composition.class_names

    def labels(self, classes: Sequence[str | int] | None, indices: Iterable[int], seed: int = 0) -> list[Asked]:
        """Labels of the samples of these numbers: classes, by name or number, taken in turn; None draws them.

        ["all"] is every class in turn, unless one is called so. The label of a sum of classes, such as
        "panda*0.7+valley*0.3", is {label: weight}. Raises UserError for a class that does not exist.
        """
        if classes is None:
            return [seeds.sample_seed(seed, i, LABEL) % self.model.num_classes for i in indices]
        if isinstance(classes, str):
            raise UserError(f"classes is one text, {classes!r}; give a list, [{classes!r}]")
        if not len(classes):
            raise UserError("classes is empty; name some, or give None for labels at random")
        if list(classes) == ["all"] and "all" not in self.class_names:
            return [i % len(self.class_names) for i in indices]
        wanted = [self.composition.asked(name) for name in classes]
        return [wanted[i % len(wanted)] for i in indices]

    def noise(self, indices: Iterable[int], seed: int = 0) -> Tensor:
        """Where the samples of these numbers start, (N, C, [T,] h, w): a function of seed and number alone."""
        drawn = [torch.randn(self.model.input_shape, generator=seeds.sample_generator(seed, i)) for i in indices]
        return torch.stack(drawn).to(self.device)

    def starts(
        self, indices: Sequence[int], seed: int = 0, start: Sequence[np.ndarray] | None = None, start_noise: float = 0.5
    ) -> Tensor:
        """Where samples of these numbers start: their noise, or (1 - n) start + n noise, n being start_noise.

        start: uint8 images (H, W, 3) or clips (T, H, W, 3), sample i's being start[i % len(start)]; encoded by the
        posterior's mean. The model is not told n. Raises UserError if they are of another size than what it makes.
        """
        if start is not None and not len(start):
            raise UserError("start is empty; give images or clips, or None for noise alone")
        noise = self.noise(indices, seed)
        if start is None or start_noise == 1:
            return noise
        given = self.encode(np.stack([start[i % len(start)] for i in indices]))
        if given.shape != noise.shape:
            theirs, ours = _times(given.shape[1:]), _times(noise.shape[1:])
            raise UserError(f"the latents of a start are {theirs}, and this model's {ours}: give starts of its size")
        return (1 - start_noise) * given + start_noise * noise

    def field(self, x: Tensor, labels: Sequence[str | int | Asked] | Tensor, t: Tensor | None = None) -> Tensor:
        """What a sampler climbs at x, shaped like x (N, C, [T,] h, w): minus the gradient of the energy.

        labels: one for each sample, or a sum of classes; "none" or composition.null_label, the number of class_names,
        is the label of no class, which `also` moves. t: (N,) in [0, 1], for models that are conditioned on time; left
        out, 0.
        """
        return self.guided(labels, 1.0)(x, torch.zeros(len(x), device=x.device) if t is None else t)

    def energy(self, x: Tensor, labels: Sequence[str | int | Asked] | Tensor, t: Tensor | None = None) -> Tensor:
        """The energy at x, (N,), of which the field is minus the gradient. t: as field takes it.

        Raises UserError if the model has none.
        """
        return self.composition.energy(x, labels, t)

    def score(self, x: Tensor, labels: Sequence[str | int | Asked] | Tensor) -> Tensor:
        """How far each of x (N, C, [T,] h, w) is from the data, (N,): the energy, or the L2 norm of the field where
        the model has no energy. Higher is further. A model that is conditioned on time is asked at the data's end.
        """
        t = torch.full((len(x),), self.transport.interval(self.transport.sample_eps)[1], device=x.device)
        if self.model.ebm == "none":
            return self.field(x, labels, t).float().flatten(1).norm(dim=1)
        return self.energy(x, labels, t)

    def guided(
        self, labels: Sequence[str | int | Asked] | Tensor, cfg_scale: float, cfg_channels: int | None = 3
    ) -> Guided:
        """The field of these samples with classifier-free guidance: see guidance.Guided."""
        return self.composition.guided(labels, cfg_scale, cfg_channels)

    @torch.no_grad()
    def descend(
        self,
        x: Tensor,
        labels: Sequence[str | int | Asked] | Tensor,
        sampler: str = "gd",
        num_sampling_steps: int = 250,
        stepsize: float | None = None,
        mu: float = 0.3,
        cfg_scale: float = 4.0,
        cfg_channels: int | None = 3,
        progress: samplers.Progress = iter,
        **settings: Any,
    ) -> Tensor:
        """Follow the guided field from x (N, C, [T,] h, w) to samples, shaped and typed like x.

        The arguments are sample_gd.py's flags. stepsize: left out, the sampler's own. progress wraps the range of
        updates (tqdm, say). settings: flags or settings of samplers.Descent besides (beta1, stop_norm, observe, ...),
        and the seed of langevin's noise, where row i of x counts as sample i. Raises UserError if dopri5's field is
        not finite.
        """
        settings |= {"sampler": sampler, "num_sampling_steps": num_sampling_steps, "stepsize": stepsize, "mu": mu}
        descent = self._descent(range(len(x)), **settings)
        with self._descending(sampler):
            return descent.run(self.guided(labels, cfg_scale, cfg_channels), x, progress).x

    @torch.no_grad()
    def draw(
        self,
        labels: Sequence[str | int | Asked],
        indices: Sequence[int],
        seed: int = 0,
        batch_size: int = 256,
        start: Sequence[np.ndarray] | None = None,
        start_noise: float = 0.5,
        cfg_scale: float = 4.0,
        cfg_channels: int | None = 3,
        progress: samplers.Progress = iter,
        **how: Any,
    ) -> Iterator[Drawn]:
        """The samples of these numbers, each with its label, as they end, up to batch_size of them together.

        batch_size descend at once for as long as others wait: one that is done makes room for the next.
        start, start_noise: as `starts` takes them. progress wraps the count of updates. how: as `descend` takes it.
        Raises UserError if batch_size is below 1, or for what `starts` refuses.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        descent = self._descent(indices, seed=seed, **how)
        chunks = (indices[first : first + batch_size] for first in range(0, len(indices), batch_size))
        waiting = (x for chunk in chunks for x in self.starts(chunk, seed, start, start_noise))
        field = self.guided(labels, cfg_scale, cfg_channels)
        with self._descending(descent.sampler):
            coming = descent.stream(field, waiting, batch_size, progress)
            while ended := list(itertools.islice(coming, batch_size)):
                x = torch.stack([end.x for end in ended])
                yield Drawn([indices[end.row] for end in ended], x, [end.evaluations for end in ended])

    def _descent(
        self,
        indices: Sequence[int],
        sampler: str = "gd",
        num_sampling_steps: int = 250,
        stepsize: float | None = None,
        seed: int = 0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        noise: samplers.Noise | None = None,
        **settings: Any,
    ) -> samplers.Descent:
        """How samples of these numbers descend. noise(number, step): langevin's; left out, drawn from the seed."""

        def drawn(index: int, step: int) -> Tensor:
            return torch.randn(self.model.input_shape, generator=seeds.sample_generator(seed, index, HEAT, step))

        draw = noise or drawn
        settings.setdefault("betas", (beta1, beta2))
        settings.setdefault("interval", self.transport.interval(self.transport.sample_eps))
        eta = samplers.STEPSIZES.get(sampler, 0.0) if stepsize is None else stepsize
        return samplers.Descent(
            num_sampling_steps, eta, sampler, noise=lambda row, step: draw(indices[row], step), **settings
        )

    @contextmanager
    def _descending(self, sampler: str) -> Iterator[None]:
        with self.composition.modulated_once():
            try:
                yield
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

        classes: names, numbers or sums of them ("panda*0.7+valley*0.3"), taken in turn; None draws labels at random.
        how: as draw takes it. Raises UserError for classes that do not exist, and for numbers below 1.
        """
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}; it must be at least 1")
        labels = self.labels(classes, range(num_samples), seed)
        latents = torch.empty(num_samples, *self.model.input_shape, device=self.device)
        ended: dict[int, tuple[np.ndarray, int]] = {}
        for part in self.draw(labels, range(num_samples), seed, batch_size, **how):
            latents[part.indices] = part.x
            decoded = self.decode(part.x).cpu().numpy()
            ended.update(zip(part.indices, zip(decoded, part.evaluations, strict=True), strict=True))
        pictures, evaluations = zip(*(ended[i] for i in range(num_samples)), strict=True)
        return Samples(np.stack(pictures), labels, latents, list(evaluations))


def young(saved: dict, weights: str) -> str | None:
    """A line about an average that still holds much of where it began; None of all else.

    saved: as checkpoint.load. weights: as checkpoint.weights_named.
    """
    held = ema.held_of_start(saved, weights)
    if held is None or held <= YOUNG:
        return None
    alone = saved.get("stand_in") == "model"
    how = "what it was exported from has the trained ones" if alone else "--weights model takes the trained ones"
    return f"The EMA still holds {held:.0%} of the weights it began with; {how}"


def _flags(given: dict[str, Any]) -> Namespace:
    """Flags of a model, those left out open for the checkpoint. Raises UserError for others."""
    unknown = given.keys() - {*architecture.MODEL_DEFAULTS, "sample_eps", "vae_precision"}
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))}: no such flag of a model")
    blank = dict.fromkeys(architecture.MODEL_DEFAULTS) | {"sample_eps": None, "vae_precision": "same"}
    return Namespace(**{**blank, **given})


def _same_latents(a: str, b: str) -> bool:
    """Whether two values of --vae name one latent space, as far as names tell. The published two share an encoder."""
    return {a, b} <= set(autoencoders.PUBLISHED) or resume.same_vae(a, b)


def _times(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _activate(name: str, device: torch.device) -> Precision:
    if name not in precision.DTYPES:
        raise UserError(f"precision {name!r} is none of {', '.join(precision.DTYPES)}")
    return precision.activate(name, device)
