"""What everything that serves kernels lets its user choose: one class, the same everywhere, its mistakes named."""

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright import runtime
from tilewright.errors import TilewrightError
from tilewright.runtime import Experts, Gate, PagedDecode, PreparedCall, ServeOptions, VarlenPrefill, prepare
from tilewright.runtime.transformers import enable

CONSTRUCTORS = {
    "Experts": Experts,
    "Gate.of": Gate.of,
    "PagedDecode.of": PagedDecode.of,
    "VarlenPrefill.of": VarlenPrefill.of,
    "PreparedCall.prepare": PreparedCall.prepare,
    "prepare": prepare,
    "enable": enable,
    "grouped_gemm": runtime.grouped_gemm,
    "moe_up": runtime.moe_up,
    "moe_down": runtime.moe_down,
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_takes_all_options_as_one_and_none_beside_it(name: str) -> None:
    parameters = inspect.signature(CONSTRUCTORS[name]).parameters
    assert parameters["options"].default == ServeOptions()
    assert parameters["options"].kind is inspect.Parameter.KEYWORD_ONLY
    assert not parameters.keys() & {field.name for field in fields(ServeOptions)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threads": 0}, "threads=0 is impossible; give a whole number of at least 1"),
        ({"threads": True}, "threads=True is impossible"),
        ({"threads": "2"}, "threads='2' is impossible"),
        ({"database": 3}, "database=3 is impossible; give a path"),
        ({"database": b"plans.db"}, "database=b'plans.db' is impossible"),
        ({"max_error": -1}, "max_error=-1 is impossible; give a number of at least 0"),
        ({"max_error": float("nan")}, "max_error=nan is impossible"),
        ({"max_error": float("inf")}, "max_error=inf is impossible"),
        ({"max_error": True}, "max_error=True is impossible"),
        ({"max_error": "much"}, "max_error='much' is impossible"),
        ({"batch_invariant": 1}, "batch_invariant=1 is impossible; give True or False"),
        ({"batch_invariant": None}, "batch_invariant=None is impossible"),
        ({"keep_weights": "yes"}, "keep_weights='yes' is impossible; give True, False or None"),
    ],
)
def test_an_impossible_option_is_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(TilewrightError, match=said) as refusal:
        ServeOptions(**options)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        ServeOptions,
        threads=st.none() | st.integers(1),
        database=st.none()
        | st.sampled_from(["", "plans.db", "sqlite:///plans.db"])
        | st.builds(Path, st.just("plans.db")),
        max_error=st.floats(0, 10) | st.integers(0, 3),
        batch_invariant=st.booleans(),
        keep_weights=st.none() | st.booleans(),
    )
)
def test_equal_options_are_equal_keys(options: ServeOptions) -> None:
    copy = ServeOptions(**{field.name: getattr(options, field.name) for field in fields(options)})
    assert {options: 1}[copy] == 1
    assert options.thread_count == (options.threads or torch.get_num_threads())


def test_threads_are_torchs_own_when_weights_are_prepared() -> None:
    options, before = ServeOptions(), torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert options.thread_count == before + 1
    finally:
        torch.set_num_threads(before)
    assert options.thread_count == before
