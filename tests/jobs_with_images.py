"""Training jobs with images, as people have them; the images are random and tiny."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from pipeline.workloads.workload import Metric, Split, Workload, accuracy


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(samples: int, *, channels: int = 1, size: int = 8, seed: int) -> Tensor:
    """Return images (sample, channel, row, column) with values from 0 to 1."""
    return torch.rand(samples, channels, size, size, generator=generator(seed))


def brightness(pictures: Tensor, *, classes: int) -> Tensor:
    """Return labels (sample,): images by how bright their upper half is, in classes of equal size."""
    upper = pictures[:, :, : pictures.shape[2] // 2].mean(dim=(1, 2, 3))
    return upper.argsort().argsort() * classes // len(pictures)


class Digits(nn.Module):
    """PyTorch's MNIST example: two convolutions, dropout, log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = torch.flatten(self.dropout1(F.max_pool2d(x, 2)), 1)
        return F.log_softmax(self.fc2(self.dropout2(F.relu(self.fc1(x)))), dim=1)


def mnist_example() -> Workload:
    train, val = images(40, seed=0), images(20, seed=1)
    return Workload(
        name="MNIST example",
        build_model=Digits,
        train=TensorDataset(train, brightness(train, classes=3)),
        val=TensorDataset(val, brightness(val, classes=3)),
        loss=F.nll_loss,
        metrics={"accuracy": Metric(accuracy, "maximize")},
        preprocess=lambda x: (x - 0.1307) / 0.3081,
    )


class VariationalAutoencoder(nn.Module):
    """PyTorch's VAE example."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(64, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.fc3, self.fc4 = nn.Linear(4, 16), nn.Linear(16, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = F.relu(self.fc1(x.view(-1, 64)))
        mu, log_variance = self.fc21(hidden), self.fc22(hidden)
        std = torch.exp(0.5 * log_variance)
        z = mu + torch.randn_like(std) * std
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, log_variance


def elbo(outputs: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    reconstruction, mu, log_variance = outputs
    entropy = F.binary_cross_entropy(reconstruction, x.view(-1, 64), reduction="sum")
    divergence = -0.5 * torch.sum(1 + log_variance - mu.pow(2) - log_variance.exp())
    return (entropy + divergence) / len(x)


def vae() -> Workload:
    return Workload(
        name="VAE",
        build_model=VariationalAutoencoder,
        train=Split(images(40, seed=0)),
        val=Split(images(20, seed=1)),
        loss=elbo,
    )


class Pairs(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Pairs of images, and whether both are of one class."""

    def __init__(self, samples: int, *, seed: int) -> None:
        self.images = images(samples, seed=seed)
        self.labels = brightness(self.images, classes=2)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        other = (index * 7 + 1) % len(self)
        return self.images[index], self.images[other], (self.labels[index] == self.labels[other]).float()


class Siamese(nn.Module):
    """Compares two images by the features of one network."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        both = torch.cat([self.features(one), self.features(other)], dim=1)
        alike: Tensor = self.head(both).squeeze(1)
        return alike


def siamese() -> Workload:
    return Workload(
        name="siamese",
        build_model=Siamese,
        train=Pairs(40, seed=0),
        val=Pairs(20, seed=1),
        loss=nn.BCELoss(),
        metrics={
            "accuracy": Metric(lambda alike, targets: ((alike > 0.5) == (targets > 0.5)).float().mean(), "maximize")
        },
    )


class UNet(nn.Module):
    """One level down, one level up, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = self.block(1, 4), self.block(4, 8)
        self.up, self.last = nn.ConvTranspose2d(8, 4, 2, stride=2), self.block(8, 4)
        self.head = nn.Conv2d(4, 3, 1)

    @staticmethod
    def block(channels: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)
        up = self.up(self.deep(F.max_pool2d(down, 2)))
        logits: Tensor = self.head(self.last(torch.cat([down, up], dim=1)))
        return logits


def mean_iou(outputs: Tensor, targets: Tensor, *, classes: int = 3, ignored: int = 255) -> Tensor:
    """Return the mean over classes of intersection over union, over all pixels of a split that are not ignored."""
    counted = targets != ignored
    predicted, wanted = outputs.argmax(dim=1)[counted], targets[counted]
    confusion = torch.bincount(predicted * classes + wanted, minlength=classes**2).view(classes, classes)
    intersection = confusion.diag()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - intersection
    return (intersection / union.clamp(min=1)).mean()


def segmentation() -> Workload:
    def split(samples: int, *, seed: int) -> Split:
        pictures = images(samples, seed=seed)
        masks = (pictures[:, 0] * 3).long()
        masks[:, 0] = 255  # the border has no label
        return Split(pictures, masks)

    return Workload(
        name="segmentation",
        build_model=UNet,
        train=split(24, seed=0),
        val=split(12, seed=1),
        loss=nn.CrossEntropyLoss(ignore_index=255),
        metrics={"iou": Metric(mean_iou, "maximize")},
    )


class Boxes(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images, each with its own number of boxes and labels."""

    def __init__(self, samples: int, *, seed: int) -> None:
        self.images = images(samples, seed=seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        count = 1 + index % 3
        corners = torch.tensor([[n, n, n + 4, n + 4] for n in range(count)], dtype=torch.float32)
        return self.images[index], {"boxes": corners, "labels": torch.arange(count) % 2}


class Detector(nn.Module):
    """Takes images and targets, as torchvision's detectors do, and returns a dict of losses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 16), nn.ReLU())
        self.box, self.label = nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        features = self.body(torch.stack(images))
        counts = torch.tensor([len(target["labels"]) for target in targets])
        features = features.repeat_interleave(counts, dim=0)
        boxes = torch.cat([target["boxes"] for target in targets]) / 8
        labels = torch.cat([target["labels"] for target in targets])
        return {
            "boxes": F.smooth_l1_loss(self.box(features), boxes),
            "labels": F.cross_entropy(self.label(features), labels),
        }


def images_and_targets(samples: list[Any]) -> tuple[list[Tensor], list[Any], None]:
    pictures, targets = zip(*samples, strict=True)
    return list(pictures), list(targets), None


def detection() -> Workload:
    return Workload(
        name="detection",
        build_model=Detector,
        train=Boxes(24, seed=0),
        val=Boxes(12, seed=1),
        loss=lambda losses, _: sum(losses.values()),
        collate=images_and_targets,
    )


def label_smoothing() -> Workload:
    train, val = images(40, seed=0), images(20, seed=1)
    return Workload(
        name="label smoothing",
        build_model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 3)),
        train=Split(train, brightness(train, classes=3)),
        val=Split(val, brightness(val, classes=3)),
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        metrics={"accuracy": Metric(accuracy, "maximize")},
    )


def mixed(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mix each image and its label with another one's; Zhang et al. (2018), https://arxiv.org/abs/1710.09412."""
    share = torch.rand(len(x), 1, device=x.device, generator=generator)
    other = torch.randperm(len(x), device=x.device, generator=generator)
    labels = F.one_hot(y, 3).to(x.dtype)
    pixels = share.view(-1, 1, 1, 1)
    return pixels * x + (1 - pixels) * x[other], share * labels + (1 - share) * labels[other]


def mixup() -> Workload:
    train, val = images(40, seed=0), images(20, seed=1)
    return Workload(
        name="mixup",
        build_model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)),
        train=Split(train, brightness(train, classes=3)),
        val=Split(val, brightness(val, classes=3)),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
        augment=mixed,
    )


class TwoViews(Dataset[dict[str, Tensor]]):
    """Two random views of each image, and no target."""

    def __init__(self, samples: int, *, seed: int) -> None:
        self.images = images(samples, seed=seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: self.images[index] + 0.1 * torch.randn(1, 8, 8) for name in ("one", "other")}


class Contrastive(nn.Module):
    """Projects two views of the same images."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.encoder(one), dim=1), F.normalize(self.encoder(other), dim=1)


def nt_xent(outputs: tuple[Tensor, Tensor], _: Any, *, temperature: float = 0.5) -> Tensor:
    """Return the normalised temperature-scaled cross entropy; Chen et al. (2020), https://arxiv.org/abs/2002.05709."""
    views = torch.cat(outputs)
    count = len(views)
    similarity = views @ views.T / temperature
    similarity = similarity.masked_fill(torch.eye(count, dtype=torch.bool, device=views.device), float("-inf"))
    return F.cross_entropy(similarity, torch.arange(count, device=views.device).roll(count // 2))


def contrastive() -> Workload:
    return Workload(
        name="contrastive",
        build_model=Contrastive,
        train=TwoViews(40, seed=0),
        val=TwoViews(20, seed=1),
        loss=nt_xent,
    )
