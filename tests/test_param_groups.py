from __future__ import annotations

from typing import Any

import pytest

from pipeline.space.param_groups import ParameterRule, ParamGroup, assign_groups, numbered_layers, torch_groups

DIMS = {"conv1.weight": 4, "conv1.bias": 1, "fc.weight": 2, "fc.bias": 1}
ALL = ParamGroup(pattern=("*",))
BIASES_AND_NORMS = (ParameterRule(dims=(1,)),)


def by_name(*patterns: str, **fields: Any) -> ParamGroup:
    return ParamGroup(pattern=patterns, **fields)


def problems_of(dims: dict[str, int], groups: dict[str, ParamGroup], **rules: Any) -> list[str]:
    return [str(problem) for problem in assign_groups(dims, groups, **rules)[1]]


def test_param_groups_first_matching_pattern_wins() -> None:
    groups, problems = assign_groups(DIMS, {"head": by_name("fc.*"), "biases": by_name("*.bias"), "rest": ALL})
    assert groups == {"head": ["fc.weight", "fc.bias"], "biases": ["conv1.bias"], "rest": ["conv1.weight"]}
    assert problems == []


def test_param_groups_keep_the_order_of_patterns_and_of_names() -> None:
    groups, _ = assign_groups(DIMS, {"b": by_name("fc.*"), "a": by_name("*.bias", "*.weight")})
    assert list(groups) == ["b", "a"]
    assert groups["a"] == ["conv1.weight", "conv1.bias"]


def test_a_group_takes_parameters_by_their_dimensions_alone_or_beside_a_pattern() -> None:
    groups, problems = assign_groups(
        DIMS,
        {"head_bias": by_name("fc.*", dims=(1,)), "biases": ParamGroup(dims=(1,)), "rest": ParamGroup(dims=(2, 4))},
    )
    assert groups == {"head_bias": ["fc.bias"], "biases": ["conv1.bias"], "rest": ["conv1.weight", "fc.weight"]}
    assert problems == []


def test_a_parameter_that_no_group_takes_is_a_problem() -> None:
    assert problems_of(DIMS, {"head": by_name("fc.*")}) == [
        "param_groups: no group takes conv1.weight, conv1.bias; add a last group with the pattern '*'"
    ]
    assert problems_of(DIMS, {"biases": ParamGroup(dims=(1,))}) == [
        "param_groups: no group takes conv1.weight (dims 4), fc.weight (dims 2); add a last group with the pattern '*'"
    ]


def test_a_pattern_that_matches_nothing_is_a_problem_and_shows_the_names() -> None:
    dims = {f"layer{number}.weight": 2 for number in range(10)}
    assert problems_of(dims, {"head": by_name("head.*"), "rest": ALL}) == [
        "param_groups.head: pattern 'head.*' matches no parameter; the model has layer0.weight, layer1.weight, "
        "layer2.weight, layer3.weight, layer4.weight, … (2 more), layer7.weight, layer8.weight, layer9.weight"
    ]


def test_a_pattern_that_is_the_name_of_a_module_is_a_problem_with_the_pattern_of_its_parameters() -> None:
    (problem,) = problems_of(DIMS, {"head": by_name("fc"), "rest": ALL})
    assert problem.endswith("the model has conv1.weight, conv1.bias, fc.weight, fc.bias; did you mean 'fc.*'?")


def test_dimensions_that_no_parameter_has_are_a_problem_and_show_what_there_is() -> None:
    assert problems_of({"fc.weight": 2}, {"norms": ParamGroup(dims=(0, 1)), "rest": ALL}) == [
        "param_groups.norms: dims 0 or 1 matches no parameter; the model has fc.weight (dims 2)"
    ]
    assert problems_of(DIMS, {"head": by_name("fc.*", "conv1.*", dims=(4,)), "rest": ALL}) == [
        "param_groups.head: pattern 'fc.*' with dims 4 matches no parameter; "
        "the model has fc.weight (dims 2), fc.bias (dims 1)"
    ]


@pytest.mark.parametrize(
    ("groups", "idle"),
    [
        ({"rest": ALL, "head": by_name("fc.*")}, "param_groups.head: pattern 'fc.*'"),
        ({"rest": by_name("*", "fc.*")}, "param_groups.rest: pattern 'fc.*'"),
        ({"rest": ALL, "biases": ParamGroup(dims=(1,))}, "param_groups.biases: dims 1"),
    ],
)
def test_a_rule_that_is_left_nothing_is_a_problem(groups: dict[str, ParamGroup], idle: str) -> None:
    assert problems_of(DIMS, groups) == [
        f"{idle} is left nothing: earlier rules take all that it matches; move it up or remove it"
    ]


def test_every_idle_pattern_and_what_is_left_over_are_said_at_once() -> None:
    _, problems = assign_groups(DIMS, {"head": by_name("FC.*"), "norm": by_name("bn*")})
    assert [problem.place for problem in problems] == ["param_groups.head", "param_groups.norm", "param_groups"]
    assert "'FC.*' matches no parameter" in problems[0].message  # case counts


def test_a_pattern_that_matches_only_a_tied_name_says_under_which_name_the_parameter_is_listed() -> None:
    dims, tied = {"embed.weight": 2, "norm.weight": 1}, {"head.weight": "embed.weight"}
    groups = {"head": by_name("head.*"), "scale": by_name("head.*", dims=(1,)), "rest": ALL}
    assert problems_of(dims, groups, tied=tied) == [
        "param_groups.head: pattern 'head.*' takes nothing: head.weight is tied to embed.weight, listed as "
        "embed.weight; use that name or remove it",
        "param_groups.scale: pattern 'head.*' with dims 1 matches no parameter; "
        "the model has embed.weight (dims 2), norm.weight (dims 1)",
    ]


VIT = {"cls": 3, "embed.weight": 4, "embed.bias": 1, "blocks.0.weight": 2, "blocks.0.norm": 1, "blocks.1.weight": 2}
VIT |= {"blocks.1.norm": 1, "head.weight": 2, "head.bias": 1}
LAYERS = (("cls", "embed.*"), ("blocks.0.*",), ("blocks.1.*",), ("head.*",))


def test_a_layer_has_the_decayed_rate_of_the_layer_after_it() -> None:
    groups = {"body": ParamGroup(layers=LAYERS, layer_decay=0.5, lr_ratio=3.0, weight_decay=0.1)}
    assigned, problems = assign_groups(VIT, groups)
    assert problems == []
    assert assigned == {
        "body.0": ["cls", "embed.weight", "embed.bias"],
        "body.1": ["blocks.0.weight", "blocks.0.norm"],
        "body.2": ["blocks.1.weight", "blocks.1.norm"],
        "body.3": ["head.weight", "head.bias"],
    }
    found = torch_groups(groups)
    assert {name: group.lr_ratio for name, group in found.items()} == {
        "body.0": 0.375,
        "body.1": 0.75,
        "body.2": 1.5,
        "body.3": 3.0,
    }
    assert {group.weight_decay for group in found.values()} == {0.1}


def test_no_weight_decay_parts_every_group_and_keeps_its_name_and_rate() -> None:
    groups = {"head": by_name("head.*", lr_ratio=4.0), "body": ParamGroup(layers=LAYERS[:3], layer_decay=0.5)}
    rules = (*BIASES_AND_NORMS, ParameterRule(pattern=("cls", "nothing*"), dims=(3,)))
    assigned, problems = assign_groups(VIT, groups, rules[:1])
    assert problems == []
    assert assigned == {
        "head": ["head.weight"],
        "head.no_weight_decay": ["head.bias"],
        "body.0": ["cls", "embed.weight"],
        "body.0.no_weight_decay": ["embed.bias"],
        "body.1": ["blocks.0.weight"],
        "body.1.no_weight_decay": ["blocks.0.norm"],
        "body.2": ["blocks.1.weight"],
        "body.2.no_weight_decay": ["blocks.1.norm"],
    }
    found = torch_groups(groups, rules)
    assert [(g.name, g.lr_ratio, g.weight_decay) for g in found.values()] == [
        ("head", 4.0, None),
        ("head", 4.0, 0.0),
        ("body.0", 0.25, None),
        ("body.0", 0.25, 0.0),
        ("body.1", 0.5, None),
        ("body.1", 0.5, 0.0),
        ("body.2", 1.0, None),
        ("body.2", 1.0, 0.0),
    ]
    assigned, (problem,) = assign_groups(VIT, groups, rules)
    assert assigned["body.0.no_weight_decay"] == ["cls", "embed.bias"]
    assert str(problem).startswith("no_weight_decay: pattern 'nothing*' with dims 3 matches no parameter; the model ")


def test_a_group_that_is_all_biases_is_no_problem_beside_no_weight_decay() -> None:
    groups, problems = assign_groups(DIMS, {"biases": by_name("*.bias"), "rest": ALL}, BIASES_AND_NORMS)
    assert problems == []
    assert groups["biases"] == []
    assert groups["biases.no_weight_decay"] == ["conv1.bias", "fc.bias"]


def test_numbered_layers_are_those_of_the_model_in_the_order_of_numbers() -> None:
    names = [f"blocks.{number}.{part}" for number in (10, 0, 2) for part in ("attn.1.weight", "mlp.bias")]
    layers = ["embed.*", ["blocks.{n}.attn.*", "blocks.{n}.mlp.*"], ["head.*"]]
    assert numbered_layers(layers, [*names, "embed.weight", "head.weight"]) == [
        ["embed.*"],
        ["blocks.0.attn.*", "blocks.0.mlp.*"],
        ["blocks.2.attn.*", "blocks.2.mlp.*"],
        ["blocks.10.attn.*", "blocks.10.mlp.*"],
        ["head.*"],
    ]
    assert numbered_layers([["layer.{n}.*"]], names) == [["layer.{n}.*"]]
