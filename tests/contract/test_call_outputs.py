"""Calls with several outputs, and with router logits: the same of the extension and of its Python twin."""

import ctypes
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tilewright.codegen.recipe.model import Argument, Launch, Recipe, TensorSpec
from tilewright.errors import TilewrightError
from tilewright.runtime.calls import bind as calls
from tilewright.runtime.calls.bind import CallVariant, bind_call
from tilewright.runtime.calls.extension import native_for_torch

COMPILER = shutil.which(os.environ.get("CC", "cc"))
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler to build a test kernel with")

EXPERTS = 20
TENSORS = (
    TensorSpec("logits", "fp32", ("tokens", EXPERTS), values="logits"),
    TensorSpec("best", "int32", ("tokens",), role="output"),
    TensorSpec("value", "fp32", ("tokens",), role="output"),
    TensorSpec("count", "int32", (1,), role="output"),
)
SOURCE = r"""
#include <stdint.h>
int32_t best(const void *host, const int64_t *args) {
    const float *logits = (const float *)args[0];
    int32_t *best = (int32_t *)args[1];
    float *value = (float *)args[2];
    for (int64_t t = 0; t < args[4]; t++, logits += 20) {
        best[t] = 0;
        for (int e = 1; e < 20; e++) if (logits[e] > logits[best[t]]) best[t] = e;
        value[t] = logits[best[t]];
    }
    *(int32_t *)args[3] = (int32_t)args[4];
    return 0;
}
"""


def fallback(*_) -> None:
    raise AssertionError("the kernel serves these calls")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "best.c").write_text(SOURCE)
    command = [COMPILER, "-O1", "-shared", "-fPIC", "best.c", "-o", "best.so"]
    subprocess.run(command, check=True, cwd=folder)
    return ctypes.CDLL(str(folder / "best.so"))


@pytest.fixture(params=["native", "pure"])
def call(request, monkeypatch, library):
    if request.param == "pure":
        monkeypatch.setattr(calls, "_NATIVE", None)
    elif native_for_torch() is None:
        pytest.skip("the extension was not built")
    arguments = (*(Argument("tensor", spec.name) for spec in TENSORS), Argument("size", "tokens"))
    address = ctypes.cast(library.best, ctypes.c_void_p).value
    recipe = Recipe(TENSORS, (Launch("", "best", arguments),), "tokens")
    variants = [CallVariant(None, recipe, (address,), owner=library)]
    return bind_call(TENSORS, {}, variants, size_name="tokens", threads=1, fallback=fallback, name="demo")


def outputs(tokens):
    return torch.full((tokens,), -9, dtype=torch.int32), torch.full((tokens,), -9.0), torch.full((1,), -9).int()


own_settings = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@own_settings
@given(tokens=st.integers(0, 9), seed=st.integers(0, 99))
def test_all_outputs_are_written_and_returned(call, tokens, seed):
    logits = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))
    written = outputs(tokens)
    returned = call(logits, *written)
    assert type(returned) is tuple
    assert [id(tensor) for tensor in returned] == [id(tensor) for tensor in written]
    best, value, count = written
    assert best.tolist() == logits.argmax(1).tolist() if tokens else best.numel() == 0
    torch.testing.assert_close(value, logits.amax(1) if tokens else value)
    # An output of constant length is written for no tokens, too.
    assert count.item() == tokens


def test_no_output_may_overlap_another_tensor(call):
    logits = torch.zeros(4, EXPERTS)
    memory = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(TilewrightError, match="best overlaps count in memory"):
        call(logits, memory[:4], torch.zeros(4), memory[3:4])
    with pytest.raises(TilewrightError, match="value overlaps logits in memory"):
        call(logits, memory[:4], logits.view(-1)[:4], memory[4:5])


@own_settings
@given(st.data())
def test_logits_must_have_a_softmax(call, data):
    tokens = data.draw(st.integers(1, 4))
    logits = np.random.default_rng(data.draw(st.integers(0, 9))).normal(size=(tokens, EXPERTS)).astype(np.float32)
    ruled_out = data.draw(st.lists(st.integers(0, EXPERTS - 1), max_size=EXPERTS - 1, unique=True))
    logits[:, ruled_out] = -np.inf
    call(torch.from_numpy(logits), *outputs(tokens))
    token, expert = data.draw(st.integers(0, tokens - 1)), data.draw(st.integers(0, EXPERTS - 1))
    bad = data.draw(st.sampled_from([np.nan, np.inf, "all"]))
    if bad == "all":
        logits[token], bad, expert = -np.inf, -np.inf, 0
    else:
        logits[token, expert] = bad
    said = rf"demo: logits\[{token}, {expert}\] is {bad}; expected a number, or -inf in a row with other numbers"
    with pytest.raises(TilewrightError, match=said):
        call(torch.from_numpy(logits), *outputs(tokens))
