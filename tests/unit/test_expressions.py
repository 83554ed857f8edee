"""Integer expressions of recipes: their values, their code for the stack machine, and what is outside the grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.recipe.expressions import MAX_LENGTH, IntExpr, Op
from tilewright.errors import TilewrightError

NAMES = ("rows", "tokens", "threads")
PYTHON = {"min": min, "max": max, "ceildiv": lambda a, b: -(-a // b), "__builtins__": {}}

texts = st.recursive(
    st.integers(0, 99).map(str) | st.sampled_from(NAMES),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", "//"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
        | st.tuples(st.sampled_from(["min", "max", "ceildiv"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})")
    ),
    max_leaves=12,
)
sizes = st.fixed_dictionaries({name: st.integers(0, 1 << 20) for name in NAMES})


def run_program(code: Sequence[int], values: Sequence[int]) -> int:
    """The stack machine as codegen/recipe/expressions.py describes it to other languages."""
    binary = {
        Op.ADD: lambda a, b: a + b,
        Op.SUBTRACT: lambda a, b: a - b,
        Op.MULTIPLY: lambda a, b: a * b,
        Op.FLOOR_DIVIDE: lambda a, b: a // b,
        Op.CEIL_DIVIDE: lambda a, b: -(-a // b),
        Op.MINIMUM: min,
        Op.MAXIMUM: max,
    }
    stack: list[int] = []
    for op, operand in zip(code[::2], code[1::2], strict=True):
        if op == Op.CONSTANT:
            stack.append(operand)
        elif op == Op.SYMBOL:
            stack.append(values[operand])
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(binary[Op(op)](left, right))
    (result,) = stack
    return result


@given(texts, sizes)
def test_value_is_what_python_computes(text: str, values: Mapping[str, int]) -> None:
    expression = IntExpr(text)
    try:
        expected = eval(text, dict(PYTHON), dict(values))
    except ZeroDivisionError:
        with pytest.raises(TilewrightError, match="divides by zero"):
            expression.evaluate(values)
        return
    assert expression.evaluate(values) == expected
    assert run_program(expression.program(NAMES), [values[name] for name in NAMES]) == expected


@given(texts)
def test_symbols_are_the_names_it_reads(text: str) -> None:
    expression = IntExpr(text)
    assert expression.symbols == {name for name in NAMES if name in text}
    expression.program(sorted(expression.symbols))


def test_precedence_and_rounding() -> None:
    values = {"rows": 10, "threads": 3}
    assert IntExpr("2 + 3 * rows - 8 // 3").evaluate(values) == 30
    assert IntExpr("rows - 3 - 2").evaluate(values) == 5
    assert IntExpr("(0 - rows) // threads").evaluate(values) == -4
    assert IntExpr("ceildiv(rows, threads)").evaluate(values) == 4
    assert IntExpr("ceildiv(0 - rows, threads)").evaluate(values) == -3


def test_instruction_numbers_are_part_of_the_abi() -> None:
    assert [op.name for op in sorted(Op)] == [
        "CONSTANT",
        "SYMBOL",
        "ADD",
        "SUBTRACT",
        "MULTIPLY",
        "FLOOR_DIVIDE",
        "CEIL_DIVIDE",
        "MINIMUM",
        "MAXIMUM",
    ]
    assert IntExpr("min(4, rows)").program(["tokens", "rows"]) == (0, 4, 1, 1, 7, 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rows +",
        " rows",
        "-1",
        "rows ** 2",
        "rows / 2",
        "rows % 2",
        "rows if rows else 1",
        "rows < 2",
        "rows.bit_length",
        "rows[0]",
        "1.5",
        "True",
        "None",
        "'rows'",
        "min(1)",
        "min(1, 2, 3)",
        "min(*rows)",
        "max(1, b=2)",
        "abs(rows)",
        "__import__('os')",
        "(rows := 1)",
        "lambda: 1",
        "1\0",
        str(1 << 63),
    ],
)
def test_all_else_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(TilewrightError, match=r"^recipe expression ['\"].*['\"] ") as refusal:
        IntExpr(text)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["1" + "+1" * MAX_LENGTH, "(" * MAX_LENGTH + "1" + ")" * MAX_LENGTH])
def test_nesting_without_end_is_refused(text: str) -> None:
    with pytest.raises(TilewrightError, match=f"characters; {MAX_LENGTH} are the most"):
        IntExpr(text)


def test_the_longest_expression_works() -> None:
    text = ("1" + "+1" * MAX_LENGTH)[: MAX_LENGTH - 1]
    assert IntExpr(text).evaluate({}) == MAX_LENGTH // 2


def test_sizes_that_are_missing_are_named() -> None:
    with pytest.raises(TilewrightError, match=r"'4 \* rows' needs the size 'rows'"):
        IntExpr("4 * rows").evaluate({"tokens": 1})
    with pytest.raises(TilewrightError, match=r"reads unknown sizes \['rows', 'threads'\]"):
        IntExpr("threads * rows").program(["tokens"])


@pytest.mark.parametrize("text", ["1 // rows", "ceildiv(1, rows)"])
def test_division_by_zero_is_an_error(text: str) -> None:
    with pytest.raises(TilewrightError, match="divides by zero"):
        IntExpr(text).evaluate({"rows": 0})
