"""Model shapes: presets against the published numbers, config files of every family, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.models import shapes
from tilewright.codegen.models.families import shape_of_family
from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.models.parts import AttentionLayers, ExpertLayers, RouterLayers
from tilewright.codegen.models.presets import PRESETS
from tilewright.codegen.models.shapes import load_model
from tilewright.errors import TilewrightError

# hidden, inter, experts, top_k, shared, layers, moe layers, heads, kv heads, head_dim, vocab
PUBLISHED = {
    "mixtral-8x7b": (4096, 14336, 8, 2, 0, 32, 32, 32, 8, 128, 32000),
    "mixtral-8x22b": (6144, 16384, 8, 2, 0, 56, 56, 48, 8, 128, 32768),
    "qwen3-30b-a3b": (2048, 768, 128, 8, 0, 48, 48, 32, 4, 128, 151936),
    "qwen3-235b-a22b": (4096, 1536, 128, 8, 0, 94, 94, 64, 4, 128, 151936),
    "deepseek-v3": (7168, 2048, 256, 8, 1, 61, 58, 128, 128, 192, 129280),
    "gpt-oss-20b": (2880, 2880, 32, 4, 0, 24, 24, 64, 8, 64, 201088),
    "gpt-oss-120b": (2880, 2880, 128, 4, 0, 36, 36, 64, 8, 64, 201088),
    "llama-4-scout": (5120, 8192, 16, 1, 1, 48, 48, 40, 8, 128, 202048),
    "glm-4.5-air": (4096, 1408, 128, 8, 1, 46, 45, 96, 8, 128, 151552),
    "kimi-k2": (7168, 2048, 384, 8, 1, 61, 60, 64, 64, 192, 163840),
}
BILLION_PARAMETERS = {
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 141,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235,
    "deepseek-v3": 671,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "llama-4-scout": 109,
    "glm-4.5-air": 106,
    "kimi-k2": 1026,
}

SMALL = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16}


def write_config(folder: Path, config: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def load(**changes: Any) -> ModelShape:
    """Shape of the small config with fields changed, by its family alone; those set to ``...`` are taken out."""
    return shape_of({key: value for key, value in {**SMALL, **changes}.items() if value is not ...})


def shape_of(config: dict[str, Any]) -> ModelShape:
    return shape_of_family("small", config, "small/config.json", "install Transformers")


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed."""
    monkeypatch.setattr(shapes, "inspect_config", lambda *_: "install Transformers")


def test_every_preset_is_in_the_published_table() -> None:
    assert set(PRESETS) == set(PUBLISHED) == set(BILLION_PARAMETERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_its_published_shape(name: str) -> None:
    m = load_model(name)
    (experts,), attention, head = m.experts, m.attention[0], m.linears[-1]
    assert (
        experts.hidden,
        experts.inter,
        experts.experts,
        experts.top_k,
        m.shared_experts,
        m.layers,
        m.moe_layers,
        attention.heads,
        attention.kv_heads,
        attention.head_dim,
        head.n,
    ) == PUBLISHED[name]
    assert (m.name, m.tp, m.ep) == (name, 1, 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_experts_of_a_preset_make_up_most_of_the_published_parameters(name: str) -> None:
    m = load_model(name)
    (experts,) = m.experts
    expert_parameters = 3 * experts.hidden * experts.inter * (experts.experts + m.shared_experts) * m.moe_layers
    assert 0.88 < expert_parameters / (BILLION_PARAMETERS[name] * 1e9) < 1.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mixtral-8x7b", ("swiglu", False, "softmax", True, False)),
        ("qwen3-30b-a3b", ("swiglu", False, "softmax", True, False)),
        ("deepseek-v3", ("swiglu", False, "sigmoid", True, True)),
        ("kimi-k2", ("swiglu", False, "sigmoid", True, True)),
        ("glm-4.5-air", ("swiglu", False, "sigmoid", True, True)),
        ("gpt-oss-120b", ("swiglu_clamped", True, "softmax", True, False)),
        ("llama-4-scout", ("swiglu", False, "sigmoid", False, False)),
    ],
)
def test_activation_and_routing_of_families(name: str, expected: tuple[object, ...]) -> None:
    m = load_model(name)
    (experts,), (router,) = m.experts, m.routers
    assert (experts.activation, experts.bias, router.score, router.renormalize, router.bias) == expected


def test_preset_names_ignore_case() -> None:
    assert load_model("Mixtral-8x7B") == load_model("mixtral-8x7b")


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.usefixtures("without_transformers")
def test_config_file_gives_the_preset_shape(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    path = write_config(folder, PRESETS[name])
    assert load_model(path) == load_model(str(folder)) == load_model(name)


@pytest.mark.usefixtures("without_transformers")
def test_name_of_a_config_is_its_folder_or_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    path = write_config(folder, SMALL)
    monkeypatch.chdir(folder)
    assert load_model("config.json").name == load_model(".").name == "my-model"
    assert load_model(path.rename(folder / "other.json")).name == "other"


@pytest.mark.usefixtures("without_transformers")
def test_a_preset_wins_over_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kimi-k2").mkdir()
    write_config(tmp_path / "kimi-k2", SMALL)
    monkeypatch.chdir(tmp_path)
    assert load_model("kimi-k2").experts[0].experts == 384
    assert load_model("./kimi-k2").experts[0].experts == 8


# --- config.json in its many forms


@pytest.mark.parametrize("nesting", [("text_config",), ("thinker_config", "text_config"), ("llm_config",)])
def test_nested_language_model_is_found(nesting: tuple[str, ...]) -> None:
    config: dict[str, Any] = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    for key in reversed(nesting):
        config = {key: config, "hidden_size": 9, "vocab_size": 77, "vision_config": {"hidden_size": 5}}
    m = shape_of(config)
    assert (m.experts[0].hidden, m.linears[-1].n, m.experts[0].experts) == (64, 77, 8)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"])
def test_expert_count_aliases(key: str) -> None:
    assert load(**{"num_local_experts": ..., key: 5}).experts[0].experts == 5


@pytest.mark.parametrize("key", ["num_experts_per_tok", "experts_per_token", "moe_topk"])
def test_top_k_aliases(key: str) -> None:
    assert load(**{"num_experts_per_tok": None, key: 3}).experts[0].top_k == 3


@pytest.mark.parametrize("family", ["new_moe", "granitemoe", "llama", "", None])
def test_a_family_is_never_taken_for_another(family: str | None) -> None:
    with pytest.raises(TilewrightError, match=r"the model_type '.*' is not among .*mixtral.*; install Transformers"):
        load(model_type=family)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe"])
def test_dense_width_is_never_taken_for_that_of_experts(family: str) -> None:
    with pytest.raises(TilewrightError, match="'moe_intermediate_size' is missing"):
        load(model_type=family, **LATENT)


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({}, 6),
        ({"first_k_dense_replace": 2}, 4),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, 2),
        ({"decoder_sparse_step": 2}, 3),
        ({"decoder_sparse_step": 4}, 1),
        ({"mlp_only_layers": [0, 5]}, 4),
        ({"model_type": "llama4_text", "interleave_moe_layer_step": 2}, 3),
        ({"model_type": "llama4_text", "interleave_moe_layer_step": 1, "moe_layers": [1, 3]}, 2),
    ],
)
def test_layers_with_experts_are_counted(changes: dict[str, Any], moe_layers: int) -> None:
    m = load(**changes)
    assert m.moe_layers == m.experts[0].calls == m.routers[0].calls == moe_layers


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, 0),
        ({"n_shared_experts": 2}, 2),
        ({"n_shared_experts": None}, 0),
        ({"num_shared_experts": 1}, 1),
        ({"shared_expert_intermediate_size": 5632}, 1),
        ({"shared_expert_intermediate_size": 0}, 0),
        ({"model_type": "llama4_text"}, 1),
    ],
)
def test_shared_experts(changes: dict[str, Any], shared: int) -> None:
    m = load(**changes)
    assert m.shared_experts == shared
    assert ("shared experts" in {each.what for each in m.left_out}) == bool(shared)


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({}, "swiglu"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "geglu"),
        ({"model_type": "gpt_oss", "hidden_act": "silu", "swiglu_limit": 7.0}, "swiglu_clamped"),
    ],
)
def test_activations(changes: dict[str, Any], activation: str) -> None:
    assert load(**changes).experts[0].activation == activation


WIDTH = {"moe_intermediate_size": 32}
DEEPSEEK_V2 = {"model_type": "deepseek_v2", **WIDTH, **LATENT, "n_group": 4, "topk_group": 2}
DEEPSEEK_V3 = {"model_type": "deepseek_v3", **WIDTH, **LATENT}


@pytest.mark.parametrize(
    ("changes", "score", "renormalize", "bias", "groups"),
    [
        ({**DEEPSEEK_V2, "topk_method": "greedy"}, "softmax", False, False, 1),
        ({**DEEPSEEK_V2, "topk_method": "group_limited_greedy"}, "softmax", False, False, 4),
        ({**DEEPSEEK_V3, "n_group": 4, "topk_group": 2}, "sigmoid", True, True, 4),
        ({**DEEPSEEK_V3, "n_group": 1, "topk_group": 1}, "sigmoid", True, True, 1),
        ({"model_type": "qwen2_moe", **WIDTH}, "softmax", False, False, 1),
        ({"model_type": "qwen3_moe", **WIDTH, "norm_topk_prob": True}, "softmax", True, False, 1),
        ({"model_type": "glm4_moe", **WIDTH, "norm_topk_prob": False}, "sigmoid", False, True, 1),
        ({"model_type": "dots1", **WIDTH, "scoring_func": "noaux_tc"}, "sigmoid", False, True, 1),
    ],
)
def test_routers(changes: dict[str, Any], score: str, renormalize: bool, bias: bool, groups: int) -> None:
    (router,) = load(**changes).routers
    assert (router.score, router.renormalize, router.bias, router.groups) == (score, renormalize, bias, groups)


def test_attention_fields_fall_back_as_transformers_does() -> None:
    (attention,) = load().attention
    assert (attention.kv_heads, attention.head_dim, attention.calls) == (4, 16, 6)


def test_latent_attention_ignores_a_rotary_head_dim() -> None:
    (attention,) = load(**DEEPSEEK_V3, head_dim=8).attention
    assert (attention.head_dim, attention.value_dim) == (32, 16)
    assert (attention.latent_dim, attention.rope_dim) == (32, 8)


def test_layers_with_a_window_are_counted_one_by_one() -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    windows = {a.window: a.calls for a in load(sliding_window=128, layer_types=kinds).attention}
    assert windows == {0: 2, 128: 4}
    assert {a.window: a.calls for a in load(sliding_window=128).attention} == {128: 6}
    gpt_oss = load(model_type="gpt_oss", sliding_window=128, num_hidden_layers=5).attention
    assert {a.window: a.calls for a in gpt_oss} == {0: 2, 128: 3}


def test_a_head_with_the_embeddings_weight_is_not_tuned() -> None:
    m = load(tie_word_embeddings=True)
    assert "head" not in {each.role for each in m.linears}
    assert "the head" in {each.what for each in m.left_out}


# --- sharding


@given(st.sampled_from(sorted(PRESETS)), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8]))
def test_ranks_together_hold_the_whole_model(name: str, tp: int, ep: int) -> None:
    whole, rank = load_model(name), load_model(name, tp=tp, ep=ep)
    for mine, all_of_it in zip(rank.experts, whole.experts, strict=True):
        assert mine.inter * tp == all_of_it.inter
        assert mine.experts * ep == all_of_it.experts
        assert (mine.top_k, mine.hidden, mine.calls) == (all_of_it.top_k, all_of_it.hidden, all_of_it.calls)
    assert (rank.routers, rank.attention, rank.linears) == (whole.routers, whole.attention, whole.linears)
    assert rank == whole.sharded(tp=tp).sharded(ep=ep)


def test_sharding_a_rank_again_counts_all_ranks() -> None:
    whole = load_model("kimi-k2")
    assert whole.sharded(tp=2, ep=2).sharded(tp=4, ep=3) == whole.sharded(tp=8, ep=6)


def test_a_rank_may_hold_fewer_experts_than_a_token_picks() -> None:
    rank = load_model("mixtral-8x7b", ep=8)
    assert (rank.experts[0].experts, rank.experts[0].top_k) == (1, 2)


@pytest.mark.parametrize(
    ("tp", "ep", "message"),
    [
        (3, 1, r"tp=3 does not divide the expert intermediate size 14336; use one of 1, 2, 4, 7, 8"),
        (1, 3, r"ep=3 does not divide the number of experts 8; use one of 1, 2, 4, 8$"),
        (1, 16, r"ep=16 does not divide"),
        (0, 1, r"tp is 0"),
        (1, -2, r"ep is -2"),
        (True, 1, r"tp is True"),
        (2.0, 1, r"tp is 2\.0"),
    ],
)
def test_impossible_sharding_is_refused(tp: int, ep: int, message: str) -> None:
    with pytest.raises(TilewrightError, match=f"mixtral-8x7b.*{message}"):
        load_model("mixtral-8x7b", tp=tp, ep=ep)


# --- bad input


@pytest.mark.parametrize(
    ("name", "hint"), [("mixtral-8x7", "mixtral-8x7b"), ("Qwen/Qwen3-30B-A3B-Instruct", "qwen3-30b-a3b")]
)
def test_unknown_preset_suggests_close_ones_and_lists_all(name: str, hint: str) -> None:
    with pytest.raises(TilewrightError, match=f"did you mean.*{hint}") as caught:
        load_model(name)
    assert all(preset in str(caught.value) for preset in PRESETS)


def test_unknown_preset_without_a_close_one() -> None:
    with pytest.raises(TilewrightError, match=r"unknown model 'zzz': give one of mixtral-8x7b"):
        load_model("zzz")


def test_missing_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(TilewrightError, match=r"nowhere\.json' does not exist"):
        load_model(tmp_path / "nowhere.json")
    with pytest.raises(TilewrightError, match=r"holds no config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"hidden_size": 4096,', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, not a list"),
    ],
)
def test_malformed_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(TilewrightError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": ...}, "this mixtral model has no experts"),
        ({"num_local_experts": 0}, "has no experts"),
        ({"num_local_experts": None}, "has no experts"),
        ({"num_local_experts": -8}, "'num_local_experts' is -8"),
        ({"num_experts_per_tok": 9}, "top_k=9 experts, but there are only 8"),
        ({"num_experts_per_tok": 0}, "'num_experts_per_tok' is 0"),
        ({"num_experts_per_tok": ...}, "'num_experts_per_tok' or .* is missing"),
        ({"hidden_size": ...}, "'hidden_size' is missing"),
        ({"hidden_size": 64.0}, r"'hidden_size' is 64\.0"),
        ({"hidden_size": "64"}, "'hidden_size' is '64'"),
        ({"hidden_size": True}, "'hidden_size' is True"),
        ({"hidden_size": 10**12}, "'hidden_size' is 1000000000000"),
        ({"intermediate_size": 0}, "'intermediate_size' is 0"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000"),
        ({"num_key_value_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        ({"hidden_size": 63}, "'head_dim' is missing and hidden_size 63"),
        ({"hidden_act": "relu2"}, "the activation 'relu2' is not supported"),
        ({"hidden_act": "silu", "swiglu_limit": 10.0}, "'swiglu_limit' with a plain SiLU"),
        ({"model_type": "gpt_oss", "swiglu_limit": 10.0}, r"'swiglu_limit' is 10\.0, but only the 7\.0"),
        ({"model_type": "gpt_oss", "swiglu_limit": "7"}, "'swiglu_limit' is '7'"),
        ({"hidden_act": ["silu"]}, r"'hidden_act' is \['silu'\], but must be a string"),
        ({**DEEPSEEK_V2, "topk_method": "best"}, "the topk_method 'best' of deepseek_v2 is not supported"),
        ({"layer_types": ["full_attention"] * 5}, "'layer_types' names 5 layers, but there are 6"),
        ({"layer_types": ["full_attention"] * 5 + ["mamba"]}, "'layer_types' names 'mamba'"),
        (
            {"model_type": "qwen3_moe", **WIDTH, "sliding_window": 8, "use_sliding_window": True},
            "'sliding_window' is 8, and without 'layer_types' nothing says which layers",
        ),
        ({"model_type": "qwen3_moe", **WIDTH, "norm_topk_prob": "yes"}, "'norm_topk_prob' is 'yes'"),
        ({"mlp_only_layers": "0,1"}, "'mlp_only_layers' must be a list"),
        ({"first_k_dense_replace": 6}, "none of the 6 layers has experts"),
        ({"moe_layers": []}, "none of the 6 layers has experts"),
    ],
)
def test_impossible_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TilewrightError, match=message) as caught:
        load(**changes)
    assert "small" in str(caught.value)


EXPERTS = {"hidden": 64, "inter": 96, "experts": 8, "top_k": 2, "activation": "swiglu", "bias": False, "calls": 6}
ROUTER = {"experts": 8, "top_k": 2, "score": "softmax", "renormalize": True, "bias": False, "calls": 6}
ATTENTION = {"heads": 4, "kv_heads": 2, "head_dim": 16, "value_dim": 16, "scale": 0.25, "calls": 6}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": (ExpertLayers(**{**EXPERTS, "experts": 0}),)}, "experts is 0"),
        ({"experts": (ExpertLayers(**{**EXPERTS, "hidden": -1}),)}, "hidden is -1"),
        ({"experts": (ExpertLayers(**{**EXPERTS, "inter": 1.5}),)}, r"inter is 1\.5"),
        ({"experts": (ExpertLayers(**{**EXPERTS, "activation": "relu"}),)}, "activation 'relu' is none of swiglu"),
        ({"experts": (ExpertLayers(**{**EXPERTS, "top_k": 9}),)}, "top_k=9 experts, but there are only 8"),
        ({"routers": (RouterLayers(**{**ROUTER, "score": "best"}),)}, "score 'best' is none of softmax"),
        ({"routers": (RouterLayers(**{**ROUTER, "groups": 3}),)}, "groups=3 must divide the 8 experts"),
        ({"attention": (AttentionLayers(**{**ATTENTION, "kv_heads": 3}),)}, "is not a multiple of kv_heads=3"),
        ({"shared_experts": -1}, "shared_experts is -1"),
        ({"moe_layers": 33}, "moe_layers=33 is more than layers=32"),
        ({"layers": 10**9}, "layers is 1000000000"),
        ({"hidden": 0}, "hidden is 0"),
    ],
)
def test_a_shape_refuses_sizes_that_no_model_has(changes: dict[str, Any], message: str) -> None:
    fields = {"name": "small", "hidden": 64, "layers": 32, "moe_layers": 32, "attention_layers": 32, **changes}
    with pytest.raises(TilewrightError, match=message):
        ModelShape(**fields)


@pytest.mark.usefixtures("without_transformers")
def test_weights_stand_for_the_config_beside_them(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(TilewrightError, match=r"holds weights, but no config\.json"):
        load_model(weights)
    write_config(tmp_path, SMALL)
    assert load_model(weights) == load_model(tmp_path)
