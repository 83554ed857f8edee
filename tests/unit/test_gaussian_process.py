"""The surrogate: features, kernel fit, incremental posterior, expected improvement, and the search they make."""

import math

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from scipy.integrate import quad
from scipy.stats import norm

from tilewright.codegen.space import Config, Parameter, Space
from tilewright.tuner.search import Prior, config_of, distributions_of, gaussian_process, suggest
from tilewright.tuner.search.features import Features, features_of
from tilewright.tuner.search.gaussian_process import GaussianProcessSampler, log_expected_improvement, spread_rows
from tilewright.tuner.search.regression import Kernel, LogPrior, Posterior, fit, negative_log_posterior
from tilewright.tuner.search.targets import compressed, logs_or_nan
from tilewright.tuner.search.transfer import with_prior_axes


def axes_of(*values):
    """The distinct axes of one parameter with these values, as (group, points) pairs."""
    space = Space.enumerate([Parameter("p", values, "")])
    features = features_of(space)
    return list(zip(features.groups.tolist(), features.points.T.round(3).tolist(), strict=True))


class TestFeatures:
    def test_a_wide_range_counts_in_octaves_and_a_narrow_one_in_steps(self):
        assert axes_of(1, 2, 4, 16) == [(0, [0.0, 0.25, 0.5, 1.0])]
        assert axes_of(1, 2, 3)[0] == (0, [0.0, 0.5, 1.0])

    def test_alignment_is_a_second_axis_where_it_differs_from_size(self):
        size, alignment = axes_of(16, 32, 48, 64)
        assert size[0] != alignment[0]
        assert alignment[1] == [0.0, 0.5, 0.0, 1.0]
        assert len(axes_of(16, 32, 64, 128)) == 1

    def test_words_are_equally_far_apart_on_one_lengthscale(self):
        features = features_of(Space.enumerate([Parameter("p", ("a", "b", "c"), "")]))
        distances = [np.linalg.norm(features.points[i] - features.points[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert distances == pytest.approx([1.0, 1.0, 1.0])
        assert features.group_count == 1

    def test_a_knob_that_does_not_apply_lies_in_the_middle(self):
        assert axes_of(None, 1, 2, 4) == [(0, [0.5, 0.0, 0.5, 1.0])]
        assert axes_of(None, False, True) == [(0, [0.5, 0.0, 1.0])]

    def test_a_knob_with_nothing_to_choose_has_no_axis(self):
        assert axes_of(7) == axes_of(None, 7) == []


def some_features(rng, count=40):
    return Features(rng.random((count, 4)), np.array([0, 1, 1, 2]))


class TestRegression:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 1000))
    def test_the_gradient_is_that_of_the_value(self, seed):
        rng = np.random.default_rng(seed)
        count, groups = 12, 3
        distances = rng.random((groups, count, 2))
        distances = ((distances[:, :, None] - distances[:, None]) ** 2).sum(axis=3)
        prior = LogPrior.default(groups)
        at = prior.mean + 0.3 * rng.standard_normal(groups + 2)
        targets = rng.standard_normal(count)
        _, gradient = negative_log_posterior(at, distances, targets, prior)
        for i, step in enumerate(np.eye(groups + 2) * 1e-5):
            above, _ = negative_log_posterior(at + step, distances, targets, prior)
            below, _ = negative_log_posterior(at - step, distances, targets, prior)
            assert gradient[i] == pytest.approx((above - below) / 2e-5, rel=1e-3, abs=1e-4)

    def test_an_axis_without_influence_gets_the_longer_lengthscale(self):
        rng = np.random.default_rng(0)
        features = some_features(rng, 60)
        targets = np.sin(6 * features.points[:, 0])
        kernel = fit(features, np.arange(60), (targets - targets.mean()) / targets.std(), None)
        assert kernel.log_parameters[0] < kernel.log_parameters[1] - 1
        assert kernel.log_parameters[0] < kernel.log_parameters[2] - 1

    def test_many_observations_are_fitted_by_a_part_of_them(self, monkeypatch):
        rng = np.random.default_rng(0)
        features = some_features(rng, 120)
        targets = np.sin(6 * features.points[:, 0])
        monkeypatch.setattr("tilewright.tuner.search.regression.MAX_FITTED", 50)
        kernel = fit(features, np.arange(120), (targets - targets.mean()) / targets.std(), None)
        assert kernel.log_parameters[0] < kernel.log_parameters[1] - 1

    def test_the_incremental_posterior_is_the_textbook_one(self):
        rng = np.random.default_rng(1)
        features = some_features(rng)
        kernel = Kernel(np.log([0.5, 0.8, 2.0, 1.3, 0.01]))
        candidates, first, later = np.arange(5, 40), np.array([0, 7, 9]), [3, 20, 1, 30, 2]
        posterior = Posterior(kernel, features, candidates, first)
        for row in later:
            posterior.observe(row)
        observed = [*first, *later]
        targets = rng.standard_normal(len(observed))
        mean, deviation = posterior.predict(targets)

        scaled = features.points / np.array([0.5, 0.8, 0.8, 2.0])
        r = np.sqrt(5 * ((scaled[:, None] - scaled[None]) ** 2).sum(axis=2))
        covariance = 1.3 * (1 + r + r**2 / 3) * np.exp(-r)
        inverse = np.linalg.inv(covariance[np.ix_(observed, observed)] + 0.01 * np.eye(len(observed)))
        cross = covariance[np.ix_(candidates, observed)]
        assert posterior.observed == observed
        assert mean == pytest.approx(cross @ inverse @ targets, abs=1e-4)
        assert deviation**2 == pytest.approx(1.3 - np.einsum("ij,jk,ik->i", cross, inverse, cross), abs=1e-4)


class TestTargets:
    def test_slow_times_are_compressed_in_order_and_failures_are_as_bad_as_the_slowest(self):
        logs = [0.0, 1.0, 2.0, 3.0, math.nan, 10.0, 20.0]
        values = compressed(logs)
        assert values[:4].tolist() == [0.0, 1.0, 2.0, 3.0]
        assert values[3] < values[5] < values[6] < 20.0
        assert values[4] == values[6]

    def test_failures_have_no_logarithm(self):
        assert logs_or_nan([math.e, None, 1.0]) == pytest.approx([1.0, math.nan, 0.0], nan_ok=True)

    def test_what_is_maximised_keeps_its_order_and_what_has_no_logarithm_its_values(self):
        assert logs_or_nan([-math.e, None, -1.0]) == pytest.approx([-1.0, math.nan, 0.0], nan_ok=True)
        assert logs_or_nan([-2.0, 0.0, 5.0]).tolist() == [-2.0, 0.0, 5.0]


class TestAcquisition:
    @pytest.mark.parametrize(("mean", "deviation", "best"), [(0.0, 1.0, 0.5), (1.0, 0.3, 0.2), (-2.0, 2.0, -1.0)])
    def test_it_is_the_expected_improvement(self, mean, deviation, best):
        expected, _ = quad(lambda y: (best - y) * norm.pdf(y, mean, deviation), mean - 12 * deviation, best)
        computed = log_expected_improvement(np.array([mean]), np.array([deviation]), best)
        assert np.exp(computed[0]) == pytest.approx(expected, rel=1e-6)

    def test_it_still_ranks_what_is_hopeless(self):
        means = np.concatenate([np.linspace(-5, 5, 101), np.logspace(1, 5, 50)])
        gain = log_expected_improvement(means, np.ones(len(means)), 0.0)
        assert np.isfinite(gain).all()
        assert (np.diff(gain) < 0).all()

    def test_spread_rows_are_distinct_and_reach_the_corners(self):
        points = np.stack(np.meshgrid(*[np.linspace(0, 1, 6)] * 2), axis=-1).reshape(-1, 2)
        rows = spread_rows(points, 8, np.random.default_rng(0))
        assert len(set(rows)) == 8
        corners = {(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)}
        assert corners <= {tuple(points[row]) for row in rows}


BOWL = Space.enumerate([Parameter(name, (1, 2, 4, 8, 16, 32), "") for name in "abcd"])


def bowl_us(config):
    """Best at (4, 8, 4, 8); a third of the space fails."""
    if config["d"] >= 16:
        return None
    octaves_off = sum(abs(math.log2(config[name]) - best) for name, best in {"a": 2, "b": 3, "c": 2, "d": 3}.items())
    return 10.0 * math.exp(0.2 * octaves_off)


def prior_of(source, count=40, seed=0):
    """What a neighbour with the same bowl, 10 times as slow, has seen at random configs."""
    rows = np.random.default_rng(seed).choice(len(BOWL), count, replace=False)
    return Prior(source, tuple((BOWL[r], 10 * bowl_us(BOWL[r])) for r in rows if bowl_us(BOWL[r]) is not None))


class TestPriorAxes:
    own = features_of(BOWL)

    def test_a_prior_becomes_an_axis_along_which_its_good_configs_are_near_zero(self):
        features = with_prior_axes(BOWL, self.own, [prior_of("other size", 200)])
        assert features.group_count == self.own.group_count + 1
        axis = features.points[:, -1]
        assert (axis.min(), axis.max()) == (0.0, 1.0)
        best = BOWL.index_of({"a": 4, "b": 8, "c": 4, "d": 8})
        assert axis[best] < np.quantile(axis, 0.02)

    def test_a_large_space_is_predicted_in_chunks_to_the_same_effect(self, monkeypatch):
        whole = with_prior_axes(BOWL, self.own, [prior_of("other size")])
        monkeypatch.setattr("tilewright.tuner.search.transfer.CHUNK", 500)
        assert with_prior_axes(BOWL, self.own, [prior_of("other size")]).points == pytest.approx(whole.points, abs=1e-4)

    def test_only_the_nearest_priors_become_axes(self):
        features = with_prior_axes(BOWL, self.own, [prior_of(str(seed), seed=seed) for seed in range(6)])
        assert features.group_count == self.own.group_count + 4

    @pytest.mark.parametrize(
        "results",
        [
            (),
            tuple((BOWL[row], 5.0 + row) for row in range(9)),
            tuple((Config({"a": row}), 5.0 + row) for row in range(20)),
            tuple((BOWL[row], 5.0) for row in range(20)),
        ],
        ids=["none", "few", "of another space", "all equal"],
    )
    def test_a_prior_that_says_nothing_becomes_no_axis(self, results):
        features = with_prior_axes(BOWL, self.own, [Prior("neighbour", results)])
        assert features.group_count == self.own.group_count

    def test_with_a_prior_the_best_config_is_found_in_fewer_tries(self):
        times = searched(GaussianProcessSampler(BOWL, seed=0, budget=25, priors=[prior_of("other size")]), 25)
        assert min(t for t in times if t is not None) == pytest.approx(10.0)


class TestSearch:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_it_finds_the_best_of_1296_configs_in_60_tries_though_many_fail(self, seed):
        times = searched(GaussianProcessSampler(BOWL, seed=seed, budget=60), 60)
        assert min(t for t in times if t is not None) == pytest.approx(10.0)

    def test_it_finds_the_largest_where_a_study_maximises(self):
        study = optuna.create_study(sampler=GaussianProcessSampler(BOWL, seed=0, budget=60), direction="maximize")
        study.optimize(lambda trial: 1e3 / (bowl_us(suggest(trial, BOWL)) or math.inf), n_trials=60)
        assert study.best_value == pytest.approx(100.0)

    def test_a_config_being_tried_is_certain_enough_not_to_attract_the_next_ask(self):
        sampler = GaussianProcessSampler(BOWL, seed=0, budget=60)
        study = optuna.create_study(sampler=sampler)
        distributions = distributions_of(BOWL.parameters)
        searched(sampler, 20, study)
        outstanding = [study.ask(distributions) for _ in range(3)]
        study.ask(distributions)
        rows = {BOWL.index_of(config_of(BOWL, trial.params)) for trial in outstanding}
        assert sampler._posterior is not None
        assert rows <= set(sampler._posterior.observed)
        for trial in outstanding:
            study.tell(trial, state=TrialState.FAIL)
        study.ask(distributions)
        # What was believed of them has made room for what came out.
        assert rows <= set(sampler._posterior.observed)

    def test_trials_that_a_posterior_knows_and_a_study_does_not_are_forgotten(self):
        sampler = GaussianProcessSampler(BOWL, seed=0, budget=60)
        searched(sampler, 20)
        times = searched(sampler, 60, optuna.create_study(sampler=sampler))
        assert min(t for t in times if t is not None) == pytest.approx(10.0)

    def test_a_space_larger_than_the_candidates_is_searched_around_the_best_config(self, monkeypatch):
        monkeypatch.setattr(gaussian_process, "MAX_CANDIDATES", 100)
        times = searched(GaussianProcessSampler(BOWL, seed=0, budget=60), 60)
        assert min(t for t in times if t is not None) == pytest.approx(10.0)


def searched(sampler: GaussianProcessSampler, count: int, study: optuna.Study | None = None) -> list[float | None]:
    """Times of what was tried."""
    study = study or optuna.create_study(sampler=sampler)
    times = []
    for _ in range(count):
        trial = study.ask(distributions_of(BOWL.parameters))
        times.append(bowl_us(config_of(BOWL, trial.params)))
        study.tell(trial, times[-1], state=TrialState.FAIL if times[-1] is None else TrialState.COMPLETE)
    return times
