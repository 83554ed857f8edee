"""Packed weight layouts: room for every column, and the key as the identity of the bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from guarded_calls import pack
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.hardware.archs import CPU_ARCHS
from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.registry import OPS
from tilewright.runtime.weights.packing import pack_array, packed_shape

PLAIN = WeightLayout(columns=16)
INTERLEAVED = WeightLayout(columns=16, halves=2, run=8)
APART = WeightLayout(columns=8, halves=2, run=8)

layouts = st.sampled_from([PLAIN, INTERLEAVED, APART, WeightLayout(32, 2, 8), WeightLayout(4), WeightLayout(4, 2, 4)])


@pytest.mark.parametrize(
    ("layout", "n", "panels"),
    [
        (PLAIN, 1, 1),
        (PLAIN, 16, 1),
        (PLAIN, 17, 2),
        (INTERLEAVED, 2, 1),  # one gate and one up column: a run each
        (INTERLEAVED, 16, 1),
        (INTERLEAVED, 18, 2),
        (APART, 2, 2),
        (APART, 16, 2),
        (APART, 18, 4),
    ],
)
def test_panels_by_hand(layout: WeightLayout, n: int, panels: int) -> None:
    assert layout.panels(n) == panels
    assert layout.packed_words(3, n, 5) == 3 * panels * 5 * layout.columns


def test_gate_and_up_columns_by_hand() -> None:
    gate_and_up = np.arange(20, dtype=np.float32).reshape(1, 20, 1)  # gate 0-9, up 10-19
    gate, up = np.arange(10), np.arange(10, 20)
    packed = pack(gate_and_up, INTERLEAVED)[0, :, 0]
    assert packed[0].tolist() == [*gate[:8], *up[:8]]
    assert packed[1].tolist() == [8, 9, *[0] * 6, 18, 19, *[0] * 6]
    assert pack(gate_and_up, APART)[0, :, 0].reshape(2, 16).tolist() == packed.tolist()


@given(layouts, st.integers(1, 3), st.integers(1, 100), st.integers(1, 5))
def test_the_runtime_packs_as_the_layout_says(layout: WeightLayout, experts: int, per_half: int, k: int) -> None:
    weight = np.random.default_rng(0).random((experts, layout.halves * per_half, k), np.float32)
    out = np.full(packed_shape(layout, weight.shape), np.nan, np.float32)
    pack_array(weight, layout, out, threads=1)
    np.testing.assert_array_equal(out, pack(weight, layout))
    assert out.size == layout.packed_words(*weight.shape)


@given(layouts, st.integers(1, 2), st.integers(1, 100), st.integers(1, 5))
def test_packing_keeps_every_weight_and_pads_with_zeros(
    layout: WeightLayout, experts: int, per_half: int, k: int
) -> None:
    count = experts * layout.halves * per_half * k
    weight = np.arange(1, count + 1, dtype=np.float32).reshape(experts, -1, k)
    packed = np.sort(pack(weight, layout), axis=None)
    assert packed[-count:].tolist() == list(range(1, count + 1))
    assert not packed[:-count].any()


def test_equal_keys_mean_equal_layouts() -> None:
    variants = [PLAIN, INTERLEAVED, APART, replace(PLAIN, columns=8), replace(PLAIN, precision="bf16")]
    assert len({layout.key for layout in variants}) == len(variants)
    assert PLAIN.key == "panel16_fp32"
    assert APART.key == "panel8x2r8_fp32"


@pytest.mark.parametrize("arch", CPU_ARCHS.values(), ids=lambda arch: arch.name)
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_configs_share_few_layouts_that_can_be_packed(op, arch) -> None:
    """A model keeps one copy of its weights for each layout in use."""
    for signature in examples_of(op.name).signatures:
        space = op.space(signature, arch)
        found = {}
        for config in space[:: max(1, len(space) // 100)]:
            layout = op.template(config).layout(signature, config, arch)
            if layout is None:  # the op packs nothing
                assert op.layout_key(signature, config, arch) == ""
                continue
            assert op.layout_key(signature, config, arch) == layout.key
            assert found.setdefault(layout.key, layout) == layout
        assert len(found) <= 3
        for layout in found.values():
            weight = next(tensor for tensor in op.tensors(signature) if tensor.name == "weight")
            assert packed_shape(layout, weight.dims)[1] == layout.panels(weight.dims[1])
