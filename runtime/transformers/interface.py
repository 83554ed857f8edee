"""The one place that knows Transformers: its registry of experts implementations, and what it promises of modules.

A class of experts that Transformers decorates with ``use_experts_implementation`` carries ``has_gate``, ``has_bias``,
``is_transposed``, ``_apply_gate``, ``gate_up_proj``, ``down_proj`` (and ``*_bias``), and calls the function that its
config names. That contract is all that is used here, so that a model need not be known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from tilewright.errors import TilewrightError

IMPLEMENTATION = "tilewright"
"""Name of our experts implementation in Transformers' registry."""

LEAST_VERSION = 5

ExpertsForward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""``forward(module, x [tokens, hidden], topk_ids [tokens, top_k], topk_weights [tokens, top_k])``."""

_PROMISED = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj")


def checked_model(model: object) -> Any:
    """``model``, which must be a ``PreTrainedModel`` of a Transformers that is new enough.

    Raises:
        TilewrightError: when it is not, or Transformers is not installed or too old.

    """
    try:
        import transformers
    except ImportError as error:
        raise TilewrightError(
            "tilewright.runtime.transformers needs Transformers, which is not installed; "
            "pip install 'tilewright[transformers]'"
        ) from error
    if int(transformers.__version__.partition(".")[0]) < LEAST_VERSION:
        raise TilewrightError(
            f"Transformers {transformers.__version__} has no experts interface; install {LEAST_VERSION} or newer"
        )
    if not isinstance(model, transformers.PreTrainedModel):
        raise TilewrightError(
            f"enable and disable take a Transformers model (a PreTrainedModel), not a {type(model).__name__}"
        )
    return model


def register(forward: ExpertsForward) -> None:
    """Make ``forward`` the experts implementation ``tilewright``."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


def experts_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Every module of ``model`` that calls the function its config names, with its name."""
    for name, module in model.named_modules():
        if all(hasattr(module, attribute) for attribute in _PROMISED) and hasattr(module, "config"):
            yield name, module


def implementation_of(module: nn.Module) -> str | None:
    """The experts implementation that the config of ``module`` names."""
    config: Any = module.config
    name: str | None = config._experts_implementation  # noqa: SLF001 - Transformers has no other name for it
    return name


def forward_of(module: nn.Module, implementation: str | None) -> ExpertsForward:
    """What ``module`` would call if its config named ``implementation``; without one, what its class defines."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    registered = None if implementation in (None, IMPLEMENTATION) else ALL_EXPERTS_FUNCTIONS.get(implementation)
    # The decorator keeps the class's own loop, which it calls "eager", under the attribute that functools.wraps sets.
    return cast("ExpertsForward", registered or type(module).forward.__wrapped__)  # type: ignore[attr-defined]
