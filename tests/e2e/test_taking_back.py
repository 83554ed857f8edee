"""What `enable` does with parts that differ in a whole forward, and with models that are not as others are."""

import random

import pytest
import torch
from test_transformers import SIZES, logits, make_model, store_linear_plans, store_plans, transformers
from torch import nn

from tilewright.runtime import ServeOptions, TilewrightWarning
from tilewright.runtime.notices import forget_warnings
from tilewright.runtime.transformers import disable, enable
from tilewright.runtime.transformers.trial import Trial, undisturbed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_DB", str(tmp_path / "tuning.db"))
    forget_warnings()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_layers_whose_weights_somebody_else_reads_are_taken_back_and_named(tmp_path):
    model = make_model("qwen3_moe")
    attention = model.model.layers[1].self_attn
    forward = type(attention).forward

    class Peeking(type(attention)):
        def forward(self, hidden_states, **others):
            out, weights = forward(self, hidden_states, **others)
            return out + self.q_proj.weight.sum() * 1e-3, weights

    attention.__class__ = Peeking
    expected = logits(model)
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    store_linear_plans(tmp_path / "tuning.db", (32, 32), (64, 32))
    with pytest.warns(TilewrightWarning, match=r"layers\.1\.self_attn\.q_proj and 1 more, for with its linear layer"):
        report = enable(model)
    names = [layer.name for layer in report.linears]
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "lm_head"]
    assert len(report.layers) == 2
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    disable(model)
    assert torch.equal(logits(model), expected)


def test_a_part_that_gives_something_else_in_a_whole_forward_is_taken_back(tmp_path):
    model = make_model("qwen3_moe")

    class ByItsClass(nn.Module):
        """Computes something else where its experts are not what they were."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * (2 if self.inner.experts.down_proj.device.type == "meta" else 1)

    model.model.layers[0].mlp = ByItsClass(model.model.layers[0].mlp)
    expected = logits(model)
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    with pytest.warns(TilewrightWarning, match=r"layers\.0.*with its experts served, a whole forward gave something"):
        report = enable(model)
    assert [layer.name for layer in report.layers] == ["model.layers.1.mlp.experts"]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_be_tried_is_left_alone_and_an_example_helps(tmp_path):
    model = make_model("qwen3_moe")
    forward = type(model).forward

    class Picky(type(model)):
        def forward(self, input_ids=None, *, picture=None, **others):
            if picture is None:
                raise KeyError("a picture is missing")
            return forward(self, input_ids=input_ids, **others)

    model.__class__ = Picky
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    with pytest.warns(TilewrightWarning, match=r"could not be tried \(KeyError.*pass enable\(model, example="):
        assert enable(model).layers == ()
    disable(model)
    example = {"input_ids": torch.tensor([[4, 5, 6]]), "picture": torch.zeros(1)}
    assert len(enable(model, example=example).layers) == 2


def test_other_parts_that_are_served_are_not_said_to_run_as_before(tmp_path, recwarn):
    config = transformers.AutoConfig.for_model("qwen2", **SIZES, intermediate_size=24)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    store_linear_plans(tmp_path / "tuning.db", (64, 32))
    assert [layer.name for layer in enable(model).linears] == ["lm_head"]
    assert [str(warning.message) for warning in recwarn if warning.category is TilewrightWarning] == []


def test_a_linear_layer_with_hooks_keeps_them(tmp_path):
    model = make_model("qwen3_moe")
    store_plans(tmp_path / "tuning.db", "qwen3_moe")
    store_linear_plans(tmp_path / "tuning.db", (64, 32))
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    report = enable(model, options=ServeOptions(keep_weights=True))
    assert report.linears == ()
    assert "hooks" in str(report)
    seen.clear()
    logits(model)
    assert seen == [1]


class Stateful(nn.Module):
    """Counts in a buffer, an attribute and a new attribute, and draws from every source."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(2))
        self.calls = 0

    def forward(self, x):
        self.count += 1
        self.calls += 1
        self.seen = x
        self.register_buffer("late", x)
        return x + self.count + torch.rand(1) + random.random()


def test_a_trial_leaves_nothing_behind():
    module = nn.Sequential(Stateful())
    states = torch.get_rng_state(), random.getstate()
    first, second = (Trial({"input": torch.ones(2)}, steps=False).record(module) for _ in range(2))
    assert first.error is None
    assert torch.equal(first.calls[""][0].output, second.calls[""][0].output)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (module[0].calls, module[0].count.tolist()) == (0, [0, 0])
    assert not hasattr(module[0], "seen")
    assert list(module.state_dict()) == ["0.count"]
    assert not module[0]._forward_hooks

    with pytest.raises(RuntimeError), undisturbed(module):
        module(torch.ones(3))
    assert (module[0].calls, module[0].count.tolist()) == (0, [0, 0])
