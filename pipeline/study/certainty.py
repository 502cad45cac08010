"""Placeholder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Difference:
    mean: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        return not self.low <= 0 <= self.high


def compare(scores: NDArray[np.float64], first: int, second: int) -> Difference:
    d = scores[first] - scores[second]
    return Difference(float(d.mean()), float(d.min()), float(d.max()))
