"""What a bound call is made of: checked once at bind time, then read by both implementations of the call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.recipe.expressions import parsed
from tilewright.codegen.recipe.model import Recipe, TensorSpec
from tilewright.codegen.recipe.resolve import Place
from tilewright.codegen.recipe.validity import validate
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.host_so import require_host
from tilewright.runtime.torch.readable import oddity

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
}

_CHECKED_DTYPE = {
    **dict.fromkeys(("offsets", "index", "slot", "rising", "length", "pages"), "int32"),
    **dict.fromkeys(("finite", "logits"), "fp32"),
}
"""The dtype that each check of values reads."""


_WORKSPACE_SHARE = 4


@dataclass(frozen=True, eq=False)
class CallVariant:
    """What serves dynamic sizes up to ``max_size`` (None: all larger ones): a kernel, or without a recipe the fallback.

    ``owner`` keeps the loaded code alive.
    """

    max_size: int | None
    recipe: Recipe | None = None
    entries: tuple[int, ...] = ()
    """Address of the ``host_so`` entry of each launch of the recipe."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the recipe that have another name in the binding, where kernels take one in several layouts."""
    owner: object = None


class Variant(Protocol):
    """What serves dynamic sizes up to ``max_size`` (None: all larger ones)."""

    @property
    def max_size(self) -> int | None:
        """The largest size."""
        ...

    @property
    def recipe(self) -> Recipe | None:
        """Of the kernel; None, or without launches: the fallback serves these sizes."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tensors of the recipe that have another name in the binding."""
        ...


V = TypeVar("V", bound=Variant)


@dataclass(frozen=True, kw_only=True)
class Binding(ABC, Generic[V]):
    """One signature bound to its weights and kernels.

    ``name`` begins every message. ``bound`` maps tensor names to what was passed once: a tensor, an address, or None
    for an absent optional one. ``fallback`` is called with the tensors of a call and must write the outputs.

    Raises:
        TilewrightError: when the parts do not fit together.

    """

    name: str
    tensors: tuple[TensorSpec, ...]
    bound: Mapping[str, Tensor | int | None]
    variants: tuple[V, ...]
    """In the order in which sizes pick them."""
    size_name: str
    fallback: Callable[..., None]
    addresses: Mapping[str, int] = field(init=False, repr=False)
    """Of the bound tensors; 0 for an absent one."""

    def __post_init__(self) -> None:
        if unknown := set(self.bound) - {spec.name for spec in self.tensors}:
            raise TilewrightError(f"{self.name}: it has no tensor {min(unknown)!r} to bind")
        addresses = {spec.name: self._bound_address(spec) for spec in self.tensors if spec.name in self.bound}
        object.__setattr__(self, "addresses", addresses)
        if not self.outputs or any(spec.role == "output" for spec in self.tensors if spec.name in self.bound):
            raise TilewrightError(f"{self.name}: a call needs an output, and every output must be passed with the call")
        if absent := [self.positional[i].name for i in self.outputs if self.positional[i].optional]:
            raise TilewrightError(f"{self.name}: the output {absent[0]} cannot be optional")
        for spec in self.tensors:
            self._require_checkable(spec)
        required = {dim for spec in self.positional if not spec.optional for dim in spec.dims}
        if unset := [s for s in (*self.symbols, self.size_name) if s not in required and s not in self.place.names]:
            raise TilewrightError(f"{self.name}: no tensor of a call tells the size {unset[0]!r}")
        for variant in self.variants:
            if variant.recipe is not None:
                self._require_callable(variant, variant.recipe)

    @property
    @abstractmethod
    def place(self) -> Place:
        """What recipes may ask of where calls run."""

    @property
    @abstractmethod
    def where(self) -> str:
        """Where tensors have to lie, as messages say it: "on the CPU"."""

    @abstractmethod
    def lies_here(self, tensor: Tensor) -> bool:
        """Whether a tensor lies where calls run."""

    @abstractmethod
    def require_launches(self, variant: V, recipe: Recipe) -> None:
        """Refuse a kernel that is not launched as calls of this binding are.

        Raises:
            TilewrightError: says what is launched otherwise.

        """

    @cached_property
    def positional(self) -> tuple[TensorSpec, ...]:
        """Tensors that a call passes, in order."""
        return tuple(spec for spec in self.tensors if spec.name not in self.bound)

    @cached_property
    def outputs(self) -> tuple[int, ...]:
        """Positions of the outputs among ``positional``."""
        return tuple(i for i, spec in enumerate(self.positional) if spec.role == "output")

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """Size names in order of first appearance, then what is known of the place."""
        sizes = dict.fromkeys(dim for spec in self.positional for dim in spec.dims if isinstance(dim, str))
        return (*sizes, *self.place.names)

    def variant_for(self, size: int) -> V | None:
        """The first variant that serves ``size``; None when there is none."""
        return next((v for v in self.variants if v.max_size is None or size <= v.max_size), None)

    def program(self, text: str) -> tuple[int, ...]:
        """Reverse Polish code of an expression over :attr:`symbols`."""
        return parsed(text).program(self.symbols)

    def _bound_address(self, spec: TensorSpec) -> int:
        tensor = self.bound[spec.name]
        if tensor is None:
            if not spec.optional:
                raise TilewrightError(f"{self.name}: {spec.name} is None, but it is not optional")
            return 0
        if isinstance(tensor, int):
            return tensor
        expected = TORCH_DTYPES.get(spec.dtype)
        if (odd := oddity(tensor)) or tensor.is_neg():
            raise TilewrightError(
                f"{self.name}: {spec.name} {odd or 'has the negative bit set'}; expected a plain tensor"
            )
        if not self.lies_here(tensor) or tensor.dtype != expected or not tensor.is_contiguous():
            raise TilewrightError(
                f"{self.name}: {spec.name} is {tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}; "
                f"expected contiguous {expected} {self.where}"
            )
        return tensor.data_ptr()

    def _require_checkable(self, spec: TensorSpec) -> None:
        """What is checked of a tensor's values can be."""
        if _CHECKED_DTYPE.get(spec.values, spec.dtype) != spec.dtype or spec.dtype not in TORCH_DTYPES:
            raise TilewrightError(f"{self.name}: {spec.name} of {spec.dtype} cannot be checked as {spec.values!r}")
        if spec.values == "offsets" and not (
            len(spec.dims) == 1 and isinstance(spec.dims[0], int) and spec.dims[0] > 0
        ):
            raise TilewrightError(f"{self.name}: the offsets {spec.name} need a constant length")
        if spec.values == "logits" and not (spec.dims and isinstance(spec.dims[-1], int) and spec.dims[-1] > 0):
            raise TilewrightError(f"{self.name}: the rows of logits in {spec.name} need a constant length")
        if spec.values == "rising" and len(spec.dims) != 1:
            raise TilewrightError(f"{self.name}: {spec.name} has {len(spec.dims)} dimensions; values rise along one")
        if spec.values == "pages":
            self._require_lengths(spec)

    def _require_lengths(self, table: TensorSpec) -> None:
        lengths = next((spec for spec in self.positional if spec.name == table.lengths), None)
        fits = lengths and lengths.values == "length" and not lengths.optional and lengths.dims == table.dims[:1]
        if not fits or len(table.dims) != 2 or table.page_size < 1:
            raise TilewrightError(
                f"{self.name}: the pages in {table.name} need lengths of its rows among the tensors, and a page size"
            )

    def _require_callable(self, variant: V, recipe: Recipe) -> None:
        """The recipe is one that is called here, and all that it reads is known to a call."""
        try:
            validate(recipe)
            self.require_launches(variant, recipe)
        except TilewrightError as error:
            raise TilewrightError(f"{self.name}: {error}") from error
        names = {spec.name for spec in self.tensors}
        if unknown := [each.name for each in recipe.tensors if variant.aliases.get(each.name, each.name) not in names]:
            raise TilewrightError(f"{self.name}: a kernel takes {unknown[0]!r}, which is no tensor of the call")
        if unset := [size for size in recipe.sizes if size not in self.symbols]:
            raise TilewrightError(f"{self.name}: a kernel reads the size {unset[0]!r}, which no tensor of a call tells")


@dataclass(frozen=True, kw_only=True)
class HostBinding(Binding[CallVariant]):
    """Kernels that the CPU calls, on up to ``threads`` threads."""

    threads: int

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise TilewrightError(f"{self.name}: threads is {self.threads}; at least 1 is needed")
        super().__post_init__()

    @cached_property
    def place(self) -> Place:
        """A CPU, which has threads."""
        return Place(threads=self.threads)

    @property
    def where(self) -> str:
        """See :class:`Binding`."""
        return "on the CPU"

    def lies_here(self, tensor: Tensor) -> bool:
        """See :class:`Binding`."""
        return tensor.device.type == "cpu"

    def require_launches(self, variant: CallVariant, recipe: Recipe) -> None:
        """See :class:`Binding`."""
        require_host(recipe)
        if len(variant.entries) != len(recipe.launches):
            raise TilewrightError(f"a kernel has {len(recipe.launches)} launches and {len(variant.entries)} entries")

    @cached_property
    def most_workspace_bytes(self) -> int:
        """What a call may ask for: a part of the machine's memory, since the system promises more than there is."""
        return read_cpu_info().memory_bytes // _WORKSPACE_SHARE


def in_order(variants: Iterable[V]) -> tuple[V, ...]:
    """Variants in the order in which sizes pick them."""
    return tuple(sorted(variants, key=lambda v: float("inf") if v.max_size is None else v.max_size))
