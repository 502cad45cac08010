"""Steps that a device runs as a whole; on a CPU, capturing keeps the function and replaying calls the function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretended import DEVICE
from test_device import CPU, configs_of_every_rule, same
from tiny import TinyModel, on_device, tiny_config, tiny_workload
from torch import Tensor

from pipeline.space.optimizers import Adam
from pipeline.training.rows.captured import MAX_GRAPHS, Capture, Captured
from pipeline.training.rows.trainer import FusedTrials

pytestmark = pytest.mark.usefixtures("one_thread")


def kept(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Stand in for a graph: what was captured computes from the same tensors each time."""
    return function


def history(capture: Capture | None, **changes: Any) -> list[Any]:
    """Train rows for some epochs, of which one averages the weights, and drop a row; return all that comes of it."""
    configs = configs_of_every_rule()
    if changes:
        configs = {number: tiny_config(Adam(base_lr=0.01 * (1 + number)), **changes) for number in range(3)}
    model = functools.partial(TinyModel, dropout=0.2, batch_norm=True)
    group = FusedTrials(configs, on_device(tiny_workload(model), device=CPU), device=CPU, capture=capture)
    found: list[Any] = [group.train_epoch(), group.train_epoch(average=True), group.train_epoch()]
    group.drop(1)
    found += [group.train_epoch(average=True), group.test(), group.state_dict()]
    assert group.eager_because is None
    return found


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"ema": 0.9}], ids=["every rule", "accumulate", "ema"])
def test_captured_steps_train_rows_to_the_same_bits(changes: dict[str, Any]) -> None:
    assert same(history(kept, **changes), history(None, **changes))


class Counted:
    """Doubles a tensor, and counts calls of Python and captures."""

    def __init__(self) -> None:
        self.calls = self.captures = 0

    def __call__(self, tree: Any) -> Any:
        self.calls += 1
        return tree[0] * 2

    def capture(self, function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        self.captures += 1
        return function


def test_the_second_call_of_each_shape_is_captured() -> None:
    counted = Counted()
    captured = Captured(CPU, counted.capture)
    for size, captures in [(3, 0), (3, 1), (3, 1), (4, 1), (4, 2), (3, 2), (4, 2)]:
        assert captured(counted, (torch.full((size,), 1.5),)).tolist() == [3.0] * size
        assert counted.captures == captures
    captured.clear()
    captured(counted, (torch.ones(3),))
    assert counted.captures == 2
    assert captured(counted, (torch.ones(3),), key="other").tolist() == [2.0] * 3
    assert counted.captures == 2


def test_values_of_earlier_calls_stay() -> None:
    static = torch.zeros(2)

    def capture(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        return lambda: static.copy_(function())  # as a graph, which writes to the same memory each time

    captured = Captured(CPU, capture)
    values = [captured(lambda tree: tree[0] + 1, (torch.full((2,), float(number)),)) for number in range(4)]
    assert [value.tolist() for value in values] == [[1.0] * 2, [2.0] * 2, [3.0] * 2, [4.0] * 2]


def test_batches_of_ever_new_shapes_are_not_all_captured() -> None:
    counted = Counted()
    captured = Captured(CPU, counted.capture)
    for _ in range(2):
        for size in range(1, MAX_GRAPHS + 5):
            assert len(captured(counted, (torch.ones(size),))) == size
    assert counted.captures == MAX_GRAPHS


def test_a_batch_of_more_than_tensors_is_not_captured() -> None:
    counted = Counted()
    captured = Captured(CPU, counted.capture)
    for _ in range(3):
        captured(counted, (torch.ones(1), "a graph"))
    assert (counted.captures, counted.calls) == (0, 3)


def test_random_numbers_of_the_cpu_would_be_frozen_and_are_not_captured() -> None:
    counted = Counted()
    captured = Captured(DEVICE, counted.capture)
    values = {captured(lambda tree: tree[0] * torch.rand(()), (torch.ones(1),)).item() for _ in range(4)}
    assert len(values) == 4
    assert counted.captures == 0
    assert captured.eager_because == "random numbers are drawn on the CPU"


def test_what_cannot_be_captured_is_computed_once_a_call_and_said() -> None:
    counted = Counted()

    def refuse(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    captured = Captured(CPU, refuse)
    assert [captured(counted, (torch.ones(1),)).item() for _ in range(3)] == [2.0] * 3
    assert counted.calls == 3
    assert captured.eager_because == "RuntimeError, operation not permitted when stream is capturing"
