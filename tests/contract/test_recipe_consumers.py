"""Whoever calls by a recipe passes the same arguments: those that a reading of the recipe by Python's own rules gives.

Random recipes (offsets, scales, guards on sizes and on addresses, several launches, workspaces, an optional tensor) go
to the resolver, both call layers, the tuner's worker and the description for the interpreter. Each either passes what
the oracle below says, or refuses in one sentence where the oracle finds the recipe impossible.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from recording_kernels import Recorder, needs_compiler

from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.codegen.numbers.layouts import RowLayout
from tilewright.codegen.recipe.model import Argument, Guard, Launch, Recipe, TensorMap, TensorSpec
from tilewright.codegen.recipe.resolve import Place, resolve
from tilewright.codegen.recipe.validity import validate
from tilewright.errors import TilewrightError
from tilewright.runtime.calls import bind as calls
from tilewright.runtime.calls.bind import CallVariant, bind_call
from tilewright.runtime.calls.extension import native_for_torch
from tilewright.runtime.calls.pure import PureCall
from tilewright.tuner.evaluation.cpu.binding import bind
from tilewright.tuner.evaluation.cpu.session import Session
from tilewright.tuner.evaluation.cpu.shared_memory import Block, SharedRegion, share
from tilewright.tuner.evaluation.emulated.launches import EmulatedBuffer, describe_launches, emulated_workspace_bytes
from tilewright.tuner.evaluation.outcome import BuiltKernel
from tilewright.tuner.evaluation.tensors import refusal

TENSORS = (
    TensorSpec("x", "fp32", ("rows", 4)),
    TensorSpec("y", "fp32", ("tokens", 3)),
    TensorSpec("extra", "int32", (5,), optional=True),
    TensorSpec("weight", "fp32", (2, 3, 5), role="weight"),
    TensorSpec("out", "fp32", ("rows", 2), role="output"),
)
NAMES = tuple(spec.name for spec in TENSORS)
ALIGNMENT = 64  # of every workspace, and of the worker's tensors
EXTRA_ADDRESS = 1 << 12

sizes = st.fixed_dictionaries({"rows": st.integers(1, 40), "tokens": st.integers(0, 40)})
threads = st.integers(1, 4)
values = st.recursive(
    st.sampled_from(["rows", "tokens", "threads"]) | st.integers(0, 300).map(str),
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "//"]), inner)
        | st.builds("{}({}, {})".format, st.sampled_from(["min", "max", "ceildiv"]), inner, inner)
    ),
    max_leaves=4,
)
ordinary_offsets = st.sampled_from(["", "0", "rows * 4", "tokens * 16", "64", "rows * 64 + threads"])
offsets = ordinary_offsets | ordinary_offsets | ordinary_offsets | values
arguments = st.one_of(
    st.builds(Argument, st.just("tensor"), st.sampled_from(NAMES)),
    st.builds(Argument, st.just("size"), values),
    st.builds(Argument, st.just("workspace"), offsets),
    st.builds(Argument, st.just("scales"), offsets),
)
guards = st.one_of(
    st.builds(Guard, values, st.integers(1, 4)),
    st.builds(Guard, st.sampled_from(NAMES), st.sampled_from([1, 4, 16, 64, 3, 4096])),
    st.builds(Guard, st.sampled_from(["x + rows * 4", "max(x, y)", "weight - tokens"]), st.sampled_from([1, 4, 8, 5])),
    st.builds(Guard, st.sampled_from(["workspace", "workspace + rows * 4"]), st.sampled_from([1, 4, 16, 64])),
)


def launch(arguments: list[Argument]) -> Launch:
    return Launch("", f"take_{len(arguments)}", tuple(arguments))


ANCHOR = launch([*(Argument("tensor", name) for name in NAMES), Argument("workspace")])
"""Comes first, so that a record begins with the addresses that the process had."""

recipes = st.builds(
    lambda launches, nbytes, guards: Recipe(
        TENSORS, (ANCHOR, *launches), "rows", workspace_bytes=nbytes, guards=tuple(guards)
    ),
    st.lists(st.lists(arguments, max_size=6).map(launch), min_size=1, max_size=3),
    st.sampled_from(["rows * 64 + 4096", "rows * 64 + 4096", "tokens * 16", "0"]) | values,
    st.lists(guards, max_size=2),
)
PYTHON = {"min": min, "max": max, "ceildiv": lambda a, b: -(-a // b), "__builtins__": {}}

TORCH, ERROR = "torch", "error"
Expected = list[list[int]] | str


def expected(recipe: Recipe, names: Mapping[str, int], addresses: Mapping[str, int]) -> Expected:
    """Arguments of each launch; or that a guard sends the call to torch, or that it is impossible."""

    def value(text: str) -> int:
        return int(eval(text, dict(PYTHON), {**names, **addresses}))

    def passed(argument: Argument) -> int:
        if argument.kind == "tensor":
            return addresses[argument.source]
        number = value(argument.source or "0")
        if argument.kind == "size":
            return number
        most = nbytes if argument.kind == "workspace" else 1 << 62
        if not 0 <= number <= most:
            raise ArithmeticError
        return addresses["workspace" if argument.kind == "workspace" else "weight"] + number

    try:
        for late in (False, True):
            judged = [guard for guard in recipe.guards if ("workspace" in guard.expression) == late]
            nbytes = value(recipe.workspace_bytes) if late else 0
            if nbytes < 0:
                return ERROR
            if any([value(guard.expression) % guard.multiple for guard in judged]):  # noqa: C419 - all are evaluated
                return TORCH
        return [[passed(each) for each in launch.arguments] for launch in recipe.launches]
    except ArithmeticError:
        return ERROR


def check_sentence(error: TilewrightError, begins: str = "") -> None:
    """What a user reads is one sentence."""
    assert str(error).startswith(begins)
    assert "\n" not in str(error)
    assert len(str(error).split()) > 3


own_settings = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    return Recorder.build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    made = Session(threads=4, time_limit_s=60, memory_limit_bytes=64 << 20)
    yield made
    made.close()


@own_settings
@given(recipes, sizes, threads, st.lists(st.integers(0, 1 << 40), min_size=6, max_size=6), st.booleans())
def test_the_resolver_passes_what_the_recipe_says(recipe, sizes, threads, places, absent):
    addresses = dict(zip((*NAMES, "workspace"), places, strict=True))
    given_addresses = dict(addresses)
    if absent:
        addresses["extra"] = 0
        del given_addresses["extra"]
    validate(recipe)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    wanted = expected(recipe, {**sizes, "threads": threads}, addresses)
    try:
        call = resolve(recipe, sizes, given_addresses, Place(threads=threads))
    except TilewrightError as error:
        # All guards are judged before anything else, those on the workspace too.
        assert wanted == ERROR or (wanted == TORCH and any("workspace" in guard.expression for guard in recipe.guards))
        check_sentence(error)
        return
    if call.refusals:
        assert wanted == TORCH or any("workspace" in each.guard.expression for each in call.refusals)
        assert call.launches == ()
        return
    assert [[each.value for each in launch.arguments] for launch in call.launches] == wanted
    for launch in call.launches:
        for each in launch.arguments:
            assert each.value == (addresses[each.buffer] + each.offset if each.buffer else each.value)


@needs_compiler
@pytest.mark.parametrize("layer", ["native", "pure"])
@own_settings
@given(recipe=recipes, sizes=sizes, threads=threads, absent=st.booleans(), skew=st.integers(0, 5))
def test_both_call_layers_pass_what_the_recipe_says(recorder, layer, recipe, sizes, threads, absent, skew):
    if layer == "native" and native_for_torch() is None:
        pytest.skip("the extension was not built")
    went_to_torch: list[int] = []
    asked_twin: list[int] = []

    class Counting(PureCall):
        def __call__(self, *tensors: Any) -> Any:
            asked_twin.append(1)
            return super().__call__(*tensors)

    x = torch.zeros(sizes["rows"] * 4 + skew)[skew:].view(-1, 4)
    y, out, weight = torch.zeros(sizes["tokens"], 3), torch.zeros(sizes["rows"], 2), torch.zeros(2, 3, 5)
    extra = None if absent else torch.zeros(5, dtype=torch.int32)
    variant = CallVariant(None, recipe, tuple(recorder.address(each.entry) for each in recipe.launches))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tilewright.runtime.calls.native.PureCall", Counting)
        if layer == "pure":
            patch.setattr(calls, "_NATIVE", None)
        call = bind_call(
            TENSORS,
            {"weight": weight},
            [variant],
            size_name="rows",
            threads=threads,
            fallback=lambda *_: went_to_torch.append(1),
            name="demo",
        )
    names = {**sizes, "threads": threads}
    addresses = {"x": x.data_ptr(), "y": y.data_ptr(), "weight": weight.data_ptr(), "out": out.data_ptr()}
    addresses |= {"extra": 0 if extra is None else extra.data_ptr(), "workspace": ALIGNMENT}
    recorder.forget()
    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tilewright.runtime.calls.checked.warn_once", warnings.append)
        assert call(x, y, extra, out) is out
    if went_to_torch:
        assert recorder.calls() == []
        wanted = expected(recipe, names, addresses)
        assert wanted in (TORCH, ERROR)
        (warning,) = warnings
        check_sentence(TilewrightError(warning), "demo: ")
        assert ("cannot be called as its recipe says" in warning) == (wanted == ERROR)
        return
    recorded = recorder.calls()
    addresses["workspace"] = recorded[0][-1]
    assert addresses["workspace"] % ALIGNMENT == 0
    assert recorded == expected(recipe, names, addresses)
    assert asked_twin == [], "the extension handed over a call that it can make"


@needs_compiler
@own_settings
@given(recipe=recipes, sizes=sizes, threads=threads, absent=st.booleans())
def test_the_tuners_worker_passes_what_the_recipe_says(recorder, session, recipe, sizes, threads, absent):
    names = {**sizes, "threads": threads}
    aligned = dict.fromkeys((*NAMES, "workspace"), 1 << 20) | ({"extra": 0} if absent else {})
    undecidable = any(
        guard.expression not in (*NAMES, "workspace") or ALIGNMENT % guard.multiple
        for guard in recipe.guards
        if {*NAMES, "workspace"} & set(re.findall(r"\w+", guard.expression))
    )
    wanted = expected(recipe, names, aligned)
    nbytes = 0
    if isinstance(wanted, list):
        nbytes = eval(recipe.workspace_bytes, dict(PYTHON), names)
    blocks = {
        "x": share(np.zeros((sizes["rows"], 4), np.float32)),
        "y": share(np.zeros((sizes["tokens"], 3), np.float32)),
        "weight": share(np.zeros((2, 3, 5), np.float32)),
        "out": share(np.zeros((sizes["rows"], 2), np.float32)),
        "workspace": Block(SharedRegion(nbytes), nbytes),
    } | ({} if absent else {"extra": share(np.zeros(5, np.int32))})
    workspace = blocks.pop("workspace")
    recorder.forget()
    try:
        kernel = BuiltKernel("demo", recorder.path, recipe)
        try:
            program = bind(kernel, blocks, workspace, sizes, threads=threads)
        except TilewrightError as error:
            assert undecidable or wanted in (TORCH, ERROR)
            check_sentence(error)
            return
        assert not undecidable
        session.run([program])
        recorded = recorder.calls()
        addresses = dict(zip((*NAMES, "workspace"), recorded[0], strict=True))
        assert (addresses["extra"] == 0) == absent
        assert recorded == expected(recipe, names, addresses)
    finally:
        session.forget_programs()
        session.release(block.region for block in (*blocks.values(), workspace))


@st.composite
def gpu_recipes(draw: st.DrawFn) -> Recipe:
    """Recipes over grids of blocks, with tensor maps, that may ask for the device's multiprocessors."""
    recipe = draw(recipes)
    counts = values | st.sampled_from(["sm_count", "rows", "ceildiv(tokens, 8) * sm_count"])
    launches = []
    for each in recipe.launches:
        mapped = [
            replace(argument, map=TensorMap((draw(counts), "4"), 4, (8, 4), 7, 1))
            if argument.kind != "size" and draw(st.integers(0, 3)) == 0
            else argument
            for argument in each.arguments
        ]
        grid = tuple(draw(st.lists(counts, min_size=1, max_size=3)))
        shared = draw(st.sampled_from(["0", "rows * 128", "threads - 2"]))
        launches.append(
            replace(each, arguments=tuple(mapped), grid=grid, block=("threads * 32",), shared_memory_bytes=shared)
        )
    return replace(recipe, launches=tuple(launches))


@own_settings
@given(recipe=gpu_recipes(), sizes=sizes, absent=st.booleans())
def test_the_interpreter_is_told_what_the_recipe_says(recipe, sizes, absent):
    names = {**sizes, "threads": 1, "sm_count": 3}
    bases = {name: (1 + index) << 24 for index, name in enumerate((*NAMES, "workspace"))}
    bases |= {"extra": 0} if absent else {}
    wanted = expected(recipe, names, bases)

    def value(text: str) -> int:
        return int(eval(text, dict(PYTHON), dict(names)))

    try:
        grids = [[value(text) for text in launch.grid] for launch in recipe.launches]
        maps = [[value(text) for text in a.map.shape] for launch in recipe.launches for a in launch.arguments if a.map]
        shared = [value(launch.shared_memory_bytes) for launch in recipe.launches]
        impossible = any(number < 0 for numbers in (*grids, *maps, shared) for number in numbers)
    except ZeroDivisionError:
        impossible = True
    # Guards on addresses that are no multiples of all that can be asked for are the GPU's to judge.
    assume(not any(guard.multiple in (3, 5, 4096) for guard in recipe.guards))
    assume(not any(any(name in guard.expression for name in NAMES) for guard in recipe.guards))
    entries = [
        EntrySpec(launch.entry, tuple((f"a{i}", "i64") for i in range(len(launch.arguments))))
        for launch in recipe.launches
    ]
    try:
        nbytes = emulated_workspace_bytes(recipe, sizes)
        buffers = {name: EmulatedBuffer(1 << 20, name == "out") for name in NAMES if bases[name]}
        buffers["workspace"] = EmulatedBuffer(nbytes, True)
        told = describe_launches(recipe, entries, sizes, buffers)
    except TilewrightError as error:
        assert impossible or wanted in (TORCH, ERROR)
        check_sentence(error)
        return
    assert not impossible
    passed = [
        [a["value"] if "value" in a else bases[a["buffer"]] + a["offset"] for a in launch["arguments"]]
        for launch in told
    ]
    assert passed == wanted
    assert [launch["grid"] for launch in told] == [[*grid, 1, 1][:3] for grid in grids]
    assert [a["shape"] for launch in told for a in launch["arguments"] if "shape" in a] == [
        shape
        for launch, shapes in zip(recipe.launches, _by_launch(recipe, maps), strict=True)
        for argument, shape in zip([a for a in launch.arguments if a.map], shapes, strict=True)
        if argument.source != "extra" or not absent
    ]
    for launch in told:
        for extent in launch["extents"]:
            assert 0 <= extent["nbytes"] <= buffers[extent["buffer"]].nbytes - extent["offset"]


def _by_launch(recipe: Recipe, maps: list[list[int]]) -> list[list[list[int]]]:
    rest, counts = list(maps), [sum(a.map is not None for a in launch.arguments) for launch in recipe.launches]
    return [[rest.pop(0) for _ in range(count)] for count in counts]


GPU_PARTS = {
    "a grid": lambda recipe: _with_launch(recipe, grid=("rows",), block=("32",)),
    "hidden arguments": lambda recipe: _with_launch(recipe, hidden_arguments=2),
    "shared memory": lambda recipe: _with_launch(recipe, shared_memory_bytes="64"),
    "a tensor map": lambda recipe: _with_launch(
        recipe, arguments=(Argument("tensor", "x", TensorMap(("rows", "4"), 4)),)
    ),
    "multiprocessors": lambda recipe: _with_launch(recipe, arguments=(Argument("size", "sm_count"),)),
    "rows of weights": lambda recipe: replace(recipe, weight_layout=RowLayout("int8")),
}


def _with_launch(recipe: Recipe, **changes: Any) -> Recipe:
    first, *rest = recipe.launches
    return replace(recipe, launches=(replace(first, **changes), *rest))


@pytest.mark.parametrize("layer", ["native", "pure", "worker"])
@pytest.mark.parametrize("part", GPU_PARTS)
def test_what_only_gpus_can_do_is_refused_when_it_is_bound(part, layer, tmp_path, monkeypatch):
    recipe = GPU_PARTS[part](Recipe(TENSORS, (launch([Argument("tensor", "x")]),), "rows"))
    validate(recipe)
    if layer == "pure":
        monkeypatch.setattr(calls, "_NATIVE", None)

    def bind_somewhere() -> None:
        if layer == "worker":
            kernel, workspace = BuiltKernel("demo", tmp_path, recipe), Block(SharedRegion(0), 0)
            bind(kernel, {}, workspace, {"rows": 1, "tokens": 1}, threads=1)
        variants = [CallVariant(None, recipe, (1,))]
        bind_call(TENSORS, {"weight": 64}, variants, size_name="rows", threads=1, fallback=print, name="demo")

    with pytest.raises(TilewrightError, match="is for GPUs; tune for this CPU"):
        bind_somewhere()


@pytest.mark.parametrize(
    ("guard", "known"),
    [
        (Guard("x", 64), True),
        (Guard("workspace", 16), True),
        (Guard("x", 128), False),
        (Guard("x", 3), False),
        (Guard("x + rows", 1), False),
    ],
)
def test_the_tuner_judges_a_guard_on_an_address_only_where_it_holds_for_all(guard, known):
    recipe = Recipe(TENSORS, (), "rows", guards=(guard,))
    refused = refusal(recipe, {"rows": 4, "tokens": 4}, Place(threads=1), ALIGNMENT)
    assert (refused is None) == known
    assert known or "is not known to be a multiple of" in refused


def test_the_interpreter_is_not_asked_for_what_a_guard_refuses():
    recipe = Recipe(TENSORS, (launch([]),), "rows", guards=(Guard("rows", 8),))
    entries, buffers = [EntrySpec("take_0", ())], {"workspace": EmulatedBuffer(0, True)}
    with pytest.raises(TilewrightError, match="a guard refuses the problem: rows = 4 is no multiple of 8"):
        describe_launches(recipe, entries, {"rows": 4, "tokens": 4}, buffers)
    assert len(describe_launches(recipe, entries, {"rows": 8, "tokens": 4}, buffers)) == 1
