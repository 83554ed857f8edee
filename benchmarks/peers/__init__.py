"""What others offer for the same work on the CPU, set up as their own documentation says, to be raced against ours."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

Case = TypeVar("Case")
Packed = TypeVar("Packed")
Call = Callable[[], Tensor]


def _unchanged(_case: object, output: Tensor) -> Tensor:
    return output


@dataclass(frozen=True)
class Peer(Generic[Case]):
    """One way to do the work of a case.

    ``prepare(cases, threads)`` does what a server does once (packing weights, building sessions; weights shared by
    several cases are packed once) and returns one call per case: what a server does for every batch. ``why_not`` says
    why it cannot run here, empty where it can. ``in_row_order`` brings an output into the order of the reference where
    the peer has another one; it is used for checking only.
    """

    name: str
    prepare: Callable[[Sequence[Case], int], list[Call]]
    why_not: str = ""
    in_row_order: Callable[[Case, Tensor], Tensor] = _unchanged

    @property
    def available(self) -> bool:
        return not self.why_not


def missing_package(module: str, requirement: str) -> str:
    """Why a peer that needs ``module`` cannot run; empty where the module is installed."""
    return "" if importlib.util.find_spec(module) else f"the package {requirement} is not installed"


@contextmanager
def limited_to(threads: int) -> Iterator[None]:
    """Let torch and numpy use this many threads. (ggml and ONNX Runtime are told when they are prepared.)"""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def prepare_checked(
    peers: Sequence[Peer[Case]],
    cases: Sequence[Case],
    threads: int,
    reference: Callable[[Case], Tensor],
    tolerance: float = 1e-4,
) -> dict[str, list[Call]]:
    """Prepare every available peer and run it once on every case.

    Raises:
        ValueError: an output differs from the reference by more than ``tolerance`` of the reference's largest value.

    """
    expected = [reference(case) for case in cases]
    prepared = {}
    with limited_to(threads):
        for peer in peers:
            if not peer.available:
                continue
            calls = peer.prepare(cases, threads)
            for case, call, correct in zip(cases, calls, expected, strict=True):
                output = peer.in_row_order(case, call())
                error = ((output.double() - correct).abs().max() / correct.abs().max()).item()
                if not error <= tolerance:  # a NaN is an error, too
                    raise ValueError(f"{peer.name} is wrong: relative error {error:.2e}, allowed {tolerance:.0e}")
            prepared[peer.name] = calls
    return prepared


def packed_once(
    cases: Sequence[Case], weights: Callable[[Case], Tensor], pack: Callable[[Tensor], Packed]
) -> list[Packed]:
    """Return each case's packed weights; weights that several cases share are packed once."""
    distinct = {tensor.data_ptr(): tensor for tensor in map(weights, cases)}
    packed = {address: pack(tensor) for address, tensor in distinct.items()}
    return [packed[weights(case).data_ptr()] for case in cases]
