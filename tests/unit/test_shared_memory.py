"""Shared memory: placement, canaries, and what the worker may do with it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.tuner.evaluation.cpu.mapping import ALIGNMENT, PAGE, GuardedMapping, round_up
from tilewright.tuner.evaluation.cpu.shared_memory import Block, SharedRegion, share


@pytest.fixture
def block() -> Iterator[Block]:
    """100 floats, 1..100."""
    made = share(np.arange(1, 101, dtype=np.float32))
    yield made
    made.region.close()


def permissions(address: int) -> str:
    """Of the page at ``address`` in this process, as in /proc/self/maps."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, flags, *_ = line.split()
        start, end = (int(bound, 16) for bound in span.split("-"))
        if start <= address < end:
            return flags
    return "none"


@given(capacity=st.integers(0, 3 * PAGE), data=st.data())
def test_a_block_is_aligned_and_ends_with_its_region(capacity: int, data: st.DataObject) -> None:
    nbytes = data.draw(st.integers(0, capacity))
    region = SharedRegion(capacity)
    block = Block(region, nbytes)
    start = region.bytes.ctypes.data
    address = block.array(np.uint8, (nbytes,)).ctypes.data if nbytes else start + region.file_bytes
    assert (address - start) % ALIGNMENT == 0
    assert 0 <= start + region.file_bytes - (address + nbytes) < ALIGNMENT
    assert address - start >= PAGE
    assert region.file_bytes % PAGE == 0
    region.close()


def test_shared_arrays_keep_their_values(block: Block) -> None:
    np.testing.assert_array_equal(block.array(np.float32, (4, 25)), np.arange(1, 101, dtype=np.float32).reshape(4, 25))


@given(offset=st.integers(-PAGE, 48 - 1))
def test_any_byte_written_outside_is_noticed(offset: int) -> None:
    region = SharedRegion(80)
    block = Block(region, 80)
    block.lay_canaries()
    assert block.damage() is None
    end = region.file_bytes - 48
    position = end + offset if offset >= 0 else end - 80 + offset
    region.bytes[position] ^= 1
    assert block.damage() == (
        "0 bytes before and 1 bytes after it" if offset >= 0 else "1 bytes before and 0 bytes after it"
    )
    region.close()


def test_writing_the_block_itself_is_no_damage(block: Block) -> None:
    block.lay_canaries()
    block.array(np.float32, (100,))[:] = 7
    assert block.damage() is None


@pytest.mark.parametrize(
    ("writable", "huge", "expected"), [(True, False, "rw-s"), (False, False, "r--p"), (False, True, "r--p")]
)
def test_a_mapping_lies_between_guard_pages(block: Block, writable: bool, huge: bool, expected: str) -> None:
    file_bytes = block.region.file_bytes
    mapping = GuardedMapping(block.region.fd, file_bytes, writable=writable, huge_pages=huge)
    start = mapping.end - file_bytes
    assert permissions(start) == permissions(mapping.end - 1) == expected
    assert permissions(start - 1) == permissions(mapping.end) == "---p"
    values = (ctypes.c_float * 100).from_address(mapping.end - round_up(block.nbytes, ALIGNMENT))
    assert list(values) == list(range(1, 101))
    mapping.close()
    assert permissions(start) != expected


def test_writes_reach_the_parent_only_through_writable_mappings(block: Block) -> None:
    writable = GuardedMapping(block.region.fd, block.region.file_bytes, writable=True)
    private = GuardedMapping(block.region.fd, block.region.file_bytes, writable=False, huge_pages=True)
    offset = round_up(block.nbytes, ALIGNMENT)
    ctypes.c_float.from_address(writable.end - offset).value = -1.0
    assert block.array(np.float32, (100,))[0] == -1.0
    assert ctypes.c_float.from_address(private.end - offset).value == 1.0
    writable.close()
    private.close()
