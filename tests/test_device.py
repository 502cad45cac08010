"""Training on a device other than the CPU: everything is there, and the host does not wait within an epoch."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from pretended import DEVICE, pretended_device
from tiny import ONE_GROUP, TinyModel, on_device, tiny_config, tiny_workload
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import OPTIMIZERS, SGD, Adafactor, Adam
from pipeline.space.schedules import Cosine, OneCycle, Plateau, Step
from pipeline.training.contract import GroupLost, TrialGroup
from pipeline.training.epoch import Record
from pipeline.training.executor import LocalExecutor
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.trainer import FusedTrials
from pipeline.training.rows.update_rules import has_rule
from pipeline.workloads.check import workload_problems
from pipeline.workloads.workload import Metric, Split, Workload

pytestmark = pytest.mark.usefixtures("one_thread")

Trials = PlainTrials | FusedTrials | TrialGroup

CPU = torch.device("cpu")
SCHEDULES = (Step(step_size=1, gamma=0.5), OneCycle(), Plateau(patience=1), Cosine(warmup=1))


class Net(nn.Module):
    """Convolutions of the inputs as an image, with BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.2), nn.Flatten())
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        logits: Tensor = self.head(self.body(inputs.view(-1, 1, 2, 3)))
        return logits


def configs_of_every_rule() -> dict[int, TrialConfig]:
    optimizers = [optimizer for optimizer in OPTIMIZERS.values() if has_rule(optimizer)]
    return {
        number: tiny_config(optimizer(base_lr=0.01), SCHEDULES[number % 4], clip_grad_norm=0.5 if number == 1 else None)
        for number, optimizer in enumerate(optimizers)
    }


def plain(configs: Mapping[int, TrialConfig], workload: Workload, *, device: torch.device) -> PlainTrials:
    return PlainTrials(configs, on_device(workload, device=device), device=device)


def fused(configs: Mapping[int, TrialConfig], workload: Workload, *, device: torch.device) -> FusedTrials:
    return FusedTrials(configs, on_device(workload, device=device), device=device)


def in_shards(configs: Mapping[int, TrialConfig], workload: Workload, *, device: torch.device) -> TrialGroup:
    """Build a group as a search does, of matrices of at most four rows."""
    return LocalExecutor(workload, next(iter(configs.values())), device=device, rows=4).build(configs)


@pytest.fixture
def waits() -> Iterator[list[str]]:
    with pretended_device() as waits:
        yield waits


def test_the_host_does_not_wait_for_rows_within_an_epoch(waits: list[str]) -> None:
    group = fused(configs_of_every_rule(), tiny_workload(Net), device=DEVICE)
    for _ in range(2):
        waits.clear()
        group.begin_epoch()
        for batch in group.training_batches():
            group.train_step(batch)
        for batch in group.evaluation_batches("val"):
            group.evaluate_step(batch)
        assert waits == []
        metrics = group.end_epoch()
        assert 0 < len(waits) <= 2 + len(next(iter(metrics.values())).metrics)  # not once for each row
        group.drop(min(metrics))


def whole_life(group: Trials, again: Trials) -> list[Any]:
    """Train some epochs, lose a trial, save, go on from there, test; return all that comes of it."""
    history: list[Any] = [group.train_epoch() for _ in range(2)]
    group.drop(1)
    history.append(group.train_epoch())
    again.load_state_dict(group.state_dict())
    history += [again.train_epoch(), again.test()]
    left = [number for number in history[0] if number != 1]
    return [*history, {number: again.model_state(number) for number in left}]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        return one.device == other.device == CPU and torch.equal(one, other)
    return bool(one == other)


@pytest.mark.parametrize("trainer", [plain, fused, in_shards])
def test_trials_on_a_device_live_as_on_the_cpu(trainer: Callable[..., Trials]) -> None:
    configs = configs_of_every_rule()
    workload = tiny_workload(functools.partial(TinyModel, dropout=0.2))  # a convolution is another kernel there
    here = whole_life(*(trainer(configs, workload, device=CPU) for _ in range(2)))
    with pretended_device():
        there = whole_life(*(trainer(configs, workload, device=DEVICE) for _ in range(2)))
    assert same(here, there)


@pytest.mark.usefixtures("waits")
def test_a_search_on_a_device_trains_rows_and_plain_trials() -> None:
    configs = {
        number: tiny_config(optimizer(base_lr=0.01), param_groups=ONE_GROUP)
        for number, optimizer in enumerate([*OPTIMIZERS.values(), Adafactor])
        if optimizer.__name__ != "Muon"
    }
    executor = LocalExecutor(tiny_workload(Net), configs[0], device=DEVICE, rows=4)
    assert executor.plain_because is None
    history = whole_life(*(executor.build(configs) for _ in range(2)))
    assert history[-1].keys() == configs.keys() - {1}
    for number, epoch in history[0].items():
        assert epoch.placement is not None
        rows = (3, 4) if has_rule(type(configs[number].optimizer)) else (None,)
        assert epoch.placement.rows in rows


@pytest.mark.usefixtures("waits")
def test_a_trial_is_trained_again_on_a_device_in_the_places_that_it_had() -> None:
    configs = configs_of_every_rule()
    executor = LocalExecutor(tiny_workload(Net), configs[0], device=DEVICE, rows=4)
    group = executor.build(configs)
    history = [group.train_epoch()]
    group.drop(1)
    history.append(group.train_epoch())
    for number in history[1]:
        epochs = [results[number] for results in history]
        placement = [epoch.placement for epoch in epochs if epoch.placement is not None]
        again = executor.build({number: configs[number]}, placement=placement)
        assert [again.train_epoch()[number] for _ in epochs] == epochs
        assert same(again.model_state(number), group.model_state(number))


@pytest.mark.parametrize("device", [CPU, DEVICE])
def test_trying_the_memory_changes_nothing(device: torch.device) -> None:
    with pretended_device():
        tried, untried = (fused(configs_of_every_rule(), tiny_workload(Net), device=device) for _ in range(2))
        for epoch in range(2):
            before, random_state = tried.state_dict(), torch.get_rng_state()
            tried.try_memory()
            assert tried._record == Record()
            assert torch.equal(torch.get_rng_state(), random_state)
            assert same(tried.state_dict(), before)
            assert same(before, untried.state_dict()), f"epoch {epoch}"
            assert tried.train_epoch() == untried.train_epoch()


def test_trying_the_memory_computes_a_training_and_an_evaluation_batch() -> None:
    sizes = []

    class Noting(TinyModel):
        def forward(self, inputs: Tensor) -> Tensor:
            sizes.append((len(inputs), self.training))
            return super().forward(inputs)

    group = fused(dict.fromkeys(range(2), tiny_config()), tiny_workload(Noting), device=CPU)
    sizes.clear()
    group.try_memory()
    assert sizes == [(8, True), (20, False)]


class Large(TinyModel):
    """A model of which the pretended device holds only one; `held` has the parameters of each that is there."""

    def __init__(self, held: list[weakref.ref[Tensor]], *, full_when: str) -> None:
        super().__init__()
        self.held, self.full_when = held, full_when
        self.cycle = [self]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.held.append(weakref.ref(self.head.weight))
        self._check("built")
        return moved

    def forward(self, inputs: Tensor) -> Tensor:
        self._check("trained")
        return super().forward(inputs)

    def _check(self, now: str) -> None:
        self.held[:] = [weight for weight in self.held if weight() is not None]
        if now == self.full_when and len(self.held) > 1:
            raise torch.OutOfMemoryError("a second model does not fit")


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Samples of a split, which are collated, and so read in each epoch."""

    def __init__(self, split: Any) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.split.inputs[index], self.split.targets[index]


@pytest.mark.parametrize(("full_when", "streamed"), [("built", False), ("trained", True)])
def test_plain_trials_of_which_a_device_holds_only_one_train_to_the_same_numbers(
    full_when: str, streamed: bool
) -> None:
    configs = {number: tiny_config(Adafactor(base_lr=0.01 * (1 + number))) for number in range(2)}

    def trained(build_model: Callable[[], nn.Module], *, lost: bool) -> list[Any]:
        workload = tiny_workload()
        if streamed:
            splits: dict[str, Any] = {name: Rows(getattr(workload, name)) for name in ("train", "val", "test")}
            workload = dataclasses.replace(workload, collate=default_collate, **splits)
        executor = LocalExecutor(workload, configs[0], device=DEVICE)  # which tries two trials at a time
        executor = executor.on(on_device(dataclasses.replace(workload, build_model=build_model), device=DEVICE))
        group = executor.build(configs)
        if lost:
            with pytest.raises(GroupLost, match="a second model does not fit"):
                group.train_epoch()
            group.load_state_dict({})
        return whole_life(group, executor.build(configs))

    with pretended_device():
        large = trained(functools.partial(Large, [], full_when=full_when), lost=full_when == "trained")
        assert same(large, trained(TinyModel, lost=False))


class Spread(nn.Module):
    """A metric as those of torchmetrics: a module that gets batch after batch, and whose state is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(1)

    @property
    def device(self) -> torch.device:
        return self.total.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.total = fn(self.total)
        return self

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total += (outputs.amax(dim=1) - outputs.amin(dim=1)).sum()

    def compute(self) -> Tensor:
        return self.total.sum()

    def reset(self) -> None:
        self.total = torch.zeros_like(self.total)


WEIGHT = torch.tensor([0.5, 1.0, 2.0])
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weight": nn.CrossEntropyLoss(weight=WEIGHT),
    "bound": functools.partial(F.cross_entropy, weight=WEIGHT),
    "pos_weight": nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("trainer", [plain, fused, in_shards])
def test_a_loss_and_a_metric_that_hold_tensors_move_with_the_data(trainer: Callable[..., Trials], name: str) -> None:
    metrics = {"spread": Metric(Spread(), "maximize"), "loss_again": Metric(LOSSES[name], "minimize", per_batch=True)}
    workload = dataclasses.replace(tiny_workload(), loss=LOSSES[name], metrics=metrics)
    if name == "pos_weight":
        splits = {split: getattr(workload, split) for split in ("train", "val", "test")}
        hot = {key: Split(split.inputs, F.one_hot(split.targets, 3).float()) for key, split in splits.items()}
        workload = dataclasses.replace(workload, **hot)  # type: ignore[arg-type]
    configs = {number: tiny_config(optimizer(base_lr=0.01)) for number, optimizer in enumerate((SGD, Adam))}
    here = trainer(configs, workload, device=CPU)
    expected, tested = here.train_epoch(), here.test()
    with pretended_device():
        there = trainer(configs, workload, device=DEVICE)
        assert same([there.train_epoch(), there.test()], [expected, tested])
    assert tested[0]["test/spread"] > 0
    assert tested[0]["test/loss_again"] == pytest.approx(tested[0]["test/loss"])


@pytest.mark.usefixtures("waits")
def test_a_loss_is_tried_on_the_device_before_the_search() -> None:
    def problems(weight: Tensor, device: torch.device) -> list[str]:
        workload = dataclasses.replace(
            tiny_workload(), loss=lambda outputs, targets: F.cross_entropy(outputs, targets, weight)
        )
        placed = on_device(workload, device=device)
        return [str(problem) for problem in workload_problems(placed, batch_sizes=[8], device=device)]

    assert problems(WEIGHT, CPU) == problems(WEIGHT.to(DEVICE), DEVICE) == []
    (problem,) = problems(WEIGHT, DEVICE)
    assert problem.startswith("workload: the loss raised RuntimeError on outputs (6, 3) and targets (6): ")
    assert "on lazy:0 and on the CPU" in problem


@pytest.mark.usefixtures("waits")
def test_what_is_wrong_on_the_cpu_too_is_not_tried_on_the_device() -> None:
    seen = []

    class Noting(TinyModel):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.append(inputs.device)
            return super().forward(inputs)

    workload = dataclasses.replace(tiny_workload(Noting), loss=lambda outputs, targets: outputs[:, targets.max() + 1])
    (problem,) = workload_problems(on_device(workload, device=DEVICE), batch_sizes=[8], device=DEVICE)
    assert "IndexError" in str(problem)  # which stops a CUDA device for good
    assert set(seen) == {CPU}
