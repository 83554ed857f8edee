"""From the words of ``tune --arch A --op O`` to what a campaign is asked for: one request per arch and op."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tilewright.codegen.hardware.archs import Arch, GpuArch, find_arch, runs_on
from tilewright.codegen.hardware.cpu_info import read_cpu_info, usable_cores
from tilewright.codegen.hardware.devices import Device, find_device
from tilewright.codegen.models.shapes import ModelShape, load_model
from tilewright.codegen.numbers.precisions import LOSSLESS, parse_precisions
from tilewright.codegen.ops.base import OpDeclaration, Problem
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.campaign import Request
from tilewright.tuner.campaign.precision import DEFAULT_MAX_ERROR, storable
from tilewright.tuner.campaign.progress import ENDLESS_TRIALS
from tilewright.tuner.search import SEARCHES

DEFAULT_MODEL = "mixtral-8x7b"
DEFAULT_TRIALS = 60
DEFAULT_TIME_S = 100.0
DEFAULT_GPU_TRIALS = 40
DEFAULT_GPU_TIME_S = 480.0
DEFAULT_PROBES = 4
ALL_OPS = "all"
_MAX_SEED = 2**32 - 1


def parse_model(arguments: argparse.Namespace) -> ModelShape | None:
    """The model that is meant; None where problems are given one by one.

    Raises:
        TilewrightError: for a model that is not known, or that ranks do not divide.

    """
    if arguments.problem:
        return None
    return load_model(DEFAULT_MODEL if arguments.model is None else arguments.model, tp=arguments.tp, ep=arguments.ep)


def parse_requests(
    arguments: argparse.Namespace, model: ModelShape | None, warn: Callable[[str], None]
) -> list[Request]:
    """One request for every arch and op that was named; those of one arch share its time by their problems.

    Args:
        arguments: as parsed.
        model: of all ops; None where problems are given one by one.
        warn: told of what is not as it was asked for, but can go on.

    Raises:
        TilewrightError: for input that cannot be tuned.

    """
    archs = [find_arch(name) for name in _names(arguments.arch)]
    if arguments.device is not None and len(archs) > 1:
        raise TilewrightError("--device names a product of one arch; give one --arch with it")
    names = _op_names(arguments.op)
    if len(names) > 1:
        for option in ("problem", "template"):
            if getattr(arguments, option):
                raise TilewrightError(
                    f"--{option} is one op's own; name that op alone with --op instead of {arguments.op}"
                )
    requests = []
    for arch in dict.fromkeys(archs):
        device = _device(arguments, arch, warn)
        requests += _of_arch(arguments, names, model, arch, device, warn)
    return requests


def _of_arch(
    arguments: argparse.Namespace,
    names: Sequence[str],
    model: ModelShape | None,
    arch: Arch,
    device: Device | None,
    warn: Callable[[str], None],
) -> list[Request]:
    requests = []
    for name in names:
        try:
            request = _request(arguments, find_op(name), model, arch, device)
        except _LeftOutError as error:
            # Asked for by name, it is a mistake; as a part of everything, it is what is done without.
            if arguments.op != ALL_OPS:
                raise
            warn(f"{name} is left out: {error}")
            continue
        if len(names) > 1 and not any(request.op.precisions(problem.signature) for problem in request.problems):
            request = replace(request, precisions=(LOSSLESS,))  # it has no weights to store
        for signature in dict.fromkeys(problem.signature for problem in request.problems):
            # Before anything is written: what remains of them is said when its turn comes.
            storable(request.precisions, request.op.precisions(signature, arch), lambda _: None)
        requests.append(request)
    if not requests:
        raise TilewrightError(f"none of {', '.join(names)} can be tuned for this model on {arch.name}")
    problems = sum(len(request.problems) for request in requests)
    # GPU kernels are compiled, not raced: what an arch takes by default does not grow with its ops.
    shared = arguments.time or device is not None
    time_s = requests[0].time_s if shared else sum(request.time_s for request in requests)
    return [replace(each, time_s=time_s * len(each.problems) / problems) for each in requests]


def _op_names(text: str) -> list[str]:
    if text == ALL_OPS:
        return list(OPS)
    return list(dict.fromkeys(find_op(name).name for name in _names(text)))


class _LeftOutError(TilewrightError):
    """An op cannot be declared for a model, or not be generated for an arch."""


def _templates(arguments: argparse.Namespace, op: OpDeclaration[Any, Any], arch: Arch) -> tuple[str, ...]:
    """Templates to search, by their full names; empty: all. What cannot be measured has to be predictable."""
    here = [template for template in op.templates if arch.family in template.families]
    if not here:
        raise _LeftOutError(f"{op.name} has no template for {arch.name}; tune it with --arch native")
    asked = op.template_names(_names(arguments.template), arch) if arguments.template is not None else ()
    if arch.family == "cpu":
        return asked
    predictable = tuple(template.name for template in here if template.work is not None)
    if not predictable:
        raise _LeftOutError(f"no template of {op.name} for {arch.name} says what predictions are made from")
    for name in asked:
        if name not in predictable:
            raise TilewrightError(f"template {name} does not say what predictions are made from; leave it out")
    return asked or (() if len(predictable) == len(here) else predictable)


def _device(arguments: argparse.Namespace, arch: Arch, warn: Callable[[str], None]) -> Device | None:
    """The GPU that is meant; None for a CPU, which has to be this machine's."""
    if isinstance(arch, GpuArch):
        if arguments.threads is not None:
            raise TilewrightError(f"--threads is of CPU kernels; leave it out for {arch.name}")
        return find_device(arguments.device, arch, warn)
    if arguments.device is not None:
        raise TilewrightError(f"--device is of GPUs; {arch.name} kernels are measured on this machine's CPU")
    if not runs_on(arch, read_cpu_info()):
        raise TilewrightError(
            f"arch {arch.name} does not run on this machine ({read_cpu_info().name}), so nothing could be timed; "
            "tune on such a machine, or use --arch native"
        )
    return None


def _request(
    arguments: argparse.Namespace,
    op: OpDeclaration[Any, Any],
    model: ModelShape | None,
    arch: Arch,
    device: Device | None,
) -> Request:
    templates = _templates(arguments, op, arch)
    if arguments.search not in SEARCHES:
        raise TilewrightError(f"unknown search {arguments.search!r}; choose one of {', '.join(SEARCHES)}")
    routing = RoutingSpec.parse(arguments.routing)
    if not 0 <= arguments.seed <= _MAX_SEED:
        raise TilewrightError(f"--seed {arguments.seed} is impossible; give a number from 0 to {_MAX_SEED}")
    trials, time_s = _budget(arguments, gpu=device is not None)
    precisions = parse_precisions(arguments.precision)
    problems = tuple(dict.fromkeys(_problems(arguments, op, model, routing, arch)))
    try:
        for problem in problems:
            op.require_template(problem.signature, arch)
    except TilewrightError as error:
        raise _LeftOutError(str(error)) from error
    return Request(
        op=op,
        problems=problems,
        arch=arch,
        device=device,
        threads=0 if device is not None else _threads(arguments.threads),
        trials=trials,
        time_s=time_s,
        search=arguments.search,
        seed=arguments.seed,
        resume=arguments.resume,
        model="" if model is None else model.name,
        probes=_probes(arguments.probes),
        templates=templates,
        precisions=precisions,
        max_error=_max_error(arguments.max_error, precisions),
        batch_invariant=arguments.batch_invariant,
        weight_copies=_weight_copies(arguments.weight_copies),
    )


def _problems(
    arguments: argparse.Namespace,
    op: OpDeclaration[Any, Any],
    model: ModelShape | None,
    routing: RoutingSpec,
    arch: Arch,
) -> list[Problem]:
    """Problems of the model, or those that were given one by one."""
    if model is not None:
        asked = None if arguments.tokens is None else _tokens(arguments.tokens)
        try:
            further = op.further_signatures(model) if arguments.op == ALL_OPS else ()
            signatures = (*op.signatures_on(model, arch), *(op.on(each, arch) for each in further))
        except TilewrightError as error:
            raise _LeftOutError(str(error)) from error
        ladder: Callable[[Any], Sequence[int]] = op.gpu_ladder if isinstance(arch, GpuArch) else op.ladder
        return [
            op.problem(signature, tokens, routing, model)
            for signature in signatures
            for tokens in asked or ladder(signature)
        ]
    if arguments.model is not None:
        raise TilewrightError("--model and --problem exclude each other; give one of them")
    if (arguments.tp, arguments.ep) != (1, 1):
        raise TilewrightError("--tp and --ep divide a model; give --problem the sizes of one rank instead")
    problems: list[Problem] = []
    for text in arguments.problem:
        fields = _fields(text, op.problem_example)
        for tokens in _tokens(arguments.tokens) if arguments.tokens is not None else [None]:
            sized = fields if tokens is None else {**fields, "tokens": str(tokens)}
            problem = op.parse_problem(sized, routing)
            if not any(name.endswith("_dtype") for name in fields):  # what was asked for is not exchanged
                problem = op.served_on(problem, arch)
            problems.append(problem)
    return problems


def _max_error(asked: float | None, precisions: Sequence[str]) -> float:
    if asked is None:
        return DEFAULT_MAX_ERROR
    if not 0 <= asked < math.inf:
        raise TilewrightError(f"--max-error {asked} is impossible; give a number of at least 0, such as 0.01")
    if set(precisions) == {LOSSLESS}:
        raise TilewrightError("--max-error bounds what rounded weights cost; name what to round them to by --precision")
    return asked


def _budget(arguments: argparse.Namespace, *, gpu: bool) -> tuple[int, float]:
    """Trials per problem and seconds in all; a limit that is given lifts the default of the other."""
    if arguments.trials is not None and arguments.trials < 1:
        raise TilewrightError(f"--trials {arguments.trials} is impossible; give at least 1")
    time_s = None if arguments.time is None else _seconds(arguments.time)
    if arguments.trials is None and time_s is None:
        return (DEFAULT_GPU_TRIALS, DEFAULT_GPU_TIME_S) if gpu else (DEFAULT_TRIALS, DEFAULT_TIME_S)
    return arguments.trials or 2 * ENDLESS_TRIALS, time_s if time_s is not None else math.inf


def _seconds(text: str) -> float:
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise TilewrightError(f"--time {text!r} is not a duration; give for example 90, 90s, 5m or 1h")
    return seconds


def _tokens(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise TilewrightError(f"--tokens {text!r} is not a list of whole numbers such as 1,4,16") from error
    if counts[0] < 1:
        raise TilewrightError(f"--tokens {text!r} holds {counts[0]}; token counts start at 1")
    return counts


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _fields(text: str, example: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    if not pairs or any(not sign for _, sign, _ in pairs):
        raise TilewrightError(f"--problem {text!r} is not key=value,...; for example: {example}")
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    if len(fields) < len(pairs):
        raise TilewrightError(f"--problem {text!r} gives a field twice; leave one of them out")
    return fields


def _threads(asked: int | None) -> int:
    cores = usable_cores()
    threads = cores if asked is None else asked
    if not 1 <= threads <= cores:
        raise TilewrightError(f"--threads {threads} is impossible here; this process may use 1 to {cores} cores")
    return threads


def _probes(asked: int) -> int:
    if asked < 0:
        raise TilewrightError(f"--probes {asked} is impossible; give 0 or more")
    return asked


def _weight_copies(asked: int) -> int:
    if asked < 1:
        raise TilewrightError(f"--weight-copies {asked} is impossible; give at least 1")
    return asked
