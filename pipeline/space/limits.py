"""Legal intervals of hyperparameters, and what a file may write in another form: numbers in percent, lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Interval:
    """The legal values of a number."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None


@dataclass(frozen=True)
class ShareOf:
    """Marks a number that a file may write in percent, and says of what.

    `run`: the number of epochs, or of optimizer steps for a schedule that moves every step. `rate`: the smallest
    learning rate among a trial's groups that are not frozen.
    """

    whole: Literal["run", "rate"]
    may_be_whole: bool = True
    """Whether 100% is legal."""


@dataclass(frozen=True)
class OrOne:
    """Marks a list that a file may write as its one item, without brackets."""


class Share(float):
    """A number that is written in percent: `Share(12.5)` is `12.5%`."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Share) and float(self) == float(other)  # 10% is not 10

    def __hash__(self) -> int:
        return hash((Share, float(self)))

    def __str__(self) -> str:
        return f"{self._decimal().normalize():f}%"

    def of_count(self, total: int) -> int:
        """Return the share of a count, rounded half up."""
        return int((self._decimal() * total / 100).to_integral_value(ROUND_HALF_UP))

    def of_rate(self, rate: float) -> float:
        """Return the share of a rate; never more than the rate."""
        return rate * (float(self) / 100)

    def _decimal(self) -> Decimal:
        return Decimal(repr(float(self)))  # as written, so that 14.5% of 100 is 14.5


Positive = Annotated[float, Interval(gt=0)]
NonNegative = Annotated[float, Interval(ge=0)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]
Gamma = Annotated[float, Interval(gt=0, le=1)]
Count = Annotated[int, Interval(ge=1)]
Length = Annotated[int, Interval(ge=1), ShareOf("run")]
"""A count in the schedule's `interval`, or a share of the run."""
Pause = Annotated[int, Interval(ge=0), ShareOf("run")]
"""A `Length` that may be 0."""
Warmup = Annotated[int, Interval(ge=0), ShareOf("run", may_be_whole=False)]
"""A `Pause` that is shorter than the run."""
Floor = Annotated[float, Interval(ge=0), ShareOf("rate")]
"""A learning rate that a schedule does not go below, or a share of the trial's smallest rate."""


def as_tuples(value: Any) -> Any:
    """Return a value of a file with a tuple for every list in it."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


SEARCHABLE: Mapping[str, bool] = {"searchable": True}
"""Metadata of a dataclass field: a search may choose its value."""


def by_name(*classes: type[Any]) -> dict[str, type[Any]]:
    """Return classes by their names in a file."""
    return {cls.name: cls for cls in classes}
