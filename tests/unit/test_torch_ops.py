"""tilewright as torch operators: what torch checks of every operator, and graphs that hold them."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tilewright.errors import TilewrightError
from tilewright.runtime import Experts, Gate

pytestmark = pytest.mark.filterwarnings("ignore::tilewright.runtime.TilewrightWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_database(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_DB", str(tmp_path / "none.db"))


def make_layer():
    generator = torch.Generator().manual_seed(0)
    w_up, w_down = torch.randn(4, 32, 24, generator=generator), torch.randn(4, 24, 16, generator=generator)
    return Experts(w_up, w_down, top_k=2)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.gate = make_layer(), Gate.of(4, 2, order="rows")

    def forward(self, x, logits):
        gated = self.gate(logits)
        return self.experts(x + 1, logits) + self.experts.run(x, gated.topk_ids, gated.topk_weights)


def test_torch_finds_nothing_wrong_with_the_operators():
    experts, x, logits = make_layer(), torch.randn(5, 24), torch.randn(5, 4)
    ids = torch.tensor([[0, 1], [3, 2], [1, 0], [2, 3], [0, 3]])
    torch.library.opcheck(torch.ops.tilewright.expert_ffn, (x, logits, experts.handle))
    torch.library.opcheck(torch.ops.tilewright.routed_experts, (x, ids, torch.rand(5, 2), experts.handle))
    for order, block_size in (("none", 0), ("rows", 0), ("blocks", 4)):
        gate = Gate.of(4, 2, order=order, block_size=block_size)
        torch.library.opcheck(torch.ops.tilewright.gate, (logits, gate.handle))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph(backend):
    block, x, logits = Block(), torch.randn(5, 24), torch.randn(5, 4)
    with torch.no_grad():
        expected = block(x, logits)
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=backend)(x, logits), expected)


def test_exported_for_any_number_of_tokens():
    block, x, logits = Block(), torch.randn(5, 24), torch.randn(5, 4)
    tokens = torch.export.Dim("tokens")
    with torch.no_grad():
        program = torch.export.export(block, (x, logits), dynamic_shapes=({0: tokens}, {0: tokens}))
        torch.testing.assert_close(program.module()(x[:3], logits[:3]), block(x[:3], logits[:3]))
    assert "tilewright.expert_ffn" in str(program.graph)


def test_a_backward_pass_is_refused():
    experts = make_layer()
    out = torch.ops.tilewright.expert_ffn(torch.randn(3, 24, requires_grad=True), torch.randn(3, 4), experts.handle)
    with pytest.raises(TilewrightError, match="no gradients"):
        out.sum().backward()


def test_a_handle_of_what_is_gone_is_refused():
    handle = make_layer().handle
    with pytest.raises(TilewrightError, match=f"no Experts of this process has the handle {handle}"):
        torch.ops.tilewright.expert_ffn(torch.randn(3, 24), torch.randn(3, 4), handle)


def test_outputs_of_a_graph_lie_where_its_tensors_do():
    experts, gate = make_layer(), Gate.of(4, 2, order="rows")
    with FakeTensorMode():
        x = torch.empty(5, 24, dtype=torch.bfloat16, device="cuda:1")
        logits = torch.empty(5, 4, device="cuda:1")
        out = torch.ops.tilewright.expert_ffn(x, logits, experts.handle)
        assert (out.device, out.dtype, out.shape) == (x.device, x.dtype, x.shape)
        assert {each.device for each in torch.ops.tilewright.gate(logits, gate.handle)} == {x.device}
