"""The network: published names and shapes, an independent forward pass, conditioning, explicit energies.

Letters as in models.py; float64 wherever a reference or a finite difference is compared.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from EqM import models
from EqM.models import SIZES, EqM, EqM_models, sincos_grid

IMAGE, CLIP = 8, (4, 8, 8)
ENERGIES = ("dot", "mean", "l2")


def build(input_size=IMAGE, **more):
    """A tiny float64 network whose every trained weight is random, so that nothing starts at zero."""
    torch.manual_seed(0)
    settings = {"patch_size": 2, "hidden_size": 48, "depth": 2, "num_heads": 2, "num_classes": 5, **more}
    model = EqM(input_size=input_size, **settings).double().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def inputs(model, batch=3):
    """(x, t, y) for a model, the null label among the labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *model.input_shape, generator=generator, dtype=torch.float64)
    t = torch.rand(batch, generator=generator, dtype=torch.float64)
    return x, t, torch.arange(batch) + model.num_classes + 1 - batch


def published_table(depth, D, patch, tokens, C=4, num_classes=1000):
    """Key and shape of every entry of the state dict, in the order that optimizer states count by."""

    def linear(name, rows, columns):
        return [(f"{name}.weight", (rows, columns)), (f"{name}.bias", (rows,))]

    table = [("pos_embed", (1, tokens, D)), ("x_embedder.proj.weight", (D, C, *patch)), ("x_embedder.proj.bias", (D,))]
    table += linear("t_embedder.mlp.0", D, 256) + linear("t_embedder.mlp.2", D, D)
    table += [("y_embedder.embedding_table.weight", (num_classes + 1, D))]
    for i in range(depth):
        table += linear(f"blocks.{i}.attn.qkv", 3 * D, D) + linear(f"blocks.{i}.attn.proj", D, D)
        table += linear(f"blocks.{i}.mlp.fc1", 4 * D, D) + linear(f"blocks.{i}.mlp.fc2", D, 4 * D)
        table += linear(f"blocks.{i}.adaLN_modulation.1", 6 * D, D)
    table += linear("final_layer.linear", math.prod(patch) * 2 * C, D)
    return table + linear("final_layer.adaLN_modulation.1", 2 * D, D)


def shapes(model):
    return [(key, tuple(value.shape)) for key, value in model.state_dict().items()]


@pytest.mark.parametrize("name", EqM_models)
def test_state_dict_is_the_published_table_for_images_and_clips(name):
    size, p = name.removeprefix("EqM-").split("/")
    p = int(p)
    depth, hidden_size, _ = SIZES[size]
    with torch.device("meta"):
        image = EqM_models[name](input_size=32)
        clip = EqM_models[name](input_size=(8, 16, 16), num_classes=10)
    assert shapes(image) == published_table(depth, hidden_size, (p, p), (32 // p) ** 2)
    tokens = (8 // p) * (16 // p) ** 2
    assert shapes(clip) == published_table(depth, hidden_size, (p, p, p), tokens, num_classes=10)


def test_names_cover_the_published_sizes_and_patches():
    assert set(EqM_models) == {f"EqM-{size}/{p}" for size in ("T", "S", "B", "L", "XL") for p in (2, 4, 8)}
    published = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
    assert {size: SIZES[size] for size in published} == published


@pytest.mark.parametrize(("name", "millions"), [("EqM-S/2", 33), ("EqM-B/2", 130), ("EqM-L/2", 458), ("EqM-XL/2", 675)])
def test_parameter_counts_are_those_of_the_published_sizes(name, millions):
    with torch.device("meta"):
        model = EqM_models[name]()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize("name", ["EqM-S/2", "EqM-B/4"])
def test_number_of_heads_follows_the_size(name):
    with torch.device("meta"):
        heads = {block.attn.num_heads for block in EqM_models[name]().blocks}
    assert heads == {SIZES[name[4]][2]}


def test_patch_frames_sets_the_length_of_a_patch_in_frames_alone():
    model = build((3, 8, 8), patch_frames=1)
    assert model.x_embedder.proj.weight.shape == (48, 4, 1, 2, 2)
    assert model.pos_embed.shape == (1, 3 * 4 * 4, 48)


def numpy_sincos(dim, position):
    frequencies = 10000.0 ** (-np.arange(dim // 2) / (dim / 2))
    return [*np.sin(position * frequencies), *np.cos(position * frequencies)]


@pytest.mark.parametrize("dim", [48, 384])
def test_image_positions_match_an_independent_numpy_reference(dim):
    expected = [numpy_sincos(dim // 2, column) + numpy_sincos(dim // 2, row) for row in range(3) for column in range(5)]
    np.testing.assert_allclose(sincos_grid(dim, (3, 5))[0], expected, atol=1e-6)


@pytest.mark.parametrize(("dim", "parts"), [(48, (16, 16, 16)), (1024, (340, 340, 344))])
def test_clip_positions_match_an_independent_numpy_reference(dim, parts):
    expected = [
        sum((numpy_sincos(part, place) for part, place in zip(parts, token, strict=True)), [])
        for token in itertools.product(range(2), range(3), range(4))
    ]
    np.testing.assert_allclose(sincos_grid(dim, (2, 3, 4))[0], expected, atol=1e-6)


@pytest.mark.parametrize("input_size", [IMAGE, CLIP])
def test_positions_are_stored_frozen_and_in_token_order(input_size):
    model = EqM(input_size, 2, hidden_size=48, depth=1, num_heads=2)
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed, sincos_grid(48, model.grid))


def patch_slices(model):
    """For each token, in order, the slices of its patch out of (N, C, ...)."""
    for token in itertools.product(*map(range, model.grid)):
        yield (slice(None), slice(None), *[slice(i * p, (i + 1) * p) for i, p in zip(token, model.patch, strict=True)])


def reference_forward(model, x, t, y):
    """The published network from its state dict alone: loops over patches and heads, a softmax by hand."""
    weights = model.state_dict()
    N, D, heads = len(x), model.pos_embed.shape[-1], model.blocks[0].attn.num_heads

    def linear(name, value):
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def silu(value):
        return value / (1 + torch.exp(-value))

    def norm(value):
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def modulated(value, shift, scale):
        return norm(value) * (1 + scale[:, None]) + shift[:, None]

    def attention(name, value):
        q, k, v = linear(f"{name}.qkv", value).split(D, dim=-1)
        width, mixed = D // heads, []
        for columns in (slice(h * width, (h + 1) * width) for h in range(heads)):
            scores = torch.exp(q[..., columns] @ k[..., columns].transpose(1, 2) / math.sqrt(width))
            mixed.append(scores / scores.sum(-1, keepdim=True) @ v[..., columns])
        return linear(f"{name}.proj", torch.cat(mixed, dim=-1))

    def mlp(name, value):
        hidden = linear(f"{name}.fc1", value)
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        return linear(f"{name}.fc2", hidden)

    angles = (t * (not model.uncond))[:, None] * torch.exp(-math.log(10000) * torch.arange(128.0).double() / 128)
    embedded = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    condition = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", embedded)))
    condition = silu(condition + weights["y_embedder.embedding_table.weight"][y])

    projection = weights["x_embedder.proj.weight"].reshape(D, -1)
    patches = [x[where].reshape(N, -1) @ projection.T for where in patch_slices(model)]
    tokens = torch.stack(patches, dim=1) + weights["x_embedder.proj.bias"] + weights["pos_embed"]
    for i in range(len(model.blocks)):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{block}.adaLN_modulation.1", condition).split(D, dim=1)
        tokens = tokens + gate1[:, None] * attention(f"{block}.attn", modulated(tokens, shift1, scale1))
        tokens = tokens + gate2[:, None] * mlp(f"{block}.mlp", modulated(tokens, shift2, scale2))
    shift, scale = linear("final_layer.adaLN_modulation.1", condition).split(D, dim=1)
    values = linear("final_layer.linear", modulated(tokens, shift, scale))

    field = torch.empty_like(x)
    for token, where in enumerate(patch_slices(model)):
        patch = values[:, token].reshape(N, *model.patch, -1).movedim(-1, 1)  # channels come last in a token
        field[where] = patch[:, : x.shape[1]]  # the other half is the dropped sigma
    return field


@pytest.mark.parametrize("uncond", [True, False])
@pytest.mark.parametrize(("input_size", "more"), [(IMAGE, {}), (CLIP, {}), (CLIP, {"patch_frames": 1})])
def test_forward_equals_an_independent_reference(input_size, more, uncond):
    model = build(input_size, uncond=uncond, **more)
    x, t, y = inputs(model)
    field = model(x, t, y)
    assert field.abs().mean() > 0.05
    # The time frequencies are kept in float32, hence not 1e-12.
    torch.testing.assert_close(field, reference_forward(model, x, t, y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("input_size", [IMAGE, CLIP])
def test_unpatchify_undoes_cutting_into_patches_with_channels_last(input_size):
    model = build(input_size)
    x = torch.randn(2, model.out_channels, *model.input_shape[1:])
    tokens = torch.stack([x[where].movedim(1, -1).flatten(1) for where in patch_slices(model)], dim=1)
    assert torch.equal(model.unpatchify(tokens), x)


@pytest.mark.parametrize("ebm", ["none", *ENERGIES])
def test_a_fresh_network_has_a_field_of_zero(ebm):
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=5, ebm=ebm)
    field = model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 5]))
    assert field.shape == (2, 4, 8, 8) and not field.any()


def test_labels_are_dropped_one_time_in_ten_in_training_only():
    embedder = build().y_embedder
    labels = torch.zeros(20_000, dtype=torch.long)
    null = embedder.embedding_table.weight[embedder.num_classes]

    def dropped():
        return (embedder(labels) == null).all(1).double().mean().item()

    assert dropped() == 0
    embedder.train()
    assert dropped() == pytest.approx(0.1, abs=0.01)


def test_a_dropped_label_is_the_null_label():
    model = build(class_dropout_prob=1.0)
    x, t, y = inputs(model)
    null = torch.full_like(y, model.num_classes)
    expected = model(x, t, null)
    assert not torch.allclose(model(x, t, y), expected)
    torch.testing.assert_close(model.train()(x, t, y), expected)


@pytest.mark.parametrize("uncond", [True, False])
def test_time_matters_only_without_uncond(uncond):
    model = build(uncond=uncond)
    x, t, y = inputs(model)
    assert torch.equal(model(x, t, y), model(x, 1 - t, y)) == uncond
    assert torch.equal(model(x, t, y), model(x, torch.zeros_like(t), y)) == uncond


@pytest.mark.parametrize("ebm", ["none", *ENERGIES])
def test_every_trained_parameter_gets_a_gradient(ebm):
    model = build(ebm=ebm).train()
    model(*inputs(model)).square().mean().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # The last bias of an energy that is linear in it would still count: only the frozen positions have none.
    assert without == {"pos_embed"}


def energy_by_definition(model, x, t, y):
    out = reference_forward(model, x, t, y)
    return -out.square().flatten(1).sum(1) / 2 if model.ebm == "l2" else (x * out).flatten(1).sum(1)


@pytest.mark.parametrize("input_size", [IMAGE, CLIP])
@pytest.mark.parametrize("ebm", ENERGIES)
def test_field_is_the_gradient_of_the_energy_and_minus_that_of_what_get_energy_returns(ebm, input_size):
    model = build(input_size, ebm=ebm)
    x, t, y = inputs(model)
    field, energy = model(x, t, y, get_energy=True)
    assert energy.shape == (len(x),)
    torch.testing.assert_close(-energy, energy_by_definition(model, x, t, y), rtol=1e-5, atol=1e-5)
    step = 1e-5
    for seed in range(3):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        up, down = (model(x + sign * step * direction, t, y, get_energy=True)[1] for sign in (1, -1))
        slope = (field * direction).flatten(1).sum(1)
        torch.testing.assert_close(slope, -(up - down) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ebm", ENERGIES)
def test_energy_field_is_the_same_under_no_grad_and_holds_no_graph(ebm):
    model = build(ebm=ebm)
    batch = inputs(model)
    expected, expected_energy = model(*batch, get_energy=True)
    with torch.no_grad():
        field, energy = model(*batch, get_energy=True)
        assert torch.equal(model(*batch), field)
    assert not field.requires_grad and not energy.requires_grad and not batch[0].requires_grad
    torch.testing.assert_close(field, expected)
    torch.testing.assert_close(energy, expected_energy)


@pytest.mark.parametrize("ebm", ENERGIES)
def test_training_on_an_energy_field_gives_the_gradient_of_the_loss(ebm):
    """Double backward against a finite difference along one random direction of all weights."""
    model = build(ebm=ebm, class_dropout_prob=0.0).train()
    batch = inputs(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(model(*batch).square().mean(), parameters)
    directions = [torch.randn_like(p) for p in parameters]

    def loss_at(step):
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=step)
            loss = model(*batch).square().mean().item()
            torch._foreach_sub_(parameters, directions, alpha=step)
        return loss

    slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    assert abs(slope) > 1e-3
    assert slope == pytest.approx((loss_at(1e-6) - loss_at(-1e-6)) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("ebm", ["none", "dot"])
def test_return_act_gives_every_block_output_up_to_what_the_final_layer_reads(ebm):
    model = build(ebm=ebm)
    batch, read, written = inputs(model), [], []
    model.final_layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: written.append(output))
    field, acts = model(*batch, return_act=True)
    assert [act.shape for act in acts] == [(3, 16, 48)] * 2
    assert all(torch.equal(act, output) for act, output in zip(acts, written, strict=True))
    assert torch.equal(acts[-1], read[0])
    assert acts[-1].requires_grad
    torch.testing.assert_close(field, model(*batch))


@pytest.mark.parametrize("input_size", [IMAGE, CLIP])
def test_tokens_are_contiguous_in_every_block_and_the_field_is_that_of_a_transposed_view(input_size):
    model = build(input_size)
    batch = inputs(model)
    field, acts = model(*batch, return_act=True)
    assert all(act.is_contiguous() for act in acts)
    model.x_embedder.forward = lambda x: model.x_embedder.proj(x).flatten(2).transpose(1, 2)
    same, acts = model(*batch, return_act=True)
    assert torch.equal(field, same) and not acts[-1].is_contiguous()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ebm": "sum"}, "'sum'.*none, dot, mean, l2"),
        ({"input_size": 9}, r"\(9, 9\).*\(2, 2\)"),
        ({"input_size": (3, 8, 8)}, r"\(3, 8, 8\).*\(2, 2, 2\)"),
        ({"input_size": (4, 8, 8), "patch_frames": 3}, r"\(3, 2, 2\)"),
    ],
)
def test_what_cannot_be_built_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_get_energy_without_an_energy_is_refused():
    model = build()
    with pytest.raises(ValueError, match="no explicit energy"):
        model(*inputs(model), get_energy=True)


def test_without_learn_sigma_every_output_channel_is_the_field():
    model = build(learn_sigma=False)
    x, t, y = inputs(model)
    assert model.final_layer.linear.weight.shape == (2 * 2 * 4, 48)
    torch.testing.assert_close(model(x, t, y), reference_forward(model, x, t, y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("input_size", [IMAGE, CLIP])
def test_field_of_a_sample_does_not_depend_on_its_batch(input_size):
    model = build(input_size)
    x, t, y = inputs(model)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(model(x, t, y), alone)


def test_attention_divides_by_the_root_of_the_head_width():
    attention = build().blocks[0].attn
    x = torch.randn(1, 4, 48, dtype=torch.float64)
    q, k, v = attention.qkv(x).reshape(1, 4, 3, 2, 24).permute(2, 0, 3, 1, 4)
    mixed = F.softmax(q @ k.transpose(-1, -2) / math.sqrt(24), dim=-1) @ v
    torch.testing.assert_close(attention(x), attention.proj(mixed.transpose(1, 2).reshape(1, 4, 48)))


@pytest.mark.parametrize("word", ["autocast", "bfloat16", "float16", ".cuda", "half("])
def test_network_file_holds_no_precision_or_device_code(word):
    assert word not in Path(models.__file__).read_text(encoding="utf-8").lower()
