"""The figures of epochs: learning rates per group, and the score of every trial."""

from __future__ import annotations

from pipeline.page.charts import COLOURS, colour
from pipeline.page.metric import MetricAxis
from pipeline.page.results import StudyResults
from pipeline.page.scales import Linear, Log
from pipeline.page.sentence import rate_text
from pipeline.page.svg import WIDE, Plot, text_width
from pipeline.space.trial import EndedTrial, TrialState

MAX_POINTS = 60_000
"""Most points of all learning curves together; longer curves have every second epoch, or fewer."""
MAX_RATE_POINTS = 160
"""Most points of a curve of rates, which has one for each optimizer step of some schedules."""
RATE_DECADES = 4.0
"""Most powers of ten of the axis of rates; lower rates are drawn at its end."""
MAX_RUNGS = 6
"""Most rungs that are drawn without a label."""
MAX_LABELS = 6
"""Most groups whose rates are written beside the figure."""
MAX_NAME = 13
"""Most characters of a group's name there."""
FIRST_COLOUR = 3
"""Colour of the first of several groups; the colours before it are those of the best optimizers."""
MANY = 200
"""Trials from which learning curves are drawn thinner."""

Points = list[tuple[float, float]]


def rate_curves(results: StudyResults) -> str:
    """Return the figure of learning rates per group: the winner's, and faintly those of the next trials."""
    curves = [(trial, _rates(trial)) for trial in results.with_rates]
    every = [rate for _, groups in curves for points in groups.values() for _, rate in points if rate > 0]
    if not every:
        return ""
    high = max(every)
    low = max(min(every), high / 10**RATE_DECADES)
    texts = _labels(results, *curves[0])
    plot = Plot(
        x=Linear(low=0, high=results.space.epochs, whole=True),
        y=Log(low=low / 1.3, high=high * 1.3, text=rate_text),
        label="learning rate per group by epoch",
        x_title="epoch",
        beside=14 + max((text_width(line) for _, lines, _ in texts for line in lines), default=0),
        size=WIDE,
    )
    for trial, groups in reversed(curves):
        weight = "bold" if trial is curves[0][0] else "faint"
        for name, points in groups.items():
            css, title = (
                f"curve {weight} {_group_colour(results, trial, name)}",
                f"{trial.confirms or f'#{trial.number}'} {name}",
            )
            if trial.config.scheduler.interval == "epoch":
                plot.steps(points, css, start=0.0, title=title)
            else:
                plot.line(points, css, title)
    plot.beside_text(texts)
    return plot.render()


def _rates(trial: EndedTrial) -> dict[str, Points]:
    """Return group to points (epochs trained, rate), without frozen groups."""
    epochs = trial.epochs
    per_epoch = max(1, epochs[0].step) if epochs else 1
    curves: dict[str, Points] = {}
    for name in trial.config.group_names:
        points = [(step / per_epoch, rate) for epoch in epochs for step, rate in epoch.lr.get(name, ())]
        if any(rate > 0 for _, rate in points):
            every = 1 if trial.config.scheduler.interval == "epoch" else -(-len(points) // MAX_RATE_POINTS)
            curves[name] = _thinned(points, every)
    return curves


def _labels(results: StudyResults, trial: EndedTrial, curves: dict[str, Points]) -> list[tuple[float, list[str], str]]:
    """Return the last rate, the lines and the CSS class of each group's text; of many, the first and last groups'."""
    names = list(curves)
    shown = names if len(names) <= MAX_LABELS else [*names[: MAX_LABELS // 2], *names[-(MAX_LABELS // 2) :]]
    texts = []
    for name in shown:
        title = name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
        css = f"strong {_group_colour(results, trial, name)}"
        texts.append((curves[name][-1][1], [title, _course([rate for _, rate in curves[name]])], css))
    return texts


def _course(rates: list[float]) -> str:
    """Return the first and the last rate, `2e-2→9.6e-3`; with a peak between them, the peak and the last."""
    first, peak, last = (rate_text(float(f"{rate:.1e}")) for rate in (rates[0], max(rates), rates[-1]))
    if peak not in (first, last):
        return f"↑{peak}→{last}"
    return first if first == last else f"{first}→{last}"


def _group_colour(results: StudyResults, trial: EndedTrial, name: str) -> str:
    """Return the CSS class of a group's colour; of a trial's only group, that of the optimizer."""
    names = trial.config.group_names
    if len(names) == 1:
        return colour(results, trial.config.optimizer.name)
    return f"c{(FIRST_COLOUR + names.index(name)) % COLOURS}"


def learning_curves(results: StudyResults, axis: MetricAxis) -> str:
    """Return the figure of every trial's score by epoch, with the pruning rungs; empty without a finished epoch."""
    count = sum(len(_scores(trial, results, axis)) for trial in results.trials)
    if count == 0:
        return ""
    every = -(-count // MAX_POINTS)
    plot = Plot(
        x=Linear(low=0, high=results.space.epochs, whole=True),
        y=axis.scale,
        label=f"{axis.name} of every trial by epoch",
        x_title="epoch",
        downwards=axis.downwards,
        above=1,
        size=WIDE,
    )
    labelled = _labelled_rungs(results, plot)
    for epoch in results.rungs:
        words = f"{results.reached(epoch)}→{results.passed(epoch)}" if epoch in labelled else ""
        if words or len(results.rungs) <= MAX_RUNGS:
            plot.rule(epoch, words)
    winner = results.winning_trial or results.baseline_run
    for trial in [*(t for t in results.trials if t is not winner), *([winner] if winner is not None else [])]:
        css = colour(results, trial.config.optimizer.name)
        weight = "bold" if trial is winner else "thin" if len(results.trials) > MANY else "faint"
        points, title = _scores(trial, results, axis), trial.confirms or f"#{trial.number}"
        if len(points) == 1:
            plot.dots([(*points[0], title)], css, radius=2)
        plot.line(_thinned(points, every), f"curve {weight} {css}", title if every == 1 else "")
    return plot.render()


def _scores(trial: EndedTrial, results: StudyResults, axis: MetricAxis) -> Points:
    objective = results.space.objective
    return [(e.epoch, axis.drawn(e.metrics[objective.metric])) for e in objective.measured(trial.epochs)]


def _labelled_rungs(results: StudyResults, plot: Plot) -> set[int]:
    """Return the rungs whose labels have room: those that pruned most first."""
    pruned = [len(trial.epochs) for trial in results.trials if trial.state is TrialState.PRUNED]
    chosen: list[int] = []
    for epoch in sorted(results.rungs, key=lambda rung: (-pruned.count(rung), rung)):
        width = text_width(f"{results.reached(epoch)}→{results.passed(epoch)} ")
        if all(abs(plot.px(epoch) - plot.px(other)) >= width for other in chosen):
            chosen.append(epoch)
    return set(chosen)


def _thinned(points: Points, every: int) -> Points:
    """Return every n-th point, and the last."""
    return points if every == 1 else [*points[: -1 or None : every], *points[-1:]]
