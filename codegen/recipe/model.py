"""How a kernel is called: its tensors, what is checked of them, its launches. Plain data, stored with the kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tilewright.codegen.numbers.layouts import RowLayout, WeightLayout
from tilewright.codegen.numbers.precisions import LOSSLESS

ABI_VERSION = 1
"""Of the C entry point that a ``host_so`` artifact exports (templates/shared/abi.jinja); the runtime refuses others."""

FORMAT_VERSION = 2
"""Of a recipe's JSON. 1 called ``size_name`` ``dynamic_size``."""

THREADS, SM_COUNT, WORKSPACE = "threads", "sm_count", "workspace"
"""Names that expressions may read beside the sizes: of the place where a kernel runs, and an address for guards."""

L2_PROMOTION_128_BYTES = 2
"""``CU_TENSOR_MAP_L2_PROMOTION_L2_128B`` of the CUDA driver, which Triton's launcher asks for."""

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
    l2_promotion: int = L2_PROMOTION_128_BYTES
    """A ``CUtensorMapL2promotion``: how much of memory around a copy is fetched into the L2 cache."""


@dataclass(frozen=True)
class Argument:
    """One argument of an entry: an address in a tensor or in the workspace, or the value of an expression.

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


@dataclass(frozen=True)
class Launch:
    """One call of an entry point. The grid fields are used by GPU artifacts and stay empty for ``host_so``."""

    artifact: str
    """Checksum (sha256, hex) of the artifact; empty until the kernel is built."""
    entry: str
    arguments: tuple[Argument, ...]
    grid: tuple[str, ...] = ()
    """Up to three :class:`IntExpr` texts: blocks along x, y, z, as the driver counts them. A grid of none is not
    launched."""
    block: tuple[str, ...] = ()
    """Threads along x, y, z."""
    cluster: tuple[str, ...] = ()
    """Blocks of a cluster along x, y, z; empty: no clusters."""
    shared_memory_bytes: str = "0"
    """Dynamic shared memory of a block."""
    hidden_arguments: int = 0
    """Trailing null pointers that the compiler adds (two for Triton)."""
    programmatic: bool = False
    """Whether it may start before the launch before it in the stream has ended; the kernel waits by itself
    (programmatic dependent launch)."""
    cooperative: bool = False
    """Whether all its blocks have to be resident at once, for barriers over the grid."""


@dataclass(frozen=True)
class Guard:
    """A property that was compiled in: ``expression`` must be a multiple of ``multiple`` at dispatch.

    In an expression the name of a tensor, or ``workspace``, stands for its address (0 for an absent tensor).
    """

    expression: str
    multiple: int


@dataclass(frozen=True)
class Recipe:
    """Everything needed to call a kernel, besides the artifacts' bytes.

    What it comes to for given sizes, :func:`tilewright.codegen.recipe.resolve.resolve` says. ``size_name`` names the
    size by which plans pick a kernel. Expressions are :class:`IntExpr` texts over the sizes, and over ``threads`` of a
    CPU or ``sm_count`` (the multiprocessors) of a GPU.
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
    format_version: int = FORMAT_VERSION

    @property
    def precision(self) -> str:
        """Precision that the weights are passed in."""
        return self.weight_layout.precision if self.weight_layout else LOSSLESS

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the dynamic sizes, in order of first appearance in ``tensors``."""
        names = dict.fromkeys(dim for tensor in self.tensors for dim in tensor.dims if isinstance(dim, str))
        return tuple(names)

    @property
    def expressions(self) -> tuple[str, ...]:
        """Texts of all its expressions, those of its tensors' bounds left out."""
        texts = [self.workspace_bytes, *(guard.expression for guard in self.guards)]
        for launch in self.launches:
            texts += (*launch.grid, *launch.block, *launch.cluster, launch.shared_memory_bytes)
            for argument in launch.arguments:
                texts += argument.map.shape if argument.map else ()
                texts += [argument.source] if argument.kind != "tensor" and argument.source else []
        return tuple(texts)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Recipe from its JSON form, valid (codegen/recipe/validity.py).

        Raises:
            TilewrightError: for another format, and for what is missing, unknown, of another type or impossible.

        """
        from tilewright.codegen.recipe.validity import read_recipe

        return read_recipe(data)


def packable(tensors: Sequence[TensorSpec]) -> TensorSpec | None:
    """The weight that a layout packs: [experts, n, k]. A bias has the role of a weight, too."""
    return next((tensor for tensor in tensors if tensor.role == "weight" and len(tensor.dims) == 3), None)
