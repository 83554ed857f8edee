"""What an expert layer needs between the steps of a call."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_REMEMBERED_SIZES = 64
"""Token counts whose views of the buffers a thread keeps; taking them anew costs some microseconds."""


@dataclass(frozen=True)
class BufferShapes:
    """Of one layer; what is missing are the tokens."""

    top_k: int
    experts: int
    inter: int
    dtype: torch.dtype
    """Of ``inner``."""
    device: torch.device

    def bytes(self, tokens: int) -> int:
        """Of all buffers together."""
        slots = tokens * self.top_k
        return 4 * (4 * slots + self.experts + 1) + slots * self.inter * self.dtype.itemsize

    def make(self, tokens: int) -> CallBuffers:
        """New ones."""
        slots, shape = tokens * self.top_k, (tokens, self.top_k)
        return CallBuffers(
            slots,
            torch.empty(shape, dtype=torch.int32, device=self.device),
            torch.empty(shape, dtype=torch.float32, device=self.device),
            torch.empty(slots, dtype=torch.int32, device=self.device),
            torch.empty(self.experts + 1, dtype=torch.int32, device=self.device),
            torch.empty(shape, dtype=torch.int32, device=self.device),
            torch.empty((slots, self.inter), dtype=self.dtype, device=self.device),
        )


@dataclass(frozen=True)
class CallBuffers:
    """Buffers of a call. ``rows`` counts those of a call that routes nothing to other ranks."""

    rows: int
    topk_ids: Tensor
    topk_weights: Tensor
    row_token: Tensor
    expert_offsets: Tensor
    slot_row: Tensor
    inner: Tensor
    """Output of ``up``, [rows, inter]."""


class Buffers(ABC):
    """Where the buffers of calls come from; calls may come from any thread."""

    def __init__(self, shapes: BufferShapes) -> None:
        self.shapes = shapes

    @abstractmethod
    def take(self, tokens: int) -> CallBuffers:
        """Those of a call."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """What is kept between calls of this thread."""


class KeptBuffers(Buffers):
    """Kept by each thread, up to its largest call."""

    def __init__(self, shapes: BufferShapes) -> None:
        super().__init__(shapes)
        self._local = threading.local()

    def take(self, tokens: int) -> CallBuffers:
        """The first ``tokens`` tokens' part of the thread's."""
        mine: _ThreadBuffers | None = getattr(self._local, "mine", None)
        if mine is None or mine.tokens < tokens:
            mine = self._local.mine = _ThreadBuffers(tokens, self.shapes)
        return mine.views(tokens)

    @property
    def held_bytes(self) -> int:
        """Of the calling thread."""
        mine: _ThreadBuffers | None = getattr(self._local, "mine", None)
        return 0 if mine is None else self.shapes.bytes(mine.tokens)


class AllocatedBuffers(Buffers):
    """Asked of torch's allocator by every call: it knows which stream uses what, and what a CUDA graph holds."""

    def take(self, tokens: int) -> CallBuffers:
        """New ones."""
        return self.shapes.make(tokens)

    @property
    def held_bytes(self) -> int:
        """None."""
        return 0


class _ThreadBuffers:
    """Buffers for up to ``tokens`` tokens."""

    def __init__(self, tokens: int, shapes: BufferShapes) -> None:
        self.tokens = tokens
        self._top_k = shapes.top_k
        # Made outside of inference mode, so that calls inside and outside of it may write them.
        with torch.inference_mode(mode=False):
            self._full = shapes.make(tokens)
        self._views: dict[int, CallBuffers] = {}

    def views(self, tokens: int) -> CallBuffers:
        """The first ``tokens`` tokens' part of every buffer."""
        views = self._views.get(tokens)
        if views is None:
            if len(self._views) >= _REMEMBERED_SIZES:
                self._views.clear()
            full, rows = self._full, tokens * self._top_k
            views = CallBuffers(
                rows,
                full.topk_ids[:tokens],
                full.topk_weights[:tokens],
                full.row_token[:rows],
                full.expert_offsets,
                full.slot_row[:tokens],
                full.inner[:rows],
            )
            self._views[tokens] = views
        return views
