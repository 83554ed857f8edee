"""The parent's side: a rendered source, its recipe and tensors in; the outputs, or why there are none, out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from tilewright import disks
from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.codegen.numbers.dtypes import ITEMSIZE, from_bytes, to_bytes
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.recipe.model import WORKSPACE, Recipe
from tilewright.codegen.workers.channel import Message
from tilewright.codegen.workers.process import ONE_THREAD, WorkerHungError, WorkerLostError, WorkerProcess
from tilewright.errors import TilewrightError
from tilewright.temporary import temporary_folder
from tilewright.tuner.evaluation.emulated.launches import (
    EmulatedBuffer,
    describe_launches,
    emulated_workspace_bytes,
    sizes_of,
)
from tilewright.tuner.evaluation.tensors import shape_of

_START_LIMIT_S = 120.0


class EmulationError(Exception):
    """A kernel could not be run to its end; the message says why, in one sentence."""


@dataclass
class _Buffers:
    """What a run's memory consists of: files under ``folder``, named by tensor."""

    folder: Path
    described: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, data: bytes | None, nbytes: int) -> None:
        """A buffer that begins with ``data``, or is poisoned and read back."""
        path = self.folder / name
        if data is not None:
            path.write_bytes(data)
        self.described[name] = {"path": str(path), "nbytes": nbytes, "written": data is None}

    @property
    def extents(self) -> dict[str, EmulatedBuffer]:
        """How large each is, and whether it is written."""
        return {name: EmulatedBuffer(each["nbytes"], each["written"]) for name, each in self.described.items()}


class Emulator:
    """Runs Triton sources in a worker process that has the mended interpreter.

    Use as a context manager. The worker is started with the first run, and again after a kernel took it down.

    Args:
        limit_s: wall seconds for one run, after which it is killed.

    """

    def __init__(self, limit_s: float = 60.0) -> None:
        self.limit_s = limit_s
        self._worker: WorkerProcess | None = None
        self._stack = ExitStack()
        with disks.writing(disks.TEMPORARY):
            self._folder = self._stack.enter_context(temporary_folder())
        self._runs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop_worker()
        self._stack.close()

    def run(
        self,
        source: str,
        entries: Sequence[EntrySpec],
        recipe: Recipe,
        tensors: Arrays,
        output_sizes: Mapping[str, int] | None = None,
    ) -> Arrays:
        """Outputs of a kernel called with ``tensors``, by name: floats as float32 of the outputs' dtype.

        ``tensors`` holds everything but the outputs: floats as float32, the packed weight as bytes (uint8).
        ``output_sizes`` are those that no input shows (:attr:`Problem.output_sizes`).

        Raises:
            EmulationError: when the kernel failed, crashed, or took longer than the limit.

        """
        self._runs += 1
        with disks.writing(self._folder), tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            # A file of its own: Python caches the text of sources by path.
            path = self._folder / f"kernel_{self._runs}.py"
            path.write_text(source)
            sizes = {**sizes_of(recipe, tensors), **(output_sizes or {})}
            buffers = _Buffers(folder)
            for spec in recipe.tensors:
                if spec.role == "output":
                    nbytes = int(np.prod(shape_of(spec, sizes))) * ITEMSIZE[spec.dtype]
                    buffers.add(spec.name, None, nbytes)
                elif spec.name in tensors:
                    data = to_bytes(tensors[spec.name], spec.dtype)
                    buffers.add(spec.name, data, len(data))
            try:
                buffers.add(WORKSPACE, None, emulated_workspace_bytes(recipe, sizes))
                launches = describe_launches(recipe, entries, sizes, buffers.extents)
            except TilewrightError as error:
                raise EmulationError(f"its recipe does not suit the problem: {error}") from error
            request = {"source": str(path), "buffers": buffers.described, "launches": launches}
            answer = self.ask(request)
            path.unlink()
            if "error" in answer:
                if said := disks.printed_meaning(str(answer["error"])):  # no fault of the kernel's
                    raise TilewrightError(f"{self._folder} cannot be written: {said}")
                raise EmulationError(str(answer["error"]))
            return {
                spec.name: from_bytes((folder / spec.name).read_bytes(), spec.dtype).reshape(shape_of(spec, sizes))
                for spec in recipe.tensors
                if spec.role == "output"
            }

    def start(self) -> None:
        """Start the worker without waiting for it, so that the first run need not wait so long.

        It ends with the thread that started it.
        """
        self._running_worker()

    def _running_worker(self) -> WorkerProcess:
        if self._worker is None or not self._worker.is_running:
            self._drop_worker()
            self._worker = WorkerProcess(
                "tilewright.tuner.evaluation.emulated.worker",
                start_limit_s=_START_LIMIT_S,
                environment={**os.environ, "TRITON_INTERPRET": "1", **ONE_THREAD},
            )
        return self._worker

    def ask(self, request: Message) -> Message:
        """What the worker (emulated/worker.py) answers to a request: of launches that are described already.

        Raises:
            EmulationError: when it crashed, or took longer than the limit.

        """
        worker = self._running_worker()
        try:
            worker.wait_until_ready()
        except WorkerLostError as error:
            self._drop_worker()
            raise EmulationError(f"the interpreter did not start: {error}") from error
        try:
            return worker.ask(request, limit_s=self.limit_s)
        except WorkerHungError as error:
            self._drop_worker()
            raise EmulationError(f"{error} in the interpreter") from error
        except WorkerLostError as error:
            self._drop_worker()
            raise EmulationError(str(error)) from error

    def _drop_worker(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
