"""Distributions: what a search chooses a hyperparameter from. One value, a list of choices, or a range."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.space.limits import Share, as_tuples

T = TypeVar("T")
Step = TypeVar("Step")


class Suggests(Protocol):
    """The part of an Optuna trial that chooses."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Choose a number within [low, high]."""
        ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Choose a whole number within [low, high]."""
        ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Choose one of `choices`."""
        ...


class Choices(BaseModel, Generic[T]):
    """One of several values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: tuple[T, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _differ(self) -> Self:
        twice = [choice for index, choice in enumerate(self.choices) if choice in self.choices[:index]]
        if twice:
            raise ValueError(f"each choice may stand once, got {_text(twice[0])} twice; remove one")
        return self


class Range(BaseModel, Generic[T, Step]):
    """Any value within [low, high]. `log` spreads trials evenly over decades; `step` counts from `low`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: T
    high: T
    log: bool = Field(default=False, strict=True)
    step: Step | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low: Any = self.low
        high: Any = self.high
        step: Any = self.step
        if low > high:
            raise ValueError(f"`low <= high` must hold, got low={low}, high={high}")
        if self.log and low <= 0:
            raise ValueError(f"`low > 0` must hold with log, got low={low}")
        if step is None:
            return self
        if self.log:
            raise ValueError("`log` and `step` exclude each other; remove one")
        if step <= 0:
            raise ValueError(f"`step > 0` must hold, got step={step}")
        count = (high - low) / step
        if not math.isclose(count, round(count), rel_tol=1e-9, abs_tol=1e-9):
            reachable = low + math.floor(count) * step
            got = f"got low={low}, high={high}, step={step}"
            raise ValueError(f"`step` must divide the range, {got}; the last step ends at {reachable:g}")
        return self


def is_searched(distribution: Any) -> bool:
    """Say whether a search has more than one value to choose from."""
    match distribution:
        case Range(low=low, high=high):
            return bool(low < high)
        case Choices(choices=choices):
            return len(choices) > 1
    return False


def extremes(distribution: Any) -> tuple[Any, ...]:
    """Return the endpoints, or all choices: enough to check any monotone rule."""
    match distribution:
        case Range(low=low, high=high):
            return (low, high)
        case Choices(choices=choices):
            return choices
    return (distribution,)


def suggest(trial: Suggests, name: str, distribution: Any) -> Any:
    """Let a trial choose a value; a distribution of one value is not asked for."""
    if not is_searched(distribution):
        return extremes(distribution)[0]
    match distribution:
        case Choices(choices=choices):
            labels = [label(choice) for choice in choices]
            return choices[labels.index(trial.suggest_categorical(name, labels))]
        case Range(low=int(), high=int()):
            return trial.suggest_int(
                name, distribution.low, distribution.high, step=distribution.step or 1, log=distribution.log
            )
    value = trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    return Share(value) if isinstance(distribution.low, Share) else value


def label(choice: Any) -> Any:
    """Return a choice as Optuna stores it: a list or a share as text, any other choice unchanged."""
    return _text(choice) if isinstance(choice, tuple | list | Share) else choice


def as_stored(distribution: Any, value: Any) -> Any:
    """Return a value of a distribution as Optuna stores it: a share of a range is a number, a choice has its label."""
    return float(value) if isinstance(distribution, Range) and isinstance(value, Share) else label(value)


def from_stored(distribution: Any, stored: Any) -> Any:
    """Return the value of a distribution that Optuna stores so, the inverse of `as_stored`."""
    match distribution:
        case Range(low=Share()):
            return Share(stored)
        case Choices(choices=choices):
            return next((choice for choice in choices if _same(label(choice), stored)), stored)
    return stored


def contains(distribution: Any, value: Any) -> bool:
    """Say whether a value could be chosen from a distribution."""
    value = as_tuples(value)
    match distribution:
        case Choices(choices=choices):
            return any(_same(choice, value) for choice in choices)
        case Range():
            if isinstance(value, bool) or not isinstance(
                value, int if isinstance(distribution.low, int) else int | float
            ):
                return False
            if (
                isinstance(value, Share) != isinstance(distribution.low, Share)
                or not distribution.low <= value <= distribution.high
            ):
                return False
            steps = (value - distribution.low) / (distribution.step or 1)
            return distribution.step is None or math.isclose(steps, round(steps), abs_tol=1e-9)
    return _same(distribution, value)


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)  # 1 is no truth value


def describe(distribution: Any) -> str:
    """Return a distribution in words, for messages."""
    match distribution:
        case Choices(choices=choices):
            return "one of " + ", ".join(_text(choice) for choice in choices)
        case Range(low=low, high=high, step=step):
            return f"within [{low}, {high}]" + (f" in steps of {step}" if step else "")
    return _text(distribution)


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]"
    return str(value) if isinstance(value, Share) else json.dumps(value)
