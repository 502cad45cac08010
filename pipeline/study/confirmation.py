"""Confirmation: the best trials of a search and two baselines, trained again with fresh seeds.

A search returns the luckiest of its trials. Fresh seeds measure a config without that luck, and each seed trains every
candidate on the same order of the data from the same initial weights, so that differences are paired.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.space.config import TrialConfig
from pipeline.space.confirm import BASELINES, Size, fitting, smallest
from pipeline.space.optimizers import SGD, Adam
from pipeline.space.param_groups import ParamGroup
from pipeline.space.placement import PlacementRules
from pipeline.space.pruners import Score
from pipeline.space.schedules import Constant, Step
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.stored_trial import as_stored, epochs_of, plain_epochs
from pipeline.study.study import Study

FIRST_NUMBER = 1_000_000
"""Number of the first run of a confirmation, so that no run has the number of a trial."""
ADAM, SGD_STEP = "Adam's default", "SGD with StepLR"
"""Labels of the baselines."""
_GROUP, _RUN = "pipeline.confirmation.group.", "pipeline.confirmation.run."
"""Prefixes of what is stored with the study; a number follows."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A config that is confirmed."""

    trial: int | None
    """Number of the trial of a finalist; None for a baseline."""
    label: str
    """`#33`, or the name of a baseline."""
    config: TrialConfig
    """With the seed of the search."""

    def with_seed(self, seed: int) -> TrialConfig:
        """Return the config of a run."""
        return dataclasses.replace(self.config, seed=seed)


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

    It is a function of the ended trials and of `space.confirm`; the study stores each group of runs as it begins, and
    each run as it ends. Runs of an earlier confirmation of the same config and seed count again.

    Args:
        study: The study, whose trials have ended.
        size: Number of finalists, baselines and seeds; None: what fits into the share of epochs.
    """

    def __init__(self, study: Study, *, size: Size | None = None) -> None:
        self._study = study
        complete = study.best(len(study.ended))
        searched = sum(len(trial.epochs) for trial in study.ended)
        confirm, epochs = study.space.confirm, study.space.epochs
        self.size = size or fitting(confirm, complete=len(complete), searched=searched, epochs=epochs)
        """Number of finalists, baselines and seeds; None: there is no confirmation."""
        self.reason = ""
        """Why there is no confirmation; empty if there is one."""
        if confirm.share == 0:
            self.size, self.reason = None, "it is turned off"
        elif not complete:
            self.size, self.reason = None, "no trial is complete"
        elif self.size is None:
            runs = smallest(confirm, complete=len(complete)).runs
            self.reason = f"even {runs} runs would be more than {confirm.share:.0%} of all epochs"
        self.seeds = _seeds(study.space.seed, 0 if self.size is None else self.size.seeds)
        """The fresh seeds."""
        self.candidates = _candidates(complete, self.size, study.space)
        with as_stored(f"the confirmation of study {study.name}", study=study.name):
            self._groups = [_group_of(group) for group in study.notes(_GROUP)]
            stored = study.notes(_RUN)
            self._runs = {run.number: run for run in map(self._run_of, stored)}
            self._tests: dict[int, Mapping[str, float]] = {run["number"]: run["test"] for run in stored}

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
        return bool(self.candidates) and not any(self._missing(seed) for seed in self.seeds)

    @property
    def epochs_left(self) -> int:
        """Epochs of the runs that have not ended."""
        return sum(len(self._missing(seed)) for seed in self.seeds) * self.space.epochs

    def next_group(self) -> dict[int, tuple[TrialConfig, dict[str, Any]]]:
        """Return the next group of runs, all of one seed: number to config; empty if every run has ended.

        Raises:
            StorageError: A new group cannot be stored.
        """
        for seed in self.seeds:
            if missing := self._missing(seed):
                wanted = [candidate.with_seed(seed) for candidate in missing]
                asked = (group for group in self._groups if any(config in wanted for config, _ in group.values()))
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
        return {name: statistics.fmean(test[name] for test in tests) for name in tests[0] if all(tests)}

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
        """Return a run that was stored."""
        epochs, state, objective = epochs_of(stored), TrialState(stored["state"]), self.space.objective
        return EndedTrial(
            number=stored["number"],
            config=TrialConfig.from_dict(stored["config"]),
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


def _group_of(stored: Mapping[str, Any]) -> _Group:
    return {int(n): (TrialConfig.from_dict(run["config"]), run["confirms"]) for n, run in stored.items()}


def _seeds(seed: int, count: int) -> tuple[int, ...]:
    """Return the seeds that follow the seed of the search, so that everyone can name them."""
    return tuple((seed + n) % 2**32 for n in range(1, count + 1))


def _candidates(complete: Sequence[EndedTrial], size: Size | None, space: SearchSpace) -> list[Candidate]:
    """Return the candidates, without repetitions of a config."""
    if size is None or not complete:
        return []
    ranked = sorted(complete, key=lambda trial: (space.objective.late_score(trial.epochs), trial.number))
    finalists = (Candidate(trial=t.number, label=f"#{t.number}", config=t.config) for t in _unlike(ranked))
    chosen = list(itertools.islice(finalists, size.finalists))
    known = [candidate.config for candidate in chosen]
    baselines = itertools.islice(_baselines(complete[0].config, space), size.baselines)
    return chosen + [baseline for baseline in baselines if baseline.config not in known]


def _unlike(trials: Sequence[EndedTrial]) -> Iterator[EndedTrial]:
    """Yield trials without those whose config an earlier one has."""
    known: list[TrialConfig] = []
    for trial in trials:
        if trial.config not in known:
            known.append(trial.config)
            yield trial


def _baselines(config: TrialConfig, space: SearchSpace) -> Iterator[Candidate]:
    """Yield the baselines: what people use who do not search.

    Each has the batch size of a config, every group at one rate, and the settings that the space does not search. A
    group that the space freezes stays frozen.
    """
    groups = {
        name: ParamGroup(
            pattern=group.pattern,
            dims=group.dims,
            layers=group.layers,
            lr_ratio=0.0 if space.param_groups[name]["lr_ratio"] == 0 else 1.0,
        )
        for name, group in config.param_groups.items()
    }
    clip = space.settings["clip_grad_norm"]
    same = dataclasses.replace(
        config, param_groups=groups, clip_grad_norm=clip if isinstance(clip, int | float) else None
    )
    third = max(1, -(-config.epochs // 3))
    sgd, step = SGD(base_lr=0.1, momentum=0.9), Step(step_size=third, gamma=0.1)
    strategies = {ADAM: (Adam(base_lr=1e-3), Constant()), SGD_STEP: (sgd, step)}
    assert len(strategies) == BASELINES
    for label, (optimizer, scheduler) in strategies.items():
        baseline = dataclasses.replace(same, optimizer=optimizer, scheduler=scheduler)
        yield Candidate(trial=None, label=label, config=baseline)
