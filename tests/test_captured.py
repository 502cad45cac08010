"""Steps that a device runs as a whole; on a CPU, capturing keeps the function and replaying calls the function."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretended import DEVICE
from test_device import CPU, configs_of_every_rule, same
from tiny import TinyModel, on_device, tiny_config, tiny_workload
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.space.optimizers import Adam
from pipeline.training.rows.captured import MAX_GRAPHS, Capture, Captured
from pipeline.training.rows.probe import probe
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.workload import Workload

pytestmark = pytest.mark.usefixtures("one_thread")


class Kept:
    """Stands in for graphs: what was captured computes from the same tensors each time."""

    def __init__(self) -> None:
        self.failures = self.captures = 0

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Keep the function."""
        self.captures += 1
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
    assert same(history(Kept(), **changes), history(None, **changes))


class Doubled:
    """Doubles a tensor, and counts calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tree: Any) -> Any:
        """Return twice the first tensor of a tree."""
        self.calls += 1
        return tree[0] * 2


def test_the_second_call_of_each_shape_is_captured() -> None:
    kept, doubled = Kept(), Doubled()
    captured = Captured(CPU, kept)
    for size, captures in [(3, 0), (3, 1), (3, 1), (4, 1), (4, 2), (3, 2), (4, 2)]:
        assert captured(doubled, (torch.full((size,), 1.5),)).tolist() == [3.0] * size
        assert kept.captures == captures
    captured.clear()
    captured(doubled, (torch.ones(3),))
    assert kept.captures == 2
    assert captured(doubled, (torch.ones(3),), key="other").tolist() == [2.0] * 3
    assert kept.captures == 2


def test_values_of_earlier_calls_stay() -> None:
    class Overwriting(Kept):
        static = torch.zeros(2)

        def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: self.static.copy_(function())  # as a graph, which writes to the same memory each time

    captured = Captured(CPU, Overwriting())
    values = [captured(lambda tree: tree[0] + 1, (torch.full((2,), float(number)),)) for number in range(4)]
    assert [value.tolist() for value in values] == [[1.0] * 2, [2.0] * 2, [3.0] * 2, [4.0] * 2]


def test_batches_of_ever_new_shapes_are_not_all_captured() -> None:
    kept = Kept()
    captured = Captured(CPU, kept)
    for _ in range(2):
        for size in range(1, MAX_GRAPHS + 5):
            assert len(captured(Doubled(), (torch.ones(size),))) == size
    assert kept.captures == MAX_GRAPHS


def test_a_batch_of_more_than_tensors_is_not_captured() -> None:
    kept, doubled = Kept(), Doubled()
    captured = Captured(CPU, kept)
    for _ in range(3):
        captured(doubled, (torch.ones(1), "a graph"))
    assert (kept.captures, doubled.calls) == (0, 3)


def test_random_numbers_of_the_cpu_would_be_frozen_and_are_not_captured() -> None:
    kept = Kept()
    captured = Captured(DEVICE, kept)
    values = {captured(lambda tree: tree[0] * torch.rand(()), (torch.ones(1),)).item() for _ in range(4)}
    assert len(values) == 4
    assert kept.captures == 0
    assert captured.eager_because == "random numbers are drawn on the CPU"


def test_what_cannot_be_captured_is_computed_once_a_call_and_its_memory_is_released() -> None:
    tried = []

    class Refusing(Kept):
        def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
            on_the_way = torch.ones(3)
            tried.append(weakref.ref(on_the_way))
            raise RuntimeError(f"no capture of {len(on_the_way)}\nmore")

    doubled = Doubled()
    captured = Captured(CPU, Refusing())
    gc.disable()
    try:
        assert [captured(doubled, (torch.ones(1),)).item() for _ in range(3)] == [2.0] * 3
        assert [reference() for reference in tried] == [None]
    finally:
        gc.enable()
    assert doubled.calls == 3
    assert captured.eager_because == "RuntimeError, no capture of 3"


def test_after_a_capture_that_failed_elsewhere_every_shape_is_captured_again() -> None:
    kept, doubled = Kept(), Doubled()
    captured = Captured(CPU, kept)
    for _ in range(3):
        captured(doubled, (torch.ones(1),))
    kept.failures += 1
    assert [captured(doubled, (torch.ones(1),)).item() for _ in range(3)] == [2.0] * 3
    assert kept.captures == 2


class Cached(TinyModel):
    """Keeps a tensor that a batch of another size replaces."""

    ones: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        if self.ones is None or len(self.ones) != len(inputs):
            self.ones = torch.ones(len(inputs), 1)
        return super().forward(inputs) * self.ones


class Scaled(nn.Module):
    """A loss that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, with a part that grows slowly."""
        self.calls += 1
        return F.cross_entropy(outputs, targets) + 1e-9 * self.calls * outputs.square().mean()


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        (tiny_workload(), None),
        (tiny_workload(functools.partial(TinyModel, dropout=0.5, batch_norm=True)), None),
        (tiny_workload(Cached), "the model's ones holds a tensor that is no buffer"),
        (dataclasses.replace(tiny_workload(), loss=Scaled()), "the loss changes an attribute"),
    ],
    ids=["tiny", "dropout", "a kept tensor", "a loss that counts"],
)
def test_the_probe_tries_graphs_of_all_steps(
    workload: Workload, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    monkeypatch.setattr("pipeline.training.rows.probe.capture_on", lambda device: kept)
    finding = probe(workload, tiny_config(), device=CPU, dtype=torch.float32)
    assert (finding.plain_because, finding.eager_because) == (None, reason)
    assert kept.captures == (2 if reason is None else 0)  # a training batch, and an evaluated one


def test_the_probe_finds_graphs_that_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stale(Kept):
        def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
            return functools.cache(function)

    monkeypatch.setattr("pipeline.training.rows.probe.capture_on", lambda device: Stale())
    finding = probe(tiny_workload(), tiny_config(), device=CPU, dtype=torch.float32)
    assert finding.plain_because is None
    assert finding.eager_because == "its captured steps train to other numbers"


def test_without_a_device_that_captures_nothing_is_said_of_graphs() -> None:
    assert probe(tiny_workload(Cached), tiny_config(), device=CPU, dtype=torch.float32).eager_because is None
