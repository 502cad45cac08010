"""What MLflow is told of a trial, as plain values: tags, parameters, metrics and learning rates."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from itertools import chain

from pipeline.space.search_space import Objective
from pipeline.space.trial import EndedTrial
from pipeline.tracking.view import mlflow_name

MAX_LR_POINTS = 500
"""Learning rates of one group that are logged as a metric; MLflow's charts draw 320. `lr_csv` has every rate."""


def lr_metric(group: str) -> str:
    """Return the name of the metric that holds a group's learning rate."""
    return f"lr/{mlflow_name(group)}"


def thin(points: Sequence[tuple[int, float]], *, limit: int) -> list[tuple[int, float]]:
    """Return at most `limit` points, evenly spread, with the first and the last; `limit` must be at least 2."""
    if len(points) <= limit:
        return list(points)
    return [points[round(index * (len(points) - 1) / (limit - 1))] for index in range(limit)]


def trial_tags(trial: EndedTrial) -> dict[str, str]:
    """Return the tags by which a trial's run is found, grouped and explained."""
    tags = {
        "hpo.kind": "trial",
        "hpo.trial": str(trial.number),
        "hpo.state": trial.state.value,
        "optimizer": trial.config.optimizer.name,  # the page groups curves by tag
        "scheduler": trial.config.scheduler.name,
        **{f"environment.{mlflow_name(key)}": str(value) for key, value in trial.environment.items()},
    }
    if trial.reason:
        tags["hpo.reason"] = trial.reason
    broken = [
        f"{name} {value} at step {step}" for name, step, value in metric_points(trial) if not math.isfinite(value)
    ]
    if broken:
        tags["hpo.not_finite"] = ", ".join(broken[:10])
    return tags


def trial_params(trial: EndedTrial) -> dict[str, str]:
    """Return every hyperparameter and every other setting of the trial, as text of full precision."""
    config = trial.config
    values = {
        **config.hyperparameters(),
        # MLflow's parallel coordinates have no logarithmic axis.
        "log10_base_lr": math.log10(config.optimizer.base_lr),
        "epochs": config.epochs,
        "seed": config.seed,
        **{"workload" if key == "name" else key: value for key, value in config.to_dict()["workload"].items()},
    }
    return {mlflow_name(key): str(value) for key, value in values.items()}


def metric_points(trial: EndedTrial) -> list[tuple[str, int, float]]:
    """Return the points of a trial's charts, (metric, step, value); values may be infinite or NaN."""
    points = [(name, epoch.step, value) for epoch in trial.epochs for name, value in epoch.metrics.items()]
    for group, history in _lr_history(trial).items():
        points += [(lr_metric(group), step, rate) for step, rate in thin(history, limit=MAX_LR_POINTS)]
    return points


def objective_name(objective: Objective) -> str:
    """Return the name of the metric whose last point is a trial's value."""
    return objective.metric if objective.of == "last" else f"{objective.metric}.best"


def objective_points(trial: EndedTrial, objective: Objective) -> list[tuple[str, int, float]]:
    """Return the points of the best value so far, which is no metric of an epoch; none if the last epoch's counts."""
    if objective.of == "last":
        return []
    epochs, name = objective.measured(trial.epochs), objective_name(objective)
    return [(name, epoch.step, objective.value(epochs[:n])) for n, epoch in enumerate(epochs, 1)]


def _lr_history(trial: EndedTrial) -> dict[str, list[tuple[int, float]]]:
    groups = trial.config.group_names
    return {group: list(chain.from_iterable(epoch.lr.get(group, ()) for epoch in trial.epochs)) for group in groups}


def lr_csv(trial: EndedTrial) -> str | None:
    """Return every learning rate as a table, one column per group; None if the schedule moves once per epoch."""
    if all(len(points) <= 1 for epoch in trial.epochs for points in epoch.lr.values()):
        return None
    history = {group: dict(points) for group, points in _lr_history(trial).items()}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["step", *history])
    for step in sorted(set().union(*history.values())):
        table.writerow([step, *(repr(rates[step]) if step in rates else "" for rates in history.values())])
    return text.getvalue()
