"""What neighbouring problems teach about this one, beyond their best configs."""

from collections.abc import Sequence

import numpy as np

from tilewright.codegen.space import Space
from tilewright.tuner.search.features import Features, FloatArray
from tilewright.tuner.search.regression import Posterior, fit
from tilewright.tuner.search.sampler import Prior
from tilewright.tuner.search.targets import compressed, logs_or_nan

MAX_SOURCES = 4
"""Priors that become axes, the first ones given: every axis is one more lengthscale to fit."""

FEWEST_RESULTS = 10
"""Results in this space without which a prior becomes no axis: it could say nothing about the other configs."""

CHUNK = 30_000
"""Configs predicted at a time, which bounds the memory that a large space takes."""


def with_prior_axes(space: Space, features: Features, priors: Sequence[Prior]) -> Features:
    """Add one axis per prior: how slow its problem would find each config, from 0 (best) to 1.

    As an axis, and not as a mean, a neighbour that behaves differently does no harm: the fit gives it a long
    lengthscale, and whatever relation there is need not be linear.
    """
    axes = [axis for prior in priors[:MAX_SOURCES] if (axis := _predicted(space, features, prior)) is not None]
    first_group = features.group_count
    return Features(
        np.column_stack([features.points, *axes]),
        np.concatenate([features.groups, np.arange(first_group, first_group + len(axes))]),
    )


def _predicted(space: Space, features: Features, prior: Prior) -> FloatArray | None:
    time_of_row = {row: time_us for config, time_us in prior.results if (row := space.find(config)) is not None}
    if len(time_of_row) < FEWEST_RESULTS or not features.group_count:
        return None
    rows = np.array(list(time_of_row))
    values = compressed(logs_or_nan(list(time_of_row.values())))
    if values.std() == 0:
        return None
    if len(rows) == len(space):  # a model says it of every config: there is nothing to fit
        axis = np.empty(len(space))
        axis[rows] = (values - values.min()) / np.ptp(values)
        return axis
    targets = (values - values.mean()) / values.std()
    kernel = fit(features, rows, targets, None)
    chunks = np.split(np.arange(len(space)), range(CHUNK, len(space), CHUNK))
    mean = np.concatenate([Posterior(kernel, features, chunk, rows).predict(targets)[0] for chunk in chunks])
    span = float(mean.max() - mean.min())
    return (mean - mean.min()) / span if span else None
