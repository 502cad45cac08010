"""The contract of trackers: who is told of a study while it runs."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.space.pruners import Score
from pipeline.space.search_space import Objective
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics, TrialState
from pipeline.tracking.record import config_hash


@dataclass(frozen=True, kw_only=True)
class StoredTrial:
    """A trial that ended before the search went on, in short: a tracker may have its record."""

    number: int
    state: TrialState
    value: float | None
    order: tuple[Score, int] | None
    """What sorts complete trials, best first; None unless complete."""
    config: str
    """`config_hash` of its config."""
    confirms: bool
    """Whether it is a run of the confirmation, which is not ranked among trials."""

    @classmethod
    def of(cls, trial: EndedTrial) -> StoredTrial:
        """Return a trial in short."""
        order = None if trial.value is None else trial.objective.order(trial)
        config = config_hash(trial.config)
        return cls(
            number=trial.number,
            state=trial.state,
            value=trial.value,
            order=order,
            config=config,
            confirms=trial.confirms is not None,
        )


@dataclass(frozen=True, kw_only=True)
class StudyInfo:
    """What a tracker is told of a study before the first trial."""

    name: str
    identity: str
    """Differs between two studies of the same name, such as one that was deleted and one that took the name."""
    workload: str
    """Title of the workload; studies of one workload can be compared."""
    objective: Objective
    """The metric that ranks trials."""
    groups: tuple[str, ...]
    """Names of the parameter groups whose learning rates have a chart."""
    searched: tuple[str, ...]
    """Hyperparameters that differ between trials, such as `optimizer`, `base_lr`, `momentum`, `lr_ratio.head`."""
    shared: tuple[str, ...]
    """Those searched hyperparameters that every trial has."""
    space: str
    """The search space as YAML text."""
    seed: int
    started: float
    """When the first trial began, or else the search; seconds since 1970."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Everything but configs that the numbers may depend on: device, machine, versions."""
    ended: tuple[StoredTrial, ...] = field(default=(), repr=False)
    """The trials that have ended, and the runs of the confirmation."""


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """What a search says when it ends, finished or not; a search that goes on later says another one."""

    finished: bool
    """Whether all trials have ended."""
    note: str
    """Markdown for people."""
    best: EndedTrial | None = None
    """The winner: a trial, or a run of the confirmation if a baseline has won."""
    confirmed: Mapping[int, float] = field(default_factory=dict)
    """Number of each trial that was confirmed to its mean objective over fresh seeds, best first; empty until the
    confirmation is complete."""
    ended: float
    """When the search ended; seconds since 1970."""
    files: tuple[Path, ...] = ()
    """Files to keep with the record, such as `best.yaml`; they must stay until the tracker is closed."""


class Tracker(Protocol):
    """Records studies below a root folder, or wherever the environment says.

    `pipeline.tracking.process` runs every tracker in a process of its own, so that a tracker may be slow and may raise
    anything: a search prints errors as warnings, and tries a trial that could not be recorded again. The process may be
    killed and started again; then a new tracker opens the study and is told once more of every trial that is not
    recorded, so each method must do nothing about what is recorded already. A tracker is built in the search's process,
    where it must cost nothing, and then pickled to its own. `str(tracker)` names the record in messages, such as
    "MLflow in my/folder".
    """

    def load(self) -> None:
        """Import what takes long; called in a thread while the study is not known yet."""
        ...

    def open(self, study: StudyInfo) -> str | None:
        """Begin a study's record or go on with it, and return how a person looks at it, such as a command."""
        ...

    def recorded(self) -> set[int]:
        """Return the numbers of those of `StudyInfo.ended` that need not be told again; called after `open`."""
        ...

    def begin(self, trial: BegunTrial) -> None:
        """Take a trial that begins, or goes on from a checkpoint; `flush` may record it."""
        ...

    def epochs(self, metrics: Mapping[int, EpochMetrics], at: float) -> None:
        """Take the metrics of an epoch by trial number, and when it ended; `flush` may record them."""
        ...

    def flush(self, ending: Collection[int]) -> None:
        """Record what was taken; called every few seconds.

        Args:
            ending: Numbers of trials whose end is told next, which says it all.
        """
        ...

    def end(self, trial: EndedTrial) -> None:
        """Record a trial that has ended, all its epochs included; `begin` and `epochs` may have been called or not."""
        ...

    def finish(self, summary: StudySummary) -> None:
        """Record how the search ended."""
        ...

    def close(self) -> list[str]:
        """Release everything, and return what went wrong without harm to the record, one sentence each."""
        ...

    def delete(self, study: str, *, identity: str) -> list[str]:
        """Delete what is recorded of a study, in the process of the command; return what is left, one sentence each."""
        ...


def root_cause(error: BaseException) -> str:
    """Return in one line why an error happened: the system's reason if there is one, without SQL, retries and paths."""
    chain = [error]
    while behind := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(behind)
    if not isinstance(error, OSError):
        error = next((link for link in reversed(chain) if isinstance(link, OSError | sqlite3.Error)), error)
    # A path names one trial's files, and the same cause must read the same for every trial.
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    text = next(iter(text.strip().splitlines()), type(error).__name__)
    return text if len(text) <= 300 else f"{text[:300]}…"
