"""train.py as its command line runs it, on images as pixels: what it writes, resumes, survives and refuses."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from EqM.engine.precision import FLAGS as PRECISIONS
from EqM.models import EqM_models
from EqM.run import checkpoint
from EqM.run.log import RunLog
from EqM.run.saving import HostCopy
from helpers import REPO, assert_same_checkpoint, leaves, newest, train_args

TIMES = ("Train Steps/Sec", "Peak GiB")  # the only figures that a second run may change


@pytest.fixture
def train(run_script, image_folder, tmp_path):
    """train(*flags, root="runs"): one run; its outcome, with .folder (None if there is none) and .checkpoints."""

    def run(*flags, root="runs", data=image_folder):
        result = run_script("train", *train_args(data, tmp_path / root, *flags))
        folders = sorted((tmp_path / root).glob("*-EqM-*"))
        result.folder = folders[-1] if folders else None
        result.checkpoints = sorted(result.folder.glob("checkpoints/*")) if folders else []
        return result

    return run


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_run_writes_what_people_already_read(train, name):
    result = train(*PRECISIONS[name], "--log-every", 1)
    assert result.code == 0, result.err
    assert result.folder.name == "000-EqM-T-4-Linear-velocity-None"
    log = (result.folder / "log.txt").read_text()
    assert re.search(r"\(step=0000001\) Train Loss: \d+\.\d{4}, Train Steps/Sec: \d+\.\d\d, ", log)
    assert f"Precision: {name.upper()}" in log
    assert [row["step"] for row in rows(result.folder)] == ["1", "2"]
    assert [path.name for path in result.checkpoints] == ["0000002.pt"]
    saved = torch.load(result.checkpoints[0], weights_only=True)
    assert {"model", "ema", "opt", "args", "step", "epoch", "scaler", "rng", "class_names", "precision"} <= saved.keys()
    assert (saved["step"], saved["class_names"], saved["precision"]) == (2, ["cat", "dog"], name)
    assert saved["args"]["num_classes"] == 2 and isinstance(saved["args"], dict)
    tensors = [value for key in ("model", "ema", "opt") for _, value in leaves(saved[key])]
    assert {v.dtype for v in tensors if isinstance(v, torch.Tensor)} == {torch.float32}
    assert bool(saved["scaler"]) == (name == "fp16")


def test_losses_of_the_three_precisions_agree(train):
    losses = {}
    for name, flags in PRECISIONS.items():
        result = train(*flags, "--max-steps", 24, "--epochs", 20, "--log-every", 1, "--lr", 1e-3, root=name)
        losses[name] = [float(row["Train Loss"]) for row in rows(result.folder)]
    assert sum(losses["fp32"][-8:]) < sum(losses["fp32"][:8])
    for name in ("bf16", "fp16"):
        assert losses[name] == pytest.approx(losses["fp32"], rel=0.02) and losses[name] != losses["fp32"]


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_stopped_is_the_run_that_was_not(train, name, workers):
    """In mid-epoch (6 files, batch 4), with accumulation, between log lines, with a schedule."""
    flags = [
        *PRECISIONS[name], "--grad-accum-steps", 2, "--num-workers", workers, "--epochs", 50, "--lr-schedule", "cosine",
        "--warmup-steps", 2, "--log-every", 2, "--max-grad-norm", 1, "--ema-decay", 0.9,
    ]  # fmt: skip
    straight = train(*flags, "--max-steps", 7, "--ckpt-every", 3, root="straight")
    Path(straight.checkpoints[-1]).rename(straight.folder / "end.pt")
    resumed = train(*flags, "--max-steps", 7, "--ckpt", "latest", root="straight")
    assert resumed.code == 0, resumed.err
    assert resumed.folder == straight.folder
    assert "Going on from" in resumed.out and ", exactly" in resumed.out
    assert_same_checkpoint(straight.folder / "end.pt", straight.folder / "checkpoints/0000007.pt")
    assert [row for row in rows(straight.folder) if row["step"] == "6"] == rows(straight.folder)[2:3]


def test_the_log_after_a_stop_is_the_log_without_one(train):
    flags = ["--epochs", 50, "--log-every", 4]
    straight = train(*flags, "--max-steps", 8, root="straight")
    train(*flags, "--max-steps", 6, root="stopped")
    resumed = train(*flags, "--max-steps", 8, "--auto-resume", root="stopped")
    assert rows(resumed.folder) == rows(straight.folder) and len(rows(straight.folder)) == 2
    assert_same_checkpoint(straight.checkpoints[-1], resumed.checkpoints[-1])


def test_another_precision_or_batch_goes_on_and_says_what_is_no_longer_exact(train):
    first = train("--use-amp", "--epochs", 50)
    for flags, words in [
        (["--use-bf16"], "precision fp16 -> bf16"),
        (["--global-batch-size", 2, "--use-amp"], "global_batch_size 4 -> 2"),
    ]:
        result = train("--ckpt", first.checkpoints[0], "--max-steps", 3, "--epochs", 50, *flags)
        assert result.code == 0 and f"not exactly as without a stop: {words}" in result.out
        assert result.folder != first.folder and result.checkpoints[0].name == "0000003.pt"


def test_steps_that_fp16_skipped_are_no_fault_in_bf16(train, tmp_path):
    first = train("--use-amp", "--epochs", 50)
    saved = torch.load(first.checkpoints[0], weights_only=True)
    saved["guard"]["skipped"].fill_(3)
    torch.save(saved, tmp_path / "skipped.pt")
    flags = ["--ckpt", tmp_path / "skipped.pt", "--max-steps", 3, "--epochs", 50, "--log-every", 1]
    for name, skipped in (("bf16", "0"), ("fp16", "3")):
        result = train(*flags, *PRECISIONS[name], root=name)
        assert result.code == 0 and rows(result.folder)[-1]["Skipped Steps"] == skipped, result.err


def test_auto_resume_starts_goes_on_and_then_has_nothing_to_do(train):
    flags = ["--auto-resume", "--epochs", 50]
    first = train(*flags)
    assert "Going on from" not in first.out
    second = train(*flags, "--max-steps", 3)
    third = train(*flags, "--max-steps", 3)
    assert first.folder == second.folder == third.folder
    assert "steps 2 to 3" in second.out and "steps 3 to 3" in third.out
    assert third.code == 0 and len(third.checkpoints) == 2
    too_few = train(*flags)
    assert too_few.code == 2 and "is at step 3 already, and this run would end at 2" in too_few.err
    smaller = train(*flags, "--max-steps", 4, "--lr", 5e-5)
    assert smaller.folder == first.folder and "not exactly as without a stop: lr 0.0001 -> 5e-05" in smaller.out
    other = train(*flags, "--global-seed", 1)
    assert (
        other.folder != first.folder and "000-EqM-T-4-Linear-velocity-None is another run: global_seed 0" in other.out
    )


@pytest.mark.parametrize("spelled", ["data/", "./data", "absolute", "--num-classes"])
def test_the_same_data_written_another_way_is_the_same_run(train, image_folder, tmp_path, monkeypatch, spelled):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(image_folder)
    flags = ["--auto-resume", "--epochs", 50]
    first = train(*flags, data="data")
    more = ["--num-classes", 2] if spelled == "--num-classes" else []
    place = {"absolute": tmp_path / "data", "--num-classes": "data"}.get(spelled, spelled)
    second = train(*flags, *more, "--max-steps", 3, data=place)
    assert second.code == 0 and second.folder == first.folder and ", exactly" in second.out


def test_data_that_changed_is_named_and_classes_that_changed_are_refused(train, image_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    first = train("--epochs", 50, data=data)
    resume = ["--epochs", 50, "--max-steps", 3, "--ckpt", first.checkpoints[0]]
    assert ", exactly" in train(*resume, data=data, root="same").out
    (data / "cat" / "2.png").unlink()
    assert "data 6 -> 5 items" in train(*resume, data=data, root="fewer").out
    (data / "cat").rename(data / "owl")  # so that what was label 0 is label 1
    refused = train(*resume, data=data, root="renamed")
    assert refused.code == 2 and "'cat' gone and 'owl' new" in refused.err and not (tmp_path / "renamed").exists()
    allowed = train(*resume, "--allow-other-classes", data=data, root="renamed")
    assert allowed.code == 0 and "class_names: other classes" in allowed.out


def test_a_run_folder_has_one_writer(train, image_folder, tmp_path):
    process = start(image_folder, tmp_path / "runs", *LONG, "--ckpt-every", 1, "--auto-resume", until="Saved")
    try:
        second = train(*LONG, "--auto-resume")
        assert second.code == 2 and "is being written by another process" in second.err
    finally:
        process.kill()
        process.communicate()
    flags = ["--auto-resume", "--epochs", 10**6, "--log-every", 1, "--max-steps", 100_000]
    again = start(image_folder, tmp_path / "runs", *flags, until="Going on from")
    again.kill()
    again.communicate()


def test_latest_without_a_checkpoint_is_told(train):
    result = train("--ckpt", "latest")
    assert result.code == 2 and "holds no checkpoint of this configuration" in result.err


@pytest.mark.parametrize("bare", [False, True])
def test_published_weights_are_a_start(train, tmp_path, bare):
    torch.manual_seed(3)
    weights = EqM_models["EqM-T/4"](input_size=8, num_classes=2, in_channels=3).state_dict()
    saved = {"model": weights, "ema": weights, "opt": {}, "args": Namespace(model="EqM-T/4", image_size=64)}
    saved.pop("opt")
    torch.save(weights if bare else saved, tmp_path / "published.pt")
    result = train("--ckpt", tmp_path / "published.pt", "--lr", 1e-12, "--ema-decay", 1)
    assert result.code == 0 and "weights only, from step 0" in result.out
    ours = checkpoint.load(result.checkpoints[0])["ema"]
    assert all(torch.equal(ours[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize(
    "flags",
    ["--ebm dot", "--ebm l2 --disp", "--disp --no-uncond", "--path-type VP --prediction score", "--prediction noise",
     "--path-type GVP --prediction score --loss-weight velocity", "--grad-checkpointing --grad-accum-steps 2"],
)  # fmt: skip
def test_every_way_to_train_is_finite_in_every_precision(train, name, flags):
    result = train(*PRECISIONS[name], *flags.split(), "--log-every", 1)
    assert result.code == 0, result.err
    finite = [torch.isfinite(value).all() for value in checkpoint.load(result.checkpoints[0])["ema"].values()]
    assert all(finite)
    assert all(float(row["Train Loss"]) < 1e4 for row in rows(result.folder) if row["Skipped Steps"] == "0")


def test_clips_and_latents_train_alike(run_script, train, clip_folder, tiny_vae, tmp_path):
    """From the cache, the same posterior, flips, noise and order: the loss of encoding on the fly."""
    encoding = ["--vae", tiny_vae, "--image-size", 16, "--video", "--clip-len", 4]
    run_script(
        "extract_latents", "--data-path", clip_folder, "--out", tmp_path / "cache", *encoding, "--num-workers", 0,
        "--device", "cpu",
    )  # fmt: skip
    more = [*encoding, "--log-every", 1, "--max-steps", 4, "--epochs", 9]
    fly = train(*more, data=clip_folder, root="fly")
    assert fly.code == 0, fly.err
    words = train_args(clip_folder, tmp_path / "cached", *more)
    words[:2] = ["--latents", str(tmp_path / "cache")]
    assert run_script("train", *words).code == 0
    cached = next((tmp_path / "cached").iterdir())
    ours, theirs = ([float(row["Train Loss"]) for row in rows(folder)] for folder in (cached, fly.folder))
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(train, name):
    result = train(
        *PRECISIONS[name], "--max-steps", 40, "--epochs", 100, "--lr", 1e30, "--warmup-steps", 0, "--ckpt-every", 1,
        "--log-every", 2,
    )  # fmt: skip
    assert result.code == 2 and f"not finite in {name.upper()}" in result.err and "--lr" in result.err
    assert len(result.err.strip().splitlines()[-1]) < 400 and "Traceback" not in result.err
    for path in result.checkpoints:
        assert all(torch.isfinite(value).all() for value in checkpoint.load(path)["ema"].values())


@pytest.mark.parametrize("name", PRECISIONS)
def test_several_averages_go_on_exactly_and_the_first_is_the_one_alone(train, name):
    flags = [*PRECISIONS[name], "--epochs", 50, "--lr", 1e-2]
    several = [*flags, "--ema-decay", 0.9, 0.5, "--ema-std", 0.05, 0.1]
    straight = train(*several, "--max-steps", 5, root="straight")
    train(*several, "--max-steps", 3, root="stopped")
    resumed = train(*several, "--max-steps", 5, "--auto-resume", root="stopped")
    assert "0000003.pt, exactly" in resumed.out, resumed.err
    assert_same_checkpoint(straight.checkpoints[-1], resumed.checkpoints[-1])
    saved = checkpoint.load(straight.checkpoints[-1])
    assert list(checkpoint.averages(saved)) == ["ema-0.9", "ema-0.5", "ema-std-0.05", "ema-std-0.1"]
    assert saved["averaging"]["updates"] == 5 and saved["args"]["ema_decay"] == [0.9, 0.5]
    assert [path.name for path in sorted((resumed.folder / "averages").iterdir())] == ["0000003.pt", "0000005.pt"]
    alone = checkpoint.load(train(*flags, "--max-steps", 5, "--ema-decay", 0.9, root="alone").checkpoints[-1])
    assert alone.keys() == saved.keys() - {"ema-0.5", "ema-std-0.05", "ema-std-0.1", "averaging"}
    assert alone["args"]["ema_decay"] == 0.9
    for key in ("ema", "model"):
        assert all(torch.equal(value, saved[key][at]) for at, value in alone[key].items())
    other = train(*flags, "--ema-decay", 0.5, 0.9, "--max-steps", 6, "--ckpt", straight.checkpoints[-1], root="other")
    assert "not exactly as without a stop: ema_decay [0.9, 0.5] -> [0.5, 0.9], ema_std [0.05, 0.1] -> None" in other.out
    assert train("--ema-decay", 0.9, 0.9, root="twice").code == 2


def test_a_warmed_up_average_goes_on_exactly_and_is_no_longer_its_start(train):
    flags = ["--epochs", 50, "--lr", 1e-2, "--ema-warmup"]
    straight = train(*flags, "--max-steps", 5, root="straight")
    train(*flags, "--max-steps", 3, root="stopped")
    resumed = train(*flags, "--max-steps", 5, "--auto-resume", root="stopped")
    assert "0000003.pt, exactly" in resumed.out
    assert_same_checkpoint(straight.checkpoints[-1], resumed.checkpoints[-1])
    saved = checkpoint.load(straight.checkpoints[-1])
    last = "final_layer.linear.bias"  # which is zero at the start
    assert saved["ema"][last].norm() > 0.3 * saved["model"][last].norm() > 0


def test_weights_of_another_model_are_a_start_with_a_table_and_a_resume_wins_over_it(train, tmp_path):
    """Nothing is trained here, so that what is saved is what it started from."""
    still = ["--lr", 1e-12, "--ema-decay", 1]
    first = train("--lr", 1e-2)
    elsewhere = shutil.copy(first.checkpoints[0], tmp_path / "start.pt")
    flags = ["--image-size", 16, "--num-classes", 3, "--init-from", elsewhere, "--auto-resume", *still]
    result = train(*flags, root="next")
    assert result.code == 0, result.err
    assert f"Starting from {elsewhere}, its ema:" in result.out and "steps 0 to 2" in result.out
    assert "  changed  positions: new, of 1 x 4 x 4 tokens" in (result.folder / "log.txt").read_text()
    theirs, ours = checkpoint.load(elsewhere), checkpoint.load(result.checkpoints[0])
    assert all(torch.equal(theirs["ema"][name], ours["ema"][name]) for name in ours["ema"] if "blocks" in name)
    assert (ours["step"], ours["args"]["init_from"]) == (2, str(elsewhere))
    assert not torch.equal(theirs["ema"]["final_layer.linear.weight"], theirs["model"]["final_layer.linear.weight"])
    by_weights = train(*flags, "--weights", "model", root="weights")
    assert torch.equal(
        checkpoint.load(by_weights.checkpoints[0])["ema"]["final_layer.linear.weight"],
        theirs["model"]["final_layer.linear.weight"],
    )

    other = train(*flags[:5], result.checkpoints[0], *flags[6:], root="next")
    assert "Starting anew, since 000-EqM-T-4-Linear-velocity-None is another run: init_from" in other.out
    shutil.rmtree(other.folder)
    elsewhere.unlink()
    again = train(*flags, "--max-steps", 3, "--epochs", 9, root="next")
    assert again.code == 0 and again.folder == result.folder, again.err
    assert "0000002.pt, exactly" in again.out and "--init-from has no effect" in again.out
    assert "Starting from" not in again.out


def test_a_start_that_does_not_fit_leaves_no_run_folder(train, tmp_path):
    wide = EqM_models["EqM-S/4"](input_size=8, num_classes=2, in_channels=3)
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    for path, message in [("wide.pt", "it is 384 wide and this model 144"), ("none.pt", "is not a file")]:
        result = train("--init-from", tmp_path / path)
        assert result.code == 2 and message in result.err and result.folder is None
        assert len(result.err.strip().splitlines()) == 1, result.err
    assert train("--init-positions", "new").code == train("--weights", "model").code == 2


def test_checkpoints_are_pruned_to_the_newest(train):
    result = train("--max-steps", 5, "--epochs", 50, "--ckpt-every", 1, "--keep-checkpoints", 2)
    assert [path.name for path in result.checkpoints] == ["0000004.pt", "0000005.pt"]


def test_a_bad_file_is_named_and_too_many_stop_the_run(train, image_folder, tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for path in (image_folder / label).iterdir():
            (tmp_path / "data" / label / path.name).symlink_to(path)
    (tmp_path / "data/cat/broken.png").write_text("no picture")
    told = train("--max-steps", 4, "--epochs", 9, data=tmp_path / "data")
    assert told.code == 0 and told.out.count("broken.png does not decode") == 1
    (tmp_path / "data/dog/worse.png").write_text("no picture")
    stopped = train("--max-steps", 9, "--epochs", 9, data=tmp_path / "data")
    assert stopped.code == 2 and "--max-bad-fraction" in stopped.err and "worse.png" in stopped.err
    assert train("--epochs", 2, "--max-bad-fraction", 0.5, data=tmp_path / "data").code == 0


def test_a_disk_that_fills_up_is_one_line_and_loses_nothing(train, monkeypatch):
    first = train("--epochs", 50)
    before = first.checkpoints[0].read_bytes()

    def full(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    result = train("--epochs", 50, "--max-steps", 3, "--auto-resume")
    assert result.code == 2 and "No space left" in result.err
    assert [path.name for path in result.checkpoints] == ["0000002.pt"]
    assert first.checkpoints[0].read_bytes() == before


def test_training_goes_on_while_a_checkpoint_is_written(train, monkeypatch):
    """Its write waits for the next step's line; a save in the loop would wait for ever."""
    save, told, write = checkpoint.save, RunLog.step, threading.Event()
    monkeypatch.setattr(
        RunLog, "step", lambda log, step, figures: (told(log, step, figures), step == 3 and write.set())
    )
    waited = []

    def slow(path, state):
        waited.append(path.name == "0000005.pt" or write.wait(20))
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", slow)
    result = train("--max-steps", 5, "--epochs", 50, "--ckpt-every", 2, "--log-every", 1)
    assert result.code == 0 and waited == [True] * 3, result.err
    assert [path.name for path in result.checkpoints] == ["0000002.pt", "0000004.pt", "0000005.pt"]
    assert [checkpoint.load(path)["opt"]["state"][1]["step"] for path in result.checkpoints] == [2, 4, 5]


def test_a_save_that_fails_is_told_at_the_next_step_and_earlier_checkpoints_stay(train, monkeypatch):
    save = torch.save

    def full(state, file):
        if state["step"] > 2:
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    result = train("--max-steps", 500, "--epochs", 5000, "--ckpt-every", 2, "--log-every", 1)
    assert result.code == 2 and "No space left" in result.err and result.err.count("\n") == 1
    assert [path.name for path in result.checkpoints] == ["0000002.pt"]
    assert 4 <= int(rows(result.folder)[-1]["step"]) <= 6


def test_without_memory_for_a_copy_training_waits_and_saves_the_same(train, monkeypatch):
    flags = ["--epochs", 50, "--max-steps", 4, "--ckpt-every", 2]
    beside = train(*flags, root="beside")

    def none_left(*args, **more):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(HostCopy, "take", none_left)
    waiting = train(*flags, root="waiting")
    assert waiting.code == 0 and waiting.out.count("no memory for a copy") == 2
    for one, other in zip(beside.checkpoints, waiting.checkpoints, strict=True):
        assert_same_checkpoint(one, other)


def start(data, root, *flags, until="(step="):
    """train.py in a process of its own, once it has printed a line with these words."""
    command = [sys.executable, str(REPO / "EqM/train.py"), *train_args(data, root, *flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if until in line:
            return process
    raise AssertionError(f"the run ended before it said {until}")


LONG = ["--max-steps", 100_000, "--epochs", 10**6, "--log-every", 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_exits_0(image_folder, tmp_path, number):
    process = start(image_folder, tmp_path, *LONG, "--num-workers", 1)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "as the signal asked" in out
    saved = checkpoint.load(next(tmp_path.glob("*/checkpoints/*.pt")))
    assert f"Stopping after step {saved['step']}," in out


def test_kill_9_at_random_moments_loses_no_checkpoint_and_the_same_command_goes_on(image_folder, tmp_path, train):
    """A checkpoint a step, so that most kills fall into a save. EQM_KILLS=200 kills as often as the README says."""
    flags = [*LONG, "--ckpt-every", 1, "--keep-checkpoints", 2, "--auto-resume"]
    random, reached = np.random.default_rng(), 0
    for _ in range(int(os.environ.get("EQM_KILLS", 3))):
        process = start(image_folder, tmp_path / "runs", *flags, until="Saved")
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        told = re.findall(r"Saved checkpoint (\d+)", process.communicate()[0])
        path, content = newest(tmp_path / "runs", lambda args: True)
        assert content["step"] >= max([reached + 1, *map(int, told)])
        assert path.parent.parent.name.startswith("000-")
        reached = content["step"]
    flags[1] = reached + 1
    assert train(*flags).code == 0


def test_pictures_of_any_kind_train(train, tmp_path):
    for mode, suffix in [("L", "png"), ("P", "gif"), ("CMYK", "jpg"), ("RGBA", "webp"), ("I;16", "png")]:
        folder = tmp_path / "data" / mode.replace(";", "")
        folder.mkdir(parents=True)
        Image.new(mode, (31, 17)).save(folder / f"x y.{suffix}")
    result = train(data=tmp_path / "data")
    assert result.code == 0 and "does not decode" not in result.out


@pytest.mark.parametrize("name", PRECISIONS)
def test_contact_sheets_show_the_run_learn_and_change_nothing_about_it(train, name):
    flags = [*PRECISIONS[name], "--epochs", 50, "--max-steps", 4, "--log-every", 1, "--lr", 1e-2, "--ema-decay", 0.5]
    plain = train(*flags, root="plain")
    watched = train(*flags, "--sample-every", 2, root="watched")
    assert_same_checkpoint(plain.checkpoints[-1], watched.checkpoints[-1])
    sheets = sorted((watched.folder / "samples").iterdir())
    assert [path.name for path in sheets] == ["0000002.png", "0000004.png"]
    first, second = (np.asarray(Image.open(path)) for path in sheets)
    assert first.shape == second.shape and not np.array_equal(first, second)


def test_another_c_names_the_run_is_saved_and_is_another_run(train):
    """A run of before, whose checkpoint says nothing of c, had the default one."""
    curve = ["--c-schedule", "piecewise", "--c-start", 0.7, "--c-peak", 2, "--c-scale", 8]
    flags = ["--epochs", 50, "--auto-resume", "--log-every", 1]
    first = train(*flags, *curve)
    assert first.folder.name == "000-EqM-T-4-Linear-velocity-None-c-piecewise-0.7-2-8", first.err
    args = torch.load(first.checkpoints[0], weights_only=True)["args"]
    assert [args[f"c_{name}"] for name in ("schedule", "start", "peak", "scale")] == ["piecewise", 0.7, 2, 8]
    default = train(*flags)
    assert "c_schedule piecewise -> truncated" in default.out and default.folder.name.endswith("-None")
    assert rows(default.folder)[0]["Train Loss"] != rows(first.folder)[0]["Train Loss"]

    saved = torch.load(default.checkpoints[0], weights_only=True)
    saved["args"] = {name: value for name, value in saved["args"].items() if not name.startswith("c_")}
    torch.save(saved, default.checkpoints[0])
    assert ", exactly" in train(*flags, "--max-steps", 3).out
    assert "c_scale 4.0 -> 5.0" in train(*flags, "--c-scale", 5).out


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_run_with_muon_and_decay_goes_on_exactly_and_with_another_optimizer_not_at_all(train, name):
    flags = [*PRECISIONS[name], "--epochs", 50, "--weight-decay", 0.1, "--betas", 0.8, 0.9, "--auto-resume"]
    muon = [*flags, "--optimizer", "muon", "--lr-schedule", "cosine", "--min-lr", 1e-5]
    straight = train(*muon, "--max-steps", 4, "--ckpt-every", 2, root="straight")
    assert straight.code == 0, straight.err
    end = straight.checkpoints[-1].rename(straight.folder / "end.pt")
    resumed = train(*muon, "--max-steps", 4, root="straight")
    assert ", exactly" in resumed.out and resumed.checkpoints[-1].name == "0000004.pt"
    assert_same_checkpoint(end, resumed.checkpoints[-1])
    other = train(*flags, "--max-steps", 5, root="straight")
    assert other.code == 2 and other.err.count("\n") == 1 and "of another --optimizer" in other.err
