"""Record studies in MLflow while they run: a run per study, a child run per trial, and a view to compare them.

`optuna.db` is the authority: whatever is missing here is logged when the search goes on.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StorageError
from pipeline.files.sqlite import file_identity
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics
from pipeline.tracking.mlflow_store import (
    database_file,
    find_runs,
    load_mlflow,
    milliseconds,
    open_store,
    refuse_broken,
    refuse_outside,
    remote_uri,
    remove_runs,
    server_page,
    server_uri,
)
from pipeline.tracking.mlflow_trials import TrialRuns
from pipeline.tracking.record import lr_metric, objective_name
from pipeline.tracking.standings import Standings
from pipeline.tracking.tracker import StoredTrial, StudyInfo, StudySummary, root_cause
from pipeline.tracking.view import CONFIRMED, RANK, TAG_PREFIX, WINNER, mlflow_name, saved_view, view_path

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run


RANK_EVERY_S = 30.0
"""Seconds between two updates of the ranks of trials, which the view is sorted by."""
RANK_SHARE = 0.02
"""Most of the time that updates of ranks take; a good trial changes the ranks of up to a hundred others."""


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
        self._file = None if server_uri() else database_file(self._root.absolute())
        self._opened = self._file and file_identity(self._file)
        self._is_new = False
        self._run = self._find_or_create_run()
        location = self._client.get_experiment(self._experiment_id).artifact_location
        refuse_outside(self._root.absolute(), location, self._run.info.artifact_uri)
        self._trials = TrialRuns(self._client, study, self._run, root=self._root.absolute())
        self._client.log_text(self._run_id, study.space, "space.yaml")
        self._standings = Standings(ranks=self._trials.metric(RANK))
        for trial in study.ended:
            self._standings.end(trial)
        points = self._client.get_metric_history(self._run_id, "study/complete")
        self._logged = max((point.step for point in points), default=0)
        """Number of ended trials at the last point of the study's metrics."""
        self._rank_at = time.monotonic() + RANK_EVERY_S
        self._finished = False
        self._save_view()
        self._monitor = self._start_monitor()
        if server_uri():
            page = server_page()
            return page and f"{page}{self._view_path(self._experiment_id)}"
        here = self._root.resolve() == Path.cwd()
        root = "" if here else f" --root {shlex.quote(str(self._root))}"
        command = "mlflow ui" if here and not remote_uri() else f"python -m pipeline.ui{root}"
        return f"{command}   then open http://127.0.0.1:5000{self._view_path(self._experiment_id)}"

    def recorded(self) -> set[int]:
        """Return which trials have a run that has ended, of the same config, or a run that a person has deleted."""
        return {trial.number for trial in self._study.ended if self._trials.is_recorded(trial)}

    def begin(self, trial: BegunTrial) -> None:
        """Take a trial that begins or goes on; `flush` has its run begin or go on."""
        self._trials.begin(trial)

    def epochs(self, metrics: Mapping[int, EpochMetrics], at: float) -> None:
        """Take the metrics of an epoch, for `flush`."""
        self._standings.epochs(len(metrics))
        self._trials.epochs(metrics, at)

    def flush(self, ending: Collection[int] = ()) -> None:
        """Log what was taken, one batch per trial, and how the study stands."""
        self._check_there()
        self._trials.flush(ending)
        self._log_standings()
        if time.monotonic() >= self._rank_at:
            self._log_ranks()

    def end(self, trial: EndedTrial) -> None:
        """Log what the run of a trial lacks, and end it."""
        self._check_there()
        self._trials.end(trial)
        self._standings.end(StoredTrial.of(trial))

    def finish(self, summary: StudySummary) -> None:
        """Log ranks, mark the winner, and end the study's run; opening the study again makes it run again."""
        self._stop_monitor()
        self._check_there()
        self._trials.interrupt()
        self._log_standings()
        self._log_ranks(confirmed=list(summary.confirmed))
        self._client.set_tag(self._run_id, "mlflow.note.content", summary.note)
        best = summary.best
        if best is not None:
            self._client.set_tag(self._run_id, "hpo.best_trial", best.confirms or str(best.number))
            self._client.set_tag(self._run_id, "hpo.best_value", repr(best.value))
            self._mark_winner(best.number)
        self._log_confirmed(summary)
        for path in summary.files:
            self._client.log_artifact(self._run_id, str(path))
        status = "FINISHED" if summary.finished else "KILLED"
        self._client.set_terminated(self._run_id, status, end_time=milliseconds(summary.ended))
        self._finished = True

    def close(self) -> list[str]:
        """End the runs of a search that has died, and return what went wrong without harm to the runs."""
        self._stop_monitor()
        if not self._finished:
            self._trials.interrupt()
            self._client.set_terminated(self._run_id, "KILLED")
        return self._warnings

    def delete(self, study: str, *, identity: str) -> list[str]:
        """Delete a study's runs with their files, and its view; a server of MLFLOW_TRACKING_URI only marks the runs."""
        if not remote_uri() and not (self._root / "mlflow.db").exists():
            return []
        client = open_store(self._root.absolute())
        from mlflow.entities import ViewType

        deleted: list[Run] = []
        for experiment in client.search_experiments(ViewType.ALL):
            experiment_id = experiment.experiment_id
            runs = list(find_runs(client, [experiment_id], f"tags.`hpo.study_id` = '{identity}'", view=ViewType.ALL))
            deleted += runs
            if runs and TAG_PREFIX + mlflow_name(study) in experiment.tags:
                client.delete_experiment_tag(experiment_id, TAG_PREFIX + mlflow_name(study))
        for run in deleted:
            if run.info.lifecycle_stage == "active":
                client.delete_run(run.info.run_id)
        left = [] if remote_uri() else remove_runs(self._root, deleted)
        return [f"{uri} is left, since it is no folder of a run below {self._root / 'mlruns'}" for uri in left]

    @property
    def _run_id(self) -> str:
        return str(self._run.info.run_id)

    @property
    def _experiment_id(self) -> str:
        return str(self._run.info.experiment_id)

    def _check_there(self) -> None:
        """Check that the database is the one that was opened: SQLite writes on into a file that was removed.

        Raises:
            StorageError: The database was removed or replaced.
        """
        if self._file is not None and file_identity(self._file) != self._opened:
            raise StorageError(f"{self._file.name} was removed or replaced by another program meanwhile; put it back")

    def _view_path(self, experiment_id: str) -> str:
        return view_path(experiment_id, self._study.name)

    def _find_or_create_run(self) -> Run:
        """Return the study's run; a run or an experiment that was deleted is restored, wherever it was moved."""
        from mlflow.entities import ViewType

        experiments = [e.experiment_id for e in self._client.search_experiments(ViewType.ALL)]
        ours = f"tags.`hpo.study_id` = '{self._study.identity}'"
        kind = " and tags.`hpo.kind` = 'study'"
        found = next(find_runs(self._client, experiments, ours + kind, view=ViewType.ALL), None)
        if found is None:
            self._is_new = True
            # The run may be gone for good, and its experiment renamed, while the trials' runs are there.
            trial = next(find_runs(self._client, experiments, ours, view=ViewType.ALL), None)
            if trial is None:
                experiment_id = self._find_or_create_experiment().experiment_id
            else:
                experiment_id = trial.info.experiment_id
                self._restore(self._client.get_experiment(experiment_id))
            return self._client.create_run(
                experiment_id,
                start_time=milliseconds(self._study.started),
                run_name=self._study.name,
                tags=self._tags(experiment_id),
            )
        run_id, experiment_id = found.info.run_id, found.info.experiment_id
        self._restore(self._client.get_experiment(experiment_id))
        if self._client.get_run(run_id).info.lifecycle_stage == "deleted":
            self._client.restore_run(run_id)
        for key, value in self._tags(experiment_id).items():
            self._client.set_tag(run_id, key, value)
        self._client.update_run(run_id, status="RUNNING")
        return found

    def _find_or_create_experiment(self) -> Experiment:
        name = self._study.workload
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            # Absolute, because MLflow resolves a relative path against the working folder of whoever reads it.
            folder = self._root.absolute() / "mlruns" / "artifacts" / mlflow_name(name)
            location = None if server_uri() else folder.as_uri()
            return self._client.get_experiment(self._client.create_experiment(name, artifact_location=location))
        self._restore(experiment)
        return experiment

    def _restore(self, experiment: Experiment) -> None:
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)

    def _tags(self, experiment_id: str) -> dict[str, str]:
        study = self._study
        return {
            "hpo.kind": "study",
            "hpo.study": study.name,
            "hpo.study_id": study.identity,
            "hpo.metric": study.objective.metric,
            "hpo.direction": study.objective.direction,
            "hpo.of": study.objective.of,
            "hpo.seed": str(study.seed),
            **{f"environment.{mlflow_name(key)}": str(value) for key, value in study.environment.items()},
            "mlflow.note.content": f"Study **{study.name}**, seed {study.seed}: {study.objective.direction} "
            f"`{study.objective.metric}` of a trial's {study.objective.of} epoch.\n\n"
            f"[Compare its trials]({self._view_path(experiment_id)[1:]})\n\n```yaml\n{study.space.strip()}\n```\n",
        }

    def _log_standings(self) -> None:
        from mlflow.entities import Metric

        count, now = self._standings.count, time.time()
        if count <= self._logged:
            return
        values = self._standings.metrics(now).items()
        metrics = [Metric(name, value, milliseconds(now), count) for name, value in values]
        self._client.log_batch(self._run_id, metrics, synchronous=True)
        self._logged = count

    def _log_ranks(self, *, confirmed: Sequence[int] = ()) -> None:
        from mlflow.entities import Metric

        began, now = time.monotonic(), milliseconds(time.time())
        while self._trials.superseded:
            self._standings.ranks.pop(self._trials.superseded.pop(), None)
        for number, rank in self._standings.changed_ranks(confirmed=confirmed).items():
            if run_id := self._trials.ended.get(number):  # none if a person has deleted the run
                metric = Metric(RANK, rank, now, self._standings.count)
                self._client.log_batch(run_id, [metric], synchronous=True)
                self._standings.ranks[number] = rank
        ended = time.monotonic()
        self._rank_at = ended + max(RANK_EVERY_S, (ended - began) / RANK_SHARE)

    def _log_confirmed(self, summary: StudySummary) -> None:
        """Log the means of the trials that are confirmed now; the mean of one that no longer is becomes NaN."""
        from mlflow.entities import Metric

        before = self._trials.metric(CONFIRMED)
        stale = {number: math.nan for number, mean in before.items() if not math.isnan(mean)}
        for number, mean in {**stale, **summary.confirmed}.items():
            if run_id := self._trials.ended.get(number):
                metric = Metric(CONFIRMED, mean, milliseconds(summary.ended), self._standings.count)
                self._client.log_batch(run_id, [metric], synchronous=True)

    def _mark_winner(self, number: int) -> None:
        """Mark the run of the winner, and no other run of the study."""
        from mlflow.entities import ViewType

        winner = self._trials.ended.get(number)
        marked = f"tags.`hpo.study_id` = '{self._study.identity}' and tags.`{WINNER}` = 'yes'"
        for run in find_runs(self._client, [self._experiment_id], marked, view=ViewType.ACTIVE_ONLY):
            if run.info.run_id != winner:
                self._client.delete_tag(run.info.run_id, WINNER)
        if winner is not None:
            self._client.set_tag(winner, WINNER, "yes")

    def _save_view(self) -> None:
        study = self._study
        key, value = saved_view(
            study=study.name,
            identity=study.identity,
            metric=study.objective.metric,
            ranking=objective_name(study.objective),
            columns=[mlflow_name(name) for name in study.searched],
            axes=["log10_base_lr" if name == "base_lr" else mlflow_name(name) for name in study.shared],
            lr_metrics=[lr_metric(group) for group in study.groups],
            created_ms=milliseconds(time.time()),
        )
        tags = self._client.get_experiment(self._experiment_id).tags
        if key in tags and not self._is_new:  # a person may have changed the view
            return
        try:
            self._client.set_experiment_tag(self._experiment_id, key, value)
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
