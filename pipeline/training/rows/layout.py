"""Layout of a row: where each trained parameter of a model lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.space.config import TrialConfig
from pipeline.training.optim import group_parameters


@dataclass(frozen=True)
class Layout:
    """The position of each parameter in a row: group after group, and in the model's order within a group."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sizes: tuple[int, ...]
    groups: Mapping[str, slice]
    """Name to columns of each torch group that trains a parameter."""

    def described(self) -> list[str]:
        """Return each parameter's name and shape, in order."""
        return [f"{name} {tuple(shape)}" for name, shape in zip(self.names, self.shapes, strict=True)]

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return each parameter of all rows, (row, *shape), as a view of the matrix."""
        rows, parts = len(matrix), matrix.split(self.sizes, dim=1)
        return {name: part.view(rows, *shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}


def lay_out(model: nn.Module, config: TrialConfig) -> Layout:
    """Lay out the trained parameters: the parameters of groups that are not frozen."""
    assigned = group_parameters(config, model)
    trained = {
        name: assigned[name] for name, group in config.torch_groups().items() if group.lr_ratio != 0 and assigned[name]
    }
    pairs = [pair for group in trained.values() for pair in group]
    groups, start = {}, 0
    for name, members in trained.items():
        size = sum(parameter.numel() for _, parameter in members)
        groups[name] = slice(start, start + size)
        start += size
    return Layout(
        names=tuple(name for name, _ in pairs),
        shapes=tuple(parameter.shape for _, parameter in pairs),
        sizes=tuple(parameter.numel() for _, parameter in pairs),
        groups=groups,
    )
