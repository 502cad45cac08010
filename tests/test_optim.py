from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tiny import BODY_AND_HEAD, STEPS_PER_EPOCH, TinyModel, tiny_config
from torch import nn
from torch.optim import lr_scheduler

from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import (
    ASGD,
    OPTIMIZERS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import (
    SCHEDULERS,
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
from pipeline.training.optim import Strategy, build_optimizers, hidden_matrices

DIRECTIONS = {"train/loss": "minimize", "val/loss": "minimize", "val/accuracy": "maximize"}
METRICS = {"train/loss": 1.0, "val/loss": 1.0, "val/accuracy": 0.5}


def build_strategy(config: TrialConfig, model: nn.Module, *, steps_per_epoch: int = STEPS_PER_EPOCH) -> Strategy:
    head = {name: p for name, p in model.named_parameters() if name.startswith("head.")}
    body = {name: p for name, p in model.named_parameters() if name not in head}
    groups = {"head": [*head.items()], "body": [*body.items()], "all": [*body.items(), *head.items()]}
    return Strategy(
        config,
        {name: groups[name] for name in config.param_groups},
        steps_per_epoch=steps_per_epoch,
        directions=DIRECTIONS,
        hidden_matrices=hidden_matrices(model),
    )


def recorded_rates(
    config: TrialConfig, *, steps_per_epoch: int = 1, metrics: Sequence[Mapping[str, float]] = ()
) -> dict[str, list[float]]:
    """Return, group by group, the rate of every step, or of every epoch if the schedule moves by epochs."""
    strategy = build_strategy(config, TinyModel(), steps_per_epoch=steps_per_epoch)
    rates: dict[str, list[float]] = {group: [] for group in config.param_groups}
    for epoch in range(config.epochs):
        for step in range(steps_per_epoch):
            if step == 0 or strategy.per_step:
                for group, rate in strategy.learning_rates().items():
                    rates[group].append(rate)
            strategy.step()
        strategy.end_epoch(metrics[epoch] if metrics else METRICS)
    return rates


def torch_rates(
    build: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler],
    *,
    count: int,
    lr: float = 1.0,
    plateau_values: Sequence[float] = (),
) -> list[float]:
    """Return the rates of PyTorch's own scheduler over one parameter, as a training loop would use them."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = build(optimizer)
    rates = []
    for index in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(plateau_values[index])
        else:
            scheduler.step()
    return rates


def warmed(
    optimizer: torch.optim.Optimizer, *, start: float, length: int, main: Callable[[], lr_scheduler.LRScheduler]
) -> lr_scheduler.LRScheduler:
    ramp = lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=length)
    return lr_scheduler.SequentialLR(optimizer, [ramp, main()], milestones=[length])


@dataclass(frozen=True)
class Case:
    """A schedule from a base rate of 1, its rates worked by hand, and the same schedule written for PyTorch."""

    schedule: Scheduler
    rates: list[float]
    torch: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
    epochs: int | None = None
    """None: as many as rates."""


CASES = {
    "constant": Case(Constant(), [1, 1, 1], lambda o: lr_scheduler.LambdaLR(o, lambda _: 1.0)),
    "step": Case(
        Step(step_size=2, gamma=0.1),
        [1, 1, 0.1, 0.1, 0.01, 0.01],
        lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.1),
    ),
    "step, by steps": Case(
        Step(step_size=3, gamma=0.5, interval="step"),
        [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25],
        lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
        epochs=2,
    ),
    "multistep": Case(
        MultiStep(milestones=(1, 3), gamma=0.5),
        [1, 0.5, 0.5, 0.25, 0.25],
        lambda o: lr_scheduler.MultiStepLR(o, milestones=[1, 3], gamma=0.5),
    ),
    "exponential": Case(
        Exponential(gamma=0.5), [1, 0.5, 0.25, 0.125], lambda o: lr_scheduler.ExponentialLR(o, gamma=0.5)
    ),
    "polynomial to the end": Case(  # (1 - epoch / 4)²
        Polynomial(power=2.0),
        [1, 0.5625, 0.25, 0.0625],
        lambda o: lr_scheduler.PolynomialLR(o, total_iters=4, power=2.0),
    ),
    "polynomial that ends early": Case(
        Polynomial(total_iters=2), [1, 0.5, 0, 0], lambda o: lr_scheduler.PolynomialLR(o, total_iters=2)
    ),
    "cosine to the end": Case(  # (1 + cos(π · epoch / 4)) / 2
        Cosine(),
        [1, 0.8535533905932737, 0.5, 0.1464466094067262],
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    ),
    "cosine with a floor": Case(  # 0.2 + 0.8 · (1 + cos(π · epoch / 2)) / 2
        Cosine(T_max=2, eta_min=0.2),
        [1, 0.6, 0.2, 0.6, 1],
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=2, eta_min=0.2),
    ),
    "cosine with warm restarts": Case(  # a cycle of 2, then one of 4
        CosineWarmRestarts(T_0=2, T_mult=2),
        [1, 0.5, 1, 0.8535533905932737, 0.5, 0.1464466094067262],
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    ),
    "linear to the end": Case(
        Linear(),
        [1, 0.75, 0.5, 0.25],
        lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=4),
    ),
    "linear upwards": Case(
        Linear(start_factor=0.5, end_factor=1.0, total_iters=2),
        [0.5, 0.75, 1, 1],
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.5, end_factor=1.0, total_iters=2),
    ),
    "warm-up, then constant": Case(
        Constant(warmup=3, warmup_start_factor=0.25),
        [0.25, 0.5, 0.75, 1, 1],
        lambda o: warmed(o, start=0.25, length=3, main=lambda: lr_scheduler.LambdaLR(o, lambda _: 1.0)),
    ),
    "warm-up, then step": Case(
        Step(step_size=2, gamma=0.1, warmup=2),
        [0.1, 0.55, 1, 1, 0.1, 0.1],
        lambda o: warmed(o, start=0.1, length=2, main=lambda: lr_scheduler.StepLR(o, step_size=2, gamma=0.1)),
    ),
    "warm-up, then cosine to the end": Case(
        Cosine(warmup=2),
        [0.1, 0.55, 1, 0.8535533905932737, 0.5, 0.1464466094067262],
        lambda o: warmed(o, start=0.1, length=2, main=lambda: lr_scheduler.CosineAnnealingLR(o, T_max=4)),
    ),
    "one cycle": Case(  # up from 1/5 to the peak in 4 steps, down to 1/5/4 in 5
        OneCycle(pct_start=0.5, anneal_strategy="linear", div_factor=5.0, final_div_factor=4.0),
        [0.2, 0.4, 0.6, 0.8, 1, 0.81, 0.62, 0.43, 0.24, 0.05],
        lambda o: lr_scheduler.OneCycleLR(
            o,
            max_lr=1.0,
            total_steps=10,
            pct_start=0.5,
            anneal_strategy="linear",
            div_factor=5.0,
            final_div_factor=4.0,
            cycle_momentum=False,
        ),
        epochs=2,
    ),
    "cyclic, triangular": Case(
        Cyclic(max_lr_ratio=3.0, step_size_up=2),
        [1, 2, 3, 2, 1, 2, 3, 2],
        lambda o: lr_scheduler.CyclicLR(o, base_lr=1.0, max_lr=3.0, step_size_up=2, cycle_momentum=False),
        epochs=2,
    ),
    "cyclic, triangular2, slow down": Case(
        Cyclic(max_lr_ratio=3.0, step_size_up=1, step_size_down=2, mode="triangular2"),
        [1, 3, 2, 1, 2, 1.5, 1, 1.5],
        lambda o: lr_scheduler.CyclicLR(
            o, base_lr=1.0, max_lr=3.0, step_size_up=1, step_size_down=2, mode="triangular2", cycle_momentum=False
        ),
        epochs=2,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_recorded_rates_are_those_worked_by_hand_and_those_of_pytorch(case: Case) -> None:
    epochs = case.epochs or len(case.rates)
    config = tiny_config(SGD(base_lr=1.0), case.schedule, epochs=epochs)
    rates = recorded_rates(config, steps_per_epoch=len(case.rates) // epochs)
    assert rates["body"] == pytest.approx(case.rates, abs=1e-12)  # sums and products round
    assert rates["body"] == torch_rates(case.torch, count=len(case.rates))


@pytest.mark.parametrize(
    ("metric", "values"),
    [("val/loss", [1.0, 0.9, 0.9, 0.9, 0.8, 0.8]), ("val/accuracy", [0.0, 0.1, 0.1, 0.1, 0.2, 0.2])],
)
def test_plateau_lowers_the_rate_when_its_metric_has_not_improved_for_longer_than_patience(
    metric: str, values: list[float]
) -> None:
    config = tiny_config(SGD(base_lr=1.0), Plateau(metric=metric, factor=0.1, patience=1), epochs=6)
    rates = recorded_rates(config, metrics=[METRICS | {metric: value} for value in values])
    mode: Any = "min" if metric == "val/loss" else "max"
    reference = torch_rates(
        lambda o: lr_scheduler.ReduceLROnPlateau(o, mode=mode, factor=0.1, patience=1), count=6, plateau_values=values
    )
    assert rates["body"] == [1, 1, 1, 1, 0.1, 0.1]
    assert rates["body"] == reference


def test_an_epoch_schedule_holds_its_rate_within_an_epoch() -> None:
    strategy = build_strategy(tiny_config(SGD(base_lr=1.0), Exponential(gamma=0.5)), TinyModel())
    rates = []
    for _ in range(2):
        for _ in range(3):
            rates.append(strategy.learning_rates()["body"])
            strategy.step()
        strategy.end_epoch(METRICS)
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5]


def test_ratios_multiply_the_base_rate_under_the_schedule() -> None:
    groups = {"head": ParamGroup(pattern=("head.*",), lr_ratio=4.0), "body": ParamGroup(pattern=("*",), lr_ratio=0.5)}
    config = tiny_config(SGD(base_lr=0.5), Step(step_size=1, gamma=0.5), epochs=3, param_groups=groups)
    assert recorded_rates(config) == {"head": [2, 1, 0.5], "body": [0.25, 0.125, 0.0625]}


def test_ratios_multiply_the_peak_of_one_cycle_and_the_bounds_of_a_cycle() -> None:
    groups = {"head": ParamGroup(pattern=("head.*",), lr_ratio=4.0), "body": ParamGroup(pattern=("*",))}
    for schedule in (OneCycle(), Cyclic(max_lr_ratio=3.0, step_size_up=2)):
        rates = recorded_rates(tiny_config(None, schedule, param_groups=groups), steps_per_epoch=5)
        assert rates["head"] == pytest.approx([4 * rate for rate in rates["body"]], rel=1e-12)
        assert max(rates["head"]) == pytest.approx(0.4 if isinstance(schedule, OneCycle) else 1.2)


def test_a_frozen_group_records_zero_and_gets_no_torch_group() -> None:
    groups = {"head": ParamGroup(pattern=("head.*",)), "body": ParamGroup(pattern=("*",), lr_ratio=0.0)}
    config = tiny_config(SGD(base_lr=0.1, weight_decay=0.1), epochs=2, param_groups=groups)
    strategy = build_strategy(config, TinyModel())
    assert [[group["group"] for group in o.param_groups] for o in strategy.optimizers] == [["head"]]
    assert recorded_rates(config) == {"head": [0.1, 0.1], "body": [0, 0]}


def test_a_groups_own_weight_decay_takes_the_place_of_the_optimizers() -> None:
    groups = {"head": ParamGroup(pattern=("head.*",), weight_decay=0.0), "body": ParamGroup(pattern=("*",))}
    strategy = build_strategy(tiny_config(AdamW(base_lr=0.1, weight_decay=0.3), param_groups=groups), TinyModel())
    (optimizer,) = strategy.optimizers
    assert {group["group"]: group["weight_decay"] for group in optimizer.param_groups} == {"head": 0.0, "body": 0.3}


HYPERPARAMETERS: dict[str, tuple[Optimizer, type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (
        SGD(base_lr=0.2, weight_decay=0.3, momentum=0.8, nesterov=True),
        torch.optim.SGD,
        {"lr": 0.2, "weight_decay": 0.3, "momentum": 0.8, "dampening": 0.0, "nesterov": True},
    ),
    "adam": (
        Adam(base_lr=0.2, weight_decay=0.3, beta1=0.7, beta2=0.8, eps=1e-3, amsgrad=True),
        torch.optim.Adam,
        {"lr": 0.2, "weight_decay": 0.3, "betas": (0.7, 0.8), "eps": 1e-3, "amsgrad": True},
    ),
    "adamw": (
        AdamW(base_lr=0.2, weight_decay=0.3, beta1=0.7, beta2=0.8, eps=1e-3, amsgrad=True),
        torch.optim.AdamW,
        {"lr": 0.2, "weight_decay": 0.3, "betas": (0.7, 0.8), "eps": 1e-3, "amsgrad": True},
    ),
    "nadam": (
        NAdam(
            base_lr=0.2,
            weight_decay=0.3,
            beta1=0.7,
            beta2=0.8,
            eps=1e-3,
            momentum_decay=0.1,
            decoupled_weight_decay=True,
        ),
        torch.optim.NAdam,
        {"betas": (0.7, 0.8), "eps": 1e-3, "momentum_decay": 0.1, "decoupled_weight_decay": True, "weight_decay": 0.3},
    ),
    "radam": (
        RAdam(base_lr=0.2, weight_decay=0.3, beta1=0.7, beta2=0.8, eps=1e-3, decoupled_weight_decay=True),
        torch.optim.RAdam,
        {"lr": 0.2, "weight_decay": 0.3, "betas": (0.7, 0.8), "eps": 1e-3, "decoupled_weight_decay": True},
    ),
    "adamax": (
        Adamax(base_lr=0.2, weight_decay=0.3, beta1=0.7, beta2=0.8, eps=1e-3),
        torch.optim.Adamax,
        {"lr": 0.2, "weight_decay": 0.3, "betas": (0.7, 0.8), "eps": 1e-3},
    ),
    "rmsprop": (
        RMSprop(base_lr=0.2, weight_decay=0.3, alpha=0.7, eps=1e-3, momentum=0.6, centered=True),
        torch.optim.RMSprop,
        {"lr": 0.2, "weight_decay": 0.3, "alpha": 0.7, "eps": 1e-3, "momentum": 0.6, "centered": True},
    ),
    "adagrad": (
        Adagrad(base_lr=0.2, weight_decay=0.3, lr_decay=0.1, initial_accumulator_value=0.5, eps=1e-3),
        torch.optim.Adagrad,
        {"lr": 0.2, "weight_decay": 0.3, "lr_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3},
    ),
    "adadelta": (
        Adadelta(base_lr=0.2, weight_decay=0.3, rho=0.7, eps=1e-3),
        torch.optim.Adadelta,
        {"lr": 0.2, "weight_decay": 0.3, "rho": 0.7, "eps": 1e-3},
    ),
    "asgd": (
        ASGD(base_lr=0.2, weight_decay=0.3, lambd=0.01, alpha=0.6, t0=100.0),
        torch.optim.ASGD,
        {"lr": 0.2, "weight_decay": 0.3, "lambd": 0.01, "alpha": 0.6, "t0": 100.0},
    ),
    "adafactor": (
        Adafactor(base_lr=0.2, weight_decay=0.3, beta2_decay=-0.5, d=2.0),
        torch.optim.Adafactor,
        {"lr": 0.2, "weight_decay": 0.3, "beta2_decay": -0.5, "d": 2.0},
    ),
    "rprop": (
        Rprop(base_lr=0.2, eta_minus=0.4, eta_plus=1.3, step_size_min=1e-5, step_size_max=10.0),
        torch.optim.Rprop,
        {"lr": 0.2, "etas": (0.4, 1.3), "step_sizes": (1e-5, 10.0)},
    ),
    "muon": (
        Muon(
            base_lr=0.2, weight_decay=0.3, momentum=0.8, nesterov=False, ns_steps=4, adjust_lr_fn="original", beta1=0.7
        ),
        torch.optim.Muon,
        {
            "lr": 0.2,
            "weight_decay": 0.3,
            "momentum": 0.8,
            "nesterov": False,
            "ns_steps": 4,
            "adjust_lr_fn": "original",
        },
    ),
}


def test_the_table_of_hyperparameters_has_every_optimizer_and_every_field() -> None:
    assert HYPERPARAMETERS.keys() == OPTIMIZERS.keys()
    for name, (optimizer, _, _) in HYPERPARAMETERS.items():
        defaults = OPTIMIZERS[name](base_lr=0.001)
        same = [
            f.name for f in dataclasses.fields(optimizer) if getattr(optimizer, f.name) == getattr(defaults, f.name)
        ]
        # Nesterov momentum needs the default dampening; Muon's beta2 is seen in the AdamW part below.
        assert same == {"sgd": ["dampening"], "muon": ["beta2"]}.get(name, [])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_hyperparameter_arrives_in_torchs_optimizer(name: str) -> None:
    optimizer, torch_class, expected = HYPERPARAMETERS[name]
    first = build_strategy(tiny_config(optimizer), TinyModel()).optimizers[0]
    assert type(first) is torch_class
    for group in first.param_groups:
        assert {key: group[key] for key in expected} == expected
    assert {key: first.defaults[key] for key in expected} == expected


class SignSGD(torch.optim.Optimizer):
    """Stands for an optimizer of another package."""

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * parameter.grad.sign()


def halve(optimizer: torch.optim.Optimizer, *, every: int) -> lr_scheduler.LRScheduler:
    """Stands for a schedule that PyTorch lacks."""
    return lr_scheduler.LambdaLR(optimizer, lambda index: 0.5 ** (index // every))


@dataclass(frozen=True, kw_only=True)
class Signs(Optimizer):
    name: ClassVar[str] = "signs"
    torch_class: ClassVar[str] = f"{__name__}.SignSGD"
    beta1: float = 0.7
    beta2: float = 0.8


@dataclass(frozen=True, kw_only=True)
class Halve(Scheduler):
    name: ClassVar[str] = "halve"
    torch_class: ClassVar[str] = f"{__name__}.halve"
    every: int = 2


def test_an_optimizer_and_a_schedule_may_come_from_another_module() -> None:
    config = tiny_config(Signs(base_lr=1.0), Halve(), epochs=4)
    (optimizer,) = build_strategy(config, TinyModel()).optimizers
    assert type(optimizer) is SignSGD
    assert [group["betas"] for group in optimizer.param_groups] == [(0.7, 0.8)] * 2
    for parameter in (model := TinyModel()).parameters():
        parameter.grad = torch.ones_like(parameter)
    strategy, rates = build_strategy(config, model), []
    for _ in range(config.epochs):
        rates.append(strategy.learning_rates()["body"])
        strategy.step()
        strategy.end_epoch(METRICS)
    assert rates == [1, 1, 0.5, 0.5]


def test_dampening_arrives_in_torchs_sgd() -> None:
    (optimizer,) = build_strategy(tiny_config(SGD(base_lr=0.1, momentum=0.9, dampening=0.4)), TinyModel()).optimizers
    assert [group["dampening"] for group in optimizer.param_groups] == [0.4, 0.4]


class WithEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


def test_hidden_matrices_leave_out_embeddings_convolutions_vectors_and_the_output_layer() -> None:
    assert hidden_matrices(WithEmbedding()) == {"hidden.weight"}


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest_at_the_same_rates() -> None:
    groups = {"head": ParamGroup(pattern=("head.*",), lr_ratio=3.0), "body": ParamGroup(pattern=("*",))}
    config = tiny_config(
        Muon(base_lr=0.1, beta1=0.7, beta2=0.8),
        Step(step_size=1, gamma=0.5),
        epochs=2,
        param_groups=groups,
    )
    model = WithEmbedding()
    muon, adamw = build_strategy(config, model).optimizers
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [(g["group"], g["lr"]) for g in muon.param_groups] == [("body", 0.1)]
    assert [p is model.hidden.weight for g in muon.param_groups for p in g["params"]] == [True]
    assert [(g["group"], len(g["params"])) for g in adamw.param_groups] == [("head", 2), ("body", 7 - 1)]
    assert [(g["betas"], g["weight_decay"]) for g in adamw.param_groups] == [((0.7, 0.8), 0.1)] * 2
    assert recorded_rates(config) == {"head": pytest.approx([0.3, 0.15]), "body": [0.1, 0.05]}


def test_muon_without_a_hidden_matrix_is_adamw_alone() -> None:
    parameters = {"all": [("weight", nn.Parameter(torch.zeros(2, 2)))]}
    groups = {"all": ParamGroup(pattern=("*",))}
    (optimizer,) = build_optimizers(tiny_config(Muon(base_lr=0.1), param_groups=groups), parameters)
    assert type(optimizer) is torch.optim.AdamW


SCHEDULES = [
    Constant(),
    Step(step_size=2),
    MultiStep(milestones=(1, 3)),
    Exponential(gamma=0.9),
    Polynomial(),
    Cosine(warmup=1),
    CosineWarmRestarts(T_0=2),
    OneCycle(),
    Cyclic(max_lr_ratio=2.0, step_size_up=3),
    Linear(warmup=2, interval="step"),
    Plateau(patience=0),
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_schedule_runs_with_every_optimizer_that_may_have_it(name: str) -> None:
    assert {schedule.name for schedule in SCHEDULES} == SCHEDULERS.keys()
    for schedule in SCHEDULES:
        if name == "rprop" and schedule.name != "constant":
            continue  # a rule of the search space forbids it
        model = TinyModel()
        config = tiny_config(HYPERPARAMETERS[name][0], schedule, param_groups=BODY_AND_HEAD)
        strategy = build_strategy(config, model)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for _ in range(config.epochs):
            for _ in range(STEPS_PER_EPOCH):
                strategy.zero_grad()
                model(torch.ones(2, 6)).square().sum().backward()
                strategy.step()
            strategy.end_epoch(METRICS)
        assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "muon", "adam", "adamw", "nadam", "radam", "adamax"])
@pytest.mark.parametrize(
    "schedule",
    [OneCycle(cycle_momentum=True), Cyclic(max_lr_ratio=2.0, step_size_up=10, cycle_momentum=True)],
    ids=lambda schedule: str(schedule.name),
)
def test_cycle_momentum_moves_momentum_or_beta1_against_the_rate(name: str, schedule: OneCycle | Cyclic) -> None:
    strategy = build_strategy(tiny_config(OPTIMIZERS[name](base_lr=0.1), schedule), TinyModel())
    (first, *_) = strategy.optimizers
    rates, momenta = [], []
    for _ in range(20):
        group = first.param_groups[0]
        rates.append(group["lr"])
        momenta.append(group["betas"][0] if "betas" in group else group["momentum"])
        strategy.step()
    assert momenta[0] == pytest.approx(schedule.max_momentum)
    assert min(momenta) == pytest.approx(schedule.base_momentum, abs=0.02)
    assert rates.index(max(rates)) == momenta.index(min(momenta))
