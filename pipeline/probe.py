"""Whether a workload's trials can train as rows: tried, on a few samples, against the plain trainer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import TrialConfig
from pipeline.fused import FusedTrials
from pipeline.plain import PlainTrials, fork_rng
from pipeline.strategy import SGD, Constant, ParamGroup
from pipeline.trainer import EpochMetrics
from pipeline.workloads.workload import Split, Workload

SAMPLES, BATCH = 32, 16
RATES = {0: 0.01, 1: 0.02}
"""Trial number to base rate: rows that differ."""
TOLERANCE = 0.01
"""Largest difference of a parameter, as a part of the parameters' largest change; likewise of a buffer and of a loss.
What rounding to float32 leaves of two steps, also behind BatchNorm over few samples, is below a thousandth, and a wrong
step is off by all of it."""


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
    few = [Split(split.inputs[:SAMPLES], split.targets[:SAMPLES]) for split in (workload.train, workload.val)]
    small = dataclasses.replace(workload, train=few[0], val=few[1], test=few[1])
    configs = {
        number: dataclasses.replace(
            config,
            optimizer=SGD(base_lr=rate),
            scheduler=Constant(),
            batch_size=min(config.batch_size, BATCH),
            param_groups={"all": ParamGroup(pattern=("*",))},
        )
        for number, rate in RATES.items()
    }
    with fork_rng(device):
        model = workload.build_model().to(device, dtype)
    draws = _draws_random_numbers(model, small, device, dtype)
    plain = PlainTrials(configs, small, device=device, dtype=dtype)
    start = plain.model_state(0)
    expected = plain.train_epoch()
    for metrics in expected.values():
        if not metrics.finished:
            return Finding(f"it could not be tried, {metrics.failed or metrics.diverged}", draws)
    try:
        fused = FusedTrials(configs, small, device=device, dtype=dtype)
        found = fused.train_epoch()
        same = all(
            _same_losses(found[n], expected[n])
            and _same_states(fused.model_state(n), plain.model_state(n), start, dict(tensors))
            for n in RATES
            for tensors in (model.named_parameters(), model.named_buffers())
        )
    except Exception as error:  # whatever a model does that a row cannot
        return Finding(f"{type(error).__name__}, {_first_line(error)}", draws)
    return Finding(None if same else "as rows it trains to other numbers", draws)


def _draws_random_numbers(model: nn.Module, workload: Workload, device: torch.device, dtype: torch.dtype) -> bool:
    batch = workload.train.to(device, dtype)
    with fork_rng(device), torch.no_grad():
        torch.manual_seed(0)
        before = _random_state(device)
        try:
            workload.loss(model.train()(batch.inputs[:BATCH]), batch.targets[:BATCH])
        except Exception:
            return True
        return not torch.equal(before, _random_state(device))


def _random_state(device: torch.device) -> Tensor:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0, dtype=torch.uint8)
    return torch.cat([torch.get_rng_state(), on_device])


def _same_losses(fused: EpochMetrics, plain: EpochMetrics) -> bool:
    return all(
        math.isclose(fused.metrics[name], plain.metrics[name], rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        for name in ("train/loss", "val/loss")
    )


def _same_states(
    fused: Mapping[str, Tensor], plain: Mapping[str, Tensor], start: Mapping[str, Tensor], names: Container[str]
) -> bool:
    """Say whether parameters, or buffers, are the same as far as rounding goes, measured by how far they have moved."""
    saved = [name for name in plain if name in names]
    floats = [name for name in saved if plain[name].is_floating_point()]
    moved = max((float((plain[name] - start[name]).abs().max()) for name in floats), default=0.0)
    apart = max((float((plain[name] - fused[name]).abs().max()) for name in floats), default=0.0)
    counts = all(torch.equal(plain[name], fused[name]) for name in saved if name not in floats)
    return counts and apart <= TOLERANCE * moved


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
