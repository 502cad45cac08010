"""Build a workload's model from a seed, and compute it on a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InvalidInput, Problem
from pipeline.space.config import derive_seed
from pipeline.workloads.random_state import seeded
from pipeline.workloads.workload import Workload


def built_model(workload: Workload, *, seed: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build a model with fresh weights on a device; the random states of torch, Python and NumPy stay as they are.

    Args:
        workload: Supplies `build_model`.
        seed: The config's; decides the weights.
        device: Where the model computes.
        dtype: float64 makes every parameter and buffer double, or complex double; float32 leaves all as they are built.

    Raises:
        InvalidInput: `build_model` returned something else than a module.
    """
    with seeded(derive_seed(seed, "weights")):
        model = workload.build_model()
    if not isinstance(model, nn.Module):
        message = f"build_model must return a torch.nn.Module, got {type(model).__name__}"
        raise InvalidInput("workload", [Problem("workload", message)])
    model = model.to(device)
    return model._apply(_doubled) if dtype == torch.float64 else model


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Return a model's outputs for a batch: a dict gives the arguments by name, a tuple one by one."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if type(inputs) is tuple else model(inputs)


def _doubled(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor
