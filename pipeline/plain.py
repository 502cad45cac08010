"""The reference trainer: one `nn.Module`, one torch optimizer and one torch scheduler per trial."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.config import TrialConfig
from pipeline.optim import Strategy, hidden_matrices
from pipeline.param_groups import assign_groups
from pipeline.trainer import EpochMetrics, derive_seed
from pipeline.workloads.workload import Split, Workload

EVAL_BATCH = 1024
"""Samples per forward pass of an evaluation."""


class PlainTrials:
    """A group of plain trials that advance epoch by epoch together; see `TrialGroup` for the contract.

    Args:
        configs: Trial number to what it trains.
        workload: Data, model, loss and metrics of all of them.
        device: Where data and models live.
        dtype: Of parameters and floating-point data.
        seeded: Whether the model draws random numbers, such as dropout's, and needs them seeded before each step.
    """

    def __init__(
        self,
        configs: Mapping[int, TrialConfig],
        workload: Workload,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seeded: bool = True,
    ) -> None:
        self._splits = {name: getattr(workload, name).to(device, dtype) for name in ("train", "val", "test")}
        self.configs = dict(configs)
        self._trials = {
            number: PlainTrial(config, workload, self._splits["train"], device=device, dtype=dtype, seeded=seeded)
            for number, config in configs.items()
        }

    def train_epoch(self) -> dict[int, EpochMetrics]:
        """Train every trial for one epoch and evaluate it; a diverged or failed trial has left the group."""
        results = {}
        for number, trial in list(self._trials.items()):
            try:
                results[number] = trial.train_epoch(self._splits["val"])
            except Exception as error:  # a model of a person's own may raise anything: this trial ends, others go on
                failed = f"{type(error).__name__}: {error}"
                results[number] = EpochMetrics(epoch=trial.epoch, step=trial.step, metrics={}, lr={}, failed=failed)
            if results[number].diverged or results[number].failed:
                self.drop(number)
        return results

    def drop(self, number: int) -> None:
        """Stop training a trial."""
        del self._trials[number], self.configs[number]

    def test(self) -> dict[int, dict[str, float]]:
        """Return each trial's `test/…` metrics."""
        return {number: trial.evaluate("test", self._splits["test"]) for number, trial in self._trials.items()}

    def model_state(self, number: int) -> dict[str, Tensor]:
        """Return a trial's parameters and buffers by name, on the CPU."""
        state = self._trials[number].model.state_dict()
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every trial."""
        return {str(number): trial.state_dict() for number, trial in self._trials.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; trials that it does not hold were dropped."""
        for number in [number for number in self._trials if str(number) not in state]:
            self.drop(number)
        for number, trial in self._trials.items():
            trial.load_state_dict(state[str(number)])


class PlainTrial:
    """One trial; the epoch reads as a person would write it."""

    def __init__(
        self,
        config: TrialConfig,
        workload: Workload,
        train: Split,
        *,
        device: torch.device,
        dtype: torch.dtype,
        seeded: bool,
    ) -> None:
        self.config = config
        self.seeded = seeded
        self.workload = workload
        self.train = train
        self.device = device
        self.epoch = 0
        self.step = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "weights"))
            self.model = workload.build_model().to(device, dtype)
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        patterns = {name: group.pattern for name, group in config.param_groups.items()}
        groups, problems = assign_groups(parameters, patterns)
        assert not problems, problems
        for name, group in config.param_groups.items():
            for parameter in groups[name]:
                parameters[parameter].requires_grad_(group.lr_ratio != 0)
        self.strategy = Strategy(
            config,
            {group: [(name, parameters[name]) for name in names] for group, names in groups.items()},
            steps_per_epoch=math.ceil(len(train) / config.batch_size),
            directions=workload.directions,
            hidden_matrices=hidden_matrices(self.model),
        )

    def train_epoch(self, val: Split) -> EpochMetrics:
        """Pass over the training data once, then evaluate on `val`."""
        losses: list[Tensor] = []
        sizes: list[int] = []
        lr: dict[str, list[tuple[int, float]]] = {name: [] for name in self.config.param_groups}
        self.model.train()
        with seeded_steps(self.seeded, self.device):
            for number, (inputs, targets) in enumerate(self._batches()):
                if self.seeded:
                    torch.manual_seed(derive_seed(self.config.seed, "step", self.epoch, number))
                rates = self.strategy.learning_rates()
                self.strategy.zero_grad()
                with autocast(self.config, self.device):
                    loss = self.workload.loss(self.model(inputs), targets)
                loss.backward()
                self.strategy.step()
                self.step += 1
                losses.append(loss.detach())
                sizes.append(len(inputs))
                for name, rate in rates.items():
                    lr[name].append((self.step, rate))
        if not self.strategy.per_step:
            lr = {name: points[-1:] for name, points in lr.items()}
        self.epoch += 1
        step_losses = torch.stack(losses).tolist()
        metrics = {"train/loss": mean_loss(step_losses, sizes), **self.evaluate("val", val)}
        diverged = why_diverged(step_losses, metrics, first_step=self.step - len(sizes) + 1, epoch=self.epoch)
        if diverged is None:
            self.strategy.end_epoch(metrics)
        return EpochMetrics(
            epoch=self.epoch,
            step=self.step,
            metrics=metrics,
            lr={name: tuple(points) for name, points in lr.items()},
            diverged=diverged,
        )

    @torch.no_grad()
    def evaluate(self, name: str, split: Split) -> dict[str, float]:
        """Return the loss and every metric over a split, named after it."""
        self.model.eval()
        with seeded_steps(self.seeded, self.device), autocast(self.config, self.device):
            if self.seeded:
                torch.manual_seed(derive_seed(self.config.seed, name, self.epoch))
            outputs = torch.cat([self.model(inputs) for inputs in split.inputs.split(EVAL_BATCH)])
        outputs = outputs.float() if outputs.dtype == torch.bfloat16 else outputs
        values = {f"{name}/loss": float(self.workload.loss(outputs, split.targets))}
        finite = bool(torch.isfinite(outputs).all())  # a metric may raise on what a diverged model puts out
        for metric, measure in self.workload.metrics.items():
            values[f"{name}/{metric}"] = float(measure.function(outputs, split.targets)) if finite else math.nan
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next epoch depends on."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": {**dict(self.model.named_buffers()), **self.model.state_dict()},
            "strategy": self.strategy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that a trial of the same config returned."""
        self.epoch, self.step = state["epoch"], state["step"]
        for name, value in (*self.model.named_parameters(), *self.model.named_buffers()):
            value.data.copy_(state["model"][name])  # also the buffers that `load_state_dict` leaves out
        self.strategy.load_state_dict(state["strategy"])

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(len(self.train), seed=self.config.seed, epoch=self.epoch).to(self.device)
        for indices in order.split(self.config.batch_size):
            yield self.train.inputs.index_select(0, indices), self.train.targets.index_select(0, indices)


def seeded_steps(seeded: bool, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which steps may seed torch's global random states, if they do."""
    return fork_rng(device) if seeded else contextlib.nullcontext()


def autocast(config: TrialConfig, device: torch.device) -> torch.autocast:
    """Return the context of a config's forward passes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")


def fork_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context that leaves torch's global random states as they were, the CPU's and the device's."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def epoch_order(samples: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order (sample,) in which an epoch visits the training data: a function of seed and epoch alone."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))


def mean_loss(losses: list[float], sizes: list[int]) -> float:
    """Return the mean over an epoch's samples of the losses of its steps."""
    return sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)


def why_diverged(losses: list[float], metrics: Mapping[str, float], *, first_step: int, epoch: int) -> str | None:
    """Say where a trial's numbers stopped being finite, or None while they are."""
    for step, loss in enumerate(losses, start=first_step):
        if not math.isfinite(loss):
            return f"the loss became {loss} at step {step}, in epoch {epoch}"
    for name, value in metrics.items():
        if not math.isfinite(value):
            return f"{name} became {value} after epoch {epoch}"
    return None
