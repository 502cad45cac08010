"""What MLflow is told of a trial: tags, parameters, metrics and learning rates, as plain values."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from itertools import chain

from pipeline.space.trial import EndedTrial
from pipeline.tracking.view import mlflow_name

MAX_LR_POINTS = 500
"""Learning rates of one group that a trial shows in MLflow, whose charts draw 320; `lr_csv` has them all."""


def lr_metric(group: str) -> str:
    """Return the name of the metric that holds a group's learning rate."""
    return f"lr/{mlflow_name(group)}"


def thin(points: Sequence[tuple[int, float]], *, limit: int) -> list[tuple[int, float]]:
    """Return at most `limit` points, at least 2, evenly spread; the first and the last are among them."""
    if len(points) <= limit:
        return list(points)
    return [points[round(index * (len(points) - 1) / (limit - 1))] for index in range(limit)]


def trial_tags(trial: EndedTrial) -> dict[str, str]:
    """Return what a trial's run is found, grouped and explained by."""
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
    """Return every hyperparameter, and what else the trial was trained with, as text of full precision."""
    config = trial.config
    values = {
        **config.hyperparameters(),
        # MLflow's parallel coordinates have no logarithmic axis.
        "log10_base_lr": math.log10(config.optimizer.base_lr),
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "seed": config.seed,
        **{"workload" if key == "name" else key: value for key, value in config.to_dict()["workload"].items()},
    }
    return {mlflow_name(key): str(value) for key, value in values.items()}


def metric_points(trial: EndedTrial) -> list[tuple[str, int, float]]:
    """Return what a trial's charts show: (metric, step, value), values that are not finite among them."""
    points = [(name, epoch.step, value) for epoch in trial.epochs for name, value in epoch.metrics.items()]
    for group, history in _lr_history(trial).items():
        points += [(lr_metric(group), step, rate) for step, rate in thin(history, limit=MAX_LR_POINTS)]
    return points


def _lr_history(trial: EndedTrial) -> dict[str, list[tuple[int, float]]]:
    groups = trial.config.param_groups
    return {group: list(chain.from_iterable(epoch.lr.get(group, ()) for epoch in trial.epochs)) for group in groups}


def lr_csv(trial: EndedTrial) -> str | None:
    """Return every rate that a schedule of steps used, one column per group; None for a schedule of epochs."""
    if all(len(points) <= 1 for epoch in trial.epochs for points in epoch.lr.values()):
        return None
    history = {group: dict(points) for group, points in _lr_history(trial).items()}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["step", *history])
    for step in sorted(set().union(*history.values())):
        table.writerow([step, *(repr(rates[step]) if step in rates else "" for rates in history.values())])
    return text.getvalue()
