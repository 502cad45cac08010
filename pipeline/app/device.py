"""Choose the device, and describe the device and the machine for records."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from pipeline import __version__
from pipeline.errors import InvalidInput, Problem
from pipeline.space.search_space import SearchSpace
from pipeline.training.executor import LocalExecutor
from pipeline.training.precision import current_settings

TF32_CAPABILITY = (8, 0)
"""Compute capability of the first CUDA devices with tf32, https://docs.nvidia.com/cuda/cuda-c-programming-guide/."""


def choose_device(name: str) -> torch.device:
    """Return the device of a name.

    Raises:
        InvalidInput: There is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InvalidInput("--device", [Problem(name, "there is no Metal device; use --device cpu, or auto")])
    if device.type == "cuda" and (device.index or 0) >= count:
        there = f"there are {count} CUDA devices, cuda:0 to cuda:{count - 1}" if count else "there is no CUDA device"
        raise InvalidInput("--device", [Problem(name, f"{there}; use --device cpu, or auto")])
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def precision_problems(space: SearchSpace, device: torch.device) -> list[Problem]:
    """Return the problem of a precision that the device lacks; PyTorch would silently use another."""
    remedy = "set precision to fp32" + ("" if device.type == "mps" else " or bf16")
    if space.precision == "fp64" and device.type == "mps":
        return [Problem("precision", f"fp64 is more than Metal devices compute; {remedy}, or use --device cpu")]
    if space.precision == "tf32" and device.type != "cuda":
        return [Problem("precision", f"tf32 needs a CUDA device, and trials train on {device.type}; {remedy}")]
    if space.precision == "tf32" and torch.cuda.get_device_capability(device) < TF32_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return [Problem("precision", f"tf32 needs a CUDA device of capability 8.0, which {name} is not; {remedy}")]
    return []


def environment(executor: LocalExecutor) -> dict[str, Any]:
    """Return everything that a trial's numbers may depend on, except config and placement."""
    device = executor.device
    with executor.precision():
        settings = current_settings(device)
    return {
        "device": device_name(device),
        **settings,
        **machine(),
        "python": platform.python_version(),
        "pipeline": __version__,
    }


def device_name(device: torch.device) -> str:
    """Return the name of a CUDA device; of another device, its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def machine() -> dict[str, Any]:
    """Return the kind of this machine; a CPU of the same kind repeats a trial's metrics to the bit."""
    return {
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
    }


def _cpu_model() -> str:
    """Return the name of the CPU and, where the system provides them, its family, model and stepping."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    parts = [values.get(key) for key in ("model name", "cpu family", "model", "stepping")]
    return " ".join(part for part in parts if part) or platform.processor()
