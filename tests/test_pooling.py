"""Max-pooling with the channels last: the same maxima and gradients, in forward passes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from pipeline.training.pooling import Pooling

CPU = torch.device("cpu")
WINDOWS: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2)},
    {"kernel_size": 2, "stride": 3, "ceil_mode": True},
]


def images(*rows: int) -> Tensor:
    """Return images of few different values, so that maxima tie, one NaN among them."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 5, (*rows, 8, 6, 14, 14), generator=generator).double()
    values.view(-1)[77] = torch.nan
    return values


def pooled(values: Tensor, **window: Any) -> tuple[Tensor, Tensor]:
    """Return maxima and the gradient of a weighted sum of them."""
    values = values.clone().requires_grad_()
    pool = (
        vmap(lambda one: F.max_pool2d(one, **window)) if values.ndim == 5 else lambda one: F.max_pool2d(one, **window)
    )
    maxima = pool(values)
    weights = torch.linspace(-1, 1, maxima.numel(), dtype=maxima.dtype).view(maxima.shape)
    (gradient,) = torch.autograd.grad((maxima.nan_to_num() * weights).sum(), values)
    return maxima.detach(), gradient


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rows", [(), (3,)])
def test_maxima_and_gradients_are_pytorchs(window: dict[str, Any], rows: tuple[int, ...]) -> None:
    values = images(*rows)
    with Pooling(CPU, channels_last=False)():
        maxima, gradient = pooled(values, **window)
    expected, expected_gradient = pooled(values, **window)
    assert torch.equal(maxima.nan_to_num(-1), expected.nan_to_num(-1))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


class Noted(nn.Module):
    """Notes which functions PyTorch's own pooling is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Pool with places."""
        maxima, places = self.pool(values)
        return maxima, places


def test_pooling_that_returns_places_or_is_small_is_left_to_pytorch() -> None:
    pooling = Pooling(CPU, channels_last=False)
    with pooling():
        maxima, places = Noted()(images())
        small = F.max_pool2d(torch.ones(1, 1, 4, 4), 2)
        positional = F.max_pool2d(images(), 2, 2, 0, 1, False, True)
    assert torch.equal(places, positional[1])
    assert maxima.shape == (8, 6, 7, 7)
    assert torch.equal(small, torch.ones(1, 1, 2, 2))


def test_a_context_is_entered_for_pooling_models_on_a_cpu_alone() -> None:
    pooling = Pooling(CPU, channels_last=False)
    with pooling():
        F.relu(torch.ones(3))
    unused = pooling()
    assert not isinstance(unused, torch.overrides.TorchFunctionMode)
    for device, channels_last in ((torch.device("meta"), False), (CPU, True)):
        assert not isinstance(Pooling(device, channels_last=channels_last)(), torch.overrides.TorchFunctionMode)
