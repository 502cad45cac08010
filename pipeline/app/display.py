"""Show a search: progress while it runs, a table of the best trials when it ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich import get_console
from rich.console import Console, Group
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.status import Status
from rich.table import Table
from rich.text import Text

from pipeline.errors import counted
from pipeline.files.signals import Interrupts
from pipeline.space.config import TrialConfig
from pipeline.space.search_space import Objective, SearchSpace
from pipeline.space.strategy import schedule_line, strategy_words
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState, number

if TYPE_CHECKING:
    from pipeline.study.confirmation import Confirmed
    from pipeline.study.study import Study

REFRESHES_PER_SECOND = 4
SAY_EVERY_S = 10.0
"""In a pipe, seconds between two lines that say the same."""
TABLE_WIDTH = 200
"""Characters per line of the table of best trials; a narrow terminal wraps a line instead of cutting off numbers."""
MAX_REASON = 200
"""Most characters of a reason in a line."""
BEST = 5
"""Trials in the table of the best."""


def build_console(*, quiet: bool) -> Console:
    """Return the console of a search; in a notebook it prints plain text, in which long lines wrap."""
    is_terminal = False if _in_notebook() else None
    return Console(highlight=False, markup=False, quiet=quiet, force_jupyter=False, force_terminal=is_terminal)


def busy(console: Console, words: str) -> contextlib.AbstractContextManager[object]:
    """Show on a terminal what is being done, while it is being done."""
    return console.status(words) if console.is_terminal else contextlib.nullcontext()


def _in_notebook() -> bool:
    return get_console().is_jupyter


class Progress:
    """Show trials done, the best strategy so far and the time left.

    On a terminal and in a notebook this is one display that changes, whose last state stays; in a pipe it is a line per
    group.

    Args:
        study: The study whose trials are counted.
        trials: Number of trials of the search.
        console: Where progress is shown.
        interrupts: A request to end the search early is shown too.
    """

    def __init__(self, study: Study, *, trials: int, console: Console, interrupts: Interrupts) -> None:
        self._study = study
        self._trials = trials
        self._console = console
        self._interrupts = interrupts
        self._started = time.monotonic()
        self._before = len(study.ended)
        self._epochs = 0
        self._in_group = 0.0
        self._spread = ""
        self._runs = False
        self._display: _Display | None = None
        if _in_notebook() and not console.quiet:
            self._display = _NotebookDisplay(self._render)
        elif console.is_terminal:
            self._display = _TerminalDisplay(self._render, console)

    def __enter__(self) -> Progress:
        """Start the display."""
        self._runs = True
        if self._display is not None:
            self._display.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the display, and leave its last state."""
        self._runs = False
        if self._display is not None:
            self._display.stop()

    def group_begins(self, spread: str) -> None:
        """Set the text that says how a group's trials are spread over matrices."""
        self._spread = spread

    def epoch(self, metrics: Mapping[int, EpochMetrics]) -> None:
        """Count an epoch of a group."""
        self._epochs += len(metrics)
        self._in_group = sum(m.epoch for m in metrics.values()) / self._study.space.epochs
        if self._display is not None:
            self._display.changed()

    def group_ended(self) -> None:
        """Count a group as stored; in a pipe, print a line."""
        self._in_group = 0.0
        if self._display is None:
            parts = (self._done(), self._best_strategy(), self._line_of_counts())
            self._console.print("   ".join(part for part in parts if part), soft_wrap=True, highlight=False)

    def _render(self) -> Constrain:
        done = len(self._study.ended) + self._in_group
        bar = ProgressBar(
            total=self._trials,
            completed=min(done, self._trials),
            width=min(36, self._console.width // 2),
            complete_style="cyan",
            finished_style="green",
        )
        head = Table.grid(padding=(0, 1))
        head.add_row("", bar, Text(f"{self._done()}   {self._time_left(done)}"))
        below = [Text(f"  {line}", style="dim") for line in (self._best_strategy(), self._line_of_counts()) if line]
        if self._runs and self._interrupts.exit_status:
            below.append(Text("  ends after this epoch; Ctrl-C again ends at once"))
        elif self._runs and self._interrupts.is_overdue:
            below.append(Text("  the time is over; ends after this epoch"))
        return Constrain(Group(head, *below))  # unlike a Group, a notebook can show it

    def _done(self) -> str:
        best = self._study.best()
        done = f"{len(self._study.ended)}/{self._trials}"
        return f"{done}   best {best[0].score}" if best else done

    def _best_strategy(self) -> str:
        best = self._study.best()
        return strategy_line(best[0].config, self._study.space) if best else ""

    def _line_of_counts(self) -> str:
        states = counts_of_states(self._study.states)
        rate = self._epochs / max(time.monotonic() - self._started, 1e-9)
        speed = f"{rate:.0f} trial-epochs/s" if rate >= 10 else f"{rate:.2g} trial-epochs/s"
        return "   ".join(part for part in (states, speed, self._spread) if part)

    def _time_left(self, done: float) -> str:
        gained = done - self._before
        if gained <= 0 or done >= self._trials:
            return ""
        seconds = (time.monotonic() - self._started) / gained * (self._trials - done)
        return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"


class _Display(Protocol):
    """Shows a text that changes."""

    def start(self) -> None:
        """Show the text."""

    def changed(self) -> None:
        """Show what the text has become."""

    def stop(self) -> None:
        """Leave the last state."""


class _TerminalDisplay:
    """Draws over its last state, also between two changes."""

    def __init__(self, render: Callable[[], Constrain], console: Console) -> None:
        self._render = render
        self._console = console
        self._live = Live(
            console=console, get_renderable=render, refresh_per_second=REFRESHES_PER_SECOND, transient=True
        )

    def start(self) -> None:
        self._live.start()

    def changed(self) -> None:
        """Do nothing: a thread draws."""

    def stop(self) -> None:
        self._live.stop()
        self._console.print(self._render())


class _NotebookDisplay:
    """Replaces one output of a notebook's cell, which a saved notebook keeps in its last state.

    Unlike rich's own display for notebooks, this needs no ipywidgets, and an exported notebook shows it.
    """

    def __init__(self, render: Callable[[], Constrain]) -> None:
        self._render = render
        self._handle: Any = None
        self._shown = 0.0

    def start(self) -> None:
        from IPython.display import display

        self._handle = display(self._render(), display_id=True)

    def changed(self) -> None:
        if time.monotonic() - self._shown >= 1 / REFRESHES_PER_SECOND:
            self._shown = time.monotonic()
            self._handle.update(self._render())

    def stop(self) -> None:
        self._handle.update(self._render())


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
