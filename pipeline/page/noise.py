"""Noise: which values of the objective cannot be told from that of the winner."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.page.metric import counts_samples, last_scatter
from pipeline.page.results import StudyResults
from pipeline.space.trial import EndedTrial, number

LEAST_GAP = 1e-4
"""Least difference of scores that is written with four decimals."""
Z = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The worst value that is as good as the winner's, and where the number comes from."""

    limit: float
    source: str
    """In words."""
    winner: EndedTrial
    """The trial whose score in the search the others are compared with."""
    trials: tuple[EndedTrial, ...]
    """Complete trials within noise of the winner, or better, best first, the winner included."""
    rates: tuple[float, float]
    """Lowest and highest base rate among these trials that have the winner's optimizer."""
    lower_bound: bool = False
    """Whether other seeds differ more than this."""


def noise_of(results: StudyResults) -> Noise | None:
    """Return what lies within noise of the winner's trial; None if nothing is known of it, or a baseline has won.

    The winner's score is that of the search, as the others' are.

    Where strategies were trained again, their residuals say how far apart two equally good trials are. Else an accuracy
    that counts samples has the Wilson interval of a proportion, and any other objective the scatter of the last three
    epochs, which is a lower bound: other seeds differ more.

    Wilson (1927), https://doi.org/10.1080/01621459.1927.10502953.
    """
    winner = results.winning_trial
    if winner is None or winner.value is None:
        return None
    maximized, lower_bound = results.space.objective.direction == "maximize", False
    if (seeds := _spread_of_runs(results)) is not None:
        limit = winner.value - seeds if maximized else winner.value + seeds
        source = f"± {gap_text(seeds)}, from how fresh seeds disagree"
    elif results.val_samples and counts_samples(results):
        low, high = wilson(winner.value, results.val_samples)
        source = f"95 % of {number(winner.value)} on {results.val_samples} samples: {low:.3f}–{high:.3f}"
        limit = low
    elif (scatter := last_scatter(results)) is not None:
        reach = Z * math.sqrt(2) * scatter
        limit = winner.value - reach if maximized else winner.value + reach
        moves = "from how much the best trials still move in their last three epochs"
        source, lower_bound = f"± {gap_text(reach)}, {moves}: a lower bound, since other seeds differ more", True
    else:
        return None
    near = tuple(t for t in results.ranking if t.value is not None and results.better(t.value, limit) >= 0)
    rates = [t.config.optimizer.base_lr for t in near if t.config.optimizer.name == winner.config.optimizer.name]
    return Noise(
        limit=limit,
        source=source,
        winner=winner,
        trials=near,
        rates=(min(rates), max(rates)),
        lower_bound=lower_bound,
    )


def _spread_of_runs(results: StudyResults) -> float | None:
    """Return how far apart two trials of one quality and one seed are in 95 % of cases; None without a confirmation.

    A seed moves all strategies alike by a part, which the trials of a search share; the residuals are without it.
    """
    residual = results.confirmed.residual if results.confirmed is not None else None
    return None if residual is None else Z * math.sqrt(2) * residual


def gap_text(value: float) -> str:
    """Return a difference of scores with as many decimals as `number` gives a score; two digits of a smaller one."""
    return f"{value:.4f}" if value == 0 or abs(value) >= LEAST_GAP else f"{value:.1e}"


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion that was measured on `count` samples."""
    middle = share + Z**2 / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    whole = 1 + Z**2 / count
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)
