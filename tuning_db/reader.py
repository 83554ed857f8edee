"""The runtime's door to the database: read-only, standard library alone.

A connection lives for one call. That is a fraction of a millisecond, a process asks for each plan once, and nothing
has to be shared between threads or carried over a fork.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tilewright import disks
from tilewright.errors import TilewrightError
from tilewright.tuning_db.codec import UndecodableError, decode_kernel, decode_plan, decoding, parse_sqlite
from tilewright.tuning_db.confined import ConfinedConnection, limited
from tilewright.tuning_db.faults import damaged, explain
from tilewright.tuning_db.integrity import DamagedArtifact, DamagedDatabase, UntrustedFile, check_private, verified
from tilewright.tuning_db.locations import default_key, default_url, require_file, sqlite_path
from tilewright.tuning_db.records import TIMINGS, KernelRecord, PlanRecord
from tilewright.tuning_db.schema import read_only_uri, require_current, schema_version
from tilewright.tuning_db.signing import BadSignature, require_signed

__all__ = ["BadSignature", "DamagedArtifact", "DamagedDatabase", "Reader", "UntrustedFile"]

_BUSY_SECONDS = 5.0

# SQLite's own locks must be free at a fork, or the child would wait for a thread that it does not have.
_access = threading.Lock()
os.register_at_fork(before=_access.acquire, after_in_parent=_access.release, after_in_child=_access.release)


class Reader:
    """Reads plans, kernels and artifacts from a SQLite database or pack.

    Every method may be called from any thread and from forked children, and raises UntrustedFile if the file can be
    written by others, DamagedDatabase if its content is not what was written, and TilewrightError for a file that is
    missing, unreadable or of another schema version.
    """

    def __init__(self, path: Path, verify_key: Path | None = None) -> None:
        self.path = path
        self._verify_key = verify_key

    @classmethod
    def open(
        cls, url_or_path: str | os.PathLike[str] | None = None, *, verify_key: str | os.PathLike[str] | None = None
    ) -> "Reader":
        """Check the file and return its reader; None means the default location.

        ``verify_key``: PEM file with the public key that has to have signed it; None means ``$TILEWRIGHT_VERIFY_KEY``,
        and without that nothing has to be signed. Raises BadSignature for a file that is not.
        """
        url_or_path = default_url() if url_or_path is None else url_or_path
        path = sqlite_path(url_or_path)
        if path is None:
            raise TilewrightError(
                f"kernels are served from SQLite files, not from {url_or_path!s}; name a database file or a pack"
            )
        reader = cls(path, default_key() if verify_key is None else Path(verify_key).expanduser())
        with reader._connected():
            return reader

    def plans_for(self, op: str, signature_key: str) -> tuple[PlanRecord, ...]:
        """Return the plans for a signature on every device, thread count and precision; measured ones come first."""
        with self._connected() as connection, decoding("a plan"):
            rows = connection.execute(
                "SELECT * FROM plans WHERE op = ? AND signature_key = ? "
                "ORDER BY device_key, threads, error, precision, batch_invariant",
                (op, signature_key),
            )
            entries = "SELECT * FROM plan_entries WHERE plan_id = ? ORDER BY position"
            plans = [
                decode_plan(
                    parse_sqlite(PlanRecord, row), limited(connection.execute(entries, (row["id"],)), self.path)
                )
                for row in list(limited(rows, self.path))
            ]
        return tuple(sorted(plans, key=lambda plan: -TIMINGS.index(plan.timing)))

    def kernel(self, key: str) -> KernelRecord:
        """Return the kernel with this key. Raises TilewrightError where there is none."""
        with self._connected() as connection, decoding("a kernel"):
            row = connection.execute("SELECT * FROM kernels WHERE key = ?", (key,)).fetchone()
            if row is None:
                raise TilewrightError(f"the database {self.path} holds no kernel {key[:16]}; tune again")
            artifacts = connection.execute(
                "SELECT checksum FROM kernel_artifacts WHERE kernel_key = ? ORDER BY position", (key,)
            )
            return decode_kernel(
                parse_sqlite(KernelRecord, row), [row["checksum"] for row in limited(artifacts, self.path)]
            )

    def artifact_kinds(self, kernel_key: str) -> tuple[str, ...]:
        """Return the kinds of a kernel's artifacts, each once, in alphabetical order."""
        with self._connected() as connection, decoding("a kernel"):
            rows = connection.execute(
                "SELECT DISTINCT artifacts.kind AS kind FROM kernel_artifacts "
                "JOIN artifacts USING (checksum) WHERE kernel_key = ? ORDER BY kind",
                (kernel_key,),
            )
            return tuple(str(row["kind"]) for row in limited(rows, self.path))

    def artifact(self, checksum: str) -> bytes:
        """Return the bytes with this sha256. Raises DamagedArtifact where the stored bytes have another."""
        with self._connected() as connection, decoding("an artifact"):
            row = connection.execute("SELECT data FROM artifacts WHERE checksum = ?", (checksum,)).fetchone()
            if row is None:
                raise TilewrightError(f"the database {self.path} holds no artifact {checksum[:16]}; tune again")
            if not isinstance(row["data"], bytes):
                raise DamagedArtifact(f"the artifact {checksum[:16]} in {self.path} is damaged; tune again")
            return verified(checksum, row["data"])

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """Open a checked connection inside one read transaction, so that several queries see one state."""
        with _access:
            try:
                require_file(self.path)
                real = check_private(self.path)
                if self._verify_key is not None:
                    require_signed(real, self._verify_key)
                with closing(
                    sqlite3.connect(
                        read_only_uri(real, signed=self._verify_key is not None),
                        uri=True,
                        timeout=_BUSY_SECONDS,
                        isolation_level=None,
                        factory=ConfinedConnection,
                    )
                ) as connection:
                    connection.confine(self.path, writes=False)
                    connection.row_factory = sqlite3.Row
                    require_current(schema_version(connection, self.path), self.path)
                    connection.execute("BEGIN")
                    yield connection
            except OSError as error:  # it was there a moment ago
                raise TilewrightError(
                    f"the database {self.path} cannot be read: {disks.reason(error)}; try again"
                ) from error
            except sqlite3.Error as error:
                raise explain(error, self.path) from error
            except (UndecodableError, UnicodeDecodeError) as error:
                raise damaged(self.path, str(error)) from error
