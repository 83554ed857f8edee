"""One expert layer of a model, and the function that Transformers calls for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tilewright.errors import TilewrightError
from tilewright.runtime.serve.experts import Experts
from tilewright.runtime.transformers.inference import SharedByCopies, run_without_backward, wants_gradients
from tilewright.runtime.transformers.interface import forward_of
from tilewright.runtime.transformers.offloading import go_past_hook, go_through_hook, is_offloaded
from tilewright.runtime.transformers.recognition import Form, as_module_weights

_LAYER = "_tilewright_layer"
_BEFORE = "_tilewright_before"
_REPLACED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class Layer(SharedByCopies):
    """What serves one module."""

    experts: Experts
    form: Form
    released: bool
    """Whether the module has no weights of its own to run with: they were given back, or a hook has them."""
    trainable: tuple[bool, ...]
    """Whether each of the replaced weights required gradients."""

    @classmethod
    def of(cls, module: nn.Module, experts: Experts, form: Form, *, released: bool) -> Layer:
        """``experts`` for ``module``, whose weights have the form ``form``."""
        return cls(experts, form, released, tuple(getattr(module, name).requires_grad for name in _REPLACED))

    @property
    def quantised(self) -> bool:
        """Whether kernels read rounded weights."""
        return not (self.experts.up.is_exact and self.experts.down.is_exact)


def layer_of(module: nn.Module) -> Layer | None:
    """What serves ``module``; None for one that runs as before."""
    layer = getattr(module, _LAYER, None)
    return layer if isinstance(layer, Layer) else None


def remember(module: nn.Module, implementation: str | None) -> None:
    """Keep the name of what ``module`` called before."""
    setattr(module, _BEFORE, implementation)


def attach(module: nn.Module, layer: Layer) -> None:
    """Have ``layer`` serve ``module``, and release the module's own weights where the layer says so."""
    setattr(module, _LAYER, layer)
    go_past_hook(module)
    if not layer.released or is_offloaded(module):
        return
    for name in _REPLACED:
        # Of the same shape and without memory: what asks for its values fails, and does not read wrong ones.
        placeholder = torch.empty_like(getattr(module, name), device="meta")
        setattr(module, name, nn.Parameter(placeholder, requires_grad=False))


def detach(module: nn.Module) -> None:
    """Undo :func:`attach` and :func:`remember`; released weights come back from what kernels read."""
    take_back(module)
    vars(module).pop(_BEFORE, None)


def take_back(module: nn.Module) -> None:
    """Undo :func:`attach`: the module runs what it ran before."""
    layer = layer_of(module)
    go_through_hook(module)
    if layer is not None and layer.released and not is_offloaded(module):
        restored = as_module_weights(layer.experts.weights(), layer.form)
        for name, trainable in zip(_REPLACED, layer.trainable, strict=True):
            setattr(module, name, nn.Parameter(restored[name], requires_grad=trainable))
    vars(module).pop(_LAYER, None)


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation ``tilewright``; modules that are not served run what they ran before.

    Args:
        module: of a class that Transformers decorates with ``use_experts_implementation``.
        hidden_states: [tokens, hidden].
        top_k_index: int64 [tokens, top_k].
        top_k_weights: [tokens, top_k].

    Raises:
        TilewrightError: for what the runtime refuses; in training mode and for a backward pass, where the weights that
            could be trained were released.

    """
    layer = layer_of(module)
    if layer is None or (not layer.released and wants_gradients(module, hidden_states)):
        before = forward_of(module, getattr(module, _BEFORE, None))
        return before(module, hidden_states, top_k_index, top_k_weights)
    if module.training:
        raise TilewrightError(
            "the model is in training mode, but its expert weights were released for inference; call model.eval(), or "
            "disable(model) to train"
        )
    return run_without_backward(run_layer, layer, hidden_states, top_k_index, top_k_weights)


def run_layer(layer: Layer, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Output of ``layer`` in the dtype of ``x``; see :func:`experts_forward`."""
    form = layer.form
    if x.device != form.device:  # the experts bring it to where they lie, and the result back, in its dtype
        return layer.experts.run(x, topk_ids, topk_weights)
    if x.dtype is form.served_dtype and topk_weights.dtype is torch.float32:
        return layer.experts.run(x, topk_ids, topk_weights)
    return layer.experts.run(x.to(form.served_dtype), topk_ids, topk_weights.float()).to(x.dtype)
