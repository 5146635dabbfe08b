"""The one exception that means "the input is wrong", and how to say another, or a file's name, in one line."""

import sys


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, and what to do about it.

    `cli.run` prints it on stderr without a traceback and exits with status 2.
    """


def reason(error):
    """The first line of an exception's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def printable(text):
    """A text, or a file's name, as one line that any UTF-8 file takes: bytes that are not UTF-8 as `\\udce9`, ends of
    lines and what moves a terminal's cursor as their escapes too."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))


def print_anything():
    """Let this process print what its terminal's encoding lacks, as escapes, rather than end in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
