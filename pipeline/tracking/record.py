"""What MLflow is told of a trial, as plain values: tags, parameters, metrics and learning rates."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Sequence
from itertools import chain

from pipeline.space.config import TrialConfig
from pipeline.space.search_space import Objective
from pipeline.space.strategy import strategy_words
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics
from pipeline.tracking.view import mlflow_name

MAX_LR_POINTS = 500
"""Learning rates of one group that are logged as a metric; MLflow's charts draw 320. `lr_csv` has every rate."""
Point = tuple[str, int, float]
"""A metric's name, step and value."""


def lr_metric(group: str) -> str:
    """Return the name of the metric that holds a group's learning rate."""
    return f"lr/{mlflow_name(group)}"


def run_name(trial: BegunTrial, *, batch: bool) -> str:
    """Return the name of a trial's run: `#033 adamw 1.1e-02 · step 8 × 0.7 · head ×1.8`.

    The name of a run of the confirmation begins with what the run confirms, and its seed.
    """
    name = f"#{trial.number:03}" if trial.confirms is None else f"{trial.confirms}, seed {trial.config.seed}:"
    return f"{name} " + " · ".join(strategy_words(trial.config, batch=batch))


def kind_tags(trial: BegunTrial) -> dict[str, str]:
    """Return the tags that tell a trial from a run of the confirmation."""
    if trial.confirms is None:
        return {"hpo.kind": "trial"}
    return {"hpo.kind": "confirmation", "hpo.confirms": trial.confirms}


def config_hash(config: TrialConfig) -> str:
    """Return a text that differs between two configs."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def ended_tags(trial: EndedTrial) -> dict[str, str]:
    """Return the tags that say how a trial ended."""
    tags = {"hpo.state": trial.state.value}
    if trial.reason:
        tags["hpo.reason"] = trial.reason
    broken = [
        f"{name} {value} at step {epoch.step}"
        for epoch in trial.epochs
        for name, value in epoch.metrics.items()
        if not math.isfinite(value)
    ]
    if broken:
        tags["hpo.not_finite"] = ", ".join(broken[:10])
    return tags


def trial_params(config: TrialConfig) -> dict[str, str]:
    """Return every hyperparameter and every other setting of a trial, as text of full precision."""
    values = {
        **config.hyperparameters(),
        # MLflow's parallel coordinates have no logarithmic axis.
        "log10_base_lr": math.log10(config.optimizer.base_lr),
        "epochs": config.epochs,
        "seed": config.seed,
        **{"workload" if key == "name" else key: value for key, value in config.to_dict()["workload"].items()},
    }
    return {mlflow_name(key): str(value) for key, value in values.items()}


def epoch_points(epoch: EpochMetrics, *, epochs: int) -> list[Point]:
    """Return the points of an epoch in the charts of a trial of so many epochs; values may be infinite or NaN."""
    points = [(name, epoch.step, value) for name, value in epoch.metrics.items()]
    points += [(f"averaged/{name}", epoch.step, value) for name, value in epoch.averaged.items()]
    for group, history in epoch.lr.items():
        points += [(lr_metric(group), step, rate) for step, rate in thin(history, limit=_limit(epochs))]
    return points


def thin(points: Sequence[tuple[int, float]], *, limit: int) -> list[tuple[int, float]]:
    """Return at most `limit` points, evenly spread, with the last, and the first if there are several."""
    if len(points) <= limit:
        return list(points)
    places = [round(index * (len(points) - 1) / (limit - 1)) for index in range(limit)] if limit > 1 else [-1]
    return [points[place] for place in places]


def objective_name(objective: Objective) -> str:
    """Return the name of the metric whose last point is a trial's value."""
    return objective.metric if objective.of == "last" else f"{objective.metric}.best"


def objective_points(epochs: Sequence[EpochMetrics], objective: Objective, *, since: int) -> list[Point]:
    """Return the best value so far after each epoch from number `since` on, which is no metric of an epoch.

    There is none if the last epoch's value counts.
    """
    if objective.of == "last":
        return []
    measured, name = objective.measured(epochs), objective_name(objective)
    return [
        (name, epoch.step, objective.value(measured[:count]))
        for count, epoch in enumerate(measured, 1)
        if epoch.epoch >= since
    ]


def lr_csv(trial: EndedTrial) -> str | None:
    """Return every learning rate as a table, one column per group; None if every rate is a point of a chart."""
    limit = _limit(trial.config.epochs)
    if all(len(points) <= limit for epoch in trial.epochs for points in epoch.lr.values()):
        return None
    groups = trial.config.group_names
    history = {group: dict(chain.from_iterable(e.lr.get(group, ()) for e in trial.epochs)) for group in groups}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["step", *history])
    for step in sorted(set().union(*history.values())):
        table.writerow([step, *(repr(rates[step]) if step in rates else "" for rates in history.values())])
    return text.getvalue()


def _limit(epochs: int) -> int:
    """Return how many of an epoch's rates are logged; known in advance, since an epoch is logged as it ends."""
    return max(1, MAX_LR_POINTS // epochs)
