"""With what rows are computed, for each to be the same to the bit in any company."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from tiny import ONE_GROUP, tiny_config, tiny_workload
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.space.optimizers import SGD, Adam, AdamW
from pipeline.space.param_groups import ParamGroup
from pipeline.space.trial import EpochMetrics
from pipeline.training.executor import Trainer
from pipeline.training.precision import arithmetic
from pipeline.training.rows import tensor_ends
from pipeline.training.rows.probe import probe
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.workload import Split

CPU = torch.device("cpu")
SINGLY = tensor_ends.AT_ONCE - 1
"""Numbers of a tensor that are all its end."""

UNARY = (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "sinh"),
    *("cosh", "tanh", "asinh", "atanh", "erf", "erfc", "erfinv", "sigmoid", "rsqrt", "sqrt", "reciprocal", "lgamma"),
    *("square", "abs", "neg", "sinc", "logit"),
)
BINARY = (
    "add",
    "sub",
    "mul",
    "div",
    "pow",
    "atan2",
    "hypot",
    "logaddexp",
    "logaddexp2",
    "xlogy",
    "maximum",
    "fmod",
    "remainder",
)
LOSSES = (
    *("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"),
    *("kl_div", "soft_margin_loss", "poisson_nll_loss"),
)
NO_ELEMENTWISE = {"MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax", "RReLU", "Threshold", "GLU"}
"""Activations that take more than one number, draw, or need arguments."""


class Recorded(TorchDispatchMode):
    """Keeps the operations of `torch.ops.aten` that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, list[Any], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        given = [copied(argument) for argument in arguments]
        result = function(*arguments, **(options or {}))
        self.calls.append((function, given, dict(options or {}), copied(result)))
        return result


def copied(value: Any) -> Any:
    """Return what a later operation cannot change in place."""
    return value.clone() if isinstance(value, Tensor) else value


def of_difference(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return function((x - y) * 4)


def of_first(function: Callable[[Tensor], Tensor], x: Tensor, _y: Tensor) -> Tensor:
    return function(x)


def power(x: Tensor, *, exponent: float) -> Tensor:
    return x**exponent


def elementwise_functions() -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Yield the activations of `torch.nn`, functions and losses, each of two tensors, of which some use one."""
    activations = [getattr(nn, name)() for name in nn.modules.activation.__all__ if name not in NO_ELEMENTWISE]
    for module in (*activations, nn.Threshold(0.5, 0.2), nn.GELU(approximate="tanh")):
        yield functools.partial(of_difference, module)
    powers = [functools.partial(power, exponent=exponent) for exponent in (-2, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4)]
    for function in (*(getattr(torch, name) for name in UNARY), *powers, lambda x: 2.0**x):
        yield functools.partial(of_first, function)
    for name in BINARY:
        yield getattr(torch, name)
    for reduction in ("none", "sum"):
        for name in LOSSES:
            yield functools.partial(getattr(F, name), reduction=reduction)
        yield functools.partial(F.smooth_l1_loss, beta=0.3, reduction=reduction)
        yield functools.partial(F.huber_loss, delta=0.3, reduction=reduction)
    yield lambda x, y: F.glu(torch.stack([x - 0.5, y]), dim=0).flatten()
    yield lambda x, _: torch.acosh(1 + x)
    yield lambda x, y: torch.logit(x * y, 1e-6)
    yield lambda x, _: torch.special.ndtri(x * 0.1)
    yield lambda x, y: torch.special.gammainc(y, x)
    yield lambda x, y: torch.lerp(x, y, 0.3)
    yield lambda x, y: torch.addcmul(x, x, y, value=0.3)
    yield lambda x, y: torch.addcdiv(x, x, y, value=0.3)
    yield lambda x, y: torch.add(x, y, alpha=0.3)


def moved_from_the_end(argument: Any) -> Any:
    """Return a tensor with numbers after those that it has in its last dimension."""
    if isinstance(argument, Tensor) and argument.shape[-1:] == (SINGLY,):
        after = argument.new_full((*argument.shape[:-1], 2 * tensor_ends.AT_ONCE - SINGLY), 0.5)
        return torch.cat([argument, after], dim=-1)
    return argument


def parts(result: Any) -> list[Tensor]:
    """Return the tensors of a result that have a number for each of an input."""
    results = result if isinstance(result, tuple) else (result,)
    return [part for part in results if isinstance(part, Tensor) and part.shape[-1:] == (SINGLY,)]


def test_the_elementwise_operations_that_round_the_end_of_a_tensor_otherwise_are_known() -> None:
    generator = torch.Generator().manual_seed(0)
    found = set()
    for function in elementwise_functions():
        for _ in range(50):
            x, y, gradient = torch.rand(3, SINGLY, generator=generator) * 0.8 + 0.1
            with Recorded() as recorded:
                torch.autograd.grad((function(x.requires_grad_(), y) * gradient).sum(), x)
            for operation, arguments, options, result in recorded.calls:
                if operation.is_view or operation == torch.ops.aten.empty_like.default or not parts(result):
                    continue
                elsewhere = operation(*map(moved_from_the_end, arguments), **options)
                whole = elsewhere if isinstance(elsewhere, tuple) else (elsewhere,)
                for part, other in zip(parts(result), whole, strict=True):
                    if not torch.equal(part.nan_to_num(), other[..., :SINGLY].nan_to_num()):
                        found.add((operation, tensor_ends.rounds_ends_otherwise(operation, arguments, options)))
    assert not {str(operation) for operation, known in found if not known}
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        names = {operation.overloadpacket.__name__ for operation, _ in found}
        seldom, in_older_torch = {"logit_backward", "special_ndtri"}, {"cosh", "sinh"}
        assert names | seldom | in_older_torch == tensor_ends.ROUND_ENDS_OTHERWISE | {"gelu", "gelu_backward"}


CASES = {
    "functions of 441 samples": (lambda: nn.Sequential(nn.Linear(13, 16), nn.SiLU(), nn.Linear(16, 3)), (13,), 441),
    "images": (
        lambda: nn.Sequential(nn.Conv2d(1, 5, 3), nn.Sigmoid(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(20, 3)),
        (1, 8, 8),
        263,
    ),
    "one unit": (lambda: nn.Sequential(nn.Linear(4, 1), nn.Softplus(), nn.Linear(1, 3)), (4,), 33),
    "columns": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Mish(), nn.Linear(6, 3)), (4,), 40),
    "in place": (lambda: nn.Sequential(nn.Linear(4, 7), nn.SiLU(inplace=True), nn.Linear(7, 3)), (4,), 41),
}
"""Model, shape of a sample, number of samples."""


@pytest.mark.parametrize("name", CASES)
def test_no_row_of_a_trial_is_at_the_end_of_a_tensor(name: str) -> None:
    build_model, shape, samples = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        inputs = torch.randn(count, *shape, generator=generator)
        return Split(inputs, torch.randint(3, (count,), generator=generator))

    workload = dataclasses.replace(tiny_workload(build_model), train=split(samples), val=split(samples), test=split(21))
    optimizers = (SGD(base_lr=0.1, momentum=0.9), Adam(base_lr=0.01))
    configs = {row: tiny_config(optimizers[row % 2], batch_size=16, param_groups=ONE_GROUP) for row in range(33)}

    def trained(rows: range) -> dict[int, tuple[list[EpochMetrics], dict[str, Tensor]]]:
        group = FusedTrials({row: configs[row] for row in rows}, workload, device=CPU, company=finding.company)
        metrics = [group.train_epoch() for _ in range(2)]
        return {row: ([its[row] for its in metrics], group.model_state(row)) for row in rows}

    with arithmetic(configs[0], CPU):
        finding = probe(workload, configs[0], device=CPU, dtype=torch.float32)
        assert finding.plain_because is None
        assert finding.company.multiple > 1 or any(finding.company.spare.values())
        together = trained(range(33))
        for rows in (range(1), range(3, 5), range(10, 17), range(16, 33)):
            for row, (metrics, state) in trained(rows).items():
                assert metrics == together[row][0]
                assert [name for name, value in state.items() if not torch.equal(value, together[row][1][name])] == []


def frozen(*patterns: str) -> dict[str, ParamGroup]:
    return {"frozen": ParamGroup(pattern=patterns, lr_ratio=0.0), "all": ParamGroup(pattern=("*",))}


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def images() -> nn.Module:
    body = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("build_model", "shape", "size", "param_groups"),
    [
        pytest.param(layers, (13,), 1, frozen("4.*"), id="a frozen head"),
        pytest.param(layers, (13,), 1, frozen("*.weight"), id="frozen weights"),
        pytest.param(images, (1, 8, 8), 1, frozen("0.*", "1.*"), id="a frozen body"),
        pytest.param(images, (1, 8, 8), 1, frozen("3.*", "7.*"), id="a frozen end"),
        pytest.param(layers, (13,), 1000, ONE_GROUP, id="inputs of large numbers"),
        pytest.param(
            lambda: nn.Sequential(nn.Linear(4, 1), nn.PReLU(), nn.Linear(1, 3)), (4,), 1, ONE_GROUP, id="one number"
        ),
    ],
)
def test_rows_are_alike_in_any_company_or_train_plain(
    build_model: Callable[[], nn.Module], shape: tuple[int, ...], size: float, param_groups: dict[str, ParamGroup]
) -> None:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        inputs = size * torch.randn(count, *shape, generator=generator).abs()
        return Split(inputs, torch.randint(3, (count,), generator=generator))

    workload = dataclasses.replace(tiny_workload(build_model), train=split(50), val=split(41), test=split(20))
    optimizers = (SGD(base_lr=0.1, momentum=0.9), Adam(base_lr=0.01), AdamW(base_lr=0.001))
    configs = {
        row: tiny_config(optimizers[row % 3], batch_size=16, epochs=3, param_groups=param_groups) for row in range(33)
    }
    trainer = Trainer(workload, configs[0], device=CPU)
    counts = range(1, 18)
    together, *few = (trainer.build({row: configs[row] for row in rows}) for rows in (range(33), *map(range, counts)))
    for _ in range(3):
        expected = together.train_epoch()
        for group in few:
            for row, metrics in group.train_epoch().items():
                assert metrics == expected[row]
    for count, group in zip(counts, few, strict=True):
        for row in range(count):
            there = together.model_state(row)
            assert [name for name, value in group.model_state(row).items() if not torch.equal(value, there[name])] == []
