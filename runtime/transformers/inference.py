"""What all replaced layers share: copies of a model, and a refusal where gradients would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tilewright.errors import TilewrightError
from tilewright.runtime.torch.operators import refuse_backward


class SharedByCopies:
    """Of a copied model, too: nobody writes it. It cannot be pickled, for kernels live in this process."""

    def __deepcopy__(self, _memo: object) -> SharedByCopies:
        """Itself."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse.

        Raises:
            TilewrightError: always.

        """
        raise TilewrightError("a model that tilewright serves cannot be pickled; call disable(model) first")


def wants_gradients(module: nn.Module, x: Tensor) -> bool:
    """Whether a call of ``module`` may be followed by a backward pass that reaches its input or parameters."""
    if module.training:
        return True
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


def run_without_backward(compute: Callable[..., Tensor], served: Any, x: Tensor, *others: Tensor) -> Tensor:
    """``compute(served, x, *others)``, also where gradients are recorded; using them raises.

    A model may well be called without ``no_grad()``; what is wrong is a backward pass.
    """
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        result: Tensor = _WithoutBackward.apply(compute, served, x, *others)  # type: ignore[no-untyped-call]
        return result
    return compute(served, x, *others)


class _WithoutBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, compute: Callable[..., Tensor], served: Any, *tensors: Tensor) -> Tensor:
        """See :func:`run_without_backward`."""
        return compute(served, *(tensor.detach() for tensor in tensors))

    @staticmethod
    def backward(_ctx: Any, *_gradients: Any) -> NoReturn:
        """Refuse."""
        refuse_backward()
