"""How numbers, shapes and tables are written for people."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.tuner.report.text import (
    format_interval,
    format_ratio,
    format_shape,
    format_us,
    labelled,
    table,
    terminal_width,
)


@pytest.mark.parametrize(
    ("time_us", "text"),
    [
        (0.1234, "0.123 us"),
        (9.996, "10.0 us"),
        (99.96, "100 us"),
        (999.4, "999 us"),
        (999.7, "1.00 ms"),
        (13180.7, "13.2 ms"),
        (999_700.0, "1.00 s"),
        (61e6, "61.0 s"),
    ],
)
def test_a_time_has_three_digits_and_a_fitting_unit(time_us, text):
    assert format_us(time_us) == text


@given(st.floats(1e-3, 1e8))
def test_a_time_reads_back_within_its_digits(time_us):
    number, unit = format_us(time_us).split()
    assert float(number) * {"us": 1, "ms": 1e3, "s": 1e6}[unit] == pytest.approx(time_us, rel=6e-3)
    assert unit == "us" or float(number) >= 1


def test_an_interval_is_in_the_unit_of_its_median():
    assert format_us(998.0) == "998 us"
    assert format_interval(998.0, 990.0, 2100.0) == "990-2100"
    assert format_interval(13180.7, 13094.9, 13351.8) == "13.1-13.4"
    assert format_interval(5.0, None, None) == "-"


def test_a_ratio_has_its_interval():
    assert format_ratio(1.2345, 1.1, 10.95) == "1.23x 1.10-10.9"


def test_a_shape_says_dtypes_once_and_leaves_out_what_is_off():
    signature = MoeGemmSignature(stage="up", experts=8, n=16, k=32, top_k=2, activation="swiglu").to_dict()
    assert format_shape(signature) == "moe_gemm stage=up experts=8 n=16 k=32 top_k=2 activation=swiglu fp32"
    mixed = {**signature, "activation": "none", "bias": True, "w_dtype": "int8"}
    assert format_shape(mixed) == "moe_gemm stage=up experts=8 n=16 k=32 top_k=2 bias=True x=fp32 w=int8 out=fp32"


ROWS = [("abc", "1.5 ms", "left", "7"), ("d", "20 ms", "x", "-")]
HEAD = ("key", "time", "word", "n")


def test_numbers_stand_to_the_right_and_words_to_the_left():
    assert table(HEAD, ROWS) == [
        "key    time  word  n",
        "abc  1.5 ms  left  7",
        "d     20 ms  x     -",
    ]


def test_what_does_not_fit_goes_below_under_the_first_column():
    assert table(HEAD, ROWS, width=12) == [
        "key    time",
        "abc  1.5 ms",
        "d     20 ms",
        "",
        "key  word  n",
        "abc  left  7",
        "d    x     -",
    ]


@given(st.integers(1, 60))
def test_no_cell_is_lost_at_any_width(width):
    lines = table(HEAD, ROWS, width=width)
    words = " ".join(lines).split()
    assert {"1.5", "20", "left", "x", "7"} <= set(words)
    assert all(len(line) <= max(width, len("abc  1.5 ms")) for line in lines)


def test_a_labelled_line_is_broken_between_words():
    assert labelled("facts", "a=1 b=2", width=None) == ["facts      a=1 b=2"]
    assert labelled("facts", "alpha=1 beta-x=2", width=23) == ["facts      alpha=1", " " * 11 + "beta-x=2"]


def test_output_that_is_no_terminal_has_no_width(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal_width() is None
    monkeypatch.setenv("COLUMNS", "100")
    assert terminal_width() == 100
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr("sys.stdout", None)
    assert terminal_width() is None
