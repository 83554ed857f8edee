"""A call of an op, ready to be made: its plan found, its weights laid out, everything bound."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Self

from torch import Tensor

from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.model import packable
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.bind import BoundCall
from tilewright.runtime.locks import fork_safe_lock
from tilewright.runtime.notices import warn_once
from tilewright.runtime.ops.base import BoundWeights
from tilewright.runtime.ops.registry import served_op
from tilewright.runtime.process_memory import Memory
from tilewright.runtime.serve.devices import ServedSizes, ServingDevice, device_of, serving_device
from tilewright.runtime.serve.explanation import Explanation, MemoryReport, MemoryUse
from tilewright.runtime.serve.handles import hold
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.serve.plans import Resolution, SizeRange, resolve
from tilewright.runtime.torch.plain import spare_torch_threads

_live: weakref.WeakSet[PreparedCall] = weakref.WeakSet()
_listing = fork_safe_lock()


class PreparedCall:
    """One signature bound to its weights: call it with the other tensors of the op, in order, outputs last.

    The call writes the outputs and returns them (one by itself, several as a tuple), may be made from any thread, and
    raises TilewrightError for tensors that do not fit. ``call`` is the same without one level of Python, for loops in
    which a microsecond counts. Values are those that the weights had when they were prepared.
    """

    __slots__ = (
        "__weakref__",
        "_memory",
        "_resolution",
        "_weights",
        "call",
        "checks_values",
        "handle",
        "signature",
        "threads",
    )

    def __init__(
        self,
        signature: Signature,
        threads: int,
        call: BoundCall,
        resolution: Resolution,
        memory: MemoryUse,
        weights: Callable[[], Mapping[str, Tensor]],
        *,
        checks_values: bool,
    ) -> None:
        self.signature = signature
        self.threads = threads
        self.checks_values = checks_values
        self.call = call
        self._resolution = resolution
        self._memory = memory
        self._weights = weights
        self.handle = hold(self)
        with _listing:
            _live.add(self)

    @classmethod
    def prepare(
        cls, signature: Signature, weights: Mapping[str, Tensor], *, options: ServeOptions = ServeOptions()
    ) -> Self:
        """Find the tuned kernels for ``signature`` and lay ``weights`` out for them.

        Calls are served where the weights lie, or where the options say if there are none.

        Args:
            signature: of the call, of an op that the runtime serves.
            weights: the tensors of role ``weight`` by name, as the op declares them; absent optional ones left out.
            options: which plans may serve, and how.

        Where there is no tuned kernel (no plan, another device, a damaged or untrusted database), plain torch serves,
        with one warning.

        Raises:
            TilewrightError: when the arguments do not fit together, and with ``batch_invariant`` when there is no plan
                that promises it for all sizes.

        """
        op = served_op(signature.op)
        spare_torch_threads()
        threads = options.thread_count
        device = serving_device(device_of(weights, options, signature.title))
        resolution = resolve(signature, device, options)
        before = Memory.now()
        bound = op.bind(signature, weights, resolution, keep_weights=options.keep_weights is not False)
        bind = partial(_bind, signature, bound=bound, options=options)
        try:
            call = bind(resolution)
        except TilewrightError:
            # Something in one of the kernels' recipes, or that this fits no weights at all, which is raised again.
            resolution = _callable_part(resolution, bind)
            call = bind(resolution)
        memory = MemoryUse(signature.describe(), bound.copied_bytes, bound.weight_bytes, before, Memory.now())
        checks_values = device.is_host or options.check_values
        return cls(signature, threads, call, resolution, memory, bound.declared, checks_values=checks_values)

    def __call__(self, *tensors: Any) -> Any:
        """Compute into the outputs and return them."""
        return self.call(*tensors)

    @property
    def memory_bytes(self) -> int:
        """What this holds beside the weights that it was made from."""
        return self._memory.bytes

    @property
    def memory(self) -> MemoryUse:
        """Line of :func:`tilewright.runtime.memory_report`."""
        return self._memory

    @property
    def device(self) -> ServingDevice:
        """What calls are served on."""
        return self._resolution.device

    def workspace_bytes(self, **sizes: int) -> int:
        """What a kernel needs beside its tensors for a call of these sizes: of a thread on a CPU, of a stream on a GPU.

        Args:
            **sizes: every size that the shapes of the call's tensors name: ``tokens`` and ``rows`` of a grouped GEMM.

        Raises:
            TilewrightError: for a size that is missing or unknown.

        """
        named = {dim for spec in self.signature.tensors() for dim in spec.dims if isinstance(dim, str)}
        if named ^ sizes.keys():
            raise TilewrightError(
                f"{self.signature.title}: give workspace_bytes the sizes {', '.join(sorted(named))}, not "
                f"{', '.join(sorted(sizes)) or 'none'}"
            )
        nbytes: int = self.call.workspace_bytes(sizes)
        return nbytes

    def weights(self) -> Mapping[str, Tensor]:
        """Weights as the op declares them: those that were passed, where they were kept.

        Else they are unpacked into new tensors, with the values that kernels compute with.
        """
        return self._weights()

    @property
    def is_tuned(self) -> bool:
        """Whether a tuned kernel serves some size."""
        return bool(self._resolution.kernels)

    def is_always_tuned_for(self, size: int) -> bool:
        """Whether a tuned kernel serves ``size`` whatever else a call is like.

        What kernels of GPUs were compiled for is an alignment that torch's allocator gives.
        """
        part = self._part(size)
        return part is not None and part.kernel is not None and not (self.device.is_host and part.kernel.recipe.guards)

    @property
    def reads_all_rows(self) -> bool:
        """Whether a kernel looks at rows of its input that belong to no expert: for a scale that all rows share."""
        scales = [layout.stored.x_scales for layout in self._resolution.layouts if layout is not None]
        return any(each is not None and each.granularity == "tensor" for each in scales)

    def _part(self, size: int) -> SizeRange | None:
        ranges = self._resolution.ranges
        return next((part for part in ranges if part.max_size is None or size <= part.max_size), None)

    @property
    def is_exact(self) -> bool:
        """Whether kernels read the weights as they were passed, no value rounded."""
        weight = packable(self.signature.tensors())
        exact = {None} if weight is None else {None, weight.dtype}
        return all((layout and layout.precision) in exact for layout in self._resolution.layouts)

    @property
    def precision(self) -> str:
        """What the weights are stored in; several are joined by ``+``."""
        layouts = self._resolution.layouts or (None,)
        return "+".join(dict.fromkeys(LOSSLESS if layout is None else layout.precision for layout in layouts))

    def explain(self) -> Explanation:
        """Which kernel serves which sizes, on what evidence, and where torch does and why."""
        return Explanation(self._resolution, self.threads, self._memory, self.checks_values)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.signature.describe()}, {len(self._resolution.kernels)} kernels>"


def explain() -> tuple[Explanation, ...]:
    """What serves each weight that is prepared in this process, sorted by signature."""
    explanations = [prepared.explain() for prepared in _prepared()]
    return tuple(sorted(explanations, key=lambda explanation: explanation.memory.label))


def memory_report() -> MemoryReport:
    """What every weight that is prepared in this process costs in memory, largest first."""
    uses = [prepared.memory for prepared in _prepared()]
    return MemoryReport(tuple(sorted(uses, key=lambda use: (-use.bytes, use.label))))


def _prepared() -> list[PreparedCall]:
    """All in this process, in no particular order."""
    with _listing:
        return list(_live)


def _bind(signature: Signature, resolution: Resolution, *, bound: BoundWeights, options: ServeOptions) -> BoundCall:
    declared = {spec.name: spec for spec in signature.tensors()}
    return resolution.device.bind(
        (*declared.values(), *(replace(declared[copy.name], name=copy.alias) for copy in bound.copies)),
        {**bound.tensors, **{copy.alias: copy.tensor for copy in bound.copies}},
        # Sizes beyond the end of a plan have no part, so that meeting one is warned of.
        tuple(_served(part, bound) for part in resolution.ranges if part.entry is not None or resolution.plan is None),
        size_name=signature.size_name,
        options=options,
        fallback=_refusing(signature) if options.batch_invariant else bound.fallback,
        name=signature.title,
    )


def _callable_part(resolution: Resolution, bind: Callable[[Resolution], BoundCall]) -> Resolution:
    """``resolution`` with torch in place of the kernels that nothing can be bound to, each told of in a warning.

    Raises:
        TilewrightError: for such a kernel where every size was promised one.

    """
    parts: list[SizeRange] = []
    for part in resolution.ranges:
        kept = part
        try:
            bind(replace(resolution, ranges=(part,)))
        except TilewrightError as error:
            if part.kernel is None or resolution.batch_invariant:
                raise
            kept = replace(part, kernel=None, why_torch=str(error))
            warn_once(f"{resolution.signature.describe()} is served by plain torch for some sizes: {error}")
        parts.append(kept)
    return replace(resolution, ranges=tuple(parts))


def _served(part: SizeRange, bound: BoundWeights) -> ServedSizes:
    """One range of the plan with the names by which its kernel takes the weights."""
    if part.kernel is None:
        return ServedSizes(part.max_size, None, {})
    layout = part.kernel.layout
    return ServedSizes(part.max_size, part.kernel, {c.name: c.alias for c in bound.copies if c.layout == layout})


def _refusing(signature: Signature) -> Callable[..., None]:
    """In place of plain torch, whose order of sums depends on the batch."""

    def refuse(*_tensors: Tensor) -> None:
        raise TilewrightError(
            f"{signature.title}: these tensors are strided, not aligned to their elements, or not what the kernel's "
            "recipe asks for, so that no batch-invariant kernel can take them; pass contiguous ones, or tune again"
        )

    return refuse
