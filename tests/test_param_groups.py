from __future__ import annotations

import pytest

from pipeline.space.param_groups import assign_groups

NAMES = ["conv1.weight", "conv1.bias", "fc.weight", "fc.bias"]


def test_param_groups_first_matching_pattern_wins() -> None:
    groups, problems = assign_groups(NAMES, {"head": ("fc.*",), "biases": ("*.bias",), "rest": ("*",)})
    assert groups == {"head": ["fc.weight", "fc.bias"], "biases": ["conv1.bias"], "rest": ["conv1.weight"]}
    assert problems == []


def test_param_groups_keep_the_order_of_patterns_and_of_names() -> None:
    groups, _ = assign_groups(NAMES, {"b": ("fc.*",), "a": ("*.bias", "*.weight")})
    assert list(groups) == ["b", "a"]
    assert groups["a"] == ["conv1.weight", "conv1.bias"]


def test_a_parameter_that_no_group_takes_is_a_problem() -> None:
    _, problems = assign_groups(NAMES, {"head": ("fc.*",)})
    assert [str(problem) for problem in problems] == [
        "param_groups: no group takes conv1.weight, conv1.bias; add a last group with the pattern '*'"
    ]


def test_a_pattern_that_matches_nothing_is_a_problem_and_shows_the_names() -> None:
    names = [f"layer{number}.weight" for number in range(10)]
    _, problems = assign_groups(names, {"head": ("head.*",), "rest": ("*",)})
    assert [str(problem) for problem in problems] == [
        "param_groups.head: pattern 'head.*' matches no parameter; the model has layer0.weight, layer1.weight, "
        "layer2.weight, layer3.weight, layer4.weight, layer5.weight, layer6.weight, layer7.weight, … (2 more)"
    ]


@pytest.mark.parametrize(
    ("patterns", "idle"),
    [
        ({"rest": ("*",), "head": ("fc.*",)}, "param_groups.head: pattern 'fc.*'"),
        ({"rest": ("*", "fc.*")}, "param_groups.rest: pattern 'fc.*'"),
    ],
)
def test_a_pattern_that_is_left_nothing_is_a_problem(patterns: dict[str, tuple[str, ...]], idle: str) -> None:
    _, problems = assign_groups(NAMES, patterns)
    assert [str(problem) for problem in problems] == [
        f"{idle} is left nothing: earlier patterns take all that it matches; move it up or remove it"
    ]


def test_every_idle_pattern_and_what_is_left_over_are_said_at_once() -> None:
    _, problems = assign_groups(NAMES, {"head": ("FC.*",), "norm": ("bn*",)})
    assert [problem.place for problem in problems] == ["param_groups.head", "param_groups.norm", "param_groups"]
    assert "'FC.*' matches no parameter" in problems[0].message  # case counts
