"""Text from elsewhere, before anybody sees it: without what steers a terminal, and without passwords."""

import re

_PASSWORD = re.compile(
    r"(?P<user>://[^:/@\s]*):(?:\S*|[^@\n'\"]*)@"  # behind the user's name, up to the last @
    r"|(?P<field>[?&](?:ssl)?password=)[^&\s'\"]*",  # a field of a URL's query
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """``text`` with every control character replaced: what a database or a kernel says steers no terminal."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\t" else "\N{REPLACEMENT CHARACTER}" for each in text)


def without_passwords(text: str) -> str:
    """``text`` with three stars in place of every password of a URL in it."""
    return _PASSWORD.sub(lambda found: f"{found['user']}:***@" if found["user"] else f"{found['field']}***", text)


def plain_lines(text: str) -> str:
    """Several lines, each :func:`plain`, without passwords: how messages are shown."""
    return "\n".join(map(plain, without_passwords(text).split("\n")))
