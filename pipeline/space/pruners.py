"""Pruners: which trials of a group stop after an epoch, decided for the whole group at once.

Optuna's pruners judge one trial at a time and store their verdicts, so the order of the calls decides which trials
continue. Here the verdict is a function of two sets: the scores of the group, and the scores of earlier trials after
the same epoch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, cast

from pipeline.space.limits import Interval, Length, Share, by_name

FIRST_RUNG = cast("int", Share(15))
"""Share of the run before the first rung, as a file has it; a pruner that was read from a file has a count."""
NO_RUNG_AFTER = cast("int", Share(50))
"""Share of the run after which there is no rung: late decay decides then, and a trial costs little more to its end."""
Score = tuple[float, float]
"""Score of a trial after an epoch, smaller is better: the objective, negated if maximized, then validation loss."""


class Pruner(Protocol):
    """A dataclass with a literal field `name`; its other fields are the pruner's keys in a file."""

    @property
    def name(self) -> str:
        """The pruner's name in a file."""
        ...

    def averages(self, epoch: int) -> bool:
        """Return whether the scores after `epoch` epochs are those of averaged weights."""
        ...

    def compares(self, epoch: int) -> bool:
        """Return whether trials may stop after `epoch` epochs."""
        ...

    def stops(self, epoch: int, group: Mapping[int, Score], earlier: Sequence[Score]) -> set[int]:
        """Return the numbers of the group's trials that stop after `epoch` epochs.

        Args:
            epoch: Counts from 1.
            group: Trial number to score; equal scores are ranked by number, the lower one first.
            earlier: Scores of the trials of earlier groups after the same epoch.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SuccessiveHalving:
    """Keep at each rung the best 1/`reduction_factor` of all trials that ever reached the rung.

    Rungs are at `min_resource` times each power of `reduction_factor`, up to `max_resource`: epochs 3 and 6 of 20. A
    trial is compared with every trial so far, of its group and of earlier groups: Li et al. (2018),
    https://arxiv.org/abs/1810.05934, without promotions.
    """

    name: Literal["successive_halving"] = "successive_halving"
    min_resource: Length = FIRST_RUNG
    """Epochs before the first rung; in percent, of the run."""
    max_resource: Length = NO_RUNG_AFTER
    """Epochs after which no trial stops any more; in percent, of the run."""
    reduction_factor: Annotated[int, Interval(ge=2)] = 2
    """One in this many trials is kept at a rung."""
    averaged: bool = True
    """Whether rungs compare the means of the weights over an epoch, which is fair to rates that are still high."""

    def averages(self, epoch: int) -> bool:
        """Return whether there is a rung, and it compares averaged weights."""
        return self.averaged and self._is_rung(epoch)

    def compares(self, epoch: int) -> bool:
        """Return whether there is a rung."""
        return self._is_rung(epoch)

    def stops(self, epoch: int, group: Mapping[int, Score], earlier: Sequence[Score]) -> set[int]:
        """Return the trials that stop; see `Pruner`."""
        if not self._is_rung(epoch):
            return set()
        ranked = sorted([*((score, number) for number, score in group.items()), *((score, -1) for score in earlier)])
        kept = max(1, len(ranked) // self.reduction_factor)
        return {number for _, number in ranked[kept:] if number >= 0}

    def _is_rung(self, epoch: int) -> bool:
        assert not isinstance(self.min_resource, Share), "a share of the run is a count once a file is read"
        if epoch > self.max_resource:
            return False
        rung = self.min_resource
        while rung < epoch:
            rung *= self.reduction_factor
        return rung == epoch


@dataclass(frozen=True, kw_only=True)
class Median:
    """Stop a trial whose score is worse than the median of all trials so far after the same epoch."""

    name: Literal["median"] = "median"
    n_startup_trials: Annotated[int, Interval(ge=1)] = 5
    """Trials that must have reached an epoch before any trial stops there."""
    n_warmup_epochs: Annotated[int, Interval(ge=0)] = 4
    """First epochs, after which no trial stops."""

    def averages(self, epoch: int) -> bool:
        """Return False: every epoch is compared, as Optuna does."""
        return False

    def compares(self, epoch: int) -> bool:
        """Return whether the first epochs are over."""
        return epoch > self.n_warmup_epochs

    def stops(self, epoch: int, group: Mapping[int, Score], earlier: Sequence[Score]) -> set[int]:
        """Return the trials that stop; see `Pruner`."""
        scores = [*group.values(), *earlier]
        if epoch <= self.n_warmup_epochs or len(scores) < self.n_startup_trials:
            return set()
        median = statistics.median_low(scores)
        return {number for number, score in group.items() if score > median}


@dataclass(frozen=True, kw_only=True)
class NoPruner:
    """Train every trial for all its epochs."""

    name: Literal["none"] = "none"

    def averages(self, epoch: int) -> bool:
        """Return False."""
        return False

    def compares(self, epoch: int) -> bool:
        """Return False."""
        return False

    def stops(self, epoch: int, group: Mapping[int, Score], earlier: Sequence[Score]) -> set[int]:
        """Return no trial."""
        return set()


PRUNERS: Mapping[str, type[Pruner]] = by_name(SuccessiveHalving, Median, NoPruner)


def score(value: float, loss: float, *, direction: str) -> Score:
    """Return the score of an objective value and a validation loss."""
    assert math.isfinite(value)
    return (-value if direction == "maximize" else value, loss)
