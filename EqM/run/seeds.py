"""Random numbers that depend on what they are for, never on what was drawn before.

A step's noise follows from (seed, step, rank), a sample's from (seed, index), a file's crop and flip from
(seed, epoch, file): so a resumed run needs no generator states, and ranks and workers cannot disagree.
Training's numbers go through `mix`, sampling's through `sample_seed`, so that no sample is the noise of a step.
"""

import hashlib

import numpy as np
import torch


def mix(*numbers):
    """Hash non-negative integers into one 63-bit seed.

    NumPy fills up to four numbers with zeros, so that mix(s, i) is mix(s, i, 0). Runs that are on disk go on with it.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1  # NumPy 1 shifts no uint64


def seed_step(seed, step, rank):
    """Seed torch on every device for one training step of one rank. Does not wait for the device."""
    torch.manual_seed(mix(seed, step, rank))


def coin(*numbers):
    """Heads or tails, as True or False, for the thing these numbers name."""
    return mix(*numbers) % 2 == 1


def generator(*numbers):
    """A CPU generator for the thing these numbers name."""
    return torch.Generator().manual_seed(mix(*numbers))


def sample_seed(seed, index, *more):
    """A 32-bit seed of what is random about sample `index`, such as (seed, index, step); unrelated to `mix`.

    Of one (seed, *more), 2**32 indices have as many different seeds: torch's CPU generator reads no more than 32 bits
    of one, and a hash would give two of 50,000 samples the same noise once in four times.
    """
    numbers = [int(number) for number in (seed, *more)]  # their text would differ between int and np.int64
    key = hashlib.blake2b(repr(numbers).encode(), digest_size=8, person=b"EqM sample").digest()
    before, after = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")
    bits = (int(index) ^ before) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's final mix, which is one to one
        bits = (bits ^ bits >> shift) * factor & 0xFFFFFFFF
    return (bits ^ bits >> 16) ^ after


def sample_generator(seed, index, *more):
    """A CPU generator for sample `index` of this seed, and for a thing about it that further numbers name."""
    return torch.Generator().manual_seed(sample_seed(seed, index, *more))
