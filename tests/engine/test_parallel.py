"""Sharded training: the steps of data parallel, and checkpoints that any other run takes up."""

import csv
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from EqM import train
from EqM.engine import parallel
from EqM.run import checkpoint, distributed
from EqM.run.errors import UserError
from helpers import PYTHONPATH, leaves, newest, train_args


@pytest.fixture(scope="module")
def two_ranks(image_folder, tmp_path_factory):
    """(folder, each rank's (out, err)) of two_ranks.py, which asserts what only ranks can see."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    environment = {**os.environ, **place, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "two_ranks.py"
    processes = [
        subprocess.Popen(
            [sys.executable, script, folder, image_folder],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**environment, "RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    return folder, [process.communicate(timeout=200) for process in processes]


def run_of(root):
    (folder,) = root.glob("*-EqM-*")
    return folder


def assert_same(one, other):
    for (path, a), (_, b) in zip(leaves(one), leaves(other), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def test_sharded_ranks_step_as_data_parallel_ones_and_go_on_from_files_and_from_parts(two_ranks):
    for out, err in two_ranks[1]:
        assert out.endswith("all held\n"), err


def test_four_ranks_in_two_copies_step_as_data_parallel_ones_and_go_on_in_0_bits(tmp_path):
    script = Path(__file__).parent / "four_ranks.py"
    result = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_a_checkpoint_in_parts_is_the_one_file(two_ranks, run_script, tmp_path):
    folder, _ = two_ranks
    assert_same(checkpoint.read(folder / "parts.pt"), checkpoint.read(folder / "whole.pt"))
    sizes = [path.stat().st_size for path in (folder / "parts.pt").glob("*.distcp")]
    assert len(sizes) == 2 and max(sizes) < 0.65 * (folder / "whole.pt").stat().st_size
    assert not list(folder.glob("*.partial")) and not list(folder.glob("*.aside"))
    result = run_script("gather", "--ckpt", folder / "parts.pt", "--out", tmp_path / "gathered.pt")
    assert result.code == 0, result.err
    assert (tmp_path / "gathered.pt").read_bytes() == (folder / "whole.pt").read_bytes()
    for wrong in (["--ckpt", folder / "whole.pt", "--out", tmp_path / "x.pt"],
                  ["--ckpt", folder / "parts.pt", "--out", tmp_path / "gathered.pt"]):  # fmt: skip
        result = run_script("gather", *wrong)
        assert result.code == 2 and result.err.count("\n") == 1


def test_a_run_in_parts_that_was_stopped_is_the_run_in_one_file_that_was_not(two_ranks):
    folder, _ = two_ranks
    stopped, straight = run_of(folder / "stopped"), run_of(folder / "straight")
    assert ", exactly" in (stopped / "log.txt").read_text()
    assert [path.name for path in sorted((stopped / "checkpoints").iterdir())] == ["0000003.pt", "0000004.pt"]
    ours, theirs = (checkpoint.load(run / "checkpoints/0000004.pt") for run in (stopped, straight))
    for key in ("model", "ema", "opt", "scaler", "schedule", "guard"):
        assert_same(ours[key], theirs[key])
    assert [path.name for path in (stopped / "samples").iterdir()] == ["0000004.png"]


def test_a_look_at_sharded_averages_sees_them_move(two_ranks):
    """No backward pass follows a look, after which a network that stayed whole would be looked at again."""
    folder, _ = two_ranks
    curves = []
    for root in ("straight", "whole"):
        with open(run_of(folder / root) / "metrics.csv", newline="") as file:
            curves.append([float(row["EMA Val Loss"]) for row in csv.DictReader(file) if row["EMA Val Loss"]])
    assert len(curves[0]) == 4 == len(set(curves[0])) and curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_one_rank_goes_on_from_parts_and_samples_them(two_ranks, run_script, image_folder, tmp_path):
    folder, _ = two_ranks
    run = run_of(folder / "stopped")
    assert checkpoint.locate(run) == checkpoint.locate(run / "checkpoints/0000004.pt")
    assert newest(folder / "stopped", lambda args: True)[0] == run / "checkpoints/0000004.pt"
    flags = ["--epochs", 50, "--grad-accum-steps", 2, "--lr", 1e-2, "--ema-decay", 0.5, "--max-steps", 5]
    shutil.copytree(folder / "stopped", tmp_path / "runs")
    result = run_script("train", *train_args(image_folder, tmp_path / "runs", *flags, "--shard", "--ckpt", "latest"))
    assert result.code == 0 and "not exactly as without a stop: world_size 2 -> 1" in result.out, result.err
    assert "--shard has no effect: there is one rank" in result.out
    assert checkpoint.load(run_of(tmp_path / "runs") / "checkpoints/0000005.pt")["step"] == 5
    words = ["--folder", tmp_path / "s", "--num-fid-samples", 1, "--num-sampling-steps", 2, "--device", "cpu"]
    assert run_script("sample_gd", "--ckpt", run / "checkpoints/0000004.pt", *words).code == 0


def cut(folder):
    path = next(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:1000])


def description(content):
    return lambda folder: (folder / ".metadata").write_bytes(content)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


SPOILT = {
    "a part is cut": (cut, "damaged"),
    "a part is missing": (lambda folder: next(folder.glob("*.distcp")).unlink(), "damaged"),
    "no description": (lambda folder: (folder / ".metadata").unlink(), "damaged"),
    "a description that would run code": (description(pickle.dumps(Malicious())), "would run .*system"),
    "a description of something else": (description(pickle.dumps([1])), "damaged"),
    "an empty description": (description(b""), "damaged"),
    "no head": (lambda folder: (folder / "run.pt").unlink(), "holds no checkpoint"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_parts_that_are_damaged_are_told_in_one_line(two_ranks, tmp_path, kind):
    spoil, message = SPOILT[kind]
    shutil.copytree(two_ranks[0] / "parts.pt", tmp_path / "x.pt")
    spoil(tmp_path / "x.pt")
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load(tmp_path / "x.pt")
    assert "\n" not in str(error.value) and "x.pt" in str(error.value)


def test_files_and_parts_take_each_others_place(two_ranks, tmp_path):
    """As where a run goes on, with or without the flag, from before a step that it has saved."""
    shutil.copytree(two_ranks[0] / "parts.pt", tmp_path / "0000001.pt")
    (tmp_path / "0000001.partial").mkdir()  # what a kill left
    checkpoint.save(tmp_path / "0000001.pt", {"model": {}, "ema": {}, "step": 1})
    assert checkpoint.load(tmp_path / "0000001.pt")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["0000001.pt"]


@pytest.mark.parametrize(
    ("flags", "ranks", "words"),
    [
        ((False, 2, False), 4, "--shard-size 2 says how --shard splits"),
        ((True, 3, False), 4, "--shard-size 3 must be at least 2 and divide the number of ranks, 4"),
        ((True, 1, False), 4, "at least 2"),
        ((False, None, True), 4, "--split-checkpoints .* give both"),
    ],
)
def test_flags_that_cannot_split_the_ranks_are_told(flags, ranks, words):
    args = type("Args", (), dict(zip(("shard", "shard_size", "split_checkpoints"), flags, strict=True)))
    with pytest.raises(UserError, match=words):
        parallel.check_flags(args, distributed.Ranks(0, ranks, torch.device("cpu")), print)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--optimizer muon", "--optimizer muon wants whole matrices"),
        ("--ebm dot", "--shard cannot split an energy model"),
        ("--eval-every 5 --eval-reference x", "--eval-every samples on each rank alone"),
        ("--split-checkpoints --ema-std 0.1", "--ema-std keeps snapshots as whole files"),
    ],
)
def test_what_does_not_go_with_shards_is_told_of_several_ranks_and_goes_on_one(flags, words):
    given = ["--latents", "none", "--shard", *flags.split()]
    with pytest.raises(UserError, match=words):
        parallel.check_flags(train.parse_args(given), distributed.Ranks(0, 2, torch.device("cpu")), pytest.fail)
    args, told = train.parse_args(given), []
    parallel.check_flags(args, distributed.Ranks(0, 1, torch.device("cpu")), told.append)
    assert told == ["--shard has no effect: there is one rank"] and not args.shard


def test_what_does_not_go_with_shards_is_told_before_data_is_looked_for(run_script, monkeypatch):
    monkeypatch.setattr(distributed, "setup", lambda device: distributed.Ranks(0, 2, torch.device("cpu")))
    result = run_script("train", "--data-path", "/nowhere", "--shard", "--ebm", "dot")
    assert result.code == 2 and result.err.count("\n") == 1 and "--shard cannot split an energy model" in result.err
