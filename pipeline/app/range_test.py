"""The learning-rate range test: short runs at every rate of a log grid, as rows at once, and what bounds they suggest.

After Smith (2017), https://arxiv.org/abs/1506.01186, with rates side by side instead of one after another. The rate at
which training breaks depends little on how long it trains, while a longer run makes do with a lower rate: so the
bounds reach from where training breaks two decades down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.space.schedules import Constant
from pipeline.training.contract import GroupLost
from pipeline.workloads.data import samples_of, some_samples

if TYPE_CHECKING:
    from pipeline.space.config import TrialConfig
    from pipeline.space.search_space import SearchSpace
    from pipeline.training.executor import LocalExecutor
    from pipeline.workloads.workload import Workload


PER_DECADE, DECADES = 5, range(-7, 1)
RATES = (*(float(f"{10 ** (d + n / PER_DECADE):.1e}") for d in DECADES for n in range(PER_DECADE)), 10.0)
"""Base rates that are tried, of two digits each."""
WIDTH = 2
"""Of the bounds, in decades."""
STEPS = 40
"""Optimizer updates of a run, at least."""
VAL_SAMPLES = 2048
"""Of the validation split, at most."""
DRAWS = 2
"""Runs at each rate, which differ in every other hyperparameter that the space searches; 1 for what trains plain."""
ENOUGH = 0.75
"""Of the best rate's progress, the part that a rate makes which still trains well."""
LEAST_PROGRESS = 0.01
"""Of the best rate, as a part of the loss before; below it nothing was learnt."""


@dataclass(frozen=True)
class Bounds:
    """Of a base rate."""

    low: float
    high: float


@dataclass(frozen=True)
class RateCurve:
    """What each rate of `RATES` came to."""

    runs: tuple[tuple[float | None, ...], ...]
    """Of each draw of the other hyperparameters, the validation loss after training at each rate; None: it diverged."""

    @property
    def losses(self) -> tuple[float | None, ...]:
        """The least loss at each rate, since a search too keeps the best."""
        return tuple(
            min((loss for loss in some if loss is not None), default=None) for some in zip(*self.runs, strict=True)
        )

    def bounds(self) -> Bounds | None:
        """Return bounds that a search is likely to find its best rates in; None if no rate lowers the loss."""
        before, losses = self.losses[0], [math.inf if loss is None else loss for loss in self.losses]
        best = min(losses)
        if before is None or before - best <= LEAST_PROGRESS * abs(before):
            return None
        high = losses.index(best)
        while high + 1 < len(RATES) and before - losses[high] >= ENOUGH * (before - best):
            high += 1  # to the first rate that trains badly: the limit lies somewhere below it
        return Bounds(RATES[max(0, high - WIDTH * PER_DECADE)], RATES[high])


def range_test(space: SearchSpace, optimizer: str, executor: LocalExecutor, *, steps: int = STEPS) -> RateCurve:
    """Train one of a space's optimizers at every rate of `RATES`, constant, on the same batches.

    Args:
        space: Says all but the rate: what it searches is drawn from its whole range, evenly.
        optimizer: By its name in the space.
        executor: Trains trials of the space's workload.
        steps: Optimizer updates of a run, at least: whole passes over a random part of the data, or over all of it.
    """
    executor = executor.on(_shortened(executor.workload, steps * space.batch_size, seed=space.seed))
    epochs = math.ceil(steps * space.batch_size / len(executor.workload.train))
    space = dataclasses.replace(space, optimizers={optimizer: space.optimizers[optimizer]})
    draws = 1 if executor.why_plain(space.example()) else DRAWS
    configs = {
        number: dataclasses.replace(_with_rate(config, rate), scheduler=Constant(), epochs=epochs)
        for number, (config, rate) in enumerate(
            (space.sample(EvenDraw(draw, of=draws, seed=space.seed)), rate) for draw in range(draws) for rate in RATES
        )
    }
    with contextlib.closing(executor):
        losses = _final_losses(executor, configs, epochs)
    runs = [losses[first : first + len(RATES)] for first in range(0, len(losses), len(RATES))]
    return RateCurve(tuple(map(tuple, runs)))


def _shortened(workload: Workload, count: int, *, seed: int) -> Workload:
    """Return a workload with so many samples to train on, or all of them."""
    train, val = (
        some_samples(samples_of(workload, name), n, seed=seed) for name, n in (("train", count), ("val", VAL_SAMPLES))
    )
    return dataclasses.replace(workload, train=train, val=val, test=None)


def _with_rate(config: TrialConfig, rate: float) -> TrialConfig:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, base_lr=rate))


def _final_losses(executor: LocalExecutor, configs: Mapping[int, TrialConfig], epochs: int) -> list[float | None]:
    """Train trials to their end and return each one's validation loss, None if it diverged or failed."""
    group = executor.build(configs)
    trained = 0
    while trained < epochs:
        try:
            results = group.train_epoch()
            trained += 1
        except GroupLost:  # these runs are short: they begin anew
            group.load_state_dict({})
            trained = 0
    finished = {number: epoch.metrics["val/loss"] for number, epoch in results.items() if epoch.finished}
    return [finished.get(number) for number in configs]


class EvenDraw:
    """One of several draws that together cover the range of each hyperparameter evenly: a Latin hypercube.

    Args:
        index: Which of the draws.
        of: How many there are; a single one takes the middle of everything.
        seed: Decides what goes with what.
    """

    def __init__(self, index: int, *, of: int, seed: int) -> None:
        self._index, self._of, self._seed = index, of, seed

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Choose a number."""
        share = self._share(name)
        if step is not None:
            return low + step * int(share * (round((high - low) / step) + 1))
        return low * (high / low) ** share if log else low + (high - low) * share

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Choose a whole number."""
        share = self._share(name)
        return round(low * (high / low) ** share) if log else low + step * int(share * ((high - low) // step + 1))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Choose one of `choices`."""
        return choices[int(self._share(name) * len(choices))]

    def _share(self, name: str) -> float:
        """Return how far into its range a hyperparameter goes, within (0, 1)."""
        order = random.Random(f"{self._seed}/{name}").sample(range(self._of), self._of)
        return (order[self._index] + 0.5) / self._of
