"""What an op shows of itself: signatures and data that every test of templates draws from.

An op has a module ``examples`` in its package, with one :class:`OpExamples` called ``EXAMPLES``.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.errors import TilewrightError


@dataclass(frozen=True)
class Part:
    """The inputs of some tokens, and for each output that belongs to tokens: their rows in the whole batch's."""

    inputs: Arrays
    rows: Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True)
class OpExamples:
    """Examples of one op."""

    signatures: tuple[Signature, ...]
    """Signatures that templates for CPUs tend to get wrong: each has something that no other one has."""
    gpu_signatures: tuple[Signature, ...]
    """The same for GPU templates; empty for an op that has none."""
    random_signature: Callable[[random.Random], Signature]
    """Any signature that is possible, drawn by the given generator alone."""
    more_problems: Callable[[Any], tuple[Problem, ...]]
    """Problems like the given one that are worth a test, but not a check of every kernel while tuning."""
    tokens_of: Callable[[Any, Arrays], int]
    """``tokens_of(signature, inputs)``: how many tokens, rows or sequences a batch can be taken apart into."""
    part_of: Callable[[Any, Arrays, NDArray[np.int64]], Part]
    """``part_of(signature, inputs, tokens)``: those tokens, ascending, by themselves."""


def examples_of(op_name: str) -> OpExamples:
    """Examples of an op.

    Raises:
        TilewrightError: where the op's package has no module ``examples`` with ``EXAMPLES``.

    """
    module = f"tilewright.codegen.ops.{op_name}.examples"
    try:
        examples: OpExamples = importlib.import_module(module).EXAMPLES
    except (ModuleNotFoundError, AttributeError) as error:
        raise TilewrightError(
            f"the op {op_name} has no examples for tests ({error}); write {module} with EXAMPLES = OpExamples(...)"
        ) from error
    return examples
