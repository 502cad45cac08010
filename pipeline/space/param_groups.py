"""Assign parameters to groups by name and dimensions: the first match wins, and every parameter needs a group.

A group of a file becomes one or more groups of a torch optimizer: one per layer if the group has layers, and each of
these in two parts if some parameters have no weight decay.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from types import MappingProxyType
from typing import Annotated

from pipeline.errors import Problem
from pipeline.space.limits import Interval, NonNegative, OrOne

Patterns = Annotated[tuple[str, ...], OrOne()]
Dims = Annotated[tuple[Annotated[int, Interval(ge=0)], ...], OrOne()]

NUMBER = "{n}"
"""Stands in the patterns of a layer for one layer per number: `blocks.{n}.*`."""

FIRST_SHOWN, LAST_SHOWN = 5, 3
"""Parameters that a message lists; the last ones are those of the output layer."""

UNDECAYED = ".no_weight_decay"
"""Ends the name of a torch group whose parameters have no weight decay."""


@dataclass(frozen=True, kw_only=True)
class ParameterRule:
    """Takes parameters by name, by number of dimensions, or by both, which must hold together."""

    pattern: Patterns | None = None
    """`fnmatch` patterns on parameter names, one of which must match."""
    dims: Dims | None = None
    """Numbers of dimensions, one of which the parameter must have; biases and the weights of norms have 1."""

    def takes(self, name: str, dims: int) -> bool:
        """Say whether the rule takes a parameter."""
        return self._matches(name) and (self.dims is None or dims in self.dims)

    def by_pattern(self) -> list[ParameterRule]:
        """Return the rule as one rule per pattern."""
        patterns = [None] if self.pattern is None else [(pattern,) for pattern in self.pattern]
        return [ParameterRule(pattern=pattern, dims=self.dims) for pattern in patterns]

    def why_idle(self, dims: Mapping[str, int], tied: Mapping[str, str]) -> str:
        """Return why the rule takes no parameter; `dims` and `tied` are those of `assign_groups`."""
        if any(self.takes(name, count) for name, count in dims.items()):
            return f"{self} is left nothing: earlier rules take all that it matches; move it up or remove it"
        for alias, name in tied.items():
            if self.takes(alias, dims[name]):
                return f"{self} takes nothing: {alias} is tied to {name}, listed as {name}; use that name or remove it"
        near = [name for name in dims if self._matches(name)] or list(dims)
        modules = [f"{pattern}.*" for pattern in self.pattern or ()]
        meant = [module for module in modules if any(fnmatchcase(name, module) for name in dims)]
        hint = f"; did you mean {meant[0]!r}?" if meant else ""
        return f"{self} matches no parameter; the model has {_listed(near, dims, [self])}{hint}"

    def _matches(self, name: str) -> bool:
        return self.pattern is None or any(fnmatchcase(name, pattern) for pattern in self.pattern)

    def __str__(self) -> str:
        """Return the rule in words, for messages: `pattern 'head.*' with dims 1`."""
        pattern = [f"pattern {' or '.join(map(repr, self.pattern))}"] if self.pattern else []
        dims = [f"dims {' or '.join(map(str, self.dims))}"] if self.dims else []
        return " with ".join([*pattern, *dims])


@dataclass(frozen=True, kw_only=True)
class ParamGroup(ParameterRule):
    """Parameters that share a learning rate, or layers whose rates share a factor."""

    layers: tuple[Patterns, ...] | None = None
    """In place of `pattern`: the patterns of each layer, from the input to the output. `{n}` stands for one layer per
    number in the model's names."""
    layer_decay: Annotated[float, Interval(ge=0.1, le=1)] | None = None
    """The rate of a layer over that of the next layer; the last layer has the group's rate."""
    lr_ratio: NonNegative = 1.0
    """The group's rate over `base_lr`; 0 freezes the group."""
    weight_decay: NonNegative | None = None
    """None: the optimizer's."""

    def ratios(self) -> tuple[float, ...]:
        """Return the rate of each layer over `base_lr`; one rate for a group without layers.

        Layer i of L has `lr_ratio * layer_decay ** (L - 1 - i)`: Clark et al. (2020),
        https://arxiv.org/abs/2003.10555; Bao et al. (2022), https://arxiv.org/abs/2106.08254.
        """
        if self.layers is None or self.layer_decay is None:
            return (self.lr_ratio,)
        return tuple(self.lr_ratio * self.layer_decay**above for above in reversed(range(len(self.layers))))


@dataclass(frozen=True, kw_only=True)
class TorchGroup:
    """A parameter group of a torch optimizer: parameters with one learning rate and one weight decay."""

    name: str
    """The group's name in records of rates, such as `head`, or `body.3` for a layer."""
    lr_ratio: float
    """The rate over `base_lr`; 0 freezes the parameters."""
    weight_decay: float | None
    """None: the optimizer's."""


def torch_groups(
    groups: Mapping[str, ParamGroup], no_weight_decay: Sequence[ParameterRule] = ()
) -> dict[str, TorchGroup]:
    """Return the groups of the torch optimizer by name: `head`, `body.0`, …, `head.no_weight_decay` beside `head`."""
    made = {}
    for name, group in _layer_groups(groups).items():
        made[name] = TorchGroup(name=name, lr_ratio=group.lr_ratio, weight_decay=group.weight_decay)
        if no_weight_decay:
            made[name + UNDECAYED] = dataclasses.replace(made[name], weight_decay=0.0)
    return made


def assign_groups(
    dims: Mapping[str, int],
    groups: Mapping[str, ParamGroup],
    no_weight_decay: Sequence[ParameterRule] = (),
    *,
    tied: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, list[str]], list[Problem]]:
    """Assign each parameter to the first group that takes it, and to a torch group of that group.

    Args:
        dims: Parameter name, as `named_parameters()` gives it, to number of dimensions.
        groups: Groups by name, tried in order; the case of a pattern counts.
        no_weight_decay: Rules, any of which takes a parameter to the part of its group without weight decay.
        tied: Other names of parameters, which `named_parameters()` leaves out, to the names that it gives.

    Returns:
        Torch group to parameter names, in the order of `torch_groups` and of `dims`; and the problems: a pattern or a
        rule that takes no parameter, parameters that no group takes.

    Rates per group: Howard and Ruder (2018), https://arxiv.org/abs/1801.06146.
    """
    assigned: dict[str, list[str]] = {name: [] for name in torch_groups(groups, no_weight_decay)}
    rules = [(name, rule) for name, group in _layer_groups(groups).items() for rule in group.by_pattern()]
    idle = list(rules)
    left_over = []
    for name, count in dims.items():
        match = next((match for match in rules if match[1].takes(name, count)), None)
        if match is None:
            left_over.append(name)
            continue
        undecayed = any(rule.takes(name, count) for rule in no_weight_decay)
        assigned[match[0] + UNDECAYED if undecayed else match[0]].append(name)
        if match in idle:
            idle.remove(match)
    problems = [Problem(_place(name), rule.why_idle(dims, tied)) for name, rule in idle]
    if left_over:
        message = f"no group takes {_listed(left_over, dims, groups.values())}; add a last group with the pattern '*'"
        problems.append(Problem("param_groups", message))
    for rule in chain.from_iterable(rule.by_pattern() for rule in no_weight_decay):
        if not any(rule.takes(name, count) for name, count in dims.items()):
            problems.append(Problem("no_weight_decay", rule.why_idle(dims, tied)))
    return assigned, problems


def is_numbered(layers: Iterable[Sequence[str]]) -> bool:
    """Say whether layers have yet to be replaced by `numbered_layers`."""
    return any(NUMBER in pattern for patterns in layers for pattern in patterns)


def numbered_layers(layers: Iterable[str | Sequence[str]], names: Iterable[str]) -> list[list[str]]:
    """Replace each layer with `{n}` in a pattern by one layer per number, in ascending order.

    Args:
        layers: The pattern or patterns of each layer.
        names: Parameter names; a number counts if a pattern with the number in place of `{n}` matches one of them.

    Returns:
        The patterns of each layer; a layer for which there is no number stays.
    """
    names = list(names)
    made = []
    for layer in layers:
        patterns = [layer] if isinstance(layer, str) else list(layer)
        numbers = {
            number
            for name in names
            for number in re.findall(r"\d+", name)
            for pattern in patterns
            if NUMBER in pattern and fnmatchcase(name, pattern.replace(NUMBER, number))
        }
        replaced = [[pattern.replace(NUMBER, number) for pattern in patterns] for number in sorted(numbers, key=int)]
        made += replaced or [patterns]
    return made


def _layer_groups(groups: Mapping[str, ParamGroup]) -> dict[str, ParamGroup]:
    """Return the groups with every layer as a group of its own, named `body.0`, `body.1`, …."""
    made = {}
    for name, group in groups.items():
        if group.layers is None:
            made[name] = group
            continue
        for number, (patterns, ratio) in enumerate(zip(group.layers, group.ratios(), strict=True)):
            made[f"{name}.{number}"] = dataclasses.replace(
                group, pattern=patterns, layers=None, layer_decay=None, lr_ratio=ratio
            )
    return made


def _place(name: str) -> str:
    """Return the place in a file of a group, or of the layers to which a layer belongs."""
    group, dot, _ = name.partition(".")
    return f"param_groups.{group}.layers" if dot else f"param_groups.{group}"


def _listed(names: Sequence[str], dims: Mapping[str, int], rules: Iterable[ParameterRule]) -> str:
    """Return the first and the last names as text, with their numbers of dimensions if a rule asks for dimensions."""
    with_dims = any(rule.dims is not None for rule in rules)
    words = [f"{name} (dims {dims[name]})" if with_dims else name for name in names]
    if (left_out := len(words) - FIRST_SHOWN - LAST_SHOWN) > 0:
        words[FIRST_SHOWN:-LAST_SHOWN] = [f"… ({left_out} more)"]
    return ", ".join(words)
