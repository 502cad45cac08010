"""GroupState: the record of a running group of trials. A checkpoint holds it and the trainers' state."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.space.config import TrialConfig
from pipeline.space.placement import Placement, from_run_lengths, run_lengths
from pipeline.space.search_space import Objective
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics, TrialState

Proposals = Mapping[int, tuple[TrialConfig, dict[str, Any]]]
"""Trial number to config and to the parameters that the sampler chose."""
MUST_MATCH = ("device", "torch", "pipeline")
"""Keys of an environment that must be equal to load a state, since the format of a state depends on them."""


class GroupState:
    """The trials of a group: metrics epoch by epoch, verdicts, and which ended trials are not stored yet.

    Args:
        proposals: All trials of the group, from `study.next_group`.
        ended: Trials of the group that the study has stored, by number. They train again up to the epoch in which they
            ended, since the placement of the other trials depends on them.
        study: Identity of the study.
        objective: Gives the value of a complete trial.
        environment: Recorded with each trial: device, machine, versions.
        row_limit: Most rows of a matrix as the group begins.
    """

    def __init__(
        self,
        proposals: Proposals,
        ended: Mapping[int, EndedTrial],
        *,
        study: str,
        objective: Objective,
        environment: Mapping[str, Any],
        row_limit: int | None,
    ) -> None:
        self.proposals = proposals
        self.row_limit = row_limit
        self.epoch = 0
        """Number of epochs with metrics."""
        self._study = study
        self._objective = objective
        self._environment = dict(environment)
        self._started = time.time()
        self._epochs: dict[int, list[EpochMetrics]] = {number: [] for number in proposals}
        self._verdicts: dict[int, tuple[TrialState, str | None, float]] = {}
        self._left_after = {
            number: len(from_run_lengths(trial.environment["placement"])) for number, trial in ended.items()
        }
        """Number of each ended trial to the number of epochs that the trial trained."""
        self._waiting = sorted(number for number in proposals if number not in ended)
        self._broken = False

    @property
    def running(self) -> set[int]:
        """Numbers of the trials that have not ended."""
        return self.proposals.keys() - self._left_after.keys()

    def begun(self) -> list[BegunTrial]:
        """Return the trials that have not ended, with the epochs that they have trained."""
        return [
            BegunTrial(
                number=number,
                config=self.proposals[number][0],
                started=self._started,
                epochs=tuple(self._epochs[number]),
            )
            for number in sorted(self.running)
        ]

    def not_stored(self) -> list[EndedTrial]:
        """Return the trials that have ended and wait for lower numbers to be stored."""
        return [self._ended(number) for number in self._waiting if number in self._verdicts]

    def left_by(self, epoch: int) -> list[int]:
        """Return the trials that had left the group by the end of an epoch."""
        return [number for number, last in self._left_after.items() if last <= epoch]

    def add(self, results: Mapping[int, EpochMetrics]) -> None:
        """Add the metrics of an epoch of every running trial."""
        self.epoch += 1
        for number, metrics in results.items():
            placement = metrics.placement
            if placement is not None and self._is_broken(number):
                placement = dataclasses.replace(placement, broken=True)
            self._epochs[number].append(dataclasses.replace(metrics, placement=placement))

    def history(self, number: int) -> Sequence[EpochMetrics]:
        """Return the metrics of each epoch of a trial so far."""
        return self._epochs[number]

    def mark_broken(self) -> None:
        """Mark the placements from now on as broken: epochs with metrics were trained again in other places."""
        self._broken = True

    def end(self, number: int, state: TrialState, reason: str | None) -> EndedTrial:
        """Record how a trial has ended, and return its record."""
        self._verdicts[number] = state, reason, time.time()
        self._left_after[number] = len(self._placements(number))
        return self._ended(number)

    def pop_ended(self) -> list[EndedTrial]:
        """Return ended trials in number order, each once; a trial waits for all lower numbers."""
        ended = list(itertools.takewhile(self._verdicts.__contains__, self._waiting))
        del self._waiting[: len(ended)]
        return [self._ended(number) for number in ended]

    def to_dict(self) -> dict[str, Any]:
        """Return the state of the group as plain values."""
        return {
            "study": self._study,
            "last": max(self.proposals),
            "epoch": self.epoch,
            "started": self._started,
            "environment": self._environment,
            "trials": {
                number: {
                    "config": config.to_dict(),
                    "params": params,
                    "epochs": [_plain(epoch) for epoch in self._epochs[number]],
                    "verdict": self._plain_verdict(number),
                }
                for number, (config, params) in self.proposals.items()
            },
        }

    def mismatch(self, saved: Mapping[str, Any]) -> str | None:
        """Return why a saved state does not belong to these trials; None if it does."""
        if saved["study"] != self._study:
            return "it is of another study that had this name"
        if saved["last"] < max(self.proposals):
            return f"it is of a group that ends with trial {saved['last']}, and this one with {max(self.proposals)}"
        for number, (config, params) in self.proposals.items():
            trial = saved["trials"].get(number)
            if trial is None or (trial["config"], trial["params"]) != (config.to_dict(), params):
                return f"trial {number} is proposed otherwise now; perhaps Optuna is of another version"
        if all(trial["verdict"] for trial in saved["trials"].values()):
            return None  # nothing is left to train
        before, now = saved["environment"], self._environment
        changed = [key for key in MUST_MATCH if before.get(key) != now.get(key)]
        return f"the {changed[0]} was {before.get(changed[0])} and is {now.get(changed[0])}" if changed else None

    def load_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state of these trials; the state may hold more trials."""
        self.epoch, self._started = saved["epoch"], saved["started"]
        for number in self.running:
            trial = saved["trials"][number]
            self._epochs[number] = [_from_plain(epoch) for epoch in trial["epochs"]]
            if trial["verdict"]:
                state, reason, ended = trial["verdict"]
                self._verdicts[number] = TrialState(state), reason, ended
                self._left_after[number] = len(self._placements(number))
        if not self.running:
            self._environment = saved["environment"]  # another worker may have trained them

    def _placements(self, number: int) -> list[Placement]:
        return [epoch.placement for epoch in self._epochs[number] if epoch.placement is not None]

    def _is_broken(self, number: int) -> bool:
        placements = self._placements(number)
        return self._broken or bool(placements and placements[-1].broken)

    def _plain_verdict(self, number: int) -> tuple[str, str | None, float] | None:
        if number not in self._verdicts:
            return None
        state, reason, ended = self._verdicts[number]
        return state.value, reason, ended

    def _ended(self, number: int) -> EndedTrial:
        config, params = self.proposals[number]
        state, reason, ended = self._verdicts[number]
        epochs = tuple(self._epochs[number])
        return EndedTrial(
            number=number,
            config=config,
            params=params,
            state=state,
            objective=self._objective,
            reason=reason,
            value=self._objective.value(epochs) if state is TrialState.COMPLETE else None,
            epochs=epochs,
            started=self._started,
            ended=ended,
            environment={**self._environment, "placement": run_lengths(self._placements(number))},
        )


def _plain(epoch: EpochMetrics) -> dict[str, Any]:
    return {**vars(epoch), "placement": None if epoch.placement is None else dict(vars(epoch.placement))}


def _from_plain(epoch: Mapping[str, Any]) -> EpochMetrics:
    placement = epoch["placement"]
    return EpochMetrics(**{**epoch, "placement": None if placement is None else Placement(**placement)})
