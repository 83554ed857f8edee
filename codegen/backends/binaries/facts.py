"""What a GPU binary says of itself, and whether it could be launched at all. Compilers accept what no device runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tilewright.codegen.hardware.archs import GpuArch


@dataclass(frozen=True)
class TensorMapFacts:
    """What the compiler's metadata say of a ``CUtensorMap`` parameter: numbers of the CUDA driver's enumerations."""

    box: tuple[int, ...]
    data_type: int
    swizzle: int
    element_bytes: int


@dataclass(frozen=True)
class EntryFacts:
    """Of one entry point, per thread or block as named; read from the binary unless said otherwise."""

    entry: str
    registers: int
    """Per thread; of AMD binaries vector registers and accumulators together."""
    spill_store_bytes: int
    """Per thread; of NVIDIA binaries from the log of ptxas."""
    spill_load_bytes: int
    """Per thread; of AMD binaries as many as are stored, which is what they tell."""
    stack_bytes: int
    """Per thread."""
    static_smem_bytes: int
    """Of a block, without what the system reserves."""
    smem_bytes: int
    """Of a block: static, and dynamic as the compiler's metadata say that it has to be asked for."""
    tensor_memory_columns: int
    """From the compiler's metadata: allocated while the kernel runs, so the binary does not list them."""
    num_warps: int
    """Of a block, from the compiler's metadata: warp specialisation adds some to those that were asked for."""
    cluster: int
    """Blocks of a cluster."""
    parameter_bytes: tuple[int, ...]
    """Sizes of all parameters in order, hidden ones included."""
    tensor_maps: tuple[TensorMapFacts, ...] = ()
    """Of the parameters that are tensor maps, in order."""

    @property
    def dynamic_smem_bytes(self) -> int:
        """What a launch has to ask for."""
        return self.smem_bytes - self.static_smem_bytes

    @property
    def spills(self) -> bool:
        """Whether registers were spilled to memory."""
        return bool(self.spill_store_bytes or self.spill_load_bytes)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by :meth:`from_dict`."""
        maps = [{**asdict(each), "box": list(each.box)} for each in self.tensor_maps]
        return {**asdict(self), "parameter_bytes": list(self.parameter_bytes), "tensor_maps": maps}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EntryFacts:
        """Facts from their JSON form; what later releases add to it is left out."""
        own = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
        maps = tuple(TensorMapFacts(**{**each, "box": tuple(each["box"])}) for each in fields.get("tensor_maps", ()))
        return cls(**{**own, "parameter_bytes": tuple(own["parameter_bytes"]), "tensor_maps": maps})


def launch_obstacle(facts: EntryFacts, arch: GpuArch) -> str | None:
    """Why no device of ``arch`` could launch the entry, in one sentence; None when one could."""
    threads = facts.num_warps * arch.warp_size
    if facts.smem_bytes > arch.smem_bytes_per_block:
        return (
            f"{facts.entry} takes {facts.smem_bytes} bytes of shared memory; "
            f"a block of {arch.name} has {arch.smem_bytes_per_block}"
        )
    if facts.tensor_memory_columns > arch.tensor_memory_columns:
        return (
            f"{facts.entry} takes {facts.tensor_memory_columns} columns of tensor memory; "
            f"{arch.name} has {arch.tensor_memory_columns}"
        )
    if threads > arch.threads_per_block:
        return f"{facts.entry} has {threads} threads; a block of {arch.name} has at most {arch.threads_per_block}"
    unit = arch.register_unit
    per_warp = -(-facts.registers * arch.warp_size // unit) * unit
    if per_warp * facts.num_warps > arch.registers_per_sm:
        return (
            f"{facts.entry} takes {facts.registers} registers in each of {threads} threads; "
            f"a multiprocessor of {arch.name} has {arch.registers_per_sm}"
        )
    if facts.cluster > arch.blocks_per_cluster:
        return (
            f"{facts.entry} asks for clusters of {facts.cluster} blocks; "
            f"{arch.name} has clusters of at most {arch.blocks_per_cluster}"
        )
    return None
