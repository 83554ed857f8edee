"""Typed access to the fields of a Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tilewright.codegen.models.model_shape import MAX_SIZE
from tilewright.errors import TilewrightError

NESTED = ("thinker_config", "text_config", "llm_config", "language_config")
"""Where models that also see or hear keep the config of their language model."""

TOP_K_KEYS = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
"""Where configs say how many experts a token picks."""


class Fields:
    """Typed access to a config; ``null`` counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def error(self, message: str) -> TilewrightError:
        """An error about the file, to be raised."""
        return TilewrightError(f"{self._source}: {message}")

    def first(self, *keys: str) -> tuple[str, Any]:
        """First of ``keys`` that is present and its value, or an empty key."""
        for key in keys:
            if self._values.get(key) is not None:
                return key, self._values[key]
        return "", None

    def size(self, *keys: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        """A whole number; of the first of ``keys`` that is present."""
        key, value = self.first(*keys)
        if not key:
            if default is None:
                raise self.error(f"the field {' or '.join(map(repr, keys))} is missing; use a complete config.json")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(f"{key!r} is {value!r}, but must be a whole number from {least} to {most}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{key!r} is {value!r}, but must be true or false")
        return value

    def number(self, key: str, *, default: float) -> float:
        """A number above 0."""
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(f"{key!r} is {value!r}, but must be a number above 0")
        return float(value)

    def text(self, *keys: str) -> str | None:
        """A string; of the first of ``keys`` that is present."""
        key, value = self.first(*keys)
        if key and not isinstance(value, str):
            raise self.error(f"{key!r} is {value!r}, but must be a string")
        return value if key else None

    def nested(self, key: str) -> Fields:
        """What stands in the object ``key``; nothing where there is none."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(f"{key!r} is {value!r}, but must be an object")
        return Fields(value or {}, f"{self._source}: {key}")

    def texts(self, key: str) -> list[str] | None:
        """A list of strings."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"{key!r} must be a list of strings")
        return value

    def numbers(self, key: str) -> list[int] | None:
        """A list of whole numbers."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise self.error(f"{key!r} must be a list of whole numbers")
        return value


def language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Config of the language model alone; what it does not say itself holds from the level above."""
    for key in NESTED:
        inner = config.get(key)
        if isinstance(inner, Mapping):
            outer = {name: value for name, value in config.items() if name not in NESTED}
            return language_model({**outer, **inner})
    return config
