"""Calls bound to a CUDA device, made by the extension and by its Python twin: the launches that a recipe asks for.

The driver is a stand-in (tests/standin), and tensors are posed ones (tests/posing.py): this shows what is launched, on
which stream, and what is refused; nothing of it ran on a GPU.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from call_layers import CallContract
from device_calls import ALL, ROWS_OF_X, STREAM, WORKSPACE, Bench, call_twice, launch, opened_bench, recipe_of, tensors
from other_arrays import OtherArray, SilentArray
from posing import let_calls_take_them, on_stream, pose, posing

from tilewright.codegen.recipe.model import Argument, Guard
from tilewright.errors import TilewrightError
from tilewright.runtime.calls import bind as calls
from tilewright.runtime.calls.bind import DeviceVariant
from tilewright.runtime.calls.extension import native_for_torch
from tilewright.runtime.notices import TilewrightWarning


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with opened_bench() as opened:
        yield opened


@pytest.fixture(autouse=True)
def posed_tensors(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.cuda.begin([90, 80, 90])
    let_calls_take_them(monkeypatch)


class DeviceCallTests(CallContract):
    def test_a_call_launches_on_the_stream_of_its_caller(self, bench: Bench) -> None:
        given = tensors()
        recipe = recipe_of(launch(*ALL, Argument("size", "rows"), hidden_arguments=2))
        call = bench.bind(bench.variant(recipe))
        with on_stream(STREAM):
            assert call(*given) is given[-1]
        call(*given)
        first, second = bench.cuda.launches
        assert (first.stream, second.stream) == (STREAM, None)
        assert list(first.grid) == [6, 1, 1]
        weight = call.binding.bound["weight"]
        passed = [*given[:4], weight, given[4]]
        words = [each.data_ptr() for each in passed] + [6, 0, 0]
        assert first.parameters == b"".join(word.to_bytes(8, "little") for word in words)

    def test_sizes_pick_the_variant(self, bench: Bench) -> None:
        small, large = recipe_of(launch()), recipe_of(launch(WORKSPACE), workspace_bytes="rows")
        served: list[int] = []
        call = bench.bind(
            bench.variant(small, max_size=4),
            bench.variant(large, max_size=8),
            fallback=lambda x, *_: served.append(len(x)),
        )
        for rows in (4, 5, 8):
            call(*tensors(rows))
        with pytest.warns(TilewrightWarning, match="there is no kernel for rows above 8"):
            call(*tensors(9))
        assert [each.name for each in bench.cuda.launches] == [b"take_0", b"take_1", b"take_1"]
        assert served == [9]

    def test_nothing_is_launched_for_an_empty_output(self, bench: Bench) -> None:
        call = bench.bind(bench.variant(recipe_of(launch(*ALL, grid=("rows + 1",)))))
        given = tensors(0)
        assert call(*given) is given[-1]
        assert bench.cuda.launches == []

    def test_an_empty_grid_is_left_out_and_its_maps_with_it(self, bench: Bench) -> None:
        mapped = replace(ALL[0], map=replace(ROWS_OF_X, shape=("tokens", "4")))
        call = bench.bind(bench.variant(recipe_of(launch(mapped, grid=("tokens",)), launch(*ALL))))
        call(*tensors(tokens=0))
        assert [each.name for each in bench.cuda.launches] == [b"take_6"]

    def test_a_map_follows_the_addresses_and_shapes_of_calls(self, bench: Bench) -> None:
        call = bench.bind(bench.variant(recipe_of(launch(replace(ALL[0], map=ROWS_OF_X)))))
        memory = torch.zeros(7, 4)
        first, other, longer = tensors(x=pose(memory[:6])), tensors(6), tensors(7, x=pose(memory))
        for each in (first, other, first, longer):
            call(*each)
        seen = [each.parameters for each in bench.cuda.launches]
        assert [int.from_bytes(each[:8], "little") for each in seen[:3]] == [
            each[0].data_ptr() for each in (first, other, first)
        ]
        assert [int.from_bytes(each[24:32], "little") for each in seen] == [6, 6, 6, 7]

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"x": torch.zeros(6, 4)}, "x is on device cpu; expected torch.float32 [rows, 4] on cuda:0"),
            ({"y": pose(torch.zeros(3, 8, dtype=torch.bfloat16), 1)}, "y is on device cuda:1; expected torch.bfloat16"),
            ({"y": pose(torch.zeros(3, 8))}, "y has dtype torch.float32; expected torch.bfloat16 [tokens, 8]"),
            ({"x": pose(torch.zeros(5, 4))}, "index has shape [6]; expected [rows] with rows = 5"),
            ({"x": None}, "x is a NoneType; expected torch.float32 [rows, 4]"),
            ({"x": [[1.0]]}, "x is a list; expected torch.float32 [rows, 4]"),
            ({"x": torch.zeros(6, 4).numpy()}, "x is on the device (1, 0) of DLPack; expected torch.float32"),
            ({"out": pose(torch.zeros(1, 2).expand(6, 2))}, "out has strides [0, 1], so that elements share memory"),
            ({"x": pose(torch.zeros(6, 4)).requires_grad_()}, "x requires grad, but there is no backward pass"),
        ],
        ids=lambda each: None if isinstance(each, str) else next(iter(each)),
    )
    def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_launched(
        self, bench: Bench, changes: dict[str, Any], said: str
    ) -> None:
        call = bench.bind(bench.variant(recipe_of(launch(*ALL))))
        with pytest.raises(TilewrightError) as caught:
            call(*tensors(**changes))
        assert str(caught.value).startswith(f"demo: {said}")
        assert "\n" not in str(caught.value)
        assert bench.cuda.launches == []

    def test_a_tensor_whose_memory_was_freed_is_named(self, bench: Bench) -> None:
        call = bench.bind(bench.variant(recipe_of(launch(*ALL))))
        freed = pose(torch.zeros(6, 4))
        freed.held.untyped_storage().resize_(0)
        with pytest.raises(TilewrightError, match="demo: x has no memory: its storage was freed"):
            call(*tensors(x=freed))
        assert bench.cuda.launches == []

    def test_an_output_over_an_input_or_a_weight_is_refused(self, bench: Bench) -> None:
        memory = torch.zeros(200)
        weight = pose(memory[100:115].view(torch.bfloat16)[:30].view(2, 3, 5))
        call = bench.bind(bench.variant(recipe_of(launch(*ALL))), bound={"weight": weight})
        x = pose(memory[:24].view(6, 4))
        for at, other in ((20, "x"), (114, "weight")):
            with pytest.raises(TilewrightError, match=f"out overlaps {other} in memory"):
                call(*tensors(x=x, out=pose(memory[at : at + 12].view(6, 2))))
        assert bench.cuda.launches == []
        call(*tensors(x=x, out=pose(memory[24:36].view(6, 2))))

    @pytest.mark.parametrize("name", ["x", "out"])
    def test_a_strided_tensor_goes_to_torch_with_one_warning(self, bench: Bench, name: str) -> None:
        served: list[int] = []
        call = bench.bind(bench.variant(recipe_of(launch(*ALL))), fallback=lambda *_: served.append(1))
        strided = pose(torch.zeros(6, 4 if name == "x" else 2, 2)[..., 0])
        with pytest.warns(TilewrightWarning, match=f"demo: {name} is not contiguous") as caught:
            call_twice(call, *tensors(**{name: strided}))
        assert (len(served), len(caught), bench.cuda.launches) == (2, 1, [])

    def test_a_failed_guard_goes_to_torch(self, bench: Bench) -> None:
        served: list[int] = []
        recipe = recipe_of(launch(*ALL), guards=(Guard("rows", 4), Guard("x", 16)))
        call = bench.bind(bench.variant(recipe), fallback=lambda *_: served.append(1))
        call(*tensors(8))
        with pytest.warns(TilewrightWarning, match="the kernel needs rows to be a multiple of 4"):
            call(*tensors(6))
        assert (len(bench.cuda.launches), len(served)) == (1, 1)

    def test_values_are_looked_at_where_that_is_asked_for(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        variant = bench.variant(recipe_of(launch(*ALL)))
        wrong = pose(torch.tensor([0, 1, 2, 3, 0, 0], dtype=torch.int32))
        bench.bind(variant)(*tensors(index=wrong))
        call = bench.bind(variant, checks_values=True)
        with posing(monkeypatch):
            with pytest.raises(TilewrightError, match=r"demo: index\[3\] is 3; expected an index from 0 to 2"):
                call(*tensors(index=wrong))
            assert len(bench.cuda.launches) == 1
            call(*tensors())
        bench.cuda.capture(True)
        with pytest.raises(TilewrightError, match="demo: values cannot be checked while a CUDA graph is recorded"):
            call(*tensors())
        assert len(bench.cuda.launches) == 2

    def test_a_workspace_belongs_to_its_stream_and_grows(self, bench: Bench) -> None:
        given: list[torch.Tensor] = []

        def allocate(nbytes: int) -> torch.Tensor:
            given.append(pose(torch.empty(nbytes, dtype=torch.uint8)))
            return given[-1]

        recipe = recipe_of(launch(WORKSPACE), workspace_bytes="rows * 262144")
        call = bench.bind(bench.variant(recipe), workspace=allocate)
        for stream, rows in ((1, 4), (1, 3), (2, 4), (1, 5), (1, 9), (2, 4)):
            with on_stream(stream):
                call(*tensors(rows))
        used = [int.from_bytes(each.parameters, "little") for each in bench.cuda.launches]
        mine = [each.data_ptr() for each in given]
        assert used == [mine[0], mine[0], mine[1], mine[2], mine[3], mine[1]]
        assert [each.numel() >> 18 for each in given] == [4, 4, 8, 16]
        assert call.workspace_bytes({"rows": 9, "tokens": 1}) == 9 << 18
        with pytest.raises(TilewrightError, match="needs the size 'rows'"):
            call.workspace_bytes({"tokens": 1})

    def test_a_workspace_is_zeroed_on_the_stream(self, bench: Bench) -> None:
        memory, stream = bench.memory(1 << 20), bench.stream()
        recipe = recipe_of(launch(WORKSPACE), workspace_bytes="rows * 8", workspace_zeroed=True)
        call = bench.bind(bench.variant(recipe), workspace=lambda nbytes: pose(memory[:nbytes]))
        for _ in range(2):
            memory.fill_(0xFF)
            with on_stream(stream):
                call(*tensors(6))
            assert memory[:48].eq(0).all()
            assert memory[48:].eq(0xFF).all()

    def test_memory_comes_from_torch_where_nothing_else_is_said(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        call = bench.bind(bench.variant(recipe_of(launch(WORKSPACE), workspace_bytes="rows")), workspace=None)
        with posing(monkeypatch), on_stream(0xA110C):
            call(*tensors())
            call(*tensors())
        first, second = bench.cuda.launches
        assert first.parameters == second.parameters != bytes(8)

    @pytest.mark.parametrize("given", [None, pose(torch.zeros(8, dtype=torch.uint8))], ids=["nothing", "too little"])
    def test_where_no_memory_is_given_torch_serves(self, bench: Bench, given: Any) -> None:
        served: list[int] = []
        recipe = recipe_of(launch(WORKSPACE), workspace_bytes="rows * 4096")
        call = bench.bind(bench.variant(recipe), workspace=lambda _: given, fallback=lambda *_: served.append(1))
        with pytest.warns(TilewrightWarning, match="needs 24576 bytes of workspace, and was given"):
            call(*tensors())
        assert (len(served), bench.cuda.launches) == (1, [])

    def test_a_graph_is_recorded_after_one_call_and_refused_before(self, bench: Bench) -> None:
        call = bench.bind(bench.variant(recipe_of(launch(WORKSPACE), workspace_bytes="rows * 4096")))
        bench.cuda.capture(True)
        with pytest.raises(TilewrightError, match="while a CUDA graph is recorded; make a call of this size on this"):
            call(*tensors())
        assert bench.cuda.launches == []
        bench.cuda.capture(False)
        call(*tensors())
        bench.cuda.capture(True)
        call(*tensors())
        with pytest.raises(TilewrightError, match="demo: its workspace of 4096000 bytes would have to be made"):
            call(*tensors(1000))
        assert len(bench.cuda.launches) == 2

    def test_two_threads_on_two_streams_have_their_own_memory(self, bench: Bench) -> None:
        call = bench.bind(bench.variant(recipe_of(launch(WORKSPACE, ALL[0]), workspace_bytes="rows * 4096")))
        given = {stream: tensors(6) for stream in (0x100, 0x200)}
        failures: list[BaseException] = []

        def work(stream: int) -> None:
            try:
                with on_stream(stream):
                    for _ in range(50):
                        call(*given[stream])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(stream,)) for stream in given]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        seen = {(each.stream, each.parameters) for each in bench.cuda.launches}
        assert len(bench.cuda.launches) == 100
        assert {stream for stream, _ in seen} == set(given)
        assert len(seen) == 2
        assert len({parameters[:8] for _, parameters in seen}) == 2
        assert all(
            int.from_bytes(parameters[8:], "little") == given[stream][0].data_ptr() for stream, parameters in seen
        )

    def test_every_device_has_calls_of_its_own_and_the_caller_keeps_the_context(self, bench: Bench) -> None:
        call = bench.bind(bench.variant(recipe_of(launch(*ALL)), device=2), index=2)
        current = ctypes.c_void_p()
        with bench.driver.current(bench.driver.device(0)):
            call(*tensors(device=2))
            bench.driver.call("cuCtxGetCurrent", ctypes.byref(current))
        assert current.value == bench.driver.device(0).context
        assert [each.device for each in bench.cuda.launches] == [2]

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"grid": ("1", "65536")}, r"take_1 was not launched on stand-in of sm_90 by the CUDA driver 13.0: .*grid"),
            ({"block": ("2048",)}, "block"),
            ({"cluster": ("4",)}, "cluster_grid"),
        ],
    )
    def test_what_the_driver_refuses_is_said_in_a_sentence(
        self, bench: Bench, changes: dict[str, Any], complaint: str
    ) -> None:
        call = bench.bind(bench.variant(recipe_of(launch(ALL[0], **changes))))
        with pytest.raises(TilewrightError, match=complaint) as caught:
            call(*tensors(6))
        assert str(caught.value).startswith("demo: take_1 was not launched")
        assert "\n" not in str(caught.value)
        assert bench.cuda.launches == []

    def test_a_number_that_its_parameter_does_not_hold_stops_all_launches(self, bench: Bench) -> None:
        recipe = recipe_of(launch(ALL[0]), launch(ALL[0], Argument("size", "rows * 1073741824")))
        call = bench.bind(bench.variant(recipe, number_bytes=4))
        with pytest.raises(TilewrightError, match="its parameter 1 has 32 bits, which do not hold 6442450944"):
            call(*tensors(6))
        assert bench.cuda.launches == []

    def test_arrays_of_another_library_are_taken_on_its_stream_and_returned(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(OtherArray, "stream", 0xFACE)
        call = bench.bind(bench.variant(recipe_of(launch(ALL[0], ALL[5]))))
        posed = tensors()
        given = [None if each is None else OtherArray(each) for each in posed]
        for _ in range(2):  # the extension knows them from the second call on
            assert call(*given) is given[-1]
        expected = b"".join(posed[at].data_ptr().to_bytes(8, "little") for at in (0, 4))
        assert [(each.stream, each.parameters) for each in bench.cuda.launches] == [(0xFACE, expected)] * 2

    def test_tensors_of_two_libraries_have_to_be_on_one_stream(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(OtherArray, "stream", 0xFACE)
        call = bench.bind(bench.variant(recipe_of(launch(*ALL))))
        given = tensors()
        given[0] = OtherArray(given[0])
        with on_stream(0xFACE):
            call(*given)
        with on_stream(STREAM), pytest.raises(TilewrightError, match=r"demo: its tensors are .* on different streams"):
            call(*given)
        assert [each.stream for each in bench.cuda.launches] == [0xFACE]

    def test_cupy_is_asked_for_its_stream_and_memory(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the two calls that its documentation names; cupy itself does not start without a device."""
        kind = type("ndarray", (SilentArray,), {"__module__": "cupy"})
        stream = SimpleNamespace(ptr=0xC0)
        cupy = SimpleNamespace(
            cuda=SimpleNamespace(Device=lambda _: nullcontext(), get_current_stream=lambda: stream),
            empty=lambda nbytes, dtype: kind(pose(torch.empty(nbytes, dtype=getattr(torch, dtype)))),
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        recipe = recipe_of(launch(ALL[0], WORKSPACE), workspace_bytes="rows * 4194304")
        call = bench.bind(bench.variant(recipe), workspace=None)
        posed = tensors()
        given = [None if each is None else kind(each) for each in posed]
        assert call(*given) is given[-1]
        (seen,) = bench.cuda.launches
        assert seen.stream == 0xC0
        assert int.from_bytes(seen.parameters[:8], "little") == posed[0].data_ptr()
        assert int.from_bytes(seen.parameters[8:], "little") > 0

    def test_an_array_whose_stream_is_not_known_is_refused(self, bench: Bench) -> None:
        call = bench.bind(bench.variant(recipe_of(launch(*ALL))))
        given = tensors()
        given[0] = SilentArray(given[0])
        with pytest.raises(TilewrightError, match="SilentArray does not tell the stream that it is worked on"):
            call(*given)
        assert bench.cuda.launches == []

    def test_a_forked_child_is_told_so(self, bench: Bench) -> None:
        call, given = bench.bind(bench.variant(recipe_of(launch(*ALL)))), tensors()
        call(*given)
        answers: multiprocessing.SimpleQueue[str] = multiprocessing.SimpleQueue()

        def use_in_child() -> None:
            try:
                call(*given)
            except TilewrightError as error:
                answers.put(str(error))
            else:
                answers.put("launched")

        child = multiprocessing.get_context("fork").Process(target=use_in_child)
        child.start()
        child.join()
        assert "forked after CUDA began cannot use it; start it with the method spawn" in answers.get()

    def test_where_nothing_can_be_launched_tensors_are_checked_and_torch_serves(self, bench: Bench) -> None:
        served: list[int] = []
        call = bench.bind(
            DeviceVariant(None),
            driver=None,
            device=None,
            fallback=lambda *_: served.append(1),
            torch_device=torch.device("cuda", 0),
        )
        given = tensors()
        assert call(*given) is given[-1]
        with pytest.raises(TilewrightError, match="x is on device cuda:1; expected"):
            call(*tensors(x=pose(torch.zeros(6, 4), 1)))
        assert served == [1]
        assert call.workspace_bytes({"rows": 6, "tokens": 3}) == 0

    def test_parts_that_do_not_fit_together_are_refused(self, bench: Bench) -> None:
        recipe = recipe_of(launch(*ALL))
        variant = bench.variant(recipe)
        for changes, said in (
            ({"bound": {"weight": torch.zeros(2, 3, 5, dtype=torch.bfloat16)}}, "weight is torch.bfloat16 on cpu"),
            ({"device": None, "driver": None, "bound": {"weight": 4096}}, "nothing says which device it is bound for"),
            ({"size_name": "lines"}, "no tensor of a call tells the size 'lines'"),
        ):
            with pytest.raises(TilewrightError, match=said):
                bench.bind(variant, **changes)
        with pytest.raises(TilewrightError, match="demo: a kernel has 1 launches, and 0 entries are loaded"):
            bench.bind(replace(variant, kernels=()))
        with pytest.raises(TilewrightError, match="takes 6 parameters, and its recipe passes 8"):
            bench.bind(replace(variant, recipe=recipe_of(launch(*ALL, WORKSPACE, Argument("size", "1")))))


class TestNative(DeviceCallTests):
    @pytest.fixture(autouse=True)
    def implementation(self) -> None:
        if native_for_torch() is None:
            pytest.skip("the extension was not built")


class TestPure(DeviceCallTests):
    @pytest.fixture(autouse=True)
    def implementation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calls, "_NATIVE", None)
