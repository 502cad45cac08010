"""Trial-epochs per second: the loop people write, the plain trainer, and trials as rows of one matrix.

Each measured side trains the same mix of SGD with momentum, Adam, AdamW and RMSprop, on the same samples, and
evaluates the whole validation split after each epoch:

- `loop`: what one writes from Optuna's PyTorch example. `TensorDataset`, `DataLoader(shuffle=True)`, one trial at a
  time, each batch copied to the device.
- `plain`: the plain trainer, one trial.
- `N trials`: N at once as a search trains them, on a CPU in as many processes: as rows or, where these gain nothing,
  plain.

On a CPU the loop is measured with PyTorch's own number of threads and with one, and the faster of the two counts; not
measured are several loops in as many processes, which is what a ratio on several cores has to be divided by for
the gain per core. Each number of rows is measured in turns with the loop, and a side counts as its fastest turn.

All sides compute in the same `--precision`; on CUDA PyTorch itself would round the factors of convolutions to tf32.
With `--channels-last` all of them lay images and kernels out with the channels last.

The digits are real; `net` (the network of PyTorch's CIFAR-10 tutorial) and `resnet18` see random images of CIFAR-10's
shape, so nothing is said of what they learn. Nor is anything of Optuna, MLflow or a search's start; see
`search_overhead.py` and `peer_search.py`. Needs only torch, torchvision and scikit-learn:

    python benchmarks/throughput.py
    python benchmarks/throughput.py --device cuda --models mlp cnn net resnet18 --json throughput.json
    python benchmarks/throughput.py --device cuda --models resnet18 --precision bf16 --channels-last --rows 1 8
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package need not be installed

from pipeline.space.config import Own, Precision, TrialConfig
from pipeline.space.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import Constant
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import GroupLost
from pipeline.training.epoch import autocast
from pipeline.training.executor import LocalExecutor
from pipeline.training.plain import PlainTrials
from pipeline.training.precision import precision
from pipeline.workloads.data import MAX_EVAL_BATCH, first_batch, samples_of, to_device
from pipeline.workloads.digits import digits
from pipeline.workloads.workload import Metric, Split, Workload, accuracy

CUDA_SAMPLES = 10_000
CPU_SAMPLES = {"net": 512, "resnet18": 128}
"""Random images to train on; a step of resnet18 takes a CPU core seconds."""
BATCH = {"mlp": 64, "cnn": 64, "net": 64, "resnet18": 128}
OPTIMIZERS: tuple[Callable[[float], Optimizer], ...] = (
    lambda rate: SGD(base_lr=rate, momentum=0.9),
    lambda rate: Adam(base_lr=0.1 * rate),
    lambda rate: AdamW(base_lr=0.1 * rate),
    lambda rate: RMSprop(base_lr=0.01 * rate),
)


class TutorialNet(nn.Module):
    """The network of https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html, 62,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, 32, 32) to logits (batch, class)."""
        features = F.max_pool2d(F.relu(self.conv1(images)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2).flatten(1)
        logits: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(features)))))
        return logits


def small_image_resnet18() -> nn.Module:
    """Return torchvision's resnet18 for images of 32×32: a 3×3 stem of stride 1 and no max-pooling."""
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class Trains(Protocol):
    """Some trials that train an epoch at a time."""

    def train_epoch(self) -> Mapping[int, EpochMetrics]:
        """Train an epoch of every trial, evaluate, and return a value per trial."""
        ...


class Loop:
    """One trial as one writes it; `train_epoch` is a group's of one trial, so that all sides are measured alike."""

    def __init__(self, workload: Workload, config: TrialConfig, *, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.device = device
        self.loss = workload.loss
        self.epoch = 0
        self.autocast = functools.partial(autocast, config, device)
        self.layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.model = workload.build_model().to(device).to(memory_format=self.layout)
        self.optimizer = torch_optimizer(self.model, config.optimizer)
        assert isinstance(workload.train, Split)
        assert isinstance(workload.val, Split)
        train, val = (TensorDataset(split.inputs, split.targets) for split in (workload.train, workload.val))
        self.train_loader = DataLoader(train, batch_size=config.batch_size, shuffle=True)
        self.val_loader = DataLoader(val, batch_size=MAX_EVAL_BATCH)

    def train_epoch(self) -> dict[int, EpochMetrics]:
        """Train for an epoch and evaluate."""
        self.model.train()
        for images, labels in self.train_loader:
            self.optimizer.zero_grad()
            with self.autocast():
                loss = self.loss(self.model(self._moved(images)), labels.to(self.device))
            loss.backward()
            self.optimizer.step()
        self.model.eval()
        total, correct, count = 0.0, 0, 0
        with torch.no_grad():
            for images, labels in self.val_loader:
                labels = labels.to(self.device)
                with self.autocast():
                    outputs = self.model(self._moved(images))
                    loss = self.loss(outputs, labels)
                total += loss.item() * len(labels)
                correct += int((outputs.argmax(dim=1) == labels).sum().item())
                count += len(labels)
        self.epoch += 1
        metrics = {"val/loss": total / count, "val/accuracy": correct / count}
        return {0: EpochMetrics(epoch=self.epoch, step=self.epoch * len(self.train_loader), metrics=metrics, lr={})}

    def _moved(self, images: Tensor) -> Tensor:
        return images.to(self.device, memory_format=self.layout if images.ndim == 4 else torch.preserve_format)


@dataclass
class Side:
    """Trials in groups that train one after the other, and the best rate seen of them."""

    groups: Sequence[Trains]
    device: torch.device
    threads: int | None = None
    """On the CPU; None: PyTorch's own number, which a trainer of ours sets itself."""
    best: float = 0.0
    """Trial-epochs per second."""

    def measure(self, seconds: float) -> None:
        """Train whole rounds of all groups for about this long, at least one."""
        trial_epochs = 0
        with _threads(self.threads):
            _wait(self.device)
            start = time.perf_counter()
            while True:
                for group in self.groups:
                    results = group.train_epoch()
                    for metrics in results.values():
                        if not metrics.finished:
                            raise RuntimeError(f"a trial has ended early: {metrics.failed or metrics.diverged}")
                    trial_epochs += len(results)
                _wait(self.device)
                passed = time.perf_counter() - start
                if passed >= seconds:
                    break
        self.best = max(self.best, trial_epochs / passed)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    device: torch.device
    models: Sequence[str]
    rows: Sequence[int]
    processes: int
    """That train at once, as in a search."""
    seconds: float
    repeats: int
    samples: int | None
    precision: Precision
    channels_last: bool
    peak_tflops: float | None
    json: Path | None


def main() -> None:
    """Measure every model, print tables, and write the figures as JSON."""
    options = _parse()
    print(_machine(options.device))
    peaks = {"given": options.peak_tflops} if options.peak_tflops else dict(_measured_peaks(options.device))
    print("peak " + ", ".join(f"{value:.3g} TFLOP/s ({name})" for name, value in peaks.items()))
    figures = {}
    for model in options.models:
        config = build_config(model, 0, options)
        with precision(config, options.device) if options.device.type == "cuda" else contextlib.nullcontext():
            figures[model] = measure_model(model, options)
        _print_model(model, figures[model], peaks)
    if options.json:
        report = {"machine": _machine(options.device), "peak_tflops": peaks, "models": figures}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measure_model(model: str, options: Options) -> dict[str, Any]:
    """Return a model's rates, in trial-epochs per second, and what one trial-epoch computes."""
    device = options.device
    workload = build_workload(model, device, options.samples)
    configs = {number: build_config(model, number, options) for number in range(max(len(OPTIMIZERS), *options.rows))}
    loop_threads = [None, 1] if device.type == "cpu" and torch.get_num_threads() > 1 else [None]
    loops = [
        Side([Loop(workload, configs[number], device=device) for number in range(len(OPTIMIZERS))], device, threads)
        for threads in loop_threads
    ]
    placed = to_device(workload, device=device, dtype=torch.float32)
    plain = Side(
        [PlainTrials({n: configs[n]}, placed, device=device, draws=()) for n in range(len(OPTIMIZERS))],
        device,
        threads=1,
    )
    _in_turns([*loops, plain], options)
    faster = max(loops, key=lambda loop: loop.best)
    table: list[dict[str, Any]] = []
    for count in options.rows:
        try:
            table.append(_measure_rows(workload, configs, count, faster, plain, options))
        except (RuntimeError, GroupLost) as error:  # as PyTorch's OutOfMemoryError is
            print(f"{model}: {count} trials at once end with {type(error).__name__}: {str(error)[:120]}")
            break
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if table[-1]["note"] and count >= options.processes:
            print(f"{model}: {count} trials at once {table[-1]['note']}")
            break
    return {
        "parameters": sum(p.numel() for p in workload.build_model().parameters()),
        "train_samples": len(workload.train),
        "val_samples": len(workload.val),
        "batch": BATCH[model],
        "loop": {_thread_name(loop.threads): loop.best for loop in loops},
        "plain": plain.best,
        "trials": table,
        "precision": options.precision + (", channels last" if options.channels_last else ""),
        "gflop_per_trial_epoch": _epoch_flops(workload, BATCH[model], device) / 1e9,
    }


def _measure_rows(
    workload: Workload, configs: Mapping[int, TrialConfig], count: int, loop: Side, plain: Side, options: Options
) -> dict[str, Any]:
    """Measure `count` trials at once in turns with the loop, and one trial with the plain trainer too."""
    trials = range(max(count, len(OPTIMIZERS)))
    trainers = [
        LocalExecutor(workload, configs[0], device=options.device, processes=options.processes) for _ in trials[::count]
    ]
    groups = [
        trainer.build({number: configs[number] for number in trials[start : start + count]})
        for start, trainer in zip(trials[::count], trainers, strict=True)
    ]
    chosen = trainers[0].rules.row_limit or count
    side, loop, plain = (dataclasses.replace(side, best=0.0) for side in (Side(groups, options.device), loop, plain))
    _in_turns([loop, plain, side] if count == 1 else [loop, side], options)
    rows = trainers[0].rules.row_limit or count
    note = f"do not fit into memory, {rows} do" if rows < chosen else None
    if (because := trainers[0].plain_because) is not None:
        note = f"are no rows of a matrix: {because}"
    return {
        "trials": count,
        "as": trainers[0].describe({number: configs[number] for number in trials[:count]}),
        "rate": side.best,
        "loop": loop.best,
        "plain": plain.best or None,
        "note": note,
    }


def build_workload(model: str, device: torch.device, samples: int | None) -> Workload:
    """Return the data and model of a name."""
    if model in ("mlp", "cnn"):
        return digits(model)
    count = samples or (CPU_SAMPLES[model] if device.type == "cpu" else CUDA_SAMPLES)
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randn(count, 3, 32, 32, generator=generator)
        return Split(images, torch.randint(0, 10, (count,), generator=generator))

    return Workload(
        name=model,
        build_model={"net": TutorialNet, "resnet18": small_image_resnet18}[model],
        train=split(count),
        val=split(max(1, count // 5)),
        test=split(1),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
    )


def build_config(model: str, number: int, options: Options | None = None) -> TrialConfig:
    """Return a trial: the optimizers in turn, rates that none diverges at, head and body at rates of their own."""
    rate = 0.01 * (1 + number % 7 / 7)
    return TrialConfig(
        workload=Own(function=f"benchmark:{model}"),
        epochs=1_000_000,
        batch_size=BATCH[model],
        seed=0,
        optimizer=OPTIMIZERS[number % len(OPTIMIZERS)](rate),
        scheduler=Constant(),
        precision=options.precision if options else "fp32",
        channels_last=options.channels_last if options else False,
        param_groups={"head": ParamGroup(pattern=("fc*",), lr_ratio=2.0), "body": ParamGroup(pattern=("*",))},
    )


def torch_optimizer(model: nn.Module, optimizer: Optimizer) -> torch.optim.Optimizer:
    """Return the torch optimizer of the loop, with the same two parameter groups."""
    head = [p for name, p in model.named_parameters() if name.startswith("fc")]
    body = [p for name, p in model.named_parameters() if not name.startswith("fc")]
    rate = optimizer.base_lr
    groups: list[dict[str, Any]] = [{"params": head, "lr": 2 * rate}, {"params": body}]
    match optimizer:
        case SGD(momentum=momentum):
            return torch.optim.SGD(groups, lr=rate, momentum=momentum)
        case AdamW():
            return torch.optim.AdamW(groups, lr=rate)
        case Adam():
            return torch.optim.Adam(groups, lr=rate)
        case _:
            return torch.optim.RMSprop(groups, lr=rate)


def _in_turns(sides: Sequence[Side], options: Options) -> None:
    """Warm every side up, then measure all of them in turns."""
    for side in sides:
        side.measure(0.0)
        side.best = 0.0
    for repeat in range(options.repeats):
        for side in sides[:: 1 if repeat % 2 == 0 else -1]:
            side.measure(options.seconds)


def _epoch_flops(workload: Workload, batch: int, device: torch.device) -> float:
    """Return the floating-point operations of one trial-epoch, counted on one plain step and one evaluated batch."""
    model = workload.build_model().to(device)
    first = first_batch(samples_of(to_device(workload, device=device, dtype=torch.float32), "train"), batch)
    inputs, targets = first.inputs, first.targets
    with FlopCounterMode(display=False) as step:
        workload.loss(model(inputs), targets).backward()
    with FlopCounterMode(display=False) as evaluation, torch.no_grad():
        model(inputs)
    flops = step.get_total_flops() * len(workload.train) + evaluation.get_total_flops() * len(workload.val)
    return float(flops / len(inputs))


def _measured_peaks(device: torch.device) -> Iterator[tuple[str, float]]:
    """Yield what a large matrix product reaches in each precision, in TFLOP/s; on a CPU in float32 alone."""
    size = 8_192 if device.type == "cuda" else 1_024
    names: tuple[Precision, ...] = ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32",)
    for name in names:
        config = dataclasses.replace(build_config("mlp", 0), precision=name)
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = []
        with precision(config, device) if device.type == "cuda" else contextlib.nullcontext():
            for _ in range(8):
                _wait(device)
                start = time.perf_counter()
                torch.mm(a, b)
                _wait(device)
                seconds.append(time.perf_counter() - start)
        yield f"{name} matmul", 2 * size**3 / min(seconds) / 1e12


def _print_model(model: str, figures: Mapping[str, Any], peaks: Mapping[str, float]) -> None:
    table: list[dict[str, Any]] = figures["trials"]
    loop = max(figures["loop"].values())
    print(
        f"\n{model}: {figures['parameters']:,} parameters, {figures['train_samples']:,} samples to train on and "
        f"{figures['val_samples']:,} to validate, batch {figures['batch']}, {figures['precision']}"
    )
    print(f"{'':24}{'trial-epochs/s':>15}{'loop beside':>13}{'ratio':>8}   part of the peak")

    def line(name: str, rate: float, beside: float) -> None:
        flops = rate * figures["gflop_per_trial_epoch"] / 1e3
        parts = " ".join(f"{flops / peak:7.1%}" for peak in peaks.values())
        print(f"{name:24}{rate:15.2f}{beside:13.2f}{rate / beside:8.2f}   {parts}")

    for threads, rate in figures["loop"].items():
        line(f"loop, {threads}", rate, loop)
    line("plain", figures["plain"], loop)
    for row in table:
        line(f"{row['trials']} trial{'s' if row['trials'] > 1 else ''}, {row['as']}", row["rate"], row["loop"])
    if not table:
        return
    best = max(table, key=lambda row: row["rate"] / row["loop"])
    print(f"RATIO best rows to loop        {best['rate'] / best['loop']:.2f}  ({best['trials']} trials)")
    for row in table:
        if row["trials"] == 8:
            print(f"RATIO 8 trials to loop         {row['rate'] / row['loop']:.2f}")
        if row["trials"] == 1:
            print(f"RATIO one row to plain trainer {row['rate'] / row['plain']:.2f}")
    ratios = " · ".join(f"{row['trials']}: {row['rate'] / row['loop']:.2f}" for row in table)
    plain = f"plain: {figures['plain'] / loop:.2f}"
    print(f"RATIOS to loop, {model} in {figures['precision']}, by trials   {ratios} · {plain}")


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"


def _thread_name(threads: int | None) -> str:
    count = threads or torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parse() -> Options:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default), help=f"(default: {default})")
    models_help = "of mlp cnn net resnet18 (default: all; on a CPU without resnet18)"
    parser.add_argument("--models", nargs="+", choices=list(BATCH), metavar="MODEL", help=models_help)
    rows_help = "trials at once (default: 1 2 4 8 16 32 64 128; resnet18 on a CPU: 1 2)"
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help=rows_help)
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement, at least (default: 0.5)")
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the fastest counts (default: 3)")
    samples_help = f"random images to train net and resnet18 on (default: {CUDA_SAMPLES}; CPU {CPU_SAMPLES})"
    parser.add_argument("--samples", type=int, metavar="N", help=samples_help)
    choices = ["fp32", "tf32", "bf16"]
    parser.add_argument("--precision", choices=choices, default="fp32", help="fp32, tf32 or bf16 (default: fp32)")
    parser.add_argument("--channels-last", action="store_true", help="images and kernels with the channels last")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="of the device (default: a matmul's, measured)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = vars(parser.parse_args())
    on_cpu = arguments["device"].type == "cpu"
    arguments["models"] = arguments["models"] or [model for model in BATCH if not (on_cpu and model == "resnet18")]
    few = on_cpu and "resnet18" in arguments["models"]
    arguments["rows"] = arguments["rows"] or ([1, 2] if few else [1, 2, 4, 8, 16, 32, 64, 128])
    return Options(**arguments, processes=torch.get_num_threads() if on_cpu else 1)


if __name__ == "__main__":
    main()
