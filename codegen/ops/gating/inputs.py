"""Router logits that make experts as popular as a routing spec says, and that no rounding can rank in two ways."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.routing.spec import RoutingSpec, generate_topk_ids
from tilewright.errors import TilewrightError

_LEVELS = np.array([-1.3, -0.7, 0.3, 1.1], np.float32)
"""Logits of tied problems: few, so that equal ones abound; irregular, so that no sum of two scores nearly equals
another."""
_RECORDED_LEAD = 20.0
"""What the logit of a recorded choice has ahead of all others."""
_BIAS_STEP = 1 / 64
_APART = 1e-5
"""Scores closer than this, and not equal, may change places by fp32 rounding."""
_ATTEMPTS = 200
_SIGMOID_REACH = 4.0
"""Beyond this logit, and below its negative, scores are close to each other."""


def generate_logits(
    spec: RoutingSpec,
    signature: GatingSignature,
    tokens: int,
    seed: int,
    bias: NDArray[np.float32] | None,
    *,
    tied: bool,
) -> NDArray[np.float32]:
    """Logits [tokens, experts]; the same for the same seed.

    ``balanced`` draws them from a Gumbel distribution, ``power-law`` adds the log of a skewed popularity (so that the
    best ``top_k`` are a draw without replacement from it), ``recorded`` puts the recorded choices ahead. ``tied`` draws
    them from four values instead. Tokens whose choice depends on rounding (see :func:`unstable_tokens`) are drawn anew.

    Raises:
        TilewrightError: for a recorded file that does not fit.

    """
    random = np.random.default_rng((seed, 4))
    experts = signature.experts
    popularity = np.zeros(experts)
    if spec.alpha is not None:
        popularity = random.permutation(-spec.alpha * np.log(np.arange(1, experts + 1)))
    lead = np.zeros((tokens, experts))
    if spec.path is not None:
        ids = generate_topk_ids(spec, tokens, experts, signature.top_k, seed)
        np.put_along_axis(lead, ids.astype(np.int64), _RECORDED_LEAD, axis=1)
    logits = np.empty((tokens, experts), np.float32)
    todo = np.arange(tokens)
    for _ in range(_ATTEMPTS):
        shape = (len(todo), experts)
        if tied:
            logits[todo] = random.choice(_LEVELS, shape)
        else:
            drawn = random.gumbel(size=shape) + popularity + lead[todo]
            logits[todo] = _squeezed(drawn) if signature.ranks_by_score else drawn
        todo = todo[unstable_tokens(logits[todo], signature, bias)]
        if not len(todo):
            return logits
    raise TilewrightError(f"no logits were found for {signature.describe()} that rank its experts beyond rounding")


def _squeezed(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """``logits`` in the same order, within the range in which sigmoid tells them apart."""
    low, high = logits.min(axis=1, keepdims=True), logits.max(axis=1, keepdims=True)
    squeezed: NDArray[np.float64] = (logits - (low + high) / 2) * np.minimum(1, 2 * _SIGMOID_REACH / (high - low))
    return squeezed


def generate_bias(signature: GatingSignature) -> NDArray[np.float32]:
    """Bias [experts] as balancing during training leaves it: small, and on a coarse grid, so that scores may be equal.

    Every signature has one, whatever the seed, for logits are drawn so that its choices do not depend on rounding.
    """
    random = np.random.default_rng(5)
    return (np.round(random.normal(0, 0.05, signature.experts) / _BIAS_STEP) * _BIAS_STEP).astype(np.float32)


def biased_scores(logits: NDArray[np.float32], bias: NDArray[np.float32] | None) -> NDArray[np.float64]:
    """sigmoid(logit) + bias, by which experts are ranked where :attr:`GatingSignature.ranks_by_score`."""
    with np.errstate(over="ignore"):
        scores: NDArray[np.float64] = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return scores if bias is None else scores + bias


def group_scores(scores: NDArray[np.float64], signature: GatingSignature) -> NDArray[np.float64]:
    """What each group counts as, [tokens, groups], by the scores (or logits) of its experts."""
    grouped = np.sort(scores.reshape(len(scores), signature.groups, signature.group_size), axis=2)
    best: NDArray[np.float64] = grouped[..., -1]
    return best + grouped[..., -2] if signature.score == "sigmoid" else best


def unstable_tokens(
    logits: NDArray[np.float32], signature: GatingSignature, bias: NDArray[np.float32] | None
) -> NDArray[np.bool_]:
    """Tokens [tokens] for which fp32 rounding may choose other experts or groups, or order them differently."""
    if not signature.ranks_by_score:
        return np.zeros(len(logits), bool)
    scores = biased_scores(logits, bias)
    unstable: NDArray[np.bool_] = np.zeros(len(logits), bool)
    if signature.groups > 1:
        groups = np.sort(group_scores(scores, signature), axis=1)[:, ::-1]
        unstable = unstable | _close(groups[:, signature.top_groups - 1 : signature.top_groups + 1])
        chosen = group_scores(scores, signature) >= groups[:, signature.top_groups - 1 : signature.top_groups]
        scores = np.where(np.repeat(chosen, signature.group_size, axis=1), scores, -np.inf)
    close: NDArray[np.bool_] = _close(np.sort(scores, axis=1)[:, ::-1][:, : signature.top_k + 1])
    return close | unstable


def _close(falling: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Rows in which two neighbours differ, but hardly."""
    with np.errstate(invalid="ignore"):
        gaps = falling[:, :-1] - falling[:, 1:]
    close: NDArray[np.bool_] = np.any((gaps > 0) & (gaps < _APART), axis=1, keepdims=True)
    return close[:, 0]
