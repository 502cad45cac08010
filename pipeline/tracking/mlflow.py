"""MLflow, and the only file that imports it: a run per study, a child run per trial, and a view to compare them.

MLflow is told only what the study has stored already, so whatever is missing here can be logged again. A search uses
`pipeline.tracking.process.BackgroundTracker`, which runs a `Tracker` in a process of its own.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from pipeline.errors import InvalidInput, Problem
from pipeline.files.sqlite import create_whole, open_existing, sqlite_uri
from pipeline.files.strict_yaml import dumps
from pipeline.space.trial import EndedTrial, TrialState
from pipeline.tracking.paths import relocate
from pipeline.tracking.record import lr_csv, lr_metric, metric_points, trial_params, trial_tags
from pipeline.tracking.view import TAG_PREFIX, mlflow_name, saved_view, view_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run


STATUS = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.DIVERGED: "KILLED",
    TrialState.FAILED: "FAILED",
}
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # MLflow's own 7 retries of 120 s keep a search waiting for minutes at its end when the server is away.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Defaults; what the user set stays."""
MAX_RUNS = 500
"""Whose ids a command line has room for."""


@dataclass(frozen=True, kw_only=True)
class StudyInfo:
    """What MLflow is told of a study before its first trial."""

    name: str
    identity: str
    """Of this study and no other, even one of the same name in a new database."""
    experiment: str
    """Name of the MLflow experiment, shared by studies that can be compared."""
    metric: str
    """The objective, such as `val/accuracy`."""
    direction: str
    """Of the objective: "maximize" or "minimize"."""
    groups: tuple[str, ...]
    """Names of the parameter groups."""
    columns: tuple[str, ...]
    """Parameters that differ between trials, such as `optimizer`, `base_lr`, `momentum`, `lr_ratio.head`."""
    axes: tuple[str, ...]
    """Those of them for parallel coordinates, `log10_base_lr` for `base_lr`; MLflow draws only runs that have all."""
    space: str
    """The search space as YAML text."""
    seed: int


class Tracker:
    """Writes one study to MLflow: `root/mlflow.db`, artifacts below `root/mlruns`, or MLFLOW_TRACKING_URI if set.

    Every method raises what MLflow raises.
    """

    def __init__(self, root: Path, study: StudyInfo, *, sample_every: float | None = None) -> None:
        """Open or create the store, the experiment, the study's run and its view.

        Args:
            root: Where the store is.
            study: What is tracked.
            sample_every: Seconds between records of the machine's load in the study's run, the first one after as many
                seconds; None for no such records.
        """
        self.study = study
        self.warnings: list[str] = []
        """What went wrong without harm to the record, one sentence each."""
        self._client = _open_store(root.absolute())
        self._experiment = self._find_or_create_experiment(root.absolute())
        self._is_new = False
        self._run_id = self._find_or_create_run()
        self._client.log_text(self._run_id, study.space, "space.yaml")
        self._ended: set[int] = set()
        self._unfinished: defaultdict[int, list[str]] = defaultdict(list)
        for run in self._search(f"tags.mlflow.parentRunId = '{self._run_id}'"):
            number = int(run.data.tags["hpo.trial"])
            if run.info.status == "RUNNING":
                self._unfinished[number].append(run.info.run_id)
            else:
                self._ended.add(number)
        self._save_view()
        self._monitor = self._start_monitor(sample_every) if sample_every is not None else None

    def view_path(self) -> str:
        """Return what follows `http://host:port` in the link to the study's view."""
        return view_path(self._experiment.experiment_id, self.study.name)

    def log_trial(self, trial: EndedTrial) -> None:
        """Write a trial, complete, as a child run; do nothing if it is there, replace what a crash left of it."""
        if trial.number in self._ended:
            return
        for run_id in self._unfinished.pop(trial.number, []):
            self._client.delete_run(run_id)
        config = trial.config
        run = self._client.create_run(
            self._experiment.experiment_id,
            start_time=_milliseconds(trial.started),
            run_name=f"#{trial.number:03} {config.optimizer.name} · {config.scheduler.name}",
            tags={
                "mlflow.parentRunId": self._run_id,
                "hpo.study": self.study.name,
                "hpo.study_id": self.study.identity,
                **trial_tags(trial),
            },
        )
        run_id = run.info.run_id
        self._unfinished[trial.number].append(run_id)
        self._log_values(run_id, trial)
        self._client.log_text(run_id, dumps(config.to_dict()), "config.yaml")
        if history := lr_csv(trial):
            self._client.log_text(run_id, history, "lr_history.csv")
        self._client.set_terminated(run_id, STATUS[trial.state], end_time=_milliseconds(trial.ended))
        del self._unfinished[trial.number]
        self._ended.add(trial.number)

    def finish(self, best: EndedTrial | None, note: str, artifacts: Sequence[Path]) -> None:
        """End the study's run.

        Args:
            best: The trial that won, if any completed.
            note: Markdown that takes the place of the run's description.
            artifacts: Files to keep with the run, such as `best.yaml`.
        """
        self._stop_monitor()
        self._client.set_tag(self._run_id, "mlflow.note.content", note)
        if best is not None:
            # Tags and not metrics: a metric that only this run has would make a section of one bar on the page.
            self._client.set_tag(self._run_id, "hpo.best_trial", str(best.number))
            self._client.set_tag(self._run_id, "hpo.best_value", repr(best.value))
        self._client.set_terminated(self._run_id, "FINISHED")
        for path in artifacts:
            self._client.log_artifact(self._run_id, str(path))

    def interrupt(self, note: str) -> None:
        """Mark the study's run as stopped, truthfully even if nobody ever resumes; opening it again makes it run."""
        self._stop_monitor()
        self._client.set_tag(self._run_id, "mlflow.note.content", note)
        self._client.set_terminated(self._run_id, "KILLED")

    def _find_or_create_experiment(self, root: Path) -> Experiment:
        name = self.study.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            # Absolute, because MLflow resolves a relative one against the working folder of whoever reads it.
            local = None if remote_uri() else (root / "mlruns" / "artifacts" / mlflow_name(name)).as_uri()
            return self._client.get_experiment(self._client.create_experiment(name, artifact_location=local))
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)
        return experiment

    def _find_or_create_run(self) -> str:
        study = self.study
        tags = {
            "hpo.kind": "study",
            "hpo.study": study.name,
            "hpo.study_id": study.identity,
            "hpo.metric": study.metric,
            "hpo.direction": study.direction,
            "hpo.seed": str(study.seed),
            "mlflow.note.content": f"Study **{study.name}**, seed {study.seed}: {study.direction} `{study.metric}`.\n\n"
            f"[Compare its trials]({self.view_path()[1:]})\n\n```yaml\n{study.space.strip()}\n```\n",
        }
        for run in self._search("tags.`hpo.kind` = 'study'"):
            if run.data.tags.get("hpo.study_id") == study.identity:
                for key, value in tags.items():
                    self._client.set_tag(run.info.run_id, key, value)
                self._client.update_run(run.info.run_id, status="RUNNING")
                return str(run.info.run_id)
        self._is_new = True
        run = self._client.create_run(self._experiment.experiment_id, run_name=study.name, tags=tags)
        return str(run.info.run_id)

    def _search(self, condition: str) -> Iterator[Run]:
        from mlflow.entities import ViewType

        return _runs(self._client, self._experiment, condition, view=ViewType.ACTIVE_ONLY)

    def _save_view(self) -> None:
        study = self.study
        key, value = saved_view(
            study=study.name,
            identity=study.identity,
            metric=study.metric,
            direction=study.direction,
            columns=[mlflow_name(name) for name in study.columns],
            axes=[mlflow_name(name) for name in study.axes],
            lr_metrics=[lr_metric(group) for group in study.groups],
            created_ms=_milliseconds(time.time()),
        )
        if key in self._experiment.tags and not self._is_new:  # perhaps changed by a person since
            return
        try:
            self._client.set_experiment_tag(self._experiment.experiment_id, key, value)
        except Exception as error:  # the runs are whole without it
            self.warnings.append(f"the view to compare trials could not be saved: {cause_of(error)}")

    def _start_monitor(self, sample_every: float) -> Any:
        """Have MLflow record the load of processors, memory, disk and network, and of GPUs if nvidia-ml-py is there."""
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            build: Any = SystemMetricsMonitor  # which has no types
            uri = self._client.tracking_uri
            monitor = build(self._run_id, sample_every, resume_logging=True, tracking_uri=uri)
            monitor.start()
        except Exception as error:  # the runs are whole without it
            self.warnings.append(f"the load of the machine is not recorded: {cause_of(error)}")
            return None
        return monitor

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()

    def _log_values(self, run_id: str, trial: EndedTrial) -> None:
        from mlflow.entities import Metric, Param

        points = metric_points(trial)
        last_step = max((step for _, step, _ in points), default=1)
        duration = trial.ended - trial.started
        self._client.log_batch(  # splits what exceeds MLflow's limits for one call
            run_id,
            # A trial has no clock of its own among those that train with it: its steps share its time evenly.
            [
                Metric(name, value, _milliseconds(trial.started + duration * step / last_step), step)
                for name, step, value in points
                if math.isfinite(value)  # MLflow would store an infinity as 1.8e308, which ruins every chart
            ],
            [Param(key, value) for key, value in trial_params(trial).items()],
            synchronous=True,
        )


def delete_study(root: Path, *, name: str, identity: str) -> None:
    """Delete a study's runs and view. Runs go for good and with their files; in a store that others serve, as there.

    Raises:
        Exception: What MLflow raises.
    """
    if not remote_uri() and not (root / "mlflow.db").exists():
        return
    client = _open_store(root.absolute())
    from mlflow.entities import ViewType

    deleted, folders = [], []
    for experiment in client.search_experiments(ViewType.ALL):
        for run in _runs(client, experiment, f"tags.`hpo.study_id` = '{identity}'", view=ViewType.ALL):
            if run.info.lifecycle_stage == "active":
                client.delete_run(run.info.run_id)
            deleted.append(run.info.run_id)
            folders.append(Path(unquote(urlparse(run.info.artifact_uri).path)).parent)
        if deleted and TAG_PREFIX + mlflow_name(name) in experiment.tags:
            client.delete_experiment_tag(experiment.experiment_id, TAG_PREFIX + mlflow_name(name))
    if remote_uri():
        return
    for start in range(0, len(deleted), MAX_RUNS):
        uri = sqlite_uri(root / "mlflow.db")
        command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", uri, "--tracking-uri", uri]
        runs = ",".join(deleted[start : start + MAX_RUNS])
        subprocess.run([*command, "--run-ids", runs], check=True, capture_output=True)
    for folder in folders:
        with contextlib.suppress(OSError):  # MLflow leaves it, empty
            folder.rmdir()


def remote_uri() -> str | None:
    """Return the store that the user chose in place of the root's, if any."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def refuse_broken(root: Path) -> None:
    """Refuse, before anything is done, a `mlflow.db` that is no database.

    Raises:
        InvalidInput: SQLite cannot read it, or it is a link to nothing, which a new database would replace.
    """
    database = root / "mlflow.db"
    if remote_uri() or not os.path.lexists(database):
        return
    try:
        _try(database)
    except sqlite3.Error as error:
        message = f"cannot be used as MLflow's database: {error}; move it away, or name another --root"
        raise InvalidInput(str(database), [Problem("", message)]) from None


def cause_of(error: BaseException) -> str:
    """Return in one line why MLflow failed: the system's reason where there is one, without SQL, retries and paths."""
    chain = [error]
    while behind := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(behind)
    if not isinstance(error, OSError):
        error = next((link for link in reversed(chain) if isinstance(link, OSError | sqlite3.Error)), error)
    # A path names the run, and the same cause must read the same for every trial.
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    text = next(iter(text.strip().splitlines()), type(error).__name__)
    return text if len(text) <= 300 else f"{text[:300]}…"


def _runs(client: MlflowClient, experiment: Experiment, condition: str, *, view: int) -> Iterator[Run]:
    """Yield the runs of an experiment that fulfil a condition and belong to a view: active ones, or all."""
    token = None
    while True:
        page = client.search_runs([experiment.experiment_id], condition, view, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def load_mlflow() -> None:
    """Import what writing a study needs, which takes seconds."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # noqa: F401
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # noqa: F401


def _open_store(root: Path) -> MlflowClient:
    load_mlflow()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    if remote := remote_uri():
        return MlflowClient(remote)
    database = root / "mlflow.db"
    if not database.exists():
        create_whole(database, _build_database)
    _try(database)
    relocate(database)
    return MlflowClient(sqlite_uri(database))


def _try(database: Path) -> None:
    """Raise what SQLite raises for a file that is no database; MLflow would try for minutes to open it."""
    try:
        with contextlib.closing(open_existing(database, patience=0)) as connection:
            connection.execute("PRAGMA schema_version")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:  # one that another process holds is a database
            raise


def _build_database(database: Path) -> None:
    """Make MLflow's tables."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # The experiment "Default", which MLflow makes here, would otherwise point below the working folder.
    store = SqlAlchemyStore(sqlite_uri(database), str(database.parent / "mlruns"))  # type: ignore[no-untyped-call]
    store.engine.dispose()


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
