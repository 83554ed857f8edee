"""Which experts tokens go to: balanced, skewed or recorded routing, and the order in which experts compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.routing.recorded import read_recorded_ids
from tilewright.errors import TilewrightError

RoutingKind = Literal["balanced", "power-law", "recorded"]

DEFAULT_ALPHA = 1.2
"""Skew of ``power-law`` where none is given: with 128 experts and 8 per token, 19 of 20 tokens pick the most
popular one."""

MAX_ALPHA = 100
"""From here on the same experts are picked by every token anyway."""

_ROWS_AT_ONCE = 8192
"""Tokens whose experts are drawn together, which bounds the memory that drawing takes."""


@dataclass(frozen=True)
class RoutingSpec:
    """How tokens pick experts, as the ``--routing`` option writes it; ``str`` gives that text back.

    Raises:
        TilewrightError: for an unknown kind, and for an ``alpha`` or ``path`` that does not belong to the kind.

    """

    kind: RoutingKind
    alpha: float | None = None
    """Skew of ``power-law``: the r-th most popular expert is picked in proportion to r ** -alpha; 0 is uniform."""
    path: str | None = None
    """File of ``recorded`` ids."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(RoutingKind):
            raise _unknown_routing(self.kind)
        if self.kind == "power-law" and not (self.alpha is not None and 0 <= self.alpha <= MAX_ALPHA):
            raise _alpha_error(self.alpha)
        if self.kind == "recorded" and not self.path:
            raise TilewrightError("recorded routing needs a file of expert ids: recorded:FILE")
        if self.kind != "power-law" and self.alpha is not None:
            raise TilewrightError(f"{self.kind} routing takes no skew; only power-law does")
        if self.kind != "recorded" and self.path is not None:
            raise TilewrightError(f"{self.kind} routing takes no file; only recorded does")

    @classmethod
    def parse(cls, text: str) -> RoutingSpec:
        """Spec from ``balanced``, ``power-law``, ``power-law:ALPHA`` or ``recorded:FILE``.

        Raises:
            TilewrightError: for anything else.

        """
        if not isinstance(text, str):  # from a document
            raise _unknown_routing(repr(text))
        kind, colon, value = text.partition(":")
        if kind == "power-law":
            return cls("power-law", alpha=_parse_alpha(value) if colon else DEFAULT_ALPHA)
        if kind == "recorded":
            return cls("recorded", path=value)
        if text == "balanced":
            return cls("balanced")
        raise _unknown_routing(text)

    def __str__(self) -> str:
        if self.kind == "power-law":
            return f"power-law:{self.alpha}"
        return f"recorded:{self.path}" if self.kind == "recorded" else self.kind


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """Rows of a grouped GEMM, sorted by expert.

    The numpy statement of what the runtime's sort computes: rows of the same expert stand together, in the order in
    which tokens picked it.
    """

    row_token: NDArray[np.int32]
    """[rows] The token that a row computes."""
    expert_offsets: NDArray[np.int32]
    """[experts + 1] Rows ``expert_offsets[e]`` up to ``expert_offsets[e + 1]`` belong to expert ``e``."""
    slot_row: NDArray[np.int32]
    """[tokens, top_k] The row that computes a token's j-th pick, or -1 where another rank does."""


@dataclass(frozen=True, eq=False)
class BlockOrder:
    """Slots sorted by expert and padded, so that every block of rows belongs to one expert; as GPU kernels take it."""

    sorted_slots: NDArray[np.int32]
    """[padded] Slots (token * top_k + j) by expert, each expert's filled up to whole blocks with tokens * top_k."""
    block_experts: NDArray[np.int32]
    """[blocks] The expert of each block; 0 for those beyond the last."""
    padded_rows: int
    """How many entries of ``sorted_slots`` are in use."""


def generate_topk_ids(spec: RoutingSpec, tokens: int, experts: int, top_k: int, seed: int) -> NDArray[np.int32]:
    """Experts that every token picks.

    ``balanced`` gives every expert the same number of rows, or one more; ``power-law`` draws every token's experts
    without replacement from a skewed popularity, its order of experts being random; ``recorded`` repeats the rows of
    the file (``seed`` has no part in it).

    Args:
        spec: the kind of routing.
        tokens: how many tokens, 1 or more.
        experts: experts of the whole model (``ModelShape.all_experts``).
        top_k: experts per token.
        seed: 0 or more; the same seed gives the same ids.

    Returns:
        int32 [tokens, top_k], the ids of a row being distinct.

    Raises:
        TilewrightError: for impossible sizes, or a recorded file that does not fit them.

    """
    if tokens < 1 or experts < 1 or not 1 <= top_k <= experts:
        raise TilewrightError(
            f"cannot route {tokens} tokens to {top_k} of {experts} experts each: all must be 1 or more, "
            "and a token cannot pick more experts than there are"
        )
    if spec.path is not None:
        recorded = read_recorded_ids(spec.path, experts, top_k)
        return recorded[np.arange(tokens) % len(recorded)]
    random = _random(seed, "ids")
    if spec.alpha is None:
        return _balanced_ids(tokens, experts, top_k, random)
    return _power_law_ids(spec.alpha, tokens, experts, top_k, random)


def generate_topk_weights(topk_ids: NDArray[np.int32], seed: int, renormalize: bool = True) -> NDArray[np.float32]:
    """Routing weights for ``topk_ids``: a softmax of normally distributed logits.

    Slots of -1 get a weight like any other, which whoever computes the rows must leave alone.

    Args:
        topk_ids: int32 [tokens, top_k].
        seed: 0 or more; the same seed gives the same weights.
        renormalize: whether a token's weights sum to 1; if not, part of the sum stays with experts it did not pick.

    Returns:
        float32 [tokens, top_k], all above 0.

    """
    tokens, top_k = topk_ids.shape
    logits = _random(seed, "weights").standard_normal((tokens, top_k + 1))
    if renormalize:
        logits = logits[:, :top_k]
    exponentials = np.exp(logits)
    weights: NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return weights[:, :top_k].astype(np.float32)


def sort_tokens(topk_ids: NDArray[np.int32], experts: int) -> TokenOrder:
    """Sort picks by expert, picks of the same expert staying in their order (token by token, slot by slot).

    Args:
        topk_ids: integers [tokens, top_k]; -1 says that another rank computes this pick, and gets no row.
        experts: experts on this rank.

    Raises:
        TilewrightError: for an array of another kind, and for an id outside -1 ... ``experts - 1`` (the first one is
            named).

    """
    if topk_ids.ndim != 2 or topk_ids.dtype.kind not in "iu":
        raise TilewrightError(
            f"expert ids must be integers of shape [tokens, top_k], not {topk_ids.dtype} of shape {topk_ids.shape}"
        )
    outside = np.argwhere((topk_ids < -1) | (topk_ids >= experts))
    if len(outside):
        token, slot = outside[0]
        raise TilewrightError(
            f"token {token} picks expert {topk_ids[token, slot]} in slot {slot}, but ids go from 0 to {experts - 1} "
            "(-1 for an expert of another rank)"
        )
    flat = topk_ids.astype(np.int32, copy=False).ravel()
    rows_of_expert = np.bincount(flat[flat >= 0], minlength=experts)
    elsewhere = flat.size - int(rows_of_expert.sum())
    slots = np.argsort(flat, kind="stable")[elsewhere:]  # -1 sorts first
    slot_row = np.full(flat.size, -1, np.int32)
    slot_row[slots] = np.arange(slots.size, dtype=np.int32)
    return TokenOrder(
        row_token=(slots // topk_ids.shape[1]).astype(np.int32),
        expert_offsets=np.concatenate(([0], np.cumsum(rows_of_expert))).astype(np.int32),
        slot_row=slot_row.reshape(topk_ids.shape),
    )


def pad_blocks(order: TokenOrder, block_size: int, capacity: int) -> BlockOrder:
    """Pad the rows of every expert to whole blocks.

    Args:
        order: of choices that all fall on this rank.
        block_size: rows of a block.
        capacity: length of ``sorted_slots``, a multiple of ``block_size``.

    Raises:
        TilewrightError: when the padded rows exceed ``capacity``.

    """
    slots = np.empty(order.slot_row.size, np.int32)
    slots[order.slot_row.ravel()] = np.arange(slots.size, dtype=np.int32)
    counts = np.diff(order.expert_offsets)
    blocks = -(-counts // block_size)
    padded_rows = int(blocks.sum()) * block_size
    if padded_rows > capacity:
        raise TilewrightError(f"{padded_rows} padded rows exceed the {capacity} that there is room for")
    sorted_slots = np.full(capacity, slots.size, np.int32)
    starts = np.cumsum(blocks * block_size) - blocks * block_size
    shift = np.repeat(starts - order.expert_offsets[:-1], counts)
    sorted_slots[np.arange(slots.size) + shift] = slots
    block_experts = np.zeros(capacity // block_size, np.int32)
    block_experts[: blocks.sum()] = np.repeat(np.arange(len(counts)), blocks)
    return BlockOrder(sorted_slots, block_experts, padded_rows)


def _unknown_routing(text: str) -> TilewrightError:
    return TilewrightError(f"unknown routing {text!r}; give balanced, power-law, power-law:ALPHA or recorded:FILE")


def _parse_alpha(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _alpha_error(text) from None


def _alpha_error(alpha: object) -> TilewrightError:
    return TilewrightError(f"the skew of power-law routing is {alpha!r}, but must be a number from 0 to {MAX_ALPHA}")


def _random(seed: int, purpose: Literal["ids", "weights"]) -> np.random.Generator:
    if seed < 0:
        raise TilewrightError(f"the seed is {seed}, but must be 0 or more")
    return np.random.default_rng((seed, 0 if purpose == "ids" else 1))


def _balanced_ids(tokens: int, experts: int, top_k: int, random: np.random.Generator) -> NDArray[np.int32]:
    """Deal out shuffled decks of all experts, one after the other, ``top_k`` to a token."""
    picks = tokens * top_k
    decks = random.permuted(np.tile(np.arange(experts, dtype=np.int32), (-(-picks // experts), 1)), axis=1)
    for deck in range(1, len(decks)):
        # A token whose picks began in the last deck must not get one of them again from this deck.
        begun = deck * experts % top_k
        if begun:
            decks[deck] = _begin_without(decks[deck], decks[deck - 1][experts - begun :], top_k - begun)
    return decks.ravel()[:picks].reshape(tokens, top_k)


def _begin_without(deck: NDArray[np.int32], taken: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """Bring the first ``count`` of ``deck`` that are not ``taken`` to its front."""
    free = np.flatnonzero(~np.isin(deck, taken))[:count]
    return np.concatenate((deck[free], np.delete(deck, free)))


def _power_law_ids(
    alpha: float, tokens: int, experts: int, top_k: int, random: np.random.Generator
) -> NDArray[np.int32]:
    """Draw each token's experts without replacement by the Gumbel trick: the largest of noisy log-popularities."""
    log_popularity = random.permutation(-alpha * np.log(np.arange(1, experts + 1)))
    ids = np.empty((tokens, top_k), np.int32)
    for start in range(0, tokens, _ROWS_AT_ONCE):
        rows = ids[start : start + _ROWS_AT_ONCE]
        noisy = log_popularity + random.gumbel(size=(len(rows), experts))
        rows[:] = np.argsort(-noisy, axis=1)[:, :top_k]
    return ids
