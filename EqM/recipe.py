"""A command's flags as a TOML file: read before the command line, which wins; written so that a run can be repeated."""

import argparse
import json
import sys
from pathlib import Path

from EqM.run.errors import UserError, flag_of, printable, reason

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOT_REPEATED = ("config", "auto_resume")  # what a run that starts anew does without
RIVALS = ({"--data-path", "--latents"}, {"--val-path", "--val-latents"})  # besides the groups that parsers know


def add_flag(parser):
    """--config, on an argparse parser."""
    parser.add_argument("--config", help="TOML file of flags, without their dashes; those on the command line win")


def words(parser, argv):
    """The command line with the flags of its --config in front of it.

    parser: has all flags already. argv: words, None for the process's own. Ends with one line, by parser.error, if the
    file cannot be read or has what is no flag.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_flag(finder)
    try:
        path = finder.parse_known_args(argv)[0].config
    except argparse.ArgumentError:  # which parser tells better
        path = None
    if path is None:
        return argv
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"--config {printable(path)} cannot be read as TOML: {reason(error)}")
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    groups = [group._group_actions for group in parser._mutually_exclusive_groups]
    rivals = [*RIVALS, *({flag for action in group for flag in action.option_strings} for group in groups)]
    front = []
    for key, value in table.items():
        flag = flag_of(key)
        if not any(flag in group and group & given for group in rivals):  # --use-amp beats use_bf16 = true
            front += _words(parser, path, key, flag, value)
    return front + argv


def _words(parser, path, key, flag, value):
    action = parser._option_string_actions.get(flag)
    if action is None or flag in ("--config", "--help"):
        parser.error(f"--config {printable(path)}: {printable(key)} is no flag of this command")
    is_switch, several = action.nargs == 0, bool(action.nargs)
    kinds = (bool,) if is_switch else (list,) if isinstance(action.nargs, int) else (str, int, float)
    if type(value) not in (*kinds, *([list] if several else [])):
        kind = "true or false" if is_switch else "a list" if several else "one value"
        parser.error(f"--config {printable(path)}: {printable(key)} is {value!r}, where {flag} takes {kind}")
    if is_switch:
        opposite = [text for text in action.option_strings if text != flag]  # none of a flag that is only given
        return [flag] if value else opposite
    return [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]


def write(path, args):
    """Write args, a dict, as the TOML file with which the same command repeats them. Raises UserError."""
    lines = ["# Repeats this run: python EqM/train.py --config " + printable(path)]
    for name, value in args.items():
        if value is not None and name not in NOT_REPEATED:
            lines.append(_line(name, value))
    try:
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _line(name, value):
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"# {name} = {printable(text)}, which TOML cannot hold: give it on the command line"
    return f"{name} = {text}"
