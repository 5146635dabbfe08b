"""A training run rehearsed on tensors without values, to count what its steps hold, start and move.

It is train.py's own step (`Trainer.step`), inputs drawn from a latent cache or encoded on the way, with the fused
optimizer, averages and all, and one update of `--sample-every`. Left out are `--compile`, what ranks send each other,
and data loading, which is the host's.
"""

import argparse
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from EqM import architecture
from EqM.data import autoencoder as autoencoders
from EqM.data.geometry import from_hub, geometry
from EqM.engine import precision, prepare
from EqM.engine.precision import Precision
from EqM.engine.trainer import Trainer
from EqM.measure import contenders
from EqM.measure.counting import Count, once_a_chunk
from EqM.measure.fake_cuda import CUDA, fake_cpu, fake_cuda, like_cuda
from EqM.run.hub import is_hub_name
from EqM.watch.preview import Preview

PARTS = ("weights", "gradients", "moments", "ema", "activations", "autoencoder")


@dataclass
class Step:
    """What one training step took, in bytes, floating-point operations and kernels."""

    batch: int  # of one forward pass
    peak: int
    parts: dict[str, int]  # the most that each held; not all of them need be there when all together is most
    block: int  # bytes that one block keeps for the backward pass, beside what does not grow with the batch
    kernels: int
    moved: int  # by everything but products
    products: dict  # (kind, dtype): operations
    by_name: Counter = field(repr=False)  # kernels


@contextmanager
def rehearsal(args, name, capability=(8, 0), shards=1):
    """A Run of train.py's settled args in a precision: on a card of this compute capability, or with --device cpu.

    shards: over how many ranks --shard splits the network.
    Raises UserError as precision.activate.
    """
    on_card = args.device != "cpu"
    device = CUDA if on_card and torch.backends.cuda.is_built() else torch.device("cpu")
    count = Count(device.type)

    def stands(parameter):
        count.mark([parameter.grad], "gradients")

    if not on_card:
        fakes = fake_cpu(stands)
    elif device.type == "cuda":
        fakes = fake_cuda(capability, strict=False, on_gradient=stands)
    else:
        fakes = like_cuda(capability, stands)
    with fakes, count:
        stand_in = on_card and device.type == "cpu"
        run_in = Precision(name, device, "") if stand_in else precision.activate(name, device, tf32=not args.no_tf32)
        yield Run(argparse.Namespace(**vars(args)), run_in, count, shards)


class Run:
    """Call it with the size of a forward pass, and how many make a step: the Step it takes."""

    def __init__(self, args, run_in, count, shards=1):
        self.args = args
        self.shards = shards
        self.count = count
        self.device = run_in.device
        with self._for("autoencoder"):
            needed = not args.latents or args.sample_every
            self.autoencoder = build_autoencoder(args.vae, precision.of_vae(args, run_in)) if needed else None
        if isinstance(self.autoencoder, autoencoders.VAE):
            encode_few(self.autoencoder, count)
        self.model = architecture.build_model(args).to(self.device)
        self.trainer = Trainer(args, self.model, run_in, total_steps=1, tell=lambda line: None)
        self.entries = []  # what was held when each block was entered
        for block in self.model.blocks:
            block.register_forward_pre_hook(lambda *_: self.entries.append(count.held["activations"]))
        self._make_moments()
        names = [str(i) for i in range(args.num_classes)]
        self.preview = None
        if args.sample_every:
            averaged = prepare.for_averages(self.trainer.ema.model, run_in)
            self.preview = Preview(Path(), args, self.trainer, averaged, self.autoencoder, names)

    def _make_moments(self):
        """They are there from the first step on, and say what else the trainer's parts are."""
        optimizer = self.trainer.optimizer
        for parameter in self.model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, part in self.trainer.parts().items():
            if isinstance(part, torch.nn.Module):
                self.count.mark([*part.parameters(), *part.buffers()], "weights" if name == "model" else "ema")
        states = [value for state in optimizer.state.values() for value in state.values()]
        self.count.mark([value for value in states if isinstance(value, torch.Tensor)], "moments")

    def __call__(self, batch, passes=1):
        self.args.grad_accum_steps = passes
        self.trainer.optimizer.zero_grad(set_to_none=True)
        self.entries.clear()
        count = self.count
        count.reset()
        self.trainer.step(self._stream(batch))
        first, second = self.entries[1:3] if len(self.entries) > 2 else (0, 0)
        taken = second - first, count.kernels, count.moved, dict(count.products), Counter(count.by_name)
        if self.preview:  # it follows a step, and is none
            pipe, settings = self.preview.pipe, {"num_sampling_steps": 2, "cfg_scale": self.args.cfg_scale}
            pipe.decode(pipe.descend(self.preview.noise, self.preview.labels, **settings))
        parts, peak = {part: count.most[part] for part in PARTS}, count.peak
        if self.shards > 1:
            parts, peak = self._share(parts, peak, passes)
        return Step(batch, peak, parts, *taken)

    def _share(self, parts, peak, passes):
        """A rank's share of parts that --shard splits, by arithmetic: no second rank is here to rehearse with.

        Two blocks are whole at a time, one that runs and one that is fetched ahead, and so is what is no block's.
        """
        sizes = [sum(p.numel() * p.itemsize for p in block.parameters()) for block in self.model.blocks]
        whole = 2 * sizes[0] + parts["weights"] - sum(sizes)
        split = {part: parts[part] // self.shards for part in ("weights", "gradients", "moments", "ema")}
        standing = [part for part in split if part != "gradients" or passes > 1]
        peak += whole - sum(parts[part] - split[part] for part in standing)
        return {**parts, **split, "activations": parts["activations"] + whole}, peak

    def _stream(self, batch):
        """As loader.batches gives them, but for the host's part."""
        frames = (self.args.clip_len,) if self.args.video else ()
        side = self.args.image_size
        while True:
            labels = torch.zeros(batch, dtype=torch.long, device=self.device)
            if self.args.latents:
                moments = torch.zeros(batch, 2, *self.model.input_shape, dtype=torch.float16, device=self.device)
                latents = autoencoders.draw(moments)
            else:
                with self._for("autoencoder"):
                    pixels = torch.zeros(batch, 3, *frames, side, side, dtype=torch.uint8, device=self.device)
                    latents = self.autoencoder.encode(autoencoders.to_pixels(pixels))
                    pixels = None
                self.count.mark([latents], "activations")
            moments = None
            yield latents, labels

    @contextmanager
    def _for(self, part):
        """New memory within it is this part's."""
        self.count.part = part
        try:
            yield
        finally:
            self.count.part = "activations"


def encode_few(autoencoder, count):
    """Let an autoencoder encode one chunk of each size, and count those that are like it.

    A large batch has thousands, which take kernels each and the same memory after each other.
    """
    split, posterior, size = autoencoder._chunks, once_a_chunk(autoencoder._posterior, count), 1

    def chunks(items, pixels_each):
        if pixels_each > 1:  # it decodes
            return split(items, pixels_each)
        nonlocal size
        size = len(split(items[: autoencoders.MOST], pixels_each)[0])
        whole = len(items) // size * size
        return [part for part in (items[:size], items[size:whole], items[whole:]) if len(part)]

    autoencoder._chunks = chunks
    autoencoder._posterior = lambda items: posterior(items, size)


def build_autoencoder(name, run_in):
    """The autoencoder that --vae names, in shape; its weights are not loaded."""
    if name == "none":
        return autoencoders.PixelSpace()
    with run_in.device:
        if name in autoencoders.PUBLISHED:
            return contenders.stable_diffusion_vae(run_in)
        import diffusers

        kind = getattr(diffusers, geometry(name).kind)

        def config(place, folder, local_files_only):
            return kind.load_config(place, subfolder=folder, local_files_only=local_files_only)

        found = from_hub(config, name) if is_hub_name(name) else config(name, None, True)
        return autoencoders.VAE(kind.from_config(found), run_in)
