"""Whether a workload's trials can train as rows: tried, on a few samples, against the plain trainer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import TrialConfig
from pipeline.data import first_samples, model_inputs, place, samples_of
from pipeline.fused import FusedTrials
from pipeline.plain import PlainTrials, fork_rng
from pipeline.strategy import SGD, Constant, ParamGroup
from pipeline.trainer import EpochMetrics
from pipeline.workloads.workload import Workload

SAMPLES, BATCH = 32, 16
RATES = {0: 0.01, 1: 0.02}
"""Trial number to base rate: rows that differ."""
MANY, MANY_PARAMETERS = 33, 1 << 22
"""Rows in company: a column more than 32 even of a model with one, but fewer if they have many parameters."""
TOLERANCE = {"fp32": 0.01, "tf32": 0.05, "bf16": 0.25}
"""By precision: largest difference of a parameter, as a part of the parameters' largest change; likewise of a buffer
and of a loss. What rounding to float32 leaves of two steps, also behind BatchNorm over few samples, is below a
thousandth, to bfloat16 below a tenth, and a wrong step is off by all of it."""


@dataclass(frozen=True)
class Finding:
    """What is known of a workload once it was tried."""

    cannot_fuse: str | None
    """Why its trials cannot be rows; None if they can."""
    draws_random_numbers: bool
    """Whether its model or loss draws random numbers in training, as dropout does."""


def probe(workload: Workload, config: TrialConfig, *, device: torch.device, dtype: torch.dtype) -> Finding:
    """Train two trials for two steps as rows and plain, every parameter at the same rate.

    A model that `torch.func.vmap` cannot take is found by its error; one that it would take wrongly, by the result.
    """
    tolerance = TOLERANCE[config.precision]
    workload = place(workload, device=device, dtype=dtype)
    small = _with_samples(workload, SAMPLES)
    configs = _configs(dataclasses.replace(config, batch_size=min(config.batch_size, BATCH)))
    with fork_rng(device):
        model = workload.build_model().to(device, dtype)
    draws = _draws_random_numbers(model, small, device, dtype)
    plain = PlainTrials(configs, small, device=device, dtype=dtype)
    start = plain.model_state(0)
    size = sum(value.numel() for value in start.values())
    expected = plain.train_epoch()
    for metrics in expected.values():
        if not metrics.finished:
            return Finding(f"it could not be tried, {metrics.failed or metrics.diverged}", draws)
    try:
        fused = FusedTrials(configs, small, device=device, dtype=dtype)
        found = fused.train_epoch()
        same = all(
            _same_losses(found[n], expected[n], tolerance)
            and _same_states(fused.model_state(n), plain.model_state(n), start, dict(tensors), tolerance)
            for n in RATES
            for tensors in (model.named_parameters(), model.named_buffers())
        )
        if not same:
            return Finding("as rows it trains to other numbers", draws)
        if device.type == "cpu" and (
            config.precision == "bf16" or not _same_in_company(workload, config, size, device=device, dtype=dtype)
        ):
            return Finding("its numbers depend on how many trials are rows", draws)
    except Exception as error:  # whatever a model does that a row cannot
        return Finding(f"{type(error).__name__}, {_first_line(error)}", draws)
    return Finding(None, draws)


def _same_in_company(
    workload: Workload, config: TrialConfig, size: int, *, device: torch.device, dtype: torch.dtype
) -> bool:
    """Say whether rows are the same to the bit alone and among many, which is all that CPU kernels leave open.

    PyTorch sums over a batch of vectors, as `BatchNorm1d` does, 32 columns at a time, and rows lie side by side. Tried
    with a whole batch and with one as large as an epoch's last; bfloat16 kernels differ by shape in more ways.
    """
    small = _with_samples(workload, config.batch_size + len(workload.train) % config.batch_size)
    configs = _configs(config)
    many = {number: configs[number % 2] for number in range(max(3, min(MANY, MANY_PARAMETERS // size)))}
    together = FusedTrials(many, small, device=device, dtype=dtype)
    metrics = together.train_epoch()
    for number in configs:
        alone = FusedTrials({number: configs[number]}, small, device=device, dtype=dtype)
        wanted, state = alone.train_epoch()[number], alone.model_state(number)
        for other in (n for n in many if n % 2 == number):
            its = together.model_state(other)
            if metrics[other].metrics != wanted.metrics or not all(torch.equal(its[k], state[k]) for k in state):
                return False
    return True


def _configs(config: TrialConfig) -> dict[int, TrialConfig]:
    """Return two trials of a workload that differ; what a config freezes or how fast it trains says nothing of it."""
    groups = {"all": ParamGroup(pattern=("*",))}
    return {
        number: dataclasses.replace(config, optimizer=SGD(base_lr=rate), scheduler=Constant(), param_groups=groups)
        for number, rate in RATES.items()
    }


def _with_samples(workload: Workload, count: int) -> Workload:
    """Return a workload with the first samples of its splits."""
    train, val = (first_samples(samples_of(workload, name), count) for name in ("train", "val"))
    return dataclasses.replace(workload, train=train, val=val, test=None)


def _draws_random_numbers(model: nn.Module, workload: Workload, device: torch.device, dtype: torch.dtype) -> bool:
    batch = first_samples(samples_of(workload, "train"), BATCH)
    inputs = model_inputs(workload, batch.inputs, dtype)
    with fork_rng(device), torch.no_grad():
        torch.manual_seed(0)
        before = _random_state(device)
        try:
            workload.loss(model.train()(inputs), batch.targets)
        except Exception:
            return True
        return not torch.equal(before, _random_state(device))


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
    """Say whether parameters, or buffers, are the same as far as rounding goes, measured by how far they have moved."""
    saved = [name for name in plain if name in names]
    floats = [name for name in saved if plain[name].is_floating_point()]
    moved = max((float((plain[name] - start[name]).abs().max()) for name in floats), default=0.0)
    apart = max((float((plain[name] - fused[name]).abs().max()) for name in floats), default=0.0)
    counts = all(torch.equal(plain[name], fused[name]) for name in saved if name not in floats)
    return counts and apart <= tolerance * moved


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
