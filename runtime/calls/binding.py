"""What a bound call is made of: checked once at bind time, then read by both implementations of the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.recipe.expressions import parsed
from tilewright.codegen.recipe.model import THREADS, Recipe, TensorSpec
from tilewright.codegen.recipe.validity import validate
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.host_so import require_host
from tilewright.runtime.torch.readable import oddity

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
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


@dataclass(frozen=True)
class Binding:
    """One signature bound to its weights and kernels.

    ``name`` begins every message. ``bound`` maps tensor names to what was passed once: a tensor, an address, or None
    for an absent optional one. ``fallback`` is called with the tensors of a call and must write the outputs.

    Raises:
        TilewrightError: when the parts do not fit together.

    """

    name: str
    tensors: tuple[TensorSpec, ...]
    bound: Mapping[str, Tensor | int | None]
    variants: tuple[CallVariant, ...]
    size_name: str
    threads: int
    fallback: Callable[..., None]
    addresses: Mapping[str, int] = field(init=False, repr=False)
    """Of the bound tensors; 0 for an absent one."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise TilewrightError(f"{self.name}: threads is {self.threads}; at least 1 is needed")
        if unknown := set(self.bound) - {spec.name for spec in self.tensors}:
            raise TilewrightError(f"{self.name}: it has no tensor {min(unknown)!r} to bind")
        addresses = {spec.name: self._bound_address(spec) for spec in self.tensors if spec.name in self.bound}
        object.__setattr__(self, "addresses", addresses)
        if not self.outputs or any(spec.role == "output" for spec in self.tensors if spec.name in self.bound):
            raise TilewrightError(f"{self.name}: a call needs an output, and every output must be passed with the call")
        if absent := [self.positional[i].name for i in self.outputs if self.positional[i].optional]:
            raise TilewrightError(f"{self.name}: the output {absent[0]} cannot be optional")
        for spec in self.tensors:
            if _CHECKED_DTYPE.get(spec.values, spec.dtype) != spec.dtype or spec.dtype not in TORCH_DTYPES:
                raise TilewrightError(f"{self.name}: {spec.name} of {spec.dtype} cannot be checked as {spec.values!r}")
            if spec.values == "offsets" and not (
                len(spec.dims) == 1 and isinstance(spec.dims[0], int) and spec.dims[0] > 0
            ):
                raise TilewrightError(f"{self.name}: the offsets {spec.name} need a constant length")
            if spec.values == "logits" and not (spec.dims and isinstance(spec.dims[-1], int) and spec.dims[-1] > 0):
                raise TilewrightError(f"{self.name}: the rows of logits in {spec.name} need a constant length")
            if spec.values == "rising" and len(spec.dims) != 1:
                raise TilewrightError(
                    f"{self.name}: {spec.name} has {len(spec.dims)} dimensions; values rise along one"
                )
            if spec.values == "pages":
                self._require_lengths(spec)
        required = {dim for spec in self.positional if not spec.optional for dim in spec.dims}
        if unset := [s for s in (*self.symbols, self.size_name) if s not in required and s != THREADS]:
            raise TilewrightError(f"{self.name}: no tensor of a call tells the size {unset[0]!r}")
        for variant in self.variants:
            if variant.recipe is not None:
                self._require_callable(variant, variant.recipe)

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
        """Size names in order of first appearance, then ``threads``."""
        sizes = dict.fromkeys(dim for spec in self.positional for dim in spec.dims if isinstance(dim, str))
        return (*sizes, THREADS)

    def variant_for(self, size: int) -> CallVariant | None:
        """The first variant that serves ``size``; None when there is none."""
        return next((v for v in self.variants if v.max_size is None or size <= v.max_size), None)

    @cached_property
    def most_workspace_bytes(self) -> int:
        """What a call may ask for: a part of the machine's memory, since the system promises more than there is."""
        return read_cpu_info().memory_bytes // _WORKSPACE_SHARE

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
        if tensor.device.type != "cpu" or tensor.dtype != expected or not tensor.is_contiguous():
            raise TilewrightError(
                f"{self.name}: {spec.name} is {tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}; "
                f"expected contiguous {expected} on the CPU"
            )
        return tensor.data_ptr()

    def _require_lengths(self, table: TensorSpec) -> None:
        lengths = next((spec for spec in self.positional if spec.name == table.lengths), None)
        fits = lengths and lengths.values == "length" and not lengths.optional and lengths.dims == table.dims[:1]
        if not fits or len(table.dims) != 2 or table.page_size < 1:
            raise TilewrightError(
                f"{self.name}: the pages in {table.name} need lengths of its rows among the tensors, and a page size"
            )

    def _require_callable(self, variant: CallVariant, recipe: Recipe) -> None:
        """The recipe is one that a CPU calls, and all that it reads is known to a call."""
        try:
            validate(recipe)
            require_host(recipe)
        except TilewrightError as error:
            raise TilewrightError(f"{self.name}: {error}") from error
        if len(variant.entries) != len(recipe.launches):
            raise TilewrightError(
                f"{self.name}: a kernel has {len(recipe.launches)} launches and {len(variant.entries)} entries"
            )
        names = {spec.name for spec in self.tensors}
        if unknown := [each.name for each in recipe.tensors if variant.aliases.get(each.name, each.name) not in names]:
            raise TilewrightError(f"{self.name}: a kernel takes {unknown[0]!r}, which is no tensor of the call")
        if unset := [size for size in recipe.sizes if size not in self.symbols]:
            raise TilewrightError(f"{self.name}: a kernel reads the size {unset[0]!r}, which no tensor of a call tells")


def make_binding(
    tensors: Sequence[TensorSpec],
    bound: Mapping[str, Any],
    variants: Sequence[CallVariant],
    *,
    size_name: str,
    threads: int | None,
    fallback: Callable[..., None],
    name: str,
) -> Binding:
    """Binding with variants in the order in which sizes pick them, and ``threads`` from torch when None."""
    ordered = sorted(variants, key=lambda v: float("inf") if v.max_size is None else v.max_size)
    return Binding(
        name=name,
        tensors=tuple(tensors),
        bound=dict(bound),
        variants=tuple(ordered),
        size_name=size_name,
        threads=torch.get_num_threads() if threads is None else threads,
        fallback=fallback,
    )
