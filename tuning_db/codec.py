"""Records to column values and back: what the store writes, the store and the runtime's reader both read.

A column is called like the field of the record that it holds, so that all of this follows from the records. Kernels
and plans carry a seal over everything that is executed because of them, since SQLite does not notice a flipped bit
inside a value.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, get_origin

from tilewright.structuring import fields_of, structure, unstructure
from tilewright.tuning_db.integrity import seal
from tilewright.tuning_db.records import KernelRecord, PlanEntry, PlanRecord, TrialRecord

_LONGEST_DOCUMENT = 4 << 20
"""Characters of a document; a value takes up to twenty times as much memory as its text."""
_MOST_DIGITS = 20
_SUSPICIOUS = re.compile(r"[0-9]{19}|[eE]\+?[0-9]{3}")
"""In texts with numbers of more than 64 bits, and in some others."""

Columns = dict[str, Any]
Row = Mapping[str, Any]
R = TypeVar("R")

# Evidence about a kernel and a plan's date are not part of what is executed.
_KERNEL_UNSEALED = ("checked", "created_at")
_PLAN_UNSEALED = ("created_at",)


class UndecodableError(ValueError):
    """A row cannot be what was written."""


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Turn whatever a malformed row makes Python raise into UndecodableError."""
    try:
        yield
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise UndecodableError(f"{what}: {error}") from error


def dumps(document: Any) -> str:
    """JSON text of a document. Raises ValueError for numbers that are not finite."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


def loads(text: str) -> Any:
    """Parse a JSON text as :func:`dumps` writes it. Raises UndecodableError for any other."""
    with decoding("a document"):
        if len(text) > _LONGEST_DOCUMENT:
            raise ValueError(f"it has {len(text)} characters")
        # Numbers that are too large are looked for at once, for reading each of them by hand takes ten times as long.
        if _SUSPICIOUS.search(text):
            return json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_number)
        return json.loads(text, parse_constant=_number)


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS or not -(1 << 63) <= int(text) < 1 << 64:
        raise ValueError(f"the number {text:.20}... has more than 64 bits")
    return int(text)


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text:.20} is not finite")
    return value


def parse_sqlite(record_type: type, row: Row) -> Columns:
    """Parse the values that SQLite has no type for, documents and booleans, as SQLAlchemy does by itself."""
    found = dict(row)
    for name, hint in fields_of(record_type).items():
        if name in found and get_origin(hint) in (dict, tuple):
            found[name] = loads(found[name])
        elif name in found and hint is bool and found[name] in (0, 1):
            found[name] = bool(found[name])
    return found


def encode(record: Any) -> Columns:
    """Make columns of a record whose fields all are columns of its table."""
    return unstructure(record)


def decode(record_type: type[R], row: Row, **elsewhere: Any) -> R:
    """Make a record of a row of its table. ``elsewhere``: fields that are kept in other tables."""
    cls: Any = record_type
    with decoding(f"a {cls.__name__.removesuffix('Record').lower()}"):
        made: R = structure(cls, {name: row[name] for name in fields_of(cls) if name not in elsewhere} | elsewhere)
    return made


def encode_trial(trial: TrialRecord) -> Columns:
    """Make columns of ``trials``, without the id that the database gives."""
    # SQLite would turn a NaN into NULL and with it a wrong result into an unknown one.
    error = math.inf if trial.error is not None and math.isnan(trial.error) else trial.error
    return _without(encode(replace(trial, error=error, message=storable(trial.message))), ("id",))


def storable(text: str) -> str:
    """Make ``text`` fit for a column: names of files and what compilers print may be no UTF-8.

    PostgreSQL takes no NUL.
    """
    return text.encode("utf-8", "replace").decode().replace("\0", "?")


def encode_kernel(kernel: KernelRecord) -> Columns:
    """Make columns of ``kernels``; the artifacts are rows of ``kernel_artifacts``."""
    return {**_without(encode(kernel), ("artifacts",)), "seal": _sealed(kernel, _KERNEL_UNSEALED)}


def decode_kernel(row: Row, artifacts: Iterable[str]) -> KernelRecord:
    """Make a kernel of a row of ``kernels`` and its artifacts' checksums in order; refuse a broken seal."""
    kernel = decode(KernelRecord, row, artifacts=list(artifacts))
    _require_seal("a kernel", row, kernel, _KERNEL_UNSEALED)
    return kernel


def encode_plan(plan: PlanRecord) -> Columns:
    """Make columns of ``plans``; the entries are rows of ``plan_entries``."""
    return {**_without(encode(plan), ("entries",)), "seal": _sealed(plan, _PLAN_UNSEALED)}


def decode_plan(row: Row, entries: Iterable[Row]) -> PlanRecord:
    """Make a plan of a row of ``plans`` and its entries in order; refuse a broken seal."""
    with decoding("a plan"):
        found = [{name: entry[name] for name in fields_of(PlanEntry)} for entry in entries]
    plan = decode(PlanRecord, row, entries=found)
    _require_seal("a plan", row, plan, _PLAN_UNSEALED)
    return plan


def _sealed(record: KernelRecord | PlanRecord, unsealed: Iterable[str]) -> str:
    return seal(_without(encode(record), unsealed))


def _require_seal(what: str, row: Row, record: KernelRecord | PlanRecord, unsealed: Iterable[str]) -> None:
    with decoding(what):
        if row["seal"] != _sealed(record, unsealed):
            raise UndecodableError("its content does not match its checksum")


def _without(columns: Columns, names: Iterable[str]) -> Columns:
    return {name: value for name, value in columns.items() if name not in names}
