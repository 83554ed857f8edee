"""Loading and launching through the CUDA driver, on a stand-in: what is refused, in which words, and what is passed."""

from __future__ import annotations

import ctypes
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from cuda_standin import RULES, StandIn, standin
from made_cubins import make_cubin

from tilewright.codegen.backends.base import Source
from tilewright.codegen.backends.triton.builder import TritonBuilder
from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.numbers.layouts import RowLayout, WeightLayout
from tilewright.codegen.recipe.model import Argument, Launch, Recipe, TensorMap, TensorSpec
from tilewright.codegen.recipe.resolve import ResolvedArgument, ResolvedLaunch, ResolvedMap
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.base import KernelRefused
from tilewright.runtime.launchers.cuda.driver import DRIVER_VARIABLE, Driver, DriverError, find_driver
from tilewright.runtime.launchers.cuda.image import Target, read_target
from tilewright.runtime.launchers.cuda.kernel import CudaKernel, Needs
from tilewright.runtime.launchers.cuda.launcher import Cubin, CudaLauncher, load_kernels
from tilewright.runtime.launchers.cuda.tensor_maps import encode
from tilewright.tuning_db.integrity import DamagedArtifact, sha256_hex

pytest.importorskip("triton", reason="Triton is not installed")

SOURCE = """
import triton
import triton.language as tl


@triton.jit
def copy(x, out, count, last):
    at = tl.program_id(0) * 128 + tl.arange(0, 128)
    tl.store(out + at, tl.load(x + at, mask=at < count) + last, mask=at < count)
"""
ENTRY = EntrySpec("copy", (("x", "*fp32"), ("out", "*fp32"), ("count", "i32"), ("last", "i64")))
X, OUT = 0x7F0000001000, 0x7F0000002000
LAUNCH = ResolvedLaunch(
    artifact="",
    entry="copy",
    arguments=(
        ResolvedArgument(X, "x"),
        ResolvedArgument(OUT, "out"),
        ResolvedArgument(300),
        ResolvedArgument(-1),
    ),
    grid=(3, 1, 1),
    block=(128, 1, 1),
    cluster=None,
    shared_memory_bytes=0,
    hidden_arguments=2,
    programmatic=False,
    cooperative=False,
)
STORED = Launch(
    artifact="",
    entry="copy",
    arguments=(Argument("tensor", "x"), Argument("tensor", "out"), Argument("size", "rows"), Argument("size", "0 - 1")),
    grid=("ceildiv(rows, 128)",),
    block=("128",),
    hidden_arguments=2,
)
WEIGHT = TensorMap(("rows", "64"), 2, box=(64, 64), data_type=9, swizzle=3)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of sm_80, which 8.0 and 8.6 run, and 9.0 does not."""
    with TritonBuilder(GPU_ARCHS["sm_80"], tmp_path_factory.mktemp("builds")) as builder:
        build = builder.build(Source(SOURCE, (ENTRY,)))
    assert build.path is not None, build.message
    return build.files[0].path.read_bytes()


@pytest.fixture
def cuda() -> Iterator[StandIn]:
    made = standin()
    made.begin([80, 90, 80])
    yield made
    made.begin([80])


@pytest.fixture
def driver(cuda: StandIn) -> Driver:
    return Driver(str(cuda.path))


@pytest.fixture
def kernel(driver: Driver, image: bytes) -> CudaKernel:
    return CudaKernel(driver, driver.device(0), image, "copy", Needs())


def mapped(shape: tuple[int, ...], encoding: TensorMap = WEIGHT) -> ResolvedMap:
    strides = [1]
    for length in shape[:0:-1]:
        strides.insert(0, strides[0] * length)
    return ResolvedMap(encoding, shape, tuple(strides))


def test_a_launch_passes_its_arguments_as_the_binary_lays_them_out(cuda: StandIn, kernel: CudaKernel) -> None:
    kernel.require(STORED)
    kernel.launch(replace(LAUNCH, programmatic=True), stream=0xABC)
    (seen,) = cuda.launches
    assert (seen.name, seen.device, seen.stream) == (b"copy", 0, 0xABC)
    assert (list(seen.grid), list(seen.block), seen.programmatic) == ([3, 1, 1], [128, 1, 1], 1)
    words = (X, OUT)
    expected = b"".join(word.to_bytes(8, "little") for word in words) + (300).to_bytes(4, "little") + bytes(4)
    expected += (-1).to_bytes(8, "little", signed=True) + bytes(16)
    assert seen.parameters == expected


def test_a_grid_of_nothing_is_not_launched(cuda: StandIn, kernel: CudaKernel) -> None:
    kernel.launch(replace(LAUNCH, grid=(0, 1, 1)), 0)
    assert cuda.launches == []


def test_the_context_of_the_caller_stays_current(cuda: StandIn, driver: Driver, kernel: CudaKernel) -> None:
    other = driver.device(1)
    current = ctypes.c_void_p()
    with driver.current(other):
        kernel.launch(LAUNCH, 0)
        driver.call("cuCtxGetCurrent", ctypes.byref(current))
        assert current.value == other.context
    driver.call("cuCtxGetCurrent", ctypes.byref(current))
    assert current.value is None
    assert [each.device for each in cuda.launches] == [0]


def test_kernels_are_loaded_for_every_device_by_itself(cuda: StandIn, driver: Driver, image: bytes) -> None:
    for index in (0, 2):
        CudaKernel(driver, driver.device(index), image, "copy", Needs()).launch(LAUNCH, 0)
    assert [each.device for each in cuda.launches] == [0, 2]


def test_what_cannot_be_loaded_is_refused_with_the_device_and_the_driver(driver: Driver, image: bytes) -> None:
    with pytest.raises(KernelRefused, match=r"copy cannot be loaded on stand-in of sm_90 .*9\.0.* 13\.0: .*arch"):
        CudaKernel(driver, driver.device(1), image, "copy", Needs())
    with pytest.raises(KernelRefused, match=r"missing cannot be loaded .*entry"):
        CudaKernel(driver, driver.device(0), image, "missing", Needs())
    with pytest.raises(KernelRefused, match="smem_limit"):
        CudaKernel(driver, driver.device(0), image, "copy", Needs(shared_memory_bytes=164 << 10))
    with pytest.raises(KernelRefused, match="image"):
        CudaKernel(driver, driver.device(0), bytes(4096), "copy", Needs())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_arguments": 1}, "takes 6 parameters, and its recipe passes 5; tune again"),
        (
            {"arguments": (*STORED.arguments[:2], Argument("tensor", "x"), Argument("size", "1"))},
            "parameter 2 .* has 4",
        ),
        ({"arguments": (replace(STORED.arguments[0], map=WEIGHT), *STORED.arguments[1:])}, "passes 10"),
    ],
)
def test_a_recipe_that_passes_something_else_is_refused(
    kernel: CudaKernel, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(KernelRefused, match=complaint):
        kernel.require(replace(STORED, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"block": (256, 1, 1)}, "required_block"),
        ({"block": (2048, 1, 1)}, "copy was not launched on stand-in of sm_80 by the CUDA driver 13.0: .*block"),
        ({"grid": (1, 65536, 1)}, "grid"),
        ({"shared_memory_bytes": 100 << 10}, "smem_not_raised"),
        ({"cluster": (3, 1, 1)}, "cluster_arch"),
        ({"grid": (1 << 32, 1, 1)}, "copy was not launched: its grid or block comes to 4294967296"),
        ({"arguments": (*LAUNCH.arguments[:2], ResolvedArgument(1 << 31), ResolvedArgument(1))}, "32 bits, which do"),
    ],
)
def test_what_is_not_launched_is_said_in_a_sentence(
    cuda: StandIn, kernel: CudaKernel, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(TilewrightError, match=complaint):
        kernel.launch(replace(LAUNCH, **changes), 0)  # type: ignore[arg-type]
    assert cuda.launches == []


def test_maps_are_encoded_once_for_what_stays_the_same(kernel: CudaKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernel's second parameter: the last map is kept."""
    encoded: list[int] = []
    call = Driver.call

    def counted(self: Driver, name: str, *arguments: object) -> None:
        if name == "cuTensorMapEncodeTiled":
            encoded.append(int(arguments[3]))  # type: ignore[call-overload]
        call(self, name, *arguments)

    monkeypatch.setattr(Driver, "call", counted)
    monkeypatch.setattr(kernel, "parameter_bytes", (8, 128, 4, 4, 8, 8, 8, 8))
    for address in (X, X, OUT, OUT, X):
        argument = ResolvedArgument(address, "x", map=mapped((64, 64)))
        kernel._parameters(replace(LAUNCH, arguments=(LAUNCH.arguments[0], argument)))
    assert encoded == [X, OUT, X]


@pytest.mark.parametrize(
    ("device", "version", "rows", "cleared"),
    [(1, 13000, 64, True), (1, 13000, 1024, False), (1, 13040, 64, False), (0, 13000, 64, False)],
    ids=["small", "large", "mended driver", "Hopper"],
)
def test_blackwell_s_fault_with_small_maps_is_worked_around(
    cuda: StandIn, device: int, version: int, rows: int, cleared: bool
) -> None:
    cuda.begin([90, 100], version)
    driver = Driver(str(cuda.path))
    with driver.current(driver.device(device)):
        made = encode(driver, driver.device(device), mapped((rows, 64)), X)
    assert made.words[0] == X
    assert (made.words[1] == 0) is cleared


def test_no_driver_or_an_old_one_is_said_in_a_sentence(
    cuda: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(TilewrightError, match=r"nowhere.so is no CUDA driver .*; install NVIDIA's driver"):
        Driver("/nowhere.so")
    monkeypatch.setenv(DRIVER_VARIABLE, str(tmp_path))
    with pytest.raises(TilewrightError, match=f"name its library with .{DRIVER_VARIABLE}"):
        Driver()
    cuda.begin([80], version=12030)
    with pytest.raises(TilewrightError, match=r"lacks .*cuFuncGetParamInfo.*at least CUDA 12.4 is needed"):
        Driver(str(cuda.path))
    cuda.begin([])
    with pytest.raises(DriverError, match="cuInit"):
        Driver(str(cuda.path))


def _use_in_child(driver: Driver, answers: multiprocessing.SimpleQueue[str]) -> None:
    try:
        driver.device_count  # noqa: B018 - what it says is not asked for
    except TilewrightError as error:
        answers.put(str(error))


def test_a_forked_child_has_no_driver(driver: Driver) -> None:
    answers: multiprocessing.SimpleQueue[str] = multiprocessing.SimpleQueue()
    child = multiprocessing.get_context("fork").Process(target=_use_in_child, args=(driver, answers))
    child.start()
    child.join()
    assert "forked after CUDA began" in answers.get()


def test_streams_that_are_recorded_are_known(cuda: StandIn, driver: Driver) -> None:
    with driver.current(driver.device(0)):
        assert not driver.is_capturing(0)
        cuda.capture(True)
        assert driver.is_capturing(0)


BAD_MAPS: dict[str, Callable[[], tuple[ResolvedMap, int]]] = {
    "map_address": lambda: (mapped((64, 64)), X + 8),
    "map_rank": lambda: (mapped((64, 64), replace(WEIGHT, data_type=99)), X),
    "map_dimension": lambda: (mapped((0, 64)), X),
    "map_stride": lambda: (mapped((64, 60)), X),
    "map_box": lambda: (mapped((64, 64), replace(WEIGHT, box=(512, 64))), X),
    "map_row": lambda: (mapped((64, 128), replace(WEIGHT, box=(64, 128))), X),
}


@pytest.mark.parametrize("rule", BAD_MAPS)
def test_maps_that_the_driver_would_not_make_are_refused(cuda: StandIn, driver: Driver, rule: str) -> None:
    wanted, address = BAD_MAPS[rule]()
    device = driver.device(0)
    with driver.current(device), pytest.raises(DriverError, match=rule):
        encode(driver, device, wanted, address)
    assert cuda.broken == rule


RECIPE = Recipe(
    (TensorSpec("x", "fp32", ("rows",)), TensorSpec("out", "fp32", ("rows",), role="output")), (STORED,), "rows"
)
LAUNCHER = CudaLauncher()
DRIVERS = {"triton 3.7.1, ptxas 12.8.93 for sm_90a": 12080, "triton 3.7.1, ptxas 13.1.80 for sm_100a": 13010}


def with_launch(**changes: object) -> Recipe:
    return replace(RECIPE, launches=(replace(STORED, **changes),))  # type: ignore[arg-type]


def cubins_of(image: bytes) -> dict[str, Cubin]:
    return {"": LAUNCHER.load(sha256_hex(image), lambda: image)}


def made(sm: int = 80) -> dict[str, Cubin]:
    return cubins_of(make_cubin("copy", [8, 8, 4, 8, 8, 8], sm=sm))


def test_a_stored_kernel_is_loaded_once_for_a_device(cuda: StandIn, driver: Driver) -> None:
    cubins = made()
    first, again, there = (load_kernels(RECIPE, cubins, driver, driver.device(index)) for index in (0, 0, 2))
    assert first[0] is again[0]
    assert first[0] is not there[0]
    for (kernel,) in (first, there):
        kernel.launch(LAUNCH, 0)
    assert [each.device for each in cuda.launches] == [0, 2]


def test_threads_that_ask_at_once_get_the_same_kernel(driver: Driver) -> None:
    cubins, device = made(), driver.device(0)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: load_kernels(RECIPE, cubins, driver, device)[0], range(32)))
    assert len(set(map(id, found))) == 1


def test_the_bytes_of_an_artifact_are_verified_and_read_once() -> None:
    image = make_cubin("copy", [8])
    with pytest.raises(DamagedArtifact):
        LAUNCHER.load(sha256_hex(image), lambda: image + b"\0")
    cubin = LAUNCHER.load(sha256_hex(image), lambda: image)
    assert cubin.image == image
    assert LAUNCHER.load(sha256_hex(image), lambda: pytest.fail("it is at hand")) is cubin
    with pytest.raises(KernelRefused, match="cannot be loaded: it is no binary for NVIDIA's GPUs; tune again"):
        LAUNCHER.load(sha256_hex(bytes(99)), lambda: bytes(99))
    with pytest.raises(KernelRefused, match="runs on a GPU, and this call is the CPU's"):
        cubin.entry_address("copy")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"grid": (), "block": ()}, "copy has no grid: it is one for CPUs; tune again"),
        ({"shared_memory_bytes": "rows * 4"}, r"is loaded for 'rows \* 4', which differs from call to call"),
        ({"arguments": (Argument("size", "threads"),)}, "asks for threads, a number of CPU threads"),
    ],
)
def test_what_only_cpus_can_do_is_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(KernelRefused, match=complaint):
        LAUNCHER.require(with_launch(**changes))


def test_weights_are_taken_in_rows() -> None:
    LAUNCHER.require(RECIPE)
    rows = RowLayout("int8")
    assert LAUNCHER.weight_layout(RECIPE) is None
    assert LAUNCHER.weight_layout(replace(RECIPE, weight_layout=rows)) is rows
    with pytest.raises(KernelRefused, match="in the layout panel8_fp32, which is one for CPUs; tune again"):
        LAUNCHER.weight_layout(replace(RECIPE, weight_layout=WeightLayout(8)))


@pytest.mark.parametrize(
    ("sm", "device", "recipe", "complaint"),
    [
        (90, 0, RECIPE, "was built for sm_90, and stand-in of sm_80 is sm_80; tune with --arch sm_80"),
        (80, 1, RECIPE, "was built for sm_80, and stand-in of sm_90 is sm_90; tune with --arch sm_90"),
        (
            80,
            0,
            with_launch(shared_memory_bytes="170000"),
            "a block of copy needs 170000 bytes of shared memory, and stand-in of sm_80 has 166912 for one",
        ),
        (80, 0, with_launch(cluster=("2",)), "copy is launched in clusters, which stand-in of sm_80 lacks"),
        (80, 0, with_launch(hidden_arguments=1), "takes 6 parameters, and its recipe passes 5; tune again"),
        (80, 0, with_launch(entry="other"), "other cannot be loaded on stand-in of sm_80"),
    ],
    ids=["newer", "older", "small", "no clusters", "parameters", "entry"],
)
def test_a_kernel_that_a_device_does_not_run_is_refused_before_it_is_launched(
    cuda: StandIn, driver: Driver, sm: int, device: int, recipe: Recipe, complaint: str
) -> None:
    with pytest.raises(KernelRefused, match=complaint) as caught:
        load_kernels(recipe, made(sm), driver, driver.device(device))
    assert "\n" not in str(caught.value)
    assert cuda.launches == []


@pytest.mark.parametrize("toolchain", DRIVERS)
def test_a_driver_older_than_the_assembler_is_refused(cuda: StandIn, toolchain: str) -> None:
    least = DRIVERS[toolchain] // 1000 * 1000
    cuda.begin([80], version=max(least, 12040))
    driver = Driver(str(cuda.path))
    assert load_kernels(RECIPE, made(), driver, driver.device(0), toolchain=toolchain)
    if least == 13000:
        cuda.begin([80], version=12090)
        old = Driver(str(cuda.path))
        with pytest.raises(KernelRefused, match=r"by ptxas 13.1, and the driver here is CUDA 12.9; update the driver"):
            load_kernels(RECIPE, made(), old, old.device(0), toolchain=toolchain)


@pytest.mark.parametrize(
    ("target", "runs_on"),
    [
        (Target(80, False), {80, 86, 89}),
        (Target(86, False), {86, 89}),
        (Target(90, True), {90}),
        (Target(100, True), {100}),
    ],
    ids=str,
)
def test_a_binary_runs_on_later_devices_of_its_major_number_unless_it_is_for_one(
    target: Target, runs_on: set[int]
) -> None:
    assert {sm for sm in (75, 80, 86, 89, 90, 100, 103, 120) if target.runs_on(sm)} == runs_on


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_what_the_compiler_s_binaries_are_for_is_read(arch: str, tmp_path: Path) -> None:
    with TritonBuilder(GPU_ARCHS[arch], tmp_path) as builder:
        build = builder.build(Source(SOURCE, (ENTRY,)))
    assert build.path is not None, build.message
    target = read_target(build.files[0].path.read_bytes())
    assert f"sm_{target.sm}" == arch
    assert target.is_exact == (arch == "sm_90")


def test_a_binary_for_one_device_alone_is_known_by_its_toolchain_too(driver: Driver) -> None:
    later = replace(driver.device(0), capability=(8, 6))
    assert load_kernels(RECIPE, made(), driver, later, toolchain="ptxas 12.8.93 for sm_80")
    with pytest.raises(KernelRefused, match="was built for sm_80a, and stand-in of sm_80 is sm_86"):
        load_kernels(RECIPE, made(), driver, later, toolchain="ptxas 12.8.93 for sm_80a")


def test_the_driver_of_a_process_is_opened_once(cuda: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DRIVER_VARIABLE, str(cuda.path))
    driver = find_driver()
    assert find_driver() is driver
    assert driver.device(0).memory_bytes > 0
    monkeypatch.setenv(DRIVER_VARIABLE, "/nowhere.so")
    with pytest.raises(TilewrightError, match="is no CUDA driver"):
        find_driver()


def test_every_rule_of_the_stand_in_names_where_it_stands() -> None:
    parts = (Path(__file__).parents[1] / "standin").glob("*.[ch]")
    assert {*RULES} == {rule for part in parts for rule in re.findall(r"RULE\((\w+)\)", part.read_text())}
    assert all(rule["source"] and rule["means"] for rule in RULES.values())
