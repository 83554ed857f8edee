"""Expressions, layouts, recipes, keys and the default config: the plain data that kernels are described by."""

import numpy as np
import pytest
from covering import FULL
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.hardware.archs import ARCHS, CPU_ARCHS, find_arch
from tilewright.codegen.models.presets import PRESETS
from tilewright.codegen.models.shapes import load_model
from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.recipe.expressions import IntExpr
from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.recipe.resolve import Place, workspace_bytes
from tilewright.codegen.rendering import render
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError

OP = find_op("moe_gemm")


def test_expression_values() -> None:
    sizes = {"rows": 10, "threads": 3}
    assert IntExpr("4 * rows + ceildiv(rows, threads) * max(2, min(rows, 7)) - rows // 3").evaluate(sizes) == 65


@pytest.mark.parametrize("text", ["__import__('os')", "rows ** 2", "rows.x", "1.5", "f(rows)", "rows +", "True"])
def test_expression_grammar_is_closed(text: str) -> None:
    with pytest.raises(TilewrightError, match="recipe expression"):
        IntExpr(text)


@given(st.integers(1, 200), st.sampled_from([8, 16]), st.booleans())
def test_layout_holds_every_column(n: int, columns: int, gated: bool) -> None:
    halves = 2 if gated else 1
    layout = WeightLayout(columns=columns, halves=halves, run=8 if gated else 0)
    held = layout.panels(halves * n) * columns
    assert held >= halves * n
    assert held - halves * n < halves * columns + halves * 8


SERVED_PRESETS = [name for name in PRESETS if "gpt-oss" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("arch", CPU_ARCHS.values(), ids=lambda arch: arch.name)
@pytest.mark.parametrize("name", SERVED_PRESETS if FULL else SERVED_PRESETS[::4])
def test_default_config_is_valid_and_renders(name: str, arch) -> None:
    for signature in OP.signatures(load_model(name)):
        config = OP.default_config(signature, arch)
        assert config in OP.space(signature, arch)
        template = OP.template(config)
        source = render(template, signature, config, arch)
        assert source == render(template, signature, config, arch)
        assert f"constexpr int64_t kK = {signature.k};" in source
        recipe = template.recipe(signature, config, arch)
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert workspace_bytes(recipe, {"tokens": 1, "rows": 2}, Place(threads=2)) >= 0


@pytest.mark.parametrize("arch", CPU_ARCHS.values(), ids=lambda arch: arch.name)
def test_a_search_begins_with_every_precision_in_one_layout_for_few_rows_and_many(arch) -> None:
    for signature in OP.signatures(load_model("mixtral-8x7b", tp=8)):
        refusals = OP.precisions(signature, arch)
        possible = [name for name in ("fp32", "int8g128", "int4g32", "int8_a8") if refusals[name] is None]
        starts = OP.starting_configs(signature, arch, possible)
        space = OP.space(signature, arch, precisions=possible)
        assert all(config in space for config in starts)
        assert len({OP.default_config(signature, arch), *starts}) == 1 + len(starts)
        for name in possible:
            own = [config for config in starts if config["precision"] == name]
            narrow = [c for c in own if OP.layout_key(signature, c, arch) == OP.layout_key(signature, own[0], arch)]
            assert {config["block_rows"] > 4 for config in narrow} == {False, True}, name


def test_the_space_may_be_restricted_to_some_templates() -> None:
    arch = ARCHS["x86_64_avx2"]
    assert OP.template_names([], arch) == ()
    names = OP.template_names(["cpu_stream", "moe_gemm/cpu_stream"], arch)
    assert names == ("moe_gemm/cpu_stream",)
    for signature in OP.signatures(load_model("mixtral-8x7b", tp=8)):
        part = OP.space(signature, arch, names)
        assert {config["template"] for config in part} == set(names)
        assert set(part) <= set(OP.space(signature, arch))


def test_an_unknown_template_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TilewrightError, match=r"moe_gemm has no template 'cpu_streem'; .*: cpu_blocked, cpu_stream"):
        OP.template_names(["cpu_blocked", "cpu_streem"], ARCHS["x86_64_avx2"])


def test_a_template_that_reads_none_of_the_precisions_names_those_that_it_reads() -> None:
    (signature, _), arch = OP.signatures(load_model("mixtral-8x7b", tp=8)), ARCHS["x86_64_avx2"]
    integer = ["moe_gemm/cpu_integer"]
    assert {config["precision"] for config in OP.space(signature, arch, integer, ("fp32", "int8_a8"))} == {"int8_a8"}
    with pytest.raises(
        TilewrightError, match=r"moe_gemm/cpu_integer read no weights in fp32; .*: int8_a8, int8g128_a8"
    ):
        OP.space(signature, arch, integer)


def test_a_template_of_other_archs_is_refused() -> None:
    with pytest.raises(TilewrightError, match=r"'cpu_stream' of moe_gemm is not for sm_90"):
        OP.template_names(["cpu_stream"], ARCHS["sm_90"])


def test_reference_matches_a_loop_over_tokens() -> None:
    signature = MoeGemmSignature(stage="down", experts=3, n=4, k=5, top_k=2, bias=True)
    problem = OP.problem(signature, 6, RoutingSpec.parse("balanced"))
    weights, inputs = OP.weights(signature, 0), OP.inputs(problem, 0)
    inputs["slot_row"][0, 0] = -1
    expected = np.zeros((6, 4))
    for t in range(6):
        for j in range(2):
            row = inputs["slot_row"][t, j]
            if row < 0:
                continue
            e = int(np.searchsorted(inputs["expert_offsets"], row, side="right")) - 1
            product = weights["weight"][e].astype(float) @ inputs["x"][row] + weights["bias"][e]
            expected[t] += inputs["topk_weights"][t, j] * product
    np.testing.assert_allclose(OP.reference(signature, weights, inputs)["out"], expected, rtol=1e-6, atol=1e-6)


def test_problem_survives_its_json() -> None:
    problem = OP.parse_problem(
        {"experts": "8", "n": "32", "k": "16", "top_k": "2", "tokens": "3"}, RoutingSpec.parse("balanced")
    )
    assert OP.problem_from_dict(problem.to_dict()) == problem


def test_unknown_arch_names_the_known_ones() -> None:
    with pytest.raises(TilewrightError, match=r"unknown arch 'sm_1'.*x86_64_avx2"):
        find_arch("sm_1")
