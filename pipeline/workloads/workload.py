"""The contract of workloads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pipeline.workloads.trees import map_leaves, map_tensors, tensors

Direction = Literal["minimize", "maximize"]


class Dataset(Protocol):
    """Samples that are read one by one, such as a `torch.utils.data.Dataset`."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return a sample: a tuple (inputs…, target), or one tree that is both inputs and targets.

        Parts are tensors, arrays or numbers, or trees of them, of the same shapes for every sample; with
        `Workload.collate` a sample is anything.
        """
        ...


@dataclass(frozen=True)
class Batch:
    """The samples of one step."""

    inputs: Any
    """Tree of tensors (sample, …), or what `Workload.collate` makes: a dict goes to `model(**inputs)`, a tuple to
    `model(*inputs)`, anything else to `model(inputs)`."""
    targets: Any
    """The loss's and the metrics' second argument; None in a split without targets."""
    size: int
    """Number of samples."""

    @property
    def both(self) -> tuple[Any, Any]:
        """Inputs and targets."""
        return self.inputs, self.targets

    def pin_memory(self) -> Batch:
        """Return the batch in memory that a CUDA device copies from by itself; a `DataLoader` calls this."""
        return self.map(lambda leaf: leaf.pin_memory() if callable(getattr(leaf, "pin_memory", None)) else leaf)

    def map(self, function: Callable[[Any], Any]) -> Batch:
        """Return a batch with `function` of every leaf of inputs and targets."""
        return Batch(map_leaves(function, self.inputs), map_leaves(function, self.targets), self.size)


class Samples(Protocol):
    """The samples of one split on the device; `Split` keeps them in memory, `streamed.Streamed` reads them."""

    @property
    def sample_size(self) -> int:
        """The count of numbers in the input of one sample."""
        ...

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def batches(self, indices: Sequence[Tensor], *, seed: int) -> Iterator[Batch]:
        """Yield batches.

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

    inputs: Any
    """A tensor (sample, …), or a tuple or dict of such tensors; see `Batch`."""
    targets: Any = None
    """The same; None: the loss gets the inputs as the model does."""

    @property
    def sample_size(self) -> int:
        """The count of numbers in the input of one sample."""
        return sum(tensor[:1].numel() for tensor in tensors(self.inputs))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for tensor in tensors((self.inputs, self.targets)))

    def __len__(self) -> int:
        return len(tensors(self.inputs)[0])

    def to(self, device: torch.device, dtype: torch.dtype) -> Split:
        """Return the split on a device, floating-point tensors in `dtype`."""
        moved = functools.partial(move, device=device, dtype=dtype)
        return Split(map_leaves(moved, self.inputs), map_leaves(moved, self.targets))

    def batches(self, indices: Sequence[Tensor], *, seed: int = 0) -> Iterator[Batch]:
        """Yield batches; see `Samples`."""
        sizes = [len(batch) for batch in indices]
        device = tensors(self.inputs)[0].device
        for batch in torch.cat(list(indices)).to(device, non_blocking=True).split(sizes):
            some = self.take(batch)
            yield Batch(some.inputs, some.targets, len(batch))

    def take(self, chosen: Tensor) -> Split:
        """Return some of the samples; see `Samples`."""

        def some(values: Tensor) -> Tensor:
            return values.index_select(0, chosen.to(values.device))

        return Split(map_tensors(some, self.inputs), map_tensors(some, self.targets))


def move(leaf: Any, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Move a leaf of a batch, such as a tensor or a batch of graphs, to a device; real numbers become `dtype`."""
    if isinstance(leaf, Tensor):
        other = dtype.to_complex() if leaf.is_complex() else dtype if leaf.is_floating_point() else None
        return leaf.to(device, other, non_blocking=True)
    return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf


def why_unusable(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be data: its layout, type or device; None if it can."""
    if tensor.is_quantized:
        return "a quantized tensor; call dequantize()"
    if tensor.layout != torch.strided:
        return f"{str(tensor.layout).removeprefix('torch.')}; call to_dense()"
    return "a tensor on meta, which has no values; load them" if tensor.device.type == "meta" else None


@dataclass(frozen=True)
class Metric:
    """A number that measures how good outputs are."""

    function: Any
    """(outputs, targets) -> a number; or an object with `update(outputs, targets)`, `compute()` and `reset()`, such as
    a metric of torchmetrics, which gets batch after batch."""
    direction: Direction
    per_batch: bool = False
    """Whether the metric of a split is the mean over its batches, weighted by their samples; else the function gets
    the outputs of the whole split, which are kept for it. `accuracy` is always computed batch by batch."""

    @property
    def keeps_outputs(self) -> bool:
        """Whether the function gets the outputs of a whole split."""
        return not (self.per_batch or self.accumulates or self.function is accuracy)

    @property
    def accumulates(self) -> bool:
        """Whether `function` is an object that gets batch after batch."""
        return all(callable(getattr(self.function, name, None)) for name in ("update", "compute", "reset"))


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
    loss: Callable[[Any, Any], Tensor]
    """(outputs, targets) -> the mean loss over the samples, a scalar. A module moves to the device with the data."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Name without a split, such as `accuracy`, to the metric."""
    preprocess: Callable[[Any], Any] | None = None
    """(inputs of a batch, as the data has them) -> the model's inputs, on the device; such as a normalisation."""
    augment: Callable[..., Any] | None = None
    """(inputs of a training batch, as the data has them; a generator of the same device) -> inputs changed at random;
    or (inputs, targets, generator) -> (inputs, targets), as mixup does. Called before `preprocess`, once for all
    trials."""
    collate: Callable[[list[Any]], Any] | None = None
    """(samples of a batch, as the data set has them) -> (inputs…, targets) of the batch, or one tree that is both; for
    samples of unlike shapes. None: samples are stacked."""
    order: Callable[[int, torch.Generator], Any] | None = None
    """(epoch counted from 0, a generator) -> the indices (sample,) of an epoch's training samples in their order, as
    many in each epoch; None: every sample once, shuffled."""

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
