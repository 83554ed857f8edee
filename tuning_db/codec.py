"""Records to column values and back: what the store writes, the store and the runtime's reader both read.

Documents whose layout may change travel in an envelope, ``{"version": 1, "value": ...}``. Kernels and plans carry a
seal over everything that is executed because of them, since SQLite does not notice a flipped bit inside a value.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tilewright.tuning_db.integrity import seal
from tilewright.tuning_db.records import (
    LOSSLESS,
    DeviceRecord,
    KernelRecord,
    Outcome,
    PlanEntry,
    PlanRecord,
    RunRecord,
    TrialRecord,
)

Columns = dict[str, Any]
Row = Mapping[str, Any]

_ENVELOPE_VERSION = 1
KERNEL_DOCUMENTS = ("signature", "config", "recipe", "facts")
PLAN_DOCUMENTS = ("signature", "facts")


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
    """Parse a JSON text."""
    with decoding("a document"):
        return json.loads(text)


def parse_documents(row: Row, names: Iterable[str]) -> Columns:
    """Parse the JSON text of a row's document columns, as SQLAlchemy's JSON type does."""
    return {**row, **{name: loads(row[name]) for name in names}}


def encode_trial(trial: TrialRecord) -> Columns:
    """Make columns of ``trials``, without the id that the database gives."""
    return {
        "run_id": trial.run_id,
        "op": trial.op,
        "signature_key": trial.signature_key,
        "problem_key": trial.problem_key,
        "problem": trial.problem,
        "device_key": trial.device_key,
        "threads": int(trial.threads),
        "template": trial.template,
        "config": trial.config,
        "kernel_key": trial.kernel_key,
        "outcome": trial.outcome.value,
        "timing": trial.timing,
        "median_us": _optional(float, trial.median_us),
        "low_us": _optional(float, trial.low_us),
        "high_us": _optional(float, trial.high_us),
        "samples_us": _enveloped([float(sample) for sample in trial.samples_us]),
        "error": _without_nan(_optional(float, trial.error)),
        "message": _storable_text(trial.message),
        "seed": int(trial.seed),
        "search": trial.search,
        "build_s": float(trial.build_s),
        "check_s": float(trial.check_s),
        "measure_s": float(trial.measure_s),
        "created_at": float(trial.created_at),
    }


def decode_trial(row: Row) -> TrialRecord:
    """Make a trial of a row of ``trials``."""
    with decoding("a trial"):
        return TrialRecord(
            id=int(row["id"]),
            run_id=str(row["run_id"]),
            op=str(row["op"]),
            signature_key=str(row["signature_key"]),
            problem_key=str(row["problem_key"]),
            problem=dict(row["problem"]),
            device_key=str(row["device_key"]),
            threads=int(row["threads"]),
            template=str(row["template"]),
            config=dict(row["config"]),
            kernel_key=_optional(str, row["kernel_key"]),
            outcome=Outcome(row["outcome"]),
            timing=row["timing"],
            median_us=_optional(float, row["median_us"]),
            low_us=_optional(float, row["low_us"]),
            high_us=_optional(float, row["high_us"]),
            samples_us=tuple(float(sample) for sample in _opened(row["samples_us"])),
            error=_optional(float, row["error"]),
            message=str(row["message"]),
            seed=int(row["seed"]),
            search=str(row["search"]),
            build_s=float(row["build_s"]),
            check_s=float(row["check_s"]),
            measure_s=float(row["measure_s"]),
            created_at=float(row["created_at"]),
        )


def encode_kernel(kernel: KernelRecord) -> Columns:
    """Make columns of ``kernels``; the artifacts are rows of ``kernel_artifacts``."""
    return {
        "key": kernel.key,
        "op": kernel.op,
        "signature_key": kernel.signature_key,
        "signature": kernel.signature,
        "template": kernel.template,
        "config": kernel.config,
        "arch": kernel.arch,
        "source": kernel.source,
        "recipe": _enveloped(kernel.recipe),
        "toolchain": kernel.toolchain,
        "facts": _enveloped(kernel.facts),
        "checked": kernel.checked,
        "created_at": float(kernel.created_at),
        "seal": _kernel_seal(kernel),
    }


def decode_kernel(row: Row, artifacts: Iterable[str]) -> KernelRecord:
    """Make a kernel of a row of ``kernels`` and its artifacts' checksums in order; refuse a broken seal."""
    with decoding("a kernel"):
        kernel = KernelRecord(
            key=row["key"],
            op=row["op"],
            signature_key=row["signature_key"],
            signature=row["signature"],
            template=row["template"],
            config=row["config"],
            arch=row["arch"],
            source=row["source"],
            recipe=_opened(row["recipe"]),
            toolchain=row["toolchain"],
            facts=_opened(row["facts"]),
            artifacts=tuple(artifacts),
            checked=row["checked"],
            created_at=float(row["created_at"]),
        )
        _require_seal(row, _kernel_seal(kernel))
    return kernel


def encode_plan(plan: PlanRecord) -> Columns:
    """Make columns of ``plans``; the entries are rows of ``plan_entries``."""
    return {
        "op": plan.op,
        "signature_key": plan.signature_key,
        "signature": plan.signature,
        "device_key": plan.device_key,
        "threads": int(plan.threads),
        "precision": plan.precision,
        "error": float(plan.error),
        "batch_invariant": bool(plan.batch_invariant),
        "model": plan.model,
        "layout": plan.layout,
        "timing": plan.timing,
        "checked": plan.checked,
        "facts": _enveloped(plan.facts),
        "created_at": float(plan.created_at),
        "seal": _plan_seal(plan),
    }


def encode_plan_entry(entry: PlanEntry) -> Columns:
    """Make columns of ``plan_entries``, without the plan and the position."""
    return {
        "max_size": _optional(int, entry.max_size),
        "kernel_key": entry.kernel_key,
        "median_us": _optional(float, entry.median_us),
        "default_us": _optional(float, entry.default_us),
        "tuned_size": _optional(int, entry.tuned_size),
    }


def decode_plan(row: Row, entries: Iterable[Row]) -> PlanRecord:
    """Make a plan of a row of ``plans`` and its entries in order; refuse a broken seal."""
    with decoding("a plan"):
        plan = PlanRecord(
            op=row["op"],
            signature_key=row["signature_key"],
            signature=row["signature"],
            device_key=row["device_key"],
            threads=row["threads"],
            precision=row["precision"],
            error=float(row["error"]),
            batch_invariant=bool(row["batch_invariant"]),
            model=row["model"],
            layout=row["layout"],
            timing=row["timing"],
            checked=row["checked"],
            entries=tuple(
                PlanEntry(
                    max_size=entry["max_size"],
                    kernel_key=entry["kernel_key"],
                    median_us=entry["median_us"],
                    default_us=entry["default_us"],
                    tuned_size=entry["tuned_size"],
                )
                for entry in entries
            ),
            facts=_opened(row["facts"]),
            created_at=float(row["created_at"]),
        )
        _require_seal(row, _plan_seal(plan))
    return plan


def encode_device(device: DeviceRecord) -> Columns:
    """Make columns of ``devices``."""
    return {"key": device.key, "name": device.name, "arch": device.arch, "facts": _enveloped(device.facts)}


def decode_device(row: Row) -> DeviceRecord:
    """Make a device of a row of ``devices``."""
    with decoding("a device"):
        return DeviceRecord(str(row["key"]), str(row["name"]), str(row["arch"]), dict(_opened(row["facts"])))


def encode_run(run: RunRecord) -> Columns:
    """Make columns of ``runs``."""
    return {
        "id": run.id,
        "command": run.command,
        "versions": run.versions,
        "host": run.host,
        "started_at": float(run.started_at),
        "finished_at": _optional(float, run.finished_at),
    }


def decode_run(row: Row) -> RunRecord:
    """Make a run of a row of ``runs``."""
    with decoding("a run"):
        return RunRecord(
            id=str(row["id"]),
            command=str(row["command"]),
            versions=dict(row["versions"]),
            host=str(row["host"]),
            started_at=float(row["started_at"]),
            finished_at=_optional(float, row["finished_at"]),
        )


def _kernel_seal(kernel: KernelRecord) -> str:
    # ``checked`` and ``created_at`` are evidence about the kernel, not part of what is launched.
    return seal(
        {
            "key": kernel.key,
            "op": kernel.op,
            "signature_key": kernel.signature_key,
            "signature": kernel.signature,
            "template": kernel.template,
            "config": kernel.config,
            "arch": kernel.arch,
            "source": kernel.source,
            "recipe": kernel.recipe,
            "toolchain": kernel.toolchain,
            "facts": kernel.facts,
            "artifacts": kernel.artifacts,
        }
    )


def _plan_seal(plan: PlanRecord) -> str:
    # What came with later schema versions is left out where it says nothing, so that older seals stay valid.
    later: Columns = {}
    if (plan.precision, plan.error) != (LOSSLESS, 0.0):
        later |= {"precision": plan.precision, "error": plan.error}
    if plan.batch_invariant:
        later |= {"batch_invariant": True}
    if plan.facts:
        later |= {"facts": plan.facts}
    return seal(
        later
        | {
            "op": plan.op,
            "signature_key": plan.signature_key,
            "signature": plan.signature,
            "device_key": plan.device_key,
            "threads": plan.threads,
            "model": plan.model,
            "layout": plan.layout,
            "timing": plan.timing,
            "checked": plan.checked,
            "entries": [encode_plan_entry(entry) for entry in plan.entries],
        }
    )


def _require_seal(row: Row, found: str) -> None:
    if row["seal"] != found:
        raise UndecodableError("its content does not match its checksum")


def _enveloped(value: Any) -> Columns:
    return {"version": _ENVELOPE_VERSION, "value": value}


def _opened(document: Any) -> Any:
    if document["version"] != _ENVELOPE_VERSION:
        raise UndecodableError(f"document version {document['version']!r} is unknown")
    return document["value"]


def _optional(convert: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else convert(value)


def _storable_text(message: str) -> str:
    # A crashed compiler's output may hold what is no UTF-8, and PostgreSQL takes no NUL.
    return message.encode("utf-8", "replace").decode().replace("\0", "?")


def _without_nan(error: float | None) -> float | None:
    # SQLite would turn a NaN into NULL and with it a wrong result into an unknown one.
    return math.inf if error is not None and math.isnan(error) else error
