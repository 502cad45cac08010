"""Records of a trial: metrics of an epoch, and an ended trial, as the study stores it and MLflow gets it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pipeline.space.config import TrialConfig


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """The metrics and learning rates of one trial in one epoch."""

    epoch: int
    """Epochs trained so far, this one included."""
    step: int
    """Optimizer updates made so far."""
    metrics: Mapping[str, float]
    """By name: `train/loss`, `val/loss`, and the workload's own, such as `val/accuracy`."""
    lr: Mapping[str, tuple[tuple[int, float], ...]]
    """Group name to points (step, learning rate): update number `step`, counted from 1, used the rate. A schedule that
    moves every epoch has one point, at the epoch's last step. A schedule that moves every step has a point per step."""
    diverged: str | None = None
    """Which number is no longer finite, if the loss or a metric is not."""
    failed: str | None = None
    """The exception, if the epoch raised one; `metrics` are empty then."""

    @property
    def finished(self) -> bool:
        """Whether the epoch was trained to its end with finite numbers."""
        return self.diverged is None and self.failed is None


class TrialState(StrEnum):
    """How a trial ended."""

    COMPLETE = "complete"
    """Trained for all its epochs."""
    PRUNED = "pruned"
    """Stopped early, being worse than others at the same epoch."""
    DIVERGED = "diverged"
    """Its loss or a metric was no longer finite: a result, not an error."""
    FAILED = "failed"
    """It raised."""


def number(value: float) -> str:
    """Return a metric for people to read: four decimals, or three digits if the number is very small or large."""
    return f"{value:.4f}" if value == 0 or 1e-2 <= abs(value) < 1e6 else f"{value:.2e}"


@dataclass(frozen=True, kw_only=True)
class EndedTrial:
    """One trial from its proposal to its end."""

    number: int
    """Number in the study, counted from 0."""
    config: TrialConfig
    params: Mapping[str, Any]
    """Optuna's parameter name, such as `adamw.base_lr`, to the value that the sampler chose."""
    state: TrialState
    reason: str | None
    """Why the trial ended before its last epoch; None for a complete trial."""
    value: float | None
    """The objective after the last epoch; None unless complete."""
    epochs: tuple[EpochMetrics, ...]
    """One entry per epoch, in order."""
    started: float
    """Seconds since 1970."""
    ended: float
    """Seconds since 1970."""
    environment: Mapping[str, Any]
    """Trainer, device, threads, versions: whatever the numbers may depend on besides the config."""

    @property
    def score(self) -> str:
        """The objective for people to read; empty unless the trial is complete."""
        return "" if self.value is None else number(self.value)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the last epoch; empty if no epoch was finished."""
        return self.epochs[-1].metrics if self.epochs else {}
