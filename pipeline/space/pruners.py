"""Which trials of a group stop at an epoch: our own rule, decided for all of them at once.

Optuna's pruners judge one trial at a time and remember those they have judged, so which trials survive depends on the
order in which they are asked. Here the verdict is a function of two sets: the scores that earlier trials had at the
same epoch, and those of the group.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.space.limits import Interval

Score = tuple[float, float]
"""How good a trial is after an epoch, smaller is better: the objective, negated if maximized, then validation loss."""


@dataclass(frozen=True, kw_only=True)
class SuccessiveHalving:
    """At each rung, go on with the best 1/`reduction_factor` of all trials that ever reached it.

    Rungs are at `min_resource` epochs and at that times each power of `reduction_factor`. A trial is compared with
    every trial so far, of its group and of earlier ones; Li et al. (2018), https://arxiv.org/abs/1810.05934, without
    its promotions.
    """

    name: Literal["successive_halving"] = "successive_halving"
    min_resource: Annotated[int, Interval(ge=1)] = 4
    """Epochs before the first rung."""
    reduction_factor: Annotated[int, Interval(ge=2)] = 2

    def stops(self, epoch: int, group: Mapping[int, Score], earlier: Sequence[Score]) -> set[int]:
        """Return the numbers of the group's trials that stop after `epoch` epochs; see `Pruner`."""
        if not self._is_rung(epoch):
            return set()
        ranked = sorted([*((score, number) for number, score in group.items()), *((score, -1) for score in earlier)])
        kept = max(1, len(ranked) // self.reduction_factor)
        return {number for _, number in ranked[kept:] if number >= 0}

    def _is_rung(self, epoch: int) -> bool:
        rung = self.min_resource
        while rung < epoch:
            rung *= self.reduction_factor
        return rung == epoch


@dataclass(frozen=True, kw_only=True)
class Median:
    """Stop a trial that is worse than the median of all trials so far at the same epoch."""

    name: Literal["median"] = "median"
    n_startup_trials: Annotated[int, Interval(ge=1)] = 5
    """How many trials must have reached an epoch before any stops there."""
    n_warmup_epochs: Annotated[int, Interval(ge=0)] = 4
    """Epochs after which no trial stops yet."""

    def stops(self, epoch: int, group: Mapping[int, Score], earlier: Sequence[Score]) -> set[int]:
        """Return the numbers of the group's trials that stop after `epoch` epochs; see `Pruner`."""
        scores = [*group.values(), *earlier]
        if epoch <= self.n_warmup_epochs or len(scores) < self.n_startup_trials:
            return set()
        median = statistics.median_low(scores)
        return {number for number, score in group.items() if score > median}


@dataclass(frozen=True, kw_only=True)
class NoPruner:
    """Every trial trains for all its epochs."""

    name: Literal["none"] = "none"

    def stops(self, epoch: int, group: Mapping[int, Score], earlier: Sequence[Score]) -> set[int]:
        """Return no number."""
        return set()


Pruner = SuccessiveHalving | Median | NoPruner
"""Each has `stops(epoch, group, earlier)`: the trials of `group`, number to score, that stop after `epoch` epochs,
given the scores of `earlier` groups' trials at that epoch. Equal scores are decided by number, the lower one first."""


def score(value: float, loss: float, *, direction: str) -> Score:
    """Return the score of an objective value and a validation loss."""
    assert math.isfinite(value)
    return (-value if direction == "maximize" else value, loss)
