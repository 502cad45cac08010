"""With what rows are computed on a CPU, for each to be the same to the bit in any company: found by trying.

Two things make a row notice the others. Which kernel multiplies, convolves or sums depends on the shapes beside it;
that changes many numbers, and comparing rows finds it. And some functions round the end of a tensor otherwise; that
changes a few numbers now and then, which comparing would miss: it follows from how all tensors of an operation lie
in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import TrialConfig
from pipeline.data import evaluation_batch_size, samples_of
from pipeline.fused import FusedTrials
from pipeline.row_model import Company
from pipeline.workloads.workload import Split, Workload

MANY, MANY_PARAMETERS = 33, 1 << 22
"""Rows in company: a column more than 32 even of a model with one, but fewer if they have many parameters."""
FEW, MORE = 3, 5
"""Rows whose tensors are watched: what is larger of more rows is of several rows."""
ENOUGH_SAMPLES, DIFFERENT_SAMPLES = 64, 128
"""In training steps and among all samples: kernels that differ can agree on a few."""
MIN_STEPS, MAX_STEPS, ENOUGH_NUMBERS = 4, 16, 1 << 13
"""Steps that rows train: as many as it takes for so many numbers of gradients, since few can be the same by chance."""
MULTIPLES, MAX_EXTRA = (1, 2, 4, 8), 8
"""More extra rows at the usual size of a batch would cost more than rows gain."""
AT_ONCE = 32
"""Numbers that a loop over a tensor takes at once, at most: two vectors of 16. What is left it takes singly."""
ROUND_ENDS_OTHERWISE = frozenset(
    {"atan2", "atanh", "exp2", "glu", "glu_backward", "logaddexp", "logaddexp2", "pow", "sigmoid"}
    | {"celu", "elu", "elu_backward", "mish", "mish_backward", "silu", "silu_backward", "softplus", "softplus_backward"}
    | {"huber_loss_backward", "smooth_l1_loss_backward", "igamma", "logit_backward", "special_ndtri"}
)
"""Operations of `torch.ops.aten` that compute single numbers by another function than vectors, on x86; so does `gelu`
by tanh or in double precision."""
EXACT_POWERS = (-2, -1, -0.5, 0, 0.5, 1, 2, 3)
"""For which `pow` is an arithmetic operation."""
ROUND_LAST_COLUMNS_OTHERWISE = (torch.ops.aten.native_batch_norm_backward,)
"""Those that do so with the last columns, where channels lie side by side."""


def company_of(
    workload: Workload, configs: Sequence[TrialConfig], size: int, *, device: torch.device, dtype: torch.dtype
) -> Company | None:
    """Return with what each row is the same to the bit alone and among many; None if there is nothing.

    Which kernel computes a product also depends on the size of a batch, so each size is tried that training and
    evaluation have.

    Args:
        workload: What is trained.
        configs: Two trials of it that differ.
        size: Number of its parameters.
        device: A CPU.
        dtype: Of parameters and floating-point data.
    """
    workload = _of_same_batch_sizes(workload, configs[0])
    most = max(3, MANY_PARAMETERS // size)
    usual = min(configs[0].batch_size, len(workload.train))
    splits = [name for name in ("val", "test") if getattr(workload, name) is not None]

    def group_of(rows: int, company: Company) -> FusedTrials:
        trials = {number: configs[number % 2] for number in range(rows)}
        return FusedTrials(trials, workload, device=device, dtype=dtype, company=company)

    def watched(rows: int) -> _Watched:
        group, watch = group_of(rows, Company()), _Watched()
        group.begin_epoch()
        for inputs, targets in group.training_batches():
            with watch.of_batch(len(inputs)):
                group.train_step(inputs, targets)
        for name in splits:
            for inputs, targets in group.evaluation_batches(name):
                with watch.of_batch(len(inputs)):
                    group.evaluate_step(inputs, targets)
        return watch

    def trained(rows: int, company: Company) -> dict[int, Any]:
        """Return all that training some epochs leaves of each row, and the losses and gradients of every step."""
        group = group_of(rows, company)
        seen = []
        for _ in range(epochs):
            group.begin_epoch()
            for inputs, targets in group.training_batches():
                losses, gradients = group.gradients(inputs, targets)
                seen += [losses, gradients.clone()]
                group.update(losses, gradients, samples=len(inputs))
        outputs = [group.outputs(name) for name in splits]
        states = group.state_dict()
        return {row: (states[str(row)], [of[row] for of in (*seen, *outputs)]) for row in range(rows)}

    steps = min(MAX_STEPS, max(MIN_STEPS, ENOUGH_NUMBERS // size))
    epochs = math.ceil(steps / math.ceil(len(workload.train) / configs[0].batch_size))
    for company in _companies(watched(FEW), watched(MORE), usual=usual):
        if 3 * company.multiple > most:
            continue
        tried = functools.cache(functools.partial(trained, company=company))
        # Together with many: a lone row, several, and where a matrix can end.
        *fewer, few = sorted({1, 2, 3, *(n * company.multiple for n in (1, 2, 3))})
        if all(_alike(tried(rows), tried(few)) for rows in (min(MANY, most), *fewer)):
            plain = dataclasses.replace(company, lone_is_plain=True)
            return plain if company.multiple == 1 and _alike(trained(1, plain), tried(few)) else company
    return None


@dataclass(frozen=True)
class _Loop:
    """An operation that rounds ends otherwise, computed in a loop over all its tensors at once."""

    samples: int
    """Of the batch that it is computed of."""
    shape: tuple[int, ...]
    """Of its result."""
    strides: tuple[tuple[int, ...], ...]
    """Of its result and its arguments, each by dimension of the result; 0 where one number serves for all."""


class _Watched(TorchDispatchMode):
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

    def of_batch(self, samples: int) -> _Watched:
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


def _strides_in(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Return a tensor's strides by dimension of a shape that it is broadcast to; None if it is not."""
    missing = len(shape) - tensor.ndim
    if missing < 0 or any(own not in (1, size) for own, size in zip(tensor.shape, shape[missing:], strict=True)):
        return None
    own = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (*[0] * missing, *own)


def _companies(few: _Watched, more: _Watched, *, usual: int) -> list[Company]:
    """Return what leaves no row of a trial at an end, in order of cost at the usual size of a batch.

    A loop goes along what lies together in the memory of all its tensors. If that is of several rows, how much is left
    at its end, to be taken singly, depends on the number of rows, and whose it is on how many numbers of a row lie side
    by side. Such rows must be spare ones. Where each row has ends of its own, they are the same in any company.
    """
    if few.complex or len(few.loops) != len(more.loops):  # if these differ, something computes row after row
        return []
    runs: dict[int, set[tuple[int, int]]] = {samples: set() for samples in few.samples}
    of_one: set[tuple[int, int]] = set()
    for loop, larger in zip(few.loops, more.loops, strict=True):
        for numbers, together in _runs_of_rows(loop, larger.shape):
            runs[loop.samples].add((numbers, together))
            one = numbers if numbers % loop.samples else numbers // loop.samples
            of_one.add((one, math.gcd(one, together)))

    def spare(multiple: int, runs: set[tuple[int, int]]) -> int:
        return max((math.ceil(_left(multiple * numbers) / together) for numbers, together in runs), default=0)

    companies = [
        Company(
            multiple=multiple,
            spare={samples: spare(multiple, its) for samples, its in runs.items()},
            spare_otherwise=spare(multiple, of_one),
        )
        for multiple in MULTIPLES
    ]
    companies = [company for company in companies if company.multiple - 1 + company.spare[usual] <= MAX_EXTRA]
    return sorted(companies, key=lambda company: company.multiple / 2 + company.spare[usual])


def _runs_of_rows(loop: _Loop, larger: Sequence[int]) -> set[tuple[int, int]]:
    """Return how many numbers of each of `FEW` rows a loop takes in a run, and how many of them side by side.

    Args:
        loop: What is computed of `FEW` rows.
        larger: The shape of its result with `MORE` rows.

    Returns:
        Nothing if no run is of several rows.
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
    return {(length // FEW, together)} if together else set()


def rounds_ends_otherwise(operation: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Say whether an operation of `torch.ops.aten` may round the end of its result otherwise."""
    name = operation.overloadpacket.__name__.removesuffix("_")  # in place
    if name == "pow" and not isinstance(arguments[1], Tensor):
        return arguments[1] not in EXACT_POWERS
    if name in ("gelu", "gelu_backward"):
        return options.get("approximate") == "tanh" or arguments[0].dtype == torch.float64
    return name in ROUND_ENDS_OTHERWISE


def _left(count: int) -> int:
    """Return how many numbers are left at the end, at most, of so many or a multiple."""
    return AT_ONCE - math.gcd(count, AT_ONCE)


def _alike(rows: Mapping[int, Any], others: Mapping[int, Any]) -> bool:
    """Say whether rows are the same as the first two, of which they are copies, of others."""
    return all(_same_bits(its, others[row % 2]) for row, its in rows.items())


def _same_bits(one: Any, other: Any) -> bool:
    """Say whether two states are the same, whose tensors are within tuples, lists and dicts of the same keys."""
    if isinstance(one, Mapping):
        return all(_same_bits(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple | list):
        return all(map(_same_bits, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def _of_same_batch_sizes(workload: Workload, config: TrialConfig) -> Workload:
    """Return a workload with few samples, from all over it and again and again, that has batches of the same sizes."""

    def some(name: str, size: int) -> Split:
        samples = samples_of(workload, name)
        different = torch.linspace(0, len(samples) - 1, min(len(samples), max(size, DIFFERENT_SAMPLES))).long()
        ((inputs, targets),) = samples.batches([different], seed=0)
        count = size * math.ceil(ENOUGH_SAMPLES / size) + len(samples) % size
        again = torch.arange(min(len(samples), count), device=inputs.device) % len(inputs)
        return Split(inputs[again], targets[again])

    def evaluated(name: str) -> Split:
        return some(name, evaluation_batch_size(samples_of(workload, name), config))

    # One of as many samples as `val` has the same batches.
    test = None if workload.test is None or len(workload.test) == len(workload.val) else evaluated("test")
    return dataclasses.replace(workload, train=some("train", config.batch_size), val=evaluated("val"), test=test)
