"""How a kernel is called: its tensors, what is checked of them, its launches. Plain data, stored with the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tilewright.codegen.numbers.layouts import RowLayout, WeightLayout, layout_from_dict
from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.recipe.expressions import IntExpr
from tilewright.errors import TilewrightError

ABI_VERSION = 1
"""Of the C entry point that a ``host_so`` artifact exports (templates/shared/abi.jinja); the runtime refuses others."""

Role = Literal["input", "weight", "output"]
ValueCheck = Literal["none", "offsets", "index", "slot", "finite", "logits", "rising", "length", "pages"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a call, contiguous in row-major order, in the order in which callers pass them.

    ``dims`` holds constants and size names; a size name takes its value where it first appears and must agree
    everywhere else. ``values`` names what the runtime checks of the data itself: ``offsets`` must not decrease, start
    at 0 and end at ``bound``; ``index`` must lie in [0, ``bound``); ``slot`` likewise, or be -1; ``finite`` must hold
    no NaN or infinity; ``logits`` no NaN and no +inf, and in every row (of the last dimension) a number above -inf;
    ``rising`` must start at 0, rise with every value and end at ``bound``; ``length`` must lie in [1, ``bound``];
    ``pages`` is a table in whose row i as many values as there are pages of ``page_size`` in ``lengths[i]`` must lie
    in [0, ``bound``), and the others are not looked at. ``optional`` tensors may be None.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...]
    role: Role = "input"
    optional: bool = False
    values: ValueCheck = "none"
    bound: str = ""
    lengths: str = ""
    """Name of the tensor of the call, values ``length``, that says how much of each row of ``pages`` is in use."""
    page_size: int = 0
    """What one value of ``pages`` stands for, in the unit of ``lengths``."""


@dataclass(frozen=True)
class TensorMap:
    """What ``cuTensorMapEncodeTiled`` of the CUDA driver needs beside an address, for a contiguous tensor.

    Elements are not interleaved, strides of elements are 1, what lies outside is read as zero. ``box``, ``data_type``
    and ``swizzle`` are what the compiler settled on; they are filled in when the kernel is built.
    """

    shape: tuple[str, ...]
    """:class:`IntExpr` texts, in elements, the slowest dimension first (the driver wants the fastest first)."""
    element_bytes: int
    box: tuple[int, ...] = ()
    """Elements that one copy fetches, in the order of ``shape``."""
    data_type: int = -1
    """A ``CUtensorMapDataType``."""
    swizzle: int = -1
    """A ``CUtensorMapSwizzle``: how rows are spread over the banks of shared memory."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorMap:
        """Tensor map from its JSON form."""
        return cls(**{**data, "shape": tuple(data["shape"]), "box": tuple(data["box"])})


@dataclass(frozen=True)
class Argument:
    """One argument of an entry: the address of a tensor or of the workspace, or the value of an expression.

    Of ``host_so`` artifacts all take 8 bytes; of GPU artifacts a size takes what the entry declares.
    """

    kind: Literal["tensor", "workspace", "size", "scales"]
    """``scales``: those of the packed weight, behind its elements."""
    source: str = ""
    """Tensor name for ``tensor`` (0 when it is optional and absent), :class:`IntExpr` text for ``size``, and for
    ``workspace`` and ``scales`` that of an offset in bytes (empty: 0)."""
    map: TensorMap | None = None
    """Passed in place of the address: a ``CUtensorMap`` of 128 bytes over what lies there, then its shape (32 bits for
    each dimension) and its strides in elements (64 bits each)."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form. Without a map it is what releases before there were any wrote, seals and keys included."""
        fields = asdict(self)
        return fields if self.map else {name: value for name, value in fields.items() if name != "map"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Argument:
        """Argument from its JSON form."""
        return cls(data["kind"], data["source"], TensorMap.from_dict(data["map"]) if data.get("map") else None)


@dataclass(frozen=True)
class Launch:
    """One call of an entry point. The grid fields are used by GPU artifacts and stay empty for ``host_so``."""

    artifact: str
    """Checksum (sha256, hex) of the artifact; empty until the kernel is built."""
    entry: str
    arguments: tuple[Argument, ...]
    grid: tuple[str, ...] = ()
    block: tuple[str, ...] = ()
    cluster: tuple[str, ...] = ()
    shared_memory_bytes: str = "0"
    hidden_arguments: int = 0
    """Trailing null pointers that the compiler adds (two for Triton)."""


@dataclass(frozen=True)
class Guard:
    """A property that was compiled in: ``expression`` must be a multiple of ``multiple`` at dispatch.

    In an expression the name of a tensor, or ``workspace``, stands for its address.
    """

    expression: str
    multiple: int


@dataclass(frozen=True)
class Recipe:
    """Everything needed to call a kernel, besides the artifacts' bytes.

    ``size_name`` names the size by which plans pick a kernel. ``workspace_bytes`` is an :class:`IntExpr` over the
    sizes and ``threads``. Grids may name ``sm_count``, the device's multiprocessors, too.
    """

    tensors: tuple[TensorSpec, ...]
    launches: tuple[Launch, ...]
    size_name: str
    workspace_bytes: str = "0"
    workspace_zeroed: bool = False
    guards: tuple[Guard, ...] = ()
    weight_layout: WeightLayout | RowLayout | None = None
    """Layout in which the weight tensor [experts, n, k] is passed; None: as the op declares it."""
    abi_version: int = ABI_VERSION
    format_version: int = field(default=1)

    @property
    def panels(self) -> WeightLayout | None:
        """The layout of a kernel that CPUs call; None: weights are passed as the op declares them.

        Raises:
            TilewrightError: for a GPU kernel's.

        """
        if isinstance(self.weight_layout, RowLayout):
            raise TilewrightError(
                f"weights in the layout {self.weight_layout.key} are for GPU kernels; tune for this CPU"
            )
        return self.weight_layout

    @property
    def precision(self) -> str:
        """Precision that the weights are passed in."""
        return self.weight_layout.precision if self.weight_layout else LOSSLESS

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the dynamic sizes, in order of first appearance in ``tensors``."""
        names = dict.fromkeys(dim for tensor in self.tensors for dim in tensor.dims if isinstance(dim, str))
        return tuple(names)

    def workspace_for(self, sizes: Mapping[str, int]) -> int:
        """Workspace in bytes for ``sizes`` (which must hold ``threads`` too).

        Raises:
            TilewrightError: when a size is missing.

        """
        return IntExpr(self.workspace_bytes).evaluate(sizes)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by :meth:`from_dict`."""
        launches = [
            {**asdict(launch), "arguments": [each.to_dict() for each in launch.arguments]} for launch in self.launches
        ]
        return {**asdict(self), "launches": launches}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Recipe from its JSON form."""
        layout = data["weight_layout"]
        return cls(
            tensors=tuple(TensorSpec(**{**t, "dims": tuple(t["dims"])}) for t in data["tensors"]),
            launches=tuple(
                Launch(
                    **{
                        **launch,
                        "arguments": tuple(Argument.from_dict(a) for a in launch["arguments"]),
                        "grid": tuple(launch["grid"]),
                        "block": tuple(launch["block"]),
                        "cluster": tuple(launch["cluster"]),
                    }
                )
                for launch in data["launches"]
            ),
            size_name=data["size_name"],
            workspace_bytes=data["workspace_bytes"],
            workspace_zeroed=data["workspace_zeroed"],
            guards=tuple(Guard(**g) for g in data["guards"]),
            weight_layout=None if layout is None else layout_from_dict(layout),
            abi_version=data["abi_version"],
            format_version=data["format_version"],
        )
