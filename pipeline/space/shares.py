"""Shares become numbers: `step_size: 25%` of a run of 20 epochs is 5, `eta_min: 10%` of a rate of 0.02 is 0.002.

A share of the run is resolved once, when a space is read, so Optuna and the records see whole numbers. A share of the
smallest rate is resolved when a trial's config is sampled. So is a share of the steps of a run, if trials differ in
batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

from pipeline.space.distributions import Choices, Range, extremes
from pipeline.space.limits import Interval, Share, ShareOf


def resolve_lengths(
    schedule: type[Any], values: Mapping[str, Any], *, total: int | None, warmup: int | None = None
) -> dict[str, Any]:
    """Replace shares of the run by whole numbers, rounded half up.

    A number is at least what the field allows, so that every share of a short run means something. The warm-up is
    shorter than the run; other numbers are at most what the longest warm-up leaves of the run.

    Args:
        schedule: Class of the schedule.
        values: Field to value or distribution.
        total: Length of the run in the schedule's `interval`; None: not known yet, so shares stay.
        warmup: Length of the longest warm-up; None: as `values` say.
    """
    if total is None:
        return dict(values)
    least = _fields(schedule, "run")

    def resolve(name: str, most: int) -> Any:
        return _map_shares(values[name], lambda share: min(max(share.of_count(total), least[name]), most))

    resolved = dict(values)
    if "warmup" in values:
        resolved["warmup"] = resolve("warmup", total - 1)
    longest = max(extremes(resolved.get("warmup", 0))) if warmup is None else warmup
    rest = [name for name in values if name in least and name != "warmup"]
    return resolved | {name: resolve(name, max(1, total - longest)) for name in rest}


def has_shares_of_run(schedule: type[Any], values: Mapping[str, Any]) -> bool:
    """Say whether a schedule has a share of the run that is not resolved yet."""
    return resolve_lengths(schedule, values, total=1) != values


def resolve_floors(schedule: type[Any], values: Mapping[str, Any], *, rate: float) -> dict[str, Any]:
    """Replace shares of the smallest rate by rates."""
    floors = _fields(schedule, "rate")
    return {
        name: _map_shares(value, lambda s: s.of_rate(rate)) if name in floors else value
        for name, value in values.items()
    }


def _map_shares(distribution: Any, number: Callable[[Share], Any]) -> Any:
    """Replace the shares in a value or a distribution; a range whose ends become equal becomes a value."""
    match distribution:
        case Share():
            return number(distribution)
        case tuple() | list():
            return type(distribution)(_map_shares(item, number) for item in distribution)
        case Choices(choices=choices):
            return Choices[Any](choices=tuple(dict.fromkeys(_map_shares(choice, number) for choice in choices)))
        case Range(low=Share() as low, high=high, log=log):
            first, last = number(low), number(high)
            first = max(first, 1) if log else first
            return Range[int, int](low=first, high=last, log=log) if first < last else last
    return distribution


def _fields(schedule: type[Any], whole: str) -> dict[str, Any]:
    """Return the fields that may be a share of a whole, with the least legal value of each."""
    found = {}
    for name, hint in get_type_hints(schedule, include_extras=True).items():
        for annotation in (hint, *get_args(hint)):
            marks = getattr(annotation, "__metadata__", ())
            if any(isinstance(mark, ShareOf) and mark.whole == whole for mark in marks):
                found[name] = next(mark.ge for mark in marks if isinstance(mark, Interval))
    return found
