"""Python processes that do what may crash: compilers, the interpreter, kernels."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Environment of a process whose libraries start no threads: with several, it cannot be forked safely."""


def start_python(
    module: str,
    arguments: Sequence[object],
    *,
    log: int | IO[Any],
    handles: Sequence[int],
    environment: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    """Start ``python -m module arguments...`` in a session and process group of its own.

    It imports what this process would, has ``handles`` (file descriptors) open under the same numbers, reads nothing,
    and writes what it prints to ``log``.
    """
    return subprocess.Popen(
        # -P: the current directory may hold anything.
        [sys.executable, "-P", "-m", module, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=tuple(handles),
        start_new_session=True,
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
