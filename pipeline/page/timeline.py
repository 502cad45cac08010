"""The figures of the clock: trials from start to end, and throughput."""

from __future__ import annotations

import math

from pipeline.page.charts import colour
from pipeline.page.results import StudyResults
from pipeline.page.scales import Linear
from pipeline.page.svg import WIDE, Plot
from pipeline.space.trial import EndedTrial

MAX_SEPARATED = 20
"""Most groups of trials between which lines are drawn."""


class Clock:
    """The time in which trials trained; pauses between groups, such as those of a stopped search, are left out.

    Args:
        results: The study.
    """

    def __init__(self, results: StudyResults) -> None:
        self.groups = [group for group in _trials_of(results) if group]
        self._spans: list[tuple[float, float, float]] = []  # start, end, the pauses before
        pauses = 0.0
        end = math.inf
        for group in self.groups:
            start = min(trial.started for trial in group)
            pauses += max(0.0, start - end)
            end = max(trial.ended for trial in group)
            self._spans.append((start, end, pauses))
        self.pauses = pauses
        """Seconds left out."""
        self.total = max((self.at(end) for _, end, _ in self._spans), default=0.0)
        """Seconds in which trials trained."""

    def at(self, moment: float) -> float:
        """Return the seconds of training before a moment."""
        first = self._spans[0][0]
        before = [pauses for start, _, pauses in self._spans if start <= moment]
        return moment - first - (before[-1] if before else 0.0)


def _trials_of(results: StudyResults) -> list[list[EndedTrial]]:
    """Return the trials of each group; all together if the groups are not known."""
    if not results.groups:
        return [list(results.trials)]
    return [[trial for trial in results.trials[group.start : group.stop]] for group in results.groups]


def trial_bars(results: StudyResults, clock: Clock) -> str:
    """Return the figure of trials as bars from start to end, in the order of their numbers; groups are separated."""
    if clock.total <= 0:
        return ""
    count = len(results.trials)
    plot = Plot(
        x=_clock_scale(clock),
        y=Linear(low=0, high=count, whole=True),
        label="trials by time",
        size=WIDE,
        x_title=f"{_unit(clock)[1]} of training",
        downwards=True,
    )
    scale = _unit(clock)[0]
    row = (plot.bottom - plot.top) / count
    for trial in results.trials:
        left, right = plot.px(clock.at(trial.started) / scale), plot.px(clock.at(trial.ended) / scale)
        css = f"span {trial.state} {colour(results, trial.config.optimizer.name)}"
        y = plot.top + row * (trial.number + 0.1)
        plot.box(left, y, max(right - left, 1), max(0.8 * row, 0.4), css, f"#{trial.number} {trial.state}")
    for group in clock.groups[1:] if len(clock.groups) <= MAX_SEPARATED else ():
        plot.level(group[0].number, "between")
    return plot.render()


def throughput(results: StudyResults, clock: Clock) -> str:
    """Return the figure of trial-epochs per second, group by group."""
    scale = _unit(clock)[0]
    bars = []
    for group in clock.groups:
        start, end = clock.at(min(t.started for t in group)), clock.at(max(t.ended for t in group))
        if end > start:
            bars.append((start / scale, end / scale, sum(len(t.epochs) for t in group) / (end - start), group))
    if not bars:
        return ""
    plot = Plot(
        x=_clock_scale(clock),
        y=Linear(low=0, high=1.15 * max(speed for _, _, speed, _ in bars)),
        label="trial-epochs per second by time",
        size=WIDE,
        x_title=f"{_unit(clock)[1]} of training",
    )
    for start, end, speed, group in bars:
        words = f"#{group[0].number} to #{group[-1].number}: {speed:.3g} trial-epochs per second"
        left, top = plot.px(start) + 1, plot.py(speed)
        plot.box(left, top, max(1.0, plot.px(end) - left - 1), plot.bottom - top, "speed", words)
    return plot.render()


def _clock_scale(clock: Clock) -> Linear:
    return Linear(low=0, high=max(clock.total / _unit(clock)[0], 1e-3))


def _unit(clock: Clock) -> tuple[float, str]:
    """Return the seconds of the unit of time, and its name."""
    if clock.total < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if clock.total < 3 * 3600 else (3600.0, "hours")
