"""Studies as values, for tests of the report: spaces, and trials that ended as a test says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.page.results import StudyResults
from pipeline.space.load import space_from_document
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState

DOCUMENT: dict[str, Any] = {
    "workload": {"name": "digits", "model": "cnn"},
    "epochs": 8,
    "batch_size": 64,
    "objective": {"metric": "val/accuracy", "direction": "maximize"},
    "optimizer": {
        "sgd": {"base_lr": {"low": 1e-3, "high": 1.0, "log": True}, "momentum": {"choices": [0.0, 0.9]}},
        "adamw": {"base_lr": {"low": 1e-4, "high": 1e-1, "log": True}},
    },
    "scheduler": {"step": {"step_size": {"low": 1, "high": 4}, "gamma": {"low": 0.05, "high": 0.9, "log": True}}},
    "param_groups": {
        "head": {"pattern": "fc.*", "lr_ratio": {"low": 0.1, "high": 10.0, "log": True}},
        "body": {"pattern": "*"},
    },
    "pruner": {"name": "successive_halving", "min_resource": 2},
}


class Chosen:
    """A trial that chooses what a test says, and else the lowest or first value."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params
        self.params: dict[str, Any] = {}

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return float(self.params.setdefault(name, self._params.get(name, low)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return int(self.params.setdefault(name, self._params.get(name, low)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.params.setdefault(name, self._params.get(name, choices[0]))


def space_with(**changes: Any) -> SearchSpace:
    return space_from_document({**DOCUMENT, **changes}, name="small")


def trial(space: SearchSpace, number: int, values: Sequence[float], **changes: Any) -> EndedTrial:
    """Return a trial with these values of the objective, one per epoch; pruned unless it has all epochs."""
    params = changes.pop("params", {})
    chosen = Chosen(params)
    config = space.sample(chosen)
    state = TrialState.COMPLETE if len(values) == space.epochs else TrialState.PRUNED
    metric = space.objective.metric
    epochs = tuple(
        EpochMetrics(epoch=n, step=20 * n, metrics={"train/loss": 0.5, "val/loss": 0.5, metric: value}, lr={})
        for n, value in enumerate(values, 1)
    )
    record: dict[str, Any] = {
        "number": number,
        "config": config,
        "params": chosen.params,
        "state": state,
        "objective": space.objective,
        "reason": None if state is TrialState.COMPLETE else f"successive_halving after epoch {len(values)}",
        "value": space.objective.value(epochs) if state is TrialState.COMPLETE else None,
        "epochs": epochs,
        "started": 1000.0 + number,
        "ended": 1000.0 + number + len(values),
        "environment": {"device": "cpu", "torch": "2.14"},
    }
    return EndedTrial(**{**record, **changes})


def results_of(space: SearchSpace, trials: Sequence[EndedTrial], **changes: Any) -> StudyResults:
    values: dict[str, Any] = {
        "name": "small-1",
        "space": space,
        "trials": trials,
        "planned": len(trials),
        "groups": [range(len(trials))],
        "confirm_command": "python -m pipeline.confirm --study small-1",
        **changes,
    }
    return StudyResults(**values)
