from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState as OptunaState
from scipy.stats import qmc
from tiny import RULES

from pipeline.space.config import TrialConfig
from pipeline.space.load import space_from_document
from pipeline.space.placement import Placement, PlacementRules
from pipeline.space.search_space import Objective, SearchSpace
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.loop import run_group
from pipeline.study.samplers import distributions
from pipeline.study.store import Store
from pipeline.study.study import GROUP_SIZES, Study, group_size

EPOCHS = 4
DOCUMENT: dict[str, Any] = {
    "workload": {"name": "digits", "model": "mlp"},
    "epochs": EPOCHS,
    "batch_size": 64,
    "objective": {"metric": "val/accuracy", "direction": "maximize"},
    "optimizer": {
        "sgd": {
            "base_lr": {"low": 1e-3, "high": 1.0, "log": True},
            "momentum": {"choices": [0.0, 0.9]},
        },
        "adamw": {"base_lr": {"low": 1e-4, "high": 1e-1, "log": True}},
    },
    "scheduler": {"step": {"step_size": {"low": 1, "high": 4}, "gamma": {"low": 0.05, "high": 0.9, "log": True}}},
    "param_groups": {
        "head": {"pattern": "fc.*", "lr_ratio": {"low": 0.1, "high": 10.0, "log": True}},
        "body": {"pattern": "*"},
    },
    "pruner": {"name": "successive_halving", "min_resource": 2},
    "sampler": {"name": "tpe", "n_startup_trials": 4, "group_size": 3},
}
SAMPLERS = ("tpe", "gp", "random", "qmc")

Proposals = Mapping[int, tuple[TrialConfig, dict[str, Any]]]


def space_with(**changes: Any) -> SearchSpace:
    return space_from_document({**DOCUMENT, **changes}, name="small")


def space_with_sampler(name: str, **changes: Any) -> SearchSpace:
    return space_with(sampler={"name": name, "n_startup_trials": 4}, **changes)


class Curves:
    """A trial group whose metrics are a formula of the configs; a rate above 0.5 diverges in the third epoch."""

    def __init__(self, proposals: Proposals) -> None:
        self._configs = {number: config for number, (config, _) in proposals.items()}
        self._epoch = 0

    def train_epoch(self, *, average: bool = False) -> dict[int, EpochMetrics]:
        self._epoch += 1
        results = {number: epoch_of(config, self._epoch) for number, config in self._configs.items()}
        for number in [number for number, epoch in results.items() if not epoch.finished]:
            self.drop(number)
        return results

    def drop(self, number: int) -> None:
        self._configs.pop(number, None)

    def test(self) -> dict[int, dict[str, float]]:
        return {}

    def model_state(self, number: int) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def trial_states(self) -> Iterator[tuple[str, Any]]:
        return iter(())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


def epoch_of(config: TrialConfig, epoch: int) -> EpochMetrics:
    distance = abs(math.log10(config.optimizer.base_lr) + 2) + 0.1 * abs(
        math.log10(config.param_groups["head"].lr_ratio)
    )
    diverged = config.optimizer.base_lr > 0.5 and epoch == 3
    loss = math.inf if diverged else distance + 1 / epoch
    return EpochMetrics(
        epoch=epoch,
        step=20 * epoch,
        metrics={"train/loss": loss, "val/loss": loss, "val/accuracy": 1 / (1 + distance + 1 / epoch)},
        lr={"head": ((20 * epoch, 0.1),), "body": ((20 * epoch, 0.1),)},
        placement=Placement(trainer="plain", threads=1),
        diverged="the loss became inf at step 41, in epoch 3" if diverged else None,
    )


def search(study: Study, trials: int, *, stop_at: int | None = None) -> None:
    """Search until `trials` trials have ended, or die after `stop_at` stored trials."""
    while proposals := study.next_group(trials):
        for ended in run_group(
            Curves(proposals),
            proposals,
            study,
            checkpoints=Checkpoints(Path("nowhere"), warn=pytest.fail, share=1e-9),
            environment={"device": "curves"},
            on_epoch=lambda _: None,
            interrupted=lambda: False,
            rules=lambda: study.rules,
        ):
            for trial in ended:
                study.add(trial)
                if len(study.ended) == stop_at:
                    return


def outcomes(study: Study) -> list[tuple[Any, ...]]:
    return [
        (t.number, t.params, t.config, t.state, t.reason, t.value, [e.metrics for e in t.epochs if e.finished])
        for t in study.ended
    ]


def ended_trial(number: int = 0, **changes: Any) -> EndedTrial:
    """Return a complete trial of the space, with numbers that have no short decimal form."""
    values: dict[str, Any] = {
        "optimizer": {"adamw": {"base_lr": 0.1 / 3}},
        "scheduler": {"step": {"step_size": 2, "gamma": 0.7 / 3}},
        "param_groups": {"head": {"pattern": ["fc.*"], "lr_ratio": 10 / 3}, "body": {"pattern": ["*"]}},
    }
    config = TrialConfig.from_dict(
        {
            **{k: DOCUMENT[k] for k in ("workload", "epochs", "batch_size")},
            "seed": 0,
            "precision": "fp32",
            "deterministic": False,
            **values,
        }
    )
    trial = EndedTrial(
        number=number,
        config=config,
        params={
            "optimizer": "adamw",
            "adamw.base_lr": 0.1 / 3,
            "step.step_size": 2,
            "step.gamma": 0.7 / 3,
            "lr_ratio.head": 10 / 3,
        },
        state=TrialState.COMPLETE,
        objective=Objective(),
        reason=None,
        value=2 / 3,
        epochs=(epoch_metrics(1, 1 / 3, 0.1 + 0.2), epoch_metrics(2, 2 / 3, 1 / 7)),
        started=1_700_000_000.125,
        ended=1_700_000_009.5,
        environment={"trainer": "plain", "threads": 2},
    )
    return dataclasses.replace(trial, **changes)


def epoch_metrics(epoch: int, accuracy: float, loss: float, **changes: Any) -> EpochMetrics:
    metrics = {"train/loss": loss, "val/loss": loss, "val/accuracy": accuracy}
    return EpochMetrics(epoch=epoch, step=20 * epoch, metrics=metrics, lr={}, **changes)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, since several slow down Gaussian processes this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One database for many studies, each with its own name."""
    return Store(tmp_path_factory.mktemp("store"))


_names = (f"study-{number}" for number in itertools.count())


def new_study(store: Store, space: SearchSpace, *, trials: int) -> Study:
    quarter = dataclasses.replace(space.sampler, group_size=-(-trials // 4))
    return store.create(dataclasses.replace(space, sampler=quarter), name=next(_names), trials=trials, rules=RULES)


def stored(store: Store, study: Study) -> optuna.Study:
    return optuna.load_study(study_name=study.name, storage=f"sqlite:///{store.database}")


@pytest.mark.parametrize(
    ("device", "processes", "plain", "size"),
    [
        ("cpu", 1, None, GROUP_SIZES["cpu"]),
        ("mps", 1, None, GROUP_SIZES["cpu"]),
        ("cpu", 40, "it is large", 40),
        ("cuda", 1, None, GROUP_SIZES["cuda"]),
        ("cuda", 1, "it is large", GROUP_SIZES["cpu"]),
    ],
)
def test_group_size_is_a_constant_of_what_trains_at_a_time_unless_the_space_says_it(
    device: str, processes: int, plain: str | None, size: int
) -> None:
    rules = PlacementRules(device=device, processes=processes, plain_because={"64:": plain})
    assert group_size(space_with(sampler={"name": "random"}), rules) == size
    assert group_size(space_with(sampler={"name": "random", "group_size": 3}), rules) == 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interrupted_study_goes_on_as_if_it_never_was(store: Store, sampler: str) -> None:
    space = space_with_sampler(sampler)
    whole = new_study(store, space, trials=18)
    search(whole, 18)
    interrupted = new_study(store, space, trials=18)
    search(interrupted, 18, stop_at=8)
    reopened = Store(store.root).open(interrupted.name)
    assert reopened.group_size == 5
    assert len(reopened.ended) == 8  # three of the group of 5 to 9
    search(reopened, 18)
    assert outcomes(reopened) == outcomes(whole)
    assert outcomes(Store(store.root).open(interrupted.name)) == outcomes(whole)
    assert {TrialState.COMPLETE, TrialState.PRUNED} <= {trial.state for trial in whole.ended}


def test_a_study_interrupted_again_and_again_is_the_same_study(store: Store) -> None:
    space = space_with()
    whole, pieces = (new_study(store, space, trials=12) for _ in range(2))
    search(whole, 12)
    for ended in (1, 5, 6, 11, 12):  # groups of 3
        search(store.open(pieces.name), 12, stop_at=ended)
    assert outcomes(store.open(pieces.name)) == outcomes(whole)


def test_another_seed_proposes_other_trials(store: Store) -> None:
    first, second = (new_study(store, space_with(seed=seed), trials=18).next_group(18) for seed in (0, 1))
    assert [params for _, params in first.values()] != [params for _, params in second.values()]


def test_a_proposal_asked_for_twice_is_the_same(store: Store) -> None:
    study = new_study(store, space_with(), trials=18)
    search(study, 18, stop_at=9)
    assert study.next_group(18) == study.next_group(18)


def test_tpe_learns_from_ended_trials(store: Store) -> None:
    study = new_study(store, space_with_sampler("tpe"), trials=18)
    search(study, 18, stop_at=9)
    unlearned = new_study(store, space_with_sampler("random"), trials=18)
    search(unlearned, 18, stop_at=9)
    assert outcomes(study)[:3] == outcomes(unlearned)[:3]  # its start-up is random, from the same seeds
    assert study.next_group(18) != unlearned.next_group(18)


@pytest.mark.parametrize("sampler", ["tpe", "qmc"])
def test_raising_the_number_of_trials_goes_on(store: Store, sampler: str) -> None:
    space = space_with_sampler(sampler)
    study = new_study(store, space, trials=13)  # groups of 4; the last is cut to one
    search(study, 13)
    assert study.next_group(13) == {}
    before = outcomes(study)
    raised = store.open(study.name, trials=16)
    assert list(raised.next_group(16)) == [13, 14, 15]  # a new group, which knows all thirteen
    search(raised, 16)
    assert outcomes(raised)[:13] == before
    assert [trial.number for trial in raised.ended] == list(range(16))
    assert next(header.trials for header in store.headers() if header.name == study.name) == 16


def test_numbers_have_no_gaps_and_the_database_holds_them_in_order(store: Store) -> None:
    study = new_study(store, space_with(), trials=18)
    search(study, 18)
    assert [trial.number for trial in study.ended] == list(range(18))
    assert [trial.number for trial in stored(store, study).trials] == list(range(18))
    assert all(trial.state.is_finished() for trial in stored(store, study).trials)


def in_unit_interval(distribution: BaseDistribution, value: Any) -> float | None:
    """Return a value's position between low and high, on a log axis if the distribution is; None for a category."""
    if isinstance(distribution, CategoricalDistribution):
        return None
    assert isinstance(distribution, FloatDistribution)
    low, high, value = (math.log(x) if distribution.log else x for x in (distribution.low, distribution.high, value))
    return float((value - low) / (high - low))


def test_qmc_follows_the_scrambled_sobol_sequence(store: Store) -> None:
    # One optimizer and no categories or whole numbers, so that a point is the trial.
    space = space_with_sampler(
        "qmc",
        optimizer={"sgd": DOCUMENT["optimizer"]["sgd"] | {"momentum": {"low": 0.0, "high": 0.9}}},
        scheduler={"step": {"step_size": 2, "gamma": {"low": 0.05, "high": 0.9}}},
        seed=5,
    )
    study = new_study(store, space, trials=16)
    search(study, 16, stop_at=16)
    names = distributions(space)
    points = [[in_unit_interval(names[name], trial.params[name]) for name in names] for trial in study.ended]
    expected = qmc.Sobol(len(names), scramble=True, seed=5).random(16)
    np.testing.assert_allclose(np.array(points, dtype=float), expected, atol=1e-9)  # through a logarithm and back


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc"])
def test_no_trial_is_proposed_twice(store: Store, sampler: str) -> None:
    study = new_study(store, space_with_sampler(sampler), trials=18)
    search(study, 18)
    assert len({trial.config.optimizer.base_lr for trial in study.ended}) == 18
    assert {trial.config.optimizer.name for trial in study.ended} == {"sgd", "adamw"}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_enqueued_comes_first_and_the_rest_of_it_is_sampled(store: Store, sampler: str) -> None:
    enqueue = [
        {"optimizer": {"sgd": {"base_lr": 0.25, "momentum": 0.9}}, "param_groups": {"head": {"lr_ratio": 2.0}}},
        {"optimizer": {"adamw": {"base_lr": 0.003}}, "scheduler": {"step": {"step_size": 3, "gamma": 0.5}}},
    ]
    study = new_study(store, space_with_sampler(sampler, enqueue=enqueue), trials=18)
    (first, _), (second, _), (third, _), *_ = study.next_group(18).values()
    assert first.hyperparameters() | {"base_lr": 0.25, "momentum": 0.9, "lr_ratio.head": 2.0} == first.hyperparameters()
    assert second.hyperparameters() | {"base_lr": 0.003, "step_size": 3, "gamma": 0.5} == second.hyperparameters()
    assert [first.optimizer.name, second.optimizer.name] == ["sgd", "adamw"]
    assert third.optimizer.base_lr not in (0.25, 0.003)


def test_a_stored_trial_comes_back_exactly(store: Store) -> None:
    study = new_study(store, space_with(), trials=18)
    pruned = ended_trial(1, state=TrialState.PRUNED, reason="successive_halving after epoch 2", value=None)
    for trial in (ended_trial(), pruned):
        study.add(trial)
    assert store.open(study.name).ended == [ended_trial(), pruned]


def test_a_stored_trial_leaves_its_learning_rates_to_mlflow(store: Store) -> None:
    study = new_study(store, space_with(), trials=18)
    epochs = tuple(dataclasses.replace(epoch, lr={"head": ((20, 0.1),)}) for epoch in ended_trial().epochs)
    study.add(ended_trial(epochs=epochs))
    assert store.open(study.name).ended == [ended_trial()]


def test_a_complete_trial_is_stored_with_its_value_and_every_epoch(store: Store) -> None:
    study = new_study(store, space_with(), trials=18)
    study.add(ended_trial())
    (frozen,) = stored(store, study).trials
    assert frozen.state is OptunaState.COMPLETE
    assert frozen.value == 2 / 3
    assert frozen.intermediate_values == {1: 1 / 3, 2: 2 / 3}
    assert frozen.params == ended_trial().params
    assert frozen.user_attrs["base_lr"] == 0.1 / 3


def test_a_diverged_trial_is_stored_as_pruned_without_any_value(store: Store) -> None:
    study = new_study(store, space_with(), trials=18)
    reason = "the loss became nan at step 41, in epoch 3"
    epochs = (*ended_trial().epochs, epoch_metrics(3, 0.1, math.nan, diverged=reason))
    study.add(ended_trial(state=TrialState.DIVERGED, reason=reason, value=None, epochs=epochs))
    (frozen,) = stored(store, study).trials
    assert frozen.state is OptunaState.PRUNED
    assert frozen.value is None
    assert frozen.intermediate_values == {}
    assert frozen.user_attrs["state"] == "diverged"
    (thawed,) = store.open(study.name).ended
    assert thawed == ended_trial(state=TrialState.DIVERGED, reason=reason, value=None)  # without its last epoch


def test_a_failed_trial_is_stored_as_failed_and_no_sampler_learns_from_it(store: Store) -> None:
    study = new_study(store, space_with(), trials=18)
    failed = EpochMetrics(epoch=0, step=0, metrics={}, lr={}, failed="RuntimeError: no such layer")
    study.add(ended_trial(state=TrialState.FAILED, reason=failed.failed, value=None, epochs=(failed,)))
    (frozen,) = stored(store, study).trials
    assert frozen.state is OptunaState.FAIL
    assert frozen.user_attrs["reason"] == "RuntimeError: no such layer"
    (thawed,) = store.open(study.name).ended
    assert (thawed.state, thawed.epochs, thawed.metrics) == (TrialState.FAILED, (), {})


def test_the_best_is_decided_by_objective_then_validation_loss_then_number(store: Store) -> None:
    study = new_study(store, space_with(), trials=18)
    scores = [(0.5, 0.1), (0.75, 0.4), (0.75, 0.3), (0.75, 0.3), (0.25, 0.0)]
    for number, (accuracy, loss) in enumerate(scores):
        study.add(ended_trial(number, value=accuracy, epochs=(epoch_metrics(1, accuracy, loss),)))
    study.add(ended_trial(5, state=TrialState.PRUNED, value=None, epochs=(epoch_metrics(1, 0.99, 0.0),)))
    assert [trial.number for trial in study.best(10)] == [2, 3, 1, 0, 4]
    assert [trial.number for trial in study.best()] == [2]


def test_ranking_and_counts_of_states_are_kept_as_trials_are_stored_and_read(store: Store) -> None:
    study = new_study(store, space_with(), trials=24)
    for _ in range(2):
        for several in (study, store.open(None)):
            complete = [trial for trial in several.ended if trial.state is TrialState.COMPLETE]
            assert several.best(100) == sorted(complete, key=several.space.objective.order)
            assert several.best() == several.best(100)[:1]
            assert several.states == Counter(trial.state for trial in several.ended)
        search(study, 24)
    assert len(study.best(100)) > 3


def test_the_best_of_a_minimized_objective_is_the_smallest(store: Store) -> None:
    study = new_study(store, space_with(objective={"metric": "val/loss", "direction": "minimize"}), trials=18)
    for number, loss in enumerate([0.5, 0.25, 0.75]):
        study.add(ended_trial(number, value=loss, epochs=(epoch_metrics(1, 0.5, loss),)))
    assert [trial.number for trial in study.best(3)] == [1, 0, 2]


def test_a_study_without_a_complete_trial_has_no_best(store: Store) -> None:
    study = new_study(store, space_with(), trials=18)
    study.add(ended_trial(state=TrialState.PRUNED, value=None))
    assert study.best() == []


def test_verdicts_count_trials_of_the_group_that_have_ended_and_of_earlier_groups(store: Store) -> None:
    study = new_study(store, space_with(), trials=12)  # groups of 3
    for number, accuracy in enumerate([0.9, 0.8, 0.1, 0.2]):
        study.next_group(12)
        epochs = tuple(epoch_metrics(epoch, accuracy, 0.5) for epoch in (1, 2))
        study.add(ended_trial(number, state=TrialState.PRUNED, value=None, epochs=epochs))
    running = {n: [epoch_metrics(e, accuracy, 0.5) for e in (1, 2)] for n, accuracy in ((4, 0.85), (5, 0.3))}
    # Three of six go on: 0.9, 0.85 and 0.8.
    assert study.stops(2, running) == {5}
    assert study.stops(1, running) == set()


def test_with_the_best_epoch_as_objective_pruning_and_the_sampler_see_the_best_so_far(store: Store) -> None:
    study = new_study(store, space_with(objective={"metric": "val/accuracy", "of": "best"}), trials=12)
    for number, accuracies in enumerate([(0.9, 0.2), (0.3, 0.5), (0.6, 0.1)]):
        study.next_group(12)
        epochs = tuple(epoch_metrics(epoch, accuracy, 0.5) for epoch, accuracy in enumerate(accuracies, 1))
        study.add(ended_trial(number, state=TrialState.PRUNED, value=None, epochs=epochs))
    assert [trial.intermediate_values for trial in stored(store, study).get_trials()] == [
        {1: 0.9, 2: 0.9},
        {1: 0.3, 2: 0.5},
        {1: 0.6, 2: 0.6},
    ]
    unmeasured = epoch_metrics(2, math.nan, 0.5)
    study.next_group(12)
    study.add(ended_trial(3, state=TrialState.DIVERGED, value=None, epochs=(epoch_metrics(1, 0.8, 0.5), unmeasured)))
    running = {n: [epoch_metrics(1, first, 0.5), epoch_metrics(2, 0.4, 0.5)] for n, first in ((4, 0.7), (5, 0.3))}
    assert study.stops(2, running) == {5}  # two of five go on: 0.9 and 0.7


def test_what_a_space_enqueues_trains_to_its_end(store: Store) -> None:
    worst = {"optimizer": {"sgd": {"base_lr": 0.001, "momentum": 0.0}}}  # far from 0.01, the best rate
    study = new_study(store, space_with(enqueue=[worst], sampler={"name": "random"}), trials=12)
    search(study, 12)
    assert study.ended[0].params["sgd.base_lr"] == 0.001
    assert study.ended[0].state is TrialState.COMPLETE
    assert sum(trial.state is TrialState.PRUNED for trial in study.ended) > 0
