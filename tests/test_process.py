"""Trials that train in several processes: the same numbers, whatever happens to a process."""

from __future__ import annotations

import copy
import multiprocessing.connection
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyModel, tiny_config, tiny_workload
from torch import Tensor

from pipeline.files.locks import LOCK
from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import SGD, Adafactor, Adam, AdamW, Muon, NAdam, RMSprop, Rprop
from pipeline.space.schedules import OneCycle
from pipeline.space.trial import EpochMetrics
from pipeline.training import executor as trainers
from pipeline.training.executor import Trainer
from pipeline.training.process import RemoteTrials, Worker, WorkerEnded, can_fork
from pipeline.training.rows.trainer import FusedTrials
from pipeline.training.shards import TrialParts

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux, and not beside CUDA")
CPU = torch.device("cpu")


def trainer(*, processes: int, dropout: float = 0.0, rows: int | None = None) -> Trainer:
    workload = tiny_workload(lambda: TinyModel(dropout=dropout))
    return Trainer(workload, tiny_config(), device=CPU, rows=rows, processes=processes)


def various() -> dict[int, TrialConfig]:
    """Rows, and trials that train plain."""
    optimizers = [
        SGD(base_lr=0.1),
        Muon(base_lr=0.02),
        AdamW(base_lr=0.01),
        Rprop(base_lr=1e-3),
    ]
    optimizers += [
        NAdam(base_lr=0.01),
        Adafactor(base_lr=0.01),
        RMSprop(base_lr=1e-3),
        Adam(base_lr=0.01),
    ]
    return {2 * number: tiny_config(optimizer, OneCycle()) for number, optimizer in enumerate(optimizers)}


def everything(group: TrialParts, *, epochs: int, dropped: Mapping[int, int]) -> tuple[Any, ...]:
    """Train a group, drop trials after some epochs, and return all that can be asked of it."""
    history = []
    for epoch in range(epochs):
        history.append(group.train_epoch())
        for number in [number for number, after in dropped.items() if after == epoch]:
            group.drop(number)
    left = [number for part in group.parts for number in part.configs]
    return history, group.test(), {number: group.model_state(number) for number in sorted(left)}


def lanes(group: TrialParts) -> list[int]:
    """Return how many trials each process trains."""
    counts: dict[Any, int] = {}
    for part in group.parts:
        worker = part.worker if isinstance(part, RemoteTrials) else None
        counts[worker] = counts.get(worker, 0) + len(part.configs)
    return sorted(counts.values())


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[:2] == other[:2]
    assert one[2].keys() == other[2].keys()
    for number, state in one[2].items():
        assert all(torch.equal(value, other[2][number][name]) for name, value in state.items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("processes", [2, 3, 9])
def test_in_how_many_processes_trials_train_changes_no_result(processes: int, dropout: float) -> None:
    dropped = {0: 0, 6: 1, 8: 1, 4: 1, 14: 2}
    alone = everything(trainer(processes=1, dropout=dropout).build(various()), epochs=5, dropped=dropped)
    group = trainer(processes=processes, dropout=dropout).build(various())
    assert len(lanes(group)) == min(processes, len(various()))
    assert_same(everything(group, epochs=5, dropped=dropped), alone)


def test_trials_are_spread_equally_over_processes_again_when_some_have_ended() -> None:
    group = trainer(processes=2, rows=1).build(various())
    assert lanes(group) == [4, 4]
    remote = [number for part in group.parts if isinstance(part, RemoteTrials) for number in part.configs]
    group.train_epoch()
    for number in remote:
        group.drop(number)
    assert lanes(group) == [4]
    group.train_epoch()
    assert lanes(group) == [2, 2]


def test_a_state_of_several_processes_loads_into_one_and_back() -> None:
    groups = [trainer(processes=processes).build(various()) for processes in (2, 1)]
    whole = [groups[0].train_epoch() for _ in range(2)]
    groups[1].load_state_dict(copy.deepcopy(groups[0].state_dict()))
    following = [groups[0].train_epoch() for _ in range(2)]
    assert [groups[1].train_epoch() for _ in range(2)] == following
    again = trainer(processes=3).build(various())
    again.load_state_dict(copy.deepcopy(groups[1].state_dict()))
    assert again.train_epoch() == groups[0].train_epoch()
    assert whole[0] != whole[1]


@pytest.mark.parametrize("rows", [1, None])
def test_what_a_process_had_that_was_killed_is_trained_anew(rows: int | None) -> None:
    expected = everything(trainer(processes=1).build(various()), epochs=4, dropped={2: 0})
    made = trainer(processes=2, rows=rows)
    group = made.build(various())
    history = [group.train_epoch()]
    group.drop(2)
    history.append(group.train_epoch())
    kill(group)
    with pytest.warns(RuntimeWarning, match=r"^a process that trained trials has ended, .* 9; its trials train anew$"):
        history.append(group.train_epoch())
    history.append(group.train_epoch())
    assert not any(isinstance(part, RemoteTrials) for part in group.parts)
    assert_same((history, group.test(), {n: group.model_state(n) for n in expected[2]}), expected)
    assert len(lanes(made.build(various()))) == 2  # the next group has a new process


def kill(group: TrialParts) -> None:
    for worker in {part.worker for part in group.parts if isinstance(part, RemoteTrials)}:
        os.kill(worker.pid, signal.SIGKILL)


ASKED: dict[str, Callable[[TrialParts], Any]] = {
    "drop": lambda group: [group.drop(number) for number in (0, 14)],  # type: ignore[func-returns-value]
    "test": lambda group: group.test(),
    "state_dict": lambda group: group.state_dict()["trials"].keys(),
    "model_state": lambda group: sorted(group.model_state(0)) + sorted(group.model_state(14)),
    "load_state_dict": lambda group: group.load_state_dict(copy.deepcopy(alone(epochs=2).state_dict())),
}
"""What may be the first thing asked of a process that was killed."""


def alone(*, epochs: int) -> TrialParts:
    group = trainer(processes=1).build(various())
    for _ in range(epochs):
        group.train_epoch()
    return group


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("epochs", [0, 1])
def test_whatever_a_process_is_asked_that_was_killed_another_answers(asked: str, epochs: int) -> None:
    group, whole = trainer(processes=2).build(various()), alone(epochs=epochs)
    for _ in range(epochs):
        group.train_epoch()
    kill(group)
    with pytest.warns(RuntimeWarning, match="its trials train anew"):
        answer = ASKED[asked](group)
    assert answer == ASKED[asked](whole)
    assert group.train_epoch() == whole.train_epoch()


def test_a_trial_that_fails_as_it_trains_anew_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(FusedTrials):
        def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            if 14 in self.configs:
                raise RuntimeError("not again")
            return super().gradients(inputs, targets)

    group = trainer(processes=2).build(various())
    group.train_epoch()
    kill(group)
    monkeypatch.setattr(trainers, "FusedTrials", Fails)
    with pytest.warns(RuntimeWarning, match="its trials train anew"):
        group.drop(12)
    results = group.train_epoch()
    assert results.keys() == various().keys() - {12}
    assert {n: metrics.failed for n, metrics in results.items() if metrics.failed} == {14: "RuntimeError: not again"}
    assert group.train_epoch().keys() == results.keys() - {14}


def test_an_interrupted_question_is_not_answered_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    group = trainer(processes=2).build(various())
    part = next(part for part in group.parts if isinstance(part, RemoteTrials))

    def interrupted(_: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(multiprocessing.connection.Connection, "recv_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        part.test()
    monkeypatch.undo()
    with pytest.warns(RuntimeWarning, match="its trials train anew"):
        assert group.test() == alone(epochs=0).test()


def test_a_search_needs_no_process_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", none_left)
    group = trainer(processes=3).build(various())
    assert lanes(group) == [len(various())]
    assert group.train_epoch() == alone(epochs=0).train_epoch()


def test_a_process_has_the_files_of_its_owner_and_none_of_its_connections(tmp_path: Path) -> None:
    theirs, ours = os.pipe()
    with (tmp_path / "notes").open("w") as file, (tmp_path / LOCK).open("w") as lock:
        noted = file.fileno(), lock.fileno(), ours

        class Writes(Raises):
            def model_state(self, number: int) -> list[bool]:
                return [Path(f"/proc/self/fd/{number}").exists() for number in noted]

        found: Any = Worker(Writes).build({}, fused=False).model_state(0)
        assert found == [True, False, False]
    os.close(ours)
    os.close(theirs)


def test_a_process_that_was_killed_before_it_had_anything_is_not_missed() -> None:
    made = trainer(processes=2)
    kill(made.build(various()))
    group = made.build(various())
    assert group.train_epoch() == alone(epochs=0).train_epoch()


def test_a_worker_that_was_killed_says_so() -> None:
    worker = Worker(Raises)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerEnded, match=r"^a process that trained trials has ended, killed by signal 9$"):
        worker.build({}, fused=False)


class Unlucky(Exception):
    """Cannot be sent to another process: it takes two arguments."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


class Raises:
    """A trainer that raises."""

    configs: Mapping[int, TrialConfig] = {}

    def __init__(self, configs: Mapping[int, TrialConfig]) -> None:
        self.epochs = 0

    def train_epoch(self) -> dict[int, EpochMetrics]:
        """Raise what can be sent, then what cannot."""
        self.epochs += 1
        if self.epochs == 1:
            raise ValueError("no more")
        if self.epochs == 2:
            raise Unlucky("this", "that")
        raise torch.OutOfMemoryError("full")


def test_what_is_raised_in_a_process_is_raised_by_who_asked() -> None:
    trials = Worker(Raises).build({}, fused=False)
    with pytest.raises(ValueError, match=r"^no more$"):
        trials.train_epoch()
    with pytest.raises(RuntimeError, match=r"^Unlucky: this and that$"):
        trials.train_epoch()
    with pytest.raises(torch.OutOfMemoryError, match=r"^full$"):
        trials.train_epoch()


def test_a_process_leaves_signals_to_its_owner() -> None:
    group = trainer(processes=2).build(various())
    (worker,) = {part.worker for part in group.parts if isinstance(part, RemoteTrials)}
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert all(metrics.finished for metrics in group.train_epoch().values())


def test_a_trainer_that_is_closed_leaves_no_process_even_a_stopped_one() -> None:
    made = trainer(processes=3)
    group = made.build(various())
    pids = [part.worker.pid for part in group.parts if isinstance(part, RemoteTrials)]
    os.kill(pids[0], signal.SIGSTOP)
    made.close()
    assert len(set(pids)) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


OWNER = """
import os, sys
import torch
from test_process import trainer, various

torch.set_num_threads(1)
group = trainer(processes=3).build(various())
print(*{part.worker.pid for part in group.parts if hasattr(part, "worker")}, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["at its end", "killed"])
def test_a_process_ends_with_its_owner(how: str, tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, str(script), how]
    # The pipe is at its end when no process is left that could write to it.
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, timeout=120)
    assert len(ended.stdout.split()) == 2
    assert ended.returncode == (-9 if how == "killed" else 0)
