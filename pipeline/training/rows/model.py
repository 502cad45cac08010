"""One model computed with the parameters and buffers of many rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from pipeline.training.pooling import Pooling
from pipeline.training.rows.operations import operations_of_rows
from pipeline.workloads.trees import map_tensors, with_tensors
from pipeline.workloads.trees import tensors as tensors_of

Function = Callable[[nn.Module], Any]
"""Computes a tree of tensors with a model."""
_Slot = tuple[dict[str, Tensor | None], str, str]
"""A module's dict of parameters or buffers, the key of a tensor in the dict, and the tensor's name in the model."""


class RowModel:
    """Computes a function of a model for each row; all rows draw the same random numbers.

    Args:
        model: Computes with the tensors of rows in place of its own parameters and buffers.
        names: Parameters and buffers that differ between rows; rows share the others.
        pooling: Context of forward passes.
        device: Where the model computes.
    """

    def __init__(self, model: nn.Module, names: Collection[str], pooling: Pooling, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._slots = [slot for slot in _slots(model) if slot[2] in names]
        self._pooling = pooling

    def __call__(
        self,
        function: Function,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> Any:
        """Return the value of a function of each row's model: a tree of tensors (row, …).

        Args:
            function: Takes the model.
            parameters: Name to (row, *shape).
            buffers: Name to (row, *shape); the model updates them in place.
        """
        rows = len(next(iter(parameters.values())))
        if rows == 1:  # `vmap` would only be slower
            tensors = {name: tensor.view(tensor.shape[1:]) for name, tensor in {**parameters, **buffers}.items()}
            return map_tensors(lambda tensor: tensor.unsqueeze(0), self._compute(function, tensors))
        trees = []

        def one(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            with operations_of_rows(self._device):
                trees.append(self._compute(function, {**parameters, **buffers}))
            return tuple(tensors_of(trees[0]))

        values = vmap(one, randomness="same")(parameters, buffers)
        return with_tensors(trees[0], values)

    def _compute(self, function: Function, tensors: Mapping[str, Tensor]) -> Any:
        with _replaced(self._slots, tensors), self._pooling():
            return function(self._model)


def _slots(model: nn.Module) -> list[_Slot]:
    """Return every slot of a parameter or buffer in the modules of a model; a shared tensor has several."""
    names: dict[int, str] = {}
    slots = []
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None:
                    name = names.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                    slots.append((held, key, name))
    return slots


@contextlib.contextmanager
def _replaced(slots: Sequence[_Slot], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the tensors of a model, and restore them afterwards.

    `torch.func.functional_call` takes ten times longer, and does not restore the tensors of a module that is registered
    under two names.
    """
    originals = [(held, key, held[key]) for held, key, _ in slots]
    try:
        for held, key, name in slots:
            held[key] = tensors[name]
        yield
    finally:
        for held, key, tensor in originals:
            held[key] = tensor
