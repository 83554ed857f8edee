"""The tables, for SQLite and PostgreSQL. Column names are those of the records; see ``records`` for what they mean."""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

PLAN_IDENTITY = ("op", "signature_key", "device_key", "threads", "precision", "batch_invariant", "timing")
"""Columns of ``plans`` that together name one plan."""

# SQLite numbers rows by itself only in a column declared INTEGER.
_RowId = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    """Names every constraint, so that a migration can find it again."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        str: Text,
        float: Double,
        bytes: LargeBinary,
        dict[str, Any]: JSON,
        list[float]: JSON,
    }


class Run(Base):
    """One run of a command that wrote trials."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    command: Mapped[str]
    versions: Mapped[dict[str, Any]]
    host: Mapped[str]
    started_at: Mapped[float]
    finished_at: Mapped[float | None]


class Device(Base):
    """A device that something was measured on or predicted for."""

    __tablename__ = "devices"

    key: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    arch: Mapped[str]
    facts: Mapped[dict[str, Any]]


class Artifact(Base):
    """Bytes, named by their sha256, uncompressed."""

    __tablename__ = "artifacts"

    checksum: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    abi_version: Mapped[int]
    data: Mapped[bytes]


class Kernel(Base):
    """A built variant."""

    __tablename__ = "kernels"
    __table_args__ = (Index(None, "op", "signature_key", "arch"),)

    key: Mapped[str] = mapped_column(primary_key=True)
    op: Mapped[str]
    signature_key: Mapped[str]
    signature: Mapped[dict[str, Any]]
    template: Mapped[str]
    config: Mapped[dict[str, Any]]
    arch: Mapped[str]
    source: Mapped[str]
    recipe: Mapped[dict[str, Any]]
    toolchain: Mapped[str]
    facts: Mapped[dict[str, Any]]
    checked: Mapped[str]
    created_at: Mapped[float]
    seal: Mapped[str]


class KernelArtifact(Base):
    """The artifacts of a kernel, in the order that its recipe numbers them."""

    __tablename__ = "kernel_artifacts"

    kernel_key: Mapped[str] = mapped_column(ForeignKey("kernels.key", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    checksum: Mapped[str] = mapped_column(ForeignKey("artifacts.checksum"))


class Trial(Base):
    """One evaluated variant on one problem."""

    __tablename__ = "trials"
    __table_args__ = (
        Index(None, "problem_key", "device_key", "threads"),
        Index(None, "op", "template", "device_key"),
        Index(None, "run_id"),
    )

    id: Mapped[int] = mapped_column(_RowId, primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"))
    op: Mapped[str]
    signature_key: Mapped[str]
    problem_key: Mapped[str]
    problem: Mapped[dict[str, Any]]
    device_key: Mapped[str] = mapped_column(ForeignKey("devices.key"))
    threads: Mapped[int]
    template: Mapped[str]
    config: Mapped[dict[str, Any]]
    kernel_key: Mapped[str | None]
    outcome: Mapped[str]
    timing: Mapped[str]
    median_us: Mapped[float | None]
    low_us: Mapped[float | None]
    high_us: Mapped[float | None]
    samples_us: Mapped[list[float]]
    error: Mapped[float | None]
    message: Mapped[str]
    seed: Mapped[int] = mapped_column(BigInteger)
    search: Mapped[str]
    build_s: Mapped[float]
    conditions: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class Plan(Base):
    """The one current plan of an identity: a plan for other evidence of time stands beside it."""

    __tablename__ = "plans"
    __table_args__ = (
        # PostgreSQL keeps 63 letters of a name, and the columns' names are more.
        UniqueConstraint(*PLAN_IDENTITY, name="uq_plans_identity"),
    )

    id: Mapped[int] = mapped_column(_RowId, primary_key=True)
    op: Mapped[str]
    signature_key: Mapped[str]
    signature: Mapped[dict[str, Any]]
    device_key: Mapped[str] = mapped_column(ForeignKey("devices.key"))
    threads: Mapped[int]
    precision: Mapped[str]
    error: Mapped[float]
    batch_invariant: Mapped[bool]
    model: Mapped[str]
    layout: Mapped[str]
    timing: Mapped[str]
    checked: Mapped[str]
    facts: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    seal: Mapped[str]


class PlanEntry(Base):
    """One row of a plan: which kernel serves sizes up to ``max_size``."""

    __tablename__ = "plan_entries"

    plan_id: Mapped[int] = mapped_column(_RowId, ForeignKey("plans.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    max_size: Mapped[int | None] = mapped_column(BigInteger)
    kernel_key: Mapped[str | None] = mapped_column(ForeignKey("kernels.key"))
    median_us: Mapped[float | None]
    default_us: Mapped[float | None]
    tuned_size: Mapped[int | None] = mapped_column(BigInteger)
