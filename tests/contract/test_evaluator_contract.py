"""What every evaluator must do. A new one inherits ``EvaluatorContract``, or ``MeasuringContract`` if it times kernels,
and supplies its fixtures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from evaluation_kernels import KernelMaker, evaluator, needs_compiler, problem

from tilewright.codegen.backends.registry import Builders
from tilewright.codegen.hardware.devices import DEVICES
from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.gating.declaration import Gating
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.gating.triton.templates import TRITON
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.template import Template
from tilewright.codegen.recipe.model import Argument, Guard, Recipe
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Config
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.variants import VariantBuilder
from tilewright.tuner.evaluation.cpu.evaluator import CpuEvaluator
from tilewright.tuner.evaluation.interface import Evaluator
from tilewright.tuner.evaluation.outcome import BuiltKernel
from tilewright.tuner.evaluation.predicted.evaluator import PREDICTION_NOISE, PredictingEvaluator
from tilewright.tuner.evaluation.statistics import paired_ratio
from tilewright.tuning_db.records import CHECKED_LEVELS, TIMINGS, Outcome


class EvaluatorContract(ABC):
    @pytest.fixture
    @abstractmethod
    def subject(self) -> Evaluator: ...

    @pytest.fixture
    @abstractmethod
    def right(self) -> BuiltKernel: ...

    @pytest.fixture
    @abstractmethod
    def other(self) -> BuiltKernel:
        """Right, too, and not the same kernel."""

    @pytest.fixture
    @abstractmethod
    def wrong(self) -> BuiltKernel: ...

    @pytest.fixture
    @abstractmethod
    def a_problem(self) -> Problem:
        """To evaluate them on."""

    def test_a_finalist_that_is_right_has_a_time_with_a_range_and_says_how_both_are_known(
        self, subject: Evaluator, right: BuiltKernel, a_problem: Problem
    ) -> None:
        (evaluation,) = subject.evaluate([right], a_problem, budget_s=0.1, finalists=True)
        assert (evaluation.kernel_key, evaluation.outcome, evaluation.message) == (right.key, Outcome.OK, "")
        assert evaluation.low_us is not None
        assert evaluation.median_us is not None
        assert evaluation.high_us is not None
        assert 0 < evaluation.low_us <= evaluation.median_us <= evaluation.high_us
        assert evaluation.error is not None
        assert 0 <= evaluation.error < 1e-5
        assert evaluation.timing in TIMINGS[1:]
        assert CHECKED_LEVELS.index(evaluation.checked) > CHECKED_LEVELS.index("compiled")
        assert subject.checked(right.key) == evaluation.checked
        assert (evaluation.timing == "measured") == bool(evaluation.samples_us)

    def test_a_finalist_that_is_wrong_has_no_time_and_says_why(
        self, subject: Evaluator, wrong: BuiltKernel, a_problem: Problem
    ) -> None:
        (evaluation,) = subject.evaluate([wrong], a_problem, budget_s=0.1, finalists=True)
        assert (evaluation.kernel_key, evaluation.outcome) == (wrong.key, Outcome.WRONG)
        assert evaluation.message
        assert "\n" not in evaluation.message
        assert (evaluation.samples_us, evaluation.median_us) == ((), None)

    def test_every_kernel_of_a_batch_has_its_own_outcome_in_order(
        self, subject: Evaluator, right: BuiltKernel, other: BuiltKernel, wrong: BuiltKernel, a_problem: Problem
    ) -> None:
        batch = [wrong, other, wrong, right]
        evaluations = subject.evaluate(batch, a_problem, budget_s=0.1, finalists=True)
        assert [evaluation.kernel_key for evaluation in evaluations] == [kernel.key for kernel in batch]
        assert [e.outcome for e in evaluations] == [Outcome.WRONG, Outcome.OK, Outcome.WRONG, Outcome.OK]

    def test_an_empty_batch_has_no_evaluations(self, subject: Evaluator, a_problem: Problem) -> None:
        assert subject.evaluate([], a_problem, budget_s=0.1) == []

    def test_a_small_budget_leaves_no_kernel_out(
        self, subject: Evaluator, right: BuiltKernel, other: BuiltKernel, a_problem: Problem
    ) -> None:
        assert all(e.median_us for e in subject.evaluate([right, other], a_problem, budget_s=0.0))

    def test_a_kernel_is_checked_once(self, subject: Evaluator, right: BuiltKernel, a_problem: Problem) -> None:
        subject.evaluate([right], a_problem, budget_s=0.0, finalists=True)
        before = subject.spent
        subject.evaluate([right], a_problem, budget_s=0.0, finalists=True)
        assert (subject.spent - before).checking_s < 0.01

    def test_noise_is_that_of_a_kernel_against_itself(
        self, subject: Evaluator, right: BuiltKernel, a_problem: Problem
    ) -> None:
        ratio = subject.measure_noise(right, a_problem, budget_s=0.3)
        assert ratio.low <= ratio.median <= ratio.high
        # Not the noise is tested, which depends on the machine, but that both twins run the same kernel.
        assert 0.2 < ratio.median < 5

    def test_weights_as_the_op_declares_them_bring_no_error(self, subject: Evaluator, a_problem: Problem) -> None:
        assert subject.precision_error(a_problem, LOSSLESS).relative == 0


class MeasuringContract(EvaluatorContract):
    """Of evaluators that run kernels and time them."""

    enough_s: ClassVar[float] = 0.3
    """For a dozen samples of two kernels."""

    @pytest.fixture
    def a_problem(self) -> Problem:
        return problem()

    @pytest.fixture
    def other(self, packed: BuiltKernel) -> BuiltKernel:
        return packed

    @pytest.fixture
    @abstractmethod
    def packed(self) -> BuiltKernel:
        """Right, too, and takes its weights in another layout."""

    @pytest.fixture
    @abstractmethod
    def slow(self) -> BuiltKernel:
        """Right, and many times slower than the others."""

    @pytest.fixture
    @abstractmethod
    def guarded(self) -> BuiltKernel:
        """Right where its guard holds: at multiples of 8."""

    def test_a_right_kernel_is_timed_by_samples(self, subject: Evaluator, right: BuiltKernel) -> None:
        (evaluation,) = subject.evaluate([right], problem(), budget_s=self.enough_s)
        assert (evaluation.kernel_key, evaluation.outcome, evaluation.message) == (right.key, Outcome.OK, "")
        assert min(evaluation.samples_us) > 0
        assert evaluation.low_us is not None
        assert evaluation.median_us is not None
        assert evaluation.high_us is not None
        assert 0 < evaluation.low_us <= evaluation.median_us <= evaluation.high_us
        assert evaluation.error is not None
        assert 0 < evaluation.error < 1e-6

    def test_a_wrong_kernel_says_what_was_expected(self, subject: Evaluator, wrong: BuiltKernel) -> None:
        (evaluation,) = subject.evaluate([wrong], problem(), budget_s=0.1)
        assert evaluation.outcome is Outcome.WRONG
        assert "expected" in evaluation.message
        assert evaluation.error is not None
        assert evaluation.error > 1e-6
        assert (evaluation.samples_us, evaluation.median_us) == ((), None)

    def test_a_batch_of_fast_and_slow_ones_keeps_its_order(
        self, subject: Evaluator, right: BuiltKernel, packed: BuiltKernel, wrong: BuiltKernel, slow: BuiltKernel
    ) -> None:
        batch = [wrong, slow, packed, wrong, right]
        evaluations = subject.evaluate(batch, problem(), budget_s=0.3)
        assert [evaluation.kernel_key for evaluation in evaluations] == [kernel.key for kernel in batch]
        expected = [Outcome.WRONG, Outcome.OK, Outcome.OK, Outcome.WRONG, Outcome.OK]
        assert [evaluation.outcome for evaluation in evaluations] == expected

    def test_samples_of_a_batch_pair_up(self, subject: Evaluator, right: BuiltKernel, slow: BuiltKernel) -> None:
        fast_one, slow_one = subject.evaluate([right, slow], problem(), budget_s=self.enough_s)
        ratio = paired_ratio(slow_one.samples_us, fast_one.samples_us)
        assert ratio.pairs == len(slow_one.samples_us) <= len(fast_one.samples_us)
        assert ratio.low > 1

    def test_every_kernel_is_timed_however_small_the_budget(
        self, subject: Evaluator, right: BuiltKernel, packed: BuiltKernel
    ) -> None:
        assert all(e.samples_us for e in subject.evaluate([right, packed], problem(), budget_s=0.0))

    def test_a_kernel_is_checked_once_and_timed_again(self, subject: Evaluator, right: BuiltKernel) -> None:
        subject.evaluate([right], problem(32), budget_s=0.0)
        before = subject.spent
        subject.evaluate([right], problem(32), budget_s=0.0)
        assert (subject.spent - before).checking_s == 0
        assert (subject.spent - before).measuring_s > 0

    def test_a_guard_rejects_the_measured_problem_only(self, subject: Evaluator, guarded: BuiltKernel) -> None:
        (accepted,) = subject.evaluate([guarded], problem(16), budget_s=0.0)
        assert accepted.outcome is Outcome.OK
        # One row is among the awkward problems, too, where a guard is not an offence.
        for rows in (20, 1):
            (rejected,) = subject.evaluate([guarded], problem(rows), budget_s=0.0)
            assert rejected.outcome is Outcome.REJECTED
            assert rejected.message == f"a guard refuses the problem: rows = {rows} is no multiple of 8"

    def test_noise_takes_several_pairs(self, subject: Evaluator, right: BuiltKernel) -> None:
        assert subject.measure_noise(right, problem(), budget_s=self.enough_s).pairs > 6

    def test_noise_of_a_wrong_kernel_is_an_error(self, subject: Evaluator, wrong: BuiltKernel) -> None:
        with pytest.raises(TilewrightError, match=f"kernel {wrong.key}.*expected"):
            subject.measure_noise(wrong, problem(), budget_s=0.1)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> KernelMaker:
    return KernelMaker(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def cpu_evaluator() -> Iterator[CpuEvaluator]:
    with evaluator() as made:
        yield made


@needs_compiler
class TestCpuEvaluator(MeasuringContract):
    @pytest.fixture
    def subject(self, cpu_evaluator: CpuEvaluator) -> CpuEvaluator:
        return cpu_evaluator

    @pytest.fixture
    def right(self, make: KernelMaker) -> BuiltKernel:
        return make()

    @pytest.fixture
    def packed(self, make: KernelMaker) -> BuiltKernel:
        return make(columns=16)

    @pytest.fixture
    def slow(self, make: KernelMaker) -> BuiltKernel:
        return make("usleep(50000);")

    @pytest.fixture
    def wrong(self, make: KernelMaker) -> BuiltKernel:
        return make(after="out[size / 2] *= 1.01f;")

    @pytest.fixture
    def guarded(self, make: KernelMaker) -> BuiltKernel:
        return make("if (rows % 8) abort();", guards=(Guard("rows", 8),))

    def test_a_zeroed_workspace_is_zero_at_every_call(self, subject: CpuEvaluator, make: KernelMaker) -> None:
        code = "for (int i = 0; i < 25; i++) { if (workspace[i]) abort(); workspace[i] = 1; }"
        zeroed = make(code, workspace_bytes="threads * 100", workspace_zeroed=True)
        (evaluation,) = subject.evaluate([zeroed], problem(), budget_s=0.1)
        assert (evaluation.outcome, evaluation.message) == (Outcome.OK, "")

    def test_any_other_workspace_is_garbage(self, subject: CpuEvaluator, make: KernelMaker) -> None:
        (evaluation,) = subject.evaluate(
            [make(after="out[0] += workspace[3];", workspace_bytes="rows * 64")], problem(), budget_s=0.1
        )
        assert evaluation.outcome is Outcome.WRONG

    @pytest.mark.parametrize("threads", ["host->threads == 1", "host->threads == 2 && !host->fork"])
    def test_a_kernel_is_checked_with_fewer_threads_too(
        self, subject: CpuEvaluator, make: KernelMaker, threads: str
    ) -> None:
        (evaluation,) = subject.evaluate([make(f"if ({threads}) return 0;")], problem(), budget_s=0.1)
        assert evaluation.outcome is Outcome.WRONG
        assert "was never written" in evaluation.message


MUTATED_WARPS = 8
GATE = GatingSignature(experts=8, top_k=2)


def _one_token_short(template: Template[Any]) -> Template[Any]:
    """``template``, whose kernels of so many warps are told of one token less than there are."""

    def recipe(signature: GatingSignature, config: Config, arch: Any) -> Recipe:
        made = template.recipe(signature, config, arch)
        if config["num_warps"] != MUTATED_WARPS:
            return made
        short = Argument("size", "tokens - 1")
        launches = [
            replace(each, arguments=tuple(short if a == Argument("size", "tokens") else a for a in each.arguments))
            for each in made.launches
        ]
        return replace(made, launches=tuple(launches))

    return replace(template, recipe=recipe)


class GatingWithMutants(Gating):
    implementations = (replace(TRITON, templates=tuple(_one_token_short(each) for each in TRITON.templates)),)


@pytest.fixture(scope="module")
def predicted() -> Iterator[tuple[PredictingEvaluator, dict[int, BuiltKernel]]]:
    """An evaluator, and kernels by their warps."""
    pytest.importorskip("triton", reason="Triton is not installed")
    op, device = GatingWithMutants(), DEVICES["h100-sxm"]
    default = op.default_config(GATE, device.arch)
    configs = [Config({**default, "num_warps": warps}) for warps in (1, 2, MUTATED_WARPS)]
    with closing(Builders(device.arch)) as builders, PredictingEvaluator(op, GATE, device, seed=1) as made:
        built = VariantBuilder(op, GATE, device.arch, builders).build(configs)
        yield made, {result.variant.config["num_warps"]: result.kernel for result in built}


class TestPredictingEvaluator(EvaluatorContract):
    @pytest.fixture
    def subject(self, predicted: tuple[PredictingEvaluator, dict[int, BuiltKernel]]) -> PredictingEvaluator:
        return predicted[0]

    @pytest.fixture
    def right(self, predicted: tuple[PredictingEvaluator, dict[int, BuiltKernel]]) -> BuiltKernel:
        return predicted[1][1]

    @pytest.fixture
    def other(self, predicted: tuple[PredictingEvaluator, dict[int, BuiltKernel]]) -> BuiltKernel:
        return predicted[1][2]

    @pytest.fixture
    def wrong(self, predicted: tuple[PredictingEvaluator, dict[int, BuiltKernel]]) -> BuiltKernel:
        return predicted[1][MUTATED_WARPS]

    @pytest.fixture
    def a_problem(self) -> Problem:
        return GatingWithMutants().problem(GATE, 64, RoutingSpec.parse("balanced"))

    def test_a_prediction_is_the_same_whenever_it_is_asked(
        self, subject: Evaluator, right: BuiltKernel, other: BuiltKernel, a_problem: Problem
    ) -> None:
        alone = subject.evaluate([right], a_problem, budget_s=0.0)
        assert subject.evaluate([other, right], a_problem, budget_s=1.0)[1] == alone[0]

    def test_its_noise_is_what_the_model_does_not_tell_apart(
        self, subject: Evaluator, right: BuiltKernel, a_problem: Problem
    ) -> None:
        noise = subject.measure_noise(right, a_problem, budget_s=0.1)
        assert (noise.median, noise.noise, noise.pairs) == (1.0, pytest.approx(PREDICTION_NOISE), 0)

    def test_what_is_no_finalist_is_compiled_and_not_run(
        self, subject: Evaluator, wrong: BuiltKernel, a_problem: Problem
    ) -> None:
        before = subject.spent
        (evaluation,) = subject.evaluate([wrong], a_problem, budget_s=0.1)
        assert (evaluation.outcome, evaluation.timing, evaluation.checked) == (Outcome.OK, "predicted", "compiled")
        assert evaluation.error is None
        assert subject.spent == before
        assert subject.checked(wrong.key) == "compiled"

    def test_a_finalist_is_emulated(self, subject: Evaluator, right: BuiltKernel, a_problem: Problem) -> None:
        (evaluation,) = subject.evaluate([right], a_problem, budget_s=0.1, finalists=True)
        assert (evaluation.timing, evaluation.checked) == ("predicted", "emulated")
