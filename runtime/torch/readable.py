"""Which tensors are what their memory holds: kernels read addresses, and torch keeps more about some than that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright.errors import TilewrightError

_OWN_KINDS = (Tensor, torch.nn.Parameter)


def oddity(tensor: Tensor) -> str:
    """What a tensor is beside a plain one with strides, in a few words: "is nested"; empty for a plain one.

    Its device, dtype and shape are not looked at, and neither is the negative bit, which :func:`resolved` takes away.
    """
    if tensor.is_nested:
        return "is nested"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}"
    if tensor.is_quantized:
        return "is quantised"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # noqa: SLF001 - torch has no other way to ask
        return "is seen through torch.func, which kernels do not know"
    if tensor._is_zerotensor():  # noqa: SLF001 - what autograd puts in place of zeros
        return "has no memory"
    if type(tensor) not in _OWN_KINDS and _computes_by_itself(tensor):
        return f"is a {type(tensor).__name__}, whose values are not what its memory holds"
    return ""


def require_plain(tensor: Tensor, subject: str) -> None:
    """Refuse a tensor that is no plain one with strides.

    Raises:
        TilewrightError: begins with ``subject`` and says what it is.

    """
    if odd := oddity(tensor):
        raise TilewrightError(f"{subject} {odd}; pass a plain tensor with strides")


def resolved(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy of one whose memory holds the negative (or the conjugate) of its values."""
    return tensor.resolve_conj().resolve_neg()


def _computes_by_itself(tensor: Tensor) -> bool:
    """Whether its class says what operators do (as those of torch.compile and of quantised weights), or it is empty."""
    plain: Any = Tensor.__torch_dispatch__
    if type(tensor).__torch_dispatch__ is not plain:
        return True
    try:
        return tensor.numel() > 0 and tensor.device.type == "cpu" and tensor.data_ptr() == 0
    except RuntimeError:
        return True
