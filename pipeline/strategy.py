"""Build the optimizer and the schedule of a config for a script of one's own, such as of best.yaml.

    strategy = build("best.yaml", model, steps_per_epoch=len(loader))
    for epoch in range(strategy.config.epochs):
        for inputs, targets in loader:
            strategy.zero_grad()
            loss_of(model(inputs), targets).backward()
            strategy.step()
        strategy.end_epoch({"val/loss": …})

The config's workload is not loaded. Its precision, `accumulate` and `ema` are the script's to carry out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InvalidInput, Problem, did_you_mean
from pipeline.space.config import TrialConfig
from pipeline.space.load import load_config, with_layers, with_steps_per_epoch
from pipeline.space.rules import length_problems
from pipeline.training.optim import ModelStrategy
from pipeline.workloads.loop import VAL_LOSS

if TYPE_CHECKING:
    from torch import nn

    from pipeline.workloads.workload import Direction


def build(
    config: Path | str | TrialConfig,
    model: nn.Module,
    *,
    steps_per_epoch: int,
    metrics: Mapping[str, Direction] = VAL_LOSS,
) -> ModelStrategy:
    """Build a config's strategy for a model, whose frozen parameters no longer require gradients.

    Args:
        config: A config, or the path of its file.
        model: Its parameters' names are matched with the config's patterns.
        steps_per_epoch: Calls of `strategy.step()` in each epoch.
        metrics: Name to "minimize" or "maximize" of what `strategy.end_epoch` gets, among them the metric that
            ReduceLROnPlateau reads.

    Raises:
        InvalidInput: With every problem of the file, or the config does not fit the model, the steps or the metrics.
    """
    if problems := list(_misfits(model, steps_per_epoch, metrics)):
        raise InvalidInput("build", problems)
    if not isinstance(config, TrialConfig):
        config = _read(Path(config), model, steps_per_epoch)
    metric = getattr(config.scheduler, "metric", None)
    if metric is not None and metric not in metrics:
        message = f"unknown metric {metric!r}; {did_you_mean(metric, metrics)}; see the argument metrics"
        raise InvalidInput("build", [Problem("scheduler.plateau.metric", message)])
    return ModelStrategy(config, model, steps_per_epoch=steps_per_epoch, directions=metrics)


def _misfits(model: Any, steps_per_epoch: Any, metrics: Any) -> Iterator[Problem]:
    """Yield a problem for each argument of another kind."""
    if not hasattr(model, "named_parameters"):
        yield Problem("model", f"must be a torch.nn.Module, got {type(model).__name__}; give the model itself")
    if type(steps_per_epoch) is not int or steps_per_epoch < 1:
        yield Problem("steps_per_epoch", f"must be a whole number of at least 1, got {steps_per_epoch!r}")
    if not isinstance(metrics, Mapping):
        shown = "{'val/loss': 'minimize'}"
        yield Problem("metrics", f"must be a mapping such as {shown}, got {type(metrics).__name__}")


def _read(path: Path, model: nn.Module, steps_per_epoch: int) -> TrialConfig:
    space = with_layers(load_config(path)[0], [name for name, p in model.named_parameters() if p.requires_grad])
    space = with_steps_per_epoch(space, dict.fromkeys(space.batch_sizes, steps_per_epoch))
    problems = [p for name in space.schedulers for p in length_problems(space, name, steps_per_epoch=steps_per_epoch)]
    if problems:
        raise InvalidInput(str(path), problems)
    return space.example()
