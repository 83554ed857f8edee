"""What the reading commands share: options, selection by key, and the one document."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any, TypeVar

from tilewright.errors import TilewrightError
from tilewright.tuning_db.locations import default_key
from tilewright.tuning_db.store import Store

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--db``, ``--verify`` and ``--json``."""
    parser.add_argument("--db", metavar="PATH|URL", help="database (default $TILEWRIGHT_DB, or the user's data folder)")
    parser.add_argument(
        "--verify",
        metavar="PEM",
        default=default_key(),
        help="public key that must have signed the pack that --db names (default $TILEWRIGHT_VERIFY_KEY)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def open_store(arguments: argparse.Namespace) -> Store:
    """The database that the options name, for reading.

    Raises:
        TilewrightError: when it cannot be read, is not to be trusted, or was not signed by the key that they name.

    """
    return Store.open_read_only(arguments.db, verify_key=arguments.verify)


def print_json(document: Any) -> None:
    """Print the one document."""
    print(json.dumps(document, indent=1, default=str))


def only_one(what: str, prefix: str, items: Iterable[tuple[str, T]]) -> T:
    """The one item whose key starts with ``prefix``.

    Raises:
        TilewrightError: when none or several do.

    """
    found = {key: item for key, item in items if key.startswith(prefix)}
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise TilewrightError(f"no {what} has a key that starts with {prefix!r}; `tune show` lists them")
    raise TilewrightError(f"{len(found)} keys of a {what} start with {prefix!r}; give more of it: {', '.join(found)}")
