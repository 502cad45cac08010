"""Numbers in percent: of the run, and of a trial's smallest rate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from image_files import write_photos
from test_search import search_until
from test_search_space import READY_MADE, RandomTrial

import pipeline.train
from pipeline.app.prepare import prepare
from pipeline.errors import InvalidInput
from pipeline.files.strict_yaml import dumps, loads
from pipeline.space import rules
from pipeline.space.distributions import Choices, Range
from pipeline.space.limits import Share
from pipeline.space.load import load_config, load_space, schema_text, space_from_document, with_steps
from pipeline.space.schedules import Cosine
from pipeline.space.search_space import SearchSpace
from pipeline.study.samplers import distributions
from pipeline.study.store import Store

SpaceFile = Callable[..., Path]
NO_SHARE = "must be a share of the run such as 10%, above 0% to 100%, got"
SAMPLES = 1257
"""Training samples of the digits."""
STEPS_PER_EPOCH = 20
"""Of the digits in batches of 64."""


def scheduled(space_file: SpaceFile, name: str, epochs: int, **values: Any) -> SearchSpace:
    return load_space(space_file(epochs=epochs, scheduler={name: values}))


def between(low: int, high: int, *, log: bool = False) -> Range[int, int]:
    return Range[int, int](low=low, high=high, log=log)


@pytest.mark.parametrize(
    ("text", "total", "count"),
    [("10%", 20, 2), ("12.5%", 20, 3), ("12.4%", 20, 2), ("14.5%", 100, 15), ("0.5%", 99, 0), ("100%", 7, 7)],
)
def test_a_share_of_a_count_is_rounded_half_up(text: str, total: int, count: int) -> None:
    share = Share(text.removesuffix("%"))
    assert str(share) == text
    assert share.of_count(total) == count


@pytest.mark.parametrize(
    ("name", "values", "epochs", "resolved"),
    [
        ("step", {"step_size": "25%"}, 20, {"step_size": 5}),
        ("step", {"step_size": "1%"}, 20, {"step_size": 1}),
        ("step", {"step_size": {"low": "10%", "high": "50%"}}, 20, {"step_size": between(2, 10)}),
        ("step", {"step_size": {"low": "10%", "high": "50%"}}, 3, {"step_size": between(1, 2)}),
        ("step", {"step_size": {"low": "10%", "high": "50%"}}, 1, {"step_size": 1}),
        ("step", {"step_size": {"low": "5%", "high": "50%", "log": True}}, 20, {"step_size": between(1, 10, log=True)}),
        ("step", {"step_size": {"choices": ["10%", "50%", 4]}}, 8, {"step_size": Choices[Any](choices=(1, 4))}),
        ("step", {"step_size": "100%", "warmup": "25%"}, 20, {"step_size": 15, "warmup": 5}),
        ("step", {"step_size": "100%", "warmup": {"low": "0%", "high": "50%"}}, 4, {"step_size": 2}),
        ("constant", {"warmup": "5%"}, 3, {"warmup": 0}),
        ("constant", {"warmup": "50%"}, 1, {"warmup": 0}),
        ("constant", {"warmup": {"low": "1%", "high": "20%", "log": True}}, 20, {"warmup": between(1, 4, log=True)}),
        ("constant", {"warmup": {"low": "1%", "high": "2%", "log": True}}, 20, {"warmup": 0}),
        ("multistep", {"milestones": ["50%", "75%"]}, 20, {"milestones": (10, 15)}),
        ("multistep", {"milestones": ["50%", "75%"]}, 3, {"milestones": (2, 2)}),
        ("multistep", {"milestones": [1, "75%"]}, 8, {"milestones": (1, 6)}),
        (
            "multistep",
            {"milestones": {"choices": [["50%"], ["50%", "75%"]]}},
            8,
            {"milestones": Choices[Any](choices=((4,), (4, 6)))},
        ),
        ("cosine", {"T_max": "50%"}, 8, {"T_max": 4}),
        ("cosine_warm_restarts", {"T_0": "10%"}, 8, {"T_0": 1}),
        ("polynomial", {"total_iters": "80%"}, 8, {"total_iters": 6}),
        ("linear", {"total_iters": "80%"}, 8, {"total_iters": 6}),
        (
            "cyclic",
            {"interval": "epoch", "max_lr_ratio": 2, "step_size_up": "25%", "step_size_down": "50%"},
            8,
            {"step_size_up": 2, "step_size_down": 4},
        ),
        ("plateau", {"patience": "10%", "cooldown": "5%"}, 8, {"patience": 1, "cooldown": 0}),
    ],
)  # fmt: skip
def test_a_share_of_the_run_is_a_whole_number_once_the_space_is_read(
    space_file: SpaceFile, name: str, values: dict[str, Any], epochs: int, resolved: dict[str, Any]
) -> None:
    space = scheduled(space_file, name, epochs, **values)
    assert {field: space.schedulers[name][field] for field in resolved} == resolved
    assert list(rules.warnings(space)) == []
    written = space.document["scheduler"][name]
    assert [field for field, value in values.items() if "%" in str(value) and "%" not in str(written[field])] == []
    assert space_from_document(json.loads(json.dumps(space.document)), name=space.name) == space


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("step", {"step_size": "12x%"}, f"step_size: {NO_SHARE} the text '12x%'"),
        ("step", {"step_size": "-5%"}, f"step_size: {NO_SHARE} the text '-5%'"),
        ("step", {"step_size": "150%"}, f"step_size: {NO_SHARE} the text '150%'"),
        ("step", {"step_size": "0%"}, f"step_size: {NO_SHARE} the text '0%'"),
        ("step", {"step_size": "5"}, "step_size: must be a whole number, got the text '5'"),
        ("constant", {"warmup": "5 %"}, "warmup: must be a share of the run such as 10%, from 0% to below 100%, got"),
        ("constant", {"warmup": "100%"}, "warmup: must be a share of the run such as 10%, from 0% to below 100%, got"),
        ("constant", {"warmup": {"low": "0%", "high": "100.0%"}}, "warmup.high: must be a share of the run such"),
        ("multistep", {"milestones": ["50%", "7x%"]}, "milestones.1: must be a share of the run such as 10%"),
        ("multistep", {"milestones": ["75%", "50%"]}, "milestones: must not decrease, got [3, 2]; put them in order"),
        ("step", {"step_size": {"low": "9%", "high": "x%"}}, "step_size.high: must be a share of the run such as 10%"),
        (
            "step",
            {"step_size": {"low": 1, "high": "50%"}},
            f"step_size.low: {NO_SHARE} 1; write both ends of a range in percent, or neither",
        ),
        (
            "step",
            {"step_size": {"low": "10%", "high": "50%", "step": 1}},
            "step_size.step: must be absent from a range in percent, got 1; remove it",
        ),
        ("step", {"step_size": {"low": "50%", "high": "10%"}}, "step_size: `low <= high` must hold, got low=50%"),
        ("step", {"step_size": {"choices": ["5%", "5.0%"]}}, "step_size: each choice may stand once, got 5% twice"),
        ("step", {"step_size": {"choices": ["5%", "500%"]}}, f"step_size.choices.1: {NO_SHARE}"),
        ("step", {"step_size": 1, "gamma": "10%"}, "gamma: must be a finite number, got the text '10%'"),
        ("cosine_warm_restarts", {"T_0": 1, "T_mult": "10%"}, "T_mult: must be a whole number, got the text '10%'"),
        ("cosine", {"eta_min": "101%"}, "eta_min: must be a share of the smallest rate such as 10%, from"),
    ],
)  # fmt: skip
def test_what_is_no_share_is_refused_by_its_place(
    space_file: SpaceFile, name: str, values: dict[str, Any], problem: str
) -> None:
    path = space_file(scheduler={name: values})
    with pytest.raises(InvalidInput, match="1 problem\n") as caught:
        load_space(path)
    assert f"scheduler.{name}.{problem}" in str(caught.value)


def test_the_schema_accepts_shares_where_they_make_sense(space_file: SpaceFile) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema_text()))

    def accepts(name: str, **values: Any) -> bool:
        path = space_file(scheduler={name: values})
        return validator.is_valid(loads(path.read_text(), source=path.name))

    assert accepts("step", step_size="12.5%", warmup="0%")
    assert accepts("step", step_size={"low": "10%", "high": "50%", "log": True})
    assert accepts("multistep", milestones={"choices": [["50%", "75%"], [3]]})
    assert accepts("cosine", eta_min="10%", T_max="100%")
    for refused in (
        "12x%",
        "-5%",
        "150%",
        "0%",
        "100.5%",
        {"low": "1%", "high": "2%", "step": 1},
        {"low": 1, "high": "2%"},
    ):
        assert not accepts("step", step_size=refused), refused
    assert not accepts("step", step_size=1, gamma="10%")


def test_a_floor_in_percent_is_of_the_smallest_rate_of_the_trials_groups_that_train(
    space_file: SpaceFile, tmp_path: Path
) -> None:
    groups = {
        "frozen": {"pattern": "fc1.*", "lr_ratio": 0.0},
        "head": {"pattern": "fc2.*", "lr_ratio": 0.25},
        "rest": {"pattern": "*"},
    }
    path = space_file(scheduler={"cosine": {"eta_min": "10%"}, "plateau": {"min_lr": "100%"}}, param_groups=groups)
    space = load_space(path)
    assert space_from_document(space.document, name=space.name) == space
    floors = set()
    for seed in range(8):
        config = space.sample(RandomTrial(seed))
        rate = config.optimizer.base_lr * 0.25
        floor = config.hyperparameters().get("eta_min", config.hyperparameters().get("min_lr"))
        assert floor == (rate * 0.1 if isinstance(config.scheduler, Cosine) else rate)
        assert type(floor) is float
        floors.add(floor)
        file = tmp_path / "config.yaml"
        file.write_text(dumps(config.to_dict()))
        assert load_config(file)[1] == config
    assert len(floors) == 8


def test_a_searched_floor_is_proposed_in_percent_and_recorded_as_a_rate(space_file: SpaceFile) -> None:
    for searched in ({"low": "1%", "high": "10%", "log": True}, {"choices": ["1%", "10%", 0]}):
        space = load_space(space_file(scheduler={"cosine": {"eta_min": searched}}))
        optunas = distributions(space)["cosine.eta_min"]
        value: Any = optunas.to_internal_repr("10%" if "choices" in searched else 10.0)
        assert optunas._contains(value)
        config = space.sample(RandomTrial(1))
        assert isinstance(config.scheduler, Cosine)
        assert 0 <= config.scheduler.eta_min <= 0.1 * config.optimizer.base_lr
        assert type(config.scheduler.eta_min) is float


def test_shares_of_optimizer_steps_are_resolved_with_the_data_and_kept_with_the_study(space_file: SpaceFile) -> None:
    values = {"interval": "step", "step_size": {"low": "10%", "high": "50%"}, "warmup": "5%"}
    first = {"scheduler": {"step": {"step_size": "30%"}}}
    read = load_space(space_file(epochs=3, scheduler={"step": values}, enqueue=[first]))
    space, _ = prepare(read, source="space.yaml", device="cpu", searching=True)
    assert (space.schedulers["step"]["step_size"], space.schedulers["step"]["warmup"]) == (between(6, 30), 3)
    assert [dict(entry) for entry in space.enqueue] == [{"step.step_size": 18}]
    assert space.document == {**read.document, "steps_per_epoch": STEPS_PER_EPOCH}
    again = space_from_document(json.loads(json.dumps(space.document)), name=space.name)
    assert again == space == with_steps(again, SAMPLES)
    with pytest.raises(
        InvalidInput, match=r"steps_per_epoch: must be 21, as data and batch_size say, got 20; remove it"
    ):
        with_steps(space, SAMPLES + 64)


def test_a_space_without_such_shares_stays_as_it_is_read(space_file: SpaceFile) -> None:
    space = load_space(space_file(scheduler={"step": {"step_size": "50%"}, "cosine": {"interval": "step"}}))
    assert with_steps(space, SAMPLES) is space


def test_an_enqueued_config_may_be_in_percent_too(space_file: SpaceFile) -> None:
    space = {"epochs": 20, "scheduler": {"step": {"step_size": {"low": "10%", "high": "50%"}}}}
    enqueue = [{"scheduler": {"step": {"step_size": "25%"}}}]
    assert [dict(e) for e in load_space(space_file(**space, enqueue=enqueue)).enqueue] == [{"step.step_size": 5}]
    enqueue = [{"scheduler": {"step": {"step_size": "75%"}}}]
    with pytest.raises(
        InvalidInput, match=r"step_size: must be within \[2, 10\], as in this space, got 75%, which is 15"
    ):
        load_space(space_file(**space, enqueue=enqueue))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"step_size": "130%"}, f"step_size: {NO_SHARE} the text '130%'"),
        ({"step_size": "0%"}, f"step_size: {NO_SHARE} the text '0%'"),
        ({"step_size": "12x%"}, f"step_size: {NO_SHARE} the text '12x%'"),
        ({"warmup": "100%"}, "warmup: must be a share of the run such as 10%, from 0% to below 100%, got"),
        ({"gamma": "10%"}, "gamma: must be a finite number, got the text '10%'"),
    ],
)
def test_what_is_no_share_is_refused_in_an_enqueued_config_as_in_the_space(
    space_file: SpaceFile, values: dict[str, Any], problem: str
) -> None:
    scheduler = {"step": {"step_size": {"low": 1, "high": 4}, "warmup": {"low": 0, "high": 2}}}
    path = space_file(epochs=9, scheduler=scheduler, enqueue=[{"scheduler": {"step": values}}])
    with pytest.raises(InvalidInput, match="1 problem\n") as caught:
        load_space(path)
    assert f"enqueue.0.scheduler.step.{problem}" in str(caught.value)


def test_a_config_by_hand_may_be_in_percent_of_its_steps(
    space_file: SpaceFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = {"step": {"interval": "step", "step_size": "50%", "gamma": 0.1}}
    path = space_file(epochs=2, optimizer={"sgd": {"base_lr": 0.5}}, scheduler=schedule)
    assert pipeline.train.main([str(path), "--out", str(tmp_path / "model.pt"), "--device", "cpu"]) == 0
    rates = [line.split("lr/all ")[1] for line in capsys.readouterr().out.splitlines() if "lr/all" in line]
    assert rates == ["5.00e-01", "5.00e-02"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("path", READY_MADE, ids=lambda path: path.stem)
def test_a_short_search_of_a_ready_made_space_runs_to_its_end(path: Path, epochs: int, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"epochs": epochs}
    if path.stem == "finetune":
        photos = write_photos(tmp_path / "photos", {"cat": 6, "dog": 6})
        small = {"folder": str(photos), "model": "small_cnn", "weights": None, "image_size": 16}
        overrides |= {"batch_size": 4, **{f"workload.{name}": value for name, value in small.items()}}
    space = load_space(path, overrides)
    store = Store(tmp_path)
    space, executor = prepare(space, source=path.name, device="cpu", searching=True)
    study = store.create(space, name="short", trials=12, rules=executor.rules)
    search_until(store, study, executor, epochs=None)
    assert [len(trial.epochs) for trial in study.ended if trial.state == "complete"]
    assert {len(trial.epochs) for trial in study.best(12)} == {epochs}
