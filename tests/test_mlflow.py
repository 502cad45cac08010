import base64
import contextlib
import csv
import dataclasses
import io
import json
import os
import pickle
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.errors import StorageError
from pipeline.space.config import Digits, TrialConfig
from pipeline.space.optimizers import AdamW
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import OneCycle, Scheduler, Step
from pipeline.space.search_space import Objective
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics, TrialState
from pipeline.tracking.mlflow import MLflowTracker
from pipeline.tracking.mlflow_trials import YOUNG_S
from pipeline.tracking.paths import relocate
from pipeline.tracking.process import TrackerProcess
from pipeline.tracking.record import lr_metric, thin
from pipeline.tracking.server import Server
from pipeline.tracking.tracker import StoredTrial, StudyInfo, StudySummary
from pipeline.tracking.view import TAG_PREFIX, mlflow_name, saved_view

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

# MLflow's own use of SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

CLOSE_S = 600.0
"""Ends a test that hangs."""
DONE = StudySummary(finished=True, note="done", ended=1_700_000_100.0)


def study(
    name: str = "default-1",
    *,
    workload: str = "digits-cnn",
    identity: str | None = None,
    objective: Objective = Objective(),  # noqa: B008 - a frozen value
) -> StudyInfo:
    return StudyInfo(
        identity=identity or f"made {name}",
        name=name,
        workload=workload,
        objective=objective,
        groups=("head", "body"),
        searched=("optimizer", "base_lr", "momentum", "step_size", "lr_ratio.head"),
        shared=("optimizer", "base_lr", "step_size", "lr_ratio.head"),
        space="epochs: 2\n",
        seed=0,
        started=1_700_000_000.0,
        environment={"device": "cpu"},
    )


def ended(
    number: int = 0,
    *,
    epochs: tuple[EpochMetrics, ...] = (),
    scheduler: Scheduler | None = None,
    state: TrialState = TrialState.COMPLETE,
    reason: str | None = None,
    groups: tuple[str, ...] = ("head", "body"),
) -> EndedTrial:
    return EndedTrial(
        number=number,
        config=TrialConfig(
            workload=Digits(),
            epochs=2,
            batch_size=64,
            seed=0,
            optimizer=AdamW(base_lr=0.01),
            scheduler=scheduler or Step(step_size=1, gamma=0.1),
            param_groups={name: ParamGroup(pattern=("*",), lr_ratio=0.1 + 0.2) for name in groups},
        ),
        params={"adamw.base_lr": 0.01},
        state=state,
        objective=Objective(),
        reason=reason,
        value=0.9 if state is TrialState.COMPLETE else None,
        epochs=epochs or (epoch(1),),
        started=1_700_000_000.0,
        ended=1_700_000_010.0,
        environment={"device": "cpu"},
    )


def epoch(
    number: int, *, lr: Mapping[str, tuple[tuple[int, float], ...]] | None = None, **metrics: float
) -> EpochMetrics:
    values = {f"val/{name}": value for name, value in {"accuracy": 0.9, "loss": 0.5, **metrics}.items()}
    return EpochMetrics(epoch=number, step=10 * number, metrics=values, lr=lr or {})


def many_rates(number: int = 0) -> EndedTrial:
    """A trial with 1,200 rates of three groups; 3 × 500 points are more than one call to MLflow takes."""
    rates = tuple((step, 1 / (3 * step)) for step in range(1, 1201))
    epochs = tuple(
        EpochMetrics(epoch=n, step=600 * n, metrics=epoch(n).metrics, lr=dict.fromkeys("abc", half))
        for n, half in enumerate((rates[:600], rates[600:]), start=1)
    )
    return ended(number, epochs=epochs, scheduler=OneCycle(), groups=("a", "b", "c"))


def opened(root: Path, study: StudyInfo) -> MLflowTracker:
    tracker = MLflowTracker(root, sample_every_s=None)
    tracker.open(study)
    return tracker


def background_tracker(root: Path, study: StudyInfo) -> TrackerProcess:
    tracker = TrackerProcess(root)
    tracker.open(study)
    return tracker


@pytest.fixture
def root(mlflow_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "my project"  # a blank in a path is where URIs break
    root.mkdir()
    shutil.copy(mlflow_tables, root)
    return root


def connect(root: Path) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def experiment(root: Path) -> "Experiment":
    found = connect(root).get_experiment_by_name("digits-cnn")
    assert found
    return found


def runs(root: Path, kind: str) -> "list[Run]":
    condition = f"tags.`hpo.kind` = '{kind}'"
    found: list[Run] = list(connect(root).search_runs([experiment(root).experiment_id], condition))
    return sorted(found, key=lambda run: int(run.data.tags.get("hpo.trial", 0)))


def history(root: Path, run: "Run", name: str) -> list[tuple[int, float]]:
    points = connect(root).get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in points)


def artifact(root: Path, run: "Run", name: str) -> str:
    return Path(connect(root).download_artifacts(run.info.run_id, name)).read_text()


def test_a_trial_is_a_child_run_with_its_params_tags_and_curves(root: Path) -> None:
    rates = {"head": ((10, 0.003),), "body": ((10, 0.01),)}
    later = {"head": ((20, 0.0003),), "body": ((20, 0.001),)}
    opened(root, study()).end(ended(7, epochs=(epoch(1, accuracy=0.8, lr=rates), epoch(2, accuracy=0.9, lr=later))))
    (parent,) = runs(root, "study")
    (run,) = runs(root, "trial")
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.info.run_name == "#007 adamw 1.0e-02 · step 1 × 0.1 · head ×0.3 · body ×0.3"
    assert (run.info.start_time, run.info.end_time) == (1_700_000_000_000, 1_700_000_010_000)
    assert run.data.params["base_lr"] == "0.01"
    assert run.data.params["log10_base_lr"] == "-2.0"
    assert run.data.params["lr_ratio.head"] == "0.30000000000000004"
    assert run.data.params["epochs"] == "2"
    assert run.data.params["scheduler"] == "step"
    assert parent.data.tags["environment.device"] == "cpu"
    assert history(root, run, "val/accuracy") == [(10, 0.8), (20, 0.9)]
    assert history(root, run, "lr/head") == [(10, 0.003), (20, 0.0003)]
    assert history(root, run, "lr/body") == [(10, 0.01), (20, 0.001)]
    (_, last) = connect(root).get_metric_history(run.info.run_id, "val/accuracy")
    assert last.timestamp == run.info.end_time
    assert connect(root).list_artifacts(run.info.run_id) == []


def test_every_way_to_end_has_its_status_state_and_reason(root: Path) -> None:
    tracker = opened(root, study())
    for number, state in enumerate(TrialState):
        tracker.end(ended(number, state=state, reason=None if state is TrialState.COMPLETE else f"why {number}"))
    found = [
        (run.info.status, run.data.tags["hpo.state"], run.data.tags.get("hpo.reason")) for run in runs(root, "trial")
    ]
    assert found == [
        ("FINISHED", "complete", None),
        ("KILLED", "pruned", "why 1"),
        ("KILLED", "diverged", "why 2"),
        ("FAILED", "failed", "why 3"),
    ]


def test_a_schedule_of_steps_is_thinned_in_charts_and_whole_in_its_table(root: Path) -> None:
    opened(root, study()).end(many_rates())
    (run,) = runs(root, "trial")
    rates = tuple((step, 1 / (3 * step)) for step in range(1, 1201))
    for group in "abc":
        shown = history(root, run, f"lr/{group}")
        assert len(shown) == 500
        assert (shown[0], shown[-1]) == (rates[0], rates[-1])
        assert set(shown) <= set(rates)
    header, *rows = csv.reader(artifact(root, run, "lr_history.csv").splitlines())
    assert header == ["step", "a", "b", "c"]
    assert [(int(row[0]), float(row[3])) for row in rows] == list(rates)


def test_thinning_spreads_what_it_keeps_evenly() -> None:
    points = [(step, 0.1) for step in range(9)]
    assert [step for step, _ in thin(points, limit=5)] == [0, 2, 4, 6, 8]
    assert thin(points, limit=9) == points


def test_a_value_that_is_not_finite_becomes_a_tag_and_no_metric(root: Path) -> None:
    nan, infinity = float("nan"), float("inf")
    opened(root, study()).end(
        ended(epochs=(epoch(1, loss=1.0), epoch(2, loss=nan), epoch(3, loss=-infinity)), state=TrialState.DIVERGED)
    )
    (run,) = runs(root, "trial")
    assert history(root, run, "val/loss") == [(10, 1.0)]
    assert run.data.tags["hpo.not_finite"] == "val/loss nan at step 20, val/loss -inf at step 30"


def test_logging_a_trial_again_changes_nothing_even_after_reopening(root: Path) -> None:
    trial = ended(epochs=(epoch(1, accuracy=0.8),))
    tracker = opened(root, study())
    tracker.end(trial)
    tracker.end(trial)
    opened(root, study()).end(trial)
    (run,) = runs(root, "trial")
    assert history(root, run, "val/accuracy") == [(10, 0.8)]
    assert len(runs(root, "study")) == 1


def begun(number: int = 0, *, epochs: tuple[EpochMetrics, ...] = (), base_lr: float = 0.01) -> BegunTrial:
    config = ended().config
    config = dataclasses.replace(config, optimizer=AdamW(base_lr=base_lr))
    return BegunTrial(number=number, config=config, started=1_700_000_000.0, epochs=epochs)


def test_a_run_begins_with_its_trial_and_has_each_epoch_after_the_next_flush(root: Path) -> None:
    tracker = opened(root, study())
    tracker.begin(begun(3))
    tracker.flush()
    (run,) = runs(root, "trial")
    assert (run.info.status, run.data.tags["hpo.state"]) == ("RUNNING", "running")
    assert run.data.params["base_lr"] == "0.01"
    for number in (1, 2):
        tracker.epochs({3: epoch(number, accuracy=0.7 + 0.1 * number)}, at=1_700_000_000.0 + 7 * number)
        tracker.flush()
        assert history(root, run, "val/accuracy") == [(10, 0.7 + 0.1), (20, 0.7 + 0.2)][:number]
    times = [point.timestamp for point in connect(root).get_metric_history(run.info.run_id, "val/loss")]
    assert times == [1_700_000_007_000, 1_700_000_014_000]
    tracker.end(ended(3, epochs=(epoch(1, accuracy=0.8), epoch(2, accuracy=0.9), epoch(3))))
    (again,) = runs(root, "trial")
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    assert again.data.tags["hpo.state"] == "complete"
    assert [step for step, _ in history(root, run, "val/accuracy")] == [10, 20, 30]


def test_a_flush_leaves_what_is_young_for_the_next_and_trials_that_are_about_to_end_for_their_end(root: Path) -> None:
    tracker = opened(root, study())
    now = time.time()
    for number, started in enumerate((now, now - 2 * YOUNG_S, now - 2 * YOUNG_S)):
        tracker.begin(dataclasses.replace(begun(number), started=started))
    tracker.flush({2})
    (run,) = runs(root, "trial")
    assert run.data.tags["hpo.trial"] == "1"
    tracker.epochs({1: epoch(1)}, at=time.time())
    tracker.flush({2})
    assert history(root, run, "val/loss") == []
    tracker.end(ended(1, epochs=(epoch(1),)))
    assert history(root, run, "val/loss") == [(10, 0.5)]


def test_a_study_that_goes_on_lacks_trials_without_an_ended_run_of_their_config_unless_a_person_deleted_it(
    root: Path,
) -> None:
    tracker = opened(root, study())
    for number in range(4):
        tracker.end(ended(number))
    tracker.begin(begun(4))
    tracker.flush()
    connect(root).delete_run(runs(root, "trial")[1].info.run_id)
    stored = [StoredTrial.of(ended(number)) for number in range(6)]
    stored[2] = dataclasses.replace(stored[2], config="another")
    again = opened(root, dataclasses.replace(study(), ended=tuple(stored)))
    assert again.recorded() == {0, 1, 3}
    again.finish(DONE)
    assert runs(root, "study")[0].data.metrics["study/complete"] == 6
    assert [run.data.metrics.get("rank") for run in runs(root, "trial")] == [1, 3, 4, None]


@pytest.mark.parametrize("objective", [Objective(), Objective(of="best")])
def test_a_trial_that_goes_on_from_a_checkpoint_goes_on_as_the_same_run_without_gap_or_duplicate(
    root: Path, objective: Objective
) -> None:
    told = [epoch(number, accuracy=number / 10) for number in range(1, 6)]
    tracker = opened(root, study(objective=objective))
    tracker.begin(begun())
    for metrics in told[:3]:  # one epoch further than the checkpoint
        tracker.epochs({0: metrics}, at=1_700_000_001.0)
    tracker.flush()
    before = runs(root, "trial")[0].info.run_id
    tracker = opened(root, study(objective=objective))  # the process was killed
    tracker.begin(begun(epochs=tuple(told[:2])))
    for metrics in told[2:4]:
        tracker.epochs({0: metrics}, at=1_700_000_002.0)
    tracker.flush()
    tracker.end(ended(epochs=tuple(told)))
    (run,) = runs(root, "trial")
    assert (run.info.run_id, run.data.tags["hpo.resumed_after_epoch"]) == (before, "2")
    names = {"val/accuracy", "val/loss"} | ({"val/accuracy.best"} if objective.of == "best" else set())
    assert set(run.data.metrics) == names
    for name in names - {"val/loss"}:
        assert history(root, run, name) == [(10 * number, number / 10) for number in range(1, 6)]


def test_a_run_of_another_config_or_of_more_steps_is_superseded(root: Path) -> None:
    tracker = opened(root, study())
    tracker.begin(begun(0, base_lr=0.5))
    tracker.begin(begun(1, epochs=(epoch(1), epoch(2))))
    tracker.flush()
    tracker = opened(root, study())
    tracker.begin(begun(0))
    tracker.flush()
    tracker.end(ended(0))
    tracker.end(ended(1, epochs=(epoch(1),)))
    assert [(run.data.tags["hpo.trial"], run.info.status) for run in runs(root, "superseded")] == [
        ("0", "KILLED"),
        ("1", "KILLED"),
    ]
    assert [run.data.params["base_lr"] for run in runs(root, "trial")] == ["0.01", "0.01"]
    assert [history(root, run, "val/accuracy") for run in runs(root, "trial")] == [[(10, 0.9)], [(10, 0.9)]]


def test_a_search_that_was_interrupted_or_killed_leaves_no_run_running(root: Path) -> None:
    for end in (lambda tracker: tracker.finish(dataclasses.replace(DONE, finished=False)), MLflowTracker.close):
        tracker = opened(root, study())
        tracker.begin(begun())
        tracker.flush()
        assert runs(root, "trial")[0].info.status == "RUNNING"
        end(tracker)
        (run,) = runs(root, "trial")
        assert (run.info.status, run.data.tags["hpo.state"]) == ("KILLED", "interrupted")
        assert runs(root, "study")[0].info.status == "KILLED"


def test_trials_are_found_whatever_became_of_the_study_s_run(root: Path) -> None:
    opened(root, study()).end(ended())
    (parent,) = runs(root, "study")
    connect(root).delete_run(parent.info.run_id)
    opened(root, study()).end(ended())
    assert runs(root, "study")[0].info.run_id == parent.info.run_id
    connect(root).set_tag(parent.info.run_id, "hpo.study_id", "a run that is gone for ever")
    connect(root).rename_experiment(experiment(root).experiment_id, "digits-cnn")
    opened(root, study()).end(ended())
    (run,) = runs(root, "trial")
    assert run.data.tags["mlflow.parentRunId"] not in ("", parent.info.run_id)


def test_names_that_a_person_gives_stay_and_runs_are_found_under_them(root: Path) -> None:
    opened(root, study()).end(ended())
    client, (parent,), (run,) = connect(root), runs(root, "study"), runs(root, "trial")
    for name, found in (("my study", parent), ("my trial", run)):
        client.update_run(found.info.run_id, name=name)
    client.rename_experiment(parent.info.experiment_id, "my experiment")
    opened(root, study()).end(ended())
    assert {client.get_run(found.info.run_id).info.run_name for found in (parent, run)} == {"my study", "my trial"}
    client.set_tag(parent.info.run_id, "hpo.study_id", "a run that is gone for ever")
    client.delete_experiment(parent.info.experiment_id)
    opened(root, study()).end(ended())
    assert client.get_experiment_by_name("digits-cnn") is None
    trials = client.search_runs([parent.info.experiment_id], "tags.`hpo.kind` = 'trial'")
    assert [again.info.run_id for again in trials] == [run.info.run_id]


def test_a_trial_s_run_that_a_person_restores_goes_on(root: Path) -> None:
    tracker = opened(root, study())
    tracker.begin(begun(0))
    tracker.flush()
    (run,) = runs(root, "trial")
    connect(root).delete_run(run.info.run_id)
    opened(root, study()).end(ended(0))
    assert runs(root, "trial") == []
    connect(root).restore_run(run.info.run_id)
    opened(root, study()).end(ended(0))
    (again,) = runs(root, "trial")
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    assert history(root, again, "val/accuracy") == [(10, 0.9)]


def test_a_trial_s_run_that_a_person_deletes_stays_deleted(root: Path) -> None:
    tracker = opened(root, study())
    tracker.begin(begun(0))
    tracker.begin(begun(1))
    tracker.flush()
    connect(root).delete_run(runs(root, "trial")[0].info.run_id)
    for again in (tracker, opened(root, study())):
        again.epochs({0: epoch(1), 1: epoch(1)}, at=1_700_000_001.0)
        again.flush()
        again.end(ended(0))
        again.end(ended(1))
        again.finish(DONE)
        assert [run.data.tags["hpo.trial"] for run in runs(root, "trial")] == ["1"]


def test_the_winner_is_marked_and_ranks_break_ties_as_the_search_does(root: Path) -> None:
    losses = (0.5, 0.2, 0.3)
    trials = [ended(n, epochs=(epoch(1, accuracy=0.9, loss=loss),)) for n, loss in enumerate(losses)]
    tracker = opened(root, study())
    for trial in (*trials, ended(3, state=TrialState.PRUNED, reason="late")):
        tracker.end(trial)
    tracker.finish(dataclasses.replace(DONE, best=trials[1]))
    found = runs(root, "trial")
    assert [run.data.metrics.get("rank") for run in found] == [3, 1, 2, None]
    assert [run.data.tags.get("hpo.winner") for run in found] == [None, "yes", None, None]
    better = ended(4, epochs=(epoch(1, accuracy=0.9, loss=0.1),))
    tracker = opened(root, study())
    for trial in (*trials, better):
        tracker.end(trial)
    tracker.finish(dataclasses.replace(DONE, best=better))
    found = runs(root, "trial")
    assert [run.data.metrics.get("rank") for run in found] == [4, 2, 3, None, 1]
    assert [run.data.tags.get("hpo.winner") for run in found] == [None, None, None, None, "yes"]
    confirmed = {2: 0.95, 1: 0.94}
    tracker = opened(root, study())
    for trial in (*trials, better):
        tracker.end(trial)
    tracker.finish(dataclasses.replace(DONE, best=trials[2], confirmed=confirmed))
    found = runs(root, "trial")
    assert [run.data.metrics.get("rank") for run in found] == [4, 2, 1, None, 3]
    assert [run.data.metrics.get("confirmed") for run in found] == [None, 0.94, 0.95, None, None]
    assert [run.data.tags.get("hpo.winner") for run in found] == [None, None, "yes", None, None]


def test_the_study_s_run_has_the_search_s_times_counts_and_best_value(root: Path) -> None:
    tracker = opened(root, study())
    tracker.end(ended(0, state=TrialState.DIVERGED, reason="why"))
    tracker.flush()
    tracker.end(ended(1))
    tracker.end(ended(2, state=TrialState.PRUNED, reason="why"))
    tracker.finish(DONE)
    (run,) = runs(root, "study")
    assert (run.info.start_time, run.info.end_time) == (1_700_000_000_000, 1_700_000_100_000)
    assert history(root, run, "study/diverged") == [(1, 1), (3, 1)]
    assert history(root, run, "study/complete") == [(1, 0), (3, 1)]
    assert history(root, run, "study/best") == [(3, 0.9)]


def test_two_studies_share_an_experiment_and_nothing_else(root: Path) -> None:
    for name in ("one", 'the "other"'):
        opened(root, study(name)).end(ended())
    assert len(runs(root, "study")) == 2
    assert len({run.data.tags["mlflow.parentRunId"] for run in runs(root, "trial")}) == 2
    made = experiment(root)
    assert {TAG_PREFIX + "one", TAG_PREFIX + mlflow_name('the "other"')} <= set(made.tags)


def test_a_finished_study_has_its_note_winner_and_files(root: Path) -> None:
    best = root / "best.yaml"
    best.write_text("epochs: 2\n")
    opened(root, study()).finish(
        StudySummary(finished=True, note="It **won**.", ended=1_700_000_100.0, best=ended(3), files=(best,))
    )
    (run,) = runs(root, "study")
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.note.content"] == "It **won**."
    assert (run.data.tags["hpo.best_trial"], run.data.tags["hpo.best_value"]) == ("3", "0.9")
    assert artifact(root, run, "best.yaml") == "epochs: 2\n"
    assert artifact(root, run, "space.yaml") == "epochs: 2\n"


def test_an_interrupted_study_is_killed_and_runs_again_when_reopened(root: Path) -> None:
    opened(root, study()).finish(StudySummary(finished=False, note="stopped after 3 trials", ended=1_700_000_100.0))
    (run,) = runs(root, "study")
    assert (run.info.status, run.data.tags["mlflow.note.content"]) == ("KILLED", "stopped after 3 trials")
    opened(root, study())
    (again,) = runs(root, "study")
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "RUNNING")


def test_a_deleted_experiment_comes_back(root: Path) -> None:
    opened(root, study())
    connect(root).delete_experiment(experiment(root).experiment_id)
    opened(root, study()).end(ended())
    assert len(runs(root, "trial")) == 1


def test_a_study_of_the_same_name_in_a_new_database_is_another(root: Path) -> None:
    opened(root, study(identity="old")).end(ended())
    opened(root, study(identity="new")).end(ended())
    assert len(runs(root, "study")) == 2
    assert sorted(run.data.tags["hpo.study_id"] for run in runs(root, "trial")) == ["new", "old"]


def test_the_view_sorts_trials_by_the_objective_and_charts_every_group() -> None:
    key, value = saved_view(
        study="s 1",
        identity="7.5",
        metric="val/loss",
        ranking="val/loss.best",
        columns=["optimizer"],
        axes=["optimizer"],
        lr_metrics=["lr/head", "lr/body"],
        created_ms=1,
    )
    assert key == "mlflow.sharedViewState.s 1"
    packed = json.loads(value)["state"].removeprefix("deflate;")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert state["searchFilter"] == "tags.`hpo.kind` = 'trial' and tags.`hpo.study_id` = '7.5'"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`rank`", True)
    assert state["selectedColumns"][:5] == [
        "metrics.`rank`",
        "metrics.`confirmed`",
        "metrics.`val/loss.best`",
        "metrics.`val/loss`",
        "tags.`hpo.state`",
    ]
    parallel, *lines = state["compareRunCharts"]
    assert (parallel["selectedParams"], parallel["selectedMetrics"]) == (["optimizer"], ["val/loss.best"])
    assert [line["selectedMetricKeys"] for line in lines if not line["deleted"]] == [
        ["lr/head", "lr/body"],
        ["val/loss.best"],
        ["val/loss"],
        ["train/loss"],
    ]
    assert [line["metricKey"] for line in lines if line["deleted"]] == [
        "lr/body",
        "rank",
        "confirmed",
    ]  # have no chart of their own
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == {
        section["uuid"] for section in state["compareRunSections"]
    }


def test_a_view_that_a_person_changed_stays(root: Path) -> None:
    opened(root, study())
    made = experiment(root)
    connect(root).set_experiment_tag(made.experiment_id, TAG_PREFIX + "default-1", "mine")
    opened(root, study())
    assert experiment(root).tags[TAG_PREFIX + "default-1"] == "mine"


@pytest.mark.parametrize(("moved", "opened"), [(shutil.move, "ui"), (shutil.copytree, "search")])
def test_artifacts_of_a_root_that_was_moved_or_copied_are_found_below_it(
    root: Path, tmp_path: Path, moved: Callable[[Path, Path], object], opened: str
) -> None:
    def log_a_trial(root: Path) -> None:  # in a process of its own: MLflow remembers where a run's artifacts are
        tracker = background_tracker(root, study())
        tracker.end(many_rates())
        assert tracker.close(stalled_s=CLOSE_S) == []

    log_a_trial(root)
    here = tmp_path / "elsewhere"
    moved(root, here)
    if opened == "search":
        log_a_trial(here)
    else:
        relocate(here / "mlflow.db")
    (run,) = runs(here, "trial")
    assert run.info.artifact_uri.startswith(here.as_uri())
    assert [file.path for file in connect(here).list_artifacts(run.info.run_id)] == ["lr_history.csv"]
    assert artifact(here, run, "lr_history.csv")
    assert experiment(here).artifact_location.startswith(here.as_uri())
    assert root.exists() == (moved is shutil.copytree)
    if root.exists():
        (run,) = runs(root, "trial")
        assert run.info.artifact_uri.startswith(root.as_uri())


def test_artifacts_that_are_elsewhere_on_purpose_stay_there(root: Path, tmp_path: Path) -> None:
    places = [tmp_path / "shared" / "mlruns" / "artifacts" / "big", tmp_path / "any" / "folder"]
    places[0].mkdir(parents=True)
    for number, place in enumerate(places):
        connect(root).create_experiment(f"theirs {number}", artifact_location=place.as_uri())
    relocate(root / "mlflow.db")
    theirs = [e.artifact_location for e in connect(root).search_experiments() if e.name.startswith("theirs")]
    assert sorted(theirs) == sorted(place.as_uri() for place in places)


@pytest.mark.parametrize(
    "place",
    [
        "experiments SET artifact_location = ?",
        "runs SET artifact_uri = ?",
        "runs SET artifact_uri = ? WHERE run_uuid IN (SELECT run_uuid FROM tags WHERE value = 'trial')",
    ],
)
def test_a_database_does_not_choose_where_artifacts_are_written(root: Path, tmp_path: Path, place: str) -> None:
    opened(root, study()).end(ended())
    (tmp_path / "theirs").mkdir()
    link = root / "mlruns" / "artifacts" / "link"
    link.symlink_to(tmp_path / "theirs")
    for uri in ((tmp_path / "theirs").as_uri(), link.as_uri(), (root / "mlruns" / "..").as_uri(), "s3://theirs/a"):
        with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database, database:
            database.execute(f"UPDATE {place}", [uri])
        with pytest.raises(
            StorageError, match=r"^the database keeps artifacts outside the root, in .*; name another --root, or"
        ):
            opened(root, study())
    assert list((tmp_path / "theirs").iterdir()) == []


def test_odd_group_names_keep_their_own_curves(root: Path) -> None:
    groups = ("fc,1", "fc;1", "..", "a/b", "größe 1")
    names = [lr_metric(group) for group in groups]
    assert len(set(names)) == len(groups)
    assert lr_metric("größe 1") == "lr/größe 1"
    lr = {group: ((10, 0.1 * (index + 1)),) for index, group in enumerate(groups)}
    opened(root, study()).end(ended(epochs=(epoch(1, lr=lr),), groups=groups))
    (run,) = runs(root, "trial")
    assert [run.data.metrics[name] for name in names] == [points[0][1] for points in lr.values()]


def test_nothing_is_made_outside_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    tracker = background_tracker(tmp_path / "new", study())
    tracker.end(ended())
    assert tracker.close(stalled_s=CLOSE_S) == []
    assert [path.name for path in tmp_path.iterdir() if path != elsewhere] == ["new"]
    assert list(elsewhere.iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["mlflow.db", "mlruns"]
    for made in connect(tmp_path / "new").search_experiments():
        assert str(tmp_path / "new" / "mlruns") in made.artifact_location


@pytest.fixture
def background(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackerProcess]:
    """A tracker process; that warnings are errors in its environment must not keep MLflow from recording."""
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    tracker = background_tracker(root, study())
    yield tracker
    tracker.close(stalled_s=CLOSE_S)


def test_the_background_process_writes_everything_whatever_signals_come(root: Path, background: TrackerProcess) -> None:
    # Ctrl-C reaches the group of the terminal, even before the process can ignore it.
    assert os.getpgid(background.pid) != os.getpgid(0)
    assert background.links() == [
        f"python -m pipeline.ui --root '{root}'   then open http://127.0.0.1:5000/#/experiments/{experiment(root).experiment_id}/runs?workflowType=machine_learning"
        "&viewStateShareKey=default-1&compareRunsMode=CHART"
    ]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(background.pid, number)
    for trial in (ended(0), ended(1), ended(2)):
        background.end(trial)
    background.finish(StudySummary(finished=True, note="done", ended=1_700_000_100.0, best=ended(1)))
    assert background.close(stalled_s=CLOSE_S) == []
    assert [run.info.status for run in runs(root, "trial")] == ["FINISHED"] * 3
    assert runs(root, "study")[0].data.tags["hpo.best_trial"] == "1"


def test_the_background_process_ends_with_its_parent(root: Path) -> None:
    code = (
        "import signal; from pathlib import Path; import tests.test_mlflow as here;"
        f"print(here.background_tracker(Path({str(root)!r}), here.study()).pid, flush=True);"
        "signal.pause()"
    )
    here = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=here) as parent:
        assert parent.stdout
        orphan = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    gone, _, _ = select.select([orphan], [], [], CLOSE_S)
    os.close(orphan)
    assert gone


def test_a_process_that_was_never_needed_ends_at_once_and_has_touched_nothing(tmp_path: Path) -> None:
    tracker = TrackerProcess(tmp_path / "root")
    process = os.pidfd_open(tracker.pid)
    assert tracker.close() == []
    assert select.select([process], [], [], 0)[0] == [process]
    os.close(process)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_the_caller_forked_keeps_nothing_waiting(root: Path) -> None:
    tracker = TrackerProcess(root)
    forked = os.fork()
    if forked == 0:
        signal.pause()
        os._exit(0)
    try:
        tracker.open(study())
        tracker.end(ended())
        assert tracker.close(stalled_s=CLOSE_S) == []
    finally:
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)


def test_a_store_that_the_environment_names_after_the_process_began_is_the_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = TrackerProcess(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    tracker.open(study())
    assert tracker.close(stalled_s=CLOSE_S) == []
    assert (tmp_path / "other.db").exists()
    assert connect(root).get_experiment_by_name("digits-cnn") is None


def test_a_process_that_is_killed_each_time_is_a_warning(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.process.MAX_RESTARTS", 0)
    tracker = background_tracker(root, study())
    os.kill(tracker.pid, signal.SIGKILL)
    tracker.end(ended(0))
    tracker.end(ended(1))
    assert tracker.close(stalled_s=CLOSE_S) == [
        f"MLflow in {root}: its process ended with signal SIGKILL; 2 trials are not recorded"
    ]
    assert tracker.incomplete


def test_a_store_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "file").touch()
    tracker = background_tracker(tmp_path / "file", study())
    tracker.end(ended())
    tracker.finish(DONE)
    assert tracker.links() == []
    assert tracker.close(stalled_s=CLOSE_S) == [
        f"MLflow in {tmp_path / 'file'}: File exists; 1 trial and the summary are not recorded"
    ]


def test_trials_that_fail_for_one_reason_are_one_warning(root: Path, background: TrackerProcess) -> None:
    assert background.links()
    blocked = root / "mlruns" / "artifacts" / "digits-cnn"
    shutil.rmtree(blocked)  # made for the study's space.yaml
    blocked.touch()
    background.end(many_rates(0))
    background.end(many_rates(1))
    assert background.close(stalled_s=CLOSE_S) == [f"MLflow in {root}: Not a directory; 2 trials are not recorded"]


def test_a_database_that_is_removed_in_mid_run_is_told_and_one_that_is_put_back_is_used(root: Path) -> None:
    tracker = opened(root, study())
    tracker.end(ended(0))
    (root / "mlflow.db").rename(root / "away.db")
    for verb, argument in (("end", ended(1)), ("flush", None), ("finish", DONE)):
        with pytest.raises(
            StorageError, match=r"^mlflow\.db was removed or replaced by another program meanwhile; put"
        ):
            getattr(tracker, verb)(*([] if argument is None else [argument]))
    (root / "away.db").rename(root / "mlflow.db")
    tracker.end(ended(1))
    assert [run.data.tags["hpo.trial"] for run in runs(root, "trial")] == ["0", "1"]


def test_a_trial_that_could_not_be_logged_is_logged_at_the_end(root: Path) -> None:
    answers = io.BytesIO()
    server = Server(0, MLflowTracker(root, sample_every_s=None), answers)
    server.do("open", study())
    blocked = root / "mlruns" / "artifacts" / "digits-cnn"
    shutil.rmtree(blocked)
    blocked.touch()
    server.do("end", many_rates(0))
    assert [run.info.status for run in runs(root, "trial")] == ["RUNNING"]
    blocked.unlink()
    server.do("end", ended(1))
    server.do("finish", DONE)
    assert sorted((run.data.tags["hpo.trial"], run.info.status) for run in runs(root, "trial")) == [
        ("0", "FINISHED"),
        ("1", "FINISHED"),
    ]
    answers.seek(0)
    said = [pickle.load(answers) for _ in range(4)]
    assert [(verb, number, cause) for _, verb, number, _, cause in said] == [
        ("open", None, None),
        ("end", 1, None),
        ("end", 0, None),
        ("finish", None, None),
    ]


def test_a_server_that_is_away_is_a_warning(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = background_tracker(root, study())
    tracker.end(ended())
    assert tracker.close(stalled_s=CLOSE_S) == [
        "MLflow at MLFLOW_TRACKING_URI: Connection refused; 1 trial is not recorded"
    ]


def test_a_store_named_by_the_environment_takes_the_place_of_the_root(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    tracker = MLflowTracker(tmp_path / "other", sample_every_s=None)
    link = tracker.open(study("elsewhere"))
    tracker.end(many_rates())
    assert link
    assert link.startswith(f"python -m pipeline.ui --root {tmp_path / 'other'}   then open http://127.0.0.1:5000/#/exp")
    (run,) = runs(root, "trial")
    assert run.info.artifact_uri.startswith((tmp_path / "other" / "mlruns" / "artifacts").as_uri())
    assert artifact(root, run, "lr_history.csv")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mlruns"]


def test_a_process_that_takes_too_long_is_ended_with_a_warning(root: Path, background: TrackerProcess) -> None:
    os.kill(background.pid, signal.SIGSTOP)
    background.end(ended())
    assert background.close(stalled_s=0.1) == [
        f"MLflow in {root}: nothing was recorded for 0.1 s; 1 trial is not recorded"
    ]


def test_importing_and_starting_cost_the_caller_no_mlflow() -> None:
    code = "import sys, pipeline.tracking.process; print(sorted({'mlflow', 'torch', 'optuna'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def load_records(root: Path) -> dict[str, float]:
    """Return what the study's run holds of the machine's load."""
    (run,) = runs(root, "study")
    return {name: value for name, value in run.data.metrics.items() if name.startswith("system/")}


def monitored(root: Path, sample_every_s: float) -> MLflowTracker:
    tracker = MLflowTracker(root, sample_every_s=sample_every_s)
    tracker.open(study())
    return tracker


@pytest.mark.parametrize("end", ["finish", "close"])
def test_a_long_search_records_the_load_of_the_machine_in_its_run_until_it_ends(root: Path, end: str) -> None:
    tracker = monitored(root, 0.01)
    while not load_records(root):
        pass
    tracker.finish(DONE) if end == "finish" else tracker.close()
    names = set(load_records(root))
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= names
    (run,) = runs(root, "study")
    before = history(root, run, "system/cpu_utilization_percentage")
    assert [step for step, _ in before] == list(range(len(before)))
    resumed = monitored(root, 0.01)
    while len(history(root, run, "system/cpu_utilization_percentage")) <= len(before):
        pass
    resumed.finish(DONE)
    after = history(root, run, "system/cpu_utilization_percentage")
    assert [step for step, _ in after] == list(range(len(after)))


def test_a_search_shorter_than_the_first_interval_records_no_load(root: Path) -> None:
    monitored(root, 1e6).finish(DONE)
    assert load_records(root) == {}
