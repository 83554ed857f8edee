"""A bound call on the CPU in Python: slower than the extension, with the same results."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.recipe.host import Host
from tilewright.codegen.recipe.model import ABI_VERSION, TensorSpec
from tilewright.codegen.recipe.resolve import ResolvedCall
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.binding import CallVariant, HostBinding
from tilewright.runtime.calls.checked import CheckedCall, Passed
from tilewright.runtime.launchers.openmp import fork_address

_ALIGNMENT = 64

_ENTRY = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(Host), ctypes.POINTER(ctypes.c_int64))
_scratch = threading.local()


class PureCall(CheckedCall[CallVariant]):
    """Calls the kernels of a binding through ctypes."""

    binding: HostBinding

    def kernel_failed(self, code: int) -> None:
        """Report the error ``code`` of a kernel.

        Raises:
            TilewrightError: always.

        """
        raise TilewrightError(f"{self.binding.name}: the kernel reported error {code}, and its output is not valid")

    def read(self, spec: TensorSpec, value: Any, expected: str) -> Passed:
        """See :class:`CheckedCall`."""
        return self.as_plain(spec, value, expected)

    def array(self, passed: Passed) -> NDArray[Any]:
        """See :class:`CheckedCall`."""
        # numpy, not torch: in a forked child, torch's operations on large tensors would wait for lost threads.
        values: NDArray[Any] = passed.value.detach().numpy()
        return values

    def workspace(self, nbytes: int, passed: Sequence[Passed | None]) -> int:
        """See :class:`CheckedCall`."""
        del passed
        if nbytes > self.binding.most_workspace_bytes:
            raise TilewrightError(f"it needs {nbytes} bytes of workspace, which is too much for this machine")
        return _workspace(nbytes)

    def launch(self, variant: CallVariant, call: ResolvedCall, workspace: int, passed: Sequence[Passed | None]) -> None:
        """See :class:`CheckedCall`."""
        del passed
        assert variant.recipe is not None
        if variant.recipe.workspace_zeroed and call.workspace_bytes > 0:
            ctypes.memset(workspace, 0, call.workspace_bytes)
        host = Host(ABI_VERSION, self.binding.threads, fork_address() or None)
        for entry, launch in zip(variant.entries, call.launches, strict=True):
            values = [argument.value for argument in launch.arguments]
            code = _ENTRY(entry)(ctypes.byref(host), (ctypes.c_int64 * max(1, len(values)))(*values))
            if code != 0:
                self.kernel_failed(code)


def _workspace(nbytes: int) -> int:
    """Address of ``nbytes`` bytes that belong to the calling thread."""
    held: NDArray[np.uint8] | None = getattr(_scratch, "memory", None)
    if held is None or held.nbytes < nbytes + _ALIGNMENT:
        try:
            held = _scratch.memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
        except (MemoryError, OverflowError, ValueError) as error:
            raise TilewrightError(f"it needs {nbytes} bytes of workspace, which this machine cannot give") from error
    address: int = held.ctypes.data
    return -(-address // _ALIGNMENT) * _ALIGNMENT
