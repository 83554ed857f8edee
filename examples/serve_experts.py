"""Serve the expert layer of a small Mixtral-like model, and race it against a loop over experts in torch.

First tune its shapes for this machine (once; without it plain torch serves, with a warning), then run this::

    tune --arch native --op moe_gemm --model examples/small_moe --time 60s
    python examples/serve_experts.py
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.codegen.models.shapes import load_model
from tilewright.runtime import Experts

(MODEL,) = load_model(str(Path(__file__).parent / "small_moe")).experts
TOKENS = (1, 4, 16, 64, 256)
ROUNDS = 15


def torch_loop(gate_up: Tensor, down: Tensor, x: Tensor, router_logits: Tensor) -> Tensor:
    """What an engine does without tilewright: one expert after the other, on the tokens that chose it."""
    weights, ids = functional.softmax(router_logits, dim=-1).topk(MODEL.top_k)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in range(MODEL.experts):
        token, choice = torch.where(ids == expert)
        if not len(token):
            continue
        gate, up = functional.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        y = functional.linear(functional.silu(gate) * up, down[expert])
        out.index_add_(0, token, y * weights[token, choice, None])
    return out


def race(before: Callable[[], Tensor], after: Callable[[], Tensor]) -> tuple[float, float]:
    """Median milliseconds of both, called in turn so that they share whatever disturbs the machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for call, own in zip((before, after), times, strict=True):
            begin = time.perf_counter()
            call()
            own.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Compare results, then times."""
    torch.manual_seed(0)
    gate_up = torch.randn(MODEL.experts, 2 * MODEL.inter, MODEL.hidden) * MODEL.hidden**-0.5
    down = torch.randn(MODEL.experts, MODEL.hidden, MODEL.inter) * MODEL.inter**-0.5
    experts = Experts(gate_up, down, top_k=MODEL.top_k)
    for tokens in TOKENS:
        x, logits = torch.randn(tokens, MODEL.hidden), torch.randn(tokens, MODEL.experts)
        torch.testing.assert_close(experts(x, logits), torch_loop(gate_up, down, x, logits), rtol=1e-4, atol=1e-4)
        before, after = race(lambda: torch_loop(gate_up, down, x, logits), lambda: experts(x, logits))  # noqa: B023
        print(f"{tokens:4} tokens: torch loop {before:7.3f} ms, tilewright {after:7.3f} ms, {before / after:.2f}x")
    for explanation in experts.explain():
        print(explanation)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
