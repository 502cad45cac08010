"""A trial group that a Ray worker trains; survives the worker's death, and finds a trial that causes it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.space.config import TrialConfig
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import GroupLost
from pipeline.training.placement import split
from pipeline.training.ray_actor import WorkerDied

if TYPE_CHECKING:
    from pipeline.training.ray_worker import RayWorker

MAX_LOSSES = 4
"""Times that workers may die while they train one epoch of a group before the search stops."""


@dataclass(frozen=True)
class _There:
    """Where a group is: its key in an actor."""

    key: int
    generation: int


class RayGroup:
    """Trials that a worker's actor trains; see `TrialGroup` for the contract."""

    def __init__(self, worker: RayWorker, configs: Mapping[int, TrialConfig]) -> None:
        self._worker = worker
        self._all = dict(configs)
        self._running = dict(configs)
        self._there: _There | None = None
        self._epoch = 0
        self._losses = Counter[int]()
        """Epoch to the number of times that the worker died in it."""
        self._suspects: set[int] = set()
        """Epochs in which the worker died twice, until it is known which trial kills it."""
        self._lost: str | None = None
        """Why the group must be loaded from a state; None if it need not be."""

    def train_epoch(self, *, average: bool = False) -> dict[int, EpochMetrics]:
        """Train every trial for one epoch; a trial that kills its worker, alone too, has failed.

        Raises:
            GroupLost: The worker died, or as the worker's group raises it.
        """
        failed = self._find_killing(average=average) if self._epoch in self._suspects else {}
        results: dict[int, EpochMetrics] = self._ask("train_epoch", average=average) if self._running else {}
        self._epoch += 1
        results = {**results, **failed}
        self._running = {n: c for n, c in self._running.items() if n in results and results[n].finished}
        return dict(sorted(results.items()))

    def drop(self, number: int) -> None:
        """Stop training a trial."""
        self._running.pop(number, None)
        if self._lost is None and self._there is not None:
            with contextlib.suppress(GroupLost):  # the next epoch raises it again
                self._ask("drop", number)

    def test(self) -> dict[int, dict[str, float]]:
        """Return each trial's `test/…` metrics."""
        metrics: dict[int, dict[str, float]] = self._ask("test")
        return metrics

    def model_state(self, number: int) -> dict[str, Any]:
        """Return a trial's parameters and buffers by name, on the CPU."""
        state: dict[str, Any] = self._ask("model_state", number)
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every trial."""
        return {"epochs": self._epoch, "trials": dict(self.trial_states())}

    def trial_states(self) -> Iterator[tuple[str, Any]]:
        """Yield the state of each trial, one at a time."""
        if not self._running:
            return
        there = self._placed()
        try:
            yield from self._worker.states(there.key)
        except WorkerDied as error:
            raise self._loss(error) from None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, and drop the trials that are not in the state; an empty state is the beginning."""
        states = state.get("trials")
        self._running = self._all if states is None else {n: c for n, c in self._all.items() if str(n) in states}
        self._running, self._epoch, self._lost = dict(self._running), state.get("epochs", 0), None
        if not self._running:
            return
        there = self._placed()
        try:
            self._worker.load(there.key, state)
        except WorkerDied as error:
            raise self._loss(error) from None

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        there = self._placed()
        try:
            return self._worker.ask(there.key, method, *arguments, **options)
        except WorkerDied as error:
            raise self._loss(error) from None

    def _placed(self) -> _There:
        """Return where the group is; have an actor build it if it is nowhere.

        Raises:
            GroupLost: The group must be loaded from a state.
        """
        if self._lost is not None:
            raise GroupLost(self._lost)
        if self._there is None or self._there.generation != self._worker.generation:
            try:
                self._worker.place_again()
                self._there = _There(self._worker.build_there(self._all), self._worker.generation)
            except WorkerDied as error:
                raise self._loss(error) from None
        return self._there

    def _loss(self, error: WorkerDied) -> GroupLost:
        """Return the error for a worker that died.

        Raises:
            PipelineError: It has happened too often.
        """
        self._there = None
        self._losses[self._epoch] += 1
        if self._losses[self._epoch] > MAX_LOSSES:
            raise PipelineError(f"{error}, {MAX_LOSSES + 1} times in one epoch; perhaps memory is short")
        if self._losses[self._epoch] > 1:
            self._suspects.add(self._epoch)
        self._lost = f"{error}; its trials go on from their last checkpoint"
        return GroupLost(self._lost)

    def _find_killing(self, *, average: bool) -> dict[int, EpochMetrics]:
        """Find by repeated halving which trials kill their worker alone; return each as failed."""
        state = self.state_dict()
        self._suspects.discard(self._epoch)
        numbers = list(self._running)
        waiting = list(split(numbers, -(-len(numbers) // 2)))
        failed: dict[int, EpochMetrics] = {}
        while waiting:
            part = waiting.pop()
            states = {str(number): state["trials"][str(number)] for number in part if str(number) in state["trials"]}
            try:
                self._worker.place_again()
                key = self._worker.build_there({number: self._all[number] for number in part}, beside=True)
                self._worker.load(key, {"epochs": self._epoch, "trials": states} if self._epoch else {})
                self._worker.ask(key, "train_epoch", average=average)
            except GroupLost:  # memory ran out, or one of the actor's own processes died
                continue
            except WorkerDied as error:
                if len(part) > 1:
                    waiting += split(part, -(-len(part) // 2))
                else:
                    failed[part[0]] = EpochMetrics(epoch=self._epoch, step=0, metrics={}, lr={}, failed=str(error))
        self.load_state_dict({**state, "trials": {n: s for n, s in state["trials"].items() if int(n) not in failed}})
        return failed
