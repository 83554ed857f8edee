"""Asks a child process what a model is made of, so that this one imports no Transformers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.models.parts import AttentionLayers, ExpertLayers, LeftOut, LinearLayers, RouterLayers
from tilewright.codegen.workers.process import WorkerLostError, WorkerProcess
from tilewright.errors import TilewrightError

_START_LIMIT_S = 120.0
_LIMIT_S = 120.0
"""For a config: the largest models of today take seconds."""

_PARTS: Mapping[str, type[Any]] = {
    "experts": ExpertLayers,
    "routers": RouterLayers,
    "attention": AttentionLayers,
    "linears": LinearLayers,
    "left_out": LeftOut,
}


def inspect_config(name: str, config: Mapping[str, Any], source: str) -> ModelShape | str:
    """Shape of the model that the installed Transformers builds from ``config``; why it builds none, in words.

    Args:
        name: of the model.
        config: a parsed ``config.json``.
        source: how error messages name the file.

    Raises:
        TilewrightError: when Transformers has a class for it that refuses it or that cannot be understood.

    """
    if importlib.util.find_spec("transformers") is None:
        return "pip install 'tilewright[transformers]', whose classes say what a model is made of"
    answer = json.loads(_ask(json.dumps(config), source))
    if "unknown" in answer:
        return f"{answer['unknown']}; install a Transformers that has it"
    if "error" in answer:
        raise TilewrightError(f"{source}: {answer['error']}")
    return shape_of(name, answer["shape"])


def shape_of(name: str, fields: Mapping[str, Any]) -> ModelShape:
    """The shape from its plain data.

    Raises:
        TilewrightError: for sizes that no model has.

    """
    parts = {key: tuple(kind(**each) for each in fields[key]) for key, kind in _PARTS.items()}
    return ModelShape(name=name, **{**fields, **parts})


@lru_cache(maxsize=8)
def _ask(config: str, source: str) -> str:
    worker = WorkerProcess("tilewright.codegen.models.inspection.worker", start_limit_s=_START_LIMIT_S)
    try:
        return json.dumps(worker.ask({"config": json.loads(config)}, limit_s=_LIMIT_S))
    except WorkerLostError as error:
        raise TilewrightError(f"{source}: the model could not be built on the meta device: {error}") from error
    finally:
        worker.close()
