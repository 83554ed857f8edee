"""Kernels that copy tiles by tensor maps: their recipes hold all that a launch needs, and their binaries use them."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_compiling import nearest

from tilewright.codegen.backends.triton.builder import TritonBuilder
from tilewright.codegen.backends.triton.launch import built_launch
from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature as MoeGemm
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.space import Config
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.variants import BuildResult, VariantBuilder

pytest.importorskip("triton", reason="Triton is not installed")

OP = find_op("moe_gemm")
PERSISTENT = "moe_gemm/triton_persistent"
TILE = {"x_loads": "tensor_map", "block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "overlap": "none"}
PLAIN = MoeGemm(stage="plain", experts=4, n=512, k=1024, x_dtype="bf16")
UP = MoeGemm(stage="up", experts=8, n=768, k=2048, top_k=2, activation="swiglu", x_dtype="bf16")
BFLOAT16, UINT8, SWIZZLE_64_BYTES, SWIZZLE_128_BYTES = 9, 0, 2, 3
"""Of the CUDA driver's ``CUtensorMapDataType`` and ``CUtensorMapSwizzle``."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return tmp_path_factory.mktemp("cache")


def build(signature: MoeGemm, arch_name: str, folder: Path, **knobs: Any) -> tuple[VariantBuilder, BuildResult]:
    arch = GPU_ARCHS[arch_name]
    template = next(t for t in OP.templates if t.name == PERSISTENT)
    precision = knobs.get("precision", "bf16")
    own = nearest(template.space(signature, arch, (precision,)), {**TILE, **knobs})
    config = Config.of(PERSISTENT, own)
    assert {name: config[name] for name in (*TILE, *knobs)} == {**TILE, **knobs}
    with TritonBuilder(arch, folder) as builder:
        variant_builder = VariantBuilder(OP, signature, arch, {"triton": builder})
        (built,) = variant_builder.build([config])
    assert built.path is not None, built.message
    return variant_builder, built


def test_a_stored_recipe_holds_all_that_a_tensor_map_needs(folder: Path) -> None:
    variant_builder, built = build(PLAIN, "sm_90", folder)
    record, _ = variant_builder.record(built, "compiled")
    recipe = Recipe.from_dict(json.loads(json.dumps(record.recipe)))
    x, weight, *others = (argument.map for argument in recipe.launches[0].arguments)
    assert x is not None
    assert weight is not None
    assert not any(others)
    assert x.shape == ("rows", "1024")
    assert weight.shape == (str(4 * 512), "1024")
    assert (x.box, weight.box) == ((64, 64), (64, 64))
    assert {x.data_type, weight.data_type} == {BFLOAT16}
    assert {x.swizzle, weight.swizzle} == {SWIZZLE_128_BYTES}
    assert recipe.launches[0].grid == ("min(min(rows, rows // 64 + 4) * 8, 1 * sm_count)",)
    guarded = {guard.expression for guard in recipe.guards}
    assert {"x", "weight"} <= guarded
    (entry,) = record.facts["entries"]
    assert entry["parameter_bytes"][:10] == [128, 4, 4, 8, 8, 128, 4, 4, 8, 8]
    assert math.prod(x.box) * x.element_bytes <= entry["smem_bytes"]


def test_binaries_copy_by_the_maps_and_count_as_wide(folder: Path) -> None:
    variant_builder, built = build(PLAIN, "sm_90", folder)
    (entry,) = variant_builder.record(built, "compiled")[0].facts["entries"]
    assert entry["instructions"]["streamed_load_bytes"] == 0
    assert entry["wide_loads"]
    assert any(name.startswith("UTMALDG") for name in entry["instructions"]["copies"])
    assert any(name.startswith("HGMMA") for name in entry["instructions"]["mma"])
    assert variant_builder.performance_warnings(built.kernel) == ()


@pytest.mark.parametrize("overlap", ["none", "warp_specialize"])
def test_rows_of_tokens_are_gathered_by_the_map(folder: Path, overlap: str) -> None:
    variant_builder, built = build(UP, "sm_100", folder, overlap=overlap)
    record, _ = variant_builder.record(built, "compiled")
    (entry,) = record.facts["entries"]
    assert "UTMALDG.2D.GATHER4" in entry["instructions"]["copies"]
    assert any(name.startswith("UTCHMMA") for name in entry["instructions"]["mma"])
    assert entry["instructions"]["streamed_load_bytes"] == 0
    x = Recipe.from_dict(record.recipe).launches[0].arguments[0].map
    assert x is not None
    assert x.box == (1, 64)
    more = entry["num_warps"] > TILE["num_warps"]
    assert more == (overlap == "warp_specialize")
    assert record.recipe["launches"][0]["block"] == (str(32 * entry["num_warps"]),)


def test_elements_of_four_bits_are_mapped_as_bytes(folder: Path) -> None:
    variant_builder, built = build(PLAIN, "sm_90", folder, precision="int4g64", x_loads="pointers", block_k=128)
    launch = Recipe.from_dict(variant_builder.record(built, "compiled")[0].recipe).launches[0]
    x, weight = (argument.map for argument in launch.arguments[:2])
    assert x is None
    assert weight is not None
    assert weight.shape == (str(4 * 512), "512")
    assert (weight.data_type, weight.box, weight.swizzle) == (UINT8, (64, 64), SWIZZLE_64_BYTES)


def test_maps_that_the_compiler_did_not_make_are_noticed(folder: Path) -> None:
    _, built = build(PLAIN, "sm_90", folder)
    launch, facts = built.variant.recipe.launches[0], built.facts[0]
    fewer = dataclasses.replace(facts, tensor_maps=facts.tensor_maps[:1])
    with pytest.raises(TilewrightError, match="passes 2 tensor maps, and the compiler made 1"):
        built_launch(launch, fewer, "", 32)
    bytes_ = dataclasses.replace(facts, parameter_bytes=(8, *facts.parameter_bytes[1:]))
    with pytest.raises(TilewrightError, match="its binary takes parameters of 8, 4"):
        built_launch(launch, bytes_, "", 32)
