"""Typed knobs, named constraints and the enumerated space of valid configs that they make."""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt

from tilewright.errors import TilewrightError

Value = int | float | str | bool
"""What a knob may be set to."""

TEMPLATE = "template"
"""The leading parameter of a union of several templates' spaces, and the name of a config's template."""

MAX_CONFIGS = 1_000_000
"""Valid configs that an enumeration may hold; more than this means that a constraint is missing."""


@dataclass(frozen=True)
class Parameter:
    """One knob: its name, its values in their natural order (small to large) and what it does, in words.

    None among the values is "no such knob": the parameters of a union hold it for templates that lack the knob.
    Raises TilewrightError when there is no value, when two values are equal (1, 1.0 and True are), or when the default
    is none of them.
    """

    name: str
    values: tuple[Value | None, ...]
    meaning: str
    default: Value | None = None
    """Value of configs that do not name the knob: the value at which kernels are what they were before there was such
    a knob. With it, what was stored, goldens and starting configs stay what they are. None: every config names it."""

    def __post_init__(self) -> None:
        if not self.values:
            raise TilewrightError(f"Parameter {self.name!r} has no values; give it at least one.")
        if len(set(self.values)) < len(self.values):
            raise TilewrightError(f"Parameter {self.name!r} has two equal values in {self.values}; keep one of them.")
        if self.default is not None and self.default not in self.values:
            raise TilewrightError(
                f"Parameter {self.name!r} has the default {self.default!r}, not one of {self.values}."
            )

    @cached_property
    def position(self) -> Mapping[Value | None, int]:
        """Where each value stands in `values`."""
        return {value: index for index, value in enumerate(self.values)}


@dataclass(frozen=True)
class Constraint:
    """One named rule that every valid config keeps.

    `holds` gets a mapping of parameter values and returns whether they obey the rule; `reason` says in words why
    the rule exists. `parameters` names those that `holds` reads, so that enumeration can drop whole branches as
    soon as they are bound; left empty, the rule is checked on complete configs only.
    """

    name: str
    holds: Callable[[Mapping[str, Any]], bool]
    reason: str
    parameters: tuple[str, ...] = ()


class Config(Mapping[str, Any]):
    """One point of a space: an immutable, hashable mapping of its template's name and that template's own knobs.

    Knobs of other templates are no part of it: ``config.get`` returns None for them. Reading a value is typed Any,
    because a knob's type is known to its template and not to this class.
    Raises TilewrightError for a value that is not an int, a finite float, a str or a bool.
    """

    __slots__ = ("_items", "_values")

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._items = tuple(sorted(values.items()))
        for name, value in self._items:
            finite = not isinstance(value, float) or math.isfinite(value)
            if not (finite and isinstance(value, int | float | str)):
                raise TilewrightError(f"Config value {name}={value!r} must be an int, a finite float, a str or a bool.")
        self._values = dict(self._items)

    @classmethod
    def of(cls, template: str, knobs: Mapping[str, Value]) -> Self:
        """Make the config of ``template`` that has these knobs."""
        return cls({TEMPLATE: template, **knobs})

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value!r}' for name, value in self._items)})"

    def key(self) -> str:
        """Canonical JSON: names sorted, no spaces; equal text for equal configs of one space, in every process."""
        return json.dumps(self._values, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Removal:
    """How many raw combinations one constraint removed, each counted for the first constraint that rejected it."""

    constraint: str
    count: int
    reason: str


@dataclass(frozen=True, eq=False)
class Space(Sequence[Config]):
    """Every valid config of one or several templates, in a fixed order.

    `indices` is int16 [configs, parameters]: config i sets parameter p to `parameters[p].values[indices[i, p]]`, where
    None stands for a knob that another template has. Configs themselves, without those, are made when they are read, so
    that a large space stays small in memory.
    """

    parameters: tuple[Parameter, ...]
    indices: npt.NDArray[np.int16]
    removals: tuple[Removal, ...] = ()
    defaults: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    """Of a union: by template, its knobs that a config need not name, with :attr:`Parameter.default`."""

    def __post_init__(self) -> None:
        _check_names(self.parameters)
        self.indices.flags.writeable = False

    @classmethod
    def enumerate(cls, parameters: Sequence[Parameter], constraints: Sequence[Constraint] = ()) -> Self:
        """Make the space of all combinations that keep every constraint.

        Raises TilewrightError for a duplicate name, a constraint that reads a parameter it may not, a space with no
        valid config and one with more than MAX_CONFIGS.
        """
        _check_names(parameters)
        rows, counts = _Enumeration(parameters, constraints).run()
        removals = tuple(Removal(c.name, counts[c.name], c.reason) for c in constraints)
        if not len(rows):
            raise TilewrightError(_nothing_valid(removals))
        return cls(tuple(parameters), rows, removals)

    @classmethod
    def union(cls, spaces_by_template: Mapping[str, "Space"]) -> Self:
        """Join templates' spaces under a leading parameter `template`; in `indices`, absent knobs are None.

        Values of a knob that several templates share are merged, in ascending order when all are numbers.
        Raises TilewrightError when there is no space, or when one uses the name `template` or the value None itself.
        """
        if not spaces_by_template:
            raise TilewrightError("A union of spaces needs at least one template; none was given.")
        parameters = (
            Parameter(TEMPLATE, tuple(spaces_by_template), "the algorithm that the kernel is made from"),
            *_merged_parameters(spaces_by_template),
        )
        blocks = [space.indices_in(parameters, {TEMPLATE: template}) for template, space in spaces_by_template.items()]
        removals = tuple(
            Removal(f"{template}/{r.constraint}", r.count, r.reason)
            for template, space in spaces_by_template.items()
            for r in space.removals
        )
        defaults = {
            template: {p.name: p.default for p in space.parameters if p.default is not None}
            for template, space in spaces_by_template.items()
        }
        return cls(parameters, np.concatenate(blocks), removals, defaults)

    def of_templates(self, templates: Collection[str]) -> "Space":
        """Keep the configs of these templates of a union, with all its parameters."""
        kept = np.array([value in templates for value in self.parameters[0].values])
        removals = tuple(r for r in self.removals if r.constraint.rpartition("/")[0] in templates)
        return Space(self.parameters, self.indices[kept[self.indices[:, 0]]], removals, self.defaults)

    def only(self, kept: npt.NDArray[np.bool_]) -> "Space":
        """Keep the configs that ``kept`` [configs] marks, with all parameters."""
        return Space(self.parameters, self.indices[kept], defaults=self.defaults)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Config: ...

    @overload
    def __getitem__(self, index: slice) -> list[Config]: ...

    def __getitem__(self, index: int | slice) -> Config | list[Config]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.indices[index].tolist()
        values = ((p.name, p.values[i]) for p, i in zip(self.parameters, row, strict=True))
        return Config({name: value for name, value in values if value is not None})

    def __contains__(self, config: object) -> bool:
        return isinstance(config, Mapping) and self.find(config) is not None

    @property
    def full_size(self) -> int:
        """Raw combinations before any constraint; for a union, the sum over its templates."""
        return len(self) + sum(r.count for r in self.removals)

    @property
    def removed(self) -> dict[str, int]:
        """Raw combinations that each constraint removed."""
        return {r.constraint: r.count for r in self.removals}

    def read(self, stored: Mapping[str, Value | None]) -> Config:
        """Make a config of its stored or written form, in this space or not.

        Knobs that it does not name get their default, as it may be older than they are; None is no knob.
        """
        named = {name: value for name, value in stored.items() if value is not None}
        own = {p.name: p.default for p in self.parameters if p.default is not None}
        return Config({**own, **self.defaults.get(str(named.get(TEMPLATE)), {}), **named})

    def find(self, config: Mapping[str, Value | None]) -> int | None:
        """Where the config that `read` makes of `config` stands in this space; None when it is no part of it."""
        complete = self.read(config)
        if not complete.keys() <= self._names:
            return None
        return self._position.get(tuple(p.position.get(complete.get(p.name), -1) for p in self.parameters))

    def index_of(self, config: Mapping[str, Value | None]) -> int:
        """Where `config` stands in this space, as `find` does.

        Raises TilewrightError when it is no part of it, with the knobs that set it apart from the nearest config.
        """
        index = self.find(config)
        if index is None:
            raise TilewrightError(self._strange(self.read(config)))
        return index

    def indices_in(self, parameters: Sequence[Parameter], constants: Mapping[str, Value]) -> npt.NDArray[np.int16]:
        """Rewrite `indices` for other parameters: those unknown here have their value in `constants`, or None."""
        columns = {p.name: (p, self.indices[:, i]) for i, p in enumerate(self.parameters)}
        result = np.empty((len(self), len(parameters)), dtype=np.int16)
        for i, target in enumerate(parameters):
            if target.name in columns:
                source, column = columns[target.name]
                result[:, i] = np.array([target.position[v] for v in source.values])[column]
            else:
                result[:, i] = target.position[constants.get(target.name)]
        return result

    def summary(self) -> str:
        """One line of text: the size, and what the constraints of each name removed in all templates together."""
        removed: dict[str, int] = {}
        for removal in self.removals:
            name = removal.constraint.rpartition("/")[2]
            removed[name] = removed.get(name, 0) + removal.count
        why = ", ".join(f"{name} {count:,}" for name, count in removed.items() if count)
        return f"{len(self):,} valid configs of {self.full_size:,}{f'; removed by {why}' if why else ''}"

    def describe(self) -> str:
        """Several lines of text: the size and what each constraint removed."""
        used = [len(np.unique(column)) for column in self.indices.T]
        sizes = " x ".join(f"{p.name} {count}" for p, count in zip(self.parameters, used, strict=True) if count > 1)
        lines = [f"{len(self):,} valid configs of {self.full_size:,} ({sizes or 'nothing varies'})"]
        width = max((len(r.constraint) for r in self.removals), default=0)
        lines += [f"  {r.constraint:<{width}}  removed {r.count:>9,}  {r.reason}".rstrip() for r in self.removals]
        return "\n".join(lines)

    @cached_property
    def _position(self) -> Mapping[tuple[int, ...], int]:
        return {tuple(row): i for i, row in enumerate(self.indices.tolist())}

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(p.name for p in self.parameters)

    def _strange(self, config: Config) -> str:
        """Say, in one sentence, how `config` differs from the nearest config of this space, which it is no part of."""
        wanted = [p.position.get(config.get(p.name), -1) for p in self.parameters]
        distances = np.count_nonzero(self.indices != np.array(wanted, np.int16), axis=1)
        if TEMPLATE in config and self.parameters[0].name == TEMPLATE:  # another template's config is no neighbour
            distances = distances + len(self.parameters) * (self.indices[:, 0] != wanted[0])
        near = self[int(distances.argmin())]
        names = [name for name in {**near, **config} if near.get(name) != config.get(name)]
        differences = "; ".join(
            f"{name}={near[name]!r} where this has {config.get(name, 'nothing')!r}"
            if name in near
            else f"no {name}, which is {config[name]!r} here"
            for name in names
        )
        return f"{config!r} is not in its space, whose nearest config has {differences}."


_ROWS_AT_ONCE = 1 << 16


class _Enumeration:
    """Combinations grown one parameter at a time, each constraint checked as soon as all that it reads is set.

    A constraint is asked once for every combination of the values that it reads, however many configs share them.
    """

    def __init__(self, parameters: Sequence[Parameter], constraints: Sequence[Constraint]) -> None:
        depth_of = {p.name: depth for depth, p in enumerate(parameters)}
        self._parameters = parameters
        self._checks: list[list[tuple[Constraint, list[int]]]] = [[] for _ in parameters]
        self._counts = dict.fromkeys((c.name for c in constraints), 0)
        if len(self._counts) < len(constraints):
            raise TilewrightError(f"Two constraints share a name among {[c.name for c in constraints]}; rename one.")
        for constraint in constraints:
            unknown = [name for name in constraint.parameters if name not in depth_of]
            if unknown:
                raise TilewrightError(f"Constraint {constraint.name!r} names {unknown}, which no parameter is called.")
            read = sorted(depth_of[name] for name in constraint.parameters) or list(range(len(parameters)))
            self._checks[read[-1]].append((constraint, read))
        # Combinations that hang below one bound value at each depth: what rejecting it there removes.
        self._below = [math.prod(len(p.values) for p in parameters[d + 1 :]) for d in range(len(parameters))]
        self._verdicts: dict[str, dict[tuple[int, ...], bool]] = {name: {} for name in self._counts}
        self._found: list[npt.NDArray[np.int16]] = []
        self._total = 0

    def run(self) -> tuple[npt.NDArray[np.int16], dict[str, int]]:
        """Value indices [configs, parameters] in lexicographic order, and what each constraint removed."""
        self._grow(np.zeros((1, 0), np.int16))
        return np.concatenate([np.empty((0, len(self._parameters)), np.int16), *self._found]), self._counts

    def _grow(self, block: npt.NDArray[np.int16]) -> None:
        """Add every value of the next parameter to each row of ``block``, and go on with those that are valid."""
        depth = block.shape[1]
        if depth == len(self._parameters):
            self._total += len(block)
            if self._total > MAX_CONFIGS:
                raise TilewrightError(
                    f"The space has more than {MAX_CONFIGS:,} valid configs; add a constraint or take values away."
                )
            self._found.append(block)
            return
        choices = np.arange(len(self._parameters[depth].values), dtype=np.int16)
        grown = np.column_stack([np.repeat(block, len(choices), axis=0), np.tile(choices, len(block))])
        for constraint, read in self._checks[depth]:
            valid = self._obey(constraint, read, grown)
            self._counts[constraint.name] += int(np.count_nonzero(~valid)) * self._below[depth]
            grown = grown[valid]
        # In parts, so that a constraint that comes late does not let memory grow beyond measure.
        for begin in range(0, len(grown), _ROWS_AT_ONCE):
            self._grow(grown[begin : begin + _ROWS_AT_ONCE])

    def _obey(self, constraint: Constraint, read: Sequence[int], rows: npt.NDArray[np.int16]) -> npt.NDArray[np.bool_]:
        """Which of ``rows`` keep ``constraint``, whose parameters are the columns ``read``."""
        sizes = [len(self._parameters[column].values) for column in read]
        codes = np.zeros(len(rows), np.int64)
        for column, size in zip(read, sizes, strict=True):
            codes = codes * size + rows[:, column]
        _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        verdicts = [self._verdict(constraint, read, tuple(row)) for row in rows[first][:, read].tolist()]
        return np.array(verdicts, dtype=bool)[inverse.reshape(-1)]

    def _verdict(self, constraint: Constraint, read: Sequence[int], indices: tuple[int, ...]) -> bool:
        known = self._verdicts[constraint.name]
        if indices not in known:
            chosen = [(self._parameters[column], index) for column, index in zip(read, indices, strict=True)]
            try:
                known[indices] = bool(constraint.holds({p.name: p.values[index] for p, index in chosen}))
            except KeyError as error:
                raise TilewrightError(
                    f"Constraint {constraint.name!r} reads {error} but does not list it in `parameters`; add it there."
                ) from error
        return known[indices]


def _check_names(parameters: Sequence[Parameter]) -> None:
    names = [p.name for p in parameters]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise TilewrightError(f"A space has several parameters called {', '.join(repeated)}; rename or merge them.")
    if not names:
        raise TilewrightError("A space needs at least one parameter; none was given.")


def _nothing_valid(removals: Sequence[Removal]) -> str:
    worst = max(removals, key=lambda r: r.count)
    total = sum(r.count for r in removals)
    return (
        f"No config is valid: constraint {worst.constraint!r} removed {worst.count:,} of {total:,} combinations "
        f"({worst.reason}); loosen it or add values to the parameters."
    )


def _merged_parameters(spaces_by_template: Mapping[str, Space]) -> list[Parameter]:
    """One parameter per knob name, with all values that any template gives it, and None where a template lacks it."""
    found: dict[str, list[Parameter]] = {}
    for template, space in spaces_by_template.items():
        for p in space.parameters:
            if p.name == TEMPLATE or None in p.values:
                raise TilewrightError(
                    f"Template {template!r} has parameter {p.name!r} with values {list(p.values)}; the name "
                    f"{TEMPLATE!r} and the value None are kept for the union of several templates."
                )
            found.setdefault(p.name, []).append(p)
    merged = []
    for name, parameters in found.items():
        # Keyed by type too, so that 1 beside True is refused by Parameter and not silently taken for the same value.
        values = list({(type(v), v): v for p in parameters for v in p.values}.values())
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            values.sort(key=lambda v: float(v or 0))
        absent = [None] if len(parameters) < len(spaces_by_template) else []
        merged.append(Parameter(name, (*absent, *values), parameters[0].meaning))
    return merged
