"""Show a search: progress while it runs, a table of the best trials when it ends."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.files.signals import Interrupts
from pipeline.space.config import TrialConfig
from pipeline.space.search_space import Objective, SearchSpace
from pipeline.space.trial import EndedTrial, EpochMetrics
from pipeline.study.study import Study


class Progress:
    """Show trials done, the best strategy so far and the time left: live on a terminal, as lines in a pipe.

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
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> Progress:
        """Start the live display."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the live display, and print its last state."""
        if self._console.is_terminal:
            self._live.stop()
            self._console.print(self._render())

    def group_begins(self, spread: str) -> None:
        """Set the text that says how a group's trials are spread over matrices."""
        self._spread = spread

    def epoch(self, metrics: Mapping[int, EpochMetrics]) -> None:
        """Count an epoch of a group."""
        self._epochs += len(metrics)
        self._in_group = sum(m.epoch for m in metrics.values()) / self._study.space.epochs

    def group_ended(self) -> None:
        """Count a group as stored; in a pipe, print a line."""
        self._in_group = 0.0
        if not self._console.is_terminal:
            parts = (self._done(), self._best_strategy(), self._line_of_counts())
            self._console.print("   ".join(part for part in parts if part), soft_wrap=True, highlight=False)

    def _render(self) -> RenderableType:
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
        if self._interrupts.exit_status and self._live.is_started:
            below.append(Text("  ends after this epoch; Ctrl-C again ends at once"))
        return Group(head, *below)

    def _done(self) -> str:
        best = self._study.best()
        done = f"{len(self._study.ended)}/{self._trials}"
        return f"{done}   best {best[0].score}" if best else done

    def _best_strategy(self) -> str:
        best = self._study.best()
        return strategy_line(best[0].config, self._study.space) if best else ""

    def _line_of_counts(self) -> str:
        counts = Counter(trial.state for trial in self._study.ended)
        states = " · ".join(f"{state} {count}" for state, count in sorted(counts.items()))
        rate = self._epochs / max(time.monotonic() - self._started, 1e-9)
        speed = f"{rate:.0f} trial-epochs/s" if rate >= 10 else f"{rate:.2g} trial-epochs/s"
        return "   ".join(part for part in (states, speed, self._spread) if part)

    def _time_left(self, done: float) -> str:
        gained = done - self._before
        if gained <= 0 or done >= self._trials:
            return ""
        seconds = (time.monotonic() - self._started) / gained * (self._trials - done)
        return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"


def best_table(study: Study, *, count: int = 5) -> Table:
    """Return a table of the best complete trials, with columns for what is searched."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 1), header_style="bold")
    rows = [_cells(trial, study.space) for trial in study.best(count)]
    for column in rows[0] if rows else ():
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    return table


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


def strategy_line(config: TrialConfig, space: SearchSpace) -> str:
    """Return a strategy in a few words: `adamw 3.1e-03, batch 64, step 6 × 0.21, head ×2.4`.

    The batch size is left out unless the space searches it.
    """
    groups = config.param_groups.items()
    ratios = [f"{name} ×{group.lr_ratio:.2g}" for name, group in groups if group.lr_ratio != 1]
    decays = [f"{name} layers ×{group.layer_decay:.2g}" for name, group in groups if group.layer_decay is not None]
    rate = f"{config.optimizer.name} {config.optimizer.base_lr:.1e}"
    clip = [f"clip {config.clip_grad_norm:.2g}"] if config.clip_grad_norm is not None else []
    batch = [f"batch {config.batch_size}"] if len(space.batch_sizes) > 1 else []
    return ", ".join([rate, *batch, schedule_line(config), *ratios, *decays, *clip])


def schedule_line(config: TrialConfig) -> str:
    """Return a schedule in a few words: `step 6 × 0.21, warm-up 2`."""
    warmup = getattr(config.scheduler, "warmup", 0)
    return f"{config.scheduler}, warm-up {warmup}" if warmup else str(config.scheduler)


def _group_columns(space: SearchSpace) -> dict[str, str]:
    """Return the searched rates of groups, such as `lr_ratio.head`, and the heads of their columns."""
    parts = [name.partition(".") for name in space.searched_hyperparameters()]
    words = {"lr_ratio": "ratio", "layer_decay": "layer decay"}
    return {f"{field}.{group}": f"{group} {words[field]}" for field, _, group in parts if field in words}
