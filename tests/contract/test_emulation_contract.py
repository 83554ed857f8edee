"""Every Triton template of every op, in the interpreter, against the op's reference; a new one needs no change here.

A template gets a few cases that hold as many values of its knobs as so few can; with ``TILEWRIGHT_FULL=1`` every pair
of two knobs' values, and of a knob's value and a signature.
"""

from collections.abc import Iterator

import pytest
from awkward import Case
from covering import FULL
from gpu_signatures import emulated_cases, fnuz_cases, persistent_cases

from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.ops.registry import find_op
from tilewright.tuner.evaluation.emulated.checking import EmulatedChecker
from tilewright.tuner.evaluation.emulated.emulator import Emulator

SHARE = 4
"""Cases of a template, where not all are run."""
LIMIT_S = 250.0
"""For one run, of what takes a second or two: on a busy machine it takes longer, and is as right."""


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator(LIMIT_S) as one:
        yield one


def require_right(case: Case, emulator: Emulator) -> None:
    found = EmulatedChecker(find_op(case.op), GPU_ARCHS[case.arch.name], emulator).check(case.signature, case.config)
    assert found.complaint is None
    assert found.error is not None


@pytest.mark.parametrize("case", emulated_cases(SHARE), ids=str)
def test_variant_matches_the_reference_in_the_interpreter(case: Case, emulator: Emulator) -> None:
    require_right(case, emulator)


@pytest.mark.skipif(FULL, reason="the full set holds more of this template")
@pytest.mark.parametrize("case", persistent_cases(), ids=str)
def test_persistent_programs_match_the_reference_in_every_precision(case: Case, emulator: Emulator) -> None:
    require_right(case, emulator)


@pytest.mark.parametrize("case", fnuz_cases(), ids=str)
def test_fp8_matches_the_reference_where_its_bits_are_halved(case: Case, emulator: Emulator) -> None:
    require_right(case, emulator)
