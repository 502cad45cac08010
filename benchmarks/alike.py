"""Whether rows are the same to the bit in any company: random small models, as 1, 2, 7, 17 and 33 rows.

Few parameters, odd widths, odd batches, functions that are rounded otherwise at the end of a tensor, operands that all
rows share: where CPU kernels leave the most to chance. Each model that the probe lets be rows trains two epochs as 33
rows of several optimizers, then as fewer, and as 33 of which most are dropped after the first epoch. Every row's
parameters, buffers, optimizer state, metrics and outputs must be those that it had among 33.

    python benchmarks/alike.py
    python benchmarks/alike.py --models 500 --seed 1000
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.space.config import Digits, TrialConfig
from pipeline.space.optimizers import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, RMSprop
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import Constant
from pipeline.training.precision import arithmetic
from pipeline.training.rows.model import Company
from pipeline.training.rows.probe import Finding, probe
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.workload import Split, Workload

CPU = torch.device("cpu")
ROWS, FEWER = 33, (17, 7, 2, 1)
EPOCHS = 2
DROPPED = tuple(row for row in range(ROWS) if row % 3 == 1 or row > 27)


class Gate(nn.Module):
    """Multiplies by a function of one number that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs, each multiplied."""
        return inputs * torch.sigmoid(self.strength)


class Soft(nn.Module):
    """A maximum of each number and one that depends on its place, the same in all rows."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the smooth maximum."""
        return torch.logaddexp(inputs, torch.linspace(-1, 1, inputs.shape[-1]))


class RootMeanSquare(nn.Module):
    """Normalises along the last dimension."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs, each divided."""
        return inputs * torch.rsqrt(inputs.pow(2).mean(-1, keepdim=True) + 1e-6)


class Cumulative(nn.Module):
    """Sums along the last dimension."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum up to each number."""
        return inputs.sigmoid().cumsum(-1)


ACTIVATIONS = (
    nn.PReLU,
    Gate,
    Soft,
    RootMeanSquare,
    Cumulative,
    lambda: nn.SELU(inplace=True),
    lambda: nn.LeakyReLU(0.07, inplace=True),
    lambda: nn.Softplus(beta=2, threshold=1),
    lambda: nn.Softmax(dim=-1),
    nn.ReLU,
    nn.GELU,
    lambda: nn.GELU(approximate="tanh"),
    nn.Tanh,
    nn.SiLU,
    nn.Sigmoid,
    nn.ELU,
    nn.Softplus,
    nn.Mish,
    nn.LogSigmoid,
    nn.Hardswish,
)
OPTIMIZERS = (
    SGD(base_lr=0.1, momentum=0.9),
    AdamW(base_lr=1e-2),
    RMSprop(base_lr=1e-3),
    Adam(base_lr=3e-3),
    SGD(base_lr=0.01, weight_decay=0.1),
    NAdam(base_lr=1e-3),
    Adadelta(base_lr=1.0),
    Adagrad(base_lr=1e-2),
)


def of_one_hot(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss of numbers as one of classes."""
    return lambda outputs, classes: loss(outputs, F.one_hot(classes, outputs.shape[-1]).to(outputs.dtype))


LOSSES = (
    F.cross_entropy,
    F.cross_entropy,
    functools.partial(F.cross_entropy, label_smoothing=0.1),
    of_one_hot(F.mse_loss),
    of_one_hot(F.binary_cross_entropy_with_logits),
    of_one_hot(functools.partial(F.smooth_l1_loss, beta=0.3)),
    of_one_hot(functools.partial(F.huber_loss, delta=0.7)),
    of_one_hot(lambda outputs, targets: torch.logaddexp(outputs - targets, targets - outputs).mean()),
)


def main() -> int:
    """Try the models and say which differ; exit status 1 if any does."""
    parser = argparse.ArgumentParser(description="random small models: are rows the same in any company?")
    parser.add_argument("--models", type=int, default=200, help="how many to try (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first model (default: %(default)s)")
    arguments = parser.parse_args()
    tally: Counter[str] = Counter()
    differ = 0
    started = time.perf_counter()
    for seed in range(arguments.seed, arguments.seed + arguments.models):
        kind, workload, config = drawn(seed)
        with arithmetic(config, CPU):
            finding = probe(workload, config, device=CPU, dtype=torch.float32)
            if finding.plain_because:
                tally[f"{kind}, plain: {finding.plain_because}"] += 1
                continue
            tally[f"{kind}, {described(finding.company)}"] += 1
            if places := list(differences(workload, config, finding)):
                differ += 1
                print(f"seed {seed}: {kind}, {described(finding.company)}, {', '.join(places)}", flush=True)
    for what, count in sorted(tally.items()):
        print(f"{count:5}  {what}")
    print(f"{differ} of {arguments.models} models differ, {time.perf_counter() - started:.0f} s")
    return 1 if differ else 0


def drawn(seed: int) -> tuple[str, Workload, TrialConfig]:
    """Return what kind of model a seed gives, the model with its data, and how its trials train."""
    draw = random.Random(seed)
    kind, inputs, classes, build_model = draw.choice(KINDS)(draw)
    data = torch.Generator().manual_seed(seed)

    def split(samples: int) -> Split:
        return Split(inputs(samples, data), torch.randint(0, classes, (samples,), generator=data))

    workload = Workload(
        name="drawn",
        build_model=build_model,
        train=split(draw.randint(40, 200)),
        val=split(draw.choice([20, 100, 333, 441])),
        test=split(20),
        loss=draw.choice(LOSSES),
        metrics={},
    )
    config = TrialConfig(
        workload=Digits(model="mlp"),
        epochs=EPOCHS,
        batch_size=draw.choice([1, 2, 4, 8, 16, 17, 32, 64]),
        seed=0,
        optimizer=OPTIMIZERS[0],
        scheduler=Constant(),
        param_groups=groups(draw, build_model()),
        channels_last=kind == "convolutional" and draw.random() < 0.3,
    )
    return kind, workload, config


def groups(draw: random.Random, model: nn.Module) -> dict[str, ParamGroup]:
    """Draw which parameters are frozen: none, two thirds of the time."""
    names = [name for name, _ in model.named_parameters()]
    frozen = draw.sample(names, draw.randint(1, len(names) - 1)) if draw.random() < 1 / 3 and len(names) > 1 else []
    rest = {"all": ParamGroup(pattern=("*",))}
    return {"frozen": ParamGroup(pattern=tuple(frozen), lr_ratio=0.0), **rest} if frozen else rest


Inputs = Callable[[int, torch.Generator], Tensor]
"""Makes so many samples."""
Drawn = tuple[str, Inputs, int, Callable[[], nn.Module]]
"""A kind of model, its samples, the classes, and what makes it."""


def numbers(draw: random.Random, *shape: int) -> Inputs:
    """Return what makes samples of a shape: normal, or as large as what is not normalised, whole numbers perhaps."""
    size, whole = draw.choice([1, 1, 1, 100, 1000]), draw.random() < 0.3

    def make(samples: int, generator: torch.Generator) -> Tensor:
        values = size * torch.randn(samples, *shape, generator=generator)
        return values.abs().round() if whole and size > 1 else values

    return make


def mlp(draw: random.Random) -> Drawn:
    """Draw layers of 1 to 40 units."""
    sizes = [draw.randint(1, 40) for _ in range(draw.randint(1, 4))]
    activation, normed, bias, dropout, classes = ends(draw)

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for one, other in itertools.pairwise(sizes):
            layers.append(nn.Linear(one, other, bias=bias))
            norm = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}[normed](other)
            layers += [norm, activation(), nn.Dropout(dropout)]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))

    return "mlp", numbers(draw, sizes[0]), classes, build


def convolutional(draw: random.Random) -> Drawn:
    """Draw convolutions of images."""
    channels = [draw.choice([1, 3, 4, 8]), *(draw.choice([2, 4, 5, 7, 8, 16]) for _ in range(draw.randint(1, 3)))]
    side, stride, kernel = (draw.choice(some) for some in ([6, 7, 8, 12], [1, 1, 2], [1, 3, 5]))
    pool = draw.choice([None, nn.MaxPool2d, nn.AvgPool2d])
    activation, normed, bias, dropout, classes = ends(draw)

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for one, other in itertools.pairwise(channels):
            layers.append(nn.Conv2d(one, other, kernel, padding=kernel // 2, stride=stride, bias=bias))
            norm = {"batch": nn.BatchNorm2d(other), "layer": nn.GroupNorm(1, other), "none": nn.Identity()}[normed]
            layers += [norm, activation(), nn.Dropout(dropout)]
        layers.append(pool(2, ceil_mode=True) if pool else nn.Identity())
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))

    return "convolutional", numbers(draw, channels[0], side, side), classes, build


def convolutional_1d(draw: random.Random) -> Drawn:
    """Draw convolutions of series."""
    channels, width, length = draw.choice([1, 3]), draw.choice([4, 5, 9, 16]), draw.choice([8, 13, 30])
    activation, _, bias, dropout, classes = ends(draw)

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(channels, width, 3, padding=1, bias=bias),
            activation(),
            nn.Conv1d(width, width, 3, bias=bias),
            activation(),
            nn.Dropout(dropout),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(width, classes),
        )

    return "convolutional 1d", numbers(draw, channels, length), classes, build


def attention(draw: random.Random) -> Drawn:
    """Draw a block of a transformer."""
    width = draw.choice([6, 8, 16])
    _, _, _, dropout, classes = ends(draw)
    function = draw.choice([nn.ReLU(), nn.GELU(), nn.SiLU()])

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(width, 2, 13, dropout, function, batch_first=True)
            self.head = nn.Linear(width, classes)

        def forward(self, inputs: Tensor) -> Tensor:
            logits: Tensor = self.head(self.block(inputs).mean(dim=1))
            return logits

    return "attention", numbers(draw, 5, width), classes, Block


def embeddings(draw: random.Random) -> Drawn:
    """Draw a table of vectors, a function of them, and a layer on them all."""
    words, width, length = draw.choice([5, 30]), draw.choice([1, 3, 6, 8]), draw.choice([1, 3, 5])
    activation, _, bias, dropout, classes = ends(draw)

    def build() -> nn.Module:
        vectors = [nn.Embedding(words, width), activation(), nn.Dropout(dropout), nn.Flatten()]
        return nn.Sequential(*vectors, nn.Linear(width * length, classes, bias=bias))

    return (
        "embeddings",
        lambda samples, generator: torch.randint(0, words, (samples, length), generator=generator),
        classes,
        build,
    )


KINDS = (mlp, convolutional, convolutional_1d, attention, embeddings)


def ends(draw: random.Random) -> tuple[Callable[[], nn.Module], str, bool, float, int]:
    """Draw an activation, a normalization, whether there is a bias, a rate of dropout, and how many classes."""
    return (
        draw.choice(ACTIVATIONS),
        draw.choice(["none", "batch", "layer"]),
        draw.random() < 0.8,
        draw.choice([0.0, 0.0, 0.3]),
        draw.randint(2, 12),
    )


def differences(workload: Workload, config: TrialConfig, finding: Finding) -> Iterator[str]:
    """Yield, for each number of rows, the first row that is not what it was among the most rows, and in what."""

    def seen(numbers: range, dropped: Collection[int] = ()) -> dict[int, dict[str, Any]]:
        configs = {n: dataclasses.replace(config, optimizer=OPTIMIZERS[n % len(OPTIMIZERS)]) for n in numbers}
        seeded = finding.draws_random_numbers
        rows = FusedTrials(configs, workload, device=CPU, seeded=seeded, company=finding.company)
        epochs = [rows.train_epoch()]
        for number in dropped:
            rows.drop(number)
        epochs += [rows.train_epoch() for _ in range(EPOCHS - 1)]
        outputs = {name: dict(zip(rows.configs, rows.outputs(name), strict=True)) for name in ("val", "test")}
        return {
            int(number): {
                **state,
                **{f"outputs of {name}": its[int(number)] for name, its in outputs.items()},
                "metrics": [epoch[int(number)].metrics for epoch in epochs],
            }
            for number, state in rows.state_dict().items()
        }

    expected = seen(range(ROWS))
    starts = {count: count % len(OPTIMIZERS) for count in FEWER}  # not always the same ones
    companies = {f"{count} rows": seen(range(start, start + count)) for count, start in starts.items()}
    companies["after others were dropped"] = seen(range(ROWS), DROPPED)
    for company, its in companies.items():
        for number, what in its.items():
            if number not in expected:
                continue
            unlike = [name for name, value in what.items() if not same_bits(value, expected[number][name])]
            if unlike:
                yield f"{company}: trial {number}'s {' and '.join(unlike)}"
                break


def same_bits(one: Any, other: Any) -> bool:
    """Say whether two states are the same."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return all(same_bits(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    return bool(one == other)


def described(company: Company) -> str:
    """Return what rows are computed with, in words."""
    words = [f"multiples of {company.multiple}"] if company.multiple > 1 else []
    words += [f"at most {max(company.spare.values())} spare"] if any(company.spare.values()) else []
    words += ["a lone one plain"] if company.lone_is_plain else []
    return ", ".join(words) or "as they are"


if __name__ == "__main__":
    sys.exit(main())
