"""Every learning-rate schedule: its hyperparameters, its rules, its words, and how PyTorch is called for it.

Each class is one entry of a search-space file, `scheduler: {step: {step_size: 25%, gamma: 0.1}}`. The fields are the
hyperparameters, under PyTorch's argument names. A `Length`, a `Pause`, a `Warmup` or
a `Floor` may be written in percent.

To add a schedule, write its class here and list the class in `SCHEDULERS`. A schedule that PyTorch lacks needs a
function besides, in `pipeline.training.optim`, that `torch_class` names. A schedule of a person's own,
`"my_file.py:noam"`, needs no class here: `OwnScheduler` holds the values of any.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pipeline.errors import Problem
from pipeline.space.limits import (
    Count,
    Floor,
    Fraction,
    Gamma,
    Interval,
    Length,
    NonNegative,
    Pause,
    Positive,
    Warmup,
    by_name,
)
from pipeline.space.own_code import factor_of, is_own, short_name


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a schedule's arguments depend on besides its own fields."""

    total: int
    """Length of the schedule in its `interval`: of the run, less the warm-up."""
    base_lrs: Sequence[float]
    """The rate of each of the optimizer's groups."""
    directions: Mapping[str, str]
    """Metric name to "minimize" or "maximize"."""


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """What every schedule has."""

    name: ClassVar[str]
    torch_class: ClassVar[str]
    """A class of `torch.optim.lr_scheduler`, or the dotted path of a class or function elsewhere."""
    interval: Literal["epoch", "step"] = "epoch"
    """The unit of every count below: the schedule moves after each epoch, or after each optimizer step."""

    def values(self) -> dict[str, Any]:
        """Return the hyperparameters by their names in a file."""
        return dataclasses.asdict(self)

    def arguments(self, training: Training) -> dict[str, Any]:
        """Return the keyword arguments of `torch_class`, besides the optimizer: every field of the schedule's own."""
        own = [field.name for field in dataclasses.fields(self) if field.name not in _SHARED]
        return {name: getattr(self, name) for name in own}

    def __str__(self) -> str:
        """Return the schedule in a few words: `step 6 × 0.21`."""
        return self.name

    @classmethod
    def problems(cls, extremes: Mapping[str, tuple[Any, ...]], total: int, words: str) -> Iterator[Problem]:
        """Yield what does not fit the length of the run; `place` is the field.

        Args:
            extremes: Field to the ends of its range, to its choices, or to its one value.
            total: Length of the run in the schedule's `interval`, less the longest warm-up.
            words: The same for a message: `the 4 epochs of the run`.
        """
        yield from ()


@dataclass(frozen=True, kw_only=True)
class WarmedScheduler(Scheduler):
    """A schedule that a linear warm-up may precede: `SequentialLR` of `LinearLR` and the schedule."""

    warmup: Warmup = 0
    """Length of the warm-up in `interval` units; 0 for none. The schedule's own counts begin after the warm-up."""
    warmup_start_factor: Gamma = 0.1
    """Multiple of the rate at which the warm-up starts."""


_SHARED = {field.name for field in dataclasses.fields(WarmedScheduler)}


@dataclass(frozen=True, kw_only=True)
class Constant(WarmedScheduler):
    """The rate stays: `ConstantLR` with a factor of 1."""

    name: ClassVar[str] = "constant"
    torch_class: ClassVar[str] = "ConstantLR"

    def arguments(self, training: Training) -> dict[str, Any]:
        """Return the arguments that leave the rate as it is."""
        return {"factor": 1.0, "total_iters": 0}


@dataclass(frozen=True, kw_only=True)
class Step(WarmedScheduler):
    """`StepLR`: times `gamma` every `step_size`."""

    name: ClassVar[str] = "step"
    torch_class: ClassVar[str] = "StepLR"
    step_size: Length
    gamma: Gamma = 0.1

    def __str__(self) -> str:
        return f"step {self.step_size} × {self.gamma:.2g}"

    @classmethod
    def problems(cls, extremes: Mapping[str, tuple[Any, ...]], total: int, words: str) -> Iterator[Problem]:
        """Check that the first step lies within the run."""
        longest = max(extremes["step_size"])
        if longest > total:
            message = f"must be at most {words}, got {longest}; lower it to that, or give more epochs"
            yield Problem("step_size", message)


@dataclass(frozen=True, kw_only=True)
class MultiStep(WarmedScheduler):
    """`MultiStepLR`: times `gamma` at each milestone."""

    name: ClassVar[str] = "multistep"
    torch_class: ClassVar[str] = "MultiStepLR"
    milestones: tuple[Length, ...]
    """A milestone that stands twice counts twice: shares of a short run may be one number."""
    gamma: Gamma = 0.1

    def __str__(self) -> str:
        return f"multistep {list(self.milestones)} × {self.gamma:.2g}"

    @classmethod
    def problems(cls, extremes: Mapping[str, tuple[Any, ...]], total: int, words: str) -> Iterator[Problem]:
        """Check that milestones are in order and lie within the run."""
        for milestones in extremes["milestones"]:
            if any(a > b for a, b in itertools.pairwise(milestones)):
                yield Problem("milestones", f"must not decrease, got {list(milestones)}; put them in order")
            if max(milestones) > total:
                yield Problem("milestones", f"must be at most {words}, got {max(milestones)}; lower it to that")


@dataclass(frozen=True, kw_only=True)
class Exponential(WarmedScheduler):
    """`ExponentialLR`: times `gamma` every time."""

    name: ClassVar[str] = "exponential"
    torch_class: ClassVar[str] = "ExponentialLR"
    gamma: Gamma

    def __str__(self) -> str:
        return f"exponential × {self.gamma:.3g}"


@dataclass(frozen=True, kw_only=True)
class Polynomial(WarmedScheduler):
    """`PolynomialLR`: to 0 over `total_iters`."""

    name: ClassVar[str] = "polynomial"
    torch_class: ClassVar[str] = "PolynomialLR"
    total_iters: Length | None = None
    """None: to the end of the run."""
    power: Positive = 1.0

    def arguments(self, training: Training) -> dict[str, Any]:
        """Fill in the end of the run."""
        return {**super().arguments(training), "total_iters": self.total_iters or training.total}


@dataclass(frozen=True, kw_only=True)
class Cosine(WarmedScheduler):
    """`CosineAnnealingLR`: half a cosine, without restarts; Loshchilov and Hutter (2017), https://arxiv.org/abs/1608.03983."""

    name: ClassVar[str] = "cosine"
    torch_class: ClassVar[str] = "CosineAnnealingLR"
    T_max: Length | None = None
    """None: to the end of the run."""
    eta_min: Floor = 0.0

    def arguments(self, training: Training) -> dict[str, Any]:
        """Fill in the end of the run."""
        return {**super().arguments(training), "T_max": self.T_max or training.total}


@dataclass(frozen=True, kw_only=True)
class CosineWarmRestarts(WarmedScheduler):
    """`CosineAnnealingWarmRestarts`; Loshchilov and Hutter (2017), https://arxiv.org/abs/1608.03983."""

    name: ClassVar[str] = "cosine_warm_restarts"
    torch_class: ClassVar[str] = "CosineAnnealingWarmRestarts"
    T_0: Length
    T_mult: Count = 1
    eta_min: Floor = 0.0


@dataclass(frozen=True, kw_only=True)
class Linear(WarmedScheduler):
    """`LinearLR`: from `start_factor` to `end_factor` over `total_iters`."""

    name: ClassVar[str] = "linear"
    torch_class: ClassVar[str] = "LinearLR"
    start_factor: Gamma = 1.0
    end_factor: Annotated[float, Interval(ge=0, le=1)] = 0.0
    total_iters: Length | None = None
    """None: to the end of the run."""

    def arguments(self, training: Training) -> dict[str, Any]:
        """Fill in the end of the run."""
        return {**super().arguments(training), "total_iters": self.total_iters or training.total}


@dataclass(frozen=True, kw_only=True)
class OneCycle(Scheduler):
    """`OneCycleLR` over the whole run; Smith and Topin (2017), https://arxiv.org/abs/1708.07120.

    A group's rate is the peak of the cycle, PyTorch's `max_lr`.
    """

    name: ClassVar[str] = "onecycle"
    torch_class: ClassVar[str] = "OneCycleLR"
    interval: Literal["epoch", "step"] = "step"
    pct_start: Annotated[float, Interval(gt=0, lt=1)] = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: Annotated[float, Interval(ge=1)] = 25.0
    final_div_factor: Annotated[float, Interval(ge=1)] = 1e4
    three_phase: bool = False
    cycle_momentum: bool = False
    base_momentum: Annotated[float, Interval(gt=0, lt=1)] = 0.85
    max_momentum: Fraction = 0.95

    def arguments(self, training: Training) -> dict[str, Any]:
        """Fill in the peaks and the length of the run."""
        return {**super().arguments(training), "max_lr": list(training.base_lrs), "total_steps": training.total}

    @classmethod
    def problems(cls, extremes: Mapping[str, tuple[Any, ...]], total: int, words: str) -> Iterator[Problem]:
        """Check that each phase of the cycle has a length."""
        shares = extremes["pct_start"]
        if total < 2 and extremes["interval"] == ("epoch",):
            yield Problem("interval", f"needs at least 2 epochs, or `interval: step`, got {words}")
        elif total < 2:
            yield Problem("interval", f"needs at least 2 steps, got {words}; give more epochs, or a smaller batch_size")
        elif min(shares) * total <= 1:
            message = f"must be above {1 / total:g}, so that the rise takes over one of {words}, got {min(shares):g}"
            yield Problem("pct_start", message)
        if max(shares) > 0.5 and True in extremes["three_phase"]:
            yield Problem("pct_start", f"must be at most 0.5 with three_phase, got {max(shares):g}")


@dataclass(frozen=True, kw_only=True)
class Cyclic(Scheduler):
    """`CyclicLR`; Smith (2017), https://arxiv.org/abs/1506.01186.

    A group's rate is the lower bound of the cycle, PyTorch's `base_lr`.
    """

    name: ClassVar[str] = "cyclic"
    torch_class: ClassVar[str] = "CyclicLR"
    interval: Literal["epoch", "step"] = "step"
    max_lr_ratio: Annotated[float, Interval(ge=1)]
    """The upper bound, PyTorch's `max_lr`, as a multiple of the group's rate."""
    step_size_up: Length
    step_size_down: Length | None = None
    """None: as `step_size_up`."""
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: Gamma = 1.0
    cycle_momentum: bool = False
    base_momentum: Annotated[float, Interval(gt=0, lt=1)] = 0.8
    max_momentum: Fraction = 0.9

    def arguments(self, training: Training) -> dict[str, Any]:
        """Fill in the bounds of each group."""
        arguments = super().arguments(training)
        ratio = arguments.pop("max_lr_ratio")
        return {**arguments, "base_lr": list(training.base_lrs), "max_lr": [rate * ratio for rate in training.base_lrs]}


@dataclass(frozen=True, kw_only=True)
class Plateau(Scheduler):
    """`ReduceLROnPlateau`: times `factor` when the metric has not improved for more than `patience` epochs."""

    name: ClassVar[str] = "plateau"
    torch_class: ClassVar[str] = "ReduceLROnPlateau"
    interval: Literal["epoch"] = "epoch"
    metric: str = "val/loss"
    """Which of the workload's metrics; the workload says its direction."""
    factor: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    patience: Pause = 10
    threshold: NonNegative = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: Pause = 0
    min_lr: Floor = 0.0

    def __str__(self) -> str:
        return f"plateau {self.patience} × {self.factor:.2g}"

    def arguments(self, training: Training) -> dict[str, Any]:
        """Replace the metric by its direction."""
        arguments = super().arguments(training)
        direction = training.directions[arguments.pop("metric")]
        return {**arguments, "mode": "min" if direction == "minimize" else "max"}


@dataclass(frozen=True, kw_only=True)
class OwnScheduler(Scheduler):
    """A schedule of a person's own, loaded by `pipeline.space.own_code`: `LambdaLR` of a factor of the base rate."""

    name: str  # type: ignore[misc]  # of an object, not of the class: a config is read without loading the code
    """`path/to/file.py:function` or `package.module:function`."""
    torch_class: ClassVar[str] = "LambdaLR"
    hyperparameters: Mapping[str, Any]
    """The arguments of the function, besides `step` and `total`."""

    def values(self) -> dict[str, Any]:
        """Return the hyperparameters by their names in a file."""
        return {"interval": self.interval, **self.hyperparameters}

    def arguments(self, training: Training) -> dict[str, Any]:
        """Return the function of the step alone."""
        return {"lr_lambda": factor_of(self.name, total=training.total, hyperparameters=self.hyperparameters)}

    def __str__(self) -> str:
        values = {name: f"{v:.3g}" if isinstance(v, float) else str(v) for name, v in self.hyperparameters.items()}
        return " ".join([short_name(self.name), ", ".join(f"{name} {value}" for name, value in values.items())]).strip()


SCHEDULERS: dict[str, type[Scheduler]] = by_name(
    Constant, Step, MultiStep, Exponential, Polynomial, Cosine, CosineWarmRestarts, OneCycle, Cyclic, Linear, Plateau
)
"""Name in a file to class."""


def scheduler_class(name: str) -> type[Scheduler]:
    """Return the class of a name in a file."""
    return OwnScheduler if is_own(name) else SCHEDULERS[name]


def make_scheduler(name: str, values: Mapping[str, Any]) -> Scheduler:
    """Return the schedule of a name in a file, with one value for each hyperparameter."""
    if not is_own(name):
        return SCHEDULERS[name](**values)
    hyperparameters = {field: value for field, value in values.items() if field != "interval"}
    return OwnScheduler(name=name, interval=values["interval"], hyperparameters=hyperparameters)
