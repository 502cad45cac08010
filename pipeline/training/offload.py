"""Plain trials in the host's memory, for a device that does not hold all trials of a group at once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.space.config import TrialConfig
from pipeline.space.trial import EpochMetrics
from pipeline.training.plain import PlainTrials
from pipeline.workloads.trees import map_tensors

Value = TypeVar("Value")


class OffloadedTrials:
    """Plain trials whose state is in the host's memory, except while they train; see `TrialGroup` for the contract.

    Each call builds the trials on the device, continues from their state and releases them. The metrics are those of
    trials that stay on the device, because a trial continues from a state to the bit.

    Args:
        configs: Trial number to config.
        build: Builds the trials on the device.
    """

    plain = True
    """Whether each trial trains by itself."""

    def __init__(
        self, configs: Mapping[int, TrialConfig], build: Callable[[Mapping[int, TrialConfig]], PlainTrials]
    ) -> None:
        self.configs = dict(configs)
        self._build = build
        self._state: Mapping[str, Any] | None = None
        """The state on the CPU; None before the first epoch."""

    def train_epoch(self, *, average: bool = False) -> dict[int, EpochMetrics]:
        """Train every trial for one epoch and evaluate it; a diverged or failed trial leaves the group."""

        def train(trials: PlainTrials) -> dict[int, EpochMetrics]:
            results = trials.train_epoch(average=average)
            self._state = _on_cpu(trials.state_dict())
            self.configs = dict(trials.configs)
            return results

        return self._on_device(train)

    def drop(self, number: int) -> None:
        """Stop training a trial."""
        del self.configs[number]

    def test(self) -> dict[int, dict[str, float]]:
        """Return each trial's `test/…` metrics."""
        return self._on_device(PlainTrials.test)

    def model_state(self, number: int) -> dict[str, Tensor]:
        """Return a trial's parameters and buffers by name, on the CPU."""
        return self._on_device(lambda trials: trials.model_state(number))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every trial."""
        state = self._on_device(lambda trials: _on_cpu(trials.state_dict())) if self._state is None else self._state
        return {str(number): state[str(number)] for number in self.configs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, and drop the trials that are not in the state."""
        self.configs = {number: config for number, config in self.configs.items() if str(number) in state}
        self._state = _on_cpu(state)

    def _on_device(self, use: Callable[[PlainTrials], Value]) -> Value:
        """Build the trials on the device, call a function of them, and release them."""
        released()
        trials = self._build(self.configs)
        if self._state is not None:
            trials.load_state_dict(_on_cpu(self._state))
        return use(trials)


def released() -> None:
    """Return to the device the memory of what is no longer used; a model may be in a cycle of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state whose tensors are copies on the CPU; training changes the tensors of a loaded state in place."""
    return dict(map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), dict(state)))
