"""The static part of an attention problem, and the tensors of its calls. Light to import: the runtime needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from tilewright.codegen.ops.fields import Choice, Positive, Truth, Whole, impossible, is_whole, listed
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


@dataclass(frozen=True, kw_only=True)
class AttentionSignature(Signature):
    """Causal attention of query heads that share key/value heads in groups, over sequences of various lengths.

    ``decode``: one query per sequence, its last token's; keys and values lie in pages, which a block table finds.
    ``prefill``: all tokens of some sequences at once, packed one after the other.

    Raises:
        TilewrightError: when a field is impossible; the sentence names it.

    """

    op: ClassVar[str] = "attention"
    example: ClassVar[str] = "stage=decode,heads=32,kv_heads=8,head_dim=128,context=4096"
    assumed: ClassVar[Mapping[str, str]] = {"stage": "decode"}

    stage: Annotated[
        Stage,
        Choice(
            "decode: one query per sequence, keys and values in pages. prefill: all tokens of some sequences at once, "
            "one sequence after the other."
        ),
    ]
    heads: Annotated[
        int,
        Whole(
            "Query heads on this rank. Head h reads the key/value head h // (heads / kv_heads).",
            1,
            _MAX_HEADS,
        ),
    ]
    kv_heads: Annotated[int, Whole("Key/value heads; they divide the query heads.", 1, _MAX_HEADS)]
    head_dim: Annotated[int, Whole("Elements of a query and of a key.", _MIN_DIM, _MAX_DIM, _HEAD_STEP)]
    value_dim: Annotated[
        int, Whole("Elements of a value and of an output.", _MIN_DIM, _MAX_DIM, _HEAD_STEP, like="head_dim")
    ] = 0
    latent: Annotated[
        bool,
        Truth(
            "decode: whether values are the first value_dim elements of keys (multi-head latent attention in its "
            "absorbed form, arXiv 2405.04434): the cache has one row per token for all heads, of which the latent "
            "vector comes first, then the part with positions. kv_heads is 1, and there is no kv_layout (no heads are "
            "there to be put in order).",
            omitted=True,
        ),
    ] = False
    scale: Annotated[
        float, Positive("Factor of q . k before the softmax; left out: 1 / sqrt(head_dim), except of latent rows.")
    ] = 0.0
    window: Annotated[int, Whole("Tokens that a query sees, its own and those before it; 0: all.", 0, _MAX_WINDOW)] = 0
    sinks: Annotated[
        bool,
        Truth(
            "Whether each query head has a learned logit that takes part in the softmax's denominator only (gpt-oss)."
        ),
    ] = False
    page_size: Annotated[
        int,
        Whole(f"decode: tokens of a page of the cache; 0 is for {DEFAULT_PAGE_SIZE}. prefill: 0.", 0, _MAX_PAGE),
    ] = 0
    kv_layout: Annotated[
        str,
        Choice(
            "decode: order within a page, heads before tokens (hnd) or after them (nhd); left out: hnd, which CPUs "
            "read best. prefill has none: its tensors are [tokens, heads, dim].",
            ("", *get_args(KvLayout)),
        ),
    ] = ""
    q_dtype: Annotated[str, Choice("Of queries: fp32 for CPUs, bf16 or fp16 for GPUs.", _DTYPES)] = "fp32"
    kv_dtype: Annotated[
        str,
        Choice(
            "Of keys and values: that of queries; or fp8_e4m3 beside bf16 and fp16, without a scale.",
            (*_DTYPES, "fp8_e4m3"),
            like="q_dtype",
        ),
    ] = ""
    out_dtype: Annotated[str, Choice("Of outputs: that of queries, or fp32.", _DTYPES, like="q_dtype")] = ""

    def usual(self) -> Mapping[str, Any]:
        """The scale of heads, and how pages are cut."""
        usual: dict[str, Any] = {}
        if self.scale == 0:
            # That of latent rows is told by the heads that they stand for, whose length a row does not show.
            if self.latent is True and self.stage == "decode":
                raise TilewrightError(
                    "attention: latent: scale is missing; give 1 / sqrt of the length of the heads that rows stand for "
                    "(192: 0.0722)"
                )
            if is_whole(self.head_dim) and self.head_dim > 0:
                usual["scale"] = self.head_dim**-0.5
        if self.stage == "decode":
            usual["page_size"] = self.page_size or DEFAULT_PAGE_SIZE
            usual["kv_layout"] = self.kv_layout or ("" if self.latent is True else "hnd")
        return usual

    def require_possible(self) -> None:
        """Heads are shared evenly; pages and layouts belong to ``decode``; dtypes go together."""
        if self.heads % self.kv_heads:
            raise TilewrightError(
                f"attention: heads={self.heads} is not a multiple of kv_heads={self.kv_heads}, which they share evenly"
            )
        if self.stage != "decode":
            for name in ("page_size", "kv_layout"):
                if getattr(self, name):
                    raise TilewrightError(
                        f"attention: {self.stage} has no pages, and {name}={getattr(self, name)!r} is impossible; "
                        "leave it out"
                    )
        if self.latent:
            self._require_possible_rows()
        of_queries = (self.q_dtype,)
        for name, supported in (
            ("kv_dtype", of_queries if self.q_dtype == "fp32" else (self.q_dtype, "fp8_e4m3")),
            ("out_dtype", tuple(dict.fromkeys((self.q_dtype, "fp32")))),
        ):
            if getattr(self, name) not in supported:
                raise impossible(self, f"attention with q_dtype={self.q_dtype}", name, listed(supported))

    def _require_possible_rows(self) -> None:
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
        if wrong:
            raise TilewrightError(f"attention: latent: {wrong}")

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
