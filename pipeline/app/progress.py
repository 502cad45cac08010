"""Show a search while it runs: trials done, time so far and time left, and the best trials with their curves."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group
from rich.constrain import Constrain
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.app.curves import Curve, curve, curves_table
from pipeline.app.display import counts_of_states, duration, in_notebook, strategy_line
from pipeline.app.time_left import TimeLeft
from pipeline.files.signals import Interrupts
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics, TrialState

if TYPE_CHECKING:
    from pipeline.study.study import Study

REFRESHES_PER_SECOND = 4
INDENT = 2
"""Columns before the lines below the bar."""
BEST = 5
"""Trials with a curve, of those that have ended and those that run."""


class Progress:
    """Show trials done, time so far and left, and the best trials so far.

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
        self._objective = study.space.objective
        self._trials = trials
        self._console = console
        self._interrupts = interrupts
        self._counts = Counter(trial.state for trial in study.ended)
        self._estimate = TimeLeft(study.space.epochs, prunes=study.space.pruner.name != "none")
        self._estimate.group_ended(study.ended)
        # A thread draws, so these are replaced, never changed.
        self._running: Mapping[int, Curve] = {}
        self._ended: tuple[EndedTrial, ...] = ()
        """Trials that have ended and are not stored, or whose group has not ended."""
        self._left: set[int] = set()
        """Trials of groups that have ended."""
        self._is_shown = False
        self._display: _Display | None = None
        if in_notebook() and not console.quiet:
            self._display = _NotebookDisplay(self.rendered)
        elif console.is_terminal:
            self._display = _TerminalDisplay(self.rendered, console)

    def __enter__(self) -> Progress:
        """Start the display."""
        self._is_shown = True
        if self._display is not None:
            self._display.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the display, and leave its last state."""
        self._is_shown = False
        if self._display is not None:
            self._display.stop()

    def begin(self, trial: BegunTrial) -> None:
        """Take a trial that begins or goes on."""
        self._running = {**self._running, trial.number: curve(trial, self._objective)}

    def epoch(self, metrics: Mapping[int, EpochMetrics]) -> None:
        """Take an epoch of a group."""
        self._estimate.epochs(len(metrics))
        curves = {n: curve(self._running[n], self._objective, epoch) for n, epoch in metrics.items()}
        self._running = {**self._running, **curves}
        if self._display is not None:
            self._display.changed()

    def end(self, trial: EndedTrial) -> None:
        """Take a trial that has ended."""
        self._counts[trial.state] += 1
        self._running = {n: curve for n, curve in self._running.items() if n != trial.number}
        self._ended = (*self._ended, trial)

    def group_ended(self, numbers: Collection[int] | None = None) -> None:
        """Take the end of a group; in a pipe, print a line.

        Args:
            numbers: The trials of the group; None: all, as no other group trains.
        """
        everything = [*self._running, *(trial.number for trial in self._ended)]
        group = set(everything if numbers is None else numbers)
        self._estimate.group_ended([trial for trial in self._ended if trial.number in group])
        self._running = {n: curve for n, curve in self._running.items() if n not in group}
        self._left |= group
        self._ended = tuple(t for t in self._ended if t.number not in self._left or not self._study.stored(t.number))
        if self._display is None:
            parts = [self._done(), self._time(), self._states(), self._estimate.speed()]
            for best in self._study.best():
                parts.append(f"best {best.score}: #{best.number} {strategy_line(best.config, self._study.space)}")
            self._console.print("   ".join(filter(None, parts)), soft_wrap=True)

    def rendered(self) -> Constrain:
        """Return what a terminal shows now."""
        bar = ProgressBar(
            total=self._trials,
            completed=min(self._counts.total() + self._in_group(), self._trials),
            width=min(36, self._console.width // 3),
            complete_style="cyan",
            finished_style="green",
        )
        head = Table.grid(padding=(0, 1))
        head.add_row("", bar, Text(self._done()))
        width, states, speed = self._console.width - INDENT, self._states(), self._estimate.speed()
        fits = len(states) + len(speed) + 3 <= width
        lines = ["   ".join(filter(None, (states, speed)))] if fits else [states, speed]
        below: list[Text | Table] = [Text(self._time()), *(Text(line, style="dim") for line in lines)]
        if self._is_shown and self._interrupts.exit_status:
            below.append(Text("ends after this epoch; Ctrl-C again ends at once"))
        elif self._is_shown and self._interrupts.is_overdue:
            below.append(Text("the time is over; ends after this epoch"))
        below += self._best() if self._is_shown else []  # a table of the best follows the last state
        return Constrain(Group(head, Padding(Group(*below), (0, 0, 0, INDENT))))  # a notebook can show no Group

    def _in_group(self) -> float:
        """Return the share of its epochs that each running trial has trained, summed up."""
        return sum(len(curve.epochs) / curve.config.epochs for curve in self._running.values())

    def _done(self) -> str:
        return f"{self._counts.total()}/{self._trials} trials"

    def _time(self) -> str:
        """Return the time so far and the time left, and what the time left is based on."""
        elapsed = duration(self._estimate.elapsed_s)
        ahead = self._trials - self._counts.total() - len(self._running)
        left = self._estimate.words([len(curve.epochs) for curve in self._running.values()], ahead=ahead)
        return f"{elapsed}, {left}" if left and self._is_shown else elapsed

    def _states(self) -> str:
        """Return how many trials are in which state, and what is being done."""
        running, doing = list(self._running.values()), ""
        if running:
            epochs = running[0].config.epochs
            trained = [min(len(curve.epochs) + 1, epochs) for curve in running]
            first, last = min(trained), max(trained)  # groups on several workers are in different epochs
            words = f"epoch {first}" if first == last else f"epochs {first} to {last}"
            doing = f"running {len(running)}, {words} of {epochs}"
        elif self._is_shown and self._display is not None and self._counts.total() < self._trials:
            doing = f"choosing the {'next' if self._counts else 'first'} trials"
        return " · ".join(filter(None, (counts_of_states(self._counts), doing)))

    def _best(self) -> list[Text | Table]:
        """Return the curves of the best trials, complete or running, below an empty line."""
        complete = (*self._study.best(BEST), *(t for t in self._ended if t.state is TrialState.COMPLETE))
        curves = {**{trial.number: curve(trial, self._objective) for trial in complete}, **self._running}
        measured = [curve for curve in curves.values() if curve.score is not None]
        best = sorted(measured, key=lambda curve: (curve.score, curve.number))[:BEST]
        if not best:
            return []
        return [Text(), curves_table(best, self._study.space, running=self._running, columns=self._console.width)]


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
