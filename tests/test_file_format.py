from __future__ import annotations

from typing import Any

import pytest

from pipeline.space.config import Settings
from pipeline.space.distributions import Choices, Range
from pipeline.space.file_format import MAX_COUNT, check, form_of, one_or_more
from pipeline.space.optimizers import OPTIMIZERS, SGD, AdamW, Rprop
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import SCHEDULERS, MultiStep, Step


def read(cls: type[Any], **values: Any) -> Any:
    form, problems = check(form_of(cls, searchable=True), values)
    return form if form is not None else [str(problem) for problem in problems]


def test_a_hyperparameter_is_a_value_choices_or_a_range() -> None:
    form = read(SGD, base_lr={"low": 0.1, "high": 1, "log": True}, momentum={"choices": [0, 0.9]}, dampening=0)
    assert isinstance(form.base_lr, Range)
    assert isinstance(form.momentum, Choices)
    assert (form.base_lr.high, form.momentum.choices, form.dampening) == (1.0, (0.0, 0.9), 0.0)
    assert form.nesterov is False  # not given: PyTorch's default


def test_a_step_need_not_lie_in_the_interval_of_the_values() -> None:
    assert read(Rprop, base_lr=0.1, eta_plus={"low": 1.1, "high": 1.5, "step": 0.1}).eta_plus.step == 0.1


def test_a_list_may_be_a_choice_and_one_pattern_need_be_no_list() -> None:
    assert read(MultiStep, milestones={"choices": [[2], [2, 4]]}).milestones.choices == ((2,), (2, 4))
    assert read(ParamGroup, pattern="fc.*").pattern == ("fc.*",)
    assert read(ParamGroup, pattern=["fc.*", "head.*"]).pattern == ("fc.*", "head.*")
    assert read(ParamGroup, dims=1, layers=["a.*", ["b.*", "c"]]).layers == (("a.*",), ("b.*", "c"))


@pytest.mark.parametrize(
    ("base_lr", "problem"),
    [
        (0, "base_lr: must be > 0, got 0"),
        (True, "base_lr: must be a finite number, got True"),
        ("1e-3", "base_lr: must be a finite number, got the text '1e-3'"),
        (float("nan"), "base_lr: must be a finite number, got nan"),
        (10**400, "base_lr: must be a finite number, got 1000"),
        ([0.1], "base_lr: must be a finite number, got [0.1]"),
        (None, "base_lr: must be a finite number, got None"),
    ],
)
def test_a_wrong_value_is_shown_with_the_rule(base_lr: Any, problem: str) -> None:
    assert read(SGD, base_lr=base_lr)[0].startswith(problem)


def test_a_count_is_a_whole_number_of_a_sensible_size() -> None:
    assert read(Step, step_size=2.5) == ["step_size: must be a whole number, got 2.5"]
    assert read(Step, step_size=0) == ["step_size: must be >= 1, got 0"]
    assert read(Step, step_size=MAX_COUNT + 1) == [f"step_size: must be <= {MAX_COUNT}, got {MAX_COUNT + 1}"]


def test_a_long_value_is_cut_short() -> None:
    (problem,) = read(Step, step_size="x" * 1000)
    assert problem.startswith("step_size: must be a whole number, got the text 'xxx")
    assert len(problem) < 120


def test_an_empty_section_is_refused_not_ignored() -> None:
    _, problems = check(one_or_more("Schedulers", SCHEDULERS), {"constant": {}, "onecycle": None})
    assert [str(problem) for problem in problems] == ["onecycle: must be a mapping, `key: value`, got None"]


def test_the_text_under_a_field_describes_it_in_derived_classes_too() -> None:
    fields = form_of(AdamW, searchable=True).model_fields
    assert fields["weight_decay"].description == "Per optimizer step; a parameter group may set its own."
    assert fields["amsgrad"].description is None


def test_a_limit_of_its_own_takes_the_place_of_the_largest_count() -> None:
    form = form_of(Settings, searchable=False)
    given = {"epochs": 1, "batch_size": 1}
    assert check(form, {**given, "seed": 2**32 - 1})[1] == []
    assert [str(problem) for problem in check(form, {**given, "seed": 2**32})[1]] == [
        "seed: must be <= 4294967295, got 4294967296"
    ]


@pytest.mark.parametrize("cls", [*OPTIMIZERS.values(), *SCHEDULERS.values(), ParamGroup])
def test_every_default_of_a_strategy_lies_in_its_own_legal_interval(cls: type[Any]) -> None:
    required = {"base_lr": 0.1, "step_size": 1, "step_size_up": 1, "milestones": [1], "gamma": 0.5, "T_0": 1}
    required |= {"max_lr_ratio": 2.0, "pattern": "*"}
    form = form_of(cls, searchable=True)
    given = {name: value for name, value in required.items() if name in form.model_fields}
    value, problems = check(form, given)
    assert problems == []
    assert value is not None
    assert check(form, value.model_dump())[0] == value


@pytest.mark.parametrize("cls", [*OPTIMIZERS.values(), *SCHEDULERS.values()])
def test_optimizers_and_schedulers_share_no_hyperparameter_name(cls: type[Any]) -> None:
    other = SCHEDULERS if cls in OPTIMIZERS.values() else OPTIMIZERS
    own = set(form_of(cls, searchable=True).model_fields)
    assert [name for name, them in other.items() if own & set(form_of(them, searchable=True).model_fields)] == []
