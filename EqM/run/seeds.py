"""Random numbers that depend on what they are for, never on what was drawn before.

A step's noise follows from (seed, step, rank), a sample's from (seed, index), a file's crop and flip from
(seed, epoch, file): so a resumed run needs no generator states, and ranks and workers cannot disagree.
"""

import numpy as np
import torch


def mix(*numbers):
    """Hash non-negative integers into one 63-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_step(seed, step, rank):
    """Seed torch on every device for one training step of one rank. Does not wait for the device."""
    torch.manual_seed(mix(seed, step, rank))


def coin(*numbers):
    """Heads or tails, as True or False, for the thing these numbers name."""
    return mix(*numbers) % 2 == 1


def generator(*numbers):
    """A CPU generator for the thing these numbers name."""
    return torch.Generator().manual_seed(mix(*numbers))
