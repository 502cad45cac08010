"""The figures of hyperparameters and scores: error by rate, slices, importance, confirmed seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.errors import counted
from pipeline.page.confirmed import Confirmed
from pipeline.page.markup import escaped
from pipeline.page.metric import MetricAxis
from pipeline.page.noise import Noise
from pipeline.page.results import Importance, StudyResults
from pipeline.page.scales import Categories, Linear, Log, Scale, plain
from pipeline.page.sentence import optimizer_title, rate_text
from pipeline.page.svg import SMALL, Mark, Plot
from pipeline.space.distributions import Choices, Range, is_searched, label
from pipeline.space.limits import Share
from pipeline.space.own_code import short_name
from pipeline.space.trial import EndedTrial, TrialState, number

COLOURS = 8
"""Colours of the palette; more optimizers than that begin again."""
MAX_SLICES = 12
"""Most hyperparameters that have a figure of their own, the most important first."""
LEAST_SHARE = 0.01
"""Importance below which a hyperparameter is named without a bar."""
MAX_NAME = 24
"""Most characters of a category's name in a figure."""

Figure = tuple[str, str]
"""The heading as HTML, and the SVG."""


def colour(results: StudyResults, optimizer: str) -> str:
    """Return the CSS class of an optimizer's colour; none for that of a baseline, which has the colour of text."""
    names = results.optimizers
    return f"c{names.index(optimizer) % COLOURS}" if optimizer in names else ""


def optimizer_keys(results: StudyResults) -> list[tuple[str, str]]:
    """Return the colour and the name of every optimizer, for a legend; none if there is one optimizer."""
    names = results.tried if len(results.tried) > 1 else []
    return [(colour(results, name), optimizer_title(name)) for name in names]


def errors_by_rate(results: StudyResults, axis: MetricAxis, noise: Noise | None) -> Iterator[Figure]:
    """Yield a figure per optimizer: every trial by base rate; shaded, the rates that are within noise of the winner."""
    for name in results.tried:
        trials = [trial for trial in results.trials if trial.config.optimizer.name == name]
        complete = sum(trial.state is TrialState.COMPLETE for trial in trials)
        title = optimizer_title(name)
        counts = f"{counted(len(trials), 'trial')}, {complete} complete"
        head = f'<b class="{colour(results, name)}">{escaped(title)}</b> <small>{counts}</small>'
        rates = [trial.config.optimizer.base_lr for trial in trials]
        plot = Plot(
            x=_scale_of(results.space.optimizers[name]["base_lr"], rates, text=rate_text),
            y=axis.scale,
            label=f"{axis.name} by base rate of {title}",
            x_title="base rate",
            downwards=axis.downwards,
        )
        _draw_trials(plot, results, axis, noise, [(trial.config.optimizer.base_lr, trial) for trial in trials])
        yield head, plot.render()


def slices(results: StudyResults, axis: MetricAxis, noise: Noise | None) -> list[Figure]:
    """Return a figure per searched hyperparameter besides the base rates, the most important first."""
    shares = results.importance.shares if results.importance is not None else {}
    searched = {
        name: domain
        for name, domain in results.space.parameters().items()
        if is_searched(domain) and name != "optimizer" and not name.endswith(".base_lr")
    }
    used = {name for trial in results.trials for name in trial.params}
    names = sorted(searched.keys() & used, key=lambda name: (-shares.get(name, 0.0), name))[:MAX_SLICES]
    return [_slice(results, axis, noise, name, searched[name]) for name in names]


def _slice(results: StudyResults, axis: MetricAxis, noise: Noise | None, name: str, domain: Any) -> Figure:
    trials = [trial for trial in results.trials if name in trial.params]
    if isinstance(domain, Choices):
        labels = [label(choice) for choice in domain.choices]
        placed = [(float(labels.index(t.params[name])), t) for t in trials if t.params[name] in labels]
        scale: Scale = Categories(names=[_cut(str(one)) for one in labels])
    else:
        placed = [(float(trial.params[name]), trial) for trial in trials]
        scale = _scale_of(
            domain, [value for value, _ in placed], text=_share if isinstance(domain.low, Share) else plain
        )
    plot = Plot(x=scale, y=axis.scale, label=f"{axis.name} by {name}", downwards=axis.downwards)
    _draw_trials(plot, results, axis, noise, placed)
    return f"<b>{escaped(short_name(name))}</b>", plot.render()


def importance_bars(importance: Importance) -> tuple[list[tuple[str, str]], list[str]]:
    """Return name and bar, as HTML, of the hyperparameters that matter, and the names of the others."""
    largest = max(importance.shares.values(), default=0.0) or 1.0
    ordered = sorted(importance.shares.items(), key=lambda item: -item[1])
    shown = [(name, share) for name, share in ordered[:MAX_SLICES] if share >= LEAST_SHARE]
    bars = [
        (
            escaped(short_name(name)),
            f'<i class="bar" style="width:{60 * share / largest:.1f}%"></i> {100 * share:.0f}\N{NO-BREAK SPACE}%',
        )
        for name, share in shown
    ]
    return bars, [short_name(name) for name, _ in ordered[len(shown) :]]


def confirmed_seeds(results: StudyResults, confirmed: Confirmed) -> str:
    """Return the figure of what was trained again: a point per seed, a bar at each mean, a line per seed."""
    strategies = [strategy for strategy in confirmed.strategies if strategy.values]
    values = [value for strategy in strategies for value in strategy.values.values()]
    if not values:
        return ""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.01
    plot = Plot(
        x=Linear(low=low - margin, high=high + margin),
        y=Categories(names=[_cut(strategy.label) for strategy in strategies]),
        label=f"{results.space.objective.metric} of each strategy on fresh seeds",
        x_title=results.space.objective.metric,
        size=(SMALL[0], 60 + 30 * len(strategies)),
        downwards=True,
    )
    for seed in confirmed.seeds:
        pairs = [(strategy.values[seed], row) for row, strategy in enumerate(strategies) if seed in strategy.values]
        plot.line(pairs, "curve faint", f"seed {seed}")
    for row, strategy in enumerate(strategies):
        css = "" if strategy.trial is None else colour(results, strategy.config.optimizer.name)
        plot.dots([(v, row, f"{strategy.label}, seed {seed}: {number(v)}") for seed, v in strategy.values.items()], css)
        if strategy.mean is not None:
            plot.box(
                plot.px(strategy.mean) - 1.5, plot.py(row) - 9, 3, 18, f"mean {css}", f"mean {number(strategy.mean)}"
            )
    return plot.render()


def _draw_trials(
    plot: Plot, results: StudyResults, axis: MetricAxis, noise: Noise | None, placed: Sequence[tuple[float, EndedTrial]]
) -> None:
    """Draw trials at x and their last value: complete as dots, others as rings, the winner with a ring round it."""
    near = {trial.number for trial in noise.trials} if noise is not None else set()
    inside = [x for x, trial in placed if trial.number in near]
    if inside and isinstance(plot.x, Linear | Log):
        plot.band(min(inside), max(inside))
    if noise is not None:
        plot.level(axis.drawn(noise.limit))
    elif (baseline := results.winning_baseline) is not None and baseline.mean is not None:
        plot.level(axis.drawn(baseline.mean))
    winner = results.winning_trial
    last: list[Mark] = []
    for name in results.optimizers:
        css = colour(results, name)
        own = [(x, t) for x, t in placed if t.config.optimizer.name == name]
        plot.rings(
            [mark for x, t in own if t.state is not TrialState.COMPLETE for mark in _marks(results, axis, x, t)], css
        )
        plot.dots([mark for x, t in own if t.state is TrialState.COMPLETE for mark in _marks(results, axis, x, t)], css)
        last += [mark for x, t in own if t is winner for mark in _marks(results, axis, x, t)]
    plot.rings(last, "winner", radius=6.5)


def _marks(results: StudyResults, axis: MetricAxis, x: float, trial: EndedTrial) -> Iterator[Mark]:
    value = results.last_value(trial)
    if value is not None:
        ended = "" if trial.state is TrialState.COMPLETE else f", {trial.state} after epoch {len(trial.epochs)}"
        yield x, axis.drawn(value), f"#{trial.number}: {number(value)}{ended}"


def _scale_of(domain: Any, values: Sequence[float], *, text: Any) -> Scale:
    """Return the axis of a hyperparameter: the range that was searched, or that of its values."""
    if isinstance(domain, Range):
        low, high, log = float(domain.low), float(domain.high), domain.log
    else:
        ends = [float(choice) for choice in (domain.choices if isinstance(domain, Choices) else (domain,))]
        ends += values
        log = min(ends) > 0
        low, high = (min(ends) / 3, max(ends) * 3) if log else (min(ends) - 1, max(ends) + 1)
    return Log(low=low, high=high, text=text) if log else Linear(low=low, high=high, text=text)


def _cut(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _share(value: float) -> str:
    return f"{value:g} %"
