"""Saving beside a run: the copy is the state of its moment in the same bytes, and a thread's failures are told."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from EqM.engine import optimizer as optim
from EqM.models import EqM_models
from EqM.run import checkpoint
from EqM.run.saving import Background, HostCopy
from helpers import REPO, leaves


@pytest.fixture(scope="module")
def stepping():
    """(a model, its optimizer after one step, what a checkpoint would keep of them)."""
    torch.manual_seed(0)
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=3)
    adamw = optim.adamw(model, 1e-2)
    step(model, adamw)
    adamw.param_groups[0]["lr"] = torch.tensor(1e-2)  # as a schedule keeps it
    return model, adamw, lambda: {
        "model": model.state_dict(), "opt": adamw.state_dict(), "args": {"lr": 0.1, "csv": None}, "names": ["ü"],
    }  # fmt: skip


def step(model, adamw):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    adamw.step()


def test_a_copy_is_saved_in_the_bytes_of_the_state_and_stays_while_training_goes_on(stepping, tmp_path):
    model, adamw, state = stepping
    host = HostCopy()
    for i in range(2):  # the second into the memory of the first
        checkpoint.save(tmp_path / f"direct-{i}.pt", state())
        copied = host.take(state())
        step(model, adamw)
        adamw.param_groups[0]["lr"].mul_(2)
        checkpoint.save(tmp_path / f"copied-{i}.pt", copied)
        assert (tmp_path / f"copied-{i}.pt").read_bytes() == (tmp_path / f"direct-{i}.pt").read_bytes()
    assert checkpoint.load(tmp_path / "copied-0.pt")["opt"]["param_groups"][0]["lr"] == pytest.approx(1e-2)


def test_memory_is_used_again_unless_a_tensor_changed_its_shape_or_order(stepping):
    _, _, state = stepping
    host, changing = HostCopy(), [torch.zeros(3), torch.zeros(2, 5), torch.zeros(2, 5)]
    first = {path: value for path, value in leaves(host.take([state(), changing])) if torch.is_tensor(value)}
    changing[0], changing[1] = torch.ones(4), torch.ones(5, 2).T
    second = {path: value for path, value in leaves(host.take([state(), changing])) if torch.is_tensor(value)}
    moved = [path for path, value in second.items() if value.data_ptr() != first[path].data_ptr()]
    assert len(second) > 100 and [path[-1].idx for path in moved] == [0, 1]
    assert second[moved[1]].stride() == (1, 2) and second[moved[1]].sum() == 10


def test_one_thing_is_done_at_a_time_and_waited_for():
    go, done, background = threading.Event(), [], Background()
    background.start(lambda: (go.wait(), done.append(1)))
    background.check()
    assert not done
    threading.Timer(0.1, go.set).start()
    background.start(done.append, 2)
    assert done[0] == 1
    background.wait()
    assert done == [1, 2]


@pytest.mark.parametrize("method", ["check", "wait", "start"])
def test_what_the_thread_raised_is_raised_once_by_the_next_call(method):
    background, ended = Background(), threading.Event()

    def fail():
        try:
            raise OSError(28, "No space left on device")
        finally:
            ended.set()

    background.start(fail)
    ended.wait()
    with pytest.raises(OSError, match="No space left"):
        for _ in range(1000):  # check does not wait for the thread's last steps
            getattr(background, method)(*([print] if method == "start" else []))
            threading.Event().wait(0.001)
    background.wait()


def test_what_has_begun_is_finished_however_its_run_ends():
    done, background = [], Background()
    background.start(lambda: (time.sleep(0.1), done.append(1)))
    del background  # as main's frame does when an exception ends it
    assert done == [1]
    script = """
import time
from EqM.run.saving import Background
background = Background()
background.start(lambda: (time.sleep(0.3), print("finished")))
1 / 0
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True)
    assert result.stdout == "finished\n" and "ZeroDivisionError" in result.stderr
