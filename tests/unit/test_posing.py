"""Posed tensors are what other tests take them for."""

from __future__ import annotations

import pytest
import torch
from posing import extents, pose, posing, values


def test_a_posed_tensor_lies_on_a_cuda_device_and_has_the_memory_of_the_cpu() -> None:
    held = torch.arange(6.0).view(2, 3)
    posed = pose(held, 1)
    assert posed.device == torch.device("cuda:1")
    assert posed.is_cuda
    assert posed.data_ptr() == held.data_ptr()
    assert tuple(map(int, posed.__dlpack_device__())) == (2, 1)


def test_results_lie_where_their_tensors_do() -> None:
    posed = pose(torch.arange(6.0).view(2, 3), 1)
    product = posed @ posed.T
    assert product.device == torch.device("cuda:1")
    assert torch.equal(values(product), values(posed) @ values(posed).T)


def test_what_is_written_in_place_is_written_in_the_memory_that_was_passed() -> None:
    held = torch.zeros(3)
    posed = pose(held)
    assert posed.add_(1) is posed
    posed[1] = 7
    assert held.tolist() == [1, 7, 1]


def test_tensors_are_made_on_the_device_and_moved_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with posing(monkeypatch):
        made = torch.empty((2, 3), dtype=torch.bfloat16, device="cuda:0")
        moved = torch.ones(2).to("cuda", torch.float16)
        assert made.device == moved.device == torch.device("cuda:0")
        assert (made.dtype, moved.dtype) == (torch.bfloat16, torch.float16)
        back = moved.cpu()
        assert back.device.type == "cpu"
        assert back.tolist() == [1, 1]
        assert back.data_ptr() != moved.data_ptr()
        assert torch.ones(2).cuda().to("cpu").device.type == "cpu"
        assert torch.empty_like(made).device.type == "cuda"


def test_a_module_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    with posing(monkeypatch), torch.no_grad():
        linear = torch.nn.Linear(4, 2)
        expected = linear(torch.ones(1, 4))
        there = linear.to("cuda")
        assert there.weight.device.type == "cuda"
        assert torch.equal(there(torch.ones(1, 4, device="cuda")).cpu(), expected)


def test_extents_are_those_of_living_tensors() -> None:
    posed = pose(torch.zeros(5))
    extent = (posed.data_ptr(), 20)
    assert extent in extents()
    del posed
    assert extent not in extents()
