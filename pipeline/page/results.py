"""StudyResults: everything that a report says, as a value; and what follows from it at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.page.confirmed import Confirmed, ConfirmedStrategy
from pipeline.space.config import TrialConfig
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import EndedTrial, TrialState


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How much each hyperparameter decided, and how it was computed."""

    shares: Mapping[str, float]
    """Optuna's parameter name to its share; the shares add up to 1."""
    epoch: int
    """The epoch after which trials were compared."""


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """A study with all that its report needs."""

    name: str
    space: SearchSpace
    trials: Sequence[EndedTrial]
    """Ended trials, in number order."""
    planned: int
    """Number of trials that the search was asked for."""
    groups: Sequence[range] = ()
    """Numbers of the trials that were proposed together."""
    val_samples: int | None = None
    """Number of validation samples; None if it is not known."""
    with_rates: Sequence[EndedTrial] = ()
    """Trials, or runs, whose epochs have learning rates, the winner first."""
    importance: Importance | None = None
    """None if there are too few trials."""
    confirmed: Confirmed | None = None
    """None if nothing was trained again."""
    code: str | None = None
    """The winner as code for a script of the reader's own; None leaves the section out."""
    options: str = ""
    """Options that every command needs, such as ` --root DIR`."""
    confirm_command: str = ""
    """The whole command, or call, that confirms this study; empty leaves it out."""

    @cached_property
    def ranking(self) -> list[EndedTrial]:
        """Complete trials, best first."""
        complete = [trial for trial in self.trials if trial.state is TrialState.COMPLETE]
        return sorted(complete, key=self.space.objective.order)

    @property
    def searched_first(self) -> EndedTrial | None:
        """The first of the search, which need not be the winner; None if no trial is complete."""
        return self.ranking[0] if self.ranking else None

    @property
    def winner(self) -> TrialConfig | None:
        """What to use: the confirmed winner's config, else that of the search's first."""
        if self.confirmed is not None and self.confirmed.winner is not None:
            return self.confirmed.winner.config
        return self.searched_first.config if self.searched_first else None

    @property
    def winning_trial(self) -> EndedTrial | None:
        """The trial of the winner; None if there is none, or a baseline won."""
        if self.confirmed is not None and self.confirmed.winner is not None:
            number = self.confirmed.winner.trial
            return None if number is None else self.trials[number]
        return self.searched_first

    @property
    def winning_baseline(self) -> ConfirmedStrategy | None:
        """The baseline that has won; None if none has."""
        winner = self.confirmed.winner if self.confirmed is not None else None
        return winner if winner is not None and winner.trial is None else None

    @property
    def baseline_run(self) -> EndedTrial | None:
        """A run of the baseline that has won; None if none has, or its rates are not known."""
        return self.with_rates[0] if self.winning_baseline is not None and self.with_rates else None

    @cached_property
    def optimizers(self) -> list[str]:
        """The optimizers of the space in the order of every figure: that of the furthest and best trial first."""
        objective = self.space.objective

        def order(name: str) -> tuple[float, ...]:
            own = [objective.measured(trial.epochs) for trial in self.trials if trial.config.optimizer.name == name]
            return min(((-len(epochs), *objective.score(epochs)) for epochs in own if epochs), default=(1.0,))

        return sorted(self.space.optimizers, key=order)

    @cached_property
    def tried(self) -> list[str]:
        """The optimizers that some trial had, in the same order."""
        return [name for name in self.optimizers if any(t.config.optimizer.name == name for t in self.trials)]

    @cached_property
    def rungs(self) -> list[int]:
        """The epochs after which trials were pruned."""
        return sorted({len(trial.epochs) for trial in self.trials if trial.state is TrialState.PRUNED})

    @property
    def first_rung(self) -> int:
        """The first epoch after which trials were pruned; the last epoch if none was."""
        return self.rungs[0] if self.rungs else self.space.epochs

    def value_at(self, trial: EndedTrial, epoch: int) -> float | None:
        """Return what a trial's objective was after an epoch; None if the trial did not get so far."""
        measured = self.space.objective.measured(trial.epochs)
        return self.space.objective.value(measured[:epoch]) if len(measured) >= epoch else None

    def last_value(self, trial: EndedTrial) -> float | None:
        """Return a trial's objective after its last finite epoch; None if there is none."""
        measured = self.space.objective.measured(trial.epochs)
        return self.space.objective.value(measured) if measured else None

    def reached(self, epoch: int) -> int:
        """Return how many trials have a score after an epoch."""
        return sum(self.value_at(trial, epoch) is not None for trial in self.trials)

    def passed(self, epoch: int) -> int:
        """Return how many trials were not pruned by an epoch at which they had a score."""
        return sum(self.value_at(trial, epoch) is not None and passes(trial, epoch) for trial in self.trials)

    def better(self, one: float, other: float) -> float:
        """Return by how much one value of the objective is better than another; negative if it is worse."""
        return one - other if self.space.objective.direction == "maximize" else other - one


def passes(trial: EndedTrial, epoch: int) -> bool:
    """Say whether a trial that reached an epoch was not pruned after it."""
    return trial.state is not TrialState.PRUNED or len(trial.epochs) > epoch
