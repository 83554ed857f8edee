"""Bound calls whose launches the stand-in has the emulator compute: on posed tensors, also through a recorded graph.

It shows that what is passed by a call is what its kernel takes, and that a graph records it without allocating or
loading (which this driver refuses there, as the real one does); nothing of it ran on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import POINTER, byref, c_int, c_uint, c_ulonglong, c_void_p
from typing import Any

import pytest
import torch
from executing import ExecutingDriver, executing
from posing import let_calls_take_them, on_stream, pose
from standin_kernels import ENTRIES, SOURCE, prepared

from tilewright.codegen.recipe.model import Argument, Launch, Recipe, TensorSpec
from tilewright.errors import TilewrightError
from tilewright.runtime.calls import bind as calls
from tilewright.runtime.calls.bind import DeviceVariant, bind_device_call
from tilewright.runtime.calls.extension import native_for_torch
from tilewright.runtime.launchers.cuda.driver import Driver
from tilewright.runtime.launchers.cuda.launcher import CudaLauncher, load_kernels
from tilewright.tuning_db.integrity import sha256_hex

pytest.importorskip("triton", reason="Triton is not installed")

TENSORS = (TensorSpec("x", "fp32", ("rows",)), TensorSpec("out", "fp32", ("rows",), role="output"))
X, OUT, WORKSPACE = Argument("tensor", "x"), Argument("tensor", "out"), Argument("workspace")
GRAPHS = {
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamBeginCapture": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuStreamSynchronize": (c_void_p,),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
}
GLOBAL = 0
"""``CU_STREAM_CAPTURE_MODE_GLOBAL``: nothing that is unsafe while a graph is recorded is allowed."""


def adding(to: Argument, value: str, *, of: Argument, checksum: str) -> Launch:
    """``to = of + value``."""
    arguments = (of, to, Argument("size", "rows"), Argument("size", value))
    return Launch(checksum, "copy", arguments, ("ceildiv(rows, 128)",), ("128",), hidden_arguments=2)


@pytest.fixture(scope="module")
def image() -> bytes:
    return prepared("copy", "sm_90").image


@pytest.fixture
def cuda(image: bytes) -> Iterator[ExecutingDriver]:
    with executing(("sm_90",)) as driver:
        driver.know(image, SOURCE, (ENTRIES["copy"],))
        yield driver


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["native", "pure"])
def test_a_graph_that_recorded_a_call_computes_it_with_the_values_of_each_replay(
    cuda: ExecutingDriver, image: bytes, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layer == "native" and native_for_torch() is None:
        pytest.skip("the extension was not built")
    if layer == "pure":
        monkeypatch.setattr(calls, "_NATIVE", None)
    let_calls_take_them(monkeypatch)
    driver = Driver(str(cuda.path))
    driver.load(GRAPHS)
    device, checksum = driver.device(0), sha256_hex(image)
    twice = (
        adding(WORKSPACE, "2", of=X, checksum=checksum),
        adding(OUT, "3", of=WORKSPACE, checksum=checksum),
    )
    recipe = Recipe(TENSORS, twice, "rows", workspace_bytes="rows * 4")
    kernels = load_kernels(recipe, {checksum: CudaLauncher().load(checksum, lambda: image)}, driver, device)
    call = bind_device_call(
        TENSORS,
        {},
        [DeviceVariant(None, recipe, kernels)],
        size_name="rows",
        device=device,
        driver=driver,
        fallback=pytest.fail,
        name="demo",
        workspace=lambda nbytes: pose(torch.empty(nbytes, dtype=torch.uint8)),
    )
    x, out = torch.arange(300.0), torch.zeros(300)
    given: tuple[Any, ...] = (pose(x), pose(out))
    stream, graph, ready = c_void_p(), c_void_p(), c_void_p()
    with driver.current(device):
        driver.call("cuStreamCreate", byref(stream), 1)
    with driver.current(device), on_stream(stream.value or 0):
        driver.call("cuStreamBeginCapture", stream, GLOBAL)
        with pytest.raises(TilewrightError, match="its workspace of 1200 bytes would have to be made while"):
            call(*given)
        driver.call("cuStreamEndCapture", stream, byref(graph))
        call(*given)
        driver.call("cuStreamSynchronize", stream)
        assert torch.equal(out, x + 5)
        out.zero_()
        driver.call("cuStreamBeginCapture", stream, GLOBAL)
        call(*given)
        driver.call("cuStreamEndCapture", stream, byref(graph))
        assert not out.any()
        driver.call("cuGraphInstantiateWithFlags", byref(ready), graph, 0)
        for start in (7.0, 9.0):
            x.copy_(torch.arange(start, start + 300))
            driver.call("cuGraphLaunch", ready, stream)
            driver.call("cuStreamSynchronize", stream)
            assert torch.equal(out, x + 5)
    assert len(cuda.executed) == 2 * 3
