"""What of one network's weights starts another: fields that stay, rows by name, and a table that says so."""

import re
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file

from EqM import transplant
from EqM.models import EqM, sincos_grid
from EqM.run.errors import UserError

NAMES = ["cat", "dog", "owl"]


def network(size=8, patch=2, channels=3, classes=3, seed=0, depth=2, width=24, **more):
    """A small network with no weight at zero."""
    torch.manual_seed(seed)
    model = EqM(size, patch, channels, hidden_size=width, depth=depth, num_heads=2, num_classes=classes, **more)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def moved(old, new, names=NAMES, new_names=NAMES, positions=None, **saved):
    """new with the weights of old that fit, and the table."""
    fresh = new.state_dict()
    fresh = {name: value.clone() for name, value in fresh.items()}
    content = {"args": {}, "class_names": names, **saved}
    state, table = transplant.fit(new, old.state_dict(), content, lambda: fresh, new_names, positions)
    new.load_state_dict(state)
    return new, "\n".join(table)


def field(model, x, y=1):
    with torch.no_grad():
        return model(x, torch.zeros(len(x)), torch.full((len(x),), y))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def still(images, frames):
    return images.unsqueeze(2).expand(-1, -1, frames, -1, -1).contiguous()


def test_the_same_network_is_taken_whole():
    old = network()
    new, table = moved(old, network(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))
    assert re.fullmatch(r"  taken    (\d+) of \1 tensors as they are: pos_embed, .*", table)


@pytest.mark.parametrize(("patch_frames", "frames"), [(1, 4), (2, 4), (4, 4)])
def test_a_still_clip_has_the_images_field_in_every_frame(patch_frames, frames):
    old = network()
    new, table = moved(old, network((frames, 8, 8), patch_frames=patch_frames, seed=1))
    expected = field(old, IMAGES)
    assert expected.std() > 0.1
    torch.testing.assert_close(field(new, still(IMAGES, frames)), still(expected, frames), atol=1e-5, rtol=0)
    assert "images -> clips" in table and "positions: the image's for each of" in table


def test_positions_of_clips_are_new_on_request_and_the_images_of_that_size_where_it_differs():
    old = network()
    new, table = moved(old, network((4, 8, 8), seed=1), positions="new")
    assert torch.equal(new.pos_embed, sincos_grid(24, (2, 4, 4))) and "positions: new" in table
    larger, _ = moved(old, network((4, 16, 16), seed=1))
    image, _ = moved(old, network(16, seed=1))
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(field(larger, still(x, 4)), still(field(image, x), 4), atol=1e-5, rtol=0)


def test_another_size_keeps_everything_but_positions():
    old = network()
    new, table = moved(old, network(16, seed=1))
    theirs, ours = old.state_dict(), new.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours if name != "pos_embed")
    assert torch.equal(new.pos_embed, sincos_grid(24, (8, 8)))
    assert "changed  positions: new, of 1 x 8 x 8 tokens in place of 1 x 4 x 4 tokens" in table


def test_clips_of_another_length_and_images_from_clips():
    old = network((4, 8, 8))
    longer, table = moved(old, network((8, 8, 8), seed=1), args={"clip_len": 4})
    assert torch.equal(longer.pos_embed, sincos_grid(24, (4, 4, 4))) and "in place of 2 x 4 x 4" in table
    image, table = moved(longer, network(seed=2))
    weight = longer.x_embedder.proj.weight
    torch.testing.assert_close(image.x_embedder.proj.weight, weight.sum(2))
    assert "clips -> images, 2 -> 1 frames of a patch" in table
    assert torch.equal(image.pos_embed, sincos_grid(24, (4, 4)))
    back, _ = moved(image, network((4, 8, 8), seed=3), positions="repeat")
    torch.testing.assert_close(field(back, still(IMAGES, 4)), still(field(image, IMAGES), 4), atol=1e-5, rtol=0)


def test_as_many_tokens_in_another_order_are_no_positions_to_take():
    """16 x 16 tokens of an image are as many as 4 x 8 x 8 of a clip."""
    old = network(32)
    new, _ = moved(old, network((8, 16, 16), seed=1), positions="new")
    assert torch.equal(new.pos_embed, sincos_grid(24, (4, 8, 8)))
    back, _ = moved(new, network(32, seed=2), args={"clip_len": 8})
    assert torch.equal(back.pos_embed, sincos_grid(24, (16, 16)))


@pytest.mark.parametrize("size", [8, (2, 8, 8)])
def test_more_channels_leave_the_field_of_the_old_ones(size):
    old = network(size)
    new, table = moved(old, network(size, channels=5, seed=1))
    x = torch.randn(2, 5, *(size if isinstance(size, tuple) else (8, 8)))
    out = field(new, x)
    torch.testing.assert_close(out[:, :3], field(old, x[:, :3]), atol=1e-5, rtol=0)
    assert not out[:, 3:].any() and "3 -> 5 channels" in table
    back, _ = moved(new, network(size, seed=2))
    torch.testing.assert_close(field(back, x[:, :3]), field(old, x[:, :3]), atol=1e-5, rtol=0)


def test_a_network_without_the_dropped_half_gives_the_same_field():
    old = network(learn_sigma=False)
    new, table = moved(old, network(seed=1))
    torch.testing.assert_close(field(new, IMAGES), field(old, IMAGES), atol=1e-5, rtol=0)
    assert "1 -> 2 outputs a channel" in table


def test_rows_go_by_class_name_and_new_ones_are_the_mean_without_the_null_row():
    old = network()
    new, table = moved(old, network(classes=4, seed=1), new_names=["bee", "cat", "elk", "owl"])
    there, here = old.y_embedder.embedding_table.weight, new.y_embedder.embedding_table.weight
    mean = there[:3].mean(0)
    for row, expected in enumerate([mean, there[0], mean, there[2], there[3]]):
        torch.testing.assert_close(here[row], expected)
    assert "2 of 4 rows by name, 2 (bee, elk) the mean of the 3 old ones; the null row kept" in table
    torch.testing.assert_close(field(new, IMAGES, 3), field(old, IMAGES, 2))


def test_the_same_classes_in_another_order_keep_their_meaning():
    new, _ = moved(network(), network(seed=1), new_names=NAMES[::-1])
    torch.testing.assert_close(field(new, IMAGES, 0), field(network(), IMAGES, 2))


@pytest.mark.parametrize(("classes", "kept"), [(3, True), (5, False)])
def test_without_names_only_as_many_classes_are_the_same_ones(classes, kept):
    old = network()
    new, table = moved(old, network(classes=classes, seed=1), names=None, new_names=list("abcde"[:classes]))
    there, here = old.y_embedder.embedding_table.weight, new.y_embedder.embedding_table.weight
    assert torch.equal(here[-1], there[-1]) and ("classes" in table) != kept
    torch.testing.assert_close(here[:-1], there[:-1] if kept else there[:3].mean(0).expand(5, -1))


def test_another_patch_leaves_both_ends_and_takes_the_blocks():
    old, new = network(), network(patch=4, seed=1)
    ends = {
        name: value.clone() for name, value in new.state_dict().items() if name.startswith(("x_emb", "final_layer.l"))
    }
    new, table = moved(old, new)
    state = new.state_dict()
    assert all(torch.equal(state[name], value) for name, value in ends.items())
    assert torch.equal(state["blocks.1.mlp.fc2.weight"], old.blocks[1].mlp.fc2.weight)
    assert table.count("patches of 2 x 2 there, 4 x 4 here; as at any start") == 2


def test_fewer_and_more_blocks_and_parts_of_others_are_told():
    old, new = network(depth=3), network(depth=2, seed=1)
    _, table = moved(old, new)
    assert "unused   blocks.2: no such part here" in table
    deeper = network(depth=4, seed=1)
    before = deeper.blocks[3].mlp.fc1.weight.clone()
    deeper, table = moved(old, deeper)
    assert torch.equal(deeper.blocks[3].mlp.fc1.weight, before)
    assert "left     blocks.3: not there or of another shape; as at any start" in table


def test_nothing_that_fits_is_one_line():
    with pytest.raises(UserError, match="nothing of it fits: it is 24 wide and this model 48"):
        moved(network(), network(width=48))
    with pytest.raises(UserError, match="no block of it fits this model; its tensors are conv.weight"):
        transplant.fit(network(), {"conv.weight": torch.zeros(3)}, {}, dict)


def test_parts_of_another_kind_are_left_whatever_their_shape():
    """A file from elsewhere may call anything by our names."""
    odd = [
        torch.zeros(0),
        torch.zeros(()),
        torch.zeros(3),
        torch.zeros(2, 24),
        torch.zeros(24, 3, 2, 4),
        torch.ones(4, 4, 24),
    ]
    names = [name for name in network().state_dict() if "blocks" not in name]
    for name in names:
        for value in odd:
            new = network(seed=1)
            fresh = new.state_dict()
            state = {**network().state_dict(), name: value}
            try:
                fitted, table = transplant.fit(new, state, {"args": {"clip_len": 0}}, lambda fresh=fresh: fresh, NAMES)
            except UserError as error:
                assert "wide and this model" in str(error)
                continue
            assert fitted[name].shape == fresh[name].shape
            assert any(word in "\n".join(table) for word in ("left ", "positions: new", "classes: "))


def test_a_file_of_any_spelling_is_a_start(tmp_path):
    """safetensors, bare in 16 bits, a namespace of args: as DiT, SiT and others publish theirs."""
    old = network()
    state, averaged = old.state_dict(), network(seed=5).state_dict()
    save_file({f"model.{name}": value for name, value in state.items()}, tmp_path / "x.safetensors")
    torch.save({f"module._orig_mod.{name}": value.bfloat16() for name, value in state.items()}, tmp_path / "bare.pt")
    args = Namespace(model="SiT-XL/2", num_classes=3)
    torch.save({"state_dict": state, "ema_model": averaged, "opt": {}, "args": args}, tmp_path / "both.pt")
    for name, weights, expected in [
        ("x.safetensors", "ema", state),
        ("bare.pt", "ema", {name: value.bfloat16().float() for name, value in state.items()}),
        ("both.pt", "model", state),
        ("both.pt", "ema", averaged),
    ]:
        fitted, table = transplant.load(tmp_path / name, network(seed=1), dict, NAMES, weights)
        assert all(torch.equal(fitted[key], expected[key]) for key in expected), name
        assert {value.dtype for value in fitted.values()} == {torch.float32}
        assert table[0] == (
            f"Starting from {tmp_path / name}, its {weights}:" if name == "both.pt"
            else f"Starting from {tmp_path / name}, the only weights there:"
        )  # fmt: skip


def test_a_file_that_cannot_be_a_start_is_told_by_its_flag(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    bad = network().state_dict()
    bad["blocks.0.mlp.fc1.bias"][0] = torch.nan
    torch.save(bad, tmp_path / "nan.pt")
    for name, message in [
        ("nowhere.pt", "--init-from .*nowhere.pt is not a file"),
        ("x.safetensors", "--init-from .* is cut short or damaged"),
        ("nan.pt", "--init-from .* cannot be used: blocks.0.mlp.fc1.bias holds NaN"),
    ]:
        with pytest.raises(UserError, match=message):
            transplant.load(tmp_path / name, network(), dict)
    torch.save(network().state_dict(), tmp_path / "good.pt")
    with pytest.raises(UserError, match="--weights ema-0.5 is not in --init-from .*; it has ema, model"):
        transplant.load(tmp_path / "good.pt", network(), dict, weights="ema-0.5")
