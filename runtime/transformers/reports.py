"""What enabling and disabling did, for people (``str``) and for programs (fields)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.runtime.process_memory import Memory, megabytes


@dataclass(frozen=True)
class ServedLayer:
    """One module whose experts run on tuned kernels."""

    name: str
    precision_up: str
    precision_down: str
    replaced_bytes: int
    """Of the module's own weights."""
    packed_bytes: int
    """Of what kernels read."""
    released: bool
    """Whether the module's own weights were given back to the system."""
    rounded: bool
    """Whether kernels read other values than the weights had."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """What weights are stored in."""
        return self.precision_up, self.precision_down


@dataclass(frozen=True)
class ServedLinear:
    """One linear layer outside of the experts that runs on a tuned kernel."""

    name: str
    precision: str
    replaced_bytes: int
    """Of the layer's own weight."""
    packed_bytes: int
    """Of what the kernel reads."""
    released: bool
    """Whether the layer's own weight was given back to the system."""
    rounded: bool
    """Whether the kernel reads other values than the weight had."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """What the weight is stored in."""
        return (self.precision,)


@dataclass(frozen=True)
class LeftAlone:
    """One module that runs as before, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Enabled:
    """What :func:`tilewright.runtime.transformers.enable` did."""

    model: str
    layers: tuple[ServedLayer, ...]
    """With experts."""
    linears: tuple[ServedLinear, ...]
    prompts: tuple[str, ...]
    """Attention modules that are served over whole prompts."""
    routers: tuple[str, ...]
    """Routers that are served."""
    norms: tuple[str, ...]
    """RMSNorms that are computed in one call for a few rows."""
    left_alone: tuple[LeftAlone, ...]
    before: Memory
    after: Memory

    def __str__(self) -> str:
        served: tuple[ServedLayer | ServedLinear, ...] = (*self.layers, *self.linears)
        precisions = sorted({precision for layer in served for precision in layer.precisions})
        replaced, packed = (sum(getattr(layer, f) for layer in served) for f in ("replaced_bytes", "packed_bytes"))
        released = "released" if all(layer.released for layer in served) else "kept"
        lines = [f"{self.model}: tilewright serves {len(self.layers)} expert layers"]
        lines[0] += f" and {len(self.linears)} linear layers" if self.linears else ""
        if served:
            lines[0] += f" in {', '.join(precisions)}"
            lines.append(f"  weights: {megabytes(packed)} packed, {megabytes(replaced)} {released}")
        if self.prompts:
            lines.append(f"  attention over prompts: {len(self.prompts)} layers")
        if self.routers or self.norms:
            lines.append(f"  {len(self.routers)} routers; {len(self.norms)} norms of a few rows")
        lines += [f"  left alone: {text}" for text in describe_left_alone(self.left_alone)]
        return "\n".join([*lines, f"  memory before: {self.before}", f"  memory after: {self.after}"])


@dataclass(frozen=True)
class Disabled:
    """What :func:`tilewright.runtime.transformers.disable` did."""

    model: str
    restored: tuple[str, ...]
    """Modules that run as before, with the weights that they had."""
    dequantised: tuple[ServedLayer | ServedLinear, ...]
    """Modules whose released weights had been rounded: theirs are now the rounded values."""
    before: Memory
    after: Memory

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.restored) + len(self.dequantised)} layers run as before"]
        if self.dequantised:
            lines.append(f"  {describe_dequantised(self.dequantised)}")
        return "\n".join([*lines, f"  memory before: {self.before}", f"  memory after: {self.after}"])


def describe_left_alone(modules: Sequence[LeftAlone]) -> list[str]:
    """One line per reason."""
    names: dict[str, list[str]] = {}
    for module in modules:
        names.setdefault(module.reason, []).append(module.name)
    return [f"{of[0]}{f' and {len(of) - 1} more' if len(of) > 1 else ''}, for {reason}" for reason, of in names.items()]


def describe_dequantised(layers: Sequence[ServedLayer | ServedLinear]) -> str:
    """What the weights of ``layers`` are now."""
    precisions = sorted({precision for layer in layers for precision in layer.precisions} - {LOSSLESS})
    return (
        f"the weights of {len(layers)} layers were stored as {', '.join(precisions)} and their originals "
        "released, so they hold the rounded values now; load the model again for the originals"
    )
