"""Placement as a value: where a trial trained in each epoch, and what that depends on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.space.config import TrialConfig


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a trial trained in an epoch; with the config it decides the metrics, to the bit on one kind of machine."""

    trainer: Literal["rows", "plain"]
    """As a row of a matrix, or by itself."""
    rows: int | None = None
    """Number of rows of the matrix; None for a plain trial."""
    place: int | None = None
    """The trial's row, counted from 0; None for a plain trial."""
    threads: int
    """Number of threads that PyTorch computed with."""
    broken: bool | None = None
    """True if the epochs before were trained twice, the second time in other places, and the first metrics stand: such
    a trial is repeated to rounding."""

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: The row is not one of the matrix.
        """
        fits = self.place is None if self.rows is None else self.place in range(self.rows)
        if self.trainer not in ("rows", "plain") or (self.trainer == "rows") == (self.rows is None) or not fits:
            raise ValueError(f"{self.trainer} at place {self.place} of {self.rows} rows")


@dataclass(frozen=True, kw_only=True)
class PlacementRules:
    """What placement depends on besides the running trials; a study stores it."""

    device: str
    """Kind of device, such as "cpu"."""
    processes: int = 1
    """Number of processes that train at once; 1 unless on a CPU."""
    rows: int | None = None
    """Most rows of a matrix that a person asked for; None: no limit."""
    row_limit: int | None = None
    """Most rows of a matrix that fit into memory, and are asked for; None: no limit. Falls when memory runs out."""
    plain_because: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    """Frozen groups, joined by commas, to the probe's verdict: why trials that freeze these train plain, or None."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `PlacementRules(**values)` gives back equal rules."""
        return dataclasses.asdict(self)


def frozen_groups(config: TrialConfig) -> str:
    """Return the names of the groups that a trial freezes, joined by commas."""
    return ",".join(name for name, group in config.param_groups.items() if group.lr_ratio == 0)


def run_lengths(placements: Sequence[Placement]) -> list[dict[str, Any]]:
    """Return the placements of a trial's epochs as plain values, one for each run of equal ones."""
    return [
        {"epochs": len(list(run)), **{name: value for name, value in vars(placement).items() if value is not None}}
        for placement, run in itertools.groupby(placements)
    ]


def from_run_lengths(runs: Sequence[Mapping[str, Any]]) -> list[Placement]:
    """Return the placements of a trial's epochs from what `run_lengths` returned.

    Raises:
        TypeError: A run has other keys.
        ValueError: A run has other values.
    """
    placements = []
    for run in runs:
        values = dict(run)
        epochs = values.pop("epochs")
        placements += [Placement(**values)] * epochs
    return placements
