"""What a search has found out: the best of each optimizer and schedule at the same epoch; what diverged, and why."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.page.results import StudyResults, passes
from pipeline.page.sentence import rate_text
from pipeline.space.distributions import Range
from pipeline.space.pruners import Score
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import EndedTrial, TrialState

ENOUGH = 3
"""Trials of an optimizer that must pass the first rung before its best says something of the optimizer."""
AT_BOUND = 0.05
"""Part of a range of rates that counts as its bound."""
MAX_EPOCHS = 4
"""Most epochs at which the best are compared."""

Kind = Literal["optimizer", "scheduler"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The best of one optimizer or schedule after an epoch."""

    trial: EndedTrial
    value: float
    score: Score
    left: int
    """Number of its trials that trained for so long."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One optimizer or schedule, at several epochs."""

    name: str
    trials: int
    standings: Sequence[Standing | None]
    """The best after each of the compared epochs; None where no trial was left."""
    cautions: Sequence[str]
    """Why its best may say little of it."""

    @property
    def last(self) -> int:
        """How many of the compared epochs some trial reached."""
        return sum(standing is not None for standing in self.standings)


def compared_epochs(results: StudyResults) -> list[int]:
    """Return the epochs at which the best are compared: the rungs, of many the most selective, and the last."""
    pruned = Counter(len(t.epochs) for t in results.trials if t.state is TrialState.PRUNED)
    rungs = [epoch for epoch, _ in pruned.most_common() if epoch < results.space.epochs][: MAX_EPOCHS - 1]
    return sorted({*rungs, results.space.epochs})


def contenders(results: StudyResults, kind: Kind) -> list[Contender]:
    """Return every optimizer, or schedule, of the space, best first; the last compared epoch counts first."""
    epochs = compared_epochs(results)
    names = results.space.optimizers if kind == "optimizer" else results.space.schedulers
    found = [_contender(results, kind, name, epochs) for name in names]

    def order(contender: Contender) -> list[tuple[float, ...]]:
        scores = [None if s is None else s.score for s in reversed(contender.standings)]
        return [(math.inf,) if score is None else score for score in scores]

    return sorted(found, key=order)


def _contender(results: StudyResults, kind: Kind, name: str, epochs: Sequence[int]) -> Contender:
    trials = [trial for trial in results.trials if name_of(trial, kind) == name]
    standings = [_standing(results, trials, epoch) for epoch in epochs]
    known = [standing for standing in standings if standing is not None]
    first = results.first_rung
    passed = sum(results.value_at(trial, first) is not None and passes(trial, first) for trial in trials)
    cautions = []
    if not trials:
        cautions.append("never tried")
    elif passed < ENOUGH:
        few = f"only {passed}" if passed else "none"
        cautions.append(
            f"{few} of {len(trials)} got past epoch {first}" if results.rungs else f"{few} of {len(trials)} complete"
        )
    if known and (bound := at_bound(known[-1].trial, results.space)):
        best = known[-1].trial
        cautions.append(f"its best, #{best.number}, has a rate at the {bound} bound: {_rate(best)}")
    return Contender(name=name, trials=len(trials), standings=standings, cautions=cautions)


def _rate(trial: EndedTrial) -> str:
    return rate_text(trial.config.optimizer.base_lr)


def name_of(trial: EndedTrial, kind: Kind) -> str:
    """Return the name of a trial's optimizer or schedule in a file."""
    return trial.config.optimizer.name if kind == "optimizer" else trial.config.scheduler.name


def _standing(results: StudyResults, trials: Sequence[EndedTrial], epoch: int) -> Standing | None:
    reached = [trial for trial in trials if results.value_at(trial, epoch) is not None]
    if not reached:
        return None
    objective = results.space.objective
    ends = [(objective.measured(trial.epochs)[:epoch], trial) for trial in reached]
    epochs, trial = min(ends, key=lambda end: (objective.score(end[0]), end[1].number))
    return Standing(trial=trial, value=objective.value(epochs), score=objective.score(epochs), left=len(reached))


def at_bound(trial: EndedTrial, space: SearchSpace) -> Literal["lower", "upper"] | None:
    """Return the bound of its range at which a trial's base rate lies; None for a rate inside, or without a range."""
    domain = space.optimizers[trial.config.optimizer.name]["base_lr"]
    if not isinstance(domain, Range) or not domain.low < domain.high:
        return None
    low, high, rate = float(domain.low), float(domain.high), trial.config.optimizer.base_lr
    if domain.log:
        low, high, rate = math.log(low), math.log(high), math.log(rate)
    place = (rate - low) / (high - low)
    return "lower" if place <= AT_BOUND else "upper" if place >= 1 - AT_BOUND else None


def mishaps(results: StudyResults) -> list[tuple[str, list[EndedTrial]]]:
    """Return why trials diverged or failed, each with its trials, the most frequent first.

    Reasons that differ in nothing but the step or the epoch are one; the reason shown is the first trial's.
    """
    by_kind: dict[str, list[EndedTrial]] = defaultdict(list)
    for trial in results.trials:
        if trial.state in (TrialState.DIVERGED, TrialState.FAILED):
            kind = "".join(char for char in trial.reason or "" if not char.isdigit())
            by_kind[f"{trial.state}{kind}"].append(trial)
    groups = sorted(by_kind.values(), key=lambda trials: -len(trials))
    return [((trials[0].reason or "").strip().split("\n")[0], trials) for trials in groups]


def diverged_from(results: StudyResults, optimizer: str) -> tuple[float, int, int] | None:
    """Return the lowest base rate at which an optimizer's trials diverged, and how many from that rate on did.

    Returns:
        The rate, the number of trials that diverged, and the number of trials with at least that rate.
    """
    own = [trial for trial in results.trials if trial.config.optimizer.name == optimizer]
    rates = [trial.config.optimizer.base_lr for trial in own if trial.state is TrialState.DIVERGED]
    if not rates:
        return None
    return min(rates), len(rates), sum(trial.config.optimizer.base_lr >= min(rates) for trial in own)
