"""Accumulated gradients, averaged weights, and double precision: plain, as rows, and in a loop as one writes it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tiny import BATCH, SAMPLES, TinyModel, on_device, tiny_config, tiny_workload
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.space.config import TrialConfig, derive_seed
from pipeline.space.optimizers import SGD, Adam
from pipeline.space.schedules import OneCycle, Step
from pipeline.space.trial import EpochMetrics
from pipeline.training.epoch import Accumulation
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.data import training_batches
from pipeline.workloads.workload import Split

CPU = torch.device("cpu")
Trainer = Callable[..., PlainTrials | FusedTrials]
trainers = pytest.mark.parametrize("trainer", [PlainTrials, FusedTrials])


def configs(**changes: Any) -> dict[int, TrialConfig]:
    one_cycle = OneCycle(interval="step")
    return {
        0: tiny_config(SGD(base_lr=0.1, momentum=0.9), Step(step_size=1, gamma=0.5), **changes),
        1: tiny_config(Adam(base_lr=0.01), one_cycle, **changes),
    }


def test_the_last_step_of_an_epoch_takes_the_batches_that_are_left() -> None:
    accumulation = Accumulation(accumulate=2, batch_size=8, samples=37)  # batches of 8, 8 | 8, 8 | 5
    assert accumulation.steps == 3
    assert [accumulation.begins(batch) for batch in range(5)] == [True, False, True, False, True]
    assert [accumulation.ends(batch) for batch in range(5)] == [False, True, False, True, True]
    assert [accumulation.share(batch) for batch in range(5)] == [0.5, 0.5, 0.5, 0.5, 1.0]
    assert [Accumulation(3, 8, 21).share(batch) for batch in range(3)] == [8 / 21, 8 / 21, 5 / 21]


@trainers
def test_accumulated_gradients_and_averaged_weights_are_those_of_a_loop_as_one_writes_it(trainer: Trainer) -> None:
    config = tiny_config(SGD(base_lr=0.1, momentum=0.9), accumulate=2, ema=0.8, clip_grad_norm=0.5)
    workload = on_device(tiny_workload(), device=CPU, dtype=torch.float64)
    group = trainer({0: config}, workload, device=CPU, dtype=torch.float64)
    history = [group.train_epoch()[0] for _ in range(2)]

    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = TinyModel().double()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses: list[float] = []
    for epoch in range(2):
        batches = list(training_batches(workload, config, epoch=epoch, device=CPU, dtype=torch.float64))
        losses = []
        for first in range(0, len(batches), 2):
            step = batches[first : first + 2]
            optimizer.zero_grad()
            for batch in step:
                loss = F.cross_entropy(model(batch.inputs), batch.targets)
                (loss * batch.size / sum(other.size for other in step)).backward()
                losses.append(loss.item() * batch.size / SAMPLES)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            average.update_parameters(model)
    assert isinstance(workload.val, Split)
    with torch.no_grad():
        outputs = average.module(workload.val.inputs)
    assert [epoch.step for epoch in history] == [3, 6]
    assert history[-1].metrics["train/loss"] == pytest.approx(sum(losses), rel=1e-12)
    val_loss = F.cross_entropy(outputs, workload.val.targets).item()
    assert history[-1].metrics["val/loss"] == pytest.approx(val_loss, rel=1e-12)
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(group.model_state(0)[name], value, rtol=1e-12, atol=1e-12)


@trainers
def test_accumulating_all_batches_of_an_epoch_is_one_step_on_all_its_samples(trainer: Trainer) -> None:
    few = {"epochs": 1, "batch_size": BATCH, "accumulate": 5}
    whole = {"epochs": 1, "batch_size": SAMPLES}
    states = []
    for changes in (few, whole):
        group = trainer(configs(**changes), tiny_workload(), device=CPU, dtype=torch.float64)
        assert {metrics.step for metrics in group.train_epoch().values()} == {1}
        states.append(group.model_state(0))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-12, atol=1e-12)


def test_rows_that_accumulate_and_average_equal_plain_trials() -> None:
    changes: Mapping[str, Any] = {"accumulate": 3, "ema": 0.9}
    histories = []
    for trainer in (PlainTrials, FusedTrials):
        group = trainer(configs(**changes), tiny_workload(), device=CPU, dtype=torch.float64)
        histories.append([group.train_epoch() for _ in range(4)])
    for plain, rows in zip(*histories, strict=True):
        for number in plain:
            assert rows[number].metrics == pytest.approx(plain[number].metrics, rel=1e-9)
            assert rows[number].lr == plain[number].lr
            assert rows[number].step == plain[number].step


@trainers
def test_a_trial_that_accumulates_and_averages_continues_from_its_state(trainer: Trainer) -> None:
    group, again = (trainer(configs(accumulate=2, ema=0.9), tiny_workload(), device=CPU) for _ in range(2))
    for _ in range(2):
        group.train_epoch()
    again.load_state_dict(copy.deepcopy(group.state_dict()))
    assert again.model_state(1).keys() == group.model_state(1).keys()
    for name, value in group.model_state(1).items():
        assert torch.equal(again.model_state(1)[name], value)
    assert again.train_epoch() == group.train_epoch()


@trainers
def test_the_mean_of_an_epochs_weights_is_that_of_a_loop_as_one_writes_it(trainer: Trainer) -> None:
    config = tiny_config(SGD(base_lr=0.1, momentum=0.9), accumulate=2)
    workload = on_device(tiny_workload(with_batch_norm), device=CPU, dtype=torch.float64)
    group = trainer({0: config}, workload, device=CPU, dtype=torch.float64)
    _, second = (group.train_epoch(average=average)[0] for average in (False, True))

    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = with_batch_norm().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        mean = AveragedModel(model)  # of the weights alone: the statistics of BatchNorm are the last ones
        batches = list(training_batches(workload, config, epoch=epoch, device=CPU, dtype=torch.float64))
        for first in range(0, len(batches), 2):
            step = batches[first : first + 2]
            optimizer.zero_grad()
            for batch in step:
                loss = F.cross_entropy(model(batch.inputs), batch.targets)
                (loss * batch.size / sum(other.size for other in step)).backward()
            optimizer.step()
            mean.update_parameters(model)
    assert isinstance(workload.val, Split)
    for evaluated, metrics in ((model, second.metrics), (mean.module, second.averaged)):
        with torch.no_grad():
            outputs = evaluated.eval()(workload.val.inputs)
        loss = F.cross_entropy(outputs, workload.val.targets).item()
        assert metrics["val/loss"] == pytest.approx(loss, rel=1e-12)
        assert metrics["val/accuracy"] == (outputs.argmax(dim=1) == workload.val.targets).double().mean().item()


@trainers
def test_the_mean_of_the_weights_changes_no_other_number(trainer: Trainer) -> None:
    def history(*averages: bool) -> list[dict[int, EpochMetrics]]:
        group = trainer(configs(), tiny_workload(lambda: TinyModel(dropout=0.5, batch_norm=True)), device=CPU)
        return [dict(group.train_epoch(average=average)) for average in averages]

    without, with_mean = history(False, False, False), history(False, True, False)
    assert [sorted(epoch[0].averaged) for epoch in with_mean] == [[], ["val/accuracy", "val/loss"], []]
    for epoch in with_mean:
        for number, metrics in epoch.items():
            epoch[number] = dataclasses.replace(metrics, averaged={})
    assert with_mean == without


@trainers
def test_a_trial_whose_metrics_are_of_averages_has_no_other_mean(trainer: Trainer) -> None:
    group = trainer(configs(ema=0.9), tiny_workload(), device=CPU)
    assert all(not metrics.averaged for metrics in group.train_epoch(average=True).values())


def test_means_of_rows_equal_those_of_plain_trials() -> None:
    plain, rows = (
        trainer(configs(accumulate=3), tiny_workload(), device=CPU, dtype=torch.float64).train_epoch(average=True)
        for trainer in (PlainTrials, FusedTrials)
    )
    for number, metrics in plain.items():
        assert rows[number].averaged == pytest.approx(metrics.averaged, rel=1e-9)


def with_batch_norm() -> TinyModel:
    return TinyModel(batch_norm=True)
