"""The code of a person who brings an optimizer and a schedule: tests copy this file into a folder of theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum; Chen et al. (2023), https://arxiv.org/abs/2302.06675."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: Any = False,
        foreach: bool | None = None,
    ) -> None:
        if not 0 <= betas[0] < 1:
            raise ValueError(f"betas must be below 1, got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.sign = -1 if maximize else 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = self.sign * parameter.grad
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(momentum.lerp(gradient, 1 - beta1).sign(), alpha=-group["lr"])
                momentum.lerp_(gradient, 1 - beta2)


class Noisy(torch.optim.Optimizer):
    """Gradient descent with noise, from the random state of torch."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * (parameter.grad + torch.randn_like(parameter)))


class Counts(torch.optim.Optimizer):
    """Gradient descent whose rate falls with a count of steps that no state has."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] / self.count * parameter.grad)


class Arrays(torch.optim.Optimizer):
    """An optimizer whose state is an array of NumPy."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Count the steps of each parameter."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("count", np.zeros(1))[0] += 1


class NeedsClosure(torch.optim.Optimizer):
    """An optimizer that evaluates the loss itself, as LBFGS does."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        """Evaluate the loss."""
        closure()


class Rateless(torch.optim.Optimizer):
    """An optimizer without a rate."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)


class Fixed(torch.optim.Optimizer):
    """An optimizer that takes no rate."""

    def __init__(self, params: Any, momentum: float = 0.9) -> None:
        super().__init__(params, {"momentum": momentum})


STEPS = 3


def noam(step: int, total: int, warmup_steps: int, power: float = -0.5) -> float:
    """Rise linearly, then fall by a power; Vaswani et al. (2017), https://arxiv.org/abs/1706.03762."""
    count = step + 1
    return float(min(count**power, count * warmup_steps**-1.5))


def below(step: int, total: int, floor: float = 0.0) -> float:
    """Fall by a half each time, also below 0."""
    return max(1 - step / 2, floor)


def nothing(step, total):  # type: ignore[no-untyped-def]
    """Return no factor."""


def divides(step: int, total: int) -> float:
    """Raise at the third step."""
    return 1 / (2 - step)


def turned(total: int, step: int) -> float:
    """Take the arguments in another order."""
    return 1.0


def taken(step: int, total: int, interval: int = 3) -> float:
    """Take an argument with the name of a key that every schedule has."""
    return 1.0
