"""A config of another study as an entry of `enqueue`: which configs fit a space, and what is tried then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from study_results import Chosen, space_with

from pipeline.errors import InvalidInput
from pipeline.space.config import TrialConfig
from pipeline.space.enqueue import entry_of
from pipeline.space.load import with_enqueued, with_layers, with_steps_per_epoch
from pipeline.space.search_space import SearchSpace
from pipeline.study.samplers import propose

RATE = {"low": 1e-3, "high": 1.0, "log": True}
SGD = {"optimizer": "sgd", "sgd.base_lr": 0.3, "sgd.momentum": 0.9, "step.step_size": 3, "step.gamma": 0.5}
ADAMW = {"optimizer": "adamw", "adamw.base_lr": 0.02, "step.step_size": 4, "step.gamma": 0.25, "lr_ratio.head": 0.5}


def entry(space: SearchSpace, other: SearchSpace, params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the entry of what a trial of another space chose, and the problems of the entry."""
    chosen = Chosen(params)
    config = other.sample(chosen)
    found, problems = entry_of(space, config, params=chosen.params, other=other)
    return found, [str(problem) for problem in problems]


def first_config(space: SearchSpace, entry: Mapping[str, Any]) -> TrialConfig:
    """Return the config that a study of a space with an entry tries first."""
    return propose(with_enqueued(space, [entry]), [], first=0, size=1)[0][0]


def strategy(config: TrialConfig) -> dict[str, Any]:
    return {key: config.to_dict()[key] for key in ("optimizer", "scheduler", "param_groups", "batch_size")}


MOMENTUM = {"sgd": {"base_lr": RATE, "momentum": {"choices": [0.0, 0.5]}}, "adamw": {"base_lr": RATE}}
STEP = {"step_size": {"low": 1, "high": 4}, "gamma": {"low": 0.05, "high": 0.9, "log": True}}
HEAD = {"pattern": "fc.*", "lr_ratio": {"low": 0.1, "high": 10.0, "log": True}}
UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "a value outside the range": (
        {"scheduler": {"step": {**STEP, "step_size": {"low": 4, "high": 6}}}},
        "scheduler.step.step_size: must be within [4, 6], as in this space, got 3",
    ),
    "a run too short for its decay": (
        {"epochs": 3, "scheduler": {"step": {**STEP, "step_size": {"low": "30%", "high": "70%"}}}},
        "scheduler.step.step_size: must be within [1, 2], as in this space, got 3",
    ),
    "an optimizer that the space lacks": (
        {"optimizer": {"adamw": {"base_lr": RATE}}},
        "optimizer.sgd: is not in this space; known: adamw",
    ),
    "a choice that the space lacks": (
        {"optimizer": MOMENTUM},
        "optimizer.sgd.momentum: must be one of 0.0, 0.5, as in this space, got 0.9",
    ),
    "another schedule": (
        {"scheduler": {"cosine": {}}},
        "scheduler.step: is not in this space; known: cosine",
    ),
    "groups of other names": (
        {"param_groups": {"last": HEAD, "body": {"pattern": "*"}}},
        "param_groups.head: is not in this space; known: last, body",
    ),
    "a group more": (
        {"param_groups": {"neck": {"pattern": "neck.*"}, "head": HEAD, "body": {"pattern": "*"}}},
        "param_groups.neck: is a group of this space, and the config has no such group",
    ),
    "a frozen group": (
        {"param_groups": {"head": HEAD, "body": {"pattern": "*", "lr_ratio": 0}}},
        "param_groups.body.lr_ratio: must be 0.0, as in this space, got 1.0",
    ),
    "a weight decay that the config lacks": (
        {"param_groups": {"head": HEAD, "body": {"pattern": "*", "weight_decay": 0.1}}},
        "param_groups.body.weight_decay: must be 0.1, as in this space, got none",
    ),
    "a batch size that the space searches": (
        {"batch_size": {"choices": [16, 32]}},
        "batch_size: must be one of 16, 32, as in this space, got 64",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_config_that_the_space_cannot_draw_is_refused_with_each_reason(case: str) -> None:
    changes, problem = UNFIT[case]
    found, problems = entry(space_with(**changes), space_with(), SGD)
    assert found == {}
    assert problem in problems


def test_a_setting_is_the_new_ones_unless_a_study_searches_it() -> None:
    found, problems = entry(space_with(batch_size=32, epochs=12, seed=3), space_with(), ADAMW)
    assert problems == []
    config = first_config(space_with(batch_size=32, epochs=12, seed=3), found)
    assert (config.batch_size, config.epochs, config.seed, config.optimizer.base_lr) == (32, 12, 3, 0.02)
    searched = space_with(batch_size={"choices": [64, 16]})
    _, problems = entry(space_with(batch_size=32), searched, ADAMW)
    assert problems == ["batch_size: must be 32, as in this space, got 64"]


def test_what_a_config_lacks_and_the_space_searches_is_sampled() -> None:
    body = {"pattern": "*", "weight_decay": {"low": 0.01, "high": 0.1}}
    space = space_with(param_groups={"head": HEAD, "body": body}, clip_grad_norm={"low": 1.0, "high": 2.0})
    found, problems = entry(space, space_with(), ADAMW)
    assert problems == []
    assert with_enqueued(space, [found]).enqueue == (ADAMW,)
    config = first_config(space, found)
    assert 0.01 <= (config.param_groups["body"].weight_decay or 0) <= 0.1
    assert 1.0 <= (config.clip_grad_norm or 0) <= 2.0


OWN = "mine.py:Lion"
SHARES = {"step_size": {"low": "10%", "high": "50%"}, "gamma": 0.5, "warmup": "5%"}
SPACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shares of the run and of the rate": (
        {"scheduler": {"step": SHARES, "cosine": {"warmup": "10%", "eta_min": {"low": "1%", "high": "20%"}}}},
        {"optimizer": "adamw", "scheduler": "cosine", "cosine.eta_min": 12.3456789},
    ),
    "shares of the steps of each batch size": (
        {"batch_size": {"choices": [64, 32]}, "scheduler": {"step": {**SHARES, "interval": "step"}}},
        {"batch_size": 32, "optimizer": "adamw", "step.step_size": 31.25},
    ),
    "choices of lists in percent": (
        {"scheduler": {"multistep": {"milestones": {"choices": [["50%", "75%"], ["25%", "50%"]]}, "gamma": 0.5}}},
        {"optimizer": "adamw", "multistep.milestones": "[2, 4]"},
    ),
    "choices of lists of steps in percent": (
        {
            "batch_size": {"choices": [64, 32]},
            "scheduler": {
                "multistep": {"interval": "step", "milestones": {"choices": [["50%", "75%"], ["25%", "50%"]]}}
            },
        },
        {"optimizer": "adamw", "multistep.milestones": "[25%, 50%]"},
    ),
    "a group that may be frozen": (
        {"param_groups": {"head": HEAD, "body": {"pattern": "*", "lr_ratio": {"choices": [0.0, 1.0]}}}},
        {"optimizer": "adamw", "lr_ratio.body": 0.0},
    ),
    "layers": (
        {"param_groups": {"all": {"layers": ["fc.{n}.*", "*"], "layer_decay": {"low": 0.5, "high": 1.0}}}},
        {"optimizer": "adamw", "layer_decay.all": 0.625},
    ),
    "an optimizer of one's own": (
        {"optimizer": {OWN: {"base_lr": RATE, "betas": {"choices": [[0.9, 0.99], [0.5, 0.6]]}, "mode": "fast"}}},
        {f"{OWN}.base_lr": 0.01, f"{OWN}.betas": "[0.5, 0.6]"},
    ),
    "a workload of one's own": (
        {"workload": {"name": "own", "function": "mine.py:task", "arguments": {"width": 3}}},
        {"optimizer": "adamw"},
    ),
}


def prepared(**changes: Any) -> SearchSpace:
    """Return a space as `prepare` leaves it."""
    space = with_layers(space_with(**changes), ["fc.0.weight", "fc.1.weight", "out.weight"])
    return with_steps_per_epoch(space, {size: 1280 // size for size in space.batch_sizes})


@pytest.mark.parametrize("case", SPACES)
def test_a_space_draws_its_own_configs_again(case: str) -> None:
    changes, params = SPACES[case]
    space = prepared(**changes)
    chosen = Chosen(params)
    config = space.sample(chosen)
    assert (
        params.items() <= {"optimizer": "adamw", **chosen.params}.items()
    )  # so that the trial chose what the case says
    found, problems = entry(space, space, params)
    assert problems == []
    assert strategy(first_config(space, found)) == strategy(config)


def test_the_same_share_is_kept_in_a_run_of_another_length() -> None:
    cosine = {"scheduler": {"cosine": {"warmup": "25%", "eta_min": "10%"}}}
    params = {"optimizer": "adamw", "adamw.base_lr": 0.02, "lr_ratio.head": 0.5}
    space = space_with(**cosine, epochs=20)
    found, problems = entry(space, space_with(**cosine), params)
    assert problems == []
    scheduler = first_config(space, found).scheduler.values()
    assert (scheduler["warmup"], scheduler["eta_min"]) == (5, 0.02 * 0.5 * 0.1)


def test_a_config_that_no_sampler_drew_has_numbers_where_the_spaces_have_a_share() -> None:
    space = space_with(scheduler={"step": {"step_size": "50%", "gamma": 0.5}})
    other = space_with(scheduler={"step": {"step_size": 3, "gamma": 0.5}})
    _, problems = entry_of(space, other.example(), params=None, other=space)
    assert list(map(str, problems)) == ["scheduler.step.step_size: must be 4, as in this space, got 3"]


@pytest.mark.parametrize(
    ("enqueue", "problem"),
    [
        ({"study": "old", "best": 0}, "enqueue.best: must be >= 1, got 0"),
        ({"study": "old", "best": 10**9}, "enqueue.best: must be <= 100, got 1000000000"),
        ({"study": "old", "bets": 3}, "enqueue.bets: unknown key; did you mean best?"),
        ({"best": 3}, "enqueue.study: is missing and has no default; add it"),
        ({"study": ["old"]}, "enqueue.study: must be text, got ['old']"),
        ("old", "enqueue: must be a mapping, `key: value`, got the text 'old'"),
        (3, "enqueue: must be a list, got 3"),
        (["old"], "enqueue.0: must be a mapping, `key: value`, got the text 'old'"),
    ],
)
def test_a_wrong_form_is_refused(enqueue: Any, problem: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        space_with(enqueue=enqueue)
    assert [str(one) for one in caught.value.problems] == [problem]
