"""Checkpoints: round trip, published formats, what is refused, what a kill leaves behind."""

import os
import pickle
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch

from EqM.engine import optimizer as optim
from EqM.models import EqM_models
from EqM.run import checkpoint
from EqM.run.errors import UserError
from helpers import REPO


def tiny(num_classes=3, seed=0):
    torch.manual_seed(seed)
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=num_classes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.requires_grad else None
    return model


def published(model, args=None):
    """What the published training code saves after one step."""
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])).square().mean().backward()
    adamw.step()
    return {
        "model": model.state_dict(),
        "ema": tiny(seed=1).state_dict(),
        "opt": adamw.state_dict(),
        "args": Namespace(model="EqM-T/4", image_size=64, num_classes=3, **(args or {})),
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_published_checkpoint_loads_with_its_namespace(tmp_path):
    path, model = tmp_path / "0000001.pt", tiny()
    saved = published(model)
    torch.save(saved, path)
    content = checkpoint.load(path)
    assert content["args"] == vars(saved["args"])
    for key in ("model", "ema"):
        target = tiny(seed=9)
        checkpoint.load_weights(target, content[key], path, content["args"])
        assert same(target.state_dict(), saved[key])
    adamw = optim.adamw(target, 3e-4)
    checkpoint.load_optimizer(adamw, content["opt"])
    assert adamw.param_groups[0]["lr"] == 3e-4 and adamw.param_groups[0]["fused"]
    moments = adamw.state[target.x_embedder.proj.weight]["exp_avg"]
    assert torch.equal(moments, saved["opt"]["state"][1]["exp_avg"])


@pytest.mark.parametrize("old_format", [False, True])
def test_a_bare_state_dict_counts_as_weights_and_ema(tmp_path, old_format):
    path = tmp_path / "model.pt"
    torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization=not old_format)
    content = checkpoint.load(path)
    assert content["args"] == {} and same(content["ema"], tiny().state_dict())


def test_what_is_saved_comes_back(tmp_path):
    path = tmp_path / "0000007.pt"
    state = {"model": tiny().state_dict(), "ema": tiny().state_dict(), "args": {"lr": 0.1}, "step": 7, "names": ["ü"]}
    checkpoint.save(path, state)
    content = checkpoint.load(path)
    assert same(content.pop("model"), state.pop("model")) and same(content.pop("ema"), state.pop("ema"))
    assert content == state
    assert os.listdir(tmp_path) == ["0000007.pt"]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def test_a_checkpoint_that_would_run_code_is_refused_by_name(tmp_path):
    path = tmp_path / "x.pt"
    for content in ({"model": Malicious()}, Malicious()):
        torch.save(content, path)
        with pytest.raises(UserError, match="refused: loading it would run .*system"):
            checkpoint.load(path)


def pickled(path):
    path.write_bytes(pickle.dumps({"a": 1}))


def cut(path):
    torch.save({"model": tiny().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:5000])


def scrambled(path):
    torch.save({"model": tiny().state_dict()}, path)
    content = bytearray(path.read_bytes())
    content[-200:] = bytes(200)
    path.write_bytes(content)


FOREIGN = {
    "empty": (lambda path: path.write_bytes(b""), "cut short or damaged|not a PyTorch checkpoint"),
    "text": (lambda path: path.write_text("hello\n"), "cut short or damaged|not a PyTorch checkpoint"),
    "two bytes": (lambda path: path.write_bytes(b"PK"), "cut short or damaged"),
    "pickle": (pickled, "has no model and no ema|holds no|cut short|not a PyTorch"),
    "cut": (cut, "cut short or damaged"),
    "scrambled": (scrambled, "cut short or damaged"),
    "list": (lambda path: torch.save([1, 2], path), "holds no state dict"),
    "no weights": (lambda path: torch.save({"epoch": 3}, path), "has no model and no ema; its keys are epoch"),
    "no ema": (lambda path: torch.save({"model": {}, "args": None}, path), "has no ema"),
    "folder": (lambda path: path.mkdir(), "is not a file"),
    "nothing": (lambda path: None, "is not a file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_and_damaged_files_are_told_in_one_line(tmp_path, kind):
    make, message = FOREIGN[kind]
    make(tmp_path / "x.pt")
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load(tmp_path / "x.pt")
    assert "\n" not in str(error.value) and "x.pt" in str(error.value)


def test_weights_that_do_not_fit_are_told_with_a_few_keys_and_what_they_were_trained_with():
    other = tiny(num_classes=5).state_dict()
    del other["pos_embed"]
    other["extra"] = torch.zeros(1)
    with pytest.raises(UserError) as error:
        checkpoint.load_weights(tiny(), other, "x.pt", {"model": "EqM-T/4", "num_classes": 5, "lr": 1})
    text = str(error.value)
    assert "extra is not in this model" in text and "pos_embed is missing" in text
    assert "y_embedder.embedding_table.weight is (6, 144) there and (4, 144) here" in text
    assert "trained with model EqM-T/4, num_classes 5." in text
    with pytest.raises(UserError, match="and [0-9]+ more"):
        checkpoint.load_weights(tiny(), {}, "x.pt", {})


def test_an_optimizer_of_other_parameters_is_refused():
    adamw = optim.adamw(tiny(), 1e-4)
    other = torch.optim.AdamW([torch.zeros(2, requires_grad=True)])
    with pytest.raises(UserError, match="optimizer was made for other parameters"):
        checkpoint.load_optimizer(adamw, other.state_dict())


def make_run(root, name, steps, seed=0, content=None):
    folder = root / name / "checkpoints"
    folder.mkdir(parents=True)
    for step in steps:
        state = {"model": {}, "ema": {}, "args": {"seed": seed}, "step": step}
        checkpoint.save(folder / f"{step:07d}.pt", state)
    return folder


def test_newest_is_the_last_good_checkpoint_of_the_last_run_of_the_same_kind(tmp_path):
    make_run(tmp_path, "000-EqM-A", [5, 90], seed=1)
    folder = make_run(tmp_path, "001-EqM-A", [10, 20, 30], seed=1)
    make_run(tmp_path, "002-EqM-A", [500], seed=2)
    make_run(tmp_path, "003-EqM-A", [], seed=1)
    (folder / "0000030.pt").write_bytes((folder / "0000030.pt").read_bytes()[:100])
    (folder / "0000040.partial").write_bytes(b"half")
    path, content = checkpoint.newest(tmp_path, lambda args: args["seed"] == 1)
    assert path == folder / "0000020.pt" and content["step"] == 20
    assert checkpoint.newest(tmp_path, lambda args: args["seed"] == 3) is None
    assert checkpoint.newest(tmp_path / "nowhere", lambda args: True) is None


def test_pruning_keeps_the_newest(tmp_path):
    folder = make_run(tmp_path, "000-EqM-A", [10, 20, 30])
    checkpoint.prune(folder, 2)
    assert sorted(path.name for path in folder.iterdir()) == ["0000020.pt", "0000030.pt"]


def test_a_disk_that_is_full_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "0000001.pt"
    checkpoint.save(path, {"model": {}, "ema": {}})
    before = path.read_bytes()

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot be written .*No space left.*earlier ones are untouched"):
        checkpoint.save(path, {"model": {}, "ema": {}, "more": 1})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["0000001.pt"]


SAVER = """
import sys, torch
from EqM.run import checkpoint
for step in range(1, 10**6):
    state = {"model": {"w": torch.full((300, 300), float(step))}, "ema": {}, "args": {}, "step": step}
    checkpoint.save(f"{sys.argv[1]}/{step % 3:07d}.pt", state)
    print(step, flush=True)
"""


def test_kill_9_at_any_moment_leaves_every_checkpoint_whole(tmp_path):
    """The same three names are written over and over, so most kills fall into a save."""
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, tmp_path], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPO)}
    )
    for _ in range(3):
        saver.stdout.readline()
    forked = 0
    for kill in range(25):
        time.sleep(0.003 + 0.002 * (kill % 7))
        saver.send_signal(signal.SIGSTOP)  # the files are what a kill now would leave, and the next kill is cheap
        for path in tmp_path.glob("*.pt"):
            content = checkpoint.load(path)
            assert (content["model"]["w"] == content["step"]).all()
            forked += 1
        saver.send_signal(signal.SIGCONT)
    saver.kill()
    saver.wait()
    assert forked == 75
    steps = sorted(checkpoint.load(path)["step"] for path in tmp_path.glob("*.pt"))
    assert steps[-1] - steps[0] <= 3
