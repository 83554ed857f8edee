"""Compile the entries of one rendered Triton source for one target: runs in a process of its own, and only there.

Leaves in a folder, for entry number i: ``i.cubin`` or ``i.hsaco``, the compiler's intermediate forms (``i.ttgir``,
``i.ptx`` or ``i.amdgcn``), its metadata (``i.json``) and the log of ptxas (``i.log``).
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

BINARIES = ("cubin", "hsaco")
FORMS = ("ttgir", "ptx", "amdgcn")
"""Intermediate forms that are kept."""


def load_source(path: Path) -> ModuleType:
    """The source as a module; its functions need their text, so it must be a file."""
    spec = importlib.util.spec_from_file_location(f"tilewright_kernel_{os.getpid()}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_entries(
    source: Path, entries: Sequence[Mapping[str, Any]], target: tuple[str, int | str, int], folder: Path
) -> None:
    """Compile every entry (:class:`EntrySpec` in its JSON form) of ``source`` into ``folder``."""
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"  # what ptxas spilled stands nowhere else
    module = load_source(source)
    for index, entry in enumerate(entries):
        log = os.open(folder / f"{index}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.close(log)
        compiled = _compile(module, entry, target)
        for form in (*BINARIES, *FORMS):
            if form in compiled.asm:
                content = compiled.asm[form]
                (folder / f"{index}.{form}").write_bytes(content if isinstance(content, bytes) else content.encode())
        metadata = compiled.metadata
        told = {
            "shared": metadata.shared,
            "num_warps": metadata.num_warps,
            "num_ctas": metadata.num_ctas,
            "tensor_memory_columns": getattr(metadata, "tmem_size", 0) or 0,
            "scratch_bytes": (getattr(metadata, "global_scratch_size", 0) or 0) + (metadata.profile_scratch_size or 0),
            "tensor_maps": [_told_map(each) for each in getattr(metadata, "tensordesc_meta", None) or ()],
        }
        (folder / f"{index}.json").write_text(json.dumps(told))


def _told_map(descriptor: Mapping[str, Any]) -> dict[str, Any]:
    """Of a tensor descriptor that the host encodes; the compiler's numbers of types are another enumeration."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    if descriptor["fp4_padded"]:
        raise ValueError("tensor descriptors of padded fp4 elements are not launched")
    return {
        "box": list(descriptor["block_size"]),
        "data_type": TMA_DTYPE_DEVICE_TO_HOST[descriptor["elem_type"]],
        "swizzle": descriptor["swizzle"],
        "element_bytes": descriptor["elem_size"],
    }


def _compile(module: ModuleType, entry: Mapping[str, Any], target: tuple[str, int | str, int]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(module, entry["entry"])
    signature = dict(entry["arguments"]) | dict.fromkeys(entry["constants"], "constexpr")
    position = {name: index for index, name in enumerate(function.arg_names)}
    attributes = {(position[name],): [["tt.divisibility", 16]] for name in entry["divisible_by_16"]}
    source = ASTSource(function, signature, constexprs=dict(entry["constants"]), attrs=attributes)
    options = {"num_warps": entry["num_warps"], "num_stages": entry["num_stages"], **entry["options"]}
    return triton.compile(source, target=GPUTarget(*target), options=options)
