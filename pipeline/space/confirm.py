"""Confirm: how a search confirms its best trials, and how much of that fits into its share of the epochs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pipeline.space.limits import Interval

BASELINES = 2
"""Adam at its default rate, and SGD with StepLR."""


@dataclass(frozen=True, kw_only=True)
class Confirm:
    """The confirmation at the end of a search: the best trials and two baselines train again with fresh seeds."""

    share: Annotated[float, Interval(ge=0, le=1)] = 0.33
    """Largest share of all epochs, of the search and the confirmation together; 0: no confirmation; 1: no limit."""
    finalists: Annotated[int, Interval(ge=1, le=20)] = 3
    """Number of complete trials to confirm, the best by the mean objective of their last epochs."""
    seeds: Annotated[int, Interval(ge=2, le=50)] = 3
    """Number of fresh seeds; every finalist and baseline trains once with each."""
    baselines: bool = True
    """Whether Adam at its default rate, and SGD at 0.1 with momentum 0.9 and StepLR, train beside the finalists."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of a confirmation."""

    finalists: int
    baselines: int
    seeds: int

    @property
    def runs(self) -> int:
        """Number of trainings."""
        return (self.finalists + self.baselines) * self.seeds


def largest(confirm: Confirm) -> Size:
    """Return the size of a confirmation without a limit."""
    return Size(finalists=confirm.finalists, baselines=BASELINES if confirm.baselines else 0, seeds=confirm.seeds)


def smallest(confirm: Confirm, *, complete: int) -> Size:
    """Return the size of the smallest confirmation of so many complete trials."""
    finalists = min(confirm.finalists, complete)
    *_, size = _smaller_and_smaller(dataclasses.replace(largest(confirm), finalists=finalists))
    return size


def fitting(confirm: Confirm, *, complete: int, searched: int, epochs: int) -> Size | None:
    """Return the largest confirmation that keeps to its share; None if not even the smallest does.

    To fit, the SGD baseline goes first, then finalists down to two, then seeds down to two.

    Args:
        confirm: The settings.
        complete: Number of complete trials.
        searched: Epochs that all trials of the search have trained.
        epochs: Epochs of one run.
    """
    allowed = math.inf if confirm.share == 1 else confirm.share / (1 - confirm.share) * searched
    sizes = _smaller_and_smaller(dataclasses.replace(largest(confirm), finalists=min(confirm.finalists, complete)))
    return next((size for size in sizes if size.runs * epochs <= allowed), None)


def _smaller_and_smaller(size: Size) -> Iterator[Size]:
    yield size
    if size.baselines == BASELINES:
        size = dataclasses.replace(size, baselines=BASELINES - 1)
        yield size
    while size.finalists > 2:
        size = dataclasses.replace(size, finalists=size.finalists - 1)
        yield size
    while size.seeds > 2:
        size = dataclasses.replace(size, seeds=size.seeds - 1)
        yield size
