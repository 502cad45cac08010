"""Groups of a worker whose actor dies: the real actor and executor, in this process instead of Ray's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import DOCUMENT, EPOCHS, TRIALS
from tiny import on_device, tiny_workload

from pipeline.errors import PipelineError
from pipeline.space.load import space_from_document
from pipeline.space.trial import TrialState
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.loop import run_group
from pipeline.study.store import Store
from pipeline.study.study import Study
from pipeline.training.contract import GroupLost
from pipeline.training.executor import LocalExecutor
from pipeline.training.ray_actor import Actor, WorkerDied
from pipeline.training.ray_group import MAX_LOSSES
from pipeline.training.ray_worker import RayWorker

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SPACE = space_from_document(DOCUMENT, name="tiny")


def start(rows: int | None = None) -> tuple[LocalExecutor, Mapping[str, Any]]:
    executor = LocalExecutor(on_device(tiny_workload(), device=CPU), SPACE.example(), device=CPU, rows=rows)
    return executor, {"device": "cpu"}


class Local(RayWorker):
    """A worker whose actor is in this process, and dies in an epoch in which `dies` says so of the trials there."""

    def __init__(self, dies: Callable[[int, set[int]], bool] = lambda epoch, numbers: False) -> None:
        super().__init__(start, resources={}, threads=1)
        self.dies = dies
        self.deaths = 0
        self.trained: list[tuple[int, ...]] = []

    def begin(self) -> None:
        if self._actor is None:
            self.generation += 1
            self._actor = Actor(1)
            self._environment, _, self._rules = self._actor.start(self._start)

    def close(self) -> None:
        self._actor = None

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            raise WorkerDied("a worker has ended")
        if method == "ask" and arguments[1] == "train_epoch":
            group = self._actor._groups[arguments[0]]
            self.trained.append(tuple(group.configs))
            if self.dies(group._epoch, set(group.configs)):
                self.deaths += 1
                self.close()
                raise WorkerDied("a worker has ended: its process has died")
        value, error, self._rules = self._actor.call(method, *arguments)
        if error is not None:
            raise error
        return value


def search(root: Path, worker: Local, warnings: list[str]) -> Study:
    store = Store(root)
    study = store.create(SPACE, name="mine", trials=TRIALS, rules=worker.rules)
    proposals = study.next_group(TRIALS)

    class SavesOnce(Checkpoints):
        def due(self) -> bool:
            return len(told) == 1

    told: list[Any] = []
    for trials in run_group(
        worker.build({number: config for number, (config, _) in proposals.items()}),
        proposals,
        study,
        checkpoints=SavesOnce(root / "checkpoints", warn=warnings.append),
        environment=worker.environment,
        on_epoch=told.append,
        interrupted=lambda: False,
        rules=lambda: worker.rules,
    ):
        study.add(*trials)
    assert len(told) == EPOCHS
    return study


def outcomes(study: Study) -> list[tuple[Any, ...]]:
    return [(t.number, t.state, t.reason, t.value, [e.metrics for e in t.epochs], t.environment) for t in study.ended]


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_a_group_goes_on_in_another_actor_to_the_same_numbers(epoch: int, tmp_path: Path) -> None:
    expected = search(tmp_path / "whole", Local(), [])
    worker, warnings = Local(lambda now, _: now == epoch and worker.deaths == 0), list[str]()
    found = search(tmp_path / "killed", worker, warnings)
    assert outcomes(found) == outcomes(expected)
    assert warnings == ["a worker has ended: its process has died; its trials go on from their last checkpoint"]
    assert worker.generation == 2


def test_a_trial_that_kills_every_worker_fails_alone(tmp_path: Path) -> None:
    expected = search(tmp_path / "whole", Local(), [])
    bad = next(trial.number for trial in expected.ended if trial.state is TrialState.COMPLETE)
    worker, warnings = Local(lambda epoch, numbers: epoch == 3 and bad in numbers), list[str]()
    found = search(tmp_path / "poisoned", worker, warnings)
    failed = found.ended[bad]
    assert (failed.state, failed.reason) == (TrialState.FAILED, "a worker has ended: its process has died")
    assert [e.metrics for e in failed.epochs[:3]] == [e.metrics for e in expected.ended[bad].epochs[:3]]
    others = [trial for trial in found.ended if trial.number != bad]
    assert {trial.state for trial in others} <= {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in others:
        metrics = [epoch.metrics for epoch in trial.epochs[:3]]
        assert metrics == [epoch.metrics for epoch in expected.ended[trial.number].epochs[:3]]
    assert worker.trained[-1]
    assert len(warnings) == 2


def test_workers_that_die_again_and_again_end_the_search() -> None:
    class Broken(Local):
        def _call(self, method: str, *arguments: Any) -> Any:
            self.close()
            raise WorkerDied("a worker has ended")

    group = Broken().build({0: SPACE.example(), 1: SPACE.example()})
    for _ in range(MAX_LOSSES):
        with pytest.raises(GroupLost, match=r"^a worker has ended; its trials go on from their last checkpoint$"):
            group.load_state_dict({})
    with pytest.raises(PipelineError, match=r"^a worker has ended, 5 times in one epoch; perhaps memory is short$"):
        group.load_state_dict({})


def test_a_row_limit_that_places_the_trials_alike_breaks_no_placement(tmp_path: Path) -> None:
    def die(epoch: int, numbers: set[int]) -> bool:
        worker._start = lambda: start(rows=TRIALS + 1)  # of the actors to come
        return epoch == 3 and worker.deaths == 0

    worker = Local(die)
    found = search(tmp_path, worker, [])
    assert worker.rules.row_limit == TRIALS + 1
    assert not any("broken" in run for trial in found.ended for run in trial.environment["placement"])
