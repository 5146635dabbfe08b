"""A trained model as a folder to give away: model.safetensors, config.json, README.md and its autoencoder, if local.

export.py writes it; wherever a checkpoint is named, such a folder, or user/name on the hub, may stand instead.
"""

import json
from pathlib import Path

from EqM.run.errors import UserError, reason
from EqM.run.hub import is_hub_name
from EqM.run.spellings import Unfit

WEIGHTS, CONFIG, CARD, AUTOENCODER = "model.safetensors", "config.json", "README.md", "autoencoder"
FORMAT = "EqM 1"  # raised when a reader of before would misread a folder


def fetched(path):
    """A path as it is; an export that is named by user/name is fetched from the hub, its cache first.

    Raises UserError if the hub does not have it, or cannot be reached.
    """
    if Path(path).exists() or not is_hub_name(path):
        return path
    try:
        from huggingface_hub import snapshot_download  # comes with diffusers; seconds to import
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise UserError(f"{path} is no file, and to look for it on the hub wants huggingface_hub") from None
    try:
        return snapshot_download(str(path), local_files_only=True)
    except LocalEntryNotFoundError:
        pass
    except Exception as error:  # as below
        raise _not_had(path, error) from None
    try:
        return snapshot_download(str(path))
    except Exception as error:  # the client raises whatever its transport does
        raise _not_had(path, error) from None


def _not_had(path, error):
    return UserError(f"{path} is neither a file here nor to be had from the hub: {reason(error)}")


def is_export(path):
    """Whether a path is a folder that export.py wrote."""
    return (Path(path) / CONFIG).is_file() and (Path(path) / WEIGHTS).is_file()


def read(folder):
    """What an export holds, as a checkpoint's content. Raises Unfit.

    That is weights and which they are, args, class_names, advice.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unfit(f"has no usable {CONFIG}: {reason(error)}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT or not isinstance(config.get("args"), dict):
        raise Unfit(
            f"has a {CONFIG} that is not of the format {FORMAT}: export it anew, or take a newer version of this"
        )
    args = dict(config["args"])
    if args.get("vae") == AUTOENCODER:
        args["vae"] = str(folder / AUTOENCODER)
    try:
        from safetensors.torch import load_file  # comes with diffusers

        weights = load_file(folder / WEIGHTS)
    except Exception as error:  # over a damaged file the library raises anything
        raise Unfit(f"has no usable {WEIGHTS}: {reason(error)}") from None
    wanted = ("class_names", "advice", "weights", "held_of_start")
    return {"ema": weights, "args": args, **{name: config[name] for name in wanted if config.get(name) is not None}}
