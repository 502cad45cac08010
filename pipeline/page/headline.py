"""The answer in words, computed from numbers: what to use, and its score."""

from __future__ import annotations

import dataclasses

from pipeline.errors import counted
from pipeline.page.markup import escaped
from pipeline.page.metric import wrong_samples
from pipeline.page.noise import gap_text
from pipeline.page.results import StudyResults
from pipeline.page.scales import plain
from pipeline.page.sentence import strategy_sentence
from pipeline.space.distributions import is_searched
from pipeline.space.optimizers import Optimizer
from pipeline.space.trial import EndedTrial, number


def headline(results: StudyResults) -> str:
    """Return the sentence that says what to use, as text."""
    unfinished, count = len(results.trials) < results.planned, len(results.trials)
    if results.winner is not None:
        return f"{'Best so far:' if unfinished else 'Use'} {strategy_sentence(results.winner)}"
    ended = "no trial has ended" if count == 0 else f"none of {counted(count, 'trial')} is complete"
    return f"Nothing to use{' yet' if unfinished else ''}: {'the one trial is not complete' if count == 1 else ended}"


def score_line(results: StudyResults) -> str:
    """Return the score of what to use, as HTML; without a complete trial, that of the trial that came furthest."""
    metric = escaped(results.space.objective.metric)
    if results.confirmed is not None and (winner := results.confirmed.winner) is not None:
        assert winner.mean is not None
        over = counted(len(winner.values), "fresh seed")
        label = escaped(winner.label if winner.trial is None else f"Trial #{winner.trial}")
        tested = "".join(f"; {escaped(name)} <b>{number(v)}</b>" for name, v in results.confirmed.test.items())
        return f"{metric} <b>{with_spread(winner.mean, winner.std)}</b> over {over}{tested}. {label}."
    first = results.searched_first
    if first is not None and first.value is not None:
        score = f"{metric} <b>{first.score}</b>{_of_samples(results, first)}"
        return f'<b class="warn">Unconfirmed, one seed</b>: {score}. Trial #{first.number}.'
    ended = [(results.last_value(trial), trial) for trial in results.trials]
    known = [(len(trial.epochs), results.better(value, 0.0), trial) for value, trial in ended if value is not None]
    if not known:
        return ""
    epochs, _, trial = max(known, key=lambda one: one[:2])
    value = number(results.last_value(trial) or 0.0)
    return f"Trial #{trial.number} came furthest: {metric} {value} after {counted(epochs, 'epoch')}."


def rest_line(results: StudyResults) -> str:
    """Return the hyperparameters that the headline leaves out, as text."""
    config = results.winner
    if config is None:
        return ""
    searched = {name for name, of in results.space.optimizers.get(config.optimizer.name, {}).items() if is_searched(of)}
    told = ("base_lr", "momentum", "nesterov")
    words = [
        f"{name} {_plainly(value)}"
        for name, value in config.optimizer.values().items()
        if name not in told and value is not None and (name in searched or value != _default(config.optimizer, name))
    ]
    decays = {name: group.weight_decay for name, group in config.param_groups.items() if group.weight_decay is not None}
    words += [f"weight_decay of {name} {_plainly(decay)}" for name, decay in decays.items()]
    settings = [f"batch size {config.batch_size}", counted(config.epochs, "epoch")]
    settings += [f"accumulate {config.accumulate}"] if config.accumulate != 1 else []
    settings += [f"ema {config.ema:.4g}"] if config.ema is not None else []
    return ", ".join([*settings, *words])


def with_spread(mean: float, std: float | None) -> str:
    """Return a mean with its standard deviation: `0.9894 ± 0.0006`."""
    return f"{number(mean)} ± {gap_text(std)}" if std is not None else number(mean)


def _of_samples(results: StudyResults, trial: EndedTrial) -> str:
    objective = results.space.objective
    assert trial.value is not None
    epoch = objective.deciding(trial.epochs).epoch
    at = f" at epoch {epoch} of {len(trial.epochs)}" if objective.of == "best" else ""
    wrong = wrong_samples(results, trial.value)
    return at + (f": {wrong} of {results.val_samples} validation samples wrong" if wrong is not None else "")


def _default(optimizer: Optimizer, name: str) -> object:
    """Return the default of an optimizer's hyperparameter; one of a person's own optimizer has none here."""
    return next((field.default for field in dataclasses.fields(optimizer) if field.name == name), None)


def _plainly(value: object) -> str:
    return plain(float(f"{value:.3g}")) if isinstance(value, float) else str(value)
