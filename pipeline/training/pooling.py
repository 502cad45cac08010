"""Max-pooling with the channels last, for the forward passes of trials on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MIN_CHANNELS, MIN_VALUES = 4, 8192
"""Smallest images for which a copy costs less than it gains."""


class Pooling:
    """Contexts for the forward passes of one model, in which `F.max_pool2d` finds maxima with the channels last.

    PyTorch's `max_pool2d` for channels first is not vectorized (https://github.com/pytorch/pytorch/issues/51393).
    Maxima are bit-identical, and so are gradients where windows do not overlap. After a first forward pass without
    pooling, the contexts do nothing.

    Args:
        device: Where the model computes; elsewhere than on a CPU the contexts do nothing.
        channels_last: Whether images already lie in memory with the channels last; the contexts do nothing then.
    """

    def __init__(self, device: torch.device, *, channels_last: bool) -> None:
        self._mode = _ChannelsLast() if device.type == "cpu" and not channels_last else None

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the next forward pass."""
        if self._mode is None or (self._mode.called and not self._mode.pooled):
            return contextlib.nullcontext()
        return self._mode


class _ChannelsLast(TorchFunctionMode):
    """Replaces `F.max_pool2d`."""

    def __init__(self) -> None:
        super().__init__()
        self.called = False
        self.pooled = False

    def __torch_function__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        self.called = True
        options = options or {}
        if function is not F.max_pool2d:
            return function(*arguments, **options)
        self.pooled = True
        return _max_pool2d(*arguments, **options)


def _max_pool2d(images: Tensor, *arguments: Any, return_indices: bool = False, **options: Any) -> Any:
    """Return what `F.max_pool2d` does, from images (sample, channel, height, width)."""
    small = images.ndim != 4 or images.shape[1] < MIN_CHANNELS or images.numel() < MIN_VALUES
    if small or return_indices or len(arguments) > 5:  # the sixth argument is `return_indices`
        return F.max_pool2d(images, *arguments, return_indices=return_indices, **options)  # type: ignore[call-overload]
    with torch.no_grad():
        channels_last = images.detach().movedim(1, -1).contiguous().movedim(-1, 1)
        places: Tensor = F.max_pool2d(channels_last, *arguments, return_indices=True, **options)[1]
    maxima = images.flatten(-2).gather(-1, places.flatten(-2))
    return maxima.unflatten(-1, places.shape[-2:])
