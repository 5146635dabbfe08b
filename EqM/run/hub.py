"""What names something on the Hugging Face hub."""

import os
import re

NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)+")


def is_hub_name(path):
    """Whether a path is no folder on this machine but user/name[/folder] of the hub. A folder goes first."""
    return bool(NAME.fullmatch(str(path))) and not os.path.isdir(path)
