"""Confirmation: the best trials of a search and two baselines, trained again with fresh seeds.

A search returns the luckiest of its trials. Fresh seeds measure a config without that luck, and each seed trains every
candidate on the same order of the data from the same initial weights, so that differences are paired.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.space.config import TrialConfig
from pipeline.space.placement import PlacementRules, from_run_lengths
from pipeline.space.pruners import Score
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.candidates import Candidate, Plan, is_label
from pipeline.study.stored_trial import as_stored, epochs_of, plain_epochs
from pipeline.study.study import Study

FIRST_NUMBER = 1_000_000
"""Number of the first run of a confirmation, so that no run has the number of a trial."""
_GROUP, _RUN = "pipeline.confirmation.group.", "pipeline.confirmation.run."
"""Prefixes of what is stored with the study; a number follows."""
_COMPLETE = "pipeline.confirmation.complete"
"""Name of the stored plan of the last confirmation that was complete."""


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """A candidate and its runs."""

    candidate: Candidate
    runs: Mapping[int, EndedTrial]
    """Seed to the run that has ended."""
    values: Mapping[int, float]
    """Seed to the objective, of the complete runs."""
    mean: float | None
    """Mean objective over all seeds; None unless the run of every seed is complete."""
    std: float | None
    """Standard deviation of the objective over seeds, with one degree of freedom less than seeds."""
    order: tuple[Score, int] | None
    """What sorts candidates, best first: mean objective, then mean validation loss, then place; None without a mean."""


class Confirmation:
    """The confirmation of a study: which runs it has, which it lacks, and who wins.

    The study stores each group of runs as it begins, each run as it ends, and the plan of the last confirmation that
    was complete. Runs of an earlier confirmation of the same config and seed count again.

    Args:
        study: The study, whose trials have ended.
        plan: What to train. Candidates of the last complete confirmation that have a run with every seed are added:
            what is known of them counts.
    """

    def __init__(self, study: Study, plan: Plan) -> None:
        self._study = study
        self.seeds = plan.seeds
        """The fresh seeds."""
        self.trials = plan.trials
        """Number of ended trials that the candidates were chosen from."""
        self.reason = plan.reason
        """Why there is no candidate; empty if there is one."""
        self.candidates = list(plan.candidates)
        with as_stored(f"the confirmation of study {study.name}", study=study.name):
            self._groups = [_group_of(group) for group in study.notes(_GROUP)]
            stored = study.notes(_RUN)
            self._runs = {run.number: run for run in map(self._run_of, stored)}
            self._tests: dict[int, Mapping[str, float]] = {
                run["number"]: _checked_scores(run["test"]) for run in stored
            }
            if len(self._runs) < len(stored):
                raise ValueError("two runs have one number")
            known = [candidate for last in study.notes(_COMPLETE) for candidate in Plan.from_dict(last).candidates]
            for candidate in known:
                if candidate.trial is not None and study.ended[candidate.trial].config != candidate.config:
                    raise ValueError(f"{candidate.label} is confirmed with another config")
        if self.candidates:
            self.candidates += [c for c in known if c not in self.candidates and self._has_every_seed(c)]

    @classmethod
    def last(cls, study: Study) -> Confirmation | None:
        """Return the last confirmation of a study that was complete; None if there is none."""
        with as_stored(f"the confirmation of study {study.name}", study=study.name):
            plans = [Plan.from_dict(stored) for stored in study.notes(_COMPLETE)]
        return cls(study, plans[0]) if plans else None

    @property
    def identity(self) -> str:
        """What differs from the identity of every study and of every other confirmation."""
        return f"{self._study.identity} confirmation"

    @property
    def space(self) -> SearchSpace:
        """The search space."""
        return self._study.space

    @property
    def rules(self) -> PlacementRules:
        """The rules of placement that the study stores."""
        return self._study.rules

    def keep_rules(self, rules: PlacementRules) -> None:
        """Store the placement rules if they have changed."""
        self._study.keep_rules(rules)

    def stored(self, number: int) -> EndedTrial | None:
        """Return a run that has ended; None if it has not."""
        return self._runs.get(number)

    def averages(self, epoch: int) -> bool:
        """Return False, since no runs are ranked before their ends."""
        return False

    def stops(self, epoch: int, running: Mapping[int, Sequence[EpochMetrics]]) -> set[int]:
        """Return no run: every run trains to its end."""
        return set()

    @property
    def runs(self) -> list[EndedTrial]:
        """Every run that has ended, in number order, those of earlier confirmations included."""
        return [self._runs[number] for number in sorted(self._runs)]

    @property
    def complete(self) -> bool:
        """Whether every run has ended; False if there is no confirmation."""
        return bool(self.candidates) and not self.lacks()

    @property
    def epochs_left(self) -> int:
        """Epochs of the runs that have not ended."""
        return sum(len(self._missing(seed)) for seed in self.seeds) * self.space.epochs

    def lacks(self, *, but: Collection[int] = ()) -> bool:
        """Return whether a run has not ended, of other seeds than some."""
        return any(self._missing(seed) for seed in self.seeds if seed not in but)

    def next_group(self, *, but: Collection[int] = ()) -> dict[int, tuple[TrialConfig, dict[str, Any]]]:
        """Return the next group of runs, all of one seed: number to config; empty if every run has ended.

        Args:
            but: Seeds whose runs train already.

        Raises:
            StorageError: A new group cannot be stored.
        """
        for seed in self.seeds:
            if seed not in but and (missing := self._missing(seed)):
                wanted = [candidate.with_seed(seed) for candidate in missing]
                every = [candidate.with_seed(seed) for candidate in self.candidates]
                asked = (
                    group
                    for group in self._groups
                    if any(config in wanted for config, _ in group.values())
                    and all(config in every for config, _ in group.values())
                )
                group = next(asked, None) or self._ask_for_group(missing, seed)
                return {number: (config, {}) for number, (config, _) in group.items()}
        return {}

    def marked(self, trial: Any) -> Any:
        """Return a begun or ended run with what it confirms."""
        label = next(group[trial.number][1] for group in self._groups if trial.number in group)
        return dataclasses.replace(trial, confirms=label)

    def add(self, run: EndedTrial, *, test: Mapping[str, float]) -> None:
        """Store a run that has ended, synced to the disk.

        Args:
            run: The run.
            test: Its test metrics; only those of the winner are shown.

        Raises:
            StorageError: The storage cannot be written.
        """
        content = {
            "number": run.number,
            "confirms": run.confirms,
            "config": run.config.to_dict(),
            "state": run.state.value,
            "reason": run.reason,
            **plain_epochs(run.epochs),
            "started": run.started,
            "ended": run.ended,
            "environment": dict(run.environment),
            "test": dict(test),
        }
        self._study.note(f"{_RUN}{run.number:07}", content, doing=f"storing a run that confirms {run.confirms}")
        self._runs[run.number], self._tests[run.number] = run, test
        self.__dict__.pop("table", None)

    def keep(self) -> None:
        """Store that this confirmation is complete, so that it stays the answer until another one is.

        Raises:
            StorageError: The storage cannot be written.
        """
        kept = Plan(trials=self.trials, seeds=self.seeds, candidates=tuple(self.candidates)).to_dict()
        if self._study.notes(_COMPLETE) != [kept]:
            self._study.note(_COMPLETE, kept, doing="storing that the confirmation is complete")

    @cached_property
    def table(self) -> list[Confirmed]:
        """The candidates with their runs, best first; those without a mean stand last."""
        found = [self._confirmed(place, candidate) for place, candidate in enumerate(self.candidates)]
        return sorted(found, key=lambda confirmed: confirmed.order or ((float("inf"), 0.0), 0))

    @property
    def winner(self) -> Confirmed | None:
        """The candidate with the best mean; None until every run has ended, or if no candidate has a mean."""
        return self.table[0] if self.complete and self.table[0].mean is not None else None

    def test(self) -> dict[str, float]:
        """Return the mean test metrics of the winner; empty without a winner or a test split."""
        if self.winner is None:
            return {}
        tests = [self._tests[run.number] for run in self.winner.runs.values()]
        names = [name for name in tests[0] if all(name in test for test in tests)]
        return {name: statistics.fmean(test[name] for test in tests) for name in names}

    def _has_every_seed(self, candidate: Candidate) -> bool:
        ended = [run.config for run in self._runs.values()]
        return all(candidate.with_seed(seed) in ended for seed in self.seeds)

    def _missing(self, seed: int) -> list[Candidate]:
        """Return the candidates whose run with a seed has not ended."""
        ended = [run.config for run in self._runs.values() if run.config.seed == seed]
        return [candidate for candidate in self.candidates if candidate.with_seed(seed) not in ended]

    def _ask_for_group(self, candidates: Sequence[Candidate], seed: int) -> _Group:
        """Store and return a new group of runs."""
        first = max((number + 1 for group in self._groups for number in group), default=FIRST_NUMBER)
        group = {first + n: (c.with_seed(seed), c.label) for n, c in enumerate(candidates)}
        content = {
            str(number): {"config": config.to_dict(), "confirms": label} for number, (config, label) in group.items()
        }
        self._study.note(f"{_GROUP}{first:07}", content, doing=f"storing the runs of seed {seed}")
        self._groups.append(group)
        return group

    def _run_of(self, stored: Mapping[str, Any]) -> EndedTrial:
        """Return a run that was stored; it must be as its group says."""
        epochs, state, objective = epochs_of(stored), TrialState(stored["state"]), self.space.objective
        number, config = stored["number"], TrialConfig.from_dict(stored["config"])
        group = next((group for group in self._groups if number in group), {})
        if group.get(number) != (config, stored["confirms"]):
            raise ValueError(f"run {number!r} is not as it was begun")
        for epoch in epochs:
            _checked_scores(epoch.metrics)
        from_run_lengths(stored["environment"]["placement"])
        datetime.datetime.fromtimestamp(stored["started"])
        datetime.datetime.fromtimestamp(stored["ended"])
        return EndedTrial(
            number=number,
            config=config,
            params={},
            state=state,
            objective=objective,
            reason=stored["reason"],
            value=objective.value(epochs) if state is TrialState.COMPLETE else None,
            epochs=epochs,
            started=stored["started"],
            ended=stored["ended"],
            environment=stored["environment"],
            confirms=stored["confirms"],
        )

    def _confirmed(self, place: int, candidate: Candidate) -> Confirmed:
        wanted = {seed: candidate.with_seed(seed) for seed in self.seeds}
        runs = {seed: run for seed, config in wanted.items() for run in self._runs.values() if run.config == config}
        values = {seed: run.value for seed, run in runs.items() if run.value is not None}
        if len(values) < len(self.seeds):
            return Confirmed(candidate=candidate, runs=runs, values=values, mean=None, std=None, order=None)
        scores = [self.space.objective.score(run.epochs) for run in runs.values()]
        value, loss = (statistics.fmean(part) for part in zip(*scores, strict=True))
        return Confirmed(
            candidate=candidate,
            runs=runs,
            values=values,
            mean=statistics.fmean(values.values()),
            std=statistics.stdev(values.values()),
            order=((value, loss), place),
        )


_Group = dict[int, tuple[TrialConfig, str]]
"""Number of a run to its config and to what it confirms."""


def _checked_scores(stored: Any) -> dict[str, float]:
    """Return metrics that were stored, which must be finite.

    Raises:
        ValueError: They are not.
    """
    if not all(type(value) in (int, float) and math.isfinite(value) for value in stored.values()):
        raise ValueError(f"metrics {stored!r:.200}")
    return dict(stored)


def _group_of(stored: Mapping[str, Any]) -> _Group:
    if not all(is_label(run["confirms"]) for run in stored.values()):
        raise ValueError("a run confirms something else than a trial or a baseline")
    return {int(n): (TrialConfig.from_dict(run["config"]), run["confirms"]) for n, run in stored.items()}
