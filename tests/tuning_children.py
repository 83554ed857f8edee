"""Processes that tune, read and serve, for tests that kill them or run them side by side."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.codegen.hardware.archs import native_arch
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.runtime import ServeOptions
from tilewright.tuner.campaign.campaign import Campaign, Request
from tilewright.tuner.campaign.loop import ProblemResult
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.cli import main
from tilewright.tuner.targets.cpu import CpuTarget
from tilewright.tuning_db.store import Store

# Children come from a server that has imported everything and has no threads, so that they start in milliseconds. The
# runtime is left out: it runs no threads in a child that was forked after it was imported.
# There is one such server for all tests, and who loads last says what it imports: hence the list of all of them.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    [
        "tuning_children",
        "tilewright.tuning_db.store",
        "tilewright.tuning_db.reader",
        "torch",
    ]
)

FIELDS = "stage=up,experts=4,n=48,k=40,top_k=2"
"""Small enough for a batch to be built, checked and raced in about a second."""
SIZES = (1, 5)


def problems() -> tuple[Problem, ...]:
    op, routing = find_op("moe_gemm"), RoutingSpec.parse("balanced")
    fields = dict(pair.split("=") for pair in FIELDS.split(","))
    return tuple(op.parse_problem({**fields, "tokens": str(tokens)}, routing) for tokens in SIZES)


class Acknowledged(Progress):
    """Says to the parent how many trials a problem has once they are stored."""

    def __init__(self, results: Connection) -> None:
        super().__init__(None)
        self._results = results

    def batch_done(self, result: ProblemResult, trials: int) -> None:
        super().batch_done(result, trials)
        self._results.send((result.problem.key, result.trials))


def tune(database: Path, trials: int, time_s: float, seed: int, results: Connection) -> None:
    """What ``tune --resume`` does; sends numbers of trials while it works, and the number of its plans at the end."""
    request = Request(
        op=find_op("moe_gemm"),
        problems=problems(),
        target=CpuTarget(native_arch(), 1),
        trials=trials,
        time_s=time_s,
        search="random",
        seed=seed,
        resume=True,
        model="",
        probes=0,
    )
    with Store.open(database) as store:
        report = Campaign(request, store, Acknowledged(results)).run()
    results.send(("plans", sum(mine.plan is not None for mine in report.signatures)))


def read(words: list[str], done: Event, results: Connection) -> None:
    """Run a reading command again and again; sends how often and what it printed last."""
    count, text = 0, ""
    while not done.is_set():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(words) == 0
        count, text = count + 1, out.getvalue()
    results.send((count, text))


def serve(database: Path, done: Event, results: Connection) -> None:
    """Prepare and call again and again; sends how often a result was right, and by what it was served last."""
    count, served = 0, ""
    while not done.is_set():
        served = served_result(database)
        count += 1
    results.send((count, served))


def served_result(database: Path) -> str:
    """Call what the plan says for the largest size, hold it against the reference, and return its explanation."""
    import torch

    from tilewright.runtime import TilewrightWarning, prepare

    op, problem = find_op("moe_gemm"), problems()[-1]
    weights, inputs = op.weights(problem.signature, 0), op.inputs(problem, 0)
    expected = op.reference(problem.signature, weights, inputs)["out"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TilewrightWarning)  # there is no plan yet
        call = prepare(
            torch.from_numpy(weights["weight"]),
            stage="up",
            top_k=2,
            options=ServeOptions(threads=1, database=str(database)),
        )
    out = torch.empty(expected.shape)
    specs = [spec.name for spec in op.tensors(problem.signature) if spec.role != "weight"][:-1]
    call(*(torch.from_numpy(inputs[name]) for name in specs), out)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-3, atol=1e-4)
    return str(call.explain())


def start(target: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """A process that runs ``target(*arguments, sending end)``, and the receiving end."""
    receiving, sending = CHILDREN.Pipe(duplex=False)
    process = CHILDREN.Process(target=target, args=(*arguments, sending))
    process.start()
    sending.close()
    return process, receiving


def finish(process: BaseProcess, results: Connection) -> Any:
    """The last thing that a process sends, once it has ended well."""
    result = None
    with contextlib.suppress(EOFError):
        while True:
            result = results.recv()
    process.join(30)
    assert process.exitcode == 0  # pytest shows what it printed
    return result


def workers_of(tuner: int) -> list[int]:
    """Processes that measure for a tuner, by its process number."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"tilewright.tuner.evaluation.cpu.worker" in words and str(tuner).encode() in words:
                found.append(int(path.parent.name))
    return found


def kill_9(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
