"""Replay: train one trial again among copies of itself, with the placement that it had in a search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pipeline.space.config import TrialConfig
from pipeline.space.placement import Placement
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import ended_by, trial_error
from pipeline.training.loops import LoopTrial
from pipeline.training.plain import PlainTrials
from pipeline.training.precision import precision
from pipeline.training.rows.trainer import FusedTrials

Trainer = FusedTrials | PlainTrials | LoopTrial


class ReplayedTrial:
    """A group of one trial; see `TrialGroup` for the contract.

    The other rows of the matrix are copies of the trial, since their values do not affect the trial's row.

    Args:
        number: Number of the trial.
        config: Config of the trial.
        placements: Placement in each epoch; later epochs repeat the last.
        device: Where the trial trains.
        build: Builds a trainer from configs by number, and whether the trials train plain.
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
        self._built_for = placements[0]
        """Placement of the trainer."""
        self._epoch = 0
        self._dropped = False

    def train_epoch(self, *, average: bool = False) -> dict[int, EpochMetrics]:
        """Train the trial for one epoch and evaluate it."""
        if self._dropped:
            return {}
        with precision(self._config, self._device, threads=self._placement.threads):
            try:
                metrics = self._placed_trainer().train_epoch(average=average)[self._row]
            except (Exception, SystemExit) as raised:
                metrics = ended_by(trial_error(raised), epoch=self._epoch, step=0)
        self._epoch += 1
        self._dropped = not metrics.finished
        return {self._number: metrics}

    def drop(self, number: int) -> None:
        """Stop training the trial."""
        self._dropped = True

    def test(self) -> dict[int, dict[str, float]]:
        """Return the trial's `test/…` metrics."""
        if self._dropped:
            return {}
        with precision(self._config, self._device, threads=self._placement.threads):
            return {self._number: self._placed_trainer().test()[self._row]}

    def model_state(self, number: int) -> dict[str, Any]:
        """Return the trial's parameters and buffers by name, on the CPU."""
        with precision(self._config, self._device, threads=self._placement.threads):  # epochs may be trained again
            return self._placed_trainer().model_state(self._row)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the trial."""
        if self._dropped:
            return {"epochs": self._epoch, "trials": {}}
        state = self._placed_trainer().state_dict()[str(self._row)]
        return {"epochs": self._epoch, "trials": {str(self._number): state}}

    def trial_states(self) -> Iterator[tuple[str, Any]]:
        """Yield the trial's state."""
        yield from self.state_dict()["trials"].items()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the trial."""
        self._epoch = state["epochs"]
        self._trainer = self._build_copies(state["trials"][str(self._number)])

    @property
    def _placement(self) -> Placement:
        return self._placements[min(self._epoch, len(self._placements) - 1)]

    @property
    def _row(self) -> int:
        return self._placement.place or 0

    def _placed_trainer(self) -> Trainer:
        """Return the trainer of the next epoch, rebuilt from the trial's state if the placement has changed."""
        if self._trainer is None:
            self._trainer = self._build_copies(None)
        elif self._built_for != self._placement or len(self._trainer.configs) != (self._placement.rows or 1):
            self._trainer = self._build_copies(self._trainer.state_dict()[str(self._built_for.place or 0)])
        return self._trainer

    def _build_copies(self, state: Mapping[str, Any] | None) -> Trainer:
        self._built_for = self._placement
        rows = self._placement.rows
        trainer = self._build(dict.fromkeys(range(rows or 1), self._config), rows is None)
        if state is not None:
            trainer.load_state_dict({str(number): state for number in trainer.configs})
        return trainer
