"""Scales of a figure's axes: from values to places between 0 and 1, and which ticks an axis shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

MULTIPLES: tuple[tuple[int, ...], ...] = ((1, 2, 5), (1, 3), (1,))
"""Numbers at which each decade may have ticks, the densest first."""
EVERY = (2, 3, 5, 10, 20)
"""Numbers of decades from one tick to the next, where there is room for fewer than one per decade."""
NARROW = tuple(range(1, 10))
"""The ticks of a scale that is too narrow for any of these."""
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
"""Distances of the ticks of a linear axis, times a power of ten."""
SLACK = 1e-9
"""Part of a scale by which a tick may lie outside by rounding."""

Tick = tuple[float, str]
"""A place from 0 to 1, and its label."""


class Scale(Protocol):
    """One axis; 0 is its left or lower end."""

    def at(self, value: float) -> float:
        """Return the place of a value from 0 to 1; a value beyond an end is put at the end."""
        ...

    def ticks(self, most: int) -> list[Tick]:
        """Return at most `most` ticks, from the lower end to the upper end."""
        ...


def plain(value: float) -> str:
    """Return a tick's label without trailing zeros."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.6g}".replace("-", "−")
    digits, _, exponent = f"{value:.3g}".partition("e") if "e" in f"{value:.3g}" else f"{value:.0e}".partition("e")
    return f"{digits}e{int(exponent)}".replace("-", "−", int(value < 0))


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Equal distances for equal differences."""

    low: float
    high: float
    text: Callable[[float], str] = plain
    whole: bool = False
    """Whether only whole numbers are ticks."""

    def at(self, value: float) -> float:
        """Return the place of a value."""
        return _place(value, self.low, self.high)

    def ticks(self, most: int) -> list[Tick]:
        """Return round numbers at equal distances."""
        return [(self.at(value), self.text(value)) for value in _round_numbers(self.low, self.high, most, self.whole)]


@dataclass(frozen=True, kw_only=True)
class Log:
    """Equal distances for equal ratios; `low` is above 0."""

    low: float
    high: float
    text: Callable[[float], str] = plain
    zero: bool = False
    """Whether the lower end stands for 0, which has no place on a logarithmic axis."""

    def at(self, value: float) -> float:
        """Return the place of a value; 0 and less is at the lower end."""
        return _place(math.log(value), math.log(self.low), math.log(self.high)) if value > 0 else 0.0

    def ticks(self, most: int) -> list[Tick]:
        """Return powers of ten, or multiples of them; round numbers if the scale spans less than two of these."""
        zero = [(0.0, "0")] if self.zero else []
        lowest = self.low * 1.6 if self.zero else self.low
        for values in _decades(lowest, self.high):
            if 2 <= len(values) <= most - len(zero):
                break
        else:
            values = _round_numbers(lowest, self.high, most - len(zero), whole=False)
        return [*zero, *((self.at(value), self.text(value)) for value in values)]


@dataclass(frozen=True, kw_only=True)
class Categories:
    """One place for each of several names."""

    names: Sequence[str]

    def at(self, value: float) -> float:
        """Return the middle of the place of the name with this index."""
        return (value + 0.5) / len(self.names)

    def ticks(self, most: int) -> list[Tick]:
        """Return a tick for every name, or for the first ones."""
        return [(self.at(index), name) for index, name in enumerate(self.names[:most])]


def _place(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def _decades(low: float, high: float) -> list[list[float]]:
    """Return sets of ticks in the order of preference."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    sets = [(range(first, last + 1), multiples) for multiples in MULTIPLES]
    sets += [(range(-(-first // every) * every, last + 1, every), (1,)) for every in EVERY]
    sets += [(range(first, last + 1), NARROW)]
    return [
        [v for e in exponents for m in multiples if _inside(v := float(f"{m}e{e}"), low, high)]
        for exponents, multiples in sets
    ]


def _inside(value: float, low: float, high: float) -> bool:
    return low * (1 - SLACK) <= value <= high * (1 + SLACK)


def _round_numbers(low: float, high: float, most: int, whole: bool) -> list[float]:
    """Return the round numbers of a range: as many as possible, at most `most`; the low end if there is no range."""
    if not high > low:
        return [low]
    rough = max((high - low) / max(1, most), 1.0 if whole else 0.0)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    for step in (*(magnitude * step for step in STEPS), magnitude * 20):
        if whole and step != max(1, round(step)):
            continue
        first = math.ceil(low / step - SLACK)
        values = [index * step for index in range(first, math.floor(high / step + SLACK) + 1)]
        if len(values) <= most:
            break
    return [float(f"{value:.12g}") for value in values] if whole or values else [low]
