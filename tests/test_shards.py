"""A trial group split over several trainers: out-of-memory, models that raise, processes that die."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tiny import TinyModel, tiny_config, tiny_workload
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import SGD, Adafactor, Adam, AdamW, Muon, NAdam, RMSprop, Rprop
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import OneCycle
from pipeline.space.trial import EpochMetrics
from pipeline.training import executor as executors
from pipeline.training.contract import GroupLost
from pipeline.training.executor import LocalExecutor
from pipeline.training.process import ProcessDied, RemoteTrials, can_fork
from pipeline.training.rows.trainer import FusedTrials
from pipeline.training.shards import ShardedTrials
from pipeline.workloads.workload import Batch

pytestmark = pytest.mark.usefixtures("one_thread")
needs_fork = pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux, and not beside CUDA")

CPU = torch.device("cpu")
FROZEN_BODY = {"head": ParamGroup(pattern=("head.*",)), "body": ParamGroup(pattern=("*",), lr_ratio=0.0)}


def with_dropout() -> nn.Module:
    return TinyModel(dropout=0.3)


def executor_of(
    build_model: Callable[[], nn.Module] = with_dropout, *, processes: int = 1, rows: int | None = None
) -> LocalExecutor:
    return LocalExecutor(tiny_workload(build_model), tiny_config(), device=CPU, rows=rows, processes=processes)


def build(executor: LocalExecutor, configs: Mapping[int, TrialConfig]) -> ShardedTrials:
    group = executor.build(configs)
    assert isinstance(group, ShardedTrials)
    return group


def various() -> dict[int, TrialConfig]:
    """Return rows, some of which freeze the body, and plain trials."""
    optimizers = [SGD(base_lr=0.1), Muon(base_lr=0.02), AdamW(base_lr=0.01), Rprop(base_lr=1e-3)]
    optimizers += [NAdam(base_lr=0.01), Adafactor(base_lr=0.01), RMSprop(base_lr=1e-3), Adam(base_lr=0.01)]
    configs = {2 * number: tiny_config(optimizer, OneCycle()) for number, optimizer in enumerate(optimizers[:3])}
    configs |= {6: tiny_config(optimizers[3])}
    configs |= {8 + 2 * number: tiny_config(optimizer, OneCycle()) for number, optimizer in enumerate(optimizers[4:])}
    return {**configs, 3: tiny_config(Adam(base_lr=0.1), param_groups=FROZEN_BODY)}


def similar(count: int) -> dict[int, TrialConfig]:
    return {number: tiny_config(Adam(base_lr=0.01 * (number + 1))) for number in range(count)}


def train_and_drop(group: ShardedTrials, *, dropped: Mapping[int, int], epochs: int = 4) -> tuple[Any, ...]:
    """Train a group, drop trials after some epochs, and return metrics, test metrics and model states."""
    history = []
    for epoch in range(epochs):
        history.append(group.train_epoch())
        for number in [number for number, after in dropped.items() if after == epoch]:
            group.drop(number)
    tests = group.test()
    return history, tests, {number: group.model_state(number) for number in tests}


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[:2] == other[:2]
    assert one[2].keys() == other[2].keys()
    for number, state in one[2].items():
        assert [name for name, value in state.items() if not torch.equal(value, other[2][number][name])] == []


def test_the_same_group_twice_is_the_same_to_the_bit() -> None:
    executor = executor_of(processes=2)
    dropped = {0: 0, 8: 1, 14: 2}
    assert_same(*(train_and_drop(build(executor, various()), dropped=dropped) for _ in range(2)))
    executor.close()


def test_rows_move_to_other_matrices_when_trials_leave() -> None:
    executor = executor_of(rows=3)
    group = build(executor, similar(8))
    assert executor.describe(group.configs) == "rows 2 + 3 + 3"
    group.train_epoch()
    for number in (1, 2, 3, 6, 7):
        group.drop(number)
    assert executor.describe(group.configs) == "rows 3"
    results = group.train_epoch()
    places = {number: metrics.placement.place for number, metrics in results.items() if metrics.placement}
    assert places == {0: 0, 4: 1, 5: 2}


@needs_fork
def test_which_process_trains_a_shard_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = {0: 0, 8: 1, 14: 2}
    executor = executor_of(processes=3)
    in_processes = train_and_drop(build(executor, various()), dropped=dropped)
    executor.close()

    def none_left() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", none_left)
    group = build(executor_of(processes=3), various())
    assert_same(train_and_drop(group, dropped=dropped), in_processes)


@needs_fork
def test_a_group_goes_on_from_a_state_to_the_bit_in_another_executor() -> None:
    executor = executor_of(processes=2, rows=3)
    whole = build(executor, various())
    whole.train_epoch()
    whole.drop(8)
    state = copy.deepcopy(whole.state_dict())
    expected = [whole.train_epoch() for _ in range(3)]
    other = executor_of(processes=1)
    other.adopt(executor.rules)
    resumed = build(other, various())
    resumed.load_state_dict(state)
    assert [resumed.train_epoch() for _ in range(3)] == expected
    executor.close()
    other.close()


def test_a_group_that_is_loaded_without_a_state_begins_anew() -> None:
    group = build(executor_of(), various())
    first = group.train_epoch()
    group.drop(0)
    group.train_epoch()
    group.load_state_dict({})
    assert group.train_epoch() == first


class Memory:
    """The pretended memory of a device, in rows."""

    def __init__(self) -> None:
        self.rows = 1_000


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    size = Memory()

    class Limited(FusedTrials):
        def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
            if len(self.configs) > size.rows:
                raise torch.OutOfMemoryError(f"{len(self.configs)} rows do not fit")
            return super().gradients(batch)

    monkeypatch.setattr(executors, "FusedTrials", Limited)
    return size


def test_memory_that_runs_out_halves_the_row_limit_and_the_group_goes_on_from_its_state(memory: Memory) -> None:
    executor = executor_of(rows=8)
    group = build(executor, similar(7))
    group.train_epoch()
    state = copy.deepcopy(group.state_dict())
    group.train_epoch()
    memory.rows = 4
    with pytest.raises(GroupLost, match=r"memory ran out with 7 trials in a matrix; from now on there are at most 4$"):
        group.train_epoch()
    assert executor.rules.row_limit == 4
    group.load_state_dict(copy.deepcopy(state))
    placements = [metrics.placement for metrics in group.train_epoch().values()]
    assert [placement.rows for placement in placements if placement] == [3, 3, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("times", [1, 4])
def test_memory_that_runs_out_for_one_trial_is_tried_again_and_no_trial_fails(memory: Memory, times: int) -> None:
    group = build(executor_of(rows=1), various())
    first = group.train_epoch()
    state = copy.deepcopy(group.state_dict())
    expected = group.train_epoch()
    group.load_state_dict(copy.deepcopy(state))
    memory.rows = 0
    for _ in range(times):
        with pytest.raises(GroupLost, match=r"^1 rows do not fit; its trials go on from their last checkpoint$"):
            group.train_epoch()
        group.load_state_dict(copy.deepcopy(state))
    memory.rows = 1
    assert group.train_epoch() == expected
    assert first.keys() == expected.keys()


def test_memory_that_is_too_small_for_one_trial_ends_the_search(memory: Memory) -> None:
    group = build(executor_of(rows=1), various())
    memory.rows = 0
    for _ in range(4):
        with pytest.raises(GroupLost, match="1 rows do not fit"):
            group.train_epoch()
        group.load_state_dict({})
    with pytest.raises(PipelineError, match=r"^1 rows do not fit, 5 times in one epoch; perhaps memory is short$"):
        group.train_epoch()


def test_a_cpu_that_cannot_allocate_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(FusedTrials):
        def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
            if len(self.configs) > 3:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
            return super().gradients(batch)

    monkeypatch.setattr(executors, "FusedTrials", Large)
    executor = executor_of()
    group = build(executor, similar(6))
    with pytest.raises(GroupLost, match=r"^memory ran out with 6 trials in a matrix; from now on there are at most 3$"):
        group.train_epoch()
    group.load_state_dict({})
    assert sorted(group.train_epoch()) == list(range(6))


def test_a_row_limit_of_one_that_is_too_many_is_an_error() -> None:
    executor = executor_of()
    with pytest.raises(PipelineError, match=r"^cpu: no memory is left for even one trial$"):
        executor.lower_row_limit(1)


class Poisoned(FusedTrials):
    """Raises in an epoch after the first while one of the bad trials is among the rows."""

    bad: frozenset[int] = frozenset()
    after = 1

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Raise what a model would."""
        if self.bad & self.configs.keys() and self._epoch >= self.after:
            raise ValueError(f"poison in {len(self.configs)}")
        return super().gradients(batch)


@pytest.mark.parametrize("bad", [{3}, {0, 5}, set(range(6))])
def test_rows_that_raise_are_found_by_halving_and_end_alone(bad: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "FusedTrials", Poisoned)
    monkeypatch.setattr(Poisoned, "bad", frozenset(bad))
    group = build(executor_of(), similar(6))
    group.train_epoch()
    state = copy.deepcopy(group.state_dict())
    with pytest.raises(GroupLost, match=r"^ValueError: poison in 6; finding which trial raises it$"):
        group.train_epoch()
    group.load_state_dict(copy.deepcopy(state))
    results = group.train_epoch()
    failed = {number: metrics.failed.split(", in")[0] for number, metrics in results.items() if metrics.failed}
    assert failed == dict.fromkeys(bad, "ValueError: poison in 1")
    left = sorted(set(range(6)) - bad)
    rows = [results[number].placement.rows for number in left]  # type: ignore[union-attr]
    assert rows == [len(left)] * len(left)
    assert sorted(group.train_epoch()) == left


def test_rows_that_raise_only_together_are_fewer_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crowded(FusedTrials):
        def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
            if len(self.configs) > 3:
                raise RuntimeError("too many")
            return super().gradients(batch)

    monkeypatch.setattr(executors, "FusedTrials", Crowded)
    executor = executor_of()
    group = build(executor, similar(6))
    with pytest.raises(GroupLost, match=r"^RuntimeError: too many"):
        group.train_epoch()
    group.load_state_dict({})
    assert sorted(group.train_epoch()) == list(range(6))
    assert executor.rules.row_limit == 3


def test_a_lone_row_that_raises_fails_and_no_group_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "FusedTrials", Poisoned)
    monkeypatch.setattr(Poisoned, "bad", frozenset({1}))
    group = build(executor_of(rows=1), similar(3))
    group.train_epoch()
    reasons = [(metrics.failed or "").split(", in")[0] for metrics in group.train_epoch().values()]
    assert reasons == ["", "ValueError: poison in 1", ""]
    assert sorted(group.train_epoch()) == [0, 2]


def kill(group: ShardedTrials) -> None:
    for process in {trainer.process for trainer in group._trainers if isinstance(trainer, RemoteTrials)}:
        os.kill(process.pid, signal.SIGKILL)


@needs_fork
@pytest.mark.parametrize("rows", [1, None])
def test_a_process_that_died_is_replaced_and_its_group_repeats_to_the_bit(rows: int | None) -> None:
    executor = executor_of(processes=2, rows=rows)
    expected = train_and_drop(build(executor, various()), dropped={2: 0})
    group = build(executor, various())
    history = [group.train_epoch()]
    group.drop(2)
    state = copy.deepcopy(group.state_dict())
    group.train_epoch()
    kill(group)
    with pytest.raises(GroupLost, match=r"^a process that trained trials has ended, killed by signal 9; its trials"):
        group.train_epoch()
    group.load_state_dict(copy.deepcopy(state))
    history += [group.train_epoch() for _ in range(3)]
    assert any(isinstance(trainer, RemoteTrials) for trainer in group._trainers)
    tests = group.test()
    assert_same((history, tests, {number: group.model_state(number) for number in tests}), expected)
    executor.close()


ASKED: dict[str, Callable[[ShardedTrials], Any]] = {
    "train_epoch": lambda group: group.train_epoch(),
    "test": lambda group: group.test(),
    "state_dict": lambda group: group.state_dict(),
    "model_state": lambda group: [group.model_state(number) for number in various()],
}


@needs_fork
@pytest.mark.parametrize("asked", ASKED)
def test_whatever_is_asked_of_a_process_that_died_the_group_is_lost_and_can_be_loaded(asked: str) -> None:
    executor = executor_of(processes=2)
    group = build(executor, various())
    first = group.train_epoch()
    kill(group)
    with pytest.raises(GroupLost, match="its trials go on from their last checkpoint"):
        ASKED[asked](group)
    group.load_state_dict({})
    assert group.train_epoch() == first
    executor.close()


@needs_fork
def test_a_trial_whose_process_dies_each_time_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()

    class Deadly(FusedTrials):
        def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
            if 7 in self.configs and self._epoch == 1 and os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().gradients(batch)

    monkeypatch.setattr(executors, "FusedTrials", Deadly)
    executor = executor_of(processes=2)
    group = build(executor, similar(8))
    group.train_epoch()
    state = copy.deepcopy(group.state_dict())
    results: Mapping[int, EpochMetrics] = {}
    for words in ("its trials go on from their last checkpoint", "finding which trial raises it"):
        with pytest.raises(GroupLost, match=words):
            group.train_epoch()
        group.load_state_dict(copy.deepcopy(state))
    results = group.train_epoch()
    failed = {number: metrics.failed for number, metrics in results.items() if metrics.failed}
    assert failed == {7: "a process that trained trials has ended, killed by signal 9"}
    assert sorted(group.train_epoch()) == list(range(7))
    executor.close()


def test_processes_that_keep_dying_though_no_trial_alone_does_it_end_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dies(self: LocalExecutor, trainers: Sequence[Any], *, average: bool) -> list[Exception]:
        return [ProcessDied("a process that trained trials has ended") for _ in trainers]

    def finds_nothing(self: ShardedTrials, *, average: bool) -> dict[int, EpochMetrics]:
        self._suspects.clear()
        return {}

    monkeypatch.setattr(LocalExecutor, "train", dies)
    monkeypatch.setattr(ShardedTrials, "_find_raising", finds_nothing)
    group = build(executor_of(), similar(2))
    for _ in range(4):
        with pytest.raises(GroupLost, match="a process that trained trials has ended"):
            group.train_epoch()
        group.load_state_dict({})
    with pytest.raises(PipelineError, match=r"has ended, 5 times in one epoch; perhaps memory is short$"):
        group.train_epoch()
