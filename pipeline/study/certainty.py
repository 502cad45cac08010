"""How sure the difference between two configs is: confidence intervals over training seeds.

Every config trained with the same seeds, so a score is modelled as the sum of a config's effect, a seed's effect that
all configs share, and a residual:

    score[i, j] = mean + config[i] + seed[j] + residual[i, j]

The seed's effect cancels in the difference of two configs' means over S seeds. With residuals of variance s² that
difference has the variance 2 s² / S. The residuals of all K configs together estimate s² with (K - 1)(S - 1) degrees of
freedom, where a paired t interval of the two configs alone has S - 1: 8 against 2 for five configs and three seeds, and
so an interval of half the width. This is the randomized block design, with seeds as blocks: Montgomery, Design and
Analysis of Experiments, chapter 4.

A common s² supposes that the residuals of all configs vary alike. A config whose residuals vary too much by Cochran's
test (1941, https://doi.org/10.1111/j.1469-1809.1941.tb02271.x) is left out of the estimate, and compared by a paired t
interval.

The interval speaks of other seeds, not of other data. `benchmarks/certainty.py` measures how often it is right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import fdtri, stdtrit

Scores = npt.NDArray[np.float64]
"""The objective of each config with each seed: (config, seed)."""

CONFIDENCE = 0.95
OUTLIER_LEVEL = 0.05
"""Probability, at most, that Cochran's test finds an outlier where all variances are equal."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """By how much a config is better than another, over training seeds."""

    mean: float
    """In units of the objective; positive if the first config is better, whatever the objective's direction."""
    low: float
    """The lower end of the 95 % confidence interval."""
    high: float
    """The upper end."""
    method: Literal["pooled", "paired"]
    """How the residual's variance was estimated: from all configs that vary alike, or from these two alone."""

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def compare(
    scores: npt.ArrayLike, first: int, second: int, *, direction: Literal["minimize", "maximize"]
) -> Difference:
    """Return by how much one config is better than another.

    Scores that differ by the same number at every seed give an interval of no width.

    Args:
        scores: (config, seed), all finite, at least two configs and two seeds. A config that lacks a seed cannot take
            part.
        first: Row of the config that the difference speaks for.
        second: Row of the config that it is compared with.
        direction: Whether lower or higher scores are better.
    """
    values = np.asarray(scores, dtype=np.float64)
    seeds = values.shape[1]
    differences = values[first] - values[second] if direction == "maximize" else values[second] - values[first]
    mean = float(differences.mean())
    pool, sum_of_squares = _pool(values)
    method: Literal["pooled", "paired"]
    if first in pool and second in pool:
        freedom = (len(pool) - 1) * (seeds - 1)
        variance, method = 2 * sum_of_squares / freedom, "pooled"
    else:
        freedom, variance, method = seeds - 1, float(differences.var(ddof=1)), "paired"
    half_width = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / seeds)
    return Difference(mean=mean, low=mean - half_width, high=mean + half_width, method=method)


def residual_deviation(scores: npt.ArrayLike) -> float | None:
    """Return the standard deviation of a residual, from the configs that vary alike; None if nothing is known of it.

    Args:
        scores: (config, seed), as `compare` takes them.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or min(values.shape) < 2:
        return None
    pool, sum_of_squares = _pool(values)
    return math.sqrt(sum_of_squares / ((len(pool) - 1) * (values.shape[1] - 1)))


def _pool(values: Scores) -> tuple[list[int], float]:
    """Return the configs whose residuals vary alike, at least two, and the sum of their squared residuals.

    Cochran's test removes the config of the greatest variance, one config after another. The greatest of K variances is
    an outlier if its share of their sum exceeds 1 / (1 + (K - 1) / F), where F is the quantile 1 - level / K of the F
    distribution with S - 1 and (K - 1)(S - 1) degrees of freedom.
    """
    pool = list(range(len(values)))
    freedom = values.shape[1] - 1
    while True:
        kept = values[pool]
        residuals = kept - kept.mean(axis=1, keepdims=True) - kept.mean(axis=0) + kept.mean()
        squares = (residuals**2).sum(axis=1)
        others = len(pool) - 1
        total = float(squares.sum())
        quantile = float(fdtri(freedom, others * freedom, 1 - OUTLIER_LEVEL / len(pool)))
        if others == 1 or float(squares.max()) <= total / (1 + others / quantile):
            return pool, total
        del pool[int(squares.argmax())]
