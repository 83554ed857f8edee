"""The static part of an attention problem, and the tensors of its calls. Light to import: the runtime needs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.model import TensorSpec
from tilewright.errors import TilewrightError

Stage = Literal["decode", "prefill"]
KvLayout = Literal["hnd", "nhd"]

DEFAULT_PAGE_SIZE = 16

_DTYPES = ("fp32", "bf16", "fp16")
_HEAD_STEP = 8
"""Head dims are multiples of it: of every arch's vectors, or of half of one."""
_LATENT_STEP = 16
"""Latent vectors are a multiple of it: operands of a matrix product, without what follows them in a row."""
_MIN_DIM = 16
_MAX_DIM = 1024
_MAX_HEADS = 1 << 12
_MAX_PAGE = 1 << 16
_MAX_WINDOW = 1 << 30
_WHOLE = ("heads", "kv_heads", "head_dim", "value_dim", "page_size", "window")
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, kw_only=True)
class AttentionSignature(Signature):
    """Causal attention of query heads that share key/value heads in groups, over sequences of various lengths.

    ``decode``: one query per sequence, its last token's; keys and values lie in pages, which a block table finds.
    ``prefill``: all tokens of some sequences at once, packed one after the other.

    Raises:
        TilewrightError: when a field is impossible; the sentence names it.

    """

    op: ClassVar[str] = "attention"

    stage: Stage
    heads: int
    """Query heads on this rank. Head h reads the key/value head h // (heads / kv_heads)."""
    kv_heads: int
    head_dim: int
    """Elements of a query and of a key: a multiple of 8, at least 16."""
    value_dim: int = 0
    """Elements of a value and of an output; 0, and afterwards :attr:`head_dim`, where they are as long as keys."""
    latent: bool = False
    """``decode``: whether values are the first ``value_dim`` elements of keys (multi-head latent attention in its
    absorbed form, arXiv 2405.04434): the cache has one row per token for all heads, of which the latent vector comes
    first, then the part with positions. ``kv_heads`` is 1, ``kv_layout`` "" (no heads are there to be put in order)."""
    scale: float = 0.0
    """Factor of q . k before the softmax; 0, and afterwards 1 / sqrt(head_dim), for the usual one."""
    window: int = 0
    """Tokens that a query sees, its own and those before it; 0: all."""
    sinks: bool = False
    """Whether each query head has a learned logit that takes part in the softmax's denominator only (gpt-oss)."""
    page_size: int = 0
    """``decode``: tokens of a page of the cache; 0, and afterwards 16, for the usual size. ``prefill``: 0."""
    kv_layout: str = ""
    """``decode``: order within a page, heads before tokens (``hnd``) or after them (``nhd``); "", and afterwards
    ``hnd``, for what CPUs read best. ``prefill``: "", its tensors are [tokens, heads, dim]."""
    q_dtype: str = "fp32"
    """``fp32`` for CPUs, ``bf16`` or ``fp16`` for GPUs."""
    kv_dtype: str = ""
    """Empty, and afterwards ``q_dtype``; or ``fp8_e4m3`` beside ``bf16`` and ``fp16``, without a scale."""
    out_dtype: str = ""
    """Empty, and afterwards ``q_dtype``; or ``fp32``."""

    def __post_init__(self) -> None:
        if self.stage not in get_args(Stage):
            raise TilewrightError(
                f"attention: unknown stage {self.stage!r}; choose one of {', '.join(get_args(Stage))}"
            )
        self._fill_in()
        paged = self.stage == "decode"
        bounds = {
            "heads": (1, _MAX_HEADS),
            "kv_heads": (1, _MAX_HEADS),
            "head_dim": (_MIN_DIM, _MAX_DIM),
            "value_dim": (_MIN_DIM, _MAX_DIM),
            "window": (0, _MAX_WINDOW),
            "page_size": (1, _MAX_PAGE) if paged else (0, 0),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not _is_whole(value) or not least <= value <= most:
                expected = str(least) if least == most else f"a whole number from {least} to {most}"
                raise TilewrightError(f"attention: {name}={value!r} is impossible; give {expected}")
        for name in ("head_dim", "value_dim"):
            if getattr(self, name) % _HEAD_STEP:
                raise TilewrightError(
                    f"attention: {name}={getattr(self, name)} is not supported; give a multiple of {_HEAD_STEP}"
                )
        if self.heads % self.kv_heads:
            raise TilewrightError(
                f"attention: heads={self.heads} is not a multiple of kv_heads={self.kv_heads}, which they share evenly"
            )
        for name in ("sinks", "latent"):
            if not isinstance(getattr(self, name), bool):
                raise TilewrightError(f"attention: {name}={getattr(self, name)!r} is neither true nor false")
        if self.latent:
            self._check_latent()
        elif self.kv_layout not in (get_args(KvLayout) if paged else ("",)):
            expected = (
                f"choose one of {', '.join(get_args(KvLayout))}" if paged else "leave it out, for it has no pages"
            )
            raise TilewrightError(f"attention: {self.stage} has no kv_layout {self.kv_layout!r}; {expected}")
        if not isinstance(self.scale, float) or not math.isfinite(self.scale) or self.scale <= 0:
            raise TilewrightError(f"attention: scale={self.scale!r} is impossible; give a number above 0")
        for name, supported in (
            ("q_dtype", _DTYPES),
            ("kv_dtype", (self.q_dtype,) if self.q_dtype == "fp32" else (self.q_dtype, "fp8_e4m3")),
            ("out_dtype", tuple(dict.fromkeys((self.q_dtype, "fp32")))),
        ):
            if getattr(self, name) not in supported:
                choices = " or ".join(filter(None, (", ".join(supported[:-1]), supported[-1])))
                raise TilewrightError(f"attention: {name}={getattr(self, name)!r} is not supported; use {choices}")

    def _check_latent(self) -> None:
        """One row per token of the cache, whose first elements are the value."""
        wrong = None
        if self.stage != "decode":
            wrong = f"stage={self.stage} expands keys and values, and decode alone reads latent rows"
        elif self.kv_heads != 1:
            wrong = f"kv_heads={self.kv_heads} is impossible, for all heads read the same rows; give 1"
        elif self.kv_layout:
            wrong = f"kv_layout={self.kv_layout!r} is impossible, for rows have no heads to put in order; leave it out"
        elif self.value_dim >= self.head_dim or self.value_dim % _LATENT_STEP:
            wrong = (
                f"value_dim={self.value_dim} is not supported; give the latent's part of head_dim={self.head_dim}, "
                f"a multiple of {_LATENT_STEP}"
            )
        elif self.scale == 0:
            wrong = "scale is missing; give 1 / sqrt of the length of the heads that rows stand for (192: 0.0722)"
        if wrong:
            raise TilewrightError(f"attention: latent: {wrong}")

    def _fill_in(self) -> None:
        """Replace what stands for the usual by what that is, so that equal signatures have equal fields."""
        usual: dict[str, Any] = {name: self.q_dtype for name in ("kv_dtype", "out_dtype") if getattr(self, name) == ""}
        if self.value_dim == 0:
            usual["value_dim"] = self.head_dim
        if _is_whole(self.scale):
            usual["scale"] = float(self.scale)
        # That of latent rows is told by the heads that they stand for, whose length a row does not show.
        if self.scale == 0 and not self.latent and _is_whole(self.head_dim) and self.head_dim > 0:
            usual["scale"] = self.head_dim**-0.5
        if self.stage == "decode":
            usual["page_size"] = self.page_size or DEFAULT_PAGE_SIZE
            usual["kv_layout"] = self.kv_layout or ("" if self.latent is True else "hnd")
        for name, value in usual.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON. Without :attr:`latent` where it is off: it came later, and keys of old plans stay."""
        values = super().to_dict()
        if not self.latent:
            del values["latent"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttentionSignature:
        """Signature from its JSON form.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """
        own = {name: value for name, value in values.items() if name != "op"}
        known = fields(cls)
        if unknown := sorted(own.keys() - {f.name for f in known}):
            raise TilewrightError(f"an attention signature has no field {unknown[0]!r}; this tilewright may be too old")
        if missing := [f.name for f in known if f.default is MISSING and f.name not in own]:
            raise TilewrightError(
                f"an attention signature lacks the field {missing[0]!r}; it was not written by to_dict"
            )
        return cls(**own)

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> AttentionSignature:
        """Signature from ``key=value`` texts; the stage is ``decode`` where none is given.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise TilewrightError(
                f"attention has no field {unknown[0]!r}; --problem takes tokens, context, {', '.join(known)}"
            )
        if missing := [name for name in ("heads", "kv_heads", "head_dim") if name not in values]:
            raise TilewrightError(
                f"--problem lacks {', '.join(missing)}; give for example heads=32,kv_heads=8,head_dim=128"
            )
        typed: dict[str, Any] = {"stage": "decode", **values}
        for name, text in values.items():
            try:
                typed[name] = int(text) if name in _WHOLE else float(text) if name == "scale" else text
            except ValueError as error:
                raise TilewrightError(f"{name}={text!r} in --problem is not a number") from error
        for name in ("sinks", "latent"):
            if name in values:
                if values[name].lower() not in _TRUTH:
                    raise TilewrightError(f"{name}={values[name]!r} in --problem is neither true nor false")
                typed[name] = _TRUTH[values[name].lower()]
        return cls(**typed)

    @property
    def title(self) -> str:
        """The op and its stage."""
        return f"{self.op} {self.stage}"

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def kv_elements(self) -> int:
        """Elements that a token has in the cache for one key/value head."""
        return self.head_dim if self.latent else self.head_dim + self.value_dim

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Tensors of a call, in order.

        ``decode``, in which ``tokens`` is the number of sequences:

        * ``q`` [tokens, heads, head_dim]
        * ``k_cache``, ``v_cache`` [pages, kv_heads, page_size, dim] (``hnd``) or [pages, page_size, kv_heads, dim];
          ``latent``: ``kv_cache`` [pages, page_size, head_dim] instead
        * ``block_table`` [tokens, table_pages]: the page of each ``page_size`` tokens of a sequence; what lies beyond
          the sequence's length is not looked at
        * ``lengths`` [tokens]: tokens of each sequence that are in the cache, that of the query included

        ``prefill``:

        * ``q`` [tokens, heads, head_dim], ``k``, ``v`` [tokens, kv_heads, dim]: sequences one after the other
        * ``cu_seqlens`` [sequences + 1]: where each sequence begins, and the end of the last

        Both: ``sinks`` [heads] where the signature has them; ``out`` [tokens, heads, value_dim].
        """
        kept = (self._paged if self.stage == "decode" else self._packed)()
        specs = [TensorSpec("q", self.q_dtype, ("tokens", self.heads, self.head_dim)), *kept]
        if self.stage == "decode":
            room = f"table_pages * {self.page_size}"
            specs += [
                TensorSpec(
                    "block_table",
                    "int32",
                    ("tokens", "table_pages"),
                    values="pages",
                    bound="pages",
                    lengths="lengths",
                    page_size=self.page_size,
                ),
                TensorSpec("lengths", "int32", ("tokens",), values="length", bound=room),
            ]
        else:
            specs.append(TensorSpec("cu_seqlens", "int32", ("boundaries",), values="rising", bound="tokens"))
        if self.sinks:
            specs.append(TensorSpec("sinks", "fp32", (self.heads,), role="weight"))
        return (*specs, TensorSpec("out", self.out_dtype, ("tokens", self.heads, self.value_dim), role="output"))

    def _paged(self) -> tuple[TensorSpec, ...]:
        if self.latent:
            return (TensorSpec("kv_cache", self.kv_dtype, ("pages", self.page_size, self.head_dim)),)
        page = (self.kv_heads, self.page_size) if self.kv_layout == "hnd" else (self.page_size, self.kv_heads)
        return (
            TensorSpec("k_cache", self.kv_dtype, ("pages", *page, self.head_dim)),
            TensorSpec("v_cache", self.kv_dtype, ("pages", *page, self.value_dim)),
        )

    def _packed(self) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("k", self.kv_dtype, ("tokens", self.kv_heads, self.head_dim)),
            TensorSpec("v", self.kv_dtype, ("tokens", self.kv_heads, self.value_dim)),
        )

    @property
    def size_name(self) -> str:
        """The size by which plans pick a kernel: tokens of a call, which under ``decode`` are its sequences."""
        return "tokens"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
