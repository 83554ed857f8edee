"""Predictions: what physics says of them whatever the constants are, and that they are as fast as ranking needs."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.hardware.devices import DEVICES
from tilewright.codegen.tiled_work import (
    WeightFormat,
    decode_attention_work,
    gating_work,
    gemm_work,
    grouped_gemm_work,
    prefill_attention_work,
)
from tilewright.codegen.work import LaunchWork
from tilewright.errors import TilewrightError
from tilewright.tuner.prediction.predict import Prediction, predict
from tilewright.tuner.prediction.resources import Resources

BF16 = WeightFormat(2.0)
TILES = st.sampled_from([(16, 64, 64), (32, 32, 128), (64, 128, 32), (128, 128, 64), (128, 256, 64)])
DEVICE = st.sampled_from(sorted(DEVICES))
LAUNCH = {"warps": st.sampled_from([1, 2, 4, 8]), "stages": st.integers(1, 5)}


def of(work: LaunchWork, device: str, warps: int = 4, stages: int = 3, **changes: int) -> Prediction:
    chip = DEVICES[device]
    resources = replace(Resources.estimated(work, chip.arch, warps, stages), **changes)
    return predict([work], [resources], chip)


def gemm(m: int, n: int, k: int, tile: tuple[int, int, int]) -> LaunchWork:
    return gemm_work("gemm", m, n, k, tile=tile, dtype="bf16")


@given(
    sizes=st.tuples(*[st.integers(1, 20000)] * 3),
    more=st.tuples(*[st.integers(0, 5000)] * 3),
    tile=TILES,
    device=DEVICE,
    **LAUNCH,
)
def test_more_work_is_never_faster(
    sizes: tuple[int, int, int],
    more: tuple[int, int, int],
    tile: tuple[int, int, int],
    device: str,
    warps: int,
    stages: int,
) -> None:
    larger = [size + plus for size, plus in zip(sizes, more, strict=True)]
    small = of(gemm(*sizes, tile), device, warps, stages)
    large = of(gemm(larger[0], larger[1], larger[2], tile), device, warps, stages)
    assert large.us >= small.us * (1 - 1e-9)


@given(counts=st.lists(st.integers(0, 400), min_size=1, max_size=40), expert=st.integers(0, 39), device=DEVICE)
def test_a_further_row_of_an_expert_is_never_faster(counts: list[int], expert: int, device: str) -> None:
    def time_us(rows: list[int]) -> float:
        work = grouped_gemm_work("up", rows, 1408, 2048, tile=(16, 128, 64), dtype="bf16", weights=BF16, halves=2)
        return of(work, device).us

    more = list(counts)
    more[expert % len(counts)] += 1
    assert time_us(more) >= time_us(counts) * (1 - 1e-9)


@given(size=st.integers(64, 8192), tile=TILES)
def test_a_device_with_more_bandwidth_is_never_slower(size: int, tile: tuple[int, int, int]) -> None:
    work = gemm(size, size, size, tile)
    assert of(work, "h200").us <= of(work, "h100-sxm").us


@given(spilled=st.integers(1, 4096), tile=TILES, device=DEVICE)
def test_spills_cost(spilled: int, tile: tuple[int, int, int], device: str) -> None:
    work = gemm(4096, 4096, 4096, tile)
    assert of(work, device, spill_bytes=spilled).us > of(work, device).us


def test_terms_are_what_the_time_consists_of() -> None:
    found = of(gemm(4096, 4096, 4096, (128, 128, 64)), "a100-sxm-80gb")
    alone = found.terms["launch"] + found.terms["blocks"]
    parts = [found.terms[name] for name in ("matrix", "scalar", "dram", "l2", "latency")]
    assert alone + max(parts) <= found.us <= alone + sum(parts)
    assert found.low_us < found.us < found.high_us


def test_no_kernel_beats_the_peak_of_its_device() -> None:
    found = of(gemm(8192, 8192, 8192, (128, 128, 64)), "h100-sxm", warps=8)
    assert found.us > 2 * 8192**3 / (DEVICES["h100-sxm"].peak_tflops["bf16"] * 1e6)


def test_launches_of_a_kernel_add_up() -> None:
    work = gemm(512, 512, 512, (64, 64, 64))
    chip = DEVICES["h200"]
    resources = Resources.estimated(work, chip.arch, 4, 3)
    one, two = predict([work], [resources], chip), predict([work] * 2, [resources] * 2, chip)
    assert two.us == pytest.approx(2 * one.us)
    assert two.terms["matrix"] == pytest.approx(2 * one.terms["matrix"])


def test_a_type_without_matrix_unit_is_named() -> None:
    work = gemm_work("gemm", 64, 64, 64, tile=(64, 64, 64), dtype="fp8_e4m3")
    with pytest.raises(TilewrightError, match=r"A100 SXM 80GB has no matrix unit for fp8_e4m3"):
        of(work, "a100-sxm-80gb")


def test_rows_are_padded_and_only_experts_with_rows_are_read() -> None:
    work = grouped_gemm_work("up", [0, 1, 17], 256, 128, tile=(16, 64, 64), dtype="bf16", weights=BF16, x_rows=9)
    assert work.programs == (0 + 1 + 2) * 4
    assert work.steps == 2
    assert work.step_flops == 2 * 16 * 64 * 64
    assert work.dram_bytes == 2 * 256 * 128 * 2 + 9 * 128 * 2 + 18 * 256 * 2


def test_split_k_makes_more_programs_with_fewer_steps() -> None:
    whole, split = (
        grouped_gemm_work("up", [3], 256, 1024, tile=(16, 64, 64), dtype="bf16", weights=BF16, split_k=splits)
        for splits in (1, 4)
    )
    assert (split.programs, split.steps) == (4 * whole.programs, whole.steps / 4)
    assert split.dram_bytes > whole.dram_bytes


def test_decoding_reads_what_each_sequence_sees() -> None:
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "value_dim": 128, "block_kv": 64, "dtype": "bf16"}
    work = decode_attention_work("decode", [1000, 24], splits=4, kv_bytes=2.0, **shape)
    assert work.programs == 2 * 8 * 4
    assert work.dram_bytes == 1024 * 8 * 256 * 2 + 2 * 32 * 256 * 2
    windowed = decode_attention_work("decode", [1000, 24], splits=4, kv_bytes=2.0, window=128, **shape)
    assert windowed.dram_bytes == 152 * 8 * 256 * 2 + 2 * 32 * 256 * 2


def test_latent_rows_are_read_once_for_both_products() -> None:
    shape = {"heads": 128, "kv_heads": 1, "head_dim": 576, "value_dim": 512, "block_kv": 32, "dtype": "bf16"}
    work = decode_attention_work("decode", [1000, 24], splits=4, kv_bytes=2.0, kv_elements=576, **shape)
    assert work.programs == 2 * 8 * 4
    assert work.step_bytes == 32 * 576 * 2
    assert work.step_flops == 2 * 16 * 32 * (576 + 512)
    assert work.dram_bytes == 1024 * 576 * 2 + 2 * 128 * (576 + 512) * 2


def test_prefill_skips_what_causality_and_windows_hide() -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "value_dim": 64, "block_q": 64, "block_kv": 64}
    work = prefill_attention_work("prefill", [256], dtype="bf16", kv_bytes=2.0, **shape)
    assert (work.programs, work.steps) == (4 * 4, (1 + 2 + 3 + 4) / 4)
    windowed = prefill_attention_work("prefill", [256], dtype="bf16", kv_bytes=2.0, window=65, **shape)
    assert windowed.steps == (1 + 2 + 2 + 2) / 4


def test_gating_is_predicted_without_a_matrix_unit() -> None:
    work = gating_work("topk", 4096, 128, 8, block_tokens=4, logit_bytes=4.0)
    found = of(work, "mi300x")
    assert found.terms["matrix"] == 0
    assert np.isfinite(found.us)
    assert found.us > 0
