"""Rendered Triton sources compiled for an arch that this machine lacks; what their binaries multiply and copy with."""

import importlib.util
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.ops.template import Template
from tilewright.codegen.rendering import render
from tilewright.codegen.space import Config, Space

_SASS_TELLING = re.compile(r"\b([HIQO]MMA|[HIQ]GMMA|UTC[HIQO]MMA|UTMALDG)\b")

_AMD_TELLING = {
    "v_mfma": r"\bv_mfma_",
    "v_mfma_fp8": r"\bv_mfma_\w+(_fp8_fp8|_f8f6f4)\b",
    "v_mfma_scale": r"\bv_mfma_scale_",
}


def nearest(space: Space, wanted: Mapping[str, Any]) -> Config:
    """The config that has most of the wanted values, the first of ``wanted`` counting most."""
    score = np.zeros(len(space))
    for weight, (name, value) in enumerate(reversed(wanted.items())):
        index = [parameter.name for parameter in space.parameters].index(name)
        position = space.parameters[index].position.get(value, -1)
        score += (space.indices[:, index] == position) * 2.0**weight
    return space[int(score.argmax())]


def telling_instructions(
    template: Template[Any], signature: Signature, config: Config, arch: GpuArch, entry: str, folder: Path
) -> set[str]:
    """Names of the matrix instructions in the binary of one entry, and of copies by tensor maps."""
    from triton import compile as compile_entry
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert template.entries is not None
    path = folder / "kernel.py"
    path.write_text(render(template, signature, config, arch))
    module_spec = importlib.util.spec_from_file_location("compiled_kernel", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    spec = next(each for each in template.entries(signature, config, arch) if each.entry == entry)
    names = [name for name, _ in spec.arguments]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in spec.divisible_by_16}
    source = ASTSource(getattr(module, entry), dict(spec.arguments), dict(spec.constants), aligned)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
    compiled = compile_entry(source, target=GPUTarget(*arch.triton_target), options=options)
    if arch.family == "hip":
        return {kind for kind, name in _AMD_TELLING.items() if re.search(name, compiled.asm["amdgcn"])}
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    return set(_SASS_TELLING.findall(_disassemble(binary)))


def _disassemble(binary: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True).stdout
