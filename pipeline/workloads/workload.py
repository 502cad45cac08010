"""The contract of workloads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Direction = Literal["minimize", "maximize"]


class Dataset(Protocol):
    """Samples that are read one by one, such as a `torch.utils.data.Dataset`."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        """Return (input, target) of a sample: tensors, arrays or numbers, of the same shapes for every sample."""
        ...


class Samples(Protocol):
    """The samples of one split on the device; `Split` keeps them in memory, `streamed.Streamed` reads them."""

    @property
    def sample_size(self) -> int:
        """The count of numbers in the input of one sample."""
        ...

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def batches(self, indices: Sequence[Tensor], *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs and targets of batches.

        Args:
            indices: One tensor (sample,) per batch, on the CPU.
            seed: Decides the random numbers that samples draw.
        """
        ...

    def take(self, chosen: Tensor) -> Samples:
        """Return some of the samples, by their indices (sample,) on the CPU."""
        ...


@dataclass(frozen=True)
class Split:
    """The samples of one split, in memory."""

    inputs: Tensor
    """(sample, …)"""
    targets: Tensor
    """(sample, …)"""

    @property
    def sample_size(self) -> int:
        """The count of numbers in the input of one sample."""
        return self.inputs[:1].numel()

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device, dtype: torch.dtype) -> Split:
        """Return the split on a device, floating-point tensors in `dtype`."""
        return Split(*(t.to(device, dtype if t.is_floating_point() else None) for t in (self.inputs, self.targets)))

    def batches(self, indices: Sequence[Tensor], *, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs and targets of batches; see `Samples`."""
        sizes = [len(batch) for batch in indices]
        for batch in torch.cat(list(indices)).to(self.inputs.device, non_blocking=True).split(sizes):
            yield self.inputs.index_select(0, batch), self.targets.index_select(0, batch)

    def take(self, chosen: Tensor) -> Split:
        """Return some of the samples; see `Samples`."""
        ((inputs, targets),) = self.batches([chosen])
        return Split(inputs, targets)


@dataclass(frozen=True)
class Metric:
    """A number that measures how good outputs are."""

    function: Callable[[Tensor, Tensor], Tensor]
    """(outputs of a whole split, targets of a whole split) -> a scalar."""
    direction: Direction


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Data, model, loss and metrics of one problem."""

    name: str
    """Name for people, such as `digits · cnn`."""
    build_model: Callable[[], nn.Module]
    """Builds the model with fresh weights from torch's global random state; called once per trial."""
    train: Split | Dataset
    """Moved to the device once if the split fits there, else read batch by batch for all trials at once."""
    val: Split | Dataset
    test: Split | Dataset | None = None
    """Never used for choosing."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """(outputs, targets) -> the mean loss over the samples, a scalar."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Name without a split, such as `accuracy`, to the metric."""
    preprocess: Callable[[Tensor], Tensor] | None = None
    """(inputs of a batch, as the data has them) -> the model's inputs, on the device; such as a normalisation."""
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    """(inputs of a training batch, as the data has them; a generator of the same device) -> inputs of the same shape,
    changed at random. Called before `preprocess`, once for all trials."""

    @property
    def directions(self) -> dict[str, Direction]:
        """The direction in which each metric of an epoch is better."""
        named: dict[str, Direction] = {f"val/{name}": metric.direction for name, metric in self.metrics.items()}
        return {"train/loss": "minimize", "val/loss": "minimize", **named}


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the fraction of samples whose largest output is the target's.

    Args:
        outputs: (sample, class)
        targets: (sample,)
    """
    hits = outputs.argmax(dim=-1) == targets
    return hits.float().mean() if hits.device.type == "mps" else hits.double().mean()
