"""From what users name a model by to its shape: presets, and any Hugging Face ``config.json``."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewright.codegen.models.families import shape_of_family
from tilewright.codegen.models.inspection.process import inspect_config
from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.models.presets import PRESETS
from tilewright.errors import TilewrightError

_LARGEST_CONFIG_BYTES = 1 << 24


def load_model(name_or_path: str | os.PathLike[str], tp: int = 1, ep: int = 1) -> ModelShape:
    """Shape of one rank of a model.

    A preset's fields are known. A file is given to the class of the installed Transformers, which says what it is made
    of; without Transformers, it has to be of a family that was checked against it.

    Args:
        name_or_path: a preset's name in any case, a Hugging Face ``config.json``, a folder that holds one, or a
            safetensors file beside one. A preset wins over a file of the same name (``./name`` means the file).
        tp: ranks that share every expert.
        ep: ranks that share the set of experts.

    Raises:
        TilewrightError: for an unknown preset, a file that is missing, malformed or not understood, and for ``tp`` and
            ``ep`` that do not divide the model.

    """
    text = os.fspath(name_or_path)
    if text.lower() in PRESETS:
        name = text.lower()
        return shape_of_family(name, PRESETS[name], f"preset {name}", "").sharded(tp, ep)
    path = _config_path(text)
    # A config is nearly always called config.json, so the folder is what tells models apart.
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    config, source = _read_json(path), str(path)
    shape = inspect_config(name, config, source)
    return (shape_of_family(name, config, source, shape) if isinstance(shape, str) else shape).sharded(tp, ep)


def _config_path(text: str) -> Path:
    path = Path(text)
    try:
        if path.is_file() and path.name.endswith((".safetensors", ".safetensors.index.json")):
            path = path.parent
        if path.is_file():
            return path
        if path.is_dir():
            return _config_in(path)
    except OSError as error:  # a folder on the way that may not be searched, a name that is too long
        raise TilewrightError(f"cannot look for the model {text!r}: {error.strerror}; check the path") from error
    except ValueError as error:  # a null character
        raise TilewrightError(f"the model {text!r} is no path: {error}") from error
    if path.suffix == ".json":
        raise TilewrightError(f"the model config {text!r} does not exist; check the path")
    # The last part alone, so that the repository's name (Qwen/Qwen3-30B-A3B) finds its preset too.
    close = difflib.get_close_matches(text.lower().rsplit("/", 1)[-1], PRESETS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise TilewrightError(
        f"unknown model {text!r}: {hint}give one of {', '.join(PRESETS)}, or the path of a Hugging Face config.json"
    )


def _config_in(folder: Path) -> Path:
    path = folder / "config.json"
    if path.is_file():
        return path
    found = "no config.json"
    if any(folder.glob("*.safetensors")):
        found = "weights, but no config.json to say how many experts a token picks"
    raise TilewrightError(f"the folder {str(folder)!r} holds {found}; give the folder of a Hugging Face model")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_CONFIG_BYTES + 1)
        if len(text) > _LARGEST_CONFIG_BYTES:
            raise TilewrightError(f"the model config {path} is larger than any config; give a config.json")
        config = json.loads(text.decode())
    except OSError as error:
        raise TilewrightError(f"cannot read the model config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise TilewrightError(f"the model config {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise TilewrightError(f"the model config {path} must hold a JSON object, not a {type(config).__name__}")
    return config
