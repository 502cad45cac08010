"""Small files of the formats that image data sets come in, filled with random images."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets

Array = npt.NDArray[np.uint8]
Arrays = tuple[Array, Array]
"""Images (sample, channel, height, width), and labels (sample,)."""

MNIST_LIKE = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}


def random_images(name: str, samples: int, *, seed: int) -> Arrays:
    """Return images of a data set's shape, and labels that have each of its classes equally often."""
    random = np.random.default_rng(seed)
    shape = (1, 28, 28) if name in MNIST_LIKE else (3, 32, 32)
    labels = np.arange(samples) % (100 if name == "cifar100" else 10)
    return random.integers(0, 256, (samples, *shape), dtype=np.uint8), labels.astype(np.uint8)


def write_dataset(name: str, root: Path, train: Arrays, test: Arrays, patch: pytest.MonkeyPatch) -> None:
    """Write a data set as torchvision expects it in a folder.

    Where torchvision compares checksums with those of the original files, its list of them is replaced.
    """
    if name in MNIST_LIKE:
        folder = root / MNIST_LIKE[name] / "raw"
        folder.mkdir(parents=True)
        for prefix, (images, labels) in {"train": train, "t10k": test}.items():
            (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images[:, 0]))
            (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    elif name == "svhn":
        root.mkdir(exist_ok=True)
        for part, (images, labels) in {"train": train, "test": test}.items():
            ten_for_zero = np.where(labels == 0, 10, labels)[:, None]
            file = root / f"{part}_32x32.mat"
            scipy.io.savemat(file, {"X": images.transpose(2, 3, 1, 0), "y": ten_for_zero})
            patch.setitem(datasets.SVHN.split_list, part, ["", file.name, md5(file)])
    else:
        _write_cifar(getattr(datasets, name.upper()), root, train, test, patch)


def _write_cifar(cls: Any, root: Path, train: Arrays, test: Arrays, patch: pytest.MonkeyPatch) -> None:
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    key = "labels" if cls is datasets.CIFAR10 else "fine_labels"
    for files, (images, labels) in {"train_list": train, "test_list": test}.items():
        names = [name for name, _ in getattr(cls, files)]
        parts = zip(np.array_split(images, len(names)), np.array_split(labels, len(names)), strict=True)
        for name, (some, their_labels) in zip(names, parts, strict=True):
            content = {"data": some.reshape(len(some), -1), key: their_labels.tolist()}
            (folder / name).write_bytes(pickle.dumps(content))
        patch.setattr(cls, files, [[name, md5(folder / name)] for name in names])
    file = folder / cls.meta["filename"]
    file.write_bytes(pickle.dumps({cls.meta["key"]: [f"class {n}" for n in range(100 if key != "labels" else 10)]}))
    patch.setattr(cls, "meta", {**cls.meta, "md5": md5(file)})


def idx(array: Array) -> bytes:
    """Return the IDX format of an array of bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def compress(file: Path, folder: Path) -> Path:
    """Write a file's gzip to a folder."""
    packed = folder / f"{file.name}.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    return packed


def md5(file: Path) -> str:
    """Return a file's checksum."""
    return hashlib.md5(file.read_bytes()).hexdigest()


def write_photos(folder: Path, counts: Mapping[str, int], *, size: Sequence[int] = (40, 50), seed: int = 0) -> Path:
    """Write photos to a folder per class, PNG and JPEG in turns; a class has its own brightness."""
    random = np.random.default_rng(seed)
    for place, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for n in range(count):
            pixels = random.integers(0, 128, (*size, 3)) + place * 127 // max(1, len(counts) - 1)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{n:02}.{'jpg' if n % 2 else 'png'}")
    return folder
