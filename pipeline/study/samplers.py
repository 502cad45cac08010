"""Optuna's samplers: a proposal is a function of the space with its seed, the trial's number and earlier trials."""

from __future__ import annotations

import copy
import datetime
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from pipeline.space.config import TrialConfig, derive_seed
from pipeline.space.distributions import Choices, Range, is_searched, label
from pipeline.space.search_space import SearchSpace

# Optuna warns of parameters that only some trials have, as is normal with one optimizer per trial.
optuna.logging.set_verbosity(optuna.logging.ERROR)

BEST, NEWEST = 64, 448
"""Numbers of earlier trials, the best and the newest, that TPE looks at if there are more; its cost grows with them.

More of the best and fewer of the newest found less (benchmarks/NOTES.md): TPE calls 25 trials good, and would take the
other best ones as examples of bad ones."""
RUNNING = 128
"""Number of running trials, the newest, that a sampler looks at if there are more; its cost grows with them too."""
GP_BEST, GP_NEWEST = 64, 64
"""The same of the Gaussian process, whose cost grows faster."""


def propose(
    space: SearchSpace,
    earlier: Sequence[FrozenTrial],
    *,
    first: int,
    size: int,
    running: Sequence[Mapping[str, Any]] = (),
) -> dict[int, tuple[TrialConfig, dict[str, Any]]]:
    """Propose `size` trials from number `first` on; they know the results of earlier trials, not of each other.

    An in-memory Optuna study proposes, since asking for a trial through a database takes hundreds of milliseconds.

    Args:
        space: The search space.
        earlier: Ended trials.
        first: Number of the first trial.
        size: Number of trials.
        running: Parameters of trials that train meanwhile, oldest first: TPE counts them among the bad trials, so that
            it proposes others, and so it does with the trials that are proposed here.

    Returns:
        Trial number to config and to the parameters that the sampler chose.
    """
    memory = optuna.create_study(direction=space.objective.direction)
    searched = distributions(space)
    others = [*visible(space, earlier), *(_running(searched, params) for params in running[-RUNNING:])]
    memory.add_trials(others)
    proposals = {}
    for number in range(first, first + size):
        memory.sampler = build_sampler(space, number)
        if number < len(space.enqueue):
            memory.enqueue_trial(dict(space.enqueue[number]))
        trial = memory.ask()
        assert trial.number - len(others) == number - first
        proposals[number] = (space.sample(trial), trial.params)
    return proposals


def restore(
    space: SearchSpace, params: Sequence[Mapping[str, Any]], *, first: int
) -> dict[int, tuple[TrialConfig, dict[str, Any]]]:
    """Return the proposals, from number `first` on, for which a sampler chose these parameters."""
    memory = optuna.create_study(direction=space.objective.direction, sampler=RandomSampler(seed=0))
    proposals = {}
    for number, values in enumerate(params, first):
        memory.enqueue_trial(dict(values))
        trial = memory.ask()
        proposals[number] = (space.sample(trial), trial.params)
    return proposals


def for_sampler(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial as samplers look at it, which an in-memory study takes without copying all that is in it."""
    return _Known(
        number=trial.number,
        state=trial.state,
        values=trial.values,
        params=trial.params,
        distributions=trial.distributions,
        intermediate_values=trial.intermediate_values,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        **_NOTHING,
    )


def _running(distributions: Mapping[str, BaseDistribution], params: Mapping[str, Any]) -> FrozenTrial:
    return _Known(
        number=-1,  # as the in-memory study says
        state=OptunaState.RUNNING,
        params=dict(params),
        distributions={name: distribution for name, distribution in distributions.items() if name in params},
        datetime_start=datetime.datetime.now(),
        datetime_complete=None,
        intermediate_values={},
        values=None,
        **_NOTHING,
    )


class _Known(FrozenTrial):
    """A trial whose parts do not change, so that copies share them; Optuna copies each trial that it is given."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Known:
        return copy.copy(self)


_NOTHING: dict[str, Any] = {"trial_id": -1, "value": None, "user_attrs": {}, "system_attrs": {}}
"""What no sampler looks at."""


def visible(space: SearchSpace, earlier: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
    """Return the earlier trials that a sampler looks at, in number order: all, or of very many the best and the newest.

    TPE models good trials, the best tenth but at most 25, and the others, of which its weights favour the newest. So
    the good trials are the same with and without the others between. Trials that failed count for no sampler.
    """
    if space.sampler.name in ("random", "qmc"):  # these look at none
        return ()
    best, newest = (GP_BEST, GP_NEWEST) if space.sampler.name == "gp" else (BEST, NEWEST)
    best = max(best, space.sampler.n_startup_trials)
    if len(earlier) <= best + newest:
        return earlier
    count = [trial for trial in earlier if trial.state is not OptunaState.FAIL]
    older = count[: max(0, len(count) - newest)]
    chosen = sorted(older, key=lambda trial: _order(trial, space.objective.direction))[:best]
    return [*sorted(chosen, key=lambda trial: trial.number), *count[len(older) :]]


def _order(trial: FrozenTrial, direction: str) -> tuple[float, ...]:
    """Return what sorts trials as TPE does: complete ones by value, then pruned ones by their last epoch and value."""
    sign = -1 if direction == "maximize" else 1
    if trial.state is OptunaState.COMPLETE:
        assert trial.value is not None
        return 0, sign * trial.value
    if not trial.intermediate_values:
        return 2, 0
    epoch, value = max(trial.intermediate_values.items())
    return 1, -epoch, math.inf if math.isnan(value) else sign * value


def build_sampler(space: SearchSpace, number: int) -> BaseSampler:
    """Build the sampler that proposes the trial of a number."""
    seed = derive_seed(space.seed, "sampler", number) % 2**32
    startup = space.sampler.n_startup_trials
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match space.sampler.name:
            case "tpe":
                return TPESampler(seed=seed, n_startup_trials=startup)
            case "gp":
                # TPE proposes the parameters that not every trial has; the Gaussian process cannot model them.
                independent = TPESampler(seed=seed, n_startup_trials=startup)
                return GPSampler(seed=seed, n_startup_trials=startup, independent_sampler=independent)
            case "qmc":
                return _WholeSpaceQMC(space, number)
            case "random":
                return RandomSampler(seed=seed)


class _WholeSpaceQMC(QMCSampler):
    """A scrambled Sobol sequence over every searched parameter; its n-th point belongs to trial n.

    Optuna's own sampler takes the space from the first trial, which has the parameters of one optimizer only, and
    counts points in the storage.
    """

    def __init__(self, space: SearchSpace, number: int) -> None:
        super().__init__(scramble=True, seed=space.seed)
        self._number = number
        self._space = distributions(space)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._number


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Return Optuna's distribution of every searched parameter."""
    found: dict[str, BaseDistribution] = {}
    for name, domain in space.parameters().items():
        if not is_searched(domain):
            continue
        match domain:
            case Choices(choices=choices):
                found[name] = CategoricalDistribution([label(choice) for choice in choices])
            case Range(low=int(), high=int()):
                found[name] = IntDistribution(domain.low, domain.high, log=domain.log, step=domain.step or 1)
            case Range():
                found[name] = FloatDistribution(domain.low, domain.high, log=domain.log, step=domain.step)
    return found
