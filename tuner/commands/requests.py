"""From the words of ``tune --arch A --op O`` to what a campaign is asked for: one request per arch and op."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tilewright.codegen.hardware.archs import Arch, find_arch
from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.models.shapes import load_model
from tilewright.codegen.numbers.precisions import LOSSLESS, parse_precisions
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.campaign import Request
from tilewright.tuner.campaign.precision import DEFAULT_MAX_ERROR, storable
from tilewright.tuner.campaign.progress import ENDLESS_TRIALS
from tilewright.tuner.search import check_search
from tilewright.tuner.search.storage import open_storage
from tilewright.tuner.targets.base import DefaultBudget, Target, Wishes
from tilewright.tuner.targets.registry import find_target

DEFAULT_MODEL = "mixtral-8x7b"
DEFAULT_PROBES = 4
ALL_OPS = "all"
HELP = "help"
"""Given as a problem, asks what problems are."""
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
    if arguments.device and len(archs) > 1:
        raise TilewrightError("--device names a product of one arch; give one --arch with it")
    names = op_names(arguments.op)
    if len(names) > 1:
        for option in ("problem", "template"):
            if getattr(arguments, option):
                raise TilewrightError(
                    f"--{option} is one op's own; name that op alone with --op instead of {arguments.op}"
                )
    requests = []
    for arch in dict.fromkeys(archs):
        target = find_target(arch, Wishes(arguments.device, arguments.threads, arguments.predict), warn)
        requests += _of_target(arguments, names, model, target, warn)
    return requests


def _of_target(
    arguments: argparse.Namespace,
    names: Sequence[str],
    model: ModelShape | None,
    target: Target,
    warn: Callable[[str], None],
) -> list[Request]:
    requests = []
    for name in names:
        try:
            request = _request(arguments, find_op(name), model, target)
        except _LeftOutError as error:
            # Asked for by name, it is a mistake; as a part of everything, it is what is done without.
            if arguments.op != ALL_OPS:
                raise
            warn(f"{name} is left out: {error}")
            continue
        if model is not None:
            _say_left_out(model, name, warn)
        if len(names) > 1 and not any(request.op.precisions(problem.signature) for problem in request.problems):
            request = replace(request, precisions=(LOSSLESS,))  # it has no weights to store
        for signature in dict.fromkeys(problem.signature for problem in request.problems):
            # Before anything is written: what remains of them is said when its turn comes.
            storable(request.precisions, request.op.precisions(signature, target.arch), lambda _: None)
        requests.append(request)
    if not requests:
        raise TilewrightError(f"none of {', '.join(names)} can be tuned for this model on {target.arch.name}")
    problems = sum(len(request.problems) for request in requests)
    per_op = target.budget.per_op and not arguments.time
    time_s = sum(request.time_s for request in requests) if per_op else requests[0].time_s
    return [replace(each, time_s=time_s * len(each.problems) / problems) for each in requests]


def _say_left_out(model: ModelShape, op: str, warn: Callable[[str], None]) -> None:
    """Kinds of layers of an op's that stay as they are, while others of it are tuned."""
    for each in model.left_out:
        if each.op == op:
            warn(f"{each.what} left out: {each.why}")


def op_names(text: str) -> list[str]:
    """Ops that ``--op`` names, each once.

    Raises:
        TilewrightError: for one that is not known.

    """
    if text == ALL_OPS:
        return list(OPS)
    return list(dict.fromkeys(find_op(name).name for name in _names(text)))


class _LeftOutError(TilewrightError):
    """An op cannot be declared for a model, or not be generated for an arch."""


def _templates(arguments: argparse.Namespace, op: OpDeclaration[Any, Any], target: Target) -> tuple[str, ...]:
    """Templates to search, by their full names; empty: all that there are for the target's arch."""
    arch = target.arch
    lacks = {template.name: target.lack(template) for template in op.templates_on(arch)}
    if not lacks:
        raise _LeftOutError(f"{op.name} has no template for {arch.name}; tune it with --arch native")
    asked = op.template_names(_names(arguments.template), arch) if arguments.template is not None else ()
    usable = tuple(name for name, lack in lacks.items() if lack is None)
    if not usable:
        raise _LeftOutError(f"every template of {op.name} for {arch.name} {next(filter(None, lacks.values()))}")
    for name in asked:
        if lacks[name]:
            raise TilewrightError(f"template {name} {lacks[name]}; leave it out")
    return asked or (() if len(usable) == len(lacks) else usable)


def _request(
    arguments: argparse.Namespace,
    op: OpDeclaration[Any, Any],
    model: ModelShape | None,
    target: Target,
) -> Request:
    templates = _templates(arguments, op, target)
    check_search(arguments.search)
    open_storage(arguments.study)
    routing = RoutingSpec.parse(arguments.routing)
    if not 0 <= arguments.seed <= _MAX_SEED:
        raise TilewrightError(f"--seed {arguments.seed} is impossible; give a number from 0 to {_MAX_SEED}")
    trials, time_s = _budget(arguments, target.budget)
    precisions = parse_precisions(arguments.precision)
    problems = tuple(dict.fromkeys(_problems(arguments, op, model, routing, target.arch)))
    try:
        for problem in problems:
            op.require_template(problem.signature, target.arch)
    except TilewrightError as error:
        raise _LeftOutError(str(error)) from error
    return Request(
        op=op,
        problems=problems,
        target=target,
        trials=trials,
        time_s=time_s,
        search=arguments.search,
        study=arguments.study,
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
            signatures = [*op.signatures_on(model, arch)]
        except TilewrightError as error:
            raise _LeftOutError(str(error)) from error
        if arguments.op == ALL_OPS:
            signatures += _further(arguments, op, model, arch)
        if not signatures:
            raise _LeftOutError(f"{op.name} has nothing to tune for {model.name}: {op.why_without(model)}")
        return [
            op.problem(signature, tokens, routing, model)
            for signature in signatures
            for tokens in asked or op.ladder(signature, arch)
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


def _further(
    arguments: argparse.Namespace, op: OpDeclaration[Any, Any], model: ModelShape, arch: Arch
) -> list[Signature]:
    """Linear layers and the like, as far as kernels can be had for them: one of many is not worth a refusal of all."""
    possible = []
    for signature in dict.fromkeys(op.on(each, arch) for each in op.further_signatures(model)):
        refusals = op.precisions(signature, arch)
        asked = [name for name in parse_precisions(arguments.precision) if not refusals.get(name)]
        if asked and op.templates_for(signature, arch):
            possible.append(signature)
    return possible


def _max_error(asked: float | None, precisions: Sequence[str]) -> float:
    if asked is None:
        return DEFAULT_MAX_ERROR
    if not 0 <= asked < math.inf:
        raise TilewrightError(f"--max-error {asked} is impossible; give a number of at least 0, such as 0.01")
    if set(precisions) == {LOSSLESS}:
        raise TilewrightError("--max-error bounds what rounded weights cost; name what to round them to by --precision")
    return asked


def _budget(arguments: argparse.Namespace, default: DefaultBudget) -> tuple[int, float]:
    """Trials per problem and seconds in all; a limit that is given lifts the default of the other."""
    if arguments.trials is not None and arguments.trials < 1:
        raise TilewrightError(f"--trials {arguments.trials} is impossible; give at least 1")
    time_s = None if arguments.time is None else parse_seconds(arguments.time)
    if arguments.trials is None and time_s is None:
        return default.trials, default.time_s
    return arguments.trials or 2 * ENDLESS_TRIALS, time_s if time_s is not None else math.inf


def parse_seconds(text: str) -> float:
    """Seconds of a duration such as 90, 90s, 5m or 1h.

    Raises:
        TilewrightError: for what is none.

    """
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
        raise TilewrightError(f"--problem {text!r} is not key=value,..., such as {example}; see --problem help")
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    if len(fields) < len(pairs):
        raise TilewrightError(f"--problem {text!r} gives a field twice; leave one of them out")
    return fields


def _probes(asked: int) -> int:
    if asked < 0:
        raise TilewrightError(f"--probes {asked} is impossible; give 0 or more")
    return asked


def _weight_copies(asked: int) -> int:
    if asked < 1:
        raise TilewrightError(f"--weight-copies {asked} is impossible; give at least 1")
    return asked
