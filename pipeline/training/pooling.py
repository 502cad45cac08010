"""Max-pooling with the channels last, for the forward passes of trials on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

MIN_CHANNELS, MIN_VALUES = 4, 8192
"""Smallest images for which channels last saves more time than its two copies take."""
_ATEN: Any = torch.ops.aten


class Pooling:
    """Contexts for the forward passes of one model, in which `F.max_pool2d` computes with the channels last in memory.

    PyTorch's `max_pool2d` for channels first is not vectorized (https://github.com/pytorch/pytorch/issues/51393): with
    two copies, channels last takes half the time. Maxima and gradients are bit-identical. After a first forward pass
    without pooling the context does nothing.

    Args:
        device: Where the model computes; elsewhere than on a CPU the context does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._mode = _ChannelsLast() if device.type == "cpu" else None

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the next forward pass."""
        if self._mode is None or (self._mode.called and not self._mode.pooled):
            return contextlib.nullcontext()
        return self._mode


class _ChannelsLast(TorchFunctionMode):
    """Replaces `F.max_pool2d` of images that are large enough."""

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


def _max_pool2d(
    images: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Return the result of `F.max_pool2d`; images are (sample, channel, height, width)."""
    small = images.ndim != 4 or images.shape[1] < MIN_CHANNELS or images.numel() < MIN_VALUES
    if small or return_indices or not images.is_floating_point():
        return F.max_pool2d(images, kernel_size, stride, padding, dilation, ceil_mode, return_indices)  # type: ignore[call-overload]
    sizes = [_pair(size) for size in (kernel_size, kernel_size if stride is None else stride, padding, dilation)]
    return _Pool.apply(images, *sizes, ceil_mode)[0]


class _Pool(torch.autograd.Function):
    """Maxima of images (sample, channel, height, width), computed with the channels last, and their indices."""

    @staticmethod
    def forward(images: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        fast = images.contiguous(memory_format=torch.channels_last)
        maxima, indices = _ATEN.max_pool2d_with_indices(fast, *options)
        if fast is images:
            return maxima, indices
        return maxima.contiguous(), indices.contiguous()

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        images, *context.options = inputs
        context.save_for_backward(images, output[1])
        context.mark_non_differentiable(output[1])

    @staticmethod
    def backward(context: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        images, indices = context.saved_tensors
        image_gradient = _ATEN.max_pool2d_with_indices_backward(gradient, images, *context.options, indices)
        return image_gradient, *[None] * len(context.options)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int], images: Tensor, *options: Any) -> Any:
        images = images.movedim(in_dims[0], 0)
        pooled = _Pool.apply(images.flatten(0, 1), *options)
        return tuple(values.unflatten(0, images.shape[:2]) for values in pooled), (0, 0)
