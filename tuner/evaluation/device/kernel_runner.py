"""Where kernels and data meet: makes programs of them, and runs a kernel once to see whether it is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tilewright.codegen.backends.registry import find_backend
from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.numbers.layouts import RowLayout
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.recipe.model import WORKSPACE, Recipe
from tilewright.codegen.recipe.resolve import Place, resolve, workspace_bytes
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.base import KernelRefused
from tilewright.tuner.evaluation.checking import compare_all
from tilewright.tuner.evaluation.contest import survived
from tilewright.tuner.evaluation.device.problems import DeviceProblem
from tilewright.tuner.evaluation.device.session import DeviceBuffer, DeviceProgram, DeviceSession
from tilewright.tuner.evaluation.device.weights import DeviceWeights
from tilewright.tuner.evaluation.faults import KernelFaultError
from tilewright.tuner.evaluation.outcome import BuiltKernel
from tilewright.tuner.evaluation.tensors import SOMEWHERE, refusal
from tilewright.tuning_db.records import Outcome

ALIGNMENT = 256
"""Of every address, as device allocators give them."""
_READ_BACK_BYTES = 4 << 20
"""Of an input that is read back after a checked call, to see whether it was written to."""


class DeviceRunner:
    """The worker, the weights and the workspaces of the kernels that were last reserved for.

    Args:
        op: of all kernels.
        arch: of the device.
        session: the worker.
        weights: of all kernels.
        place: the device, as recipes ask for it.
        tolerance: of the op.

    """

    def __init__(
        self,
        op: OpDeclaration[Any, Any],
        arch: GpuArch,
        session: DeviceSession,
        weights: DeviceWeights,
        place: Place,
        tolerance: float,
    ) -> None:
        self.session = session
        self.weights = weights
        self._op, self._arch = op, arch
        self._place = place
        self._tolerance = tolerance
        self._workspaces: dict[int, DeviceBuffer] = {}
        """By their bytes, so that a guard lies right behind what a kernel asked for."""
        self._recipes: dict[str, Recipe] = {}

    def recipe(self, kernel: BuiltKernel) -> Recipe:
        """How ``kernel`` is called, with what only its binaries tell.

        Raises:
            KernelRefused: when it has no binaries for this driver, or other ones than the recipe says.

        """
        if kernel.key not in self._recipes:
            kinds = {file.kind for file in kernel.files}
            if kinds != {"cubin"}:
                found = " and ".join(sorted(kinds)) or "no"
                raise KernelRefused(f"kernel {kernel.key} has {found} artifacts; a CUDA driver loads cubin")
            if not isinstance(kernel.recipe.weight_layout, RowLayout | None):
                raise KernelRefused(f"kernel {kernel.key} reads weights in panels, which are of CPUs")
            self._recipes[kernel.key] = self._built(kernel)
        return self._recipes[kernel.key]

    def refusal(self, kernel: BuiltKernel, data: DeviceProblem) -> str | None:
        """Why a guard of ``kernel`` refuses the problem; None when none does."""
        why = (refusal(kernel.recipe, inputs.sizes, self._place, ALIGNMENT) for inputs in data.sets)
        return next(filter(None, why), None)

    def groups(self, kernels: Sequence[BuiltKernel]) -> list[list[int]]:
        """Split indices into ``kernels`` into groups whose weights fit the device together, in order."""
        return self.weights.groups([_layout(kernel) for kernel in kernels])

    def reserve(self, kernels: Iterable[BuiltKernel], data: DeviceProblem) -> None:
        """Have weights ready, so that programs of all ``kernels`` can be made and run together."""
        kernels = list(kernels)
        self.weights.require([_layout(kernel) for kernel in kernels])
        needed = {self._workspace_bytes(kernel, data, index) for kernel in kernels for index in range(len(data.sets))}
        for nbytes in self._workspaces.keys() - needed:
            self.session.release([self._workspaces.pop(nbytes)])
        for nbytes in needed:
            self._workspaces.setdefault(nbytes, DeviceBuffer(nbytes))

    def program(self, kernel: BuiltKernel, data: DeviceProblem, set_index: int) -> DeviceProgram:
        """One call of ``kernel``, for which was reserved, on one of the problem's input sets."""
        inputs, recipe = data.sets[set_index], self.recipe(kernel)
        workspace = self._workspaces[self._workspace_bytes(kernel, data, set_index)]
        tensors = {**self.weights.tensors(_layout(kernel), set_index), **inputs.tensors}
        buffers = {**tensors, WORKSPACE: workspace}
        call = resolve(recipe, inputs.sizes, dict.fromkeys(buffers, SOMEWHERE), self._place)
        zero = (workspace,) if recipe.workspace_zeroed else ()
        written = tuple(inputs.tensors[spec.name] for spec in inputs.outputs)
        return DeviceProgram(
            binaries=tuple(file.path for file in kernel.files),
            recipe=recipe,
            launches=call.launches,
            buffers=buffers,
            workspace=workspace,
            poison=written if zero else (*written, workspace),
            zero=zero,
        )

    def checked_run(self, kernel: BuiltKernel, data: DeviceProblem) -> float:
        """Run ``kernel``, for which was reserved, on the first input set; its relative error.

        Raises:
            KernelFaultError: when it fails (crashes: twice), or the result is wrong.

        """
        return survived(lambda: self._checked_run(kernel, data))

    def close(self) -> None:
        """End the worker, and with it all memory."""
        self.session.close()
        self.weights.close()
        self._workspaces.clear()

    def _checked_run(self, kernel: BuiltKernel, data: DeviceProblem) -> float:
        program, inputs = self.program(kernel, data, 0), data.sets[0]
        self.session.run(program)
        for name, buffer in program.buffers.items():
            if complaint := self._trespass(name, buffer):
                self.session.renew()  # what was written to belongs to others, too
                raise KernelFaultError(Outcome.WRONG, complaint, program)
        results = {
            spec.name: inputs.result(spec, self.session.read(inputs.tensors[spec.name])) for spec in inputs.outputs
        }
        comparison = compare_all(results, data.references[kernel.recipe.precision], self._tolerance)
        if comparison.complaint:
            raise KernelFaultError(Outcome.WRONG, comparison.complaint, program, error=comparison.error)
        return comparison.error

    def _trespass(self, name: str, buffer: DeviceBuffer) -> str | None:
        """What was written where nothing should be; None when nothing was."""
        if damage := self.session.damage(buffer):
            return f"wrote outside its {name}: {damage}"
        if buffer.content is None or buffer.nbytes > _READ_BACK_BYTES:
            return None
        changed = int(np.count_nonzero(self.session.read(buffer) != buffer.content))
        return f"wrote to its input {name}: {changed} bytes of it changed" if changed else None

    def _built(self, kernel: BuiltKernel) -> Recipe:
        recipe = kernel.recipe
        if all(launch.artifact for launch in recipe.launches):
            return recipe  # it was stored
        backend = find_backend(self._op.template(kernel.config).language)
        names = [file.path.name for file in kernel.files]
        try:
            launches = backend.built_launches(recipe.launches, kernel.files, names, self._arch)
        except KernelRefused:
            raise
        except TilewrightError as error:
            raise KernelRefused(str(error)) from error
        return replace(recipe, launches=launches)

    def _workspace_bytes(self, kernel: BuiltKernel, data: DeviceProblem, set_index: int) -> int:
        return workspace_bytes(kernel.recipe, data.sets[set_index].sizes, self._place)


def _layout(kernel: BuiltKernel) -> RowLayout | None:
    layout = kernel.recipe.weight_layout
    assert isinstance(layout, RowLayout | None)
    return layout
