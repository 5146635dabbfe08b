"""What several tests use: the smallest runs, files and checkpoints, and how two of them are compared."""

import hashlib
import importlib.util
import os
import signal
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from EqM.data import files
from EqM.models import EqM_models
from EqM.run import checkpoint

REPO = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join([str(REPO), str(REPO / "tests")])  # for processes that import the package and tests' files
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # train.py installs handlers for these


def write_clip(path, frames, codec="libx264", rate=10, options=None, pix_fmt="yuv420p"):
    """Encode uint8 frames (T, H, W, 3); the path's suffix names the container."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def numbered_clip(path, count, **more):
    """A clip whose frame i has brightness 10 i."""
    write_clip(path, np.stack([np.full((32, 32, 3), 10 * i, np.uint8) for i in range(count)]), **more)
    return path


def labelled_files(folder, clips=False, **more):
    """A folder's items, 16 pixels a side; clips of 4 frames."""
    paths, labels, names = files.find_files(folder, clips)
    return files.LabelledFiles(paths, labels, names, **{"size": 16, "clip_len": 4 if clips else None, **more})


def train_args(data_path, results_dir, *more):
    """Command line of the smallest training run: images as pixels, two steps, on the CPU."""
    words = "--vae none --image-size 8 --model EqM-T/4 --global-batch-size 4 --max-steps 2 --num-workers 0 --device cpu"
    return ["--data-path", str(data_path), "--results-dir", str(results_dir), *words.split(), *map(str, more)]


def load_script(name):
    """The module of a command or tool that people call by this name."""
    for module in (f"EqM.{name}", f"EqM.measure.{name}", name):
        if importlib.util.find_spec(module):
            return importlib.import_module(module)
    raise AssertionError(f"there is no script {name}")


NAMES = ["cat", "dog", "owl"]
IMAGE_ARGS = {
    "model": "EqM-T/4", "image_size": 8, "num_classes": 3, "vae": "none", "uncond": True, "ebm": "none", "video": False,
}  # fmt: skip
CLIP_ARGS = {**IMAGE_ARGS, "video": True, "clip_len": 4}


def save_checkpoint(path, args, seed=0, names=NAMES):
    """A random network, saved as train.py would."""
    torch.manual_seed(seed)
    size = (4, 8, 8) if args.get("video") else 8
    model = EqM_models["EqM-T/4"](input_size=size, num_classes=len(names), in_channels=3, ebm=args["ebm"])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05) if parameter.requires_grad else None
    weights = model.state_dict()
    checkpoint.save(path, {"model": weights, "ema": weights, "args": args, "class_names": names, "step": 3})
    return path


class TinyNetwork:
    """In Inception's place: colours and contrast of an image."""

    digest, batch, sizes, device = "tiny", 4, (4, 3), torch.device("cpu")
    weight = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))

    def __call__(self, images):
        x = images.float().flatten(1, 2) / 255
        colours = x.mean(1)
        return torch.cat([colours, x.std(dim=(1, 2))[:, None]], 1), colours


def leaves(tree):
    return torch.utils._pytree.tree_leaves_with_path(tree)


def assert_same_checkpoint(one, other):
    """Bit for bit, but for the args that differ on purpose."""
    ours, theirs = (
        {k: v for k, v in torch.load(p, weights_only=True).items() if k not in ("args", "meter")} for p in (one, other)
    )
    assert ours.keys() == theirs.keys()
    for (path, a), (_, b) in zip(leaves(ours), leaves(theirs), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def newest(results_dir, same_run):
    """(path, content) of the newest good checkpoint of the newest run for which same_run(args), or None."""
    return next((each for each in checkpoint.found(results_dir) if same_run(each[1]["args"])), None)


class FlatInception:
    """Stands in for features.Inception where a test is not about it: a fixed projection, in no time.

    Of the file it takes the digest alone. Features: 6 pooled, 4 spatial; 5 classes.
    """

    sizes = (6, 4)

    def __init__(self, path, device):
        self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.batch = 4
        self.device = device
        self.seen = 0  # images
        drawn = torch.Generator().manual_seed(0)
        self._onto = torch.randn(12, 10, generator=drawn).double()
        self.weight = torch.randn(5, 6, generator=drawn)

    def __call__(self, images):
        self.seen += len(images)
        coarse = torch.nn.functional.adaptive_avg_pool2d(images.movedim(-1, 1).double(), 2).flatten(1)  # (n, 12)
        found = torch.tanh((coarse - 128) / 60) @ self._onto
        found = found.float()  # from FP64: by FP32 alone, a row's last digit would depend on its place in the batch
        return found[:, :6].contiguous(), found[:, 6:].contiguous()


def write_pictures(folder, count, seed=0, size=8):
    """Smooth random png files 000.png, ... of a side."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures(count, seed, size)):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    return folder


def pictures(count, seed=0, size=8):
    """uint8 (count, size, size, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3), np.uint8)
    return coarse.repeat(size // 2, 1).repeat(size // 2, 2)
