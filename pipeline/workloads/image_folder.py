"""Workloads of images in one folder per class, for fine-tuning."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets.folder import IMG_EXTENSIONS

from pipeline.errors import DataError, InvalidInput, Problem, collect, first_line, listed
from pipeline.space.config import ImageFolder
from pipeline.workloads.data import MEMORY_SHARE, free_memory
from pipeline.workloads.image_file import check_image, read_image, white_value
from pipeline.workloads.images import Normalization, part_sizes, shift_and_flip, split_by_class
from pipeline.workloads.models import input_channels, model_builder
from pipeline.workloads.workload import Dataset, Metric, Split, Workload, accuracy

SPLIT_SEED = 0
"""Fixed, so that every search has the same test images, whatever its seed."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's pixels by channel, for which torchvision's weights were trained."""
MAX_SHIFT_DIVISOR = 8
"""An image is shifted by at most its side divided by this: 28 pixels of 224."""


@dataclass(frozen=True)
class Images:
    """Image files; each is read when its sample is asked for."""

    files: Sequence[str]
    labels: Tensor
    """(sample,)"""
    size: int
    """Pixels per side of the images that are read."""
    white: int = 255
    """Value of white in images of more than 8 bits per channel."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image (channel, height, width) of uint8: the middle square, resized.

        Raises:
            DataError: The image cannot be read.
        """
        file = self.files[index]
        try:
            return read_image(file, self.size, white=self.white), self.labels[index]
        except Exception as error:  # decoders raise exceptions of many classes
            raise DataError(_unreadable(file, error)) from error

    def select(self, indices: Tensor) -> Images:
        """Return some of the images."""
        files = [self.files[index] for index in indices.tolist()]
        return dataclasses.replace(self, files=files, labels=self.labels[indices])


def image_folder(choice: ImageFolder, *, memory: int | None = None) -> Workload:
    """Return the workload of a folder of images.

    At the beginning every file is checked for an image that can be read. If memory allows, all images are then read and
    kept.

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
    if _folders(root / "val"):
        folders = {name: root / name for name in ("train", "val", "test") if name != "test" or (root / name).is_dir()}
    elif _folders(root / "train"):
        raise _refusal([f"'{root}' has train but no val; add val, or give '{root / 'train'}' to split it"])
    else:
        folders = {"all": root}
    found = {name: {path.name: _image_files(path) for path in _folders(folder)} for name, folder in folders.items()}
    if wrong := [line for name, folder in folders.items() for line in _folder_problems(folder, found[name])]:
        raise _refusal(wrong)
    parts = {name: _images(files, choice.image_size) for name, files in found.items()}
    classes = list(next(iter(found.values())))
    if "all" in parts:
        return classes, _cut(choice, parts["all"], classes)
    if wrong := list(_class_problems(found)):
        raise _refusal(wrong)
    return classes, parts


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder in the order of their names, without those that begin with a dot."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path) -> list[str]:
    """Return the image files below a folder, in order; names that begin with a dot are left out."""
    files: list[tuple[str, str]] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [(place, name) for name in names if name.lower().endswith(IMG_EXTENSIONS) and name[0] != "."]
    return [str(Path(*file)) for file in sorted(files)]


def _images(classes: Mapping[str, Sequence[str]], size: int) -> Images:
    """Return the images of all classes, given the files of each."""
    labels = [label for label, files in enumerate(classes.values()) for _ in files]
    return Images([file for files in classes.values() for file in files], torch.tensor(labels), size)


def _folder_problems(folder: Path, classes: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the problems of a folder of classes, given the files of each."""
    if len(classes) < 2:
        only = f"only '{next(iter(classes))}'" if classes else "none"
        yield f"'{folder}' must have a folder of images for each of two or more classes, it has {only}"
    elif empty := [f"'{folder / name}'" for name, files in classes.items() if not files]:
        known = " ".join(IMG_EXTENSIONS)
        yield f"no image in {listed(empty)}; remove what is no class, or put images there ({known})"


def _class_problems(classes: Mapping[str, Collection[str]]) -> Iterator[str]:
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


def _read(parts: Mapping[str, Images], *, keep: bool) -> Mapping[str, Split | Dataset]:
    """Check every image in threads; return the splits, in memory if `keep`.

    Raises:
        InvalidInput: Some images cannot be read.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = list(pool.map(_largest_value, [file for images in parts.values() for file in images.files]))
        if broken := [line for line in checked if isinstance(line, str)]:
            raise _refusal(broken)
        white = white_value([value for value in checked if isinstance(value, int)])
        parts = {name: dataclasses.replace(images, white=white) for name, images in parts.items()}
        return {name: _kept(images, pool) for name, images in parts.items()} if keep else parts


def _largest_value(file: str) -> int | str:
    """Return what `check_image` returns, or in one line why the image cannot be read."""
    try:
        return check_image(file)
    except Exception as error:
        return _unreadable(file, error)


def _kept(images: Images, pool: ThreadPoolExecutor) -> Split:
    """Return images in memory.

    Raises:
        InvalidInput: Some images cannot be read.
    """
    pixels = torch.empty((len(images), 3, images.size, images.size), dtype=torch.uint8)

    def read(index: int) -> str | None:
        try:
            pixels[index] = images[index][0]
        except DataError as error:
            return str(error)
        return None

    if broken := [line for line in pool.map(read, range(len(images))) if line]:
        raise _refusal(broken)
    return Split(pixels, images.labels)


def _unreadable(file: str, error: Exception) -> str:
    return f"'{file}' cannot be read ({first_line(error)}); replace or remove it"


def _refusal(messages: Sequence[str]) -> InvalidInput:
    return InvalidInput("workload", [Problem("workload.folder", message) for message in messages])
