"""Another language is a registration: its templates compete in one space, each built by its own builder."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from tilewright.codegen.backends import registry
from tilewright.codegen.backends.cpp.backend import CppBackend
from tilewright.codegen.backends.cpp.builder import CppBuilder, find_compiler
from tilewright.codegen.backends.registry import Builders, find_backend
from tilewright.codegen.hardware.archs import CpuArch, native_arch
from tilewright.codegen.ops.gating.cpu.templates import CPU, INSERT, TEMPLATES
from tilewright.codegen.ops.gating.declaration import Gating
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.implementation import Implementation
from tilewright.tuner.campaign.variants import VariantBuilder

DIALECT = "dialect"
ARCH, SIGNATURE = native_arch(), GatingSignature(experts=64, top_k=4)


class Dialect(CppBackend):
    """C++ by the same compiler under another name."""

    language: ClassVar[str] = DIALECT
    comment: ClassVar[str] = "///"

    def builder(self, arch: CpuArch, directory: Path | None = None) -> CppBuilder:
        return CppBuilder(arch, replace(find_compiler(), version="Dialect 1.0"), directory)


class Bilingual(Gating):
    """Gating whose first template is in C++ and whose others are in the dialect."""

    implementations = (
        Implementation(tuple(each for each in TEMPLATES if each.name == INSERT), CPU.default),
        Implementation(tuple(replace(each, language=DIALECT) for each in TEMPLATES if each.name != INSERT)),
    )


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Iterator[VariantBuilder]:
    monkeypatch.setitem(registry._BACKENDS, DIALECT, f"{__name__}:Dialect")
    with closing(Builders(ARCH)) as builders:
        yield VariantBuilder(Bilingual(), SIGNATURE, ARCH, builders)
    find_backend.cache_clear()


def test_variants_of_two_languages_are_built_side_by_side_and_keep_their_order(builder: VariantBuilder) -> None:
    space = Bilingual().space(SIGNATURE, ARCH)
    ours = [config for config in space if config["template"] == INSERT][:2]
    theirs = [config for config in space if config["template"] != INSERT][:2]
    counts: list[int] = []
    built = builder.build([theirs[0], ours[0], theirs[1], ours[1]], counts.append)
    assert [each.variant.config for each in built] == [theirs[0], ours[0], theirs[1], ours[1]]
    assert [each.variant.language for each in built] == [DIALECT, "cpp", DIALECT, "cpp"]
    assert all(each.path for each in built), [each.message for each in built]
    assert sorted(counts) == [1, 2, 3, 4]
    assert [each.variant.source.partition(" ")[0] for each in built] == ["///", "//", "///", "//"]


def test_a_kernel_is_recorded_with_the_toolchain_of_its_own_builder(builder: VariantBuilder) -> None:
    space = Bilingual().space(SIGNATURE, ARCH)
    configs = [next(c for c in space if (c["template"] == INSERT) is ours) for ours in (True, False)]
    ours, theirs = (builder.record(each, "none")[0] for each in builder.build(configs))
    assert not ours.toolchain.startswith("Dialect")
    assert theirs.toolchain.startswith("Dialect 1.0 ")


def test_the_key_changes_with_the_toolchain_of_its_own_language_alone(builder: VariantBuilder) -> None:
    space = Bilingual().space(SIGNATURE, ARCH)
    ours, theirs = (next(c for c in space if (c["template"] == INSERT) is mine) for mine in (True, False))
    newer = {"cpp": Builders(ARCH)["cpp"], DIALECT: CppBuilder(ARCH, replace(find_compiler(), version="Dialect 2.0"))}
    updated = VariantBuilder(Bilingual(), SIGNATURE, ARCH, newer)
    assert updated.variant(ours).key == builder.variant(ours).key
    assert updated.variant(theirs).key != builder.variant(theirs).key


def test_the_default_is_that_of_the_first_language(builder: VariantBuilder) -> None:
    del builder
    op = Bilingual()
    assert op.default_config(SIGNATURE, ARCH)["template"] == INSERT
    swapped = type("Swapped", (Bilingual,), {"implementations": op.implementations[::-1]})()
    assert swapped.default_config(SIGNATURE, ARCH)["template"] == INSERT, "the other language has no default"
