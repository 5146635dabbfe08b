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


def coins(seed, epochs, indices):
    """What coin(seed, epoch, index) says of each, for arrays (N,) of both: bool (N,), a microsecond each for 64.

    The arithmetic is that of NumPy's SeedSequence, whose numbers NumPy promises to keep: the words of the numbers fill
    a pool of four, each of its words is mixed into the other three, and the first makes the first word that comes out.
    """
    epochs, indices = np.asarray(epochs), np.asarray(indices)
    if seed >= 1 << 64 or max(epochs.max(initial=0), indices.max(initial=0)) >= 1 << 32:  # more than four words
        return np.array([coin(seed, *map(int, pair)) for pair in zip(epochs, indices, strict=True)], bool)
    words = [seed & 0xFFFFFFFF, seed >> 32] if seed >> 32 else [seed]
    pool = np.zeros((4, len(indices)), np.uint32)
    for row, word in zip(pool, (*words, epochs, indices), strict=False):
        row[:] = word
    pool = _hashed(pool, _POOL_CONSTANTS[:5])
    for source in range(4):
        others = [row for row in range(4) if row != source]
        first = 4 + 3 * source
        mixed = 0xCA01F9DD * pool[others] - 0x4973F715 * _hashed(pool[source], _POOL_CONSTANTS[first : first + 4])
        pool[others] = mixed ^ mixed >> 16
    return (_hashed(pool[:1], _OUT_CONSTANTS)[0] & 2) != 0  # mix drops the lowest bit


def _powers(start, factor, count):
    """start times 1, factor, its square, ..., modulo 2**32, as a column."""
    return np.array([start * pow(factor, n, 1 << 32) % (1 << 32) for n in range(count)], np.uint32)[:, None]


_POOL_CONSTANTS = _powers(0x43B0D7E5, 0x931E8875, 4 + 4 * 3 + 1)
_OUT_CONSTANTS = _powers(0x8B51F9DD, 0x58F38DED, 2)


def _hashed(words, constants):
    """SeedSequence's hash of words (N,) or (k, N) by k + 1 of its constants in their order: uint32 (k, N)."""
    words = (words ^ constants[:-1]) * constants[1:]
    return words ^ words >> 16


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
