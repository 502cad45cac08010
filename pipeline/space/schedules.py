"""Every learning-rate schedule, with its hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pipeline.space.limits import Count, Fraction, Gamma, Interval, NonNegative, Positive, by_name


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """What every schedule has."""

    name: ClassVar[str]
    interval: Literal["epoch", "step"] = "epoch"
    """The unit of every count below: the schedule moves after each epoch, or after each optimizer step."""


@dataclass(frozen=True, kw_only=True)
class WarmedScheduler(Scheduler):
    """A schedule that a linear warm-up may precede: `SequentialLR` of `LinearLR` and the schedule."""

    warmup: Annotated[int, Interval(ge=0)] = 0
    """Length of the warm-up in `interval` units; 0 for none. The schedule's own counts begin after it."""
    warmup_start_factor: Gamma = 0.1
    """Multiple of the rate at which the warm-up starts."""


@dataclass(frozen=True, kw_only=True)
class Constant(WarmedScheduler):
    """The rate stays."""

    name: ClassVar[str] = "constant"


@dataclass(frozen=True, kw_only=True)
class Step(WarmedScheduler):
    """`StepLR`: times `gamma` every `step_size`."""

    name: ClassVar[str] = "step"
    step_size: Count
    gamma: Gamma = 0.1


@dataclass(frozen=True, kw_only=True)
class MultiStep(WarmedScheduler):
    """`MultiStepLR`: times `gamma` at each milestone."""

    name: ClassVar[str] = "multistep"
    milestones: tuple[Count, ...]
    gamma: Gamma = 0.1


@dataclass(frozen=True, kw_only=True)
class Exponential(WarmedScheduler):
    """`ExponentialLR`: times `gamma` every time."""

    name: ClassVar[str] = "exponential"
    gamma: Gamma


@dataclass(frozen=True, kw_only=True)
class Polynomial(WarmedScheduler):
    """`PolynomialLR`: to 0 over `total_iters`."""

    name: ClassVar[str] = "polynomial"
    total_iters: Count | None = None
    """None: to the end of the run."""
    power: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine(WarmedScheduler):
    """`CosineAnnealingLR`, https://arxiv.org/abs/1608.03983, without restarts."""

    name: ClassVar[str] = "cosine"
    T_max: Count | None = None
    """None: to the end of the run."""
    eta_min: NonNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class CosineWarmRestarts(WarmedScheduler):
    """`CosineAnnealingWarmRestarts`, https://arxiv.org/abs/1608.03983."""

    name: ClassVar[str] = "cosine_warm_restarts"
    T_0: Count
    T_mult: Count = 1
    eta_min: NonNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class Linear(WarmedScheduler):
    """`LinearLR`: from `start_factor` to `end_factor` over `total_iters`."""

    name: ClassVar[str] = "linear"
    start_factor: Gamma = 1.0
    end_factor: Annotated[float, Interval(ge=0, le=1)] = 0.0
    total_iters: Count | None = None
    """None: to the end of the run."""


@dataclass(frozen=True, kw_only=True)
class OneCycle(Scheduler):
    """`OneCycleLR`, https://arxiv.org/abs/1708.07120, over the whole run; a group's rate is its peak, `max_lr`."""

    name: ClassVar[str] = "onecycle"
    interval: Literal["epoch", "step"] = "step"
    pct_start: Annotated[float, Interval(gt=0, lt=1)] = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: Annotated[float, Interval(ge=1)] = 25.0
    final_div_factor: Annotated[float, Interval(ge=1)] = 1e4
    three_phase: bool = False
    cycle_momentum: bool = False
    base_momentum: Annotated[float, Interval(gt=0, lt=1)] = 0.85
    max_momentum: Fraction = 0.95


@dataclass(frozen=True, kw_only=True)
class Cyclic(Scheduler):
    """`CyclicLR`, https://arxiv.org/abs/1506.01186; a group's rate is its lower bound, PyTorch's `base_lr`."""

    name: ClassVar[str] = "cyclic"
    interval: Literal["epoch", "step"] = "step"
    max_lr_ratio: Annotated[float, Interval(ge=1)]
    """The upper bound, PyTorch's `max_lr`, as a multiple of the group's rate."""
    step_size_up: Count
    step_size_down: Count | None = None
    """None: as `step_size_up`."""
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: Gamma = 1.0
    cycle_momentum: bool = False
    base_momentum: Annotated[float, Interval(gt=0, lt=1)] = 0.8
    max_momentum: Fraction = 0.9


@dataclass(frozen=True, kw_only=True)
class Plateau(Scheduler):
    """`ReduceLROnPlateau`: times `factor` when the metric has not improved for more than `patience` epochs."""

    name: ClassVar[str] = "plateau"
    interval: Literal["epoch"] = "epoch"
    metric: str = "val/loss"
    """Which of the workload's metrics; its direction is the workload's."""
    factor: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    patience: Annotated[int, Interval(ge=0)] = 10
    threshold: NonNegative = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: Annotated[int, Interval(ge=0)] = 0
    min_lr: NonNegative = 0.0


SCHEDULERS: dict[str, type[Scheduler]] = by_name(
    Constant, Step, MultiStep, Exponential, Polynomial, Cosine, CosineWarmRestarts, OneCycle, Cyclic, Linear, Plateau
)
