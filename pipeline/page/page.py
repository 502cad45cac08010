"""The report as one HTML file: sections from top to bottom, in the order in which questions are asked.

The page asks nothing of any server, as its content security policy says too, and needs no script to be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import counted
from pipeline.files.strict_yaml import dumps
from pipeline.page import charts, curves, timeline
from pipeline.page.findings import Contender, Kind, compared_epochs, contenders, diverged_from, mishaps
from pipeline.page.headline import headline, rest_line, score_line
from pipeline.page.how_sure import how_sure
from pipeline.page.markup import card, escaped, figures, folded, legend, paragraphs, split, table, unbroken
from pipeline.page.metric import MetricAxis
from pipeline.page.noise import Noise, noise_of
from pipeline.page.pruned import pruned_where
from pipeline.page.results import StudyResults
from pipeline.page.scales import plain
from pipeline.page.sentence import optimizer_title, rate_text
from pipeline.page.style import SORT, STYLE
from pipeline.space.own_code import short_name
from pipeline.space.strategy import schedule_line
from pipeline.space.trial import EndedTrial, number

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
SEEDS = "<figcaption><small>a point per run, a line per seed, bars at the means</small></figcaption>"
MANY = 50
"""Trials from which PED-ANOVA has five among the best tenth, as Optuna recommends."""
MAX_TRIALS_LISTED = 12
"""Most trials whose numbers stand beside a reason."""


def build_page(results: StudyResults) -> str:
    """Return the report of a study as an HTML document."""
    axis, noise = MetricAxis(results), noise_of(results)
    sections = [
        _how_sure(results, noise),
        _best_of_each(results),
        _by_rate(results, axis, noise),
        _rates(results),
        _learning_curves(results, axis),
        pruned_where(results),
        _slices(results, axis, noise),
        _importance(results),
        _time(results),
        _mishaps(results),
        _code(results),
        _all_trials(results),
        _repeat(results),
    ]
    title = f"{results.name}: {headline(results)}"
    answer = f'<div class="answer"><h1>{unbroken(escaped(headline(results)))}</h1>'
    answer += paragraphs([score_line(results), f'<span class="soft">{escaped(rest_line(results))}</span>']) + "</div>"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head>\n<body>"
        f"<header>{escaped(_subtitle(results))}</header>\n{answer}\n<main>\n{''.join(sections)}</main>\n"
        f"<script>{SORT}</script></body></html>\n"
    )


def _subtitle(results: StudyResults) -> str:
    states = Counter(trial.state.value for trial in results.trials)
    count = (
        f"{len(results.trials)} of {results.planned}" if len(results.trials) < results.planned else f"{results.planned}"
    )
    how = ", ".join(f"{number} {state}" for state, number in states.most_common())
    trials = f"{count} trial{'s' if results.planned != 1 else ''}" + (f" ({how})" if how else "")
    devices = list(dict.fromkeys(str(trial.environment.get("device", "")) for trial in results.trials))
    parts = [results.space.workload.title, f"study {results.name}", trials, counted(results.space.epochs, "epoch")]
    return " · ".join(filter(None, [*parts, *devices, f"seed {results.space.seed}"]))


def _how_sure(results: StudyResults, noise: Noise | None) -> str:
    drawn = charts.confirmed_seeds(results, results.confirmed) if results.confirmed is not None else ""
    words = paragraphs(how_sure(results, noise))
    return card(
        "How sure?",
        split(f"<div>{words}</div>", f"<figure>{SEEDS}{drawn}</figure>") if drawn else words,
        wide=bool(drawn),
    )


def _best_of_each(results: StudyResults) -> str:
    if not results.trials:
        return ""
    kinds: list[tuple[Kind, str]] = [("optimizer", "optimizer")]
    if len(results.space.schedulers) > 1:
        kinds.append(("scheduler", "schedule"))
    tables = [_standings(results, kind, word) for kind, word in kinds]
    words = "optimizer and schedule" if len(kinds) > 1 else "optimizer"
    note = f"best {escaped(results.space.objective.metric)} (trials that trained so long)"
    return card(f"Best of each {words} at the same epoch", *tables, note=note)


def _standings(results: StudyResults, kind: Kind, word: str) -> str:
    head = [word, *(f"epoch {epoch}" for epoch in compared_epochs(results))]
    rows = [row for one in contenders(results, kind) for row in _standing_rows(results, kind, one)]
    return table(head, rows, css="best")


def _standing_rows(results: StudyResults, kind: Kind, contender: Contender) -> Iterator[list[str]]:
    """Yield the row of an optimizer or schedule, and below it what is to be said against its best."""
    title = f"<b>{escaped(short_name(contender.name))}</b>"
    if kind == "optimizer":
        title = f'<b class="{charts.colour(results, contender.name)}">{escaped(optimizer_title(contender.name))}</b>'
    cells = [
        "<small>none left</small>" if standing is None else f"{number(standing.value)} <small>({standing.left})</small>"
        for standing in contender.standings
    ]
    yield [title, *cells]
    if contender.cautions:
        yield [escaped("; ".join(contender.cautions))]


def _by_rate(results: StudyResults, axis: MetricAxis, noise: Noise | None) -> str:
    if not results.trials:
        return ""
    note = f"● complete ○ ended early, at its last epoch{_drawn_beside(results, noise)}"
    drawn = figures(charts.errors_by_rate(results, axis, noise))
    return card(f"{_sentence_case(axis.name)} by base rate", drawn, note=f"{escaped(axis.note)}; {note}", wide=True)


def _drawn_beside(results: StudyResults, noise: Noise | None) -> str:
    """Say what is shaded and dotted in the figures of trials."""
    if noise is not None:
        least = ", a lower bound" if noise.lower_bound else ""
        return f"; shaded: rates within noise of #{noise.winner.number}, dotted: the limit of noise{least}"
    baseline = results.winning_baseline
    return f"; dotted: the mean of {escaped(baseline.label)} on fresh seeds" if baseline is not None else ""


def _rates(results: StudyResults) -> str:
    others = len(results.with_rates) - 1
    faint = f"winner, and faintly {counted(others, 'other')} of the best" if others > 0 else "winner"
    return card("Learning rate per group", curves.rate_curves(results), note=faint)


def _learning_curves(results: StudyResults, axis: MetricAxis) -> str:
    rungs = "; dashed: pruning, trials before → after" if results.rungs else ""
    colours = legend(charts.optimizer_keys(results))
    drawn = curves.learning_curves(results, axis)
    baseline = results.winning_baseline if results.baseline_run is not None else None
    bold = f"; bold: {escaped(baseline.label)}, with a fresh seed" if baseline is not None else ""
    title, note = f"{_sentence_case(axis.name)} by epoch", f"{escaped(axis.note)}{rungs}{bold}"
    return card(title, drawn, colours, note=note) if drawn else ""


def _slices(results: StudyResults, axis: MetricAxis, noise: Noise | None) -> str:
    if not results.trials:
        return ""
    colours = legend(charts.optimizer_keys(results))
    drawn = figures(charts.slices(results, axis, noise))
    return card("Other hyperparameters", drawn, colours, note=escaped(axis.title), wide=True) if drawn else ""


def _importance(results: StudyResults) -> str:
    importance = results.importance
    if importance is None or not importance.shares:
        return ""
    how = (
        f"PED-ANOVA of the scores after epoch {importance.epoch}, as if every trial had ended there, so that pruned "
        "trials count as much as others."
    )
    bars, rest = charts.importance_bars(importance)
    others = f"Less than 1 %: {escaped(', '.join(rest))}." if rest else ""
    few = (
        f" {results.reached(importance.epoch)} trials are few for it."
        if results.reached(importance.epoch) < MANY
        else ""
    )
    words = paragraphs([others, f'<span class="soft">{how}{few}</span>'])
    return card("What mattered", split(table([], bars, css="bars"), f"<div>{words}</div>"), wide=True)


def _time(results: StudyResults) -> str:
    if not results.trials:
        return ""
    clock = timeline.Clock(results)
    epochs = sum(len(trial.epochs) for trial in results.trials)
    full = results.space.epochs * len(results.trials)
    speed = f"{epochs / clock.total:.3g} per second; " if clock.total > 0 else ""
    saved = (
        f"{100 * (1 - epochs / full):.0f} % of {full} saved by ending trials early" if epochs < full else "none saved"
    )
    pauses = f"; pauses of {clock.pauses:.0f} s left out" if clock.pauses > 1 else ""
    note = f"{epochs} trial-epochs, {speed}{saved}{pauses}"
    drawn = [
        ("Trials from start to end; complete ones are solid", timeline.trial_bars(results, clock)),
        ("Trial-epochs per second, by group", timeline.throughput(results, clock)),
    ]
    return card("Time", figures((head, svg) for head, svg in drawn if svg), note=note, wide=True)


def _mishaps(results: StudyResults) -> str:
    found = mishaps(results)
    if not found:
        return ""
    rows = [[_numbers(trials), trials[0].state.value, escaped(reason)] for reason, trials in found]
    words = []
    for name in results.space.optimizers:
        if (edge := diverged_from(results, name)) is not None:
            rate, count, above = edge
            words.append(
                f"{escaped(optimizer_title(name))}: {count} of {above} with a base rate of {rate_text(rate)} or more"
            )
    summary = f"Diverged, by optimizer: {'; '.join(words)}." if words else ""
    title = "What diverged or failed"
    return card(title, paragraphs([summary]), table(["trial", "state", "reason"], rows), wide=True)


def _numbers(trials: list[EndedTrial]) -> str:
    shown = ", ".join(f"#{trial.number}" for trial in trials[:MAX_TRIALS_LISTED])
    more = len(trials) - MAX_TRIALS_LISTED
    return shown + (f" and {more} more" if more > 0 else "")


def _code(results: StudyResults) -> str:
    if results.code is None:
        return ""
    lines = "\n".join(escaped(line) for line in results.code.rstrip().split("\n"))
    return card("In your own script", f"<pre>{lines}</pre>", wide=True)


def _all_trials(results: StudyResults) -> str:
    if not results.trials:
        return ""
    rows = [_trial_cells(results, trial) for trial in results.trials]
    names = [name for row in rows for name in row]
    columns = list(dict.fromkeys(names))
    cells = [[escaped(row.get(column, "")) for column in columns] for row in rows]
    listed = table(list(map(escaped, columns)), cells, css="trials sortable")
    return card("All trials", folded(f"{counted(len(rows), 'trial')}; a click on a column sorts", listed), wide=True)


def _trial_cells(results: StudyResults, trial: EndedTrial) -> dict[str, str]:
    """Return the row of a trial by the titles of its columns."""
    config = trial.config
    value = results.last_value(trial)
    cells = {"#": str(trial.number), "state": trial.state.value, "epochs": str(len(trial.epochs))}
    cells |= {results.space.objective.metric: "" if value is None else number(value)}
    cells |= {"optimizer": short_name(config.optimizer.name), "base_lr": rate_text(config.optimizer.base_lr)}
    cells |= {"schedule": schedule_line(config)}
    values = config.hyperparameters()
    told = {"optimizer", "scheduler", "base_lr", "step_size"} | (
        {"gamma"} if config.scheduler.name == "step" else set()
    )
    searched = [name for name in results.space.searched_hyperparameters() if name not in told]
    return cells | {name: _cell(values[name]) if name in values else "" for name in searched}


def _cell(value: Any) -> str:
    return plain(float(f"{value:.3g}")) if isinstance(value, float) else str(value)


def _repeat(results: StudyResults) -> str:
    study = f"--study {results.name}{results.options}"
    commands = [
        f"python -m pipeline.search --space space.yaml --trials {results.planned}   # the file below",
        f"python -m pipeline.report {study}",
    ]
    if results.winner is not None:
        commands.insert(1, f"python -m pipeline.export {study} --out config.yaml")
        commands.insert(2, "python -m pipeline.train config.yaml --test")
    document = "\n".join(escaped(line) for line in dumps(results.space.document).rstrip().split("\n"))
    shown = "\n".join(escaped(line) for line in commands)
    space = folded("<code>space.yaml</code>, with every default", f"<pre>{document}</pre>")
    versions = "; ".join(f"{escaped(name)} {escaped(value)}" for name, value in _environment(results).items())
    return card(
        "To repeat it", f"<pre>{shown}</pre>", space, paragraphs([f'<span class="soft">{versions}</span>']), wide=True
    )


def _environment(results: StudyResults) -> Mapping[str, str]:
    """Return what the numbers may depend on, without placements: every value that some trial had."""
    found: dict[str, dict[str, None]] = {}
    for trial in results.trials:
        for name, value in trial.environment.items():
            if name != "placement":
                found.setdefault(name, {})[str(value)] = None
    return {name: " or ".join(values) for name, values in found.items()}


def _sentence_case(text: str) -> str:
    return text if "/" in text else text[:1].upper() + text[1:]
