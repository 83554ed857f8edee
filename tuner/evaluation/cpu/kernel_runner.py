"""Where kernels and data meet: makes programs of them, and runs a kernel once to see whether it is right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tilewright.codegen.recipe.resolve import Place, workspace_bytes
from tilewright.runtime.launchers.host_so import host_layout
from tilewright.tuner.evaluation.checking import compare_all
from tilewright.tuner.evaluation.contest import survived
from tilewright.tuner.evaluation.cpu.binding import bind
from tilewright.tuner.evaluation.cpu.session import Program, Session
from tilewright.tuner.evaluation.cpu.shared_memory import Block, SharedRegion
from tilewright.tuner.evaluation.cpu.weights import WeightStore
from tilewright.tuner.evaluation.faults import KernelFaultError
from tilewright.tuner.evaluation.outcome import BuiltKernel
from tilewright.tuner.evaluation.problems import ProblemData
from tilewright.tuning_db.records import Outcome


@dataclass(frozen=True)
class Mode:
    """How a kernel is called."""

    threads: int
    fork: bool = True
    """Whether it gets more threads than the calling one."""

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return threads if self.fork else f"{threads} asked for, none given"


class KernelRunner:
    """The worker, the weights and one workspace for all kernels, as long as the largest that was asked for."""

    def __init__(self, session: Session, weights: WeightStore, tolerance: float) -> None:
        self.session = session
        self.weights = weights
        self._tolerance = tolerance
        self._workspace: SharedRegion | None = None

    def reserve(self, kernels: Iterable[BuiltKernel], data: ProblemData, threads: int) -> None:
        """Have weights and workspace ready, so that programs of all ``kernels`` can be made and run together."""
        kernels = list(kernels)
        self.weights.require([host_layout(kernel.recipe) for kernel in kernels])
        place = Place(threads=threads)
        needed = (workspace_bytes(each.recipe, inputs.sizes, place) for each in kernels for inputs in data.sets)
        self._grow(max(needed, default=0))

    def program(
        self, kernel: BuiltKernel, data: ProblemData, set_index: int, mode: Mode, *, poison_workspace: bool = False
    ) -> Program:
        """One call of ``kernel``, for which was reserved, on one of the problem's input sets."""
        inputs = data.sets[set_index]
        return bind(
            kernel,
            {**self.weights.tensors(host_layout(kernel.recipe), set_index), **inputs.tensors},
            self._workspace_block(kernel, data, set_index, mode),
            inputs.sizes,
            threads=mode.threads,
            fork=mode.fork,
            poison_workspace=poison_workspace,
        )

    def checked_run(self, kernel: BuiltKernel, data: ProblemData, mode: Mode) -> float:
        """Run ``kernel``, for which was reserved, on the first input set; its relative error.

        Raises:
            KernelFaultError: when it fails (crashes: twice), or the result is wrong.

        """
        return survived(lambda: self._checked_run(kernel, data, mode))

    def close(self) -> None:
        """End the worker and free weights and workspace."""
        self.session.close()
        self.weights.close()
        if self._workspace is not None:
            self.session.release([self._workspace])
            self._workspace = None

    def _checked_run(self, kernel: BuiltKernel, data: ProblemData, mode: Mode) -> float:
        program = self.program(kernel, data, 0, mode, poison_workspace=True)
        inputs = data.sets[0]
        written = {**inputs.output_blocks(), "workspace": self._workspace_block(kernel, data, 0, mode)}
        for block in written.values():
            block.lay_canaries()
        self.session.run([program])
        for name, block in written.items():
            if damage := block.damage():
                raise KernelFaultError(Outcome.WRONG, f"wrote outside its {name}: {damage}", program)
        reference = data.references[kernel.recipe.precision]
        comparison = compare_all(inputs.results(), reference, self._tolerance)
        if comparison.complaint:
            raise KernelFaultError(Outcome.WRONG, comparison.complaint, program, error=comparison.error)
        return comparison.error

    def _grow(self, nbytes: int) -> None:
        if self._workspace is None or self._workspace.capacity_bytes < nbytes:
            if self._workspace is not None:
                self.session.release([self._workspace])
            self._workspace = SharedRegion(nbytes)

    def _workspace_block(self, kernel: BuiltKernel, data: ProblemData, set_index: int, mode: Mode) -> Block:
        if self._workspace is None:
            raise RuntimeError("a program was made before its workspace was reserved")
        nbytes = workspace_bytes(kernel.recipe, data.sets[set_index].sizes, Place(threads=mode.threads))
        return Block(self._workspace, nbytes)
