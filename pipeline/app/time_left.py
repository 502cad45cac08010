"""TimeLeft: how long a search will still take, and what the estimate is based on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from pipeline.app.display import duration
from pipeline.space.trial import EndedTrial


class TimeLeft:
    """Estimates how long a search will still take: the epochs that are left, at the speed so far.

    A trial is expected to last as long as those trials of ended groups that lasted longer than this one so far. Before
    the first group has ended, no trial is expected to be pruned, which gives an upper bound.

    Args:
        epochs: Number of epochs of a trial that is not pruned.
        prunes: Whether trials may be pruned.
        clock: Returns seconds.
    """

    def __init__(self, epochs: int, *, prunes: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._all = epochs
        self._prunes = prunes
        self._clock = clock
        self._started = clock()
        self._trained = 0
        self._lengths = Counter[int]()
        """Number of epochs to the number of trials of ended groups that trained so many."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def epochs(self, count: int) -> None:
        """Take a number of epochs, summed over trials, that were trained."""
        self._trained += count

    def group_ended(self, trials: Sequence[EndedTrial]) -> None:
        """Take the trials of a group that has ended; those that ended first say too little of how long trials last."""
        self._lengths.update(len(trial.epochs) for trial in trials)

    def speed(self) -> str:
        """Return the epochs per second, summed over trials; empty before the first."""
        rate = self._trained / max(self.elapsed_s, 1e-9)
        return f"{rate:.0f} epochs/s" if rate >= 10 else f"{rate:.2g} epochs/s" if rate else ""

    def words(self, running: Sequence[int], *, ahead: int) -> str:
        """Return the time left and what it is based on; empty if nothing is known or left.

        Args:
            running: Number of epochs that each running trial has trained.
            ahead: Number of trials that have not begun.
        """
        left = sum(map(self.expected, running)) + ahead * self.expected(0)
        if not self._trained or not left:
            return ""
        time_left = duration(left / self._trained * self.elapsed_s)
        if not self._prunes:
            return f"about {time_left} left"
        if self._lengths:
            return f"about {time_left} left if as many are pruned as so far"
        return f"up to {time_left} left, less when trials are pruned"

    def expected(self, trained: int) -> float:
        """Return how many further epochs are expected of a trial that has trained some."""
        longer = {length: count for length, count in self._lengths.items() if length > trained}
        if not longer:
            return self._all - trained
        return sum((length - trained) * count for length, count in longer.items()) / sum(longer.values())
