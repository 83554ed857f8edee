"""What every op promises of its spaces and of rendering them, for every arch, on the signatures of its examples."""

from __future__ import annotations

import random
import re

import pytest
from awkward import only_adds_products
from covering import FULL
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.codegen.hardware.archs import CPU_ARCHS, GPU_ARCHS, Arch
from tilewright.codegen.models.presets import PRESETS
from tilewright.codegen.models.shapes import load_model
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.implementation import Implementation
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.rendering import render
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Config
from tilewright.errors import TilewrightError

MOST_CONFIGS = 120_000
"""An enumeration of this size takes a third of a second; a search sees all of it."""

each_op = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
each_arch = pytest.mark.parametrize(
    "arch", [arch for arch in CPU_ARCHS.values() if not only_adds_products(arch)], ids=lambda arch: arch.name
)


def source(op: OpDeclaration, signature: Signature, config: Config, arch: Arch) -> str:
    return render(op.template(config), signature, config, arch)


def without_comments(text: str) -> str:
    return re.sub(r"\s*//.*", "", text)


def check_space(op: OpDeclaration, signature: Signature, arch: Arch) -> None:
    space = op.space(signature, arch)
    default = op.default_config(signature, arch)
    assert default in space
    starts = op.starting_configs(signature, arch)
    assert [config for config in starts if config not in space] == []
    assert len({default, *starts}) == 1 + len(starts)
    assert len(space) <= MOST_CONFIGS
    assert space.full_size == len(space) + sum(space.removed.values())
    assert (space.indices >= 0).all()
    assert (space.indices < [len(parameter.values) for parameter in space.parameters]).all()
    for index in {0, len(space) // 2, len(space) - 1}:
        assert space.index_of(space[index]) == index
    for template in op.templates:
        if arch.among(template.families) and template.applies(signature, arch):
            assert len(template.space(signature, arch)) > 0
    assert source(op, signature, default, arch)


def test_every_op_has_examples() -> None:
    for name in OPS:
        assert {signature.op for signature in examples_of(name).signatures} == {name}
        assert {signature.op for signature in examples_of(name).gpu_signatures} <= {name}


def test_an_op_without_examples_is_told_what_to_write() -> None:
    with pytest.raises(TilewrightError, match=r"rms_norm has no examples.*ops\.rms_norm\.examples"):
        examples_of("rms_norm")


@each_arch
@each_op
def test_space_of_a_random_signature(op: OpDeclaration, arch: Arch) -> None:
    @settings(max_examples=15)
    @given(st.randoms(use_true_random=False))
    def check(draw: random.Random) -> None:
        check_space(op, examples_of(op.name).random_signature(draw), arch)

    check()


@pytest.mark.slow
@each_arch
@each_op
def test_space_of_every_preset(op: OpDeclaration, arch: Arch) -> None:
    """Where an op declares starting configs for an arch, every served signature has some. A third of the presets by
    default."""
    here = [each for each in op.implementations if any(arch.family in t.families for t in each.templates)]
    has_starts = any(each.starting_configs is not Implementation.starting_configs for each in here)
    checked = 0
    names = list(PRESETS) if FULL else list(PRESETS)[::3]
    for name in names:
        try:
            signatures = op.signatures(load_model(name))
        except TilewrightError as error:
            assert name in str(error)  # noqa: PT017 - a model that the op cannot serve yet says so
            continue
        for signature in signatures:
            check_space(op, signature, arch)
            assert bool(op.starting_configs(signature, arch)) == has_starts
            checked += 1
    assert checked >= len(names)


@each_arch
@each_op
def test_rendering_gives_each_config_one_source_of_its_own(op: OpDeclaration, arch: Arch) -> None:
    """A knob that leaves the code as it is makes the search compile and race the same kernel twice."""
    for signature in examples_of(op.name).signatures:
        space = op.space(signature, arch)
        chosen = [space[i] for i in random.Random(0).sample(range(len(space)), min(60, len(space)))]
        codes = {}
        for config in chosen:
            text = source(op, signature, config, arch)
            assert text == source(op, signature, Config(dict(config)), arch)
            other = codes.setdefault(without_comments(text), config)
            assert other == config, f"{other} and {config} are the same code"


@each_arch
@each_op
def test_every_knob_changes_the_code(op: OpDeclaration, arch: Arch) -> None:
    """Neighbours that differ in one knob alone, which a random sample seldom holds."""
    for signature in examples_of(op.name).signatures:
        space = op.space(signature, arch)
        for start in random.Random(1).sample(range(len(space)), min(4, len(space))):
            config = space[start]
            code = without_comments(source(op, signature, config, arch))
            for parameter in space.parameters:
                neighbours = [{**config, parameter.name: value} for value in parameter.values]
                for neighbour in neighbours:
                    index = space.find(neighbour)
                    if index is not None and index != start:
                        assert without_comments(source(op, signature, space[index], arch)) != code, (config, neighbour)


def gpu_signatures(op: OpDeclaration, arch: Arch) -> list[Signature]:
    """Those that some template computes on ``arch``."""
    return [s for s in examples_of(op.name).gpu_signatures if op.templates_for(s, arch)]


@pytest.mark.parametrize("arch", GPU_ARCHS.values(), ids=lambda arch: arch.name)
@each_op
def test_spaces_of_gpus_hold_the_default_and_render(op: OpDeclaration, arch: Arch) -> None:
    for signature in gpu_signatures(op, arch):
        space = op.space(signature, arch, precisions=[op.lossless(signature)])
        default = op.default_config(signature, arch)
        assert default in space
        for size in op.ladder(signature, arch):
            problem = op.problem(signature, size, RoutingSpec.parse("balanced"))
            own = op.default_for(problem, arch)
            assert own in space
            assert op.layout_key(signature, own, arch) == op.layout_key(signature, default, arch)
        assert len(space) <= MOST_CONFIGS
        for config in (default, space[len(space) // 2], space[len(space) - 1]):
            template = op.template(config)
            assert template.entries is not None
            entries = template.entries(signature, config, arch)
            recipe = template.recipe(signature, config, arch)
            assert [entry.entry for entry in entries] == [launch.entry for launch in recipe.launches]
            text = source(op, signature, config, arch)
            for entry in entries:
                assert f"def {entry.entry}({', '.join(name for name, _ in entry.arguments)}" in text


@pytest.mark.parametrize("arch_name", ["sm_90", "gfx942"])
@each_op
def test_every_knob_of_a_gpu_changes_the_code_or_its_launch(op: OpDeclaration, arch_name: str) -> None:
    arch = GPU_ARCHS[arch_name]

    def made(config: Config, signature: Signature) -> tuple[object, ...]:
        template = op.template(config)
        assert template.entries is not None
        text = "\n".join(line for line in source(op, signature, config, arch).splitlines() if line[:1] != "#")
        return text, template.entries(signature, config, arch), template.recipe(signature, config, arch)

    for signature in gpu_signatures(op, arch):
        space = op.space(signature, arch, precisions=[op.lossless(signature)])
        for start in random.Random(1).sample(range(len(space)), min(3, len(space))):
            config = space[start]
            for parameter in space.parameters:
                for value in parameter.values:
                    index = space.find({**config, parameter.name: value})
                    if index is not None and index != start:
                        assert made(space[index], signature) != made(config, signature), (config, parameter.name)


@each_op
def test_an_unknown_knob_is_an_error_of_the_space(op: OpDeclaration) -> None:
    signature = examples_of(op.name).signatures[0]
    arch = next(iter(CPU_ARCHS.values()))
    config = op.default_config(signature, arch)
    assert Config({**config, "colour": "red"}) not in op.space(signature, arch)
    assert find_op(op.name) is op
