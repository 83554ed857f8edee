"""What is served and what it costs, for people and for programs: fields to read, ``str`` to print."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tilewright.plain_text import plain_lines
from tilewright.runtime.process_memory import Memory
from tilewright.runtime.serve.plans import Resolution, SizeRange

_UNCHECKED = (
    "values of offsets, indices, lengths, pages and logits are not checked, for that would wait for the device; "
    "ServeOptions(check_values=True) has them checked"
)


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one prepared weight, in bytes."""

    label: str
    bytes: int
    """The packed copy; 0 where the weight is used as it is."""
    weight_bytes: int
    """The weight that it was made from, which belongs to the caller."""
    before: Memory
    """Of the whole process, before it was quantised and packed."""
    after: Memory


@dataclass(frozen=True)
class MemoryReport:
    """What everything that is prepared in this process holds beside the callers' own weights."""

    uses: tuple[MemoryUse, ...]

    @property
    def total_bytes(self) -> int:
        """Sum over all prepared weights."""
        return sum(use.bytes for use in self.uses)

    def __str__(self) -> str:
        lines = [f"{use.bytes / 1e6:10.1f} MB  for {use.weight_bytes / 1e6:.1f} MB of {use.label}" for use in self.uses]
        return "\n".join([*lines, f"{self.total_bytes / 1e6:10.1f} MB  in all"])


@dataclass(frozen=True)
class Explanation:
    """Which kernel serves which sizes of one signature, on what evidence, and where torch does and why."""

    resolution: Resolution
    threads: int
    memory: MemoryUse
    checks_values: bool
    """Whether a call looks at offsets, indices, lengths, pages and logits before a kernel reads them."""

    @property
    def ranges(self) -> tuple[SizeRange, ...]:
        """What serves, by rising size."""
        return self.resolution.ranges

    def __str__(self) -> str:
        resolution, plan = self.resolution, self.resolution.plan
        lines = [
            resolution.signature.describe(),
            f"  on {resolution.device.describe(self.threads)}, database {resolution.database}",
        ]
        if not self.checks_values:
            lines.append(f"  {_UNCHECKED}")
        if plan is not None:
            made = time.strftime("%Y-%m-%d", time.gmtime(plan.created_at))
            lines.append(
                f"  plan of {made}{f' for {plan.threads} threads' if plan.threads else ''}"
                f"{f' of {plan.model}' if plan.model else ''}; "
                f"timing: {plan.timing}, checked: {plan.checked}; "
                f"weight {' and '.join(layout.key if layout else 'as declared' for layout in resolution.layouts)}, "
                f"{self.memory.bytes / 1e6:.1f} MB beside the original's {self.memory.weight_bytes / 1e6:.1f} MB"
            )
            if self.memory.bytes and resolution.device.is_host:
                lines.append(f"  process before packing: {self.memory.before}; after: {self.memory.after}")
            if plan.batch_invariant:
                lines.append(f"  {_on_batches(resolution)}")
            if plan.error:
                lines.append(
                    f"  precision {plan.precision}: results are off by {plan.error:.2g} (relative, when tuned)"
                )
        size = resolution.signature.size_name
        above = 0
        for part in self.ranges:
            sizes = f"{size} > {above}" if part.max_size is None else f"{size} <= {part.max_size}"
            lines.append(f"    {sizes:<16} {_describe(part)}")
            above = part.max_size or above
        return plain_lines("\n".join(lines))


def _on_batches(resolution: Resolution) -> str:
    """What a batch-invariant plan promises, as it is served."""
    if resolution.batch_invariant:
        return (
            "batch-invariant: a token gets the same bits whatever else is in the batch; "
            "tensors that the kernels cannot take are refused"
        )
    return (
        "tuned batch-invariant, but not promised: plain torch serves tensors that the kernels cannot take, in another "
        "order of sums; ask with ServeOptions(batch_invariant=True)"
    )


def _describe(part: SizeRange) -> str:
    """What serves one range, in one line."""
    if part.kernel is None:
        return f"torch: {part.why_torch}"
    record = part.kernel.record
    line = f"{record.template} {record.key[:16]} for {record.arch}, checked: {record.checked}"
    if part.entry is not None and part.entry.median_us is not None:
        line += f", {part.entry.median_us:.1f} us"
        line += f" at {part.entry.tuned_size}" if part.entry.tuned_size is not None else ""
        line += f" (default config {part.entry.default_us:.1f} us)" if part.entry.default_us is not None else ""
    return line
