"""The contract of trainers, held by each of them.

A trial's placement decides its bits: where it is repeated, so is every bit. Where it differs, as between a trial in a
group and the trial alone, numbers are equal in float64 to 1e-9.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tiny import BATCH, ONE_GROUP, SAMPLES, STEPS_PER_EPOCH, TinyModel, on_device, tiny_config, tiny_workload
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import SGD, Adam, AdamW, Muon, RMSprop
from pipeline.space.param_groups import ParamGroup
from pipeline.space.placement import Placement
from pipeline.space.schedules import (
    Constant,
    Cosine,
    Cyclic,
    Exponential,
    MultiStep,
    OneCycle,
    Plateau,
    Scheduler,
    Step,
)
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import TrialGroup
from pipeline.training.executor import LocalExecutor
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.data import epoch_order
from pipeline.workloads.digits import digits
from pipeline.workloads.workload import Split, Workload

pytestmark = pytest.mark.usefixtures("one_thread")

Trials = PlainTrials | FusedTrials | TrialGroup
Trainer = Callable[..., Trials]

CPU = torch.device("cpu")


def plain(
    configs: Mapping[int, TrialConfig],
    workload: Workload,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> PlainTrials:
    return PlainTrials(configs, on_device(workload, device=device, dtype=dtype), device=device, dtype=dtype)


def fused(
    configs: Mapping[int, TrialConfig],
    workload: Workload,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> FusedTrials:
    return FusedTrials(configs, on_device(workload, device=device, dtype=dtype), device=device, dtype=dtype)


def in_shards(
    configs: Mapping[int, TrialConfig],
    workload: Workload,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> TrialGroup:
    """Build a group as a search does: matrices of two rows, and what cannot be a row alone."""
    return executor(configs, workload, device=device, dtype=dtype).build(configs)


def executor(
    configs: Mapping[int, TrialConfig],
    workload: Workload,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> LocalExecutor:
    return LocalExecutor(workload, next(iter(configs.values())), device=device, dtype=dtype, rows=2)


TRAINERS: list[Trainer] = [plain, fused, in_shards]

STILL = SGD(base_lr=1e-30)
"""Too small a rate to change a parameter."""
HUGE = SGD(base_lr=1e30)
"""One step of it, and the next loss is not finite."""
FROZEN_HEAD = {"head": ParamGroup(pattern=("head.*",), lr_ratio=0.0), "body": ParamGroup(pattern=("*",))}
FROZEN_BODY = {"head": ParamGroup(pattern=("head.*",)), "body": ParamGroup(pattern=("*",), lr_ratio=0.0)}
BODY_AND_FASTER_HEAD = {"head": ParamGroup(pattern=("head.*",), lr_ratio=2.0), "body": ParamGroup(pattern=("*",))}


@pytest.fixture(params=TRAINERS, ids=lambda trainer: trainer.__name__)
def trainer(request: pytest.FixtureRequest) -> Trainer:
    made: Trainer = request.param
    return made


def with_dropout() -> nn.Module:
    return TinyModel(dropout=0.5)


def with_batch_norm() -> nn.Module:
    model = TinyModel(batch_norm=True)
    model.hidden.register_parameter("bias", None)  # in front of BatchNorm its gradient is but rounding
    return model


def various() -> dict[int, TrialConfig]:
    """Trials that differ in optimizer, rate and schedule."""
    return {
        3: tiny_config(SGD(base_lr=0.3, momentum=0.9), Step(step_size=1, gamma=0.5)),
        4: tiny_config(Adam(base_lr=0.01), OneCycle()),
        7: tiny_config(RMSprop(base_lr=0.01), Plateau(patience=0)),
        8: tiny_config(AdamW(base_lr=0.1), Cosine(warmup=1)),
        9: tiny_config(SGD(base_lr=0.1), param_groups=BODY_AND_FASTER_HEAD),
    }


def with_all_kinds() -> dict[int, TrialConfig]:
    """Trials that cannot all be rows of one matrix: one freezes a group, and Muon's have no rule."""
    return {
        **various(),
        10: tiny_config(Muon(base_lr=0.02), Exponential(gamma=0.9)),
        11: tiny_config(Adam(base_lr=0.01), param_groups=FROZEN_BODY),
    }


def train(group: Trials, epochs: int) -> list[Mapping[int, EpochMetrics]]:
    return [group.train_epoch() for _ in range(epochs)]


def train_alone(group: Trials, epochs: int) -> list[EpochMetrics]:
    """Train a group of one trial."""
    return [epoch for results in train(group, epochs) for epoch in results.values()]


def of(number: int, history: Sequence[Mapping[int, EpochMetrics]]) -> list[EpochMetrics]:
    return [results[number] for results in history if number in results]


def assert_trained_equally(found: Sequence[EpochMetrics], expected: Sequence[EpochMetrics]) -> None:
    """Compare a trial's epochs in float64: to the bit for as long as placements are the same, then to 1e-9."""
    repeated = True
    for one, other in zip(found, expected, strict=True):
        repeated = repeated and one.placement == other.placement
        assert one.metrics == (other.metrics if repeated else pytest.approx(other.metrics, rel=1e-9, abs=1e-12))
        assert elsewhere(one) == elsewhere(other)


def elsewhere(epoch: EpochMetrics) -> EpochMetrics:
    """Return what does not depend on the placement."""
    return dataclasses.replace(epoch, metrics={}, placement=None)


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-12), name


def assert_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def model_in_eval_mode(group: Trials, number: int, model: nn.Module) -> nn.Module:
    model.load_state_dict(group.model_state(number))
    return model.eval()


def test_all_trials_of_a_seed_begin_with_the_same_weights(trainer: Trainer) -> None:
    first, second = (trainer(various(), tiny_workload(), device=CPU) for _ in range(2))
    for number in various():
        assert_same_bits(first.model_state(number), first.model_state(3))
        assert_same_bits(first.model_state(number), second.model_state(number))


def test_another_seed_has_other_weights(trainer: Trainer) -> None:
    group = trainer({0: tiny_config(), 1: tiny_config()}, tiny_workload(), device=CPU)
    other = trainer({0: tiny_config(seed=1)}, tiny_workload(), device=CPU)
    assert not torch.equal(group.model_state(0)["head.weight"], other.model_state(0)["head.weight"])


def test_equal_configs_train_equally_in_one_group_and_in_two(trainer: Trainer) -> None:
    # One sample per step: another order of the data would show.
    config = tiny_config(SGD(base_lr=0.1, momentum=0.9), batch_size=1)
    first = trainer({0: config, 1: config}, tiny_workload(), device=CPU, dtype=torch.float64)
    second = trainer({5: config}, tiny_workload(), device=CPU, dtype=torch.float64)
    history, again = train(first, 2), train(second, 2)
    for number in (0, 1):
        assert_trained_equally(of(number, history), of(5, again))
        assert_close(first.model_state(number), second.model_state(5))


def test_the_order_of_an_epoch_is_a_permutation_that_seed_and_epoch_decide() -> None:
    workload = tiny_workload()
    order = epoch_order(workload, seed=0, epoch=0)
    assert sorted(order.tolist()) == list(range(SAMPLES))
    assert torch.equal(order, epoch_order(workload, seed=0, epoch=0))
    assert not torch.equal(order, epoch_order(workload, seed=0, epoch=1))
    assert not torch.equal(order, epoch_order(workload, seed=1, epoch=0))


MODELS = [TinyModel, with_dropout, with_batch_norm]


@pytest.mark.parametrize("build_model", MODELS)
def test_a_trial_alone_equals_itself_in_a_group(trainer: Trainer, build_model: Callable[[], nn.Module]) -> None:
    workload = tiny_workload(build_model)
    group = trainer(various(), workload, device=CPU, dtype=torch.float64)
    history = train(group, 4)
    for number, config in various().items():
        alone = trainer({number: config}, workload, device=CPU, dtype=torch.float64)
        assert_trained_equally(train_alone(alone, 4), of(number, history))
        assert_close(alone.model_state(number), group.model_state(number))


def test_a_trial_on_digits_alone_equals_itself_in_a_group(trainer: Trainer) -> None:
    groups = {"head": ParamGroup(pattern=("fc.*",), lr_ratio=2.0), "body": ParamGroup(pattern=("*",))}
    adam, sgd = (
        tiny_config(optimizer, param_groups=groups, batch_size=64)
        for optimizer in (Adam(base_lr=1e-3), SGD(base_lr=0.1))
    )
    workload = digits("mlp")
    group = trainer({0: adam, 1: sgd, 2: adam}, workload, device=CPU, dtype=torch.float64)
    alone = trainer({1: sgd}, workload, device=CPU, dtype=torch.float64)
    assert_trained_equally([group.train_epoch()[1]], [alone.train_epoch()[1]])
    assert_close(group.model_state(1), alone.model_state(1))


@pytest.mark.parametrize("build_model", MODELS)
def test_the_same_group_trained_twice_is_the_same_to_the_bit(
    trainer: Trainer, build_model: Callable[[], nn.Module]
) -> None:
    first, second = (trainer(various(), tiny_workload(build_model), device=CPU) for _ in range(2))
    history = []
    for group in (first, second):
        history.append(train(group, 1))
        group.drop(8)
        history[-1] += train(group, 2)
    assert history[0] == history[1]
    for number in various().keys() - {8}:
        assert_same_bits(first.model_state(number), second.model_state(number))


@pytest.mark.parametrize("build_model", MODELS)
def test_the_rates_of_other_trials_affect_no_bit(trainer: Trainer, build_model: Callable[[], nn.Module]) -> None:
    workload = tiny_workload(build_model)
    group = trainer(various(), workload, device=CPU)
    history = train(group, 3)
    for number, config in various().items():
        others = {
            n: dataclasses.replace(
                other, optimizer=dataclasses.replace(other.optimizer, base_lr=0.02), scheduler=Exponential(gamma=0.7)
            )
            for n, other in various().items()
        }
        among_others = trainer({**others, number: config}, workload, device=CPU)
        assert of(number, train(among_others, 3)) == of(number, history)
        assert_same_bits(among_others.model_state(number), group.model_state(number))


@pytest.mark.parametrize("build_model", MODELS)
def test_a_trial_among_copies_of_itself_in_the_same_place_is_the_same_to_the_bit(
    trainer: Trainer, build_model: Callable[[], nn.Module]
) -> None:
    workload = tiny_workload(build_model)
    group = trainer(various(), workload, device=CPU)
    history = train(group, 3)
    for number, config in various().items():
        placement = history[0][number].placement
        assert placement is not None
        copies = trainer(dict.fromkeys(range(placement.rows or 1), config), workload, device=CPU)
        copy = placement.place or 0
        assert of(copy, train(copies, 3)) == of(number, history)
        assert_same_bits(copies.model_state(copy), group.model_state(number))


def test_an_epoch_says_where_the_trial_trained() -> None:
    def placements(trainer: Trainer) -> dict[int, Placement | None]:
        return {n: its.placement for n, its in trainer(various(), tiny_workload(), device=CPU).train_epoch().items()}

    def row(place: int, *, of: int) -> Placement:
        return Placement(trainer="rows", rows=of, place=place, threads=1)

    assert placements(plain) == dict.fromkeys(various(), Placement(trainer="plain", threads=1))
    # Adam, AdamW, RMSprop, then SGD twice
    assert placements(fused) == {n: row(place, of=5) for place, n in enumerate((4, 8, 7, 3, 9))}
    assert placements(in_shards) == {
        4: row(0, of=1),
        8: row(0, of=2),
        7: row(1, of=2),
        3: row(0, of=2),
        9: row(1, of=2),
    }


class Images(nn.Module):
    """Convolutions of 3 channels, which note how the images lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.MaxPool2d(2))
        self.head = nn.Linear(4, 3)
        self.channels_last: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, 6, 6) to logits (batch, class)."""
        self.channels_last.add(images.is_contiguous(memory_format=torch.channels_last))
        logits: Tensor = self.head(self.body(images).flatten(1))
        return logits


def test_images_with_the_channels_last_train_to_the_same_numbers(trainer: Trainer) -> None:
    models: list[Images] = []

    def build_model() -> Images:
        models.append(Images())
        return models[-1]

    images = Split(torch.randn(SAMPLES, 3, 6, 6), torch.arange(SAMPLES) % 3)
    workload = dataclasses.replace(tiny_workload(build_model), train=images, val=images, test=None)
    states = {}
    for channels_last in (False, True):
        configs = {n: tiny_config(SGD(base_lr=0.1 + n / 10), channels_last=channels_last) for n in range(3)}
        assert TrialConfig.from_dict(configs[0].to_dict()) == configs[0]
        group = trainer(configs, workload, device=CPU, dtype=torch.float64)
        for model in models:  # some of which were but tried
            model.channels_last.clear()
        train(group, 3)
        states[channels_last] = group.model_state(2)
        assert set().union(*(model.channels_last for model in models)) == {channels_last}
    for name, value in states[False].items():
        torch.testing.assert_close(states[True][name], value, rtol=1e-9, atol=1e-12)


def test_drop_leaves_other_trials_unchanged(trainer: Trainer) -> None:
    whole = trainer(various(), tiny_workload(with_dropout), device=CPU, dtype=torch.float64)
    thinned = trainer(various(), tiny_workload(with_dropout), device=CPU, dtype=torch.float64)
    expected = train(whole, 4)
    history = train(thinned, 1)
    thinned.drop(3)
    history += train(thinned, 1)
    thinned.drop(8)
    history += train(thinned, 2)
    assert [sorted(results) for results in history] == [[3, 4, 7, 8, 9], [4, 7, 8, 9], [4, 7, 9], [4, 7, 9]]
    for number in (4, 7, 9):
        assert_trained_equally(of(number, history), of(number, expected))
        assert_close(thinned.model_state(number), whole.model_state(number))


@pytest.mark.parametrize("param_groups", [ONE_GROUP, FROZEN_HEAD])
def test_a_group_without_trials_has_no_metrics(trainer: Trainer, param_groups: dict[str, ParamGroup]) -> None:
    group = trainer({0: tiny_config(param_groups=param_groups)}, tiny_workload(), device=CPU)
    train(group, 1)
    group.drop(0)
    assert group.train_epoch() == {}
    assert group.test() == {}


def test_a_diverged_trial_names_step_and_epoch_and_leaves(trainer: Trainer) -> None:
    configs = {0: tiny_config(), 1: tiny_config(SGD(base_lr=1e300)), 2: tiny_config()}
    group = trainer(configs, tiny_workload(), device=CPU, dtype=torch.float64)
    first, second = train(group, 2)
    assert first[1].diverged is not None
    assert first[1].diverged.removeprefix("the loss became ") in (
        "nan at step 2, in epoch 1",
        "inf at step 2, in epoch 1",
    )
    assert not first[1].finished
    assert first[0].finished
    assert sorted(second) == [0, 2]
    assert_trained_equally(of(0, [first, second]), of(2, [first, second]))


@pytest.mark.parametrize("build_model", MODELS)
def test_a_trial_that_diverges_affects_no_bit_of_the_others(
    trainer: Trainer, build_model: Callable[[], nn.Module]
) -> None:
    configs = {0: tiny_config(), 1: tiny_config(HUGE), 2: tiny_config(), 3: tiny_config(SGD(base_lr=0.3))}
    diverging, dropping = (
        trainer({**configs, 1: config}, tiny_workload(build_model), device=CPU) for config in (configs[1], configs[3])
    )
    history, expected = train(diverging, 1), train(dropping, 1)
    assert history[0][1].diverged
    dropping.drop(1)
    history, expected = history + train(diverging, 2), expected + train(dropping, 2)
    for number in (0, 2, 3):
        assert of(number, history) == of(number, expected)
        assert_same_bits(diverging.model_state(number), dropping.model_state(number))


def test_a_trial_that_diverges_later_counts_steps_from_its_beginning(trainer: Trainer) -> None:
    late = tiny_config(HUGE, Constant(warmup=1, warmup_start_factor=1e-33))
    group = trainer({0: late, 1: tiny_config()}, tiny_workload(), device=CPU)
    first, second = train(group, 2)
    assert first[0].finished
    assert second[0].diverged is not None
    assert second[0].diverged.endswith("at step 7, in epoch 2")
    assert sorted(group.train_epoch()) == [1]


def test_a_metric_that_is_not_finite_is_divergence_too(trainer: Trainer) -> None:
    one_step = tiny_config(HUGE, batch_size=SAMPLES)
    (epoch,) = trainer({0: one_step}, tiny_workload(), device=CPU).train_epoch().values()
    assert math.isfinite(epoch.metrics["train/loss"])
    assert epoch.diverged in ("val/loss became nan after epoch 1", "val/loss became inf after epoch 1")


class Broken(TinyModel):
    def forward(self, inputs: Tensor) -> Tensor:
        raise RuntimeError("no such layer")


def test_a_model_that_raises_fails_its_trial_alone() -> None:
    # Only a plain trainer has a model per trial.
    models = iter([TinyModel(), Broken(), TinyModel()])
    group = plain(dict.fromkeys(range(3), tiny_config()), tiny_workload(lambda: next(models)), device=CPU)
    first, second = train(group, 2)
    line = Broken.forward.__code__.co_firstlineno + 1
    reason = f"RuntimeError: no such layer, in {__file__}, line {line}"
    assert first[1] == EpochMetrics(epoch=0, step=0, metrics={}, lr={}, failed=reason)
    assert not first[1].finished
    assert [sorted(results) for results in (first, second)] == [[0, 1, 2], [0, 2]]


@pytest.mark.parametrize("build_model", [TinyModel, with_batch_norm])
def test_a_frozen_groups_parameters_stay_as_they_were(trainer: Trainer, build_model: Callable[[], nn.Module]) -> None:
    decaying = AdamW(base_lr=0.1, weight_decay=0.1)
    frozen = tiny_config(decaying, param_groups=FROZEN_BODY)
    group = trainer({0: frozen, 1: frozen}, tiny_workload(build_model), device=CPU)
    unfrozen = trainer({2: tiny_config(decaying)}, tiny_workload(build_model), device=CPU)
    names = [name for name, _ in build_model().named_parameters()]
    before = group.model_state(0)
    results = train(group, 2)[-1]
    train(unfrozen, 2)
    assert results[0].lr["body"] == ((2 * STEPS_PER_EPOCH, 0.0),)
    for name in names:
        assert torch.equal(before[name], group.model_state(0)[name]) == (not name.startswith("head."))
        assert not torch.equal(before[name], unfrozen.model_state(2)[name])


SCHEDULES: list[Scheduler] = [
    Step(step_size=2, gamma=0.1),
    MultiStep(milestones=(1, 3)),
    Exponential(gamma=0.7, interval="step"),
    Cosine(warmup=1),
    Cosine(warmup=7, interval="step"),
    OneCycle(cycle_momentum=True),
    Cyclic(max_lr_ratio=5.0, step_size_up=3, mode="exp_range", gamma=0.9),
    Plateau(metric="val/accuracy", patience=0, cooldown=1),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: f"{schedule.name}-{schedule.interval}")
def test_a_group_goes_on_from_a_saved_state_as_if_never_interrupted(trainer: Trainer, schedule: Scheduler) -> None:
    workload = tiny_workload(lambda: TinyModel(dropout=0.2, batch_norm=True))
    adam, sgd = Adam(base_lr=0.01), SGD(base_lr=0.1, momentum=0.9)
    configs = {2: tiny_config(adam, schedule), 5: tiny_config(sgd, schedule), 6: tiny_config(HUGE, schedule)}
    uninterrupted = trainer(configs, workload, device=CPU)
    history = train(uninterrupted, 2)
    state = saved_and_loaded(uninterrupted.state_dict())
    history += train(uninterrupted, 2)
    resumed = trainer(configs, workload, device=CPU)
    resumed.load_state_dict(state)
    assert [sorted(results) for results in history] == [[2, 5, 6], [2, 5], [2, 5], [2, 5]]
    assert train(resumed, 2) == history[2:]
    for number in (2, 5):
        assert_same_bits(resumed.model_state(number), uninterrupted.model_state(number))


def test_a_group_of_various_trials_goes_on_from_a_saved_state(trainer: Trainer) -> None:
    uninterrupted = trainer(various(), tiny_workload(), device=CPU)
    uninterrupted.train_epoch()
    uninterrupted.drop(4)
    resumed = trainer(various(), tiny_workload(), device=CPU)
    resumed.load_state_dict(saved_and_loaded(uninterrupted.state_dict()))
    assert train(resumed, 3) == train(uninterrupted, 3)
    for number in (3, 7, 8, 9):
        assert_same_bits(resumed.model_state(number), uninterrupted.model_state(number))


@pytest.mark.parametrize("mixed", [plain, in_shards])
def test_trials_of_all_kinds_train_in_one_group_as_they_do_alone(mixed: Trainer) -> None:
    def build(configs: Mapping[int, TrialConfig]) -> Trials:
        return mixed(configs, tiny_workload(with_dropout), device=CPU, dtype=torch.float64)

    group = build(with_all_kinds())
    history = train(group, 2)
    resumed = build(with_all_kinds())
    resumed.load_state_dict(saved_and_loaded(group.state_dict()))
    history += train(group, 2)
    assert train(resumed, 2) == history[2:]
    assert [list(results) for results in history] == [sorted(with_all_kinds())] * 4
    for number, config in with_all_kinds().items():
        assert_same_bits(resumed.model_state(number), group.model_state(number))
        alone = build({number: config})
        assert_trained_equally(train_alone(alone, 4), of(number, history))
        assert_close(alone.model_state(number), group.model_state(number))


@pytest.mark.parametrize("build_model", MODELS)
def test_a_trial_is_trained_again_to_the_bit_in_the_places_that_it_had(build_model: Callable[[], nn.Module]) -> None:
    configs = {**with_all_kinds(), 12: tiny_config(HUGE)}
    local = executor(configs, tiny_workload(build_model), device=CPU)
    group = local.build(configs)
    history = train(group, 1)
    group.drop(3)
    history += train(group, 1)
    group.drop(7)
    history += train(group, 2)
    left = configs.keys() - {3, 7, 12}
    assert history[-1].keys() == left
    tested = group.test()
    moved = [number for number in left if len({epoch.placement for epoch in of(number, history)}) > 1]
    assert moved
    for number, config in configs.items():
        expected = of(number, history)
        placement = [epoch.placement for epoch in expected if epoch.placement is not None]
        again = local.build({number: config}, placement=placement)
        assert repr(train_alone(again, len(expected))) == repr(expected)  # a NaN does not equal itself
        if number in left:
            assert again.test() == {number: tested[number]}
            assert_same_bits(again.model_state(number), group.model_state(number))


@pytest.mark.parametrize("trainer", [fused, in_shards])
def test_a_trial_that_is_trained_again_goes_on_from_a_saved_state(trainer: Trainer) -> None:
    group = trainer(various(), tiny_workload(with_dropout), device=CPU)
    history = train(group, 1)
    group.drop(3)
    history += train(group, 3)
    local = executor(various(), tiny_workload(with_dropout), device=CPU)
    for number in (4, 7, 8, 9):
        placement = [epoch.placement for epoch in of(number, history) if epoch.placement is not None]
        again, resumed = (local.build({number: various()[number]}, placement=placement) for _ in range(2))
        train(again, 2)
        resumed.load_state_dict(saved_and_loaded(again.state_dict()))
        assert train_alone(resumed, 2) == of(number, history)[2:]
        assert_same_bits(resumed.model_state(number), group.model_state(number))


def test_an_epoch_schedule_records_its_rate_once_at_the_epochs_last_step(trainer: Trainer) -> None:
    config = tiny_config(SGD(base_lr=0.5), Step(step_size=1, gamma=0.5), param_groups=BODY_AND_FASTER_HEAD)
    history = of(0, train(trainer({0: config}, tiny_workload(), device=CPU), 3))
    assert [epoch.epoch for epoch in history] == [1, 2, 3]
    assert [epoch.step for epoch in history] == [5, 10, 15]
    assert [epoch.lr["body"] for epoch in history] == [((5, 0.5),), ((10, 0.25),), ((15, 0.125),)]
    assert [epoch.lr["head"] for epoch in history] == [((5, 1.0),), ((10, 0.5),), ((15, 0.25),)]


def test_a_step_schedule_records_the_rate_of_every_step(trainer: Trainer) -> None:
    config = tiny_config(SGD(base_lr=1e-3), Cyclic(max_lr_ratio=3.0, step_size_up=2))
    history = of(0, train(trainer({0: config}, tiny_workload(), device=CPU), 2))
    steps, rates = zip(*(point for epoch in history for point in epoch.lr["body"]), strict=True)
    assert steps == tuple(range(1, 11))
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 2e-3, 1e-3, 2e-3, 3e-3, 2e-3, 1e-3, 2e-3])


def test_the_recorded_rate_is_the_one_that_was_used(trainer: Trainer) -> None:
    # One step of plain SGD moves a parameter by rate times gradient, so half the rate moves it half as far.
    schedule = Constant(warmup=1, warmup_start_factor=0.5)
    configs = {
        0: tiny_config(SGD(base_lr=0.5), batch_size=SAMPLES),
        1: tiny_config(SGD(base_lr=0.5), schedule, batch_size=SAMPLES),
    }
    group = trainer(configs, tiny_workload(), device=CPU, dtype=torch.float64)
    before = group.model_state(0)["head.weight"]
    results = group.train_epoch()
    moved = {number: group.model_state(number)["head.weight"] - before for number in configs}
    assert {number: results[number].lr["head"] for number in configs} == {0: ((1, 0.5),), 1: ((1, 0.25),)}
    torch.testing.assert_close(moved[0], 2 * moved[1], rtol=1e-12, atol=1e-15)


def test_train_loss_is_the_mean_over_all_samples_those_of_the_last_small_batch_too(trainer: Trainer) -> None:
    assert SAMPLES % BATCH
    workload = tiny_workload()
    group = trainer({0: tiny_config(STILL)}, workload, device=CPU, dtype=torch.float64)
    (epoch,) = group.train_epoch().values()
    assert isinstance(workload.train, Split)
    train_split = workload.train.to(CPU, torch.float64)
    model = model_in_eval_mode(group, 0, TinyModel().double())
    expected = F.cross_entropy(model(train_split.inputs), train_split.targets).item()
    assert epoch.metrics["train/loss"] == pytest.approx(expected, rel=1e-12)  # float64, summed in another order
    assert epoch.step == STEPS_PER_EPOCH


@pytest.mark.parametrize("build_model", MODELS)
def test_metrics_of_val_and_test_are_taken_in_eval_mode(trainer: Trainer, build_model: Callable[[], nn.Module]) -> None:
    workload = tiny_workload(build_model)
    group = trainer({0: tiny_config(), 1: tiny_config(Adam(base_lr=0.1))}, workload, device=CPU, dtype=torch.float64)
    results = train(group, 2)[-1]
    for number, test_metrics in group.test().items():
        model = model_in_eval_mode(group, number, build_model().double())
        for name, metrics in (("val", results[number].metrics), ("test", test_metrics)):
            split = getattr(workload, name).to(CPU, torch.float64)
            outputs = model(split.inputs)
            assert metrics[f"{name}/loss"] == pytest.approx(F.cross_entropy(outputs, split.targets).item(), rel=1e-12)
            assert metrics[f"{name}/accuracy"] == (outputs.argmax(dim=1) == split.targets).double().mean().item()


def test_metrics_are_those_that_the_workload_announces(trainer: Trainer) -> None:
    workload = tiny_workload()
    (epoch,) = trainer({0: tiny_config()}, workload, device=CPU).train_epoch().values()
    assert epoch.metrics.keys() == workload.directions.keys() == {"train/loss", "val/loss", "val/accuracy"}


def test_batch_norm_keeps_running_statistics_per_trial(trainer: Trainer) -> None:
    configs = {0: tiny_config(STILL), 1: tiny_config(SGD(base_lr=0.5))}
    group = trainer(configs, tiny_workload(with_batch_norm), device=CPU)
    assert group.model_state(0)["norm.running_mean"].tolist() == [0.0] * 8
    train(group, 2)
    states = [group.model_state(number) for number in configs]
    assert [state["norm.num_batches_tracked"].item() for state in states] == [2 * STEPS_PER_EPOCH] * 2
    assert not torch.equal(states[0]["norm.running_mean"], states[1]["norm.running_mean"])


def dropout_losses(trainer: Trainer, configs: Mapping[int, TrialConfig], *, global_seed: int) -> dict[int, list[float]]:
    torch.manual_seed(global_seed)
    workload: Workload = tiny_workload(with_dropout)
    history = train(trainer(configs, workload, device=CPU, dtype=torch.float64), 2)
    return {number: [epoch.metrics["train/loss"] for epoch in of(number, history)] for number in configs}


def test_dropout_masks_are_a_function_of_seed_epoch_and_step_alone(trainer: Trainer) -> None:
    # The weights do not move, so that a loss depends on the masks alone.
    with torch.random.fork_rng():
        alone = dropout_losses(trainer, {0: tiny_config(STILL)}, global_seed=1)
        still_adam = tiny_config(Adam(base_lr=1e-30))
        together = dropout_losses(trainer, {0: tiny_config(STILL), 1: still_adam, 2: tiny_config()}, global_seed=2)
        other_seed = dropout_losses(trainer, {0: tiny_config(STILL, seed=1)}, global_seed=1)
    for losses in (together[0], together[1]):
        assert losses == pytest.approx(alone[0], rel=1e-9)
    assert alone[0][0] != pytest.approx(alone[0][1], rel=1e-3)
    assert alone[0] != pytest.approx(other_seed[0], rel=1e-3)


def test_dropout_masks_differ_from_step_to_step_and_from_epoch_to_epoch(trainer: Trainer) -> None:
    # The samples are equal and the weights do not move, so that only a mask can change a loss.
    def losses(samples: int) -> list[float]:
        train_split = Split(torch.ones(samples, 6), torch.zeros(samples, dtype=torch.long))
        workload = dataclasses.replace(tiny_workload(with_dropout), train=train_split)
        history = train(trainer({0: tiny_config(STILL, batch_size=1)}, workload, device=CPU), 4)
        return [epoch.metrics["train/loss"] for epoch in of(0, history)]

    assert losses(1) != pytest.approx([losses(1)[0]] * 4, rel=1e-6)
    assert losses(1) != pytest.approx(losses(2), rel=1e-6)


def test_a_trainer_leaves_the_global_random_state_alone(trainer: Trainer) -> None:
    before = torch.get_rng_state()
    group = trainer(various(), tiny_workload(with_dropout), device=CPU)
    group.train_epoch()
    group.test()
    assert torch.equal(torch.get_rng_state(), before)


def test_testing_changes_nothing(trainer: Trainer) -> None:
    workload = tiny_workload(lambda: TinyModel(dropout=0.2, batch_norm=True))
    tested, untested = (trainer(various(), workload, device=CPU) for _ in range(2))
    history = []
    for _ in range(3):
        history.append(tested.train_epoch())
        tested.test()
    assert history == train(untested, 3)
    for number in various():
        assert_same_bits(tested.model_state(number), untested.model_state(number))


def test_a_models_state_is_a_copy(trainer: Trainer) -> None:
    group = trainer({0: tiny_config(), 1: tiny_config()}, tiny_workload(), device=CPU)
    state = group.model_state(0)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    group.train_epoch()
    assert_same_bits(state, kept)
    assert not torch.equal(group.model_state(0)["head.weight"], kept["head.weight"])


def test_training_lowers_the_loss(trainer: Trainer) -> None:
    configs = {number: dataclasses.replace(config, epochs=12) for number, config in various().items()}
    history = train(trainer(configs, tiny_workload(), device=CPU), 12)
    for number in configs:
        losses = [epoch.metrics["train/loss"] for epoch in of(number, history)]
        assert losses[-1] < 0.8 * losses[0]
