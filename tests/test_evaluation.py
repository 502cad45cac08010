"""A split is evaluated batch by batch, with inputs, outputs and metrics of every kind, plain and in rows."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jobs_with_images import detection, generator, mixup, siamese, vae
from jobs_with_sequences import text_classifier, truncated_backpropagation
from jobs_with_tables import R2Score, graph_list, largest_error, mlp, multi_task, regression, table, tabular
from tiny import ONE_GROUP, TinyModel, on_device, tiny_config, tiny_workload
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from pipeline.errors import InvalidInput
from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import SGD, AdamW
from pipeline.space.trial import EpochMetrics
from pipeline.training import evaluation
from pipeline.training.contract import GroupLost
from pipeline.training.executor import LocalExecutor
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.probe import probe
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.build import built_model
from pipeline.workloads.workload import Metric, Split, Workload

pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_batches"),
    pytest.mark.filterwarnings(
        "ignore:This DataLoader will create:UserWarning",  # more workers than cores
        "ignore:There is a performance drop because we have not yet implemented the batching rule for "
        "aten.._weight_norm",
    ),
]

CPU = torch.device("cpu")
SIZES = (8, 8, 4)
"""Sizes of the batches of a validation split of 20 samples."""


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate as many samples at once as are trained on at once."""
    monkeypatch.setattr("pipeline.workloads.data.MAX_EVAL_BATCH", 1)


def configs(*rates: float) -> dict[int, TrialConfig]:
    return {number: tiny_config(SGD(base_lr=rate), param_groups=ONE_GROUP) for number, rate in enumerate(rates)}


JOBS = [tabular, siamese, text_classifier, multi_task, vae, mixup, graph_list, detection, regression]


@pytest.mark.parametrize("job", JOBS)
def test_rows_equal_plain_trials_in_double_precision(job: Callable[[], Workload]) -> None:
    trials = configs(0.01, 0.03) | {2: tiny_config(AdamW(base_lr=0.01), param_groups=ONE_GROUP)}
    workload = on_device(job(), device=CPU, dtype=torch.float64)
    rows, plain = (cls(trials, workload, device=CPU, dtype=torch.float64) for cls in (FusedTrials, PlainTrials))
    for _ in range(2):
        ours, theirs = rows.train_epoch(), plain.train_epoch()
        for number in trials:
            assert ours[number].metrics == pytest.approx(theirs[number].metrics, rel=1e-9, abs=1e-12)
    for number in trials:
        for name, value in plain.model_state(number).items():
            torch.testing.assert_close(rows.model_state(number)[name], value, rtol=1e-9, atol=1e-12)


def r2(outputs: Tensor, targets: Tensor) -> Tensor:
    return 1 - (outputs - targets).square().sum() / (targets - targets.mean()).square().sum()


def every_kind_of_metric() -> Workload:
    metrics = {
        "whole": Metric(r2, "maximize"),
        "mean": Metric(r2, "maximize", per_batch=True),
        "accumulated": Metric(R2Score(), "maximize"),
        "float": Metric(largest_error, "minimize"),
        "mean_float": Metric(largest_error, "minimize", per_batch=True),
    }
    return dataclasses.replace(regression(), metrics=metrics)


def measured_by_hand(workload: Workload, model: nn.Module) -> dict[str, float]:
    """Return the metrics of the validation split, computed at once and from its batches."""
    assert isinstance(workload.val, Split)
    targets = workload.val.targets
    with torch.no_grad():
        outputs = model(workload.val.inputs)
    batches = list(zip(outputs.split(SIZES), targets.split(SIZES), strict=True))
    shares = [size / sum(SIZES) for size in SIZES]

    def mean(function: Callable[[Tensor, Tensor], Any]) -> float:
        return sum(share * float(function(*batch)) for share, batch in zip(shares, batches, strict=True))

    return {
        "val/loss": mean(workload.loss),
        "val/whole": float(r2(outputs, targets)),
        "val/mean": mean(r2),
        "val/accumulated": float(r2(outputs, targets)),
        "val/float": largest_error(outputs, targets),
        "val/mean_float": mean(largest_error),
    }


@pytest.mark.parametrize("kept_bytes", [0, 1 << 28])
@pytest.mark.parametrize("trainer", [PlainTrials, FusedTrials])
def test_a_metric_of_each_kind_has_its_value_over_several_batches(
    trainer: type[PlainTrials | FusedTrials], kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "KEPT_BYTES", kept_bytes)
    trials = configs(0.01, 0.1)
    workload = on_device(every_kind_of_metric(), device=CPU, dtype=torch.float64)
    group = trainer(trials, workload, device=CPU, dtype=torch.float64)
    for _ in range(2):
        epochs = group.train_epoch()
        for number in trials:
            model = built_model(workload, seed=0, device=CPU, dtype=torch.float64)
            model.load_state_dict(group.model_state(number))
            found = {name: value for name, value in epochs[number].metrics.items() if name != "train/loss"}
            assert found == pytest.approx(measured_by_hand(workload, model), rel=1e-6)
    assert len({epochs[number].metrics["val/whole"] for number in trials}) == 2
    assert found["val/mean"] != pytest.approx(found["val/whole"], rel=1e-3)


def test_outputs_are_kept_only_for_a_metric_of_the_whole_split() -> None:
    workload = every_kind_of_metric()
    streaming = {name: metric for name, metric in workload.metrics.items() if name not in ("whole", "float")}
    for metrics, kept in ((workload.metrics, 3), (streaming, 0)):
        placed = on_device(dataclasses.replace(workload, metrics=metrics), device=CPU)
        group = FusedTrials(configs(0.01, 0.1), placed, device=CPU)
        group.train_epoch()
        assert len(group._evaluation._kept) == kept


class Probability(nn.Module):
    """The probability of one of two classes, with a weight that may become NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(1)

    def forward(self, inputs: Tensor) -> Tensor:
        probability: Tensor = self.net(inputs).sigmoid().squeeze(1)
        return probability


def two_classes() -> Workload:
    def split(samples: int, *, seed: int) -> Split:
        inputs = table(samples, seed=seed) * 100
        return Split(inputs, (inputs[:, 0] > 0).to(inputs.dtype))

    return Workload(
        name="two classes",
        build_model=Probability,
        train=split(40, seed=0),
        val=split(20, seed=1),
        loss=nn.BCELoss(),
        metrics={"hits": Metric(lambda outputs, targets: ((outputs > 0.5) == (targets > 0.5)).float(), "maximize")},
    )


def epochs_of(group: Any, *, count: int) -> list[dict[int, EpochMetrics]]:
    """Train some epochs; a group that is lost goes on from the last one, as in a search."""
    state: dict[str, Any] = {}
    history: list[dict[int, EpochMetrics]] = []
    while len(history) < count:
        try:
            history.append(dict(group.train_epoch()))
        except GroupLost:
            group.load_state_dict(state)
        else:
            state = group.state_dict()
    return history


@pytest.mark.parametrize("rows", [1, 4])
def test_a_loss_that_raises_on_nan_ends_its_trial_as_diverged_and_no_other(rows: int) -> None:
    hits = Metric(lambda outputs, targets: ((outputs > 0.5) == (targets > 0.5)).float().mean(), "maximize")
    workload = dataclasses.replace(two_classes(), metrics={"hits": hits})
    trials = configs(1e-4, 1e38, 1e-3)
    executor = LocalExecutor(workload, trials[0], device=CPU, rows=rows)
    assert executor.plain_because is None
    plain = PlainTrials(trials, on_device(workload, device=CPU), device=CPU)
    for history in (epochs_of(executor.build(trials), count=2), epochs_of(plain, count=2)):
        why = history[0][1].diverged
        assert why is not None
        assert why.startswith("the outputs became NaN or infinite after step ")
        assert "the loss raised all elements of input should be between 0 and 1" in why
        for epoch in history:
            assert [epoch[number].finished for number in (0, 2)] == [True, True]
        assert sorted(history[1]) == [0, 2]


class KeepsList(TinyModel):
    """Divides by the mean of what it has seen, which is the same when it sees one batch again."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(inputs.square().mean())
        return super().forward(inputs) / torch.stack(self.seen).mean()


class KeepsTensor(TinyModel):
    """Adds its last outputs, in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs) + self.last
        self.last = logits.detach().mean(dim=0)
        return logits


class KeepsGenerator(TinyModel):
    """Adds noise from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = generator(3)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + torch.randn(3, generator=self.noise)


STATEFUL: dict[str, Callable[[], Workload]] = {
    "list": lambda: tiny_workload(KeepsList),
    "tensor": lambda: tiny_workload(KeepsTensor),
    "generator": lambda: tiny_workload(KeepsGenerator),
    "hidden state": truncated_backpropagation,
}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_beyond_parameters_is_found_and_a_resumed_trial_equals_one_that_was_not_stopped(name: str) -> None:
    workload = STATEFUL[name]()
    trials = configs(0.01, 0.03)
    finding = probe(workload, trials[0], device=CPU, dtype=torch.float32)
    assert finding.unsaved is not None
    executor = LocalExecutor(workload, trials[0], device=CPU)
    assert "a trial that is resumed begins anew" in str(executor.plain_because)
    group, resumed = executor.build(trials), executor.build(trials)
    history = [group.train_epoch() for _ in range(2)]
    saved = group.state_dict()
    history += [group.train_epoch() for _ in range(2)]
    resumed.load_state_dict(saved)
    assert resumed.model_state(0).keys() == group.model_state(0).keys()
    assert [resumed.train_epoch() for _ in range(2)] == history[2:]
    for number in trials:
        for key, value in group.model_state(number).items():
            assert torch.equal(resumed.model_state(number)[key], value)


class Locked(TinyModel):
    """Holds a lock, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, inputs: Tensor) -> Tensor:
        with self.lock:
            return super().forward(inputs)


class MixedTypes(TinyModel):
    """Has a parameter in double precision, and one buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("order", torch.arange(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return (super().forward(inputs).double() * self.scale).float()


class NotesFeatures(TinyModel):
    """Keeps its last features for whoever looks at them; nothing is computed from them."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)
        self.features: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        self.features = self.dropout(self.hidden(inputs)).detach()
        return super().forward(inputs)


class CachesTable(TinyModel):
    """Computes a table once, as rotary embeddings do."""

    table: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, 6)
        return super().forward(inputs * self.table)


def weight_normed() -> nn.Module:
    model = TinyModel()
    with warnings.catch_warnings(action="ignore"):  # the old one is deprecated
        nn.utils.weight_norm(model.hidden)
    return model


def pruned() -> nn.Module:
    model = TinyModel()
    prune.l1_unstructured(model.hidden, "weight", amount=0.5)
    return model


MODELS: list[tuple[Callable[[], nn.Module], str]] = [
    (Locked, "None"),
    (weight_normed, "None"),
    (pruned, "None"),
    (CachesTable, "None"),
    (NotesFeatures, "None"),
    (MixedTypes, "the parameter scale is torch.float64, and a row is torch.float32"),
]


@pytest.mark.parametrize(("build_model", "why"), MODELS)
def test_a_model_of_an_unusual_kind_stays_as_it_is_built_trains_and_resumes(
    build_model: Callable[[], nn.Module], why: str
) -> None:
    trials = configs(0.01, 0.03)
    executor = LocalExecutor(tiny_workload(build_model), trials[0], device=CPU)
    assert why in str(executor.plain_because)
    group, resumed = executor.build(trials), executor.build(trials)
    group.train_epoch()
    resumed.load_state_dict(group.state_dict())
    epoch = group.train_epoch()
    assert resumed.train_epoch() == epoch
    assert all(metrics.finished for metrics in epoch.values())
    built = {name: value.dtype for name, value in build_model().state_dict().items()}
    assert {name: value.dtype for name, value in group.model_state(1).items()} == built


def test_a_resumed_trial_with_state_beyond_parameters_has_its_model_before_it_trains_on() -> None:
    executor = LocalExecutor(tiny_workload(KeepsTensor), tiny_config(), device=CPU)
    group, resumed = (executor.build({0: tiny_config()}) for _ in range(2))
    group.train_epoch()
    resumed.load_state_dict(group.state_dict())
    for key, value in group.model_state(0).items():
        assert torch.equal(resumed.model_state(0)[key], value)


class Masked(TinyModel):
    """One class is masked out: its logit is -inf."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        return super().forward(inputs).masked_fill(torch.tensor([False, False, True]), -torch.inf)


@pytest.mark.parametrize("trainer", [PlainTrials, FusedTrials])
def test_a_metric_has_its_value_where_outputs_are_infinite_and_the_loss_is_not(
    trainer: type[PlainTrials | FusedTrials],
) -> None:
    workload = tiny_workload(Masked)
    train, val = (
        dataclasses.replace(s, targets=s.targets % 2) for s in (split(workload, "train"), split(workload, "val"))
    )
    group = trainer(configs(0.1, 0.2), dataclasses.replace(workload, train=train, val=val), device=CPU)
    assert all(0 < epoch.metrics["val/accuracy"] <= 1 for epoch in group.train_epoch().values())


def split(workload: Workload, name: str) -> Split:
    found = getattr(workload, name)
    assert isinstance(found, Split)
    return found


class LateNoise(TinyModel):
    """A model that draws random numbers from its sixth step on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        assert isinstance(self.steps, Tensor)
        if self.training:
            self.steps += 1
        noise = torch.randn_like(inputs) if self.steps > 5 else 0.0
        return super().forward(inputs + noise)


def projected(outputs: Tensor, targets: Tensor) -> Tensor:
    """Measure outputs in a direction drawn at random."""
    return (outputs @ torch.randn(outputs.shape[1])).mean()


@pytest.mark.parametrize("per_batch", [True, False])
def test_random_numbers_of_a_metric_a_late_step_and_preprocess_are_the_same_each_time(per_batch: bool) -> None:
    workload = dataclasses.replace(
        tiny_workload(LateNoise),
        metrics={"projected": Metric(projected, "minimize", per_batch=per_batch)},
        preprocess=lambda inputs: F.dropout(inputs, 0.2),
    )
    histories = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        group = PlainTrials(configs(0.1), workload, device=CPU, draws=())
        histories.append([group.train_epoch() for _ in range(3)])
    assert histories[0] == histories[1]


class KeepsScale(nn.Module):
    """A loss that divides by a moving average of itself."""

    scale = 1.0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return a scalar."""
        loss = F.cross_entropy(outputs, targets)
        self.scale = 0.9 * self.scale + 0.1 * float(loss.detach())
        return loss / self.scale


def test_a_loss_that_keeps_state_is_refused() -> None:
    workload = dataclasses.replace(tiny_workload(), loss=KeepsScale())
    with pytest.raises(InvalidInput, match="the loss keeps state, since it gives another value for the same batch"):
        probe(workload, tiny_config(), device=CPU, dtype=torch.float32)


class CountsInArray(TinyModel):
    """A model that counts its steps in an array, which matters from the tenth on."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        if self.training:
            if isinstance(self.held, set):
                self.held.add(len(self.held))
            else:
                self.held[0] += 1
        return super().forward(inputs)


@pytest.mark.parametrize("held", [lambda: np.zeros(1), lambda: [np.int64(0)], set])
def test_a_counter_of_any_kind_is_state(held: Callable[[], Any]) -> None:
    workload = tiny_workload(lambda: CountsInArray(held()))
    found = probe(workload, tiny_config(), device=CPU, dtype=torch.float32)
    assert found.unsaved == "held changes in training and is no buffer"
