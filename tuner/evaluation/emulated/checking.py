"""Is a variant's source right? Its template with its knobs on small problems, against the op's reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.codegen.backends.triton.entry import triton_entries
from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.numbers.layouts import RowLayout
from tilewright.codegen.numbers.precisions import find_precision
from tilewright.codegen.ops.base import Arrays, OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature, stable_key
from tilewright.codegen.recipe.model import packable
from tilewright.codegen.rendering import render
from tilewright.codegen.space import Config
from tilewright.errors import TilewrightError
from tilewright.runtime.weights.row_packing import pack_rows, round_rows
from tilewright.tuner.evaluation.checking import PrecisionError, compare_all, compare_precisions
from tilewright.tuner.evaluation.emulated.emulator import EmulationError, Emulator


@dataclass(frozen=True)
class EmulatedCheck:
    """What the interpreter found of one variant. It speaks of source and knobs, never of a binary."""

    error: float | None
    """Largest relative error, max |out - reference| / max |reference|; None where a run did not finish."""
    complaint: str | None
    """What is wrong, in one sentence; None when it is right."""
    sizes: str
    """The problems that it ran on."""

    @property
    def evidence(self) -> str:
        """How ``emulated`` came about, to be stored with it."""
        return f"source and knobs in Triton's interpreter, mended, on {self.sizes}"


class EmulatedChecker:
    """Checks variants of one op for one arch; what was checked once is not run again.

    Args:
        op: declares reference, tolerance and templates.
        arch: that the variants are rendered for.
        emulator: runs them.

    """

    def __init__(self, op: OpDeclaration[Any, Any], arch: GpuArch, emulator: Emulator) -> None:
        self._op = op
        self._arch = arch
        self._emulator = emulator
        self._known: dict[str, EmulatedCheck] = {}

    def check(self, signature: Signature, config: Config) -> EmulatedCheck:
        """Run ``config`` on the small problems that its template names for ``signature``.

        Raises:
            TilewrightError: when the template cannot be emulated.

        """
        template = self._op.template(config)
        if template.emulated_problems is None:
            raise TilewrightError(f"template {template.name} has no problems to be emulated on; it is compiled only")
        problems = template.emulated_problems(signature, config, self._arch)
        key = self._identity(config, problems)
        if key not in self._known:
            self._known[key] = self._run(config, problems)
        return self._known[key]

    def _identity(self, config: Config, problems: Sequence[Problem]) -> str:
        """All that the interpreter sees of a config: knobs that only the compiler hears of make no other run."""
        template, seen = self._op.template(config), []
        for problem in problems:
            source = render(template, problem.signature, config, self._arch)
            code = [line for line in source.splitlines() if not line.startswith("#")]
            recipe = template.recipe(problem.signature, config, self._arch).to_dict()
            launches = [{**launch, "block": ()} for launch in recipe["launches"]]
            seen.append([problem.key, code, {**recipe, "launches": launches}])
        return stable_key({"seen": seen})

    def _run(self, config: Config, problems: Sequence[Problem]) -> EmulatedCheck:
        sizes = "; ".join(_describe(problem) for problem in problems)
        worst = 0.0
        for seed, problem in enumerate(problems):
            try:
                outputs = run_emulated(self._op, problem, config, self._arch, self._emulator, seed)
            except EmulationError as error:
                return EmulatedCheck(None, f"{error} ({_describe(problem)})", sizes)
            expected = rounded_reference(self._op, problem, config.get("precision"), seed)
            comparison = compare_all(outputs, expected, self._op.tolerance(problem.signature))
            worst = max(worst, comparison.error)
            if comparison.complaint:
                return EmulatedCheck(worst, f"{comparison.complaint} ({_describe(problem)})", sizes)
        return EmulatedCheck(worst, None, sizes)


def run_emulated(
    op: OpDeclaration[Any, Any], problem: Problem, config: Config, arch: GpuArch, emulator: Emulator, seed: int
) -> Arrays:
    """Outputs of a variant on a problem's own data.

    Raises:
        EmulationError: when the kernel did not run to its end.

    """
    signature, template = problem.signature, op.template(config)
    assert template.entries is not None
    recipe = template.recipe(signature, config, arch)
    tensors = {**op.inputs(problem, seed), **op.weights(signature, seed)}
    weight = packable(op.tensors(signature))
    if weight is not None and isinstance(recipe.weight_layout, RowLayout):
        tensors[weight.name] = pack_rows(tensors[weight.name], recipe.weight_layout)
    source = render(template, signature, config, arch)
    entries = triton_entries(template.entries(signature, config, arch))
    return emulator.run(source, entries, recipe, tensors, problem.output_sizes)


def rounded_reference(op: OpDeclaration[Any, Any], problem: Problem, precision: str | None, seed: int) -> Arrays:
    """What a right kernel computes: the reference with weights and activations as ``precision`` rounds them."""
    signature = problem.signature
    weights, inputs = op.weights(signature, seed), op.inputs(problem, seed)
    weight = packable(op.tensors(signature))
    if precision is not None and weight is not None:
        rounded = round_rows(weights[weight.name], find_precision(precision), weight.dtype)
        weights = {**weights, weight.name: rounded}
        inputs = op.rounded_inputs(signature, inputs, precision)
    return op.reference(signature, weights, inputs)


def gpu_precision_error(op: OpDeclaration[Any, Any], problem: Problem, precision: str, seed: int = 0) -> PrecisionError:
    """What ``precision`` costs on ``problem``: its exact result against that of unrounded weights and activations."""
    exact = op.reference(problem.signature, op.weights(problem.signature, seed), op.inputs(problem, seed))
    return compare_precisions(rounded_reference(op, problem, precision, seed), exact)


def _describe(problem: Problem) -> str:
    fields = {**problem.signature.to_dict(), **problem.to_dict()}
    return " ".join(
        f"{name}={value}"
        for name, value in fields.items()
        if name not in ("op", "signature") and not name.endswith("_dtype")
    )
