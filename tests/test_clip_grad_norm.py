"""Gradient clipping by norm: a limit per trial, in both trainers, fixed or searched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from tiny import BODY_AND_HEAD, RULES, TinyModel, on_device, tiny_config, tiny_workload
from torch import Tensor

from pipeline.errors import InvalidInput
from pipeline.space.config import TrialConfig, derive_seed
from pipeline.space.load import load_config, load_space
from pipeline.space.optimizers import SGD, Adam, AdamW, RMSprop
from pipeline.space.param_groups import ParamGroup
from pipeline.space.trial import EpochMetrics
from pipeline.study.store import Store
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.data import training_batches

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
LIMITS = (None, 0.01, 0.1, 0.5, 1e6)
"""None, limits that shorten every gradient or some, and one that none exceeds."""
FROZEN_BODY = {"head": ParamGroup(pattern=("head.*",)), "body": ParamGroup(pattern=("*",), lr_ratio=0.0)}


def clipped(groups: Mapping[str, ParamGroup] = BODY_AND_HEAD) -> dict[int, TrialConfig]:
    """Return trials of several optimizers, each with every limit."""
    optimizers = (SGD(base_lr=0.3, momentum=0.9), Adam(base_lr=0.03), AdamW(base_lr=0.03), RMSprop(base_lr=0.01))
    kinds = [(optimizer, limit) for limit in LIMITS for optimizer in optimizers]
    return {n: tiny_config(o, clip_grad_norm=limit, param_groups=groups) for n, (o, limit) in enumerate(kinds)}


def trained(
    configs: Mapping[int, TrialConfig], *, dropped: Sequence[int] = ()
) -> dict[int, tuple[list[EpochMetrics], dict[str, Tensor]]]:
    """Train rows for three epochs, some for one; return the epochs and the state of those that are left."""
    group = FusedTrials(configs, on_device(tiny_workload(), device=CPU), device=CPU)
    history = [group.train_epoch()]
    for number in dropped:
        group.drop(number)
    history += [group.train_epoch() for _ in range(2)]
    return {number: ([epoch[number] for epoch in history], group.model_state(number)) for number in group.configs}


def with_other_limits(configs: Mapping[int, TrialConfig], *, but: Sequence[int]) -> dict[int, TrialConfig]:
    """Return configs of which all but some have another limit, or have one instead of none."""
    other = dict(zip(LIMITS, (*LIMITS[1:], None), strict=True))
    return {
        n: config if n in but else dataclasses.replace(config, clip_grad_norm=other[config.clip_grad_norm])
        for n, config in configs.items()
    }


def assert_same(
    found: tuple[list[EpochMetrics], dict[str, Tensor]], expected: tuple[list[EpochMetrics], dict[str, Tensor]]
) -> None:
    assert found[0] == expected[0]
    assert [name for name, value in expected[1].items() if not torch.equal(found[1][name], value)] == []


@pytest.mark.parametrize("groups", [BODY_AND_HEAD, FROZEN_BODY])
def test_rows_are_clipped_as_the_plain_trainer_clips(groups: Mapping[str, ParamGroup]) -> None:
    configs, workload = clipped(groups), on_device(tiny_workload(), device=CPU, dtype=torch.float64)
    plain = PlainTrials(configs, workload, device=CPU, dtype=torch.float64)
    fused = FusedTrials(configs, workload, device=CPU, dtype=torch.float64)
    for _ in range(3):
        expected, found = plain.train_epoch(), fused.train_epoch()
        for number in configs:
            assert found[number].metrics == pytest.approx(expected[number].metrics, rel=1e-9)
    for number in configs:
        for name, value in plain.model_state(number).items():
            torch.testing.assert_close(fused.model_state(number)[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trainer", [PlainTrials, FusedTrials])
@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_a_step_is_that_of_a_gradient_clipped_by_torch(
    trainer: Callable[..., PlainTrials | FusedTrials], limit: float
) -> None:
    config = tiny_config(SGD(base_lr=0.5), clip_grad_norm=limit)
    workload = on_device(tiny_workload(), device=CPU, dtype=torch.float64)
    group = trainer({0: config, 1: config}, workload, device=CPU, dtype=torch.float64)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = TinyModel().double()
    batch = next(training_batches(workload, config, epoch=0, device=CPU, dtype=torch.float64))
    workload.loss(model(batch.inputs), batch.targets).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    assert 0.1 < norm < 10
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.5 * parameter.grad)
    group.begin_epoch()
    group.train_step(batch)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(group.model_state(0)[name], value, rtol=1e-12, atol=1e-12)


def test_each_row_has_a_limit_of_its_own() -> None:
    configs = {n: tiny_config(SGD(base_lr=1.0), clip_grad_norm=limit) for n, limit in enumerate((0.01, 0.02, None))}
    workload = on_device(tiny_workload(), device=CPU, dtype=torch.float64)
    group = FusedTrials(configs, workload, device=CPU, dtype=torch.float64)
    start = {name: value.clone() for name, value in group.model_state(0).items()}
    group.begin_epoch()
    group.train_step(next(group.training_batches()))
    moved = [
        math.sqrt(sum(float(((value - start[name]) ** 2).sum()) for name, value in group.model_state(number).items()))
        for number in configs
    ]
    assert moved[:2] == pytest.approx([0.01, 0.02], rel=1e-3)  # torch's own 1e-6 beside the norm
    assert moved[2] > 0.1


@pytest.mark.parametrize("rows", [2, 3, 8, 20])
def test_the_limits_of_other_rows_affect_no_bit(rows: int) -> None:
    some = dict(list(clipped().items())[-rows:])
    expected = trained(some)
    for number in some:
        assert_same(trained(with_other_limits(some, but=[number]))[number], expected[number])


def test_a_row_without_a_limit_is_the_same_to_the_bit_whether_or_not_others_have_one() -> None:
    with_limits = clipped()
    without = {n: dataclasses.replace(config, clip_grad_norm=None) for n, config in with_limits.items()}
    found, expected = trained(with_limits), trained(without)
    for number, config in with_limits.items():
        if config.clip_grad_norm is None:
            assert_same(found[number], expected[number])


def test_rows_keep_their_limits_when_others_are_dropped() -> None:
    configs, workload = clipped(), on_device(tiny_workload(), device=CPU, dtype=torch.float64)
    plain = PlainTrials(configs, workload, device=CPU, dtype=torch.float64)
    fused = FusedTrials(configs, workload, device=CPU, dtype=torch.float64)
    for _ in range(3):
        expected, found = plain.train_epoch(), fused.train_epoch()
        assert found.keys() == expected.keys()
        for number, epoch in expected.items():
            assert found[number].metrics == pytest.approx(epoch.metrics, rel=1e-9)
        for number in [*expected][:: len(expected) // 4]:
            plain.drop(number)
            fused.drop(number)


def test_the_limits_of_rows_that_are_dropped_affect_no_bit() -> None:
    configs = clipped()
    dropped, left = [*configs][::2], [*configs][1::2]
    expected = trained(configs, dropped=dropped)
    found = trained(with_other_limits(configs, but=left), dropped=dropped)
    assert found.keys() == expected.keys() == set(left)
    for number in left:
        assert_same(found[number], expected[number])


def test_the_limit_of_another_row_does_not_affect_a_row_without_one_even_when_its_norm_overflows() -> None:
    workload = on_device(tiny_workload(), device=CPU)
    steep = dataclasses.replace(workload, loss=lambda outputs, targets: 1e25 * workload.loss(outputs, targets))

    def first_row(other_limit: float | None) -> EpochMetrics:
        limits = (None, other_limit)
        configs = {n: tiny_config(Adam(base_lr=0.01), clip_grad_norm=limit) for n, limit in enumerate(limits)}
        return FusedTrials(configs, steep, device=CPU).train_epoch()[0]

    assert first_row(None).finished
    assert first_row(0.1) == first_row(None)


def test_a_limit_is_fixed_or_searched_by_a_file(space_file: Callable[..., Path], tmp_path: Path) -> None:
    path = space_file(
        clip_grad_norm={"low": 0.1, "high": 10.0, "log": True}, enqueue=[{"clip_grad_norm": 0.5}, {"clip_grad_norm": 1}]
    )
    space = load_space(path)
    assert "clip_grad_norm" in space.searched_hyperparameters()
    assert [dict(entry) for entry in space.enqueue] == [{"clip_grad_norm": 0.5}, {"clip_grad_norm": 1}]
    study = Store(tmp_path).create(space, name="clip-1", trials=6, rules=RULES)
    proposed = [config.clip_grad_norm for config, _ in study.next_group(6).values()]
    assert len(set(proposed)) == len(proposed)
    assert all(limit is not None and 0.1 <= limit <= 10 for limit in proposed)
    assert load_space(space_file(clip_grad_norm=2)).example().clip_grad_norm == 2
    assert load_space(space_file()).example().clip_grad_norm is None
    one = load_config(space_file(clip_grad_norm=2, optimizer={"sgd": {"base_lr": 0.1}}))[1]
    assert TrialConfig.from_dict(one.to_dict()) == one


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"clip_grad_norm": 0}, r"clip_grad_norm: must be > 0, got 0"),
        (
            {"clip_grad_norm": 2, "enqueue": [{"clip_grad_norm": 3}]},
            r"enqueue\.0\.clip_grad_norm: must be 2\.0, as in this space, got 3",
        ),
        (
            {"enqueue": [{"clip_grad_norm": 3}]},
            r"enqueue\.0\.clip_grad_norm: must be null, as in this space, got 3",
        ),
        (
            {"clip_grad_norm": {"choices": [1, 2]}, "enqueue": [{"clip_grad_nrm": 1}]},
            r"enqueue\.0\.clip_grad_nrm: unknown key; did you mean clip_grad_norm\?",
        ),
    ],
)
def test_a_limit_that_cannot_be_is_refused(
    sections: dict[str, object], message: str, space_file: Callable[..., Path]
) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_space(space_file(**sections))
