"""The answer of a search: the confirmed winner, or else the search's first trial, unconfirmed; and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.app.display import score_line, spread, strategy_line
from pipeline.space.trial import EndedTrial, number
from pipeline.study.certainty import Difference, compare
from pipeline.study.confirmation import Confirmation, Confirmed
from pipeline.study.study import Study


@dataclass(frozen=True)
class Answer:
    """What a study says is best; it is computed here alone, so that every place names the same winner."""

    study: Study
    confirmation: Confirmation

    @classmethod
    def of(cls, study: Study) -> Answer:
        """Return the answer of a study as it is stored."""
        return cls(study, Confirmation(study))

    @property
    def trial(self) -> EndedTrial | None:
        """The winner's trial; if a baseline has won, its run with the first fresh seed; None if none is complete."""
        winner = self.confirmation.winner
        if winner is None:
            return next(iter(self.study.best()), None)
        if winner.candidate.trial is None:
            return winner.runs[self.confirmation.seeds[0]]
        return self.study.ended[winner.candidate.trial]

    def confirmed(self, trial: EndedTrial) -> Confirmed | None:
        """Return the candidate that a trial, or a run of the confirmation, belongs to; None if there is none."""
        for found in self.confirmation.table:
            if found.candidate.trial == trial.number or any(run.number == trial.number for run in found.runs.values()):
                return found
        return None

    def difference(self, other: Confirmed) -> Difference | None:
        """Return how much better the winner's mean objective is than another's; None if either has no mean."""
        measured = [found for found in self.confirmation.table if found.mean is not None]
        if self.confirmation.winner is None or other not in measured:
            return None
        scores = [[found.values[seed] for seed in self.confirmation.seeds] for found in measured]
        return compare(scores, 0, measured.index(other), direction=self.study.space.objective.direction)

    @property
    def rivals(self) -> list[Confirmed]:
        """The runner-up and the better baseline, those that the winner is compared with."""
        others = [found for found in self.confirmation.table if found.mean is not None][1:]
        baselines = [found for found in others[1:] if found.candidate.trial is None]
        return others[:1] + (baselines[:1] if others[0].candidate.trial is not None else []) if others else []

    def lines(self) -> list[str]:
        """Return lines that say which strategy is best, and how sure that is; empty if no trial is complete."""
        return list(self._lines())

    def _lines(self) -> Iterator[str]:
        space, winner, trial = self.study.space, self.confirmation.winner, self.trial
        if trial is None:
            return
        metric, strategy = space.objective.metric, strategy_line(trial.config, space)
        if winner is None:
            yield f"best          #{trial.number} {strategy}"
            yield f"              {metric} {score_line(trial, space.objective)}, unconfirmed: {self._why()}"
        else:
            seeds = len(self.confirmation.seeds)
            yield f"best          {winner.candidate.label} {strategy}"
            yield f"              {metric} {spread(winner)} over {seeds} fresh seeds{self._luck(winner)}"
            for rival in self.rivals:
                yield f"              {versus(rival, self.difference(rival))}"
            if test := self.confirmation.test():
                yield "              " + ", ".join(f"{name} {number(value)}" for name, value in test.items())
        if other := self._optunas_best(trial):
            yield f"              {other}"

    def _why(self) -> str:
        """Return why the answer is not confirmed."""
        if self.confirmation.reason:
            return f"{self.confirmation.reason}; python -m pipeline.confirm --study {self.study.name} does it"
        return "no candidate trained to its end with every seed" if self.confirmation.complete else "not finished"

    def _luck(self, winner: Confirmed) -> str:
        """Return how far the search's own score was from the confirmed mean."""
        if winner.candidate.trial is None or winner.mean is None:
            return "; a baseline has won"
        value = self.study.ended[winner.candidate.trial].value
        return f"; the search had {number(value)} with one seed" if value is not None else ""

    def _optunas_best(self, trial: EndedTrial) -> str:
        """Return why Optuna's best trial, the first of the best value, is another; empty if it is the same."""
        best = self.study.best(len(self.study.ended))
        first = min((other.number for other in best if other.value == best[0].value), default=trial.number)
        if first == trial.number:
            return ""
        if self.confirmation.winner is not None:
            return f"Optuna's best trial is #{first}, the first with the best score of one seed"
        taken = "Optuna takes the first, this search the lowest validation loss"
        return f"Optuna's best trial is #{first}, which has the same value: {taken}"


def versus(other: Confirmed, difference: Difference | None) -> str:
    """Return how the winner compares with another candidate: words that follow from the interval alone."""
    if difference is None:
        ended = [f"{run.state} with seed {seed}" for seed, run in other.runs.items() if run.value is None]
        return f"{other.candidate.label}: {', '.join(ended)}"
    interval = f"{difference.mean:+.3g} [{difference.low:.3g}, {difference.high:.3g}]"
    words = "better than" if difference.distinguishable else "not distinguishable from"
    return f"{words} {other.candidate.label}: {interval}, 95 % over seeds"
