"""Whether a trial that is trained again in its recorded places repeats every metric to the bit.

For each of 26 small models, a group of mixed trials (six optimizers with a rule for rows, and one without) trains as a
search trains it: in 1 to 3 processes, in some groups with a row limit, while trials leave after some epochs and the
others move to larger or smaller matrices. Then a few of its trials train again, each among copies of itself.

    python benchmarks/replay.py
    python benchmarks/replay.py --trials 400 --seed 1
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.space.config import Own, TrialConfig
from pipeline.space.optimizers import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import OneCycle, Scheduler, Step
from pipeline.space.trial import EpochMetrics
from pipeline.training.executor import LocalExecutor
from pipeline.workloads.digits import DigitsCNN, DigitsMLP, digits
from pipeline.workloads.workload import Metric, Split, Workload, accuracy

CPU = torch.device("cpu")
EPOCHS = 6
FEATURES, CLASSES = 12, 3
FROZEN = {"first": ParamGroup(pattern=("0.*",), lr_ratio=0.0), "rest": ParamGroup(pattern=("*",))}
ALL = {"all": ParamGroup(pattern=("*",))}


class RootMeanSquare(nn.Module):
    """Normalises along the last dimension."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs, each divided."""
        return inputs * torch.rsqrt(inputs.pow(2).mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    """Self-attention over three tokens of four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, feature) to (batch, feature)."""
        q, k, v = self.to_qkv(inputs.unflatten(1, (3, 4))).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1)
        mixed: Tensor = self.out(weights @ v)
        return mixed.flatten(1)


class Embedded(nn.Module):
    """Looks the rounded inputs up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, feature) to (batch, 3 * feature)."""
        vectors: Tensor = self.table(inputs.mul(3).round().long().remainder(16))
        return vectors.flatten(1)


def net(*layers: nn.Module, width: int) -> Callable[[], nn.Module]:
    """Return what makes a first layer, some layers and a head; the layers are only a pattern."""
    return lambda: nn.Sequential(nn.Linear(FEATURES, width), *copy.deepcopy(layers), nn.Linear(width, CLASSES))


def images(*layers: nn.Module, width: int) -> Callable[[], nn.Module]:
    """Return what makes a first convolution of 3×4 images, some layers, and a head over their means."""

    def build() -> nn.Module:
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
        body = [nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, width, 3, padding=1), *copy.deepcopy(layers)]
        return nn.Sequential(nn.Identity(), *body, *head)

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid after 3 units": net(nn.Sigmoid(), width=3),
    "BatchNorm of 3 units, SiLU": net(nn.BatchNorm1d(3), nn.SiLU(), width=3),
    "BatchNorm of 10 units": net(nn.BatchNorm1d(10), nn.ReLU(), width=10),
    "BatchNorm of 33 units": net(nn.BatchNorm1d(33), nn.ReLU(), width=33),
    "GELU by tanh, softplus": net(nn.GELU(approximate="tanh"), nn.Softplus(), width=7),
    "convolution, BatchNorm2d, Mish": images(nn.BatchNorm2d(5), nn.Mish(), width=5),
    "dropout": net(nn.ReLU(), nn.Dropout(0.3), width=19),
    "LayerNorm, ELU": net(nn.LayerNorm(13), nn.ELU(), width=13),
    "attention": lambda: nn.Sequential(nn.Identity(), Attention(), nn.Linear(12, CLASSES)),
    "embedding": lambda: nn.Sequential(nn.Identity(), Embedded(), nn.Linear(36, CLASSES)),
    "one unit": net(nn.Tanh(), width=1),
    "hardswish, PReLU": net(nn.Hardswish(), nn.PReLU(), width=9),
    "root mean square": net(RootMeanSquare(), nn.SELU(), width=17),
    "log-sigmoid": net(nn.LogSigmoid(), width=31),
    "softmax inside": net(nn.Softmax(dim=-1), width=11),
    "CELU, GLU": lambda: nn.Sequential(nn.Linear(FEATURES, 10), nn.CELU(), nn.GLU(), nn.Linear(5, CLASSES)),
    "GroupNorm": images(nn.GroupNorm(2, 6), nn.SiLU(), width=6),
    "two convolutions": images(nn.ReLU(), nn.Conv2d(4, 4, 2), nn.Tanh(), width=4),
    "pooling": images(nn.ReLU(), nn.MaxPool2d(2, padding=1), width=8),
    "deep": net(*[nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()) for _ in range(8)], width=16),
    "wide": net(nn.ReLU(), width=300),
    "InstanceNorm": images(nn.InstanceNorm2d(3, affine=True), nn.Sigmoid(), width=3),
    "bilinear gate": net(nn.Linear(21, 21), nn.Sigmoid(), nn.Linear(21, 21), width=21),
    "alpha dropout": net(nn.SELU(), nn.AlphaDropout(0.2), width=15),
    "digits mlp": DigitsMLP,
    "digits cnn": DigitsCNN,
}


def main() -> int:
    """Train groups, train some of their trials again, and say which differ; exit status 1 if any does."""
    parser = argparse.ArgumentParser(description="are trials repeated to the bit in their recorded places?")
    parser.add_argument("--trials", type=int, default=100, help="how many to train again (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides data, configs and who leaves when")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    started = time.perf_counter()
    tally: Counter[str] = Counter()
    names = list(MODELS)
    differ, done = 0, 0
    while done < arguments.trials:
        name = names[done // 4 % len(names)]
        history, again = group_of(name, draw)
        chosen = draw.sample(sorted(history), min(4, len(history), arguments.trials - done))
        for number in chosen:
            epochs = history[number]
            tally["plain" if epochs[0].placement.rows is None else "rows"] += 1  # type: ignore[union-attr]
            tally["moved to a larger matrix"] += moved_up(epochs)
            tally["alone its metrics differ"] += again(number, alone=True) != without_placement(epochs)
            if again(number) != without_placement(epochs):
                differ += 1
                print(
                    f"{name}: trial {number} differs, {[vars(e.placement) for e in epochs if e.placement]}", flush=True
                )
        done += len(chosen)
    for what, count in sorted(tally.items()):
        print(f"{count:5}  {what}")
    print(f"{differ} of {done} trials differ, {time.perf_counter() - started:.0f} s")
    return 1 if differ else 0


Metrics = list[dict[str, float]]


def group_of(name: str, draw: random.Random) -> tuple[dict[int, list[EpochMetrics]], Callable[..., Metrics]]:
    """Train a group of a model; return each trial's epochs, and what trains one again."""
    batch_size = draw.choice([5, 16, 32])
    workload = digits("cnn") if name.startswith("digits") else vectors(draw, batch_size)
    workload = Workload(**{**vars(workload), "build_model": MODELS[name]})
    freezes = "0.weight" in dict(MODELS[name]().named_parameters())
    configs = mixed(draw, batch_size=batch_size, freezes=freezes)
    processes, rows = draw.choice([1, 2, 3]), draw.choice([None, None, 2, 3, 5])
    executor = LocalExecutor(workload, configs[0], device=CPU, rows=rows, processes=processes)
    group = executor.build(configs)
    history: dict[int, list[EpochMetrics]] = {}
    for _ in range(EPOCHS):
        for number, metrics in group.train_epoch().items():
            if metrics.finished:
                history.setdefault(number, []).append(metrics)
        for number in [number for number in configs if draw.random() < 0.25]:
            group.drop(number)
    executor.close()

    def again(number: int, *, alone: bool = False) -> Metrics:
        placements = [epoch.placement for epoch in history[number] if epoch.placement is not None]
        if alone:
            placements = [type(placements[0])(trainer="plain", threads=1)]
        replayed = executor.build({0: configs[number]}, placement=placements)
        return without_placement([replayed.train_epoch()[0] for _ in history[number]])

    return history, again


def vectors(draw: random.Random, batch_size: int) -> Workload:
    """Return data of 12 numbers in 3 classes, of a size that leaves an odd last batch."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))

    def split(samples: int) -> Split:
        return Split(
            torch.randn(samples, FEATURES, generator=generator), torch.randint(3, (samples,), generator=generator)
        )

    metrics = {"accuracy": Metric(accuracy, "maximize")}
    return Workload(
        name="drawn",
        build_model=nn.Identity,
        train=split(batch_size * draw.randint(2, 6) + draw.randint(2, batch_size)),
        val=split(draw.choice([20, 101, 333])),
        loss=F.cross_entropy,
        metrics=metrics,
    )


def mixed(draw: random.Random, *, batch_size: int, freezes: bool) -> dict[int, TrialConfig]:
    """Return 6 to 14 trials of six optimizers, of which one has no rule for rows."""

    def optimizer() -> Optimizer:
        rate = 10 ** draw.uniform(-4, -1.5)
        cls: type[Any] = draw.choice([SGD, Adam, AdamW, RMSprop, Adagrad, NAdam])
        made: Optimizer = cls(base_lr=rate, weight_decay=draw.choice([0.0, 0.01]))
        return made

    def config(optimizer: Optimizer) -> TrialConfig:
        schedule: Scheduler = draw.choice([Step(step_size=2, gamma=0.5), OneCycle()])
        return TrialConfig(
            workload=Own(function="benchmarks/replay.py:drawn"),
            epochs=EPOCHS,
            batch_size=batch_size,
            seed=0,
            clip_grad_norm=draw.choice([None, None, 0.5]),
            optimizer=optimizer,
            scheduler=schedule,
            param_groups=FROZEN if freezes and draw.random() < 0.2 else ALL,
        )

    rows = [config(optimizer()) for _ in range(draw.randint(5, 13))]
    return dict(enumerate([*rows, config(Adafactor(base_lr=0.01))]))


def moved_up(epochs: list[EpochMetrics]) -> bool:
    """Say whether a trial's matrix ever had more rows than in the epoch before."""
    rows = [epoch.placement.rows for epoch in epochs if epoch.placement and epoch.placement.rows]
    return any(before < after for before, after in itertools.pairwise(rows))


def without_placement(epochs: list[EpochMetrics]) -> Metrics:
    """Return the metrics alone."""
    return [{**epoch.metrics} for epoch in epochs]


if __name__ == "__main__":
    sys.exit(main())
