"""The probe: rows must train to plain training's numbers, be possible with `vmap`, and save time."""

from __future__ import annotations

import dataclasses
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ONE_GROUP, TinyModel, tiny_config, tiny_workload
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import InvalidInput
from pipeline.space.optimizers import SGD, Adam, AdamW
from pipeline.space.param_groups import ParamGroup
from pipeline.training.executor import LocalExecutor
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.probe import probe
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.workload import Workload

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FROZEN_BODY = {"head": ParamGroup(pattern=("head.*",)), "body": ParamGroup(pattern=("*",), lr_ratio=0.0)}
FROZEN_HEAD = {"head": ParamGroup(pattern=("head.*",), lr_ratio=0.0), "body": ParamGroup(pattern=("*",))}


class Recurrent(nn.Module):
    """An LSTM over three pairs of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        logits: Tensor = self.head(self.lstm(inputs.view(-1, 3, 2))[0][:, -1])
        return logits


class Deep(nn.Module):
    """A model of 24 layers, which amplify float32 rounding: a step changes parameters by over 1 % otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(6 if layer == 0 else 32, 32) for layer in range(24))
        self.norms = nn.ModuleList(nn.BatchNorm1d(32) for _ in self.hidden)
        self.head = nn.Linear(32, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        for hidden, norm in zip(self.hidden, self.norms, strict=True):
            inputs = F.relu(norm(hidden(inputs)))
        logits: Tensor = self.head(inputs)
        return logits


class Residual(nn.Module):
    """A model with tied weights, a parameter name with a blank, and a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"in put": nn.Linear(6, 6), "0": nn.Linear(6, 6)})
        self.layers["0"].weight = self.layers["in put"].weight
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        logits: Tensor = self.head(inputs + self.scale * self.layers["0"](torch.tanh(self.layers["in put"](inputs))))
        return logits


class Counting(TinyModel):
    """Replaces a buffer in training by a new tensor, which a row does not see, and reads the buffer in evaluation."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        if self.training:
            self.seen = self.seen + 1
            return super().forward(inputs)
        return super().forward(inputs) * self.seen


class TransposedDropout(TinyModel):
    """Applies dropout to a transposed tensor; PyTorch draws the mask in memory order."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        logits: Tensor = self.head(F.dropout(self.hidden(inputs).t(), training=self.training).t())
        return logits


class SpareLayer(TinyModel):
    """A model with an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class TwoOutputs(TinyModel):
    """Returns a pair."""

    def forward(self, inputs: Tensor) -> Any:
        """Map inputs (batch, 6) to a pair."""
        return super().forward(inputs), inputs


def with_rrelu() -> nn.Module:
    model = TinyModel()
    model.dropout = nn.RReLU()  # type: ignore[assignment]
    return model


def with_cumulative_batch_norm() -> nn.Module:
    model = TinyModel()
    model.norm = nn.BatchNorm1d(8, momentum=None)
    return model


def with_dropout() -> nn.Module:
    return TinyModel(dropout=0.3)


class SpatialNorm(TinyModel):
    """A model with BatchNorm over positions too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        hidden = self.norm(self.hidden(inputs).unflatten(1, (2, 4))).flatten(1)
        logits: Tensor = self.head(F.relu(hidden))
        return logits


def with_batch_norm() -> nn.Module:
    return TinyModel(batch_norm=True)


def batch_norm_of(width: int) -> nn.Module:
    """Return a model with BatchNorm over vectors; the rounding of its sums depends on the column's place in memory."""
    layers = {
        "hidden": nn.Linear(6, width),
        "norm": nn.BatchNorm1d(width),
        "relu": nn.ReLU(),
        "head": nn.Linear(width, 3),
    }
    return nn.Sequential(OrderedDict(layers))


class Following(nn.Module):
    """A model with a frozen layer that is a moving average of a trained layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(16, 3)
        self.average = nn.Linear(6, 8).requires_grad_(False)
        self.average.load_state_dict(self.hidden.state_dict())

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        if self.training:
            with torch.no_grad():
                self.average.weight.copy_(self.average.weight * 0.996 + self.hidden.weight * 0.004)
        logits: Tensor = self.head(torch.relu(torch.cat([self.hidden(inputs), self.average(inputs)], dim=1)))
        return logits


class Fading(TinyModel):
    """A model with a frozen parameter that each forward pass changes; rows would share the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.faded = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        if self.training:
            self.faded.mul_(0.9)
        return super().forward(inputs) * self.faded


class Masked(TinyModel):
    """Adds a buffer with infinities, as a causal mask has them, and has a buffer without numbers."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((6, 6), -torch.inf).triu(diagonal=1))
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        return super().forward(inputs @ self.mask.softmax(dim=1))


class SeldomDropped(TinyModel):
    """Leaves out a layer in one step of a thousand; the probe's few steps leave it in."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.draw = draw
        self.extra = nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        return super().forward(inputs if self.draw() < 1e-3 else inputs + self.extra(inputs))


class Longest(TinyModel):
    """Reads a number of the data, and draws random numbers that choose nothing."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        return super().forward(inputs[:, : int((inputs * 0 + 6).max())])


def why_plain(build_model: Callable[[], nn.Module], **changes: Any) -> str | None:
    return probe(tiny_workload(build_model), tiny_config(**changes), device=CPU, dtype=torch.float32).plain_because


def test_a_large_step_trains_plain_on_a_cpu_where_rows_gain_nothing() -> None:
    def wide(width: int) -> nn.Module:
        layers = OrderedDict[str, nn.Module](hidden=nn.Linear(6, width), inner=nn.Linear(width, width))
        layers["head"] = nn.Linear(width, 3)
        return nn.Sequential(layers)

    assert why_plain(lambda: wide(256)) is None
    assert why_plain(lambda: wide(2048)) == "a step of 0.2 GFLOP gains nothing as a row on a CPU"


CANNOT_FUSE: list[tuple[Callable[[], nn.Module], str]] = [
    (Recurrent, "PyTorch's vmap has no rule for lstm"),
    (with_rrelu, "RuntimeError, vmap: we do not yet support aten::rrelu"),
    (with_cumulative_batch_norm, "RuntimeError, vmap: It looks like you're calling .item() on a Tensor"),
    (SpareLayer, "RuntimeError, the loss does not depend on spare.weight, spare.bias"),
    (Counting, "as rows it trains to other numbers"),
    (Following, "its parameter average.weight changes in a forward pass"),
    (Fading, "its parameter faded changes in a forward pass"),
    (TransposedDropout, "as rows it trains to other numbers"),
    (lambda: SeldomDropped(random.random), "random numbers of Python may choose what a step computes"),
    (lambda: SeldomDropped(np.random.rand), "random numbers of NumPy may choose what a step computes"),
    (
        lambda: SeldomDropped(lambda: torch.rand(())),
        "a random number that Python reads may choose what a step computes",
    ),
]


@pytest.mark.parametrize(("build_model", "reason"), CANNOT_FUSE)
def test_a_model_that_rows_cannot_train_trains_plain_and_says_why(
    build_model: Callable[[], nn.Module], reason: str
) -> None:
    why = why_plain(build_model)
    assert why is not None
    assert why.startswith(f"the model cannot be rows of a matrix: {reason}")
    assert "\n" not in why


def test_a_model_whose_training_step_raises_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"training on a few samples raised TypeError: cross_entropy_loss\(\)"):
        why_plain(TwoOutputs)


def grouped() -> nn.Module:
    """Return a model with GroupNorm over images one pixel high."""
    layers = OrderedDict[str, nn.Module](
        image=nn.Unflatten(1, (2, 1, 3)), hidden=nn.Conv2d(2, 4, 1), norm=nn.GroupNorm(2, 4), flat=nn.Flatten()
    )
    layers["head"] = nn.Linear(12, 3)
    return nn.Sequential(layers)


CAN_FUSE: dict[str, Callable[[], nn.Module]] = {
    "small": TinyModel,
    "dropout": with_dropout,
    "batch norm": with_batch_norm,
    "batch norm of 3": lambda: batch_norm_of(3),
    "batch norm of 33": lambda: batch_norm_of(33),
    "spatial norm": SpatialNorm,
    "tied weights": Residual,
    "group norm": grouped,
    "a mask of infinities": Masked,
    "a number of the data": Longest,
}


@pytest.mark.parametrize("name", CAN_FUSE)
def test_a_model_that_rows_can_train_trains_as_rows_that_equal_plain_in_double_precision(name: str) -> None:
    build_model = CAN_FUSE[name]
    assert why_plain(build_model, param_groups=ONE_GROUP) is None
    optimizers = (SGD(base_lr=0.1, momentum=0.9), AdamW(base_lr=0.01), Adam(base_lr=0.003))
    configs = {number: tiny_config(optimizer, param_groups=ONE_GROUP) for number, optimizer in enumerate(optimizers)}
    workload = in_double(tiny_workload(build_model))
    fused, plain = (cls(configs, workload, device=CPU, dtype=torch.float64) for cls in (FusedTrials, PlainTrials))
    for _ in range(2):
        ours, theirs = fused.train_epoch(), plain.train_epoch()
        for number in configs:
            assert ours[number].metrics == pytest.approx(theirs[number].metrics, rel=1e-9, abs=1e-12)


def test_a_deep_model_that_amplifies_rounding_is_still_a_row() -> None:
    assert why_plain(Deep) is None


def in_double(workload: Workload) -> Workload:
    splits = {name: getattr(workload, name).to(CPU, torch.float64) for name in ("train", "val", "test")}
    return dataclasses.replace(workload, **splits)


def sampled_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of a random half of the samples."""
    return (F.cross_entropy(outputs, targets, reduction="none") * (torch.rand(len(outputs)) < 0.5)).mean()


def test_whether_a_model_or_a_loss_draws_random_numbers_is_found() -> None:
    def draws(workload: Workload) -> frozenset[str]:
        return probe(workload, tiny_config(), device=CPU, dtype=torch.float32).draws

    assert not draws(tiny_workload())
    assert not draws(tiny_workload(with_batch_norm))
    assert draws(tiny_workload(with_dropout))
    assert draws(tiny_workload(with_rrelu))
    assert draws(dataclasses.replace(tiny_workload(), loss=sampled_loss))


def test_a_loss_that_rows_cannot_compute_trains_plain() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        """Return a loss that chooses by its value."""
        entropy = F.cross_entropy(outputs, targets)
        return entropy if entropy.item() > 0.5 else entropy / 2

    workload = dataclasses.replace(tiny_workload(), loss=loss)
    why = probe(workload, tiny_config(), device=CPU, dtype=torch.float32).plain_because
    assert why is not None
    assert ".item()" in why


def test_what_a_config_freezes_or_how_fast_it_trains_does_not_decide_whether_its_workload_can_be_rows() -> None:
    far = {"head": ParamGroup(pattern=("head.*",), lr_ratio=1e30), "body": ParamGroup(pattern=("*",), lr_ratio=0.0)}
    for groups in (FROZEN_BODY, FROZEN_HEAD, far):
        config = tiny_config(SGD(base_lr=1e10), param_groups=groups)
        assert probe(tiny_workload(), config, device=CPU, dtype=torch.float32).plain_because is None


def test_bfloat16_on_a_cpu_trains_as_rows() -> None:
    losses = {}
    for precision in ("bf16", "fp32"):
        config = dataclasses.replace(tiny_config(), precision=precision)
        executor = LocalExecutor(tiny_workload(), config, device=CPU)
        assert executor.plain_because is None
        group = executor.build({0: config, 1: config})
        losses[precision] = [group.train_epoch()[0].metrics["train/loss"] for _ in range(3)][-1]
        assert {parameter.dtype for parameter in group.model_state(0).values()} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
