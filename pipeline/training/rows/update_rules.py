"""Update rules of optimizers on a matrix with one trial per row, each equal to its `torch.optim` twin.

Every optimizer here makes the same step: add the weight decay to the gradient, turn the gradient into a direction,
shrink the parameters, and move them along the direction:

    g = g + l2 * p        d = direction(g)        p = shrink * p - rate * d

Rules differ in the direction and in what these numbers are. `coefficients` computes the numbers for a whole epoch, on
the CPU, in float64, as PyTorch does with Python floats; `direction` is elementwise arithmetic once per step. So rows
do not affect each other, and on a GPU nothing waits for the host.
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
"""Name to (row, group): what `coefficients` needs from one epoch to the next."""


@dataclass(frozen=True)
class Coefficients:
    """The numbers of an epoch's steps, float64."""

    rate: Tensor
    """(step, row, group)"""
    direction: Sequence[Tensor]
    """What `direction` takes, each (step, row, group), alike in all groups."""
    l2: Tensor | None = None
    """(step, row, group); None: no weight decay in the gradient."""
    shrink: Tensor | None = None
    """(step, row, group); None: parameters are not shrunk."""


class Rule(Protocol):
    """One optimizer, with its boolean options decided."""

    states: tuple[str, ...]
    """Names of its state matrices (row, parameter), which begin as zeros."""

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Coefficients:
        """Return an epoch's numbers.

        Args:
            hyper: Of each step.
            steps: (step, 1, 1), numbers of the updates, counted from 1 over the run.
            carry: Read and written.
        """
        ...

    def direction(self, g: Tensor, states: Sequence[Tensor], c: Sequence[Tensor]) -> Tensor:
        """Return the direction (row, parameter) of a step and update `states` in place.

        Args:
            g: Gradients (row, parameter), which may be overwritten.
            states: As `self.states` names them.
            c: The step's `Coefficients.direction`, each (row, 1).
        """
        ...


class SGD:
    """`torch.optim.SGD`; a momentum of 0 is a buffer that forgets at once."""

    def __init__(self, *, nesterov: bool) -> None:
        self.states: tuple[str, ...] = ("momentum_buffer",)
        self.nesterov = nesterov

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Coefficients:
        """See `Rule`; the gradient counts in full at the first step and without momentum."""
        in_full = (steps == 1) | (hyper["momentum"] == 0)
        weight = torch.where(in_full, 1.0, 1 - hyper["dampening"])
        return Coefficients(hyper["lr"], (hyper["momentum"], weight), l2=hyper["weight_decay"])

    def direction(self, g: Tensor, states: Sequence[Tensor], c: Sequence[Tensor]) -> Tensor:
        """See `Rule`."""
        momentum, weight = c
        buffer = states[0].mul_(momentum).addcmul_(g, weight)
        return g.addcmul_(buffer, momentum) if self.nesterov else buffer


class Adam:
    """`torch.optim.Adam` and, with `decoupled` weight decay, `torch.optim.AdamW`."""

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
    """`torch.optim.NAdam`; the product of its momenta is carried along in float32, as PyTorch does."""

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
        of_gradient, of_moment = (1 - mu) / (1 - through), mu_next / (1 - through * mu_next)
        direction = (1 - beta1, beta2, 1 - beta2, 1 - _power(beta2, steps), hyper["eps"], of_gradient, of_moment)
        return Coefficients(hyper["lr"], direction, **_decay(hyper, self.decoupled))

    def direction(self, g: Tensor, states: Sequence[Tensor], c: Sequence[Tensor]) -> Tensor:
        """See `Rule`."""
        weight1, beta2, weight2, correction2, eps, of_gradient, of_moment = c
        _moments(g, states, weight1, beta2, weight2)
        denominator = states[1].div(correction2).sqrt_().add_(eps)
        return g.mul_(of_gradient).addcmul_(states[0], of_moment).div_(denominator)


class RAdam:
    """`torch.optim.RAdam`: without the second moment until its variance is tractable."""

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
    """`torch.optim.Adamax`."""

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
    """`torch.optim.RMSprop`; a momentum of 0 is a buffer that forgets at once."""

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
    """`torch.optim.Adagrad`; its sum begins at `initial_accumulator_value`."""

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
    """`torch.optim.Adadelta`."""

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

    Its own rate, `eta`, follows from the rate of the step before.
    """

    states: tuple[str, ...] = ()

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Coefficients:
        """See `Rule`."""
        lr, lambd, alpha = hyper["lr"], hyper["lambd"], hyper["alpha"]
        scalar = torch.get_default_dtype()  # of PyTorch's own eta
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
"""Class of `pipeline.space.optimizers` to what makes its rule from its boolean options."""


def has_rule(optimizer: type[Optimizer]) -> bool:
    """Say whether trials of an optimizer can be rows."""
    return optimizer.__name__ in RULES


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    """Return base ** exponent as Python computes it, and so `torch.optim`; a tensor's power rounds by its size."""

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
    """Return the weight decay where it belongs: decoupled from the gradient or in it."""
    return {"shrink": 1 - hyper["lr"] * hyper["weight_decay"]} if decoupled else {"l2": hyper["weight_decay"]}


def _moments(g: Tensor, states: Sequence[Tensor], weight1: Tensor, beta2: Tensor, weight2: Tensor) -> None:
    """Move both moving averages of Adam and its kin."""
    states[0].lerp_(g, weight1)
    states[1].mul_(beta2).addcmul_(g, g * weight2)
