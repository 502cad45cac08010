"""One model computed with the parameters and buffers of many rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.func import vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_NOTHING: AbstractContextManager[Any] = contextlib.nullcontext()
_PRODUCTS = {
    *(F.linear, F.bilinear, torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.mv),
}
"""Functions that multiply their first argument by later ones: with a factor that all rows share, `vmap` makes one
product of all rows, whose kernel depends on how many they are."""
_Place = tuple[dict[str, Tensor | None], str, str]
"""A module's parameters or buffers, the name that one has there, and the name that it goes by in the model."""


@dataclass(frozen=True, kw_only=True)
class Company:
    """What rows are computed with, for each to be the same to the bit whatever the others are.

    With `multiple=4` and `spare={64: 1}`, five rows and a batch of 64 samples are computed as eight: three copies come
    last.
    """

    multiple: int = 1
    """A multiple of so many rows is computed, filled up with copies of one. A lone row's product with a vector is a
    kernel of its own, and columns of a sum that do not fill a vector register are summed in another order."""
    spare: Mapping[int, int] = field(default_factory=dict)
    """Samples of a batch to how many copies, at least, come last. The last numbers of a tensor, if they do not fill a
    vector register, get another rounding of functions such as `sigmoid`."""
    spare_otherwise: int = 0
    """The same for batches of other sizes: as many as may be needed for one sample."""
    lone_is_plain: bool = False
    """Whether a lone row without copies is the same if the model computes it as it is, without `vmap`, which takes less
    time."""

    def fills_up(self, samples: int) -> bool:
        """Say whether copies fill up matrices of some numbers of rows; then all lie in memory as those do."""
        return self.multiple > 1 or self.spare.get(samples, self.spare_otherwise) > 0

    def extra(self, rows: int, samples: int) -> int:
        """Return how many copies fill up a matrix of so many rows."""
        spare = self.spare.get(samples, self.spare_otherwise)
        return spare + -(rows + spare) % self.multiple


class RowModel:
    """Computes a function of a model for each row; all rows draw the same random numbers.

    Args:
        model: Whose parameters and buffers are replaced by those of rows while it computes.
        names: Of those that each row has for itself.
        company: What rows are computed with.
    """

    def __init__(self, model: nn.Module, names: Collection[str], company: Company) -> None:
        self._model = model
        self._company = company
        self._places = [place for place in _places(model) if place[2] in names]
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
        has_bias = any(convolution.bias is not None for convolution in convolutions)
        self._without_vmap: AbstractContextManager[Any] = _BiasApart() if has_bias else _NOTHING
        self._shares = not all(name in names for name, _ in model.named_parameters())

    def __call__(
        self,
        function: Callable[[Callable[[Tensor], Tensor]], Tensor],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        *,
        samples: int,
    ) -> Tensor:
        """Return what a function makes of each row's model, (row, …).

        Args:
            function: Of the model.
            parameters: By name, (row, *shape).
            buffers: By name, (row, *shape); changed as the model changes them.
            samples: Of the batch that the function computes.
        """
        rows = len(next(iter(parameters.values())))
        fills_up = self._company.fills_up(samples)
        if rows == 1 and not fills_up and self._company.lone_is_plain:
            lone = {name: tensor.view(tensor.shape[1:]) for name, tensor in {**parameters, **buffers}.items()}
            with _holding(self._places, lone), self._without_vmap:
                return function(self._model).unsqueeze(0)

        def one(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
            some = next(iter(parameters.values()))
            shares = self._shares and some.device.type == "cpu"
            with _holding(self._places, {**parameters, **buffers}), _EachItsOwn(some) if shares else _NOTHING:
                return function(self._model)

        each = vmap(one, randomness="same")
        if not fills_up:
            values: Tensor = each(parameters, buffers)
            return values
        extra = self._company.extra(rows, samples)
        filled_up = _filled_up(buffers, extra)
        values = each(_filled_up(parameters, extra), filled_up)
        for name, buffer in buffers.items():
            buffer.copy_(filled_up[name][:rows])
        return values[:rows]


class _BiasApart(TorchFunctionMode):
    """Has convolutions add their bias in a step of its own, as `vmap` does: the bias's gradient is summed otherwise."""

    _DIMENSIONS: Mapping[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}

    def __torch_function__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if function in self._DIMENSIONS and len(arguments) > 2 and arguments[2] is not None:
            images, weight, bias, *others = arguments
            return function(images, weight, None, *others, **options) + bias.view(-1, *[1] * self._DIMENSIONS[function])
        return function(*arguments, **options)


class _EachItsOwn(TorchFunctionMode):
    """Gives each row a frozen parameter of its own where one meets what differs between rows.

    Else `vmap` makes one product of all rows, in which a CPU's kernel depends on their number. What only meets the
    samples stays shared, and is computed once. What this misses, such as a factor within a list, is found where rows
    are tried (`pipeline.training.rows.company`), and the model trains plain.

    Args:
        row: Any tensor of a row, within `vmap`.
    """

    def __init__(self, row: Tensor) -> None:
        super().__init__()
        self._one = torch.ones_like(row.detach().flatten()[:1].view(()))

    def __torch_function__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if any(map(_is_of_rows, (*arguments, *options.values()))):
            places = range(len(arguments))  # at the first is what is multiplied: samples, which a first layer shares
            arguments = [self._own(arguments[place], factor=place > 0 and function in _PRODUCTS) for place in places]
            options = {name: self._own(value, factor=function in _PRODUCTS) for name, value in options.items()}
        return function(*arguments, **options)

    def _own(self, value: Any, *, factor: bool) -> Any:
        shared = isinstance(value, nn.Parameter) or (factor and isinstance(value, Tensor) and not _is_of_rows(value))
        return value * self._one if shared and value.is_floating_point() else value


def _is_of_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and is_batchedtensor(value)


def _filled_up(tensors: Mapping[str, Tensor], extra: int) -> dict[str, Tensor]:
    """Return tensors (row, …) with copies of their first row added."""
    return {name: torch.cat([t, t.detach()[:1].expand(extra, *t.shape[1:])]) for name, t in tensors.items()}


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
    """Have a model compute with other tensors in place of its own; `torch.func.functional_call` takes ten times longer.

    It would also leave the tensors in a module that is registered under two names.
    """
    kept = [(held, own, held[own]) for held, own, _ in places]
    try:
        for held, own, name in places:
            held[own] = tensors[name]
        yield
    finally:
        for held, own, tensor in kept:
            held[own] = tensor
