"""Published measurements in the form that the prediction model takes. Needs $TILEWRIGHT_DATA and pyarrow."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.hardware.devices import DEVICES, Device
from tilewright.codegen.tiled_work import gemm_work
from tilewright.tuner.prediction.model import Ceilings, Launches
from tilewright.tuner.prediction.predict import ceilings, launch_row
from tilewright.tuner.prediction.resources import Resources

DEVICE_KEYS = {"A100": "a100-sxm-40gb", "H100": "h100-sxm"}
_LEAST_US = 8.0
_LEAST_CANDIDATES = 15


def data_folder() -> Path | None:
    """Folder of the published data, or None where $TILEWRIGHT_DATA does not name one."""
    root = os.environ.get("TILEWRIGHT_DATA")
    folder = Path(root) / "perf" if root else None
    return folder if folder and folder.is_dir() else None


@dataclass(frozen=True)
class Candidates:
    """Timed candidates of many problems, side by side."""

    problem: NDArray[np.int64]
    us: NDArray[np.float64]
    config: NDArray[np.str_]
    work: Launches
    ceilings: Ceilings

    def take(self, rows: NDArray[np.bool_]) -> Candidates:
        """Some of them."""
        work = Launches(**{f.name: getattr(self.work, f.name)[rows] for f in fields(Launches)})
        return Candidates(self.problem[rows], self.us[rows], self.config[rows], work, self.ceilings)


def read_candidates(device_name: str) -> Candidates:
    """16-bit GEMM with m >= 16, n, k >= 64, 15 candidates or more, the best of which takes 8 us or more."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    folder = data_folder()
    assert folder is not None
    table = pq.read_table(folder / "triton_mm_candidates.parquet")
    text = {name: pc.cast(table[name], "string") for name in ("device", "mat1_dtype", "choice_kind", "choice")}
    keep = pc.and_(pc.equal(text["device"], device_name), pc.equal(text["choice_kind"], "triton"))
    keep = pc.and_(keep, pc.is_in(text["mat1_dtype"], pc_values("torch.float16", "torch.bfloat16")))
    keep = pc.and_(keep, pc.is_valid(table["ms"]))
    names = ("problem", "m", "n", "k", "BM", "BN", "BK", "stages", "warps", "ms")
    mask = np.asarray(keep)
    columns = {name: np.asarray(table[name])[mask] for name in names}
    choice = np.asarray(text["choice"])[mask].astype(str)
    fits = (columns["m"] >= 16) & (columns["n"] >= 64) & (columns["k"] >= 64)
    fits &= columns["m"].astype(float) * columns["n"] * columns["k"] < 1e13
    columns = {name: column[fits] for name, column in columns.items()}
    return _population(columns, choice[fits], DEVICES[DEVICE_KEYS[device_name]])


def pc_values(*values: str) -> Any:
    """Values to look for."""
    import pyarrow as pa

    return pa.array(values)


def _population(columns: dict[str, Any], choice: NDArray[np.str_], device: Device) -> Candidates:
    """Repeated measurements become their median."""
    keys = np.stack([columns["problem"], np.unique(choice, return_inverse=True)[1]], axis=1)
    unique, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    groups = np.split(columns["ms"][order], np.cumsum(np.bincount(inverse.ravel()))[:-1])
    us = np.array([np.median(group) for group in groups]) * 1e3
    problem = unique[:, 0].astype(np.int64)
    _, index, count = np.unique(problem, return_inverse=True, return_counts=True)
    best = np.full(len(count), np.inf)
    np.minimum.at(best, index, us)
    keep = (count[index] >= _LEAST_CANDIDATES) & (best[index] >= _LEAST_US)
    picked = first[keep]
    sizes = ("m", "n", "k", "BM", "BN", "BK", "stages", "warps")
    rows = []
    for i in picked:
        m, n, k, bm, bn, bk, stages, warps = (int(columns[name][i]) for name in sizes)
        work = gemm_work("gemm", m, n, k, tile=(bm, bn, bk), dtype="fp16")
        rows.append(launch_row(work, Resources.estimated(work, device.arch, warps, stages), device))
    return Candidates(problem[keep], us[keep], choice[picked], Launches.stack(rows), ceilings(device, "fp16"))


def split(data: Candidates, seed: int = 0, most: int = 350) -> tuple[Candidates, Candidates]:
    """Candidates of some problems to fit on, and those of all others."""
    problems = np.random.default_rng(seed).permutation(np.unique(data.problem))
    fitting = np.isin(data.problem, problems[: min(most, len(problems) // 2)])
    return data.take(fitting), data.take(~fitting)


__all__ = ["Candidates", "data_folder", "read_candidates", "replace", "split"]
