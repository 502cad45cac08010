"""How a study stands: counts by state, the best value, the rank of each complete trial, and the speed."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.space.pruners import Score
from pipeline.space.trial import TrialState
from pipeline.tracking.tracker import StoredTrial

RANKED = 100
"""Best trials whose ranks are kept up to date; MLflow's page shows as many runs at a time."""


class Standings:
    """The trials of a study that have ended, ranked as the search ranks them.

    Args:
        ranks: Trial number to the rank that is recorded.
    """

    def __init__(self, *, ranks: Mapping[int, float]) -> None:
        self.ranks = dict(ranks)
        """Trial number to the rank that is recorded."""
        self._states: dict[int, TrialState] = {}
        self._ranking: list[tuple[tuple[Score, int], float]] = []
        self._epochs = 0
        self._since: float | None = None

    @property
    def count(self) -> int:
        """The number of trials that have ended."""
        return len(self._states)

    def epochs(self, count: int) -> None:
        """Count epochs of trials."""
        self._epochs += count

    def end(self, trial: StoredTrial) -> None:
        """Count a trial that has ended; it counts once, and a run of the confirmation never."""
        if trial.confirms or trial.number in self._states:
            return
        self._states[trial.number] = trial.state
        if trial.order is not None and trial.value is not None:
            bisect.insort(self._ranking, (trial.order, trial.value))

    def changed_ranks(self, *, confirmed: Sequence[int] = ()) -> dict[int, int]:
        """Return the ranks to record, best first, by trial number: of the best, and of trials that were among them.

        Args:
            confirmed: Trials that fresh seeds have ranked, best first; they stand before all others.
        """
        found = [number for (_, number), _ in self._ranking]
        order = [*confirmed, *(number for number in found if number not in confirmed)]
        ranks = {number: rank for rank, number in enumerate(order, 1)}
        return {
            number: rank
            for number, rank in ranks.items()
            if self.ranks.get(number) != rank and (rank <= RANKED or number in self.ranks)
        }

    def metrics(self, now: float) -> dict[str, float]:
        """Return the metrics of the study's run at a time, and begin to count epochs anew."""
        counts = Counter(self._states.values())
        values = {f"study/{state}": float(counts[state]) for state in TrialState}
        if self._ranking:
            values["study/best"] = self._ranking[0][1]
        if self._epochs and self._since is not None and now > self._since:
            values["study/trial_epochs_per_s"] = self._epochs / (now - self._since)
        self._epochs, self._since = 0, now
        return values
