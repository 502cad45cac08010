"""The largest matrix of resnet18 that trains on a CUDA device: predicted from one step of one trial, and tried.

A search tries a training and an evaluation batch of a matrix before its first epoch, and halves the matrix while these
do not fit. The benchmark begins with twice the predicted rows. Needs only torch, torchvision and scikit-learn:

    python benchmarks/gpu_memory.py
    python benchmarks/gpu_memory.py --precision fp32 --most 64
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch
from throughput import build_config, build_workload

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package need not be installed

from pipeline.training.executor import LocalExecutor
from pipeline.training.rows.measure import measure_step
from pipeline.workloads.data import free_memory, to_device


def main() -> None:
    """Predict, try, train, and print the measurements."""
    options = _parse()
    device = options.device
    config = dataclasses.replace(build_config("resnet18", 0), precision=options.precision)
    workload = build_workload("resnet18", device, options.samples)
    placed = to_device(workload, device=device, dtype=torch.float32)
    free = free_memory(device)
    predicted = free // measure_step(placed, config, device, torch.float32).trial_bytes
    count = min(options.most, 2 * predicted)
    print(f"{free / 2**30:.1f} GiB free on {device}; predicted rows of a matrix: {predicted}; tried first: {count}")
    executor = LocalExecutor(workload, config, device=device)
    configs = {n: dataclasses.replace(build_config("resnet18", n), precision=options.precision) for n in range(count)}
    group = executor.build(configs)
    for epoch in ("first, with the search for the largest matrix", "second"):
        start = time.perf_counter()
        results = group.train_epoch()
        if len(results) < count or not all(metrics.finished for metrics in results.values()):
            raise RuntimeError("a trial has ended early")
        print(f"{epoch} epoch: {time.perf_counter() - start:.1f} s, {executor.describe(configs)}")
    print(f"rows of the largest matrix: {executor.rules.row_limit or count}")
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        print(f"most memory: {allocated / 2**30:.1f} GiB allocated, {reserved / 2**30:.1f} GiB reserved")


def _parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default), help=f"(default: {default})")
    parser.add_argument("--samples", type=int, default=512, metavar="N", help="random images (default: 512)")
    parser.add_argument("--most", type=int, default=512, metavar="N", help="most rows to try (default: 512)")
    choices = ["fp32", "tf32", "bf16"]
    parser.add_argument("--precision", choices=choices, default="bf16", help="fp32, tf32 or bf16 (default: bf16)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
