"""Checkpoints: what is saved, how it survives a kill, and what is accepted back.

A checkpoint holds FP32 tensors whatever the precision of the run, under the published keys `model`, `ema`,
`opt`, `args`, and what an exact resume needs besides: see `Saver` in train.py. What comes back is looked at before
it is used, since a file from elsewhere may hold anything.
"""

import argparse
import math
import pickle
import re
import zlib
from pathlib import Path

import torch

from EqM.run import parts, saving
from EqM.run.errors import UserError, reason
from EqM.run.saving import save as save  # the other half of load
from EqM.run.shards import is_shard, mine, part_of

MOMENTS = ("exp_avg", "exp_avg_sq")
SHOWN = 3  # how many differing keys a message names
WRAPPERS = {"module", "_orig_mod"}  # what data parallelism, averaging and compilation put into names
MODEL_KEYS = ("model", "state_dict", "model_state_dict")
EMA_KEYS = ("ema", "ema_model", "model_ema", "ema_state_dict")
MODEL_PARTS, EMA_PARTS = ("model", "net", "network"), EMA_KEYS  # of one state dict that holds several networks


def load(path, fill=True, like=None):
    """Read a checkpoint, of ours or published, or a bare state dict, onto the CPU.

    Returns a dict with at least `model`, `ema` and `args` (a plain dict, empty for a bare state dict). Where only one
    of model and EMA is there, it stands for both, and `stand_in` names the one that is missing. Wrappers' prefixes
    and Lightning's layout are undone where that is unambiguous.
    Only tensors, plain containers and argparse.Namespace are accepted; raises UserError for a file that
    would run code, is cut short, or is something else, or whose parts are not of the kind a resume needs.

    Of a checkpoint in parts (see parts.py), fill=False leaves out the values of tensors. like: a tensor of which every
    rank holds a part; each then reads its parts alone.
    """
    content = read(path, fill, like)
    if not isinstance(content, dict) or not content:
        raise UserError(f"--ckpt {path} holds no state dict")
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        content = {"model": content}
    weights = _networks(path, content)
    for name, (fits, kind) in PARTS.items():
        if content.get(name) is not None and not fits(content[name]):
            raise UserError(f"--ckpt {path} is damaged or foreign: its {name} is not {kind}")
    args = content.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if not isinstance(args, (dict, type(None))) or not all(isinstance(name, str) for name in args or {}):
        raise UserError(f"--ckpt {path} is damaged or foreign: its args are {_brief(args)}, not names with values")
    there = {key: value for key, value in content.items() if value is not None}
    return {**there, **weights, "args": dict(args or {})}


def read(path, fill=True, like=None):
    """What was saved, of files and of checkpoints in parts, without a look at it; else as load."""
    if not parts.is_in_parts(path):
        return _read(path)
    head = _read(Path(path) / parts.HEAD)
    return parts.fill(head, path, like) if fill else head


def _read(path):
    try:
        if not Path(path).is_file():
            raise UserError(f"--ckpt {path} is not a file")
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"--ckpt {path} cannot be read: {error.strerror}") from None
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            mapped = _is_zip(file) and _is_utf8(path)
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise UserError(f"--ckpt {path} is refused: loading it would run {named[1]}") from None
        raise UserError(f"--ckpt {path} is not a PyTorch checkpoint or is damaged") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"--ckpt {path} is cut short or damaged: {reason(error)}") from None


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


def _brief(value):
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def _networks(path, content):
    """{"model", "ema"} of a checkpoint's content, as plain state dicts, and "stand_in" if one is missing."""
    found = {}
    for ours, keys in (("model", MODEL_KEYS), ("ema", EMA_KEYS)):
        there = [key for key in keys if content.get(key) is not None]
        if len(there) > 1 and there[0] != ours:
            raise UserError(f"--ckpt {path} has {' and '.join(there)}: which is the {ours}? Keep one under {ours!r}")
        if there:
            state = content[there[0]]
            if not isinstance(state, dict):
                raise UserError(f"--ckpt {path} is damaged or foreign: its {there[0]} is {_brief(state)}, no weights")
            for part, weights in _split(path, ours, state).items():
                found.setdefault(part, weights)
    weights = {ours: found[ours] for ours in ("model", "ema") if found.get(ours) or ours in content and ours in found}
    missing = [ours for ours in ("model", "ema") if ours not in weights]
    if len(missing) == 2 or missing and not any(weights.values()):
        raise UserError(
            f"--ckpt {path} has no {' and no '.join(missing)}; its keys are {', '.join(map(str, content))[:200]}"
        )
    if missing:
        (there,) = weights.values()
        weights |= {missing[0]: there, "stand_in": missing[0]}
    return weights


def _split(path, ours, state):
    """One state dict as {"model" or "ema": plain state dict}: Lightning keeps both in one, under prefixes."""
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"--ckpt {path} is damaged or foreign: {name} of its {ours} is {_brief(value)}, no tensor")
    state = _unwrapped(path, state)
    heads = {name.split(".")[0] for name in state if "." in name}
    parts = {"model": [head for head in MODEL_PARTS if head in heads], "ema": [h for h in EMA_PARTS if h in heads]}
    if not any(parts.values()):
        return {ours: state}
    split = {}
    for part, (head, *others) in ((part, heads) for part, heads in parts.items() if heads):
        if others:
            raise UserError(f"--ckpt {path} has {head} and {' and '.join(others)} in one state dict: which is it?")
        inner = head + "."
        split[part] = {name.removeprefix(inner): v for name, v in state.items() if name.startswith(inner)}
    return {ours: split["model"]} if split.keys() == {"model"} else split


def _unwrapped(path, state):
    plain = {}
    for name, value in state.items():
        words = [word for word in name.split(".") if word not in WRAPPERS]
        if name == "n_averaged":  # the counter of torch.optim.swa_utils.AveragedModel
            continue
        if ".".join(words) in plain:
            raise UserError(f"--ckpt {path} has {'.'.join(words)} twice, with and without a wrapper's prefix")
        plain[".".join(words)] = value
    return plain


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
    "world_size": (_is_whole, "a whole number"),
    "precision": (lambda value: isinstance(value, str), "a name"),
    "class_names": (_are_words, "a list of names"),
    "data": (_is_data, "a count and a digest"),
    "scaler": (_is_scaler, "what a GradScaler saves"),
    "schedule": (_are_counts("taken"), "a count of steps"),
    "guard": (_are_counts("skipped", "streak"), "counts of steps"),
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
                raise UserError(f"the checkpoint's {name} is {_brief(value)}, which is none of {', '.join(kind)}")
        elif type(value) is not kind or (kind is int and value < 1):
            words = {int: "a whole number above 0", bool: "True or False", str: "a text"}[kind]
            raise UserError(f"the checkpoint's {name} is {_brief(value)}, not {words}")


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
        fault = _fault(mine(value))
        if fault:
            raise UserError(f"--ckpt {path} cannot be used: {key} {fault}; take an earlier checkpoint")
    model.load_state_dict({key: part_of(value, ours[key]) for key, value in state.items()})


def _fault(value):
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


def newest_of(folder):
    """Path of the newest checkpoint in a run folder, or in its folder of checkpoints, or of the one in parts that the
    folder is. Raises UserError if none is.
    """
    if parts.is_in_parts(folder):
        return Path(folder)
    of_run = _in_order(Path(folder) / "checkpoints") or _in_order(folder)
    if not of_run:
        raise UserError(f"{folder} holds no checkpoint; give a run folder or a file")
    return of_run[-1]


def prune(folder, keep):
    """Remove all but the newest `keep` checkpoints of a run."""
    for path in _in_order(folder)[:-keep]:
        if path.is_dir():  # a kill in mid-removal must leave no checkpoint without its middle
            path = path.rename(path.with_suffix(".aside"))
        saving.remove(path)


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
        raise UserError("the checkpoint's optimizer was made for other parameters; start from its weights alone")
    theirs = [index for group in groups for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = [key for key in moments if key not in theirs]
    if strangers:
        raise UserError(f"the checkpoint's optimizer has a state of {_brief(strangers[0])}, which is no parameter")
    clean = {
        number: _moments_of(number, parameter, moments[index])
        for number, (index, parameter) in enumerate(zip(theirs, parameters, strict=True))
        if index in moments
    }
    optimizer.load_state_dict({"state": clean, "param_groups": ours["param_groups"]})


def _moments_of(number, parameter, state):
    """The AdamW state of one parameter, checked: step, exp_avg, exp_avg_sq."""
    of = f"of parameter {number} in the checkpoint's optimizer"
    if not isinstance(state, dict) or state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
        keys = ", ".join(map(str, state)) if isinstance(state, dict) else _brief(state)
        raise UserError(f"the state {of} is {keys[:80]}, not AdamW's step, exp_avg and exp_avg_sq")
    step = torch.as_tensor(state["step"]) if _is_number(state["step"]) else state["step"]
    if not (isinstance(step, torch.Tensor) and step.numel() == 1 and not step.is_complex()) or _fault(step.float()):
        raise UserError(f"the step {of} is no number")
    if step.item() < 0:
        raise UserError(f"the step {of} is {step.item():g}")
    for name in MOMENTS:
        value = state[name]
        held = mine(value)
        if not isinstance(value, torch.Tensor) or value.shape != parameter.shape or not _is_real(held):
            there = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else _brief(value)
            raise UserError(f"{name} {of} is {there}, not {tuple(parameter.shape)} torch.float32")
        fault = _fault(held)
        if fault or (name == "exp_avg_sq" and held.numel() and held.min() < 0):
            raise UserError(f"{name} {of} {fault or 'holds negative values'}; take an earlier checkpoint")
    # A fused kernel goes through memory, not through indices: a moment must lie there as its parameter does.
    laid_out = {
        name: state[name]
        if is_shard(state[name]) or state[name].stride() == parameter.stride()
        else torch.empty_strided(parameter.shape, parameter.stride()).copy_(state[name])
        for name in MOMENTS
    }
    return {"step": step.reshape(()).float(), **{name: part_of(v, parameter) for name, v in laid_out.items()}}
