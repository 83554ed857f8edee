"""Kernels of one order give a token the same bits: alone, in any batch, on any number of threads, from any of them.

A template that declares an order (``Template.order``) is covered without a change here, as is a new op.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awkward import problems, space_of, templates_of, weights
from covering import FULL
from guarded_calls import Call, forking, run_kernel, tensors_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tilewright.codegen.backends.base import Source
from tilewright.codegen.backends.cpp.builder import CppBuilder
from tilewright.codegen.hardware.archs import native_arch
from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.rendering import render
from tilewright.codegen.space import Config

PER_TEMPLATE = 2
"""Variants of every template and order, drawn at random."""
PER_SIGNATURE = 8 if FULL else 1
"""Orders of every signature and precision, drawn at random from what may be dozens."""
CALLS = (Call("one thread", 1), Call("two threads", 2, forking(2)))
ARCH = native_arch()


def orders(op_name: str, signature: Signature, seed: int) -> dict[str, list[Config]]:
    """By order: variants of every template that has it."""
    op, random = find_op(op_name), np.random.default_rng(seed)
    found: dict[str, list[Config]] = defaultdict(list)
    for template in templates_of(op_name, ARCH):
        if not template.applies(signature, ARCH):
            continue
        space = space_of(op_name, template, signature, ARCH)
        drawn: dict[str, int] = defaultdict(int)
        for index in random.permutation(len(space))[:400]:
            config = Config.of(template.name, space[int(index)])
            order = op.order_key(signature, config, ARCH)
            if order is not None and drawn[order] < PER_TEMPLATE:
                drawn[order] += 1
                found[order].append(config)
    return found


def _cases() -> Iterator[tuple[str, Signature, str]]:
    """Every signature with its weights as declared; other precisions with the last signature of each stage."""
    for op_name in OPS:
        signatures = examples_of(op_name).signatures
        last = {getattr(signature, "stage", ""): signature for signature in signatures}
        for seed, signature in enumerate(signatures):
            by_precision: dict[str, list[str]] = defaultdict(list)
            for order, configs in orders(op_name, signature, seed).items():
                by_precision[configs[0].get("precision") or LOSSLESS].append(order)
            for precision, found in by_precision.items():
                if precision == LOSSLESS or signature in last.values():
                    some = np.random.default_rng(seed).permutation(len(found))[:PER_SIGNATURE]
                    yield from ((op_name, signature, found[int(index)]) for index in sorted(some))


CASES = list(_cases())


class Kernels:
    """Built variants of one signature and order, to be called on any part of a batch."""

    def __init__(self, op_name: str, signature: Any, configs: list[Config]) -> None:
        op = find_op(op_name)
        self.op_name, self.signature = op_name, signature
        sources = [render(op.template(config), signature, config, ARCH) for config in configs]
        builds = CppBuilder(ARCH).build_all([Source(text) for text in sources])
        recipes = [op.template(config).recipe(signature, config, ARCH) for config in configs]
        self._kernels: list[tuple[Path, Recipe]] = []
        for build, recipe in zip(builds, recipes, strict=True):
            assert build.path is not None, build.message
            self._kernels.append((build.path, recipe))

    def __len__(self) -> int:
        return len(self._kernels)

    def run(self, number: int, inputs: Arrays, call: Call) -> Arrays:
        path, recipe = self._kernels[number]
        stored = weights(self.op_name, self.signature)
        expected = find_op(self.op_name).reference(self.signature, stored, inputs)
        return run_kernel(path, recipe, tensors_for(recipe, stored, inputs), expected, call)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} {examples_of(case[0]).signatures.index(case[1])} {case[2]}")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    op_name, signature, order = request.param
    configs = orders(op_name, signature, examples_of(op_name).signatures.index(signature))[order]
    return Kernels(op_name, signature, configs)


@settings(
    max_examples=8,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_token_gets_the_same_bits_in_every_batch(kernels: Kernels, data: st.DataObject) -> None:
    op_name, signature = kernels.op_name, kernels.signature
    every = problems(op_name, signature)
    problem = every[data.draw(st.integers(0, len(every) - 1), label="problem")]
    inputs = find_op(op_name).inputs(problem, seed=1)
    tokens = examples_of(op_name).tokens_of(signature, inputs)
    if not tokens:
        return
    chosen = data.draw(
        st.one_of(
            st.integers(0, tokens - 1).map(lambda token: {token}),
            st.sets(st.integers(0, tokens - 1), min_size=1, max_size=min(tokens, 40)),
        ),
        label="tokens",
    )
    number, other = (data.draw(st.integers(0, len(kernels) - 1), label=each) for each in ("kernel", "other kernel"))
    whole = kernels.run(number, inputs, data.draw(st.sampled_from(CALLS), label="call"))
    part = examples_of(op_name).part_of(signature, inputs, np.asarray(sorted(chosen)))
    alone = kernels.run(other, part.inputs, data.draw(st.sampled_from(CALLS), label="other call"))
    for name, rows in part.rows.items():
        assert whole[name][rows].tobytes() == alone[name][: len(rows)].tobytes(), name
