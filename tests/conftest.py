"""Small data and a script runner that the tests share."""

import os

# Each is read once, when its library is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_CACHE=os.devnull)  # as on a machine without network or cached weights

import signal
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import peaks
import tiny_autoencoders
from helpers import SIGNALS, load_script, write_clip

torch.set_num_threads(1)

TAKE_LONG = ("errors", "in_turn", "two_ranks", "inception_file")  # fixtures; with --dist loadgroup each is made once


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    for item in items:
        for name in set(TAKE_LONG).intersection(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Two classes of three small png files each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """Two classes of two clips each: 6 frames, 48 wide and 40 high, growing brighter."""
    root = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for name in ("jump", "run"):
        (root / name).mkdir()
        for i in range(2):
            scene = np.kron(rng.integers(0, 120, (5, 6, 3)), np.ones((8, 8, 1)))
            frames = np.stack([scene + 20 * t for t in range(6)]).astype(np.uint8)
            write_clip(root / name / f"{i}.mp4", frames)
    return root


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """Folder of a random AutoencoderKL: 4 latent channels, 4 pixels a latent, scaling factor 0.5."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    channels = (8, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=channels,
            down_block_types=["DownEncoderBlock2D"] * len(channels),
            up_block_types=["UpDecoderBlock2D"] * len(channels),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.5,
            sample_size=32,
            mid_block_add_attention=False,
        ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Weights of torch-fidelity's Inception, random."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    no_weights = (
        mock.patch.object(fidelity, "load_state_dict_from_url"),
        mock.patch.object(nn.Module, "load_state_dict"),
    )
    with torch.random.fork_rng(), no_weights[0], no_weights[1]:
        torch.manual_seed(0)
        network = fidelity.FeatureExtractorInceptionV3("random", ["2048"])
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def i3d_file(tmp_path_factory):
    """A tiny scripted network that is called as I3D is: 8 features of a clip."""

    class Tiny(nn.Module):
        def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
            assert rescale and resize and return_features
            return nn.functional.adaptive_avg_pool3d(x / 255, (4, 2, 1)).mean(1).flatten(1)

    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Tiny()).save(path)
    return path


@pytest.fixture(scope="session")
def autoencoder_folders(tmp_path_factory):
    """Folder of a tiny random autoencoder of each class that --vae takes."""
    root = tmp_path_factory.mktemp("autoencoders")
    for kind in tiny_autoencoders.CONFIGS:
        tiny_autoencoders.build(kind).save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in tiny_autoencoders.CONFIGS}


@pytest.fixture
def small_peak(monkeypatch):
    """The benchmark measures the machine's peak by a small product, in its own process as ever."""
    monkeypatch.setattr("EqM.measure.benchmark.matmul_peak", peaks.of_a_small_product)


@pytest.fixture
def run_script(monkeypatch, capfd):
    """run_script("train", *argv): a script in this process, as its command line would; code, out, err."""
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def run(script, *argv):
        from EqM import cli

        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
        capfd.readouterr()
        code = 0
        try:
            cli.run(load_script(script).main)
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        captured = capfd.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run
