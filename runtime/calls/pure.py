"""A bound call in Python: slower than the extension, with the same results. It states what a call must be."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilewright.codegen.recipe.expressions import parsed
from tilewright.codegen.recipe.host import Host
from tilewright.codegen.recipe.model import ABI_VERSION, THREADS, WORKSPACE, Recipe, TensorSpec
from tilewright.codegen.recipe.resolve import Place, Refusal, ResolvedCall, refused_guards, resolve, workspace_bytes
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.binding import TORCH_DTYPES, Binding, CallVariant
from tilewright.runtime.launchers.openmp import fork_address
from tilewright.runtime.notices import warn_once
from tilewright.runtime.torch.readable import oddity, overlaps_itself, resolved

_ALIGNMENT = 64
_OVERLAP_EFFORT = 10_000
"""Work that finding out whether two strided tensors share an element is worth; beyond it they count as overlapping."""


_ENTRY = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(Host), ctypes.POINTER(ctypes.c_int64))
_scratch = threading.local()


class PureCall:
    """Calls the kernels of a binding through ctypes."""

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        self._place = Place(threads=binding.threads)
        self._told_of: set[CallVariant] = set()
        """Variants whose recipe did not suit a call, which was told."""

    def __call__(self, *tensors: Any) -> Any:
        """Compute into the tensors of role ``output`` and return them: one by itself, several as a tuple.

        Args:
            tensors: those that were not bound, in order: torch CPU tensors, or what ``torch.from_dlpack`` takes.

        A kernel whose recipe does not suit the call leaves it to the fallback, with one warning.

        Raises:
            TilewrightError: for tensors that do not fit, values that would lead a kernel astray, and a kernel that
                reports an error.

        """
        binding = self.binding
        if len(tensors) != len(binding.positional):
            names = ", ".join(spec.name for spec in binding.positional)
            raise TilewrightError(
                f"{binding.name}: got {len(tensors)} tensors; expected {len(binding.positional)}: {names}"
            )
        unwrapped = [self._as_tensor(spec, t) for spec, t in zip(binding.positional, tensors, strict=True)]
        sizes = self._checked_sizes(unwrapped)
        self._check_values(unwrapped, sizes)
        self._check_overlap(unwrapped)
        outputs = [unwrapped[index] for index in binding.outputs]
        is_empty = not any(output is not None and output.numel() > 0 for output in outputs)
        if not is_empty and not self._run_kernel(unwrapped, sizes):
            binding.fallback(*unwrapped)
        written = tuple(tensors[index] for index in binding.outputs)
        return written if len(written) > 1 else written[0]

    def kernel_failed(self, code: int) -> None:
        """Report the error ``code`` of a kernel.

        Raises:
            TilewrightError: always.

        """
        raise TilewrightError(f"{self.binding.name}: the kernel reported error {code}, and its output is not valid")

    def _as_tensor(self, spec: TensorSpec, value: Any) -> Tensor | None:
        """``value`` as a strided CPU tensor of the right dtype and rank; None stands for an absent optional one."""
        if value is None and spec.optional:
            return None
        expected = f"expected {TORCH_DTYPES[spec.dtype]} {_dims(spec)}"
        subject = f"{self.binding.name}: {spec.name}"
        if not isinstance(value, Tensor):
            try:
                value = torch.utils.dlpack.from_dlpack(value)
            except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
                raise TilewrightError(f"{subject} is a {type(value).__name__}; {expected}") from error
        if value.device.type != "cpu":
            raise TilewrightError(f"{subject} is on device {value.device}; {expected} on the CPU")
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
        if spec.role != "output":
            return resolved(tensor)
        if tensor.is_neg():
            raise TilewrightError(f"{subject} has the negative bit set, and is to be written; pass a plain tensor")
        if overlaps_itself(tensor):
            raise TilewrightError(
                f"{subject} has strides {list(tensor.stride())}, so that elements share memory; "
                "give each of them its own"
            )
        return tensor

    def _checked_sizes(self, tensors: Sequence[Tensor | None]) -> dict[str, int]:
        """Value of every size, all shapes agreeing."""
        sizes: dict[str, int] = {}
        for spec, tensor in zip(self.binding.positional, tensors, strict=True):
            if tensor is None:
                continue
            fits = tensor.dim() == len(spec.dims)
            for dim, size in zip(spec.dims, tensor.shape, strict=False):
                fits &= size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
            if not fits:
                known = ", ".join(
                    f"{n} = {sizes[n]}" for n in dict.fromkeys(spec.dims) if isinstance(n, str) and n in sizes
                )
                raise TilewrightError(
                    f"{self.binding.name}: {spec.name} has shape {list(tensor.shape)}; expected {_dims(spec)}"
                    + (f" with {known}" if known and tensor.dim() == len(spec.dims) else "")
                )
        return sizes

    def _check_values(self, tensors: Sequence[Tensor | None], sizes: dict[str, int]) -> None:
        def lengths_of(table: TensorSpec) -> NDArray[Any]:
            for spec, tensor in zip(self.binding.positional, tensors, strict=True):
                if tensor is not None and spec.name == table.lengths:
                    lengths: NDArray[Any] = tensor.detach().numpy()
                    return lengths
            return np.empty(0, np.int32)

        for spec, tensor in zip(self.binding.positional, tensors, strict=True):
            if spec.values == "none" or tensor is None:
                continue
            # numpy, not torch: in a forked child, torch's operations on large tensors would wait for lost threads.
            values = tensor.detach().numpy()
            end = parsed(spec.bound).evaluate({**sizes, THREADS: self.binding.threads}) if spec.bound else 0
            wrong = _wrong_values(spec, values, end, lengths_of(spec))
            if wrong is not None:
                where, expected = wrong
                index = ", ".join(map(str, where))
                found = f"[{index}] is {values[where]}" if values.size else " is empty"
                raise TilewrightError(f"{self.binding.name}: {spec.name}{found}; expected {expected}")

    def _check_overlap(self, tensors: Sequence[Tensor | None]) -> None:
        passed = list(zip(self.binding.positional, tensors, strict=True))
        bound = [(spec, self.binding.bound.get(spec.name)) for spec in self.binding.tensors]
        for index in self.binding.outputs:
            written, output = passed[index]
            for spec, tensor in (*passed[:index], *passed[index + 1 :], *bound):
                if output is not None and isinstance(tensor, Tensor) and _share_memory(output, tensor):
                    raise TilewrightError(
                        f"{self.binding.name}: {written.name} overlaps {spec.name} in memory; give it memory of its own"
                    )

    def _run_kernel(self, tensors: Sequence[Tensor | None], sizes: dict[str, int]) -> bool:
        """Whether a kernel computed the outputs; where none may run, a warning says why, unless the plan says torch.

        Raises:
            TilewrightError: when the kernel reports an error.

        """
        variant = self.binding.variant_for(sizes[self.binding.size_name])
        if variant is None:
            largest = self.binding.variants[-1].max_size if self.binding.variants else 0
            return self._decline(f"there is no kernel for {self.binding.size_name} above {largest}")
        recipe = variant.recipe
        if recipe is None or not recipe.launches:
            return False
        for spec, tensor in zip(self.binding.positional, tensors, strict=True):
            if tensor is not None and not tensor.is_contiguous():
                return self._decline(f"{spec.name} is not contiguous")
            if tensor is not None and tensor.data_ptr() % tensor.element_size():
                return self._decline(f"{spec.name} is not aligned to its elements")
        try:
            call, workspace = self._resolve(recipe, sizes, self._addresses(recipe, variant, tensors))
        except TilewrightError as error:
            # One warning for all sizes, which come to other numbers in it.
            if variant not in self._told_of:
                self._told_of.add(variant)
                self._decline(f"a kernel cannot be called as its recipe says ({error})")
            return False
        if call.refusals:
            return self._decline(_needs(call.refusals[0]))
        if recipe.workspace_zeroed and call.workspace_bytes > 0:
            ctypes.memset(workspace, 0, call.workspace_bytes)
        host = Host(ABI_VERSION, self.binding.threads, fork_address() or None)
        for entry, launch in zip(variant.entries, call.launches, strict=True):
            values = [argument.value for argument in launch.arguments]
            code = _ENTRY(entry)(ctypes.byref(host), (ctypes.c_int64 * max(1, len(values)))(*values))
            if code != 0:
                self.kernel_failed(code)
        return True

    def _resolve(self, recipe: Recipe, sizes: dict[str, int], addresses: dict[str, int]) -> tuple[ResolvedCall, int]:
        """What the kernel is called with, and the address of its workspace.

        Raises:
            TilewrightError: when the recipe comes to nothing that a kernel could be called with.

        """
        if refusals := refused_guards(recipe, sizes, addresses, self._place):
            return ResolvedCall(0, (), refusals), 0
        nbytes = workspace_bytes(recipe, sizes, self._place)
        if nbytes > self.binding.most_workspace_bytes:
            raise TilewrightError(f"it needs {nbytes} bytes of workspace, which is too much for this machine")
        workspace = _workspace(nbytes)
        return resolve(recipe, sizes, {**addresses, WORKSPACE: workspace}, self._place), workspace

    def _decline(self, reason: str) -> bool:
        warn_once(f"{self.binding.name}: {reason}; plain torch serves such calls")
        return False

    def _addresses(self, recipe: Recipe, variant: CallVariant, tensors: Sequence[Tensor | None]) -> dict[str, int]:
        """Of the recipe's tensors."""
        addresses = dict(self.binding.addresses)
        for spec, tensor in zip(self.binding.positional, tensors, strict=True):
            addresses[spec.name] = 0 if tensor is None else tensor.data_ptr()
        return {each.name: addresses[variant.aliases.get(each.name, each.name)] for each in recipe.tensors}


def _needs(refusal: Refusal) -> str:
    """Without the value, so that calls that differ in nothing else share a warning."""
    return f"the kernel needs {refusal.guard.expression} to be a multiple of {refusal.guard.multiple}"


def _workspace(nbytes: int) -> int:
    """Address of ``nbytes`` bytes that belong to the calling thread."""
    if nbytes == 0:
        return 0
    held: NDArray[np.uint8] | None = getattr(_scratch, "memory", None)
    if held is None or held.nbytes < nbytes + _ALIGNMENT:
        try:
            held = _scratch.memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
        except (MemoryError, OverflowError, ValueError) as error:
            raise TilewrightError(f"it needs {nbytes} bytes of workspace, which this machine cannot give") from error
    address: int = held.ctypes.data
    return -(-address // _ALIGNMENT) * _ALIGNMENT


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


def _share_memory(a: Tensor, b: Tensor) -> bool:
    try:
        # The stubs know only the two special values; numpy takes any effort.
        return np.shares_memory(_as_bytes(a), _as_bytes(b), max_work=_OVERLAP_EFFORT)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _as_bytes(tensor: Tensor) -> NDArray[Any]:
    """The memory of ``tensor`` for numpy, which knows no bfloat16."""
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
