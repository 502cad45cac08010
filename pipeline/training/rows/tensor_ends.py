"""Which numbers of a tensor lie at its end, where some functions are rounded otherwise.

PyTorch's loops over tensors on a CPU take several numbers at once, as vectors, and those that are left at the end
singly. For some functions that is other code. It changes a few numbers now and then, so comparing results would miss
it; it follows from how all tensors of an operation lie in memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FEW, MORE = 3, 5
"""Rows whose tensors are watched: what is larger of more rows is of several rows."""
AT_ONCE = 32
"""Numbers that a loop over a tensor takes at once, at most: two vectors of 16. What is left it takes singly."""
ROUND_ENDS_OTHERWISE = frozenset(
    {"atan2", "atanh", "exp2", "glu", "glu_backward", "logaddexp", "logaddexp2", "pow", "sigmoid"}
    | {"celu", "elu", "elu_backward", "mish", "mish_backward", "silu", "silu_backward", "softplus", "softplus_backward"}
    | {"huber_loss_backward", "smooth_l1_loss_backward", "igamma", "logit_backward", "special_ndtri"}
    | {"cosh", "sinh"}  # in torch 2.11
)
"""Operations of `torch.ops.aten` that compute single numbers by another function than vectors, on x86; so does `gelu`
by tanh or in double precision."""
EXACT_POWERS = (-2, -1, -0.5, 0, 0.5, 1, 2, 3)
"""For which `pow` is an arithmetic operation."""
ROUND_LAST_COLUMNS_OTHERWISE = (torch.ops.aten.native_batch_norm_backward,)
"""Those that do so with the last columns, where channels lie side by side."""


Runs = Mapping[int, Collection[tuple[int, int]]]
"""How many numbers of each row a loop takes in a run of several rows, and how many of them lie side by side, by the
samples of the batch; those of one sample by `ONE_SAMPLE`."""
ONE_SAMPLE = 0


class Watched(TorchDispatchMode):
    """Notes the operations that round ends otherwise, and how their tensors lie in memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.loops: list[_Loop] = []
        """In order."""
        self.samples: set[int] = set()
        """Of the batches."""
        self.complex = False
        """Whether there are complex numbers: even their products round ends otherwise."""
        self._now = 0

    def of_batch(self, samples: int) -> Watched:
        """Watch what is computed of a batch."""
        self._now = samples
        self.samples.add(samples)
        return self

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        first = result[0] if isinstance(result, tuple) else result
        if not isinstance(first, Tensor):
            return result
        self.complex |= first.is_complex()
        if rounds_ends_otherwise(function, arguments, options or {}):
            tensors = [first, *(argument for argument in arguments if isinstance(argument, Tensor))]
            shape = tuple(first.shape)
            strides = [strides for tensor in tensors if (strides := _strides_in(tensor, shape)) is not None]
            self.loops.append(_Loop(self._now, shape, tuple(strides)))
        elif function.overloadpacket in ROUND_LAST_COLUMNS_OTHERWISE and first.stride(1) == 1:
            self.loops.append(_Loop(self._now, (first.shape[1],), ((1,),)))
        return result


def runs_of_rows(few: Watched, more: Watched) -> Runs | None:
    """Return the runs of what was watched with `FEW` and with `MORE` rows; None if rows cannot be alike."""
    if few.complex or len(few.loops) != len(more.loops):  # if these differ, something computes row after row
        return None
    runs: dict[int, set[tuple[int, int]]] = {samples: set() for samples in (ONE_SAMPLE, *few.samples)}
    for loop, larger in zip(few.loops, more.loops, strict=True):
        if run := _run_of_rows(loop, larger.shape):
            numbers, together = run
            runs[loop.samples].add(run)
            of_one = numbers if numbers % loop.samples else numbers // loop.samples
            runs[ONE_SAMPLE].add((of_one, math.gcd(of_one, together)))
    return runs


def rows_at_ends(multiple: int, runs: Collection[tuple[int, int]]) -> int:
    """Return of how many rows at most, if their number is a multiple, there are numbers left at the end of a run."""
    return max((math.ceil(_left(multiple * numbers) / together) for numbers, together in runs), default=0)


def rounds_ends_otherwise(operation: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Say whether an operation of `torch.ops.aten` may round the end of its result otherwise."""
    name = operation.overloadpacket.__name__.removesuffix("_")  # in place
    if name == "pow" and not isinstance(arguments[1], Tensor):
        return arguments[1] not in EXACT_POWERS
    if name in ("gelu", "gelu_backward"):
        return options.get("approximate") == "tanh" or arguments[0].dtype == torch.float64
    return name in ROUND_ENDS_OTHERWISE


@dataclass(frozen=True)
class _Loop:
    """An operation that rounds ends otherwise, computed in a loop over all its tensors at once."""

    samples: int
    """Of the batch that it is computed of."""
    shape: tuple[int, ...]
    """Of its result."""
    strides: tuple[tuple[int, ...], ...]
    """Of its result and its arguments, each by dimension of the result; 0 where one number serves for all."""


def _strides_in(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Return a tensor's strides by dimension of a shape that it is broadcast to; None if it is not."""
    missing = len(shape) - tensor.ndim
    if missing < 0 or any(own not in (1, size) for own, size in zip(tensor.shape, shape[missing:], strict=True)):
        return None
    own = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (*[0] * missing, *own)


def _run_of_rows(loop: _Loop, larger: Sequence[int]) -> tuple[int, int] | None:
    """Return how many numbers of each of `FEW` rows a loop takes in a run, and how many of them side by side.

    Args:
        loop: What is computed of `FEW` rows.
        larger: The shape of its result with `MORE` rows.

    Returns:
        None if no run is of several rows.
    """
    length, together = 1, 0
    first: tuple[int, ...] | None = None
    for *strides, size, size_of_more in sorted(zip(*loop.strides, loop.shape, larger, strict=True)):
        if size == 1 and size_of_more == 1:
            continue
        first = first or tuple(strides)
        if tuple(strides) != tuple(stride * length for stride in first):
            break
        if size != size_of_more:
            together = length * size // FEW
        length *= size
    return (length // FEW, together) if together else None


def _left(count: int) -> int:
    """Return how many numbers are left at the end, at most, of so many or a multiple."""
    return AT_ONCE - math.gcd(count, AT_ONCE)
