"""Variants of an op's examples, with data and what must come out."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from covering import sample_rows
from numpy.typing import NDArray

from tilewright.codegen.hardware.archs import CPU_ARCHS, Arch, CpuArch
from tilewright.codegen.numbers.precisions import LOSSLESS, Precision, find_precision
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.ops.template import Template
from tilewright.codegen.space import Config, Space
from tilewright.runtime.weights.dequantising import dequantise
from tilewright.runtime.weights.quantising import quantise


@dataclass(frozen=True)
class Case:
    """A variant to build and run."""

    op: str
    signature: Signature
    config: Config
    arch: Arch

    @property
    def template(self) -> Template[Any]:
        return find_op(self.op).template(self.config)

    @property
    def precision(self) -> str:
        return self.config.get("precision") or LOSSLESS

    def __str__(self) -> str:
        fields = [
            f"{name}={value}"
            for name, value in {**self.signature.to_dict(), **self.config}.items()
            if value is not None and name not in ("op", "template") and not name.endswith("_dtype")
        ]
        return f"{self.config['template']} {self.arch.name} {' '.join(fields)}"


def only_adds_products(arch: Arch) -> bool:
    """Whether ``arch`` is another one with instructions for products of integers, which only some templates use."""
    twins = (
        each for each in CPU_ARCHS.values() if isinstance(arch, CpuArch) and each.vector_bytes == arch.vector_bytes
    )
    return any(each.machine == arch.machine and set(each.features) < set(arch.features) for each in twins)


def templates_of(op_name: str, arch: Arch) -> list[Template[Any]]:
    """Templates that ``arch`` can run in some precision."""
    return [
        template
        for template in find_op(op_name).templates
        if arch.family in template.families
        and (not template.precisions or any(template.exclusion(name, arch) is None for name in template.precisions))
    ]


def space_of(op_name: str, template: Template[Any], signature: Signature, arch: Arch) -> Space:
    """Configs of one template, in every precision that these weights can be stored in."""
    if not template.precisions:
        return template.space(signature, arch)
    refusals = find_op(op_name).precisions(signature, arch)
    return template.space(signature, arch, tuple(name for name in template.precisions if refusals[name] is None))


def cases(arch: Arch) -> list[Case]:
    """For every template of ``arch``: every value of a knob and every signature, or every pair of them."""
    return [
        case
        for op in OPS.values()
        for template in templates_of(op.name, arch)
        for case in _covering_cases(op.name, template, arch)
    ]


def few_cases(arch: Arch, count: int) -> list[Case]:
    """``count`` cases of every template, drawn at random, of signatures as different as there are."""
    random = np.random.default_rng(0)
    chosen = []
    for op in OPS.values():
        for template in templates_of(op.name, arch):
            signatures = [each for each in examples_of(op.name).signatures if template.applies(each, arch)]
            for number in range(count):
                signature = signatures[(2 * number + 1) * len(signatures) // (2 * count)]
                own = space_of(op.name, template, signature, arch)
                config = Config.of(template.name, own[int(random.integers(len(own)))])
                chosen.append(Case(op.name, signature, config, arch))
    return chosen


def precision_cases(arch: Arch) -> list[Case]:
    """One case of every template and kind of quantised element, of a signature that all of them suit."""
    random = np.random.default_rng(0)
    chosen = []
    for op in OPS.values():
        for template in templates_of(op.name, arch):
            kinds = {find_precision(name).dtype: name for name in template.precisions if name != LOSSLESS}
            for name in kinds.values():
                signature = next(s for s in reversed(examples_of(op.name).signatures) if op.precisions(s)[name] is None)
                own = template.space(signature, arch, (name,))
                config = Config.of(template.name, own[int(random.integers(len(own)))])
                chosen.append(Case(op.name, signature, config, arch))
    return chosen


def _covering_cases(op_name: str, template: Template[Any], arch: Arch) -> list[Case]:
    blocks = []
    values: dict[str, dict[Any, int]] = {}
    for number, signature in enumerate(examples_of(op_name).signatures):
        if not template.applies(signature, arch):
            continue
        space = space_of(op_name, template, signature, arch)
        columns = [np.full(len(space), number)]
        for index, parameter in enumerate(space.parameters):
            seen = values.setdefault(parameter.name, {})
            codes = np.array([seen.setdefault(value, len(seen)) for value in parameter.values])
            columns.append(codes[space.indices[:, index]])
        blocks.append(np.column_stack([*columns, np.arange(len(space))]))
    table = np.concatenate(blocks)
    made = []
    for row in sample_rows(table[:, :-1], seed=0):
        signature = examples_of(op_name).signatures[table[row, 0]]
        config = space_of(op_name, template, signature, arch)[int(table[row, -1])]
        made.append(Case(op_name, signature, Config.of(template.name, config), arch))
    return made


def problems(op_name: str, signature: Signature) -> tuple[Problem, ...]:
    """The op's own awkward problems, and what more is worth a test but not a check of every kernel."""
    own = find_op(op_name).awkward_problems(signature)
    return (*own, *examples_of(op_name).more_problems(own[0]))


@dataclass(frozen=True, eq=False)
class Example:
    """A problem with its data and what must come out."""

    problem: Problem
    inputs: Arrays
    expected: Arrays


@lru_cache
def weights(op_name: str, signature: Signature) -> Arrays:
    return find_op(op_name).weights(signature, seed=0)


def rounded(weight: NDArray[np.float32], precision: Precision) -> NDArray[np.float32]:
    """``weight`` [experts, n, k] with the values that it has once it is stored in ``precision``."""
    words = (torch.from_numpy(quantise(each, precision).view(np.int32)) for each in weight)
    return np.stack([dequantise(each, precision, weight.shape[2]).numpy() for each in words])


@lru_cache
def examples(op_name: str, signature: Signature, precision: str = LOSSLESS) -> tuple[Example, ...]:
    """Data of all problems of a signature, and of one with values far beyond what activations flatten.

    What must come out is computed with the weights and activations as they are in ``precision``.
    """
    op = find_op(op_name)
    stored = weights(op_name, signature)
    if precision != LOSSLESS:
        stored = {**stored, "weight": rounded(stored["weight"], find_precision(precision))}
    drawn = [(problem, op.inputs(problem, seed)) for seed, problem in enumerate(problems(op_name, signature))]
    problem, inputs = drawn[1]
    if "x" in inputs:
        # A sum is off by parts of itself; where an output is clamped, that must stay little beside the limit.
        beyond = 8 if getattr(signature, "activation", "") == "swiglu_clamped" else 200
        drawn.append((problem, {**inputs, "x": inputs["x"] * np.float32(beyond)}))
    return tuple(
        Example(problem, inputs, op.reference(signature, stored, op.rounded_inputs(signature, inputs, precision)))
        for problem, inputs in drawn
    )
