"""Which precisions compile for which arch, and to which matrix instruction: tests/data/gpu_matrix.json, cell by cell.

A cell names the instruction, or says why there is none. All cells are compiled with ``TILEWRIGHT_FULL_MATRIX=1``,
otherwise some of every precision and arch.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from gpu_compiling import matrix_instructions, nearest

from tilewright.codegen.archs import GPU_ARCHS
from tilewright.codegen.ops import OPS, find_op
from tilewright.codegen.ops.base import Template
from tilewright.codegen.ops.moe_gemm_signature import MoeGemmSignature

TABLE: dict[str, dict[str, dict[str, str]]] = json.loads(
    (Path(__file__).parent.parent / "data" / "gpu_matrix.json").read_text()
)
FULL = os.environ.get("TILEWRIGHT_FULL_MATRIX") == "1"
EXCLUDED = "excluded: "

WANTED = {"operands": "rows_first", "block_m": 64, "block_n": 128, "block_k": 128, "num_warps": 4, "num_stages": 2}
"""A tile that every matrix unit takes whole; one of 16 rows is left to older instructions."""

ROWS_OF_SCALED = 128
"""Of a tile whose scales the matrix unit of sm_100 multiplies; with fewer, Triton 3.7 takes them apart in software."""

CELLS = [
    (name, precision, arch)
    for name, precisions in TABLE.items()
    for precision, archs in precisions.items()
    for arch, what in archs.items()
    if not what.startswith(EXCLUDED)
]
SAMPLE = CELLS if FULL else CELLS[::11]


def template_of(name: str) -> Template[Any]:
    return next(t for op in OPS.values() for t in op.templates if t.name == name)


@pytest.mark.parametrize("name", TABLE)
def test_table_has_every_cell_and_the_reasons_of_the_template(name: str) -> None:
    template = template_of(name)
    assert TABLE[name].keys() == set(template.precisions)
    for precision, archs in TABLE[name].items():
        assert archs.keys() == GPU_ARCHS.keys()
        for arch, what in archs.items():
            reason = template.exclusion(precision, GPU_ARCHS[arch])
            assert reason == (what.removeprefix(EXCLUDED) if what.startswith(EXCLUDED) else None), (precision, arch)


@pytest.mark.parametrize(("name", "precision", "arch_name"), SAMPLE, ids=str)
def test_cell_compiles_to_its_matrix_instruction(
    name: str, precision: str, arch_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    arch, template = GPU_ARCHS[arch_name], template_of(name)
    dtype = "fp16" if precision == "fp16" else "bf16"
    signature = MoeGemmSignature(stage="plain", experts=8, n=1024, k=1024, x_dtype=dtype)
    wanted = {**WANTED, "block_m": ROWS_OF_SCALED} if precision == "mxfp4_a8" else WANTED
    config = nearest(template.space(signature, arch, (precision,)), wanted)
    config = find_op("moe_gemm").space(signature, arch, precisions=[precision]).lift(name, config)
    found = matrix_instructions(template, signature, config, arch, "moe_gemm", tmp_path)
    assert TABLE[name][precision][arch_name] in found
