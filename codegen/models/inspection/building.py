"""From a config to a model on the meta device, of the class that the installed Transformers has for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

from tilewright.codegen.models.config import NESTED, TOP_K_KEYS
from tilewright.errors import TilewrightError

LEAST_VERSION = 5
"""Of Transformers: from there on, experts and attention call functions that their config names."""

_ESSENTIAL = (
    ("hidden_size",),
    ("num_hidden_layers",),
    ("num_attention_heads",),
    ("vocab_size",),
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    TOP_K_KEYS,
    ("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "expert_ffn_hidden_size"),
)
"""What a config must say itself, by one of its names: defaults of a class are those of some published model."""
_PARTS_OF_CONFIGS = (*NESTED, "attn_config", "ffn_config")
_REACHES_OUT = frozenset(
    {
        "auto_map",
        "attn_implementation",
        "experts_implementation",
        "quantization_config",
        "use_kernels",
        "dtype",
        "torch_dtype",
    }
)
"""Fields that name code to be fetched or numbers to be kept in; no shape depends on them."""
_GENERATING = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")


class UnknownClassError(Exception):
    """The installed Transformers has no class for the model."""


def build(config: Mapping[str, Any], implementation: str) -> tuple[Any, list[str]]:
    """The model that ``config`` describes, on the meta device and in evaluation mode.

    Where Transformers has a class for its language model alone, that; then the names of the other parts' configs.

    Args:
        config: a parsed ``config.json``. Code that it names is not run, and nothing is fetched.
        implementation: name of the attention and the experts function that the model is to call.

    Raises:
        UnknownClassError: when no class is known for it.
        TilewrightError: when its class refuses it.

    """
    plain = _without_code(config)
    cls, fields = _class_for(plain)
    parsed = _parse(cls, fields)
    if getattr(parsed, "is_encoder_decoder", False):
        raise TilewrightError(f"{cls.__name__} is an encoder with a decoder; give a model that continues a text")
    _require_essential(parsed, plain)
    try:
        with torch.device("meta"), torch.no_grad():
            model = cls._from_config(
                parsed, attn_implementation=implementation, experts_implementation=implementation, dtype=torch.float32
            )
    except Exception as error:
        raise TilewrightError(f"{cls.__name__} refuses this config: {_first_line(error)}") from error
    return model.eval(), _beside(plain, fields)


def _beside(config: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """Configs of parts that stand beside ``fields``, the part of ``config`` that a class was found for."""
    if fields is config:
        return []
    inner = next(config[key] for key in NESTED if isinstance(config.get(key), Mapping))
    here = [name for name, value in config.items() if name.endswith("_config") and name not in NESTED and value]
    return [*here, *(_beside(inner, fields) if inner is not fields else ())]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in config.items() if key not in _REACHES_OUT and not key.startswith("_")}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        # So Transformers writes an infinity, which JSON does not have.
        infinite = set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity")
        return float(value["__float__"]) if infinite else _without_code(value)
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _class_for(config: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """The class that the config names, else that for its ``model_type``, else that for its language model.

    Then the part of the config that it is for.
    """
    kind = config.get("model_type")
    known = kind in configuration_auto.CONFIG_MAPPING_NAMES
    for name in config.get("architectures") or ():
        cls = _generating_class(name)
        # A checkpoint with code of its own may use the name of a class that reads other fields.
        if cls is not None and (not known or cls.config_class.model_type == kind):
            return cls, _part_for(cls, config)
    for mapping in _GENERATING:
        name = getattr(modeling_auto, mapping).get(kind)
        cls = _generating_class(name[0] if isinstance(name, tuple) else name)
        if cls is not None:
            return cls, _part_for(cls, config)
    for key in NESTED:
        if isinstance(inner := config.get(key), Mapping):
            return _class_for(inner)
    raise UnknownClassError(
        f"the installed Transformers {transformers.__version__} has no class that continues a text for the model_type "
        f"{kind!r}"
    )


def _generating_class(name: object) -> Any:
    if not isinstance(name, str) or not name.isidentifier():
        return None
    found = getattr(transformers, name, None)
    if not inspect.isclass(found) or not issubclass(found, transformers.PreTrainedModel):
        return None
    cls: Any = found
    generates = getattr(cls, "config_class", None) is not None and hasattr(cls, "generate")
    return cls if generates and cls.forward is not torch.nn.Module.forward else None


def _part_for(cls: Any, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``config``, or that of its language model: a class of that alone may be all there is for one that also sees."""
    if getattr(cls.config_class, "sub_configs", None):
        return config
    return next((config[key] for key in NESTED if isinstance(config.get(key), Mapping)), config)


def _parse(cls: Any, fields: Mapping[str, Any]) -> Any:
    """The config as its class reads it; lists of equal values, one for each layer, stand for the value if need be."""
    kind = cls.config_class
    try:
        return kind.from_dict({name: value for name, value in fields.items() if name != "model_type"})
    except Exception as error:
        try:
            return kind.from_dict({n: _uniform(v) for n, v in fields.items() if n != "model_type"})
        except Exception:
            raise TilewrightError(f"{kind.__name__} refuses this config: {_first_line(error)}") from error


def _uniform(value: Any) -> Any:
    if isinstance(value, list) and len(value) > 1 and all(isinstance(v, int) and v == value[0] for v in value):
        return value[0]
    return value


def _require_essential(parsed: Any, config: Mapping[str, Any]) -> None:
    """What the class fills in must not stand for what the file forgot."""
    text = parsed.get_text_config()
    aliases = cast("Mapping[str, str]", text.attribute_map)
    given = set(_names(config))
    for names in _ESSENTIAL:
        spellings = {*names, *(aliases.get(name, name) for name in names)}
        filled_in = [name for name in names if _is_size(getattr(text, name, None)) and not _derived(type(text), name)]
        if filled_in and not spellings & given:
            name = next((each for each in filled_in if each not in aliases), filled_in[0])
            raise TilewrightError(f"the field {name!r} is missing; use a complete config.json")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value > 1


def _derived(kind: Any, name: str) -> bool:
    """Whether the class computes the field from others."""
    return isinstance(inspect.getattr_static(kind, name, None), property)


def _names(config: Mapping[str, Any]) -> list[str]:
    return [
        name
        for key, value in config.items()
        for name in (key, *(_names(value) if key in _PARTS_OF_CONFIGS and isinstance(value, Mapping) else ()))
    ]
