"""Checkpoints: round trip, published formats, what is refused, what a kill leaves behind."""

import copy
import json
import os
import pickle
import resource
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
from helpers import REPO, newest


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
    "folder": (lambda path: path.mkdir(), "is not a file|holds no checkpoint"),
    "nothing": (lambda path: None, "is not a file|holds no checkpoint"),
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


def test_a_name_with_the_end_of_a_line_stays_in_one_line():
    with pytest.raises(UserError, match=r"blocks\\n0 is not in this model") as error:
        checkpoint.load_weights(tiny(), {**tiny().state_dict(), "blocks\n0": torch.zeros(1)}, "x.pt", {})
    assert "\n" not in str(error.value)


def test_an_optimizer_of_other_parameters_is_refused():
    adamw = optim.adamw(tiny(), 1e-4)
    other = torch.optim.AdamW([torch.zeros(2, requires_grad=True)])
    with pytest.raises(UserError, match="optimizer was made for other parameters"):
        checkpoint.load_optimizer(adamw, other.state_dict())


def first_moments(opt):
    return opt["state"][1]


ODD_OPTIMIZERS = {
    "a moment of another shape": (
        lambda opt: first_moments(opt).update(exp_avg=torch.zeros(3)),
        r"is \(3,\)",
    ),
    "a moment of one value": (lambda opt: first_moments(opt).update(exp_avg_sq=torch.zeros(())), r"is \(\) "),
    "a moment of integers": (lambda opt: as_dtype(opt, torch.int64), "int64, not"),
    "a complex moment": (lambda opt: as_dtype(opt, torch.complex64), "complex64, not"),
    "a moment in 16 bits": (lambda opt: as_dtype(opt, torch.bfloat16), "bfloat16, not"),
    "a moment that is a number": (lambda opt: first_moments(opt).update(exp_avg=1.0), "is 1.0, not"),
    "a moment with NaN": (lambda opt: first_moments(opt)["exp_avg"].view(-1)[7].fill_(torch.nan), "holds NaN"),
    "a negative square": (lambda opt: first_moments(opt)["exp_avg_sq"].view(-1)[7].fill_(-1), "negative"),
    "no square": (lambda opt: first_moments(opt).pop("exp_avg_sq"), "is step, exp_avg, not AdamW's"),
    "another optimizer's": (lambda opt: first_moments(opt).update(max_exp_avg_sq=torch.zeros(3)), "not AdamW's"),
    "a state that is a list": (lambda opt: opt["state"].update({1: [1, 2]}), "not AdamW's"),
    "a step of many values": (lambda opt: first_moments(opt).update(step=torch.zeros(3)), "step .* is no number"),
    "a step that is a text": (lambda opt: first_moments(opt).update(step="five"), "step .* is no number"),
    "a step before the first": (lambda opt: first_moments(opt).update(step=torch.tensor(-5.0)), "is -5"),
    "a state of no parameter": (lambda opt: opt["state"].update({999: {}}), "999, which is no parameter"),
    "states in a list": (lambda opt: opt.update(state=[]), "no state and param_groups"),
    "no groups": (lambda opt: opt.pop("param_groups"), "no state and param_groups"),
    "groups that are numbers": (lambda opt: opt.update(param_groups=[1]), "no state and param_groups"),
    "groups without parameters": (lambda opt: opt.update(param_groups=[{}]), "no state and param_groups"),
}


def as_dtype(opt, dtype):
    first_moments(opt)["exp_avg"] = first_moments(opt)["exp_avg"].to(dtype)


@pytest.mark.parametrize("kind", ODD_OPTIMIZERS)
def test_an_optimizer_that_does_not_fit_is_told_and_never_reaches_the_kernel(kind):
    """A fused kernel reads past the end of a moment that is too short: exit 139."""
    spoil, message = ODD_OPTIMIZERS[kind]
    opt = published(tiny())["opt"]
    spoil(opt)
    adamw = optim.adamw(tiny(), 1e-4)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load_optimizer(adamw, opt)
    assert "\n" not in str(error.value) and not adamw.state


@pytest.mark.parametrize("opt", ["adam", [1], {}, {"state": {}}])
def test_an_optimizer_that_is_none_is_told(opt):
    with pytest.raises(UserError, match="no state and param_groups"):
        checkpoint.load_optimizer(optim.adamw(tiny(), 1e-4), opt)


def test_moments_that_lie_in_memory_another_way_make_the_same_step():
    """A fused kernel goes through memory: a transposed moment would meet other weights."""
    saved, models = published(tiny()), [tiny(), tiny()]
    twisted = {"state": {k: dict(v) for k, v in saved["opt"]["state"].items()}}
    for state in twisted["state"].values():
        state["exp_avg"] = state["exp_avg"].T.contiguous().T if state["exp_avg"].ndim == 2 else state["exp_avg"]
        state["step"] = state["step"].item()  # as PyTorch before 1.12 kept it
    for model, opt in zip(models, [saved["opt"], {**saved["opt"], **twisted}], strict=True):
        adamw = optim.adamw(model, 1e-2)
        checkpoint.load_optimizer(adamw, copy.deepcopy(opt))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        adamw.step()
    assert same(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.nan, "holds NaN"), (-torch.inf, "holds infinite"), (torch.int32, "int32"), (torch.complex64, "complex64")],
)
def test_weights_that_are_not_real_and_finite_are_refused_by_name(value, message):
    state, model = tiny().state_dict(), tiny(seed=9)
    key = "blocks.1.mlp.fc2.weight"
    if isinstance(value, torch.dtype):
        state[key] = state[key].to(value)
    else:
        state[key][3, 5] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=f"{key} .*{message}"):
        checkpoint.load_weights(model, state, "x.pt", {})
    assert same(model.state_dict(), before)


def test_weights_in_sixteen_bits_load():
    half = {name: tensor.bfloat16() for name, tensor in tiny().state_dict().items()}
    model = tiny(seed=9)
    checkpoint.load_weights(model, half, "x.pt", {})
    assert same(model.state_dict(), {name: tensor.float() for name, tensor in half.items()})


ODD_PARTS = {
    "args": ["EqM-T/4", [1], 5, {1: 2}],
    "model": [5, [torch.zeros(1)], {"w": 5}, {1: torch.zeros(1)}],
    "ema": ["x", {"w": None}],
    "step": [-1, 1.5, "3", True, torch.tensor(3)],
    "class_names": ["cat", [1], {"cat": 0}],
    "precision": [5],
    "world_size": ["two"],
    "data": ["d", {}, {"items": "5", "digest": ""}],
    "scaler": [5, {"scale": 1.0}, {"scale": "big"}, [1]],
    "schedule": [5, {}, {"taken": 3}, {"taken": torch.zeros(2)}, {"taken": torch.tensor(torch.nan)}],
    "guard": [[], {"skipped": torch.zeros(())}, {"skipped": torch.zeros(()), "streak": torch.tensor(1j)}],
    "meter": [5, {"names": ["loss"], "ranks": [torch.zeros(5)]}, {"names": 1, "ranks": []}, {"names": ["loss"]}],
}


@pytest.mark.parametrize("name", ODD_PARTS)
def test_parts_of_the_wrong_kind_are_told_by_name(tmp_path, name):
    good = {"model": tiny().state_dict(), "ema": tiny().state_dict(), "args": {}}
    for value in ODD_PARTS[name]:
        torch.save({**good, name: value}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"x.pt is damaged or foreign: .*{name}") as error:
            checkpoint.load(tmp_path / "x.pt")
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_scale_that_could_not_be_a_scale_is_refused(tmp_path):
    good = torch.amp.GradScaler("cpu").state_dict()
    for odd in ({"scale": 0.0}, {"scale": torch.nan}, {"growth_factor": 0.5}, {"growth_interval": 1.5}):
        torch.save({"model": {}, "ema": {}, "scaler": {**good, **odd}}, tmp_path / "x.pt")
        with pytest.raises(UserError, match="its scaler is not what a GradScaler saves"):
            checkpoint.load(tmp_path / "x.pt")
    for fine in ({}, good):
        torch.save({"model": {}, "ema": {}, "scaler": fine}, tmp_path / "x.pt")
        assert checkpoint.load(tmp_path / "x.pt")["scaler"] == fine


KINDS = {"model": ["EqM-T/4"], "image_size": int, "uncond": bool, "vae": str}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": "EqM-Q/3"}, "model is 'EqM-Q/3', which is none of EqM-T/4"),
        ({"model": ["EqM-T/4"]}, "which is none of"),
        ({"image_size": "64"}, "image_size is '64', not a whole number above 0"),
        ({"image_size": 0}, "not a whole number above 0"),
        ({"image_size": True}, "not a whole number above 0"),
        ({"uncond": 1}, "not True or False"),
        ({"vae": 3.5}, "not a text"),
    ],
)
def test_args_without_sense_are_told_by_name(args, message):
    checkpoint.check_args({"model": "EqM-T/4", "image_size": 8, "uncond": None, "lr": "whatever"}, KINDS)
    with pytest.raises(UserError, match=message):
        checkpoint.check_args(args, KINDS)


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def layouts():
    """By name: a file of other code, and which of model and EMA it holds."""
    model, ema = tiny(seed=1).state_dict(), tiny(seed=2).state_dict()
    inner = {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in model.items()}
    return {
        "DDP": ({"model": under("module.", model), "ema": ema}, model, ema),
        "compiled": ({"model": under("_orig_mod.", model), "ema": under("_orig_mod.", ema)}, model, ema),
        "both": ({"model": under("module._orig_mod.", model), "ema": ema}, model, ema),
        "compiled blocks, bare": (inner, model, model),
        "EMA alone": ({"ema": ema}, ema, ema),
        "no EMA": ({"model": model, "ema": None}, model, model),
        "state_dict": ({"state_dict": model, "epoch": 3.5}, model, model),
        "ema_model": ({"model_state_dict": model, "ema_model": ema}, model, ema),
        "averaged": ({"model": model, "ema": {"n_averaged": torch.tensor(5), **under("module.", ema)}}, model, ema),
        "timm": ({"state_dict": model, "state_dict_ema": ema}, model, ema),
        "ema_pytorch": (
            {"ema": {
                **under("online_model.", model), **under("ema_model.", ema), "initted": torch.tensor(True),
                "step": torch.tensor(7),
            }},
            model, ema,
        ),
        "Lightning": (
            {"state_dict": {**under("model.", model), **under("ema.", ema)}, "pytorch-lightning_version": "2.4"},
            model, ema,
        ),
        "Lightning, compiled, with more": (
            {"state_dict": {**under("model._orig_mod.", model), "vae.w": torch.zeros(1)}, "epoch": 1}, model, model,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", layouts())
def test_layouts_of_other_code_load_where_they_are_unambiguous(tmp_path, name):
    content, model, ema = layouts()[name]
    torch.save(content, tmp_path / "x.pt")
    loaded = checkpoint.load(tmp_path / "x.pt")
    assert same(loaded["model"], model) and same(loaded["ema"], ema)
    assert ("stand_in" in loaded) == (model is ema)


def test_layouts_that_are_ambiguous_are_told_with_what_was_found(tmp_path):
    state = tiny().state_dict()
    for content, message in [
        ({"state_dict": state, "model_state_dict": state}, "has state_dict and model_state_dict: which is the model"),
        ({"state_dict": {**under("model.", state), **under("net.", state)}}, "has model and net in one state dict"),
        ({"model": {**state, **under("module.", state)}, "ema": state}, "twice, with and without a wrapper's prefix"),
        ({"generator": state, "epoch": 1}, "no model and no ema; its keys are generator, epoch"),
    ]:
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=message):
            checkpoint.load(tmp_path / "x.pt")


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
    path, content = newest(tmp_path, lambda args: args["seed"] == 1)
    assert path == folder / "0000020.pt" and content["step"] == 20
    assert newest(tmp_path, lambda args: args["seed"] == 3) is None
    assert newest(tmp_path / "nowhere", lambda args: True) is None


def test_numbers_are_compared_as_numbers(tmp_path):
    """Run 1000 is newer than 999, and step 10,000,000 than 9,999,999."""
    make_run(tmp_path, "999-EqM-A", [1])
    folder = make_run(tmp_path, "1000-EqM-A", [9_999_999, 10_000_000])
    path, content = newest(tmp_path, lambda args: True)
    assert path.parent == folder and content["step"] == 10_000_000
    checkpoint.prune(folder, 1)
    assert [path.stem for path in folder.iterdir()] == ["10000000"]


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


def test_a_write_that_fails_tells_the_systems_reason_and_not_where_pytorch_stood(tmp_path):
    """The zip writer turns a full disk into "enforce fail at inline_container.cc"; a limit on files is as good."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(UserError, match=r"cannot be written \(File too large\); earlier ones are untouched"):
            checkpoint.save(tmp_path / "0000001.pt", {"model": {"w": torch.zeros(10**6)}, "ema": {}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems want names in UTF-8")
def test_names_that_are_not_utf_8_can_be_told(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    checkpoint.save(folder / "0000001.pt", {"model": {}, "ema": {}})
    assert checkpoint.load(folder / "0000001.pt")["args"] == {}
    (folder / "0000002.pt").write_text("no checkpoint")
    with pytest.raises(UserError, match="not a PyTorch checkpoint|cut short"):
        checkpoint.load(folder / "0000002.pt")


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


def test_what_kills_left_is_swept_and_a_best_that_is_gone_is_none(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "0000003.aside").mkdir(parents=True)
    for name in ("0000001.pt", "0000002.pt", "0000004.partial"):
        (folder / name).write_bytes(b"x")
    checkpoint.sweep(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["0000001.pt", "0000002.pt"]
    note = {"checkpoint": "0000001.pt", "figure": "FID", "value": 2.5, "step": 1}
    (tmp_path / checkpoint.BEST).write_text(json.dumps(note))
    assert checkpoint.best(tmp_path) == note
    checkpoint.prune(folder, 1)
    assert len(list(folder.iterdir())) == 2, "the best is spared"
    (folder / "0000001.pt").unlink()
    assert checkpoint.best(tmp_path) is None
    (tmp_path / checkpoint.BEST).write_text("[]")
    assert checkpoint.best(tmp_path) is None
