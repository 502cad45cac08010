"""Profile the training of a matrix: launches, the device's busy time and gaps, the host's time, memory.

Trials of `throughput.py` train as the rows of one matrix. After the warm-up epochs come measured ones:

- some without a profiler, for the wall time; in one of them the training steps are timed by themselves, until the host
  has prepared them and until they are done;
- one under `torch.profiler`, for kernels, launches, synchronisations, and the device's busy time: the time in which at
  least one kernel or copy runs. Gaps are the rest of the time between the first and the last of them;
- one under `cProfile`, for the Python functions that take the host's time.

All figures but those two are of whole epochs, with their evaluation, divided by the number of training steps. On a CPU
there are no figures of a device. Needs only torch, torchvision and scikit-learn:

    python benchmarks/gpu_profile.py --device cuda --models mlp cnn net --rows 32 --json profile.json
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import dataclasses
import io
import json
import pstats
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from throughput import BATCH, build_config, build_workload
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package need not be installed

from pipeline.training.precision import precision
from pipeline.training.rows.captured import capture_on
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.data import to_device

WARM_UP_EPOCHS = 3
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
"""Categories of a trace's events that run on the device."""
CALLS = {"cuda_runtime", "cuda_driver"}
"""Categories of the host's calls to the device."""
TOP = 12


def main() -> None:
    """Profile each model, print a table, and write the figures as JSON."""
    options = _parse()
    device: torch.device = options.device
    figures = {model: profile_model(model, options) for model in options.models}
    for model, found in figures.items():
        print(f"\n{model}: the {TOP} kernels or operations that take the most time, ms per step and launches per step")
        for kernel in found["top"]:
            print(f"{kernel['ms_per_step']:10.4f}{kernel['per_step']:9.1f}   {kernel['name'][:90]}")
        print("the functions of Python that take the most time of the host, in an epoch")
        print(found["host_profile"])
    print(f"{'per training step':22}" + "".join(f"{name:>14}" for name in figures))
    for name in next(iter(figures.values())):
        if name not in ("top", "calls", "host_profile"):
            values = "".join(f"{_shown(found[name]):>14}" for found in figures.values())
            print(f"{name:22}{values}")
    if options.json:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        report = {"device": name, "torch": torch.__version__, "models": figures}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def profile_model(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a matrix of a model."""
    device: torch.device = options.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    workload = to_device(build_workload(model, device, options.samples), device=device, dtype=torch.float32)
    config = {"precision": options.precision, "channels_last": options.channels_last}
    configs = {n: dataclasses.replace(build_config(model, n), **config) for n in range(options.rows)}
    with precision(configs[0], device) if device.type == "cuda" else contextlib.nullcontext():
        capture = None if options.eager else capture_on(device)
        group = FusedTrials(configs, workload, device=device, draws=(), capture=capture)
        for _ in range(WARM_UP_EPOCHS):
            group.train_epoch()
        steps = -(-len(workload.train) // BATCH[model])
        figures: dict[str, Any] = {"rows": options.rows, "steps": steps, **_times(group, steps, device)}
        figures |= _profiled(group, steps, device)
        figures["host_profile"] = _host_profile(group)
    if device.type == "cuda":
        figures["allocated_MiB"] = torch.cuda.max_memory_allocated(device) / 2**20
        figures["reserved_MiB"] = torch.cuda.max_memory_reserved(device) / 2**20
    return figures


def _times(group: FusedTrials, steps: int, device: torch.device) -> dict[str, float]:
    """Time whole epochs, of which the fastest counts; then the training steps of another, prepared and done."""
    epochs = []
    for _ in range(3):
        start = time.perf_counter()
        group.train_epoch()
        _wait(device)
        epochs.append(time.perf_counter() - start)
    group.begin_epoch()
    _wait(device)
    start = time.perf_counter()
    for batch in group.training_batches():
        group.train_step(batch)
    prepared = time.perf_counter()
    _wait(device)
    done = time.perf_counter()
    for batch in group.evaluation_batches("val"):
        group.evaluate_step(batch)
    group.end_epoch()
    seconds = {"epoch_ms": min(epochs), "step_ms": done - start, "step_host_ms": prepared - start}
    return {name: 1e3 * value / steps for name, value in seconds.items()}


def _profiled(group: FusedTrials, steps: int, device: torch.device) -> dict[str, Any]:
    """Return what a profiler sees of an epoch, per training step."""
    on_cuda = device.type == "cuda"
    # On CUDA without the operations of the host, whose recording would widen the gaps on the device.
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        group.train_epoch()
        _wait(device)
    if not on_cuda:
        averages = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        of = [(event.key, event.self_cpu_time_total, event.count) for event in averages]
        return {"top": _top(of, steps)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if "cat" in event and "dur" in event]
    return figures_of(events, steps)


def figures_of(events: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """Return figures per training step from the events of a Chrome trace, whose times are microseconds."""
    on_device = [event for event in events if event["cat"].lower() in ON_DEVICE]
    calls = Counter(str(event["name"]) for event in events if event["cat"].lower() in CALLS)
    launches = sum(count for name, count in calls.items() if "LaunchKernel" in name)
    spans = sorted((float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in on_device)
    busy = _union(spans)
    whole = max(end for _, end in spans) - spans[0][0] if spans else 0.0
    times: dict[str, float] = defaultdict(float)
    counts = Counter(str(event["name"]) for event in on_device)
    for event in on_device:
        times[str(event["name"])] += float(event["dur"])
    by_time = sorted(times, key=lambda name: -times[name])
    return {
        "launches": launches / steps,
        "graph_launches": sum(count for name, count in calls.items() if "GraphLaunch" in name) / steps,
        "synchronisations": sum(count for name, count in calls.items() if "Synchronize" in name) / steps,
        "kernels": sum(event["cat"].lower() == "kernel" for event in on_device) / steps,
        "copies": sum(event["cat"].lower() != "kernel" for event in on_device) / steps,
        "busy_ms": busy / 1e3 / steps,
        "first_to_last_ms": whole / 1e3 / steps,
        "gaps": 1 - busy / whole if whole else 0.0,
        "top": _top([(name, times[name], counts[name]) for name in by_time], steps),
        "calls": {name: count / steps for name, count in calls.most_common(TOP)},
    }


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals in order of their begins."""
    total, until = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _top(of: Sequence[tuple[str, float, int]], steps: int) -> list[dict[str, Any]]:
    """Return the first names of (name, microseconds, count), per training step."""
    return [{"name": n, "ms_per_step": us / 1e3 / steps, "per_step": count / steps} for n, us, count in of[:TOP]]


def _host_profile(group: FusedTrials) -> str:
    """Return the functions of Python in which an epoch spends the most time of the host."""
    python = cProfile.Profile()
    python.runcall(group.train_epoch)
    text = io.StringIO()
    pstats.Stats(python, stream=text).sort_stats("tottime").print_stats(TOP)
    lines = text.getvalue().splitlines()
    first = next(number for number, line in enumerate(lines) if "ncalls" in line)
    return "\n".join(line for line in lines[first:] if line)


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default), help=f"(default: {default})")
    models_help = "of mlp cnn net resnet18 (default: mlp cnn net)"
    models = ["mlp", "cnn", "net"]
    parser.add_argument("--models", nargs="+", choices=list(BATCH), default=models, metavar="MODEL", help=models_help)
    parser.add_argument("--rows", type=int, default=32, metavar="N", help="trials of the matrix (default: 32)")
    samples_help = "random images to train net and resnet18 on (default: as throughput.py)"
    parser.add_argument("--samples", type=int, metavar="N", help=samples_help)
    eager_help = "run steps operation by operation, not as graphs"
    parser.add_argument("--eager", action="store_true", help=eager_help)
    choices = ["fp32", "tf32", "bf16"]
    parser.add_argument("--precision", choices=choices, default="fp32", help="fp32, tf32 or bf16 (default: fp32)")
    parser.add_argument("--channels-last", action="store_true", help="images with the channels last")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
