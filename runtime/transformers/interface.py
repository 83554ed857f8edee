"""The one place that knows Transformers: its registries of implementations, and what it promises of modules.

A class of experts that Transformers decorates with ``use_experts_implementation`` carries ``has_gate``, ``has_bias``,
``is_transposed``, ``_apply_gate``, ``gate_up_proj``, ``down_proj`` (and ``*_bias``), and calls the function that its
config names. Attention modules carry ``is_causal``, ``scaling``, ``num_key_value_groups`` and ``layer_idx``, and call
the attention function that their config names. Those contracts are all that is used here, so that a model need not be
known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from tilewright.errors import TilewrightError

IMPLEMENTATION = "tilewright"
"""Name of our experts implementation, and of our attention implementation, in Transformers' registries."""

LEAST_VERSION = 5
REPLACED_ATTENTION = "sdpa"
"""The attention implementation whose calls ours takes. Whoever chose another one keeps it."""

ExpertsForward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""``forward(module, x [tokens, hidden], topk_ids [tokens, top_k], topk_weights [tokens, top_k])``."""

AttentionForward = Callable[..., tuple[Tensor, None]]
"""``forward(module, query, key, value, attention_mask, **options)``, all [batch, heads, tokens, dim]."""

_PROMISED = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj")
_PROMISED_OF_ATTENTION = ("is_causal", "scaling", "num_key_value_groups", "layer_idx")


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


def register_attention(forward: AttentionForward) -> None:
    """Make ``forward`` the attention implementation ``tilewright``, which gets the masks that ``sdpa`` gets."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS[REPLACED_ATTENTION])


def sdpa() -> AttentionForward:
    """What Transformers calls by the name ``sdpa``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return cast("AttentionForward", ALL_ATTENTION_FUNCTIONS[REPLACED_ATTENTION])


def attention_modules(model: Any, implementation: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module of ``model`` that calls the attention function its config names, where that is as given."""
    for name, module in model.named_modules():
        promises = all(hasattr(module, attribute) for attribute in _PROMISED_OF_ATTENTION)
        if promises and hasattr(module, "config") and attention_implementation(module) == implementation:
            yield name, module


def attention_implementation(module: nn.Module) -> str | None:
    """The attention implementation that the config of ``module`` names."""
    config: Any = module.config
    name: str | None = config._attn_implementation  # noqa: SLF001 - Transformers has no other name for it
    return name


def choose_attention(modules: Iterable[nn.Module], implementation: str) -> None:
    """Have the configs of ``modules`` name ``implementation``; other parts of their model keep what they have."""
    for module in modules:
        config: Any = module.config
        config._attn_implementation = implementation  # noqa: SLF001 - Transformers has no other name for it


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
