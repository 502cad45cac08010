"""The contracts of training: groups of trials, the executor that builds groups, and trainers that advance by steps."""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from pipeline.errors import DeviceError, PipelineError, first_line
from pipeline.files.code import own_line
from pipeline.space.config import TrialConfig
from pipeline.space.placement import Placement, PlacementRules
from pipeline.space.trial import EpochMetrics
from pipeline.workloads.trees import map_tensors
from pipeline.workloads.workload import Batch

Batches = Iterator[Batch]
"""Batches as the model takes them."""

Map = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
"""Calls a function on each item, perhaps concurrently, and returns the results in order."""


class Diverged(Exception):
    """A trial's numbers are no longer finite; the message says where."""


class GroupLost(Exception):
    """A group lost its state in mid-epoch; the group must be loaded from its last checkpoint.

    Args:
        message: The cause, for people.
    """


class TrialGroup(Protocol):
    """Trials that train together, one epoch at a time, keyed by trial number. One trial is a group of one."""

    def train_epoch(self, *, average: bool = False) -> Mapping[int, EpochMetrics]:
        """Train every trial for one epoch and evaluate it; a diverged or failed trial leaves the group.

        Args:
            average: Whether to evaluate each trial's averaged weights too, for `EpochMetrics.averaged`. No other number
                depends on it.

        Raises:
            GroupLost: The group must be loaded from its last checkpoint.
        """
        ...

    def drop(self, number: int) -> None:
        """Stop training a trial; do nothing if the trial has left the group."""
        ...

    def test(self) -> Mapping[int, Mapping[str, float]]:
        """Return each trial's `test/…` metrics; never choose by them."""
        ...

    def model_state(self, number: int) -> dict[str, Any]:
        """Return a trial's parameters and buffers by name, on the CPU."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next epoch depends on, as tensors and plain values."""
        ...

    def trial_states(self) -> Iterator[tuple[str, Any]]:
        """Yield the trials of `state_dict`, number and state, while no other method is called."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of a group of the same trials, and drop the trials that are not in the state."""
        ...


class Executor(Protocol):
    """Builds groups and trains them."""

    @property
    def rules(self) -> PlacementRules:
        """What the placement of trials depends on now."""
        ...

    def build(self, configs: Mapping[int, TrialConfig], *, placement: Sequence[Placement] | None = None) -> TrialGroup:
        """Build a group of untrained trials.

        Args:
            configs: Trial number to config.
            placement: Placement of a single trial in each epoch, to train it as a search did; None: the executor
                places the trials.
        """
        ...

    def adopt(self, rules: PlacementRules) -> None:
        """Place trials by the rules of a resumed study."""
        ...

    def close(self) -> None:
        """End the processes that train."""
        ...


class Stepwise(Protocol):
    """Trains some trials for an epoch, step by step: begin, train on each batch, evaluate on each batch, end."""

    configs: dict[int, TrialConfig]
    """Trial number to config of each remaining trial."""

    def training_batches(self) -> Batches:
        """Yield the training batches of the next epoch."""
        ...

    def evaluation_batches(self, name: str) -> Batches:
        """Yield the batches of a split."""
        ...

    def begin_epoch(self, *, average: bool = False) -> None:
        """Begin an epoch, before its first batch; `average`: as `TrialGroup.train_epoch` takes it."""
        ...

    def train_step(self, batch: Batch) -> None:
        """Update every trial on one batch."""
        ...

    def evaluate_step(self, batch: Batch) -> None:
        """Evaluate every trial on one batch."""
        ...

    def end_epoch(self) -> dict[int, EpochMetrics]:
        """Return the epoch's metrics, after the last batch of the split `val`."""
        ...


def train_epoch_of(trainer: Stepwise, *, average: bool = False) -> dict[int, EpochMetrics]:
    """Train and evaluate one trainer for an epoch."""
    trainer.begin_epoch(average=average)
    for batch in trainer.training_batches():
        trainer.train_step(batch)
    for batch in trainer.evaluation_batches("val"):
        trainer.evaluate_step(batch)
    return trainer.end_epoch()


def train_epoch_together(
    trainers: Sequence[Stepwise], map_trainers: Map, *, average: bool = False
) -> list[dict[int, EpochMetrics] | Exception]:
    """Train and evaluate several trainers for an epoch, reading each batch once.

    Args:
        trainers: Trainers with the same data, order and batch size, in the same epoch.
        map_trainers: Calls a function on each of some trainers.
        average: As `TrialGroup.train_epoch` takes it.

    Returns:
        Each trainer's metrics, or the exception that the trainer raised; such a trainer skips the rest of the epoch.
    """
    outcomes: list[Any] = [None] * len(trainers)

    def each(function: Callable[[Stepwise], Any]) -> None:
        running = [index for index, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)]
        values = map_trainers(functools.partial(_attempt, function), [trainers[index] for index in running])
        for index, value in zip(running, values, strict=True):
            outcomes[index] = value

    each(lambda trainer: trainer.begin_epoch(average=average))
    for batch in trainers[0].training_batches():
        each(functools.partial(_step_on_copy, "train_step", batch))
    for batch in trainers[0].evaluation_batches("val"):
        each(functools.partial(_step_on_copy, "evaluate_step", batch))
    each(lambda trainer: trainer.end_epoch())
    return outcomes


def _step_on_copy(step: str, batch: Batch, trainer: Stepwise) -> None:
    """Make a step on a copy of a batch, since a model may change the batch in place."""
    getattr(trainer, step)(copied(batch))


def copied(batch: Batch) -> Batch:
    """Return a copy of a batch's tensors; inputs that are also the targets stay so."""
    inputs = map_tensors(torch.clone, batch.inputs)
    return Batch(
        inputs, inputs if batch.targets is batch.inputs else map_tensors(torch.clone, batch.targets), batch.size
    )


def _attempt(function: Callable[[Stepwise], Any], trainer: Stepwise) -> Any:
    try:
        return function(trainer)
    except (Exception, SystemExit) as error:
        return trial_error(error)


def ended_by(error: Exception, *, epoch: int, step: int) -> EpochMetrics:
    """Return the metrics of a trial that an exception has ended: it diverged or failed."""
    if isinstance(error, Diverged):
        return EpochMetrics(epoch=epoch, step=step, metrics={}, lr={}, diverged=str(error))
    reason = ", ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    return EpochMetrics(epoch=epoch, step=step, metrics={}, lr={}, failed=reason)


def trial_error(error: Exception | SystemExit) -> Exception:
    """Return an exception that a trial may have caused, with the line that raised as a note; raise any other.

    Raises:
        PipelineError: The data or the device failed, which no trial causes.
    """
    if isinstance(error, PipelineError):
        raise error
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # as a CPU's allocator has it
        return torch.OutOfMemoryError(first_line(error))
    if isinstance(error, torch.AcceleratorError):
        raise DeviceError(f"the device failed: {first_line(error)}") from error
    if isinstance(error, SystemExit):
        return exit_error(error)
    for line in own_line(error):
        error.add_note(line)
    return error.with_traceback(None)  # a traceback would keep the tensors of the failed computation alive


def exit_error(error: SystemExit) -> Exception:
    """Return the error of a trial whose code called `sys.exit`."""
    return RuntimeError(f"sys.exit({error.code!r}) was called")


def portable_error(error: Exception) -> Exception:
    """Return an exception of the same name and text that can be unpickled in another process."""
    with contextlib.suppress(Exception):
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error.with_traceback(None)
    if isinstance(error, PipelineError):
        return PipelineError(str(error))
    text = type(error).__name__
    with contextlib.suppress(Exception):
        text += f": {error}"
    return RuntimeError(text)
