"""The contracts of training: groups of trials, what builds them, and trainers that advance step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.errors import DeviceError, PipelineError, first_line
from pipeline.space.config import TrialConfig
from pipeline.space.placement import Placement
from pipeline.space.trial import EpochMetrics

Batches = Iterator[tuple[Tensor, Tensor]]
"""Inputs (sample, …) and targets (sample, …), as the model sees them."""

Map = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
"""Calls a function on each item and returns the results in order, perhaps at the same time."""


class GroupLost(Exception):
    """A group lost its state in mid-epoch. It must be loaded from its last checkpoint, then goes on.

    Args:
        message: What happened, for people.
        repeats: Whether the epochs since the checkpoint will be trained to the same bits.
    """

    def __init__(self, message: str, *, repeats: bool) -> None:
        super().__init__(message)
        self.repeats = repeats


class TrialGroup(Protocol):
    """Trials that train together, one epoch at a time, keyed by trial number. One trial is a group of one."""

    def train_epoch(self) -> Mapping[int, EpochMetrics]:
        """Train every trial for one epoch and evaluate it; a diverged or failed trial has left the group.

        Raises:
            GroupLost: The group must be loaded from its last checkpoint.
        """
        ...

    def drop(self, number: int) -> None:
        """Stop training a trial, if it still trains."""
        ...

    def test(self) -> Mapping[int, Mapping[str, float]]:
        """Return each trial's `test/…` metrics: never used for choosing."""
        ...

    def model_state(self, number: int) -> dict[str, Any]:
        """Return a trial's parameters and buffers by name, on the CPU."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next epoch depends on, as tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that a group of the same trials returned; trials that it does not hold are dropped."""
        ...


class Executor(Protocol):
    """Where groups train: processes of this machine, later also workers of several machines."""

    def build(self, configs: Mapping[int, TrialConfig], *, placement: Sequence[Placement] | None = None) -> TrialGroup:
        """Build a group of trials at the beginning of their training.

        Args:
            configs: Trial number to config.
            placement: Of the one trial in each epoch: it trains as it did in a search. None: as the executor places it.
        """
        ...

    def close(self) -> None:
        """End what trains elsewhere."""
        ...


class Stepwise(Protocol):
    """One epoch of some trials, step by step: begin, train on each batch, evaluate on each, end."""

    configs: dict[int, TrialConfig]
    """Configs of the trials that are left, by number."""

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
        """Return the epoch's metrics, once all batches of the split `val` were evaluated."""
        ...


def train_epoch_of(trainer: Stepwise) -> dict[int, EpochMetrics]:
    """Train and evaluate one trainer for an epoch."""
    trainer.begin_epoch()
    for inputs, targets in trainer.training_batches():
        trainer.train_step(inputs, targets)
    for inputs, targets in trainer.evaluation_batches("val"):
        trainer.evaluate_step(inputs, targets)
    return trainer.end_epoch()


def train_epoch_together(trainers: Sequence[Stepwise], each_of: Map) -> list[dict[int, EpochMetrics] | Exception]:
    """Train and evaluate several trainers for an epoch on batches that are read once.

    Args:
        trainers: Of trials with the same data, order and batch size, in the same epoch.
        each_of: Calls a function on each of some trainers.

    Returns:
        Each trainer's metrics, or the exception that it raised: it then took no further part.
    """
    outcomes: list[Any] = [None] * len(trainers)

    def each(function: Callable[[Stepwise], Any]) -> None:
        going = [place for place, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)]
        values = each_of(functools.partial(_attempt, function), [trainers[place] for place in going])
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
        return trial_error(error)


def trial_error(error: Exception) -> Exception:
    """Return what a trainer raised, if its trials may have caused it.

    Raises:
        PipelineError: The data or the device failed, which no trial causes.
    """
    if isinstance(error, PipelineError):
        raise error
    if isinstance(error, torch.AcceleratorError):
        raise DeviceError(f"the device failed: {first_line(error)}") from error
    return error.with_traceback(None)  # which would keep the memory of what was being computed
