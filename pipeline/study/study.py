"""The study: Optuna proposes trials, a database stores them.

A group's proposals are a function of the space, the seed and the trials before the group. Therefore a resumed search
proposes the same trials as an uninterrupted one.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from pipeline.errors import StorageError
from pipeline.space.config import TrialConfig
from pipeline.space.placement import PlacementRules
from pipeline.space.pruners import Score
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.database import Database
from pipeline.study.samplers import propose
from pipeline.study.stored_trial import as_stored, from_optuna, own_trials, to_optuna

HEADER = "pipeline"
"""User attribute of an Optuna study that holds the fields of its `StudyHeader`."""
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
        planned: Total number of trials that was last asked for.
        group_size: Number of trials that are proposed at a time.
        database: Holds the ended trials.

    Raises:
        StorageError: Another program has removed or changed a trial.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        name: str,
        identity: str,
        planned: int,
        group_size: int,
        database: Database,
    ) -> None:
        self.space = space
        self.name = name
        self.identity = identity
        self.planned = planned
        self.group_size = group_size
        self._database = database
        self._stored = optuna.load_study(study_name=name, storage=database.storage())
        stored = self._stored.get_trials(deepcopy=False)
        self._frozen = own_trials(stored, study=name)
        self.passed_over = len(stored) - len(self._frozen)
        """Number of trials that other programs have added; they are no part of the search."""
        with as_stored(f"study {name}", study=name):
            self.rules = PlacementRules(**self._attrs()[HEADER]["placement"])
            """Rules of the placement of the trials."""
            self._groups = [AskedGroup(**group) for group in self.notes(_GROUP)]
        self.ended: list[EndedTrial] = []
        """Stored trials, in number order."""
        self.states = Counter[TrialState]()
        """State to the number of stored trials."""
        self._ranking: list[EndedTrial] = []
        self._scored: dict[int, tuple[int, list[tuple[int, Score]]]] = {}
        """Epoch to the number of trials that were looked at, and the scores of those that were measured."""
        for number, trial in enumerate(self._frozen):
            with as_stored(f"trial {number} of study {name}", study=name):
                self._take(from_optuna(number, trial, self.space.objective))

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
        size = min(group.size, trials - group.first)
        return propose(self.space, self._frozen[: group.known], first=group.first, size=size)

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
        header = {**self._attrs()[HEADER], "placement": rules.to_dict()}
        self.note(HEADER, header, doing="storing the row limit")
        self.rules = rules

    def averages(self, epoch: int) -> bool:
        """Return whether the pruner ranks trials by averaged weights after an epoch."""
        return self.space.pruner.averages(epoch)

    def stops(self, epoch: int, running: Mapping[int, Sequence[EpochMetrics]]) -> set[int]:
        """Return which running trials of a group stop after an epoch, by the pruner's verdict on the whole group.

        Args:
            epoch: Counts from 1.
            running: Trial number to the epochs that the trial has trained.
        """
        asked = self._group_of(min(running))
        assert asked is not None
        group = {number: self.space.objective.rung_score(epochs) for number, epochs in running.items()}
        scores = self._scores_after(epoch)
        group |= {number: score for number, score in scores if number >= asked.first and number not in running}
        earlier = [score for number, score in scores if number < asked.known]
        return self.space.pruner.stops(epoch, group, earlier) & running.keys()

    def add(self, trial: EndedTrial) -> None:
        """Store an ended trial, the next in number order, synced to the disk.

        Raises:
            StorageError: The storage cannot be written.
        """
        assert trial.number == len(self.ended)
        frozen = to_optuna(trial, self.space)
        self._write(
            f"storing trial {trial.number}",
            lambda: self._stored.add_trial(frozen),
            arrived=lambda: self._has_arrived(trial.number),
        )
        self._frozen.append(frozen)
        self._take(trial)

    def stored(self, number: int) -> EndedTrial | None:
        """Return a trial that has ended; None if it has not."""
        return self.ended[number] if number < len(self.ended) else None

    def notes(self, prefix: str) -> list[Any]:
        """Return the values that `note` stored under names with a prefix, in the order of the names."""
        attrs = self._attrs()
        return [attrs[key] for key in sorted(attrs) if key.startswith(prefix)]

    def note(self, name: str, value: Any, *, doing: str) -> None:
        """Store a plain value with the study, synced to the disk.

        Raises:
            StorageError: The storage cannot be written; the message begins with `doing`.
        """
        self._write(doing, lambda: self._stored.set_user_attr(name, value))

    def finish(self, *, confirmed: bool) -> None:
        """Store that nothing is left to do with these trials.

        Args:
            confirmed: Whether the confirmation, if there can be one, is complete; not if it was turned off.

        Raises:
            StorageError: The storage cannot be written.
        """
        ended = len(self.ended)
        done = {"finished": ended, **({"confirmed": ended} if confirmed else {})}
        stored = self._attrs()[HEADER]
        if stored != {**stored, **done}:
            self.note(HEADER, {**stored, **done}, doing="storing that the search is finished")

    def best(self, count: int = 1) -> list[EndedTrial]:
        """Return the best complete trials, best first: by objective, then validation loss, then number."""
        return self._ranking[:count]

    def _take(self, trial: EndedTrial) -> None:
        """Add a stored trial to the states and to the ranking, which is kept, since displays ask for the best often."""
        self.ended.append(trial)
        self.states[trial.state] += 1
        if trial.state is TrialState.COMPLETE:
            bisect.insort(self._ranking, trial, key=self.space.objective.order)

    def _attrs(self) -> dict[str, Any]:
        """Return what is stored with the study."""
        return self._database.attempt(lambda: self._stored.user_attrs)

    def _write(self, doing: str, action: Callable[[], object], *, arrived: Callable[[], bool] | None = None) -> None:
        try:
            self._database.write(doing, action, arrived=arrived)
        except KeyError:  # Optuna's, for a study that is not there
            remedy = "the same command begins the study anew"
            raise StorageError(
                f"{doing}: study {self.name} was removed by another program meanwhile; {remedy}"
            ) from None

    def _has_arrived(self, number: int) -> bool:
        """Return whether the next trial is stored already, after a connection that broke as it was stored.

        Raises:
            StorageError: Earlier trials are missing, such as in a server that was put back to an earlier state.
        """
        stored = self._database.count_trials().get(self.name, 0)
        if stored < number:
            message = f"the database came back with {stored} of the {number} trials that it had stored"
            raise StorageError(f"{message}; restore them, or have the search go on from trial {stored}")
        return stored > number

    def _group_of(self, number: int) -> AskedGroup | None:
        """Return the group in which a trial was proposed."""
        return next((g for g in self._groups if g.first <= number < g.first + g.size), None)

    def _ask_for_group(self, trials: int) -> AskedGroup:
        """Store and return a new group that begins with the next trial."""
        first = len(self.ended)
        group = AskedGroup(first=first, size=min(self.group_size, trials - first), known=first)
        self.note(f"{_GROUP}{first:06}", dataclasses.asdict(group), doing=f"storing the group of trial {first}")
        self._groups.append(group)
        return group

    def _scores_after(self, epoch: int) -> list[tuple[int, Score]]:
        """Return number and score, after an epoch, of each stored trial that was measured in so many epochs."""
        scored, scores = self._scored.get(epoch, (0, []))
        for trial in self.ended[scored:]:  # the others are known, since a stored trial does not change
            epochs = self.space.objective.measured(trial.epochs)
            if len(epochs) >= epoch:
                scores.append((trial.number, self.space.objective.rung_score(epochs[:epoch])))
        self._scored[epoch] = len(self.ended), scores
        return scores


GROUP_SIZES = {"cpu": 8, "cuda": 25}
"""Kind of device to the number of trials that are proposed at a time; of other kinds, as on a CPU.

A larger group trains faster, since more trials share a matrix; its sampler knows fewer results. Measured on a CPU
(benchmarks/NOTES.md); on CUDA a guess.
"""


def group_size(space: SearchSpace, rules: PlacementRules) -> int:
    """Return how many trials are proposed at a time: as the space says, else by what trains at a time on the device."""
    if space.sampler.group_size is not None:
        return space.sampler.group_size
    plain = bool(rules.plain_because) and all(why is not None for why in rules.plain_because.values())
    device = "cpu" if plain else rules.device  # a matrix fills a device, trials one after another do not
    return max(GROUP_SIZES.get(device, GROUP_SIZES["cpu"]), rules.processes)
