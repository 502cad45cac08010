"""Whether a workload's trials can train as rows: tried, on a few samples, against the plain trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import TrialConfig
from pipeline.fused import FusedTrials
from pipeline.plain import PlainTrials, fork_rng
from pipeline.strategy import SGD, Constant
from pipeline.workloads.workload import Split, Workload

SAMPLES, BATCH = 32, 16
RATES = {0: 0.01, 1: 0.02}
"""Trial number to base rate: rows that differ."""
TOLERANCE = 0.01
"""Largest difference of a parameter or buffer, as a part of the largest change: what rounding to float32 leaves of two
steps, also behind BatchNorm over few samples, is below a thousandth, and a wrong step is off by all of it."""


@dataclass(frozen=True)
class Finding:
    """What is known of a workload once it was tried."""

    cannot_fuse: str | None
    """Why its trials cannot be rows; None if they can."""
    draws_random_numbers: bool
    """Whether its model draws random numbers in training, as dropout does."""


def probe(workload: Workload, config: TrialConfig, *, device: torch.device, dtype: torch.dtype) -> Finding:
    """Train two trials for two steps as rows and plain.

    A model that `torch.func.vmap` cannot take is found by its error; one that it would take wrongly, by the result.
    """
    few = [Split(split.inputs[:SAMPLES], split.targets[:SAMPLES]) for split in (workload.train, workload.val)]
    small = dataclasses.replace(workload, train=few[0], val=few[1], test=few[1])
    configs = {
        number: dataclasses.replace(
            config, optimizer=SGD(base_lr=rate), scheduler=Constant(), batch_size=min(config.batch_size, BATCH)
        )
        for number, rate in RATES.items()
    }
    draws = _draws_random_numbers(small, device, dtype)
    plain = PlainTrials(configs, small, device=device, dtype=dtype)
    start = plain.model_state(0)
    for metrics in plain.train_epoch().values():
        if not metrics.finished:
            return Finding(f"it could not be tried, {metrics.failed or metrics.diverged}", draws)
    try:
        fused = FusedTrials(configs, small, device=device, dtype=dtype)
        fused.train_epoch()
        same = all(_same(fused.model_state(n), plain.model_state(n), start) for n in RATES)
    except Exception as error:  # whatever a model does that a row cannot
        return Finding(f"{type(error).__name__}, {_first_line(error)}", draws)
    return Finding(None if same else "as rows it trains to other numbers", draws)


def _draws_random_numbers(workload: Workload, device: torch.device, dtype: torch.dtype) -> bool:
    with fork_rng(device), torch.no_grad():
        model = workload.build_model().to(device, dtype).train()
        inputs = workload.train.to(device, dtype).inputs[:BATCH]
        torch.manual_seed(0)
        before = _random_state(device)
        try:
            model(inputs)
        except Exception:
            return True
        return not torch.equal(before, _random_state(device))


def _random_state(device: torch.device) -> Tensor:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0, dtype=torch.uint8)
    return torch.cat([torch.get_rng_state(), on_device])


def _same(fused: Mapping[str, Tensor], plain: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> bool:
    """Say whether two states are the same as far as rounding goes, measured by how far training has moved."""
    names = [name for name, value in plain.items() if value.is_floating_point()]
    moved = max((float((plain[name] - start[name]).abs().max()) for name in names), default=0.0)
    apart = max((float((plain[name] - fused[name]).abs().max()) for name in names), default=0.0)
    counts = all(torch.equal(plain[name], fused[name]) for name in plain if name not in names)
    return counts and apart <= TOLERANCE * moved


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
