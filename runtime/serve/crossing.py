"""Tensors of a GPU served by experts whose weights lie in memory: there and back through pinned buffers.

Copies run on the caller's stream, so that they wait for what was asked of it before, and what is asked of it afterwards
waits for them. The CPU waits by an event until the inputs have arrived. The output's buffer is written again only after
the copy out of it has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.errors import TilewrightError


class Crossing:
    """Brings the tensors of calls from GPUs to the CPU, and results back. Each thread has buffers of its own."""

    def __init__(self) -> None:
        self._local = threading.local()

    def run(self, compute: Callable[..., Tensor], x: Tensor, *routing: Tensor, out: Tensor | None = None) -> Tensor:
        """``compute(x, *routing)`` of the CPU for tensors of a GPU.

        Args:
            compute: takes ``x`` and ``routing`` on the CPU, floating point ones in fp32; gives fp32 like ``x``.
            x: on a GPU.
            routing: on the same one.
            out: on the same one, like ``x``; made when None.

        Raises:
            TilewrightError: for tensors on several devices, while a CUDA graph records, and what ``compute`` raises.

        """
        for each in (*routing, *(() if out is None else (out,))):
            if each.device != x.device:
                raise TilewrightError(
                    f"Experts: x is on {x.device}, and another tensor of the call on {each.device}; pass all on one"
                )
        if out is not None and (out.shape != x.shape or not out.is_contiguous()):
            raise TilewrightError(
                f"Experts: out has shape {list(out.shape)} and strides {list(out.stride())}; "
                f"expected a contiguous tensor {list(x.shape)}"
            )
        if is_capturing():
            raise TilewrightError(
                "Experts: the weights lie in memory, and a CUDA graph cannot record what the CPU computes; leave this "
                "layer out of the graph, or put its weights on the GPU"
            )
        buffers = self._buffers(x.device)
        buffers.wait_until_free()
        here = [buffers.fetch(place, tensor) for place, tensor in enumerate((x, *routing))]
        buffers.wait_for_inputs()
        result = compute(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in here))
        if out is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        buffers.send(result, out)
        return out

    def _buffers(self, device: torch.device) -> _PinnedBuffers:
        mine: dict[torch.device, _PinnedBuffers] | None = getattr(self._local, "mine", None)
        if mine is None:
            mine = self._local.mine = {}
        if device not in mine:
            mine[device] = _PinnedBuffers(device)
        return mine[device]


class _PinnedBuffers:
    """Of one thread for one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inputs: dict[int, Tensor] = {}
        self._output: Tensor | None = None
        self._sent: Any = None
        """Event of the last copy out of the output's buffer."""

    def wait_until_free(self) -> None:
        if self._sent is not None:
            self._sent.synchronize()
            self._sent = None

    def fetch(self, place: int, tensor: Tensor) -> Tensor:
        """A view of the buffer of the input ``place``, that ``tensor`` is being copied to."""
        held = self._inputs.get(place)
        held = self._inputs[place] = _large_enough(held, tensor)
        view = held[: tensor.numel()].view(tensor.shape)
        copy_later(view, tensor)
        return view

    def wait_for_inputs(self) -> None:
        """All copies that were asked for have ended."""
        record_event(self._device).synchronize()

    def send(self, result: Tensor, out: Tensor) -> None:
        """Begin to copy ``result`` to ``out``, in the dtype of that."""
        self._output = _large_enough(self._output, out)
        view = self._output[: out.numel()].view(out.shape)
        view.copy_(result)
        copy_later(out, view)
        self._sent = record_event(self._device)


def _large_enough(held: Tensor | None, like: Tensor) -> Tensor:
    if held is None or held.dtype is not like.dtype or held.numel() < like.numel():
        # Outside of inference mode, so that calls inside and outside of it may write it.
        with torch.inference_mode(mode=False):
            return pinned(like.numel(), like.dtype)
    return held


def pinned(elements: int, dtype: torch.dtype) -> Tensor:
    """Memory of the CPU that a GPU copies to and from by itself."""
    return torch.empty(elements, dtype=dtype, device="cpu", pin_memory=True)


def copy_later(to: Tensor, source: Tensor) -> None:
    """Copy on the current stream of the GPU among the two; the caller goes on at once."""
    to.copy_(source, non_blocking=True)


def record_event(device: torch.device) -> Any:
    """An event that happens when the current stream of ``device`` has done what it was asked until now."""
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def is_capturing() -> bool:
    """Whether a CUDA graph records the calling thread's current stream."""
    return torch.cuda.is_current_stream_capturing()
