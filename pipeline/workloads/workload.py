"""The contract of workloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Split:
    """The samples of one split, in memory; they stay on the device for the whole run."""

    inputs: Tensor
    """(sample, …)"""
    targets: Tensor
    """(sample, …)"""

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device, dtype: torch.dtype) -> Split:
        """Return the split on a device, floating-point tensors in `dtype`."""
        return Split(*(t.to(device, dtype if t.is_floating_point() else None) for t in (self.inputs, self.targets)))


@dataclass(frozen=True)
class Metric:
    """A number that says how good outputs are."""

    function: Callable[[Tensor, Tensor], Tensor]
    """(outputs of a whole split, targets of a whole split) -> a scalar."""
    direction: Direction


@dataclass(frozen=True)
class Workload:
    """Data, model, loss and metrics of one problem."""

    name: str
    """For people: `digits · cnn`."""
    build_model: Callable[[], nn.Module]
    """Makes the model with fresh weights from torch's global random state; called once per trial."""
    train: Split
    val: Split
    test: Split
    loss: Callable[[Tensor, Tensor], Tensor]
    """(outputs, targets) -> the mean loss over the samples, a scalar."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Name without a split, such as `accuracy`, to the metric."""

    @property
    def directions(self) -> dict[str, Direction]:
        """Every metric of an epoch, with the direction in which it is better."""
        named: dict[str, Direction] = {f"val/{name}": metric.direction for name, metric in self.metrics.items()}
        return {"train/loss": "minimize", "val/loss": "minimize", **named}


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the fraction of samples whose largest output is the target's.

    Args:
        outputs: (sample, class)
        targets: (sample,)
    """
    return (outputs.argmax(dim=-1) == targets).double().mean()
