"""The study: Optuna proposes trials, a database stores them.

While one group trains at a time, its proposals are a function of the space, the seed and the trials before the group.
Therefore a resumed search proposes the same trials as an uninterrupted one. With several groups at a time, proposals
and verdicts depend on the order in which trials end; the study stores both, and a resumed search follows them.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from pipeline.errors import StorageError
from pipeline.space.config import TrialConfig
from pipeline.space.placement import PlacementRules
from pipeline.space.pruners import Score
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics, TrialState
from pipeline.study.database import Database
from pipeline.study.samplers import distributions, for_sampler, propose, restore
from pipeline.study.stored_trial import as_stored, from_optuna, own_trials, to_optuna

HEADER = "pipeline"
"""User attribute of an Optuna study that holds the fields of its `StudyHeader`."""
_GROUP, _VERDICTS = "pipeline.group.", "pipeline.verdicts."
"""Prefixes of the user attributes that hold the groups, and their verdicts; the number of the first trial follows."""
GROUPS_PER_WORKER = 2
"""Groups into which each worker's share of the trials that nobody has is divided. Sizes fall towards the end, so that
all workers end at about the same time: Hummel et al. (1992), https://doi.org/10.1145/135226.135232."""


Unlocked = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True)
class AskedGroup:
    """Trials that were proposed together."""

    first: int
    """Number of the first trial."""
    size: int
    """Number of trials."""
    known: int
    """Number of trials, from 0 on, whose results the sampler knew; those of other groups, which trained, are not
    counted."""
    params: Sequence[Mapping[str, Any]] | None = None
    """What the sampler chose for each trial, if other groups trained meanwhile; None: `propose` repeats it."""

    @property
    def numbers(self) -> range:
        """Numbers of the trials."""
        return range(self.first, self.first + self.size)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `AskedGroup(**values)` gives back an equal group."""
        return {name: value for name, value in vars(self).items() if value is not None}


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
        own = own_trials(stored, study=name)
        self._known = [for_sampler(trial) for trial in own]
        """Stored trials as samplers look at them."""
        self.passed_over = len(stored) - len(own)
        """Number of trials that other programs have added; they are no part of the search."""
        with as_stored(f"study {name}", study=name):
            self.rules = PlacementRules(**self._attrs()[HEADER]["placement"])
            """Rules of the placement of the trials."""
            self._groups = [AskedGroup(**group) for group in self.notes(_GROUP)]
            self._verdicts: dict[int, dict[str, list[int]]] = {v["first"]: v["stops"] for v in self.notes(_VERDICTS)}
            """First trial of a group to the verdicts on the group: epoch, as text, to the trials that stopped."""
        self._taken: dict[int, Mapping[int, tuple[TrialConfig, dict[str, Any]]]] = {}
        """First trials of the groups that workers have taken, to the groups' proposals."""
        self._running: dict[int, list[EpochMetrics]] = {}
        """Number of each trial that has begun and is not stored, to its epochs."""
        self._waiting: dict[int, EndedTrial] = {}
        """Ended trials that wait for lower numbers to be stored."""
        self._waiting_known: dict[int, FrozenTrial] = {}
        """The same as samplers look at them, as far as one has."""
        self.ended: list[EndedTrial] = []
        """Stored trials, in number order."""
        self.states = Counter[TrialState]()
        """State to the number of stored trials."""
        self._ranking: list[EndedTrial] = []
        self._scored: dict[int, tuple[int, list[tuple[int, Score]]]] = {}
        """Epoch to the number of trials that were looked at, and the scores of those that were measured."""
        self._distributions = distributions(space)
        for number, trial in enumerate(own):
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
        return self._proposed(self._group_of(len(self.ended)) or self._ask_for_group(trials), trials)

    def take_group(
        self, trials: int, *, workers: int, unlocked: Unlocked = contextlib.nullcontext
    ) -> dict[int, tuple[TrialConfig, dict[str, Any]]]:
        """Propose a group that no worker has taken: one that was proposed before and is unfinished, else a new one.

        The sampler knows every ended trial, stored or not, and which trials are running.

        Args:
            trials: Number of trials of the search in total.
            workers: Number of groups that train at a time.
            unlocked: Entered while the sampler proposes, which takes long and uses a copy of what is known: other
                threads may call every other method meanwhile.

        Returns:
            As `next_group`; empty if workers have taken all trials.

        Raises:
            StorageError: A new group cannot be stored.
        """
        group = self._not_taken(trials)
        if group is None and self._asked < trials:
            group = self._ask_for_group(trials, workers=workers, unlocked=unlocked)
        if group is None:
            return {}
        self._taken[group.first] = proposals = self._proposed(group, trials)
        return proposals

    def has_group(self, trials: int) -> bool:
        """Return whether `take_group` would return a group."""
        return self._asked < trials or self._not_taken(trials) is not None

    @property
    def groups(self) -> list[range]:
        """Numbers of the trials that were proposed together, in order."""
        starts = [group.first for group in self._groups]
        ends = [*starts[1:], self._groups[-1].first + self._groups[-1].size] if self._groups else []
        return [range(first, end) for first, end in zip(starts, ends, strict=True)]

    def is_recorded(self, number: int) -> bool:
        """Return whether the group of a trial was proposed while other groups trained, so that the study stores it."""
        group = self._group_of(number)
        return group is not None and group.params is not None

    def begin(self, trial: BegunTrial) -> None:
        """Take a trial that begins or goes on, which samplers and pruners may count from now on."""
        self._running[trial.number] = list(trial.epochs)

    def epoch(self, metrics: Mapping[int, EpochMetrics]) -> None:
        """Take an epoch of trials that have begun."""
        for number, epoch in metrics.items():
            self._running[number].append(epoch)

    def end(self, trial: EndedTrial) -> None:
        """Take a trial that has ended; `add` or `add_in_order` stores the trial."""
        self._waiting[trial.number] = trial

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

        A trial that the space enqueues trains to its end, since a person wants to know its result.

        Args:
            epoch: Counts from 1.
            running: Trial number to the epochs that the trial has trained.
        """
        asked = self._group_of(min(running))
        assert asked is not None
        group = {number: self.space.objective.rung_score(epochs) for number, epochs in running.items()}
        may_stop = {number for number in running if number >= len(self.space.enqueue)}
        if asked.params is not None:
            return self._stops_among_all(asked, epoch, group) & may_stop
        scores = self._scores_after(epoch)
        group |= {number: score for number, score in scores if number >= asked.first and number not in running}
        earlier = [score for number, score in scores if number < asked.known]
        return self.space.pruner.stops(epoch, group, earlier) & may_stop

    def add(self, *trials: EndedTrial) -> None:
        """Store ended trials, the next in number order: all of them or none, synced to the disk.

        Raises:
            StorageError: The storage cannot be written.
        """
        first = len(self.ended)
        assert [trial.number for trial in trials] == list(range(first, first + len(trials)))
        frozen = [self._as_optuna(trial) for trial in trials]
        self._write(
            f"storing trial {first}" if len(trials) == 1 else f"storing trials {first} to {first + len(trials) - 1}",
            lambda: self._database.add_trials(self._stored._study_id, frozen),
            arrived=lambda: self._have_arrived(first),
        )
        self._known += map(for_sampler, frozen)
        for trial in trials:
            self._take(trial)
            self._running.pop(trial.number, None)
            self._waiting.pop(trial.number, None)
            self._waiting_known.pop(trial.number, None)

    def add_in_order(self, *trials: EndedTrial) -> None:
        """Store ended trials, and those that waited for them; keep the trials that wait for lower numbers.

        Raises:
            StorageError: The storage cannot be written.
        """
        self._waiting |= {trial.number: trial for trial in trials}
        ready = list(itertools.takewhile(self._waiting.__contains__, itertools.count(len(self.ended))))
        if ready:
            self.add(*(self._waiting[number] for number in ready))

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

    def _as_optuna(self, trial: EndedTrial) -> FrozenTrial:
        return to_optuna(trial, self.space.objective, self._distributions)

    def _have_arrived(self, number: int) -> bool:
        """Return whether the next trials are stored already, after a connection that broke as they were stored.

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

    def _not_taken(self, trials: int) -> AskedGroup | None:
        """Return the first unfinished group that no worker has taken."""
        begun = [g for g in self._groups if g.numbers.stop > len(self.ended) and g.first < trials]
        return next((group for group in begun if group.first not in self._taken), None)

    @property
    def _asked(self) -> int:
        """Number of trials that were proposed."""
        return max(len(self.ended), self._groups[-1].numbers.stop if self._groups else 0)

    def _proposed(self, group: AskedGroup, trials: int) -> dict[int, tuple[TrialConfig, dict[str, Any]]]:
        """Return the proposals of a group, as far as a search of `trials` trials needs them."""
        size = min(group.size, trials - group.first)
        if group.params is not None:
            return restore(self.space, group.params[:size], first=group.first)
        return propose(self.space, self._known[: group.known], first=group.first, size=size)

    def _ask_for_group(
        self, trials: int, *, workers: int = 1, unlocked: Unlocked = contextlib.nullcontext
    ) -> AskedGroup:
        """Store and return a new group that begins with the next trial."""
        first, known = self._asked, len(self.ended)
        size, params = min(self.group_size, trials - first), None
        if workers > 1:
            size = min(size, -(-(trials - first) // (GROUPS_PER_WORKER * workers)))
            params = [params for _, params in self._propose_beside(first, size, unlocked).values()]
        group = AskedGroup(first=first, size=size, known=known, params=params)
        self.note(f"{_GROUP}{first:06}", group.to_dict(), doing=f"storing the group of trial {first}")
        self._groups.append(group)
        return group

    def _propose_beside(
        self, first: int, size: int, unlocked: Unlocked
    ) -> dict[int, tuple[TrialConfig, dict[str, Any]]]:
        """Propose trials while others train: what the sampler knows depends on which trials have ended by now."""
        for number in self._waiting.keys() - self._waiting_known.keys():
            self._waiting_known[number] = for_sampler(self._as_optuna(self._waiting[number]))
        ended = [trial for _, trial in sorted(self._waiting_known.items())]
        taken = sorted((n, params) for group in self._taken.values() for n, (_, params) in group.items())
        running = [params for n, params in taken if n >= len(self.ended) and n not in self._waiting]
        known = [*self._known, *ended]
        with unlocked():
            return propose(self.space, known, first=first, size=size, running=running)

    def _stops_among_all(self, asked: AskedGroup, epoch: int, group: Mapping[int, Score]) -> set[int]:
        """Return which trials of a group stop, compared with all that have been measured after the epoch by now.

        The verdict is stored, since it depends on how far the other groups are; a resumed search follows it.
        """
        if not self.space.pruner.compares(epoch):
            return set()
        verdicts = self._verdicts.setdefault(asked.first, {})
        if (stops := verdicts.get(str(epoch))) is None:
            others = [score for _, score in self._scores_after(epoch)]
            for number in self._running.keys() - group.keys():
                epochs = self.space.objective.measured(self._running[number])
                others += [self.space.objective.rung_score(epochs[:epoch])] if len(epochs) >= epoch else []
            stops = verdicts[str(epoch)] = sorted(self.space.pruner.stops(epoch, group, others))
            content = {"first": asked.first, "stops": verdicts}
            self.note(f"{_VERDICTS}{asked.first:06}", content, doing=f"storing which trials stop after epoch {epoch}")
        return group.keys() & set(stops)

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

A larger group trains faster, since more trials share a matrix; its sampler knows fewer results. Measured
(benchmarks/NOTES.md): on an H200, 32 small networks train at 59 to 89 % of the rate of 64.
"""


def group_size(space: SearchSpace, rules: PlacementRules) -> int:
    """Return how many trials are proposed at a time: as the space says, else by what trains at a time on the device."""
    if space.sampler.group_size is not None:
        return space.sampler.group_size
    plain = bool(rules.plain_because) and all(why is not None for why in rules.plain_because.values())
    device = "cpu" if plain else rules.device  # a matrix fills a device, trials one after another do not
    return max(GROUP_SIZES.get(device, GROUP_SIZES["cpu"]), rules.processes)
