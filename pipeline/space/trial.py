"""A trial as a value: its placement and metrics epoch by epoch, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pipeline.space.config import TrialConfig
from pipeline.space.placement import Placement


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """What one trial did in one epoch."""

    epoch: int
    """Epochs trained so far, this one included."""
    step: int
    """Optimizer updates made so far."""
    metrics: Mapping[str, float]
    """By name: `train/loss`, `val/loss`, and the workload's own, such as `val/accuracy`."""
    lr: Mapping[str, tuple[tuple[int, float], ...]]
    """Group name to points (step, learning rate): the rate that update number `step`, counted from 1, used. A schedule
    that moves once per epoch has one point, at the epoch's last step; one that moves every step has them all."""
    placement: Placement | None = None
    """Where it trained; None if the epoch could not be finished, or was read from a study, which keeps it elsewhere."""
    diverged: str | None = None
    """Why the trial cannot go on, if its loss or a metric is no longer finite."""
    failed: str | None = None
    """What was raised, if the epoch could not be finished; then `metrics` are empty."""

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
    """Return a metric for people to read: four decimals, or three digits of what is too small or large for them."""
    return f"{value:.4f}" if value == 0 or 1e-2 <= abs(value) < 1e6 else f"{value:.2e}"


@dataclass(frozen=True, kw_only=True)
class EndedTrial:
    """One trial from its proposal to its end."""

    number: int
    """Counts from 0 in its study."""
    config: TrialConfig
    params: Mapping[str, Any]
    """What the sampler chose, by Optuna's parameter name, such as `adamw.base_lr`."""
    state: TrialState
    reason: str | None
    """Why it ended before its last epoch, in words; None for a complete trial."""
    value: float | None
    """The objective after the last epoch; None unless complete."""
    epochs: tuple[EpochMetrics, ...]
    """What happened, epoch by epoch."""
    started: float
    """Seconds since 1970."""
    ended: float
    """Seconds since 1970."""
    environment: Mapping[str, Any]
    """What the numbers may depend on besides the config: trainer, device, threads, versions."""

    @property
    def score(self) -> str:
        """The objective for people to read; empty unless complete."""
        return "" if self.value is None else number(self.value)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of its last epoch; empty if it finished none."""
        return self.epochs[-1].metrics if self.epochs else {}
