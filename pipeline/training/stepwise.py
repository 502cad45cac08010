"""Training in single steps, so that several trainers can share the batches that are read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.errors import DeviceError, PipelineError, first_line
from pipeline.space.config import TrialConfig
from pipeline.space.trial import EpochMetrics

Batches = Iterator[tuple[Tensor, Tensor]]
"""Inputs (sample, …) and targets (sample, …), as the model sees them."""

AtOnce = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
"""Calls a function on each trainer, as `map` does."""


class Stepwise(Protocol):
    """One epoch of some trials, step by step: begin, train on each batch, evaluate on each, end."""

    configs: dict[int, TrialConfig]
    """Of the trials that are left, by number."""

    def training_batches(self) -> Batches:
        """Yield the batches of the epoch that comes next."""
        ...

    def evaluation_batches(self, name: str) -> Batches:
        """Yield the batches of a split."""
        ...

    def begin_epoch(self) -> None:
        """Make ready for the batches of an epoch."""
        ...

    def train_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Update every trial on one batch."""
        ...

    def evaluate_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Evaluate every trial on one batch."""
        ...

    def end_epoch(self) -> dict[int, EpochMetrics]:
        """Return what the epoch came to, once all batches of the split `val` were evaluated."""
        ...

    def test(self) -> Mapping[int, Mapping[str, float]]:
        """Return each trial's `test/…` metrics."""
        ...


def train_epoch_of(trainer: Stepwise) -> dict[int, EpochMetrics]:
    """Train and evaluate one trainer for an epoch."""
    trainer.begin_epoch()
    for inputs, targets in trainer.training_batches():
        trainer.train_step(inputs, targets)
    for inputs, targets in trainer.evaluation_batches("val"):
        trainer.evaluate_step(inputs, targets)
    return trainer.end_epoch()


def train_epoch_together(trainers: Sequence[Stepwise], at_once: AtOnce) -> list[dict[int, EpochMetrics] | Exception]:
    """Train and evaluate several for an epoch on batches that are read once.

    Args:
        trainers: Of trials with the same data, order and batch size, in the same epoch.
        at_once: Calls a function on each of some trainers, as `map` does.

    Returns:
        Of each, what its epoch came to, or what it raised: then it took no further part.
    """
    outcomes: list[Any] = [None] * len(trainers)

    def each(function: Callable[[Stepwise], Any]) -> None:
        going = [place for place, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)]
        values = at_once(functools.partial(_attempt, function), [trainers[place] for place in going])
        for place, value in zip(going, values, strict=True):
            outcomes[place] = value

    each(lambda trainer: trainer.begin_epoch())
    for batch in trainers[0].training_batches():
        each(functools.partial(_on_own_batch, "train_step", batch))
    for batch in trainers[0].evaluation_batches("val"):
        each(functools.partial(_on_own_batch, "evaluate_step", batch))
    each(lambda trainer: trainer.end_epoch())
    return outcomes


def _on_own_batch(step: str, batch: tuple[Tensor, Tensor], trainer: Stepwise) -> None:
    """Make a step on a copy of a batch, which a model may change in place."""
    getattr(trainer, step)(*(values.clone() for values in batch))


def _attempt(function: Callable[[Stepwise], Any], trainer: Stepwise) -> Any:
    try:
        return function(trainer)
    except Exception as error:
        return trouble_of_its_own(error)


def trouble_of_its_own(error: Exception) -> Exception:
    """Return what a trainer raised, if it may be the fault of its trials alone.

    Raises:
        PipelineError: It is not: the data or the device failed, which no trial is to blame for.
    """
    if isinstance(error, PipelineError):
        raise error
    if isinstance(error, torch.AcceleratorError):
        raise DeviceError(f"the device failed: {first_line(error)}") from error
    return error.with_traceback(None)  # which would keep the memory of what was being computed
