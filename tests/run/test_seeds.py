"""Random numbers that depend on what they are for alone."""

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
