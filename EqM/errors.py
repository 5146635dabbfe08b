"""The one exception that means "the input is wrong", so that a script can say it in one line."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, and what to do about it.

    `cli.run` prints it on stderr without a traceback and exits with status 2.
    """
