"""How close to the best config each search comes within a budget, replayed on recorded spaces; needs no GPU.

    TILEWRIGHT_DATA=<folder> python benchmarks/bench_search.py [--seeds 3] [--spaces gemm]

A recorded space holds every config's measured time, so that a search can be replayed in seconds. Printed is the
fraction of optimum (best time in the space / best time found): per space the median over seeds, below that its mean
over the spaces.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tilewright.codegen.space import Parameter, Space
from tilewright.tuner.search import SEARCHES, make_search

BUDGETS = (25, 50, 100)


@dataclass(frozen=True)
class RecordedSpace:
    """A space with every config's time in ms (float64 [configs], nan where it failed)."""

    name: str
    space: Space
    time_ms: npt.NDArray[np.float64]


def recorded_spaces(folder: Path, name_contains: str) -> Iterator[RecordedSpace]:
    for path in sorted(folder.glob("*.npz")):
        if name_contains in path.stem:
            with np.load(path) as data:
                meta = json.loads(str(data["meta"]))
                values = zip(meta["params"], meta["values"], strict=True)
                parameters = tuple(Parameter(name, tuple(v), "") for name, v in values)
                space = Space(parameters, data["idx"].astype(np.int16))
                yield RecordedSpace(path.stem, space, data["time"].astype(float))


def replay(search_name: str, recorded: RecordedSpace, seed: int) -> tuple[list[float], float]:
    """Fraction of optimum after each budget, and the mean time of one ask and tell in ms."""
    search = make_search(search_name, recorded.space, seed=seed, budget=max(BUDGETS))
    optimum, best, spent_s = float(np.nanmin(recorded.time_ms)), math.inf, 0.0
    fractions = []
    for tried in range(1, max(BUDGETS) + 1):
        start = time.perf_counter()
        config = search.ask()
        spent_s += time.perf_counter() - start
        time_ms = float(recorded.time_ms[recorded.space.index_of(config)])
        failed = math.isnan(time_ms)
        start = time.perf_counter()
        search.tell(config, None if failed else time_ms * 1e3)
        spent_s += time.perf_counter() - start
        best = best if failed else min(best, time_ms)
        if tried in BUDGETS:
            fractions.append(optimum / best)
    return fractions, spent_s / max(BUDGETS) * 1e3


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3, help="runs of each search on each space (default 3)")
    options.add_argument("--spaces", default="", help="only spaces whose name contains this")
    arguments = options.parse_args()
    if "TILEWRIGHT_DATA" not in os.environ:
        print("skipped: TILEWRIGHT_DATA does not name the folder that holds recorded_spaces/*.npz", file=sys.stderr)
        return 0
    folder = Path(os.environ["TILEWRIGHT_DATA"]) / "recorded_spaces"
    spaces = list(recorded_spaces(folder, arguments.spaces))
    if not spaces:
        print(f"no recorded space in {folder} has {arguments.spaces!r} in its name", file=sys.stderr)
        return 1

    print(f"{'space':<28}{'search':<8}" + "".join(f"{f'@{b}':>8}" for b in BUDGETS) + f"{'ms a try':>10}")
    rows: dict[str, list[list[float]]] = {name: [] for name in SEARCHES}
    for recorded in spaces:
        for name in SEARCHES:
            runs = [replay(name, recorded, seed) for seed in range(arguments.seeds)]
            medians = [statistics.median(fractions[i] for fractions, _ in runs) for i in range(len(BUDGETS))]
            rows[name].append([*medians, statistics.mean(ms for _, ms in runs)])
            print(line(recorded.name, name, rows[name][-1]), flush=True)
    for name, results in rows.items():
        print(line(f"mean of {len(spaces)}", name, [statistics.mean(column) for column in zip(*results, strict=True)]))
    return 0


def line(space: str, search: str, numbers: list[float]) -> str:
    *fractions, ms = numbers
    return f"{space:<28}{search:<8}" + "".join(f"{f:>8.3f}" for f in fractions) + f"{ms:>10.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
