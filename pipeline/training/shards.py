"""A trial group split over several trainers; survives running out of memory and a killed process."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pipeline.errors import PipelineError
from pipeline.space.config import TrialConfig
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import GroupLost, ended_by
from pipeline.training.loops import LoopTrial
from pipeline.training.offload import OffloadedTrials
from pipeline.training.placement import Shard, split
from pipeline.training.plain import PlainTrials
from pipeline.training.process import ProcessDied, RemoteTrials
from pipeline.training.rows.trainer import FusedTrials

if TYPE_CHECKING:
    from pipeline.training.executor import LocalExecutor

MAX_LOSSES = 4
"""Times that processes may die, or memory run out for one trial, in one epoch before the search stops."""
ShardTrainer = FusedTrials | PlainTrials | OffloadedTrials | LoopTrial | RemoteTrials
"""Trains the rows of one matrix, or one plain trial, in this process or another."""
States = Mapping[str, Any]
"""Trial number, as text, to the state of its parameters, optimizer and schedule."""
Answer = TypeVar("Answer")


class ShardedTrials:
    """A group of trials, placed before each epoch; see `TrialGroup` for the contract.

    Args:
        executor: Places shards, builds and trains them.
        configs: Trial number to config.
    """

    def __init__(self, executor: LocalExecutor, configs: Mapping[int, TrialConfig]) -> None:
        self._executor = executor
        self._all = dict(configs)
        self._losses = Counter[int]()
        """Epoch to the number of times that a process has died in it, or memory ran out for one trial."""
        self._suspects: dict[int, list[tuple[int, ...]]] = {}
        """Epoch to the trials of each matrix that raised in the epoch, until `_find_raising` has found the cause."""
        self._lost: str | None = None
        """Why the group must be loaded from a state; None if it need not be."""
        self.configs = dict(configs)
        """Configs of the running trials."""
        self._epoch = 0
        self._trainers: list[ShardTrainer] = []
        self._states: States = {}
        """States of trials that no trainer holds."""

    def train_epoch(self, *, average: bool = False) -> dict[int, EpochMetrics]:
        """Train every trial for one epoch; a trial that raises, alone or in a matrix, has failed.

        Args:
            average: See `TrialGroup`.

        Raises:
            GroupLost: Memory ran out, a process died, or a matrix raised. After `load_state_dict` the group continues
                with fewer rows in a matrix, in a new process, or without the trials that raise.
        """
        find_raising = functools.partial(self._find_raising, average=average)
        failed = self._call(find_raising) if self._epoch in self._suspects else {}
        self._call(self._arrange)
        results: dict[int, EpochMetrics] = {}
        lost: list[tuple[ShardTrainer, Exception]] = []
        outcomes = self._executor.train(self._trainers, average=average)
        for trainer, outcome in zip(self._trainers, outcomes, strict=True):
            if isinstance(outcome, dict):
                results |= outcome
            elif isinstance(outcome, ProcessDied | torch.OutOfMemoryError) or len(trainer.configs) > 1:
                lost.append((trainer, outcome))
            else:
                failed |= {number: self._failed(outcome) for number in trainer.configs}
        if lost:
            raise self._group_lost(lost)
        self._trainers = [trainer for trainer in self._trainers if trainer.configs.keys() - failed.keys()]
        self._epoch += 1
        results |= failed
        self.configs = {n: config for n, config in self.configs.items() if n in results and results[n].finished}
        return dict(sorted(results.items()))

    def drop(self, number: int) -> None:
        """Stop training a trial; a running trial leaves its matrix before the next epoch, or now if it is the last."""
        self.configs.pop(number, None)
        if not self.configs:
            with contextlib.suppress(ProcessDied):
                self._drop_ended()

    def test(self) -> dict[int, dict[str, float]]:
        """Return each trial's `test/…` metrics."""
        self._call(self._arrange)
        with self._executor.precision():
            return self._call(lambda: {n: values for trainer in self._trainers for n, values in trainer.test().items()})

    def model_state(self, number: int) -> dict[str, Any]:
        """Return a trial's parameters and buffers by name, on the CPU."""
        if not self._trainers:  # before the first epoch
            self._call(self._arrange)
        trainer = next(trainer for trainer in self._trainers if number in trainer.configs)
        with self._executor.precision():  # epochs may be trained again
            return self._call(lambda: trainer.model_state(number))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every trial, without the placement."""
        return {"epochs": self._epoch, "trials": dict(self.trial_states())}

    def trial_states(self) -> Iterator[tuple[str, Any]]:
        """Yield the state of each trial; those of one trainer are in memory at a time."""
        self._call(self._arrange)
        for trainer in self._trainers:
            yield from self._call(trainer.state_dict).items()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, and drop the trials that are not in the state; an empty state is the beginning."""
        states = state.get("trials")
        configs = self._all if states is None else {n: c for n, c in self._all.items() if str(n) in states}
        self._begin(configs, epoch=state.get("epochs", 0), states=states or {})
        self._call(self._arrange)

    def _begin(self, configs: Mapping[int, TrialConfig], *, epoch: int, states: States) -> None:
        self.configs, self._epoch, self._trainers, self._states = dict(configs), epoch, [], states
        self._lost = None

    def _arrange(self) -> None:
        """Place the running trials, and rebuild the trainer of each shard that has changed from its trials' states."""
        self._drop_ended()
        while True:
            wanted = self._executor.place(self.configs)
            processes = self._executor.start_processes(len(wanted))
            present = {_shard(trainer): self._executor.process_of(trainer) for trainer in self._trainers}
            planned = _assign(wanted, present, processes)
            staying = {shard for shard, process in planned.items() if present.get(shard) == process}
            self._take_states(but=staying)
            try:
                for shard, process in planned.items():
                    if shard not in staying:
                        self._trainers.append(self._build(shard, process))
            except torch.OutOfMemoryError:
                pass  # until here the traceback keeps tensors alive
            else:
                self._states = {}
                return
            self._take_states(but=())
            self._executor.lower_row_limit(len(shard.numbers))

    def _drop_ended(self) -> None:
        """Have trainers stop the trials that no longer run, and release the trainers that are left with none."""
        for trainer in self._trainers:
            for number in [number for number in trainer.configs if number not in self.configs]:
                trainer.drop(number)
        self._trainers = [trainer for trainer in self._trainers if trainer.configs]

    def _build(self, shard: Shard, process: int) -> ShardTrainer:
        """Build the trainer of a shard, and load the states of its trials."""
        configs = {number: self.configs[number] for number in shard.numbers}
        trainer = self._executor.build_shard(configs, plain=shard.plain, process=process)
        if self._states:
            trainer.load_state_dict({str(number): self._states[str(number)] for number in configs})
        return trainer

    def _take_states(self, *, but: Collection[Shard]) -> None:
        """Keep the states of the trials, and release their trainers; trainers of some shards stay."""
        leaving = [trainer for trainer in self._trainers if _shard(trainer) not in but]
        if self._epoch > 0:
            self._states = {**self._states, **_states_of(leaving)}
        self._trainers = [trainer for trainer in self._trainers if _shard(trainer) in but]

    def _group_lost(self, lost: Sequence[tuple[ShardTrainer, Exception]]) -> GroupLost:
        """Return the error for trainers that raised, and prepare for training the epoch again."""
        full = [len(trainer.configs) for trainer, error in lost if isinstance(error, torch.OutOfMemoryError)]
        if full and max(full) > 1:
            self._executor.lower_row_limit(max(full))
            limit = self._executor.rules.row_limit
            return GroupLost(
                f"memory ran out with {max(full)} trials in a matrix; from now on there are at most {limit}"
            )
        error = lost[0][1]
        if full:
            self._executor.offload()
        if full or isinstance(error, ProcessDied):
            self._count_loss(error)
        if full or (isinstance(error, ProcessDied) and self._losses[self._epoch] == 1):
            return GroupLost(f"{error}; its trials go on from their last checkpoint")
        self._suspects[self._epoch] = [tuple(trainer.configs) for trainer, _ in lost]
        return GroupLost(f"{type(error).__name__}: {error}; finding which trial raises it")

    def _count_loss(self, error: Exception) -> None:
        """Count a process that died, or memory that ran out for one trial, in this epoch.

        Raises:
            PipelineError: It has happened too often.
        """
        self._losses[self._epoch] += 1
        if self._losses[self._epoch] > MAX_LOSSES:
            raise PipelineError(f"{error}, {MAX_LOSSES + 1} times in one epoch; perhaps memory is short")

    def _find_raising(self, *, average: bool) -> dict[int, EpochMetrics]:
        """Find by repeated halving which trials of the suspects raise alone; return each as failed.

        If no trial raises alone, lower the row limit.
        """
        self._arrange()
        self._take_states(but=())
        suspects = [[n for n in numbers if n in self.configs] for numbers in self._suspects.pop(self._epoch)]
        waiting = [half for numbers in suspects if numbers for half in split(numbers, -(-len(numbers) // 2))]
        failed: dict[int, EpochMetrics] = {}
        while waiting:
            numbers = waiting.pop()
            plain = self._executor.why_plain(self.configs[numbers[0]]) is not None
            last = self._executor.start_processes(len(self._all)) - 1  # a suspect may kill the process that trains it
            trainer = self._build(Shard(tuple(numbers), plain=plain), last)
            (outcome,) = self._executor.train([trainer], average=average)
            if isinstance(outcome, dict) or (isinstance(outcome, torch.OutOfMemoryError) and len(numbers) == 1):
                continue
            if len(numbers) == 1:
                failed[numbers[0]] = self._failed(outcome)
            else:
                waiting += split(numbers, -(-len(numbers) // 2))
        if not failed:
            rows = max(map(len, suspects))
            if rows > 1:
                self._executor.lower_row_limit(rows)
        self.configs = {number: config for number, config in self.configs.items() if number not in failed}
        return failed

    def _failed(self, error: Exception) -> EpochMetrics:
        if isinstance(error, ProcessDied):
            return EpochMetrics(epoch=self._epoch, step=0, metrics={}, lr={}, failed=str(error))
        return ended_by(error, epoch=self._epoch, step=0)

    def _call(self, function: Callable[[], Answer]) -> Answer:
        """Call a function that uses trainers.

        Raises:
            GroupLost: A training process has died, now or in an earlier call.
        """
        try:
            if self._lost is None:
                return function()
        except ProcessDied as error:
            self._lost = f"{error}; its trials go on from their last checkpoint"
            self._count_loss(error)
        raise GroupLost(str(self._lost))


def _states_of(trainers: Sequence[ShardTrainer]) -> dict[str, Any]:
    return {number: state for trainer in trainers for number, state in trainer.state_dict().items()}


def _shard(trainer: ShardTrainer) -> Shard:
    return Shard(tuple(trainer.configs), plain=trainer.plain)


def _assign(shards: Sequence[Shard], present: Mapping[Shard, int], processes: int) -> dict[Shard, int]:
    """Assign each shard to a process: to its present process, unless that leaves the fullest process more trials."""
    staying, load = _greedy(shards, {shard: present[shard] for shard in shards if shard in present}, processes)
    moving, least_load = _greedy(shards, {}, processes)
    return staying if load <= least_load else moving


def _greedy(shards: Sequence[Shard], fixed: Mapping[Shard, int], processes: int) -> tuple[dict[Shard, int], int]:
    """Assign the largest shard first, each to the emptiest process; also return the trials of the fullest process."""
    loads = [0] * processes
    for shard, process in fixed.items():
        loads[process] += len(shard.numbers)
    assigned = dict(fixed)
    for shard in sorted(shards, key=lambda shard: -len(shard.numbers)):
        if shard not in assigned:
            assigned[shard] = loads.index(min(loads))
            loads[assigned[shard]] += len(shard.numbers)
    return {shard: assigned[shard] for shard in shards}, max(loads)
