"""Seed the global random states of torch, Python and NumPy."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch

KINDS = ("torch", "python", "numpy")
"""The libraries whose global random states a model or a data set may draw from."""


def seed_global(seed: int, device: torch.device) -> None:
    """Seed torch's global random states of the CPU and a device.

    `torch.manual_seed` also seeds kinds of devices that are absent, and records a traceback for each, which takes
    0.3 ms.
    """
    for generator in _generators(device):
        generator.manual_seed(seed)
    if device.type == "mps":
        torch.mps.manual_seed(seed)


def seed_host(seed: int) -> None:
    """Seed the global random states of torch on the CPU, Python and NumPy."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _generators(device: torch.device | None) -> list[torch.Generator]:
    """Return torch's global random generators of the CPU and of a CUDA device."""
    if device is None or device.type != "cuda":
        return [torch.default_generator]
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


@contextlib.contextmanager
def random_states_kept(kinds: Collection[str] = KINDS, device: torch.device | None = None) -> Iterator[None]:
    """Restore global random states after the block.

    Args:
        kinds: Which of `KINDS`.
        device: torch's state on this device is restored too, if it is CUDA.
    """
    python = random.getstate() if "python" in kinds else None
    numpy = np.random.get_state() if "numpy" in kinds else None
    generators = [(generator, generator.get_state()) for generator in _generators(device) if "torch" in kinds]
    try:
        yield
    finally:
        for generator, state in generators:
            generator.set_state(state)
        if python is not None:
            random.setstate(python)
        if numpy is not None:
            np.random.set_state(numpy)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None, kinds: Collection[str] = KINDS) -> Iterator[None]:
    """Seed the random states of torch, Python and NumPy inside the block, and restore them after it.

    Args:
        seed: The seed.
        device: torch's state on this device is seeded too.
        kinds: Which of `KINDS`; others stay as they are.
    """
    with random_states_kept(kinds, device):
        if "torch" in kinds:
            seed_global(seed, device or torch.device("cpu"))
        if "python" in kinds:
            random.seed(seed)
        if "numpy" in kinds:
            np.random.seed(seed % 2**32)
        yield


def random_states(device: torch.device | None = None) -> dict[str, Any]:
    """Return the random state of each kind, to be compared."""
    torch_states = [torch.get_rng_state()]
    if device is not None and device.type == "cuda":
        torch_states.append(torch.cuda.get_rng_state(device))
    if device is not None and device.type == "mps":
        torch_states.append(torch.mps.get_rng_state())
    return {
        "torch": [state.numpy().tobytes() for state in torch_states],
        "python": random.getstate(),
        "numpy": [part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
    }
