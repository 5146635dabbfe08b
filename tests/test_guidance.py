"""Guidance, sums of classes, and samples that keep their class when others leave the batch."""

import pytest
import torch

from EqM.guidance import Guided, class_weights
from EqM.samplers import Descent


def labelled(x, t, y):
    """A model whose answer shows its label and time: y + 1 in every channel, the last negative."""
    field = (y + 1 + t).view(-1, 1, 1).expand_as(x).clone()
    field[:, -1] *= -1
    return field


@pytest.mark.parametrize(("channels", "guided"), [(3, 3), (None, 5), (5, 5), (1, 1)])
def test_guidance_steers_the_leading_channels_and_leaves_the_rest_to_the_class(channels, guided):
    labels, null, t = torch.tensor([0, 2]), 9, torch.zeros(2)
    x = torch.zeros(2, 5, 4)
    result = Guided(labelled, labels, 4.0, null, channels)(x, t)
    with_class, without = labelled(x, t, labels), labelled(x, t, torch.full_like(labels, null))
    expected = with_class.clone()
    expected[:, :guided] = (without + 4.0 * (with_class - without))[:, :guided]
    torch.testing.assert_close(result, expected)


def test_guidance_calls_the_model_once_a_step():
    sizes = []

    def model(x, t, y):
        sizes.append(len(x))
        return labelled(x, t, y)

    x, t, labels = torch.zeros(2, 4, 4), torch.zeros(2), torch.tensor([0, 1])
    Guided(model, labels, 1.5, 2)(x, t)
    Guided(model, labels, 1.0, 2)(x, t)
    assert sizes == [4, 2]


def test_without_guidance_the_field_is_the_class_conditional_one():
    x, t, labels = torch.zeros(2, 4, 4), torch.zeros(2), torch.tensor([0, 1])
    for scale in (1.0, 0.0):
        assert torch.equal(Guided(labelled, labels, scale, 2)(x, t), labelled(x, t, labels))


def by_sample(x, t, y):
    """A model whose answer depends on x and label."""
    return labelled(x, t, y) * torch.cos(x + y.view(-1, 1, 1))


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("channels", [3, None])
def test_a_sum_adds_what_each_class_adds_to_the_null_field(scale, channels):
    labels, weights = torch.tensor([[0, 1], [2, 1]]), torch.tensor([[0.7, 0.3], [1.0, 1.0]])
    x, t, null = torch.randn(2, 5, 4), torch.zeros(2), 9
    without = by_sample(x, t, torch.full((2,), null))
    expected = without.clone()
    for k in range(2):
        gain = torch.full((2, 5, 1), scale)
        gain[:, channels if channels else 5 :] = 1
        expected += gain * weights[:, k].view(2, 1, 1) * (by_sample(x, t, labels[:, k]) - without)
    result = Guided(by_sample, labels, scale, null, channels, weights)(x, t)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("channels", [3, None])
@pytest.mark.parametrize("mate", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_one_class_of_weight_one_has_the_bits_of_that_class_whoever_is_its_mate(scale, channels, mate):
    x, t = torch.randn(2, 5, 4), torch.zeros(2)
    labels, weights = torch.tensor([[0, 1], [2, 1]]), torch.tensor([(1.0, 0.0), mate])
    result = Guided(by_sample, labels, scale, 9, channels, weights)(x, t)
    expected = Guided(by_sample, torch.tensor([0, 2 if mate[0] else 1]), scale, 9, channels)(x, t)
    assert torch.equal(result[0], expected[0])
    if 1.0 in mate:
        assert torch.equal(result, expected)
    if mate == (0.0, 0.0):
        assert torch.equal(result[1:], by_sample(x[1:], t[1:], torch.tensor([9])))


def test_classes_of_weight_zero_are_not_evaluated():
    seen = []

    def model(x, t, y):
        seen.append(sorted(y.tolist()))
        return by_sample(x, t, y)

    x, t = torch.randn(2, 5, 4), torch.zeros(2)
    labels = torch.tensor([[0, 1, 2], [2, 1, 0]])
    Guided(model, labels, 4.0, 9, 3, torch.tensor([[1.0, 0, 0], [0, 0.5, 0]]))(x, t)
    Guided(model, labels, 1.0, 9, 3, torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))(x, t)
    assert seen == [[0, 1, 9, 9], [0, 1]]


@pytest.mark.parametrize("weights", [None, torch.tensor([[1.0, 0.5]]).repeat(6, 1)])
def test_labels_follow_their_samples_when_others_leave_or_enter(weights):
    """The bottom of each label's bowl is its own, so a mixed-up label would end elsewhere."""

    def bowls(x, t, y):
        return y.view(-1, 1).to(x.dtype) - x

    labels = torch.tensor([5, 0, 3, 1, 4, 2])
    asked = labels if weights is None else torch.stack([labels, labels + 1], 1)
    field = Guided(bowls, asked, 2.0, 0, None, weights)
    bottom = 2.0 * (labels if weights is None else labels * 1.5 + 0.5).to(torch.float64)[:, None]
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = (
        x * torch.arange(1, 7)[:, None]
    )  # at different distances from the bottom, so that they are done at different steps
    how = Descent(400, 0.1, stop_norm=1e-6)
    together = how.run(field, x)
    assert len(set(together.evaluations)) > 2
    torch.testing.assert_close(together.x, bottom.expand(6, 5), atol=1e-5, rtol=0)
    for end in how.stream(field, iter(x), 2):
        assert torch.equal(end.x, together.x[end.row])


def test_a_batch_that_stays_together_asks_with_the_same_labels_object():
    """What a network makes of its labels can then be kept from call to call."""
    seen = []

    def model(x, t, y):
        seen.append(y)
        return -x

    x = torch.tensor([[8.0], [4.0]])
    labels = torch.tensor([0, 1])
    Descent(6, 0.5, stop_norm=1.0).run(Guided(model, labels, 1.0, 2), x)
    assert [y.tolist() for y in seen] == [[0, 1]] * 3 + [[0]]
    assert all(y is seen[0] for y in seen[:3])


NAMES = ["panda", "valley", "a+b", "c*2", "x y"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("panda", {0: 1.0}),
        ("1", {1: 1.0}),
        ("panda+valley", {0: 1.0, 1: 1.0}),
        ("panda*0.7 + valley * 0.3", {0: 0.7, 1: 0.3}),
        ("panda*1+valley*0", {0: 1.0}),
        ("panda*0.5+0*0.5", {0: 1.0}),
        ("panda*-1+x y", {0: -1.0, 4: 1.0}),
        ("a+b", {2: 1.0}),
        ("c*2", {3: 1.0}),
        ("c*2*3+panda", {3: 3.0, 0: 1.0}),
        ("c*2+panda", {3: 1.0, 0: 1.0}),
        ("panda*0", {}),
    ],
)
def test_sums_of_classes_are_read(text, expected):
    assert class_weights(text, NAMES) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dog", "'dog' in 'dog' is no class"),
        ("panda+dog*2", "'dog' in"),
        ("5", "'5' in '5' is no class"),
        ("-1", "'-1'"),
        ("", "is no class"),
        ("panda+", "is no class"),
        ("panda*much", "'much' in 'panda\\*much' is no weight"),
        ("panda*nan", "'nan'"),
        ("panda*", "is no weight"),
        ("*2", "is no class"),
    ],
)
def test_what_is_no_sum_of_classes_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        class_weights(text, NAMES)
