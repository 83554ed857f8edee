"""The C++ builder: what it keeps, and compilers that fail, hang, talk nonsense or are not there.

Most compilers here are shell scripts, so that each does on purpose what real ones do by accident.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from patience import PATIENCE_S, wait_until

from tilewright.codegen.backends.base import Source
from tilewright.codegen.backends.cpp import builder as cpp
from tilewright.codegen.backends.cpp.builder import Compiler, CppBuilder, find_compiler
from tilewright.codegen.hardware.archs import CPU_ARCHS, native_arch
from tilewright.errors import TilewrightError

AVX2 = CPU_ARCHS["x86_64_avx2"]
PREAMBLE = """#!/bin/sh
for argument; do
    case $argument in
        *.cpp) SOURCE=$(cat "$argument") ;;
        *.so) OBJECT=$argument ;;
    esac
done
"""
COPY = 'echo run >> "$LOG"; echo object > "$OBJECT"'
"""Writes an object, and counts its runs."""


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Makes an executable shell script."""

    def make(body: str, name: str = "compiler") -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{PREAMBLE}LOG={tmp_path}/log\n{body}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def builder(script: Callable[..., Path], tmp_path: Path) -> Callable[..., CppBuilder]:
    """Makes a builder that uses a script as its compiler."""
    return lambda body: CppBuilder(AVX2, Compiler(str(script(body)), "Scripted 1.0"), tmp_path / "cache")


def runs(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def gone(pid: int) -> bool:
    """Whether a process ended; one that nobody waited for yet counts as ended."""
    status = Path(f"/proc/{pid}/stat")
    wait_until(
        lambda: not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z", f"{pid} never ended"
    )
    return True


def written_pid(path: Path) -> int:
    wait_until(lambda: path.exists() and path.read_text().strip(), f"{path} was never written")
    return int(path.read_text())


def leftovers(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir() if entry.suffix != ".so"]


def test_a_real_compiler_builds_what_can_be_called(tmp_path: Path) -> None:
    try:
        compiler = find_compiler()
    except TilewrightError as error:
        pytest.skip(str(error))
    builder = CppBuilder(native_arch(), compiler, tmp_path)
    build = builder.build('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\nint hidden;')
    assert build.path is not None, build.message
    library = ctypes.CDLL(str(build.path))
    assert library.answer() == 42
    assert not hasattr(library, "hidden")
    assert build.cpu_s > 0
    broken = builder.build("int answer() { return }")
    assert broken.path is None
    assert broken.message.startswith(f"{compiler.version} failed (status 1): kernel.cpp:")
    assert "kernel.cpp:1:" in broken.message
    assert str(tmp_path) not in broken.message


def test_the_same_source_is_compiled_once(builder: Callable[..., CppBuilder], tmp_path: Path) -> None:
    first = builder(COPY).build("a")
    again = builder(COPY).build("a")
    assert runs(tmp_path) == 1
    assert first.path == again.path
    assert again.cpu_s == 0
    assert builder(COPY).build("b").path != first.path
    assert runs(tmp_path) == 2


def test_a_path_is_a_function_of_source_flags_and_compiler(tmp_path: Path) -> None:
    paths = {
        CppBuilder(arch, Compiler("c++", version), tmp_path).path_for(source)
        for arch in CPU_ARCHS.values()
        for version in ("Compiler 1", "Compiler 2")
        for source in ("a", "b")
    }
    assert len(paths) == len(CPU_ARCHS) * 4
    one = CppBuilder(AVX2, Compiler("c++", "Compiler 1"), tmp_path)
    other = CppBuilder(AVX2, Compiler("/usr/bin/c++", "Compiler 1"), tmp_path)
    assert one.path_for("a") == other.path_for("a")


def test_the_compiler_gets_the_flags_of_the_arch(builder: Callable[..., CppBuilder]) -> None:
    made = builder('echo "$@" > "$OBJECT"').build("a").path
    assert made is not None
    flags = made.read_text().split()
    assert {"-O3", "-shared", "-mavx2", "-mfma"} <= set(flags)
    assert not any(flag.startswith("-fopenmp") for flag in flags)


def test_a_failed_build_says_why_and_keeps_nothing(builder: Callable[..., CppBuilder]) -> None:
    made = builder('echo "kernel.cpp:3: error: no such thing" >&2\nexit 3')
    build = made.build("a")
    assert build.path is None
    assert build.message == "Scripted 1.0 failed (status 3): kernel.cpp:3: error: no such thing"
    assert list(made.directory.iterdir()) == []


def test_success_without_an_object_is_a_failure(builder: Callable[..., CppBuilder]) -> None:
    build = builder("exit 0").build("a")
    assert build.path is None
    assert build.message == "Scripted 1.0 failed (status 0): it said nothing"


def test_garbage_in_the_log_is_shown_and_bounded(builder: Callable[..., CppBuilder]) -> None:
    body = "head -c 100000 /dev/zero | tr '\\0' '\\377'\nexit 1"
    build = builder(body).build("a")
    assert build.path is None
    assert "failed (status 1): �" in build.message
    assert len(build.message) < 2100


def test_a_compiler_that_vanished_is_an_outcome(tmp_path: Path) -> None:
    build = CppBuilder(AVX2, Compiler(str(tmp_path / "none"), "Gone 1.0"), tmp_path).build("a")
    assert build.path is None
    assert "Gone 1.0 failed (status 127)" in build.message


def test_a_hanging_compiler_is_killed_with_its_children(
    builder: Callable[..., CppBuilder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp, "CPU_LIMIT_S", 1)
    made = builder(f"sleep 1000 &\necho $! > {tmp_path}/pid\nwait")
    build = made.build("a")
    assert build.path is None
    assert build.message == "Scripted 1.0 was stopped after 2 s"
    assert gone(written_pid(tmp_path / "pid"))
    assert list(made.directory.iterdir()) == []


def test_a_compiler_that_computes_without_end_is_killed(
    builder: Callable[..., CppBuilder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp, "CPU_LIMIT_S", 1)
    build = builder("while :; do :; done").build("a")
    assert build.path is None
    # On a busy machine the limit of 2 s in all comes first.
    assert build.message in {f"Scripted 1.0 was stopped after {limit}" for limit in ("1 s of CPU time", "2 s")}
    assert build.cpu_s > 0.1


def test_parallel_builds_of_one_source_agree(builder: Callable[..., CppBuilder]) -> None:
    builders = [builder(f"sleep 0.1\n{COPY}") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        builds = list(pool.map(lambda each: each.build("a"), builders))
    (path,) = {build.path for build in builds}
    assert path is not None
    assert path.read_text() == "object\n"
    assert leftovers(path.parent) == []


def test_an_object_appears_whole_or_not_at_all(builder: Callable[..., CppBuilder]) -> None:
    made = builder('printf half > "$OBJECT"\nsleep 0.3\nprintf whole > "$OBJECT"')
    with ThreadPoolExecutor(1) as pool:
        build = pool.submit(made.build, "a")
        while not build.done():
            assert not made.path_for("a").exists() or made.path_for("a").read_text() == "whole"
            time.sleep(0.005)
    assert made.path_for("a").read_text() == "whole"


def test_build_all_keeps_order_and_counts(builder: Callable[..., CppBuilder]) -> None:
    made = builder(f"[ $SOURCE = bad ] && exit 1\n{COPY}")
    counts: list[int] = []
    builds = made.build_all([Source("good"), Source("bad"), Source("better")], jobs=2, progress=counts.append)
    assert [build.path for build in builds] == [made.path_for("good"), None, made.path_for("better")]
    assert counts == [1, 2, 3]


def test_an_exception_ends_compilers_that_run(builder: Callable[..., CppBuilder], tmp_path: Path) -> None:
    made = builder(f"if [ $SOURCE = quick ]; then {COPY}; exit; fi\necho $$ > {tmp_path}/pid\nsleep 1000")

    def interrupt(_done: int) -> None:
        written_pid(tmp_path / "pid")
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        made.build_all([Source("quick"), Source("slow"), Source("never started")], jobs=2, progress=interrupt)
    assert time.monotonic() - started < PATIENCE_S, "it waited for the compiler to end by itself"
    assert gone(written_pid(tmp_path / "pid"))
    assert leftovers(made.directory) == []


def test_ctrl_c_ends_the_compilers(script: Callable[..., Path], tmp_path: Path) -> None:
    compiler = script(f"sleep 1000 &\necho $! > {tmp_path}/pid\nwait")
    program = textwrap.dedent(f"""
        from pathlib import Path
        from tilewright.codegen.hardware.archs import CPU_ARCHS
        from tilewright.codegen.backends.base import Source
        from tilewright.codegen.backends.cpp.builder import Compiler, CppBuilder

        compiler = Compiler({str(compiler)!r}, "Scripted 1.0")
        builder = CppBuilder(CPU_ARCHS["x86_64_avx2"], compiler, Path({str(tmp_path)!r}))
        builder.build_all([Source("a"), Source("b")], jobs=1)
    """)
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    try:
        child = written_pid(tmp_path / "pid")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors
    assert gone(child)
    assert leftovers(tmp_path / "builds") == []


def test_clang_is_preferred_and_a_broken_one_passed_over(script: Callable[..., Path]) -> None:
    gcc = script("echo 'g++ 12'\necho more", "g++")
    path = {"PATH": str(gcc.parent)}
    assert find_compiler(path) == Compiler(str(gcc), "g++ 12")
    old = script("echo clang 9", "clang++-9")
    script("exit 1", "clang++")
    script("echo not a compiler", "clang++-tidy")
    assert find_compiler(path) == Compiler(str(old), "clang 9")
    new = script("echo clang 14", "clang++-14")
    assert find_compiler(path) == Compiler(str(new), "clang 14")
    assert find_compiler({**path, "CXX": str(gcc)}).version == "g++ 12"
    assert find_compiler({**path, "CXX": ""}) == Compiler(str(new), "clang 14")


@pytest.mark.parametrize("body", ["exit 1", "exit 0", "echo", "printf '\\n\\nlate'"])
def test_a_compiler_that_names_no_version_does_not_run(script: Callable[..., Path], body: str) -> None:
    chosen = str(script(body))
    with pytest.raises(TilewrightError, match=rf"\$CXX is '{chosen}', which does not run; set it to a C\+\+ compiler"):
        find_compiler({"CXX": chosen, "PATH": os.defpath})


@pytest.mark.parametrize(
    ("words", "own_flags"),
    [
        ("{runner} {compiler}", ()),
        ("{compiler} -m64", ("-m64",)),
        ("  {runner}   {compiler} '--gcc-toolchain=/opt/my gcc' -m64 ", ("--gcc-toolchain=/opt/my gcc", "-m64")),
        ("CCACHE_DISABLE=1 {compiler} -m64", ("-m64",)),
        ("'{blank}'", ()),
        ("{blank}", ()),
    ],
)
def test_a_compiler_is_read_as_make_reads_it(
    words: str, own_flags: tuple[str, ...], script: Callable[..., Path], tmp_path: Path
) -> None:
    compiler = script('case "$*" in *--version) echo scripted 1.0; exit;; esac\nfor a; do echo "$a"; done > "$OBJECT"')
    blank = script(compiler.read_text(), "my compiler")
    runner = script('echo run >> "$LOG"; exec "$@"', "runner")
    found = find_compiler({"CXX": words.format(compiler=compiler, runner=runner, blank=blank), "PATH": os.defpath})
    assert found.version == "scripted 1.0"
    build = CppBuilder(AVX2, found, tmp_path / "cache").build("a")
    assert build.path is not None, build.message
    assert build.path.read_text().splitlines()[: len(own_flags) + 1] == [*own_flags, "-std=c++17"]
    assert runs(tmp_path) == (2 if "runner" in words else 0)
    # Its flags make another kernel; what runs it does not.
    assert (found.toolchain(AVX2) == Compiler(str(compiler), "scripted 1.0").toolchain(AVX2)) == (not own_flags)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("ccache-of-nobody g++", "does not run: there is no program ccache-of-nobody; set it to a C"),
        ("env nobodys-compiler -m64", "does not run; set it to a C"),
        ("g++ '-m64", "no shell could read .No closing quotation.; set it to a C"),
    ],
)
def test_a_chosen_compiler_that_cannot_be_run_is_one_sentence(chosen: str, said: str) -> None:
    with pytest.raises(TilewrightError, match=rf"\$CXX is .*{said}"):
        find_compiler({"CXX": chosen, "PATH": os.defpath})


def test_a_chosen_compiler_of_blanks_is_none_chosen(script: Callable[..., Path]) -> None:
    found = script("echo scripted g++", "g++")
    assert find_compiler({"CXX": "  ", "PATH": str(found.parent)}).command == str(found)


def test_a_version_of_garbage_bytes_is_no_crash(script: Callable[..., Path]) -> None:
    chosen = str(script("printf '\\377\\376 compiler\\n'"))
    assert find_compiler({"CXX": chosen, "PATH": os.defpath}).version.endswith("compiler")


def test_without_a_compiler_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(TilewrightError, match=r"no C\+\+ compiler was found; install clang .* set \$CXX"):
        find_compiler({"PATH": str(tmp_path)})


def test_a_cache_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TilewrightError, match=r"cannot keep built kernels in .*file/builds .*; set \$TILEWRIGHT_CACHE"):
        CppBuilder(AVX2, Compiler("c++", "1"), tmp_path / "file")


def test_the_cache_is_private_and_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = CppBuilder(AVX2, Compiler("c++", "1"), tmp_path).directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "own"))
    assert CppBuilder(AVX2, Compiler("c++", "1")).directory.parent == tmp_path / "own"
