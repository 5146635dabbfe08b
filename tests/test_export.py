"""export.py: what is taken away samples as the checkpoint did, here, by its hub name, and in a process of its own."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from EqM import EqM_models, EqMPipeline, export
from EqM.run import checkpoint, exported
from EqM.run.errors import UserError
from helpers import CLIP_ARGS, IMAGE_ARGS, NAMES, REPO, save_checkpoint, train_args

HOW = {"num_sampling_steps": 4, "stepsize": 0.1, "cfg_scale": 2.0}
FLAGS = ["--num-sampling-steps", 4, "--stepsize", 0.1, "--cfg-scale", 2, "--sheet", 3, "--device", "cpu"]


@pytest.fixture
def take_away(run_script, tmp_path):
    """take_away(checkpoint, *flags, out="away"): the outcome, with .folder."""

    def run(ckpt, *flags, out="away"):
        drawing = [] if "--strip" in flags else FLAGS
        result = run_script("export", "--ckpt", ckpt, "--out", tmp_path / out, *drawing, *flags)
        result.folder = tmp_path / out
        return result

    return run


def drawn(path, precision="fp32"):
    pipe = EqMPipeline.from_pretrained(path, precision=precision, device="cpu")
    return pipe(classes=["all"], num_samples=3, **HOW)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("args", [IMAGE_ARGS, CLIP_ARGS], ids=["image", "clip"])
def test_samples_in_the_precision_of_the_file_are_the_checkpoints_bit_for_bit(take_away, tmp_path, args, precision):
    ckpt = save_checkpoint(tmp_path / "x.pt", args)
    result = take_away(ckpt, "--precision", precision)
    assert result.code == 0, result.err
    here, away = drawn(ckpt, precision), drawn(result.folder, precision)
    assert torch.equal(here.latents, away.latents) and np.array_equal(here.samples, away.samples)
    pipe = EqMPipeline.from_pretrained(result.folder, precision=precision, device="cpu")
    assert pipe.class_names == ["cat", "dog", "owl"] and pipe.advice.items() >= HOW.items()
    assert torch.equal(pipe(classes=["all"], num_samples=3, **pipe.advice).latents, here.latents)
    if precision != "fp32":
        whole = sum(tensor.numel() * 4 for tensor in checkpoint.load(ckpt)["ema"].values())
        assert (result.folder / exported.WEIGHTS).stat().st_size < 0.9 * whole


def test_the_card_shows_samples_settings_and_the_runs_last_figures(run_script, take_away, image_folder, tmp_path):
    trained = run_script("train", *train_args(image_folder, tmp_path / "runs", "--log-every", 1, "--c-scale", 8))
    assert trained.code == 0, trained.err
    folder = next((tmp_path / "runs").glob("*-EqM-*"))
    result = take_away(folder)
    card = (result.folder / "README.md").read_text()
    assert "# EqM-T/4, 8 x 8" in card and "| classes | 2: cat, dog |" in card and "| stepsize | 0.1 |" in card
    assert not any(f"| {name} |" in card for name in ("mu", "beta1", "temperature", "rtol")), "which gd does not read"
    last = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")[1]
    assert f"| Train Loss | {last} (step 2) |" in card and "samples.png" in card
    config = json.loads((result.folder / "config.json").read_text())
    assert config["args"]["c_scale"] == 8 and config["step"] == 2
    assert {path.name for path in result.folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "samples.png",
    }  # fmt: skip


def test_a_local_autoencoder_comes_along_to_another_process(take_away, tiny_vae, tmp_path):
    torch.manual_seed(0)
    weights = EqM_models["EqM-T/4"](input_size=8, num_classes=3, in_channels=4).state_dict()
    weights["final_layer.linear.weight"].normal_(std=0.1)
    ckpt = tmp_path / "x.pt"
    checkpoint.save(ckpt, {"ema": weights, "args": {**IMAGE_ARGS, "vae": tiny_vae, "image_size": 32}})
    result = take_away(ckpt)
    assert result.code == 0, result.err
    moved = shutil.move(result.folder, tmp_path / "moved")
    words = [sys.executable, REPO / "EqM/sample_gd.py", "--ckpt", moved, "--folder", tmp_path / "samples"]
    how = ["--num-fid-samples", "3", "--classes", "all", "--num-sampling-steps", "4", "--stepsize", "0.1"]
    subprocess.run([*words, *how, "--cfg-scale", "2", "--device", "cpu"], check=True, capture_output=True)
    with np.load(tmp_path / "samples.npz") as archive:
        assert np.array_equal(archive["arr_0"], drawn(ckpt).samples)


def test_a_stripped_checkpoint_samples_alike_and_is_a_quarter(run_script, take_away, image_folder, tmp_path):
    run_script("train", *train_args(image_folder, tmp_path / "runs"))
    ckpt = next((tmp_path / "runs").glob("*/checkpoints/*.pt"))
    result = run_script("export", "--ckpt", ckpt, "--strip", "--out", tmp_path / "small.pt")
    assert result.code == 0, result.err
    assert (tmp_path / "small.pt").stat().st_size < 0.27 * ckpt.stat().st_size
    assert torch.equal(drawn(ckpt).latents, drawn(tmp_path / "small.pt").latents)


@pytest.fixture
def young_run(tmp_path):
    """A checkpoint of a run with two averages after 20 steps, of which FP16 skipped 4."""
    states = [torch.load(save_checkpoint(tmp_path / f"{seed}.pt", IMAGE_ARGS, seed))["model"] for seed in range(3)]
    args = {**IMAGE_ARGS, "ema_decay": [0.9, 0.99]}
    more = {"args": args, "class_names": NAMES, "step": 20, "schedule": {"taken": torch.tensor(16.0)}}
    checkpoint.save(tmp_path / "run.pt", dict(zip(("model", "ema", "ema-0.99"), states, strict=True)) | more)
    return tmp_path / "run.pt"


@pytest.mark.parametrize("how", ["strip of a strip", "folder"])
@pytest.mark.parametrize(
    ("asked", "known", "held"),
    [("ema", ["ema", "ema-0.9"], "19%"), ("ema-0.99", ["ema", "ema-0.99"], "85%"), ("model", ["ema", "model"], None)],
)
def test_what_is_taken_away_knows_which_weights_it_has(run_script, take_away, young_run, how, asked, known, held):
    flags = ["--sheet", 1] if how == "folder" else ["--strip"]
    result = take_away(young_run, "--weights", asked, *flags)
    assert result.code == 0, result.err
    said = f"The EMA still holds {held} of the weights it began with; "
    assert result.out.count(f"{said}--weights model takes") == result.out.count("The EMA") == (held is not None)
    if how == "strip of a strip":
        result = take_away(result.folder, "--strip", out="again")
        assert result.code == 0 and result.out.count("from has the trained ones") == (held is not None), result.err
    saved, there = checkpoint.load(result.folder), checkpoint.load(young_run)
    state = checkpoint.weights_named(there, asked, young_run)
    for name in known:
        found = checkpoint.weights_named(saved, name, result.folder)
        assert all(torch.equal(found[key], state[key]) for key in state)
        lines = []
        EqMPipeline.from_pretrained(result.folder, device="cpu", weights=name, tell=lines.append)
        assert lines == ([f"{said}what it was exported from has the trained ones"] if held else [])
    for name in {"ema-0.9", "ema-0.99", "model"} - {*known}:
        with pytest.raises(UserError, match=f"--weights {name} is not in .*; it has {', '.join(known)}$"):
            checkpoint.weights_named(saved, name, result.folder)
    if how != "folder" and held:
        assert saved["args"]["ema_decay"] == float(known[1].removeprefix("ema-"))


def test_weights_that_are_not_there_have_no_stand_in_by_name(tmp_path):
    state = torch.load(save_checkpoint(tmp_path / "x.pt", IMAGE_ARGS))["ema"]
    checkpoint.save(tmp_path / "averages.pt", {"ema": state, "args": IMAGE_ARGS})
    with pytest.raises(UserError, match="--weights model is not in .*; it has ema$"):
        EqMPipeline.from_pretrained(tmp_path / "averages.pt", device="cpu", weights="model")
    checkpoint.save(tmp_path / "trained.pt", {"model": state, "args": {**IMAGE_ARGS, "ema_decay": 0.9}})
    with pytest.raises(UserError, match="--weights ema-0.9 is not in .*; it has ema, model$"):
        EqMPipeline.from_pretrained(tmp_path / "trained.pt", device="cpu", weights="ema-0.9")


class FakeHub:
    """A hub that is a folder."""

    def __init__(self, root):
        self.root = root

    def create_repo(self, name, exist_ok):
        (self.root / name).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, repo_id, folder_path):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"hub://{repo_id}"

    def snapshot_download(self, name, local_files_only=False):
        if not (self.root / name).is_dir():
            raise OSError("no such repository")
        return str(self.root / name)


def test_it_is_pushed_and_loaded_by_its_name(take_away, run_script, tmp_path, monkeypatch):
    import huggingface_hub

    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    ckpt = save_checkpoint(tmp_path / "x.pt", IMAGE_ARGS)
    result = take_away(ckpt, "--push", "someone/balls")
    assert result.code == 0 and "Uploaded to hub://someone/balls" in result.out, result.err
    assert torch.equal(drawn("someone/balls").latents, drawn(ckpt).latents)
    nowhere = run_script("sample_gd", "--ckpt", "someone/else", "--folder", tmp_path / "samples")
    assert nowhere.code == 2 and nowhere.err.count("\n") == 1
    assert "neither a file here nor to be had from the hub: no such repository" in nowhere.err


def test_a_push_that_fails_leaves_the_folder(take_away, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(create_repo=None))
    result = take_away(save_checkpoint(tmp_path / "x.pt", IMAGE_ARGS), "--push", "someone/balls")
    assert result.code == 2 and "--push someone/balls failed" in result.err and exported.is_export(result.folder)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--weights", "ema-0.5"], "--weights ema-0.5 is not in"),
        (["--strip", "--precision", "bf16"], "--strip writes one FP32 checkpoint"),
        (["--strip", "--stepsize", 0.2], "--stepsize: no effect with --strip"),
        (["--strip", "--sheet", 3, "--global-seed", 1], "--sheet and --global-seed: no effect with --strip"),
        (["--sheet", 0, "--global-seed", 1], "--global-seed: no effect with --sheet 0"),
        (["--out", "/dev/null/x"], "cannot be written"),
        (["--out", "."], "exists already"),
        (["--ckpt", "/nowhere.pt"], "is not a file"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(take_away, tmp_path, flags, words):
    result = take_away(save_checkpoint(tmp_path / "x.pt", IMAGE_ARGS), *flags)
    assert result.code == 2 and result.err.count("\n") == 1 and words in result.err, result.err
    assert not result.folder.exists()


def test_an_export_that_cannot_draw_leaves_no_half_of_it(take_away, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "draw", lambda *_: (_ for _ in ()).throw(UserError("no samples")))
    result = take_away(save_checkpoint(tmp_path / "x.pt", IMAGE_ARGS))
    assert result.code == 2 and not result.folder.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"format": "EqM 2", "args": {}}'),
        ("config.json", '{"format": "EqM 1", "args": {"model": 3}}'),
        ("model.safetensors", "nothing"),
    ],
)
def test_a_damaged_export_is_one_line(take_away, run_script, tmp_path, name, content):
    folder = take_away(save_checkpoint(tmp_path / "x.pt", IMAGE_ARGS), "--sheet", 0).folder
    (folder / name).write_text(content)
    result = run_script("sample_gd", "--ckpt", folder, "--folder", tmp_path / "samples", "--device", "cpu")
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    assert "/away " in result.err or "model is 3" in result.err
