"""Which trials train as rows, which plain, and that it makes no difference to any of them."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from tiny import BODY_AND_HEAD, ONE_GROUP, TinyModel, tiny_config, tiny_workload
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.nn import functional as F

from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import ASGD, SGD, Adafactor, Adam, AdamW, Muon, NAdam, RMSprop, Rprop
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import Cosine, Cyclic, OneCycle, Plateau, Step
from pipeline.space.trial import EpochMetrics
from pipeline.training import executor as trainers
from pipeline.training.executor import Trainer
from pipeline.training.optim import replay_rates
from pipeline.training.plain import PlainTrials
from pipeline.training.precision import arithmetic
from pipeline.training.rows.probe import probe
from pipeline.training.rows.trainer import FusedTrials
from pipeline.training.shards import TrialParts
from pipeline.workloads.digits import DigitsCNN, DigitsMLP, digits
from pipeline.workloads.workload import Metric, Split, Workload

CPU = torch.device("cpu")
EPOCHS = 4
FROZEN_BODY = {"head": ParamGroup(pattern=("head.*",)), "body": ParamGroup(pattern=("*",), lr_ratio=0.0)}
FROZEN_HEAD = {"head": ParamGroup(pattern=("head.*",), lr_ratio=0.0), "body": ParamGroup(pattern=("*",))}


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """So that several matrices do train at once, on a machine with one core too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


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
    """24 layers, behind which rounding to float32 has changed what a step does to parameters by more than 1 %."""

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
    """Tied weights, parameter names with blanks, and a number as a parameter."""

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


class NormOfVectors(nn.Module):
    """BatchNorm over vectors, whose sums rows fill up."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, class)."""
        logits: Tensor = self.body(images)
        return logits


class Counting(TinyModel):
    """Puts a new buffer into the place of the old one, which a row does not see, and reads it in evaluation alone."""

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
    """Drops out of a transposed tensor, whose mask PyTorch draws in the order in which it lies in memory."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        logits: Tensor = self.head(F.dropout(self.hidden(inputs).t(), training=self.training).t())
        return logits


class SpareLayer(TinyModel):
    """A layer that is not used."""

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
    """BatchNorm over positions too, which sums each channel on its own."""

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
    """Return a net with BatchNorm over vectors, whose sums over a batch depend on where a column lies in a matrix."""
    layers = {
        "hidden": nn.Linear(6, width),
        "norm": nn.BatchNorm1d(width),
        "relu": nn.ReLU(),
        "head": nn.Linear(width, 3),
    }
    return nn.Sequential(OrderedDict(layers))


def build_trainer(build_model: Callable[[], nn.Module] = TinyModel, *, rows: int | None = None) -> Trainer:
    return Trainer(tiny_workload(build_model), tiny_config(), device=CPU, rows=rows)


def various() -> dict[int, TrialConfig]:
    """Trials in two matrices, since some freeze the body, and plain ones."""
    return {
        1: tiny_config(SGD(base_lr=0.1, momentum=0.9), OneCycle(cycle_momentum=True)),
        2: tiny_config(Muon(base_lr=0.02), Step(step_size=2)),
        3: tiny_config(AdamW(base_lr=0.01), Cosine(warmup=1), param_groups=FROZEN_BODY),
        5: tiny_config(NAdam(base_lr=0.01), Plateau(patience=0)),
        6: tiny_config(Adafactor(base_lr=0.01), Cosine(warmup=1)),
        7: tiny_config(ASGD(base_lr=0.1), Step(step_size=1, gamma=0.5), param_groups=FROZEN_BODY),
        8: tiny_config(Rprop(base_lr=1e-3)),
        9: tiny_config(Adam(base_lr=0.01, amsgrad=True)),
    }


def only(number: int, history: list[Mapping[int, EpochMetrics]]) -> list[EpochMetrics]:
    return [results[number] for results in history if number in results]


def train(group: TrialParts, epochs: int = EPOCHS) -> list[Mapping[int, EpochMetrics]]:
    return [group.train_epoch() for _ in range(epochs)]


def assert_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def parts(group: TrialParts) -> list[tuple[str, list[int]]]:
    """Return what trains which trials."""
    return [("rows" if isinstance(part, FusedTrials) else "plain", sorted(part.configs)) for part in group.parts]


@pytest.mark.parametrize("width", [6, 8, 10, 16, 20, 32, 33, 40, 200])
def test_batch_norm_over_vectors_trains_as_rows_that_know_no_neighbours(width: int) -> None:
    trainer = build_trainer(lambda: batch_norm_of(width), rows=16)
    assert trainer.plain_because is None
    configs = {n: tiny_config(AdamW(base_lr=0.001 * (n + 1))) for n in range(11)}
    configs = {n: dataclasses.replace(config, param_groups=ONE_GROUP) for n, config in configs.items()}
    together = trainer.build(configs)
    history = [together.train_epoch()]
    for number in (0, 3, 4, 10):
        together.drop(number)
    history.append(together.train_epoch())
    for number in (1, 9):
        alone = trainer.build({number: configs[number]})
        assert [alone.train_epoch()[number] for _ in history] == [epoch[number] for epoch in history]
        state = together.model_state(number)
        assert all(torch.equal(value, state[name]) for name, value in alone.model_state(number).items())


def pooled(*layers: nn.Module, features: int) -> nn.Module:
    """Return layers over images or sequences, and a head over their means."""
    return nn.Sequential(*layers, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(features, 3))


KERNELS_BY_SHAPE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, int]] = {
    "sequences": (
        lambda: pooled(nn.Conv1d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 4, 3), features=4),
        (1, 8),
        *(101, 8, 20),
    ),
    "two channels": (lambda: pooled(nn.Conv2d(8, 2, 1), nn.GroupNorm(1, 2), features=2), (8, 12, 12), *(192, 8, 20)),
    "strided": (
        lambda: pooled(nn.Conv2d(3, 8, 1, stride=2), nn.BatchNorm2d(8), nn.SiLU(), features=8),
        (3, 16, 16),
        *(114, 8, 20),
    ),
    "large evaluation": (
        lambda: nn.Sequential(nn.Linear(22, 45), nn.SiLU(), nn.Linear(45, 3)),
        (22,),
        *(67, 32, 270),
    ),
}
"""Model, shape of a sample, samples to train on, batch size, samples to evaluate: where kernels for one row and for
several differ by the size of a batch, or in so few bits that few steps do not show it."""


@pytest.mark.parametrize("name", KERNELS_BY_SHAPE)
def test_rows_know_no_neighbours_where_kernels_differ_by_shape(name: str) -> None:
    build_model, shape, samples, batch_size, evaluated = KERNELS_BY_SHAPE[name]
    generator = torch.Generator().manual_seed(0)
    train_split, val, test = (
        Split(torch.randn(count, *shape, generator=generator), torch.randint(3, (count,), generator=generator))
        for count in (samples, evaluated, 20)
    )
    workload = dataclasses.replace(tiny_workload(build_model=build_model), train=train_split, val=val, test=test)
    optimizers = (
        SGD(base_lr=0.1, momentum=0.9),
        AdamW(base_lr=0.01),
        RMSprop(base_lr=1e-3),
    )
    configs = {
        number: tiny_config(optimizer, OneCycle(), batch_size=batch_size, param_groups=ONE_GROUP)
        for number, optimizer in enumerate(optimizers)
    }
    trainer = Trainer(workload, configs[0], device=CPU, rows=16)
    together = trainer.build(configs)
    assert parts(together) == [("rows", [0, 1, 2])]
    history = train(together)
    for number, config in configs.items():
        alone = trainer.build({number: config})
        assert only(number, train(alone)) == only(number, history)
        assert alone.test()[number] == together.test()[number]
        assert_same_bits(alone.model_state(number), together.model_state(number))


def test_a_large_step_trains_plain_on_a_cpu_where_rows_gain_nothing() -> None:
    def wide(width: int) -> nn.Module:
        layers = OrderedDict[str, nn.Module](hidden=nn.Linear(6, width), inner=nn.Linear(width, width))
        layers["head"] = nn.Linear(width, 3)
        return nn.Sequential(layers)

    assert build_trainer(lambda: wide(256)).plain_because is None
    assert build_trainer(lambda: wide(2048)).plain_because == "a step of 0.2 GFLOP gains nothing as a row on a CPU"


class Following(nn.Module):
    """A frozen layer that follows a trained one slowly."""

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


CANNOT_FUSE: list[tuple[Callable[[], nn.Module], str]] = [
    (Recurrent, "PyTorch's vmap has no rule for lstm"),
    (with_rrelu, "RuntimeError, vmap: we do not yet support aten::rrelu"),
    (with_cumulative_batch_norm, "RuntimeError, vmap: It looks like you're calling .item() on a Tensor"),
    (SpareLayer, "RuntimeError, the loss does not depend on spare.weight, spare.bias"),
    (Counting, "as rows it trains to other numbers"),
    (Following, "its parameter average.weight changes in training and is no buffer"),
    (TransposedDropout, "as rows it trains to other numbers"),
    (lambda: batch_norm_of(3), "its numbers depend on how many trials are rows"),
    (TwoOutputs, "it could not be tried, TypeError: cross_entropy_loss()"),
]


@pytest.mark.parametrize(("build_model", "reason"), CANNOT_FUSE)
def test_a_model_that_rows_cannot_train_trains_plain_and_says_why(
    build_model: Callable[[], nn.Module], reason: str
) -> None:
    trainer = build_trainer(build_model)
    assert trainer.plain_because is not None
    assert trainer.plain_because.startswith(f"the model cannot be rows of a matrix: {reason}")
    assert "\n" not in trainer.plain_because
    configs = {0: tiny_config(), 1: tiny_config(AdamW(base_lr=0.1, weight_decay=0.1))}
    group = trainer.build(configs)
    assert parts(group) == [("plain", [0]), ("plain", [1])]
    plain = PlainTrials(configs, tiny_workload(build_model), device=CPU)
    with arithmetic(tiny_config(), CPU):
        expected = [plain.train_epoch() for _ in range(2)]
    assert train(group, 2) == expected


@pytest.mark.parametrize("build_model", [TinyModel, with_dropout, SpatialNorm, Residual, Deep])
def test_a_model_that_rows_can_train_trains_as_rows(build_model: Callable[[], nn.Module]) -> None:
    trainer = build_trainer(build_model)
    assert trainer.plain_because is None
    configs = {number: tiny_config(Adam(base_lr=0.01 * (1 + number))) for number in range(3)}
    group = trainer.build(configs)
    assert {kind for kind, _ in parts(group)} == {"rows"}
    assert all(metrics.finished for results in train(group) for metrics in results.values())


def sampled_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of about half of the samples."""
    return (F.cross_entropy(outputs, targets, reduction="none") * (torch.rand(len(outputs)) < 0.5)).mean()


def test_whether_a_model_or_a_loss_draws_random_numbers_is_found() -> None:
    def draws(workload: Workload) -> bool:
        return probe(workload, tiny_config(), device=CPU, dtype=torch.float32).draws_random_numbers

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

    trainer = Trainer(dataclasses.replace(tiny_workload(), loss=loss), tiny_config(), device=CPU)
    assert trainer.plain_because is not None
    assert ".item()" in trainer.plain_because


def test_what_a_config_freezes_or_how_fast_it_trains_does_not_decide_whether_its_workload_can_be_rows() -> None:
    far = {"head": ParamGroup(pattern=("head.*",), lr_ratio=1e30), "body": ParamGroup(pattern=("*",), lr_ratio=0.0)}
    for groups in (FROZEN_BODY, FROZEN_HEAD, far):
        config = tiny_config(SGD(base_lr=1e10), param_groups=groups)
        assert Trainer(tiny_workload(), config, device=CPU).plain_because is None


def test_one_group_mixes_rows_and_plain_trials_each_of_which_equals_itself_alone() -> None:
    trainer = build_trainer(rows=8)
    group = trainer.build(various())
    assert parts(group) == [("rows", [1, 5, 9]), ("rows", [3, 7]), ("plain", [2]), ("plain", [6]), ("plain", [8])]
    history = train(group)
    tests = group.test()
    for number, config in various().items():
        alone = trainer.build({number: config})
        assert only(number, train(alone)) == only(number, history)
        assert alone.test() == {number: tests[number]}
        assert_same_bits(alone.model_state(number), group.model_state(number))
        if not trainer.fuses(config):
            plain = PlainTrials({number: config}, tiny_workload(), device=CPU, seeded=False)
            with arithmetic(tiny_config(), CPU):
                assert [plain.train_epoch()[number] for _ in range(EPOCHS)] == only(number, history)


def test_configs_that_freeze_different_groups_are_separate_matrices_and_what_is_frozen_stays() -> None:
    optimizer = AdamW(base_lr=0.1, weight_decay=0.1)
    groups = [BODY_AND_HEAD, FROZEN_BODY, FROZEN_HEAD, FROZEN_BODY]
    configs = {number: tiny_config(optimizer, param_groups=some) for number, some in enumerate(groups)}
    group = build_trainer(SpatialNorm, rows=8).build(configs)
    assert sorted(parts(group)) == [("rows", [0]), ("rows", [1, 3]), ("rows", [2])]
    before = group.model_state(0)
    train(group, 2)
    for number, some in enumerate(groups):
        for name, _ in SpatialNorm().named_parameters():
            frozen = some["head" if name.startswith("head.") else "body"].lr_ratio == 0
            assert torch.equal(group.model_state(number)[name], before[name]) == frozen, (number, name)


class OwnConvolution(DigitsCNN):
    """Convolves otherwise than PyTorch's modules do: the gradient of its bias is another sum than that of rows."""

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, class)."""
        ones, zeros = (1, 1), (0, 0)
        for layer in (self.conv1, self.conv2):
            images = torch.convolution(images, layer.weight, layer.bias, ones, ones, ones, False, zeros, 1)
            images = F.max_pool2d(F.relu(images), 2)
        logits: Tensor = self.fc(images.flatten(1))
        return logits


@pytest.mark.parametrize(
    ("model", "as_it_is"), [(DigitsMLP, True), (DigitsCNN, True), (OwnConvolution, False), (NormOfVectors, False)]
)
def test_a_lone_row_is_computed_as_the_model_is_where_that_is_the_same_to_the_bit(
    model: type[nn.Module], as_it_is: bool
) -> None:
    batched = []

    def build() -> nn.Module:
        built = model()
        head = [module for module in built.modules() if isinstance(module, nn.Linear)][-1]
        head.register_forward_pre_hook(lambda head, _: batched.append(is_batchedtensor(head.weight)))
        return built

    groups = {"all": ParamGroup(pattern=("*",))}
    optimizers = (
        SGD(base_lr=0.1, momentum=0.9),
        AdamW(base_lr=0.01),
        RMSprop(base_lr=1e-3),
    )
    configs = {
        number: tiny_config(optimizer, OneCycle(), epochs=2, batch_size=64, param_groups=groups)
        for number, optimizer in enumerate(optimizers)
    }
    trainer = Trainer(dataclasses.replace(digits("cnn"), build_model=build), configs[0], device=CPU)
    together = trainer.build(configs)
    history = train(together, 2)
    for number, config in configs.items():
        alone = trainer.build({number: config})
        batched.clear()
        assert only(number, train(alone, 2)) == only(number, history)
        assert set(batched) == {not as_it_is}
        assert alone.test()[number] == together.test()[number]
        assert_same_bits(alone.model_state(number), together.model_state(number))


@pytest.mark.parametrize("build_model", [TinyModel, with_dropout])
def test_how_many_rows_share_a_matrix_changes_no_result(build_model: Callable[[], nn.Module]) -> None:
    groups = {rows: build_trainer(build_model, rows=rows).build(various()) for rows in (1, 3, None)}
    assert [len(numbers) for kind, numbers in parts(groups[1]) if kind == "rows"] == [1] * 5
    histories = {rows: train(group) for rows, group in groups.items()}
    assert histories[1] == histories[3] == histories[None]
    for number in various():
        for rows in (3, None):
            assert_same_bits(groups[rows].model_state(number), groups[1].model_state(number))


def test_rows_that_pruning_leaves_are_spread_equally_again_and_do_not_notice() -> None:
    optimizers = [
        ASGD(base_lr=0.1),
        NAdam(base_lr=0.01),
        SGD(base_lr=0.1, momentum=0.9),
        Adam(base_lr=0.01),
    ]
    configs = {n: tiny_config(optimizer, OneCycle()) for n, optimizer in enumerate([*optimizers, *optimizers])}
    trainer = build_trainer(with_dropout, rows=3)
    group = trainer.build(configs)
    assert sorted(len(numbers) for _, numbers in parts(group)) == [2, 3, 3]
    history = train(group, 2)
    for number in (2, 3, 4, 6, 7):
        group.drop(number)
    history += train(group, 2)
    assert [numbers for _, numbers in parts(group)] == [[0, 1, 5]]
    assert group.describe() == "rows 3"
    for number in (0, 1, 5):
        alone = trainer.build({number: configs[number]})
        assert only(number, history) == only(number, train(alone, 4))
        assert_same_bits(group.model_state(number), alone.model_state(number))


class Memory:
    """Stands in for a device's memory, which in a test cannot run out: as many rows as fit into it."""

    def __init__(self) -> None:
        self.rows = 1_000


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    size = Memory()

    class Limited(FusedTrials):
        def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            if len(self.configs) > size.rows:
                raise torch.OutOfMemoryError(f"{len(self.configs)} rows do not fit")
            return super().gradients(inputs, targets)

    monkeypatch.setattr(trainers, "FusedTrials", Limited)
    return size


@pytest.mark.parametrize("build_model", [TinyModel, with_dropout])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("fitting", [1, 2, 4])
def test_a_matrix_that_runs_out_of_memory_is_halved_to_the_same_results(
    memory: Memory, build_model: Callable[[], nn.Module], after: int, fitting: int
) -> None:
    configs = {number: tiny_config(Adam(base_lr=0.01 * (number + 1))) for number in range(7)}
    configs[7] = tiny_config(Muon(base_lr=0.02))
    expected = build_trainer(build_model, rows=8).build(configs)
    history = train(expected, 1)
    expected.drop(3)
    history += train(expected, EPOCHS - 1)

    trainer = build_trainer(build_model, rows=8)
    group = trainer.build(configs)
    if after == 0:
        memory.rows = fitting
    found = train(group, 1)
    group.drop(3)
    found += train(group, 1)
    memory.rows = fitting
    found += train(group, EPOCHS - 2)
    assert found == history
    assert max(len(numbers) for _, numbers in parts(group)) <= fitting
    assert trainer.rows is not None
    assert trainer.rows <= fitting
    for number in configs.keys() - {3}:
        assert_same_bits(group.model_state(number), expected.model_state(number))


def test_a_row_that_runs_out_of_memory_alone_fails_and_the_plain_trials_go_on(memory: Memory) -> None:
    group = build_trainer(rows=8).build(various())
    train(group, 1)
    memory.rows = 0
    results = group.train_epoch()
    rows, plain = (1, 3, 5, 7, 9), (2, 6, 8)
    assert {results[number].failed for number in rows} == {"OutOfMemoryError: 1 rows do not fit"}
    assert all(results[number].finished for number in plain)
    assert sorted(group.train_epoch()) == [*plain]


class Tiring(TinyModel):
    """Works for the first 36 passes, which is six epochs and more than a workload is tried with, and no longer."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))
        self.passes = itertools.count(1)  # what the probe sees in a module that counts with a number, it trains plain

    def tired(self) -> bool:
        return next(self.passes) > 36


class Fails(Tiring):
    """Raises when tired."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        if self.tired():
            raise ValueError("tired")
        return super().forward(inputs) * self.spare


def test_an_exception_in_a_matrix_fails_its_trials_with_the_cause() -> None:
    group = build_trainer(Fails, rows=8).build({0: tiny_config(), 1: tiny_config(), 2: tiny_config(Muon(base_lr=0.02))})
    assert parts(group) == [("rows", [0, 1]), ("plain", [2])]
    assert all(metrics.finished for results in train(group, 6) for metrics in results.values())
    results = group.train_epoch()
    assert {metrics.failed for metrics in results.values()} == {"ValueError: tired"}
    assert sorted(results) == [0, 1, 2]
    assert group.train_epoch() == {}


class SometimesSpare(Tiring):
    """Has a parameter that takes no part when tired."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        logits = super().forward(inputs)
        return logits if self.tired() else logits * self.spare


def test_an_exception_in_one_matrix_leaves_the_others_alone() -> None:
    all_train = {"all": ParamGroup(pattern=("*",))}
    frozen = {"spare": ParamGroup(pattern=("spare",), lr_ratio=0.0), **all_train}
    configs = {n: tiny_config(param_groups=groups) for n, groups in enumerate([all_train, frozen, all_train, frozen])}
    trainer = build_trainer(SometimesSpare, rows=8)
    group = trainer.build(configs)
    assert sorted(parts(group)) == [("rows", [0, 2]), ("rows", [1, 3])]
    history = train(group, 7)
    assert {history[6][number].failed for number in (0, 2)} == {"RuntimeError: the loss does not depend on spare"}
    alone = trainer.build({number: configs[number] for number in (1, 3)})
    expected = train(alone, 7)
    for number in (1, 3):
        assert only(number, history) == only(number, expected)


@pytest.mark.parametrize("build_model", [TinyModel, with_dropout])
@pytest.mark.parametrize("rows", [1, 2, None])
def test_a_saved_group_goes_on_to_the_bit_whatever_its_rows(
    build_model: Callable[[], nn.Module], rows: int | None
) -> None:
    configs = various() | {4: tiny_config(SGD(base_lr=1e30))}
    uninterrupted = build_trainer(build_model, rows=3).build(configs)
    assert train(uninterrupted, 1)[0][4].diverged
    uninterrupted.drop(5)
    buffer = io.BytesIO()
    torch.save(uninterrupted.state_dict(), buffer)
    expected = train(uninterrupted, 3)
    buffer.seek(0)
    resumed = build_trainer(build_model, rows=rows).build(configs)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert train(resumed, 3) == expected
    for number in expected[0]:
        assert_same_bits(resumed.model_state(number), uninterrupted.model_state(number))


def test_a_saved_group_that_runs_out_of_memory_is_halved_too(memory: Memory) -> None:
    configs = {number: tiny_config(Adam(base_lr=0.01 * (number + 1))) for number in range(4)}
    uninterrupted = build_trainer(rows=4).build(configs)
    train(uninterrupted, 2)
    resumed = build_trainer(rows=4).build(configs)
    resumed.load_state_dict(uninterrupted.state_dict())
    expected = train(uninterrupted, 2)
    memory.rows = 1
    assert train(resumed, 2) == expected


@pytest.mark.parametrize("build_model", [TinyModel, with_dropout, Recurrent])
def test_threads_and_the_global_random_state_are_left_as_they_were(build_model: Callable[[], nn.Module]) -> None:
    random_state = torch.get_rng_state()
    group = build_trainer(build_model).build(various())
    group.train_epoch()
    group.drop(1)
    group.test()
    group.model_state(3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == 2


def test_bfloat16_on_a_cpu_trains_plain_since_its_rows_would_notice_each_other() -> None:
    losses = {}
    for precision in ("bf16", "fp32"):
        config = dataclasses.replace(tiny_config(), precision=precision)
        trainer = Trainer(tiny_workload(TinyModel), config, device=torch.device("cpu"))
        group = trainer.build({0: config})
        losses[precision] = [group.train_epoch()[0].metrics["train/loss"] for _ in range(3)][-1]
        assert (trainer.plain_because is None) == (precision == "fp32")
        assert trainer.plain_because is None or "depend on how many trials are rows" in trainer.plain_because
        assert {parameter.dtype for parameter in group.model_state(0).values()} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def refuses(outputs: Tensor, targets: Tensor) -> Tensor:
    if not bool(torch.isfinite(outputs).all()):
        raise ValueError("input contains NaN")
    return (outputs.argmax(dim=1) == targets).double().mean()


def test_a_metric_that_refuses_what_diverged_does_not_fail_the_neighbours() -> None:
    workload = dataclasses.replace(tiny_workload(), metrics={"accuracy": Metric(refuses, "maximize")})
    configs = {number: tiny_config(SGD(base_lr=rate)) for number, rate in enumerate([0.01, 0.02, 1e30])}
    for rows in (1, 3):
        results = Trainer(workload, configs[0], device=torch.device("cpu"), rows=rows).build(configs).train_epoch()
        assert [results[number].finished for number in configs] == [True, True, False]
        assert results[2].failed is None
        assert "the loss became" in str(results[2].diverged)


def test_the_rates_of_a_stored_trial_are_those_that_it_used() -> None:
    schedules = [
        OneCycle(),
        Plateau(patience=0, factor=0.5),
        Cosine(warmup=2),
        Cyclic(max_lr_ratio=3.0, step_size_up=2),
    ]
    configs = {n: tiny_config(SGD(base_lr=0.1), schedule, epochs=6) for n, schedule in enumerate(schedules)}
    history = train(build_trainer().build(configs), 6)
    for number, config in configs.items():
        epochs = only(number, history)
        stored = [dataclasses.replace(epoch, lr={}) for epoch in epochs]
        assert list(replay_rates(config, stored, directions=tiny_workload().directions)) == epochs
