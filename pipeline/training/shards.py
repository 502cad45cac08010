"""A group of trials in several trainers, of which one may run out of memory, or end as the process that it is in."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pipeline.space.config import TrialConfig
from pipeline.space.trial import EpochMetrics
from pipeline.training.plain import PlainTrials
from pipeline.training.process import RemoteTrials, WorkerEnded
from pipeline.training.rows.trainer import FusedTrials

if TYPE_CHECKING:
    from pipeline.training.executor import Trainer


Part = FusedTrials | PlainTrials | RemoteTrials
"""Rows of one matrix, or one plain trial, here or in a worker."""
Answer = TypeVar("Answer")


class TrialParts:
    """A group of trials in several trainers; see `TrialGroup` for the contract."""

    def __init__(self, trainer: Trainer, parts: Sequence[Part]) -> None:
        self._trainer = trainer
        self.parts = list(parts)
        self._epochs = 0
        self._failed: dict[int, EpochMetrics] = {}
        """Trials that failed between two epochs, as they trained anew what a worker had lost; told with the next."""

    def train_epoch(self) -> dict[int, EpochMetrics]:
        """Train every trial for one epoch.

        A matrix that runs out of memory or raises is halved, again and again, so that one trial's trouble is its own.
        Its halves begin anew and train as far as it had come: then they are what it was. So does what a worker had
        that was killed.
        """
        self._ask(self._rebalance)
        waiting, self.parts = self.parts, []
        results = self._train(waiting, epochs=1, again=self._epochs + 1)
        results, self._failed = {**self._failed, **results}, {}
        self._epochs += 1
        return dict(sorted(results.items()))

    def drop(self, number: int) -> None:
        """Stop training a trial."""
        self._ask(lambda: self._part(number).drop(number) if number not in self._failed else self._failed.pop(number))
        self.parts = [part for part in self.parts if part.configs]

    def describe(self) -> str:
        """Return how trials are spread: `rows 4 + 4, plain 1`."""
        rows = [str(len(part.configs)) for part in self.parts if part.fused]
        plain = len(self.parts) - len(rows)
        words = [f"rows {' + '.join(rows)}" if rows else "", f"plain {plain}" if plain else ""]
        return ", ".join(word for word in words if word)

    def test(self) -> dict[int, dict[str, float]]:
        """Return each trial's `test/…` metrics."""
        with self._trainer.arithmetic():
            return self._ask(lambda: {number: of for part in self.parts for number, of in part.test().items()})

    def model_state(self, number: int) -> dict[str, Any]:
        """Return a trial's parameters and buffers by name, on the CPU."""
        return self._ask(lambda: self._part(number).model_state(number))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every trial; how trials were spread over matrices is no part of it."""
        trials = self._ask(lambda: {number: of for part in self.parts for number, of in part.state_dict().items()})
        return {"epochs": self._epochs, "trials": trials}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; trials that it does not hold were dropped."""
        self._ask(lambda: [part.load_state_dict(state["trials"]) for part in self.parts])
        self._epochs = state["epochs"]
        self.parts = [part for part in self.parts if part.configs]

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """Return an answer; where a worker has ended, what it had is trained anew, and the question asked again."""
        while True:
            try:
                return question()
            except WorkerEnded as error:
                lost = [part for part in self.parts if isinstance(part, RemoteTrials) and part.worker.ended]
                self.parts = [part for part in self.parts if part not in lost]
                anew = [new for part in lost for new in self._trainer.again(part.configs, error)]
                results = self._train(anew, epochs=self._epochs, again=self._epochs)
                self._failed |= {number: metrics for number, metrics in results.items() if metrics.failed}

    def _rebalance(self) -> None:
        """Spread what is left equally over matrices and lanes again; trials do not notice."""
        wanted = self._trainer.plan({n: config for part in self.parts for n, config in part.configs.items()})
        placed = [(self._trainer.lane(part), dict(part.configs)) for part in self.parts]
        if self._shape(placed) == self._shape(wanted):
            return
        moving = [part for part, its in zip(self.parts, placed, strict=True) if its not in wanted]
        try:
            states = {number: state for part in moving for number, state in part.state_dict().items()}
            built = [
                self._trainer.build_part(configs, lane) for lane, configs in wanted if (lane, configs) not in placed
            ]
        except torch.OutOfMemoryError:  # while both are in memory; as they are, the matrices fit
            return
        for part in built:
            part.load_state_dict({str(number): states[str(number)] for number in part.configs})
        self.parts = [*built, *(part for part in self.parts if part not in moving)]

    def _shape(self, placed: Sequence[tuple[int, Mapping[int, TrialConfig]]]) -> tuple[list[int], int]:
        """Return what makes one placing as good as another: the sizes of matrices, and trials in the fullest lane."""
        loads = collections.Counter[int]()
        for lane, configs in placed:
            loads[lane] += len(configs)
        sizes = sorted(len(its) for _, its in placed if all(map(self._trainer.fuses, its.values())))
        return sizes, max(loads.values(), default=0)

    def _train(self, parts: list[Part], *, epochs: int, again: int) -> dict[int, EpochMetrics]:
        """Train parts, and keep those that have trials left; what has to be built anew trains for `again` epochs.

        The list is emptied, since the memory of what failed is needed.
        """
        results: dict[int, EpochMetrics] = {}
        while parts:
            broken: list[tuple[Mapping[int, TrialConfig], Exception]] = []
            for part, outcome in zip(parts, self._trainer.train(parts, epochs=epochs), strict=True):
                if isinstance(outcome, dict):
                    results |= outcome
                    self.parts += [part] if part.configs else []
                elif isinstance(outcome, WorkerEnded) or (part.fused and len(part.configs) > 1):
                    broken.append((part.configs, outcome))
                else:
                    failed = f"{type(outcome).__name__}: {outcome}"
                    lost = EpochMetrics(epoch=self._epochs, step=0, metrics={}, lr={}, failed=failed)
                    results |= dict.fromkeys(part.configs, lost)
            parts.clear()
            if broken:
                del part
                torch.cuda.empty_cache()
                epochs = again
                parts = [new for configs, error in broken for new in self._trainer.again(configs, error)]
        return results

    def _part(self, number: int) -> Part:
        return next(part for part in self.parts if number in part.configs)
