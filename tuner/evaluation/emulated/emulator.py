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

from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.codegen.numbers.dtypes import ITEMSIZE, from_bytes, to_bytes
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.recipe.expressions import IntExpr
from tilewright.codegen.recipe.model import Argument, Recipe, TensorSpec
from tilewright.codegen.workers.channel import Message
from tilewright.codegen.workers.process import ONE_THREAD, WorkerHungError, WorkerLostError, WorkerProcess

EMULATED_SM_COUNT = 3
"""Multiprocessors that persistent kernels see: few, so that every program goes through several tiles."""

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
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tilewright-emulation-")))
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
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            # A file of its own: Python caches the text of sources by path.
            path = self._folder / f"kernel_{self._runs}.py"
            path.write_text(source)
            sizes = {**_sizes(recipe, tensors), **(output_sizes or {})}
            buffers = _Buffers(folder)
            for spec in recipe.tensors:
                if spec.role == "output":
                    nbytes = int(np.prod(_shape(spec, sizes))) * ITEMSIZE[spec.dtype]
                    buffers.add(spec.name, None, nbytes)
                elif spec.name in tensors:
                    data = to_bytes(tensors[spec.name], spec.dtype)
                    buffers.add(spec.name, data, len(data))
            buffers.add("workspace", None, recipe.workspace_for(sizes))
            request = {
                "source": str(path),
                "buffers": buffers.described,
                "launches": [
                    _launch(launch.entry, launch.arguments, launch.grid, entry, recipe, sizes, buffers)
                    for launch, entry in zip(recipe.launches, entries, strict=True)
                ],
            }
            answer = self._request(request)
            path.unlink()
            if "error" in answer:
                raise EmulationError(str(answer["error"]))
            return {
                spec.name: from_bytes((folder / spec.name).read_bytes(), spec.dtype).reshape(_shape(spec, sizes))
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

    def _request(self, request: Message) -> Message:
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


def _sizes(recipe: Recipe, tensors: Arrays) -> dict[str, int]:
    """Sizes that recipes' expressions name."""
    sizes = {"threads": 1, "sm_count": EMULATED_SM_COUNT}
    for spec in recipe.tensors:
        if spec.name in tensors and spec.role != "weight":
            lengths = zip(spec.dims, tensors[spec.name].shape, strict=True)
            sizes.update({dim: length for dim, length in lengths if isinstance(dim, str)})
    return sizes


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims)


def _launch(
    entry: str,
    arguments: Sequence[Argument],
    grid: Sequence[str],
    spec: EntrySpec,
    recipe: Recipe,
    sizes: Mapping[str, int],
    buffers: _Buffers,
) -> dict[str, Any]:
    """One launch, with what its entry may touch: every tensor, and every part of workspace and weight by itself."""
    described: list[dict[str, Any]] = []
    extents = []
    packed = next((t.name for t in recipe.tensors if t.role == "weight" and len(t.dims) == 3), "")
    for argument, (name, kind) in zip(arguments, spec.arguments, strict=True):
        if argument.kind == "size":
            described.append({"value": IntExpr(argument.source).evaluate(sizes)})
            continue
        buffer = {"tensor": argument.source, "workspace": "workspace", "scales": packed}[argument.kind]
        offset = 0
        if argument.kind != "tensor" and argument.source:
            offset = IntExpr(argument.source).evaluate(sizes)
        address = {"buffer": buffer, "offset": offset, "type": kind}
        if argument.map:
            address["shape"] = [IntExpr(each).evaluate(sizes) for each in argument.map.shape]
        described.append(address)
        others = [other for other in _offsets(recipe, argument.kind, sizes) if other > offset]
        if argument.kind == "tensor" and buffer == packed:
            others = _offsets(recipe, "scales", sizes)
        extents.append(
            {
                "name": name,
                "buffer": buffer,
                "offset": offset,
                "nbytes": min(others) - offset if others else buffers.described[buffer]["nbytes"] - offset,
                "writable": buffers.described[buffer]["written"],
            }
        )
    return {
        "entry": entry,
        "grid": [IntExpr(each).evaluate(sizes) for each in grid],
        "arguments": described,
        "constants": dict(spec.constants),
        "extents": extents,
    }


def _offsets(recipe: Recipe, kind: str, sizes: Mapping[str, int]) -> list[int]:
    """Where parts of the workspace, or the scales behind the weight, begin."""
    return [
        IntExpr(argument.source).evaluate(sizes) if argument.source else 0
        for launch in recipe.launches
        for argument in launch.arguments
        if argument.kind == kind and kind != "tensor"
    ]
