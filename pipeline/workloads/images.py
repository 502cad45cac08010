"""Normalise and augment batches of images on the device, and split samples by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class Normalization:
    """Maps 8-bit images to a model's inputs: (value / 255 - mean) / std, channel by channel.

    An image of one channel is repeated for each mean.

    Args:
        mean: One value within [0, 1] per channel.
        std: One value per channel, of pixels within [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean = 255 * torch.tensor(mean).view(-1, 1, 1)
        self._scale = 1 / (255 * torch.tensor(std).view(-1, 1, 1))

    def __call__(self, images: Tensor) -> Tensor:
        """Map images (batch, channel, height, width) of uint8 to float32."""
        if self._mean.device != images.device:
            self._mean, self._scale = self._mean.to(images.device), self._scale.to(images.device)
        return (images.float() - self._mean) * self._scale


def shift_and_flip(padding: int, *, flip: bool) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Return an augmentation: pad images with zeros, crop them at random, and mirror half of them if `flip`.

    The augmentation maps images (batch, channel, height, width) and a generator of the same device to images of the
    same shape; every sample has its own shift. He et al. (2016), https://arxiv.org/abs/1512.03385, section 4.2.

    Args:
        padding: Pixels per side, which is also the longest shift.
        flip: Whether half of the images are mirrored left to right.
    """

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        (count, _, height, width), device = images.shape, images.device
        top, left = torch.randint(2 * padding + 1, (2, count), generator=generator, device=device)
        crops = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = crops[torch.arange(count, device=device), :, top, left]
        if not flip:
            return images
        flipped = torch.rand(count, generator=generator, device=device) < 0.5
        return torch.where(flipped[:, None, None, None], images.flip(3), images)

    return augment


def split_by_class(labels: Tensor, fractions: Sequence[float], *, seed: int) -> list[Tensor]:
    """Split samples at random, each class by the same fractions.

    Args:
        labels: (sample,)
        fractions: One per part except the last; a fraction above 0 gives at least one sample of each class.
        seed: Decides which samples each part gets.

    Returns:
        One tensor of ascending indices (sample,) per part; the last part has the remaining samples.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in (*fractions, 1.0)]
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        for part, some in zip(parts, members.split(part_sizes(len(members), fractions)), strict=True):
            part.append(some)
    return [torch.cat(part).sort().values for part in parts]


def part_sizes(count: int, fractions: Sequence[float]) -> list[int]:
    """Return how many of a class's `count` samples each part gets; the last part is below 1 if `count` is too low."""
    sizes = [max(1, round(fraction * count)) if fraction else 0 for fraction in fractions]
    return [*sizes, count - sum(sizes)]
