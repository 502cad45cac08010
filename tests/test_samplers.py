"""Which earlier trials a sampler looks at, and that what it proposes does not change below the cap."""

from __future__ import annotations

import random
from typing import Any, Literal

import optuna
import pytest
from optuna.samplers._tpe.sampler import _split_trials
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState
from test_study import SAMPLERS, space_with, space_with_sampler

from pipeline.space.search_space import SearchSpace
from pipeline.study import samplers
from pipeline.study.samplers import BEST, GP_BEST, GP_NEWEST, NEWEST, build_sampler, distributions, propose, visible


def earlier_trials(space: SearchSpace, count: int) -> list[FrozenTrial]:
    """Trials of every state, with values in no order; the last of each ten failed."""
    random_, known = random.Random(0), distributions(space)
    trials = []
    for number in range(count):
        params = {name: _any_value(random_, distribution) for name, distribution in known.items()}
        unused = "adamw." if params["optimizer"] == "sgd" else "sgd."
        params = {name: value for name, value in params.items() if not name.startswith(unused)}
        value = random_.random()
        state = OptunaState.FAIL if number % 10 == 9 else OptunaState.COMPLETE
        reached: dict[int, float] = {}
        if number % 3 == 2 and state is OptunaState.COMPLETE:
            state = OptunaState.PRUNED
            reached = {epoch: random_.random() for epoch in range(1, random_.choice((1, 3, 5)))}
        trial = optuna.trial.create_trial(
            state=state,
            value=value if state is OptunaState.COMPLETE else None,
            params=params,
            distributions={name: known[name] for name in params},
            intermediate_values=reached,
        )
        trial.number = number
        trials.append(trial)
    return trials


def _any_value(random_: random.Random, distribution: Any) -> Any:
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return random_.choice(distribution.choices)
    if isinstance(distribution, optuna.distributions.IntDistribution):
        return random_.randint(distribution.low, distribution.high)
    return random_.uniform(distribution.low, distribution.high)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_below_the_cap_proposals_are_those_of_a_sampler_that_sees_every_trial(sampler: str) -> None:
    space = space_with_sampler(sampler)
    trials = earlier_trials(space, 20)
    memory = optuna.create_study(direction="maximize")
    memory.add_trials(trials)
    expected = {}
    for number in (20, 21):
        memory.sampler = build_sampler(space, number)
        trial = memory.ask()
        expected[number] = (space.sample(trial), trial.params)
    assert propose(space, trials, first=20, size=2) == expected


@pytest.mark.parametrize(("sampler", "cap"), [("tpe", BEST + NEWEST), ("gp", GP_BEST + GP_NEWEST)])
def test_as_many_trials_as_the_cap_are_all_seen(sampler: str, cap: int) -> None:
    space = space_with_sampler(sampler)
    trials = earlier_trials(space, cap + 1)
    assert visible(space, trials[:cap]) == trials[:cap]
    assert len(visible(space, trials)) <= cap


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_above_the_cap_tpe_sees_the_newest_and_has_the_same_good_trials(
    direction: Literal["maximize", "minimize"],
) -> None:
    space = space_with_sampler("tpe", objective={"metric": "val/loss", "direction": direction})
    trials = earlier_trials(space, 900)
    seen = visible(space, trials)
    numbers = [trial.number for trial in seen]
    alive = [trial for trial in trials if trial.state is not OptunaState.FAIL]
    assert numbers == sorted(set(numbers))
    assert len(seen) == BEST + NEWEST
    assert list(seen[-NEWEST:]) == alive[-NEWEST:]
    study = optuna.create_study(direction=direction)
    good, _ = _split_trials(study, alive, 25)  # Optuna's own division; 25 are the most that it calls good
    assert _split_trials(study, list(seen), 25)[0] == good


def test_of_pruned_trials_those_count_as_the_best_that_optuna_ranks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "BEST", 20)
    monkeypatch.setattr(samplers, "NEWEST", 0)
    space = space_with_sampler("tpe")
    pruned = [trial for trial in earlier_trials(space, 300) if trial.state is OptunaState.PRUNED]
    best, _ = _split_trials(optuna.create_study(direction="maximize"), pruned, 20)
    assert visible(space, pruned) == best


def test_a_search_with_more_start_up_trials_than_the_cap_still_gets_to_its_model() -> None:
    space = space_with(sampler={"name": "tpe", "n_startup_trials": 600})
    trials = earlier_trials(space, 2000)
    seen = visible(space, trials)
    assert len(seen) == 600 + NEWEST
    assert sum(trial.state is OptunaState.COMPLETE for trial in seen) >= 600


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_samplers_that_look_at_no_trial_propose_by_the_number_alone(sampler: str) -> None:
    space = space_with_sampler(sampler)
    assert propose(space, earlier_trials(space, 30), first=30, size=4) == propose(space, [], first=30, size=4)


def test_above_the_cap_a_proposal_is_a_function_of_the_number_and_the_earlier_trials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(samplers, "BEST", 10)
    monkeypatch.setattr(samplers, "NEWEST", 10)
    enqueued = [{"optimizer": {"adamw": {"base_lr": 0.01}}}]
    space = space_with_sampler("tpe", enqueue=enqueued)
    trials = earlier_trials(space, 50)
    group = propose(space, trials, first=50, size=4)
    assert list(group) == [50, 51, 52, 53]
    assert group == propose(space, trials, first=50, size=4)
    assert len({tuple(sorted(params.items())) for _, params in group.values()}) == 4
    assert propose(space, trials, first=50, size=2) == {number: group[number] for number in (50, 51)}
