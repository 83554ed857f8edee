"""Switch a Transformers model to tuned kernels, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.codegen.models.config import TOP_K_KEYS
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.errors import TilewrightError
from tilewright.runtime.notices import warn_once
from tilewright.runtime.process_memory import Memory
from tilewright.runtime.serve.devices import serving_device
from tilewright.runtime.serve.experts import Experts
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.serve.plans import is_planned
from tilewright.runtime.serve.prepared import PreparedCall
from tilewright.runtime.torch.dtypes import DTYPE_NAMES
from tilewright.runtime.transformers import linears, prompts, routers
from tilewright.runtime.transformers.interface import (
    IMPLEMENTATION,
    REPLACED_ATTENTION,
    attention_modules,
    checked_model,
    choose_attention,
    experts_modules,
    implementation_of,
    register,
    register_attention,
)
from tilewright.runtime.transformers.linears import Place, TunedLinear
from tilewright.runtime.transformers.norms import serve_norms
from tilewright.runtime.transformers.offloading import held_weight, is_offloaded
from tilewright.runtime.transformers.recognition import ExpertWeights, Form, Refusal, read_form, read_weights
from tilewright.runtime.transformers.reports import (
    Disabled,
    Enabled,
    LeftAlone,
    ServedLayer,
    ServedLinear,
    describe_dequantised,
    describe_left_alone,
)
from tilewright.runtime.transformers.serving import (
    Layer,
    attach,
    detach,
    experts_forward,
    remember,
    run_layer,
    take_back,
)
from tilewright.runtime.transformers.specialised import TOLERANCE, agree, restore
from tilewright.runtime.transformers.taking_back import Part, take_back_what_differs
from tilewright.runtime.transformers.trial import Call, Recording, try_out

_BEFORE = "_tilewright_experts_before"
"""Attribute of an enabled model: the experts implementations that it had, as Transformers gives them."""
_SERVED = "_tilewright_served"
"""Attribute of an enabled model: what is served, :class:`ServedLayer` or :class:`ServedLinear`, by module name."""
_TOLERANCE_OF_HALF = 0.02
"""Relative error within which a layer in bf16 or fp16 agrees with one whose sums are in fp32."""
_STAGES_ERROR = 10.0
"""Of a layer of two rounded stages, in errors of one as it was measured on other data."""


def enable(model: Any, *, options: ServeOptions = ServeOptions(), example: Mapping[str, Any] | None = None) -> Enabled:
    """Serve the expert layers of ``model``, its routers, linear layers and attention over prompts by tuned kernels.

    Registers the experts implementation ``tilewright`` with Transformers and selects it. A layer is served where its
    experts follow Transformers' experts interface and have a plan for where they lie; every other layer runs as before,
    and one warning says why. Experts may lie in memory while the rest is on a GPU. A linear layer outside of the
    experts is served where it is in fp32 (on a GPU in bf16 or fp16), its weight is tied to no other, and there is a
    plan for it (`tune --op all` makes them). Attention over a whole prompt is served causal and without a mask, where
    it is planned and Transformers would use ``sdpa``. On a CPU a router is served in fp32 where a planned gate is shown
    to compute what it does; an RMSNorm in fp32 is computed in one call for a few rows.

    All of it is tried: a small forward of the model is recorded before, each part has to give what it gave there, and
    the same forward afterwards, too. What differs is taken back, and ``left_alone`` names it; what the forward does not
    reach is left alone. Random states, buffers and attributes are then what they were.

    On a CPU weights and inputs of experts in bf16 or fp16 are widened to fp32, which takes twice the memory unless a
    plan stores fewer bits. Values are those that the weights have now. Inference only: in training mode, or where
    gradients are recorded, a layer with kept weights runs as before; else training mode is refused, and so is a
    backward pass.

    Args:
        model: a ``PreTrainedModel`` in evaluation mode, of Transformers 5 or newer.
        options: which plans may serve, and how. Unless ``keep_weights`` is True, the weights that packed ones replace
            are released layer by layer, so that the peak is one layer above the larger of the two.
            ``batch_invariant`` is refused: what Transformers computes itself between the layers does not keep it.
        example: keyword arguments of a small forward to try everything in; None: 12 token ids and a decoding step.
            Parts that only other inputs reach, such as those for images, are served where an example reaches them.

    Returns:
        What is served, what is not and why, and the memory before and after.

    Raises:
        TilewrightError: for anything but such a model, one that is enabled already, and weights that cannot be stored
            in the precision of a plan. The model is then as it was.

    """
    model = checked_model(model)
    if hasattr(model, _BEFORE):
        raise TilewrightError("the model is enabled already; call disable(model) first to enable it in another way")
    if model.training:
        raise TilewrightError("the model is in training mode, and kernels compute no gradients; call model.eval()")
    if options.batch_invariant:
        raise TilewrightError(
            "enable cannot promise batch_invariant=True, for Transformers computes a part of the model itself; leave "
            "it out, or serve layers one by one with Experts, Gate and PagedDecode"
        )
    options = replace(options, keep_weights=options.keep_weights is True)
    before = Memory.now()
    trial, recording = try_out(model, example)
    implementations = model.get_experts_implementation()
    modules = dict(experts_modules(model))
    for module in modules.values():
        remember(module, implementation_of(module))
    register(experts_forward)
    refused: list[LeftAlone] = []
    try:
        model.set_experts_implementation(IMPLEMENTATION)
        calls = _calls_to_try(recording)
        stand_ins = _tuned_linears(model, calls, options, refused)
        prompts_of = _serve_prompts(model, options) if recording.error is None else ()
        routers_of, others = routers.serve_routers(model, calls, options)
        refused += others
        outcomes = _serve_all(modules, calls, options, recording.error)
        norms: tuple[str, ...] = ()
        if stand_ins or any(isinstance(outcome, ServedLayer) for outcome in outcomes):
            norms, others = serve_norms(model, calls)
            refused += others
        for place, stand_in in stand_ins:
            place.put(stand_in)
        served = tuple(outcome for outcome in outcomes if isinstance(outcome, ServedLayer))
        parts = [
            *(Part(name, "attention over prompts", partial(prompts.detach, _at(model, name))) for name in prompts_of),
            *(Part(name, "router", partial(routers.release, _at(model, name))) for name in routers_of),
            *(Part(name, "norm", partial(restore, _at(model, name))) for name in norms),
            *(Part(place.name, "linear layer", partial(_put_back, place)) for place, _ in stand_ins),
            *(Part(layer.name, "experts", partial(take_back, modules[layer.name])) for layer in served),
        ]
        exact = not any(layer.rounded for layer in served) and _is_fp32(model)
        exact = exact and all(stand_in.kernel.prepared.is_exact for _, stand_in in stand_ins)
        taken = take_back_what_differs(model, trial, recording, parts, exact=exact)
    except BaseException:
        _undo(model, implementations)
        raise
    gone = {(part.name, part.what) for part, _ in taken}
    served = tuple(layer for layer in served if (layer.name, "experts") not in gone)
    served_linears = tuple(
        _describe_linear(place.name, stand_in)
        for place, stand_in in stand_ins
        if (place.name, "linear layer") not in gone
    )
    left_alone = tuple(outcome for outcome in outcomes if isinstance(outcome, LeftAlone))
    taken_back = tuple(LeftAlone(part.name, reason) for part, reason in taken)
    all_served: tuple[ServedLayer | ServedLinear, ...] = (*served, *served_linears)
    if not served:
        model.set_experts_implementation(implementations)
    setattr(model, _BEFORE, implementations)
    setattr(model, _SERVED, {layer.name: layer for layer in all_served})
    del stand_ins, parts, taken, recording, calls  # and with it the last reference to weights that were replaced
    report = Enabled(
        model=type(model).__name__,
        layers=served,
        linears=served_linears,
        prompts=tuple(name for name in prompts_of if (name, "attention over prompts") not in gone),
        routers=tuple(name for name in routers_of if (name, "router") not in gone),
        norms=tuple(name for name in norms if (name, "norm") not in gone),
        left_alone=(*left_alone, *taken_back, *refused),
        before=before,
        after=Memory.now(),
    )
    _say_left_alone(report, modules, (*left_alone, *taken_back))
    return report


def disable(model: Any) -> Disabled:
    """Let ``model`` run as it did before :func:`enable`.

    Released weights are made from what kernels read: the very values, except where a plan stored them in fewer bits;
    then they are the rounded ones, and a warning says so.

    Raises:
        TilewrightError: for anything but a Transformers model that is enabled.

    """
    model = checked_model(model)
    if not hasattr(model, _BEFORE):
        raise TilewrightError("the model is not enabled; there is nothing to disable")
    before = Memory.now()
    served: Mapping[str, ServedLayer | ServedLinear] = getattr(model, _SERVED)
    rounded = tuple(layer for layer in served.values() if layer.released and layer.rounded)
    _undo(model, getattr(model, _BEFORE))
    if rounded:
        warn_once(describe_dequantised(rounded))
    lossy = {layer.name for layer in rounded}
    restored = tuple(name for name in served if name not in lossy)
    return Disabled(type(model).__name__, restored, rounded, before, Memory.now())


def _undo(model: Any, implementations: Mapping[str, str | None]) -> None:
    """Bring back the weights and the implementations of ``model``, from any state that ``enable`` may leave it in."""
    for _, module in experts_modules(model):
        detach(module)
    for place in linears.served(model):
        place.put(place.module.restored())
    for module in model.modules():
        routers.release(module)
        restore(module)
    attention = [module for _, module in attention_modules(model, IMPLEMENTATION)]
    for module in attention:
        prompts.detach(module)
    choose_attention(attention, REPLACED_ATTENTION)
    model.set_experts_implementation(implementations)
    for attribute in (_BEFORE, _SERVED):
        if hasattr(model, attribute):
            delattr(model, attribute)


def _serve_prompts(model: Any, options: ServeOptions) -> tuple[str, ...]:
    """Names of the attention modules that run on tuned kernels over a prompt."""
    register_attention(prompts.prompts_forward)
    served = []
    for name, module in list(attention_modules(model, REPLACED_ATTENTION)):
        if prompts.attach(module, options):
            choose_attention([module], IMPLEMENTATION)
            served.append(name)
    return tuple(served)


def _calls_to_try(recording: Recording) -> Mapping[str, Sequence[Call]]:
    """Calls of a whole forward; none of one that ended in an exception, for then nothing can be compared."""
    return recording.calls if recording.error is None else {}


def _tuned_linears(
    model: Any, calls: Mapping[str, Sequence[Call]], options: ServeOptions, refused: list[LeftAlone]
) -> list[tuple[Place[nn.Linear], TunedLinear]]:
    """What is to stand in for linear layers; the model is as it was. Those with a plan but for a reason are added."""
    found = []
    for place in linears.servable(model):
        stand_in = linears.tuned(place.module, calls.get(place.name, ()), options)
        if isinstance(stand_in, TunedLinear):
            found.append((place, stand_in))
        elif stand_in is not None:
            refused.append(LeftAlone(place.name, stand_in.reason))
    return found


def _put_back(place: Place[nn.Linear]) -> None:
    stand_in = getattr(place.parent, place.name.rpartition(".")[2])
    place.put(stand_in.restored())


def _at(model: Any, name: str) -> nn.Module:
    module: nn.Module = model.get_submodule(name)
    return module


def _is_fp32(model: Any) -> bool:
    """Whether a model computes in fp32, so that serving it changes rounding alone."""
    return all(parameter.dtype is torch.float32 for parameter in model.parameters() if parameter.is_floating_point())


def _describe_linear(name: str, layer: TunedLinear) -> ServedLinear:
    prepared = layer.kernel.prepared
    return ServedLinear(
        name,
        prepared.precision,
        prepared.memory.weight_bytes,
        _held_bytes(prepared),
        layer.kernel.released,
        rounded=not prepared.is_exact,
    )


def _serve_all(
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, Sequence[Call]],
    options: ServeOptions,
    failure: Exception | None,
) -> list[ServedLayer | LeftAlone]:
    """Serve one module after the other, so that never more than one has both its own weights and packed ones."""
    forms = {name: read_form(module) for name, module in modules.items()}
    outcomes: list[ServedLayer | LeftAlone] = []
    finite = False
    for name, module in modules.items():
        form = forms[name]
        made = _experts(module, form, options)
        if isinstance(form, Refusal) or isinstance(made, Refusal):
            reason = form.reason if isinstance(form, Refusal) else made.reason  # type: ignore[union-attr]
            outcomes.append(LeftAlone(name, reason))
            continue
        layer = Layer.of(module, made, form, released=not options.keep_weights or is_offloaded(module))
        reason = _disagreement(layer, calls.get(name, ()), options, failure)
        if reason is not None:
            outcomes.append(LeftAlone(name, reason))
            continue
        if layer.quantised and layer.released and not finite:
            # Before the first weights are lost: a later layer that cannot be quantised must leave all as it was.
            for other, other_module in modules.items():
                _require_finite(other, other_module)
            finite = True
        attach(module, layer)
        outcomes.append(
            ServedLayer(
                name,
                made.up.precision,
                made.down.precision,
                _replaced_bytes(form),
                _held_bytes(made.up) + _held_bytes(made.down),
                layer.released and not is_offloaded(module),
                rounded=layer.quantised,
            )
        )
    return outcomes


def _experts(module: nn.Module, form: Form | Refusal, options: ServeOptions) -> Experts | Refusal:
    """The experts of ``module`` with tuned kernels, or why there are none."""
    if isinstance(form, Refusal):
        return form
    if implementation_of(module) != IMPLEMENTATION:
        return Refusal("its model does not let experts implementations be chosen")
    top_k = top_k_of(module)
    if top_k is None:
        return Refusal("its config does not say how many experts a token picks")
    signatures = _signatures(form, top_k)
    if not any(is_planned(signature, options, form.device) for signature in signatures):
        here = serving_device(form.device)
        return Refusal(
            f"the database holds no plan for {signatures[0].describe()} on {here.called} within max_error="
            f"{options.max_error:g}; run `tune {here.tune_arguments} --op all --model FOLDER`"
        )
    weights = read_weights(module, form)
    experts = Experts(
        weights.w_up,
        weights.w_down,
        top_k=top_k,
        activation=form.activation,
        bias_up=weights.bias_up,
        bias_down=weights.bias_down,
        options=replace(options, keep_weights=bool(options.keep_weights) and _shares_memory(weights, module)),
    )
    # Where a plan's kernels cannot be loaded, the runtime has said why.
    return experts if experts.is_tuned else Refusal("none of its plan's kernels can be loaded")


def _disagreement(layer: Layer, calls: Sequence[Call], options: ServeOptions, failure: Exception | None) -> str | None:
    """Why ``layer`` does not give what its module gave in ``calls``; None where it does."""
    if failure is not None:
        first_line = next(iter(str(failure).splitlines()), "")
        return (
            f"the model could not be tried ({type(failure).__name__}: {first_line}); "
            "pass enable(model, example={...}) with the arguments of a small forward"
        )
    if not calls:
        return "the forward that it was tried in does not call its experts"
    tolerance = TOLERANCE if layer.form.dtype is torch.float32 else _TOLERANCE_OF_HALF
    tolerance += _STAGES_ERROR * options.max_error if layer.quantised else 0.0
    for call in calls:
        try:
            with torch.no_grad():
                ours = run_layer(layer, *_in_order(*call.args, **call.kwargs))
        except Exception as error:
            return f"its experts are called in another way than Transformers' interface has it ({error})"
        if not agree(ours, call.output, tolerance):
            return "its experts compute something else than what their interface says"
    return None


def _in_order(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of a call, whichever of them are passed by name."""
    return hidden_states, top_k_index, top_k_weights


def top_k_of(module: nn.Module) -> int | None:
    """Experts that a token picks in ``module``, where its config says so."""
    for key in TOP_K_KEYS:
        with contextlib.suppress(Exception):  # a foreign config may raise anything
            value = getattr(module.config, key, None)
            if isinstance(value, int):
                return value
    return None


def _signatures(form: Form, top_k: int) -> tuple[MoeGemmSignature, MoeGemmSignature]:
    """Of ``up`` and ``down``."""
    dtype = DTYPE_NAMES[form.served_dtype]
    common: dict[str, Any] = {"experts": form.experts, "top_k": top_k, "bias": form.bias, "x_dtype": dtype}
    return (
        MoeGemmSignature(stage="up", n=form.inter, k=form.hidden, activation=form.activation, **common),
        MoeGemmSignature(stage="down", n=form.hidden, k=form.inter, **common),
    )


def _shares_memory(weights: ExpertWeights, module: nn.Module) -> bool:
    """Whether the weights as tilewright takes them are the module's own, and not copies that would be kept beside."""
    pairs: tuple[tuple[Tensor, Any], ...] = (
        (weights.w_up, held_weight(module, "gate_up_proj")),
        (weights.w_down, held_weight(module, "down_proj")),
    )
    return all(ours.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() for ours, own in pairs)


def _require_finite(name: str, module: nn.Module) -> None:
    for weight in ("gate_up_proj", "down_proj"):
        values = held_weight(module, weight)
        if values.device.type != "meta" and not bool(torch.isfinite(values).all()):
            raise TilewrightError(f"{name}.{weight} holds NaN or an infinity and cannot be quantised; mend the weights")


def _replaced_bytes(form: Form) -> int:
    return 3 * form.experts * form.inter * form.hidden * form.dtype.itemsize


def _held_bytes(stage: PreparedCall) -> int:
    """Of the weights that ``stage`` reads: packed, or as they were passed."""
    return stage.memory.bytes or stage.memory.weight_bytes


def _say_left_alone(report: Enabled, modules: Mapping[str, nn.Module], left_alone: tuple[LeftAlone, ...]) -> None:
    anything = report.linears or report.prompts or report.routers or report.norms
    if not modules and not anything:
        warn_once(f"tilewright finds no expert layers that it knows in {report.model}, so the model runs as before")
    elif left_alone:
        reasons = "; ".join(describe_left_alone(left_alone))
        warn_once(f"tilewright leaves layers of {report.model} as they were: {reasons}")
