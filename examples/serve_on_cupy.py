"""Route tokens with a tuned kernel on arrays of cupy: its memory, its stream, and no tensor of torch.

It needs an NVIDIA GPU, its driver, and cupy (pip install 'tilewright[cupy]'). First tune for the GPU's architecture, on
any machine; then run this on the one with the GPU. So far nothing has: how its call is made was tested without a GPU::

    tune --arch sm_90 --op gating --problem experts=64,top_k=8 --tokens 256
    python examples/serve_on_cupy.py
"""

import cupy

from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.runtime import ServeOptions, prepare

TOKENS, EXPERTS, TOP_K = 256, 64, 8


def main() -> None:
    """Compare with cupy's own sorting."""
    signature = GatingSignature(experts=EXPERTS, top_k=TOP_K)
    route = prepare(signature, {}, options=ServeOptions(device="cuda:0"))
    print(*route.explain(), sep="\n")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        logits = cupy.random.standard_normal((TOKENS, EXPERTS), dtype=cupy.float32)
        ids = cupy.empty((TOKENS, TOP_K), dtype=cupy.int32)
        weights = cupy.empty((TOKENS, TOP_K), dtype=cupy.float32)
        route(logits, ids, weights)  # enqueued on `stream`, the current one of cupy
        best = cupy.argsort(-logits, axis=1)[:, :TOP_K]
        chosen = cupy.take_along_axis(logits, best, axis=1)
        stream.synchronize()
    assert (ids == best).all()
    expected = cupy.exp(chosen - chosen.max(axis=1, keepdims=True))
    cupy.testing.assert_allclose(weights, expected / expected.sum(axis=1, keepdims=True), rtol=1e-4)
    print(f"{TOKENS} tokens went to their {TOP_K} best of {EXPERTS} experts")


if __name__ == "__main__":
    main()
