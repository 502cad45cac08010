"""With what rows are computed on a CPU, for each to be the same to the bit in any company: found by trying.

Two things make a row notice the others. Which kernel multiplies, convolves or sums depends on the shapes beside it;
that changes many numbers, and comparing rows finds it. And some functions round the end of a tensor otherwise; that
changes a few numbers now and then, which comparing would miss: ends are marked, and it is seen where the marks go.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import TrialConfig
from pipeline.data import evaluation_batch_size, first_samples, samples_of
from pipeline.fused import FusedTrials
from pipeline.row_model import Company
from pipeline.workloads.workload import Split, Workload

MANY, MANY_PARAMETERS = 33, 1 << 22
"""Rows in company: a column more than 32 even of a model with one, but fewer if they have many parameters."""
MAX_TIMES, ENOUGH_NUMBERS = 8, 1 << 13
"""How often rows are compared: as often as it takes for so many parameters, since few can be the same by chance."""
MULTIPLES = (1, 2, 4, 8)
"""More would cost more than rows gain."""
AT_ONCE = 32
"""Numbers that a loop over a tensor takes at once, at most: two vectors of 16. What is left it takes singly."""
ROUND_ENDS_OTHERWISE = frozenset(
    {"atan2", "atanh", "exp2", "glu", "glu_backward", "logaddexp", "pow", "sigmoid"}
    | {"celu", "elu", "elu_backward", "mish", "mish_backward"}
    | {"silu", "silu_backward", "softplus", "softplus_backward"}
)
"""Operations of `torch.ops.aten` that compute single numbers by another function than vectors, on x86; so does `gelu`
by tanh."""
EXACT_POWERS = (-2, -1, -0.5, 0.5, 2, 3)
"""For which `pow` is an arithmetic operation."""
ROUND_LAST_COLUMNS_OTHERWISE = (torch.ops.aten.native_batch_norm_backward,)
"""Those that do so with the last columns of a matrix (sample, column)."""


def company_of(
    workload: Workload, configs: Sequence[TrialConfig], size: int, *, device: torch.device, dtype: torch.dtype
) -> Company | None:
    """Return with what each row is the same to the bit alone and among many; None if there is nothing.

    Which kernel computes a product also depends on the size of a batch, so each size is tried that training and
    evaluation have.

    Args:
        workload: What is trained.
        configs: Two trials of it that differ, with momentum: as part of the state it has every bit of the gradients.
        size: Number of its parameters.
        device: A CPU.
        dtype: Of parameters and floating-point data.
    """
    workload = _of_same_batch_sizes(workload, configs[0])
    many = max(3, min(MANY, MANY_PARAMETERS // size))

    def train(rows: int, company: Company, times: int) -> FusedTrials:
        trials = {number: configs[number % 2] for number in range(rows)}
        group = FusedTrials(trials, workload, device=device, dtype=dtype, company=company)
        for _ in range(times):
            group.begin_epoch()
            for inputs, targets in group.training_batches():
                group.train_step(inputs, targets)
        return group

    def outputs(group: FusedTrials) -> dict[int, Any]:
        splits = [name for name in ("val", "test") if getattr(workload, name) is not None]
        return dict(zip(group.configs, zip(*map(group.outputs, splits), strict=True), strict=True))

    def ends(rows: int, company: Company) -> int:
        """Return how many of the last rows get anything from the end of a tensor."""
        with _MarkedEnds():  # type: ignore[no-untyped-call]
            group = train(rows, company, 1)
            seen = [*zip(_states(group).values(), outputs(group).values(), strict=True)]
        return rows - next((row for row, what in enumerate(seen) if _has_marks(what)), rows)

    def companies() -> list[Company]:
        """Return what leaves no row of a trial at the end of a tensor, in order of cost."""
        multiples = [multiple for multiple in MULTIPLES if 3 * multiple <= many]
        if not ends(3, Company()):  # and so at no number of rows
            return [Company(multiple=multiple) for multiple in multiples]
        found = []
        for multiple in multiples:
            rows = (many // multiple - 1 | 1) * multiple  # odd times the multiple, at which most is left
            if (spare := ends(rows, Company(multiple=multiple))) < rows:
                found.append(Company(multiple=multiple, spare=spare))
        return sorted(found, key=lambda company: company.multiple / 2 + company.spare)

    times = max(1, min(MAX_TIMES, ENOUGH_NUMBERS // size))
    for company in companies():
        trained = functools.cache(functools.partial(train, company=company))
        # Together with `many`: a lone row, several, and every place where a matrix can end.
        ending = (n * company.multiple - company.spare for n in (1, 2, 3))
        *fewer, few = sorted({1, 2, 3, *(rows for rows in ending if rows > 0)})
        if _alike(trained(few, times=1), trained(many, times=1), _states) and all(
            _alike(trained(rows, times=repeats), trained(few, times=repeats), _states, outputs)
            for repeats in sorted({1, times})
            for rows in fewer
        ):
            plain = Company(lone_is_plain=True)
            lone_is_same = company == Company() and not ends(1, plain)
            if lone_is_same and _alike(train(1, plain, times), trained(few, times=times), _states, outputs):
                return plain
            return company
    return None


class _MarkedEnds(TorchDispatchMode):
    """Makes NaN what a kernel may have rounded otherwise for being at the end of a tensor, and so all that comes of it.

    How much is left at the end depends on the number of rows; it marks the most that can be for an odd number.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        if rounds_ends_otherwise(function, arguments, options or {}):
            for tensor in result if isinstance(result, tuple) else (result,):
                _mark_end(tensor)
        elif function.overloadpacket in ROUND_LAST_COLUMNS_OTHERWISE:
            _mark_last_columns(result[0])
        return result


def rounds_ends_otherwise(operation: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Say whether an operation of `torch.ops.aten` may round the end of its result otherwise."""
    name = operation.overloadpacket.__name__.removesuffix("_")  # in place
    if name == "pow" and not isinstance(arguments[1], Tensor):
        return arguments[1] not in EXACT_POWERS
    if name in ("gelu", "gelu_backward"):
        return options.get("approximate") == "tanh"
    return name in ROUND_ENDS_OTHERWISE


def _left(count: int) -> int:
    """Return how many numbers are left at the end, at most, of a tensor of so many or an odd multiple."""
    return AT_ONCE - math.gcd(count, AT_ONCE)


def _mark_end(tensor: Tensor) -> None:
    left = min(_left(tensor.numel()), tensor.numel())
    tensor.as_strided((left,), (1,), tensor.storage_offset() + tensor.numel() - left).fill_(math.nan)


def _mark_last_columns(values: Tensor) -> None:
    columns = values.shape[1]
    if values.numel() == len(values) * columns:
        values[:, max(0, columns - _left(columns)) :] = math.nan


def _has_marks(state: Any) -> bool:
    if isinstance(state, Mapping):
        return any(map(_has_marks, state.values()))
    if isinstance(state, tuple | list):
        return any(map(_has_marks, state))
    return isinstance(state, Tensor) and bool(state.isnan().any())


def _states(group: FusedTrials) -> dict[int, Any]:
    """Return all that each trial goes on with."""
    return {int(number): state for number, state in group.state_dict().items()}


def _alike(one: FusedTrials, other: FusedTrials, *whats: Callable[[FusedTrials], dict[int, Any]]) -> bool:
    """Say whether the trials of a group are the same as the first two, of which they are copies, of another."""
    return all(
        _same_bits(its, others[number % 2])
        for what in whats
        for others in [what(other)]
        for number, its in what(one).items()
    )


def _of_same_batch_sizes(workload: Workload, config: TrialConfig) -> Workload:
    """Return a workload with a few samples, again and again, so many that batches of each size occur once."""

    def some(name: str, size: int) -> Split:
        samples = samples_of(workload, name)
        few = first_samples(samples, config.batch_size)
        again = torch.arange(min(len(samples), size + len(samples) % size), device=few.inputs.device) % len(few)
        return Split(few.inputs[again], few.targets[again])

    def evaluated(name: str) -> Split:
        return some(name, evaluation_batch_size(samples_of(workload, name), config))

    test = None if workload.test is None else evaluated("test")
    return dataclasses.replace(workload, train=some("train", config.batch_size), val=evaluated("val"), test=test)


def _same_bits(one: Any, other: Any) -> bool:
    """Say whether two states are the same, whose tensors are within tuples, lists and dicts of the same keys."""
    if isinstance(one, Mapping):
        return all(_same_bits(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple | list):
        return all(map(_same_bits, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)
