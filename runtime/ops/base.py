"""What the runtime must know of an op beyond its signature: how it holds weights, and how plain torch computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from tilewright.codegen.ops.signature import Signature
from tilewright.runtime.serve.kernels import AnyLayout
from tilewright.runtime.serve.plans import Resolution

S = TypeVar("S", bound=Signature)


@dataclass(frozen=True)
class WeightCopy:
    """One weight in one layout."""

    name: str
    """Of the tensor, as the op declares it."""
    layout: AnyLayout | None
    tensor: Tensor

    @property
    def alias(self) -> str:
        """Name by which kernels of this layout take it."""
        return f"{self.name} as {self.layout.key if self.layout else 'declared'}"


@dataclass(frozen=True)
class BoundWeights:
    """The tensors of role ``weight`` of one signature, ready to be called with."""

    tensors: Mapping[str, Tensor | int | None]
    """By name, as the kernels of the plan take them. 0 stands for a weight that no kernel reads."""
    fallback: Callable[..., None]
    """Plain torch: called with the other tensors of a call, in order; writes all outputs. Correct, never fast."""
    declared: Callable[[], Mapping[str, Tensor]]
    """Gives the weights as the op declares them: the originals where they were kept, else copies with the values that
    kernels read."""
    copies: tuple[WeightCopy, ...] = ()
    """Further ones, for kernels of the plan that take a weight in another layout than that among ``tensors``."""
    copied_bytes: int = 0
    """What is held beside the weights that were passed."""
    weight_bytes: int = 0
    """Of the weights that were passed."""


class ServedOp(ABC, Generic[S]):
    """One op as the runtime serves it."""

    name: ClassVar[str]

    @abstractmethod
    def bind(
        self, signature: S, weights: Mapping[str, Tensor], resolution: Resolution, *, keep_weights: bool
    ) -> BoundWeights:
        """Lay ``weights`` out for the kernels of ``resolution``, and make the fallback that reads them.

        Args:
            signature: of the call.
            weights: every tensor of role ``weight`` that is present, as the op declares it.
            resolution: the plan's kernels; there may be none.
            keep_weights: whether the fallback may refer to ``weights``; False: it reads what kernels read, if it can.

        """
