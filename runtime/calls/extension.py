"""The compiled half of the runtime, where it was built and is wanted. Needs torch only for its tensors."""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

from tilewright.runtime.launchers.openmp import pool


@cache
def native_module() -> ModuleType | None:
    """``tilewright.runtime._native``; None where there was no compiler to build it, or with ``TILEWRIGHT_NATIVE=0``."""
    if os.environ.get("TILEWRIGHT_NATIVE") == "0":
        return None
    try:
        module = importlib.import_module("tilewright.runtime._native")
    except ImportError:
        return None
    module.set_pool(*pool())
    return module


@cache
def native_for_torch() -> ModuleType | None:
    """The extension, ready to read torch tensors; None where torch lacks the DLPack exchange API (before 2.10), too."""
    import torch

    native = native_module()
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if native is None or exchange is None:
        return None
    native.setup_torch(torch.Tensor, torch.nn.Parameter, exchange, torch.is_grad_enabled)
    return native
