"""Attention of Transformers models over whole prompts on a tuned kernel: when it serves, and the way back."""

import pytest
import torch
from naive_kernels import Built, needs_compiler, store_plan

from tilewright.codegen.backends.cpp.builder import CppBuilder
from tilewright.codegen.hardware.archs import native_arch
from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.errors import TilewrightError
from tilewright.runtime.notices import forget_warnings
from tilewright.runtime.serve.attention import VarlenPrefill
from tilewright.runtime.transformers import disable, enable
from tilewright.runtime.transformers.prompts import prompts_forward
from tilewright.tuner.campaign.variants import VariantBuilder

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

pytestmark = [
    needs_compiler,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # There are plans for attention alone, which is said of the experts.
    pytest.mark.filterwarnings("ignore::tilewright.runtime.TilewrightWarning"),
]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
}
QWEN = {"num_key_value_heads": 2, "num_experts": 4, "head_dim": 16}
LATENT = {
    "intermediate_size": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
PROMPTS = torch.randint(3, 64, (2, 37), generator=torch.Generator().manual_seed(0))


def make_model(kind: str, more: dict, **options):
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # larger than models begin with, so that attention matters to the result
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def store_prefill(path, **fields) -> None:
    """A plan of the default config for attention over prompts."""
    signature, op, arch = AttentionSignature(stage="prefill", heads=4, **fields), find_op("attention"), native_arch()
    variant_builder = VariantBuilder(op, signature, arch, {"cpp": CppBuilder(arch)})
    (built,) = variant_builder.build([op.default_config(signature, arch)])
    record, (artifact,) = variant_builder.record(built, "device")
    store_plan(path, signature, [(None, Built(record, artifact))], threads=1)


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TILEWRIGHT_DB", str(tmp_path / "tuning.db"))
    forget_warnings()


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that our kernels were called with."""
    seen: list[tuple[int, ...]] = []
    prepare = VarlenPrefill.prepare.__func__

    def watched(cls, *arguments, **options):
        made = prepare(cls, *arguments, **options)
        call = made.call
        made.call = lambda q, *others: (seen.append(tuple(q.shape)), call(q, *others))[1]
        return made

    monkeypatch.setattr(VarlenPrefill, "prepare", classmethod(watched))
    return seen


@torch.no_grad()
def logits(model, prompts=PROMPTS, **more):
    return model(prompts, **more).logits


def generate(model):
    return model.generate(PROMPTS[:1], max_new_tokens=64, min_new_tokens=64, do_sample=False)


@pytest.mark.parametrize(
    ("kind", "more", "fields"),
    [
        ("qwen3_moe", QWEN, {"kv_heads": 2, "head_dim": 16}),
        # A window that holds the prompt, and a plan that knows of it.
        (
            "qwen3_moe",
            {**QWEN, "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0},
            {"kv_heads": 2, "head_dim": 16, "window": 64},
        ),
        ("deepseek_v3", LATENT, {"kv_heads": 4, "head_dim": 24, "value_dim": 16}),
    ],
    ids=["grouped", "window", "latent"],
)
def test_prompts_are_served_and_the_rest_is_as_before(tmp_path, calls, kind, more, fields):
    model = make_model(kind, more)
    expected, tokens = logits(model), generate(model)
    store_prefill(tmp_path / "tuning.db", **fields)
    report = enable(model)
    assert len(report.prompts) == 2
    assert "attention over prompts: 2 layers" in str(report)
    assert calls == [(12, 4, fields["head_dim"])] * 2  # enable tries what it serves
    calls.clear()

    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert calls == [(74, 4, fields["head_dim"])] * 2
    calls.clear()
    assert torch.equal(generate(model), tokens)
    assert calls == [(37, 4, fields["head_dim"])] * 2  # the prompt; steps of decoding go to sdpa
    calls.clear()
    padded = torch.ones_like(PROMPTS)
    padded[0, :5] = 0
    masked = logits(model, attention_mask=padded)
    assert calls == []

    disable(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model, attention_mask=padded), masked)
    assert calls == []


def test_gradients_and_another_implementation_stay_as_they_are(tmp_path, calls):
    store_prefill(tmp_path / "tuning.db", kv_heads=2, head_dim=16)
    eager = make_model("qwen3_moe", QWEN, attn_implementation="eager")
    assert enable(eager).prompts == ()
    assert eager.config._attn_implementation == "eager"

    model = make_model("qwen3_moe", QWEN)
    enable(model)
    calls.clear()
    model(PROMPTS).logits.sum().backward()
    assert calls == []
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_tensors_on_another_device_go_to_sdpa(tmp_path, calls):
    store_prefill(tmp_path / "tuning.db", kv_heads=2, head_dim=16)
    model = make_model("qwen3_moe", QWEN)
    enable(model)
    calls.clear()
    q, kv = torch.empty(2, 4, 37, 16, device="meta"), torch.empty(2, 2, 37, 16, device="meta")
    with torch.no_grad():
        out, _ = prompts_forward(model.model.layers[0].self_attn, q, kv, kv, None, scaling=0.25)
    assert (tuple(out.shape), out.device.type, calls) == ((2, 37, 4, 16), "meta", [])


def test_a_served_prompt_compiles_in_one_graph(tmp_path):
    model = make_model("qwen3_moe", QWEN)
    model.set_experts_implementation("grouped_mm")
    expected = logits(model)
    store_prefill(tmp_path / "tuning.db", kv_heads=2, head_dim=16)
    enable(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(PROMPTS, use_cache=False)
    torch.testing.assert_close(compiled.logits, expected, rtol=1e-4, atol=1e-4)


def test_a_kernel_that_cannot_be_loaded_leaves_attention_alone(tmp_path, calls):
    store_prefill(tmp_path / "tuning.db", kv_heads=2, head_dim=16)
    (tmp_path / "tuning.db").chmod(0o666)  # anyone could have written it
    model = make_model("qwen3_moe", QWEN)
    expected = logits(model)
    assert enable(model).prompts == ()
    assert torch.equal(logits(model), expected)
    with pytest.raises(TilewrightError, match="enabled already"):
        enable(model)
    assert calls == []
