"""Measure a search on data of CIFAR-10's shape with a ResNet-9: time, images per second, part of the device's limit.

Random strategies (SGD with momentum or AdamW, step decay) train in groups as `pipeline.search` trains them: as rows of
matrices if the workload allows it, pruned by successive halving after each epoch, on batches that are shifted and
flipped on the device. Images and labels are random, so nothing is learned and pruning ranks noise, but the computation
is that of a search on CIFAR-10. Optuna and MLflow are not used.

`images/s` counts training images of all trials. The device's limit is the rate that a product of two large matrices
reaches in the same precision. The part of the limit counts only the floating-point operations of convolutions and
products: forward, backward and evaluation. The benchmark needs only torch:

    python benchmarks/cifar_search.py
    python benchmarks/cifar_search.py --precision bf16 --batch-size 512
    python benchmarks/cifar_search.py --device cpu --samples 128 --epochs 2 --trials 4 --group 2
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import random
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package need not be installed

from pipeline.space.config import Precision, TorchvisionDataset, TrialConfig
from pipeline.space.optimizers import SGD, AdamW, Optimizer
from pipeline.space.param_groups import ParamGroup
from pipeline.space.pruners import Score, SuccessiveHalving, score
from pipeline.space.schedules import Step
from pipeline.space.trial import EpochMetrics
from pipeline.training.epoch import autocast
from pipeline.training.executor import LocalExecutor
from pipeline.training.precision import precision
from pipeline.workloads.images import Normalization, shift_and_flip
from pipeline.workloads.models import ResNet9
from pipeline.workloads.workload import Metric, Split, Workload, accuracy

CUDA_SAMPLES, CPU_SAMPLES = 45_000, 256
"""Training images; CIFAR-10 has 45,000, and 5,000 that validate."""
TRAIN_PER_VAL = 9
"""Training images per validation image."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    device: torch.device
    samples: int
    epochs: int
    trials: int
    group: int
    rows: int | None
    batch_size: int
    precision: Precision
    min_resource: int
    pruning: bool


@dataclass
class Done:
    """The counts of a search."""

    trial_epochs: int = 0
    diverged: int = 0
    pruned: int = 0
    complete: int = 0


def main() -> None:
    """Search, and print the measurements."""
    options = _parse()
    device = options.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    configs = {number: build_config(number, options) for number in range(options.trials)}
    peak = measured_peak(device, configs[0])
    print(f"limit: a product of matrices in {options.precision} reaches {peak / 1e12:.3g} TFLOP/s")
    workload = build_workload(options)
    flops = epoch_flops(workload, configs[0], device)
    start = time.perf_counter()
    processes = torch.get_num_threads()
    trainer = LocalExecutor(workload, configs[0], device=device, rows=options.rows, processes=processes)
    _wait(device)
    ready = time.perf_counter()
    how = f"plain, {trainer.plain_because}" if trainer.plain_because else "rows of matrices"
    print(f"{options.trials} trials of {options.epochs} epochs, {options.samples:,} images, in groups: {how}")
    done = search(trainer, configs, options)
    _wait(device)
    end = time.perf_counter()
    seconds = end - ready
    reached = done.trial_epochs * flops / seconds
    print(f"{'complete':24}{done.complete:12}   pruned {done.pruned}, diverged {done.diverged}")
    print(f"{'probing, s':24}{ready - start:12.1f}")
    print(f"{'search, s':24}{seconds:12.1f}")
    print(f"{'trial-epochs':24}{done.trial_epochs:12}")
    print(f"{'trial-epochs/s':24}{done.trial_epochs / seconds:12.3f}")
    print(f"{'images/s':24}{done.trial_epochs * options.samples / seconds:12,.0f}")
    print(f"{'TFLOP/s':24}{reached / 1e12:12.3g}   {reached / peak:.1%} of the limit")
    if device.type == "cuda":
        print(f"{'memory, GiB':24}{torch.cuda.max_memory_allocated(device) / 2**30:12.1f}")


def search(trainer: LocalExecutor, configs: Mapping[int, TrialConfig], options: Options) -> Done:
    """Train every trial to its end, group after group."""
    done = Done()
    pruner = SuccessiveHalving(min_resource=options.min_resource, max_resource=options.epochs // 2)
    seen: dict[int, list[Score]] = defaultdict(list)
    numbers = list(configs)
    for first in range(0, len(numbers), options.group):
        members = numbers[first : first + options.group]
        of_group = {number: configs[number] for number in members}
        group = trainer.build(of_group)
        print(f"  trials {members[0]} to {members[-1]}: {trainer.describe(of_group)}", flush=True)
        left = set(members)
        for epoch in range(1, options.epochs + 1):
            results = group.train_epoch()
            done.trial_epochs += len(results)
            scores = {number: _score(metrics) for number, metrics in results.items() if metrics.finished}
            done.diverged += len(results) - len(scores)
            left &= scores.keys()
            if options.pruning and epoch < options.epochs:
                stopped = pruner.stops(epoch, scores, seen[epoch])
                seen[epoch] += scores.values()
                for number in stopped:
                    group.drop(number)
                done.pruned += len(stopped)
                left -= stopped
            if not left:
                break
        done.complete += len(left)
    return done


def build_workload(options: Options) -> Workload:
    """Return random images of CIFAR-10's shape, and the model."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return Split(images, torch.randint(10, (count,), generator=generator))

    return Workload(
        name="cifar10 · resnet9",
        build_model=lambda: ResNet9(3, 10),
        train=split(options.samples),
        val=split(max(1, options.samples // TRAIN_PER_VAL)),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
        preprocess=Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        augment=shift_and_flip(4, flip=True),
    )


def build_config(number: int, options: Options) -> TrialConfig:
    """Return a random strategy that depends on the trial's number alone."""
    draw = random.Random(number)
    optimizer: Optimizer = SGD(base_lr=10 ** draw.uniform(-2.5, -0.5), momentum=0.9, weight_decay=5e-4)
    if number % 2:
        optimizer = AdamW(base_lr=10 ** draw.uniform(-4, -2))
    return TrialConfig(
        workload=TorchvisionDataset(name="cifar10"),
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=0,
        precision=options.precision,
        optimizer=optimizer,
        scheduler=Step(step_size=draw.randint(1, max(1, options.epochs // 2)), gamma=10 ** draw.uniform(-1, -0.1)),
        param_groups={
            "head": ParamGroup(pattern=("fc.*",), lr_ratio=10 ** draw.uniform(-0.5, 0.5)),
            "body": ParamGroup(pattern=("*",)),
        },
    )


def epoch_flops(workload: Workload, config: TrialConfig, device: torch.device) -> float:
    """Return the floating-point operations of one trial-epoch, counted on a few images."""
    model = workload.build_model().to(device)
    images = torch.zeros(8, 3, 32, 32, device=device)
    with autocast(config, device):
        with FlopCounterMode(display=False) as step:
            model(images).float().sum().backward()
        with FlopCounterMode(display=False) as evaluation, torch.no_grad():
            model(images)
    flops = step.get_total_flops() * len(workload.train) + evaluation.get_total_flops() * len(workload.val)
    return float(flops / len(images))


def measured_peak(device: torch.device, config: TrialConfig) -> float:
    """Return the floating-point operations per second of a product of two large matrices."""
    size = 8_192 if device.type == "cuda" else 1_024
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    # On a CPU all threads count, because they share the matrices of a search; there is no tf32 on a CPU.
    with precision(config, device) if device.type == "cuda" else contextlib.nullcontext():
        for _ in range(10):
            _wait(device)
            start = time.perf_counter()
            torch.mm(a, b)
            _wait(device)
            seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds))


def _score(metrics: EpochMetrics) -> Score:
    return score(metrics.metrics["val/accuracy"], metrics.metrics["val/loss"], direction="maximize")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parse() -> Options:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default), help=f"(default: {default})")
    samples_help = f"images to train on (default: {CUDA_SAMPLES:,}; on a CPU {CPU_SAMPLES})"
    parser.add_argument("--samples", type=int, metavar="N", help=samples_help)
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="epochs per trial (default: 8)")
    parser.add_argument("--trials", type=int, default=50, metavar="N", help="(default: 50)")
    parser.add_argument("--group", type=int, default=8, metavar="N", help="trials at once (default: 8)")
    rows_help = "at most this many in a matrix (default: as many as are fastest)"
    parser.add_argument("--rows", type=int, metavar="N", help=rows_help)
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="(default: 128)")
    choices = ["fp32", "tf32", "bf16"]
    parser.add_argument("--precision", choices=choices, default="fp32", help="fp32, tf32 or bf16 (default: fp32)")
    rung_help = "epochs before the first rung of successive halving (default: 1)"
    parser.add_argument("--min-resource", type=int, default=1, metavar="N", help=rung_help)
    pruning_help = "train every trial for all epochs"
    parser.add_argument("--no-pruning", dest="pruning", action="store_false", help=pruning_help)
    arguments = vars(parser.parse_args())
    samples = CPU_SAMPLES if arguments["device"].type == "cpu" else CUDA_SAMPLES
    return Options(**{**arguments, "samples": arguments["samples"] or samples})


if __name__ == "__main__":
    main()
