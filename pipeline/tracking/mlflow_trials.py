"""The runs of a study's trials in MLflow: begun, gone on with after a crash, ended.

Every method may be called again after an error or a crash: a step that a run has is not logged again.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from pipeline.space.search_space import Objective
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics, TrialState
from pipeline.tracking.mlflow_store import find_runs, milliseconds, refuse_outside
from pipeline.tracking.record import (
    config_hash,
    ended_tags,
    epoch_points,
    kind_tags,
    lr_csv,
    objective_points,
    run_name,
    trial_params,
)
from pipeline.tracking.tracker import StoredTrial, StudyInfo

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

STATUS = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.DIVERGED: "KILLED",
    TrialState.FAILED: "FAILED",
}
STATES = {state.value for state in TrialState}
YOUNG_S = 2.5
"""Seconds that something waits to be logged, besides the time to the next flush; small trials end within them."""
RUNNING, INTERRUPTED, SUPERSEDED = "running", "interrupted", "superseded"
"""Values of the tag `hpo.state` of a trial that has not ended."""


class TrialRuns:
    """The run of each trial of a study, a child of the study's run.

    A trial's run is found by the study's identity and the trial's number, whatever its parent. A run that a person has
    deleted stays deleted. A run of another config is marked as superseded, and another begins.

    Args:
        client: The store.
        study: The study.
        parent: The study's run.
        root: The folder of the store.

    Raises:
        StorageError: A run's artifacts would be written outside the root.
    """

    def __init__(self, client: MlflowClient, study: StudyInfo, parent: Run, *, root: Path) -> None:
        self._client = client
        self._study = study
        self._parent = parent
        self._root = root
        self._found: dict[int, Run] = {}
        self._training: dict[int, _Training] = {}
        self._deleted: set[int] = set()
        self.superseded: set[int] = set()
        """Numbers of trials whose run has been replaced since this was last emptied."""
        self.ended: dict[int, str] = {}
        """Number of each trial whose run has ended, to the run's id."""
        for run in self._search():
            self._take(run)

    def metric(self, name: str) -> dict[int, float]:
        """Return the value of a metric that runs had when they were found, by the numbers of their trials."""
        return {n: run.data.metrics[name] for n, run in self._found.items() if name in run.data.metrics}

    def is_recorded(self, trial: StoredTrial) -> bool:
        """Return whether a trial has a run that has ended, of the same config, or a run that a person has deleted."""
        if trial.number in self._deleted:
            return True
        run = self._found.get(trial.number)
        return run is not None and trial.number in self.ended and run.data.tags.get("hpo.config") == trial.config

    def begin(self, trial: BegunTrial) -> None:
        """Take a trial that begins or goes on; `flush` has its run begin or go on."""
        if trial.number not in self._deleted:
            self.ended.pop(trial.number, None)
            self._training[trial.number] = training = _Training(trial, trains=True)
            training.add(trial.epochs, at=time.time(), objective=self._study.objective)

    def epochs(self, metrics: Mapping[int, EpochMetrics], at: float) -> None:
        """Take the metrics of an epoch that ended at a time."""
        for number, epoch in metrics.items():
            if number in self._training:
                self._training[number].add([epoch], at=at, objective=self._study.objective)

    def flush(self, ending: Collection[int] = ()) -> None:
        """Log what was taken; log what can be logged even if some run cannot.

        What is younger than `YOUNG_S` waits for the next time, and trials that are about to end wait for their end: a
        trial that trains for a second or two is then logged once.

        Raises:
            Exception: The last reason why a run could not be logged.
        """
        failed: Exception | None = None
        old = time.time() - YOUNG_S
        for number, training in list(self._training.items()):
            try:
                if number not in ending and training.waits_since <= old:
                    with self._unless_deleted(training):
                        self._log(training)
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed

    def end(self, trial: EndedTrial) -> None:
        """Log what a run lacks of a trial that has ended, and end the run."""
        number, objective = trial.number, self._study.objective
        if number in self._deleted or (number in self.ended and not self._superseded(trial)):
            return
        begun = BegunTrial(number=number, config=trial.config, started=trial.started, confirms=trial.confirms)
        training = self._training.setdefault(number, _Training(begun))
        with self._unless_deleted(training):
            training.add(trial.epochs[len(training.epochs) :], at=trial.ended, objective=objective)
            self._find(training)
            if training.last_step > max((epoch.step for epoch in trial.epochs), default=0):
                # The run saw the trial train further; then the search was killed, and the trial ended earlier.
                self._supersede(training.run_id)
                self.superseded.add(number)
                self._found.pop(number, None)
                training = self._training[number] = _Training(begun)
                training.add(trial.epochs, at=trial.ended, objective=objective)
            run_id = self._log(training, ended_tags(trial))
            if history := lr_csv(trial):
                self._client.log_text(run_id, history, "lr_history.csv")
            self._client.set_terminated(run_id, STATUS[trial.state], end_time=milliseconds(trial.ended))
            self.ended[number] = run_id
            del self._training[number]

    def interrupt(self) -> None:
        """End the runs of trials that have not ended; such a run goes on when its trial does."""
        for training in list(self._training.values()):
            with self._unless_deleted(training):
                run_id = self._log(training, {"hpo.state": INTERRUPTED})
                self._client.set_terminated(run_id, "KILLED")
        self._training = {}

    def _search(self, condition: str = "") -> list[Run]:
        from mlflow.entities import ViewType

        ours = f"tags.`hpo.study_id` = '{self._study.identity}'"
        ours += f" and tags.`hpo.kind` != 'study' and tags.`hpo.kind` != '{SUPERSEDED}'"
        experiment = self._parent.info.experiment_id
        return list(find_runs(self._client, [experiment], ours + condition, view=ViewType.ALL))

    def _take(self, run: Run) -> None:
        """Take a run that was found: deleted, ended, or to go on with."""
        number, tags = int(run.data.tags["hpo.trial"]), run.data.tags
        if run.info.lifecycle_stage == "deleted":
            self._deleted.add(number)
            return
        if number in self._found:  # a server made it twice, when a request was repeated
            self._supersede(run.info.run_id)
            return
        refuse_outside(self._root, run.info.artifact_uri)
        self._found[number] = run
        if run.info.status != "RUNNING" and tags.get("hpo.state") in STATES:
            self.ended[number] = run.info.run_id
        if tags.get("mlflow.parentRunId") != self._parent.info.run_id:
            self._client.set_tag(run.info.run_id, "mlflow.parentRunId", self._parent.info.run_id)

    def _superseded(self, trial: BegunTrial | EndedTrial) -> bool:
        """Say whether the run that was found is of another config; such a run is marked."""
        run = self._found.get(trial.number)
        if run is None or run.data.tags.get("hpo.config") == config_hash(trial.config):
            return False
        self._supersede(run.info.run_id)
        self.superseded.add(trial.number)
        del self._found[trial.number]
        return True

    def _supersede(self, run_id: str | None) -> None:
        from mlflow.entities import RunTag

        assert run_id
        tags = [RunTag("hpo.kind", SUPERSEDED), RunTag("hpo.state", SUPERSEDED)]
        self._client.log_batch(run_id, tags=tags, synchronous=True)
        self._client.set_terminated(run_id, "KILLED")

    @contextlib.contextmanager
    def _unless_deleted(self, training: _Training) -> Iterator[None]:
        """Pass over a trial from now on if its run cannot be logged because a person has deleted it."""
        try:
            yield
        except Exception:
            training.last = None  # some of what failed may have arrived
            if not training.run_id or self._client.get_run(training.run_id).info.lifecycle_stage == "active":
                raise
            self._deleted.add(training.trial.number)
            self._training.pop(training.trial.number, None)

    def _log(self, training: _Training, tags: Mapping[str, str] = MappingProxyType({})) -> str:
        """Log what a trial's run lacks, then tags; return the run's id."""
        from mlflow.entities import Metric, Param, RunTag

        self._find(training)
        if training.run_id is None:
            self._create(training, tags)
            tags = {}
        assert training.run_id
        assert training.last is not None
        lacks = [point for point in training.waiting if point.step > training.last.get(point.name, -1)]
        params = {} if training.has_params else trial_params(training.trial.config)
        self._client.log_batch(  # splits what exceeds MLflow's limits for one call
            training.run_id,
            [Metric(point.name, point.value, milliseconds(point.time), point.step) for point in lacks],
            [Param(key, value) for key, value in params.items()],
            [RunTag(key, value) for key, value in tags.items()],
            synchronous=True,
        )
        training.has_params = True
        training.last |= {point.name: point.step for point in lacks}
        training.waiting.clear()
        return training.run_id

    def _find(self, training: _Training) -> None:
        """Find the run of a trial if there is one, have it go on, and read which steps it has."""
        trial = training.trial
        if training.run_id is None:
            if training.may_exist:
                for run in self._search(f" and tags.`hpo.trial` = '{trial.number}'"):
                    self._take(run)
            if trial.number not in self._found or self._superseded(trial):
                return
            run = self._found[trial.number]
            training.run_id, training.has_params = run.info.run_id, bool(run.data.params)
            if training.trains:
                if "hpo.reason" in run.data.tags:  # it had ended, and the search was killed before it was stored
                    self._client.delete_tag(training.run_id, "hpo.reason")
                self._client.set_tag(training.run_id, "hpo.state", RUNNING)
                self._client.set_tag(training.run_id, "hpo.resumed_after_epoch", str(len(trial.epochs)))
                self._client.update_run(training.run_id, status="RUNNING")
        if training.last is None:
            names = self._client.get_run(training.run_id).data.metrics
            history = {name: self._client.get_metric_history(training.run_id, name) for name in names}
            training.last = {name: max(point.step for point in points) for name, points in history.items()}

    def _create(self, training: _Training, tags: Mapping[str, str]) -> None:
        trial = training.trial
        training.may_exist = True
        run = self._client.create_run(
            self._parent.info.experiment_id,
            start_time=milliseconds(trial.started),
            run_name=run_name(trial, batch="batch_size" in self._study.searched),
            tags={
                "mlflow.parentRunId": self._parent.info.run_id,
                **kind_tags(trial),
                "hpo.study": self._study.name,
                "hpo.study_id": self._study.identity,
                "hpo.trial": str(trial.number),
                "hpo.config": config_hash(trial.config),
                "hpo.state": RUNNING,
                **tags,
            },
        )
        training.run_id, training.last = run.info.run_id, {}


@dataclass
class _Point:
    name: str
    step: int
    value: float
    time: float
    """Seconds since 1970."""


class _Training:
    """What waits to be logged of a trial, and what its run has.

    Args:
        trial: The trial as it began.
        trains: Whether it trains now; not a trial that ended before MLflow was told of it.
    """

    def __init__(self, trial: BegunTrial, *, trains: bool = False) -> None:
        self.trial = trial
        self.trains = trains
        self.epochs: list[EpochMetrics] = []
        self.waiting: list[_Point] = []
        self.run_id: str | None = None
        self.may_exist = False
        """Whether a run may have been created although an error came back."""
        self.has_params = False
        self.last: dict[str, int] | None = None
        """Metric to the last step that the run has; None if that must be read."""
        self._clock = trial.started, 0

    @property
    def last_step(self) -> int:
        """The last step that the run has of any metric; -1 if there is none."""
        return max((self.last or {}).values(), default=-1)

    @property
    def waits_since(self) -> float:
        """When the oldest of what waits came to be, in seconds since 1970; infinity if nothing waits."""
        if self.run_id is None:
            return self.trial.started
        return self.waiting[0].time if self.waiting else math.inf

    def add(self, epochs: Sequence[EpochMetrics], *, at: float, objective: Objective) -> None:
        """Add epochs that ended by a time; trials train together, so steps are spread evenly since the last time."""
        if not epochs:
            return
        self.epochs += epochs
        points = [point for epoch in epochs for point in epoch_points(epoch, epochs=self.trial.config.epochs)]
        points += objective_points(self.epochs, objective, since=epochs[0].epoch)
        (began, first), last = self._clock, epochs[-1].step
        per_step = (at - began) / max(last - first, 1)
        self.waiting += [
            _Point(name, step, value, began + per_step * (step - first))
            for name, step, value in points
            if math.isfinite(value)  # MLflow would store an infinity as 1.8e308, which ruins every chart
        ]
        self._clock = at, last
