"""Importance: how much each hyperparameter decided, by Optuna's PED-ANOVA."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna
from optuna.importance import PedAnovaImportanceEvaluator

from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import EndedTrial
from pipeline.study.samplers import distributions

FEWEST = 10
"""Trials below which nothing is said."""
TOP = 5
"""Trials that must be among the best part, as Optuna recommends."""
QUANTILE = 0.1
"""The best part of the trials, with which all trials are compared; a larger part if it has fewer than `TOP` trials."""


def importances(space: SearchSpace, trials: Sequence[EndedTrial], *, epoch: int) -> dict[str, float]:
    """Return the share of each searched hyperparameter, named as in Optuna, the largest first.

    Scores are compared after one epoch, in a copy of the study in which every trial that reached the epoch is complete
    with its score there. Among the complete trials alone, a hyperparameter that pruning has settled would seem to
    matter nothing.

    Args:
        space: The space of the study.
        trials: Trials of the study; those that did not reach the epoch are left out.
        epoch: Counts from 1.

    Returns:
        Shares that add up to 1; empty if there are too few trials, or one hyperparameter.

    Watanabe, Bansal and Hutter (2023), https://arxiv.org/abs/2304.10255.
    """
    objective, domains = space.objective, distributions(space)
    copy = optuna.create_study(direction=objective.direction)
    for trial in trials:
        measured = objective.measured(trial.epochs)
        if len(measured) >= epoch:
            used = {name: domain for name, domain in domains.items() if name in trial.params}
            value = objective.value(measured[:epoch])
            params = {name: trial.params[name] for name in used}
            copy.add_trial(optuna.trial.create_trial(params=params, distributions=used, value=value))
    count = len(copy.trials)
    if count < FEWEST or len(domains) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an experimental class, and of optimizers with one trial
        evaluator = PedAnovaImportanceEvaluator(target_quantile=max(QUANTILE, min(0.5, TOP / count)))
        return dict(optuna.importance.get_param_importances(copy, evaluator=evaluator))
