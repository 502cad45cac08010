"""Warm start: the best configs of an earlier study are tried first by a new one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from study_results import DOCUMENT, space_with, trial
from tiny import RULES

import pipeline.search
from pipeline.app.options import read_search
from pipeline.app.warm_start import refuse_unknown, warm_started
from pipeline.errors import InvalidInput
from pipeline.files.strict_yaml import dumps
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import TrialState
from pipeline.study.candidates import plan
from pipeline.study.confirmation import Confirmation
from pipeline.study.store import Store
from pipeline.study.study import Study

RATE = {"low": 1e-3, "high": 1.0, "log": True}
SGD = {"optimizer": "sgd", "sgd.momentum": 0.9, "step.step_size": 3, "step.gamma": 0.5, "lr_ratio.head": 2.0}
ADAMW = {"optimizer": "adamw", "adamw.base_lr": 0.02, "step.step_size": 4, "step.gamma": 0.25, "lr_ratio.head": 0.5}
CHOSEN: Sequence[Mapping[str, Any]] = (
    {**SGD, "sgd.base_lr": 0.001},
    {**SGD, "sgd.base_lr": 0.3},
    ADAMW,
    {**SGD, "sgd.base_lr": 0.9},
)
"""What the trials of the earlier study chose; the last is the best, then the one before."""
REFERENCE = {"study": "old", "best": 5}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that tests only read: `old`, and `small-1`, which has begun from it."""
    store = Store(tmp_path_factory.mktemp("begun"))
    begin(store)
    return store


def studied(
    store: Store,
    space: SearchSpace | None = None,
    chosen: Sequence[Mapping[str, Any]] = CHOSEN,
    **changes: Any,
) -> Study:
    """Store the study `old` with a trial for each choice, each better than the one before."""
    space = space or space_with()
    study = store.create(space, name="old", trials=len(chosen) + 1, rules=RULES)
    for number, params in enumerate(chosen):
        study.add(trial(space, number, [0.5 + 0.1 * number] * space.epochs, params=params, **changes))
    return study


def warm(store: Store, **changes: Any) -> tuple[SearchSpace, list[str]]:
    """Return a space that begins with the best of `old`, and the lines that are said."""
    said: list[str] = []
    space = space_with(**{"enqueue": REFERENCE, **changes})
    return warm_started(space, store, source="new.yaml", say=said.append), said


def begin(store: Store) -> None:
    """Store `old`, and `small-1`, which has begun from it."""
    studied(store)
    store.create(warm(store)[0], name="small-1", trials=8, rules=RULES)


def first_configs(store: Store, space: SearchSpace, count: int) -> list[dict[str, Any]]:
    """Return the strategies that a new study of a space tries first."""
    study = store.create(space, name="new", trials=4 * count, rules=RULES)
    proposals = study.next_group(4 * count)
    return [strategy(config.to_dict()) for config, _ in proposals.values()][:count]


def strategy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("optimizer", "scheduler", "param_groups", "batch_size")}


def problems_of(store: Store, **changes: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        warm(store, **changes)
    return str(caught.value)


def test_the_best_configs_of_the_earlier_study_are_tried_first(store: Store) -> None:
    old = studied(store)
    space, said = warm(store, enqueue={**REFERENCE, "best": 3})
    assert said == ["tried first   3 configs of study old: #3, #2, #1"]
    assert first_configs(store, space, 3) == [strategy(old.ended[n].config.to_dict()) for n in (3, 2, 1)]


def test_the_new_study_stores_the_values_that_it_searches_in_the_words_of_a_file(store: Store) -> None:
    studied(store, chosen=[ADAMW])
    space, _ = warm(store)
    store.create(space, name="new", trials=8, rules=RULES)
    assert store.header("new").document["enqueue"] == [
        {
            "optimizer": {"adamw": {"base_lr": 0.02}},
            "scheduler": {"step": {"step_size": 4, "gamma": 0.25}},
            "param_groups": {"head": {"lr_ratio": 0.5}},
        }
    ]
    assert store.header("new").warm_start == REFERENCE


def confirmed(study: Study, values: Mapping[str, float]) -> None:
    """Confirm a study, with a value for each candidate."""
    confirmation = Confirmation(study, plan(study, study.space.confirm))
    while group := confirmation.next_group():
        for number, (config, _) in group.items():
            (label,) = [c.label for c in confirmation.candidates if c.with_seed(config.seed) == config]
            run = trial(study.space, number, [values[label]] * study.space.epochs, environment={"placement": []})
            run = dataclasses.replace(run, config=config, params={}, confirms=label)
            confirmation.add(run, test={})
    confirmation.keep()


CONFIRM = {"share": 1.0, "finalists": 2, "seeds": 2}
WORSE = {"Adam's default": 0.1, "SGD with StepLR": 0.2}


def test_the_confirmed_winner_comes_before_the_trial_with_the_best_score(store: Store) -> None:
    old = studied(store, space_with(confirm=CONFIRM))
    confirmed(old, {"#3": 0.6, "#2": 0.7, **WORSE})
    space, said = warm(store, enqueue={**REFERENCE, "best": 2})
    assert said == ["tried first   2 configs of study old: #2 (confirmed), #3"]
    assert first_configs(store, space, 2) == [strategy(old.ended[n].config.to_dict()) for n in (2, 3)]


def test_a_baseline_that_has_won_comes_first_where_it_fits(store: Store) -> None:
    old = studied(store, space_with(confirm=CONFIRM))
    confirmed(old, {"#3": 0.6, "#2": 0.7, **WORSE, "SGD with StepLR": 0.9})
    space, said = warm(store, enqueue={**REFERENCE, "best": 2})
    assert said == ["tried first   2 configs of study old: SGD with StepLR (confirmed), #3"]
    (first,) = first_configs(store, space, 1)
    assert (first["optimizer"]["sgd"]["base_lr"], first["scheduler"]["step"]["step_size"]) == (0.1, 3)
    assert first["param_groups"]["head"]["lr_ratio"] == 1.0


def test_if_no_config_fits_each_is_named(store: Store) -> None:
    studied(store, chosen=CHOSEN[:2])
    assert problems_of(store, optimizer={"adamw": {"base_lr": RATE}}) == (
        "new.yaml: 2 problems\n"
        "  enqueue.study: #1: optimizer.sgd: is not in this space; known: adamw\n"
        "  enqueue.study: #0: optimizer.sgd: is not in this space; known: adamw\n"
        "  none of the best of study old fits this space; name another study, or change the space"
    )


def test_settings_that_neither_study_searches_are_the_new_ones_and_are_said(store: Store) -> None:
    studied(store, chosen=[ADAMW])
    changes = {"epochs": 12, "batch_size": 32, "seed": 9, "workload": {"name": "digits", "model": "mlp"}}
    space, said = warm(store, **changes)
    assert said[1:] == [
        "              which had workload digits-cnn (here digits-mlp), epochs 8 (here 12), batch_size 64 (here 32)"
    ]
    assert first_configs(store, space, 1)[0]["batch_size"] == 32


def test_an_earlier_study_without_a_complete_trial_is_refused(store: Store) -> None:
    space = space_with()
    study = store.create(space, name="old", trials=2, rules=RULES)
    study.add(trial(space, 0, [0.5], state=TrialState.DIVERGED, reason="the loss became inf", params=ADAMW))
    assert problems_of(store) == (
        "new.yaml: 1 problem\n"
        "  enqueue.study: study old has no complete trial; name another study, or leave enqueue away"
    )


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("olt", "did you mean old?"), ("../old", "did you mean old?"), ("", "known: old, small-1")],
)
def test_an_unknown_study_is_refused_with_near_names_before_and_after_the_data_is_read(
    begun: Store, name: str, remedy: str
) -> None:
    message = f"new.yaml: 1 problem\n  enqueue.study: there is no study {name!r} in {begun.root}; {remedy}"
    assert problems_of(begun, enqueue={"study": name}) == message
    with pytest.raises(InvalidInput) as caught:
        refuse_unknown(space_with(enqueue={"study": name}).warm_start, begun, source="new.yaml")
    assert str(caught.value) == message


# Which study the same command goes on with.


def chosen(store: Store, **changes: Any) -> tuple[str, bool]:
    space = space_with(**{"enqueue": REFERENCE, **changes})
    refuse_unknown(space.warm_start, store, source="new.yaml")
    return store.choose(space, trials=8, name=None)


def test_the_same_search_goes_on_whatever_becomes_of_the_earlier_study(store: Store) -> None:
    begin(store)
    stored = store.open("small-1").space.enqueue
    assert (len(stored), chosen(store)) == (4, ("small-1", True))
    old = store.open("old")
    old.add(trial(old.space, 4, [0.99] * 8, params={**ADAMW, "adamw.base_lr": 0.05}))
    assert chosen(store) == ("small-1", True)
    store.folder("old").mkdir(parents=True)
    store.delete("old")
    assert chosen(store) == store.choose(space_with(enqueue=REFERENCE), trials=8, name="small-1") == ("small-1", True)
    assert store.open("small-1").space.enqueue == stored


def test_another_reference_or_none_begins_another_study(store: Store) -> None:
    begin(store)
    assert chosen(store, enqueue={**REFERENCE, "best": 4}) == ("small-2", False)
    assert chosen(store, enqueue=[]) == ("small-2", False)
    store.create(space_with(), name="small-2", trials=8, rules=RULES)
    assert chosen(store) == ("small-1", True)  # not the newer one, which begins with nothing
    with pytest.raises(InvalidInput, match=r"enqueue\.best: the study has 5, this search 4"):
        store.choose(space_with(enqueue={**REFERENCE, "best": 4}), trials=8, name="small-1")
    with pytest.raises(InvalidInput, match=r'enqueue\.study: the study has "old", this search nothing'):
        store.choose(space_with(), trials=8, name="small-1")


@pytest.mark.parametrize(
    "overrides",
    [{}, {"enqueue.study": "old"}, {"enqueue.study": "old", "enqueue.best": 5}, {"enqueue": {"study": "old"}}],
)
def test_a_named_study_goes_on_with_and_without_its_reference(begun: Store, overrides: dict[str, Any]) -> None:
    given: dict[str, Any] = {"trials": None, "timeout": None, "root": begun.root, "device": "cpu", "rows": None}
    options = read_search(
        space=None,
        workload=None,
        overrides=overrides,
        study="small-1",
        changed_code=False,
        from_python=True,
        **given,
    )
    assert begun.choose(options.space, trials=options.trials, name="small-1") == ("small-1", True)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")
@pytest.mark.usefixtures("one_thread")
def test_the_command_tries_the_best_first(
    root_with_tables: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    changes = {"workload": {"name": "digits", "model": "mlp"}, "epochs": 1, "scheduler": {"constant": {}}}
    file = root_with_tables / "mine.yaml"
    file.write_text(dumps({**DOCUMENT, **changes}))
    store = Store(root_with_tables)
    rates = (0.001, 0.003)
    studied(store, space_with(**changes), [{"optimizer": "adamw", "adamw.base_lr": rate} for rate in rates])
    command = ["--space", str(file), "--set", "enqueue.study=old", "--trials", "2", "--no-confirm"]
    command += ["--root", str(root_with_tables), "--device", "cpu"]
    assert pipeline.search.main(command) == 0
    assert "tried first   2 configs of study old: #1, #0\n" in capsys.readouterr().out
    assert [trial.config.optimizer.base_lr for trial in store.open("mine-1").ended] == [0.003, 0.001]
