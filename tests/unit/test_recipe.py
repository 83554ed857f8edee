"""Recipes: their JSON form, their sizes, and that every op's recipes agree with its signatures."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.hardware.archs import CPU_ARCHS
from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.registry import OPS
from tilewright.codegen.recipe.expressions import IntExpr
from tilewright.codegen.recipe.model import ABI_VERSION, Argument, Guard, Launch, Recipe, TensorSpec
from tilewright.errors import TilewrightError

GPU_RECIPE = Recipe(
    tensors=(
        TensorSpec("x", "fp32", ("tokens", 64)),
        TensorSpec("bias", "fp32", (8,), role="weight", optional=True),
        TensorSpec("ids", "int32", ("rows", 2), values="index", bound="tokens"),
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
        Launch(artifact="cd34", entry="multiply", arguments=()),
    ),
    size_name="tokens",
    workspace_bytes="4 * rows + threads * tokens",
    workspace_zeroed=True,
    guards=(Guard("tokens", 8),),
    weight_layout=WeightLayout(16, halves=2, run=8),
)


@pytest.mark.parametrize("recipe", [GPU_RECIPE, Recipe((), (), "rows")], ids=["full", "bare"])
def test_recipe_survives_its_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_sizes_stand_in_the_order_of_their_first_appearance() -> None:
    assert GPU_RECIPE.sizes == ("tokens", "rows")


@given(st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.integers(1, 512))
def test_workspace_is_its_expression(tokens: int, rows: int, threads: int) -> None:
    sizes = {"tokens": tokens, "rows": rows, "threads": threads}
    assert GPU_RECIPE.workspace_for(sizes) == 4 * rows + threads * tokens


def test_workspace_needs_every_size() -> None:
    with pytest.raises(TilewrightError, match="needs the size 'threads'"):
        GPU_RECIPE.workspace_for({"tokens": 1, "rows": 1})


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
            assert recipe.size_name in recipe.sizes
            known = {*recipe.sizes, "threads"}
            assert IntExpr(recipe.workspace_bytes).symbols <= known
            names = [tensor.name for tensor in recipe.tensors]
            for launch in recipe.launches:
                for argument in launch.arguments:
                    assert argument.kind != "tensor" or argument.source in names
                    assert argument.kind != "size" or IntExpr(argument.source).symbols <= known
            small = recipe.workspace_for({**dict.fromkeys(recipe.sizes, 0), "threads": 1})
            large = recipe.workspace_for({**dict.fromkeys(recipe.sizes, 1000), "threads": 64})
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
