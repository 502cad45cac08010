"""Every optimizer: its hyperparameters, their legal intervals, its rules, and how PyTorch is called for it.

Each class is one entry of a search-space file, `optimizer: {adamw: {base_lr: 1e-3}}`. The fields are the
hyperparameters, under PyTorch's argument names and with PyTorch's defaults; `betas` are two fields, `beta1` and
`beta2`. A file may search every field; a trial trains one value of each.

To add an optimizer, write its class here and list the class in `OPTIMIZERS`. A rule in
`pipeline.training.rows.update_rules` lets trials of the optimizer train as rows; without a rule they train plain. An
optimizer of a person's own, `"my_file.py:Lion"`, needs no class here: `OwnOptimizer` holds the values of any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pipeline.errors import Problem
from pipeline.space.limits import Fraction, Interval, NonNegative, Positive, by_name
from pipeline.space.own_code import is_own


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What every optimizer has."""

    name: ClassVar[str]
    torch_class: ClassVar[str]
    """A class of `torch.optim`, or the dotted path of a class elsewhere, `package.module.Class`."""
    base_lr: Positive
    """Learning rate of a group whose ratio is 1, before any schedule; per optimizer step."""

    def values(self) -> dict[str, Any]:
        """Return the hyperparameters by their names in a file."""
        return dataclasses.asdict(self)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `torch_class`, besides the parameters."""
        arguments = self.values()
        arguments["lr"] = arguments.pop("base_lr")
        if "beta1" in arguments:
            arguments["betas"] = (arguments.pop("beta1"), arguments.pop("beta2"))
        return arguments

    @classmethod
    def problems(cls, extremes: Mapping[str, tuple[Any, ...]]) -> Iterator[Problem]:
        """Yield what PyTorch would refuse in some trial; `place` is the field.

        Args:
            extremes: Field to the ends of its range, to its choices, or to its one value.
        """
        yield from ()


@dataclass(frozen=True, kw_only=True)
class DecayingOptimizer(Optimizer):
    """An optimizer with weight decay: every optimizer but Rprop."""

    weight_decay: NonNegative = 0.0
    """Per optimizer step; a parameter group may set its own."""


@dataclass(frozen=True, kw_only=True)
class SGD(DecayingOptimizer):
    """Stochastic gradient descent, `torch.optim.SGD`; Robbins and Monro (1951), https://doi.org/10.1214/aoms/1177729586."""

    name: ClassVar[str] = "sgd"
    torch_class: ClassVar[str] = "SGD"
    momentum: Fraction = 0.0
    dampening: Annotated[float, Interval(ge=0, le=1)] = 0.0
    nesterov: bool = False
    """Needs a momentum above 0 and a dampening of 0."""

    @classmethod
    def problems(cls, extremes: Mapping[str, tuple[Any, ...]]) -> Iterator[Problem]:
        """Check the conditions of Nesterov momentum."""
        if True not in extremes["nesterov"]:
            return
        if 0 in extremes["momentum"]:
            yield Problem("nesterov", "needs a momentum above 0 in every trial; raise momentum or remove nesterov")
        if any(extremes["dampening"]):
            yield Problem("nesterov", "needs a dampening of 0 in every trial; remove dampening or nesterov")


@dataclass(frozen=True, kw_only=True)
class AdamLike(DecayingOptimizer):
    """The hyperparameters that Adam and its variants share."""

    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Positive = 1e-8


@dataclass(frozen=True, kw_only=True)
class Adam(AdamLike):
    """Adam, `torch.optim.Adam`; Kingma and Ba (2015), https://arxiv.org/abs/1412.6980."""

    name: ClassVar[str] = "adam"
    torch_class: ClassVar[str] = "Adam"
    amsgrad: bool = False


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, `torch.optim.AdamW`; Loshchilov and Hutter (2019), https://arxiv.org/abs/1711.05101."""

    name: ClassVar[str] = "adamw"
    torch_class: ClassVar[str] = "AdamW"
    weight_decay: NonNegative = 0.01


@dataclass(frozen=True, kw_only=True)
class NAdam(AdamLike):
    """Adam with Nesterov momentum, `torch.optim.NAdam`; Dozat (2016), https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ."""

    name: ClassVar[str] = "nadam"
    torch_class: ClassVar[str] = "NAdam"
    momentum_decay: NonNegative = 0.004
    decoupled_weight_decay: bool = False


@dataclass(frozen=True, kw_only=True)
class RAdam(AdamLike):
    """Rectified Adam, `torch.optim.RAdam`; Liu et al. (2020), https://arxiv.org/abs/1908.03265."""

    name: ClassVar[str] = "radam"
    torch_class: ClassVar[str] = "RAdam"
    decoupled_weight_decay: bool = False


@dataclass(frozen=True, kw_only=True)
class Adamax(AdamLike):
    """Adam in the infinity norm, `torch.optim.Adamax`; Kingma and Ba (2015), https://arxiv.org/abs/1412.6980."""

    name: ClassVar[str] = "adamax"
    torch_class: ClassVar[str] = "Adamax"


@dataclass(frozen=True, kw_only=True)
class RMSprop(DecayingOptimizer):
    """RMSprop, `torch.optim.RMSprop`; Hinton (2012), https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf."""

    name: ClassVar[str] = "rmsprop"
    torch_class: ClassVar[str] = "RMSprop"
    alpha: Fraction = 0.99
    eps: Positive = 1e-8
    momentum: Fraction = 0.0
    centered: bool = False


@dataclass(frozen=True, kw_only=True)
class Adagrad(DecayingOptimizer):
    """Adagrad, `torch.optim.Adagrad`; Duchi, Hazan and Singer (2011), https://jmlr.org/papers/v12/duchi11a.html."""

    name: ClassVar[str] = "adagrad"
    torch_class: ClassVar[str] = "Adagrad"
    lr_decay: NonNegative = 0.0
    initial_accumulator_value: NonNegative = 0.0
    eps: Positive = 1e-10


@dataclass(frozen=True, kw_only=True)
class Adadelta(DecayingOptimizer):
    """Adadelta, `torch.optim.Adadelta`; Zeiler (2012), https://arxiv.org/abs/1212.5701."""

    name: ClassVar[str] = "adadelta"
    torch_class: ClassVar[str] = "Adadelta"
    rho: Fraction = 0.9
    eps: Positive = 1e-6


@dataclass(frozen=True, kw_only=True)
class ASGD(DecayingOptimizer):
    """Averaged stochastic gradient descent, `torch.optim.ASGD`; Polyak and Juditsky (1992), https://doi.org/10.1137/0330046.

    The optimizer decays its own rate by `lambd` and `alpha`.
    """

    name: ClassVar[str] = "asgd"
    torch_class: ClassVar[str] = "ASGD"
    lambd: NonNegative = 1e-4
    alpha: NonNegative = 0.75
    t0: NonNegative = 1e6
    """In optimizer steps."""


@dataclass(frozen=True, kw_only=True)
class Adafactor(DecayingOptimizer):
    """Factored second moments, `torch.optim.Adafactor`; Shazeer and Stern (2018), https://arxiv.org/abs/1804.04235."""

    name: ClassVar[str] = "adafactor"
    torch_class: ClassVar[str] = "Adafactor"
    beta2_decay: Annotated[float, Interval(le=0)] = -0.8
    d: Annotated[float, Interval(ge=1)] = 1.0
    """Clipping threshold of the update's root mean square."""


@dataclass(frozen=True, kw_only=True)
class Rprop(Optimizer):
    """Resilient backpropagation, `torch.optim.Rprop`; Riedmiller and Braun (1993), https://doi.org/10.1109/ICNN.1993.298623.

    Rprop reads the rate at its first step only.
    """

    name: ClassVar[str] = "rprop"
    torch_class: ClassVar[str] = "Rprop"
    eta_minus: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    eta_plus: Annotated[float, Interval(gt=1)] = 1.2
    step_size_min: Positive = 1e-6
    step_size_max: Positive = 50.0

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `torch.optim.Rprop`."""
        step_sizes = (self.step_size_min, self.step_size_max)
        return {"lr": self.base_lr, "etas": (self.eta_minus, self.eta_plus), "step_sizes": step_sizes}

    @classmethod
    def problems(cls, extremes: Mapping[str, tuple[Any, ...]]) -> Iterator[Problem]:
        """Check that the step sizes are an interval."""
        if max(extremes["step_size_min"]) > min(extremes["step_size_max"]):
            yield Problem("step_size_min", "must be at most step_size_max in every trial")


@dataclass(frozen=True, kw_only=True)
class Muon(DecayingOptimizer):
    """Orthogonalised momentum, `torch.optim.Muon`; Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/.

    Muon takes the hidden matrices. Biases, norms, convolutions, embeddings and the output layer go to AdamW at the
    same rates. `match_rms_adamw` scales Muon's update to AdamW's, so that one base rate suits both
    (https://arxiv.org/abs/2502.16982).
    """

    name: ClassVar[str] = "muon"
    torch_class: ClassVar[str] = "Muon"
    weight_decay: NonNegative = 0.1
    momentum: Fraction = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Interval(ge=1, lt=100)] = 5
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    beta1: Fraction = 0.9
    """For AdamW, as is `beta2`."""
    beta2: Fraction = 0.999

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `torch.optim.Muon`."""
        arguments = super().arguments()
        del arguments["betas"]
        return arguments

    def adamw(self) -> AdamW:
        """Return the optimizer of the parameters that Muon does not take."""
        return AdamW(base_lr=self.base_lr, weight_decay=self.weight_decay, beta1=self.beta1, beta2=self.beta2)


@dataclass(frozen=True, kw_only=True)
class OwnOptimizer(Optimizer):
    """An optimizer of a person's own, loaded by `pipeline.space.own_code`."""

    name: str  # type: ignore[misc]  # of an object, not of the class: a config is read without loading the code
    """`path/to/file.py:Class` or `package.module:Class`."""
    hyperparameters: Mapping[str, Any]
    """The arguments of the class, besides `lr`."""

    def values(self) -> dict[str, Any]:
        """Return the hyperparameters by their names in a file."""
        return {"base_lr": self.base_lr, **self.hyperparameters}

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the class, besides the parameters."""
        return {"lr": self.base_lr, **self.hyperparameters}


OPTIMIZERS: dict[str, type[Optimizer]] = by_name(
    SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta, ASGD, Adafactor, Rprop, Muon
)
"""Name in a file to class."""


def optimizer_class(name: str) -> type[Optimizer]:
    """Return the class of a name in a file."""
    return OwnOptimizer if is_own(name) else OPTIMIZERS[name]


def make_optimizer(name: str, values: Mapping[str, Any]) -> Optimizer:
    """Return the optimizer of a name in a file, with one value for each hyperparameter."""
    if not is_own(name):
        return OPTIMIZERS[name](**values)
    hyperparameters = {field: value for field, value in values.items() if field != "base_lr"}
    return OwnOptimizer(name=name, base_lr=values["base_lr"], hyperparameters=hyperparameters)
