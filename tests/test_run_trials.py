"""Several groups at a time: threads that train stand-ins, a real study, real checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_study import Curves, epoch_metrics, epoch_of, outcomes, space_with
from tiny import RULES

from pipeline.app.run_trials import FOLDER, Worker, run_trials
from pipeline.errors import DeviceError
from pipeline.space.config import TrialConfig
from pipeline.space.placement import Placement, PlacementRules
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.samplers import propose
from pipeline.study.store import Store
from pipeline.study.study import Study

TRIALS = 18
WITHOUT_LOSS = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.DIVERGED]


class Executor:
    """Builds groups whose metrics are a formula; calls a function before each epoch of a group."""

    rules = RULES

    def __init__(self, before_epoch: Callable[[Sequence[int]], None] = lambda _: None) -> None:
        self.before_epoch = before_epoch
        self.trained: list[tuple[int, int]] = []
        """Number of a trial and epoch, as they were trained."""

    def build(self, configs: Mapping[int, TrialConfig], *, placement: Sequence[Placement] | None = None) -> Group:
        return Group(self, configs)

    def adopt(self, rules: PlacementRules) -> None:
        """Place nothing."""

    def close(self) -> None:
        """Have nothing to close."""


class Group(Curves):
    def __init__(self, executor: Executor, configs: Mapping[int, TrialConfig]) -> None:
        super().__init__({number: (config, {}) for number, config in configs.items()})
        self._executor = executor

    def train_epoch(self, *, average: bool = False) -> dict[int, EpochMetrics]:
        self._executor.before_epoch(sorted(self._configs))
        results = super().train_epoch(average=average)
        self._executor.trained += [(number, self._epoch) for number in results]
        return results

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch = state.get("epochs", 0)


class Told:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.ended: list[int] = []

    def begin(self, trial: object) -> None:
        """Take a trial."""

    def epoch(self, metrics: object) -> None:
        """Take an epoch."""

    def end(self, trial: EndedTrial) -> None:
        self.ended.append(trial.number)


def new_study(root: Path, **changes: Any) -> Study:
    return Store(root).create(space_with(**changes), name="mine", trials=TRIALS, rules=RULES)


def search(root: Path, study: Study, *executors: Executor, told: Told | None = None, trials: int = TRIALS) -> None:
    run_trials(
        study,
        trials,
        [Worker(executor, lambda: {"device": "curves"}) for executor in executors],
        checkpoints=Checkpoints(root / "checkpoints", warn=pytest.fail, share=1e-9),  # else none is due
        told=[told or Told()],
        interrupted=lambda: False,
    )


def test_several_workers_train_every_trial_once_and_the_study_has_them_in_number_order(tmp_path: Path) -> None:
    study, executors = new_study(tmp_path), [Executor() for _ in range(3)]
    search(tmp_path, study, *executors)
    assert [trial.number for trial in study.ended] == list(range(TRIALS))
    trained = [epoch for executor in executors for epoch in executor.trained]
    assert len(trained) == len(set(trained))
    assert {trial.state for trial in study.ended} <= set(WITHOUT_LOSS)
    for trial in study.ended:
        assert list(trial.epochs) == [epoch_of(trial.config, epoch.epoch) for epoch in trial.epochs]
    reopened = Store(tmp_path).open("mine")
    assert outcomes(reopened) == outcomes(study)
    assert len({trial.config.optimizer.base_lr for trial in study.ended}) == TRIALS
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_groups_become_smaller_towards_the_end(tmp_path: Path) -> None:
    study = new_study(tmp_path, sampler={"name": "random", "group_size": 5})
    sizes = []
    while group := study.take_group(40, workers=4):
        sizes.append(len(group))
    assert sizes == [5, 5, 4, 4, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1]


class Killed(BaseException):
    pass


def search_killed(root: Path, study: Study) -> tuple[Told, list[Executor]]:
    """Search with two workers until one has ended its second group, while the other one is in its first epoch."""
    told, second_ended = Told(), threading.Event()

    def hold(numbers: Sequence[int]) -> None:
        if 0 in numbers:
            assert second_ended.wait(60)
            raise Killed

    def watch(numbers: Sequence[int]) -> None:
        if 0 in numbers:
            hold(numbers)
        elif min(numbers) >= 6:  # the groups before have ended
            second_ended.set()

    executors = [Executor(watch), Executor(watch)]
    with pytest.raises(Killed):
        search(root, study, *executors, told=told)
    return told, executors


@pytest.mark.parametrize("workers", [1, 2])
def test_trials_that_ended_before_lower_numbers_survive_a_kill_in_a_checkpoint(workers: int, tmp_path: Path) -> None:
    study = new_study(tmp_path)
    told, before = search_killed(tmp_path, study)
    assert study.ended == []  # trial 0 has not ended
    assert {3, 4, 5} <= set(told.ended)
    assert (tmp_path / "checkpoints" / f"{FOLDER}000003").is_dir()
    asked = [params for group in study._groups for params in group.params or ()]
    trained = {epoch for executor in before for epoch in executor.trained if epoch[0] in (3, 4, 5)}

    reopened, after = Store(tmp_path).open("mine"), [Executor() for _ in range(workers)]
    search(tmp_path, reopened, *after)
    assert [trial.number for trial in reopened.ended] == list(range(TRIALS))
    assert [trial.params for trial in reopened.ended][: len(asked)] == asked
    assert not trained & {epoch for executor in after for epoch in executor.trained}
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_an_error_of_one_worker_is_raised_and_the_group_of_the_other_is_in_a_checkpoint(tmp_path: Path) -> None:
    study, begun = new_study(tmp_path), threading.Barrier(2, timeout=60)

    def fail(numbers: Sequence[int]) -> None:
        if 0 in numbers:
            begun.wait()
            raise DeviceError("the device failed")
        if not any(executor.trained for executor in executors):
            begun.wait()

    executors = [Executor(fail), Executor(fail)]
    with pytest.raises(DeviceError, match=r"^the device failed$"):
        search(tmp_path, study, *executors)
    trained = {epoch for executor in executors for epoch in executor.trained}
    assert {3, 4, 5} <= {number for number, _ in trained}
    after = Executor(), Executor()
    search(tmp_path, Store(tmp_path).open("mine"), *after)
    assert not trained & {epoch for executor in after for epoch in executor.trained}


def test_a_verdict_counts_trials_of_other_groups_that_run_and_a_resumed_search_follows_it(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    first, second = (study.take_group(TRIALS, workers=3) for _ in range(2))

    def told(study: Study, numbers: Mapping[int, Any], accuracies: Sequence[float]) -> dict[int, list[EpochMetrics]]:
        return {
            n: [epoch_metrics(epoch, accuracy, 0.5) for epoch in (1, 2)]
            for n, accuracy in zip(numbers, accuracies, strict=True)
        }

    running = told(study, second, [0.9, 0.8, 0.7])
    study._running |= running
    judged = told(study, first, [0.75, 0.3, 0.2])
    assert study.stops(2, judged) == {1, 2}  # three of six go on
    reopened = Store(tmp_path).open("mine")  # in which the second group has not begun
    assert reopened.take_group(TRIALS, workers=3) == first
    assert reopened.stops(2, judged) == {1, 2}
    study._running |= told(study, first, [0.75, 0.3, 0.2])
    assert study.stops(2, running) == {5}  # three of six


def test_a_sampler_proposes_others_than_those_that_run(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    search(tmp_path, study, Executor(), trials=9)
    ended = study._known
    alone = propose(study.space, ended, first=9, size=1)
    beside = propose(study.space, ended, first=9, size=1, running=[alone[9][1]] * 3)
    assert alone != beside


def test_one_worker_after_several_goes_on_with_one_group_at_a_time(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    search(tmp_path, study, Executor(), Executor(), trials=9)
    whole = new_study(tmp_path / "whole")
    search(tmp_path / "whole", whole, Executor())
    search(tmp_path, study, Executor())
    assert len(study.ended) == TRIALS
    assert [study.is_recorded(number) for number in range(TRIALS)] == [True] * 9 + [False] * 9
    assert not any(whole.is_recorded(number) for number in range(TRIALS))
