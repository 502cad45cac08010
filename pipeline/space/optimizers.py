"""What a learning-rate strategy can be: every optimizer and every schedule, with its hyperparameters.

Each class is one entry of a search-space file, `optimizer: {adamw: {base_lr: 1e-3}}`; its fields are the
hyperparameters, under PyTorch's own argument names, with PyTorch's defaults, in their legal intervals. `betas` are
two fields, `beta1` and `beta2`. A file may search every field; a trial trains one value of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pipeline.space.limits import Fraction, Interval, NonNegative, Positive, by_name


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What every optimizer has."""

    name: ClassVar[str]
    base_lr: Positive
    """Learning rate of a group whose ratio is 1, before any schedule; per optimizer step."""


@dataclass(frozen=True, kw_only=True)
class DecayingOptimizer(Optimizer):
    """An optimizer with weight decay: every one but Rprop."""

    weight_decay: NonNegative = 0.0
    """Per optimizer step; a parameter group may set its own."""


@dataclass(frozen=True, kw_only=True)
class SGD(DecayingOptimizer):
    """Stochastic gradient descent, `torch.optim.SGD`."""

    name: ClassVar[str] = "sgd"
    momentum: Fraction = 0.0
    dampening: Annotated[float, Interval(ge=0, le=1)] = 0.0
    nesterov: bool = False
    """Needs a momentum above 0 and a dampening of 0."""


@dataclass(frozen=True, kw_only=True)
class Adam(DecayingOptimizer):
    """Kingma and Ba (2015), https://arxiv.org/abs/1412.6980, `torch.optim.Adam`."""

    name: ClassVar[str] = "adam"
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Positive = 1e-8
    amsgrad: bool = False


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, https://arxiv.org/abs/1711.05101, `torch.optim.AdamW`."""

    name: ClassVar[str] = "adamw"
    weight_decay: NonNegative = 0.01


@dataclass(frozen=True, kw_only=True)
class NAdam(DecayingOptimizer):
    """Adam with Nesterov momentum, `torch.optim.NAdam`."""

    name: ClassVar[str] = "nadam"
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Positive = 1e-8
    momentum_decay: NonNegative = 0.004
    decoupled_weight_decay: bool = False


@dataclass(frozen=True, kw_only=True)
class RAdam(DecayingOptimizer):
    """Rectified Adam, https://arxiv.org/abs/1908.03265, `torch.optim.RAdam`."""

    name: ClassVar[str] = "radam"
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Positive = 1e-8
    decoupled_weight_decay: bool = False


@dataclass(frozen=True, kw_only=True)
class Adamax(DecayingOptimizer):
    """Adam in the infinity norm, https://arxiv.org/abs/1412.6980, `torch.optim.Adamax`."""

    name: ClassVar[str] = "adamax"
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Positive = 1e-8


@dataclass(frozen=True, kw_only=True)
class RMSprop(DecayingOptimizer):
    """Hinton's lecture notes (2012), `torch.optim.RMSprop`."""

    name: ClassVar[str] = "rmsprop"
    alpha: Fraction = 0.99
    eps: Positive = 1e-8
    momentum: Fraction = 0.0
    centered: bool = False


@dataclass(frozen=True, kw_only=True)
class Adagrad(DecayingOptimizer):
    """Duchi, Hazan and Singer (2011), `torch.optim.Adagrad`."""

    name: ClassVar[str] = "adagrad"
    lr_decay: NonNegative = 0.0
    initial_accumulator_value: NonNegative = 0.0
    eps: Positive = 1e-10


@dataclass(frozen=True, kw_only=True)
class Adadelta(DecayingOptimizer):
    """Zeiler (2012), https://arxiv.org/abs/1212.5701, `torch.optim.Adadelta`."""

    name: ClassVar[str] = "adadelta"
    rho: Fraction = 0.9
    eps: Positive = 1e-6


@dataclass(frozen=True, kw_only=True)
class ASGD(DecayingOptimizer):
    """Averaged stochastic gradient descent, `torch.optim.ASGD`; its own rate decays by `lambd` and `alpha`."""

    name: ClassVar[str] = "asgd"
    lambd: NonNegative = 1e-4
    alpha: NonNegative = 0.75
    t0: NonNegative = 1e6
    """In optimizer steps."""


@dataclass(frozen=True, kw_only=True)
class Adafactor(DecayingOptimizer):
    """Factored second moments, https://arxiv.org/abs/1804.04235, `torch.optim.Adafactor`."""

    name: ClassVar[str] = "adafactor"
    beta2_decay: Annotated[float, Interval(le=0)] = -0.8
    d: Annotated[float, Interval(ge=1)] = 1.0
    """Clipping threshold of the update's root mean square."""


@dataclass(frozen=True, kw_only=True)
class Rprop(Optimizer):
    """Resilient backpropagation, `torch.optim.Rprop`; reads the rate at its first step alone."""

    name: ClassVar[str] = "rprop"
    eta_minus: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    eta_plus: Annotated[float, Interval(gt=1)] = 1.2
    step_size_min: Positive = 1e-6
    step_size_max: Positive = 50.0


@dataclass(frozen=True, kw_only=True)
class Muon(DecayingOptimizer):
    """Orthogonalised momentum, https://kellerjordan.github.io/posts/muon/, `torch.optim.Muon`.

    It takes the hidden matrices; biases, norms, convolutions, embeddings and the output layer go to AdamW at the
    same rates. `match_rms_adamw` scales Muon's update to AdamW's, so that one base rate suits both
    (https://arxiv.org/abs/2502.16982).
    """

    name: ClassVar[str] = "muon"
    weight_decay: NonNegative = 0.1
    momentum: Fraction = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Interval(ge=1, lt=100)] = 5
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    beta1: Fraction = 0.9
    """Of the AdamW part, as is `beta2`."""
    beta2: Fraction = 0.999


OPTIMIZERS: dict[str, type[Optimizer]] = by_name(
    SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta, ASGD, Adafactor, Rprop, Muon
)
