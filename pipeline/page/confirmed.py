"""What training the finalists again with fresh seeds has shown, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.space.config import TrialConfig


@dataclass(frozen=True, kw_only=True)
class ConfirmedStrategy:
    """A strategy that was trained again with fresh seeds."""

    label: str
    """What the strategy is called: `#33`, `Adam's default`."""
    config: TrialConfig
    trial: int | None
    """Number of the trial; None for a baseline."""
    values: Mapping[int, float]
    """Seed to the objective, of complete runs."""
    mean: float | None
    """None unless every run is complete."""
    std: float | None
    """Standard deviation over seeds; None unless every run is complete."""
    incomplete: Mapping[int, str] = field(default_factory=dict)
    """Seed to how a run ended that is not complete: `diverged` or `failed`."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The winner, whose mean is the best, against another strategy, paired over seeds."""

    other: str
    """Label of the other strategy."""
    better_by: float
    """Difference of the means, at least 0."""
    low: float
    """Lower end of the 95 % interval of the difference."""
    high: float
    """Upper end of the interval."""
    paired: bool = False
    """Whether these two strategies alone decide the interval, since runs of others vary otherwise."""

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """What training again has shown."""

    seeds: Sequence[int]
    strategies: Sequence[ConfirmedStrategy]
    """Best mean first; strategies without a mean last."""
    comparisons: Sequence[Comparison] = ()
    """The winner against the runner-up and against the better baseline."""
    complete: bool = True
    """Whether every planned run has ended."""
    test: Mapping[str, float] = field(default_factory=dict)
    """Metric to the winner's score on the test split."""
    residual: float | None = None
    """Standard deviation of a score without the effects of its strategy and its seed; None if it is not known."""
    reason: str = ""
    """Why there is no winner; empty if there is one."""

    @property
    def winner(self) -> ConfirmedStrategy | None:
        """The strategy with the best mean; None until every run has ended."""
        first = self.strategies[0] if self.strategies else None
        return first if self.complete and first is not None and first.mean is not None else None
