"""The best trials of a running search, with the values of the objective as curves of characters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from pipeline.app.display import strategy_line
from pipeline.space.config import TrialConfig
from pipeline.space.pruners import Score
from pipeline.space.search_space import Objective, SearchSpace
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics, number

LEVELS = "▁▂▃▄▅▆▇█"
"""Characters of a curve, lowest value first."""
LONG, SHORT = 20, 10
"""Most characters of a curve, on a terminal of `WIDE` columns or more and on another."""
WIDE = 80


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The epochs of a trial, running or ended."""

    number: int
    config: TrialConfig
    epochs: tuple[EpochMetrics, ...]
    score: Score | None
    """None before the first epoch with a finite value."""
    values: Mapping[int, float]
    """Epoch to the value of the objective's metric, where it is finite."""


def curve(trial: BegunTrial | EndedTrial | Curve, objective: Objective, *then: EpochMetrics) -> Curve:
    """Return the curve of a trial, with further epochs."""
    epochs = (*trial.epochs, *then)
    measured = objective.measured(epochs)
    return Curve(
        number=trial.number,
        config=trial.config,
        epochs=epochs,
        score=objective.score(measured) if measured else None,
        values={epoch.epoch: epoch.metrics[objective.metric] for epoch in measured},
    )


def curves_table(curves: Sequence[Curve], space: SearchSpace, *, running: Collection[int], columns: int) -> Table:
    """Return a table of trials, each with its curve; all curves have one scale.

    Args:
        curves: At least one epoch of each has a finite value.
        space: Names the metric.
        running: Numbers of the trials that run.
        columns: Width of the terminal.
    """
    values = [value for curve in curves for value in curve.values.values()]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    for column in ("#", space.objective.metric, "", "epoch"):
        table.add_column(column, no_wrap=True)
    table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
    for curve in curves:
        trained, epochs = len(curve.epochs), curve.config.epochs
        width = LONG if columns >= WIDE else SHORT
        line = sparkline(curve.values, epochs, low=min(values), high=max(values), width=width)
        table.add_row(
            str(curve.number),
            number(space.objective.value(space.objective.measured(curve.epochs))),
            Text(line, style="cyan" if curve.number in running else ""),
            f"{trained}/{epochs}",
            Text(strategy_line(curve.config, space), style="dim"),
        )
    return table


def sparkline(values: Mapping[int, float], epochs: int, *, low: float, high: float, width: int) -> str:
    """Return a curve of one character per epoch, or per several: `▁▃▅▆▇····`, where `·` is still to come.

    Args:
        values: Epoch, counted from 1, to value.
        epochs: Number of epochs that the whole curve stands for.
        low: Value of the lowest character.
        high: Value of the highest character.
        width: Most characters.
    """
    width = min(width, epochs)
    marks = []
    for place in range(width):
        first, last = epochs * place // width + 1, epochs * (place + 1) // width
        newest = max((epoch for epoch in range(first, last + 1) if epoch in values), default=None)
        share = (values[newest] - low) / (high - low) if newest is not None and high > low else 0.0
        marks.append("·" if newest is None else LEVELS[round(share * (len(LEVELS) - 1))])
    return "".join(marks)
