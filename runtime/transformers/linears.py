"""Linear layers outside of the experts (attention's projections, the head) on tuned kernels, where they have a plan.

Transformers has no interface for them, so that the module itself is replaced: by one of the same parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.binding import TORCH_DTYPES
from tilewright.runtime.serve.gemm import PreparedGemm, prepare
from tilewright.runtime.serve.handles import held
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.serve.plans import is_planned
from tilewright.runtime.torch.dtypes import DTYPE_NAMES
from tilewright.runtime.torch.operators import define_operator
from tilewright.runtime.transformers.inference import SharedByCopies, run_without_backward, wants_gradients
from tilewright.runtime.transformers.recognition import Refusal
from tilewright.runtime.transformers.specialised import TOLERANCE, agree, has_own_forward
from tilewright.runtime.transformers.trial import Call

M = TypeVar("M", bound=nn.Linear)
_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16)}
"""Of the weights that are served, by the kind of device that they lie on."""
_TOLERANCE_OF_HALF = 0.02
"""Relative error within which a layer in bf16 or fp16 agrees with one that adds up in another order."""
_ERRORS = 5.0
"""Within how many times the error of a plan, which was measured on other data, rounded weights agree."""


@dataclass(frozen=True, eq=False)
class _Kernel(SharedByCopies):
    """What computes one linear layer, as one group of a grouped GEMM."""

    prepared: PreparedGemm
    released: bool
    trainable: bool
    """Whether the weight required gradients."""


class TunedLinear(nn.Linear):
    """Stands in for ``original``: the same parameters, of which a released weight has no memory."""

    def __init__(self, original: nn.Linear, prepared: PreparedGemm, *, released: bool) -> None:
        has_bias = original.bias is not None
        rows, columns = original.weight.shape
        super().__init__(columns, rows, bias=has_bias, device="meta")
        self.kernel = _Kernel(prepared, released, original.weight.requires_grad)
        if not released:
            self.weight = original.weight
        self.weight.requires_grad_(self.kernel.trainable and not released)
        self.bias = original.bias
        self.train(original.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear calls it so
        """``input`` [..., in_features] to [..., out_features]; as before where gradients are wanted of kept weights.

        Raises:
            TilewrightError: in training mode and for a backward pass, where the weight was released.

        """
        kernel = self.kernel
        if not kernel.released and wants_gradients(self, input):
            return super().forward(input)
        if self.training:
            raise TilewrightError(
                "the model is in training mode, but weights of linear layers were released for inference; call "
                "model.eval(), or disable(model) to train"
            )
        return run_without_backward(_linear, kernel.prepared, input)

    def restored(self) -> nn.Linear:
        """The layer as it was before; a released weight comes back from what the kernel reads."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = self.weight
        if self.kernel.released:
            values = self.kernel.prepared.weights()["weight"][0]
            weight = nn.Parameter(values, requires_grad=self.kernel.trainable)
        layer.weight, layer.bias = weight, self.bias
        return layer.train(self.training)


@dataclass(frozen=True)
class Place(Generic[M]):
    """Where a linear layer is in a model."""

    name: str
    parent: nn.Module
    module: M

    def put(self, module: nn.Module) -> None:
        """Replace the layer by ``module``."""
        setattr(self.parent, self.name.rpartition(".")[2], module)


def servable(model: nn.Module) -> Iterator[Place[nn.Linear]]:
    """Linear layers whose weight is theirs alone: a tied one has to stay for its other owner.

    Those in fp32 on the CPU, in bf16 or fp16 on a GPU.
    """
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for place in _places(model, nn.Linear):
        weight = place.module.weight
        if weight.dtype in _DTYPES.get(weight.device.type, ()) and owners[id(weight)] == 1:
            yield place


def served(model: nn.Module) -> list[Place[TunedLinear]]:
    """Layers that :class:`TunedLinear` stands in for."""
    return list(_places(model, TunedLinear))


def _places(model: nn.Module, kind: type[M]) -> Iterator[Place[M]]:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if type(module) is kind and name:
            yield Place(name, modules[name.rpartition(".")[0]], module)


def tuned(module: nn.Linear, calls: Sequence[Call], options: ServeOptions) -> TunedLinear | Refusal | None:
    """What serves ``module`` and gives what that gave in ``calls``, or why nothing does.

    None where there is no plan for it, or none whose kernels can be loaded.
    """
    n, k = module.weight.shape
    try:
        dtype = DTYPE_NAMES[module.weight.dtype]
        signature = MoeGemmSignature(stage="plain", experts=1, n=n, k=k, bias=module.bias is not None, x_dtype=dtype)
    except TilewrightError:
        return None  # no kernel computes such a layer, so that there is no plan either
    if not is_planned(signature, options, module.weight.device):
        return None
    if has_own_forward(module) or module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001
        return Refusal("its linear layer has hooks or a forward of its own, which would be lost")
    if not calls:
        return Refusal("the forward that it was tried in does not call its linear layer")
    prepared = prepare(
        module.weight.detach()[None],
        stage="plain",
        bias=None if module.bias is None else module.bias.detach()[None],
        options=options,
    )
    if not prepared.is_tuned:
        return None
    tolerance = TOLERANCE if module.weight.dtype is torch.float32 else _TOLERANCE_OF_HALF
    tolerance = max(tolerance, 0.0 if prepared.is_exact else _ERRORS * options.max_error)
    for call in calls:
        x = call.only_tensor
        if x is None:
            return Refusal("its linear layer is called with more than a tensor")
        if not agree(_compute(prepared, x), call.output, tolerance):
            return Refusal("its linear layer computes something else")
    return TunedLinear(module, prepared, released=not options.keep_weights)


@lru_cache(maxsize=64)
def _one_group(rows: int) -> Tensor:
    """Offsets that put all rows into one group, on the CPU."""
    with torch.inference_mode(mode=False):
        return torch.tensor([0, rows], dtype=torch.int32, device="cpu")


def _one_group_on(device: torch.device, rows: int) -> Tensor:
    """The same on a GPU, made there by every call: a CUDA graph may be recording."""
    return torch.arange(2, dtype=torch.int32, device=device) * rows


def _linear(prepared: PreparedGemm, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.tilewright.linear(x, prepared.handle)
        return result
    return _compute(prepared, x)


def _compute(prepared: PreparedGemm, x: Tensor) -> Tensor:
    signature, device = prepared.signature, prepared.device
    dtype = TORCH_DTYPES[signature.x_dtype]
    rows = x.reshape(-1, signature.k)
    rows = rows if rows.dtype is dtype else rows.to(dtype)
    count = rows.shape[0]
    offsets = _one_group(count) if device.is_host else _one_group_on(rows.device, count)
    out = torch.empty((count, signature.n), dtype=dtype, device=device.torch_device)
    prepared.call(rows.contiguous(), offsets, out)
    return out.view(*x.shape[:-1], signature.n).to(x.dtype)


def _fake(x: Tensor, handle: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], held(handle, PreparedGemm).signature.n))


define_operator(
    "linear(Tensor x, int handle) -> Tensor",
    compute=lambda x, handle: _compute(held(handle, PreparedGemm), x),
    fake=_fake,
)
