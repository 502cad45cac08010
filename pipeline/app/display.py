"""What a search prints: lines, the table of the best trials, values in words."""

from __future__ import annotations

import contextlib
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import get_console
from rich.console import Console
from rich.status import Status
from rich.table import Table

from pipeline.errors import counted
from pipeline.space.config import TrialConfig
from pipeline.space.search_space import Objective, SearchSpace
from pipeline.space.strategy import schedule_line, strategy_words
from pipeline.space.trial import EndedTrial, TrialState, number

if TYPE_CHECKING:
    from pipeline.study.confirmation import Confirmed

SAY_EVERY_S = 10.0
"""In a pipe, seconds between two lines that say the same."""
TABLE_WIDTH = 200
"""Characters per line of the table of best trials where the width is not a terminal's."""
LABEL = 14
"""Columns of the word before a line, such as `time limit    `."""
MAX_REASON = 200
"""Most characters of a reason in a line."""
BEST = 5
"""Trials in the table of the best."""


def build_console(*, quiet: bool) -> Console:
    """Return the console of a search; in a notebook it prints plain text, in which long lines wrap."""
    is_terminal = False if in_notebook() else None
    console = Console(highlight=False, markup=False, quiet=quiet, force_jupyter=False, force_terminal=is_terminal)
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    return console


def busy(console: Console, words: str) -> contextlib.AbstractContextManager[object]:
    """Show on a terminal what is being done, while it is being done."""
    return console.status(words) if console.is_terminal else contextlib.nullcontext()


def say(console: Console, *parts: str, command: bool = False) -> None:
    """Print a line of parts; where a terminal is too narrow for the line, a line per part, indented after the first.

    Args:
        console: Where to print.
        parts: Texts without line breaks.
        command: Whether a part is a command or an address, in which only the terminal breaks lines, so that it can be
            copied.
    """
    line = "   ".join(parts)
    if console.is_terminal and len(line) > console.width:
        if not command and len(parts) == 1:
            indent = " " * LABEL if line[:LABEL].endswith("  ") else ""
            parts = tuple(textwrap.wrap(line, console.width, subsequent_indent=indent, break_on_hyphens=False))
            line = "\n".join(parts)
        else:
            line = "\n  ".join(parts)
    console.print(line, soft_wrap=command or not console.is_terminal)


def in_notebook() -> bool:
    """Return whether this process runs a notebook."""
    return get_console().is_jupyter


@contextlib.contextmanager
def waiting_line(console: Console) -> Iterator[Callable[[int], None]]:
    """Yield a function that says how many trials MLflow still lacks: in one line on a terminal, else now and then."""
    with contextlib.ExitStack() as shown:
        status: Status | None = None
        said = time.monotonic()

        def waiting(trials: int) -> None:
            nonlocal status, said
            line = f"MLflow is being told of {counted(trials, 'more trial')}" if trials else "MLflow is being told"
            if console.is_terminal and status is None:
                status = shown.enter_context(console.status(line))
            elif status is not None:
                status.update(line)
            elif time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                console.print(line)

        yield waiting


def best_table(ranking: Sequence[EndedTrial], space: SearchSpace) -> Table:
    """Return a table of the first trials of a ranking, with columns for what is searched."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 1), header_style="bold")
    rows = [_cells(trial, space) for trial in ranking[:BEST]]
    for column in rows[0] if rows else ():
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    return table


def print_best(console: Console, ranking: Sequence[EndedTrial], space: SearchSpace) -> None:
    """Print the table of the first trials of a ranking; on a terminal that is too narrow, each trial in a few words."""
    rows = [(f"#{t.number}", score_line(t, space.objective), strategy_line(t.config, space)) for t in ranking[:BEST]]
    _print_fitting(console, best_table(ranking, space), rows, head=f"{space.objective.metric} with one seed")


def print_confirmation(console: Console, ranking: Sequence[Confirmed], space: SearchSpace) -> None:
    """Print the table of a confirmation; on a terminal that is too narrow, without the seeds."""
    rows = [(found.candidate.label, spread(found), strategy_line(found.candidate.config, space)) for found in ranking]
    _print_fitting(console, confirmation_table(ranking, space), rows, head=f"{space.objective.metric} confirmed")


def _print_fitting(console: Console, table: Table, narrow: Sequence[Sequence[str]], *, head: str) -> None:
    """Print a table; where a terminal is too narrow for it, a head and fewer cells per row; the last may be folded."""
    if console.measure(table, options=console.options.update(width=TABLE_WIDTH)).maximum > console.width:
        console.print(head)
        table = Table.grid(padding=(0, 2, 0, 0))
        for column in range(len(narrow[0])):
            table.add_column(no_wrap=column < len(narrow[0]) - 1)
        for row in narrow:
            table.add_row(*row)
    console.print(table, crop=False)


def confirmation_table(ranking: Sequence[Confirmed], space: SearchSpace) -> Table:
    """Return a table of the candidates of a confirmation: mean and standard deviation over seeds, and each seed."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 1), header_style="bold")
    seeds = sorted({seed for found in ranking for seed in found.runs})
    for head in ("confirmed", f"{space.objective.metric}", *(f"seed {seed}" for seed in seeds), "strategy"):
        table.add_column(head, no_wrap=True)
    for found in ranking:
        runs = found.runs
        cells = [(runs[seed].score or runs[seed].state.value) if seed in runs else "" for seed in seeds]
        table.add_row(found.candidate.label, spread(found), *cells, strategy_line(found.candidate.config, space))
    return table


def spread(confirmed: Confirmed) -> str:
    """Return mean and standard deviation over seeds; empty unless the run of every seed is complete."""
    if confirmed.mean is None or confirmed.std is None:
        return ""
    mean = number(confirmed.mean)
    return f"{mean} ± {number(confirmed.std) if 'e' in mean else f'{confirmed.std:.4f}'}"


def _cells(trial: EndedTrial, space: SearchSpace) -> dict[str, str]:
    """Return the row of a trial, by the titles of its columns."""
    config, objective = trial.config, space.objective
    cells = {"#": str(trial.number), objective.metric: trial.score}
    if objective.of == "best":
        cells["epoch"] = f"{objective.deciding(trial.epochs).epoch} of {len(trial.epochs)}"
    cells |= {"optimizer": config.optimizer.name, "base_lr": f"{config.optimizer.base_lr:.2e}"}
    if len(space.batch_sizes) > 1:
        cells["batch_size"] = str(config.batch_size)
    cells["schedule"] = schedule_line(config)
    values = config.hyperparameters()
    return cells | {head: f"{values[name]:.3g}" for name, head in _group_columns(space).items()}


def score_line(trial: EndedTrial, objective: Objective) -> str:
    """Return the score of a complete trial and the epoch of a best: `0.9963`, or `0.9963 at epoch 17 of 20`."""
    at = f" at epoch {objective.deciding(trial.epochs).epoch} of {len(trial.epochs)}"
    return trial.score + (at if objective.of == "best" else "")


def failure_line(trials: Sequence[EndedTrial]) -> str:
    """Return the reason of the first trial that failed, and how many failed; empty if none did."""
    failed = [trial for trial in trials if trial.state is TrialState.FAILED]
    if not failed:
        return ""
    (reason, *_) = (failed[0].reason or "").strip().splitlines() or [""]
    count = f"; {len(failed)} trials failed" if len(failed) > 1 else ""
    return f"trial {failed[0].number} failed: {reason[:MAX_REASON]}{count}"


def counts_of_states(counts: Mapping[TrialState, int]) -> str:
    """Return how many trials ended in which state: `complete 11 · pruned 39`."""
    return " · ".join(f"{state} {count}" for state, count in sorted(counts.items()))


def duration(seconds: float) -> str:
    """Return a duration for people: `12 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def strategy_line(config: TrialConfig, space: SearchSpace) -> str:
    """Return a strategy in a few words: `adamw 3.1e-03, batch 64, step 6 × 0.21, head ×2.4`.

    The batch size is left out unless the space searches it.
    """
    return ", ".join(strategy_words(config, batch=len(space.batch_sizes) > 1))


def _group_columns(space: SearchSpace) -> dict[str, str]:
    """Return the searched rates of groups, such as `lr_ratio.head`, and the heads of their columns."""
    parts = [name.partition(".") for name in space.searched_hyperparameters()]
    words = {"lr_ratio": "ratio", "layer_decay": "layer decay"}
    return {f"{field}.{group}": f"{group} {words[field]}" for field, _, group in parts if field in words}
