import argparse
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import InvalidInput
from pipeline.space.distributions import Range
from pipeline.space.load import load_config, load_space
from pipeline.space.overrides import override, parse_override

SpaceFile = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "place", "value"),
    [
        ("epochs=5", "epochs", 5),
        ("optimizer.sgd.base_lr.high=5e-1", "optimizer.sgd.base_lr.high", 0.5),
        ("workload.folder=a=b", "workload.folder", "a=b"),
        ("param_groups.head={pattern: 'fc.*'}", "param_groups.head", {"pattern": "fc.*"}),
        ("param_groups.head=null", "param_groups.head", None),
        ("optimizer.sgd.momentum={choices: [0, 0.9]}", "optimizer.sgd.momentum", {"choices": [0, 0.9]}),
    ],
)
def test_an_override_is_a_place_and_a_value_in_yaml(text: str, place: str, value: object) -> None:
    assert parse_override(text) == (place, value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs", "must be PLACE=VALUE, such as batch_size=32, got 'epochs'"),
        ("=5", "must be PLACE=VALUE"),
        ("a..b=5", "must be PLACE=VALUE"),
        ("epochs=[", "epochs: "),
        ("epochs=5\nseed: 3", "epochs: must be one value"),
    ],
)
def test_what_is_no_override_is_refused(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{re.escape(message)}"):
        parse_override(text)


def test_overrides_replace_add_and_remove_and_leave_their_source_as_it_was() -> None:
    data = {"epochs": 4, "optimizer": {"sgd": {"base_lr": 0.1}, "adam": {}}}
    changed = override(data, {"epochs": 5, "optimizer.sgd.base_lr": 0.2, "optimizer.adam": None, "a.b.c": 1})
    assert changed == {"epochs": 5, "optimizer": {"sgd": {"base_lr": 0.2}}, "a": {"b": {"c": 1}}}
    assert data == {"epochs": 4, "optimizer": {"sgd": {"base_lr": 0.1}, "adam": {}}}


def test_a_place_within_a_number_cannot_be_set() -> None:
    message = "epochs.most: cannot be set, since epochs is 4 and no mapping"
    with pytest.raises(InvalidInput, match=re.escape(message)):
        override({"epochs": 4}, {"epochs.most": 5})


def test_an_overridden_space_is_the_space_of_a_file_that_says_so(space_file: SpaceFile) -> None:
    space = load_space(space_file(), {"epochs": 5, "optimizer.sgd.base_lr.high": 0.5})
    written = load_space(
        space_file(epochs=5, optimizer={"sgd": {"base_lr": {"low": 1e-3, "high": 0.5, "log": True}}}), {}
    )
    assert space == written
    assert space.optimizers["sgd"]["base_lr"] == Range(low=1e-3, high=0.5, log=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epoch": 5}, "epoch: unknown key; did you mean epochs?"),
        ({"optimizer.sdg.base_lr": 0.1}, "optimizer.sdg: unknown optimizer; did you mean sgd?"),
        ({"optimizer.sgd.base_lr.high": 1e-9}, "optimizer.sgd.base_lr: `low <= high` must hold"),
        ({"epochs": None}, "epochs: is missing and has no default; add it"),
        ({"workload": {"name": "own"}}, "workload.function: is missing and has no default; add it"),
    ],
)
def test_overrides_are_checked_like_the_file(space_file: SpaceFile, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_space(space_file(), overrides)
    assert message in "\n".join(map(str, caught.value.problems))


def test_a_config_takes_overrides_too(space_file: SpaceFile) -> None:
    _, config, _ = load_config(space_file(optimizer={"sgd": {"base_lr": 0.1}}), {"seed": 3, "clip_grad_norm": 1.0})
    assert (config.seed, config.clip_grad_norm) == (3, 1.0)
