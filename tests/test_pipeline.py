"""EqMPipeline: the six lines of a notebook, and that the commands draw the very same."""

import re

import numpy as np
import pytest
import torch

from EqM import EqMPipeline
from EqM.data import media
from EqM.run.errors import UserError
from helpers import CLIP_ARGS, IMAGE_ARGS, NAMES, REPO, save_checkpoint

SHORT = {"num_sampling_steps": 4, "stepsize": 0.1}
FLAGS = {"fp32": [], "bf16": ["--use-bf16"], "fp16": ["--use-amp"]}


@pytest.fixture
def image_ckpt(tmp_path):
    return save_checkpoint(tmp_path / "image.pt", IMAGE_ARGS)


def open_pipe(path, **more):
    return EqMPipeline.from_pretrained(path, device="cpu", **more)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("args", [IMAGE_ARGS, CLIP_ARGS])
@pytest.mark.parametrize("sampler", ["gd", "ngd"])
def test_sample_i_is_bit_for_bit_what_the_command_writes(run_script, tmp_path, name, args, sampler):
    path = save_checkpoint(tmp_path / "x.pt", args)
    words = "--num-fid-samples 3 --num-sampling-steps 4 --stepsize 0.1 --global-batch-size 2 --device cpu --mu 0.2"
    more = ["--sampler", sampler, "--clip-format", "mp4", "--global-seed", 5, "--classes", "owl", 0, *FLAGS[name]]
    written = run_script("sample_gd", "--ckpt", path, "--folder", tmp_path / "s", *words.split(), *more)
    assert written.code == 0, written.err
    drawn = open_pipe(path, precision=name)(
        classes=["owl", 0], num_samples=3, seed=5, batch_size=2, sampler=sampler, mu=0.2, **SHORT
    )
    assert drawn.labels == [2, 0, 2] and drawn.samples.dtype == np.uint8
    assert drawn.samples.shape == ((3, 4, 8, 8, 3) if args["video"] else (3, 8, 8, 3))
    assert drawn.latents.dtype == torch.float32 and drawn.latents.shape[0] == 3
    if args["video"]:  # whose file is lossy: written again from these frames it must be the same file
        for i, frames in enumerate(drawn.samples):
            media.save_sample(tmp_path / f"{i}.mp4", frames, fps=8)
            assert (tmp_path / f"{i}.mp4").read_bytes() == (tmp_path / "s" / f"{i:06d}.mp4").read_bytes()
    else:
        with np.load(tmp_path / "s.npz") as archive:
            assert np.array_equal(archive["arr_0"], drawn.samples)


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path):
    run = tmp_path / "000-EqM-T-4-Linear-velocity-None"
    (run / "checkpoints").mkdir(parents=True)
    for step in (2, 10):
        save_checkpoint(run / "checkpoints" / f"{step:07d}.pt", IMAGE_ARGS, seed=step)
    newest = open_pipe(run / "checkpoints" / "0000010.pt")
    for folder in (run, run / "checkpoints"):
        assert torch.equal(open_pipe(folder).model.x_embedder.proj.weight, newest.model.x_embedder.proj.weight)
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_pipe(tmp_path)


@pytest.mark.parametrize("ebm", ["dot", "l2"])
def test_the_field_is_minus_the_gradient_of_the_energy(tmp_path, ebm):
    pipe = open_pipe(save_checkpoint(tmp_path / "x.pt", {**IMAGE_ARGS, "ebm": ebm}))
    x, y, step = pipe.noise(range(2), seed=1), ["cat", 2], 1e-2
    field = pipe.field(x, y)
    direction = field / field.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    slope = (pipe.energy(x + step * direction, y) - pipe.energy(x - step * direction, y)) / (2 * step)
    torch.testing.assert_close(-slope, field.flatten(1).norm(dim=1), rtol=1e-2, atol=1e-3)


def test_a_model_without_an_energy_says_so(image_ckpt):
    pipe = open_pipe(image_ckpt)
    with pytest.raises(UserError, match="no explicit energy"):
        pipe.energy(pipe.noise([0]), [0])


def test_the_null_label_and_the_field_of_no_guidance(image_ckpt):
    pipe = open_pipe(image_ckpt)
    x, t = pipe.noise(range(2)), torch.zeros(2)
    y = torch.tensor([0, 2])
    assert torch.equal(pipe.guided(y, 1.0)(x, t), pipe.field(x, ["cat", "owl"]))
    assert not torch.equal(pipe.field(x, [3, 3]), pipe.field(x, [0, 2])), "3 is the null label of three classes"


def test_pictures_come_back_through_the_autoencoder(image_ckpt):
    pipe = open_pipe(image_ckpt)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    latents = pipe.encode(pictures)
    assert latents.shape == (2, 3, 8, 8) and latents.abs().max() <= 1
    assert np.abs(pipe.decode(latents).numpy().astype(int) - pictures).max() <= 1


def test_classes_are_names_numbers_or_drawn(image_ckpt):
    pipe = open_pipe(image_ckpt)
    assert pipe.class_names == NAMES
    assert pipe.labels(["owl", 0, "1"], range(4)) == [2, 0, 1, 2]
    assert pipe.labels(["all"], range(7)) == [0, 1, 2, 0, 1, 2, 0], "each class equally often"
    pipe.class_names[1] = "all"
    assert pipe.labels(["all"], range(3)) == [1, 1, 1], "a class of that name"
    pipe.class_names[1] = "dog"
    drawn = pipe.labels(None, range(60))
    assert set(drawn) == {0, 1, 2} and drawn == pipe.labels(None, range(60)) != pipe.labels(None, range(60), seed=1)
    for wrong in ("emu", 3, "-1", "\N{SUPERSCRIPT TWO}"):
        with pytest.raises(UserError, match=f"{wrong} is no class .* cat, dog, owl"):
            pipe.labels([wrong], [0])


def test_noise_of_langevin_is_a_samples_own_whatever_the_batch(image_ckpt):
    def noise(row, step):
        return torch.full((3, 8, 8), 100.0 * row + step)

    pipe = open_pipe(image_ckpt)
    how = {"num_samples": 3, "sampler": "langevin", "temperature": 1e-4, "noise": noise, "cfg_scale": 1.0, **SHORT}
    one, all_at_once = (pipe(batch_size=size, **how).latents for size in (1, 3))
    torch.testing.assert_close(one, all_at_once, atol=1e-5, rtol=1e-5)
    assert (all_at_once[2] - all_at_once[0]).abs().mean() > 1, "rows differ in their noise"


def test_weights_and_what_is_wrong_with_a_call(image_ckpt, tmp_path):
    saved = torch.load(image_ckpt, weights_only=True)
    saved["model"] = {name: value + 1 for name, value in saved["model"].items()}
    torch.save(saved, tmp_path / "two.pt")
    ema, model = (open_pipe(tmp_path / "two.pt", weights=which).model for which in ("ema", "model"))
    assert torch.equal(ema.x_embedder.proj.weight + 1, model.x_embedder.proj.weight)
    for more, words in [
        ({"precision": "fp8"}, "'fp8' is none of fp32, bf16, fp16"),
        ({"size": 3}, "size: no such flag"),
        ({"model": "EqM-S/4"}, "--model EqM-S/4 contradicts"),
        ({"weights": "raw"}, "--weights raw is not in"),
    ]:
        with pytest.raises(UserError, match=words):
            open_pipe(image_ckpt, **more)


def test_what_the_readme_shows_runs(tmp_path, monkeypatch):
    """As it stands, on a run of this name."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    code = re.search(r"^    from EqM import EqMPipeline\n(?:    .*\n|\n(?=    ))+", text, re.M)[0]
    run = re.search(r'from_pretrained\("([^"]+)"', code)[1]
    (tmp_path / run / "checkpoints").mkdir(parents=True)
    args = {**CLIP_ARGS, "num_classes": 4}
    save_checkpoint(tmp_path / run / "checkpoints" / "0000100.pt", args, names=["a", "b", "Biking", "c"])
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec("\n".join(line[4:] for line in code.splitlines()), namespace)  # noqa: S102
    assert namespace["result"].samples.shape == (4, 4, 8, 8, 3) and namespace["result"].labels == [2, 3, 2, 3]
