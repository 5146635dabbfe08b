"""What samples are compared with: a source of real items, or moments of them in an npz, ADM's or of our own making.

Keys of such an npz, as ADM's suite has them: mu, sigma of pooled features, mu_s, sigma_s of spatial ones, arr_0 up to
10,000 of the images. Ours has besides: features of arr_0, mu_v, sigma_v of clips by I3D, and made, a JSON text that
says how it was made.
"""

import json
import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from EqM.engine import precision
from EqM.metrics.collect import collect
from EqM.metrics.figures import Gaussian
from EqM.metrics.sources import Npz, open_source, size_of
from EqM.run.errors import UserError, printable, reason

KEYS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "motion": ("mu_v", "sigma_v")}
IMAGES = 10_000  # of arr_0
READ = 256  # of them in memory at once
SEED = 0  # of which


@dataclass(frozen=True)
class Statistics:
    """Normal distributions by kind of features, None where there are none; pooled features (N, D) of items, if known.

    kid: whether these items may stand for the whole set in KID.
    """

    gaussians: dict[str, Gaussian]
    features: Tensor | None
    kid: bool = True


def of_collected(collected):
    """The Statistics of what was collected."""
    gaussians = {kind: moments.gaussian() for kind, moments in collected.moments.items() if moments.count}
    return Statistics(gaussians, collected.features)


class FromSource:
    """A reference that is a source: its features are taken when they are first needed."""

    def __init__(self, source):
        self.source = source
        self.shape = source.shape
        self.told = source.told
        self.recipe = source.recipe

    def statistics(self, networks, ranks, kept):
        collected = collect(self.source, networks, ranks, kept, "reference")
        return None if collected is None else of_collected(collected)


class Saved:
    """A reference npz. Raises UserError if it is damaged, or its features are not those of the networks."""

    def __init__(self, path, networks):
        self.path = Path(path)
        self._moments = {}
        try:
            with np.load(path) as archive:
                names = set(archive.files)
                self.made = json.loads(str(archive["made"])) if "made" in names else {}
                for kind, keys in KEYS.items():
                    if names.issuperset(keys):
                        self._moments[kind] = tuple(torch.from_numpy(archive[key]).double() for key in keys)
                self._features = torch.from_numpy(archive["features"]).float() if "features" in names else None
            if not isinstance(self.made, dict) or not isinstance(self.made.get("features", {}), dict):
                raise ValueError("made is no JSON object that names features")
            if "pooled" not in self._moments:
                raise ValueError("it has mu without sigma")
        except Exception as error:  # over damaged archives numpy raises anything
            raise UserError(f"--reference {path} is damaged or no npz: {reason(error)}") from None
        self._check(networks)
        self.source = Npz(path) if "arr_0" in names else None
        self.shape = self.source.shape if self.source else tuple(self.made.get("shape", ()))
        status = os.stat(path)
        self.recipe = ["npz", os.path.abspath(path), status.st_size, status.st_mtime_ns]
        self.told = (
            {"reference": str(path), **self.made} if self.made else {"reference": str(path), "made_by": "others"}
        )

    def _check(self, networks):
        wanted = dict(zip(("pooled", "spatial"), networks.inception.sizes, strict=True))
        for kind, (mean, covariance) in self._moments.items():
            size = wanted.get(kind, mean.numel())
            if mean.shape != (size,) or covariance.shape != (size, size):
                raise UserError(
                    f"--reference {self.path} was made of other features: {KEYS[kind][0]} has the shape "
                    f"{tuple(mean.shape)}, where {size} features are taken"
                )
            if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
                raise UserError(f"--reference {self.path} is damaged: {KEYS[kind][0]} holds values that are not finite")
        if self._features is not None and self._features.shape[1:] != (wanted["pooled"],):
            raise UserError(f"--reference {self.path} is damaged: its features are {tuple(self._features.shape)}")
        ours = {"digest": networks.inception.digest, "i3d_digest": networks.motion and networks.motion.digest}
        for name, flag in (("digest", "--inception"), ("i3d_digest", "--i3d")):
            theirs = self.made.get("features", {}).get(name)
            if theirs and ours[name] and theirs != ours[name]:
                raise UserError(
                    f"--reference {self.path} was made of other features: by the network {theirs[:16]}..., not "
                    f"{ours[name][:16]}...; give that one by {flag}, or make the reference anew"
                )

    def statistics(self, networks, ranks, kept):
        features = self._features
        if features is None and self.source is not None and not self.source.is_clips:
            collected = collect(self.source, networks, ranks, kept, "reference")
            features = None if collected is None else collected.features
        if not ranks.is_main:
            return None
        gaussians = {kind: Gaussian.of(*moments) for kind, moments in self._moments.items()}
        return Statistics(gaussians, features, kid=bool(self.made))


def open_reference(path, networks, run_in=None, vae=None, tell=print):
    """The reference that a path names: one of our own or ADM's, or a source. Raises UserError.

    run_in: of the autoencoder that decodes a latent cache; left out, FP32. vae: where it lies now.
    """
    if Path(path).is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"--reference {printable(path)} is no npz: {reason(error)}") from None
        if "mu.npy" in names:
            return Saved(path, networks)
    return FromSource(open_source(path, run_in or precision.fp32(networks.inception.device), vae, tell))


def make(source, out, networks, ranks, kept):
    """Write the reference npz of a source. Every rank must call it; returns what it says of itself on the main rank."""
    collected = collect(source, networks, ranks, kept, "reference")
    if collected is None:
        return None
    made = {"made_by": "EqM", "source": source.told, "shape": list(source.shape), "features": networks.told()}
    arrays = {"made": np.array(json.dumps(made))}
    for kind, keys in KEYS.items():
        if collected.moments[kind].count:
            arrays |= dict(
                zip(keys, (part.numpy() for part in collected.moments[kind].mean_and_covariance()), strict=True)
            )
    shown = np.sort(np.random.default_rng(SEED).permutation(source.count)[:IMAGES])
    if not source.is_clips:
        arrays["features"] = collected.features[shown].numpy()
    partial = Path(f"{out}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
            if not source.is_clips:
                _write_images(archive, source, shown)
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return made


def _write_images(archive, source, indices):
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(indices), *source.shape)}
    with archive.open("arr_0.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for images in source.batches([part.tolist() for part in np.split(indices, range(READ, len(indices), READ))]):
            file.write(images.cpu().numpy().tobytes())


def check_sizes(judged, reference):
    """Raise UserError unless two sets of items have one size."""
    if reference.shape and tuple(judged.shape) != tuple(reference.shape):
        raise UserError(
            f"what is judged is {size_of(judged.shape)}, the reference {size_of(reference.shape)}: make one of the "
            "same size by evaluate.py --make-reference DIR --image-size, which crops as training does"
        )
