"""Bad arguments, one line each; and the real commands under torchrun with one and two ranks."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from EqM import cli
from EqM.data import autoencoder as latents
from EqM.data import files as data
from EqM.data import loader
from EqM.models import EqM_models
from EqM.run import checkpoint, seeds
from EqM.run.errors import UserError
from EqM.transport import Transport
from helpers import IMAGE_ARGS, PYTHONPATH, REPO, assert_same_checkpoint, save_checkpoint, train_args
from in_turn import ENCODE, FOUR_STEPS, SAMPLE, stop_after_two_steps

COUNTS = "0 -1 1.5 x inf nan"  # none of them a positive whole number

BAD = {
    "train": {
        "--global-batch-size": COUNTS,
        "--epochs": COUNTS,
        "--max-steps": COUNTS,
        "--log-every": COUNTS,
        "--sample-every": COUNTS,
        "--cfg-scale": "-1 nan x",
        "--ckpt-every": COUNTS,
        "--keep-checkpoints": COUNTS,
        "--grad-accum-steps": COUNTS,
        "--image-size": COUNTS + " 9",
        "--num-classes": COUNTS + " 1",
        "--clip-len": "0 -4 four",
        "--patch-frames": "0 x",
        "--shard-size": "0 1 2 x",
        "--frame-interval": "0 -1 x",
        "--num-workers": "-1 x 0.5",
        "--warmup-steps": "-1 x",
        "--global-seed": "-1 x",
        "--lr": "0 -1 nan inf x",
        "--max-grad-norm": "0 -1 nan inf x",
        "--ema-decay": "-0.1 1.1 nan x",
        "--max-bad-fraction": "-0.1 2 x",
        "--train-eps": "-1 2 nan x",
        "--sample-eps": "-1 2 x",
        "--model": "EqM-S EqM-S/3 DiT-S/4",
        "--ebm": "sum",
        "--path-type": "linear",
        "--prediction": "data",
        "--loss-weight": "none",
        "--lr-schedule": "step",
        "--c-schedule": "cosine",
        "--c-start": "0 1 -0.1 nan x",
        "--c-peak": "0 inf 2",  # 2 is piecewise's alone
        "--c-scale": "0 -4 nan inf x",
        "--vae-precision": "bf16",
        "--vae": "large /nowhere",
        "--device": "gpu cuda:99 tpu",
        "--ckpt": "/nowhere.pt latest",
        "--data-path": "/nowhere",
        "--csv": "/nowhere.csv",
        "--results-dir": "/dev/null/results",
        "--latents": "/nowhere",
        "--no-such-flag": "1",
        "--use-bf16": "1",
    },
    "sample_gd": {
        "--num-fid-samples": COUNTS,
        "--global-batch-size": COUNTS,
        "--num-sampling-steps": COUNTS + " 1",
        "--fps": COUNTS,
        "--cfg-channels": COUNTS,
        "--stepsize": "0 -1 nan inf x",
        "--cfg-scale": "-1 nan inf x",
        "--mu": "-0.1 1.1 nan x",
        "--sampler": "sgd sde",
        "--beta1": "-0.1 1.1 x",
        "--temperature": "-1 nan x 0.1",
        "--stop-norm": "-1 nan x",
        "--atol": "0 x 0.1",
        "--start": "/nowhere /dev/null",
        "--start-noise": "0.5 2 x",
        "--also": "/nowhere.pt /dev/null",
        "--clip-format": "avi",
        "--classes": "emu 3 -1",
        "--ckpt": "/nowhere.pt /dev/null",
        "--folder": "/dev/null/samples",
        "--global-seed": "-1 x",
        "--model": "EqM-S/4 EqM-Z/1",
        "--image-size": "16 0",
        "--device": "gpu",
    },
    "evaluate": {
        "--num-fid-samples": COUNTS,
        "--batch-size": COUNTS,
        "--neighbours": COUNTS,
        "--num-sampling-steps": "1 x",
        "--cfg-scale": "-1 x",
        "--inception": "/nowhere",
        "--out": "x.npz",
        "--device": "gpu",
    },
    "extract_latents": {
        "--batch-size": COUNTS,
        "--image-size": COUNTS + " 10",
        "--clip-len": "0 x",
        "--vae": "none /nowhere",
        "--data-path": "/nowhere",
        "--out": "/dev/null/cache",
        "--num-workers": "-1 x",
        "--frame-interval": "2",
        "--device": "gpu",
    },
}
TABLE = [(s, flag, value) for s, flags in BAD.items() for flag, values in flags.items() for value in values.split()]


@pytest.fixture
def base(image_folder, tiny_vae, tmp_path):
    """For each script, arguments it runs with."""
    ckpt = save_checkpoint(tmp_path / "x.pt", IMAGE_ARGS)
    return {
        "train": train_args(image_folder, tmp_path / "runs"),
        "sample_gd": ["--ckpt", ckpt, "--folder", tmp_path / "samples", "--device", "cpu"],
        "evaluate": ["--samples", image_folder, "--reference", image_folder, "--device", "cpu"],
        "extract_latents": [
            "--data-path", image_folder, "--out", tmp_path / "cache", "--vae", tiny_vae, "--image-size", 16,
            "--device", "cpu", "--num-workers", 0,
        ],
    }  # fmt: skip


def assert_one_line(result):
    assert result.code == 2, result.err
    assert result.err.count("\n") == 1 and "error: " in result.err and "Traceback" not in result.err, result.err


def test_there_are_more_than_80_bad_values():
    assert len(TABLE) > 80


@pytest.mark.parametrize(("script", "flag", "value"), TABLE)
def test_a_bad_value_is_one_line_before_anything_is_made(run_script, base, tmp_path, script, flag, value):
    result = run_script(script, *base[script], flag, value)
    assert_one_line(result)
    assert flag in result.err or "unrecognized" in result.err or value in result.err
    assert not [tmp_path / name for name in ("runs", "samples", "cache") if (tmp_path / name).exists()]


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("train", "--use-amp --use-bf16", "not allowed with"),
        ("sample_gd", "--use-amp --use-bf16", "not allowed with"),
        ("train", "--global-batch-size 5 --grad-accum-steps 2", "does not divide"),
        ("train", "--video", "--video"),
        ("train", "--video --clip-len 6 --image-size 16", "--clip-len 6 must be a multiple"),
        ("train", "--ebm dot --grad-checkpointing", "--grad-checkpointing"),
        ("train", "--latents /nowhere", "either --data-path"),
        ("train", "--c-start 0.7 --c-schedule linear", "--c-start has no effect on --c-schedule linear"),
        ("train", "--c-scale 8 --prediction noise", "drop --c-scale or --prediction noise"),
        ("train", "--split-checkpoints", "--split-checkpoints"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(run_script, base, tmp_path, script, flags, words):
    result = run_script(script, *base[script], *flags.split())
    assert_one_line(result)
    assert words in result.err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", BAD)
def test_help_names_every_flag_with_its_default(run_script, script):
    result = run_script(script, "--help")
    assert result.code == 0 and "--use-bf16" in result.out and "default" in result.out


def test_a_flag_that_is_missing_is_one_line(run_script):
    for script, flag in [("train", "--data-path"), ("sample_gd", "--ckpt"), ("extract_latents", "--out")]:
        result = run_script(script)
        assert_one_line(result)
        assert flag in result.err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "EqM-Q/3"),
        ("model", 5),
        ("ebm", "cubed"),
        ("image_size", "8"),
        ("video", "no"),
        ("path_type", "Square"),
    ],
)
def test_a_checkpoint_whose_args_make_no_sense_is_one_line(run_script, tmp_path, name, value):
    path = save_checkpoint(tmp_path / "x.pt", IMAGE_ARGS)
    content = checkpoint.load(path)
    content["args"][name] = value
    checkpoint.save(path, content)
    result = run_script("sample_gd", "--ckpt", path, "--folder", tmp_path / "out", "--device", "cpu")
    assert result.code == 2 and f"the checkpoint's {name} is {value!r}" in result.err
    assert "Traceback" not in result.err and not (tmp_path / "out").exists()


def test_only_one_rank_tells_a_bad_argument(run_script, base, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = run_script("train", *base["train"], "--lr", "x")
    assert result.code == 2 and result.err == ""


def test_a_full_disk_anywhere_is_one_line(capfd):
    def main():
        raise OSError(28, "No space left on device", "results/000/log.txt")

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "No space left on device: 'results/000/log.txt'" in err


def test_a_programming_error_keeps_its_traceback():
    def broken():
        raise KeyError("ours")

    with pytest.raises(KeyError):
        cli.run(broken)

    def told():
        raise UserError("theirs")

    with pytest.raises(SystemExit) as stop:
        cli.run(told)
    assert stop.value.code == 2


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(ranks, script, *argv, check=True):
    """A script under torchrun, as people start it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*TORCHRUN, f"--nproc_per_node={ranks}", "--standalone", REPO / "EqM" / f"{script}.py", *map(str, argv)],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert not check or result.returncode == 0, result.stderr
    return result


def losses(root):
    with open(next(root.glob("*/metrics.csv"))) as file:
        return [float(row["Train Loss"]) for row in csv.DictReader(file)]


def assert_went_on_exactly(straight, stopped):
    (whole,) = straight.glob("*/checkpoints/0000004.pt")
    (parts,) = stopped.glob("*/checkpoints/0000004.pt")
    assert_same_checkpoint(whole, parts)
    assert losses(stopped) == losses(straight)
    return whole


def test_two_ranks_train_stop_and_go_on_exactly(image_folder, tmp_path):
    straight, stopped, flags = tmp_path / "straight", tmp_path / "stopped", ["--use-bf16", "--num-workers", 1]
    torchrun(2, "train", *train_args(image_folder, straight, *FOUR_STEPS, *flags, "--ckpt-every", 2))
    stop_after_two_steps(straight, stopped)
    resumed = torchrun(2, "train", *train_args(image_folder, stopped, *FOUR_STEPS, *flags, "--auto-resume"))
    assert ", exactly" in resumed.stdout and "2 rank(s)" in resumed.stdout
    assert_went_on_exactly(straight, stopped)


@pytest.fixture(scope="module")
def in_turn(image_folder, clip_folder, tiny_vae, tmp_path_factory):
    """Folder of what two ranks did, one command after the other: to start processes for each is what would cost."""
    folder = tmp_path_factory.mktemp("in_turn")
    script = REPO / "tests/in_turn.py"
    result = subprocess.run(
        [*TORCHRUN, "--nproc_per_node=2", "--standalone", script, image_folder, clip_folder, tiny_vae, folder],
        capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


def test_two_ranks_of_fp16_go_on_exactly_and_sample_as_one(in_turn, run_script):
    assert ", exactly" in next((in_turn / "stopped").glob("*/log.txt")).read_text()
    whole = assert_went_on_exactly(in_turn / "straight", in_turn / "stopped")
    assert run_script("sample_gd", "--ckpt", whole, "--folder", in_turn / "s1", *SAMPLE).code == 0
    pixels = []
    for ranks in (1, 2):  # in BF16 they sample alike for the same reason
        with np.load(in_turn / f"s{ranks}.npz") as archive:
            pixels.append(archive["arr_0"].astype(int))
    assert pixels[0].shape == (5, 8, 8, 3) and np.abs(pixels[0] - pixels[1]).max() <= 1


def test_two_ranks_with_accumulation_step_along_the_mean_gradient(in_turn, image_folder):
    """Adam's first moment after one step is a tenth of it; here it is put together from each rank's two passes."""
    saved = checkpoint.load(next(in_turn.glob("accumulated/*/checkpoints/*.pt")))

    torch.manual_seed(0)
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=2, in_channels=3).train()
    files = data.LabelledFiles(*data.find_files(image_folder, clips=False), size=8)
    for rank in range(2):
        stream = iter(loader.Stream(len(files), batch_size=1, rank=rank, world_size=2, seed=0))
        seeds.seed_step(0, 1, rank)
        for _ in range(2):
            pixels, label, _ = files[next(stream)[0]]
            point = Transport().sample(latents.to_pixels(pixels[None]))
            loss = Transport().loss(model(point.xt, point.t, torch.tensor([label])), point).mean()
            (loss / 4).backward()
    for i, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            moment = saved["opt"]["state"][i]["exp_avg"]
            torch.testing.assert_close(moment, 0.1 * parameter.grad, rtol=1e-4, atol=1e-7)
    assert saved["world_size"] == 2


def test_a_rank_that_fails_takes_the_others_down_with_its_reason(image_folder, tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "x.png").write_text("no picture")
    result = torchrun(2, "train", *train_args(tmp_path / "data", tmp_path / "runs"), check=False)
    assert result.returncode != 0 and "no file of class" in result.stderr


def test_what_all_ranks_find_wrong_is_said_once(image_folder, tmp_path):
    ckpt = save_checkpoint(tmp_path / "other.pt", {**IMAGE_ARGS, "model": "EqM-T/2"})
    words = train_args(image_folder, tmp_path / "runs", "--ckpt", ckpt)
    result = torchrun(2, "train", *words, check=False)
    assert result.returncode != 0 and result.stderr.count("train.py: error") == 1, result.stderr


def test_two_ranks_encode_one_cache(in_turn, run_script, clip_folder, tiny_vae):
    words = ["--data-path", clip_folder, "--out", in_turn / "c1", "--vae", tiny_vae, *ENCODE]
    assert run_script("extract_latents", *words).code == 0
    names = [f"{shard:06d}.npy" for shard in range(4)]
    one, two = (np.stack([np.load(in_turn / f"c{ranks}" / name) for name in names]) for ranks in (1, 2))
    assert np.abs(one.astype(float) - two).max() < 1e-2


def test_an_overflow_on_one_rank_skips_the_step_on_all(in_turn):
    """Rows: at the start, after a step that overflows on the second rank, after one that does not."""
    main, other = (torch.load(in_turn / f"overflow{rank}.pt") for rank in range(2))
    assert torch.equal(main, other)
    skipped, scale, weights = main.unbind(1)
    assert skipped.tolist() == [0, 1, 1] and scale.tolist() == [65536, 32768, 32768]
    assert weights[0] == weights[1] != weights[2]


def test_a_signal_to_one_rank_stops_both_after_the_same_step(image_folder, tmp_path):
    """Slurm warns every process; a person warns one."""
    flags = ["--max-steps", 100_000, "--epochs", 10**6, "--log-every", 1]
    process = subprocess.Popen(
        [*TORCHRUN, "--nproc_per_node=2", "--standalone", REPO / "EqM/train.py",
         *train_args(image_folder, tmp_path, *flags)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while "(step=" not in process.stdout.readline():
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    saved = checkpoint.load(next(tmp_path.glob("*/checkpoints/*.pt")))
    assert process.returncode == 0 and f"Stopping after step {saved['step']}," in out
