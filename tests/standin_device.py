"""A device of the stand-in for its tests, through the driver's own functions. Light: child processes import it."""

from __future__ import annotations

import ctypes
import sys
from ctypes import byref, c_float, c_size_t, c_uint64, c_void_p
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.recipe.resolve import ResolvedArgument, ResolvedLaunch
from tilewright.runtime.launchers.cuda.driver import Driver
from tilewright.runtime.launchers.cuda.kernel import CudaKernel, Needs

COUNT, LAST = 300, 2
X = np.arange(COUNT, dtype=np.float32)


class Device:
    """The kernel ``copy`` of the conformance record on a device whose context is current, and functions that it needs.

    Args:
        path: of the driver's library.
        image: of the kernel's cubin.

    """

    def __init__(self, path: Path, image: bytes) -> None:
        self.driver = Driver(str(path))
        self._library = ctypes.CDLL(str(path))
        self.device = self.driver.device(0)
        self.require("cuCtxSetCurrent", c_void_p(self.device.context))
        self._kernel = CudaKernel(self.driver, self.device, image, "copy", Needs())

    def call(self, name: str, *arguments: object) -> int:
        """Result of one of the library's functions."""
        code: int = getattr(self._library, name)(*arguments)
        return code

    def require(self, name: str, *arguments: object) -> None:
        """Call a function that succeeds."""
        code = self.call(name, *arguments)
        assert code == 0, (name, code)

    def upload(self, data: NDArray[np.float32]) -> int:
        address = c_uint64()
        self.require("cuMemAlloc_v2", byref(address), c_size_t(data.nbytes))
        self.require("cuMemcpyHtoD_v2", address, data.tobytes(), c_size_t(data.nbytes))
        return address.value

    def download(self, address: int, count: int = COUNT) -> NDArray[np.float32]:
        data = np.empty(count, np.float32)
        self.require("cuMemcpyDtoH_v2", c_void_p(data.ctypes.data), c_uint64(address), c_size_t(data.nbytes))
        return data

    def launch(self, x: int, out: int, stream: int = 0, count: int = COUNT) -> None:
        """``out = x + LAST``, for the first ``count`` elements."""
        launch = ResolvedLaunch(
            artifact="",
            entry="copy",
            arguments=tuple(map(ResolvedArgument, (x, out, count, LAST))),
            grid=(-(-count // 128), 1, 1),
            block=(128, 1, 1),
            cluster=None,
            shared_memory_bytes=0,
            hidden_arguments=2,
            programmatic=False,
            cooperative=False,
        )
        self._kernel.launch(launch, stream)

    def stream(self) -> int:
        made = c_void_p()
        self.require("cuStreamCreate", byref(made), 1)
        assert made.value is not None
        return made.value

    def event(self, stream: int = 0) -> c_void_p:
        made = c_void_p()
        self.require("cuEventCreate", byref(made), 0)
        self.require("cuEventRecord", made, c_void_p(stream))
        return made

    def elapsed_us(self, before: c_void_p, after: c_void_p) -> float:
        self.require("cuEventSynchronize", after)
        time_ms = c_float()
        self.require("cuEventElapsedTime_v2", byref(time_ms), before, after)
        return 1000 * time_ms.value


def main() -> None:
    """Launch in this process: say so, then what came out."""
    path, image = map(Path, sys.argv[1:])
    device = Device(path, image.read_bytes())
    out = device.upload(np.zeros_like(X))
    device.launch(device.upload(X), out)
    print("launched", flush=True)
    print(float(device.download(out).sum()))


if __name__ == "__main__":
    main()
