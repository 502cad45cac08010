from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InvalidInput
from pipeline.files.strict_yaml import dumps, loads
from pipeline.space.config import SETTINGS, TrialConfig
from pipeline.space.load import load_config, load_space, schema_text, space_from_document, with_layers, with_steps
from pipeline.space.optimizers import OPTIMIZERS
from pipeline.space.schedules import SCHEDULERS
from pipeline.space.search_space import SearchSpace

SPACES = Path(__file__).parent.parent / "search_spaces"
READY_MADE = sorted(SPACES.glob("*.yaml"))
SpaceFile = Callable[..., Path]

LR = {"low": 1e-5, "high": 0.1, "log": True}
BETA = {"low": 0.5, "high": 0.99}
EPS = {"low": 1e-9, "high": 1e-6, "log": True}
EITHER = {"choices": [True, False]}
WARMED = {"warmup": {"low": 0, "high": 2}, "warmup_start_factor": {"low": 0.01, "high": 0.5, "log": True}}

EVERY_OPTIMIZER: dict[str, Any] = {
    "sgd": {"base_lr": LR, "momentum": BETA, "nesterov": EITHER, "weight_decay": {"choices": [0, 1e-4]}},
    "adam": {"base_lr": LR, "beta1": BETA, "beta2": BETA, "eps": EPS, "amsgrad": EITHER},
    "adamw": {"base_lr": LR, "beta1": 0.9, "weight_decay": {"low": 0, "high": 0.1, "step": 0.01}},
    "nadam": {"base_lr": LR, "momentum_decay": {"low": 0, "high": 0.01}, "decoupled_weight_decay": EITHER},
    "radam": {"base_lr": LR, "decoupled_weight_decay": True},
    "adamax": {"base_lr": LR, "eps": EPS},
    "rmsprop": {"base_lr": LR, "alpha": BETA, "centered": EITHER},
    "adagrad": {"base_lr": LR, "lr_decay": LR, "initial_accumulator_value": {"choices": [0.0, 0.1]}},
    "adadelta": {"base_lr": LR, "rho": BETA},
    "asgd": {"base_lr": LR, "lambd": LR, "t0": {"low": 1e3, "high": 1e6, "log": True}},
    "adafactor": {"base_lr": LR, "beta2_decay": {"low": -1, "high": -0.5, "step": 0.1}, "d": {"low": 1, "high": 2}},
    "muon": {"base_lr": LR, "ns_steps": {"low": 3, "high": 9, "step": 2}, "nesterov": EITHER, "beta2": BETA}
    | {"adjust_lr_fn": {"choices": ["original", "match_rms_adamw"]}},
}
EVERY_SCHEDULER: dict[str, Any] = {
    "constant": WARMED,
    "step": {**WARMED, "step_size": {"low": 1, "high": 4}, "gamma": {"low": 0.05, "high": 0.9, "log": True}},
    "multistep": {"milestones": {"choices": [[2], [2, 5], [1, 3, 5]]}, "gamma": 0.1},
    "exponential": {"gamma": BETA},
    "polynomial": {"total_iters": {"choices": [3, 5]}, "power": {"low": 0.5, "high": 2}},
    "cosine": {"eta_min": {"choices": [0, 1e-7]}, "T_max": {"low": 3, "high": 6}},
    "cosine_warm_restarts": {"T_0": {"low": 1, "high": 3}, "T_mult": {"choices": [1, 2]}},
    "linear": {"start_factor": {"low": 0.5, "high": 1}, "end_factor": {"low": 0, "high": 0.5}},
    "onecycle": {"pct_start": {"low": 0.2, "high": 0.5}, "three_phase": EITHER, "div_factor": {"low": 1, "high": 100}}
    | {"anneal_strategy": {"choices": ["cos", "linear"]}},
    "cyclic": {"max_lr_ratio": {"low": 2, "high": 10}, "step_size_up": {"low": 5, "high": 50, "log": True}}
    | {"mode": {"choices": ["triangular", "triangular2", "exp_range"]}, "cycle_momentum": False},
    "plateau": {"patience": {"low": 0, "high": 5}, "factor": BETA, "threshold_mode": {"choices": ["rel", "abs"]}},
}
GROUPS: dict[str, Any] = {
    "head": {"pattern": ["fc.*"], "lr_ratio": {"low": 0.1, "high": 10, "log": True}, "weight_decay": {"choices": [0]}},
    "deep": {"layers": [["embed.*", "pos"], "blocks.*"], "layer_decay": {"low": 0.5, "high": 1.0}, "dims": [1, 2]},
    "body": {"pattern": "*", "lr_ratio": {"choices": [0.0, 0.5, 1.0]}},
}
RPROP = {"rprop": {"base_lr": LR, "eta_minus": BETA, "eta_plus": {"low": 1.1, "high": 1.5, "step": 0.1}}}


class RandomTrial:
    """Chooses at random within what it is asked for, and notes the names."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.names: list[str] = []

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        self.names.append(name)
        if step is not None:
            return low + self._random.randint(0, round((high - low) / step)) * step
        return self._random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        self.names.append(name)
        return self._random.randrange(low, high + 1, step)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.names.append(name)
        return self._random.choice(choices)


def big_space(*, rprop: bool) -> SearchSpace:
    """Every optimizer and every schedule; Rprop goes with a constant rate only, so it has its own."""
    everything: dict[str, Any] = {"optimizer": EVERY_OPTIMIZER, "scheduler": EVERY_SCHEDULER, "param_groups": GROUPS}
    everything |= {"no_weight_decay": [{"dims": 1}, {"pattern": "pos"}]}
    alone = {"optimizer": RPROP, "scheduler": {"constant": {}}, "param_groups": {"all": {"pattern": "*"}}}
    rest = {"workload": {"name": "digits"}, "epochs": 8, "batch_size": 64, "channels_last": rprop}
    return space_from_document({**rest, **(alone if rprop else everything)}, name="big")


BIG = {rprop: big_space(rprop=rprop) for rprop in (False, True)}


def test_the_big_spaces_hold_every_optimizer_and_every_schedule() -> None:
    assert {*BIG[False].optimizers, *BIG[True].optimizers} == {*OPTIMIZERS}
    assert {*BIG[False].schedulers} == {*SCHEDULERS}


@settings(derandomize=True, max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), rprop=st.integers(0, 9).map(lambda tenth: tenth == 0))
def test_a_sampled_config_reads_back_from_its_file_exactly(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rprop: bool
) -> None:
    config = BIG[rprop].sample(RandomTrial(seed))
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(dumps({**config.to_dict(), "found": {"trial": 3}}))
    space, again, found = load_config(path)
    assert again == config
    assert TrialConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert found == {"trial": 3}
    assert space.searched_hyperparameters() == ()


@pytest.mark.parametrize("path", READY_MADE, ids=lambda path: path.stem)
def test_a_ready_made_space_loads_and_its_sample_reads_back(path: Path, tmp_path: Path) -> None:
    space = load_space(path)
    assert space.name == path.stem
    assert space_from_document(json.loads(json.dumps(space.document)), name=space.name) == space
    config = with_steps(space, 20).sample(RandomTrial(0))
    file = tmp_path / "config.yaml"
    file.write_text(dumps(config.to_dict()))
    assert load_config(file)[1] == config


def test_a_trial_is_asked_for_what_it_uses_by_the_names_of_the_parameters() -> None:
    space = load_space(SPACES / "default.yaml")
    trial = RandomTrial(0)
    config = space.sample(trial)
    used = {"sgd": ["sgd.base_lr", "sgd.momentum"], "adamw": ["adamw.base_lr", "adamw.weight_decay"]}
    used["rmsprop"] = ["rmsprop.base_lr"]
    rest = ["step.step_size", "step.gamma", "lr_ratio.head"]
    assert trial.names == ["optimizer", *used[config.optimizer.name], *rest]
    assert set(trial.names) <= space.parameters().keys()


def test_searched_hyperparameters_are_those_that_differ_between_trials_under_their_flat_names() -> None:
    space = load_space(SPACES / "default.yaml")
    searched = ("optimizer", "base_lr", "momentum", "weight_decay", "step_size", "gamma", "lr_ratio.head")
    assert space.searched_hyperparameters() == searched
    for seed in range(5):
        flat = space.sample(RandomTrial(seed)).hyperparameters()
        assert {"optimizer", "base_lr", "step_size", "gamma", "lr_ratio.head"} <= flat.keys()


def test_the_document_has_every_default_so_that_equal_spaces_have_equal_documents(space_file: SpaceFile) -> None:
    short = load_space(space_file())
    long = load_space(space_file(seed=0, pruner={"name": "none"}, objective={"metric": "val/accuracy"}, enqueue=[]))
    assert short.document == long.document
    assert short.document["optimizer"]["sgd"]["momentum"] == 0.0
    assert load_space(space_file(seed=1)).document != short.document


def test_a_study_is_named_after_the_file_in_the_letters_that_the_command_line_takes(space_file: SpaceFile) -> None:
    names = {"my space": "my-space", ".hidden": "hidden", "a.b_c": "a.b_c", "π": "space", "x" * 200: "x" * 80}
    for stem, name in names.items():
        assert load_space(space_file().rename(space_file().with_name(f"{stem}.yaml"))).name == name


def test_enqueued_configs_become_parameters_by_their_names(space_file: SpaceFile) -> None:
    first = {
        "optimizer": {"adamw": {"base_lr": 1e-3, "beta1": 0.9}},
        "scheduler": {"multistep": {"milestones": [2, 5]}},
    }
    second = {"param_groups": {"head": {"lr_ratio": 5}, "body": {"pattern": "*", "lr_ratio": 0.5}}}
    sections = {"optimizer": EVERY_OPTIMIZER, "scheduler": EVERY_SCHEDULER, "param_groups": GROUPS, "epochs": 8}
    space = load_space(space_file(**sections, enqueue=[first, second, {}]))
    assert [dict(entry) for entry in space.enqueue] == [
        {"optimizer": "adamw", "adamw.base_lr": 1e-3, "scheduler": "multistep", "multistep.milestones": "[2, 5]"},
        {"lr_ratio.head": 5, "lr_ratio.body": 0.5},
        {},
    ]


NUMBERED = {"layers": ["embed.*", "blocks.{n}.*"], "layer_decay": {"low": 0.5, "high": 1.0}}
BLOCKS = ["embed.weight", "blocks.1.weight", "blocks.0.weight"]


def test_layers_are_numbered_by_the_model_and_their_decay_is_one_searched_number(space_file: SpaceFile) -> None:
    space = load_space(space_file(param_groups={"body": NUMBERED}, no_weight_decay={"dims": 1}))
    numbered = with_layers(space, BLOCKS)
    assert numbered.param_groups["body"]["layers"] == (("embed.*",), ("blocks.0.*",), ("blocks.1.*",))
    assert with_layers(numbered, BLOCKS) is numbered
    assert numbered.searched_hyperparameters() == ("base_lr", "layer_decay.body")
    trial = RandomTrial(0)
    config = numbered.sample(trial)
    assert trial.names == ["sgd.base_lr", "layer_decay.body"]
    assert config.group_names == ("body.0", "body.1", "body.2")
    assert config.hyperparameters()["layer_decay.body"] == config.param_groups["body"].layer_decay
    assert TrialConfig.from_dict(config.to_dict()) == config


def test_an_enqueued_config_may_have_the_layers_as_the_file_or_as_a_trial_has_them(space_file: SpaceFile) -> None:
    as_numbered = [["embed.*"], ["blocks.0.*"], ["blocks.1.*"]]
    entries = [
        {"param_groups": {"body": {"layers": layers, "layer_decay": 0.75}}}
        for layers in (NUMBERED["layers"], as_numbered)
    ]
    space = with_layers(load_space(space_file(param_groups={"body": NUMBERED}, enqueue=entries)), BLOCKS)
    assert [dict(entry) for entry in space.enqueue] == [{"layer_decay.body": 0.75}] * 2
    space = load_space(space_file(param_groups={"body": NUMBERED}, enqueue=entries))
    with pytest.raises(InvalidInput, match=r"enqueue\.1\.param_groups\.body\.layers: must be .*, as in this space"):
        with_layers(space, [*BLOCKS, "blocks.2.weight"])


def test_a_share_of_the_smallest_rate_is_one_of_the_first_layers_rate(space_file: SpaceFile) -> None:
    sgd, cosine = {"sgd": {"base_lr": 0.8}}, {"cosine": {"eta_min": "50%"}}
    groups = {"body": {"layers": ["a.*", "b.*", "c.*"], "layer_decay": 0.5}}
    config = load_space(space_file(optimizer=sgd, scheduler=cosine, param_groups=groups), searching=False).example()
    assert config.scheduler.eta_min == 0.1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"epochs": 3}, "enqueue.0.epochs: unknown key; known: optimizer, scheduler, param_groups"),
        ({"optimizer": "sgd"}, "enqueue.0.optimizer: must be a mapping with one name as its key, got 'sgd'"),
        ({"optimizer": {"sdg": {}}}, "enqueue.0.optimizer.sdg: is not in this space; did you mean sgd?"),
        ({"optimizer": {"sgd": 3}}, "enqueue.0.optimizer.sgd: must be a mapping, `key: value`, got 3"),
        (
            {"optimizer": {"sgd": {"base_lr": 7}}},
            "enqueue.0.optimizer.sgd.base_lr: must be within [0.001, 1.0], as in this space, got 7",
        ),
        ({"optimizer": {"sgd": {"momentum": 0.9}}}, "enqueue.0.optimizer.sgd.momentum: must be 0.0, as in this space"),
        (
            {"optimizer": {"sgd": {"momentun": 0}}},
            "enqueue.0.optimizer.sgd.momentun: unknown key; did you mean momentum?",
        ),
        ({"param_groups": {"all": {"lr_ratio": True}}}, "enqueue.0.param_groups.all.lr_ratio: must be 1.0"),
    ],
)
def test_an_enqueued_config_outside_the_space_is_refused(
    space_file: SpaceFile, entry: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_space(space_file(enqueue=[entry]))
    assert problem in str(caught.value)


def test_all_problems_of_a_file_are_said_at_once(space_file: SpaceFile) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_space(space_file(epochs=0, optimizer={"sdg": {}}, seed="x", param_groups={"a b": {"pattern": "*"}}))
    places = [problem.place for problem in caught.value.problems]
    assert sorted(places) == ["epochs", "optimizer.sdg", "param_groups.a b", "seed"]


def test_a_space_that_leaves_nothing_to_choose_is_refused(space_file: SpaceFile) -> None:
    with pytest.raises(InvalidInput, match="nothing is searched; give a `low` and `high`, `choices`"):
        load_space(space_file(optimizer={"sgd": {"base_lr": {"low": 0.1, "high": 0.1}}}))


def test_a_config_that_leaves_something_to_choose_is_refused_by_its_place(space_file: SpaceFile) -> None:
    groups = {"all": {"pattern": "*", "lr_ratio": {"choices": [1, 2]}}}
    with pytest.raises(InvalidInput, match="must be one value in a config, got a choice") as caught:
        load_config(space_file(scheduler={"constant": {}, "cosine": {}}, param_groups=groups))
    places = [problem.place for problem in caught.value.problems]
    assert places == ["scheduler", "optimizer.sgd.base_lr", "param_groups.all.lr_ratio"]


def test_what_a_search_noted_in_a_config_must_be_a_mapping(space_file: SpaceFile) -> None:
    with pytest.raises(InvalidInput, match="found: must be a mapping, got 3"):
        load_config(space_file(optimizer={"sgd": {"base_lr": 0.1}}, found=3))


def test_the_schema_describes_every_setting() -> None:
    fields = json.loads(schema_text())["properties"]
    assert [name for name in SETTINGS if not fields[name].get("description")] == []
    assert fields["epochs"]["description"] == "Passes over the training data per trial."


def test_the_schema_file_is_the_one_that_the_code_makes() -> None:
    assert (SPACES / "schema.json").read_text() == schema_text()


def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_accepts_each_ready_made_file() -> None:
    checker = validator()
    for path in READY_MADE:
        assert list(checker.iter_errors(loads(path.read_text(), source=path.name))) == []


@pytest.mark.parametrize(
    "sections",
    [
        {"epochs": 0},
        {"epoch": 3},
        {"optimizer": {"sdg": {"base_lr": 0.1}}},
        {"optimizer": {"sgd": {"base_lr": -0.1}}},
        {"optimizer": {"sgd": {"base_lr": {"low": 0.1}}}},
        {"optimizer": {"sgd": {}}},
        {"optimizer": {"sgd": {"base_lr": {"choices": []}}}},
        {"scheduler": {"step": {"step_size": 1.5}}},
        {"scheduler": {"constant": None}},
        {"param_groups": {}},
        {"pruner": {"name": "hyperband"}},
        {"sampler": {"name": "cmaes"}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_program_refuses(space_file: SpaceFile, sections: dict[str, Any]) -> None:
    path = space_file(**sections)
    with pytest.raises(InvalidInput, match="1 problem"):
        load_space(path)
    assert not validator().is_valid(loads(path.read_text(), source=path.name))


def test_reading_a_space_needs_neither_torch_nor_optuna_nor_mlflow_nor_sklearn() -> None:
    code = f"""
import sys
from pathlib import Path
from pipeline.space.load import load_space
load_space(Path({str(SPACES / "default.yaml")!r}))
print(*{{name.partition(".")[0] for name in sys.modules}} & {{"torch", "optuna", "mlflow", "sklearn", "numpy"}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
