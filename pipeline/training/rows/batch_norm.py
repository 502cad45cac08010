"""BatchNorm of all rows in one call of PyTorch's kernel, for a device that is not a CPU.

The rule of `torch.func.vmap` gives the kernel a weight of the inputs' type, with which a CUDA device refuses statistics
in float32 beside inputs in bfloat16. The rule also multiplies by the weight in operations of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def batch_norm_of_rows(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context for the forward pass of all rows within `vmap`; on a CPU the context does nothing."""
    return contextlib.nullcontext() if device.type == "cpu" else InOneCall()


class InOneCall(TorchFunctionMode):
    """Replaces `F.batch_norm` within `vmap`."""

    def __torch_function__(self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Any = None) -> Any:
        if function is not F.batch_norm:
            return function(*arguments, **(options or {}))
        return _batch_norm(*arguments, **(options or {}))


def _batch_norm(
    inputs: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    normalized: Tensor = _BatchNorm.apply(inputs, running_mean, running_var, weight, bias, training, momentum, eps)
    return normalized


class _BatchNorm(torch.autograd.Function):
    """`F.batch_norm`, with a rule for `vmap`; autograd sees what the rule calls."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return F.batch_norm(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], inputs: Tensor, *arguments: Any) -> tuple[Tensor, int]:
        """Fold the rows into the channels: inputs (sample, row * channel, …), and the others (row * channel,)."""
        rows = info.batch_size
        inputs = _rows_at(1, inputs, in_dims[0], rows).flatten(1, 2)
        mean, var, weight, bias = (
            None if values is None else _rows_at(0, values, dim, rows).flatten()
            for values, dim in zip(arguments[:4], in_dims[1:5], strict=True)
        )
        normalized = F.batch_norm(inputs, mean, var, weight, bias, *arguments[4:])
        return normalized.unflatten(1, (rows, -1)), 1


def _rows_at(axis: int, tensor: Tensor, dim: int | None, rows: int) -> Tensor:
    """Return a tensor with its axis of rows moved; a tensor that all rows share is repeated."""
    if dim is not None:
        return tensor.movedim(dim, axis)
    return tensor.unsqueeze(axis).expand(*tensor.shape[:axis], rows, *tensor.shape[axis:])
