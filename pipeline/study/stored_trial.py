"""A trial as Optuna stores it, and back; which of the stored trials are a search's own."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from pipeline.errors import StorageError
from pipeline.space.config import TrialConfig
from pipeline.space.search_space import Objective
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState

_OPTUNA_STATES = {
    TrialState.COMPLETE: OptunaState.COMPLETE,
    TrialState.PRUNED: OptunaState.PRUNED,
    # TPE ignores FAIL and would propose the same values again; it ranks a pruned trial without a value last.
    TrialState.DIVERGED: OptunaState.PRUNED,
    TrialState.FAILED: OptunaState.FAIL,
}
OWN_TRIAL = "history"
"""User attribute that each trial of a search has, with its metrics; other programs' trials lack it."""
AVERAGED = "averaged"
"""User attribute with the metrics of averaged weights, by epoch; trials of earlier versions lack it."""
NUMBER = "number"
"""User attribute that holds a trial's number in its search; Optuna also counts other programs' trials."""


def to_optuna(trial: EndedTrial, objective: Objective, distributions: Mapping[str, BaseDistribution]) -> FrozenTrial:
    """Return a trial as Optuna stores it; a diverged trial has no values, so that no sampler ranks its early epochs.

    Args:
        trial: The trial.
        objective: The objective of the space.
        distributions: Of every searched parameter of the space.
    """
    finished = [epoch for epoch in trial.epochs if epoch.finished]
    reached = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    frozen = optuna.trial.create_trial(
        state=_OPTUNA_STATES[trial.state],
        value=trial.value,
        params=dict(trial.params),
        distributions={name: d for name, d in distributions.items() if name in trial.params},
        intermediate_values={n + 1: objective.value(finished[: n + 1]) for n in range(len(finished)) if reached},
        user_attrs={
            NUMBER: trial.number,
            "state": trial.state.value,
            "reason": trial.reason,
            "base_lr": trial.config.optimizer.base_lr,
            "config": trial.config.to_dict(),
            **plain_epochs(trial.epochs),
            "environment": dict(trial.environment),
        },
    )
    frozen.number = trial.number
    frozen.datetime_start = datetime.datetime.fromtimestamp(trial.started)
    frozen.datetime_complete = datetime.datetime.fromtimestamp(trial.ended)
    return frozen


@contextlib.contextmanager
def as_stored(what: str, *, study: str) -> Iterator[None]:
    """Turn what happens to values that no search stored into a StorageError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        remedy = f"restore it from a copy, or delete the study: python -m pipeline.search --delete {study}"
        raise StorageError(f"{what} is not as a search stored it: {type(error).__name__} {error}; {remedy}") from error


def own_trials(stored: Sequence[FrozenTrial], *, study: str) -> list[FrozenTrial]:
    """Return the trials that searches have stored, in number order, without those that other programs have added.

    Optuna numbers the trials of all programs; a search numbers its own, from 0 on without a gap.

    Raises:
        StorageError: A trial is missing.
    """
    own: list[FrozenTrial] = []
    for trial in stored:
        if OWN_TRIAL not in trial.user_attrs:
            continue
        number = trial.user_attrs.get(NUMBER, len(own))  # earlier versions stored no number
        if number > len(own):
            remedy = f"restore it from a copy, or delete the study: python -m pipeline.search --delete {study}"
            raise StorageError(f"trial {len(own)} of study {study} was removed from the database; {remedy}")
        own += [trial] if number == len(own) else []  # a lower number has a copy of a trial
    return own


def from_optuna(number: int, frozen: FrozenTrial, objective: Objective) -> EndedTrial:
    """Return a stored trial, without the learning rates, which only MLflow records."""
    attrs = frozen.user_attrs
    assert frozen.datetime_start is not None
    assert frozen.datetime_complete is not None
    return EndedTrial(
        number=number,
        config=TrialConfig.from_dict(attrs["config"]),
        params=frozen.params,
        state=TrialState(attrs["state"]),
        objective=objective,
        reason=attrs["reason"],
        value=frozen.value if frozen.state is OptunaState.COMPLETE else None,
        epochs=epochs_of(attrs),
        started=frozen.datetime_start.timestamp(),
        ended=frozen.datetime_complete.timestamp(),
        environment=attrs["environment"],
    )


def plain_epochs(epochs: Sequence[EpochMetrics]) -> dict[str, Any]:
    """Return metrics and steps of the finished epochs as plain values, which `epochs_of` reads."""
    finished = [epoch for epoch in epochs if epoch.finished]
    names = finished[0].metrics if finished else {}
    return {
        OWN_TRIAL: {name: [epoch.metrics[name] for epoch in finished] for name in names},
        "steps": [epoch.step for epoch in finished],
        AVERAGED: {str(epoch.epoch): dict(epoch.averaged) for epoch in finished if epoch.averaged},
    }


def epochs_of(stored: Mapping[str, Any]) -> tuple[EpochMetrics, ...]:
    """Return the epochs that `plain_epochs` made plain, without the learning rates."""
    history, averaged = stored[OWN_TRIAL], stored.get(AVERAGED, {})
    return tuple(
        EpochMetrics(
            epoch=epoch,
            step=step,
            metrics={name: history[name][epoch - 1] for name in history},
            lr={},
            averaged=averaged.get(str(epoch), {}),
        )
        for epoch, step in enumerate(stored["steps"], 1)
    )
