"""A searched batch size: trials of unlike batch size in one group and one search, with the same promises."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_study import new_study
from tiny import BODY_AND_HEAD, SAMPLES, on_device, tiny_config, tiny_workload

from pipeline.app.prepare import prepare
from pipeline.errors import InvalidInput
from pipeline.space.config import TrialConfig
from pipeline.space.load import load_space
from pipeline.space.optimizers import SGD, Adam, AdamW, Muon
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import Cosine, OneCycle, Step
from pipeline.space.trial import EpochMetrics
from pipeline.study.store import Store
from pipeline.training.contract import TrialGroup
from pipeline.training.executor import LocalExecutor
from pipeline.training.optim import replay_rates
from pipeline.training.plain import PlainTrials
from pipeline.training.rows import measure as measuring
from pipeline.workloads.streamed import Streamed

pytestmark = pytest.mark.usefixtures("one_thread")

SpaceFile = Callable[..., Path]
CPU = torch.device("cpu")
EPOCHS = 4
FROZEN_BODY = {"head": BODY_AND_HEAD["head"], "body": ParamGroup(pattern=("*",), lr_ratio=0.0)}


def mixed() -> dict[int, TrialConfig]:
    """Return trials of three batch sizes; the last step of an epoch has 5 samples, 7 or all."""
    return {
        1: tiny_config(SGD(base_lr=0.1, momentum=0.9), OneCycle(), batch_size=8),
        2: tiny_config(Adam(base_lr=0.01), Step(step_size=2), batch_size=10),
        3: tiny_config(SGD(base_lr=0.1), batch_size=10),
        4: tiny_config(Muon(base_lr=0.02), Cosine(interval="step"), batch_size=10),
        5: tiny_config(AdamW(base_lr=0.01), Cosine(interval="step", warmup=6), batch_size=8),
        6: tiny_config(SGD(base_lr=0.2), batch_size=SAMPLES),
        7: tiny_config(Adam(base_lr=0.01), batch_size=10, param_groups=FROZEN_BODY),
    }


def executor_of(**values: Any) -> LocalExecutor:
    return LocalExecutor(tiny_workload(), tiny_config(batch_size=SAMPLES), device=CPU, **values)


def train(group: TrialGroup, epochs: int = EPOCHS) -> dict[int, list[EpochMetrics]]:
    history = [group.train_epoch() for _ in range(epochs)]
    return {number: [results[number] for results in history] for number in history[0]}


def test_trials_of_each_batch_size_are_matrices_of_their_own_and_equal_plain_trials_in_float64() -> None:
    executor = executor_of(rows=8, dtype=torch.float64)
    assert executor.describe(mixed()) == "rows 2 + 1 + 2 + 1, plain 1"
    workload = on_device(tiny_workload(), device=CPU, dtype=torch.float64)
    for number, epochs in train(executor.build(mixed())).items():
        config = mixed()[number]
        plain = PlainTrials({number: config}, workload, device=CPU, dtype=torch.float64)
        for epoch in epochs:
            alone = plain.train_epoch()[number]
            assert epoch.step == alone.step == epoch.epoch * math.ceil(SAMPLES / config.batch_size)
            assert epoch.lr == alone.lr
            assert epoch.metrics == pytest.approx(alone.metrics, rel=1e-9, abs=1e-9)


def test_a_trial_of_a_mixed_group_is_repeated_to_the_bit_and_so_is_a_resumed_group() -> None:
    executor = executor_of(rows=8)
    group = executor.build(mixed())
    first = train(group, 2)
    state = copy.deepcopy(group.state_dict())  # whose tensors go on training
    second = train(group, 2)
    resumed = executor_of(rows=8).build(mixed())
    resumed.load_state_dict(state)
    assert train(resumed, 2) == second
    for number, config in mixed().items():
        epochs = first[number] + second[number]
        placements = [epoch.placement for epoch in epochs if epoch.placement is not None]
        assert train(executor.build({number: config}, placement=placements))[number] == epochs
        stored = [dataclasses.replace(epoch, lr={}) for epoch in epochs]
        assert list(replay_rates(config, stored, directions=tiny_workload().directions)) == epochs


def test_data_that_are_read_batch_by_batch_are_read_once_for_each_batch_size() -> None:
    workload = on_device(tiny_workload(), device=CPU)
    passes: list[int] = []

    class Counted(Streamed):
        def batches(self, indices: Any, *, seed: int) -> Any:
            if len(self) == SAMPLES and sum(map(len, indices)) == SAMPLES:  # a pass over the training data
                passes.append(len(indices[0]))
            return super().batches(indices, seed=seed)

    streamed = dataclasses.replace(workload, train=cast(Any, Counted(workload.train, device=CPU, dtype=torch.float32)))
    group = LocalExecutor(streamed, tiny_config(), device=CPU, rows=8).build(mixed())
    passes.clear()
    history = train(group)
    assert sorted(passes) == sorted([8, 10, SAMPLES] * EPOCHS)
    assert history == train(executor_of(rows=8).build(mixed()))


def test_the_probe_decides_for_each_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    per_sample = 2 * 3 * (6 * 8 + 8 * 3)  # FLOPs
    monkeypatch.setattr(measuring, "MAX_STEP_FLOPS", 20 * per_sample)
    executor = executor_of(rows=8)
    assert "gains nothing as a row" in str(executor.why_plain(mixed()[6]))
    assert executor.why_plain(mixed()[3]) is None
    assert executor.describe(mixed()) == "rows 2 + 1 + 2, plain 2"
    assert set(executor.rules.plain_because) == {"37:", "10:", "8:", "10:body"}


def test_verdicts_of_a_study_that_knew_no_batch_sizes_are_made_anew() -> None:
    executor = executor_of(rows=8)
    executor.adopt(dataclasses.replace(executor.rules, plain_because={"": None, "body": None}))
    assert executor.describe(mixed()) == "rows 2 + 1 + 2 + 1, plain 1"


STEPS = {"interval": "step", "step_size": {"low": "10%", "high": "50%"}, "warmup": "5%"}


def test_shares_of_steps_are_resolved_for_the_batch_size_of_each_trial(space_file: SpaceFile, tmp_path: Path) -> None:
    first = {"batch_size": 32, "scheduler": {"step": {"step_size": "30%"}}}
    sections = {"epochs": 3, "batch_size": {"choices": [64, 32]}, "scheduler": {"step": STEPS}, "enqueue": [first]}
    read = load_space(space_file(**sections))
    space, _ = prepare(read, source="space.yaml", device="cpu", searching=True)
    assert space.document == {**read.document, "steps_per_epoch": [20, 40]}
    study = new_study(Store(tmp_path), space, trials=32)
    configs = [config for config, _ in study.next_group(32).values()]
    assert {config.batch_size for config in configs} == {64, 32}
    for config in configs:
        steps = 3 * {64: 20, 32: 40}[config.batch_size]
        assert isinstance(config.scheduler, Step)
        assert config.scheduler.warmup == steps // 20
        assert steps // 10 <= config.scheduler.step_size <= steps // 2
    assert (configs[0].batch_size, configs[0].scheduler) == (32, Step(interval="step", step_size=36, warmup=6))


def test_a_length_in_steps_must_fit_the_run_of_every_batch_size(space_file: SpaceFile) -> None:
    sections = {"batch_size": {"choices": [16, 64, 128]}, "scheduler": {"step": {"interval": "step", "step_size": 60}}}
    with pytest.raises(InvalidInput) as caught:
        prepare(load_space(space_file(**sections)), source="space.yaml", device="cpu", searching=True)
    message = "scheduler.step.step_size: must be at most the 40 steps of the run at batch_size 128, got 60"
    assert [str(problem).partition(";")[0] for problem in caught.value.problems] == [message]
