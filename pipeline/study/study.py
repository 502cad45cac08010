"""The study: Optuna proposes trials, `optuna.db` stores them.

An in-memory Optuna study proposes, since asking for a trial through a database takes hundreds of milliseconds. It is
built for each group from the ended trials. Therefore a group's proposals are a function of the space, the seed and the
trials before the group, and a resumed search proposes the same trials as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from pipeline.errors import StorageError
from pipeline.space.config import TrialConfig
from pipeline.space.placement import PlacementRules
from pipeline.space.pruners import Score
from pipeline.space.search_space import Objective, SearchSpace
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.samplers import build_sampler, distributions

_OPTUNA_STATES = {
    TrialState.COMPLETE: OptunaState.COMPLETE,
    TrialState.PRUNED: OptunaState.PRUNED,
    # TPE ignores FAIL and would propose the same values again; it ranks a pruned trial without a value last.
    TrialState.DIVERGED: OptunaState.PRUNED,
    TrialState.FAILED: OptunaState.FAIL,
}

# Optuna warns of parameters that only some trials have, as is normal with one optimizer per trial.
optuna.logging.set_verbosity(optuna.logging.ERROR)

HEADER = "pipeline"
"""User attribute of an Optuna study that holds the fields of its `StudyHeader`."""
OWN_TRIAL = "history"
"""User attribute that each trial of a search has, with its metrics; other programs' trials lack it."""
NUMBER = "number"
"""User attribute that holds a trial's number in its search; Optuna also counts other programs' trials."""
_GROUP = "pipeline.group."
"""Prefix of the user attributes that hold the groups; the number of the first trial follows."""


@dataclass(frozen=True, kw_only=True)
class AskedGroup:
    """Trials that were proposed together."""

    first: int
    """Number of the first trial."""
    size: int
    """Number of trials."""
    known: int
    """Number of trials, from 0 on, whose results the sampler knew."""


class Study:
    """One study: proposes groups of trials, judges running trials, and stores ended trials.

    Args:
        space: The search space.
        name: Name of the study in the storage.
        identity: Differs from the identity of a study of the same name in a new database.
        group_size: Number of trials that are proposed at a time.
        storage: Storage of the ended trials.
        before_write: Called before each change of the storage; raises if the change would be lost.

    Raises:
        StorageError: Another program has removed or changed a trial.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        name: str,
        identity: str,
        group_size: int,
        storage: RDBStorage,
        before_write: Callable[[], None],
    ) -> None:
        self.space = space
        self.name = name
        self.identity = identity
        self.group_size = group_size
        self._stored = optuna.load_study(study_name=name, storage=storage)
        self._before_write = before_write
        stored = self._stored.get_trials(deepcopy=False)
        self._frozen = _own_trials(stored, study=name)
        self.passed_over = len(stored) - len(self._frozen)
        """Number of trials that other programs have added; they are no part of the search."""
        attrs = self._stored.user_attrs
        with _as_stored(f"study {name}", study=name):
            self.rules = PlacementRules(**attrs[HEADER]["placement"])
            """Rules of the placement of the trials."""
            self._groups = [AskedGroup(**attrs[key]) for key in sorted(attrs) if key.startswith(_GROUP)]
        self.ended: list[EndedTrial] = []
        """Stored trials, in number order."""
        for number, trial in enumerate(self._frozen):
            with _as_stored(f"trial {number} of study {name}", study=name):
                self.ended.append(_from_optuna(number, trial, self.space.objective))

    def next_group(self, trials: int) -> dict[int, tuple[TrialConfig, dict[str, Any]]]:
        """Propose the next group of a search of `trials` trials in total.

        An unfinished group is proposed again, ended trials included, from the results known when it was first proposed.

        Returns:
            Trial number to config and to the parameters that the sampler chose; empty if all trials have ended.

        Raises:
            StorageError: A new group cannot be stored.
        """
        if len(self.ended) >= trials:
            return {}
        group = self._group_of(len(self.ended)) or self._ask_for_group(trials)
        memory = optuna.create_study(direction=self.space.objective.direction)
        memory.add_trials(self._frozen[: group.known])
        proposals = {}
        for number in range(group.first, min(group.first + group.size, trials)):
            memory.sampler = build_sampler(self.space, number)
            if number < len(self.space.enqueue):
                memory.enqueue_trial(dict(self.space.enqueue[number]))
            trial = memory.ask()
            assert trial.number == number
            proposals[number] = (self.space.sample(trial), trial.params)
        return proposals

    @property
    def groups(self) -> list[range]:
        """Numbers of the trials that were proposed together, in order."""
        starts = [group.first for group in self._groups]
        ends = [*starts[1:], self._groups[-1].first + self._groups[-1].size] if self._groups else []
        return [range(first, end) for first, end in zip(starts, ends, strict=True)]

    def keep_rules(self, rules: PlacementRules) -> None:
        """Store the placement rules if they have changed.

        Raises:
            StorageError: The storage cannot be written.
        """
        if rules == self.rules:
            return
        with self._writing("storing the row limit"):
            header = {**self._stored.user_attrs[HEADER], "placement": rules.to_dict()}
            self._stored.set_user_attr(HEADER, header)
        self.rules = rules

    def stops(self, epoch: int, running: Mapping[int, Sequence[EpochMetrics]]) -> set[int]:
        """Return which running trials of a group stop after an epoch, by the pruner's verdict on the whole group.

        Args:
            epoch: Counts from 1.
            running: Trial number to the epochs that the trial has trained.
        """
        asked = self._group_of(min(running))
        assert asked is not None
        group = {number: self.space.objective.score(epochs) for number, epochs in running.items()}
        group |= {n: s for n, s in self._scores_at(epoch, range(asked.first, len(self.ended))) if n not in running}
        earlier = [s for _, s in self._scores_at(epoch, range(asked.known))]
        return self.space.pruner.stops(epoch, group, earlier) & running.keys()

    def add(self, trial: EndedTrial) -> None:
        """Store an ended trial, the next in number order, synced to the disk.

        Raises:
            StorageError: The storage cannot be written.
        """
        assert trial.number == len(self.ended)
        frozen = _to_optuna(trial, self.space)
        with self._writing(f"storing trial {trial.number}"):
            self._stored.add_trial(frozen)
        self._frozen.append(frozen)
        self.ended.append(trial)

    def best(self, count: int = 1) -> list[EndedTrial]:
        """Return the best complete trials, best first: by objective, then validation loss, then number."""
        complete = [trial for trial in self.ended if trial.state is TrialState.COMPLETE]
        return sorted(complete, key=self.space.objective.order)[:count]

    @contextlib.contextmanager
    def _writing(self, doing: str) -> Iterator[None]:
        self._before_write()
        try:
            with storage_errors(doing):
                yield
        except KeyError:  # Optuna's, for a study that is not there
            remedy = "the same command begins the study anew"
            raise StorageError(
                f"{doing}: study {self.name} was removed by another program meanwhile; {remedy}"
            ) from None

    def _group_of(self, number: int) -> AskedGroup | None:
        """Return the group in which a trial was proposed."""
        return next((g for g in self._groups if g.first <= number < g.first + g.size), None)

    def _ask_for_group(self, trials: int) -> AskedGroup:
        """Store and return a new group that begins with the next trial."""
        first = len(self.ended)
        group = AskedGroup(first=first, size=min(self.group_size, trials - first), known=first)
        with self._writing(f"storing the group of trial {first}"):
            self._stored.set_user_attr(f"{_GROUP}{first:06}", dataclasses.asdict(group))
        self._groups.append(group)
        return group

    def _scores_at(self, epoch: int, numbers: Iterable[int]) -> Iterator[tuple[int, Score]]:
        for number in numbers:
            epochs = self.space.objective.measured(self.ended[number].epochs)
            if len(epochs) >= epoch:
                yield number, self.space.objective.score(epochs[:epoch])


def group_size(trials: int) -> int:
    """Return how many of a search's trials are proposed at a time: a quarter, such as 13 of 50, and at most 64.

    A larger group trains faster, since more trials share a matrix, but its sampler knows fewer results. On the digits,
    groups of 13 found in as many trials a loss 6 ± 4 % higher than groups of 8, in three quarters of the time
    (benchmarks/NOTES.md).
    """
    return min(64, -(-trials // 4))


@contextlib.contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn any error of a storage into a StorageError."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise StorageError(f"{doing}: {_root_cause(error)}") from error
    except AssertionError as error:  # an assertion in Optuna's `finally` hides the cause
        raise StorageError(f"{doing}: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return str(error) or type(error).__name__


def _to_optuna(trial: EndedTrial, space: SearchSpace) -> FrozenTrial:
    """Return a trial as Optuna stores it; a diverged trial has no values, so that no sampler ranks its early epochs."""
    finished = [epoch for epoch in trial.epochs if epoch.finished]
    history = [dict(epoch.metrics) for epoch in finished]
    reached = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    frozen = optuna.trial.create_trial(
        state=_OPTUNA_STATES[trial.state],
        value=trial.value,
        params=dict(trial.params),
        distributions={name: d for name, d in distributions(space).items() if name in trial.params},
        intermediate_values={n + 1: space.objective.value(finished[: n + 1]) for n in range(len(finished)) if reached},
        user_attrs={
            NUMBER: trial.number,
            "state": trial.state.value,
            "reason": trial.reason,
            "base_lr": trial.config.optimizer.base_lr,
            "config": trial.config.to_dict(),
            OWN_TRIAL: {name: [values[name] for values in history] for name in (history[0] if history else {})},
            "steps": [epoch.step for epoch in trial.epochs][: len(history)],
            "environment": dict(trial.environment),
        },
    )
    frozen.number = trial.number
    frozen.datetime_start = datetime.datetime.fromtimestamp(trial.started)
    frozen.datetime_complete = datetime.datetime.fromtimestamp(trial.ended)
    return frozen


@contextlib.contextmanager
def _as_stored(what: str, *, study: str) -> Iterator[None]:
    """Turn what happens to values that no search stored into a StorageError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        remedy = f"restore it from a copy, or delete the study: python -m pipeline.search --delete {study}"
        raise StorageError(f"{what} is not as a search stored it: {type(error).__name__} {error}; {remedy}") from error


def _own_trials(stored: Sequence[FrozenTrial], *, study: str) -> list[FrozenTrial]:
    """Return the trials that searches have stored, in number order, without those that other programs have added.

    Optuna numbers the trials of all programs; a search numbers its own, from 0 on without a gap.

    Raises:
        StorageError: A trial is missing.
    """
    own: list[FrozenTrial] = []
    for trial in stored:
        if OWN_TRIAL not in trial.user_attrs:
            continue
        number = trial.user_attrs.get(NUMBER, len(own))  # earlier versions stored no number
        if number > len(own):
            remedy = f"restore it from a copy, or delete the study: python -m pipeline.search --delete {study}"
            raise StorageError(f"trial {len(own)} of study {study} was removed from the database; {remedy}")
        own += [trial] if number == len(own) else []  # a lower number has a copy of a trial
    return own


def _from_optuna(number: int, frozen: FrozenTrial, objective: Objective) -> EndedTrial:
    """Return a stored trial, without the learning rates, which only MLflow records."""
    attrs = frozen.user_attrs
    history = attrs[OWN_TRIAL]
    epochs = [
        EpochMetrics(epoch=epoch, step=step, metrics={name: history[name][epoch - 1] for name in history}, lr={})
        for epoch, step in enumerate(attrs["steps"], 1)
    ]
    assert frozen.datetime_start is not None
    assert frozen.datetime_complete is not None
    return EndedTrial(
        number=number,
        config=TrialConfig.from_dict(attrs["config"]),
        params=frozen.params,
        state=TrialState(attrs["state"]),
        objective=objective,
        reason=attrs["reason"],
        value=frozen.value if frozen.state is OptunaState.COMPLETE else None,
        epochs=tuple(epochs),
        started=frozen.datetime_start.timestamp(),
        ended=frozen.datetime_complete.timestamp(),
        environment=attrs["environment"],
    )
