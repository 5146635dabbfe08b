"""Devices and ranks, as far as one process can see them."""

from types import SimpleNamespace

import pytest
import torch

from EqM.run import distributed
from EqM.run.errors import UserError


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_is_the_default():
    assert distributed.setup().device == torch.device("cuda", torch.cuda.current_device())
