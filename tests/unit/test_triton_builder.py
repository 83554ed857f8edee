"""GPU binaries without a GPU: what is read from them, what cannot be launched, and what a bad source costs."""

import dataclasses
import os
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tilewright.codegen.backends.base import Source
from tilewright.codegen.backends.binaries.cubin import read_cubin, read_spills
from tilewright.codegen.backends.binaries.elf import NotElfError, sections
from tilewright.codegen.backends.binaries.facts import EntryFacts, launch_obstacle
from tilewright.codegen.backends.binaries.instructions import disassemble, read_amdgcn, read_sass
from tilewright.codegen.backends.triton.builder import TritonBuilder
from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.codegen.backends.triton.launch import EntryLaunch, EntryParameter, built_launch, parameter_mismatch
from tilewright.codegen.backends.triton.pool import Limits
from tilewright.codegen.backends.triton.toolchain import bundled_tool, toolchain
from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.recipe.model import Argument
from tilewright.errors import TilewrightError

pytest.importorskip("triton", reason="Triton is not installed")

HEAD = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
PRODUCT = Source(
    HEAD
    + textwrap.dedent("""
    def product(x, y, out, steps):
        row = tl.arange(0, 64)
        at = row[:, None] * 64 + row[None, :]
        total = tl.zeros((64, 64), tl.float32)
        for step in range(0, steps):
            total = tl.dot(tl.load(x + at + step * 4096), tl.load(y + at + step * 4096), total)
        tl.store(out + at, total)
    """).lstrip(),
    (
        EntrySpec(
            "product",
            (("x", "*bf16"), ("y", "*bf16"), ("out", "*fp32"), ("steps", "i32")),
            divisible_by_16=("x", "y", "out"),
        ),
    ),
)
TINY = EntrySpec("tiny", (("out", "*fp32"),))
FACTS = EntryFacts("product", 128, 0, 0, 0, 0, 49152, 0, 4, 1, (8, 8, 8, 4, 8, 8))


def tiny(body: str, value: float = 1.0) -> Source:
    """A source that does ``body`` when it is imported."""
    return Source(f"{body}\n{HEAD}def tiny(out):\n    tl.store(out, {value})\n", (TINY,))


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonBuilder]:
    limits = Limits(wall_s=20.0, cpu_s=5)
    with TritonBuilder(GPU_ARCHS["sm_90"], tmp_path_factory.mktemp("cache"), limits) as made:
        yield made


def test_facts_are_those_that_cuobjdump_reads(builder: TritonBuilder) -> None:
    build = builder.build(PRODUCT)
    assert build.path is not None, build.message
    facts = build.files[0].facts
    assert facts is not None
    tool = str(bundled_tool("cuobjdump"))
    usage = subprocess.check_output([tool, "--dump-resource-usage", str(build.files[0].path)], text=True)
    expected = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert expected is not None
    reserved = builder.arch.smem_reserved_bytes
    assert (facts.registers, facts.stack_bytes, facts.static_smem_bytes + reserved) == tuple(
        map(int, expected.groups())
    )
    listed = subprocess.check_output([tool, "-elf", str(build.files[0].path)], text=True)
    parameters = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x\w+\s+Size\s+: 0x(\w+)", listed)
    sizes = {int(ordinal, 16): int(size, 16) for ordinal, size in parameters}
    assert facts.parameter_bytes == tuple(sizes[ordinal] for ordinal in range(len(sizes))) == (8, 8, 8, 4, 8, 8)
    assert facts.smem_bytes >= 2 * 64 * 64 * 2
    assert EntryFacts.from_dict(facts.to_dict()) == facts


def test_the_archs_own_matrix_instruction_and_wide_loads_are_found(builder: TritonBuilder) -> None:
    build = builder.build(PRODUCT)
    mix = read_sass(disassemble(build.files[0].path.read_bytes()))
    assert all(name.startswith("HGMMA") for name in mix.mma)
    assert mix.mma
    assert mix.loop_load_bytes == 16


def test_amd_binaries_are_read_too(tmp_path: Path) -> None:
    with TritonBuilder(GPU_ARCHS["gfx942"], tmp_path) as made:
        build = made.build(PRODUCT)
    assert build.path is not None, build.message
    facts = build.files[0].facts
    assert facts is not None
    assert facts.parameter_bytes == (8, 8, 8, 4, 8, 8)
    assembly = (build.path / "0.amdgcn").read_text()
    told = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    assert told is not None
    assert facts.registers == int(told[1])
    assert any(name.startswith("v_mfma") for name in read_amdgcn(assembly).mma)


def test_equal_sources_are_built_once(builder: TritonBuilder) -> None:
    first, again = builder.build(PRODUCT), builder.build(PRODUCT)
    assert again.path == first.path
    assert again.cpu_s == 0
    other = dataclasses.replace(PRODUCT, entries=(dataclasses.replace(PRODUCT.entries[0], num_warps=8),))
    assert builder.path_for(other) != builder.path_for(PRODUCT)


@pytest.mark.slow
def test_a_bad_source_costs_itself_alone(builder: TritonBuilder) -> None:
    sources = {
        "stopped because it took too long": tiny("import time\ntime.sleep(60)"),
        "after 5 s of CPU time": tiny("while True: pass"),
        "signal 6": tiny("import os\nos.abort()"),
        "status 3": tiny("import os\nos._exit(3)"),
        "GiB of memory": tiny("x = bytearray(32 << 30)"),
        "tl.no_such_thing": tiny("tl = 1"),
        "": tiny("", 2.0),
    }
    builds = builder.build_all(list(sources.values()), jobs=4)
    for (complaint, _), build in zip(sources.items(), builds, strict=True):
        if complaint in ("", "tl.no_such_thing"):
            continue
        assert build.path is None
        assert complaint in build.message
    assert builds[-1].path is not None, builds[-1].message
    assert not list(builder.directory.glob("build-*"))


def test_the_compilers_own_words_are_passed_on(builder: TritonBuilder) -> None:
    wrong = Source(f"{HEAD}def tiny(out):\n    tl.store(out, tl.arange(0, 3))\n", (TINY,))
    build = builder.build(wrong)
    assert build.path is None
    assert "power of 2" in build.message
    assert str(builder.directory) not in build.message


def test_a_lost_server_costs_what_it_compiled_and_is_replaced(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    source = tiny(f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getppid()))\ntime.sleep(60)")
    killer = tiny(
        f"import os, signal, time\nfrom pathlib import Path\nwhile not Path({str(pid)!r}).exists(): time.sleep(0.05)\n"
        "os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)"
    )
    with TritonBuilder(GPU_ARCHS["sm_90"], tmp_path) as made:
        builds = made.build_all([source, killer], jobs=2)
        assert all(build.path is None and "the compile server ended" in build.message for build in builds)
        build = made.build(tiny(""))
        assert build.path is not None, build.message


def test_closing_ends_the_server(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with TritonBuilder(GPU_ARCHS["sm_90"], tmp_path) as made:
        made.build(tiny(f"import os\nopen({str(pid)!r}, 'w').write(str(os.getppid()))"))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_what_cannot_be_launched_is_rejected(tmp_path: Path) -> None:
    wide = Source(
        PRODUCT.text.replace("64", "256"), (dataclasses.replace(PRODUCT.entries[0], num_warps=32, num_stages=4),)
    )
    with TritonBuilder(GPU_ARCHS["sm_89"], tmp_path) as made:
        build = made.build(wide)
    assert build.path is None
    assert build.rejected
    assert "bytes of shared memory" in build.message


@pytest.mark.parametrize(
    ("changes", "arch", "reason"),
    [
        ({}, "sm_90", None),
        ({"smem_bytes": 233473}, "sm_90", "shared memory"),
        ({"smem_bytes": 101377}, "sm_120", "shared memory"),
        ({"tensor_memory_columns": 512}, "sm_100", None),
        ({"tensor_memory_columns": 1024}, "sm_100", "columns of tensor memory"),
        ({"num_warps": 33}, "sm_90", "threads"),
        ({"num_warps": 16, "registers": 168}, "sm_90", "registers"),
        ({"num_warps": 12, "registers": 168}, "sm_90", None),
        ({"cluster": 2}, "sm_80", "clusters"),
        ({"cluster": 16}, "sm_90", "clusters"),
    ],
)
def test_limits_of_the_arch(changes: dict[str, int], arch: str, reason: str | None) -> None:
    facts = dataclasses.replace(FACTS, **changes)
    obstacle = launch_obstacle(facts, GPU_ARCHS[arch])
    assert (obstacle is None) if reason is None else (obstacle is not None and reason in obstacle)


SCALARS = ("i1", "u1", "i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64", "fp16", "bf16", "fp32", "fp64")


def test_a_launch_asks_for_what_a_binary_was_compiled_for(builder: TritonBuilder) -> None:
    """Programs of two blocks, more of them than the metadata's warps, started early: all of that is in the recipe."""
    steps = EntryLaunch(
        "product",
        tuple(
            EntryParameter(name, kind, Argument("size", "steps") if name == "steps" else Argument("tensor", name), at)
            for (name, kind), at in zip(PRODUCT.entries[0].arguments, (True, True, True, False), strict=True)
        ),
        grid=("steps", "3"),
        options={"num_ctas": 2, "launch_pdl": True},
    )
    build = builder.build(Source(PRODUCT.text, (steps.spec(),)))
    assert build.path is not None, build.message
    facts = build.files[0].facts
    assert facts is not None
    assert facts.cluster == 2
    cubin = read_cubin(build.files[0].path.read_bytes(), "product")
    assert (cubin.block, cubin.cluster) == ((128, 1, 1), (2, 1, 1))
    launch = built_launch(steps.launch(32), facts, "", 32)
    assert (launch.grid, launch.cluster, launch.block) == (("(steps) * 2", "3"), ("2",), ("128",))
    assert (launch.programmatic, launch.cooperative) == (True, False)


def test_metadata_that_a_binary_contradicts_are_noticed(builder: TritonBuilder) -> None:
    cubin = read_cubin(builder.build(PRODUCT).files[0].path.read_bytes(), "product")
    cubin.require_launch("product", threads=128, cluster=1)
    with pytest.raises(ValueError, match=r"product wants 128 x 1 x 1 threads in a block, .* metadata say 256"):
        cubin.require_launch("product", threads=256, cluster=1)
    clustered = dataclasses.replace(cubin, cluster=(2, 1, 1))
    with pytest.raises(ValueError, match=r"product wants 2 x 1 x 1 blocks in a cluster, .* metadata say 1"):
        clustered.require_launch("product", threads=128, cluster=1)


def test_every_scalar_that_triton_passes_has_its_size(builder: TritonBuilder) -> None:
    names = [f"x{index}" for index in range(len(SCALARS))]
    text = f"{HEAD}def scalars(out, {', '.join(names)}):\n    tl.store(out, {names[0]} * 1.0)\n"
    entry = EntrySpec("scalars", (("out", "*fp32"), *zip(names, SCALARS, strict=True)))
    build = builder.build(Source(text, (entry,)))
    assert build.path is not None, build.message
    with pytest.raises(TilewrightError, match="it cannot take a 'fp8'"):
        parameter_mismatch(EntrySpec("product", (("x", "fp8"),)), (1, 8, 8))


def test_parameters_that_a_launch_would_not_pass_are_noticed() -> None:
    assert parameter_mismatch(PRODUCT.entries[0], FACTS.parameter_bytes) is None
    assert "8, 8, 8, 8, 8" in str(parameter_mismatch(PRODUCT.entries[0], (8, 8, 8, 8, 8)))
    descriptor = EntrySpec("tma", (("x", "tensordesc<bf16[64, 64]>"),))
    assert parameter_mismatch(descriptor, (128, 4, 4, 8, 8, 8, 8)) is None


def test_damaged_binaries_are_no_facts() -> None:
    with pytest.raises(NotElfError):
        sections(b"\x7fELF\x02\x01" + bytes(30))
    with pytest.raises(NotElfError):
        read_cubin(b"", "product")
    with pytest.raises(ValueError, match="did not tell"):
        read_spills("")
    assert read_spills("0 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads") == (12, 16)


def test_a_ptxas_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/bin/true")
    with pytest.raises(TilewrightError, match="/bin/true is no ptxas"):
        toolchain(GPU_ARCHS["sm_90"])
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/nowhere/ptxas")
    with pytest.raises(TilewrightError, match="does not run"):
        toolchain(GPU_ARCHS["sm_90"])


def test_the_narrowest_load_of_the_loop_that_multiplies_counts() -> None:
    text = """
.L_x_0:
        /*0010*/                   LDG.E R2, desc[UR14][R8.64] ;
        /*0020*/               @P2 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R21], desc[UR14][R6.64], P3 ;
        /*0040*/                   LDG.E.64 R2, desc[UR14][R8.64] ;
        /*0050*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
"""
    mix = read_sass(text)
    assert mix.loop_load_bytes == 8
    assert not mix.wide
    assert mix.mma == {"HMMA.16816.F32.BF16": 1}
    assert read_sass(text.replace("LDG.E.64", "UTMALDG.2D").replace("LDGSTS.E.BYPASS.128", "NOP")).loop_load_bytes == 0
