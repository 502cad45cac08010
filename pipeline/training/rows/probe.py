"""The probe: find out whether trials of a workload can train as rows, by comparing both trainers on a few samples."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import DataError, InvalidInput, Problem, first_line
from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import SGD
from pipeline.space.schedules import Constant
from pipeline.space.trial import EpochMetrics
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.captured import Capture, capture_on
from pipeline.training.rows.measure import BATCH, Finding, measure_step
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.build import built_model
from pipeline.workloads.data import to_device, with_fewer_samples
from pipeline.workloads.random_state import random_states_kept
from pipeline.workloads.streamed import Streamed
from pipeline.workloads.workload import Workload

SAMPLES = 32
CAPTURED_EPOCHS = 3
"""Epochs of trials whose steps are captured: the second captures every shape, and in the third all steps are graphs."""
BASE_LRS = {0: 0.01, 1: 0.02}
"""Trial number to `base_lr`: two rows that differ."""
TOLERANCE = {"fp64": 0.01, "fp32": 0.01, "tf32": 0.05, "bf16": 0.25}
"""Precision to the largest difference of a parameter, as a fraction of the parameters' largest change; the same for
buffers and losses. Over two steps, float32 rounding makes a difference below 0.001, also after BatchNorm over few
samples; bfloat16 rounding below 0.1; a wrong step about 1."""


def probe(workload: Workload, config: TrialConfig, *, device: torch.device, dtype: torch.dtype) -> Finding:
    """Train two trials for two steps as rows and plain, every parameter that is not frozen at the same rate.

    An error shows a model that `torch.func.vmap` cannot compute; a different result shows one that `vmap` computes
    wrongly.

    Raises:
        InvalidInput: The plain trials fail, or the samples cannot be read.
    """
    try:
        return _find(workload, config, device, dtype)
    except DataError as error:
        raise InvalidInput("workload", [Problem("workload", str(error))]) from error


def _find(workload: Workload, config: TrialConfig, device: torch.device, dtype: torch.dtype) -> Finding:
    tolerance = TOLERANCE[config.precision]
    workload = to_device(workload, device=device, dtype=dtype)
    small = _with_samples(workload, SAMPLES)
    configs = _configs(dataclasses.replace(config, batch_size=min(config.batch_size, BATCH)))
    with random_states_kept(device=device):
        finding = measure_step(small, config, device, dtype)
        plain = _train(PlainTrials, configs, small, device, dtype)
        for metrics in plain.metrics.values():
            if metrics.failed:
                message = f"training on a few samples raised {metrics.failed}"
                raise InvalidInput("workload", [Problem("workload", message)])
            if metrics.diverged:
                return finding.without_rows(f"it could not be tried, {metrics.diverged}")
        if finding.plain_because:
            return finding
        try:
            fused = _train(FusedTrials, configs, small, device, dtype)
            same = _same(fused, plain, tolerance)
            if not same and dtype != torch.float64:
                # After many layers such as ReLU, rounding in float32 alone may exceed the tolerance, in float64 not.
                fused, plain = (
                    _train(cls, configs, small, device, torch.float64) for cls in (FusedTrials, PlainTrials)
                )
                same = _same(fused, plain, tolerance)
        except (Exception, SystemExit) as error:  # a model may raise anything
            return finding.without_rows(_missing_vmap_rule(error) or f"{type(error).__name__}, {first_line(error)}")
        if not same:
            return finding.without_rows("as rows it trains to other numbers")
        capture = capture_on(device)
        if capture is None or finding.eager_because:
            return dataclasses.replace(finding, eager_because=None) if capture is None else finding
        return dataclasses.replace(finding, eager_because=_why_eager(capture, configs, small, device, dtype, tolerance))


def _why_eager(
    capture: Capture,
    configs: Mapping[int, TrialConfig],
    workload: Workload,
    device: torch.device,
    dtype: torch.dtype,
    tolerance: float,
) -> str | None:
    """Return why steps are not captured; None if captured steps train to the numbers of other steps."""
    try:
        eager, captured = (
            _train(
                functools.partial(FusedTrials, capture=used), configs, workload, device, dtype, epochs=CAPTURED_EPOCHS
            )
            for used in (None, capture)
        )
        same = _same(captured, eager, tolerance)
    except Exception as error:  # a model may raise anything
        return f"{type(error).__name__}, {first_line(error)}"
    return captured.eager_because or (None if same else "its captured steps train to other numbers")


def _missing_vmap_rule(error: BaseException) -> str | None:
    """Return which operation `torch.func.vmap` has no rule for; None if the error has another cause."""
    missing = re.match(r"Batching rule not implemented for aten::(\w+)", str(error))
    return f"PyTorch's vmap has no rule for {missing[1]}" if missing else None


@dataclass(frozen=True)
class _Trained:
    """The result of training some trials."""

    start: Mapping[str, Tensor]
    """Initial model state, the same for every trial."""
    parameters: frozenset[str]
    """Names of the parameters in a model state; the others are buffers."""
    metrics: Mapping[int, EpochMetrics]
    states: Mapping[int, Mapping[str, Tensor]]
    """Model state of each trial that finished the last epoch."""
    eager_because: str | None = None
    """Why no step was captured; see `FusedTrials.eager_because`."""


def _train(
    build: Callable[..., FusedTrials | PlainTrials],
    configs: Mapping[int, TrialConfig],
    workload: Workload,
    device: torch.device,
    dtype: torch.dtype,
    *,
    epochs: int = 1,
) -> _Trained:
    group = build(configs, workload, device=device, dtype=dtype)
    start = group.model_state(0)
    metrics = [group.train_epoch() for _ in range(epochs)][-1]
    names = frozenset(name for name, _ in built_model(workload, seed=0, device=device, dtype=dtype).named_parameters())
    states = {number: group.model_state(number) for number, epoch in metrics.items() if epoch.finished}
    return _Trained(start, names, metrics, states, group.eager_because if isinstance(group, FusedTrials) else None)


def _same(fused: _Trained, plain: _Trained, tolerance: float) -> bool:
    """Return whether rows and plain trials trained to the same numbers within the tolerance."""
    return all(
        _same_losses(fused.metrics[number], plain.metrics[number], tolerance)
        and _same_states(fused.states[number], plain.states[number], plain.start, names, tolerance)
        for number in BASE_LRS
        for names in (plain.parameters, plain.start.keys() - plain.parameters)
    )


def _configs(config: TrialConfig) -> dict[int, TrialConfig]:
    """Return two trials with different rates that freeze the groups that a config freezes; every other ratio is 1."""
    groups = {
        name: dataclasses.replace(group, lr_ratio=float(group.lr_ratio != 0))
        for name, group in config.param_groups.items()
    }
    optimizers = {number: SGD(base_lr=base_lr) for number, base_lr in BASE_LRS.items()}
    return {
        number: dataclasses.replace(config, optimizer=optimizer, scheduler=Constant(), param_groups=groups)
        for number, optimizer in optimizers.items()
    }


def _with_samples(workload: Workload, count: int) -> Workload:
    """Return a workload with `count` samples of each split, read by this process."""
    small = with_fewer_samples(workload, train=count, val=count)
    splits = {"train": small.train, "val": small.val}
    here = {name: split.read_here() for name, split in splits.items() if isinstance(split, Streamed)}
    return dataclasses.replace(small, **here)  # type: ignore[arg-type]


def _same_losses(fused: EpochMetrics, plain: EpochMetrics, tolerance: float) -> bool:
    return all(
        math.isclose(fused.metrics[name], plain.metrics[name], rel_tol=tolerance, abs_tol=tolerance)
        for name in ("train/loss", "val/loss")
    )


def _same_states(
    fused: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    names: Container[str],
    tolerance: float,
) -> bool:
    """Return whether parameters, or buffers, differ by at most `tolerance` times their largest change."""
    saved = [name for name in plain if name in names]
    floats = [name for name in saved if plain[name].is_floating_point()]
    moved = max((_largest_difference(plain[name], start[name]) for name in floats), default=0.0)
    apart = max((_largest_difference(plain[name], fused[name]) for name in floats), default=0.0)
    counts = all(torch.equal(plain[name], fused[name]) for name in saved if name not in floats)
    return counts and apart <= tolerance * moved


def _largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference; equal infinities, as a causal mask holds them, do not differ."""
    differences = torch.where(one == other, 0.0, (one - other).abs())
    return float(differences.max()) if differences.numel() else 0.0
