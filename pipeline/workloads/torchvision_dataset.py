"""Workloads of torchvision's data sets, read by torchvision's classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pipeline.errors import InvalidInput, Problem, collect, first_line
from pipeline.space.config import TorchvisionDataset
from pipeline.workloads.images import Normalization, shift_and_flip, split_by_class
from pipeline.workloads.models import input_channels, model_builder
from pipeline.workloads.workload import Metric, Split, Workload, accuracy

SPLIT_SEED = 0
"""Fixed, so that every search has the same validation images, whatever its seed."""
VAL_FRACTION = 0.1
"""Part of torchvision's training set that validates."""
DOWNLOAD = "--set workload.download=true"


@dataclass(frozen=True)
class _Facts:
    """Facts about a data set."""

    cls: str
    """Name of the class in `torchvision.datasets`."""
    classes: int
    shape: tuple[int, int, int]
    """(channel, height, width)"""
    mean: tuple[float, ...]
    """Mean of the training set's pixels within [0, 1], by channel; `std` is their deviation."""
    std: tuple[float, ...]
    padding: int
    """Most pixels by which an image is shifted."""
    flip: bool
    """Whether a mirrored image belongs to the same class; false for digits and letters."""


FACTS = {
    "mnist": _Facts("MNIST", 10, (1, 28, 28), (0.1307,), (0.3081,), padding=2, flip=False),
    "fashion_mnist": _Facts("FashionMNIST", 10, (1, 28, 28), (0.2860,), (0.3530,), padding=2, flip=True),
    "kmnist": _Facts("KMNIST", 10, (1, 28, 28), (0.1918,), (0.3483,), padding=2, flip=False),
    "cifar10": _Facts(
        "CIFAR10", 10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), padding=4, flip=True
    ),
    "cifar100": _Facts(
        "CIFAR100", 100, (3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), padding=4, flip=True
    ),
    "svhn": _Facts("SVHN", 10, (3, 32, 32), (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), padding=4, flip=False),
}


def torchvision_dataset(choice: TorchvisionDataset) -> Workload:
    """Return a data set's workload: 10 % of torchvision's training set to validate, its test set to test.

    Raises:
        InvalidInput: Files are missing or damaged, or the model is not available.
    """
    facts = FACTS[choice.name]
    channels = input_channels(choice.model, facts.shape[0])
    problems: list[Problem] = []
    with collect(problems):
        build_model = model_builder(
            choice.model, classes=facts.classes, channels=channels, image_size=facts.shape[1], weights=choice.weights
        )
    with collect(problems):
        known, test = (_read(choice, facts, train=train) for train in (True, False))
    if problems:
        raise InvalidInput("workload", problems)
    val, train = split_by_class(known.targets, [VAL_FRACTION], seed=SPLIT_SEED)
    repeats = channels // facts.shape[0]
    return Workload(
        name=f"{choice.name} · {choice.model}",
        build_model=build_model,
        train=Split(known.inputs[train], known.targets[train]),
        val=Split(known.inputs[val], known.targets[val]),
        test=test,
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
        preprocess=Normalization(facts.mean * repeats, facts.std * repeats),
        augment=shift_and_flip(facts.padding, flip=facts.flip) if choice.augment else None,
    )


def _read(choice: TorchvisionDataset, facts: _Facts, *, train: bool) -> Split:
    """Return torchvision's training or test set as images (sample, channel, height, width) of uint8, and labels."""
    from torchvision import datasets

    cls = getattr(datasets, facts.cls)
    split: dict[str, Any] = {"split": "train" if train else "test"} if choice.name == "svhn" else {"train": train}
    folder = Path(choice.folder).expanduser()
    try:
        read = cls(folder, download=choice.download, **split)
    except Exception as error:  # from the network, the file system, or a damaged file
        raise InvalidInput("workload", _problems(cls, folder, error, downloading=choice.download)) from None
    images = torch.as_tensor(read.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images
    images = images.permute(0, 3, 1, 2) if choice.name.startswith("cifar") else images
    labels = torch.as_tensor(read.labels if choice.name == "svhn" else read.targets).long()
    if problem := _shape_problem(folder, facts, images, labels):
        raise InvalidInput("workload", [problem])
    return Split(images.contiguous(), labels)


def _shape_problem(folder: Path, facts: _Facts, images: torch.Tensor, labels: torch.Tensor) -> Problem | None:
    """Return the problem of arrays that torchvision has read without checking them."""
    found = tuple(images.shape[1:])
    if found != facts.shape:
        message = f"images of {facts.cls} in {folder} must be {facts.shape} (channel, height, width), got {found}"
    elif len(images) != len(labels) or not len(images):
        message = f"{facts.cls} in {folder} must have a label per image, got {len(images)} images, {len(labels)} labels"
    else:
        return None
    return Problem("workload.folder", message)


def _problems(cls: type[Any], folder: Path, error: Exception, *, downloading: bool) -> Iterator[Problem]:
    """Yield which files are missing or damaged."""
    files = {folder / name: damage for name, damage in _files(cls).items()}
    missing = [str(path.relative_to(folder)) for path in files if not path.is_file()]
    damaged = {path: why for path, damage in files.items() if path.is_file() and (why := damage(path))}
    if missing:
        remedy = f"put them there, or download them with {DOWNLOAD}"
        if downloading:
            reason = " ".join(str(error).split())[:200]
            remedy = f"they cannot be downloaded ({reason}); put them there"
        message = f"{cls.__name__} needs files that are missing in '{folder}': {', '.join(missing)}; {remedy}"
        yield Problem("workload.folder", message)
    for path, why in damaged.items():
        message = f"{path} is damaged ({why}); remove it, then put it there anew, or download it with {DOWNLOAD}"
        yield Problem("workload.folder", message)
    if not missing and not damaged:
        yield Problem("workload.folder", f"{cls.__name__} cannot be read from {folder}: {first_line(error)}")


def _files(cls: type[Any]) -> Mapping[str, Callable[[Path], str | None]]:
    """Return the paths of the files that torchvision reads, each with a function that says what is wrong with it."""
    from torchvision import datasets

    if issubclass(cls, datasets.MNIST):
        names = [name.removesuffix(".gz") for name, _ in cls.resources]
        return {f"{cls.__name__}/raw/{name}": _unreadable for name in names}
    if issubclass(cls, datasets.SVHN):
        known = {name: md5 for _, name, md5 in (cls.split_list["train"], cls.split_list["test"])}
    else:
        meta = (cls.meta["filename"], cls.meta["md5"])
        known = {f"{cls.base_folder}/{name}": md5 for name, md5 in (*cls.train_list, *cls.test_list, meta)}
    return {name: functools.partial(_other_checksum, md5=md5) for name, md5 in known.items()}


def _unreadable(path: Path) -> str | None:
    """Say why a file of the MNIST family cannot be read; torchvision compares no checksum of these files."""
    from torchvision.datasets import mnist

    try:
        (mnist.read_image_file if "images" in path.name else mnist.read_label_file)(path)
    except Exception as error:
        return first_line(error)
    return None


def _other_checksum(path: Path, *, md5: str) -> str | None:
    from torchvision.datasets.utils import check_integrity

    return None if check_integrity(path, md5) else "its checksum is another"
