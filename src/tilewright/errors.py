"""The one exception type that a user's mistake, or the user's machine, may raise."""

from tilewright.plain_text import plain_lines


class TilewrightError(Exception):
    """A failure that the user can act on.

    The message is one clear sentence that names the input, what is wrong with it and what to do.
    The command line prints it without a traceback and exits with a non-zero code.

    Messages quote what they are about, and that may come from somebody else's database: control characters are
    replaced, and passwords in URLs left out.
    """

    def __init__(self, *said: object) -> None:
        super().__init__(*(plain_lines(each) if isinstance(each, str) else each for each in said))
