"""The writing and asking side of the database, for the tuner and the command line."""

import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from sqlalchemy import Connection, insert, update
from sqlalchemy.orm import Session

from tilewright import disks
from tilewright.errors import TilewrightError
from tilewright.trust import make_private_folder
from tilewright.tuning_db import codec, queries, writes
from tilewright.tuning_db.connection import Database, open_server, open_sqlite, open_sqlite_read_only
from tilewright.tuning_db.examination import examine
from tilewright.tuning_db.integrity import sha256_hex
from tilewright.tuning_db.locations import default_url, sqlite_path, user_database
from tilewright.tuning_db.migrations import require_current_database, upgrade_database
from tilewright.tuning_db.models import Run, Trial
from tilewright.tuning_db.queries import KernelFilter, PlanFilter, TrialFilter
from tilewright.tuning_db.records import (
    ArtifactRecord,
    Counts,
    DeviceRecord,
    Document,
    KernelRecord,
    PlanRecord,
    ProblemSummary,
    RunRecord,
    Timing,
    TrialRecord,
)


class Store:
    """A database that keeps every trial, the kernels and the plans.

    Each method is one transaction: when it returns, what it wrote is kept whatever happens to the process; when it
    raises, nothing was written. Several processes may use one database, each with a Store of its own; threads may
    share one. Methods raise TilewrightError where the database or its disk fails, and ValueError for records that
    name a run, device, kernel or artifact that was not stored before.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, url_or_path: str | os.PathLike[str] | None = None, *, create: bool = True) -> Self:
        """Open for writing and bring the schema up to date; None means the default location.

        Raises UntrustedFile for a file that others could have written, as :meth:`open_read_only` and the runtime do.
        ``create``: make a SQLite file that is missing, and in the default location its directory too.
        """
        url_or_path = default_url() if url_or_path is None else url_or_path
        path = sqlite_path(url_or_path)
        if path is not None and path == user_database():
            _make_directory(path.parent)
        database = open_server(os.fspath(url_or_path)) if path is None else open_sqlite(path, create=create)
        return cls._checked(database, database.write, upgrade_database)

    @classmethod
    def open_read_only(
        cls, url_or_path: str | os.PathLike[str] | None = None, *, verify_key: str | os.PathLike[str] | None = None
    ) -> Self:
        """Open for queries alone, as `tune show` does; works on read-only media and packs.

        Raises UntrustedFile for a file that others could have written, or that was not signed by the public key in the
        file ``verify_key``, if one is named.
        """
        url_or_path = default_url() if url_or_path is None else url_or_path
        path = sqlite_path(url_or_path)
        key = None if verify_key is None else Path(verify_key).expanduser()
        if path is not None:
            database = open_sqlite_read_only(path, verify_key=key)
        elif key is not None:
            raise TilewrightError(f"packs are signed, which {url_or_path!s} is none of; name a pack, or no key")
        else:
            database = open_server(os.fspath(url_or_path), read_only=True)
        return cls._checked(database, database.read, require_current_database)

    @classmethod
    def _checked(
        cls,
        database: Database,
        transaction: Callable[[Callable[[Session], None]], None],
        check: Callable[[Connection], None],
    ) -> Self:
        try:
            transaction(lambda session: check(session.connection()))
        except BaseException:
            database.close()
            raise
        return cls(database)

    @property
    def name(self) -> str:
        """The path or URL, without a password."""
        return self._database.name

    @property
    def path(self) -> Path | None:
        """The SQLite file, or None for a server."""
        return self._database.path

    def close(self) -> None:
        """Close every connection."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Writes

    def start_run(self, command: str, *, versions: Document, host: str) -> RunRecord:
        """Record that a command starts; its trials name the id of what is returned."""
        run = RunRecord(
            id=uuid.uuid4().hex, command=codec.storable(command), versions=versions, host=host, started_at=time.time()
        )
        self._database.write(lambda session: session.execute(insert(Run), codec.encode(run)))
        return run

    def finish_run(self, run_id: str) -> None:
        """Record that a run has come to its end."""
        finished = update(Run).where(Run.id == run_id).values(finished_at=time.time())
        self._database.write(lambda session: session.execute(finished))

    def put_device(self, device: DeviceRecord) -> None:
        """Add a device, or replace what is known of it."""
        self._database.write(lambda session: writes.put_device(session, device))

    def add_trial(self, trial: TrialRecord) -> int:
        """Add a trial and return its id."""
        return self.add_trials([trial])[0]

    def add_trials(self, trials: Iterable[TrialRecord]) -> list[int]:
        """Add trials, all or none, and return their ids in order."""
        rows = [codec.encode_trial(trial) for trial in trials]
        if not rows:
            return []
        statement = insert(Trial).returning(Trial.id, sort_by_parameter_order=True)
        return self._database.write(lambda session: list(session.scalars(statement, rows)))

    def add_kernel(self, kernel: KernelRecord, artifacts: Sequence[ArtifactRecord]) -> None:
        """Add a kernel with its artifacts, or write the same kernel again.

        Writing it again mends what was damaged; how far it was checked only ever rises. Raises ValueError where
        ``artifacts`` are not those that the kernel names or do not match their checksums.
        """
        if {artifact.checksum for artifact in artifacts} != set(kernel.artifacts):
            raise ValueError(f"kernel {kernel.key[:16]} names other artifacts than were given")
        for artifact in artifacts:
            if artifact.checksum != sha256_hex(artifact.data):
                raise ValueError(f"artifact {artifact.checksum[:16]} is not named by the checksum of its bytes")
        self._database.write(lambda session: writes.put_kernel(session, kernel, artifacts))

    def put_plan(self, plan: PlanRecord) -> bool:
        """Make this the current plan of its identity (see the table), in place of the one before.

        A plan that was checked further than this one stays. Returns whether ``plan`` is now the one that is stored.
        """
        return self._database.write(lambda session: writes.put_plan(session, plan))

    # Queries

    def trials(self, *, limit: int | None = None, **where: Unpack[TrialFilter]) -> list[TrialRecord]:
        """Return trials in the order in which they were stored."""
        return self._database.read(lambda session: queries.trials(session, where, limit))

    def neighbours(
        self, *, other_than: str, timing: Timing = "measured", per_problem: int = 5, **where: Unpack[TrialFilter]
    ) -> list[TrialRecord]:
        """Return the fastest correct trials of every problem but one (its key), to start a search from.

        Ordered by problem, device and threads, then fastest first, at most ``per_problem`` of each. Narrow it by
        ``op`` and ``template``, and by ``signature_key`` or ``device_key`` for closer neighbours.
        """
        return self._database.read(lambda session: queries.neighbours(session, other_than, timing, where, per_problem))

    def kernels(self, **where: Unpack[KernelFilter]) -> list[KernelRecord]:
        """Return kernels, oldest first."""
        return self._database.read(lambda session: queries.kernels(session, where))

    def kernel(self, key: str) -> KernelRecord | None:
        """Return the kernel with this key."""
        return self._database.read(lambda session: queries.kernel(session, key))

    def artifact(self, checksum: str) -> ArtifactRecord | None:
        """Return the artifact with this sha256. Raises DamagedArtifact where the stored bytes have another."""
        return self._database.read(lambda session: queries.artifact(session, checksum))

    def plans(self, **where: Unpack[PlanFilter]) -> list[PlanRecord]:
        """Return plans ordered by op, signature, device and thread count, measured ones first, then by error."""
        return self._database.read(lambda session: queries.plans(session, where))

    def devices(self) -> list[DeviceRecord]:
        """Return every device."""
        return self._database.read(queries.devices)

    def runs(self) -> list[RunRecord]:
        """Return every run, oldest first."""
        return self._database.read(queries.runs)

    def summary(self, **where: Unpack[TrialFilter]) -> list[ProblemSummary]:
        """Return what is known of each problem, on each device, with each thread count."""
        return self._database.read(lambda session: queries.summary(session, where))

    def counts(self) -> Counts:
        """Return how many rows of each kind there are."""
        return self._database.read(queries.counts)

    def check(self) -> list[str]:
        """Examine everything that is stored and return one sentence for each thing that is wrong. Reads it all."""
        return examine(self._database)


def _make_directory(directory: Path) -> None:
    try:
        make_private_folder(directory)
    except OSError as error:
        raise TilewrightError(
            f"the directory {directory} for the database cannot be made: {disks.reason(error)}; name a file with --db"
        ) from error
