"""Weights in shared memory: packed like the runtime's, copied, and dropped when room is short."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.moe_gemm.declaration import MoeGemm
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.errors import TilewrightError
from tilewright.tuner.evaluation.cpu.shared_memory import SharedRegion
from tilewright.tuner.evaluation.cpu.weights import WeightStore, declared_bytes

SIGNATURE = MoeGemmSignature(stage="plain", experts=3, n=16, k=8, bias=True)
WEIGHT_BYTES = 3 * 16 * 8 * 4
EIGHT, SIXTEEN, TWELVE = WeightLayout(8), WeightLayout(16), WeightLayout(12)


class Store(WeightStore):
    """A store with two copies and room for two unpadded layouts, that remembers what it released."""

    def __init__(self) -> None:
        self.released: list[int] = []
        arrays = MoeGemm().weights(SIGNATURE, seed=0)
        super().__init__(
            SIGNATURE.tensors(),
            arrays,
            copies=lambda _: 2,
            capacity_bytes=4 * WEIGHT_BYTES,
            release=self.remember_released,
        )

    def remember_released(self, regions: Iterable[SharedRegion]) -> None:
        for region in regions:
            self.released.append(region.id)
            region.close()


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.close()
    assert len(set(made.released)) == len(made.released)


def test_declared_bytes_count_weight_and_bias() -> None:
    assert declared_bytes(SIGNATURE.tensors()) == WEIGHT_BYTES + 3 * 16 * 4


@pytest.mark.parametrize("copy", [0, 1])
def test_a_layout_is_packed_and_its_copies_are_equal(store: Store, copy: int) -> None:
    store.require([EIGHT])
    packed = store.tensors(EIGHT, copy)["weight"].array(np.float32, (3, 2, 8, 8))
    expected = store.arrays["weight"].reshape(3, 2, 8, 8).transpose(0, 1, 3, 2)
    np.testing.assert_array_equal(packed, expected)


def test_copies_are_different_memory_and_other_weights_are_shared(store: Store) -> None:
    store.require([EIGHT, None])
    for layout in (EIGHT, None):
        first, second, third = (store.tensors(layout, copy) for copy in range(3))
        assert first["weight"] is not second["weight"]
        assert first["weight"] is third["weight"]
        assert first["bias"] is second["bias"]


def test_the_layout_that_was_not_used_for_longest_makes_room(store: Store) -> None:
    store.require([EIGHT])
    store.require([SIXTEEN])
    store.require([EIGHT])
    kept, dropped = store.tensors(EIGHT, 0)["weight"], store.tensors(SIXTEEN, 0)["weight"].region.id
    assert not store.released
    store.require([None])
    assert dropped in store.released
    assert kept.region.id not in store.released
    store.require([EIGHT])
    assert store.tensors(EIGHT, 0)["weight"] is kept


def test_a_request_larger_than_the_room_is_granted(store: Store) -> None:
    layouts = [EIGHT, SIXTEEN, TWELVE, None]
    store.require(layouts)
    assert len({store.tensors(layout, 0)["weight"].region.id for layout in layouts}) == 4


def test_groups_fit_the_room_together_and_keep_every_index(store: Store) -> None:
    layouts = [EIGHT, EIGHT, SIXTEEN, TWELVE, EIGHT, None]
    groups = store.groups(layouts)
    assert [index for group in groups for index in group] == list(range(len(layouts)))
    # Two copies of a layout fill half of the room, of the padded one three quarters; one more as declared a quarter.
    assert groups == [[0, 1, 2], [3], [4, 5]]


def test_dropping_the_declared_layout_keeps_the_declared_weights(store: Store) -> None:
    store.require([None])
    store.require([EIGHT, SIXTEEN])
    store.require([None])
    np.testing.assert_array_equal(
        store.tensors(None, 0)["weight"].array(np.float32, (3, 16, 8)), MoeGemm().weights(SIGNATURE, 0)["weight"]
    )


def test_a_precision_that_does_not_divide_k_is_refused(store: Store) -> None:
    with pytest.raises(TilewrightError, match="k=8 is no multiple of the 32 steps"):
        store.require([WeightLayout(8, precision="int4g32")])
