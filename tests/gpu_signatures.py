"""Variants of GPU templates, on the signatures of their op's examples, that together hold every pair of values."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from awkward import Case
from covering import FULL, covering_rows, covering_values
from numpy.typing import NDArray

from tilewright.codegen.hardware.archs import GPU_ARCHS, GpuArch
from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.ops.template import Template
from tilewright.codegen.space import Config, Space

WAYS_TO_STORE = (
    *("bf16", "int8", "int8g64", "int4g32", "mxfp4", "nvfp4_a16", "mxfp8", "nvfp4"),
    *("fp8_e4m3_block128", "fp8_e4m3_token", "fp8_e4m3_tensor"),
)
"""A precision for every way in which a template's text goes through weights and activations."""
LAUNCHED_ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
"""That launches are tested for: a capability of every family of instructions."""
_USUAL = {
    "moe_gemm/triton_persistent": "sm_90",
    "moe_gemm/triton_split_k": "sm_90",
    "attention/triton_decode": "sm_80",
    "gating/triton_fused": "sm_120",
}
"""What is launched by default: tensor maps, several launches with a workspace between them, and one of every op."""


def space_of(op_name: str, template: Template[Any], signature: Signature, arch: GpuArch) -> Space | None:
    """Configs of one template in every precision that it can have there; None without any."""
    op = find_op(op_name)
    if template not in op.templates_for(signature, arch):
        return None
    if not template.precisions:
        return template.space(signature, arch)
    possible = [name for name, refusal in op.precisions(signature).items() if refusal is None]
    names = tuple(name for name in template.precisions if name in possible and template.exclusion(name, arch) is None)
    return template.space(signature, arch, names) if names else None


@dataclass
class _Configs:
    """All configs of a template on an arch, for all its signatures, as codes of values."""

    codes: dict[str, NDArray[np.int64]]
    """By knob, and of the ``signature``; one array of codes for all configs."""
    rows: NDArray[np.int64]
    """Where a config stands in its signature's space."""
    spaces: dict[int, Space]
    values: dict[str, dict[Any, int]]

    def cases(self, op_name: str, template: Template[Any], arch: GpuArch, chosen: Iterable[int]) -> list[Case]:
        made = []
        for row in chosen:
            number = int(self.codes["signature"][row])
            signature, config = examples_of(op_name).gpu_signatures[number], self.spaces[number][int(self.rows[row])]
            made.append(Case(op_name, signature, Config.of(template.name, config), arch))
        return made


def _all_configs(op_name: str, template: Template[Any], arch: GpuArch) -> _Configs | None:
    blocks: dict[str, list[NDArray[np.int64]]] = {}
    rows: list[NDArray[np.int64]] = []
    values: dict[str, dict[Any, int]] = {}
    spaces = {}
    for number, signature in enumerate(examples_of(op_name).gpu_signatures):
        space = space_of(op_name, template, signature, arch)
        if space is None:
            continue
        spaces[number] = space
        blocks.setdefault("signature", []).append(np.full(len(space), number))
        rows.append(np.arange(len(space)))
        for index, parameter in enumerate(space.parameters):
            seen = values.setdefault(parameter.name, {})
            codes = np.array([seen.setdefault(value, len(seen)) for value in parameter.values])
            blocks.setdefault(parameter.name, []).append(codes[space.indices[:, index]])
    if not spaces:
        return None
    joined = {name: np.concatenate(each) for name, each in blocks.items()}
    return _Configs(joined, np.concatenate(rows), spaces, values)


def covering_cases(op_name: str, template: Template[Any], arch: GpuArch, share: int) -> list[Case]:
    """Every pair of two values that the template has on ``arch``, or ``share`` cases that have most values."""
    configs = _all_configs(op_name, template, arch)
    if configs is None:
        return []
    table = np.column_stack(list(configs.codes.values()))
    chosen = covering_rows(table, seed=0) if FULL else covering_values(table, seed=0, most=share)
    return configs.cases(op_name, template, arch, chosen)


def persistent_cases() -> list[Case]:
    """Of the persistent template: every way to store weights; every pair of a stage, ``operands`` and ``x_loads``."""
    return _storing_cases("moe_gemm/triton_persistent", "sm_100", WAYS_TO_STORE, ("operands", "x_loads"))


def fnuz_cases() -> list[Case]:
    """Of the grouped template where the matrix unit has AMD's own e4m3: every way to scale it, and every stage."""
    names = [name for name in WAYS_TO_STORE if name.startswith("fp8_e4m3")]
    return _storing_cases("moe_gemm/triton_grouped", "gfx942", names, ())


def _storing_cases(name: str, arch_name: str, precisions: Sequence[str], knobs: Sequence[str]) -> list[Case]:
    op_name, arch = "moe_gemm", GPU_ARCHS[arch_name]
    template = next(t for t in OPS[op_name].templates if t.name == name)
    configs = _all_configs(op_name, template, arch)
    assert configs is not None
    wanted = [configs.values["precision"][precision] for precision in precisions]
    narrow = [configs.values["block_n"][columns] for columns in (64, 128)]  # runs faster here
    kept = np.flatnonzero(np.isin(configs.codes["precision"], wanted) & np.isin(configs.codes["block_n"], narrow))
    stages = np.array([("up", "down", "plain").index(s.stage) for s in examples_of(op_name).gpu_signatures])
    always = np.zeros_like(configs.codes["precision"])  # a pair with it is the value alone
    tables = [
        [always, configs.codes["precision"]],
        [always, stages[configs.codes["signature"]], *(configs.codes[knob] for knob in knobs)],
    ]
    chosen = [row for table in tables for row in covering_rows(np.column_stack(table)[kept], seed=0)]
    return configs.cases(op_name, template, arch, kept[sorted(set(chosen))])


def emulated_cases(share: int) -> list[Case]:
    """Cases of all Triton templates, on the arch that offers each most: all, or ``share`` of each template."""
    templates = [(op, t) for op in OPS.values() for t in op.templates if t.language == "triton" and t.emulated_problems]
    groups = [max((covering_cases(op.name, t, arch, share) for arch in _archs(t)), key=len) for op, t in templates]
    return [case for group in groups for case in group]


def _archs(template: Template[Any]) -> list[GpuArch]:
    """One arch of a family tells: what is emulated is the source."""
    named = (GPU_ARCHS[name] for name in ("sm_100", "gfx950"))
    return [arch for arch in named if arch.family in template.families]


def launched_cases() -> list[Case]:
    """A kernel of every op; with ``TILEWRIGHT_FULL=1`` covering ones of every template and arch."""
    found = []
    for op in OPS.values():
        for template in (each for each in op.templates if each.language == "triton"):
            here = [name for name in LAUNCHED_ARCHS if GPU_ARCHS[name].among(template.families)]
            usual = [_USUAL[template.name]] if template.name in _USUAL else []
            for name in here if FULL else usual:
                found += covering_cases(op.name, template, GPU_ARCHS[name], share=1)
    return found
