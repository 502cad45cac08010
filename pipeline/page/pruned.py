"""What was pruned where: how many trials of each optimizer and schedule stopped at each rung."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from pipeline.page import charts
from pipeline.page.findings import name_of
from pipeline.page.markup import card, escaped, paragraphs, table
from pipeline.page.results import StudyResults
from pipeline.page.sentence import optimizer_title
from pipeline.space.distributions import Range
from pipeline.space.own_code import short_name
from pipeline.space.pruners import SuccessiveHalving
from pipeline.space.trial import EndedTrial, TrialState, number

Row = tuple[str, Sequence[EndedTrial]]
"""HTML that names some trials, and these trials."""


def pruned_where(results: StudyResults) -> str:
    """Return the section; empty if no trial was pruned."""
    if not results.rungs:
        return ""
    head = ["", "trials", *(f"after {epoch}" for epoch in results.rungs), "complete"]
    mishaps = any(trial.state in (TrialState.DIVERGED, TrialState.FAILED) for trial in results.trials)
    rows = [_cells(results, row, mishaps=mishaps) for row in [*_by_optimizer(results), *_by_schedule(results)]]
    drawn = table([*head, *(["diverged or failed"] if mishaps else [])], rows, css="best")
    words = [_rule(results), _nearest(results)]
    return card("Where trials were pruned", drawn, paragraphs(words), note="trials that stopped after an epoch")


def _by_optimizer(results: StudyResults) -> Iterator[Row]:
    for name in results.tried:
        title = f'<b class="{charts.colour(results, name)}">{escaped(optimizer_title(name))}</b>'
        yield title, [trial for trial in results.trials if name_of(trial, "optimizer") == name]


def _by_schedule(results: StudyResults) -> Iterator[Row]:
    """Yield the schedules, of which one that decays in steps is split into early and late decay."""
    for name, domains in results.space.schedulers.items():
        own = [trial for trial in results.trials if name_of(trial, "scheduler") == name]
        sizes = domains.get("step_size")
        if isinstance(sizes, Range) and sizes.low < sizes.high:
            middle = (sizes.low + sizes.high) // 2
            early = [trial for trial in own if getattr(trial.config.scheduler, "step_size", 0) <= middle]
            yield f"{escaped(short_name(name))}, decay by {middle}", early
            yield f"{escaped(short_name(name))}, later", [trial for trial in own if trial not in early]
        elif len(results.space.schedulers) > 1:
            yield escaped(short_name(name)), own


def _cells(results: StudyResults, row: Row, *, mishaps: bool) -> list[str]:
    title, trials = row
    states = Counter(trial.state for trial in trials)
    stopped = Counter(len(trial.epochs) for trial in trials if trial.state is TrialState.PRUNED)
    counts = [len(trials), *(stopped[epoch] for epoch in results.rungs), states[TrialState.COMPLETE]]
    if mishaps:
        counts.append(states[TrialState.DIVERGED] + states[TrialState.FAILED])
    return [title, *(str(count) if count else "–" for count in counts)]


def _rule(results: StudyResults) -> str:
    pruner, objective = results.space.pruner, results.space.objective
    if not isinstance(pruner, SuccessiveHalving):
        return ""
    share = "better half" if pruner.reduction_factor == 2 else f"best {100 / pruner.reduction_factor:.0f} %"
    score = escaped(objective.metric)
    if any(epoch.averaged for trial in results.trials for epoch in trial.epochs):
        score += " of the mean of the weights over the epoch"
    elif objective.of == "best":
        score = f"the best {score} so far"
    return f"At a rung the {share} of all trials so far goes on, by {score}."


def _nearest(results: StudyResults) -> str:
    """Return which trial is the best of those that stopped at the last rung."""
    last, objective = results.rungs[-1], results.space.objective
    stopped = [t for t in results.trials if t.state is TrialState.PRUNED and len(t.epochs) == last]
    best = min(stopped, key=lambda trial: (objective.rung_score(trial.epochs), trial.number))
    value = best.epochs[-1].averaged.get(objective.metric, objective.value(best.epochs))
    return f"The best that stopped after epoch {last} is #{best.number}, with {number(value)}."
