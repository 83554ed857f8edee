"""Every template of every op, over random configs and shapes that no tile divides, against the op's reference.

The evaluator checks: odd sizes, empty experts, one hot expert, poisoned and guarded outputs, one and two threads.
"""

import random

import pytest

from tilewright.codegen.archs import native_arch
from tilewright.codegen.building.cpp import CppBuilder, find_compiler
from tilewright.codegen.ops import find_op
from tilewright.codegen.ops.moe_gemm_signature import MoeGemmSignature
from tilewright.codegen.routing import RoutingSpec
from tilewright.errors import TilewrightError
from tilewright.tuner.evaluation.evaluator import CpuEvaluator
from tilewright.tuner.variants import Workshop
from tilewright.tuning_db.records import Outcome

SIGNATURES = [
    MoeGemmSignature(stage="up", experts=4, n=53, k=77, top_k=2),
    MoeGemmSignature(stage="up", experts=3, n=5, k=300, top_k=2, activation="swiglu", bias=True),
    MoeGemmSignature(stage="up", experts=5, n=64, k=64, top_k=1, activation="geglu"),
    MoeGemmSignature(stage="down", experts=5, n=50, k=600, top_k=3, bias=True),
    MoeGemmSignature(stage="down", experts=1, n=33, k=1, top_k=1),
    MoeGemmSignature(stage="plain", experts=6, n=24, k=129),
]
CONFIGS_PER_TEMPLATE = 6


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda s: f"{s.stage}-{s.activation}-{s.n}x{s.k}")
def test_every_template_matches_the_reference(signature: MoeGemmSignature, tmp_path) -> None:
    try:
        find_compiler()
    except TilewrightError as error:
        pytest.skip(str(error))
    op, arch = find_op("moe_gemm"), native_arch()
    workshop = Workshop(op, signature, arch, CppBuilder(arch, directory=tmp_path))
    space = op.space(signature, arch)
    rng = random.Random(1)
    configs = [op.default_config(signature, arch)]
    for template in op.templates:
        own = [i for i in range(len(space)) if space[i]["template"] == template.name]
        configs += [space[i] for i in rng.sample(own, min(CONFIGS_PER_TEMPLATE, len(own)))]
    built = workshop.build(configs)
    assert [b.message for b in built if b.path is None] == []
    problem = op.problem(signature, 7, RoutingSpec.parse("balanced"))
    with CpuEvaluator(op, signature, threads=2) as evaluator:
        evaluations = evaluator.evaluate([b.kernel for b in built], problem, budget_s=0.05)
    wrong = [
        (dict(b.variant.config), e.message) for b, e in zip(built, evaluations, strict=True) if e.outcome != Outcome.OK
    ]
    assert wrong == []
