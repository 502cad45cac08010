"""Placement as a value: where a trial trained in each epoch, and the rules that decide it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.space.config import TrialConfig

MAX_ROWS, MAX_THREADS, MAX_EPOCHS = 1 << 12, 1 << 12, 10**6
"""Largest numbers that a recorded placement may have."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Placement of a trial in an epoch; config and placement decide the metrics to the bit on one kind of machine."""

    trainer: Literal["rows", "plain"]
    """"rows": as a row of a matrix; "plain": by itself."""
    rows: int | None = None
    """Number of rows of the matrix; None for a plain trial."""
    place: int | None = None
    """The trial's row, counted from 0; None for a plain trial."""
    threads: int
    """Number of PyTorch's threads."""
    broken: bool | None = None
    """True if earlier epochs were trained twice, the second time in other places, and keep their first metrics; such a
    trial repeats only to rounding."""

    def __post_init__(self) -> None:
        """Check that trainer, rows and place fit each other.

        Raises:
            ValueError: They do not fit, the place is outside the matrix, or a number is no count.
        """
        rows = 1 if self.rows is None else self.rows
        for name, count, most in (("rows", rows, MAX_ROWS), ("threads", self.threads, MAX_THREADS)):
            if type(count) is not int or not 1 <= count <= most:
                raise ValueError(f"{name} must be a whole number from 1 to {most}, got {count!r}")
        if self.broken not in (None, True, False):
            raise ValueError(f"broken must be true or false, got {self.broken!r}")
        fits = self.place is None if self.rows is None else type(self.place) is int and self.place in range(rows)
        if self.trainer not in ("rows", "plain") or (self.trainer == "rows") == (self.rows is None) or not fits:
            raise ValueError(f"{self.trainer} at place {self.place} of {self.rows} rows")


@dataclass(frozen=True, kw_only=True)
class PlacementRules:
    """Everything that placement depends on, except the running trials; a study stores it."""

    device: str
    """Kind of device, such as "cpu"."""
    processes: int = 1
    """Number of processes that train at once; 1 unless on a CPU."""
    rows: int | None = None
    """Most rows of a matrix, as the user asks; None: no limit."""
    row_limit: int | None = None
    """Most rows of a matrix, by `rows` and memory; None: no limit. Becomes lower when memory runs out."""
    plain_because: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    """`matrix_key` of trials to the probe's verdict: why such trials train plain, or None."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `PlacementRules(**values)` gives back equal rules."""
        return dataclasses.asdict(self)


def matrix_key(config: TrialConfig) -> str:
    """Return what the rows of a matrix have in common, batch size and frozen groups, such as `64:` or `64:body`."""
    frozen = ",".join(name for name, group in config.param_groups.items() if group.lr_ratio == 0)
    return f"{config.batch_size}:{frozen}"


def run_lengths(placements: Sequence[Placement]) -> list[dict[str, Any]]:
    """Return the placements of a trial's epochs run-length coded, as plain values."""
    return [
        {"epochs": len(list(run)), **{name: value for name, value in vars(placement).items() if value is not None}}
        for placement, run in itertools.groupby(placements)
    ]


def from_run_lengths(runs: Sequence[Mapping[str, Any]]) -> list[Placement]:
    """Return the placements of a trial's epochs from the value of `run_lengths`.

    Raises:
        TypeError: A run has unknown keys.
        ValueError: A run has impossible values.
    """
    placements = []
    for run in runs:
        values = dict(run)
        epochs = values.pop("epochs")
        if type(epochs) is not int or not 1 <= epochs <= MAX_EPOCHS:
            raise ValueError(f"epochs must be a whole number from 1 to {MAX_EPOCHS}, got {epochs!r}")
        placements += [Placement(**values)] * epochs
    return placements
