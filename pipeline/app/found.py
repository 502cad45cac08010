"""A search's record of a trial, which stands under `found` in a config file: what to repeat and to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InvalidInput, Problem
from pipeline.space.placement import Placement, from_run_lengths
from pipeline.space.trial import EndedTrial


@dataclass(frozen=True)
class Found:
    """A search's record of a trial."""

    epochs: int
    """Number of epochs that the search trained."""
    metrics: Mapping[str, float]
    """Metrics of the last of these epochs."""
    value: tuple[float, int] | None
    """The trial's value in the search, and the epoch of the value; None if no epoch was finished."""
    environment: Mapping[str, Any]
    placements: Sequence[Placement]
    """Placement in each epoch."""

    @classmethod
    def read(cls, found: Mapping[str, Any], *, source: str) -> Found | None:
        """Read the section; return None if it is empty.

        Raises:
            InvalidInput: The section differs from the form that a search writes.
        """
        if not found:
            return None
        try:
            placements = from_run_lengths(found["environment"]["placement"])
            epochs, metrics = found["epochs"], {**found["metrics"]}
            if type(epochs) is not int or epochs < len(placements):
                raise ValueError(f"epochs {epochs!r} for {len(placements)} placements")
            if wrong := [name for name, value in metrics.items() if type(value) not in (int, float)]:
                raise ValueError(f"{wrong[0]} {metrics[wrong[0]]!r}")
            value = (found["value"], found["epoch"]) if "value" in found else None
            if value and (type(value[0]) not in (int, float) or type(value[1]) is not int):
                raise ValueError(f"value {value[0]!r} at epoch {value[1]!r}")
            return cls(epochs, metrics, value, found["environment"], placements)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            remedy = "restore it, or remove `found` to train the config without comparing"
            message = f"must be as a search wrote it, got {type(error).__name__}: {error}; {remedy}"
            raise InvalidInput(source, [Problem("found", message)]) from None


def record(trial: EndedTrial) -> dict[str, Any]:
    """Return the record of a trial as plain values, which `Found.read` reads."""
    objective, value = trial.objective, {}
    if measured := objective.measured(trial.epochs):
        value = {"value": objective.value(measured), "epoch": objective.deciding(measured).epoch}
    return {
        **value,
        "epochs": len(trial.epochs),
        "metrics": dict(trial.metrics),
        "environment": dict(trial.environment),
    }
