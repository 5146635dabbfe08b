"""Figures of samples against a reference, by all ranks: what evaluate.py and --eval-every call.

networks = features.load(ranks)
evaluator = Evaluator(open_reference("ref.npz", networks), networks, ranks)
figures = evaluator.judge(Drawn(pipe, 5000, shape=(256, 256, 3), how={"cfg_scale": 1.5}))    # {"fid": ..., ...}
"""

import torch

from EqM.data import media
from EqM.metrics import figures, reference
from EqM.metrics.collect import Progress, collect, recipe_of
from EqM.metrics.features import CLIP
from EqM.run import distributed
from EqM.run.errors import UserError

SHOWN = 16  # samples beside their neighbours


class Evaluator:
    """Judges sources against one reference, whose features are taken once.

    against: of reference.open_reference. kept: a Progress, for what must survive a kill. tell: takes lines on the main
    rank. Nothing random of the process is touched.
    """

    def __init__(self, against, networks, ranks, kept=None, tell=print):
        self.against = against
        self.networks = networks
        self.ranks = ranks
        self.kept = kept or Progress()
        self.tell = tell if ranks.is_main else lambda line: None
        self._prepared = False
        self._statistics = None  # of the reference, on the main rank
        self._told = set()

    def judge(self, source, desc="samples"):
        """The figures of a source, a dict without those that do not apply, on every rank, which all must call it."""
        reference.check_sizes(source, self.against)
        recipe = None if source.recipe is None else [source.recipe, self.against.recipe, self.networks.told()]
        before = distributed.on_main(self.ranks, lambda: self.kept.figures(recipe))
        if before is not None:
            return before
        self._prepare()
        collected = collect(source, self.networks, self.ranks, self.kept, desc)
        found = distributed.on_main(self.ranks, lambda: self._figures(source, collected))
        if self.ranks.is_main:
            self.kept.finish(recipe, found, made_of=recipe_of(source, self.networks))
        return found

    def _prepare(self):
        if not self._prepared:
            self._statistics = self.against.statistics(self.networks, self.ranks, self.kept)
            self._prepared = True

    def _figures(self, source, collected):
        ours, theirs = reference.of_collected(collected), self._statistics
        distance = {}
        for kind in ours.gaussians.keys() & theirs.gaussians.keys():
            one, other = ours.gaussians[kind], theirs.gaussians[kind]
            if one.mean.shape != other.mean.shape:
                raise UserError(f"the reference has {len(other.mean)} features by --i3d, these clips {len(one.mean)}")
            distance[kind] = figures.frechet(one, other)
        self._warn(source, collected)
        if source.is_clips:
            found = {"fvd": distance.get("motion"), "frame_fid": distance.get("pooled")}
        else:
            found = {"fid": distance.get("pooled"), "sfid": distance.get("spatial"), **self._of_items(ours.features)}
        return {name: value for name, value in found.items() if value is not None}

    def _of_items(self, features):
        """Figures that need the features of single images."""
        found, device, theirs = {}, self.ranks.device, self._statistics
        if len(features) >= figures.SPLITS:
            found["inception_score"] = figures.inception_score(features, self.networks.inception.weight)
        else:
            self._say(f"the Inception Score needs {figures.SPLITS} images: left out")
        few = 0 if theirs.features is None else min(len(features), len(theirs.features))
        if few >= 2 and theirs.kid:
            found["kid"], found["kid_error"] = figures.kid(features, theirs.features, device)
        if few > figures.NEIGHBOURS:
            found["precision"], found["recall"] = figures.precision_recall(features, theirs.features, device)
        return found

    def _warn(self, source, collected):
        for kind, name in (("motion", "FVD"), ("pooled", "FID"), ("spatial", "sFID")):
            moments = collected.moments[kind]
            if moments.count and moments.count <= moments.size and not (kind == "spatial" and source.is_clips):
                self._say(
                    f"warning: {moments.count} samples give a singular covariance of {moments.size} features, so that "
                    f"{name} comes out too high: it needs at least {moments.size + 1}"
                )
        if source.is_clips and not (collected.moments["motion"].count and "motion" in self._statistics.gaussians):
            why = "the reference has no features by I3D, so make it anew with --i3d FILE"
            if source.shape[0] < CLIP:
                why = f"it wants {CLIP} frames, and these clips have {source.shape[0]}"
            elif self.networks.motion is None:
                why = "it wants --i3d FILE"
            self._say(f"no FVD: {why}; the FID of frames alone")

    def _say(self, line):
        if line not in self._told:
            self._told.add(line)
            self.tell(line)

    def neighbours(self, source, k):
        """A picture of the first samples, each beside the k closest items of the reference; None but on the main rank.

        Closest by pooled features, of clips by their frames' mean. Every rank must call it.
        """
        if self.against.source is None:
            raise UserError("--neighbours needs the reference's items, and this one has moments alone")
        self._prepare()
        return distributed.on_main(self.ranks, lambda: self._picture(source, k), share=False)

    def _picture(self, source, k):
        theirs = self._statistics.features
        if theirs is None:
            raise UserError("--neighbours needs the features of the reference's items, and this one has none")
        indices = list(range(min(SHOWN, source.count)))
        pixels = source.read(indices).cpu()
        mine = self._pooled(pixels)
        distances, found = figures.nearest(mine, theirs, min(k, len(theirs)), self.ranks.device)
        shown, names = [], []
        for i, (row, near) in enumerate(zip(found.tolist(), distances.tolist(), strict=True)):
            items = media.as_clips(torch.cat([pixels[i : i + 1], self.against.source.read(row).cpu()])).numpy()
            shown += list(items)
            names += [f"sample {i}", *(f"{each:.2f}" for each in near)]
        return media.contact_sheet(shown, names, columns=1 + len(found[0]))

    def _pooled(self, pixels):
        if pixels.ndim == 4:
            return self.networks.inception(pixels)[0].cpu()
        return self.networks.inception(pixels.flatten(0, 1))[0].unflatten(0, pixels.shape[:2]).mean(1).cpu()
