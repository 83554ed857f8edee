"""What is read from an hsaco, and that damage to its metadata is one sentence."""

import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.backends.binaries.hsaco import HsacoFacts, read_hsaco


def argument(offset: int, size: int, kind: str = "by_value") -> dict[str, Any]:
    return {".offset": offset, ".size": size, ".value_kind": kind}


KERNEL = {
    ".name": "product",
    ".args": [argument(8, 4), argument(0, 8, "global_buffer"), argument(16, 8, "hidden_block_count_x")],
    ".vgpr_count": 300,
    ".vgpr_spill_count": 2,
    ".group_segment_fixed_size": 70000,
    ".private_segment_fixed_size": 0,
}
METADATA = {"amdhsa.version": [1, 2], "amdhsa.kernels": [{".name": "other"}, KERNEL], "amdhsa.target": "x" * 40}
FACTS = HsacoFacts(300, 2, 70000, 0, (8, 4))


def hsaco(metadata: bytes) -> bytes:
    """An ELF file with a metadata note and nothing else."""
    note = struct.pack("<III", 7, len(metadata), 32) + b"AMDGPU\0\0" + metadata
    names = b"\0.note\0.shstrtab\0"
    header = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<QIHHHHHH", 64, 0, 64, 0, 0, 64, 3, 2)
    at = 64 + 3 * 64

    def section(name: int, kind: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 0, 0)

    table = section(0, 0, 0, 0) + section(1, 7, at, len(note)) + section(7, 3, at + len(note), len(names))
    return header.ljust(64, b"\0") + table + note + names


PACKED = msgpack.packb(METADATA)


def test_facts_are_those_of_the_entry() -> None:
    assert read_hsaco(hsaco(PACKED), "product") == FACTS


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"amdhsa.kernels": None}, "no amdhsa.kernels"),
        ({"amdhsa.kernels": []}, "no entry product"),
        ({"amdhsa.kernels": [7, KERNEL | {".vgpr_count": "many"}]}, "no .vgpr_count"),
        ({"amdhsa.kernels": [KERNEL | {".args": [{}]}]}, "no .value_kind"),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_hsaco(hsaco(msgpack.packb(METADATA | changes)), "product")


@pytest.mark.parametrize(
    "metadata", [b"", PACKED[:-1], PACKED + b"\0", b"\xc1", b"\x91" * 100_000, b"\x81\x81\0\0\0", b"\xdf" + b"\xff" * 4]
)
def test_damaged_metadata_are_one_sentence(metadata: bytes) -> None:
    with pytest.raises(ValueError, match=r"metadata of the hsaco are damaged: .") as caught:
        read_hsaco(hsaco(metadata), "product")
    assert "\n" not in str(caught.value)


@given(st.data())
def test_any_damage_is_a_value_error_or_other_facts(data: st.DataObject) -> None:
    binary = bytearray(hsaco(PACKED))
    for _ in range(data.draw(st.integers(1, 3))):
        binary[data.draw(st.integers(0, len(binary) - 1))] = data.draw(st.integers(0, 255))
    try:
        facts = read_hsaco(bytes(binary[: data.draw(st.integers(len(binary) - 20, len(binary)))]), "product")
    except ValueError:
        return
    assert isinstance(facts, HsacoFacts)
