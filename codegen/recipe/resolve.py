"""What a recipe comes to for given sizes and addresses: the one place that understands recipes.

Callers differ in what an address is to them. Those that have real ones take ``value`` of an argument; those whose
memory is elsewhere (another process, an interpreter) give any addresses of the right alignment, and take ``buffer`` and
``offset``. The runtime's C code is this module's twin for ``host_so`` artifacts, and is tested against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tilewright.codegen.recipe.expressions import parsed
from tilewright.codegen.recipe.model import (
    SM_COUNT,
    THREADS,
    WORKSPACE,
    Argument,
    Guard,
    Launch,
    Recipe,
    TensorMap,
    packable,
)
from tilewright.errors import TilewrightError

_LARGEST = (1 << 63) - 1
_LARGEST_MAP_DIMENSION = (1 << 31) - 1
"""Kernels take a map's shape in 32 bits."""

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Place:
    """What recipes may ask of where a kernel runs: a CPU says its threads, a GPU its multiprocessors.

    Raises:
        TilewrightError: for fewer than one.

    """

    threads: int | None = None
    sm_count: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.names.items():
            if value < 1:
                raise TilewrightError(f"{name} is {value}; at least 1 is needed")

    @property
    def names(self) -> dict[str, int]:
        """What is known, under the names that expressions use."""
        known = {} if self.threads is None else {THREADS: self.threads}
        return known if self.sm_count is None else {**known, SM_COUNT: self.sm_count}


@dataclass(frozen=True)
class ResolvedMap:
    """A tensor map over contiguous memory that begins at the argument's value."""

    encoding: TensorMap
    shape: tuple[int, ...]
    """In elements, the slowest dimension first."""
    strides: tuple[int, ...]
    """In elements, of the same dimensions; the last is 1."""


@dataclass(frozen=True)
class ResolvedArgument:
    """What one parameter of an entry gets."""

    value: int
    """A number, or an address: 0 for an absent tensor."""
    buffer: str = ""
    """Name of the tensor, or ``workspace``, that the address lies in; empty for a number or an absent tensor."""
    offset: int = 0
    """Bytes from the buffer's beginning to the address."""
    map: ResolvedMap | None = None
    """Passed in place of the address."""


@dataclass(frozen=True)
class ResolvedLaunch:
    """One call of an entry with everything known."""

    artifact: str
    entry: str
    arguments: tuple[ResolvedArgument, ...]
    grid: Grid | None
    """Blocks along x, y, z; None for a ``host_so`` artifact."""
    block: Grid | None
    cluster: Grid | None
    """Blocks of a cluster; None: no clusters."""
    shared_memory_bytes: int
    hidden_arguments: int
    programmatic: bool
    cooperative: bool

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to launch: a grid without blocks."""
        return self.grid is not None and 0 in self.grid


@dataclass(frozen=True)
class Refusal:
    """A guard that a call does not pass."""

    guard: Guard
    value: int

    def __str__(self) -> str:
        return f"{self.guard.expression} = {self.value} is no multiple of {self.guard.multiple}"


@dataclass(frozen=True)
class ResolvedCall:
    """A recipe for one call: its launches in order, unless some guard refuses."""

    workspace_bytes: int
    launches: tuple[ResolvedLaunch, ...]
    refusals: tuple[Refusal, ...] = ()


def resolve(recipe: Recipe, sizes: Mapping[str, int], addresses: Mapping[str, int], place: Place) -> ResolvedCall:
    """What a call by ``recipe`` passes to which entries.

    Args:
        recipe: a valid one (codegen/recipe/validity.py).
        sizes: value of every size that its expressions read.
        addresses: of its tensors and ``workspace``; an optional tensor may be missing, or 0, and so may a workspace
            of no bytes.
        place: where it runs.

    Raises:
        TilewrightError: for a size, an address or a property of the place that is missing, for what is negative (sizes,
            addresses, bytes, grids), an offset outside the workspace, a division by zero, and for what 64 bits (of a
            tensor map's shape: 31) do not hold.

    """
    names = _values(sizes, place)
    if refusals := _refusals(recipe, names, {WORKSPACE: 0, **addresses}):
        return ResolvedCall(0, (), refusals)
    nbytes = _count(recipe.workspace_bytes, names, "bytes of workspace")
    memory = _Memory(recipe, addresses, nbytes)
    return ResolvedCall(nbytes, tuple(_launch(launch, memory, names) for launch in recipe.launches))


def refused_guards(
    recipe: Recipe, sizes: Mapping[str, int], addresses: Mapping[str, int], place: Place
) -> tuple[Refusal, ...]:
    """Guards of ``recipe`` that a call with these sizes and addresses does not pass.

    Those that read the address of the workspace are left out while ``addresses`` lacks it, since it is got for calls
    that may run only; :func:`resolve` judges all.

    Raises:
        TilewrightError: as :func:`resolve` does, for what guards read.

    """
    return _refusals(recipe, _values(sizes, place), addresses)


def _refusals(recipe: Recipe, values: Mapping[str, int], addresses: Mapping[str, int]) -> tuple[Refusal, ...]:
    if not recipe.guards:
        return ()
    tensors = {tensor.name: tensor for tensor in recipe.tensors}
    names = dict(values)
    refusals = []
    for guard in recipe.guards:
        reads = parsed(guard.expression).symbols
        if WORKSPACE in reads and WORKSPACE not in addresses:
            continue
        for name in reads & {*tensors, WORKSPACE}:
            names[name] = _address(name, addresses, may_lack=name in tensors and tensors[name].optional)
        value = _evaluate(guard.expression, names)
        if value % guard.multiple:
            refusals.append(Refusal(guard, value))
    return tuple(refusals)


def workspace_bytes(recipe: Recipe, sizes: Mapping[str, int], place: Place) -> int:
    """Bytes of workspace that a call needs.

    Raises:
        TilewrightError: as :func:`resolve` does, for what the expression reads.

    """
    return _count(recipe.workspace_bytes, _values(sizes, place), "bytes of workspace")


class _Memory:
    """Addresses in the buffers of one call."""

    def __init__(self, recipe: Recipe, addresses: Mapping[str, int], nbytes: int) -> None:
        self._optional = {tensor.name for tensor in recipe.tensors if tensor.optional}
        self._addresses = addresses
        self._workspace_bytes = nbytes
        packed = packable(recipe.tensors)
        self._packed = packed.name if packed else ""

    def argument(self, argument: Argument, names: Mapping[str, int]) -> ResolvedArgument:
        if argument.kind == "tensor":
            return self._at(argument.source, 0)
        offset = _evaluate(argument.source, names) if argument.source else 0
        if argument.kind == "size":
            return ResolvedArgument(offset)
        if argument.kind == "scales":
            if offset < 0:
                raise TilewrightError(f"the recipe puts scales {-offset} bytes before the packed weight")
            return self._at(self._packed, offset)
        if not 0 <= offset <= self._workspace_bytes:
            raise TilewrightError(
                f"the recipe puts a part at byte {offset} of a workspace of {self._workspace_bytes} bytes"
            )
        return self._at(WORKSPACE, offset)

    def _at(self, buffer: str, offset: int) -> ResolvedArgument:
        nothing = buffer == WORKSPACE and self._workspace_bytes == 0
        address = _address(buffer, self._addresses, may_lack=nothing or buffer in self._optional)
        if address == 0 and buffer in self._optional:
            return ResolvedArgument(0)
        return ResolvedArgument(_in_64_bits(address + offset, f"an address in {buffer}"), buffer, offset)


def _launch(launch: Launch, memory: _Memory, names: Mapping[str, int]) -> ResolvedLaunch:
    where = f"the launch of {launch.entry}"
    return ResolvedLaunch(
        launch.artifact,
        launch.entry,
        tuple(_mapped(argument, memory.argument(argument, names), names) for argument in launch.arguments),
        _grid(launch.grid, names, f"blocks of {where}", least=0),
        _grid(launch.block, names, f"threads of {where}"),
        _grid(launch.cluster, names, f"blocks of a cluster of {where}"),
        _count(launch.shared_memory_bytes, names, f"bytes of shared memory of {where}"),
        launch.hidden_arguments,
        launch.programmatic,
        launch.cooperative,
    )


def _mapped(argument: Argument, resolved: ResolvedArgument, names: Mapping[str, int]) -> ResolvedArgument:
    if argument.map is None:
        return resolved
    shape = tuple(_count(text, names, "elements of a tensor map") for text in argument.map.shape)
    if max(shape) > _LARGEST_MAP_DIMENSION:
        raise TilewrightError(f"a tensor map has a dimension of {max(shape)} elements; {_LARGEST_MAP_DIMENSION} fit")
    strides = [1]
    for length in shape[:0:-1]:
        strides.append(strides[-1] * length)
    whole = ResolvedMap(argument.map, shape, tuple(reversed(strides)))
    return ResolvedArgument(resolved.value, resolved.buffer, resolved.offset, whole)


def _grid(texts: Sequence[str], names: Mapping[str, int], what: str, *, least: int = 1) -> Grid | None:
    if not texts:
        return None
    counts = [_count(text, names, what) for text in texts]
    if min(counts) < least:
        raise TilewrightError(f"the recipe comes to {min(counts)} {what}; at least {least} are needed")
    x, y, z = (*counts, 1, 1)[:3]
    return x, y, z


def _values(sizes: Mapping[str, int], place: Place) -> dict[str, int]:
    for name, size in sizes.items():
        if size < 0:
            raise TilewrightError(f"the size {name} is {size}; it cannot be negative")
    return {**sizes, **place.names}


def _address(name: str, addresses: Mapping[str, int], *, may_lack: bool) -> int:
    address = addresses.get(name, 0 if may_lack else None)
    if address is None:
        raise TilewrightError(f"the recipe needs the address of {name!r}, and the call has none")
    if address < 0:
        raise TilewrightError(f"the address of {name!r} is {address}; it cannot be negative")
    return _in_64_bits(address, f"the address of {name}")


def _count(text: str, names: Mapping[str, int], what: str) -> int:
    value = _evaluate(text, names)
    if value < 0:
        raise TilewrightError(f"the recipe comes to {value} {what} ({text}); it cannot be negative")
    return value


def _evaluate(text: str, names: Mapping[str, int]) -> int:
    return _in_64_bits(parsed(text).evaluate(names), f"recipe expression {text!r}")


def _in_64_bits(value: int, what: str) -> int:
    if not -_LARGEST - 1 <= value <= _LARGEST:
        raise TilewrightError(f"{what} comes to {value}, which 64 bits do not hold")
    return value
