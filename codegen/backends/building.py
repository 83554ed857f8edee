"""What all builders share: building side by side, and tidying up after builds that were killed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tilewright import disks
from tilewright.codegen.backends.base import Build, Source
from tilewright.codegen.hardware.cores import usable_cores
from tilewright.errors import TilewrightError

DRAFT = "build-"
"""How the names of folders begin in which something is being built."""


def refuse_full_disk(toolchain: str, said: str, folder: Path) -> None:
    """Refuse to take a disk that failed under a compiler, which ``said`` this, for a fault of what it compiled.

    Raises:
        TilewrightError: names what failed. Nothing is to be remembered of the variant.

    """
    found = disks.printed_meaning(said)
    if found is None and (disks.is_full(folder) or disks.is_full(Path(os.environ.get("TMPDIR") or "/tmp"))):
        found = disks.FULL
    if found is not None:
        raise TilewrightError(
            f"{toolchain} could not build kernels in {folder} or {disks.TEMPORARY}: {found}, or set $TILEWRIGHT_CACHE "
            "or $TMPDIR to another disk"
        )


def side_by_side(
    build: Callable[[Source, threading.Event], Build],
    sources: Sequence[Source],
    jobs: int | None,
    progress: Callable[[int], None] | None,
) -> list[Build]:
    """Run ``build`` on every source, ``jobs`` (None: as many as there are cores) at a time.

    After an exception, Ctrl-C among them, its event is set: what runs then has to end.
    """
    stop = threading.Event()

    def build_one(source: Source) -> Build:
        with disks.writing("the folder of built kernels"):
            return build(source, stop)

    with ThreadPoolExecutor(jobs or usable_cores()) as pool:
        futures = [pool.submit(build_one, source) for source in sources]
        try:
            for done, _ in enumerate(as_completed(futures), start=1):
                if progress:
                    progress(done)
        except BaseException:
            # Only the main thread hears of Ctrl-C, and compilers have sessions of their own.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]
