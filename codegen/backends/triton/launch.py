"""How a Triton template's entries are launched, said once: what the builder and the recipe need is derived from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tilewright.codegen.backends.binaries.facts import EntryFacts
from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.codegen.numbers.layouts import RowLayout
from tilewright.codegen.recipe.expressions import IntExpr
from tilewright.codegen.recipe.model import Argument, Guard, Launch, Recipe
from tilewright.errors import TilewrightError

if TYPE_CHECKING:  # declarations of ops import this module
    from tilewright.codegen.ops.signature import Signature

HIDDEN_ARGUMENTS = 2
"""Null pointers that Triton appends to every entry's parameters: global and profile scratch."""

_POINTER_BYTES = 8
_SCALAR_BYTES = {
    **dict.fromkeys(("i1", "u1", "i8", "u8"), 1),
    **dict.fromkeys(("i16", "u16", "fp16", "bf16"), 2),
    **dict.fromkeys(("i32", "u32", "fp32", "f32"), 4),
    **dict.fromkeys(("i64", "u64", "fp64"), 8),
}
"""Of all scalar types that Triton's launcher passes, by its names."""
_DESCRIPTOR_BYTES = 128
"""Of a CUtensorMap; its shape (i32) and strides (i64) follow it as parameters of their own."""

_ALIGNMENT = 16
_WORKSPACE_ALIGNMENT = 256


@dataclass(frozen=True)
class EntryParameter:
    """One run-time parameter of an entry: Triton's name of its type, and what is passed."""

    name: str
    type: str
    argument: Argument
    aligned: bool = False
    """Whether the kernel is compiled for an address that is a multiple of 16 bytes; becomes a guard."""


@dataclass(frozen=True)
class EntryLaunch:
    """One launch of one entry.

    ``grid`` holds :class:`IntExpr` texts: programs, each a block or a whole cluster of them. A grid of no programs is
    not launched.
    """

    entry: str
    parameters: tuple[EntryParameter, ...]
    grid: tuple[str, ...]
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)

    def spec(self) -> EntrySpec:
        """For the builder."""
        return EntrySpec(
            self.entry,
            tuple((each.name, each.type) for each in self.parameters),
            divisible_by_16=tuple(each.name for each in self.parameters if each.aligned and not each.argument.map),
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            options=self.options,
        )

    def launch(self, warp_size: int) -> Launch:
        """For the recipe, before anything is built: shared memory and final warps are facts of the binary."""
        return Launch(
            artifact="",
            entry=self.entry,
            arguments=tuple(each.argument for each in self.parameters),
            grid=self.grid,
            block=(str(self.num_warps * warp_size),),
            hidden_arguments=HIDDEN_ARGUMENTS,
            programmatic=bool(self.options.get("launch_pdl", False)),
            cooperative=bool(self.options.get("launch_cooperative_grid", False)),
        )


def guards(launches: Sequence[EntryLaunch]) -> tuple[Guard, ...]:
    """Every alignment that some entry is compiled for; offsets within workspace and packed weight keep it."""
    named: dict[str, None] = {}
    for launch in launches:
        for each in launch.parameters:
            if each.aligned:
                match each.argument.kind:
                    case "workspace":
                        named["workspace"] = None
                    case "scales":
                        named["weight"] = None
                    case _:
                        named[each.argument.source] = None
    return tuple(Guard(name, _ALIGNMENT) for name in named)


class Workspace:
    """Parts of a workspace one behind the other, each at a multiple of 256 bytes."""

    def __init__(self) -> None:
        self._parts: dict[str, str] = {}

    def add(self, name: str, size_bytes: str) -> None:
        """Append a part; ``size_bytes`` is an :class:`IntExpr` text."""
        self._parts[name] = f"ceildiv({size_bytes}, {_WORKSPACE_ALIGNMENT}) * {_WORKSPACE_ALIGNMENT}"

    @property
    def size_bytes(self) -> str:
        """Of all parts, as an :class:`IntExpr` text."""
        return IntExpr(" + ".join(self._parts.values()) or "0").text

    def argument(self, name: str) -> Argument:
        """The address of a part."""
        before = list(self._parts.values())[: list(self._parts).index(name)]
        return Argument("workspace", " + ".join(before))


def recipe_of(
    signature: Signature,
    steps: Sequence[EntryLaunch],
    workspace: Workspace,
    warp_size: int,
    weight_layout: RowLayout | None = None,
) -> Recipe:
    """How a kernel is called whose launches are ``steps``, in order, with ``workspace`` between them."""
    return Recipe(
        tensors=signature.tensors(),
        launches=tuple(step.launch(warp_size) for step in steps),
        size_name=signature.size_name,
        workspace_bytes=workspace.size_bytes,
        guards=guards(steps),
        weight_layout=weight_layout,
    )


def parameter_mismatch(entry: EntrySpec, found_bytes: Sequence[int]) -> str | None:
    """How a binary's parameters differ from what a launch passes, in one sentence; None when they do not.

    Args:
        entry: as it was compiled; the recipe passes its arguments in order, then the hidden ones.
        found_bytes: sizes of the parameters in order, read from the binary.

    """
    passed = [size for _, kind in entry.arguments for size in _parameter_sizes(kind)]
    passed += [_POINTER_BYTES] * HIDDEN_ARGUMENTS
    if list(found_bytes) == passed:
        return None
    return (
        f"the binary of {entry.entry} takes parameters of {', '.join(map(str, found_bytes))} bytes, "
        f"and a launch would pass {', '.join(map(str, passed))}"
    )


def built_launch(launch: Launch, facts: EntryFacts, artifact: str, warp_size: int) -> Launch:
    """``launch`` with what only the binary tells: its block, cluster and shared memory, and its checksum.

    Raises:
        TilewrightError: when the binary does not take what the launch passes.

    """
    passed = [size for each in launch.arguments for size in _argument_sizes(each)]
    passed += [_POINTER_BYTES] * launch.hidden_arguments
    found = facts.parameter_bytes
    if len(found) != len(passed) or any(size not in (None, took) for size, took in zip(passed, found, strict=True)):
        raise TilewrightError(
            f"{launch.entry} cannot be launched: its binary takes parameters of {', '.join(map(str, found))} bytes, "
            f"and its recipe passes {len(passed)}"
        )
    return replace(
        launch,
        artifact=artifact,
        arguments=_with_maps(launch, facts),
        grid=_grid_of_blocks(launch.grid, facts.cluster),
        block=(str(facts.num_warps * warp_size),),
        cluster=(str(facts.cluster),) if facts.cluster > 1 else (),
        shared_memory_bytes=str(facts.dynamic_smem_bytes),
    )


def _grid_of_blocks(programs: tuple[str, ...], cluster: int) -> tuple[str, ...]:
    """What the driver wants: blocks, of which a program has as many as its cluster, along x."""
    if cluster == 1 or not programs:
        return programs
    return (f"({programs[0]}) * {cluster}", *programs[1:])


def _argument_sizes(argument: Argument) -> list[int | None]:
    """Bytes that an argument of a recipe passes; None where the entry says how many."""
    if argument.kind == "size":
        return [None]
    return [*_map_sizes(len(argument.map.shape))] if argument.map else [_POINTER_BYTES]


def _map_sizes(dimensions: int) -> list[int]:
    return [_DESCRIPTOR_BYTES, *[4] * dimensions, *[8] * dimensions]


def _with_maps(launch: Launch, facts: EntryFacts) -> tuple[Argument, ...]:
    """The arguments, tensor maps with what the compiler settled on.

    Raises:
        TilewrightError: when it did not make as many maps of such elements.

    """
    maps = [each.map for each in launch.arguments if each.map]
    wanted = [(len(each.shape), each.element_bytes) for each in maps]
    if wanted != [(len(each.box), each.element_bytes) for each in facts.tensor_maps]:
        raise TilewrightError(
            f"{launch.entry} cannot be launched: its recipe passes {len(wanted)} tensor maps, and the compiler made "
            f"{len(facts.tensor_maps)}, or of other elements"
        )
    made = iter(facts.tensor_maps)
    arguments = []
    for each in launch.arguments:
        if each.map:
            told = next(made)
            settled = replace(each.map, box=told.box, data_type=told.data_type, swizzle=told.swizzle)
            arguments.append(replace(each, map=settled))
        else:
            arguments.append(each)
    return tuple(arguments)


def _parameter_sizes(kind: str) -> list[int]:
    """Sizes of the parameters that an argument of Triton's type ``kind`` becomes."""
    if kind.startswith("*"):
        return [_POINTER_BYTES]
    if kind.startswith("tensordesc"):
        return _map_sizes(kind.count(",") + 1)
    if kind not in _SCALAR_BYTES:
        known = ", ".join(_SCALAR_BYTES)
        raise TilewrightError(f"an entry takes pointers, tensor descriptors and {known}; it cannot take a {kind!r}")
    return [_SCALAR_BYTES[kind]]
