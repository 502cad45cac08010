"""The outcome of a search, as `pipeline.search.search` returns it."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from pipeline.app.display import TABLE_WIDTH, best_table, confirmation_table, counts_of_states
from pipeline.errors import counted
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import EndedTrial

if TYPE_CHECKING:
    from pipeline.study.confirmation import Confirmed


@dataclass(frozen=True, kw_only=True, repr=False)
class SearchResult:
    """The outcome of a search; its `repr` is a table of the best trials."""

    study: str
    space: SearchSpace
    """What was searched."""
    trials: tuple[EndedTrial, ...]
    """Every ended trial, in number order."""
    ranking: tuple[EndedTrial, ...]
    """Every complete trial, best first."""
    best: EndedTrial | None
    """The winner: of the confirmation, or else the first of `ranking`; None if no trial is complete."""
    confirmed: tuple[Confirmed, ...]
    """The candidates of the confirmation, best first; empty unless it is complete."""
    config_file: Path | None
    """`best.yaml`, the config of the winner."""
    exit_status: int
    """Exit status of the command line: 0 if every trial has ended, at least one is complete, and MLflow has all."""

    def __repr__(self) -> str:
        counts = counts_of_states(Counter(trial.state for trial in self.trials))
        lines = [f"study {self.study}: {counted(len(self.trials), 'trial')}{f', {counts}' if counts else ''}"]
        if self.ranking:
            text = Console(file=io.StringIO(), width=TABLE_WIDTH, force_terminal=False, force_jupyter=False)
            with text.capture() as table:
                text.print(best_table(self.ranking, self.space), crop=False)
            lines += map(str.rstrip, table.get().splitlines())
        if self.confirmed:
            with text.capture() as table:
                text.print(confirmation_table(self.confirmed, self.space), crop=False)
            lines += ["", *map(str.rstrip, table.get().splitlines())]
        if self.best is not None:
            how = "confirmed" if self.confirmed else "unconfirmed"
            lines += ["", f"best: {self.best.confirms or f'#{self.best.number}'}, {how}"]
        return "\n".join(lines)
