"""Reads expert ids that were recorded from a running model."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.errors import TilewrightError

ARRAY_NAME = "topk_ids"
"""Name of the ids in a file that holds several arrays."""


def read_recorded_ids(path: str, experts: int, top_k: int) -> NDArray[np.int32]:
    """Read the recorded experts of every token.

    The file's suffix says how to read it: ``.npy``; ``.npz`` (its only array, or ``topk_ids``); ``.json`` (a list of
    lists, bare or under ``topk_ids``); any other is text with one token per line, ids separated by commas or blanks.

    Args:
        path: the file.
        experts: experts of the whole model; ids go from 0 to ``experts - 1``.
        top_k: ids per token.

    Returns:
        int32 [recorded tokens, top_k], the ids of a row being distinct, at least one row.

    Raises:
        TilewrightError: when the file cannot be read or does not fit the model.

    """
    ids = _read(Path(path))
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise _error(path, f"holds {ids.dtype} of shape {ids.shape}, but must hold integers of shape [tokens, top_k]")
    if ids.shape[1] != top_k:
        raise _error(path, f"holds {ids.shape[1]} ids per token, but the model picks {top_k} experts per token")
    outside = np.argwhere((ids < 0) | (ids >= experts))
    if len(outside):
        token, slot = outside[0]
        raise _error(path, f"token {token} picks expert {ids[token, slot]}, but ids go from 0 to {experts - 1}")
    in_order = np.sort(ids, axis=1)
    twice = np.flatnonzero((in_order[:, 1:] == in_order[:, :-1]).any(axis=1))
    if len(twice):
        raise _error(path, f"token {twice[0]} picks the same expert twice: {ids[twice[0]].tolist()}")
    return ids.astype(np.int32)


def _read(path: Path) -> NDArray[Any]:
    try:
        match path.suffix.lower():
            case ".npy" | ".npz":
                return _read_numpy(path)
            case ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                return np.asarray(content[ARRAY_NAME] if isinstance(content, dict) else content)
            case _:
                return _parse_text(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _error(str(path), f"cannot be read ({error.strerror or error})") from error
    except KeyError as error:
        raise _error(str(path), f"has no array named {ARRAY_NAME!r}") from error
    except (ValueError, OverflowError, RecursionError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _error(str(path), f"does not hold one row of expert ids per token ({error})") from error


def _read_numpy(path: Path) -> NDArray[Any]:
    # Opened here, because numpy leaves a file open that it opened itself and found to be damaged.
    with path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        only = loaded.files[0] if len(loaded.files) == 1 else ARRAY_NAME
        return np.asarray(loaded[only])


def _parse_text(text: str) -> NDArray[Any]:
    lines = (line.replace(",", " ").split() for line in text.splitlines())
    return np.asarray([[int(word) for word in line] for line in lines if line])


def _error(path: str, message: str) -> TilewrightError:
    return TilewrightError(f"the recorded routing {path!r} {message}")
