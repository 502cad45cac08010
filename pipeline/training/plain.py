"""The reference trainer: one `nn.Module`, one torch optimizer and one torch scheduler per trial."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.space.config import TrialConfig, derive_seed
from pipeline.space.param_groups import assign_groups
from pipeline.space.placement import Placement
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import Batches, train_epoch_of, trial_error
from pipeline.training.epoch import Record, autocast, check_shapes, mean_loss, seeded_step, why_diverged
from pipeline.training.optim import Strategy, hidden_matrices
from pipeline.training.pooling import Pooling
from pipeline.workloads.data import evaluation_batches, training_batches
from pipeline.workloads.workload import Workload


class PlainTrials:
    """A group of plain trials; see `TrialGroup` for the contract.

    Args:
        configs: Trial number to config.
        workload: Data, model, loss and metrics; the data are on the device.
        device: Device of the data and the models.
        dtype: Type of parameters and floating-point data.
        seeded: Whether to seed random numbers before each step; False only if the model draws none.
    """

    plain = True
    """Whether each trial trains by itself."""

    def __init__(
        self,
        configs: Mapping[int, TrialConfig],
        workload: Workload,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seeded: bool = True,
    ) -> None:
        self.configs = dict(configs)
        self._config = next(iter(configs.values()))
        self._epoch = 0
        self._device, self._dtype = device, dtype
        self._workload = workload
        self._trials = {
            number: PlainTrial(config, workload, device=device, dtype=dtype, seeded=seeded)
            for number, config in configs.items()
        }
        self._failed: dict[int, EpochMetrics] = {}

    def train_epoch(self) -> dict[int, EpochMetrics]:
        """Train every trial for one epoch and evaluate it; a diverged or failed trial leaves the group."""
        return train_epoch_of(self)

    def training_batches(self) -> Batches:
        """Yield the training batches of the next epoch; see `Stepwise`."""
        return training_batches(self._workload, self._config, epoch=self._epoch, device=self._device, dtype=self._dtype)

    def evaluation_batches(self, name: str) -> Batches:
        """Yield the batches of a split."""
        return evaluation_batches(self._workload, name, self._config, dtype=self._dtype)

    def begin_epoch(self) -> None:
        """Begin an epoch of every trial."""
        self._failed = {}
        self._each(PlainTrial.begin_epoch)

    def train_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Update every trial on one batch."""
        # Clones, since a model may change a batch in place.
        self._each(lambda trial: trial.train_step(inputs.clone(), targets.clone()))

    def evaluate_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Evaluate every trial on one batch."""
        self._each(lambda trial: trial.evaluate_step(inputs, targets))

    def end_epoch(self) -> dict[int, EpochMetrics]:
        """Return the metrics of the epoch; a diverged trial leaves the group."""
        self._epoch += 1
        results: dict[int, EpochMetrics] = {}
        self._each(lambda trial: trial.end_epoch(), results)
        for number in [number for number, metrics in results.items() if metrics.diverged]:
            self.drop(number)
        return dict(sorted((results | self._failed).items()))

    def _each(self, function: Callable[[PlainTrial], Any], results: dict[int, Any] | None = None) -> None:
        """Call a function of every trial; a trial that raises anything has failed and leaves the group."""
        for number, trial in list(self._trials.items()):
            try:
                value = function(trial)
            except Exception as raised:
                error = trial_error(raised)
                if isinstance(error, torch.OutOfMemoryError):  # which no trial causes alone
                    raise error from None
                failed = f"{type(error).__name__}: {error}"
                self._failed[number] = EpochMetrics(
                    epoch=trial.epoch, step=trial.step, metrics={}, lr={}, failed=failed
                )
                self.drop(number)
            else:
                if results is not None:
                    results[number] = value

    def drop(self, number: int) -> None:
        """Stop training a trial."""
        del self._trials[number], self.configs[number]

    def test(self) -> dict[int, dict[str, float]]:
        """Return each trial's `test/…` metrics."""
        for inputs, targets in self.evaluation_batches("test"):
            for trial in self._trials.values():
                trial.evaluate_step(inputs, targets)
        return {number: trial.evaluated("test") for number, trial in self._trials.items()}

    def model_state(self, number: int) -> dict[str, Tensor]:
        """Return a trial's parameters and buffers by name, on the CPU."""
        state = self._trials[number].model.state_dict()
        return {name: value.detach().cpu().clone() for name, value in state.items() if isinstance(value, Tensor)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every trial."""
        return {str(number): trial.state_dict() for number, trial in self._trials.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, and drop the trials that are not in the state."""
        for number in [number for number in self._trials if str(number) not in state]:
            self.drop(number)
        for number, trial in self._trials.items():
            trial.load_state_dict(state[str(number)])
            self._epoch = trial.epoch


class PlainTrial:
    """One trial, trained by a plain PyTorch loop."""

    def __init__(
        self, config: TrialConfig, workload: Workload, *, device: torch.device, dtype: torch.dtype, seeded: bool
    ) -> None:
        self.config = config
        self.seeded = seeded
        self.workload = workload
        self.device = device
        self.epoch = 0
        self.step = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "weights"))
            self.model = workload.build_model().to(device, dtype)
        for kernel in (p for p in self.model.parameters() if config.channels_last and p.ndim == 4):
            kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        patterns = {name: group.pattern for name, group in config.param_groups.items()}
        groups, problems = assign_groups(parameters, patterns)
        assert not problems, problems
        for name, group in config.param_groups.items():
            for parameter in groups[name]:
                parameters[parameter].requires_grad_(group.lr_ratio != 0)
        self.trained = [p for p in parameters.values() if p.requires_grad]
        self.groups = {group: [(name, parameters[name]) for name in names] for group, names in groups.items()}
        self.record = Record()
        self.pooling = Pooling(device, channels_last=config.channels_last)

    @functools.cached_property
    def strategy(self) -> Strategy:
        """The optimizer and the schedule; built in the first epoch, where an exception fails this trial alone."""
        return Strategy(
            self.config,
            self.groups,
            steps_per_epoch=math.ceil(len(self.workload.train) / self.config.batch_size),
            directions=self.workload.directions,
            hidden_matrices=hidden_matrices(self.model),
        )

    def begin_epoch(self) -> None:
        """Begin an epoch: clear the record."""
        self.record = Record()
        self.model.train()

    def train_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Update the parameters on one batch."""
        record = self.record
        record.rates.append(self.strategy.learning_rates())
        self.strategy.zero_grad()
        with seeded_step(self.seeded, self.device, self.config.seed, "step", self.epoch, len(record.sizes)):
            with autocast(self.config, self.device), self.pooling():
                loss = self.workload.loss(self.model(inputs), targets)
            loss.backward()
        if self.config.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, self.config.clip_grad_norm)
        self.strategy.step()
        record.losses.append(loss.detach())
        record.sizes.append(len(inputs))

    @torch.no_grad()
    def evaluate_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Record the model's outputs for one batch of a split."""
        record = self.record
        self.model.eval()
        with (
            seeded_step(self.seeded, self.device, self.config.seed, "evaluation", self.epoch, len(record.outputs)),
            autocast(self.config, self.device),
            self.pooling(),
        ):
            record.outputs.append(self.model(inputs))
        record.targets.append(targets)

    def end_epoch(self) -> EpochMetrics:
        """Return the epoch's metrics, and step a schedule that moves every epoch."""
        record = self.record
        first = self.step + 1
        self.step += len(record.sizes)
        self.epoch += 1
        losses = torch.stack(record.losses).tolist()
        metrics = {"train/loss": mean_loss(losses, record.sizes), **self.evaluated("val")}
        diverged = why_diverged(losses, metrics, first_step=first, epoch=self.epoch)
        if diverged is None:
            self.strategy.end_epoch(metrics)
        points = {name: [(first + n, r[name]) for n, r in enumerate(record.rates)] for name in record.rates[0]}
        lr = {name: tuple(rates if self.strategy.per_step else rates[-1:]) for name, rates in points.items()}
        self.record = Record()
        placement = Placement(trainer="plain", threads=torch.get_num_threads())
        return EpochMetrics(
            epoch=self.epoch, step=self.step, metrics=metrics, lr=lr, placement=placement, diverged=diverged
        )

    @torch.no_grad()
    def evaluated(self, name: str) -> dict[str, float]:
        """Return the loss and every metric on the recorded outputs of a split, named after the split."""
        outputs, targets = torch.cat(self.record.outputs), torch.cat(self.record.targets)
        outputs = outputs.float() if outputs.dtype == torch.bfloat16 else outputs
        values = {f"{name}/loss": float(self.workload.loss(outputs, targets))}
        finite = bool(torch.isfinite(outputs).all())  # a metric may raise on the outputs of a diverged model
        for metric, measure in self.workload.metrics.items():
            values[f"{name}/{metric}"] = float(measure.function(outputs, targets)) if finite else math.nan
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next epoch depends on."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())},
            "strategy": self.strategy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that a trial of the same config returned."""
        self.epoch, self.step = state["epoch"], state["step"]
        tensors = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())}
        check_shapes(tensors, state["model"])
        for name, value in tensors.items():
            value.data.copy_(state["model"][name])  # unlike `load_state_dict`, also into non-persistent buffers
        self.strategy.load_state_dict(state["strategy"])
