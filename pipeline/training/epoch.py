"""What every trainer does in an epoch: record steps, seed random numbers, average losses, find divergence."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.space.config import TrialConfig, derive_seed
from pipeline.workloads.random_state import seed_global


@dataclass
class Record:
    """Values recorded in an epoch so far."""

    losses: list[Tensor] = field(default_factory=list)
    """Loss of each step: a scalar, or (row,)."""
    sizes: list[int] = field(default_factory=list)
    """Samples of each step."""
    rates: list[dict[str, float]] = field(default_factory=list)
    """Group name to learning rate of each step."""
    outputs: list[Tensor] = field(default_factory=list)
    """Outputs for each evaluated batch: (sample, …), or (row, sample, …)."""
    targets: list[Tensor] = field(default_factory=list)


def check_shapes(present: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes of a model's tensors with the names and shapes in a state.

    Raises:
        ValueError: A name or a shape differs.
    """
    now, before = ({name: tuple(value.shape) for name, value in tensors.items()} for tensors in (present, saved))
    for name in [*now, *before]:
        if now.get(name) != before.get(name):
            raise ValueError(f"{name} is {now.get(name, 'absent')} here and was {before.get(name, 'absent')}")


@contextlib.contextmanager
def seeded_step(seeded: bool, device: torch.device, seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed torch's global random states for a step, and restore them afterwards; do nothing unless `seeded`."""
    if not seeded:
        yield
        return
    with fork_rng(device):
        seed_global(derive_seed(seed, *purpose), device)
        yield


def autocast(config: TrialConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a config's forward passes."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if config.precision == "bf16" else contextlib.nullcontext()


def fork_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context that restores torch's global random states, of the CPU and of the device."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def mean_loss(losses: list[float], sizes: list[int]) -> float:
    """Return the mean of an epoch's losses, weighted by the number of samples of each step."""
    return sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)


def why_diverged(losses: list[float], metrics: Mapping[str, float], *, first_step: int, epoch: int) -> str | None:
    """Return where a trial's numbers stopped being finite; None if all are finite."""
    for step, loss in enumerate(losses, start=first_step):
        if not math.isfinite(loss):
            return f"the loss became {loss} at step {step}, in epoch {epoch}"
    if not math.isfinite(metrics["val/loss"]):
        return f"val/loss became {metrics['val/loss']} after epoch {epoch}"
    return None
