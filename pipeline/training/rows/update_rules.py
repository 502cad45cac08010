"""Update rules of optimizers on a matrix with one trial per row, each equal to its `torch.optim` twin.

Every rule makes the same step: add weight decay to the gradient, turn the gradient into a direction, shrink the
parameters, and move the parameters along the direction:

    g = g + l2 * p        d = direction(g)        p = shrink * p - rate * d

A rule defines the direction and the coefficients. Its docstring gives `d`, and `rate` where the rate is not `lr`. There
`t` counts updates from 1, and the state matrices begin as zeros. Weight decay is `l2 = weight_decay`, or if decoupled
`shrink = 1 - lr * weight_decay` (Loshchilov and Hutter (2019), https://arxiv.org/abs/1711.05101).

`coefficients` computes the coefficients of a whole epoch on the CPU in float64, as PyTorch does with Python floats.
`direction` is elementwise arithmetic, once per step. Therefore rows do not affect each other, and a GPU never waits for
the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.space.optimizers import Optimizer

Hyper = Mapping[str, Tensor]
"""Hyperparameter name to (step, row, group), float64; named and valued as in PyTorch's `param_groups`."""
Carry = dict[str, Tensor]
"""Name to (row, group): values that `coefficients` carries from one epoch to the next."""


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of an epoch's steps, float64."""

    rate: Tensor
    """(step, row, group)"""
    direction: Sequence[Tensor]
    """Coefficients that `direction` takes, each (step, row, group), equal in all groups."""
    l2: Tensor | None = None
    """(step, row, group); None: the gradient has no weight decay."""
    shrink: Tensor | None = None
    """(step, row, group); None: parameters do not shrink."""


class Rule(Protocol):
    """The update rule of one optimizer with fixed boolean options."""

    states: tuple[str, ...]
    """Names of the state matrices (row, parameter), which begin as zeros."""

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Coefficients:
        """Return the coefficients of an epoch.

        Args:
            hyper: Hyperparameters of each step.
            steps: (step, 1, 1), number of each update, counted from 1 over the run.
            carry: Values of the epoch before; overwritten with the values of this epoch.
        """
        ...

    def direction(self, g: Tensor, states: Sequence[Tensor], c: Sequence[Tensor]) -> Tensor:
        """Return the direction (row, parameter) of a step, and update `states` in place.

        Args:
            g: Gradients (row, parameter); may be overwritten.
            states: State matrices (row, parameter), in the order of `self.states`.
            c: The step's `Coefficients.direction`, each (row, 1).
        """
        ...


class SGD:
    """`torch.optim.SGD`.

        b = momentum * b + (1 - dampening) * g
        d = b, with nesterov d = g + momentum * b

    At t = 1, and at a momentum of 0, b = g. Sutskever et al. (2013), https://proceedings.mlr.press/v28/sutskever13.html.
    """

    def __init__(self, *, nesterov: bool) -> None:
        self.states: tuple[str, ...] = ("momentum_buffer",)
        self.nesterov = nesterov

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Coefficients:
        """See `Rule`."""
        undampened = (steps == 1) | (hyper["momentum"] == 0)
        weight = torch.where(undampened, 1.0, 1 - hyper["dampening"])
        return Coefficients(hyper["lr"], (hyper["momentum"], weight), l2=hyper["weight_decay"])

    def direction(self, g: Tensor, states: Sequence[Tensor], c: Sequence[Tensor]) -> Tensor:
        """See `Rule`."""
        momentum, weight = c
        buffer = states[0].mul_(momentum).addcmul_(g, weight)
        return g.addcmul_(buffer, momentum) if self.nesterov else buffer


class Adam:
    """`torch.optim.Adam` and, with `decoupled` weight decay, `torch.optim.AdamW`.

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        d = m / (sqrt(v / (1 - beta2^t)) + eps)        rate = lr / (1 - beta1^t)

    With amsgrad, the largest v so far takes the place of v in d. Kingma and Ba (2015), https://arxiv.org/abs/1412.6980;
    Reddi et al. (2018), https://openreview.net/forum?id=ryQu7f-RZ.
    """

    def __init__(self, *, amsgrad: bool, decoupled: bool) -> None:
        self.states: tuple[str, ...] = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))
        self.amsgrad = amsgrad
        self.decoupled = decoupled

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Coefficients:
        """See `Rule`."""
        beta1, beta2 = hyper["beta1"], hyper["beta2"]
        correction2 = (1 - _power(beta2, steps)).sqrt()
        direction = (1 - beta1, beta2, 1 - beta2, correction2, hyper["eps"])
        return Coefficients(hyper["lr"] / (1 - _power(beta1, steps)), direction, **_decay(hyper, self.decoupled))

    def direction(self, g: Tensor, states: Sequence[Tensor], c: Sequence[Tensor]) -> Tensor:
        """See `Rule`."""
        weight1, beta2, weight2, correction2, eps = c
        _moments(g, states, weight1, beta2, weight2)
        second = torch.maximum(states[2], states[1], out=states[2]) if self.amsgrad else states[1]
        return states[0] / second.sqrt().div_(correction2).add_(eps)


class NAdam:
    """`torch.optim.NAdam`.

        m, v as in Adam        mu_t = beta1 * (1 - 0.5 * 0.96^(t * momentum_decay))        P = mu_1 * … * mu_t
        d = ((1 - mu_t) / (1 - P) * g + mu_(t+1) / (1 - P * mu_(t+1)) * m) / (sqrt(v / (1 - beta2^t)) + eps)

    P is carried in float32, as in PyTorch. Dozat (2016), https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.
    """

    def __init__(self, *, decoupled: bool) -> None:
        self.states: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        self.decoupled = decoupled

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Coefficients:
        """See `Rule`."""
        beta1, beta2 = hyper["beta1"], hyper["beta2"]
        decay = torch.tensor(0.96, dtype=beta1.dtype)
        mu = beta1 * (1 - 0.5 * _power(decay, steps * hyper["momentum_decay"]))
        mu_next = beta1 * (1 - 0.5 * _power(decay, (steps + 1) * hyper["momentum_decay"]))
        product = carry.get("mu_product", torch.ones(mu.shape[1:], dtype=torch.get_default_dtype()))
        products = []
        for factor in mu:
            product = product * factor.to(product.dtype)
            products.append(product.double())
        carry["mu_product"] = product
        through = torch.stack(products)
        g_weight, m_weight = (1 - mu) / (1 - through), mu_next / (1 - through * mu_next)
        direction = (1 - beta1, beta2, 1 - beta2, 1 - _power(beta2, steps), hyper["eps"], g_weight, m_weight)
        return Coefficients(hyper["lr"], direction, **_decay(hyper, self.decoupled))

    def direction(self, g: Tensor, states: Sequence[Tensor], c: Sequence[Tensor]) -> Tensor:
        """See `Rule`."""
        weight1, beta2, weight2, correction2, eps, g_weight, m_weight = c
        _moments(g, states, weight1, beta2, weight2)
        denominator = states[1].div(correction2).sqrt_().add_(eps)
        return g.mul_(g_weight).addcmul_(states[0], m_weight).div_(denominator)


class RAdam:
    """`torch.optim.RAdam`.

        m, v as in Adam        rho_inf = 2 / (1 - beta2) - 1        rho = rho_inf - 2 * t * beta2^t / (1 - beta2^t)
        r = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        rho > 5:   d = m / (sqrt(v) + eps)        rate = lr * r * sqrt(1 - beta2^t) / (1 - beta1^t)
        else:      d = m                          rate = lr / (1 - beta1^t)

    Liu et al. (2020), https://arxiv.org/abs/1908.03265.
    """

    def __init__(self, *, decoupled: bool) -> None:
        self.states: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        self.decoupled = decoupled

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Coefficients:
        """See `Rule`."""
        beta1, beta2 = hyper["beta1"], hyper["beta2"]
        power2 = _power(beta2, steps)
        correction2 = 1 - power2
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * steps * power2 / correction2
        rectified = rho > 5
        rectification = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)).sqrt()
        rate = hyper["lr"] / (1 - _power(beta1, steps))
        rate = torch.where(rectified, rate * correction2.sqrt() * rectification, rate)
        direction = (1 - beta1, beta2, 1 - beta2, hyper["eps"], rectified.double())
        return Coefficients(rate, direction, **_decay(hyper, self.decoupled))

    def direction(self, g: Tensor, states: Sequence[Tensor], c: Sequence[Tensor]) -> Tensor:
        """See `Rule`."""
        weight1, beta2, weight2, eps, rectified = c
        _moments(g, states, weight1, beta2, weight2)
        return states[0] / torch.where(rectified != 0, states[1].sqrt().add_(eps), 1.0)


class Adamax:
    """`torch.optim.Adamax`.

        m = beta1 * m + (1 - beta1) * g
        u = max(beta2 * u, |g| + eps)
        d = m / u        rate = lr / (1 - beta1^t)

    Kingma and Ba (2015), section 7.1, https://arxiv.org/abs/1412.6980.
    """

    states: tuple[str, ...] = ("exp_avg", "exp_inf")

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Coefficients:
        """See `Rule`."""
        rate = hyper["lr"] / (1 - _power(hyper["beta1"], steps))
        direction = (1 - hyper["beta1"], hyper["beta2"], hyper["eps"])
        return Coefficients(rate, direction, l2=hyper["weight_decay"])

    def direction(self, g: Tensor, states: Sequence[Tensor], c: Sequence[Tensor]) -> Tensor:
        """See `Rule`."""
        weight1, beta2, eps = c
        exp_avg, exp_inf = states
        exp_avg.lerp_(g, weight1)
        torch.maximum(exp_inf.mul_(beta2), g.abs_().add_(eps), out=exp_inf)
        return exp_avg / exp_inf


class RMSprop:
    """`torch.optim.RMSprop`.

        v = alpha * v + (1 - alpha) * g^2
        centered:   a = alpha * a + (1 - alpha) * g        s = sqrt(v - a^2) + eps
        else:       s = sqrt(v) + eps
        d = b = momentum * b + g / s

    Hinton (2012), https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; centered: Graves (2013),
    https://arxiv.org/abs/1308.0850.
    """

    def __init__(self, *, centered: bool) -> None:
        self.states: tuple[str, ...] = ("square_avg", "momentum_buffer", *(("grad_avg",) if centered else ()))
        self.centered = centered

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Coefficients:
        """See `Rule`."""
        alpha = hyper["alpha"]
        direction = (alpha, 1 - alpha, hyper["eps"], hyper["momentum"])
        return Coefficients(hyper["lr"], direction, l2=hyper["weight_decay"])

    def direction(self, g: Tensor, states: Sequence[Tensor], c: Sequence[Tensor]) -> Tensor:
        """See `Rule`."""
        alpha, weight, eps, momentum = c
        square_avg, buffer = states[:2]
        square_avg.mul_(alpha).addcmul_(g, g * weight)
        if self.centered:
            grad_avg = states[2].lerp_(g, weight)
            average = square_avg.addcmul(grad_avg, grad_avg, value=-1).sqrt_().add_(eps)
        else:
            average = square_avg.sqrt().add_(eps)
        return buffer.mul_(momentum).addcdiv_(g, average)


class Adagrad:
    """`torch.optim.Adagrad`.

        s = s + g^2, begins at initial_accumulator_value
        d = g / (sqrt(s) + eps)        rate = lr / (1 + (t - 1) * lr_decay)

    Duchi et al. (2011), https://jmlr.org/papers/v12/duchi11a.html.
    """

    states: tuple[str, ...] = ("sum",)

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Coefficients:
        """See `Rule`."""
        rate = hyper["lr"] / (1 + (steps - 1) * hyper["lr_decay"])
        start = torch.where(steps == 1, hyper["initial_accumulator_value"], 0.0)
        return Coefficients(rate, (hyper["eps"], start), l2=hyper["weight_decay"])

    def direction(self, g: Tensor, states: Sequence[Tensor], c: Sequence[Tensor]) -> Tensor:
        """See `Rule`."""
        eps, start = c
        total = states[0].add_(start).addcmul_(g, g)
        return g.div_(total.sqrt().add_(eps))


class Adadelta:
    """`torch.optim.Adadelta`.

        v = rho * v + (1 - rho) * g^2
        d = sqrt(u + eps) / sqrt(v + eps) * g
        u = rho * u + (1 - rho) * d^2

    Zeiler (2012), https://arxiv.org/abs/1212.5701.
    """

    states: tuple[str, ...] = ("square_avg", "acc_delta")

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Coefficients:
        """See `Rule`."""
        return Coefficients(hyper["lr"], (hyper["rho"], 1 - hyper["rho"], hyper["eps"]), l2=hyper["weight_decay"])

    def direction(self, g: Tensor, states: Sequence[Tensor], c: Sequence[Tensor]) -> Tensor:
        """See `Rule`."""
        rho, weight, eps = c
        square_avg, acc_delta = states
        square_avg.mul_(rho).addcmul_(g, g * weight)
        delta = acc_delta.add(eps).sqrt_().div_(square_avg.add(eps).sqrt_()).mul_(g)
        acc_delta.mul_(rho).addcmul_(delta, delta * weight)
        return delta


class ASGD:
    """`torch.optim.ASGD`, without the average of the parameters, which training does not read.

        d = g        rate = eta_t        shrink = 1 - lambd * eta_t
        eta_1 = lr        eta_(t+1) = lr / (1 + lambd * lr * t)^alpha, with the lr of step t

    Weight decay is in the gradient. Polyak and Juditsky (1992), https://doi.org/10.1137/0330046.
    """

    states: tuple[str, ...] = ()

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Coefficients:
        """See `Rule`."""
        lr, lambd, alpha = hyper["lr"], hyper["lambd"], hyper["alpha"]
        scalar = torch.get_default_dtype()  # the dtype of PyTorch's eta
        following = (lr / _power(1 + lambd * lr * steps, alpha)).to(scalar)
        first = carry.get("eta", lr[0].to(scalar))
        carry["eta"] = following[-1]
        eta = torch.cat([first[None], following[:-1]]).double()
        return Coefficients(eta, (), l2=hyper["weight_decay"], shrink=1 - lambd * eta)

    def direction(self, g: Tensor, states: Sequence[Tensor], c: Sequence[Tensor]) -> Tensor:
        """See `Rule`."""
        return g


RULES: Mapping[str, Callable[[Mapping[str, bool]], Rule]] = {
    "SGD": lambda options: SGD(nesterov=options["nesterov"]),
    "Adam": lambda options: Adam(amsgrad=options["amsgrad"], decoupled=False),
    "AdamW": lambda options: Adam(amsgrad=options["amsgrad"], decoupled=True),
    "NAdam": lambda options: NAdam(decoupled=options["decoupled_weight_decay"]),
    "RAdam": lambda options: RAdam(decoupled=options["decoupled_weight_decay"]),
    "RMSprop": lambda options: RMSprop(centered=options["centered"]),
    "Adamax": lambda options: Adamax(),
    "Adagrad": lambda options: Adagrad(),
    "Adadelta": lambda options: Adadelta(),
    "ASGD": lambda options: ASGD(),
}
"""Name of a class of `pipeline.space.optimizers` to a function that builds its rule from its boolean options."""


def has_rule(optimizer: type[Optimizer]) -> bool:
    """Return whether trials of an optimizer can be rows."""
    return optimizer.__name__ in RULES


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    """Return base ** exponent as Python and `torch.optim` compute it; a tensor's power rounds depending on its size."""

    def power(base: float, exponent: float) -> float:
        try:
            return math.pow(base, exponent)
        except OverflowError:
            return math.inf
        except ValueError:
            return math.nan

    base, exponent = torch.broadcast_tensors(base, exponent)
    powers = map(power, base.flatten().tolist(), exponent.flatten().tolist())
    return torch.tensor(list(powers), dtype=base.dtype).view(base.shape)


def _decay(hyper: Hyper, decoupled: bool) -> dict[str, Tensor]:
    """Return the coefficient of weight decay: `shrink` if decoupled from the gradient, else `l2`."""
    return {"shrink": 1 - hyper["lr"] * hyper["weight_decay"]} if decoupled else {"l2": hyper["weight_decay"]}


def _moments(g: Tensor, states: Sequence[Tensor], weight1: Tensor, beta2: Tensor, weight2: Tensor) -> None:
    """Update both moving averages of Adam and its variants."""
    states[0].lerp_(g, weight1)
    states[1].mul_(beta2).addcmul_(g, g * weight2)
