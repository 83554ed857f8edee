"""A small kernel that the compile server compiles before it forks.

What the first compile of a process loads and reads (LLVM's passes, bitcode, hashes of the compiler) is then there for
all that follow.
"""

from typing import Any

import triton
import triton.language as tl

ENTRY = {
    "entry": "warm",
    "arguments": [["x", "*bf16"], ["y", "*bf16"], ["out", "*fp32"]],
    "divisible_by_16": ["x", "y", "out"],
    "constants": {},
    "num_warps": 4,
    "num_stages": 2,
    "options": {},
}


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def warm(x: Any, y: Any, out: Any) -> None:
    """One product of two tiles."""
    row = tl.arange(0, 64)
    at = row[:, None] * 64 + row[None, :]
    total = tl.zeros((64, 64), tl.float32)
    for step in range(4):
        total = tl.dot(tl.load(x + at + step * 4096), tl.load(y + at), total)
    tl.store(out + at, tl.exp(total))
