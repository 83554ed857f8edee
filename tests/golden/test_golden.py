"""Rendered sources that were read and found good: a change of a template shows as a diff of what it makes.

After a change that is meant: ``pytest tests/golden --update-golden``, then read the diff.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from tilewright import __version__
from tilewright.codegen.hardware.archs import ARCHS
from tilewright.codegen.ops.attention.signature import AttentionSignature as Attention
from tilewright.codegen.ops.gating.signature import GatingSignature as Gating
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature as MoeGemm
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.rendering import render
from tilewright.codegen.space import Config, Value

HERE = Path(__file__).parent

UP = MoeGemm(stage="up", experts=8, n=1792, k=4096, top_k=2, activation="swiglu")
GEGLU = MoeGemm(stage="up", experts=4, n=100, k=512, top_k=1, activation="geglu", bias=True)
GPT_OSS = MoeGemm(stage="up", experts=32, n=2880, k=2880, top_k=4, activation="swiglu_clamped", bias=True)
DOWN = MoeGemm(stage="down", experts=8, n=4096, k=1792, top_k=2)
RAGGED_DOWN = MoeGemm(stage="down", experts=128, n=2050, k=768, top_k=8, bias=True)
MIXTRAL_BLOCKS = Gating(experts=8, top_k=2, order="blocks", block_size=64)
DEEPSEEK_V3 = Gating(experts=256, top_k=8, score="sigmoid", bias=True, groups=8, top_groups=4, scale=2.5, order="rows")
SHARES = Gating(experts=60, top_k=4, renormalize=False)
SLIDING = Attention(stage="decode", heads=64, kv_heads=8, head_dim=64, window=128, sinks=True)
LATENT = Attention(
    stage="decode", heads=128, kv_heads=1, head_dim=576, value_dim=512, latent=True, scale=192**-0.5, q_dtype="bf16"
)
PROMPT = Attention(stage="prefill", heads=32, kv_heads=8, head_dim=80)
PLAIN = MoeGemm(stage="plain", experts=8, n=24, k=64)


@dataclass(frozen=True)
class Golden:
    """One variant: the default config of its signature, or a template's with these knobs and others' defaults."""

    name: str
    signature: Signature
    arch: str
    template: str = ""
    knobs: tuple[tuple[str, Value], ...] = ()

    @property
    def path(self) -> Path:
        return HERE / f"{self.name}.golden.{find_op(self.signature.op).template(self.config).language}"

    @property
    def config(self) -> Config:
        op, arch = find_op(self.signature.op), ARCHS[self.arch]
        if not self.template:
            return op.default_config(self.signature, arch)
        return op.config(self.template, self.signature, arch, dict(self.knobs))

    def render(self) -> str:
        op, arch = find_op(self.signature.op), ARCHS[self.arch]
        config = self.config
        source = render(op.template(config), self.signature, config, arch)
        return source.replace(f"tilewright {__version__} ", "tilewright VERSION ", 1)


def knobs(**values: Value) -> tuple[tuple[str, Value], ...]:
    return tuple(values.items())


GOLDEN = [
    Golden(
        "attention_decode_window_sinks_avx512",
        SLIDING,
        "x86_64_avx512",
        "attention/cpu_decode",
        knobs(
            tile_rows=4,
            tile_keys=4,
            tile_values=4,
            block=64,
            chunk=512,
            unroll=1,
            streams=2,
            prefetch="along",
            grain=64,
        ),
    ),
    Golden(
        "attention_prefill_neon",
        PROMPT,
        "aarch64_neon",
        "attention/cpu_prefill",
        knobs(tile_rows=8, key_panel=2, value_panel=3, block_rows=64, block_keys=128, unroll=1),
    ),
    Golden(
        "attention_decode_fp8_split_sm_90",
        replace(SLIDING, q_dtype="bf16", kv_dtype="fp8_e4m3", out_dtype="bf16"),
        "sm_90",
        "attention/triton_decode",
        knobs(block_rows=16, block_kv=64, splits=8, operands="keys_first", num_warps=4, num_stages=3),
    ),
    Golden(
        "attention_mla_decode_split_sm_90",
        LATENT,
        "sm_90",
        "attention/triton_mla_decode",
        knobs(block_rows=64, block_kv=32, splits=8, operands="keys_first", num_warps=8, num_stages=3),
    ),
    Golden(
        "attention_prefill_window_sm_80",
        replace(PROMPT, window=512, q_dtype="fp16", kv_dtype="fp16", out_dtype="fp16"),
        "sm_80",
        "attention/triton_prefill",
        knobs(block_m=64, packed=4, block_kv=64, masks="ends", schedule="longest_first", num_warps=4, num_stages=2),
    ),
    Golden("default_up_swiglu_avx2", UP, "x86_64_avx2"),
    Golden("default_plain_avx512", PLAIN, "x86_64_avx512"),
    Golden("default_up_swiglu_sm_90", replace(UP, x_dtype="bf16", w_dtype="bf16", out_dtype="bf16"), "sm_90"),
    Golden(
        "grouped_down_mxfp4_bias_sm_80",
        replace(RAGGED_DOWN, x_dtype="fp16", w_dtype="fp16", out_dtype="fp16"),
        "sm_80",
        "moe_gemm/triton_grouped",
        knobs(
            precision="mxfp4",
            block_m=16,
            block_n=64,
            block_k=128,
            group_m=1,
            num_warps=4,
            num_stages=4,
            operands="weights_first",
            gate_up="none",
            partials="fp32",
        ),
    ),
    Golden(
        "split_k_up_int4_sm_90",
        replace(UP, x_dtype="bf16", w_dtype="bf16", out_dtype="bf16"),
        "sm_90",
        "moe_gemm/triton_split_k",
        knobs(
            precision="int4g128",
            block_m=16,
            block_n=64,
            block_k=128,
            group_m=1,
            num_warps=4,
            num_stages=3,
            operands="weights_first",
            gate_up="two_dots",
            partials="fp32",
            splits=4,
        ),
    ),
    Golden(
        "persistent_up_gather_bias_sm_100",
        replace(GPT_OSS, x_dtype="bf16", w_dtype="bf16", out_dtype="bf16"),
        "sm_100",
        "moe_gemm/triton_persistent",
        knobs(
            precision="bf16",
            block_m=64,
            block_n=64,
            block_k=64,
            group_m=8,
            num_warps=4,
            num_stages=3,
            operands="rows_first",
            gate_up="two_dots",
            partials="none",
            x_loads="tensor_map",
            overlap="warp_specialize",
            blocks_per_sm=1,
        ),
    ),
    Golden(
        "persistent_down_fp8_sm_90",
        replace(DOWN, x_dtype="bf16", w_dtype="bf16", out_dtype="bf16"),
        "sm_90",
        "moe_gemm/triton_persistent",
        knobs(
            precision="fp8_e4m3_token",
            block_m=128,
            block_n=128,
            block_k=128,
            group_m=1,
            num_warps=8,
            num_stages=4,
            operands="rows_first",
            gate_up="none",
            partials="rounded",
            x_loads="tensor_map",
            overlap="flatten",
            blocks_per_sm=1,
        ),
    ),
    Golden(
        "grouped_up_nvfp4_sm_120",
        replace(UP, x_dtype="bf16", w_dtype="bf16", out_dtype="bf16"),
        "sm_120",
        "moe_gemm/triton_grouped",
        knobs(
            precision="nvfp4",
            block_m=64,
            block_n=64,
            block_k=128,
            group_m=1,
            num_warps=4,
            num_stages=3,
            operands="rows_first",
            gate_up="two_dots",
            partials="none",
        ),
    ),
    Golden(
        "gating_fused_groups_gfx942",
        replace(DEEPSEEK_V3, order="blocks", block_size=32),
        "gfx942",
        "gating/triton_fused",
        knobs(block_tokens=4, pick="packed", num_warps=2),
    ),
    Golden(
        "blocked_down_direct_bias_neon",
        RAGGED_DOWN,
        "aarch64_neon",
        "moe_gemm/cpu_blocked",
        knobs(
            precision="fp32",
            vectors=2,
            block_rows=4,
            streams=2,
            k_block=768,
            block_m=96,
            chunk_groups=8,
            order="panel_outer",
            pack_x=False,
            unroll=1,
            prefetch=0,
            fetch_next=True,
            schedule="static",
            gate_up="none",
            combine="direct",
        ),
    ),
    Golden(
        "stream_down_partials_avx2",
        DOWN,
        "x86_64_avx2",
        "moe_gemm/cpu_stream",
        knobs(
            precision="fp32",
            vectors=1,
            block_rows=3,
            streams=6,
            chunk_groups=2,
            unroll=4,
            prefetch=64,
            schedule="dynamic",
            gate_up="none",
            combine="partials",
        ),
    ),
    Golden(
        "gating_insert_blocks_avx2",
        MIXTRAL_BLOCKS,
        "x86_64_avx2",
        "gating/cpu_insert",
        knobs(check=2, insertion="selects", grain=32, scatter="parallel"),
    ),
    Golden(
        "gating_threshold_groups_avx512",
        DEEPSEEK_V3,
        "x86_64_avx512",
        "gating/cpu_threshold",
        knobs(columns=1, insertion="branches", grain=8, scatter="serial"),
    ),
    Golden(
        "gating_lanes_softmax_neon",
        SHARES,
        "aarch64_neon",
        "gating/cpu_lanes",
        knobs(vectors=2, skip=True, grain=128, scatter="none"),
    ),
    Golden(
        "stream_up_geglu_bias_neon",
        GEGLU,
        "aarch64_neon",
        "moe_gemm/cpu_stream",
        knobs(
            precision="fp32",
            vectors=2,
            block_rows=2,
            streams=4,
            chunk_groups=1,
            unroll=1,
            prefetch=16,
            schedule="static",
            gate_up="apart",
            combine="none",
        ),
    ),
    Golden("default_up_clamped_avx512", GPT_OSS, "x86_64_avx512"),
    Golden(
        "stream_up_int4_avx2",
        UP,
        "x86_64_avx2",
        "moe_gemm/cpu_stream",
        knobs(
            precision="int4g32",
            vectors=2,
            block_rows=2,
            streams=3,
            chunk_groups=4,
            unroll=1,
            prefetch=16,
            schedule="dynamic",
            gate_up="apart",
            combine="none",
        ),
    ),
    Golden(
        "integer_up_swiglu_avx2",
        UP,
        "x86_64_avx2",
        "moe_gemm/cpu_integer",
        knobs(
            precision="int8_a8",
            vectors=2,
            block_rows=6,
            streams=1,
            block_m=96,
            chunk_groups=4,
            pack_x=True,
            unroll=1,
            prefetch=16,
            fetch_next=False,
            schedule="dynamic",
            gate_up="interleaved",
            combine="none",
        ),
    ),
    Golden(
        "integer_down_groups_avx512_vnni",
        RAGGED_DOWN,
        "x86_64_avx512_vnni",
        "moe_gemm/cpu_integer",
        knobs(
            precision="int8g128_a8",
            vectors=1,
            block_rows=4,
            streams=3,
            block_m=192,
            chunk_groups=2,
            pack_x=True,
            unroll=1,
            prefetch=0,
            fetch_next=False,
            schedule="static",
            gate_up="none",
            combine="partials",
        ),
    ),
    Golden(
        "blocked_down_mxfp4_avx512",
        RAGGED_DOWN,
        "x86_64_avx512",
        "moe_gemm/cpu_blocked",
        knobs(
            precision="mxfp4",
            vectors=2,
            block_rows=6,
            streams=2,
            k_block=256,
            block_m=96,
            chunk_groups=2,
            order="panel_outer",
            pack_x=True,
            unroll=4,
            prefetch=0,
            fetch_next=False,
            schedule="dynamic",
            gate_up="none",
            combine="partials",
        ),
    ),
]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_source_is_the_one_that_was_read(golden: Golden, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update-golden"):
        golden.path.write_text(golden.render())
    assert golden.path.exists(), "no such golden source yet; make it with pytest tests/golden --update-golden"
    assert golden.render() == golden.path.read_text()


def test_every_template_has_a_golden_source_and_none_is_left_over() -> None:
    templates = {template.name for op in OPS.values() for template in op.templates}
    assert templates == {golden.template for golden in GOLDEN if golden.template}
    assert {golden.path for golden in GOLDEN} == set(HERE.glob("*.golden.*"))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_source_is_formatted(golden: Golden) -> None:
    lines = golden.render().split("\n")
    assert lines[-1] == "" != lines[-2]
    for above, line in pairwise(lines):
        assert line == line.rstrip()
        assert "\t" not in line
        assert len(line) <= 140
        opening = above.endswith("{") and not above.startswith(("namespace", 'extern "C"'))
        assert not (line == "" and opening), f"blank line after {above!r}"
        assert not (above == "" and line.strip() == "}"), "blank line before a closing brace"
