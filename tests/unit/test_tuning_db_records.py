from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuning_db_samples import artifact, kernel, plan, trial

from tilewright.errors import TilewrightError
from tilewright.tuner.plan.facts import costs_text
from tilewright.tuning_db import codec
from tilewright.tuning_db.integrity import seal, sha256_hex
from tilewright.tuning_db.records import CHECKED_LEVELS, TIMINGS, Outcome, PlanEntry, TrialRecord

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | NUMBERS | NAMES
CONFIGS = st.dictionaries(NAMES, st.none() | NAMES | st.integers(-9, 99) | st.booleans(), max_size=4)
DOCUMENTS = st.dictionaries(
    NAMES, st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3), max_leaves=6), max_size=4
)


def stored(columns: dict[str, Any]) -> dict[str, Any]:
    """Columns as a database gives them back: documents went through JSON text."""
    return {
        name: codec.loads(codec.dumps(value)) if isinstance(value, dict | list) else value
        for name, value in columns.items()
    }


@given(
    config=CONFIGS,
    problem=DOCUMENTS,
    outcome=st.sampled_from(Outcome),
    samples_us=st.lists(NUMBERS, max_size=5).map(tuple),
    error=st.none() | st.floats(allow_nan=False),
    message=NAMES,
    timed=st.none() | st.tuples(st.sampled_from(TIMINGS[1:]), NUMBERS),
)
def test_a_trial_survives_its_columns(timed: tuple[Any, float] | None, **fields: Any) -> None:
    timing, median_us = ("none", None) if timed is None else timed
    record = trial("run", timing=timing, median_us=median_us, **fields)
    assert codec.decode(TrialRecord, {"id": 7, **stored(codec.encode_trial(record))}) == replace(record, id=7)


@given(signature=DOCUMENTS, config=CONFIGS, recipe=DOCUMENTS, facts=DOCUMENTS, source=NAMES, toolchain=NAMES)
def test_a_kernel_survives_its_columns(**fields: Any) -> None:
    record = kernel(artifact(), **fields)
    assert codec.decode_kernel(stored(codec.encode_kernel(record)), record.artifacts) == record


@given(
    bounds=st.lists(st.integers(1, 2**40), min_size=1, max_size=6, unique=True).map(sorted),
    times=st.none() | NUMBERS,
    documents=st.fixed_dictionaries({"signature": DOCUMENTS, "facts": DOCUMENTS}),
)
def test_a_plan_survives_its_columns(bounds: list[int], times: float | None, documents: dict[str, Any]) -> None:
    record = plan("k", entries=tuple(PlanEntry(bound, "k", times, 2, bound) for bound in bounds), **documents)
    entries = [codec.encode(entry) for entry in record.entries]
    assert codec.decode_plan(stored(codec.encode_plan(record)), entries) == record


@pytest.mark.parametrize(
    "change",
    [
        {"source": "int run(void) { return 1; }"},
        {"recipe": {"launches": []}},
        {"recipe": {}},
        {"recipe": None},
        {"recipe": []},
        {"facts": {"spills": 1}},
        {"checked": "devicf"},
        {"created_at": "yesterday"},
        {"arch": None},
        {"seal": "0" * 64},
    ],
)
def test_a_kernel_that_was_changed_is_refused(change: dict[str, Any]) -> None:
    record = kernel(artifact())
    row = {**codec.encode_kernel(record), **change}
    with pytest.raises(codec.UndecodableError, match="a kernel"):
        codec.decode_kernel(row, record.artifacts)


def test_a_kernel_whose_artifacts_were_swapped_is_refused() -> None:
    record = kernel(artifact(), artifact(b"other"))
    with pytest.raises(codec.UndecodableError, match="checksum"):
        codec.decode_kernel(codec.encode_kernel(record), reversed(record.artifacts))


@pytest.mark.parametrize(
    "entry_change", [{"max_size": 17}, {"kernel_key": "c"}, {"kernel_key": None}, {"median_us": None}]
)
def test_a_plan_that_was_changed_is_refused(entry_change: dict[str, Any]) -> None:
    record = plan("k")
    first, last = (codec.encode(entry) for entry in record.entries)
    with pytest.raises(codec.UndecodableError, match="a plan"):
        codec.decode_plan(codec.encode_plan(record), [{**first, **entry_change}, last])
    with pytest.raises(codec.UndecodableError, match="a plan"):
        codec.decode_plan(codec.encode_plan(record), [last, first])


def test_a_seal_looks_at_content_alone() -> None:
    assert seal({"a": 1, "b": (1, 2)}) == seal({"b": [1, 2], "a": 1})
    assert seal({"a": 1}) != seal({"a": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        seal({"a": float("nan")})


def test_an_artifact_is_named_by_its_bytes() -> None:
    assert artifact(b"abc").checksum == sha256_hex(b"abc")
    # The first test vector of FIPS 180.
    assert sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(ValueError, match="artifact kind is one of host_so, cubin, hsaco"):
        replace(artifact(), kind="dll")


@pytest.mark.parametrize(
    "changes",
    [
        {"timing": "none"},
        {"median_us": None},
        {"median_us": float("nan")},
        {"median_us": float("inf")},
        {"timing": "guessed"},
    ],
)
def test_a_trial_has_a_time_exactly_where_it_was_timed(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"timing|median_us"):
        trial("run", **changes)


@pytest.mark.parametrize("bounds", [[], [2, 1], [1, 1], [None, 4], [None, None]])
def test_a_plans_sizes_rise(bounds: list[int | None]) -> None:
    with pytest.raises(ValueError, match="rising sizes"):
        plan("k", entries=tuple(PlanEntry(bound, "k") for bound in bounds))


def test_a_plan_finds_the_entry_for_a_size() -> None:
    first, second, rest = PlanEntry(1, "a"), PlanEntry(16, "b"), PlanEntry(None, None)
    record = plan("k", entries=(first, second, rest))
    assert [record.entry_for(tokens) for tokens in (1, 2, 16, 17, 10**9)] == [first, second, second, rest, rest]
    assert plan("k", entries=(first,)).entry_for(2) is None


def test_levels_of_checking_rise() -> None:
    assert CHECKED_LEVELS == ("none", "compiled", "emulated", "device")


@pytest.mark.parametrize("changes", [{"created_at": 1e308}, {"created_at": -1.0}, {"config": {"block_m": [64]}}])
def test_what_no_trial_or_kernel_could_have_is_refused(changes: dict[str, Any]) -> None:
    for record in (trial("run"), kernel(artifact())):
        with pytest.raises(ValueError, match=r"created_at counts seconds|a config's values"):
            replace(record, **changes)


@pytest.mark.parametrize("facts", [{"layout_cost": "1.0"}, {"layout_cost": 1.0, "packed_bytes": "many"}])
def test_facts_that_tune_did_not_write_are_one_sentence(facts: dict[str, Any]) -> None:
    with pytest.raises(TilewrightError, match=r"are not what `tune` writes .*; tune again"):
        costs_text(replace(plan("k"), facts=facts, layout="panel8_fp32"))
