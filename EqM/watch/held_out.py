"""Loss on items that are not trained on, at the same times and with the same noise whenever it is asked for.

Letters: N items of a batch, C channels, T frames, h w height and width in latent units.
"""

from argparse import Namespace

import numpy as np
import torch

from EqM.data import autoencoder as autoencoders
from EqM.data import latent_cache, loader
from EqM.data.tables import called, open_data
from EqM.run import distributed, seeds
from EqM.run.errors import UserError, printable

BINS = 5  # equal parts of the times, each with as many items
TIME, NOISE, LATENT = range(1 << 20, (1 << 20) + 3)  # name the draws of an item's time and noise, and of its latents


def open_items(args, class_names):
    """What --val-path or --val-latents holds, not mirrored and always the same window of a clip; None without them.

    Raises UserError if it cannot be read, or has a class that is not one of class_names.
    """
    if not (args.val_path or args.val_latents):
        return None
    given = Namespace(**{**vars(args), "data_path": args.val_path, "csv": args.val_csv, "flip": False})
    with called("--val-path"):
        if args.val_latents:
            dataset = latent_cache.LatentCache(args.val_latents, given)
        else:
            dataset = open_data(given, flip=False, beside=args.data_path)
    unknown = sorted(set(dataset.class_names) - set(class_names))
    if unknown:
        flag = "--val-latents" if args.val_latents else "--val-path"
        raise UserError(f"{flag} has classes that are not trained: {', '.join(map(printable, unknown[:5]))}")
    return dataset


class HeldOut:
    """Call it with a step: it logs the loss of the model and of its average, in the run's precision.

    Every rank takes its share of the items. An item's time and noise depend on its number and the run's seed alone;
    labels are never dropped. Items are encoded here, once, drawn from their posteriors, and stay in the host's memory.
    dataset: of open_items. averaged: the averaged network, ready to be called. class_names: that labels stand for.
    Raises UserError if too many items cannot be read.
    """

    def __init__(self, args, ranks, trainer, averaged, autoencoder, dataset, class_names, log):
        self.log = log
        self.trainer = trainer
        self.averaged = averaged
        self.batch_size = loader.micro_batch_size(args, ranks)
        taken = np.linspace(0, len(dataset) - 1, min(len(dataset), args.val_items)).round().astype(int).tolist()
        share = -(-len(taken) // ranks.world_size)
        places = [ranks.rank + n * ranks.world_size for n in range(share)]
        # All ranks call the network as often, as a sharded one needs; what stands in for a missing item counts nothing.
        self.counts = torch.tensor([float(place < len(taken)) for place in places])
        self.indices = [taken[min(place, len(taken) - 1)] for place in places]
        self.bins = torch.tensor([place % BINS for place in places])
        self.seed = args.global_seed
        within = [torch.rand(1, generator=seeds.sample_generator(self.seed, index, TIME)) for index in self.indices]
        self.times = (self.bins + torch.cat(within)) / BINS
        labels = [class_names.index(name) for name in dataset.class_names]
        self._read(args, dataset, autoencoder, ranks.device, torch.tensor(labels))

    def _read(self, args, dataset, autoencoder, device, labels):
        keys = [[(0, index) for index in part] for part in _parts(self.indices, self.batch_size)]
        bad_files = loader.BadFiles(dataset, args.max_bad_fraction, self.log.info)
        latents, classes = [], []
        for items, own, bad in loader.read(dataset, keys, args.num_workers, device.type == "cuda"):
            bad_files.note(bad)  # another of its class stands in
            if not args.val_latents:
                items = autoencoder.posterior(autoencoders.to_pixels(items.to(device))).cpu()
            start = sum(map(len, latents))
            latents.append(self._drawn(items.float(), self.indices[start : start + len(items)]))
            classes.append(labels[own])
        self.latents, self.labels = torch.cat(latents), torch.cat(classes)

    def _drawn(self, moments, indices):
        """Latents (n, C, [T,] h, w) from the posterior's moments (n, 2, ...): drawn as in training, always alike."""
        mean, std = moments.unbind(1)
        return mean + std * self._normal(mean.shape[1:], indices, LATENT)

    def __call__(self, step):
        model = self.trainer.model
        networks = {"Val Loss": model, "EMA Val Loss": self.averaged}
        model.eval()  # which drops no labels
        try:
            sums = self._sums(list(networks.values()))
        finally:
            model.train()
        figures = {}
        for name, (total, count) in zip(networks, distributed.mean(sums).cpu(), strict=True):
            figures[name] = (total.sum() / count.sum()).item()
            bins = enumerate((total / count).tolist())
            figures |= {f"{name} t {i / BINS:g}-{(i + 1) / BINS:g}": loss for i, loss in bins}
        self.log.step(step, figures)

    @torch.no_grad()
    def _sums(self, networks):
        """Of each network, the sum of this rank's losses in each bin, and their number: (networks, 2, BINS)."""
        trainer, device = self.trainer, self.trainer.run_in.device
        sums = torch.zeros(len(networks), 2, BINS, dtype=torch.float64, device=device)
        for part in _parts(range(len(self.indices)), self.batch_size):
            rows = slice(part[0], part[-1] + 1)
            point, labels = self._point(rows), self.labels[rows].to(device)
            counts, bins = self.counts[rows].to(device), self.bins[rows].to(device)
            for network, own in zip(networks, sums, strict=True):
                with trainer.run_in.autocast():
                    output = network(point.xt, point.t, labels)
                losses = torch.where(counts > 0, trainer.transport.loss(output, point), 0)
                own.index_add_(1, bins, torch.stack([losses, counts]).double())
        return sums

    def _point(self, rows):
        """The PathPoint of some items, on the device."""
        device, transport = self.trainer.run_in.device, self.trainer.transport
        x1 = self.latents[rows].to(device)
        start, end = transport.interval(transport.train_eps)
        t = (start + (end - start) * self.times[rows]).to(device)
        return transport.plan(self._normal(x1.shape[1:], self.indices[rows], NOISE).to(device), x1, t)

    def _normal(self, shape, indices, draw):
        """A standard normal tensor for each item, (n, *shape), on the CPU. draw: what it is for, as NOISE."""
        each = [torch.randn(shape, generator=seeds.sample_generator(self.seed, index, draw)) for index in indices]
        return torch.stack(each)


def _parts(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]
