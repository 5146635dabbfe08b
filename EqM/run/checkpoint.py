"""Checkpoints: what is saved, how it survives a kill, and what is accepted back.

A checkpoint holds FP32 tensors whatever the precision of the run, under the published keys `model`, `ema`,
`opt`, `args`, and what an exact resume needs besides: see `save` in train.py.
"""

import argparse
import os
import pickle
import re
import zlib
from pathlib import Path

import torch

from EqM.run.errors import UserError, reason

SHOWN = 3  # how many differing keys a message names


def save(path, state):
    """Write a checkpoint so that a kill at any moment leaves either the old file or the whole new one."""
    path = Path(path)
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"checkpoint {path} cannot be written ({error}); earlier ones are untouched") from None


def load(path):
    """Read a checkpoint, of ours or published, or a bare state dict, onto the CPU.

    Returns a dict with at least `model`, `ema` and `args` (a plain dict, empty for a bare state dict).
    Only tensors, plain containers and argparse.Namespace are accepted; raises UserError for a file that
    would run code, is cut short, or is something else.
    """
    if not Path(path).is_file():
        raise UserError(f"--ckpt {path} is not a file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise UserError(f"--ckpt {path} is refused: loading it would run {named[1]}") from None
        raise UserError(f"--ckpt {path} is not a PyTorch checkpoint or is damaged") from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise UserError(f"--ckpt {path} is cut short or damaged: {reason(error)}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"--ckpt {path} holds no state dict")
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        content = {"model": content, "ema": content}
    missing = [key for key in ("model", "ema") if not isinstance(content.get(key), dict)]
    if missing:
        raise UserError(f"--ckpt {path} has no {' and no '.join(missing)}; its keys are {', '.join(map(str, content))}")
    args = content.get("args") or {}
    return {**content, "args": vars(args) if isinstance(args, argparse.Namespace) else dict(args)}


def _is_zip(path):
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def load_weights(model, state, path, trained_with):
    """Load a state dict strictly; raises UserError that names the first few keys or shapes that differ.

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
    model.load_state_dict(state)


def fingerprint(state):
    """A short text that differs between state dicts whose tensors differ."""
    crc = 0
    for name, value in sorted(state.items()):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def newest(results_dir, same_run):
    """(path, content) of the newest good checkpoint of the newest run for which same_run(args), or None.

    Files that are cut short are passed over: a kill in mid-save cannot leave one, but a full disk of an
    older version could.
    """
    for run in sorted(Path(results_dir).glob("[0-9][0-9][0-9]*-*"), reverse=True):
        for path in sorted(run.glob("checkpoints/[0-9]*.pt"), reverse=True):
            try:
                content = load(path)
            except UserError:
                continue
            if same_run(content["args"]):
                return path, content
            break
    return None


def newest_of(folder):
    """Path of the newest checkpoint in a run folder, or in its folder of checkpoints. Raises UserError if none is."""
    found = sorted(path for place in ("checkpoints", ".") for path in Path(folder, place).glob("[0-9]*.pt"))
    if not found:
        raise UserError(f"{folder} holds no checkpoint; give a run folder or a file")
    return max(found, key=lambda path: path.name)


def prune(folder, keep):
    """Remove all but the newest `keep` checkpoints of a run."""
    for path in sorted(Path(folder).glob("[0-9]*.pt"))[:-keep]:
        path.unlink(missing_ok=True)


def load_optimizer(optimizer, state):
    """Load moments and step counts; the learning rate and the kernel stay this run's own."""
    ours = optimizer.state_dict()
    counts = [len(group["params"]) for group in ours["param_groups"]]
    if counts != [len(group["params"]) for group in state["param_groups"]]:
        raise UserError("the checkpoint's optimizer was made for other parameters; start from its weights alone")
    optimizer.load_state_dict({"state": state["state"], "param_groups": ours["param_groups"]})
