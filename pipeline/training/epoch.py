"""What every trainer does in an epoch: record steps, seed random numbers, average losses, find divergence."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import first_line
from pipeline.space.config import TrialConfig, derive_seed
from pipeline.training.contract import Diverged
from pipeline.workloads.random_state import seeded
from pipeline.workloads.trees import map_tensors, tensors


@dataclass
class Record:
    """Values recorded in an epoch so far."""

    losses: list[Any] = field(default_factory=list)
    """Loss of each batch, `noted`: a scalar, or (row,)."""
    sizes: list[int] = field(default_factory=list)
    """Samples of each batch."""
    rates: list[dict[str, float]] = field(default_factory=list)
    """Group name to learning rate of each step."""


def noted(values: Tensor) -> Any:
    """Return a few numbers to be kept until the end of an epoch: as they are, from a CPU as floats.

    On a CPU a small tensor that stays between large ones keeps the allocator from using their memory again: an epoch
    then takes as much as all its batches. On a GPU to look at a number is to wait for it.
    """
    return values.tolist() if values.device.type == "cpu" else values


def floats(values: Sequence[Any]) -> list[Any]:
    """Return what `noted` returned for each batch as floats, or lists of floats, in one transfer."""
    return torch.stack(tuple(values)).tolist() if isinstance(values[0], Tensor) else list(values)


@dataclass(frozen=True)
class Accumulation:
    """Which batches of an epoch make up each optimizer step."""

    accumulate: int
    """Batches per step."""
    batch_size: int
    samples: int
    """Samples of an epoch."""

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.samples // (self.batch_size * self.accumulate))

    def begins(self, batch: int) -> bool:
        """Return whether a batch, counted from 0, is the first of a step."""
        return batch % self.accumulate == 0

    def ends(self, batch: int) -> bool:
        """Return whether a batch is the last of a step."""
        return (batch + 1) % self.accumulate == 0 or (batch + 1) * self.batch_size >= self.samples

    def share(self, batch: int) -> float:
        """Return a batch's share of the samples of its step, by which its gradients count."""
        first = batch // self.accumulate * self.accumulate * self.batch_size
        in_step = min(self.accumulate * self.batch_size, self.samples - first)
        return min(self.batch_size, self.samples - batch * self.batch_size) / in_step


def check_shapes(present: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes of a model's tensors with the names and shapes in a state.

    Raises:
        ValueError: A name or a shape differs.
    """
    now, before = ({name: tuple(value.shape) for name, value in tensors.items()} for tensors in (present, saved))
    for name in [*now, *before]:
        if now.get(name) != before.get(name):
            raise ValueError(f"{name} is {now.get(name, 'absent')} here and was {before.get(name, 'absent')}")


def seeded_step(
    kinds: Collection[str], device: torch.device, seed: int, *purpose: str | int
) -> contextlib.AbstractContextManager[None]:
    """Return a context that seeds global random states for a step, and restores them afterwards.

    Args:
        kinds: The libraries that the model or the loss draws from, of `random_state.KINDS`.
        device: Where the model computes.
        seed: The config's.
        purpose: What the step is, and its number.
    """
    return seeded(derive_seed(seed, *purpose), device, kinds) if kinds else contextlib.nullcontext()


def autocast(config: TrialConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a config's forward passes."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if config.precision == "bf16" else contextlib.nullcontext()


def without_bf16(outputs: Any) -> Any:
    """Return outputs with float32 in place of bfloat16, for losses and metrics of an evaluation."""
    return map_tensors(lambda tensor: tensor.float() if tensor.dtype == torch.bfloat16 else tensor, outputs)


def loss_of(loss: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, *, step: int) -> Tensor:
    """Return the loss of a model's outputs, after `step` optimizer steps.

    Raises:
        Diverged: The loss raised on outputs that are not finite, as `F.binary_cross_entropy` does.
    """
    try:
        return loss(outputs, targets)
    except Exception as error:
        if not _are_infinite(outputs):
            raise
        message = f"the outputs became NaN or infinite after step {step}, and the loss raised {first_line(error)}"
        raise Diverged(message) from None


def _are_infinite(outputs: Any) -> bool:
    """Return whether a number of outputs is not finite; False within `vmap`, where numbers cannot be looked at."""
    try:
        return not all(bool(torch.isfinite(tensor).all()) for tensor in tensors(outputs))
    except RuntimeError:
        return False


def mean_loss(losses: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the mean of an epoch's losses, weighted by the number of samples of each batch."""
    return sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)


def rate_points(
    rates: Sequence[Mapping[str, float]], *, first_step: int, per_step: bool
) -> dict[str, tuple[tuple[int, float], ...]]:
    """Return group name to points (step, rate) of an epoch: one of each step, or of the last step alone.

    Args:
        rates: Group name to learning rate of each step.
        first_step: Number of the epoch's first optimizer step.
        per_step: Whether the schedule moves every step.
    """
    points = {name: tuple((first_step + n, step[name]) for n, step in enumerate(rates)) for name in rates[0]}
    return points if per_step else {name: group_points[-1:] for name, group_points in points.items()}


def why_diverged(
    losses: Sequence[float], metrics: Mapping[str, float], *, first_step: int, accumulate: int, epoch: int
) -> str | None:
    """Return where a trial's numbers stopped being finite; None if all are finite.

    Args:
        losses: Of each batch of the epoch.
        metrics: Of the epoch.
        first_step: Number of the epoch's first optimizer step.
        accumulate: Batches per optimizer step.
        epoch: Number of the epoch.
    """
    for batch, loss in enumerate(losses):
        if not math.isfinite(loss):
            return f"the loss became {loss} at step {first_step + batch // accumulate}, in epoch {epoch}"
    if not math.isfinite(metrics["val/loss"]):
        return f"val/loss became {metrics['val/loss']} after epoch {epoch}"
    return None
