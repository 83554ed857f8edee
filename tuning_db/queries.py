"""What is asked of the database. Each function works in the caller's session and returns records."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from sqlalchemy import Row, Select, case, func, select
from sqlalchemy.orm import DeclarativeBase, Session

from tilewright.tuning_db import codec
from tilewright.tuning_db.confined import limited
from tilewright.tuning_db.integrity import verified
from tilewright.tuning_db.models import Artifact, Device, Kernel, KernelArtifact, Plan, PlanEntry, Run, Trial
from tilewright.tuning_db.records import (
    TIMINGS,
    ArtifactRecord,
    Counts,
    DeviceRecord,
    KernelRecord,
    Outcome,
    PlanRecord,
    ProblemSummary,
    RunRecord,
    Timing,
    TrialRecord,
)

_ROWS_AT_ONCE = 500


class TrialFilter(TypedDict, total=False):
    """Which trials are meant; what is left out, or None, is not looked at."""

    run_id: str | None
    op: str | None
    signature_key: str | None
    problem_key: str | None
    device_key: str | None
    threads: int | None
    template: str | None
    kernel_key: str | None
    outcome: Outcome | None


class KernelFilter(TypedDict, total=False):
    """Which kernels are meant."""

    op: str | None
    signature_key: str | None
    template: str | None
    arch: str | None


class PlanFilter(TypedDict, total=False):
    """Which plans are meant."""

    op: str | None
    signature_key: str | None
    device_key: str | None
    threads: int | None
    model: str | None


def trials(session: Session, where: TrialFilter, limit: int | None) -> list[TrialRecord]:
    """Return trials in the order in which they were stored."""
    statement = _filtered(_columns(Trial), Trial, where).order_by(Trial.id).limit(limit)
    return [codec.decode(TrialRecord, row) for row in _rows(session, statement)]


def neighbours(
    session: Session, problem_key: str, timing: Timing, where: TrialFilter, per_problem: int
) -> list[TrialRecord]:
    """Return the fastest correct trials of every other problem.

    Times of different problems or devices do not compare, so each (problem, device, threads) is ranked by itself.
    """
    rank = (
        func.row_number()
        .over(partition_by=(Trial.problem_key, Trial.device_key, Trial.threads), order_by=(Trial.median_us, Trial.id))
        .label("rank")
    )
    ranked = (
        _filtered(_columns(Trial).add_columns(rank), Trial, where)
        .where(Trial.problem_key != problem_key, Trial.outcome == Outcome.OK.value, Trial.timing == timing)
        .subquery()
    )
    statement = (
        select(ranked)
        .where(ranked.c.rank <= per_problem)
        .order_by(ranked.c.problem_key, ranked.c.device_key, ranked.c.threads, ranked.c.rank)
    )
    return [codec.decode(TrialRecord, row) for row in _rows(session, statement)]


def kernels(session: Session, where: KernelFilter) -> list[KernelRecord]:
    """Return kernels, oldest first."""
    statement = _filtered(_columns(Kernel), Kernel, where).order_by(Kernel.created_at, Kernel.key)
    return [_kernel(session, row) for row in _rows(session, statement)]


def kernel(session: Session, key: str) -> KernelRecord | None:
    """Return the kernel with this key."""
    for row in _rows(session, _columns(Kernel).where(Kernel.key == key)):
        return _kernel(session, row)
    return None


def artifact(session: Session, checksum: str) -> ArtifactRecord | None:
    """Return the artifact with this sha256. Raises DamagedArtifact where the stored bytes have another."""
    for row in _rows(session, _columns(Artifact).where(Artifact.checksum == checksum)):
        found = codec.decode(ArtifactRecord, row)
        verified(checksum, found.data)
        return found
    return None


def plans(session: Session, where: PlanFilter) -> list[PlanRecord]:
    """Return plans ordered by op, signature, device and thread count, measured ones first, then by error."""
    statement = _filtered(_columns(Plan), Plan, where).order_by(
        Plan.op,
        Plan.signature_key,
        Plan.device_key,
        Plan.threads,
        case({timing: -rank for rank, timing in enumerate(TIMINGS)}, value=Plan.timing),
        Plan.error,
        Plan.precision,
        Plan.batch_invariant,
    )
    return [_plan(session, row) for row in _rows(session, statement)]


def devices(session: Session) -> list[DeviceRecord]:
    """Return every device."""
    return [codec.decode(DeviceRecord, row) for row in _rows(session, _columns(Device).order_by(Device.key))]


def runs(session: Session) -> list[RunRecord]:
    """Return every run, oldest first."""
    statement = _columns(Run).order_by(Run.started_at, Run.id)
    return [codec.decode(RunRecord, row) for row in _rows(session, statement)]


def summary(session: Session, where: TrialFilter) -> list[ProblemSummary]:
    """Return one summary for each (problem, device, thread count) that has trials."""
    group: list[Any] = [Trial.op, Trial.signature_key, Trial.problem_key, Trial.device_key, Trial.threads]
    parts: list[Any] = [*group, Trial.outcome, Trial.timing]
    figures: list[Any] = [
        func.count().label("trials"),
        func.min(Trial.median_us).label("best_us"),
        func.max(Trial.created_at).label("last_at"),
        func.min(Trial.id).label("first_id"),
    ]
    statement = _filtered(select(*parts, *figures), Trial, where).group_by(*parts).order_by(*parts)
    grouped: dict[tuple[Any, ...], list[codec.Columns]] = {}
    for row in _rows(session, statement):
        grouped.setdefault(tuple(row[column.key] for column in group), []).append(row)
    return [_problem_summary(session, rows) for rows in grouped.values()]


def counts(session: Session) -> Counts:
    """Return how many rows of each kind there are."""

    def rows_in(model: type[DeclarativeBase]) -> int:
        return session.execute(select(func.count()).select_from(model)).scalar_one()

    artifact_bytes = session.execute(select(func.sum(func.length(Artifact.data)))).scalar_one()
    return Counts(
        runs=rows_in(Run),
        devices=rows_in(Device),
        trials=rows_in(Trial),
        kernels=rows_in(Kernel),
        artifacts=rows_in(Artifact),
        artifact_bytes=int(artifact_bytes or 0),
        plans=rows_in(Plan),
    )


def _problem_summary(session: Session, rows: Sequence[codec.Columns]) -> ProblemSummary:
    with codec.decoding("a trial"):
        first_id = min(row["first_id"] for row in rows)
        (trial,) = _rows(session, select(Trial.problem).where(Trial.id == first_id))
        outcomes: dict[Outcome, int] = {}
        for row in rows:
            outcome = Outcome(row["outcome"])
            outcomes[outcome] = outcomes.get(outcome, 0) + row["trials"]
        best_us = {row["timing"]: row["best_us"] for row in rows if row["outcome"] == Outcome.OK.value}
        return ProblemSummary(
            op=rows[0]["op"],
            signature_key=rows[0]["signature_key"],
            problem_key=rows[0]["problem_key"],
            problem=dict(trial["problem"]),
            device_key=rows[0]["device_key"],
            threads=rows[0]["threads"],
            outcomes=outcomes,
            best_measured_us=best_us.get("measured"),
            best_predicted_us=best_us.get("predicted"),
            last_at=max(float(row["last_at"]) for row in rows),
        )


def _kernel(session: Session, row: codec.Columns) -> KernelRecord:
    statement = (
        select(KernelArtifact.checksum).where(KernelArtifact.kernel_key == row["key"]).order_by(KernelArtifact.position)
    )
    return codec.decode_kernel(row, [entry["checksum"] for entry in _rows(session, statement)])


def _plan(session: Session, row: codec.Columns) -> PlanRecord:
    statement = _columns(PlanEntry).where(PlanEntry.plan_id == row["id"]).order_by(PlanEntry.position)
    return codec.decode_plan(row, _rows(session, statement))


def _columns(model: type[DeclarativeBase]) -> Select[Any]:
    # Columns rather than objects: rows become records, and nothing needs to be tracked for changes.
    return select(*model.__table__.columns)


def _filtered(statement: Select[Any], model: type[DeclarativeBase], where: Any) -> Select[Any]:
    for name, value in where.items():
        if value is not None:
            statement = statement.where(getattr(model, name) == value)
    return statement


def _rows(session: Session, statement: Select[Any]) -> list[codec.Columns]:
    with codec.decoding("a row"):
        # Fetched in parts, so that rows without end are noticed before they fill the memory.
        rows: Iterable[Row[Any]] = session.execute(statement, execution_options={"yield_per": _ROWS_AT_ONCE})
        bind = session.get_bind()
        if bind.dialect.name == "sqlite":
            rows = limited(rows, Path(bind.engine.url.database or ""))
        return [{str(name): value for name, value in row._mapping.items()} for row in rows]  # noqa: SLF001 - its name
