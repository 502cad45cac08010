"""Placement: a pure function, recomputed before every epoch, decides where each trial trains.

On one kind of machine, config and placement decide a trial's metrics to the bit. A placement is plain or row, the
number of rows of the matrix, the trial's place in the matrix, and the number of threads; the values of other rows do
not matter. Therefore a resumed search and a replayed trial repeat every metric if they repeat the placement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.space.config import TrialConfig
from pipeline.space.placement import PlacementRules, matrix_key
from pipeline.space.schedules import OwnScheduler
from pipeline.training.rows.optimizer import row_order
from pipeline.training.rows.update_rules import has_rule


@dataclass(frozen=True)
class Shard:
    """Trials that one trainer trains."""

    numbers: tuple[int, ...]
    """Trial numbers: the rows of one matrix, in order, or one plain trial."""
    plain: bool


def place(configs: Mapping[int, TrialConfig], rules: PlacementRules) -> list[Shard]:
    """Divide the running trials of a group into matrices and plain trials.

    Trials of one batch size that freeze the same groups share matrices: one per process, or more if the row limit
    requires. These matrices differ by at most one row; their rows are in `row_order`.
    """
    alike: dict[str, list[int]] = {}
    plain = []
    for number, config in row_order(configs).items():
        if why_plain(config, rules) is None:
            alike.setdefault(matrix_key(config), []).append(number)
        else:
            plain.append(Shard((number,), plain=True))
    shards = []
    for numbers in alike.values():
        limit = min(-(-len(numbers) // rules.processes), rules.row_limit or len(numbers))
        shards += [Shard(tuple(part), plain=False) for part in split(numbers, limit)]
    return shards + plain


def why_plain(config: TrialConfig, rules: PlacementRules) -> str | None:
    """Return why a trial trains plain; None if the trial is a row."""
    if not has_rule(type(config.optimizer)):
        return f"{config.optimizer.name} has no update rule for rows"
    if isinstance(config.scheduler, OwnScheduler):
        return f"{config.scheduler.name} may raise, which would end every row of a matrix"
    return rules.plain_because[matrix_key(config)]


def describe(shards: Sequence[Shard]) -> str:
    """Return how trials are placed, for people: `rows 4 + 4, plain 1`."""
    rows = [str(len(shard.numbers)) for shard in shards if not shard.plain]
    plain = len(shards) - len(rows)
    words = [f"rows {' + '.join(rows)}" if rows else "", f"plain {plain}" if plain else ""]
    return ", ".join(word for word in words if word)


def split(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield parts of at most `size` numbers; the sizes of the parts differ by at most one."""
    count = -(-len(numbers) // size)
    for index in range(count):
        yield numbers[index * len(numbers) // count : (index + 1) * len(numbers) // count]
