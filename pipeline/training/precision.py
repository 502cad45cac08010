"""PyTorch's global settings of arithmetic: set as a config asks while trials train, and restored afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.space.config import TrialConfig

_CUDNN: Any = torch.backends.cudnn
PRODUCTS: tuple[Any, ...] = (torch.backends.cuda.matmul, _CUDNN.conv, _CUDNN.rnn)
"""Operations that a CUDA device may compute from rounded factors, https://docs.pytorch.org/docs/stable/notes/cuda.html;
by default PyTorch rounds the factors of convolutions."""


@contextlib.contextmanager
def precision(config: TrialConfig, device: torch.device, *, threads: int = 1) -> Iterator[None]:
    """Set PyTorch's global settings as a config asks, and restore them afterwards.

    bfloat16 is no global setting; see `pipeline.training.epoch.autocast`.

    Args:
        config: Gives the precision, and whether only deterministic algorithms are used.
        device: Where trials train.
        threads: Number of threads on a CPU; the rounding of a sum depends on it.
    """
    threads_before = torch.get_num_threads()
    products = [product.fp32_precision for product in PRODUCTS]
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        if device.type == "cpu":
            torch.set_num_threads(threads)
        if device.type == "cuda":
            _set_products(["tf32" if config.precision == "tf32" else "ieee"] * len(PRODUCTS))
        if config.deterministic:
            if device.type == "cuda":
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.set_num_threads(threads_before)
        _set_products(products)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cudnn.benchmark = benchmark


def dtype_of(precision: str) -> torch.dtype:
    """Return the type of parameters and floating-point data for a config's `precision`."""
    return torch.float64 if precision == "fp64" else torch.float32


def current_settings(device: torch.device) -> dict[str, Any]:
    """Return PyTorch's present global settings that results depend on."""
    if device.type == "cpu":
        return {"threads": torch.get_num_threads(), "deterministic": torch.are_deterministic_algorithms_enabled()}
    cuda_settings = {"fp32_precision": PRODUCTS[0].fp32_precision} if device.type == "cuda" else {}
    return {**cuda_settings, "deterministic": torch.are_deterministic_algorithms_enabled()}


def _set_products(precisions: list[str]) -> None:
    for product, precision in zip(PRODUCTS, precisions, strict=True):
        product.fp32_precision = precision
