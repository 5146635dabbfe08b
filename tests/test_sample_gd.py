"""sample_gd.py as its command line runs it: files, labels, precisions, independence of batch, resuming, refusals."""

import csv
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from EqM.data import media
from EqM.models import EqM_models
from EqM.run import checkpoint
from helpers import CLIP_ARGS, IMAGE_ARGS, NAMES, save_checkpoint

PRECISIONS = {"fp32": [], "bf16": ["--use-bf16"], "fp16": ["--use-amp"]}


@pytest.fixture
def image_ckpt(tmp_path):
    return save_checkpoint(tmp_path / "image.pt", IMAGE_ARGS)


@pytest.fixture
def clip_ckpt(tmp_path):
    return save_checkpoint(tmp_path / "clip.pt", CLIP_ARGS)


@pytest.fixture
def sample(run_script, tmp_path):
    """sample(ckpt, *flags, folder=name): five samples in three updates; the outcome, with .folder and .pixels."""

    def run(ckpt, *flags, folder="samples"):
        words = "--num-fid-samples 5 --num-sampling-steps 4 --stepsize 0.1 --global-batch-size 2 --device cpu"
        result = run_script("sample_gd", "--ckpt", ckpt, "--folder", tmp_path / folder, *words.split(), *flags)
        result.folder = tmp_path / folder
        result.files = sorted(result.folder.glob("0*.*"))
        result.pixels = [media.load_sample(path) for path in result.files]
        return result

    return run


def labels(folder):
    with open(folder / "labels.csv") as file:
        return [(row["file"], row["class"]) for row in csv.DictReader(file)]


def test_images_come_as_files_labels_sheet_and_npz(sample, image_ckpt):
    result = sample(image_ckpt)
    assert result.code == 0, result.err
    assert [path.name for path in result.files] == [f"{i:06d}.png" for i in range(5)]
    assert [name for name, _ in labels(result.folder)] == [path.name for path in result.files]
    assert {name for _, name in labels(result.folder)} <= set(NAMES)
    with np.load(result.folder.with_name("samples.npz")) as archive:
        assert np.array_equal(archive["arr_0"], np.concatenate(result.pixels))
    with Image.open(result.folder / "grid.png") as sheet:
        assert sheet.width > 96
    assert len({image.tobytes() for image in result.pixels}) == 5


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_clips_come_as_gif_or_mp4(sample, clip_ckpt, suffix):
    result = sample(clip_ckpt, "--clip-format", suffix)
    assert result.code == 0, result.err
    assert [path.name for path in result.files] == [f"{i:06d}.{suffix}" for i in range(5)]
    assert all(clip.shape == (4, 8, 8, 3) for clip in result.pixels)
    assert not result.folder.with_name("samples.npz").exists()


def test_the_label_in_the_table_is_the_one_that_was_sampled(sample, tmp_path):
    """A network that answers with a colour of its own for each class."""
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=3, in_channels=3)
    with torch.no_grad():
        model.y_embedder.embedding_table.weight.zero_()
        for k in range(3):
            model.y_embedder.embedding_table.weight[k, k] = 100.0
        model.final_layer.adaLN_modulation[1].weight[:3, :3] = torch.eye(3)  # the shift of the last norm
        model.final_layer.linear.weight.view(16, 6, -1)[:, :3, :3] = torch.eye(3)
    weights = model.state_dict()
    path = tmp_path / "colours.pt"
    checkpoint.save(path, {"model": weights, "ema": weights, "args": IMAGE_ARGS, "class_names": NAMES})
    for flags in ([], ["--classes", "owl", "0"]):
        result = sample(path, *flags, "--cfg-scale", 1, folder=f"s{len(flags)}")
        shown = [NAMES[int(image.mean(axis=(0, 1, 2)).argmax())] for image in result.pixels]
        assert shown == [name for _, name in labels(result.folder)]
        assert not flags or shown == ["owl", "cat", "owl", "cat", "owl"]


@pytest.mark.parametrize("sampler", [["--sampler", "gd"], ["--sampler", "ngd", "--mu", 0.3]])
@pytest.mark.parametrize("ebm", ["none", "dot", "l2"])
def test_every_precision_samples_any_checkpoint_alike(sample, tmp_path, ebm, sampler):
    ckpt = save_checkpoint(tmp_path / "x.pt", {**IMAGE_ARGS, "ebm": ebm})
    pixels = {}
    for name, flags in PRECISIONS.items():
        result = sample(ckpt, *flags, *sampler, folder=name)
        assert result.code == 0, result.err
        pixels[name] = np.concatenate(result.pixels).astype(float)
    error = {name: np.abs(pixels[name] - pixels["fp32"]).mean() for name in ("bf16", "fp16")}
    assert 0 < error["bf16"] < 3 and error["fp16"] < 0.5


def test_a_sample_depends_on_seed_and_number_alone(sample, image_ckpt):
    base = sample(image_ckpt)
    for flags in (["--global-batch-size", 5], ["--global-batch-size", 1]):
        other = sample(image_ckpt, *flags, folder=f"b{flags[1]}")
        for ours, theirs in zip(other.pixels, base.pixels, strict=True):
            assert np.abs(ours.astype(int) - theirs).max() <= 1
        assert labels(other.folder) == labels(base.folder)
    assert not np.array_equal(sample(image_ckpt, "--global-seed", 1, folder="s").pixels[0], base.pixels[0])


def test_a_folder_is_finished_not_redone(sample, image_ckpt):
    first = sample(image_ckpt)
    untouched = first.files[0].stat().st_mtime_ns
    first.files[1].write_bytes(first.files[1].read_bytes()[:60])
    first.files[4].unlink()
    second = sample(image_ckpt)
    assert "2 of 5 samples to make" in second.out
    assert second.files[0].stat().st_mtime_ns == untouched
    for ours, theirs in zip(second.pixels, first.pixels, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    more = sample(image_ckpt, "--num-fid-samples", 7)
    assert "2 of 7 samples to make" in more.out and len(more.files) == 7


def test_samples_of_two_makers_never_mix(sample, image_ckpt, tmp_path):
    first = sample(image_ckpt)
    before = [path.read_bytes() for path in first.files]
    other = save_checkpoint(tmp_path / "other.pt", IMAGE_ARGS, seed=1)
    for ckpt, flags, words in [
        (other, [], "other samples (weights differ)"),
        (image_ckpt, ["--cfg-scale", 2], "(cfg_scale differ)"),
        (image_ckpt, ["--use-bf16"], "(precision differ)"),
        (image_ckpt, ["--no-resume"], "holds samples already"),
    ]:
        result = sample(ckpt, *flags)
        assert result.code == 2 and words in result.err
    (first.folder / "samples.json").unlink()
    assert "unknown origin" in sample(image_ckpt).err
    assert [path.read_bytes() for path in first.files] == before


def test_a_published_checkpoint_needs_only_what_it_does_not_say(sample, tmp_path):
    save_checkpoint(tmp_path / "x.pt", IMAGE_ARGS)
    weights = checkpoint.load(tmp_path / "x.pt")["ema"]
    args = Namespace(model="EqM-T/4", image_size=8, num_classes=3, vae="ema", global_seed=0)
    torch.save({"model": weights, "ema": weights, "opt": {}, "args": args}, tmp_path / "published.pt")
    told = sample(tmp_path / "published.pt")
    assert told.code == 2 and "must be a multiple of 32" in told.err
    pixels = sample(tmp_path / "published.pt", "--vae", "none")
    assert pixels.code == 2 and "--vae none contradicts" in pixels.err
    torch.save(weights, tmp_path / "bare.pt")
    flags = ["--model", "EqM-T/4", "--image-size", 8, "--num-classes", 3, "--vae", "none"]
    result = sample(tmp_path / "bare.pt", *flags, "--classes", 2)
    assert result.code == 0, result.err
    assert labels(result.folder)[0] == ("000000.png", "2")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model EqM-S/4", "--model EqM-S/4 contradicts"),
        ("--image-size 16", "--image-size 16 contradicts"),
        ("--num-classes 4", "--num-classes 4 contradicts"),
        ("--ebm dot", "--ebm dot contradicts"),
        ("--no-uncond", "--uncond False contradicts"),
        ("--video", "--video True contradicts"),
        ("--vae ema", "--vae ema contradicts"),
        ("--classes cat emu", "--classes emu is no class .* cat, dog, owl"),
        ("--classes 3", "--classes 3 is no class"),
    ],
)
def test_what_contradicts_the_checkpoint_is_an_error(sample, image_ckpt, flags, words):
    result = sample(image_ckpt, *flags.split())
    assert result.code == 2 and re.search(words, result.err), result.err
    assert result.err.count("\n") == 1 and not result.folder.exists()


def test_the_working_directory_may_be_the_folder(sample, image_ckpt, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = sample(image_ckpt, "--folder", ".")
    assert result.code == 0 and (tmp_path / "here" / "labels.csv").exists() and (tmp_path / "here.npz").exists()


def test_class_names_of_any_bytes_are_written(sample, tmp_path):
    path = save_checkpoint(tmp_path / "x.pt", IMAGE_ARGS, names=["caf\udce9", "b\nc", "\u6771"])
    result = sample(path, "--classes", 0, 1, 2)
    assert result.code == 0, result.err
    assert [name for _, name in labels(result.folder)][:3] == ["caf\\udce9", "b\\nc", "\u6771"]


def test_the_same_autoencoder_written_another_way_makes_the_same_samples(sample, tmp_path, tiny_vae, monkeypatch):
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=3).state_dict()
    args = {**IMAGE_ARGS, "vae": tiny_vae, "image_size": 32}
    checkpoint.save(tmp_path / "x.pt", {"model": model, "ema": model, "args": args})
    assert sample(tmp_path / "x.pt").code == 0
    monkeypatch.chdir(Path(tiny_vae).parent)
    for spelled in (f"{tiny_vae}/", Path(tiny_vae).name, f"./{Path(tiny_vae).name}/"):
        again = sample(tmp_path / "x.pt", "--vae", spelled)
        assert again.code == 0 and "0 of 5 samples to make" in again.out, again.err


def test_a_disk_that_fills_up_is_one_line(sample, image_ckpt, monkeypatch):
    def full(self, *args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    result = sample(image_ckpt)
    assert result.code == 2 and "No space left" in result.err and not result.files


def test_the_autoencoder_may_lie_elsewhere_than_in_training(sample, tmp_path, tiny_vae):
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=3).state_dict()
    args = {**IMAGE_ARGS, "vae": "ema", "image_size": 32}
    checkpoint.save(tmp_path / "x.pt", {"model": model, "ema": model, "args": args})
    result = sample(tmp_path / "x.pt", "--vae", tiny_vae)
    assert result.code == 0 and result.pixels[0].shape == (1, 32, 32, 3)
    assert result.err == "" or "warning" not in result.err.lower()


def test_weights_are_chosen_by_name_and_a_young_average_is_told(run_script, tmp_path):
    """A run's example: 200 steps with the default decay."""
    states = [torch.load(save_checkpoint(tmp_path / f"{seed}.pt", IMAGE_ARGS, seed))["model"] for seed in range(3)]
    args = {**IMAGE_ARGS, "ema_decay": [0.9999, 0.9]}
    saved = dict(zip(("model", "ema", "ema-0.9"), states, strict=True))
    checkpoint.save(tmp_path / "x.pt", {**saved, "args": args, "class_names": NAMES, "step": 200})
    drawn = {}
    for name in ("ema", "ema-0.9999", "ema-0.9", "model"):
        words = ["--ckpt", tmp_path / "x.pt", "--weights", name, "--folder", tmp_path / name, "--device", "cpu"]
        result = run_script("sample_gd", *words, "--num-fid-samples", 1, "--num-sampling-steps", 3)
        assert result.code == 0, result.err
        told = "The EMA still holds 98% of the weights it began with; --weights model takes the trained ones"
        assert result.out.count(told) == (name in ("ema", "ema-0.9999"))
        drawn[name] = np.load(tmp_path / f"{name}.npz")["arr_0"]
        into_same = run_script(
            "sample_gd", *words, "--folder", tmp_path / "ema", "--num-fid-samples", 1, "--num-sampling-steps", 3
        )
        assert (into_same.code == 0) == (name in ("ema", "ema-0.9999")), into_same.err
    assert np.array_equal(drawn["ema"], drawn["ema-0.9999"])
    assert len({drawn[name].tobytes() for name in ("ema", "ema-0.9", "model")}) == 3
    result = run_script("sample_gd", "--ckpt", tmp_path / "x.pt", "--weights", "ema-0.5", "--folder", tmp_path / "y")
    assert result.code == 2 and "--weights ema-0.5 is not in --ckpt" in result.err and not (tmp_path / "y").exists()
    assert "it has ema, model, ema-0.9999, ema-0.9" in result.err
