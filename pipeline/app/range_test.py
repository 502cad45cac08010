"""The learning-rate range test: short runs at every rate of a log grid, as rows at once, and bounds derived from them.

Smith (2017), https://arxiv.org/abs/1506.01186, with rates side by side instead of one after another. The rate at which
training breaks depends little on the length of a run, while a longer run succeeds with a lower rate. Therefore the
bounds reach from the rate that breaks training two decades down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.space.schedules import Constant
from pipeline.workloads.data import epoch_length, with_fewer_samples
from pipeline.workloads.workload import Workload

if TYPE_CHECKING:
    from pipeline.space.config import TrialConfig
    from pipeline.space.search_space import SearchSpace
    from pipeline.training.executor import LocalExecutor

from pipeline.training.contract import GroupLost

PER_DECADE, DECADES = 5, range(-7, 1)
RATES = (*(float(f"{10 ** (d + n / PER_DECADE):.1e}") for d in DECADES for n in range(PER_DECADE)), 10.0)
"""The base rates, of two digits each."""
BOUNDS_DECADES = 2
"""Width of the bounds in decades."""
MIN_STEPS = 40
"""Least number of optimizer steps of a run."""
VAL_SAMPLES = 2048
"""Most samples of the validation split to use."""
DRAWS = 2
"""Runs per rate, with different values of the other searched hyperparameters; an optimizer that trains plain has 1."""
ENOUGH_PROGRESS = 0.75
"""Least progress of a rate that trains well, as a fraction of the best rate's progress."""
LEAST_PROGRESS = 0.01
"""Least progress of the best rate, as a fraction of the initial loss; below it no rate learns."""


@dataclass(frozen=True)
class Bounds:
    """Bounds of a base rate."""

    low: float
    high: float


@dataclass(frozen=True)
class RateCurve:
    """Losses after training at each rate of `RATES`."""

    runs: tuple[tuple[float | None, ...], ...]
    """(draw, rate): validation loss after training with a draw of the other hyperparameters; None: diverged."""

    @property
    def losses(self) -> tuple[float | None, ...]:
        """Lowest loss at each rate, since a search too keeps the best trial."""
        return tuple(
            min((loss for loss in draws if loss is not None), default=None) for draws in zip(*self.runs, strict=True)
        )

    @property
    def highest_losses(self) -> tuple[float | None, ...]:
        """Highest loss at each rate; None: at least one draw diverged."""
        return tuple(
            max(loss for loss in draws if loss is not None) if None not in draws else None
            for draws in zip(*self.runs, strict=True)
        )

    def bounds(self) -> Bounds | None:
        """Return bounds that are likely to contain the best rate of a search; None if no rate lowers the loss."""
        progress = _progress(self.losses)
        if progress is None:
            return None
        high = progress.index(max(progress))
        while high + 1 < len(RATES) and progress[high] >= ENOUGH_PROGRESS:
            high += 1  # to the first rate that trains badly: the limit lies somewhere below it
        return Bounds(RATES[max(0, high - BOUNDS_DECADES * PER_DECADE)], RATES[high])

    def begin_with(self) -> float | None:
        """Return one rate for a first training without a search; None if no rate lowers the loss.

        The rate is the middle of those within the bounds that train well with every draw of the other hyperparameters,
        or with one draw if no rate trains well with all.
        """
        bounds = self.bounds()
        for losses in (self.highest_losses, self.losses):
            progress = _progress(losses)
            if bounds is None or progress is None:
                continue
            well = [rate for rate, done in zip(RATES, progress, strict=True) if done >= ENOUGH_PROGRESS]
            if within := [rate for rate in well if bounds.low <= rate <= bounds.high]:
                return statistics.median_low(within)
        return None


def _progress(losses: Sequence[float | None]) -> list[float] | None:
    """Return how much each rate lowers the loss, as a fraction of the best rate's; None if no rate lowers the loss."""
    before, after = losses[0], [math.inf if loss is None else loss for loss in losses]
    best = min(after)
    if before is None or before - best <= LEAST_PROGRESS * abs(before):
        return None
    return [(before - loss) / (before - best) for loss in after]


def range_test(space: SearchSpace, optimizer: str, executor: LocalExecutor, *, steps: int = MIN_STEPS) -> RateCurve:
    """Train one of a space's optimizers at every rate of `RATES`, at a constant rate and on the same batches.

    Args:
        space: Gives everything but the rate; other searched hyperparameters are drawn evenly from their whole ranges,
            but the batch size is the smallest.
        optimizer: Name of an optimizer of the space.
        executor: Trains the workload of the space, which is no training loop.
        steps: Least number of optimizer steps of a run: whole passes over a random part of the data, or all of it.
    """
    assert isinstance(executor.workload, Workload)
    batch_size = min(space.batch_sizes)
    samples = steps * batch_size * space.accumulate
    workload = _shortened(executor.workload, samples, seed=space.seed)
    executor = executor.on(workload)
    epochs = math.ceil(samples / epoch_length(workload, space.seed))
    settings = {**space.settings, "batch_size": batch_size}
    space = dataclasses.replace(space, optimizers={optimizer: space.optimizers[optimizer]}, settings=settings)
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
    """Return a workload with at most `count` training samples."""
    return with_fewer_samples(workload, train=count, val=VAL_SAMPLES, seed=seed)


def _with_rate(config: TrialConfig, rate: float) -> TrialConfig:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, base_lr=rate))


def _final_losses(executor: LocalExecutor, configs: Mapping[int, TrialConfig], epochs: int) -> list[float | None]:
    """Train trials for all epochs and return the validation loss of each; None: diverged or failed."""
    group = executor.build(configs)
    trained = 0
    while trained < epochs:
        try:
            results = group.train_epoch()
            trained += 1
        except GroupLost:  # the runs are short: train again from the beginning
            group.load_state_dict({})
            trained = 0
    finished = {number: epoch.metrics["val/loss"] for number, epoch in results.items() if epoch.finished}
    return [finished.get(number) for number in configs]


class EvenDraw:
    """One of several draws that cover the range of each hyperparameter evenly: a Latin hypercube.

    Args:
        index: Number of the draw, from 0.
        of: Number of draws; a single draw takes the middle of every range.
        seed: Decides which values are combined.
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
        """Return the position of a hyperparameter within its range, within (0, 1)."""
        order = random.Random(f"{self._seed}/{name}").sample(range(self._of), self._of)
        return (order[self._index] + 0.5) / self._of
