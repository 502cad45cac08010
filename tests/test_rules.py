from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from pipeline.app.prepare import objective_problems, problems_with_model
from pipeline.errors import InvalidInput
from pipeline.space import rules
from pipeline.space.config import Digits
from pipeline.space.load import load_space
from pipeline.workloads.load import load_workload
from pipeline.workloads.workload import Workload

SpaceFile = Callable[..., Path]
LR = {"low": 1e-3, "high": 1.0}
BETWEEN = {"low": 0.8, "high": 0.9}
WHEEL = {"max_lr_ratio": 2, "step_size_up": 3, "cycle_momentum": True}
CYCLE = {"cycle_momentum": True}


def sgd(**values: Any) -> dict[str, Any]:
    return {"optimizer": {"sgd": {"base_lr": LR, **values}}}


def rprop(**values: Any) -> dict[str, Any]:
    return {"optimizer": {"rprop": {"base_lr": LR, **values}}}


def schedule(name: str, **values: Any) -> dict[str, Any]:
    return {"scheduler": {name: values}}


def group(**values: Any) -> dict[str, Any]:
    return {"param_groups": {"all": {"pattern": "*", **values}}}


def layers(lowest: float) -> dict[str, Any]:
    deep = {"layers": ["conv1.*", "*"], "layer_decay": {"low": lowest, "high": 1.0}}
    return {"param_groups": {"all": deep}}


# The broken sections, what is said about them, and the nearest sections that are accepted. A run has 4 epochs.
BROKEN: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (
        {"objective": {"metric": "train/loss", "direction": "minimize"}},
        "objective.metric: must be a validation metric, such as val/accuracy, got 'train/loss'",
        {"objective": {"metric": "val/loss", "direction": "minimize"}},
    ),
    ({"optimizer": {}}, "optimizer: must name at least one optimizer", sgd()),
    ({"scheduler": {}}, "scheduler: must name at least one scheduler", schedule("constant")),
    (
        sgd(nesterov=True, momentum={"choices": [0, 0.9]}),
        "optimizer.sgd.nesterov: needs a momentum above 0 in every trial; raise momentum or remove nesterov",
        sgd(nesterov=True, momentum={"choices": [0.5, 0.9]}),
    ),
    (
        sgd(nesterov={"choices": [True, False]}, momentum=0.9, dampening={"low": 0, "high": 0.1}),
        "optimizer.sgd.nesterov: needs a dampening of 0 in every trial; remove dampening or nesterov",
        sgd(nesterov=False, momentum=0.9, dampening={"low": 0, "high": 0.1}),
    ),
    (
        rprop(step_size_min={"low": 0.1, "high": 2}, step_size_max={"low": 1, "high": 5}),
        "optimizer.rprop.step_size_min: must be at most step_size_max in every trial",
        rprop(step_size_min={"low": 0.1, "high": 1}, step_size_max={"low": 1, "high": 5}),
    ),
    (
        schedule("constant", warmup={"low": 0, "high": 4}),
        "scheduler.constant.warmup: must be shorter than the run of 4 epochs, got 4",
        schedule("constant", warmup={"low": 0, "high": 3}),
    ),
    (
        schedule("step", step_size={"low": 1, "high": 5}),
        "scheduler.step.step_size: must be at most the 4 epochs of the run, got 5",
        schedule("step", step_size={"low": 1, "high": 4}),
    ),
    (
        schedule("step", step_size=4, warmup=1),
        "scheduler.step.step_size: must be at most the 3 epochs of the run after the warm-up, got 4",
        schedule("step", step_size=3, warmup=1),
    ),
    (
        schedule("multistep", milestones={"choices": [[1, 2], [3, 2]]}),
        "scheduler.multistep.milestones: must not decrease, got [3, 2]; put them in order",
        schedule("multistep", milestones={"choices": [[1, 2], [2, 2]]}),
    ),
    (
        schedule("multistep", milestones=[1, 5]),
        "scheduler.multistep.milestones: must be at most the 4 epochs of the run, got 5; lower it to that",
        schedule("multistep", milestones=[1, 4]),
    ),
    (
        schedule("onecycle", interval="epoch", pct_start={"low": 0.25, "high": 0.5}),
        "scheduler.onecycle.pct_start: must be above 0.25, so that the rise takes over one of the 4 epochs of the run",
        schedule("onecycle", interval="epoch", pct_start={"low": 0.3, "high": 0.9}),
    ),
    (
        schedule("onecycle", interval="epoch", pct_start=0.75, three_phase=True),
        "scheduler.onecycle.pct_start: must be at most 0.5 with three_phase, got 0.75",
        schedule("onecycle", interval="epoch", pct_start=0.5, three_phase=True),
    ),
    (
        {**schedule("onecycle", interval="epoch"), "epochs": 1},
        "scheduler.onecycle.interval: needs at least 2 epochs, or `interval: step`, got the 1 epoch of the run",
        {**schedule("onecycle", interval="step"), "epochs": 1},
    ),
    (
        {**group(weight_decay=0.1), "optimizer": {"sgd": {"base_lr": LR}, "rprop": {"base_lr": LR}}},
        "param_groups.all.weight_decay: must be absent with rprop, which has no weight decay",
        {**group(weight_decay=0.1), "optimizer": {"sgd": {"base_lr": LR}}},
    ),
    (
        schedule("cosine", eta_min=1e-2),
        "scheduler.cosine.eta_min: must be at most the smallest rate, 0.001 of sgd times its lr_ratio, got 0.01",
        schedule("cosine", eta_min=1e-3),
    ),
    (
        {**schedule("plateau", min_lr=1e-3), **group(lr_ratio={"low": 0.5, "high": 2})},
        "scheduler.plateau.min_lr: must be at most the smallest rate, 0.0005 of sgd times its lr_ratio, got 0.001",
        {**schedule("plateau", min_lr=1e-3), **group(lr_ratio={"low": 1, "high": 2})},
    ),
    (
        {**schedule("onecycle", **CYCLE, max_momentum=BETWEEN, base_momentum=0.85), **sgd()},
        "scheduler.onecycle.base_momentum: must be at most max_momentum in every trial",
        {**schedule("onecycle", **CYCLE, max_momentum=BETWEEN, base_momentum=0.8), **sgd()},
    ),
    (
        {**schedule("cyclic", **WHEEL), "optimizer": {"adagrad": {"base_lr": LR}}},
        "scheduler.cyclic.cycle_momentum: must be false, since adagrad has no momentum",
        {**schedule("cyclic", **WHEEL), "optimizer": {"adam": {"base_lr": LR}}},
    ),
    (
        {**schedule("cyclic", **WHEEL), **sgd(momentum=BETWEEN)},
        "scheduler.cyclic.cycle_momentum: must be false beside the searched optimizer.sgd.momentum",
        {**schedule("cyclic", **WHEEL), **sgd(momentum=0.9)},
    ),
    (
        {**rprop(), **schedule("step", step_size=2)},
        "optimizer.rprop: needs a constant rate, since it reads the rate at its first step only; remove scheduler.step",
        {**rprop(), **schedule("constant")},
    ),
    (
        {**rprop(), **schedule("constant", warmup=1)},
        "optimizer.rprop: needs a constant rate, since it reads the rate at its first step only; remove the warm-up",
        {**rprop(), **schedule("constant", warmup=0)},
    ),
    (
        {**rprop(), "param_groups": {"head": {"pattern": "fc.*", "lr_ratio": 0}, "rest": {"pattern": "*"}}},
        "param_groups.head.lr_ratio: must be above 0 with rprop, got 0",
        {**rprop(), "param_groups": {"head": {"pattern": "fc.*", "lr_ratio": 2}, "rest": {"pattern": "*"}}},
    ),
    (
        {**rprop(), **group(weight_decay=0.1)},
        "param_groups.all.weight_decay: must be absent with rprop, which has no weight decay",
        {**rprop(), **group(weight_decay=None)},
    ),
    (
        {**rprop(), "no_weight_decay": {"dims": 1}},
        "no_weight_decay: must be absent with rprop, which has no weight decay",
        {**sgd(), "no_weight_decay": {"dims": 1}},
    ),
    (
        {**schedule("cosine", eta_min=0.0006), **layers(0.5)},
        "scheduler.cosine.eta_min: must be at most the smallest rate, 0.0005 of sgd times its lr_ratio, got 0.0006",
        {**schedule("cosine", eta_min=0.0006), **layers(0.9)},
    ),
    (
        group(lr_ratio={"choices": [0, 1]}),
        "param_groups: every group can be frozen (lr_ratio 0) at once; give one a ratio above 0",
        {"param_groups": {"head": {"pattern": "fc.*", "lr_ratio": 0}, "rest": {"pattern": "*"}}},
    ),
]


@pytest.mark.parametrize(("sections", "problem", "neighbour"), BROKEN, ids=[problem for _, problem, _ in BROKEN])
def test_a_space_that_breaks_a_rule_is_refused_and_its_neighbour_is_not(
    space_file: SpaceFile, sections: dict[str, Any], problem: str, neighbour: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput, match="1 problem\n") as caught:
        load_space(space_file(**sections))
    assert problem in str(caught.value)
    load_space(space_file(**neighbour))


@pytest.fixture(scope="module")
def digits() -> Workload:
    workload = load_workload(Digits())
    assert isinstance(workload, Workload)
    return workload


def with_model(path: Path, workload: Workload) -> list[str]:
    return [str(p) for p in problems_with_model(load_space(path), workload, workload.build_model())]


# Digits has 1,257 samples to train on: at a batch size of 64, 20 steps an epoch and 80 steps a run.
BROKEN_WITH_MODEL: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (
        {"param_groups": {"head": {"pattern": "head.*"}, "rest": {"pattern": "*"}}},
        "param_groups.head: pattern 'head.*' matches no parameter; the model has conv1.weight, conv1.bias, "
        "conv2.weight, conv2.bias, fc.weight, fc.bias",
        {"param_groups": {"head": {"pattern": "fc.*"}, "rest": {"pattern": "*"}}},
    ),
    (
        group(pattern=["conv*"]),
        "param_groups: no group takes fc.weight, fc.bias; add a last group with the pattern '*'",
        group(pattern=["conv*", "fc.*"]),
    ),
    (
        {"batch_size": 1258},
        "batch_size: must be at most the 1257 training samples, got 1258",
        {"batch_size": 1257},
    ),
    (
        schedule("plateau", metric="val/acuracy"),
        "scheduler.plateau.metric: unknown metric 'val/acuracy'; did you mean val/accuracy?",
        schedule("plateau", metric="train/loss"),
    ),
    (
        schedule("step", interval="step", step_size=81),
        "scheduler.step.step_size: must be at most the 80 steps of the run, got 81",
        schedule("step", interval="step", step_size=80),
    ),
    (
        schedule("cosine", interval="step", warmup=80),
        "scheduler.cosine.warmup: must be shorter than the run of 80 steps, got 80",
        schedule("cosine", interval="step", warmup=79),
    ),
    (
        schedule("onecycle", pct_start=0.0125),
        "scheduler.onecycle.pct_start: must be above 0.0125, so that the rise takes over one of the 80 steps",
        schedule("onecycle", pct_start=0.02),
    ),
]


@pytest.mark.parametrize(
    ("sections", "problem", "neighbour"), BROKEN_WITH_MODEL, ids=[problem for _, problem, _ in BROKEN_WITH_MODEL]
)
def test_a_space_that_does_not_fit_its_model_is_refused_and_its_neighbour_is_not(
    space_file: SpaceFile, digits: Workload, sections: dict[str, Any], problem: str, neighbour: dict[str, Any]
) -> None:
    (found,) = with_model(space_file(**sections), digits)
    assert found.startswith(problem)
    assert with_model(space_file(**neighbour), digits) == []


def test_a_model_without_parameters_is_refused(space_file: SpaceFile, digits: Workload) -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    for model in (nn.Flatten(), frozen):
        found = problems_with_model(load_space(space_file()), digits, model)
        assert [str(problem) for problem in found] == ["workload.model: has no parameter to train"]


def test_an_objective_must_be_a_metric_of_the_workload_in_its_direction(
    space_file: SpaceFile, digits: Workload
) -> None:
    said = {}
    for metric, direction in [("val/acc", "maximize"), ("val/loss", "maximize"), ("val/loss", "minimize")]:
        space = load_space(space_file(objective={"metric": metric, "direction": direction}))
        said[metric, direction] = [str(problem) for problem in objective_problems(space, digits)]
    assert said == {
        ("val/acc", "maximize"): ["objective.metric: unknown metric 'val/acc'; did you mean val/accuracy?"],
        ("val/loss", "maximize"): ["objective.direction: must be minimize for val/loss, got maximize"],
        ("val/loss", "minimize"): [],
    }


def test_what_a_space_hardly_means_is_warned_about(space_file: SpaceFile) -> None:
    doubtful = {**sgd(momentum={"low": 0.9, "high": 0.9}), **schedule("exponential", gamma=1.0)}
    assert list(rules.warnings(load_space(space_file(**doubtful)))) == [
        "sgd.momentum: low equals high, so this is the constant 0.9",
        "scheduler.exponential.gamma: a gamma of 1 leaves the rate as it is",
    ]
    usual = {**sgd(momentum=0.9), **schedule("cyclic", max_lr_ratio=2, step_size_up=3)}
    assert list(rules.warnings(load_space(space_file(**usual)))) == []
