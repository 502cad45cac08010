"""Legal intervals of hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Interval:
    """The legal values of a number."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None


Positive = Annotated[float, Interval(gt=0)]
NonNegative = Annotated[float, Interval(ge=0)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]
Gamma = Annotated[float, Interval(gt=0, le=1)]
Count = Annotated[int, Interval(ge=1)]


SEARCHABLE: Mapping[str, bool] = {"searchable": True}
"""Metadata of a dataclass field: a search may choose its value."""


def by_name(*classes: type[Any]) -> dict[str, type[Any]]:
    """Return classes by their names in a file."""
    return {cls.name: cls for cls in classes}
