"""The executor of this machine: which trials train as rows, which plain, and which global state stays unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch
from test_probe import Recurrent, SpatialNorm, with_dropout
from tiny import BODY_AND_HEAD, TinyModel, tiny_config, tiny_workload
from torch import Tensor, nn

from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import ASGD, SGD, Adafactor, Adam, AdamW, Muon, NAdam, Rprop
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import Cosine, Cyclic, OneCycle, Plateau, Step
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import TrialGroup
from pipeline.training.executor import LocalExecutor
from pipeline.training.optim import replay_rates
from pipeline.training.plain import PlainTrials
from pipeline.workloads.workload import Metric

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
EPOCHS = 4
FROZEN_BODY = {"head": ParamGroup(pattern=("head.*",)), "body": ParamGroup(pattern=("*",), lr_ratio=0.0)}
FROZEN_HEAD = {"head": ParamGroup(pattern=("head.*",), lr_ratio=0.0), "body": ParamGroup(pattern=("*",))}


def executor_of(build_model: Callable[[], nn.Module] = TinyModel, *, rows: int | None = None) -> LocalExecutor:
    return LocalExecutor(tiny_workload(build_model), tiny_config(), device=CPU, rows=rows)


def various() -> dict[int, TrialConfig]:
    """Return rows of two matrices, since some freeze the body, and plain trials."""
    return {
        1: tiny_config(SGD(base_lr=0.1, momentum=0.9), OneCycle(cycle_momentum=True)),
        2: tiny_config(Muon(base_lr=0.02), Step(step_size=2)),
        3: tiny_config(AdamW(base_lr=0.01), Cosine(warmup=1), param_groups=FROZEN_BODY),
        5: tiny_config(NAdam(base_lr=0.01), Plateau(patience=0)),
        6: tiny_config(Adafactor(base_lr=0.01), Cosine(warmup=1)),
        7: tiny_config(ASGD(base_lr=0.1), Step(step_size=1, gamma=0.5), param_groups=FROZEN_BODY),
        8: tiny_config(Rprop(base_lr=1e-3)),
        9: tiny_config(Adam(base_lr=0.01, amsgrad=True)),
    }


def only(number: int, history: list[Mapping[int, EpochMetrics]]) -> list[EpochMetrics]:
    return [results[number] for results in history if number in results]


def train(group: TrialGroup, epochs: int = EPOCHS) -> list[Mapping[int, EpochMetrics]]:
    return [group.train_epoch() for _ in range(epochs)]


def places(history: list[Mapping[int, EpochMetrics]]) -> dict[int, tuple[str, int | None, int | None]]:
    """Return each trial's trainer, rows and place in the first epoch."""
    return {n: (m.placement.trainer, m.placement.rows, m.placement.place) for n, m in history[0].items() if m.placement}


def test_one_group_mixes_rows_and_plain_trials() -> None:
    executor = executor_of(rows=8)
    group = executor.build(various())
    assert executor.describe(various()) == "rows 2 + 3, plain 3"
    history = train(group)
    assert places(history) == {
        1: ("rows", 3, 2),
        2: ("plain", None, None),
        3: ("rows", 2, 1),
        5: ("rows", 3, 1),
        6: ("plain", None, None),
        7: ("rows", 2, 0),
        8: ("plain", None, None),
        9: ("rows", 3, 0),
    }
    for number in (2, 6, 8):
        plain = PlainTrials({number: various()[number]}, tiny_workload(), device=CPU, draws=())
        assert [plain.train_epoch()[number] for _ in range(EPOCHS)] == only(number, history)


def test_configs_that_freeze_different_groups_are_separate_matrices_and_what_is_frozen_stays() -> None:
    optimizer = AdamW(base_lr=0.1, weight_decay=0.1)
    groups = [BODY_AND_HEAD, FROZEN_BODY, FROZEN_HEAD, FROZEN_BODY]
    configs = {number: tiny_config(optimizer, param_groups=some) for number, some in enumerate(groups)}
    executor = executor_of(SpatialNorm, rows=8)
    group = executor.build(configs)
    assert executor.describe(configs) == "rows 1 + 2 + 1"
    start = PlainTrials({0: configs[0]}, tiny_workload(SpatialNorm), device=CPU)
    first = start.model_state(0)
    train(group, 2)
    for number, some in enumerate(groups):
        for name, _ in SpatialNorm().named_parameters():
            frozen = some["head" if name.startswith("head.") else "body"].lr_ratio == 0
            assert torch.equal(group.model_state(number)[name], first[name]) == frozen, (number, name)


@pytest.mark.parametrize("build_model", [TinyModel, with_dropout, Recurrent])
def test_threads_and_the_global_random_state_are_left_as_they_were(build_model: Callable[[], nn.Module]) -> None:
    torch.set_num_threads(2)
    random_state = torch.get_rng_state()
    group = executor_of(build_model).build(various())
    group.train_epoch()
    group.drop(1)
    group.test()
    group.model_state(3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == 2


def refuses(outputs: Tensor, targets: Tensor) -> Tensor:
    if not bool(torch.isfinite(outputs).all()):
        raise ValueError("input contains NaN")
    return (outputs.argmax(dim=1) == targets).double().mean()


def test_a_metric_that_refuses_what_diverged_does_not_fail_the_other_rows() -> None:
    workload = dataclasses.replace(tiny_workload(), metrics={"accuracy": Metric(refuses, "maximize")})
    configs = {number: tiny_config(SGD(base_lr=rate)) for number, rate in enumerate([0.01, 0.02, 1e30])}
    for rows in (1, 3):
        results = LocalExecutor(workload, configs[0], device=CPU, rows=rows).build(configs).train_epoch()
        assert [results[number].finished for number in configs] == [True, True, False]
        assert results[2].failed is None
        assert "the loss became" in str(results[2].diverged)


def test_the_rates_of_a_stored_trial_are_those_that_it_used() -> None:
    schedules = [
        OneCycle(),
        Plateau(patience=0, factor=0.5),
        Cosine(warmup=2),
        Cyclic(max_lr_ratio=3.0, step_size_up=2),
    ]
    configs = {n: tiny_config(SGD(base_lr=0.1), schedule, epochs=6) for n, schedule in enumerate(schedules)}
    history = train(executor_of().build(configs), 6)
    for number, config in configs.items():
        epochs = only(number, history)
        stored = [dataclasses.replace(epoch, lr={}) for epoch in epochs]
        assert list(replay_rates(config, stored, directions=tiny_workload().directions)) == epochs


def test_rules_of_another_kind_of_device_are_not_adopted() -> None:
    executor = executor_of(rows=3)
    executor.adopt(dataclasses.replace(executor.rules, device="cuda", row_limit=1))
    assert executor.rules.row_limit == 3
    executor.adopt(dataclasses.replace(executor.rules, row_limit=2, processes=5, plain_because={}))
    assert (executor.rules.row_limit, executor.rules.processes, executor.rules.plain_because) == (2, 5, {"8:": None})
