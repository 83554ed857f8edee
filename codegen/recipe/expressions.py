"""Integer expressions over a problem's sizes: the closed grammar in which recipes state grids and workspaces.

``+ - * //`` on non-negative literals and size names, parentheses, and the functions ``min``, ``max`` and
``ceildiv``. An expression is compiled once to reverse Polish notation, which the runtime's C code evaluates
without a parser, and Python never calls ``eval``.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache

from tilewright.errors import TilewrightError


class Op(IntEnum):
    """Instructions of the stack machine; the numbers are part of the runtime's ABI."""

    CONSTANT = 0
    SYMBOL = 1
    ADD = 2
    SUBTRACT = 3
    MULTIPLY = 4
    FLOOR_DIVIDE = 5
    CEIL_DIVIDE = 6
    MINIMUM = 7
    MAXIMUM = 8


MAX_LENGTH = 1000
"""Characters of an expression; recipes are read from files, and nesting without end would exhaust the stack."""

_MAX_CONSTANT = (1 << 63) - 1
_BINARY = {ast.Add: Op.ADD, ast.Sub: Op.SUBTRACT, ast.Mult: Op.MULTIPLY, ast.FloorDiv: Op.FLOOR_DIVIDE}
_FUNCTIONS = {"min": Op.MINIMUM, "max": Op.MAXIMUM, "ceildiv": Op.CEIL_DIVIDE}


@dataclass(frozen=True)
class IntExpr:
    """An integer expression, kept as its text.

    Raises:
        TilewrightError: when the text is outside the grammar.

    """

    text: str

    def __post_init__(self) -> None:
        _ = self._steps

    @cached_property
    def _steps(self) -> tuple[tuple[Op, int | str], ...]:
        if len(self.text) > MAX_LENGTH:
            raise TilewrightError(
                f"recipe expression {self.text[:40]!r}... has {len(self.text)} characters; {MAX_LENGTH} are the most"
            )
        try:
            tree = ast.parse(self.text, mode="eval")
            steps: list[tuple[Op, int | str]] = []
            self._emit(tree.body, steps)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            # Nested too deeply it is one of the last two; texts with half characters or zeros are a ValueError.
            reason = error.msg if isinstance(error, SyntaxError) else "it is too deep, or no text"
            raise TilewrightError(
                f"recipe expression {self.text!r:.200} is not an integer expression: {reason}"
            ) from error
        return tuple(steps)

    def _emit(self, node: ast.expr, steps: list[tuple[Op, int | str]]) -> None:
        match node:
            case ast.Constant(value=int(value)) if not isinstance(value, bool) and value <= _MAX_CONSTANT:
                steps.append((Op.CONSTANT, value))
            case ast.Name(id=name):
                steps.append((Op.SYMBOL, name))
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _BINARY:
                self._emit(left, steps)
                self._emit(right, steps)
                steps.append((_BINARY[type(operator)], 0))
            case ast.Call(func=ast.Name(id=name), args=[left, right], keywords=[]) if name in _FUNCTIONS:
                self._emit(left, steps)
                self._emit(right, steps)
                steps.append((_FUNCTIONS[name], 0))
            case _:
                raise TilewrightError(
                    f"recipe expression {self.text!r:.200} uses {ast.unparse(node)!r:.100}; "
                    "only + - * //, min, max, ceildiv, 64-bit integers and size names are allowed"
                )

    @property
    def symbols(self) -> frozenset[str]:
        """Names of the sizes that the expression reads."""
        return frozenset(str(value) for op, value in self._steps if op is Op.SYMBOL)

    def program(self, symbols: Sequence[str], constants: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """Reverse Polish code as a flat tuple ``(op, operand, op, operand, ...)``; symbols become indices.

        Names in ``constants`` become their values.

        Raises:
            TilewrightError: when the expression reads a name that neither ``symbols`` nor ``constants`` hold.

        """
        constants = constants or {}
        if unknown := self.symbols - set(symbols) - set(constants):
            raise TilewrightError(f"recipe expression {self.text!r} reads unknown sizes {sorted(unknown)}")
        code: list[int] = []
        for op, value in self._steps:
            if isinstance(value, int):
                code += (int(op), value)
            elif value in constants:
                code += (int(Op.CONSTANT), constants[value])
            else:
                code += (int(op), symbols.index(value))
        return tuple(code)

    def evaluate(self, sizes: Mapping[str, int]) -> int:
        """Value of the expression for ``sizes``.

        Raises:
            TilewrightError: for a missing size or a division by zero.

        """
        stack: list[int] = []
        for op, value in self._steps:
            if op is Op.CONSTANT:
                stack.append(int(value))
            elif op is Op.SYMBOL:
                if value not in sizes:
                    raise TilewrightError(f"recipe expression {self.text!r} needs the size {value!r}")
                stack.append(sizes[str(value)])
            else:
                right, left = stack.pop(), stack.pop()
                stack.append(self._apply(op, left, right))
        return stack.pop()

    def _apply(self, op: Op, left: int, right: int) -> int:
        if op in (Op.FLOOR_DIVIDE, Op.CEIL_DIVIDE) and right == 0:
            raise TilewrightError(f"recipe expression {self.text!r} divides by zero")
        match op:
            case Op.ADD:
                return left + right
            case Op.SUBTRACT:
                return left - right
            case Op.MULTIPLY:
                return left * right
            case Op.FLOOR_DIVIDE:
                return left // right
            case Op.CEIL_DIVIDE:
                return -(-left // right)
            case Op.MINIMUM:
                return min(left, right)
            case _:
                return max(left, right)


@lru_cache(maxsize=4096)
def parsed(text: str) -> IntExpr:
    """``text`` parsed, once per process: recipes have few different expressions, and calls evaluate them often.

    Raises:
        TilewrightError: when the text is outside the grammar.

    """
    return IntExpr(text)
