import base64
import contextlib
import csv
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
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.errors import StorageError
from pipeline.files.strict_yaml import loads
from pipeline.space.config import Digits, TrialConfig
from pipeline.space.optimizers import AdamW
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import OneCycle, Scheduler, Step
from pipeline.space.search_space import Objective
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.tracking.mlflow import MLflowTracker
from pipeline.tracking.paths import relocate
from pipeline.tracking.process import Server, TrackerProcess
from pipeline.tracking.record import lr_metric, thin
from pipeline.tracking.tracker import StudyInfo, StudySummary
from pipeline.tracking.view import TAG_PREFIX, mlflow_name, saved_view

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

# MLflow's own use of SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

CLOSE_S = 600.0
"""Ends a test that hangs."""
DONE = StudySummary(finished=True, note="done")


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
        epochs=epochs,
        started=1_700_000_000.0,
        ended=1_700_000_010.0,
        environment={"device": "cpu"},
    )


def epoch(
    number: int, *, lr: Mapping[str, tuple[tuple[int, float], ...]] | None = None, **metrics: float
) -> EpochMetrics:
    values = {f"val/{name}": value for name, value in metrics.items()}
    return EpochMetrics(epoch=number, step=10 * number, metrics=values, lr=lr or {})


def opened(root: Path, study: StudyInfo) -> MLflowTracker:
    tracker = MLflowTracker(root, sample_every_s=None)
    tracker.open(study)
    return tracker


def background_tracker(root: Path, study: StudyInfo) -> TrackerProcess:
    tracker = TrackerProcess(root)
    tracker.open(study)
    return tracker


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to create."""
    root = tmp_path_factory.mktemp("template")
    background_tracker(root, study(workload="template")).close(CLOSE_S)
    return root / "mlflow.db"


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "my project"  # a blank in a path is where URIs break
    root.mkdir()
    shutil.copy(template, root)
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
    assert run.info.run_name == "#007 adamw · step"
    assert (run.info.start_time, run.info.end_time) == (1_700_000_000_000, 1_700_000_010_000)
    assert run.data.params["base_lr"] == "0.01"
    assert run.data.params["log10_base_lr"] == "-2.0"
    assert run.data.params["lr_ratio.head"] == "0.30000000000000004"
    assert run.data.params["epochs"] == "2"
    assert run.data.tags["scheduler"] == "step"
    assert run.data.tags["environment.device"] == "cpu"
    assert history(root, run, "val/accuracy") == [(10, 0.8), (20, 0.9)]
    assert history(root, run, "lr/head") == [(10, 0.003), (20, 0.0003)]
    assert history(root, run, "lr/body") == [(10, 0.01), (20, 0.001)]
    (_, last) = connect(root).get_metric_history(run.info.run_id, "val/accuracy")
    assert last.timestamp == run.info.end_time
    assert TrialConfig.from_dict(loads(artifact(root, run, "config.yaml"), source="config.yaml")) == ended().config


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
    groups = ("a", "b", "c")  # 3 × 500 points are more than one call to MLflow takes
    rates = tuple((step, 1 / (3 * step)) for step in range(1, 1201))
    halves = (rates[:600], rates[600:])
    epochs = tuple(
        EpochMetrics(epoch=number, step=600 * number, metrics={}, lr=dict.fromkeys(groups, half))
        for number, half in enumerate(halves, start=1)
    )
    opened(root, study()).end(ended(epochs=epochs, scheduler=OneCycle(), groups=groups))
    (run,) = runs(root, "trial")
    for group in groups:
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


def test_what_a_crash_left_of_a_trial_is_replaced(root: Path) -> None:
    opened(root, study())
    (parent,) = runs(root, "study")
    tags = {"hpo.kind": "trial", "hpo.study": "default-1", "hpo.trial": "0", "mlflow.parentRunId": parent.info.run_id}
    half = connect(root).create_run(parent.info.experiment_id, tags=tags)
    connect(root).log_metric(half.info.run_id, "val/accuracy", 0.8, step=10, timestamp=1)
    opened(root, study()).end(ended(epochs=(epoch(1, accuracy=0.8), epoch(2, accuracy=0.9))))
    (run,) = runs(root, "trial")
    assert run.info.run_id != half.info.run_id
    assert history(root, run, "val/accuracy") == [(10, 0.8), (20, 0.9)]


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
    opened(root, study()).finish(StudySummary(finished=True, note="It **won**.", best=ended(3), files=(best,)))
    (run,) = runs(root, "study")
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.note.content"] == "It **won**."
    assert (run.data.tags["hpo.best_trial"], run.data.tags["hpo.best_value"]) == ("3", "0.9")
    assert artifact(root, run, "best.yaml") == "epochs: 2\n"
    assert artifact(root, run, "space.yaml") == "epochs: 2\n"
    assert not run.data.metrics


def test_an_interrupted_study_is_killed_and_runs_again_when_reopened(root: Path) -> None:
    opened(root, study()).finish(StudySummary(finished=False, note="stopped after 3 trials"))
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
        direction="minimize",
        columns=["optimizer"],
        axes=["optimizer"],
        lr_metrics=["lr/head", "lr/body"],
        created_ms=1,
    )
    assert key == "mlflow.sharedViewState.s 1"
    packed = json.loads(value)["state"].removeprefix("deflate;")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert state["searchFilter"] == "tags.`hpo.kind` = 'trial' and tags.`hpo.study_id` = '7.5'"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val/loss.best`", True)
    assert state["selectedColumns"][:2] == ["metrics.`val/loss.best`", "params.`optimizer`"]
    parallel, *lines = state["compareRunCharts"]
    assert (parallel["selectedParams"], parallel["selectedMetrics"]) == (["optimizer"], ["val/loss.best"])
    assert [line["metricKey"] for line in lines] == ["lr/head", "lr/body", "val/loss.best", "val/loss", "train/loss"]
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
        tracker.end(ended())
        assert tracker.close(CLOSE_S) == []

    log_a_trial(root)
    here = tmp_path / "elsewhere"
    moved(root, here)
    if opened == "search":
        log_a_trial(here)
    else:
        relocate(here / "mlflow.db")
    (run,) = runs(here, "trial")
    assert run.info.artifact_uri.startswith(here.as_uri())
    assert [file.path for file in connect(here).list_artifacts(run.info.run_id)] == ["config.yaml"]
    assert artifact(here, run, "config.yaml")
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


@pytest.mark.parametrize("place", ["experiments.artifact_location", "runs.artifact_uri"])
def test_a_database_does_not_choose_where_artifacts_are_written(root: Path, tmp_path: Path, place: str) -> None:
    opened(root, study())
    table, _, column = place.partition(".")
    (tmp_path / "theirs").mkdir()
    link = root / "mlruns" / "artifacts" / "link"
    link.symlink_to(tmp_path / "theirs")
    for uri in ((tmp_path / "theirs").as_uri(), link.as_uri(), (root / "mlruns" / "..").as_uri(), "s3://theirs/a"):
        with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database, database:
            database.execute(f"UPDATE {table} SET {column} = ?", [uri])
        with pytest.raises(StorageError, match=r"^the database keeps artifacts outside the root, in .*; rename that"):
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
    assert tracker.close(CLOSE_S) == []
    assert [path.name for path in tmp_path.iterdir() if path != elsewhere] == ["new"]
    assert list(elsewhere.iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["mlflow.db", "mlruns"]
    for made in connect(tmp_path / "new").search_experiments():
        assert str(tmp_path / "new" / "mlruns") in made.artifact_location


@pytest.fixture
def background(root: Path) -> Iterator[TrackerProcess]:
    tracker = background_tracker(root, study())
    yield tracker
    tracker.close(CLOSE_S)


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
    background.finish(StudySummary(finished=True, note="done", best=ended(1)))
    assert background.close(CLOSE_S) == []
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
        assert tracker.close(CLOSE_S) == []
    finally:
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)


def test_a_store_that_the_environment_names_after_the_process_began_is_the_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = TrackerProcess(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    tracker.open(study())
    assert tracker.close(CLOSE_S) == []
    assert (tmp_path / "other.db").exists()
    assert connect(root).get_experiment_by_name("digits-cnn") is None


def test_a_killed_process_is_a_warning(root: Path, background: TrackerProcess) -> None:
    os.kill(background.pid, signal.SIGKILL)
    background.end(ended(0))
    background.end(ended(1))
    assert background.close(CLOSE_S) == [
        f"MLflow in {root}: its process ended with signal SIGKILL; 2 trials are not recorded"
    ]


def test_a_store_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "file").touch()
    tracker = background_tracker(tmp_path / "file", study())
    tracker.end(ended())
    tracker.finish(DONE)
    assert tracker.links() == []
    assert tracker.close(CLOSE_S) == [
        f"MLflow in {tmp_path / 'file'}: File exists; 1 trial and the summary are not recorded"
    ]


def test_trials_that_fail_for_one_reason_are_one_warning(root: Path, background: TrackerProcess) -> None:
    assert background.links()
    blocked = root / "mlruns" / "artifacts" / "digits-cnn"
    shutil.rmtree(blocked)  # made for the study's space.yaml
    blocked.touch()
    background.end(ended(0))
    background.end(ended(1))
    assert background.close(CLOSE_S) == [f"MLflow in {root}: Not a directory; 2 trials are not recorded"]


def test_a_trial_that_could_not_be_logged_is_logged_at_the_end(root: Path) -> None:
    answers = io.BytesIO()
    server = Server(0, MLflowTracker(root, sample_every_s=None), answers)
    server.do("open", study())
    blocked = root / "mlruns" / "artifacts" / "digits-cnn"
    shutil.rmtree(blocked)
    blocked.touch()
    server.do("end", ended(0))
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
    assert [(verb, cause) for _, verb, _, cause in said] == [
        ("open", None),
        ("end", None),
        ("end", None),
        ("finish", None),
    ]


def test_a_server_that_is_away_is_a_warning(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = background_tracker(root, study())
    tracker.end(ended())
    assert tracker.close(CLOSE_S) == ["MLflow at MLFLOW_TRACKING_URI: Connection refused; 1 trial is not recorded"]


def test_a_store_named_by_the_environment_takes_the_place_of_the_root(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    tracker = MLflowTracker(tmp_path / "other", sample_every_s=None)
    link = tracker.open(study("elsewhere"))
    tracker.end(ended())
    assert link
    assert link.startswith(f"python -m pipeline.ui --root {tmp_path / 'other'}   then open http://127.0.0.1:5000/#/exp")
    (run,) = runs(root, "trial")
    assert run.info.artifact_uri.startswith((tmp_path / "other" / "mlruns" / "artifacts").as_uri())
    assert artifact(root, run, "config.yaml")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mlruns"]


def test_a_process_that_takes_too_long_is_ended_with_a_warning(root: Path, background: TrackerProcess) -> None:
    os.kill(background.pid, signal.SIGSTOP)
    background.end(ended())
    assert background.close(0.1) == [f"MLflow in {root}: it was not done after 0.1 s; 1 trial is not recorded"]


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
