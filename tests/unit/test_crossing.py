"""Experts in memory for tensors of a GPU: copies are ordered by events, on a stream that runs late."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from posing import pose, posing, values

from tilewright.errors import TilewrightError
from tilewright.runtime import Experts, ServeOptions
from tilewright.runtime.serve import crossing

pytestmark = pytest.mark.filterwarnings("ignore::tilewright.runtime.TilewrightWarning")


class LateStream:
    """Does nothing of what it is asked until somebody waits for it."""

    def __init__(self) -> None:
        self.asked: list[Callable[[], object]] = []
        self.copies = 0

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        self.copies += 1
        self.asked.append(lambda: to.copy_(source))

    def run_until(self, count: int) -> None:
        for work in self.asked[:count]:
            work()
        done, self.asked = count, self.asked[count:]
        for event in self.events:
            event.at -= done

    events: list[Event]


class Event:
    def __init__(self, stream: LateStream) -> None:
        self.stream, self.at = stream, len(stream.asked)
        stream.events.append(self)

    def synchronize(self) -> None:
        if self.at > 0:
            self.stream.run_until(self.at)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> LateStream:
    made = LateStream()
    made.events = []
    monkeypatch.setattr(crossing, "copy_later", made.copy)
    monkeypatch.setattr(crossing, "record_event", lambda _device: Event(made))
    monkeypatch.setattr(crossing, "is_capturing", lambda: False)
    monkeypatch.setattr(crossing, "pinned", lambda elements, dtype: torch.full((elements,), 77, dtype=dtype))
    return made


@pytest.fixture
def experts(tmp_path: Path) -> Experts:
    draw = torch.Generator().manual_seed(0)
    w_up, w_down = torch.randn(4, 12, 8, generator=draw), torch.randn(4, 8, 6, generator=draw)
    return Experts(w_up, w_down, top_k=2, options=ServeOptions(database=tmp_path / "none.db"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_the_cpu(
    stream: LateStream, experts: Experts, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    with posing(monkeypatch):
        given, expected = [], []
        for tokens in (3, 5, 2):
            x, logits = torch.randn(tokens, 8).to(dtype), torch.randn(tokens, 4)
            expected.append(experts(x.float(), logits).to(dtype))
            given.append(experts(pose(x), pose(logits)))  # the copy back of one still waits when the next begins
        stream.run_until(len(stream.asked))
        for found, wanted in zip(given, expected, strict=True):
            assert found.device == torch.device("cuda:0")
            assert torch.equal(values(found), wanted)
        assert stream.copies == 3 * 3


def test_chosen_experts_and_an_output_that_was_passed(
    stream: LateStream, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, ids, weights = torch.randn(2, 3, 8), torch.randint(0, 4, (2, 3, 2)), torch.rand(2, 3, 2)
    expected = experts.run(x, ids, weights)
    with posing(monkeypatch), torch.inference_mode():
        held = x.clone()
        there = pose(held)
        assert experts.run(there, pose(ids), pose(weights), there) is there
        stream.run_until(len(stream.asked))
        torch.testing.assert_close(held, expected)


def test_what_cannot_cross_is_refused(stream: LateStream, experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    x, logits = torch.randn(3, 8), torch.randn(3, 4)
    with posing(monkeypatch):
        with pytest.raises(TilewrightError, match="x is on cuda:0, and another tensor of the call on cuda:1"):
            experts(pose(x), pose(logits, 1))
        with pytest.raises(TilewrightError, match=r"out has shape \[2, 8\]"):
            experts(pose(x), pose(logits), pose(torch.empty(2, 8)))
        monkeypatch.setattr(crossing, "is_capturing", lambda: True)
        with pytest.raises(TilewrightError, match="a CUDA graph cannot record what the CPU computes"):
            experts(pose(x), pose(logits))
    assert stream.copies == 0
