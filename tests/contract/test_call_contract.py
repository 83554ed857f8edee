"""What every implementation of the call layer does: one suite, inherited by the extension and by its Python twin."""

import gc
import os
import threading
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from call_kernels import COLUMNS, GROUPS, TENSORS, Fallback, expected, make_inputs, needs_compiler, variant
from call_layers import CallContract, Native, Pure, own_settings
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.recipe.expressions import IntExpr
from tilewright.codegen.recipe.model import ABI_VERSION, Guard
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.bind import CallVariant, bind_call, pack_weight
from tilewright.runtime.calls.pure import PureCall
from tilewright.runtime.notices import TilewrightWarning, forget_warnings

SCALE = torch.tensor([2.0, -1.0, 0.5])


def bind(*variants: CallVariant, fallback=None, threads=2, scale=SCALE):
    fallback = fallback or Fallback(scale)
    return bind_call(
        TENSORS, {"scale": scale}, variants, size_name="rows", threads=threads, fallback=fallback, name="demo"
    )


# Only small factors, so that 64 bits hold every result.
expressions = st.recursive(
    st.sampled_from(["rows", "tokens", "threads"]) | st.integers(0, 1000).map(str),
    lambda parts: (
        st.builds("({} {} {})".format, parts, st.sampled_from(["+", "-", "//"]), parts)
        | st.builds("({0} * {1})".format, st.integers(0, 9).map(str), parts)
        | st.builds("{}({}, {})".format, st.sampled_from(["min", "max", "ceildiv"]), parts, parts)
    ),
    max_leaves=8,
)


def refused(call, *arguments) -> str:
    with pytest.raises(TilewrightError) as caught:
        call(*arguments)
    return str(caught.value)


def call_twice(call, *arguments):
    call(*arguments)
    return call(*arguments)


class ComputesByItself(torch.Tensor):
    """As quantised weights and distributed tensors are: what operators do, it says by itself."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("no operator may be called with it")


@needs_compiler
class CallTests(CallContract):
    @own_settings
    @given(tokens=st.integers(1, 20), rows=st.integers(0, 50), slot=st.booleans(), seed=st.integers(0, 999))
    def test_kernels_compute_into_the_output(self, tokens, rows, slot, seed):
        inputs = make_inputs(tokens, rows, seed, slot=slot)
        fallback = Fallback(SCALE)
        out = bind(variant(), fallback=fallback)(*inputs.arguments())
        assert out is inputs.out
        assert fallback.calls == 0
        torch.testing.assert_close(out, expected(inputs.x, SCALE, *inputs.arguments()[1:5]))

    def test_sizes_pick_the_first_variant_that_serves_them(self):
        fallback = Fallback(SCALE)
        call = bind(CallVariant(None), variant("report", 8), variant("compute", 4), fallback=fallback)
        served = {}
        for rows in (4, 5, 8, 9):
            inputs = make_inputs(rows=rows)
            out = call(*inputs.arguments())
            right = torch.allclose(out, expected(inputs.x, SCALE, *inputs.arguments()[1:5]))
            served[rows] = "torch" if fallback.calls else "compute" if right else "report"
        assert served == {4: "compute", 5: "report", 8: "report", 9: "torch"}

    def test_a_size_beyond_all_variants_goes_to_torch_with_one_warning(self):
        fallback = Fallback(SCALE)
        call, inputs = bind(variant(max_size=8), fallback=fallback), make_inputs(rows=9)
        with pytest.warns(TilewrightWarning, match="demo: there is no kernel for rows above 8") as caught:
            call_twice(call, *inputs.arguments())
        assert (fallback.calls, len(caught)) == (2, 1)
        torch.testing.assert_close(inputs.out, expected(inputs.x, SCALE, *inputs.arguments()[1:5]))

    @pytest.mark.parametrize("name", ["x", "out", "index"])
    def test_a_strided_tensor_goes_to_torch_with_one_warning(self, name):
        inputs, fallback = make_inputs(), Fallback(SCALE)
        tensor = getattr(inputs, name)
        strided = torch.stack((tensor, tensor), dim=-1)[..., 0]
        with pytest.warns(TilewrightWarning, match=f"demo: {name} is not contiguous") as caught:
            out = call_twice(bind(variant(), fallback=fallback), *inputs.arguments(**{name: strided}))
        assert (fallback.calls, len(caught)) == (2, 1)
        torch.testing.assert_close(out, expected(inputs.x, SCALE, *inputs.arguments()[1:5]))

    def test_a_misaligned_tensor_goes_to_torch(self):
        inputs, fallback = make_inputs(rows=9), Fallback(SCALE)
        memory = np.zeros(9 * 4 + 1, np.uint8)
        gain = torch.from_numpy(memory[1:].view(np.float32))
        gain.copy_(inputs.gain)
        with pytest.warns(TilewrightWarning, match="gain is not aligned"):
            out = bind(variant(), fallback=fallback)(*inputs.arguments(gain=gain))
        assert fallback.calls == 1
        torch.testing.assert_close(out, expected(inputs.x, SCALE, *inputs.arguments()[1:5]))

    def test_strides_of_dimensions_of_one_do_not_matter(self):
        inputs, fallback = make_inputs(tokens=1), Fallback(SCALE)
        x = torch.as_strided(inputs.x, (1, COLUMNS), (99, 1))
        bind(variant(), fallback=fallback)(*inputs.arguments(x=x))
        assert fallback.calls == 0

    def test_a_failed_guard_goes_to_torch(self):
        fallback = Fallback(SCALE)
        call = bind(variant(guards=(Guard("rows * 2 + threads", 8),)), fallback=fallback)
        call(*make_inputs(rows=3).arguments())
        assert fallback.calls == 0
        inputs = make_inputs(rows=4)
        with pytest.warns(TilewrightWarning, match="the kernel needs rows \\* 2 \\+ threads to be a multiple of 8"):
            out = call(*inputs.arguments())
        assert fallback.calls == 1
        torch.testing.assert_close(out, expected(inputs.x, SCALE, *inputs.arguments()[1:5]))

    @pytest.mark.parametrize(
        ("guards", "serves"),
        [
            ((Guard("x", 4), Guard("scale", 4), Guard("workspace", 64), Guard("x * 0 + workspace", 64)), "kernel"),
            ((Guard("slot", 1 << 62),), "kernel"),  # an absent tensor has the address 0
            ((Guard("x * 2 + 1", 2),), "torch"),
            ((Guard("scale * 2 + 1", 2),), "torch"),
            ((Guard("out - out + x - x + 1", 2),), "torch"),
            ((Guard("workspace + 4", 8),), "torch"),
            ((Guard("x", 4), Guard("workspace * 0 + rows", 2)), "torch"),
        ],
    )
    def test_guards_may_read_addresses(self, guards, serves):
        fallback, inputs = Fallback(SCALE), make_inputs(rows=9, slot=False)
        call = bind(variant("report", guards=guards, workspace_bytes="rows * 4"), fallback=fallback)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            out = call(*inputs.arguments())
        assert ("torch" if fallback.calls else "kernel") == serves
        assert (out[0].tolist() == [ABI_VERSION, 2, 1, 36]) == (serves == "kernel")

    def test_guards_are_judged_before_a_workspace_is_asked_for(self):
        fallback = Fallback(SCALE)
        call = bind(variant(guards=(Guard("rows", 8),), workspace_bytes="1 // (rows - 9)"), fallback=fallback)
        with pytest.warns(TilewrightWarning, match="the kernel needs rows to be a multiple of 8"):
            call(*make_inputs(rows=9).arguments())
        assert fallback.calls == 1

    @pytest.mark.filterwarnings("ignore:.*(prototype|deprecated):UserWarning", "ignore::DeprecationWarning")
    @pytest.mark.parametrize(
        ("name", "change", "said"),
        [
            ("x", lambda t: t.double(), "x has dtype torch.float64; expected torch.float32 [tokens, 4]"),
            ("index", lambda t: t.long(), "index has dtype torch.int64; expected torch.int32 [rows]"),
            ("x", lambda t: t[:, :3], "x has shape [5, 3]; expected [tokens, 4] with tokens = 5"),
            ("x", lambda t: t[0], "x has shape [4]; expected [tokens, 4]"),
            ("gain", lambda t: t[:-1], "gain has shape [8]; expected [rows] with rows = 9"),
            ("out", lambda t: t[:-1], "out has shape [8, 4]; expected [rows, 4] with rows = 9"),
            ("x", lambda t: t.to("meta"), "x is on device meta; expected torch.float32 [tokens, 4] on the CPU"),
            ("x", lambda t: t.to_sparse(), "x has layout torch.sparse_coo; expected torch.float32 [tokens, 4]"),
            ("x", lambda t: t.to_mkldnn(), "x has layout torch._mkldnn"),
            ("x", lambda t: torch.nested.as_nested_tensor(list(t)), "x is nested"),
            ("x", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8), "x is quantised"),
            ("x", lambda t: t.as_subclass(ComputesByItself), "x is a ComputesByItself, whose values are not what"),
            ("x", lambda t: torch._efficientzerotensor(t.shape), "x has no memory"),
            ("x", lambda t: t.to(torch.complex64).conj(), "x has dtype torch.complex64"),
            ("x", lambda t: t.half(), "x has dtype torch.float16"),
            ("out", torch._neg_view, "out has the negative bit set"),
            ("out", lambda t: t[:1].expand(9, 4), "out has strides [0, 1], so that elements share memory"),
            ("out", lambda t: t.view(-1).as_strided((9, 4), (3, 1)), "out has strides [3, 1], so that elements share"),
            ("x", lambda t: t.tolist(), "x is a list; expected torch.float32 [tokens, 4]"),
            ("x", lambda _: None, "x is a NoneType; expected torch.float32 [tokens, 4]"),
            ("out", lambda _: None, "out is a NoneType; expected torch.float32 [rows, 4]"),
            ("x", lambda t: t.requires_grad_(), "x requires grad, but there is no backward pass"),
        ],
    )
    def test_a_tensor_that_does_not_fit_is_named(self, name, change, said):
        inputs = make_inputs()
        message = refused(bind(variant()), *inputs.arguments(**{name: change(getattr(inputs, name))}))
        assert message.startswith(f"demo: {said}")
        assert inputs.out.isnan().all()

    @pytest.mark.parametrize("name", ["x", "index", "offsets", "slot", "gain"])
    def test_a_tensor_with_the_negative_bit_is_read_as_what_it_says(self, name):
        inputs = make_inputs()
        negative = torch._neg_view(-getattr(inputs, name))
        assert negative.is_neg()
        assert negative.is_contiguous()
        out = bind(variant())(*inputs.arguments(**{name: negative}))
        torch.testing.assert_close(out, expected(inputs.x, SCALE, *inputs.arguments()[1:5]))

    def test_the_imaginary_part_of_a_conjugate_is_read_as_what_it_says(self):
        inputs = make_inputs()
        conjugate = torch.complex(torch.zeros(5, COLUMNS), -inputs.x).conj()
        assert conjugate.imag.is_neg()
        with pytest.warns(TilewrightWarning) if not conjugate.imag.resolve_neg().is_contiguous() else nullcontext():
            out = bind(variant())(*inputs.arguments(x=conjugate.imag))
        torch.testing.assert_close(out, expected(inputs.x, SCALE, *inputs.arguments()[1:5]))

    def test_a_bound_tensor_with_the_negative_bit_is_refused(self):
        with pytest.raises(TilewrightError, match="scale has the negative bit set; expected a plain tensor"):
            bind(variant(), scale=torch._neg_view(SCALE))

    def test_an_expanded_input_is_read_as_what_it_says(self):
        inputs = make_inputs()
        with pytest.warns(TilewrightWarning, match="x is not contiguous"):
            out = bind(variant())(*inputs.arguments(x=inputs.x[:1].expand(5, COLUMNS)))
        same = inputs.x[:1].repeat(5, 1)
        torch.testing.assert_close(out, expected(same, SCALE, *inputs.arguments()[1:5]))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_tensor_that_torch_func_wraps_is_refused(self):
        inputs, call = make_inputs(), bind(variant())

        def served(x):
            message = refused(call, *inputs.arguments(x=x))
            assert message.startswith("demo: x is seen through torch.func")
            return x.sum()

        torch.func.vmap(served)(torch.zeros(2, 5, COLUMNS))
        torch.func.jvp(served, (inputs.x,), (inputs.x,))

    def test_gradients_are_no_matter_where_none_are_recorded(self):
        inputs = make_inputs()
        parameter = torch.nn.Parameter(inputs.x)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                bind(variant())(*inputs.arguments(x=parameter, out=inputs.out.fill_(float("nan"))))
            torch.testing.assert_close(inputs.out, expected(inputs.x, SCALE, *inputs.arguments()[1:5]))

    def test_gradients_of_later_tensors_are_seen_past_an_absent_one(self):
        inputs = make_inputs(slot=False)
        assert "gain requires grad" in refused(bind(variant()), *inputs.arguments(gain=inputs.gain.requires_grad_()))

    @pytest.mark.parametrize(
        ("name", "where", "value", "said"),
        [
            ("index", 3, 5, "index[3] is 5; expected an index from 0 to 4 (tokens = 5)"),
            ("index", 8, -1, "index[8] is -1; expected an index from 0 to 4 (tokens = 5)"),
            ("slot", (2, 1), 9, "slot[2, 1] is 9; expected an index from 0 to 8 (rows = 9), or -1"),
            ("slot", (0, 0), -2, "slot[0, 0] is -2; expected an index from 0 to 8 (rows = 9), or -1"),
            ("slot", (4, 1), -(2**31), "slot[4, 1] is -2147483648"),
            ("offsets", 0, 1, "offsets[0] is 1; expected offsets that start at 0"),
            ("offsets", 1, -3, "offsets[1] is -3; expected offsets"),
            ("offsets", GROUPS, 8, "offsets[3] is 8; expected offsets that start at 0, never decrease, and end at"),
            ("offsets", GROUPS, 10, "offsets[3] is 10"),
            ("gain", 8, float("nan"), "gain[8] is nan; expected a finite number"),
            ("gain", 0, float("inf"), "gain[0] is inf; expected a finite number"),
            ("gain", 5, float("-inf"), "gain[5] is -inf; expected a finite number"),
        ],
    )
    def test_a_value_that_would_lead_a_kernel_astray_is_named(self, name, where, value, said):
        inputs = make_inputs()
        inputs.offsets[1:3] = torch.tensor([4, 8])
        getattr(inputs, name)[where] = value
        message = refused(bind(variant()), *inputs.arguments())
        assert message.startswith(f"demo: {said}")
        assert inputs.out.isnan().all()

    def test_a_wrong_value_is_found_wherever_it_stands(self):
        call = bind(variant())
        for position in range(40):
            inputs = make_inputs(rows=40)
            inputs.index[position] = 5
            assert f"index[{position}] is 5" in refused(call, *inputs.arguments())

    def test_an_output_over_an_input_is_refused(self):
        inputs = make_inputs(tokens=9, rows=9)
        call = bind(variant())
        assert refused(call, *inputs.arguments(out=inputs.x)).startswith("demo: out overlaps x in memory")
        memory = torch.zeros(60)
        x, touching = memory[:20].view(5, 4), memory[16:52].view(9, 4)
        assert "out overlaps x" in refused(call, *make_inputs().arguments(x=x, out=touching))
        beside = memory[20:56].view(9, 4)
        assert call(*make_inputs().arguments(x=x, out=beside)) is beside

    def test_an_output_over_a_bound_weight_is_refused(self):
        memory = torch.ones(GROUPS + 36)
        out = memory[:36].view(9, COLUMNS)
        assert "out overlaps scale" in refused(bind(variant(), scale=memory[34:37]), *make_inputs().arguments(out=out))
        bind(variant(), scale=memory[36:])(*make_inputs().arguments(out=out))

    def test_interleaved_columns_of_one_buffer_do_not_overlap(self):
        both = torch.randn(9, 2 * COLUMNS)
        inputs = make_inputs(tokens=9, rows=9)
        with pytest.warns(TilewrightWarning, match="not contiguous"):
            out = bind(variant())(*inputs.arguments(x=both[:, :COLUMNS], out=both[:, COLUMNS:]))
        torch.testing.assert_close(out, expected(both[:, :COLUMNS], SCALE, *inputs.arguments()[1:5]))

    def test_the_number_of_tensors_is_checked(self):
        call, arguments = bind(variant()), make_inputs().arguments()
        names = "x, index, offsets, slot, gain, out"
        assert refused(call, *arguments[:-1]) == f"demo: got 5 tensors; expected 6: {names}"
        assert refused(call, *arguments, arguments[0]) == f"demo: got 7 tensors; expected 6: {names}"
        with pytest.raises(TypeError, match="keyword"):
            call(*arguments[:-1], out=arguments[-1])

    def test_numpy_arrays_are_taken_and_returned(self):
        inputs = make_inputs()
        out = inputs.out.numpy()
        assert bind(variant())(*inputs.arguments(x=inputs.x.numpy(), out=out)) is out
        np.testing.assert_allclose(out, expected(inputs.x, SCALE, *inputs.arguments()[1:5]).numpy(), rtol=1e-6)

    def test_nothing_runs_for_an_empty_output(self):
        inputs, fallback = make_inputs(rows=0), Fallback(SCALE)
        inputs.slot.fill_(-1)
        assert bind(variant("fail"), fallback=fallback)(*inputs.arguments()) is inputs.out
        assert fallback.calls == 0

    def test_an_error_of_the_kernel_is_raised(self):
        assert "the kernel reported error 7" in refused(bind(variant("fail")), *make_inputs().arguments())

    def test_kernels_are_told_about_their_host(self):
        out = bind(variant("report"), threads=3)(*make_inputs().arguments())
        assert out[0].tolist() == [ABI_VERSION, 3, 1, 36]

    def test_threads_are_torchs_by_default(self):
        assert bind(variant(), threads=None).binding.threads == torch.get_num_threads()

    def test_workspace_is_aligned_and_zeroed_where_asked(self):
        small = variant("use_workspace", 9, workspace_bytes="rows * 4", workspace_zeroed=True)
        large = variant("use_workspace", workspace_bytes="max(rows * 4, 100000)", workspace_zeroed=True)
        call = bind(small, large)
        for rows in (9, 3, 1000, 9, 2000):
            assert call(*make_inputs(rows=rows).arguments())[0].tolist() == [0, 0, 0, 0]

    def test_workspace_is_left_alone_where_not(self):
        call = bind(variant("use_workspace", workspace_bytes="rows * 4"))
        call(*make_inputs(rows=50).arguments())
        assert call(*make_inputs(rows=40).arguments())[0].tolist() == [0, 160, 0, 0]

    @pytest.mark.parametrize(
        ("workspace_bytes", "said"),
        [
            ("rows * 1000000 * 1000000 * 1000", "bytes of workspace, which is too much for this machine"),
            ("rows * 1000000 * 1000000 * 10000000", "which 64 bits do not hold"),
            ("rows // (rows - 9)", "divides by zero"),
            ("rows - 10", "comes to -1 bytes of workspace"),
        ],
    )
    def test_a_recipe_that_comes_to_nothing_goes_to_torch_with_one_warning(self, workspace_bytes, said):
        inputs, fallback = make_inputs(rows=9), Fallback(SCALE)
        call = bind(variant("fail", workspace_bytes=workspace_bytes), fallback=fallback)
        with pytest.warns(TilewrightWarning, match=said) as caught:
            call_twice(call, *inputs.arguments())
        assert len(caught) == 1
        assert fallback.calls == 2
        torch.testing.assert_close(inputs.out, expected(inputs.x, SCALE, *inputs.arguments()[1:5]))

    def test_a_recipe_that_comes_to_nothing_for_one_size_serves_others(self):
        call = bind(variant(workspace_bytes="rows // (rows - 9)"))
        with pytest.warns(TilewrightWarning, match="divides by zero"):
            call(*make_inputs(rows=9).arguments())
        inputs = make_inputs(rows=10)
        torch.testing.assert_close(call(*inputs.arguments()), expected(inputs.x, SCALE, *inputs.arguments()[1:5]))

    @own_settings
    @given(text=expressions, rows=st.integers(1, 1000), tokens=st.integers(1, 1000))
    def test_expressions_are_evaluated_as_declared(self, text, rows, tokens):
        inputs = make_inputs(tokens, rows)
        call = bind(variant("report_size", last_size=text), threads=3)
        try:
            value = IntExpr(text).evaluate({"rows": rows, "tokens": tokens, "threads": 3})
        except TilewrightError:
            forget_warnings()
            with pytest.warns(TilewrightWarning, match="divides by zero"):
                call(*inputs.arguments())
        else:
            assert call(*inputs.arguments()).view(torch.int64)[0, 0].item() == value

    def test_launches_run_in_order(self):
        first, second = variant("report"), variant("compute")
        both = replace(first.recipe, launches=first.recipe.launches + second.recipe.launches)
        inputs = make_inputs()
        bind(CallVariant(None, both, first.entries + second.entries))(*inputs.arguments())
        torch.testing.assert_close(inputs.out, expected(inputs.x, SCALE, *inputs.arguments()[1:5]))

    def test_errors_of_the_fallback_pass_through(self):
        def broken(*_):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            bind(CallVariant(None), fallback=broken)(*make_inputs().arguments())

    def test_many_threads_call_at_once(self):
        call = bind(
            variant("compute", workspace_bytes="rows * 64", workspace_zeroed=True),
            fallback=Fallback(SCALE),
        )
        wrong = []

        def work(seed):
            for i in range(50):
                inputs = make_inputs(tokens=7, rows=10 + 40 * (i % 3), seed=seed + i)
                if not torch.allclose(call(*inputs.arguments()), expected(inputs.x, SCALE, *inputs.arguments()[1:5])):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_a_forked_child_completes(self):
        call, inputs = bind(variant(), threads=2), make_inputs(tokens=50, rows=2000)
        right = expected(inputs.x, SCALE, *inputs.arguments()[1:5])
        call(*inputs.arguments())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking with threads
            child = os.fork()
        if child == 0:
            out = call(*inputs.arguments(out=torch.zeros_like(inputs.out)))
            alone = bind(variant("report"))(*make_inputs().arguments())[0, 2].item() == 0
            packed = pack_weight(torch.ones(2, 8, 16), WeightLayout(4))
            os._exit(0 if alone and np.allclose(out.numpy(), right.numpy()) and packed.numpy().all() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert bind(variant("report"))(*make_inputs().arguments())[0, 2] == 1

    def test_weights_and_kernels_live_as_long_as_the_call(self):
        class Owner:
            pass

        owner, scale = Owner(), SCALE.clone()
        held, held_scale = weakref.ref(owner), weakref.ref(scale)
        kernel = variant()
        call = bind(replace(kernel, owner=owner), scale=scale)
        del owner, scale
        gc.collect()
        assert held() is not None
        assert held_scale() is not None
        call(*make_inputs().arguments())
        del call
        gc.collect()
        assert held() is None
        assert held_scale() is None

    def test_a_call_in_a_reference_cycle_is_collected(self):
        class Holder:
            def fallback(self, *_):
                """Refers back to the call through ``self``."""

        holder = Holder()
        holder.call = bind(variant(), fallback=holder.fallback)
        gone = weakref.ref(holder)
        del holder
        gc.collect()
        assert gone() is None

    def test_calls_leave_no_references_behind(self):
        call, inputs = bind(variant()), make_inputs()
        gone = [weakref.ref(tensor) for tensor in inputs.arguments()]
        for _ in range(10):
            call(*inputs.arguments())
        refused(call, *inputs.arguments()[:-1])
        refused(call, *inputs.arguments(gain=inputs.x))
        del inputs
        gc.collect()
        assert [reference() for reference in gone] == [None] * len(gone)


class PackingTests(CallContract):
    @own_settings
    @given(
        shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 300)),
        run=st.sampled_from([1, 3, 4, 8, 16]),
        runs=st.integers(0, 4),
        halves=st.sampled_from([1, 2]),
        kind=st.sampled_from(["contiguous", "rows apart", "transposed"]),
        threads=st.integers(1, 2),
    )
    def test_panels_hold_what_the_layout_says(self, shape, run, runs, halves, kind, threads):
        experts, n, k = shape[0], shape[1] * halves, shape[2]
        # A panel is one run of one half, or whole runs of every half.
        layout = WeightLayout(run * (halves * runs or 1), halves, run if halves == 2 else 0)
        weight = torch.randn(experts, n, k)
        if kind == "rows apart":
            weight = torch.randn(experts, n, k + 5)[:, :, 2:-3]
        elif kind == "transposed":
            weight = torch.randn(experts, k, n).transpose(1, 2)
        out = torch.full((experts, layout.panels(n), k, layout.columns), float("nan"))
        packed = pack_weight(weight, layout, out, threads=threads)
        assert packed is out
        columns = packed.permute(0, 1, 3, 2).reshape(experts, -1, k)
        run = layout.run or layout.columns
        for c in range(columns.shape[1]):
            half, column = c // run % halves, c // (run * halves) * run + c % run
            padding = column >= n // halves
            assert torch.equal(
                columns[:, c], torch.zeros(experts, k) if padding else weight[:, half * (n // halves) + column]
            )

    def test_panels_are_made_aligned(self):
        packed = pack_weight(torch.randn(2, 33, 17), WeightLayout(16))
        assert packed.shape == (2, 3, 17, 16)
        assert packed.data_ptr() % 64 == 0

    def test_packing_asks_for_no_gradient(self):
        weight = torch.nn.Parameter(torch.randn(1, 8, 4))
        packed = pack_weight(weight, WeightLayout(8))
        assert not packed.requires_grad
        assert torch.equal(packed[0, 0], weight[0].T)

    @pytest.mark.parametrize(
        ("weight", "layout", "said"),
        [
            (torch.ones(1, 8, 4, dtype=torch.float64), WeightLayout(8), "cannot pack a weight of torch.float64"),
            (torch.ones(8, 4), WeightLayout(8), "expected torch.float32 [experts, n, k]"),
            (torch.ones(1, 7, 4), WeightLayout(8, 2, 4), "7 rows do not split into 2 halves"),
            (torch.ones(1, 8, 4), WeightLayout(8, 2, 3), "columns must be one run, or whole runs of every half"),
            (torch.ones(1, 8, 4), WeightLayout(2048), "1024 at most"),
            (torch.ones(1, 8, 4), WeightLayout(8, precision="int4g32"), "k=4 is no multiple of the 32 steps"),
        ],
    )
    def test_what_cannot_be_packed_is_named(self, weight, layout, said):
        with pytest.raises(TilewrightError) as caught:
            pack_weight(weight, layout)
        assert said in str(caught.value)

    def test_an_output_that_does_not_fit_is_refused(self):
        with pytest.raises(TilewrightError, match=r"expected contiguous writable float32 \[1, 1, 4, 8\]"):
            pack_weight(torch.ones(1, 8, 4), WeightLayout(8), torch.empty(1, 1, 4, 4))


class TestNativeCalls(Native, CallTests):
    def test_it_is_the_extension_that_calls(self):
        assert type(bind(variant())).__module__ == "tilewright.runtime._native"

    def test_ordinary_calls_do_without_the_twin(self, monkeypatch):
        call, inputs, later = bind(variant()), make_inputs(), make_inputs(slot=False)

        def unexpected(*_):
            raise AssertionError("the extension sent an ordinary call to its twin")

        monkeypatch.setattr(PureCall, "__call__", unexpected)
        call(*inputs.arguments())
        with torch.inference_mode():
            call(*later.arguments(x=torch.nn.Parameter(later.x)))
        monkeypatch.undo()
        for some in (inputs, later):
            torch.testing.assert_close(some.out, expected(some.x, SCALE, *some.arguments()[1:5]))

    def test_stages_of_a_call_are_timed(self):
        call, inputs = bind(variant()), make_inputs()
        times = call.stage_times(inputs.arguments(), 10)
        assert list(times) == ["unwrap", "grad", "metadata", "values", "choose", "gil", "launch"]
        inputs.index[0] = 99
        with pytest.raises(ValueError, match="tensors that the kernel serves"):
            call.stage_times(inputs.arguments(), 10)


class TestPureCalls(Pure, CallTests):
    pass


class TestNativePacking(Native, PackingTests):
    pass


class TestPurePacking(Pure, PackingTests):
    pass
