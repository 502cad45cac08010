"""Seed the global random states of torch, Python and NumPy."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_global(seed: int, device: torch.device) -> None:
    """Seed torch's global random states of the CPU and a device.

    `torch.manual_seed` also seeds kinds of devices that are absent, and records a traceback for each, which takes
    0.3 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the random states of torch, Python and NumPy inside the block, and restore them after it."""
    device = device or torch.device("cpu")
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_global(seed, device)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def random_states() -> tuple[bytes, Any, str]:
    """Return the random states of the CPU, to be compared."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())
