"""A trial as a value: its placement and metrics epoch by epoch, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pipeline.space.config import TrialConfig
from pipeline.space.placement import Placement

if TYPE_CHECKING:
    from pipeline.space.search_space import Objective


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """The results of one trial in one epoch."""

    epoch: int
    """Epochs trained so far, this one included."""
    step: int
    """Optimizer updates made so far."""
    metrics: Mapping[str, float]
    """Metric name to value: `train/loss`, `val/loss`, and the workload's metrics, such as `val/accuracy`."""
    lr: Mapping[str, tuple[tuple[int, float], ...]] = field(repr=False)
    """Group name to points (step, learning rate): the rate of update number `step`, counted from 1. A schedule that
    moves every epoch has one point, at the epoch's last step; a schedule that moves every step has every step."""
    averaged: Mapping[str, float] = field(default_factory=dict, repr=False)
    """`val/…` metrics of the mean of the weights after each step; empty unless a pruner compares them."""
    placement: Placement | None = field(default=None, repr=False)
    """None if the trial failed, or if the epoch was read from a study, which stores placements in the environment."""
    diverged: str | None = None
    """Where the loss or a metric stopped being finite; None if all are finite."""
    failed: str | None = None
    """The exception that was raised; then `metrics` are empty. None if none was raised."""

    @property
    def finished(self) -> bool:
        """Whether the epoch was completed with finite numbers."""
        return self.diverged is None and self.failed is None


class TrialState(StrEnum):
    """The state of an ended trial."""

    COMPLETE = "complete"
    """Trained for all its epochs."""
    PRUNED = "pruned"
    """Stopped early, because other trials were better after the same epoch."""
    DIVERGED = "diverged"
    """Its loss or a metric was no longer finite: a result, not an error."""
    FAILED = "failed"
    """Its model, loss or metric raised."""


@dataclass(frozen=True, kw_only=True)
class BegunTrial:
    """A trial that begins to train, or that goes on from a checkpoint."""

    number: int
    """Counts from 0 in the study."""
    config: TrialConfig = field(repr=False)
    started: float
    """Seconds since 1970; of a trial that goes on, when it first began."""
    epochs: tuple[EpochMetrics, ...] = field(default=(), repr=False)
    """Results of the epochs before the checkpoint; empty for a trial that trains from its beginning."""
    confirms: str | None = None
    """What a run of the confirmation confirms, such as `#33`; None for a trial of the search."""


def number(value: float) -> str:
    """Return a metric for people to read: four decimals, or three digits of a very small or large value."""
    return f"{value:.4f}" if value == 0 or 1e-2 <= abs(value) < 1e6 else f"{value:.2e}"


@dataclass(frozen=True, kw_only=True)
class EndedTrial:
    """The complete record of one trial; its `repr` is what was chosen and how the trial ended."""

    number: int
    """Counts from 0 in the study."""
    config: TrialConfig = field(repr=False)
    params: Mapping[str, Any]
    """Optuna's parameter name, such as `adamw.base_lr`, to the value that the sampler chose."""
    state: TrialState
    objective: Objective = field(repr=False)
    """What the study ranks trials by."""
    reason: str | None
    """Why the trial ended before its last epoch; None for a complete trial."""
    value: float | None
    """The objective, of the last epoch or of the best, as the study says; None unless complete."""
    epochs: tuple[EpochMetrics, ...] = field(repr=False)
    """Results of each epoch."""
    started: float = field(repr=False)
    """Seconds since 1970."""
    ended: float = field(repr=False)
    """Seconds since 1970."""
    environment: Mapping[str, Any] = field(repr=False)
    """Everything but the config that the numbers may depend on: placement, device, machine, versions."""
    confirms: str | None = field(default=None, repr=False)
    """What a run of the confirmation confirms, such as `#33`; None for a trial of the search."""

    @property
    def score(self) -> str:
        """The objective for people to read; empty unless complete."""
        return "" if self.value is None else number(self.value)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the last epoch; empty if there is none."""
        return self.epochs[-1].metrics if self.epochs else {}
