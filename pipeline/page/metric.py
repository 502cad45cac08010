"""How the objective is drawn: an accuracy as its error on a logarithmic axis, a positive loss on one, else linear."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cached_property

from pipeline.page.results import StudyResults
from pipeline.page.scales import Linear, Log, Scale, plain
from pipeline.space.trial import TrialState

MAX_DECADES = 4.0
"""Most powers of ten of a logarithmic axis: losses far above the best, and errors next to 0, are drawn at its end."""
SAMPLES_TOLERANCE, ROUNDING = 1e-3, 1.2e-7
"""Most that an accuracy times the number of samples may differ from a whole number: a part for sums, and float32's."""


class MetricAxis:
    """The axis of the objective in every figure of a report.

    Args:
        results: The study, whose values decide the kind of the axis and its ends.
    """

    def __init__(self, results: StudyResults) -> None:
        self._objective = results.space.objective
        drawn = [*results.trials, *([results.baseline_run] if results.baseline_run is not None else [])]
        every = [e.metrics[self._objective.metric] for t in drawn for e in self._objective.measured(t.epochs)]
        ended = [trial for trial in results.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        decisive = [value for trial in ended if (value := results.last_value(trial)) is not None]
        self.is_error = self._objective.direction == "maximize" and bool(every) and min(every) >= 0 and max(every) <= 1
        """Whether 1 - x is drawn in place of x."""
        self.downwards = self.is_error
        """Whether the axis is turned round, so that better is up where the metric itself is maximized."""
        self._drawn = sorted(self.drawn(value) for value in every)
        self._last = sorted(self.drawn(value) for value in decisive or every)

    @property
    def title(self) -> str:
        """What the axis shows, how, and which way is better."""
        name = f"{self.name} ({self._formula})" if self._formula else self.name
        return f"{name}{self._kind}, better is {self._better}"

    @property
    def note(self) -> str:
        """What the title says besides the name."""
        return f"{self._formula}{self._kind}, better is {self._better}".removeprefix(", ")

    @property
    def name(self) -> str:
        """What the axis shows."""
        metric = self._objective.metric
        if not self.is_error:
            return metric
        return "validation error" if self._formula else f"1 − {metric}"

    @property
    def _formula(self) -> str:
        """What the name stands for, if the name does not say it."""
        return "1 − accuracy" if self.is_error and self._objective.metric == "val/accuracy" else ""

    @property
    def _kind(self) -> str:
        return ", log axis" if isinstance(self.scale, Log) else ""

    @property
    def _better(self) -> str:
        return "up" if self._objective.direction == "maximize" else "down"

    def drawn(self, value: float) -> float:
        """Return what stands for a value of the objective."""
        return 1.0 - value if self.is_error else value

    @cached_property
    def scale(self) -> Scale:
        """The scale of what is drawn, over all epochs of all trials; far worse values are at its end."""
        if not self._drawn:
            return Linear(low=0.0, high=1.0)
        text = _percent if self.is_error else plain
        positive = [value for value in self._drawn if value > 0]
        if not positive or (not self.is_error and self._drawn[0] <= 0) or not self._falls:
            return self._linear()
        if self.is_error:
            high = positive[-1]
            low = max(positive[0], high / 10**MAX_DECADES)
        else:
            low = positive[0]
            high = min(self._last[-1], low * 10**MAX_DECADES)
        zero = self._drawn[0] <= 0
        return Log(low=low / (2.5 if zero else 1.25), high=max(high, low) * 1.25, text=text, zero=zero)

    @property
    def _falls(self) -> bool:
        """Whether smaller is better in what is drawn: small values then need the room of a logarithmic axis."""
        return self.is_error or self._objective.direction == "minimize"

    def _linear(self) -> Linear:
        """Return a linear axis that holds three quarters of the values, and as much again on the worse side."""
        minimized = self._objective.direction == "minimize" or self.is_error
        ordered = self._last if minimized else self._last[::-1]
        best, typical, worst = ordered[0], ordered[(3 * (len(ordered) - 1)) // 4], ordered[-1]
        end = best + 2 * (typical - best)
        end = min(end, worst) if minimized else max(end, worst)
        margin = 0.05 * abs(end - best) or 0.5
        return Linear(low=min(best, end) - margin, high=max(best, end) + margin)


def wrong_samples(results: StudyResults, value: float) -> int | None:
    """Return how many validation samples an accuracy leaves wrong; None if the metric does not count samples."""
    return round((1 - value) * results.val_samples) if results.val_samples and counts_samples(results) else None


def counts_samples(results: StudyResults) -> bool:
    """Say whether every value of the objective is a number of samples over all validation samples."""
    objective, samples = results.space.objective, results.val_samples
    values = [e.metrics[objective.metric] for t in results.trials for e in objective.measured(t.epochs)]
    if not samples or objective.direction != "maximize" or not values:
        return False
    tolerance = SAMPLES_TOLERANCE + ROUNDING * samples
    return all(0 <= v <= 1 and abs(v * samples - round(v * samples)) <= tolerance for v in values)


def last_scatter(results: StudyResults, *, trials: int = 5, epochs: int = 3) -> float | None:
    """Return the median, over the best trials, of the standard deviation of their last epochs; None if too short."""
    objective = results.space.objective
    ends: list[Sequence[float]] = [
        [epoch.metrics[objective.metric] for epoch in objective.measured(trial.epochs)[-epochs:]]
        for trial in results.ranking[:trials]
    ]
    spread = [statistics.stdev(end) for end in ends if len(end) == epochs]
    return statistics.median(spread) if spread else None


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %"
