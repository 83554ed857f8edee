"""Streams, events and graphs by the CUDA driver alone: how long calls take on a device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int, c_uint, c_uint64, c_void_p
from typing import Any, Final

from tilewright.runtime.launchers.cuda.driver import Driver, DriverError

_WAITS_FOR_COPIES: Final = 0
"""``CU_STREAM_DEFAULT``: its work waits for what the default stream was given before, copies to the device above all,
which return before the last part has arrived."""
_TIMED_EVENT: Final = 0
_THREAD_LOCAL: Final = 1
"""``CU_STREAM_CAPTURE_MODE_THREAD_LOCAL``: other threads may do what a capture forbids."""
_US_PER_MS: Final = 1e3
_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuEventDestroy": (c_void_p,),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
}


class Graph:
    """Work that was recorded, to be replayed as often as is wanted."""

    def __init__(self, driver: Driver, handle: c_void_p) -> None:
        self._driver = driver
        self._handle = handle

    def replay(self, stream: int) -> None:
        """Do all of it on ``stream``, without waiting for it."""
        self._driver.call("cuGraphLaunch", self._handle, stream)

    def close(self) -> None:
        """Free it."""
        self._driver.call("cuGraphExecDestroy", self._handle)


class Stopwatch:
    """A stream of the device whose context is current, and two events on it.

    Raises:
        TilewrightError: when the driver lacks a function.

    """

    def __init__(self, driver: Driver) -> None:
        driver.load(_FUNCTIONS)
        self._driver = driver
        stream, begin, end = c_void_p(), c_void_p(), c_void_p()
        driver.call("cuStreamCreate", ctypes.byref(stream), _WAITS_FOR_COPIES)
        for event in (begin, end):
            driver.call("cuEventCreate", ctypes.byref(event), _TIMED_EVENT)
        self.stream = stream.value or 0
        self._begin, self._end = begin, end

    def synchronize(self) -> None:
        """Wait for all that the stream was given.

        Raises:
            DriverError: when some of it failed.

        """
        self._driver.call("cuStreamSynchronize", self.stream)

    def time_us(self, work: Callable[[], None]) -> float:
        """Microseconds on the device from before ``work``, which gives something to the stream, to after it.

        Raises:
            DriverError: when the work, or what the stream was given before, failed.

        """
        self._driver.call("cuEventRecord", self._begin, self.stream)
        work()
        self._driver.call("cuEventRecord", self._end, self.stream)
        self._driver.call("cuEventSynchronize", self._end)
        elapsed_ms = c_float()
        self._driver.call("cuEventElapsedTime", ctypes.byref(elapsed_ms), self._begin, self._end)
        return elapsed_ms.value * _US_PER_MS

    def record(self, work: Callable[[], None]) -> Graph:
        """Record what ``work`` gives to the stream, instead of doing it.

        Raises:
            DriverError: when it cannot be recorded. The stream is as before.

        """
        graph, executable = c_void_p(), c_void_p()
        self._driver.call("cuStreamBeginCapture", self.stream, _THREAD_LOCAL)
        try:
            work()
        except BaseException:
            self._abandon()
            raise
        self._driver.call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        try:
            self._driver.call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        finally:
            self._driver.call("cuGraphDestroy", graph)
        return Graph(self._driver, executable)

    def _abandon(self) -> None:
        """End a capture of which nothing is wanted any more."""
        graph = c_void_p()
        try:
            self._driver.call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        except DriverError:
            return  # it was ended by the error that made it worthless
        if graph.value:
            self._driver.call("cuGraphDestroy", graph)
