"""Databases tuned for the benchmarks' own shapes, made by the command that users run."""

import os
from collections.abc import Sequence
from pathlib import Path

from tilewright.tuner.cli import main as tune

TRIALS = int(os.environ.get("TILEWRIGHT_BENCH_TRIALS", "40"))
"""Per problem; the build cache makes later sizes of a shape cheap. 0: models take the plans that there are."""


def database() -> Path:
    """Where the benchmarks' plans are kept between runs: ``$TILEWRIGHT_BENCH_DB``, or a file in .benchmarks/."""
    path = Path(os.environ.get("TILEWRIGHT_BENCH_DB", ".benchmarks/tuning.db"))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def ensure_tuned(
    problem: str,
    tokens: Sequence[int],
    threads: int,
    *,
    op: str = "moe_gemm",
    trials: int = TRIALS,
    path: Path | None = None,
    options: Sequence[str] = (),
) -> Path:
    """Tune ``problem`` (key=value,...) at all ``tokens``; finished trials of an earlier run count."""
    path = path or database()
    arguments = [*options, "--arch", "native", "--op", op, "--problem", problem, "--resume", "--db", str(path)]
    sizes = ",".join(map(str, tokens))
    code = tune([*arguments, "--tokens", sizes, "--threads", str(threads), "--trials", str(trials)])
    if code != 0:
        raise RuntimeError(f"tuning {problem} ended with exit code {code}")
    return path


def ensure_tuned_model(
    folder: Path, tokens: Sequence[int], threads: int, *, op: str, trials: int = TRIALS, more: Sequence[str] = ()
) -> Path:
    """Tune ops of the model in ``folder`` at all ``tokens``, as :func:`ensure_tuned` does a problem."""
    if not trials:
        return database()
    arguments = ["--arch", "native", "--op", op, "--model", str(folder), "--resume", "--db", str(database())]
    sizes = ",".join(map(str, tokens))
    code = tune([*arguments, "--tokens", sizes, "--threads", str(threads), "--trials", str(trials), *more])
    if code != 0:
        raise RuntimeError(f"tuning {folder} ended with exit code {code}")
    return database()
