"""What names something on the Hugging Face hub."""

import os
import re

DATA = "hf:"  # begins a --data-path that names a data set of Hugging Face, and no folder
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)+")


def is_hub_name(path):
    """Whether a path is no folder on this machine but user/name[/folder] of the hub. A folder goes first."""
    return bool(NAME.fullmatch(str(path))) and not os.path.isdir(path)


def data_set(data_path):
    """(name, split or None) of hf:NAME or hf:NAME:split."""
    return re.fullmatch(r"(.*?)(?::([^/\\]+))?", data_path.removeprefix(DATA), re.DOTALL).groups()
