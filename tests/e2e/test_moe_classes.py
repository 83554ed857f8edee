"""Every mixture-of-experts class of the installed Transformers: served right, or left alone with a reason.

The page docs/moe-classes.md is made here; with TILEWRIGHT_FULL=1 every class is tried, else a few.
"""

import contextlib
import os
import warnings
from pathlib import Path

import pytest
import torch
from naive_kernels import Built, build, needs_compiler, store_plan

from tilewright.codegen.backends.cpp.builder import CppBuilder
from tilewright.codegen.hardware.archs import native_arch
from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.runtime.notices import forget_warnings
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.serve.plans import is_planned
from tilewright.runtime.transformers import disable, enable, enabling, prompts, routers
from tilewright.runtime.transformers.interface import attention_modules, experts_modules
from tilewright.runtime.transformers.recognition import Form, read_form
from tilewright.tuner.campaign.variants import VariantBuilder

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

from tiny_models import TinyClass, make_tiny, moe_classes  # noqa: E402 - it needs Transformers

pytestmark = [
    needs_compiler,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

PAGE = Path(__file__).parents[2] / "docs" / "moe-classes.md"
FULL = bool(os.environ.get("TILEWRIGHT_FULL"))
A_FEW = ("Ernie4_5_MoeForCausalLM", "Lfm2MoeForCausalLM", "Qwen3NextForCausalLM")
"""Classes that were once served wrongly, or not at all."""
CLASSES = tuple(moe_classes()) if FULL else tuple(map(TinyClass, A_FEW))
PROMPT = torch.arange(3, 22)[None]


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """Plans for everything that is asked for, in one place."""
    path = tmp_path_factory.mktemp("plans") / "tuning.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TILEWRIGHT_DB", str(path))
        yield path


def plan(path, signature) -> None:
    """Store a plan for ``signature``, once: a naive kernel for a GEMM, else the default config."""
    if is_planned(signature, ServeOptions()):
        return
    if isinstance(signature, MoeGemmSignature):
        halves = {"halves": 2, "run": 4} if signature.stage == "up" else {}
        store_plan(path, signature, [(None, build(signature, layout=WeightLayout(8, **halves)))], threads=1)
        return
    op, arch = find_op(signature.op), native_arch()
    variant_builder = VariantBuilder(op, signature, arch, {"cpp": CppBuilder(arch)})
    (built,) = variant_builder.build([op.default_config(signature, arch)])
    record, (artifact,) = variant_builder.record(built, "device")
    store_plan(path, signature, [(None, Built(record, artifact))], threads=1)


def plan_all(path, model) -> None:
    """Plans for the experts and routers of ``model``, and where there is time its attention and linear layers."""
    for _, module in experts_modules(model):
        form = read_form(module)
        top_k = enabling.top_k_of(module)
        if isinstance(form, Form) and top_k:
            for signature in enabling._signatures(form, top_k):
                plan(path, signature)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(getattr(module, "top_k", None), int) and isinstance(weight, torch.Tensor) and weight.dim() == 2:
            for signature in routers._signatures(module, weight.shape[0], module.top_k):
                plan(path, signature)
        elif type(module) is torch.nn.Linear and FULL:
            n, k = weight.shape
            plan(path, MoeGemmSignature(stage="plain", experts=1, n=n, k=k, bias=module.bias is not None))
    for _, module in attention_modules(model, "sdpa") if FULL else ():
        with contextlib.suppress(Exception):  # of configs that do not say
            for signature in prompts._signatures(module):
                plan(path, signature)


def make_model(tiny: TinyClass):
    """The tiny model, with weights that matter, and small biases where there were none."""
    model = make_tiny(tiny)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and tensor.dim() >= 2 and "inv_freq" not in name:
                tensor.add_(torch.randn(tensor.shape, generator=draw), alpha=0.05)
            elif tensor.is_floating_point() and not tensor.any():
                tensor.add_(torch.randn(tensor.shape, generator=draw), alpha=1e-3)
    return model


@torch.no_grad()
def logits(model):
    torch.manual_seed(0)  # a diffusion model draws
    return model(input_ids=PROMPT).logits


def generate(model, seed=0):
    torch.manual_seed(seed)
    made = model.generate(PROMPT, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return getattr(made, "sequences", made)


ROWS: dict[str, str] = {}
"""Lines of the page, as they were found."""


@pytest.mark.slow
@pytest.mark.parametrize("tiny", CLASSES, ids=str)
def test_a_class_is_served_right_or_left_alone(database, tiny):
    forget_warnings()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = make_model(tiny)
                logits(model)
                generate(model)
            except Exception:
                if tiny.causal:
                    raise
                ROWS[tiny.name] = "| | | | | | not tried: its default config makes no small model that runs on text |"
                return
            ROWS[tiny.name] = tried(database, model)
    finally:
        torch.set_num_threads(before)


def test_the_page_says_what_was_found():
    if FULL and os.environ.get("TILEWRIGHT_WRITE_PAGE"):
        PAGE.write_text(page())
    lines = PAGE.read_text().splitlines()
    if FULL:
        wrong = {name: row for name, row in ROWS.items() if f"| {name} {row}" not in lines}
        assert wrong == {}, f"docs/moe-classes.md is out of date; to write it: {RENEW}"
    assert {name for name in A_FEW if not any(line.startswith(f"| {name} |") for line in lines)} == set()


RENEW = "TILEWRIGHT_FULL=1 TILEWRIGHT_WRITE_PAGE=1 pytest tests/e2e/test_moe_classes.py"


def page() -> str:
    lines = [f"| {name} {row}" for name, row in sorted(ROWS.items(), key=lambda pair: pair[0].lower())]
    return (
        f"""# Mixture-of-experts classes of Transformers

What [`enable`](transformers.md) serves of every class that makes text and has experts in
Transformers {transformers.__version__}: a tiny model of each, with random weights in fp32 and plans
for all of its shapes. Logits are those of before within 1e-4, 8 greedy tokens are the same
(diffusion draws, and is not asked), and after `disable` everything is bit for bit as it was. What
is left alone runs as before; reasons speak of some of a model's parts, not of all.

This tries them all and writes the page; without `TILEWRIGHT_WRITE_PAGE`, what is out of date fails:

    {RENEW}

| class | expert layers | routers | attention over prompts | linear layers | norms | left alone, for |
|---|---|---|---|---|---|---|
"""
        + "\n".join(lines)
        + "\n"
    )


def tried(database, model) -> str:
    """What is served of ``model``, as a line of the page, after everything was compared."""
    expected, tokens = logits(model), generate(model)
    is_greedy = torch.equal(tokens, generate(model, seed=1))  # diffusion draws, whatever it is asked for
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    plan_all(database, model)
    state = torch.get_rng_state()
    report = enable(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(model), tokens) or not is_greedy
    row = described(model, report)
    disable(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)
    return row


def described(model, report) -> str:
    reasons = sorted({f"{each.reason}" for each in report.left_alone})
    experts = len(dict(experts_modules(model)))
    counts = [f"{len(report.layers)} of {experts}" if experts else "not by the interface"]
    counts += [str(len(each)) for each in (report.routers, report.prompts, report.linears, report.norms)]
    return f"| {' | '.join(counts)} | {'; '.join(reasons)} |"
