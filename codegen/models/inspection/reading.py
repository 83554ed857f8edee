"""From a traced pass to the parts of a model, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tilewright.codegen.models.inspection.attention import read_attention
from tilewright.codegen.models.inspection.experts import read_experts
from tilewright.codegen.models.inspection.refusal import Refusal
from tilewright.codegen.models.inspection.routers import read_router
from tilewright.codegen.models.inspection.tracing import ExpertsCall, Trace

_SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
_ROLES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output", "out_proj": "output"}
_LEAST_COLUMNS = 8
"""Of a linear layer that is worth a kernel: a vector of an arch."""
_BETWEEN = "what it computes between its linear layers is no op"


@dataclass
class _Parts:
    """Parts of one op as they are found: alike ones are counted."""

    counts: Counter[tuple[tuple[str, Any], ...]] = field(default_factory=Counter)
    refused: dict[str, list[nn.Module]] = field(default_factory=dict)

    def add(self, read: Mapping[str, Any] | Refusal, module: nn.Module) -> None:
        """Count a call of ``module``."""
        if isinstance(read, Refusal):
            self.refused.setdefault(read.reason, []).append(module)
        else:
            self.counts[tuple(read.items())] += 1

    def documents(self) -> list[dict[str, Any]]:
        """The parts, with their calls."""
        return [{**dict(fields), "calls": calls} for fields, calls in self.counts.items()]


def read_parts(trace: Trace, beside: Sequence[str] = ()) -> dict[str, Any]:
    """Fields of ``ModelShape`` but for its name, as plain data.

    Args:
        trace: of the model.
        beside: names of the configs of parts that the traced class does not have.

    """
    stack = _decoder_layers(trace)
    places = {module: [n for n, layer in enumerate(stack) if trace.holds(layer, module)] for module in trace.names}
    attention, experts, routers = _read_attention(trace), _read_experts(trace), _read_routers(trace)
    attention_layers = {n for call in trace.attention for n in places[call.module]}
    moe_layers = {n for call in trace.experts for n in places[call.module]}
    linears, left_out = _read_linears(trace)
    for what, op, parts in (
        ("experts", "moe_gemm", experts),
        ("router", "gating", routers),
        ("attention", "attention", attention),
    ):
        left_out += [
            {"what": f"{what} of {_layers(len({n for m in modules for n in places[m]}))}", "why": reason, "op": op}
            for reason, modules in parts.refused.items()
        ]
    mixers = _other_mixers(stack, attention_layers, trace)
    left_out += [
        {
            "what": f"{name} of {_layers(count)}",
            "why": "it is neither attention over all tokens or a window nor a linear layer, and no op computes it",
            # Attention that is none of Transformers' functions is what attention would be tuned for.
            "op": "attention" if not attention_layers and "Attention" in name else "",
        }
        for name, count in mixers.items()
    ]
    shared = _shared_experts(trace)
    if shared:
        left_out.append({"what": "activation of shared experts", "why": _BETWEEN, "op": ""})
    dense = len(stack) - len(moe_layers)
    if dense and _has_dense_mlp(stack, moe_layers, trace):
        left_out.append({"what": "activation of dense layers", "why": _BETWEEN, "op": ""})
    left_out += _uncalled(trace)
    left_out += [
        {
            "what": f"what {name!r} describes",
            "why": "the installed Transformers has a class for the language model alone",
            "op": "",
        }
        for name in beside
    ]
    return {
        "hidden": trace.model.get_input_embeddings().weight.shape[-1],
        "layers": len(stack),
        "moe_layers": len(moe_layers),
        "attention_layers": len(attention_layers),
        "shared_experts": shared,
        "experts": experts.documents(),
        "routers": routers.documents(),
        "attention": sorted(attention.documents(), key=lambda each: (each["window"], -each["calls"])),
        "linears": linears,
        "left_out": left_out,
    }


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count != 1 else ''}"


def _decoder_layers(trace: Trace) -> list[nn.Module]:
    """The called layers of the list that most layers are called of; an outer list before one in it."""
    lists = [module for module in trace.names if isinstance(module, nn.ModuleList)]
    called = {module: [layer for layer in module if trace.called[layer]] for module in lists}
    busy = [*(call.module for call in trace.attention), *(call.module for call in trace.experts)]
    working = [each for each in lists if not busy or any(trace.holds(each, module) for module in busy)]
    outer = [one for one in working if not any(other is not one and trace.holds(other, one) for other in working)]
    best = max(outer, key=lambda each: len(called[each]), default=None)
    return called[best] if best is not None else []


def _read_attention(trace: Trace) -> _Parts:
    parts = _Parts()
    for call in trace.attention:
        parts.add(read_attention(call), call.module)
    return parts


def _read_experts(trace: Trace) -> _Parts:
    parts = _Parts()
    for call in trace.experts:
        parts.add(read_experts(call, trace.parent(call.module)), call.module)
    return parts


def _read_routers(trace: Trace) -> _Parts:
    """Blocks of one make are tried once."""
    parts = _Parts()
    tried: dict[Any, Mapping[str, Any] | Refusal] = {}
    for call in trace.experts:
        block = trace.parent(call.module)
        make = _make(block, call)
        if make not in tried:
            tried[make] = read_router(block, call.module, trace.arguments[block])
        parts.add(tried[make], call.module)
    return parts


def _make(block: nn.Module, call: ExpertsCall) -> Any:
    """What tells blocks apart: classes, shapes and settings of all their modules."""
    plain = int | float | str | bool | None
    return call.top_k, tuple(
        (
            name,
            type(module).__name__,
            tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)),
            tuple((n, tuple(b.shape)) for n, b in module.named_buffers(recurse=False)),
            tuple((n, v) for n, v in sorted(vars(module).items()) if isinstance(v, plain) and n != "layer_idx"),
        )
        for name, module in block.named_modules()
    )


def _read_linears(trace: Trace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Linear layers by shape, and what is left out of them and why."""
    owners = Counter(id(each) for _, each in trace.model.named_parameters(remove_duplicate=False))
    head = trace.model.get_output_embeddings()
    attention = {call.module: call for call in trace.attention}
    found: dict[tuple[int, int, bool, str], list[int]] = {}
    left_out: list[dict[str, Any]] = []
    narrow = other = tied = 0
    for module, calls in (trace.linears + trace.other_linears).items():
        key = module.out_features, module.in_features, module.bias is not None
        if owners[id(module.weight)] > 1:
            if module is head:
                why = "its weight is the embeddings', so that it stays as it is"
                left_out.append({"what": "the head", "why": why, "op": ""})
            else:
                tied += 1
        elif module is head:
            found.setdefault((*key, "head"), [0, 0])[0] += 1
        elif module in trace.other_linears:
            other += 1
        elif module.out_features < _LEAST_COLUMNS:
            narrow += 1
        else:
            counts = found.setdefault((*key, _role(module, trace, attention)), [0, 0])
            counts[0] += calls
            counts[1] += calls
    for count, what, why in (
        (tied, "with a weight that is not theirs alone", "they stay as they are"),
        (other, "that see more or fewer rows than tokens", "how many is not known"),
        (narrow, f"of less than {_LEAST_COLUMNS} columns", "they are too narrow for a kernel"),
    ):
        if count:
            left_out.append({"what": f"{count} linear layers {what}", "why": why, "op": ""})
    linears = [
        {"n": n, "k": k, "bias": bias, "role": role, "decode": decode, "prefill": prefill}
        for (n, k, bias, role), (decode, prefill) in found.items()
    ]
    order = ("query", "key", "value", "output", "other", "head")
    return sorted(linears, key=lambda each: order.index(each["role"])), left_out


def _role(module: nn.Linear, trace: Trace, attention: Mapping[nn.Module, Any]) -> str:
    """Attention's own projections by name, where their sizes are those of its heads."""
    call = attention.get(trace.parent(module))
    role = _ROLES.get(trace.names[module].rpartition(".")[2])
    if call is None or role is None:
        return "other"
    expected = {
        "query": (module.out_features, call.q[1] * call.q[3]),
        "key": (module.out_features, call.k[1] * call.k[3]),
        "value": (module.out_features, call.v[1] * call.v[3]),
        "output": (module.in_features, call.q[1] * call.v[3]),
    }[role]
    return role if expected[0] == expected[1] else "other"


def _other_mixers(stack: list[nn.Module], attention_layers: set[int], trace: Trace) -> Counter[str]:
    """Classes of called modules that only layers without attention have and that are none of their dense parts."""
    holding = [*(call.module for call in trace.attention), *(call.module for call in trace.experts)]
    known = {type(child).__name__ for n in attention_layers for child in stack[n].children()}
    found: Counter[str] = Counter()
    for n, layer in enumerate(stack):
        if n in attention_layers:
            continue
        for child in layer.children():
            name = type(child).__name__
            plain = name in known or name.endswith(("Norm", "MLP", "Mlp")) or not any(True for _ in child.parameters())
            if trace.called[child] and not plain and not any(trace.holds(child, module) for module in holding):
                found[name] += 1
    return found


def _shared_experts(trace: Trace) -> int:
    """As the config counts them; 1 where it does not, and there are some."""
    blocks = {trace.parent(call.module) for call in trace.experts}
    # They lie beside the experts, or beside the block that has these.
    around = blocks | {trace.parent(block) for block in blocks}
    children = [child for holder in around for child in holder.named_children()]
    if not any(
        name.startswith("shared") and not name.endswith("gate") and trace.called[child] for name, child in children
    ):
        return 0
    config = trace.model.config.get_text_config()
    counts = [value for key in _SHARED_KEYS if isinstance(value := getattr(config, key, None), int) and value > 0]
    return counts[0] if counts else 1


def _has_dense_mlp(stack: list[nn.Module], moe_layers: set[int], trace: Trace) -> bool:
    return any(
        type(module).__name__.endswith(("MLP", "Mlp"))
        for n, layer in enumerate(stack)
        if n not in moe_layers
        for module in layer.modules()
        if trace.called[module]
    )


def _uncalled(trace: Trace) -> list[dict[str, Any]]:
    """Outer modules with weights that a pass over text alone does not call, such as a model's eyes."""
    found: list[dict[str, Any]] = []
    outer = [trace.model, *(child for child in trace.model.children() if not _is_silent(child, trace))]
    for parent in outer:
        for name, child in parent.named_children():
            if _is_silent(child, trace) and any(True for _ in child.parameters()):
                why = "a pass over text alone does not call it"
                found.append({"what": f"{name} ({type(child).__name__})", "why": why, "op": ""})
    return found


def _is_silent(module: nn.Module, trace: Trace) -> bool:
    return not any(trace.called[each] for each in module.modules())
