"""What of a checkpoint fits a network that it was not trained for, as the start of a new run.

Letters: D hidden size, C channels, L tokens; t h w are the token grid, pt p p the patch, k is 2 where the network
predicts a second half that is dropped (`learn_sigma`), else 1. Images count as clips whose patches are one frame.
"""

import math

import torch

from EqM.models import sincos_grid
from EqM.run import checkpoint
from EqM.run.errors import UserError, printable

POSITIONS = ("repeat", "new")
FIRST, LAST = "x_embedder.proj", "final_layer.linear"
CLASSES = "y_embedder.embedding_table.weight"
SHOWN = 3  # names in a line
WORDS = ("taken", "changed", "left", "unused")  # of the table


def load(path, model, rebuild, class_names=None, weights="ema", positions=None):
    """(state, table): a whole state dict for a model, and lines that say what of a file is in it.

    path: a checkpoint of any spelling that checkpoint.load knows, or a run folder, of which the newest counts.
    model: only its shapes are read. rebuild: returns a state dict of the model as it starts without a checkpoint.
    class_names: what the run's labels mean, in order. weights: as checkpoint.weights_named. positions: see `fit`.
    Raises UserError if the file cannot be read or nothing of it fits.
    """
    file = checkpoint.locate(path, "--init-from")
    saved = checkpoint.load(file, "--init-from")
    state = checkpoint.weights_named(saved, weights, file, "--init-from")
    for name, value in state.items():
        wrong = checkpoint.fault(value)
        if wrong:
            raise UserError(f"--init-from {file} cannot be used: {name} {wrong}; take an earlier checkpoint")
    fitted, table = fit(model, state, saved, rebuild, class_names, positions, file)
    which = "the only weights there" if weights == saved.get("stand_in") else f"its {weights}"
    return fitted, [f"Starting from {file}, {which}:", *table]


def fit(model, theirs, saved, rebuild, class_names=None, positions=None, path="the checkpoint"):
    """(state, table) as `load`. theirs: the checkpoint's state dict; saved: what else it holds, args and class_names.

    positions: of clips, "repeat", an image's for every frame, so that a still clip gives each frame the image's field,
    or "new", where frames differ. Left out: repeat where the checkpoint is of images, else new.
    """
    ours = model.state_dict()
    _check_width(theirs, ours, path)
    plain = [name for name in ours if not name.startswith((FIRST, LAST, CLASSES, "pos_embed"))]
    state = {name: theirs[name] for name in plain if name in theirs and theirs[name].shape == ours[name].shape}
    if not any(name.startswith("blocks.") for name in state):
        raise UserError(f"--init-from {path}: no block of it fits this model; its tensors are {_few(theirs)}")
    absent = [name for name in plain if name not in state]
    rows = [("left", f"{_few(_tops(absent))}: not there or of another shape; as at any start")] if absent else []
    for part in (
        _first_layer(theirs, ours),
        _last_layer(theirs, ours, model.learn_sigma),
        _classes(theirs, ours, saved, class_names),
        _positions(model, theirs, saved, positions),
    ):
        state |= part.state
        absent += part.told and part.state.keys()  # not as they are
        rows += [("changed" if part.state else "left", line) for line in part.told]
    unused = [name for name in theirs if name not in ours]
    rows += [("unused", f"{_few(_tops(unused))}: no such part here")] if unused else []
    same = [name for name in ours if name in state and name not in absent]
    rows.insert(0, ("taken", f"{len(same)} of {len(ours)} tensors as they are: {_few(_tops(same))}"))
    if len(state) < len(ours):
        state = rebuild() | state
    whole = {name: state[name].detach().float().contiguous() for name in ours}
    return whole, [f"  {word:<8} {printable(line)}" for word, line in sorted(rows, key=lambda row: WORDS.index(row[0]))]


class _Part:
    """state: by our names, what takes the place of our tensors; empty if these are left. told: lines that say so."""

    def __init__(self, state, *told):
        self.state = state
        self.told = [line for line in told if line]


def _check_width(theirs, ours, path):
    """A width, unlike all else, is in every tensor."""
    width = ours["pos_embed"].shape[-1]
    there = theirs.get(CLASSES, theirs.get("pos_embed"))
    if there is not None and there.ndim > 1 and there.shape[-1] != width:
        raise UserError(
            f"--init-from {path}: nothing of it fits: it is {there.shape[-1]} wide and this model {width}; "
            f"choose the --model of its size"
        )


def _as_clip(weight):
    """A first layer's weight as (D, C, pt, p, p), of images too."""
    return weight.unsqueeze(2) if weight.ndim == 4 else weight


def _of_channels(x, axis, count):
    """x with its first `count` entries along an axis; with zeros behind where it has fewer."""
    x = x.narrow(axis, 0, min(count, x.shape[axis]))
    if x.shape[axis] == count:
        return x
    shape = list(x.shape)
    shape[axis] = count - x.shape[axis]
    return torch.cat([x, x.new_zeros(shape)], axis)


def _geometry(state):
    """(C, pt, p) of a state dict, or None if its first layer is none of ours."""
    weight, bias = state.get(f"{FIRST}.weight"), state.get(f"{FIRST}.bias")
    if weight is None or bias is None or weight.ndim not in (4, 5) or bias.shape != weight.shape[:1]:
        return None
    _, channels, frames, height, width = _as_clip(weight).shape
    return (channels, frames, height) if height == width else None


def _what_differs(theirs, ours):
    """Words for how channels and frames of a patch differ, and for why first and last layer cannot be taken."""
    there, here = _geometry(theirs), _geometry(ours)
    if there is None or len(theirs[f"{FIRST}.bias"]) != len(ours[f"{FIRST}.bias"]):
        return "", "not there, or of another kind"
    if there[2] != here[2]:
        return "", f"patches of {there[2]} x {there[2]} there, {here[2]} x {here[2]} here"
    words = [f"{there[0]} -> {here[0]} channels"] if there[0] != here[0] else []
    kinds = [{4: "images", 5: "clips"}[state[f"{FIRST}.weight"].ndim] for state in (theirs, ours)]
    if there[1] != here[1] or kinds[0] != kinds[1]:
        words.append(f"{kinds[0]} -> {kinds[1]}, {there[1]} -> {here[1]} frames of a patch")
    return ", ".join(words), ""


def _first_layer(theirs, ours):
    """A patch of equal frames gives the token it gave; channels that are new count for nothing at first."""
    how, obstacle = _what_differs(theirs, ours)
    shape = ours[f"{FIRST}.weight"].shape
    if obstacle:
        return _Part({}, f"{FIRST}: {obstacle}; as at any start")
    weight = _as_clip(theirs[f"{FIRST}.weight"])
    channels, frames, _ = _geometry(ours)
    if weight.shape[2] != frames:
        weight = (weight.float().sum(2, keepdim=True) / frames).expand(-1, -1, frames, -1, -1)
    weight = _of_channels(weight, 1, channels).reshape(shape)
    return _Part(
        {f"{FIRST}.weight": weight, f"{FIRST}.bias": theirs[f"{FIRST}.bias"]}, how and f"{FIRST}, first layer: {how}"
    )


def _last_layer(theirs, ours, learn_sigma):
    """Every frame of a patch gets the field of the image, or of the patch's mean frame; new channels get zero."""
    how, obstacle = _what_differs(theirs, ours)
    weight, bias = (theirs.get(f"{LAST}.{name}") for name in ("weight", "bias"))
    whole = weight is not None and bias is not None and weight.shape == (*bias.shape, ours[f"{LAST}.weight"].shape[1])
    if obstacle or not whole:
        return _Part({}, f"{LAST}: {obstacle or 'not there, or of another kind'}; as at any start")
    (C, pt, p), (channels, frames, _) = _geometry(theirs), _geometry(ours)
    k, rest = divmod(len(weight), pt * p * p * C)
    if rest or k not in (1, 2):
        return _Part({}, f"{LAST}: {len(weight)} values of a patch there; as at any start")
    state = {}
    for name, x in (("weight", weight), ("bias", bias)):
        x = x.reshape(pt, p, p, k, C, -1)  # the token's layout; the last axis is D, of the bias 1
        if pt != frames:
            x = x.float().mean(0, keepdim=True).expand(frames, -1, -1, -1, -1, -1)
        x = _of_channels(_of_channels(x, 4, channels), 3, 2 if learn_sigma else 1)
        state[f"{LAST}.{name}"] = x.reshape(ours[f"{LAST}.{name}"].shape)
    if k != (2 if learn_sigma else 1):
        how += f"{', ' if how else ''}{k} -> {3 - k} outputs a channel"
    return _Part(state, how and f"{LAST}, last layer: {how}")


def _classes(theirs, ours, saved, class_names):
    """Rows go by class name where both know names, by number where neither does and the counts agree."""
    table, count = theirs.get(CLASSES), len(ours[CLASSES]) - 1
    if table is None or table.ndim != 2 or len(table) < 2:
        return _Part({}, "classes: not there, as at any start")
    old, null = table[:-1].float(), table[-1:].float()
    names = saved.get("class_names")
    if names is None or class_names is None:
        if len(old) == count:
            return _Part({CLASSES: table})
        row_of = {}
    elif (names, len(old)) == (class_names, count):
        return _Part({CLASSES: table})
    else:
        row_of = {name: row for row, name in enumerate(names[: len(old)])}
    wanted = [row_of.get(name) for name in class_names or []][:count]
    wanted += [None] * (count - len(wanted))
    mean = old.mean(0)
    rows = torch.stack([mean if row is None else old[row] for row in wanted])
    new = [name for name in class_names or [] if name not in row_of]
    known = count - wanted.count(None)
    told = [f"{known} of {count} rows by name"] if known else []
    if known < count:
        which = f" ({_few(new)})" if row_of and new else ""
        told.append(f"{count - known}{which} the mean of the {len(old)} old ones")
    return _Part({CLASSES: torch.cat([rows, null])}, f"classes: {', '.join(told)}; the null row kept")


def _grid(theirs, saved):
    """Token grid (t, h, w) of a checkpoint, or None where it cannot be told. Frames are square."""
    length, (_, pt, _) = theirs["pos_embed"].shape[1], _geometry(theirs)
    frames = 1
    if theirs[f"{FIRST}.weight"].ndim == 5:
        clip_len = saved.get("args", {}).get("clip_len")
        if type(clip_len) is not int or clip_len < pt or length % (clip_len // pt):
            return None
        frames = clip_len // pt
    side = math.isqrt(length // frames)
    return (frames, side, side) if frames * side * side == length else None


def _positions(model, theirs, saved, wanted):
    """They are frozen: the checkpoint's where the grid is the same, else computed."""
    ours, there, width = model.pos_embed, theirs.get("pos_embed"), model.pos_embed.shape[-1]
    grid = (1, *model.grid)[-3:]
    usable = there is not None and there.shape[::2] == (1, width) and _geometry(theirs) is not None
    grid_there = _grid(theirs, saved) if usable else None
    from_images = usable and theirs[f"{FIRST}.weight"].ndim == 4
    if len(model.grid) == 3 and (wanted or ("repeat" if from_images else "new")) == "repeat":
        same_frame = from_images and grid_there is not None and grid_there[1:] == grid[1:]
        frame = there if same_frame else sincos_grid(width, grid[1:])
        source = "the image's" if same_frame else f"those of {grid[1]} x {grid[2]} tokens"
        return _Part({"pos_embed": frame.repeat(1, grid[0], 1)}, f"positions: {source} for each of {grid[0]} frames")
    unknown = usable and grid_there is None and there.shape == ours.shape
    if wanted != "new" and usable and (grid_there == grid or unknown):
        return _Part({"pos_embed": there})
    of = f"{' x '.join(map(str, grid_there))} tokens" if grid_there else "those that are not there or of unknown order"
    new = sincos_grid(width, model.grid)
    return _Part({"pos_embed": new}, f"positions: new, of {' x '.join(map(str, grid))} tokens in place of {of}")


def _tops(names):
    """Parts that tensors are of, in order, blocks taken together: final_layer, blocks.0 to blocks.11."""
    parts = list(dict.fromkeys(".".join(name.split(".")[: 1 + name.startswith("blocks.")]) for name in names))
    blocks = [part for part in parts if part.startswith("blocks.")]
    if len(blocks) > 1:
        at = parts.index(blocks[0])
        parts = [part for part in parts if part not in blocks]
        parts.insert(at, f"{blocks[0]} to {blocks[-1]}")
    return parts


def _few(names):
    names = list(map(str, names))
    if len(names) > 2 * SHOWN:
        return f"{', '.join(names[:SHOWN])} to {names[-1]} ({len(names)})"
    return ", ".join(names)
