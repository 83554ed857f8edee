"""Routers that look like a planned gate and do something else: none is served; those that are one are, and follow."""

import random
import re

import pytest
import torch
from naive_kernels import Built, needs_compiler, store_plan
from torch import nn
from torch.nn import functional

from tilewright.codegen.backends.cpp.builder import CppBuilder
from tilewright.codegen.hardware.archs import native_arch
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.runtime import ServeOptions
from tilewright.runtime.transformers.routers import release, serve_routers
from tilewright.runtime.transformers.trial import Trial
from tilewright.tuner.campaign.variants import VariantBuilder

pytestmark = needs_compiler

HIDDEN, EXPERTS, TOP_K = 24, 16, 4
HIDDEN_BIAS = torch.zeros(EXPERTS)
"""A global that a router of the tests reads."""


@pytest.fixture(scope="module", autouse=True)
def _plans(tmp_path_factory):
    """Plans of the default config for gates of both scores, and with a bias."""
    path = tmp_path_factory.mktemp("plans") / "tuning.db"
    op, arch = find_op("gating"), native_arch()
    for fields in ({}, {"score": "sigmoid"}, {"score": "sigmoid", "bias": True}):
        signature = GatingSignature(experts=EXPERTS, top_k=TOP_K, order="rows", **fields)
        variant_builder = VariantBuilder(op, signature, arch, {"cpp": CppBuilder(arch)})
        (built,) = variant_builder.build([op.default_config(signature, arch)])
        record, (artifact,) = variant_builder.record(built, "device")
        store_plan(path, signature, [(None, Built(record, artifact))], threads=1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TILEWRIGHT_DB", str(path))
        yield
    torch.set_num_threads(before)


class Router(nn.Module):
    """A router in the form of Transformers' own; ``hide`` puts a bias somewhere."""

    def __init__(self, score: str = "softmax", *, known: bool = False, experts: int = EXPERTS, hidden: int = HIDDEN):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, hidden) / hidden**0.5)
        self.top_k = TOP_K
        self.score = score
        self.hidden = lambda: 0.0
        if known:
            self.e_score_correction_bias = nn.Buffer(0.01 * torch.randn(experts))

    def forward(self, hidden_states, more=0.0):
        logits = functional.linear(hidden_states.reshape(-1, self.weight.shape[1]), self.weight)
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        keys = scores + self.hidden() + more
        if "e_score_correction_bias" in self._buffers:
            keys = keys + self.e_score_correction_bias
        ids = keys.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        return logits, weights / weights.sum(-1, keepdim=True), ids


class Block(nn.Module):
    """What calls a router, with a further argument where it has one."""

    def __init__(self, router):
        super().__init__()
        self.router = router
        self.more = None

    def forward(self, x):
        return self.router(x) if self.more is None else self.router(x, self.more)


class Child(nn.Module):
    def __init__(self, bias, place):
        super().__init__()
        self.bias_of_choice = nn.Parameter(bias[None]) if place == "parameter" else nn.Buffer(bias[None])

    def forward(self):
        return self.bias_of_choice.squeeze()


def in_the_module(block, bias):
    block.router.register_buffer("usage", bias)
    block.router.hidden = lambda: block.router.usage


def in_a_child(block, bias):
    block.router.statics = Child(bias, random.choice(["parameter", "buffer"]))
    block.router.hidden = block.router.statics


def in_an_argument(block, bias):
    block.more = nn.Parameter(bias)


def in_an_attribute(block, bias):
    block.router.kept = {"bias": [bias]}
    block.router.hidden = lambda: block.router.kept["bias"][0]


def in_a_closure(block, bias):
    block.router.hidden = lambda: bias


def in_numbers(block, bias):
    values = bias.tolist()
    block.router.hidden = lambda: torch.tensor(values, dtype=torch.float32)


def in_a_global(block, bias):
    HIDDEN_BIAS.copy_(bias)
    block.router.hidden = lambda: HIDDEN_BIAS


PLACES = (in_the_module, in_a_child, in_an_argument, in_an_attribute, in_a_closure, in_numbers, in_a_global)


@torch.no_grad()
def serve(block, x):
    recording = Trial({"x": x}, steps=False).record(block)
    assert recording.error is None
    return serve_routers(block, recording.calls, ServeOptions())


def choices(result):
    logits, weights, ids = result
    ordered, at = ids.sort(-1)
    return logits, weights.gather(1, at), ordered


@pytest.mark.slow
def test_no_router_with_a_hidden_bias_is_served_wrongly():
    served = 0
    for drawn in range(100):
        torch.manual_seed(drawn)
        random.seed(drawn)
        std = 10 ** random.uniform(-4, 0)
        block = Block(Router(random.choice(["softmax", "sigmoid"]), known=random.random() < 0.3))
        place = random.choice(PLACES)
        place(block, std * torch.randn(EXPERTS))
        saved = {name: value.clone() for name, value in block.state_dict().items()}
        x = torch.randn(1024, HIDDEN)
        with torch.no_grad():
            expected = block(x)
            names, left_alone = serve(block, x[:12])
            # Where such a bias is the one of a gate that was planned, it may be served; then with it.
            for ours, theirs in zip(choices(block(x)), choices(expected), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert bool(names) != bool(left_alone), place.__name__
        served += len(names)
        assert all(torch.equal(value, saved[name]) for name, value in block.state_dict().items())
    assert served < 25  # those in sigmoid routers whose bias a gate reads


@pytest.mark.parametrize(("score", "known"), [("softmax", False), ("sigmoid", False), ("sigmoid", True)])
@pytest.mark.parametrize(("mode", "width"), [("normal", HIDDEN), ("inference", HIDDEN), ("normal", 7)])
def test_a_router_that_is_a_gate_is_served_and_follows_its_parameters(score, known, mode, width):
    torch.manual_seed(1)
    with torch.inference_mode(mode == "inference"):
        block = Block(Router(score, known=known, hidden=width)).eval()
    block.requires_grad_(False)
    x = torch.randn(64, width)
    saved = {name: value.clone() for name, value in block.state_dict().items()}
    state = torch.get_rng_state()
    names, left_alone = serve(block, x[:9])
    assert (names, left_alone) == (("router",), ())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, saved[name]) for name, value in block.state_dict().items())

    plain = Block(Router(score, known=known, hidden=width)).eval()
    with torch.inference_mode():

        def same():
            plain.load_state_dict(block.state_dict())
            for ours, theirs in zip(choices(block(x)), choices(plain(x)), strict=True):
                torch.testing.assert_close(ours, theirs)

        same()
        for tensor in block.state_dict().values():  # changed in place
            tensor.copy_(torch.randn(tensor.shape))
        same()
        block.router.weight = nn.Parameter(torch.randn(EXPERTS, width), requires_grad=False)
        if known:  # replaced, and so no longer what the gate reads
            block.router.e_score_correction_bias = nn.Buffer(torch.randn(EXPERTS))
        same()
        more = torch.randn(EXPERTS)
        torch.testing.assert_close(choices(block.router(x, more)), choices(plain.router(x, more)))
        block.router.double()
        assert block.router(x.double())[0].dtype is torch.float64
    release(block.router)
    assert type(block.router) is Router


def test_what_a_router_raises_does_not_end_it_and_its_parameters_come_back():
    block = Block(Router())
    before = block.router.weight.tolist()
    moved = []

    class Odd(Router):
        def forward(self, hidden_states, more=0.0):
            if self.weight.tolist() != before:
                moved.append(len(hidden_states))
                raise KeyError("odd")
            return super().forward(hidden_states, more)

    block.router.__class__ = Odd
    names, (left,) = serve(block, torch.randn(5, HIDDEN))
    assert names == ()
    assert "raises KeyError" in left.reason
    assert moved
    assert block.router.weight.tolist() == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda router: router.double(), None),
        (lambda router: router.to("meta"), None),
        (lambda router: router.register_buffer("counts", torch.zeros(3)), "counts, which no gate reads"),
        (lambda router: router.register_buffer("seen", torch.zeros(EXPERTS, dtype=torch.int64)), "seen, which is no"),
        (lambda router: setattr(router, "forward", router.forward), "its router's forward was replaced"),
        (lambda router: setattr(router, "hidden", lambda: torch.rand(EXPERTS)), "chooses in another way|as they did"),
    ],
)
def test_other_routers_are_left_alone(change, reason):
    torch.manual_seed(2)
    block = Block(Router())
    calls = Trial({"x": torch.randn(5, HIDDEN)}, steps=False).record(block).calls
    change(block.router)
    names, left_alone = serve_routers(block, calls, ServeOptions())
    assert names == ()
    if reason is None:
        assert left_alone == ()
    else:
        assert re.search(reason, left_alone[0].reason), left_alone[0].reason
