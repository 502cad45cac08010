"""What only a CUDA device can show; skipped without one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from test_device import Net, configs_of_every_rule, same
from tiny import ONE_GROUP, TinyModel, on_device, tiny_config, tiny_workload
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import SGD, Adafactor, Adam, AdamW, RMSprop
from pipeline.space.schedules import Cosine, OneCycle, Step
from pipeline.space.trial import EpochMetrics
from pipeline.training.executor import LocalExecutor
from pipeline.training.plain import PlainTrials
from pipeline.training.precision import dtype_of, precision
from pipeline.training.rows.captured import capture_on
from pipeline.training.rows.operations import operations_of_rows
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.check import workload_problems
from pipeline.workloads.digits import digits
from pipeline.workloads.random_state import random_states, seeded
from pipeline.workloads.workload import Split, Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda:0")
SPARE_BYTES = 512 * 2**20
"""Of memory, in the test that uses it up."""
WIDTH, BATCH, SAMPLES = 16384, 256, 512
"""Of `wide_workload`: one activation of a row takes 16 MiB."""


def various() -> dict[int, TrialConfig]:
    return {
        0: tiny_config(SGD(base_lr=0.3, momentum=0.9), Step(step_size=1, gamma=0.5)),
        1: tiny_config(Adam(base_lr=0.01), OneCycle()),
        2: tiny_config(AdamW(base_lr=0.01, weight_decay=0.1), Cosine(warmup=1), clip_grad_norm=0.5),
        3: tiny_config(RMSprop(base_lr=0.01)),
    }


def wide_workload() -> Workload:
    """Return a problem whose activations are large and whose data are small."""
    generator = torch.Generator().manual_seed(0)

    def split() -> Split:
        inputs = torch.randn(SAMPLES, 6, generator=generator)
        return Split(inputs, inputs[:, :3].argmax(dim=1))

    def build_model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))

    return Workload(name="wide", build_model=build_model, train=split(), val=split(), loss=F.cross_entropy)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Leave `SPARE_BYTES` of the device's memory to this process."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(GPU)[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(GPU) + SPARE_BYTES) / total, GPU)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    torch.cuda.empty_cache()


def trained(
    trainer: LocalExecutor, configs: Mapping[int, TrialConfig]
) -> tuple[list[Mapping[int, EpochMetrics]], list[Tensor]]:
    """Train trials for two epochs; return what came of them and all their parameters."""
    group = trainer.build(configs)
    history = [group.train_epoch() for _ in range(2)]
    return history, [value for number in configs for value in group.model_state(number).values()]


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_rows_on_cuda_equal_the_plain_trainer(dtype: torch.dtype, rel: float) -> None:
    # Kernels differ by the number of rows, so sums round differently: 1e-16 or 6e-8 a step, which training amplifies.
    configs = various()
    workload = on_device(tiny_workload(), device=GPU, dtype=dtype)
    plain = PlainTrials(configs, workload, device=GPU, dtype=dtype)
    fused = FusedTrials(configs, workload, device=GPU, dtype=dtype, capture=capture_on(GPU))
    with precision(configs[0], GPU):
        for _ in range(2):
            expected, found = plain.train_epoch(), fused.train_epoch()
            for number in configs:
                assert found[number].lr == expected[number].lr
                assert found[number].metrics["val/loss"] == pytest.approx(expected[number].metrics["val/loss"], rel=rel)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_row_drops_out_what_a_model_alone_drops_out(dtype: torch.dtype) -> None:
    inputs = torch.randn(3, 64, 48, generator=torch.Generator().manual_seed(0)).to(GPU, dtype)

    def one(row: Tensor) -> Tensor:
        with operations_of_rows(GPU):
            return F.dropout(row, 0.3)

    torch.manual_seed(1)
    outputs = vmap(one, randomness="same")(inputs)
    for row, found in zip(inputs, outputs, strict=True):
        torch.manual_seed(1)
        torch.testing.assert_close(found, F.dropout(row, 0.3))


@pytest.mark.parametrize("name", ["fp64", "fp32", "bf16"])
def test_a_model_with_batch_norm_and_dropout_trains_as_rows(name: str) -> None:
    config = tiny_config(Adam(base_lr=0.01), precision=name)
    trainer = LocalExecutor(tiny_workload(Net), config, device=GPU, dtype=dtype_of(name))
    assert (trainer.plain_because, trainer.eager_because) == (None, None)


@pytest.mark.parametrize("product", ["matmul", "convolution"])
def test_products_are_rounded_to_tf32_only_where_the_config_says_so(product: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 64, 16, 16, generator=generator).to(GPU)
    b = torch.randn(64, 64, 3, 3, generator=generator).to(GPU)

    def error(name: str) -> float:
        def multiply(a: Tensor, b: Tensor) -> Tensor:
            return F.conv2d(a, b) if product == "convolution" else a.flatten(1) @ a.flatten(1).T

        with precision(tiny_config(precision=name), GPU):
            exact = multiply(a.double(), b.double())
            return float((multiply(a, b) - exact).abs().max() / exact.abs().max())

    assert error("fp32") < 1e-5
    if torch.cuda.get_device_capability(GPU) >= (8, 0):
        assert 1e-5 < error("tf32") < 1e-2


class WithFlags(nn.Module):
    """A model that turns cuDNN's benchmarks on, which reads and sets switches of tf32."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4 * 36, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, class)."""
        allowed = torch.backends.cuda.matmul.allow_tf32
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=allowed):
            logits: Tensor = self.head(F.relu(self.body(images)).flatten(1))
        return logits


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_a_model_that_sets_flags_of_cudnn_trains(precision: str) -> None:
    workload = dataclasses.replace(digits("cnn"), build_model=WithFlags)
    config = tiny_config(batch_size=64, precision=precision)
    results = LocalExecutor(workload, config, device=GPU).build({0: config, 1: config}).train_epoch()
    assert [metrics.failed for metrics in results.values()] == [None, None]


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_trials_of_lower_precision_train_as_rows_and_learn(precision: str) -> None:
    config = tiny_config(Adam(base_lr=0.01), batch_size=64, precision=precision, param_groups=ONE_GROUP)
    trainer = LocalExecutor(digits("cnn"), config, device=GPU)
    assert trainer.plain_because is None
    group = trainer.build({0: config, 1: config})
    first, second = (group.train_epoch()[1].metrics["val/loss"] for _ in range(2))
    assert second < first < 2.3
    assert {value.dtype for value in group.model_state(1).values()} == {torch.float32}


def test_deterministic_trials_repeat_to_the_bit() -> None:
    configs = {
        number: tiny_config(Adam(base_lr=rate), batch_size=64, deterministic=True, param_groups=ONE_GROUP)
        for number, rate in enumerate((0.003, 0.01))
    }
    first, second = (trained(LocalExecutor(digits("cnn"), configs[0], device=GPU, rows=2), configs) for _ in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1], strict=True))


@pytest.mark.usefixtures("little_memory")
def test_a_matrix_that_does_not_fit_into_the_memory_is_halved_until_it_does() -> None:
    configs = {
        n: tiny_config(SGD(base_lr=0.001 * (1 + n)), batch_size=BATCH, param_groups=ONE_GROUP) for n in range(32)
    }
    trainer = LocalExecutor(wide_workload(), configs[0], device=GPU, rows=32)
    group = trainer.build(configs)
    history = [group.train_epoch() for _ in range(2)]
    assert len(trainer.place(configs)) > 1
    assert [sorted(results) for results in history] == [list(configs)] * 2
    alone = trainer.build({31: configs[31]})
    for results in history:
        assert results[31].finished
        assert results[31].metrics["val/loss"] == pytest.approx(alone.train_epoch()[31].metrics["val/loss"], rel=1e-3)


@pytest.mark.usefixtures("little_memory")
def test_plain_trials_that_do_not_fit_together_train_one_at_a_time_to_the_same_numbers() -> None:
    def build_model() -> nn.Module:  # 67 MB, so that eight exceed `SPARE_BYTES`
        return nn.Sequential(nn.Linear(6, 2048), nn.Tanh(), nn.Linear(2048, 8192), nn.Tanh(), nn.Linear(8192, 3))

    configs = {n: tiny_config(Adafactor(base_lr=0.001 * (1 + n)), param_groups=ONE_GROUP) for n in range(8)}
    trainer = LocalExecutor(tiny_workload(build_model), configs[0], device=GPU)
    alone = trainer.build({7: configs[7]})
    expected = [alone.train_epoch()[7].metrics for _ in range(2)]
    del alone
    group = trainer.build(configs)
    history = [group.train_epoch() for _ in range(2)]
    assert all(metrics.finished for results in history for metrics in results.values())
    for results, metrics in zip(history, expected, strict=True):
        assert results[7].metrics == pytest.approx(metrics, rel=1e-4)


class Rows(Dataset[tuple[Tensor, int]]):
    """Samples that are read by another process, and pinned."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((6,), float(index)), index % 3


def test_the_named_device_is_the_current_one_while_trials_train() -> None:
    device, before = torch.device("cuda", torch.cuda.device_count() - 1), torch.cuda.current_device()
    seen = set()

    class Noting(TinyModel):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.add((inputs.device, torch.cuda.current_device()))
            return super().forward(inputs)

    config = tiny_config()
    for data in (tiny_workload().train, Rows()):
        collate = None if isinstance(data, Split) else default_collate
        workload = dataclasses.replace(tiny_workload(Noting), train=data, collate=collate)
        group = LocalExecutor(workload, config, device=device).build({0: config, 1: config})
        seen.clear()
        assert all(metrics.finished for metrics in group.train_epoch().values())
        assert seen == {(device, device.index)}
    assert torch.cuda.current_device() == before


def test_seeding_a_device_leaves_the_random_states_as_they_were() -> None:
    states = random_states(GPU)
    drawn = []
    for seed in (0, 0, 1):
        with seeded(seed, GPU):
            drawn.append(torch.rand(4, device=GPU))
    assert random_states(GPU) == states
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_loss_that_stays_on_the_cpu_is_said_before_the_search_and_one_on_the_device_is_not() -> None:
    def problems(weight: Tensor) -> list[str]:
        workload = dataclasses.replace(
            tiny_workload(), loss=lambda outputs, targets: F.cross_entropy(outputs, targets, weight)
        )
        placed = on_device(workload, device=GPU)
        return [str(problem) for problem in workload_problems(placed, batch_sizes=[8], device=GPU)]

    assert problems(torch.ones(3, device=GPU)) == []
    (problem,) = problems(torch.ones(3))
    assert problem.startswith("workload: the loss raised RuntimeError")


def test_a_model_on_cuda_begins_with_the_weights_that_it_has_on_the_cpu() -> None:
    config = tiny_config()
    on_gpu, on_cpu = (
        FusedTrials({0: config}, on_device(tiny_workload(TinyModel), device=device), device=device).model_state(0)
        for device in (GPU, torch.device("cpu"))
    )
    assert all(torch.equal(on_gpu[name], on_cpu[name]) for name in on_cpu)


class Waiting(TinyModel):
    """Looks at a number of the device in each step."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        assert math.isfinite(float(torch.ones(3, device=GPU).sum()))
        return super().forward(inputs)


class Synchronizing(TinyModel):
    """Waits for the device in a way that only a capture refuses."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        torch.cuda.synchronize()
        return super().forward(inputs)


class Frozen(TinyModel):
    """Draws a random number on the CPU in each step, which a graph would repeat."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        return super().forward(inputs) * (1 + torch.rand(()))


def rows_on_gpu(build_model: Any, configs: Mapping[int, TrialConfig], *, captured: bool) -> FusedTrials:
    workload = on_device(tiny_workload(build_model), device=GPU)
    return FusedTrials(configs, workload, device=GPU, capture=capture_on(GPU) if captured else None)


def some_epochs(group: FusedTrials) -> list[Any]:
    """Train rows for some epochs, of which two average the weights, and drop a row; return all that comes of it."""
    found: list[Any] = [group.train_epoch(), group.train_epoch(average=True)]
    group.drop(1)
    return [*found, group.train_epoch(average=True), group.train_epoch(), group.test(), group.state_dict()]


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"ema": 0.9}, {"precision": "bf16"}], ids=str)
def test_captured_steps_equal_steps_run_by_operations_to_the_bit(changes: dict[str, Any]) -> None:
    configs = configs_of_every_rule()
    if changes:
        configs = {number: tiny_config(Adam(base_lr=0.01 * (1 + number)), **changes) for number in range(3)}
    configs = {number: dataclasses.replace(config, deterministic=True) for number, config in configs.items()}
    with precision(configs[0], GPU):
        captured, eager = (rows_on_gpu(Net, configs, captured=captured) for captured in (True, False))
        found, expected = some_epochs(captured), some_epochs(eager)
    assert captured.eager_because is None
    assert same(found, expected)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Waiting, "the host waits for the device within a step"),
        (Frozen, "random numbers are drawn on the CPU"),
        (Synchronizing, "AcceleratorError, CUDA error: operation not permitted when stream is capturing"),
    ],
)
def test_steps_that_cannot_be_captured_run_operation_by_operation(model: type[nn.Module], reason: str) -> None:
    configs = {number: tiny_config(SGD(base_lr=0.1 * (1 + number)), deterministic=True) for number in range(3)}
    with precision(configs[0], GPU):
        found, expected = (some_epochs(rows_on_gpu(model, configs, captured=captured)) for captured in (True, False))
        assert same(found, expected)
        assert LocalExecutor(tiny_workload(model), configs[0], device=GPU).eager_because == reason
        after = rows_on_gpu(Net, configs, captured=True)  # another model is captured afterwards
        again = some_epochs(after)
        assert after.eager_because is None
        assert same(again, some_epochs(rows_on_gpu(Net, configs, captured=False)))


def test_a_search_captures_steps() -> None:
    trainer = LocalExecutor(digits("cnn"), tiny_config(batch_size=64, param_groups=ONE_GROUP), device=GPU)
    assert (trainer.plain_because, trainer.eager_because) == (None, None)
