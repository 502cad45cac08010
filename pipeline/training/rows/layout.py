"""Layout of a row: where each trained parameter of a model lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.space.config import TrialConfig
from pipeline.space.param_groups import assign_groups


@dataclass(frozen=True)
class Layout:
    """The position of each parameter in a row: group after group, and in the model's order within a group."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sizes: tuple[int, ...]
    groups: Mapping[str, slice]
    """Name to columns of each trained group."""

    def described(self) -> list[str]:
        """Return each parameter's name and shape, in order."""
        return [f"{name} {tuple(shape)}" for name, shape in zip(self.names, self.shapes, strict=True)]

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return each parameter of all rows, (row, *shape), as a view of the matrix."""
        rows, parts = len(matrix), matrix.split(self.sizes, dim=1)
        return {name: part.view(rows, *shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}


def lay_out(model: nn.Module, config: TrialConfig) -> Layout:
    """Lay out the trained parameters: the parameters of groups that are not frozen."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    patterns = {name: group.pattern for name, group in config.param_groups.items()}
    assigned, problems = assign_groups(parameters, patterns)
    assert not problems, problems
    trained = {name: names for name, names in assigned.items() if config.param_groups[name].lr_ratio != 0}
    names = [name for group in trained.values() for name in group]
    groups, start = {}, 0
    for group, members in trained.items():
        size = sum(parameters[name].numel() for name in members)
        groups[group] = slice(start, start + size)
        start += size
    shapes = tuple(parameters[name].shape for name in names)
    return Layout(tuple(names), shapes, tuple(shape.numel() for shape in shapes), groups)
