"""Held-out loss: the same whenever it is asked for, and nothing of the run moves for it."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from EqM.data import files
from EqM.engine.precision import FLAGS as PRECISIONS
from EqM.models import EqM_models
from EqM.run import checkpoint, seeds
from EqM.transport import Transport
from EqM.watch import held_out
from helpers import assert_same_checkpoint, train_args


@pytest.fixture
def train(run_script, image_folder, tmp_path):
    """train(*flags, root="runs"): one run of two steps; its outcome, with .folder and .rows of metrics.csv."""

    def run(*flags, root="runs", data=image_folder):
        result = run_script("train", *train_args(data, tmp_path / root, "--epochs", 50, "--log-every", 1, *flags))
        folders = sorted((tmp_path / root).glob("*-EqM-*"))
        result.folder = folders[-1] if folders else None
        result.rows = []
        if result.code == 0:
            with open(result.folder / "metrics.csv", newline="") as file:
                result.rows = list(csv.DictReader(file))
        return result

    return run


def losses(result, name="Val Loss"):
    return {int(row["step"]): float(row[name]) for row in result.rows if row[name]}


def by_hand(data, saved, which):
    """The loss of one item after the other, from the checkpoint's own weights."""
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=2, in_channels=3).eval()
    checkpoint.load_weights(model, saved[which], "x", saved["args"])
    paths, labels, names = files.find_files(data, False)
    dataset = files.LabelledFiles(paths, labels, names, 8, flip=False)
    total = []
    for i in range(len(dataset)):
        x1 = dataset.read(i, 0)[None] / 127.5 - 1
        t = (i % 5 + torch.rand(1, generator=seeds.sample_generator(0, i, held_out.TIME))) / 5
        x0 = torch.randn(x1.shape[1:], generator=seeds.sample_generator(0, i, held_out.NOISE))[None]
        point = Transport().plan(x0, x1, t)
        with torch.no_grad():
            total.append(Transport().loss(model(point.xt, point.t, torch.tensor([labels[i]])), point).item())
    return total


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_is_the_loss_of_each_item_and_no_weight_moves_for_it(train, image_folder, precision):
    flags = [*PRECISIONS[precision], "--lr", 1e-2, "--ema-decay", 0.5]
    watched = train(*flags, "--val-path", image_folder, "--val-every", 2, root="watched")
    assert watched.code == 0, watched.err
    plain = train(*flags, root="plain")
    ckpts = [run.folder / "checkpoints/0000002.pt" for run in (watched, plain)]
    assert_same_checkpoint(*ckpts)
    rel = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}[precision]
    saved = torch.load(ckpts[0], weights_only=True)
    for name, which in (("Val Loss", "model"), ("EMA Val Loss", "ema")):
        expected = by_hand(image_folder, saved, which)
        assert losses(watched, name) == {2: pytest.approx(sum(expected) / 6, rel=rel)}
        # Six items in five bins: the first bin has two of them.
        assert losses(watched, f"{name} t 0-0.2")[2] == pytest.approx((expected[0] + expected[5]) / 2, rel=rel)
        assert losses(watched, f"{name} t 0.6-0.8")[2] == pytest.approx(expected[3], rel=rel)
    log = (watched.folder / "log.txt").read_text()
    assert "(step=0000002) Val Loss: " in log and [row["step"] for row in watched.rows] == ["1", "2", "2"]


def test_a_resumed_run_has_the_same_loss_and_a_run_of_before_gets_the_column(train, image_folder):
    val = ["--val-path", image_folder, "--val-every", 1]
    straight = train(*val, "--max-steps", 3, root="straight")
    train(root="resumed")  # without held-out data, so that metrics.csv has no such column yet
    resumed = train(*val, "--max-steps", 3, "--auto-resume", root="resumed")
    assert ", exactly" in resumed.out
    assert losses(resumed) == {3: losses(straight)[3]}
    assert [row["Train Loss"] for row in resumed.rows if row["Train Loss"]] == [
        row["Train Loss"] for row in straight.rows if row["Train Loss"]
    ]
    assert list(resumed.rows[0])[:2] == ["step", "Train Loss"]


def test_neither_batch_nor_the_number_of_items_moves_an_items_loss(train, image_folder):
    one = train("--val-path", image_folder, "--val-every", 1, "--max-steps", 1, root="one")
    other = train("--val-path", image_folder, "--val-every", 1, "--max-steps", 1, "--grad-accum-steps", 4, root="other")
    few = train("--val-path", image_folder, "--val-every", 1, "--max-steps", 1, "--val-items", 2, root="few")
    assert losses(one)[1] == pytest.approx(losses(other)[1], rel=1e-4)
    assert few.rows[-1]["Val Loss t 0.4-0.6"] == "nan" and losses(few)[1] > 0


def test_a_cache_gives_the_loss_that_its_pictures_give(run_script, train, image_folder, tiny_vae, tmp_path):
    encode = ["--data-path", image_folder, "--vae", tiny_vae, "--image-size", 16, "--no-flip", "--device", "cpu"]
    assert run_script("extract_latents", *encode, "--num-workers", 0, "--out", tmp_path / "cache").code == 0
    flags = ["--vae", tiny_vae, "--image-size", 16, "--val-every", 2]
    files_, cache = (
        train(*flags, *val, root=val[0])
        for val in (["--val-path", image_folder], ["--val-latents", tmp_path / "cache"])
    )
    assert losses(cache)[2] == pytest.approx(losses(files_)[2], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--val-path", "other"], "--val-path has classes that are not trained: emu"),
        (["--val-path", "/nowhere"], "--val-path /nowhere is not a folder"),
        (["--val-latents", "/nowhere"], "is not a latent cache"),
        (["--val-path", "other", "--val-latents", "other"], "give either --val-path"),
    ],
)
def test_what_cannot_be_held_out_is_one_line_before_a_run_is_made(train, image_folder, tmp_path, flags, words):
    shutil.copytree(Path(image_folder) / "cat", tmp_path / "other" / "emu")
    result = train(*[tmp_path / "other" if flag == "other" else flag for flag in flags])
    assert result.code == 2 and result.err.count("\n") == 1 and words in result.err, result.err
    assert not (tmp_path / "runs").exists()


def test_items_are_drawn_from_their_posteriors_always_alike():
    """As in training: their means alone would be easier to predict, and the loss below training's."""
    items = object.__new__(held_out.HeldOut)
    items.seed = 5
    moments = torch.stack([torch.full((3, 4, 2, 2), 7.0), torch.full((3, 4, 2, 2), 2.0)], 1)
    drawn = items._drawn(moments, [4, 9, 4])
    noise = torch.randn(4, 2, 2, generator=seeds.sample_generator(5, 9, held_out.LATENT))
    assert torch.equal(drawn[1], 7 + 2 * noise) and torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
