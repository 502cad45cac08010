"""Placement: a pure function that decides a trial's numbers to the bit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tiny import BODY_AND_HEAD, TinyModel, tiny_config, tiny_workload
from torch import nn

from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import SGD, Adafactor, Adagrad, Adam, AdamW, Muon, NAdam, RMSprop
from pipeline.space.param_groups import ParamGroup
from pipeline.space.placement import Placement, PlacementRules, from_run_lengths, run_lengths
from pipeline.space.schedules import OneCycle, Step
from pipeline.space.trial import EpochMetrics
from pipeline.training.executor import LocalExecutor
from pipeline.training.placement import Shard, place
from pipeline.training.rows.trainer import FusedTrials

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FROZEN_BODY = {"head": ParamGroup(pattern=("head.*",)), "body": ParamGroup(pattern=("*",), lr_ratio=0.0)}


def rules(**values: Any) -> PlacementRules:
    return PlacementRules(**{"device": "cpu", "plain_because": {"8:": None, "8:body": None}, **values})


def rows(*numbers: int) -> Shard:
    return Shard(numbers, plain=False)


def plain(number: int) -> Shard:
    return Shard((number,), plain=True)


SEVEN = {number: tiny_config(SGD(base_lr=0.1)) for number in range(7)}
MIXED = {
    0: tiny_config(SGD(base_lr=0.1)),
    1: tiny_config(Adam(base_lr=0.01)),
    2: tiny_config(Muon(base_lr=0.01)),
    3: tiny_config(SGD(base_lr=0.2)),
    4: tiny_config(Adam(base_lr=0.02)),
    5: tiny_config(Adam(base_lr=0.02), param_groups=FROZEN_BODY),
}


@pytest.mark.parametrize(
    ("configs", "given", "expected"),
    [
        (SEVEN, rules(), [rows(0, 1, 2, 3, 4, 5, 6)]),
        (SEVEN, rules(processes=2), [rows(0, 1, 2), rows(3, 4, 5, 6)]),
        (SEVEN, rules(processes=3, row_limit=2), [rows(0), rows(1, 2), rows(3, 4), rows(5, 6)]),
        (SEVEN, rules(processes=9), [rows(number) for number in range(7)]),
        (SEVEN, rules(plain_because={"8:": "too large"}), [plain(number) for number in range(7)]),
        (MIXED, rules(), [rows(1, 4, 0, 3), rows(5), plain(2)]),
        (MIXED, rules(processes=2), [rows(1, 4), rows(0, 3), rows(5), plain(2)]),
        (
            {n: tiny_config(SGD(base_lr=0.1), batch_size=8 if n % 3 else 16) for n in range(6)},
            rules(processes=2, plain_because={"8:": None, "16:": None}),
            [rows(0), rows(3), rows(1, 2), rows(4, 5)],
        ),
        (
            {n: tiny_config(SGD(base_lr=0.1), batch_size=8 if n % 3 else 16) for n in range(6)},
            rules(plain_because={"8:": None, "16:": "too large"}),
            [rows(1, 2, 4, 5), plain(0), plain(3)],
        ),
        ({}, rules(), []),
    ],
)
def test_running_trials_are_divided_by_a_table_worked_by_hand(
    configs: Mapping[int, TrialConfig], given: PlacementRules, expected: list[Shard]
) -> None:
    assert place(configs, given) == expected
    assert place(dict(reversed(list(configs.items()))), given) == expected


def test_rules_are_plain_values_and_back() -> None:
    given = rules(processes=3, rows=8, row_limit=4)
    assert PlacementRules(**given.to_dict()) == given


def test_placements_are_coded_by_their_runs_and_back() -> None:
    placements = [Placement(trainer="rows", rows=7, place=3, threads=1)] * 2
    placements += [Placement(trainer="rows", rows=4, place=1, threads=1)]
    placements += [Placement(trainer="rows", rows=4, place=1, threads=1, broken=True)] * 3
    coded = run_lengths(placements)
    assert coded == [
        {"epochs": 2, "trainer": "rows", "rows": 7, "place": 3, "threads": 1},
        {"epochs": 1, "trainer": "rows", "rows": 4, "place": 1, "threads": 1},
        {"epochs": 3, "trainer": "rows", "rows": 4, "place": 1, "threads": 1, "broken": True},
    ]
    assert from_run_lengths(coded) == placements
    assert run_lengths([Placement(trainer="plain", threads=2)]) == [{"epochs": 1, "trainer": "plain", "threads": 2}]


@pytest.mark.parametrize(
    ("run", "error", "words"),
    [
        (
            {"epochs": 1, "trainer": "rows", "rows": 4, "place": 4, "threads": 1},
            ValueError,
            "rows at place 4 of 4 rows",
        ),
        ({"epochs": 1, "trainer": "rows", "threads": 1}, ValueError, "rows at place None of None rows"),
        ({"epochs": 1, "trainer": "alone", "threads": 1}, ValueError, "alone at place None of None rows"),
        ({"epochs": 1, "trainer": "rows", "rows": 10**9, "place": 0, "threads": 1}, ValueError, "rows must be a whole"),
        (
            {"epochs": 1, "trainer": "plain", "threads": "1"},
            ValueError,
            "threads must be a whole number from 1",
        ),
        ({"epochs": 10**9, "trainer": "plain", "threads": 1}, ValueError, "epochs must be a whole number from 1 to"),
        ({"epochs": 1, "trainer": "plain", "threads": 1, "lane": 2}, TypeError, "unexpected keyword argument 'lane'"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(run: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        from_run_lengths([run])


def with_dropout() -> nn.Module:
    return TinyModel(dropout=0.3)


def with_batch_norm() -> nn.Module:
    return TinyModel(batch_norm=True)


OPTIMIZERS = [
    SGD(base_lr=0.1, momentum=0.9),
    Adam(base_lr=0.01),
    AdamW(base_lr=0.02),
    RMSprop(base_lr=1e-3),
    Adagrad(base_lr=0.01),
    NAdam(base_lr=0.005),
]


@pytest.mark.parametrize("build_model", [TinyModel, with_dropout, with_batch_norm])
def test_what_the_other_rows_hold_does_not_matter_to_the_bit(build_model: Callable[[], nn.Module]) -> None:
    mine = tiny_config(Adam(base_lr=0.003), OneCycle())
    for count, where in ((1, 0), (3, 2), (7, 3)):
        seen = []
        for rate in (1e-4, 0.3):
            others = {10 * n: tiny_config(Adam(base_lr=rate * (n + 1)), OneCycle()) for n in range(count - 1)}
            configs = {**{n: c for n, c in others.items() if n < 10 * where}, 10 * where - 5: mine}
            configs |= {n: c for n, c in others.items() if n >= 10 * where}
            group = FusedTrials(configs, tiny_workload(build_model), device=CPU)
            epochs = [group.train_epoch()[10 * where - 5] for _ in range(3)]
            assert epochs[0].placement == Placement(trainer="rows", rows=count, place=where, threads=1)
            seen.append((epochs, group.model_state(10 * where - 5)))
        (one, state), (other, other_state) = seen
        assert one == other
        assert all(torch.equal(value, other_state[name]) for name, value in state.items())


def mixed_configs() -> dict[int, TrialConfig]:
    """Return twelve trials of six optimizers, one trial that freezes the body, and one without an update rule."""
    configs = {
        number: tiny_config(
            dataclasses.replace(OPTIMIZERS[number % 6], base_lr=0.003 * (number + 1)),
            OneCycle() if number % 2 else Step(step_size=2, gamma=0.5),
            epochs=5,
            clip_grad_norm=0.5 if number == 3 else None,
            param_groups=FROZEN_BODY if number in (4, 10) else BODY_AND_HEAD,
        )
        for number in range(12)
    }
    return {**configs, 12: tiny_config(Adafactor(base_lr=0.01), epochs=5)}


@pytest.mark.parametrize("build_model", [TinyModel, with_dropout, with_batch_norm])
@pytest.mark.parametrize(("processes", "limit"), [(1, None), (2, None), (3, 2), (1, 5)])
def test_a_trial_is_repeated_in_its_recorded_places_to_the_bit(
    build_model: Callable[[], nn.Module], processes: int, limit: int | None
) -> None:
    configs = mixed_configs()
    executor = LocalExecutor(tiny_workload(build_model), configs[0], device=CPU, rows=limit, processes=processes)
    group = executor.build(configs)
    history: dict[int, list[EpochMetrics]] = {number: [] for number in configs}
    for leaving in ([0, 1, 2], [5], [], [7, 8], []):
        for number, metrics in group.train_epoch().items():
            history[number].append(metrics)
        for number in leaving:
            group.drop(number)
    states = {number: group.model_state(number) for number in (3, 4, 12)}
    tests = group.test()
    executor.close()
    sizes = {epoch.placement.rows for epochs in history.values() for epoch in epochs if epoch.placement}
    assert len(sizes) > 2
    for number in (1, 3, 4, 6, 9, 12):
        epochs = history[number]
        placements = from_run_lengths(run_lengths([e.placement for e in epochs if e.placement]))
        replayed = executor.build({number: configs[number]}, placement=placements)
        again = [replayed.train_epoch()[number] for _ in epochs]
        assert [epoch.metrics for epoch in again] == [epoch.metrics for epoch in epochs]
        assert [epoch.lr for epoch in again] == [epoch.lr for epoch in epochs]
        if number in states:
            state = replayed.model_state(number)
            assert all(torch.equal(value, state[name]) for name, value in states[number].items())
            assert replayed.test() == {number: tests[number]}


def test_a_trial_that_is_repeated_goes_on_from_a_saved_state() -> None:
    config = tiny_config(Adam(base_lr=0.01), OneCycle())
    executor = LocalExecutor(tiny_workload(with_dropout), config, device=CPU)
    placements = [Placement(trainer="rows", rows=3, place=1, threads=1)] * 2
    placements += [Placement(trainer="rows", rows=2, place=1, threads=1)] * 2
    whole = executor.build({4: config}, placement=placements)
    history = [whole.train_epoch() for _ in range(2)]
    state = copy.deepcopy(whole.state_dict())
    history += [whole.train_epoch() for _ in range(2)]
    resumed = executor.build({4: config}, placement=placements)
    resumed.load_state_dict(state)
    assert [resumed.train_epoch() for _ in range(2)] == history[2:]


def test_a_plain_trial_can_be_trained_alone_with_every_thread() -> None:
    config = tiny_config(Adam(base_lr=0.01))
    executor = LocalExecutor(tiny_workload(), config, device=CPU)
    group = executor.build({0: config}, placement=[Placement(trainer="plain", threads=2)])
    assert group.train_epoch()[0].placement == Placement(trainer="plain", threads=2)
    assert torch.get_num_threads() == 1


def test_a_repeated_trial_that_diverges_or_is_dropped_has_left() -> None:
    config = tiny_config(SGD(base_lr=1e30))
    executor = LocalExecutor(tiny_workload(), config, device=CPU)
    placements = [Placement(trainer="rows", rows=3, place=1, threads=1)]
    diverged = executor.build({4: config}, placement=placements)
    assert diverged.train_epoch()[4].diverged is not None
    dropped = executor.build({4: tiny_config()}, placement=placements)
    dropped.train_epoch()
    dropped.drop(4)
    for group in (diverged, dropped):
        assert (group.train_epoch(), group.test(), group.state_dict()["trials"]) == ({}, {}, {})
