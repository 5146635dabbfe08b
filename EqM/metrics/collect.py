"""Features of all items of a source, by all ranks, kept on the way so that a kill costs seconds."""

import hashlib
import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path

import torch

from EqM.metrics.features import CLIP, CLIPS
from EqM.metrics.figures import Moments
from EqM.run import checkpoint, distributed, resume
from EqM.run.errors import UserError, reason
from EqM.run.log import progress

SAVED_EVERY = 20.0  # seconds
HANDED_OVER = 4096  # items, after which they leave the device also where nothing is saved
KINDS = ("pooled", "spatial", "motion")  # features of images or frames, those of sFID, those of clips


class Tally:
    """Features as they come in: moments of all kinds, and each item's pooled ones, of a clip its frames' mean."""

    def __init__(self):
        self.batches = []  # their numbers
        self.indices = []
        self._rows = []
        self._moments = {kind: Moments() for kind in KINDS}
        self.sound = True  # False while a batch is half in

    def add(self, number, indices, pixels, networks):
        """Take in batch `number`: items of these indices, uint8 (n, H, W, 3) or (n, T, H, W, 3)."""
        found = {}
        clips = pixels.ndim == 5
        found["pooled"], found["spatial"] = networks.inception(pixels.flatten(0, 1) if clips else pixels)
        if clips and networks.motion is not None and pixels.shape[1] >= CLIP:
            found["motion"] = networks.motion(pixels)
        rows = found["pooled"].unflatten(0, pixels.shape[:2]).mean(1) if clips else found["pooled"]
        self.sound = False  # a signal may come anywhere
        for kind, features in found.items():
            self._moments[kind].add(features)
        self._rows.append(rows)
        self.indices += indices
        self.batches.append(number)
        self.sound = True

    def state(self):
        """All of it, as plain values and tensors on the CPU."""
        return {
            "batches": self.batches,
            "indices": self.indices,
            "rows": torch.cat(self._rows).cpu() if self._rows else None,
            "moments": {kind: moments.state() for kind, moments in self._moments.items()},
        }


class Collected:
    """What Tallies of `count` items hold together, on the CPU. features: (count, D) FP32, in the items' order."""

    def __init__(self, count):
        self.count = count
        self.batches = []
        self.features = None
        self.moments = {kind: Moments() for kind in KINDS}
        self._indices = []

    def merge(self, state):
        """Take in the state of a Tally, or of another Collected."""
        if state["rows"] is None:
            return
        if self.features is None:  # at once, since 50,000 rows that are put together later are in memory twice
            self.features = torch.empty(self.count, state["rows"].shape[1])
        self.features[torch.tensor(state["indices"])] = state["rows"]
        self.batches = self.batches + state["batches"]
        self._indices = self._indices + state["indices"]
        for kind, moments in state["moments"].items():
            self.moments[kind].merge(moments)

    def state(self):
        return {
            "batches": self.batches,
            "indices": self._indices,
            "rows": None if self.features is None else self.features[torch.tensor(self._indices)],
            "moments": {kind: moments.state() for kind, moments in self.moments.items()},
        }


class Progress:
    """Files beside --json that say how far an evaluation is. Without a path nothing is kept."""

    def __init__(self, path=None):
        self.folder = None if path is None else Path(f"{path}.progress")

    def open(self):
        """Make the folder, and keep it to this process. For the main rank."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--json: {self.folder} cannot be made: {error.strerror}") from None
        resume.lock_run(self.folder, "--json")

    def parts(self, recipe):
        """States of the Tallies that were kept of this recipe."""
        if self.folder is None or recipe is None:
            return
        for path in sorted(self.folder.glob(f"{_key(recipe)}-*.pt")):
            try:
                yield torch.load(path, weights_only=True)
            except Exception as error:
                raise UserError(f"{path} is damaged ({reason(error)}); remove it to do that part again") from None

    def save(self, recipe, rank, tally):
        if self.folder is not None and recipe is not None:
            checkpoint.save(self.folder / f"{_key(recipe)}-{rank}-{time.time_ns()}.pt", tally.state())

    def figures(self, recipe):
        """The figures that were kept of this recipe, or None."""
        if self.folder is None or recipe is None:
            return None
        try:
            return json.loads((self.folder / f"{_key(recipe)}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def finish(self, recipe, figures, made_of):
        """Keep figures in place of the features they were made from, whose recipe is made_of."""
        if self.folder is None or recipe is None:
            return
        path = self.folder / f"{_key(recipe)}.json"
        path.with_suffix(".writing").write_text(json.dumps(figures), encoding="utf-8")
        os.replace(path.with_suffix(".writing"), path)
        for part in self.folder.glob(f"{_key(made_of)}-*.pt"):
            part.unlink(missing_ok=True)

    def remove(self):
        """Nothing is left to go on with."""
        if self.folder is not None and self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()


def _key(recipe):
    return hashlib.blake2b(json.dumps(recipe, default=str).encode(), digest_size=8).hexdigest()


def recipe_of(source, networks):
    """What is equal only for the same features in the same batches; None for a source that does not say what it is."""
    return None if source.recipe is None else [source.recipe, _batch_of(source, networks), networks.told()]


def _batch_of(source, networks):
    return getattr(source, "batch", None) or (CLIPS if source.is_clips else networks.inception.batch)


def collect(source, networks, ranks, kept, desc="features", shown=True):
    """The Collected of all items of a source on the main rank; elsewhere None. Every rank must call it.

    Batches are of one size and ranks take them in turn, so that each holds the same items however many ranks there
    are. kept: a Progress, in which parts of it may lie. desc, shown: of the bar.
    """
    size, recipe = _batch_of(source, networks), recipe_of(source, networks)
    mine = Collected(source.count)
    distributed.on_main(ranks, kept.open, share=False)
    done = distributed.on_main(ranks, lambda: _taken_up(mine, kept.parts(recipe)))
    numbers = [n for n in range(math.ceil(source.count / size)) if n not in done][ranks.rank :: ranks.world_size]
    lists = [list(range(n * size, min((n + 1) * size, source.count))) for n in numbers]
    unit = "clip" if source.is_clips else "image"
    bar = progress(desc=desc, total=sum(map(len, lists)), unit=unit, shown=shown and ranks.is_main)
    fresh, saved = Tally(), time.monotonic()
    try:
        for number, indices, pixels in zip(numbers, lists, source.batches(lists), strict=True):
            fresh.add(number, indices, pixels, networks)
            bar.update(len(indices))
            if time.monotonic() - saved > SAVED_EVERY or len(fresh.indices) >= HANDED_OVER:
                kept.save(recipe, ranks.rank, fresh)
                mine.merge(fresh.state())
                fresh, saved = Tally(), time.monotonic()
    except BaseException:
        if fresh.batches and fresh.sound:
            kept.save(recipe, ranks.rank, fresh)
        raise
    bar.close()
    mine.merge(fresh.state())
    states = distributed.to_main(ranks, None if ranks.is_main else mine.state())
    if states is None:
        return None
    for state in states[1:]:
        mine.merge(state)
    return mine


def _taken_up(collected, states):
    for state in states:
        if set(state["batches"]).isdisjoint(collected.batches):  # a kill between two lines may leave a part twice
            collected.merge(state)
    return set(collected.batches)
