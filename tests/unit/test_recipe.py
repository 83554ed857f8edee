"""Recipes: their JSON form, their sizes, and that every op's recipes agree with its signatures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.hardware.archs import CPU_ARCHS
from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.registry import OPS
from tilewright.codegen.recipe.expressions import IntExpr
from tilewright.codegen.recipe.model import ABI_VERSION, Argument, Guard, Launch, Recipe, TensorMap, TensorSpec
from tilewright.codegen.recipe.resolve import Place, Refusal, ResolvedMap, refused_guards, resolve, workspace_bytes
from tilewright.codegen.recipe.validity import unused_tensors
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.host_so import require_convention, require_host

GPU_RECIPE = Recipe(
    tensors=(
        TensorSpec("x", "fp32", ("tokens", 64)),
        TensorSpec("bias", "fp32", (8,), role="weight", optional=True),
        TensorSpec("ids", "int32", ("rows", 2), values="index", bound="tokens"),
        TensorSpec("weight", "fp32", (2, 32, 64), role="weight"),
        TensorSpec("out", "fp32", ("tokens", "rows"), role="output"),
    ),
    launches=(
        Launch(
            artifact="ab12",
            entry="align",
            arguments=(Argument("tensor", "x"), Argument("workspace"), Argument("size", "tokens * 2")),
            grid=("ceildiv(tokens, 64)", "1", "1"),
            block=("128", "1", "1"),
            cluster=("2", "1", "1"),
            shared_memory_bytes="4096 * 2",
            hidden_arguments=2,
        ),
        Launch(
            artifact="cd34",
            entry="multiply",
            arguments=(
                Argument("tensor", "x", TensorMap(("tokens", "64"), 4, (8, 64), 7, 3)),
                Argument("scales", "tokens * 0 + 4096"),
            ),
            grid=("tokens",),
            block=("32",),
        ),
    ),
    size_name="tokens",
    workspace_bytes="4 * rows + threads * tokens",
    workspace_zeroed=True,
    guards=(Guard("tokens", 8),),
    weight_layout=WeightLayout(16, halves=2, run=8),
)


BARE_RECIPE = Recipe((TensorSpec("x", "fp32", ("rows",)),), (), "rows")


@pytest.mark.parametrize("recipe", [GPU_RECIPE, BARE_RECIPE], ids=["full", "bare"])
def test_recipe_survives_its_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_sizes_stand_in_the_order_of_their_first_appearance() -> None:
    assert GPU_RECIPE.sizes == ("tokens", "rows")


@given(st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.integers(1, 512))
def test_workspace_is_its_expression(tokens: int, rows: int, threads: int) -> None:
    sizes = {"tokens": tokens, "rows": rows}
    assert workspace_bytes(GPU_RECIPE, sizes, Place(threads=threads)) == 4 * rows + threads * tokens


def test_workspace_needs_every_size() -> None:
    with pytest.raises(TilewrightError, match="needs the size 'threads'"):
        workspace_bytes(GPU_RECIPE, {"tokens": 1, "rows": 1}, Place(sm_count=1))


@pytest.mark.parametrize("arch", CPU_ARCHS.values(), ids=lambda arch: arch.name)
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_recipes_of_an_op_agree_with_its_signatures(op, arch) -> None:
    for signature in examples_of(op.name).signatures:
        space = op.space(signature, arch)
        for config in space[:: max(1, len(space) // 20)]:
            recipe = op.template(config).recipe(signature, config, arch)
            assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
            assert recipe.tensors == op.tensors(signature)
            assert recipe.abi_version == ABI_VERSION
            assert unused_tensors(recipe) == ()
            require_host(recipe)
            require_convention(recipe)
            small = workspace_bytes(recipe, dict.fromkeys(recipe.sizes, 0), Place(threads=1))
            large = workspace_bytes(recipe, dict.fromkeys(recipe.sizes, 1000), Place(threads=64))
            assert 0 <= small <= large


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_tensors_of_an_op_are_well_formed(op) -> None:
    for signature in examples_of(op.name).signatures:
        tensors = op.tensors(signature)
        names = [tensor.name for tensor in tensors]
        sizes = {dim for tensor in tensors for dim in tensor.dims if isinstance(dim, str)}
        assert len(set(names)) == len(names)
        assert "output" in [tensor.role for tensor in tensors]
        for tensor in tensors:
            bounded = tensor.values in ("offsets", "index", "slot", "rising", "length", "pages")
            assert bool(tensor.bound) == bounded
            assert not bounded or set() < IntExpr(tensor.bound).symbols <= sizes


def change(*path: str | int, to: object):
    """The JSON of ``GPU_RECIPE`` with one place changed."""
    data = json.loads(json.dumps(GPU_RECIPE.to_dict()))
    place = data
    for step in path[:-1]:
        place = place[step]
    if to is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return data


GONE = object()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "the recipe is a list"),
        (change("format_version", to=1), "the recipe has format 1; this tilewright reads 2"),
        (change("format_version", to=GONE), "the recipe has format None"),
        (change("size_name", to=GONE), "cannot be read (Recipe: the field 'size_name' is missing); tune again"),
        (change("dynamic_size", to="rows"), "Recipe: there is no field 'dynamic_size'"),
        (change("size_name", to="lines"), "picks by the size 'lines', which none of its tensors has"),
        (change("tensors", to="x"), "Recipe.tensors: 'x' is not a list"),
        (change("tensors", 0, to=3), "Recipe.tensors[0]: 3 is not an object"),
        (
            change("tensors", 0, "dims", 0, to=1.5),
            "Recipe.tensors[0].dims[0]: 1.5 is not an integer or a text",
        ),
        (change("tensors", 0, "dims", 1, to=-1), "tensor x has a dimension of -1"),
        (change("tensors", 0, "dims", 1, to=True), "dims[1]: True is not an integer or a text"),
        (change("tensors", 0, "role", to="guest"), "role: 'guest' is not one of 'input', 'weight', 'output'"),
        (change("tensors", 0, "name", to="out"), "gives the name 'out' to two things"),
        (change("tensors", 0, "name", to="tokens"), "gives the name 'tokens' to two things"),
        (change("tensors", 0, "name", to="workspace"), "calls a tensor or a size 'workspace'"),
        (change("tensors", 2, "bound", to="lines"), "(the bound of ids) reads unknown sizes ['lines']"),
        (change("launches", 0, "arguments", 0, "kind", to="map"), "kind: 'map' is not one of 'tensor', 'workspace'"),
        (change("launches", 0, "arguments", 0, "source", to="z"), "align takes 'z', which is no tensor of the recipe"),
        (change("launches", 0, "arguments", 2, "source", to=""), "recipe expression '' is not an integer expression"),
        (change("launches", 0, "arguments", 1, "source", to="lines"), "reads unknown sizes ['lines']"),
        (change("launches", 0, "grid", to=["1"] * 4), "has more than 3 dimensions"),
        (change("launches", 0, "block", to=[]), "needs both a grid and a block"),
        (change("launches", 0, "hidden_arguments", to=-1), "has -1 hidden arguments"),
        (change("launches", 0, "entry", to="a b"), "launches 'a b', which is no name of an entry"),
        (change("launches", 1, "arguments", 0, "map", "box", to=[8]), "a tensor map that needs an address, a shape"),
        (change("launches", 1, "arguments", 0, "map", "shape", 0, to="x"), "reads unknown sizes ['x']"),
        (change("launches", 1, "arguments", 0, "map", "swizzle", to=None), "swizzle: None is not an integer"),
        (change("workspace_bytes", to="out"), "(workspace_bytes) reads unknown sizes ['out']"),
        (change("workspace_zeroed", to=1), "workspace_zeroed: 1 is not true or false"),
        (change("guards", 0, "multiple", to=0), "wants 'tokens' to be a multiple of 0"),
        (change("guards", 0, "multiple", to=1 << 63), "to be a multiple of 9223372036854775808; expected 1 to"),
        (change("guards", 0, "expression", to="tokens %"), "is not an integer expression"),
        (change("guards", 0, "expression", to="y"), "reads unknown sizes ['y']"),
        (change("weight_layout", to=7), "weight_layout: 7 is not an object or null"),
        (change("weight_layout", "columns", to="8"), "columns: '8' is not an integer"),
        (change("weight_layout", "columns", to=0), "holds no columns"),
        (change("weight_layout", "precision", to="int3"), "unknown precision 'int3'"),
        (change("weight_layout", "precision", to=[]), "weight_layout.precision: [] is not a text"),
        (change("tensors", 3, "optional", to=True), "takes scales behind a packed weight, and the recipe has none"),
        (change("tensors", 3, "role", to="input"), "but no weight of three dimensions"),
    ],
)
def test_a_recipe_that_nothing_can_be_called_by_is_refused_in_one_sentence(data, said) -> None:
    with pytest.raises(TilewrightError) as refused:
        Recipe.from_dict(data)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_recipe_says_of_every_argument_whether_it_has_a_map() -> None:
    with pytest.raises(TilewrightError, match="the field 'map' is missing"):
        Recipe.from_dict(change("launches", 0, "arguments", 0, "map", to=GONE))


SIZES = {"tokens": 70, "rows": 6}
ADDRESSES = {"x": 1 << 20, "ids": 1 << 21, "weight": 1 << 22, "out": 1 << 23, "workspace": 1 << 24}


def test_launches_of_a_gpu_by_hand() -> None:
    call = resolve(replace(GPU_RECIPE, guards=()), SIZES, ADDRESSES, Place(threads=3))
    align, multiply = call.launches
    assert call.workspace_bytes == 4 * 6 + 3 * 70
    assert (align.artifact, align.entry, align.hidden_arguments) == ("ab12", "align", 2)
    assert (align.grid, align.block, align.cluster, align.shared_memory_bytes) == (
        (2, 1, 1),
        (128, 1, 1),
        (2, 1, 1),
        8192,
    )
    assert [each.value for each in align.arguments] == [1 << 20, 1 << 24, 140]
    assert (multiply.grid, multiply.block, multiply.cluster) == ((70, 1, 1), (32, 1, 1), None)
    mapped, scales = multiply.arguments
    assert mapped.map == ResolvedMap(GPU_RECIPE.launches[1].arguments[0].map, (70, 64), (64, 1))
    assert (scales.value, scales.buffer, scales.offset) == ((1 << 22) + 4096, "weight", 4096)
    assert resolve(GPU_RECIPE, SIZES, ADDRESSES, Place(threads=3)).refusals == (Refusal(Guard("tokens", 8), 70),)


def test_a_grid_without_blocks_is_not_launched() -> None:
    call = resolve(GPU_RECIPE, {**SIZES, "tokens": 0}, ADDRESSES, Place(threads=3))
    assert [launch.is_empty for launch in call.launches] == [True, True]


@pytest.mark.parametrize(
    ("changes", "sizes", "addresses", "place", "said"),
    [
        ({}, {"tokens": 8}, ADDRESSES, Place(threads=1), "needs the size 'rows'"),
        ({}, SIZES, ADDRESSES, Place(), "needs the size 'threads'"),
        ({}, {**SIZES, "rows": -1}, ADDRESSES, Place(threads=1), "the size rows is -1; it cannot be negative"),
        ({}, SIZES, {**ADDRESSES, "x": -8}, Place(threads=1), "the address of 'x' is -8; it cannot be negative"),
        ({}, SIZES, {"workspace": 8, "weight": 8}, Place(threads=1), "needs the address of 'x', and the call has none"),
        ({}, SIZES, {"x": 8, "weight": 8}, Place(threads=1), "needs the address of 'workspace'"),
        (
            {"workspace_bytes": "rows - 7"},
            SIZES,
            ADDRESSES,
            Place(threads=1),
            "comes to -1 bytes of workspace (rows - 7)",
        ),
        ({"workspace_bytes": "1 // (rows - 6)"}, SIZES, ADDRESSES, Place(threads=1), "divides by zero"),
        (
            {"guards": (Guard("bias", 8), Guard("weight + 1", 8))},
            SIZES,
            {},
            Place(threads=1),
            "the address of 'weight'",
        ),
    ],
)
def test_a_call_that_cannot_be_made_is_refused_in_one_sentence(changes, sizes, addresses, place, said) -> None:
    with pytest.raises(TilewrightError) as refused:
        resolve(replace(GPU_RECIPE, **{"guards": (), **changes}), sizes, addresses, place)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": ("rows - 7",)}, "comes to -1 blocks of the launch of run"),
        ({"block": ("rows - 6",)}, "comes to 0 threads of the launch of run; at least 1"),
        ({"cluster": ("0",)}, "comes to 0 blocks of a cluster of the launch of run"),
        ({"shared_memory_bytes": "rows - 9"}, "comes to -3 bytes of shared memory of the launch of run"),
        ({"arguments": (Argument("workspace", "24"),)}, None),
        ({"arguments": (Argument("workspace", "25"),)}, "a part at byte 25 of a workspace of 24 bytes"),
        ({"arguments": (Argument("workspace", "rows - 7"),)}, "a part at byte -1 of a workspace"),
        ({"arguments": (Argument("scales", "rows - 7"),)}, "puts scales 1 bytes before the packed weight"),
        ({"arguments": (Argument("size", f"{1 << 62} * rows"),)}, "which 64 bits do not hold"),
        ({"arguments": (Argument("tensor", "x", TensorMap(("rows - 7", "4"), 4)),)}, "-1 elements of a tensor map"),
        ({"arguments": (Argument("tensor", "x", TensorMap((str(1 << 31), "4"), 4)),)}, "of 2147483648 elements"),
    ],
)
def test_a_launch_that_cannot_be_made_is_refused_in_one_sentence(changes, said) -> None:
    launch = Launch("", "run", **{"arguments": (), "grid": ("1",), "block": ("32",), **changes})
    recipe = replace(GPU_RECIPE, launches=(launch,), guards=(), workspace_bytes="rows * 4")
    if said is None:
        assert resolve(recipe, SIZES, ADDRESSES, Place()).launches[0].arguments[0].value == (1 << 24) + 24
        return
    with pytest.raises(TilewrightError) as refused:
        resolve(recipe, SIZES, ADDRESSES, Place())
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("place", [{"threads": 0}, {"sm_count": -1}])
def test_a_place_has_at_least_one_of_each(place) -> None:
    with pytest.raises(TilewrightError, match="at least 1 is needed"):
        Place(**place)


def test_guards_on_the_workspace_wait_for_it() -> None:
    recipe = replace(GPU_RECIPE, guards=(Guard("workspace", 64),))
    assert refused_guards(recipe, SIZES, {}, Place(threads=1)) == ()
    assert resolve(recipe, SIZES, {**ADDRESSES, "workspace": 32}, Place(threads=1)).refusals[0].value == 32
