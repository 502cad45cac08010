"""Train a loop of one's own: run its generator function epoch by epoch, as one plain trial."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pipeline.errors import InvalidInput, PipelineError, Problem, counted, first_line, listed
from pipeline.files.code import where
from pipeline.space.config import TrialConfig, derive_seed
from pipeline.space.placement import Placement
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import trial_error
from pipeline.training.epoch import rate_points
from pipeline.training.optim import ModelStrategy
from pipeline.workloads.loop import Epochs, Loop, Strategy, Trial, check_metric_name
from pipeline.workloads.random_state import seed_global, seed_host, seeded
from pipeline.workloads.workload import Direction


@dataclass(frozen=True)
class Asked:
    """What a loop gave when it asked for its strategy."""

    model: nn.Module
    steps_per_epoch: int
    metrics: Mapping[str, Direction]


def ask(loop: Loop, config: TrialConfig, *, device: torch.device) -> Asked:
    """Run a loop up to the point where it asks for its strategy, and return what it gave.

    Raises:
        InvalidInput: The loop raises, ends or yields before.
    """
    trial = _DryTrial(config, device=device)
    problem = f"{loop.name} must ask trial.strategy(model, steps_per_epoch=…) for its optimizer before it"
    try:
        with seeded(derive_seed(config.seed, "weights"), device):
            next(loop.function(trial, **loop.arguments))
        problem += " yields"
    except _StrategyAsked as stop:
        return stop.asked
    except StopIteration:
        problem += " ends"
    except (Exception, SystemExit) as error:
        problem = f"{loop.name} raised {where(error)}"
    raise InvalidInput("workload", [Problem("workload.function", problem)])


class _StrategyAsked(BaseException):
    """Ends a dry run; no `Exception`, so that a loop's `except Exception` does not catch it."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked


class _DryTrial(Trial):
    """A trial whose loop ends where it asks for its strategy."""

    def epochs(self, keep: Sequence[Any] | None = None) -> Iterator[int]:
        raise RuntimeError("trial.epochs comes after trial.strategy(model, steps_per_epoch=…)")

    def _build(self, model: nn.Module, steps_per_epoch: int, metrics: Mapping[str, Direction]) -> NoReturn:
        raise _StrategyAsked(Asked(model, steps_per_epoch, metrics))


class LoopTrial:
    """A group of one trial that a loop trains; see `TrialGroup` for the contract.

    Args:
        configs: Number and config of the trial.
        loop: The loop.
        device: Where it trains.
    """

    plain = True
    """Whether each trial trains by itself."""

    def __init__(self, configs: Mapping[int, TrialConfig], loop: Loop, *, device: torch.device) -> None:
        ((self._number, self._config),) = configs.items()
        self.configs = dict(configs)
        self._loop = loop
        self._device = device
        self._epoch = 0
        self._epochs_to_repeat = 0
        self._saved: Mapping[str, Any] | None = None
        """A loaded state, until the next epoch begins."""
        self._trial: _RunningTrial | None = None
        self._generator: Epochs | None = None

    def train_epoch(self, *, average: bool = False) -> dict[int, EpochMetrics]:
        """Run the loop up to its next metrics, which are never averaged; a trial that did not finish leaves."""
        try:
            self._repeat_epochs()
            metrics = self._next_epoch()
        except (Exception, SystemExit) as raised:
            reason = where(raised)
            error = trial_error(raised)
            if isinstance(error, torch.OutOfMemoryError):
                raise error from None
            metrics = EpochMetrics(epoch=self._epoch, step=0, metrics={}, lr={}, failed=reason)
        if not metrics.finished:
            self.drop(self._number)
        elif self._epoch == self._config.epochs:
            self._close()
        return {self._number: metrics}

    def drop(self, number: int) -> None:
        """Stop training the trial: close its loop, where `finally` blocks run."""
        self.configs = {}
        self._close()

    def test(self) -> dict[int, dict[str, float]]:
        """Return no metrics: a loop has no test split."""
        return {number: {} for number in self.configs}

    def model_state(self, number: int) -> dict[str, Tensor]:
        """Return parameters and buffers of the strategy's model by name, on the CPU."""
        self._repeat_epochs()
        if self._saved is not None:
            state = self._saved["kept"][0]
        elif self._trial is not None:
            state = self._trial.asked.model.state_dict()
        else:
            state = ask(self._loop, self._config, device=self._device).model.state_dict()
        return {name: value.detach().cpu().clone() for name, value in state.items() if isinstance(value, Tensor)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of what the loop keeps, or the number of epochs to train again."""
        return {str(number): self._state() for number in self.configs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the loop begins in the next epoch."""
        self._close()
        self._trial = None
        if str(self._number) not in state:
            self.configs = {}
            return
        saved = state[str(self._number)]
        if "kept" in saved:
            self._saved, self._epoch, self._epochs_to_repeat = saved, saved["epoch"], 0
        else:
            self._saved, self._epoch, self._epochs_to_repeat = None, 0, saved["epoch"]

    def _state(self) -> Mapping[str, Any]:
        if self._saved is not None:
            return self._saved
        if self._trial is None or self._trial.kept is None:
            return {"epoch": self._epoch + self._epochs_to_repeat}
        kept = [thing.state_dict() for thing in self._trial.kept]
        return {"epoch": self._epoch, "strategy": self._trial.built.state_dict(), "kept": kept}

    def _repeat_epochs(self) -> None:
        """Train the epochs of a loaded state again, from the beginning, to get at the state that was not kept."""
        epochs, self._epochs_to_repeat = self._epochs_to_repeat, 0
        for _ in range(epochs):
            self._next_epoch()

    def _next_epoch(self) -> EpochMetrics:
        if self._trial is None or self._generator is None:
            self._trial = _RunningTrial(self._config, device=self._device, saved=self._saved)
            self._generator = self._loop.function(self._trial, **self._loop.arguments)
            self._saved = None
        with torch.enable_grad(), seeded(derive_seed(self._config.seed, "weights"), self._device):
            try:
                yielded = next(self._generator)
            except StopIteration:
                epochs = f"{self._epoch} of its {counted(self._config.epochs, 'epoch')}"
                raise RuntimeError(f"{self._loop.name} ended after {epochs}") from None
        rates = self._trial.rates_of(self._epoch)
        metrics = _numbers(yielded, wanted=self._trial.asked.metrics)
        first_step = self._epoch * len(rates) + 1
        self._epoch += 1
        strategy = self._trial.built
        diverged = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
        if diverged is None:
            strategy.advance(metrics)
        return EpochMetrics(
            epoch=self._epoch,
            step=self._epoch * len(rates),
            metrics=metrics,
            lr=rate_points(rates, first_step=first_step, per_step=strategy.per_step),
            placement=Placement(trainer="plain", threads=torch.get_num_threads()),
            diverged=diverged and f"{diverged} became {metrics[diverged]} after epoch {self._epoch}",
        )

    def _close(self) -> None:
        """Close the generator; a trial's results stand, whatever its loop raises then."""
        generator, self._generator = self._generator, None
        if generator is None:
            return
        try:
            generator.close()
        except (Exception, SystemExit) as error:
            warnings.warn(f"{self._loop.name} raised when it was closed: {where(error)}", stacklevel=2)


class _RunningTrial(Trial):
    """A trial while its loop trains.

    Args:
        config: The trial's config.
        device: Where it trains.
        saved: A state to continue from.
    """

    def __init__(self, config: TrialConfig, *, device: torch.device, saved: Mapping[str, Any] | None) -> None:
        super().__init__(config, device=device)
        self.kept: list[Any] | None = None
        """The strategy's model and what else the loop keeps; None if the trial must begin anew."""
        self._saved = saved
        self._epoch: int | None = None

    def epochs(self, keep: Sequence[Any] | None = None) -> Iterator[int]:
        if not self._asked:
            raise RuntimeError("trial.epochs comes after trial.strategy(model, steps_per_epoch=…)")
        if self._epoch is not None:
            raise RuntimeError("trial.epochs was asked for a second time")
        if keep is not None:
            known = (self.asked.model, self.built)
            self.kept = [self.asked.model, *(thing for thing in keep if all(thing is not other for other in known))]
            for thing in self.kept:
                _check_kept(thing)
        first = 0 if self._saved is None else self._restore(self._saved)
        for epoch in range(first, self.config.epochs):
            self._epoch = epoch
            seed = derive_seed(self.config.seed, "epoch", epoch)
            seed_host(seed)
            seed_global(seed, self.device)
            yield epoch

    def rates_of(self, epoch: int) -> list[dict[str, float]]:
        """Return the learning rates of each step of an epoch that has just yielded, and forget them.

        Raises:
            RuntimeError: The loop made another number of steps than it said, or yielded out of turn.
        """
        if not self._asked:
            raise RuntimeError("the loop yielded before it asked trial.strategy(model, steps_per_epoch=…)")
        if self._epoch != epoch:
            raise RuntimeError("the loop must yield once in each epoch of `for epoch in trial.epochs(…)`")
        rates, self.built.rates = self.built.rates, []
        if len(rates) != (steps := self.asked.steps_per_epoch):
            made = f"strategy.step() was called {counted(len(rates), 'time')} in epoch {epoch + 1}"
            raise RuntimeError(f"{made}, and steps_per_epoch says {steps}")
        return rates

    def _build(self, model: nn.Module, steps_per_epoch: int, metrics: Mapping[str, Direction]) -> Strategy:
        self.asked = Asked(model, steps_per_epoch, dict(metrics))
        self.built = LoopStrategy(self.config, model, steps_per_epoch=steps_per_epoch, directions=metrics)
        return self.built

    def _restore(self, saved: Mapping[str, Any]) -> int:
        """Restore a saved state, and return the number of its epochs.

        Raises:
            PipelineError: The state does not fit, since the loop has changed.
        """
        try:
            things = self.kept or []
            if len(things) != len(saved["kept"]):
                raise ValueError(f"it keeps {len(things)} things, and kept {len(saved['kept'])}")
            for thing, state in zip(things, saved["kept"], strict=True):
                thing.load_state_dict(state)
            self.built.load_state_dict(saved["strategy"])
        except Exception as error:
            remedy = "if the loop has changed, change it back; or begin another --study"
            raise PipelineError(f"a checkpoint does not fit the loop: {first_line(error)}; {remedy}") from error
        return int(saved["epoch"])


class LoopStrategy(ModelStrategy):
    """A model's strategy that records the learning rates of each step."""

    def __init__(
        self, config: TrialConfig, model: nn.Module, *, steps_per_epoch: int, directions: Mapping[str, str]
    ) -> None:
        super().__init__(config, model, steps_per_epoch=steps_per_epoch, directions=directions)
        self.rates: list[dict[str, float]] = []
        """Group name to learning rate of each step of the epoch."""
        self._steps_per_epoch = steps_per_epoch

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Record the learning rates, and step.

        Raises:
            RuntimeError: The epoch has had all of its steps.
        """
        if len(self.rates) == self._steps_per_epoch:
            steps = counted(self._steps_per_epoch, "time")
            raise RuntimeError(f"strategy.step() was called more often in an epoch than the {steps} of steps_per_epoch")
        self.rates.append(self.learning_rates())
        return super().step(closure)

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Refuse to end an epoch, since the loop's yield does."""
        raise RuntimeError("a loop's schedule moves as the loop yields; leave strategy.end_epoch to scripts without it")

    def advance(self, metrics: Mapping[str, float]) -> None:
        """Step the schedule if the schedule moves every epoch."""
        super().end_epoch(metrics)


def _numbers(yielded: Any, *, wanted: Mapping[str, Direction]) -> dict[str, float]:
    """Return the metrics that a loop yielded, as floats.

    Raises:
        TypeError: They are no mapping from names to numbers.
        ValueError: A name is none, or one of `wanted` is missing.
    """
    if not isinstance(yielded, Mapping):
        raise TypeError(f"the loop must yield a dict such as {{'val/loss': 0.5}}, got {type(yielded).__name__}")
    metrics: dict[str, float] = {}
    for name, value in yielded.items():
        check_metric_name(name)
        if not isinstance(value, numbers.Real) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise TypeError(f"the loop must yield numbers, got {type(value).__name__} for {name}")
        metrics[name] = float(value)
    if missing := [name for name in wanted if name not in metrics]:
        known = f"it yielded {listed(list(metrics)) or 'nothing'}"
        remedy = "yield it, or name other metrics in trial.strategy(…, metrics={…})"
        raise ValueError(f"the loop must yield {missing[0]} in each epoch; {known}; {remedy}")
    return metrics


def _check_kept(thing: Any) -> None:
    """Check that a checkpoint can hold a thing's state.

    Raises:
        TypeError: The thing has no state, or one of other values than tensors, numbers and texts.
    """
    kind = type(thing).__name__
    if not all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict")):
        raise TypeError(f"trial.epochs(keep=…) takes things with state_dict and load_state_dict, got {kind}")
    for value in _values(thing.state_dict()):
        if not isinstance(value, Tensor | int | float | str | bytes | None):
            shown = type(value).__name__
            raise TypeError(f"a checkpoint holds tensors, numbers and texts, and the state of {kind} has a {shown}")


def _values(state: Any) -> Iterator[Any]:
    if isinstance(state, Mapping):
        state = list(state.values())
    if isinstance(state, list | tuple | set):
        for value in state:
            yield from _values(value)
    else:
        yield state
