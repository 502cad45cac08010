"""The probe: find out whether trials of a workload can train as rows, by comparing both trainers on a few samples."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import first_line
from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import SGD
from pipeline.space.schedules import Constant
from pipeline.space.trial import EpochMetrics
from pipeline.training.epoch import fork_rng
from pipeline.training.plain import PlainTrials
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.data import first_samples, model_inputs, samples_of, to_device
from pipeline.workloads.workload import Workload

PARAMETER_COPIES = 6
"""Copies of the parameters per training trial: value, gradient, two optimizer states, two temporaries."""
SAMPLES, BATCH = 32, 16
BASE_LRS = {0: 0.01, 1: 0.02}
"""Trial number to `base_lr`: two rows that differ."""
MAX_STEP_FLOPS = 64e6
"""Largest training step of a trial that trains as a row on a CPU. Rows save the time of Python, about half a
millisecond per step; larger products are slower in parallel than alone (benchmarks/NOTES.md)."""
TOLERANCE = {"fp32": 0.01, "tf32": 0.05, "bf16": 0.25}
"""Precision to the largest difference of a parameter, as a fraction of the parameters' largest change; the same for
buffers and losses. Over two steps, float32 rounding makes a difference below 0.001, also after BatchNorm over few
samples; bfloat16 rounding below 0.1; a wrong step about 1."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of probing a workload."""

    plain_because: str | None = None
    """Why the trials train plain; None if the trials are rows."""
    draws_random_numbers: bool
    """Whether the model or the loss draws random numbers in training, as dropout does."""
    trial_bytes: int
    """Approximate memory of a trial in a training step, in bytes."""


def probe(workload: Workload, config: TrialConfig, *, device: torch.device, dtype: torch.dtype) -> Finding:
    """Train two trials for two steps as rows and plain, every parameter that is not frozen at the same rate.

    An error shows a model that `torch.func.vmap` cannot compute; a different result shows one that `vmap` computes
    wrongly.
    """
    tolerance = TOLERANCE[config.precision]
    workload = to_device(workload, device=device, dtype=dtype)
    small = _with_samples(workload, SAMPLES)
    configs = _configs(dataclasses.replace(config, batch_size=min(config.batch_size, BATCH)))
    with fork_rng(device):
        model = workload.build_model().to(device, dtype)
    finding = _measure_step(model, small, config, device, dtype)
    if finding.plain_because:
        return finding
    plain = _train(PlainTrials, configs, small, device, dtype)
    for metrics in plain.metrics.values():
        if not metrics.finished:
            return _cannot_fuse(finding, f"it could not be tried, {metrics.failed or metrics.diverged}")
    try:
        same = _same(_train(FusedTrials, configs, small, device, dtype), plain, model, tolerance)
        if not same and dtype != torch.float64:
            # After many layers such as ReLU, rounding in float32 alone may exceed the tolerance, in float64 not.
            fused, plain = (_train(cls, configs, small, device, torch.float64) for cls in (FusedTrials, PlainTrials))
            same = _same(fused, plain, model, tolerance)
        if not same:
            return _cannot_fuse(finding, "as rows it trains to other numbers")
        if name := _changed_state(workload, small, config, device, dtype):
            return _cannot_fuse(finding, f"its {name} changes in training and is no buffer")
        return finding
    except Exception as error:  # a model may raise anything
        return _cannot_fuse(finding, _missing_vmap_rule(error) or f"{type(error).__name__}, {first_line(error)}")


def _cannot_fuse(finding: Finding, why: str) -> Finding:
    return dataclasses.replace(finding, plain_because=f"the model cannot be rows of a matrix: {why}")


def _missing_vmap_rule(error: Exception) -> str | None:
    """Return which operation `torch.func.vmap` has no rule for; None if the error has another cause."""
    missing = re.match(r"Batching rule not implemented for aten::(\w+)", str(error))
    return f"PyTorch's vmap has no rule for {missing[1]}" if missing else None


@dataclass(frozen=True)
class _Trained:
    """The result of training some trials for an epoch."""

    start: Mapping[str, Tensor]
    """Initial model state, the same for every trial."""
    metrics: Mapping[int, EpochMetrics]
    states: Mapping[int, Mapping[str, Tensor]]
    """Model state of each trial that finished the epoch."""


def _train(
    cls: type[FusedTrials | PlainTrials],
    configs: Mapping[int, TrialConfig],
    workload: Workload,
    device: torch.device,
    dtype: torch.dtype,
) -> _Trained:
    group = cls(configs, workload, device=device, dtype=dtype)
    start, metrics = group.model_state(0), group.train_epoch()
    return _Trained(start, metrics, {n: group.model_state(n) for n, epoch in metrics.items() if epoch.finished})


def _same(fused: _Trained, plain: _Trained, model: nn.Module, tolerance: float) -> bool:
    """Return whether rows and plain trials trained to the same numbers within the tolerance."""
    return all(
        _same_losses(fused.metrics[number], plain.metrics[number], tolerance)
        and _same_states(fused.states[number], plain.states[number], plain.start, dict(tensors), tolerance)
        for number in BASE_LRS
        for tensors in (model.named_parameters(), model.named_buffers())
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
    """Return a workload with the first `count` samples of each split."""
    train, val = (first_samples(samples_of(workload, name), count) for name in ("train", "val"))
    return dataclasses.replace(workload, train=train, val=val, test=None)


def _measure_step(
    model: nn.Module, workload: Workload, config: TrialConfig, device: torch.device, dtype: torch.dtype
) -> Finding:
    """Measure a training step by one forward pass: random numbers, memory and FLOPs."""
    batch = first_samples(samples_of(workload, "train"), BATCH)
    inputs = model_inputs(workload, batch.inputs, dtype)
    saved, counter = _SavedTensors(model), FlopCounterMode(display=False)
    with fork_rng(device):
        torch.manual_seed(0)
        before = _random_state(device)
        try:
            with saved, counter:
                workload.loss(model.train()(inputs), batch.targets)
            with torch.no_grad():
                model.eval()(inputs)
            draws = not torch.equal(before, _random_state(device))
        except Exception:
            draws = True
    steps = config.batch_size / len(inputs)
    flops = 3 * counter.get_total_flops() * steps  # the backward pass takes twice as many as the forward pass
    why = f"a step of {flops / 1e9:.2g} GFLOP gains nothing as a row on a CPU"
    return Finding(
        plain_because=why if device.type == "cpu" and flops > MAX_STEP_FLOPS else None,
        draws_random_numbers=draws,
        trial_bytes=int(saved.bytes * steps) + PARAMETER_COPIES * sum(p.nbytes for p in model.parameters()),
    )


def _changed_state(
    workload: Workload, small: Workload, config: TrialConfig, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return the name of state other than a buffer that a training forward pass changes; rows would share this state.

    Examples are a counter in an attribute, and a frozen parameter that is a moving average of a trained one.
    """
    with fork_rng(device), torch.no_grad():
        model = workload.build_model().to(device, dtype).train()
        inputs = model_inputs(workload, first_samples(samples_of(small, "train"), BATCH).inputs, dtype)
        before = _plain_attributes(model)
        versions = {name: parameter._version for name, parameter in model.named_parameters()}  # counts in-place writes
        model(inputs)
    if written := [name for name, parameter in model.named_parameters() if parameter._version != versions[name]]:
        return f"parameter {written[0]}"
    after = _plain_attributes(model)
    return next((name for name in after if before.get(name) != after[name]), None)


def _plain_attributes(model: nn.Module) -> dict[str, Any]:
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str) and name != "training"
    }


def _random_state(device: torch.device) -> Tensor:
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    states += [torch.mps.get_rng_state()] if device.type == "mps" else []
    return torch.cat(states)


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
    moved = max((float((plain[name] - start[name]).abs().max()) for name in floats), default=0.0)
    apart = max((float((plain[name] - fused[name]).abs().max()) for name in floats), default=0.0)
    counts = all(torch.equal(plain[name], fused[name]) for name in saved if name not in floats)
    return counts and apart <= tolerance * moved


class _SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """A context that counts the bytes that a forward pass saves for the backward pass, without the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._sizes: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Bytes saved so far."""
        return sum(self._sizes.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor
