"""One trial, trained again in the places that it had in a search, among copies of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipeline.space.config import TrialConfig
from pipeline.space.placement import Placement
from pipeline.space.trial import EpochMetrics
from pipeline.training.plain import PlainTrials
from pipeline.training.precision import precision
from pipeline.training.rows.trainer import FusedTrials

Trainer = FusedTrials | PlainTrials


class ReplayedTrial:
    """A group of one trial; see `TrialGroup` for the contract.

    What other rows of its matrix held does not matter, so copies of the trial stand there.

    Args:
        number: Number of the trial.
        config: Config of the trial.
        placements: Placement in each epoch; the last also holds for later epochs.
        device: Where the trial trains.
        build: Builds a trainer from configs by number, and whether they train plain.
    """

    def __init__(
        self,
        number: int,
        config: TrialConfig,
        placements: Sequence[Placement],
        *,
        device: torch.device,
        build: Callable[[Mapping[int, TrialConfig], bool], Trainer],
    ) -> None:
        self._number = number
        self._config = config
        self._placements = placements
        self._device = device
        self._build = build
        self._trainer: Trainer | None = None
        self._trained = placements[0]
        self._epoch = 0
        self._left = False

    def train_epoch(self) -> dict[int, EpochMetrics]:
        """Train the trial for one epoch and evaluate it."""
        if self._left:
            return {}
        with precision(self._config, self._device, threads=self._placement.threads):
            metrics = self._placed().train_epoch()[self._place]
        self._epoch += 1
        self._left = not metrics.finished
        return {self._number: metrics}

    def drop(self, number: int) -> None:
        """Stop training the trial."""
        self._left = True

    def test(self) -> dict[int, dict[str, float]]:
        """Return the trial's `test/…` metrics."""
        if self._left:
            return {}
        with precision(self._config, self._device, threads=self._placement.threads):
            return {self._number: self._placed().test()[self._place]}

    def model_state(self, number: int) -> dict[str, Any]:
        """Return the trial's parameters and buffers by name, on the CPU."""
        return self._placed().model_state(self._place)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the trial."""
        if self._left:
            return {"epochs": self._epoch, "trials": {}}
        return {"epochs": self._epoch, "trials": {str(self._number): self._placed().state_dict()[str(self._place)]}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the trial."""
        self._epoch = state["epochs"]
        self._trainer = self._of_copies(state["trials"][str(self._number)])

    @property
    def _placement(self) -> Placement:
        return self._placements[min(self._epoch, len(self._placements) - 1)]

    @property
    def _place(self) -> int:
        return self._placement.place or 0

    def _placed(self) -> Trainer:
        """Return the trainer of the next epoch: the last epoch's, or another one that goes on from its state."""
        if self._trainer is None:
            self._trainer = self._of_copies(None)
        elif self._trained != self._placement or len(self._trainer.configs) != (self._placement.rows or 1):
            self._trainer = self._of_copies(self._trainer.state_dict()[str(self._trained.place or 0)])
        return self._trainer

    def _of_copies(self, state: Mapping[str, Any] | None) -> Trainer:
        self._trained = self._placement
        rows = self._placement.rows
        trainer = self._build(dict.fromkeys(range(rows or 1), self._config), rows is None)
        if state is not None:
            trainer.load_state_dict({str(number): state for number in trainer.configs})
        return trainer
