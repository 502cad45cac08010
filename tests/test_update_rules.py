"""Each update rule against its twin in `torch.optim`, over the legal interval of every hyperparameter.

The loss is linear in the parameters, so that a step's gradient is the step's sample whatever was trained before: what
differs between the trainers is the arithmetic of the update alone, and training does not amplify it.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tiny import on_device, tiny_config
from torch import Tensor, nn

from pipeline.space.config import TrialConfig
from pipeline.space.limits import NonNegative
from pipeline.space.optimizers import OPTIMIZERS, Optimizer
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import Constant, Cyclic, Exponential, OneCycle, Scheduler
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.trainer import FusedTrials
from pipeline.training.rows.update_rules import RULES, has_rule
from pipeline.workloads.workload import Split, Workload

CPU = torch.device("cpu")
STEPS, EPOCHS = 6, 2
FUSED = [name for name, optimizer in OPTIMIZERS.items() if has_rule(optimizer)]

LARGEST = {"eps": 1.0, "t0": 10.0, "initial_accumulator_value": 10.0, "alpha": 2.0, "lr_decay": 10.0}
"""Where to stop in an interval without end; 1 for every other field."""
SMALLEST = {"base_lr": 1e-5, "eps": 1e-12}
"""Where to begin in an interval that has no first number."""


class Weights(nn.Module):
    """Two groups of weights, one of them a single number, that multiply the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Parameter(torch.randn(2, 3))
        self.head = nn.Parameter(torch.randn(()))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 7) to outputs (batch,)."""
        return inputs[:, :6] @ self.body.flatten() + inputs[:, 6] * self.head


def workload(seed: int) -> Workload:
    """Return samples of very different sizes, zeros among them; each is the gradient of its step."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(STEPS, 7, generator=generator, dtype=torch.float64)
    samples *= 10 ** torch.randint(-4, 3, (STEPS, 7), generator=generator)
    samples[torch.rand(STEPS, 7, generator=generator) < 0.2] = 0.0
    split = Split(samples, torch.zeros(STEPS))
    return Workload(
        name="linear",
        build_model=Weights,
        train=split,
        val=split,
        loss=lambda outputs, targets: (outputs - targets).mean(),
    )


def values(name: str, hint: Any) -> st.SearchStrategy[Any]:
    """Return a field's legal values, the ends of its interval more often than chance would have it."""
    if hint is bool:
        return st.booleans()
    assert get_origin(hint) is Annotated
    interval = get_args(hint)[1]
    low = SMALLEST[name] if interval.ge is None else float(interval.ge)
    high = LARGEST.get(name, 1.0) if interval.le is None else float(interval.le)
    high = high if interval.lt is None else 0.9999
    return st.sampled_from([low, high]) | st.floats(low, high, allow_subnormal=False)


@st.composite
def optimizers(draw: st.DrawFn, name: str) -> Optimizer:
    cls = OPTIMIZERS[name]
    hints = get_type_hints(cls, include_extras=True)
    drawn = {field.name: draw(values(field.name, hints[field.name])) for field in dataclasses.fields(cls)}
    if drawn.get("nesterov"):  # PyTorch's own condition
        drawn |= {"dampening": 0.0, "momentum": max(drawn["momentum"], 0.1)}
    if drawn.get("centered"):
        # The variance, E[g²] - E[g]², vanishes with alpha: what is left of it then is rounding, in PyTorch as here, and
        # its square root may be NaN in one and not in the other.
        drawn |= {"alpha": max(drawn["alpha"], 0.1)}
    return cls(**drawn)


@st.composite
def configs(draw: st.DrawFn, name: str) -> TrialConfig:
    """Return an optimizer, groups with rates and a decay of their own, and a schedule that moves every step."""
    decay = draw(values("weight_decay", NonNegative))
    groups = {
        "head": ParamGroup(pattern=("head",), lr_ratio=draw(st.floats(0.1, 10.0)), weight_decay=decay),
        "body": ParamGroup(pattern=("*",)),
    }
    schedules: list[Scheduler] = [
        Exponential(gamma=0.7, interval="step"),
        Constant(warmup=1),
        OneCycle(),
    ]
    if {"momentum", "beta1"} & {field.name for field in dataclasses.fields(OPTIMIZERS[name])}:
        schedules.append(OneCycle(cycle_momentum=True))
        schedules.append(Cyclic(cycle_momentum=True, max_lr_ratio=3.0, step_size_up=2))
    schedule = draw(st.sampled_from(schedules))
    return tiny_config(draw(optimizers(name)), schedule, epochs=EPOCHS, batch_size=1, param_groups=groups)


def parameters(group: PlainTrials | FusedTrials, number: int) -> Tensor:
    return torch.cat([value.flatten() for value in group.model_state(number).values()])


def test_every_rule_has_an_optimizer() -> None:
    assert {OPTIMIZERS[name].__name__ for name in FUSED} == RULES.keys()


@pytest.mark.parametrize("name", FUSED)
@settings(max_examples=20, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_a_rule_equals_its_twin(name: str, data: st.DataObject) -> None:
    config, other = data.draw(configs(name)), data.draw(configs(name))
    problem = on_device(workload(data.draw(st.integers(0, 2**32))), device=CPU, dtype=torch.float64)
    trials = {0: config, 1: other}
    plain = PlainTrials(trials, problem, device=CPU, dtype=torch.float64)
    fused = FusedTrials(trials, problem, device=CPU, dtype=torch.float64)
    largest = {number: float(parameters(plain, number).abs().max()) for number in trials}
    for _ in range(EPOCHS):
        expected, found = plain.train_epoch(), fused.train_epoch()
        for number in trials:
            assert found[number].lr == expected[number].lr
            a, b = parameters(fused, number), parameters(plain, number)
            largest[number] = max(largest[number], float(b.abs().max()))
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * largest[number])


@pytest.mark.parametrize("name", FUSED)
def test_a_row_has_the_same_coefficients_to_the_bit_in_a_block_of_any_size(name: str) -> None:
    # The other rows of its matrix may have other optimizers in a search; when it is trained again they have its own.
    steps, rows = 50, 17
    generator = torch.Generator().manual_seed(0)
    fields = dataclasses.asdict(OPTIMIZERS[name](base_lr=0.1))
    hyper = {key: torch.full((steps, rows, 1), float(value), dtype=torch.float64) for key, value in fields.items()}
    for key in ("lr", "beta1", "beta2", "lambd"):
        hyper[key] = 1 - 0.1 * torch.rand(steps, rows, 1, generator=generator, dtype=torch.float64)
    rule = RULES[OPTIMIZERS[name].__name__](dict.fromkeys(fields, False))

    def coefficients(of: slice) -> list[Tensor]:
        numbers = torch.arange(1, steps + 1, dtype=torch.float64).view(-1, 1, 1)
        its = rule.coefficients({key: value[:, of].contiguous() for key, value in hyper.items()}, numbers, {})
        return [value for value in (its.rate, *its.direction, its.l2, its.shrink) if value is not None]

    together = coefficients(slice(None))
    for row in range(rows):
        for alone, all_rows in zip(coefficients(slice(row, row + 1)), together, strict=True):
            assert torch.equal(alone, all_rows[:, row : row + 1])
