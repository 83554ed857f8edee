"""What a call must be, wherever it is made: the rules of both Python calls, on the CPU and on a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilewright.codegen.recipe.expressions import parsed
from tilewright.codegen.recipe.model import WORKSPACE, Recipe, TensorSpec
from tilewright.codegen.recipe.resolve import Refusal, ResolvedCall, refused_guards, resolve, workspace_bytes
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.binding import TORCH_DTYPES, Binding, V
from tilewright.runtime.calls.memory import StridedMemory
from tilewright.runtime.notices import warn_once
from tilewright.runtime.torch.readable import oddity, resolved


class RefusedCall(TilewrightError):  # noqa: N818 - named for what the user reads
    """A call that the fallback may not serve either, as it is made."""


@dataclass(frozen=True)
class Passed:
    """A tensor of a call."""

    value: Any
    """What the fallback is given."""
    memory: StridedMemory


class CheckedCall(ABC, Generic[V]):
    """Checks a call, picks a variant by size and has it run, or calls the fallback. A kind of device adds how."""

    def __init__(self, binding: Binding[V]) -> None:
        self.binding = binding
        self._told_of: set[V] = set()
        """Variants whose recipe did not suit a call, which was told."""

    def __call__(self, *tensors: Any) -> Any:
        """Compute into the tensors of role ``output`` and return them: one by itself, several as a tuple.

        Args:
            tensors: those that were not bound, in order: torch tensors, or what speaks DLPack, where calls run.

        A kernel whose recipe does not suit the call leaves it to the fallback, with one warning.

        Raises:
            TilewrightError: for tensors that do not fit, values that would lead a kernel astray where values are
                checked, and a kernel that fails.

        """
        binding = self.binding
        if len(tensors) != len(binding.positional):
            names = ", ".join(spec.name for spec in binding.positional)
            raise TilewrightError(
                f"{binding.name}: got {len(tensors)} tensors; expected {len(binding.positional)}: {names}"
            )
        passed = [self._pass(spec, tensor) for spec, tensor in zip(binding.positional, tensors, strict=True)]
        sizes = self._checked_sizes(passed)
        self._check_values(passed, sizes)
        self._check_overlap(passed)
        outputs = [passed[index] for index in binding.outputs]
        is_empty = not any(output is not None and output.memory.elements > 0 for output in outputs)
        if not is_empty and not self._run_kernel(passed, sizes):
            self.fall_back(passed)
        written = tuple(tensors[index] for index in binding.outputs)
        return written if len(written) > 1 else written[0]

    def workspace_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of workspace that a call of these sizes takes; 0 where the fallback serves it.

        Raises:
            TilewrightError: for a size that is missing.

        """
        if self.binding.size_name not in sizes:
            raise TilewrightError(f"{self.binding.name}: a workspace needs the size {self.binding.size_name!r}")
        variant = self.binding.variant_for(sizes[self.binding.size_name])
        if variant is None or variant.recipe is None or not variant.recipe.launches:
            return 0
        return workspace_bytes(variant.recipe, sizes, self.binding.place)

    @abstractmethod
    def read(self, spec: TensorSpec, value: Any, expected: str) -> Passed:
        """What is known of a tensor that was passed, whose dtype and place fit; ``expected`` says what it must be.

        Raises:
            TilewrightError: for another dtype or place, and what is no tensor.

        """

    @abstractmethod
    def array(self, passed: Passed) -> NDArray[Any]:
        """Its values, for numpy."""

    @abstractmethod
    def workspace(self, nbytes: int, passed: Sequence[Passed | None]) -> int:
        """Address of ``nbytes`` bytes, more than none, for this call alone.

        Raises:
            RefusedCall: where the call has to be made in another way.
            TilewrightError: where the fallback has to serve it.

        """

    @abstractmethod
    def launch(self, variant: V, call: ResolvedCall, workspace: int, passed: Sequence[Passed | None]) -> None:
        """Run the kernel.

        Raises:
            TilewrightError: when it fails.

        """

    def fall_back(self, passed: Sequence[Passed | None]) -> None:
        """Have the fallback serve the call."""
        self.binding.fallback(*(None if each is None else each.value for each in passed))

    @property
    def checks_values(self) -> bool:
        """Whether values are looked at."""
        return True

    def as_plain(self, spec: TensorSpec, value: Any, expected: str) -> Passed:
        """``value`` as a strided tensor of torch of the right dtype, where calls run.

        Raises:
            TilewrightError: says what it is instead.

        """
        subject = f"{self.binding.name}: {spec.name}"
        if not isinstance(value, Tensor):
            try:
                value = torch.utils.dlpack.from_dlpack(value)
            except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
                raise TilewrightError(f"{subject} is a {type(value).__name__}; {expected}") from error
        if not self.binding.lies_here(value):
            raise TilewrightError(f"{subject} is on device {value.device}; {expected} {self.binding.where}")
        if odd := oddity(value):
            raise TilewrightError(f"{subject} {odd}; {expected}, plain and strided")
        if value.dtype is not TORCH_DTYPES[spec.dtype]:
            raise TilewrightError(f"{subject} has dtype {value.dtype}; {expected}")
        if value.requires_grad and torch.is_grad_enabled():
            raise TilewrightError(
                f"{subject} requires grad, but there is no backward pass; "
                f"use torch.no_grad(), or pass {spec.name}.detach()"
            )
        tensor: Tensor = value
        if spec.role == "output" and tensor.is_neg():
            raise TilewrightError(f"{subject} has the negative bit set, and is to be written; pass a plain tensor")
        tensor = tensor if spec.role == "output" else resolved(tensor)
        return Passed(tensor, StridedMemory.of(tensor))

    def _pass(self, spec: TensorSpec, value: Any) -> Passed | None:
        """None stands for an absent optional tensor."""
        if value is None and spec.optional:
            return None
        passed = self.read(spec, value, f"expected {TORCH_DTYPES[spec.dtype]} {_dims(spec)}")
        if spec.role == "output" and passed.memory.overlaps_itself:
            raise TilewrightError(
                f"{self.binding.name}: {spec.name} has strides {list(passed.memory.strides)}, so that elements share "
                "memory; give each of them its own"
            )
        return passed

    def _checked_sizes(self, passed: Sequence[Passed | None]) -> dict[str, int]:
        """Value of every size, all shapes agreeing."""
        sizes: dict[str, int] = {}
        for spec, each in zip(self.binding.positional, passed, strict=True):
            if each is None:
                continue
            shape = each.memory.shape
            fits = len(shape) == len(spec.dims)
            for dim, size in zip(spec.dims, shape, strict=False):
                fits &= size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
            if not fits:
                known = ", ".join(
                    f"{n} = {sizes[n]}" for n in dict.fromkeys(spec.dims) if isinstance(n, str) and n in sizes
                )
                raise TilewrightError(
                    f"{self.binding.name}: {spec.name} has shape {list(shape)}; expected {_dims(spec)}"
                    + (f" with {known}" if known and len(shape) == len(spec.dims) else "")
                )
        return sizes

    def _check_values(self, passed: Sequence[Passed | None], sizes: dict[str, int]) -> None:
        if not self.checks_values:
            return

        def lengths_of(table: TensorSpec) -> NDArray[Any]:
            for spec, each in zip(self.binding.positional, passed, strict=True):
                if each is not None and spec.name == table.lengths:
                    return self.array(each)
            return np.empty(0, np.int32)

        for spec, each in zip(self.binding.positional, passed, strict=True):
            if spec.values == "none" or each is None:
                continue
            values = self.array(each)
            end = parsed(spec.bound).evaluate({**sizes, **self.binding.place.names}) if spec.bound else 0
            wrong = _wrong_values(spec, values, end, lengths_of(spec))
            if wrong is not None:
                where, expected = wrong
                index = ", ".join(map(str, where))
                found = f"[{index}] is {values[where]}" if values.size else " is empty"
                raise TilewrightError(f"{self.binding.name}: {spec.name}{found}; expected {expected}")

    def _check_overlap(self, passed: Sequence[Passed | None]) -> None:
        others = [
            (spec, None if each is None else each.memory)
            for spec, each in zip(self.binding.positional, passed, strict=True)
        ]
        bound = [
            (spec, StridedMemory.of(tensor))
            for spec in self.binding.tensors
            if isinstance(tensor := self.binding.bound.get(spec.name), Tensor)
        ]
        for index in self.binding.outputs:
            written, output = others[index]
            for spec, memory in (*others[:index], *others[index + 1 :], *bound):
                if output is not None and memory is not None and output.overlaps(memory):
                    raise TilewrightError(
                        f"{self.binding.name}: {written.name} overlaps {spec.name} in memory; give it memory of its own"
                    )

    def _run_kernel(self, passed: Sequence[Passed | None], sizes: dict[str, int]) -> bool:
        """Whether a kernel computed the outputs; where none may run, a warning says why, unless the plan says torch.

        Raises:
            TilewrightError: when the kernel fails.

        """
        variant = self.binding.variant_for(sizes[self.binding.size_name])
        if variant is None:
            largest = self.binding.variants[-1].max_size if self.binding.variants else 0
            return self._decline(f"there is no kernel for {self.binding.size_name} above {largest}")
        recipe = variant.recipe
        if recipe is None or not recipe.launches:
            return False
        for spec, each in zip(self.binding.positional, passed, strict=True):
            if each is not None and not each.memory.is_contiguous:
                return self._decline(f"{spec.name} is not contiguous")
            if each is not None and not each.memory.is_aligned:
                return self._decline(f"{spec.name} is not aligned to its elements")
        try:
            call, workspace = self._resolve(recipe, sizes, self._addresses(recipe, variant, passed), passed)
        except RefusedCall:
            raise
        except TilewrightError as error:
            # One warning for all sizes, which come to other numbers in it.
            if variant not in self._told_of:
                self._told_of.add(variant)
                self._decline(f"a kernel cannot be called as its recipe says ({error})")
            return False
        if call.refusals:
            return self._decline(_needs(call.refusals[0]))
        self.launch(variant, call, workspace, passed)
        return True

    def _resolve(
        self, recipe: Recipe, sizes: dict[str, int], addresses: dict[str, int], passed: Sequence[Passed | None]
    ) -> tuple[ResolvedCall, int]:
        """What the kernel is called with, and the address of its workspace.

        Raises:
            RefusedCall: as :meth:`workspace` does.
            TilewrightError: when the recipe comes to nothing that a kernel could be called with.

        """
        place = self.binding.place
        if refusals := refused_guards(recipe, sizes, addresses, place):
            return ResolvedCall(0, (), refusals), 0
        nbytes = workspace_bytes(recipe, sizes, place)
        workspace = self.workspace(nbytes, passed) if nbytes else 0
        return resolve(recipe, sizes, {**addresses, WORKSPACE: workspace}, place), workspace

    def _decline(self, reason: str) -> bool:
        warn_once(f"{self.binding.name}: {reason}; plain torch serves such calls")
        return False

    def _addresses(self, recipe: Recipe, variant: V, passed: Sequence[Passed | None]) -> dict[str, int]:
        """Of the recipe's tensors."""
        addresses = dict(self.binding.addresses)
        for spec, each in zip(self.binding.positional, passed, strict=True):
            addresses[spec.name] = 0 if each is None else each.memory.address
        return {each.name: addresses[variant.aliases.get(each.name, each.name)] for each in recipe.tensors}


def _needs(refusal: Refusal) -> str:
    """Without the value, so that calls that differ in nothing else share a warning."""
    return f"the kernel needs {refusal.guard.expression} to be a multiple of {refusal.guard.multiple}"


def _dims(spec: TensorSpec) -> str:
    return "[" + ", ".join(map(str, spec.dims)) + "]"


def _wrong_values(
    spec: TensorSpec, values: NDArray[Any], end: int, lengths: NDArray[Any]
) -> tuple[tuple[int, ...], str] | None:
    """Index of the first value that breaks the rule of ``spec``, and the rule. ``lengths`` are those of ``pages``."""
    match spec.values:
        case "rising":
            rule = f"offsets that start at 0, rise with every sequence, and end at {spec.bound} = {end}"
            if not values.size:
                return (), rule
            wrong = np.concatenate(([values[0] != 0], values[1:] <= values[:-1]))
            wrong[-1] |= values[-1] != end
        case "length":
            wrong = (values < 1) | (values > end)
            rule = f"a length from 1 to {end} ({spec.bound} = {end})"
        case "pages":
            used = -(-lengths.astype(np.int64) // spec.page_size)
            wrong = (np.arange(values.shape[1]) < used[:, None]) & ((values < 0) | (values >= end))
            rule = f"a page from 0 to {end - 1} ({spec.bound} = {end}); the row's {spec.lengths} needs it"
        case "offsets":
            wrong = np.concatenate(([values[0] != 0], values[1:] < values[:-1]))
            wrong[-1] |= values[-1] != end
            rule = f"offsets that start at 0, never decrease, and end at {spec.bound} = {end}"
        case "index":
            wrong = (values < 0) | (values >= end)
            rule = f"an index from 0 to {end - 1} ({spec.bound} = {end})"
        case "slot":
            wrong = (values < -1) | (values >= end)
            rule = f"an index from 0 to {end - 1} ({spec.bound} = {end}), or -1"
        case "logits":
            # A row is as large as its largest logit, and NaN where one is NaN.
            largest = values.max(axis=-1, keepdims=True)
            wrong = np.where(np.isfinite(largest), False, (values == largest) | np.isnan(values))
            rule = "a number, or -inf in a row with other numbers"
        case _:
            wrong = ~np.isfinite(values)
            rule = "a finite number"
    if not wrong.any():
        return None
    return tuple(int(i) for i in np.argwhere(wrong)[0]), rule
