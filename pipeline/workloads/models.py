"""Build models for images by name: `small_cnn`, `resnet9`, and torchvision's classifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import InvalidInput, Problem, did_you_mean, first_line
from pipeline.workloads.pretrained import fit, read_pretrained

SMALL_IMAGE = 64
"""Pixels per side up to which a torchvision ResNet begins with a 3×3 convolution of stride 1 and no pooling."""
FRESH_ONLY = ("googlenet", "inception_v3")
"""Models whose pretrained weights need inputs on another scale."""


class SmallCNN(nn.Module):
    """Three convolutions, each with BatchNorm and max-pooling, and a linear head; 95,000 parameters for 10 classes."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(channels, 32)
        self.conv2 = _ConvNorm(32, 64)
        self.conv3 = _ConvNorm(64, 128)
        self.fc = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, channel, height, width) to logits (batch, class)."""
        features = F.max_pool2d(self.conv1(images), 2)
        features = F.max_pool2d(self.conv2(features), 2)
        logits: Tensor = self.fc(self.conv3(features).mean(dim=(2, 3)))
        return logits


class ResNet9(nn.Module):
    """Eight convolutions, two residual blocks and a linear head; 6.6 million parameters for 10 classes.

    Page (2018), https://myrtle.ai/learn/how-to-train-your-resnet/, with BatchNorm as PyTorch has it.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.prep = _ConvNorm(channels, 64)
        self.layer1 = _ConvNorm(64, 128)
        self.residual1 = nn.Sequential(_ConvNorm(128, 128), _ConvNorm(128, 128))
        self.layer2 = _ConvNorm(128, 256)
        self.layer3 = _ConvNorm(256, 512)
        self.residual3 = nn.Sequential(_ConvNorm(512, 512), _ConvNorm(512, 512))
        self.fc = nn.Linear(512, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, channel, height, width) to logits (batch, class)."""
        features = F.max_pool2d(self.layer1(self.prep(images)), 2)
        features = features + self.residual1(features)
        features = F.max_pool2d(self.layer2(features), 2)
        features = F.max_pool2d(self.layer3(features), 2)
        features = features + self.residual3(features)
        logits: Tensor = 0.125 * self.fc(features.amax(dim=(2, 3)))
        return logits


class _ConvNorm(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(features)))


OURS: dict[str, Callable[[int, int], nn.Module]] = {"small_cnn": SmallCNN, "resnet9": ResNet9}


def input_channels(model: str, channels: int) -> int:
    """Return how many channels a model's input has: torchvision's models need three, whatever the images have."""
    return channels if model in OURS else 3


def model_builder(
    model: str, *, classes: int, channels: int, image_size: int, weights: str | None
) -> Callable[[], nn.Module]:
    """Return a function that builds a model, after building it once and trying an image.

    Args:
        model: `small_cnn`, `resnet9`, or a name of `torchvision.models`.
        classes: Number of classes, the length of the output.
        channels: Channels of the input, see `input_channels`.
        image_size: Pixels per side of the input.
        weights: Pretrained weights, see `read_pretrained`; read once. A last layer for another number of classes is
            not loaded. Layers that are not loaded begin with fresh weights from torch's global random state.

    Raises:
        InvalidInput: The model is unknown or cannot take such images, or the weights are not available or not the
            model's.
    """
    if model not in (names := (*OURS, *_torchvision_names())):
        message = f"unknown model {model!r}; {did_you_mean(model, names)}"
        raise InvalidInput("workload", [Problem("workload.model", message)])
    if weights is not None and model in FRESH_ONLY:
        message = f"must be absent with {model}, whose pretrained weights are for inputs on another scale"
        raise InvalidInput("workload", [Problem("workload.weights", message)])
    state = None if weights is None else read_pretrained(model, weights)

    def build_fresh() -> nn.Module:
        if model in OURS:
            return OURS[model](channels, classes)
        return _build_torchvision(model, classes, image_size, small_stem=_has_small_stem(state, image_size))

    tried = _try(model, build_fresh, torch.zeros(1, channels, image_size, image_size))
    if state is None:
        return build_fresh
    loaded = fit(state, tried, source=f"{weights} of {model}")

    def build_pretrained() -> nn.Module:
        built = build_fresh()
        with torch.no_grad():
            for name, tensor in built.state_dict().items():
                if name in loaded:
                    tensor.copy_(loaded[name])
        return built

    return build_pretrained


def _torchvision_names() -> list[str]:
    from torchvision import models

    return list(models.list_models(module=models))


def _build_torchvision(model: str, classes: int, image_size: int, *, small_stem: bool) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {"num_classes": classes}
    if model in FRESH_ONLY:  # with auxiliary classifiers they would return several outputs
        options |= {"aux_logits": False, "init_weights": False}
    elif model.startswith("vit_"):
        options["image_size"] = image_size
    elif model.startswith("maxvit_"):
        options["input_size"] = (image_size, image_size)
    built: nn.Module = models.get_model(model, **options)
    if small_stem and isinstance(built, models.ResNet):
        built.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(built.conv1.weight, mode="fan_out", nonlinearity="relu")
        built.maxpool = nn.Identity()
    return built


def _has_small_stem(state: Mapping[str, Tensor] | None, image_size: int) -> bool:
    """Say whether a ResNet begins with a 3×3 convolution: as its weights do, or without weights for small images."""
    if state is None or "conv1.weight" not in state:
        return image_size <= SMALL_IMAGE
    return state["conv1.weight"].shape[2:] == (3, 3)


def _try(model: str, build: Callable[[], nn.Module], image: Tensor) -> nn.Module:
    """Build a model and try an image: many networks refuse small images, or images of most sizes."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            built = build()
            built.eval()(image)
        except Exception as error:  # networks raise exceptions of many classes
            pixels = f"{image.shape[2]}×{image.shape[3]}"
            message = f"{model} cannot take images of {pixels} pixels ({first_line(error)}); use another model or size"
            raise InvalidInput("workload", [Problem("workload.model", message)]) from None
    return built
