"""Finds what would wait for a GPU: reading a value, or a shape that depends on values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::unique_dim",
    "aten::_unique2",
}


class NothingIsWaitedFor(TorchDispatchMode):
    """Within it an operation that waits for the device raises, and so does a copy to the CPU."""

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        name = str(getattr(function, "_schema", "")).partition("(")[0]
        to = kwargs.get("device")
        if name in _READS or (name == "aten::_to_copy" and to is not None and torch.device(to).type == "cpu"):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **kwargs)
