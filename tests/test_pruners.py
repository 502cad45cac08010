from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.space.load import space_from_document
from pipeline.space.pruners import Median, NoPruner, Pruner, Score, SuccessiveHalving, score
from pipeline.space.rules import warnings
from pipeline.space.search_space import SearchSpace

SIXTEEN: dict[int, Score] = {number: (float(number * 7 % 16), 0.0) for number in range(16)}
"""Trials 0 to 15 with scores 0, 7, 14, 5, 12, 3, 10, 1, 8, 15, 6, 13, 4, 11, 2, 9: smaller is better."""

HALVING = SuccessiveHalving(min_resource=4, reduction_factor=4)
MEDIAN = Median(n_startup_trials=5, n_warmup_epochs=4)


@pytest.mark.parametrize(
    ("pruner", "epoch", "kept"),
    [
        (HALVING, 4, {0, 7, 14, 5}),  # scores 0, 1, 2, 3
        (MEDIAN, 5, {0, 7, 14, 5, 12, 3, 10, 1}),  # scores 0 to 7, of which 7 is the lower median
        (NoPruner(), 4, set(range(16))),
    ],
    ids=["successive halving", "median", "none"],
)
@given(order=st.permutations(range(16)), earlier=st.permutations([(20.0, 0.0), (21.0, 0.0)]))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_order_of_trials_does_not_matter(
    pruner: Pruner, epoch: int, kept: set[int], order: list[int], earlier: list[Score]
) -> None:
    group = {number: SIXTEEN[number] for number in order}
    assert set(group) - pruner.stops(epoch, group, []) == kept
    assert pruner.stops(epoch, group, earlier) == pruner.stops(epoch, SIXTEEN, [(20.0, 0.0), (21.0, 0.0)])


@given(
    scores=st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_order_of_trials_does_not_matter_when_scores_are_equal(scores: list[Score], seed: int) -> None:
    group = dict(enumerate(scores))
    shuffled = dict(random.Random(seed).sample(list(group.items()), len(group)))
    for pruner in (HALVING, SuccessiveHalving(min_resource=4), MEDIAN):
        assert pruner.stops(4, shuffled, scores[:3]) == pruner.stops(4, group, scores[2::-1])
        assert pruner.stops(5, shuffled, scores[:3]) == pruner.stops(5, group, scores[2::-1])


def test_halving_breaks_ties_by_validation_loss_then_by_number() -> None:
    halving = SuccessiveHalving(min_resource=1, reduction_factor=2)
    assert halving.stops(1, {0: (0.5, 2.0), 1: (0.5, 1.0)}, []) == {0}
    assert halving.stops(1, {2: (0.5, 1.0), 1: (0.5, 1.0)}, []) == {2}
    assert halving.stops(1, {5: (0.5, 1.0), 6: (0.4, 9.0)}, []) == {5}


def test_median_breaks_ties_by_validation_loss_and_keeps_equals() -> None:
    median = Median(n_startup_trials=1, n_warmup_epochs=0)
    assert median.stops(1, {0: (0.5, 1.0), 1: (0.5, 2.0), 2: (0.5, 3.0)}, []) == {2}
    assert median.stops(1, dict.fromkeys(range(4), (0.5, 1.0)), []) == set()


def test_halving_compares_with_earlier_trials_which_win_ties() -> None:
    halving = SuccessiveHalving(min_resource=1, reduction_factor=2)
    group = {8: (3.0, 0.0), 9: (4.0, 0.0)}
    assert halving.stops(1, group, []) == {9}
    assert halving.stops(1, group, [(1.0, 0.0), (2.0, 0.0)]) == {8, 9}
    assert halving.stops(1, group, [(5.0, 0.0), (6.0, 0.0)]) == set()
    assert halving.stops(1, group, [(4.0, 0.0), (6.0, 0.0)]) == {9}


def test_median_compares_with_earlier_trials() -> None:
    median = Median(n_startup_trials=3, n_warmup_epochs=0)
    group = {8: (3.0, 0.0), 9: (4.0, 0.0)}
    assert median.stops(1, group, []) == set()  # two of the three trials that it waits for
    assert median.stops(1, group, [(1.0, 0.0)]) == {9}
    assert median.stops(1, group, [(1.0, 0.0), (2.0, 0.0), (2.5, 0.0)]) == {8, 9}


@pytest.mark.parametrize(
    ("pruner", "rungs"),
    [
        (SuccessiveHalving(min_resource=4), [4, 8, 16, 32]),
        (SuccessiveHalving(min_resource=1, reduction_factor=3), [1, 3, 9, 27]),
        (SuccessiveHalving(min_resource=5, reduction_factor=4), [5, 20]),
        (SuccessiveHalving(min_resource=3, max_resource=12), [3, 6, 12]),
        (SuccessiveHalving(min_resource=3, max_resource=11), [3, 6]),
        (Median(n_warmup_epochs=37), [38, 39, 40]),
        (NoPruner(), []),
    ],
)
def test_trials_stop_at_rungs_only(pruner: Pruner, rungs: list[int]) -> None:
    assert [epoch for epoch in range(1, 41) if pruner.stops(epoch, SIXTEEN, [])] == rungs


@pytest.mark.parametrize("pruner", [HALVING, SuccessiveHalving(min_resource=4, reduction_factor=100), MEDIAN])
def test_at_least_one_trial_of_the_first_group_goes_on(pruner: Pruner) -> None:
    for size, epoch in itertools.product(range(1, 17), (4, 5)):
        group = {number: SIXTEEN[number] for number in range(size)}
        best = min(group, key=lambda number: group[number])
        assert best not in pruner.stops(epoch, group, [])


def test_halving_keeps_the_same_share_however_trials_are_grouped() -> None:
    rows = list(SIXTEEN.values())
    survivors = len(SIXTEEN) - len(HALVING.stops(4, SIXTEEN, []))
    last = HALVING.stops(4, {15: SIXTEEN[15]}, rows[:15])
    assert survivors == 4
    assert last == {15}  # score 9 is not among the best 4 of 16


def test_a_score_is_smaller_when_better() -> None:
    assert score(0.9, 0.3, direction="maximize") == (-0.9, 0.3)
    assert score(0.9, 0.3, direction="minimize") == (0.9, 0.3)
    assert score(0.9, 0.3, direction="maximize") < score(0.8, 0.1, direction="maximize")
    assert score(0.9, 0.3, direction="minimize") > score(0.8, 0.9, direction="minimize")


@pytest.mark.parametrize(
    ("epochs", "rungs"),
    [(1, [1]), (2, [1]), (3, [1]), (5, [1, 2]), (7, [1, 2]), (8, [1, 2, 4]), (20, [3, 6]), (100, [15, 30])],
)
def test_rungs_are_shares_of_the_run(epochs: int, rungs: list[int]) -> None:
    pruner = space_with(epochs).pruner
    assert [epoch for epoch in range(1, 101) if pruner.averages(epoch)] == rungs


def test_a_first_rung_after_the_last_is_said_to_stop_no_trial() -> None:
    assert list(warnings(space_with(20, min_resource=12))) == [
        "pruner: no trial stops, since min_resource, 12, is after max_resource, 10; lower the one, or raise the other"
    ]
    assert list(warnings(space_with(20, min_resource=12, max_resource="60%"))) == []


def space_with(epochs: int, **pruner: Any) -> SearchSpace:
    document = {
        "workload": {"name": "digits"},
        "epochs": epochs,
        "batch_size": 64,
        "optimizer": {"sgd": {"base_lr": 0.1}},
        "scheduler": {"constant": {}},
        "param_groups": {"all": {"pattern": "*"}},
        "pruner": {"name": "successive_halving", **pruner},
    }
    return space_from_document(document, name="small")
