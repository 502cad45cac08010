"""PyTorch's global settings while trials train, and what is recorded of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyModel, tiny_config, tiny_workload
from torch import Tensor, nn

from pipeline.app.device import choose_device, environment
from pipeline.app.prepare import prepare
from pipeline.errors import InvalidInput
from pipeline.space.load import load_space
from pipeline.training.executor import LocalExecutor
from pipeline.training.precision import PRODUCTS, current_settings, precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def settings() -> tuple[Any, ...]:
    """Return every setting that training changes."""
    return (
        torch.get_num_threads(),
        [product.fp32_precision for product in PRODUCTS],
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )


class Witness(TinyModel):
    """A model that notes the settings whenever it is called."""

    seen: list[tuple[Any, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.seen = SEEN

    def forward(self, inputs: Tensor) -> Tensor:
        """Note the settings, and go on."""
        self.seen.append(settings())
        return super().forward(inputs)


SEEN: list[tuple[Any, ...]] = []


@pytest.mark.parametrize(("value", "expected"), [("fp32", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")])
def test_products_on_cuda_are_rounded_only_where_the_config_says_so(value: str, expected: str) -> None:
    with precision(tiny_config(precision=value), CUDA):
        assert [product.fp32_precision for product in PRODUCTS] == [expected] * 3
        assert current_settings(CUDA)["fp32_precision"] == expected


@pytest.mark.parametrize("value", ["fp32", "tf32"])
def test_a_model_may_use_the_older_switches_of_tf32(value: str) -> None:
    # With PyTorch's newer switches alone, reading an older one raises, and `cudnn.flags` reads one.
    tf32 = value == "tf32"
    with precision(tiny_config(precision=value), CUDA):
        for _ in range(2):
            with torch.backends.cudnn.flags(enabled=True):
                assert torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
            assert all((product.fp32_precision == "tf32") == tf32 for product in PRODUCTS)


def test_precisions_that_were_set_before_are_put_back() -> None:
    before = settings()
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = False
    changed = settings()
    with precision(tiny_config(precision="tf32"), CUDA):
        assert settings() != changed
    assert settings() == changed
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.fp32_precision = before[1][0]
    assert settings() == before


@pytest.mark.parametrize(("device", "expected"), [(CUDA, False), (CPU, True)], ids=["cuda", "cpu"])
def test_algorithms_of_convolutions_are_not_tried_on_cuda(device: torch.device, expected: bool) -> None:
    before = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = True
        with precision(tiny_config(), device):
            assert torch.backends.cudnn.benchmark is expected
        assert torch.backends.cudnn.benchmark is True
    finally:
        torch.backends.cudnn.benchmark = before


def test_a_cpu_computes_with_one_thread_and_its_products_stay_as_they_are() -> None:
    before = settings()
    with precision(tiny_config(), CPU):
        assert settings() == (1, *before[1:])
        assert current_settings(CPU) == {"threads": 1, "deterministic": False}


def test_a_cpu_computes_with_as_many_threads_as_a_placement_says() -> None:
    before = settings()
    with precision(tiny_config(), CPU, threads=before[0] + 1):
        assert settings() == (before[0] + 1, *before[1:])
        assert current_settings(CPU) == {"threads": before[0] + 1, "deterministic": False}
    assert settings() == before


def test_deterministic_algorithms_are_asked_for_with_what_cublas_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with precision(tiny_config(deterministic=True), CUDA):
        assert torch.are_deterministic_algorithms_enabled()
        assert current_settings(CUDA)["deterministic"]
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_what_a_person_set_for_cublas_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with precision(tiny_config(deterministic=True), CUDA):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_settings_are_put_back_even_after_an_error(device: torch.device) -> None:
    before = settings()
    torch.backends.cudnn.benchmark = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    changed = settings()
    with contextlib.suppress(ValueError), precision(tiny_config(deterministic=True), device):
        assert settings() != changed
        raise ValueError("in training")
    assert settings() == changed
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(False)
    assert settings() == before


@pytest.mark.parametrize("build_model", [Witness, lambda: nn.Sequential(Witness(), nn.LSTM(3, 3))[0]])
def test_all_of_training_and_testing_happens_under_the_settings(build_model: Callable[[], nn.Module]) -> None:
    before = settings()
    SEEN.clear()
    config = tiny_config(deterministic=True)
    group = LocalExecutor(tiny_workload(build_model), config, device=CPU).build({0: config, 1: config})
    group.train_epoch()
    group.test()
    assert len(SEEN) > 10
    assert {(seen[0], seen[-3]) for seen in SEEN} == {(1, True)}
    assert settings() == before


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_environment_of_a_trial_says_what_was_set(deterministic: bool, space_file: Callable[..., Path]) -> None:
    space = load_space(space_file(deterministic=deterministic))
    noted = environment(prepare(space, source="test", device="cpu", searching=True)[1])
    assert (noted["device"], noted["threads"], noted["deterministic"]) == ("cpu", 1, deterministic)


def test_tf32_without_a_cuda_device_is_refused(space_file: Callable[..., Path]) -> None:
    space = load_space(space_file(precision="tf32"))
    message = "precision: tf32 needs a CUDA device, and trials train on cpu; set precision to fp32 or bf16"
    with pytest.raises(InvalidInput, match=message):
        prepare(space, source="test", device="cpu", searching=True)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is a Metal device")
def test_a_metal_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidInput, match="mps: there is no Metal device; use --device cpu, or auto"):
        choose_device("mps")


def test_bf16_computes_products_in_bfloat16_and_keeps_parameters_in_float32() -> None:
    dtypes = []

    class Noting(TinyModel):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs = super().forward(inputs)
            dtypes.append(outputs.dtype)
            return outputs

    config = tiny_config(precision="bf16")
    group = LocalExecutor(tiny_workload(Noting), config, device=CPU).build({0: config})
    assert group.train_epoch()[0].finished
    assert set(dtypes[-5:]) == {torch.bfloat16}
    assert {value.dtype for value in group.model_state(0).values()} == {torch.float32}
