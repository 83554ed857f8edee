"""Parts of a batch: some of its tokens by themselves, and where their results lie in the whole; one function per op."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.base import Arrays


@dataclass(frozen=True)
class Part:
    """The inputs of some tokens, and for each output that belongs to tokens: their rows in the whole batch's."""

    inputs: Arrays
    rows: Mapping[str, NDArray[np.int64]]


def tokens_of(op_name: str, signature: Any, inputs: Arrays) -> int:
    """What a batch can be taken apart into: tokens, sequences of attention, or rows of a plain grouped GEMM."""
    match op_name, getattr(signature, "stage", ""):
        case "moe_gemm", "down":
            return len(inputs["slot_row"])
        case "moe_gemm", _:
            return len(inputs["x"])
        case "attention", "prefill":
            return len(inputs["cu_seqlens"]) - 1
        case "attention", _:
            return len(inputs["lengths"])
    return len(inputs["logits"])


def part_of(op_name: str, signature: Any, inputs: Arrays, tokens: Sequence[int]) -> Part:
    """``tokens`` (ascending) of a batch by themselves."""
    return PARTS[op_name](signature, inputs, np.asarray(sorted(tokens)))


def _moe_gemm(signature: Any, inputs: Arrays, tokens: NDArray[np.int64]) -> Part:
    offsets = inputs["expert_offsets"].astype(np.int64)
    row_expert = np.repeat(np.arange(signature.experts), np.diff(offsets))
    match signature.stage:
        case "up":
            rows = np.flatnonzero(np.isin(inputs["row_token"][: len(row_expert)], tokens))
            own = {
                "x": inputs["x"][tokens],
                "row_token": np.searchsorted(tokens, inputs["row_token"][rows]).astype(np.int32),
            }
            results = rows
        case "down":
            slots = inputs["slot_row"][tokens]
            rows = np.unique(slots[slots >= 0]).astype(np.int64)
            own = {
                "x": inputs["x"][rows],
                "slot_row": np.where(slots >= 0, np.searchsorted(rows, slots), -1).astype(np.int32),
                "topk_weights": inputs["topk_weights"][tokens],
            }
            results = tokens
        case _:
            rows = results = tokens
            own = {"x": inputs["x"][rows]}
    counts = np.bincount(row_expert[rows], minlength=signature.experts)
    own["expert_offsets"] = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return Part(own, {"out": results})


def _gating(signature: Any, inputs: Arrays, tokens: NDArray[np.int64]) -> Part:
    """What comes out beside choices and weights is the order of rows, which is about the batch."""
    del signature
    return Part({"logits": inputs["logits"][tokens]}, {"topk_ids": tokens, "topk_weights": tokens})


def _attention(signature: Any, inputs: Arrays, sequences: NDArray[np.int64]) -> Part:
    """Sequences by themselves; decoding ones stay where they lie in the cache."""
    if signature.stage == "decode":
        own = {name: inputs[name][sequences] for name in ("q", "block_table", "lengths")}
        return Part({**inputs, **own}, {"out": sequences})
    boundaries = inputs["cu_seqlens"].astype(np.int64)
    tokens = np.concatenate([np.arange(boundaries[each], boundaries[each + 1]) for each in sequences])
    lengths = np.diff(boundaries)[sequences]
    own = {name: inputs[name][tokens] for name in ("q", "k", "v")}
    own["cu_seqlens"] = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return Part(own, {"out": tokens})


PARTS: Mapping[str, Callable[[Any, Arrays, NDArray[np.int64]], Part]] = {
    "moe_gemm": _moe_gemm,
    "gating": _gating,
    "attention": _attention,
}
