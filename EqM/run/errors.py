"""The one exception that means "the input is wrong", and how to say another in one line."""


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
