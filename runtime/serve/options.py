"""What everything that serves kernels lets its user choose, in one place."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tilewright.codegen.hardware.cores import cores
from tilewright.errors import TilewrightError

FilePath = str | os.PathLike[str]

_DEVICE_TYPES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a plan is chosen and served; ``Experts``, ``Gate.of``, ``prepare``, ``enable`` and the others all take one.

    ::

        options = ServeOptions(database="team.db", max_error=0.01)
        layers = [Experts(w_up, w_down, top_k=2, options=options) for w_up, w_down in weights]

    Raises:
        TilewrightError: when a field is impossible; the sentence names it.

    """

    threads: int | None = None
    """Threads of a call; None: ``torch.get_num_threads()`` at the time when weights are prepared, or fewer where a
    cgroup's quota allows the time of fewer cores."""
    database: FilePath | None = None
    """Path or SQLite URL of the database with the plans; None: ``$TILEWRIGHT_DB``, else the user's own."""
    verify_key: FilePath | None = None
    """PEM file with the public key that has to have signed the pack (``tune pack --sign``); nothing else is served
    then. None: ``$TILEWRIGHT_VERIFY_KEY``, and without that nothing has to be signed."""
    max_error: float = 0.0
    """Largest relative error of the output that storing weights in fewer bits may bring,
    ``||out - exact|| / ||exact||`` of one stage as it was measured when the plan was made. Of the plans within it the
    fastest serves. 0: weights stay as they are."""
    batch_invariant: bool = False
    """Whether a token (of attention: a sequence) must get the same bits whatever else is in the batch. Only plans of
    ``tune --batch-invariant`` serve then; where there is none the constructor refuses, and tensors that its kernels
    cannot take are refused by the call, because plain torch adds up in other orders."""
    keep_weights: bool | None = None
    """Whether the weights stay in memory beside what kernels read. True: plain torch reads them for sizes that it
    serves. False: it reads what kernels read, which is slower, and the originals can be freed. None: they are kept
    where a caller hands them over, and released where ``enable`` replaces those of a model."""
    device: str | torch.device = "cpu"
    """Where an op without weights is served (``Gate``, ``PagedDecode``, ``VarlenPrefill``): ``cpu``, ``cuda``,
    ``cuda:1``. Weights decide it where there are any."""
    check_values: bool = False
    """Whether offsets, indices, lengths, pages and logits are looked at on a GPU, too, before anything reads them.
    Every call then waits for the device. On a CPU they always are."""
    workspace: Callable[[int], object] | None = None
    """On a GPU: gives so many bytes there as a tensor; asked once for each op and stream, and again where a call needs
    more. None: torch's allocator does. For an engine that sets memory aside (``workspace_bytes`` says how much)."""

    def __post_init__(self) -> None:
        threads, max_error = self.threads, self.max_error
        if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
            raise TilewrightError(f"threads={threads!r} is impossible; give a whole number of at least 1")
        if not isinstance(self.database, str | os.PathLike | None):
            raise TilewrightError(f"database={self.database!r} is impossible; give a path or an SQLite URL")
        if not isinstance(self.verify_key, str | os.PathLike | None):
            raise TilewrightError(f"verify_key={self.verify_key!r} is impossible; give the path of a PEM file")
        if not isinstance(max_error, int | float) or isinstance(max_error, bool) or not 0 <= max_error < math.inf:
            raise TilewrightError(f"max_error={max_error!r} is impossible; give a number of at least 0, such as 0.01")
        if not isinstance(self.batch_invariant, bool):
            raise TilewrightError(f"batch_invariant={self.batch_invariant!r} is impossible; give True or False")
        if not isinstance(self.keep_weights, bool | None):
            raise TilewrightError(f"keep_weights={self.keep_weights!r} is impossible; give True, False or None")
        if not isinstance(self.check_values, bool):
            raise TilewrightError(f"check_values={self.check_values!r} is impossible; give True or False")
        if self.workspace is not None and not callable(self.workspace):
            raise TilewrightError(f"workspace={self.workspace!r} is impossible; give a function of a number of bytes")
        _require_known(self.device)

    @property
    def torch_device(self) -> torch.device:
        """:attr:`device` as torch names it."""
        return torch.device(self.device)

    @property
    def thread_count(self) -> int:
        """Threads of a call that is prepared now."""
        if self.threads is not None:
            return self.threads
        quota = cores().quota
        return torch.get_num_threads() if quota is None else min(torch.get_num_threads(), max(1, math.floor(quota)))


def _require_known(device: object) -> None:
    try:
        kind = torch.device(device).type if isinstance(device, str | torch.device) else ""
    except RuntimeError:
        kind = ""
    if kind not in _DEVICE_TYPES:
        raise TilewrightError(f"device={device!r} is impossible; give cpu, cuda, or one GPU such as cuda:0")
