"""TrialConfig: everything that decides what one trial trains, as a frozen value; dict <-> config.

A config uses the words of a search-space file, with one value for each hyperparameter, so that a person can read, edit
and train it by hand.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

from pipeline.space.limits import SEARCHABLE, Count, Interval, Positive, as_tuples
from pipeline.space.optimizers import Optimizer, make_optimizer
from pipeline.space.own_code import recorded_name
from pipeline.space.param_groups import ParameterRule, ParamGroup, TorchGroup, torch_groups
from pipeline.space.schedules import Scheduler, make_scheduler

Precision = Literal["fp32", "tf32", "bf16", "fp64"]


@dataclass(frozen=True, kw_only=True)
class WorkloadChoice:
    """The choice of data and model in a file: one class per workload, with a literal field `name`.

    `WORKLOADS` maps each value of `name` to its class. `loader` is imported only when the workload is loaded.
    """

    loader: ClassVar[str]
    """`module:function` that takes the choice and returns a `pipeline.workloads.workload.Workload`."""

    @property
    def title(self) -> str:
        """The name of the MLflow experiment."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Digits(WorkloadChoice):
    """Handwritten digits of 8×8 pixels, which need no file."""

    loader: ClassVar[str] = "pipeline.workloads.digits:load_digits"
    name: Literal["digits"] = "digits"
    model: Literal["cnn", "mlp"] = "cnn"
    train_samples: Annotated[int, Interval(ge=1, le=1795)] = 1257
    """Images to train on. Half of the rest validates, and half tests."""

    @property
    def title(self) -> str:
        """The name of the MLflow experiment."""
        return f"digits-{self.model}"


@dataclass(frozen=True, kw_only=True)
class TorchvisionDataset(WorkloadChoice):
    """A data set of torchvision."""

    loader: ClassVar[str] = "pipeline.workloads.torchvision_dataset:torchvision_dataset"
    name: Literal["mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "svhn"]
    model: str = "resnet9"
    """`small_cnn`, `resnet9`, or the name of a classification model of torchvision, such as `resnet18`. A ResNet of
    torchvision begins with a 3×3 convolution and no pooling, as is usual for small images, unless the weights need its
    own first layers."""
    weights: str | None = None
    """Initial weights: a name of torchvision, such as `DEFAULT` or `IMAGENET1K_V1`, or the path of a state dict. The
    last layer is new if the number of classes differs."""
    folder: str = "data"
    """Folder in which torchvision reads its files and saves downloads."""
    download: bool = False
    """Whether to download missing files; without it they are refused."""
    augment: bool = True
    """Whether training images are shifted and flipped at random, as is usual for the data set."""

    @property
    def title(self) -> str:
        """The name of the MLflow experiment."""
        return f"{self.name}-{self.model}"


@dataclass(frozen=True, kw_only=True)
class ImageFolder(WorkloadChoice):
    """Images in one folder per class, or such folders in `train`, `val` and perhaps `test`."""

    loader: ClassVar[str] = "pipeline.workloads.image_folder:image_folder"
    name: Literal["image_folder"] = "image_folder"
    folder: str
    """The folder that holds the folders of the classes."""
    model: str = "resnet18"
    """`small_cnn`, `resnet9`, or the name of a classification model of torchvision. A ResNet of torchvision begins with
    a 3×3 convolution and no pooling for images of up to 64 pixels, unless the weights need its own first layers."""
    weights: str | None = None
    """Initial weights: a name of torchvision, such as `DEFAULT` or `IMAGENET1K_V1`, or the path of a state dict. The
    last layer is new if the number of classes differs."""
    image_size: Annotated[int, Interval(ge=8, le=4096)] = 224
    """Pixels per side of the model's input."""
    augment: bool = True
    """Whether training images are cropped and flipped at random."""
    val_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.15
    """Fraction of the images for validation, if there is no folder `val`."""
    test_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.15
    """Fraction of the images for the test, if there is no folder `val`."""

    @property
    def title(self) -> str:
        """The name of the MLflow experiment."""
        return f"{PurePath(self.folder).name or 'images'}-{self.model}"


@dataclass(frozen=True, kw_only=True)
class Own(WorkloadChoice):
    """A `Workload` that a function of the user returns, or the training loop that the function is."""

    loader: ClassVar[str] = "pipeline.workloads.custom:custom_workload"
    name: Literal["own"] = "own"
    function: str
    """`path/to/file.py:function` or `package.module:function`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function."""

    @property
    def title(self) -> str:
        """The name of the MLflow experiment."""
        place, _, function = self.function.rpartition(":")
        return f"{PurePath(place).stem}-{function}"


WORKLOAD_CHOICES: tuple[type[WorkloadChoice], ...] = (Digits, TorchvisionDataset, ImageFolder, Own)
WORKLOADS: Mapping[str, type[WorkloadChoice]] = {
    name: cls for cls in WORKLOAD_CHOICES for name in get_args(get_type_hints(cls)["name"])
}
"""Each choice by the values of its `name`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The top-level settings of a config and of a search-space file.

    A setting is one field here, with its limits, default and description; the file's form, the search space, a sampled
    config and the record are derived from this class. A search may choose a setting that is marked `SEARCHABLE`.
    """

    epochs: Count
    """Passes over the training data per trial."""
    batch_size: Count = field(metadata=SEARCHABLE)
    """Samples per batch; the last batch of an epoch takes the rest. A search may choose among several sizes."""
    seed: Annotated[int, Interval(ge=0, le=2**32 - 1)] = 0
    """Decides proposals, initial weights, data order and dropout; the same for every trial of a search."""
    precision: Precision = "fp32"
    """Arithmetic of forward and backward passes: "tf32" lets a CUDA device round the factors of products to 10 bits,
    "bf16" is `torch.autocast`; parameters stay float32. "fp64" makes data, parameters and arithmetic double."""
    deterministic: bool = False
    """Whether a CUDA device uses only algorithms that give the same numbers each time; a CPU always does."""
    channels_last: bool = False
    """Whether images, and the convolution weights of plain trials, are stored with the channels last; see
    https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html."""
    accumulate: Count = 1
    """Batches whose gradients are averaged for one optimizer step; the last step of an epoch takes the rest."""
    ema: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """Decay per optimizer step of an exponential average of the parameters, which is validated, tested and saved in
    place of the last parameters."""
    clip_grad_norm: Positive | None = field(default=None, metadata=SEARCHABLE)
    """Largest norm of the gradient of all trained parameters together; a longer gradient is scaled down to it."""


SETTINGS = tuple(setting.name for setting in dataclasses.fields(Settings))
SEARCHABLE_SETTINGS = tuple(setting.name for setting in dataclasses.fields(Settings) if setting.metadata)


@dataclass(frozen=True, kw_only=True)
class TrialConfig(Settings):
    """Everything that decides what one trial trains; with the placement it decides every number on a CPU."""

    workload: WorkloadChoice
    optimizer: Optimizer
    scheduler: Scheduler
    param_groups: Mapping[str, ParamGroup]
    """Group name to group, in the order in which they are tried."""
    no_weight_decay: tuple[ParameterRule, ...] = ()
    """Parameters that any of the rules takes have no weight decay, in every group."""

    def torch_groups(self) -> dict[str, TorchGroup]:
        """Return the parameter groups of the torch optimizer by name."""
        return torch_groups(self.param_groups, self.no_weight_decay)

    @property
    def group_names(self) -> tuple[str, ...]:
        """The names under which learning rates are recorded: `head`, and `body.0`, `body.1`, … for layers."""
        return tuple(torch_groups(self.param_groups))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in the words of a search-space file; `from_dict` gives back an equal config."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        undecayed = [_plain(dataclasses.asdict(rule)) for rule in self.no_weight_decay]
        return {
            "workload": _plain(dataclasses.asdict(self.workload)),
            **{name: value for name, value in settings.items() if value is not None},
            "optimizer": {self.optimizer.name: _plain(self.optimizer.values())},
            "scheduler": {self.scheduler.name: _plain(self.scheduler.values())},
            "param_groups": {name: _plain(dataclasses.asdict(group)) for name, group in self.param_groups.items()},
            **({"no_weight_decay": undecayed} if undecayed else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialConfig:
        """Rebuild a config that `to_dict` wrote; `pipeline.space.load.load_config` reads what a person wrote."""
        ((optimizer, optimizer_values),) = data["optimizer"].items()
        ((scheduler, scheduler_values),) = data["scheduler"].items()
        return cls(
            workload=WORKLOADS[data["workload"]["name"]](**data["workload"]),
            **{name: data[name] for name in SETTINGS if name in data},
            optimizer=make_optimizer(optimizer, _frozen(optimizer_values)),
            scheduler=make_scheduler(scheduler, _frozen(scheduler_values)),
            param_groups={name: ParamGroup(**_frozen(group)) for name, group in data["param_groups"].items()},
            no_weight_decay=tuple(ParameterRule(**_frozen(rule)) for rule in data.get("no_weight_decay", ())),
        )

    def hyperparameters(self) -> dict[str, Any]:
        """Return every hyperparameter of the strategy in a flat dict, such as `base_lr` and `lr_ratio.head`."""
        flat: dict[str, Any] = {}
        for kind, owner in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            flat[kind] = owner.name
            flat |= {recorded_name(kind, owner.name, name): value for name, value in _plain(owner.values()).items()}
        for name, group in self.param_groups.items():
            flat[f"lr_ratio.{name}"] = group.lr_ratio
            if group.layer_decay is not None:
                flat[f"layer_decay.{name}"] = group.layer_decay
            if group.weight_decay is not None:
                flat[f"weight_decay.{name}"] = group.weight_decay
        settings = {name: getattr(self, name) for name in SEARCHABLE_SETTINGS}
        return flat | {name: value for name, value in settings.items() if value is not None}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as a file has them: lists for tuples; without None, which is always a default."""
    return {key: _lists(item) for key, item in values.items() if item is not None}


def _frozen(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: as_tuples(item) for key, item in values.items()}


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed of 63 bits for a purpose, such as ("order", epoch)."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
