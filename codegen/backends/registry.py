"""Every backend by its language. A backend is imported when it is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cache

from tilewright.codegen.backends.base import Backend, Builder
from tilewright.codegen.hardware.archs import Arch
from tilewright.errors import TilewrightError

_BACKENDS = {
    "cpp": "tilewright.codegen.backends.cpp.backend:CppBackend",
    "triton": "tilewright.codegen.backends.triton.backend:TritonBackend",
}
"""Module and class of each language's backend."""

LANGUAGES = tuple(_BACKENDS)


@cache
def find_backend(language: str) -> Backend:
    """Backend by its language.

    Raises:
        TilewrightError: for a language that has none.

    """
    if language not in _BACKENDS:
        raise TilewrightError(f"no backend builds {language!r} templates; known languages: {', '.join(_BACKENDS)}")
    module, _, name = _BACKENDS[language].partition(":")
    backend: Backend = getattr(importlib.import_module(module), name)()
    return backend


class Builders(Mapping[str, Builder]):
    """Builders for one arch by language, each made when it is first asked for. Close them when done.

    The mapping holds every language; whether a compiler is there shows when its builder is asked for.
    """

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        self._made: dict[str, Builder] = {}

    def __getitem__(self, language: str) -> Builder:
        """The builder for ``language``.

        Raises:
            KeyError: for an unknown language.
            TilewrightError: when its compiler is missing or too old.

        """
        if language not in _BACKENDS:
            raise KeyError(language)
        if language not in self._made:
            self._made[language] = find_backend(language).builder(self._arch)
        return self._made[language]

    def __iter__(self) -> Iterator[str]:
        return iter(_BACKENDS)

    def __len__(self) -> int:
        return len(_BACKENDS)

    def close(self) -> None:
        """End what the builders started."""
        for builder in self._made.values():
            builder.close()
