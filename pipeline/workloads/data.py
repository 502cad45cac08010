"""Supply batches while trials train, from data that were moved to the device once or are read batch by batch.

Both ways give the same batches. The random numbers of a sample or an augmentation are a function of the seed, the epoch
and the sample or step. They are therefore equal for every trial, in any order, with any number of reader processes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import default_collate

from pipeline.errors import DataError
from pipeline.space.config import TrialConfig, derive_seed
from pipeline.workloads.random_state import seeded
from pipeline.workloads.streamed import MAX_READERS, Streamed, checked_call, draws_at_random, read_sample
from pipeline.workloads.workload import Dataset, Samples, Split, Workload

MEMORY_SHARE = 0.25
"""The part of the free memory that data may take to be kept on the device."""
MAX_EVAL_BATCH, MAX_EVAL_NUMBERS = 1024, 1 << 20
"""Most samples per forward pass of an evaluation, and most numbers in their inputs; the smaller limit holds."""


def to_device(workload: Workload, *, device: torch.device, dtype: torch.dtype, free: int | None = None) -> Workload:
    """Return a workload whose splits are `Samples` on a device: moved there if they fit, else read batch by batch.

    A workload that is on the device already, in `dtype`, is returned as it is. A split that is read batch by batch
    stays so, whatever is free.

    Args:
        workload: Splits are in memory, data sets, or `Streamed`.
        device: Where trials train.
        dtype: Type of floating-point data on the device.
        free: Bytes that the data may take on the device; None: a quarter of the free memory.

    Raises:
        DataError: A data set raised.
    """
    moving = {name: split for name, split in _splits(workload).items() if not _is_on(split, device, dtype)}
    if not moving:
        return workload
    free = int(MEMORY_SHARE * free_memory(device)) if free is None else free
    moved: dict[str, Any] = {}
    for name, split in moving.items():
        try:
            moved[name], taken = _moved(split, device=device, dtype=dtype, free=free)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        free -= taken
    return dataclasses.replace(workload, **moved)


def is_streamed(workload: Workload) -> bool:
    """Say whether training data are read batch by batch."""
    return isinstance(workload.train, Streamed)


def training_batches(
    workload: Workload, config: TrialConfig, *, epoch: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of an epoch, counted from 0, as the model sees them; they depend on seed and epoch alone."""
    order = epoch_order(len(workload.train), seed=config.seed, epoch=epoch)
    seed = derive_seed(config.seed, "samples", epoch)
    batches = samples_of(workload, "train").batches(order.split(config.batch_size), seed=seed)
    for step, (inputs, targets) in enumerate(batches):
        if workload.augment is not None:
            inputs = augmented(workload, inputs, seed=derive_seed(config.seed, "augment", epoch, step))
        yield _laid_out(model_inputs(workload, inputs, dtype), config), targets


def evaluation_batches(
    workload: Workload, name: str, config: TrialConfig, *, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a split in order, as the model sees them."""
    split = samples_of(workload, name)
    batches = torch.arange(len(split)).split(evaluation_batch_size(split, config))
    for inputs, targets in split.batches(batches, seed=derive_seed(config.seed, name)):
        yield _laid_out(model_inputs(workload, inputs, dtype), config), targets


def _laid_out(inputs: Tensor, config: TrialConfig) -> Tensor:
    """Return a batch in the memory layout of a config."""
    images = config.channels_last and inputs.ndim == 4
    return inputs.contiguous(memory_format=torch.channels_last) if images else inputs


def evaluation_batch_size(split: Samples, config: TrialConfig) -> int:
    """Return how many samples of a split are evaluated at once."""
    return max(config.batch_size, min(MAX_EVAL_BATCH, MAX_EVAL_NUMBERS // max(1, split.sample_size)))


def augmented(workload: Workload, inputs: Tensor, *, seed: int) -> Tensor:
    """Return a batch as `augment` changes it, with every random state seeded that `augment` may draw from.

    Raises:
        DataError: `augment` raised.
    """
    assert workload.augment is not None
    generator = torch.Generator(inputs.device).manual_seed(seed)
    with seeded(seed, inputs.device):
        changed: Tensor = checked_call("augment", workload.augment, inputs, generator)
        return changed


def model_inputs(workload: Workload, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the model's input for a batch.

    Raises:
        DataError: `preprocess` raised.
    """
    inputs = inputs if workload.preprocess is None else checked_call("preprocess", workload.preprocess, inputs)
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def samples_of(workload: Workload, name: str) -> Samples:
    """Return a split of a workload that `to_device` returned."""
    return cast(Samples, getattr(workload, name))


def first_samples(samples: Samples, count: int) -> Split:
    """Return the first samples of a split."""
    ((inputs, targets),) = samples.batches([torch.arange(min(count, len(samples)))], seed=0)
    return Split(inputs, targets)


def some_samples(samples: Samples, count: int, *, seed: int) -> Any:
    """Return `count` samples of a split, chosen at random, or all samples if there are fewer."""
    return samples if count >= len(samples) else samples.take(epoch_order(len(samples), seed=seed, epoch=0)[:count])


def epoch_order(samples: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order (sample,) in which an epoch visits the training data; it depends on seed and epoch alone."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))


def _splits(workload: Workload) -> dict[str, Split | Streamed | Dataset]:
    splits = {"train": workload.train, "val": workload.val, "test": workload.test}
    return {name: split for name, split in splits.items() if split is not None}


def _is_on(split: Split | Streamed | Dataset, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a split's batches are on a device already, floating-point values in `dtype`."""
    if isinstance(split, Streamed):
        return split.to(device, dtype) is split
    return isinstance(split, Split) and all(
        tensor.device == device and (tensor.dtype == dtype or not tensor.is_floating_point())
        for tensor in (split.inputs, split.targets)
    )


def _moved(
    split: Split | Streamed | Dataset, *, device: torch.device, dtype: torch.dtype, free: int
) -> tuple[Samples, int]:
    """Return a split's samples on a device, and the bytes that they newly take there."""
    if isinstance(split, Streamed):
        return split.to(device, dtype), 0
    streamed = Streamed(split, device=device, dtype=dtype)
    if isinstance(split, Split):
        size = 0 if split.inputs.device == device else split.inputs.nbytes + split.targets.nbytes
        return (split.to(device, dtype), size) if size <= free else (streamed, 0)
    inputs, targets = default_collate([read_sample(split, 0, seed=0)[0]])
    size = len(split) * (inputs.nbytes + targets.nbytes)
    if size > free or draws_at_random(split):
        return streamed, 0
    batches = list(streamed.batches(torch.arange(len(split)).split(MAX_READERS), seed=0))
    return Split(torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])), size


def free_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
