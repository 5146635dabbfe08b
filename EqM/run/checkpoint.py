"""Checkpoints: what is saved, how it survives a kill, and what is accepted back.

A checkpoint holds FP32 tensors whatever the precision of the run, under the published keys `model`, `ema`,
`opt`, `args`, and what an exact resume needs besides: see engine/saver.py. What comes back is looked at before
it is used, since a file from elsewhere may hold anything.
"""

import argparse
import json
import math
import pickle
import re
import zlib
from pathlib import Path

import torch

from EqM.run import exported, parts, saving, spellings
from EqM.run.errors import UserError, reason
from EqM.run.saving import save as save  # the other half of load
from EqM.run.shards import is_shard, mine, part_of
from EqM.run.spellings import Unfit, brief

BEST = "best.json"  # of a run folder: which checkpoint has the lowest figure, by --keep-best
ADAMW, MUON = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)  # what each keeps of a parameter
SHOWN = 3  # how many differing keys a message names


def load(path, flag="--ckpt", fill=True, like=None):
    """Read a checkpoint, of ours or published, or a bare state dict, pickled or safetensors, onto the CPU.

    Returns a dict with at least `model`, `ema` and `args` (a plain dict, empty for a bare state dict). Where only one
    of model and EMA is there, it stands for both, and `stand_in` names the one that is missing. Other code's names are
    undone where that is unambiguous: see spellings.py.
    Only tensors, plain containers and argparse.Namespace are accepted; raises UserError for a file that
    would run code, is cut short, or is something else, or whose parts are not of the kind a resume needs.
    flag: which named the file, for the message.

    Of a checkpoint in parts (see parts.py), fill=False leaves out the values of tensors. like: a tensor of which every
    rank holds a part; each then reads its parts alone.
    """
    path = locate(path, flag)
    try:
        return _checked(exported.read(path) if exported.is_export(path) else _read(path, fill, like))
    except Unfit as unfit:
        raise UserError(f"{flag} {path} {unfit}") from None


def read(path, fill=True, like=None):
    """What was saved, of files and of checkpoints in parts, without a look at it; else as load."""
    try:
        return _read(path, fill, like)
    except Unfit as unfit:
        raise UserError(f"--ckpt {path} {unfit}") from None


def _read(path, fill, like):
    if not parts.is_in_parts(path):
        return _read_file(path)
    head = _read_file(Path(path) / parts.HEAD)
    return parts.fill(head, path, like) if fill else head


def _checked(content):
    if not isinstance(content, dict) or not content:
        raise Unfit("holds no state dict")
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        content = {"model": content}
    weights = spellings.networks(content)
    for name, (fits, kind) in PARTS.items():
        if content.get(name) is not None and not fits(content[name]):
            raise Unfit(f"is damaged or foreign: its {name} is not {kind}")
    args = content.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if not isinstance(args, (dict, type(None))) or not all(isinstance(name, str) for name in args or {}):
        raise Unfit(f"is damaged or foreign: its args are {brief(args)}, not names with values")
    if weights.get("stand_in") == "model" and content.get("weights") == "model":  # as export.py says of its `ema`
        weights["stand_in"] = "ema"
    there = {key: value for key, value in content.items() if value is not None}
    return {**there, **weights, "args": dict(args or {})}


def _read_file(path):
    try:
        if not Path(path).is_file():
            raise Unfit("is not a file")
        open(path, "rb").close()
    except OSError as error:
        raise Unfit(f"cannot be read: {error.strerror}") from None
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # comes with diffusers

            return load_file(path)
        with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            mapped = _is_zip(file) and _is_utf8(path)
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise Unfit(f"is refused: loading it would run {named[1]}") from None
        raise Unfit("is not a PyTorch checkpoint or is damaged") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise Unfit(f"is cut short or damaged: {reason(error)}") from None


def weights_named(saved, name, path, flag="--ckpt"):
    """State dict of a loaded checkpoint's `model`, `ema`, or one of several averages, as ema-0.999 or ema-std-0.05.

    Of a file without EMA, `ema` is its model. Raises UserError with the names there are.
    """
    known = {"ema": saved["ema"], "model": saved["model"], **averages(saved)}
    if saved.get("stand_in") == "model":
        del known["model"]
    if name not in known:
        raise UserError(f"--weights {name} is not in {flag} {path}; it has {', '.join(known)}")
    return known[name]


def true_name(saved, name):
    """Which of a loaded checkpoint's weights these are: `ema` is its model, or one of several averages."""
    if name != "ema":
        return name
    return "model" if saved.get("stand_in") == "ema" else next(iter(averages(saved)), name)


def averages(saved):
    """State dicts of a loaded checkpoint's averages by name; the first decay's is what it calls plain ema."""
    told = saved.get("weights")  # by export.py
    names = [told] if _is_average(told) else [average_name(decay) for decay in decays_of(saved["args"])[:1]]
    first = {} if saved.get("stand_in") == "ema" else dict.fromkeys(names, saved["ema"])
    return first | {name: saved[name] for name in saved if _is_average(name)}


def steps_taken(saved):
    """Steps that changed the weights of a loaded checkpoint, which FP16's skipped ones did not; None if unknown."""
    taken = saved.get("schedule", {}).get("taken", saved.get("step"))
    return None if taken is None else float(taken)


def decays_of(args):
    """The decays of --ema-decay, which args hold as a number where there is one; empty if they do not say."""
    decay = args.get("ema_decay", [])
    return [d for d in (decay if isinstance(decay, (list, tuple)) else [decay]) if _is_number(d)]


def average_name(decay=None, std=None):
    """What an average is called in a checkpoint and by --weights."""
    return f"ema-{decay}" if std is None else f"ema-std-{std}"


def _is_average(name):
    return isinstance(name, str) and name.startswith("ema-")


def _is_zip(file):
    head = file.read(2)
    file.seek(0)
    return head == b"PK"


def _is_utf8(path):
    """PyTorch maps no file whose name is anything else."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value):
    """A 0-dim tensor that counts."""
    return _is_real(value) and value.ndim == 0 and 0 <= value.item() < math.inf


def _is_real(value):
    """A tensor with FP32 values in memory of its own."""
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return plain and value.dtype == torch.float32


def _is_scaler(value):
    numbers = isinstance(value, dict) and all(map(_is_number, value.values()))
    if not numbers or not value:  # a scaler that was off has nothing to say
        return value == {}
    names = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    return (
        value.keys() == names
        and value["scale"] > 0
        and value["growth_factor"] > 1 > value["backoff_factor"] > 0
        and _is_whole(value["growth_interval"])
        and _is_whole(value["_growth_tracker"])
    )


def _are_counts(*names):
    return lambda value: isinstance(value, dict) and value.keys() == set(names) and all(map(_is_count, value.values()))


def _is_meter(value):
    if not isinstance(value, dict) or value.keys() != {"names", "ranks"}:
        return False
    names, ranks = value["names"], value["ranks"]
    named = isinstance(names, list) and isinstance(ranks, list) and _are_words(names)
    return named and all(_is_real(figures) and figures.shape == (2 * len(names),) for figures in ranks)


def _is_data(value):
    named = isinstance(value, dict) and value.keys() == {"items", "digest"}
    return named and _is_whole(value["items"]) and isinstance(value["digest"], str)


def _are_words(value):
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


# What a resume reads besides the weights: whether it is of the right kind, and that kind in words.
PARTS = {
    "step": (_is_whole, "a whole number"),
    "held_of_start": (lambda value: _is_number(value) and 0 <= value <= 1, "a share"),
    "world_size": (_is_whole, "a whole number"),
    "precision": (lambda value: isinstance(value, str), "a name"),
    "class_names": (_are_words, "a list of names"),
    "data": (_is_data, "a count and a digest"),
    "scaler": (_is_scaler, "what a GradScaler saves"),
    "schedule": (_are_counts("taken"), "a count of steps"),
    "guard": (_are_counts("skipped", "streak"), "counts of steps"),
    "averaging": (_are_counts("updates"), "a count of steps"),
    "meter": (_is_meter, "sums and counts of every rank"),
}


def check_args(args, kinds):
    """Raise UserError unless the args that a checkpoint was trained with make sense.

    kinds: by name, the values there are (a collection), or the type; an int must be at least 1. None is always right.
    """
    for name, kind in kinds.items():
        value = args.get(name)
        if value is None:
            continue
        if not isinstance(kind, type):
            if not isinstance(value, str) or value not in kind:
                raise UserError(f"the checkpoint's {name} is {brief(value)}, which is none of {', '.join(kind)}")
        elif type(value) is not kind or (kind is int and value < 1):
            words = {int: "a whole number above 0", bool: "True or False", str: "a text"}[kind]
            raise UserError(f"the checkpoint's {name} is {brief(value)}, not {words}")


def load_weights(model, state, path, trained_with):
    """Load a state dict strictly; raises UserError that names the first few keys or shapes that differ.

    Values that are not real and finite are refused too, which reads every tensor once.
    trained_with: the checkpoint's args, for the message.
    """
    ours = model.state_dict()
    complaints = [f"{key} is missing" for key in ours if key not in state]
    complaints += [f"{key} is not in this model" for key in state if key not in ours]
    for key in ours.keys() & state.keys():
        there, here = tuple(state[key].shape), tuple(ours[key].shape)
        if there != here:
            complaints.append(f"{key} is {there} there and {here} here")
    if complaints:
        shown = "; ".join(sorted(complaints)[:SHOWN])
        more = f" and {len(complaints) - SHOWN} more" if len(complaints) > SHOWN else ""
        told = {key: trained_with[key] for key in ("model", "image_size", "num_classes") if key in trained_with}
        source = f" It was trained with {', '.join(f'{k} {v}' for k, v in told.items())}." if told else ""
        raise UserError(f"--ckpt {path} does not fit this model: {shown}{more}.{source}")
    for key, value in state.items():
        wrong = fault(mine(value))
        if wrong:
            raise UserError(f"--ckpt {path} cannot be used: {key} {wrong}; take an earlier checkpoint")
    model.load_state_dict({key: part_of(value, ours[key]) for key, value in state.items()})


def fault(value):
    """What is wrong with a tensor that should hold real, finite numbers, as words; None if nothing is."""
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return "is no plain tensor"
    if not value.is_floating_point():
        return f"holds {str(value.dtype).removeprefix('torch.')} values, not floating-point ones"
    if value.numel():
        wide = value.detach() if value.element_size() >= 2 else value.detach().float()
        low, high = (end.item() for end in torch.aminmax(wide))  # in one pass, without a copy
        if not (math.isfinite(low) and math.isfinite(high)):
            return "holds NaN" if math.isnan(low) else "holds infinite values"
    return None


def fingerprint(state):
    """A short text that differs between state dicts whose tensors differ."""
    crc = 0
    for name, value in sorted(state.items()):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def found(results_dir, refused=None):
    """(path, content) of the newest good checkpoint of each run, newest run first.

    Files that are cut short are passed over: a kill in mid-save cannot leave one, but a full disk of an
    older version could. refused: a list to which the reason of each is added.
    """
    runs = [run for run in Path(results_dir).glob("[0-9]*-*") if run.name.split("-")[0].isdecimal()]
    for run in sorted(runs, key=lambda run: (int(run.name.split("-")[0]), run.name), reverse=True):
        for path in reversed(_in_order(run / "checkpoints")):
            try:
                content = load(path, fill=False)
            except UserError as error:
                if refused is not None:
                    refused.append(str(error))
                continue
            yield path, content
            break


def _in_order(folder):
    """A run's checkpoints by step; by name, 10,000,000 would come before 9,999,999."""
    return sorted(
        (path for path in Path(folder).glob("*.pt") if path.stem.isdecimal()), key=lambda path: int(path.stem)
    )


def locate(path, flag="--ckpt"):
    """Where the checkpoint is that a path names: a file, parts, the newest of a run, an export here or of the hub.

    flag: which named it, for the message. Raises UserError if a folder holds none, or the hub does not have it.
    """
    return all_of(path, flag)[-1]


def all_of(path, flag="--ckpt"):
    """All that a path names, as locate finds them: those of a run folder, or of its folder of checkpoints, by step."""
    path = exported.fetched(path)
    if not Path(path).is_dir() or parts.is_in_parts(path) or exported.is_export(path):
        return [Path(path)]
    of_run = _in_order(Path(path) / "checkpoints") or _in_order(path)
    if not of_run:
        raise UserError(f"{flag} {path} holds no checkpoint; give a run folder, an export or a file")
    return of_run


def prune(folder, keep):
    """Remove all but the newest `keep` checkpoints of a run, and the best where one is known."""
    spared = best(Path(folder).parent)
    for path in _in_order(folder)[:-keep]:
        if spared and path.name == spared["checkpoint"]:
            continue
        if path.is_dir():  # a kill in mid-removal must leave no checkpoint without its middle
            path = path.rename(path.with_suffix(".aside"))
        saving.remove(path)


def sweep(folder):
    """Remove what kills in the middle of a save or a removal left of checkpoints. For who has the run's lock."""
    for kind in ("*.partial", "*.aside"):
        for path in Path(folder).glob(kind):
            saving.remove(path)


def best(run):
    """{"checkpoint", "figure", "value", "step"} of a run's best checkpoint; None if none is known, or it is gone."""
    try:
        note = json.loads((Path(run) / BEST).read_text(encoding="utf-8"))
        there = (Path(run) / "checkpoints" / note["checkpoint"]).exists()
        return note if there and isinstance(note["figure"], str) and note["value"] == float(note["value"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_optimizer(optimizer, state):
    """Load moments and step counts; the learning rate and the kernel stay this run's own.

    Every tensor must fit its parameter, since a fused kernel reads past the end of one that does not. Raises UserError.
    """
    groups = state.get("param_groups") if isinstance(state, dict) else None
    moments = state.get("state") if isinstance(state, dict) else None
    listed = isinstance(groups, list) and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
    if not listed or not isinstance(moments, dict):
        raise UserError("the checkpoint's optimizer is damaged or foreign: it has no state and param_groups")
    ours = optimizer.state_dict()
    counts = [len(group["params"]) for group in ours["param_groups"]]
    if counts != [len(group["params"]) for group in groups]:
        raise UserError(
            "the checkpoint's optimizer was made for other parameters, or is of another --optimizer; give that one, or "
            "start from its weights alone"
        )
    theirs = [index for group in groups for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = [key for key in moments if key not in theirs]
    if strangers:
        raise UserError(f"the checkpoint's optimizer has a state of {brief(strangers[0])}, which is no parameter")
    kinds = [MUON if group.get("muon") else ADAMW for group in optimizer.param_groups for _ in group["params"]]
    clean = {
        number: _moments_of(number, parameter, moments[index], kind)
        for number, (index, parameter, kind) in enumerate(zip(theirs, parameters, kinds, strict=True))
        if index in moments
    }
    optimizer.load_state_dict({"state": clean, "param_groups": ours["param_groups"]})


def _moments_of(number, parameter, state, kind):
    """The state of one parameter, checked. kind: ADAMW or MUON, what it consists of."""
    of = f"of parameter {number} in the checkpoint's optimizer"
    if not isinstance(state, dict) or state.keys() != set(kind):
        keys = ", ".join(map(str, state)) if isinstance(state, dict) else brief(state)
        whose = "Muon" if kind is MUON else "AdamW"
        raise UserError(f"the state {of} is {keys[:80]}, not {whose}'s {', '.join(kind)}")
    moments = [name for name in kind if name != "step"]
    clean = {"step": _step_of(of, state["step"])} if "step" in kind else {}
    for name in moments:
        value = state[name]
        held = mine(value)
        if not isinstance(value, torch.Tensor) or value.shape != parameter.shape or not _is_real(held):
            there = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else brief(value)
            raise UserError(f"{name} {of} is {there}, not {tuple(parameter.shape)} torch.float32")
        wrong = fault(held)
        if wrong or (name == "exp_avg_sq" and held.numel() and held.min() < 0):
            raise UserError(f"{name} {of} {wrong or 'holds negative values'}; take an earlier checkpoint")
    # A fused kernel goes through memory, not through indices: a moment must lie there as its parameter does.
    laid_out = {
        name: state[name]
        if is_shard(state[name]) or state[name].stride() == parameter.stride()
        else torch.empty_strided(parameter.shape, parameter.stride()).copy_(state[name])
        for name in moments
    }
    return {**clean, **{name: part_of(value, parameter) for name, value in laid_out.items()}}


def _step_of(of, step):
    """An AdamW state's step as an FP32 tensor, 0-dim. of: whose, in words."""
    step = torch.as_tensor(step) if _is_number(step) else step
    if not (isinstance(step, torch.Tensor) and step.numel() == 1 and not step.is_complex()) or fault(step.float()):
        raise UserError(f"the step {of} is no number")
    if step.item() < 0:
        raise UserError(f"the step {of} is {step.item():g}")
    return step.reshape(()).float()
