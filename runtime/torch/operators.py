"""tilewright as torch operators, so that ``torch.compile`` and ``torch.export`` see one call where kernels run.

The operators are defined beside what they call: ``torch.ops.tilewright.expert_ffn`` and ``routed_experts`` in
experts.py, ``gate`` in gate.py. Their last argument is the handle of an :class:`Experts` or :class:`Gate`, which call
them by themselves while a graph is traced, and never otherwise: an operator's dispatch costs microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from tilewright.errors import TilewrightError

NAMESPACE = "tilewright"

_LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def define_operator(schema: str, *, compute: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``torch.ops.tilewright.<name>``.

    Args:
        schema: ``name(Tensor x, ..., int handle) -> Tensor``; outputs are new tensors, and no argument is written.
        compute: the operator on tensors of CPUs and GPUs.
        fake: the same on tensors without data: shapes, dtypes and strides of the outputs.

    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for kind in ("CPU", "CUDA"):
        _LIBRARY.impl(name, compute, kind)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", refuse_backward, lib=_LIBRARY)


def refuse_backward(*_: object) -> NoReturn:
    """Stand in for a backward pass that there is none of: gradients would silently be wrong.

    Raises:
        TilewrightError: always.

    """
    raise TilewrightError(
        "tilewright's kernels compute no gradients; call under torch.no_grad() or torch.inference_mode()"
    )
