"""Handwritten digits: 1,797 images of 8×8 pixels, embedded in scikit-learn (UCI, Alpaydin and Kaynak, 1998)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import InvalidInput, Problem, did_you_mean
from pipeline.space.config import Digits
from pipeline.workloads.workload import Metric, Split, Workload, accuracy

SPLIT_SEED = 1797
"""Fixed, so that every search has the same test images, whatever its seed."""


class DigitsCNN(nn.Module):
    """Two convolutions with max-pooling and a linear head, 6,100 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(32 * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, class)."""
        features = F.max_pool2d(F.relu(self.conv1(images)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)
        logits: Tensor = self.fc(features.flatten(1))
        return logits


class DigitsMLP(nn.Module):
    """Two hidden layers of 64 units, 9,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(64, 64)
        self.hidden2 = nn.Linear(64, 64)
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, class)."""
        features = F.relu(self.hidden2(F.relu(self.hidden1(images.flatten(1)))))
        logits: Tensor = self.fc(features)
        return logits


MODELS: dict[str, type[nn.Module]] = {"cnn": DigitsCNN, "mlp": DigitsMLP}


def load_digits(choice: Digits) -> Workload:
    """Return the digits workload with the chosen model and number of training images."""
    return digits(choice.model, train_samples=choice.train_samples)


def digits(model: str = "cnn", *, train_samples: int = Digits.train_samples) -> Workload:
    """Return the digits workload: of 1,797 images, 1,257 to train on, 270 to validate, 270 to test.

    Args:
        model: One of `MODELS`.
        train_samples: Images to train on. Half of the rest validates, and half tests.

    Raises:
        InvalidInput: There is no such model.
    """
    if model not in MODELS:
        message = f"unknown model {model!r}; {did_you_mean(model, MODELS)}"
        raise InvalidInput("workload", [Problem("workload.model", message)])
    images, labels = _read_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test_samples = (len(order) - train_samples) // 2
    test, val, train = order.split([test_samples, len(order) - train_samples - test_samples, train_samples])
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return Workload(
        name=f"digits · {model}",
        build_model=MODELS[model],
        train=Split(images[train], labels[train]),
        val=Split(images[val], labels[val]),
        test=Split(images[test], labels[test]),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
    )


def _read_digits() -> tuple[Tensor, Tensor]:
    """Return images (sample, 1, 8, 8) within [0, 1] and labels (sample,).

    The file belongs to scikit-learn, whose `load_digits` returns the same values and takes over a second to import.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, delimiter=","))
    return table[:, :-1].float().view(-1, 1, 8, 8) / 16, table[:, -1].long()
