"""What speaks against a binary that nobody timed, and who is a finalist in spite of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tilewright.codegen.backends.binaries.facts import EntryFacts
from tilewright.codegen.backends.binaries.instructions import InstructionMix, read_amdgcn, read_sass, streamed_lines
from tilewright.codegen.ops.moe_gemm.problem import MoeGemmProblem
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Config
from tilewright.tuner.campaign.loop import Candidate, ProblemResult
from tilewright.tuner.campaign.variants import PlanConstraint
from tilewright.tuner.evaluation.outcome import BuiltKernel
from tilewright.tuner.report.inspection import performance_warnings

FACTS = EntryFacts("product", 128, 0, 0, 0, 0, 49152, 0, 4, 1, (8, 8, 8, 4, 8, 8))
WIDE = InstructionMix({}, {}, loop_load_bytes=4, streamed_load_bytes=16)
SOURCE = "scale = tl.load(scale_at)\ntile = tl.load(at)  # streamed\n"
SASS = """
        //## File "/some/where/kernel.py", line 1
.L_x_0:
        /*0010*/                   LDG.E R2, desc[UR14][R8.64] ;
        //## File "/some/where/kernel.py", line 2
        /*0020*/                   LDGSTS.E.BYPASS.128 [R21], desc[UR14][R6.64], P3 ;
        //## File "/else/where/standard.py", line 2
        /*0030*/                   LDG.E.U8 R2, desc[UR14][R8.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0050*/               @P2 BRA `(.L_x_0) ;
"""
GCN = """
.LBB0_1:
	.loc	1 1 20 is_stmt 1               ; kernel.py:1:20
	global_load_dword v1, v[2:3], off
	.loc	1 2 20                         ; kernel.py:2:20
	buffer_load_dwordx2 v[1:2], v3, s[0:3], 0 offen
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
	s_cbranch_scc1 .LBB0_1
"""


def test_loads_of_what_is_streamed_are_told_by_the_sources_lines() -> None:
    streamed = streamed_lines(SOURCE)
    assert streamed == {2}
    mix = read_sass(SASS, streamed)
    assert (mix.loop_load_bytes, mix.streamed_load_bytes, mix.wide) == (1, 16, True)
    assert not read_sass(SASS).wide
    narrow = read_amdgcn(GCN, streamed)
    assert (narrow.loop_load_bytes, narrow.streamed_load_bytes, narrow.wide) == (4, 8, False)


def test_spills_and_narrow_loads_are_performance_warnings() -> None:
    assert performance_warnings([FACTS], [WIDE]) == ()
    assert performance_warnings([FACTS, replace(FACTS, spill_load_bytes=8)], [WIDE, WIDE]) == ("spills registers",)
    assert performance_warnings([FACTS], [replace(WIDE, streamed_load_bytes=4)]) == ("loads 4 bytes at a time",)


def found(performance_warninged: set[int]) -> ProblemResult:
    """Six candidates, the first the fastest."""
    signature = MoeGemmSignature(stage="plain", experts=4, n=64, k=64)
    problem = MoeGemmProblem(signature, 8, RoutingSpec.parse("balanced"), 4)

    def spoken(kernel: BuiltKernel) -> tuple[str, ...]:
        return ("spills registers",) if kernel.config["number"] in performance_warninged else ()

    result = ProblemResult(problem, Config({"number": 0}), performance_warnings=spoken)
    for number in range(6):
        config = Config({"number": number})
        kernel = BuiltKernel(str(number), Path("never-loaded"), Recipe((), (), "rows"), config)
        result.candidates[config] = Candidate(config, kernel, 10.0 + number, PlanConstraint(""))
    return result


def numbers(candidates: list[Candidate]) -> list[int]:
    return [candidate.config["number"] for candidate in candidates]


def test_finalists_are_clean_where_enough_are() -> None:
    result = found({0, 2})
    assert numbers(result.finalists(3)) == [1, 3, 4]
    assert numbers(result.set_aside(3)) == [0, 2]
    assert numbers(result.finalists(3, PlanConstraint("other"))) == []


def test_performance_warninged_ones_follow_where_nothing_else_is_left() -> None:
    result = found({0, 1, 2, 3})
    assert numbers(result.finalists(3)) == [4, 5, 0]
    assert numbers(result.set_aside(3)) == [1, 2, 3]
    everything = found(set(range(6)))
    assert numbers(everything.finalists(2)) == [0, 1]
    assert numbers(found(set()).finalists(2)) == [0, 1]
    assert found(set()).set_aside(2) == []
