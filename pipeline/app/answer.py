"""The answer of a search: the confirmed winner, or else the search's first trial, unconfirmed; and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.app.display import score_line, spread, strategy_line
from pipeline.errors import counted, printable
from pipeline.page.noise import gap_text
from pipeline.space.trial import EndedTrial, number
from pipeline.study.candidates import plan
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
        """Return the answer of a study as it is stored: the last complete confirmation stays until another is."""
        return cls(study, Confirmation.last(study) or Confirmation(study, plan(study, study.space.confirm)))

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

    @property
    def unconfirmed(self) -> str:
        """Why no candidate is confirmed; empty if one is."""
        if self.confirmation.winner is not None:
            return ""
        if len(self.study.ended) < self.study.planned:
            return "the search has not ended"
        if self.confirmation.complete:
            return "no candidate trained to its end with every seed"
        return self.confirmation.reason or "the confirmation is not done"

    def lines(self, *, confirm: str) -> list[str]:
        """Return lines that say which strategy is best, and how sure that is; empty if no trial is complete.

        Args:
            confirm: The command, or the call, that confirms the study.
        """
        return [printable(line) for line in self._lines(confirm)]

    def _lines(self, confirm: str) -> Iterator[str]:
        space, winner, trial = self.study.space, self.confirmation.winner, self.trial
        if trial is None:
            return
        metric, strategy = space.objective.metric, strategy_line(trial.config, space)
        if winner is None:
            yield f"best          #{trial.number} {strategy}"
            yield f"              {metric} {score_line(trial, space.objective)} with one seed"
            yield f"unconfirmed   {self.unconfirmed}"
            if len(self.study.ended) >= self.study.planned:
                yield f"confirm it    {confirm}"
        else:
            yield f"best          {winner.candidate.label} {strategy}"
            yield f"              {metric} {spread(winner)} (mean ± standard deviation) over {self._seeds()}"
            yield f"              {self._luck(winner)}"
            for rival in self.rivals:
                yield f"              {versus(rival, self.difference(rival))}"
            if test := self.confirmation.test():
                scores = ", ".join(f"{name} {number(value)}" for name, value in test.items())
                yield f"              {scores}: means over {self._seeds()}"
        if other := self._optunas_best(trial):
            yield f"              {other}"

    def _seeds(self) -> str:
        """Return the number of seeds in words, and of which trials the confirmation knew if there are more by now."""
        known, ended = self.confirmation.trials, len(self.study.ended)
        after = f", after {known} of {ended} trials" if known < ended else ""
        return f"{counted(len(self.confirmation.seeds), 'fresh seed')}{after}"

    def _luck(self, winner: Confirmed) -> str:
        """Return how far the search's own score was from the confirmed mean."""
        if winner.candidate.trial is None or winner.mean is None:
            return "a baseline has won: no finalist is better; widen the ranges, or search more trials"
        value = self.study.ended[winner.candidate.trial].value
        assert value is not None
        better = (value < winner.mean) is (self.study.space.objective.direction == "minimize")
        off = f", {gap_text(abs(value - winner.mean))} {'better' if better else 'worse'}"
        return f"the search had {number(value)} with one seed{off if value != winner.mean else ''}"

    def _optunas_best(self, trial: EndedTrial) -> str:
        """Return why Optuna's best trial, the first of the best value, is another; empty if it is the same."""
        best = self.study.best(len(self.study.ended))
        first = min((other.number for other in best if other.value == best[0].value), default=trial.number)
        if first == trial.number:
            return ""
        if self.confirmation.winner is not None:
            return f"Optuna's own tools call #{first} the best: it has the best score of one seed"
        taken = "they take the first, this search the lowest validation loss"
        return f"Optuna's own tools call #{first} the best, which has the same value: {taken}"


def versus(other: Confirmed, difference: Difference | None) -> str:
    """Return how the winner compares with another candidate: words that follow from the interval alone."""
    if difference is None:
        ended = [f"{run.state} with seed {seed}" for seed, run in other.runs.items() if run.value is None]
        return f"{other.candidate.label}: {', '.join(ended)}"
    gap = f"{_signed(difference.mean)} [{_signed(difference.low)}, {_signed(difference.high)}]"
    if difference.distinguishable:
        return f"better than {other.candidate.label} by {gap}, the 95 % interval over seeds"
    return f"not distinguishable from {other.candidate.label}: better by {gap}, the 95 % interval over seeds"


def _signed(value: float) -> str:
    return f"−{gap_text(-value)}" if value < 0 else gap_text(value)
