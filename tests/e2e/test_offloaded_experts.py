"""Experts that a device map keeps in memory: served where they lie, and calls of the GPU go there and back."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from naive_kernels import needs_compiler
from posing import pose, posing, values
from test_transformers import logits, make_model, store_plans

from tilewright.runtime.notices import forget_warnings
from tilewright.runtime.serve import crossing
from tilewright.runtime.transformers import disable, enable

pytestmark = [needs_compiler, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


class Hook:
    """What Accelerate's ``AlignDevicesHook`` does with ``offload``: weights are there during a call alone."""

    offload = True

    def __init__(self, module: torch.nn.Module) -> None:
        self.weights_map = {name: value.detach() for name, value in module.named_parameters()}
        self.brought = 0
        self._forget(module)

    def _forget(self, module: torch.nn.Module) -> None:
        for name in self.weights_map:
            setattr(module, name, torch.nn.Parameter(self.weights_map[name].to("meta"), requires_grad=False))

    def forward(self, module: Any, *args: Any) -> Any:
        self.brought += 1
        for name, value in self.weights_map.items():
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
        try:
            return module._old_forward(*args)
        finally:
            self._forget(module)


def offload(module: Any) -> Hook:
    """As ``add_hook_to_module`` of Accelerate does it."""
    module._old_forward = module.forward
    module._hf_hook = Hook(module)
    module.forward = functools.update_wrapper(functools.partial(module._hf_hook.forward, module), module._old_forward)
    hook: Hook = module._hf_hook
    return hook


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TILEWRIGHT_DB", str(tmp_path / "tuning.db"))
    forget_warnings()


def test_offloaded_experts_are_served_and_given_back(tmp_path, monkeypatch):
    model = make_model("qwen3_moe")
    expected = logits(model)
    modules = [layer.mlp.experts for layer in model.model.layers]
    hooks = [offload(module) for module in modules]
    assert torch.equal(logits(model), expected)
    store_plans(tmp_path / "tuning.db", "qwen3_moe")

    report = enable(model)
    assert len(report.layers) == 2
    assert not any(layer.released for layer in report.layers)
    before = [hook.brought for hook in hooks]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert [hook.brought for hook in hooks] == before  # nothing was brought anywhere

    # A call as the rest of the model makes it where that is on a GPU.
    monkeypatch.setattr(crossing, "record_event", lambda _device: Happened())
    monkeypatch.setattr(crossing, "is_capturing", lambda: False)
    monkeypatch.setattr(crossing, "pinned", lambda elements, dtype: torch.empty(elements, dtype=dtype))
    x, ids, weights = torch.randn(3, 32), torch.tensor([[0, 1], [3, 2], [1, 0]]), torch.rand(3, 2)
    with torch.no_grad():
        wanted = modules[0](x, ids, weights)
        with posing(monkeypatch):
            found = modules[0](pose(x.bfloat16()), pose(ids), pose(weights))
            assert (found.device.type, found.dtype) == ("cuda", torch.bfloat16)
            torch.testing.assert_close(values(found).float(), wanted, rtol=0.05, atol=0.05)

    disable(model)
    assert torch.equal(logits(model), expected)
    assert [hook.brought for hook in hooks] > before


class Happened:
    def synchronize(self) -> None:
        pass
