"""The networks whose features are compared: torch-fidelity's Inception for images, a scripted I3D for clips.

Letters: N batch, T frames, H W height and width. Both are fed batches of one fixed size, so that the features of an
item depend neither on its neighbours nor on how many ranks and what batch size there are.
"""

import hashlib
import io
import pickle
import socket
import urllib.error
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from EqM.run import distributed
from EqM.run.errors import UserError, reason

NAME = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{NAME}"
DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # SHA-256
PATIENCE = 20.0  # seconds in which a server must answer
SPATIAL = 7  # channels of sFID, of ADM's mixed_6/conv:0 (arXiv 2103.03841, arXiv 2105.05233)
CLIP = 16  # frames that FVD is about
IMAGES = {"cpu": 4}  # images at once; a CPU gains nothing from more
OTHERWISE = 64
CLIPS = 8  # clips at once


@dataclass(frozen=True)
class Networks:
    """What features are taken by. motion is None where no I3D was given: clips then have an FID of frames alone."""

    inception: "Inception"
    motion: "I3D | None" = None

    def told(self):
        """For a protocol: which files, and how images come in."""
        told = {
            "network": "Inception V3 of torch-fidelity (TensorFlow's of 2015-12-05)",
            "digest": self.inception.digest,
            "published": self.inception.digest == DIGEST,
            "resize": "299 x 299, bilinear as TensorFlow 1.x",
        }
        if self.motion is not None:
            told["i3d_digest"] = self.motion.digest
        return told


def load(ranks, inception=None, i3d=None, tell=print):
    """The Networks of two files, on the ranks' device. inception: left out, torch-fidelity's file from its cache.

    Every rank must call it. Raises UserError if a file cannot be had, or is something else. tell: takes a line on the
    main rank if figures will not compare with published ones.
    """
    distributed.on_main(ranks, lambda: locate(inception))
    network = Inception(locate(inception), ranks.device)
    if ranks.is_main and network.digest != DIGEST:
        tell(
            f"--inception {inception} has the digest {network.digest[:16]}..., not that of {NAME}: "
            "figures are not comparable with published figures"
        )
    return Networks(network, I3D(i3d, ranks.device) if i3d else None)


def locate(file=None):
    """Path of the Inception weights: the file given, else torch-fidelity's, from its cache or its own address.

    Raises UserError with what to fetch, from where and where to put it.
    """
    if file is not None:
        if not Path(file).is_file():
            raise UserError(f"--inception {file} is not a file; {_where_from()}")
        return Path(file)
    path = _cached()
    if not path.exists():
        _fetch(path)
    if digest_of(path) != DIGEST:
        raise UserError(
            f"{path} is not the published file: its SHA-256 is {digest_of(path)[:16]}..., not {DIGEST[:16]}...; "
            f"remove it, or give another network by --inception. {_where_from()}"
        )
    return path


def _cached():
    return Path(torch.hub.get_dir()) / "checkpoints" / NAME


def _where_from():
    return f"{NAME} is at {URL}: put it at {_cached()}, or give it by --inception FILE"


def _fetch(path):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=DIGEST, progress=False)
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise UserError(f"the Inception weights cannot be fetched ({reason(error)}). {_where_from()}") from None
    finally:
        socket.setdefaulttimeout(before)


def digest_of(path):
    """SHA-256 of a file. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _sha(file):
    """For Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class Inception:
    """torch-fidelity's InceptionV3: images uint8 (n, H, W, 3) to features (n, 2048) and spatial ones (n, 2023), FP32.

    The spatial features are those of sFID: the first 7 channels of Mixed_6d.branch1x1, flattened H, W, C. weight: of
    the last layer, (1008, 2048). Nothing random of the process is touched.
    """

    sizes = (2048, 2023)

    def __init__(self, path, device):
        self.digest = digest_of(path)
        self.batch = images_at_once(device)
        self.device = device
        with torch.random.fork_rng(devices=[]):
            self._network = _built(path).to(device)
        self.weight = self._network.fc.weight.detach()
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self._spatial = None

    def _keep(self, module, given, result):
        self._spatial = result[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)  # (n, 7, 17, 17) -> (n, 2023)

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.device).movedim(-1, 1).contiguous()  # else last digits differ from torch-fidelity's
        pooled, spatial = [], []
        with _ieee(self.device):
            for part, real in _batches(images, self.batch):
                pooled.append(self._network(part)[0][:real])
                spatial.append(self._spatial[:real])
        return torch.cat(pooled), torch.cat(spatial)


def images_at_once(device):
    """Size of the batches that go through Inception on a device."""
    return IMAGES.get(device.type, OTHERWISE)


def _built(path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # seconds to import

    state = _weights_of(path)
    given = io.BytesIO()  # its constructor wants a file, and would run what is in one
    torch.save(state, given)
    given.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=given)
    except RuntimeError:  # which lists every key
        raise UserError(f"--inception {path} holds weights of another network; {_where_from()}") from None


def _weights_of(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"--inception {path} holds more than weights, or is damaged; {_where_from()}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"--inception {path} cannot be read ({reason(error)}); {_where_from()}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"--inception {path} holds no state dict; {_where_from()}")
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise UserError(f"--inception {path} holds values that are not finite; {_where_from()}")
    return state


class I3D:
    """A scripted I3D as StyleGAN-V calls it: the first 16 frames of clips uint8 (n, T, H, W, 3) to FP32 (n, D)."""

    def __init__(self, path, device):
        self.digest = digest_of(path)
        self.device = device
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, that scripts are of the past
                self._network = torch.jit.load(str(path), map_location=device).eval()
        except Exception as error:  # over what is no script, anything
            raise UserError(f"--i3d {path} does not load as a TorchScript network: {reason(error)}") from None
        self._path = path

    @torch.no_grad()
    def __call__(self, clips):
        clips = clips[:, :CLIP].to(self.device).movedim(-1, 1).float()  # (n, 3, 16, H, W) from 0 to 255
        found = []
        with _ieee(self.device):
            for part, real in _batches(clips, CLIPS):
                try:
                    features = self._network(part, rescale=True, resize=True, return_features=True)
                except RuntimeError as error:
                    raise UserError(
                        f"--i3d {self._path} cannot be called as net(clips, rescale=True, resize=True, "
                        f"return_features=True): {reason(error)}"
                    ) from None
                if features.ndim != 2 or len(features) != len(part):
                    raise UserError(f"--i3d {self._path} gives {tuple(features.shape)}, not a row for each clip")
                found.append(features[:real].float())
        return torch.cat(found)


def _batches(items, size):
    """(batch of exactly `size` items, how many of them are real) over items, the last repeated to fill up."""
    for part in items.split(size):
        missing = size - len(part)
        yield (torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part), len(part)


@contextmanager
def _ieee(device):
    """Convolutions in FP32, whatever a run wants of its own: TF32 would move features by 1e-3."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
