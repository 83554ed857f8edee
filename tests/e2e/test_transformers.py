"""Transformers models with random weights on real kernels: the same logits and tokens, and the way back."""

import copy
import math
import pickle

import pytest
import torch
from naive_kernels import build, needs_compiler, store_plan

from tilewright.codegen.backends.cpp.builder import CppBuilder
from tilewright.codegen.hardware.archs import native_arch
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.errors import TilewrightError
from tilewright.runtime import ServeOptions, TilewrightWarning
from tilewright.runtime.notices import forget_warnings
from tilewright.runtime.transformers import disable, enable
from tilewright.tuner.campaign.variants import VariantBuilder
from tilewright.tuning_db.records import PlanEntry, PlanRecord
from tilewright.tuning_db.store import Store

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

pytestmark = [needs_compiler, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

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
}
CONFIGS = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "deepseek_v3": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 2,
        "first_k_dense_replace": 0,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
}
PROMPT = torch.tensor([[5, 9, 13, 21, 34]])


def make_model(kind: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **CONFIGS[kind]})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # larger than models begin with, so that experts matter to the result
            torch.nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation("eager")
    return model


def store_plans(path, kind: str, mark: float = 1.0):
    gpt = kind == "gpt_oss"
    shape = {"experts": 4, "top_k": 2, "bias": gpt}
    up = MoeGemmSignature(stage="up", n=24, k=32, activation="swiglu_clamped" if gpt else "swiglu", **shape)
    down = MoeGemmSignature(stage="down", n=32, k=24, **shape)
    store_plan(path, up, [(None, build(up, layout=WeightLayout(8, halves=2, run=4)))])
    return store_plan(path, down, [(None, build(down, layout=WeightLayout(8), mark=mark))])


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TILEWRIGHT_DB", str(tmp_path / "tuning.db"))
    forget_warnings()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads cost more than such small matrices
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def logits(model):
    return model(PROMPT).logits


def generate(model):
    return model.generate(PROMPT, max_new_tokens=64, min_new_tokens=64, do_sample=False)


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_and_tokens_are_those_of_eager(tmp_path, kind):
    model = make_model(kind)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected, tokens = logits(model), generate(model)
    store_plans(tmp_path / "tuning.db", kind)

    report = enable(model)
    assert [layer.precision_up for layer in report.layers] == ["fp32", "fp32"]
    assert f"serves {len(report.layers)} expert layers in fp32" in str(report)
    assert {p.device.type for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))} >= {"meta"}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(model), tokens)

    assert len(disable(model).restored) == 2
    assert model.get_experts_implementation() == {"": "eager"}
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_it_is_our_kernels_that_run(tmp_path):
    model = make_model("qwen3_moe")
    arguments = torch.randn(50, 32), torch.tensor([[0, 3]] * 50), torch.full((50, 2), 0.5)
    with torch.no_grad():
        expected = model.model.layers[0].mlp.experts(*arguments)
        store_plans(tmp_path / "tuning.db", "qwen3_moe", mark=1 + 8e-6)  # a down kernel whose sums are a little larger
        assert len(enable(model).layers) == 2
        got = model.model.layers[0].mlp.experts(*arguments)
    assert (got.double() * expected).sum() / (expected.double() ** 2).sum() - 1 == pytest.approx(8e-6, abs=2e-6)


def test_a_kernel_that_computes_something_else_does_not_serve(tmp_path):
    model = make_model("qwen3_moe")
    expected = logits(model)
    store_plans(tmp_path / "tuning.db", "qwen3_moe", mark=1.001)
    with pytest.warns(TilewrightWarning, match="its experts compute something else"):
        assert enable(model).layers == ()
    assert torch.equal(logits(model), expected)


def test_a_model_loaded_from_a_folder_is_served(tmp_path):
    make_model("qwen3_moe").save_pretrained(tmp_path / "model")
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    expected = logits(model)
    assert len(enable(model).layers) == 2
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def store_int8_plans(path, error: float):
    op, arch = find_op("moe_gemm"), native_arch()
    common = {"experts": 4, "top_k": 2}
    with Store.open(path) as store:
        for signature in (
            MoeGemmSignature(stage="up", n=24, k=32, activation="swiglu", **common),
            MoeGemmSignature(stage="down", n=32, k=24, **common),
        ):
            try:
                variant_builder = VariantBuilder(op, signature, arch, {"cpp": CppBuilder(arch)})
            except TilewrightError as failure:
                pytest.skip(str(failure))
            (built,) = variant_builder.build([next(iter(op.space(signature, arch, precisions=("int8",))))])
            record, artifacts = variant_builder.record(built, "device")
            store.add_kernel(record, artifacts)
            plan = PlanRecord(
                op=op.name,
                signature_key=signature.key,
                signature=signature.to_dict(),
                device_key=read_cpu_info().key,
                threads=2,
                layout=built.variant.layout_key,
                timing="measured",
                checked="device",
                entries=(PlanEntry(None, record.key, 10.0, 20.0, 8),),
                precision="int8",
                error=error,
            )
            store.put_plan(plan)


def test_weights_in_int8_stay_within_their_error_and_are_not_brought_back_unsaid(tmp_path):
    model, bound = make_model("qwen3_moe"), 0.01
    expected = logits(model)
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    store_int8_plans(tmp_path / "tuning.db", error=bound)
    assert {layer.precision_up for layer in enable(model).layers} == {"fp32"}
    disable(model)
    report = enable(model, options=ServeOptions(max_error=bound))
    assert {layer.precision_up for layer in report.layers} == {"int8"}
    assert sum(layer.packed_bytes for layer in report.layers) < 0.5 * sum(
        layer.replaced_bytes for layer in report.layers
    )
    # The errors of up and down in each of two layers, which are independent of each other.
    error = (logits(model) - expected).norm() / expected.norm()
    assert 0 < error <= math.sqrt(4) * bound
    served = logits(model)
    with pytest.warns(TilewrightWarning, match="rounded values"):
        assert len(disable(model).dequantised) == 2
    torch.testing.assert_close(logits(model), served, rtol=1e-3, atol=1e-3)


def test_a_bf16_model_is_widened_and_comes_back_as_it_was(tmp_path):
    model = make_model("qwen3_moe", torch.bfloat16)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    enable(model)
    got = logits(model)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)
    disable(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_what_is_not_known_or_not_planned_runs_as_before(kind):
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **CONFIGS.get(kind, {"intermediate_size": 24})})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    expected = logits(model)
    why = "no expert layers that it knows" if kind == "qwen2" else "no plan for moe_gemm .* run `tune"
    with pytest.warns(TilewrightWarning, match=why) as caught:
        report = enable(model)
    assert len(caught) == 1
    assert report.layers == ()
    assert torch.equal(logits(model), expected)
    disable(model)
    assert torch.equal(logits(model), expected)


def test_an_activation_that_is_not_known_is_left_alone(tmp_path):
    model = make_model("qwen3_moe")
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    model.model.layers[1].mlp.experts.act_fn = torch.nn.ReLU()
    expected = logits(model)
    with pytest.warns(TilewrightWarning, match=r"layers\.1\.mlp\.experts, for its activation is none of swiglu"):
        report = enable(model)
    assert [layer.name for layer in report.layers] == ["model.layers.0.mlp.experts"]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_batch_invariance_is_not_promised_for_a_whole_model(tmp_path):
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    model = make_model("qwen3_moe")
    with pytest.raises(TilewrightError, match=r"cannot promise batch_invariant=True.*leave it out"):
        enable(model, options=ServeOptions(batch_invariant=True))
    assert enable(model).layers  # nothing had begun


def test_gradients_are_refused_or_right_but_never_wrong(tmp_path):
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    model = make_model("qwen3_moe")
    enable(model)
    loss = model(PROMPT).logits.sum()
    with pytest.raises(TilewrightError, match="compute no gradients"):
        loss.backward()
    model.train()
    with pytest.raises(TilewrightError, match="training mode"):
        model(PROMPT)

    kept, plain = make_model("qwen3_moe"), make_model("qwen3_moe")
    enable(kept, options=ServeOptions(keep_weights=True))
    for each in (kept, plain):
        each(PROMPT).logits.sum().backward()
    for (name, mine), other in zip(kept.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)


def test_wrong_use_is_told_in_one_sentence(tmp_path):
    model = make_model("qwen3_moe")
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    with pytest.raises(TilewrightError, match="not enabled"):
        disable(model)
    with pytest.raises(TilewrightError, match=r"not a Linear"):
        enable(torch.nn.Linear(2, 2))
    with pytest.raises(TilewrightError, match=r"call model\.eval"):
        enable(model.train())
    enable(model.eval())
    with pytest.raises(TilewrightError, match="enabled already"):
        enable(model)
    with pytest.raises(TilewrightError, match="cannot be pickled"):
        pickle.dumps(model.model.layers[0].mlp.experts)


def test_a_failure_half_way_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    from tilewright.runtime.transformers import enabling

    model = make_model("qwen3_moe")
    expected = logits(model)
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    real, calls = enabling.read_weights, []

    def fail_at_second(module, form):
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError
        return real(module, form)

    monkeypatch.setattr(enabling, "read_weights", fail_at_second)
    with pytest.raises(MemoryError):
        enable(model)
    assert model.get_experts_implementation() == {"": "eager"}
    assert torch.equal(logits(model), expected)


def test_copies_share_kernels_and_outlive_the_original(tmp_path):
    model = make_model("qwen3_moe")
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    enable(model)
    other, expected = copy.deepcopy(model), logits(model)
    disable(model)
    assert torch.equal(logits(other), expected)


def test_an_enabled_model_compiles_in_one_graph(tmp_path):
    model = make_model("qwen3_moe")
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    enable(model)
    experts = model.model.layers[0].mlp
    x = torch.randn(1, 7, 32)
    with torch.no_grad():
        expected = experts(x)
        torch.testing.assert_close(torch.compile(experts, fullgraph=True, backend="aot_eager")(x), expected)
        exported = torch.export.export(experts, (x,))
        torch.testing.assert_close(exported.module()(x), expected)


def store_linear_plans(path, *shapes: tuple[int, int]):
    for n, k in shapes:
        signature = MoeGemmSignature(stage="plain", experts=1, n=n, k=k)
        store_plan(path, signature, [(None, build(signature, layout=WeightLayout(8)))])


def test_linear_layers_with_a_plan_are_served_and_come_back(tmp_path):
    model = make_model("qwen3_moe")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected, tokens = logits(model), generate(model)
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    store_linear_plans(tmp_path / "tuning.db", (32, 32), (64, 32))  # query and output; the head; not key and value
    report = enable(model)
    assert sorted(layer.name.rpartition(".")[2] for layer in report.linears) == [
        "lm_head",
        *["o_proj"] * 2,
        *["q_proj"] * 2,
    ]
    assert "serves 2 expert layers and 5 linear layers in fp32" in str(report)
    assert model.state_dict().keys() == weights.keys()
    assert model.lm_head.weight.device.type == "meta"
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(model), tokens)
    other = copy.deepcopy(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(PROMPT, use_cache=False)
    torch.testing.assert_close(compiled.logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TilewrightError, match="compute no gradients"):
        other(PROMPT).logits.sum().backward()
    with pytest.raises(TilewrightError, match="training mode"):
        other.lm_head.train()(torch.ones(1, 32))

    assert len(disable(model).restored) == 7
    assert type(model.lm_head) is torch.nn.Linear
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_tied_weights_and_kept_ones_stay(tmp_path):
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model("qwen3_moe", **SIZES, **CONFIGS["qwen3_moe"], tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    plain = copy.deepcopy(model)
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    store_linear_plans(tmp_path / "tuning.db", (32, 32), (64, 32))
    report = enable(model, options=ServeOptions(keep_weights=True))
    assert not any(layer.name == "lm_head" for layer in report.linears)
    assert len(report.linears) == 4
    assert model.get_input_embeddings().weight is model.lm_head.weight
    for each in (model, plain):
        each(PROMPT).logits.sum().backward()
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    disable(model)
    assert torch.equal(logits(model), logits(plain))
