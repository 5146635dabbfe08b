"""The one exception that means "the input is wrong", and how to say another, a file's name or a flag in one line."""

import errno
import sys

# What a user can mend: space, permissions, limits, paths. Any other OSError is a bug, and keeps its traceback.
_MENDABLE = (
    "ENOSPC EDQUOT EFBIG EACCES EPERM EROFS EIO ESTALE EMFILE ENFILE ENOMEM EAGAIN ENAMETOOLONG ELOOP EBUSY EPIPE"
)
_MENDABLE_PATHS = "ENOENT ENOTDIR EISDIR EEXIST ENOTEMPTY"  # where the message names the path


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, and what to do about it.

    `cli.run` prints it on stderr without a traceback and exits with status 2.
    """

    def __init__(self, message):
        super().__init__(printable(message))  # names out of a file may hold the end of a line


def reason(error):
    """The first line of an exception's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def printable(text):
    """A text in which what no terminal or UTF-8 file takes, as names of files may hold it, is spelt: `caf\\udce9`."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))


def flag_of(name):
    """The flag that an argument is given by: --image-size of image_size."""
    return "--" + name.replace("_", "-")


def is_mendable(error):
    """Whether an OSError is the machine's state rather than a bug: a full disk, a folder without permission, ..."""
    names = _MENDABLE.split() + (_MENDABLE_PATHS.split() if error.filename is not None else [])
    return errno.errorcode.get(error.errno) in names


def is_out_of_memory(error):
    """Whether memory ran out, on a device or in the process. Covers what libraries made of it on the way up."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
        ):
            return True
        error = error.__cause__
    return False


def print_anything():
    """Let this process print what its terminal's encoding lacks, as escapes, rather than end in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
