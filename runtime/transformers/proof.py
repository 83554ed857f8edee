"""Whether a gate does what a router does, shown by what both make of it when everything that the router reads moves.

Random rows alone show little: a bias of 1e-3 that the gate does not know of changes the experts of one token in a
hundred. So three things are asked for:

* Every tensor that the router reaches is one that the gate reads.
* Each of them is moved far, and both change, in the same way.
* Rows are tried in which all experts are nearly equal, in steps down to 2e-6, so that whatever else takes part in the
  choice, wherever it may be kept, shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.errors import TilewrightError
from tilewright.runtime.transformers.reach import TooMuchReachedError, reached_tensors
from tilewright.runtime.transformers.recognition import Refusal
from tilewright.runtime.transformers.specialised import agree, random_rows
from tilewright.runtime.transformers.trial import Call, undisturbed

Route = Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Logits, weights and ids that a module's gate gives for rows."""

ANOTHER_WAY = "its router chooses in another way than its plan"

_ROWS = 32
"""Of a trial."""
_SPREADS = (2e-6, 2e-5, 2e-4, 2e-3)
"""Steps between experts in rows in which they are nearly equal: above what fp32 rounds, below any bias that matters."""
_LEAST_SPREAD_OF_PAIRS = 2e-5
"""The same where logits are sums of products."""
_LEAST_GAP = 1e-6
"""Between groups of experts, below which their order is a matter of rounding."""


@dataclass(frozen=True, eq=False)
class Readable:
    """What a gate can read of a router."""

    tensors: dict[str, Tensor]
    """By path from the router."""
    correction: str
    """Path of the bias that takes part in the choice, and not in the weights; '' without."""


def readable_tensors(module: Any) -> Readable | Refusal:
    """What a gate can read of ``module``, which must be all that it reaches."""
    experts = module.weight.shape[0]
    try:
        reached = reached_tensors(module)
    except TooMuchReachedError:
        return Refusal("its router reaches more than itself")
    tensors: dict[str, Tensor] = {}
    for path, tensor in reached.items():
        if not _is_plain(tensor):
            return Refusal(f"its router reaches {path}, which is no fp32 tensor on the CPU")
        if all(tensor.data_ptr() != other.data_ptr() or tensor.shape != other.shape for other in tensors.values()):
            tensors[path] = tensor
    others = [path for path in tensors if path not in ("weight", "bias")]
    for path in others:
        if not _leads_to(module, path, tensors[path]):
            return Refusal(f"its router reaches {path}, which is none of its parameters and buffers")
    wrong = [path for path in others if tensors[path].numel() != experts or not tensors[path].is_contiguous()]
    if wrong or len(others) > 1:
        return Refusal(f"its router reaches {(wrong or others)[-1]}, which no gate reads")
    return Readable(tensors, others[0] if others else "")


def _is_plain(value: Tensor | np.ndarray[Any, Any]) -> TypeGuard[Tensor]:
    """Whether ``value`` is what a gate may read and one may write for a while: fp32 in memory."""
    if not isinstance(value, Tensor) or type(value) not in (Tensor, nn.Parameter):
        return False
    return value.layout is torch.strided and value.device.type == "cpu" and value.dtype is torch.float32


def _leads_to(module: nn.Module, path: str, tensor: Tensor) -> bool:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return named.get(path) is tensor


def disproof(
    module: nn.Module,
    route: Route,
    signature: GatingSignature,
    readable: Readable,
    calls: Sequence[Call],
    *,
    flattens: bool,
) -> str | None:
    """Why ``route`` does not give for ``module`` what the module gives; None where it was shown to.

    Args:
        module: a router.
        route: its gate.
        signature: of the gate.
        readable: what it reads of the module, which is moved and brought back bit for bit.
        calls: what a forward of the model called the module with.
        flattens: whether it is to take [..., hidden], and not only [tokens, hidden].

    """
    pair = _Pair(module, route, flattens)
    try:
        with undisturbed(module):
            return _disproof(pair, signature, readable, calls)
    except TilewrightError as error:
        return f"its router is not what its plan computes: {error}"
    except Exception as error:
        return f"its router raises {type(error).__name__} where it was tried: {error}"


@dataclass(frozen=True, eq=False)
class _Pair:
    """A router and its gate."""

    module: Any
    route: Route
    flattens: bool

    def results(self, x: Tensor) -> tuple[Any, Any]:
        """Of the router and of the gate for rows ``x``, with a token's choices by rising id."""
        theirs = self.module.forward(x[None].clone() if self.flattens else x.clone())
        return _by_id(theirs), _by_id(self.route(self.module, x))


def _disproof(pair: _Pair, signature: GatingSignature, readable: Readable, calls: Sequence[Call]) -> str | None:
    for call in calls:
        x = call.args[0]
        if not pair.flattens and x.dim() != 2:
            return "its router is called with tokens in several dimensions"
        if not agree(_by_id(pair.route(pair.module, x)), _by_id(call.output)):
            return ANOTHER_WAY
    rows = random_rows(_ROWS, pair.module.weight.shape[1])
    before = pair.results(rows)
    if not agree(*before):
        return ANOTHER_WAY
    for path, tensor in readable.tensors.items():
        for seed in (1, 2):
            with _moved(tensor, random_rows(*tensor.shape, seed=seed)):
                moved = pair.results(rows)
            if any(agree(old, new) for old, new in zip(before, moved, strict=True)):
                return f"its router or its gate does not read {path}"
            if not agree(*moved):
                return f"its gate does not follow its router's {path}"
    with ExitStack() as stack:
        if readable.correction:
            correction = readable.tensors[readable.correction]
            stack.enter_context(_moved(correction, 0.05 * random_rows(*correction.shape, seed=3)))
        for x, weight in _hard_rows(pair.module, signature, readable):
            with _moved(pair.module.weight, weight):
                if not agree(*pair.results(x)):
                    return "its router chooses by more than the gate reads, where experts are nearly equal"
    return None


def _hard_rows(module: Any, signature: GatingSignature, readable: Readable) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and router weights for which experts are nearly equal, and rows far from where those of a model lie."""
    experts, hidden = module.weight.shape
    bias = readable.tensors["bias"].detach() if "bias" in readable.tensors else 0.0
    correction = readable.tensors[readable.correction].detach().view(-1) if readable.correction else None
    weight = torch.eye(experts, hidden, dtype=torch.float32, device="cpu")
    for seed, spread in enumerate(_SPREADS):
        logits = _near_logits(signature, spread, correction, seed)
        if hidden >= experts:
            x = torch.zeros((len(logits), hidden), dtype=torch.float32, device="cpu")
            x[:, :experts] = logits - bias
            yield x, weight
        else:
            # With fewer inputs than experts not all can be near each other: pairs are, by the first input alone.
            near = random_rows(experts, hidden, seed=seed) / hidden**0.5
            firsts = near[: 2 * (experts // 2) : 2]
            near[1::2] = firsts
            near[1::2, 0] += max(spread, _LEAST_SPREAD_OF_PAIRS)
            x = random_rows(_ROWS, hidden, seed=seed)
            x[:, 0] = x[:, 0].sign() * (1 + x[:, 0].abs())
            yield x, near
    if hidden < experts:
        weight = random_rows(experts, hidden, seed=8)
    # In fp32: a number times a tensor of truths is of the default dtype.
    shifted = (torch.arange(hidden, device="cpu") < experts).float()
    for factor, shift in ((0.1, 0.0), (1.0, -8.0), (2.0, 0.0)):
        yield random_rows(_ROWS, hidden, seed=7) * factor + shift * shifted, weight


def _near_logits(signature: GatingSignature, spread: float, correction: Tensor | None, seed: int) -> Tensor:
    """Logits [rows, experts] by which experts rank in steps of ``spread``, in another order in each row."""
    draw = torch.Generator().manual_seed(seed)
    at = torch.rand((_ROWS, signature.experts), generator=draw, dtype=torch.float64, device="cpu").argsort(1)
    jitter = torch.rand(at.shape, generator=draw, dtype=torch.float64, device="cpu")
    keys = spread * (at + 0.4 * jitter)
    if correction is None:
        return _with_clear_groups(signature, keys.float())
    scores = (0.5 + keys - correction.double()).clamp(0.01, 0.99)
    return _with_clear_groups(signature, torch.logit(scores).float(), correction)


def _with_clear_groups(signature: GatingSignature, logits: Tensor, correction: Tensor | None = None) -> Tensor:
    """Of ``logits``, the rows in which the order of groups is no matter of rounding."""
    if signature.groups == 1:
        return logits
    scores = logits.double().sigmoid() if signature.score == "sigmoid" else logits.double()
    keys = scores if correction is None else scores + correction.double()
    grouped = keys.view(len(keys), signature.groups, -1)
    counted = 2 if signature.score == "sigmoid" else 1
    totals = grouped.topk(counted, dim=2).values.sum(dim=2).sort(dim=1).values
    return logits[(totals.diff(dim=1) > _LEAST_GAP).all(dim=1)]


@contextmanager
def _moved(tensor: Tensor, values: Tensor) -> Iterator[None]:
    """``tensor`` with other values, written where its own are, which come back bit for bit."""
    # By NumPy: no version of the tensor changes for autograd, and tensors of inference mode can be written, too.
    memory = tensor.detach().numpy()
    saved = memory.copy()
    try:
        memory[...] = values.numpy()
        yield
    finally:
        memory[...] = saved


def _by_id(results: Any) -> Any:
    """Logits, weights and ids, with a token's choices by rising id; other results as they are."""
    if not isinstance(results, tuple) or len(results) != 3 or not all(isinstance(r, Tensor) for r in results):
        return results
    logits, weights, ids = results
    if ids.shape != weights.shape or ids.dtype is not torch.int64:
        return results
    ordered, at = ids.sort(dim=-1)
    return logits, weights.gather(-1, at), ordered
