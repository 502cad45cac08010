"""One model computed with the parameters and buffers of many rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.func import vmap

from pipeline.training.pooling import Pooling

Function = Callable[[Callable[[Tensor], Tensor]], Tensor]
"""Computes something of a model."""
_Slot = tuple[dict[str, Tensor | None], str, str]
"""A module's dict of parameters or buffers, the key of a tensor in the dict, and the tensor's name in the model."""


class RowModel:
    """Computes a function of a model for each row; all rows draw the same random numbers.

    Args:
        model: Computes with the tensors of rows in place of its own parameters and buffers.
        names: Parameters and buffers that differ between rows; rows share the others.
        pooling: Context of forward passes.
    """

    def __init__(self, model: nn.Module, names: Collection[str], pooling: Pooling) -> None:
        self._model = model
        self._slots = [slot for slot in _slots(model) if slot[2] in names]
        self._pooling = pooling

    def __call__(
        self,
        function: Function,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> Tensor:
        """Return the value of a function of each row's model, (row, …).

        Args:
            function: Takes the model.
            parameters: Name to (row, *shape).
            buffers: Name to (row, *shape); the model updates them in place.
        """
        rows = len(next(iter(parameters.values())))
        if rows == 1:  # `vmap` would only be slower
            tensors = {name: tensor.view(tensor.shape[1:]) for name, tensor in {**parameters, **buffers}.items()}
            return self._compute(function, tensors).unsqueeze(0)

        def one(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
            return self._compute(function, {**parameters, **buffers})

        values: Tensor = vmap(one, randomness="same")(parameters, buffers)
        return values

    def _compute(self, function: Function, tensors: Mapping[str, Tensor]) -> Tensor:
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
