"""Reads expert ids that were recorded from a running model."""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.errors import TilewrightError
from tilewright.reading import open_file, read_file

_MOST_BYTES = 256 << 20
_MOST_TEXT_BYTES = 32 << 20
"""Of text, whose numbers take many times as much memory."""

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
            case ".npy":
                return _read_array(io.BytesIO(read_file(path, _MOST_BYTES)), _MOST_BYTES)
            case ".npz":
                return _read_archive(path)
            case ".json":
                content = json.loads(read_file(path, _MOST_TEXT_BYTES))
                return np.asarray(content[ARRAY_NAME] if isinstance(content, dict) else content)
            case _:
                return _parse_text(read_file(path, _MOST_TEXT_BYTES).decode())
    except OSError as error:
        raise _error(str(path), f"cannot be read ({error.strerror or error})") from error
    except KeyError as error:
        raise _error(str(path), f"has no array named {ARRAY_NAME!r}") from error
    except Exception as error:  # whatever numpy, zip and JSON raise for what they were not written for
        # numpy explains over several lines what its users could do.
        reason = " ".join((str(error) or type(error).__name__).split())
        raise _error(str(path), f"does not hold one row of expert ids per token ({reason:.200})") from error


def _read_archive(path: Path) -> NDArray[Any]:
    """The one array, or that of the name, of an archive as numpy writes it."""
    with open_file(path, _MOST_BYTES) as file, zipfile.ZipFile(file) as archive:
        members = {each.filename.removesuffix(".npy"): each for each in archive.infolist()}
        chosen = next(iter(members.values())) if len(members) == 1 else members[ARRAY_NAME]
        if chosen.file_size > _MOST_BYTES:
            raise ValueError(f"its array has {chosen.file_size} bytes")
        with archive.open(chosen) as member:
            # What an archive says about its members need not be so.
            return _read_array(io.BytesIO(member.read(_MOST_BYTES)), _MOST_BYTES)


def _read_array(file: io.BytesIO, most_bytes: int) -> NDArray[Any]:
    """An array in numpy's format, of which not more is made than the file holds."""
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if header is None:
        raise ValueError(f"it is in version {version} of numpy's format")
    shape, _, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which could run anything")
    if math.prod(shape) * dtype.itemsize > min(most_bytes, file.getbuffer().nbytes - file.tell()):
        raise ValueError(f"it ends before its {dtype} of shape {shape} do")
    file.seek(0)
    return np.asarray(np.load(file, allow_pickle=False))


def _parse_text(text: str) -> NDArray[Any]:
    lines = (line.replace(",", " ").split() for line in text.splitlines())
    return np.asarray([[int(word) for word in line] for line in lines if line])


def _error(path: str, message: str) -> TilewrightError:
    return TilewrightError(f"the recorded routing {path!r} {message}")
