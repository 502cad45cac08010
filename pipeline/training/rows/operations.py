"""Operations for which `torch.func.vmap` has a rule that does not suit rows on a CUDA device.

BatchNorm: the rule gives PyTorch's kernel a weight of the inputs' type, with which the kernel refuses statistics in
float32 beside inputs in bfloat16. The rule also multiplies by the weight in operations of their own.

Dropout: the rule draws other random numbers than the kernel that a model alone uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def operations_of_rows(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context for the forward pass of all rows within `vmap`; on a CPU the context does nothing."""
    return contextlib.nullcontext() if device.type == "cpu" else OfRows()


class OfRows(TorchFunctionMode):
    """Replaces `F.batch_norm` and `F.dropout` within `vmap`."""

    def __torch_function__(self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Any = None) -> Any:
        replaced = {F.batch_norm: _batch_norm, F.dropout: _dropout}.get(function, function)
        return replaced(*arguments, **(options or {}))


def _batch_norm(
    inputs: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    return _BatchNorm.apply(inputs, running_mean, running_var, weight, bias, training, momentum, eps)


def _dropout(inputs: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and 0 < p < 1 and not inplace:
        return _Dropout.apply(inputs, p)
    return F.dropout(inputs, p, training, inplace)


class _Operation(torch.autograd.Function):
    """An operation with a rule for `vmap`. Autograd sees the operations that the rule calls."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class _BatchNorm(_Operation):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return F.batch_norm(*arguments)

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


class _Dropout(_Operation):
    @staticmethod
    def forward(inputs: Tensor, p: float) -> Any:
        return F.dropout(inputs, p)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], inputs: Tensor, p: float) -> tuple[Tensor, int]:
        """Drop out of every row what the kernel drops out of a model alone; the kernel draws for one row."""
        inputs = _rows_at(0, inputs, in_dims[0], info.batch_size)
        kept = F.dropout(torch.ones_like(inputs[0]), p) != 0
        return inputs * kept * (1 / (1 - p)), 0


def _rows_at(axis: int, tensor: Tensor, dim: int | None, rows: int) -> Tensor:
    """Return a tensor with its axis of rows moved; a tensor that all rows share is repeated."""
    if dim is not None:
        return tensor.movedim(dim, axis)
    return tensor.unsqueeze(axis).expand(*tensor.shape[:axis], rows, *tensor.shape[axis:])
