"""Record studies in MLflow: a run per study, a child run per trial, and a view to compare them.

A search stores a trial in `optuna.db` before MLflow is told, so whatever is missing here can be logged again.
"""

from __future__ import annotations

import math
import shlex
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.files.strict_yaml import dumps
from pipeline.space.trial import EndedTrial, TrialState
from pipeline.tracking.mlflow_store import (
    find_runs,
    load_mlflow,
    open_store,
    refuse_broken,
    refuse_outside,
    remote_uri,
    remove_runs,
    server_page,
    server_uri,
)
from pipeline.tracking.record import (
    lr_csv,
    lr_metric,
    metric_points,
    objective_name,
    objective_points,
    trial_params,
    trial_tags,
)
from pipeline.tracking.tracker import StudyInfo, StudySummary, root_cause
from pipeline.tracking.view import TAG_PREFIX, mlflow_name, saved_view, view_path

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run


STATUS = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.DIVERGED: "KILLED",
    TrialState.FAILED: "FAILED",
}


class MLflowTracker:
    """Writes studies to MLflow: `root/mlflow.db`, artifacts below `root/mlruns`, or MLFLOW_TRACKING_URI if set.

    A study is a run, and each of its trials is a child run. Every method raises MLflow's own exceptions.
    """

    def __init__(self, root: Path, *, sample_every_s: float | None = 60.0) -> None:
        """Check the store.

        Args:
            root: The folder of the store.
            sample_every_s: Seconds between records of the machine's load in the study's run, which begin after as many
                seconds, so that a short search has none; None for no such records.

        Raises:
            InvalidInput: The store cannot be used.
        """
        self._root = root
        self._sample_every_s = sample_every_s
        refuse_broken(root)

    def __str__(self) -> str:
        return "MLflow at MLFLOW_TRACKING_URI" if remote_uri() else f"MLflow in {self._root.absolute()}"

    def load(self) -> None:
        """Import what writing a study needs, which takes seconds."""
        load_mlflow()

    def open(self, study: StudyInfo) -> str | None:
        """Open or create the store, the experiment, the study's run and its view; return how to look at the view."""
        self._study = study
        self._warnings: list[str] = []
        self._client = open_store(self._root.absolute())
        self._experiment = self._find_or_create_experiment()
        self._is_new = False
        self._run_id = self._find_or_create_run()
        if not remote_uri():
            places = self._experiment.artifact_location, self._client.get_run(self._run_id).info.artifact_uri
            refuse_outside(self._root.absolute(), *places)
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
        self._monitor = self._start_monitor()
        if server_uri():
            page = server_page()
            return page and f"{page}{self._view_path()}"
        here = self._root.resolve() == Path.cwd()
        root = "" if here else f" --root {shlex.quote(str(self._root))}"
        command = "mlflow ui" if here and not remote_uri() else f"python -m pipeline.ui{root}"
        return f"{command}   then open http://127.0.0.1:5000{self._view_path()}"

    def end(self, trial: EndedTrial) -> None:
        """Write a trial as a child run; keep a run that is complete, replace a run that a crash left incomplete."""
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
                "hpo.study": self._study.name,
                "hpo.study_id": self._study.identity,
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

    def finish(self, summary: StudySummary) -> None:
        """End the study's run, with the note as its description; opening the study again makes it run again."""
        self._stop_monitor()
        self._client.set_tag(self._run_id, "mlflow.note.content", summary.note)
        if summary.best is not None:
            # Tags and not metrics: a metric that only this run has would make a section of one bar on the page.
            self._client.set_tag(self._run_id, "hpo.best_trial", str(summary.best.number))
            self._client.set_tag(self._run_id, "hpo.best_value", repr(summary.best.value))
        self._client.set_terminated(self._run_id, "FINISHED" if summary.finished else "KILLED")
        for path in summary.files:
            self._client.log_artifact(self._run_id, str(path))

    def close(self) -> list[str]:
        """Stop recording the machine's load, and return what went wrong without harm to the runs."""
        self._stop_monitor()
        return self._warnings

    def delete(self, study: str, *, identity: str) -> list[str]:
        """Delete a study's runs with their files, and its view; a server of MLFLOW_TRACKING_URI only marks the runs."""
        if not remote_uri() and not (self._root / "mlflow.db").exists():
            return []
        client = open_store(self._root.absolute())
        from mlflow.entities import ViewType

        deleted: list[Run] = []
        for experiment in client.search_experiments(ViewType.ALL):
            runs = list(find_runs(client, experiment, f"tags.`hpo.study_id` = '{identity}'", view=ViewType.ALL))
            deleted += runs
            if runs and TAG_PREFIX + mlflow_name(study) in experiment.tags:
                client.delete_experiment_tag(experiment.experiment_id, TAG_PREFIX + mlflow_name(study))
        for run in deleted:
            if run.info.lifecycle_stage == "active":
                client.delete_run(run.info.run_id)
        left = [] if remote_uri() else remove_runs(self._root, deleted)
        return [f"{uri} is left, since it is no folder of a run below {self._root / 'mlruns'}" for uri in left]

    def _view_path(self) -> str:
        return view_path(self._experiment.experiment_id, self._study.name)

    def _find_or_create_experiment(self) -> Experiment:
        name = self._study.workload
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            # Absolute, because MLflow resolves a relative path against the working folder of whoever reads it.
            folder = self._root.absolute() / "mlruns" / "artifacts" / mlflow_name(name)
            location = None if server_uri() else folder.as_uri()
            return self._client.get_experiment(self._client.create_experiment(name, artifact_location=location))
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)
        return experiment

    def _find_or_create_run(self) -> str:
        study = self._study
        tags = {
            "hpo.kind": "study",
            "hpo.study": study.name,
            "hpo.study_id": study.identity,
            "hpo.metric": study.objective.metric,
            "hpo.direction": study.objective.direction,
            "hpo.of": study.objective.of,
            "hpo.seed": str(study.seed),
            "mlflow.note.content": f"Study **{study.name}**, seed {study.seed}: {study.objective.direction} "
            f"`{study.objective.metric}` of a trial's {study.objective.of} epoch.\n\n"
            f"[Compare its trials]({self._view_path()[1:]})\n\n```yaml\n{study.space.strip()}\n```\n",
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

        return find_runs(self._client, self._experiment, condition, view=ViewType.ACTIVE_ONLY)

    def _save_view(self) -> None:
        study = self._study
        key, value = saved_view(
            study=study.name,
            identity=study.identity,
            metric=study.objective.metric,
            ranking=objective_name(study.objective),
            direction=study.objective.direction,
            columns=[mlflow_name(name) for name in study.searched],
            axes=["log10_base_lr" if name == "base_lr" else mlflow_name(name) for name in study.shared],
            lr_metrics=[lr_metric(group) for group in study.groups],
            created_ms=_milliseconds(time.time()),
        )
        if key in self._experiment.tags and not self._is_new:  # a person may have changed the view
            return
        try:
            self._client.set_experiment_tag(self._experiment.experiment_id, key, value)
        except Exception as error:  # the runs are whole without it
            self._warnings.append(f"the view to compare trials could not be saved: {root_cause(error)}")

    def _start_monitor(self) -> Any:
        """Have MLflow record the load of processors, memory, disk and network, and of GPUs if nvidia-ml-py is there."""
        if self._sample_every_s is None:
            return None
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            build: Any = SystemMetricsMonitor  # which has no types
            uri = self._client.tracking_uri
            monitor = build(self._run_id, self._sample_every_s, resume_logging=True, tracking_uri=uri)
            monitor.start()
        except Exception as error:  # the runs are whole without it
            self._warnings.append(f"the load of the machine is not recorded: {root_cause(error)}")
            return None
        return monitor

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None

    def _log_values(self, run_id: str, trial: EndedTrial) -> None:
        from mlflow.entities import Metric, Param

        points = metric_points(trial) + objective_points(trial, self._study.objective)
        last_step = max((step for _, step, _ in points), default=1)
        duration = trial.ended - trial.started
        self._client.log_batch(  # splits what exceeds MLflow's limits for one call
            run_id,
            # Trials that train together share one clock, so a trial's steps are spread evenly over the trial's time.
            [
                Metric(name, value, _milliseconds(trial.started + duration * step / last_step), step)
                for name, step, value in points
                if math.isfinite(value)  # MLflow would store an infinity as 1.8e308, which ruins every chart
            ],
            [Param(key, value) for key, value in trial_params(trial).items()],
            synchronous=True,
        )


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
