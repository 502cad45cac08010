"""The difference of two configs over seeds: against scipy, against least squares, and in simulated scores."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from pipeline.study.certainty import Difference, compare

LIKE = np.array([[0.30, 0.36, 0.27], [0.41, 0.44, 0.40], [0.35, 0.38, 0.30], [0.52, 0.57, 0.51]])
"""Scores (config, seed) whose residuals vary alike."""
NOISY = np.array([0.9, 0.2, 0.6])
"""A config whose scores vary much more."""


def paired(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % interval of a paired t test of `first` being higher than `second`."""
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def ends(difference: Difference) -> tuple[float, float]:
    return difference.low, difference.high


def test_a_worked_example_has_the_interval_that_was_computed_by_hand() -> None:
    # Residuals 0 0, -½ ½, ½ -½: their squares sum to 1, with (3 - 1)(2 - 1) = 2 degrees of freedom t is 4.3027.
    scores = [[10.0, 11.0], [12.0, 14.0], [20.0, 20.0]]
    difference = compare(scores, 0, 1, direction="minimize")
    assert difference.method == "pooled"
    assert difference.mean == 2.5
    half_width = 4.302653 * np.sqrt(2 * (1 / 2) / 2)
    assert ends(difference) == pytest.approx((2.5 - half_width, 2.5 + half_width), rel=1e-6)
    assert not difference.distinguishable


def test_the_interval_equals_that_of_least_squares_with_a_column_per_config_and_per_seed() -> None:
    configs, seeds = LIKE.shape
    columns = np.array(
        [[*np.eye(configs)[config], *np.eye(seeds)[seed][1:]] for config in range(configs) for seed in range(seeds)]
    )
    estimate, (squares,), _, _ = np.linalg.lstsq(columns, LIKE.ravel())
    freedom = LIKE.size - columns.shape[1]
    contrast = np.array([1.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    variance = squares / freedom * contrast @ np.linalg.inv(columns.T @ columns) @ contrast
    low, high = stats.t.interval(0.95, freedom, loc=contrast @ estimate, scale=np.sqrt(variance))
    assert ends(compare(LIKE, 0, 1, direction="maximize")) == pytest.approx((low, high))


@pytest.mark.parametrize("seeds", [2, 3])
def test_two_configs_alone_have_the_paired_t_interval(seeds: int) -> None:
    scores = LIKE[:2, :seeds]
    assert ends(compare(scores, 0, 1, direction="maximize")) == pytest.approx(paired(*scores))


def test_a_positive_difference_means_that_the_first_is_better_in_either_direction() -> None:
    lower, higher = compare(LIKE, 0, 1, direction="minimize"), compare(LIKE, 0, 1, direction="maximize")
    assert lower.mean == pytest.approx(LIKE[1].mean() - LIKE[0].mean())
    assert (lower.mean, *ends(lower)) == (-higher.mean, -higher.high, -higher.low)
    assert lower.distinguishable
    assert higher.distinguishable


def test_a_config_that_varies_much_more_is_compared_by_itself_and_widens_no_other_interval() -> None:
    scores = np.vstack([LIKE, NOISY])
    noisy = compare(scores, 0, 4, direction="maximize")
    assert noisy.method == "paired"
    assert ends(noisy) == pytest.approx(paired(LIKE[0], NOISY))
    assert compare(scores, 0, 1, direction="maximize") == compare(LIKE, 0, 1, direction="maximize")


def test_equal_scores_are_not_distinguishable_and_a_constant_difference_is() -> None:
    tied = [[0.9963, 0.9926, 0.9963]] * 3
    same = compare(tied, 0, 1, direction="maximize")
    assert (same.mean, *ends(same)) == pytest.approx((0.0, 0.0, 0.0))
    assert not same.distinguishable
    apart = compare([[3.0, 4.0], [1.0, 2.0]], 0, 1, direction="maximize")
    assert apart == Difference(mean=2.0, low=2.0, high=2.0, method="pooled")
    assert apart.distinguishable


def test_intervals_of_five_configs_and_three_seeds_are_right_as_often_as_they_say() -> None:
    # 5,000 repetitions have a standard error of 0.3 %.
    effects = np.array([0.0, 0.0, 3.0, -1.0, 1.0])  # in standard deviations of a run about config and seed
    generator = np.random.default_rng(0)
    runs = generator.normal(size=(5000, 5, 3)) + 2 * generator.normal(size=(5000, 1, 3)) + effects[:, None]
    same = [compare(scores, 0, 1, direction="maximize") for scores in runs]
    apart = [compare(scores, 2, 0, direction="maximize") for scores in runs]
    assert 0.94 <= np.mean([not difference.distinguishable for difference in same]) <= 0.96
    assert np.mean([difference.low > 0 for difference in apart]) >= 0.85
    assert 0.94 <= np.mean([difference.low <= 3.0 <= difference.high for difference in apart]) <= 0.98
