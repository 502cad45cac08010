"""Faster kernels give PyTorch's own numbers, and only where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import tiny_config
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from pipeline.training.precision import arithmetic
from pipeline.training.rows.kernels import channels_last_pooling, cross_entropy_of_rows

IMAGES = {
    "large": (64, 16, 8, 8),
    "odd": (7, 37, 11, 13),
    "few channels": (64, 2, 16, 16),
    "small": (2, 8, 6, 6),
    "no batch": (32, 32, 32),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "halving": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 2, "padding": 1},
    "every option": {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 0), "dilation": 2, "ceil_mode": True},
}


def images(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return images with equal values side by side, which leave open where the maximum lies, and one that is NaN."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(2).round().to(dtype)
    values.view(-1)[5] = torch.nan
    return values.requires_grad_()


def pooled(values: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Return maxima, their places and a gradient."""
    maxima, places = F.max_pool2d(values, **options, return_indices=True)
    weights = torch.randn(maxima.shape, generator=torch.Generator().manual_seed(1)).to(maxima.dtype)
    (gradient,) = torch.autograd.grad((F.max_pool2d(values, **options) * weights).sum(), values)
    return [maxima.detach(), places, gradient]


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pooling_with_the_channels_last_gives_the_same_bits_and_layout(
    shape: str, options: str, dtype: torch.dtype
) -> None:
    values = images(IMAGES[shape], dtype)
    expected = pooled(values, OPTIONS[options])
    with channels_last_pooling():
        found = pooled(values, OPTIONS[options])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(99), other.nan_to_num(99))
        assert one.stride() == other.stride()


def test_one_of_two_threads_may_be_done_with_pooling_before_the_other() -> None:
    values = images(IMAGES["large"], torch.float32)
    expected = F.max_pool2d(values, 2)
    first, second = channels_last_pooling(), channels_last_pooling()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(F.max_pool2d(values, 2).nan_to_num(99), expected.nan_to_num(99))
    second.__exit__(None, None, None)
    assert "kernels.py" not in torch._C._dispatch_dump("aten::max_pool2d_with_indices")


@arithmetic(tiny_config(), torch.device("cpu"))
def fail_while_training() -> None:
    """Raise with the kernel in place."""
    assert "kernels.py" in torch._C._dispatch_dump("aten::max_pool2d_with_indices")
    raise ZeroDivisionError


def test_pooling_is_pytorchs_own_again_after_training() -> None:
    with pytest.raises(ZeroDivisionError):
        fail_while_training()
    assert "kernels.py" not in torch._C._dispatch_dump("aten::max_pool2d_with_indices")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_of_rows_is_that_of_each(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 33, 10, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(10, (33,), generator=generator)
    targets[3] = -100
    expected = torch.stack([F.cross_entropy(row, targets) for row in logits])
    found = cross_entropy_of_rows(logits, targets)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), logits) for value in (found, expected)))
    assert torch.equal(found[2:3], cross_entropy_of_rows(logits[2:3], targets))


def test_cross_entropy_of_rows_without_a_class_is_undefined_as_pytorchs_is() -> None:
    nothing = torch.full((4,), -100)
    assert cross_entropy_of_rows(torch.zeros(2, 4, 3), nothing).isnan().all()
    assert vmap(F.cross_entropy, in_dims=(0, None))(torch.zeros(2, 4, 3), nothing).isnan().all()
