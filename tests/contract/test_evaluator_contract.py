"""What every evaluator must do. A new one inherits ``EvaluatorContract`` and supplies its fixtures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import pytest
from evaluation_kernels import KernelMaker, evaluator, needs_compiler, problem

from tilewright.codegen.recipe.model import Guard
from tilewright.errors import TilewrightError
from tilewright.tuner.evaluation.cpu.evaluator import CpuEvaluator
from tilewright.tuner.evaluation.outcome import BuiltKernel
from tilewright.tuner.evaluation.statistics import paired_ratio
from tilewright.tuning_db.records import Outcome


class EvaluatorContract(ABC):
    @pytest.fixture
    @abstractmethod
    def subject(self) -> CpuEvaluator: ...

    @pytest.fixture
    @abstractmethod
    def right(self) -> BuiltKernel: ...

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
    def wrong(self) -> BuiltKernel: ...

    @pytest.fixture
    @abstractmethod
    def guarded(self) -> BuiltKernel:
        """Right where its guard holds: at multiples of 8."""

    def test_a_right_kernel_is_timed(self, subject: CpuEvaluator, right: BuiltKernel) -> None:
        (evaluation,) = subject.evaluate([right], problem(), budget_s=0.1)
        assert (evaluation.kernel_key, evaluation.outcome, evaluation.message) == (right.key, Outcome.OK, "")
        assert min(evaluation.samples_us) > 0
        assert evaluation.low_us is not None
        assert evaluation.median_us is not None
        assert evaluation.high_us is not None
        assert 0 < evaluation.low_us <= evaluation.median_us <= evaluation.high_us
        assert evaluation.error is not None
        assert 0 < evaluation.error < 1e-6

    def test_a_wrong_kernel_is_not_timed_and_says_why(self, subject: CpuEvaluator, wrong: BuiltKernel) -> None:
        (evaluation,) = subject.evaluate([wrong], problem(), budget_s=0.1)
        assert evaluation.outcome is Outcome.WRONG
        assert "expected" in evaluation.message
        assert evaluation.error is not None
        assert evaluation.error > 1e-6
        assert (evaluation.samples_us, evaluation.median_us) == ((), None)

    def test_a_batch_keeps_its_order(
        self, subject: CpuEvaluator, right: BuiltKernel, packed: BuiltKernel, wrong: BuiltKernel, slow: BuiltKernel
    ) -> None:
        batch = [wrong, slow, packed, wrong, right]
        evaluations = subject.evaluate(batch, problem(), budget_s=0.3)
        assert [evaluation.kernel_key for evaluation in evaluations] == [kernel.key for kernel in batch]
        expected = [Outcome.WRONG, Outcome.OK, Outcome.OK, Outcome.WRONG, Outcome.OK]
        assert [evaluation.outcome for evaluation in evaluations] == expected

    def test_samples_of_a_batch_pair_up(self, subject: CpuEvaluator, right: BuiltKernel, slow: BuiltKernel) -> None:
        fast_one, slow_one = subject.evaluate([right, slow], problem(), budget_s=0.3)
        ratio = paired_ratio(slow_one.samples_us, fast_one.samples_us)
        assert ratio.pairs == len(slow_one.samples_us) <= len(fast_one.samples_us)
        assert ratio.low > 1

    def test_every_kernel_is_timed_however_small_the_budget(
        self, subject: CpuEvaluator, right: BuiltKernel, packed: BuiltKernel
    ) -> None:
        assert all(e.samples_us for e in subject.evaluate([right, packed], problem(), budget_s=0.0))

    def test_an_empty_batch_has_no_evaluations(self, subject: CpuEvaluator) -> None:
        assert subject.evaluate([], problem(), budget_s=0.1) == []

    def test_a_kernel_is_checked_once(self, subject: CpuEvaluator, right: BuiltKernel) -> None:
        subject.evaluate([right], problem(32), budget_s=0.0)
        before = subject.spent
        subject.evaluate([right], problem(32), budget_s=0.0)
        assert (subject.spent - before).checking_s == 0
        assert (subject.spent - before).measuring_s > 0

    def test_a_guard_rejects_the_measured_problem_only(self, subject: CpuEvaluator, guarded: BuiltKernel) -> None:
        (accepted,) = subject.evaluate([guarded], problem(16), budget_s=0.0)
        assert accepted.outcome is Outcome.OK
        # One row is among the awkward problems, too, where a guard is not an offence.
        for rows in (20, 1):
            (rejected,) = subject.evaluate([guarded], problem(rows), budget_s=0.0)
            assert rejected.outcome is Outcome.REJECTED
            assert rejected.message == f"a guard refuses the problem: rows = {rows} is no multiple of 8"

    def test_noise_is_that_of_a_kernel_against_itself(self, subject: CpuEvaluator, right: BuiltKernel) -> None:
        ratio = subject.measure_noise(right, problem(), budget_s=0.3)
        assert ratio.low <= ratio.median <= ratio.high
        # Not the noise is tested, which depends on the machine, but that both twins run the same kernel.
        assert 0.2 < ratio.median < 5
        assert ratio.pairs > 6

    def test_noise_of_a_wrong_kernel_is_an_error(self, subject: CpuEvaluator, wrong: BuiltKernel) -> None:
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
class TestCpuEvaluator(EvaluatorContract):
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
