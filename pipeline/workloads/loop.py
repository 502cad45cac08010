"""The contract of training loops of one's own: a generator function that gets a `Trial` and yields metrics.

    def my_loop(trial: Trial) -> Epochs:
        model = …
        strategy = trial.strategy(model, steps_per_epoch=100)
        for epoch in trial.epochs(keep=[model]):
            …
            yield {"train/loss": …, "val/loss": …}

Until the loop ends, the global random states of torch, Python and NumPy are seeded: before the first line of the
function, and before each epoch, with numbers that follow from the config's seed and the epoch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, get_args

import torch
from torch import nn

from pipeline.space.config import TrialConfig
from pipeline.workloads.workload import Direction

Epochs = Generator[Mapping[str, Any], None, None]
"""The metrics of each epoch, name to number, such as {"train/loss": 0.7, "val/loss": 0.9}."""
VAL_LOSS: Mapping[str, Direction] = MappingProxyType({"val/loss": "minimize"})
METRIC_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
"""Names that MLflow takes."""


class Strategy(Protocol):
    """The searched optimizer and schedule, in place of a torch optimizer and scheduler."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model's trained parameters."""
        ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip the gradients if the config says so, update the parameters once, and step a schedule of steps.

        Args:
            closure: Computes the loss and its gradients, for optimizers that need several evaluations.
        """
        ...

    def learning_rates(self) -> dict[str, float]:
        """Return group name to the learning rate of the next update."""
        ...


class Trial:
    """One trial, as a training loop sees it.

    Args:
        config: Everything that the search chose; read only.
        device: Where to train.
    """

    def __init__(self, config: TrialConfig, *, device: torch.device) -> None:
        self.config = config
        self.device = device
        self._asked = False

    @property
    def seed(self) -> int:
        """The seed of the search, the same for every trial."""
        return self.config.seed

    @property
    def batch_size(self) -> int:
        """Samples per optimizer step, as the space says."""
        return self.config.batch_size

    def strategy(
        self, model: nn.Module, *, steps_per_epoch: int, metrics: Mapping[str, Direction] = VAL_LOSS
    ) -> Strategy:
        """Return the searched optimizer of a model, with its parameter groups and its schedule; once per trial.

        The groups' patterns are matched with `model.named_parameters()`; parameters of frozen groups no longer require
        gradients. Before a search begins, the loop is run up to this call, to check the space with what is given here.

        Args:
            model: The model whose learning rates are searched. Other models, and their optimizers, are the loop's own.
            steps_per_epoch: Calls of `strategy.step()` in each epoch; schedules count them.
            metrics: Name to "minimize" or "maximize" of the metrics that each epoch yields, among them the space's
                objective. An epoch may yield others too, which are recorded.
        """
        if self._asked:
            raise RuntimeError("trial.strategy was asked for a second time; give other models optimizers of torch")
        if not isinstance(model, nn.Module):
            raise TypeError(f"trial.strategy takes a torch.nn.Module, got {type(model).__name__}")
        if type(steps_per_epoch) is not int or steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be a whole number of at least 1, got {steps_per_epoch!r}")
        if not isinstance(metrics, Mapping):
            shown = "{'val/reward': 'maximize'}"
            raise TypeError(f"metrics must be a mapping such as {shown}, got {type(metrics).__name__}")
        for name, direction in metrics.items():
            check_metric_name(name)
            if direction not in get_args(Direction):
                raise ValueError(f'metrics[{name!r}] must be "minimize" or "maximize", got {direction!r}')
        self._asked = True
        return self._build(model, steps_per_epoch, metrics)

    def epochs(self, keep: Sequence[Any] | None = None) -> Iterator[int]:
        """Yield the epochs to train, counted from 0; after a kill, those that are left.

        Args:
            keep: Whatever the next epoch depends on and that has `state_dict` and `load_state_dict`: models,
                optimizers, schedulers. After a kill their state is restored before the first epoch; that of the
                strategy and its model always is. None: such a trial trains again from the beginning.
        """
        raise NotImplementedError

    def _build(self, model: nn.Module, steps_per_epoch: int, metrics: Mapping[str, Direction]) -> Strategy:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A training loop of one's own, in place of a `Workload`."""

    name: str
    """Name for people."""
    function: Callable[..., Epochs]
    """A generator function that takes a `Trial`."""
    arguments: Mapping[str, Any]
    """Keyword arguments of the function."""
    directions: Mapping[str, Direction] = field(default_factory=lambda: VAL_LOSS)
    """The direction in which each metric of an epoch is better; known once the loop has asked for its strategy."""
    test: ClassVar[None] = None
    """A loop has no test split."""


def check_metric_name(name: Any) -> None:
    """Check the name of a metric.

    Raises:
        ValueError: MLflow would not take the name, or it is one of a learning rate.
    """
    if not isinstance(name, str) or not METRIC_NAME.fullmatch(name) or name.startswith("lr/"):
        raise ValueError(
            f"a metric needs a name such as 'val/loss', of letters, digits, '_', '-' and '.', got {name!r}"
        )
