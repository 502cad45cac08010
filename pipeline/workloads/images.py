"""What workloads of images share: normalisation and augmentation of batches on the device, and splits by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class Normalization:
    """Turns images of 8 bits into what a model sees: (value / 255 - mean) / std, channel by channel.

    Images of one channel become as many channels as there are means.

    Args:
        mean: Of each channel, within [0, 1].
        std: Of each channel.
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

    What it returns maps images (batch, channel, height, width) and a generator of their device to changed images, each
    sample in its own way. He et al. (2016), https://arxiv.org/abs/1512.03385, section 4.2.

    Args:
        padding: Pixels per side, which is also the longest shift.
        flip: Whether left and right may change places.
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
    """Split samples at random so that each class is split alike.

    Args:
        labels: (sample,)
        fractions: Of each part but the last; a part whose fraction is above 0 has at least one sample of each class.
        seed: Decides which.

    Returns:
        The indices of each part's samples (sample,), ascending; the last part has the rest.
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
    """Return how many samples of a class of `count` each part has; fewer than 1 in the last if there are too few."""
    sizes = [max(1, round(fraction * count)) if fraction else 0 for fraction in fractions]
    return [*sizes, count - sum(sizes)]
