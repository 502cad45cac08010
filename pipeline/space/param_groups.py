"""Assign parameters to groups by name: the first match wins, and every parameter needs a group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pipeline.errors import Problem, listed
from pipeline.space.limits import NonNegative


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters that share a learning rate."""

    pattern: tuple[str, ...]
    """`fnmatch` patterns on parameter names; the first group with a match takes the parameter."""
    lr_ratio: NonNegative = 1.0
    """The group's rate over `base_lr`; 0 freezes the group."""
    weight_decay: NonNegative | None = None
    """None: the optimizer's."""


def assign_groups(
    names: Iterable[str], patterns: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, list[str]], list[Problem]]:
    """Assign each parameter to the first group with a pattern that matches its name.

    Args:
        names: Parameter names, as `named_parameters()` gives them.
        patterns: Group name to `fnmatch` patterns, tried in order; case counts.

    Returns:
        Group name to parameter names, in the order of `patterns` and of `names`; and the problems: a pattern that
        takes no parameter, parameters that no group takes.

    Rates per group: Howard and Ruder (2018), https://arxiv.org/abs/1801.06146.
    """
    names = list(names)
    groups: dict[str, list[str]] = {group: [] for group in patterns}
    idle = [(group, pattern) for group, group_patterns in patterns.items() for pattern in group_patterns]
    left_over = []
    for name in names:
        match = next(
            ((group, pattern) for group, some in patterns.items() for pattern in some if fnmatchcase(name, pattern)),
            None,
        )
        if match is None:
            left_over.append(name)
            continue
        groups[match[0]].append(name)
        if match in idle:
            idle.remove(match)
    problems = [Problem(f"param_groups.{group}", _idle(pattern, names)) for group, pattern in idle]
    if left_over:
        message = f"no group takes {listed(left_over)}; add a last group with the pattern '*'"
        problems.append(Problem("param_groups", message))
    return groups, problems


def _idle(pattern: str, names: list[str]) -> str:
    if any(fnmatchcase(name, pattern) for name in names):
        return (
            f"pattern {pattern!r} is left nothing: earlier patterns take all that it matches; move it up or remove it"
        )
    return f"pattern {pattern!r} matches no parameter; the model has {listed(names)}"
