"""TrialConfig: everything that one trial trains, as a frozen value; dict <-> config.

A config has the words of a search-space file, each hyperparameter with one value, so that what a search found can be
read, edited and trained by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.strategy import OPTIMIZERS, SCHEDULERS, Optimizer, ParamGroup, Scheduler

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class WorkloadChoice:
    """Which data and model to train."""

    name: str = "digits"
    model: str = "cnn"


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """What one trial trains, complete: the same config gives the same numbers on the same CPU."""

    workload: WorkloadChoice
    epochs: int
    """Passes over the training data, at least 1."""
    batch_size: int
    """Samples per optimizer step; the last step of an epoch takes what is left."""
    seed: int
    """Decides initial weights, data order and dropout; the same for every trial of a search."""
    precision: Precision = "fp32"
    """Of the arithmetic in forward and backward passes: "bf16" is `torch.autocast`; parameters stay float32."""
    optimizer: Optimizer
    scheduler: Scheduler
    param_groups: Mapping[str, ParamGroup]
    """By name, in the order in which patterns are tried."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in the form of a search-space file; `from_dict` gives back an equal config."""
        return {
            "workload": dataclasses.asdict(self.workload),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "precision": self.precision,
            "optimizer": {self.optimizer.name: _plain(self.optimizer)},
            "scheduler": {self.scheduler.name: _plain(self.scheduler)},
            "param_groups": {name: _plain(group) for name, group in self.param_groups.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialConfig:
        """Rebuild a config that `to_dict` wrote; what a person wrote goes through `pipeline.space.load_config`."""
        ((optimizer, optimizer_values),) = data["optimizer"].items()
        ((scheduler, scheduler_values),) = data["scheduler"].items()
        return cls(
            workload=WorkloadChoice(**data["workload"]),
            epochs=data["epochs"],
            batch_size=data["batch_size"],
            seed=data["seed"],
            precision=data["precision"],
            optimizer=OPTIMIZERS[optimizer](**_frozen(optimizer_values)),
            scheduler=SCHEDULERS[scheduler](**_frozen(scheduler_values)),
            param_groups={name: ParamGroup(**_frozen(group)) for name, group in data["param_groups"].items()},
        )

    def hyperparameters(self) -> dict[str, Any]:
        """Return every hyperparameter of the strategy by the name a person looks for, in a flat dict."""
        flat: dict[str, Any] = {"optimizer": self.optimizer.name, **_plain(self.optimizer)}
        flat |= {"scheduler": self.scheduler.name, **_plain(self.scheduler)}
        for name, group in self.param_groups.items():
            flat[f"lr_ratio.{name}"] = group.lr_ratio
            if group.weight_decay is not None:
                flat[f"weight_decay.{name}"] = group.weight_decay
        return flat


def _plain(value: Any) -> dict[str, Any]:
    """Return a value's fields as a file has them: lists for tuples, nothing for None, which is each such default."""
    fields = dataclasses.asdict(value).items()
    return {key: list(item) if isinstance(item, tuple) else item for key, item in fields if item is not None}


def _frozen(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}
