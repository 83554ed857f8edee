"""What replaces rows: devices, kernels and plans. Each function works in the caller's transaction."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Session

from tilewright.tuning_db import codec
from tilewright.tuning_db.models import PLAN_IDENTITY, Artifact, Device, Kernel, KernelArtifact, Plan, PlanEntry
from tilewright.tuning_db.records import CHECKED_LEVELS, ArtifactRecord, DeviceRecord, KernelRecord, PlanRecord


def put_device(session: Session, device: DeviceRecord) -> None:
    """Add or replace a device."""
    columns = codec.encode(device)
    _upsert(session, Device, columns, key=("key",), replaced=("name", "arch", "facts"))


def put_kernel(session: Session, kernel: KernelRecord, artifacts: Sequence[ArtifactRecord]) -> None:
    """Add or replace a kernel and its artifacts; what it was checked for only rises."""
    # In one order everywhere, so that two writers on PostgreSQL never wait for each other's rows.
    for artifact in sorted(artifacts, key=lambda artifact: artifact.checksum):
        _upsert(session, Artifact, codec.encode(artifact), key=("checksum",), replaced=("kind", "abi_version", "data"))

    columns = codec.encode_kernel(kernel)
    known = session.scalar(select(Kernel.checked).where(Kernel.key == kernel.key).with_for_update())
    if known in CHECKED_LEVELS:
        columns["checked"] = max(known, kernel.checked, key=CHECKED_LEVELS.index)
    replaced = tuple(name for name in columns if name not in ("key", "created_at"))
    _upsert(session, Kernel, columns, key=("key",), replaced=replaced)

    session.execute(delete(KernelArtifact).where(KernelArtifact.kernel_key == kernel.key))
    rows = [
        {"kernel_key": kernel.key, "position": position, "checksum": checksum}
        for position, checksum in enumerate(kernel.artifacts)
    ]
    if rows:
        session.execute(insert(KernelArtifact), rows)


def put_plan(session: Session, plan: PlanRecord) -> bool:
    """Add or replace the plan of one identity, with its entries, unless the one before was checked further.

    Returns whether ``plan`` is now the one that is stored.
    """
    columns = codec.encode_plan(plan)
    this_plan = [getattr(Plan, name) == columns[name] for name in PLAN_IDENTITY]
    known = session.scalar(select(Plan.checked).where(*this_plan).with_for_update())
    if known in CHECKED_LEVELS and CHECKED_LEVELS.index(known) > CHECKED_LEVELS.index(plan.checked):
        return False
    # The row is updated in place, which on PostgreSQL also makes a second writer of this plan wait.
    _upsert(session, Plan, columns, key=PLAN_IDENTITY, replaced=tuple(n for n in columns if n not in PLAN_IDENTITY))
    plan_id = session.execute(select(Plan.id).where(*this_plan)).scalar_one()
    session.execute(delete(PlanEntry).where(PlanEntry.plan_id == plan_id))
    rows = [
        {"plan_id": plan_id, "position": position, **codec.encode(entry)} for position, entry in enumerate(plan.entries)
    ]
    session.execute(insert(PlanEntry), rows)
    return True


def _upsert(
    session: Session,
    model: type[DeclarativeBase],
    columns: dict[str, Any],
    *,
    key: tuple[str, ...],
    replaced: tuple[str, ...],
) -> None:
    make = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    statement = make(model).values(columns)
    session.execute(
        statement.on_conflict_do_update(index_elements=key, set_={name: statement.excluded[name] for name in replaced})
    )
