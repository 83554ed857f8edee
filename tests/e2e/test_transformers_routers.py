"""Routers and norms of Transformers models on our own code: when it serves, and the way back."""

import copy

import pytest
import torch
from naive_kernels import Built, needs_compiler, store_plan

from tilewright.codegen.backends.cpp.builder import CppBuilder
from tilewright.codegen.hardware.archs import native_arch
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.runtime.calls.extension import native_for_torch
from tilewright.runtime.notices import forget_warnings
from tilewright.runtime.transformers import disable, enable
from tilewright.runtime.transformers.norms import RowsNorm, serve_norms
from tilewright.runtime.transformers.routers import TunedRouter
from tilewright.runtime.transformers.specialised import Specialised, restore
from tilewright.runtime.transformers.trial import Trial, try_out
from tilewright.tuner.campaign.variants import VariantBuilder

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

pytestmark = [
    needs_compiler,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # There are plans for gating alone, which is said of the experts.
    pytest.mark.filterwarnings("ignore::tilewright.runtime.TilewrightWarning"),
]
needs_extension = pytest.mark.skipif(native_for_torch() is None, reason="needs the C extension")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
QWEN = {"moe_intermediate_size": 24, "num_experts": 8, "head_dim": 8}
DEEPSEEK = {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 0,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
GROUPS = {"groups": 4, "top_groups": 2, "scale": 2.5, "score": "sigmoid", "bias": True}
MODELS = {
    "mixtral": ("mixtral", {"intermediate_size": 24, "num_local_experts": 8}, {}),
    "qwen": ("qwen3_moe", {**QWEN, "norm_topk_prob": True}, {}),
    "qwen, shares of all": ("qwen3_moe", {**QWEN, "norm_topk_prob": False}, {"renormalize": False}),
    "gpt-oss": ("gpt_oss", {"intermediate_size": 24, "num_local_experts": 8, "head_dim": 16}, {}),
    "deepseek": ("deepseek_v3", DEEPSEEK, GROUPS),
}
TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def make_model(name: str):
    kind, more, _ = MODELS[name]
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter_name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.3)
    for buffer_name, buffer in model.named_buffers():
        if "correction_bias" in buffer_name:
            torch.nn.init.normal_(buffer, std=0.3)
    return model


def store_gate(path, name: str) -> None:
    """A plan of the default config for the router of a model."""
    signature = GatingSignature(**{"experts": 8, "top_k": 2, "order": "rows", **MODELS[name][2]})
    op, arch = find_op("gating"), native_arch()
    variant_builder = VariantBuilder(op, signature, arch, {"cpp": CppBuilder(arch)})
    (built,) = variant_builder.build([op.default_config(signature, arch)])
    record, (artifact,) = variant_builder.record(built, "device")
    store_plan(path, signature, [(None, Built(record, artifact))], threads=torch.get_num_threads())


def routers_of(model) -> list:
    return [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]


def by_id(routed) -> tuple[torch.Tensor, ...]:
    """Logits, ids and weights with a token's choices in order of their ids."""
    logits, weights, ids = routed
    ordered, at = ids.sort(-1)
    return logits, ordered, weights.gather(-1, at)


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TILEWRIGHT_DB", str(tmp_path / "tuning.db"))
    forget_warnings()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("name", MODELS)
def test_routers_choose_as_before(tmp_path, name):
    model = make_model(name)
    x = torch.randn(11, 32)
    with torch.no_grad():
        expected, chosen = logits(model), routers_of(model)[0](x)
    store_gate(tmp_path / "tuning.db", name)

    report = enable(model)
    assert len(report.routers) == 2
    assert "2 routers" in str(report)
    router = routers_of(model)[0]
    assert isinstance(router, TunedRouter)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        ours = router(x)
        assert [t.dtype for t in ours] == [t.dtype for t in chosen]
        torch.testing.assert_close(by_id(ours), by_id(chosen))
        # A copy is served, too, and what is no number goes the way it went.
        assert torch.equal(copy.deepcopy(router)(x)[0], ours[0])
        x[3] = torch.nan
        assert router(x)[0].isnan().any()

    disable(model)
    assert not any(isinstance(module, Specialised) for module in model.modules())
    assert torch.equal(logits(model), expected)


def test_routers_without_a_plan_or_with_another_are_left_alone(tmp_path):
    model = make_model("qwen")
    assert enable(model).routers == ()
    disable(model)
    store_gate(tmp_path / "tuning.db", "qwen, shares of all")
    assert enable(model).routers == ()


def test_a_router_that_chooses_in_its_own_way_is_left_alone(tmp_path, monkeypatch):
    model = make_model("qwen")
    store_gate(tmp_path / "tuning.db", "qwen")
    kind = type(routers_of(model)[0])
    forward = kind.forward

    def halved(self, hidden_states):
        found, weights, ids = forward(self, hidden_states)
        return found, weights / 2, ids

    monkeypatch.setattr(kind, "forward", halved)
    assert enable(model).routers == ()


def test_gradients_go_through_the_router_of_before(tmp_path):
    model = make_model("qwen")
    store_gate(tmp_path / "tuning.db", "qwen")
    enable(model)
    _, weights, _ = routers_of(model)[0](torch.randn(4, 32))
    weights.square().sum().backward()
    assert routers_of(model)[0].weight.grad.abs().sum() > 0


@needs_extension
@pytest.mark.parametrize("name", MODELS)
def test_norms_of_a_few_rows_are_ours(name):
    model = make_model(name)
    expected = logits(model)
    served, _ = serve_norms(model, try_out(model, None)[1].calls)
    assert len(served) == sum(name.endswith("norm") for name, _ in model.named_modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    for module in model.modules():
        restore(module)
    assert torch.equal(logits(model), expected)


def calls_of(norm):
    """What a norm by itself is called with in a forward of a few rows."""
    return Trial({"input": torch.randn(3, norm[0].weight.shape[0])}, steps=False).record(norm).calls


@needs_extension
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 4, 64), (0, 5), (1, 1, 1000), (700, 64)])
def test_a_norm_gives_what_it_gave(shape):
    from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

    norm = torch.nn.Sequential(MixtralRMSNorm(shape[-1]))
    torch.nn.init.normal_(norm[0].weight)
    for x in (torch.randn(shape), 1e3 * torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2], torch.zeros(shape)):
        with torch.no_grad():
            expected = norm(x)
            serve_norms(norm, calls_of(norm))
            torch.testing.assert_close(norm(x), expected)
        restore(norm[0])
    serve_norms(norm, calls_of(norm))
    assert isinstance(norm[0], RowsNorm)
    x = torch.randn(shape, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert norm(torch.ones(shape, dtype=torch.bfloat16)).dtype is torch.float32  # as Mixtral's does, by its weight


def test_a_norm_of_another_kind_is_left_alone():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    norm = GemmaRMSNorm(8)
    norm.variance_epsilon = norm.eps  # only its name is another one; it multiplies by 1 + weight
    norm = torch.nn.Sequential(norm)
    served, left_alone = serve_norms(norm, calls_of(norm))
    assert served == ()
    assert [each.reason for each in left_alone] == ["its norm computes something else than an RMSNorm"]
