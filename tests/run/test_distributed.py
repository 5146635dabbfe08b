"""Devices and ranks, as far as one process can see them."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from EqM import cli
from EqM.run import distributed
from EqM.run.errors import UserError
from helpers import REPO

RANK_0_OF_2 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("name", "local_rank", "taken"), [(None, None, 0), ("cuda", None, 0), (None, "3", 3), ("cuda:1", None, 1)]
)
def test_a_gpu_is_taken_with_its_number(monkeypatch, name, local_rank, taken):
    """PyTorch refuses to make a GPU current that has no number, which `cuda` has not."""

    def empty(size, device):
        device = torch.device(device)
        return SimpleNamespace(device=torch.device(device.type, device.index or 0))

    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    ranks = distributed.setup(name)
    assert ranks.device == torch.device("cuda", taken) and current == [ranks.device]


def test_a_device_that_is_not_there_is_told():
    with pytest.raises(UserError, match="--device cuda:99 cannot be used.*--device cpu"):
        distributed.setup("cuda:99")


@pytest.mark.parametrize(
    ("left_over", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but no RANK, MASTER_ADDR, MASTER_PORT: unset it"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "no MASTER_ADDR, MASTER_PORT: unset it"),
        ({**RANK_0_OF_2, "MASTER_ADDR": ""}, "no MASTER_ADDR: unset it"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two', which is no number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='', which is no number"),
        ({**RANK_0_OF_2, "RANK": "-1"}, "RANK='-1', which is no number"),
        ({"RANK": "1"}, "RANK=1, which WORLD_SIZE=1 has not: unset RANK"),
        ({**RANK_0_OF_2, "RANK": "2"}, "RANK=2, which WORLD_SIZE=2 has not"),
    ],
)
def test_ranks_without_a_launcher_are_told(monkeypatch, left_over, words):
    for name in RANK_0_OF_2:
        monkeypatch.delenv(name, raising=False)
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        distributed.setup("cpu")


def test_one_gpu_for_several_ranks_is_told(monkeypatch):
    for name, value in RANK_0_OF_2.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--device cuda:1 would put every rank on one GPU; give --device cuda,"):
        distributed.setup("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # one process on each of two nodes: its choice
    with pytest.raises(UserError, match="--device cuda:99 cannot be used"):
        distributed.setup("cuda:99")


# What NCCL 2.27 and gloo say, shortened.
NCCL = "NCCL error in: ../NCCLUtils.cpp:77, {}, NCCL version 2.27.5\n{}: This usually means.\nLast error:\n{}"
DUPLICATE = "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 31000"
IFNAME = "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find x"
READ = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer."


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (dist.DistBackendError(NCCL.format("invalid usage", "ncclInvalidUsage", DUPLICATE)), 2, f": {DUPLICATE}"),
        (RuntimeError(IFNAME), 2, ": ifa != nullptr. Unable to find x"),
        (dist.DistNetworkError("The client socket has timed out after 5ms"), 2, ": The client socket has timed out"),
        (RuntimeError(READ), 1, "because another one did"),
        (dist.DistBackendError(NCCL.format("remote", "ncclRemoteError", "read failed")), 1, "because another one did"),
    ],
)
def test_a_collective_that_fails_says_whether_it_is_this_ranks_own_fault(capfd, error, status, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    err = capfd.readouterr().err
    assert stop.value.code == status and words in err and err.count("\n") == 1, err


RANKS = """
import datetime, sys, time
import torch, torch.distributed as dist
from EqM import cli
from EqM.run import distributed
def main():
    ranks = distributed.setup("cpu")
    {joined}
    def alone():
        time.sleep(1.5)
        {alone}
    distributed.on_main(ranks, alone)
    if ranks.is_main:
        time.sleep(1.5)
    distributed.barrier()
    print("went on")
    distributed.cleanup()
cli.run(main)
"""
# Waits of the main group end by this, as NCCL's do after its limit, far below what one rank does alone.
IMPATIENT = "dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1))"


def two_ranks(tmp_path, joined="", alone=""):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(joined=joined, alone=alone))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script],
        capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_ranks_wait_for_one_longer_than_collectives_may_take(tmp_path):
    result = two_ranks(tmp_path, joined=IMPATIENT)
    assert result.stdout.count("went on") == 2, result.stderr


def test_any_exception_of_the_main_rank_stops_the_others(tmp_path):
    result = two_ranks(tmp_path, alone="raise OSError(28, 'No space left on device', 'cache')")
    told = [line for line in result.stderr.splitlines() if line.startswith("ranks.py: ")]
    assert told == ["ranks.py: error: [Errno 28] No space left on device: 'cache'"], result.stderr
    assert result.returncode != 0 and "went on" not in result.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_is_the_default():
    assert distributed.setup().device == torch.device("cuda", torch.cuda.current_device())
