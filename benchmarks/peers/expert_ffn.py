"""Peers for the whole expert FFN: routing from logits, gate and up, SwiGLU, down, the weighted sum per token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from peers import Call, Peer, missing_package, packed_once


@dataclass(frozen=True)
class ExpertFfn:
    """One batch: out[t] = sum over the top_k experts e of t: weight[t, e] * w2[e] @ (silu(gate) * up).

    x [tokens, hidden], router_logits [tokens, experts], w13 [experts, 2 * inter, hidden] with all gate rows before all
    up rows, w2 [experts, hidden, inter]; all fp32. The weights are the softmax over all experts, renormalised over the
    top_k chosen ones.
    """

    x: Tensor
    router_logits: Tensor
    w13: Tensor
    w2: Tensor
    top_k: int

    @property
    def flops(self) -> int:
        _, hidden, inter = self.w2.shape
        return 6 * len(self.x) * self.top_k * hidden * inter

    @property
    def bytes_moved(self) -> int:
        """The least that must be read and written: the active experts' weights, x, the logits and the output once."""
        experts, hidden, inter = self.w2.shape
        active = len(self.router_logits.topk(self.top_k).indices.unique())
        return 4 * (3 * active * hidden * inter + 2 * self.x.numel() + len(self.x) * experts)


def route(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return each token's weights and experts [tokens, top_k], as the routers of Mixtral and Qwen3-MoE compute them."""
    weights, ids = torch.topk(torch.softmax(router_logits, -1), top_k)
    return weights / weights.sum(-1, keepdim=True), ids


def reference(case: ExpertFfn) -> Tensor:
    """The result in fp64."""
    weights, ids = route(case.router_logits.double(), case.top_k)
    x, out = case.x.double(), torch.zeros_like(case.x, dtype=torch.float64)
    for e in ids.unique().tolist():
        token, choice = torch.where(ids == e)
        gate, up = F.linear(x[token], case.w13[e].double()).chunk(2, -1)
        out.index_add_(0, token, F.linear(F.silu(gate) * up, case.w2[e].double()) * weights[token, choice, None])
    return out


def make_cases(
    *, experts: int, top_k: int, hidden: int, inter: int, tokens: int, exceed_bytes: int, seed: int = 0
) -> list[ExpertFfn]:
    """Batches of equal work whose weights together exceed ``exceed_bytes`` (give three times the last-level cache).

    One random routing is drawn; the batches relabel its experts as `peers.grouped_gemm.make_cases` does.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator)
    used = torch.bincount(logits.topk(top_k).indices.flatten(), minlength=experts)
    logits = logits[:, used.argsort(descending=True)]  # the most used expert is number 0
    active = int((used > 0).sum())
    shifts = range(0, experts - active + 1, active)
    tensors = -(-exceed_bytes // (experts * 3 * inter * hidden * 4))
    cases = []
    for _ in range(tensors):
        w13 = torch.randn(experts, 2 * inter, hidden, generator=generator) * hidden**-0.5
        w2 = torch.randn(experts, hidden, inter, generator=generator) * inter**-0.5
        for shift in shifts:
            x = torch.randn(tokens, hidden, generator=generator)
            cases.append(ExpertFfn(x, logits.roll(shift, 1).contiguous(), w13, w2, top_k))
    return cases


# What applies one expert's weights to its rows: (rows [n, in], packed weights) -> [n, out].
Linear = Callable[[Tensor, Tensor], Tensor]


def _loop_over_experts(
    case: ExpertFfn, up_weights: Sequence[Tensor], down_weights: Sequence[Tensor], linear: Linear
) -> Call:
    """Loop with the fewest eager operations: one sort, one product per expert, one activation and sum of all rows."""
    experts, hidden, inter = case.w2.shape
    rows = len(case.x) * case.top_k
    up_out, down_out = torch.full((rows, 2 * inter), torch.nan), torch.full((rows, hidden), torch.nan)
    gate, up = up_out[:, :inter], up_out[:, inter:]

    def call() -> Tensor:
        weights, ids = route(case.router_logits, case.top_k)
        chosen, order = ids.flatten().sort(stable=True)
        counts = torch.bincount(chosen, minlength=experts).tolist()
        x = case.x.index_select(0, order // case.top_k)
        active, first = [], 0
        for e, count in enumerate(counts):
            if count:
                active.append((e, first, first + count))
                first += count
        for e, a, b in active:
            up_out[a:b] = linear(x[a:b], up_weights[e])
        hidden_rows = F.silu(gate).mul_(up)
        for e, a, b in active:
            down_out[a:b] = linear(hidden_rows[a:b], down_weights[e])
        by_choice = torch.empty_like(down_out).index_copy_(0, order, down_out)
        return torch.bmm(weights.unsqueeze(1), by_choice.view(-1, case.top_k, hidden)).squeeze(1)

    return call


def _torch_loop(cases: Sequence[ExpertFfn], _threads: int) -> list[Call]:
    return [_loop_over_experts(case, list(case.w13), list(case.w2), F.linear) for case in cases]


def _onednn_loop(cases: Sequence[ExpertFfn], _threads: int) -> list[Call]:
    """The same loop over weights in oneDNN's own layout: more than eager torch offers by itself."""

    def pack(w: Tensor) -> list[Tensor]:
        return [torch.ops.mkldnn._reorder_linear_weight(each, 16) for each in w]  # noqa: SLF001

    def linear(x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")  # noqa: SLF001

    packs = zip(
        packed_once(cases, lambda case: case.w13, pack), packed_once(cases, lambda case: case.w2, pack), strict=True
    )
    return [_loop_over_experts(case, up, down, linear) for case, (up, down) in zip(cases, packs, strict=True)]


def _transformers(implementation: str) -> Callable[[Sequence[ExpertFfn], int], list[Call]]:
    """Transformers' own experts module of Mixtral, with one of its experts implementations."""

    def prepare(cases: Sequence[ExpertFfn], _threads: int) -> list[Call]:
        from transformers.models.mixtral.configuration_mixtral import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        def call_for(case: ExpertFfn) -> Call:
            experts, hidden, inter = case.w2.shape
            config = MixtralConfig(
                hidden_size=hidden, intermediate_size=inter, num_local_experts=experts, num_experts_per_tok=case.top_k
            )
            config._experts_implementation = implementation  # noqa: SLF001 (set by from_pretrained for whole models)
            with torch.device("meta"):
                module = MixtralExperts(config)
            module.gate_up_proj = torch.nn.Parameter(case.w13, requires_grad=False)
            module.down_proj = torch.nn.Parameter(case.w2, requires_grad=False)

            def call() -> Tensor:
                weights, ids = route(case.router_logits, case.top_k)
                return module(case.x, ids, weights)

            return call

        return [call_for(case) for case in cases]

    return prepare


def _onnxruntime(cases: Sequence[ExpertFfn], threads: int) -> list[Call]:
    """ONNX Runtime's contrib operator MoE. On the CPU its SwiGLU wants gate and up rows in turn (swiglu_fusion=1)."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    def session_for(case: ExpertFfn) -> onnxruntime.InferenceSession:
        experts, hidden, inter = case.w2.shape
        gate, up = case.w13.chunk(2, 1)
        interleaved = torch.stack([gate, up], 2).reshape(experts, 2 * inter, hidden)
        node = helper.make_node(
            "MoE",
            ["x", "router_logits", "w13", "", "w2"],
            ["out"],
            domain="com.microsoft",
            k=case.top_k,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,  # silu(gate) * up: the operator's defaults are those of gpt-oss
            activation_beta=0.0,
            normalize_routing_weights=1,
        )

        def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        def stored_outside(name: str, *shape: int) -> onnx.TensorProto:
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=name)
            return tensor

        graph = helper.make_graph(
            [node],
            "expert_ffn",
            [value("x", "tokens", hidden), value("router_logits", "tokens", experts)],
            [value("out", "tokens", hidden)],
            [stored_outside("w13", experts, 2 * inter, hidden), stored_outside("w2", experts, hidden, inter)],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Its threads still spin within a run, but do not disturb the other contenders after it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(w.numpy()) for w in (interleaved, case.w2)]
        options.add_external_initializers(["w13", "w2"], values)
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def call_for(case: ExpertFfn, session: onnxruntime.InferenceSession) -> Call:
        out = torch.full_like(case.x, torch.nan)
        binding = session.io_binding()
        for name, tensor in (("x", case.x), ("router_logits", case.router_logits)):
            binding.bind_input(name, "cpu", 0, "float32", list(tensor.shape), tensor.data_ptr())
        binding.bind_output("out", "cpu", 0, "float32", list(out.shape), out.data_ptr())

        def call() -> Tensor:
            session.run_with_iobinding(binding)
            return out

        return call

    sessions: dict[int, onnxruntime.InferenceSession] = {}
    for case in cases:
        if case.w13.data_ptr() not in sessions:
            sessions[case.w13.data_ptr()] = session_for(case)
    return [call_for(case, sessions[case.w13.data_ptr()]) for case in cases]


_NO_TRANSFORMERS = missing_package("transformers", "transformers>=5")
_NO_ONNXRUNTIME = missing_package("onnxruntime", "onnxruntime") or missing_package("onnx", "onnx")
_NO_ONEDNN = "" if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"

PEERS: tuple[Peer[ExpertFfn], ...] = (
    Peer("torch_loop", _torch_loop),
    Peer("onednn_loop", _onednn_loop, _NO_ONEDNN),
    Peer("transformers_grouped_mm", _transformers("grouped_mm"), _NO_TRANSFORMERS),
    Peer("onnxruntime_moe", _onnxruntime, _NO_ONNXRUNTIME),
)

# Copies the weights of every token's experts: Transformers offers it for few tokens, and with many it needs gigabytes.
BATCHED_MM = Peer("transformers_batched_mm", _transformers("batched_mm"), _NO_TRANSFORMERS)
