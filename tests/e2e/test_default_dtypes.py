"""The runtime under other default dtypes of torch than fp32: it does not compute in what a caller's script has set."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.runtime.transformers import proof

ROOT = Path(__file__).parents[2]
FULL = bool(os.environ.get("TILEWRIGHT_FULL"))
FACTORIES = {"empty", "zeros", "ones", "full", "arange", "tensor", "as_tensor", "randn", "rand", "eye", "linspace"}

CHEAP = ("tests/unit/test_runtime_gating.py",)
RUNTIME = (
    *CHEAP,
    "tests/unit/test_runtime_attention.py",
    "tests/unit/test_runtime_experts.py",
    "tests/unit/test_runtime_fallback.py",
    "tests/unit/test_torch_ops.py",
    "tests/e2e/test_runtime_serving.py",
    "tests/e2e/test_router_proof.py",
    "tests/e2e/test_transformers.py",
    "tests/e2e/test_transformers_prompts.py",
    "tests/e2e/test_transformers_routers.py",
)
LEFT_OUT = (
    # They trace graphs, in which the plugin that keeps tests' own tensors in fp32 cannot be.
    "not compiles and not linear_layers_with_a_plan and not export and not graph"
    # It wants tensors in bf16 from Transformers, which asks for them by the default dtype.
    " and not bf16_model"
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"] if FULL else ["bfloat16"])
def test_the_runtime_passes_its_tests(dtype):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "default_dtype_plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", LEFT_OUT, *(RUNTIME if FULL else CHEAP)],
        cwd=ROOT,
        env={**os.environ, "TILEWRIGHT_TEST_DTYPE": dtype, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("path", sorted((ROOT / "runtime").rglob("*.py")), ids=lambda path: path.stem)
def test_what_is_allocated_names_its_dtype_and_device(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func) in {f"torch.{name}" for name in FACTORIES}]
    for call in made:
        named = {keyword.arg for keyword in call.keywords}
        whole = ast.unparse(call.func) == "torch.arange"  # of whole numbers, which are int64 whatever the default
        assert named >= ({"device"} if whole else {"dtype", "device"}), f"line {call.lineno}: {ast.unparse(call)}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("hidden", [24, 7])
def test_rows_that_routers_are_tried_with_are_fp32(dtype, hidden):
    signature = GatingSignature(experts=16, top_k=4)
    router = SimpleNamespace(weight=torch.zeros((16, hidden), dtype=torch.float32))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        rows = list(proof._hard_rows(router, signature, proof.Readable({"weight": router.weight}, "")))
    finally:
        torch.set_default_dtype(before)
    assert len(rows) > 3
    assert {each.dtype for pair in rows for each in pair} == {torch.float32}
