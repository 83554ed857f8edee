"""Every op by name. An op is a package; its declaration is imported when it is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from tilewright.codegen.ops.base import OpDeclaration
from tilewright.errors import TilewrightError

_DECLARATIONS = {
    "moe_gemm": "tilewright.codegen.ops.moe_gemm.declaration:MoeGemm",
    "gating": "tilewright.codegen.ops.gating.declaration:Gating",
    "attention": "tilewright.codegen.ops.attention.declaration:Attention",
}
"""Module and class of each op's declaration."""


class _Ops(Mapping[str, OpDeclaration[Any, Any]]):
    """Declarations by the op's name, imported and made when they are first read."""

    def __init__(self) -> None:
        self._loaded: dict[str, OpDeclaration[Any, Any]] = {}

    def __getitem__(self, name: str) -> OpDeclaration[Any, Any]:
        if name not in self._loaded:
            module, _, declaration = _DECLARATIONS[name].partition(":")
            self._loaded[name] = getattr(importlib.import_module(module), declaration)()
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_DECLARATIONS)

    def __len__(self) -> int:
        return len(_DECLARATIONS)


OPS: Mapping[str, OpDeclaration[Any, Any]] = _Ops()


def find_op(name: str) -> OpDeclaration[Any, Any]:
    """Op by name.

    Raises:
        TilewrightError: for an unknown name.

    """
    if name not in OPS:
        raise TilewrightError(f"unknown op {name!r}; known ops: {', '.join(OPS)}")
    return OPS[name]
