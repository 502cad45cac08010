"""The fused trainer against the plain one, and what decides a row's bits."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torchvision
from tiny import TinyModel, on_device, tiny_config, tiny_workload
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import OPTIMIZERS, SGD, Adadelta, Adam, AdamW, Optimizer, RMSprop
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import Constant, Cosine, Cyclic, OneCycle, Plateau, Scheduler, Step
from pipeline.space.trial import EpochMetrics
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.trainer import FusedTrials
from pipeline.training.rows.update_rules import has_rule
from pipeline.workloads.workload import Metric, Split, Workload, accuracy

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
EPOCHS = 11
"""Of 5 steps: 55 in all."""

LOG_RANGES = {"base_lr": (1e-3, 1e-2), "weight_decay": (1e-4, 1e-2), "eps": (1e-8, 1e-4), "lr_decay": (1e-3, 1e-1)}
"""Hyperparameters that are drawn log-uniformly; rates at which training does not blow up, and with it rounding."""
RANGES = {
    "momentum": (0.5, 0.95),
    "dampening": (0.0, 0.5),
    "beta1": (0.5, 0.95),
    "beta2": (0.8, 0.999),
    "momentum_decay": (0.0, 0.01),
    "alpha": (0.7, 0.99),
    "rho": (0.7, 0.99),
    "initial_accumulator_value": (0.0, 0.1),
    "lambd": (1e-4, 1e-2),
    "t0": (0.0, 100.0),
}
FLAGS = ("nesterov", "amsgrad", "centered", "decoupled_weight_decay")

SCHEDULES: dict[str, Scheduler] = {
    "step": Step(step_size=3, gamma=0.3),
    "one cycle": OneCycle(),
    "plateau": Plateau(patience=0, factor=0.5, threshold=0.02),
    "warm-up and cosine": Cosine(warmup=7, interval="step"),
    "one cycle of momentum": OneCycle(cycle_momentum=True, pct_start=0.4, three_phase=True),
    "cycles of momentum": Cyclic(cycle_momentum=True, max_lr_ratio=4.0, step_size_up=4, mode="triangular2"),
}


class TinyCnn(nn.Module):
    """A convolution with BatchNorm and max-pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6), laid out as images of 6×6 products, to logits (batch, class)."""
        images = (inputs.unsqueeze(2) * inputs.unsqueeze(1)).unsqueeze(1)
        logits: Tensor = self.head(F.max_pool2d(F.relu(self.norm(self.conv(images))), (6, 2)).flatten(1))
        return logits


class WideBatchNorm(nn.Module):
    """BatchNorm over vectors, 33 wide: PyTorch sums 32 columns at a time, rows side by side, and the rest otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 33), nn.BatchNorm1d(33), nn.SiLU())
        self.head = nn.Linear(33, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        logits: Tensor = self.head(self.body(inputs))
        return logits


class OddModel(nn.Module):
    """Tied weights, a number as a parameter, parameters frozen by hand, and buffers of every kind."""

    steps: Tensor
    odd: Tensor
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"in put": nn.Linear(6, 6), "0": nn.Linear(6, 6)})
        self.layers["0"].weight = self.layers["in put"].weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.head = nn.Linear(6, 3)
        nn.utils.parametrize.register_parametrization(self.head, "weight", nn.Tanh())
        self.register_buffer("steps", torch.zeros(2, dtype=torch.long))
        self.register_buffer("odd", torch.tensor(False))
        self.register_buffer("average", torch.zeros(6), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        hidden = torch.tanh(self.layers["in put"](inputs))
        if self.training:
            self.steps.add_(1)
            self.odd.logical_not_()
            self.average.mul_(0.9).add_(0.1 * hidden.detach().mean(dim=0))
        residual = inputs + self.scale * self.layers["0"](hidden - self.average * self.odd) * self.frozen
        logits: Tensor = self.head(residual)
        return logits


class SpareLayer(TinyModel):
    """A layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


def with_dropout() -> nn.Module:
    return TinyModel(dropout=0.3)


def with_dropout_and_batch_norm() -> nn.Module:
    model = TinyModel(dropout=0.3, batch_norm=True)
    model.hidden.register_parameter("bias", None)  # in front of BatchNorm its gradient is but rounding
    return model


def optimizer_classes(*, with_momentum: bool = False) -> list[tuple[type[Optimizer], str | None]]:
    """Return every optimizer that has a rule, and again with each of its options set."""
    classes = [cls for cls in OPTIMIZERS.values() if has_rule(cls)]
    if with_momentum:
        classes = [cls for cls in classes if {"momentum", "beta1"} & cls.__dataclass_fields__.keys()]
    return [(cls, flag) for cls in classes for flag in (None, *FLAGS) if flag is None or hasattr(cls, flag)]


def random_trials(schedule: Scheduler, *, epochs: int, seed: int, of_each: int = 1) -> dict[int, TrialConfig]:
    """Return trials of each optimizer and option, in random order, each with numbers of its own."""
    rng = random.Random(seed)

    def log_uniform(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    def config(cls: type[Optimizer], flag: str | None) -> TrialConfig:
        fields = cls.__dataclass_fields__
        drawn: dict[str, Any] = {name: log_uniform(*ends) for name, ends in LOG_RANGES.items() if name in fields}
        drawn |= {name: rng.uniform(*ends) for name, ends in RANGES.items() if name in fields}
        if flag is not None:
            drawn[flag] = True
        if flag == "nesterov":
            drawn["dampening"] = 0.0
        if cls is Adadelta:
            drawn["base_lr"] *= 100
        groups = {
            "head": ParamGroup(
                pattern=("head.*",), lr_ratio=log_uniform(0.3, 3.0), weight_decay=log_uniform(1e-4, 0.1)
            ),
            "body": ParamGroup(pattern=("*",)),
        }
        return tiny_config(cls(**drawn), schedule, epochs=epochs, param_groups=groups)

    classes = optimizer_classes(with_momentum=getattr(schedule, "cycle_momentum", False)) * of_each
    return dict(enumerate(config(*choice) for choice in rng.sample(classes, len(classes))))


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, rel: float, trial: str) -> None:
    """Compare each tensor, relative to its largest number, of which some begin as zeros: hence a floor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not value.is_floating_point():
            assert torch.equal(found[name], value), f"{trial}, {name}"
            continue
        apart, largest = float((found[name] - value).abs().max()), max(float(value.abs().max()), 1e-3)
        assert apart <= rel * largest, f"{trial}, {name}: {apart / largest}"


def assert_trains_equally(
    configs: Mapping[int, TrialConfig], workload: Workload, *, epochs: int, dtype: torch.dtype, rel: float
) -> None:
    workload = on_device(workload, device=CPU, dtype=dtype)
    plain = PlainTrials(configs, workload, device=CPU, dtype=dtype)
    fused = FusedTrials(configs, workload, device=CPU, dtype=dtype)
    for _ in range(epochs):
        expected, found = plain.train_epoch(), fused.train_epoch()
        assert [*found] == [*expected] == [*configs]
        for number, config in configs.items():
            assert expected[number].finished
            assert found[number].lr == expected[number].lr
            assert (found[number].epoch, found[number].step) == (expected[number].epoch, expected[number].step)
            assert found[number].metrics == pytest.approx(expected[number].metrics, rel=rel), config.optimizer
            found_state, expected_state = fused.model_state(number), plain.model_state(number)
            assert_close(found_state, expected_state, rel=rel, trial=str(config.optimizer))
    tested = fused.test()
    for number, metrics in plain.test().items():
        assert tested[number] == pytest.approx(metrics, rel=rel)


def assert_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_optimizer_with_every_kind_of_schedule_equals_the_plain_trainer(name: str) -> None:
    configs = random_trials(SCHEDULES[name], epochs=EPOCHS, seed=0)
    assert_trains_equally(configs, tiny_workload(), epochs=EPOCHS, dtype=torch.float64, rel=1e-9)


@pytest.mark.parametrize("build_model", [with_dropout_and_batch_norm, TinyCnn, OddModel])
def test_models_with_buffers_random_numbers_and_odd_parameters_equal_the_plain_trainer(
    build_model: Callable[[], nn.Module],
) -> None:
    configs = random_trials(Cosine(warmup=1), epochs=3, seed=1)
    assert_trains_equally(configs, tiny_workload(build_model), epochs=3, dtype=torch.float64, rel=1e-9)


def test_the_plain_trainer_is_equalled_in_float32_for_as_long_as_rounding_is_not_amplified() -> None:
    # A number is rounded to 6e-8 of its size. Each step adds roundings, where an update divides by the root of small
    # squares it enlarges those of the gradient, and training on amplifies what there is. Hence five steps, which leave
    # 1e-6, and ten times that.
    configs = random_trials(Constant(), epochs=1, seed=2)
    assert_trains_equally(configs, tiny_workload(), epochs=1, dtype=torch.float32, rel=1e-5)


TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=10),
    "vision_transformer": lambda: torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10
    ),
}


# On a CPU, vmap takes the rows of PyTorch's attention one by one, and says so.
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching rule for "
    "aten.._(scaled_dot_product_flash_attention_for_cpu|native_multi_head_attention):UserWarning"
)
@pytest.mark.parametrize("name", TORCHVISION)
def test_models_of_torchvision_equal_the_plain_trainer(name: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def split(samples: int) -> Split:
        targets = torch.randint(10, (samples,), generator=generator)
        return Split(torch.randn(samples, 3, 32, 32, generator=generator), targets)

    norm = Metric(lambda outputs, targets: outputs.norm(), "minimize")
    metrics = {"accuracy": Metric(accuracy, "maximize"), "norm": norm}
    workload = Workload(
        name=name,
        build_model=TORCHVISION[name],
        train=split(8),
        val=split(4),
        test=split(4),
        loss=F.cross_entropy,
        metrics=metrics,
    )
    pattern = {"resnet18": "fc.*", "vision_transformer": "heads.*"}.get(name, "classifier.*")
    head = ParamGroup(pattern=(pattern,), lr_ratio=2.0)
    groups = {"head": head, "body": ParamGroup(pattern=("*",))}
    # Between two BatchNorms a bias has no gradient but rounding, which Adam would divide by its root: hence the eps.
    optimizers = (SGD(base_lr=0.01, momentum=0.9), AdamW(base_lr=1e-3, eps=1e-3))
    configs = {
        number: tiny_config(optimizer, OneCycle(), epochs=1, batch_size=4, param_groups=groups)
        for number, optimizer in enumerate(optimizers)
    }
    assert_trains_equally(configs, workload, epochs=1, dtype=torch.float64, rel=1e-9)


BIT_MODELS = [TinyModel, with_dropout, TinyCnn, WideBatchNorm]


def trained(
    configs: Mapping[int, TrialConfig], workload: Workload, *, dropped: Mapping[int, Sequence[int]] | None = None
) -> dict[int, tuple[list[EpochMetrics], Any]]:
    """Train trials as the rows of one matrix; return each trial's epochs and its model's state.

    Args:
        configs: Trial number to config.
        workload: What they train.
        dropped: Number of epochs, counted from 1, to the trials that are dropped then.
    """
    group = FusedTrials(configs, on_device(workload, device=CPU), device=CPU)
    history = []
    states: dict[int, dict[str, Tensor]] = {}
    for epoch in range(1, 4):
        history.append(group.train_epoch())
        states |= {number: group.model_state(number) for number in group.configs}
        for number in (dropped or {}).get(epoch, ()):
            group.drop(number)
    return {number: ([epoch[number] for epoch in history if number in epoch], states[number]) for number in states}


def assert_same(found: tuple[list[EpochMetrics], Any], expected: tuple[list[EpochMetrics], Any]) -> None:
    assert found[0] == expected[0]
    assert_same_bits(found[1], expected[1])


def changed(config: TrialConfig) -> TrialConfig:
    """Return a config of the same optimizer with its options, and with another rate, schedule, decay and limit."""
    optimizer = dataclasses.replace(config.optimizer, base_lr=0.3 * config.optimizer.base_lr)
    groups = {"head": ParamGroup(pattern=("head.*",), lr_ratio=3.0), "body": ParamGroup(pattern=("*",))}
    return dataclasses.replace(
        config, optimizer=optimizer, scheduler=Step(step_size=1), param_groups=groups, clip_grad_norm=0.1
    )


@pytest.mark.parametrize("build_model", BIT_MODELS)
def test_what_the_other_rows_hold_affects_no_bit(build_model: Callable[[], nn.Module]) -> None:
    configs = random_trials(OneCycle(), epochs=3, seed=3, of_each=2)
    workload = tiny_workload(build_model)
    expected = trained(configs, workload)
    for kept in (list(configs)[::2], list(configs)[1::2], list(configs)[:1], list(configs)[-1:]):
        others = {number: config if number in kept else changed(config) for number, config in configs.items()}
        found = trained(others, workload)
        for number in kept:
            assert_same(found[number], expected[number])


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("build_model", BIT_MODELS)
def test_a_row_among_copies_of_itself_in_the_same_place_is_the_same_to_the_bit(
    build_model: Callable[[], nn.Module], rows: int
) -> None:
    # The other rows have other optimizers here and the row's own there: the blocks of an optimizer differ in size.
    all_configs = random_trials(OneCycle(), epochs=3, seed=3)
    configs = {number: all_configs[number] for number in list(all_configs)[:rows]}
    workload = tiny_workload(build_model)
    for number, found in trained(configs, workload).items():
        placement = found[0][0].placement
        assert placement is not None
        assert placement.place is not None
        copies = trained(dict.fromkeys(range(len(configs)), configs[number]), workload)
        assert_same(copies[placement.place], found)


@pytest.mark.parametrize("build_model", BIT_MODELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_that_are_dropped_affect_others_only_by_how_many_they_are(
    build_model: Callable[[], nn.Module], seed: int
) -> None:
    configs = random_trials(Cosine(warmup=1), epochs=8, seed=4, of_each=3)
    workload = tiny_workload(build_model)
    order = random.Random(seed).sample([*configs], len(configs))
    third = len(order) // 3
    dropped = {1: order[:third], 2: order[third : 2 * third]}
    expected = trained(configs, workload, dropped=dropped)
    leaving = {*dropped[1], *dropped[2]}
    others = {number: changed(config) if number in leaving else config for number, config in configs.items()}
    found = trained(others, workload, dropped=dropped)
    for number in order[2 * third :]:
        assert len(found[number][0]) == 3
        assert_same(found[number], expected[number])


@pytest.mark.parametrize("build_model", [with_dropout_and_batch_norm, TinyCnn, OddModel])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_that_are_left_after_drops_in_any_order_equal_the_plain_trainer(
    build_model: Callable[[], nn.Module], seed: int
) -> None:
    configs = random_trials(Cosine(warmup=1), epochs=8, seed=4, of_each=2)
    workload = on_device(tiny_workload(build_model), device=CPU, dtype=torch.float64)
    order = random.Random(seed).sample([*configs], len(configs))
    plain = PlainTrials(configs, workload, device=CPU, dtype=torch.float64)
    fused = FusedTrials(configs, workload, device=CPU, dtype=torch.float64)
    while len(order) > 1:
        for number in [order.pop() for _ in range(min(8, len(order) - 1))]:
            plain.drop(number)
            fused.drop(number)
        expected, found = plain.train_epoch(), fused.train_epoch()
        assert list(found) == list(expected) == sorted(order)
        for number in order:
            assert found[number].metrics == pytest.approx(expected[number].metrics, rel=1e-9)
            assert found[number].lr == expected[number].lr
            states = fused.model_state(number), plain.model_state(number)
            assert_close(*states, rel=1e-9, trial=str(configs[number].optimizer))


@pytest.mark.parametrize("build_model", BIT_MODELS)
def test_a_diverging_row_affects_no_bit_of_the_others(build_model: Callable[[], nn.Module]) -> None:
    configs = random_trials(Step(step_size=1), epochs=3, seed=5, of_each=2)
    workload = tiny_workload(build_model)

    def extreme(base_lr: float) -> dict[int, TrialConfig]:
        optimizers = (SGD(base_lr=base_lr), Adam(base_lr=base_lr), RMSprop(base_lr=base_lr))
        return {100 + n: tiny_config(one, Step(step_size=1), epochs=3) for n, one in enumerate(optimizers)}

    found = trained(configs | extreme(1e30), workload)
    expected = trained(configs | extreme(1e-3), workload, dropped={1: list(extreme(1e-3))})
    assert found.keys() == configs.keys()
    for number in configs:
        assert len(found[number][0]) == 3
        assert_same(found[number], expected[number])


def test_a_group_that_all_trials_have_left_trains_on_without_results() -> None:
    group = FusedTrials({0: tiny_config(SGD(base_lr=1e30)), 1: tiny_config()}, tiny_workload(), device=CPU)
    assert group.train_epoch()[0].diverged
    group.drop(1)
    assert group.train_epoch() == {}


def test_a_parameter_that_the_loss_does_not_depend_on_is_refused_by_name() -> None:
    # A torch optimizer skips a parameter without a gradient; a row of a matrix would decay its weight.
    decaying = tiny_config(AdamW(base_lr=0.1, weight_decay=0.1))
    group = FusedTrials({0: decaying, 1: decaying}, tiny_workload(SpareLayer), device=CPU)
    with pytest.raises(RuntimeError, match=r"^the loss does not depend on spare\.weight, spare\.bias$"):
        group.train_epoch()


def test_a_parameter_that_the_loss_does_not_depend_on_may_be_frozen() -> None:
    groups = {"spare": ParamGroup(pattern=("spare.*",), lr_ratio=0.0), "all": ParamGroup(pattern=("*",))}
    configs = {number: tiny_config(AdamW(base_lr=0.1), param_groups=groups) for number in range(2)}
    assert_trains_equally(configs, tiny_workload(SpareLayer), epochs=2, dtype=torch.float64, rel=1e-9)
