"""A pack: one read-only file with the plans and the kernels that they name, for deployment. No trials, no history."""

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tilewright import disks
from tilewright.errors import TilewrightError
from tilewright.tuning_db.faults import explain
from tilewright.tuning_db.records import PlanRecord
from tilewright.tuning_db.signing import SUFFIX, signature_of, signature_path
from tilewright.tuning_db.store import Store


@dataclass(frozen=True)
class Pack:
    """What was written."""

    path: Path
    plans: int
    kernels: int
    bytes: int
    signature: Path | None = None
    """File that lies beside the pack; None where it was not signed."""


def write_pack(store: Store, plans: Sequence[PlanRecord], path: Path, *, sign_key: Path | None = None) -> Pack:
    """Write ``plans`` of ``store`` with their devices, kernels and artifacts to the new file ``path``.

    It appears complete or not at all, and is a database like any other: the runtime and `tune show` read it. With
    ``sign_key``, a PEM file with a private key, its signature appears beside it.

    Raises:
        TilewrightError: when the file exists or cannot be written, a kernel of a plan is missing or damaged, or the key
            cannot be used.

    """
    signature = signature_path(path) if sign_key else None
    for each in (path, signature):
        if each is not None and os.path.lexists(each):
            raise TilewrightError(f"{each} exists already; name a new file")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with Store.open(partial) as pack:
            kernels = _copy(store, pack, plans)
        # A single file, that can be read where nothing can be written.
        with closing(sqlite3.connect(partial, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("VACUUM")
        # Links, for they fail where a file has come into being meanwhile.
        if signature is not None and sign_key is not None:
            signature_path(partial).write_text(signature_of(partial, sign_key))
            os.link(signature_path(partial), signature)
        try:
            os.link(partial, path)
        except BaseException:
            if signature is not None:
                signature.unlink()
            raise
    except TilewrightError as error:
        # What is being written has a name of its own until it is whole.
        if str(partial) not in str(error):
            raise
        raise TilewrightError(str(error).replace(f"the database {partial}", f"the pack {path}")) from error
    except ValueError as error:
        raise TilewrightError(f"the pack {path} cannot be made of {store.name}: {error}") from error
    except (OSError, sqlite3.Error) as error:
        reason = disks.reason(error) if isinstance(error, OSError) else str(explain(error, partial))
        raise TilewrightError(f"the pack {path} cannot be written: {reason}") from error
    finally:
        for suffix in ("", "-wal", "-shm", "-journal", SUFFIX):
            partial.with_name(partial.name + suffix).unlink(missing_ok=True)
    return Pack(path, len(plans), kernels, path.stat().st_size, signature)


def _copy(store: Store, pack: Store, plans: Sequence[PlanRecord]) -> int:
    """Copy ``plans`` and all that they need; returns the number of kernels."""
    devices = {plan.device_key for plan in plans}
    for device in store.devices():
        if device.key in devices:
            pack.put_device(device)
    keys = dict.fromkeys(entry.kernel_key for plan in plans for entry in plan.entries if entry.kernel_key)
    for key in keys:
        kernel = store.kernel(key)
        if kernel is None:
            raise TilewrightError(f"kernel {key[:16]}, which a plan names, is not in {store.name}; tune again")
        artifacts = [artifact for checksum in kernel.artifacts if (artifact := store.artifact(checksum))]
        if len(artifacts) < len(kernel.artifacts):
            raise TilewrightError(f"an artifact of kernel {key[:16]} is not in {store.name}; tune again")
        pack.add_kernel(kernel, artifacts)
    for plan in plans:
        pack.put_plan(plan)
    return len(keys)
