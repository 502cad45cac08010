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
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    on_cuda = device.type == "cuda"
    try:
        if device.type == "cpu":
            torch.set_num_threads(threads)
        if config.deterministic:
            if on_cuda:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
            torch.use_deterministic_algorithms(True)
        if config.deterministic or on_cuda:  # trying all algorithms for a matrix takes too long
            torch.backends.cudnn.benchmark = False
        with current(device), _products_in_tf32(config.precision == "tf32") if on_cuda else contextlib.nullcontext():
            yield
    finally:
        torch.set_num_threads(threads_before)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cudnn.benchmark = benchmark


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a CUDA device that is there is the current one: pinned memory and streams are of it."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.device(device) if there else contextlib.nullcontext()


def dtype_of(precision: str) -> torch.dtype:
    """Return the type of parameters and floating-point data for a config's `precision`."""
    return torch.float64 if precision == "fp64" else torch.float32


def current_settings(device: torch.device) -> dict[str, Any]:
    """Return PyTorch's present global settings that results depend on."""
    if device.type == "cpu":
        return {"threads": torch.get_num_threads(), "deterministic": torch.are_deterministic_algorithms_enabled()}
    cuda_settings = {"fp32_precision": PRODUCTS[0].fp32_precision} if device.type == "cuda" else {}
    return {**cuda_settings, "deterministic": torch.are_deterministic_algorithms_enabled()}


@contextlib.contextmanager
def _products_in_tf32(tf32: bool) -> Iterator[None]:
    """Set whether products round their factors to tf32, and restore it.

    PyTorch has an older and a newer interface to this, and both are set: where the two disagree, reading the older
    raises, and a model reads the older by calling `torch.backends.cudnn.flags`. If the two disagreed before, only the
    newer is restored.
    """
    before = [product.fp32_precision for product in PRODUCTS]
    older: tuple[str, bool] | None = None
    with contextlib.suppress(RuntimeError):  # the two disagree already
        older = torch.get_float32_matmul_precision(), _CUDNN.allow_tf32
    try:
        _set_older("high" if tf32 else "highest", tf32)
        _set_products(["tf32" if tf32 else "ieee"] * len(PRODUCTS))
        yield
    finally:
        if older is not None:
            _set_older(*older)
        _set_products(before)


def _set_older(matmul: str, convolutions_in_tf32: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    _CUDNN.allow_tf32 = convolutions_in_tf32


def _set_products(precisions: list[str]) -> None:
    for product, precision in zip(PRODUCTS, precisions, strict=True):
        product.fp32_precision = precision
