"""How close to the best config each search comes within a budget, replayed on recorded spaces; needs no GPU.

    TILEWRIGHT_DATA=<folder> OMP_NUM_THREADS=1 python benchmarks/bench_search.py [--seeds 3] [--spaces gemm]
                             [--searches gp,optuna:GPSampler]

A recorded space holds every config's measured time, so that a search can be replayed in seconds. Printed is the
fraction of optimum (best time in the space / best time found): per space the median over seeds, below that its mean
over the spaces. "gp warm" is given, as priors, what a search of 60 tries found in the other spaces of the same kernel.
Every search is an Optuna sampler, asked and told through a study; Optuna's own propose, and the nearest valid config
that was not tried yet is what counts. Its GPSampler, which needs torch, takes a hundred times as long as the others
together, so it is left out unless it is named.
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
import optuna
from optuna.trial import TrialState

from tilewright.codegen.space import Config, Parameter, Space
from tilewright.tuner.search import SEARCHES, EnumeratedSampler, Prior, config_of, distributions_of, make_sampler

BUDGETS = (25, 50, 100)
WARM = "gp warm"
PRIOR_TRIES = 60


@dataclass(frozen=True)
class RecordedSpace:
    """A space with every config's time in ms (float64 [configs], nan where it failed)."""

    name: str
    kernel: str
    space: Space
    time_ms: npt.NDArray[np.float64]

    def time_us(self, config: Config) -> float | None:
        time_ms = float(self.time_ms[self.space.index_of(config)])
        return None if math.isnan(time_ms) else time_ms * 1e3


def recorded_spaces(folder: Path, name_contains: str) -> Iterator[RecordedSpace]:
    for path in sorted(folder.glob("*.npz")):
        if name_contains in path.stem:
            with np.load(path) as data:
                meta = json.loads(str(data["meta"]))
                values = zip(meta["params"], meta["values"], strict=True)
                parameters = tuple(Parameter(name, tuple(v), "") for name, v in values)
                space = Space(parameters, data["idx"].astype(np.int16))
                yield RecordedSpace(path.stem, meta["kernel"], space, data["time"].astype(float))


def replay(
    sampler: EnumeratedSampler, recorded: RecordedSpace, tries: int
) -> tuple[list[tuple[Config, float | None]], float]:
    """What was tried, and the mean time of one ask and tell in ms."""
    study = optuna.create_study(sampler=sampler)
    distributions = distributions_of(recorded.space.parameters)
    tried, spent_s = [], 0.0
    for _ in range(tries):
        start = time.perf_counter()
        trial = study.ask(distributions)
        config = config_of(recorded.space, trial.params)
        spent_s += time.perf_counter() - start
        time_us = recorded.time_us(config)
        tried.append((config, time_us))
        start = time.perf_counter()
        study.tell(trial, time_us, state=TrialState.FAIL if time_us is None else TrialState.COMPLETE)
        spent_s += time.perf_counter() - start
    return tried, spent_s / tries * 1e3


def contender(name: str, recorded: RecordedSpace, neighbours: list[RecordedSpace], seed: int) -> EnumeratedSampler:
    priors = []
    if name == WARM:
        for neighbour in neighbours:
            sampler = make_sampler("gp", neighbour.space, seed=1000 + seed, budget=PRIOR_TRIES)
            tried, _ = replay(sampler, neighbour, PRIOR_TRIES)
            priors.append(Prior(neighbour.name, tuple((c, time_us) for c, time_us in tried if time_us is not None)))
    return make_sampler("gp" if name == WARM else name, recorded.space, seed=seed, budget=max(BUDGETS), priors=priors)


def fractions_of_optimum(recorded: RecordedSpace, tried: list[tuple[Config, float | None]]) -> list[float]:
    optimum_us = float(np.nanmin(recorded.time_ms)) * 1e3
    found_us = [min((t for _, t in tried[:budget] if t is not None), default=math.inf) for budget in BUDGETS]
    return [optimum_us / t for t in found_us]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3, help="runs of each search on each space (default 3)")
    options.add_argument("--spaces", default="", help="only spaces whose name contains this")
    usual = ",".join((WARM, *SEARCHES))
    options.add_argument("--searches", default=usual, help=f"any of tune --search, and {WARM} (default {usual})")
    arguments = options.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if "TILEWRIGHT_DATA" not in os.environ:
        print("skipped: TILEWRIGHT_DATA does not name the folder that holds recorded_spaces/*.npz", file=sys.stderr)
        return 0
    folder = Path(os.environ["TILEWRIGHT_DATA"]) / "recorded_spaces"
    spaces = list(recorded_spaces(folder, arguments.spaces))
    if not spaces:
        print(f"no recorded space in {folder} has {arguments.spaces!r} in its name", file=sys.stderr)
        return 1

    print(f"{'space':<28}{'search':<18}" + "".join(f"{f'@{b}':>8}" for b in BUDGETS) + f"{'ms a try':>10}")
    rows: dict[str, list[list[float]]] = {name: [] for name in arguments.searches.split(",")}
    for recorded in spaces:
        neighbours = [other for other in spaces if other.kernel == recorded.kernel and other is not recorded]
        for name in rows:
            runs = []
            for seed in range(arguments.seeds):
                sampler = contender(name, recorded, neighbours, seed)
                tried, ask_and_tell_ms = replay(sampler, recorded, max(BUDGETS))
                runs.append([*fractions_of_optimum(recorded, tried), ask_and_tell_ms])
            *fractions, times_ms = zip(*runs, strict=True)
            rows[name].append([*map(statistics.median, fractions), statistics.mean(times_ms)])
            print(line(recorded.name, name, rows[name][-1]), flush=True)
    for name, results in rows.items():
        print(line(f"mean of {len(spaces)}", name, [statistics.mean(column) for column in zip(*results, strict=True)]))
    return 0


def line(space: str, search: str, numbers: list[float]) -> str:
    *fractions, ms = numbers
    return f"{space:<28}{search:<18}" + "".join(f"{f:>8.3f}" for f in fractions) + f"{ms:>10.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
