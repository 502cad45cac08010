"""A problem small enough for tests: 37 samples of 6 numbers in 3 classes, and a model with a body and a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.space.config import Own, TrialConfig
from pipeline.space.optimizers import SGD, Optimizer
from pipeline.space.param_groups import ParamGroup
from pipeline.space.placement import PlacementRules
from pipeline.space.schedules import Constant, Scheduler
from pipeline.workloads.data import to_device
from pipeline.workloads.workload import Metric, Split, Workload, accuracy

SAMPLES = 37
BATCH = 8
STEPS_PER_EPOCH = 5
"""Four batches of 8 and one of 5."""

ONE_GROUP = {"all": ParamGroup(pattern=("*",))}
RULES = PlacementRules(device="cpu", plain_because={"8:": None, "8:body": None})
"""Placement rules for a study that is not trained."""
BODY_AND_HEAD = {"head": ParamGroup(pattern=("head.*",)), "body": ParamGroup(pattern=("*",))}


class TinyModel(nn.Module):
    """One hidden layer of 8 units."""

    def __init__(self, *, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        logits: Tensor = self.head(self.dropout(F.relu(self.norm(self.hidden(inputs)))))
        return logits


def tiny_workload(build_model: Callable[[], nn.Module] = TinyModel) -> Workload:
    """Return the problem as a workload; validation and test splits have 20 samples each."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(6, 3, generator=generator)

    def split(samples: int) -> Split:
        inputs = torch.randn(samples, 6, generator=generator)
        noise = torch.randn(samples, 3, generator=generator)
        return Split(inputs, (inputs @ truth + noise).argmax(dim=1))

    return Workload(
        name="tiny",
        build_model=build_model,
        train=split(SAMPLES),
        val=split(20),
        test=split(20),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
    )


def on_device(workload: Workload, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Workload:
    """Return a workload with its data on the device, as trainers take it."""
    return to_device(workload, device=device, dtype=dtype)


def tiny_config(
    optimizer: Optimizer | None = None, scheduler: Scheduler | None = None, *, epochs: int = 4, **changes: Any
) -> TrialConfig:
    """Return a config for the problem: by default plain SGD at a constant rate of 0.1."""
    values: dict[str, Any] = {
        "workload": Own(function="tiny:tiny_workload"),
        "batch_size": BATCH,
        "seed": 0,
        "param_groups": BODY_AND_HEAD,
    }
    return TrialConfig(
        optimizer=optimizer or SGD(base_lr=0.1), scheduler=scheduler or Constant(), epochs=epochs, **values | changes
    )
