"""Workloads of images in one folder per class, for fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import datasets
from torchvision.transforms.v2 import functional as transforms

from pipeline.errors import InvalidInput, Problem, collect, first_line, listed
from pipeline.space.config import ImageFolder
from pipeline.workloads.data import MEMORY_SHARE, free_memory
from pipeline.workloads.images import Normalization, part_sizes, shift_and_flip, split_by_class
from pipeline.workloads.models import input_channels, model_builder
from pipeline.workloads.workload import Dataset, Metric, Split, Workload, accuracy

SPLIT_SEED = 0
"""Fixed, so that every search has the same test images, whatever its seed."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's pixels by channel, for which torchvision's weights were trained."""
MAX_SHIFT_DIVISOR = 8
"""An image is shifted by at most its side divided by this: 28 pixels of 224."""
IMAGES_SHOWN = 20
"""Unreadable images that a message names."""


@dataclass(frozen=True)
class Images:
    """Image files; each is read when its sample is asked for."""

    files: Sequence[str]
    labels: Tensor
    """(sample,)"""
    size: int
    """Pixels per side of the images that are read."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image (channel, height, width) of uint8: the middle square, resized."""
        with Image.open(self.files[index]) as file:
            file.draft("RGB", (2 * self.size, 2 * self.size))  # decodes a JPEG no larger than needed
            image = transforms.resize(_rgb(file), [self.size])
        image = transforms.center_crop(image, [self.size, self.size])
        return transforms.pil_to_tensor(image), self.labels[index]

    def select(self, indices: Tensor) -> Images:
        """Return some of the images."""
        return Images([self.files[index] for index in indices.tolist()], self.labels[indices], self.size)


def _rgb(image: Image.Image) -> Image.Image:
    """Return an image of 8 bits per channel; Pillow would turn 16-bit pixels above 255 of 65,535 white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")


def image_folder(choice: ImageFolder, *, memory: int | None = None) -> Workload:
    """Return the workload of a folder of images.

    Every image is read once at the beginning, to find unreadable ones, and kept if memory allows.

    Args:
        choice: The folder, the model and how images are split.
        memory: Bytes that images may take; None: a quarter of the free memory. Images that take more are read from
            their files in every epoch.

    Raises:
        InvalidInput: The folder or an image cannot be used, or the model is not available.
    """
    try:
        classes, parts = _find(choice)
    except OSError as error:
        raise _refusal([f"'{choice.folder}' cannot be read: {error.strerror}"]) from None
    memory = int(MEMORY_SHARE * free_memory(torch.device("cpu"))) if memory is None else memory
    keep = 3 * choice.image_size**2 * sum(len(part) for part in parts.values()) <= memory
    problems: list[Problem] = []
    with collect(problems):
        build_model = model_builder(
            choice.model,
            classes=len(classes),
            channels=input_channels(choice.model, 3),
            image_size=choice.image_size,
            weights=choice.weights,
        )
    with collect(problems):
        splits = _read(parts, keep=keep)
    if problems:
        raise InvalidInput("workload", problems)
    return Workload(
        name=f"{Path(choice.folder).name} · {choice.model}",
        build_model=build_model,
        train=splits["train"],
        val=splits["val"],
        test=splits.get("test"),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
        preprocess=Normalization(MEAN, STD),
        augment=shift_and_flip(choice.image_size // MAX_SHIFT_DIVISOR, flip=True) if choice.augment else None,
    )


def _find(choice: ImageFolder) -> tuple[list[str], dict[str, Images]]:
    """Return the classes, and the images of each split.

    Raises:
        InvalidInput: Folders are missing, or have no images or other classes.
    """
    root = Path(choice.folder).expanduser()
    if not root.is_dir():
        raise _refusal([f"there is no folder '{root}'; give one with --set workload.folder=…"])
    if _holds_folders(root / "val"):
        folders = {name: root / name for name in ("train", "val", "test") if name != "test" or (root / name).is_dir()}
    elif _holds_folders(root / "train"):
        raise _refusal([f"'{root}' has train but no val; add val, or give '{root / 'train'}' to split it"])
    else:
        folders = {"all": root}
    if wrong := [line for folder in folders.values() for line in _folder_problems(folder)]:
        raise _refusal(wrong)
    found = {name: datasets.ImageFolder(folder) for name, folder in folders.items()}
    parts = {
        name: Images([file for file, _ in images.samples], torch.tensor(images.targets), choice.image_size)
        for name, images in found.items()
    }
    classes = next(iter(found.values())).classes
    if "all" in parts:
        return classes, _cut(choice, parts["all"], classes)
    if wrong := list(_class_problems({name: images.classes for name, images in found.items()})):
        raise _refusal(wrong)
    return classes, parts


def _holds_folders(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() for path in folder.iterdir())


def _folder_problems(folder: Path) -> Iterator[str]:
    """Yield the problems of a folder of classes."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(classes) < 2:
        only = f"only '{classes[0].name}'" if classes else "none"
        yield f"'{folder}' must have a folder of images for each of two or more classes, it has {only}"
        return
    images = datasets.ImageFolder(folder, allow_empty=True)
    empty = [f"'{folder / name}'" for name, label in images.class_to_idx.items() if label not in images.targets]
    if empty:
        known = " ".join(datasets.folder.IMG_EXTENSIONS)
        yield f"no image in {listed(empty)}; remove what is no class, or put images there ({known})"


def _class_problems(classes: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the differences between the classes of a split and those of the training images."""
    train = classes["train"]
    for name, others in classes.items():
        for one, two, absent in ((name, "train", set(others) - set(train)), ("train", name, set(train) - set(others))):
            if absent:
                yield f"train and {name} must have the same classes; only {one} has {listed(sorted(absent))}, not {two}"


def _cut(choice: ImageFolder, images: Images, classes: Sequence[str]) -> dict[str, Images]:
    """Split images at random, class by class.

    Raises:
        InvalidInput: A class has too few images.
    """
    fractions = [choice.val_fraction, choice.test_fraction]
    if sum(fractions) >= 1:
        message = f"val_fraction and test_fraction must be below 1 together, got {sum(fractions):g}"
        raise InvalidInput("workload", [Problem("workload.val_fraction", message)])
    counts = torch.bincount(images.labels).tolist()
    few = [
        f"'{name}' ({count})"
        for name, count in zip(classes, counts, strict=True)
        if part_sizes(count, fractions)[-1] < 1
    ]
    if few:
        raise _refusal(
            [
                f"too few images to train, validate and test on each: {listed(few)}; add some, or lower "
                "val_fraction or test_fraction"
            ]
        )
    val, test, train = split_by_class(images.labels, fractions, seed=SPLIT_SEED)
    parts = {"train": train, "val": val, "test": test}
    return {name: images.select(indices) for name, indices in parts.items() if len(indices)}


def _read(parts: Mapping[str, Images], *, keep: bool) -> dict[str, Split | Dataset]:
    """Read every image once, in threads; return the splits, in memory if `keep`.

    Raises:
        InvalidInput: Some images cannot be read.
    """
    splits: dict[str, Split | Dataset] = {}
    broken: list[str] = []
    for name, images in parts.items():
        shape = (len(images) if keep else 0, 3, images.size, images.size)
        pixels = torch.empty(shape, dtype=torch.uint8)

        def read(index: int, images: Images = images, pixels: Tensor = pixels) -> str | None:
            try:
                image, _ = images[index]
            except Exception as error:  # decoders raise exceptions of many classes
                return f"'{images.files[index]}' cannot be read ({first_line(error)}); replace or remove it"
            if keep:
                pixels[index] = image
            return None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            broken += [line for line in pool.map(read, range(len(images))) if line]
        splits[name] = Split(pixels, images.labels) if keep else images
    if len(broken) > IMAGES_SHOWN:
        broken = [*broken[:IMAGES_SHOWN], f"{len(broken) - IMAGES_SHOWN} more images cannot be read"]
    if broken:
        raise _refusal(broken)
    return splits


def _refusal(messages: Sequence[str]) -> InvalidInput:
    return InvalidInput("workload", [Problem("workload.folder", message) for message in messages])
