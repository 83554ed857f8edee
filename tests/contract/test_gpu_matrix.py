"""Which precisions compile for which arch, and to which instructions: tests/data/gpu_matrix.json, cell by cell.

A cell names what the binary must hold, ``compiles`` where it multiplies nothing, or says why there is none: in the
compiler's own words, or by naming the instruction that is missing. All cells are compiled with
``TILEWRIGHT_FULL=1``, otherwise some of every template and arch.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from covering import FULL
from gpu_compiling import nearest, telling_instructions

from tilewright.codegen.hardware.archs import GPU_ARCHS, GpuArch
from tilewright.codegen.numbers.precisions import find_precision
from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.ops.template import Template
from tilewright.codegen.space import Config

TABLE: dict[str, dict[str, dict[str, str]]] = json.loads(
    (Path(__file__).parent.parent / "data" / "gpu_matrix.json").read_text()
)
EXCLUDED = "excluded: "
COMPILES = "compiles"

GEMM = {"operands": "rows_first", "block_m": 64, "block_n": 128, "block_k": 128, "num_warps": 4, "num_stages": 2}
"""A tile that every matrix unit takes whole; one of 16 rows is left to older instructions."""
MAPPED = {"x_loads": "tensor_map", **GEMM, "overlap": "none"}
SCALED = {"operands": "weights_first", "block_n": 128}
"""128 rows of the matrix unit, whose scales sm_100 multiplies itself; fewer Triton 3.7 takes apart in software."""
WANTED: Mapping[str, Mapping[str, Any]] = {
    "moe_gemm/triton_grouped": GEMM,
    "moe_gemm/triton_split_k": {"splits": 2, **GEMM},
    "moe_gemm/triton_persistent": MAPPED,
    "attention/triton_decode": {"operands": "keys_first", "num_warps": 4, "block_kv": 128, "block_rows": 16},
    "attention/triton_mla_decode": {"operands": "keys_first", "num_warps": 8, "block_kv": 64, "block_rows": 16},
    "attention/triton_prefill": {"block_m": 128, "block_kv": 64, "num_warps": 4, "num_stages": 2},
    "gating/triton_fused": {"num_warps": 4},
}
ENTRIES = {"moe_gemm": "moe_gemm", "decode": "decode", "prefill": "prefill", "gating": "choose"}
"""The launch that multiplies, by op or stage."""

CELLS = [
    (name, row, arch, what)
    for name, rows in TABLE.items()
    for row, archs in rows.items()
    for arch, what in archs.items()
]
COMPILED = [cell[:3] for cell in CELLS if not cell[3].startswith(EXCLUDED)]
QUOTING = [cell for cell in CELLS if cell[3].startswith(EXCLUDED) and '"' in cell[3]]


def template_of(name: str) -> Template[Any]:
    return next(t for op in OPS.values() for t in op.templates if t.name == name)


def signature_of(name: str, row: str) -> Signature:
    """What a row of the table is compiled for: a precision of weights, or a dtype of keys and values."""
    match name.split("/"):
        case ["moe_gemm", _]:
            dtype = "fp16" if row == "fp16" else "bf16"
            return MoeGemmSignature(stage="plain", experts=8, n=1024, k=1024, x_dtype=dtype)
        case ["attention", file]:
            stage, dtype = file.removeprefix("triton_"), "bf16" if row == "fp8_e4m3" else row
            kinds = {"q_dtype": dtype, "kv_dtype": row, "out_dtype": dtype}
            if stage == "mla_decode":
                row_of_heads = {"heads": 128, "kv_heads": 1, "head_dim": 576, "value_dim": 512, "scale": 192**-0.5}
                return AttentionSignature(stage="decode", latent=True, **row_of_heads, **kinds)
            return AttentionSignature(stage=stage, heads=32, kv_heads=8, head_dim=128, **kinds)
        case _:
            return GatingSignature(experts=128, top_k=8)


def made(name: str, row: str, arch: GpuArch) -> tuple[Template[Any], Signature, Config]:
    """Template, signature and the config nearest to what is wanted, whether it is excluded or not."""
    template, signature = template_of(name), signature_of(name, row)
    space = template.space(signature, arch, (row,)) if template.precisions else template.space(signature, arch)
    wanted = WANTED[name]
    if template.precisions and find_precision(row).scaled_by_matrix_unit:
        wanted = {**SCALED, **{knob: value for knob, value in wanted.items() if knob not in SCALED}}
    return template, signature, Config.of(name, nearest(space, wanted))


def found(name: str, row: str, arch: GpuArch, folder: Path) -> set[str]:
    template, signature, config = made(name, row, arch)
    entry = ENTRIES.get(signature.op) or ENTRIES[signature.stage]
    return telling_instructions(template, signature, config, arch, entry, folder)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def test_table_has_every_template_for_gpus() -> None:
    assert TABLE.keys() == {t.name for op in OPS.values() for t in op.templates if t.language == "triton"}


@pytest.mark.parametrize("name", TABLE)
def test_table_has_every_cell_and_the_reasons_of_the_template(name: str) -> None:
    template = template_of(name)
    if template.precisions:
        assert TABLE[name].keys() == set(template.precisions)
    for row, archs in TABLE[name].items():
        assert archs.keys() == GPU_ARCHS.keys()
        for arch_name, what in archs.items():
            arch, excluded = GPU_ARCHS[arch_name], what.startswith(EXCLUDED)
            if template.precisions:
                reason = template.exclusion(row, arch)
                assert reason == (what.removeprefix(EXCLUDED) if excluded else None), (row, arch_name)
            else:
                signature = signature_of(name, row)
                here = find_op(signature.op).templates_for(signature, arch)
                assert (template in here) != excluded, (row, arch_name)


@pytest.mark.parametrize(("name", "row", "arch_name"), COMPILED if FULL else COMPILED[::17], ids=str)
def test_cell_compiles_to_its_instructions(name: str, row: str, arch_name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    what = TABLE[name][row][arch_name]
    mix = found(name, row, GPU_ARCHS[arch_name], tmp_path)
    assert mix == set() if what == COMPILES else set(what.split()) <= mix


@pytest.mark.parametrize(("name", "row", "arch_name", "what"), QUOTING if FULL else QUOTING[::9], ids=str)
def test_excluded_cell_fails_with_the_words_that_it_quotes(
    name: str, row: str, arch_name: str, what: str, tmp_path: Path
) -> None:
    triton = pytest.importorskip("triton")
    quoted = re.findall(r'"(.*)"', what)[0]
    with pytest.raises((triton.CompilationError, ValueError), match=re.escape(quoted)):
        found(name, row, GPU_ARCHS[arch_name], tmp_path)
