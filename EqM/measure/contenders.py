"""What benchmark.py compares: the work of this repo and of the usual recipe, each as something to call again and again.

Inputs are random unless files are given, and the autoencoder is Stable Diffusion's in shape with random weights:
nothing is downloaded.
"""

import tempfile
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from EqM import samplers, train
from EqM.data import autoencoder as autoencoders
from EqM.data import latent_cache, loader, media
from EqM.data.tables import open_data
from EqM.engine import acceleration, precision, prepare
from EqM.engine.ema import EMA
from EqM.engine.trainer import Trainer
from EqM.guidance import Guided
from EqM.metrics import features
from EqM.metrics.collect import Progress, collect
from EqM.models import EqM_models
from EqM.pipeline import EqMPipeline
from EqM.run import distributed
from EqM.transport import Transport

PRECISIONS = (*precision.FLAGS, "fp32-ieee")  # the last: FP32 without TF32
CHANNELS, FACTOR, CLASSES = 4, 8, 1000  # of Stable Diffusion's latents; of ImageNet
SAMPLING_POINTS, STEPSIZE, CFG_SCALE = 6, 0.0017, 1.5
FILES = 8  # made for the work `encoding`, and read again and again


def resolve(name, device):
    """The Precision of a contender; sets TF32 as it wants it."""
    return precision.activate(name.removesuffix("-ieee"), device, tf32=not name.endswith("-ieee"))


def random_batch(args, device):
    """Latents (N, C, [T,] h, w) and labels (N,)."""
    frames = (args.clip_len,) if args.video else ()
    side = args.image_size // FACTOR
    x = torch.randn(args.batch_size, CHANNELS, *frames, side, side, device=device)
    return x, torch.randint(CLASSES, (args.batch_size,), device=device)


def random_pixels(args, device):
    """Images or clips (N, 3, [T,] H, W)."""
    frames = (args.clip_len,) if args.video else ()
    return torch.rand(args.batch_size, 3, *frames, args.image_size, args.image_size, device=device) * 2 - 1


def build(args, run_in):
    """The network of a benchmark, made on its device: there that takes no time worth waiting for."""
    side = args.image_size // FACTOR
    size = (args.clip_len, side, side) if args.video else side
    with run_in.device:
        return EqM_models[args.model](input_size=size, num_classes=CLASSES)


def stable_diffusion_vae(run_in):
    """An autoencoder of Stable Diffusion's shape (83.7 M parameters) with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    widths = (128, 256, 512, 512)
    network = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        layers_per_block=2,
        latent_channels=CHANNELS,
        norm_num_groups=32,
    )
    return autoencoders.VAE(network.to(run_in.device), run_in, autoencoders.SD_SCALE)


def train_args(args, source):
    """train.py's own arguments, all else at its defaults. source: --latents or --data-path, and a folder."""
    video = ["--video", "--clip-len", args.clip_len] if args.video else []
    words = ["--model", args.model, "--image-size", args.image_size, "--num-workers", args.num_workers, *video]
    words += ["--global-batch-size", args.batch_size, *source]
    settled = train.parse_args([str(word) for word in words])
    vars(settled).update({name: value for name, value in vars(args).items() if name in acceleration.FLAGS})
    return settled


class Training:
    """A training step of train.py. inputs: endless (latents (N, C, [T,] h, w), labels (N,))."""

    def __init__(self, args, run_in, inputs):
        settled = train_args(args, ["--latents", "none"])
        self.trainer = Trainer(settled, build(args, run_in), run_in, total_steps=1)
        self.model = self.trainer.model
        self.inputs = inputs

    def __call__(self):
        return self.trainer.step(self.inputs)[0]


def plain_autocast(run_in):
    return torch.autocast(run_in.device.type, run_in.dtype, enabled=run_in.name != "fp32")


class PlainTraining:
    """The usual recipe: autocast round model and loss, default AdamW, an EMA by parameter, the loss read each step."""

    def __init__(self, args, run_in, inputs):
        self.run_in = run_in
        self.model = build(args, run_in).train()
        self.ema = EMA(self.model).model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0)
        self.scaler = run_in.grad_scaler()
        self.transport = Transport()
        self.inputs = inputs

    def __call__(self):
        x1, y = next(self.inputs)
        point = self.transport.sample(x1)
        with plain_autocast(self.run_in):
            output = self.model(point.xt, point.t, y)
            loss = self.transport.loss(output, point).mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for ours, theirs in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                ours.mul_(0.9999).add_(theirs, alpha=1 - 0.9999)
        return loss.item()


class Sampling:
    """Guided gradient descent, SAMPLING_POINTS - 1 updates, as sample_gd.py does it."""

    def __init__(self, args, run_in):
        self.model = prepare.for_sampling(build(args, run_in), run_in, args.compile)
        self.pipe = EqMPipeline(self.model, run_in)
        self.x, self.y = random_batch(args, run_in.device)

    def __call__(self):
        return self.pipe.descend(
            self.x, self.y, num_sampling_steps=SAMPLING_POINTS, stepsize=STEPSIZE, cfg_scale=CFG_SCALE
        )


class PlainSampling:
    """The same descent under plain autocast, which casts every weight at every call."""

    def __init__(self, args, run_in):
        self.run_in = run_in
        self.model = build(args, run_in).eval().requires_grad_(False)
        self.x, self.y = random_batch(args, run_in.device)

    def field(self, x, t, y):
        with plain_autocast(self.run_in):
            return self.model(x, t, y)

    @torch.no_grad()
    def __call__(self):
        field = Guided(self.field, self.y, CFG_SCALE, CLASSES)
        return samplers.descend(field, self.x, SAMPLING_POINTS, STEPSIZE)


class Encoding:
    """Posterior moments of a batch of pixels."""

    def __init__(self, args, run_in):
        self.vae = stable_diffusion_vae(run_in)
        self.pixels = random_pixels(args, run_in.device)

    def __call__(self):
        return self.vae.posterior(self.pixels)


class InMemory:
    """Images uint8 (N, H, W, 3) as a source of evaluate.py, in FP32 whatever the precision."""

    is_clips, recipe = False, None

    def __init__(self, images):
        self.images = images
        self.count, *self.shape = images.shape

    def batches(self, wanted):
        return (self.images[torch.tensor(indices)] for indices in wanted)


class Features:
    """Features and moments of a batch of images, as evaluate.py takes them."""

    def __init__(self, args, run_in):
        self.networks = features.Networks(features.Inception(features.locate(args.inception), run_in.device))
        self.source = InMemory(random_images(args))
        self.ranks = distributed.Ranks(0, 1, run_in.device)

    def __call__(self):
        return collect(self.source, self.networks, self.ranks, Progress(), shown=False)


class PlainFeatures:
    """The same features by torch-fidelity's own loop, at the batch that ours goes through the network in."""

    def __init__(self, args, run_in):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        weights = str(features.locate(args.inception))
        network = FeatureExtractorInceptionV3("plain", ["2048"], feature_extractor_weights_path=weights)
        self.network = network.to(run_in.device)
        self.images = Images(random_images(args).movedim(-1, 1).contiguous())
        self.batch = features.images_at_once(run_in.device)
        self.on_gpu = run_in.device.type == "cuda"

    def __call__(self):
        from torch_fidelity.utils import get_featuresdict_from_dataset

        # save_cpu_ram: without processes, for which these images need not be read
        return get_featuresdict_from_dataset(
            self.images, self.network, self.batch, self.on_gpu, save_cpu_ram=True, verbose=False
        )


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def random_images(args):
    """uint8 (N, H, W, 3)."""
    return torch.randint(256, (args.batch_size, args.image_size, args.image_size, 3), dtype=torch.uint8)


def from_batch(args, run_in):
    """Endless inputs of training: the same latents and labels, already on the device."""
    return repeat(random_batch(args, run_in.device))


def from_cache(args, run_in):
    """Endless inputs of training from a latent cache on disk, through train.py's own loader."""
    x, labels = random_batch(args, torch.device("cpu"))
    moments = torch.stack([x, 0.1 * x.abs()], dim=1).unsqueeze(1).expand(-1, 2, *[-1] * x.ndim)  # mirrored too
    with tempfile.TemporaryDirectory() as folder:
        settled = train_args(args, ["--latents", folder])
        names = [str(i) for i in range(CLASSES)]
        meta = {name: getattr(settled, name) for name in latent_cache.KEY} | {"class_names": names}
        files = np.zeros(len(x), [("name", "S1"), ("size", "<i8"), ("time", "<i8"), ("label", "<i8")])
        files["label"] = labels
        layout, _, _ = latent_cache.create(folder, meta, files, moments.shape[1:])
        with latent_cache.Writer(layout) as writer:
            writer.write(range(len(x)), moments)
        dataset = latent_cache.LatentCache(folder, settled)
        yield from loader.batches(settled, dataset, None, distributed.Ranks(0, 1, run_in.device), 0, print)


def from_files(args, run_in):
    """Endless inputs of training from files, encoded on the way, through train.py's own loader."""
    vae = stable_diffusion_vae(run_in)
    with tempfile.TemporaryDirectory() as folder:
        settled = train_args(args, ["--data-path", args.data_path or make_files(args, Path(folder))])
        dataset = open_data(settled, settled.flip)
        yield from loader.batches(settled, dataset, vae, distributed.Ranks(0, 1, run_in.device), 0, print)


def make_files(args, root):
    """FILES clips as UCF-101's (320 x 240, 180 frames), or images as ImageNet's (500 x 375), in one class folder."""
    folder = root / "class"
    folder.mkdir()
    rng = np.random.default_rng(0)
    side = 16 if args.video else 25
    for i in range(FILES):
        scene = np.kron(rng.integers(0, 256, (15, 20, 3), np.uint8), np.ones((side, side, 1), np.uint8))
        if args.video:
            media.save_sample(folder / f"{i}.mp4", np.stack([np.roll(scene, t, axis=1) for t in range(180)]), fps=25)
        else:
            media.save_sample(folder / f"{i}.png", scene[None], fps=1)
    return root


OURS = {
    "train": lambda args, run_in: Training(args, run_in, from_batch(args, run_in)),
    "sample": Sampling,
    "encode": Encoding,
    "encoding": lambda args, run_in: Training(args, run_in, from_files(args, run_in)),
    "cached": lambda args, run_in: Training(args, run_in, from_cache(args, run_in)),
    "features": Features,
}
PLAIN = {  # the usual recipe has no cache, and its autoencoder is FP32
    "train": lambda args, run_in: PlainTraining(args, run_in, from_batch(args, run_in)),
    "sample": PlainSampling,
    "encode": lambda args, run_in: Encoding(args, precision.fp32(run_in.device)),
    "encoding": lambda args, run_in: PlainTraining(args, run_in, from_files(args, precision.fp32(run_in.device))),
    "features": PlainFeatures,
}
RECIPES = {"ours": OURS, "plain": PLAIN}
