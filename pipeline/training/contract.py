"""The contract of trainers: trials that train together, one epoch at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pipeline.space.trial import EpochMetrics


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
