"""The contract of trainers: trials that train together, one epoch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


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
    diverged: str | None = None
    """Why the trial cannot go on, if its loss or a metric is no longer finite."""
    failed: str | None = None
    """What was raised, if the epoch could not be finished; then `metrics` are empty."""

    @property
    def finished(self) -> bool:
        """Whether the epoch was trained to its end with finite numbers."""
        return self.diverged is None and self.failed is None


class TrialGroup(Protocol):
    """Trials that train together, one epoch at a time, keyed by trial number. One trial is a group of one."""

    def train_epoch(self) -> Mapping[int, EpochMetrics]:
        """Train every trial for one epoch and evaluate it; a diverged or failed trial has left the group."""
        ...

    def drop(self, number: int) -> None:
        """Stop training a trial; the others do not notice, to the bit."""
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
        """Go on from a state that a group of the same trials returned."""
        ...


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed of 63 bits that belongs to a purpose, such as ("order", epoch)."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
