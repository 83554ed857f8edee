"""What every backend and its builder must do. A new language inherits ``BackendContract`` and supplies its sources."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tilewright.codegen.backends.base import Backend, Builder, Source
from tilewright.codegen.backends.registry import LANGUAGES, Builders, find_backend
from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.codegen.hardware.archs import ARCHS, Arch, native_arch
from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.registry import OPS
from tilewright.codegen.recipe.model import Argument, Launch
from tilewright.codegen.rendering import render, template_file
from tilewright.errors import TilewrightError

TEMPLATES = Path(__file__).parents[2] / "templates"


Lend = Callable[[Backend, Arch], Builder]


@pytest.fixture(scope="module")
def lend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lend]:
    """One builder for each language and arch, since some take seconds to start."""
    made: dict[tuple[str, str], Builder] = {}

    def lent(backend: Backend, arch: Arch) -> Builder:
        key = backend.language, arch.name
        if key not in made:
            made[key] = backend.builder(arch, tmp_path_factory.mktemp("cache"))
        return made[key]

    yield lent
    for builder in made.values():
        builder.close()


class BackendContract(ABC):
    language: str
    arch_name: str

    @pytest.fixture
    def arch(self) -> Arch:
        return ARCHS[self.arch_name]

    @abstractmethod
    def good(self, number: int) -> Source:
        """A source that builds; another for every number."""

    @abstractmethod
    def bad(self) -> Source:
        """A source that the compiler refuses."""

    @abstractmethod
    def endless(self, folder: Path) -> Source:
        """A source whose compiler never ends by itself; it may use ``folder``."""

    @abstractmethod
    def launch(self) -> Launch:
        """Of the entry of :meth:`good`, as a template would give it."""

    @pytest.fixture
    def backend(self) -> Backend:
        return find_backend(self.language)

    @pytest.fixture
    def builder(self, backend: Backend, arch: Arch, lend: Lend) -> Builder:
        return lend(backend, arch)

    def test_it_is_registered_under_its_language(self, backend: Backend) -> None:
        assert backend.language == self.language
        assert find_backend(self.language) is backend

    def test_its_templates_are_there_and_rendered_with_its_comments(self, backend: Backend, arch: Arch) -> None:
        for op in OPS.values():
            for template in (each for each in op.templates if each.language == self.language):
                file = template_file(template.name, template.language)
                assert file.endswith(backend.template_suffix)
                assert (TEMPLATES / file).is_file()
            examples = examples_of(op.name)
            signatures = [op.on(each, arch) for each in (*examples.signatures, *examples.gpu_signatures)]
            signature = next(each for each in signatures if op.templates_for(each, arch))
            config = op.default_config(signature, arch)
            assert op.template(config).language == self.language
            text = render(op.template(config), signature, config, arch)
            assert text.startswith(f"{backend.comment} Made by tilewright")
            assert text == backend.formatted(text)

    def test_the_toolchain_is_one_line_and_the_same_for_the_same_arch(
        self, backend: Backend, builder: Builder, arch: Arch, tmp_path: Path
    ) -> None:
        assert builder.toolchain
        assert "\n" not in builder.toolchain
        with closing(backend.builder(arch, tmp_path)) as other:
            assert other.toolchain == builder.toolchain

    def test_equal_sources_are_built_once_and_others_beside_them(self, builder: Builder) -> None:
        first, again, other = (builder.build_all([self.good(number)])[0] for number in (1, 1, 2))
        assert first.path is not None, first.message
        assert first.cpu_s > 0
        assert (again.path, again.cpu_s, again.message) == (first.path, 0, "")
        assert [file.path for file in again.files] == [file.path for file in first.files]
        assert other.path not in (None, first.path)

    def test_builds_of_two_processes_agree(
        self, backend: Backend, builder: Builder, arch: Arch, tmp_path: Path
    ) -> None:
        with closing(backend.builder(arch, tmp_path)) as other:
            built = other.build_all([self.good(1)] * 3, jobs=3)  # the same one three times over at once
        assert len({build.path for build in built}) == 1
        (here,) = builder.build_all([self.good(1)])
        assert here.path is not None
        assert built[0].path is not None
        assert built[0].path.name == here.path.name, "a build is found by its content, wherever it lies"

    def test_a_bad_source_is_a_build_with_a_message_and_costs_itself_alone(self, builder: Builder) -> None:
        counts: list[int] = []
        refused, first, third = builder.build_all(
            [self.bad(), self.good(1), self.good(3)], jobs=2, progress=counts.append
        )
        assert refused.path is None
        assert builder.toolchain.split(" for ")[0].split(" -")[0] in refused.message
        assert len(refused.message) < 3000
        assert not refused.files
        assert first.path not in (None, third.path)
        assert first.path == builder.build_all([self.good(1)])[0].path
        assert counts == [1, 2, 3]

    def test_an_exception_ends_what_is_being_built_and_leaves_nothing_half_done(
        self, backend: Backend, arch: Arch, tmp_path: Path
    ) -> None:
        with closing(backend.builder(arch, tmp_path / "cache")) as builder:

            def interrupt(_done: int) -> None:
                raise KeyboardInterrupt

            begin = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                builder.build_all([self.good(1), self.endless(tmp_path)], jobs=2, progress=interrupt)
            deadline = begin + 60
            assert time.monotonic() < deadline, "it waited for a compiler to end by itself"
            while list((tmp_path / "cache").rglob("build-*")):
                assert time.monotonic() < deadline, "what was being built is still there"
                time.sleep(0.1)
            (whole,) = builder.build_all([self.good(1)])
            assert whole.path is not None

    def test_a_build_tells_what_a_launch_has_to_know(self, backend: Backend, builder: Builder, arch: Arch) -> None:
        (build,) = builder.build_all([self.good(1)])
        sums = [f"{number:064x}" for number in range(len(build.files))]
        (launch,) = backend.built_launches([self.launch()], build.files, sums, arch)
        assert launch.artifact == sums[0]
        assert launch.entry == self.launch().entry

    def test_machine_code_can_be_read_and_tells_kernels_apart(
        self, backend: Backend, builder: Builder, arch: Arch
    ) -> None:
        texts = []
        for number in (1, 1, 2):
            (build,) = builder.build_all([self.good(number)])
            text = backend.disassembly(build.files[0].kind, build.files[0].path.read_bytes())
            texts.append(text or builder.form(self.good(number), 0, backend.forms(arch)[-1]))
        assert len(texts[0].splitlines()) > 5
        assert texts[0] == texts[1] != texts[2]

    def test_forms_are_those_that_it_names(self, backend: Backend, builder: Builder, arch: Arch) -> None:
        for form in backend.forms(arch):
            assert builder.form(self.good(1), 0, form).strip()
        with pytest.raises(TilewrightError, match="no_such_form"):
            builder.form(self.good(1), 0, "no_such_form")

    def test_a_closed_builder_was_not_needed(self, backend: Backend, arch: Arch, tmp_path: Path) -> None:
        backend.builder(arch, tmp_path).close()


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump to read shared objects with")
class TestCppBackend(BackendContract):
    language, arch_name = "cpp", native_arch().name

    def good(self, number: int) -> Source:
        return Source(
            f'extern "C" __attribute__((visibility("default"))) int run(int x) {{ return x * {number + 2}; }}\n'
        )

    def bad(self) -> Source:
        return Source("int run( { nonsense\n")

    def endless(self, folder: Path) -> Source:
        pipe = folder / "pipe.h"
        if not pipe.exists():
            os.mkfifo(pipe)  # nobody writes into it
        return Source(f'#include "{pipe}"\n')

    def launch(self) -> Launch:
        return Launch("", "run", (Argument("size", "rows"),))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
class TestTritonBackend(BackendContract):
    language = "triton"
    arch_name = "sm_90"
    ENTRY = EntrySpec("store", (("out", "*fp32"), ("count", "i32")))

    def good(self, number: int) -> Source:
        head = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
        return Source(f"{head}def store(out, count):\n    tl.store(out + count, {number}.5)\n", (self.ENTRY,))

    def bad(self) -> Source:
        return Source(self.good(1).text.replace("1.5", "tl.arange(0, 3)"), (self.ENTRY,))

    def endless(self, folder: Path) -> Source:
        del folder
        return Source(f"import time\ntime.sleep(300)\n{self.good(1).text}", (self.ENTRY,))

    def launch(self) -> Launch:
        arguments = (Argument("tensor", "out"), Argument("size", "rows"))
        return Launch("", "store", arguments, grid=("1",), block=("128",), hidden_arguments=2)

    def test_a_launch_that_the_binary_does_not_take_is_an_error(
        self, backend: Backend, builder: Builder, arch: Arch
    ) -> None:
        (build,) = builder.build_all([self.good(1)])
        short = Launch("", "store", (Argument("tensor", "out"),), grid=("1",), block=("128",), hidden_arguments=2)
        with pytest.raises(TilewrightError, match="cannot be launched"):
            backend.built_launches([short], build.files, ["0" * 64], arch)


class TestTritonBackendForAmd(TestTritonBackend):
    arch_name = "gfx942"


def test_every_template_is_in_a_language_that_has_a_backend() -> None:
    assert {template.language for op in OPS.values() for template in op.templates} <= set(LANGUAGES)
    for language in LANGUAGES:
        assert find_backend(language).language == language


def test_an_unknown_language_is_one_sentence() -> None:
    with pytest.raises(TilewrightError, match=r"no backend builds 'fortran' templates; known languages: cpp, triton"):
        find_backend("fortran")


def test_a_compiler_is_looked_for_when_its_language_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    builders = Builders(native_arch())
    assert set(builders) == set(LANGUAGES)
    with pytest.raises(TilewrightError, match=r"\$CXX is '/nowhere/c\+\+'"):
        builders["cpp"]
    builders.close()
