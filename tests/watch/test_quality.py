"""Figures of samples while training: logged, kept with the best checkpoint, and without a trace in the run."""

import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from EqM.metrics import evaluation, features, reference
from EqM.metrics.sources import Drawn
from EqM.pipeline import EqMPipeline
from EqM.run import checkpoint, distributed
from EqM.watch import quality
from helpers import TinyNetwork, assert_same_checkpoint, train_args

RANKS = distributed.Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    networks = SimpleNamespace(inception=TinyNetwork(), motion=None, told=dict)
    monkeypatch.setattr(features, "load", lambda ranks, inception, i3d: networks)
    return networks


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "reference"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def train(run_script, image_folder, tmp_path):
    """train(*flags, root="runs"): one run; its outcome, with .folder and .rows of metrics.csv."""

    def run(*flags, root="runs"):
        result = run_script("train", *train_args(image_folder, tmp_path / root, "--epochs", 50, *flags))
        result.folder = next(iter((tmp_path / root).glob("*-EqM-*")), None)
        result.rows = []
        if result.folder and (result.folder / "metrics.csv").exists():
            with open(result.folder / "metrics.csv", newline="") as file:
                result.rows = list(csv.DictReader(file))
        return result

    return run


EVERY = ["--eval-every", 1, "--eval-samples", 12, "--eval-sampling-steps", 3]


@pytest.mark.parametrize("name", [["--use-bf16"], ["--use-amp"], []])
def test_figures_are_those_of_the_pipelines_samples_and_the_run_is_the_same(train, pictures, tiny_networks, name):
    flags = [*name, "--lr", 1e-2, "--ema-decay", 0.5, "--log-every", 1]
    watched = train(*flags, *EVERY, "--eval-reference", pictures, root="watched")
    assert watched.code == 0, watched.err
    plain = train(*flags, root="plain")
    ckpt = watched.folder / "checkpoints/0000002.pt"
    assert_same_checkpoint(ckpt, plain.folder / "checkpoints/0000002.pt")
    assert "(step=0000002) FID: " in (watched.folder / "log.txt").read_text()

    precision = {"--use-bf16": "bf16", "--use-amp": "fp16"}.get(name[0], "fp32") if name else "fp32"
    pipe = EqMPipeline.from_pretrained(ckpt, precision=precision, device="cpu")
    judge = evaluation.Evaluator(reference.open_reference(pictures, tiny_networks), tiny_networks, RANKS)
    how = {"num_sampling_steps": 3, "stepsize": quality.DISTANCE / 2, "cfg_scale": 1.0}
    expected = judge.judge(Drawn(pipe, 12, (8, 8, 3), how))
    row = watched.rows[-1]
    assert row["step"] == "2" and float(row["FID"]) == pytest.approx(expected["fid"], rel=1e-3)
    assert {"sFID", "KID", "Inception Score", "Precision", "Recall"} <= row.keys()


def test_the_best_checkpoint_stays_whatever_comes_after_it(train, pictures, monkeypatch):
    figures = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(evaluation.Evaluator, "judge", lambda self, samples, desc: {"fid": next(figures)})
    flags = [*EVERY, "--eval-reference", pictures, "--keep-best", "--keep-checkpoints", 1, "--auto-resume"]
    assert train(*flags, "--max-steps", 3, "--ckpt-every", 1).code == 0
    result = train(*flags, "--max-steps", 4)
    assert [path.name for path in sorted(result.folder.glob("checkpoints/*"))] == ["0000002.pt", "0000004.pt"]
    best = json.loads((result.folder / checkpoint.BEST).read_text())
    assert (best["checkpoint"], best["figure"], best["value"]) == ("0000002.pt", "FID", 1.0)
    assert len(re.findall("is the best so far", (result.folder / "log.txt").read_text())) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eval-every", 1], "go together"),
        (["--eval-reference", "x"], "go together"),
        (["--keep-best"], "--keep-best needs --eval-every"),
        (["--eval-every", 1, "--eval-reference", "/nowhere"], "neither a folder nor a file"),
        (["--eval-every", 1, "--eval-reference", "pictures", "--image-size", 16], "what is judged is 16"),
    ],
)
def test_what_cannot_be_judged_is_one_line_before_a_run_is_made(train, pictures, tmp_path, flags, words):
    result = train(*[pictures if flag == "pictures" else flag for flag in flags])
    assert result.code == 2 and result.err.count("\n") == 1 and words in result.err, result.err
    assert not (tmp_path / "runs").exists()
