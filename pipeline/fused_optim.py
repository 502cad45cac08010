"""Update rules of optimizers on a matrix with one trial per row, each equal to its `torch.optim` twin.

A rule is two functions. `coefficients` turns hyperparameters into numbers, once per epoch, on the CPU, in float64, as
PyTorch does with Python floats. `update` is elementwise arithmetic on the matrix, once per step, with each coefficient
as a column: no row can notice another, and on a GPU nothing waits for the host.

Shapes: hyperparameters and coefficients (step, row, group); parameters, gradients and state (row, parameter), cut to
the columns of one group; coefficients in `update` (row, 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

Hyper = Mapping[str, Tensor]
"""Hyperparameter name to (step, row, group), float64, on the CPU; `lr` and all else as PyTorch's `param_groups` say."""
Carry = dict[str, Tensor]
"""Name to (row, group): what `coefficients` needs from one epoch to the next."""


class Rule(Protocol):
    """One optimizer, with its boolean options decided."""

    states: tuple[str, ...]
    """Names of its state matrices (row, parameter), which begin as zeros unless `initial` says otherwise."""

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Sequence[Tensor]:
        """Return what `update` needs, each (step, row, group).

        Args:
            hyper: Of each step of an epoch.
            steps: (step, 1, 1), numbers of the epoch's updates, counted from 1 over the run.
            carry: Read and written.
        """
        ...

    def update(self, p: Tensor, g: Tensor, states: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
        """Update parameters `p` and `states` in place from gradients `g`, which it may overwrite."""
        ...


class SGD:
    """`torch.optim.SGD`; a momentum of 0 is a buffer that forgets at once."""

    def __init__(self, *, nesterov: bool) -> None:
        self.states: tuple[str, ...] = ("momentum_buffer",)
        self.nesterov = nesterov

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Sequence[Tensor]:
        """Return lr, weight decay, momentum, and the gradient's weight, which is 1 at first and without momentum."""
        whole = (steps == 1) | (hyper["momentum"] == 0)
        weight = torch.where(whole, 1.0, 1 - hyper["dampening"])
        return hyper["lr"], hyper["weight_decay"], hyper["momentum"], weight

    def update(self, p: Tensor, g: Tensor, states: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
        """See `Rule.update`."""
        lr, weight_decay, momentum, weight = coefficients
        (buffer,) = states
        g.addcmul_(p, weight_decay)
        buffer.mul_(momentum).addcmul_(g, weight)
        step = g.addcmul_(buffer, momentum) if self.nesterov else buffer
        p.addcmul_(step, lr, value=-1)


class Adam:
    """`torch.optim.Adam` and, with `decoupled` weight decay, `torch.optim.AdamW`."""

    def __init__(self, *, amsgrad: bool, decoupled: bool) -> None:
        self.states: tuple[str, ...] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")
        self.amsgrad = amsgrad
        self.decoupled = decoupled

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Sequence[Tensor]:
        """Return the decay, both moments' weights, the second's bias correction, eps and the step size."""
        beta1, beta2 = hyper["beta1"], hyper["beta2"]
        step_size = hyper["lr"] / (1 - beta1**steps)
        correction2 = (1 - beta2**steps).sqrt()
        return _decay(hyper, self.decoupled), 1 - beta1, beta2, 1 - beta2, correction2, hyper["eps"], step_size

    def update(self, p: Tensor, g: Tensor, states: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
        """See `Rule.update`."""
        decay, weight1, beta2, weight2, correction2, eps, step_size = coefficients
        _apply_decay(p, g, decay, self.decoupled)
        _moments(g, states, weight1, beta2, weight2)
        second = torch.maximum(states[2], states[1], out=states[2]) if self.amsgrad else states[1]
        denominator = second.sqrt().div_(correction2).add_(eps)
        p.addcdiv_(torch.mul(states[0], step_size, out=g), denominator, value=-1)


class NAdam:
    """`torch.optim.NAdam`; the product of its momenta is carried along in float32, as PyTorch does."""

    def __init__(self, *, decoupled: bool) -> None:
        self.states: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        self.decoupled = decoupled

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Sequence[Tensor]:
        """Return the decay, the moments' weights, eps, and the weights of the gradient and of the first moment."""
        beta1, beta2, lr = hyper["beta1"], hyper["beta2"], hyper["lr"]
        mu = beta1 * (1 - 0.5 * 0.96 ** (steps * hyper["momentum_decay"]))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((steps + 1) * hyper["momentum_decay"]))
        product = carry.get("mu_product", torch.ones(mu.shape[1:], dtype=torch.get_default_dtype()))
        products = []
        for factor in mu:
            product = product * factor.to(product.dtype)
            products.append(product.double())
        carry["mu_product"] = product
        through = torch.stack(products)
        of_gradient = lr * (1 - mu) / (1 - through)
        of_moment = lr * mu_next / (1 - through * mu_next)
        correction2 = 1 - beta2**steps
        decay, eps = _decay(hyper, self.decoupled), hyper["eps"]
        return decay, 1 - beta1, beta2, 1 - beta2, correction2, eps, of_gradient, of_moment

    def update(self, p: Tensor, g: Tensor, states: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
        """See `Rule.update`."""
        decay, weight1, beta2, weight2, correction2, eps, of_gradient, of_moment = coefficients
        _apply_decay(p, g, decay, self.decoupled)
        _moments(g, states, weight1, beta2, weight2)
        denominator = states[1].div(correction2).sqrt_().add_(eps)
        p.addcdiv_(g.mul_(of_gradient).addcmul_(states[0], of_moment), denominator, value=-1)


class RAdam:
    """`torch.optim.RAdam`: without the second moment until its variance is tractable."""

    def __init__(self, *, decoupled: bool) -> None:
        self.states: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        self.decoupled = decoupled

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Sequence[Tensor]:
        """Return the decay, the moments' weights, eps, the step size, and whether the second moment divides it."""
        beta1, beta2 = hyper["beta1"], hyper["beta2"]
        correction2 = 1 - beta2**steps
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * steps * beta2**steps / correction2
        rectified = rho > 5
        rectification = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)).sqrt()
        step_size = hyper["lr"] / (1 - beta1**steps)
        step_size = torch.where(rectified, step_size * correction2.sqrt() * rectification, step_size)
        decay, eps = _decay(hyper, self.decoupled), hyper["eps"]
        return decay, 1 - beta1, beta2, 1 - beta2, eps, step_size, rectified.double()

    def update(self, p: Tensor, g: Tensor, states: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
        """See `Rule.update`."""
        decay, weight1, beta2, weight2, eps, step_size, rectified = coefficients
        _apply_decay(p, g, decay, self.decoupled)
        _moments(g, states, weight1, beta2, weight2)
        denominator = torch.where(rectified != 0, states[1].sqrt().add_(eps), 1.0)
        p.addcdiv_(torch.mul(states[0], step_size, out=g), denominator, value=-1)


class Adamax:
    """`torch.optim.Adamax`."""

    states: tuple[str, ...] = ("exp_avg", "exp_inf")

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Sequence[Tensor]:
        """Return weight decay, the moments' weights, eps and the step size."""
        step_size = hyper["lr"] / (1 - hyper["beta1"] ** steps)
        return hyper["weight_decay"], 1 - hyper["beta1"], hyper["beta2"], hyper["eps"], step_size

    def update(self, p: Tensor, g: Tensor, states: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
        """See `Rule.update`."""
        weight_decay, weight1, beta2, eps, step_size = coefficients
        exp_avg, exp_inf = states
        g.addcmul_(p, weight_decay)
        exp_avg.lerp_(g, weight1)
        torch.maximum(exp_inf.mul_(beta2), g.abs_().add_(eps), out=exp_inf)
        p.addcdiv_(torch.mul(exp_avg, step_size, out=g), exp_inf, value=-1)


class RMSprop:
    """`torch.optim.RMSprop`; a momentum of 0 is a buffer that forgets at once."""

    def __init__(self, *, centered: bool) -> None:
        self.states: tuple[str, ...] = ("square_avg", "momentum_buffer", "grad_avg") if centered else ("square_avg", "momentum_buffer")
        self.centered = centered

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Sequence[Tensor]:
        """Return lr, weight decay, the average's weights, eps and momentum."""
        alpha = hyper["alpha"]
        return hyper["lr"], hyper["weight_decay"], alpha, 1 - alpha, hyper["eps"], hyper["momentum"]

    def update(self, p: Tensor, g: Tensor, states: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
        """See `Rule.update`."""
        lr, weight_decay, alpha, weight, eps, momentum = coefficients
        square_avg, buffer = states[:2]
        g.addcmul_(p, weight_decay)
        square_avg.mul_(alpha).addcmul_(g, g * weight)
        if self.centered:
            grad_avg = states[2].lerp_(g, weight)
            average = square_avg.addcmul(grad_avg, grad_avg, value=-1).sqrt_().add_(eps)
        else:
            average = square_avg.sqrt().add_(eps)
        buffer.mul_(momentum).addcdiv_(g, average)
        p.addcmul_(buffer, lr, value=-1)


class Adagrad:
    """`torch.optim.Adagrad`; its sum begins at `initial_accumulator_value`."""

    states: tuple[str, ...] = ("sum",)

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Sequence[Tensor]:
        """Return the decayed rate, weight decay, eps, and what the sum begins with, at the first step."""
        rate = hyper["lr"] / (1 + (steps - 1) * hyper["lr_decay"])
        start = torch.where(steps == 1, hyper["initial_accumulator_value"], 0.0)
        return rate, hyper["weight_decay"], hyper["eps"], start

    def update(self, p: Tensor, g: Tensor, states: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
        """See `Rule.update`."""
        rate, weight_decay, eps, start = coefficients
        (total,) = states
        g.addcmul_(p, weight_decay)
        total.add_(start).addcmul_(g, g)
        p.addcdiv_(g.mul_(rate), total.sqrt().add_(eps), value=-1)


class Adadelta:
    """`torch.optim.Adadelta`."""

    states: tuple[str, ...] = ("square_avg", "acc_delta")

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Sequence[Tensor]:
        """Return lr, weight decay, the averages' weights and eps."""
        rho = hyper["rho"]
        return hyper["lr"], hyper["weight_decay"], rho, 1 - rho, hyper["eps"]

    def update(self, p: Tensor, g: Tensor, states: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
        """See `Rule.update`."""
        lr, weight_decay, rho, weight, eps = coefficients
        square_avg, acc_delta = states
        g.addcmul_(p, weight_decay)
        square_avg.mul_(rho).addcmul_(g, g * weight)
        delta = acc_delta.add(eps).sqrt_().div_(square_avg.add(eps).sqrt_()).mul_(g)
        acc_delta.mul_(rho).addcmul_(delta, delta * weight)
        p.addcmul_(delta, lr, value=-1)


class ASGD:
    """`torch.optim.ASGD`, without the average of the parameters, which training does not read.

    Its own rate, `eta`, follows from the rate of the step before.
    """

    states: tuple[str, ...] = ()

    def coefficients(self, hyper: Hyper, steps: Tensor, carry: Carry) -> Sequence[Tensor]:
        """Return eta, weight decay, and what the decay by lambd leaves."""
        lr, lambd, alpha = hyper["lr"], hyper["lambd"], hyper["alpha"]
        scalar = torch.get_default_dtype()  # of PyTorch's own eta
        following = (lr / (1 + lambd * lr * steps) ** alpha).to(scalar)
        first = carry.get("eta", lr[0].to(scalar))
        carry["eta"] = following[-1]
        eta = torch.cat([first[None], following[:-1]]).double()
        return eta, hyper["weight_decay"], 1 - lambd * eta

    def update(self, p: Tensor, g: Tensor, states: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
        """See `Rule.update`."""
        eta, weight_decay, left = coefficients
        g.addcmul_(p, weight_decay)
        p.mul_(left).addcmul_(g, eta, value=-1)


def build_rule(torch_class: str, options: Mapping[str, bool]) -> Rule | None:
    """Return the rule of a `torch.optim` class with these boolean options; None if it has none here."""
    match torch_class:
        case "SGD":
            return SGD(nesterov=options["nesterov"])
        case "Adam" | "AdamW":
            return Adam(amsgrad=options["amsgrad"], decoupled=torch_class == "AdamW")
        case "NAdam":
            return NAdam(decoupled=options["decoupled_weight_decay"])
        case "RAdam":
            return RAdam(decoupled=options["decoupled_weight_decay"])
        case "RMSprop":
            return RMSprop(centered=options["centered"])
        case "Adamax":
            return Adamax()
        case "Adagrad":
            return Adagrad()
        case "Adadelta":
            return Adadelta()
        case "ASGD":
            return ASGD()
    return None


def _decay(hyper: Hyper, decoupled: bool) -> Tensor:
    return 1 - hyper["lr"] * hyper["weight_decay"] if decoupled else hyper["weight_decay"]


def _apply_decay(p: Tensor, g: Tensor, decay: Tensor, decoupled: bool) -> None:
    if decoupled:
        p.mul_(decay)
    else:
        g.addcmul_(p, decay)


def _moments(g: Tensor, states: Sequence[Tensor], weight1: Tensor, beta2: Tensor, weight2: Tensor) -> None:
    """Move both moving averages of Adam and its kin."""
    states[0].lerp_(g, weight1)
    states[1].mul_(beta2).addcmul_(g, g * weight2)
