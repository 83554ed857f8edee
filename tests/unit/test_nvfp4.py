"""nvfp4: what is packed is what references compute with, and rounds no further than the format must."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.numbers.activation_rounding import round_activations
from tilewright.codegen.numbers.dtypes import E2M1_LARGEST, e2m1_bits, e4m3_bits, round_to
from tilewright.codegen.numbers.layouts import RowLayout
from tilewright.codegen.numbers.nvfp4 import NVFP4_GROUP, nvfp4_parts
from tilewright.codegen.numbers.precisions import find_precision
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.errors import TilewrightError
from tilewright.runtime.weights.row_packing import pack_rows, round_rows

EXPERTS, N, K = 2, 6, 192
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_Floats = np.ndarray


def awkward_weights(seed: int) -> _Floats:
    """Rows of sizes that are far apart, groups of zeros and with an outlier, and an expert of zeros in one seed."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((EXPERTS, N, K)) * 2.0 ** rng.integers(-9, 9, (EXPERTS, N, K // 16)).repeat(16, axis=2)
    weight[0, 0, :16] = 0
    weight[0, 1, 5] = 3000
    weight[1] *= 0 if seed == 0 else 2.0**-60
    return weight.astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("precision", "nibbles"), [("nvfp4", "pairs"), ("nvfp4_a16", "runs")])
def test_bytes_say_what_references_compute_with(precision: str, nibbles: str, seed: int) -> None:
    weight = awkward_weights(seed)
    layout = RowLayout(precision, nibbles)  # type: ignore[arg-type]
    packed = pack_rows(weight, layout)
    assert packed.nbytes == layout.packed_bytes(EXPERTS, N, K)
    codes = packed[: weight.size // 2]
    if nibbles == "pairs":
        elements = np.stack([codes & 15, codes >> 4], axis=1).reshape(weight.shape)
    else:
        elements = np.stack([codes.reshape(-1, 16) & 15, codes.reshape(-1, 16) >> 4], axis=1).reshape(weight.shape)
    groups = K // NVFP4_GROUP
    begin, outer_at = layout.scale_offset(EXPERTS, N, K), layout.outer_offset(EXPERTS, N, K)
    scales = torch.from_numpy(packed[begin : begin + EXPERTS * N * groups].copy()).view(torch.float8_e4m3fn).float()
    by_row = scales.numpy().reshape(layout.scale_shape(EXPERTS, N, K))
    if nibbles == "runs":
        by_row = by_row.transpose(0, 2, 1)
    outer = packed[outer_at:].view(np.float32)
    read = E2M1[elements] * by_row.repeat(NVFP4_GROUP, axis=2) * outer[:, None, None]
    np.testing.assert_array_equal(read, round_rows(weight, find_precision(precision), "bf16"))


@pytest.mark.parametrize("seed", range(4))
def test_values_are_rounded_to_the_nearest_that_their_scale_can_say(seed: int) -> None:
    values = awkward_weights(seed).reshape(EXPERTS, -1, NVFP4_GROUP)
    elements, scales, outer = nvfp4_parts(values)
    np.testing.assert_array_equal(elements, round_to(elements, "fp4_e2m1"))
    np.testing.assert_array_equal(scales, round_to(scales, "fp8_e4m3"))
    steps = (scales * outer[:, None])[:, :, None]
    # Half the distance between neighbours of e2m1, at most 1; e4m3 rounds a scale by 1/16, which 6 times it may lack.
    allowed = np.where(np.abs(values) < 2 * steps, 0.25, np.where(np.abs(values) < 4 * steps, 0.5, 1)) * steps
    short = np.maximum(np.abs(values) - E2M1_LARGEST * steps, 0)
    assert (short <= np.abs(values) / 16 + outer[:, None, None] * 2.0**-9 * E2M1_LARGEST).all()
    assert (np.abs(elements * steps - values) <= allowed * 1.001 + short).all()
    assert not elements[values == 0].any()


def test_element_codes_round_to_nearest_even() -> None:
    between = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, 1e30], np.float32)
    nearest = np.array([0, 1, 1, 2, 2, 4, 4, 6, 6], np.float32)
    np.testing.assert_array_equal(round_to(between, "fp4_e2m1"), nearest)
    np.testing.assert_array_equal(round_to(np.nextafter(between[:7], np.float32(9)), "fp4_e2m1"), E2M1[1:8])
    np.testing.assert_array_equal(E2M1[e2m1_bits(-nearest)], -nearest)
    np.testing.assert_array_equal(e2m1_bits(E2M1), [*range(8), 0, *range(9, 16)])


def test_scale_codes_are_those_of_torch() -> None:
    scales = nvfp4_parts(awkward_weights(1).reshape(EXPERTS, -1, NVFP4_GROUP))[1]
    bits = torch.from_numpy(scales).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(e4m3_bits(scales), bits)


def test_a_row_of_activations_does_not_depend_on_others() -> None:
    x = awkward_weights(2)[0]
    alone = [round_activations(row[None], find_precision("nvfp4"))[0] for row in x]
    np.testing.assert_array_equal(round_activations(x, find_precision("nvfp4")), alone)
    np.testing.assert_array_equal(round_activations(x, find_precision("nvfp4_a16")), x)


def test_refused_shapes_are_named() -> None:
    assert (
        find_precision("nvfp4").refusal(96)
        == "k=96 is no multiple of the 64 steps that a matrix instruction takes in nvfp4"
    )
    assert find_precision("nvfp4_a16").refusal(96) is None
    assert find_precision("nvfp4_a16").refusal(48) is not None
    with pytest.raises(
        TilewrightError, match="k=40 is no multiple of the 16 steps that share a scale in precision nvfp4_a16"
    ):
        pack_rows(np.zeros((1, 2, 40), np.float32), RowLayout("nvfp4_a16", "runs"))


@pytest.mark.parametrize("arch", ["sm_100", "sm_120"])
def test_no_config_leaves_scales_to_software(arch: str) -> None:
    """Triton 3.7 fails, or takes scales apart itself, where the tensor memory's matrix unit has fewer than 128 rows."""
    signature = MoeGemmSignature(stage="up", experts=8, n=256, k=512, activation="swiglu", x_dtype="bf16")
    space = find_op("moe_gemm").space(signature, GPU_ARCHS[arch], precisions=("nvfp4",))
    mine = [config for config in space if config["precision"] == "nvfp4"]
    rows = {
        c["block_n"] * (1 + (c["gate_up"] == "interleaved")) if c["operands"] == "weights_first" else c["block_m"]
        for c in mine
    }
    assert min(rows) == (128 if arch == "sm_100" else 16)
    assert min(config["block_k"] for config in mine) == 64
