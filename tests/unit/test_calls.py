"""Parts of the call layer by themselves: what a binding refuses, where the thread pool is found, what imports cost."""

import ctypes
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from call_kernels import TENSORS, Fallback
from numpy import ones

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.recipe.model import Argument, Guard, Launch, Recipe, TensorSpec
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.bind import CallVariant, bind_call
from tilewright.runtime.launchers import openmp
from tilewright.runtime.weights.packing import pack_array

SCALE = torch.ones(3)


TORCH_ONLY = (CallVariant(None),)


def bind(tensors=TENSORS, bound=None, variants=TORCH_ONLY, **changes):
    keywords = {"size_name": "rows", "threads": 1, "fallback": Fallback(SCALE), "name": "demo", **changes}
    return bind_call(tensors, {"scale": SCALE} if bound is None else bound, variants, **keywords)


def launching(*arguments: Argument, **properties) -> tuple[CallVariant, ...]:
    return (CallVariant(None, Recipe(TENSORS, (Launch("", "entry", arguments),), "rows", **properties), (1,)),)


def run_python(code: str, **environment: str) -> str:
    """Output of ``code`` in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threads": 0}, "threads is 0; at least 1 is needed"),
        ({"size_name": "lines"}, "no tensor of a call tells the size 'lines'"),
        ({"bound": {"scale": SCALE, "weight": SCALE}}, "it has no tensor 'weight' to bind"),
        ({"bound": {"scale": None}}, "scale is None, but it is not optional"),
        ({"bound": {"scale": SCALE.double()}}, "scale is torch.float64 on cpu"),
        ({"bound": {"scale": torch.ones(6)[::2]}}, "with strides [2]; expected contiguous torch.float32 on the CPU"),
        ({"bound": {"scale": SCALE, "out": SCALE}}, "every output must be passed with the call"),
        (
            {"variants": launching(Argument("tensor", "weight"))},
            "the launch of entry takes 'weight', which is no tensor of the recipe",
        ),
        ({"variants": launching(Argument("size", "lines"))}, "reads unknown sizes ['lines']"),
        ({"variants": launching(workspace_bytes="lines")}, "reads unknown sizes ['lines']"),
        ({"variants": launching(guards=(Guard("lines", 2),))}, "reads unknown sizes ['lines']"),
        ({"tensors": (*TENSORS, TensorSpec("more", "fp32", (1,), values="index"))}, "cannot be checked as 'index'"),
        ({"tensors": (*TENSORS, TensorSpec("more", "fp7", (1,)))}, "more of fp7"),
        ({"tensors": (*TENSORS, TensorSpec("more", "fp32", ("more",), optional=True))}, "tells the size 'more'"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes, said):
    with pytest.raises(TilewrightError) as caught:
        bind(**changes)
    assert said in str(caught.value)


def test_sizes_and_positions_of_a_binding():
    binding = bind(bound={"scale": SCALE, "slot": None}).binding
    assert binding.symbols == ("tokens", "rows", "threads")
    assert [spec.name for spec in binding.positional] == ["x", "index", "offsets", "gain", "out"]
    assert binding.addresses == {"scale": SCALE.data_ptr(), "slot": 0}


def test_the_variant_without_end_comes_last_in_whatever_order_they_are_given():
    small, large, rest = CallVariant(4), CallVariant(16), CallVariant(None)
    binding = bind(variants=(rest, large, small)).binding
    assert [binding.variant_for(size) for size in (0, 4, 5, 16, 17)] == [small, small, large, large, rest]


def test_addresses_may_be_bound():
    assert bind(bound={"scale": 4096}).binding.addresses == {"scale": 4096}


def test_the_pool_is_the_one_that_torch_uses():
    assert openmp.fork_address() != 0
    assert not openmp.forked()


def test_torchs_copy_of_the_pool_is_the_loaded_one():
    copies = openmp._bundled_with_torch()
    if not copies:
        pytest.skip("this build of torch brings no libgomp")
    function = ctypes.CDLL(str(copies[0])).GOMP_parallel
    assert ctypes.cast(function, ctypes.c_void_p).value == openmp.fork_address()


def test_the_extension_can_be_turned_off_and_no_search_template_or_database_package_is_imported():
    code = """
        import sys
        from tilewright.runtime.calls.bind import IMPLEMENTATION
        print(IMPLEMENTATION, [m for m in ("optuna", "jinja2", "sqlalchemy", "alembic", "scipy") if m in sys.modules])
    """
    assert run_python(code, TILEWRIGHT_NATIVE="0") == "pure []"


def test_packing_refuses_arrays_of_another_kind():
    with pytest.raises(TilewrightError, match=r"dtype float64 and shape \[1, 8, 4\]; expected float32"):
        pack_array(ones((1, 8, 4)), WeightLayout(8), ones((1, 1, 4, 8), "f4"), 1)
    with pytest.raises(TilewrightError, match=r"into float64 of shape \[1, 1, 4, 8\]"):
        pack_array(ones((1, 8, 4), "f4"), WeightLayout(8), ones((1, 1, 4, 8)), 1)
