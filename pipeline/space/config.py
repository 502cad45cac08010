"""TrialConfig: everything that one trial trains, as a frozen value; dict <-> config.

A config has the words of a search-space file, each hyperparameter with one value, so that what a search found can be
read, edited and trained by hand.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pipeline.space.limits import Interval
from pipeline.space.optimizers import OPTIMIZERS, Optimizer
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import SCHEDULERS, Scheduler

Precision = Literal["fp32", "tf32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Handwritten digits of 8×8 pixels, which need no file."""

    name: Literal["digits"] = "digits"
    model: Literal["cnn", "mlp"] = "cnn"

    @property
    def title(self) -> str:
        """Of an MLflow experiment."""
        return f"digits-{self.model}"


@dataclass(frozen=True, kw_only=True)
class TorchvisionDataset:
    """A data set of torchvision's."""

    name: Literal["mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "svhn"]
    model: str = "resnet9"
    """`small_cnn`, `resnet9`, or one of torchvision's classification models by its name there, such as `resnet18`. A
    ResNet of torchvision's begins with a 3×3 convolution and no pooling, as is usual for small images, unless its
    weights begin otherwise."""
    weights: str | None = None
    """To begin with: a name of torchvision's, such as `DEFAULT` or `IMAGENET1K_V1`, or the path of a state dict; the
    last layer is new if its number of classes is another."""
    folder: str = "data"
    """Where torchvision finds its files, and downloads them to."""
    download: bool = False
    """Download what is missing; else it is refused."""
    augment: bool = True
    """Whether training images are shifted and flipped at random, as is usual for the data set."""

    @property
    def title(self) -> str:
        """Of an MLflow experiment."""
        return f"{self.name}-{self.model}"


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Images in one folder per class, or such folders in `train`, `val` and perhaps `test`."""

    name: Literal["image_folder"] = "image_folder"
    folder: str
    model: str = "resnet18"
    """`small_cnn`, `resnet9`, or one of torchvision's classification models by its name there. A ResNet of
    torchvision's begins with a 3×3 convolution and no pooling for images of up to 64 pixels, unless its weights begin
    otherwise."""
    weights: str | None = None
    """To begin with: a name of torchvision's, such as `DEFAULT` or `IMAGENET1K_V1`, or the path of a state dict; the
    last layer is new if its number of classes is another."""
    image_size: Annotated[int, Interval(ge=8, le=4096)] = 224
    """Pixels per side of what the model sees."""
    augment: bool = True
    """Whether training images are cropped and flipped at random."""
    val_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.15
    """Of the images, where there is no folder `val`."""
    test_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.15
    """Of the images, where there is no folder `val`."""

    @property
    def title(self) -> str:
        """Of an MLflow experiment."""
        return f"{PurePath(self.folder).name or 'images'}-{self.model}"


@dataclass(frozen=True, kw_only=True)
class Own:
    """A workload that a function of a person's own returns; see `pipeline.workloads.Workload`."""

    name: Literal["own"] = "own"
    function: str
    """`path/to/file.py:function` or `package.module:function`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """By keyword, what the function is called with."""

    @property
    def title(self) -> str:
        """Of an MLflow experiment."""
        place, _, function = self.function.rpartition(":")
        return f"{PurePath(place).stem}-{function}"


WorkloadChoice = Digits | TorchvisionDataset | ImageFolder | Own
"""Which data and model to train."""

WORKLOADS: Mapping[str, type[Any]] = {
    "digits": Digits,
    **dict.fromkeys(("mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "svhn"), TorchvisionDataset),
    "image_folder": ImageFolder,
    "own": Own,
}
"""By `name`."""


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
    """Of the arithmetic in forward and backward passes: "tf32" lets a CUDA device round the factors of products to 10
    bits, "bf16" is `torch.autocast`; parameters stay float32."""
    deterministic: bool = False
    """Whether a CUDA device uses only algorithms that give the same numbers each time; a CPU always does."""
    channels_last: bool = False
    """Whether images, and the weights of convolutions of plain trials, lie in memory with the channels last; see
    https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html."""
    clip_grad_norm: Annotated[float, Interval(gt=0)] | None = None
    """Longest gradient of all trained parameters together, above 0; longer ones are shortened to it."""
    optimizer: Optimizer
    scheduler: Scheduler
    param_groups: Mapping[str, ParamGroup]
    """By name, in the order in which patterns are tried."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in the form of a search-space file; `from_dict` gives back an equal config."""
        return {
            "workload": _plain(self.workload),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "precision": self.precision,
            "deterministic": self.deterministic,
            **({"channels_last": True} if self.channels_last else {}),
            **({"clip_grad_norm": self.clip_grad_norm} if self.clip_grad_norm is not None else {}),
            "optimizer": {self.optimizer.name: _plain(self.optimizer)},
            "scheduler": {self.scheduler.name: _plain(self.scheduler)},
            "param_groups": {name: _plain(group) for name, group in self.param_groups.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialConfig:
        """Rebuild a config that `to_dict` wrote; what a person wrote goes through `pipeline.space.load.load_config`."""
        ((optimizer, optimizer_values),) = data["optimizer"].items()
        ((scheduler, scheduler_values),) = data["scheduler"].items()
        return cls(
            workload=WORKLOADS[data["workload"]["name"]](**data["workload"]),
            epochs=data["epochs"],
            batch_size=data["batch_size"],
            seed=data["seed"],
            precision=data["precision"],
            deterministic=data["deterministic"],
            channels_last=data.get("channels_last", False),
            clip_grad_norm=data.get("clip_grad_norm"),
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
        if self.clip_grad_norm is not None:
            flat["clip_grad_norm"] = self.clip_grad_norm
        return flat


def _plain(value: Any) -> dict[str, Any]:
    """Return a value's fields as a file has them: lists for tuples, nothing for None, which is each such default."""
    fields = dataclasses.asdict(value).items()
    return {key: list(item) if isinstance(item, tuple) else item for key, item in fields if item is not None}


def _frozen(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed of 63 bits that belongs to a purpose, such as ("order", epoch)."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
