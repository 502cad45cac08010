"""Show what a trained model takes and gives, by a few samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.workloads.build import run_model
from pipeline.workloads.data import model_batch, samples_of
from pipeline.workloads.loop import Loop
from pipeline.workloads.workload import Workload

SAMPLES = 2


@torch.no_grad()
def example_of(workload: Workload | Loop, model: nn.Module) -> tuple[Any, Any] | None:
    """Return inputs and outputs of a model as arrays (sample, …).

    Args:
        workload: A workload that was moved by `to_device`, or a training loop.
        model: A model of the workload, on the CPU and in evaluation mode.

    Returns:
        None if there are several inputs or outputs, or for a training loop, whose data is not seen.
    """
    if isinstance(workload, Loop):
        return None
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    samples = samples_of(workload, "val")
    (batch,) = samples.batches([torch.arange(min(SAMPLES, len(samples)))], seed=0)
    inputs = model_batch(workload, batch, dtype, channels_last=False, seed=0).map(lambda leaf: leaf.cpu()).inputs
    if not isinstance(inputs, Tensor):
        return None
    outputs = run_model(model, inputs)
    return (inputs.numpy(), outputs.numpy()) if isinstance(outputs, Tensor) else None
