"""What a shared object exports is read from its bytes, and what the system's loader would choke on never gets there."""

import random
import struct
from contextlib import suppress

import pytest
from naive_kernels import build, needs_compiler

from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.elf import exported_functions
from tilewright.runtime.launchers.host_so import load_artifact
from tilewright.tuning_db.integrity import sha256_hex

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def kernel() -> bytes:
    return build(MoeGemmSignature(stage="plain", experts=3, n=6, k=5)).artifact.data


def test_functions_of_its_own_are_found(kernel: bytes) -> None:
    functions = exported_functions(kernel)
    assert {"naive", "tilewright_abi_version"} <= functions
    assert "unique_kernel" not in functions, "it is a number"
    assert not {"abort", "exit", "usleep"} & functions, "they are the C library's"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _: b"", "no 64-bit little-endian ELF"),
        (lambda _: b"a text", "no 64-bit little-endian ELF"),
        (lambda d: d[:4] + b"\1" + d[5:], "no 64-bit little-endian ELF"),
        (lambda d: d[:16] + struct.pack("<H", 2) + d[18:], "no shared object"),
        (lambda d: d[:18] + struct.pack("<H", 243) + d[20:], "for another machine"),
        (lambda d: d[:64], "beyond its end"),
        (lambda d: d[: len(d) // 2], "a part of it is missing"),
        (lambda d: d[:-100], "beyond its end"),
        (lambda d: d[:32] + struct.pack("<Q", 1 << 60) + d[40:], "beyond its end"),
        (lambda d: d[:56] + struct.pack("<H", 0) + d[58:], "nothing to load"),
    ],
)
def test_what_is_no_whole_shared_object_of_this_machine_is_refused(kernel: bytes, change, said: str) -> None:
    data = change(kernel)
    with pytest.raises(TilewrightError, match=rf"cannot be loaded: .*{said}"):
        load_artifact(sha256_hex(data), lambda: data)


def test_bytes_that_changed_are_read_or_refused(kernel: bytes) -> None:
    choose = random.Random(0)
    for _ in range(500):
        data = bytearray(kernel)
        for _ in range(choose.randint(1, 4)):
            data[choose.choice([choose.randrange(64), choose.randrange(len(data)), choose.randrange(1000)])] ^= (
                1 << choose.randrange(8)
            )
        with suppress(ValueError):  # and nothing else
            exported_functions(bytes(data))
