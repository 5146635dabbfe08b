"""sample_gd.py as its command line runs it: files, labels, precisions, independence of batch, resuming, refusals."""

import csv
import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from EqM import sample_gd
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


STOPPING = ["--num-sampling-steps", 12, "--stop-norm", 9.2]  # where the samples of image_ckpt stop after 2 to 11 steps


def column(folder, name):
    with open(folder / "labels.csv", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def test_a_folder_made_with_nothing_new_holds_what_it_always_did(sample, image_ckpt):
    result = sample(image_ckpt)
    assert (result.folder / "labels.csv").read_text().startswith("file,label,class\n")
    assert {path.name for path in result.folder.iterdir()} == {
        *(path.name for path in result.files), "labels.csv", "grid.png", "samples.json",
    }  # fmt: skip
    note = json.loads((result.folder / "samples.json").read_text())
    assert not note.keys() & sample_gd.NEW.keys()
    result.files[0].unlink()
    assert "1 of 5 samples" in sample(image_ckpt, "--beta1", 0.9, "--stop-norm", 0, "--anneal").out


def test_evaluations_are_counted_and_summed_up(sample, image_ckpt):
    fixed = sample(image_ckpt, *STOPPING[:2], folder="fixed")
    result = sample(image_ckpt, *STOPPING)
    counts = [int(count) for count in column(result.folder, "evaluations")]
    assert len(set(counts)) > 2 and max(counts) <= 11
    mean = sum(counts) / 5
    assert f"Evaluations of the field: {mean:.1f} of 11 on average" in result.out and " #" in result.out
    assert {path.name for path in result.folder.iterdir()} == {path.name for path in fixed.folder.iterdir()}
    for size in (1, 5):
        other = sample(image_ckpt, *STOPPING, "--global-batch-size", size, folder=f"b{size}")
        assert column(other.folder, "evaluations") == column(result.folder, "evaluations")
        for ours, theirs in zip(other.pixels, result.pixels, strict=True):
            assert np.abs(ours.astype(int) - theirs).max() <= 1
    more = sample(image_ckpt, *STOPPING, "--num-fid-samples", 7)
    assert "2 of 7 samples to make" in more.out and column(more.folder, "evaluations")[:5] == [str(n) for n in counts]
    sample(image_ckpt, *STOPPING, "--num-fid-samples", 3)
    assert "0 of 7 samples to make" in sample(image_ckpt, *STOPPING, "--num-fid-samples", 7).out


def test_a_kill_loses_no_count(sample, image_ckpt, monkeypatch):
    straight = sample(image_ckpt, *STOPPING, folder="straight")
    write = media.save_sample
    written = []

    def dies(path, *more):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *more)

    monkeypatch.setattr(sample_gd.media, "save_sample", dies)
    killed = sample(image_ckpt, *STOPPING)
    assert killed.code and not (killed.folder / "labels.csv").exists()
    monkeypatch.undo()
    with open(killed.folder / "evaluations.0.csv", "a") as file:
        file.write("000004.png")  # a row that was cut
    again = sample(image_ckpt, *STOPPING)
    assert again.code == 0 and "2 of 5 samples to make" in again.out
    assert column(again.folder, "evaluations") == column(straight.folder, "evaluations")
    assert not list(again.folder.glob("evaluations*"))


def test_a_stop_norm_makes_other_samples(sample, image_ckpt):
    sample(image_ckpt, *STOPPING)
    for flags in (STOPPING[:2], [*STOPPING[:2], "--stop-norm", 9]):
        result = sample(image_ckpt, *flags)
        assert result.code == 2 and "(stop_norm differ)" in result.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sampler sde", "sde is not offered: .* neither; for noise take --sampler langevin"),
        ("--likelihood", "--likelihood is not offered: .* velocity"),
        ("--sampler dopri5 --stop-norm 3", "a stop norm does not go with dopri5"),
        ("--temperature 0.1", "a temperature is langevin's"),
        ("--sampler ngd --temperature 0.1", "a temperature is langevin's"),
        ("--sampler nag --beta1 0.5", "betas are adam's"),
        ("--sampler adam --beta2 1", "below 1"),
        ("--atol 1e-3", "tolerances are dopri5's"),
        ("--no-anneal", "langevin's"),
        ("--stop-norm -1", "out of range"),
        ("--num-sampling-steps 1", "without --start it must be at least 2"),
        ("--start-noise 0.5", "there is none"),
        ("--classes cat+emu", "--classes cat.emu: 'emu' in 'cat.emu' is no class .* cat, dog, owl"),
        ("--classes cat*x+dog", "'x' in .* is no weight"),
        ("--start /nowhere", "--start /nowhere is neither a file nor a folder"),
        ("--start {large}", "has 16 x 16 pixels, and this model makes 8 x 8"),
        ("--also {clip}", "clip.pt cannot be added: its latents"),
        ("--also /nowhere.pt", "/nowhere.pt"),
        ("--fps 3 --clip-format mp4", "--fps and --clip-format: no effect on images"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is_made(
    sample, image_ckpt, clip_ckpt, flags, words, tmp_path
):
    Image.new("RGB", (16, 16)).save(tmp_path / "large.png")
    result = sample(image_ckpt, *flags.format(large=tmp_path / "large.png", clip=clip_ckpt).split())
    assert result.code == 2 and re.search(words, result.err), result.err
    assert result.err.count("\n") == 1 and not result.folder.exists()


@pytest.mark.parametrize("clips", [False, True])
def test_starts_are_taken_in_turn_and_shown_beside_their_results(sample, image_ckpt, clip_ckpt, clips, tmp_path):
    ckpt, suffix = (clip_ckpt, ".gif") if clips else (image_ckpt, ".png")
    given = tmp_path / "given"
    given.mkdir()
    colours = {"b": (250, 20, 20), "a": (20, 250, 20)}
    for name, colour in colours.items():
        frames = np.full((4 if clips else 1, 8, 8, 3), colour, np.uint8)
        media.save_sample(given / (name + suffix), frames, fps=8)
    flags = ["--start", given]
    still = sample(ckpt, *flags, "--start-noise", 0, "--num-sampling-steps", 1)
    assert still.code == 0, still.err
    assert column(still.folder, "start") == [name + suffix for name in "ababa"]
    for name, pixels in zip("ababa", still.pixels, strict=True):
        assert np.abs(pixels.astype(int) - colours[name]).max() <= (40 if clips else 1)
    with Image.open(still.folder / "grid.png") as sheet:
        shown = np.asarray(sheet.convert("RGB")).astype(int)
    assert (np.abs(shown - colours["a"]).max(-1) <= 40).sum() > 5 * 8 * 8, "three results and three starts"
    half = sample(ckpt, *flags, folder="half")
    assert half.code == 0 and not np.array_equal(half.pixels[0], still.pixels[0])
    assert '"start_noise": 0.5' in (half.folder / "samples.json").read_text()
    pure, ordinary = sample(ckpt, *flags, "--start-noise", 1, folder="pure"), sample(ckpt, folder="ordinary")
    assert [file.read_bytes() for file in pure.files] == [file.read_bytes() for file in ordinary.files]
    again = sample(ckpt, "--start", still.folder, "--start-noise", 0, "--num-sampling-steps", 1, folder="again")
    assert again.code == 0, again.err
    assert column(again.folder, "start") == [path.name for path in still.files], "the sheet beside them is no start"
    other = sample(ckpt, "--start", given / ("a" + suffix), folder="half")
    assert other.code == 2 and "(start differ)" in other.err


def test_sums_and_checkpoints_are_written_as_they_were_asked_for(sample, image_ckpt, tmp_path):
    other = save_checkpoint(tmp_path / "other.pt", IMAGE_ARGS, seed=1, names=["emu", "owl", "yak"])
    flags = ["--also", other, "--classes", "cat*0.7+yak*0.3", "owl", "cat*1+dog*0", "dog*0"]
    result = sample(image_ckpt, *flags)
    assert result.code == 0, result.err
    assert column(result.folder, "class") == ["cat*0.7+yak*0.3", "owl", "cat", "none", "cat*0.7+yak*0.3"]
    assert column(result.folder, "label") == ["0*0.7+4*0.3", "2", "0", "5", "0*0.7+4*0.3"]
    assert "0 of 5 samples to make" in sample(image_ckpt, *flags).out
    for changed in ([], ["--also", image_ckpt]):
        refused = sample(image_ckpt, *changed, "--classes", "cat")
        assert refused.code == 2 and "also" in refused.err


def test_a_trace_shows_what_samples_go_through_and_changes_none(sample, image_ckpt, tmp_path):
    plain = sample(image_ckpt)
    energetic = save_checkpoint(tmp_path / "dot.pt", {**IMAGE_ARGS, "ebm": "dot"})
    assert not list(plain.folder.glob("trace*"))
    traced = sample(image_ckpt, "--trace", "--trace-gif")
    assert traced.code == 0 and "0 of 5 samples to make" in traced.out
    assert sorted(path.name for path in traced.folder.glob("trace*")) == ["trace-norm.png", "trace.gif", "trace.png"]
    with Image.open(traced.folder / "trace.gif") as film:
        assert film.n_frames == 4, "before each update, and after the last"
    both = sample(energetic, *STOPPING[:2], "--stop-norm", 10, "--trace", folder="dot")
    assert both.code == 0 and {path.name for path in both.folder.glob("trace*")} == {"trace.png", "trace-norm.png"}
    with Image.open(both.folder / "trace-norm.png") as two, Image.open(traced.folder / "trace-norm.png") as one:
        assert two.height > one.height, "the energy has a plot of its own"


@pytest.mark.parametrize("name", PRECISIONS)
def test_clips_stop_and_start_from_clips_in_every_precision(sample, clip_ckpt, name):
    first = sample(clip_ckpt, "--num-sampling-steps", 12, "--stop-norm", 17.4, *PRECISIONS[name])
    assert first.code == 0 and len(set(column(first.folder, "evaluations"))) > 1
    flags = ["--start", first.folder, "--start-noise", 0.3, "--classes", "cat+dog", "--sampler", "adam"]
    second = sample(clip_ckpt, *flags, *PRECISIONS[name], folder="second")
    assert second.code == 0 and column(second.folder, "start") == [path.name for path in first.files]


def test_a_single_point_moves_no_start_and_is_summed_up_all_the_same(sample, image_ckpt, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    flags = [
        "--num-sampling-steps",
        1,
        "--start",
        tmp_path / "red.png",
        "--start-noise",
        0,
        "--stop-norm",
        3,
        "--trace",
    ]
    result = sample(image_ckpt, *flags)
    assert result.code == 0, result.err
    assert "0.0 of 0 on average" in result.out and all((x == [255, 0, 0]).all() for x in result.pixels)
