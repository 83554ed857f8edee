"""The one exception type that a user's mistake, or the user's machine, may raise."""


class TilewrightError(Exception):
    """A failure that the user can act on.

    The message is one clear sentence that names the input, what is wrong with it and what to do.
    The command line prints it without a traceback and exits with a non-zero code.
    """
