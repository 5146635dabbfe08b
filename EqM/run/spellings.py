"""What other code calls the weights of a checkpoint, and the prefixes that wrappers put into their names."""

import torch

WRAPPERS = {"module", "_orig_mod"}  # what data parallelism, averaging and compilation put into names
MODEL_KEYS = ("model", "state_dict", "model_state_dict")
EMA_KEYS = ("ema", "ema_model", "model_ema", "ema_state_dict", "state_dict_ema")
# Of one state dict that holds several networks.
MODEL_PARTS, EMA_PARTS = ("model", "net", "network", "online_model"), EMA_KEYS
COUNTERS = {"n_averaged", "initted", "step"}  # that averages keep among their weights


class Unfit(Exception):
    """What is wrong with a file, in words that go behind its name."""


def networks(content):
    """{"model", "ema"} of a checkpoint's content, as plain state dicts, and "stand_in" if one is missing.

    Further averages, called ema-0.999 and so on, come with them. Raises Unfit where it is unclear which is which.
    """
    found = {}
    for ours, keys in (("model", MODEL_KEYS), ("ema", EMA_KEYS)):
        there = [key for key in keys if content.get(key) is not None]
        if len(there) > 1 and there[0] != ours:
            raise Unfit(f"has {' and '.join(there)}: which is the {ours}? Keep one under {ours!r}")
        if there:
            for part, weights in _split(ours, content[there[0]]).items():
                found.setdefault(part, weights)
    weights = {ours: found[ours] for ours in ("model", "ema") if found.get(ours) or ours in content and ours in found}
    missing = [ours for ours in ("model", "ema") if ours not in weights]
    if len(missing) == 2 or missing and not any(weights.values()):
        raise Unfit(f"has no {' and no '.join(missing)}; its keys are {', '.join(map(str, content))[:200]}")
    if missing:
        (there,) = weights.values()
        weights |= {missing[0]: there, "stand_in": missing[0]}
    further = [name for name in content if isinstance(name, str) and name.startswith("ema-")]
    return weights | {name: next(iter(_split(name, content[name]).values())) for name in further}


def _split(ours, state):
    """One state dict as {"model" or "ema": plain state dict}: Lightning keeps both in one, under prefixes."""
    if not isinstance(state, dict):
        raise Unfit(f"is damaged or foreign: its {ours} is {brief(state)}, no weights")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise Unfit(f"is damaged or foreign: {name} of its {ours} is {brief(value)}, no tensor")
    state = _unwrapped(state)
    heads = {name.split(".")[0] for name in state if "." in name}
    parts = {"model": [head for head in MODEL_PARTS if head in heads], "ema": [h for h in EMA_PARTS if h in heads]}
    if not any(parts.values()):
        return {ours: state}
    split = {}
    for part, (head, *others) in ((part, heads) for part, heads in parts.items() if heads):
        if others:
            raise Unfit(f"has {head} and {' and '.join(others)} in one state dict: which is it?")
        inner = head + "."
        split[part] = {name.removeprefix(inner): v for name, v in state.items() if name.startswith(inner)}
    return {ours: split["model"]} if split.keys() == {"model"} else split


def _unwrapped(state):
    plain = {}
    for name, value in state.items():
        words = [word for word in name.split(".") if word not in WRAPPERS]
        if name in COUNTERS:
            continue
        if ".".join(words) in plain:
            raise Unfit(f"has {'.'.join(words)} twice, with and without a wrapper's prefix")
        plain[".".join(words)] = value
    return plain


def brief(value):
    """A value of a file in a few characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"
