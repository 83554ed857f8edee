"""A plugin of pytest that runs tests under another default dtype, $TILEWRIGHT_TEST_DTYPE: `-p default_dtype_plugin`.

Tests and what they use make their tensors in fp32, as they did; tilewright's own code meets the other default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tilewright import runtime

DTYPE = getattr(torch, os.environ["TILEWRIGHT_TEST_DTYPE"])
_FLOATS = {torch.randn, torch.rand, torch.empty, torch.zeros, torch.ones, torch.eye, torch.linspace, torch.normal}
_EITHER = {torch.tensor, torch.full, torch.arange, torch.as_tensor, torch.scalar_tensor}
"""What makes floats only from floats."""
_OURS = str(Path(runtime.__file__).parents[1]) + os.sep
"""Folder of tilewright's own modules."""


class OthersInFp32(TorchFunctionMode):
    """Tensors that are made outside of tilewright without a dtype are fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See :class:`TorchFunctionMode`."""
        kwargs = kwargs or {}
        caller = sys._getframe(1).f_code.co_filename
        if func in _FLOATS | _EITHER and kwargs.get("dtype") is None and not caller.startswith(_OURS):
            if func in _FLOATS:
                return func(*args, **{**kwargs, "dtype": torch.float32})
            made = func(*args, **kwargs)
            return func(*args, **{**kwargs, "dtype": torch.float32}) if made.dtype is DTYPE else made
        return func(*args, **kwargs)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Run the test under the other default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with OthersInFp32():
            return (yield)
    finally:
        torch.set_default_dtype(before)
