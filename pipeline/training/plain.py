"""The reference trainer: one `nn.Module`, one torch optimizer and one torch scheduler per trial."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import OwnOptimizer
from pipeline.space.placement import Placement
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import Batches, copied, ended_by, train_epoch_of, trial_error
from pipeline.training.epoch import (
    Accumulation,
    Record,
    autocast,
    check_shapes,
    floats,
    loss_of,
    mean_loss,
    noted,
    rate_points,
    seeded_step,
    why_diverged,
    without_bf16,
)
from pipeline.training.evaluation import Evaluation, MeanWeights
from pipeline.training.optim import ModelStrategy
from pipeline.training.pooling import Pooling
from pipeline.workloads.build import built_model, run_model
from pipeline.workloads.data import epoch_length, evaluation_batches, training_batches
from pipeline.workloads.random_state import KINDS
from pipeline.workloads.trees import map_tensors
from pipeline.workloads.workload import Batch, Workload


class PlainTrials:
    """A group of plain trials; see `TrialGroup` for the contract.

    Args:
        configs: Trial number to config.
        workload: Data, model, loss and metrics; the data are on the device.
        device: Device of the data and the models.
        dtype: Type of parameters and floating-point data.
        draws: The libraries whose random states are seeded before each step, of `random_state.KINDS`; those that the
            model or the loss draws from.
        output_size: The count of numbers in the model's outputs for one sample.
        unsaved: Whether a model's state is more than parameters and buffers; a state then holds the number of epochs
            alone, and a trial continues by training these epochs again.
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
        draws: Collection[str] = KINDS,
        output_size: int = 0,
        unsaved: bool = False,
    ) -> None:
        self.configs = dict(configs)
        self._config = next(iter(configs.values()))
        self._epoch = 0
        self._device, self._dtype = device, dtype
        self._workload = workload
        draws = {*draws, "torch"}  # seeding torch costs little, and a model may draw later than the probe looked
        self._output_size = output_size
        self._unsaved = unsaved
        self._epochs_to_repeat = 0
        build = functools.partial(PlainTrial, workload=workload, device=device, dtype=dtype, draws=draws)
        self._trials = {number: build(config) for number, config in configs.items()}
        self._failed: dict[int, EpochMetrics] = {}

    def train_epoch(self, *, average: bool = False) -> dict[int, EpochMetrics]:
        """Train every trial for one epoch and evaluate it; a diverged or failed trial leaves the group."""
        return train_epoch_of(self, average=average)

    def training_batches(self) -> Batches:
        """Yield the training batches of the next epoch; see `Stepwise`."""
        return training_batches(self._workload, self._config, epoch=self._epoch, device=self._device, dtype=self._dtype)

    def evaluation_batches(self, name: str) -> Batches:
        """Yield the batches of a split."""
        return evaluation_batches(self._workload, name, self._config, dtype=self._dtype, output_size=self._output_size)

    def begin_epoch(self, *, average: bool = False) -> None:
        """Begin an epoch of every trial."""
        self.repeat_epochs()
        self._failed = {}
        self._each(lambda trial: trial.begin_epoch(average=average))

    def train_step(self, batch: Batch) -> None:
        """Update every trial on one batch."""
        # Copies, since a model may change a batch in place.
        self._each(lambda trial: trial.train_step(copied(batch)))

    def evaluate_step(self, batch: Batch) -> None:
        """Evaluate every trial on one batch."""
        self._each(lambda trial: trial.evaluate_step(batch))

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
            except (Exception, SystemExit) as raised:
                error = trial_error(raised)
                if isinstance(error, torch.OutOfMemoryError):  # which no trial causes alone
                    raise error from None
                self._failed[number] = ended_by(error, epoch=trial.epoch, step=trial.step)
                self.drop(number)
            else:
                if results is not None:
                    results[number] = value

    def drop(self, number: int) -> None:
        """Stop training a trial."""
        del self._trials[number], self.configs[number]

    def test(self) -> dict[int, dict[str, float]]:
        """Return each trial's `test/…` metrics."""
        self.repeat_epochs()
        for trial in self._trials.values():
            trial.begin_evaluation()
        for batch in self.evaluation_batches("test"):
            for trial in self._trials.values():
                trial.evaluate_step(batch)
        return {number: trial.evaluation.results("test")[0] for number, trial in self._trials.items()}

    def model_state(self, number: int) -> dict[str, Tensor]:
        """Return a trial's parameters and buffers by name, on the CPU."""
        self.repeat_epochs()
        trial = self._trials[number]
        with trial.averaged():
            state = trial.model.state_dict()
            return {name: value.detach().cpu().clone() for name, value in state.items() if isinstance(value, Tensor)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every trial."""
        if self._unsaved:
            return {str(number): {"epoch": self._epoch + self._epochs_to_repeat} for number in self._trials}
        return {str(number): trial.state_dict() for number, trial in self._trials.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, and drop the trials that are not in the state."""
        for number in [number for number in self._trials if str(number) not in state]:
            self.drop(number)
        for number, trial in self._trials.items():
            if self._unsaved:
                self._epochs_to_repeat = state[str(number)]["epoch"]
            else:
                trial.load_state_dict(state[str(number)])
                self._epoch = trial.epoch

    def repeat_epochs(self) -> None:
        """Train the epochs of a loaded state again, from the beginning, to get at the state that cannot be saved."""
        epochs, self._epochs_to_repeat = self._epochs_to_repeat, 0
        for _ in range(epochs):
            train_epoch_of(self)


class PlainTrial:
    """One trial, trained by a plain PyTorch loop."""

    def __init__(
        self,
        config: TrialConfig,
        workload: Workload,
        *,
        device: torch.device,
        dtype: torch.dtype,
        draws: Collection[str],
    ) -> None:
        self.config = config
        self.draws = draws
        self.workload = workload
        self.device = device
        self.epoch = 0
        self.step = 0
        self.model = built_model(workload, seed=config.seed, device=device, dtype=dtype)
        self.accumulation = Accumulation(config.accumulate, config.batch_size, epoch_length(workload, config.seed))
        self.averages: list[Tensor] = []
        """Averages of the trained parameters with `ema`; empty before the first step."""
        for kernel in (p for p in self.model.parameters() if config.channels_last and p.ndim == 4):
            kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
        self.record = Record()
        self.mean: MeanWeights | None = None
        """In an epoch after which trials are ranked."""
        self.begin_evaluation()
        self.pooling = Pooling(device, channels_last=config.channels_last)

    @functools.cached_property
    def strategy(self) -> ModelStrategy:
        """The optimizer and the schedule; built in the first epoch, where an exception fails this trial alone."""
        steps = self.accumulation.steps
        with self._seeded_update(0):
            return ModelStrategy(self.config, self.model, steps_per_epoch=steps, directions=self.workload.directions)

    def begin_epoch(self, *, average: bool) -> None:
        """Begin an epoch: clear the record."""
        self.record = Record()
        self.begin_evaluation()
        averages = average and self.config.ema is None  # with `ema` the metrics are of averages anyway
        self.mean = MeanWeights(Evaluation(self.workload, rows=1)) if averages else None
        self.model.train()

    def begin_evaluation(self) -> None:
        """Begin to evaluate a split."""
        self.evaluation = Evaluation(self.workload, rows=1)

    def train_step(self, batch: Batch) -> None:
        """Update the parameters on one batch."""
        record = self.record
        number = len(record.sizes)
        if self.accumulation.begins(number):
            record.rates.append(self.strategy.learning_rates())
            self.strategy.zero_grad()
        with seeded_step(self.draws, self.device, self.config.seed, "step", self.epoch, number):
            with autocast(self.config, self.device), self.pooling():
                loss = self._loss(run_model(self.model, batch.inputs), batch)
            (loss if self.config.accumulate == 1 else loss * self.accumulation.share(number)).backward()
        if self.accumulation.ends(number):
            self._step()
        record.losses.append(noted(loss.detach()))
        record.sizes.append(batch.size)

    def _step(self) -> None:
        with self._seeded_update(self.step + len(self.record.rates)):
            self.strategy.step()
        trained = self.strategy.trained
        if self.mean is not None:
            self.mean.add([parameter.detach() for parameter in trained])
        if self.config.ema is None:
            return
        if self.averages:
            for average, parameter in zip(self.averages, trained, strict=True):
                average.lerp_(parameter.detach(), 1 - self.config.ema)
        else:
            self.averages = [parameter.detach().clone() for parameter in trained]

    def _seeded_update(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Return a context that seeds an update of an optimizer of a person's own, which may draw random numbers."""
        kinds = KINDS if isinstance(self.config.optimizer, OwnOptimizer) else ()
        return seeded_step(kinds, self.device, self.config.seed, "update", step)

    @contextlib.contextmanager
    def averaged(self, averages: Sequence[Tensor] | None = None) -> Iterator[None]:
        """Put averages, those of `ema` if there are no others, in the place of the trained parameters in the block."""
        averages = self.averages if averages is None else averages
        trained = self.strategy.trained if averages else []
        last = [parameter.data for parameter in trained]
        for parameter, average in zip(trained, averages, strict=True):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, value in zip(trained, last, strict=True):
                parameter.data = value

    @torch.no_grad()
    def evaluate_step(self, batch: Batch) -> None:
        """Evaluate one batch of a split."""
        if self.mean is not None:
            with self.averaged(self.mean.weights):
                self._evaluate(copied(batch), self.mean.evaluation)
        with self.averaged():
            self._evaluate(batch, self.evaluation)

    def _evaluate(self, batch: Batch, evaluation: Evaluation) -> None:
        self.model.eval()
        with seeded_step(self.draws, self.device, self.config.seed, "evaluation", self.epoch, evaluation.batches):
            with autocast(self.config, self.device), self.pooling():
                outputs = run_model(self.model, batch.inputs)
            outputs = without_bf16(outputs)
            loss = self._loss(outputs, batch)
            row = map_tensors(lambda tensor: tensor.unsqueeze(0), outputs) if evaluation.needs_outputs else None
            evaluation.add(loss.unsqueeze(0), row, batch.targets, size=batch.size)

    def _loss(self, outputs: Any, batch: Batch) -> Tensor:
        return loss_of(self.workload.loss, outputs, batch.targets, step=self.step + len(self.record.rates) - 1)

    def end_epoch(self) -> EpochMetrics:
        """Return the epoch's metrics, and step a schedule that moves every epoch."""
        record = self.record
        first = self.step + 1
        self.step += len(record.rates)
        self.epoch += 1
        losses = floats(record.losses)
        metrics = {"train/loss": mean_loss(losses, record.sizes), **self.evaluation.results("val")[0]}
        accumulate = self.config.accumulate
        diverged = why_diverged(losses, metrics, first_step=first, accumulate=accumulate, epoch=self.epoch)
        self.strategy.zero_grad()  # gradients would take memory while the other trials of the group train
        if diverged is None:
            self.strategy.end_epoch(metrics)
        averaged = {} if self.mean is None else self.mean.evaluation.results("val")[0]
        lr = rate_points(record.rates, first_step=first, per_step=self.strategy.per_step)
        self.record, self.mean = Record(), None
        placement = Placement(trainer="plain", threads=torch.get_num_threads())
        return EpochMetrics(
            epoch=self.epoch,
            step=self.step,
            metrics=metrics,
            averaged=averaged,
            lr=lr,
            placement=placement,
            diverged=diverged,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next epoch depends on."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())},
            "averages": list(self.averages),
            "strategy": self.strategy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that a trial of the same config returned."""
        self.epoch, self.step = state["epoch"], state["step"]
        tensors = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())}
        check_shapes(tensors, state["model"])
        for name, value in tensors.items():
            value.data.copy_(state["model"][name])  # unlike `load_state_dict`, also into non-persistent buffers
        self.averages = [average.to(self.device, copy=True) for average in state["averages"]]
        self.strategy.load_state_dict(state["strategy"])
