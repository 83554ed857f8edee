"""Calls of an op as plans serve them, to be raced: one plan against another on the same weights and inputs."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from interleave import Race, race
from peers import limited_to

from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.runtime import PreparedCall, ServeOptions
from tilewright.tuner.evaluation.cpu.binding import DTYPES
from tilewright.tuner.evaluation.tensors import outputs_of, shape_of, sizes_of

_ROTATIONS = 4


def race_plans(signature: Signature, tokens: int, plans: Mapping[str, Path], *, threads: int, budget_s: float) -> Race:
    """Race the plans of several databases at one size.

    Every plan has weights of its own, so that none finds them in the cache because another one has just read them.
    """
    op = find_op(signature.op)
    problem = op.problem(signature, tokens, RoutingSpec.parse("balanced"))
    specs = op.tensors(signature)
    weights = {name: torch.from_numpy(array) for name, array in op.weights(signature, 0).items()}
    copies = 1 + 2 * read_cpu_info().own_cache_bytes // max(1, sum(w.nbytes for w in weights.values()))
    sets = []
    for seed in range(_ROTATIONS):
        inputs = {name: torch.from_numpy(array) for name, array in op.inputs(problem, seed).items()}
        sizes = sizes_of(specs, {name: tuple(tensor.shape) for name, tensor in inputs.items()}) | problem.output_sizes
        outputs = {s.name: torch.from_numpy(np.empty(shape_of(s, sizes), DTYPES[s.dtype])) for s in outputs_of(specs)}
        tensors = {**inputs, **outputs}
        sets.append([tensors.get(spec.name) for spec in specs if spec.role != "weight"])
    contenders = {}
    for name, path in plans.items():
        own = [
            PreparedCall.prepare(signature, weights, options=ServeOptions(threads=threads, database=path))
            for _ in range(int(copies))
        ]
        if not all(each.is_tuned for each in own):
            raise RuntimeError(f"{path} serves no tuned kernel")
        turns = range(max(len(own), len(sets)))
        contenders[name] = [partial(own[turn % len(own)].call, *sets[turn % len(sets)]) for turn in turns]
    with limited_to(threads):
        return race(contenders, control=next(iter(plans)), budget_s=budget_s, min_rounds=11)
