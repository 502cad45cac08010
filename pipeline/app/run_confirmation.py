"""Run the confirmation of a search: group after group, one for each fresh seed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from pipeline.app import cli
from pipeline.app.run_trials import FOLDER, Worker, train_all
from pipeline.errors import counted, first_line
from pipeline.files.signals import Interrupts
from pipeline.space.confirm import Confirm, fitting
from pipeline.space.pruners import NoPruner
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import EndedTrial, EpochMetrics
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.confirmation import Confirmation
from pipeline.study.group_state import Proposals
from pipeline.study.loop import GroupOwner, forget_ended, run_group, store_each
from pipeline.study.study import Unlocked
from pipeline.tracking.process import TrackerProcess
from pipeline.training.contract import GroupLost, TrialGroup
from pipeline.training.executor import LocalExecutor

EXPECTED_SHARE = 0.5
"""Share of the epochs of all trials that a search with a pruner trains, about; measured on the ready-made spaces."""


def run_confirmation(
    confirmation: Confirmation,
    executor: LocalExecutor,
    workers: Sequence[Worker],
    checkpoints: Checkpoints,
    tracker: TrackerProcess,
    interrupts: Interrupts,
    console: Console,
) -> None:
    """Train the runs that a confirmation lacks, and store each as it ends.

    Args:
        confirmation: Says what to train.
        executor: Has the workload.
        workers: Each trains the runs of a seed at a time.
        checkpoints: Of runs that train alone. Runs beside which others train have a folder below.
        tracker: Is told of runs.
        interrupts: Says whether to stop.
        console: Where progress is shown.
    """
    with _Progress(confirmation, console=console) as progress:
        work = _Runs(confirmation, executor, checkpoints, tracker, progress, interrupts)
        train_all(work, workers, interrupts.asked)
    forget_ended(checkpoints, confirmation)


@dataclass(frozen=True)
class _Runs:
    """The runs that a confirmation lacks; see `Work`."""

    owner: Confirmation
    executor: LocalExecutor
    checkpoints: Checkpoints
    tracker: TrackerProcess
    progress: _Progress
    interrupts: Interrupts
    taken: set[int] = field(default_factory=set)
    """Seeds that workers train."""

    def next_group(self) -> Proposals:
        """Return the next runs."""
        return {} if self.interrupts.reason else self.owner.next_group()

    def has_group(self) -> bool:
        """Return whether there is a seed to take."""
        return self.owner.lacks(but=self.taken)

    def take_group(self, *, workers: int, unlocked: Unlocked) -> Proposals:
        """Return runs of a seed that no worker has taken."""
        proposals = {} if self.interrupts.reason else self.owner.next_group(but=self.taken)
        self.taken.update(_seeds(proposals))
        return proposals

    def train_group(self, worker: Worker, owner: GroupOwner, proposals: Proposals, **options: Any) -> None:
        """Train runs of one seed."""
        confirmation, checkpoints = self.owner, self._checkpoints_of(proposals, beside=owner is not self.owner)
        group = worker.executor.build({number: config for number, (config, _) in proposals.items()})
        tests: dict[int, Mapping[str, float]] = {}
        training = options.get("training", contextlib.nullcontext)

        def on_epoch(metrics: Mapping[int, EpochMetrics]) -> None:
            self.progress.epoch(metrics)
            self.tracker.epoch(metrics)
            with training():  # other workers need not wait for it
                tests.update(evaluated_on_test(group, metrics, confirmation.space, self.executor))

        def add(*runs: EndedTrial) -> None:
            for run in runs:
                confirmation.add(confirmation.marked(run), test=tests.get(run.number, {}))

        ended = run_group(
            group,
            proposals,
            owner,
            checkpoints=checkpoints,
            environment=worker.environment(),
            on_epoch=on_epoch,
            rules=lambda: worker.executor.rules,
            on_begin=lambda run: self.tracker.begin(confirmation.marked(run)),
            on_end=lambda run: self.tracker.end(confirmation.marked(run)),
            **options,
        )
        store_each(ended, add)
        self.taken.difference_update(_seeds(proposals))
        self.progress.group_ended(proposals)
        if checkpoints is not self.checkpoints:
            with contextlib.suppress(OSError):  # interrupted, so that it has a checkpoint
                checkpoints.folder.rmdir()

    def _checkpoints_of(self, proposals: Proposals, *, beside: bool) -> Checkpoints:
        folder = self.checkpoints.folder / f"{FOLDER}{min(proposals)}"
        alone = not beside and not folder.exists()
        return self.checkpoints if alone else Checkpoints(folder, warn=self.checkpoints.warn)


def _seeds(proposals: Proposals) -> set[int]:
    return {config.seed for config, _ in proposals.values()}


class _Progress:
    """Shows how far a confirmation is: one line that changes on a terminal, else a line per seed.

    Args:
        confirmation: The confirmation, whose runs are counted.
        console: Where progress is shown.
    """

    def __init__(self, confirmation: Confirmation, *, console: Console) -> None:
        self._confirmation = confirmation
        self._console = console
        self._left = confirmation.epochs_left
        self._epochs: dict[int, int] = {}
        """Number of each run to the epochs that it has trained."""
        self._status = console.status("") if console.is_terminal else None

    def __enter__(self) -> _Progress:
        """Say what is confirmed."""
        if self._left:
            labels = ", ".join(candidate.label for candidate in self._confirmation.candidates)
            seeds = ", ".join(map(str, self._confirmation.seeds))
            self._console.print(f"confirming    {labels} with seeds {seeds}", soft_wrap=True)
        if self._status is not None and self._left:
            self._status.start()
            self._status.update(self._line())
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the line that changes."""
        if self._status is not None:
            self._status.stop()

    def epoch(self, metrics: Mapping[int, EpochMetrics]) -> None:
        """Count an epoch of a group."""
        self._epochs |= {number: epoch.epoch for number, epoch in metrics.items()}
        if self._status is not None:
            self._status.update(self._line())

    def group_ended(self, numbers: Collection[int]) -> None:
        """Count a group as stored, runs that ended early too; in a pipe, print a line."""
        self._epochs |= dict.fromkeys(self._epochs.keys() & numbers, self._confirmation.space.epochs)
        if self._status is None:
            self._console.print(self._line(), soft_wrap=True)

    def _line(self) -> str:
        return f"confirming    {min(sum(self._epochs.values()), self._left)} of {counted(self._left, 'epoch')}"


def evaluated_on_test(
    group: TrialGroup, metrics: Mapping[int, EpochMetrics], space: SearchSpace, executor: LocalExecutor
) -> Mapping[int, Mapping[str, float]]:
    """Return the test metrics of runs that have trained their last epoch.

    Every candidate is tested, because the models are gone when the winner is known; only the winner's test is shown.
    Where the best epoch decides, the last model is not the one that was chosen, and nothing is tested.
    """
    last = any(epoch.epoch == space.epochs and epoch.finished for epoch in metrics.values())
    if not last or space.objective.of == "best" or executor.workload.test is None:
        return {}
    try:
        tested = group.test()
    except GroupLost:  # the runs keep their metrics, and have no test
        return {}
    except Exception as error:  # such as of a metric that is undefined on the test split
        cli.warn(f"the test split could not be evaluated: {first_line(error)}")
        return {}
    return {
        number: {name: float(value) for name, value in scores.items() if math.isfinite(value)}
        for number, scores in tested.items()
    }


def announcement(confirm: Confirm, space: SearchSpace, *, trials: int) -> str:
    """Return what the confirmation of a search will probably do and cost; empty if it is turned off."""
    if confirm.share == 0:
        return ""
    searched = round(trials * space.epochs * (1 if isinstance(space.pruner, NoPruner) else EXPECTED_SHARE))
    size = fitting(confirm, complete=trials, searched=searched, epochs=space.epochs)
    if size is None:
        return (
            "then          no confirmation, if as many trials are pruned as usual: too few trials for a share of "
            f"{confirm.share * 100:.0f} %"
        )
    cost = counted(size.runs * space.epochs, "epoch")
    return (
        f"then          about {counted(size.finalists + size.baselines, 'strategy', 'strategies')} train again with "
        f"{size.seeds} fresh seeds: {cost}, at most {confirm.share * 100:.0f} % of all"
    )
