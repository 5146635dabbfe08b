"""Random numbers that depend on what they are for alone."""

import numpy as np
import pytest
import torch

from EqM.run import seeds


def test_the_same_numbers_give_the_same_seed_and_others_another():
    seen = {seeds.mix(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seen) == 64 and all(0 <= seed < 2**63 for seed in seen)
    assert seeds.mix(1, 2, 3) == seeds.mix(1, 2, 3)


def test_a_generator_does_not_touch_the_global_one():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = torch.rand(3, generator=seeds.generator(1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.rand(3, generator=seeds.generator(1, 2)), first)


def test_a_step_draws_the_same_whatever_was_drawn_before():
    seeds.seed_step(0, 7, 1)
    expected = torch.rand(3)
    torch.rand(100)
    seeds.seed_step(0, 7, 1)
    assert torch.equal(torch.rand(3), expected)
    for other in [(1, 7, 1), (0, 8, 1), (0, 7, 0)]:
        seeds.seed_step(*other)
        assert not torch.equal(torch.rand(3), expected)


def test_coins_are_fair():
    assert 450 < sum(seeds.coin(0, 0, i) for i in range(1000)) < 550


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1, 2**64, 2**100])
def test_many_coins_at_once_are_the_coins_one_by_one(seed):
    """A cache of an older run is flipped as it was."""
    rng = np.random.default_rng(0)
    epochs, indices = rng.integers(0, 2**32, (2, 200))
    epochs[:50], indices[25:75], indices[-1] = 0, 0, 2**32 - 1
    expected = [seeds.coin(seed, epoch, index) for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True)]
    assert seeds.coins(seed, epochs, indices).tolist() == expected
    assert seeds.coins(seed, [7, 2**32], [3, 5]).tolist() == [seeds.coin(seed, 7, 3), seeds.coin(seed, 2**32, 5)]


def test_the_streams_of_runs_on_disk_stay_what_they_were():
    """An older run resumes exactly only if these numbers never move."""
    assert seeds.mix(0, 7, 1) == 3590295894727386197
    assert seeds.mix(3, 2**40) == 486681927309643897


def test_numpy_1_whose_uint64_cannot_be_shifted_gives_the_same(monkeypatch):
    class OfNumPy1(int):
        def __rshift__(self, other):
            raise TypeError("ufunc 'right_shift' not supported for the input types")

    plain = np.random.SeedSequence
    expected = seeds.mix(1, 2, 3)

    class Sequence:
        def __init__(self, numbers):
            self.inner = plain(numbers)

        def generate_state(self, count, dtype):
            return [OfNumPy1(word) for word in self.inner.generate_state(count, dtype)]

    monkeypatch.setattr(np.random, "SeedSequence", Sequence)
    assert seeds.mix(1, 2, 3) == expected


@pytest.mark.parametrize("index", [0, 1, 5, 49_999])
def test_a_samples_noise_is_no_noise_of_training(index):
    """mix(seed, i) was mix(seed, i, 0): sample 5 was the first draw of step 5."""
    ours = torch.rand(4, generator=seeds.sample_generator(0, index))
    seeds.seed_step(0, index, 0)
    assert not torch.equal(torch.rand(4), ours)
    assert not torch.equal(torch.rand(4, generator=seeds.generator(0, index)), ours)


def test_no_two_samples_of_a_seed_share_their_noise():
    """Nor of a seed and a step; and a number more, or one that is zero, is another thing."""
    for more in [(), (0,), (17,)]:
        assert len({seeds.sample_seed(3, i, *more) for i in range(50_000)}) == 50_000
    others = [(0,), (1,), (2**32,), (0, 0), (0, 0, 0), (1, 0), (0, 1)]
    seen = {seeds.sample_seed(seed, i, *more) for seed, *more in others for i in range(300)}
    assert len(seen) > 0.99 * len(others) * 300
    assert seeds.sample_seed(np.int64(3), np.int64(4)) == seeds.sample_seed(3, 4)
