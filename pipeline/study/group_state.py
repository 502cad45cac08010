"""What is known of a group of trials under way; with their trainer's state, it is all that a checkpoint holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.space.config import TrialConfig
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState

Proposals = Mapping[int, tuple[TrialConfig, dict[str, Any]]]
"""Trial number to its config and to the parameters that the sampler chose."""
DECISIVE = ("trainer", "torch", "pipeline")
"""What must be the same of an environment for a state to be loaded there: its form depends on them."""


class UnderWay:
    """The trials of a group: what they did epoch by epoch, how some have ended, which are next to be stored.

    Args:
        proposals: From `study.next_group`.
        study: Identity of the study.
        metric: The objective.
        environment: Gives what is noted of where a config was trained.
    """

    def __init__(
        self,
        proposals: Proposals,
        *,
        study: str,
        metric: str,
        environment: Callable[[TrialConfig], Mapping[str, Any]],
    ) -> None:
        self.proposals = proposals
        self.epoch = 0
        self._study = study
        self._metric = metric
        self._environments = {number: environment(config) for number, (config, _) in proposals.items()}
        self._started = time.time()
        self._epochs: dict[int, list[EpochMetrics]] = {number: [] for number in proposals}
        self._verdicts: dict[int, tuple[TrialState, str | None, float]] = {}
        self._waiting = sorted(proposals)

    @property
    def running(self) -> bool:
        """Whether a trial is left to train."""
        return len(self._verdicts) < len(self.proposals)

    def add(self, results: Mapping[int, EpochMetrics]) -> None:
        """Note an epoch of every running trial."""
        self.epoch += 1
        for number, metrics in results.items():
            self._epochs[number].append(metrics)

    def end(self, number: int, state: TrialState, reason: str | None) -> None:
        """Note how a trial has ended."""
        self._verdicts[number] = state, reason, time.time()

    def pop_ended(self) -> Iterator[EndedTrial]:
        """Yield, once, each trial that has ended as have all lower numbers."""
        while self._waiting and self._waiting[0] in self._verdicts:
            yield self._ended(self._waiting.pop(0))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "study": self._study,
            "last": max(self.proposals),
            "epoch": self.epoch,
            "started": self._started,
            "trials": {
                number: {
                    "config": config.to_dict(),
                    "params": params,
                    "environment": dict(self._environments[number]),
                    "epochs": [dict(vars(epoch)) for epoch in self._epochs[number]],
                    "verdict": self._plain_verdict(number),
                }
                for number, (config, params) in self.proposals.items()
            },
        }

    def why_not(self, saved: Mapping[str, Any]) -> str | None:
        """Say why what was saved does not belong to these trials, or None if it does."""
        if saved["study"] != self._study:
            return "it is of another study that had this name"
        if saved["last"] != max(self.proposals):
            return f"it is of a group that ends with trial {saved['last']}, and this one with {max(self.proposals)}"
        for number, (config, params) in self.proposals.items():
            its = saved["trials"].get(number)
            if its is None or (its["config"], its["params"]) != (config.to_dict(), params):
                return f"trial {number} is proposed otherwise now; perhaps Optuna is of another version"
            here = self._environments[number]
            for key in DECISIVE:
                if its["environment"].get(key) != here.get(key):
                    return f"the {key} of trial {number} was {its['environment'].get(key)} and is {here.get(key)}"
        return None

    def load_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what was saved; it belongs to these trials, of which there may have been more."""
        self.epoch, self._started = saved["epoch"], saved["started"]
        for number in self.proposals:
            its = saved["trials"][number]
            self._epochs[number] = [EpochMetrics(**epoch) for epoch in its["epochs"]]
            if its["verdict"]:
                state, reason, ended = its["verdict"]
                self._verdicts[number] = TrialState(state), reason, ended

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
            reason=reason,
            value=epochs[-1].metrics[self._metric] if state is TrialState.COMPLETE else None,
            epochs=epochs,
            started=self._started,
            ended=ended,
            environment=self._environments[number],
        )
