"""A strategy as one sentence: `AdamW, base rate 1.07e-2, × 0.70 every 8 epochs, head at 1.84 ×`."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.errors import counted
from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import Optimizer, optimizer_class
from pipeline.space.own_code import is_own, short_name
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import (
    Constant,
    Cosine,
    CosineWarmRestarts,
    Cyclic,
    Exponential,
    Linear,
    MultiStep,
    OneCycle,
    Plateau,
    Polynomial,
    Scheduler,
    Step,
)


def strategy_sentence(config: TrialConfig) -> str:
    """Return a strategy in words, for a heading."""
    optimizer = optimizer_words(config.optimizer)
    parts = [optimizer, f"base rate {rate_text(config.optimizer.base_lr)}", schedule_words(config.scheduler)]
    groups = [words for name, group in config.param_groups.items() for words in _group_words(name, group)]
    return ", ".join([*parts, *groups, *_setting_words(config)])


def optimizer_words(optimizer: Optimizer) -> str:
    """Return an optimizer's name as PyTorch writes it, with its momentum: `SGD with momentum 0.9`."""
    momentum = getattr(optimizer, "momentum", 0)
    nesterov = "Nesterov " if getattr(optimizer, "nesterov", False) else ""
    return optimizer_title(optimizer.name) + (f" with {nesterov}momentum {momentum:.3g}" if momentum else "")


def optimizer_title(name: str) -> str:
    """Return how PyTorch writes the name of an optimizer in a file: `AdamW` for `adamw`."""
    return short_name(name) if is_own(name) else optimizer_class(name).torch_class.rpartition(".")[2]


def schedule_words(schedule: Scheduler) -> str:
    """Return a schedule in words, with its warm-up: `× 0.70 every 8 epochs, after 2 epochs of warm-up`."""
    warmup = getattr(schedule, "warmup", 0)
    return _shape(schedule) + (f", after {counted(warmup, schedule.interval)} of warm-up" if warmup else "")


def rate_text(rate: float) -> str:
    """Return a learning rate with three digits: `1.07e-2`, `0.371`."""
    rate = float(f"{rate:.2e}")
    if rate == 0 or 0.1 <= rate < 1e4:
        return f"{rate:.3g}"
    digits, _, exponent = f"{rate:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def _shape(schedule: Scheduler) -> str:
    unit = schedule.interval
    match schedule:
        case Constant():
            return "constant"
        case Step(step_size=size, gamma=gamma):
            return f"× {_factor(gamma)} {_every(size, unit)}"
        case MultiStep(milestones=milestones, gamma=gamma):
            return f"× {_factor(gamma)} after {unit} {' and '.join(map(str, milestones))}"
        case Exponential(gamma=gamma):
            return f"× {gamma:.3g} every {unit}"
        case Polynomial(total_iters=total, power=power):
            return f"polynomial of power {power:.3g} to 0{_over(total, unit)}"
        case Cosine(T_max=total, eta_min=low):
            return f"cosine to {rate_text(low)}{_over(total, unit)}"
        case CosineWarmRestarts(T_0=period, T_mult=factor):
            longer = f", each period × {factor}" if factor != 1 else ""
            return f"cosine that restarts {_every(period, unit)}{longer}"
        case Linear(start_factor=start, end_factor=end, total_iters=total):
            return f"linear from × {start:.3g} to × {end:.3g}{_over(total, unit)}"
        case OneCycle(pct_start=share):
            return f"one cycle with its peak after {100 * share:.3g} % of the run"
        case Cyclic(max_lr_ratio=ratio, step_size_up=up):
            return f"cycles up to × {ratio:.3g}, rising over {counted(up, unit)}"
        case Plateau(metric=metric, factor=factor, patience=patience):
            return f"× {_factor(factor)} when {metric} has not improved for over {counted(patience, unit)}"
    return str(schedule)


def _factor(factor: float) -> str:
    return f"{factor:.2f}" if factor >= 0.1 else f"{factor:.2g}"


def _every(count: int, unit: str) -> str:
    return f"every {unit}" if count == 1 else f"every {counted(count, unit)}"


def _over(total: int | None, unit: str) -> str:
    return " by the end" if total is None else f" over {counted(total, unit)}"


def _group_words(name: str, group: ParamGroup) -> Iterator[str]:
    if group.lr_ratio == 0:
        yield f"{name} frozen"
    elif group.lr_ratio != 1:
        yield f"{name} at {group.lr_ratio:.3g} ×"
    if group.layers is not None and group.layer_decay is not None and group.layer_decay != 1:
        yield f"each layer of {name} at {group.layer_decay:.3g} × the next"


def _setting_words(config: TrialConfig) -> Iterator[str]:
    if config.clip_grad_norm is not None:
        yield f"gradients clipped at {config.clip_grad_norm:.3g}"
