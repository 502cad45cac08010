"""One model computed with the parameters and buffers of many rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.func import vmap

from pipeline.training.pooling import Pooling

Function = Callable[[Callable[[Tensor], Tensor]], Tensor]
"""Computes something of a model."""
_Place = tuple[dict[str, Tensor | None], str, str]
"""A module's parameters or buffers, a tensor's name there, and the tensor's name in the model."""


class RowModel:
    """Computes a function of a model for each row; all rows draw the same random numbers.

    Args:
        model: Its parameters and buffers are replaced by those of rows while it computes.
        names: Parameters and buffers that each row has for itself; the others are shared.
        pooling: Context of forward passes.
    """

    def __init__(self, model: nn.Module, names: Collection[str], pooling: Pooling) -> None:
        self._model = model
        self._places = [place for place in _places(model) if place[2] in names]
        self._pooling = pooling

    def __call__(
        self,
        function: Function,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> Tensor:
        """Return what a function makes of each row's model, (row, …).

        Args:
            function: Takes the model.
            parameters: By name, (row, *shape).
            buffers: By name, (row, *shape); changed as the model changes them.
        """
        rows = len(next(iter(parameters.values())))
        if rows == 1:  # which `vmap` would only make slower
            lone = {name: tensor.view(tensor.shape[1:]) for name, tensor in {**parameters, **buffers}.items()}
            return self._computed(function, lone).unsqueeze(0)

        def one(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
            return self._computed(function, {**parameters, **buffers})

        values: Tensor = vmap(one, randomness="same")(parameters, buffers)
        return values

    def _computed(self, function: Function, tensors: Mapping[str, Tensor]) -> Tensor:
        with _holding(self._places, tensors), self._pooling():
            return function(self._model)


def _places(model: nn.Module) -> list[_Place]:
    """Return every place in which the modules of a model hold a parameter or buffer; some are held in several."""
    names: dict[int, str] = {}
    places = []
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for own, tensor in held.items():
                if tensor is not None:
                    name = names.setdefault(id(tensor), f"{prefix}.{own}" if prefix else own)
                    places.append((held, own, name))
    return places


@contextlib.contextmanager
def _holding(places: Sequence[_Place], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model compute with other tensors than its own.

    `torch.func.functional_call` takes ten times longer, and leaves the tensors in a module that is registered under
    two names.
    """
    kept = [(held, own, held[own]) for held, own, _ in places]
    try:
        for held, own, name in places:
            held[own] = tensors[name]
        yield
    finally:
        for held, own, tensor in kept:
            held[own] = tensor
