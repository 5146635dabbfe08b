"""EqMPipeline: the six lines of a notebook, and that the commands draw the very same."""

import re

import numpy as np
import pytest
import torch

from EqM import EqMPipeline, samplers
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
    more = ["--sampler", sampler, "--global-seed", 5, "--classes", "owl", 0, *FLAGS[name]]
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
            media.save_sample(tmp_path / f"{i}.gif", frames, fps=8)
            assert (tmp_path / f"{i}.gif").read_bytes() == (tmp_path / "s" / f"{i:06d}.gif").read_bytes()
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


def stopping(sampler="gd", **more):
    """Settings under which the samples of image_ckpt stop after different numbers of steps."""
    return {"num_sampling_steps": 12, "stepsize": 0.1, "stop_norm": 9.2, "sampler": sampler, **more}


@pytest.mark.parametrize("sampler", ["gd", "ngd", "heun", "langevin"])
def test_samples_that_stop_depend_on_neither_batch_nor_share_of_the_work(image_ckpt, sampler):
    pipe = open_pipe(image_ckpt)
    how = stopping(sampler, **({"temperature": 1e-4} if sampler == "langevin" else {}))
    together = pipe(num_samples=5, batch_size=5, **how)
    assert len(set(together.evaluations)) > 2
    for size in (1, 2):
        other = pipe(num_samples=5, batch_size=size, **how)
        assert other.evaluations == together.evaluations
        torch.testing.assert_close(other.latents, together.latents, atol=1e-5, rtol=1e-5)
    mine = [1, 4]  # as one of several ranks, or a run that goes on
    for part in pipe.draw([together.labels[i] for i in mine], mine, batch_size=2, **how):
        assert part.evaluations == [together.evaluations[i] for i in part.indices]
        torch.testing.assert_close(part.x, together.latents[part.indices], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("same", [{"stop_norm": 1e-6}, {"sampler": "langevin"}, {"sampler": "euler"}])
def test_what_asks_for_nothing_new_changes_no_bit(image_ckpt, same):
    pipe = open_pipe(image_ckpt)
    plain, other = pipe(num_samples=3, **SHORT), pipe(num_samples=3, **SHORT, **same)
    assert torch.equal(plain.latents, other.latents) and other.evaluations == [3] * 3


def test_adam_has_a_step_size_of_its_own(image_ckpt):
    pipe = open_pipe(image_ckpt)
    x, short = pipe.noise([0]), {"num_sampling_steps": 3}
    for sampler in samplers.SAMPLERS:
        own = 0.02 if sampler == "adam" else 0.0017
        ends = [pipe.descend(x, [0], sampler, **short, **more) for more in ({}, {"stepsize": own}, {"stepsize": 0.1})]
        assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_langevins_noise_is_a_function_of_seed_sample_and_step(image_ckpt):
    pipe = open_pipe(image_ckpt)
    how = {"sampler": "langevin", "temperature": 1.0, "num_sampling_steps": 3, "stepsize": 1e-3, "cfg_scale": 1.0}
    kicks = []
    for seed in (0, 0, 1):
        warm, cold = (pipe(classes=[0], num_samples=2, seed=seed, **{**how, "temperature": T}) for T in (1.0, 0.0))
        kicks.append(warm.latents - cold.latents)
    assert torch.equal(kicks[0], kicks[1]) and not torch.equal(kicks[0], kicks[2])
    assert kicks[0].std().item() == pytest.approx((2 * 1e-3) ** 0.5, rel=0.1), "of the first step alone: annealed"
    assert torch.corrcoef(kicks[0].flatten(1))[0, 1].abs() < 0.3, "each sample has its own"


@pytest.mark.parametrize("args", [IMAGE_ARGS, CLIP_ARGS])
def test_a_start_is_left_alone_or_forgotten_at_the_ends_of_its_noise(tmp_path, args):
    pipe = open_pipe(save_checkpoint(tmp_path / "x.pt", args))
    shape = (4, 8, 8, 3) if args["video"] else (8, 8, 3)
    given = list(np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8))
    ordinary = pipe(num_samples=3, **SHORT)
    assert torch.equal(pipe(num_samples=3, start=given, start_noise=1.0, **SHORT).latents, ordinary.latents)
    still = pipe(num_samples=3, start=given, start_noise=0.0, num_sampling_steps=1)
    assert torch.equal(still.latents, pipe.encode(np.stack([given[0], given[1], given[0]])))
    assert np.abs(still.samples.astype(int) - np.stack([given[0], given[1], given[0]])).max() <= 1
    assert still.evaluations == [0] * 3
    mixed = pipe.starts([0, 1, 2], 0, given, 0.25)
    torch.testing.assert_close(mixed, 0.75 * still.latents + 0.25 * pipe.noise([0, 1, 2], 0))
    with pytest.raises(UserError, match="give starts of its size"):
        pipe(num_samples=1, start=[np.zeros((*shape[:-3], 16, 16, 3), np.uint8)], start_noise=0.5, **SHORT)


def test_sums_of_classes(image_ckpt):
    pipe = open_pipe(image_ckpt)
    one = pipe(classes=["cat"], num_samples=2, **SHORT)
    for same in ("cat*1+dog*0", "cat*0.5+0*0.5"):
        drawn = pipe(classes=[same], num_samples=2, **SHORT)
        assert torch.equal(drawn.latents, one.latents) and drawn.labels == [0, 0]
    summed = pipe(classes=["cat*0.7+owl*0.3", "dog"], num_samples=3, batch_size=2, cfg_scale=2.0, **SHORT)
    assert summed.labels == [{0: 0.7, 2: 0.3}, 1, {0: 0.7, 2: 0.3}]
    x, t = pipe.noise([0]), torch.zeros(1)
    null, cat, owl = (pipe.field(x, [y]) for y in (3, 0, 2))
    expected = null + 2.0 * (0.7 * (cat - null) + 0.3 * (owl - null))
    torch.testing.assert_close(pipe.guided([{0: 0.7, 2: 0.3}], 2.0, None)(x, t), expected)
    torch.testing.assert_close(pipe.field(x, ["cat*0.7+owl*0.3"]), null + 0.7 * (cat - null) + 0.3 * (owl - null))
    for wrong in ("cat+emu", "cat*much"):
        with pytest.raises(UserError, match=r"--classes cat.* in 'cat.*' is no (class|weight) of this checkpoint"):
            pipe(classes=[wrong], **SHORT)


def test_the_field_of_a_sum_is_minus_the_gradient_of_its_energy(tmp_path):
    pipe = open_pipe(save_checkpoint(tmp_path / "x.pt", {**IMAGE_ARGS, "ebm": "dot"}))
    x, y, step = pipe.noise(range(2), seed=1), ["cat*0.5+owl*2", "dog"], 1e-2
    field = pipe.field(x, y)
    direction = field / field.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    slope = (pipe.energy(x + step * direction, y) - pipe.energy(x - step * direction, y)) / (2 * step)
    torch.testing.assert_close(-slope, field.flatten(1).norm(dim=1), rtol=1e-2, atol=1e-3)


def test_another_checkpoint_adds_its_field_and_its_classes(image_ckpt, tmp_path):
    alone = open_pipe(image_ckpt)(classes=["owl", "cat"], num_samples=2, **SHORT).latents
    twice = open_pipe(image_ckpt).also(image_ckpt)
    assert twice.class_names == NAMES
    assert torch.equal(twice(classes=["owl", "cat"], num_samples=2, **SHORT).latents, alone), "a mean of the same"
    other = save_checkpoint(tmp_path / "other.pt", IMAGE_ARGS, seed=1, names=["yak", "owl", "emu"])
    both = open_pipe(image_ckpt).also(other)
    assert both.class_names == ["cat", "dog", "owl", "yak", "emu"]
    x, first, second = both.noise([0]), open_pipe(image_ckpt), open_pipe(other)
    for name, theirs, ours in [("cat", 0, 3), ("owl", 2, 1), ("emu", 3, 2), (5, 3, 3)]:
        expected = (first.field(x, [theirs]) + second.field(x, [ours])) / 2
        torch.testing.assert_close(both.field(x, [name]), expected)
    summed = both(classes=["cat+emu"], num_samples=2, cfg_scale=1.0, cfg_channels=None, **SHORT)
    assert summed.labels == [{0: 1.0, 4: 1.0}] * 2
    assert both.composition.written(summed.labels[0]) == ("0+4", "cat+emu")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"image_size": 16}, "latents are 3 x 16 x 16, .* 3 x 8 x 8"),
        ({"video": True, "clip_len": 4}, "latents are 3 x 4 x 8 x 8"),
        ({"path_type": "GVP"}, "path is GVP"),
    ],
)
def test_checkpoints_of_other_latents_are_not_added(image_ckpt, tmp_path, args, words):
    other = save_checkpoint(tmp_path / "other.pt", {**IMAGE_ARGS, **args})
    with pytest.raises(UserError, match=f"other.pt cannot be added: its {words}"):
        open_pipe(image_ckpt).also(other)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_sixteen_bits_end_near_fp32_with_every_sampler(image_ckpt, sampler):
    """Within what the parity table of MIXED_PRECISION.md says of gd's ends, 1e-2 in BF16 and 2e-3 in FP16."""
    ends = {}
    for name in FLAGS:
        pipe = open_pipe(image_ckpt, precision=name)
        more = {"temperature": 0.1} if sampler == "langevin" else {}
        eta = 0.02 if sampler == "adam" else 0.05
        ends[name] = pipe.descend(pipe.noise([0, 1]), [0, 1], sampler, 12, eta, cfg_scale=4.0, **more)
        assert ends[name].dtype == torch.float32
    for name, most in (("bf16", 1e-2), ("fp16", 2e-3)):
        assert 0 < (ends[name] - ends["fp32"]).norm() / ends["fp32"].norm() < most


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


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"classes": []}, "classes is empty"),
        ({"classes": "cat"}, r"classes is one text, 'cat'; give a list, \['cat'\]"),
        ({"start": []}, "start is empty"),
    ],
)
def test_a_call_for_nothing_says_so(image_ckpt, call, words):
    with pytest.raises(UserError, match=words):
        open_pipe(image_ckpt)(**call, **SHORT)


def test_what_is_written_of_any_label_is_read_back(image_ckpt, tmp_path):
    composition = open_pipe(image_ckpt).composition
    for text in ("cat", "dog*0.5", "cat+owl*-1", "cat+cat*-1"):
        asked = composition.asked(text)
        assert composition.asked(composition.written(asked)[1]) == asked
    assert composition.written(composition.asked("cat+cat*-1"))[1] == "none" and composition.asked("none") == 3
    called_so = open_pipe(save_checkpoint(tmp_path / "so.pt", IMAGE_ARGS, names=["cat", "none", "owl"]))
    assert called_so.composition.asked("none") == 1
    other = save_checkpoint(tmp_path / "other.pt", IMAGE_ARGS, names=["emu", "cat", "fox"])
    assert open_pipe(image_ckpt).also(other).labels(["none"], [0]) == [5], "after the classes of both"


def test_what_the_readme_shows_runs(tmp_path, monkeypatch):
    """As it stands, on a run of this name."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    code = re.search(r"^    from EqM import EqMPipeline\n(?:    .*\n|\n(?=    ))+", text, re.M)[0]
    run = re.search(r'from_pretrained\("([^"]+)"', code)[1]
    (tmp_path / run / "checkpoints").mkdir(parents=True)
    args = {**CLIP_ARGS, "num_classes": 4}
    save_checkpoint(tmp_path / run / "checkpoints" / "0000100.pt", args, names=["a", "b", "Biking", "Surfing"])
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec("\n".join(line[4:] for line in code.splitlines()), namespace)  # noqa: S102
    assert namespace["result"].samples.shape == (4, 4, 8, 8, 3) and namespace["result"].labels == [2, 3, 2, 3]
