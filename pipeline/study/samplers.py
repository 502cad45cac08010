"""Optuna's samplers for a search space: functions of the space, the seed and the trial's number."""

from __future__ import annotations

import warnings

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from pipeline.space.config import derive_seed
from pipeline.space.distributions import Choices, Range, is_searched, label
from pipeline.space.search_space import SearchSpace


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
