"""Train the trials that a study lacks: group after group, or on several workers a group at a time each."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.app import cli
from pipeline.space.placement import PlacementRules
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.group_state import Proposals
from pipeline.study.loop import GroupOwner, forget_ended, run_group, store_each
from pipeline.study.models import Models
from pipeline.study.study import Study, Unlocked
from pipeline.training.contract import Executor
from pipeline.training.ray_worker import NoPlace, RayWorker

FOLDER = "group-"
"""Beginning of the name of the folder with the checkpoints of a group beside which others train."""


@dataclass(frozen=True)
class Worker:
    """Trains one group at a time."""

    executor: Executor
    environment: Callable[[], Mapping[str, Any]]
    """Returns what is recorded with each trial: device, machine, versions."""


class Listener(Protocol):
    """Is told of trials as they train."""

    def begin(self, trial: BegunTrial) -> None:
        """Take a trial that begins or goes on."""
        ...

    def epoch(self, metrics: Mapping[int, EpochMetrics]) -> None:
        """Take an epoch of a group."""
        ...

    def end(self, trial: EndedTrial) -> None:
        """Take a trial that has ended; trials with lower numbers may not have."""
        ...


def run_trials(
    study: Study,
    trials: int,
    workers: Sequence[Worker],
    *,
    checkpoints: Checkpoints,
    told: Sequence[Listener],
    interrupted: Callable[[], bool],
    models: Models | None = None,
    after_epoch: Callable[[], None] = lambda: None,
    group_ended: Callable[[Collection[int]], None] = lambda _: None,
) -> None:
    """Train groups until `trials` trials have ended or the search is interrupted; store each trial.

    Args:
        study: Proposes groups, judges their trials, and stores them.
        trials: Number of trials in total.
        workers: Each trains a group at a time. One alone is asked for the trials that any other one would be asked for.
        checkpoints: Of groups that train alone. A group beside which others train has a folder below.
        told: Is told of trials.
        interrupted: Says whether to stop; asked after each epoch.
        models: Keeps the models of trials that may win.
        after_epoch: Called after each epoch.
        group_ended: Takes the numbers of a group whose trials have ended, or that was interrupted.

    Raises:
        PipelineError: As a worker raised it; the groups of the other workers have saved checkpoints.
    """
    run = _Trials(study, trials, checkpoints, (study, *told), models, after_epoch, group_ended)
    run.remove_stored()
    train_all(run, workers, interrupted)
    run.remove_stored()
    forget_ended(checkpoints, study)


class Work(Protocol):
    """What workers train, group after group."""

    @property
    def owner(self) -> GroupOwner:
        """Whose trials they are."""
        ...

    def next_group(self) -> Proposals:
        """Return the next group for a worker that trains alone; empty if there is none."""
        ...

    def has_group(self) -> bool:
        """Return whether `take_group` would return a group."""
        ...

    def take_group(self, *, workers: int, unlocked: Unlocked) -> Proposals:
        """Return a group that none of several workers has taken; empty if there is none.

        Args:
            workers: Number of workers.
            unlocked: Entered for what other threads need not wait for; one thread at a time calls this method.
        """
        ...

    def train_group(self, worker: Worker, owner: GroupOwner, proposals: Proposals, **options: Any) -> None:
        """Train a group to its end or until it is interrupted, and store its trials.

        Args:
            worker: Trains.
            owner: The owner, perhaps with the rules of this worker alone.
            proposals: The group.
            options: Of `run_group`: `interrupted`, `training`.
        """
        ...


def train_all(work: Work, workers: Sequence[Worker], interrupted: Callable[[], bool]) -> None:
    """Have workers train until nothing is left or the search is interrupted.

    Each of several workers has a thread. One lock is held for everything but training and proposing, so that the study
    and those who are told take one call at a time; another lets one thread at a time propose.
    """
    if len(workers) > 1:
        _train_together(work, workers, interrupted)
        return
    gives_up_when(workers[0], interrupted)
    with contextlib.suppress(NoPlace):
        _train(work, workers[0], work.owner, work.next_group, interrupted=interrupted)


def _train(
    work: Work,
    worker: Worker,
    owner: GroupOwner,
    take: Callable[[], Proposals],
    *,
    interrupted: Callable[[], bool],
    training: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> None:
    """Have a worker train group after group, as long as `take` returns one."""
    while proposals := take():
        work.train_group(worker, owner, proposals, interrupted=interrupted, training=training)
        if interrupted():
            return


@dataclass(frozen=True)
class _Trials:
    """The trials that a search lacks."""

    study: Study
    trials: int
    checkpoints: Checkpoints
    told: Sequence[Listener]
    models: Models | None
    after_epoch: Callable[[], None]
    group_ended: Callable[[Collection[int]], None]

    @property
    def owner(self) -> Study:
        """The study."""
        return self.study

    def next_group(self) -> Proposals:
        """Return the next group; see `Work`."""
        return self.study.next_group(self.trials)

    def has_group(self) -> bool:
        """Return whether there is a group to take."""
        return self.study.has_group(self.trials)

    def take_group(self, *, workers: int, unlocked: Unlocked) -> Proposals:
        """Return a group that no worker has taken."""
        return self.study.take_group(self.trials, workers=workers, unlocked=unlocked)

    def train_group(self, worker: Worker, owner: GroupOwner, proposals: Proposals, **options: Any) -> None:
        """Train a group; see `Work`."""
        ended = run_group(
            worker.executor.build({number: config for number, (config, _) in proposals.items()}),
            proposals,
            owner,
            checkpoints=self._checkpoints_of(proposals),
            environment=worker.environment(),
            on_epoch=self._epoch,
            rules=lambda: worker.executor.rules,
            on_begin=lambda trial: self._tell("begin", trial),
            on_end=lambda trial: self._tell("end", trial),
            models=self.models,
            **options,
        )
        store_each(ended, self.study.add_in_order)
        self.remove_stored()
        self.group_ended(proposals)

    def remove_stored(self) -> None:
        """Remove the checkpoints of groups whose trials are all stored; a later group may wait for lower numbers."""
        stops = {group.start: group.stop for group in self.study.groups}
        for folder in self.checkpoints.folder.glob(f"{FOLDER}*"):
            first = int(folder.name.removeprefix(FOLDER))
            if first < self.trials and min(stops.get(first, 0), self.trials) <= len(self.study.ended):
                checkpoints = Checkpoints(folder, warn=cli.warn)
                checkpoints.clear()
                checkpoints.forget_unused(before="~")
                folder.rmdir()

    def _checkpoints_of(self, proposals: Proposals) -> Checkpoints:
        first = min(proposals)
        if not self.study.is_recorded(first):
            return self.checkpoints
        return Checkpoints(self.checkpoints.folder / f"{FOLDER}{first:06}", warn=self.checkpoints.warn)

    def _epoch(self, metrics: Mapping[int, EpochMetrics]) -> None:
        self._tell("epoch", metrics)
        self.after_epoch()

    def _tell(self, verb: str, what: Any) -> None:
        for listener in self.told:
            getattr(listener, verb)(what)


def _train_together(work: Work, workers: Sequence[Worker], interrupted: Callable[[], bool]) -> None:
    """Have several workers train, each in a thread; the first error interrupts the others, and is raised."""
    lock, asking, failed = threading.Lock(), threading.Lock(), threading.Event()
    remote = [worker.executor for worker in workers if isinstance(worker.executor, RayWorker)]
    for executor in remote:
        executor.is_idle = False

    def ends() -> bool:
        return failed.is_set() or interrupted()

    def is_over() -> bool:
        """Return whether nothing is left to take; called without the lock."""
        with lock:
            return ends() or not work.has_group()

    def waiting() -> set[tuple[int, int]]:
        """Return the workers whose group waits for a place: their index, and the number of their actor."""
        return {(index, other.generation) for index, other in enumerate(remote) if other.waits}

    def train(worker: Worker) -> None:
        gave_way = set[tuple[int, int]]()

        def take() -> Proposals:
            """Take a group, unless a worker's group waits for a place, to which this worker has not given way yet."""
            with _released(lock), asking, lock:
                if ends() or waiting() - gave_way:
                    return {}
                return work.take_group(workers=len(workers), unlocked=lambda: _released(lock))

        try:
            while not is_over():
                gives_up_when(worker, is_over)
                if isinstance(worker.executor, RayWorker):
                    worker.executor.place()
                gives_up_when(worker, ends)
                with lock:
                    owner = _WithRules(work.owner, worker.executor.rules)
                    _train(work, worker, owner, take, interrupted=ends, training=lambda: _released(lock))
                    if isinstance(worker.executor, RayWorker) and waiting() - gave_way:
                        gave_way |= waiting()
                        worker.executor.close()
        except NoPlace:
            pass
        except BaseException:
            failed.set()
            raise
        finally:
            if isinstance(worker.executor, RayWorker):
                worker.executor.is_idle = True
                if waiting():
                    worker.executor.close()

    with ThreadPoolExecutor(len(workers)) as pool:
        try:
            for future in as_completed([pool.submit(train, worker) for worker in workers]):
                future.result()
        finally:
            failed.set()  # on Ctrl-C too, which is raised here


def gives_up_when(worker: Worker, over: Callable[[], bool]) -> None:
    """Have a worker of Ray wait for a free place until something is over."""
    if isinstance(worker.executor, RayWorker):
        worker.executor.gives_up = over


class _WithRules:
    """An owner with the placement rules of one of several workers, which are not stored; see `GroupOwner`."""

    def __init__(self, study: GroupOwner, rules: PlacementRules) -> None:
        self._study = study
        self.rules = rules

    @property
    def identity(self) -> str:
        return self._study.identity

    @property
    def space(self) -> SearchSpace:
        return self._study.space

    def keep_rules(self, rules: PlacementRules) -> None:
        self.rules = rules

    def stored(self, number: int) -> EndedTrial | None:
        return self._study.stored(number)

    def averages(self, epoch: int) -> bool:
        return self._study.averages(epoch)

    def stops(self, epoch: int, running: Mapping[int, Sequence[EpochMetrics]]) -> set[int]:
        return self._study.stops(epoch, running)


@contextlib.contextmanager
def _released(lock: threading.Lock) -> Iterator[None]:
    """Let other threads have a lock until the block ends."""
    lock.release()
    try:
        yield
    finally:
        lock.acquire()
