"""Calls bound to a CUDA device for tests: tensors, recipes, and a stand-in of the driver that they are bound to."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from cuda_standin import Launched, StandIn, standin
from made_cubins import make_cubin
from posing import pose

from tilewright.codegen.recipe.expressions import parsed
from tilewright.codegen.recipe.model import Argument, Launch, Recipe, TensorMap, TensorSpec
from tilewright.runtime.calls.bind import DeviceVariant, bind_device_call
from tilewright.runtime.launchers.cuda.driver import Driver
from tilewright.runtime.launchers.cuda.kernel import CudaKernel, Needs

TENSORS = (
    TensorSpec("x", "fp32", ("rows", 4)),
    TensorSpec("index", "int32", ("rows",), values="index", bound="tokens"),
    TensorSpec("y", "bf16", ("tokens", 8)),
    TensorSpec("extra", "int32", (5,), optional=True),
    TensorSpec("weight", "bf16", (2, 3, 5), role="weight"),
    TensorSpec("out", "fp32", ("rows", 2), role="output"),
)
NAMES = tuple(spec.name for spec in TENSORS)
STREAM = 0x5EED0
WORKSPACE = Argument("workspace")
ALL = tuple(Argument("tensor", name) for name in NAMES)
ROWS_OF_X = TensorMap(("rows", "4"), 4, box=(8, 4), data_type=7, swizzle=1)
"""32-bit floats, spread over the banks by 32 bytes."""


def launch(*arguments: Argument, **changes: Any) -> Launch:
    given = {"grid": ("rows",), "block": ("32",), **changes}
    return Launch("", f"take_{len(arguments)}", arguments, **given)


def recipe_of(*launches: Launch, **properties: Any) -> Recipe:
    return Recipe(TENSORS, launches, "rows", **properties)


def parameters_of(launch: Launch, number_bytes: int) -> list[int]:
    """Of the entry that a launch is for; numbers take ``number_bytes`` bytes."""
    found: list[int] = []
    for argument in launch.arguments:
        if argument.map is not None:
            rank = len(argument.map.shape)
            found += [128, *[4] * rank, *[8] * rank]
        else:
            found.append(number_bytes if argument.kind == "size" else 8)
    return found + [8] * launch.hidden_arguments


@dataclass
class Bench:
    """A driver, and what is bound to it."""

    cuda: StandIn
    driver: Driver

    def variant(
        self, recipe: Recipe, *, device: int = 0, max_size: int | None = None, number_bytes: int = 8
    ) -> DeviceVariant:
        kernels = []
        for each in recipe.launches:
            blocks = 1
            for text in each.cluster:
                blocks *= int(text)
            kernels.append(
                CudaKernel(
                    self.driver,
                    self.driver.device(device),
                    make_cubin(each.entry, parameters_of(each, number_bytes)),
                    each.entry,
                    Needs(parsed(each.shared_memory_bytes).evaluate({}), blocks),
                )
            )
        return DeviceVariant(max_size, recipe, tuple(kernels))

    def memory(self, nbytes: int) -> torch.Tensor:
        """What the driver allocates on its first device: it zeroes no other."""
        address = ctypes.c_uint64()
        with self.driver.current(self.driver.device(0)):
            self.driver.call("cuMemAlloc", ctypes.byref(address), nbytes)
        return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address.value), dtype=torch.uint8)

    def stream(self) -> int:
        """A stream of the driver's first device."""
        handle = ctypes.c_void_p()
        with self.driver.current(self.driver.device(0)):
            self.driver.call("cuStreamCreate", ctypes.byref(handle), 1)
        return handle.value or 0

    def bind(self, *variants: DeviceVariant, fallback: Callable[..., None] | None = None, **changes: Any) -> Any:
        index = changes.pop("index", 0)
        given = {
            "size_name": "rows",
            "device": self.driver.device(index),
            "driver": self.driver,
            "fallback": fallback or unexpected,
            "name": "demo",
            "workspace": lambda nbytes: pose(torch.empty(nbytes, dtype=torch.uint8), index),
            **changes,
        }
        bound = given.pop("bound", {"weight": pose(torch.zeros(2, 3, 5, dtype=torch.bfloat16), index)})
        return bind_device_call(TENSORS, bound, variants, **given)


def unexpected(*_: Any) -> None:
    raise AssertionError("a kernel should have been launched")


def call_twice(call: Any, *given: Any) -> None:
    call(*given)
    call(*given)


def tensors(rows: int = 6, tokens: int = 3, *, absent: bool = False, device: int = 0, **changes: Any) -> list[Any]:
    """Those of a call, in order; ``changes`` replace some."""
    made = {
        "x": pose(torch.zeros(rows, 4), device),
        "index": pose(torch.zeros(rows, dtype=torch.int32), device),
        "y": pose(torch.zeros(tokens, 8, dtype=torch.bfloat16), device),
        "extra": None if absent else pose(torch.zeros(5, dtype=torch.int32), device),
        "out": pose(torch.zeros(rows, 2), device),
    }
    return list({**made, **changes}.values())


def same(launched: Launched) -> tuple[Any, ...]:
    """All that two launches may differ in."""
    fields = [name for name, *_ in Launched._fields_]
    return tuple(
        bytes(value) if isinstance(value := getattr(launched, name), ctypes.Array) else value for name in fields
    )


@contextmanager
def opened_bench() -> Iterator[Bench]:
    """A driver with three devices, the second of another arch."""
    cuda = standin()
    cuda.begin([90, 80, 90])
    driver = Driver(str(cuda.path))
    of_memory = (ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t)
    driver.load({"cuMemAlloc": of_memory, "cuStreamCreate": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint)})
    yield Bench(cuda, driver)
