from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import RULES, tiny_workload

from pipeline.app.answer import Answer, versus
from pipeline.app.run_confirmation import announcement, evaluated_on_test, run_confirmation
from pipeline.app.run_trials import Worker
from pipeline.errors import StorageError
from pipeline.files.signals import Interrupts
from pipeline.space.config import TrialConfig
from pipeline.space.confirm import Confirm, Size, fitting
from pipeline.space.load import space_from_document
from pipeline.space.optimizers import SGD, Adam
from pipeline.space.placement import Placement
from pipeline.space.schedules import Constant, Step
from pipeline.space.search_space import Objective, SearchSpace
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics, TrialState
from pipeline.study.candidates import plan
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.confirmation import Confirmation
from pipeline.study.loop import run_group
from pipeline.study.store import Store
from pipeline.study.study import Study
from pipeline.training.executor import LocalExecutor
from pipeline.workloads.workload import Metric, Split

EPOCHS = 4
DOCUMENT: dict[str, Any] = {
    "workload": {"name": "digits", "model": "mlp"},
    "epochs": EPOCHS,
    "batch_size": 8,
    "clip_grad_norm": 5.0,
    "optimizer": {"sgd": {"base_lr": {"low": 1e-3, "high": 1.0, "log": True}}},
    "scheduler": {"step": {"step_size": {"low": 1, "high": 4}}},
    "param_groups": {
        "head": {"pattern": "head.*", "lr_ratio": {"low": 0.1, "high": 10.0, "log": True}},
        "body": {"pattern": "*"},
    },
    "confirm": {"share": 1.0},
}
TWO_SEEDS = {"share": 1.0, "finalists": 2, "seeds": 2}
RATES = (0.03, 0.1, 0.3, 0.5)
LATE = {0.03: [0.5, 0.6], 0.1: [0.6, 0.8], 0.3: [0.7, 0.7], 0.5: [0.7, 0.7]}
"""Rate of each trial to its accuracy after the third and the fourth epoch."""


def space_with(**changes: Any) -> SearchSpace:
    return space_from_document({**DOCUMENT, **changes}, name="small")


def ended_trial(number: int, rate: float, space: SearchSpace, *, losses: float = 0.5) -> EndedTrial:
    example = space.example()
    config = dataclasses.replace(example, optimizer=SGD(base_lr=rate, momentum=0.0))
    accuracies = [0.1, 0.2, *LATE[rate]]
    epochs = tuple(
        EpochMetrics(
            epoch=epoch,
            step=5 * epoch,
            metrics={"train/loss": losses, "val/loss": losses, "val/accuracy": accuracy},
            lr={},
        )
        for epoch, accuracy in enumerate(accuracies, 1)
    )
    return EndedTrial(
        number=number,
        config=config,
        params={"sgd.base_lr": rate},
        state=TrialState.COMPLETE,
        objective=Objective(),
        reason=None,
        value=accuracies[-1],
        epochs=epochs,
        started=1_700_000_000.0,
        ended=1_700_000_001.0,
        environment={"placement": []},
    )


def searched(store: Store, space: SearchSpace, *, name: str = "s", rates: tuple[float, ...] = RATES) -> Study:
    study = store.create(space, name=name, trials=len(rates), rules=RULES)
    for number, rate in enumerate(rates):
        study.add(ended_trial(number, rate, space))
    return study


def planned(study: Study) -> Confirmation:
    return Confirmation(study, plan(study, study.space.confirm))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.mark.parametrize(
    ("searched", "size"),
    [
        (10_000, Size(finalists=3, baselines=2, seeds=3)),
        (610, Size(finalists=3, baselines=2, seeds=3)),  # 300 of 910 epochs
        (608, Size(finalists=3, baselines=1, seeds=3)),
        (400, Size(finalists=2, baselines=1, seeds=3)),
        (300, Size(finalists=2, baselines=1, seeds=2)),
        (243, None),
    ],
)
def test_a_confirmation_is_made_smaller_until_it_fits_into_its_share(searched: int, size: Size | None) -> None:
    found = fitting(Confirm(), complete=11, searched=searched, epochs=20)
    assert found == size
    if size is not None:
        assert size.runs * 20 <= 0.33 * (searched + size.runs * 20)


def test_a_confirmation_has_no_more_finalists_than_complete_trials_and_no_limit_at_a_share_of_1() -> None:
    assert fitting(Confirm(), complete=1, searched=10_000, epochs=20) == Size(finalists=1, baselines=2, seeds=3)
    assert fitting(Confirm(share=1, baselines=False), complete=9, searched=1, epochs=20) == Size(
        finalists=3, baselines=0, seeds=3
    )


def test_the_cost_is_said_before_a_search_that_can_probably_afford_a_confirmation() -> None:
    space = space_with(epochs=20, pruner={"name": "median"})
    assert announcement(Confirm(), space, trials=50) == (
        "then          about 4 strategies train again with 3 fresh seeds: 240 epochs, at most 33 % of all"
    )
    few = "then          no confirmation, if as many trials are pruned as usual: too few trials for a share of 33 %"
    assert announcement(Confirm(), space, trials=20) == few
    assert announcement(Confirm(), space_with(epochs=20), trials=20).startswith("then          about 3 strategies")
    assert announcement(Confirm(share=0), space, trials=50) == ""


def test_finalists_are_the_best_by_their_late_epochs_and_have_no_config_twice(store: Store) -> None:
    space = space_with(epochs=20)
    assert space.objective.late_score(ended_trial(0, 0.1, space).epochs) == (-0.8, 0.5)  # 15 % of 4 epochs is one
    many = ended_trial(0, 0.1, space).epochs * 5
    assert space.objective.late_score(many) == pytest.approx((-(0.2 + 0.6 + 0.8) / 3, 0.5))
    best = Objective(of="best").late_score(many)
    assert best == (-0.8, 0.5)
    study = searched(store, space_with(), rates=(0.03, 0.1, 0.1, 0.3, 0.5))
    labels = [candidate.label for candidate in planned(study).candidates]
    assert labels == ["#1", "#3", "#4", "Adam's default", "SGD with StepLR"]


def test_baselines_have_the_settings_of_the_space_and_one_rate_for_all_groups(store: Store) -> None:
    groups = {"head": {"pattern": "head.*", "lr_ratio": 3.0}, "body": {"pattern": "*", "lr_ratio": 0.0}}
    study = searched(store, space_with(param_groups=groups))
    *_, adam, sgd = planned(study).candidates
    assert (adam.config.optimizer, adam.config.scheduler) == (Adam(base_lr=1e-3), Constant())
    assert (sgd.config.optimizer, sgd.config.scheduler) == (
        SGD(base_lr=0.1, momentum=0.9),
        Step(step_size=2, gamma=0.1),
    )
    assert [group.lr_ratio for group in adam.config.param_groups.values()] == [1.0, 0.0]  # frozen by the space
    assert (adam.config.clip_grad_norm, adam.config.batch_size, adam.trial) == (5.0, 8, None)


def test_a_baseline_of_layers_trains_each_at_one_rate(store: Store) -> None:
    layers = {"layers": ["hidden.*", "head.*"], "layer_decay": 0.5}
    study = searched(store, space_with(param_groups={"all": layers}))
    *_, adam, _ = planned(study).candidates
    assert [group.lr_ratio for group in adam.config.torch_groups().values()] == [1.0, 1.0]


def test_a_metric_that_is_undefined_on_the_test_split_leaves_the_runs_without_a_test(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def near(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(targets) == 3:
            raise ValueError("one class only")
        return (outputs.argmax(1) == targets).float().mean()

    workload = tiny_workload()
    assert isinstance(workload.test, Split)
    short = Split(*(part[:3] for part in (workload.test.inputs, workload.test.targets)))
    workload = dataclasses.replace(workload, test=short, metrics={"accuracy": Metric(near, "maximize")})
    space = space_with(epochs=1, scheduler={"constant": {}})
    executor = LocalExecutor(workload, space.example(), device=torch.device("cpu"))
    group = executor.build({0: space.example()})
    assert evaluated_on_test(group, group.train_epoch(), space, executor) == {}
    assert "the test split could not be evaluated: one class only" in capsys.readouterr().err


CHANGES: dict[str, Any] = {
    "another config": lambda run: run["config"].update(seed=77),
    "another label": lambda run: run.update(confirms="\x1b]0;x\x07"),
    "a number of text": lambda run: run.update(number="1"),
    "a score of text": lambda run: run["history"].update({"val/loss": ["x"] * EPOCHS}),
    "a test that is a list": lambda run: run.update(test=[1.0]),
    "no placement": lambda run: run.update(environment={}),
    "a time beyond the calendar": lambda run: run.update(ended=1e300),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.usefixtures("one_thread")
def test_a_stored_run_that_another_program_has_changed_is_refused(store: Store, change: Any) -> None:
    study = searched(store, space_with(confirm=TWO_SEEDS))
    (number, (config, _)), *_ = planned(study).next_group().items()
    confirmation = planned(study)
    run = run_of(confirmation, "#1", 1, 0.7, number)
    assert run.config == config
    confirmation.add(run, test={"test/loss": 1.0})
    (stored,) = study.notes("pipeline.confirmation.run.")
    change(stored)
    study.note(f"pipeline.confirmation.run.{number:07}", stored, doing="changing a run")
    with pytest.raises(StorageError, match=r"the confirmation of study s is not as a search stored it: .*; restore it"):
        planned(study)


@pytest.mark.parametrize("trial", [1, 99])
def test_a_stored_answer_that_names_another_trial_is_refused(store: Store, trial: int) -> None:
    study = searched(store, space_with(confirm=TWO_SEEDS))
    confirmation = planned(study)
    confirmation.keep()
    (kept,) = study.notes("pipeline.confirmation.complete")
    kept["candidates"][1].update(trial=trial, label=f"#{trial}")
    study.note("pipeline.confirmation.complete", kept, doing="changing the answer")
    with pytest.raises(StorageError, match="the confirmation of study s is not as a search stored it"):
        Answer.of(study)


def confirm(study: Study, folder: Path, *, epochs: int | None = None, test: Split | None = None) -> Confirmation:
    """Confirm a study on the tiny problem, for a number of epochs; None: to its end."""
    workload = tiny_workload() if test is None else dataclasses.replace(tiny_workload(), test=test)
    confirmation, trained = planned(study), list[Mapping[int, EpochMetrics]]()
    executor = LocalExecutor(workload, study.space.example(), device=torch.device("cpu"))
    checkpoints = Checkpoints(folder / study.name, warn=pytest.fail)
    while len(trained) != epochs and (proposals := confirmation.next_group()):
        group = executor.build({number: config for number, (config, _) in proposals.items()})
        for runs in run_group(
            group,
            proposals,
            confirmation,
            checkpoints=checkpoints,
            environment={},
            on_epoch=trained.append,
            interrupted=lambda: len(trained) == epochs,
            rules=lambda: executor.rules,
        ):
            for run in runs:
                confirmation.add(confirmation.marked(run), test={"test/loss": 1.0})
    if confirmation.complete:
        confirmation.keep()
    return confirmation


def numbers_of(confirmation: Confirmation) -> list[tuple[Any, ...]]:
    runs = [(run.confirms, run.config, run.value, run.metrics, run.environment) for run in confirmation.runs]
    return [*runs, *((found.candidate.label, found.mean, found.std) for found in confirmation.table)]


@pytest.mark.usefixtures("one_thread")
def test_a_confirmation_that_is_stopped_after_any_epoch_goes_on_to_the_same_numbers(store: Store) -> None:
    space = space_with(confirm={"share": 1.0, "finalists": 2, "seeds": 2, "baselines": False})
    whole = confirm(searched(store, space, name="whole"), store.root)
    assert whole.complete
    assert len(whole.runs) == 4
    for stop in (1, EPOCHS, EPOCHS + 1):
        study = searched(store, space, name=f"stopped-{stop}")
        assert not confirm(study, store.root, epochs=stop).complete
        went_on = confirm(store.open(study.name), store.root)
        assert numbers_of(went_on) == numbers_of(whole)
        assert went_on.test() == {"test/loss": 1.0}


class Beside(LocalExecutor):
    """Trains an epoch when another worker does too; one after the other, since both use one process's random state."""

    turn = threading.Lock()

    def __init__(self, study: Study, barrier: threading.Barrier, trained: list[int]) -> None:
        super().__init__(tiny_workload(), study.space.example(), device=torch.device("cpu"))
        self.barrier, self.trained = barrier, trained

    def build(self, configs: Mapping[int, TrialConfig], *, placement: Sequence[Placement] | None = None) -> Any:
        group = super().build(configs, placement=placement)
        train = group.train_epoch

        def train_epoch(*, average: bool = False) -> Mapping[int, EpochMetrics]:
            self.trained.append(min(configs))
            self.barrier.wait(timeout=60)
            with self.turn:
                return train(average=average)

        group.train_epoch = train_epoch  # type: ignore[method-assign]
        return group


class Silent:
    """A tracker that records nothing."""

    def begin(self, run: object) -> None:
        """Take a run."""

    epoch = end = begin


def confirm_beside(study: Study, folder: Path, *, workers: int, epochs: int | None = None) -> tuple[Confirmation, int]:
    """Confirm a study with workers; return the number of epochs of groups too, after which to stop."""
    trained = list[int]()
    barrier, confirmation = threading.Barrier(workers), planned(study)
    executors = [Beside(study, barrier, trained) for _ in range(workers)]
    interrupts = Interrupts(None)
    interrupts.asked = lambda: len(trained) == epochs  # type: ignore[method-assign]
    tracker: Any = Silent()
    run_confirmation(
        confirmation,
        executors[0],
        [Worker(executor, dict) for executor in executors],
        Checkpoints(folder / study.name, warn=pytest.fail),
        tracker,
        interrupts,
        Console(file=io.StringIO()),
    )
    return confirmation, len(trained)


@pytest.mark.usefixtures("one_thread")
def test_several_workers_confirm_a_seed_each_and_one_goes_on_after_a_stop_to_the_same_numbers(store: Store) -> None:
    space = space_with(confirm={"share": 1.0, "finalists": 2, "seeds": 2, "baselines": False})
    whole = confirm(searched(store, space, name="whole"), store.root)
    together, trained = confirm_beside(searched(store, space, name="together"), store.root, workers=2)
    assert (together.complete, trained) == (True, 2 * EPOCHS)
    assert numbers_of(together) == numbers_of(whole)
    stopped, before = confirm_beside(searched(store, space, name="stopped"), store.root, workers=2, epochs=4)
    assert (len(stopped.runs), before) == (0, 4)
    went_on, after = confirm_beside(store.open("stopped"), store.root, workers=1)
    assert before + after == 2 * EPOCHS
    assert numbers_of(went_on) == numbers_of(whole)
    assert [path for name in ("together", "stopped") for path in (store.root / name).rglob("*")] == []


@pytest.mark.usefixtures("one_thread")
def test_runs_count_again_when_more_trials_have_ended(store: Store) -> None:
    space = space_with(confirm={"share": 1.0, "finalists": 2, "seeds": 2, "baselines": False})
    study = searched(store, space, rates=(0.03, 0.1))
    before = {run.number: run for run in confirm(study, store.root).runs}
    study.add(ended_trial(2, 0.3, space))
    after = confirm(store.open("s"), store.root)
    assert [candidate.label for candidate in after.candidates] == ["#1", "#2", "#0"]  # what is known of #0 counts
    assert after.complete
    assert {run.confirms for run in after.runs if run.number not in before} == {"#2"}
    assert len(after.runs) == 6


@pytest.mark.usefixtures("one_thread")
def test_nothing_but_the_test_reads_the_test_split(store: Store) -> None:
    space = space_with(confirm={"share": 1.0, "finalists": 2, "seeds": 2})
    split = tiny_workload().test
    assert isinstance(split, Split)
    assert isinstance(split.inputs, torch.Tensor)
    broken = dataclasses.replace(split, inputs=torch.full_like(split.inputs, torch.nan))
    with_test = confirm(searched(store, space, name="with-test"), store.root)
    without = confirm(searched(store, space, name="without"), store.root, test=broken)
    assert numbers_of(with_test) == numbers_of(without)


def run_of(confirmation: Confirmation, label: str, seed: int, value: float | None, number: int) -> EndedTrial:
    candidate = next(c for c in confirmation.candidates if c.label == label)
    trial = ended_trial(0, 0.1, confirmation.space)
    last = dataclasses.replace(trial.epochs[-1], metrics={**trial.metrics, "val/accuracy": value or 0.0})
    return dataclasses.replace(
        trial,
        number=number,
        config=candidate.with_seed(seed),
        confirms=label,
        state=TrialState.DIVERGED if value is None else TrialState.COMPLETE,
        value=value,
        epochs=(*trial.epochs[:-1], last),
    )


def confirmed(study: Study, scores: Mapping[str, tuple[float | None, float]]) -> Answer:
    """Confirm a study by given scores of two seeds."""
    confirmation = planned(study)
    while group := confirmation.next_group():
        for number, (config, _) in group.items():
            label = confirmation.marked(BegunTrial(number=number, config=config, started=0.0)).confirms
            value = scores[label][config.seed - 1]
            confirmation.add(run_of(confirmation, label, config.seed, value, number), test={})
    confirmation.keep()
    return Answer.of(study)


def test_the_best_mean_wins_and_a_candidate_that_diverged_with_a_seed_cannot(store: Store) -> None:
    study = searched(store, space_with(confirm=TWO_SEEDS))
    scores = {"#1": (0.7, 0.71), "#2": (0.74, 0.75), "Adam's default": (None, 0.9), "SGD with StepLR": (0.6, 0.62)}
    answer = confirmed(study, scores)
    assert answer.trial == study.ended[2]
    assert [found.candidate.label for found in answer.confirmation.table] == [
        "#2",
        "#1",
        "SGD with StepLR",
        "Adam's default",
    ]
    best, second, sgd, adam = answer.confirmation.table
    assert best.mean == pytest.approx(0.745)
    assert best.std == pytest.approx(0.00707, abs=1e-5)
    assert answer.rivals == [second, sgd]
    assert versus(adam, None) == "Adam's default: diverged with seed 1"
    assert answer.lines(confirm="") == [
        "best          #2 sgd 3.0e-01, step 1 × 0.1, head ×0.1, clip 5",
        "              val/accuracy 0.7450 ± 0.0071 (mean ± standard deviation) over 2 fresh seeds",
        "              the search had 0.7000 with one seed, 0.0450 worse",
        "              better than #1 by 0.0400 [0.0224, 0.0576], the 95 % interval over seeds",
        "              better than SGD with StepLR by 0.1350 [0.1174, 0.1526], the 95 % interval over seeds",
        "              Optuna's own tools call #1 the best: it has the best score of one seed",
    ]


def test_a_baseline_that_wins_is_the_answer_and_is_said_to_have_won(store: Store) -> None:
    study = searched(store, space_with(confirm=TWO_SEEDS))
    scores = {"#1": (0.7, 0.71), "#2": (0.74, 0.75), "Adam's default": (0.9, 0.9), "SGD with StepLR": (0.6, 0.62)}
    answer = confirmed(study, scores)
    assert answer.trial is not None
    assert (answer.trial.confirms, answer.trial.config.seed) == ("Adam's default", 1)
    won = "              a baseline has won: no finalist is better; widen the ranges, or search more trials"
    assert answer.lines(confirm="")[2] == won
    assert [found.candidate.label for found in answer.rivals] == ["#2", "SGD with StepLR"]


def test_the_first_of_the_search_is_the_answer_until_every_run_has_ended(store: Store) -> None:
    study = searched(store, space_with(confirm=TWO_SEEDS))
    assert Answer.of(study).trial == study.ended[1]
    assert Answer.of(study).lines(confirm="COMMAND") == [
        "best          #1 sgd 1.0e-01, step 1 × 0.1, head ×0.1, clip 5",
        "              val/accuracy 0.8000 with one seed",
        "unconfirmed   the confirmation is not done",
        "confirm it    COMMAND",
    ]
    off = searched(store, space_with(confirm={"share": 0.0}), name="off")
    assert Answer.of(off).unconfirmed == "the confirmation is turned off"
    stopped = store.open("s", trials=50)
    assert Answer.of(stopped).unconfirmed == "the search has not ended"
    assert len(Answer.of(stopped).lines(confirm="COMMAND")) == 3


def test_the_last_complete_confirmation_is_the_answer_until_another_is_complete(store: Store) -> None:
    study = searched(store, space_with(confirm=TWO_SEEDS))
    scores = {"#1": (0.7, 0.71), "#2": (0.74, 0.75), "Adam's default": (0.5, 0.9), "SGD with StepLR": (0.6, 0.62)}
    before = confirmed(study, scores)
    more = Confirmation(study, plan(study, Confirm(share=1, finalists=1, seeds=4)))
    assert not more.complete
    assert Answer.of(study).trial == before.trial
    fewer = Confirmation(study, plan(study, Confirm(share=1, finalists=1, seeds=2, baselines=False)))
    assert [found.candidate.label for found in fewer.table] == [
        found.candidate.label for found in before.confirmation.table
    ]
    study.add(ended_trial(len(RATES), 0.03, study.space))
    answer = Answer.of(store.open("s"))
    assert answer.trial == before.trial
    assert answer.lines(confirm="")[1].endswith("over 2 fresh seeds, after 4 of 5 trials")


def test_a_study_is_unfinished_until_it_is_confirmed_and_its_end_is_stored(store: Store) -> None:
    space = space_with()
    searched(store, space)

    def next_study(*, confirm: bool) -> tuple[str, bool]:
        return store.choose(space, trials=len(RATES), name=None, confirm=confirm)

    assert next_study(confirm=False) == ("s", True)
    store.open("s").finish(confirmed=False)
    assert next_study(confirm=False) == ("small-1", False)
    assert next_study(confirm=True) == ("s", True)
    store.open("s").finish(confirmed=True)
    assert next_study(confirm=True) == ("small-1", False)


def test_other_settings_of_the_confirmation_make_no_other_study(store: Store) -> None:
    searched(store, space_with())
    changed = space_with(confirm={"share": 1.0, "seeds": 5})
    assert store.choose(changed, trials=len(RATES), name="s") == ("s", True)
